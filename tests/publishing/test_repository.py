"""The published folder and its upload, with the real client and a local server in place of the Hub."""

import filecmp
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from samclip_hf import SamClipForImageSegmentation, SamClipModel, SamClipProcessor, miniature
from samclip_hf.evaluation import load_adapter
from samclip_hf.publishing import PublishingError, build_repository, create_model_card, prepare_push, push, verify

from ..loopback_hub import Repository


class TestFolder:
    def test_weights_have_the_requested_dtype_and_shard_size(self, tmp_path):
        build_repository(miniature.checkpoint(), tmp_path / "new", "bfloat16", "2MB")
        files = list((tmp_path / "new").glob("*.safetensors"))
        assert len(files) > 1
        tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
        assert {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()} == {torch.bfloat16}
        assert SamClipForImageSegmentation.from_pretrained(tmp_path / "new").dtype == torch.bfloat16

    def test_an_invalid_shard_size_raises(self, tmp_path):
        with pytest.raises(PublishingError, match="cannot be saved in shards of '5 elephants'"):
            build_repository(miniature.checkpoint(), tmp_path / "new", max_shard_size="5 elephants")

    def test_other_models_and_folders_that_are_not_empty_raise(self, tmp_path, folder):
        for source in (miniature.sam_teacher(), tmp_path / "nowhere"):
            with pytest.raises(PublishingError, match="cannot be loaded as a SAM-CLIP with its processor"):
                build_repository(source, tmp_path / "new")
        with pytest.raises(PublishingError, match="is not empty"):
            build_repository(miniature.checkpoint(), folder)

    def test_missing_weights_raise(self, tmp_path):
        model = SamClipModel.from_pretrained(miniature.checkpoint())
        state = {name: value for name, value in model.state_dict().items() if not name.startswith("clip_head.mlp")}
        model.save_pretrained(tmp_path / "incomplete", state_dict=state)
        SamClipProcessor.from_pretrained(miniature.checkpoint()).save_pretrained(tmp_path / "incomplete")
        with pytest.raises(PublishingError, match=r"lacks weights, which would be random: clip_head\.mlp"):
            build_repository(tmp_path / "incomplete", tmp_path / "new")

    @pytest.mark.slow
    def test_a_checkpoint_without_a_text_tower_is_published(self, tmp_path, image):
        model = SamClipForImageSegmentation.from_pretrained(miniature.checkpoint()).drop_text_tower()
        model.save_pretrained(tmp_path / "small")
        SamClipProcessor.from_pretrained(miniature.checkpoint()).save_pretrained(tmp_path / "small")
        build_repository(tmp_path / "small", tmp_path / "new")
        assert verify(tmp_path / "new", image).keys() == {"pred_masks", "iou_scores"}
        assert "zero-shot" not in create_model_card(tmp_path / "new", "me/small").text


