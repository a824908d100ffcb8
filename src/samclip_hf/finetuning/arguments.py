"""Arguments of fine-tuning. The recipes in `samclip_hf/recipes/finetune/` set them."""

from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from typing import ClassVar, Literal

from transformers.utils import logging

from ..distillation.arguments import WITHOUT_EFFECT, SamClipTrainingArguments
from ..segmentation_samclip import DEFAULT_TEMPLATES

logger = logging.get_logger(__name__)


def _never(args: SamClipTrainingArguments) -> bool:
    return False


def _has_guard(args: SamClipTrainingArguments) -> bool:
    return args.has_sam_loss


GUARD_ARGUMENTS = (
    *("sam_data", "sam_data_weights", "sam_batch_size", "masks_per_image", "sam_shuffle_buffer", "sam_shard_fraction"),
    *("max_box_noise", "sam_loss_weight", "focal_weight", "dice_weight", "iou_head_weight"),
)
# As in `distillation.arguments`, in front of its entries.
NO_TEACHERS = "The model before fine-tuning is the only teacher."
FINETUNING_WITHOUT_EFFECT: tuple[tuple[tuple[str, ...], Callable[[SamClipTrainingArguments], bool], str], ...] = (
    (("per_device_train_batch_size", "auto_find_batch_size", "clip_batch_size"), _never, "Set batch_size."),
    (("num_train_epochs",), _never, "Set max_steps: images times epochs, divided by batch_size."),
    (GUARD_ARGUMENTS, _has_guard, "Only the guard uses general images: set guard_weight above 0."),
    (
        ("sam_teacher", "sam_student", "clip_teacher", "clip_embedding_cache", "region_embedding_cache"),
        _never,
        NO_TEACHERS,
    ),
    (
        (
            *("region_loss_weight", "dense_loss_weight", "regions_per_image", "region_image_size", "mask_loss"),
            *("mask_prompt_fraction", "sam_resolutions"),
        ),
        _never,
        "The guard has one weight, guard_weight.",
    ),
    (
        ("clip_data", "clip_data_weights", "clip_resolutions", "min_crop_scale", "shuffle_buffer"),
        _never,
        "Pass labeled images as data, and general images as sam_data.",
    ),
)


@dataclass
class FinetuningArguments(SamClipTrainingArguments):
    r"""
    The arguments of fine-tuning, and those of [`SamClipTrainingArguments`] that have an effect.

    Raises:
        ValueError: As [`SamClipTrainingArguments`], and if there are no data, no model, or no general images although
            there is a guard.
    """

    without_effect: ClassVar = (*FINETUNING_WITHOUT_EFFECT, *WITHOUT_EFFECT)

    # Image encoder, mask decoder and CLIP head are trained, at the learning rates of stage 2.
    stage: Literal[1, 2, 3] = field(default=2, init=False)
    data: str | None = field(
        default=None,
        metadata={
            "help": "Labeled images for training: a COCO file (.json); a folder with images/, labels/ and "
            "classes.json or classes.txt; or hf://owner/name?split=train&classes=classes.json."
        },
    )
    eval_data: str | None = field(
        default=None,
        metadata={"help": "Labeled images for evaluation, as data. By default eval_fraction of data is held out."},
    )
    eval_fraction: float = field(
        default=0.2,
        metadata={"help": "Fraction of data that is held out if there is no eval_data, and of sam_data."},
    )
    images: str | None = field(
        default=None,
        metadata={"help": "Folder that the names in COCO files refer to. By default the folder of each file."},
    )
    background: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Texts that describe the background, such as 'a wall', for COCO files: pixels without an "
            "annotation are background. By default they do not count."
        },
    )
    templates: list[str] = field(
        default_factory=lambda: list(DEFAULT_TEMPLATES),
        metadata={"help": "Sentences with {} in the place of the name of a class. Their mean embedding is used."},
    )
    other_names: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names that are not classes of the data, used as negative texts of the loss. The guard preserves "
            "the model's predictions for them. By default, the names in the model's vocabulary and in the datasets "
            "of retention. Pass an empty text to use no names."
        },
    )
    batch_size: int = field(default=4, metadata={"help": "Labeled images per process and micro-batch."})
    mask_loss_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the loss of the SAM head: masks from a point or a box of each object. By default 1 for "
            "COCO files, and 0 for label maps, in which objects of a class are not separate."
        },
    )
    guard_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight of the distillation losses against forgetting: on sam_data, the model is compared with "
            "itself before fine-tuning. 0: no guard, and no general images are needed."
        },
    )
    sam_data: list[str] = field(
        default_factory=list,
        metadata={
            "help": "General images with masks for the guard, without labels: SA-1B's tars, the output of samclip "
            "masks or samclip annotate, or 'miniature'."
        },
    )
    retention: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Tasks of samclip evaluate for the retention table, such as composed:voc21 and prompts:coco. The "
            "table has the results before and after, next to those on eval_data. Pass an empty text to use none of a "
            "recipe."
        },
    )
    retention_limit: int | None = field(
        default=None, metadata={"help": "Number of images of each task of retention. By default all."}
    )
    eval_strategy: str = field(default="steps", metadata={"help": "When to measure the retention table."})
    load_best_model_at_end: bool = field(
        default=True, metadata={"help": "Whether to keep the checkpoint with the best metric_for_best_model."}
    )
    metric_for_best_model: str | None = field(
        default="retention_score",
        metadata={
            "help": "retention_score: the mean IoU on eval_data, times the smallest ratio of a result of retention to "
            "its value before, if that is below 1."
        },
    )

    def __post_init__(self):
        if self.guard_weight == 0:
            self._reset_guard()
        if self.other_names == [""]:  # a command line has no empty list
            self.other_names = []
        if self.retention == [""]:  # turns off that of a recipe, whose limit then has no meaning
            self.retention, self.retention_limit = [], None
        super().__post_init__()
        if self.data is None:
            raise ValueError("Pass labeled images as data: a COCO file, a folder with label maps, or hf://owner/name.")
        if self.model is None:
            raise ValueError("Pass the SAM-CLIP to fine-tune as model.")
        if self.mask_loss_weight is not None and not self.mask_loss_weight >= 0:
            raise ValueError(f"mask_loss_weight must be 0 or more, got {self.mask_loss_weight}.")
        if not self.guard_weight >= 0:
            raise ValueError(f"guard_weight must be 0 or more, got {self.guard_weight}.")
        if self.guard_weight > 0 and not self.sam_data:
            raise ValueError(
                "The guard against forgetting needs general images with masks: pass them as sam_data, such as the "
                "output of samclip masks, or set guard_weight to 0."
            )
        for name in ("batch_size", "retention_limit"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}.")
        if self.retention_limit is not None and not self.retention:
            raise ValueError("retention_limit has no effect without retention.")

    def _reset_guard(self) -> None:
        """Sets the arguments of the guard to their defaults. With a weight of 0 they are not an error: recipes set
        them, and the command line may turn off the guard."""
        changed = []
        for own in fields(self):
            default = own.default if own.default_factory is MISSING else own.default_factory()
            if own.name in GUARD_ARGUMENTS and getattr(self, own.name) != default:
                setattr(self, own.name, default)
                changed.append(own.name)
        if changed:
            logger.warning(f"guard_weight is 0, so these arguments have no effect: {', '.join(changed)}.")

    @property
    def has_sam_loss(self) -> bool:
        """Whether there is a guard, whose largest part is the SAM loss."""
        return self.guard_weight > 0
