"""`samclip evaluate`: evaluates models with the paper's protocols, all models on the same images."""

import argparse
import os
import re
import shlex
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import CommandError
from .argument_types import CommandParser, fraction, positive_int
from .models import check_model
from .outputs import check_writable

if TYPE_CHECKING:
    from samclip_hf.datasets import DataSet
    from samclip_hf.evaluation import Evaluator, ModelAdapter, Results

DESCRIPTION = """\
Evaluates models with the paper's protocols, all models on the same images.

examples:
  samclip evaluate --model runs/stage3 --output_dir runs/evaluation
  samclip evaluate --model runs/stage3 facebook/sam-vit-base --task prompts:data/sa1b cost:1024x1024
  accelerate launch -m samclip_cli evaluate --model SAMCLIP SAM CLIP SAM+CLIP --data data \\
      --task classification:imagenet semantic:voc21 composed:voc21 cascade:voc21

tasks:
  A task is EVALUATOR:DATA. DATA is the name of a dataset in the folder --data, a path, or
  "hf://owner/name" for the Hub. A task without ":DATA" runs on the synthetic scenes of the
  miniature and needs no files.

  evaluator                    names of datasets
  classification               imagenet, imagenet-v2, places365
  retrieval                    flickr30k, coco-captions
  instances, prompts           coco, lvis
  semantic, composed, cascade  voc20, voc21, context59, context60, ade150, stuff171, object81,
                               panoptic133, cityscapes
  linear-probe                 as classification
  head-probe                   as semantic
  cost                         HEIGHTxWIDTH in pixels instead of a dataset

  linear-probe and head-probe require --train_data and --size. docs/evaluate.md in the repository
  describes the evaluators, and the layout of each dataset.

models:
  SAM-CLIP, SAM, CLIP and SigLIP checkpoints. SAM+CLIP, the names of a SAM and of a CLIP or SigLIP
  with a plus between them, is the unmerged model of both (--sam and --clip of other commands), such
  as facebook/sam-vit-base+openai/clip-vit-base-patch16. cascade is for unmerged models only.
  Tasks that a model does not support are listed and skipped.

output:
  results.json, results.md, an image of sample predictions for every task and model, and a model
  index for the model card of every SAM-CLIP. Results that are already in results.json are not
  computed again. Results are identified by weights and protocol: results of another model in a
  folder of the same name, and of another protocol of the same task, have separate names. No result
  is replaced."""

PAIR_HINT = (
    "pass the unmerged model of a SAM and a CLIP as SAM+CLIP, such as --model "
    "facebook/sam-vit-base+openai/clip-vit-base-patch16."
)
PROTOCOLS = (
    *("classification", "retrieval", "instances", "prompts", "semantic", "composed", "cascade"),
    *("linear-probe", "head-probe", "cost"),
)
NATIVE_SIZE = ("instances", "prompts", "cascade", "cost")  # these run every model at its own image size
# The evaluators that each option affects on data other than the miniature's scenes. An option that affects none of the
# tasks is an error.
OPTIONS = {
    "data": PROTOCOLS[:-1],
    "limit": PROTOCOLS[:-1],
    "size": tuple(protocol for protocol in PROTOCOLS if protocol not in NATIVE_SIZE),
    "window": ("semantic",),
    "background_threshold": ("semantic", "composed", "cascade"),
    "background_templates": ("semantic", "composed", "cascade"),
    "steps": ("head-probe",),
    "train_data": ("linear-probe", "head-probe"),
    "detections": ("instances",),
}


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser("evaluate", dict.fromkeys(("--sam", "--clip"), PAIR_HINT), description=DESCRIPTION)
    parser.add_argument(
        "--model",
        nargs="+",
        metavar="NAME",
        help="folders or repositories on the Hub, or pairs SAM+CLIP (default: those of the shipped miniature, its "
        "teachers, and their unmerged model that support the tasks)",
    )
    parser.add_argument(
        "--task",
        nargs="+",
        metavar="TASK",
        default=["all"],
        help='such as "classification" or "semantic:voc21" (default: all tasks on the miniature\'s scenes)',
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="folder of the datasets that are known by name (default: data)",
    )
    parser.add_argument(
        "--train_data",
        metavar="DATA",
        help="training data of linear-probe and head-probe; for a dataset known by name, its training split is used",
    )
    parser.add_argument(
        "--steps", type=positive_int, metavar="N", help="training steps of each head of head-probe (default: 20000)"
    )
    parser.add_argument(
        "--detections", metavar="FILE", help="a detector's boxes for instances, in COCO's result format"
    )
    parser.add_argument(
        "--size",
        type=positive_int,
        nargs="+",
        metavar="PIXELS",
        default=[None],
        help="image sizes; every task runs at each of them (default: 448 for semantic, otherwise the model's own)",
    )
    parser.add_argument("--window", type=positive_int, metavar="PIXELS", help="side of sliding windows for semantic")
    parser.add_argument(
        "--background_threshold",
        type=float,
        metavar="P",
        help="assign pixels with a lower score to the background, instead of using texts for the background",
    )
    parser.add_argument(
        "--background_templates",
        action="store_true",
        default=None,
        help="apply the templates of the class names also to the texts that describe the background",
    )
    parser.add_argument("--limit", type=positive_int, metavar="N", help="evaluate the first N samples of datasets")
    parser.add_argument(
        "--share",
        type=fraction,
        metavar="P",
        help="fraction of the miniature's scenes to evaluate, for a quick check (default: 1)",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the miniature's scenes (default: 101)")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="data type of the models (default: %(default)s)",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        metavar="FOLDER",
        default=Path("runs/evaluation"),
        help="folder of the results (default: %(default)s)",
    )
    return parser


