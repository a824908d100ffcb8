"""Shared fixtures: a published folder of the miniature, an image, and a local server with the API of the Hub."""

import shutil
from pathlib import Path

import huggingface_hub
import pytest
from PIL import Image

from samclip_hf import miniature
from samclip_hf.miniature.scenes import render
from samclip_hf.publishing import build_repository, repository
from samclip_hf.publishing.verification_script import run_checkpoint

from ..loopback_hub import Hub


@pytest.fixture(scope="session")
def image() -> Image.Image:
    return Image.fromarray(render(seed=0, index=8).image)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "repository"
    build_repository(miniature.checkpoint(), folder)
    return folder


@pytest.fixture(scope="session")
def expected(folder, image) -> tuple:
    """The results of everything that the folder supports, with the package's code."""
    return run_checkpoint(str(folder), image)


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    """A copy of the folder that a test may change."""
    return shutil.copytree(folder, tmp_path / "copy")


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
        monkeypatch.setattr(
            repository, "HfApi", lambda token=None: huggingface_hub.HfApi(endpoint=hub.address, token=token)
        )
        yield hub
