"""The floors of the miniature's metrics."""

import json
import sys

import pytest

from samclip_hf.miniature_lab import floors

TEACHERS = {
    ("classification:miniature@128", "top1"): 0.8,
    ("classification:miniature@128", "top1, never captioned"): 0.5,
    ("prompts:miniature", "point_miou"): 0.8,
    ("prompts:miniature", "box_miou"): 0.5,
    ("cascade:miniature", "mean_iou"): 0.6,
}
STUDENT = {
    ("semantic:miniature@128", "mean_iou"): 0.51,
    ("composed:miniature", "mean_iou"): 0.71,
    ("composed:miniature@classes", "mean_iou"): 0.63,
    ("classification:miniature@64", "top1"): 0.79,
    ("classification:miniature@128", "top1"): 0.784,
    ("classification:miniature@128", "top1, never captioned"): 0.48,
    ("prompts:miniature", "point_miou"): 0.76,
    ("prompts:miniature", "box_miou"): 0.5,
}
MEASURED = [0.51, 0.71, 0.63, 0.11, 0.98, 0.79, 0.96, 0.95, 1.0]
REACHED = [True, True, True, True, True, False, True, False, True]
DEMO = {
    "semantic_miou": {"clip_head": 0.36, "both_heads": 0.49},
    "point_miou": {"student": 0.7, "teacher": 0.7},
    "box_miou": {"student": 0.7, "teacher": 0.8},
}


def test_the_table_states_which_floors_are_reached_on_all_scenes():
    values = [floor.measure(STUDENT, TEACHERS) for floor in floors.FLOORS]
    assert values == pytest.approx(MEASURED)
    of_model = {floor.claim: [value, value] for floor, value in zip(floors.FLOORS, values, strict=True)}
    of_model["mIoU by text, both heads"][1] = 0.69
    rows = floors.format_floors({"student": of_model}, DEMO).splitlines()[2:]
    verdicts = ["yes" if reached else "no: 0 of 2" for reached in REACHED]
    verdicts[1] = "no: 1 of 2"
    assert [row.split(" | ")[-1].removesuffix(" |") for row in rows] == [*verdicts, "yes", "no", "yes", "no"]
    assert rows[1] == "| mIoU by text, both heads | 0.7 | 0.710 / 0.690 | no: 1 of 2 |"
    assert len(floors.format_floors({"a": of_model, "b": of_model}, None).splitlines()) == 2 + 2 * len(floors.FLOORS)


@pytest.mark.slow
def test_the_command_evaluates_the_shipped_student(tmp_path, monkeypatch, capsys):
    (tmp_path / "report.json").write_text(json.dumps({"demo": DEMO}))
    monkeypatch.setattr(floors, "SCENE_SEEDS", (101,))
    options = ["--fraction", "0.05", "--output_dir", str(tmp_path), "--demo", str(tmp_path / "report.json")]
    monkeypatch.setattr(sys, "argv", ["floors", *options])
    floors.main()
    table = (tmp_path / "floors.md").read_text()
    assert table in capsys.readouterr().out
    rows = table.splitlines()[2:]
    assert len(rows) == len(floors.FLOORS) + len(floors.DEMO_FLOORS)
    assert rows[8].endswith("| yes |")  # masks from boxes are those of SAM