def check_tasks(arguments: argparse.Namespace) -> None:
    """Raises `CommandError` for an unknown evaluator, and for an option that affects none of the tasks."""
    others = [name for name in arguments.task if not uses_miniature(name)]
    for name in arguments.task:
        if re.split("[:@]", name)[0] not in PROTOCOLS and arguments.task != ["all"]:
            raise CommandError(f"{name}: unknown evaluator. Available evaluators: {', '.join(PROTOCOLS)}.")
    for option, protocols in OPTIONS.items():
        is_set = getattr(arguments, option) not in (None, [None])
        if is_set and not any(name.split(":")[0] in protocols for name in others):
            hint = " Pass --share to evaluate a part of the miniature's scenes." * (option == "limit")
            raise CommandError(
                f"--{option} applies to {', '.join(protocols)} on data other than the miniature's scenes, and none of "
                f"the tasks is one of them: {' '.join(arguments.task)}.{hint}"
            )
    for option in ("share", "seed"):
        if getattr(arguments, option) is not None and len(others) == len(arguments.task):
            raise CommandError(
                f"--{option} applies to the miniature's scenes, and none of the tasks uses them: "
                f"{' '.join(arguments.task)}."
            )


def uses_miniature(name: str) -> bool:
    """Whether a task runs on the miniature's scenes."""
    return re.fullmatch("[^:]*(:miniature(@.*)?)?", name) is not None


def build_evaluators(arguments: argparse.Namespace) -> dict[str, "Evaluator"]:
    """
    The evaluators of all tasks, by name. On the miniature's scenes, other names than an evaluator's stand for several:
    "classification" for "classification:miniature@64", "classification:miniature@96", ...

    Raises `CommandError` for an unknown task, and for data that cannot be read.
    """
    from samclip_hf.miniature_lab.tasks import tasks as miniature_tasks

    share, seed = arguments.share or 1.0, 101 if arguments.seed is None else arguments.seed
    available = miniature_tasks(seed, share)
    if arguments.task == ["all"]:
        return available
    evaluators: dict[str, Evaluator] = {}
    for name in arguments.task:
        if uses_miniature(name):
            found = {key: task for key, task in available.items() if name in (key.split("@")[0], key.split(":")[0])}
            found = {name: available[name]} if name in available else found
            if not found:
                raise CommandError(f"unknown task {name!r}. Tasks on the miniature's scenes: {', '.join(available)}.")
        else:
            try:
                protocol, _, data = name.partition(":")
                found = evaluators_on(protocol, data, arguments)
            except (ValueError, OSError) as error:
                raise CommandError(f"{name}: {error}") from error
        evaluators |= found
    return evaluators


def evaluators_on(protocol: str, data: str, arguments: argparse.Namespace) -> dict[str, "Evaluator"]:
    """The evaluators of one protocol on one dataset, by name: one for each image size."""
    evaluators = {}
    for size in arguments.size:
        suffix = f"@{size}" if size and protocol not in NATIVE_SIZE else ""
        evaluators[f"{protocol}:{data}{suffix}"] = build_evaluator(protocol, data, size, arguments)
    return evaluators


