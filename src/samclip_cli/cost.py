"""
What a recipe costs, before it is run: operations and hours.

    python training/cost.py training/configs/vit_b_stage*.yaml --num_processes 8

Operations are counted by torch in a forward and backward pass of student and teachers, without memory or a GPU. Hours
assume that a card does 40 % of its peak in bfloat16, a guess not measured here, a loader that keeps up, and no
recomputation of activations. Sizes of models come from the Hub; where there is no network, names are taken for SAM
ViT-B and CLIP ViT-L/14.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, CLIPConfig, SamConfig, SamModel

from samclip_hf import SamClipModel, miniature
from samclip_hf.distillation import SamClipTrainingArguments
from samclip_hf.distillation.collation import num_images
from samclip_hf.distillation.trainer import TRAINED_PARTS, add_adapters, freeze

from .train import parse_arguments

UTILISATION = 0.4
# Peak of dense bfloat16 matrix products, TFLOP/s, from NVIDIA's data sheets; the H200's is the H100's.
CARDS = {"A100": 312.0, "H100, H200": 989.0}
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


def config_of(cls: type, name: str, otherwise: dict):
    """The configuration of a teacher, or the one that its name stands for where it cannot be fetched."""
    if name == "miniature":
        name = miniature.sam_teacher() if cls is SamConfig else miniature.clip_teacher()
    try:
        return AutoConfig.from_pretrained(name)
    except OSError:
        print(f"{name} cannot be fetched: taken for SAM ViT-B or CLIP ViT-L/14.", file=sys.stderr)
        return cls(**otherwise)


def count(function) -> float:
    """Floating-point operations, a multiplication and an addition as two."""
    with FlopCounterMode(display=False) as counter:
        function()
    return float(counter.get_total_flops())


class Costs:
    """Operations an image, of one recipe."""

    def __init__(self, args: SamClipTrainingArguments):
        self.args = args
        sam_config = config_of(SamConfig, args.sam_teacher, {})
        student_config = config_of(SamConfig, args.sam_student, {}) if args.sam_student else sam_config
        clip_config = config_of(CLIPConfig, args.clip_teacher, VIT_L_14)
        head = {"num_hidden_layers": args.clip_head_layers}
        with torch.device("meta"):
            self.clip_teacher = AutoModel.from_config(clip_config).requires_grad_(False)
            self.sam_teacher = SamModel(sam_config).requires_grad_(False)
            base = SamModel(student_config)
            student = SamClipModel.from_teachers(base, self.clip_teacher, head).train()
            # The fused kernels count what they do, which is more than has to be done.
            student.set_attn_implementation("eager")
            freeze(student, TRAINED_PARTS[args.stage])
            self.student = add_adapters(student, args.lora_r) if args.lora_r else student
        self.teacher_size = clip_config.vision_config.image_size
        self.sam_size = sam_config.vision_config.image_size

    def clip(self, size: int) -> float:
        """Of an image for the CLIP loss, its teacher included."""

        def step() -> None:
            self.student(pixel_values=torch.zeros(1, 3, size, size, device="meta")).image_embeds.sum().backward()
            if self.args.clip_embedding_cache is None:
                pixel_values = torch.zeros(1, 3, self.teacher_size, self.teacher_size, device="meta")
                self.clip_teacher.get_image_features(pixel_values=pixel_values)

        return count(step)

    def sam(self, size: int) -> float:
        """Of an image for the SAM loss, its teacher included."""
        points = torch.zeros(1, self.args.masks_per_image, 1, 2, device="meta")
        labels = torch.ones(1, self.args.masks_per_image, 1, device="meta", dtype=torch.int)

        def step() -> None:
            pixel_values = torch.zeros(1, 3, size, size, device="meta")
            outputs = self.student(pixel_values=pixel_values, input_points=points, input_labels=labels)
            (outputs.pred_masks.sum() + outputs.iou_scores.sum()).backward()
            pixel_values = torch.zeros(1, 3, self.sam_size, self.sam_size, device="meta")
            with torch.no_grad():
                self.sam_teacher(pixel_values=pixel_values, input_points=points, input_labels=labels)

        return count(step)


def short(value: float) -> str:
    """Three digits or so."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def row(path: str, num_processes: int) -> str:
    """One recipe's line of the table."""
    args = parse_arguments([path, "--output_dir", "unused", "--bf16", "false", "--use_cpu"])
    costs = Costs(args)
    micro_batches = num_processes * args.gradient_accumulation_steps
    per_step = images = 0.0
    parts = []
    for size in args.clip_resolutions:
        number = num_images(args.clip_batch_size, args.clip_resolutions, size) * micro_batches
        operations = costs.clip(size)
        parts.append(f"{size} px: {short(operations / 1e9)}")
        per_step += number * operations / len(args.clip_resolutions)
        images += number / len(args.clip_resolutions)
    if args.stage == 2:
        sizes = args.sam_resolutions or [costs.sam_size]
        operations = sum(map(costs.sam, sizes)) / len(sizes)
        parts.append(f"SAM: {short(operations / 1e9)}")
        per_step += args.sam_batch_size * micro_batches * operations
        images += args.sam_batch_size * micro_batches
    total = per_step * args.max_steps
    hours = [total / (peak * 1e12 * UTILISATION) / 3600 for peak in CARDS.values()]
    cells = [Path(path).stem, f"{images * args.max_steps / 1e6:,.2f} M", ", ".join(parts), short(total / 1e18)]
    cells += [short(h) for h in hours]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--num_processes", type=int, default=1, help="cards, to which a recipe's batch sizes belong")
    arguments = parser.parse_args()
    cards = " | ".join(f"{name}: card hours" for name in CARDS)
    print(f"| recipe | images | GFLOP an image | EFLOP | {cards} |\n|---|---|---|---|" + "---|" * len(CARDS))
    for path in arguments.recipes:
        print(row(path, arguments.num_processes), flush=True)


if __name__ == "__main__":
    main()
