"""Labels on the command line: names, synonyms, background, and their embeddings."""

import argparse
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import CommandError, first_line, log
from .argument_types import probability
from .formats import Prediction
from .models import LoadedModel

if TYPE_CHECKING:  # importing these takes seconds, see the docstring of the package
    import numpy as np
    import torch

    from samclip_hf import SamClipVocabulary

TEMPLATE = "a photo of a {}"
LABEL_OPTIONS = ("background", "template", "multi_label")  # need labels
LABELS_HELP = """
labels:
  "cat|kitten, sofa" are two labels, and the first one has a synonym. A backslash before a comma or
  bar makes it a part of the name: "blue\\, bright". A --labels_file has one label on each line;
  commas need no backslash there. A line that starts with # is a comment; one that starts with \\#
  is a label that starts with #.
"""


def add_label_arguments(
    parser: argparse.ArgumentParser,
    default: str | None,
    template: str = TEMPLATE,
    has_background: bool = True,
) -> None:
    """
    Adds `--labels`, `--labels_file`, `--template`, `--background` and `--multi_label`.

    default (`str`, *optional*):
        What is done without labels, for the help; `None` if labels are required.
    template (`str`, *optional*, defaults to `"a photo of a {}"`):
        The default of `--template`.
    has_background (`bool`, *optional*, defaults to `True`):
        Whether there is `--background`.
    """
    suffix = "" if default is None else f" (default: {default})"
    parser.add_argument("--labels", metavar='"A, B"', help=f"comma-separated names{suffix}")
    parser.add_argument("--labels_file", metavar="FILE", help="a text file with one label on each line")
    if has_background:
        parser.add_argument(
            "--background", metavar='"A, B"', help="comma-separated texts for what is none of the labels"
        )
    parser.add_argument("--template", metavar='"a {}"', help=f'prompt template (default: "{template}")')
    parser.add_argument(
        "--multi_label", action="store_true", help="score each label from 0 to 1, independently of the others"
    )
    parser.set_defaults(default_template=template)


def read_labels(arguments: argparse.Namespace) -> None:
    """Replaces `arguments.labels` by lists of synonyms, also those of `--labels_file`, `arguments.background` by a
    list, and `arguments.template` by its default. Labels and background are `None` if they are not given. Raises
    `CommandError` for texts that cannot be used."""
    background = getattr(arguments, "background", None)
    if arguments.labels is not None and arguments.labels_file is not None:
        raise CommandError("pass either --labels or --labels_file, not both.")
    if arguments.labels_file is not None:
        arguments.labels = _read_labels_file(arguments.labels_file)
    elif arguments.labels is not None:
        arguments.labels = parse_labels("--labels", arguments.labels)
    elif getattr(arguments, "examples", None) is not None:
        pass  # read_examples checks the options
    elif given := [f"--{name}" for name in LABEL_OPTIONS if getattr(arguments, name, None)]:
        raise CommandError(f"{' and '.join(given)} require{'s' * (len(given) == 1)} --labels.")
    if background is not None:
        if arguments.multi_label:
            raise CommandError("--background has no effect with --multi_label: every label has its own score.")
        arguments.background = [name for names in parse_labels("--background", background) for name in names]
    if arguments.template is None:
        arguments.template = arguments.default_template
    else:
        check_template(arguments.template)


def check_template(template: str) -> None:
    """Raises `CommandError` for a `--template` without exactly one `{}`."""
    if len(re.findall(r"{}|{|}", template)) != 1 or "{}" not in template:
        raise CommandError(
            f'--template must contain {{}} once, in the place of the label, such as "{TEMPLATE}": got {template!r}.'
        )


def add_label_threshold(parser: argparse.ArgumentParser) -> None:
    """Adds `--threshold`, for commands that name masks."""
    parser.add_argument(
        "--threshold",
        type=probability,
        metavar="P",
        help='a mask whose best label has a lower score, from 0 to 1, gets no label: "label" is null and "label_id" '
        "is 0 (default: 0.5 with --multi_label, otherwise 0)",
    )


def read_label_threshold(arguments: argparse.Namespace) -> None:
    """Replaces `arguments.threshold` by its default, after [`read_labels`]. Raises `CommandError` if it is given
    without labels."""
    if arguments.threshold is None:
        arguments.threshold = 0.5 if arguments.multi_label else 0.0
    elif arguments.labels is None:
        raise CommandError("--threshold requires --labels.")


def embed_labels(arguments: argparse.Namespace, loaded: LoadedModel) -> "SamClipVocabulary":
    """Sets the vocabulary of the model to the labels of [`read_labels`] and `loaded.names` to its names without the
    background, and returns it. Without labels, it is that of the checkpoint. Raises `CommandError` if the labels
    cannot be embedded, or if the checkpoint has none."""
    if arguments.labels is None and loaded.model.class_embeds is None:
        raise CommandError(f'--model {arguments.model} has no vocabulary: pass --labels, such as "cat, sofa".')
    try:
        if arguments.labels is not None:
            if loaded.tokenizer is None:
                raise CommandError(f"--model {arguments.model} has no text tower, so it cannot embed labels.")
            background = getattr(arguments, "background", None)
            loaded.model.set_vocabulary(
                arguments.labels,
                background,
                [arguments.template],
                loaded.tokenizer,
                multi_label=arguments.multi_label,
            )
        vocabulary = loaded.model.vocabulary
    except ValueError as error:
        raise CommandError(f"--labels: {first_line(error)}") from error
    is_single = arguments.labels is not None and len(arguments.labels) == 1 and not arguments.multi_label
    is_single = is_single and getattr(arguments, "examples", None) is None
    if is_single and getattr(arguments, "background", ()) is None:
        log(
            "with one label and no --background, every region gets this label. Describe the rest of the image, such "
            'as --background "wall, floor", or pass --multi_label.'
        )
    loaded.names = [name for index, name in vocabulary.id2label.items() if index != vocabulary.background_label_id]
    return vocabulary


