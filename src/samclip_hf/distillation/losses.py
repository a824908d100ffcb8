"""
The distillation losses (paper, section 3), as functions of tensors that return named parts.

Every part is a mean over the batch: the mean of two micro-batches of equal size is the loss of the whole batch. Every
part has its minimum, with zero gradient, where the student equals the teacher, except focal and dice loss of
`hard_mask_distillation_loss`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..segmentation_samclip import focal_and_dice_losses


def cosine_distillation_loss(student_embeds: Tensor, teacher_embeds: Tensor) -> dict[str, Tensor]:
    r"""
    L_CLIP = 1 - cos(student, teacher).

    Args:
        student_embeds, teacher_embeds (`torch.Tensor` of shape `(batch_size, projection_dim)`):
            Embeddings, normalized or not.

    Returns:
        `dict[str, torch.Tensor]`: `cosine`, between 0 and 2.

    Raises:
        ValueError: If the shapes differ.
    """
    if student_embeds.shape != teacher_embeds.shape:
        raise ValueError(
            f"Student and teacher embeddings must have the same shape, got {tuple(student_embeds.shape)} and "
            f"{tuple(teacher_embeds.shape)}."
        )
    return {"cosine": 1 - F.cosine_similarity(student_embeds.float(), teacher_embeds.float(), dim=-1).mean()}


def mask_distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, student_iou: Tensor, teacher_iou: Tensor
) -> dict[str, Tensor]:
    r"""
    L_SAM: focal and dice loss between the mask logits of student and teacher for the same prompts, and the squared
    error of the IoU head.

    SAM trains against ground-truth masks, back-propagates the lowest loss of three masks, and regresses the IoU with
    the ground truth. Here the target is the output of a frozen teacher ("as in SAM, adapted for distillation", section
    3), so three things differ:

    - *Soft targets* t = sigmoid(teacher logit). With SAM's focal weight (1 - p_t)^2 and dice denominator sum(p) +
      sum(t), the losses do not have their minimum at p = t for soft t. They have it with the weight |t - p|^2 (quality
      focal loss, Li et al., arXiv 2006.04388), which is the same for hard targets, and with the denominator sum(p^2) +
      sum(t^2) (V-Net, arXiv 1606.04797).
    - *All masks* contribute: mask i of the student is compared with mask i of the teacher. The mask tokens of the
      student start as copies of the teacher's and have the same meaning (whole, part, subpart). If only the lowest
      loss was used, the other masks could drift.
    - The *IoU head* learns the prediction of the teacher, because there is no ground-truth mask.

    Args:
        student_logits, teacher_logits (`torch.Tensor` of shape `(batch_size, num_prompts, num_masks, height, width)`):
            Mask logits.
        student_iou, teacher_iou (`torch.Tensor` of shape `(batch_size, num_prompts, num_masks)`):
            Predicted IoUs.

    Returns:
        `dict[str, torch.Tensor]`: `focal`, `dice` and `iou_head`, unweighted.
    """
    student_logits, target = student_logits.float(), teacher_logits.float().sigmoid()
    probability = student_logits.sigmoid()
    error = (target - probability).square()
    cross_entropy = F.binary_cross_entropy_with_logits(student_logits, target, reduction="none")
    # 1 - (2 sum(pt) + 1) / (sum(p^2) + sum(t^2) + 1), rearranged to be exactly 0 at p = t. As in SAM, the 1 avoids a
    # division by zero for empty masks.
    squares = (probability.square() + target.square()).sum(dim=(-2, -1))
    dice = error.sum(dim=(-2, -1)) / (squares + 1)
    return {
        "focal": (error * cross_entropy).mean(),
        "dice": dice.mean(),
        "iou_head": F.mse_loss(student_iou.float(), teacher_iou.float()),
    }


def hard_mask_distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_iou: Tensor,
    teacher_iou: Tensor,
    focal_weight: float = 20.0,
    dice_weight: float = 1.0,
) -> dict[str, Tensor]:
    r"""
    L_SAM as in SAM's training (Kirillov et al. 2023, appendix A), with a mask of the teacher in place of the ground
    truth: the teacher's mask (logit > 0) with the highest predicted IoU is the target, and only the student's mask
    with the lowest loss is back-propagated.

    Focal and dice loss are [`focal_and_dice_losses`]. The IoU head learns the teacher's predictions, as in
    [`mask_distillation_loss`].

    Unlike [`mask_distillation_loss`], focal and dice loss are not zero where the student equals the teacher: they make
    the logits larger.

    Args:
        student_logits, teacher_logits (`torch.Tensor` of shape `(batch_size, num_prompts, num_masks, height, width)`):
            Mask logits.
        student_iou, teacher_iou (`torch.Tensor` of shape `(batch_size, num_prompts, num_masks)`):
            Predicted IoUs.
        focal_weight, dice_weight (`float`):
            Weights of both parts in the loss that is compared between masks. By default SAM's.

    Returns:
        `dict[str, torch.Tensor]`: `focal`, `dice` and `iou_head`, unweighted.
    """
    best = teacher_iou.argmax(dim=2, keepdim=True)[..., None, None]
    target = teacher_logits.take_along_dim(best, dim=2).gt(0).expand_as(student_logits)
    focal, dice = focal_and_dice_losses(student_logits, target)
    lowest = (focal_weight * focal + dice_weight * dice).argmin(dim=2, keepdim=True)
    return {
        "focal": focal.take_along_dim(lowest, dim=2).mean(),
        "dice": dice.take_along_dim(lowest, dim=2).mean(),
        "iou_head": F.mse_loss(student_iou.float(), teacher_iou.float()),
    }


def region_distillation_loss(
    segment_embeds: Tensor, dense_embeds: Tensor, segments: Tensor, teacher_embeds: Tensor
) -> dict[str, Tensor]:
    r"""
    L_region: the student's embeddings of regions against the teacher's. It is not part of the paper, which distills
    one embedding of each image. CLIPSelf (Wu et al., arXiv 2310.01403) distills embeddings of crops into dense
    features.

    Args:
        segment_embeds (`torch.Tensor` of shape `(batch_size, num_regions, projection_dim)`):
            The student's embeddings of the regions.
        dense_embeds (`torch.Tensor` of shape `(batch_size, projection_dim, grid_height, grid_width)`):
            The student's embeddings of the patches, of length 1.
        segments (`torch.Tensor` of shape `(batch_size, num_regions, grid_height, grid_width)`, `bool`):
            The patches of each region. Regions without patches are ignored. The loss of an image without regions is 0.
        teacher_embeds (`torch.Tensor` of shape `(batch_size, num_regions, projection_dim)`):
            The teacher's embeddings of the regions, normalized or not.

    Returns:
        `dict[str, torch.Tensor]`: `segment`, the mean of 1 - cos(segment, teacher) over the regions of an image, and
        `dense`, the mean of 1 - cos(patch, teacher) over the patches of a region and the regions of an image; both are
        means over the images.
    """
    teacher_embeds = F.normalize(teacher_embeds.float(), dim=-1)
    num_patches = segments.sum(dim=(-2, -1))
    is_region = num_patches > 0
    num_regions = is_region.sum(dim=1).clamp_min(1)

    def mean_of_images(losses: Tensor) -> Tensor:  # (batch_size, num_regions)
        return (losses.masked_fill(~is_region, 0).sum(dim=1) / num_regions).mean()

    segment_cosine = F.cosine_similarity(segment_embeds.float(), teacher_embeds, dim=-1)
    patch_cosine = (teacher_embeds @ dense_embeds.float().flatten(2)).unflatten(2, dense_embeds.shape[-2:])
    dense_cosine = (patch_cosine * segments).sum(dim=(-2, -1)) / num_patches.clamp_min(1)
    return {"segment": mean_of_images(1 - segment_cosine), "dense": mean_of_images(1 - dense_cosine)}


@torch.no_grad()
def mask_iou(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """
    Returns the mean IoU between the masks (logit > 0) of student and teacher. A metric without gradient.

    Args:
        student_logits, teacher_logits (`torch.Tensor` of shape `(..., height, width)`):
            Mask logits. The IoU of two empty masks is 1.
    """
    student, teacher = student_logits > 0, teacher_logits > 0
    intersection = (student & teacher).sum(dim=(-2, -1))
    union = (student | teacher).sum(dim=(-2, -1))
    return torch.where(union > 0, intersection / union.clamp_min(1), 1.0).mean()
