"""
The whole of SAM-CLIP in minutes: merges the miniature SAM and CLIP afresh, by the recipes in `training/configs`, and
shows what came out.

    python training/demo.py

Writes `model/` (loadable), `report.json`, `report.md` and `figure.png` into `runs/demo/`.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from samclip_hf import SamClipForImageSegmentation, SamClipProcessor, miniature
from samclip_hf.miniature_lab.report import (
    beside_teachers,
    draw,
    load_student,
    load_teachers,
    markdown,
    measure,
    set_world_vocabulary,
    world_tasks,
)

RECIPES = Path(__file__).parents[1] / "recipes"
# Optimizer steps: a fraction of the recipes' own, by which the shipped checkpoint was trained.
STEPS = {1: 700, 2: 100, 3: 60}

LOADING = """\
from transformers import pipeline
import samclip_hf
segments = pipeline("image-segmentation", model="{model}")("photo.png")"""


def train(stage: int, output_dir: Path, start: Path | None, seed: int) -> dict[str, float]:
    """Runs one stage as the README's user would, and returns its metrics."""
    command = [sys.executable, "-m", "samclip_cli.train", RECIPES / f"miniature_stage{stage}.yaml"]
    command += ["--output_dir", output_dir, "--max_steps", STEPS[stage], "--seed", seed, "--save_strategy", "no"]
    if start is not None:
        command += ["--model", start]
    subprocess.run([str(word) for word in command], check=True)
    return json.loads((output_dir / "train_results.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    output_dir: Path = arguments.output_dir
    output_dir.mkdir(parents=True, exist_ok=True)
    for number in STEPS:  # nothing of an earlier run
        shutil.rmtree(output_dir / f"stage{number}", ignore_errors=True)

    seconds, images_seen = {}, {}
    checkpoint = None
    for stage in STEPS:
        print(f"\n== Stage {stage} of 3 ==", flush=True)
        start = time.perf_counter()
        metrics = train(stage, output_dir / f"stage{stage}", checkpoint, arguments.seed)
        checkpoint = output_dir / f"stage{stage}"
        seconds[f"stage{stage}"] = round(time.perf_counter() - start, 1)
        images_seen[f"stage{stage}"] = int(metrics["train_images_seen"])

    print("\n== Evaluation: teachers, this run's student, the shipped student ==", flush=True)
    start = time.perf_counter()
    model = SamClipForImageSegmentation.from_pretrained(checkpoint)
    processor = SamClipProcessor.from_pretrained(checkpoint)
    set_world_vocabulary(model, processor)
    model.save_pretrained(output_dir / "model")
    processor.save_pretrained(output_dir / "model")
    sam, clip = load_teachers()
    students = {"demo": load_student(output_dir / "model"), "shipped": load_student(miniature.checkpoint())}
    tasks = world_tasks()
    teachers = measure(sam, tasks) | measure(clip, tasks)
    figures = {name: beside_teachers(measure(student, tasks), teachers) for name, student in students.items()}
    draw(clip, students["demo"], output_dir / "figure.png")
    seconds["evaluation"] = round(time.perf_counter() - start, 1)

    report = {"seconds": seconds, "images_seen": images_seen, **figures}
    (output_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    table = markdown(figures)
    (output_dir / "report.md").write_text(
        f"# SAM-CLIP in miniature, seed {arguments.seed}\n\n{table}\n"
        f"Trained in {sum(seconds.values()) - seconds['evaluation']:.0f} s on {sum(images_seen.values())} images, "
        f"evaluated in {seconds['evaluation']:.0f} s.\n\n![scenes](figure.png)\n"
    )
    print(f"\n{table}\nPicture: {output_dir / 'figure.png'}. Load the result with\n")
    print(LOADING.format(model=output_dir / "model"))


if __name__ == "__main__":
    main()
