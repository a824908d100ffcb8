import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from transformers import AutoImageProcessor, SamImageProcessor, SamImageProcessorPil, SegformerImageProcessor

from samclip_hf import SamClipImageProcessor, SamClipImageProcessorPil
from samclip_hf.image_processing_samclip import MAPS_PER_CHUNK, resize_content
from samclip_hf.segmentation_samclip import SamClipObjectDetectionOutput, SamClipSegmentationOutput

SIZES = {
    "size": {"longest_edge": 64},
    "pad_size": {"height": 64, "width": 64},
    "mask_size": {"longest_edge": 32},
    "mask_pad_size": {"height": 32, "width": 32},
}
BOTH_BACKENDS = pytest.mark.parametrize("processor_class", [SamClipImageProcessor, SamClipImageProcessorPil])


def smooth_image(width, height, seed=0):
    # Smooth, because the backends resample noise differently.
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def test_pixel_values_equal_those_of_sam():
    images = [smooth_image(100, 50), smooth_image(30, 90, seed=1)]
    expected = SamImageProcessor(**SIZES)(images, return_tensors="pt")
    actual = SamClipImageProcessor(**SIZES)(images, return_tensors="pt")
    for name in ("pixel_values", "original_sizes", "reshaped_input_sizes"):
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=0)


def test_backends_agree_to_within_three_of_255_levels():
    images = [smooth_image(100, 50), smooth_image(30, 90, seed=1)]
    torchvision = SamClipImageProcessor(**SIZES)(images, return_tensors="pt")
    pil = SamClipImageProcessorPil(**SIZES)(images, return_tensors="pt")
    assert pil["reshaped_input_sizes"].tolist() == torchvision["reshaped_input_sizes"].tolist()
    difference = (torchvision["pixel_values"] - pil["pixel_values"]).abs()
    assert difference.max() < 3 / 255 / 0.22  # three levels, divided by the smallest standard deviation


@BOTH_BACKENDS
def test_size_argument_also_sets_the_padding(processor_class):
    processor = processor_class(**SIZES)
    inputs = processor(smooth_image(100, 50), size={"longest_edge": 48}, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 48, 48)
    assert inputs["reshaped_input_sizes"].tolist() == [[24, 48]]
    assert not inputs["pixel_values"][0, :, 24:].any()
    assert processor(smooth_image(100, 50), return_tensors="pt")["pixel_values"].shape == (1, 3, 64, 64)