def name_masks(
    loaded: LoadedModel,
    records: list[dict],
    masks: Sequence["np.ndarray"],
    embeds: "torch.Tensor",
    multi_label: bool,
    threshold: float,
) -> Prediction:
    """
    The prediction for an image whose masks get the names of the vocabulary, see [`embed_labels`].

    loaded (`LoadedModel`)
    records (`list[dict]`):
        The JSON of each mask, which gets "label", "label_id" and "label_score".
    masks (`Sequence[numpy.ndarray]` of shape `(height, width)`):
        Boolean masks.
    embeds (`torch.Tensor` of shape `(num_masks, projection_dim)`):
        Embeddings of the masks. The label of a mask without pixels, whose embedding is 0, is `None`.
    multi_label (`bool`):
        Whether scores are independent. The JSON of a mask then has the "label_scores" of all labels.
    threshold (`float`):
        The label of a mask whose best score is lower is `None`.
    """
    import torch

    vocabulary, label_ids, label_scores = loaded.model.vocabulary, [], []
    with torch.inference_mode():
        logits = loaded.model.classify(embeds.to(loaded.model.device), vocabulary, multi_label).float()
    scores = logits.sigmoid() if multi_label else logits.softmax(dim=-1)
    scores = scores * embeds.to(scores.device).any(dim=-1, keepdim=True)
    best_scores, best = scores.max(dim=-1)
    for number, (record, score, index) in enumerate(zip(records, best_scores.tolist(), best.tolist(), strict=True)):
        name = vocabulary.id2label[index] if score and score >= threshold else None
        label_ids.append(loaded.names.index(name) + 1 if name in loaded.names else 0)
        label_scores.append(score)
        named = {"label": name, "label_id": label_ids[-1], "label_score": score}
        if multi_label:
            named["label_scores"] = dict(zip(vocabulary.id2label.values(), scores[number].tolist(), strict=True))
        others = dict(record)
        record.clear()
        record.update(named | others)
    legend = label_legend(loaded.names, label_ids, label_scores, "masks")
    description = {"model": loaded.description, "masks": records}
    return Prediction(description, legend, loaded.caption, masks, label_ids, loaded.names)


def label_legend(
    names: Sequence[str], label_ids: Sequence[int], scores: Sequence[float], word: str
) -> list[tuple[int | None, str]]:
    """
    Rows of the legend, in the order of the labels. Masks of the background and without a label have none.

    names (`Sequence[str]`):
        Names of the labels 1, 2, ...
    label_ids (`Sequence[int]`), scores (`Sequence[float]`):
        The label of each mask, 0 for background or none, and its score.
    word (`str`):
        What masks are called, in the plural.
    """
    legend: list[tuple[int | None, str]] = []
    for label_id in sorted(set(label_ids) - {0}):
        own = [score for other, score in zip(label_ids, scores, strict=True) if other == label_id]
        count = f" ({len(own)} {word})" if len(own) > 1 else ""
        legend.append((label_id, f"{names[label_id - 1]} {max(own):.2f}{count}"))
    return legend or [(None, f"no {word} with these labels" if label_ids else f"no {word}")]


def _read_labels_file(path: str) -> list[list[str]]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = [line.strip() for line in file.read().splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise CommandError(f"--labels_file {path}: not a text file in UTF-8.") from error
    except OSError as error:
        raise CommandError(f"--labels_file {path}: {error.strerror}.") from error
    labels = [line for line in lines if not line.startswith("#")]
    if not labels:
        raise CommandError(f"--labels_file {path} has no labels: write one on each line.")
    if comments := len(lines) - len(labels):
        log(
            f"{path}: skipping {comments} of {len(lines)} lines, which are comments, because they start with #. Write "
            "a backslash before the # of a label."
        )
    return _check_labels(f"--labels_file {path}", _split("\n".join(labels), "\n"))


def parse_labels(option: str, text: str) -> list[list[str]]:
    """Splits "cat|kitten, sofa" into labels and their synonyms. A backslash before a comma, a bar, a number sign or a
    backslash makes it a part of the name. Raises `CommandError` for an empty or repeated name."""
    if not text.replace(",", "").strip():
        raise CommandError(f'{option} is empty: pass comma-separated names, such as "cat, sofa".')
    # Surrogates stand for bytes of the argument that cannot be decoded.
    if any(0xD800 <= ord(letter) < 0xE000 for letter in text):
        raise CommandError(f"{option} is not valid UTF-8: {text!r}.")
    return _check_labels(option, _split(text, ","))


def format_labels(labels: Sequence[Sequence[str]]) -> str:
    """Joins labels and their synonyms to the text that `parse_labels` splits."""
    return ", ".join("|".join(re.sub(r"([\\,|])", r"\\\1", name) for name in names) for names in labels)


def _split(text: str, separator: str) -> list[list[str]]:
    groups = [[""]]
    for token in re.findall(r"\\[\\,|#]|.", text, re.DOTALL):  # a character or one with a backslash before it
        if token == separator:
            groups.append([""])
        elif token == "|":
            groups[-1].append("")
        else:
            groups[-1][-1] += token[-1]
    return [[" ".join(name.split()) for name in group] for group in groups]


def _check_labels(option: str, labels: list[list[str]]) -> list[list[str]]:
    names = [name for synonyms in labels for name in synonyms]
    if "" in names:
        raise CommandError(f"{option} has an empty name: remove the extra comma or bar.")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise CommandError(f"{option} has repeated names: {', '.join(repeated)}.")
    return labels
