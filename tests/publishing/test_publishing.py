"""From a training output to a repository and back, through the real client and a stand-in for the Hub."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from samclip_cli import publish as publish_command
from samclip_hf import SamClipForImageSegmentation, SamClipModel, SamClipProcessor, miniature
from samclip_hf.distillation import SamClipTrainingArguments, provenance
from samclip_hf.miniature.scenes import render
from samclip_hf.publishing import repository as publishing
from samclip_hf.publishing.repository import (
    PublishingError,
    build_repository,
    card,
    draw_example,
    publish_provenance,
    push,
    read_results,
    verify,
)
from samclip_hf.publishing.verification import MODELS, use

from ..loopback_hub import Hub, Repository

PUBLISH = Path(__file__).parents[2] / "training" / "publish.py"
STAGES = [
    {
        "stage": 2,
        "teachers": {"sam_teacher": "facebook/sam-vit-base", "clip_teacher": "openai/clip-vit-base-patch16"},
        "commits": {"sam_teacher": "abc"},
        "arguments": {
            **{"clip_data": ["photos/*.tar"], "clip_resolutions": [224, 448], "sam_data": ["sa1b"], "seed": 3},
            **{"sam_loss_weight": 10.0, "learning_rate": 4e-5},
        },
        **{"steps": 1000, "images_seen": 2048000, "seconds": 7200.0, "processes": 8, "device": "A100"},
    }
]
RESULTS = {
    "command": "training/evaluate.py --model runs/stage3",
    "environment": {"torch": "2.14.1"},
    "tasks": {
        "classification:imagenet@336": {
            "protocol": {"size": 336, "templates": 80},
            "models": {"stage3": {"metrics": {"top1": 0.7239}, "num_samples": 50000}},
        },
        "semantic:voc21": {
            "protocol": {"size": 448},
            "models": {
                "stage3": {
                    **{"metrics": {"mean_iou": 0.6, "iou: cat": 0.9}, "num_samples": 1449, "dtype": "bfloat16"},
                    **{"command": "training/evaluate.py --dtype bfloat16", "environment": {"torch": "2.12.0"}},
                }
            },
        },
    },
}


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(render(seed=0, index=8).image)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "repository"
    build_repository(miniature.checkpoint(), folder)
    return folder


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    """To be spoilt."""
    return shutil.copytree(folder, tmp_path / "copy")


class TestFolder:
    def test_it_loads_without_the_package_and_gives_the_same(self, folder, picture):
        differences = verify(folder, picture)
        assert differences.keys() == {"pred_masks", "iou_scores", "logits_per_image", "image_embeds"}
        assert max(differences.values()) < 1e-5

    def test_the_proof_uses_everything(self, folder, picture):
        results, _ = use(str(folder), picture)
        assert {name: results[name] for name in MODELS} == MODELS
        pipelines = results.keys() - MODELS.keys()
        assert pipelines == {
            *("image-segmentation", "zero-shot-image-segmentation", "zero-shot-image-classification"),
            *("zero-shot-object-detection", "mask-generation", "image-feature-extraction"),
        }
        assert all(results[name] for name in pipelines)

    def test_code_that_gives_something_else_is_found(self, copy, picture):
        code = copy / "modeling_samclip.py"
        assert "F.normalize(pooled, dim=-1)" in code.read_text()
        code.write_text(
            code.read_text().replace("F.normalize(pooled, dim=-1)", "F.normalize(pooled, dim=-1) * 1.1", 1)
        )
        with pytest.raises(PublishingError, match=r"zero-shot-image-classification gives .* from the folder's code"):
            verify(copy, picture)

    def test_code_that_does_not_load_is_found(self, copy, picture):
        (copy / "processing_samclip.py").write_text("import samclip_hf")
        with pytest.raises(PublishingError, match=r"does not load without the package:[\s\S]*samclip_hf"):
            verify(copy, picture)

    def test_weights_take_the_type_and_the_shards_that_are_asked_for(self, tmp_path):
        build_repository(miniature.checkpoint(), tmp_path / "new", "bfloat16", "2MB")
        files = list((tmp_path / "new").glob("*.safetensors"))
        assert len(files) > 1
        tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
        assert {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()} == {torch.bfloat16}
        assert SamClipForImageSegmentation.from_pretrained(tmp_path / "new").dtype == torch.bfloat16

    def test_a_size_of_shards_that_is_none_is_refused(self, tmp_path):
        with pytest.raises(PublishingError, match="cannot be saved in shards of '5 elephants'"):
            build_repository(miniature.checkpoint(), tmp_path / "new", max_shard_size="5 elephants")

    def test_what_is_no_samclip_is_refused(self, tmp_path, folder):
        for source in (miniature.sam_teacher(), tmp_path / "nowhere"):
            with pytest.raises(PublishingError, match="cannot be loaded as a SAM-CLIP with its processor"):
                build_repository(source, tmp_path / "new")
        with pytest.raises(PublishingError, match="is not empty"):
            build_repository(miniature.checkpoint(), folder)

    def test_weights_that_are_missing_are_not_made_up(self, tmp_path):
        model = SamClipModel.from_pretrained(miniature.checkpoint())
        state = {name: value for name, value in model.state_dict().items() if not name.startswith("clip_head.mlp")}
        model.save_pretrained(tmp_path / "lacking", state_dict=state)
        SamClipProcessor.from_pretrained(miniature.checkpoint()).save_pretrained(tmp_path / "lacking")
        with pytest.raises(PublishingError, match=r"lacks weights: \['clip_head\.mlp"):
            build_repository(tmp_path / "lacking", tmp_path / "new")

    def test_a_checkpoint_for_its_own_vocabulary_alone(self, tmp_path, picture):
        model = SamClipForImageSegmentation.from_pretrained(miniature.checkpoint()).drop_text_tower()
        model.save_pretrained(tmp_path / "small")
        SamClipProcessor.from_pretrained(miniature.checkpoint()).save_pretrained(tmp_path / "small")
        build_repository(tmp_path / "small", tmp_path / "new")
        assert verify(tmp_path / "new", picture).keys() == {"pred_masks", "iou_scores"}
        assert "by_text" not in card(tmp_path / "new", "me/small").content


class TestCard:
    def test_it_tells_what_is_on_record(self, folder, tmp_path):
        made = card(folder, "lab/merged", STAGES, RESULTS, "stage3", {"facebook/sam-vit-base": "apache-2.0"}, True)
        text = made.content
        for said in (
            "SAM `facebook/sam-vit-base` at commit `abc`, licence apache-2.0",
            "CLIP `openai/clip-vit-base-patch16`, licence not on record",
            "**Stage 2:** 1000 steps, 2,048,000 images, 2.00 hours on 8 x A100",
            "| classification:imagenet@336 | top1 | 0.724 |",
            "Measured by `training/evaluate.py --model runs/stage3` with torch 2.14.1.",
            "Measured by `training/evaluate.py --dtype bfloat16` with torch 2.12.0.",
            "- dtype: bfloat16",
            "- templates: 80",
            "(example.png)",
            'model="lab/merged"',
            "title   = {SAM-CLIP: Merging",
        ):
            assert said in text, said
        assert "iou: cat" not in text and "{{" not in text and "None" not in text
        made.save(tmp_path / "README.md")
        data = ModelCard.load(tmp_path / "README.md").data
        assert data.base_model == ["facebook/sam-vit-base", "openai/clip-vit-base-patch16"]
        by_type = {result.metric_type: result for result in data.eval_results}
        assert by_type["top1"].metric_value == pytest.approx(0.7239, abs=1e-4)
        assert by_type["top1"].task_type == "zero-shot-image-classification"

    def test_teachers_are_those_that_taught(self, folder):
        """Stage 3 asks no SAM, whatever its arguments say, and stage 2 alone looks up SAM's commit."""
        clip = "openai/clip-vit-base-patch16"
        arguments = STAGES[0]["arguments"]
        first = {"stage": 1, "commits": {"clip_teacher": "def"}, "arguments": arguments | {"sam_student": "lab/sam-b"}}
        last = {"stage": 3, "teachers": {"sam_teacher": "miniature", "clip_teacher": clip}, "commits": {}}
        stages = [STAGES[0] | first, STAGES[0], STAGES[0] | last]
        assert provenance.teachers(stages) == {
            ("SAM as the start", "lab/sam-b"): None,
            ("SAM", "facebook/sam-vit-base"): "abc",
            ("CLIP", clip): "def",
        }
        made = card(folder, "lab/merged", stages)
        assert made.data.base_model == ["lab/sam-b", "facebook/sam-vit-base", clip]
        assert "SAM `facebook/sam-vit-base` at commit `abc`" in made.content
        assert "`miniature`" not in made.content and "knows nothing of photographs" not in made.content

    def test_the_shipped_miniature_is_on_record(self, folder, tmp_path):
        stages = provenance.read(miniature.checkpoint())
        for stage in stages:
            config = PUBLISH.parent / "configs" / f"miniature_stage{stage['stage']}.yaml"
            recipe = yaml.safe_load(config.read_text())
            for name in ("dataloader_num_workers", "logging_steps", "save_steps", "report_to"):
                recipe.pop(name)
            assert stage["arguments"] == recipe | {"seed": 42}
            assert stage["steps"] == recipe["max_steps"]
        stages, licenses = publish_provenance(miniature.checkpoint(), tmp_path)
        made = card(folder, "me/miniature", stages, licenses=licenses)
        text = made.content
        assert made.data.license == "apache-2.0"
        assert "**Stage 3:** 400 steps, 13,864 images" in text and "knows nothing of photographs" in text
        assert "SAM `miniature`, licence apache-2.0; CLIP `miniature`" in text

    def test_folders_of_the_machine_are_not_published(self, tmp_path):
        own = tmp_path / "home" / "my_sam"
        own.mkdir(parents=True)
        (own / "README.md").write_text("---\nlicense: mit\n---\n")
        stage = STAGES[0] | {"teachers": {"sam_teacher": str(own), "clip_teacher": miniature.clip_teacher()}}
        stage["arguments"] = stage["arguments"] | {"sam_data": [str(tmp_path / "sa1b")], "clip_data": ["photos/*.tar"]}
        (tmp_path / provenance.FILE_NAME).write_text(json.dumps({"stages": [stage]}))
        (tmp_path / "out").mkdir()
        stages, licenses = publish_provenance(tmp_path, tmp_path / "out")
        assert stages[0]["teachers"] == {"sam_teacher": "my_sam", "clip_teacher": "miniature"}
        assert licenses == {"my_sam": "mit", "miniature": "apache-2.0"}
        assert (stages[0]["arguments"]["sam_data"], stages[0]["arguments"]["clip_data"]) == (
            ["sa1b"],
            ["photos/*.tar"],
        )
        assert str(tmp_path) not in (tmp_path / "out" / provenance.FILE_NAME).read_text()

    @pytest.mark.parametrize(
        ("of_clip", "asked", "expected"),
        [("mit", None, "apache-2.0"), ("cc-by-nc-4.0", None, "other"), (None, None, "other"), (None, "mit", "mit")],
    )
    def test_its_licence_is_what_the_teachers_allow(self, folder, of_clip, asked, expected):
        licenses = {"facebook/sam-vit-base": "apache-2.0", "openai/clip-vit-base-patch16": of_clip}
        made = card(folder, "me/merged", STAGES, licenses={k: v for k, v in licenses.items() if v}, license=asked)
        assert made.data.license == expected

    def test_it_says_what_is_not_on_record(self, folder):
        text = card(folder, "me/merged").content
        assert "Not on record: this folder came without `provenance.json`" in text
        assert "None were measured for this card" in text and "example.png" not in text

    def test_results_of_another_model_are_refused(self, folder, tmp_path):
        with pytest.raises(PublishingError, match="The results are of stage3: say by which"):
            card(folder, "me/merged", results=RESULTS, results_name="stage2")
        (tmp_path / "other.json").write_text("{}")
        with pytest.raises(PublishingError, match=r"is no results\.json"):
            read_results(tmp_path / "other.json")

    def test_its_python_runs(self, folder, tmp_path, picture, monkeypatch):
        monkeypatch.chdir(tmp_path)
        picture.resize((400, 300)).save("photo.jpg")
        code = card(folder, str(folder)).content.split("```python\n")[1].split("```")[0]
        names: dict = {}
        exec(code, names)
        assert names["outputs"].pred_masks is not None and names["outputs"].logits_per_image.shape == (1, 2)

    def test_an_example_is_drawn(self, folder, tmp_path, picture):
        draw_example(folder, picture, tmp_path / "example.png")
        assert Image.open(tmp_path / "example.png").size == (3 * 256, 256)

    def test_an_example_of_a_large_picture_is_not_large(self, folder, tmp_path, picture):
        draw_example(folder, picture.resize((4000, 2000)), tmp_path / "example.png")
        assert Image.open(tmp_path / "example.png").size == (3 * 1024, 512)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with Hub() as hub:
        for name, value in {"HF_TOKEN": "hf_write", "HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr(publishing, "HfApi", lambda token=None: publishing_api(hub, token))
        yield hub


def publishing_api(hub: Hub, token):
    from huggingface_hub import HfApi

    return HfApi(endpoint=hub.address, token=token)


class TestHub:
    def test_a_stranger_loads_what_was_pushed_by_its_name(self, hub, folder, tmp_path):
        address = push(folder, "merged", private=True)
        assert address.startswith(f"{hub.address}/me/merged/commit/")
        assert hub.repositories["me/merged"].private
        code = """
import sys; sys.modules["samclip_hf"] = None
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained("me/merged", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("me/merged", trust_remote_code=True)
print(type(model).__name__, type(processor).__name__, model.clip_head.mlp.fc1.weight.double().sum().item())
"""
        environment = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "elsewhere"), "HF_TOKEN": "hf_read"}
        run = subprocess.run(
            [sys.executable, "-c", code], env=environment | {"HF_HUB_DISABLE_XET": "1"}, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        own = SamClipModel.from_pretrained(miniature.checkpoint()).clip_head.mlp.fc1.weight.double().sum().item()
        assert run.stdout.split() == ["SamClipModel", "SamClipProcessor", str(own)]

    def test_only_what_changed_is_sent_again(self, hub, copy):
        push(copy, "lab/merged")
        assert sum(hub.uploads.values()) == 1
        with pytest.raises(PublishingError, match=r"lab/merged exists and holds \d+ files: say --update"):
            push(copy, "lab/merged")
        (copy / "README.md").write_text("changed")
        push(copy, "lab/merged", update=True)
        assert sum(hub.uploads.values()) == 1  # the weights are there
        repository = hub.repositories["lab/merged"]
        assert repository.commits[repository.branches["main"]]["README.md"] == b"changed"

    def test_a_branch_and_a_pull_request_leave_main_alone(self, hub, copy):
        push(copy, "merged")
        repository = hub.repositories["me/merged"]
        main = repository.branches["main"]
        (copy / "README.md").write_text("changed")
        push(copy, "merged", revision="next")
        assert push(copy, "merged", create_pr=True).endswith("/discussions/1")
        assert repository.branches["main"] == main
        for branch in ("next", "refs/pr/1"):
            assert repository.commits[repository.branches[branch]]["README.md"] == b"changed"
        with pytest.raises(PublishingError, match="no repository me/other that a pull request"):
            push(copy, "other", create_pr=True)

    def test_a_connection_that_breaks_leaves_nothing_half_done(self, hub, folder, monkeypatch):
        monkeypatch.setattr("time.sleep", lambda _: None)  # between the client's own tries
        hub.break_after = 100_000
        with pytest.raises(PublishingError, match=r"did not finish.*\nThe same command sends what is missing"):
            push(folder, "merged")
        repository = hub.repositories["me/merged"]
        assert list(repository.commits[repository.branches["main"]]) == [".gitattributes"]
        hub.break_after = None
        push(folder, "merged")
        assert "model.safetensors" in repository.commits[repository.branches["main"]]

    def test_a_pull_request_may_go_to_strangers(self, hub, folder):
        repository = hub.repositories["strangers/merged"] = Repository(private=False)
        main = repository.commit("main", {"config.json": b"{}"})
        assert push(folder, "strangers/merged", create_pr=True).endswith("/strangers/merged/discussions/1")
        assert repository.branches["main"] == main
        assert "model.safetensors" in repository.commits[repository.branches["refs/pr/1"]]

    def test_a_token_for_other_repositories_is_told_so(self, hub, folder):
        """A fine-grained one, of whose permissions nothing is known before it is refused."""
        hub.tokens["hf_fine"] = "fineGrained"
        with pytest.raises(PublishingError, match="The token may not write to me/merged; a fine-grained one needs"):
            push(folder, "merged", token="hf_fine")
        assert not hub.repositories

    @pytest.mark.parametrize(
        ("token", "repo_id", "sentence"),
        [
            ("hf_write", "library/merged", "me may only read in the organisation library"),
            ("hf_read", "merged", "The token of me may only read"),
            ("hf_unknown", "merged", "The Hub does not accept the token"),
            ("", "merged", "There is no token"),
            ("hf_write", "strangers/merged", "me is not of the organisation strangers"),
        ],
    )
    def test_tokens_and_owners_that_may_not(self, hub, folder, monkeypatch, token, repo_id, sentence):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(PublishingError, match=sentence):
            push(folder, repo_id)
        assert not hub.repositories


@pytest.fixture
def publish():
    return publish_command.main


class TestCommand:
    @pytest.fixture
    def command(self, tmp_path):
        (tmp_path / "results.json").write_text(json.dumps(RESULTS))
        return ["miniature", "merged", "--results", str(tmp_path / "results.json"), "--results_name", "stage3"]

    def test_it_proves_and_pushes(self, hub, command, tmp_path):
        options = ["--folder", tmp_path / "seen"]
        run = subprocess.run([sys.executable, PUBLISH, *command, *options], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert "pred_masks: differs by" in run.stdout and "Published: " in run.stdout
        repository = hub.repositories["me/merged"]
        published = repository.commits[repository.branches["main"]]
        assert {"README.md", "example.png", "modeling_samclip.py"} <= published.keys()
        assert 'model="me/merged"' in published["README.md"].decode()
        assert published.keys() - {".gitattributes"} == {path.name for path in (tmp_path / "seen").iterdir()}

    def test_a_dry_run_asks_for_no_token(self, hub, publish, command, monkeypatch, capsys):
        monkeypatch.setenv("HF_TOKEN", "")
        publish([*command, "--dry-run"])
        assert "Proven, and not pushed" in capsys.readouterr().out and not hub.repositories

    def test_what_is_wrong_is_told_before_any_work(self, hub, folder, publish, command, tmp_path, capsys):
        push(folder, "merged")
        for wrong, sentence in (
            ([], "me/merged exists and holds"),
            (["--folder", str(tmp_path)], f"{tmp_path} exists"),
            (["--results", str(tmp_path / "none.json")], "none.json cannot be read"),
            (["--update", "--example", str(PUBLISH)], "cannot identify image file"),
            (["--update", "--private"], "me/merged exists and is public"),
            (["--results_name", "stage2"], "The results are of stage3: say by which"),
        ):
            with pytest.raises(SystemExit, match=rf"Nothing was published\. .*{re.escape(sentence)}"):
                publish([*command, *wrong])
        for wrong, sentence in (
            (["miniature", "a/b/c"], "a/b/c"),
            (["miniature", "merged", "--results_name", "stage3"], "--results_name is of --results"),
        ):
            with pytest.raises(SystemExit, match=rf"Nothing was published\. .*{sentence}"):
                publish([*wrong, "--dry-run"])
        assert "Putting together" not in capsys.readouterr().out


def test_the_trainer_pushes(hub, tmp_path):
    """Checkpoints on the way, code and card at the end."""
    config = PUBLISH.parent / "configs" / "miniature_stage1.yaml"
    options = "--max_steps 2 --save_steps 1 --clip_batch_size 2 --dataloader_num_workers 0 --report_to none"
    options += " --push_to_hub true --hub_model_id lab/merged --hub_always_push true --hub_private_repo true"
    command = [sys.executable, PUBLISH.parent / "train.py", config, "--output_dir", tmp_path / "run"]
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


def test_a_token_is_not_pushed_with_the_arguments(tmp_path):
    with pytest.raises(ValueError, match="hub_token would be published"):
        SamClipTrainingArguments(output_dir=str(tmp_path), max_steps=1, push_to_hub=True, hub_token="hf_write")
