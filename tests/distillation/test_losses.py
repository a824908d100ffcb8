"""The losses on 2 x 2 masks, against values that are computed by hand."""

import math

import pytest
import torch

from samclip_hf.distillation.losses import (
    cosine_distillation_loss,
    hard_mask_distillation_loss,
    mask_distillation_loss,
    mask_iou,
)


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
    for loss in (mask_distillation_loss, hard_mask_distillation_loss):
        whole = loss(student, teacher, scores, scores.flip(0))
        halves = [loss(student[i], teacher[i], scores[i], scores.flip(0)[i]) for i in ([0, 1], [2, 3])]
        for name, part in whole.items():
            torch.testing.assert_close(part, (halves[0][name] + halves[1][name]) / 2)


def test_sams_own_losses_equal_a_loop_over_prompts_masks_and_pixels():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(2, 4, 3, 5, 6, generator=generator) for _ in range(2))
    student_iou, teacher_iou = (torch.rand(2, 4, 3, generator=generator) for _ in range(2))
    chosen, focals, dices = [], [], []
    for image in range(2):
        for prompt in range(4):
            best = max(range(3), key=lambda mask: teacher_iou[image, prompt, mask].item())
            target = (teacher[image, prompt, best] > 0).flatten().tolist()
            parts = []
            for mask in range(3):
                inside = [1 / (1 + math.exp(-x)) for x in student[image, prompt, mask].flatten().tolist()]
                focal = [
                    -0.25 * (1 - p) ** 2 * math.log(p) if t else -0.75 * p**2 * math.log(1 - p)
                    for p, t in zip(inside, target, strict=True)
                ]
                overlap = sum(p for p, t in zip(inside, target, strict=True) if t)
                dice = 1 - (2 * overlap + 1) / (sum(inside) + sum(target) + 1)
                parts.append((20 * sum(focal) / 30 + dice, sum(focal) / 30, dice, mask))
            _, focal, dice, mask = min(parts)
            chosen.append((image, prompt, mask))
            focals.append(focal)
            dices.append(dice)
    student.requires_grad_()
    parts = hard_mask_distillation_loss(student, teacher, student_iou, teacher_iou)
    assert parts["focal"].item() == pytest.approx(sum(focals) / 8, rel=1e-5)
    assert parts["dice"].item() == pytest.approx(sum(dices) / 8, rel=1e-5)
    assert parts["iou_head"].item() == pytest.approx((student_iou - teacher_iou).square().mean().item(), rel=1e-5)
    (20 * parts["focal"] + parts["dice"]).backward()
    has_gradient = student.grad.abs().sum(dim=(-2, -1)) > 0
    assert sorted(map(tuple, has_gradient.nonzero().tolist())) == sorted(chosen)
    assert len({mask for *_, mask in chosen}) > 1


def test_sams_focal_loss_is_torchvisions():
    ops = pytest.importorskip("torchvision.ops")
    student, teacher, scores = 3 * torch.randn(2, 4, 1, 5, 6), torch.randn(2, 4, 1, 5, 6), torch.rand(2, 4, 1)
    expected = ops.sigmoid_focal_loss(student, (teacher > 0).float(), alpha=0.25, gamma=2, reduction="mean")
    parts = hard_mask_distillation_loss(student, teacher, scores, scores)
    torch.testing.assert_close(parts["focal"], expected)


def test_the_weights_decide_which_mask_sams_losses_train():
    # Mask 0 has the lower focal loss, mask 1 the lower dice loss.
    teacher = masks([4.0, -4.0], [-4.0, -4.0]).expand(1, 1, 2, 2, 2)
    student = torch.cat([masks([-1.0, -9.0], [-9.0, -9.0]), masks([9.0, 3.0], [-9.0, -9.0])], dim=2).requires_grad_()
    scores = torch.zeros(1, 1, 2)
    for weights, trained in (((1.0, 0.0), 0), ((0.0, 1.0), 1)):
        parts = hard_mask_distillation_loss(student, teacher, scores, scores, *weights)
        (gradient,) = torch.autograd.grad(parts["focal"] + parts["dice"], student)
        assert gradient[0, 0].flatten(1).any(dim=1).tolist() == [mask == trained for mask in range(2)]


def test_mask_iou_of_a_known_example():
    student = torch.stack([masks([1.0, 1.0], [-1.0, -1.0]), masks([-1.0, -1.0], [-1.0, -1.0])])
    teacher = torch.stack([masks([1.0, -1.0], [1.0, -1.0]), masks([-2.0, -1.0], [-1.0, -1.0])])
    assert mask_iou(student, teacher).item() == pytest.approx((1 / 3 + 1) / 2)
