"""
Judges models by the paper's protocols, on the same images in the same run.

    accelerate launch training/evaluate.py --model runs/stage3 --output_dir runs/evaluation
    accelerate launch training/evaluate.py --model MODEL SAM CLIP SAM+CLIP --data data \
        --task classification:imagenet semantic:voc21 composed:voc21 cascade:voc21 cost:1024x1024

A task is a protocol, a colon, and a data set: one known by name, below --data, a path, or "hf://owner/name" on the
Hub. Without a colon, it is judged in the miniature world. The models may be SAM-CLIPs, SAMs, CLIPs, SigLIPs and
cascades of two, "SAM+CLIP". Writes `results.json`, `results.md`, a panel of pictures for every task and model, and of
every SAM-CLIP the `model-index` that its card takes. What `results.json` holds already is not done again.

Known by name: classification: imagenet, imagenet-v2, places365; retrieval: flickr30k, coco-captions; instances and
prompts: coco, lvis; semantic, composed, cascade: voc20, voc21, context59, context60, ade150, stuff171, object81,
panoptic133, cityscapes. docs/evaluate.md says how each is laid out and where to get it.
"""

import argparse
import os
import re
import shlex
import sys
import zlib
from dataclasses import replace
from datetime import timedelta
from itertools import islice
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from huggingface_hub import ModelCardData

from samclip_hf import miniature
from samclip_hf.datasets import DataSet, open_captions, open_classification, open_objects, open_segmentation
from samclip_hf.evaluation import (
    CascadeSegmentation,
    ComposedSegmentation,
    Cost,
    Evaluator,
    HeadProbing,
    LinearProbing,
    PromptedSegmentation,
    Results,
    Retrieval,
    SamClipAdapter,
    SampleEvaluator,
    SemanticSegmentation,
    ZeroShotClassification,
    ZeroShotInstanceSegmentation,
    adapter_classes,
    create_model_index,
    load_adapter,
    save_result_panel,
)
from samclip_hf.miniature_lab.tasks import tasks as miniature_tasks


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    teachers = [str(miniature.sam_teacher()), str(miniature.clip_teacher())]
    parser.add_argument(
        "--model",
        nargs="+",
        default=[str(miniature.checkpoint()), *teachers, "+".join(teachers)],
        help="folders or names on the Hub (default: the shipped miniature, its parents, and their cascade)",
    )
    parser.add_argument(
        "--task", nargs="+", default=["all"], help='such as "classification" or "semantic:miniature@96"'
    )
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the data sets that have names")
    parser.add_argument(
        "--train_data",
        help="what linear-probe and head-probe learn from: of a name its training images",
    )
    parser.add_argument("--steps", type=int, help="of training each head of head-probe (default: 20000)")
    parser.add_argument("--detections", help="of a detector, in COCO's result format, for instances")
    parser.add_argument("--size", type=int, nargs="+", default=[None], help="of images in pixels; several in one run")
    parser.add_argument("--window", type=int, help="side of sliding windows for semantic, in pixels")
    parser.add_argument("--background_threshold", type=float, help="instead of texts of background")
    parser.add_argument("--limit", type=int, help="judge so many samples of every data set, and say so")
    parser.add_argument("--share", type=float, default=1.0, help="of the miniature's scenes, for a quick look")
    parser.add_argument("--seed", type=int, default=101, help="of the miniature's scenes: 101, 201, 301, ...")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/evaluation"))
    arguments = parser.parse_args(argv)
    if not 0 < arguments.share <= 1:
        parser.error(f"--share is above 0 and at most 1, got {arguments.share}")
    for option in ("limit", "steps", "window"):
        if (value := getattr(arguments, option)) is not None and value < 1:
            parser.error(f"--{option} is 1 or more, got {value}")
    if any(size is not None and size < 1 for size in arguments.size):
        parser.error(f"--size is 1 or more, got {arguments.size}")
    return arguments


PROTOCOLS = (
    *("classification", "retrieval", "instances", "prompts", "semantic", "composed", "cascade"),
    *("linear-probe", "head-probe", "cost"),
)
UNSIZED = ("instances", "prompts", "cascade", "cost")  # every model sees its own size
# Which protocols heed an option: one that none of those asked for heeds is an error.
OPTIONS = {
    "limit": PROTOCOLS[:-1],
    "size": tuple(protocol for protocol in PROTOCOLS if protocol not in UNSIZED),
    "window": ("semantic",),
    "background_threshold": ("semantic", "composed", "cascade"),
    "steps": ("head-probe",),
    "train_data": ("linear-probe", "head-probe"),
    "detections": ("instances",),
}


