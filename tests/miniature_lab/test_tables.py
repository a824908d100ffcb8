"""The tables of all variants, in the smallest form that trains, judges, goes on and draws."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from samclip_hf.miniature_lab import tables as tables_command

TRAINING = Path(__file__).parents[2] / "training"


@pytest.fixture
def tables():
    return tables_command


def results(tables, seed: int) -> dict:
    """Of a seed that has been judged: figures that tell seed and run apart."""
    wanted = {(task, figure) for _, task, figure, _ in tables.ROWS} | {(t, f) for t, f, _ in tables.COLUMNS}
    content: dict = {"tasks": {}, "environment": {}}
    for task, figure in sorted(wanted):
        entry = content["tasks"].setdefault(task, {"protocol": {}, "models": {}})
        for place, name in enumerate(tables.RUNS):
            entry["models"].setdefault(name, {"metrics": {}})["metrics"][figure] = seed / 10 + place / 100
    return content


def written(content: dict, folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(content))


def test_mean_and_spread_are_over_the_seeds_that_are_done(tables, tmp_path):
    parents = {"protocol": {}, "models": {"clip": {"metrics": {"top1": 0.9}}}}
    written({"tasks": {"classification:miniature@64": parents}}, tmp_path / "parents")
    for seed in (0, 1, 3):
        written(results(tables, seed), tmp_path / f"seed{seed}" / "evaluation")
    unfinished = results(tables, 2)
    del unfinished["tasks"]["composed:miniature"]["models"]["lora"]
    written(unfinished, tmp_path / "seed2" / "evaluation")

    content = tables.collect(tmp_path)
    assert content["seeds"] == [0, 1, 3] and content["steps"] == tables.STEPS
    assert tables.collect(tmp_path, share=0.1)["steps"] == {1: 30, 2: 10, 3: 5}
    content["metrics"].update({"sam": {}, "sam+clip": {}})
    text = tables.markdown(content)
    assert "3 seeds: mean (lowest - highest)" in text
    place = list(tables.RUNS).index("lora") / 100
    low, middle, high = (f"{value + place:.3f}" for value in (0, 0.4 / 3, 0.3))
    assert f"| LoRA, r 16, rate x1 | {middle} ({low} - {high}) |" in text
    assert "| 1, 6 | zero-shot top-1 of 48, 64 px |  | 0.900 |  |" in text  # parents have one figure, and no spread
    tables.draw(content, tmp_path / "tables.png")
    assert Image.open(tmp_path / "tables.png").width > 1000


def test_what_was_judged_or_trained_otherwise_is_not_mixed_in(tables, tmp_path):
    written({"tasks": {}}, tmp_path / "parents")
    for seed in (0, 1):
        content = results(tables, seed)
        content["tasks"]["composed:miniature"]["protocol"] = {"data": f"drawn scenes, {seed}"}
        written(content, tmp_path / f"seed{seed}" / "evaluation")
    with pytest.raises(SystemExit, match="composed:miniature was judged by different protocols"):
        tables.collect(tmp_path)
    (tmp_path / "stage1").mkdir()
    (tmp_path / "stage1" / "train_results.json").write_text("{}")
    (tmp_path / "stage1" / "trainer_state.json").write_text('{"global_step": 30}')
    tables.train("stage1", 0, tmp_path, share=0.1)  # done
    with pytest.raises(SystemExit, match="stage1 was trained for 30 steps and not 300"):
        tables.train("stage1", 0, tmp_path, share=1)


def test_every_variant_is_held_against_one_of_its_own_stage(tables):
    for run in tables.RUNS.values():
        assert run.start is None or run.start in tables.RUNS
        if run.baseline is not None:
            assert tables.RUNS[run.baseline].stage == run.stage


def test_runs_are_trained_and_judged_once(tables, tmp_path, monkeypatch, capfd):
    runs = {name: tables.RUNS[name] for name in ("stage1", "random_head")}
    runs["stage2"] = replace(tables.RUNS["lora"], baseline=None, title="stage 2 with LoRA")
    monkeypatch.setattr(tables, "RUNS", runs)
    for name in runs:
        tables.train(name, 0, tmp_path, share=0.004)  # one step
        assert (tmp_path / name / "model.safetensors").exists()
    tables.judge([tmp_path / name for name in runs], ("prompts",), tmp_path / "evaluation", share=0.01)
    judged = json.loads((tmp_path / "evaluation" / "results.json").read_text())["tasks"]["prompts:miniature"]
    assert judged["models"].keys() == runs.keys()
    capfd.readouterr()
    for name in runs:
        tables.train(name, 0, tmp_path, share=0.004)
    assert capfd.readouterr().out == ""  # all done


def test_a_run_that_fails_ends_with_what_to_do(tables, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RUNS", {"stage1": replace(tables.RUNS["stage1"], options="--no_such_option 1")})
    with pytest.raises(SystemExit, match=r"seed 0, after stage 1 stopped with 2\. The same command goes on"):
        tables.train("stage1", 0, tmp_path, share=0.01)
