"""SAM-CLIP models, and other models, in transformers' own pipelines."""

import base64
import shutil

import numpy as np
import pytest
import torch
from huggingface_hub.utils import httpx
from PIL import Image
from transformers import AutoProcessor, pipeline
from transformers.image_utils import load_image as load_image_of_transformers

from samclip_hf import miniature
from samclip_hf.miniature.scenes import render
from samclip_hf.registration import register
from samclip_hf.stock_pipelines import STOCK_PIPELINES

TASKS = {
    "image-feature-extraction": {},
    "image-segmentation": {},
    "mask-generation": {"points_per_crop": 2},
    "zero-shot-image-classification": {"candidate_labels": ["a red shape"]},
    "zero-shot-object-detection": {"candidate_labels": ["a red shape"]},
}


@pytest.fixture(scope="module")
def pipelines():
    return {task: pipeline(task, model=miniature.checkpoint()) for task in TASKS}


@pytest.fixture(scope="module")
def classify(pipelines):
    return pipelines["zero-shot-image-classification"]


@pytest.fixture(scope="module")
def classify_with_clip():
    return pipeline("zero-shot-image-classification", model=miniature.clip_teacher())


@pytest.fixture(scope="module")
def gray() -> np.ndarray:
    return np.asarray(Image.fromarray(render(seed=0, index=8).image).convert("L"))


def pixels_of(made, image, arguments) -> torch.Tensor:
    """What the model gets of an image."""
    if made.task == "zero-shot-object-detection":
        image = {"image": image, **arguments}
    preprocess_params = made._sanitize_parameters(**arguments)[0]
    inputs = made.preprocess(image, **preprocess_params)
    inputs = next(iter(inputs)) if made.task in ("mask-generation", "zero-shot-object-detection") else inputs
    return inputs["pixel_values"] if "pixel_values" in inputs else inputs["image_embeddings"]


@pytest.mark.parametrize("source", ["path", "image", "data", "url"])
def test_samclip_gets_the_same_pixels_with_16_bits_as_with_8(source, pipelines, gray, tmp_path, monkeypatch):
    seen: dict[str, list[torch.Tensor]] = {task: [] for task in TASKS}
    for name, image in (("8", Image.fromarray(gray)), ("16", Image.fromarray(gray.astype(np.uint16) * 257))):
        path = tmp_path / f"{name}.png"
        image.save(path)
        if source == "path":
            image = str(path)
        elif source == "data":
            image = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
        elif source == "url":
            image = f"https://example.com/{name}.png"
            response = httpx.Response(200, content=path.read_bytes(), request=httpx.Request("GET", image))
            monkeypatch.setattr(httpx, "get", lambda *_, response=response, **__: response)
        for task, arguments in TASKS.items():
            seen[task].append(pixels_of(pipelines[task], image, arguments))
    for task, (eight, sixteen) in seen.items():
        assert torch.equal(eight, sixteen) and eight.std() > 0, task


def test_other_models_get_the_pixels_of_transformers(classify_with_clip, gray, tmp_path):
    path = tmp_path / "16.png"
    Image.fromarray(gray.astype(np.uint16) * 257).save(path)
    expected = classify_with_clip.image_processor(load_image_of_transformers(str(path)), return_tensors="pt")
    actual = pixels_of(classify_with_clip, str(path), {"candidate_labels": ["a red shape"]})
    assert torch.equal(actual, expected["pixel_values"])


def test_registering_again_extends_nothing():
    before = [(made.preprocess, made._sanitize_parameters) for made in STOCK_PIPELINES]
    register()
    assert [(made.preprocess, made._sanitize_parameters) for made in STOCK_PIPELINES] == before


