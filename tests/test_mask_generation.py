"""Mask generation with the stock pipeline equals that of SAM, and masks can be encoded and decoded."""

import inspect

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image
from pycocotools import mask as coco
from transformers import MaskGenerationPipeline, SamImageProcessor, SamImageProcessorPil, SamModel, pipeline
from transformers.utils import is_torchvision_available

from samclip_hf import (
    SamClipImageProcessor,
    SamClipImageProcessorPil,
    SamClipModel,
    mask_generation_samclip,
    miniature,
)
from samclip_hf.mask_generation_samclip import (
    MASK_GENERATION_DEFAULTS,
    UpsampledMasks,
    decode_rle,
    encode_rle,
    encode_window,
    mask_to_box,
    rle_iou,
)
from samclip_hf.miniature.scenes import render

# Low thresholds, to compare many masks.
OPTIONS = {
    "points_per_crop": 6,
    "points_per_batch": 10,
    "pred_iou_thresh": 0.4,
    "stability_score_thresh": 0.2,
    "crops_nms_thresh": 0.95,
    "output_rle_mask": True,
    "output_bboxes_mask": True,
}
SIZES = {"size": {"longest_edge": 64}, "pad_size": {"height": 64, "width": 64}}


@pytest.fixture(scope="module")
def sam():
    return SamModel.from_pretrained(miniature.sam_teacher()).eval()


@pytest.fixture(scope="module")
def samclip(sam):
    return SamClipModel.from_teachers(sam, miniature.clip_teacher()).eval()


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(render(seed=0, index=8).image).resize((210, 140))


def generate(model, image_processor_class, image, **options):
    image_processor = image_processor_class.from_pretrained(miniature.sam_teacher())
    return MaskGenerationPipeline(model=model, image_processor=image_processor)(image, **OPTIONS | options)


def assert_same(actual, expected, min_masks=5):
    assert len(expected["masks"]) >= min_masks
    torch.testing.assert_close(actual["scores"], expected["scores"])
    torch.testing.assert_close(actual["bounding_boxes"], expected["bounding_boxes"], check_dtype=False)
    masks = zip(actual["masks"], actual["rle_mask"], expected["masks"], expected["rle_mask"], strict=True)
    for mask, encoding, expected_mask, expected_encoding in masks:
        assert type(mask) is type(expected_mask)
        assert mask.dtype == expected_mask.dtype and mask.shape == expected_mask.shape
        mask, expected_mask = np.asarray(mask), np.asarray(expected_mask)
        # Rounding differs in the encoder and in resizing, so that single pixels at the threshold may differ.
        assert (mask ^ expected_mask).sum() <= 5e-4 * expected_mask.sum()
        assert np.array_equal(decode_rle(encoding), mask)
        if np.array_equal(mask, expected_mask):
            assert encoding == expected_encoding


crops_work_in_sam = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="SAM's image processor fails on crops of several sizes"
)


@pytest.mark.parametrize("crops_n_layers", [0, pytest.param(1, marks=crops_work_in_sam)])
def test_masks_scores_boxes_and_encodings_equal_those_of_sam(sam, samclip, image, crops_n_layers):
    options = {"crops_n_layers": crops_n_layers, "points_per_crop": 6 - 2 * crops_n_layers}
    expected = generate(sam, SamImageProcessor, image, **options)
    assert_same(generate(samclip, SamClipImageProcessor, image, **options), expected)


@pytest.mark.parametrize("size", [(100, 310), (40, 30)], ids=["tall", "smaller than the model's masks"])
def test_images_of_other_sizes(sam, samclip, image, size):
    image = image.resize(size)
    assert_same(generate(samclip, SamClipImageProcessor, image), generate(sam, SamImageProcessor, image), min_masks=2)


def test_pil_image_processor(sam, samclip, image):
    expected = generate(sam, SamImageProcessorPil, image)
    assert_same(generate(samclip, SamClipImageProcessorPil, image), expected)


def test_other_thresholds(sam, samclip, image):
    for options in (
        {"mask_threshold": 0.3, "stability_score_offset": 0.5},
        {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "crops_nms_thresh": 0.8},
    ):
        expected = generate(sam, SamImageProcessor, image, **options)
        assert_same(generate(samclip, SamClipImageProcessor, image, **options), expected)


def test_no_mask_passes_the_thresholds(samclip, image):
    output = generate(samclip, SamClipImageProcessor, image, pred_iou_thresh=2.0)
    assert output["masks"] == [] and output["rle_mask"] == []
    assert output["scores"].shape == (0,) and output["bounding_boxes"].shape == (0, 4)


def test_pipeline_loads_the_shipped_checkpoint_without_warnings(image, transformers_log):
    generator = pipeline("mask-generation", model=miniature.checkpoint())
    output = generator(image, **OPTIONS)
    assert not transformers_log.records
    assert type(generator.model) is SamClipModel
    direct = generate(SamClipModel.from_pretrained(miniature.checkpoint()).eval(), SamClipImageProcessor, image)
    assert_same(output, direct)


