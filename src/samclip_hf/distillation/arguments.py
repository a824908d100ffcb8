"""Arguments of a training run. The recipes in `samclip_hf/recipes/` set them."""

import functools
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Literal

from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.utils import logging

logger = logging.get_logger(__name__)

SCHEDULES_WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")  # of transformers.get_scheduler

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


def _never(args: "SamClipTrainingArguments") -> bool:
    return False


# Arguments that have no effect, or only under a condition: their names, the condition, and what to do instead. Any
# value but the default raises an error if the condition does not hold. All other arguments have an effect.
WITHOUT_EFFECT: tuple[tuple[tuple[str, ...], Callable[["SamClipTrainingArguments"], bool], str], ...] = (
    (("num_train_epochs",), _never, "The data are endless streams: set max_steps."),
    (("per_device_train_batch_size",), _never, "Set clip_batch_size and, in stage 2, sam_batch_size."),
    (("auto_find_batch_size",), _never, "Set clip_batch_size and, in stage 2, sam_batch_size to what fits in memory."),
    (
        ("per_device_eval_batch_size", "eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object"),
        _never,
        "Evaluations use micro-batches of the size of the training's: set eval_batches.",
    ),
    (
        ("prediction_loss_only", "include_for_metrics", "batch_eval_metrics", "do_predict"),
        _never,
        "Evaluations compute the losses and their metrics.",
    ),
    (("do_eval",), lambda args: args.eval_strategy != "no", "Set eval_strategy."),
    (("eval_on_start",), lambda args: args.eval_strategy != "no", "Set eval_strategy too."),
    (("bf16_full_eval", "fp16_full_eval"), _never, "Evaluations use the precision of the training: set bf16 or fp16."),
    (
        ("label_smoothing_factor", "label_names", "average_tokens_across_devices"),
        _never,
        "The losses compare student and teachers: there are no labels.",
    ),
    (
        ("include_num_input_tokens_seen",),
        lambda args: args.include_num_input_tokens_seen in ("no", False),
        "The log has the number of images.",
    ),
    (
        ("neftune_noise_alpha", "use_cache", "use_liger_kernel", "liger_kernel_config"),
        _never,
        "It is for language models only.",
    ),
    (("optim_target_modules",), _never, "Optimizers with parameter groups of their own are not supported."),
    (("lr_scheduler_kwargs",), lambda args: args.lr_scheduler_type != "constant", "Set lr_scheduler_type."),
    (("torch_empty_cache_steps",), _never, "Set clip_batch_size and sam_batch_size to what fits in memory."),
    (("enable_jit_checkpoint",), _never, "SIGTERM always ends the training with a checkpoint."),
    (("parallelism_config",), _never, "Use DDP or FSDP."),
    (("data_seed",), _never, "seed determines the order of the samples too."),
    (
        (
            *("remove_unused_columns", "dataloader_drop_last", "train_sampling_strategy", "length_column_name"),
            *("group_by_length", "dataloader_persistent_workers", "dataloader_in_order"),
            "dataloader_multiprocessing_context",
        ),
        _never,
        "This package reads endless streams and builds the batches.",
    ),
    (("dataloader_pin_memory",), lambda args: args.use_cpu, "Memory is not pinned."),
    (("ignore_data_skip",), _never, "Streams resume by themselves."),
    (
        (
            *("sam_data", "sam_shard_fraction", "sam_batch_size", "sam_resolutions", "sam_data_weights"),
            *("masks_per_image", "sam_shuffle_buffer"),
        ),
        lambda args: args.reads_masks,
        "Only stage 2 and the region loss (region_loss_weight, dense_loss_weight) read images with masks.",
    ),
    (
        (
            "max_box_noise",
            "mask_prompt_fraction",
            "mask_loss",
            "sam_loss_weight",
            "focal_weight",
            "dice_weight",
            "iou_head_weight",
        ),
        lambda args: args.has_sam_loss,
        "Only stage 2 has the SAM loss.",
    ),
    (
        ("encoder_lr_multiplier", "decoder_lr_multiplier"),
        lambda args: args.stage == 2,
        "Only stage 2 trains image encoder and mask decoder.",
    ),
    (
        ("regions_per_image", "region_image_size", "region_embedding_cache"),
        lambda args: args.has_region_loss,
        "There is no region loss: set region_loss_weight or dense_loss_weight.",
    ),
    (
        ("clip_head_layers", "clip_head_pooling", "clip_head_initialization"),
        lambda args: args.model is None,
        "The CLIP head is that of model.",
    ),
)


