"""Opening images, boxes and run lengths of masks, normalization."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from samclip_hf import SamClipImageProcessor, image_processing_samclip
from samclip_hf.images import (
    RunLengthMask,
    convert_to_rgb,
    decode_mask,
    encode_mask,
    mask_to_box,
    mask_to_coco_box,
    mask_to_prompt_box,
    mean_and_std,
    normalize,
    open_image,
)


def encoded(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def gradient(width: int = 6, height: int = 4) -> Image.Image:
    pixels = (np.arange(width * height * 3) % 251).astype(np.uint8).reshape(height, width, 3)
    return Image.fromarray(pixels)


def rotated(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(gradient(), format="PNG", exif=exif)


class TestOpenImage:
    def test_a_path_bytes_and_an_open_file_give_the_same_image(self, tmp_path):
        content = encoded(gradient(), format="PNG")
        path = tmp_path / "image.png"
        path.write_bytes(content)
        with open(path, "rb") as file:
            images = [open_image(path), open_image(str(path)), open_image(content), open_image(file)]
        assert all(np.array_equal(np.asarray(image), np.asarray(gradient())) for image in images)

    def test_the_exif_orientation_is_applied_by_default(self):
        image = open_image(rotated(6))
        assert np.array_equal(np.asarray(image), np.rot90(np.asarray(gradient()), -1))

    def test_the_exif_orientation_can_be_ignored(self):
        assert np.array_equal(np.asarray(open_image(rotated(6), apply_orientation=False)), np.asarray(gradient()))

    def test_more_pixels_than_accepted_raise_before_decoding(self):
        content = encoded(gradient(600, 400), format="PNG")[:200]  # truncated
        with pytest.raises(Image.DecompressionBombError, match="600 x 400 pixels, more than 239999"):
            open_image(content, max_pixels=239_999)
        with pytest.raises(OSError, match="truncated"):
            open_image(content, max_pixels=240_000)

    def test_other_formats_than_accepted_raise(self):
        content = encoded(gradient(), format="PNG")
        assert open_image(content, formats=["PNG"]).size == (6, 4)
        with pytest.raises(Image.UnidentifiedImageError):
            open_image(content, formats=["JPEG"])


class TestConvertToRgb:
    @pytest.mark.parametrize("mode", sorted({*Image.MODES} - {"LAB"}))
    def test_every_mode_becomes_rgb(self, mode):
        gray = gradient().convert("L")
        if mode.startswith("I;16"):
            image = Image.frombytes(mode, gray.size, (np.asarray(gray) * np.uint16(257)).tobytes())
        elif mode in ("I", "F"):
            image = gray.convert(mode)
        else:
            path = {"La": ("LA", "La"), "RGBa": ("RGBA", "RGBa"), "PA": ("P", "PA")}.get(mode, (mode,))
            image = gray
            for step in path:
                image = image.convert(step)
        assert image.mode == mode
        expected = np.asarray(gray.point(lambda value: 255 * (value > 127))) if mode == "1" else np.asarray(gray)
        if mode == "1":
            image = gray.convert("1", dither=Image.Dither.NONE)
        converted = convert_to_rgb(image)
        assert (converted.mode, converted.size) == ("RGB", (6, 4))
        assert np.abs(np.asarray(converted).astype(int) - expected[..., None]).max() <= 3  # YCbCr and HSV round

    def test_the_onnx_example_reads_16_bits_alike(self, monkeypatch):
        pytest.importorskip("onnxruntime", reason="needs the extra `export`")
        monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
        from onnx_segmentation import to_rgb

        gray = Image.fromarray(np.asarray(gradient().convert("L")).astype(np.uint16) * 257)
        for image in (gray, gray.convert("I"), gradient()):
            assert np.array_equal(np.asarray(to_rgb(image)), np.asarray(convert_to_rgb(image)))

    def test_lab_becomes_rgb(self):
        assert convert_to_rgb(Image.new("LAB", (2, 2), (255, 128, 128))).mode == "RGB"

    def test_palettes_with_transparency_keep_their_colors(self):
        image = gradient().convert("P")
        image.info["transparency"] = 0
        assert np.array_equal(np.asarray(convert_to_rgb(image)), np.asarray(image.convert("RGB")))

    def test_animated_images_give_their_first_frame_and_a_warning(self, transformers_log):
        type(image_processing_samclip.logger).warning_once.cache_clear()
        frames = [gradient(), gradient().rotate(180)]
        content = encoded(frames[0], format="PNG", save_all=True, append_images=frames[1:])
        assert np.array_equal(np.asarray(open_image(content)), np.asarray(frames[0]))
        assert "Only the first one" in transformers_log.text

    def test_16_bits_are_scaled_to_8(self):
        gray = Image.fromarray(np.array([[0, 257, 65535]], dtype=np.uint16))
        assert np.asarray(convert_to_rgb(gray))[0, :, 0].tolist() == [0, 1, 255]


@pytest.fixture
def mask() -> np.ndarray:
    mask = np.zeros((7, 9), dtype=bool)
    mask[2:5, 3] = mask[3, 3:7] = True
    return mask


class TestBoxes:
    def test_a_box_excludes_its_right_and_bottom_edge(self, mask):
        left, top, right, bottom = mask_to_box(mask)
        assert (left, top, right, bottom) == (3, 2, 7, 5)
        assert mask[top:bottom, left:right].sum() == mask.sum()

    def test_a_prompt_box_includes_the_last_row_and_column(self, mask):
        assert mask_to_prompt_box(mask) == (3, 2, 6, 4)

    def test_a_coco_box_has_width_and_height(self, mask):
        assert mask_to_coco_box(mask) == [3, 2, 4, 3]

    def test_boxes_of_one_pixel(self):
        mask = np.zeros((3, 3), dtype=bool)
        mask[2, 1] = True
        assert mask_to_box(mask) == (1, 2, 2, 3)
        assert mask_to_prompt_box(mask) == (1, 2, 1, 2)
        assert mask_to_coco_box(mask) == [1, 2, 1, 1]

    def test_an_empty_mask(self):
        mask = np.zeros((3, 3), dtype=bool)
        assert mask_to_box(mask) is None
        assert mask_to_coco_box(mask) == [0, 0, 0, 0]
        with pytest.raises(ValueError, match="empty mask"):
            mask_to_prompt_box(mask)

    def test_coco_boxes_equal_those_of_pycocotools(self, mask):
        coco = pytest.importorskip("pycocotools.mask", reason="needs the extra `train`")
        assert mask_to_coco_box(mask) == coco.toBbox(coco.encode(np.asfortranarray(mask, dtype=np.uint8))).tolist()


class TestRunLengths:
    @pytest.mark.parametrize("kind", ["some", "empty", "full", "last pixel", "first pixel"])
    @pytest.mark.parametrize("compressed", [False, True])
    def test_a_mask_survives_encoding_and_decoding(self, mask, kind, compressed):
        if compressed:
            pytest.importorskip("pycocotools", reason="needs the extra `train`")
        if kind != "some":
            mask[:] = kind == "full"
        if kind in ("last pixel", "first pixel"):
            mask[(-1, -1) if kind == "last pixel" else (0, 0)] = True
        segmentation = encode_mask(mask, compressed=compressed)
        assert isinstance(segmentation["counts"], str if compressed else list)
        decoded = decode_mask(segmentation)
        assert decoded.dtype == bool and np.array_equal(decoded, mask)

    def test_both_encodings_equal_those_of_pycocotools(self, mask):
        coco = pytest.importorskip("pycocotools.mask", reason="needs the extra `train`")
        expected = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
        assert encode_mask(mask, compressed=True) == {"size": [7, 9], "counts": expected["counts"].decode()}
        assert coco.frPyObjects(encode_mask(mask), 7, 9) == expected

    @pytest.mark.parametrize("seed", range(20))
    def test_compressed_run_lengths_are_decoded_as_pycocotools_does(self, seed):
        coco = pytest.importorskip("pycocotools.mask", reason="needs the extra `train`")
        rng = np.random.default_rng(seed)
        # Run lengths of one to many characters, and differences of both signs.
        counts = rng.integers(1, rng.choice([2, 40, 3000, 10**6]), size=rng.integers(1, 40)).tolist()
        counts[0] *= seed % 2
        height = 1 if sum(counts) % 7 else 7
        size = (height, sum(counts) // height)
        compressed = coco.frPyObjects({"size": size, "counts": counts}, *size)
        mask = decode_mask(compressed)
        assert np.array_equal(mask, coco.decode(compressed)) and mask.flags.f_contiguous
        assert np.array_equal(mask, decode_mask({"size": size, "counts": counts}))

    @pytest.mark.parametrize("counts", ["", "0", "P", "zzz", "\x00", "e<?", "caf\u00e9", [3], [70, -7], []])
    def test_run_lengths_that_are_not_of_the_size_raise(self, counts):
        with pytest.raises(ValueError):
            decode_mask({"size": [7, 9], "counts": counts})

    @pytest.mark.parametrize(
        "encoding",
        [{"counts": [63]}, {"size": [7, 9]}, {"size": [63], "counts": [63]}, {"size": None, "counts": [63]}],
    )
    def test_incomplete_run_length_encodings_raise(self, encoding):
        with pytest.raises(ValueError, match='has "counts" and a "size"'):
            decode_mask(encoding)

    def test_polygons_need_the_size_of_the_image(self):
        pytest.importorskip("pycocotools", reason="needs the extra `train`")
        polygons = [[1, 1, 4, 1, 4, 3, 1, 3]]
        assert decode_mask(polygons, (5, 6)).sum() == 6
        with pytest.raises(ValueError, match="size of their image"):
            decode_mask(polygons)


def random_masks() -> dict[str, np.ndarray]:
    """Masks of several sizes and densities, and extreme ones."""
    rng = np.random.default_rng(0)
    masks = {}
    for number in range(40):
        height, width = rng.integers(1, 20, size=2)
        masks[f"random {number}"] = rng.random((height, width)) < rng.choice([0.02, 0.3, 0.7, 0.98])
    one_pixel, one_column, one_row = np.zeros((3, 5, 8), dtype=bool)
    one_pixel[4, 0] = one_column[:, 3] = one_row[2] = True
    block, ends = np.zeros((2, 5, 8), dtype=bool)
    block[1:3, 2:6] = True
    ends[3:, 1] = ends[:2, 2] = True  # one run, the end of a column and the start of the next one
    masks |= {"one pixel": one_pixel, "one column": one_column, "one row": one_row, "block": block, "ends": ends}
    return masks | {"empty": np.zeros((4, 6), dtype=bool), "full": np.ones((4, 6), dtype=bool)}


class TestRunLengthMask:
    """Results equal those of the decoded mask, by brute force."""

    @pytest.mark.parametrize("mask", random_masks().values(), ids=random_masks().keys())
    def test_area_box_pixels_and_decoding(self, mask):
        for runs in (RunLengthMask.encode(mask), RunLengthMask(mask.shape, [0, *_zero_runs(mask)])):
            assert runs.shape == mask.shape and np.array_equal(runs.decode(), mask)
            assert runs.area == mask.sum() and runs.box() == mask_to_box(mask)
            ys, xs = np.nonzero(mask)
            expected = sorted(zip(xs.tolist(), ys.tolist(), strict=True))  # column by column
            assert [runs.pixel(index) for index in range(runs.area)] == expected

    @pytest.mark.parametrize("mask", random_masks().values(), ids=random_masks().keys())
    @pytest.mark.parametrize("size", [(1, 1), (3, 2), (7, 9)])
    def test_the_coverage_is_the_foreground_part_of_each_cell(self, mask, size):
        width, height = size
        # Each pixel is repeated so often that the cells consist of whole pixels.
        large = mask.repeat(height, axis=0).repeat(width, axis=1)
        cells = large.reshape(height, mask.shape[0], width, mask.shape[1]).mean(axis=(1, 3))
        np.testing.assert_allclose(RunLengthMask.encode(mask).coverage(width, height), cells, atol=1e-9)

    def test_counts_must_be_integers_that_add_up_to_the_shape(self):
        for counts in ([], [12.0], ["12"], [[12]], [11], [13], [14, -2], [2**62] * 4, [12, 2**63]):
            with pytest.raises(ValueError, match="counts of a mask"):
                RunLengthMask((3, 4), counts)
        with pytest.raises(TypeError):
            RunLengthMask((3.0, 4), [12])
        assert RunLengthMask((3, 4), [12]).area == 0


def _zero_runs(mask: np.ndarray) -> list[int]:
    """The run lengths of a mask after a first one of 0, with a run of each pixel: foreground, background, ..."""
    return [length for pixel in mask.T.flatten().tolist() for length in (int(pixel), int(not pixel))]


class TestNormalize:
    def test_channels_are_scaled_and_padding_is_0(self):
        images = torch.full((1, 3, 2, 3), 255, dtype=torch.uint8)
        values = normalize(images, [0.5, 0.5, 0.0], [0.5, 0.25, 1.0], torch.tensor([[1, 2]]))
        assert torch.allclose(values[0, :, 0, 0], torch.tensor([1.0, 2.0, 1.0]))
        assert values[0, :, 1].abs().sum() == values[0, :, :, 2].abs().sum() == 0

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"do_normalize": False},
            {"do_rescale": False},
            {"do_rescale": False, "do_normalize": False},
            {"rescale_factor": 1 / 127.5},
            {"image_mean": 0.25, "image_std": 0.5},
        ],
    )
    def test_values_are_those_of_the_image_processor(self, options):
        processor = SamClipImageProcessor(size={"longest_edge": 6}, pad_size={"height": 6, "width": 6}, **options)
        expected = processor(gradient(6, 6), return_tensors="pt")["pixel_values"]
        pixels = torch.from_numpy(np.array(gradient(6, 6))).permute(2, 0, 1)[None]
        torch.testing.assert_close(normalize(pixels, *mean_and_std(processor)), expected.float())

    def test_mean_and_std_of_a_default_image_processor_are_its_own(self):
        processor = SamClipImageProcessor()
        assert mean_and_std(processor) == (list(processor.image_mean), list(processor.image_std))
