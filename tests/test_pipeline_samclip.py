"""The pipeline `zero-shot-image-segmentation` on the shipped miniature, against direct calls of the model."""

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


ARGUMENTS = {
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


def test_task_gives_the_class(segmenter):
    assert type(segmenter) is SamClipImageSegmentationPipeline


@pytest.mark.parametrize("subtask", ["semantic", "panoptic"])
def test_matches_direct_calls(segmenter, images, subtask):
    model, image_processor = segmenter.model, segmenter.image_processor
    vocabulary = model.embed_vocabulary(CLASS_NAMES, BACKGROUND_PROMPTS, ["a {}"], segmenter.tokenizer)
    found = 0
    for image in images:
        size = [(image.height, image.width)]
        with torch.inference_mode():
            outputs = model(**image_processor(image, return_tensors="pt"), vocabulary=vocabulary)
        segments = segmenter(image, subtask=subtask, **ARGUMENTS)
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


def test_batches_and_generators_give_equal_results(segmenter, images):
    one_by_one = [segmenter(image, **ARGUMENTS) for image in images]
    batched = segmenter(images, batch_size=2, **ARGUMENTS)
    streamed = list(segmenter((image for image in images), batch_size=3, **ARGUMENTS))
    for results in (batched, streamed):
        for actual, expected in zip(results, one_by_one, strict=True):
            assert_same_segments(actual, expected)


def test_a_vocabulary_is_embedded_once(segmenter, images, monkeypatch):
    embedded, embed = [], segmenter.model._embed_texts
    monkeypatch.setattr(segmenter.model, "_embed_texts", lambda *args: embedded.append(args[0]) or embed(*args))
    labels = ["red dotted shape", ["green zigzag shape", "green shape"]]
    for _ in range(2):
        segmenter(images, candidate_labels=labels, hypothesis_template=["a {}", "the {}"])
    assert [len(texts) for texts in embedded] == [6, 2]  # texts from templates, names
    segmenter(images, candidate_labels=labels)
    assert len(embedded) == 4


def test_vocabularies_that_print_alike_are_different(segmenter, images):
    """numpy abbreviates long arrays with "..."."""
    first = np.array(
        [f"{chr(97 + n // 676)}{chr(97 + n // 26 % 26)}{chr(97 + n % 26)}" for n in range(1001)], dtype="U20"
    )
    second = first.copy()
    second[500] = "red fuzzy shape"
    assert repr(first) == repr(second)
    segmenter(images[0], candidate_labels=first, hypothesis_template="{}")
    segmenter(images[0], candidate_labels=second, hypothesis_template="{}")
    vocabulary = segmenter._vocabulary[1]
    assert list(vocabulary.id2label.values()) == second.tolist()
    expected = segmenter.model.embed_vocabulary(["red fuzzy shape"], (), "{}", segmenter.tokenizer).class_embeds
    torch.testing.assert_close(vocabulary.class_embeds[vocabulary.label_ids.index(500)], expected[0])


def test_a_vocabulary_is_embedded_again_when_weights_change(images):
    labels = ["red fuzzy shape", "green zigzag shape", "red dotted shape"]
    made = pipeline("zero-shot-image-segmentation", model=miniature.checkpoint(), candidate_labels=labels)

    def embeds():
        made(images[0])  # with the labels of the constructor
        return made._vocabulary[1].class_embeds

    weight = made.model.text_projection.weight
    before = [embeds()]
    for change in (
        lambda: weight.data.neg_(),
        lambda: made.model.text_model.load_state_dict(
            {name: value * 0.5 for name, value in made.model.text_model.state_dict().items()}
        ),
        lambda: setattr(made.model, "text_projection", torch.nn.Linear(*weight.shape[::-1], bias=False)),
    ):
        change()
        after, expected = embeds(), made.model.embed_vocabulary(labels, tokenizer=made.tokenizer).class_embeds
        torch.testing.assert_close(after, expected)
        assert not any(torch.allclose(after, other) for other in before)
        before.append(after)
        assert embeds() is after


def test_a_call_reads_the_weights_of_the_text_tower_in_one_transfer(segmenter, images):
    """On a GPU, each transfer waits for all work that is queued."""
    arguments = {"candidate_labels": ["red fuzzy shape"], "hypothesis_template": "a {}"}
    segmenter(images[0], **arguments)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        segmenter._sanitize_parameters(**arguments)
    transfers = {event.key: event.count for event in profiler.key_averages()}
    assert "aten::_local_scalar_dense" not in transfers and "aten::item" not in transfers, transfers
    assert transfers["aten::sum"] > 10


def test_generators_of_labels_are_read_once(segmenter, images):
    labels = ["red fuzzy shape", "green zigzag shape", "red dotted shape"]
    made = pipeline(
        "zero-shot-image-segmentation",
        model=miniature.checkpoint(),
        candidate_labels=(label for label in labels),
        background=(text for text in ["an empty scene"]),
    )
    for _ in range(2):
        assert_same_segments(
            made(images[0], background_templates=True),
            segmenter(images[0], candidate_labels=labels, background=["an empty scene"], background_templates=True),
        )


def test_arguments_of_the_constructor_are_defaults_of_the_calls(segmenter, images):
    arguments = {"candidate_labels": ["red dotted shape", "blue solid shape"], "hypothesis_template": "a {}"}
    made = pipeline("zero-shot-image-segmentation", model=miniature.checkpoint(), **arguments)
    for other in ({}, {"hypothesis_template": "the {}"}, {"candidate_labels": ["dog"]}, {"background": 0.5}):
        actual = made(images[0], subtask="semantic", **other)
        assert_same_segments(actual, segmenter(images[0], subtask="semantic", **arguments | other))


def test_background_threshold_keeps_confident_segments(segmenter, images):
    arguments = ARGUMENTS | {"threshold": 0.9}
    confident = segmenter(images[0], **arguments)
    assert confident
    by_threshold = segmenter(images[0], **arguments | {"background": 0.5})
    assert {segment["label"] for segment in confident} <= {segment["label"] for segment in by_threshold}
    assert all(segment["score"] > 0.9 for segment in by_threshold)


def test_default_vocabulary_is_the_checkpoints(segmenter, images):
    stock = pipeline("image-segmentation", model=miniature.checkpoint())
    segmenter(images[0], candidate_labels=["dog"])  # does not change the default
    own = segmenter(images[0], subtask="semantic")
    assert_same_segments(own, stock(images[0], subtask="semantic"))


def test_unknown_arguments_raise(segmenter, images):
    with pytest.raises(TypeError, match="no argument backgrounds, templates"):
        segmenter(images[0], candidate_labels=["dog"], backgrounds=["a wall"], templates=["a {}"])
    with pytest.raises(TypeError, match="no argument template"):
        pipeline("zero-shot-image-segmentation", model=miniature.checkpoint(), template="a {}")
    for options in ({"dtype": torch.float32}, {"torch_dtype": torch.float32}, {"device": "cpu", "batch_size": 2}):
        pipeline("zero-shot-image-segmentation", model=miniature.checkpoint(), **options)


def test_wrong_input_raises(segmenter, images):
    for arguments, message in (
        ({"background": 0.5}, "background cannot be used without"),
        ({"candidate_labels": []}, "at least one name"),
        ({"candidate_labels": ["a"], "hypothesis_template": "a photo"}, "contain {}"),
        ({"subtask": "panoptical"}, "subtask must be"),
    ):
        with pytest.raises(ValueError, match=message):
            segmenter(images[0], **arguments)


class TestIndependentScores:
    ARGUMENTS = {"hypothesis_template": "a {}", "multi_label": True}

    def test_other_labels_do_not_change_a_result(self, segmenter, images):
        few = segmenter(images[0], candidate_labels=CLASS_NAMES[:2], threshold=0.0, **self.ARGUMENTS)
        many = segmenter(images[0], candidate_labels=CLASS_NAMES, threshold=0.0, **self.ARGUMENTS)
        assert {segment["label"] for segment in few} == set(CLASS_NAMES[:2])
        assert_same_segments(few, [segment for segment in many if segment["label"] in CLASS_NAMES[:2]])

    @pytest.mark.parametrize("subtask", [None, "semantic"])
    def test_present_labels_are_found_and_absent_labels_are_not(self, segmenter, images, subtask):
        for index, image in enumerate(images):
            scene = render(seed=0, index=index)
            present = {CLASS_NAMES[class_id] for class_id in scene.class_ids}
            absent = [
                name
                for name in CLASS_NAMES
                if not any(word in other.split() for other in present for word in name.split()[:2])
            ]
            found = segmenter(image, candidate_labels=[*present, *absent], subtask=subtask, **self.ARGUMENTS)
            assert found == sorted(found, key=lambda segment: -segment["score"])
            assert found[0]["label"] in present
            if subtask == "semantic":
                assert len({segment["label"] for segment in found}) == len(found)

    def test_a_semantic_mask_is_the_union_of_the_segments(self, segmenter, images):
        arguments = {"candidate_labels": CLASS_NAMES[:1], "threshold": 0.0} | self.ARGUMENTS
        segments = segmenter(images[0], **arguments)
        (whole,) = segmenter(images[0], subtask="semantic", **arguments)
        union = np.any([np.asarray(segment["mask"]) > 0 for segment in segments], axis=0)
        assert np.array_equal(np.asarray(whole["mask"]) > 0, union)
        assert whole["score"] == max(segment["score"] for segment in segments)

    def test_a_threshold_above_all_scores_gives_nothing(self, segmenter, images):
        assert segmenter(images[0], candidate_labels=CLASS_NAMES, threshold=1.01, **self.ARGUMENTS) == []

    def test_batches_give_the_same_results(self, segmenter, images):
        arguments = {"candidate_labels": CLASS_NAMES[:3], "threshold": 0.0} | self.ARGUMENTS
        for image, found in zip(images, segmenter(images, batch_size=3, **arguments), strict=True):
            assert_same_segments(found, segmenter(image, **arguments))

    def test_arguments_without_effect_raise(self, segmenter, images):
        with pytest.raises(ValueError, match="background has no effect"):
            segmenter(images[0], candidate_labels=["a"], background=["a wall"], multi_label=True)
        for arguments in ({"subtask": "panoptic"}, {"overlap_mask_area_threshold": 0.5}):
            with pytest.raises(ValueError, match="segments may overlap"):
                segmenter(images[0], candidate_labels=["red solid shape"], multi_label=True, **arguments)
