"""
Benchmark of lower precision: size, speed and accuracy, in one table.

    python benchmarks/precision.py
    python benchmarks/precision.py --share 0.5 --repeats 20

Compares float32, bfloat16 and float16; int8 weights, and int8 weights and activations (dynamic), with torchao; ONNX in
float32, and with `samclip export --quantize`. All variants are evaluated on the same scenes of the miniature and
alternate in one process, so that other load on the machine affects all of them. `--model` measures size and speed of
another checkpoint; its metrics on these scenes are not meaningful. Needs the extras `train` and `export`.
"""

import argparse
import copy
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch
import torchao
import transformers
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
from transformers import AutoProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from samclip_hf import SamClipForImageSegmentation, miniature
from samclip_hf.evaluation import Evaluator, SamClipAdapter
from samclip_hf.export import PART_NAMES, export
from samclip_hf.miniature.scenes import BACKGROUND_PROMPTS, CLASS_NAMES
from samclip_hf.miniature_lab.tasks import tasks
from samclip_hf.vision_encoder_samclip import SamClipVisionEncoderOutput

METRICS = {  # title: (task, metric)
    "top-1": ("classification:miniature@128", "top1"),
    "point": ("prompts:miniature", "point_miou"),
    "text, CLIP head": ("semantic:miniature@128", "mean_iou"),
    "text, both heads": ("composed:miniature", "mean_iou"),
}


class OnnxVisionEncoder(nn.Module):
    """Replaces the model's image encoder by the exported one, for images without padding."""

    def __init__(self, run: Callable):
        super().__init__()
        self.run = run

    def forward(self, pixel_values, **kwargs):
        sizes = torch.tensor([pixel_values.shape[-2:]] * len(pixel_values))
        self.outputs = self.run("image_encoder", pixel_values=pixel_values, reshaped_input_sizes=sizes)
        return SamClipVisionEncoderOutput(
            last_hidden_state=self.outputs["image_embeddings"], patch_tokens=self.outputs["patch_tokens"]
        )


class OnnxClipHead(nn.Module):
    """Replaces the CLIP head. The outputs for the whole image come from the exported image encoder, which contains the
    CLIP head; those for segments come from the exported segment encoder."""

    def __init__(self, encoder: OnnxVisionEncoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, patch_tokens, content_mask=None):
        return patch_tokens

    def pool(self, head_tokens, content_mask=None):
        return self.encoder.outputs["image_embeds"]

    def project_patches(self, head_tokens):
        return self.encoder.outputs["dense_embeds"]

    def pool_segments(self, patch_tokens, segments):
        embeds = patch_tokens.new_zeros(*segments.shape[:2], self.encoder.outputs["image_embeds"].shape[-1])
        for image, number in segments.flatten(2).any(dim=-1).nonzero().tolist():
            rows, columns = segments[image, number].nonzero(as_tuple=True)
            outputs = self.encoder.run(
                "segment_encoder", patch_tokens=patch_tokens[image : image + 1], rows=rows, columns=columns
            )
            embeds[image, number] = outputs["segment_embeds"][0]
        return embeds


