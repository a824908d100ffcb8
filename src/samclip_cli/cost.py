"""`samclip cost`: estimates the operations and GPU hours of training recipes."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import CommandError
from .argument_types import CommandParser, positive_int
from .models import check_model
from .train import collect_arguments, parse_arguments

if TYPE_CHECKING:
    from samclip_hf.distillation import SamClipTrainingArguments

UTILIZATION = 0.4
# Peak of dense bfloat16 matrix products in TFLOP/s, from NVIDIA's data sheets; the H200 has the peak of the H100.
GPUS = {"A100": 312.0, "H100, H200": 989.0}
VIT_L_14 = {
    "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
    },
    "projection_dim": 768,
}

DESCRIPTION = f"""\
Estimates the operations and GPU hours of training recipes.

examples:
  samclip cost vit_b_stage1 vit_b_stage2 vit_b_stage3 --num_processes 8
  samclip cost my_recipe.yaml

Counts the floating-point operations of a training step of the student and the teachers with
torch's FlopCounterMode, on the meta device: without weights and without a GPU. The estimate of
GPU hours assumes {UTILIZATION:.0%} of the GPU's bfloat16 peak (an assumption, not a measurement), a data loader
that keeps up, and no activation checkpointing. Reads the configurations of the models from the
Hub; if it cannot be reached, SAM ViT-B and CLIP ViT-L/14 are assumed."""


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser("cost", description=DESCRIPTION)
    parser.add_argument("recipes", nargs="+", metavar="RECIPE", help="YAML files, or names of recipes in the package")
    parser.add_argument(
        "--num_processes",
        type=positive_int,
        metavar="N",
        default=1,
        help="number of GPUs; the batch sizes of a recipe are per GPU (default: %(default)s)",
    )
    return parser


def load_config(config_class: type, name: str, fallback: dict[str, Any]):
    """The configuration of a teacher, or `config_class(**fallback)` and a message if it cannot be read."""
    from transformers import AutoConfig, SamConfig

    from samclip_hf import miniature

    if name == "miniature":
        name = miniature.sam_teacher() if config_class is SamConfig else miniature.clip_teacher()
    try:
        check_model(name, "teacher", needs_weights=False)
        return AutoConfig.from_pretrained(name)
    except (CommandError, OSError) as error:
        print(f"samclip cost: {error} The estimate assumes SAM ViT-B or CLIP ViT-L/14.", file=sys.stderr)
        return config_class(**fallback)


def count_flops(function: Callable[[], None]) -> float:
    """Number of floating-point operations; a multiplication with an addition counts as two."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        function()
    return float(counter.get_total_flops())


