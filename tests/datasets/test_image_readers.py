"""Every reader of training and evaluation decodes an image in the same way, and names an image that it cannot read."""

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import ExifTags, Image

from samclip_hf.datasets import (
    open_captions,
    open_classification,
    open_objects,
    open_segmentation,
    open_stream,
    samples,
)
from samclip_hf.datasets.samples import LazyImage
from samclip_hf.datasets.streams import SampleImage
from samclip_hf.distillation.collation import ClipBatches
from samclip_hf.distillation.crops import STUDENT_FILTER, cut, draw_crop, sample_rng
from samclip_hf.distillation.embedding_cache import CacheDescription, ShardCrops
from samclip_hf.images import encode_mask, open_image

from .tars import jpeg, write_tar

SIDE = 8
GRADIENT = np.arange(SIDE * SIDE, dtype=np.uint8).reshape(SIDE, SIDE) * 3


def encode(pixels: np.ndarray, image_format: str = "PNG", orientation: int = 1) -> bytes:
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(buffer, format=image_format, exif=exif)
    return buffer.getvalue()


def encode_frames(*frames: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    first, *others = map(Image.fromarray, frames)
    first.save(buffer, format="GIF", save_all=True, append_images=others)
    return buffer.getvalue()


# File name, content, and the expected channel of the RGB image.
IMAGES = {
    "16 bits": ("a.png", encode(GRADIENT.astype(np.uint16) * 257), GRADIENT),
    "EXIF orientation": ("a.png", encode(np.stack([GRADIENT] * 3, axis=2), orientation=6), np.rot90(GRADIENT, -1)),
    "float TIFF": ("a.tiff", encode(GRADIENT.astype(np.float32) / 255, "TIFF"), GRADIENT),
    "animation": ("a.gif", encode_frames(GRADIENT, GRADIENT[::-1]), GRADIENT),
}


def stream_image(name: Path) -> Image.Image:
    """The only image of a stream."""
    _, sample = next(open_stream(str(name)).read(0))
    return SampleImage(sample).decode()


def stream_of_tar(folder: Path, name: str, content: bytes) -> Image.Image:
    write_tar(folder / "0.tar", {name: content})
    return stream_image(folder)


def stream_of_files(folder: Path, name: str, content: bytes) -> Image.Image:
    (folder / name).write_bytes(content)
    return stream_image(folder)


def stream_of_zip(folder: Path, name: str, content: bytes) -> Image.Image:
    with zipfile.ZipFile(folder / "0.zip", "w") as archive:
        archive.writestr(name, content)
    return stream_image(folder)


def to_dataset(name: str, content: bytes, **columns) -> Dataset:
    features = {"image": ImageFeature()} | {column: feature for column, (_, feature) in columns.items()}
    rows = {"image": [{"bytes": content, "path": name}]} | {column: [value] for column, (value, _) in columns.items()}
    return Dataset.from_dict(rows, features=Features(features))


def stream_of_parquet(folder: Path, name: str, content: bytes) -> Image.Image:
    to_dataset(name, content).to_parquet(folder / "0.parquet")
    return stream_image(folder)


def stream_of_saved(folder: Path, name: str, content: bytes) -> Image.Image:
    to_dataset(name, content).save_to_disk(folder / "saved")
    return stream_image(folder / "saved")


def embedding_cache(folder: Path, name: str, content: bytes) -> Image.Image:
    """The crop of the cache: the whole image, which may be flipped."""
    write_tar(folder / "0.tar", {name: content})
    stream = open_stream(str(folder))
    description = CacheDescription(
        teacher="", text_space=[], projection_dim=1, image_size=SIDE, resample=2, image_mean=[], image_std=[], seed=1,
        min_crop_scale=1.0, num_crops=1, shards=[],
    )  # fmt: skip
    (part,) = ShardCrops([stream], [(0, 0)], description, batch_size=2)
    if not part["inputs"]:
        raise ValueError(part["causes"][0])
    return Image.fromarray(np.ascontiguousarray(part["inputs"][0]))


def class_folder(folder: Path, name: str, content: bytes) -> Image.Image:
    (folder / "cat").mkdir()
    (folder / "cat" / name).write_bytes(content)
    return open_classification(str(folder), "").samples[0].image()


def class_tar(folder: Path, name: str, content: bytes) -> Image.Image:
    write_tar(folder / "0.tar", {name: content, "a.json": b'{"label": 0, "name": "cat"}'})
    return open_classification(str(folder), "").samples[0].image()


def class_hub(folder: Path, name: str, content: bytes) -> Image.Image:
    dataset = to_dataset(name, content, label=(0, ClassLabel(names=["cat"])))
    dataset.to_parquet(folder / "test-0.parquet")
    return next(iter(open_classification(f"hf://{folder}", "").samples)).image()


def caption_tar(folder: Path, name: str, content: bytes) -> Image.Image:
    write_tar(folder / "0.tar", {name: content, "a.txt": b"a cat"})
    return open_captions(str(folder), "").samples[0].image()


def caption_hub(folder: Path, name: str, content: bytes) -> Image.Image:
    to_dataset(name, content, caption=("a cat", Value("string"))).to_parquet(folder / "test-0.parquet")
    return next(iter(open_captions(f"hf://{folder}", "").samples)).image()


def caption_files(folder: Path, name: str, content: bytes) -> Image.Image:
    (folder / "flickr30k/flickr30k-images").mkdir(parents=True)
    (folder / "flickr30k/flickr30k-images" / name).write_bytes(content)
    entry = {"filename": name, "split": "test", "sentences": [{"raw": "a cat"}]}
    (folder / "flickr30k/dataset_flickr30k.json").write_text(json.dumps({"images": [entry]}))
    return open_captions("flickr30k", folder).samples[0].image()


def object_tar(folder: Path, name: str, content: bytes) -> Image.Image:
    image = {"image_id": 0, "height": SIDE, "width": SIDE}
    write_tar(folder / "0.tar", {name: content, "a.json": json.dumps({"image": image, "annotations": []}).encode()})
    return open_objects(str(folder), "").samples[0].image()


def object_files(folder: Path, name: str, content: bytes) -> Image.Image:
    for subfolder in ("val2017", "annotations"):
        (folder / "coco" / subfolder).mkdir(parents=True)
    (folder / "coco/val2017" / name).write_bytes(content)
    image = {"id": 0, "height": SIDE, "width": SIDE, "file_name": name}
    annotations = {"images": [image], "annotations": [], "categories": []}
    (folder / "coco/annotations/instances_val2017.json").write_text(json.dumps(annotations))
    return open_objects("coco", folder).samples[0].image()


def segmentation_files(folder: Path, name: str, content: bytes) -> Image.Image:
    for subfolder in ("images", "labels"):
        (folder / subfolder).mkdir()
    (folder / "images" / name).write_bytes(content)
    (folder / "labels/a.png").write_bytes(encode(GRADIENT * 0))
    (folder / "classes.json").write_text('["cat"]')
    return open_segmentation(str(folder), "").samples[0].image()


def segmentation_hub(folder: Path, name: str, content: bytes) -> Image.Image:
    label_map = {"bytes": encode(GRADIENT * 0), "path": None}
    to_dataset(name, content, labels=(label_map, ImageFeature())).to_parquet(folder / "test-0.parquet")
    (folder.parent / "classes.json").write_text('["cat"]')
    data = open_segmentation(f"hf://{folder}?classes={folder.parent / 'classes.json'}", "")
    return next(iter(data.samples)).image()


TRAINING = (stream_of_tar, stream_of_files, stream_of_zip, stream_of_parquet, stream_of_saved, embedding_cache)
EVALUATION = (
    *(class_folder, class_tar, class_hub, caption_tar, caption_hub, caption_files),
    *(object_tar, object_files, segmentation_files, segmentation_hub),
)


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("read", [*TRAINING, *EVALUATION])
def test_every_reader_gives_the_same_pixels(tmp_path, read: Callable, kind):
    name, content, expected = IMAGES[kind]
    (tmp_path / "data").mkdir()
    pixels = np.asarray(read(tmp_path / "data", name, content))
    assert pixels.shape == (SIDE, SIDE, 3) and (pixels == pixels[:, :, :1]).all()
    flips = (expected, expected[:, ::-1]) if read is embedding_cache else (expected,)
    assert any(np.array_equal(pixels[:, :, 0], flip) for flip in flips)


@pytest.mark.parametrize("read", EVALUATION)
def test_a_truncated_image_of_an_evaluation_set_is_named(tmp_path, read: Callable):
    (tmp_path / "data").mkdir()
    with pytest.raises(ValueError, match=r"(/a\.jpg|: a\.jpg|/data 0) cannot be read as an image: .*truncated"):
        read(tmp_path / "data", "a.jpg", jpeg(0)[:-100])


@pytest.mark.parametrize("read", TRAINING)
def test_a_truncated_image_of_the_training_data_is_skipped(tmp_path, read: Callable):
    (tmp_path / "data").mkdir()
    with pytest.raises(ValueError, match="broken image"):
        read(tmp_path / "data", "a.jpg", jpeg(0)[:-100])


class TestAnnotationsOfRotatedImages:
    """An image is stored with 6 x 4 pixels and displayed with 4 x 6."""

    PIXELS = np.arange(72, dtype=np.uint8).reshape(4, 6, 3)
    CONTENT = encode(PIXELS, orientation=6)
    # Height and width of the annotations, and the image that they belong to.
    CASES = (((6, 4), np.rot90(PIXELS, -1)), ((4, 6), PIXELS))

    @pytest.mark.parametrize(("size", "expected"), CASES)
    def test_training(self, tmp_path, size, expected):
        annotations = [{"segmentation": encode_mask(np.eye(*size, dtype=bool))}]
        write_tar(tmp_path / "0.tar", {"a.png": self.CONTENT, "a.json": json.dumps(annotations).encode()})
        _, sample = next(open_stream(str(tmp_path), with_masks=True).read(0))
        assert np.array_equal(SampleImage(sample).decode(), expected)

    @pytest.mark.parametrize(("size", "expected"), CASES)
    def test_the_image_is_decoded_once(self, size, expected, monkeypatch):
        decoded = []
        convert = samples.convert_to_rgb
        monkeypatch.setattr(samples, "convert_to_rgb", lambda *a, **b: decoded.append(convert(*a, **b)) or decoded[-1])
        assert np.array_equal(samples.read_image(self.CONTENT, "a.png", lambda: size), expected)
        assert len(decoded) == 1

    @pytest.mark.parametrize(("size", "expected"), CASES)
    @pytest.mark.parametrize("orientation", [1, 6])
    def test_label_maps(self, tmp_path, size, expected, orientation):
        segmentation_files(tmp_path, "a.png", self.CONTENT)
        labels = np.eye(*(size if orientation == 1 else size[::-1]), dtype=np.uint8)
        (tmp_path / "labels/a.png").write_bytes(encode(labels, orientation=orientation))
        (tmp_path / "classes.json").write_text('["cat", "dog"]')
        (sample,) = open_segmentation(str(tmp_path), "").samples
        assert np.array_equal(sample.image(), expected)
        assert np.array_equal(sample.label_map(), labels if orientation == 1 else np.rot90(labels, -1))

    @pytest.mark.parametrize(("size", "expected"), CASES)
    def test_objects(self, tmp_path, size, expected):
        mask = np.eye(*size, dtype=bool)
        image = {"image_id": 0, "height": size[0], "width": size[1]}
        content = {"image": image, "annotations": [{"segmentation": encode_mask(mask)}]}
        write_tar(tmp_path / "0.tar", {"a.png": self.CONTENT, "a.json": json.dumps(content).encode()})
        (sample,) = open_objects(str(tmp_path), "").samples
        assert np.array_equal(sample.image(), expected)
        (annotation,) = sample.objects()
        assert (annotation["area"], annotation["bbox"]) == (4, [0, 0, 4, 4])


class TestLabelMaps:
    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16, bool])
    def test_types(self, tmp_path, dtype):
        segmentation_files(tmp_path, "a.png", encode(GRADIENT))
        labels = np.eye(SIDE).astype(dtype)
        (tmp_path / "labels/a.png").write_bytes(encode(labels))
        (tmp_path / "classes.json").write_text('["cat", "dog"]')
        assert np.array_equal(open_segmentation(str(tmp_path), "").samples[0].label_map(), labels)

    def test_a_jpeg_and_a_truncated_file_raise(self, tmp_path):
        segmentation_files(tmp_path, "a.png", encode(GRADIENT))
        (tmp_path / "labels/a.png").write_bytes(encode(GRADIENT)[:-30])
        with pytest.raises(ValueError, match=r"labels/a\.png cannot be read as a label map"):
            open_segmentation(str(tmp_path), "").samples[0].label_map()
        (tmp_path / "images/a.png").write_bytes(b"no image")
        with pytest.raises(ValueError, match=r"images/a\.png cannot be read as an image: unknown format"):
            open_segmentation(str(tmp_path), "").samples[0].image()
        (tmp_path / "labels/a.png").rename(tmp_path / "labels/a.jpg")
        (tmp_path / "labels/a.jpg").write_bytes(encode(GRADIENT, "JPEG"))
        with pytest.raises(ValueError, match=r"a\.jpg cannot be read as a label map: .*Save label maps as PNG"):
            open_segmentation(str(tmp_path), "").samples[0].label_map()


