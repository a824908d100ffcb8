"""`samclip publish`, and the push of the trainer, with a local server in place of the Hub."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from samclip_cli import CommandError, evaluate, publish
from samclip_hf import SamClipForImageSegmentation, SamClipProcessor, miniature
from samclip_hf.distillation import SamClipTrainingArguments
from samclip_hf.evaluation import load_adapter
from samclip_hf.publishing import push

from .records import RECIPES, RESULTS

TRAINING = Path(__file__).parents[2] / "training"


class TestCommand:
    @pytest.fixture
    def arguments(self, tmp_path):
        weights = load_adapter(miniature.checkpoint()).weights
        (tmp_path / "results.json").write_text(json.dumps(RESULTS).replace("0a1b2c3d", weights))
        return ["miniature", "merged", "--results", str(tmp_path / "results.json"), "--results_name", "stage3"]

    def test_it_verifies_and_pushes(self, hub, arguments, tmp_path, capsys, monkeypatch):
        verified = []

        def verify(folder, image):  # is tested in test_verification.py
            verified.extend(path.name for path in folder.iterdir())
            return {"pred_masks": 0.0}

        monkeypatch.setattr("samclip_hf.publishing.verify", verify)
        publish.run([*arguments, "--folder", str(tmp_path / "folder")])
        output = capsys.readouterr().out
        assert "pred_masks: largest difference" in output and "Published: " in output
        repository = hub.repositories["me/merged"]
        published = repository.commits[repository.branches["main"]]
        assert {"README.md", "example.png", "modeling_samclip.py"} <= published.keys()
        assert {"modeling_samclip.py", "model.safetensors"} <= set(verified) <= published.keys()
        assert 'model="me/merged"' in published["README.md"].decode()
        assert published.keys() - {".gitattributes"} == {path.name for path in (tmp_path / "folder").iterdir()}

    @pytest.mark.parametrize("option", ["--dry_run", "--dry-run"])
    def test_a_dry_run_needs_no_token(self, hub, arguments, option, monkeypatch, capsys):
        monkeypatch.setenv("HF_TOKEN", "")
        monkeypatch.setattr("samclip_hf.publishing.verify", lambda folder, image: {"pred_masks": 0.0})
        publish.run([*arguments, option])
        assert "Nothing was uploaded" in capsys.readouterr().out and not hub.repositories

    def test_invalid_arguments_raise_before_the_folder_is_built(self, hub, folder, arguments, tmp_path, capsys):
        push(folder, "merged")
        for options, message in (
            ([], "me/merged exists and contains"),
            (["--results", str(tmp_path / "none.json")], "none.json"),
            (["--results", __file__], "is not a results.json of `samclip evaluate`"),
            (["--update", "--example", __file__], "cannot identify image file"),
            (["--update", "--private"], "me/merged exists and is public"),
            (["--results_name", "stage2"], "No results for 'stage2'"),
        ):
            with pytest.raises(SystemExit, match=rf"Nothing was published\. .*{re.escape(message)}"):
                publish.run([*arguments, *options])
        for options, message in (
            (["miniature", "a/b/c"], "a/b/c"),
            (["miniature", "merged", "--results_name", "stage3"], "--results_name requires --results"),
        ):
            with pytest.raises(SystemExit, match=rf"Nothing was published\. .*{message}"):
                publish.run([*options, "--dry_run"])
        assert "Building" not in capsys.readouterr().out


def test_results_of_a_pair_are_those_of_its_unmerged_model_and_can_be_published(hub, tmp_path, monkeypatch, capsys):
    sam, clip, folder, out = miniature.sam_teacher(), miniature.clip_teacher(), tmp_path / "unmerged", tmp_path / "out"
    SamClipForImageSegmentation.from_teachers(sam, clip, merged=False).save_pretrained(folder)
    SamClipProcessor.from_teachers(sam, clip).save_pretrained(folder)
    tasks = ["semantic:miniature@96", "linear-probe", "--share", "0.02", "--output_dir", str(out)]
    evaluate.run(["--model", str(folder), f"{sam}+{clip}", "--task", *tasks])
    assert "sam+clip (Unmerged) does not support and skips linear-probe:miniature." in capsys.readouterr().out
    content = json.loads((out / "results.json").read_text())
    (task,) = content["tasks"].values()
    saved, pair = task["models"]["unmerged"], task["models"]["sam+clip"]
    for key in ("kind", "weights", "identity", "settings", "metrics"):
        assert saved[key] == pair[key]
    assert saved["kind"] == "UnmergedAdapter" and f"weights {saved['weights']}" in (out / "results.md").read_text()
    index = (out / "sam+clip-model-index.yaml").read_text()
    assert (
        index.startswith(f"# weights {pair['weights']}")
        and f"value: {round(pair['metrics']['mean_iou'], 4)}\n" in index
    )

    monkeypatch.setattr("samclip_hf.publishing.verify", lambda folder, image: {"pred_masks": 0.0})
    arguments = [str(folder), "me/unmerged", "--results", str(out / "results.json"), "--dry-run"]
    with pytest.raises(
        SystemExit, match=r"several results of these weights\. Pass --results_name with one of: unmerged"
    ):
        publish.run(arguments)
    publish.run([*arguments, "--results_name", "unmerged", "--folder", str(tmp_path / "card")])
    assert f"{pair['metrics']['mean_iou']:.3f}" in (tmp_path / "card" / "README.md").read_text()


def test_wrong_folders_are_errors_at_once(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for arguments, message in (
        ([str(tmp_path / "nowhere")], "MODEL .*nowhere: no such folder"),
        (["miniature", "--folder", str(tmp_path)], "--folder .* exists: pass a new folder"),
        (["miniature", "--folder", str(tmp_path / "link")], "--folder .* exists: pass a new folder"),
        (["miniature", "--folder", f"{__file__}/new"], "--folder .*py is not a folder"),
    ):
        with pytest.raises(CommandError, match=message):
            publish.run([arguments[0], "me/merged", "--dry_run", *arguments[1:]])


@pytest.mark.slow
def test_the_trainer_pushes_checkpoints_and_at_the_end_code_and_card(hub, tmp_path):
    config = RECIPES / "miniature_stage1.yaml"
    options = "--max_steps 2 --save_steps 1 --clip_batch_size 2 --dataloader_num_workers 0 --report_to none"
    options += " --push_to_hub true --hub_model_id lab/merged --hub_always_push true --hub_private_repo true"
    command = [sys.executable, TRAINING / "train.py", config, "--output_dir", tmp_path / "run"]
    run = subprocess.run([*command, *options.split()], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    repository = hub.repositories["lab/merged"]
    assert repository.private
    assert repository.titles[-1] == "End of training" and "Training in progress, step 1" in repository.titles
    published = repository.commits[repository.branches["main"]]
    assert "**Stage 1:** 2 steps" in published["README.md"].decode()
    code = """
import sys; sys.modules["samclip_hf"] = None
from transformers import pipeline
segmenter = pipeline("zero-shot-image-segmentation", model="lab/merged", trust_remote_code=True)
print(type(segmenter.model).__name__)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.strip() == "SamClipForImageSegmentation", run.stderr


def test_a_hub_token_in_the_arguments_raises(tmp_path):
    with pytest.raises(ValueError, match="hub_token is not supported with push_to_hub"):
        SamClipTrainingArguments(output_dir=str(tmp_path), max_steps=1, push_to_hub=True, hub_token="hf_write")