def check_effects(args: "SamClipTrainingArguments") -> None:
    """Raises `ValueError` for an argument that is set but has no effect."""
    defaults = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(args)
    }
    for names, has_effect, remedy in args.without_effect:
        for name in defaults.keys() & set(names):
            value = getattr(args, name)
            if value != defaults[name] and not has_effect(args):
                raise ValueError(f"{name} has no effect here, but is {value!r}. {remedy}")


def check_names(args: "SamClipTrainingArguments", names: Collection[str]) -> None:
    """Raises `ValueError` if one of the given arguments never has an effect, also if its value is the default."""
    for without_effect, has_effect, remedy in args.without_effect:
        for name in without_effect:
            if name in names and has_effect is _never:
                raise ValueError(f"{name} has no effect. {remedy}")


def check_reports(report_to: list[str]) -> None:
    """Raises `ValueError` if the package of a logging integration is not installed."""
    available = get_available_reporting_integrations()
    for name in report_to:
        # flyte is not in the list of transformers. Names that transformers does not know raise an error in `Trainer`.
        if name not in available and name != "flyte":
            raise ValueError(
                f"report_to is {name!r}, but no package of this name is installed. Install it, or set report_to to "
                f"one of: {', '.join(['none', *available])}."
            )


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
    The arguments of [`TrainingArguments`] and those of the paper's training (section 4, "Implementation details").

    `max_steps` is the number of optimizer steps of the stage. `clip_batch_size` and `sam_batch_size` replace
    `per_device_train_batch_size`. Arguments of [`TrainingArguments`] that have no effect raise an error: see
    `WITHOUT_EFFECT`.

    Raises:
        ValueError: If a value is out of its range, if arguments do not fit together, or if one has no effect.
    """

    without_effect: ClassVar = WITHOUT_EFFECT

    stage: Literal[1, 2, 3] = field(
        default=1,
        metadata={
            "help": "Training stage. 1: trains the CLIP head on the frozen image encoder. 2: trains image encoder, "
            "mask decoder and CLIP head with both losses in every optimizer step. 3: trains the CLIP head at all "
            "resolutions (paper, section 4)."
        },
    )
    model: str | None = field(
        default=None,
        metadata={
            "help": "SAM-CLIP checkpoint to start from, on the Hub or in a folder. By default a new model is built "
            "from the two teachers."
        },
    )
    sam_teacher: str = field(
        default="miniature", metadata={"help": "SAM teacher: a SamModel on the Hub or in a folder, or 'miniature'."}
    )
    sam_student: str | None = field(
        default=None,
        metadata={
            "help": "SamModel that a new model is initialized from, for example a ViT-B for a ViT-H teacher. By "
            "default sam_teacher."
        },
    )
    clip_teacher: str = field(
        default="miniature",
        metadata={"help": "CLIP teacher: a CLIPModel or SiglipModel on the Hub or in a folder, or 'miniature'."},
    )
    clip_embedding_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder with precomputed embeddings of the CLIP teacher, the output of `samclip embed`. They "
            "replace the teacher's forward pass; a new model still contains its text tower."
        },
    )
    clip_head_layers: int = field(
        default=3,
        metadata={"help": "Number of transformer layers in the CLIP head of a new model (paper, appendix A: 3)."},
    )
    clip_head_pooling: Literal["max", "mean"] = field(
        default="max", metadata={"help": "Pooling of the CLIP head of a new model (paper, section 3: max)."}
    )
    clip_head_initialization: Literal["copied", "random"] | None = field(
        default=None,
        metadata={
            "help": "Initialization of the layers in the CLIP head of a new model. copied: from the last layer of "
            "SAM's image encoder (paper, appendix A). random: random weights (a reading of section 3). By default "
            "copied in stage 1. Stage 2 builds a new model only if this is set."
        },
    )
    clip_data: list[str] = field(
        default_factory=lambda: ["miniature"],
        metadata={
            "help": "Images for the CLIP loss: folders, globs, hf:// paths, names of datasets on the Hub, or "
            "'miniature'."
        },
    )
    sam_data: list[str] = field(
        default_factory=lambda: ["miniature"],
        metadata={"help": "Images with SA-1B annotations for the SAM loss, in the same forms as clip_data."},
    )
    clip_data_weights: list[float] | None = field(
        default=None,
        metadata={"help": "Sampling weight of each entry of clip_data, in any unit. By default all are equal."},
    )
    sam_data_weights: list[float] | None = field(
        default=None,
        metadata={"help": "Sampling weight of each entry of sam_data, in any unit. By default all are equal."},
    )
    sam_shard_fraction: float = field(
        default=1.0,
        metadata={
            "help": "Fraction of the tars of sam_data that is used. The selection is random with a fixed seed (paper: "
            "0.057)."
        },
    )
    eval_fraction: float = field(
        default=0.01,
        metadata={
            "help": "Fraction of the samples that is held out for validation. It is selected by a hash of their keys "
            "(paper: 0.01)."
        },
    )
    max_corrupt_fraction: float = field(
        default=0.1,
        metadata={
            "help": "Corrupt samples are skipped, counted and logged. Training stops if a larger fraction of the "
            "recent samples is corrupt."
        },
    )
    clip_resolutions: list[int] = field(
        default_factory=lambda: [224, 448],
        metadata={
            "help": "Resolutions of the CLIP loss in pixels. One is drawn for each optimizer step (paper: 224, 448); "
            "one that is listed twice is drawn twice as often."
        },
    )
    clip_batch_size: int = field(
        default=32,
        metadata={
            "help": "Images for the CLIP loss per process and micro-batch at the smallest of clip_resolutions. Larger "
            "resolutions have fewer images, with about the same number of pixels (paper: 2048 in all processes)."
        },
    )
    sam_batch_size: int = field(
        default=4,
        metadata={"help": "Images for the SAM loss per process and micro-batch (paper: 32 in all processes)."},
    )
    sam_resolutions: list[int] = field(
        default_factory=list,
        metadata={
            "help": "Resolutions of the student's images for the SAM loss in pixels. One is drawn for each optimizer "
            "step. By default the teacher's resolution only, as in the paper. If the resolutions of both losses do "
            "not overlap, the student may learn SAM's features at one resolution and CLIP's at another. Add "
            "resolutions of clip_resolutions here, or SAM's resolution to clip_resolutions, to prevent this."
        },
    )
    masks_per_image: int = field(
        default=32, metadata={"help": "Number of prompts per image for the SAM loss (paper: 32)."}
    )
    max_box_noise: float = field(
        default=20.0, metadata={"help": "Largest noise of a box prompt in pixels of the model's input (SAM: 20)."}
    )
    mask_prompt_fraction: float = field(
        default=0.0,
        metadata={
            "help": "Fraction of the steps whose prompts for the SAM loss are coarse masks with three points, like "
            "those of the paper's composition (section 5). The other steps have points or boxes."
        },
    )
    min_crop_scale: float = field(
        default=0.5,
        metadata={"help": "Smallest area of a random crop for the CLIP loss, relative to the image."},
    )
    num_readers: int = field(
        default=16,
        metadata={
            "help": "Number of shards of a stream that are read concurrently, in all processes. A multiple of "
            "processes x dataloader_num_workers avoids reading a shard more than once. Like the seed, it determines "
            "the order of the samples."
        },
    )
    shuffle_buffer: int = field(
        default=1000,
        metadata={
            "help": "Number of samples of clip_data that are shuffled together, in all processes. They are stored in "
            "memory undecoded."
        },
    )
    sam_shuffle_buffer: int = field(
        default=200,
        metadata={
            "help": "Number of samples of sam_data that are shuffled together, in all processes. A sample of SA-1B "
            "takes about one megabyte."
        },
    )
    sam_loss_weight: float = field(
        default=10.0, metadata={"help": "Lambda in L_CLIP + lambda * L_SAM (paper, section 3: 10)."}
    )
    mask_loss: Literal["quality", "sam"] = field(
        default="quality",
        metadata={
            "help": "Mask losses in L_SAM. quality: focal and dice loss for the teacher's probabilities, on all "
            "masks, zero where the student equals the teacher. sam: SAM's focal (alpha 0.25, gamma 2) and dice loss "
            "for the teacher's best mask, on the student's mask with the lowest loss."
        },
    )
    focal_weight: float = field(default=20.0, metadata={"help": "Weight of the focal loss in L_SAM (SAM: 20)."})
    dice_weight: float = field(default=1.0, metadata={"help": "Weight of the dice loss in L_SAM (SAM: 1)."})
    iou_head_weight: float = field(default=1.0, metadata={"help": "Weight of the IoU head's loss in L_SAM (SAM: 1)."})
    region_loss_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the region loss of segments: the student's embeddings of masks of sam_data against the "
            "CLIP teacher's, in every stage. 0: the paper's recipe."
        },
    )
    dense_loss_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the region loss of patches: the student's embeddings of the patches in a mask of "
            "sam_data against the CLIP teacher's embedding of the mask, in every stage. 0: the paper's recipe."
        },
    )
    regions_per_image: int = field(
        default=8, metadata={"help": "Number of masks per image for the region loss, at most masks_per_image."}
    )
    region_image_size: int | None = field(
        default=None,
        metadata={
            "help": "Resolution in pixels at which the CLIP teacher embeds regions. By default that of an unmerged "
            "model: twice the teacher's own resolution, but at most 448 or its own."
        },
    )
    region_embedding_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder with precomputed embeddings of the regions of sam_data, the output of `samclip embed "
            "--sam_data`. They replace the CLIP teacher in the region loss."
        },
    )
    encoder_lr_multiplier: float = field(
        default=0.1,
        metadata={
            "help": "Learning rate of the image encoder, relative to that of the CLIP head, which is learning_rate "
            "(paper: 0.1)."
        },
    )
    decoder_lr_multiplier: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of the mask decoder, relative to that of the CLIP head. By default "
            "encoder_lr_multiplier, as in the paper."
        },
    )
    skip_step_grad_norm: float = field(
        default=float("inf"),
        metadata={
            "help": "Optimizer steps with a larger gradient norm before clipping, or one that is not finite, are "
            "skipped and counted. Training stops after ten skipped steps in a row."
        },
    )
    lora_r: int = field(
        default=0,
        metadata={
            "help": "Rank of LoRA adapters for image encoder and mask decoder in stage 2. The adapters replace the "
            "training of their weights; the CLIP head stays fully trained. 0: no adapters."
        },
    )
    eval_batches: int = field(
        default=8,
        metadata={
            "help": "Number of held-out micro-batches of an evaluation. Every evaluation uses the same ones. "
            "eval_strategy and eval_steps set when to evaluate."
        },
    )
    eval_prompts: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Texts such as 'a photo of a dog'. The panel of an evaluation shows which of them is most similar "
            "to each pixel."
        },
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must be false: this package builds the batches."}
    )
    ignore_data_skip: bool = field(
        default=True, metadata={"help": "Must be true: streams resume from the positions in the checkpoint."}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "Number of checkpoints to keep."})

    def __post_init__(self):
        check_effects(self)  # before other values are derived
        super().__post_init__()
        if self.max_steps <= 0:
            raise ValueError("max_steps must be set for streaming data: the number of optimizer steps of this stage.")
        if self.warmup_steps and self.lr_scheduler_type in SCHEDULES_WITHOUT_WARMUP:
            # Not an error: recipes set warmup_steps, and the command line may choose another schedule.
            logger.warning(f"{self.lr_scheduler_type.value} has no warm-up: warmup_steps is set to 0.")
            self.warmup_steps = 0
        if (warmup_steps := self.get_warmup_steps(self.max_steps)) > self.max_steps:
            raise ValueError(
                f"The warm-up is longer than the run: warmup_steps is {warmup_steps}, max_steps {self.max_steps}. "
                "Values of warmup_steps below 1 are a fraction of max_steps."
            )
        if self.save_only_model and self.resume_from_checkpoint not in (None, "false", "False"):
            raise ValueError(
                "save_only_model saves checkpoints that cannot be resumed. Leave out save_only_model or "
                "resume_from_checkpoint."
            )
        check_reports(self.report_to)
        if self.push_to_hub and self.hub_token is not None:
            raise ValueError(
                "hub_token is not supported with push_to_hub: it would be published in training_args.bin. Log in with "
                "`hf auth login`, or set the environment variable HF_TOKEN."
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
            "clip_head_layers",
            "regions_per_image",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}.")
        for name in (
            "sam_loss_weight",
            "focal_weight",
            "dice_weight",
            "iou_head_weight",
            "region_loss_weight",
            "dense_loss_weight",
            "learning_rate",
            "encoder_lr_multiplier",
            "decoder_lr_multiplier",
            "max_box_noise",
            "lora_r",
        ):
            if (value := getattr(self, name)) is not None and not value >= 0:
                raise ValueError(f"{name} must be 0 or more, got {value}.")
        for name in ("clip_data", "sam_data"):
            names, weights = getattr(self, name), getattr(self, f"{name}_weights")
            if weights is None:
                setattr(self, f"{name}_weights", [1.0] * len(names))
            elif len(weights) != len(names) or min(weights) <= 0:
                raise ValueError(
                    f"{name}_weights must have one number above 0 for each of the {len(names)} entries of {name}, got "
                    f"{weights}."
                )
        for name in ("sam_shard_fraction", "min_crop_scale"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {getattr(self, name)}.")
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"eval_fraction must be at least 0 and below 1, got {self.eval_fraction}.")
        if self.eval_strategy != "no" and self.eval_fraction == 0:
            raise ValueError("eval_strategy requires held-out samples, but eval_fraction is 0.")
        for name in ("max_corrupt_fraction", "mask_prompt_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}.")
        if not self.clip_resolutions or min(self.clip_resolutions) < 1:
            raise ValueError(f"clip_resolutions must be one or more sizes in pixels, got {self.clip_resolutions}.")
        if not self.max_grad_norm > 0:
            raise ValueError(
                f"max_grad_norm must be above 0, got {self.max_grad_norm}. Set it to inf to disable clipping: the "
                "gradient norm is needed to skip steps that diverge."
            )
        if not self.skip_step_grad_norm > 0:
            raise ValueError(f"skip_step_grad_norm must be above 0, got {self.skip_step_grad_norm}.")
        if self.stage not in (1, 2, 3):
            raise ValueError(f"stage must be 1, 2 or 3, got {self.stage}.")
        if self.mask_loss not in ("quality", "sam"):
            raise ValueError(f"mask_loss must be quality or sam, got {self.mask_loss!r}.")
        if self.lora_r and self.stage != 2:
            raise ValueError(f"lora_r is supported in stage 2 only, got lora_r {self.lora_r} in stage {self.stage}.")
        if self.clip_head_initialization is None and self.model is None and self.stage == 1:
            self.clip_head_initialization = "copied"
        # A micro-batch of one task leaves parameters of the other task without gradients.
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = self.stage == 2

    @property
    def effective_decoder_lr_multiplier(self) -> float:
        """Learning rate of the mask decoder, relative to that of the CLIP head."""
        return self.encoder_lr_multiplier if self.decoder_lr_multiplier is None else self.decoder_lr_multiplier

    @property
    def has_region_loss(self) -> bool:
        """Whether the region loss is part of the training loss."""
        return self.region_loss_weight > 0 or self.dense_loss_weight > 0

    @property
    def has_sam_loss(self) -> bool:
        """Whether the SAM loss is part of the training loss."""
        return self.stage == 2

    @property
    def reads_masks(self) -> bool:
        """Whether the training reads `sam_data`."""
        return self.has_sam_loss or self.has_region_loss

    def __getattr__(self, name: str) -> Any:
        if name in DEPRECATED_ARGUMENTS:
            warn_of_deprecated_argument(name)
            return getattr(self, DEPRECATED_ARGUMENTS[name])
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in DEPRECATED_ARGUMENTS:
            warn_of_deprecated_argument(name)
            name = DEPRECATED_ARGUMENTS[name]
        super().__setattr__(name, value)
