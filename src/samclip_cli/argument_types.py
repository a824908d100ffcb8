"""The parser of the commands, and types of their arguments."""

import argparse
import difflib
from collections.abc import Sequence
from typing import Any

from . import CommandError


class CommandParser(argparse.ArgumentParser):
    """
    A parser that does not accept abbreviations of options, of which `argparse` reports the ambiguous ones only. The
    help text keeps its lines.

    command (`str`):
        Name of the command.
    hints (`dict[str, str]`, *optional*):
        What to do instead of passing an option that the command does not have.
    kwargs:
        Arguments of `argparse.ArgumentParser`.
    """

    def __init__(self, command: str, hints: dict[str, str] | None = None, **kwargs: Any):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(f"samclip {command}", formatter_class=formatter, allow_abbrev=False, **kwargs)
        self.hints = hints or {}

    def parse_args(self, args: Sequence[str]) -> argparse.Namespace:  # type: ignore[override]
        """The parsed arguments. Raises `CommandError` for an unknown option, and exits with status 2 for other
        errors."""
        arguments, unknown = self.parse_known_args(args)
        if not unknown:
            return arguments
        name = next((word for word in unknown if word.startswith("-")), unknown[0]).partition("=")[0]
        if name in self.hints:
            raise CommandError(f"{name}: {self.hints[name]}")
        options = [option for option in self._option_string_actions if option.startswith("--")]
        close = difflib.get_close_matches(name, options, n=1)
        hint = f"Did you mean {close[0]}?" if close else f"See {self.prog} --help."
        raise CommandError(f"unknown argument {name}. {hint}")


def probability(text: str) -> float:
    """A number from 0 to 1."""
    return _number(text, float, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def fraction(text: str) -> float:
    """A number above 0 and up to 1."""
    return _number(text, float, lambda value: 0 < value <= 1, "a number above 0 and up to 1")


def positive_int(text: str) -> int:
    """An integer of 1 or more."""
    return _number(text, int, lambda value: value >= 1, "an integer of 1 or more")


def non_negative_int(text: str) -> int:
    """An integer of 0 or more."""
    return _number(text, int, lambda value: value >= 0, "an integer of 0 or more")


def _number(text, convert, is_valid, description):
    try:
        value = convert(text)
    except ValueError:
        value = None
    if value is None or not is_valid(value):
        raise argparse.ArgumentTypeError(f"must be {description}, got {text!r}")
    return value
