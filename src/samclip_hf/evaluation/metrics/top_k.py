"""Top-k accuracy of classification."""

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Features, List, Value

from .accumulating import AccumulatingMetric


class TopK(AccumulatingMetric):
    r"""
    The fraction of images whose class is among the k classes with the highest scores. Among classes with equal scores,
    the first ones count, as in `argmax`. Classes with the same name, such as ImageNet's two classes "missile", have
    equal scores.

    predictions (`torch.Tensor`, `numpy.ndarray` or lists, of shape `(num_images, num_labels)`):
        Scores. They are evaluated on their device.
    references (integers of shape `(num_images,)`):
        The true classes.
    num_labels (`int`):
        The number of classes.
    ks (`tuple[int, ...]`):
        Values of k. 1 is always included; values above `num_labels` are left out.

    `compute` returns `top1` and so on; `mean_per_class_top1`, the mean over the classes that occur; and
    `correct_per_label` (for k = 1) and `num_per_label`. Raises `ValueError` if shapes differ, a score is NaN or a
    class is not valid.
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
                f"Scores must be (num_images, {self.num_labels}) and references (num_images,), "
                f"got {tuple(scores.shape)} and {tuple(labels.shape)}."
            )
        if scores.isnan().any():
            raise ValueError("A score is NaN.")
        if labels.is_floating_point() or labels.min() < 0 or labels.max() >= self.num_labels:
            raise ValueError(f"References must be integers from 0 to {self.num_labels - 1}.")
        labels = labels.long()
        own = scores.gather(1, labels[:, None])
        comes_first = torch.arange(self.num_labels, device=scores.device) < labels[:, None]
        num_ahead = ((scores > own) | ((scores == own) & comes_first)).sum(dim=1)
        hits = {f"top{k}": labels[num_ahead < k] for k in self.ks} | {"num": labels}
        return {key: classes.bincount(minlength=self.num_labels).cpu().numpy() for key, classes in hits.items()}

    def _result(self, state: dict[str, Any]) -> dict[str, Any]:
        num, correct = state["num"], state["top1"]
        occurs = num > 0
        return {f"top{k}": (state[f"top{k}"].sum() / num.sum()).item() for k in self.ks} | {
            "mean_per_class_top1": (correct[occurs] / num[occurs]).mean().item(),
            "correct_per_label": correct.tolist(),
            "num_per_label": num.tolist(),
        }