def tasks_on(protocol: str, data: str, arguments: argparse.Namespace) -> dict[str, Evaluator]:
    """One protocol on one data set, at every size."""
    root, found = arguments.data, {}
    for size in arguments.size:
        by_size = {} if size is None else {"size": size}
        names = {"background_threshold": arguments.background_threshold}
        task: Evaluator
        if protocol == "classification":
            task = ZeroShotClassification(first(open_classification(data, root), arguments.limit), size)
        elif protocol == "retrieval":
            task = Retrieval(first(open_captions(data, root), arguments.limit), size)
        elif protocol == "instances":
            objects = open_objects(data, root, arguments.detections)
            task = ZeroShotInstanceSegmentation(first(objects, arguments.limit), "lvis" if data == "lvis" else "coco")
        elif protocol == "prompts":
            task = PromptedSegmentation(first(open_objects(data, root), arguments.limit))
        elif protocol == "semantic":
            labels = first(open_segmentation(data, root), arguments.limit)
            task = SemanticSegmentation(labels, window=arguments.window, **by_size, **names)
        elif protocol == "composed":
            task = ComposedSegmentation(first(open_segmentation(data, root), arguments.limit), **by_size, **names)
        elif protocol == "cascade":
            task = CascadeSegmentation(first(open_segmentation(data, root), arguments.limit), **names)
        elif protocol in ("linear-probe", "head-probe"):
            if not arguments.train_data or size is None:
                raise ValueError(f"{protocol} needs --train_data and --size.")
            read, kind = (
                (open_classification, LinearProbing)
                if protocol == "linear-probe"
                else (open_segmentation, HeadProbing)
            )
            train = read(arguments.train_data, root, split="train")
            by_steps = {"steps": arguments.steps} if arguments.steps and protocol == "head-probe" else {}
            task = kind(train, first(read(data, root), arguments.limit), size, **by_steps)
        elif protocol == "cost":
            if not (sides := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", data)):
                raise ValueError("cost is of an image's height and width in pixels, such as cost:768x1024.")
            task = Cost(int(sides[1]), int(sides[2]), [f"class {number}" for number in range(20)])
        else:
            raise ValueError(f"There is no protocol {protocol!r}. There are: {', '.join(PROTOCOLS)}.")
        found[f"{protocol}:{data}" + (f"@{size}" if size and protocol not in UNSIZED else "")] = task
    return found


def first(data: DataSet, limit: int | None) -> DataSet:
    """The first so many samples."""
    if limit is None:
        return data
    description = data.description | {"only": f"the first {limit} samples"}
    return replace(data, samples=list(islice(data.samples, limit)), description=description)


def of_miniature(name: str) -> bool:
    """Whether a task is judged in the miniature world, as one without a colon is."""
    return re.fullmatch("[^:]*(:miniature(@.*)?)?", name) is not None


def chosen(names: list[str], arguments: argparse.Namespace) -> dict[str, Evaluator]:
    """The tasks that the names mean. Of the miniature's also several: by what comes before ":" or "@"."""
    available = miniature_tasks(arguments.seed, arguments.share)
    for option, protocols in OPTIONS.items():
        given = getattr(arguments, option) not in (None, [None])
        if given and not any(name.split(":")[0] in protocols for name in names if not of_miniature(name)):
            sys.exit(
                f"--{option} is for {', '.join(protocols)}, on other data than the miniature's, which has its own; no "
                f"such task is asked for: {', '.join(names)}."
            )
    if names == ["all"]:
        return available
    wanted: dict[str, Evaluator] = {}
    for name in names:
        protocol, _, data = name.partition(":")
        if not of_miniature(name):
            try:
                wanted |= tasks_on(protocol, data, arguments)
            except (ValueError, OSError) as error:
                sys.exit(f"{name}: {error}")
            continue
        found = {key: task for key, task in available.items() if name in (key, key.split("@")[0], key.split(":")[0])}
        if not found:
            sys.exit(f"There is no task {name!r}. There are: {', '.join(available)}.")
        wanted |= found
    return wanted


def short_names(names: list[str]) -> list[str]:
    """What tables call models: folders and repositories by their last names, where those differ."""
    short = ["+".join(Path(os.path.abspath(part)).name for part in name.split("+")) for name in names]
    return short if len(set(short)) == len(names) else names


def safe(name: str) -> str:
    """For a file, whose name may have 255 bytes."""
    shown = re.sub(r"[^\w.+-]", "-", name, flags=re.ASCII)
    return shown if len(shown) <= 200 else f"{shown[:190]}-{zlib.crc32(name.encode()):08x}"


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    # One process may draw, train heads or judge a slow image for longer than torch waits by default.
    state = PartialState(timeout=timedelta(days=7))
    wanted = chosen(arguments.task, arguments)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["training/evaluate.py", *(sys.argv[1:] if argv is None else argv)])
    results = Results(arguments.output_dir, command)
    for name in arguments.model:
        try:
            adapter_classes(name)
        except (ValueError, OSError) as error:
            sys.exit(f"{name} cannot be loaded: {error}")
    for name, short_name in zip(arguments.model, short_names(arguments.model), strict=True):
        try:
            model = load_adapter(name, state.device, getattr(torch, arguments.dtype))
            model.name = short_name
        except (ValueError, OSError) as error:
            sys.exit(f"{name} cannot be loaded: {error}")
        for key, task in wanted.items():
            if not task.applies_to(model):
                continue
            # The first process decides for all: the file may change under the others' eyes.
            if broadcast_object_list([results.holds(key, task, model)])[0]:
                state.print(f"{key}, {model.name}: done already, see {results.path}")
                continue
            try:
                outcome = task.run(model)
            except (ValueError, OSError) as error:
                sys.exit(f"{key}, {model.name}: {error}")
            if outcome is not None:
                if isinstance(task, SampleEvaluator):  # first, since what the results hold is not done again
                    save_result_panel(
                        task, model, outcome, arguments.output_dir / f"{safe(f'{key}-{model.name}')}.png"
                    )
                results.add(key, task, model, outcome)
                (arguments.output_dir / "results.md").write_text(f"{results.markdown()}\n{results.protocols()}")
                if isinstance(model, SamClipAdapter):
                    card = ModelCardData(
                        model_name=short_name, eval_results=create_model_index(results.content, short_name)
                    )
                    (arguments.output_dir / f"{safe(short_name)}-model-index.yaml").write_text(card.to_yaml() + "\n")
            state.wait_for_everyone()
    state.print(f"\n{results.markdown()}\nFigures, protocols and pictures: {arguments.output_dir}")


if __name__ == "__main__":
    main()
