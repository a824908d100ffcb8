"""The documentation is correct: its code runs, its commands, links and names exist, its lists are complete."""

import ast
import builtins
import dataclasses
import importlib.util
import io
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap
import tomllib
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import pytest
import torch.distributed.run
import yaml
from PIL import Image
from transformers import TrainingArguments

import samclip_cli
from samclip_hf import miniature
from samclip_hf.distillation.arguments import DEPRECATED_ARGUMENTS, SamClipTrainingArguments
from samclip_hf.miniature.scenes import render
from samclip_hf.publishing import build_repository

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(DOCS.rglob("*.md")),
    *sorted((ROOT / "demo").glob("*.md")),
]
SCRIPTS = [path for folder in ("benchmarks", "examples") for path in sorted((ROOT / folder).glob("*.py"))]
SLOW_PAGES = {"docs/export.md", "docs/installation.md", "docs/publish.md", "docs/tutorial.md"}
# Models on the Hub that the pages name, and the local folders that replace them in the tests.
REPLACEMENTS = {
    "facebook/sam-vit-base": miniature.sam_teacher(),
    "openai/clip-vit-base-patch16": miniature.clip_teacher(),
    "laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K": miniature.clip_teacher(),
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return [
        textwrap.dedent(block)
        for block in re.findall(rf"^ *```{language}\n(.*?)^ *```", page.read_text(), re.DOTALL | re.MULTILINE)
    ]


def commands(page: Path) -> list[list[str]]:
    """The words of each command in the page's shell blocks, without comments and assignments."""
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line for line in words if line and not re.fullmatch(r"\w+=.*", line[0])]


def page_parameters(pages: list[Path]) -> list:
    return [
        pytest.param(page, marks=pytest.mark.slow if name_of(page) in SLOW_PAGES else (), id=name_of(page))
        for page in pages
    ]


@pytest.mark.parametrize("page", page_parameters([page for page in PAGES if blocks(page, "python")]))
def test_python_code_runs(page, tmp_path, monkeypatch):
    """Runs all Python blocks of a page in order, in a folder with an image."""
    text = page.read_text()
    for name, folder in REPLACEMENTS.items():
        if name in text:
            shutil.copytree(folder, tmp_path / name)
    if "me/my-samclip" in text:
        build_repository(miniature.checkpoint(), tmp_path / "me/my-samclip")
    Image.fromarray(render(seed=0, index=8).image).resize((400, 300)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code = "\n".join(blocks(page, "python"))
    if name_of(page) in SLOW_PAGES:  # a process of their own: docs/publish.md begins without this package imported
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
    else:  # a new process takes seconds to import torch
        exec(compile(code, str(page), "exec"), {"__name__": "__main__"})


@cache
def help_of(*command: str) -> str:
    """The output of `--help` of a `samclip` command, a module after `-m`, or a script; runs in this process."""
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), pytest.raises(SystemExit) as finished:
        patch.setenv("COLUMNS", "200")
        patch.setattr(sys, "argv", [*command[-1:], "--help"])
        if command[0] == "samclip":
            sys.exit(samclip_cli.main([*command[1:], "--help"]))
        elif command[0] == "-m":
            runpy.run_module(command[1], run_name="__main__")
        else:
            script = ROOT / command[0]
            patch.setattr(sys, "path", [str(script.parent), *sys.path])
            runpy.run_path(str(script), run_name="__main__")
    assert finished.value.code in (0, None), shlex.join(command)
    assert output.getvalue().startswith("usage: ")
    return output.getvalue()


def options(words: list[str]) -> list[str]:
    return [word.split("=")[0] for word in words if word.startswith("--")]


def check_options(words: list[str], *command: str) -> None:
    # The help texts of both commands refer to transformers' documentation for inherited arguments.
    inherited = {f"--{field.name}" for field in dataclasses.fields(TrainingArguments)}
    trains = command in (("samclip", "train"), ("samclip", "finetune"))
    for option in options(words):
        if option == "--help" or (trains and option in inherited):
            continue
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", help_of(*command)), f"no {option} in {shlex.join(words)}"


