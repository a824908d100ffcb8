"""Names of models on the command line: folders, repositories on a local server in place of the Hub, and the cache."""

import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError

from samclip_cli import CommandError
from samclip_cli.models import check_model
from samclip_hf import miniature

from ..loopback_hub import Hub, Repository

NOWHERE = "http://127.0.0.1:9"  # the discard port, where nothing listens
CONFIG, WEIGHTS = {"config.json": b"{}"}, {"model.safetensors": b""}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty working directory, an empty cache, and no connection."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    set_address(monkeypatch, NOWHERE)
    return tmp_path


def set_address(monkeypatch, address: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")


def error(name: str) -> str:
    with pytest.raises(CommandError) as raised:
        check_model(name, "--clip_teacher")
    message = str(raised.value)
    assert message.startswith(f"--clip_teacher {name or repr(name)}") and "\n" not in message
    return message


@pytest.mark.parametrize(
    "name", ["/no/such", "./runs", "../runs", "runs/", "runs/stage3/last", "~/model", "my model", ""]
)
def test_a_missing_folder_is_called_a_missing_folder(name):
    assert error(name).endswith(": no such folder.")


def test_a_folder_needs_a_configuration(folder):
    Path("runs/stage3").mkdir(parents=True)
    assert "the folder contains no model" in error("runs/stage3")
    Path("runs/stage3/config.json").write_text("{}")
    check_model("runs/stage3")
    assert "is a file" in error("runs/stage3/config.json")


@pytest.mark.parametrize("is_offline", [False, True])
def test_without_a_connection_a_repository_must_be_in_the_cache(monkeypatch, capsys, is_offline):
    with Hub() as hub:
        set_address(monkeypatch, hub.address)
        hub.repositories["me/model"] = Repository(private=False)
        hub.repositories["me/model"].commit("main", CONFIG | WEIGHTS)
        check_model("me/model")
        for names in ([], ["config.json"], ["config.json", "model.safetensors"]):
            set_address(monkeypatch, hub.address)
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
            for name in names:
                hf_hub_download("me/model", name)
            set_address(monkeypatch, NOWHERE)
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", is_offline)
            start = time.monotonic()
            if names == ["config.json"]:
                check_model("me/model", needs_weights=False)
                monkeypatch.setattr(constants, "HF_HUB_OFFLINE", is_offline)
                capsys.readouterr()
            if len(names) < 2:
                reason = "HF_HUB_OFFLINE is set" if is_offline else "the Hub cannot be reached"
                assert reason in error("me/model")
            else:
                check_model("me/model")
                assert constants.HF_HUB_OFFLINE
                assert ("models are read from the cache" in capsys.readouterr().err) == (not is_offline)
            # huggingface_hub repeats a request for a file that is not in the cache for 23 seconds.
            with pytest.raises(LocalEntryNotFoundError):
                hf_hub_download("me/model", "processor_config.json", local_files_only=len(names) < 2)
            assert time.monotonic() - start < 1


def test_a_repository_on_the_hub_must_exist_and_contain_a_model(monkeypatch):
    with Hub() as hub:
        set_address(monkeypatch, hub.address)
        hub.repositories["me/data"] = Repository(private=False)
        hub.repositories["me/data"].commit("main", {})
        assert "the repository contains no model" in error("me/data")
        hub.repositories["me/hidden"] = Repository(private=True)
        hub.repositories["me/hidden"].commit("main", CONFIG)
        for name in ("me/hidden", "me/other"):
            assert "no such folder, and no such repository on the Hub" in error(name)


def test_the_shipped_models_pass_without_importing_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for path in (miniature.checkpoint(), miniature.sam_teacher(), miniature.clip_teacher()):
        check_model(path)
