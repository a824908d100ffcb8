"""Arguments of a training run. The recipes in `samclip_hf/recipes/` set them."""

import functools
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import TrainingArguments

# Old name -> new name. Old names are accepted for one release, with a `FutureWarning`.
DEPRECATED_ARGUMENTS = {
    "clip_teacher_store": "clip_embedding_cache",
    "clip_data_shares": "clip_data_weights",
    "sam_data_shares": "sam_data_weights",
    "sam_shards_share": "sam_shard_fraction",
    "held_out_share": "eval_fraction",
    "max_bad_share": "max_corrupt_fraction",
    "clip_sizes": "clip_resolutions",
    "sam_sizes": "sam_resolutions",
    "min_crop": "min_crop_scale",
    "data_lanes": "num_readers",
    "encoder_learning_rate_scale": "encoder_lr_multiplier",
    "max_step_grad_norm": "skip_step_grad_norm",
    "panel_texts": "eval_prompts",
}


def rename_deprecated_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """
    Replaces deprecated argument names by the current ones.

    Args:
        arguments (`Mapping[str, Any]`): Values by argument name.

    Returns:
        `dict[str, Any]`: The same values in the same order, by current names.

    Raises:
        TypeError: If an argument is given by its deprecated and by its current name.
    """
    renamed: dict[str, Any] = {}
    for name, value in arguments.items():
        current = DEPRECATED_ARGUMENTS.get(name, name)
        if current != name and current in arguments:
            raise TypeError(f"{name} is the deprecated name of {current}: set only {current}.")
        renamed[current] = value
    return renamed


def warn_of_deprecated_argument(name: str) -> None:
    """Emits a `FutureWarning` that states the current name of the deprecated argument `name`."""
    message = f"{name} is deprecated and will be removed in a future release. Use {DEPRECATED_ARGUMENTS[name]}."
    warnings.warn(message, FutureWarning, stacklevel=3)


def _accept_deprecated_arguments(cls: type) -> type:
    """Class decorator: `__init__` accepts deprecated argument names. A dataclass generates its own `__init__`, which
    can only be wrapped from outside."""
    generated_init = cls.__init__  # type: ignore[misc]

    @functools.wraps(generated_init)
    def __init__(self, *args, **kwargs):
        for name in kwargs.keys() & DEPRECATED_ARGUMENTS.keys():
            warn_of_deprecated_argument(name)
        generated_init(self, *args, **rename_deprecated_arguments(kwargs))

    cls.__init__ = __init__  # type: ignore[misc]
    return cls


