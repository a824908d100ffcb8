"""
Measures what bfloat16 does to the gradients of the SAM loss, in the miniature.

    python benchmarks/training_precision.py

For a student that equals the SAM teacher, all gradients are rounding errors: the table has their norms. For the
shipped student, it has the norm of the error relative to the gradient in float32. Rows differ in what is computed in
bfloat16; the trainer uses "image encoder". The prompts are points in eight scenes of seed 7.
"""

import argparse

import numpy as np
import torch

from samclip_hf import SamClipModel, miniature
from samclip_hf.distillation import SamTeacher
from samclip_hf.distillation.losses import mask_distillation_loss
from samclip_hf.distillation.prompts import point_from_mask
from samclip_hf.images import normalize
from samclip_hf.miniature.scenes import render

NUM_SCENES, NUM_POINTS = 8, 6
PARTS = ("vision_encoder", "mask_decoder")
# What is computed in bfloat16: the student's image encoder, its mask decoder, and the teacher.
ROWS = {
    "nothing": (False, False, False),
    "image encoder": (True, False, False),
    "image encoder, teacher": (True, False, True),
    "image encoder, mask decoder": (True, True, False),
    "image encoder, mask decoder, teacher": (True, True, True),
}


def draw_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Returns images `(8, 3, 128, 128)`, uint8, and points `(8, 6, 1, 2)`."""
    rng = np.random.default_rng(0)
    scenes = [scene for index in range(3 * NUM_SCENES) if len((scene := render(7, index)).masks)][:NUM_SCENES]
    points = [
        [[point_from_mask(scene.masks[number % len(scene.masks)], rng)] for number in range(NUM_POINTS)]
        for scene in scenes
    ]
    images = np.stack([scene.image for scene in scenes])
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.tensor(np.array(points))


def gradients(student: SamClipModel, teacher: SamTeacher, row: str) -> dict[str, torch.Tensor]:
    """Returns the gradient of lambda * L_SAM with the weights of the recipes, for each part of the student."""
    in_encoder, in_decoder, in_teacher = ROWS[row]
    images, points = draw_batch()
    prompts = {"input_points": points, "input_labels": torch.ones(points.shape[:3], dtype=torch.long)}
    sizes = torch.tensor([images.shape[-2:]] * len(images))
    student.train(not in_decoder)  # only in training, the mask decoder is excluded from autocast
    student.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=in_teacher):
        teacher_masks, teacher_iou = teacher(images, sizes, **prompts)
    with torch.autocast("cpu", torch.bfloat16, enabled=in_encoder):
        outputs = student(pixel_values=normalize(images, teacher.image_mean, teacher.image_std), **prompts)
    parts = mask_distillation_loss(outputs.pred_masks, teacher_masks, outputs.iou_scores, teacher_iou)
    (10 * (20 * parts["focal"] + parts["dice"] + parts["iou_head"])).backward()
    return {
        part: torch.cat([p.grad.flatten() for p in student.get_submodule(part).parameters() if p.grad is not None])
        for part in PARTS
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    teacher = SamTeacher(miniature.sam_teacher())
    equal = SamClipModel.from_teachers(miniature.sam_teacher(), miniature.clip_teacher())
    shipped = SamClipModel.from_pretrained(miniature.checkpoint())
    exact = gradients(shipped, teacher, "nothing")
    titles = [f"{what}, {part}" for what in ("norm for equal student", "error for shipped student") for part in PARTS]
    print(f"| in bfloat16 | {' | '.join(titles)} |")
    print("|---|---|---|---|---|")
    for row in ROWS:
        norms = [gradient.norm() for gradient in gradients(equal, teacher, row).values()]
        errors = [
            (g - exact[part]).norm() / exact[part].norm() for part, g in gradients(shipped, teacher, row).items()
        ]
        print(f"| {row} | " + " | ".join(f"{float(value):.3f}" for value in [*norms, *errors]) + " |", flush=True)


if __name__ == "__main__":
    main()
