"""Semantic segmentation by heads on frozen features (paper, section 5, table 3)."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from tqdm import trange

from ..datasets.samples import IGNORE_INDEX, DataSet, SegmentedImage
from .adapters import ModelAdapter
from .evaluator import named
from .metrics import MeanIoU
from .probing import BATCH_SIZE, Probing


class HeadProbing(Probing):
    """
    Trains linear, DeepLabv3 and PSPNet heads on patch features, by AdamW on the cross-entropy at a quarter of the
    input's size. Predictions are compared with the ground truth at the size of the image.

    train, test, size, seed:
        See [`Probing`].
    steps (`int`, *optional*, defaults to 20000):
        Training steps of each head, with 16 images each.
    learning_rate (`float`, *optional*, defaults to 1e-3):
        The initial learning rate of a cosine schedule.
    """

    name = "head-probe"

    def __init__(
        self,
        train: DataSet[SegmentedImage],
        test: DataSet[SegmentedImage],
        size: int,
        seed: int = 0,
        steps: int = 20_000,
        learning_rate: float = 1e-3,
    ):
        super().__init__(train, test, size, seed)
        self.steps, self.learning_rate = steps, learning_rate

    def describe(self) -> dict[str, Any]:
        return {
            **super().describe(),
            "heads": "linear: batch norm, 1x1 convolution; DeepLabv3: torchvision's; PSPNet: 1, 2, 3, 6 bins",
            "training": f"AdamW, {self.steps} steps of {BATCH_SIZE} images, rate {self.learning_rate}, cosine",
        }

    def features(self, model: ModelAdapter, images: list[Image.Image], size: int) -> dict[str, Tensor]:
        return model.patch_features(images, size)

    def probe(
        self, model: ModelAdapter, train: dict[str, np.ndarray], test: dict[str, np.ndarray]
    ) -> dict[str, float | None]:
        num_labels, side = len(self.train.names or []), self.size_for(model) // 4
        labels = np.stack([resize_label_map(named(sample), side) for sample in self.train.samples])
        metrics: dict[str, float | None] = {}
        for source in train:
            for head_name, build in HEADS.items():
                title = f"{head_name} ({source})"
                torch.manual_seed(self.seed)
                head = build(train[source].shape[1], num_labels).to(model.model.device)
                self._train(head, train[source], labels, title)
                metrics[f"mean_iou: {title}"] = self._test(head, test[source], num_labels)
        return metrics

    def _train(self, head: nn.Module, features: np.ndarray, labels: np.ndarray, title: str) -> None:
        """Trains on features `(num_samples, hidden_size, grid_height, grid_width)` and labels
        `(num_samples, height, width)`."""
        optimizer = torch.optim.AdamW(head.parameters(), lr=self.learning_rate, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        rng = np.random.default_rng(self.seed)
        device = next(head.parameters()).device
        head.train()
        for _ in trange(self.steps, desc=f"training {title}", unit="step"):
            batch = np.sort(rng.choice(len(features), min(BATCH_SIZE, len(features)), replace=False))
            logits = head(torch.from_numpy(features[batch].astype(np.float32)).to(device))
            truth = torch.from_numpy(labels[batch].astype(np.int64)).to(device)
            logits = F.interpolate(logits, size=truth.shape[1:], mode="bilinear", align_corners=False)
            loss = F.cross_entropy(logits, truth, ignore_index=IGNORE_INDEX, reduction="sum")
            loss = loss / (truth != IGNORE_INDEX).sum().clamp(min=1)  # all pixels of a batch may be ignored
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    @torch.inference_mode()
    def _test(self, head: nn.Module, features: np.ndarray, num_labels: int) -> float:
        """Returns the mean IoU."""
        metric, device = MeanIoU(num_labels=num_labels, ignore_index=IGNORE_INDEX), next(head.parameters()).device
        head.eval()
        for index, sample in enumerate(self.test.samples):
            truth = named(sample).label_map()
            logits = head(torch.from_numpy(features[index : index + 1].astype(np.float32)).to(device))
            logits = F.interpolate(logits, size=truth.shape, mode="bilinear", align_corners=False)
            metric.add(prediction=logits[0].argmax(dim=0).cpu().numpy(), reference=truth)
        return metric.compute()["mean_iou"]


def linear_head(channels: int, num_labels: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.Conv2d(channels, num_labels, 1))


class PyramidPoolingHead(nn.Module):
    """PSPNet's head (Zhao et al. 2017, section 3.2): features, concatenated with their averages over four coarser
    grids."""

    def __init__(self, channels: int, num_labels: int, bins: Sequence[int] = (1, 2, 3, 6), hidden_size: int = 512):
        super().__init__()
        self.bins = bins
        self.pools = nn.ModuleList(_convolution(channels, channels // len(bins), 1) for _ in bins)
        self.bottleneck = _convolution(channels + channels // len(bins) * len(bins), hidden_size, 3)
        self.classifier = nn.Conv2d(hidden_size, num_labels, 1)

    def forward(self, features: Tensor) -> Tensor:
        pooled = [
            F.interpolate(pool(F.adaptive_avg_pool2d(features, bins)), size=features.shape[2:], mode="bilinear")
            for bins, pool in zip(self.bins, self.pools, strict=True)
        ]
        return self.classifier(self.bottleneck(torch.cat([features, *pooled], dim=1)))


def _convolution(channels: int, output_channels: int, kernel_size: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, output_channels, kernel_size, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(output_channels),
        nn.ReLU(),
    )


HEADS: dict[str, Callable[[int, int], nn.Module]] = {
    "linear": linear_head,
    "DeepLabv3": lambda channels, num_labels: DeepLabHead(channels, num_labels, atrous_rates=(12, 24, 36)),
    "PSPNet": PyramidPoolingHead,
}


def resize_label_map(sample: SegmentedImage, side: int) -> np.ndarray:
    """Returns a sample's label map stretched to a square, `(side, side)` uint8."""
    label_map = Image.fromarray(sample.label_map().astype(np.uint8))
    return np.asarray(label_map.resize((side, side), Image.Resampling.NEAREST))
