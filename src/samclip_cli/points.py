"""`samclip points`: segments the objects at points and in boxes."""

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from . import CommandError
from .batch import process_images
from .formats import Prediction, coco_annotation
from .image_arguments import create_parser
from .models import load_model
from .plan import prepare
from .vocabulary import (
    LABELS_HELP,
    add_label_arguments,
    add_label_threshold,
    embed_labels,
    name_masks,
    read_label_threshold,
    read_labels,
)

if TYPE_CHECKING:
    import torch
    from PIL import Image

MASK_MEMORY = 2**28  # bytes of masks that are embedded in one call
DESCRIPTION = """\
Segments the objects at points and in boxes.

examples:
  samclip points photo.jpg --sam facebook/sam-vit-base --clip openai/clip-vit-base-patch16 \\
      --points "120,80; 200,90" --output out/
  samclip points photo.jpg --points "120,80 150,95 40,30,0" --output mask.png
  samclip points photo.jpg --boxes "10,20,110,220" --labels "cat, sofa" --output out.json
  samclip points photos/ --prompts prompts.json --output results/ --formats masks,coco

The score of a mask is its IoU as the model predicts it. A single point often fits several objects,
such as a shirt and the person who wears it; the mask with the highest score is returned. With
--labels, every mask gets a name: "label", "label_id" and "label_score" in the JSON. The label_score
is the probability of the label among all labels and background texts. With --multi_label,
"label_scores" has an independent score of each label, and a mask whose scores are all below
--threshold has no label."""

PROMPTS_HELP = """
prompts:
  Coordinates are pixels of the image after the EXIF orientation: x from the left, y from the top.
  --points "120,80 150,95 40,30,0; 200,90": a semicolon separates objects and a space separates
  points of one object. "x,y" or "x,y,1" is inside the object, "x,y,0" is outside.
  --boxes "x1,y1,x2,y2; ...": one object for each box. With --points and --boxes, the first box and
  the first points belong to one object, and so on.
  --prompts FILE.json has the objects of each image, by its name on the command line or its file
  name; an object has points, a box or both, and the points are inside without point_labels:
    {"photo.jpg": [{"points": [[120, 80], [40, 30]], "point_labels": [1, 0]},
                   {"box": [10, 20, 110, 220]}]}
"""

RECORD = (
    '"masks": [{"score": 0.97, "points": [[120, 80]], "point_labels": [1],\n'
    '       "bbox": [...], "area": 5120, "segmentation": {...}}, ...]'
)


@dataclass
class Prompt:
    """The points (x, y, 1 inside or 0 outside) and the box (x1, y1, x2, y2) of an object, in pixels of the image."""

    points: list[list[float]] = field(default_factory=list)
    box: list[float] | None = None

    def record(self) -> dict[str, Any]:
        """The object in the format of `--prompts`."""
        record: dict[str, Any] = {}
        if self.points:
            record["points"] = [point[:2] for point in self.points]
            record["point_labels"] = [point[2] for point in self.points]
        if self.box is not None:
            record["box"] = self.box
        return record


def build_parser() -> argparse.ArgumentParser:
    parser = create_parser("points", DESCRIPTION, RECORD, has_masks=True, help_text=PROMPTS_HELP + LABELS_HELP)
    parser.add_argument("--points", metavar='"X,Y; X,Y"', help="points, one or more for each object, see below")
    parser.add_argument("--boxes", metavar='"X1,Y1,X2,Y2"', help="boxes, one for each object, see below")
    parser.add_argument("--prompts", metavar="FILE.json", help="points and boxes of each image, see below")
    add_label_arguments(parser, "masks have no names")
    add_label_threshold(parser)
    return parser


