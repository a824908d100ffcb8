"""Benchmarks run end to end on tiny models."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPVisionConfig, SamConfig

from samclip_hf import miniature
from samclip_hf.distillation import SamClipTrainer

from .conftest import tiny_sam
from .scripts import load_script

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def inference():
    return load_script(BENCHMARKS / "inference.py")


@pytest.fixture
def sizes():
    tower = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return tiny_sam().config, CLIPVisionConfig(**tower, image_size=32, patch_size=8)


@pytest.mark.slow
@pytest.mark.parametrize("what, rows", [("encoder", 4), ("text_to_masks", 9)])
def test_inference_benchmark_prints_a_row_for_every_variant(inference, sizes, capsys, monkeypatch, what, rows):
    monkeypatch.setattr(inference, "measure_memory", inference.run_once)  # without a new process for every row
    threads = torch.get_num_threads()
    inference.main([what, "--repeats", "2"], *sizes)
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| S", "| C", "| unm"))]
    assert len(table) == rows
    for line in table:
        assert re.search(r"\| \d+\.\d+ \(\d+\.\d+ - \d+\.\d+\) \|$", line), line
    assert torch.get_num_threads() == threads


def test_inference_benchmark_compares_equal_outputs(inference, sizes, monkeypatch):
    results = {}

    def compare(functions, repeats, device):
        results.update({name: run() for name, run in functions.items() if name != "matrix product"})
        return {name: [1.0] for name in functions}

    monkeypatch.setattr(inference, "compare", compare)
    monkeypatch.setattr(inference, "measure_memory", lambda *arguments: 0.0)
    inference.main(["encoder", "--repeats", "1"], *sizes)
    expected = results.pop("SamModel").last_hidden_state
    assert len(results) == 3
    for result in results.values():
        torch.testing.assert_close(result.last_hidden_state, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak memory from Linux")
def test_inference_benchmark_measures_the_memory_of_a_run_in_a_new_process(tmp_path):
    (tmp_path / "memory.py").write_text("""
import argparse, inference, torch
def create(arguments):
    weights = torch.ones(10**8)
    return {"two": lambda: weights + weights * weights, "freed": lambda: [weights + 1 for _ in range(3)][0],
            "in turn": lambda: sum(float((weights[: 25 * 10**6] + i).max()) for i in range(8)), "none": lambda: 0}
if __name__ == "__main__":
    arguments = argparse.Namespace(device="cpu", threads=1)
    print(*(inference.measure_memory(create, name, arguments) for name in ("two", "freed", "in turn", "none")))
