"""
The models of the image commands: checks that need no torch, loading, and a description for the outputs. `check_model`
also serves the other commands.
"""

import argparse
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import CommandError, first_line, log
from .argument_types import positive_int

if TYPE_CHECKING:  # importing these takes seconds, see the docstring of the package
    from transformers import PreTrainedTokenizerBase

    from samclip_hf import SamClipForImageSegmentation, SamClipImageProcessor, SamClipProcessor

MINIATURE_NAME = "samclip-hf miniature"
MINIATURE_NOTE = "trained on synthetic scenes of colored shapes, not on photographs"
# Types of models by their config.json: what they are called, and the option that takes them.
KINDS = {
    "samclip": ("a SAM-CLIP", "--model"),
    "sam": ("a SAM", "--sam"),
    "clip": ("a CLIP", "--clip"),
    "siglip": ("a SigLIP", "--clip"),
}
WANTED = {
    "--model": "a SAM-CLIP",
    "--sam": "a SAM, such as facebook/sam-vit-base",
    "--clip": "a CLIP or SigLIP, such as openai/clip-vit-base-patch16",
}
ADVICE = {
    "--model": "pass it as --model, without --sam and --clip",
    "--sam": "pass it as --sam, and a CLIP or SigLIP as --clip",
    "--clip": "pass it as --clip, and a SAM as --sam",
}
WEIGHTS = (".safetensors", ".bin")
EVERYTHING_OPTIONS = ("points_per_crop", "pred_iou_thresh", "stability_score_thresh")
MINIATURE_DEFAULT = (
    "the miniature that ships with the package is used. It is\n  trained on synthetic scenes, not on photographs; its "
    "outputs say so."
)


def check_model(name: str, option: str = "--model", needs_weights: bool = True) -> None:
    """
    Checks that a model exists, without importing torch. transformers would report a missing folder as an invalid
    repository name, and without a connection it would repeat every request for half a minute.

    name (`str`):
        A folder, or a repository that is on the Hub or in the local cache.
    option (`str`, *optional*, defaults to `"--model"`):
        The argument that has this value, for the message.

    Raises `CommandError` if neither exists, or if it has no `config.json`.
    """
    origin = f"{option} {name or repr(name)}"
    if os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, "config.json")):
            raise CommandError(f"{origin}: the folder contains no model, because it has no config.json.")
        return
    if os.path.exists(name):
        raise CommandError(f"{origin} is a file: pass the folder of the model.")

    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        cached = try_to_load_from_cache(name, "config.json")
        is_cached = isinstance(cached, str) and (
            not needs_weights or any(path.suffix in WEIGHTS for path in Path(cached).parent.iterdir())
        )
        get_hf_file_metadata(hf_hub_url(name, "config.json"))
        return
    except HFValidationError:
        raise CommandError(f"{origin}: no such folder.") from None
    except GatedRepoError:  # a subclass of RepositoryNotFoundError
        raise CommandError(
            f"{origin}: access to this repository is restricted. Ask for it on the repository's page on the Hub, and "
            "log in with 'hf auth login'."
        ) from None
    except RepositoryNotFoundError:
        raise CommandError(
            f"{origin}: no such folder, and no such repository on the Hub. For a private repository, log in with "
            "'hf auth login'."
        ) from None
    except EntryNotFoundError:
        raise CommandError(f"{origin}: the repository contains no model, because it has no config.json.") from None
    except OfflineModeIsEnabled:
        problem = "HF_HUB_OFFLINE is set"
    except Exception as error:  # HTTP clients raise many types for connection errors
        problem = f"the Hub cannot be reached ({first_line(error)})"
    if not is_cached:
        raise CommandError(f"{origin}: no such folder, the repository is not in the cache, and {problem}.")
    if not constants.HF_HUB_OFFLINE:
        print(f"samclip: {problem}: models are read from the cache.", file=sys.stderr)
        # Otherwise a request for each file that the repository does not have is repeated for 23 seconds.
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"  # for processes that this one starts


