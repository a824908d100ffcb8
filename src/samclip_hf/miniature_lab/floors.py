"""
Compares the miniature with the lowest values that its metrics may have, on three sets of scenes.

    python -m samclip_hf.miniature_lab.floors

Evaluates the shipped SAM-CLIP, or those of `--model`, and the teachers, and reads the report of `make demo` if it
exists. Prints a table and writes it to `runs/floors/floors.md`. A floor is reached if all values are at least the
floor.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import miniature
from .report import MetricsByTask, evaluate_all, load_student, load_teachers, report_tasks

SCENE_SEEDS = (101, 201, 301)


@dataclass(frozen=True)
class Floor:
    """
    A claim about a metric.

    Attributes:
        claim (`str`): The metric.
        floor (`float`): The lowest value.
        measure (`Callable`): Computes the value from the metrics of a student and of the teachers on the same scenes.
    """

    claim: str
    floor: float
    measure: Callable[[Any, Any], float]


def metric_of_student(task: str, metric: str) -> Callable[[MetricsByTask, MetricsByTask], Any]:
    return lambda student, teachers: student[task, metric]


def ratio_to_teacher(task: str, metric: str) -> Callable[[Any, Any], float]:
    return lambda student, teachers: student[task, metric] / teachers[task, metric]


def lead_over_cascade(student: Any, teachers: Any) -> float:
    return student["composed:miniature", "mean_iou"] - teachers["cascade:miniature", "mean_iou"]


FLOORS = (
    Floor("mIoU by text, patches, 128 px", 0.50, metric_of_student("semantic:miniature@128", "mean_iou")),
    Floor("mIoU by text, both heads", 0.70, metric_of_student("composed:miniature", "mean_iou")),
    Floor(
        "mIoU by text, both heads, paper's composition",
        0.62,
        metric_of_student("composed:miniature@classes", "mean_iou"),
    ),
    Floor("mIoU by text, both heads minus the cascade with masked crops", 0.0, lead_over_cascade),
    Floor("top-1 at 128 px / that of CLIP", 0.97, ratio_to_teacher("classification:miniature@128", "top1")),
    Floor("top-1 at 64 px", 0.80, metric_of_student("classification:miniature@64", "top1")),
    Floor(
        "top-1 of classes never captioned, 128 px / that of CLIP",
        0.95,
        ratio_to_teacher("classification:miniature@128", "top1, never captioned"),
    ),
    Floor("mIoU from a point / that of SAM", 0.985, ratio_to_teacher("prompts:miniature", "point_miou")),
    Floor("mIoU from a box / that of SAM", 0.985, ratio_to_teacher("prompts:miniature", "box_miou")),
)


def ratio_in_report(prompt: str) -> Callable[[Any, Any], float]:
    return lambda demo, _: demo[prompt]["student"] / demo[prompt]["teacher"]


# Of the student of `make demo`, from its report.
DEMO_FLOORS = (
    Floor("`make demo`: mIoU by text, patches, 128 px", 0.35, lambda demo, _: demo["semantic_miou"]["clip_head"]),
    Floor("`make demo`: mIoU by text, both heads", 0.50, lambda demo, _: demo["semantic_miou"]["both_heads"]),
    Floor("`make demo`: mIoU from a point / that of SAM", 0.97, ratio_in_report("point_miou")),
    Floor("`make demo`: mIoU from a box / that of SAM", 0.97, ratio_in_report("box_miou")),
)


def measure(models: Sequence[str], fraction: float = 1.0) -> dict[str, dict[str, list[float]]]:
    """
    Evaluates SAM-CLIPs and the teachers on the scenes of `SCENE_SEEDS`.

    Args:
        models (`Sequence[str]`): Folders.
        fraction (`float`): Fraction of the scenes.

    Returns:
        `dict[str, dict[str, list[float]]]`: By model and claim, one value for each seed.
    """
    sam, clip, unmerged = load_teachers()
    students = {folder: load_student(folder) for folder in models}
    values: dict[str, dict[str, list[float]]] = {name: {floor.claim: [] for floor in FLOORS} for name in students}
    for seed in SCENE_SEEDS:
        evaluators = report_tasks(seed, fraction)
        of_clip = {"classification:miniature@128": evaluators["classification:miniature@128"]}
        of_sam = {"prompts:miniature": evaluators["prompts:miniature"]}
        of_both = {"cascade:miniature": evaluators["cascade:miniature"]}
        teachers = evaluate_all(clip, of_clip) | evaluate_all(sam, of_sam) | evaluate_all(unmerged, of_both)
        for name, student in students.items():
            metrics = evaluate_all(student, evaluators)
            for floor in FLOORS:
                values[name][floor.claim].append(floor.measure(metrics, teachers))
    return values


def format_floors(values: Mapping[str, Mapping[str, Sequence[float]]], demo: Mapping[str, Any] | None) -> str:
    """Returns a Markdown table of the values of [`measure`] and of the student in the report of `make demo`."""
    lines = ["| claim | floor | measured | reached |", "|---|---|---|---|"]
    for name, of_model in values.items():
        prefix = f"{name}: " if len(values) > 1 else ""
        lines += [format_floor(f"{prefix}{floor.claim}", floor, of_model[floor.claim]) for floor in FLOORS]
    if demo is not None:
        lines += [format_floor(floor.claim, floor, [floor.measure(demo, None)]) for floor in DEMO_FLOORS]
    return "\n".join(lines) + "\n"


def format_floor(claim: str, floor: Floor, values: Sequence[float]) -> str:
    reached = sum(value >= floor.floor for value in values)
    verdict = "yes" if reached == len(values) else f"no: {reached} of {len(values)}" if len(values) > 1 else "no"
    return f"| {claim} | {floor.floor:g} | {' / '.join(f'{value:.3f}' for value in values)} | {verdict} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", nargs="+", default=[miniature.checkpoint()], help="folders of SAM-CLIPs (default: the shipped one)"
    )
    parser.add_argument(
        "--demo", type=Path, default=Path("runs/demo/report.json"), help="default: runs/demo/report.json"
    )
    parser.add_argument("--fraction", type=float, default=1.0, help="fraction of the scenes (default: 1)")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/floors"), help="default: runs/floors")
    arguments = parser.parse_args()
    demo = json.loads(arguments.demo.read_text())["demo"] if arguments.demo.exists() else None
    table = format_floors(measure(arguments.model, arguments.fraction), demo)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    (arguments.output_dir / "floors.md").write_text(table)
    scenes = f"Scene seeds {', '.join(map(str, SCENE_SEEDS))}"
    missing = "" if demo is not None else f" {arguments.demo} does not exist: run `make demo` for its floors."
    print(f"{table}\n{scenes}, {arguments.fraction:g} of the scenes.{missing}")


if __name__ == "__main__":
    main()
