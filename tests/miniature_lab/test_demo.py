"""The evaluation of the demo, with the shipped student in place of the trained one."""

import json
import shutil
import sys

import pytest
from PIL import Image

from samclip_hf import miniature
from samclip_hf.miniature_lab import commands, demo, report


@pytest.mark.slow
def test_the_report_compares_the_new_and_the_shipped_student_with_both_teachers(tmp_path, monkeypatch):
    def train(title, stage, output_dir, *arguments):
        shutil.copytree(miniature.checkpoint(), output_dir)
        (output_dir / "train_results.json").write_text(json.dumps({"train_images_seen": 8}))

    monkeypatch.setattr(commands, "train", train)
    monkeypatch.setattr(demo, "report_tasks", lambda: report.report_tasks(fraction=0.05))  # 16 scenes
    monkeypatch.setattr(sys, "argv", ["demo", "--output_dir", str(tmp_path)])
    demo.main()
    content = json.loads((tmp_path / "report.json").read_text())
    assert content.keys() == {"seconds", "images_seen", "demo", "shipped"} and content["demo"] == content["shipped"]
    by_text = content["demo"]["semantic_miou"]
    assert by_text.keys() == {
        *("teacher_patches", "clip_head", "both_heads", "both_heads_paper", "cascade", "unmerged"),
    }
    assert by_text["unmerged"] > by_text["cascade"] > by_text["teacher_patches"]
    assert f"| {by_text['unmerged']:.3f} (two encoders) |" in (tmp_path / "report.md").read_text()
    assert Image.open(tmp_path / "figure.png").width > 1000
