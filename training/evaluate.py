"""
Judges models by the paper's protocols, on the same images in the same run.

    accelerate launch training/evaluate.py --model runs/stage3 --output_dir runs/evaluation

The models may be SAM-CLIPs, SAMs, CLIPs and cascades of the two, "SAM+CLIP". Writes `results.json`, `results.md` and a
panel of pictures for every task and model. What `results.json` holds already is not done again.
"""

import argparse
import shlex
import sys
from pathlib import Path

# This script has the name of the library `evaluate`, and its folder comes first where Python looks.
sys.path = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from samclip_hf import miniature
from samclip_hf.evaluation.models import load
from samclip_hf.evaluation.protocol import Protocol
from samclip_hf.evaluation.report import Results, draw_panel
from samclip_hf.miniature.tasks import tasks as miniature_tasks


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
    parser.add_argument("--share", type=float, default=1.0, help="of the miniature's scenes, for a quick look")
    parser.add_argument("--seed", type=int, default=101, help="of the miniature's scenes: 101, 201, 301, ...")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/evaluation"))
    arguments = parser.parse_args(argv)
    if not 0 < arguments.share <= 1:
        parser.error(f"--share is above 0 and at most 1, got {arguments.share}")
    return arguments


def chosen(names: list[str], available: dict) -> dict:
    """The tasks that any of the names means: a whole name, or what comes before ":" or "@"."""
    if names == ["all"]:
        return available
    wanted = {}
    for name in names:
        found = {key: task for key, task in available.items() if name in (key, key.split("@")[0], key.split(":")[0])}
        if not found:
            sys.exit(f"There is no task {name!r}. There are: {', '.join(available)}.")
        wanted |= found
    return wanted


def short_names(names: list[str]) -> list[str]:
    """What tables call models: folders and repositories by their last names, where those differ."""
    short = ["+".join(Path(part).name for part in name.split("+")) for name in names]
    return short if len(set(short)) == len(names) else names


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    state = PartialState()
    wanted = chosen(arguments.task, miniature_tasks(arguments.seed, arguments.share))
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["training/evaluate.py", *(sys.argv[1:] if argv is None else argv)])
    results = Results(arguments.output_dir, command)
    for name, short_name in zip(arguments.model, short_names(arguments.model), strict=True):
        try:
            model = load(name, state.device, getattr(torch, arguments.dtype))
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
            outcome = task.run(model)
            if outcome is not None:
                results.add(key, task, model, outcome)
                (arguments.output_dir / "results.md").write_text(f"{results.markdown()}\n{results.protocols()}")
                if isinstance(task, Protocol):
                    file_name = f"{key}-{model.name}.png".replace(":", "-").replace("@", "-").replace("/", "-")
                    draw_panel(task, model, outcome, arguments.output_dir / file_name)
            state.wait_for_everyone()
    state.print(f"\n{results.markdown()}\nFigures, protocols and pictures: {arguments.output_dir}")


if __name__ == "__main__":
    main()