@pytest.mark.parametrize("deferred", [True, False])
@pytest.mark.parametrize("processor_class", [SamClipImageProcessor, SamClipImageProcessorPil])
def test_empty_masks_are_dropped(processor_class, deferred):
    processor = processor_class(**SIZES)
    masks = torch.full((1, 4, 3, 32, 32), -5.0)
    masks[0, 1, 2, 4:9, 6:8] = 5.0
    masks[0, 3, 0, :, :] = 5.0
    upsampled = processor.post_process_masks(masks, [(64, 64)], [(64, 64)], binarize=False)[0]
    upsampled = upsampled if deferred else upsampled + 0
    scores = torch.arange(12).view(4, 3) / 12
    encodings, kept_scores, boxes = processor.filter_masks(upsampled, scores, (64, 64), [0, 0, 64, 64], 0.0, 0.0)
    assert [decode_rle(encoding).any() for encoding in encodings] == [True, True]
    assert kept_scores.tolist() == [scores[1, 2], scores[3, 0]]
    assert boxes[1].tolist() == [0, 0, 63, 63]


@pytest.mark.parametrize("pixels", [1, 40, 10_000])
def test_masks_are_encoded_in_parts_as_pycocotools_does(monkeypatch, pixels):
    monkeypatch.setattr(mask_generation_samclip, "ENCODED_PIXELS", pixels)
    rng = np.random.default_rng(0)
    for window, left, top in ((rng.random((5, 9)) > 0.5, 3, 2), (np.ones((13, 17), dtype=bool), 0, 0)):
        mask = np.zeros((13, 17), dtype=bool)
        mask[top : top + window.shape[0], left : left + window.shape[1]] = window
        encoding = encode_window(window, left, top, 13, 17)
        assert coco.frPyObjects(encoding, 13, 17) == coco.encode(np.asfortranarray(mask, dtype=np.uint8))


def test_iou_of_run_length_encodings_equals_that_of_pycocotools():
    rng = np.random.default_rng(0)
    masks = [rng.random((13, 17)) > threshold for threshold in (0.1, 0.5, 0.9)]
    masks += [np.zeros((13, 17), dtype=bool), np.ones((13, 17), dtype=bool)]
    encoded = [coco.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in masks]
    expected = coco.iou(encoded, encoded, [False] * len(encoded))
    expected[3] = expected[:, 3] = 0  # of an empty mask
    actual = [[rle_iou(encode_rle(one), encode_rle(other)) for other in masks] for one in masks]
    np.testing.assert_allclose(actual, expected)


def test_equal_masks_of_one_row_or_column_are_duplicates():
    masks = np.zeros((5, 4, 6), dtype=bool)
    masks[:2, 1, 2:5] = masks[2, :3, 3] = masks[3:, 2, 2] = True
    boxes = torch.tensor([[2, 1, 4, 1], [2, 1, 4, 1], [3, 0, 3, 2], [2, 2, 2, 2], [2, 2, 2, 2]])
    scores = torch.tensor([0.5, 0.9, 0.8, 0.7, 0.6])
    kept, kept_scores, _, _ = SamClipImageProcessor(**SIZES).post_process_for_mask_generation(
        [encode_rle(mask) for mask in masks], scores, boxes, 0.7
    )
    assert kept_scores.tolist() == pytest.approx([0.9, 0.8, 0.7])
    assert [mask.numpy().tolist() for mask in kept] == [masks[index].tolist() for index in (1, 2, 3)]