@pytest.mark.parametrize("arguments", [{"tile": 64}, {"tile": 64, "overlap": 0.2}, {"overlap": 0.2}])
@pytest.mark.parametrize("task", TASKS)
def test_tiles_of_stock_pipelines_raise(pipelines, task, arguments):
    expected = {
        "image-segmentation": 'use pipeline\\("zero-shot-image-segmentation"\\)',
        "mask-generation": "pass pipeline_class=SamClipMaskGenerationPipeline",
    }.get(task, "it processes images as a whole")
    image = Image.fromarray(render(seed=0, index=8).image)
    inputs = {"image": image} if task == "zero-shot-object-detection" else image
    with pytest.raises(ValueError, match=f"has no {' and '.join(arguments)}.*{expected}"):
        pipelines[task](inputs, **TASKS[task], **arguments)
    with pytest.raises(ValueError, match=expected):
        pipeline(task, model=miniature.checkpoint(), **arguments)


def test_labels_of_object_detection_are_a_list_or_separated_by_commas(pipelines):
    detect, image = pipelines["zero-shot-object-detection"], Image.fromarray(render(seed=0, index=8).image)
    names = ["red fuzzy shape", "green zigzag shape"]
    expected = detect(image, candidate_labels=names, threshold=0.3)
    assert {found["label"] for found in expected} == set(names)
    for labels in (tuple(names), np.array(names), (name for name in names), ", ".join(names)):
        assert detect(image, candidate_labels=labels, threshold=0.3) == expected
    for labels in ([], "", [["cat", "kitten"]], {"cat"}, [3]):
        with pytest.raises(ValueError, match=r"must be a (list|text)|no synonyms"):
            detect(image, candidate_labels=labels)


class TestZeroShotImageClassification:
    NAMES = ("red fuzzy shape", "blue solid shape", "green zigzag shape")

    def test_every_sequence_of_names_gives_the_result_of_a_list(self, classify, gray):
        image = Image.fromarray(gray)
        expected = classify([image, image], candidate_labels=list(self.NAMES))
        assert sorted(score["label"] for score in expected[1]) == sorted(self.NAMES)
        for names in (self.NAMES, np.array(self.NAMES), (name for name in self.NAMES)):
            assert classify([image, image], candidate_labels=names) == expected

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            ("cat,dog", "must be a list"),
            ({"cat": 1, "dog": 2}, "must be a list"),
            ({"cat", "dog"}, "must be a list"),
            ([], "at least one name"),
            (range(3), "must be a list"),
            (["cat", ""], "no text empty"),
            (["cat", "cat"], "more than once"),
            ([["cat", "kitten"], "dog"], "no synonyms"),
            (["Cat", "dog", "cat"], "cannot distinguish these labels from others: \\['Cat', 'cat'\\]"),
        ],
    )
    def test_other_labels_raise(self, classify, gray, labels, message):
        with pytest.raises(ValueError, match=message):
            classify(Image.fromarray(gray), candidate_labels=labels)

    def test_a_template_without_a_place_for_the_name_raises(self, classify, gray):
        for template in ("a photo", "{} and {}", ["a {}"]):
            with pytest.raises(ValueError, match=r"must be a text that contains \{\} once"):
                classify(Image.fromarray(gray), candidate_labels=["cat", "dog"], hypothesis_template=template)

    def test_other_models_are_unchanged(self, classify_with_clip, gray):
        scores = classify_with_clip(Image.fromarray(gray), candidate_labels="ab", hypothesis_template="a photo")
        assert sorted(score["label"] for score in scores) == ["a", "b"]
        assert len(classify_with_clip(Image.fromarray(gray), candidate_labels=["a"], tile=64)) == 1


@pytest.mark.parametrize("task", ["zero-shot-image-classification", "zero-shot-object-detection"])
def test_a_tokenizer_without_vocabulary_is_refused(task, tmp_path):
    """transformers makes one if tokenizer.json is missing. Object detection would find nothing."""
    folder = shutil.copytree(miniature.checkpoint(), tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="its vocabulary is empty"):
        pipeline(task, model=str(folder))
    with pytest.raises(ValueError, match="its vocabulary is empty"):
        AutoProcessor.from_pretrained(folder)
