"""
Measures how many training samples per second one core prepares: reading, decoding, cropping or padding, and masks.

    python benchmarks/loader.py                         # synthetic JPEGs of typical sizes
    python benchmarks/loader.py --photos 'photos/*.tar' --sa1b 'sa1b/*.tar'

The first table has the batches of the training. The second compares decoders on the same images: Pillow, Pillow with
the reduced scales of JPEG (`Image.draft`), torchvision. Values are medians of `--repeats` runs on one thread, in
images per second of CPU time, which depends little on other processes.

The third compares the pixels of JPEGs that are decoded at a reduced size with those of the full size. To give a
scale, it compares bilinear with bicubic resizing. Training uses reduced sizes of at least 1.25 times the new size.
"""

import argparse
import io
import json
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as F

from samclip_hf.datasets.samples import LazyImage
from samclip_hf.datasets.streams import open_stream
from samclip_hf.distillation.collation import ClipBatches, SamBatches, StepStream
from samclip_hf.images import encode_mask


def synthetic_jpeg(rng: np.random.Generator, width: int, height: int) -> bytes:
    """Returns a JPEG of quality 90 with about as much detail as a photograph: noise at several scales."""
    pixels = np.zeros((height, width, 3), dtype=np.float32)
    for scale in (4, 16, 64, 256):
        coarse = rng.normal(0, scale**0.5, (height // scale + 2, width // scale + 2, 3)).astype(np.float32)
        channels = [
            Image.fromarray(coarse[..., c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(3)
        ]
        pixels += 4 * np.stack(channels, axis=-1)
    buffer = io.BytesIO()
    Image.fromarray((128 + pixels).clip(0, 255).astype(np.uint8)).save(buffer, format="JPEG", quality=90)
    return buffer.getvalue()


def write_data(folder: Path, num_images: int) -> tuple[str, str]:
    """Writes a tar of images of 500 x 375 px and a tar in SA-1B's layout of images of 2250 x 1500 px with 100 masks
    each. Returns their paths."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:1500, :2250]
    for name, (width, height) in {"photos": (500, 375), "sa1b": (2250, 1500)}.items():
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for number in range(num_images):
                files = {"jpg": synthetic_jpeg(rng, width, height)}
                if name == "sa1b":
                    annotations = []
                    for _ in range(100):
                        (y, x), radius = rng.uniform((0, 0), (1500, 2250)), rng.uniform(20, 300)
                        disk = (rows - y) ** 2 + (columns - x) ** 2 < radius**2
                        segmentation = encode_mask(disk, compressed=True)
                        annotations.append({"segmentation": segmentation, "area": int(disk.sum())})
                    files["json"] = json.dumps({"annotations": annotations}).encode()
                for ending, content in files.items():
                    member = tarfile.TarInfo(f"{number}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return str(folder / "photos.tar"), str(folder / "sa1b.tar")


def clip_task(
    data: str, size: int, teacher_size: int = 224, batch_size: int = 8, min_crop_scale: float = 0.5
) -> ClipBatches:
    """Returns batches for the CLIP loss at one resolution."""
    streams = [open_stream(data)]
    return ClipBatches(
        streams, [1.0], [size], teacher_size, batch_size, shuffle_buffer=64, min_crop_scale=min_crop_scale
    )


def sam_task(data: str, size: int, batch_size: int = 2, masks: int = 32, regions: int = 0) -> SamBatches:
    """Returns batches for the SAM loss at one resolution, and for the region loss if there are `regions`."""
    streams = [open_stream(data, with_masks=True)]
    options = {"regions_per_image": regions, "mask_size": size // 4}
    return SamBatches(streams, [1.0], size, [size], batch_size, masks, 20.0, shuffle_buffer=64, **options)


def rate(work: Callable[[], int], repeats: int) -> float:
    """Returns images per second of CPU time: the median after a warm-up run."""
    work()
    rates = []
    for _ in range(repeats):
        start = time.process_time()
        number = work()
        rates.append(number / (time.process_time() - start))
    return statistics.median(rates)


def task_rate(task: ClipBatches | SamBatches, num_images: int, repeats: int) -> float:
    """Returns samples per second of a data loader worker."""
    parts = iter(StepStream({"task": task}, seed=0))

    def work() -> int:
        batch = task.batch_size
        for part in islice(parts, max(1, num_images // batch)):
            assert not part["skipped"], part["skipped"]
        return max(1, num_images // batch) * batch

    return rate(work, repeats)


def decoders(size: int) -> dict[str, Callable[[bytes], object]]:
    """Returns functions that decode a JPEG and resize its longer side to `size` pixels."""

    def pillow(content: bytes, draft: bool = False):
        image = Image.open(io.BytesIO(content))
        if draft:
            image.draft("RGB", (size, size))
        scale = size / max(image.size)
        shape = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        return image.convert("RGB").resize(shape, Image.Resampling.BILINEAR)

    def torchvision(content: bytes):
        image = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)
        scale = size / max(image.shape[-2:])
        return F.resize(image, [max(1, round(side * scale)) for side in image.shape[-2:]], antialias=True)

    return {
        "Pillow": pillow,
        "Pillow, reduced scale": lambda content: pillow(content, draft=True),
        "torchvision": torchvision,
    }


def peak_signal_to_noise(pixels: np.ndarray, others: np.ndarray) -> float:
    """Returns the peak signal-to-noise ratio of two images, uint8, in dB."""
    return 10 * np.log10(255**2 / np.mean((pixels.astype(float) - others) ** 2))


def compare_pixels(contents: list[bytes], reduction: int, oversampling: float) -> tuple[float, float, float]:
    """Returns means over JPEGs: the ratio in dB and the absolute difference between a crop of the image at a reduced
    and at its full size, resized with the bicubic filter, and the ratio between the bilinear and the bicubic
    filter."""
    ratios, differences, filters = [], [], []
    for content in contents:
        image = LazyImage(content, "an image")
        full, reduced = image.decode(), image.decode(reduction)
        side = 0.8 * min(full.size)
        size = (max(1, int(side / (reduction * oversampling))),) * 2
        box = (0.1 * side, 0.1 * side, 1.1 * side, 1.1 * side)
        of_full, bilinear = (
            np.asarray(full.resize(size, resample, box))
            for resample in (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR)
        )
        of_reduced = np.asarray(reduced.resize(size, Image.Resampling.BICUBIC, tuple(x / reduction for x in box)))
        ratios.append(peak_signal_to_noise(of_full, of_reduced))
        differences.append(np.abs(of_full.astype(float) - of_reduced).mean())
        filters.append(peak_signal_to_noise(of_full, bilinear))
    return statistics.mean(ratios), statistics.mean(differences), statistics.mean(filters)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", help="tars of images for the CLIP loss (default: synthetic)")
    parser.add_argument("--sa1b", help="tars of SA-1B for the SAM loss (default: synthetic)")
    parser.add_argument("--num_images", type=int, default=24, help="images per measurement (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="runs per measurement (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    with tempfile.TemporaryDirectory() as folder:
        photos, sa1b = (
            write_data(Path(folder), arguments.num_images) if not arguments.photos or not arguments.sa1b else ("", "")
        )
        photos, sa1b = arguments.photos or photos, arguments.sa1b or sa1b
        print("| training samples, one core | images per second |\n|---|---|")
        tasks: dict[str, ClipBatches | SamBatches] = {
            "miniature: CLIP loss, 64 px": clip_task("miniature", 64, 64, batch_size=64, min_crop_scale=0.08),
            "miniature: SAM loss, 128 px, 6 masks": sam_task("miniature", 128, batch_size=3, masks=6),
            **{f"photographs: CLIP loss, {size} px": clip_task(photos, size) for size in (224, 448, 1024)},
            **{f"SA-1B: CLIP loss, {size} px": clip_task(sa1b, size) for size in (224, 448, 1024)},
            "SA-1B: SAM loss, 1024 px, 32 masks": sam_task(sa1b, 1024),
            "SA-1B: SAM and region loss, 1024 px, 32 masks, 8 regions": sam_task(sa1b, 1024, regions=8),
        }
        for name, task in tasks.items():
            number = 256 if "miniature" in name else arguments.num_images
            print(f"| {name} | {task_rate(task, number, arguments.repeats):.1f} |")

        print("\n| decoding and resizing, images per second (relative to Pillow) | 224 px | 448 px | 1024 px |")
        print("|---|---|---|---|")
        for name, stream in {"photographs": open_stream(photos), "SA-1B": open_stream(sa1b)}.items():
            samples = (sample for shard in range(stream.num_shards) for _, sample in stream.read(shard))
            contents = [sample["image"]["bytes"] for sample in islice(samples, arguments.num_images)]
            rates: dict[str, list[float]] = {}
            for size in (224, 448, 1024):
                for decoder, decode in decoders(size).items():

                    def work(decode: Callable = decode, contents: list[bytes] = contents) -> int:
                        for content in contents:
                            decode(content)
                        return len(contents)

                    rates.setdefault(decoder, []).append(rate(work, arguments.repeats))
            for decoder, values in rates.items():
                cells = [f"{v:.0f} ({v / p:.2f})" for v, p in zip(values, rates["Pillow"], strict=True)]
                print(f"| {name}: {decoder} | {' | '.join(cells)} |")

        print("\n| pixels of a reduced size | reduction | oversampling | PSNR | mean difference | PSNR of filters |")
        print("|---|---|---|---|---|---|")
        for name, stream in {"photographs": open_stream(photos), "SA-1B": open_stream(sa1b)}.items():
            samples = (sample for shard in range(stream.num_shards) for _, sample in stream.read(shard))
            images = (sample["image"]["bytes"] for sample in islice(samples, arguments.num_images))
            contents = [content for content in images if LazyImage(content, "an image").format == "JPEG"]
            for reduction in (2, 4) if contents else ():
                for oversampling in (1.0, 1.25, 1.5, 2.0):
                    ratio, difference, filters = compare_pixels(contents, reduction, oversampling)
                    cells = f"{oversampling} | {ratio:.1f} dB | {difference:.2f} | {filters:.1f} dB |"
                    print(f"| {name} | 1/{reduction} | {cells}")


if __name__ == "__main__":
    main()
