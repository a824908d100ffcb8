"""
[`FinetuningTrainer`] fine-tunes a SAM-CLIP on labeled images, and guards against forgetting with the distillation
losses: on general images, the model is compared with itself before fine-tuning.
"""

import copy
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .. import miniature
from ..datasets import DataSet, SegmentedImage
from ..distillation import SamClipTrainer
from ..distillation.collation import TaskBatches
from ..distillation.losses import mask_iou
from ..evaluation import ComposedSegmentation, Evaluator, SamClipAdapter, SampleEvaluator
from ..files import write_atomically
from ..images import mean_and_std, normalize
from ..modeling_samclip import SamClipModel, patches_of_masks
from ..processing_samclip import SamClipProcessor
from ..segmentation_samclip import SAME_TEXT, SamClipForImageSegmentation
from .arguments import FinetuningArguments
from .data import LabelMapBatches, map_content_size

logger = logging.get_logger(__name__)

RETENTION_NAME = "retention.json"
# The metrics of an evaluator that are rows of the retention table. By default the first one.
RETENTION_METRICS = {"prompts": ("point_miou", "box_miou")}
# Weight of the guard's divergence of probabilities relative to that of 1 - cos. 0.1 and 0.3 were compared, see
# docs/finetune.md.
NAMES_WEIGHT = 0.3
OWN_CLASSES = "own classes"  # the task of the first row


class FrozenModel(nn.Module):
    """
    A frozen copy of a model, as the teacher of its own fine-tuning.

    Args:
        model ([`SamClipModel`]):
            The model, which is copied.
        image_mean, image_std (`list[float]`):
            Its normalization.
    """

    def __init__(self, model: SamClipModel, image_mean: list[float], image_std: list[float]):
        super().__init__()
        self.model = copy.deepcopy(model).float().requires_grad_(False)
        self.image_mean, self.image_std = image_mean, image_std
        self.image_size: int = model.config.vision_config.image_size
        self.eval()

    def train(self, mode: bool = True) -> "FrozenModel":
        """Keeps the copy in evaluation mode."""
        return super().train(False)

    def check(self, student: SamClipModel) -> None:
        """Does nothing: the student is the same model."""

    @torch.no_grad()
    def forward(self, images: Tensor, content_sizes: Tensor, **prompts) -> tuple[Tensor, Tensor]:
        """Arguments and results are those of [`SamTeacher`]."""
        outputs = self.model(pixel_values=normalize(images, self.image_mean, self.image_std, content_sizes), **prompts)
        return outputs.pred_masks, outputs.iou_scores


