"""`samclip finetune`: fine-tunes a SAM-CLIP on labeled images."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import CommandError, log
from .evaluate import build_evaluators, build_parser, check_tasks, uses_miniature
from .models import check_model
from .outputs import check_writable
from .train import TRAIN, TrainingCommand, parse_arguments, run_training, set_wait_policy

if TYPE_CHECKING:
    from samclip_hf.evaluation import Evaluator
    from samclip_hf.finetuning import FinetuningArguments, FinetuningTrainer

HELP = """\
usage: samclip finetune [RECIPE] [--argument value ...]

Fine-tunes a SAM-CLIP on labeled images, and measures what it learns and what it forgets.

examples:
  samclip finetune miniature --data scenes --output_dir runs/adapted
  samclip finetune vit_b --model runs/b3 --data train/coco.json --eval_data val/coco.json \\
      --sam_data general/ --retention composed:voc21 prompts:coco --output_dir runs/adapted

RECIPE is a YAML file with lines 'argument: value', or one of the recipes in the package:
  {recipes}

Arguments on the command line override the recipe. The output folder contains the model, whose
vocabulary is the classes of the data, and retention.json: the results on eval_data and on the
tasks of retention before and after. samclip publish writes them to the model card.

All arguments of transformers.TrainingArguments are accepted, such as --learning_rate, --save_steps
and --report_to; arguments of samclip train such as --model, --lora_r, --sam_batch_size,
--masks_per_image and --encoder_lr_multiplier, and these:

{arguments}"""
COMMAND = TrainingCommand(
    "finetune", HELP, (*TRAIN.classes, ("finetuning.arguments", "FinetuningArguments")), "recipes/finetune"
)
# Evaluators whose results can be in the retention table: they apply to a SAM-CLIP and train nothing.
RETENTION_PROTOCOLS = ("classification", "retrieval", "instances", "prompts", "semantic", "composed")
MINIATURE_SCENES = 200  # of each task of `samclip evaluate` on the miniature's scenes


def build_retention(tasks: Sequence[str], limit: int | None) -> dict[str, "Evaluator"]:
    """The evaluators of the retention table, by name. Raises `CommandError` for tasks that it cannot contain."""
    if not tasks:
        return {}
    for name in tasks:
        if name.partition(":")[0] not in RETENTION_PROTOCOLS:
            raise CommandError(f"retention: {name} is not a task of one of {', '.join(RETENTION_PROTOCOLS)}.")
    evaluators: dict[str, Evaluator] = {}
    for name in tasks:
        options = []
        if limit is not None and uses_miniature(name):
            options = ["--share", str(min(1.0, limit / MINIATURE_SCENES))]
        elif limit is not None:
            options = ["--limit", str(limit)]
        arguments = build_parser().parse_args(["--task", name, *options])
        check_tasks(arguments)
        evaluators |= build_evaluators(arguments)
    return evaluators


def build_trainer(args: "FinetuningArguments") -> "FinetuningTrainer":
    """
    Loads the model and opens the data.

    Raises `CommandError` for a model that does not exist, and `OSError` or `ValueError` if model, data and arguments
    do not match.
    """
    assert args.model is not None and args.data is not None
    if args.model != "miniature":
        check_model(args.model)
    import torch
    from transformers import set_seed

    from samclip_hf import SamClipForImageSegmentation, SamClipProcessor, miniature
    from samclip_hf.finetuning import FinetuningTrainer, check_labels, hold_out, open_data
    from samclip_hf.modeling_samclip import load_complete_model, load_tokenizer
    from samclip_hf.publishing import prepare_push

    set_seed(args.seed)
    data = open_data(args.data, "train", args.images, args.background)
    if args.eval_data is None:
        data, eval_data = hold_out(data, args.eval_fraction)
    else:
        eval_data = open_data(args.eval_data, "val", args.images, args.background)
    for part in (data, eval_data):
        if missing := check_labels(part):
            names = ", ".join(names[0] for names in missing[:10]) + (" ..." if len(missing) > 10 else "")
            images = part.description.get("only", "all images")
            log(f"{part.name}, {images}: {len(missing)} of {len(part.names or ())} classes have no pixel: {names}.")
    retention = build_retention(args.retention, args.retention_limit)
    if args.model == "miniature":
        args.model = miniature.checkpoint()
    model = load_complete_model(SamClipForImageSegmentation, args.model, use_safetensors=True, dtype=torch.float32)
    load_tokenizer(args.model)  # raises an error if there is none
    if not model.config.has_text_tower:
        raise ValueError(f"{args.model} has no text tower, which embeds the names of the classes.")
    processor = SamClipProcessor.from_pretrained(args.model)
    return FinetuningTrainer(
        model, args, data, eval_data, processing_class=processor, retention=retention, prepare_push=prepare_push
    )


def run(argv: Sequence[str]) -> int:
    """Fine-tunes and saves the model. Exits as `samclip train` does."""
    set_wait_policy()
    args = parse_arguments(argv, COMMAND)
    check_writable(args.output_dir, "--output_dir")
    from accelerate import PartialState

    from samclip_hf.finetuning.trainer import RETENTION_NAME

    status = run_training(args, build_trainer, written=[RETENTION_NAME])
    if status == 0 and PartialState().is_main_process:
        print_retention(Path(args.output_dir) / RETENTION_NAME)
    return status


def print_retention(path: Path) -> None:
    """Prints a retention table, with the values before and after the fine-tuning."""
    for row in json.loads(path.read_text())["results"]:
        before, after = (f"{value:.3f}" if value is not None else "none" for value in (row["before"], row["after"]))
        print(f"{row['task']}, {row['metric']}: {before} before, {after} after")
