"""Accuracy of classification, by the best and by the k best classes."""

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Features, List, Value

from .accumulating import AccumulatingMetric


class TopK(AccumulatingMetric):
    r"""
    The share of images whose class is among the k with the highest scores. Equal scores count against the true class,
    so that a model which answers the same for all has 0, not 1 (k < num_labels).

    predictions (`torch.Tensor`, `numpy.ndarray` or lists, of shape `(num_images, num_labels)`):
        Scores, on any device; the counts alone leave it.
    references (integers of shape `(num_images,)`):
        The true classes.
    ks (`tuple[int, ...]`):
        1 is always among them; those above `num_labels` are left out.

    `compute` returns `top1` and so on; `mean_per_class_top1`, over the classes that occur; `correct_per_label`, by the
    best class, and `num_per_label`. `ValueError` where a shape does not fit, a score is not a number or a class is not
    one.
    """

    input_features = Features({"predictions": List(Value("float32")), "references": Value("int64")})

    def __init__(self, num_labels: int, ks: Sequence[int] = (1, 5), **module_arguments: Any):
        super().__init__(**module_arguments)
        self.num_labels = num_labels
        self.ks = sorted(k for k in {1, *ks} if k <= num_labels)

    def _measure(self, predictions: Any, references: Any) -> dict[str, Any]:
        scores = torch.stack([torch.as_tensor(row) for row in predictions])
        labels = torch.as_tensor(references, device=scores.device)
        if scores.shape[1:] != (self.num_labels,) or labels.ndim != 1:
            raise ValueError(
                f"Scores are (num_images, {self.num_labels}) and references (num_images,), "
                f"not {tuple(scores.shape)} and {tuple(labels.shape)}."
            )
        if scores.isnan().any():
            raise ValueError("A score is not a number.")
        if labels.is_floating_point() or labels.min() < 0 or labels.max() >= self.num_labels:
            raise ValueError(f"References are integers, 0 to {self.num_labels - 1}.")
        labels = labels.long()
        num_ahead = (scores >= scores.gather(1, labels[:, None])).sum(dim=1) - 1  # the true class is among them
        answers = {f"top{k}": labels[num_ahead < k] for k in self.ks} | {"num": labels}
        return {key: some.bincount(minlength=self.num_labels).cpu().numpy() for key, some in answers.items()}

    def _result(self, state: dict[str, Any]) -> dict[str, Any]:
        num, correct = state["num"], state["top1"]
        occurs = num > 0
        return {f"top{k}": (state[f"top{k}"].sum() / num.sum()).item() for k in self.ks} | {
            "mean_per_class_top1": (correct[occurs] / num[occurs]).mean().item(),
            "correct_per_label": correct.tolist(),
            "num_per_label": num.tolist(),
        }
