"""
Speed and memory of SAM-CLIP against transformers' own models of the same size, ViT-B, with random weights.

    python benchmarks/inference.py encoder         # image encoder against SamModel's
    python benchmarks/inference.py text_to_masks   # merged and unmerged SAM-CLIPs against SamModel and CLIPVisionModel
    python benchmarks/inference.py encoder --device cuda --dtype bfloat16 --batch_sizes 1 8 32 --compile

The variants run in turns in one process, so that other load on the machine affects all of them, and ratios are taken
between consecutive runs. Rates use the operations of SAM's encoder, counted by torch (972 GFLOP per image at 1024 px),
for every variant. The rate of a matrix product is measured between the runs.

On a CPU, the memory of each variant is that of its first run in a new process, in which freed memory goes back to the
system at once. In a process that has run before, memory that it keeps would hide a part of the peak.

The masks of random weights are no segments. In the composition by segments, the mask decoder runs for every point, and
a box of a grid of 4 x 4 then replaces its masks, so that the naming of 16 segments that cover the image is included.
"""

import argparse
import gc
import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel, SamConfig, SamModel

from samclip_hf import SamClipConfig, SamClipForImageSegmentation, SamClipModel
from samclip_hf.evaluation.cost import CPU_ATTENTION_FLOPS, peak_memory, reset_peak_memory
from samclip_hf.vision_encoder_samclip import SamClipVisionLayer, _join_windows, _split_into_windows

NUM_CLASSES = 20
BOXES_PER_SIDE = 4  # of the boxes that replace the masks of random weights
SAM_ROW = "SamModel, one point"
CLIP_SIZES = (224, 336, 448)  # px, inputs of CLIP's vision tower in the unmerged models


