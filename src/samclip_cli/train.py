"""`samclip train`: trains one stage of SAM-CLIP."""

import ast
import difflib
import json
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from . import CommandError
from .models import check_model
from .outputs import check_writable

if TYPE_CHECKING:
    from samclip_hf.distillation import SamClipTrainer, SamClipTrainingArguments

# Files of a model that `save` writes.
WRITTEN_FILES = (
    *("config.json", "model.safetensors", "model.safetensors.index.json", "processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "provenance.json", "train_results.json"),
)
HELP = """\
usage: samclip train [RECIPE] [--argument value ...]

Trains one stage of SAM-CLIP.

examples:
  samclip train miniature_stage1 --output_dir runs/stage1
  samclip train my_recipe.yaml --output_dir runs/stage2 --model runs/stage1
  accelerate launch -m samclip_cli train vit_b_stage1 --output_dir runs/stage1

RECIPE is a YAML file with lines 'argument: value', or one of the recipes in the package:
  {recipes}

Arguments on the command line override the recipe. All arguments of transformers.TrainingArguments
are accepted, such as --learning_rate, --save_steps and --report_to, and these:

{arguments}"""


class TrainingCommand(NamedTuple):
    """
    A command whose arguments are a subclass of transformers' `TrainingArguments`.

    name (`str`):
        The name of the command.
    help (`str`):
        The help text, with the fields `recipes` and `arguments`.
    classes (`tuple[tuple[str, str], ...]`):
        For each class of arguments in this package, its module in `samclip_hf` and its name. The last one is that of
        the command.
    recipes (`str`):
        The folder of the recipes in `samclip_hf`.
    """

    name: str
    help: str
    classes: tuple[tuple[str, str], ...]
    recipes: str


TRAIN = TrainingCommand("train", HELP, (("distillation.arguments", "SamClipTrainingArguments"),), "recipes")


def parse_arguments(argv: Sequence[str], command: TrainingCommand = TRAIN) -> Any:
    """
    Parses the command line, and the recipe if its first argument names one. Returns the command's arguments, such as
    `SamClipTrainingArguments`.

    Raises `CommandError` for a recipe that cannot be read, for unknown arguments and for invalid values. Exits with
    status 2 for values that only `argparse` checks.
    """
    words = collect_arguments(argv, command)
    from transformers import HfArgumentParser

    from samclip_hf.distillation.arguments import check_names

    module, class_name = command.classes[-1]
    arguments_class = getattr(import_module(f"samclip_hf.{module}"), class_name)
    usage = command.help.partition("\n")[0].removeprefix("usage: ")
    parser = HfArgumentParser(arguments_class, prog=f"samclip {command.name}", usage=usage, allow_abbrev=False)
    try:
        args = parser.parse_args_into_dataclasses(words)[0]
        check_names(args, {word[2:].partition("=")[0] for word in words if word.startswith("--")})
        return args
    except ValueError as error:
        raise CommandError(str(error)) from error


def collect_arguments(argv: Sequence[str], command: TrainingCommand = TRAIN) -> list[str]:
    """
    The command line with the recipe's arguments in front and deprecated names replaced. Imports neither torch nor
    transformers.

    Prints the help text and exits for `--help`. Raises `CommandError` as [`parse_arguments`].
    """
    files = [_package_folder("samclip_hf").joinpath(*module.split(".")) for module, _ in command.classes]
    own: dict[str, ast.AnnAssign] = {}
    inherited = _inherited_fields()
    known = dict(inherited)
    for file, (_, class_name) in zip(files, command.classes, strict=True):
        own = _dataclass_fields(file.with_suffix(".py"), class_name)
        known |= own
    fixed = {name for name, definition in known.items() if "init=False" in ast.unparse(definition)}
    own, known = ({name: own[name] for name in own if name not in fixed} for own in (own, known))
    deprecated = _dict_literal(files[0].with_suffix(".py"), "DEPRECATED_ARGUMENTS")
    if "--help" in argv or "-h" in argv:
        print(_format_help(own, command))
        raise SystemExit(0)

    def current_name(name: str, origin: str) -> str:
        negated = name.startswith("no_") and name not in known  # --no_x sets the boolean argument x to false
        base = name.removeprefix("no_") if negated else name
        if base in deprecated:
            print(f"samclip {command.name}: {origin}: {base} is deprecated, use {deprecated[base]}.", file=sys.stderr)
            base = deprecated[base]
        elif base not in known and inherited:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {close[0]!r}?" if close else f"See samclip {command.name} --help."
            raise CommandError(f"{origin}: unknown argument {name!r}. {hint}")
        return f"no_{base}" if negated else base

    words: list[str] = []
    if argv and not argv[0].startswith("-"):
        recipe, argv = argv[0], argv[1:]
        for name, value in read_recipe(recipe, command).items():
            option = f"--{current_name(str(name), recipe)}"
            if option in words:
                raise CommandError(f"{recipe}: {option[2:]} is set twice, by its current and its deprecated name.")
            if value is not None:
                values = value if isinstance(value, list) else [value]
                words += [option, *(json.dumps(v) if isinstance(v, dict) else str(v) for v in values)]
    for word in argv:
        if word.startswith("--"):
            name, *value = word[2:].split("=", 1)
            word = "=".join(["--" + current_name(name.replace("-", "_"), "command line"), *value])
        words.append(word)
    _check_values(words, known)
    return words


def _check_values(words: list[str], fields: dict[str, ast.AnnAssign]) -> None:
    """Raises `CommandError` if a value is not a number or not one of the choices that the type of its field demands.
    Other types are checked when torch is imported."""
    numbers = {"int": int, "float": float, "list[int]": int, "list[float]": float}
    annotation = name = ""
    for word in words:
        values = [word]
        if word.startswith("--"):
            name, *values = word[2:].split("=", 1)
            annotation = ast.unparse(fields[name].annotation).removesuffix(" | None") if name in fields else ""
        for value in values:
            if annotation.startswith("Literal["):
                choices = [str(choice) for choice in ast.literal_eval(annotation.removeprefix("Literal"))]
                if value not in choices:
                    raise CommandError(f"{name}: {value!r} is not one of {', '.join(choices)}.")
            elif annotation in numbers:
                try:
                    numbers[annotation](value)
                except ValueError:
                    kind = "an integer" if numbers[annotation] is int else "a number"
                    raise CommandError(f"{name}: {value!r} is not {kind}.") from None


def recipe_paths(command: TrainingCommand = TRAIN) -> dict[str, Path]:
    """The recipes of a command in the package, by name."""
    return {path.stem: path for path in sorted((_package_folder("samclip_hf") / command.recipes).glob("*.yaml"))}


def read_recipe(recipe: str, command: TrainingCommand = TRAIN) -> dict[Any, Any]:
    """Arguments of a recipe: a YAML file or the name of a recipe in the package. Raises `CommandError`."""
    path = Path(recipe)
    if path.suffix not in (".yaml", ".yml"):
        recipes = recipe_paths(command)
        if recipe not in recipes:
            raise CommandError(f"unknown recipe {recipe!r}. Pass a YAML file, or one of: {', '.join(recipes)}.")
        path = recipes[recipe]
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise CommandError(f"cannot read the recipe {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CommandError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(settings, dict):
        raise CommandError(f"{path} must consist of lines of the form 'argument: value'.")
    return settings


def _package_folder(name: str) -> Path:
    """Folder of an installed package, which is not imported."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return Path(spec.submodule_search_locations[0])


def _dataclass_fields(path: Path, class_name: str) -> dict[str, ast.AnnAssign]:
    """Fields that a dataclass defines, read from its source: importing it would import torch."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (definition,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name)
    fields = (node for node in definition.body if isinstance(node, ast.AnnAssign))
    fields = (field for field in fields if not ast.unparse(field.annotation).startswith("ClassVar"))
    return {field.target.id: field for field in fields if isinstance(field.target, ast.Name)}


def _inherited_fields() -> dict[str, ast.AnnAssign]:
    """Fields of transformers' `TrainingArguments`. Empty if its source is not as in transformers 5.24: names are then
    checked when torch is imported."""
    try:
        return _dataclass_fields(_package_folder("transformers") / "training_args.py", "TrainingArguments")
    except (OSError, ValueError):  # the module or the class has moved
        return {}


def _dict_literal(path: Path, variable: str) -> dict[str, str]:
    """Value of a dict that a module defines as a literal, read from its source."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (value,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == variable for t in node.targets)
    )
    return ast.literal_eval(value)


def _format_help(fields: dict[str, ast.AnnAssign], command: TrainingCommand) -> str:
    lines = []
    for name, definition in fields.items():
        assert isinstance(definition.value, ast.Call)
        metadata = {keyword.arg: keyword.value for keyword in definition.value.keywords}["metadata"]
        text = ast.literal_eval(metadata)["help"]
        lines += [f"  --{name}", textwrap.fill(text, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)]
    recipes = textwrap.fill(", ".join(recipe_paths(command)), 98, subsequent_indent="  ")
    return command.help.format(recipes=recipes, arguments="\n".join(lines))


def models_to_load(args: "SamClipTrainingArguments") -> dict[str, str]:
    """The models that a run loads, by argument, except the miniature's, which are part of the package."""
    is_new = args.model is None
    names = {
        "model": args.model,
        "sam_student": args.sam_student,
        "sam_teacher": args.sam_teacher if args.stage == 2 or (is_new and args.sam_student is None) else None,
        "clip_teacher": args.clip_teacher if is_new or args.clip_embedding_cache is None else None,
    }
    return {argument: name for argument, name in names.items() if name is not None and name != "miniature"}


def build_trainer(args: "SamClipTrainingArguments") -> "SamClipTrainer":
    """
    Loads teachers and student, or builds a new student from the teachers, and opens the data.

    Raises `CommandError` for a model that does not exist, and `OSError`, `TypeError` or `ValueError` if models, data
    and arguments do not match.
    """
    for argument, name in models_to_load(args).items():
        check_model(name, f"--{argument}")
    import torch
    from transformers import set_seed

    from samclip_hf import SamClipModel, SamClipProcessor, miniature
    from samclip_hf.distillation import ClipTeacher, EmbeddingCache, SamClipTrainer, SamTeacher
    from samclip_hf.modeling_samclip import load_complete_model, load_tokenizer
    from samclip_hf.publishing import prepare_push

    set_seed(args.seed)  # parts of a new student have random weights; Trainer sets the seed only later
    if args.model is None and args.stage == 3:
        raise ValueError("Stage 3 continues from a merged model: pass the output of stage 2 as --model.")
    if args.model is None and args.stage == 2 and args.clip_head_initialization is None:
        raise ValueError(
            "Stage 2 continues from a trained CLIP head: pass the output of stage 1 as --model. To train a new CLIP "
            "head without stage 1, pass --clip_head_initialization copied or random."
        )
    if args.model is not None and args.sam_student is not None:
        raise ValueError("Pass only one of model and sam_student: both set what the student starts from.")
    sam = miniature.sam_teacher() if args.sam_teacher == "miniature" else args.sam_teacher
    clip = miniature.clip_teacher() if args.clip_teacher == "miniature" else args.clip_teacher
    clip_teacher = (
        ClipTeacher(clip) if args.clip_embedding_cache is None else EmbeddingCache(args.clip_embedding_cache)
    )
    sam_teacher = SamTeacher(sam) if args.stage == 2 else None
    if args.model is None:
        base = args.sam_student or (sam_teacher.model if sam_teacher else sam)
        head = {"num_hidden_layers": args.clip_head_layers, "pooling": args.clip_head_pooling}
        clip_model = clip_teacher.model if isinstance(clip_teacher, ClipTeacher) else clip
        model = SamClipModel.from_teachers(base, clip_model, head, args.clip_head_initialization or "copied")
        processor = SamClipProcessor.from_teachers(args.sam_student or sam, clip)
    else:
        model = load_complete_model(SamClipModel, args.model, use_safetensors=True, dtype=torch.float32)
        load_tokenizer(args.model)  # raises an error if there is none; the processor would have an empty vocabulary
        processor = SamClipProcessor.from_pretrained(args.model)
    return SamClipTrainer(
        model, args, clip_teacher, sam_teacher, processing_class=processor, prepare_push=prepare_push
    )


def run(argv: Sequence[str]) -> int:
    """Trains and saves the model. Exits with a message if training cannot start or stops early."""
    set_wait_policy()
    args = parse_arguments(argv)
    check_writable(args.output_dir, "--output_dir")
    return run_training(args, build_trainer)


def set_wait_policy() -> None:
    """Must be called before torch is imported."""
    # By default, OpenMP threads spin while they wait. On a CPU whose cores also run data loader workers or other
    # processes, a training step then takes several times as long. OpenMP reads this when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def run_training(
    args: "SamClipTrainingArguments", build_trainer: Callable[[Any], "SamClipTrainer"], written: Sequence[str] = ()
) -> int:
    """Builds the trainer from the arguments, trains and saves the model. `written` are files that the end of this
    training writes, besides `WRITTEN_FILES`. Returns the exit status, and exits as `run` does."""
    from samclip_hf.distillation import DataError

    try:
        trainer = build_trainer(args)
    except (OSError, TypeError, ValueError) as error:  # such as a wrong path or sizes that do not match
        sys.exit(f"Training did not start. {error}")
    checkpoint = find_checkpoint(args, written)
    results = Path(args.output_dir) / "train_results.json"
    if checkpoint is not None and completed_steps(checkpoint) >= args.max_steps:
        if results.is_file():
            sys.exit(f"Training did not start. {checkpoint} has completed all {args.max_steps} steps.")
        try:
            trainer.load_finished_run(checkpoint)  # the run stopped between its last step and saving the model
        except (OSError, DataError) as error:
            sys.exit(f"Training did not start. {error}")
        save(trainer, {})
        return 0
    if trainer.is_world_process_zero():
        results.unlink(missing_ok=True)  # it marks the model in the folder as the result of a complete run
    try:
        result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    # A full disk, corrupt data, gradients that are not finite, an argument that only the training can check.
    except (OSError, DataError, FloatingPointError, ValueError) as error:
        if trainer.state.global_step:
            sys.exit(f"Training stopped after step {trainer.state.global_step}. {error}")
        sys.exit(f"Training did not start. {error}")
    if trainer.preemption.signal is not None and trainer.state.global_step < args.max_steps:
        trainer.save_state()
        continuation = "Run the same command with --resume_from_checkpoint true to continue."
        if args.save_only_model:
            continuation = "The checkpoint has the model only and cannot be resumed, because save_only_model is set."
        print(
            f"Training interrupted after step {trainer.state.global_step} of {args.max_steps}. {continuation}",
            file=sys.stderr,
        )
        return 128 + trainer.preemption.signal
    if not result.metrics["train_images_seen"]:
        skipped = {name: count for name, count in result.metrics.items() if name.startswith("skipped_")}
        sys.exit(f"Training stopped: all samples were skipped, so the model is not saved. Causes: {skipped}.")
    save(trainer, result.metrics)
    return 0


def find_checkpoint(args: "SamClipTrainingArguments", written: Sequence[str] = ()) -> Path | None:
    """The checkpoint to resume from. Exits if there is none, or if the folder has one that the run would overwrite."""
    from samclip_hf.distillation import last_checkpoint

    latest = last_checkpoint(args.output_dir)
    if args.resume_from_checkpoint in ("true", "True"):
        if latest is None:
            print(f"{args.output_dir} has no checkpoint yet: training starts from the beginning.", file=sys.stderr)
            check_no_model(Path(args.output_dir), written)
        return None if latest is None else Path(latest)
    if args.resume_from_checkpoint in (None, "false", "False"):
        if latest is not None:
            sys.exit(
                f"Training did not start. {latest} belongs to an earlier run. Pass --resume_from_checkpoint true to "
                "continue it, or another --output_dir."
            )
        check_no_model(Path(args.output_dir), written)
        return None
    return Path(args.resume_from_checkpoint)


def check_no_model(output_dir: Path, written: Sequence[str] = ()) -> None:
    """Exits if a folder has a file that the end of a training would replace."""
    for name in (*WRITTEN_FILES, *written):
        if (output_dir / name).exists():
            sys.exit(
                f"Training did not start. It would replace {output_dir / name}. Pass another --output_dir, or delete "
                "the files of the earlier model."
            )


def completed_steps(checkpoint: Path) -> int:
    """Number of optimizer steps of a checkpoint. Exits if it is missing or incomplete."""
    from transformers import TrainerState
    from transformers.trainer import TRAINER_STATE_NAME

    if not (checkpoint / TRAINER_STATE_NAME).is_file():
        sys.exit(f"Training did not start. {str(checkpoint)!r} is not a checkpoint.")
    try:
        return TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).global_step
    except (ValueError, TypeError) as error:
        sys.exit(f"Training did not start. {checkpoint} is incomplete: {error}")


