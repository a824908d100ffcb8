"""What a model costs, beside its parents and the cascade of them: which the paper never gave."""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ..datasets.samples import DataSet, SegmentedImage
from .adapters import CascadeAdapter, ImageTextAdapter, ModelAdapter, PromptableAdapter, SamClipAdapter
from .evaluator import EvaluationResult, Evaluator
from .report import device_name
from .semantic_segmentation import CascadeSegmentation, ComposedSegmentation, SemanticSegmentation

# torch's counter (2.14) does not know the CPU's fused attention and counts nothing for it; on a GPU it does.
ATTENTION_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value, *_, **__: sdpa_flop_count(
        query, key, value
    )
}


class Cost(Evaluator):
    """
    Parameters; and of one image of noise, for everything that the model can do, multiply-accumulates by torch's own
    counter (half of its operations), the median time, and the most memory above what was in use.

    height, width (`int`):
        Of the image, in pixels.
    names (`list[str]`):
        Classes to segment by.
    size (`int`, *optional*):
        As in [`SemanticSegmentation`], of the image's shorter side; by default the image's own.
    repeats (`int`):
        After one that warms up.
    generation (`dict`, *optional*):
        As in [`CascadeSegmentation`].
    """

    name = "cost"

    def __init__(
        self,
        height: int,
        width: int,
        names: list[str],
        size: int | None = None,
        repeats: int = 3,
        generation: dict[str, Any] | None = None,
    ):
        self.height, self.width, self.names, self.repeats = height, width, names, repeats
        self.size = min(height, width) if size is None else size
        self.generation = generation

    def applies_to(self, model: ModelAdapter) -> bool:
        return True

    def describe(self) -> dict[str, Any]:
        return {
            "image": f"noise, {self.width} x {self.height} px",
            "classes": len(self.names),
            "by text, patches": f"shorter side {self.size} px; the rest at the model's own size",
            "repeats": self.repeats,
            "device": device_name(),
            "threads": torch.get_num_threads(),
            "memory": "above what was in use before: of the process on a CPU, of the allocator on a GPU",
        }

    def run(self, model: ModelAdapter) -> EvaluationResult | None:
        """On the first process alone; the others wait."""
        state = PartialState()
        outcome = self._run(model) if state.is_main_process else None
        state.wait_for_everyone()
        return outcome

    def _run(self, model: ModelAdapter) -> EvaluationResult:
        start = time.perf_counter()
        parameters = sum(p.numel() for part in model.models for p in part.parameters())
        figures: dict[str, float | None] = {"parameters, M": parameters / 1e6}
        device = model.models[0].device
        for title, job in self.jobs(model).items():
            with FlopCounterMode(display=False, custom_mapping=ATTENTION_ON_CPU) as counter:
                job()
            seconds, memory = [], []
            for _ in range(self.repeats):
                gc.collect()
                before = reset_peak(device)
                began = time.perf_counter()
                job()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - began)
                if before is not None and (most := peak(device)) is not None:
                    memory.append((most - before) / 1e6)
            figures |= {
                f"{title}, GMAC": counter.get_total_flops() / 2e9,
                f"{title}, s": statistics.median(seconds),
                f"{title}, MB": max(memory, default=None),
            }
        return EvaluationResult(figures, 1, time.perf_counter() - start)

    def jobs(self, model: ModelAdapter) -> dict[str, Callable[[], Any]]:
        """What the model can do with an image."""
        pixels = np.random.default_rng(0).integers(0, 256, (self.height, self.width, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        data: DataSet[SegmentedImage] = DataSet("noise", [], [[name] for name in self.names])
        jobs: dict[str, Callable[[], Any]] = {}
        if isinstance(model, ImageTextAdapter):
            jobs["image embedding"] = lambda: model.embed_images([image])
        if isinstance(model, PromptableAdapter):
            point = torch.tensor([[self.width // 2, self.height // 2]])
            jobs["masks from a point"] = lambda: model.predict_masks(image, points=point)
        by_text: dict[str, Any] = {}
        if isinstance(model, ImageTextAdapter):
            by_text["by text, patches"] = SemanticSegmentation(data, size=self.size)
        if isinstance(model, SamClipAdapter):
            by_text["by text, both heads"] = ComposedSegmentation(data)
        if isinstance(model, CascadeAdapter):
            by_text["by text, cascade"] = CascadeSegmentation(data, generation=self.generation)
        for title, protocol in by_text.items():
            protocol.prepare(model)
            jobs[title] = partial(protocol.predict, model, image)
        return jobs


def reset_peak(device: torch.device) -> int | None:
    """Bytes in use, from which on the peak is measured."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if (clear := Path("/proc/self/clear_refs")).exists():
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
            trim(0)  # what earlier runs have freed but glibc keeps would hide what this one takes
        clear.write_text("5")  # the peak starts over at what is resident now
    return peak(device)


def peak(device: torch.device) -> int | None:
    """Most bytes in use since; `None` where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