# Freed blocks of this many bytes and more go back to the system, so that the resident memory is the memory in use.
RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def compare(functions: dict[str, Callable], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every run, without the first."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            gc.collect()
            start = time.perf_counter()
            result = function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat > 0:  # the first one is warm-up and compilation
                seconds[name].append(time.perf_counter() - start)
            del result
    return seconds


def measure_memory(create: Callable[..., dict[str, Callable]], name: str, *arguments) -> float:
    """Peak memory of a run of one of the functions that `create(*arguments)` returns, above the memory before it, in
    GB. On a CPU, in a new process."""
    device = torch.device(arguments[0].device)
    if device.type == "cuda":
        return run_once(create, name, *arguments)
    with mock.patch.dict(os.environ, RETURN_FREED_MEMORY), multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(run_once, (create, name, *arguments))


def run_once(create: Callable[..., dict[str, Callable]], name: str, *arguments) -> float:
    """See [`measure_memory`]."""
    torch.manual_seed(0)
    torch.set_num_threads(arguments[0].threads)
    device = torch.device(arguments[0].device)
    with torch.no_grad():
        function = create(*arguments)[name]
        gc.collect()
        before = reset_peak_memory(device)
        function()
    return (peak_memory(device) - before) / 1e9


def matrix_product(device: torch.device, dtype: torch.dtype) -> tuple[Callable, float]:
    """Ten matrix products of the size of the encoder's MLP, and their number of operations."""
    rows, inner, columns = (4096, 768, 3072) if device.type == "cpu" else (8192, 8192, 8192)
    a = torch.randn(rows, inner, device=device, dtype=dtype)
    b = torch.randn(inner, columns, device=device, dtype=dtype)
    return lambda: [a @ b for _ in range(10)], 10 * 2.0 * rows * inner * columns


def sam_operations(config: SamConfig, size: int) -> float:
    """Number of operations of SAM's encoder for one image."""
    with torch.device("meta"):
        sam = SamModel(config)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            sam.vision_encoder(torch.empty(1, 3, size, size))
    return counter.get_total_flops()


def project_padding_too(layer: SamClipVisionLayer, hidden_states: torch.Tensor, groups=None) -> torch.Tensor:
    """`SamClipVisionLayer.forward` with SAM's order: padding and windows first, then the projections."""
    attention, window_size = layer.attn, layer.attn.window_size
    attended = layer.layer_norm1(hidden_states)
    if window_size > 0:
        padding = attended.new_zeros(1, 1, 1, attended.shape[-1])
        attended, num_windows = _split_into_windows(attended, window_size, padding)
    attended = attention.proj(attention._attend_on_grid(attention.qkv(attended))[0])
    if window_size > 0:
        height, width = hidden_states.shape[1:3]
        attended = _join_windows(attended, num_windows)[:, :height, :width]
    hidden_states = hidden_states + attended
    return hidden_states + layer.mlp(layer.layer_norm2(hidden_states))


def create_encoders(arguments, config: SamConfig) -> dict[str, Callable]:
    """The image encoders. They take `pixel_values`."""
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    sam = SamModel(config).to(device, dtype).eval().vision_encoder
    samclip = SamClipModel(samclip_config(config)).to(device, dtype).eval()
    samclip.vision_encoder.load_state_dict(sam.state_dict())

    def in_dot_product(pixel_values):
        with mock.patch("torch.compiler.is_compiling", return_value=True):
            return samclip.vision_encoder(pixel_values)

    def with_padding(pixel_values):
        with mock.patch.object(SamClipVisionLayer, "forward", project_padding_too):
            return samclip.vision_encoder(pixel_values)

    def flex(pixel_values):
        samclip.set_attn_implementation({"vision_config": "flex_attention"})
        try:
            return samclip.vision_encoder(pixel_values)
        finally:
            samclip.set_attn_implementation({"vision_config": "sdpa"})

    encoders: dict[str, Callable] = {"SamModel": sam, "SAM-CLIP": samclip.vision_encoder}
    if arguments.compile:
        encoders["SamModel, compiled"] = torch.compile(sam)
        encoders["SAM-CLIP, compiled"] = torch.compile(samclip.vision_encoder)
    if device.type == "cuda":
        encoders["SAM-CLIP, flex_attention"] = flex
    else:  # the effect of each optimization
        encoders["SAM-CLIP, bias in the dot product"] = in_dot_product
        encoders["SAM-CLIP, padding projected too"] = with_padding
    return encoders


def create_encoder_runs(arguments, config: SamConfig, batch_size: int) -> dict[str, Callable]:
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    size = config.vision_config.image_size
    pixel_values = torch.randn(batch_size, 3, size, size, device=device, dtype=dtype)
    return {name: partial(run, pixel_values) for name, run in create_encoders(arguments, config).items()}


def encoder(arguments, config: SamConfig, clip_config: CLIPVisionConfig) -> None:
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    size = config.vision_config.image_size
    operations = sam_operations(config, size)
    product, product_operations = matrix_product(device, dtype)
    for batch_size in arguments.batch_sizes:
        functions = create_encoder_runs(arguments, config, batch_size)
        memory = {name: measure_memory(create_encoder_runs, name, arguments, config, batch_size) for name in functions}
        seconds = compare(functions | {"matrix product": product}, arguments.repeats, device)
        rates = [product_operations / s for s in seconds.pop("matrix product")]
        print(
            f"\n{batch_size} x {size} px; matrix product {statistics.median(rates) / 1e12:.2f} TFLOP/s\n\n"
            "| image encoder | s | images/s | of the matrix product's rate | peak memory above the weights, GB | "
            "speed against SamModel (lowest - highest) |\n|---|---|---|---|---|---|"
        )
        for name, own in seconds.items():
            median = statistics.median(own)
            fraction = statistics.median(batch_size * operations / s / r for s, r in zip(own, rates, strict=True))
            print(
                f"| {name} | {median:.3f} | {batch_size / median:.2f} | {fraction:.2f} | {memory[name]:.2f} | "
                f"{ratios(seconds['SamModel'], own)} |"
            )


def replace_masks_by_boxes(model: SamClipForImageSegmentation) -> None:
    """Replaces the masks of points by the boxes of a grid, in turn, after they are computed. The masks of other
    prompts remain."""
    predict_masks, numbers = model.predict_masks, itertools.count()

    def predict(image_embeddings, input_points=None, input_masks=None, **kwargs):
        masks, scores = predict_masks(image_embeddings, input_points, input_masks=input_masks, **kwargs)
        if input_masks is not None:
            return masks, scores
        rows, columns = (torch.arange(side) * BOXES_PER_SIDE // side for side in masks.shape[-2:])
        cells = rows[:, None] * BOXES_PER_SIDE + columns
        boxes = [cells == next(numbers) % BOXES_PER_SIDE**2 for _ in range(masks.shape[1])]
        boxes = torch.where(torch.stack(boxes), 10.0, -10.0).to(masks)
        return boxes[None, :, None].expand_as(masks), torch.ones_like(scores)

    model.predict_masks = predict  # type: ignore[method-assign]


def create_segmenter(config: SamClipConfig, pixel_values: torch.Tensor) -> SamClipForImageSegmentation:
    """A segmenter whose masks are boxes. The embeddings of its classes are those of patches of the image, so that
    every class is found."""
    model = (
        SamClipForImageSegmentation(config).to(pixel_values.device, pixel_values.dtype).eval().requires_grad_(False)
    )
    model.class_embeds = torch.ones(NUM_CLASSES, config.clip_head_config.projection_dim).to(pixel_values)
    patches = model(pixel_values, both_heads=False).dense_embeds.flatten(2)[0].T
    model.class_embeds = patches[:: len(patches) // NUM_CLASSES][:NUM_CLASSES].contiguous()
    replace_masks_by_boxes(model)
    return model


def create_text_to_masks(arguments, config: SamConfig, clip_config: CLIPVisionConfig) -> dict[str, Callable]:
    """Functions that compute masks or embeddings of one image. Those that segment by text return the outputs."""
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    size = config.vision_config.image_size
    pixel_values = torch.randn(1, 3, size, size, device=device, dtype=dtype)
    point = torch.full((1, 1, 1, 2), size / 2, device=device)
    sam = SamModel(config).to(device, dtype).eval().requires_grad_(False)
    clip = CLIPVisionModel(clip_config).to(device, dtype).eval().requires_grad_(False)
    clip_pixels = torch.randn(1, 3, clip_config.image_size, clip_config.image_size, device=device, dtype=dtype)
    vocabulary = {
        "vocabulary_label_ids": list(range(NUM_CLASSES)),
        "id2label": {label_id: str(label_id) for label_id in range(NUM_CLASSES)},
        "logit_scale_init_value": 4.6,
    }
    merged = create_segmenter(samclip_config(config, **vocabulary), pixel_values)

    def compose(model: SamClipForImageSegmentation, composition: str = "segments"):
        model.config.composition = composition
        return model(pixel_values)

    functions: dict[str, Callable] = {
        SAM_ROW: partial(sam, pixel_values, input_points=point),
        f"CLIPVisionModel, {clip_config.image_size} px": partial(clip, clip_pixels),
        f"CLIPVisionModel, {size} px": partial(clip, pixel_values, interpolate_pos_encoding=True),
        "SAM-CLIP, composition by segments": partial(compose, merged),
        "SAM-CLIP, composition by classes": partial(compose, merged, "classes"),
        "SAM-CLIP, CLIP head alone": partial(merged, pixel_values, both_heads=False),
    }
    # The smallest size is the tower's own; multiples of the patch size.
    for clip_size in (clip_config.image_size * clip_size // CLIP_SIZES[0] for clip_size in CLIP_SIZES):
        unmerged_config = samclip_config(
            config,
            **vocabulary,
            clip_vision_config=clip_config.to_dict(),
            clip_image_size=clip_size,
            clip_pixel_scale=[1.0] * 3,
            clip_pixel_shift=[0.0] * 3,
            composition_points=32,  # as from_teachers sets it
        )
        functions[f"unmerged, CLIP at {clip_size} px"] = partial(
            compose, create_segmenter(unmerged_config, pixel_values)
        )
    return functions


def text_to_masks(arguments, config: SamConfig, clip_config: CLIPVisionConfig) -> None:
    device, size = torch.device(arguments.device), config.vision_config.image_size
    functions = create_text_to_masks(arguments, config, clip_config)
    macs, titles = {}, {}
    for name, function in functions.items():
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION_FLOPS) as counter:
            scores = getattr(function(), "segment_scores", None)
        macs[name] = counter.get_total_flops() / 2e9
        titles[name] = name if scores is None else f"{name}, {int((scores > 0).sum())} segments"
    memory = {name: measure_memory(create_text_to_masks, name, arguments, config, clip_config) for name in functions}
    seconds = compare(functions, arguments.repeats, device)
    one_point, clip_alone = seconds[SAM_ROW], seconds[f"CLIPVisionModel, {size} px"]
    both = [sam + clip for sam, clip in zip(one_point, clip_alone, strict=True)]
    print(
        f"\n1 x {size} px, {NUM_CLASSES} classes\n\n| text to masks | GMAC | s | peak memory above the weights, GB | "
        "time against SamModel with one point (lowest - highest) | against SamModel and CLIPVisionModel, both at "
        f"{size} px (lowest - highest) |\n|---|---|---|---|---|---|"
    )
    for name, own in seconds.items():
        print(
            f"| {titles[name]} | {macs[name]:.0f} | {statistics.median(own):.3f} | {memory[name]:.2f} | "
            f"{ratios(own, one_point)} | {ratios(own, both)} |"
        )


def ratios(numerators: list[float], denominators: list[float]) -> str:
    own = sorted(n / d for n, d in zip(numerators, denominators, strict=True))
    return f"{statistics.median(own):.2f} ({own[0]:.2f} - {own[-1]:.2f})"


def samclip_config(config: SamConfig, **kwargs) -> SamClipConfig:
    parts = ("vision_config", "prompt_encoder_config", "mask_decoder_config")
    return SamClipConfig(**{part: getattr(config, part).to_dict() for part in parts}, has_text_tower=False, **kwargs)


def main(argv: list[str] | None = None, config: SamConfig | None = None, clip_config=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["encoder", "text_to_masks"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1], help="batch sizes of the image encoder")
    parser.add_argument("--compile", action="store_true", help="also run compiled encoders")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args(argv)
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.exit(2, "torch finds no GPU.\n")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    machine = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else f"{arguments.threads} threads"
    print(
        f"{machine}, {arguments.dtype}, {arguments.repeats} runs, medians; torch {torch.__version__}, transformers "
        f"{transformers.__version__}"
    )
    if config is None:
        config = SamConfig(vision_config={"initializer_range": 0.02})  # its default is 1e-10
    if clip_config is None:  # ViT-B/16
        clip_config = CLIPVisionConfig(patch_size=16)
    with torch.no_grad():
        {"encoder": encoder, "text_to_masks": text_to_masks}[arguments.what](arguments, config, clip_config)


if __name__ == "__main__":
    main()
