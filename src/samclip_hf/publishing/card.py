"""The model card: its text, the provenance that is published with it, evaluation results, and the example image."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image
from safetensors.torch import load_file

from ..distillation import provenance
from ..files import write_atomically
from ..images import convert_to_rgb
from ..modeling_samclip import public_name, read_license
from ..processing_samclip import SamClipProcessor
from ..segmentation_samclip import SamClipForImageSegmentation
from ..visualization import draw_prompts, overlay_labels, overlay_masks
from .repository import PublishingError, add_code

TEMPLATE = Path(__file__).with_name("model_card.md")
PERMISSIVE_LICENSES = {"apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0"}
UNKNOWN_LICENSE = "other"  # the Hub's value for licenses outside its list
EXAMPLE_SIZE = 1024  # maximum width and height of a panel of the example image


def prepare_push(folder: Path, repo_id: str) -> None:
    """
    Adds the model code, the published provenance and a model card to a training output, so that it loads from the Hub
    without this package.

    Args:
        folder (`Path`): A model saved with its processor, and `provenance.json`.
        repo_id (`str`): The repository on the Hub.
    """
    add_code(folder)
    stages, licenses = publish_provenance(folder, folder)
    write_atomically(folder / "README.md", str(create_model_card(folder, repo_id, stages, licenses=licenses)))


def create_model_card(
    folder: Path,
    repo_id: str,
    stages: Sequence[dict[str, Any]] = (),
    results: dict[str, Any] | None = None,
    results_name: str | None = None,
    licenses: dict[str, str] | None = None,
    has_example_image: bool = False,
    license: str | None = None,
) -> ModelCard:
    """
    Fills the template with everything that is recorded. The card states what is not recorded.

    Args:
        folder (`Path`): A folder from `build_repository`.
        repo_id (`str`): The repository on the Hub.
        stages (`Sequence[dict]`): Training stages, from `publish_provenance`.
        results (`dict`, *optional*): `results.json` of an evaluation.
        results_name (`str`, *optional*): Name of this model in `results`, from `find_results`.
        licenses (`dict[str, str]`, *optional*): License of each teacher, by its name, from `publish_provenance`.
        has_example_image (`bool`): Whether the folder contains `example.png`.
        license (`str`, *optional*): License of this model. Default: if the licenses of all teachers are known and
            permissive, their license or, if they differ, "apache-2.0", else "other".

    Raises:
        PublishingError: If `results` contains no model with the name `results_name`.
    """
    config = json.loads((folder / "config.json").read_text())
    merged = config.get("clip_vision_config") is None
    licenses = licenses or {}
    sources = _add_start(provenance.teachers(stages), config.get("teachers") or {})
    names = list(dict.fromkeys(name for _, name in sources))
    on_hub = [name for name in names if _is_on_hub(name)]
    if license is None:
        known = {licenses.get(name) for name in names}
        license = UNKNOWN_LICENSE
        if known and known <= PERMISSIVE_LICENSES:
            license = known.pop() if len(known) == 1 else "apache-2.0"
    eval_results: list[EvalResult] = []
    of_model: dict[str, Any] = {}
    if results is not None:
        # Imported here because training imports this module and needs no evaluation.
        from ..evaluation import create_model_index

        if results_name is None:
            raise PublishingError("The results need the name of the model, see find_results.")
        try:
            eval_results = create_model_index(results, results_name)
        except ValueError as error:
            raise PublishingError(str(error)) from error
        of_model = _results_of_model(results, results_name)
    data = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="image-segmentation",
        tags=[
            *("samclip", "segment-anything", "clip", "zero-shot-segmentation", "mask-generation"),
            *(["distillation"] if merged else []),
        ],
        base_model=on_hub or None,
        base_model_relation="merge" if on_hub else None,
        model_name=repo_id.rpartition("/")[2] if eval_results else None,
        eval_results=eval_results or None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        repo_id=repo_id,
        merged=merged,
        dtype=config["dtype"],
        num_parameters=_num_parameters(folder),
        image_size=config["vision_config"]["image_size"],
        minimum_transformers_version=config.get("minimum_transformers_version"),
        stages=list(stages),
        teachers=[{"role": role, "name": name, "commit": commit} for (role, name), commit in sources.items()],
        licenses=licenses,
        only_miniature=all(_data_sources(stage) == {"miniature"} for stage in stages)
        if stages
        else set(names) == {"miniature"},
        labels=list(config.get("id2label", {}).values()) if config.get("vocabulary_label_ids") else [],
        has_text_tower=config["has_text_tower"],
        has_example_image=has_example_image,
        **of_model,
    )


def _add_start(
    sources: dict[tuple[str, str], str | None], start: dict[str, dict[str, str]]
) -> dict[tuple[str, str], str | None]:
    """
    Adds the models that a new model got its first weights from to the teachers of its training stages.

    Args:
        sources (`dict[tuple[str, str], str | None]`): From `provenance.teachers`. A model that is among them keeps its
            role and its commit.
        start (`dict[str, dict[str, str]]`): `SamClipConfig.teachers`.
    """
    found = dict(sources)
    for argument, role in (("sam", "SAM"), ("clip", "CLIP")):
        if argument not in start:
            continue
        name, revision = start[argument]["name"], start[argument].get("revision")
        # The provenance records relative folders as they were given.
        same = [key for key in sources if key[0].startswith(role) and name in (key[1], Path(key[1]).name)]
        for key in same or [(f"{role} as the start" if sources else role, name)]:
            found[key] = found.get(key) or revision
    return found


def _is_on_hub(name: str) -> bool:
    return name.count("/") == 1 and not Path(name).exists()


def _num_parameters(folder: Path) -> dict[str, int]:
    """Number of parameters by part of the model, which is the first component of the weights' names."""
    counts: Counter[str] = Counter()
    for file in folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            counts[name.partition(".")[0]] += tensor.numel()
    return dict(counts)


