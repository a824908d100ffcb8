"""
[`SamClipTrainer`] trains the three stages of SAM-CLIP.

Subclasses change what is trained, and how; docs/extend.md has examples. Override `trained_parts` to freeze layers,
`parameter_group` for other learning rates, `image_loss` and `mask_loss` for other losses or teachers on the same
images, and `make_tasks` and `losses` for other data.
"""

import contextlib
import dataclasses
import json
import math
import re
import shutil
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from .. import miniature
from ..datasets.streams import DataError, open_stream
from ..images import mean_and_std, normalize
from ..modeling_samclip import SamClipModel, SamClipOutput, patches_of_masks
from ..processing_samclip import SamClipProcessor
from ..segmentation_samclip import to_mask_prompts
from ..visualization import save_panel
from . import provenance
from .arguments import SamClipTrainingArguments
from .averages import RunningAverages
from .callbacks import PreemptionCallback
from .checkpoints import last_checkpoint, read_stream_state, shards_checksum, weights_checksum, write_stream_state
from .collation import ClipBatches, SamBatches, StepLoader, StepStream, TaskBatches
from .embedding_cache import EmbeddingCache, RegionEmbeddingCache
from .losses import (
    cosine_distillation_loss,
    hard_mask_distillation_loss,
    mask_distillation_loss,
    mask_iou,
    region_distillation_loss,
)
from .panel import panel_rows
from .teachers import ClipTeacher, RegionTeacher, SamTeacher

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

__all__ = ["TRAINED_PARTS", "PreemptionCallback", "SamClipTrainer", "add_adapters", "freeze", "last_checkpoint"]

logger = logging.get_logger(__name__)

MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes
MAX_SKIPPED_STEPS = 10  # in a row, before training stops
# Recorded arguments that may change when a run is resumed: some do not influence the weights, some apply from the
# resumed step on, and teachers, data and batch sizes are compared by content or in total.
MAY_CHANGE = {
    *("max_steps", "max_corrupt_fraction", "eval_batches", "eval_prompts", "num_readers", "shuffle_buffer"),
    *("sam_shuffle_buffer", "clip_data", "sam_data", "clip_data_weights", "sam_data_weights", "sam_shard_fraction"),
    *("clip_teacher", "clip_embedding_cache", "region_embedding_cache", "sam_teacher", "sam_student"),
    *("clip_batch_size", "sam_batch_size", "gradient_accumulation_steps"),
}

# The modules with LoRA adapters: all linear layers of the image encoder and of the mask decoder's transformer.
ADAPTED_MODULES = (
    r"vision_encoder\.layers\.\d+\.(attn\.(qkv|proj)|mlp\.lin[12])"
    r"|mask_decoder\.transformer\..*\.([qkv]_proj|out_proj|mlp\.lin[12])"
)
COPIED_HEAD = "base_model.model.clip_head.modules_to_save.default."  # peft's copy of the CLIP head, which is trained
# The parts of the model that each stage trains (paper, section 4). The prompt encoder, SAM's positional embedding and
# the text tower are always frozen.
TRAINED_PARTS = {1: ("clip_head",), 2: ("vision_encoder", "mask_decoder", "clip_head"), 3: ("clip_head",)}
# The modules with pretrained weights, by group of the optimizer.
ENCODERS = ("vision_encoder.", "text_model.", "text_projection.")
DECODERS = ("prompt_encoder.", "mask_decoder.")
# Positional embeddings, and mask and IoU tokens of the mask decoder: zero has no special meaning for them, and weight
# decay would reduce rows without gradients to zero.
WITHOUT_WEIGHT_DECAY = re.compile(r"\.(pos_embed|rel_pos_[hw]|mask_tokens\.weight|iou_token\.weight)$")


