"""The wheel, with nothing beside it but what the base install brings, does all that inference needs."""

import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Runs in an interpreter in which only what is named after it can be imported.
INFERENCE = """
import importlib.abc, json, runpy, sys
from importlib import metadata

wheel, allowed = sys.argv[1], set(json.loads(sys.argv[2]))
sys.path[:] = [wheel, *(path for path in sys.path if not path.endswith("src"))]
hidden = {
    module for module, owners in metadata.packages_distributions().items()
    if not {owner.lower().replace("_", "-") for owner in owners} & allowed
} - {"samclip_hf"}


class NotInstalled(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


assert {"datasets", "accelerate", "matplotlib", "peft"} <= hidden, hidden
sys.meta_path.insert(0, NotInstalled())
# transformers asks for versions rather than for modules
found = metadata.distribution
def distribution(name):
    if name.lower().replace("_", "-") not in allowed | {"samclip-hf"}:
        raise metadata.PackageNotFoundError(name)
    return found(name)
metadata.distribution = distribution
import importlib.util
has = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.partition(".")[0] in hidden else has(name, package)

import samclip_hf
assert samclip_hf.__file__.startswith(wheel), samclip_hf.__file__
from PIL import Image
from samclip_hf import miniature
run_checkpoint = runpy.run_path(f"{wheel}/samclip_hf/publishing/verification_script.py")["run_checkpoint"]

results, outputs = run_checkpoint(miniature.checkpoint(), Image.open(sys.argv[3]))
assert all(results.values()) and outputs.keys() >= {"pred_masks", "logits_per_image"}
loaded = {name.partition(".")[0] for name in sys.modules} & hidden
assert not loaded, loaded
print("all of it")
"""


def base_install() -> set[str]:
    """What `pip install samclip-hf` brings: the closure of what it requires, by what is installed."""
    found, open_ends = set(), ["samclip-hf"]
    while open_ends:
        name = open_ends.pop().lower().replace("_", "-")
        if name in found:
            continue
        found.add(name)
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # for another system
            continue
        open_ends += [re.match(r"[\w.-]+", line)[0] for line in requirements if "extra ==" not in line]
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    (file,) = folder.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


def test_inference_needs_nothing_else(wheel, tmp_path):
    import json

    from PIL import Image

    from samclip_hf.miniature.scenes import render

    Image.fromarray(render(seed=0, index=8).image).save(tmp_path / "scene.png")
    arguments = [wheel, json.dumps(sorted(base_install())), tmp_path / "scene.png"]
    run = subprocess.run([sys.executable, "-P", "-c", INFERENCE, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "all of it"


def test_it_holds_what_is_read_at_run_time(wheel):
    files = {str(path.relative_to(wheel / "samclip_hf")) for path in (wheel / "samclip_hf").rglob("*")}
    assert {"model_card.md", "evaluation/paper.json", "miniature/weights/samclip/model.safetensors"} <= files
    assert {f"evaluation/vocabularies/{path.name}" for path in (ROOT / "src").rglob("vocabularies/*.json")} <= files