class OnnxModel(SamClipForImageSegmentation):
    """A SAM-CLIP that runs the exported parts with onnxruntime, and the code between them with PyTorch."""

    def load_onnx(self, folder: Path) -> "OnnxModel":
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.sessions = {
            part: onnxruntime.InferenceSession(str(folder / f"{part}.onnx"), options, ["CPUExecutionProvider"])
            for part in PART_NAMES
        }
        self.vision_encoder = OnnxVisionEncoder(self.run)
        self.clip_head = OnnxClipHead(self.vision_encoder)
        return self

    def run(self, part: str, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        session = self.sessions[part]
        outputs = session.run(None, {name: value.contiguous().numpy() for name, value in inputs.items()})
        names = (output.name for output in session.get_outputs())
        return dict(zip(names, map(torch.from_numpy, outputs), strict=True))

    def get_text_features(self, input_ids, attention_mask, **kwargs):
        outputs = self.run("text_encoder", input_ids=input_ids, attention_mask=attention_mask)
        return BaseModelOutputWithPooling(pooler_output=outputs["text_embeds"])

    def predict_masks(
        self,
        image_embeddings,
        input_points=None,
        input_labels=None,
        input_boxes=None,
        input_masks=None,
        multimask_output=True,
        **unused,
    ):
        if input_masks is not None or any(value is not None for value in unused.values()):
            raise ValueError("The ONNX mask decoder of this benchmark accepts points, or boxes.")
        points = input_boxes.unflatten(-1, (2, 2)) if input_points is None else input_points
        labels = torch.tensor([2, 3] if input_points is None else [1] * points.shape[2])
        labels = labels.expand(points.shape[:-1]) if input_labels is None else input_labels
        if input_boxes is None:
            points, labels = nn.functional.pad(points, (0, 0, 0, 1)), nn.functional.pad(labels, (0, 1), value=-1)
        outputs = self.run("mask_decoder", image_embeddings=image_embeddings, input_points=points, input_labels=labels)
        masks = slice(1, None) if multimask_output else slice(0, 1)
        return outputs["pred_masks"][:, :, masks], outputs["iou_scores"][:, :, masks]


def create_variants(name: str, folder: Path) -> dict[str, tuple[SamClipForImageSegmentation, int]]:
    """Returns the model in every precision and the size of its files in bytes, by title."""
    model = SamClipForImageSegmentation.from_pretrained(name, dtype=torch.float32).eval()
    if not model.config.merged:
        raise SystemExit(f"{name} is an unmerged model. This benchmark runs merged models.")
    models: dict[str, SamClipForImageSegmentation] = {"float32": model}
    for dtype in (torch.bfloat16, torch.float16):
        models[str(dtype).removeprefix("torch.")] = copy.deepcopy(model).to(dtype)
    for title, config in {
        "torchao int8, weights": Int8WeightOnlyConfig(),
        "torchao int8, dynamic": Int8DynamicActivationInt8WeightConfig(),
    }.items():
        models[title] = copy.deepcopy(model)
        quantize_(models[title], config)
    variants = {}
    for title, model in models.items():
        path = folder / "weights.pt"
        torch.save(model.state_dict(), path)
        variants[title] = (model, path.stat().st_size)

    for title, quantize in {"ONNX float32": False, "ONNX int8, `--quantize`": True}.items():
        subfolder = "onnx_int8" if quantize else "onnx"
        export(name, folder / subfolder, quantize=quantize)
        size = sum(path.stat().st_size for path in (folder / subfolder).glob("*.onnx*"))
        onnx_model = OnnxModel.from_pretrained(name, dtype=torch.float32).eval().load_onnx(folder / subfolder)
        variants[title] = (onnx_model, size)
    return variants


def compare(functions: dict[str, Callable], repeats: int) -> dict[str, list[float]]:
    """Returns the seconds of every run of each function. The functions alternate."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):  # the first run is a warm-up
        for name, function in functions.items():
            start = time.perf_counter()
            with torch.inference_mode():
                function()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def speed(seconds: dict[str, list[float]], title: str) -> str:
    """Formats the speed relative to float32: median (lowest - highest)."""
    ratios = sorted(base / variant for base, variant in zip(seconds["float32"], seconds[title], strict=True))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} - {ratios[-1]:.2f})"


def evaluate(adapter: SamClipAdapter, evaluators: dict[str, Evaluator]) -> dict[str, float]:
    results = {task: evaluators[task].run(adapter) for task, _ in METRICS.values()}
    return {title: results[task].metrics[metric] for title, (task, metric) in METRICS.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=miniature.checkpoint(), help="default: the shipped miniature")
    parser.add_argument("--share", type=float, default=0.25, help="fraction of the 480 and 200 evaluation scenes")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=101, help="seed of the scenes")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")  # the exporter's and quantizers' warnings about their own code
    logging.getLogger().setLevel(logging.ERROR)

    with tempfile.TemporaryDirectory() as folder:
        variants = create_variants(arguments.model, Path(folder))
        processor = AutoProcessor.from_pretrained(arguments.model)
        evaluators = tasks(arguments.seed, arguments.share)
        scene = evaluators["composed:miniature"].data.samples[3].image()
        pixel_values = processor(scene)["pixel_values"]
        vocabulary = variants["float32"][0].embed_vocabulary(CLASS_NAMES, BACKGROUND_PROMPTS, ["a {}"])

        def encode(model):
            tokens = model.vision_encoder(pixel_values.to(model.dtype)).patch_tokens
            model.clip_head.project_patches(model.clip_head(tokens))

        def segment(model):
            model(pixel_values.to(model.dtype), vocabulary=vocabulary)

        encoder_seconds, model_seconds = (
            compare({title: lambda m=m, f=f: f(m) for title, (m, _) in variants.items()}, arguments.repeats)
            for f in (encode, segment)
        )
        metrics = {
            title: evaluate(SamClipAdapter(title, model, processor), evaluators)
            for title, (model, _) in variants.items()
        }

    scenes = {task: len(evaluators[task].data.samples) for task, _ in METRICS.values()}
    height, width = pixel_values.shape[-2:]
    print(
        f"{height} x {width} pixels, {arguments.threads} threads, {arguments.repeats} runs; scenes: {scenes}; torch "
        f"{torch.__version__}, torchao {torchao.__version__}, onnxruntime {onnxruntime.__version__}, transformers "
        f"{transformers.__version__}\n\n"
        f"| | MB | speed, encoder and CLIP head | speed, text to masks | {' | '.join(METRICS)} |\n"
        f"|{'---|' * (4 + len(METRICS))}"
    )
    for title, (_, size) in variants.items():
        cells = [
            f"{value:.3f}" if title == "float32" else f"{value:.3f} ({value - base:+.3f})"
            for value, base in zip(metrics[title].values(), metrics["float32"].values(), strict=True)
        ]
        print(
            f"| {title} | {size / 1e6:.1f} | {speed(encoder_seconds, title)} | {speed(model_seconds, title)} | "
            f"{' | '.join(cells)} |"
        )


if __name__ == "__main__":
    main()
