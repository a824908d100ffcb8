"""Types of command-line arguments, for `argparse`."""

import argparse


def probability(text: str) -> float:
    """A number from 0 to 1."""
    return _number(text, float, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def fraction(text: str) -> float:
    """A number above 0 and up to 1."""
    return _number(text, float, lambda value: 0 < value <= 1, "a number above 0 and up to 1")


def positive_int(text: str) -> int:
    """An integer of 1 or more."""
    return _number(text, int, lambda value: value >= 1, "an integer of 1 or more")


def _number(text, convert, is_valid, description):
    try:
        value = convert(text)
    except ValueError:
        value = None
    if value is None or not is_valid(value):
        raise argparse.ArgumentTypeError(f"must be {description}, got {text!r}")
    return value