""")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(BENCHMARKS), *sys.path])}
    done = subprocess.run([sys.executable, "memory.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    gigabytes = [float(word) for word in done.stdout.split()]
    assert gigabytes == pytest.approx([0.8, 1.2, 0.1, 0.0], abs=0.02)


def test_inference_benchmark_requires_the_requested_gpu(inference, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        inference.main(["encoder", "--device", "cuda"])
    assert "torch finds no GPU" in capsys.readouterr().err


def test_mask_generation_benchmark_finds_equal_masks_with_both_models(capsys):
    script = load_script(Path(__file__).parents[1] / "benchmarks" / "mask_generation.py")
    script.main(["--longest_edge", "96", "--points_per_crop", "4", "--repeats", "1"])
    output = capsys.readouterr().out
    assert re.search(r"Equal masks: [1-9]\d* pairs, lowest IoU (1\.0|0\.99)", output), output
    assert output.count(" - ") == 3  # two rows, and the header


@pytest.mark.slow
@pytest.mark.parametrize("recipe, parts", [("vit_b_stage2", 6), ("lite_region", 6)])
def test_training_step_benchmark_prints_the_time_of_every_part(capsys, monkeypatch, recipe, parts):
    monkeypatch.syspath_prepend(BENCHMARKS)
    script = load_script(BENCHMARKS / "training_step.py")
    arguments = ["--recipe", recipe, "--clip_resolution", "64", "--clip_batch_size", "2", "--repeats", "1"]
    sam, clip = miniature.sam_teacher(), miniature.clip_teacher()
    script.main(arguments, SamConfig.from_pretrained(sam), CLIPConfig.from_pretrained(clip))
    _, variants, table = capsys.readouterr().out.split("\n\n")
    assert [line.split(" | ")[0] for line in variants.splitlines()[2:]] == ["| sdpa", "| eager"]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
    assert len(rows) == 2 + parts
    seconds = float(variants.splitlines()[2].split(" | ")[1])
    assert sum(float(row[1]) for row in rows[2:]) == pytest.approx(seconds, rel=0.02)
    assert ("SAM teacher" in table) == (recipe == "vit_b_stage2")


@pytest.fixture
def naming():
    return load_script(Path(__file__).parents[1] / "benchmarks" / "naming.py")


def test_auroc_is_the_probability_of_a_higher_score(naming):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 10, (40, 5), generator=generator).float()  # with ties, which count half
    is_positive = torch.rand(40, 5, generator=generator) > 0.7
    difference = scores[is_positive][:, None] - scores[~is_positive]
    expected = ((difference > 0).double() + (difference == 0).double() / 2).mean()
    assert naming.auroc(scores, is_positive) == pytest.approx(float(expected))


@pytest.mark.slow
@pytest.mark.parametrize("table, rows", [("masks", 7), ("scores", 10), ("composed", 4), ("time", 4)])
def test_naming_benchmark_prints_a_row_for_every_method(naming, capsys, table, rows):
    naming.main([table, "--num_scenes", "2", "--seeds", "102"])
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]) == rows + 1


@pytest.mark.slow
@pytest.mark.parametrize("table, rows", [("segmentation", 4), ("mixed", 2)])
def test_examples_benchmark_prints_a_row_for_every_vocabulary(capsys, table, rows):
    examples = load_script(Path(__file__).parents[1] / "benchmarks" / "examples.py")
    few = ["--models", "shipped", "--shots", "1", "--num_scenes", "2", "--num_splits", "1", "--seeds", "102"]
    examples.main([table, *few])
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("| shipped")]) == rows


@pytest.mark.slow
def test_tiles_benchmark_prints_a_row_with_and_without_tiles(capsys):
    tiles = load_script(Path(__file__).parents[1] / "benchmarks" / "tiles.py")
    tiles.main(
        ["--sizes", "256x192", "--tiles", "128", "0", "--modes", "semantic", "--threads", str(torch.get_num_threads())]
    )
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| semantic")]
    assert [row.split("|")[3].strip() for row in rows] == ["128", "none"]


@pytest.fixture
def mosaics():
    return load_script(Path(__file__).parents[1] / "benchmarks" / "mosaics.py")


def test_cuts_are_straight_edges_on_seams_that_the_truth_does_not_have(mosaics):
    mosaic = mosaics.draw(0, 2, 2, 100, [120])
    lines = mosaics.seams(mosaics.ImageTiles(200, 200, 120, 0.25))
    assert lines == ([80, 100, 120], [80, 100, 120])
    assert mosaics.average_precision(mosaic, [(mosaic.objects == len(mosaic.class_ids), 1.0, 1)], False) > 0
    truth = [mosaic.objects == number for number in range(1, len(mosaic.class_ids) + 1)]
    found = [(mask, 1.0, class_id + 1) for mask, class_id in zip(truth, mosaic.class_ids, strict=True) if mask.any()]
    assert mosaics.average_precision(mosaic, found, True) == 1
    assert mosaics.count_cuts(mosaic, [mosaic.label_map(), *truth], lines) == 0
    disk = np.hypot(*(np.mgrid[:200, :200] - 100.5)) < 70
    empty = mosaics.Mosaic(mosaic.image, np.where(disk, 1, 0), [0], 0, np.zeros_like(disk))
    columns = np.arange(200)
    assert mosaics.count_cuts(empty, [disk], lines) == 0
    assert mosaics.count_cuts(empty, [disk & (columns < 120)], lines) == 1
    assert mosaics.count_cuts(empty, [(disk & (columns < 120)).astype(int)], lines) == 1
    assert mosaics.count_cuts(empty, [disk & (columns < 110)], lines) == 0  # not on a seam
    assert mosaics.count_cuts(empty, [disk & (columns < 120) & (columns[:, None] < 80)], lines) == 2


@pytest.mark.slow
def test_mosaics_benchmark_prints_a_row_for_every_mode(mosaics, capsys):
    mosaics.main(["--columns", "2", "--rows", "1", "--side", "128", "--tiles", "0", "150", "--points", "4"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row.split("|")[1].strip() for row in rows] == [
        name for mode in mosaics.MODES for name in ("mode", mode, mode)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["vit_b", "merged_vit_b"])
def test_annotate_benchmark_divides_the_time_of_the_command(capsys, sizes, monkeypatch, model):
    monkeypatch.syspath_prepend(BENCHMARKS)
    annotate = load_script(BENCHMARKS / "annotate.py")
    sam_config, vision_config = sizes
    text = {"vocab_size": 162, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = CLIPConfig(
        projection_dim=16,
        vision_config=vision_config.to_dict(),
        text_config=text | {"num_attention_heads": 2},
    )
    threads = ["--threads", str(torch.get_num_threads()), "--num_images", "2"]
    annotate.main(["--model", model, *threads], configs=(sam_config, config))
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    shares = {row[1].strip(): float(row[3]) for row in rows[1:]}
    assert sum(shares.values()) == pytest.approx(2, abs=0.1)  # the command and its parts
    assert shares.keys() >= {"image encoder", "mask decoder", "CLIP side, segments"}  # of tiny models: some are 0.00


@pytest.mark.slow
def test_region_variants_benchmark_prints_a_row_for_every_variant(capsys, monkeypatch, tmp_path):
    script = load_script(BENCHMARKS / "region_variants.py")
    recorded = {}

    def record(trainer, values):
        recorded.update(values)
        SamClipTrainer.record(trainer, values)

    monkeypatch.setattr(script, "SCENE_FRACTION", 0.01)
    monkeypatch.setattr(script.ShiftTrainer, "max_shift", 0)
    monkeypatch.setattr(script.ShiftTrainer, "record", record, raising=False)
    command = ["--steps", "1", "--output_dir", str(tmp_path)]
    script.main(command)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(script.VARIANTS)
    assert recorded["shift_loss"].item() == pytest.approx(0, abs=1e-6)  # no shift, and the average is the student
    monkeypatch.setattr(script, "build_trainer", None)  # finished runs are not trained again
    script.main(command)
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")] == rows


@pytest.mark.slow
def test_object_masks_benchmark_has_a_column_for_each_weight(capsys):
    benchmark = load_script(BENCHMARKS / "object_masks.py")
    options = ["--max_steps", "1", "--guard_weight", "0", "--other_names", "", "--retention_limit", "4"]
    benchmark.main(["--seeds", "1", "--num_images", "8", "--weights", "0", "2", "--", *options])
    header, _, *rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert header == "|  | before | mask_loss_weight 0 | mask_loss_weight 2 |"
    assert len(rows) == 7 and all(re.search(r"( \| 0\.\d{3}){3} \|$", row) for row in rows)
