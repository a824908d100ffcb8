"""Parameters, operations, time and memory of a model. The paper does not report them."""

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
from .adapters import (
    ImageTextAdapter,
    ModelAdapter,
    PromptableAdapter,
    SamClipAdapter,
    UnmergedAdapter,
    describe_sizes,
)
from .cascade_segmentation import CascadeSegmentation
from .composed_segmentation import ComposedSegmentation
from .evaluator import EvaluationResult, Evaluator
from .report import device_name
from .semantic_segmentation import LabelMapEvaluator, SemanticSegmentation

# torch's counter (2.14) counts nothing for the CPU's fused attention. On a GPU, it counts the fused kernels.
CPU_ATTENTION_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value, *_, **__: sdpa_flop_count(
        query, key, value
    )
}


class Cost(Evaluator):
    """
    Counts a model's parameters. For each of its functions on an image of noise, measures multiply-accumulates (half of
    the operations that torch counts), the median time, and the peak memory above the memory in use before.

    height, width (`int`):
        The image's size in pixels.
    names (`list[str]`):
        Class names for segmentation by text.
    size (`int`, *optional*):
        The shorter side for [`SemanticSegmentation`]. By default, the image's own.
    repeats (`int`, *optional*, defaults to 3):
        Number of measurements, after one run for warm-up.
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

    def describe_settings(self, model: ModelAdapter) -> dict[str, Any]:
        return describe_sizes(model)

    def run(self, model: ModelAdapter) -> EvaluationResult | None:
        """Measures on the main process only; the others wait."""
        state = PartialState()
        result = self._measure(model) if state.is_main_process else None
        state.wait_for_everyone()
        return result

    def _measure(self, model: ModelAdapter) -> EvaluationResult:
        start = time.perf_counter()
        parameters = sum(parameter.numel() for parameter in model.model.parameters())
        metrics: dict[str, float | None] = {"parameters, M": parameters / 1e6}
        device = model.model.device
        for title, function in self.functions(model).items():
            with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION_FLOPS) as counter:
                function()
            seconds, memory = [], []
            for _ in range(self.repeats):
                gc.collect()
                before = reset_peak_memory(device)
                began = time.perf_counter()
                function()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - began)
                if before is not None and (peak := peak_memory(device)) is not None:
                    memory.append((peak - before) / 1e6)
            metrics |= {
                f"{title}, GMAC": counter.get_total_flops() / 2e9,
                f"{title}, s": statistics.median(seconds),
                f"{title}, MB": max(memory, default=None),
            }
        return EvaluationResult(metrics, 1, time.perf_counter() - start)

    def functions(self, model: ModelAdapter) -> dict[str, Callable[[], Any]]:
        """Returns the functions of the model for an image, by title."""
        pixels = np.random.default_rng(0).integers(0, 256, (self.height, self.width, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        data: DataSet[SegmentedImage] = DataSet("noise", [], [[name] for name in self.names])
        functions: dict[str, Callable[[], Any]] = {}
        if isinstance(model, ImageTextAdapter):
            functions["image embedding"] = partial(model.embed_images, [image])
        if isinstance(model, PromptableAdapter):
            point = torch.tensor([[self.width // 2, self.height // 2]])
            functions["masks from a point"] = partial(model.predict_masks, image, points=point)
        evaluators: dict[str, LabelMapEvaluator] = {}
        if isinstance(model, ImageTextAdapter):
            evaluators["by text, patches"] = SemanticSegmentation(data, size=self.size)
        if isinstance(model, SamClipAdapter):
            evaluators["by text, both heads"] = ComposedSegmentation(data)
        if isinstance(model, UnmergedAdapter):
            evaluators["by text, cascade"] = CascadeSegmentation(data, generation=self.generation)
        for title, evaluator in evaluators.items():
            evaluator.prepare(model)
            functions[title] = partial(evaluator.predict, model, image)
        return functions


def reset_peak_memory(device: torch.device) -> int | None:
    """Starts a new measurement of the peak memory. Returns the bytes in use, or `None` if the system does not report
    them."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if (clear_refs := Path("/proc/self/clear_refs")).exists():
        if malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
            malloc_trim(0)  # memory that glibc keeps for reuse would hide what the next run allocates
        clear_refs.write_text("5")  # sets the peak to the memory that is resident now
    return peak_memory(device)


def peak_memory(device: torch.device) -> int | None:
    """Returns the peak of the bytes in use since [`reset_peak_memory`], or `None` if the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
