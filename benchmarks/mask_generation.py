"""
Everything mode, SAM-CLIP against SAM: the stock pipeline("mask-generation") on both, with the same weights.

    python benchmarks/mask_generation.py --image photo.jpg --longest_edge 1800

The two run in turns in one process, so that what else the machine does hits both. The weights are the miniature's: the
time after the mask decoder hardly depends on the weights, but on the sizes and on how many masks pass the thresholds,
which are set low because photographs are not what this SAM was trained on.
"""

import argparse
import statistics
import time

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import MaskGenerationPipeline, SamImageProcessor, SamModel

from samclip_hf import SamClipImageProcessor, SamClipModel, miniature
from samclip_hf.miniature.scenes import render


def stopwatch(owner, names: list[str], seconds: dict[str, float]):
    """Adds up in `seconds` what calls of the owner's methods take."""

    def timed(method, name):
        def call(*args, **kwargs):
            start = time.perf_counter()
            result = method(*args, **kwargs)
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
            return result

        return call

    for name in names:
        setattr(owner, name, timed(getattr(owner, name), name))


def generator(model, image_processor_class, seconds: dict[str, float]) -> MaskGenerationPipeline:
    image_processor = image_processor_class.from_pretrained(miniature.sam_teacher())
    stopwatch(model, ["get_image_embeddings", "forward"], seconds)
    return MaskGenerationPipeline(model=model.eval(), image_processor=image_processor)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", help="a photograph; by default, a drawn scene")
    parser.add_argument("--longest_edge", type=int, default=1800, help="what the image is resized to")
    parser.add_argument("--crops_n_layers", type=int, default=0)
    parser.add_argument("--points_per_crop", type=int, default=32)
    parser.add_argument("--pred_iou_thresh", type=float, default=0.6)
    parser.add_argument("--stability_score_thresh", type=float, default=0.3)
    parser.add_argument("--crops_nms_thresh", type=float, default=0.97)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    image = Image.open(arguments.image) if arguments.image else Image.fromarray(render(seed=0, index=8).image)
    scale = arguments.longest_edge / max(image.size)
    image = image.convert("RGB").resize([round(side * scale) for side in image.size])
    options = {
        name: getattr(arguments, name)
        for name in (
            "crops_n_layers",
            "points_per_crop",
            "pred_iou_thresh",
            "stability_score_thresh",
            "crops_nms_thresh",
        )
    }

    sam = SamModel.from_pretrained(miniature.sam_teacher())
    samclip = SamClipModel.from_teachers(sam, miniature.clip_teacher())
    seconds: dict[str, dict[str, float]] = {"SAM": {}, "SAM-CLIP": {}}
    generators = {
        "SAM": generator(sam, SamImageProcessor, seconds["SAM"]),
        "SAM-CLIP": generator(samclip, SamClipImageProcessor, seconds["SAM-CLIP"]),
    }
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in generators}
    outputs = {}
    for _ in range(arguments.repeats):
        for name, generate in generators.items():
            seconds[name].clear()
            start = time.perf_counter()
            outputs[name] = generate(image, **options)
            total = time.perf_counter() - start
            runs[name].append((total, total - sum(seconds[name].values())))

    masks = {name: [np.asarray(mask) for mask in output["masks"]] for name, output in outputs.items()}
    ious = [(a & b).sum() / max(1, (a | b).sum()) for a, b in zip(masks["SAM"], masks["SAM-CLIP"], strict=True)] or [
        1.0
    ]
    difference = (outputs["SAM"]["scores"] - outputs["SAM-CLIP"]["scores"]).abs()
    print(
        f"{image.width} x {image.height} pixels, {options}, {arguments.threads} threads, {arguments.repeats} runs; "
        f"torch {torch.__version__}, transformers {transformers.__version__}\n\n"
        f"Same masks: {len(masks['SAM'])} and {len(masks['SAM-CLIP'])}, lowest IoU {min(ious):.6f}, largest "
        f"difference of scores {difference.max() if len(difference) else 0:.1e}\n\n"
        "| seconds, median of the runs | SAM | SAM-CLIP | ratio, median (lowest - highest) |\n|---|---|---|---|"
    )
    for number, row in enumerate(("whole pipeline", "without encoder and mask decoder")):
        pairs = [(stock[number], ours[number]) for stock, ours in zip(runs["SAM"], runs["SAM-CLIP"], strict=True)]
        stock, ours = (statistics.median(times) for times in zip(*pairs, strict=True))
        ratios = sorted(stock / ours for stock, ours in pairs)
        print(
            f"| {row} | {stock:.2f} | {ours:.2f} | {statistics.median(ratios):.1f} "
            f"({ratios[0]:.1f} - {ratios[-1]:.1f}) |"
        )


if __name__ == "__main__":
    main()
