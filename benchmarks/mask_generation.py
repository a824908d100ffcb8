"""
Benchmark of automatic mask generation: the stock pipeline("mask-generation") with SAM-CLIP and with SAM.

    python benchmarks/mask_generation.py --image photo.jpg --longest_edge 1800

Both models have the miniature's weights and alternate in one process, so that other load on the machine affects both.
The time after the mask decoder depends on image size, number of points and number of masks above the thresholds, but
hardly on the weights. The miniature is not trained on photographs, so the default thresholds are low.
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
from samclip_hf.images import open_image
from samclip_hf.mask_generation_samclip import MASK_GENERATION_DEFAULTS
from samclip_hf.miniature.scenes import render

# A high crops_nms_thresh keeps many masks, so that the benchmark includes the time per mask.
OPTIONS = miniature.MASK_GENERATION | {
    "points_per_crop": MASK_GENERATION_DEFAULTS["points_per_crop"],
    "crops_nms_thresh": 0.97,
    "crops_n_layers": 0,
}


def time_methods(owner, names: list[str], seconds: dict[str, float]):
    """Wraps methods of `owner` so that every call adds its duration to `seconds`."""

    def timed(method, name):
        def call(*args, **kwargs):
            start = time.perf_counter()
            result = method(*args, **kwargs)
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
            return result

        return call

    for name in names:
        setattr(owner, name, timed(getattr(owner, name), name))


def create_pipeline(model, image_processor_class, seconds: dict[str, float]) -> MaskGenerationPipeline:
    image_processor = image_processor_class.from_pretrained(miniature.sam_teacher())
    time_methods(model, ["get_image_embeddings", "forward"], seconds)
    return MaskGenerationPipeline(model=model.eval(), image_processor=image_processor)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", help="an image file (default: a scene of the miniature)")
    parser.add_argument("--longest_edge", type=int, default=1800, help="size of the resized image, in pixels")
    for name, default in OPTIONS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)

    image = open_image(arguments.image) if arguments.image else Image.fromarray(render(seed=0, index=8).image)
    scale = arguments.longest_edge / max(image.size)
    image = image.resize([round(side * scale) for side in image.size])
    options = {name: getattr(arguments, name) for name in OPTIONS}

    sam = SamModel.from_pretrained(miniature.sam_teacher())
    samclip = SamClipModel.from_teachers(sam, miniature.clip_teacher())
    seconds: dict[str, dict[str, float]] = {"SAM": {}, "SAM-CLIP": {}}
    pipelines = {
        "SAM": create_pipeline(sam, SamImageProcessor, seconds["SAM"]),
        "SAM-CLIP": create_pipeline(samclip, SamClipImageProcessor, seconds["SAM-CLIP"]),
    }
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in pipelines}
    outputs = {}
    for _ in range(arguments.repeats):
        for name, generate in pipelines.items():
            seconds[name].clear()
            start = time.perf_counter()
            outputs[name] = generate(image, **options)
            total = time.perf_counter() - start
            runs[name].append((total, total - sum(seconds[name].values())))

    sam_masks, samclip_masks = ([np.asarray(mask) for mask in output["masks"]] for output in outputs.values())
    ious = [(a & b).sum() / max(1, (a | b).sum()) for a, b in zip(sam_masks, samclip_masks, strict=True)]
    differences = (outputs["SAM"]["scores"] - outputs["SAM-CLIP"]["scores"]).abs().tolist()
    print(
        f"{image.width} x {image.height} pixels, {options}, {arguments.threads} threads, {arguments.repeats} runs; "
        f"torch {torch.__version__}, transformers {transformers.__version__}\n\n"
        f"Equal masks: {len(ious)} pairs, lowest IoU {min(ious, default=1):.6f}, largest difference of scores "
        f"{max(differences, default=0):.1e}\n\n"
        "| seconds, median of the runs | SAM | SAM-CLIP | ratio, median (lowest - highest) |\n|---|---|---|---|"
    )
    for column, row in enumerate(("whole pipeline", "without encoder and mask decoder")):
        sam_seconds, samclip_seconds = ([run[column] for run in runs[name]] for name in pipelines)
        ratios = sorted(a / b for a, b in zip(sam_seconds, samclip_seconds, strict=True))
        print(
            f"| {row} | {statistics.median(sam_seconds):.2f} | {statistics.median(samclip_seconds):.2f} | "
            f"{statistics.median(ratios):.1f} ({ratios[0]:.1f} - {ratios[-1]:.1f}) |"
        )


if __name__ == "__main__":
    main()