def _data_sources(stage: dict[str, Any]) -> set[str]:
    arguments = stage["arguments"]
    if "data" in arguments:  # of fine-tuning
        return {arguments["data"]}
    return {*arguments["clip_data"], *(arguments["sam_data"] if stage["stage"] == 2 else ())}


# ---- evaluation results ----


def find_results(results: dict[str, Any], source: str | Path, name: str | None = None) -> str:
    """
    Finds the results of a checkpoint by its weights.

    Args:
        results (`dict`): `results.json` of an evaluation.
        source (`str` or `Path`): The checkpoint.
        name (`str`, *optional*): The model's name in the results. Default: the name with the weights of the
            checkpoint and, if there are several, with its configuration.

    Returns:
        `str`: The name.

    Raises:
        PublishingError: If the results are not of this checkpoint's weights, or if several names have them.
    """
    # Imported here because training imports this module and needs no evaluation.
    from ..evaluation import load_adapter

    entries = {known: entry for task in results["tasks"].values() for known, entry in task["models"].items()}
    if name is not None and name not in entries:
        raise PublishingError(
            f"No results for {name!r}. Pass --results_name with one of: {', '.join(sorted(entries))}."
        )
    recorded = {known: entry.get("weights") for known, entry in entries.items()}
    if name is not None and recorded[name] is None:
        raise PublishingError(
            f"The results of {name!r} do not record the weights, because they are of a version before 0.2.0. Evaluate "
            "the checkpoint again."
        )
    try:
        adapter = load_adapter(str(source))
    except (OSError, ValueError) as error:
        raise PublishingError(f"{source} cannot be loaded: {error}") from error
    weights = adapter.weights
    if name is not None:
        if recorded[name] != weights:
            raise PublishingError(
                f"The results of {name!r} are of other weights ({recorded[name]}) than those of {source} ({weights})."
            )
        return name
    names = [known for known in entries if recorded[known] == weights]
    # With the same composition and image processor, if there are such results.
    names = [known for known in names if entries[known].get("identity") == adapter.identity] or names
    if not names:
        others = ", ".join(f"{known} ({of_known or 'not recorded'})" for known, of_known in recorded.items())
        raise PublishingError(
            f"There are no results of the weights of {source} ({weights}), but of {others}. Evaluate this checkpoint "
            "with samclip evaluate."
        )
    if len(names) > 1:
        raise PublishingError(
            f"There are several results of these weights. Pass --results_name with one of: {', '.join(names)}."
        )
    return names[0]


def _results_of_model(results: dict[str, Any], name: str) -> dict[str, Any]:
    """The template's variables for the results: the weights, a table of metrics, the protocols, and the commands that
    were run."""
    from ..evaluation.report import PER_CLASS_PREFIX, format_metric, results_of_model, to_json

    metrics: list[tuple[str, str, str]] = []
    protocols: list[tuple[str, dict[str, Any], int]] = []
    commands: dict[str, dict[str, Any]] = {}  # command -> versions; results.json may contain several runs
    weights = None
    for task, entry in results_of_model(results, name).items():
        metrics += [
            (task, metric, format_metric(value))
            for metric, value in entry["metrics"].items()
            if value is not None and not metric.startswith(PER_CLASS_PREFIX)
        ]
        protocol = to_json(results["tasks"][task]["protocol"]) | entry.get("settings", {})
        protocol.pop("categories", None)
        protocol |= {key: entry[key] for key in ("dtype", "random weights") if key in entry}
        protocols.append((task, protocol, entry["num_samples"]))
        commands[entry.get("command", results["command"])] = entry.get("environment", results["environment"])
        weights = entry.get("weights")
    return {"metrics": metrics, "protocols": protocols, "commands": commands, "evaluated_weights": weights}


