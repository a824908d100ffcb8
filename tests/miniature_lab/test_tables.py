"""Training, evaluation and tables of the variants, with few steps and scenes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from samclip_cli.train import read_recipe
from samclip_hf.miniature_lab import commands, tables


def results_of_seed(seed: int) -> dict:
    """Results of a complete seed, with values that differ between seeds and runs."""
    columns = {(task, metric) for _, task, metric, _ in tables.ROWS}
    columns |= {(task, metric) for task, metric, _ in tables.COLUMNS}
    content: dict = {"tasks": {}, "environment": {}}
    for task, metric in sorted(columns):
        entry = content["tasks"].setdefault(task, {"protocol": {}, "models": {}})
        for index, name in enumerate(tables.RUNS):
            entry["models"].setdefault(name, {"metrics": {}})["metrics"][metric] = seed / 10 + index / 100
    return content


def write(content: dict, folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(content))


def test_mean_minimum_and_maximum_are_over_complete_seeds(tmp_path):
    teachers = {"protocol": {}, "models": {"clip": {"metrics": {"top1": 0.9}}}}
    write({"tasks": {"classification:miniature@64": teachers}}, tmp_path / "teachers")
    for seed in (0, 1, 3):
        write(results_of_seed(seed), tmp_path / f"seed{seed}" / "evaluation")
    unfinished = results_of_seed(2)
    del unfinished["tasks"]["composed:miniature"]["models"]["lora"]
    write(unfinished, tmp_path / "seed2" / "evaluation")

    content = tables.collect(tmp_path)
    assert content["seeds"] == [0, 1, 3] and content["steps"] == tables.STEPS
    assert tables.collect(tmp_path, fraction=0.1)["steps"] == {1: 30, 2: 10, 3: 5}
    content["metrics"].update({"sam": {}, "sam+clip": {}})
    text = tables.format_tables(content)
    assert "3 seeds: mean (minimum - maximum)" in text
    offset = list(tables.RUNS).index("lora") / 100
    minimum, average, maximum = (f"{value + offset:.3f}" for value in (0, 0.4 / 3, 0.3))
    assert f"| {tables.RUNS['lora'].title} | {average} ({minimum} - {maximum}) |" in text
    assert "| 1, 6 | zero-shot top-1 of 48, 64 px |  | 0.900 |  |" in text  # teachers have a single value
    tables.draw_differences(content, tmp_path / "tables.png")
    assert Image.open(tmp_path / "tables.png").width > 1000


def test_results_with_another_protocol_and_runs_with_other_steps_raise(tmp_path):
    write({"tasks": {}}, tmp_path / "teachers")
    for seed in (0, 1):
        content = results_of_seed(seed)
        content["tasks"]["composed:miniature"]["protocol"] = {"data": f"procedural scenes, {seed}"}
        write(content, tmp_path / f"seed{seed}" / "evaluation")
    with pytest.raises(SystemExit, match="composed:miniature was evaluated with different protocols"):
        tables.collect(tmp_path)
    for name in ("composed:miniature#0a1b2c3d", "stage1@0a1b2c3d"):
        content = results_of_seed(2)
        tasks = content["tasks"]
        where = tasks if ":" in name else tasks["composed:miniature"]["models"]
        where[name] = next(iter(where.values()))
        write(content, tmp_path / name / "seed2" / "evaluation")
        write({"tasks": {}}, tmp_path / name / "teachers")
        with pytest.raises(SystemExit, match=f"results of different protocols or weights .{name}"):
            tables.collect(tmp_path / name)
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
    monkeypatch.setattr(tables, "RUNS", {"stage1": replace(tables.RUNS["stage1"], options="--no_such_option 1")})
    with pytest.raises(SystemExit, match=r"Seed 0: after stage 1 failed with exit code 2"):
        tables.train("stage1", 0, tmp_path, fraction=0.01)


def test_short_runs_have_as_many_warmup_steps_as_the_recipes():
    recipes = {stage: read_recipe(f"miniature_stage{stage}") for stage in commands.WARMUP_STEPS}
    steps = {stage: recipe["warmup_steps"] * recipe["max_steps"] for stage, recipe in recipes.items()}
    assert steps == commands.WARMUP_STEPS