def save(trainer: "SamClipTrainer", metrics: dict[str, float]) -> None:
    """Saves model, processor, provenance and metrics in the output folder, and pushes them if requested. LoRA adapters
    are saved in the subfolder `adapter` and merged into the model."""
    from safetensors import SafetensorError

    from samclip_hf.distillation import last_checkpoint

    try:
        if trainer.args.lora_r:
            if trainer.is_world_process_zero():
                trainer.model.save_pretrained(Path(trainer.args.output_dir) / "adapter")
            trainer.model = trainer.model.merge_and_unload()  # the next stage and from_pretrained need no peft
        trainer.save_model()
        trainer.save_state()
        trainer.save_provenance(metrics)
        trainer.save_metrics("train", metrics)  # last, because it marks the model as complete
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk raises either
        output_dir = trainer.args.output_dir
        if trainer.is_world_process_zero():
            for name in ("train_results.json", "all_results.json"):  # incomplete
                Path(output_dir, name).unlink(missing_ok=True)
        continuation = "--resume_from_checkpoint true: it continues from the last checkpoint."
        if last_checkpoint(output_dir) is None:
            continuation = "another --output_dir: there is no checkpoint to continue from."
        sys.exit(
            f"All steps are done, but the model could not be saved in {output_dir}: {error}\n"
            f"Free some space and run the same command with {continuation}"
        )
    if trainer.args.push_to_hub:
        try:
            trainer.push_to_hub()
        except OSError as error:
            sys.exit(
                f"The model is saved in {trainer.args.output_dir}, but it was not pushed: {error}\n"
                "Push it with samclip publish."
            )
