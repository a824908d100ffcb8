"""
Trains and evaluates all variants of the miniature with several seeds, and writes the paper's tables and the ablations.

    python -m samclip_hf.miniature_lab.tables

Takes hours. Several processes with the same `--output_dir` share the work: one of them trains and evaluates each run.
An interrupted command continues from the finished runs in `runs/tables`. After each seed it writes the seed's results
to `seed<number>.json`, and `tables.json`, `tables.md` and `tables.png` with the seeds that are complete. A seed whose
file is in the `--output_dir` is not run again.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from statistics import mean
from typing import Any, NoReturn

from .. import miniature
from ..distillation.arguments import WITHOUT_EFFECT, SamClipTrainingArguments
from ..evaluation import read_results
from ..evaluation.report import PER_CLASS_PREFIX
from . import commands
from .tasks import OBJECT_COUNTS

# Optimizer steps by stage: a small fraction of the recipes' steps.
STEPS = {1: 300, 2: 80, 3: 60}
NO_REGION_LOSS = {"region_loss_weight": 0.0, "dense_loss_weight": 0.0}  # the paper's losses


@dataclass(frozen=True)
class Run:
    """
    One training stage of a variant.

    Attributes:
        title (`str`): Title of the row in the tables.
        stage (`int`): The stage, whose recipe is used.
        start (`str`, *optional*): Name of the run to start from. Default: the teachers.
        arguments (`dict[str, Any]`): Training arguments that differ from the recipe.
        baseline (`str`, *optional*): Name of the run that this one is compared with.
        steps (`int`, *optional*): Optimizer steps. Default: those of the stage in `STEPS`.
    """

    title: str
    stage: int
    start: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    baseline: str | None = None
    steps: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """All training arguments that differ from the recipe. In a run without the region loss, this includes the
        defaults of arguments that then have no effect, because other values would raise an error."""
        recipe = commands.read_recipe(f"miniature_stage{self.stage}")
        options = dict(self.arguments)
        if any({**recipe, **options}.get(name) for name in NO_REGION_LOSS):
            return options
        unused = {
            name
            for names, _, _ in WITHOUT_EFFECT
            if "regions_per_image" in names or ("sam_batch_size" in names and self.stage != 2)
            for name in names
        }
        defaults = {
            item.name: item.default for item in fields(SamClipTrainingArguments) if item.default is not MISSING
        }
        options = {name: value for name, value in options.items() if name not in unused}
        return options | {name: defaults[name] for name in unused & recipe.keys() & defaults.keys()}


# The learning rates of image encoder and mask decoder are multiples of the CLIP head's.
_MULTIPLIERS = [item.name for item in fields(SamClipTrainingArguments) if item.name.endswith("_lr_multiplier")]
RUNS = {
    "stage1": Run("after stage 1", 1),
    "paper_stage1": Run("without the region loss", 1, None, NO_REGION_LOSS, "stage1"),
    "segments_only": Run("region loss of segments only", 1, None, {"dense_loss_weight": 0.0}, "stage1"),
    "patches_only": Run("region loss of patches only", 1, None, {"region_loss_weight": 0.0}, "stage1"),
    "one_region": Run("1 region per image, not up to 4", 1, None, {"regions_per_image": 1}, "stage1"),
    "mean_pooling": Run("mean pooling", 1, None, {"clip_head_pooling": "mean"}, "stage1"),
    "random_head": Run(
        "random initialization of the CLIP head", 1, None, {"clip_head_initialization": "random"}, "stage1"
    ),
    "one_layer": Run("CLIP head with one layer", 1, None, {"clip_head_layers": 1}, "stage1"),
    "stage2": Run("after stage 2", 2, "stage1"),
    "no_regions_in_stage2": Run("without the region loss in stage 2", 2, "stage1", NO_REGION_LOSS, "stage2"),
    "head_only": Run("image encoder and mask decoder frozen", 2, "stage1", dict.fromkeys(_MULTIPLIERS, 0.0), "stage2"),
    "sam_batch_3": Run("3 images with masks per step, not 12", 2, "stage1", {"sam_batch_size": 3}, "stage2"),
    "lambda_0": Run("lambda 0", 2, "stage1", {"sam_loss_weight": 0.0}, "stage2"),
    "lambda_100": Run("lambda 100", 2, "stage1", {"sam_loss_weight": 100.0}, "stage2"),
    "sam_mask_loss": Run("SAM's own mask loss", 2, "stage1", {"mask_loss": "sam"}, "stage2"),
    "rate_1": Run("encoder learning rate x1", 2, "stage1", {"encoder_lr_multiplier": 1.0}, "stage2"),
    "rate_1_lambda_0": Run(
        "encoder learning rate x1, lambda 0",
        2,
        "stage1",
        {"encoder_lr_multiplier": 1.0, "sam_loss_weight": 0.0},
        "stage2",
    ),
    "lora": Run(
        "LoRA, rank 16, encoder learning rate x1",
        2,
        "stage1",
        {"lora_r": 16, "encoder_lr_multiplier": 1.0},
        "stage2",
    ),
    "no_stage1": Run(
        "without stage 1, same number of steps",
        2,
        None,
        {"clip_head_initialization": "copied", "sam_batch_size": 3},
        "sam_batch_3",
        STEPS[1] + STEPS[2],
    ),
    "paper_stage2": Run("the paper's losses, after stage 2", 2, "paper_stage1", NO_REGION_LOSS),
    "stage3": Run("after stage 3", 3, "stage2"),
    "paper_stage3": Run("without the region loss in all stages", 3, "paper_stage2", NO_REGION_LOSS, "stage3"),
    "regions_in_stage3": Run("region loss in stage 3 only", 3, "paper_stage2", {}, "stage3"),
}
STAGES = ("stage1", "stage2", "stage3", "paper_stage3")  # columns of the paper's tables
HEADERS = ("after stage 1", "after stage 2", "after stage 3", "after stage 3, the paper's losses")
# Columns of the table of ablations: task, metric, title.
COLUMNS = [
    ("classification:miniature@64", "top1", "top-1, 64 px"),
    ("classification:miniature@128", "top1", "top-1, 128 px"),
    ("classification:miniature@128", "top1, never captioned", "never captioned, 128 px"),
    ("prompts:miniature", "point_miou", "mIoU, point"),
    ("prompts:miniature", "box_miou", "mIoU, box"),
    ("semantic:miniature@128", "mean_iou", "mIoU by text, patches"),
    ("composed:miniature", "mean_iou", "mIoU by text, both heads"),
    ("composed:miniature@classes", "mean_iou", "mIoU by text, both heads, paper's composition"),
]
# Rows of the paper's tables: number of the table in the paper, task, metric, title.
ROWS = [
    *[
        ("1, 6", f"classification:miniature@{size}", "top1", f"zero-shot top-1 of 48, {size} px")
        for size in (64, 96, 128)
    ],
    ("-", "classification:miniature@128", "top1, never captioned", "zero-shot top-1, never captioned, 128 px"),
    ("1", "retrieval:miniature", "mean_recall@1", "retrieval R@1, mean of both directions"),
    ("1", "instances:miniature", "AP", "mask AP from true boxes"),
    ("-", "prompts:miniature", "point_miou", "mIoU from a point"),
    ("-", "prompts:miniature", "box_miou", "mIoU from a box"),
    *[("2", f"semantic:miniature@{size}", "mean_iou", f"mIoU by text, patches, {size} px") for size in (96, 128)],
    ("5, 7", "composed:miniature@classes", "mean_iou", "mIoU by text, both heads, paper's composition"),
    ("5, 7", "composed:miniature", "mean_iou", "mIoU by text, both heads or two encoders"),
    ("7", "cascade:miniature", "mean_iou", "mIoU by text, cascade, masked crops"),
    ("7", "cascade:miniature@raw-crops", "mean_iou", "mIoU by text, cascade, raw crops"),
    *[
        ("4", "linear-probe:miniature", f"top1 ({source})", f"linear probe, {source}")
        for source in ("image encoder", "CLIP head")
    ],
    *[
        ("3", "head-probe:miniature", f"mean_iou: {head} ({source})", f"{head} head, {source}")
        for source in ("image encoder", "CLIP head")
        for head in ("linear", "DeepLabv3", "PSPNet")
    ],
]
# Columns of the table by number of objects: model, task, title.
BY_OBJECTS = [
    ("sam+clip", "cascade:miniature@raw-crops", "cascade, raw crops"),
    ("sam+clip", "cascade:miniature", "cascade, masked crops"),
    ("sam+clip", "composed:miniature", "SAM + CLIP, unmerged"),
    ("stage3", "composed:miniature", "after stage 3"),
    ("stage3", "composed:miniature@classes", "the same, paper's composition"),
    ("paper_stage3", "composed:miniature", "the paper's losses"),
    ("paper_stage3", "composed:miniature@classes", "the same, paper's composition"),
]
CLUTTERED = {  # the task on cluttered scenes, for the last row
    "cascade:miniature@raw-crops": "cascade:miniature@cluttered-raw-crops",
    "cascade:miniature": "cascade:miniature@cluttered",
    "composed:miniature": "composed:miniature@cluttered",
    "composed:miniature@classes": "composed:miniature@cluttered-classes",
}
TEACHERS = ("sam", "clip", "sam+clip")
FAST_TASKS = tuple(dict.fromkeys(task for task, _, _ in COLUMNS))  # for all runs
SLOW_TASKS = (  # for the runs in STAGES
    *("classification:miniature@96", "semantic:miniature@96", "retrieval", "instances", "linear-probe"),
    *("composed:miniature@cluttered", "composed:miniature@cluttered-classes"),
)
CASCADES = (
    *("cascade:miniature", "cascade:miniature@raw-crops"),
    *("cascade:miniature@cluttered", "cascade:miniature@cluttered-raw-crops"),
)
# Fractions of the scenes: of all tasks, and of head probes, the slowest task, and their training steps.
SCENE_FRACTION = 0.5
HEAD_PROBE_FRACTION = 0.25


def train(name: str, seed: int, folder: Path, fraction: float) -> None:
    """Trains a run in `folder / name`. Resumes an interrupted run and skips a finished one."""
    run, output_dir = RUNS[name], folder / name
    steps = scale_steps(run.steps or STEPS[run.stage], fraction)
    if (output_dir / "train_results.json").exists():
        finished = json.loads((output_dir / "trainer_state.json").read_text())["global_step"]
        if finished != steps:
            sys.exit(f"{output_dir} was trained for {finished} steps, not {steps}. Use another --output_dir.")
        return
    options = ["--save_steps", "100", "--save_total_limit", "1", "--resume_from_checkpoint", "true"]
    for option, value in run.options.items():
        values = value if isinstance(value, list) else [value]
        options += [f"--{option}", *map(str, values)]
    start = None if run.start is None else folder / run.start
    recipe = f"miniature_stage{run.stage}"
    commands.train(f"Seed {seed}: {run.title}", recipe, output_dir, seed, steps, start, options)


def scale_steps(steps: int, fraction: float) -> int:
    return max(1, round(steps * fraction))


def evaluate(models: Sequence[Path | str], tasks: tuple[str, ...], output_dir: Path, fraction: float) -> None:
    """Evaluates models. `samclip evaluate` skips results that `output_dir` contains already."""
    command = ["evaluate", "--model", *models, "--task", *tasks, "--share", fraction, "--output_dir", output_dir]
    commands.run(f"Evaluation: {', '.join(tasks)}", command)


def evaluate_run(name: str, folder: Path, fraction: float) -> None:
    """Evaluates a run. The results are in `folder / "evaluation" / name`."""
    output_dir = folder / "evaluation" / name
    tasks = FAST_TASKS + SLOW_TASKS if name in STAGES else FAST_TASKS
    evaluate([folder / name], tasks, output_dir, fraction * SCENE_FRACTION)
    if name in STAGES:
        evaluate([folder / name], ("head-probe",), output_dir, fraction * HEAD_PROBE_FRACTION)


def evaluate_teachers(output_dir: Path, fraction: float) -> None:
    """Evaluates SAM, CLIP and the unmerged model of both."""
    sam, clip = miniature.sam_teacher(), miniature.clip_teacher()
    folder = output_dir / "teachers"
    evaluate([sam, clip, f"{sam}+{clip}"], FAST_TASKS + SLOW_TASKS + CASCADES, folder, fraction * SCENE_FRACTION)
    evaluate([sam, clip], ("head-probe",), folder, fraction * HEAD_PROBE_FRACTION)


def run_all(seeds: Sequence[int], output_dir: Path, fraction: float) -> None:
    """Evaluates the teachers, trains and evaluates all runs of all seeds, except those that other processes with the
    same `output_dir` train and evaluate, and waits for these. Writes the tables after each seed."""
    settings = {name: run_settings(name, fraction) for name in RUNS}
    finished = {seed for seed in seeds if has_results(output_dir / f"seed{seed}.json", settings)}
    teachers, of_teachers = output_dir / "teachers.json", {"fraction": fraction}
    if finished and teachers.exists():
        write_tables(output_dir, fraction)
    while finished != {*seeds} or not teachers.exists():
        if not has_results(teachers, of_teachers):
            marker = output_dir / "teachers.done"
            do_once(marker, of_teachers, lambda: evaluate_teachers(output_dir, fraction))
            if marker.exists():
                write_results(read_runs([output_dir / "teachers"]), of_teachers, teachers)
        for seed in sorted({*seeds} - finished):
            folder = output_dir / f"seed{seed}"
            for name in RUNS:
                run_once(name, seed, folder, fraction)
            if teachers.exists() and all((folder / f"{name}.done").exists() for name in RUNS):
                results = read_runs([folder / "evaluation" / name for name in RUNS])
                write_results(results, settings, output_dir / f"seed{seed}.json")
                write_tables(output_dir, fraction)
                finished.add(seed)
        if finished != {*seeds}:
            time.sleep(2)  # other processes are at work


def run_settings(name: str, fraction: float) -> dict[str, Any]:
    """Returns what determines the results of a run besides its seed: all training arguments, the run from which it
    starts, and the fraction of steps and scenes."""
    run = RUNS[name]
    arguments = commands.read_recipe(f"miniature_stage{run.stage}") | run.options
    return {"fraction": fraction, "start": run.start, **arguments, "max_steps": run.steps or STEPS[run.stage]}


def run_once(name: str, seed: int, folder: Path, fraction: float) -> None:
    """Trains and evaluates a run, unless it is done, another process is doing it, or the run it starts from is not
    done."""
    run = RUNS[name]
    if run.start is not None and not (folder / f"{run.start}.done").exists():
        return

    def train_and_evaluate() -> None:
        train(name, seed, folder, fraction)
        evaluate_run(name, folder, fraction)

    do_once(folder / f"{name}.done", run_settings(name, fraction), train_and_evaluate)


def do_once(marker: Path, settings: Mapping[str, Any], work: Callable[[], None]) -> None:
    """Does work and writes the settings to a file, unless the file exists or another process does the work. Exits with
    a message if the file has other settings."""
    marker.parent.mkdir(parents=True, exist_ok=True)
    with claim(marker.with_suffix(".lock")) as is_mine:
        if is_mine and not marker.exists():
            work()
            marker.write_text(json.dumps(settings))
        elif marker.exists() and json.loads(marker.read_text()) != settings:
            exit_of_other_arguments(marker.with_suffix(""))


@contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Whether this process has a lock, which ends with the context or the process. Without locks on the platform, each
    process has it: run only one."""
    with path.open("w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ModuleNotFoundError:  # Windows
            yield True
        except BlockingIOError:
            yield False
        else:
            yield True


def has_results(path: Path, settings: Mapping[str, Any]) -> bool:
    """Whether a file of results exists. Exits with a message if its settings differ."""
    if not path.exists():
        return False
    if json.loads(path.read_text())["settings"] != settings:
        exit_of_other_arguments(path)
    return True


def write_results(results: Mapping[str, Any], settings: Mapping[str, Any], path: Path) -> None:
    """Writes results with the settings that they depend on. Other processes see the whole file or none."""
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps({"settings": settings, **results}, indent=1) + "\n")
    temporary.replace(path)


