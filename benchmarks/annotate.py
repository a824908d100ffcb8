"""
Measures the throughput of `samclip annotate` on scenes of the miniature:

    python benchmarks/annotate.py --num_images 200

The column "share" is the time of a part divided by that of the command, which includes loading the model, reading the
images and writing the data set. All parts run in one process, one after the other.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

from samclip_cli import main
from samclip_cli.inputs import read_image
from samclip_hf import SamClipForImageSegmentation, SamClipProcessor, miniature
from samclip_hf.miniature.scenes import BACKGROUND_PROMPTS, CLASS_NAMES, render


def encoder_seconds(paths: list[Path]) -> tuple[float, float]:
    """Seconds for all images, one by one: of the image encoder, and of the encoder with reading and preprocessing."""
    model = SamClipForImageSegmentation.from_pretrained(miniature.checkpoint()).eval()
    processor = SamClipProcessor.from_pretrained(miniature.checkpoint())
    reading = encoding = 0.0
    with torch.inference_mode():
        for path in paths:
            start = time.perf_counter()
            pixel_values = processor(read_image(path, None))["pixel_values"]
            middle = time.perf_counter()
            model.get_vision_embeds(pixel_values)
            reading, encoding = reading + middle - start, encoding + time.perf_counter() - middle
    return encoding, reading + encoding


def annotate_seconds(images: Path, labels: list[str], formats: str) -> float:
    """Seconds of the command in this process, with loading the model."""
    command = ["annotate", str(images), "--labels", ", ".join(labels), "--background", ", ".join(BACKGROUND_PROMPTS)]
    with tempfile.TemporaryDirectory() as output:
        start = time.perf_counter()
        status = main([*command, "--formats", formats, "--output", output])
        seconds = time.perf_counter() - start
    assert status == 0
    return seconds


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_images", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--num_labels", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--formats", default="coco,parquet,webdataset", help="default: %(default)s")
    arguments = parser.parse_args()
    labels = CLASS_NAMES[: arguments.num_labels]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for index in range(arguments.num_images):
            Image.fromarray(render(seed=0, index=index).image).save(folder / f"{index:06d}.png")
        paths = sorted(folder.iterdir())
        annotate_seconds(paths[0], labels, arguments.formats)  # imports libraries
        annotate = annotate_seconds(folder, labels, arguments.formats)
        encoder, with_reading = encoder_seconds(paths)
    seconds = {
        "`samclip annotate`": annotate,
        "image encoder": encoder,
        "image encoder, with reading and preprocessing": with_reading,
    }
    print(f"{arguments.num_images} scenes, {len(labels)} labels, formats {arguments.formats}")
    print(f"{torch.get_num_threads()} threads, {os.cpu_count()} cores\n")
    print("| part | images/s | share |\n|---|---|---|")
    for part, own in seconds.items():
        print(f"| {part} | {len(paths) / own:.1f} | {own / annotate:.2f} |")


if __name__ == "__main__":
    run()
