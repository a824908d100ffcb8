"""
The paper's tables and its ablations in miniature: trains every variant with several seeds, judges all of them, and
writes mean and spread.

    python training/tables.py

Takes hours. What is done is kept in `runs/tables`, and the same command goes on from there. Writes `tables.json`,
`tables.md` and `tables.png` with as many seeds as are done. Seeds may be shared out over several machines or processes
by `--seeds`; the last one, with all of them, finds nothing left to do but the tables.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from samclip_hf import miniature

RECIPES = Path(__file__).parents[1] / "recipes"
# Optimizer steps: a small fraction of the recipes' own, so that all variants with all seeds take hours and not days.
STEPS = {1: 300, 2: 100, 3: 50}


@dataclass(frozen=True)
class Run:
    """
    One stage of one variant.

    stage (`int`), start (`str`, *optional*):
        By which recipe, and from what it goes on; without, from the teachers.
    options (`str`):
        Of `train.py`, beside the recipe's.
    title (`str`), baseline (`str`, *optional*):
        What tables call it, and the run that it is held against.
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
        "head's layers random, not copied", 1, options="--clip_head_initialization random", baseline="stage1"
    ),
    "one_layer": Run("one layer in the CLIP head", 1, options="--clip_head_layers 1", baseline="stage1"),
    "lambda_0": Run("lambda 0", 2, "stage1", "--sam_loss_weight 0", "stage2"),
    "lambda_1": Run("lambda 1", 2, "stage1", "--sam_loss_weight 1", "stage2"),
    "lambda_100": Run("lambda 100", 2, "stage1", "--sam_loss_weight 100", "stage2"),
    "rate_1": Run("encoder's rate x1", 2, "stage1", "--encoder_lr_multiplier 1", "stage2"),
    "rate_1_lambda_0": Run(
        "encoder's rate x1, lambda 0", 2, "stage1", "--encoder_lr_multiplier 1 --sam_loss_weight 0", "stage2"
    ),
    "all_sizes": Run(
        "both teachers at 64, 96, 128 px",
        2,
        "stage1",
        "--clip_resolutions 64 96 128 --sam_resolutions 64 96 128",
        "stage2",
    ),
    "lora": Run("LoRA, r 16, rate x1", 2, "stage1", "--lora_r 16 --encoder_lr_multiplier 1", "stage2"),
    "no_stage1": Run("stage 1 skipped, as many steps", 2, None, "", "stage2", STEPS[1] + STEPS[2]),
}
STAGES = ("stage1", "stage2", "stage3")
QUICK = ("classification", "semantic", "prompts", "composed")  # tasks that every run is judged by
SLOW = ("retrieval", "instances", "linear-probe")  # those of the stages alone
PROBE_SHARE = 0.25  # of the head probes' scenes and steps, which take the longest
# Columns of the table of ablations: task, figure, title.
COLUMNS = [
    ("classification:miniature@64", "top1", "top-1, 64 px"),
    ("classification:miniature@128", "top1", "top-1, 128 px"),
    ("classification:miniature@128", "top1, never captioned", "never captioned, 128 px"),
    ("prompts:miniature", "point_miou", "mIoU, point"),
    ("prompts:miniature", "box_miou", "mIoU, box"),
    ("semantic:miniature@128", "mean_iou", "mIoU by text, patches"),
    ("composed:miniature", "mean_iou", "mIoU by text, both heads"),
]
# Rows of the paper's tables: its table, task, figure, title.
ROWS = [
    *[
        ("1, 6", f"classification:miniature@{size}", "top1", f"zero-shot top-1 of 48, {size} px")
        for size in (64, 96, 128)
    ],
    ("1", "retrieval:miniature", "mean_recall@1", "retrieval, R@1, mean of both directions"),
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
PARENTS = ("sam", "clip", "sam+clip")


def train(name: str, seed: int, folder: Path, share: float) -> None:
    """One run into `folder/name`, from where it was cut off; nothing if it is done."""
    run, output_dir = RUNS[name], folder / name
    steps = shared_steps(run.steps or STEPS[run.stage], share)
    if (output_dir / "train_results.json").exists():
        done = json.loads((output_dir / "trainer_state.json").read_text())["global_step"]
        if done != steps:
            sys.exit(f"{output_dir} was trained for {done} steps and not {steps}: give another --output_dir.")
        return
    command = [sys.executable, "-m", "samclip_cli.train", RECIPES / f"miniature_stage{run.stage}.yaml"]
    command += ["--output_dir", output_dir, "--seed", seed, "--max_steps", steps, "--save_steps", 100]
    command += ["--save_total_limit", 1, "--resume_from_checkpoint", "true", *run.options.split()]
    if run.start is not None:
        command += ["--model", folder / run.start]
    call(command, f"seed {seed}, {run.title}")


def shared_steps(steps: int, share: float) -> int:
    return max(1, round(steps * share))


def judge(models: list[Path | str], tasks: tuple[str, ...], output_dir: Path, share: float) -> None:
    """By `evaluate.py`, which does not do again what it has done."""
    command = [sys.executable, "-m", "samclip_cli.evaluate", "--model", *models, "--task", *tasks]
    call([*command, "--share", share, "--output_dir", output_dir], f"{output_dir}: {', '.join(tasks)}")


def call(command: list, title: str) -> None:
    print(f"\n== {title} ==\n{shlex.join(map(str, command))}", flush=True)
    finished = subprocess.run([str(word) for word in command])
    if finished.returncode:
        sys.exit(f"{title} stopped with {finished.returncode}. The same command goes on from there.")


def do_seed(seed: int, output_dir: Path, share: float) -> None:
    """Trains and judges all runs of a seed."""
    folder = output_dir / f"seed{seed}"
    for name in RUNS:
        train(name, seed, folder, share)
    judge([folder / name for name in RUNS], QUICK, folder / "evaluation", share)
    stages = [folder / name for name in STAGES]
    judge(stages, SLOW, folder / "evaluation", share)
    judge(stages, ("head-probe",), folder / "evaluation", share * PROBE_SHARE)


def do_parents(output_dir: Path, share: float) -> None:
    sam, clip = miniature.sam_teacher(), miniature.clip_teacher()
    folder = output_dir / "parents"
    judge([sam, clip, f"{sam}+{clip}"], (*QUICK, *SLOW, "cascade"), folder, share)
    judge([sam, clip], ("head-probe",), folder, share * PROBE_SHARE)


def collect(output_dir: Path, share: float = 1.0) -> dict:
    """`results.json` of the parents and of every seed that is done, brought together: by model, task and figure, a
    list of one number for each seed. Parents have one number. All are to be judged by the same protocols."""
    done = [
        (int(path.parent.parent.name.removeprefix("seed")), json.loads(path.read_text()))
        for path in output_dir.glob("seed*/evaluation/results.json")
    ]
    done = sorted((seed, content) for seed, content in done if complete(content))
    if not done:
        sys.exit(f"No seed is done in {output_dir}.")
    protocols = {task: entry["protocol"] for task, entry in done[0][1]["tasks"].items()}
    figures: dict[str, dict[str, list[float]]] = {}
    for content in [json.loads((output_dir / "parents" / "results.json").read_text()), *(c for _, c in done)]:
        for task, entry in content["tasks"].items():
            if entry["protocol"] != protocols.get(task, entry["protocol"]):
                sys.exit(f"{output_dir}: {task} was judged by different protocols, such as with another --share.")
            for model, result in entry["models"].items():
                for figure, value in result["metrics"].items():
                    if value is not None and not figure.startswith("iou: "):
                        figures.setdefault(model, {}).setdefault(f"{task} | {figure}", []).append(value)
    return {
        "seeds": [seed for seed, _ in done],
        "steps": {stage: shared_steps(steps, share) for stage, steps in STEPS.items()},
        "runs": {name: f"stage {run.stage} {run.options}".strip() for name, run in RUNS.items()},
        "protocols": protocols,
        "environment": done[0][1]["environment"],
        "metrics": figures,
    }


def complete(content: dict) -> bool:
    """Whether a seed's results have all runs by the quick tasks, and the stages by the slow ones."""
    wanted = {task: STAGES for _, task, _, _ in ROWS if task != "cascade:miniature"}
    wanted |= {task: tuple(RUNS) for task, _, _ in COLUMNS}
    return all(
        set(models) <= content["tasks"].get(task, {"models": {}})["models"].keys() for task, models in wanted.items()
    )


def shown(values: list[float] | None) -> str:
    """The mean, and the lowest and the highest of several seeds."""
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{mean(values):.3f} ({min(values):.3f} - {max(values):.3f})"


def table(header: list[str], rows: Iterator[list[str]] | list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def markdown(content: dict) -> str:
    """Both tables: the paper's, parents beside the three stages, and the ablations beside what they vary."""
    figures = content["metrics"]
    columns = [*PARENTS, *STAGES]
    paper = [
        [number, title, *(shown(figures[model].get(f"{task} | {figure}")) for model in columns)]
        for number, task, figure, title in ROWS
    ]
    ablations = []
    for baseline in ("stage1", "stage2"):
        names = [baseline, *(name for name, run in RUNS.items() if run.baseline == baseline)]
        for name in names:
            cells = [shown(figures[name].get(f"{task} | {figure}")) for task, figure, _ in COLUMNS]
            title = f"**{RUNS[name].title}**" if name == baseline else RUNS[name].title
            ablations.append([title, *cells])
    seeds = content["seeds"]
    spread = f"{len(seeds)} seeds: mean (lowest - highest)" if len(seeds) > 1 else "one seed, so no spread"
    return (
        f"{spread}. Steps of the stages: {', '.join(str(steps) for steps in content['steps'].values())}.\n\n"
        + table(["paper's table", "", "SAM", "CLIP", "SAM + CLIP", *(RUNS[name].title for name in STAGES)], paper)
        + "\nEvery variant below what it varies, after the same stage:\n\n"
        + table(["", *(title for _, _, title in COLUMNS)], ablations)
    )


def draw(content: dict, path: Path) -> None:
    """By how much each ablation, a row, changes each figure, a column: one dot a seed, each against its own seed's
    baseline."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figures = content["metrics"]
    names = [name for name, run in RUNS.items() if run.baseline is not None][::-1]
    drawing, axes = plt.subplots(
        1, len(COLUMNS), sharey=True, figsize=(2.1 * len(COLUMNS) + 2.5, 0.36 * len(names) + 1.8), layout="constrained"
    )
    for axis, (task, figure, title) in zip(axes, COLUMNS, strict=True):
        key = f"{task} | {figure}"
        for row, name in enumerate(names):
            changes = [v - b for v, b in zip(figures[name][key], figures[RUNS[name].baseline][key], strict=True)]
            axis.plot(changes, [row] * len(changes), "o", markersize=5, alpha=0.6, color="C0")
            axis.plot([mean(changes)], [row], "|", markersize=13, markeredgewidth=2, color="black")
        axis.axvline(0, color="grey", linewidth=1)
        widest = max(abs(limit) for limit in axis.get_xlim())
        axis.set_xlim(-widest, widest)
        axis.set_title(title.replace(", ", ",\n").replace("by text", "by\ntext"), fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_yticks(range(len(names)), [RUNS[name].title for name in names], fontsize=9)
    drawing.suptitle("Change against the paper's recipe after the same stage; a dot a seed, a stroke their mean")
    drawing.savefig(path, dpi=100)
    plt.close(drawing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--share", type=float, default=1.0, help="of steps and scenes, for a quick look")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/tables"))
    arguments = parser.parse_args()
    output_dir: Path = arguments.output_dir
    do_parents(output_dir, arguments.share)
    for seed in arguments.seeds:
        do_seed(seed, output_dir, arguments.share)
        content = collect(output_dir, arguments.share)
        (output_dir / "tables.json").write_text(json.dumps(content, indent=1) + "\n")
        (output_dir / "tables.md").write_text(markdown(content))
        draw(content, output_dir / "tables.png")
        print(f"\n{markdown(content)}\nTables and plot: {output_dir}", flush=True)


if __name__ == "__main__":
    main()