class TestSizes:
    """Everything that takes or assumes a size follows the size of the call."""

    @pytest.mark.parametrize("sizes", [(96, 60), (60, 96), (64, 64), (50, 50)])
    @pytest.mark.parametrize(
        ("own", "call"),
        [
            ({}, {}),
            ({}, {"size": 64}),
            ({}, {"size": 32}),
            ({}, {"size": {"longest_edge": 128}}),
            ({}, {"size": np.int64(128)}),
            ({}, {"size": 128, "pad_size": {"height": 128, "width": 128}}),
            ({"do_resize": False}, {}),
            ({"size": {"longest_edge": 32}}, {}),  # padded to 64
            ({"size": {"longest_edge": 32}}, {"size": 32}),
            ({"size": {"longest_edge": 32}}, {"size": 128}),
            ({"size": {"longest_edge": 32}, "mask_pad_size": {"height": 256, "width": 256}}, {}),
            # A student of 8 px patches with a SAM's image processor, whose patches have 16 px.
            ({"size": {"longest_edge": 256}, "pad_size": {"height": 256, "width": 256}}, {}),
            ({"size": {"longest_edge": 256}, "pad_size": {"height": 256, "width": 256}}, {"size": 64}),
            ({"mask_pad_size": {"height": 256, "width": 256}}, {}),
            ({"mask_pad_size": {"height": 256, "width": 256}}, {"size": 128}),
        ],
    )
    def test_masks_fit_images_of_any_size(self, own, call, sizes):
        if own.get("do_resize") is False:
            sizes = [min(62, side) for side in sizes]
        processor = SamClipImageProcessor(**(SIZES | own))
        inputs = processor([smooth_image(*sizes)] * 2, **call, return_tensors="pt")
        height, width = inputs["pixel_values"].shape[2:]
        masks = torch.randn(2, 3, 1, height // 2, width // 2)  # four cells per patch of 8 px
        expected = SamImageProcessor().post_process_masks(
            masks,
            inputs["original_sizes"],
            inputs["reshaped_input_sizes"],
            binarize=False,
            pad_size={"height": height, "width": width},
        )
        actual = processor.post_process_masks(
            masks, inputs["original_sizes"], inputs["reshaped_input_sizes"], binarize=False
        )
        for own_mask, expected_mask in zip(actual, expected, strict=True):
            torch.testing.assert_close(own_mask + 0, expected_mask, rtol=0, atol=0)

    def test_masks_fit_images_without_padding(self):
        inputs = SamClipImageProcessor(**SIZES)(smooth_image(96, 48), do_pad=False, return_tensors="pt")
        assert inputs["pixel_values"].shape[2:] == (32, 64)
        masks = torch.randn(1, 1, 1, 16, 32)
        sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
        expected = SamImageProcessor().post_process_masks(masks, *sizes, pad_size={"height": 32, "width": 64})[0]
        assert SamClipImageProcessor(**SIZES).post_process_masks(masks, *sizes)[0].equal(expected)

    def test_masks_of_other_images_raise(self):
        with pytest.raises(ValueError, match="16 x 16 do not match images that were resized to 50 x 99"):
            SamClipImageProcessor(**SIZES).post_process_masks(torch.randn(1, 1, 1, 16, 16), [[5, 9]], [[50, 99]])

    @BOTH_BACKENDS
    def test_padding_that_masks_do_not_determine_raises(self, processor_class):
        """Images that one call does not resize are padded like all images, or the whole processor must not resize."""
        processor = processor_class(**SIZES)
        with pytest.raises(ValueError, match=r"32 x 32 pixels.*padded to 64 x 64.*Set do_resize=False in the image"):
            processor(smooth_image(32, 32), do_resize=False)
        for options in ({"do_pad": False}, {"pad_size": {"height": 32, "width": 32}}):
            inputs = processor(smooth_image(32, 32), do_resize=False, **options, return_tensors="pt")
            assert inputs["pixel_values"].shape == (1, 3, 32, 32)

    @BOTH_BACKENDS
    @pytest.mark.parametrize(
        ("call", "message"),
        [
            ({"size": {"height": 64, "width": 64}}, "size must be the longest edge in pixels"),
            ({"size": (64, 64)}, "size must be the longest edge in pixels"),
            ({"size": {"shortest_edge": 64}}, "size must be the longest edge in pixels"),
            ({"size": 64.5}, "size must be the longest edge in pixels"),
            ({"size": 0}, "size must be the longest edge in pixels"),
            ({"size": 32, "pad_size": {"height": 64, "width": 64}}, "Pass size=64 and no pad_size"),
            ({"pad_size": {"height": 128, "width": 128}}, "Pass size=128 and no pad_size"),
            ({"pad_size": {"longest_edge": 64}}, "pad_size must be"),
            ({"size": 32, "do_resize": False}, "no effect with do_resize=False"),
        ],
    )
    def test_other_sizes_raise(self, processor_class, call, message):
        with pytest.raises(ValueError, match=message):
            processor_class(**SIZES)(smooth_image(60, 40), **call)

    @BOTH_BACKENDS
    def test_label_maps_follow_the_size(self, processor_class):
        label_map = (np.arange(50 * 100).reshape(50, 100) // 13).astype(np.int32)
        processor = processor_class(**SIZES)
        for size, edge in ((None, 32), (64, 32), (32, 16), (256, 128)):
            labels = processor(smooth_image(100, 50), label_map, size=size, return_tensors="pt")["labels"]
            assert labels.shape == (1, edge, edge) and (labels[0, edge // 2 :] == 255).all()
            content = labels[0, : edge // 2]
            cell = 100 / edge
            rows, columns = np.mgrid[: edge // 2, :edge] + 0.5
            expected = label_map[(rows * cell).astype(int), (columns * cell).astype(int)]
            assert np.abs(content.numpy() - expected).max() <= (100 * cell + cell) / 13 + 1  # a cell
        labels = processor(smooth_image(100, 50), label_map, size=32, mask_size=48, return_tensors="pt")["labels"]
        assert labels.shape == (1, 48, 48)

    @BOTH_BACKENDS
    def test_label_maps_of_all_types_are_equal_to_sams(self, processor_class):
        image, label_map = smooth_image(60, 40), np.random.default_rng(0).integers(0, 50, (40, 60)).astype(np.uint8)
        sam_class = SamImageProcessorPil if processor_class is SamClipImageProcessorPil else SamImageProcessor
        expected = sam_class(**SIZES)(image, label_map, return_tensors="pt")["labels"][:, :21]  # without padding
        for same in (
            label_map,
            label_map[None],
            label_map[..., None],
            [label_map],
            Image.fromarray(label_map),
            Image.fromarray(label_map, "L").convert("I"),
            torch.from_numpy(label_map),
            label_map.astype(np.int64),
            label_map.astype(np.float64),
        ):
            labels = processor_class(**SIZES)(image, same, return_tensors="pt")["labels"]
            assert labels[:, :21].equal(expected) and (labels[:, 21:] == 255).all()
        large = processor_class(**SIZES)(image, label_map.astype(np.uint16) * 1300, return_tensors="pt")["labels"]
        assert large[:, :21].equal(expected * 1300)

    @BOTH_BACKENDS
    def test_files_of_label_maps_are_rotated_as_those_of_images(self, processor_class, tmp_path):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6
        values = np.random.default_rng(0).integers(0, 5, (40, 40)).astype(np.uint8)
        Image.fromarray(values * 50).convert("RGB").save(tmp_path / "image.png", exif=exif)
        Image.fromarray(values).save(tmp_path / "labels.png", exif=exif)
        upright = np.rot90(values, -1).copy()
        processor = processor_class(**SIZES)
        expected = processor(Image.fromarray(upright * 50).convert("RGB"), upright, return_tensors="pt")
        inputs = processor(tmp_path / "image.png", tmp_path / "labels.png", return_tensors="pt")
        assert inputs["labels"].equal(expected["labels"])
        assert inputs["pixel_values"].equal(expected["pixel_values"])

    @BOTH_BACKENDS
    def test_labels_are_reduced_as_segformers(self, processor_class, tmp_path):
        image, label_map = smooth_image(64, 64), np.arange(64 * 64, dtype=np.int64).reshape(64, 64) // 16
        same = {"size": {"height": 64, "width": 64}}
        expected = SegformerImageProcessor(**same, do_reduce_labels=True)(image, label_map, return_tensors="pt")
        processor_class(**SIZES, do_reduce_labels=True).save_pretrained(tmp_path)
        loaded = processor_class.from_pretrained(tmp_path)
        for maps in (label_map, label_map.astype(np.uint8)):
            labels = loaded(image, maps, mask_size=64, return_tensors="pt")["labels"]
            assert labels.equal(expected["labels"])
            labels = processor_class(**SIZES)(image, maps, mask_size=64, do_reduce_labels=True, return_tensors="pt")
            assert labels["labels"].equal(expected["labels"])
            unchanged = loaded(image, maps, mask_size=64, do_reduce_labels=False, return_tensors="pt")["labels"]
            assert unchanged.equal(torch.from_numpy(label_map)[None])

    @BOTH_BACKENDS
    @pytest.mark.parametrize(
        ("label_map", "message"),
        [
            (np.zeros((40, 59 // 2), dtype=np.uint8), "not the aspect ratio of its image, 40 x 60"),
            (np.zeros((2, 40, 60), dtype=np.uint8), "2 segmentation_maps for 1 images"),
            ([np.zeros((40, 60, 3), dtype=np.uint8)], r"of shape \(height, width\)"),
            (np.full((40, 60), 0.5), "must have integers"),
            (Image.new("RGB", (60, 40)), r"of shape \(height, width\)"),
        ],
    )
    def test_label_maps_that_do_not_match_raise(self, processor_class, label_map, message):
        with pytest.raises(ValueError, match=message):
            processor_class(**SIZES)(smooth_image(60, 40), label_map)


@BOTH_BACKENDS
def test_loads_what_it_saved(processor_class, tmp_path):
    processor_class(**SIZES).save_pretrained(tmp_path)
    backend = "pil" if processor_class is SamClipImageProcessorPil else "torchvision"
    loaded = AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
    assert type(loaded) is processor_class
    assert loaded.size["longest_edge"] == 64 and loaded.pad_size["height"] == 64


@BOTH_BACKENDS
def test_pixel_values_do_not_depend_on_the_type_of_the_image(processor_class):
    image = smooth_image(60, 40)
    pixels = np.asarray(image)
    gray = np.asarray(image.convert("L"))
    image_16_bit = Image.fromarray(gray.astype(np.uint16) * 257)
    assert image_16_bit.mode == "I;16"
    processor = processor_class(**SIZES)

    def pixel_values(image):
        return processor(image, return_tensors="pt")["pixel_values"]

    height, width = pixels.shape[:2]
    alpha = np.full((height, width, 1), 128, dtype=np.uint8)
    channels_first = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    for same in (
        image.convert("RGBA"),
        pixels,
        pixels.astype(np.uint16) * 257,
        pixels.astype(np.int32),
        pixels.astype(np.int64) * 257,
        pixels.astype(">u2") * 257,
        pixels.transpose(2, 0, 1),
        np.concatenate([pixels, alpha], axis=-1),
        np.concatenate([pixels, alpha], axis=-1).transpose(2, 0, 1),
        channels_first,
        channels_first.permute(1, 2, 0),
        channels_first[None],
        torch.from_numpy(pixels.astype(np.uint16) * 257).permute(2, 0, 1),
        [pixels],
        pixels[None],
    ):
        torch.testing.assert_close(pixel_values(same), pixel_values(image), rtol=0, atol=1e-5)
    # The torchvision backend does not round floats while it resizes them, the PIL backend does.
    for same in (
        pixels.astype(np.float32),
        pixels.astype(np.float64) / 255,
        pixels.astype(np.float16),
        pixels.astype(np.float32) * 257,
        channels_first.float() / 255,
        channels_first.bfloat16(),
    ):
        torch.testing.assert_close(pixel_values(same).float(), pixel_values(image), rtol=0, atol=1.5 / 255 / 0.22)
    expected = pixel_values(image.convert("L"))
    for same in (
        gray,
        gray[..., None],
        gray[None],
        np.stack([gray, alpha[..., 0]], axis=-1),
        torch.from_numpy(gray.copy()),
        torch.from_numpy(gray.copy())[None],
        image_16_bit,
        image_16_bit.convert("I"),
        Image.fromarray(gray.astype(">u2") * 257),
        image.convert("LA"),
        image.convert("LA").convert("La"),
    ):
        torch.testing.assert_close(pixel_values(same), expected, rtol=0, atol=1e-5)
    unit = pixel_values(Image.fromarray(gray.astype(np.float32) / 255))
    torch.testing.assert_close(unit, expected, rtol=0, atol=1e-5)
    inside = gray > 128
    expected = pixel_values(Image.fromarray(inside.astype(np.uint8) * 255))
    for same in (inside, torch.from_numpy(inside), Image.fromarray(inside)):
        torch.testing.assert_close(pixel_values(same), expected, rtol=0, atol=1e-5)


@BOTH_BACKENDS
def test_files_of_all_types_are_read_alike(processor_class, tmp_path):
    image, processor = smooth_image(60, 40).convert("L"), processor_class(**SIZES)
    gray = np.asarray(image)
    expected = processor(image, return_tensors="pt")["pixel_values"]
    exif = Image.Exif()
    exif[0x0112] = 6
    image.rotate(90, expand=True).save(tmp_path / "rotated.png", exif=exif)
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "16.png")
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "16.tif")
    Image.fromarray(gray.astype(np.float32) / 255).save(tmp_path / "unit.tif")
    Image.fromarray(gray.astype(np.float32)).save(tmp_path / "float.tif")
    image.save(tmp_path / "animated.png", save_all=True, append_images=[image.rotate(180)])
    for path in tmp_path.iterdir():
        for source in (path, str(path), [str(path)]):
            actual = processor(source, return_tensors="pt")["pixel_values"]
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5, msg=path.name)


@BOTH_BACKENDS
@pytest.mark.parametrize(
    "options", [{}, {"do_normalize": False}, {"do_rescale": False}, {"rescale_factor": 1 / 127.5}]
)
def test_steps_that_are_switched_off_are_left_out(processor_class, options):
    image = smooth_image(64, 64)
    processor = processor_class(**SIZES, **options)
    expected = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].double()
    if processor.do_rescale:
        expected = expected * processor.rescale_factor
    if processor.do_normalize:
        mean, std = (
            torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (processor.image_mean, processor.image_std)
        )
        expected = (expected - mean) / std
    actual = processor(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@BOTH_BACKENDS
@pytest.mark.parametrize("size", [(1, 1), (8000, 50)])
def test_extreme_aspect_ratios_are_resized_and_padded(processor_class, size):
    inputs = processor_class(**SIZES)(Image.new("RGB", size, "red"), return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 64, 64) and inputs["pixel_values"].isfinite().all()


@BOTH_BACKENDS
@pytest.mark.parametrize(
    "image, message",
    [
        ([], "list of images is empty"),
        (np.zeros((0, 5, 3), dtype=np.uint8), "no pixels"),
        (Image.new("RGB", (0, 5)), "no pixels"),
        (np.full((5, 5, 3), np.nan, dtype=np.float32), "not finite"),
        (torch.full((3, 5, 5), torch.inf), "not finite"),
        (Image.fromarray(np.full((5, 5), np.nan, dtype=np.float32)), "not finite"),
        (np.full((5, 5, 3), -1.0), "values from -1 to -1"),
        (np.full((5, 5, 3), -1), "values from -1 to -1"),
        (Image.fromarray(np.full((5, 5), 70000, dtype=np.int32)), "values from 70000 to 70000"),
        (np.full((5, 5, 3), "a"), "numbers as pixels"),
        (np.zeros((5, 5, 3), dtype=np.complex64), "numbers as pixels"),
        (np.zeros((5, 5, 7), dtype=np.uint8), "1, 3 or 4 channels"),
        (np.zeros(5, dtype=np.uint8), "two or three axes"),
        (3, "An image must be a PIL image"),
        ("missing.png", "missing.png"),
    ],
)
def test_invalid_images_raise_an_error(processor_class, image, message):
    with pytest.raises(ValueError, match=message):
        processor_class(**SIZES)(image)


@BOTH_BACKENDS
def test_normalized_images_can_be_passed(processor_class):
    image = torch.randn(3, 64, 64)
    inputs = processor_class(**SIZES)(
        image, do_resize=False, do_rescale=False, do_normalize=False, return_tensors="pt"
    )
    assert torch.equal(inputs["pixel_values"][0], image)


class TestSemanticSegmentation:
    def outputs(self, logits, content_sizes):
        no_background = torch.full((len(logits),), -1)
        return SamClipSegmentationOutput(
            logits=logits, content_sizes=torch.tensor(content_sizes), background_label_ids=no_background
        )

    def test_equals_argmax_of_resized_logits_without_padding(self):
        logits = torch.randn(1, 5, 8, 8)
        resized = torch.nn.functional.interpolate(logits, size=(20, 28), mode="bilinear", align_corners=False)
        maps = SamClipImageProcessor(**SIZES).post_process_semantic_segmentation(
            self.outputs(logits, [[8.0, 8.0]]), [(20, 28)]
        )
        assert maps[0].equal(resized[0].argmax(dim=0))

    def test_result_does_not_depend_on_chunks(self):
        logits = torch.randn(2, 3 * MAPS_PER_CHUNK + 1, 4, 4)
        maps = SamClipImageProcessor(**SIZES).post_process_semantic_segmentation(
            self.outputs(logits, [[4.0, 4.0], [4.0, 4.0]])
        )
        assert torch.stack(maps).equal(logits.argmax(dim=1))

    def test_padding_is_removed_before_resizing(self):
        logits = torch.zeros(1, 2, 4, 4)
        logits[0, 1, :, 3] = 100.0  # in the padding only
        maps = SamClipImageProcessor(**SIZES).post_process_semantic_segmentation(
            self.outputs(logits, [[4.0, 2.0]]), [(40, 20)]
        )
        assert maps[0].shape == (40, 20) and not maps[0].any()

    def test_wrong_number_of_target_sizes_raises_an_error(self):
        with pytest.raises(ValueError, match="2 target_sizes for 1 images"):
            SamClipImageProcessor(**SIZES).post_process_semantic_segmentation(
                self.outputs(torch.zeros(1, 2, 4, 4), [[4.0, 4.0]]), [(4, 4), (4, 4)]
            )

    def test_content_size_may_be_a_fraction_of_a_cell(self):
        ramp = torch.arange(8.0).expand(1, 8, 8).contiguous()
        resized = resize_content(ramp, (8, 5.5), (8, 11))[0, 0]
        expected = (torch.arange(11) + 0.5) * 0.5 - 0.5
        torch.testing.assert_close(resized, expected.clamp_min(0))


class TestSegments:
    """Segments on a grid of 4 x 4 patches, with masks of 16 x 16 cells."""

    processor = SamClipImageProcessor(**SIZES)

    def outputs(self, masks, probabilities, scores, background=None):
        return SamClipSegmentationOutput(
            logits=torch.randn(1, len(probabilities[0]), 4, 4),
            segment_masks=torch.stack(list(masks))[None],
            segment_logits=torch.tensor(probabilities).log()[None],
            segment_scores=torch.tensor(scores)[None],
            content_sizes=torch.tensor([[4.0, 4.0]]),
            background_label_ids=torch.tensor([-1 if background is None else background]),
        )

    def columns(self, start, stop):
        mask = torch.full((16, 16), -4.0)
        mask[:, start:stop] = 4.0
        return mask

    @pytest.mark.parametrize("background", [None, 2])
    def test_semantic_labels_are_those_of_the_best_segment(self, background):
        num_segments = 2 * MAPS_PER_CHUNK + 3
        scores = torch.rand(num_segments)
        scores[5] = 0  # an empty segment
        masks = torch.randn(num_segments, 16, 16) - 2
        outputs = self.outputs(masks, torch.rand(num_segments, 5).tolist(), scores.tolist(), background)
        label_map = self.processor.post_process_semantic_segmentation(outputs)[0]
        labels = outputs.segment_logits[0].argmax(dim=-1)
        clip_head_map = self.processor.post_process_semantic_segmentation(
            SamClipSegmentationOutput(
                logits=outputs.logits, content_sizes=outputs.content_sizes, background_label_ids=torch.tensor([-1])
            ),
            [(16, 16)],
        )[0]
        uncovered = 0
        for y in range(16):
            for x in range(16):
                inside = [k for k in range(num_segments) if masks[k, y, x] > 0 and scores[k] > 0]
                if inside:
                    best = max(inside, key=lambda k: masks[k, y, x].sigmoid() * scores[k])
                    assert label_map[y, x] == labels[best]
                else:
                    assert label_map[y, x] == (clip_head_map[y, x] if background is None else background)
                    uncovered += 1
        assert 0 < uncovered < 256

    def test_panoptic_segments_do_not_overlap_and_the_better_mask_wins(self):
        outputs = self.outputs(
            [self.columns(0, 8), self.columns(6, 16)], [[0.1, 0.6, 0.3], [0.1, 0.1, 0.8]], [0.7, 0.9], background=0
        )
        result = self.processor.post_process_panoptic_segmentation(
            outputs, overlap_mask_area_threshold=0.5, target_sizes=[(32, 32)]
        )[0]
        assert result["segmentation"].dtype == torch.int32
        assert result["segmentation"].tolist() == [[1] * 12 + [2] * 20] * 32
        labels, scores = zip(*((s["label_id"], s["score"]) for s in result["segments_info"]), strict=True)
        assert labels == (1, 2) and scores == pytest.approx((0.6, 0.8))
        # The first segment keeps six of its eight columns, less than the default threshold.
        result = self.processor.post_process_panoptic_segmentation(outputs, overlap_mask_area_threshold=0.8)[0]
        assert result["segmentation"].tolist() == [[0] * 6 + [1] * 10] * 16

    def test_low_scores_and_background_are_removed(self):
        outputs = self.outputs(
            [self.columns(0, 8), self.columns(6, 10), self.columns(10, 16)],
            [[0.1, 0.6, 0.3], [0.2, 0.4, 0.4], [0.8, 0.1, 0.1]],
            [0.7, 0.9, 0.9],
            background=0,
        )
        result = self.processor.post_process_panoptic_segmentation(outputs)[0]
        assert result["segmentation"].tolist() == [[1] * 8 + [0] * 8] * 16
        result = self.processor.post_process_panoptic_segmentation(outputs, threshold=0.7)[0]
        assert not result["segmentation"].any() and result["segments_info"] == []

    def test_mask_contains_pixels_above_the_mask_threshold(self):
        outputs = self.outputs([torch.linspace(-1.5, 1.5, 16).expand(16, 16).logit(eps=1e-3)], [[0.1, 0.9]], [1.0])
        probability = outputs.segment_masks[0, 0].sigmoid()
        for threshold in (0.3, 0.5, 0.9):
            result = self.processor.post_process_instance_segmentation(outputs, mask_threshold=threshold)[0]
            assert torch.equal(result["segmentation"] == 1, probability > threshold)

    def test_only_labels_to_fuse_are_merged(self):
        outputs = self.outputs(
            [self.columns(0, 4), self.columns(6, 10), self.columns(12, 16)],
            [[0.1, 0.9], [0.2, 0.8], [0.9, 0.1]],
            [0.7] * 3,
        )
        instances = self.processor.post_process_instance_segmentation(outputs)[0]
        assert [s["label_id"] for s in instances["segments_info"]] == [1, 1, 0]
        assert [s["id"] for s in instances["segments_info"]] == [1, 2, 3]
        fused = self.processor.post_process_panoptic_segmentation(outputs, label_ids_to_fuse={1})[0]
        assert fused["segmentation"][0].tolist() == [1] * 4 + [0] * 2 + [1] * 4 + [0] * 2 + [2] * 4
        assert [(s["label_id"], s["was_fused"]) for s in fused["segments_info"]] == [(1, True), (0, False)]
        assert fused["segments_info"][0]["score"] == pytest.approx(0.9)

    def test_panoptic_segmentation_requires_both_heads(self):
        outputs = SamClipSegmentationOutput(logits=torch.zeros(1, 2, 4, 4), content_sizes=torch.tensor([[4.0, 4.0]]))
        with pytest.raises(ValueError, match="both_heads=True"):
            self.processor.post_process_panoptic_segmentation(outputs)

    def test_boxes_enclose_their_masks_in_descending_order_of_scores(self):
        outputs = SamClipObjectDetectionOutput(
            logits=torch.zeros(1, 2, 4, 4),
            segment_masks=torch.stack([self.columns(0, 4), self.columns(6, 10), self.columns(12, 16)])[None],
            content_sizes=torch.tensor([[4.0, 4.0]]),
            object_scores=torch.tensor([[0.3, 0.05, 0.8]]),
        )
        result = self.processor.post_process_object_detection(outputs, target_sizes=[(32, 64)])[0]
        assert result["scores"].tolist() == pytest.approx([0.8, 0.3])
        assert result["boxes"].tolist() == [[48, 0, 64, 32], [0, 0, 16, 32]]
        assert result["labels"].tolist() == [0, 0]
        no_boxes = self.processor.post_process_object_detection(outputs, threshold=0.9)[0]
        assert no_boxes["boxes"].shape == (0, 4) and no_boxes["scores"].shape == (0,)
