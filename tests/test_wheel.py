"""The wheel contains what inference and training need. Inference works with the base install alone."""

import json
import os
import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from PIL import Image

from samclip_cli import COMMANDS
from samclip_hf.miniature.scenes import render

ROOT = Path(__file__).parents[1]
# Arguments: the folder of the unzipped wheel, the distributions that can be imported (JSON), an image.
INFERENCE = """
import importlib.abc, importlib.util, json, runpy, sys
from importlib import metadata

wheel, allowed = sys.argv[1], set(json.loads(sys.argv[2]))
sys.path[:] = [wheel, *(path for path in sys.path if not path.endswith("src"))]
hidden = {
    module for module, owners in metadata.packages_distributions().items()
    if not {owner.lower().replace("_", "-") for owner in owners} & allowed
} - {"samclip_hf", "samclip_cli"}


class NotInstalled(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


assert {"datasets", "accelerate", "matplotlib", "peft"} <= hidden, hidden
sys.meta_path.insert(0, NotInstalled())
# transformers looks for distributions and module specs, not only for modules.
find_distribution, find_spec = metadata.distribution, importlib.util.find_spec
def distribution(name):
    if name.lower().replace("_", "-") not in allowed | {"samclip-hf"}:
        raise metadata.PackageNotFoundError(name)
    return find_distribution(name)
metadata.distribution = distribution
importlib.util.find_spec = lambda name, package=None: (
    None if name.partition(".")[0] in hidden else find_spec(name, package)
)

import samclip_hf
assert samclip_hf.__file__.startswith(wheel), samclip_hf.__file__
from PIL import Image
from samclip_hf import miniature
run_checkpoint = runpy.run_path(f"{wheel}/samclip_hf/publishing/verification_script.py")["run_checkpoint"]

results, outputs = run_checkpoint(miniature.checkpoint(), Image.open(sys.argv[3]))
assert all(results.values()) and outputs.keys() >= {"pred_masks", "logits_per_image"}
loaded = {name.partition(".")[0] for name in sys.modules} & hidden
assert not loaded, loaded
print("complete")
"""


def base_install() -> set[str]:
    """Distributions that `pip install samclip-hf` installs: its requirements and theirs, without extras."""
    found, remaining = set(), ["samclip-hf"]
    while remaining:
        name = remaining.pop().lower().replace("_", "-")
        if name in found:
            continue
        found.add(name)
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # required on other systems only
            continue
        remaining += [re.match(r"[\w.-]+", line)[0] for line in requirements if "extra ==" not in line]
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Folder of the unzipped wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    (file,) = folder.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


@pytest.fixture
def samclip(wheel, tmp_path):
    """Runs `samclip` from the unzipped wheel, outside of the repository."""
    environment = os.environ | {"PYTHONPATH": str(wheel), "HF_HUB_OFFLINE": "1"}

    def run(*arguments: str) -> str:
        command = [sys.executable, "-P", "-m", "samclip_cli", *arguments]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


def test_inference_needs_only_the_base_install(wheel, tmp_path):
    Image.fromarray(render(seed=0, index=8).image).save(tmp_path / "scene.png")
    arguments = [wheel, json.dumps(sorted(base_install())), tmp_path / "scene.png"]
    run = subprocess.run([sys.executable, "-P", "-c", INFERENCE, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "complete"


def test_the_wheel_contains_all_files_of_the_packages(wheel):
    for package in ("samclip_hf", "samclip_cli"):
        source = ROOT / "src" / package
        files = {path.relative_to(source) for path in source.rglob("*") if path.is_file() and path.suffix != ".pyc"}
        assert files <= {path.relative_to(wheel / package) for path in (wheel / package).rglob("*")}
        assert Path("py.typed") in files


def test_recipes_and_help_texts_are_found_outside_of_the_repository(wheel, samclip):
    assert all(name in samclip("--help") for name in COMMANDS)
    assert "miniature_stage1" in samclip("train", "--help")


@pytest.mark.slow
def test_the_wheel_trains_evaluates_and_publishes(wheel, samclip, tmp_path):
    options = ["--clip_batch_size", "2", "--shuffle_buffer", "16", "--dataloader_num_workers", "0", "--use_cpu"]
    samclip("train", "miniature_stage1", "--max_steps", "3", "--output_dir", "model", *options)
    samclip("evaluate", "--model", "model", "--task", "prompts", "--share", "0.02", "--output_dir", "evaluation")
    results = "evaluation/results.json"
    assert json.loads((tmp_path / results).read_text())["tasks"]
    output = samclip("publish", "model", "me/samclip", "--results", results, "--folder", "repository", "--dry-run")
    assert "Nothing was uploaded" in output
    assert (tmp_path / "repository" / "modeling_samclip.py").read_bytes() == (
        wheel / "samclip_hf" / "modeling_samclip.py"
    ).read_bytes()
