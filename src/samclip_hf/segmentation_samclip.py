"""
Segmentation and object detection by text: the vocabulary, and the composition of the CLIP head and the SAM head.

`modeling_samclip.py` contains everything that does not depend on a vocabulary.
"""

import inspect
import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import ModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging

from .examples_samclip import check_distinct, check_examples, check_names, check_prompts, move_embeds, simplify_name
from .mask_generation_samclip import mask_to_box
from .modeling_samclip import SamClipModel, _InputName, load_tokenizer, patches_of_masks, refuse_labels
from .vision_encoder_samclip import SamClipVisionEncoderOutput

logger = logging.get_logger(__name__)

POINTS_PER_CLASS = 3  # paper, section 5: one to three
DEFAULT_TEMPLATES = ("a photo of a {}",)
TEXTS_PER_BATCH = 256  # texts in one pass of the text tower: 1000 names in 80 templates do not fit at once
BOX_NOISE = 0.1  # standard deviation of the noise of box prompts, relative to the side of the box
MAX_LOSS_MASKS = 8  # masks of an image in a training step, for the loss of the SAM head
CLASSES_PER_CHUNK = 32  # classes in one pass of the mask decoder
VALUES_PER_CHUNK = 2**17  # of a map of the points in one pass of the mask decoder on a CPU: 0.5 MB
PATCHES_PER_CHUNK = 2**15  # patches of segments in one pass of the CLIP head: 100 MB for each map of 768 channels
# Difference in logits between background and classes where one of them is certain: the other has a probability of
# e^-20. Finite, because maps are resized bilinearly.
BACKGROUND_LOGIT_MARGIN = 20.0
# Cosine similarity from which object detection recognizes a text as the name of a label. In the miniature, it is 1 -
# 1e-6 for equal texts in float32, 0.999 for equal texts with a bfloat16 text tower and float32 embeddings, and below
# 0.96 for different names.
SAME_TEXT = 0.995
# Names with which CLIP's independent scores compare each label: general categories, and parts of scenes. `python
# benchmarks/naming.py` measures how well the scores separate present from absent names with this and other lists.
NEUTRAL_NAMES = (
    *("person", "animal", "plant", "vehicle", "building", "furniture", "food", "tool", "clothing", "machine"),
    *("sky", "ground", "water", "wall", "surface", "landscape", "background", "light", "pattern", "texture"),
    *("shape", "text", "object", "thing"),
)