@pytest.mark.slow
class TestSavedAgain:
    """A checkpoint that was loaded from a published folder, by the folder's own code, and saved."""

    @pytest.fixture(scope="class")
    @classmethod
    def saved(cls, folder, tmp_path_factory) -> Path:
        saved = tmp_path_factory.mktemp("saved") / "model"
        code = """
import sys; sys.modules["samclip_hf"] = None
from transformers import AutoModelForImageSegmentation, AutoProcessor
for auto_class in (AutoModelForImageSegmentation, AutoProcessor):
    auto_class.from_pretrained(sys.argv[1], trust_remote_code=True).save_pretrained(sys.argv[2])
"""
        environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path_factory.mktemp("modules"))}
        run = subprocess.run(
            [sys.executable, "-c", code, str(folder), str(saved)], env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        return saved

    def test_it_has_the_identity_of_the_original(self, folder, saved):
        identities = {load_adapter(str(path)).identity for path in (miniature.checkpoint(), folder, saved)}
        assert len(identities) == 1

    def test_it_is_published_as_the_original(self, folder, saved, tmp_path):
        build_repository(saved, tmp_path / "new")
        names = sorted(path.name for path in folder.iterdir())
        assert sorted(path.name for path in (tmp_path / "new").iterdir()) == names
        _, differing, unreadable = filecmp.cmpfiles(folder, tmp_path / "new", names, shallow=False)
        assert unreadable == [] and set(differing) <= {"config.json", "processor_config.json", "tokenizer_config.json"}
        for name in differing:  # in the order of their entries
            new, original = (json.loads((path / name).read_text()) for path in (tmp_path / "new", folder))
            if name == "tokenizer_config.json":
                del new["auto_map"]  # transformers writes the processor's, which has no effect there
            assert new == original

    def test_the_trainer_pushes_it_with_the_code(self, folder, saved, tmp_path):
        output = shutil.copytree(saved, tmp_path / "output")
        prepare_push(output, "me/merged")
        for name in ("config.json", "processor_config.json"):
            own, original = (json.loads((path / name).read_text()) for path in (output, folder))
            assert own == original
        assert (output / "modeling_samclip.py").read_bytes() == (folder / "modeling_samclip.py").read_bytes()


class TestPush:
    @pytest.mark.slow
    def test_a_pushed_repository_loads_by_name_without_the_package(self, hub, folder, tmp_path):
        address = push(folder, "merged", private=True)
        assert address.startswith(f"{hub.address}/me/merged/commit/")
        assert hub.repositories["me/merged"].private
        code = """
import sys; sys.modules["samclip_hf"] = None
from transformers import AutoBackbone, AutoModel, AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module
model = AutoModel.from_pretrained("me/merged", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("me/merged", trust_remote_code=True)
config_class = get_class_from_dynamic_module(model.config.auto_map["SamClipVisionConfig"], "me/merged")
config = config_class.from_pretrained("me/merged")
backbone = AutoBackbone.from_pretrained("me/merged", config=config, trust_remote_code=True)
weight = model.clip_head.mlp.fc1.weight.double().sum().item()
print(type(model).__name__, type(processor).__name__, type(backbone).__name__, weight)
"""
        environment = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "elsewhere"), "HF_TOKEN": "hf_read"}
        run = subprocess.run(
            [sys.executable, "-c", code], env=environment | {"HF_HUB_DISABLE_XET": "1"}, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        own = SamClipModel.from_pretrained(miniature.checkpoint()).clip_head.mlp.fc1.weight.double().sum().item()
        assert run.stdout.split() == ["SamClipModel", "SamClipProcessor", "SamClipBackbone", str(own)]

    def test_an_update_uploads_only_changed_files(self, hub, copy):
        push(copy, "lab/merged")
        assert sum(hub.uploads.values()) == 1
        with pytest.raises(PublishingError, match=r"lab/merged exists and contains \d+ files\. Pass --update"):
            push(copy, "lab/merged")
        (copy / "README.md").write_text("changed")
        push(copy, "lab/merged", update=True)
        assert sum(hub.uploads.values()) == 1
        repository = hub.repositories["lab/merged"]
        assert repository.commits[repository.branches["main"]]["README.md"] == b"changed"

    def test_a_branch_and_a_pull_request_leave_main_unchanged(self, hub, copy):
        push(copy, "merged")
        repository = hub.repositories["me/merged"]
        main = repository.branches["main"]
        (copy / "README.md").write_text("changed")
        push(copy, "merged", revision="next")
        assert push(copy, "merged", create_pr=True).endswith("/discussions/1")
        assert repository.branches["main"] == main
        for branch in ("next", "refs/pr/1"):
            assert repository.commits[repository.branches[branch]]["README.md"] == b"changed"
        with pytest.raises(PublishingError, match="the repository me/other does not exist"):
            push(copy, "other", create_pr=True)

    def test_a_failed_upload_leaves_the_repository_unchanged_and_can_be_repeated(self, hub, folder, monkeypatch):
        monkeypatch.setattr("time.sleep", lambda _: None)  # between the client's retries
        hub.break_after = 100_000
        with pytest.raises(PublishingError, match=r"failed, and the repository is unchanged.*\nRun the same command"):
            push(folder, "merged")
        repository = hub.repositories["me/merged"]
        assert list(repository.commits[repository.branches["main"]]) == [".gitattributes"]
        hub.break_after = None
        push(folder, "merged")
        assert "model.safetensors" in repository.commits[repository.branches["main"]]

    def test_a_pull_request_needs_no_membership(self, hub, folder):
        repository = hub.repositories["strangers/merged"] = Repository(private=False)
        main = repository.commit("main", {"config.json": b"{}"})
        assert push(folder, "strangers/merged", create_pr=True).endswith("/strangers/merged/discussions/1")
        assert repository.branches["main"] == main
        assert "model.safetensors" in repository.commits[repository.branches["refs/pr/1"]]

    def test_a_fine_grained_token_without_permission_raises(self, hub, folder):
        """The permissions of a fine-grained token are not known before the Hub rejects a request."""
        hub.tokens["hf_fine"] = "fineGrained"
        with pytest.raises(PublishingError, match=r"no write access to me/merged\. A fine-grained token needs"):
            push(folder, "merged", token="hf_fine")
        assert not hub.repositories

    @pytest.mark.parametrize(
        ("token", "repo_id", "message"),
        [
            ("hf_write", "library/merged", "me has read access only in library"),
            ("hf_read", "merged", "The token of me is read-only"),
            ("hf_unknown", "merged", "The Hub rejects the token"),
            ("", "merged", "No token found"),
            ("hf_write", "strangers/merged", "me is not a member of strangers"),
        ],
    )
    def test_tokens_and_owners_without_write_access_raise(self, hub, folder, monkeypatch, token, repo_id, message):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(PublishingError, match=message):
            push(folder, repo_id)
        assert not hub.repositories


def test_files_of_a_training_output_are_replaced_in_one_step(copy, tmp_path):
    """A second hard link keeps the old content if a file is replaced, and changes if it is written in place."""
    shutil.copy(Path(miniature.checkpoint()) / "provenance.json", copy)
    names = ["config.json", "processor_config.json", "provenance.json", "README.md", "configuration_samclip.py"]
    (copy / "README.md").write_text("old")
    before = {}
    for name in names:
        (tmp_path / name).hardlink_to(copy / name)
        before[name] = (tmp_path / name).read_bytes()
    prepare_push(copy, "me/model")
    for name in names:
        assert (tmp_path / name).read_bytes() == before[name] and not (tmp_path / name).samefile(copy / name)
    assert json.loads((copy / "config.json").read_text())["auto_map"]
