"""
Trains and evaluates all variants of the miniature with several seeds, and writes the paper's tables and the ablations.

    python -m samclip_hf.miniature_lab.tables

Takes hours. An interrupted command continues from the finished runs in `runs/tables`. After each seed it writes
`tables.json`, `tables.md` and `tables.png` with the seeds that are complete. To distribute seeds over processes, pass
different `--seeds` to each with the same `--output_dir`, then run the command once with all seeds.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from .. import miniature
from ..evaluation import read_results
from ..evaluation.report import PER_CLASS_PREFIX
from . import commands

# Optimizer steps by stage: a small fraction of the recipes' steps.
STEPS = {1: 300, 2: 100, 3: 50}


@dataclass(frozen=True)
class Run:
    """
    One training stage of a variant.

    Attributes:
        title (`str`): Title of the row in the tables.
        stage (`int`): The stage, whose recipe is used.
        start (`str`, *optional*): Name of the run to start from. Default: the teachers.
        options (`str`): Options of `samclip train` that change the recipe.
        baseline (`str`, *optional*): Name of the run that this one is compared with.
        steps (`int`, *optional*): Optimizer steps. Default: those of the stage in `STEPS`.
    """

    title: str
    stage: int
    start: str | None = None
    options: str = ""
    baseline: str | None = None
    steps: int | None = None


RUNS = {
    "stage1": Run("after stage 1", 1),
    "stage2": Run("after stage 2", 2, "stage1"),
    "stage3": Run("after stage 3", 3, "stage2"),
    "mean_pooling": Run("mean pooling", 1, options="--clip_head_pooling mean", baseline="stage1"),
    "random_head": Run(
        "random initialization of the CLIP head", 1, options="--clip_head_initialization random", baseline="stage1"
    ),
    "one_layer": Run("CLIP head with one layer", 1, options="--clip_head_layers 1", baseline="stage1"),
    "lambda_0": Run("lambda 0", 2, "stage1", "--sam_loss_weight 0", "stage2"),
    "lambda_1": Run("lambda 1", 2, "stage1", "--sam_loss_weight 1", "stage2"),
    "lambda_100": Run("lambda 100", 2, "stage1", "--sam_loss_weight 100", "stage2"),
    "rate_1": Run("encoder learning rate x1", 2, "stage1", "--encoder_lr_multiplier 1", "stage2"),
    "rate_1_lambda_0": Run(
        "encoder learning rate x1, lambda 0", 2, "stage1", "--encoder_lr_multiplier 1 --sam_loss_weight 0", "stage2"
    ),
    "all_sizes": Run(
        "both teachers at 64, 96, 128 px",
        2,
        "stage1",
        "--clip_resolutions 64 96 128 --sam_resolutions 64 96 128",
        "stage2",
    ),
    "lora": Run(
        "LoRA, rank 16, encoder learning rate x1", 2, "stage1", "--lora_r 16 --encoder_lr_multiplier 1", "stage2"
    ),
    "no_stage1": Run(
        "without stage 1, same number of steps",
        2,
        None,
        "--clip_head_initialization copied",
        "stage2",
        STEPS[1] + STEPS[2],
    ),
}
STAGES = ("stage1", "stage2", "stage3")
FAST_TASKS = ("classification", "semantic", "prompts", "composed")  # for all runs
SLOW_TASKS = ("retrieval", "instances", "linear-probe")  # for the three stages only
HEAD_PROBE_FRACTION = 0.25  # of the scenes and training steps of head probes, the slowest task
# Columns of the table of ablations: task, metric, title.
COLUMNS = [
    ("classification:miniature@64", "top1", "top-1, 64 px"),
    ("classification:miniature@128", "top1", "top-1, 128 px"),
    ("classification:miniature@128", "top1, never captioned", "never captioned, 128 px"),
    ("prompts:miniature", "point_miou", "mIoU, point"),
    ("prompts:miniature", "box_miou", "mIoU, box"),
    ("semantic:miniature@128", "mean_iou", "mIoU by text, patches"),
    ("composed:miniature", "mean_iou", "mIoU by text, both heads"),
]
# Rows of the paper's tables: number of the table in the paper, task, metric, title.
ROWS = [
    *[
        ("1, 6", f"classification:miniature@{size}", "top1", f"zero-shot top-1 of 48, {size} px")
        for size in (64, 96, 128)
    ],
    ("1", "retrieval:miniature", "mean_recall@1", "retrieval R@1, mean of both directions"),
    ("1", "instances:miniature", "AP", "mask AP from true boxes"),
    ("-", "prompts:miniature", "point_miou", "mIoU from a point"),
    ("-", "prompts:miniature", "box_miou", "mIoU from a box"),
    *[("2", f"semantic:miniature@{size}", "mean_iou", f"mIoU by text, patches, {size} px") for size in (96, 128)],
    ("5, 7", "composed:miniature", "mean_iou", "mIoU by text, both heads"),
    ("7", "cascade:miniature", "mean_iou", "mIoU by text, cascade"),
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
TEACHERS = ("sam", "clip", "sam+clip")


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
    start = None if run.start is None else folder / run.start
    title = f"Seed {seed}: {run.title}"
    commands.train(title, run.stage, output_dir, seed, steps, start, [*options, *run.options.split()])


def scale_steps(steps: int, fraction: float) -> int:
    return max(1, round(steps * fraction))


def evaluate(models: Sequence[Path | str], tasks: tuple[str, ...], output_dir: Path, fraction: float) -> None:
    """Evaluates models. `samclip evaluate` skips results that `output_dir` contains already."""
    command = ["evaluate", "--model", *models, "--task", *tasks, "--share", fraction, "--output_dir", output_dir]
    commands.run(f"Evaluation: {', '.join(tasks)}", command)


def run_seed(seed: int, output_dir: Path, fraction: float) -> None:
    """Trains and evaluates all runs of a seed."""
    folder = output_dir / f"seed{seed}"
    for name in RUNS:
        train(name, seed, folder, fraction)
    evaluate([folder / name for name in RUNS], FAST_TASKS, folder / "evaluation", fraction)
    stages = [folder / name for name in STAGES]
    evaluate(stages, SLOW_TASKS, folder / "evaluation", fraction)
    evaluate(stages, ("head-probe",), folder / "evaluation", fraction * HEAD_PROBE_FRACTION)


def evaluate_teachers(output_dir: Path, fraction: float) -> None:
    """Evaluates SAM, CLIP and the cascade of both."""
    sam, clip = miniature.sam_teacher(), miniature.clip_teacher()
    folder = output_dir / "teachers"
    evaluate([sam, clip, f"{sam}+{clip}"], (*FAST_TASKS, *SLOW_TASKS, "cascade"), folder, fraction)
    evaluate([sam, clip], ("head-probe",), folder, fraction * HEAD_PROBE_FRACTION)


def collect(output_dir: Path, fraction: float = 1.0) -> dict:
    """
    Collects the results of the teachers and of all complete seeds.

    Returns:
        `dict`: The content of `tables.json`. The entry "metrics" contains a list for each model and each pair of
        a task and a metric: one value per seed, or a single value for teachers.

    Exits with a message if no seed is complete, or if the results are of different protocols or weights.
    """
    complete = [
        (int(path.parent.parent.name.removeprefix("seed")), read_results(path))
        for path in output_dir.glob("seed*/evaluation/results.json")
    ]
    complete = sorted((seed, content) for seed, content in complete if is_complete(content))
    if not complete:
        sys.exit(f"{output_dir} contains no complete seed.")
    protocols = {task: entry["protocol"] for task, entry in complete[0][1]["tasks"].items()}
    metrics: dict[str, dict[str, list[float]]] = {}
    names = {*TEACHERS, *RUNS}
    for content in [read_results(output_dir / "teachers" / "results.json"), *(c for _, c in complete)]:
        for task, entry in content["tasks"].items():
            # Names that samclip evaluate gives to a second protocol of a task, and to other weights of a run.
            if other := [name for name in (task, *entry["models"]) if "#" in name or name not in {task, *names}]:
                sys.exit(
                    f"{output_dir} has results of different protocols or weights ({other[0]}), for example of a run "
                    "that was trained again. Use another --output_dir."
                )
            if entry["protocol"] != protocols.get(task, entry["protocol"]):
                sys.exit(
                    f"{output_dir}: {task} was evaluated with different protocols, for example another --fraction."
                )
            for model, result in entry["models"].items():
                for metric, value in result["metrics"].items():
                    if value is not None and not metric.startswith(PER_CLASS_PREFIX):
                        metrics.setdefault(model, {}).setdefault(f"{task} | {metric}", []).append(value)
    return {
        "seeds": [seed for seed, _ in complete],
        "steps": {stage: scale_steps(steps, fraction) for stage, steps in STEPS.items()},
        "runs": {name: f"stage {run.stage} {run.options}".strip() for name, run in RUNS.items()},
        "protocols": protocols,
        "environment": complete[0][1]["environment"],
        "metrics": metrics,
    }


def is_complete(content: dict) -> bool:
    """Whether the results of a seed contain all runs with the fast tasks, and the three stages with the slow tasks."""
    required: dict[str, tuple[str, ...]] = {task: STAGES for _, task, _, _ in ROWS if task != "cascade:miniature"}
    required |= {task: tuple(RUNS) for task, _, _ in COLUMNS}
    return all(
        set(models) <= content["tasks"].get(task, {"models": {}})["models"].keys() for task, models in required.items()
    )


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


def format_tables(content: dict) -> str:
    """Returns two Markdown tables: the paper's tables for teachers and stages, and the ablations by baseline."""
    metrics = content["metrics"]
    columns = [*TEACHERS, *STAGES]
    paper = [
        [number, title, *(format_values(metrics[model].get(f"{task} | {metric}")) for model in columns)]
        for number, task, metric, title in ROWS
    ]
    ablations = []
    for baseline in ("stage1", "stage2"):
        names = [baseline, *(name for name, run in RUNS.items() if run.baseline == baseline)]
        for name in names:
            cells = [format_values(metrics[name].get(f"{task} | {metric}")) for task, metric, _ in COLUMNS]
            title = f"**{RUNS[name].title}**" if name == baseline else RUNS[name].title
            ablations.append([title, *cells])
    seeds = content["seeds"]
    seeds_text = f"{len(seeds)} seeds: mean (minimum - maximum)" if len(seeds) > 1 else "One seed"
    return (
        f"{seeds_text}. Optimizer steps of the stages: {', '.join(map(str, content['steps'].values()))}.\n\n"
        + format_rows(
            ["table of the paper", "", "SAM", "CLIP", "SAM + CLIP", *(RUNS[name].title for name in STAGES)], paper
        )
        + "\nAblations, below their baseline (bold) after the same stage:\n\n"
        + format_rows(["", *(title for _, _, title in COLUMNS)], ablations)
    )


