"""The three stages of SAM-CLIP's training as one `Trainer`."""

import contextlib
import dataclasses
import json
import math
import re
import shutil
import signal
import sys
import threading
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import gather, gather_object
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from ..datasets.streams import DataError, open_stream
from ..modeling_samclip import SamClipModel
from ..processing_samclip import SamClipProcessor
from . import provenance
from .arguments import SamClipTrainingArguments
from .collation import ClipBatches, SamBatches, StepLoader, StepStream, furthest
from .embedding_cache import EmbeddingCache
from .losses import cosine_distillation_loss, mask_distillation_loss, mask_iou
from .panel import PanelRow, draw_panel, resize_mask, text_map, to_image
from .teachers import ClipTeacher, SamTeacher, normalize

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

logger = logging.get_logger(__name__)

MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes
STREAM_STATE_NAME = "stream_state.json"  # in every checkpoint: where the data stand, and what was counted so far
MAX_SKIPPED_STEPS = 10  # in a row, before training stops

# With LoRA, what gets adapters instead: every matrix of the image encoder's and the mask decoder's transformers.
ADAPTED_MODULES = (
    r"vision_encoder\.layers\.\d+\.(attn\.(qkv|proj)|mlp\.lin[12])"
    r"|mask_decoder\.transformer\..*\.([qkv]_proj|out_proj|mlp\.lin[12])"
)
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
    clip_teacher ([`ClipTeacher`] or [`EmbeddingCache`]):
        Frozen; moved to the student's device, not saved. Or its embeddings, computed before.
    sam_teacher ([`SamTeacher`], needed in stage 2):
        As the CLIP teacher.
    processing_class ([`SamClipProcessor`]):
        Saved with the student; its size and normalisation are the student's.
    prepare_push (`Callable[[Path, str], None]`, *optional*):
        Called in the main process with the output folder and the repository id before the folder is pushed to the Hub.
        [`samclip_hf.publishing.prepare_push`] adds the model code and the model card. By default the card is that of
        [`Trainer`], without the model code.
    """

    args: SamClipTrainingArguments
    optimizer: torch.optim.Optimizer  # from create_optimizer, before the first step
    control: TrainerControl

    def __init__(
        self,
        model: SamClipModel,
        args: SamClipTrainingArguments,
        clip_teacher: ClipTeacher | EmbeddingCache,
        sam_teacher: SamTeacher | None = None,
        processing_class: SamClipProcessor | None = None,
        prepare_push: Callable[[Path, str], None] | None = None,
        **kwargs,
    ):
        if args.stage == 2 and sam_teacher is None:
            raise ValueError("Stage 2 distils SAM as well: give its sam_teacher.")
        if processing_class is None:
            raise ValueError("Give the student's processor as processing_class: it says how the student sees images.")
        self.prepare_push = prepare_push
        self.clip_teacher = clip_teacher
        self.sam_teacher = sam_teacher if args.stage == 2 else None
        patch_size = model.config.vision_config.patch_size
        for name in ("clip_resolutions", "sam_resolutions"):
            if bad := [size for size in getattr(args, name) if size % patch_size]:
                raise ValueError(f"{name} {bad} are not multiples of the student's patch size, {patch_size}.")
        image_processor = processing_class.image_processor
        self.image_mean, self.image_std = image_processor.image_mean, image_processor.image_std
        if self.sam_teacher is not None:
            self.sam_teacher.check(model)
        train_dataset = self._open_streams(model, args)
        freeze(model, args.stage)
        student = add_adapters(model, args.lora_r) if args.lora_r else model
        trainable = sum(p.numel() for p in student.parameters() if p.requires_grad)
        total = sum(p.numel() for p in student.parameters())
        if args.should_log:
            logger.warning(f"Training {trainable / 1e6:.2f} of {total / 1e6:.2f} M parameters.")
        super().__init__(
            model=student,
            args=args,
            processing_class=processing_class,
            train_dataset=train_dataset,
            eval_dataset=self._read_held_out(train_dataset, args.eval_batches) if args.eval_strategy != "no" else None,
            **kwargs,
        )
        if self.is_deepspeed_enabled:
            raise ValueError(
                "DeepSpeed steps the optimizer in every backward pass; stage 2 has two in a step, and a step that is "
                "not to be taken would be. Use DDP or FSDP."
            )
        if self.is_fsdp_enabled and args.lora_r:
            raise ValueError("Adapters under FSDP are not supported: use DDP, for which LoRA leaves the memory.")
        self.interruption = PreemptionCallback()
        self.add_callback(self.interruption)
        self._loader = StepLoader(
            self.train_dataset,
            max_corrupt_fraction=args.max_corrupt_fraction,
            num_workers=args.dataloader_num_workers,
            prefetch_factor=args.dataloader_prefetch_factor if args.dataloader_num_workers else None,
        )
        # Averages since the last log, and counts since the beginning, of this process.
        self._sums: dict[str, Tensor | float] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)
        self._images = 0
        self._skipped_steps = self._skipped_steps_in_a_row = 0
        self._images_at_log, self._time_at_log = 0, time.perf_counter()  # the former of all processes
        for teacher in (self.clip_teacher, self.sam_teacher):
            if isinstance(teacher, nn.Module):
                teacher.to(args.device)

    def _read_held_out(self, training: StepStream, num_batches: int) -> list[dict[str, Any]]:
        """The micro-batches that every evaluation sees, read once: a hundred rows may have to be passed over for each
        held-out one."""
        tasks = {
            name: dataclasses.replace(task, streams=[s.complement() for s in task.streams], shuffle_buffer=1)
            for name, task in training.tasks.items()
        }
        stream = StepStream(tasks, training.seed, num_lanes=1, rank=training.rank, world_size=training.world_size)
        return list(islice(StepLoader(stream, max_corrupt_fraction=1.0), num_batches))

    def _open_streams(self, student: SamClipModel, args: SamClipTrainingArguments) -> StepStream:
        share = args.eval_fraction
        streams = [open_stream(name, eval_fraction=share) for name in args.clip_data]
        if isinstance(self.clip_teacher, EmbeddingCache):
            self.clip_teacher.check(student, streams, args.min_crop_scale, args.clip_teacher)
            streams = self.clip_teacher.attach(streams)
            store = self.clip_teacher.description
            teacher_image_size, teacher_filter = store.image_size, Image.Resampling(store.resample)
        else:
            self.clip_teacher.check(student)
            store = None
            teacher_image_size, teacher_filter = self.clip_teacher.image_size, self.clip_teacher.resample
        tasks: dict[str, ClipBatches | SamBatches] = {
            "clip": ClipBatches(
                streams,
                shares=args.clip_data_weights or [],
                image_sizes=args.clip_resolutions,
                teacher_image_size=teacher_image_size,
                batch_size=args.clip_batch_size,
                shuffle_buffer=args.shuffle_buffer,
                min_crop_scale=args.min_crop_scale,
                teacher_filter=teacher_filter,
                store=store,
            )
        }
        if self.sam_teacher is not None:
            streams = [
                open_stream(name, with_masks=True, shard_fraction=args.sam_shard_fraction, eval_fraction=share)
                for name in args.sam_data
            ]
            tasks["sam"] = SamBatches(
                streams,
                shares=args.sam_data_weights or [],
                image_size=self.sam_teacher.image_size,
                student_sizes=args.sam_resolutions or [self.sam_teacher.image_size],
                batch_size=args.sam_batch_size,
                masks_per_image=args.masks_per_image,
                max_box_noise=args.max_box_noise,
                shuffle_buffer=args.sam_shuffle_buffer,
            )
        return StepStream(
            tasks,
            seed=args.seed,
            num_lanes=args.num_readers,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            rank=args.process_index,
            world_size=args.world_size,
        )

    def get_train_dataloader(self) -> StepLoader:
        """Micro-batches that are already this process's own: nothing for accelerate to shard."""
        return self._loader

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
            scale = {"head": 1.0, "encoder": self.args.encoder_lr_multiplier}
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
        shares = inputs.pop("shares")
        total = torch.zeros((), device=self.args.device)
        for task, batch in inputs.items():
            # A batch of nothing is not to be seen in the averages.
            recording = self._recording_apart() if shares[task] == 0 else contextlib.nullcontext()
            with recording, self.compute_loss_context_manager():
                loss = self.clip_loss(model, **batch) if task == "clip" else self.sam_loss(model, **batch)
            # A sample that could not be used counts as one without a loss, whichever process met it.
            loss = loss * shares[task]
            if shares[task] > 0:
                self._images += len(batch["images"])
            # Under DDP both backwards average gradients; averaging an average again changes nothing.
            self.accelerator.backward(loss / self.current_gradient_accumulation_steps)
            total += loss.detach()
        self._record({"loss": total})
        return total / self.current_gradient_accumulation_steps

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """As in [`Trainer`]; a step whose gradient is not finite, or above `skip_step_grad_norm`, is not taken, and
        `MAX_SKIPPED_STEPS` of them in a row end the training."""
        if self.accelerator.scaler is not None:  # float16's scaler expects infinities, and passes over them itself
            return super()._clip_grad_norm(model)
        gradients: dict[str, list[Tensor]] = {part: [] for part in TRAINED_PARTS[self.args.stage]}
        for name, parameter in self.accelerator.unwrap_model(model).named_parameters():
            if parameter.grad is not None:
                gradients[next(part for part in gradients if f"{part}." in name)].append(parameter.grad)
        for part, own in gradients.items():
            self._record({f"grad_norm_{part}": torch.nn.utils.get_total_norm(own)})
        norm = super()._clip_grad_norm(model)
        value = float(norm)
        if math.isfinite(value) and value <= self.args.skip_step_grad_norm:
            self._skipped_steps_in_a_row = 0
            return norm
        model.zero_grad()  # to the optimizer a parameter without gradient is none of its business
        self._skipped_steps += 1
        self._skipped_steps_in_a_row += 1
        logger.warning(f"Step {self.state.global_step + 1} is not taken: its gradient's norm is {value}.")
        if self._skipped_steps_in_a_row == MAX_SKIPPED_STEPS:
            raise FloatingPointError(
                f"{MAX_SKIPPED_STEPS} steps in a row had a gradient that is not finite or above skip_step_grad_norm. "
                "Go on from the last checkpoint with a lower learning rate, or in float32 where this was not."
            )
        return norm

    def clip_loss(
        self,
        model: nn.Module,
        images: Tensor,
        teacher_images: Tensor | None = None,
        teacher_embeds: Tensor | None = None,
    ) -> Tensor:
        """L_CLIP of one micro-batch from [`ClipBatches`]."""
        if teacher_embeds is None:
            assert isinstance(self.clip_teacher, ClipTeacher) and teacher_images is not None  # the samples' other kind
            with self.accelerator.autocast():
                teacher_embeds = self.clip_teacher(teacher_images)
        outputs = model(pixel_values=normalize(images, self.image_mean, self.image_std))
        loss = cosine_distillation_loss(outputs.image_embeds, teacher_embeds)["cosine"]
        self._record({"clip_loss": loss, f"cosine_{images.shape[-1]}px": 1 - loss})
        return loss

    def sam_loss(
        self, model: nn.Module, images: Tensor, content_sizes: Tensor, student_images: Tensor | None = None, **prompts
    ) -> Tensor:
        """lambda * L_SAM of one micro-batch from [`SamBatches`]. Where the student sees another size than the teacher,
        the teacher's masks are resized to the student's."""
        assert self.sam_teacher is not None  # only stage 2 has SAM batches
        prompt = "point" if "input_points" in prompts else "box"
        prompts["multimask_output"] = prompt == "point"
        with self.accelerator.autocast():
            teacher_masks, teacher_iou = self.sam_teacher(images, content_sizes, **prompts)
        if student_images is not None:
            scale = student_images.shape[-1] / images.shape[-1]
            images, content_sizes = student_images, (content_sizes * scale).round().long().clamp_min(1)
            for name in prompts.keys() & {"input_points", "input_boxes"}:
                prompts[name] = (prompts[name] + 0.5) * scale - 0.5
        outputs = model(pixel_values=normalize(images, self.image_mean, self.image_std, content_sizes), **prompts)
        size = outputs.pred_masks.shape[-2:]
        if teacher_masks.shape[-2:] != size:
            resized = F.interpolate(teacher_masks.flatten(0, 1).float(), size, mode="bilinear", antialias=True)
            teacher_masks = resized.view(*teacher_masks.shape[:-2], *size)
        parts = mask_distillation_loss(outputs.pred_masks, teacher_masks, outputs.iou_scores, teacher_iou)
        loss = (
            self.args.focal_weight * parts["focal"]
            + self.args.dice_weight * parts["dice"]
            + self.args.iou_head_weight * parts["iou_head"]
        )
        self._record({f"sam_{name}": part for name, part in parts.items()})
        self._record({"sam_loss": loss, f"mask_iou_{prompt}": mask_iou(outputs.pred_masks, teacher_masks)})
        return self.args.sam_loss_weight * loss

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Every figure of the training's own log on `eval_batches` micro-batches of held-out samples, always the same
        ones, and a picture of the first of them, `panels/step_*.png`."""
        batches = self.eval_dataset if eval_dataset is None else eval_dataset
        model = self.accelerator.unwrap_model(self.model).eval()
        with self._recording_apart(), self.compute_loss_context_manager():
            for number, batch in enumerate(batches):
                inputs = self._prepare_inputs(dict(batch))
                shares = inputs.pop("shares")
                inputs = {task: tensors for task, tensors in inputs.items() if shares[task] > 0}
                for task, tensors in inputs.items():
                    self.clip_loss(model, **tensors) if task == "clip" else self.sam_loss(model, **tensors)
                if number == 0:  # in every process: where the model is sharded, all must take part
                    rows = self._panel_rows(model, inputs)
                    if rows and self.args.should_save:
                        path = Path(self.args.output_dir) / "panels" / f"step_{self.state.global_step:06d}.png"
                        title = f"held-out images, step {self.state.global_step}"
                        draw_panel(path, rows, self.args.eval_prompts, title)
            metrics = {f"{metric_key_prefix}_{name}": value for name, value in self._averages().items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _panel_rows(self, model: SamClipModel, inputs: dict[str, Any]) -> list[PanelRow]:
        if not inputs:
            return []
        batch = dict(inputs.get("sam") or inputs["clip"])
        images, sizes = batch.pop("images"), batch.pop("content_sizes", None)
        batch.pop("student_images", None)
        rows = []
        for number in range(min(4, len(images))):
            size = None if sizes is None else sizes[number]
            row = PanelRow(to_image(images[number], size))
            one = images[number : number + 1]
            if size is not None and self.sam_teacher is not None:
                prompt = {name: value[number : number + 1, :1] for name, value in batch.items()}
                prompt["multimask_output"] = False
                height, width = row.image.shape[:2]
                teacher_mask = self.sam_teacher(one, size[None], **prompt)[0][0, 0, 0]
                pixel_values = normalize(one, self.image_mean, self.image_std, size[None])
                student_mask = model(pixel_values=pixel_values, **prompt).pred_masks[0, 0, 0]
                row.teacher_mask = resize_mask(teacher_mask, images.shape[-2:])[:height, :width]
                row.student_mask = resize_mask(student_mask, images.shape[-2:])[:height, :width]
                if "input_points" in prompt:
                    row.point = prompt["input_points"][0, 0, 0].cpu().numpy()
                else:
                    row.box = prompt["input_boxes"][0, 0].cpu().numpy()
            if self.args.eval_prompts:
                content = one[:, :, : row.image.shape[0], : row.image.shape[1]]
                size_of_clip = (max(self.args.clip_resolutions),) * 2
                resized = F.interpolate(content.float(), size=size_of_clip, mode="bilinear", antialias=True)
                pixel_values = normalize(resized, self.image_mean, self.image_std)
                row.texts = text_map(model, pixel_values, self._panel_embeds(model), row.image.shape[:2])
            rows.append(row)
        return rows

    def _panel_embeds(self, model: SamClipModel) -> Tensor:
        tokens = self.processing_class.tokenizer(self.args.eval_prompts, padding=True, return_tensors="pt")
        features = model.get_text_features(**tokens.to(self.args.device)).pooler_output
        return F.normalize(features.float(), dim=-1)

    @contextlib.contextmanager
    def _recording_apart(self) -> Iterator[None]:
        """What is recorded meanwhile does not enter the training's averages."""
        sums, counts = self._sums, self._counts
        self._sums, self._counts = defaultdict(float), defaultdict(int)
        try:
            yield
        finally:
            self._sums, self._counts = sums, counts

    def _averages(self) -> dict[str, float]:
        """Of everything recorded since the last time, over all processes."""
        processes = gather_object([{name: (float(t), self._counts[name]) for name, t in self._sums.items()}])
        names = sorted({name for sums in processes for name in sums})
        pairs = {name: [sums[name] for sums in processes if name in sums] for name in names}
        self._sums.clear()
        self._counts.clear()
        return {name: sum(t for t, _ in of) / sum(number for _, number in of) for name, of in pairs.items()}

    def _record(self, values: dict[str, Tensor]) -> None:
        """Adds to the averages that the next log shows; stays on the device until then."""
        for name, value in values.items():
            self._sums[name] += value.detach()
            self._counts[name] += 1

    @property
    def _order(self) -> dict[str, Any]:
        """What a checkpoint must have been made with: the stage, and what decides over the order of samples."""
        order: dict[str, Any] = {
            "stage": self.args.stage,
            "seed": self.args.seed,
            "num_readers": self.args.num_readers,
        }
        order["eval_fraction"] = self.args.eval_fraction
        for name, task in self.train_dataset.tasks.items():
            order[f"shuffle_buffer of {name}_data"] = task.shuffle_buffer
            order[f"{name}_data_shares"] = task.shares
            order[f"{name}_data's shards"] = [checksum(stream.shards.names) for stream in task.streams]
        return order

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        log = {name: [float(total), self._counts[name]] for name, total in self._sums.items()}
        processes = gather_object([{"streams": self._loader.state, "images": self._images, "log": log}])
        try:
            if self.args.should_save:
                # What an earlier attempt left, whose state would vouch for this one.
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                state = {
                    "order": self._order,
                    "streams": _merge([process["streams"] for process in processes]),
                    "images": sum(process["images"] for process in processes),
                    "skipped_steps": self._skipped_steps,
                    "logs": [process["log"] for process in processes],
                }
                (folder / STREAM_STATE_NAME).write_text(json.dumps(state, indent=1) + "\n")
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk, by Python, torch and safetensors
            shutil.rmtree(folder, ignore_errors=True)
            raise OSError(
                f"{folder} could not be written, and was removed: {error}. Earlier checkpoints are untouched; resume "
                "from the last one when there is space."
            ) from error

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # What comes next, the trainer's state, says that a checkpoint is complete: so must be every process's part.
        self.accelerator.wait_for_everyone()

    def save_provenance(self, metrics: dict[str, float]) -> None:
        """How the model came about, `provenance.json`, beside it; `metrics` are those of `train`."""
        if self.is_world_process_zero():
            teachers = {"sam_teacher": self.sam_teacher, "clip_teacher": self.clip_teacher}
            commits = {
                name: getattr(teacher.model.config, "_commit_hash", None)  # transformers sets it only for the Hub's
                for name, teacher in teachers.items()
                if isinstance(teacher, SamTeacher | ClipTeacher)
            }
            provenance.write(self.args, metrics, commits)

    def create_model_card(self, *args, **kwargs) -> None:
        """Prepares the output folder for a push with `prepare_push`; without one, writes the card of [`Trainer`]."""
        if self.prepare_push is None:
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            self.prepare_push(Path(self.args.output_dir), self.hub_model_id)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        state = json.loads((Path(resume_from_checkpoint) / STREAM_STATE_NAME).read_text())
        was, now = state["order"], self._order
        if changed := [name for name in {**was, **now} if was.get(name) != now.get(name)]:
            changes = "; ".join(f"{name} from {was.get(name)} to {now.get(name)}" for name in changed)
            raise DataError(
                f"{resume_from_checkpoint} cannot go on with something else: {changes}. Start "
                "a new run from its weights with --model instead."
            )
        # The trainer reads its own state only later.
        step = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME)).global_step
        item = step * self.args.gradient_accumulation_steps
        if item != state["streams"]["item"]:
            logger.warning(
                f"{resume_from_checkpoint} was made with another gradient_accumulation_steps: every sample's turn "
                "stays the same, but steps divide otherwise."
            )
        streams = state["streams"] | {"item": item}
        is_first = self.args.process_index == 0  # which counts on for all
        if not is_first:
            streams |= {"seen": 0, "skipped": {}}
        self._loader.load_state(streams)
        self._images = state["images"] if is_first else 0
        self._images_at_log = state["images"]
        self._skipped_steps = state["skipped_steps"]
        if self.args.process_index < len(state["logs"]):
            for name, (total, count) in state["logs"][self.args.process_index].items():
                self._sums[name], self._counts[name] = total, count

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in [`Trainer`]; adds averages since the last log, learning rates by part of the model, images a second,
        memory, and how many samples and steps were skipped so far; of all processes together."""
        processes = gather_object([{"images": self._images, "skipped": self._loader.state["skipped"]}])
        images = sum(process["images"] for process in processes)
        if "loss" in logs:
            logs.update(self._averages())
            logs.pop("learning_rate", None)
            logs.update({f"learning_rate_{group['name']}": group["lr"] for group in self.optimizer.param_groups})
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
        if "train_runtime" in logs:  # the last log of a run, which train() returns too
            del logs["train_samples_per_second"]  # of a batch size that is not used
            logs["train_images_seen"] = images
        skipped = sum((Counter(process["skipped"]) for process in processes), Counter())
        logs.update({f"skipped_{cause.replace(' ', '_')}": number for cause, number in skipped.items()})
        if self._skipped_steps:
            logs["skipped_steps"] = self._skipped_steps
        super().log(logs, start_time)


def checksum(names: list[str]) -> str:
    """Of shards by their names; the folder may be another."""
    return f"{len(names)} of checksum {zlib.crc32(repr([Path(name).name for name in names]).encode()):08x}"


class PreemptionCallback(TrainerCallback):
    """On SIGTERM or Ctrl-C training ends after the step at hand with a checkpoint; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None  # that ended the training
        self._received: signal.Signals | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        """Takes the signals."""
        if threading.current_thread() is not threading.main_thread():  # the only one to which signals come
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            self._handlers[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, frame) -> None:
        self._received = signal.Signals(number)
        logger.warning(f"{self._received.name}: saving a checkpoint after this step.")
        if self._received == signal.SIGINT:  # launchers and schedulers may send the other one twice by themselves
            signal.signal(number, self._handlers[self._received])

    def on_step_end(self, args, state, control, **kwargs):
        """Asks for a checkpoint and the end, in all processes if in one."""
        number = int(gather(torch.tensor([self._received or 0], device=args.device)).max())
        if number:
            self.signal = signal.Signals(number)
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        """Gives the signals back."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint in a folder; what is half-written is passed over, with a warning."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    for folder in sorted(folders, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        try:
            TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
            json.loads((folder / STREAM_STATE_NAME).read_text())
        except (OSError, ValueError, TypeError):
            logger.warning(f"{folder} is not complete: its writing was interrupted. Passing over it.")
        else:
            return folder
    return None


def _merge(states: list[dict[str, Any]]) -> dict[str, Any]:
    """The stream states of all processes as one."""
    return states[0] | {
        "lanes": furthest([state["lanes"] for state in states]),
        "seen": sum(state["seen"] for state in states),
        "skipped": dict(sum((Counter(state["skipped"]) for state in states), Counter())),
    }


def add_adapters(model: SamClipModel, rank: int) -> nn.Module:
    """The model with LoRA on image encoder and mask decoder, and the CLIP head trained in full: a `PeftModel`, whose
    `merge_and_unload()` is a plain [`SamClipModel`] again."""
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=rank, lora_alpha=rank, target_modules=ADAPTED_MODULES, modules_to_save=["clip_head"])
    return get_peft_model(model, settings)


def freeze(model: SamClipModel, stage: int) -> None:
    """Leaves gradients to the stage's parts alone."""
    model.requires_grad_(False)
    for part in TRAINED_PARTS[stage]:
        getattr(model, part).requires_grad_(True)
