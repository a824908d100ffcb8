"""`samclip segment`, `classify` and `masks` on the shipped miniature, compared with the pipelines and pycocotools."""

import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter
from pycocotools import mask as coco
from transformers import pipeline

from samclip_cli import main
from samclip_cli.formats import coco_annotation
from samclip_cli.models import LoadedModel, _has_miniature_encoder, mask_generation_options
from samclip_hf import SamClipForImageSegmentation, SamClipModel, image_processing_samclip, miniature
from samclip_hf.mask_generation_samclip import MASK_GENERATION_DEFAULTS
from samclip_hf.miniature.scenes import render
from samclip_hf.visualization import color_of, draw_segments

LABELS = ["red fuzzy shape", "green zigzag shape"]
LABEL_OPTIONS = ["--labels", ", ".join(LABELS), "--background", "an empty scene"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


def scene(index: int = 8) -> Image.Image:
    """An image of 150 pixels and an odd height."""
    return Image.fromarray(render(seed=0, index=index).image).resize((150, 99 + index), Image.Resampling.BILINEAR)


def save(*paths: str) -> None:
    for number, path in enumerate(paths):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        scene(8 + number).save(path)


def samclip(capsys, *arguments: str, status: int = 0) -> tuple[list[dict], list[str]]:
    """Records on standard output, and messages on standard error without the one about the default model."""
    assert main(arguments) == status
    out, err = capsys.readouterr()
    messages = [line for line in err.splitlines() if "using the shipped miniature" not in line]
    return [json.loads(line) for line in out.splitlines()], messages


def decode(segmentation: dict) -> np.ndarray:
    return coco.decode(coco.frPyObjects(segmentation, *segmentation["size"])).astype(bool)


def test_images_without_segments_are_reported(capsys):
    save("photo.png", "more.png")
    options = [*LABEL_OPTIONS, "--threshold", "1"]
    [record], messages = samclip(capsys, "segment", "photo.png", *options)
    assert record["segments"] == []
    assert messages == [
        "samclip: no segments found. A lower --threshold, other labels or another --background find more."
    ]
    _, messages = samclip(capsys, "segment", "photo.png", "more.png", *options)
    assert messages[0].startswith("samclip: no segments found in 2 of 2 images. A lower --threshold")
    _, messages = samclip(capsys, "masks", "photo.png", "--pred_iou_thresh", "1", "--points_per_crop", "2")
    assert messages == [
        "samclip: no masks found. Lower --pred_iou_thresh and --stability_score_thresh find more masks."
    ]


def test_segments_equal_those_of_the_pipeline(capsys):
    save("photo.png")
    [record], messages = samclip(capsys, "segment", "photo.png", *LABEL_OPTIONS, "--threshold", "0.3")
    segmenter = pipeline("zero-shot-image-segmentation", model=miniature.checkpoint())
    expected = segmenter(scene(), candidate_labels=LABELS, background=["an empty scene"], threshold=0.3)
    assert len(expected) >= 2 and messages == []
    assert (record["image"], record["height"], record["width"]) == ("photo.png", 107, 150)
    for segment, reference in zip(record["segments"], expected, strict=True):
        assert segment["label"] == reference["label"]
        assert segment["score"] == pytest.approx(reference["score"], abs=1e-5)
        assert np.array_equal(decode(segment["segmentation"]), np.asarray(reference["mask"]) > 0)


def test_labels_default_to_those_of_the_checkpoint(capsys):
    save("photo.png")
    [record], _ = samclip(capsys, "segment", "photo.png")
    expected = pipeline("image-segmentation", model=miniature.checkpoint())(
        scene(), threshold=0.5, overlap_mask_area_threshold=0.8
    )
    expected = [(segment["label"], pytest.approx(segment["score"], abs=1e-5)) for segment in expected]
    assert [(segment["label"], segment["score"]) for segment in record["segments"]] == expected
    assert "green zigzag shape" in dict(expected)


def test_the_template_changes_the_scores(capsys):
    save("photo.png")
    [one], _ = samclip(capsys, "segment", "photo.png", *LABEL_OPTIONS, "--threshold", "0")
    [other], _ = samclip(capsys, "segment", "photo.png", *LABEL_OPTIONS, "--threshold", "0", "--template", "a {}")
    segmenter = pipeline("zero-shot-image-segmentation", model=miniature.checkpoint())
    options = {"candidate_labels": LABELS, "background": ["an empty scene"], "threshold": 0}
    expected = segmenter(scene(), hypothesis_template="a {}", **options)
    scores = [segment["score"] for segment in other["segments"]]
    assert scores == pytest.approx([segment["score"] for segment in expected], abs=1e-5)
    assert scores != pytest.approx([segment["score"] for segment in one["segments"]], abs=1e-5)


@pytest.mark.parametrize("template", [None, "a drawing of a {}"])
def test_classes_equal_those_of_the_pipeline(capsys, template):
    save("photo.png")
    option = [] if template is None else ["--template", template]
    [record], messages = samclip(capsys, "classify", "photo.png", "--labels", " , ".join(LABELS), *option)
    classifier = pipeline("zero-shot-image-classification", model=miniature.checkpoint())
    options = {} if template is None else {"hypothesis_template": template}
    expected = classifier(scene(), candidate_labels=LABELS, **options)
    assert [label["label"] for label in record["labels"]] == [label["label"] for label in expected]
    scores = [label["score"] for label in expected]
    assert [label["score"] for label in record["labels"]] == pytest.approx(scores, abs=1e-5) and messages == []


def test_masks_equal_those_of_the_pipeline(capsys, folder, monkeypatch):
    save("photo.png")
    [record], _ = samclip(capsys, "masks", "photo.png", "--points_per_crop", "6", "--pred_iou_thresh", "0.5")
    generator = pipeline("mask-generation", model=miniature.checkpoint())
    options = miniature.MASK_GENERATION | {"points_per_crop": 6, "pred_iou_thresh": 0.5}
    expected = generator(scene(), **options)
    assert len(expected["masks"]) >= 3
    monkeypatch.chdir(Path(miniature.checkpoint()).parent)  # the miniature under another name is the miniature
    named, _ = samclip(
        capsys,
        "masks",
        str(folder / "photo.png"),
        "--model",
        "samclip",
        "--points_per_crop",
        "6",
        "--pred_iou_thresh",
        "0.5",
    )
    assert named[0]["masks"] == record["masks"]
    for mask, reference, score in zip(record["masks"], expected["masks"], expected["scores"].tolist(), strict=True):
        assert mask["score"] == pytest.approx(score, abs=1e-5)
        assert np.array_equal(decode(mask["segmentation"]), np.asarray(reference))
        assert mask["area"] == np.asarray(reference).sum()


def test_no_thresholds_return_empty_masks(capsys):
    Image.new("RGB", (150, 107), (90, 90, 90)).save("flat.png")  # every predicted mask of this image is empty
    save("photo.png")
    thresholds = ["--pred_iou_thresh", "0", "--stability_score_thresh", "0"]
    records, _ = samclip(capsys, "masks", "photo.png", "flat.png", "--points_per_crop", "8", *thresholds)
    masks = [mask for record in records for mask in record["masks"]]
    assert len(masks) >= 5 and all(mask["area"] == decode(mask["segmentation"]).sum() > 0 for mask in masks)


@pytest.mark.parametrize("kind", ["random", "empty", "full", "first pixel", "last pixel", "one row", "one column"])
def test_pycocotools_reads_the_masks(kind):
    mask = np.zeros((7, 11), dtype=bool)
    if kind == "random":
        mask[2:6, 3:9] = np.random.default_rng(0).random((4, 6)) > 0.5
    elif kind != "empty":
        places = {"first pixel": (0, 0), "last pixel": (-1, -1), "one row": 3, "one column": (slice(None), 4)}
        mask[places.get(kind, slice(None))] = True
    written = json.loads(json.dumps(coco_annotation(mask)))
    compressed = coco.frPyObjects(written["segmentation"], 7, 11)
    assert np.array_equal(coco.decode(compressed), mask)
    assert compressed["counts"] == coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
    assert written["area"] == coco.area(compressed)
    assert written["bbox"] == coco.toBbox(compressed).tolist()


@pytest.mark.parametrize("command", [["segment", *LABEL_OPTIONS], ["masks", "--points_per_crop", "6"]])
def test_the_output_image_shows_masks_and_a_legend(capsys, command):
    save("photo.png")
    samclip(capsys, *command, "photo.png", "--output", "out.png")
    [record], _ = samclip(capsys, *command, "photo.png")
    output, image = np.asarray(Image.open("out.png")), np.asarray(scene())
    assert output.shape[0] > 107 and output.shape[1] >= 150
    found = record.get("segments") or record["masks"]
    inside = np.any([decode(one["segmentation"]) for one in found], axis=0)
    differs = (output[:107, :150] != image).any(axis=2)
    outlined = np.asarray(Image.fromarray(inside).convert("L").filter(ImageFilter.MaxFilter(3))) > 0
    assert not differs[~outlined].any() and differs[inside].mean() > 0.99
    assert (output[107:] < 128).any()  # text of the legend


def test_a_mask_is_tinted_inside_and_outlined_in_its_color():
    gray = Image.new("RGB", (60, 40), (100, 100, 100))
    large, small = np.zeros((2, 40, 60), dtype=bool)
    large[10:, 5:40], small[20:30, 10:20] = True, True
    output = np.asarray(
        draw_segments(gray, [small, large, np.zeros_like(small)], [3, 0, 1], [(3, "small"), (0, "large")])
    )
    edge, tint = color_of(0), [round(100 + 0.45 * (channel - 100)) for channel in color_of(0)]
    assert output[10, 20].tolist() == list(edge) and output[20, 5].tolist() == list(edge)
    assert output[15, 20] == pytest.approx(tint, abs=1)
    assert output[39, 20] == pytest.approx(tint, abs=1)  # where the image ends, no outline
    assert output[20, 15].tolist() == list(color_of(3))  # the smaller on top
    assert (output[9, 20] == 0).all() and (output[8, 20] == 100).all()
    legend = output[40:].reshape(-1, 3).tolist()
    assert list(color_of(3)) in legend and list(color_of(0)) in legend and list(color_of(1)) not in legend


def test_long_labels_make_the_output_image_wider(capsys):
    save("photo.png")
    samclip(capsys, "classify", "photo.png", "--labels", "a red and rather fuzzy shape, b", "--output", "a.png")
    output = Image.open("a.png")
    assert output.width > 200
    right = np.asarray(output)[107:, 150:]
    assert (right < 128).any() and (right[:, -4:] > 128).all()  # text that ends before the right edge


WRONG_ARGUMENTS = {
    "no such file": (["nosuch.png"], "nosuch.png: no such file"),
    "no name": ([""], "no such file"),
    "one of several is missing": (["photo.png", "nosuch.png"], "nosuch.png: no such file"),
    "pattern without a match": (["nosuch/*.png"], "no file matches"),
    "empty folder": (["empty"], "no images in this folder"),
    "device": (["/dev/null"], "neither a file nor a folder"),
    "several images, one output": (["photo.png", "other.png", "--output", "o.png"], "there are 2 images"),
    "unknown extension": (["photo.png", "--output", "o.jpg"], "must end in .png or .json"),
    "no folder of the output": (["photo.png", "--output", "nosuch/o.png"], "the folder nosuch does not exist"),
    "folder instead of a file": (["photo.png", "--output", "taken", "--overwrite"], "because it is a folder"),
    "file instead of a folder": (["photo.png", "--output", "other.png/o.png"], "other.png does not exist"),
    "device as output": (["photo.png", "--output", "/dev/null"], "neither a file nor a folder"),
    "formats without an output": (["photo.png", "--formats", "json"], "--formats has no effect without"),
    "formats of a file": (["photo.png", "--formats", "json", "--output", "o.png"], "--formats has no effect with"),
    "standard output by a dash": (["photo.png", "--output", "-"], "without --output"),
    "onto the image": (["photo.png", "--output", "photo.png"], "would overwrite the input image"),
    "onto the images": (["photo.png", "--output", "."], "would overwrite the input image"),
    "no labels": (["photo.png", "--labels", ""], "--labels is empty"),
    "commas": (["photo.png", "--labels", " , "], "--labels is empty"),
    "empty label": (["photo.png", "--labels", "cat,,sofa"], "has an empty name"),
    "doubled label": (["photo.png", "--labels", "a  cat, sofa,a cat"], "repeated names: a cat"),
    "label in no text": (["photo.png", "--labels", "cat, \udcff"], "not valid UTF-8"),
    "template": (["photo.png", "--labels", "cat, sofa", "--template", "a photo"], "must contain {} once"),
    "braces": (["photo.png", "--labels", "cat, sofa", "--template", "{} {0}"], "must contain {} once"),
    "kind of model": (["photo.png", "--model", miniature.sam_teacher()], "is a SAM: pass it as --sam, and a CLIP"),
    "folder without model": (["photo.png", "--model", "empty"], "--model empty: the folder contains no model"),
    "no folder of the model": (["photo.png", "--model", "./no/such"], "--model ./no/such: no such folder."),
    "name without model": (["photo.png", "--model", "no/such"], "--model no/such: no such folder"),
    "unknown device": (["photo.png", "--device", "toaster"], "--device toaster: "),
    "device without number": (["photo.png", "--device", "cuda:x"], "--device cuda:x: "),
}


@pytest.mark.parametrize("command", ["segment", "classify"])
@pytest.mark.parametrize("arguments, part", WRONG_ARGUMENTS.values(), ids=WRONG_ARGUMENTS)
def test_wrong_arguments_give_one_message_and_no_output(capsys, folder, command, arguments, part):
    save("photo.png", "other.png")
    Path("empty").mkdir()
    Path("taken/photo.json").mkdir(parents=True)
    if "--labels" not in arguments:
        arguments = [*arguments, "--labels", "cat, sofa"]
    before = sorted(folder.rglob("*"))
    records, messages = samclip(capsys, command, *arguments, status=2)
    assert records == [] and len(messages) == 1
    assert messages[0].startswith(f"samclip {command}: ") and part in messages[0]
    assert sorted(folder.rglob("*")) == before


SEGMENT_WRONG_ARGUMENTS = {
    "background alone": (["--background", "wall"], "requires --labels"),
    "template alone": (["--template", "a {}"], "requires --labels"),
    "empty background": (["--labels", "cat, sofa", "--background", ","], "--background is empty"),
    "a label called background": (["--labels", "cat, background", "--background", "wall"], "another name"),
}


@pytest.mark.parametrize("arguments, part", SEGMENT_WRONG_ARGUMENTS.values(), ids=SEGMENT_WRONG_ARGUMENTS)
def test_wrong_arguments_of_segment(capsys, arguments, part):
    save("photo.png")
    records, messages = samclip(capsys, "segment", "photo.png", *arguments, status=2)
    assert records == [] and len(messages) == 1 and part in messages[0]


@pytest.mark.parametrize("command", ["segment", "classify"])
def test_a_label_that_is_too_long_is_an_error_before_the_first_image(capsys, command):
    save("photo.png")
    # It fits the text tower on its own, but not with the prompt template.
    records, messages = samclip(capsys, command, "photo.png", "--labels", "a, " + "x " * 29, status=2)
    assert records == [] and "at most 32 tokens" in messages[-1]


def test_labels_of_classify_with_the_same_tokens_are_an_error(capsys):
    save("photo.png")
    records, messages = samclip(capsys, "classify", "photo.png", "--labels", "Cat, dog, cat", status=2)
    assert records == [] and "--labels: The tokenizer cannot distinguish" in messages[-1]
    assert "['Cat', 'cat']" in messages[-1]


@pytest.mark.parametrize("value", ["2", "nan", "-0.1", "much"])
def test_a_threshold_must_be_a_probability(capsys, value):
    with pytest.raises(SystemExit, match="2"):
        main(["segment", "photo.png", "--threshold", value])
    assert f"must be a number from 0 to 1, got {value!r}" in capsys.readouterr().err


def test_a_single_label_without_background_gives_a_warning(capsys):
    save("photo.png")
    [record], messages = samclip(capsys, "segment", "photo.png", "--labels", "cat")
    assert len(messages) == 1 and "--background" in messages[0]
    assert {segment["score"] for segment in record["segments"]} == {1.0}
    [record], messages = samclip(capsys, "classify", "photo.png", "--labels", "cat")
    assert messages == ["samclip: with one label, every score is 1. Pass more labels, or --multi_label."]
    assert record["labels"] == [{"label": "cat", "score": 1.0}]
    assert samclip(capsys, "classify", "photo.png", "--labels", "cat", "--multi_label")[1] == []


@pytest.mark.parametrize("options", ([], ["--formats", "coco,masks,jsonl"], ["--output", "a.png"]))
@pytest.mark.parametrize("command", ["segment", "points --points 5,5", "masks --points_per_crop 2"])
def test_the_files_of_a_single_image_are_named_and_only_a_record_is_added(capsys, command, options):
    save("photo.png")
    records, messages = samclip(capsys, *command.split(), "photo.png", "--output", "out", *options)
    prefix = "samclip: files written: "
    assert records == [] and len(messages) == 1 and messages[0].startswith(prefix)
    named = messages[0].removeprefix(prefix).split(", ")
    written = {str(path) for path in [*Path().glob("out/*"), *Path().glob("a.png")]} - {"out/.samclip"}
    assert sorted(named) == sorted(written)
    assert ("out/results.jsonl" in named) == ("jsonl" in str(options)) and all(map(os.path.exists, named))


def test_warnings_of_the_package_have_the_prefix_of_messages(capsys):
    frames = [scene(8), scene(9)]
    frames[0].save("photo.gif", save_all=True, append_images=frames[1:])
    image_processing_samclip.logger.warning_once.cache_clear()
    options = ["--labels", "cat, Cat, sofa", "--background", "wall"]
    _, messages = samclip(capsys, "segment", "photo.gif", *options)
    assert [message[:40] for message in messages] == [
        "samclip: These names have the same token",
        "samclip: An image has several frames or ",
    ]
    assert logging.getLogger("samclip_hf").handlers == []


def test_the_default_model_is_reported(capsys):
    save("photo.png")
    command = ["classify", "photo.png", "--labels", "a, b"]
    main(command)
    assert "the shipped miniature" in capsys.readouterr().err
    main([*command, "--model", miniature.checkpoint()])
    assert capsys.readouterr().err == ""


def test_a_published_checkpoint_loads_without_its_own_code(capsys):
    save("photo.png")
    SamClipForImageSegmentation.from_pretrained(miniature.checkpoint()).save_pretrained("hub")
    for path in Path(miniature.checkpoint()).iterdir():
        if not Path("hub", path.name).exists():
            Path("hub", path.name).write_bytes(path.read_bytes())
    config = json.loads(Path("hub/config.json").read_text())
    config["auto_map"] = {"AutoModelForImageSegmentation": "segmentation_samclip.SamClipForImageSegmentation"}
    implementation = "pipeline_samclip.SamClipImageSegmentationPipeline"
    options = {"impl": implementation, "pt": ["AutoModelForImageSegmentation"], "type": "image"}
    config["custom_pipelines"] = {"zero-shot-image-segmentation": options}
    Path("hub/config.json").write_text(json.dumps(config))
    records, _ = samclip(capsys, "segment", "photo.png", *LABEL_OPTIONS, "--model", "hub")
    [expected], _ = samclip(capsys, "segment", "photo.png", *LABEL_OPTIONS)
    assert records == [expected | {"model": expected["model"] | {"name": "hub"}}]
    SamClipForImageSegmentation.from_teachers(
        miniature.sam_teacher(), miniature.clip_teacher(), merged=False
    ).save_pretrained("unmerged")
    for name in ("unmerged", "hub"):
        model = SamClipForImageSegmentation.from_pretrained(name)
        loaded = LoadedModel(model, None, None, {})
        assert _has_miniature_encoder(model)
        assert mask_generation_options(loaded) == miniature.MASK_GENERATION
        next(model.vision_encoder.parameters()).data += 0.1
        assert mask_generation_options(loaded) == MASK_GENERATION_DEFAULTS
        assert _has_miniature_encoder(model) == (name == "unmerged")  # its CLIP is the miniature's
        next(getattr(model.clip_head, "vision_model", model).parameters()).data += 0.1
        assert not _has_miniature_encoder(model)


def test_a_missing_text_tower_or_vocabulary_is_reported(capsys):
    save("photo.png")
    segmenter = SamClipForImageSegmentation.from_pretrained(miniature.checkpoint())
    segmenter.drop_text_tower().save_pretrained("small")
    SamClipModel.from_teachers(miniature.sam_teacher(), miniature.clip_teacher()).save_pretrained("bare")
    for path in Path(miniature.checkpoint()).iterdir():
        for folder in ("small", "bare"):
            if not Path(folder, path.name).exists():
                Path(folder, path.name).write_bytes(path.read_bytes())
    assert len(samclip(capsys, "segment", "photo.png", "--model", "small")[0]) == 1
    for command in ("segment", "classify"):
        options = ["--labels", "cat, sofa", "--model", "small"]
        assert "no text tower" in samclip(capsys, command, "photo.png", *options, status=2)[1][0]
    _, messages = samclip(capsys, "segment", "photo.png", "--model", "bare", status=2)
    assert messages == ['samclip segment: --model bare has no vocabulary: pass --labels, such as "cat, sofa".']


def test_a_small_limit_of_pixels_is_named_exactly(capsys):
    save("photo.png")
    _, messages = samclip(capsys, "classify", "photo.png", "--labels", "a, b", "--max_image_pixels", "100", status=1)
    assert "more than 100 pixels" in messages[0]
