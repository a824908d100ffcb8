"""
Distills the miniature SAM and CLIP into a SAM-CLIP with the recipes of the three stages, and evaluates the result.

    python -m samclip_hf.miniature_lab.demo

The training takes 10 to 13 minutes on two CPU cores, the evaluation 3 to 5. Writes `model/`, `report.json`,
`report.md` and `figure.png` to `runs/demo/`.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

from .. import miniature
from ..processing_samclip import SamClipProcessor
from ..segmentation_samclip import SamClipForImageSegmentation
from . import commands
from .report import (
    compare,
    draw_figure,
    evaluate_all,
    evaluate_teachers,
    format_table,
    load_student,
    load_teachers,
    report_tasks,
    set_miniature_vocabulary,
    text_columns,
)

# Optimizer steps by stage: a fraction of those of the recipes. Stage 1 is where a short training gains most.
STEPS = {1: 1000, 2: 10, 3: 40}

USAGE = """\
from transformers import pipeline
import samclip_hf
segments = pipeline("image-segmentation", model="{model}")("photo.png")"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="default: runs/demo")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training (default: 0)")
    arguments = parser.parse_args()
    output_dir: Path = arguments.output_dir
    output_dir.mkdir(parents=True, exist_ok=True)
    for stage in STEPS:  # remove an earlier run
        shutil.rmtree(output_dir / f"stage{stage}", ignore_errors=True)

    seconds, images_seen = {}, {}
    checkpoint = None
    for stage, steps in STEPS.items():
        start = time.perf_counter()
        stage_dir = output_dir / f"stage{stage}"
        title = f"Stage {stage} of {len(STEPS)}"
        commands.train(
            title, f"miniature_stage{stage}", stage_dir, arguments.seed, steps, checkpoint, ["--save_strategy", "no"]
        )
        checkpoint = stage_dir
        metrics = json.loads((stage_dir / "train_results.json").read_text())
        seconds[f"stage{stage}"] = round(time.perf_counter() - start, 1)
        images_seen[f"stage{stage}"] = int(metrics["train_images_seen"])

    print("\n== Evaluation: the teachers, the new student and the shipped student ==", flush=True)
    start = time.perf_counter()
    model = SamClipForImageSegmentation.from_pretrained(checkpoint)
    processor = SamClipProcessor.from_pretrained(checkpoint)
    set_miniature_vocabulary(model, processor)
    model.save_pretrained(output_dir / "model")
    processor.save_pretrained(output_dir / "model")
    sam, clip, unmerged = load_teachers()
    students = {"demo": load_student(output_dir / "model"), "shipped": load_student(miniature.checkpoint())}
    evaluators = report_tasks()
    teachers = evaluate_teachers(sam, clip, unmerged, evaluators)
    compared = {name: compare(evaluate_all(student, evaluators), teachers) for name, student in students.items()}
    titles = {"SAM-CLIP,\nmake demo": students["demo"], "SAM-CLIP,\nas shipped": students["shipped"]}
    caption = "Make demo: the student of this run, also for box and point. As shipped: the student of the package."
    columns = text_columns(clip, unmerged, titles)
    draw_figure(students["demo"], columns, output_dir / "figure.png", caption=caption)
    seconds["evaluation"] = round(time.perf_counter() - start, 1)

    report = {"seconds": seconds, "images_seen": images_seen, **compared}
    (output_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    table = format_table(compared)
    (output_dir / "report.md").write_text(
        f"# The miniature SAM-CLIP, seed {arguments.seed}\n\n{table}\n"
        f"Training: {sum(seconds.values()) - seconds['evaluation']:.0f} s, {sum(images_seen.values())} images. "
        f"Evaluation: {seconds['evaluation']:.0f} s.\n\n![Scenes and masks](figure.png)\n"
    )
    print(f"\n{table}\nFigure: {output_dir / 'figure.png'}. Load the model with\n")
    print(USAGE.format(model=output_dir / "model"))


if __name__ == "__main__":
    main()
