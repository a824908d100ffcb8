"""Exported ONNX files equal PyTorch at any size, and segment images by text without PyTorch."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoTokenizer, SamModel

from samclip_cli.export import run as export_command
from samclip_hf import (
    SamClipConfig,
    SamClipForImageSegmentation,
    SamClipImageProcessor,
    SamClipImageProcessorPil,
    SamClipModel,
    SamClipProcessor,
    SamClipVisionModel,
    miniature,
)
from samclip_hf.export import PART_NAMES, Part, create_parts, export, writer
from samclip_hf.export.modules import SegmentEncoder, SiglipTextEncoder
from samclip_hf.miniature.scenes import CLASS_NAMES, render

from ..conftest import assert_same, random_images, randomize, tiny_clip, tiny_sam
from ..scripts import load_script
from ..test_siglip import siglip_folder, student  # noqa: F401  # fixtures

ROOT = Path(__file__).parents[2]
LABELS, BACKGROUND = list(CLASS_NAMES[:12]), ["an empty scene"]
TEMPLATES = ["a {}", "a {} on a plain background"]

SEGMENT_WITHOUT_TORCH = f"""
import sys
for name in ("torch", "transformers", "samclip_hf"):
    sys.modules[name] = None  # importing it raises ImportError
import numpy as np
from PIL import Image
sys.path.insert(0, sys.argv[1])
from onnx_segmentation import OnnxSamClip

onnx_folder, image_folder, output = sys.argv[2:5]
model = OnnxSamClip(onnx_folder)
saved = model.load_vocabulary()
new = model.embed_vocabulary({LABELS!r}, {BACKGROUND!r}, {TEMPLATES!r})
results = {{"embeds": new.embeds}}
for number in range(3):
    image = Image.open(f"{{image_folder}}/{{number}}.png")
    for name, vocabulary in (("saved", saved), ("new", new)):
        labels = np.zeros((image.height, image.width), dtype=int)
        for segment in model.segment(image, vocabulary):
            labels[segment.mask] = vocabulary.names.index(segment.label)
        results[f"{{name}} {{number}}"] = labels
