"""Imports point downward through the layers of the package, and the files that travel to the Hub stand alone."""

import ast
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"
HUB_FILES = {path.stem for path in (SRC / "samclip_hf").glob("*_samclip.py")}
# From the bottom up. A module imports its own layer and those below. The names of a layer do not import one another.
LAYERS = (
    {"hub files"},
    {"stock_pipelines", "templates"},
    {"registration"},
    {"miniature"},
    {"samclip_hf"},
    {"images", "files", "identity"},
    {"visualization", "retrieval"},
    {"datasets"},
    {"distillation", "evaluation"},
    {"finetuning"},
    {"export"},
    {"publishing"},
    {"miniature_lab"},
    {"samclip_cli"},
)
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}
DEPRECATED_COMMAND = "samclip_hf.export.__main__"  # belongs to the commands
# What the Hub files may import: every user of a published model has these packages.
REQUIRED = {"huggingface_hub", "numpy", "packaging", "PIL", "safetensors", "tokenizers", "torch", "transformers"}


def module_name(path: Path) -> str:
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> str:
    package, _, rest = module.partition(".")
    if package == "samclip_cli":
        return package
    name = rest.partition(".")[0]
    return "hub files" if name in HUB_FILES else name or package


def imported_modules(path: Path) -> set[str]:
    """The modules of this project that a file imports at any depth of its code, by their absolute names."""
    package = path.relative_to(SRC).parent.parts
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:  # the name is a module or what a module defines
                submodule = SRC.joinpath(*base.split("."), alias.name)
                is_module = submodule.with_suffix(".py").is_file() or (submodule / "__init__.py").is_file()
                modules.add(f"{base}.{alias.name}" if is_module else base)
    return {module for module in modules if module.partition(".")[0] in ("samclip_hf", "samclip_cli")}


FILES = sorted(path for path in SRC.rglob("*.py") if "weights" not in path.parts)


def test_every_module_has_a_layer():
    assert {layer_of(module_name(path)) for path in FILES} == LEVELS.keys()


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_downward(path):
    module = module_name(path)
    own = "samclip_cli" if module == DEPRECATED_COMMAND else layer_of(module)
    for imported in imported_modules(path):
        layer = layer_of(imported)
        assert layer == own or LEVELS[layer] < LEVELS[own], f"{module} ({own}) imports {imported} ({layer})"


@pytest.mark.parametrize("name", sorted(HUB_FILES))
def test_hub_files_import_their_siblings_and_what_every_user_has(name):
    """The Hub copies these files alone, and follows `from .sibling import x` and no other form of import."""
    tree = ast.parse((SRC / "samclip_hf" / f"{name}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module in HUB_FILES, ast.unparse(node)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for imported in names:
                assert is_allowed(imported.partition(".")[0], node, tree), ast.unparse(node)


def is_allowed(package: str, node: ast.stmt, tree: ast.Module) -> bool:
    """The standard library, a required package, or torchvision where the code asks first whether it is installed."""
    is_guarded = node not in tree.body
    return package in REQUIRED or package in sys.stdlib_module_names or (package == "torchvision" and is_guarded)
