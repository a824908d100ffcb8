"""
Speed of a training step of ViT-B size with random weights, and the time of its parts.

    python benchmarks/training_step.py
    python benchmarks/training_step.py --recipe lite_region --sam_batch_size 2 --repeats 1
    python benchmarks/training_step.py --device cuda --clip_batch_size 64 --sam_batch_size 4 --compile

Teachers and student have the sizes of the recipe's: SAM ViT-B/16 and CLIP ViT-L/14. The images are scenes of the
miniature, enlarged; a step has one batch at the CLIP resolution and, if the recipe uses masks, one at SAM's. The
variants run in turns in one process, after a matrix product. The operations are those of `samclip cost` for every
variant.
"""

import argparse
import gc
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from inference import matrix_product
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    SamConfig,
    SamImageProcessor,
    SamModel,
)

from samclip_cli.cost import VIT_L_14, Costs
from samclip_cli.train import build_trainer, parse_arguments, read_recipe, set_wait_policy
from samclip_hf import miniature
from samclip_hf.distillation import SamClipTrainer
from samclip_hf.evaluation.cost import peak_memory, reset_peak_memory

ATTENTION = {"cpu": ("sdpa", "eager"), "cuda": ("sdpa", "flex_attention")}  # flex_attention has no gradient on a CPU


class Stopwatch:
    """Sums the seconds of calls by part of a step."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def wrap(self, part: str, function: Callable) -> Callable:
        def timed(*args, **kwargs):
            start = self.now()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[part] += self.now() - start

        return timed


class TimedModel(nn.Module):
    """Calls a model, and adds the time to the part "student, forward"."""

    def __init__(self, model: nn.Module, stopwatch: Stopwatch):
        super().__init__()
        self.model = model
        self.call = stopwatch.wrap("student, forward", model)

    def forward(self, *args, **kwargs):
        return self.call(*args, **kwargs)


def save_teachers(folder: Path, sam_config: SamConfig, clip_config: CLIPConfig) -> tuple[Path, Path]:
    """Saves teachers with random weights."""
    sam, clip = folder / "sam", folder / "clip"
    size, patch_size = sam_config.vision_config.image_size, sam_config.vision_config.patch_size
    SamModel(sam_config).save_pretrained(sam)
    mask_size = {"longest_edge": 4 * size // patch_size}
    SamImageProcessor(
        size={"longest_edge": size}, pad_size={"height": size, "width": size}, mask_size=mask_size
    ).save_pretrained(sam)
    CLIPModel(clip_config).save_pretrained(clip)
    clip_size = clip_config.vision_config.image_size
    CLIPImageProcessor(
        size={"shortest_edge": clip_size}, crop_size={"height": clip_size, "width": clip_size}
    ).save_pretrained(clip)
    AutoTokenizer.from_pretrained(miniature.clip_teacher()).save_pretrained(clip)
    return sam, clip


def make_trainer(arguments, folder: Path, sam: Path, clip: Path) -> SamClipTrainer:
    """Returns the trainer of the recipe with teachers in the folders `sam` and `clip`."""
    options: dict[str, Any] = {
        "sam_teacher": sam,
        "clip_teacher": clip,
        "clip_data": "miniature",
        "sam_data": "miniature",
        "clip_resolutions": arguments.clip_resolution,
        "clip_batch_size": arguments.clip_batch_size,
        "sam_batch_size": arguments.sam_batch_size,
        "clip_head_initialization": "copied",
        "num_readers": 1,
        "shuffle_buffer": 1,
        "sam_shuffle_buffer": 1,
        "dataloader_num_workers": 0,
        "bf16": str(arguments.device != "cpu").lower(),
        "use_cpu": str(arguments.device == "cpu").lower(),
        "output_dir": folder / "output",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    # Data, caches and weights of datasets are those of the options.
    unused = {"clip_data_weights", "sam_data_weights", "sam_shard_fraction", "clip_embedding_cache"}
    unused |= {"region_embedding_cache", "sam_student", "sam_resolutions"}
    args = parse_arguments([str(write_recipe(arguments.recipe, unused, folder)), *words])
    return build_trainer(args)


def write_recipe(name: str, without: set[str], folder: Path) -> Path:
    """Writes a recipe of the package without some of its arguments."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in read_recipe(name).items() if key not in without}))
    return path


