"""`samclip evaluate`: tasks, options and output files."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from samclip_cli import CommandError, evaluate
from samclip_hf import miniature

TRAINING = Path(__file__).parents[2] / "training"
NAMES = ["background", "red", "green", "blue"]
COLORS = np.array([[0, 0, 0], [250, 0, 0], [0, 250, 0], [0, 0, 250]], dtype=np.uint8)
# Labels of an image of 4 x 6 pixels.
LABELS = np.array([[1, 1, 0, 0, 2, 2]] * 2 + [[0, 3, 3, 3, 0, 0]] * 2)


def image_of(labels: np.ndarray) -> Image.Image:
    return Image.fromarray(COLORS[labels])


def launch(output_dir: Path, *arguments: str, processes: int = 1) -> subprocess.CompletedProcess:
    script = TRAINING / "evaluate.py"
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes), "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    launcher += ["--main_process_port", "29571"] if processes > 1 else []
    command = [sys.executable, *launcher, str(script), "--output_dir", str(output_dir), "--share", "0.1", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)


@pytest.mark.slow
def test_two_processes_give_the_results_of_one_and_a_second_run_computes_nothing(tmp_path):
    arguments = ["--model", miniature.checkpoint(), "--task", "classification:miniature@64", "instances", "retrieval"]
    arguments += ["linear-probe"]
    metrics = []
    for processes in (1, 2):
        run = launch(tmp_path / str(processes), *arguments, processes=processes)
        assert run.returncode == 0, run.stderr
        content = json.loads((tmp_path / str(processes) / "results.json").read_text())
        metrics.append({key: entry["models"]["samclip"]["metrics"] for key, entry in content["tasks"].items()})
    assert metrics[0] == metrics[1] and len(metrics[0]) == 4
    again = launch(tmp_path / "1", *arguments)
    assert again.stdout.count("already in") == 4


def test_an_interrupted_task_is_run_again(tmp_path, monkeypatch):
    arguments = ["--model", miniature.clip_teacher(), "--task", "classification:miniature@64", "--share", "0.05"]
    arguments += ["--output_dir", str(tmp_path)]

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("samclip_hf.evaluation.save_result_panel", interrupt)
        evaluate.run(arguments)
    evaluate.run(arguments)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("results.json", "results.md", "classification-miniature-64-clip.png")
    }


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--limit", "0"], "argument --limit: must be an integer of 1 or more, got '0'"),
        (["--size", "64", "-1"], "argument --size: must be an integer of 1 or more"),
        (["--limit", "5"], "--limit applies to classification, retrieval"),
        (["--task", "semantic:miniature@96", "--size", "64"], "on data other than the miniature's scenes"),
        (["--task", "prompts:tars", "--detections", "boxes.json"], "--detections applies to instances on data other"),
        (["--task", "cost:1024"], "such as cost:768x1024"),
        (["--task", "klassification:photos"], "Available evaluators: classification, retrieval"),
    ],
)
def test_options_without_effect_are_errors(arguments, message, tmp_path, capsys):
    with pytest.raises((CommandError, SystemExit)) as error:
        evaluate.run([*arguments, "--output_dir", str(tmp_path / "out")])
    assert message in f"{error.value} {capsys.readouterr().err}" and not (tmp_path / "out").exists()


def test_probes_train_on_the_training_split_of_a_named_data_set(tmp_path):
    for split, stem in (("train", "a"), ("val", "b")):
        folder = tmp_path / "VOCdevkit/VOC2012"
        for path in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
            (folder / path).mkdir(parents=True, exist_ok=True)
        image_of(LABELS).save(folder / f"JPEGImages/{stem}.jpg")
        Image.fromarray(LABELS.astype(np.uint8)).save(folder / f"SegmentationClass/{stem}.png")
        (folder / f"ImageSets/Segmentation/{split}.txt").write_text(f"{stem}\n")
    options = ["--data", str(tmp_path), "--train_data", "voc21", "--size", "64", "--steps", "7"]
    arguments = evaluate.build_parser().parse_args(["--task", "head-probe:voc21", *options])
    task = evaluate.build_evaluators(arguments)["head-probe:voc21@64"]
    assert [sample.key for sample in task.train.samples] == ["a"]
    assert [sample.key for sample in task.test.samples] == ["b"]
    assert "7 steps" in task.describe()["training"]


def test_names_of_models_and_files_are_short_and_unique(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert evaluate.short_names([".", "runs/stage3/", "owner/clip"]) == [tmp_path.name, "stage3", "clip"]
    long = "/".join(["seed0"] * 60)
    assert len(evaluate.file_name(long)) < 210 and evaluate.file_name(long) != evaluate.file_name(long + "x")
    assert evaluate.file_name("a:b@1-ü+c") == "a-b-1--+c"


def test_processes_wait_for_the_slowest(tmp_path, monkeypatch):
    """One process can train heads for hours. By default, torch ends the others after 30 minutes."""
    options = {}

    def stop(**kwargs):
        options.update(kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr("accelerate.PartialState", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(["--output_dir", str(tmp_path)])
    assert options["timeout"].days >= 1


def test_unknown_tasks_and_models_are_errors_before_any_evaluation(tmp_path):
    with pytest.raises(CommandError, match=r"unknown task 'klassification'.*: classification"):
        evaluate.run(["--task", "klassification", "--output_dir", str(tmp_path)])
    models = [miniature.checkpoint(), str(tmp_path / "nowhere")]
    with pytest.raises(CommandError, match="nowhere cannot be loaded"):
        evaluate.run(["--model", *models, "--task", "classification:miniature@64", "--output_dir", str(tmp_path)])
    assert not (tmp_path / "results.json").exists()
    cascade = f"{miniature.clip_teacher()}+{miniature.sam_teacher()}"
    with pytest.raises(CommandError, match=r"A cascade must be SAM\+CLIP"):
        evaluate.run(["--model", cascade, "--output_dir", str(tmp_path)])


def test_folders_are_evaluated_at_several_sizes(tmp_path):
    for name, number in (("red", 0), ("green", 1)):
        (tmp_path / "classes" / name).mkdir(parents=True)
        image_of(np.full((40, 60), number)).save(tmp_path / "classes" / name / "1.png")
    for folder in ("images", "labels"):
        (tmp_path / "maps" / folder).mkdir(parents=True)
    classes = np.kron(LABELS, np.ones((6, 6), dtype=np.int64))
    image_of(classes).save(tmp_path / "maps" / "images" / "1.png")
    Image.fromarray(classes.astype(np.uint8)).save(tmp_path / "maps" / "labels" / "1.png")
    (tmp_path / "maps" / "classes.json").write_text(json.dumps(NAMES))
    options = ["--model", miniature.checkpoint(), "--data", str(tmp_path), "--size", "64", "96"]
    out = ["--output_dir", str(tmp_path / "out")]
    evaluate.run([*options, "--task", "classification:classes", "semantic:maps", "composed:maps", *out])
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    expected = {
        f"{task}@{size}" for task in ("classification:classes", "semantic:maps", "composed:maps") for size in (64, 96)
    }
    assert set(content["tasks"]) == expected and "--size 64 96" in content["command"]
    assert (tmp_path / "out" / "semantic-maps-96-samclip.png").exists()
    with pytest.raises(CommandError, match=r"classes\.json"):
        evaluate.run(["--data", str(tmp_path), "--task", "semantic:classes", *out])
