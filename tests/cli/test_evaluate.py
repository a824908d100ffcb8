"""`samclip evaluate`: tasks, options and output files."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from samclip_cli import CommandError, evaluate, main
from samclip_hf import SamClipForImageSegmentation, SamClipProcessor, miniature

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


PANEL = "classification-miniature-64-samclip.png"


@pytest.mark.parametrize("full_at", [PANEL, "results.json", "results.md", "samclip-model-index.yaml"])
def test_a_run_on_a_full_disk_names_the_file_and_is_completed_by_the_next_one(tmp_path, monkeypatch, capsys, full_at):
    arguments = ["evaluate", "--model", miniature.checkpoint(), "--task", "classification:miniature@64"]
    arguments += ["--share", "0.05", "--output_dir", str(tmp_path)]
    replace = Path.replace

    def fail(self, target):
        if target.name == full_at and (full_at == PANEL or (tmp_path / PANEL).exists()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)  # the last step of an atomic write
        assert main(arguments) == 1
    assert f"{os.strerror(errno.ENOSPC)}: {str(tmp_path / full_at)!r}" in capsys.readouterr().err
    assert (tmp_path / PANEL).exists() == (full_at != PANEL)
    assert main(arguments) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"results.json", "results.md", PANEL, "samclip-model-index.yaml"}
    content = json.loads((tmp_path / "results.json").read_text())
    assert "classification:miniature@64" in content["tasks"]
    assert "classification:miniature@64" in (tmp_path / "results.md").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--limit", "0"], "argument --limit: must be an integer of 1 or more, got '0'"),
        (["--size", "64", "-1"], "argument --size: must be an integer of 1 or more"),
        (["--limit", "5"], "--limit applies to classification, retrieval"),
        (["--data", "photos"], "--data applies to classification, retrieval"),
        (["--task", "cost:64x64", "--share", "0.5"], "--share applies to the miniature's scenes"),
        (["--task", "cost:64x64", "--seed", "201"], "--seed applies to the miniature's scenes"),
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


def test_other_weights_and_quick_looks_replace_no_results(tmp_path, capsys):
    """A model is trained further in its folder; then a quick look runs with other scenes."""
    folder = tmp_path / "student"
    shutil.copytree(miniature.clip_teacher(), folder)
    arguments = ["--task", "classification:miniature@64", "--output_dir", str(tmp_path / "out"), "--share", "0.05"]
    kept = []
    for step, changes in enumerate(([], [], ["--share", "0.1"])):
        if step == 1:
            weights = load_file(folder / "model.safetensors")
            weights["logit_scale"] += 0.01
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        evaluate.run(["--model", str(folder), *arguments, *changes])
        content = json.loads((tmp_path / "out" / "results.json").read_text())
        entries = [json.dumps(entry) for task in content["tasks"].values() for entry in task["models"].values()]
        assert len(entries) == step + 1 and set(kept) <= set(entries)
        kept = entries
    names = [(key, list(task["models"])) for key, task in content["tasks"].items()]
    (key, [first, second]), (quick_key, [third]) = names
    assert (key, first, third) == ("classification:miniature@64", "student", second)
    assert second.startswith("student@") and quick_key.startswith(f"{key}#")
    assert len(list((tmp_path / "out").glob("*.png"))) == 3
    output = capsys.readouterr().out
    assert "contains results of another model named student, or results of an older version" in output
    assert f"of {key} with another protocol. The new results have the name {quick_key}." in output
    evaluate.run(["--model", str(folder), *arguments])
    assert f"{key}, {second}: already in" in capsys.readouterr().out


def test_models_that_support_none_of_the_tasks_are_errors_before_any_evaluation(tmp_path):
    SamClipForImageSegmentation.from_pretrained(miniature.checkpoint()).drop_text_tower().save_pretrained(
        tmp_path / "a"
    )
    SamClipProcessor.from_pretrained(miniature.checkpoint()).save_pretrained(tmp_path / "a")
    pair = f"{miniature.sam_teacher()}+{miniature.clip_teacher()}"
    for model, task, kind in (
        (miniature.sam_teacher(), "classification", "Sam"),
        (miniature.clip_teacher(), "prompts", "Clip"),
        (pair, "linear-probe", "Unmerged"),
        (tmp_path / "a", "composed", "SamClipVision"),
    ):
        arguments = [
            "--model",
            miniature.checkpoint(),
            str(model),
            "--task",
            task,
            "--output_dir",
            str(tmp_path / "out"),
        ]
        with pytest.raises(CommandError, match=rf"\({kind}\) supports none of the tasks: {task}:miniature"):
            evaluate.run(arguments)
    assert not (tmp_path / "out").exists()


def test_default_models_that_support_none_of_the_tasks_are_left_out(tmp_path):
    samclip, sam, clip = miniature.checkpoint(), miniature.sam_teacher(), miniature.clip_teacher()
    defaults = [samclip, sam, clip, f"{sam}+{clip}"]
    for task, expected in (
        ("prompts", [samclip, sam, defaults[3]]),
        ("cascade", defaults[3:]),
        ("retrieval", [samclip, clip, defaults[3]]),
        ("linear-probe", defaults[:3]),
    ):
        evaluators = evaluate.build_evaluators(evaluate.build_parser().parse_args(["--task", task]))
        assert evaluate.select_models(defaults, evaluators, are_defaults=True) == expected
    evaluate.run(["--task", "classification:miniature@64", "--share", "0.01", "--output_dir", str(tmp_path)])
    (task,) = json.loads((tmp_path / "results.json").read_text())["tasks"].values()
    assert task["models"].keys() == {"samclip", "clip", "sam+clip"}


@pytest.mark.parametrize("name", ["results.md", "classification-miniature-64-clip.png", "clip-model-index.yaml"])
def test_files_of_other_programs_are_not_replaced(tmp_path, name):
    (tmp_path / name).write_text("mine")
    arguments = ["--model", miniature.clip_teacher(), "--task", "classification", "--output_dir"]
    with pytest.raises(CommandError, match=rf"--output_dir .*{name} would be replaced"):
        evaluate.run([*arguments, str(tmp_path)])
    (tmp_path / "results.json").write_text('{"accuracy": 1}')
    with pytest.raises(CommandError, match=r"--output_dir .* is not a results\.json of `samclip evaluate`"):
        evaluate.run([*arguments, str(tmp_path)])
    with pytest.raises(CommandError, match=rf"--output_dir .*{name} is not a folder"):
        evaluate.run([*arguments, str(tmp_path / name)])
    assert (tmp_path / name).read_text() == "mine"


def test_names_of_models_and_files_are_short_and_unique(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert evaluate.short_names([".", "runs/stage3/", "owner/clip"]) == [tmp_path.name, "stage3", "clip"]
    names = ["a/x/student", "b/x/student", "c/student", "sam", "a/x/student+clip", "b/x/student+clip"]
    assert evaluate.short_names(names) == [
        *("a/x/student", "b/x/student", "c/student", "sam"),
        *(f"{folder}/x/student+{tmp_path.parent.name}/{tmp_path.name}/clip" for folder in "ab"),
    ]
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
    with pytest.raises(CommandError, match=r"klassification: unknown evaluator.*: classification"):
        evaluate.run(["--task", "klassification", "--output_dir", str(tmp_path)])
    models = [miniature.checkpoint(), str(tmp_path / "nowhere")]
    with pytest.raises(CommandError, match="nowhere: no such folder"):
        evaluate.run(["--model", *models, "--task", "classification:miniature@64", "--output_dir", str(tmp_path)])
    assert not (tmp_path / "results.json").exists()
    pair = f"{miniature.clip_teacher()}+{miniature.sam_teacher()}"
    with pytest.raises(
        CommandError, match="a pair must be a SAM and a CLIP or SigLIP, in this order; got Clip and Sam"
    ):
        evaluate.run(["--model", pair, "--output_dir", str(tmp_path)])


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
