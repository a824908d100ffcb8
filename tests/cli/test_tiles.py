"""`--tile` and `--overlap` of `samclip segment` and `masks`, compared with the pipelines."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import pipeline

from samclip_cli import main
from samclip_hf import SamClipMaskGenerationPipeline, miniature
from samclip_hf.images import decode_mask

from ..test_tiling_samclip import POSITIONS, draw_large_scene


@pytest.fixture(autouse=True)
def scene(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image, _, names = draw_large_scene(150, 290, 1, POSITIONS)
    image.save("large.png")
    return image, names


def test_segments_of_tiles_equal_those_of_the_pipeline(scene):
    image, names = scene
    options = {"hypothesis_template": "a {}", "background": ["an empty scene"], "threshold": 0.2}
    segmenter = pipeline("zero-shot-image-segmentation", model=miniature.checkpoint())
    expected = segmenter(image, candidate_labels=names, tile=150, overlap=0.3, **options)
    labels = [
        "--labels",
        ",".join(names),
        "--background",
        "an empty scene",
        "--template",
        "a {}",
        "--threshold",
        "0.2",
    ]
    formats = ["--output", "out", "--formats", "overlay,labelmap,masks,cutouts,json,coco"]
    assert main(["segment", "large.png", *labels, "--tile", "150", "--overlap", "0.3", *formats]) == 0
    segments = json.loads(Path("out/large.json").read_text())["segments"]
    assert len(segments) == len(expected) == 3
    label_map = np.asarray(Image.open("out/large_labels.png"))
    for segment, reference in zip(segments, expected, strict=True):
        mask = np.asarray(reference["mask"]) > 0
        assert (segment["label"], segment["score"]) == (
            reference["label"],
            pytest.approx(reference["score"], abs=1e-4),
        )
        assert (decode_mask(segment["segmentation"]) != mask).mean() < 1e-3
        assert (label_map[mask] == segment["label_id"]).mean() > 0.99
    assert len(list(Path("out/large_masks").iterdir())) == len(list(Path("out/large_cutouts").iterdir())) == 3


def test_masks_of_tiles_equal_those_of_the_pipeline(scene):
    everything = pipeline(
        "mask-generation", model=miniature.checkpoint(), pipeline_class=SamClipMaskGenerationPipeline
    )
    options = miniature.MASK_GENERATION | {"points_per_crop": 6}
    expected = everything(scene[0], tile=150, **options)
    arguments = ["--tile", "150", "--points_per_crop", "6", "--output", "out", "--formats", "overlay,json"]
    assert main(["masks", "large.png", *arguments]) == 0
    masks = json.loads(Path("out/large.json").read_text())["masks"]
    assert len(masks) == len(expected["masks"]) > 0
    for mask, reference in zip(masks, expected["masks"], strict=True):
        assert (decode_mask(mask["segmentation"]) != reference.numpy()).mean() < 1e-3


def test_masks_of_tiles_have_names(scene):
    names = [*scene[1], "red solid shape"]
    arguments = ["--tile", "150", "--points_per_crop", "6", "--labels", ",".join(names), "--output", "out.json"]
    assert main(["masks", "large.png", *arguments]) == 0
    masks = json.loads(Path("out.json").read_text())["masks"]
    truth = draw_large_scene(150, 290, 1, POSITIONS)[1]
    matched = set()
    for mask in masks:
        found = decode_mask(mask["segmentation"])
        ious = [(found & own).sum() / (found | own).sum() for own in truth]
        if max(ious) > 0.8:
            assert mask["label"] == names[int(np.argmax(ious))] and mask["label_score"] > 0.5
            matched.add(mask["label"])
    assert matched == set(scene[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["segment", "--overlap", "0.2"], "--overlap has no effect without --tile"),
        (["masks", "--overlap", "0.2"], "--overlap has no effect without --tile"),
        (["segment", "--tile", "64", "--overlap", "0.6"], "--overlap must be a fraction of --tile"),
        (["segment", "--tile", "64", "--overlap", "0.001"], "--overlap must be a fraction of --tile"),
    ],
)
def test_wrong_tiles_are_reported_before_the_model_is_loaded(capsys, monkeypatch, arguments, message):
    monkeypatch.setattr("samclip_cli.models.load_model", None)
    assert main([arguments[0], "large.png", *arguments[1:]]) == 2
    assert message in capsys.readouterr().err
