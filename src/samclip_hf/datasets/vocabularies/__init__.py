"""Lists of classes: those of common datasets, and those from files of users."""

import json
from collections import Counter
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from ..layouts import get, read_json, read_text


class Vocabulary(NamedTuple):
    """
    A list of classes.

    source (`str`):
        The origin of the list.
    names (`list[list[str]]`):
        The synonyms of each class; the first one is the label.
    background (`list[str]`, *optional*):
        Texts that describe the background, if the first class is background.
    ids (`list`, *optional*):
        The classes' folder names, or their values in label maps.
    """

    source: str
    names: list[list[str]]
    background: list[str] | None = None
    ids: list[Any] | None = None


def load_vocabulary(name: str) -> Vocabulary:
    """Loads a list of classes of this package, such as "voc21"."""
    file = resources.files(__package__).joinpath(f"{name}.json")
    return Vocabulary(**json.loads(file.read_text(encoding="utf-8")))


def read_vocabulary(file: Path) -> Vocabulary:
    """
    Reads a json file with a list of names or of lists of synonyms, or with the `names`, `source` and `background` of a
    [`Vocabulary`]; or a text file with a name in each line. In a list, "background" is a class like others, whose text
    is its name.

    Raises `ValueError` for other content, and if there are texts for the background and the first class is another.
    """
    if file.suffix == ".txt":
        content: Any = [line.strip() for line in read_text(file).rstrip().splitlines()]
        if not all(content):
            raise ValueError(f"{file} has an empty line. Line 1 is the name of value 0 in the label maps, and so on.")
    else:
        content = read_json(file)
    if isinstance(content, list):
        content = {"names": content}
    given = get(content, "names", file)
    names = [[name] if isinstance(name, str) else name for name in given] if isinstance(given, list) else []
    if not names or not all(
        isinstance(name, list) and name and all(isinstance(synonym, str) for synonym in name) for name in names
    ):
        raise ValueError(f"{file} must contain a list of names or of lists of synonyms.")
    if unknown := sorted(content.keys() - Vocabulary._fields):
        raise ValueError(f"{file} has unknown entries: {', '.join(unknown)}. Known: {', '.join(Vocabulary._fields)}.")
    background = content.get("background")
    if background is not None:
        if not isinstance(background, list) or not all(isinstance(text, str) for text in background):
            raise ValueError(f'{file}: "background" must be a list of texts, got {background!r}.')
        if names[0] != ["background"]:
            raise ValueError(f'{file} has texts for the background, so its first class must be "background".')
    return Vocabulary(content.get("source", str(file)), names, background)


def describe_shared_names(names: list[list[str]]) -> dict[str, Any]:
    """Returns an entry for the results if several classes have the same name, so that no text distinguishes them."""
    counts = Counter(synonyms[0] for synonyms in names)
    shared = sorted(name for name, count in counts.items() if count > 1)
    return {"names that several classes share": shared} if shared else {}
