"""The three stages of SAM-CLIP's training as one `Trainer`."""

import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.utils import logging

from ..modeling_samclip import SamClipModel
from ..processing_samclip import SamClipProcessor
from .arguments import SamClipTrainingArguments
from .collation import ClipBatches, SamBatches, StepStream
from .losses import cosine_distillation_loss, mask_distillation_loss, mask_iou
from .streams import open_stream
from .teachers import ClipTeacher, SamTeacher, normalize

logger = logging.get_logger(__name__)

COUNTS_FILE = "images_seen_and_skipped.json"  # in every checkpoint, so that a resumed run goes on counting

# What each stage trains (paper, section 4). The prompt encoder, SAM's positional embedding and the text side never do.
TRAINED_PARTS = {1: ("clip_head",), 2: ("vision_encoder", "mask_decoder", "clip_head"), 3: ("clip_head",)}


class SamClipTrainer(Trainer):
    r"""
    Distils both teachers into a [`SamClipModel`].

    An item of the data loader is one micro-batch for each teacher of the stage. Their backward passes follow one
    another, so that only one graph is in memory, and the optimizer steps after both.

    model ([`SamClipModel`]):
        The student. What the stage does not train is frozen.
    args ([`SamClipTrainingArguments`]):
        The stage and its numbers.
    clip_teacher ([`ClipTeacher`]), sam_teacher ([`SamTeacher`], needed in stage 2):
        Frozen; moved to the student's device, not saved.
    processing_class ([`SamClipProcessor`]):
        Saved with the student; its size and normalisation are the student's.
    """

    args: SamClipTrainingArguments
    optimizer: torch.optim.Optimizer  # from create_optimizer, before the first step

    def __init__(
        self,
        model: SamClipModel,
        args: SamClipTrainingArguments,
        clip_teacher: ClipTeacher,
        sam_teacher: SamTeacher | None = None,
        processing_class: SamClipProcessor | None = None,
        **kwargs,
    ):
        if args.stage == 2 and sam_teacher is None:
            raise ValueError("Stage 2 distils SAM as well: give its sam_teacher.")
        if processing_class is None:
            raise ValueError("Give the student's processor as processing_class: it says how the student sees images.")
        self.clip_teacher = clip_teacher
        self.sam_teacher = sam_teacher if args.stage == 2 else None
        clip_teacher.check(model)
        patch_size = model.config.vision_config.patch_size
        if bad := [size for size in args.clip_sizes if size % patch_size]:
            raise ValueError(f"clip_sizes {bad} are not multiples of the student's patch size, {patch_size}.")
        image_processor = processing_class.image_processor
        self.image_mean, self.image_std = image_processor.image_mean, image_processor.image_std
        if self.sam_teacher is not None:
            self.sam_teacher.check(model)
        freeze(model, args.stage)
        train_dataset = self._open_streams(args)
        super().__init__(
            model=model, args=args, processing_class=processing_class, train_dataset=train_dataset, **kwargs
        )
        self._sums: dict[str, Tensor | float] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)
        self._skipped: dict[str, int] = defaultdict(int)
        self._images = self._images_at_log = 0  # of all processes
        self._time_at_log = time.perf_counter()
        for teacher in (self.clip_teacher, self.sam_teacher):
            if teacher is not None:
                teacher.to(args.device)

    def _open_streams(self, args: SamClipTrainingArguments) -> StepStream:
        tasks: dict[str, ClipBatches | SamBatches] = {
            "clip": ClipBatches(
                [open_stream(name) for name in args.clip_data],
                image_sizes=args.clip_sizes,
                teacher_image_size=self.clip_teacher.image_size,
                batch_size=args.clip_batch_size,
                min_crop=args.min_crop,
            )
        }
        if self.sam_teacher is not None:
            tasks["sam"] = SamBatches(
                [open_stream(name, with_masks=True) for name in args.sam_data],
                image_size=self.sam_teacher.image_size,
                batch_size=args.sam_batch_size,
                masks_per_image=args.masks_per_image,
                max_box_noise=args.max_box_noise,
            )
        return StepStream(
            tasks,
            seed=args.seed,
            shuffle_buffer=args.shuffle_buffer,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            rank=args.process_index,
            world_size=args.world_size,
        )

    def get_train_dataloader(self) -> DataLoader:
        """Whole steps, already this process's own: nothing for accelerate to shard."""
        num_workers = min(self.args.dataloader_num_workers, self.train_dataset.max_workers)
        if num_workers < self.args.dataloader_num_workers:
            logger.warning(f"Using {num_workers} data loader workers: the streams have no more shards a process.")
        return DataLoader(
            self.train_dataset,
            batch_size=None,
            num_workers=num_workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            prefetch_factor=self.args.dataloader_prefetch_factor if num_workers else None,
            persistent_workers=num_workers > 0,
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with a lower learning rate on image encoder and SAM head than on the CLIP head (paper, section 4)."""
        model = self.model if model is None else model
        if self.optimizer is None:
            decayed = set(self.get_decay_parameter_names(model))
            groups: dict[tuple[str, bool], list[nn.Parameter]] = defaultdict(list)
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    part = "head" if "clip_head." in name else "encoder"
                    groups[part, name in decayed].append(parameter)
            scale = {"head": 1.0, "encoder": self.args.encoder_learning_rate_scale}
            optimizer_class, optimizer_arguments = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(
                [
                    {
                        "params": parameters,
                        "lr": self.args.learning_rate * scale[part],
                        "weight_decay": self.args.weight_decay if decay else 0.0,
                        "name": part,
                    }
                    for (part, decay), parameters in groups.items()
                ],
                **optimizer_arguments,
            )
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch=None) -> Tensor:
        """Forward and backward of every micro-batch in `inputs`, one after the other; returns the sum of their
        losses."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        for cause, number in inputs.pop("skipped").items():
            self._skipped[cause] += number
        total = torch.zeros((), device=self.args.device)
        for task, batch in inputs.items():
            self._images += len(batch["images"]) * self.args.world_size
            with self.compute_loss_context_manager():
                loss = self.clip_loss(model, **batch) if task == "clip" else self.sam_loss(model, **batch)
            loss = loss / self.current_gradient_accumulation_steps
            # Under DDP both backwards average gradients; averaging an average again changes nothing.
            self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def clip_loss(self, model: nn.Module, images: Tensor, teacher_images: Tensor) -> Tensor:
        """L_CLIP of one micro-batch from [`ClipBatches`]."""
        target = self.clip_teacher(teacher_images)
        outputs = model(pixel_values=normalize(images, self.image_mean, self.image_std))
        loss = cosine_distillation_loss(outputs.image_embeds, target)["cosine"]
        self._record({"clip_loss": loss, f"cosine_{images.shape[-1]}px": 1 - loss})
        return loss

    def sam_loss(self, model: nn.Module, images: Tensor, content_sizes: Tensor, **prompts) -> Tensor:
        """lambda * L_SAM of one micro-batch from [`SamBatches`]."""
        assert self.sam_teacher is not None  # only stage 2 has SAM batches
        prompt = "point" if "input_points" in prompts else "box"
        prompts["multimask_output"] = prompt == "point"
        teacher_masks, teacher_iou = self.sam_teacher(images, content_sizes, **prompts)
        outputs = model(pixel_values=normalize(images, self.image_mean, self.image_std, content_sizes), **prompts)
        parts = mask_distillation_loss(outputs.pred_masks, teacher_masks, outputs.iou_scores, teacher_iou)
        loss = (
            self.args.focal_weight * parts["focal"]
            + self.args.dice_weight * parts["dice"]
            + self.args.iou_head_weight * parts["iou_head"]
        )
        self._record({f"sam_{name}": part for name, part in parts.items()})
        self._record({"sam_loss": loss, f"mask_iou_{prompt}": mask_iou(outputs.pred_masks, teacher_masks)})
        return self.args.sam_loss_weight * loss

    def _record(self, values: dict[str, Tensor]) -> None:
        """Adds to the averages that the next log shows; stays on the device until then."""
        for name, value in values.items():
            self._sums[name] += value.detach()
            self._counts[name] += 1

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            counts = {"images": self._images, "skipped": dict(self._skipped)}
            (folder / COUNTS_FILE).write_text(json.dumps(counts, indent=2) + "\n")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = Path(resume_from_checkpoint) / COUNTS_FILE
        if path.is_file():
            counts = json.loads(path.read_text())
            self._images = self._images_at_log = counts["images"]
            self._skipped.update(counts["skipped"])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in [`Trainer`]; adds this process's averages since the last log, learning rates by part of the model,
        images a second, and how many samples were skipped so far, by cause."""
        if "loss" in logs:
            logs.update({name: float(total) / self._counts[name] for name, total in sorted(self._sums.items())})
            self._sums.clear()
            self._counts.clear()
            logs.pop("learning_rate", None)
            logs.update({f"learning_rate_{group['name']}": group["lr"] for group in self.optimizer.param_groups})
            now = time.perf_counter()
            logs["images_per_second"] = (self._images - self._images_at_log) / (now - self._time_at_log)
            self._images_at_log, self._time_at_log = self._images, now
        if "train_runtime" in logs:  # the last log of a run, which train() returns too
            del logs["train_samples_per_second"]  # of a batch size that is not used
            logs["train_images_seen"] = self._images
        logs.update({f"skipped_{cause.replace(' ', '_')}": number for cause, number in self._skipped.items()})
        super().log(logs, start_time)


def freeze(model: SamClipModel, stage: int) -> None:
    """Leaves gradients to the stage's parts alone."""
    model.requires_grad_(False)
    for part in TRAINED_PARTS[stage]:
        getattr(model, part).requires_grad_(True)
