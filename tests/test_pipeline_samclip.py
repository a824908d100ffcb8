"""The pipeline whose vocabulary comes with the call, on the shipped miniature, against the model called directly."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from samclip_hf import SamClipImageSegmentationPipeline, miniature
from samclip_hf.miniature.scenes import BACKGROUND_PROMPTS, CLASS_NAMES, render


@pytest.fixture(scope="module")
def segmenter():
    return pipeline("zero-shot-image-segmentation", model=miniature.checkpoint())


@pytest.fixture(scope="module")
def images():
    return [
        Image.fromarray(render(seed=0, index=index).image).resize((150 + 9 * index, 100), Image.Resampling.BILINEAR)
        for index in range(3)
    ]


WORDS = {
    "candidate_labels": list(CLASS_NAMES),
    "hypothesis_template": "a {}",
    "background": list(BACKGROUND_PROMPTS),
    "threshold": 0.2,
}


def assert_same_segments(actual, expected):
    assert [s["label"] for s in actual] == [s["label"] for s in expected]
    for one, other in zip(actual, expected, strict=True):
        assert one["score"] == other["score"] or one["score"] == pytest.approx(other["score"], abs=1e-4)
        differs = np.asarray(one["mask"]) != np.asarray(other["mask"])
        assert differs.mean() < 1e-3  # rounding, at a mask's edge


def test_it_is_found_by_its_task(segmenter):
    assert type(segmenter) is SamClipImageSegmentationPipeline


@pytest.mark.parametrize("subtask", ["semantic", "panoptic"])
def test_equals_the_model_called_directly(segmenter, images, subtask):
    model, image_processor = segmenter.model, segmenter.image_processor
    vocabulary = model.embed_vocabulary(CLASS_NAMES, BACKGROUND_PROMPTS, ["a {}"], segmenter.tokenizer)
    found = 0
    for image in images:
        size = [(image.height, image.width)]
        with torch.inference_mode():
            outputs = model(**image_processor(image, return_tensors="pt"), vocabulary=vocabulary)
        segments = segmenter(image, subtask=subtask, **WORDS)
        if subtask == "semantic":
            label_map = image_processor.post_process_semantic_segmentation(outputs, size)[0]
            expected = [(vocabulary.id2label[n], label_map == n) for n in label_map.unique().tolist()]
        else:
            result = image_processor.post_process_panoptic_segmentation(outputs, threshold=0.2, target_sizes=size)[0]
            expected = [
                (vocabulary.id2label[s["label_id"]], result["segmentation"] == s["id"])
                for s in result["segments_info"]
            ]
        assert [s["label"] for s in segments] == [label for label, _ in expected]
        for segment, (_, mask) in zip(segments, expected, strict=True):
            assert np.array_equal(np.asarray(segment["mask"]) > 0, mask.numpy())
        found += len(segments)
    assert found >= 3


def test_batches_and_streams_give_the_same(segmenter, images):
    one_by_one = [segmenter(image, **WORDS) for image in images]
    batched = segmenter(images, batch_size=2, **WORDS)
    streamed = list(segmenter((image for image in images), batch_size=3, **WORDS))
    for results in (batched, streamed):
        for actual, expected in zip(results, one_by_one, strict=True):
            assert_same_segments(actual, expected)


def test_a_vocabulary_is_embedded_once(segmenter, images, monkeypatch):
    embedded, embed = [], segmenter.model._embed_texts
    monkeypatch.setattr(segmenter.model, "_embed_texts", lambda *args: embedded.append(args[0]) or embed(*args))
    labels = ["red dotted shape", ["green zigzag shape", "green shape"]]
    for _ in range(2):
        segmenter(images, candidate_labels=labels, hypothesis_template=["a {}", "the {}"])
    assert len(embedded) == 1 and len(embedded[0]) == 6
    segmenter(images, candidate_labels=labels)
    assert len(embedded) == 2


def test_what_a_pipeline_was_made_with_holds_until_a_call_says_otherwise(segmenter, images):
    words = {"candidate_labels": ["red dotted shape", "blue solid shape"], "hypothesis_template": "a {}"}
    made = pipeline("zero-shot-image-segmentation", model=miniature.checkpoint(), **words)
    for other in ({}, {"hypothesis_template": "the {}"}, {"candidate_labels": ["dog"]}, {"background": 0.5}):
        actual = made(images[0], subtask="semantic", **other)
        assert_same_segments(actual, segmenter(images[0], subtask="semantic", **words | other))


def test_a_threshold_for_background_takes_nothing_from_the_names(segmenter, images):
    words = WORDS | {"threshold": 0.9}
    sure = segmenter(images[0], **words)
    assert sure
    by_threshold = segmenter(images[0], **words | {"background": 0.5})
    assert {segment["label"] for segment in sure} <= {segment["label"] for segment in by_threshold}
    assert all(segment["score"] > 0.9 for segment in by_threshold)


def test_without_labels_it_has_the_checkpoints_own(segmenter, images):
    stock = pipeline("image-segmentation", model=miniature.checkpoint())
    segmenter(images[0], candidate_labels=["dog"])  # forgotten after the call
    own = segmenter(images[0], subtask="semantic")
    assert_same_segments(own, stock(images[0], subtask="semantic"))


def test_bad_input_is_refused(segmenter, images):
    for arguments, message in (
        ({"background": 0.5}, "background belong to candidate_labels"),
        ({"candidate_labels": []}, "at least one name"),
        ({"candidate_labels": ["a"], "hypothesis_template": "a photo"}, "contain {}"),
        ({"subtask": "panoptical"}, "subtask must be"),
    ):
        with pytest.raises(ValueError, match=message):
            segmenter(images[0], **arguments)