class TestObjects:
    def write(self, folder: Path, annotation: dict, size: tuple[int, int] = (SIDE, SIDE)):
        image = {"image_id": 0, "height": size[0], "width": size[1]}
        content = json.dumps({"image": image, "annotations": [annotation]}).encode()
        write_tar(folder / "0.tar", {"a.png": encode(GRADIENT), "a.json": content})
        return open_objects(str(folder), "").samples[0]

    @pytest.mark.parametrize(
        "segmentation",
        [encode_mask(np.tri(SIDE) > 0), encode_mask(np.tri(SIDE) > 0, compressed=True), [[0, 0, 0, 8, 8, 8]]],
    )
    def test_missing_values_are_computed_from_the_mask(self, tmp_path, segmentation):
        coco = pytest.importorskip("pycocotools.mask")
        (completed,) = self.write(tmp_path, {"segmentation": segmentation, "area": None}).objects()
        mask = np.tri(SIDE) > 0
        if isinstance(segmentation, list):
            mask = coco.decode(coco.merge(coco.frPyObjects(segmentation, SIDE, SIDE)))
        encoded = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
        assert completed["area"] == coco.area(encoded) and completed["bbox"] == coco.toBbox(encoded).tolist()
        assert (completed["id"], completed["category_id"], completed["iscrowd"]) == (0, 1, 0)

    @pytest.mark.parametrize("segmentation", [{"size": [8, 8], "counts": [3]}, {"size": [8, 8], "counts": "0"}, [[]]])
    def test_a_broken_mask_is_named(self, tmp_path, segmentation):
        sample = self.write(tmp_path, {"id": 5, "segmentation": segmentation})
        with pytest.raises(ValueError, match=r"0\.tar: a\.json: annotation 5 cannot be read as a mask"):
            sample.objects()

    def test_masks_and_images_of_different_sizes_raise(self, tmp_path):
        sample = self.write(tmp_path, {"segmentation": encode_mask(np.eye(4, dtype=bool))})
        with pytest.raises(ValueError, match=r"a\.json: annotation 0 has the size \(4, 4\), its image \(8, 8\)"):
            sample.objects()
        sample = self.write(tmp_path, {"segmentation": encode_mask(np.eye(4, dtype=bool))}, size=(4, 4))
        with pytest.raises(ValueError, match=r"0/a has the size \(8, 8\), its annotations \(4, 4\)"):
            sample.image()