def add_model_arguments(parser: argparse.ArgumentParser, default: str = MINIATURE_DEFAULT) -> None:
    """Adds `--model`, `--sam`, `--clip`, `--clip_image_size` and `--device`. `default` is what happens without a
    model, for the help."""
    group = parser.add_argument_group("model", f"Without --model, --sam and --clip, {default}")
    group.add_argument("--model", metavar="NAME", help="a SAM-CLIP: a folder or a repository on the Hub")
    group.add_argument(
        "--sam",
        metavar="NAME",
        help="a SAM, such as facebook/sam-vit-base; works with --clip, without training",
    )
    group.add_argument("--clip", metavar="NAME", help="a CLIP or SigLIP, such as openai/clip-vit-base-patch16")
    group.add_argument(
        "--clip_image_size",
        type=positive_int,
        metavar="PIXELS",
        help="height and width of the input of --clip: smaller objects are recognized with a larger size, at a higher "
        "cost (default: twice the size of its training, up to 448)",
    )
    group.add_argument("--device", help="such as cpu, cuda:1 or mps (default: a GPU if one is available)")


def check_models(arguments: argparse.Namespace) -> None:
    """Checks that the models of the command line exist and are of the right kind, without importing torch. Raises
    `CommandError` otherwise."""
    if arguments.model is not None and (arguments.sam is not None or arguments.clip is not None):
        raise CommandError("--model is a whole SAM-CLIP: pass either --model, or --sam and --clip.")
    for given, missing in (("sam", "clip"), ("clip", "sam")):
        if getattr(arguments, given) is not None and getattr(arguments, missing) is None:
            raise CommandError(f"--{given} needs --{missing}, too: {WANTED[f'--{missing}']}.")
    if arguments.clip_image_size is not None and arguments.clip is None:
        raise CommandError("--clip_image_size has no effect without --sam and --clip.")
    for option in ("--model", "--sam", "--clip"):
        name = getattr(arguments, option[2:])
        if name is not None:
            check_model(name, option)
            _check_kind(name, option)


def _check_kind(name: str, option: str) -> None:
    path = os.path.join(name, "config.json")
    try:
        if not os.path.isdir(name):
            from huggingface_hub import hf_hub_download

            path = hf_hub_download(name, "config.json")
        with open(path, encoding="utf-8") as file:
            model_type = json.load(file).get("model_type")
    except (OSError, ValueError, AttributeError) as error:  # no JSON, or no object
        raise CommandError(f"{option} {name}: its config.json cannot be read: {first_line(error)}") from error
    kind, right_option = KINDS.get(model_type, (None, None))
    if right_option == option:
        return
    if kind is not None and right_option is not None:
        raise CommandError(f"{option} {name} is {kind}: {ADVICE[right_option]}.")
    hint = " SigLIP 2 works with a fixed image size, such as google/siglip2-base-patch16-224."
    raise CommandError(
        f"{option} {name} has the model type {model_type!r}, but must be {WANTED[option]}."
        + (hint if model_type == "siglip2" else "")
    )


@dataclass
class LoadedModel:
    """
    A model with its processors.

    model ([`SamClipForImageSegmentation`]):
        In evaluation mode, on its device.
    image_processor ([`SamClipImageProcessor`])
    tokenizer ([`PreTrainedTokenizerBase`], *optional*):
        `None` if the model has no text tower.
    description (`dict`):
        For the field `model` of the JSON: `name`, or `sam`, `clip` and `clip_image_size`; and a `note` for the
        miniature.
    names (`list[str]`):
        Names of the masks' labels 1, 2, ..., which the command sets; empty if masks have no names.
    """

    model: "SamClipForImageSegmentation"
    image_processor: "SamClipImageProcessor"
    tokenizer: "PreTrainedTokenizerBase | None"
    description: dict[str, Any]
    names: list[str] = field(default_factory=list)

    @property
    def processor(self) -> "SamClipProcessor | SamClipImageProcessor":
        """The processor of images and texts, or of images alone if the model has no text tower."""
        from samclip_hf import SamClipProcessor

        return (
            self.image_processor if self.tokenizer is None else SamClipProcessor(self.image_processor, self.tokenizer)
        )

    @property
    def caption(self) -> str:
        """One line for annotated images, with the last component of folders only."""
        about = self.description
        parts = [about[key] for key in ("name", "sam", "clip") if key in about]
        name = " + ".join(Path(part).resolve().name if os.path.isdir(part) else part for part in parts)
        return f"Model: {name}" + (f", {about['note']}" if "note" in about else "")