def check_command(words: list[str]) -> None:
    """Raises `AssertionError` if a command of the documentation or one of its options does not exist."""
    words = [word.removeprefix(".venv/bin/") for word in words]
    match words:
        case ["make", *arguments]:
            rules = (ROOT / "Makefile").read_text()
            for target in (argument for argument in arguments if "=" not in argument):
                assert re.search(rf"^{target}( [\w-]+)*:", rules, re.MULTILINE), f"no make {target}"
        case ["pip", "install", *rest] | ["python", "-m", "pip", "install", *rest]:
            named = {extra for names in re.findall(r"\[([\w,]+)\]", " ".join(rest)) for extra in names.split(",")}
            project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            assert named <= set(project["optional-dependencies"]), words
        case ["accelerate", "launch", *rest]:
            place = next(place for place, word in enumerate(rest) if word == "-m" or word.endswith(".py"))
            if place:
                check_options(rest[:place], "-m", "accelerate.commands.launch")
            check_command(["python", *rest[place:]])
        case ["torchrun", *rest]:
            place = rest.index("-m")
            known = torch.distributed.run.get_args_parser().format_help()
            assert all(option in known for option in options(rest[:place])), words
            check_command(["python", *rest[place:]])
        case ["python", "-m", "samclip_cli", *rest]:
            check_command(["samclip", *rest])
        case ["python", script, *rest] if script.startswith("training/"):
            assert (ROOT / script).is_file(), script
            check_command(["samclip", Path(script).stem, *rest])
        case ["samclip", *rest] if rest[0].startswith("-"):
            check_options(rest, "samclip")
        case ["samclip", command, *rest]:
            assert command in samclip_cli.COMMANDS, command
            check_options(rest, "samclip", command)
            for word in rest:
                if word.startswith("training/"):
                    assert (ROOT / word).is_file(), word
                elif re.fullmatch(r"\w+_stage\d", word):
                    assert (ROOT / f"src/samclip_hf/recipes/{word}.yaml").is_file(), word
        case ["python", "-m", "venv", *_]:
            pass
        case ["python", "-m", module, *rest]:
            assert importlib.util.find_spec(module), module
            check_options(rest, "-m", module)
        case ["python", script, *rest]:
            assert (ROOT / script).is_file(), script
            check_options(rest, script)
        case ["python3", "-m", "venv", *_] | ["source" | "hf" | "pre-commit", *_] | ["pip", "wheel", *_]:
            pass
        case _:
            raise AssertionError(f"no check for {shlex.join(words)}")