def exit_of_other_arguments(path: Path) -> NoReturn:
    sys.exit(f"{path} is of a run with other arguments. Use another --output_dir, or delete it.")


def read_runs(folders: Sequence[Path]) -> dict[str, Any]:
    """Merges the results of `samclip evaluate` in several folders, without the metrics of single classes."""
    merged: dict[str, Any] = {"tasks": {}, "environment": {}}
    for folder in folders:
        content = read_results(folder / "results.json")
        merged["environment"] = content["environment"]
        for task, entry in content["tasks"].items():
            known = merged["tasks"].setdefault(task, {"protocol": entry["protocol"], "models": {}})
            if known["protocol"] != entry["protocol"]:
                exit_of_different_protocols(folder, task)
            known["models"] |= {
                model: {
                    "metrics": {
                        name: value
                        for name, value in result["metrics"].items()
                        if value is not None and not name.startswith(PER_CLASS_PREFIX)
                    }
                }
                for model, result in entry["models"].items()
            }
    return merged


def exit_of_different_protocols(folder: Path, task: str) -> NoReturn:
    sys.exit(f"{folder}: {task} was evaluated with different protocols, for example another --fraction.")


def collect(output_dir: Path, fraction: float = 1.0) -> dict[str, Any]:
    """
    Collects the results of the teachers and of all complete seeds.

    Returns:
        `dict`: The content of `tables.json`. The entry "metrics" contains a list for each model and each pair of
        a task and a metric: one value per seed, or a single value for teachers.

    Exits with a message if no seed is complete, or if the results are of different protocols or weights.
    """
    paths = {int(path.stem.removeprefix("seed")): path for path in output_dir.glob("seed*.json")}
    complete = [(seed, json.loads(path.read_text())) for seed, path in sorted(paths.items())]
    if not complete:
        sys.exit(f"{output_dir} contains no complete seed.")
    if any(content["settings"] != complete[0][1]["settings"] for _, content in complete):
        exit_of_other_arguments(paths[complete[-1][0]])
    protocols = {task: entry["protocol"] for task, entry in complete[0][1]["tasks"].items()}
    metrics: dict[str, dict[str, list[float]]] = {}
    names = {*TEACHERS, *RUNS}
    for content in [json.loads((output_dir / "teachers.json").read_text()), *(c for _, c in complete)]:
        for task, entry in content["tasks"].items():
            # Names that samclip evaluate gives to a second protocol of a task, and to other weights of a run.
            if other := [name for name in (task, *entry["models"]) if "#" in name or name not in {task, *names}]:
                sys.exit(
                    f"{output_dir} has results of different protocols or weights ({other[0]}), for example of a run "
                    "that was trained again. Use another --output_dir."
                )
            if entry["protocol"] != protocols.get(task, entry["protocol"]):
                exit_of_different_protocols(output_dir, task)
            for model, result in entry["models"].items():
                for metric, value in result["metrics"].items():
                    metrics.setdefault(model, {}).setdefault(f"{task} | {metric}", []).append(value)
    return {
        "seeds": [seed for seed, _ in complete],
        "steps": {stage: scale_steps(steps, fraction) for stage, steps in STEPS.items()},
        "runs": {name: {"stage": run.stage, "start": run.start, **run.options} for name, run in RUNS.items()},
        "protocols": protocols,
        "environment": complete[0][1]["environment"],
        "metrics": metrics,
    }