class SamClipTrainer(Trainer):
    r"""
    Distills a SAM and a CLIP teacher into a [`SamClipModel`].

    An item of the data loader contains one micro-batch for each task: "clip" for the CLIP loss and, in stage 2 or with
    the region loss, "sam" for the losses on images with masks. The trainer runs forward and backward passes of one
    task after the other, so that only one graph is in memory, and then the optimizer step.

    Args:
        model ([`SamClipModel`]):
            The student. Parts that the stage does not train are frozen, and parameters that are frozen already stay
            frozen. Weights in half precision are converted to float32; `bf16` and `fp16` of the arguments select mixed
            precision.
        args ([`SamClipTrainingArguments`]):
            The training arguments.
        clip_teacher ([`ClipTeacher`] or [`EmbeddingCache`]):
            The frozen CLIP teacher, which is moved to the student's device, or its precomputed embeddings. `None` only
            in a subclass without the CLIP loss.
        sam_teacher ([`SamTeacher`], *optional*):
            The frozen SAM teacher. Required in stage 2, ignored in the others.
        processing_class ([`SamClipProcessor`]):
            The student's processor. It is saved with the student and determines its normalization.
        prepare_push (`Callable[[Path, str], None]`, *optional*):
            Called in the main process with the output folder and the repository id before the folder is pushed to the
            Hub. [`samclip_hf.publishing.prepare_push`] adds the model code and the model card. By default, the model
            card of [`Trainer`] and no model code is pushed.
        callbacks, optimizers, optimizer_cls_and_kwargs:
            As in [`Trainer`]. An optimizer that is passed keeps its learning rates and weight decay. Without
            `optimizers`, the parameters are grouped by `parameter_group`.

    Raises:
        ValueError: If an argument is missing, if student, teachers, resolutions, embedding cache and optimizer do not
            match, or if all parameters of the trained parts are frozen.
    """

    args: SamClipTrainingArguments
    optimizer: torch.optim.Optimizer  # set by `create_optimizer` before the first step
    control: TrainerControl

    def __init__(
        self,
        model: SamClipModel,
        args: SamClipTrainingArguments,
        clip_teacher: ClipTeacher | EmbeddingCache | None,
        sam_teacher: SamTeacher | None = None,
        processing_class: SamClipProcessor | None = None,
        prepare_push: Callable[[Path, str], None] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
    ):
        if not model.config.merged:
            raise ValueError(
                "An unmerged model cannot be trained: it has two encoders. SamClipModel.from_teachers(sam, clip) "
                "builds a model that merges both."
            )
        if args.has_sam_loss and sam_teacher is None:
            raise ValueError("Stage 2 requires sam_teacher.")
        if processing_class is None:
            raise ValueError("processing_class is required: the student's processor determines its normalization.")
        patch_size = model.config.vision_config.patch_size
        for name in ("clip_resolutions", "sam_resolutions"):
            if invalid := [size for size in getattr(args, name) if size % patch_size]:
                raise ValueError(f"{name} must be multiples of the student's patch size, {patch_size}: got {invalid}.")
        self.args = args
        self.prepare_push = prepare_push
        self.earlier_stages = provenance.read(args.model or model.name_or_path)
        self._head_config, self._patch_size = model.config.clip_head_config, patch_size
        self.clip_teacher = clip_teacher
        self.sam_teacher = sam_teacher if args.has_sam_loss else None
        if self.sam_teacher is not None:
            self.sam_teacher.check(model)
        self.region_teacher: RegionTeacher | None = None
        self.region_cache: RegionEmbeddingCache | None = None
        if args.region_embedding_cache is not None:
            self.region_cache = RegionEmbeddingCache(args.region_embedding_cache)
        elif args.has_region_loss:
            if isinstance(clip_teacher, EmbeddingCache):
                raise ValueError(
                    "The region loss needs the CLIP teacher, which embeds the regions, or region_embedding_cache: set "
                    "it, or leave out clip_embedding_cache."
                )
            assert clip_teacher is not None
            self.region_teacher = RegionTeacher(clip_teacher, args.region_image_size)
        self.image_mean, self.image_std = mean_and_std(processing_class.image_processor)
        train_dataset = StepStream(
            self.make_tasks(model),
            seed=args.seed,
            num_readers=args.num_readers,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            rank=args.process_index,
            world_size=args.world_size,
        )
        if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
            logger.warning("The student's weights are converted to float32: in half precision, updates round to zero.")
            model.float()
            for part in (model.config, *(getattr(model.config, name) for name in model.config.sub_configs)):
                if part is not None:
                    part.dtype = torch.float32
        self.frozen_by_user = freeze(model, self.trained_parts())
        # With LoRA, checkpoints contain only the adapters and the CLIP head. The rest must be the same to resume.
        rest = (parameter for name, parameter in model.named_parameters() if not name.startswith("clip_head."))
        self._base_checksum = weights_checksum(rest)
        student = add_adapters(model, args.lora_r) if args.lora_r else model
        trainable = sum(p.numel() for p in student.parameters() if p.requires_grad)
        total = sum(p.numel() for p in student.parameters())
        if args.should_log:
            logger.warning(f"Training {trainable / 1e6:.2f} of {total / 1e6:.2f} M parameters.")
            if self.frozen_by_user:
                logger.warning(f"These parameters were frozen and stay frozen: {', '.join(self.frozen_by_user)}.")
        if not trainable:
            raise ValueError(
                f"All parameters of {', '.join(self.trained_parts())} are frozen: there is nothing to train. Set "
                "requires_grad of those to be trained."
            )
        if optimizers[0] is not None:
            given = {parameter for group in optimizers[0].param_groups for parameter in group["params"]}
            missing = [name for name, p in student.named_parameters() if p.requires_grad and p not in given]
            if missing:
                raise ValueError(
                    f"The optimizer lacks {len(missing)} of the parameters that are trained, such as {missing[0]}. "
                    "Freeze them before the trainer is built, or leave out optimizers."
                )
        super().__init__(
            model=student,
            args=args,
            processing_class=processing_class,
            train_dataset=train_dataset,
            eval_dataset=self._read_held_out(train_dataset, args.eval_batches) if args.eval_strategy != "no" else None,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        if self.is_deepspeed_enabled:
            raise ValueError(
                "DeepSpeed is not supported: it steps the optimizer after every backward pass, but a step of stage 2 "
                "has two, and steps with too large gradients are skipped. Use DDP or FSDP."
            )
        if self.is_fsdp_enabled and args.lora_r:
            raise ValueError("lora_r is not supported with FSDP. Use DDP: LoRA needs little memory.")
        if optimizers[0] is None:
            self._optimizer_class_and_arguments()  # raises an error now instead of in `train`
        dynamo_plugin = self.accelerator.state.dynamo_plugin
        if args.torch_compile and dynamo_plugin.dynamic is None:
            # One graph for each resolution: torch fails to compile the backward pass with symbolic sizes. Checked on
            # torch 2.14. Delete this when `torch_compile` trains without it at several resolutions, as in stage 3.
            dynamo_plugin.dynamic = False
        self.preemption = PreemptionCallback()
        self.add_callback(self.preemption)
        self._optimizer_is_given = optimizers[0] is not None
        self._settings = self._make_settings()
        self._loader = StepLoader(
            self.train_dataset,
            max_corrupt_fraction=args.max_corrupt_fraction,
            num_workers=args.dataloader_num_workers,
            prefetch_factor=args.dataloader_prefetch_factor if args.dataloader_num_workers else None,
        )
        self._averages = RunningAverages()
        # Counters of this process since the start of the training. After a resume, process 0 has those of all.
        self._images = 0
        self._skipped_steps = self._skipped_steps_in_a_row = 0
        self._images_at_log, self._time_at_log = 0, time.perf_counter()  # images of all processes
        for teacher in (self.clip_teacher, self.sam_teacher):
            if isinstance(teacher, nn.Module):
                teacher.to(args.device)

    # What a subclass may override.

    def trained_parts(self) -> Sequence[str]:
        """Returns the names of the student's submodules that are trained; all others are frozen. With LoRA, adapters
        replace the weights of image encoder and mask decoder."""
        return TRAINED_PARTS[self.args.stage]

    def parameter_group(self, name: str) -> tuple[str, float]:
        """
        Returns the group of a parameter, under which its learning rate is logged, and the multiplier of its learning
        rate: `encoder_lr_multiplier` and `decoder_lr_multiplier` for the parts with pretrained weights (paper, section
        4: a tenth), 1 for the CLIP head and for heads that a subclass adds.

        Args:
            name (`str`):
                Name of the parameter in the student, after wrapping with LoRA adapters.
        """
        if any(part in name for part in ENCODERS):
            return "encoder", self.args.encoder_lr_multiplier
        if any(part in name for part in DECODERS):
            return "decoder", self.args.effective_decoder_lr_multiplier
        return "head", 1.0

    def losses(self) -> dict[str, Callable[..., Tensor]]:
        """Returns the loss function of each task. It is called with the model and the tensors of the task's
        micro-batch, and returns a scalar, which is added to the training loss."""
        return {"clip": self.clip_loss, "sam": self.sam_loss}

    def make_tasks(self, student: SamClipModel) -> dict[str, TaskBatches]:
        """Opens the data and returns the batches of each task. Every task needs an entry in `losses`."""
        args = self.args
        streams = [open_stream(name, eval_fraction=args.eval_fraction) for name in args.clip_data]
        if isinstance(self.clip_teacher, EmbeddingCache):
            self.clip_teacher.check(student, streams, args.min_crop_scale, args.clip_teacher)
            streams = self.clip_teacher.attach(streams)
            cache = self.clip_teacher.description
            teacher_image_size, teacher_filter = cache.image_size, Image.Resampling(cache.resample)
        else:
            assert self.clip_teacher is not None
            self.clip_teacher.check(student)
            cache = None
            teacher_image_size, teacher_filter = self.clip_teacher.image_size, self.clip_teacher.resample
        tasks: dict[str, TaskBatches] = {
            "clip": ClipBatches(
                streams,
                weights=args.clip_data_weights or [],
                image_sizes=args.clip_resolutions,
                teacher_image_size=teacher_image_size,
                batch_size=args.clip_batch_size,
                shuffle_buffer=args.shuffle_buffer,
                min_crop_scale=args.min_crop_scale,
                teacher_filter=teacher_filter,
                cache=cache,
            )
        }
        if args.reads_masks:
            regions_per_image = min(args.regions_per_image, args.masks_per_image) if args.has_region_loss else 0
            tasks["sam"] = self.sam_batches(student, regions_per_image)
        return tasks

    def sam_batches(self, student: SamClipModel, regions_per_image: int) -> SamBatches:
        """Opens `sam_data` and returns its batches. `regions_per_image` of the masks of an image are also regions."""
        args = self.args
        image_size = student.config.vision_config.image_size
        if self.sam_teacher is not None:
            image_size = self.sam_teacher.image_size
        streams = [
            open_stream(
                name,
                with_masks=True,
                shard_fraction=args.sam_shard_fraction,
                eval_fraction=args.eval_fraction,
            )
            for name in args.sam_data
        ]
        if self.region_cache is not None:
            self.region_cache.check(
                student, streams, args.clip_teacher, image_size, regions_per_image, args.region_image_size
            )
            streams = self.region_cache.attach(streams)
        return SamBatches(
            streams,
            weights=args.sam_data_weights or [],
            image_size=image_size,
            student_image_sizes=args.sam_resolutions or [image_size],
            batch_size=args.sam_batch_size,
            masks_per_image=args.masks_per_image,
            max_box_noise=args.max_box_noise,
            shuffle_buffer=args.sam_shuffle_buffer,
            regions_per_image=regions_per_image,
            mask_size=4 * image_size // student.config.vision_config.patch_size,
            region_cache=None if self.region_cache is None else self.region_cache.description,
            mask_prompt_fraction=args.mask_prompt_fraction,
        )

    def clip_loss(self, model: nn.Module, images: Tensor, **targets: Tensor) -> Tensor:
        """Returns the loss of a micro-batch of [`ClipBatches`]: one pass of the student, and `image_loss`."""
        return self.image_loss(
            model(pixel_values=normalize(images, self.image_mean, self.image_std)), images, **targets
        )

    def image_loss(
        self,
        outputs: SamClipOutput,
        images: Tensor,
        teacher_images: Tensor | None = None,
        teacher_embeds: Tensor | None = None,
    ) -> Tensor:
        """
        Returns L_CLIP. A subclass adds losses of the same images here, without another pass of the student.

        Args:
            outputs ([`SamClipOutput`]):
                The student's outputs for `images`.
            images (`torch.Tensor` of type uint8 and shape `(batch_size, 3, height, width)`):
                The student's images.
            teacher_images, teacher_embeds (`torch.Tensor`, *optional*):
                The CLIP teacher's images or, with an embedding cache, its embeddings, see [`ClipBatches`].
        """
        if teacher_embeds is None:
            assert isinstance(self.clip_teacher, ClipTeacher) and teacher_images is not None
            with self.accelerator.autocast():
                teacher_embeds = self.clip_teacher(teacher_images)
        assert outputs.image_embeds is not None
        loss = cosine_distillation_loss(outputs.image_embeds, teacher_embeds)["cosine"]
        self.record({"clip_loss": loss, f"cosine_{images.shape[-1]}px": 1 - loss})
        return loss

    def sam_loss(
        self,
        model: nn.Module,
        images: Tensor,
        content_sizes: Tensor,
        student_images: Tensor | None = None,
        region_masks: Tensor | None = None,
        teacher_regions: Tensor | None = None,
        class_probabilities: Tensor | None = None,
        **prompts,
    ) -> Tensor:
        """Returns the losses of a micro-batch of [`SamBatches`], from one pass of the image encoder: lambda * L_SAM in
        stage 2, and the weighted region losses. If the student's resolution differs from the teacher's, the teacher's
        mask logits are resized to the student's."""
        inputs: dict[str, Any] = {}
        if region_masks is not None and teacher_regions is None:
            assert self.region_teacher is not None
            with self.accelerator.autocast():
                teacher_regions = self.region_teacher(images, content_sizes, region_masks)
        if self.sam_teacher is not None:
            prompt = "point" if "input_points" in prompts else "box"
            if class_probabilities is not None:
                prompt = "mask"
                prompts["input_masks"] = to_mask_prompts(class_probabilities, self._mask_size(images))
            inputs = prompts | {"multimask_output": prompt == "point"}
            # Not in half precision: see benchmarks/training_precision.py.
            with torch.autocast(images.device.type, enabled=False):
                teacher_masks, teacher_iou = self.sam_teacher(images, content_sizes, **inputs)
        if student_images is not None:
            scale = student_images.shape[-1] / images.shape[-1]
            images, content_sizes = student_images, (content_sizes * scale).round().long().clamp_min(1)
            for name in inputs.keys() & {"input_points", "input_boxes"}:
                inputs[name] = (inputs[name] + 0.5) * scale - 0.5
            if class_probabilities is not None:
                inputs["input_masks"] = to_mask_prompts(class_probabilities, self._mask_size(images))
        if region_masks is not None:
            grid_size = (images.shape[-2] // self._patch_size, images.shape[-1] // self._patch_size)
            inputs["segments"] = patches_of_masks(region_masks.float() / 255, grid_size, grid_size)
            inputs["reshaped_input_sizes"] = content_sizes
        outputs = model(pixel_values=normalize(images, self.image_mean, self.image_std, content_sizes), **inputs)
        loss = outputs.image_embeddings.new_zeros(())
        if self.sam_teacher is not None:
            size = outputs.pred_masks.shape[-2:]
            if teacher_masks.shape[-2:] != size:
                resized = F.interpolate(teacher_masks.flatten(0, 1).float(), size, mode="bilinear", antialias=True)
                teacher_masks = resized.view(*teacher_masks.shape[:-2], *size)
            sam_loss = self.mask_loss(outputs.pred_masks, teacher_masks, outputs.iou_scores, teacher_iou)
            self.record({"sam_loss": sam_loss, f"mask_iou_{prompt}": mask_iou(outputs.pred_masks, teacher_masks)})
            loss = loss + self.args.sam_loss_weight * sam_loss
        if region_masks is not None:
            assert teacher_regions is not None
            parts = region_distillation_loss(
                outputs.segment_embeds, outputs.dense_embeds, inputs["segments"], teacher_regions
            )
            self.record({f"region_{name}_loss": part for name, part in parts.items()})
            loss = (
                loss + self.args.region_loss_weight * parts["segment"] + self.args.dense_loss_weight * parts["dense"]
            )
        return loss

    def mask_loss(
        self, student_logits: Tensor, teacher_logits: Tensor, student_iou: Tensor, teacher_iou: Tensor
    ) -> Tensor:
        """Returns L_SAM, the weighted sum of the parts of the loss that the argument `mask_loss` selects. Arguments as
        in [`mask_distillation_loss`]."""
        arguments = student_logits, teacher_logits, student_iou, teacher_iou
        if self.args.mask_loss == "sam":
            parts = hard_mask_distillation_loss(*arguments, self.args.focal_weight, self.args.dice_weight)
        else:
            parts = mask_distillation_loss(*arguments)
        self.record({f"sam_{name}": part for name, part in parts.items()})
        return (
            self.args.focal_weight * parts["focal"]
            + self.args.dice_weight * parts["dice"]
            + self.args.iou_head_weight * parts["iou_head"]
        )

    def evaluation_metrics(self) -> dict[str, float]:
        """Returns metrics of an evaluation besides the losses. All processes call it."""
        return {}

    def stage_record(self) -> dict[str, Any]:
        """Returns entries of this stage in `provenance.json` that replace those of the trainer, or are added."""
        return {}

    def _mask_size(self, images: Tensor) -> tuple[int, int]:
        """Height and width of mask prompts and mask logits for images `(batch_size, 3, height, width)`."""
        return 4 * (images.shape[-2] // self._patch_size), 4 * (images.shape[-1] // self._patch_size)

    def record(self, values: dict[str, Tensor]) -> None:
        """Adds values to the averages of the next log."""
        self._averages.record(values)

    # Methods of `Trainer`.

    def get_train_dataloader(self) -> StepLoader:
        """Returns the loader of this process's micro-batches, which accelerate does not shard again."""
        return self._loader

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Returns the names of [`Trainer`] except those that match `WITHOUT_WEIGHT_DECAY`."""
        return [name for name in super().get_decay_parameter_names(model) if not WITHOUT_WEIGHT_DECAY.search(name)]

    def _optimizer_class_and_arguments(self) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        if self.optimizer_cls_and_kwargs is not None:
            optimizer_class, arguments = self.optimizer_cls_and_kwargs
            return optimizer_class, {"lr": self.args.learning_rate, **arguments}
        try:
            optimizer_class, arguments = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        except ImportError as error:
            raise ValueError(f"optim {self.args.optim.value} needs another package. {error}") from error
        is_optimizer = isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer)
        if not is_optimizer or arguments.keys() & {"params", "model", "optimizer_dict"}:
            raise ValueError(
                f"optim {self.args.optim.value} makes parameter groups of its own, which is not supported. Use "
                "another one, such as adamw_torch."
            )
        return optimizer_class, arguments

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Creates the optimizer with the groups of `parameter_group`, each split by weight decay."""
        model = self.model if model is None else model
        if self.optimizer is None:
            optimizer_class, arguments = self._optimizer_class_and_arguments()
            decayed = set(self.get_decay_parameter_names(model))
            groups: dict[tuple[str, float, bool], list[nn.Parameter]] = defaultdict(list)
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    groups[*self.parameter_group(name), name in decayed].append(parameter)
            self.optimizer = optimizer_class(
                [
                    {
                        "params": parameters,
                        "lr": arguments["lr"] * lr_multiplier,
                        "weight_decay": arguments.get("weight_decay", self.args.weight_decay) if has_decay else 0.0,
                        "name": group,
                    }
                    for (group, lr_multiplier, has_decay), parameters in groups.items()
                ],
                **arguments,
            )
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch=None) -> Tensor:
        """Runs forward and backward pass of each task, one after the other. Returns the sum of their losses."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        usable_fractions = inputs.pop("usable_fractions")
        losses = self.losses()
        total = torch.zeros((), device=self.args.device)
        for task, batch in inputs.items():
            usable_fraction = usable_fractions[task]
            # A placeholder batch does not count in the averages.
            recording = contextlib.nullcontext() if usable_fraction > 0 else self._averages.isolate()
            with recording, self.compute_loss_context_manager():
                loss = losses[task](model, **batch)
            # A skipped sample counts as a sample with zero loss, so that the weight of a sample does not depend on the
            # number of samples that its process skips.
            loss = loss * usable_fraction
            if usable_fraction > 0:
                self._images += len(batch["images"])
            # DDP averages the gradients in every backward pass. It averages the sum of earlier gradients again, which
            # does not change it.
            if loss.requires_grad:  # false if all parameters that it trains are frozen
                self.accelerator.backward(loss / self.current_gradient_accumulation_steps)
            total += loss.detach()
        self.record({"loss": total})
        return total / self.current_gradient_accumulation_steps

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """As in [`Trainer`]. Skips the step if the gradient norm is not finite or above `skip_step_grad_norm`, and
        raises `FloatingPointError` after `MAX_SKIPPED_STEPS` skipped steps in a row."""
        if self.accelerator.scaler is not None:  # the gradient scaler of float16 skips steps itself
            return super()._clip_grad_norm(model)
        named_parameters = list(self.accelerator.unwrap_model(model).named_parameters())
        for part in self.trained_parts():
            gradients = [p.grad for name, p in named_parameters if f"{part}." in name and p.grad is not None]
            self.record({f"grad_norm_{part}": torch.nn.utils.get_total_norm(gradients)})
        norm = super()._clip_grad_norm(model)
        value = float(norm)
        if math.isfinite(value) and value <= self.args.skip_step_grad_norm:
            self._skipped_steps_in_a_row = 0
            return norm
        model.zero_grad()  # the optimizer skips parameters without gradients
        self._skipped_steps += 1
        self._skipped_steps_in_a_row += 1
        logger.warning(f"Skipped step {self.state.global_step + 1}: its gradient norm is {value}.")
        if self._skipped_steps_in_a_row == MAX_SKIPPED_STEPS:
            raise FloatingPointError(
                f"The gradient norms of {MAX_SKIPPED_STEPS} steps in a row were not finite or above "
                "skip_step_grad_norm. Resume from the last checkpoint with a lower learning rate, or in float32."
            )
        return norm

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Evaluates the losses and their metrics on `eval_batches` held-out micro-batches, which are the same in every
        evaluation. `eval_loss` is the sum of the tasks' losses, as `loss` is in training. Saves a panel of the first
        micro-batch as `panels/step_*.png`."""
        batches = self.eval_dataset if eval_dataset is None else eval_dataset
        model = self.accelerator.unwrap_model(self.model).eval()
        losses = self.losses()
        tasks: dict[str, None] = {}
        with self._averages.isolate(), self.compute_loss_context_manager():
            for number, batch in enumerate(batches):
                inputs = self._prepare_inputs(dict(batch))
                usable_fractions = inputs.pop("usable_fractions")
                tasks |= dict.fromkeys(inputs)
                inputs = {task: tensors for task, tensors in inputs.items() if usable_fractions[task] > 0}
                for task, tensors in inputs.items():
                    self.record({f"loss of {task}": losses[task](model, **tensors)})
                if number == 0:
                    self._draw_panel(model, inputs)
            averages = self._averages.compute()
            if unusable := [task for task in tasks if f"loss of {task}" not in averages]:
                raise DataError(
                    f"No held-out sample of {unusable[0]}_data can be used for the evaluation. The log has the "
                    "causes. Raise eval_batches or eval_fraction, or train without evaluation."
                )
            averages["loss"] = sum(averages.pop(f"loss of {task}") for task in tasks)
            averages |= self.evaluation_metrics()
            metrics = {f"{metric_key_prefix}_{name}": value for name, value in averages.items()}
        best = self.args.metric_for_best_model
        if metric_key_prefix == "eval" and best is not None and f"eval_{best.removeprefix('eval_')}" not in metrics:
            raise ValueError(
                f"metric_for_best_model is {best!r}, but an evaluation has {', '.join(sorted(metrics))}. Set it to "
                "one of them."
            )
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in [`Trainer`]. Adds averages since the last log, the learning rate of each parameter group, images per
        second and peak memory, and the numbers of skipped samples and steps since the start; over all processes."""
        processes = gather_object([{"images": self._images, "skipped": self._loader.state["skipped"]}])
        images = sum(process["images"] for process in processes)
        if "loss" in logs:
            logs.update(self._averages.compute())
            logs.pop("learning_rate", None)
            for number, group in enumerate(self.optimizer.param_groups):
                name = group.get("name", number)  # the groups of a passed optimizer may have no names
                logs[f"learning_rate_{name}"] = float(group["lr"])
            now = time.perf_counter()
            logs["images_per_second"] = (images - self._images_at_log) / (now - self._time_at_log)
            self._images_at_log, self._time_at_log = images, now
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                    callback.training_bar.set_postfix_str(f"{logs['images_per_second']:.0f} images/s")
            if torch.cuda.is_available():
                logs["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
            elif resource is not None:
                logs["peak_memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_UNIT / 1e9
        if "train_runtime" in logs:  # the last log of a run, which `train` returns
            del logs["train_samples_per_second"]  # assumes per_device_train_batch_size, which is not used
            logs["train_images_seen"] = images
        skipped = sum((Counter(process["skipped"]) for process in processes), Counter())
        logs.update({f"skipped_{cause.replace(' ', '_')}": number for cause, number in skipped.items()})
        if self._skipped_steps:
            logs["skipped_steps"] = self._skipped_steps
        super().log(logs, start_time)

    def create_model_card(self, *args, **kwargs) -> None:
        """Prepares the output folder for a push with `prepare_push`. Without it, writes the card of [`Trainer`]."""
        if self.prepare_push is None:
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            self.prepare_push(Path(self.args.output_dir), self.hub_model_id)

    def save_provenance(self, metrics: dict[str, float]) -> None:
        """
        Writes `provenance.json` into the output folder, see [`samclip_hf.distillation.provenance`].

        Args:
            metrics (`dict[str, float]`):
                Metrics that `train` returned.
        """
        if self.is_world_process_zero():
            self._write_provenance(Path(self.args.output_dir), {"train_images_seen": self._images} | metrics)

    def _write_provenance(self, folder: Path, metrics: dict[str, float]) -> None:
        teachers = self._teacher_names()
        models = {"sam_teacher": self.sam_teacher, "clip_teacher": self.clip_teacher}
        stage = {
            "arguments": self._recorded_arguments() | teachers,
            "teachers": teachers,
            "commits": {
                name: getattr(teacher.model.config, "_commit_hash", None)  # None for a folder
                for name, teacher in models.items()
                if isinstance(teacher, SamTeacher | ClipTeacher)
            },
            "steps": self.state.global_step,
            "images_seen": metrics["train_images_seen"],
            "seconds": metrics.get("train_runtime"),
        }
        if self.frozen_by_user:
            stage["frozen"] = self.frozen_by_user
        if self.args.load_best_model_at_end and not self.is_in_train:
            stage["best_step"] = self.state.best_global_step  # the step of the weights
        provenance.write(folder, self.args, stage | self.stage_record(), self.earlier_stages)

    def _teacher_names(self) -> dict[str, str]:
        """The names of the teachers that were used, by argument, and of the SAM that a new student starts from."""
        names = {}
        if isinstance(self.sam_teacher, SamTeacher):
            names["sam_teacher"] = self.sam_teacher.model.name_or_path
        elif self.args.model is None:
            names["sam_teacher"] = self.args.sam_teacher
        if isinstance(self.clip_teacher, EmbeddingCache):
            names["clip_teacher"] = self.clip_teacher.description.teacher
        elif isinstance(self.clip_teacher, ClipTeacher):
            names["clip_teacher"] = self.clip_teacher.model.name_or_path
        packaged = (miniature.sam_teacher(), miniature.clip_teacher())
        return {argument: "miniature" if name in packaged else name for argument, name in names.items()}

    def _recorded_arguments(self) -> dict[str, Any]:
        """The arguments that determined the weights, with the precision and the optimizer that were used."""
        arguments = provenance.recorded_arguments(self.args)
        arguments["warmup_steps"] = self.args.get_warmup_steps(self.args.max_steps)  # also of a fraction
        if "decoder_lr_multiplier" in arguments:
            arguments["decoder_lr_multiplier"] = self.args.effective_decoder_lr_multiplier
        if self.args.model is None:
            arguments["clip_head_layers"] = self._head_config.num_hidden_layers
            arguments["clip_head_pooling"] = self._head_config.pooling
        for precision in ("bf16", "fp16"):  # `accelerate launch` sets it too
            arguments[precision] = self.accelerator.mixed_precision == precision
        if self._optimizer_is_given:
            groups = self.optimizer.param_groups
            arguments = {name: value for name, value in arguments.items() if not name.startswith(("adam_", "optim_"))}
            arguments |= {
                "optim": type(getattr(self.optimizer, "optimizer", self.optimizer)).__name__,  # accelerate wraps it
                "learning_rate": [float(group.get("initial_lr", group["lr"])) for group in groups],
                "weight_decay": [group.get("weight_decay") for group in groups],
                "encoder_lr_multiplier": None,
                "decoder_lr_multiplier": None,
            }
        elif self.optimizer_cls_and_kwargs is not None:
            optimizer_class, optimizer_arguments = self.optimizer_cls_and_kwargs
            arguments = {name: value for name, value in arguments.items() if not name.startswith("adam_")}
            arguments |= {"optim": optimizer_class.__name__, "optim_args": repr(optimizer_arguments)}
        return arguments

    # Checkpoints.

    @property
    def _data_order(self) -> dict[str, Any]:
        """The stage and the settings that determine the order of the samples. They must be equal to resume."""
        order: dict[str, Any] = {
            "stage": self.args.stage,
            "seed": self.args.seed,
            "num_readers": self.args.num_readers,
            "eval_fraction": self.args.eval_fraction,
        }
        for name, task in self.train_dataset.tasks.items():
            order[f"shuffle_buffer of {name}_data"] = task.shuffle_buffer
            order[f"{name}_data_weights"] = task.weights
            order[f"{name}_data's shards"] = [shards_checksum(stream.shards.names) for stream in task.streams]
        return order

    def _make_settings(self) -> dict[str, Any]:
        """Everything else that determines the weights and must be equal to resume. Models and data are compared by
        content, because their folders may move. Batch sizes are compared in total, over all processes."""
        args = self.args
        settings = {name: value for name, value in self._recorded_arguments().items() if name not in MAY_CHANGE}
        settings["warmup_steps"] = args.warmup_steps
        for name in ("clip_batch_size", "sam_batch_size"):
            if name == "clip_batch_size" or args.reads_masks:
                settings[f"{name} of all processes"] = (
                    getattr(args, name) * args.world_size * args.gradient_accumulation_steps
                )
        teachers: dict[str, Any] = {"clip_teacher": self.clip_teacher, "sam_teacher": self.sam_teacher}
        if self.region_cache is not None:
            teachers["region_embedding_cache"] = self.region_cache
        for name, teacher in teachers.items():
            if isinstance(teacher, EmbeddingCache | RegionEmbeddingCache):
                settings[f"{name}'s checksum"] = teacher.checksum()
            elif teacher is not None:
                settings[f"{name}'s checksum"] = weights_checksum(teacher.parameters())
        if args.lora_r:
            settings["model's checksum"] = self._base_checksum
        settings["frozen"] = self.frozen_by_user
        return json.loads(json.dumps(settings, default=str))  # as it is read from a checkpoint

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        processes = gather_object(
            [{"streams": self._loader.state, "images": self._images, "log": self._averages.state()}]
        )
        try:
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)  # an incomplete checkpoint of an earlier run
                folder.mkdir(parents=True)
                run = {
                    "order": self._data_order,
                    "settings": self._settings,
                    "save_only_model": self.args.save_only_model,
                    "skipped_steps": self._skipped_steps,
                }
                write_stream_state(folder, run, processes)
                images = sum(process["images"] for process in processes)
                self._write_provenance(folder, {"train_images_seen": images})
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk, in Python, torch and safetensors
            shutil.rmtree(folder, ignore_errors=True)
            raise OSError(
                f"{folder} cannot be written and was removed: {error}. Earlier checkpoints are unchanged. Free disk "
                "space and resume from the last one."
            ) from error

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The trainer's state is written next and marks the checkpoint as complete, so the files of all processes must
        # exist before.
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if read_stream_state(Path(resume_from_checkpoint)).get("save_only_model"):
            raise DataError(
                f"{resume_from_checkpoint} was saved with save_only_model and cannot be resumed. Start a new run from "
                "its weights with --model."
            )
        self._load_weights_and_counters(resume_from_checkpoint, model)

    def _load_weights_and_counters(self, checkpoint: str, model: nn.Module | None = None) -> None:
        state = read_stream_state(Path(checkpoint))
        saved, current = state["order"], self._data_order
        changed = [name for name in {**saved, **current} if saved.get(name) != current.get(name)]
        if "settings" in state:
            changed += [
                name
                for name, value in state["settings"].items()
                if name not in current and value != self._settings.get(name)
            ]
            saved, current = {**state["settings"], **saved}, {**self._settings, **current}
        else:
            logger.warning(
                f"{checkpoint} was saved by an earlier release, which did not record all arguments. Pass the same "
                "ones."
            )
        if changed:
            changes = "; ".join(f"{name} from {saved.get(name)} to {current.get(name)}" for name in changed)
            raise DataError(
                f"{checkpoint} cannot be resumed with other settings: {changes}. Start a new run from its weights "
                "with --model."
            )
        trainable = {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}
        super()._load_from_checkpoint(checkpoint, model)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(trainable[name])  # peft makes all of the CLIP head trainable
        # `Trainer` reads its own state later.
        step = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME)).global_step
        # The number of processes and gradient_accumulation_steps may change together.
        streams = state["streams"] | {"micro_batches": step * self.args.gradient_accumulation_steps}
        is_first = self.args.process_index == 0
        if not is_first:
            streams |= {"seen": 0, "skipped": {}}
        self._loader.load_state(streams)
        self._images = state["images"] if is_first else 0
        self._images_at_log = state["images"]
        self._skipped_steps = state["skipped_steps"]
        if stages := provenance.read(checkpoint):
            self.earlier_stages = stages[:-1]
        if self.args.process_index < len(state["logs"]):
            self._averages.load_state(state["logs"][self.args.process_index])

    def load_finished_run(self, checkpoint: Path) -> None:
        """
        Loads the result of a run that has completed all steps, but stopped before its model was saved.

        Args:
            checkpoint (`Path`):
                The last checkpoint of the run.

        Raises:
            DataError: If the settings of the run differ from this trainer's.
        """
        self._load_weights_and_counters(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:  # of torch, which compares the sizes of the parameter groups
            raise DataError(
                f"{checkpoint} cannot be resumed: its optimizer has other groups of parameters, for example because "
                "an earlier release saved it. Start a new run from its weights with --model."
            ) from error

    # Evaluation.

    def _read_held_out(self, training: StepStream, num_batches: int) -> list[dict[str, Any]]:
        """Reads the micro-batches of the evaluation. They are read only once, because few of the samples that must be
        read are held out."""
        tasks: dict[str, Any] = {}
        for name, task in training.tasks.items():
            held_out = [stream.complement() for stream in task.streams]
            tasks[name] = dataclasses.replace(task, streams=held_out, shuffle_buffer=1)  # type: ignore[type-var]
        stream = StepStream(tasks, training.seed, num_readers=1, rank=training.rank, world_size=training.world_size)
        return list(islice(StepLoader(stream, max_corrupt_fraction=1.0), num_batches))

    def _draw_panel(self, model: SamClipModel, inputs: dict[str, Any]) -> None:
        texts = self.args.eval_prompts
        text_embeds = None
        if texts:
            tokens = self.processing_class.tokenizer(texts, padding=True, return_tensors="pt").to(self.args.device)
            text_embeds = F.normalize(model.get_text_features(**tokens).pooler_output.float(), dim=-1)
        # All processes run the model, which FSDP may have sharded.
        rows = panel_rows(
            model,
            inputs,
            self.sam_teacher,
            self.image_mean,
            self.image_std,
            texts,
            text_embeds,
            text_image_size=max(self.args.clip_resolutions),
        )
        if rows and self.args.should_save:
            step = self.state.global_step
            path = Path(self.args.output_dir) / "panels" / f"step_{step:06d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_panel(path, rows, f"Held-out images, step {step}")


def add_adapters(model: SamClipModel, rank: int) -> nn.Module:
    """
    Adds LoRA adapters to image encoder and mask decoder. The CLIP head stays fully trainable. Frozen layers get no
    adapters, and frozen parameters of the CLIP head stay frozen.

    Returns:
        `peft.PeftModel`: A model whose `merge_and_unload()` returns a [`SamClipModel`].
    """
    from peft import LoraConfig, get_peft_model

    frozen_layers = [
        name
        for name, module in model.named_modules()
        if re.fullmatch(ADAPTED_MODULES, name) and not any(p.requires_grad for p in module.parameters())
    ]
    frozen = [name for name, parameter in model.clip_head.named_parameters() if not parameter.requires_grad]
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=ADAPTED_MODULES,
        exclude_modules=frozen_layers or None,
        modules_to_save=["clip_head"],
    )
    # peft freezes the weights, and `merge_and_unload` leaves them frozen.
    by_peft = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model._frozen_by_trainer = getattr(model, "_frozen_by_trainer", set()) | by_peft
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if name.startswith(COPIED_HEAD) and name.removeprefix(COPIED_HEAD) in frozen:
            parameter.requires_grad_(False)  # peft trains all of the copy that it makes
    return adapted


def freeze(model: SamClipModel, trained_parts: Sequence[str]) -> list[str]:
    """
    Freezes all parameters except those of the named submodules. Parameters of these submodules that the user has
    frozen stay frozen.

    Returns:
        `list[str]`: What the user has frozen in the named submodules: names of submodules, or of single parameters.
    """
    # The parameters that an earlier call has frozen: one model may pass through all stages in one process.
    earlier: set[str] = getattr(model, "_frozen_by_trainer", set())
    parameters = dict(model.named_parameters())
    by_user = {name for name, parameter in parameters.items() if not parameter.requires_grad} - earlier
    trained = {
        name for name in parameters if name not in by_user and name.startswith(tuple(f"{p}." for p in trained_parts))
    }
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trained)
    model._frozen_by_trainer = parameters.keys() - trained - by_user

    frozen: list[str] = []
    for part in trained_parts:
        module = model.get_submodule(part)
        for name, _ in [*module.named_modules(prefix=part), *module.named_parameters(prefix=part)]:
            inside = {parameter for parameter in parameters if f"{parameter}.".startswith(f"{name}.")}
            is_listed = any(name.startswith(f"{other}.") for other in frozen)
            if inside and inside <= by_user and not is_listed:
                frozen.append(name)
    return frozen
