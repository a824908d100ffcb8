"""Everything mode through the stock pipeline: SAM-CLIP gives what SAM gives, with the weights of SAM."""

import inspect

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image
from pycocotools import mask as coco
from transformers import MaskGenerationPipeline, SamImageProcessor, SamImageProcessorPil, SamModel, pipeline

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
    decode_mask,
    encode_mask,
    mask_to_box,
)
from samclip_hf.miniature.scenes import render

# Low thresholds, so that many masks are compared.
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
    for ours, run_lengths, stock, stock_run_lengths in masks:
        assert type(ours) is type(stock) and ours.dtype == stock.dtype and ours.shape == stock.shape
        ours, stock = np.asarray(ours), np.asarray(stock)
        # Both encoders and both ways of resizing agree to float rounding: a pixel of thousands may fall either way.
        assert (ours ^ stock).sum() <= 5e-4 * stock.sum()
        assert np.array_equal(decode_mask(run_lengths), ours)
        if np.array_equal(ours, stock):
            assert run_lengths == stock_run_lengths


# Before that, SAM's own image processor stacks crops of different sizes, and fails.
stacks_no_crops = pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="SAM's crops fail")


@pytest.mark.parametrize("crops_n_layers", [0, pytest.param(1, marks=stacks_no_crops)])
def test_masks_scores_boxes_and_run_lengths_are_sams(sam, samclip, image, crops_n_layers):
    options = {"crops_n_layers": crops_n_layers, "points_per_crop": 6 - 2 * crops_n_layers}
    expected = generate(sam, SamImageProcessor, image, **options)
    assert_same(generate(samclip, SamClipImageProcessor, image, **options), expected)


@pytest.mark.parametrize("size", [(100, 310), (40, 30)], ids=["tall", "smaller than the model's masks"])
def test_any_size(sam, samclip, image, size):
    image = image.resize(size)
    assert_same(generate(samclip, SamClipImageProcessor, image), generate(sam, SamImageProcessor, image), min_masks=2)


def test_pil_image_processor_gives_the_same(sam, samclip, image):
    expected = generate(sam, SamImageProcessorPil, image)
    assert_same(generate(samclip, SamClipImageProcessorPil, image), expected)


def test_other_thresholds(sam, samclip, image):
    for options in (
        {"mask_threshold": 0.3, "stability_score_offset": 0.5},
        {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "crops_nms_thresh": 0.8},
    ):
        expected = generate(sam, SamImageProcessor, image, **options)
        assert_same(generate(samclip, SamClipImageProcessor, image, **options), expected)


def test_no_mask_is_good_enough(samclip, image):
    output = generate(samclip, SamClipImageProcessor, image, pred_iou_thresh=2.0)
    assert output["masks"] == [] and output["rle_mask"] == []
    assert output["scores"].shape == (0,) and output["bounding_boxes"].shape == (0, 4)


def test_shipped_checkpoint_is_served_by_task_and_without_a_complaint(image, complaints):
    generator = pipeline("mask-generation", model=miniature.checkpoint())
    output = generator(image, **OPTIONS)
    assert not complaints.records
    assert type(generator.model) is SamClipModel
    direct = generate(SamClipModel.from_pretrained(miniature.checkpoint()).eval(), SamClipImageProcessor, image)
    assert_same(output, direct)


class TestUpsampledMasks:
    """Logits at the image's size are computed on first use; nobody can tell."""

    sizes = [(40, 50)], [(51, 64)]

    def real_and_deferred(self):
        masks = torch.randn(1, 2, 3, 16, 16)
        masks[:, 0] *= 10  # steady; the others are not
        real = SamImageProcessor(**SIZES).post_process_masks(masks, *self.sizes, binarize=False)[0]
        return real, SamClipImageProcessor(**SIZES).post_process_masks(masks, *self.sizes, binarize=False)[0]

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
    def test_any_use_sees_the_real_tensor(self, use):
        real, deferred = self.real_and_deferred()
        assert type(deferred) is UpsampledMasks and isinstance(deferred, torch.Tensor)
        actual = use(deferred)
        assert type(actual) is torch.Tensor and actual.equal(use(real))

    def test_changes_in_place_stay_and_count(self):
        real, deferred = self.real_and_deferred()
        for masks in (real, deferred):
            masks[:, 0] = -5.0
            masks += 1
        assert deferred.equal(real)
        _, deferred = self.real_and_deferred()
        deferred[:] = -5.0
        image_processor = SamClipImageProcessor(**SIZES)
        assert image_processor.filter_masks(deferred, torch.ones(2, 3), (40, 50), [0, 0, 50, 40])[0] == []

    def test_real_tensors_are_filtered_as_well(self):
        real, deferred = self.real_and_deferred()
        arguments = (torch.ones(2, 3), (40, 50), torch.tensor([0, 0, 50, 40]), 0.5, 0.5)
        image_processor = SamClipImageProcessor(**SIZES)
        expected = image_processor.filter_masks(real, *arguments)
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

    def test_scores_of_other_masks_are_refused(self):
        _, deferred = self.real_and_deferred()
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
def test_masks_survive_encoding_and_pycocotools_reads_them(mask, counts):
    encoding = encode_mask(mask)
    assert encoding == {"size": list(mask.shape), "counts": counts}
    assert np.array_equal(decode_mask(encoding), mask)
    compressed = coco.frPyObjects(encoding, *mask.shape)
    assert compressed == coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    left, top, width, height = coco.toBbox(compressed).astype(int).tolist()
    assert mask_to_box(mask) == ((left, top, left + width, top + height) if mask.any() else None)


def test_counts_that_do_not_match_the_size_raise_an_error():
    with pytest.raises(ValueError, match="mask of 2 x 3 pixels add up to 5"):
        decode_mask({"size": [2, 3], "counts": [2, 3]})


def test_suppression_without_torchvision_equals_torchvisions(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    corners = torch.randint(0, 12, (400, 2, 2), generator=generator).sort(dim=1).values  # empty boxes among them
    boxes = corners.flatten(1).float()
    scores = torch.randint(0, 30, (400,), generator=generator) / 30  # ties among them
    for max_iou in (0.0, 0.25, 0.5, 0.7, 0.97, 1.0):  # 0.25 and 0.5 are exact IoUs of some boxes
        expected = mask_generation_samclip._suppress_overlaps(boxes, scores, max_iou)
        with monkeypatch.context() as patch:
            patch.setattr(mask_generation_samclip, "is_torchvision_available", lambda: False)
            patch.delattr(mask_generation_samclip, "nms")
            actual = mask_generation_samclip._suppress_overlaps(boxes, scores, max_iou)
        assert actual == expected


def test_defaults_are_the_stock_pipelines():
    def default(function, name):
        return inspect.signature(function).parameters[name].default

    stock = MaskGenerationPipeline.preprocess, SamImageProcessor.filter_masks, MaskGenerationPipeline.postprocess
    assert {
        "points_per_crop": default(stock[0], "points_per_crop"),
        "pred_iou_thresh": default(stock[1], "pred_iou_thresh"),
        "stability_score_thresh": default(stock[1], "stability_score_thresh"),
        "crops_nms_thresh": default(stock[2], "crops_nms_thresh"),
    } == MASK_GENERATION_DEFAULTS