# ---- provenance ----


def publish_provenance(source: str | Path, folder: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """
    Writes the provenance of a checkpoint to `folder`. Absolute paths are shortened to their last part.

    Args:
        source (`str` or `Path`): The checkpoint. No file is written if it has no `provenance.json`.
        folder (`Path`): The repository's folder, with `config.json`. It may be the same as `source`.

    Returns:
        `tuple[list[dict], dict[str, str]]`: The stages, and the licenses of the teachers and of the models that the
        configuration names as `teachers`, by name. Models whose cards cannot be read or state no license are left out.
    """
    stages = provenance.read(source)
    config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").is_file() else {}
    licenses: dict[str, str | None] = {}
    for entry in (config.get("teachers") or {}).values():
        licenses[entry["name"]] = entry.get("license") or _license(entry["name"])
    for _, name in provenance.teachers(stages):
        short = _shorten_paths(name)
        licenses[short] = licenses.get(short) or _license(short) or read_license(name)
    stages = _shorten_paths(stages)
    if stages:
        write_atomically(folder / provenance.FILE_NAME, json.dumps({"stages": stages}, indent=2) + "\n")
    return stages, {name: license for name, license in licenses.items() if license is not None}


def _shorten_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _shorten_paths(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_shorten_paths(part) for part in value]
    return public_name(value) if isinstance(value, str) and Path(value).is_absolute() else value


def _license(name: str) -> str | None:
    """License of the miniature, or from the model card of a repository on the Hub, `None` if there is none."""
    if name == "miniature":
        return "apache-2.0"
    if not _is_on_hub(name):
        return None
    try:
        return read_license(Path(hf_hub_download(name, "README.md")).parent)
    except (OSError, ValueError, EntryNotFoundError):  # no card or no connection
        return None


# ---- the example image ----


def draw_example_image(folder: Path, image: Image.Image, path: Path) -> None:
    """
    Saves an image of two or three panels: the input, the mask from a point at its center and, if the checkpoint has a
    vocabulary, the segmentation by text.

    Args:
        folder (`Path`): A folder from `build_repository`.
        image (`PIL.Image.Image`): The input. It is reduced to at most 1024 pixels in width and height.
        path (`Path`): The file to write.
    """
    image = convert_to_rgb(image)
    image.thumbnail((EXAMPLE_SIZE, EXAMPLE_SIZE))
    model = SamClipForImageSegmentation.from_pretrained(folder).eval()
    processor = SamClipProcessor.from_pretrained(folder)
    point = [image.width / 2, image.height / 2]
    inputs = processor(image, input_points=[[[point]]])
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    with torch.inference_mode():
        masks, iou_scores = model.predict_masks(
            model.get_image_embeddings(inputs["pixel_values"]), input_points=inputs["input_points"]
        )
        masks = processor.post_process_masks(masks.float(), inputs["original_sizes"], inputs["reshaped_input_sizes"])[
            0
        ]
        mask = masks[0, iou_scores[0, 0].argmax()].numpy()

        scale = -(-256 // max(image.size))  # small images are enlarged, so that labels are legible
        pixels = _enlarge(np.asarray(image), scale)
        with_mask = overlay_masks(pixels, [_enlarge(mask, scale)])
        panels = [pixels, draw_prompts(with_mask, points=np.array([point]) * scale)]
        if model.config.vocabulary_label_ids:
            outputs = model(inputs["pixel_values"], inputs["reshaped_input_sizes"])
            label_map = processor.post_process_semantic_segmentation(outputs, [(image.height, image.width)])[0]
            names = list(model.config.id2label.values())
            has_background = model.config.background_label_id is not None
            panels.append(overlay_labels(pixels, _enlarge(label_map.numpy(), scale), names, has_background))
    Image.fromarray(np.concatenate(panels, axis=1)).save(path)


def _enlarge(pixels: np.ndarray, scale: int) -> np.ndarray:
    """Repeats each pixel of `(height, width, ...)` along both axes, `scale` times."""
    return pixels.repeat(scale, axis=0).repeat(scale, axis=1)