def format_values(values: list[float] | None) -> str:
    """Returns the mean, and the minimum and maximum over seeds if there are several."""
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{mean(values):.3f} ({min(values):.3f} - {max(values):.3f})"


def format_rows(header: list[str], rows: list[list[str]]) -> str:
    """Returns a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def format_tables(content: dict[str, Any]) -> str:
    """Returns three Markdown tables: the paper's tables for teachers and stages, segmentation by the number of objects
    in a scene, and the ablations by baseline."""
    metrics = content["metrics"]
    columns = [*TEACHERS, *STAGES]
    paper = [
        [number, title, *(format_values(metrics[model].get(f"{task} | {metric}")) for model in columns)]
        for number, task, metric, title in ROWS
    ]
    by_objects = [
        [
            name.removeprefix("mean_iou, ").replace("mean_iou", "all"),
            *(format_values(metrics[model].get(f"{task} | {name}")) for model, task, _ in BY_OBJECTS),
        ]
        for name in ("mean_iou", *OBJECT_COUNTS)
    ]
    cluttered = [metrics[model].get(f"{CLUTTERED[task]} | mean_iou") for model, task, _ in BY_OBJECTS]
    by_objects.append(["cluttered scenes", *map(format_values, cluttered)])
    ablations = []
    for baseline in dict.fromkeys(run.baseline for run in RUNS.values() if run.baseline is not None):
        for name in (baseline, *(name for name, run in RUNS.items() if run.baseline == baseline)):
            cells = [format_values(metrics[name].get(f"{task} | {metric}")) for task, metric, _ in COLUMNS]
            title = f"**{RUNS[name].title}**" if name == baseline else RUNS[name].title
            ablations.append([title, *cells])
    seeds = content["seeds"]
    seeds_text = f"{len(seeds)} seeds: mean (minimum - maximum)" if len(seeds) > 1 else "One seed"
    return (
        f"{seeds_text}. Optimizer steps of the stages: {', '.join(map(str, content['steps'].values()))}.\n\n"
        + format_rows(["table of the paper", "", "SAM", "CLIP", "SAM + CLIP", *HEADERS], paper)
        + "\nmIoU by text, by the number of objects in a scene:\n\n"
        + format_rows(["scenes", *(title for _, _, title in BY_OBJECTS)], by_objects)
        + "\nAblations, below their baseline (bold) after the same stage:\n\n"
        + format_rows(["", *(title for _, _, title in COLUMNS)], ablations)
    )


def draw_differences(content: dict[str, Any], path: Path) -> None:
    """Plots the difference of each ablation (row) from the baseline of the same seed, for each metric (column)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    metrics = content["metrics"]
    names = [name for name, run in RUNS.items() if run.baseline is not None][::-1]
    figure, axes = plt.subplots(
        1, len(COLUMNS), sharey=True, figsize=(2.1 * len(COLUMNS) + 2.5, 0.36 * len(names) + 1.8), layout="constrained"
    )
    for axis, (task, metric, title) in zip(axes, COLUMNS, strict=True):
        key = f"{task} | {metric}"
        for row, name in enumerate(names):
            baseline = metrics[RUNS[name].baseline][key]
            differences = [value - other for value, other in zip(metrics[name][key], baseline, strict=True)]
            axis.plot(differences, [row] * len(differences), "o", markersize=5, alpha=0.6, color="C0")
            axis.plot([mean(differences)], [row], "|", markersize=13, markeredgewidth=2, color="black")
            if row and RUNS[name].baseline != RUNS[names[row - 1]].baseline:
                axis.axhline(row - 0.5, color="black", linewidth=0.8)
        axis.axvline(0, color="gray", linewidth=1)
        limit = max(abs(side) for side in axis.get_xlim())
        axis.set_xlim(-limit, limit)
        axis.set_title(title.replace(", ", ",\n").replace("by text", "by\ntext"), fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_yticks(range(len(names)), [RUNS[name].title for name in names], fontsize=9)
    figure.suptitle(
        "Difference from the baseline after the same stage (dots: seeds; bars: their mean; lines: another baseline)"
    )
    figure.savefig(path, dpi=100)
    plt.close(figure)


def write_tables(output_dir: Path, fraction: float) -> None:
    """Writes and prints the tables of all complete seeds."""
    content = collect(output_dir, fraction)
    (output_dir / "tables.json").write_text(json.dumps(content, indent=1) + "\n")
    (output_dir / "tables.md").write_text(format_tables(content))
    draw_differences(content, output_dir / "tables.png")
    print(f"\n{format_tables(content)}\nTables and figure: {output_dir}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds (default: 0 1 2)")
    parser.add_argument(
        "--fraction", type=float, default=1.0, help="fraction of steps and scenes, for a faster run (default: 1)"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("runs/tables"), help="default: runs/tables")
    arguments = parser.parse_args()
    run_all(sorted(set(arguments.seeds)), arguments.output_dir, arguments.fraction)


if __name__ == "__main__":
    main()