class Costs:
    """Floating-point operations per image in the training of one recipe."""

    def __init__(self, args: "SamClipTrainingArguments"):
        import torch
        from transformers import AutoModel, CLIPConfig, SamConfig, SamModel

        from samclip_hf import SamClipModel
        from samclip_hf.distillation.trainer import TRAINED_PARTS, add_adapters, freeze
        from samclip_hf.modeling_samclip import tower_image_size

        self.args = args
        sam_config = load_config(SamConfig, args.sam_teacher, {})
        student_config = load_config(SamConfig, args.sam_student, {}) if args.sam_student else sam_config
        clip_config = load_config(CLIPConfig, args.clip_teacher, VIT_L_14)
        head = {"num_hidden_layers": args.clip_head_layers}
        with torch.device("meta"):
            self.clip_teacher = AutoModel.from_config(clip_config).requires_grad_(False)
            self.sam_teacher = SamModel(sam_config).requires_grad_(False)
            base = SamModel(student_config)
            student = SamClipModel.from_teachers(base, self.clip_teacher, head).train()
            # Fused kernels recompute parts of the attention, and the counter includes this.
            student.set_attn_implementation("eager")
            freeze(student, TRAINED_PARTS[args.stage])
            self.student = add_adapters(student, args.lora_r) if args.lora_r else student
        self.teacher_size = clip_config.vision_config.image_size
        self.sam_size = sam_config.vision_config.image_size
        self.region_size = args.region_image_size or tower_image_size(clip_config.vision_config)

    def clip(self, size: int) -> float:
        """Operations for an image of the CLIP loss, including its teacher."""
        import torch

        def step() -> None:
            self.student(pixel_values=torch.zeros(1, 3, size, size, device="meta")).image_embeds.sum().backward()
            if self.args.clip_embedding_cache is None:
                pixel_values = torch.zeros(1, 3, self.teacher_size, self.teacher_size, device="meta")
                self.clip_teacher.get_image_features(pixel_values=pixel_values)

        return count_flops(step)

    def sam(self, size: int) -> float:
        """Operations for an image of the SAM loss, including its teacher."""
        import torch

        points = torch.zeros(1, self.args.masks_per_image, 1, 2, device="meta")
        labels = torch.ones(1, self.args.masks_per_image, 1, device="meta", dtype=torch.int)

        def step() -> None:
            pixel_values = torch.zeros(1, 3, size, size, device="meta")
            outputs = self.student(pixel_values=pixel_values, input_points=points, input_labels=labels)
            (outputs.pred_masks.sum() + outputs.iou_scores.sum()).backward()
            pixel_values = torch.zeros(1, 3, self.sam_size, self.sam_size, device="meta")
            with torch.no_grad():
                self.sam_teacher(pixel_values=pixel_values, input_points=points, input_labels=labels)

        return count_flops(step)

    def regions(self, size: int) -> float:
        """Operations for the regions of an image of the SAM stream, including the teacher. The regions are assumed to
        cover the image once. In stage 2, the image encoder's pass is that of the SAM loss."""
        import torch

        student: Any = getattr(self.student, "base_model", self.student)
        student = getattr(student, "model", student)  # without LoRA adapters
        encoder, head = student.vision_encoder, student.clip_head
        side = size // student.config.vision_config.patch_size
        shape = (1, side, side, student.config.vision_config.hidden_size)

        def step() -> None:
            for _ in ("patches", "segments"):
                tokens = torch.zeros(shape, device="meta", requires_grad=self.args.stage == 2)
                head.project_patches(head(tokens)).sum().backward()
            with torch.no_grad():
                if self.args.stage != 2:
                    encoder(torch.zeros(1, 3, size, size, device="meta"))
                if self.args.region_embedding_cache is None:
                    pixel_values = torch.zeros(1, 3, self.region_size, self.region_size, device="meta")
                    self.clip_teacher.get_image_features(pixel_values=pixel_values, interpolate_pos_encoding=True)

        return count_flops(step)


def format_number(value: float) -> str:
    """Three significant digits, or an integer from 100 on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table_row(recipe: str, num_processes: int) -> str:
    """The table's row for one recipe, in Markdown."""
    from samclip_hf.distillation.collation import num_images

    args = parse_arguments([recipe, "--output_dir", "unused", "--bf16", "false", "--use_cpu"])
    costs = Costs(args)
    micro_batches = num_processes * args.gradient_accumulation_steps
    flops_per_step = images_per_step = 0.0
    clip_flops = {size: costs.clip(size) for size in dict.fromkeys(args.clip_resolutions)}
    flops_per_image = [f"{size} px: {format_number(flops / 1e9)}" for size, flops in clip_flops.items()]
    for size in args.clip_resolutions:
        count = num_images(args.clip_batch_size, args.clip_resolutions, size) * micro_batches
        flops_per_step += count * clip_flops[size] / len(args.clip_resolutions)
        images_per_step += count / len(args.clip_resolutions)
    if args.reads_masks:
        sizes = args.sam_resolutions or [costs.sam_size]
        parts = [costs.sam] * (args.stage == 2) + [costs.regions] * args.has_region_loss
        flops = sum(part(size) for part in parts for size in sizes) / len(sizes)
        flops_per_image.append(f"{'SAM' if args.stage == 2 else 'regions'}: {format_number(flops / 1e9)}")
        flops_per_step += args.sam_batch_size * micro_batches * flops
        images_per_step += args.sam_batch_size * micro_batches
    total = flops_per_step * args.max_steps
    hours = [total / (peak * 1e12 * UTILIZATION) / 3600 for peak in GPUS.values()]
    cells = [Path(recipe).stem, f"{images_per_step * args.max_steps / 1e6:,.2f} M", ", ".join(flops_per_image)]
    cells += [format_number(value) for value in (total / 1e18, *hours)]
    return "| " + " | ".join(cells) + " |"


def run(argv: Sequence[str]) -> int:
    arguments = build_parser().parse_args(argv)
    for recipe in arguments.recipes:
        collect_arguments([recipe])  # raises for unknown recipes and arguments before torch is imported
    hours = " | ".join(f"{name}: GPU hours" for name in GPUS)
    print(f"| recipe | images | GFLOP per image | EFLOP | {hours} |\n|---|---|---|---|" + "---|" * len(GPUS))
    for recipe in arguments.recipes:
        print(table_row(recipe, arguments.num_processes), flush=True)
    return 0