@_accept_deprecated_arguments
@dataclass
class SamClipTrainingArguments(TrainingArguments):
    r"""
    transformers' [`TrainingArguments`] and the paper's recipe (section 4, "Implementation details"). Batch sizes are
    those below, by task; `per_device_train_batch_size` is not used. A stage lasts `max_steps` optimizer steps.
    """

    stage: Literal[1, 2, 3] = field(
        default=1,
        metadata={
            "help": "1: CLIP head on a frozen encoder. 2: encoder and both heads, both losses in every optimizer "
            "step. 3: CLIP head at all resolutions (paper, section 4)."
        },
    )
    model: str | None = field(
        default=None,
        metadata={"help": "A SAM-CLIP checkpoint to go on from. Without it, one is built from the two teachers."},
    )
    sam_teacher: str = field(
        default="miniature", metadata={"help": "A SamModel on the Hub or in a folder, or 'miniature'."}
    )
    sam_student: str | None = field(
        default=None,
        metadata={
            "help": "A SamModel that a new student starts from where it is not the sam_teacher itself, such as ViT-B "
            "below a ViT-H teacher."
        },
    )
    clip_teacher: str = field(
        default="miniature", metadata={"help": "A CLIPModel or SiglipModel on the Hub or in a folder, or 'miniature'."}
    )
    clip_embedding_cache: str | None = field(
        default=None,
        metadata={
            "help": "A folder from cache_teacher.py: the CLIP teacher's embeddings, computed once. Training then does "
            "not run the teacher; a new model still takes its text tower from it."
        },
    )
    clip_head_layers: int = field(
        default=3, metadata={"help": "Transformer layers of a new model's CLIP head (paper, appendix A: 3)."}
    )
    clip_head_pooling: Literal["max", "mean"] = field(
        default="max", metadata={"help": "How a new model's CLIP head pools its patches (paper: max)."}
    )
    clip_head_initialization: Literal["copied", "random"] = field(
        default="copied",
        metadata={
            "help": "What the layers of a new model's CLIP head start from: copies of SAM's last one (paper, appendix "
            "A) or random weights (as its main text can be read)."
        },
    )
    clip_data: list[str] = field(
        default_factory=lambda: ["miniature"],
        metadata={"help": "Images for the CLIP loss: 'miniature', folders, globs, hf:// names, names on the Hub."},
    )
    sam_data: list[str] = field(
        default_factory=lambda: ["miniature"],
        metadata={"help": "Images with SA-1B's annotations for the SAM loss, named as clip_data."},
    )
    clip_data_weights: list[float] | None = field(
        default=None,
        metadata={"help": "How much of each of clip_data to take, in any unit. By default as much of each."},
    )
    sam_data_weights: list[float] | None = field(
        default=None,
        metadata={"help": "How much of each of sam_data to take, in any unit. By default as much of each."},
    )
    sam_shard_fraction: float = field(
        default=1.0,
        metadata={"help": "Of the tars of sam_data, drawn at random but always the same ones (paper: 0.057)."},
    )
    eval_fraction: float = field(
        default=0.01,
        metadata={"help": "Of all samples, by their keys: left out of training, for validation (paper: 0.01)."},
    )
    max_corrupt_fraction: float = field(
        default=0.1,
        metadata={"help": "Training stops when more of the samples cannot be used; all that are skipped are counted."},
    )
    clip_resolutions: list[int] = field(
        default_factory=lambda: [224, 448],
        metadata={"help": "Resolutions of the CLIP loss in pixels; one is drawn for each step (paper: 224, 448)."},
    )
    clip_batch_size: int = field(
        default=32,
        metadata={
            "help": "Images for the CLIP loss a process and micro-batch, at the smallest of clip_resolutions; at a larger, "
            "as many as have about the same number of pixels (paper: 2048 in all)."
        },
    )
    sam_batch_size: int = field(
        default=4, metadata={"help": "Images for the SAM loss a process and micro-batch (paper: 32 in all)."}
    )
    sam_resolutions: list[int] = field(
        default_factory=list,
        metadata={
            "help": "Resolutions at which the student sees images for the SAM loss; one is drawn for each step. By "
            "default the teacher's alone, as in the paper; others, and SAM's size among clip_resolutions, work against a "
            "student that is a SAM at one size and a CLIP at another."
        },
    )
    masks_per_image: int = field(default=32, metadata={"help": "Prompts an image for the SAM loss (paper: 32)."})
    max_box_noise: float = field(
        default=20.0, metadata={"help": "Largest noise of a box prompt, in pixels of the model's input (SAM: 20)."}
    )
    min_crop_scale: float = field(
        default=0.5, metadata={"help": "Smallest share of an image that a random crop for the CLIP loss shows."}
    )
    num_readers: int = field(
        default=16,
        metadata={
            "help": "Shards of a stream that are read side by side, in all processes together; best a multiple of "
            "processes x dataloader_num_workers. Part of what decides over the order of samples, like the seed."
        },
    )
    shuffle_buffer: int = field(
        default=1000,
        metadata={"help": "Samples of clip_data that are shuffled with one another, and held, in all processes."},
    )
    sam_shuffle_buffer: int = field(
        default=200, metadata={"help": "The same of sam_data, whose samples take about a megabyte each."}
    )
    sam_loss_weight: float = field(
        default=10.0, metadata={"help": "Lambda in L_CLIP + lambda * L_SAM (paper, section 3: 10)."}
    )
    focal_weight: float = field(default=20.0, metadata={"help": "Of the focal part in L_SAM (SAM: 20)."})
    dice_weight: float = field(default=1.0, metadata={"help": "Of the dice part in L_SAM (SAM: 1)."})
    iou_head_weight: float = field(default=1.0, metadata={"help": "Of the IoU head's part in L_SAM (SAM: 1)."})
    encoder_lr_multiplier: float = field(
        default=0.1,
        metadata={"help": "Learning rate of image encoder and SAM head, relative to the CLIP head's (paper: 0.1)."},
    )
    skip_step_grad_norm: float = field(
        default=float("inf"),
        metadata={
            "help": "A step whose gradient's norm, before clipping, is larger or not finite is not taken, and is "
            "counted; ten of them in a row end the training."
        },
    )
    lora_r: int = field(
        default=0,
        metadata={
            "help": "In stage 2: train LoRA adapters of this rank on image encoder and mask decoder, instead of all "
            "their weights; the CLIP head in full. 0: no adapters."
        },
    )
    eval_batches: int = field(
        default=8,
        metadata={
            "help": "With eval_strategy and eval_steps: micro-batches of held-out samples, always the same ones."
        },
    )
    eval_prompts: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Texts whose places the panel shows that every evaluation draws, such as 'a photo of a dog'."
        },
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Steps are built by this package: keep it."})
    dataloader_drop_last: bool = field(default=False, metadata={"help": "Streams are endless: no effect."})
    ignore_data_skip: bool = field(default=True, metadata={"help": "Streams resume by themselves: keep it."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept."})

    def __post_init__(self):
        super().__post_init__()
        if self.max_steps <= 0:
            raise ValueError("Streams are endless: say with max_steps how many optimizer steps this stage lasts.")
        if self.torch_compile:
            # One graph a size: torch 2.14 cannot compile the backward pass of graphs with symbolic sizes.
            os.environ.setdefault("ACCELERATE_DYNAMO_USE_DYNAMIC", "false")
        if self.push_to_hub and self.hub_token is not None:
            raise ValueError(
                "hub_token would be published: training_args.bin, which is pushed, holds it. Log in by `hf auth "
                "login`, or set HF_TOKEN."
            )
        for name in (
            "clip_batch_size",
            "sam_batch_size",
            "masks_per_image",
            "num_readers",
            "shuffle_buffer",
            "sam_shuffle_buffer",
            "eval_batches",
            "gradient_accumulation_steps",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}.")
        for name in ("clip_data", "sam_data"):
            names, weights = getattr(self, name), getattr(self, f"{name}_weights")
            if weights is None:
                setattr(self, f"{name}_weights", [1.0] * len(names))
            elif len(weights) != len(names) or min(weights) <= 0:
                raise ValueError(
                    f"{name}_weights must be {len(names)} numbers above 0, one for each of {name}, got {weights}."
                )
        if not 0 < self.sam_shard_fraction <= 1:
            raise ValueError(f"sam_shard_fraction is a share, above 0 and up to 1, got {self.sam_shard_fraction}.")
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"eval_fraction is a share, from 0 and below 1, got {self.eval_fraction}.")
        if self.eval_strategy != "no" and self.eval_fraction == 0:
            raise ValueError("An evaluation needs held-out samples: eval_fraction is 0.")
        if not 0 <= self.max_corrupt_fraction <= 1:
            raise ValueError(f"max_corrupt_fraction is a share, from 0 to 1, got {self.max_corrupt_fraction}.")
        if not 0 < self.min_crop_scale <= 1:
            raise ValueError(
                f"min_crop_scale is a share of the image, above 0 and up to 1, got {self.min_crop_scale}."
            )
        if not self.clip_resolutions or min(self.clip_resolutions) < 1:
            raise ValueError(f"clip_resolutions must be one or more sizes in pixels, got {self.clip_resolutions}.")
        if min(self.sam_loss_weight, self.focal_weight, self.dice_weight, self.iou_head_weight) < 0:
            raise ValueError("Loss weights must be 0 or more.")
        if not self.learning_rate >= 0:
            raise ValueError(f"learning_rate must be 0 or more, got {self.learning_rate}.")
        if self.encoder_lr_multiplier < 0:
            raise ValueError(f"encoder_lr_multiplier must be 0 or more, got {self.encoder_lr_multiplier}.")
        if self.clip_head_layers < 1:
            raise ValueError(f"clip_head_layers must be 1 or more, got {self.clip_head_layers}.")
        if not self.max_grad_norm > 0:
            raise ValueError("max_grad_norm must be above 0, inf for no clipping: by it, steps gone wrong are found.")
        if not self.skip_step_grad_norm > 0:
            raise ValueError(f"skip_step_grad_norm must be above 0, got {self.skip_step_grad_norm}.")
        if self.max_box_noise < 0:
            raise ValueError(f"max_box_noise must be 0 or more pixels, got {self.max_box_noise}.")
        if self.stage not in (1, 2, 3):
            raise ValueError(f"stage must be 1, 2 or 3, got {self.stage}.")
        if self.lora_r < 0 or (self.lora_r and self.stage != 2):
            raise ValueError(f"lora_r is 0 or more, and for stage 2 alone; got {self.lora_r} in stage {self.stage}.")
        # DDP must expect that a micro-batch of one teacher leaves the other head alone.
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = self.stage == 2

    def __getattr__(self, name: str) -> Any:
        if name in DEPRECATED_ARGUMENTS:
            warn_of_deprecated_argument(name)
            return getattr(self, DEPRECATED_ARGUMENTS[name])
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
