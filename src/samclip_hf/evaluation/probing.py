"""
What the frozen features of a model are good for: a linear classifier (paper, section 5, table 4), and three heads for
semantic segmentation (table 3). The paper states neither hyperparameters nor which features; both stand here.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from PIL import Image
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from tqdm import trange

from ..datasets.samples import IGNORE_INDEX, DataSet, LabeledImage, Sample, SegmentedImage
from .adapters import CascadeAdapter, ModelAdapter, SamAdapter
from .evaluator import EvaluationResult, Evaluator, own_batches
from .metrics import MeanIoU, TopK

BATCH_SIZE = 16
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)


class Probing(Evaluator):
    """
    train, test (`DataSet`):
        Of one list of classes and of known lengths, and not the same images. `ValueError` otherwise.
    size (`int`):
        Side in pixels of the squares that images are stretched to. A SAM takes its own size only, and so gets that.
    seed (`int`):
        Of the heads' weights, of the order of samples, and of what is held out.
    """

    def __init__(self, train: DataSet, test: DataSet, size: int, seed: int = 0):
        for data in (train, test):
            if not hasattr(data.samples, "__len__"):
                raise ValueError(f"{data.name} is a stream: probing needs to know how many samples there are.")
        places = [(data.description.get("path"), data.description.get("split")) for data in (train, test)]
        if places[0] == places[1] != (None, None):
            raise ValueError(f"{train.name} would be learnt from and judged by: give another split to learn from.")
        if train.names != test.names:
            raise ValueError(f"{train.name} and {test.name} do not have the same classes in the same order.")
        self.train, self.test, self.size, self.seed = train, test, size, seed

    def applies_to(self, model: ModelAdapter) -> bool:
        return not isinstance(model, CascadeAdapter)

    def describe(self) -> dict[str, Any]:
        return {
            **self.test.description,
            "trained on": f"{self.train.name}, {len(self.train.samples)} images",  # type: ignore[arg-type]
            "size": f"{self.size} px, stretched to a square; SAM at its own size",
            "features": "float16; image encoder: its last layer's (before SAM's neck); CLIP head: its last layer's",
            "seed": self.seed,
        }

    def size_for(self, model: ModelAdapter) -> int:
        return model.model.config.vision_config.image_size if isinstance(model, SamAdapter) else self.size


class LinearProbing(Probing):
    """
    Logistic regression on pooled features, standardised, by L-BFGS until it has converged; the penalty is the one of
    `PENALTIES` that does best on a tenth of the training images, held out.
    """

    name = "linear-probe"

    def describe(self) -> dict[str, Any]:
        return {
            **super().describe(),
            "pooling": "CLIP: what its projection takes; CLIP head: what its MLP takes; else the mean over patches",
            "classifier": f"logistic regression by L-BFGS, L2 penalty among {PENALTIES} chosen on a tenth held out",
        }

    def run(self, model: ModelAdapter) -> EvaluationResult | None:
        start, size = time.perf_counter(), self.size_for(model)
        with tempfile.TemporaryDirectory() as folder:
            train, test = (
                extract(data, lambda images: model.pooled_features(images, size), shared(folder) / name, model.name)
                for name, data in (("train", self.train), ("test", self.test))
            )
            if not PartialState().is_main_process:
                return None
            num_labels = len(self.train.names or [])
            train_labels, test_labels = (torch.tensor([s.label for s in d.samples]) for d in (self.train, self.test))
            figures: dict[str, float | None] = {}
            for source in train:
                features = [torch.from_numpy(split[source].astype(np.float32)) for split in (train, test)]
                device = model.model.device
                scores = self._classify(features[0], train_labels, features[1], num_labels, device)
                metric = TopK(num_labels=num_labels, ks=(1,))
                metric.add_batch(predictions=scores.numpy(), references=test_labels.numpy())
                figures[f"top1 ({source})"] = metric.compute()["top1"]
        return EvaluationResult(figures, len(test_labels), time.perf_counter() - start)

    def _classify(self, train: Tensor, labels: Tensor, test: Tensor, num_labels: int, device) -> Tensor:
        """Scores `(num_test, num_labels)`."""
        mean, std = train.mean(dim=0), train.std(dim=0).clamp(min=1e-6)
        train, test = ((features - mean) / std for features in (train, test))
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(self.seed))
        held_out, rest = order[: len(order) // 10], order[len(order) // 10 :]

        def accuracy(penalty: float) -> float:
            classifier = logistic_regression(train[rest], labels[rest], num_labels, penalty, device)
            return (classifier(train[held_out].to(device)).argmax(dim=1).cpu() == labels[held_out]).double().mean()

        best = max(PENALTIES, key=accuracy)
        with torch.no_grad():
            return logistic_regression(train, labels, num_labels, best, device)(test.to(device)).cpu()


def logistic_regression(features: Tensor, labels: Tensor, num_labels: int, penalty: float, device) -> nn.Linear:
    """Minimises the mean cross entropy plus half the penalty times the sum of squared weights (biases are free), from
    zero: `features` `(num_samples, size)`, `labels` `(num_samples,)`."""
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


class HeadProbing(Probing):
    """
    Linear, DeepLabv3 and PSPNet heads on features of patches; trained by AdamW on cross entropy at a quarter of the
    input's size, and compared at the images' own sizes.

    steps (`int`), learning_rate (`float`):
        Of each head: 16 images a step, learning rate falling to 0 by a cosine.
    """

    name = "head-probe"

    def __init__(self, train, test, size: int, seed: int = 0, steps: int = 20_000, learning_rate: float = 1e-3):
        super().__init__(train, test, size, seed)
        self.steps, self.learning_rate = steps, learning_rate

    def describe(self) -> dict[str, Any]:
        return {
            **super().describe(),
            "heads": "linear: batch norm, 1x1 convolution; DeepLabv3: torchvision's; PSPNet: 1, 2, 3, 6 bins",
            "training": f"AdamW, {self.steps} steps of {BATCH_SIZE} images, rate {self.learning_rate}, cosine",
        }

    def run(self, model: ModelAdapter) -> EvaluationResult | None:
        start, size = time.perf_counter(), self.size_for(model)
        num_labels = len(self.train.names or [])
        with tempfile.TemporaryDirectory() as folder:
            train, test = (
                extract(data, lambda images: model.patch_features(images, size), shared(folder) / name, model.name)
                for name, data in (("train", self.train), ("test", self.test))
            )
            if not PartialState().is_main_process:
                return None
            labels = np.stack([small_labels(sample, size // 4) for sample in self.train.samples])
            figures: dict[str, float | None] = {}
            for source in train:
                for head_name, build in HEADS.items():
                    title = f"{head_name} ({source})"
                    torch.manual_seed(self.seed)
                    head = build(train[source].shape[1], num_labels).to(model.model.device)
                    self._train(head, train[source], labels, title)
                    figures[f"mean_iou: {title}"] = self._test(head, test[source], num_labels)
        return EvaluationResult(figures, len(self.test.samples), time.perf_counter() - start)  # type: ignore[arg-type]

    def _train(self, head: nn.Module, features: np.ndarray, labels: np.ndarray, title: str) -> None:
        optimizer = torch.optim.AdamW(head.parameters(), lr=self.learning_rate, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        rng = np.random.default_rng(self.seed)
        device = next(head.parameters()).device
        head.train()
        for _ in trange(self.steps, desc=f"training {title}", unit="step"):
            chosen = np.sort(rng.choice(len(features), min(BATCH_SIZE, len(features)), replace=False))
            logits = head(torch.from_numpy(features[chosen].astype(np.float32)).to(device))
            truth = torch.from_numpy(labels[chosen].astype(np.int64)).to(device)
            logits = F.interpolate(logits, size=truth.shape[1:], mode="bilinear", align_corners=False)
            loss = F.cross_entropy(logits, truth, ignore_index=IGNORE_INDEX, reduction="sum")
            loss = loss / (truth != IGNORE_INDEX).sum().clamp(min=1)  # a batch may hold nothing that counts
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    @torch.inference_mode()
    def _test(self, head: nn.Module, features: np.ndarray, num_labels: int) -> float:
        metric, device = MeanIoU(num_labels=num_labels, ignore_index=IGNORE_INDEX), next(head.parameters()).device
        head.eval()
        for index, sample in enumerate(self.test.samples):
            truth = sample.label_map()
            logits = head(torch.from_numpy(features[index : index + 1].astype(np.float32)).to(device))
            logits = F.interpolate(logits, size=truth.shape, mode="bilinear", align_corners=False)
            metric.add(prediction=logits[0].argmax(dim=0).cpu().numpy(), reference=truth)
        return metric.compute()["mean_iou"]


def linear_head(channels: int, num_labels: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.Conv2d(channels, num_labels, 1))


class PyramidPoolingHead(nn.Module):
    """PSPNet's (Zhao et al. 2017, section 3.2): the grid pooled to four coarse ones, scaled back, beside the grid."""

    def __init__(self, channels: int, num_labels: int, bins: Sequence[int] = (1, 2, 3, 6), hidden: int = 512):
        super().__init__()
        self.bins = bins
        self.pools = nn.ModuleList(_convolution(channels, channels // len(bins), 1) for _ in bins)
        self.bottleneck = _convolution(channels + channels // len(bins) * len(bins), hidden, 3)
        self.classifier = nn.Conv2d(hidden, num_labels, 1)

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


def shared(folder: str) -> Path:
    """The main process's folder, which those of this machine write to together."""
    from accelerate.utils import broadcast_object_list

    return Path(broadcast_object_list([folder])[0])


def extract(
    data: DataSet[LabeledImage] | DataSet[SegmentedImage],
    features: Callable[[list[Image.Image]], dict[str, Tensor]],
    folder: Path,
    title: str,
) -> dict[str, np.ndarray]:
    """By source, features `(num_samples, ...)` in float16 of all images, on disk below `folder`. All processes write,
    and come back when everything is there."""
    state = PartialState()
    num_samples = len(data.samples)  # type: ignore[arg-type]
    arrays: dict[str, np.ndarray] = {}

    def open_arrays(shapes: dict[str, tuple[int, ...]]) -> None:
        if state.is_main_process:
            folder.mkdir(parents=True)
            for number, shape in enumerate(shapes.values()):
                np.lib.format.open_memmap(
                    folder / f"{number}.npy", mode="w+", dtype=np.float16, shape=(num_samples, *shape)
                )
        state.wait_for_everyone()
        arrays.update({source: np.load(folder / f"{n}.npy", mmap_mode="r+") for n, source in enumerate(shapes)})

    first = next(iter(data.samples), None)
    if first is None:
        raise ValueError(f"{data.name} has no samples.")
    open_arrays({source: tuple(values.shape[1:]) for source, values in features([first.image()]).items()})
    samples: Any = data.samples
    for start, batch in own_batches(samples, BATCH_SIZE, f"features of {data.name}, {title}"):
        for source, values in features([sample.image() for sample in batch]).items():
            arrays[source][start : start + len(batch)] = values.half().cpu().numpy()
    state.wait_for_everyone()
    return arrays


def small_labels(sample: Sample, side: int) -> np.ndarray:
    """The sample's label map, stretched to a square; ignored pixels stay so. `(side, side)` uint8."""
    assert isinstance(sample, SegmentedImage)
    label_map = Image.fromarray(sample.label_map().astype(np.uint8))
    return np.asarray(label_map.resize((side, side), Image.Resampling.NEAREST))