def run(argv: Sequence[str]) -> int:
    arguments = build_parser().parse_args(_join_negative(argv))
    read_labels(arguments)
    read_label_threshold(arguments)
    prompts = read_prompts(arguments)
    plan = prepare(arguments)

    import torch

    loaded = load_model(arguments)
    if arguments.labels is not None:
        embed_labels(arguments, loaded)

    def predict_one(image: "Image.Image", name: str) -> Prediction:
        own = find_prompts(prompts, name) if isinstance(prompts, dict) else prompts
        check_inside(own, image.size)
        inputs = loaded.image_processor(image, return_tensors="pt").to(loaded.model.device)
        sizes = inputs["reshaped_input_sizes"]
        with torch.inference_mode():
            vision_embeds = loaded.model.get_vision_embeds(inputs["pixel_values"].to(loaded.model.dtype), sizes)
            masks, scores = [], []
            for prompt in own:
                pred_masks, iou_scores = loaded.model.predict_masks(
                    vision_embeds["last_hidden_state"],
                    **_model_inputs(prompt, inputs),
                    multimask_output=prompt.box is None and len(prompt.points) == 1,
                )
                best = iou_scores[0, 0].argmax()
                # One by one, because the prompts have different numbers of points, and padding changes masks.
                [mask] = loaded.image_processor.post_process_masks(
                    pred_masks[:, :, best, None].float(), inputs["original_sizes"], sizes
                )
                masks.append(mask[0, 0].cpu().numpy())
                scores.append(iou_scores[0, 0, best].item())
        records = [
            {"score": score} | prompt.record() | coco_annotation(mask)
            for score, prompt, mask in zip(scores, own, masks, strict=True)
        ]
        if arguments.labels is not None:
            per_call = max(1, MASK_MEMORY // masks[0].size)
            with torch.inference_mode():
                parts = [
                    loaded.model.embed_masks([masks[start : start + per_call]], None, sizes, vision_embeds)[0]
                    for start in range(0, len(masks), per_call)
                ]
            return name_masks(loaded, records, masks, torch.cat(parts), arguments.multi_label, arguments.threshold)
        legend: list[tuple[int | None, str]] = [
            (number, f"object {number}, {score:.2f}") for number, score in enumerate(scores, start=1)
        ]
        record = {"model": loaded.description, "masks": records}
        return Prediction(record, legend, loaded.caption, masks, list(range(1, len(masks) + 1)))

    def predict(images: "list[Image.Image]", names: list[str]) -> list[Prediction]:
        return [predict_one(image, name) for image, name in zip(images, names, strict=True)]

    return process_images(plan, predict, loaded)


def _join_negative(argv: Sequence[str]) -> list[str]:
    """Writes `--points -5,30` as `--points=-5,30`, because argparse takes "-5,30" for an option."""
    joined: list[str] = []
    for argument in argv:
        if joined and joined[-1] in ("--points", "--boxes") and re.match(r"-[\d.]", argument):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _model_inputs(prompt: Prompt, inputs) -> "dict[str, torch.Tensor]":
    """The prompt in pixels of `pixel_values`, as [`SamModel`] takes it."""
    import torch

    scale = (inputs["reshaped_input_sizes"][0] / inputs["original_sizes"][0]).flip(0).float()  # of x and y
    tensors = {}
    if prompt.points:
        points = torch.tensor(prompt.points, device=scale.device)
        tensors["input_points"] = (points[:, :2] * scale)[None, None]
        tensors["input_labels"] = points[:, 2].long()[None, None]
    if prompt.box is not None:
        tensors["input_boxes"] = (torch.tensor(prompt.box, device=scale.device) * scale.repeat(2))[None, None]
    return tensors


def read_prompts(arguments: argparse.Namespace) -> list[Prompt] | dict[str, list[Prompt]]:
    """The objects of every image, or of each by its name. Those of `--prompts` replace `arguments.prompts`. Raises
    `CommandError` if they cannot be used."""
    if arguments.prompts is not None:
        if arguments.points is not None or arguments.boxes is not None:
            raise CommandError("--prompts has points and boxes: pass either --prompts, or --points and --boxes.")
        prompts = read_prompts_file(arguments.prompts)
        arguments.prompts = {name: [prompt.record() for prompt in own] for name, own in prompts.items()}
        return prompts
    if arguments.points is None and arguments.boxes is None:
        raise CommandError('pass --points, such as "120,80", --boxes, such as "10,20,110,220", or --prompts.')
    points = None if arguments.points is None else parse_points(arguments.points)
    boxes = None if arguments.boxes is None else parse_boxes(arguments.boxes)
    if points is None or boxes is None:
        return [Prompt(points=own) for own in points or []] + [Prompt(box=box) for box in boxes or []]
    if len(points) != len(boxes):
        raise CommandError(
            f"--points has {len(points)} objects and --boxes {len(boxes)}: each box belongs to the points of the same "
            "position. Objects are separated by semicolons."
        )
    return [Prompt(own, box) for own, box in zip(points, boxes, strict=True)]


def parse_points(text: str) -> list[list[list[float]]]:
    """Splits "120,80 40,30,0; 200,90" into objects, points, and x, y and label. Raises `CommandError`."""
    objects = []
    for part in _objects("--points", text, '"120,80; 200,90"'):
        points = [_numbers("--points", point, (2, 3), "x,y or x,y,0") for point in part.split()]
        objects.append([[*point, 1.0] if len(point) == 2 else point for point in points])
    _check_prompts("--points", [Prompt(points) for points in objects])
    return objects


def parse_boxes(text: str, option: str = "--boxes") -> list[list[float]]:
    """Splits "x1,y1,x2,y2; ..." into boxes. Raises `CommandError`, whose message names the option."""
    parts = _objects(option, text, '"10,20,110,220"')
    boxes = [_numbers(option, "".join(part.split()), (4,), "x1,y1,x2,y2") for part in parts]
    _check_prompts(option, [Prompt(box=box) for box in boxes])
    return boxes


def _objects(option: str, text: str, example: str) -> list[str]:
    # Spaces around commas do not separate points.
    parts = [re.sub(r"\s*,\s*", ",", part.strip()) for part in text.split(";")]
    if parts[-1] == "":
        parts.pop()
    if not all(parts) or not parts:
        raise CommandError(f"{option} has an empty object in {text!r}: pass coordinates such as {example}.")
    return parts


def _numbers(option: str, text: str, counts: tuple[int, ...], meaning: str) -> list[float]:
    try:
        numbers = [float(number) for number in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in counts:
        raise CommandError(f"{option}: {text!r} is not {meaning}, in pixels.")
    return numbers


def _check_prompts(origin: str, prompts: list[Prompt]) -> None:
    for prompt in prompts:
        if unknown := [point[2] for point in prompt.points if point[2] not in (0, 1)]:
            raise CommandError(f"{origin}: the label of a point is 1 (inside) or 0 (outside), not {unknown[0]:g}.")
        if prompt.points and prompt.box is None and all(point[2] == 0 for point in prompt.points):
            raise CommandError(f"{origin}: an object has only points outside of it: add one inside, or a box.")
        if prompt.box is not None and not (prompt.box[0] < prompt.box[2] and prompt.box[1] < prompt.box[3]):
            raise CommandError(f"{origin}: {_text(prompt.box)} is not x1,y1,x2,y2 with x1 < x2 and y1 < y2.")


def read_prompts_file(path: str) -> dict[str, list[Prompt]]:
    """The objects of a JSON file by the names of images. Raises `CommandError`."""
    origin = f"--prompts {path}"
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file, object_pairs_hook=_unique_keys)
    except OSError as error:
        raise CommandError(f"{origin}: {error.strerror}.") from error
    except ValueError as error:
        raise CommandError(f"{origin} cannot be read: {error}.") from error
    if not isinstance(content, dict) or not content:
        raise CommandError(
            f'{origin} must be an object of images, such as {{"photo.jpg": [{{"points": [[120, 80]]}}]}}.'
        )
    prompts = {}
    for name, objects in content.items():
        if not isinstance(objects, list) or not objects:
            raise CommandError(f"{origin}: {name!r} must have a list of at least one object.")
        prompts[name] = [
            _read_object(f"{origin}: {name!r}, object {i}", one) for i, one in enumerate(objects, start=1)
        ]
    return prompts


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if repeated := sorted({key for key in keys if keys.count(key) > 1}):
        raise ValueError(f"{repeated[0]!r} is repeated")
    return dict(pairs)


def _read_object(origin: str, content: Any) -> Prompt:
    known = ("points", "point_labels", "box")
    if not isinstance(content, dict) or not set(content) <= set(known) or not set(content) & {"points", "box"}:
        raise CommandError(f"{origin} must have points or a box, and no keys but {', '.join(known)}.")
    points, box = content.get("points", []), content.get("box")
    labels = content.get("point_labels", [1] * len(points) if isinstance(points, list) else [])
    if (
        not isinstance(points, list)
        or not all(_is_numbers(point, 2) for point in points)
        or (points == [] and box is None)
    ):
        raise CommandError(f"{origin}: points must be a list of [x, y].")
    if not _is_numbers(labels, len(points)):
        raise CommandError(f"{origin}: point_labels must have 1 or 0 for each of the points.")
    if box is not None and not _is_numbers(box, 4):
        raise CommandError(f"{origin}: box must be [x1, y1, x2, y2].")
    prompt = Prompt([[*point, label] for point, label in zip(points, labels, strict=True)], box)
    _check_prompts(origin, [prompt])
    return prompt


def _is_numbers(value: Any, length: int) -> bool:
    is_list = isinstance(value, list) and len(value) == length
    return is_list and all(isinstance(number, int | float) and not isinstance(number, bool) for number in value)


def find_prompts(prompts: dict[str, list[Prompt]], name: str) -> list[Prompt]:
    """The objects of an image, by its name in the JSON or its file name. Raises `ValueError` if there are none."""
    for candidate in (name, PurePath(name).name):
        for key, own in prompts.items():
            if PurePath(key) == PurePath(candidate):  # ./photo.jpg is photo.jpg
                return own
    raise ValueError(f"--prompts has no entry {name!r}" + ("." if name == candidate else f" or {candidate!r}."))


def check_inside(prompts: Sequence[Prompt], size: tuple[int, int]) -> None:
    """Raises `ValueError` that names the first point or box outside of an image of a width and height."""
    for number, prompt in enumerate(prompts, start=1):
        named = [("point", point[:2]) for point in prompt.points]
        named += [] if prompt.box is None else [("box", prompt.box)]
        for kind, coordinates in named:
            limits = size * (len(coordinates) // 2)
            if not all(0 <= value <= limit for value, limit in zip(coordinates, limits, strict=True)):
                overlaps = kind == "box" and _overlaps(coordinates, size)
                relation = "extends beyond" if overlaps else "is outside"
                raise ValueError(
                    f"the {kind} {_text(coordinates)} of object {number} {relation} the image, which is {size[0]} "
                    f"wide and {size[1]} high."
                )


def _overlaps(box: Sequence[float], size: tuple[int, int]) -> bool:
    return box[0] < size[0] and box[1] < size[1] and box[2] > 0 and box[3] > 0


def _text(numbers: Sequence[float]) -> str:
    return ",".join(f"{number:g}" for number in numbers)