def step_functions(trainer: SamClipTrainer, arguments, stopwatch: Stopwatch) -> dict[str, Callable[[], None]]:
    """Returns functions that run a step on the same batch, by variant."""
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.current_gradient_accumulation_steps = 1  # set by `train`
    optimizer = trainer.create_optimizer()
    student = trainer.model.to(trainer.args.device)
    prepared = trainer.accelerator.prepare_model(student)
    step_optimizer = stopwatch.wrap("optimizer", optimizer.step)
    trainer.accelerator.backward = stopwatch.wrap("backward", trainer.accelerator.backward)
    for part, teacher in (
        ("SAM teacher", trainer.sam_teacher),
        ("CLIP teacher", trainer.clip_teacher),
        ("CLIP teacher, regions", trainer.region_teacher),
    ):
        if teacher is not None:
            teacher.forward = stopwatch.wrap(part, teacher.forward)

    def function(model: nn.Module, attention: str) -> Callable[[], None]:
        timed = TimedModel(model, stopwatch)

        def step() -> None:
            student.set_attn_implementation({"vision_config": attention})
            trainer.training_step(timed, dict(batch))
            step_optimizer()
            optimizer.zero_grad()

        return step

    functions = {}
    for attention in ATTENTION[torch.device(arguments.device).type]:
        functions[attention] = function(prepared, attention)
        if arguments.compile:
            functions[f"{attention}, compiled"] = function(torch.compile(prepared, dynamic=False), attention)
    return functions


def main(
    argv: list[str] | None = None, sam_config: SamConfig | None = None, clip_config: CLIPConfig | None = None
) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="vit_b_stage2", help="a recipe of the package (default: vit_b_stage2)")
    parser.add_argument("--clip_resolution", type=int, default=224, help="px (default: 224)")
    parser.add_argument("--clip_batch_size", type=int, default=8, help="images at --clip_resolution (default: 8)")
    parser.add_argument("--sam_batch_size", type=int, default=1, help="images of SAM's size (default: 1)")
    parser.add_argument("--device", default="cpu", help="a CPU computes in float32, a GPU in bfloat16")
    parser.add_argument("--compile", action="store_true", help="also run the compiled student")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "torch finds no GPU.\n")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if sam_config is None:
        sam_config = SamConfig(vision_config={"initializer_range": 0.02})  # its default is 1e-10
    if clip_config is None:
        clip_config = CLIPConfig(**VIT_L_14)
    stopwatch = Stopwatch(device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(arguments, Path(folder), *save_teachers(Path(folder), sam_config, clip_config))
        functions = step_functions(trainer, arguments, stopwatch)
        args = trainer.args
        costs = Costs(args)
    operations = args.clip_batch_size * costs.clip(args.clip_resolutions[0])
    if args.reads_masks:
        parts = [costs.sam] * args.has_sam_loss + [costs.regions] * args.has_region_loss
        operations += args.sam_batch_size * sum(part(costs.sam_size) for part in parts)

    product, product_operations = matrix_product(device, torch.float32 if device.type == "cpu" else torch.bfloat16)
    seconds, memory, rates = defaultdict(list), {}, []
    of_parts: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for repeat in range(arguments.repeats + 1):
        start = stopwatch.now()
        product()
        rates.append(product_operations / (stopwatch.now() - start))
        for name, function in functions.items():
            gc.collect()
            stopwatch.seconds.clear()
            before = reset_peak_memory(device)
            start = stopwatch.now()
            function()
            elapsed = stopwatch.now() - start
            if before is not None and (peak := peak_memory(device)) is not None:
                memory[name] = (peak - before) / 1e9
            if repeat:  # the first one is warm-up and compilation
                seconds[name].append(elapsed)
                rest = elapsed - sum(stopwatch.seconds.values())
                for part, value in {**stopwatch.seconds, "losses, data transfer, rest": rest}.items():
                    of_parts[name][part].append(value)

    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{arguments.threads} threads"
    rate = statistics.median(rates[1:])
    with_masks = f" and {args.sam_batch_size} of {costs.sam_size} px" if args.reads_masks else ""
    print(
        f"{machine}, {'float32' if device.type == 'cpu' else 'bfloat16'}, {arguments.repeats} runs, medians; torch "
        f"{torch.__version__}, transformers {transformers.__version__}\n{arguments.recipe}, {args.clip_batch_size} "
        f"images of {args.clip_resolutions[0]} px{with_masks}: {operations / 1e12:.3g} TFLOP in a step; a matrix "
        f"product has {rate / 1e12:.3g} TFLOP/s\n\n"
        "| attention | s | images/s | of the matrix product's rate | memory above weights and gradients, GB |\n"
        "|---|---|---|---|---|"
    )
    images = args.clip_batch_size + args.sam_batch_size * args.reads_masks
    for name, values in seconds.items():
        median = statistics.median(values)
        gigabytes = f"{memory[name]:.2f}" if name in memory else ""
        print(f"| {name} | {median:.3g} | {images / median:.3g} | {operations / median / rate:.2f} | {gigabytes} |")
    names = list(seconds)
    print(f"\n| part, s | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for part in dict.fromkeys(part for name in names for part in of_parts[name]):
        cells = [f"{statistics.median(of_parts[name][part]):.3g}" for name in names]
        print(f"| {part} | {' | '.join(cells)} |")


if __name__ == "__main__":
    set_wait_policy()
    main()
