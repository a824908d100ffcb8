"""The processor against SAM's."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, CLIPTokenizer, SamImageProcessor, SamProcessor

from samclip_hf import SamClipImageProcessor, SamClipProcessor

SIZES = {"size": {"longest_edge": 64}, "pad_size": {"height": 64, "width": 64}}


@pytest.fixture
def tokenizer():
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=16)


@pytest.fixture
def processor(tokenizer):
    return SamClipProcessor(SamClipImageProcessor(**SIZES), tokenizer)


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 100, 3), dtype=np.uint8))


def test_prompts_match_sams_processor(processor, image):
    prompts = {
        "input_points": [[[[10, 20], [99, 49]], [[0, 0], [50, 25]]]],
        "input_labels": [[[1, 0], [1, 1]]],
        "input_boxes": [[[10, 20, 30, 40], [0, 0, 100, 50]]],
    }
    expected = SamProcessor(SamClipImageProcessor(**SIZES))(image, **prompts, return_tensors="pt")
    actual = processor(image, **prompts)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, check_dtype=False)


def test_pads_prompts_and_points(processor, image):
    points = [[[[10, 20]]], [[[10, 20], [30, 40]], [[50, 25]]]]
    inputs = processor([image, image], input_points=points)
    assert inputs["input_points"].shape == (2, 2, 2, 2)
    assert inputs["input_labels"].tolist() == [[[1, -10], [-10, -10]], [[1, 1], [1, -10]]]
    scale = 64 / 100
    torch.testing.assert_close(inputs["input_points"][1, 0, 1], torch.tensor([30 * scale, 40 * scale]))


def test_padded_prompts_give_the_masks_of_single_images(processor, model, image):
    images = [image, image.resize((40, 90))]
    boxes = [[[10, 20, 30, 40]], [[1, 2, 30, 40], [5, 5, 20, 80], [0, 0, 40, 90]]]
    points = [[[[15, 25]]], [[[3, 4]], [[9, 70]], [[20, 20]]]]

    def masks(images, **prompts):
        inputs = processor(images, **prompts)
        with torch.no_grad():
            outputs = model(**inputs)
        sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"], inputs.get("num_prompts")
        return processor.post_process_masks(outputs.pred_masks, *sizes, binarize=False)

    processor.image_processor.mask_size = {"longest_edge": 32}
    for prompts in ({"input_boxes": boxes}, {"input_points": points}):
        together = masks(images, **prompts)
        assert [m.shape for m in together] == [(1, 3, 50, 100), (3, 3, 90, 40)]
        for i, own in enumerate(together):
            alone = masks(images[i], **{name: [value[i]] for name, value in prompts.items()})[0]
            torch.testing.assert_close(own + 0, alone + 0, rtol=0, atol=1e-4 * float(alone.abs().max()))


def test_masks_of_padding_prompts_are_empty(processor, model, image):
    """`post_process_masks` without `num_prompts`, as with SAM's processor, then returns no masks of other objects."""
    processor.image_processor.mask_size = {"longest_edge": 32}
    boxes = [[[10, 20, 30, 40]], [[1, 2, 30, 40], [5, 5, 20, 40]]]
    inputs = processor([image, image], input_boxes=boxes)
    with torch.no_grad():
        outputs = model(**inputs)
        all_prompts = model(**{name: value for name, value in inputs.items() if name != "num_prompts"})
    masks = processor.post_process_masks(outputs.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"])
    assert not masks[0][1].any() and outputs.iou_scores[0, 1].tolist() == [0, 0, 0]
    for name in ("pred_masks", "iou_scores"):
        for image_index, prompt in ((0, 0), (1, 0), (1, 1)):
            assert outputs[name][image_index, prompt].equal(all_prompts[name][image_index, prompt])


def test_three_levels_of_points_match_sams_processor(processor, image):
    sams = SamProcessor(SamImageProcessor.from_dict(processor.image_processor.to_dict()))
    for points, labels in (([[[30, 40], [9, 5]]], [[1, 0]]), (np.array([[[30, 40]]]), None)):
        actual = processor(image, input_points=points, input_labels=labels)
        points = points if isinstance(points, list) else points.tolist()
        expected = sams(image, input_points=points, input_labels=labels, return_tensors="pt")
        assert actual["input_points"].shape == expected["input_points"].shape
        torch.testing.assert_close(actual["input_points"], expected["input_points"].float())
        if labels is not None:
            assert torch.equal(actual["input_labels"], expected["input_labels"])


def test_prompts_are_scaled_to_the_size_of_the_call(processor, image):
    inputs = processor(image, input_points=[[[[100, 50]]]], size={"longest_edge": 32})
    assert inputs["input_points"].flatten().tolist() == [32.0, 16.0]


def test_coordinates_stay_float32_when_inputs_are_cast(processor, image):
    inputs = processor(image, input_points=[[[[99, 33]]]], input_boxes=[[[3, 5, 97, 49]]])
    expected = {name: inputs[name].clone() for name in ("input_points", "input_boxes")}
    for arguments in (("cpu", torch.bfloat16), (torch.bfloat16,), (torch.float64,)):
        cast = inputs.to(*arguments)
        assert cast["pixel_values"].dtype == arguments[-1]
        assert cast["input_points"].dtype == cast["input_boxes"].dtype == torch.float32
        for name, value in expected.items():
            assert cast[name].equal(value)
    assert inputs.to(device="meta", dtype=torch.float16)["input_points"].device.type == "meta"


def test_masks_do_not_depend_on_the_type_of_the_other_inputs(processor, image, model):
    """A box in a bfloat16 model gives the mask of its float32 coordinates."""
    half = model.to(torch.bfloat16)
    inputs = processor(image, input_boxes=[[[61.3, 21.4, 97.2, 41.7]]])
    boxes = inputs["input_boxes"].clone()
    with torch.no_grad():
        actual = half(**inputs.to(torch.bfloat16))
        expected = half(pixel_values=inputs["pixel_values"], input_boxes=boxes)
    assert actual.pred_masks.equal(expected.pred_masks)


def test_points_are_scaled_separately_in_x_and_y(processor):
    image = Image.new("RGB", (20, 33))  # resized to 39 x 64: 1.95 and 1.94 times
    inputs = processor(image, input_points=[[[[20, 33]]]], input_boxes=[[[0, 0, 20, 33]]])
    torch.testing.assert_close(inputs["input_points"][0, 0, 0], torch.tensor([39.0, 64.0]))
    torch.testing.assert_close(inputs["input_boxes"][0, 0], torch.tensor([0.0, 0.0, 39.0, 64.0]))


def test_prompts_have_the_return_type(processor, image):
    inputs = processor(
        [image, image],
        "a",
        input_points=[[[[1, 1]]] * 2, [[[1, 1]]]],
        images_kwargs={"return_tensors": "np"},
        text_kwargs={"return_tensors": "np"},
    )
    assert {type(value) for value in inputs.values()} == {np.ndarray}
    assert inputs["num_prompts"].tolist() == [2, 1]


def test_text_is_tokenized_and_padded(processor, tokenizer, image):
    inputs = processor(image, text=["a cat", "dog"])
    expected = tokenizer(["a cat", "dog"], padding=True, return_tensors="pt")
    assert inputs["input_ids"].equal(expected["input_ids"])
    assert inputs["attention_mask"].equal(expected["attention_mask"])
    assert set(processor(text="a cat")) == {"input_ids", "attention_mask"}


def test_saves_and_loads(processor, image, tmp_path, model):
    processor.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is SamClipProcessor
    for name, value in processor(image, text="a cat", input_points=[[[[3, 4]]]]).items():
        torch.testing.assert_close(loaded(image, text="a cat", input_points=[[[[3, 4]]]])[name], value)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "Pass images, text or both"),
        ({"text": "a", "input_points": [[[[1, 1]]]]}, "Prompts need images"),
        ({"images": 1, "input_points": [[[[1, 51]]]]}, "outside the image, which is 100 wide and 50 high"),
        ({"images": 1, "input_points": [[[[-1, 1]]]]}, "outside the image"),
        ({"images": 1, "input_points": [[[[float("nan"), 1]]]]}, "outside the image"),
        ({"images": 1, "input_boxes": [[[0, 0, 200, 10]]]}, "outside the image"),
        ({"images": 1, "input_boxes": [[[30, 0, 20, 10]]]}, "x1 <= x2"),
        ({"images": 2, "input_points": [[[[1, 1]]]]}, "are for 1 images, but there are 2"),
        (
            {
                "images": 2,
                "input_boxes": [[[0, 0, 1, 1]], [[0, 0, 1, 1]] * 2],
                "input_points": [[[[1, 1]]] * 2, [[[1, 1]]]],
            },
            "must be equal in number",
        ),
        (
            {
                "images": 2,
                "input_boxes": [[[0, 0, 1, 1]] * 2, [[0, 0, 1, 1]]],
                "input_points": [[[[1, 1]]] * 2] * 2,
            },
            "must be equal in number",
        ),
        ({"images": 1, "input_points": [[[[1, 1]]]], "input_boxes": [[[0, 0, 1, 1]] * 2]}, "must be equal in number"),
        ({"images": 1, "input_points": [[[[1, 1]]]], "input_labels": [[[7]]]}, "must be 1, 0 or -1"),
        ({"images": 1, "input_points": [[[[1, 1]]]], "input_labels": [[[0.7]]]}, r"must be 1, 0 or -1, got \[0.7\]"),
        ({"images": 1, "input_points": [[[[60, 10, 50, 3]]]]}, "need x and y, 2 numbers each, got \\[4\\]"),
        ({"images": 1, "input_boxes": [[[10, 10, 50, 50] * 2]]}, "need x1, y1, x2 and y2, 4 numbers each"),
        ({"images": 1, "input_boxes": [[[60, 10, 50]]]}, "4 numbers each"),
        ({"images": 1, "input_boxes": [[["a", 10, 50, 50]]]}, "must be numbers, got 'a'"),
        ({"images": 1, "input_points": [[]]}, "at least one prompt"),
        ({"images": 1, "input_points": [[[[1, 1], 5]]]}, "input_points are nested unevenly"),
        ({"images": 1, "input_boxes": [[[0, 0, 1, 1], 7]]}, "input_boxes are nested unevenly"),
        ({"images": 1, "input_points": [[[[1, 1], [2, 2]]]], "input_labels": [[[1, None]]]}, r"got \[nan\]"),
        ({"images": 1, "input_points": [[[[1, 1]]]], "input_labels": [[[1, 0]]]}, "exactly one label"),
        ({"images": 1, "input_labels": [[[1]]]}, "need input_points"),
        (
            {"images": 1, "input_points": [[10, 20]]},
            r"4 levels, or one less for .*; got 2",
        ),
        ({"images": 1, "input_boxes": [[0, 0, 1, 1]]}, r"three levels.*got 2"),
    ],
)
def test_wrong_input_raises(processor, image, inputs, message):
    if "images" in inputs:
        inputs = inputs | {"images": [image] * inputs["images"]}
    with pytest.raises(ValueError, match=message):
        processor(**inputs)
