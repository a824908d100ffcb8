"""
Benchmark of tiled inference: peak memory and time by image size, with and without tiles.

    python benchmarks/tiles.py --sizes 1024x1024 2048x2048 4096x4096 --tiles 512 0

Every row is measured in a new process with the miniature, on an image that repeats one of its scenes. The first column
of memory is the peak memory of the process, the second one is without that of the process before the prediction, and
the third one is the image alone, three bytes for each pixel.
"""

import argparse
import resource
import subprocess
import sys
import time

import torch
from PIL import Image
from transformers import pipeline

from samclip_hf import SamClipMaskGenerationPipeline, miniature
from samclip_hf.miniature.scenes import BACKGROUND_PROMPTS, CLASS_NAMES, render

MODES = ("panoptic", "semantic", "masks")


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024**2 if sys.platform == "darwin" else 1024)


def measure(mode: str, width: int, height: int, tile: int | None, points: int) -> None:
    """Prints peak memory before and after a prediction in MB, seconds, and the number of segments."""
    if mode == "masks":
        predict = pipeline(
            "mask-generation", model=miniature.checkpoint(), pipeline_class=SamClipMaskGenerationPipeline
        )
        options = miniature.MASK_GENERATION | {"points_per_crop": points}
    else:
        predict = pipeline("zero-shot-image-segmentation", model=miniature.checkpoint())
        options = {"candidate_labels": list(CLASS_NAMES), "hypothesis_template": "a {}", "subtask": mode}
        if mode == "panoptic":
            options["background"] = list(BACKGROUND_PROMPTS)
    scene = render(seed=0, index=8).image
    predict(Image.fromarray(scene), **options)  # memory that does not depend on the image
    before = peak_megabytes()
    side = 2 * len(scene)
    repeated = Image.fromarray(scene).resize((side, side))
    image = Image.new("RGB", (width, height))
    for top in range(0, height, side):
        for left in range(0, width, side):
            image.paste(repeated, (left, top))
    start = time.perf_counter()
    result = predict(image, **options, tile=tile)
    masks = result["masks"] if mode == "masks" else result
    for mask in masks:  # one at a time
        assert mask is not None
    print(before, peak_megabytes(), time.perf_counter() - start, len(masks))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = ["1024x1024", "2048x2048", "4096x4096"]
    parser.add_argument("--sizes", nargs="+", default=sizes, help="WIDTHxHEIGHT of the images in pixels")
    parser.add_argument("--tiles", type=int, nargs="+", default=[512, 0], help="sides of the tiles, 0 for none")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--points", type=int, default=4, help="everything mode: points on a side of the grid")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--row", nargs=3, help=argparse.SUPPRESS)  # mode, size and tile of the new process
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    if arguments.row:
        mode, size, tile = arguments.row
        measure(mode, *map(int, size.split("x")), int(tile) or None, arguments.points)
        return
    print("| mode | image | tile | peak, MB | increase, MB | image alone, MB | seconds | segments |")
    print("|---|---|---|---|---|---|---|---|")
    for mode in arguments.modes:
        for size in arguments.sizes:
            for tile in arguments.tiles:
                command = [sys.executable, __file__, "--points", str(arguments.points)]
                command += ["--threads", str(arguments.threads), "--row", mode, size, str(tile)]
                output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                before, after, seconds, count = map(float, output.split()[-4:])
                width, height = map(int, size.split("x"))
                print(
                    f"| {mode} | {width} x {height} | {tile or 'none'} | {after:.0f} | {after - before:.0f} | "
                    f"{3 * width * height / 1e6:.0f} | {seconds:.1f} | {count:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