@dataclass
class SamClipSegmentationOutput(ModelOutput):
    r"""
    Input of the image processor's `post_process_semantic_segmentation`, `post_process_instance_segmentation` and
    `post_process_panoptic_segmentation`. The `segment_` fields need both heads. In a batch, images with fewer segments
    are padded with segments of score 0.

    loss (`torch.Tensor` of shape `()`):
        With `labels`, or `mask_labels` and `class_labels`: the sum of their losses.
    logits (`torch.Tensor` of shape `(batch_size, num_labels, grid_height, grid_width)`):
        The CLIP head's logits of each label at each patch: scaled cosine similarity to the label's text. The softmax
        over the labels is the label's probability.
    segment_masks (`torch.Tensor` of shape `(batch_size, num_segments, 4 * grid_height, 4 * grid_width)`):
        Mask logits of the segments: above 0, a pixel is inside the mask.
    segment_logits (`torch.Tensor` of shape `(batch_size, num_segments, num_labels)`):
        As `logits`, for the whole segment.
    segment_embeds (`torch.Tensor` of shape `(batch_size, num_segments, projection_dim)`):
        Embeddings of the segments in the text space, of length 1. `None` with `config.composition="classes"`.
    segment_scores (`torch.Tensor` of shape `(batch_size, num_segments)`):
        Quality of the masks, from 0 to 1. Where masks overlap, a pixel belongs to the one with the highest product of
        mask probability and score.
    content_sizes (`torch.Tensor` of shape `(batch_size, 2)`):
        Height and width of the image without its padding, in patches.
    dense_embeds (`torch.Tensor` of shape `(batch_size, projection_dim, grid_height, grid_width)`):
        Embeddings of the patches in the text space, of length 1.
    background_label_ids (`torch.Tensor` of shape `(batch_size,)`):
        The label of pixels that belong to no class, -1 if there is none.
    hidden_states (`tuple[torch.Tensor]`, each of shape `(batch_size, grid_height, grid_width, hidden_size)`):
        With `output_hidden_states=True`: the image encoder's.
    attentions (`tuple[torch.Tensor]`):
        With `output_attentions=True` and eager attention: the image encoder's, of the shape of SAM's.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    segment_masks: torch.Tensor | None = None
    segment_logits: torch.Tensor | None = None
    segment_embeds: torch.Tensor | None = None
    segment_scores: torch.Tensor | None = None
    content_sizes: torch.Tensor | None = None
    dense_embeds: torch.Tensor | None = None
    background_label_ids: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class SamClipMaskClassificationOutput(ModelOutput):
    r"""
    Output of [`SamClipForImageSegmentation.classify_masks`]. In a batch, images with fewer masks are padded. The
    entries of padding and of masks without pixels are 0.

    logits (`torch.Tensor` of shape `(batch_size, max_num_masks, num_labels)`):
        Logits of each label from [`SamClipForImageSegmentation.classify`].
    scores (`torch.Tensor` of shape `(batch_size, max_num_masks, num_labels)`):
        From 0 to 1: the softmax of `logits` over the labels or, with `multi_label=True`, their sigmoid.
    segment_embeds (`torch.Tensor` of shape `(batch_size, max_num_masks, projection_dim)`):
        Embeddings of the masks in the text space, of length 1.
    """

    logits: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    segment_embeds: torch.Tensor | None = None


@dataclass
class SamClipVocabulary:
    r"""
    The labels of [`SamClipForImageSegmentation`] and the embeddings of their texts, or of examples in place of texts.

    class_embeds (`torch.Tensor` of shape `(num_texts, projection_dim)`):
        Embeddings of the texts, of length 1, and of examples.
    label_ids (`list[int]`):
        The label of each text. The logit of a label is that of its most similar text.
    id2label (`dict[int, str]`):
        Names of the labels.
    background_label_id (`int`, *optional*):
        The label of pixels that belong to no class.
    background_threshold (`float`, *optional*):
        Set if no texts describe the background. A pixel or segment is background if no class has at least this
        probability.
    label_embeds (`torch.Tensor` of shape `(num_labels, projection_dim)`, *optional*):
        Embeddings of the names of the labels without a template, of length 1, in the order of the labels and without
        background. [`SamClipForObjectDetection`] compares texts with them to recognize labels.
    neutral_embeds (`torch.Tensor` of shape `(num_neutral, projection_dim)`, *optional*):
        Embeddings of the neutral texts, of length 1, for independent scores. `None` with SigLIP's text tower, which
        does not need them, and in a vocabulary that was embedded without `multi_label=True`.
    """

    class_embeds: torch.Tensor
    label_ids: list[int]
    id2label: dict[int, str]
    background_label_id: int | None = None
    background_threshold: float | None = None
    label_embeds: torch.Tensor | None = None
    neutral_embeds: torch.Tensor | None = None


def to_label_groups(labels: Iterable) -> list[list[str]]:
    r"""
    Returns the labels of a vocabulary as lists of synonyms.

    labels (`Iterable`):
        A list, tuple, array, column of a table or generator of names. A list, tuple or array in place of a name has
        synonyms.

    Raises `ValueError` for another type, no labels, or an empty or repeated name.
    """
    groups = [to_texts("Every label", label, 1) for label in _to_list("labels", labels)]
    if not groups:
        raise ValueError(f'labels must be a list of at least one name, such as ["cat", "sofa"]; got {labels!r}.')
    counts = Counter(name for group in groups for name in group)
    if doubled := sorted(name for name, count in counts.items() if count > 1):
        raise ValueError(f"These names appear more than once in the vocabulary: {doubled}.")
    return groups


def to_texts(name: str, texts: str | Iterable[str], minimum: int = 0) -> list[str]:
    """
    Returns a text or several as a list of `str`. Raises `ValueError`, with the `name` of the argument, for an empty
    text, another type, or fewer texts than `minimum`.
    """
    listed = [texts] if isinstance(texts, str) else _to_list(name, texts)
    if len(listed) < minimum or not all(isinstance(text, str) and text.strip() for text in listed):
        raise ValueError(f"{name} must be a text or a list of texts, and no text empty; got {texts!r}.")
    return ["".join(text) for text in listed]  # without subclasses of str, such as numpy's and enumerations


def _to_list(name: str, values: Iterable) -> list:
    is_ordered = not isinstance(values, str | bytes | Mapping | set | frozenset)
    is_ordered = is_ordered and not hasattr(values, "columns")  # iterating over a table gives the names of its columns
    if not is_ordered or not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0:
        raise ValueError(f'{name} must be a list, such as ["cat", "sofa"]; got {values!r}.')
    return list(values)


def canonicalize_text(text: str, keep: str = "{}") -> str:
    r"""
    Converts a name or a template as SigLIP's authors do for zero-shot classification with SigLIP and SigLIP 2: to
    lower case, without punctuation, and with spaces instead of `_`. (Other texts, such as captions, are only converted
    to lower case, by the tokenizer.)

    text (`str`):
        A name or a template.
    keep (`str`, *optional*, defaults to `"{}"`):
        Punctuation that is kept: `"{}"` in templates, `","` in names.

    The rule is that of
    [big_vision](https://github.com/google-research/big_vision/blob/main/big_vision/evaluators/proj/image_text/prompt_engineering.py).
    """
    without_punctuation = str.maketrans("", "", string.punctuation)
    parts = [part.translate(without_punctuation) for part in text.replace("_", " ").split(keep)]
    return re.sub(r"\s+", " ", keep.join(parts).lower()).strip()


def max_over_synonyms(text_logits: torch.Tensor, label_ids: torch.Tensor, num_labels: int, dim: int) -> torch.Tensor:
    r"""
    Reduces the logits of texts to logits of labels: the logit of a label is the highest logit of its texts.

    text_logits (`torch.Tensor` with `num_texts` entries in dimension `dim`):
        Logits of the texts.
    label_ids (`torch.Tensor` of shape `(num_texts,)`, `int64`):
        The label of each text.
    num_labels (`int`):
        Number of labels.
    dim (`int`):
        The dimension of the texts.

    Returns logits with `num_labels` entries in dimension `dim`. A label without texts gets half of the dtype's lowest
    value: its probability is 0, and the value stays finite when the map is resized.
    """
    shape = [1] * text_logits.ndim
    shape[dim] = -1
    index = label_ids.view(shape).expand_as(text_logits)
    size = list(text_logits.shape)
    size[dim] = num_labels
    logits = text_logits.new_full(size, torch.finfo(text_logits.dtype).min / 2)
    return logits.scatter_reduce(dim, index, text_logits, "amax")


def apply_background_threshold(
    logits: torch.Tensor, background_label_id: int, threshold: float, dim: int
) -> torch.Tensor:
    r"""
    Adds the logits of background, which is the most probable label where no class reaches a threshold.

    logits (`torch.Tensor` with `num_labels` entries in dimension `dim`):
        From [`max_over_synonyms`]; background has no texts.
    background_label_id (`int`):
        The label of background.
    threshold (`float`):
        Background has the highest logit where all probabilities, the softmax over the classes, are below this value.
    dim (`int`):
        The dimension of the labels.

    Returns the logits with a new entry for background. It is `BACKGROUND_LOGIT_MARGIN` above the highest class where
    all classes are below the threshold, and as much below the highest class elsewhere, so that the probabilities of
    classes change by at most e^-20 there. All values are finite.
    """
    highest = logits.amax(dim=dim, keepdim=True)
    is_background = (highest - logits.logsumexp(dim=dim, keepdim=True)).exp() < threshold
    background = highest + torch.where(is_background, BACKGROUND_LOGIT_MARGIN, -BACKGROUND_LOGIT_MARGIN)
    index = torch.tensor([background_label_id], device=logits.device)
    return logits.index_copy(dim, index, background.to(logits.dtype))


def to_mask_prompts(probabilities: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """
    Turns the probabilities of classes at patches into mask prompts for the SAM head, which are logits.

    probabilities (`torch.Tensor` of shape `(batch_size, num_classes, grid_height, grid_width)`):
        From 0 to 1.
    size (`tuple[int, int]`):
        Height and width of the mask prompts.

    Returns `(batch_size, num_classes, *size)` in float32: in bfloat16, probabilities near 1 round to 1.
    """
    return F.interpolate(probabilities.float().logit(eps=1e-4), size=size, mode="bilinear", align_corners=False)


def semantic_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int,
    negative_logits: torch.Tensor | None = None,
    background_label_id: int | None = None,
) -> torch.Tensor:
    r"""
    Cross entropy of label maps, as SegFormer's: the logits are resized bilinearly to the label maps.

    logits (`torch.Tensor` of shape `(batch_size, num_labels, grid_height, grid_width)`):
        Logits of the labels at the patches.
    labels (`torch.Tensor` of shape `(batch_size, height, width)`, `int64`):
        The label of each pixel. They cover the same area as `logits`.
    ignore_index (`int`):
        The value of pixels that do not count.
    negative_logits (`torch.Tensor` of shape `(batch_size, grid_height, grid_width)`, *optional*):
        The logit of another label, which no pixel has: the logarithm of the sum of the exponential logits of negative
        texts. Pixels of `background_label_id` are not compared with it.
    background_label_id (`int`, *optional*):
        The label of the background, if there is one.

    Returns the mean over the pixels that count, in float32: 0 if there are none (SegFormer's is NaN then).
    """

    def resize(maps: torch.Tensor) -> torch.Tensor:
        return F.interpolate(maps.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)

    resized = resize(logits)
    if negative_logits is not None:
        negative = _without_background(resize(negative_logits[:, None]), labels[:, None], background_label_id)
        resized = torch.cat([resized, negative], dim=1)
    return _mean_cross_entropy(resized, labels, ignore_index)


def focal_and_dice_losses(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    The losses of masks in SAM's training (Kirillov et al. 2023, appendix A): the focal loss with alpha 0.25 and gamma
    2 (Lin et al., arXiv 1708.02002), and the dice loss 1 - (2 sum(pt) + 1) / (sum(p) + sum(t) + 1), as in MaskFormer
    (arXiv 2107.06278).

    logits (`torch.Tensor` of shape `(..., height, width)`):
        Mask logits.
    targets (`torch.Tensor` of the same shape):
        The masks: 0 and 1, or booleans.

    Returns both losses of each mask, `(...)`, in float32.
    """
    logits, targets = logits.float(), targets.float()
    probability = logits.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    error = (targets - probability).abs()  # 1 - p_t
    alpha = 0.75 - 0.5 * targets  # 0.25 inside, 0.75 outside
    focal = (alpha * error.square() * cross_entropy).mean(dim=(-2, -1))
    overlap, sizes = (probability * targets).sum(dim=(-2, -1)), (probability + targets).sum(dim=(-2, -1))
    return focal, 1 - (2 * overlap + 1) / (sizes + 1)


def add_box_noise(boxes, sides, noise, max_noise: float):
    r"""
    Adds the noise of SAM's training to boxes (Kirillov et al. 2023, appendix A), with a standard deviation of a tenth
    of the side. All are NumPy arrays or all are tensors, of shape `(..., 4)`.

    boxes:
        x1, y1, x2, y2 in pixels.
    sides:
        Width, height, width and height of the boxes in pixels.
    noise:
        Random numbers with the standard normal distribution.
    max_noise (`float`):
        Largest noise in pixels. SAM uses 20 at 1024 pixels.

    Returns the noisy boxes, which may exceed the image.
    """
    return boxes + (noise * BOX_NOISE * sides).clip(-max_noise, max_noise)


def mask_loss(pred_masks: torch.Tensor, iou_scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    r"""
    SAM's loss (Kirillov et al. 2023, appendix A): 20 x focal + dice of the mask with the lowest loss, and the squared
    error of the predicted IoUs.

    pred_masks (`torch.Tensor` of shape `(num_prompts, num_masks, height, width)`):
        Mask logits.
    iou_scores (`torch.Tensor` of shape `(num_prompts, num_masks)`):
        Predicted IoUs.
    targets (`torch.Tensor` of shape `(num_prompts, height, width)`, `bool`):
        The mask of the object of each prompt.

    Returns the loss of each prompt, `(num_prompts,)`, in float32.
    """
    targets = targets[:, None].expand_as(pred_masks)
    focal, dice = focal_and_dice_losses(pred_masks, targets)
    with torch.no_grad():
        found = pred_masks > 0
        ious = (found & targets).sum(dim=(-2, -1)) / (found | targets).sum(dim=(-2, -1)).clamp_min(1)
    return (20 * focal + dice).amin(dim=1) + (iou_scores.float() - ious).square().mean(dim=1)


def _without_background(negative_logits: torch.Tensor, labels: torch.Tensor, background_label_id: int | None):
    """The logits of negative texts, of the shape of `labels`, with a probability of 0 where the label is background,
    because background can contain objects that match a negative text."""
    if background_label_id is None:
        return negative_logits
    return negative_logits.masked_fill(labels == background_label_id, torch.finfo(negative_logits.dtype).min / 2)


def _mean_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """PyTorch's cross entropy, but 0 instead of NaN if all labels are ignored."""
    total = F.cross_entropy(logits.float(), labels, ignore_index=ignore_index, reduction="sum")
    return total / (labels != ignore_index).sum().clamp_min(1)


class SamClipForImageSegmentation(SamClipModel):
    """
    SAM-CLIP with a vocabulary: labels (`config.id2label`) and their text embeddings (`class_embeds`) are part of the
    checkpoint, so that the model labels segments without text input. It loads from any SAM-CLIP checkpoint. If the
    checkpoint has no vocabulary, call `set_vocabulary`. With prompts, it predicts masks as [`SamClipModel`] does. With
    label maps or labeled masks, it returns a loss.

    `config.id2label` has the names that outputs show, such as translations. Other names in it do not change what the
    model finds, which `class_embeds` defines: only `set_vocabulary` does.
    """

    # The loss is a mean over a batch. Otherwise, Trainer does not divide it by the number of accumulated batches.
    accepts_loss_kwargs = False

    @property
    def vocabulary(self) -> SamClipVocabulary:
        """The vocabulary of the checkpoint. Raises `ValueError` if it has none."""
        if self.class_embeds is None:
            raise ValueError(
                'This checkpoint has no vocabulary: call model.set_vocabulary(["cat", "sofa", ...]), and save the '
                "model again to keep it, or use a pipeline that takes labels, such as zero-shot-image-segmentation."
            )
        self.embed_label_tokens()  # if the weights were loaded without from_pretrained
        config = self.config
        config.validate_vocabulary()
        return SamClipVocabulary(
            self.class_embeds,
            config.vocabulary_label_ids,
            config.id2label,
            config.background_label_id,
            config.background_threshold,
            self.label_embeds,
            self.neutral_embeds,
        )

    def set_vocabulary(self, *args, **kwargs) -> "SamClipForImageSegmentation":
        """Sets the vocabulary that is saved with the model: the result of [`embed_vocabulary`] or [`embed_examples`],
        or the arguments of [`embed_vocabulary`]. Returns the model."""
        if len(args) == 1 and not kwargs and isinstance(args[0], SamClipVocabulary):
            vocabulary = args[0]
        else:
            vocabulary = self.embed_vocabulary(*args, **kwargs)
        self.config.__dict__.pop("label_tokens", None)  # of a checkpoint of version 0.1.0
        self.class_embeds, self.label_embeds = vocabulary.class_embeds, vocabulary.label_embeds
        self.neutral_embeds = vocabulary.neutral_embeds
        self.config.vocabulary_num_neutral = 0 if self.neutral_embeds is None else len(self.neutral_embeds)
        self.config.vocabulary_label_ids = vocabulary.label_ids
        self.config.vocabulary_num_labels = len(vocabulary.id2label)
        self.config.background_label_id = vocabulary.background_label_id
        self.config.background_threshold = vocabulary.background_threshold
        self.config.id2label = vocabulary.id2label
        self.config.label2id = {name: label_id for label_id, name in vocabulary.id2label.items()}
        return self

    def drop_text_tower(self) -> "SamClipForImageSegmentation":
        """Removes the text tower, which is larger than ViT-B's image encoder. The model keeps its vocabulary and
        cannot embed other texts. Returns the model. Raises `ValueError` if there is no vocabulary."""
        self.vocabulary  # noqa: B018  # raises if there is none
        self.text_model = self.text_projection = None
        self.config.has_text_tower = False
        return self

    @torch.no_grad()
    def embed_vocabulary(
        self,
        labels: Iterable[str | Sequence[str]],
        background: Iterable[str] | float | None = (),
        templates: str | Iterable[str] = DEFAULT_TEMPLATES,
        tokenizer: PreTrainedTokenizerBase | None = None,
        synonyms: Literal["max", "mean"] = "max",
        background_templates: bool = False,
        multi_label: bool = False,
    ) -> SamClipVocabulary:
        r"""
        Embeds a vocabulary, which can be used for any number of images: `model(pixel_values, vocabulary=vocabulary)`.

        labels (`Iterable`):
            Names of the classes, in a list, tuple, array or column of a table. A list of names is a class with
            synonyms; the first one is the name of the label.
        background (`Iterable[str]` or `float`, *optional*):
            Texts that describe the background ("a wall", "an empty scene"). Or a threshold: a pixel or segment is
            background if all probabilities, the softmax over the classes, are below it. The highest of n probabilities
            is at least 1/n, so a threshold up to 1/n, or any threshold for a single class, gives no background. With
            texts or a threshold, label 0 is "background" and the classes follow, and the SAM head is not prompted in
            the background. Without `background`, every pixel belongs to a class.
        templates (`str` or `Iterable[str]`, *optional*):
            Sentences with a `{}` in the place of the name, such as those in `samclip_hf.templates`. The embedding of a
            name is the mean over its sentences.
        tokenizer ([`PreTrainedTokenizerBase`], *optional*):
            The tokenizer. By default that of the folder or repository from which the model was loaded.
        synonyms (`"max"` or `"mean"`, *optional*):
            Whether a label's logit is that of its most similar synonym, or that of the mean of their embeddings.
        background_templates (`bool`, *optional*, defaults to `False`):
            Whether the templates are also used for the texts of the background. By default, these are used without
            templates.
        multi_label (`bool`, *optional*, defaults to `False`):
            Whether the vocabulary can be used for independent scores, see `classify`. With CLIP's text tower,
            `NEUTRAL_NAMES` are then embedded in the same templates.

        With SigLIP's text tower, names and templates are converted by [`canonicalize_text`].

        Names of different labels may have the same tokens, such as "Cat" and "cat" for CLIP. Only the first of these
        labels is then used, and a warning names both.

        Raises `ValueError` if there are no labels, a name is empty, repeated or unknown to the tokenizer, a label has
        the tokens of a text of the background, a template has no `{}`, a text is longer than the text tower accepts,
        or a threshold is not between 0 and 1.
        """
        groups = to_label_groups(labels)
        texts_of_background, threshold = _to_background(background)
        if background_templates and not texts_of_background:
            raise ValueError("background_templates=True has no effect, because background has no texts.")
        templates = to_texts("templates", templates, 1)
        if not all(template.count("{}") == 1 for template in templates):
            raise ValueError(f"templates must be a list of sentences that contain {{}} once, got {templates!r}.")
        if synonyms not in ("max", "mean"):
            raise ValueError(f'synonyms must be "max" or "mean", got {synonyms!r}.')
        has_background = threshold is not None or len(texts_of_background) > 0
        if has_background and any("background" in group for group in groups):
            raise ValueError(
                'With a background, the name of label 0 is "background". Give the class "background" another name.'
            )

        first_class = int(has_background)
        id2label = {label_id: group[0] for label_id, group in enumerate(groups, start=first_class)}
        if self.config.has_siglip_text:
            templates = [canonicalize_text(template, keep="{}") for template in templates]

        def fill(names: list[str], templates: list[str]) -> list[str]:
            if self.config.has_siglip_text:
                names = [canonicalize_text(name, keep=",") for name in names]
            return [template.replace("{}", name) for name in names for template in templates]

        # One row of `class_embeds` for each entry: its label, its names, and the texts whose mean it is.
        rows = [
            (0, [text], fill([text], templates if background_templates else ["{}"])) for text in texts_of_background
        ]
        for label_id, group in enumerate(groups, start=first_class):
            for own_names in [group] if synonyms == "mean" else [[name] for name in group]:
                rows.append((label_id, own_names, fill(own_names, templates)))
        tokenizer = self._tokenizer() if tokenizer is None else tokenizer
        names = [name for group in groups for name in group]
        special = set(tokenizer.all_special_ids)  # the one for unknown characters is among them
        tokens = tokenizer(fill([*names, *texts_of_background], ["{}"]), verbose=False)["input_ids"]
        tokens, tokens_of_background = tokens[: len(names)], tokens[len(names) :]
        if unknown := [name for name, own in zip(names, tokens, strict=True) if special >= set(own)]:
            raise ValueError(f"The tokenizer has no tokens for these names: {unknown}.")
        for name, own in zip(names, tokens, strict=True):
            if own in tokens_of_background:
                text = texts_of_background[tokens_of_background.index(own)]
                raise ValueError(
                    f"The texts of the background and a label have the same tokens: {text!r} and {name!r}. Remove one "
                    "of them."
                )
        rows = _without_same_tokens(rows, len(texts_of_background), tokenizer)
        features = self._embed_texts([text for _, _, texts in rows for text in texts], tokenizer)
        means = [part.mean(dim=0) for part in features.split([len(texts) for _, _, texts in rows])]
        neutral_embeds = None
        if multi_label and not self.config.has_siglip_text:
            neutral_embeds = self._embed_neutral_names(templates, tokenizer)
        return SamClipVocabulary(
            F.normalize(torch.stack(means), dim=-1),
            [label_id for label_id, _, _ in rows],
            {0: "background"} | id2label if has_background else id2label,
            0 if has_background else None,
            threshold,
            self._embed_texts([group[0] for group in groups], tokenizer),
            neutral_embeds,
        )

    @torch.no_grad()
    def embed_examples(
        self,
        images: Iterable | None,
        labels: Sequence[Sequence[str]],
        *,
        processor,
        vision_embeds: Sequence[SamClipVisionEncoderOutput] | None = None,
        reshaped_input_sizes: Sequence[torch.Tensor] | None = None,
        boxes: Sequence | None = None,
        masks: Sequence | None = None,
        points: Sequence | None = None,
        background: Iterable[str] | float | Literal["surroundings"] | None = (),
        vocabulary: SamClipVocabulary | None = None,
        multi_label: bool = False,
    ) -> SamClipVocabulary:
        r"""
        Makes a vocabulary of examples in images: `model(pixel_values, vocabulary=vocabulary)` finds what is similar to
        them in other images. The SAM head predicts a mask for each box or point, and the CLIP head embeds it as in
        [`classify_masks`]. The embedding of a label is the mean over its examples. No training is needed.

        images (`Iterable`, *optional*):
            Images or paths, as the processor accepts them. They are read one by one.
        labels (`Sequence[Sequence[str]]`):
            For each image, the name of each example. Names need not be words.
        vision_embeds (`Sequence[SamClipVisionEncoderOutput]`, *optional*):
            With `masks` and in place of `images`: for each image, the result of [`get_vision_embeds`], so that the
            encoder does not run again.
        reshaped_input_sizes (`Sequence[torch.Tensor]`, *optional*):
            With `vision_embeds`: for each image, height and width of the encoder's input without padding `(1, 2)`.
        processor ([`SamClipProcessor`] or [`SamClipImageProcessor`]):
            The model's processor. For a model without a text tower, its image processor is enough.
        boxes (`Sequence`, *optional*):
            For each image, x1, y1, x2, y2 of each example `(num_examples, 4)`, in pixels of the image.
        masks (`Sequence`, *optional*):
            For each image, the mask of each example `(num_examples, height, width)`, as in [`classify_masks`].
        points (`Sequence`, *optional*):
            For each image, x and y of a point in each example `(num_examples, 2)`, in pixels of the image, or several
            points for each example `(num_examples, num_points, 2)`. Of the three masks for a single point, the one
            with the highest predicted IoU is used.
        background (`Iterable[str]`, `float` or `"surroundings"`, *optional*):
            `"surroundings"` is everything in the images outside all examples; an image may then have no examples. It
            must not contain objects of the labels. Texts or a threshold describe the background as in
            [`embed_vocabulary`].
        vocabulary ([`SamClipVocabulary`], *optional*):
            From [`embed_vocabulary`]. Its labels and background are kept. A label with the same name as one of the
            examples gets the mean of each of its texts, moved to where images are, and the examples. Other labels of
            examples are added. The surroundings are added to the background.
        multi_label (`bool`, *optional*, defaults to `False`):
            As in [`embed_vocabulary`]. With `vocabulary`, pass it there.

        In a vocabulary with texts, and with SigLIP's text tower, the embeddings of examples are moved to where texts
        are, see [`move_embeds`]: their length is then not 1. Where texts and images are is estimated from the labels
        if all of them have texts and examples. Otherwise it is estimated from all texts, examples, surroundings and
        images, and, if the processor has a tokenizer, from the neutral names of [`embed_vocabulary`]. This estimate is
        uncertain for few images, so with N images the embeddings are moved N / (N + 1) of the way, except with
        SigLIP's text tower, whose scores are absolute. In other vocabularies, the embeddings of examples are not
        changed.

        Object detection recognizes labels by their names. Names that the tokenizer does not know are not recognized.

        Raises `ValueError` for wrong numbers of images, labels or examples, examples outside their image, masks
        without pixels, a background that does not fit the other arguments, and labels that cannot be told apart:
        their names differ in capitals or spaces only, or their examples are the same.
        """
        all_labels, kind, located = check_examples(labels, boxes, masks, points)
        if (images is None) == (vision_embeds is None) or (vision_embeds is None) != (reshaped_input_sizes is None):
            raise ValueError("Pass either images, or vision_embeds and reshaped_input_sizes.")
        if vision_embeds is not None and reshaped_input_sizes is not None:
            if kind != "masks":
                raise ValueError(f"With vision_embeds, examples are located by masks; got {kind}.")
            if len(vision_embeds) != len(reshaped_input_sizes):
                raise ValueError(
                    f"Got {len(vision_embeds)} vision_embeds and {len(reshaped_input_sizes)} reshaped_input_sizes. "
                    "Pass both for each image."
                )
            images = zip(vision_embeds, reshaped_input_sizes, strict=True)
        names = list(dict.fromkeys(label for own in all_labels for label in own))
        has_surroundings = isinstance(background, str) and background == "surroundings"
        texts, threshold = _to_background(() if has_surroundings else background)
        if vocabulary is not None and (texts or threshold is not None):
            raise ValueError("The vocabulary has the texts or the threshold of the background: pass them there.")
        if vocabulary is not None and multi_label:
            raise ValueError("With a vocabulary, pass multi_label to embed_vocabulary.")
        if vocabulary is not None:
            check_names(names, vocabulary.id2label.values())
        of_examples = {simplify_name(name) for name in names}
        if described := [text for text in texts if simplify_name(text) in of_examples]:
            raise ValueError(f"{described} describe the background and are labels of examples. Remove one of them.")
        if vocabulary is not None and vocabulary.background_threshold is not None and has_surroundings:
            raise ValueError(
                "The background is either a threshold or the surroundings: embed the vocabulary without it."
            )
        if not has_surroundings and not all(all_labels):
            raise ValueError(
                f"Image {all_labels.index([])} has no examples, which has an effect only with "
                'background="surroundings". Remove it.'
            )

        assert images is not None
        segments, surroundings, whole_images = self._embed_example_images(images, all_labels, kind, located, processor)
        if has_surroundings and not surroundings:
            raise ValueError("The examples fill their images, so there are no surroundings. Pass another background.")
        image_embeds = torch.stack([embed for own in segments.values() for embed in own] + surroundings + whole_images)
        examples = torch.stack([F.normalize(torch.stack(segments[name]).mean(dim=0), dim=-1) for name in names])
        check_distinct(names, examples)
        around = torch.stack(surroundings) if has_surroundings else examples[:0]

        tokenizer = getattr(processor, "tokenizer", None)
        if tokenizer is None and (texts or multi_label):
            tokenizer = self._tokenizer()
        if vocabulary is None:
            embeds = self._embed_texts(texts, tokenizer) if texts else examples[:0]
            vocabulary = SamClipVocabulary(embeds, [0] * len(texts), {}, None, threshold)
        has_none = vocabulary.background_label_id is None
        has_background = bool(texts) or threshold is not None or has_surroundings or not has_none
        if has_background and "background" in [*names, *(vocabulary.id2label.values() if has_none else ())]:
            raise ValueError(
                'With a background, the name of label 0 is "background". Give the class "background" another name.'
            )
        if has_background and has_none:
            vocabulary = replace(
                vocabulary,
                label_ids=[label_id + bool(vocabulary.id2label) for label_id in vocabulary.label_ids],
                id2label={0: "background"} | {number + 1: name for number, name in vocabulary.id2label.items()},
                background_label_id=0,
            )

        text_embeds = vocabulary.class_embeds.float()
        can_embed_names = tokenizer is not None and self.text_model is not None
        needs_names = multi_label or (self.config.has_siglip_text and tokenizer is not None)
        if needs_names or (len(text_embeds) and can_embed_names):
            neutral = self._embed_neutral_names(DEFAULT_TEMPLATES, tokenizer)
            text_embeds = torch.cat([text_embeds, neutral.float()])
            if multi_label and not self.config.has_siglip_text:
                vocabulary = replace(vocabulary, neutral_embeds=neutral)
        if len(text_embeds):
            weight = 1.0 if self.config.has_siglip_text else len(whole_images) / (len(whole_images) + 1)
            class_embeds, texts_of = vocabulary.class_embeds.float().clone(), _rows_of_labels(vocabulary)
            rows = [texts_of.get(name, []) for name in names]
            if all(rows) and len(names) == len(vocabulary.id2label) - has_background > 1:
                # Every label has texts and examples, so means and deviations are those of the same labels.
                image_embeds, text_embeds = examples, torch.stack([class_embeds[own].mean(dim=0) for own in rows])
                weight = 1.0
            for own, example in zip(rows, examples, strict=True):
                moved = F.normalize(move_embeds(class_embeds[own], text_embeds, image_embeds, weight), dim=-1)
                means = F.normalize(moved + example, dim=-1)
                class_embeds[own] = move_embeds(means, image_embeds, text_embeds, weight)
            vocabulary = replace(vocabulary, class_embeds=class_embeds)
            examples = move_embeds(examples, image_embeds, text_embeds, weight)
            around = move_embeds(around, image_embeds, text_embeds, weight)
        added = [name for name in names if name not in vocabulary.id2label.values()]
        label_embeds = self._embed_label_names(added, tokenizer)
        if vocabulary.label_embeds is not None:
            label_embeds = torch.cat([vocabulary.label_embeds, label_embeds.to(vocabulary.label_embeds)])
        combined = _add_examples(vocabulary, names, examples, around)
        return replace(
            combined, class_embeds=combined.class_embeds.to(self.dtype), label_embeds=label_embeds.to(self.dtype)
        )

    def _embed_example_images(
        self, images: Iterable, all_labels: list[list[str]], kind: str, located: list, processor
    ) -> tuple[dict[str, list[torch.Tensor]], list[torch.Tensor], list[torch.Tensor]]:
        """The embeddings of the examples of each label, of what surrounds them, and of the whole images, in float32.
        Images without surroundings have none. Raises `ValueError` for another number of images."""
        segments: dict[str, list[torch.Tensor]] = {label: [] for own in all_labels for label in own}
        surroundings, whole_images = [], []
        num_images = 0
        for index, image in enumerate(images):
            num_images = index + 1
            if index >= len(all_labels):
                continue
            embeds = self._embed_example_image(image, all_labels[index], kind, located[index], index, processor)
            for label, embed in zip(all_labels[index], embeds[:-2], strict=True):
                segments[label].append(embed)
            surroundings += [embeds[-2]] if embeds[-2].any() else []
            whole_images.append(embeds[-1])
        if num_images != len(all_labels):
            raise ValueError(f"Got {num_images} images and labels for {len(all_labels)}. Pass labels for each image.")
        return segments, surroundings, whole_images

    def _embed_example_image(
        self, image, labels: list[str], kind: str, located, index: int, processor
    ) -> torch.Tensor:
        """Embeddings in float32 of the examples of an image, its surroundings (0 if there are none), and the whole
        image: `(num_examples + 2, projection_dim)`. The image may be a tuple: its `vision_embeds` and
        `reshaped_input_sizes`."""
        if isinstance(image, tuple):
            vision_embeds, sizes = image
            height, width = (int(side) for side in sizes[0])
        else:
            inputs = processor(image, return_tensors="pt").to(self.device, self.dtype)
            sizes = inputs["reshaped_input_sizes"]
            vision_embeds = self.get_vision_embeds(inputs["pixel_values"], sizes)
            height, width = (int(side) for side in inputs["original_sizes"][0])
        if not labels:
            masks = torch.zeros(0, height, width, dtype=torch.bool)  # without examples
        elif kind == "masks":
            try:
                masks = _check_masks(located, (height, width))
            except ValueError as error:
                raise ValueError(f"The masks of image {index} cannot be used. {error}") from error
        else:
            scale = sizes[0].cpu().flip(0) / torch.tensor([width, height])
            pred_masks = []
            for points in check_prompts(kind, located, index, height, width):  # one by one, so without padding
                points = (points * scale).float().to(self.device)
                prompt = (
                    {"input_boxes": points.view(1, 1, 4)} if kind == "boxes" else {"input_points": points[None, None]}
                )
                masks, iou_scores = self.predict_masks(
                    vision_embeds["last_hidden_state"], **prompt, multimask_output=kind == "points"
                )
                pred_masks.append(masks[:, :, iou_scores[0, 0].argmax()])
            logits = torch.cat(pred_masks).float()
            masks = processor.post_process_masks([logits], inputs["original_sizes"], sizes)[0][:, 0]
        masks = masks.to(self.device)
        for label, mask in zip(labels, masks, strict=True):
            if not mask.any():
                what = "has no pixels" if kind == "masks" else "is empty: the SAM head finds no object there"
                raise ValueError(f"The mask of an example of {label!r} in image {index} {what}. Remove the example.")
        whole = torch.ones(1, *masks.shape[1:], dtype=torch.bool, device=masks.device)
        masks = torch.cat([masks, whole & ~masks.any(dim=0, keepdim=True), whole])
        return self.embed_masks([masks], None, sizes, vision_embeds)[0].float()

    def _embed_neutral_names(self, templates: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
        """Embeddings of `NEUTRAL_NAMES` `(num_neutral, projection_dim)`, of length 1: the mean over templates."""
        names: Sequence[str] = NEUTRAL_NAMES
        if self.config.has_siglip_text:
            names = [canonicalize_text(name, keep=",") for name in names]
        embeds = self._embed_texts(
            [template.replace("{}", name) for name in names for template in templates], tokenizer
        )
        return F.normalize(embeds.unflatten(0, (-1, len(templates))).mean(dim=1), dim=-1)

    def _embed_label_names(self, names: list[str], tokenizer: PreTrainedTokenizerBase | None) -> torch.Tensor:
        """Embeddings of the names of labels `(num_names, projection_dim)`, of length 1, or 0 for names that object
        detection cannot recognize: unknown to the tokenizer, or without a text tower."""
        embeds = self.logit_scale.new_zeros(len(names), self.config.clip_head_config.projection_dim)
        if self.text_model is None or tokenizer is None or not names:
            return embeds
        special = set(tokenizer.all_special_ids)
        for row, (name, tokens) in enumerate(zip(names, tokenizer(names, verbose=False)["input_ids"], strict=True)):
            if not special >= set(tokens) and len(tokens) <= self.config.text_config.max_position_embeddings:
                embeds[row] = self._embed_texts([name], tokenizer)[0].float()
        return embeds

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer in the folder or repository that the model, or its CLIP teacher, was loaded from."""
        name = self.config.name_or_path or getattr(self, "_clip_name_or_path", None)
        if not name:
            raise ValueError("This model was not loaded from a folder or the Hub. Pass its tokenizer.")
        return load_tokenizer(name)

    def _vocabulary_or_own(self, vocabulary: SamClipVocabulary | None) -> SamClipVocabulary:
        """The vocabulary, or the checkpoint's if it is `None`. Raises `ValueError` for another type."""
        if vocabulary is None:
            return self.vocabulary
        if not isinstance(vocabulary, SamClipVocabulary):
            raise ValueError(
                f"vocabulary must be the result of model.embed_vocabulary([...]), got {type(vocabulary).__name__}."
            )
        return vocabulary

    def _embed_texts(self, texts: list[str], tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
        """Embeddings `(num_texts, projection_dim)`, of length 1."""
        features = []
        for start in range(0, len(texts), TEXTS_PER_BATCH):
            batch = texts[start : start + TEXTS_PER_BATCH]
            # By default, the tokenizer prints a warning about long texts, which raise an error here.
            inputs = tokenizer(batch, padding=True, return_tensors="pt", verbose=False)
            longest = self.config.text_config.max_position_embeddings
            if inputs["input_ids"].shape[1] > longest:
                lengths = [len(tokenizer(text, verbose=False)["input_ids"]) for text in batch]
                text = batch[lengths.index(max(lengths))]
                shown = repr(text if len(text) <= 80 else f"{text[:80]}...")
                raise ValueError(
                    f"The text tower accepts at most {longest} tokens, but this text has {max(lengths)}: {shown}."
                )
            features.append(self.get_text_features(**inputs.to(self.device)).pooler_output)
        return F.normalize(torch.cat(features), dim=-1)

    def classify(self, embeds: torch.Tensor, vocabulary: SamClipVocabulary, multi_label: bool = False) -> torch.Tensor:
        r"""
        Compares embeddings of images, patches or segments with the texts of a vocabulary.

        embeds (`torch.Tensor` of shape `(..., projection_dim)`):
            Embeddings of length 1.
        vocabulary ([`SamClipVocabulary`]):
            The vocabulary.
        multi_label (`bool`, *optional*, defaults to `False`):
            Whether the logits of the labels are independent of each other.

        Returns logits `(..., num_labels)`. By default, a logit is the scaled cosine similarity to the most similar
        text of the label, with [`apply_background_threshold`] if the vocabulary has a threshold. The softmax over the
        labels gives probabilities, of which the highest one is at least 1 / `num_labels`, also if no label is correct.

        With `multi_label=True`, the sigmoid of a logit is a score that does not depend on the other labels. With
        SigLIP's text tower, the logit includes SigLIP's bias, so that the score is SigLIP's probability of the text.
        CLIP has no such probability. With its text tower, the score is the probability of the label's text in a
        softmax over this text and the neutral texts, `NEUTRAL_NAMES` without a name that equals the label's. (LERF,
        Kerr et al. 2023, arXiv 2303.09553, takes the lowest softmax probability over pairs of the text and one of four
        neutral texts.)

        Raises `ValueError` if independent logits are requested for a vocabulary with a threshold or, with CLIP's text
        tower, without neutral texts.
        """
        similarity = embeds @ vocabulary.class_embeds.to(embeds.dtype).T * self.logit_scale.exp()
        if multi_label:
            if vocabulary.background_threshold is not None:
                raise ValueError(
                    "Independent scores need no background_threshold: embed the vocabulary without it, and compare "
                    "the scores with a threshold."
                )
            if self.logit_bias is not None:
                similarity = similarity + self.logit_bias
            else:
                similarity = similarity - self._neutral_logits(embeds, vocabulary)
        label_ids = torch.tensor(vocabulary.label_ids, device=embeds.device)
        logits = max_over_synonyms(similarity, label_ids, len(vocabulary.id2label), dim=-1)
        if vocabulary.background_threshold is not None:
            assert vocabulary.background_label_id is not None  # embed_vocabulary sets both
            logits = apply_background_threshold(
                logits, vocabulary.background_label_id, vocabulary.background_threshold, dim=-1
            )
        return logits

    def _neutral_logits(self, embeds: torch.Tensor, vocabulary: SamClipVocabulary) -> torch.Tensor:
        """The logarithm of the sum of the exponential logits of the neutral texts, for each text of the vocabulary,
        `(..., num_texts)`, or for all of them, `(..., 1)`. A neutral text that equals a text is left out for that
        text."""
        if vocabulary.neutral_embeds is None:
            raise ValueError(
                "This vocabulary has no neutral texts, which CLIP's independent scores need: pass multi_label=True to "
                "embed_vocabulary or set_vocabulary."
            )
        neutral = embeds @ vocabulary.neutral_embeds.to(embeds.dtype).T * self.logit_scale.exp()
        logits = neutral.logsumexp(dim=-1, keepdim=True)
        equal = vocabulary.class_embeds.float() @ vocabulary.neutral_embeds.float().T > SAME_TEXT
        if equal.any():
            logits = logits.repeat_interleave(len(equal), dim=-1)
            for text in equal.any(dim=1).nonzero().flatten().tolist():
                logits[..., text] = neutral[..., ~equal[text]].logsumexp(dim=-1)
        return logits

    @can_return_tuple
    def forward(  # type: ignore[override]  # another head, other inputs
        self,
        pixel_values: torch.Tensor | None = None,
        reshaped_input_sizes: torch.Tensor | None = None,
        original_sizes: torch.Tensor | None = None,
        both_heads: bool | None = None,
        vocabulary: SamClipVocabulary | None = None,
        vision_embeds: SamClipVisionEncoderOutput | None = None,
        labels: torch.Tensor | None = None,
        mask_labels: Sequence | None = None,
        class_labels: Sequence[torch.Tensor] | None = None,
        negative_embeds: torch.Tensor | None = None,
        mask_loss_weight: float | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SamClipSegmentationOutput:
        r"""
        pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
            From the image processor.
        reshaped_input_sizes (`torch.Tensor` of shape `(batch_size, 2)`, *optional*):
            From the image processor: height and width of each image without its padding.
        original_sizes (`torch.Tensor` of shape `(batch_size, 2)`, *optional*):
            Not used. Accepted because `model(**inputs)` passes it. Post-processing takes it as `target_sizes`.
        both_heads (`bool`, *optional*):
            Whether to use the SAM head after the CLIP head (paper, section 5: "composing both CLIP and SAM heads"), or
            the CLIP head alone. By default `True`, and `False` if a loss is computed, which does not depend on it.
        vocabulary ([`SamClipVocabulary`], *optional*):
            From `embed_vocabulary`; by default the checkpoint's.
        vision_embeds ([`SamClipVisionEncoderOutput`], *optional*):
            From `get_vision_embeds` for the images, in place of `pixel_values`.
        labels (`torch.Tensor` of shape `(batch_size, height, width)`, `int64`, *optional*):
            Label maps, from the image processor's `segmentation_maps`: the label of each pixel, a key of the
            vocabulary's `id2label`, or `config.semantic_loss_ignore_index`. They cover the images with their padding,
            at any resolution. The loss is [`semantic_loss`].
        mask_labels (`Sequence`), class_labels (`Sequence[torch.Tensor]`, *optional*):
            For each image, masks as in `classify_masks`, and their labels `(num_masks,)`. The loss is the mean cross
            entropy of the logits of `classify_masks` over the masks that have pixels and a label other than
            `config.semantic_loss_ignore_index`, and, for the SAM head, [`mask_loss`] of these masks without those of
            the background: each is an object, and a point or a box of it is the prompt. Unlike Mask2Former, the masks
            do not cover the padding. For an `eval_loss` without `labels`, `Trainer` needs
            `label_names=["mask_labels", "class_labels"]`.
        negative_embeds (`torch.Tensor` of shape `(num_texts, projection_dim)`, *optional*):
            Negative texts: embeddings, of length 1, of texts that describe none of the labels, such as the
            `class_embeds` of another vocabulary. In the losses, they are further classes without pixels or masks, so
            that the model also learns to distinguish the labels from them. They do not count for background.
        mask_loss_weight (`float`, *optional*):
            Weight of the loss of the SAM head. By default `config.mask_loss_weight`. 0 turns it off, for masks that
            contain several objects.

        With points, boxes or masks as prompts, inputs and output are those of [`SamClipModel`], and no vocabulary is
        used. `classify_masks` labels the masks.

        Raises `ValueError` if labels are not in the vocabulary or do not match the images, or for a loss with a
        vocabulary whose background is a threshold.
        """
        has_loss = labels is not None or mask_labels is not None or class_labels is not None
        if negative_embeds is not None and not has_loss:
            raise ValueError("negative_embeds are for the loss: pass labels, or mask_labels and class_labels.")
        if mask_loss_weight is not None and mask_labels is None:
            raise ValueError("mask_loss_weight is for the loss of masks: pass mask_labels and class_labels.")
        if any(kwargs.get(name) is not None for name in ("input_points", "input_boxes", "input_masks")):
            if has_loss:
                raise ValueError(
                    "Prompts give masks without labels, so there is no loss: remove the prompts, or labels, "
                    "mask_labels and class_labels."
                )
            if vocabulary is not None or kwargs.get("input_ids") is not None:
                raise ValueError(
                    "Prompts give masks without labels: remove vocabulary and input_ids, and pass the masks to "
                    "classify_masks to label them."
                )
            refuse_labels(kwargs)
            return super().forward(
                pixel_values, reshaped_input_sizes=reshaped_input_sizes, vision_embeds=vision_embeds, **kwargs
            )
        if kwargs.get("input_ids") is not None:
            raise ValueError(
                "This model segments by its vocabulary and does not accept input_ids. set_vocabulary changes the "
                "texts."
            )
        vocabulary = self._vocabulary_or_own(vocabulary)
        refuse_labels(kwargs)
        vision_outputs = self._encode_once(pixel_values, vision_embeds, reshaped_input_sizes, **kwargs)
        image_embeddings, patch_tokens = vision_outputs.last_hidden_state, vision_outputs.patch_tokens
        head_tokens = self._head_tokens(patch_tokens, reshaped_input_sizes)
        dense_embeds = self._dense_embeds(head_tokens, image_embeddings, reshaped_input_sizes)
        logits = self.classify(dense_embeds.permute(0, 2, 3, 1), vocabulary).permute(0, 3, 1, 2)
        image_grid = image_embeddings.permute(0, 2, 3, 1)
        content_sizes = self._content_sizes(image_grid, reshaped_input_sizes)
        loss = None
        if has_loss:
            self._check_targets(vocabulary, mask_labels, class_labels)
            loss = logits.new_zeros((), dtype=torch.float32)
            if labels is not None:
                loss = loss + self._label_map_loss(logits, dense_embeds, labels, vocabulary, negative_embeds)
            if mask_labels is not None and class_labels is not None:
                embeds = self.embed_masks(mask_labels, None, reshaped_input_sizes, vision_outputs)
                loss = loss + self._class_loss(embeds, class_labels, vocabulary, negative_embeds)
                weight = self.config.mask_loss_weight if mask_loss_weight is None else mask_loss_weight
                if weight > 0:
                    loss = loss + weight * self._mask_loss(
                        image_embeddings, content_sizes, mask_labels, class_labels, vocabulary
                    )
        segments = {}
        if both_heads or (both_heads is None and not has_loss):
            content_mask = self._content_mask(image_grid, reshaped_input_sizes)
            if self.config.composition == "classes":
                segments = self.compose_heads_by_class(image_embeddings, logits, vocabulary, content_mask)
            else:
                segments = self.compose_heads(
                    image_embeddings, patch_tokens, logits, vocabulary, content_mask, content_sizes
                )
        return SamClipSegmentationOutput(
            loss=loss,
            logits=logits,
            **segments,
            content_sizes=content_sizes,
            dense_embeds=dense_embeds,
            background_label_ids=logits.new_full(
                logits.shape[:1],
                -1 if vocabulary.background_label_id is None else vocabulary.background_label_id,
                dtype=torch.int64,
            ),
            hidden_states=vision_outputs.hidden_states,
            attentions=vision_outputs.attentions,
        )

    def _check_targets(self, vocabulary: SamClipVocabulary, mask_labels, class_labels) -> None:
        """Raises `ValueError` if there is no loss for a vocabulary, or if masks have no labels."""
        if vocabulary.background_threshold is not None:
            raise ValueError(
                "The background of this vocabulary is a threshold, which cannot be trained: describe the background "
                "by texts, such as background=['an empty scene'], or set it to None and train without background."
            )
        if (ignore_index := self.config.semantic_loss_ignore_index) in vocabulary.label_ids:
            raise ValueError(
                f"{ignore_index} is a label of the vocabulary and config.semantic_loss_ignore_index: use fewer "
                "labels, or set another semantic_loss_ignore_index."
            )
        if (mask_labels is None) != (class_labels is None):
            raise ValueError("Pass both mask_labels and class_labels, or neither.")
        if mask_labels is not None and [len(own) for own in mask_labels] != [len(own) for own in class_labels]:
            raise ValueError("class_labels must have one label for each mask of mask_labels, for each image.")

    def _check_labels(self, values: torch.Tensor, name: str, vocabulary: SamClipVocabulary) -> torch.Tensor:
        """Returns labels as `int64`. Raises `ValueError` if they are not in the vocabulary."""
        if values.is_floating_point() or values.dtype == torch.bool:
            raise ValueError(f"{name} must be integers, got {values.dtype}.")
        known, ignore_index = {*vocabulary.label_ids}, self.config.semantic_loss_ignore_index
        if unknown := sorted({*values.unique().tolist()} - known - {ignore_index}):
            raise ValueError(
                f"{name} contain {unknown[:10]}, but the vocabulary has texts for the labels {sorted(known)[:10]}"
                f"{'...' if len(known) > 10 else ''}, and {ignore_index} is ignored. In maps in which 0 has no "
                "label and the first label is 1, the image processor's do_reduce_labels=True changes the numbers."
            )
        return values.to(torch.int64)

    def _negative_logits(self, embeds: torch.Tensor, negative_embeds: torch.Tensor) -> torch.Tensor:
        """The logarithm of the sum of the exponential logits of negative texts `(...)`, for embeddings `(...,
        projection_dim)`."""
        similarity = embeds @ negative_embeds.to(embeds.device, embeds.dtype).T
        return (similarity * self.logit_scale.exp()).logsumexp(dim=-1)

    def _label_map_loss(
        self,
        logits: torch.Tensor,
        dense_embeds: torch.Tensor,
        labels: torch.Tensor,
        vocabulary: SamClipVocabulary,
        negative_embeds: torch.Tensor | None,
    ) -> torch.Tensor:
        """The loss of `forward` for `labels`."""
        height, width = logits.shape[-2:]
        if (
            labels.ndim != 3
            or len(labels) != len(logits)
            or labels.shape[1] * width != labels.shape[2] * height
            or labels.shape[1] == 0
        ):
            raise ValueError(
                f"labels must be (batch_size, height, width) for {len(logits)} images, with the proportions of "
                f"pixel_values, {height}:{width} patches; got {tuple(labels.shape)}. The image processor prepares "
                "them: processor(images, segmentation_maps=label_maps)."
            )
        negative = None
        if negative_embeds is not None:
            negative = self._negative_logits(dense_embeds.permute(0, 2, 3, 1), negative_embeds)
        return semantic_loss(
            logits,
            self._check_labels(labels, "labels", vocabulary).to(logits.device),
            self.config.semantic_loss_ignore_index,
            negative,
            vocabulary.background_label_id,
        )

    def _class_loss(
        self,
        embeds: torch.Tensor,
        class_labels: Sequence[torch.Tensor],
        vocabulary: SamClipVocabulary,
        negative_embeds: torch.Tensor | None,
    ) -> torch.Tensor:
        """The loss of `forward` for `class_labels` and the embeddings of their masks."""
        ignore_index = self.config.semantic_loss_ignore_index
        targets = torch.full(embeds.shape[:2], ignore_index, device=embeds.device)
        for row, own in zip(targets, class_labels, strict=True):
            row[: len(own)] = self._check_labels(torch.as_tensor(own), "class_labels", vocabulary)
        targets = torch.where(embeds.detach().any(dim=-1), targets, ignore_index)
        logits = self.classify(embeds, vocabulary)
        if negative_embeds is not None:
            negative = self._negative_logits(embeds, negative_embeds)
            negative = _without_background(negative, targets, vocabulary.background_label_id)
            logits = torch.cat([logits, negative[..., None]], dim=-1)
        return _mean_cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index)

    def _mask_loss(
        self,
        image_embeddings: torch.Tensor,
        content_sizes: torch.Tensor,
        mask_labels: Sequence,
        class_labels: Sequence[torch.Tensor],
        vocabulary: SamClipVocabulary,
    ) -> torch.Tensor:
        """The mean of [`mask_loss`] over the objects of `mask_labels`, at most `MAX_LOSS_MASKS` of an image. The SAM
        head gets a point or a box of each object, and in evaluation mode always a point."""
        # Trainer makes the random numbers of the training reproducible. Those of the evaluation are always the same.
        generator = None if self.training else torch.Generator(image_embeddings.device).manual_seed(0)
        random: dict[str, Any] = {"generator": generator, "device": image_embeddings.device}
        excluded = [self.config.semantic_loss_ignore_index, vocabulary.background_label_id]
        mask_size = (4 * image_embeddings.shape[-2], 4 * image_embeddings.shape[-1])
        losses = []
        for image, (masks, labels) in enumerate(zip(mask_labels, class_labels, strict=True)):
            content_size = content_sizes[image].tolist()
            is_object = [label not in excluded for label in torch.as_tensor(labels).tolist()]
            objects = _check_masks(masks, content_size)[is_object].to(image_embeddings.device)
            objects = objects[objects.flatten(1).any(dim=1)]
            if not len(objects):
                continue
            objects = objects[torch.randperm(len(objects), **random)[:MAX_LOSS_MASKS]]
            targets = patches_of_masks(objects, [4 * side for side in content_size], mask_size)
            with_box = self.training and bool(torch.rand((), **random) < 0.5)
            outputs = super().forward(
                image_embeddings=image_embeddings[image : image + 1],
                input_points=None if with_box else self._random_points(targets, generator),
                input_boxes=self._noisy_boxes(targets, random) if with_box else None,
                multimask_output=not with_box,
            )
            losses.append(mask_loss(outputs.pred_masks[0], outputs.iou_scores[0], targets))
        return torch.cat(losses).mean() if losses else image_embeddings.new_zeros((), dtype=torch.float32)

    def _random_points(self, masks: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """A point in each of the masks `(num_masks, 4 * grid_height, 4 * grid_width)`, for `input_points`."""
        cells = torch.multinomial(masks.flatten(1).float(), 1, generator=generator)
        points = torch.stack([cells % masks.shape[-1], cells // masks.shape[-1]], dim=-1)
        return ((points + 0.5) * (self.config.vision_config.patch_size / 4) - 0.5)[None]

    def _noisy_boxes(self, masks: torch.Tensor, random: dict[str, Any]) -> torch.Tensor:
        """The boxes of the masks `(num_masks, 4 * grid_height, 4 * grid_width)` with noise, for `input_boxes`."""
        boxes = torch.tensor([mask_to_box(mask) for mask in masks.numpy(force=True)], device=masks.device)
        boxes = boxes * (self.config.vision_config.patch_size / 4)
        sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
        boxes[:, 2:] -= 1  # the last pixel
        max_noise = 20 / 1024 * self.config.vision_config.image_size
        return add_box_noise(boxes, sides, torch.randn(boxes.shape, **random), max_noise)[None]

    def compose_heads(
        self,
        image_embeddings: torch.Tensor,
        patch_tokens: torch.Tensor,
        logits: torch.Tensor,
        vocabulary: SamClipVocabulary,
        content_mask: torch.Tensor | None = None,
        content_sizes: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        r"""
        Combines both heads by segments. Points are placed where the CLIP head finds a class, and the SAM head predicts
        a mask for each point. The CLIP head then embeds every mask as if it were an image
        ([`SamClipHead.pool_segments`]) and classifies it.

        This is not the paper's composition, which is [`compose_heads_by_class`]. In this composition, the surroundings
        of an object do not influence its label, but the CLIP head runs twice.

        image_embeddings (`torch.Tensor` of shape `(batch_size, output_channels, grid_height, grid_width)`):
            Input of the mask decoder.
        patch_tokens (`torch.Tensor` of shape `(batch_size, grid_height, grid_width, hidden_size)`):
            Input of the CLIP head. In an unmerged model, the patch embeddings of its vision tower, on the tower's
            grid.
        logits (`torch.Tensor` of shape `(batch_size, num_labels, grid_height, grid_width)`):
            The CLIP head's logits of the patches.
        vocabulary ([`SamClipVocabulary`]):
            The vocabulary of `logits`.
        content_mask (`torch.Tensor` of shape `(batch_size, grid_height, grid_width)`, *optional*):
            `False` for padding.
        content_sizes (`torch.Tensor` of shape `(batch_size, 2)`, *optional*):
            For an unmerged model: height and width of the images without their padding, in patches. By default there
            is no padding.

        Returns `segment_masks`, `segment_logits`, `segment_embeds` and `segment_scores` as in
        [`SamClipSegmentationOutput`].
        """
        background = vocabulary.background_label_id
        is_class = torch.ones_like(logits[:, 0]) if background is None else 1 - logits.softmax(dim=1)[:, background]
        if content_mask is not None:
            is_class = is_class * content_mask
        is_class = is_class > 0.5
        all_cells = cells = _spread_points(is_class, self.config.composition_points, in_z_order=background is None)
        # With fewer marked cells than points, cells occur several times: the mask decoder gets them once.
        num_points = min(self.config.composition_points, max(1, int(is_class.sum(dim=(1, 2)).max())))
        if num_points < self.config.composition_points:
            cells = _spread_points(is_class, num_points, in_z_order=background is None)
        points = ((cells + 0.5) * self.config.vision_config.patch_size - 0.5)[:, :, None]
        found = []
        # The mask decoder has several maps of the size of the image embeddings for each point, which should fit in a
        # CPU's cache. At 1024 px, a map has 4 MB.
        on_cpu = points.device.type == "cpu"
        per_chunk = max(2, VALUES_PER_CHUNK // image_embeddings.numel()) if on_cpu else num_points
        for chunk in points.split(per_chunk, dim=1):
            masks, iou_scores = self.predict_masks(image_embeddings, input_points=chunk)
            scores, best = (iou_scores.clamp_min(0) * _stability(masks)).max(dim=-1)  # of three masks for each point
            best = best[:, :, None, None, None].expand(-1, -1, 1, *masks.shape[-2:])
            found.append((masks.gather(2, best).squeeze(2), scores))
        masks, scores = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
        if num_points < self.config.composition_points:
            number = (all_cells[:, :, None] == cells[:, None]).all(dim=-1).int().argmax(dim=2)
            image = torch.arange(len(masks), device=masks.device)[:, None]
            masks, scores = masks[image, number], scores[image, number]

        grid_size = patch_tokens.shape[1], patch_tokens.shape[2]
        segments = torch.zeros(*masks.shape[:2], *grid_size, device=masks.device, dtype=torch.bool)
        for i in is_class.flatten(1).any(dim=1).nonzero().flatten().tolist():
            kept = _distinct_masks(masks[i], scores[i], max_overlap=0.5)
            covered = [side / 4 for side in masks.shape[-2:]]
            if not self.config.merged and content_sizes is not None:  # the tower's input has no padding
                scales = [side / float(size) for side, size in zip(grid_size, content_sizes[i], strict=True)]
                covered = [side * scale for side, scale in zip(covered, scales, strict=True)]
            patches = patches_of_masks(masks[i, kept] > 0, covered, grid_size)
            segments[i, kept] = patches & (patches.cumsum(dim=0) == 1)  # a patch of several masks: of the best one
        if content_mask is not None and self.config.merged:
            segments &= content_mask[:, None]
        embeds, is_segment = self._embed_segments(patch_tokens, segments)
        return {
            "segment_masks": masks,
            "segment_logits": self.classify(embeds, vocabulary),
            "segment_embeds": embeds,
            "segment_scores": scores * is_segment,
        }

    def _embed_segments(self, patch_tokens: torch.Tensor, segments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Patch tokens and the patches of segments `(batch_size, num_segments, grid_height, grid_width)` -> embeddings
        `(batch_size, num_segments, projection_dim)` of length 1, or 0 for segments without patches, and
        `(batch_size, num_segments)`: whether a segment has patches."""
        is_segment = segments.flatten(2).any(dim=-1)
        sizes = [segments.shape[1]]
        if (
            self.config.merged and segments.shape[1]
        ):  # CLIP's tower gets each patch once; the CLIP head gets the patches of each segment
            chunks = segments.sum(dim=(0, 2, 3)).cumsum(dim=0) // PATCHES_PER_CHUNK
            sizes = chunks.unique_consecutive(return_counts=True)[1].tolist()
        parts = [self.clip_head.pool_segments(patch_tokens, chunk) for chunk in segments.split(sizes, dim=1)]
        return F.normalize(torch.cat(parts, dim=1), dim=-1) * is_segment[..., None], is_segment

    def classify_masks(
        self,
        masks: Sequence,
        pixel_values: torch.Tensor | None = None,
        reshaped_input_sizes: torch.Tensor | None = None,
        vision_embeds: SamClipVisionEncoderOutput | None = None,
        vocabulary: SamClipVocabulary | None = None,
        multi_label: bool = False,
        original_sizes: torch.Tensor | None = None,
    ) -> SamClipMaskClassificationOutput:
        r"""
        Classifies given masks. The CLIP head embeds each mask as if it were an image: the patches of the mask attend
        to each other only, in one more pass of the CLIP head (unmerged: of CLIP's vision tower, with one pass for all
        masks that do not overlap). The image encoder runs once, or not at all with `vision_embeds`.

        masks (`Sequence`):
            For each image, its masks `(num_masks, height, width)`: a tensor, an array, or a list of masks `(height,
            width)`, such as the `"masks"` of the pipeline `"mask-generation"` or PIL images. Values are booleans, 0
            and 1, or 0 and 255. Masks cover the image without its padding, at any resolution, and may overlap. An
            image may have no masks. A mask smaller than a patch is represented by the patch with the largest part of
            it.
        pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
            From the image processor.
        reshaped_input_sizes (`torch.Tensor` of shape `(batch_size, 2)`, *optional*):
            From the image processor: height and width of each image without its padding. Needed also with
            `vision_embeds`, if the images have padding.
        vision_embeds ([`SamClipVisionEncoderOutput`], *optional*):
            From `get_vision_embeds` for the images, in place of `pixel_values`.
        vocabulary ([`SamClipVocabulary`], *optional*):
            From `embed_vocabulary`; by default the checkpoint's. With a background, a mask may be background.
        multi_label (`bool`, *optional*, defaults to `False`):
            Whether the scores of the labels are independent, see `classify`. The vocabulary must have been embedded
            with `multi_label=True`, unless the text tower is SigLIP's.
        original_sizes (`torch.Tensor` of shape `(batch_size, 2)`, *optional*):
            Not used. Accepted because `model.classify_masks(masks, **inputs)` passes it.

        Returns [`SamClipMaskClassificationOutput`]. A mask without pixels has a score of 0 for all labels.

        Raises `ValueError` if the masks are not for these images: another number of images, another aspect ratio,
        another number of axes, or other values.
        """
        vocabulary = self._vocabulary_or_own(vocabulary)
        embeds = self.embed_masks(masks, pixel_values, reshaped_input_sizes, vision_embeds)
        is_segment = embeds.any(dim=-1)
        logits = self.classify(embeds, vocabulary, multi_label) * is_segment[..., None]
        scores = (logits.sigmoid() if multi_label else logits.softmax(dim=-1)) * is_segment[..., None]
        return SamClipMaskClassificationOutput(logits=logits, scores=scores, segment_embeds=embeds)

    def embed_masks(
        self,
        masks: Sequence,
        pixel_values: torch.Tensor | None = None,
        reshaped_input_sizes: torch.Tensor | None = None,
        vision_embeds: SamClipVisionEncoderOutput | None = None,
    ) -> torch.Tensor:
        """
        Embeds given masks, for `classify`. Arguments and errors are those of `classify_masks`.

        Returns embeddings `(batch_size, num_masks, projection_dim)` of length 1, or 0 for masks without pixels and for
        those that images with fewer masks do not have.
        """
        vision_outputs = self._encode_once(pixel_values, vision_embeds, reshaped_input_sizes)
        patch_tokens = vision_outputs.patch_tokens
        image_grid = vision_outputs.last_hidden_state.permute(0, 2, 3, 1)
        content_sizes = self._content_sizes(image_grid, reshaped_input_sizes).tolist()
        if len(masks) != len(content_sizes):
            raise ValueError(
                f"Got masks of {len(masks)} images for {len(content_sizes)} images. Pass a list with the masks of "
                "each image, (num_masks, height, width)."
            )
        checked = [_check_masks(own, size) for own, size in zip(masks, content_sizes, strict=True)]
        grid_size = patch_tokens.shape[1], patch_tokens.shape[2]
        segments = torch.zeros(
            len(checked), max(map(len, checked)), *grid_size, dtype=torch.bool, device=patch_tokens.device
        )
        for index, own in enumerate(checked):
            covered = content_sizes[index] if self.config.merged else grid_size  # the tower's input has no padding
            for number in range(len(own)):  # one by one, because masks may be large
                mask = own[number : number + 1].to(segments.device)
                segments[index, number] = patches_of_masks(mask, covered, grid_size)[0]
        return self._embed_segments(patch_tokens, segments)[0]

    def compose_heads_by_class(
        self,
        image_embeddings: torch.Tensor,
        logits: torch.Tensor,
        vocabulary: SamClipVocabulary,
        content_mask: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        r"""
        Combines both heads as in the paper (section 5). For every class that the CLIP head finds, the prompts of the
        SAM head are the logits of the class as a mask and three of its patches, sampled by probability, as points.

        Arguments and result are those of [`compose_heads`], but a segment contains all pixels of a class, and there
        are no `segment_embeds`.
        """
        probabilities = logits.softmax(dim=1)
        found = probabilities > 0.5
        if vocabulary.background_label_id is not None:
            found[:, vocabulary.background_label_id] = False
        if content_mask is not None:
            found &= content_mask[:, None]
        image, label = found.flatten(2).any(dim=-1).nonzero(as_tuple=True)
        num_labels, grid_height, grid_width = logits.shape[1:]

        weights = (probabilities * found)[image, label].flatten(1)
        generator = torch.Generator(weights.device).manual_seed(0)  # reproducible
        cells = (
            torch.multinomial(weights.float(), POINTS_PER_CLASS, replacement=True, generator=generator)
            if len(image)
            else image.new_zeros(0, POINTS_PER_CLASS)
        )
        points = torch.stack([cells % grid_width, cells // grid_width], dim=-1)[:, None]
        points = (points + 0.5) * self.config.vision_config.patch_size - 0.5
        mask_size = (4 * grid_height, 4 * grid_width)
        prompts = to_mask_prompts(probabilities[image, label][:, None], mask_size).to(image_embeddings.dtype)

        counts = torch.bincount(image, minlength=len(logits))
        number = torch.arange(len(image), device=image.device) - (counts.cumsum(0) - counts)[image]
        size = (len(logits), max(1, int(counts.max())))
        segment_masks = logits.new_zeros(*size, *prompts.shape[-2:])
        segment_logits = logits.new_zeros(*size, num_labels)
        segment_scores = logits.new_zeros(*size)
        for start in range(0, len(image), CLASSES_PER_CHUNK):
            chunk = slice(start, start + CLASSES_PER_CHUNK)
            masks, _ = self.predict_masks(
                image_embeddings[image[chunk]],
                input_points=points[chunk],
                input_masks=prompts[chunk],
                multimask_output=False,
            )
            segment_masks[image[chunk], number[chunk]] = masks[:, 0, 0]
        for pair in range(len(image)):  # mean probability of each label over the patches of the class
            inside = found[image[pair], label[pair]]
            segment_logits[image[pair], number[pair]] = probabilities[image[pair], :, inside].mean(dim=1).log()
        segment_scores[image, number] = 1
        return {"segment_masks": segment_masks, "segment_logits": segment_logits, "segment_scores": segment_scores}


# Trainer takes the parameters with "label" in their names as labels, see _InputName: only `labels` is needed.
_signature = inspect.signature(SamClipForImageSegmentation.forward)
SamClipForImageSegmentation.forward.__signature__ = _signature.replace(  # type: ignore[attr-defined]
    parameters=[
        parameter.replace(name=_InputName(parameter.name))
        if parameter.name in ("mask_labels", "class_labels")
        else parameter
        for parameter in _signature.parameters.values()
    ]
)


@dataclass
class SamClipObjectDetectionOutput(SamClipSegmentationOutput):
    r"""
    object_scores (`torch.Tensor` of shape `(batch_size, num_segments)`):
        Probability of the text for each segment, from 0 to 1. 0 for padding.
    """

    object_scores: torch.Tensor | None = None


class SamClipForObjectDetection(SamClipForImageSegmentation):
    """
    Object detection by text: the segments of [`SamClipForImageSegmentation`], each with the probability of a text.

    If the text is the name of a label of the vocabulary, its score is the label's probability. Otherwise, its score is
    its exponential logit divided by the sum of the exponential logits of the vocabulary, at most 1. Such a text is
    embedded without a template, so a sentence like the captions in the CLIP teacher's training works best.
    """

    @can_return_tuple
    def forward(  # type: ignore[override]  # another task, other inputs
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        reshaped_input_sizes: torch.Tensor | None = None,
        original_sizes: torch.Tensor | None = None,
        vocabulary: SamClipVocabulary | None = None,
        **kwargs,
    ) -> SamClipObjectDetectionOutput:
        r"""
        pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
            From the image processor.
        input_ids, attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`):
            One text for each image.
        reshaped_input_sizes, original_sizes (`torch.Tensor` of shape `(batch_size, 2)`, *optional*), vocabulary:
            As in [`SamClipForImageSegmentation`].
        """
        refuse_labels(kwargs)
        if len(input_ids) != len(pixel_values):
            raise ValueError(f"Pass one text for each image; got {len(input_ids)} for {len(pixel_values)}.")
        if self.config.composition != "segments":
            raise ValueError('Object detection needs the embeddings of segments: set config.composition = "segments".')
        vocabulary = self._vocabulary_or_own(vocabulary)
        outputs = super().forward(pixel_values, reshaped_input_sizes, original_sizes, vocabulary=vocabulary, **kwargs)
        text_embeds = F.normalize(self.get_text_features(input_ids, attention_mask).pooler_output, dim=-1)
        similarity = (outputs["segment_embeds"] @ text_embeds[:, :, None]).squeeze(-1) * self.logit_scale.exp()
        scores = (similarity - outputs["segment_logits"].logsumexp(dim=-1)).exp().clamp_max(1)
        if vocabulary.label_embeds is not None and len(vocabulary.label_embeds):
            # In half precision, the rounded embeddings do not have unit length.
            names = F.normalize(vocabulary.label_embeds.float(), dim=-1)
            similarity_to_names, name = (F.normalize(text_embeds.float(), dim=-1) @ names.T).max(dim=-1)
            label_id = name + (len(vocabulary.id2label) - len(vocabulary.label_embeds))  # background comes first
            probabilities = outputs["segment_logits"].softmax(dim=-1)
            probability = probabilities.gather(-1, label_id[:, None, None].expand(-1, probabilities.shape[1], 1))
            is_name = similarity_to_names > SAME_TEXT
            scores = torch.where(is_name[:, None], probability.squeeze(-1), scores)
        return SamClipObjectDetectionOutput(**outputs, object_scores=scores * (outputs["segment_scores"] > 0))


def _to_background(background: Iterable[str] | float | None) -> tuple[list[str], float | None]:
    """The texts that describe the background, and the threshold. Raises `ValueError` for other values."""
    if isinstance(background, float | Real):  # Real includes numpy's
        threshold = float(background)
        if not 0 < threshold < 1:
            raise ValueError(f"As a threshold, background must be a probability between 0 and 1, got {threshold}.")
        return [], threshold
    if isinstance(background, str):
        raise ValueError(
            f'background must be a list of texts, such as ["a wall", "sky"], or a threshold; got {background!r}.'
        )
    return ([] if background is None else to_texts("background", background)), None


def _rows_of_labels(vocabulary: SamClipVocabulary) -> dict[str, list[int]]:
    """The rows of each label in the embeddings of a vocabulary."""
    rows: dict[str, list[int]] = {name: [] for name in vocabulary.id2label.values()}
    for row, label_id in enumerate(vocabulary.label_ids):
        rows[vocabulary.id2label[label_id]].append(row)
    return rows


def _add_examples(
    vocabulary: SamClipVocabulary, names: list[str], examples: torch.Tensor, surroundings: torch.Tensor
) -> SamClipVocabulary:
    """Adds examples of the labels `names` `(num_names, projection_dim)` to a vocabulary, if it has no texts of them,
    and surroundings `(num_surroundings, projection_dim)` to its background. Embeddings become float32."""
    known = set(vocabulary.id2label.values())
    id2label = dict(vocabulary.id2label)
    rows, label_ids = [*vocabulary.class_embeds.float()], list(vocabulary.label_ids)
    for name, embed in zip(names, examples, strict=True):
        if name not in known:
            label_ids.append(len(id2label))
            id2label[len(id2label)] = name
            rows.append(embed)
    return replace(
        vocabulary,
        class_embeds=torch.stack([*surroundings, *rows]),
        label_ids=[vocabulary.background_label_id or 0] * len(surroundings) + label_ids,
        id2label=id2label,
    )


def _without_same_tokens(
    rows: list[tuple[int, list[str], list[str]]], num_background: int, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[int, list[str], list[str]]]:
    """
    Removes rows (label, names, texts) whose texts have the same tokens as those of an earlier row of another label,
    because each of the two would have half of the probability. Logs a warning.

    Raises `ValueError` if the earlier row is background, one of the first `num_background`.
    """
    tokens_of_texts = iter(tokenizer([text for _, _, texts in rows for text in texts], verbose=False)["input_ids"])
    first: dict[tuple, int] = {}
    kept, omitted = [], []
    for number, row in enumerate(rows):
        tokens = tuple(sorted(tuple(next(tokens_of_texts)) for _ in row[2]))
        earlier = first.setdefault(tokens, number)
        if rows[earlier][0] == row[0]:
            kept.append(row)
            continue
        pair = " and ".join(", ".join(map(repr, names)) for _, names, _ in (rows[earlier], row))
        if earlier < num_background:
            raise ValueError(
                f"The texts of the background and a label have the same tokens: {pair}. Remove one of them."
            )
        omitted.append(pair)
    if omitted:
        shown = "; ".join(omitted[:5]) + (f" and {len(omitted) - 5} more" if len(omitted) > 5 else "")
        logger.warning(f"These names have the same tokens, so only the first of each is used: {shown}.")
    return kept


def _stability(masks: torch.Tensor) -> torch.Tensor:
    """The stability score of mask logits `(..., height, width)`, `(...)` from 0 to 1: the IoU of the masks at the
    thresholds 1 and -1 (Kirillov et al. 2023, appendix B)."""
    around = (masks > -1).sum(dim=(-2, -1))
    return (masks > 1).sum(dim=(-2, -1)) / around.clamp_min(1)


def _aspect_ratios(width: float, height: float) -> tuple[float, float]:
    """The lowest and the highest ratio width / height of an image whose sides have been rounded to `width` and
    `height`. A side of 1 may have been rounded up from any length."""

    def shortest(side: float) -> float:
        return side - 0.5 if side > 1 else 0.0

    return shortest(width) / (height + 0.5), (width + 0.5) / max(shortest(height), 1e-6)


def _check_masks(masks, content_size: Sequence[float]) -> torch.Tensor:
    """Masks of an image as a boolean tensor `(num_masks, height, width)`. `content_size` is height and width of the
    image without padding, in any unit. Raises `ValueError` for another shape or aspect ratio and for other values."""
    if isinstance(masks, Sequence):
        tensors = [torch.as_tensor(mask if isinstance(mask, torch.Tensor) else np.array(mask)) for mask in masks]
        if len({tensor.shape for tensor in tensors}) > 1:
            shapes = sorted({tuple(tensor.shape) for tensor in tensors})
            raise ValueError(f"The masks of an image must have one size, got {shapes}.")
        masks = torch.stack(tensors) if tensors else torch.zeros(0, 1, 1, dtype=torch.bool)
    elif not isinstance(masks, torch.Tensor):
        masks = torch.as_tensor(np.array(masks))
    if masks.ndim != 3 or (len(masks) and 0 in masks.shape):
        raise ValueError(
            f"The masks of an image must be (num_masks, height, width), got shape {tuple(masks.shape)}. Of several "
            "masks for a prompt, select one: masks[:, 0]."
        )
    if masks.dtype != torch.bool and len(masks):
        highest = masks.max()
        if highest not in (0, 1, 255) or not ((masks == 0) | (masks == highest)).all():
            raise ValueError(
                "Masks must be booleans, 0 and 1, or 0 and 255; got other values. post_process_masks converts mask "
                "logits to masks of the size of the image."
            )
    if len(masks):
        height, width = masks.shape[1:]
        expected_height, expected_width = content_size
        lowest, highest = _aspect_ratios(width, height)
        expected_lowest, expected_highest = _aspect_ratios(expected_width, expected_height)
        if lowest > expected_highest or highest < expected_lowest:
            raise ValueError(
                f"Masks of {width} x {height} pixels do not have the aspect ratio of their image, width / height = "
                f"{expected_width / expected_height:.3g}. Masks must cover the image without its padding, and "
                "reshaped_input_sizes must be passed for an image with padding."
            )
    return masks > 0


def _spread_points(cells: torch.Tensor, num_points: int, in_z_order: bool = False) -> torch.Tensor:
    """
    Column and row `(batch_size, num_points, 2)` of `num_points` of the marked cells `(batch_size, grid_height,
    grid_width)` of each image, evenly spaced in raster order or along a Z-order curve. If there are fewer marked
    cells, some occur several times.

    If all cells of a grid are marked, cells that are evenly spaced in raster order are in few columns. A Z-order curve
    visits the cells of a square of 2^n cells one after another, so that evenly spaced cells are spread over the image.
    """
    height, width = cells.shape[1:]
    row, column = (torch.arange(side, device=cells.device) for side in (height, width))
    key = row[:, None] * width + column
    if in_z_order:  # the bits of row and column alternate
        key = torch.zeros_like(key)
        for bit in range(max(height, width).bit_length()):
            key |= ((row >> bit) & 1)[:, None] << (2 * bit + 1) | ((column >> bit) & 1) << (2 * bit)
    order = key.flatten().argsort()
    marked = cells.flatten(1)[:, order]
    position = order[marked.int().argsort(dim=1, descending=True, stable=True)]  # marked cells first, in this order
    step = torch.arange(num_points, device=cells.device) + 0.5
    chosen = position.gather(1, (step * marked.sum(dim=1, keepdim=True) / num_points).long())
    return torch.stack([chosen % width, chosen // width], dim=-1)


def _distinct_masks(masks: torch.Tensor, scores: torch.Tensor, max_overlap: float) -> list[int]:
    """Non-maximum suppression of mask logits `(num_masks, height, width)`: indices of the masks that are not empty and
    have an IoU of at most `max_overlap` with every kept mask of higher score."""
    flat = (masks > 0).flatten(1).float()
    area = flat.sum(dim=1)
    intersection = flat @ flat.T
    overlap = intersection / (area[:, None] + area[None, :] - intersection).clamp_min(1)
    kept: list[int] = []
    for index in scores.argsort(descending=True).tolist():
        if area[index] > 0 and all(overlap[index, other] <= max_overlap for other in kept):
            kept.append(index)
    return kept


__all__ = [
    "SamClipForImageSegmentation",
    "SamClipForObjectDetection",
    "SamClipMaskClassificationOutput",
    "SamClipObjectDetectionOutput",
    "SamClipSegmentationOutput",
    "SamClipVocabulary",
    "apply_background_threshold",
    "canonicalize_text",
    "max_over_synonyms",
    "to_label_groups",
    "to_texts",
]
