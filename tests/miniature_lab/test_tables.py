"""Training, evaluation and tables of the variants, with few steps and scenes."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
from PIL import Image

from samclip_hf.distillation.arguments import SamClipTrainingArguments
from samclip_hf.miniature_lab import commands, tables


def write(content: dict, folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(content))


def write_seed(seed: int, folder: Path) -> None:
    """Writes results of a seed, with values that differ between seeds and runs."""
    columns = {(task, metric) for _, task, metric, _ in tables.ROWS if task not in tables.CASCADES}
    columns |= {(task, metric) for task, metric, _ in tables.COLUMNS}
    columns |= {(task, name) for task in tables.CLUTTERED for name in tables.OBJECT_COUNTS if "composed" in task}
    columns |= {(task, "mean_iou") for task in tables.CLUTTERED.values() if "composed" in task}
    evaluation = folder / f"seed{seed}" / "evaluation"
    for index, name in enumerate(tables.RUNS):
        content: dict = {"tasks": {}, "environment": {}}
        for task, metric in sorted(columns):
            entry = content["tasks"].setdefault(task, {"protocol": {}, "models": {name: {"metrics": {}}}})
            entry["models"][name]["metrics"] |= {metric: seed / 10 + index / 100, "iou: red shape": 0.5, "AR": None}
        write(content, evaluation / name)
    results = tables.read_runs([evaluation / name for name in tables.RUNS])
    tables.write_results(results, {"fraction": 1.0}, folder / f"seed{seed}.json")


def write_teachers(tasks: dict, folder: Path) -> None:
    tables.write_results({"tasks": tasks, "environment": {}}, {"fraction": 1.0}, folder / "teachers.json")


def test_mean_minimum_and_maximum_are_over_complete_seeds(tmp_path):
    teachers = {
        "classification:miniature@64": {"clip": {"metrics": {"top1": 0.9}}},
        "cascade:miniature": {"sam+clip": {"metrics": {"mean_iou": 0.61, "mean_iou, 2 objects": 0.62}}},
        "cascade:miniature@cluttered-raw-crops": {"sam+clip": {"metrics": {"mean_iou": 0.41}}},
        "prompts:miniature": {"sam": {"metrics": {"point_miou": 0.7}}},
    }
    for seed in (0, 1, 3):
        write_seed(seed, tmp_path)
    write_teachers({task: {"protocol": {}, "models": models} for task, models in teachers.items()}, tmp_path)

    content = tables.collect(tmp_path)
    assert content["seeds"] == [0, 1, 3] and content["steps"] == tables.STEPS
    assert tables.collect(tmp_path, fraction=0.1)["steps"] == {1: 30, 2: 8, 3: 6}
    text = tables.format_tables(content)
    assert "3 seeds: mean (minimum - maximum)" in text

    def cell(name: str) -> str:
        offset = list(tables.RUNS).index(name) / 100
        minimum, average, maximum = (f"{value + offset:.3f}" for value in (0, 0.4 / 3, 0.3))
        return f"{average} ({minimum} - {maximum})"

    assert f"| {tables.RUNS['lora'].title} | {cell('lora')} |" in text
    # Teachers have a single value.
    stages = " | ".join(cell(name) for name in tables.STAGES)
    assert f"| 1, 6 | zero-shot top-1 of 48, 64 px |  | 0.900 |  | {stages} |" in text
    cells = f"| {cell('stage3')} | {cell('stage3')} | {cell('paper_stage3')} | {cell('paper_stage3')} |"
    assert f"| 2 objects |  | 0.620 |  {cells}" in text
    assert f"| cluttered scenes | 0.410 |  |  {cells}" in text
    for baseline in ("stage1", "stage2", "sam_batch_3", "stage3"):
        assert text.count(f"| **{tables.RUNS[baseline].title}** | {cell(baseline)} |") == 1
    tables.draw_differences(content, tmp_path / "tables.png")
    assert Image.open(tmp_path / "tables.png").width > 1000


def test_single_classes_and_missing_metrics_are_not_kept(tmp_path):
    write_seed(0, tmp_path)
    content = json.loads((tmp_path / "seed0.json").read_text())
    metrics = [result["metrics"] for entry in content["tasks"].values() for result in entry["models"].values()]
    assert len(metrics) >= len(tables.RUNS) and content["settings"] == {"fraction": 1.0}
    assert not any(name == "AR" or name.startswith("iou: ") for result in metrics for name in result)


def test_results_with_another_protocol_and_runs_with_other_steps_raise(tmp_path):
    def change(path: Path, function) -> None:
        content = json.loads(path.read_text())
        function(content)
        path.write_text(json.dumps(content))

    def change_protocol(content: dict) -> None:
        content["tasks"]["composed:miniature"].update(protocol={"data": "other scenes"})

    write_seed(0, tmp_path)
    write_seed(1, tmp_path)
    write_teachers({}, tmp_path)
    change(tmp_path / "seed1.json", change_protocol)
    with pytest.raises(SystemExit, match="composed:miniature was evaluated with different protocols"):
        tables.collect(tmp_path)
    change(tmp_path / "seed0" / "evaluation" / "lora" / "results.json", change_protocol)
    with pytest.raises(SystemExit, match="composed:miniature was evaluated with different protocols"):
        tables.read_runs([tmp_path / "seed0" / "evaluation" / name for name in tables.RUNS])
    change(tmp_path / "seed1.json", lambda content: content.update(settings={"fraction": 0.5}))
    with pytest.raises(SystemExit, match=r"seed1\.json is of a run with other arguments"):
        tables.collect(tmp_path)
    for name in ("composed:miniature#0a1b2c3d", "stage1@0a1b2c3d"):
        folder = tmp_path / name
        write_seed(2, folder)
        write_teachers({}, folder)

        def add(content: dict, name: str = name) -> None:
            where = content["tasks"] if ":" in name else content["tasks"]["composed:miniature"]["models"]
            where[name] = next(iter(where.values()))

        change(folder / "seed2.json", add)
        with pytest.raises(SystemExit, match=f"results of different protocols or weights .{name}"):
            tables.collect(folder)
    (tmp_path / "stage1").mkdir()
    (tmp_path / "stage1" / "train_results.json").write_text("{}")
    (tmp_path / "stage1" / "trainer_state.json").write_text('{"global_step": 30}')
    tables.train("stage1", 0, tmp_path, fraction=0.1)  # is finished
    with pytest.raises(SystemExit, match="stage1 was trained for 30 steps, not 300"):
        tables.train("stage1", 0, tmp_path, fraction=1)


def test_every_variant_has_a_baseline_of_the_same_stage():
    for run in tables.RUNS.values():
        assert run.start is None or run.start in tables.RUNS
        if run.baseline is not None:
            assert tables.RUNS[run.baseline].stage == run.stage


@pytest.mark.parametrize("name", tables.RUNS)
def test_the_arguments_of_every_variant_are_valid(name, tmp_path):
    run = tables.RUNS[name]
    model = {} if run.start is None else {"model": "a checkpoint"}
    settings = commands.read_recipe(f"miniature_stage{run.stage}") | run.options | model
    arguments = SamClipTrainingArguments(output_dir=str(tmp_path), **settings)
    without = ("paper_stage1", "no_regions_in_stage2", "paper_stage2", "paper_stage3")
    assert arguments.has_region_loss == (name not in without)
    if run.baseline is not None:
        baseline = tables.RUNS[run.baseline]
        assert (run.options, run.start) != (baseline.options, baseline.start)


def test_a_run_without_the_region_loss_resets_what_only_that_loss_uses(monkeypatch):
    recipe = {"region_loss_weight": 1.0, "regions_per_image": 3, "sam_batch_size": 7, "learning_rate": 1.0}
    monkeypatch.setattr(commands, "read_recipe", lambda name: recipe)
    defaults = {field.name: field.default for field in fields(SamClipTrainingArguments)}
    paper = {**tables.NO_REGION_LOSS, "regions_per_image": defaults["regions_per_image"]}
    assert tables.Run("", 2).options == {}
    assert tables.Run("", 2, None, tables.NO_REGION_LOSS).options == paper
    paper["sam_batch_size"] = defaults["sam_batch_size"]  # stage 3 reads no masks then
    assert tables.Run("", 3, None, tables.NO_REGION_LOSS).options == paper


def test_processes_share_the_runs_and_none_is_done_twice(tmp_path, monkeypatch):
    runs = {"stage1": tables.Run("", 1), "stage2": tables.Run("", 2, "stage1"), "other": tables.Run("", 1)}
    done, written = [], []
    monkeypatch.setattr(tables, "RUNS", runs)
    monkeypatch.setattr(tables.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(tables, "train", lambda name, seed, folder, fraction: done.append((seed, name)))
    monkeypatch.setattr(tables, "evaluate_run", lambda name, folder, fraction: None)
    monkeypatch.setattr(tables, "evaluate_teachers", lambda folder, fraction: done.append("teachers"))
    monkeypatch.setattr(tables, "read_runs", lambda folders: {"folders": [str(folder) for folder in folders]})
    monkeypatch.setattr(tables, "write_tables", lambda folder, fraction: written.append(len(done)))
    (tmp_path / "seed0").mkdir()
    with tables.claim(tmp_path / "seed0" / "stage1.lock") as is_mine:  # another process is training stage 1
        assert is_mine
        for name in runs:
            tables.run_once(name, 0, tmp_path / "seed0", 1.0)
    assert done == [(0, "other")]  # stage 2 waits for stage 1
    tables.run_all([0, 1], tmp_path, 1.0)
    assert done[1:] == ["teachers", (0, "stage1"), (0, "stage2"), (1, "stage1"), (1, "stage2"), (1, "other")]
    assert written == [4, 7]
    tables.run_all([0, 1], tmp_path, 1.0)
    assert len(done) == 7 and written == [4, 7, 7]

    # The files of the results are enough to continue, in another folder.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("teachers.json", "seed0.json", "seed1.json"):
        (elsewhere / name).write_text((tmp_path / name).read_text())
    tables.run_all([0, 1, 2], elsewhere, 1.0)
    assert done[7:] == [(2, "stage1"), (2, "stage2"), (2, "other")] and written == [4, 7, 7, 7, 10]
    for folder in (tmp_path, elsewhere):
        with pytest.raises(SystemExit, match=r"seed0\.json is of a run with other arguments"):
            tables.run_all([0], folder, 0.5)
    recipe = tables.commands.read_recipe("miniature_stage1")
    monkeypatch.setattr(tables.commands, "read_recipe", lambda name: recipe | {"learning_rate": 1.0})
    with pytest.raises(SystemExit, match=r"seed0\.json is of a run with other arguments"):
        tables.run_all([0], elsewhere, 1.0)
    (tmp_path / "seed0.json").unlink()
    with pytest.raises(SystemExit, match="stage1 is of a run with other arguments"):
        tables.run_all([0], tmp_path, 1.0)


@pytest.mark.slow
def test_runs_are_trained_and_evaluated_once(tmp_path, monkeypatch, capfd):
    runs = {name: tables.RUNS[name] for name in ("stage1", "random_head")}
    runs["stage2"] = replace(tables.RUNS["lora"], baseline=None, title="stage 2 with LoRA")
    monkeypatch.setattr(tables, "RUNS", runs)
    for name in runs:
        tables.train(name, 0, tmp_path, fraction=0.004)  # one step
        assert (tmp_path / name / "model.safetensors").exists()
    tables.evaluate([tmp_path / name for name in runs], ("prompts",), tmp_path / "evaluation", fraction=0.01)
    evaluated = json.loads((tmp_path / "evaluation" / "results.json").read_text())["tasks"]["prompts:miniature"]
    assert evaluated["models"].keys() == runs.keys()
    capfd.readouterr()
    for name in runs:
        tables.train(name, 0, tmp_path, fraction=0.004)
    assert capfd.readouterr().out == ""  # all runs are finished


def test_a_failed_run_exits_with_its_title(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RUNS", {"stage1": replace(tables.RUNS["stage1"], arguments={"no_such_option": 1})})
    with pytest.raises(SystemExit, match=r"Seed 0: after stage 1 failed with exit code 2"):
        tables.train("stage1", 0, tmp_path, fraction=0.01)


@pytest.mark.parametrize(("recipe", "warmup_steps"), [("miniature_stage1", 50), ("miniature_paper_stage1", 50)])
def test_short_runs_have_as_many_warmup_steps_as_the_recipe(recipe, warmup_steps, monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr(commands, "run", lambda title, command: started.append(list(command)))
    commands.train("", recipe, tmp_path, 0, 300)
    commands.train("", recipe, tmp_path, 0, 7)
    assert [command[command.index("--warmup_steps") + 1] for command in started] == [warmup_steps, 7]
