"""
Trains variants of the region loss that are not part of the package, in stage 1 of the miniature:

    python benchmarks/region_variants.py --seeds 0 1 2

- `none`: the recipe.
- `background`: the patches outside all masks are a further region.
- `shift`: the patches of a crop, shifted by whole patches, are also compared with those that an exponential moving
  average (EMA) of the student has for the whole image.

Each variant has 300 steps and is evaluated on a fifth of the scenes of seed 101. An interrupted command continues from
the finished runs in `runs/region_variants`. With `OMP_NUM_THREADS=1`, a run takes about 5 minutes.
"""

import argparse
import copy
import json
from pathlib import Path
from statistics import mean
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from transformers import TrainerCallback

from samclip_cli.train import build_trainer, parse_arguments, set_wait_policy
from samclip_hf import distillation
from samclip_hf.distillation import SamClipTrainer
from samclip_hf.images import normalize
from samclip_hf.miniature_lab.report import evaluate_all, load_student, report_tasks

METRICS = {
    "top-1, 64 px": ("classification:miniature@64", "top1"),
    "top-1, 128 px": ("classification:miniature@128", "top1"),
    "mIoU by text, patches": ("semantic:miniature@128", "mean_iou"),
    "mIoU by text, both heads": ("composed:miniature", "mean_iou"),
    "mIoU by text, both heads, paper's composition": ("composed:miniature@classes", "mean_iou"),
}
SCENE_FRACTION = 0.2


class BackgroundTrainer(SamClipTrainer):
    def sam_loss(self, model, images, content_sizes, region_masks=None, **rest):
        outside = 255 - region_masks.amax(dim=1, keepdim=True)
        return super().sam_loss(
            model, images, content_sizes, region_masks=torch.cat([region_masks, outside], dim=1), **rest
        )


class ShiftTrainer(SamClipTrainer):
    """The weight of the loss is that of the region loss of patches."""

    max_shift = 4  # patches
    decay = 0.99  # of the average, per step

    def __init__(self, model, *args, **kwargs):
        super().__init__(model, *args, **kwargs)
        self.average = copy.deepcopy(model).requires_grad_(False)
        self.rng = np.random.default_rng(0)
        self.add_callback(UpdateAverage(self))

    def sam_loss(self, model, images, content_sizes, **rest):
        loss = super().sam_loss(model, images, content_sizes, **rest)
        pixels = normalize(images, self.image_mean, self.image_std)
        row, column = self.rng.integers(0, self.max_shift + 1, size=2)
        side = pixels.shape[-1] // self._patch_size - self.max_shift
        top, left = row * self._patch_size, column * self._patch_size
        crop = pixels[..., top : top + side * self._patch_size, left : left + side * self._patch_size]
        with torch.no_grad():
            target = dense_embeds(self.average, pixels, self._patch_size)
        target = target[..., row : row + side, column : column + side]
        shift_loss = 1 - F.cosine_similarity(dense_embeds(model, crop, self._patch_size), target, dim=1).mean()
        self.record({"shift_loss": shift_loss})
        return loss + self.args.dense_loss_weight * shift_loss


def dense_embeds(model: torch.nn.Module, pixel_values: torch.Tensor, patch_size: int) -> torch.Tensor:
    """`(batch_size, projection_dim, grid_height, grid_width)`. The model returns them with those of segments."""
    grid_size = (pixel_values.shape[-2] // patch_size, pixel_values.shape[-1] // patch_size)
    segments = torch.ones(len(pixel_values), 1, *grid_size, dtype=torch.bool, device=pixel_values.device)
    return model(pixel_values=pixel_values, segments=segments).dense_embeds


class UpdateAverage(TrainerCallback):
    def __init__(self, trainer: ShiftTrainer):
        self.trainer = trainer

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        pairs = zip(self.trainer.average.parameters(), self.trainer.model.parameters(), strict=True)
        for average, own in pairs:
            average.lerp_(own, 1 - self.trainer.decay)


VARIANTS = {"none": SamClipTrainer, "background": BackgroundTrainer, "shift": ShiftTrainer}


def train(variant: str, seed: int, steps: int, output_dir: Path) -> None:
    """Trains a variant in `output_dir`, unless it has been trained."""
    if (output_dir / "model.safetensors").exists():
        return
    arguments = {"output_dir": output_dir, "seed": seed, "max_steps": steps, "save_strategy": "no"}
    words = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    with mock.patch.object(distillation, "SamClipTrainer", VARIANTS[variant]):
        trainer = build_trainer(parse_arguments(["miniature_stage1", *words]))
    trainer.train()
    trainer.save_model()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/region_variants"))
    arguments = parser.parse_args(argv)
    evaluators = report_tasks(fraction=SCENE_FRACTION)
    evaluators = {task: evaluators[task] for task, _ in METRICS.values()}
    rows: dict[str, list[list[float]]] = {variant: [] for variant in arguments.variants}
    for seed in arguments.seeds:
        for variant in arguments.variants:
            folder = arguments.output_dir / f"{variant}-seed{seed}-steps{arguments.steps}"
            train(variant, seed, arguments.steps, folder)
            results = folder / "metrics.json"
            if not results.exists():
                metrics = evaluate_all(load_student(folder), evaluators)
                results.write_text(json.dumps([metrics[key] for key in METRICS.values()]))
            rows[variant].append(json.loads(results.read_text()))
    print(f"\n{len(arguments.seeds)} seeds: mean (lowest - highest)\n\n| variant | {' | '.join(METRICS)} |")
    print("|---" * (len(METRICS) + 1) + "|")
    for variant, values in rows.items():
        cells = [f"{mean(own):.3f} ({min(own):.3f} - {max(own):.3f})" for own in zip(*values, strict=True)]
        print(f"| {variant} | {' | '.join(cells)} |")


if __name__ == "__main__":
    set_wait_policy()
    main()
