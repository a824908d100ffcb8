"""
Classes defined by examples: checks of the arguments of [`SamClipForImageSegmentation.embed_examples`], the masks of
its prompts, and the step between image and text embeddings.
"""

import unicodedata
from collections.abc import Iterable

import torch

KINDS = ("boxes", "masks", "points")
SAME_EXAMPLES = 0.99999  # cosine similarity; of equal embeddings, it differs from 1 by rounding only


def check_examples(labels, boxes, masks, points) -> tuple[list[list[str]], str, list]:
    r"""
    Checks examples and returns the labels of each image, the name of the argument that locates the examples, and its
    value for each image.

    labels (`Sequence[Sequence[str]]`):
        For each image, the label of each example.
    boxes, masks, points (`Sequence`, *optional*):
        For each image, its examples. Exactly one of them.

    Raises `ValueError` for another number of arguments, lists of different lengths, and labels that are no names.
    """
    given = {name: value for name, value in zip(KINDS, (boxes, masks, points), strict=True) if value is not None}
    if len(given) != 1:
        got = " and ".join(given) or "none of them"
        raise ValueError(f"Examples are located by exactly one of boxes, masks and points; got {got}.")
    ((kind, located),) = given.items()
    for name, value in (("labels", labels), (kind, located)):
        if isinstance(value, str) or not hasattr(value, "__len__"):
            raise ValueError(f"{name} must be a list with a list for each image, got {type(value).__name__}.")
    if len(labels) != len(located):
        raise ValueError(
            f"Got labels for {len(labels)} images and {kind} for {len(located)}. Pass both for each image."
        )
    checked = []
    for index, (own_labels, own) in enumerate(zip(labels, located, strict=True)):
        if isinstance(own_labels, str) or not all(isinstance(label, str) and label.strip() for label in own_labels):
            raise ValueError(
                "The labels of an image must be a list of names, one for each example, but those of image "
                f"{index} are {own_labels!r}."
            )
        if len(own_labels) != len(own):
            raise ValueError(
                f"Image {index} has {len(own_labels)} labels and {len(own)} {kind}. Pass one label for each."
            )
        checked.append(["".join(label) for label in own_labels])  # without subclasses of str
    if not any(checked):
        raise ValueError("There are no examples: pass at least one label.")
    check_names(dict.fromkeys(label for own in checked for label in own))
    return checked, kind, list(located)


def check_names(names: Iterable[str], others: Iterable[str] = ()) -> None:
    """
    Checks that labels of examples can be told apart from each other and from other names of a vocabulary. Labels with
    nearly the same name would divide the probability of one object among them, and none of them would be found.

    Raises `ValueError` for two names that differ in capitals, spaces or the encoding of accents only. An equal name
    among `others` is the same label.
    """
    known = {simplify_name(other): other for other in others}
    for name in names:
        other = known.setdefault(simplify_name(name), name)
        if other != name:
            raise ValueError(
                f"The labels {other!r} and {name!r} differ in capitals or spaces only, so they would divide the "
                "probability of an object among them. Give both the same name, or different ones."
            )


def simplify_name(name: str) -> str:
    """The name in lower case, with single spaces and composed accents."""
    return " ".join(unicodedata.normalize("NFC", name).casefold().split())


def check_distinct(names: list[str], embeds: torch.Tensor) -> None:
    """Raises `ValueError` if the embeddings of two labels `(num_names, projection_dim)`, of length 1, are equal: their
    examples show the same, and none of the two would be found."""
    same = (embeds @ embeds.T > SAME_EXAMPLES).triu(diagonal=1).nonzero().tolist()
    if same:
        first, second = (names[number] for number in same[0])
        raise ValueError(
            f"The examples of {first!r} and {second!r} are the same, so that they cannot be told apart. Remove those "
            "of the wrong label."
        )


def check_prompts(kind: str, prompts, index: int, height: int, width: int) -> list[torch.Tensor]:
    r"""
    Returns the points, or the two corners of the box, of each example of an image: `(num_points, 2)`.

    kind (`"boxes"` or `"points"`):
        Boxes are `(num_examples, 4)`: x1, y1, x2, y2. Points are `(num_examples, 2)`: x, y, or several points for each
        example, `(num_examples, num_points, 2)`. In pixels of the image.
    prompts:
        Nested lists, an array or a tensor.
    index (`int`):
        The number of the image, for errors.
    height, width (`int`):
        Size of the image in pixels.

    Raises `ValueError` for another shape, for coordinates outside the image, and for boxes without area.
    """
    examples = []
    for own in prompts:
        try:
            values = torch.as_tensor(own, dtype=torch.float64, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"The {kind} of image {index} must be numbers, got {own!r}.") from error
        if kind == "boxes":
            if values.shape != (4,):
                raise ValueError(f"A box of image {index} must be x1, y1, x2, y2, got {own!r}.")
            corners = values.reshape(2, 2)
        else:
            corners = values[None] if values.ndim == 1 else values
            if corners.ndim != 2 or corners.shape[1] != 2 or not len(corners):
                raise ValueError(
                    f"An example of image {index} must be one point x, y or a list of points, got {own!r}."
                )
        inside = corners.isfinite() & (corners >= 0) & (corners <= torch.tensor([width, height]))
        if not inside.all():
            raise ValueError(
                f"The {kind} of image {index}, which is {width} wide and {height} high, contain {corners.tolist()}, "
                "which is outside the image. Pass x before y, in pixels of the image."
            )
        if kind == "boxes" and not (corners[1] > corners[0]).all():
            raise ValueError(
                f"A box is x1, y1, x2, y2 with x1 < x2 and y1 < y2, but image {index} has {values.tolist()}."
            )
        if kind == "boxes" and not (corners[1] - corners[0] >= 1).any():
            raise ValueError(
                f"The box {values.tolist()} of image {index} is smaller than a pixel. Pass boxes in pixels, not in "
                "fractions of the image."
            )
        examples.append(corners)
    return examples


def move_embeds(embeds: torch.Tensor, source: torch.Tensor, target: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
    r"""
    Moves embeddings of one modality to where those of the other are: from the mean of `source` to the mean of
    `target`, with distances scaled by the ratio of their standard deviations. In a contrastive model, two images are
    more similar than an image and a text, even if they show the same, so embeddings of images and of texts cannot be
    compared with a third one as they are.

    embeds (`torch.Tensor` of shape `(num_embeds, projection_dim)`):
        The embeddings to move.
    source (`torch.Tensor` of shape `(num_source, projection_dim)`):
        Embeddings of the same modality as `embeds`.
    target (`torch.Tensor` of shape `(num_target, projection_dim)`):
        Embeddings of the other modality. If all embeddings of either are equal, distances are not scaled.
    weight (`float`, *optional*, defaults to 1):
        The fraction of the way that the embeddings are moved.

    Returns embeddings `(num_embeds, projection_dim)`, in general not of length 1.
    """
    deviations = [(own - own.mean(dim=0)).square().sum(dim=1).mean().sqrt() for own in (source, target)]
    scale = deviations[1] / deviations[0] if min(deviations) > 1e-6 else 1.0
    return embeds.lerp((embeds - source.mean(dim=0)) * scale + target.mean(dim=0), weight)


__all__ = ["check_distinct", "check_examples", "check_names", "check_prompts", "move_embeds", "simplify_name"]
