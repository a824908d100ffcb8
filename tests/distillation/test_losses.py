"""The losses on 2 x 2 masks, against values that are computed by hand."""

import math

import pytest
import torch

from samclip_hf.distillation.losses import cosine_distillation_loss, mask_distillation_loss, mask_iou


def masks(*rows: list[float]) -> torch.Tensor:
    """Mask logits `(1, 1, 1, 2, 2)`."""
    return torch.tensor(rows).view(1, 1, 1, 2, 2)


def logit(p: float) -> float:
    return math.log(p / (1 - p))


SCORE = torch.zeros(1, 1, 1)


def test_cosine_loss_of_orthogonal_and_equal_directions():
    student = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    teacher = torch.tensor([[5.0, 0.0], [7.0, 0.0]])
    assert cosine_distillation_loss(student, teacher)["cosine"].item() == pytest.approx((0 + 1) / 2)


def test_mask_loss_of_a_known_example():
    # Student p = 1/2 everywhere; teacher t = 0.8, 0.2, 0.8, 0.2. |t - p|^2 = 0.09, cross entropy = log 2.
    student, teacher = masks([0.0, 0.0], [0.0, 0.0]), masks([logit(0.8), logit(0.2)], [logit(0.8), logit(0.2)])
    parts = mask_distillation_loss(student, teacher, torch.tensor([[[0.5]]]), torch.tensor([[[0.9]]]))
    assert parts["focal"].item() == pytest.approx(0.09 * math.log(2), rel=1e-5)
    overlap, squares = 4 * 0.5 * 0.5, 4 * 0.25 + 2 * 0.64 + 2 * 0.04
    assert parts["dice"].item() == pytest.approx(1 - (2 * overlap + 1) / (squares + 1), rel=1e-5)
    assert parts["iou_head"].item() == pytest.approx(0.16, rel=1e-5)


def test_mask_i_of_the_student_is_compared_with_mask_i_of_the_teacher():
    teacher = torch.randn(1, 2, 3, 2, 2)
    swapped = teacher.flip(2)
    scores = torch.rand(1, 2, 3)
    assert mask_distillation_loss(teacher, teacher, scores, scores)["dice"] == 0
    assert mask_distillation_loss(swapped, teacher, scores, scores)["dice"] > 0


def test_losses_and_gradients_are_zero_if_student_equals_teacher():
    teacher_masks, teacher_iou = torch.randn(2, 3, 3, 4, 4) * 4, torch.rand(2, 3, 3)
    student_masks, student_iou = teacher_masks.clone().requires_grad_(), teacher_iou.clone().requires_grad_()
    parts = mask_distillation_loss(student_masks, teacher_masks, student_iou, teacher_iou)
    assert {name: part.item() for name, part in parts.items()} == {"focal": 0, "dice": 0, "iou_head": 0}
    sum(parts.values()).backward()
    assert student_masks.grad.abs().max() == 0
    assert student_iou.grad.abs().max() == 0

    teacher = torch.randn(4, 8)
    student = teacher.clone().requires_grad_()
    loss = cosine_distillation_loss(student, teacher)["cosine"]
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert student.grad.abs().max() < 1e-6


@pytest.mark.parametrize("part", ["focal", "dice"])
def test_soft_targets_are_a_minimum(part):
    teacher = torch.randn(1, 1, 1, 2, 2)
    for step in torch.randn(20, 1, 1, 1, 2, 2) * 0.1:
        assert mask_distillation_loss(teacher + step, teacher, SCORE, SCORE)[part] > 0


def test_the_loss_of_a_batch_is_the_mean_of_its_halves():
    student, teacher, scores = torch.randn(4, 2, 3, 2, 2), torch.randn(4, 2, 3, 2, 2), torch.rand(4, 2, 3)
    whole = mask_distillation_loss(student, teacher, scores, scores.flip(0))
    halves = [mask_distillation_loss(student[i], teacher[i], scores[i], scores.flip(0)[i]) for i in ([0, 1], [2, 3])]
    for name, part in whole.items():
        torch.testing.assert_close(part, (halves[0][name] + halves[1][name]) / 2)


def test_mask_iou_of_a_known_example():
    student = torch.stack([masks([1.0, 1.0], [-1.0, -1.0]), masks([-1.0, -1.0], [-1.0, -1.0])])
    teacher = torch.stack([masks([1.0, -1.0], [1.0, -1.0]), masks([-2.0, -1.0], [-1.0, -1.0])])
    assert mask_iou(student, teacher).item() == pytest.approx((1 / 3 + 1) / 2)