def draw_differences(content: dict, path: Path) -> None:
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
        axis.axvline(0, color="gray", linewidth=1)
        limit = max(abs(side) for side in axis.get_xlim())
        axis.set_xlim(-limit, limit)
        axis.set_title(title.replace(", ", ",\n").replace("by text", "by\ntext"), fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_yticks(range(len(names)), [RUNS[name].title for name in names], fontsize=9)
    figure.suptitle("Difference from the baseline after the same stage (dots: seeds; bars: their mean)")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds (default: 0 1 2)")
    parser.add_argument(
        "--fraction", type=float, default=1.0, help="fraction of steps and scenes, for a faster run (default: 1)"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("runs/tables"), help="default: runs/tables")
    arguments = parser.parse_args()
    output_dir: Path = arguments.output_dir
    evaluate_teachers(output_dir, arguments.fraction)
    for seed in arguments.seeds:
        run_seed(seed, output_dir, arguments.fraction)
        content = collect(output_dir, arguments.fraction)
        (output_dir / "tables.json").write_text(json.dumps(content, indent=1) + "\n")
        (output_dir / "tables.md").write_text(format_tables(content))
        draw_differences(content, output_dir / "tables.png")
        print(f"\n{format_tables(content)}\nTables and figure: {output_dir}", flush=True)


if __name__ == "__main__":
    main()