def build_evaluator(protocol: str, data: str, size: int | None, arguments: argparse.Namespace) -> "Evaluator":
    """The evaluator of one protocol on one dataset at one image size. Raises `ValueError` or `OSError` if the data
    cannot be read or an argument is missing."""
    from samclip_hf.datasets import open_captions, open_classification, open_objects, open_segmentation
    from samclip_hf.evaluation import (
        CascadeSegmentation,
        ComposedSegmentation,
        Cost,
        HeadProbing,
        LinearProbing,
        PromptedSegmentation,
        Retrieval,
        SemanticSegmentation,
        ZeroShotClassification,
        ZeroShotInstanceSegmentation,
    )

    root, limit = arguments.data or Path("data"), arguments.limit
    sized: dict[str, Any] = {} if size is None else {"size": size}
    background: dict[str, Any] = {
        "background_threshold": arguments.background_threshold,
        "background_templates": bool(arguments.background_templates),
    }
    match protocol:
        case "classification":
            return ZeroShotClassification(first(open_classification(data, root), limit), size)
        case "retrieval":
            return Retrieval(first(open_captions(data, root), limit), size)
        case "instances":
            objects = first(open_objects(data, root, arguments.detections), limit)
            return ZeroShotInstanceSegmentation(objects, "lvis" if data == "lvis" else "coco")
        case "prompts":
            return PromptedSegmentation(first(open_objects(data, root), limit))
        case "semantic":
            images = first(open_segmentation(data, root), limit)
            return SemanticSegmentation(images, window=arguments.window, **sized, **background)
        case "composed":
            return ComposedSegmentation(first(open_segmentation(data, root), limit), **sized, **background)
        case "cascade":
            return CascadeSegmentation(first(open_segmentation(data, root), limit), **background)
        case "linear-probe" | "head-probe":
            if not arguments.train_data or size is None:
                raise ValueError(f"{protocol} requires --train_data and --size.")
            if protocol == "linear-probe":
                labeled = open_classification(arguments.train_data, root, split="train")
                return LinearProbing(labeled, first(open_classification(data, root), limit), size)
            segmented = open_segmentation(arguments.train_data, root, split="train")
            steps = {"steps": arguments.steps} if arguments.steps else {}
            return HeadProbing(segmented, first(open_segmentation(data, root), limit), size, **steps)
        case "cost":
            sides = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", data)
            if sides is None:
                raise ValueError("cost needs a height and a width in pixels, such as cost:768x1024.")
            return Cost(int(sides[1]), int(sides[2]), [f"class {number}" for number in range(20)])
    raise ValueError(f"unknown evaluator {protocol!r}")


def first(data: "DataSet", limit: int | None) -> "DataSet":
    """The first `limit` samples, which the dataset's description then states."""
    if limit is None:
        return data
    description = data.description | {"only": f"the first {limit} samples"}
    return replace(data, samples=list(islice(data.samples, limit)), description=description)


def split_pair(name: str) -> list[str]:
    """The names of the two models of "SAM+CLIP", or of a single model, whose folder may have a plus in its name."""
    return [name] if os.path.isdir(name) else name.split("+", 1)


def short_names(names: list[str]) -> list[str]:
    """Names of models for tables: the last parts of their paths, with as many folders above as distinguish them."""
    paths = [[Path(os.path.abspath(part)).parts for part in split_pair(name)] for name in names]
    short = [""] * len(names)
    for depth in range(1, 1 + max(len(path) for parts in paths for path in parts)):
        counts = Counter(short)
        for index, parts in enumerate(paths):
            if counts[short[index]] > 1 or depth == 1:
                short[index] = "+".join("/".join(path[-depth:]) for path in parts)
    return short


def file_name(name: str) -> str:
    """A name without special characters, short enough for a file (255 bytes on most file systems)."""
    safe = re.sub(r"[^\w.+-]", "-", name, flags=re.ASCII)
    return safe if len(safe) <= 200 else f"{safe[:190]}-{zlib.crc32(name.encode()):08x}"


def panel_name(task: str, model: str) -> str:
    """The file of a task's sample predictions."""
    return f"{file_name(f'{task}-{model}')}.png"


def index_name(model: str) -> str:
    """The file of a model's index."""
    return f"{file_name(model)}-model-index.yaml"


def select_models(names: list[str], evaluators: dict[str, "Evaluator"], are_defaults: bool) -> list[str]:
    """
    The models that support at least one of the tasks. Reads only configurations.

    are_defaults (`bool`):
        Whether the user has named no models. Those that support none of the tasks are then left out.

    Raises `CommandError` for a model that cannot be evaluated, and for one that the user has named and that supports
    none of the tasks.
    """
    from samclip_hf.evaluation import adapter_class

    selected = []
    for name in names:
        try:
            kind = adapter_class(*split_pair(name))
        except (ValueError, OSError) as error:
            raise CommandError(f"{name} cannot be loaded: {error}") from error
        if any(evaluator.applies_to(kind) for evaluator in evaluators.values()):
            selected.append(name)
        elif not are_defaults:
            raise CommandError(
                f"{name} ({kind.__name__.removesuffix('Adapter')}) supports none of the tasks: "
                f"{', '.join(evaluators)}. docs/evaluate.md in the repository lists which models each task is for."
            )
    return selected


