"""
How many samples a second one core makes ready for training: reading, decoding, cropping or padding, run-length masks.

    python benchmarks/loader.py                         # photographs drawn here, of the usual sizes
    python benchmarks/loader.py --photos 'photos/*.tar' --sa1b 'sa1b/*.tar'

First the tasks as training does them; then decoders alone on the same pictures: Pillow, Pillow with the JPEG's own
reduced scales, torchvision. Each is the median of `--repeats` passes on one thread.
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
from pycocotools import mask as coco_mask
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as F

from samclip_hf.distillation.collation import ClipBatches, SamBatches, StepStream
from samclip_hf.distillation.streams import open_stream

NUM_DRAWN = 24


def photograph(rng: np.random.Generator, width: int, height: int) -> bytes:
    """A JPEG with about as much detail as a photograph: noise of all scales, quality 90."""
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


def draw_data(folder: Path) -> tuple[str, str]:
    """Tars of photographs of 500 x 375 px, and of 2250 x 1500 px with a hundred masks each in SA-1B's layout."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:1500, :2250]
    for name, (width, height) in {"photos": (500, 375), "sa1b": (2250, 1500)}.items():
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for number in range(NUM_DRAWN):
                files = {"jpg": photograph(rng, width, height)}
                if name == "sa1b":
                    annotations = []
                    for _ in range(100):
                        (y, x), radius = rng.uniform((0, 0), (1500, 2250)), rng.uniform(20, 300)
                        disk = (rows - y) ** 2 + (columns - x) ** 2 < radius**2
                        encoded = coco_mask.encode(np.asfortranarray(disk.astype(np.uint8)))
                        segmentation = {"size": [1500, 2250], "counts": encoded["counts"].decode()}
                        annotations.append({"segmentation": segmentation, "area": int(disk.sum())})
                    files["json"] = json.dumps({"annotations": annotations}).encode()
                for ending, content in files.items():
                    member = tarfile.TarInfo(f"{number}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return str(folder / "photos.tar"), str(folder / "sa1b.tar")


def miniature_tasks() -> dict[str, ClipBatches | SamBatches]:
    """What `training/configs/miniature_stage2.yaml` reads."""
    return {
        "CLIP loss, 64 px": ClipBatches([open_stream("miniature")], [1.0], [64], 64, batch_size=64, min_crop=0.08),
        "SAM loss, 128 px, 6 masks": SamBatches(
            [open_stream("miniature", with_masks=True)],
            [1.0],
            128,
            [128],
            batch_size=3,
            masks_per_image=6,
            max_box_noise=2.5,
        ),
    }


def rate(work: Callable[[], int], repeats: int) -> float:
    """Images a second; the first pass, which fills caches, does not count."""
    work()
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        number = work()
        rates.append(number / (time.perf_counter() - start))
    return statistics.median(rates)


def task_rate(task: ClipBatches | SamBatches, num_images: int, repeats: int) -> float:
    """Samples a second as a data loader's worker makes them."""
    parts = iter(StepStream({"task": task}, seed=0, shuffle_buffer=num_images))

    def work() -> int:
        batch = task.batch_size
        for part in islice(parts, max(1, num_images // batch)):
            assert not part["skipped"], part["skipped"]
        return max(1, num_images // batch) * batch

    return rate(work, repeats)


def decoders(size: int) -> dict[str, Callable[[bytes], object]]:
    """Each makes a picture of which `size` is the longer side."""

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos")
    parser.add_argument("--sa1b")
    parser.add_argument("--num_images", type=int, default=NUM_DRAWN)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    with tempfile.TemporaryDirectory() as folder:
        photos, sa1b = draw_data(Path(folder)) if not arguments.photos or not arguments.sa1b else ("", "")
        photos, sa1b = arguments.photos or photos, arguments.sa1b or sa1b
        streams = {"photos": open_stream(photos), "sa1b": open_stream(sa1b, with_masks=True)}
        print("| training's own samples, one core | images a second |\n|---|---|")
        for size in (224, 448, 1024):
            task = ClipBatches([streams["photos"]], [1.0], [size], 224, batch_size=8, min_crop=0.5)
            print(f"| CLIP loss, {size} px | {task_rate(task, arguments.num_images, arguments.repeats):.1f} |")
        sam = SamBatches([streams["sa1b"]], [1.0], 1024, [1024], batch_size=2, masks_per_image=32, max_box_noise=20.0)
        print(f"| SAM loss, 1024 px, 32 masks | {task_rate(sam, arguments.num_images, arguments.repeats):.1f} |")

        for name, task in miniature_tasks().items():
            print(f"| miniature: {name} | {task_rate(task, 256, arguments.repeats):.1f} |")

        print("\n| decode and resize alone, images a second (times Pillow's) | 224 px | 448 px | 1024 px |")
        print("|---|---|---|---|")
        for name, stream in streams.items():
            samples = islice((sample for shard in range(stream.num_shards) for _, sample in stream.read(shard)), None)
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


if __name__ == "__main__":
    main()