def inline_commands(page: Path) -> list[list[str]]:
    """Commands in code spans of the text. Names of commands without arguments are checked as well."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]
    return [
        shlex.split(span) for span in spans if re.match(r"(samclip [a-z-]|make [a-z]|python (-m )?\w+\S*[./])", span)
    ]


def test_sections_about_other_tools_can_be_read_alone():
    """Users of one tool do not run the code of another: every block imports and defines what it uses."""
    for block in blocks(DOCS / "other_tools.md", "python"):
        names = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Name | ast.alias)]
        defined = {
            (node.asname or node.name).partition(".")[0] if isinstance(node, ast.alias) else node.id
            for node in names
            if isinstance(node, ast.alias) or isinstance(node.ctx, ast.Store)
        }
        used = {node.id for node in names if isinstance(node, ast.Name)}
        assert used - defined - set(dir(builtins)) == set(), block


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page) or inline_commands(page)], ids=name_of)
def test_commands_and_their_options_exist(page):
    for words in commands(page) + inline_commands(page):
        check_command(words)


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_scripts_have_a_help_text(script):
    help_of(name_of(script))


@pytest.mark.parametrize(
    "line",
    [
        "make nothing",
        "python training/train.py --no_such",
        "accelerate launch -m samclip_cli train --no_such",
        "samclip nothing",
        "samclip train no_such_stage1",
        "samclip --no_such",
        "pip install -e '.[nothing]'",
    ],
)
def test_wrong_commands_are_found(line):
    with pytest.raises(AssertionError):
        check_command(shlex.split(line))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs build them."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=name_of)
def test_links_and_anchors_exist(page):
    for link in re.findall(r"\]\((?!https?://)([^)\s]+)\)", page.read_text()):
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), link
        if anchor:
            assert anchor in anchors(path), link


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_in_the_repository_exist(page):
    for path in re.findall(r"`((?:src|tests|docs|benchmarks|training|demo|examples)/[\w./-]*)`", page.read_text()):
        assert (ROOT / path).exists() or "example21" in path, path


def test_site_lists_every_page():
    def pages(entry) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in pages(part)]

    nav = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    expected = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")} - {"tables/tables.md"}
    assert len(nav) == len(set(nav))
    assert set(nav) == expected


@pytest.mark.parametrize("page", sorted((DOCS / "api").glob("*.md")), ids=name_of)
def test_api_reference_names_existing_objects(page):
    for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE):
        parent, _, attribute = name.rpartition(".")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            assert hasattr(importlib.import_module(parent), attribute), name


def test_api_reference_has_the_public_names_of_the_package():
    import samclip_hf

    text = "".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    listed = set(re.findall(r"^::: samclip_hf\.(\w+)$", text, re.MULTILINE))
    # Base class of all models; image processor without torchvision, which SamClipImageProcessor falls back to.
    assert set(samclip_hf.__all__) - listed == {"SamClipPreTrainedModel", "SamClipImageProcessorPil"}


def test_docstrings_of_transformers_style_become_markdown():
    pytest.importorskip("griffe", reason="needs the extra docs")
    to_markdown = runpy.run_path(str(DOCS / "docstrings.py"))["to_markdown"]
    docstring = """Opens an image.

    Args:
        source (`str`, *optional*):
            A path.
        sizes (`list[int]`):
            Height
            and width.

    Returns:
        `int`: A number.

    Raises:
        ValueError: There is no image.
    """
    expected = """Opens an image.


    **Parameters**

    - **source** (`str`, *optional*):
        A path.
    - **sizes** (`list[int]`):
        Height
        and width.


    **Returns**

    `int`: A number.


    **Raises**

    - `ValueError`: There is no image.
    """
    lines = to_markdown(docstring).split("\n")
    assert [line.rstrip() for line in lines] == [line.removeprefix("    ").rstrip() for line in expected.split("\n")]


def table_rows(page: Path, first_column: str) -> list[list[str]]:
    """The cells of all tables whose first column has the given title."""
    rows = []
    for table in re.findall(rf"^\| {first_column} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", page.read_text(), re.MULTILINE):
        rows += [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    return rows


def test_all_training_arguments_are_listed_with_their_defaults():
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    expected = {}
    for field in dataclasses.fields(SamClipTrainingArguments):
        if field.name not in inherited:
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            values = default if isinstance(default, list) else [default]
            expected[f"`{field.name}`"] = f"`{' '.join(map(str, values))}`" if values else ""
    assert {name: default for name, default, _ in table_rows(DOCS / "configuration.md", "argument")} == expected


def test_all_deprecated_arguments_are_listed():
    listed = {}
    for old, new in table_rows(DOCS / "configuration.md", "deprecated"):
        listed |= dict(zip(re.findall(r"\w+", old), re.findall(r"\w+", new), strict=True))
    assert listed == DEPRECATED_ARGUMENTS


def test_all_recipes_are_listed():
    listed = {name for row in table_rows(DOCS / "configuration.md", "recipe") for name in re.findall(r"\w+", row[0])}
    assert listed == {path.stem for path in (ROOT / "src/samclip_hf/recipes").glob("*.yaml")}


def test_miniature_page_has_the_tables_that_make_tables_writes():
    page = (DOCS / "miniature.md").read_text()
    for table in re.findall(r"(?:^\|.*\n)+", (DOCS / "tables/tables.md").read_text(), re.MULTILINE):
        assert table in page


def test_versions_of_changelog_and_citation_are_the_package_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert re.search(r"^## \[(\d.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == version
