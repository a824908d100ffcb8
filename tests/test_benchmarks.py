"""Benchmarks run end to end on tiny models."""

import re
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig

from .conftest import tiny_sam
from .scripts import load_script


@pytest.fixture
def inference():
    path = Path(__file__).parents[1] / "benchmarks" / "inference.py"
    return load_script(path)


@pytest.fixture
def sizes():
    tower = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return tiny_sam().config, CLIPVisionConfig(**tower, image_size=32, patch_size=8)


@pytest.mark.slow
@pytest.mark.parametrize("what, rows", [("encoder", 4), ("text_to_masks", 8)])
def test_inference_benchmark_prints_a_row_for_every_variant(inference, sizes, capsys, what, rows):
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
        return {name: [1.0] for name in functions}, dict.fromkeys(functions, 0.0)

    monkeypatch.setattr(inference, "compare", compare)
    inference.main(["encoder", "--repeats", "1"], *sizes)
    expected = results.pop("SamModel").last_hidden_state
    assert len(results) == 3
    for result in results.values():
        torch.testing.assert_close(result.last_hidden_state, expected, rtol=1e-4, atol=1e-4)


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
@pytest.mark.parametrize("table, rows", [("masks", 7), ("scores", 10), ("composed", 4)])
def test_naming_benchmark_prints_a_row_for_every_method(naming, capsys, table, rows):
    naming.main([table, "--num_scenes", "2", "--seeds", "102"])
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]) == rows + 1


@pytest.mark.slow
def test_tiles_benchmark_prints_a_row_with_and_without_tiles(capsys):
    tiles = load_script(Path(__file__).parents[1] / "benchmarks" / "tiles.py")
    tiles.main(["--edges", "256", "--tile", "128", "--modes", "semantic", "--threads", str(torch.get_num_threads())])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| semantic")]
    assert [row.split("|")[3].strip() for row in rows] == ["128", "none"]