class FinetuningTrainer(SamClipTrainer):
    """
    Fine-tunes a [`SamClipForImageSegmentation`], whose vocabulary becomes that of the data. A step has a micro-batch
    of labeled images, with the loss of the model for `labels`, `mask_labels` and `class_labels`, and, with a guard,
    one of general images. Both know `other_names`, by default those of the model's vocabulary and of the datasets of
    `retention` that are no classes of the data: the loss compares the classes with them, and the guard keeps the
    probabilities of all names.

    Args:
        model ([`SamClipForImageSegmentation`]):
            The model with its text tower.
        args ([`FinetuningArguments`]):
            The arguments.
        data, eval_data (`DataSet`):
            Labeled images for training and for evaluation, with the same classes.
        processing_class ([`SamClipProcessor`]):
            The model's processor.
        retention (`Mapping[str, Evaluator]`, *optional*):
            Evaluators for [`SamClipAdapter`], whose results before and after are in the retention table, by name.
        prepare_push (`Callable`, *optional*):
            As in [`SamClipTrainer`].

    Raises:
        ValueError: As [`SamClipTrainer`], if the data have other classes or cannot be a vocabulary, if two classes
            have the same tokens, if one of `other_names` is a class, and if the SAM head is to learn from label maps.
    """

    args: FinetuningArguments

    def __init__(
        self,
        model: SamClipForImageSegmentation,
        args: FinetuningArguments,
        data: DataSet[SegmentedImage],
        eval_data: DataSet[SegmentedImage],
        processing_class: SamClipProcessor,
        retention: Mapping[str, Evaluator] | None = None,
        prepare_push: Callable[[Path, str], None] | None = None,
    ):
        if (data.names, data.background) != (eval_data.names, eval_data.background):
            raise ValueError(
                f"{data.name} and {eval_data.name} have different classes. They must have the same ones in the same "
                "order."
            )
        assert data.names is not None
        classes = data.names[int(data.background is not None) :]
        tokenizer = processing_class.tokenizer
        known_names = _known_names(model, (retention or {}).values())  # before the vocabulary is replaced
        model.set_vocabulary(classes, data.background or (), args.templates, tokenizer)
        used = set(model.vocabulary.label_ids)
        if same := [name for label, name in model.vocabulary.id2label.items() if label not in used]:
            raise ValueError(
                f"These classes of {data.name} have the same tokens as another class, so that texts cannot tell them "
                f"apart: {same}. Give them other names."
            )
        names = known_names if args.other_names is None else args.other_names
        others, own_names = _embed_other_names(model, names, args.templates, tokenizer)
        if args.other_names is not None and own_names:
            raise ValueError(
                f"These other_names are names of classes of {data.name}, or texts of its background: {own_names}. "
                "Remove them."
            )
        self.other_names = [*others]
        self._other_embeds = torch.stack([*others.values()]) if others else None
        self.data, self.eval_data = data, eval_data
        label_maps = [own.name for own in (data, eval_data) if any(s.objects is None for s in own.samples)]
        if args.mask_loss_weight is None:
            args.mask_loss_weight = 0.0 if label_maps else 1.0
        if args.mask_loss_weight and label_maps:
            raise ValueError(
                f"{label_maps[0]} has label maps, in which objects of a class are not separate, so the SAM head "
                "cannot be trained: set mask_loss_weight to 0, or pass COCO files."
            )
        image_mean, image_std = mean_and_std(processing_class.image_processor)
        self._image_processor = processing_class.image_processor
        self._ignore_index: int = model.config.semantic_loss_ignore_index
        super().__init__(
            model,
            args,
            clip_teacher=None,
            sam_teacher=FrozenModel(model, image_mean, image_std) if args.has_sam_loss else None,  # type: ignore[arg-type]
            processing_class=processing_class,
            prepare_push=prepare_push,
        )
        if self.is_fsdp_enabled:
            raise ValueError("Fine-tuning is not supported with FSDP. Use DDP, and lora_r to save memory.")
        own: dict[str, Evaluator] = {OWN_CLASSES: ComposedSegmentation(eval_data, templates=args.templates)}
        self.retention = own | dict(retention or {})
        self._before: dict[tuple[str, str], float | None] = {}
        self._after: dict[tuple[str, str], float | None] = {}

    def make_tasks(self, student: SamClipModel) -> dict[str, TaskBatches]:
        """Returns the labeled images ("own") and, with a guard, the general images ("sam")."""
        with_objects = bool(self.args.mask_loss_weight)
        own = LabelMapBatches(self.data, self.eval_data, self._image_processor, self.args.batch_size, with_objects)
        tasks: dict[str, TaskBatches] = {"own": own}
        if self.args.has_sam_loss:
            tasks["sam"] = self.sam_batches(student, regions_per_image=self.args.masks_per_image)
        return tasks

    def losses(self) -> dict[str, Callable[..., Tensor]]:
        """Returns the loss of each task."""
        return {"own": self.own_loss, "sam": self.guard_loss}

    def own_loss(
        self,
        model: nn.Module,
        images: Tensor,
        content_sizes: Tensor,
        label_maps: Tensor,
        object_masks: Tensor | None = None,
        object_labels: Tensor | None = None,
    ) -> Tensor:
        """Returns the model's loss for a micro-batch of [`LabelMapBatches`]: of its label maps, and of masks, with the
        other names as negative texts. The masks are the objects and the background, or, without objects, the regions
        of the classes, for which the SAM head has no loss."""
        mask_labels, class_labels = [], []
        for number, (label_map, content_size) in enumerate(zip(label_maps, content_sizes.tolist(), strict=True)):
            height, width = map_content_size(content_size, label_map.shape, images.shape[-2:])
            content = label_map[:height, :width]
            labels = content.unique()
            if object_masks is None or object_labels is None:
                labels = labels[labels != self._ignore_index]
                mask_labels.append(content == labels[:, None, None])
                class_labels.append(labels)
            else:
                background = labels[labels == 0] if self.data.background is not None else labels[:0]
                is_object = object_labels[number] != self._ignore_index
                masks = object_masks[number][is_object, :height, :width]
                mask_labels.append(torch.cat([masks, content == background[:, None, None]]))
                class_labels.append(torch.cat([object_labels[number][is_object], background]))
        outputs = model(
            pixel_values=normalize(images, self.image_mean, self.image_std, content_sizes),
            reshaped_input_sizes=content_sizes,
            labels=label_maps,
            mask_labels=mask_labels,
            class_labels=class_labels,
            negative_embeds=self._other_embeds,
            mask_loss_weight=self.args.mask_loss_weight,
        )
        self.record({"own_loss": outputs.loss})
        return outputs.loss

    def guard_loss(
        self, model: nn.Module, images: Tensor, content_sizes: Tensor, region_masks: Tensor, **prompts
    ) -> Tensor:
        """
        Returns the loss against forgetting for a micro-batch of [`SamBatches`]: the student against the model before
        fine-tuning, in one pass of each. The parts are L_SAM of the masks, as in stage 2, and 1 - cos of the
        embeddings of images, masks and patches. With other names, the divergence of the probabilities of all names is
        added to 1 - cos, with the weight `NAMES_WEIGHT`. All are 0, with zero gradient, before the first step.
        """
        assert self.sam_teacher is not None
        grid_size = (images.shape[-2] // self._patch_size, images.shape[-1] // self._patch_size)
        segments = patches_of_masks(region_masks.float() / 255, grid_size, grid_size)
        inputs = prompts | {
            "pixel_values": normalize(images, self.image_mean, self.image_std, content_sizes),
            "multimask_output": "input_points" in prompts,
            "segments": segments,
            "reshaped_input_sizes": content_sizes,
        }
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            before = self.sam_teacher.model(**inputs)
        outputs = model(**inputs)
        mask_loss = self.mask_loss(outputs.pred_masks, before.pred_masks, outputs.iou_scores, before.iou_scores)
        is_segment = segments.flatten(2).any(dim=-1)
        rows, columns = (torch.arange(side, device=images.device) * self._patch_size for side in grid_size)
        is_content = (rows < content_sizes[:, :1])[:, :, None] & (columns < content_sizes[:, 1:])[:, None, :]
        embeds = {
            "image": (outputs.image_embeds, before.image_embeds, is_content.new_ones(len(images))),
            "segment": (outputs.segment_embeds, before.segment_embeds, is_segment),
            "dense": (outputs.dense_embeds.movedim(1, -1), before.dense_embeds.movedim(1, -1), is_content),
        }
        parts = {name: _mean_distance(*pair) for name, pair in embeds.items()}
        if self._other_embeds is not None:
            scaled_texts = torch.cat([self._segmenter().vocabulary.class_embeds, self._other_embeds.to(images.device)])
            scaled_texts = scaled_texts.float() * self.sam_teacher.model.logit_scale.float().exp()
            parts |= {
                f"{name}_names": NAMES_WEIGHT * _mean_divergence(*pair, scaled_texts) for name, pair in embeds.items()
            }
        self.record({f"guard_{name}": part for name, part in parts.items()})
        prompt = "point" if "input_points" in prompts else "box"
        self.record({f"mask_iou_{prompt}": mask_iou(outputs.pred_masks, before.pred_masks)})
        return self.args.guard_weight * (self.args.sam_loss_weight * mask_loss + sum(parts.values()))

    def _segmenter(self) -> SamClipForImageSegmentation:
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model  # of peft

    # The retention table.

    def measure(self) -> dict[tuple[str, str], float | None]:
        """Returns the results of the retention table, by task and metric. Those that the data do not define, such as
        the average precision without objects, are `None`. All processes call it."""
        model = self._segmenter().eval()
        adapter = SamClipAdapter(self.args.output_dir, model, self.processing_class)
        values: dict[tuple[str, str], float | None] = {}
        for task, evaluator in self.retention.items():
            result = evaluator.run(adapter)
            if result is not None:  # only in the main process
                names = RETENTION_METRICS.get(evaluator.name, tuple(result.metrics)[:1])
                values |= {(task, name): _float(result.metrics[name]) for name in names}
        return broadcast_object_list([values])[0]

    def score(self, values: Mapping[tuple[str, str], float | None]) -> float:
        """Returns `retention_score`: the mean IoU of the own classes, times the smallest ratio of another result to
        its value before, if that is below 1. Results that are `None` or were 0 before do not count."""
        own, *others = values.items()
        pairs = [(value, self._before[key]) for key, value in others]
        ratios = [value / before for value, before in pairs if value is not None and before is not None and before > 0]
        assert own[1] is not None  # its evaluator raises an error if no pixel is labeled
        return own[1] * min([1.0, *ratios])

    def _measure_before(self) -> None:
        self._before = self.measure()
        for (task, metric), value in self._before.items():
            if value is None and self.is_world_process_zero():
                logger.warning(
                    f"The retention table has no {metric} of {task}: its images have nothing that can be measured. It "
                    "is not part of retention_score, so the choice of the best checkpoint does not depend on it. Pass "
                    "another task as retention, or a larger retention_limit."
                )

    def train(self, *args, **kwargs):
        """As in [`Trainer`]. Measures the retention table first."""
        self._measure_before()
        return super().train(*args, **kwargs)

    def load_finished_run(self, checkpoint: Path) -> None:
        """As in [`SamClipTrainer`]. Measures the retention table first."""
        self._measure_before()
        super().load_finished_run(checkpoint)

    def evaluation_metrics(self) -> dict[str, float]:
        """Returns the retention table and its score. Results that are `None` are left out."""
        values = self.measure()
        names = {f"{task} {metric}".replace(" ", "_"): value for (task, metric), value in values.items()}
        present = {name: value for name, value in names.items() if value is not None}
        return present | ({"retention_score": self.score(values)} if self._before else {})

    def retention_table(self) -> list[dict[str, Any]]:
        """Returns the rows of the table: `task`, `metric`, and the values `before` and, at the end, `after`, which are
        `None` if they cannot be measured."""
        return [
            {"task": task, "metric": metric, "before": value, "after": self._after.get((task, metric))}
            for (task, metric), value in self._before.items()
        ]

    def stage_record(self) -> dict[str, Any]:
        """Returns the name of the stage, the model before it, the other names and, at the end, the retention
        table."""
        model = "miniature" if self.args.model == miniature.checkpoint() else self.args.model
        record = {"stage": "fine-tuning", "model": model, "other_names": self.other_names}
        return record | ({"retention": self.retention_table()} if self._after else {})

    def save_provenance(self, metrics: dict[str, float]) -> None:
        """Measures the final model, and writes `retention.json` and `provenance.json`."""
        self._after = self.measure()
        if self.is_world_process_zero():
            content = {
                "results": self.retention_table(),
                "score": self.score(self._after),
                "protocols": {task: evaluator.describe() for task, evaluator in self.retention.items()},
            }
            text = json.dumps(content, indent=2, default=str) + "\n"
            write_atomically(Path(self.args.output_dir) / RETENTION_NAME, text)
        super().save_provenance(metrics)


def _float(value: float | None) -> float | None:
    return None if value is None else float(value)


def _known_names(model: SamClipForImageSegmentation, evaluators: Iterable[Evaluator]) -> list[str]:
    """The names in the model's vocabulary and in the datasets of evaluators, without background."""
    names: list[str] = []
    if model.class_embeds is not None:
        vocabulary = model.vocabulary
        names += [name for label, name in vocabulary.id2label.items() if label != vocabulary.background_label_id]
    for evaluator in evaluators:
        data = evaluator.data if isinstance(evaluator, SampleEvaluator) else None
        if data is not None and data.names is not None:
            names += [name for group in data.names[int(data.background is not None) :] for name in group]
    return [*dict.fromkeys(names)]


def _embed_other_names(
    model: SamClipForImageSegmentation,
    names: Sequence[str],
    templates: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[dict[str, Tensor], list[str]]:
    """The names whose texts differ from those of the model's vocabulary, with their embeddings `(projection_dim,)`,
    and the names whose texts do not."""
    if not names:
        return {}, []
    others = model.embed_vocabulary(names, (), templates, tokenizer)
    is_own = (others.class_embeds @ model.vocabulary.class_embeds.T > SAME_TEXT).any(dim=1).tolist()
    rows = [(others.id2label[label_id], own) for label_id, own in zip(others.label_ids, is_own, strict=True)]
    embeds = {name: row for (name, own), row in zip(rows, others.class_embeds, strict=True) if not own}
    return embeds, [name for name, own in rows if own]


def _mean_distance(student_embeds: Tensor, teacher_embeds: Tensor, is_counted: Tensor) -> Tensor:
    """The mean of 1 - cos over the embeddings that count: `(..., projection_dim)` twice, and `(...)`."""
    distances = 1 - F.cosine_similarity(student_embeds.float(), teacher_embeds.float(), dim=-1)
    return distances.masked_fill(~is_counted, 0).sum() / is_counted.sum().clamp_min(1)


def _mean_divergence(
    student_embeds: Tensor, teacher_embeds: Tensor, is_counted: Tensor, scaled_texts: Tensor
) -> Tensor:
    """The mean Kullback-Leibler divergence of the probabilities of texts `(num_texts, projection_dim)`, whose length
    is the scale of the logits, over the embeddings that count: as in `_mean_distance`."""
    student, teacher = (
        (F.normalize(embeds.float(), dim=-1) @ scaled_texts.T).log_softmax(dim=-1)
        for embeds in (student_embeds, teacher_embeds)
    )
    divergences = (teacher.exp() * (teacher - student)).sum(dim=-1)
    return divergences.masked_fill(~is_counted, 0).sum() / is_counted.sum().clamp_min(1)