def load_model(arguments: argparse.Namespace) -> LoadedModel:
    """Loads the model of the command line, see [`add_model_arguments`]. Raises `CommandError` if the device or the
    model cannot be used, or if the model lacks weights."""
    import torch
    from transformers import AutoImageProcessor
    from transformers.utils import logging

    from samclip_hf import SamClipForImageSegmentation, SamClipProcessor, miniature
    from samclip_hf.modeling_samclip import load_complete_model, load_tokenizer

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    device = arguments.device or torch.accelerator.current_accelerator(check_available=True) or "cpu"
    if (count := torch.accelerator.device_count()) > 1:  # the processes of accelerate launch use different GPUs
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", 0)) % count)
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises AssertionError
        raise CommandError(f"--device {device}: {first_line(error)}") from error
    name, sam, clip = arguments.model, arguments.sam, arguments.clip
    if name is None and sam is None:
        log(
            "using the shipped miniature, which is trained on synthetic scenes, not on photographs. For photographs, "
            "pass --sam and --clip, or --model."
        )
        name = miniature.checkpoint()
    try:
        if sam is not None:
            model: SamClipForImageSegmentation = SamClipForImageSegmentation.from_teachers(
                sam, clip, merged=False, clip_image_size=arguments.clip_image_size
            )
            processor = SamClipProcessor.from_teachers(sam, clip)
            image_processor, tokenizer = processor.image_processor, processor.tokenizer
            description = {"sam": sam, "clip": clip, "clip_image_size": model.config.clip_image_size}
        else:
            model = load_complete_model(SamClipForImageSegmentation, name)
            image_processor = AutoImageProcessor.from_pretrained(name)
            tokenizer = load_tokenizer(name) if model.config.has_text_tower else None
            description = {"name": MINIATURE_NAME if _is_same(name, miniature.checkpoint()) else name}
    except Exception as error:  # a faulty checkpoint can raise any exception of the libraries that read it
        given = f"--model {name}" if sam is None else f"--sam {sam} --clip {clip}"
        if arguments.clip_image_size is not None:
            given += f" --clip_image_size {arguments.clip_image_size}"
        raise CommandError(f"{given} cannot be loaded: {first_line(error)}") from error
    if _has_miniature_encoder(model):
        description["note"] = MINIATURE_NOTE
    return LoadedModel(model.to(device).eval(), image_processor, tokenizer, description)


def _has_miniature_encoder(model: "SamClipForImageSegmentation") -> bool:
    """Whether an image encoder of the model has the weights of a shipped miniature, from whatever folder."""
    from samclip_hf import miniature

    return _is_miniature_sam(model) or _has_weights(
        model, miniature.clip_teacher(), "vision_model.", "clip_head.vision_model."
    )


def _is_miniature_sam(model: "SamClipForImageSegmentation") -> bool:
    """Whether the image encoder that the masks come from has the weights of a shipped miniature."""
    from samclip_hf import miniature

    folders = (miniature.checkpoint(), miniature.sam_teacher())
    return any(_has_weights(model, folder, "vision_encoder.", "vision_encoder.") for folder in folders)


def _has_weights(model: "SamClipForImageSegmentation", folder: str, saved: str, prefix: str) -> bool:
    """Whether the weights of a model whose names start with `prefix` are those of a saved model, whose names start
    with `saved`."""
    import torch
    from safetensors.torch import load_file

    own, weights = model.state_dict(), load_file(os.path.join(folder, "model.safetensors"))
    pairs = [(own.get(prefix + name[len(saved) :]), weights[name]) for name in weights if name.startswith(saved)]
    return all(one is not None and one.shape == other.shape for one, other in pairs) and all(
        torch.equal(one.cpu().float(), other.float()) for one, other in pairs if one is not None
    )


def mask_generation_options(loaded: LoadedModel, arguments: argparse.Namespace | None = None) -> dict[str, Any]:
    """Arguments of the mask generation pipeline for a model: `miniature.MASK_GENERATION` for the weights of the
    shipped miniatures, `MASK_GENERATION_DEFAULTS` for any other. Those of `EVERYTHING_OPTIONS` that are given on the
    command line replace them."""
    from samclip_hf import miniature
    from samclip_hf.mask_generation_samclip import MASK_GENERATION_DEFAULTS

    options = dict(miniature.MASK_GENERATION if _is_miniature_sam(loaded.model) else MASK_GENERATION_DEFAULTS)
    given = {name: getattr(arguments, name, None) for name in EVERYTHING_OPTIONS}
    return options | {name: value for name, value in given.items() if value is not None}


def _is_same(name: str, folder: str) -> bool:
    return os.path.realpath(name) == os.path.realpath(folder)
