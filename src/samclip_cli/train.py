"""
Trains one stage of SAM-CLIP.

    accelerate launch training/train.py training/configs/miniature_stage1.yaml --output_dir runs/stage1

The recipe's YAML sets the arguments and the command line wins; `--help` lists them all. `--resume_from_checkpoint
true` goes on from the last checkpoint in the output folder.
"""

import difflib
import json
import os
import sys
from dataclasses import fields
from pathlib import Path

# On a CPU that others use too, data loader workers included, threads that spin while they wait for one another make a
# step several times slower. OpenMP reads this when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import yaml
from safetensors import SafetensorError
from transformers import AutoImageProcessor, AutoTokenizer, HfArgumentParser, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from samclip_hf import SamClipImageProcessor, SamClipModel, SamClipProcessor, miniature
from samclip_hf.distillation import (
    ClipTeacher,
    DataError,
    EmbeddingCache,
    SamClipTrainer,
    SamClipTrainingArguments,
    SamTeacher,
    last_checkpoint,
)
from samclip_hf.publishing import prepare_push


def parse_arguments(argv: list[str]) -> SamClipTrainingArguments:
    """The recipe's arguments, overridden by the command line's; exits with a sentence if one is unknown or wrong."""
    parser = HfArgumentParser(
        SamClipTrainingArguments, usage="train.py [RECIPE.yaml] [--argument value ...]", description=__doc__
    )
    known = [field.name for field in fields(SamClipTrainingArguments) if field.init]
    recipe: list[str] = []
    if argv and argv[0].endswith((".yaml", ".yml")):
        path, argv = Path(argv[0]), argv[1:]
        if not path.is_file():
            parser.exit(2, f"There is no recipe {path}.\n")
        try:
            settings = yaml.safe_load(path.read_text()) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            parser.exit(2, f"{path} is not YAML: {error}\n")
        if not isinstance(settings, dict):
            parser.exit(2, f"{path} must hold lines of the form 'argument: value'.\n")
        for name, value in settings.items():
            if name not in known:
                parser.exit(2, f"{path}: {unknown(name, known)}\n")
            if value is not None:
                values = value if isinstance(value, list) else [value]
                recipe += [f"--{name}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in values)]
    for argument in argv:
        name = argument.removeprefix("--").split("=")[0].replace("-", "_")
        if argument.startswith("--") and name not in [*known, "help"] and name.removeprefix("no_") not in known:
            parser.exit(2, f"Command line: {unknown(name, known)}\n")
    try:
        return parser.parse_args_into_dataclasses(recipe + argv)[0]
    except ValueError as error:
        parser.exit(2, f"{error}\n")


def unknown(name: str, known: list[str]) -> str:
    """What to say about an argument that does not exist."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"unknown argument {name!r}." + (f" Did you mean {close[0]!r}?" if close else " See --help.")


def build_trainer(args: SamClipTrainingArguments) -> SamClipTrainer:
    """Teachers, student and streams by the names in `args`."""
    set_seed(args.seed)  # a new student's LayerNorm and MLP are random, and Trainer seeds only later
    sam = miniature.sam_teacher() if args.sam_teacher == "miniature" else args.sam_teacher
    clip = miniature.clip_teacher() if args.clip_teacher == "miniature" else args.clip_teacher
    clip_teacher = (
        ClipTeacher(clip) if args.clip_embedding_cache is None else EmbeddingCache(args.clip_embedding_cache)
    )
    sam_teacher = SamTeacher(sam) if args.stage == 2 else None
    if args.model is None and args.stage == 3:
        raise ValueError("Stage 3 adapts what the stages before it merged: give their result as model.")
    if args.model is None:
        base = args.sam_student or (sam_teacher.model if sam_teacher else sam)
        head = {"num_hidden_layers": args.clip_head_layers, "pooling": args.clip_head_pooling}
        clip_model = clip_teacher.model if isinstance(clip_teacher, ClipTeacher) else clip
        model = SamClipModel.from_teachers(base, clip_model, head, args.clip_head_initialization)
        image_processor = SamClipImageProcessor.from_dict(
            AutoImageProcessor.from_pretrained(args.sam_student or sam).to_dict()
        )
        processor = SamClipProcessor(image_processor, AutoTokenizer.from_pretrained(clip))
    elif args.sam_student is not None:
        raise ValueError("model and sam_student both say what the student starts from: leave one out.")
    else:
        model = SamClipModel.from_pretrained(args.model, use_safetensors=True)
        processor = SamClipProcessor.from_pretrained(args.model)
    return SamClipTrainer(
        model, args, clip_teacher, sam_teacher, processing_class=processor, prepare_push=prepare_push
    )


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(sys.argv[1:] if argv is None else argv)
    try:
        trainer = build_trainer(args)
    except (OSError, TypeError, ValueError) as error:  # a name that leads nowhere, sizes that do not fit
        sys.exit(f"Training did not start. {error}")

    checkpoint = args.resume_from_checkpoint
    if checkpoint in ("true", "True"):
        checkpoint = last_checkpoint(args.output_dir)
        if checkpoint is None:
            print(f"There is no checkpoint in {args.output_dir} yet: starting from the beginning.", file=sys.stderr)
    elif checkpoint in (None, "false", "False"):
        checkpoint = None
        if (earlier := last_checkpoint(args.output_dir)) is not None:
            sys.exit(
                f"Training did not start. {earlier} is of an earlier run: go on with it, --resume_from_checkpoint "
                "true, or name another output_dir."
            )
    if checkpoint is not None:
        state = Path(checkpoint) / TRAINER_STATE_NAME
        if not state.is_file():
            sys.exit(f"Training did not start. There is no checkpoint to resume from in {str(checkpoint)!r}.")
        try:
            step = TrainerState.load_from_json(str(state)).global_step
        except (ValueError, TypeError) as error:
            sys.exit(f"Training did not start. {checkpoint} is not complete, its writing was interrupted: {error}")
        if step >= args.max_steps:
            if (Path(args.output_dir) / "train_results.json").is_file():
                sys.exit(f"Training did not start. {checkpoint} has all of its {args.max_steps} steps, and the model.")
            try:
                trainer._load_from_checkpoint(str(checkpoint))  # it was stopped before it saved the model
            except (OSError, DataError) as error:
                sys.exit(f"Training did not start. {error}")
            save(trainer, {})
            return
    if trainer.is_world_process_zero():  # it vouches for the model there, which is about to be an older one
        (Path(args.output_dir) / "train_results.json").unlink(missing_ok=True)
    try:
        result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except (OSError, DataError, FloatingPointError) as error:  # a full disk, bad data, gradients that are no numbers
        if trainer.state.global_step:
            sys.exit(f"Training stopped after step {trainer.state.global_step}. {error}")
        sys.exit(f"Training did not start. {error}")
    if trainer.preemption.signal is not None and trainer.state.global_step < args.max_steps:
        trainer.save_state()
        print(
            f"Interrupted after step {trainer.state.global_step} of {args.max_steps}. The same command with "
            "--resume_from_checkpoint true goes on from there.",
            file=sys.stderr,
        )
        sys.exit(128 + trainer.preemption.signal)
    if not result.metrics["train_images_seen"]:
        sys.exit(
            "Training stopped: not one sample could be used, so nothing was learnt. By cause: "
            f"{ {name: n for name, n in result.metrics.items() if name.startswith('skipped_')} }."
        )
    save(trainer, result.metrics)


def save(trainer: SamClipTrainer, metrics: dict[str, float]) -> None:
    """The model and what is said of it, into the output folder; with LoRA merged, and the adapters beside it."""
    try:
        if trainer.args.lora_r:
            if trainer.is_world_process_zero():
                trainer.model.save_pretrained(Path(trainer.args.output_dir) / "adapter")
            # A plain checkpoint, for the next stage and everyone else.
            trainer.model = trainer.model.merge_and_unload()
        trainer.save_model()
        trainer.save_state()
        trainer.save_provenance(metrics)
        trainer.save_metrics("train", metrics)  # last: it says that the model is there
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk, by Python, torch and safetensors
        sys.exit(
            f"All steps are done, but the model could not be written to {trainer.args.output_dir}: {error}\n"
            "The same command with --resume_from_checkpoint true writes it from the last checkpoint, when there is "
            "space."
        )
    if trainer.args.push_to_hub:
        try:
            trainer.push_to_hub()
        except OSError as error:  # by then a night's work may be done
            sys.exit(
                f"The model is in {trainer.args.output_dir}, but it was not pushed: {error}\n"
                "training/publish.py publishes that folder."
            )


if __name__ == "__main__":
    main()
