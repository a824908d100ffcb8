"""Vocabularies of examples, in the shipped SAM-CLIP and in an unmerged model of the miniature's teachers."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import pipeline

from samclip_hf import SamClipForImageSegmentation, SamClipForObjectDetection, SamClipProcessor, miniature
from samclip_hf.examples_samclip import move_embeds
from samclip_hf.images import mask_to_prompt_box
from samclip_hf.miniature.scenes import BACKGROUND_PROMPTS, CLASS_NAMES, TEMPLATES, render

SCENE = render(seed=0, index=8)  # a red fuzzy, a green zigzag and a red dotted shape
IMAGE = Image.fromarray(SCENE.image)
NAMES = ["part 1", "part 2", "part 3"]
MASKS = np.stack(SCENE.masks)
BOXES = [mask_to_prompt_box(mask) for mask in MASKS]
POINTS = [[40, 30], [95, 50], [60, 100]]
EXAMPLES = {"boxes": [BOXES], "masks": [MASKS], "points": [POINTS]}


@pytest.fixture(scope="module")
def processor():
    return SamClipProcessor.from_teachers(miniature.sam_teacher(), miniature.clip_teacher())


@pytest.fixture(scope="module")
def models():
    teachers = miniature.sam_teacher(), miniature.clip_teacher()
    return {
        "merged": SamClipForImageSegmentation.from_pretrained(miniature.checkpoint()),
        "unmerged": SamClipForImageSegmentation.from_teachers(*teachers, merged=False).eval(),
    }


@pytest.fixture(params=["merged", "unmerged"])
def model(request, models):
    return models[request.param]


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def embed(model, processor, masks):
    vocabulary = model.embed_vocabulary(["red shape"], tokenizer=processor.tokenizer)
    return model.classify_masks([masks], **processor(IMAGE), vocabulary=vocabulary).segment_embeds[0]


@pytest.mark.parametrize("kind", EXAMPLES)
def test_embeddings_are_those_of_the_masks_of_the_prompts(model, processor, kind):
    if kind == "masks":
        masks = torch.from_numpy(MASKS)
    else:
        prompts = [[[point] for point in POINTS]] if kind == "points" else [BOXES]
        inputs = processor(IMAGE, **{f"input_{kind}": prompts})
        outputs = model(**inputs, multimask_output=kind == "points")
        of_three = processor.post_process_masks(
            outputs.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"]
        )[0]
        masks = of_three[torch.arange(3), outputs.iou_scores[0].argmax(dim=-1)]
    vocabulary = model.embed_examples([IMAGE], [NAMES], processor=processor, **{kind: EXAMPLES[kind]})
    assert vocabulary.id2label == dict(enumerate(NAMES)) and vocabulary.label_ids == [0, 1, 2]
    assert vocabulary.background_label_id is None
    torch.testing.assert_close(vocabulary.class_embeds, embed(model, processor, masks), rtol=1e-4, atol=1e-4)


def test_encoded_images_give_the_vocabulary_of_the_images(model, processor):
    expected = model.embed_examples([IMAGE], [NAMES], masks=[MASKS], processor=processor, background="surroundings")
    inputs = processor(IMAGE)
    sizes = inputs["reshaped_input_sizes"]
    encoded = {"vision_embeds": [model.get_vision_embeds(inputs["pixel_values"], sizes)]}
    arguments = {"masks": [MASKS], "processor": processor, "background": "surroundings"}
    own = model.embed_examples(None, [NAMES], **encoded, reshaped_input_sizes=[sizes], **arguments)
    torch.testing.assert_close(own.class_embeds, expected.class_embeds)
    for changes, message in (
        ({"reshaped_input_sizes": None}, "either images, or vision_embeds"),
        ({"images": [IMAGE]}, "either images, or vision_embeds"),
        ({"reshaped_input_sizes": [sizes, sizes]}, "1 vision_embeds and 2"),
        ({"masks": None, "boxes": [BOXES]}, "located by masks"),
    ):
        with pytest.raises(ValueError, match=message):
            model.embed_examples(
                **{"images": None, "labels": [NAMES], **encoded, "reshaped_input_sizes": [sizes], **arguments}
                | changes
            )


def test_a_label_is_the_mean_of_its_examples_in_all_images(model, processor):
    flipped = IMAGE.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    mirrored = MASKS[:, :, ::-1].copy()
    vocabulary = model.embed_examples(
        iter([IMAGE, flipped]),  # images are read one by one
        [["b", "a", "b"], ["a"]],
        masks=[MASKS, mirrored[:1]],
        processor=processor,
        background="surroundings",
    )
    assert vocabulary.id2label == {0: "background", 1: "b", 2: "a"} and vocabulary.label_ids == [0, 0, 1, 2]
    own = embed(model, processor, [*MASKS, ~MASKS.any(axis=0)])
    other = model.embed_masks([[mirrored[0], ~mirrored[0]]], processor(flipped)["pixel_values"])[0]
    means = [own[0] + own[2], own[1] + other[0]]
    expected = torch.stack([own[3], other[1], *(F.normalize(mean, dim=0) for mean in means)])
    torch.testing.assert_close(vocabulary.class_embeds, expected, rtol=1e-4, atol=1e-4)


def test_examples_are_found_in_another_image(model, processor):
    shown = {"images": [IMAGE], "labels": [NAMES], "masks": [MASKS]}
    vocabulary = model.embed_examples(**shown, processor=processor, background="surroundings")
    image = Image.fromarray(np.ascontiguousarray(SCENE.image[::-1, ::-1]))  # rotated by 180 degrees
    for composition in ("segments", "classes"):
        model.config.composition = composition
        outputs = model(**processor(image), vocabulary=vocabulary)
        model.config.composition = "segments"
        label_map = processor.post_process_semantic_segmentation(outputs, [(128, 128)])[0]
        for label_id, mask in enumerate(torch.from_numpy(MASKS[:, ::-1, ::-1].copy()), start=1):
            found = label_map == label_id
            # The composition by classes depends on the dense map, which is weak in the miniature.
            expected = 0.5 if composition == "segments" else 0.1
            assert (found & mask).sum() / (found | mask).sum() > expected, (composition, label_id)
            assert label_map[mask][label_map[mask] > 0].mode().values == label_id, (composition, label_id)


def test_texts_describe_the_background_of_examples(model, processor):
    shown = {"images": [IMAGE], "labels": [NAMES], "masks": [MASKS], "processor": processor}
    vocabulary = model.embed_examples(**shown, background=["an empty scene", "a plain background"])
    texts = model.embed_vocabulary(["x"], ["an empty scene", "a plain background"], tokenizer=processor.tokenizer)
    torch.testing.assert_close(vocabulary.class_embeds[:2], texts.class_embeds[:2])
    assert vocabulary.label_ids == [0, 0, 1, 2, 3] and vocabulary.background_label_id == 0
    scores = model.classify_masks([[*MASKS, ~MASKS.any(axis=0)]], **processor(IMAGE), vocabulary=vocabulary).scores[0]
    assert scores.argmax(dim=-1).tolist() == [1, 2, 3, 0]
    by_threshold = model.embed_examples(**shown, background=0.5)
    assert by_threshold.background_threshold == 0.5 and by_threshold.label_ids == [1, 2, 3]


def test_examples_extend_a_vocabulary_of_words(model, processor):
    words = model.embed_vocabulary(
        ["blue solid shape", ["red fuzzy shape", "red fur"]], ["an empty scene"], tokenizer=processor.tokenizer
    )
    names = ["red fuzzy shape", "part 2", "part 3"]
    shown = {"images": [IMAGE], "labels": [names], "masks": [MASKS], "processor": processor}
    both = model.embed_examples(**shown, vocabulary=words, background="surroundings")
    expected = ["background", "blue solid shape", "red fuzzy shape", "part 2", "part 3"]
    assert list(both.id2label.values()) == expected
    assert both.label_ids == [0, 0, 1, 2, 2, 3, 4]
    assert both.label_embeds.shape[0] == 4
    of_images = model.embed_masks(
        [[*MASKS, ~MASKS.any(axis=0), np.ones((128, 128), bool)]], processor(IMAGE)["pixel_values"]
    )[0]
    neutral = model.embed_vocabulary(["x"], tokenizer=processor.tokenizer, multi_label=True).neutral_embeds
    texts = words.class_embeds
    places = of_images, torch.cat([texts, neutral])
    moved = move_embeds(of_images, *places, weight=0.5)  # 1 / (1 + 1) for one image
    as_images = F.normalize(move_embeds(texts[2:], *places[::-1], weight=0.5), dim=-1)
    means = move_embeds(F.normalize(as_images + of_images[0], dim=-1), *places, weight=0.5)
    parts = [moved[3], *texts[:2], *means, *moved[1:3]]
    torch.testing.assert_close(both.class_embeds, torch.stack(parts), rtol=1e-4, atol=1e-4)
    scores = model.classify_masks([MASKS], **processor(IMAGE), vocabulary=both).scores[0]
    assert scores.argmax(dim=-1).tolist() == [2, 3, 4]


def test_labels_with_texts_and_examples_alone_determine_where_images_and_texts_are(model, processor):
    names = [CLASS_NAMES[class_id] for class_id in SCENE.class_ids]
    words = model.embed_vocabulary(names, ["an empty scene"], tokenizer=processor.tokenizer)
    shown = {"images": [IMAGE], "labels": [names], "masks": [MASKS], "processor": processor}
    both = model.embed_examples(**shown, vocabulary=words, background="surroundings")
    images, texts = embed(model, processor, MASKS), words.class_embeds[1:]
    moved = move_embeds(texts, texts, images)
    torch.testing.assert_close(moved.mean(dim=0), images.mean(dim=0), rtol=1e-4, atol=1e-4)
    means = F.normalize(F.normalize(moved, dim=-1) + images, dim=-1)
    torch.testing.assert_close(both.class_embeds[2:], move_embeds(means, images, texts), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_one_word_and_one_example_are_both_found_in_another_image(model, processor, number):
    """With one image and one word, the means of both modalities are known only roughly."""
    words = model.embed_vocabulary(
        [CLASS_NAMES[SCENE.class_ids[number]]], BACKGROUND_PROMPTS, TEMPLATES, tokenizer=processor.tokenizer
    )
    other, found = IMAGE.transpose(Image.Transpose.FLIP_LEFT_RIGHT), []
    rest = [mask for index, mask in enumerate(MASKS) if index != number]
    for example in rest:
        both = model.embed_examples([IMAGE], [["part"]], masks=[[example]], processor=processor, vocabulary=words)
        with torch.inference_mode():
            outputs = model(**processor(other), vocabulary=both)
        label_map = processor.post_process_semantic_segmentation(outputs, [(128, 128)])[0]
        own = [torch.from_numpy(mask[:, ::-1].copy()) for mask in (MASKS[number], example)]
        found.append([label_map[mask].mode().values.item() for mask in own])
    assert found == [[1, 2]] * len(rest)


def test_independent_scores_of_examples_need_the_text_tower(processor):
    model = SamClipForImageSegmentation.from_pretrained(miniature.checkpoint()).drop_text_tower()
    with pytest.raises(ValueError, match="text tower"):
        model.embed_examples([IMAGE], [NAMES], masks=[MASKS], processor=processor, multi_label=True)


def test_a_vocabulary_without_background_gets_that_of_the_surroundings(model, processor):
    words = model.embed_vocabulary(["blue solid shape", "green shape"], tokenizer=processor.tokenizer)
    shown = {"images": [IMAGE], "labels": [["part 1"]], "masks": [MASKS[:1]], "processor": processor}
    both = model.embed_examples(**shown, vocabulary=words, background="surroundings")
    assert list(both.id2label.values()) == ["background", "blue solid shape", "green shape", "part 1"]
    assert both.label_ids == [0, 1, 2, 3] and both.background_label_id == 0
    assert words.id2label == {0: "blue solid shape", 1: "green shape"}  # not changed


def test_images_without_examples_show_the_background(model, processor):
    plain = Image.new("RGB", (128, 128), "gray")
    vocabulary = model.embed_examples(
        [IMAGE, plain], [NAMES, []], boxes=[BOXES, []], processor=processor, background="surroundings"
    )
    features = model.get_image_features(**{"pixel_values": processor(plain)["pixel_values"]}).pooler_output
    torch.testing.assert_close(vocabulary.class_embeds[1:2], F.normalize(features, dim=-1), rtol=1e-3, atol=1e-3)


def test_move_embeds_gives_images_the_mean_and_deviation_of_texts():
    generator = torch.Generator().manual_seed(0)
    images = 3 * torch.randn(50, 8, generator=generator) + 5
    texts = 0.2 * torch.randn(30, 8, generator=generator) - 1
    moved = move_embeds(images, images, texts)
    torch.testing.assert_close(moved.mean(dim=0), texts.mean(dim=0))
    deviation, expected = ((own - own.mean(dim=0)).norm(dim=1).square().mean().sqrt() for own in (moved, texts))
    torch.testing.assert_close(deviation, expected)
    order, same_order = ((own - own[:1]).norm(dim=1).argsort() for own in (images, moved))
    assert torch.equal(order, same_order)
    torch.testing.assert_close(move_embeds(images, images, texts, weight=0.25), 0.75 * images + 0.25 * moved)
    one_text = move_embeds(images, images, texts[:1])
    torch.testing.assert_close(one_text - one_text[0], images - images[0], rtol=1e-4, atol=1e-4)


def test_a_saved_vocabulary_of_examples_works_in_pipelines_and_detection(models, processor, tmp_path):
    model = SamClipForImageSegmentation.from_pretrained(miniature.checkpoint())
    names = [CLASS_NAMES[class_id] for class_id in SCENE.class_ids]
    vocabulary = model.embed_examples([IMAGE], [names], boxes=[BOXES], processor=processor, background="surroundings")
    model.set_vocabulary(vocabulary).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = SamClipForImageSegmentation.from_pretrained(tmp_path)
    for own, saved in ((vocabulary, loaded.vocabulary),):
        assert torch.equal(own.class_embeds, saved.class_embeds) and torch.equal(own.label_embeds, saved.label_embeds)
        assert (own.label_ids, own.id2label) == (saved.label_ids, saved.id2label)
    for task in ("zero-shot-image-segmentation", "image-segmentation"):
        segments = pipeline(task, model=str(tmp_path))(IMAGE, threshold=0.5)
        assert {segment["label"] for segment in segments} - {"background"} == set(names)
    detector = pipeline("zero-shot-object-detection", model=str(tmp_path))
    found = detector(IMAGE, candidate_labels=names, threshold=0.5)
    assert {entry["label"] for entry in found} == set(names)
    assert isinstance(detector.model, SamClipForObjectDetection)
    loaded.drop_text_tower().save_pretrained(tmp_path / "small")
    small = SamClipForImageSegmentation.from_pretrained(tmp_path / "small")
    again = small.embed_examples([IMAGE], [names], boxes=[BOXES], processor=processor, background="surroundings")
    assert torch.allclose(again.class_embeds, vocabulary.class_embeds, atol=1e-5)
    assert not again.label_embeds.any()  # there is no text tower
    small.set_vocabulary(again)


def test_independent_scores_of_examples(models, processor):
    model = models["merged"]
    shown = {"images": [IMAGE], "labels": [NAMES], "masks": [MASKS], "processor": processor}
    vocabulary = model.embed_examples(**shown, multi_label=True)
    arguments = {**processor(IMAGE), "vocabulary": vocabulary, "multi_label": True}
    scores = model.classify_masks([[*MASKS, ~MASKS.any(axis=0)]], **arguments).scores[0]
    assert scores[:3].argmax(dim=-1).tolist() == [0, 1, 2]
    assert scores.diagonal().min() > 0.5 > scores[3].max()
    with pytest.raises(ValueError, match="multi_label=True"):
        model.classify_masks([MASKS], **processor(IMAGE), vocabulary=model.embed_examples(**shown), multi_label=True)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"boxes": None}, "exactly one of boxes, masks and points; got none"),
        ({"points": [POINTS]}, "exactly one of boxes, masks and points; got boxes and points"),
        ({"labels": [NAMES[:2]]}, "Image 0 has 2 labels and 3 boxes"),
        ({"labels": [NAMES, NAMES]}, "labels for 2 images and boxes for 1"),
        ({"labels": ["abc"]}, "must be a list of names"),
        ({"labels": [["a", "", "b"]]}, "must be a list of names"),
        ({"labels": [["a", 3, "b"]]}, "must be a list of names"),
        ({"labels": "abc"}, "labels must be a list with a list for each image"),
        ({"labels": [[]], "boxes": [[]]}, "There are no examples"),
        ({"labels": [NAMES, []], "boxes": [BOXES, []]}, 'only with background="surroundings"'),
        ({"images": [IMAGE, IMAGE]}, "Got 2 images and labels for 1"),
        ({"images": []}, "Got 0 images and labels for 1"),
        ({"boxes": [[[0, 0, 129, 50], *BOXES[1:]]]}, "image 0, which is 128 wide and 128 high, .* outside"),
        ({"boxes": [[[50, 0, 50, 50], *BOXES[1:]]]}, "x1 < x2"),
        ({"boxes": [[[0.2, 0.2, 0.9, 0.8], *BOXES[1:]]]}, "image 0 is smaller than a pixel"),
        ({"boxes": [[[1, 2, 3], *BOXES[1:]]]}, "A box of image 0 must be x1, y1, x2, y2"),
        ({"boxes": [["box", *BOXES[1:]]]}, "must be numbers"),
        ({"boxes": None, "points": [[[1, 2], [3, 4], [5, float("nan")]]]}, "outside the image"),
        ({"boxes": None, "points": [[[1, 2], [3, 4], [5, 6, 7]]]}, "one point x, y or a list of points"),
        ({"boxes": None, "masks": [[MASKS[0], MASKS[1], MASKS[2] & False]]}, "'part 3' in image 0 has no pixels"),
        ({"boxes": None, "masks": [MASKS[:, :64]]}, "masks of image 0 cannot be used.*aspect ratio"),
        ({"background": "a wall"}, "background must be a list of texts"),
        ({"background": 2.0}, "between 0 and 1"),
        ({"background": ["a wall"], "labels": [["background", "a", "b"]]}, 'name of label 0 is "background"'),
        ({"labels": [["a part", "A  Part", "b"]]}, "labels 'a part' and 'A  Part' differ in capitals or spaces only"),
        ({"labels": [["caf\u00e9", "cafe\u0301", "b"]]}, "differ in capitals or spaces only"),
        ({"background": ["A wall"], "labels": [["a wall", "a", "b"]]}, "describe the background and are labels"),
        ({"boxes": [[BOXES[0], BOXES[1], BOXES[0]]]}, "examples of 'part 1' and 'part 3' are the same"),
    ],
)
def test_wrong_examples_are_refused(models, processor, changes, message):
    arguments = {"images": [IMAGE], "labels": [NAMES], "boxes": [BOXES], "processor": processor} | changes
    with pytest.raises(ValueError, match=message):
        models["merged"].embed_examples(**arguments)


def test_a_background_that_a_vocabulary_has_is_refused(models, processor):
    model = models["merged"]
    arguments = {"images": [IMAGE], "labels": [NAMES], "boxes": [BOXES], "processor": processor}
    words = model.embed_vocabulary(["red shape", "blue shape"], 0.6, tokenizer=processor.tokenizer)
    for changes, message in (
        ({"background": ["a wall"]}, "The vocabulary has the texts or the threshold"),
        ({"background": "surroundings"}, "either a threshold or the surroundings"),
        ({"multi_label": True}, "pass multi_label to embed_vocabulary"),
        ({"labels": [["background", "a", "b"]]}, 'name of label 0 is "background"'),
        ({"labels": [["Red shape", "a", "b"]]}, "labels 'red shape' and 'Red shape' differ in capitals or spaces"),
    ):
        with pytest.raises(ValueError, match=message):
            model.embed_examples(**(arguments | changes), vocabulary=words)
    whole = [[[0, 0, 128, 128]]]
    with pytest.raises(ValueError, match="no surroundings"):
        model.embed_examples(
            [IMAGE], [["a"]], masks=[np.ones((1, 128, 128), bool)], processor=processor, background="surroundings"
        )
    assert len(model.embed_examples([IMAGE], [["a"]], boxes=whole, processor=processor).class_embeds) == 1
