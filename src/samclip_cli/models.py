"""Checks that a model exists before it is loaded, loads it, and selects its thresholds of everything mode."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import CommandError, first_line, log

if TYPE_CHECKING:
    from transformers import Pipeline

WEIGHTS = (".safetensors", ".bin")


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


def mask_generation_options(name: str) -> dict[str, Any]:
    """
    Arguments of the mask generation pipeline for a model: `miniature.MASK_GENERATION` for the shipped miniature,
    `MASK_GENERATION_DEFAULTS` for any other.

    name (`str`):
        A folder or a repository on the Hub.
    """
    from samclip_hf import miniature
    from samclip_hf.mask_generation_samclip import MASK_GENERATION_DEFAULTS

    is_miniature = os.path.realpath(name) == os.path.realpath(miniature.checkpoint())
    return dict(miniature.MASK_GENERATION if is_miniature else MASK_GENERATION_DEFAULTS)


def load_pipeline(task: str, model: str | None, device: str | None, **options) -> "Pipeline":
    """
    The pipeline of a SAM-CLIP checkpoint.

    task (`str`):
        Task of [`~transformers.pipeline`].
    model (`str`, *optional*):
        A folder or a repository on the Hub. By default the shipped miniature.
    device (`str`, *optional*):
        A torch device. By default a GPU if one is available.

    Raises `CommandError` if the device or the checkpoint cannot be used.
    """
    import torch
    from transformers import AutoConfig, pipeline
    from transformers.utils import logging

    from samclip_hf import SamClipConfig, miniature

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    if device is not None:
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:  # torch without CUDA raises AssertionError
            raise CommandError(f"--device {device}: {first_line(error)}") from error
    if model is None:
        log("using the shipped miniature, which is trained on synthetic scenes, not on photographs; see --model.")
        model = miniature.checkpoint()
    try:
        config = AutoConfig.from_pretrained(model)
        if isinstance(config, SamClipConfig):
            return pipeline(task, model=model, device=device, **options)
    except Exception as error:  # a faulty checkpoint can raise any exception of the libraries that read it
        raise CommandError(f"--model {model} cannot be loaded: {first_line(error)}") from error
    raise CommandError(f"--model {model} is not a SAM-CLIP: its model type is {config.model_type!r}.")