np.savez(output, **results)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """The shipped miniature with fewer layers, for speed: one windowed and one global in the image encoder, one in the
    CLIP head."""
    full = SamClipForImageSegmentation.from_pretrained(miniature.checkpoint())
    config = full.config.to_dict()
    config["vision_config"] |= {"num_hidden_layers": 2, "global_attn_indexes": [1]}
    config["clip_head_config"]["num_hidden_layers"] = 1
    model = SamClipForImageSegmentation(SamClipConfig.from_dict(config))
    weights = full.state_dict()
    for name in list(weights):
        for number in (2, 3):
            if name.startswith(f"vision_encoder.layers.{number}."):
                weights[name.replace(f"layers.{number}", f"layers.{number - 2}")] = weights[name]
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    SamClipProcessor.from_pretrained(miniature.checkpoint()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "onnx"
    export_command(["--model", str(checkpoint), "--output_dir", str(folder)])
    return folder


@pytest.fixture(scope="module")
def model(checkpoint) -> SamClipForImageSegmentation:
    return SamClipForImageSegmentation.from_pretrained(checkpoint).eval()


@pytest.fixture(scope="module")
def parts(model, checkpoint) -> dict[str, Part]:
    return create_parts(model, SamClipProcessor.from_pretrained(checkpoint))


@pytest.fixture(scope="module", params=["pytorch", pytest.param("onnx", marks=pytest.mark.slow)])
def run(request, parts):
    """A function that runs a part with tensors and returns tensors by name."""
    if request.param == "onnx":
        folder = request.getfixturevalue("exported")
        sessions = {name: onnxruntime.InferenceSession(folder / f"{name}.onnx") for name in PART_NAMES}

    def call(name, **inputs):
        if request.param == "onnx":
            arrays = {key: value.numpy() for key, value in inputs.items()}
            outputs = [torch.from_numpy(output) for output in sessions[name].run(None, arrays)]
        else:
            with torch.no_grad():
                outputs = parts[name].module(**inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return dict(zip(parts[name].outputs, outputs, strict=True))

    return call


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number, size in enumerate([(128, 128), (301, 200), (90, 160)]):  # no padding, below, on the right
        Image.fromarray(render(0, 8 + number).image).resize(size).save(folder / f"{number}.png")
    return folder


class TestParts:
    @pytest.mark.slow
    def test_dynamic_axes_have_names(self, exported):
        def shapes(values):
            return {value.name: value.shape for value in values}

        image, masks, text = (
            onnxruntime.InferenceSession(exported / f"{name}.onnx")
            for name in ("image_encoder", "mask_decoder", "text_encoder")
        )
        assert shapes(image.get_inputs()) == {
            "pixel_values": ["images", 3, "8*rows", "8*columns"],
            "reshaped_input_sizes": ["images", 2],
        }
        assert shapes(image.get_outputs())["dense_embeds"] == ["images", 64, "rows", "columns"]
        assert shapes(masks.get_outputs())["pred_masks"] == ["images", "prompts", 4, "4*rows", "4*columns"]
        assert shapes(text.get_inputs())["input_ids"] == ["texts", "tokens"]

    @pytest.mark.parametrize("size", [(1, 128, 128), (3, 16, 40), (2, 72, 56), (1, 200, 328)])
    def test_images_of_any_size(self, run, model, size):
        pixel_values = random_images(*size)
        sizes = torch.tensor([[size[1] - 9, size[2]]] * size[0])
        actual = run("image_encoder", pixel_values=pixel_values, reshaped_input_sizes=sizes)
        with torch.no_grad():
            expected = SamClipModel.forward(model, pixel_values, reshaped_input_sizes=sizes)
        for name in ("image_embeddings", "image_embeds", "dense_embeds"):
            assert_same(actual[name], expected[name])

    def test_padding_changes_the_image_embedding(self, run):
        pixel_values = random_images(1, 64, 64)
        with_content, with_padding = (
            run("image_encoder", pixel_values=pixel_values, reshaped_input_sizes=torch.tensor([[64, width]]))
            for width in (64, 24)
        )
        assert not torch.allclose(with_content["image_embeds"], with_padding["image_embeds"], atol=1e-3)

    @pytest.mark.parametrize("texts", [["a"], [*CLASS_NAMES[:5], "a green meshed shape on a grey scene"]])
    def test_any_number_of_texts(self, run, model, checkpoint, texts):
        inputs = AutoTokenizer.from_pretrained(checkpoint)(texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            expected = F.normalize(model.get_text_features(**inputs).pooler_output, dim=-1)
        assert_same(run("text_encoder", **inputs)["text_embeds"], expected)

    @pytest.mark.parametrize("prompts, points, grid", [(1, 1, (16, 16)), (5, 3, (3, 11))])
    def test_points_and_boxes(self, run, model, prompts, points, grid):
        generator = torch.Generator().manual_seed(0)
        embeddings = torch.randn(2, 64, *grid, generator=generator)
        input_points = torch.rand(2, prompts, points, 2, generator=generator) * 24
        labels = torch.randint(0, 2, (2, prompts, points), generator=generator)
        boxes = torch.rand(2, prompts, 4, generator=generator) * 24
        padded = F.pad(input_points, (0, 0, 0, 1)), F.pad(labels, (0, 1), value=-1)
        corners = boxes.unflatten(-1, (2, 2))
        corner_labels = torch.tensor([2, 3]).expand(2, prompts, 2)
        both = torch.cat([input_points, corners], dim=2), torch.cat([labels, corner_labels], dim=2)
        for (points_and_corners, point_labels), prompt in {
            padded: {"input_points": input_points, "input_labels": labels},
            (corners, corner_labels): {"input_boxes": boxes},
            both: {"input_points": input_points, "input_labels": labels, "input_boxes": boxes},
        }.items():
            actual = run(
                "mask_decoder", image_embeddings=embeddings, input_points=points_and_corners, input_labels=point_labels
            )
            with torch.no_grad():
                one, three = (model.predict_masks(embeddings, **prompt, multimask_output=m) for m in (False, True))
            assert_same(actual["pred_masks"], torch.cat([one[0], three[0]], dim=2))
            assert_same(actual["iou_scores"], torch.cat([one[1], three[1]], dim=2))

    @pytest.mark.slow
    def test_mask_decoder_runs_once_for_all_four_masks(self, exported):
        import onnx

        graph = onnx.load(exported / "mask_decoder.onnx").graph
        assert sum(node.op_type == "ConvTranspose" for node in graph.node) == 2

    @pytest.mark.parametrize("pooling", ["max", "mean"])
    @pytest.mark.parametrize("global_layers", [[2], [0]])
    def test_segment_embeddings_equal_those_of_the_clip_head(self, pooling, global_layers):
        """With and without windows in the CLIP head."""
        torch.manual_seed(0)
        model = SamClipModel.from_teachers(
            tiny_sam(global_attn_indexes=global_layers), tiny_clip(), {"pooling": pooling}
        ).eval()
        segments = torch.rand(1, 3, 7, 5) > 0.5
        tokens = torch.randn(1, 7, 5, 32)
        with torch.no_grad():
            expected = F.normalize(model.clip_head.pool_segments(tokens, segments)[0], dim=-1)
            actual = torch.cat(
                [SegmentEncoder(model)(tokens, *segment.nonzero().unbind(1)) for segment in segments[0]]
            )
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)

    def test_siglip_texts_may_be_shorter_than_the_maximum(self, student, siglip_folder):  # noqa: F811
        inputs = AutoTokenizer.from_pretrained(siglip_folder)(["a red shape", "a"], padding=True, return_tensors="pt")
        with torch.no_grad():
            expected = F.normalize(student.get_text_features(**inputs).pooler_output, dim=-1)
            actual = SiglipTextEncoder(student)(inputs["input_ids"])
        torch.testing.assert_close(actual, expected)
        processor = SamClipProcessor(SamClipImageProcessor(), AutoTokenizer.from_pretrained(siglip_folder))
        part = create_parts(student, processor)["text_encoder"]
        traced = torch.export.export(
            part.module, part.make_inputs(2, 5, 7, 3), dynamic_shapes=tuple(part.inputs.values()), strict=False
        )
        with torch.no_grad():
            torch.testing.assert_close(traced.module()(inputs["input_ids"]), expected)


@pytest.fixture(scope="module")
def unmerged(tmp_path_factory) -> Path:
    """The miniature's teachers as an unmerged model."""
    folder = tmp_path_factory.mktemp("unmerged")
    clip = miniature.clip_teacher()
    SamClipForImageSegmentation.from_teachers(small_sam(), clip, merged=False).save_pretrained(folder)
    SamClipProcessor.from_teachers(miniature.sam_teacher(), clip).save_pretrained(folder)
    return folder


def small_sam() -> SamModel:
    """The miniature's SAM with one windowed and one global layer, for speed."""
    sam = SamModel.from_pretrained(miniature.sam_teacher())
    sam.vision_encoder.layers = sam.vision_encoder.layers[2:4]
    sam.config.vision_config.num_hidden_layers, sam.config.vision_config.global_attn_indexes = 2, [1]
    return sam


@torch.no_grad()
@pytest.mark.parametrize("siglip_folder", ["SigLIP"], indirect=True)
@pytest.mark.parametrize("has_siglip", [False, True])
def test_parts_of_an_unmerged_model_equal_the_model(has_siglip, unmerged, siglip_folder):  # noqa: F811
    """Images of different sizes in a batch, and segments one by one."""
    clip = siglip_folder if has_siglip else miniature.clip_teacher()
    model = SamClipForImageSegmentation.from_teachers(miniature.sam_teacher(), clip, merged=False).eval()
    parts = create_parts(model, SamClipProcessor.from_pretrained(unmerged))
    pixel_values, sizes = random_images(2, 64, 128), torch.tensor([[55, 128], [64, 70]])
    embeddings, *embeds, patch_tokens = parts["image_encoder"].module(pixel_values, sizes)
    expected = SamClipModel.forward(model, pixel_values, reshaped_input_sizes=sizes)
    for actual, name in zip((embeddings, *embeds), ("image_embeddings", "image_embeds", "dense_embeds"), strict=True):
        assert_same(actual, expected[name])
    segments = torch.rand(1, 3, *patch_tokens.shape[1:3]) > 0.5
    pooled = F.normalize(model.clip_head.pool_segments(patch_tokens[:1], segments)[0], dim=-1)
    encode = parts["segment_encoder"].module
    actual = torch.cat([encode(patch_tokens[:1], *segment.nonzero().unbind(1)) for segment in segments[0]])
    assert_same(actual, pooled)


def assert_segments_equal_those_of_pytorch(
    example, folder: Path, image_folder: Path, labels_of_classes: list[str] = LABELS, num_labels: int = 4
) -> None:
    """Compares label maps and scores of `OnnxSamClip` with PyTorch's, for three aspect ratios, with and without
    background. At least `num_labels` labels must occur."""
    model = SamClipForImageSegmentation.from_pretrained(folder).eval()
    image_processor, seen, covered = SamClipImageProcessorPil.from_pretrained(folder), set(), []
    for background in (BACKGROUND, []):
        onnx_vocabulary = example.embed_vocabulary(labels_of_classes, background, TEMPLATES)
        vocabulary = model.embed_vocabulary(labels_of_classes, background, TEMPLATES)
        np.testing.assert_allclose(onnx_vocabulary.embeds, vocabulary.class_embeds, atol=1e-5)
        for number in range(3):
            image = Image.open(image_folder / f"{number}.png")
            size = (image.height, image.width)
            with torch.no_grad():
                outputs = model(**image_processor(image, return_tensors="pt"), vocabulary=vocabulary)
            expected = image_processor.post_process_semantic_segmentation(outputs, [size])[0].numpy()
            labels = np.full(size, -1)
            segments = example.segment(image, onnx_vocabulary)
            for segment in segments:
                labels[segment.mask] = onnx_vocabulary.names.index(segment.label)
            probabilities = outputs.segment_logits[outputs.segment_scores > 0].softmax(dim=-1)
            if background:
                probabilities = probabilities[probabilities.argmax(dim=-1) > 0]
            scores = sorted(segment.score for segment in segments)
            np.testing.assert_allclose(scores, probabilities.amax(dim=-1).sort().values, atol=1e-4)
            inside = labels >= 0  # without background, PyTorch labels all pixels
            covered.append(inside.mean())
            assert not inside.any() or (labels[inside] == expected[inside]).mean() > 0.999
            if background:
                assert (expected[~inside] == 0).mean() > 0.999
            seen |= set(np.unique(expected))
    assert len(seen) >= num_labels and np.mean(covered) > 0.05


@pytest.mark.parametrize("merged", [True, False])
def test_the_example_segments_as_pytorch_does(merged, checkpoint, unmerged, image_folder, tmp_path):
    """With PyTorch's parts in the place of the ONNX files."""
    folder = checkpoint if merged else unmerged
    model = SamClipForImageSegmentation.from_pretrained(folder).eval()
    processor = SamClipProcessor.from_pretrained(folder)
    parts = create_parts(model, processor)
    writer._describe(model, processor, tmp_path, folder, ["text_encoder"], 18)
    description = json.loads((tmp_path / "samclip.json").read_text())
    (tmp_path / "samclip.json").write_text(json.dumps(description | {"parts": []}))
    example = load_script(ROOT / "examples" / "onnx_segmentation.py").OnnxSamClip(tmp_path)

    def run(name, **inputs):
        with torch.no_grad():
            outputs = parts[name].module(**{key: torch.from_numpy(value) for key, value in inputs.items()})
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return {key: output.numpy() for key, output in zip(parts[name].outputs, outputs, strict=True)}

    example.run = run
    assert_segments_equal_those_of_pytorch(example, folder, image_folder)


@pytest.mark.slow
def test_an_exported_unmerged_model_segments_as_pytorch_does(unmerged, image_folder, tmp_path):
    export(unmerged, tmp_path / "onnx")
    example = load_script(ROOT / "examples" / "onnx_segmentation.py").OnnxSamClip(tmp_path / "onnx")
    assert_segments_equal_those_of_pytorch(example, unmerged, image_folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("siglip_folder", "merged"), [("SigLIP", False), ("SigLIP 2", True)], indirect=["siglip_folder"]
)
def test_an_exported_model_with_siglip_segments_as_pytorch_does(siglip_folder, merged, image_folder, tmp_path):  # noqa: F811
    model = SamClipForImageSegmentation.from_teachers(
        small_sam(), siglip_folder, {"num_hidden_layers": 1} if merged else None, merged=merged
    )
    processor = SamClipProcessor.from_teachers(miniature.sam_teacher(), siglip_folder)
    # The SigLIP is random and knows the letters of a few words only. Without centering, embeddings are almost equal.
    labels = ["red", "Solid Red_shape!", "a green hat.", "stripes", "DOTTED background"]
    randomize(model.clip_head)
    features = []
    with torch.no_grad():
        model.logit_scale.fill_(3.0)
        texts = processor(text=labels)
        model.text_model.head.bias -= model.get_text_features(**texts).pooler_output.mean(dim=0)
        if merged:
            hook = model.clip_head.mlp.register_forward_hook(lambda *call: features.append(call[-1].flatten(0, -2)))
            SamClipModel.forward(model, processor(Image.fromarray(render(0, 8).image))["pixel_values"])
            hook.remove()
            model.clip_head.mlp.fc3.bias -= torch.cat(features).mean(dim=0)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    assert max(export(tmp_path / "model", tmp_path / "onnx").values()) < writer.TOLERANCE
    example = load_script(ROOT / "examples" / "onnx_segmentation.py").OnnxSamClip(tmp_path / "onnx")
    assert_segments_equal_those_of_pytorch(example, tmp_path / "model", image_folder, labels, num_labels=2)


def test_example_inputs_contain_the_given_images(model, checkpoint):
    processor = SamClipProcessor.from_pretrained(checkpoint)
    image = Image.fromarray(render(0, 8).image)
    parts = create_parts(model, processor, images=[image])
    pixel_values, sizes = parts["image_encoder"].make_inputs(2, 16, 16, 0)
    expected = processor(image)["pixel_values"][0]
    assert sizes.tolist() == [[119, 128], [128, 128]]
    torch.testing.assert_close(pixel_values[1], expected)
    torch.testing.assert_close(pixel_values[0, :, :119], expected[:, :119])
    assert not pixel_values[0, :, 119:].any()


@pytest.mark.slow
class TestTextToMasks:
    def test_segments_equal_those_of_pytorch(self, exported, checkpoint, model, image_folder, tmp_path):
        output = tmp_path / "results.npz"
        arguments = [ROOT / "examples", exported, image_folder, output]
        subprocess.run([sys.executable, "-c", SEGMENT_WITHOUT_TORCH, *map(str, arguments)], check=True, timeout=300)
        results = np.load(output)

        new = model.embed_vocabulary(LABELS, BACKGROUND, TEMPLATES)
        np.testing.assert_allclose(results["embeds"], new.class_embeds, atol=1e-5)
        image_processor = SamClipImageProcessorPil.from_pretrained(checkpoint)
        seen = set()
        for number in range(3):
            image = Image.open(image_folder / f"{number}.png")
            inputs = image_processor(image, return_tensors="pt")
            for name, vocabulary in (("saved", None), ("new", new)):
                with torch.no_grad():
                    outputs = model(**inputs, vocabulary=vocabulary)
                size = [(image.height, image.width)]
                expected = image_processor.post_process_semantic_segmentation(outputs, size)[0].numpy()
                assert results[f"{name} {number}"].shape == expected.shape
                assert (results[f"{name} {number}"] == expected).mean() > 0.999
                seen |= set(np.unique(expected))
        assert len(seen) > 3  # background and several labels

    def test_example_script_draws_masks(self, exported, image_folder, tmp_path):
        command = [sys.executable, str(ROOT / "examples" / "onnx_segmentation.py"), "--onnx", str(exported)]
        command += ["--image", str(image_folder / "1.png"), "--output", str(tmp_path / "masks.png")]
        result = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        assert "probability" in result.stdout
        with Image.open(tmp_path / "masks.png") as result_image, Image.open(image_folder / "1.png") as image:
            assert result_image.size == image.size
            assert (np.asarray(result_image) != np.asarray(image)).any()

    def test_example_script_reports_invalid_files(self, exported, tmp_path):
        (tmp_path / "text.png").write_text("not an image")
        script = str(ROOT / "examples" / "onnx_segmentation.py")
        for folder, image, message in (
            (tmp_path / "nowhere", "text.png", "No such file or directory"),
            (exported, "text.png", "cannot identify image file"),
        ):
            command = [sys.executable, script, "--onnx", str(folder), "--image", str(tmp_path / image)]
            run = subprocess.run(command, capture_output=True, text=True, timeout=300)
            assert run.returncode == 2 and message in run.stderr and "Traceback" not in run.stderr

    def test_benchmark_of_precision_runs_the_exported_parts(self, exported, checkpoint, model):
        """The ONNX model of `benchmarks/precision.py` gives PyTorch's segments."""
        onnx_model = load_script(ROOT / "benchmarks" / "precision.py").OnnxModel.from_pretrained(checkpoint).eval()
        onnx_model.load_onnx(exported)
        pixel_values = SamClipProcessor.from_pretrained(checkpoint)(Image.fromarray(render(0, 8).image))[
            "pixel_values"
        ]
        with torch.no_grad():
            actual, expected = onnx_model(pixel_values), model(pixel_values)
        assert expected["segment_scores"].count_nonzero() > 1
        for name in ("logits", "segment_masks", "segment_logits", "segment_embeds", "segment_scores"):
            torch.testing.assert_close(actual[name], expected[name], rtol=1e-3, atol=1e-3)
        for prompts in (
            {"input_points": torch.tensor([[[[40.0, 30.0]]]]), "input_labels": torch.tensor([[[1]]])},
            {"input_boxes": torch.tensor([[[5.0, 0.0, 70.0, 60.0]]])},
        ):
            with torch.no_grad():
                actual, expected = onnx_model(pixel_values, **prompts), model(pixel_values, **prompts)
            for name in ("pred_masks", "iou_scores"):
                torch.testing.assert_close(actual[name], expected[name], rtol=1e-3, atol=1e-3)


class TestFolder:
    @pytest.mark.slow
    def test_replaces_all_files_of_an_earlier_export(self, checkpoint, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(writer, "EXTERNAL_DATA_BYTES", 0)
        folder = tmp_path / "new" / "onnx"
        differences = export(checkpoint, folder, ["text_encoder"], opset=20)
        assert 0 < differences["text_encoder"] < writer.TOLERANCE
        names = {"samclip.json", "text_encoder.onnx", "text_encoder.onnx.data", "tokenizer.json", "class_embeds.npy"}
        assert {path.name for path in folder.iterdir()} == names
        assert (folder / "text_encoder.onnx.data").stat().st_size > (folder / "text_encoder.onnx").stat().st_size

        monkeypatch.undo()
        export_command(["--model", str(checkpoint), "--output_dir", str(folder), "--parts", "text_encoder"])
        assert "text_encoder.onnx: 2.0 MB, largest difference from PyTorch" in capsys.readouterr().out
        assert {path.name for path in folder.iterdir()} == names - {"text_encoder.onnx.data"}
        assert json.loads((folder / "samclip.json").read_text())["opset"] == 18
        assert [path.name for path in folder.parent.iterdir()] == ["onnx"]

    def test_nothing_is_written_if_a_file_differs_from_pytorch(self, checkpoint, tmp_path, monkeypatch):
        monkeypatch.setattr(writer, "TOLERANCE", 0.0)
        with pytest.raises(RuntimeError, match=r"text_embeds of text_encoder.onnx differs from PyTorch"):
            export(checkpoint, tmp_path / "onnx", ["text_encoder"])
        assert not list(tmp_path.iterdir())

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
    @pytest.mark.parametrize("full_at", ["text_encoder.onnx", "tokenizer.json", "class_embeds.npy"])
    def test_a_full_disk_is_reported_with_the_folder(self, checkpoint, tmp_path, monkeypatch, full_at):
        def write(part, path, opset):
            if path.name == full_at:
                Path("/dev/full").write_bytes(b"graph")
            else:
                (path.parent / full_at).symlink_to("/dev/full")

        monkeypatch.setattr(writer, "_write", write)
        monkeypatch.setattr(writer, "_compare", lambda *arguments: 0.0)
        arguments = ["--model", str(checkpoint), "--output_dir", str(tmp_path / "onnx"), "--parts", "text_encoder"]
        with pytest.raises(SystemExit, match=r"samclip export: .*No space left on device: '.*/onnx'$"):
            export_command(arguments)
        assert not list(tmp_path.iterdir())

    def test_folders_with_other_files_are_not_replaced(self, checkpoint, tmp_path):
        (tmp_path / "thesis.tex").write_text("x")
        with pytest.raises(FileExistsError, match=r"not belong to an earlier export: thesis\.tex"):
            export(checkpoint, tmp_path)
        (tmp_path / "thesis.tex").rename(tmp_path / "tokenizer.json")
        with pytest.raises(FileExistsError, match=r"tokenizer\.json"):
            export(checkpoint, tmp_path)
        with pytest.raises(FileExistsError, match="is a file"):
            export(checkpoint, tmp_path / "tokenizer.json")

    def test_files_with_the_names_of_an_export_are_not_replaced(self, checkpoint, model, tmp_path):
        """samclip.json must describe an export, and this export must have written the other files."""
        (tmp_path / "tokenizer.json").write_text("{}")
        no_parts = json.dumps(dict.fromkeys(writer.DESCRIPTION_KEYS))
        for text in ('{"model": "mine", "parts": []}', '["model", "parts"]', "no JSON", no_parts):
            (tmp_path / "samclip.json").write_text(text)
            with pytest.raises(FileExistsError, match=r"earlier export: samclip\.json, tokenizer\.json\."):
                export(checkpoint, tmp_path)
            assert (tmp_path / "samclip.json").read_text() == text
        processor = SamClipProcessor.from_pretrained(checkpoint)
        writer._describe(model, processor, tmp_path, checkpoint, ["text_encoder"], 18)
        (tmp_path / "text_encoder.onnx").touch()
        writer._check_replaceable(tmp_path)
        (tmp_path / "mask_decoder.onnx").touch()
        with pytest.raises(FileExistsError, match=r"earlier export: mask_decoder\.onnx\."):
            export(checkpoint, tmp_path)
        (tmp_path / "mask_decoder.onnx").unlink()
        writer._describe(model, processor, tmp_path, checkpoint, ["mask_decoder"], 18)
        (tmp_path / "text_encoder.onnx").rename(tmp_path / "mask_decoder.onnx")
        with pytest.raises(FileExistsError, match=r"earlier export: tokenizer\.json\."):
            export(checkpoint, tmp_path)


class TestQuantization:
    @pytest.mark.slow
    def test_quantized_files_are_smaller_and_agree_with_those_in_float32(
        self, checkpoint, exported, tmp_path, capsys, monkeypatch
    ):
        folder = tmp_path / "onnx"
        # The parts are not traced again, for speed.
        monkeypatch.setattr(writer, "_write", lambda part, path, opset: shutil.copy(exported / path.name, path))
        export_command(["--model", str(checkpoint), "--output_dir", str(folder), "--quantize"])
        lines = capsys.readouterr().out.splitlines()
        assert {path.name for path in folder.iterdir()} == {path.name for path in exported.iterdir()}
        description = json.loads((folder / "samclip.json").read_text())
        quantization = description.pop("quantization")
        assert description.pop("tolerance") == writer.QUANTIZED_TOLERANCE == 0.1
        assert description == {
            name: value
            for name, value in json.loads((exported / "samclip.json").read_text()).items()
            if name != "tolerance"
        }
        differences = quantization.pop("differences")
        assert quantization == {"method": "onnxruntime dynamic", "weights": "int8", "activations": "uint8"}
        assert set(differences) == set(PART_NAMES) and len(lines) == len(PART_NAMES)
        images = [Image.fromarray(render(seed=0, index=index).image) for index in range(8, 12)]
        model, processor = writer._load(checkpoint)
        for name, part in create_parts(model, processor, images).items():
            files = [path / f"{name}.onnx" for path in (exported, folder)]
            graph = onnx.load(files[1]).graph
            int8 = sum(np.prod(own.dims) for own in graph.initializer if own.data_type == onnx.TensorProto.INT8)
            sizes = [path.stat().st_size for path in files]
            assert int8 > 0 and sizes[1] < 0.8 * sizes[0]
            assert sizes[0] - sizes[1] > 2.5 * int8  # four bytes of a weight become one
            inputs = dict(zip(part.inputs, (own.numpy() for own in part.make_inputs(2, 16, 16, 3)), strict=True))
            before, after = (onnxruntime.InferenceSession(path).run(None, inputs) for path in files)
            for own, reference in zip(after, before, strict=True):
                assert 0 < np.abs(own - reference).max() <= 0.1 * np.abs(reference).max()
                assert np.corrcoef(own.ravel(), reference.ravel())[0, 1] > 0.99

    def test_a_part_that_quantization_changes_too_much_is_refused(self, checkpoint, tmp_path, monkeypatch):
        monkeypatch.setattr(writer, "QUANTIZED_TOLERANCE", 1e-3)
        command = ["--model", str(checkpoint), "--output_dir", str(tmp_path / "onnx"), "--parts", "text_encoder"]
        with pytest.raises(
            SystemExit, match=r"int8 weights, text_embeds of .* 1e-03 is accepted. Export this part in"
        ):
            export_command([*command, "--quantize"])
        assert not list(tmp_path.iterdir())

    def test_a_part_without_weights_to_quantize_is_refused(self, checkpoint, tmp_path, monkeypatch):
        monkeypatch.setattr("onnxruntime.quantization.quantize_dynamic", lambda old, new, **_: shutil.copy(old, new))
        with pytest.raises(ValueError, match=r"text_encoder.onnx has no weights that can be quantized"):
            export(checkpoint, tmp_path / "onnx", ["text_encoder"], quantize=True)
        assert not list(tmp_path.iterdir())


class TestErrors:
    def test_other_models_raise_an_error(self, tmp_path):
        with pytest.raises(ValueError, match=r"not a SAM-CLIP checkpoint but a model of type 'clip'"):
            export(miniature.clip_teacher(), tmp_path / "onnx")
        with pytest.raises(ValueError, match=r"nowhere is not a SAM-CLIP checkpoint"):
            export(str(tmp_path / "nowhere"), tmp_path / "onnx")
        assert not list(tmp_path.iterdir())

    def test_checkpoint_without_processor_raises_an_error(self, checkpoint, tmp_path):
        for name in ("config.json", "model.safetensors"):
            shutil.copy(checkpoint / name, tmp_path)
        with pytest.raises(ValueError, match="contains no processor"):
            export(str(tmp_path), tmp_path / "onnx")

    def test_unknown_and_missing_parts_raise_an_error(self, checkpoint, model, tmp_path):
        with pytest.raises(ValueError, match=r"Unknown part 'vision': choose from image_encoder"):
            export(checkpoint, tmp_path / "onnx", ["vision"])
        shutil.copytree(checkpoint, tmp_path / "without_text")
        without_text = SamClipForImageSegmentation.from_pretrained(checkpoint).drop_text_tower()
        without_text.save_pretrained(tmp_path / "without_text")
        with pytest.raises(ValueError, match="has no text tower"):
            export(str(tmp_path / "without_text"), tmp_path / "onnx", ["text_encoder"])

    def test_unsupported_opset_raises_an_error(self, checkpoint, tmp_path):
        with pytest.raises(ValueError, match="opset 17: choose one of 18 to 23"):
            export(checkpoint, tmp_path / "onnx", opset=17)

    def test_missing_extra_raises_an_error(self, checkpoint, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "onnxscript", None)
        with pytest.raises(SystemExit, match=r"pip install 'samclip-hf\[export\]'"):
            export_command(["--model", str(checkpoint), "--output_dir", str(tmp_path / "onnx")])


@pytest.mark.slow
def test_plain_torch_onnx_export_of_the_vision_model_runs_at_another_size(tmp_path):
    sam = tiny_sam(num_hidden_layers=2, global_attn_indexes=[1])
    SamClipModel.from_teachers(sam, tiny_clip(), {"num_hidden_layers": 1}).save_pretrained(tmp_path)
    model = randomize(SamClipVisionModel.from_pretrained(tmp_path))
    rows, columns = (torch.export.Dim(name, min=2, max=64) for name in ("rows", "columns"))
    program = torch.onnx.export(
        model,
        kwargs={"pixel_values": random_images(2, 64, 88)},
        dynamo=True,
        input_names=["pixel_values"],
        dynamic_shapes={"pixel_values": {0: torch.export.Dim("images"), 2: 8 * rows, 3: 8 * columns}},
        verbose=False,
    )
    program.save(tmp_path / "vision_model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "vision_model.onnx")
    pixel_values = random_images(1, 40, 128)
    actual = session.run(None, {"pixel_values": pixel_values.numpy()})
    with torch.no_grad():
        expected = model(pixel_values).to_tuple()
    for onnx_output, output in zip(actual, expected, strict=True):
        assert_same(torch.from_numpy(onnx_output), output)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs g++, which is not installed")
def test_segment_encoder_compiles_with_aot_inductor(parts, tmp_path):
    part = parts["segment_encoder"]
    with torch.no_grad():
        traced = torch.export.export(
            part.module, part.make_inputs(1, 9, 15, 3), dynamic_shapes=tuple(part.inputs.values())
        )
        path = torch._inductor.aoti_compile_and_package(
            traced,
            package_path=str(tmp_path / "segment_encoder.pt2"),
        )
        inputs = part.make_inputs(1, 16, 11, 5)
        torch.testing.assert_close(torch._inductor.aoti_load_package(path)(*inputs), part.module(*inputs))
