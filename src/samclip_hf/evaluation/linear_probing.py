"""Linear classification on frozen features (paper, section 5, table 4)."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from .adapters import ModelAdapter
from .metrics import TopK
from .probing import Probing

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)


class LinearProbing(Probing):
    """
    Fits a logistic regression to standardized pooled features, by L-BFGS until convergence. The L2 penalty is the
    value of `PENALTIES` with the best accuracy on a tenth of the training images, which is held out.
    """

    name = "linear-probe"

    def describe(self) -> dict[str, Any]:
        return {
            **super().describe(),
            "pooling": "CLIP: what its projection takes; CLIP head: what its MLP takes; else the mean over patches",
            "classifier": f"logistic regression by L-BFGS, L2 penalty among {PENALTIES} chosen on a tenth held out",
        }

    def features(self, model: ModelAdapter, images: list[Image.Image], size: int) -> dict[str, Tensor]:
        return model.pooled_features(images, size)

    def probe(
        self, model: ModelAdapter, train: dict[str, np.ndarray], test: dict[str, np.ndarray]
    ) -> dict[str, float | None]:
        num_labels = len(self.train.names or [])
        train_labels, test_labels = (
            torch.tensor([sample.label for sample in data.samples]) for data in (self.train, self.test)
        )
        metrics: dict[str, float | None] = {}
        for source in train:
            features = [torch.from_numpy(split[source].astype(np.float32)) for split in (train, test)]
            scores = self._classify(features[0], train_labels, features[1], num_labels, model.model.device)
            metric = TopK(num_labels=num_labels, ks=(1,))
            metric.add_batch(predictions=scores.numpy(), references=test_labels.numpy())
            metrics[f"top1 ({source})"] = metric.compute()["top1"]
        return metrics

    def _classify(self, train: Tensor, labels: Tensor, test: Tensor, num_labels: int, device) -> Tensor:
        """Fits to features `(num_train, hidden_size)` with labels `(num_train,)` and returns scores
        `(num_test, num_labels)` for features `(num_test, hidden_size)`."""
        mean, std = train.mean(dim=0), train.std(dim=0).clamp(min=1e-6)
        train, test = ((features - mean) / std for features in (train, test))
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(self.seed))
        held_out, rest = order[: len(order) // 10], order[len(order) // 10 :]

        def accuracy(penalty: float) -> float:
            classifier = fit_logistic_regression(train[rest], labels[rest], num_labels, penalty, device)
            predictions = classifier(train[held_out].to(device)).argmax(dim=1).cpu()
            return (predictions == labels[held_out]).double().mean().item()

        best = max(PENALTIES, key=accuracy)
        with torch.no_grad():
            return fit_logistic_regression(train, labels, num_labels, best, device)(test.to(device)).cpu()


def fit_logistic_regression(features: Tensor, labels: Tensor, num_labels: int, penalty: float, device) -> nn.Linear:
    """
    Minimizes the mean cross-entropy plus half the penalty times the sum of squared weights (without biases), starting
    at zero.

    Args:
        features (`torch.Tensor` of shape `(num_samples, hidden_size)`).
        labels (`torch.Tensor` of shape `(num_samples,)`).
        num_labels (`int`).
        penalty (`float`).
        device (`torch.device` or `str`).
    """
    features, labels = features.to(device), labels.to(device)
    classifier = nn.Linear(features.shape[1], num_labels, device=device)
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    optimizer = torch.optim.LBFGS(
        classifier.parameters(), max_iter=1000, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(classifier(features), labels) + penalty / 2 * classifier.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return classifier
