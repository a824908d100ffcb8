"""What README and docs/ tell people to type works: Python runs, commands and their options exist."""

import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import pytest
from PIL import Image

from samclip_hf import miniature
from samclip_hf.miniature.scenes import render

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "demo").glob("*.md"))]
SCRIPTS = [
    path for folder in ("training", "benchmarks", "examples", "demo") for path in sorted((ROOT / folder).glob("*.py"))
]
# Names on the Hub and of local files that the pages use, and what they lead to here.
STAND_INS = {
    "facebook/sam-vit-base": miniature.sam_teacher(),
    "openai/clip-vit-base-patch16": miniature.clip_teacher(),
    "laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K": miniature.clip_teacher(),
}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """Words of each command in the page's shell blocks, without comments."""
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line for line in words if line and not re.fullmatch(r"\w+=.*", line[0])]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_python(page, tmp_path):
    """All blocks of a page one after another, as one reads them, in a folder with a photograph."""
    for name, folder in STAND_INS.items():
        shutil.copytree(folder, tmp_path / name)
    if "me/my-samclip" in page.read_text():
        from samclip_hf.publishing.repository import build_repository

        build_repository(miniature.checkpoint(), tmp_path / "me/my-samclip")
    Image.fromarray(render(seed=0, index=8).image).resize((400, 300)).save(tmp_path / "photo.jpg")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    code = "\n".join(blocks(page, "python"))
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@cache
def help_of(*command: str) -> str:
    """What a script, or `-m` and a module, answers to --help; in this process, which has imported most of it."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed), pytest.raises(SystemExit) as finished:
        patch.setenv("COLUMNS", "200")
        if command[0] == "-m":
            patch.setattr(sys, "argv", [*command[1:], "--help"])
            runpy.run_module(command[1], run_name="__main__")
        script = ROOT / command[0]
        patch.setattr(sys, "argv", [str(script), "--help"])
        patch.setattr(sys, "path", [str(script.parent), *sys.path])
        runpy.run_path(str(script), run_name="__main__")
    assert finished.value.code in (0, None)
    assert printed.getvalue().startswith("usage: ")
    return printed.getvalue()


def check(words: list[str]) -> None:
    """That a command exists and knows its options; raises `AssertionError` otherwise."""
    match words:
        case ["make", *targets]:
            makefile = (ROOT / "Makefile").read_text()
            for target in (word for word in targets if "=" not in word):
                assert re.search(rf"^{target}( [\w-]+)*:", makefile, re.MULTILINE), f"make {target}"
            return
        case ["pip", "install", *rest]:
            extras = re.findall(r"\[([\w,]+)\]", " ".join(rest))
            known = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
            assert {extra for names in extras for extra in names.split(",")} <= set(known), words
            return
        case ["hf", *_] | ["pip", "wheel", *_]:
            return
        case ["accelerate", "launch", *rest]:
            place = next(place for place, word in enumerate(rest) if word.endswith(".py"))
            known = help_of("-m", "accelerate.commands.launch") if place else ""
            for option in options(rest[:place]):
                assert option in known, option
            command, rest = [rest[place]], rest[place + 1 :]
        case ["python", "-m", module, *rest]:
            command = ["-m", module]
        case ["python", script, *rest]:
            command = [script]
        case ["samclip", subcommand, *rest]:
            command = ["-m", "samclip_hf", subcommand]
        case _:
            raise AssertionError(f"No test knows how to check {shlex.join(words)}")
    text = help_of(*command)
    for option in options(rest):
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", text), f"{shlex.join(words)}: no {option}"
    for word in rest:
        if word.startswith(("training/", "benchmarks/", "examples/", "demo/")):
            assert (ROOT / word).exists(), word


def options(words: list[str]) -> list[str]:
    return [word.split("=")[0] for word in words if word.startswith("--")]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name_of)
def test_commands(page):
    for words in commands(page):
        check(words)


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_every_script_tells_what_it_does(script):
    help_of(name_of(script))


def test_the_demo_starts_beside_a_script_with_the_name_of_a_library():
    """In a process of its own, which finds training/evaluate.py where it looks for the library `evaluate`."""
    run = subprocess.run([sys.executable, ROOT / "training/demo.py", "--help"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_wrong_commands_are_found():
    for line in (
        "make nothing",
        "python training/train.py --no_such",
        "samclip nothing",
        "pip install -e '.[nothing]'",
    ):
        with pytest.raises(AssertionError):
            check(shlex.split(line))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target