def open_results(folder: Path, command: str, files: Iterable[str]) -> "Results":
    """
    Returns the results in a folder, which is created.

    files (`Iterable[str]`):
        Names of files that will be written besides results.json.

    Raises `CommandError` if results.json is of another program, or if one of the files exists without a results.json.
    """
    from samclip_hf.evaluation import Results

    folder.mkdir(parents=True, exist_ok=True)
    try:
        results = Results(folder, command)
    except (OSError, ValueError) as error:
        raise CommandError(f"--output_dir {folder}: {error}") from error
    if not results.path.exists() and (found := sorted(name for name in files if (folder / name).exists())):
        raise CommandError(
            f"--output_dir {folder}: {found[0]} would be replaced. It was not written by samclip evaluate, because "
            "there is no results.json. Pass another folder."
        )
    return results


def write_tables(results: "Results", model: "ModelAdapter", model_name: str) -> None:
    """Writes the tables of all results, and the index of a SAM-CLIP, next to `results.json`."""
    from huggingface_hub import ModelCardData

    from samclip_hf.evaluation import SamClipVisionAdapter, create_model_index
    from samclip_hf.files import write_atomically

    folder = results.path.parent
    write_atomically(folder / "results.md", f"{results.markdown()}\n{results.protocols()}")
    if isinstance(model, SamClipVisionAdapter):
        card = ModelCardData(model_name=model_name, eval_results=create_model_index(results.content, model_name))
        index = f"# weights {model.weights}, see docs/evaluate.md\n{card.to_yaml()}\n"
        write_atomically(folder / index_name(model_name), index)


def run(argv: Sequence[str]) -> int:
    arguments = build_parser().parse_args(argv)
    check_tasks(arguments)
    for name in arguments.model or []:
        for part in split_pair(name):
            check_model(part)
    check_writable(arguments.output_dir, "--output_dir")

    import torch
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    from samclip_hf import miniature
    from samclip_hf.evaluation import SampleEvaluator, load_adapter, save_result_panel

    teachers = [miniature.sam_teacher(), miniature.clip_teacher()]
    models = list(dict.fromkeys(arguments.model or [miniature.checkpoint(), *teachers, "+".join(teachers)]))
    # One process can draw images, train heads or process a slow image for longer than the default of 30 minutes.
    state = PartialState(timeout=timedelta(days=7))
    evaluators = build_evaluators(arguments)
    models = select_models(models, evaluators, are_defaults=not arguments.model)
    output_dir = arguments.output_dir
    names = short_names(models)
    files = [index_name(name) for name in names] + [panel_name(key, name) for key in evaluators for name in names]
    results = open_results(output_dir, shlex.join(["samclip", "evaluate", *argv]), ["results.md", *files])
    for name, short_name in zip(models, names, strict=True):
        try:
            model_name, *clip = split_pair(name)
            model = load_adapter(model_name, state.device, getattr(torch, arguments.dtype), *clip)
            model.name = short_name
        except (ValueError, OSError) as error:
            sys.exit(f"{name} cannot be loaded: {error}")
        if skipped := [key for key, evaluator in evaluators.items() if not evaluator.applies_to(model)]:
            kind = type(model).__name__.removesuffix("Adapter")
            state.print(f"{short_name} ({kind}) does not support and skips {', '.join(skipped)}.")
        for key, evaluator in evaluators.items():
            if key in skipped:
                continue
            # The main process decides for all, because it may write the file while the others read it.
            place = (*results.locate(key, evaluator, model), results.holds(key, evaluator, model))
            task_name, model_name, is_done = broadcast_object_list([place])[0]
            if is_done:
                state.print(f"{task_name}, {model_name}: already in {results.path}")
                if state.is_main_process:  # an earlier run may have ended before it wrote them
                    write_tables(results, model, model_name)
                continue
            if task_name != key:
                state.print(
                    f"{results.path} contains results of {key} with another protocol. The new results have the name "
                    f"{task_name}."
                )
            if model_name.endswith(f"@{model.identity[:8]}"):
                state.print(
                    f"{results.path} contains results of another model named {short_name}, or results of an older "
                    f"version, which did not record the weights. The new results have the name {model_name}."
                )
            try:
                result = evaluator.run(model)
            except (ValueError, OSError) as error:
                sys.exit(f"{key}, {model_name}: {error}")
            if result is not None:  # only the main process has the result
                if not results.path.exists():  # without it, another run does not replace the image of a lost result
                    results.save()
                if isinstance(evaluator, SampleEvaluator):  # before results.add, after which the task is not run again
                    save_result_panel(evaluator, model, result, output_dir / panel_name(task_name, model_name))
                _, model_name = results.add(key, evaluator, model, result)
                write_tables(results, model, model_name)
            state.wait_for_everyone()
    state.print(f"\n{results.markdown()}\nMetrics, protocols and images are in {output_dir}.")
    return 0