class TestUpsampledMasks:
    """Logits at the size of the image, computed on first use. Every operation behaves as on the full tensor."""

    sizes = [(40, 50)], [(51, 64)]

    def full_and_deferred(self):
        masks = torch.randn(1, 2, 3, 16, 16)
        masks[:, 0] *= 10  # stable, unlike the other masks
        full = SamImageProcessor(**SIZES).post_process_masks(masks, *self.sizes, binarize=False)[0]
        return full, SamClipImageProcessor(**SIZES).post_process_masks(masks, *self.sizes, binarize=False)[0]

    @pytest.mark.parametrize(
        "use",
        [
            lambda masks: masks > 0,
            lambda masks: masks[0, 1:].flatten(0, 1),
            lambda masks: torch.cat([masks, masks]),
            lambda masks: torch.zeros(masks.shape).copy_(masks),
            lambda masks: torch.nn.functional.interpolate(masks, (5, 7)),
            lambda masks: torch.tensor(masks.tolist()),
            lambda masks: torch.from_numpy(np.asarray(masks)),
            lambda masks: torch.as_tensor(masks) + 0,
            lambda masks: masks.clone(),
        ],
    )
    def test_operations_run_on_the_full_tensor(self, use):
        full, deferred = self.full_and_deferred()
        assert type(deferred) is UpsampledMasks and isinstance(deferred, torch.Tensor)
        actual = use(deferred)
        assert type(actual) is torch.Tensor and actual.equal(use(full))

    def test_in_place_changes_persist(self):
        full, deferred = self.full_and_deferred()
        for masks in (full, deferred):
            masks[:, 0] = -5.0
            masks += 1
        assert deferred.equal(full)
        _, deferred = self.full_and_deferred()
        deferred[:] = -5.0
        image_processor = SamClipImageProcessor(**SIZES)
        assert image_processor.filter_masks(deferred, torch.ones(2, 3), (40, 50), [0, 0, 50, 40])[0] == []

    def test_full_tensors_can_be_filtered(self):
        full, deferred = self.full_and_deferred()
        arguments = (torch.ones(2, 3), (40, 50), torch.tensor([0, 0, 50, 40]), 0.5, 0.5)
        image_processor = SamClipImageProcessor(**SIZES)
        expected = image_processor.filter_masks(full, *arguments)
        actual = image_processor.filter_masks(deferred, *arguments)
        assert len(expected[0]) == 3 and actual[0] == expected[0]
        assert actual[1].equal(expected[1]) and actual[2].equal(expected[2])

    def test_binary_masks_and_gradients_are_not_deferred(self):
        image_processor = SamClipImageProcessor(**SIZES)
        masks = torch.randn(1, 2, 3, 16, 16, requires_grad=True)
        upsampled = image_processor.post_process_masks(masks, *self.sizes, binarize=False)[0]
        assert type(upsampled) is torch.Tensor
        upsampled.sum().backward()
        assert masks.grad.any()
        binary = image_processor.post_process_masks(masks.detach(), *self.sizes)[0]
        assert type(binary) is torch.Tensor and binary.equal(upsampled > 0)

    def test_wrong_number_of_scores_raises_an_error(self):
        _, deferred = self.full_and_deferred()
        with pytest.raises(ValueError, match="4 iou_scores for 6 masks"):
            SamClipImageProcessor(**SIZES).filter_masks(deferred, torch.ones(2, 2), (40, 50), [0, 0, 50, 40])


@pytest.mark.parametrize(
    ("mask", "counts"),
    [
        (np.zeros((3, 4), dtype=bool), [12]),
        (np.ones((3, 4), dtype=bool), [0, 12]),
        (np.eye(3, 4, dtype=bool), [0, 1, 3, 1, 3, 1, 3]),
        (np.array([[True, False], [True, True]]), [0, 2, 1, 1]),
    ],
)
def test_encoded_masks_decode_to_themselves_and_in_pycocotools(mask, counts):
    encoding = encode_rle(mask)
    assert encoding == {"size": list(mask.shape), "counts": counts}
    assert np.array_equal(decode_rle(encoding), mask)
    compressed = coco.frPyObjects(encoding, *mask.shape)
    assert compressed == coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    left, top, width, height = coco.toBbox(compressed).astype(int).tolist()
    assert mask_to_box(mask) == ((left, top, left + width, top + height) if mask.any() else None)


def test_counts_that_do_not_match_the_size_raise_an_error():
    with pytest.raises(ValueError, match="mask of 2 x 3 pixels add up to 5"):
        decode_rle({"size": [2, 3], "counts": [2, 3]})


@pytest.mark.skipif(not is_torchvision_available(), reason="torchvision is not installed")
def test_suppression_without_torchvision_equals_that_of_torchvision(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    corners = torch.randint(0, 12, (400, 2, 2), generator=generator).sort(dim=1).values  # some boxes are empty
    boxes = corners.flatten(1).float()
    scores = torch.randint(0, 30, (400,), generator=generator) / 30  # with ties
    for max_iou in (0.0, 0.25, 0.5, 0.7, 0.97, 1.0):  # some are exact IoUs of boxes
        expected = mask_generation_samclip._suppress_overlaps(boxes, scores, max_iou)
        with monkeypatch.context() as patch:
            patch.setattr(mask_generation_samclip, "is_torchvision_available", lambda: False)
            patch.delattr(mask_generation_samclip, "nms")
            actual = mask_generation_samclip._suppress_overlaps(boxes, scores, max_iou)
        assert actual == expected


def test_defaults_equal_those_of_the_stock_pipeline():
    def default(function, name):
        return inspect.signature(function).parameters[name].default

    stock = MaskGenerationPipeline.preprocess, SamImageProcessor.filter_masks, MaskGenerationPipeline.postprocess
    assert {
        "points_per_crop": default(stock[0], "points_per_crop"),
        "pred_iou_thresh": default(stock[1], "pred_iou_thresh"),
        "stability_score_thresh": default(stock[1], "stability_score_thresh"),
        "crops_nms_thresh": default(stock[2], "crops_nms_thresh"),
    } == MASK_GENERATION_DEFAULTS