def smooth(width: int, height: int) -> Image.Image:
    """An image without symmetries and high frequencies, so that its pixels do not depend on the decoded size."""
    y, x = np.mgrid[:height, :width] / 40
    channels = [128 + 80 * np.sin(x + 0.3 * y), 128 + 80 * np.cos(y - 0.5 * x), 60 + 3 * x + 2 * y]
    return Image.fromarray(np.stack(channels, axis=-1).clip(0, 255).astype(np.uint8))


def encode_jpeg(image: Image.Image, orientation: int = 1, image_format: str = "JPEG", **options) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    buffer = io.BytesIO()
    image.save(buffer, image_format, exif=exif, quality=95, **options)
    return buffer.getvalue()


class TestLazyImage:
    """A JPEG is decoded at a reduced size, and its crops are those of the full image."""

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("size", [(483, 325), (480, 320)])  # not multiples of the reductions, and multiples
    def test_crops_of_all_orientations_are_those_of_the_full_image(self, size, orientation):
        content = encode_jpeg(smooth(*size), orientation)
        image, full = LazyImage(content, "a.jpg"), open_image(content)
        assert image.size == full.size == (size if orientation < 5 else size[::-1])
        for new_size, reduction in ((100, 2), (50, 4), (24, 8)):
            for box in (None, (15.3, 40.7, 290.2, 310.9), (30, 60, full.width, full.height)):
                resized = image.resize((new_size, new_size), Image.Resampling.BICUBIC, box)
                expected = full.resize((new_size, new_size), Image.Resampling.BICUBIC, box)
                difference = np.abs(np.asarray(resized, dtype=float) - np.asarray(expected))
                assert difference.max() <= 4 and difference.mean() < 0.5
            assert reduction in image._decoded and image._decoded[reduction].width == -(-full.width // reduction)
        assert 1 not in image._decoded

    @pytest.mark.parametrize("mode", ["L", "CMYK"])
    def test_other_color_modes_and_mpo_are_reduced_too(self, mode):
        for content in (encode_jpeg(smooth(400, 300).convert(mode)), encode_jpeg(smooth(400, 300), 1, "MPO")):
            image, full = LazyImage(content, "a.jpg"), open_image(content)
            resized, expected = (np.asarray(i.resize((60, 40), Image.Resampling.BILINEAR)) for i in (image, full))
            assert list(image._decoded) == [4] and resized.shape == (40, 60, 3)
            assert np.abs(resized.astype(float) - expected).max() <= 4

    def test_a_reduced_size_that_is_too_small_is_not_used(self):
        content = encode_jpeg(smooth(500, 250))
        for new_size, reduction in ((100, 2), (101, 1), (50, 4), (51, 2), (25, 8), (26, 4), (300, 1)):
            image = LazyImage(content, "a.jpg")
            resized = image.resize((2 * new_size, new_size), Image.Resampling.BILINEAR)
            assert list(image._decoded) == [reduction]
            if reduction == 1:
                expected = open_image(content).resize((2 * new_size, new_size), Image.Resampling.BILINEAR)
                assert np.array_equal(resized, expected)

    def test_pixels_do_not_depend_on_the_other_sizes_that_were_read(self):
        content = encode_jpeg(smooth(480, 320))
        image, box = LazyImage(content, "a.jpg"), (20.5, 10.0, 300.0, 310.0)
        for size in (300, 60, 200, 30):
            again = LazyImage(content, "a.jpg").resize((size, size), Image.Resampling.BICUBIC, box)
            assert np.array_equal(image.resize((size, size), Image.Resampling.BICUBIC, box), again)

    @pytest.mark.parametrize("image_format", ["PNG", "BMP", "WEBP", "TIFF"])
    def test_other_formats_are_decoded_completely(self, image_format):
        buffer = io.BytesIO()
        smooth(400, 300).save(buffer, image_format)
        image = LazyImage(buffer.getvalue(), "a")
        resized = image.resize((40, 30), Image.Resampling.BICUBIC)
        assert np.array_equal(resized, open_image(buffer.getvalue()).resize((40, 30), Image.Resampling.BICUBIC))

    def test_evaluation_decodes_completely(self, tmp_path):
        content = encode_jpeg(smooth(400, 300), orientation=6)
        (tmp_path / "a.jpg").write_bytes(content)
        for source in (content, tmp_path / "a.jpg"):
            assert np.array_equal(samples.read_image(source, "a.jpg"), open_image(content))

    def test_a_truncated_jpeg_is_an_error_at_every_size(self):
        content = encode_jpeg(smooth(400, 300))
        for size in (30, 400):
            image = LazyImage(content[:-2000], "a.jpg")
            with pytest.raises(ValueError, match=r"a\.jpg cannot be read as an image"):
                image.resize((size, size), Image.Resampling.BILINEAR)


def test_student_teacher_and_cache_use_the_same_pixels_of_a_large_jpeg(tmp_path):
    write_tar(tmp_path / "0.tar", {"a.jpg": encode_jpeg(smooth(900, 600), orientation=6)})
    stream = open_stream(str(tmp_path))
    description = CacheDescription(
        teacher="", text_space=[], projection_dim=1, image_size=64, resample=3, image_mean=[], image_std=[], seed=1,
        min_crop_scale=0.5, num_crops=2, shards=[],
    )  # fmt: skip
    (part,) = ShardCrops([stream], [(0, 0)], description, batch_size=4)
    _, raw = next(stream.read(0))
    for image_size in (64, 200, 500):  # the student's, for which other reductions are used
        batches = ClipBatches([stream], [1.0], [image_size], 64, 1, shuffle_buffer=1, min_crop_scale=0.5)
        for epoch, cached in enumerate(part["inputs"]):
            sample = batches.sample(raw, 1, epoch, image_size)
            assert np.array_equal(sample["teacher_images"], cached)
            full = open_image(raw["image"]["bytes"])
            crop = draw_crop(full, 0.5, sample_rng(1, epoch, raw["key"]))
            expected = cut(full, crop, image_size, STUDENT_FILTER)
            assert np.abs(sample["images"].astype(float) - expected).max() <= 4
