"""
The two distillation losses (paper, section 3) as functions of tensors that return named parts.

Every part is a mean over the batch, so that micro-batches of equal size add up, and is smallest, with zero gradient,
exactly where the student equals the teacher.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def cosine_distillation_loss(student_embeds: Tensor, teacher_embeds: Tensor) -> dict[str, Tensor]:
    r"""
    L_CLIP = 1 - cos(student, teacher).

    student_embeds, teacher_embeds (`torch.Tensor` of shape `(batch_size, projection_dim)`):
        Of any length.

    Returns `cosine`, between 0 and 2. Raises `ValueError` where the shapes differ.
    """
    if student_embeds.shape != teacher_embeds.shape:
        raise ValueError(f"Student and teacher differ: {student_embeds.shape} and {teacher_embeds.shape}.")
    return {"cosine": 1 - F.cosine_similarity(student_embeds.float(), teacher_embeds.float(), dim=-1).mean()}


def mask_distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, student_iou: Tensor, teacher_iou: Tensor
) -> dict[str, Tensor]:
    r"""
    L_SAM: focal and dice between the student's mask logits and the frozen teacher's mask scores for the same prompts,
    and the squared error of the IoU head.

    SAM trains against hard masks, back-propagates the best of three, and regresses the true IoU. Here the target is a
    teacher's answer ("as in SAM, adapted for distillation", section 3), so three things differ:

    - *Soft targets* t = sigmoid(teacher logit). SAM's focal weight (1 - p_t)^2 and its dice denominator sum(p) +
      sum(t) would pull p away from a soft t. |t - p|^2 (quality focal loss, Li et al., arXiv 2006.04388), which is the
      same for hard targets, and sum(p^2) + sum(t^2) (V-Net, arXiv 1606.04797) have their minimum at p = t.
    - *Every mask counts*, mask i of the student against mask i of the teacher: the student's mask tokens start as
      copies of the teacher's, so they mean the same (whole, part, subpart), and choosing the best one would leave the
      others to drift.
    - The *IoU head* learns the teacher's prediction: no true mask takes part.

    student_logits, teacher_logits (`torch.Tensor` of shape `(batch_size, num_prompts, num_masks, height, width)`):
        Mask logits.
    student_iou, teacher_iou (`torch.Tensor` of shape `(batch_size, num_prompts, num_masks)`):
        Predicted IoUs.

    Returns `focal`, `dice` and `iou_head`, not weighted.
    """
    student_logits, target = student_logits.float(), teacher_logits.float().sigmoid()
    probability = student_logits.sigmoid()
    error = (target - probability).square()
    cross_entropy = F.binary_cross_entropy_with_logits(student_logits, target, reduction="none")
    # 1 - (2 sum(pt) + 1) / (sum(p^2) + sum(t^2) + 1), written so that it is exactly 0 at p = t. The 1 is SAM's too: it
    # keeps empty masks from dividing by zero.
    squares = (probability.square() + target.square()).sum(dim=(-2, -1))
    dice = error.sum(dim=(-2, -1)) / (squares + 1)
    return {
        "focal": (error * cross_entropy).mean(),
        "dice": dice.mean(),
        "iou_head": F.mse_loss(student_iou.float(), teacher_iou.float()),
    }


@torch.no_grad()
def mask_iou(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean IoU between binarised masks of any equal shape `(..., height, width)`; two empty masks agree. A figure to
    watch, not to train on."""
    student, teacher = student_logits > 0, teacher_logits > 0
    intersection = (student & teacher).sum(dim=(-2, -1))
    union = (student | teacher).sum(dim=(-2, -1))
    return torch.where(union > 0, intersection / union.clamp_min(1), 1.0).mean()
