"""
SAM-CLIP: one image encoder, SAM's mask decoder and a text-aligned CLIP head (Wang et al., arXiv 2310.15308).

The model is SAM plus three parts. The image encoder is SAM's, at any input size; the CLIP head reads its patch tokens
before SAM's neck; the text tower, its projection and the logit scale are CLIP's.
"""

import functools
import itertools
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from transformers import (
    AutoTokenizer,
    CLIPModel,
    CLIPTextModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SamModel,
    SiglipModel,
    SiglipTextModel,
)
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput
from transformers.models.sam.modeling_sam import (
    SamImageSegmentationOutput,
    SamMaskDecoder,
    SamMLPBlock,
    SamPatchEmbeddings,
    SamPositionalEmbedding,
    SamPreTrainedModel,
    SamPromptEncoder,
    SamVisionAttention,
    SamVisionEncoder,
    SamVisionEncoderOutput,
    SamVisionLayer,
    SamVisionNeck,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_samclip import SamClipConfig, SamClipHeadConfig, SamClipVisionConfig

logger = logging.get_logger(__name__)

POINTS_PER_CLASS = 3  # paper, section 5: one to three
TEXTS_PER_BATCH = 256  # a thousand names in eighty templates do not fit at once
CLASSES_PER_CHUNK = 32  # pass through the mask decoder together
BACKGROUND_LOGIT_MARGIN = (
    20.0  # logits between what is certain and what is impossible, e^-20; finite, so that maps can be resized
)
BIAS_CHUNK = 2**21  # values of an attention bias that a thread has at a time: 8 MB in float32


@dataclass
class SamClipVisionEncoderOutput(SamVisionEncoderOutput):
    r"""
    last_hidden_state (`torch.Tensor` of shape `(batch_size, output_channels, grid_height, grid_width)`):
        Image embeddings for SAM's mask decoder, after the neck.
    patch_tokens (`torch.Tensor` of shape `(batch_size, grid_height, grid_width, hidden_size)`):
        The last layer's tokens, before the neck: what the CLIP head reads.
    """

    patch_tokens: torch.Tensor | None = None


@dataclass
class SamClipOutput(SamImageSegmentationOutput):
    r"""
    Fields are `None` unless the inputs ask for them: prompts ask for masks, text asks for similarities, an image
    without prompts or with text asks for the CLIP head's embeddings.

    pred_masks (`torch.Tensor` of shape `(batch_size, num_prompts, num_masks, 4 * grid_height, 4 * grid_width)`):
        Mask logits; above 0 is inside. `num_masks` is 3 with `multimask_output`, else 1.
    iou_scores (`torch.Tensor` of shape `(batch_size, num_prompts, num_masks)`):
        The IoU that the mask decoder predicts for each mask.
    image_embeddings (`torch.Tensor` of shape `(batch_size, output_channels, grid_height, grid_width)`):
        What the mask decoder reads; pass it as `image_embeddings` to prompt the same image again.
    image_embeds (`torch.Tensor` of shape `(batch_size, projection_dim)`):
        The image in the text space, of length 1.
    dense_embeds (`torch.Tensor` of shape `(batch_size, projection_dim, grid_height, grid_width)`):
        Every patch in the text space, of length 1.
    text_embeds (`torch.Tensor` of shape `(num_texts, projection_dim)`):
        The texts, of length 1.
    logits_per_image (`torch.Tensor` of shape `(batch_size, num_texts)`):
        Scaled cosine similarities; with SigLIP's text tower plus its bias, so that their sigmoid is the probability
        that SigLIP gives each text by itself.
    logits_per_text (`torch.Tensor` of shape `(num_texts, batch_size)`):
        The same, transposed.
    loss (`torch.Tensor` of shape `()`):
        CLIP's contrastive loss, with `return_loss=True`.
    """

    loss: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    dense_embeds: torch.Tensor | None = None
    image_embeddings: torch.Tensor | None = None


@dataclass
class SamClipSegmentationOutput(ModelOutput):
    r"""
    For the image processor's `post_process_semantic_`, `_instance_` and `_panoptic_segmentation`. The fields of the
    segments are there with both heads only; an image with fewer segments than another has some of score 0.

    logits (`torch.Tensor` of shape `(batch_size, num_labels, grid_height, grid_width)`):
        The CLIP head's, per label and patch: cosine similarity to the label's text, scaled; the softmax over labels is
        the label's probability.
    segment_masks (`torch.Tensor` of shape `(batch_size, num_segments, 4 * grid_height, 4 * grid_width)`):
        Mask logits of the segments; above 0 is inside.
    segment_logits (`torch.Tensor` of shape `(batch_size, num_segments, num_labels)`):
        As `logits`, of the segment as a whole.
    segment_embeds (`torch.Tensor` of shape `(batch_size, num_segments, projection_dim)`):
        The segments in the text space, of length 1; none with `config.composition="classes"`.
    segment_scores (`torch.Tensor` of shape `(batch_size, num_segments)`):
        How well drawn the masks are, from 0 to 1: where two overlap, the better one lies above.
    content_sizes (`torch.Tensor` of shape `(batch_size, 2)`):
        Height and width, in patches, of the part that shows the picture; the rest is padding.
    dense_embeds (`torch.Tensor` of shape `(batch_size, projection_dim, grid_height, grid_width)`):
        Every patch in the text space, of length 1.
    background_label_ids (`torch.Tensor` of shape `(batch_size,)`):
        The label that stands for "none of the classes", -1 if there is none.
    hidden_states (`tuple[torch.Tensor]`, each of shape `(batch_size, grid_height, grid_width, hidden_size)`):
        With `output_hidden_states=True`: what enters the image encoder's layers, and the last one's tokens.
    attentions (`tuple[torch.Tensor]`):
        With `output_attentions=True` and eager attention: the image encoder's weights, as SAM's.
    """

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
class SamClipVocabulary:
    r"""
    Labels and their texts, embedded: what [`SamClipForImageSegmentation`] looks for.

    class_embeds (`torch.Tensor` of shape `(num_texts, projection_dim)`):
        Of length 1.
    label_ids (`list[int]`):
        The label that each text stands for; the most similar text of a label counts.
    id2label (`dict[int, str]`):
        The labels' names.
    background_label_id (`int`, *optional*):
        The label that stands for "none of the classes".
    background_threshold (`float`, *optional*):
        Where background has no texts: it wins where no class is as probable as this.
    label_tokens (`list[list[int]]`):
        The names of the labels but background's, in their order, as the tokenizer gives them.
    """

    class_embeds: torch.Tensor
    label_ids: list[int]
    id2label: dict[int, str]
    background_label_id: int | None = None
    background_threshold: float | None = None
    label_tokens: list[list[int]] = field(default_factory=list)


@dataclass
class SamClipPatchGroups:
    r"""
    Patches taken from their grids and sorted into groups that know nothing of one another.

    rows, columns (`torch.Tensor` of shape `(num_patches,)`):
        Where each patch lies in its grid.
    grid_size (`tuple[int, int]`):
        Height and width of the grid.
    counts (`list[int]`):
        How many patches each group has; they follow one another.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    grid_size: tuple[int, int]
    counts: list[int]


class SamClipVisionAttention(SamVisionAttention):
    """
    SAM's attention with relative positions, without the `(length, length)` bias and with SAM's windows inside.

    SAM's bias between patch `(i, j)` and patch `(k, l)` is a row term `(i, k)` plus a column term `(j, l)`. Only the
    terms are stored. They become scores, equal to SAM's to rounding, in one of three ways:

    - `"sdpa"`, inference on a CPU: for a few queries at a time, which a cache holds (`_attend_in_chunks`).
    - `"sdpa"`, otherwise, and `"eager"`: inside the dot product. The terms of a query are appended to that query, and
      one-hot rows and columns to the keys. No loop, and nothing quadratic is kept for the backward pass. Fused
      kernels want queries, keys and values of one width, hence the padded values.
    - `"flex_attention"`: as the kernel goes.

    SAM fills windows up with zeros before it projects them. Here the projections are outside the windows: what zeros
    project to, the bias, is known without it.
    """

    def __init__(self, config, window_size: int):
        super().__init__(config, window_size)
        self.config = config
        self.window_size = window_size

    def get_rel_pos(self, q_size: int, k_size: int, rel_pos: torch.Tensor) -> torch.Tensor:
        """
        Relative position embeddings `(size, size, head_dim)` for a side of `q_size == k_size` patches, interpolated
        from the table `(2 * trained_size - 1, head_dim)`. Differs from SAM's in staying on the table's device and, as
        `interpolate_pos_embed`, in making no case of the trained size.
        """
        rel_pos = F.interpolate(rel_pos.T[None].float(), size=2 * q_size - 1, mode="linear")[0].T.to(rel_pos.dtype)
        position = torch.arange(q_size, device=rel_pos.device)
        return rel_pos[position[:, None] - position[None, :] + q_size - 1]

    def forward(
        self, hidden_states: torch.Tensor, groups: SamClipPatchGroups | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        r"""
        hidden_states (`torch.Tensor` of shape `(batch_size, height, width, hidden_size)`):
            Patch tokens; with `groups`, `(num_patches, hidden_size)`.
        groups ([`SamClipPatchGroups`], *optional*):
            Patches attend to their group only.

        Returns a tensor of the shape of `hidden_states`, and with `attn_implementation="eager"` the attention weights
        `(batch_size * num_windows * num_heads, length, length)`, which are otherwise never formed.
        """
        if groups is not None:
            return self.proj(self._attend_in_groups(self.qkv(hidden_states), groups)), None
        qkv = self.qkv(hidden_states)
        if self.window_size == 0:
            attended, weights = self._attend_on_grid(qkv)
        else:
            _, height, width, _ = qkv.shape
            padding = self.qkv(hidden_states.new_zeros(1, 1, 1, hidden_states.shape[-1]))
            windows, grid = _split_into_windows(qkv, self.window_size, padding)
            attended, weights = self._attend_on_grid(windows)
            # By indices, not as a slice, which without padding is no copy: torch.compile would make a case of that.
            rows, columns = (torch.arange(n, device=attended.device) for n in (height, width))
            attended = _join_windows(attended, grid)[:, rows[:, None], columns]
        return self.proj(attended), weights

    def _attend_on_grid(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Queries, keys and values `(batch_size, height, width, 3 * hidden_size)` of grids of patches -> what was
        attended to `(batch_size, height, width, hidden_size)`, and the weights if they were formed."""
        batch_size, height, width, _ = qkv.shape
        # Each (batch_size, heads, length, head_dim).
        qkv = qkv.reshape(batch_size, height * width, 3, self.num_attention_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        head_dim = query.shape[-1]
        implementation = self.config._attn_implementation
        dropout = self.dropout if self.training else 0.0
        row_table, column_table = self._position_tables(height, width)
        grid = query.unflatten(2, (height, width))
        row_bias = torch.einsum("bnhwc,hkc->bnhwk", grid, row_table).flatten(2, 3)
        column_bias = torch.einsum("bnhwc,wkc->bnhwk", grid, column_table).flatten(2, 3)
        weights = None

        if implementation == "flex_attention":
            if dropout:
                raise ValueError("flex_attention knows no dropout: set attention_dropout to 0, or use sdpa.")

            def add_bias(score, batch, head, q, k):
                return score + row_bias[batch, head, q, k // width] + column_bias[batch, head, q, k % width]

            attend = flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention()
            attended = attend(query, key, value, score_mod=add_bias, scale=self.scale)
        elif (
            implementation != "eager"
            and query.device.type == "cpu"
            and not (query.requires_grad or torch.compiler.is_compiling())
        ):
            rows, columns = row_bias.contiguous(), column_bias.contiguous()

            def form_bias(chunk):
                return (rows[chunk][..., :, None] + columns[chunk][..., None, :]).flatten(3)

            attended = _attend_in_chunks(query, key, value, form_bias, self.scale, dropout)
        else:
            row = torch.eye(height, dtype=key.dtype, device=key.device).repeat_interleave(width, dim=0)
            column = torch.eye(width, dtype=key.dtype, device=key.device).repeat(height, 1)
            query = torch.cat([query * self.scale, row_bias, column_bias], dim=-1)
            key = torch.cat([key, *(one_hot.expand(*key.shape[:2], -1, -1) for one_hot in (row, column))], dim=-1)
            if implementation == "eager":
                scores = (query @ key.transpose(-2, -1)).flatten(0, 1)
                weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
                attended = (F.dropout(weights, p=dropout) @ value.flatten(0, 1)).unflatten(0, value.shape[:2])
            else:
                value = F.pad(value, (0, key.shape[-1] - head_dim))
                attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=1.0)
                attended = attended[..., :head_dim]
        return attended.transpose(1, 2).reshape(batch_size, height, width, -1), weights

    def _attend_in_groups(self, qkv: torch.Tensor, groups: SamClipPatchGroups) -> torch.Tensor:
        """Queries, keys and values `(num_patches, 3 * hidden_size)` -> `(num_patches, hidden_size)`."""
        qkv = qkv.unflatten(-1, (3, self.num_attention_heads, -1)).permute(1, 2, 0, 3)[:, None]
        row_table, column_table = (table.to(qkv.dtype) for table in self._position_tables(*groups.grid_size))
        # The columns of the grid follow its rows, in the terms of a query and in the one-hot positions of the keys.
        row_position = F.one_hot(groups.rows, len(row_table))
        column_position = F.one_hot(groups.columns, len(column_table))
        position = torch.cat([row_position, column_position], dim=-1).to(qkv.dtype)
        attended = []
        for (query, key, value), rows, columns, keys in zip(
            qkv.split(groups.counts, dim=-2),
            groups.rows.split(groups.counts),
            groups.columns.split(groups.counts),
            position.split(groups.counts),
            strict=True,
        ):
            row_bias = torch.einsum("bnqc,qkc->bnqk", query, row_table[rows])
            column_bias = torch.einsum("bnqc,qkc->bnqk", query, column_table[columns])
            terms = torch.cat([row_bias, column_bias], dim=-1)

            def form_bias(chunk, terms=terms, keys=keys):
                return terms[chunk] @ keys.T

            result = _attend_in_chunks(query, key, value, form_bias, self.scale)
            attended.append(result[0].transpose(0, 1).flatten(1))
        return torch.cat(attended)

    def _position_tables(self, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Relative position embeddings of rows `(height, height, head_dim)` and of columns `(width, width,
        head_dim)`; zeros in a model without."""
        if not self.use_rel_pos:
            head_dim = self.qkv.in_features // self.num_attention_heads
            weight = self.qkv.weight
            return weight.new_zeros(height, height, head_dim), weight.new_zeros(width, width, head_dim)
        return (
            self.get_rel_pos(height, height, self.rel_pos_h),
            self.get_rel_pos(width, width, self.rel_pos_w),
        )


@functools.cache
def _compiled_flex_attention():
    """Compiled anew for every size: with symbolic sizes its CPU code is wrong or none (torch 2.14)."""
    return torch.compile(flex_attention, dynamic=False)


def _attend_in_chunks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    form_bias: Callable[[tuple[slice, ...]], torch.Tensor],
    scale: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    r"""
    Attention with a bias of which never more than `BIAS_CHUNK` values a thread exist. Many queries of few heads at a
    time: the kernel takes long blocks of queries, and what it reads stays in the cache.

    query, key, value (`torch.Tensor` of shape `(batch_size, num_heads, length, head_dim)`):
        Returns one more of this shape.
    form_bias (`Callable`):
        From slices of the batch, of heads and of queries to their bias for all keys.
    """
    batch_size, num_heads, length, _ = query.shape
    values = BIAS_CHUNK * torch.get_num_threads()
    queries = min(length, max(1, values // length))
    heads = min(num_heads, max(1, values // (queries * length)))
    images = min(batch_size, max(1, values // (heads * queries * length)))
    attended = torch.empty_like(query)
    for first in itertools.product(
        range(0, batch_size, images), range(0, num_heads, heads), range(0, length, queries)
    ):
        chunk = tuple(slice(start, start + step) for start, step in zip(first, (images, heads, queries), strict=True))
        attended[chunk] = F.scaled_dot_product_attention(
            query[chunk], key[chunk[:2]], value[chunk[:2]], form_bias(chunk), dropout, scale=scale
        )
    return attended


def _split_into_windows(
    tokens: torch.Tensor, window_size: int, padding: torch.Tensor
) -> tuple[torch.Tensor, tuple[int, int]]:
    """Tokens `(batch_size, height, width, channels)`, filled up by `padding` `(1, 1, 1, channels)` to multiples of the
    window -> `(batch_size * num_windows, window_size, window_size, channels)`, and how many windows there are in a
    column and in a row."""
    batch_size, height, width, _ = tokens.shape
    # A whole window of padding, then what is too much cut off: torch.compile would make a case of every missing size.
    right, below = width + -width % window_size, height + -height % window_size
    tokens = torch.cat([tokens, padding.expand(batch_size, height, window_size, -1)], dim=2)[:, :, :right]
    tokens = torch.cat([tokens, padding.expand(batch_size, window_size, right, -1)], dim=1)[:, :below]
    tokens = tokens.unflatten(2, (-1, window_size)).unflatten(1, (-1, window_size)).transpose(2, 3)
    return tokens.flatten(0, 2), (tokens.shape[1], tokens.shape[2])


def _join_windows(windows: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The reverse: `(batch_size, height, width, channels)`, with what was filled up."""
    return windows.unflatten(0, (-1, *grid)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


class SamClipVisionLayer(SamVisionLayer):
    """SAM's layer around [`SamClipVisionAttention`], which has the windows inside."""

    def __init__(self, config, window_size: int):
        # Past SAM's own constructor, which looks for an attention of its own and knows no flex_attention.
        super(SamVisionLayer, self).__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = SamClipVisionAttention(config, window_size)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SamMLPBlock(config)
        self.window_size = window_size

    def forward(self, hidden_states: torch.Tensor, groups: SamClipPatchGroups | None = None) -> torch.Tensor:
        """Tokens and groups as in [`SamClipVisionAttention`]."""
        hidden_states = hidden_states + self.attn(self.layer_norm1(hidden_states), groups)[0]
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class SamClipPositionalEmbedding(SamPositionalEmbedding):
    """SAM's random Fourier features of positions, computed in float32 whatever the type of the weights and under
    autocast: in bfloat16, points of a 1024 px image less than 4 px apart would be the same point."""

    def forward(self, input_coords: torch.Tensor, input_shape: tuple[int, int] | None = None) -> torch.Tensor:
        """x and y `(..., 2)`, from 0 to 1 or in pixels of an image of `input_shape` (height, width), as
        `(..., hidden_size)`."""
        x, y = input_coords.float().unbind(dim=-1)
        if input_shape is not None:
            x, y = x / input_shape[1], y / input_shape[0]
        frequency = self.positional_embedding.float()
        # No matrix product, which autocast would round.
        turns = (2 * x - 1)[..., None] * frequency[0] + (2 * y - 1)[..., None] * frequency[1]
        phase = 2 * torch.pi * turns
        return torch.cat([phase.sin(), phase.cos()], dim=-1).to(self.positional_embedding.dtype)


class SamClipPreTrainedModel(SamPreTrainedModel):
    config: SamClipConfig
    base_model_prefix = "samclip"
    input_modalities: tuple[str, ...] = ("image", "text")
    _no_split_modules = ["SamClipVisionLayer"]
    _supports_flex_attn = True

    def set_attn_implementation(self, attn_implementation: str | dict, *args, **kwargs) -> None:
        """As in [`PreTrainedModel`], which warns of configurations that belong to no model of their own."""
        if isinstance(attn_implementation, str):
            self.get_correct_attn_implementation(attn_implementation)  # raises before anything has changed
            for name in ("prompt_encoder_config", "mask_decoder_config", "clip_head_config"):
                if (config := getattr(self.config, name, None)) is not None:
                    config._attn_implementation = attn_implementation
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    @classmethod
    def is_custom_code(cls) -> bool:
        """
        `False`: everything here is initialised by `transformers.initialization`, which leaves loaded weights alone.
        Of code that may do otherwise, transformers (5.23) passes over the modules without weights of their own, and
        CLIP's text tower, where a checkpoint lacks it, would start as CLIP's does not.
        """
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, SamClipModel):
            if module.text_projection is not None:
                init.normal_(module.text_projection.weight, std=self.config.text_config.hidden_size**-0.5)
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)
            if module.logit_bias is not None:
                init.zeros_(module.logit_bias)
            if module.class_embeds is not None:
                init.zeros_(module.class_embeds)

    def _content_mask(self, patch_tokens: torch.Tensor, reshaped_input_sizes) -> torch.Tensor | None:
        """Which cells `(batch_size, grid_height, grid_width)` show any of the picture rather than padding."""
        if reshaped_input_sizes is None:
            return None
        sizes = torch.as_tensor(reshaped_input_sizes, device=patch_tokens.device)
        if sizes.shape != (patch_tokens.shape[0], 2):
            raise ValueError(
                f"reshaped_input_sizes must be a height and a width for each of {patch_tokens.shape[0]} images, got "
                f"shape {tuple(sizes.shape)}."
            )
        rows, columns = (torch.arange(n, device=sizes.device) for n in patch_tokens.shape[1:3])
        cells = sizes / self.config.vision_config.patch_size
        return (rows < cells[:, :1])[:, :, None] & (columns < cells[:, 1:])[:, None, :]

    def _pool_image(self, patch_tokens: torch.Tensor, reshaped_input_sizes) -> tuple[torch.Tensor, torch.Tensor]:
        """The CLIP head's tokens, of the shape of the encoder's, and the image in the text space `(batch_size,
        projection_dim)`, not normalised, in which padding does not count."""
        head_tokens = self.clip_head(patch_tokens)
        return head_tokens, self.clip_head.pool(head_tokens, self._content_mask(head_tokens, reshaped_input_sizes))


class SamClipVisionEncoder(SamVisionEncoder):
    """SAM's image encoder, with its weights under its keys, for images of any height and width."""

    _supports_flex_attn = True

    def __init__(self, config):
        # Past SAM's own constructor, which would first build and initialise layers to be thrown away.
        super(SamVisionEncoder, self).__init__(config)
        self.image_size = config.image_size
        self.patch_embed = SamPatchEmbeddings(config)
        self.pos_embed = None
        if config.use_abs_pos:
            grid_size = config.image_size // config.patch_size
            self.pos_embed = nn.Parameter(torch.zeros(1, grid_size, grid_size, config.hidden_size))
        self.layers = nn.ModuleList(
            SamClipVisionLayer(config, 0 if number in config.global_attn_indexes else config.window_size)
            for number in range(config.num_hidden_layers)
        )
        self.neck = SamVisionNeck(config)
        self.gradient_checkpointing = False
        self.post_init()

    def interpolate_pos_embed(self, grid_height: int, grid_width: int) -> torch.Tensor:
        """The position table `(1, trained_size, trained_size, hidden_size)`, bicubically resized to the grid. The
        trained size is no case of its own, so that torch.compile and torch.export see none; there it changes
        nothing."""
        table = self.pos_embed.permute(0, 3, 1, 2).float()
        table = F.interpolate(table, size=(grid_height, grid_width), mode="bicubic", align_corners=False)
        return table.permute(0, 2, 3, 1).to(self.pos_embed.dtype)

    def get_input_embeddings(self) -> nn.Module:
        """The layer that the pixels enter. Differs from SAM's, which returns the module around it, in running as one:
        hooks on it see the embeddings."""
        return self.patch_embed.projection

    def encode(self, pixel_values: torch.Tensor | None) -> torch.Tensor:
        """The last layer's tokens `(batch_size, grid_height, grid_width, hidden_size)`, before the neck. Records
        nothing itself, so that a model around it records these layers among its own."""
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values")
        patch_size = self.config.patch_size
        if pixel_values.ndim != 4:
            raise ValueError(
                f"pixel_values must be (batch_size, num_channels, height, width), got {tuple(pixel_values.shape)}."
            )
        _, channels, height, width = pixel_values.shape
        if channels != self.config.num_channels:
            raise ValueError(f"pixel_values have {channels} channels, the model takes {self.config.num_channels}.")
        if height % patch_size or width % patch_size or 0 in (height, width):
            raise ValueError(
                f"pixel_values are {height} x {width}; height and width must be positive multiples of the patch size, "
                f"{patch_size}."
            )
        projection = self.patch_embed.projection
        hidden_states = projection(pixel_values.to(projection.weight.dtype)).permute(0, 2, 3, 1)  # as CLIP does
        if self.pos_embed is not None:
            hidden_states = hidden_states + self.interpolate_pos_embed(*hidden_states.shape[1:3])
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: torch.Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> SamClipVisionEncoderOutput:
        r"""
        pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
            Height and width are multiples of the patch size.
        """
        patch_tokens = self.encode(pixel_values)
        return SamClipVisionEncoderOutput(last_hidden_state=self.neck(patch_tokens), patch_tokens=patch_tokens)


class SamClipHeadMLP(nn.Module):
    """Two hidden layers: `(..., input_size)` -> `(..., output_size)`."""

    def __init__(self, input_size: int, hidden_size: int, output_size: int, activation: nn.Module):
        super().__init__()
        self.fc1 = nn.Linear(input_size, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)
        self.fc3 = nn.Linear(hidden_size, output_size)
        self.activation = activation

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.activation(self.fc1(hidden_states))
        hidden_states = self.activation(self.fc2(hidden_states))
        return self.fc3(hidden_states)


class SamClipHead(nn.Module):
    """
    Patch tokens -> transformer layers -> pooling -> LayerNorm -> MLP -> text space; without the pooling, every patch
    in text space.
    """

    def __init__(self, config: SamClipConfig | SamClipVisionConfig):
        super().__init__()
        vision_config, head_config = config.vision_config, config.clip_head_config
        last_is_global = vision_config.num_hidden_layers - 1 in vision_config.global_attn_indexes
        window_size = 0 if last_is_global else vision_config.window_size
        hidden_size = vision_config.hidden_size
        mlp_hidden_size = hidden_size if head_config.mlp_hidden_size is None else head_config.mlp_hidden_size
        self.pooling = head_config.pooling
        self.window_size = window_size
        self.layers = nn.ModuleList(
            SamClipVisionLayer(vision_config, window_size) for _ in range(head_config.num_hidden_layers)
        )
        self.layer_norm = nn.LayerNorm(hidden_size, eps=vision_config.layer_norm_eps)
        self.mlp = SamClipHeadMLP(
            hidden_size, mlp_hidden_size, head_config.projection_dim, ACT2FN[vision_config.hidden_act]
        )

    def forward(self, patch_tokens: torch.Tensor) -> torch.Tensor:
        """Head tokens `(batch_size, grid_height, grid_width, hidden_size)` from patch tokens of the same shape."""
        for layer in self.layers:
            patch_tokens = layer(patch_tokens)
        return patch_tokens

    def pool(self, head_tokens: torch.Tensor, content_mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        Image features `(batch_size, projection_dim)` from head tokens; cells where `content_mask`
        `(batch_size, grid_height, grid_width)` is `False` are padding and do not count.
        """
        tokens = head_tokens.flatten(1, 2)
        inside = None if content_mask is None else content_mask.flatten(1)[..., None]
        if self.pooling == "max":
            if inside is not None:
                tokens = tokens.masked_fill(~inside, torch.finfo(tokens.dtype).min)
            pooled = tokens.amax(dim=1)
        elif inside is None:
            pooled = tokens.mean(dim=1)
        else:
            pooled = (tokens * inside).sum(dim=1) / inside.sum(dim=1)
        return self.mlp(self.layer_norm(pooled))

    def pool_segments(self, patch_tokens: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
        r"""
        Segments as if each were an image of its own: in every layer its patches see one another and nothing else.

        patch_tokens (`torch.Tensor` of shape `(batch_size, grid_height, grid_width, hidden_size)`):
            As in `forward`.
        segments (`torch.Tensor` of shape `(batch_size, num_segments, grid_height, grid_width)`, `bool`):
            Which patches belong to each segment.

        Returns `(batch_size, num_segments, projection_dim)`; what it holds for a segment without patches has no
        meaning.
        """
        batch_size, num_segments, grid_height, grid_width = segments.shape
        image, segment, row, column = segments.nonzero(as_tuple=True)
        owner = image * num_segments + segment
        # Layers with windows see no further than the window inside a segment either.
        height, width = (self.window_size,) * 2 if self.window_size else (grid_height, grid_width)
        group = owner * grid_height * grid_width + (row // height) * grid_width + column // width
        group, order = group.sort()
        owner, row, column = owner[order], row[order], column[order]
        tokens = patch_tokens[image[order], row, column]
        if len(tokens):
            counts = group.unique_consecutive(return_counts=True)[1].tolist()
            groups = SamClipPatchGroups(row % height, column % width, (height, width), counts)
            for layer in self.layers:
                tokens = layer(tokens, groups)
        pooled = tokens.new_zeros(batch_size * num_segments, tokens.shape[-1]).scatter_reduce(
            0,
            owner[:, None].expand_as(tokens),
            tokens,
            "amax" if self.pooling == "max" else "mean",
            include_self=False,
        )
        return self.mlp(self.layer_norm(pooled)).unflatten(0, (batch_size, num_segments))

    def project_patches(self, head_tokens: torch.Tensor) -> torch.Tensor:
        """Dense features `(batch_size, projection_dim, grid_height, grid_width)` from head tokens."""
        return self.mlp(self.layer_norm(head_tokens)).permute(0, 3, 1, 2)


class SamClipVisionModel(SamClipPreTrainedModel):
    """
    SAM-CLIP's eye alone, image encoder and CLIP head, as a vision tower: patches in a sequence, without a class token.
    Loads from a SAM-CLIP checkpoint.

    `hidden_states` are those of the image encoder's layers, then those of the CLIP head's: the last ones are what the
    text space is read from, so that a vision-language model with a `vision_feature_layer` of -1 or -2 sees
    text-aligned patches. Its `vision_feature_select_strategy` must be `"full"`, as the first token is a patch.

    Example:

    ```python
    >>> from samclip_hf import SamClipVisionModel, miniature

    >>> model = SamClipVisionModel.from_pretrained(miniature.checkpoint())
    ```"""

    config: SamClipVisionConfig  # type: ignore[assignment]  # a part of the other
    input_modalities = ("image",)
    _can_record_outputs = SamVisionEncoder._can_record_outputs
    # What else a SAM-CLIP checkpoint holds.
    _keys_to_ignore_on_load_unexpected = [
        r"^(shared_image_embedding|prompt_encoder|mask_decoder|vision_encoder\.neck|text_model|text_projection)\.",
        r"^(logit_scale|logit_bias|class_embeds)$",
    ]

    def __init__(self, config: SamClipVisionConfig):
        super().__init__(config)
        self.vision_encoder = SamClipVisionEncoder(config.vision_config)
        self.vision_encoder.neck = nn.Identity()  # for the mask decoder; here its weights would never train
        self.clip_head = SamClipHead(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The layer that the pixels enter."""
        return self.vision_encoder.get_input_embeddings()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        reshaped_input_sizes: torch.Tensor | None = None,
        original_sizes: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        r"""
        pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
            Any height and width that are multiples of the patch size.
        reshaped_input_sizes (`torch.Tensor` of shape `(batch_size, 2)`, *optional*):
            From the image processor: height and width of each picture without its padding, which then does not count
            in `pooler_output`.
        original_sizes (`torch.Tensor` of shape `(batch_size, 2)`, *optional*):
            Not used; the image processor returns it, so that `model(**inputs)` works.

        Returns

        - `last_hidden_state` `(batch_size, grid_height * grid_width, hidden_size)`, the CLIP head's tokens;
        - `pooler_output` `(batch_size, projection_dim)`, the image in the text space, not normalised;
        - `hidden_states`, if asked for, `config.num_hidden_layers + 1` tensors of the shape of `last_hidden_state`;
        - `attentions`, if asked for and with eager attention, one a layer, shaped as SAM's.
        """
        outputs = self._forward(pixel_values, reshaped_input_sizes, return_dict=True, **kwargs)
        if outputs.hidden_states is not None:
            # Recorded as the layers give them, in rows and columns; None where only some layers were asked for.
            outputs.hidden_states = tuple(h if h is None else h.flatten(1, 2) for h in outputs.hidden_states)
        return outputs

    @capture_outputs(tie_last_hidden_states=False)
    def _forward(self, pixel_values, reshaped_input_sizes, **kwargs) -> BaseModelOutputWithPooling:
        head_tokens, pooled = self._pool_image(self.vision_encoder.encode(pixel_values), reshaped_input_sizes)
        return BaseModelOutputWithPooling(last_hidden_state=head_tokens.flatten(1, 2), pooler_output=pooled)


class SamClipModel(SamClipPreTrainedModel, SamModel):
    """
    SAM-CLIP. `forward` takes what [`SamModel`] and [`CLIPModel`] take and does what the inputs ask for, in one pass of
    the image encoder.

    Example:

    ```python
    >>> from samclip_hf import SamClipModel, SamClipProcessor, miniature

    >>> model = SamClipModel.from_pretrained(miniature.checkpoint())
    >>> processor = SamClipProcessor.from_pretrained(miniature.checkpoint())
    ```"""

    def __init__(self, config: SamClipConfig):
        # Past SamModel's own constructor, which would first build and initialise an encoder to be thrown away.
        super(SamModel, self).__init__(config)
        self.shared_image_embedding = SamClipPositionalEmbedding(config.vision_config)
        self.vision_encoder = SamClipVisionEncoder(config.vision_config)
        self.prompt_encoder = SamPromptEncoder(config)
        self.prompt_encoder.shared_embedding = SamClipPositionalEmbedding(config.vision_config)  # tied, see SamModel
        # The mask decoder is no PreTrainedModel and does not learn it by itself (as in SamModel).
        config.mask_decoder_config._attn_implementation = config._attn_implementation
        self.mask_decoder = SamMaskDecoder(config.mask_decoder_config)
        self.clip_head = SamClipHead(config)
        projection_dim = config.clip_head_config.projection_dim
        self.text_model: Any = None
        self.text_projection: Any = None
        if config.has_text_tower and config.has_siglip_text:
            self.text_model = SiglipTextModel._from_config(config.text_config)  # projects by itself
        elif config.has_text_tower:
            self.text_model = CLIPTextModel._from_config(config.text_config)
            self.text_projection = nn.Linear(config.text_config.hidden_size, projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))
        self.logit_bias = nn.Parameter(torch.tensor(0.0)) if config.has_siglip_text else None
        # SamClipForImageSegmentation's vocabulary, if it was given one. Here, so that training goes on with it.
        num_embeds = len(config.vocabulary_label_ids)
        self.register_buffer("class_embeds", torch.zeros(num_embeds, projection_dim) if num_embeds else None)
        self.post_init()

    @classmethod
    def from_teachers(
        cls,
        sam: str | os.PathLike | SamModel,
        clip: str | os.PathLike | CLIPModel | SiglipModel,
        clip_head_config: dict | SamClipHeadConfig | None = None,
        clip_head_initialization: str = "copied",
    ) -> "SamClipModel":
        r"""
        A SAM-CLIP at the start of its training: SAM's weights, CLIP's text tower, and a CLIP head whose layers are
        copies of SAM's last one (appendix A). Only the head's LayerNorm and MLP are new, so it knows no class yet.

        sam (`str`, `os.PathLike` or [`SamModel`]):
            Name, folder or model; any size (ViT-B, -L, -H, ...).
        clip (`str`, `os.PathLike`, [`CLIPModel`] or [`SiglipModel`]):
            Name, folder or model; any size. SigLIP 2's checkpoints of a fixed image size are [`SiglipModel`]s.
        clip_head_config (`dict` or [`SamClipHeadConfig`], *optional*):
            Number of layers, pooling and MLP width. The projection size is always the CLIP teacher's.
        clip_head_initialization (`str`, *optional*, defaults to `"copied"`):
            `"random"` leaves the head's layers as a new model has them: the paper's main text can be read so.

        Raises `TypeError` where a teacher is of another kind, `ValueError` where sizes do not fit and for an unknown
        key of `clip_head_config` or `clip_head_initialization`.
        """
        if clip_head_initialization not in ("copied", "random"):
            raise ValueError(f'`clip_head_initialization` is "copied" or "random", not {clip_head_initialization!r}.')
        sam = load_teacher((SamModel,), sam, "sam")
        clip = load_teacher((CLIPModel, SiglipModel), clip, "clip")
        if isinstance(clip_head_config, SamClipHeadConfig):
            clip_head_config = clip_head_config.to_dict()
        text_config = clip.config.text_config.to_dict()
        if isinstance(clip, SiglipModel):
            projection_dim = clip.config.text_config.projection_size
            if clip.name_or_path:  # its configuration does not know it, SigLIP 2's least of all
                text_config["pad_token_id"] = _load_tokenizer(clip.name_or_path).pad_token_id
            if text_config["pad_token_id"] is None:
                raise ValueError("SigLIP reads texts that are filled up, but its tokenizer has no padding token.")
        else:
            projection_dim = clip.config.projection_dim
        head = dict(clip_head_config or {})
        if unknown := sorted(head.keys() - SamClipHeadConfig.__dataclass_fields__.keys()):
            raise ValueError(
                f"A CLIP head has no {', '.join(unknown)}: it has num_hidden_layers, pooling and mlp_hidden_size."
            )
        if head.setdefault("projection_dim", projection_dim) != projection_dim:
            raise ValueError(
                f"clip_head_config asks for projection_dim {head['projection_dim']}, but the CLIP teacher's text "
                f"space has {projection_dim} dimensions. Leave projection_dim out."
            )
        config = SamClipConfig(
            vision_config=sam.config.vision_config.to_dict(),
            prompt_encoder_config=sam.config.prompt_encoder_config.to_dict(),
            mask_decoder_config=sam.config.mask_decoder_config.to_dict(),
            text_config=text_config,
            clip_head_config=head,
            initializer_range=sam.config.initializer_range,
        )
        model = cls(config)
        for name in ("shared_image_embedding", "vision_encoder", "prompt_encoder", "mask_decoder"):
            getattr(model, name).load_state_dict(getattr(sam, name).state_dict())
        model.text_model.load_state_dict(clip.text_model.state_dict())
        if isinstance(clip, SiglipModel):
            model.logit_bias.data.copy_(clip.logit_bias.data.squeeze())  # type: ignore[union-attr]
        else:
            model.text_projection.load_state_dict(clip.text_projection.state_dict())
        model.logit_scale.data.copy_(clip.logit_scale.data.squeeze())
        layers = "new layers"
        if clip_head_initialization == "copied":
            layers = "copies of the image encoder's last layer"
            for layer in model.clip_head.layers:
                layer.load_state_dict(model.vision_encoder.layers[-1].state_dict())

        size = {name: sum(p.numel() for p in module.parameters()) / 1e6 for name, module in model.named_children()}
        logger.warning(
            "SAM-CLIP built from its teachers. Copied from SAM: image encoder "
            f"({size['vision_encoder']:.1f} M parameters), prompt encoder and mask decoder "
            f"({size['prompt_encoder'] + size['mask_decoder']:.1f} M). Copied from CLIP: text tower, its projection "
            f"and logit scale ({size['text_model'] + size.get('text_projection', 0):.1f} M). CLIP head "
            f"({size['clip_head']:.1f} M): {len(model.clip_head.layers)} {layers}; its LayerNorm and MLP are new, so "
            "train it before asking it about text."
        )
        return model

    def get_image_wide_positional_embeddings(self, size: Sequence[int] | None = None) -> torch.Tensor:
        """SAM's encoding of each cell's position `(1, hidden_size, grid_height, grid_width)`; by default for the
        grid of the trained image size."""
        trained_size = self.config.prompt_encoder_config.image_embedding_size
        height, width = size if size is not None else (trained_size, trained_size)
        device = self.shared_image_embedding.positional_embedding.device
        y = (torch.arange(height, device=device) + 0.5) / height
        x = (torch.arange(width, device=device) + 0.5) / width
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
        return self.shared_image_embedding(grid).permute(2, 0, 1).unsqueeze(0)

    def predict_masks(
        self,
        image_embeddings: torch.Tensor,
        input_points: torch.Tensor | None = None,
        input_labels: torch.Tensor | None = None,
        input_boxes: torch.Tensor | None = None,
        input_masks: torch.Tensor | None = None,
        multimask_output: bool = True,
        attention_similarity: torch.Tensor | None = None,
        target_embedding: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        r"""
        SAM's prompt encoder and mask decoder on an image embedding of any grid. Arguments as in `forward`.

        Returns mask logits `(batch_size, num_prompts, num_masks, 4 * grid_height, 4 * grid_width)` and predicted IoUs
        `(batch_size, num_prompts, num_masks)`.
        """
        batch_size, _, grid_height, grid_width = image_embeddings.shape
        if input_points is not None and input_points.ndim != 4:
            raise ValueError(
                f"input_points must be (batch_size, num_prompts, num_points, 2), got {tuple(input_points.shape)}."
            )
        if input_boxes is not None and input_boxes.ndim != 3:
            raise ValueError(f"input_boxes must be (batch_size, num_boxes, 4), got {tuple(input_boxes.shape)}.")
        for name, prompt in (("input_points", input_points), ("input_boxes", input_boxes)):
            if prompt is not None and prompt.shape[0] != batch_size:
                raise ValueError(f"{name} are for {prompt.shape[0]} images, but there are {batch_size}.")
        if input_points is not None and input_boxes is not None and input_points.shape[1] != input_boxes.shape[1]:
            raise ValueError(
                "Points and boxes given together describe the same objects, so there must be as many of each: got "
                f"{input_points.shape[1]} and {input_boxes.shape[1]} prompts."
            )
        if input_points is not None and input_labels is not None and input_labels.shape != input_points.shape[:-1]:
            raise ValueError(
                f"input_labels must be one for each of the input_points, {tuple(input_points.shape[:-1])}, got "
                f"{tuple(input_labels.shape)}."
            )
        if input_points is not None and input_labels is None:
            input_labels = torch.ones_like(input_points[..., 0], dtype=torch.int)
        if input_masks is not None and (input_masks.ndim != 4 or input_masks.shape[:2] != (batch_size, 1)):
            raise ValueError(
                f"input_masks must be one for each of {batch_size} images, ({batch_size}, 1, height, width), got "
                f"{tuple(input_masks.shape)}."
            )
        if input_masks is not None and input_masks.shape[-2:] != (4 * grid_height, 4 * grid_width):
            raise ValueError(
                f"input_masks are {tuple(input_masks.shape[-2:])} but must be {4 * grid_height} x {4 * grid_width}, "
                "four times the patch grid, like the pred_masks of an earlier call."
            )

        # SAM's prompt encoder knows one input size: bring coordinates of this one into it. Its pixel centres are at
        # +0.5, which it adds itself.
        trained_size, patch_size = self.prompt_encoder.input_image_size, self.config.vision_config.patch_size
        scale = trained_size / (torch.tensor([grid_width, grid_height], device=image_embeddings.device) * patch_size)
        if input_points is not None:
            input_points = (input_points + 0.5) * scale - 0.5
        if input_boxes is not None:
            input_boxes = (input_boxes + 0.5) * scale.repeat(2) - 0.5
        sparse_embeddings, dense_embeddings = self.prompt_encoder(
            input_points=input_points, input_labels=input_labels, input_boxes=input_boxes, input_masks=input_masks
        )
        if input_masks is None:  # "no mask" is one vector, repeated over the trained grid
            dense_embeddings = dense_embeddings[..., :1, :1].expand(-1, -1, grid_height, grid_width)
        positional_embeddings = self.get_image_wide_positional_embeddings((grid_height, grid_width))
        return self.mask_decoder(
            image_embeddings=image_embeddings,
            image_positional_embeddings=positional_embeddings.expand(batch_size, -1, -1, -1),
            sparse_prompt_embeddings=sparse_embeddings,
            dense_prompt_embeddings=dense_embeddings,
            multimask_output=multimask_output,
            attention_similarity=attention_similarity,
            target_embedding=target_embedding,
        )

    def _encode_once(self, pixel_values, vision_embeds, **kwargs):
        """[`SamClipVisionEncoderOutput`]: what the image encoder gave for the image, or gives now."""
        if (pixel_values is None) == (vision_embeds is None):
            raise ValueError("Give either pixel_values or vision_embeds, and not both.")
        return self.vision_encoder(pixel_values, **kwargs) if vision_embeds is None else vision_embeds

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        reshaped_input_sizes: torch.Tensor | None = None,
        vision_embeds: SamClipVisionEncoderOutput | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        r"""
        The image in the text space, as [`CLIPModel.get_image_features`] gives it.

        pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
            From the image processor.
        reshaped_input_sizes (`torch.Tensor` of shape `(batch_size, 2)`, *optional*):
            From the image processor: height and width of each picture without its padding, which then does not count.
        vision_embeds ([`SamClipVisionEncoderOutput`], *optional*):
            From `vision_encoder`, instead of `pixel_values`, to ask of an image again.

        Returns `pooler_output` `(batch_size, projection_dim)`, not normalised, and `last_hidden_state`
        `(batch_size, grid_height * grid_width, hidden_size)`, the head's tokens; `hidden_states` and `attentions`, if
        asked for, are the image encoder's.
        """
        vision_outputs = self._encode_once(pixel_values, vision_embeds, **kwargs)
        head_tokens, pooled = self._pool_image(vision_outputs.patch_tokens, reshaped_input_sizes)
        return BaseModelOutputWithPooling(
            last_hidden_state=head_tokens.flatten(1, 2),
            pooler_output=pooled,
            hidden_states=vision_outputs.hidden_states,
            attentions=vision_outputs.attentions,
        )

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """The texts in the text space, exactly as [`CLIPModel.get_text_features`]: `pooler_output`
        `(num_texts, projection_dim)`, not normalised. With SigLIP's text tower, as [`SiglipModel.get_text_features`]
        of texts padded to the longest that it reads, whatever their padding here; no mask, as it was trained."""
        if self.text_model is None:
            raise ValueError("This checkpoint has no text tower: it knows its own vocabulary and no other text.")
        if self.config.has_siglip_text:
            longest, pad = self.config.text_config.max_position_embeddings, self.config.text_config.pad_token_id
            if input_ids.shape[-1] < longest:
                input_ids = F.pad(input_ids, (0, longest - input_ids.shape[-1]), value=pad)
            # Padding on the left, as Gemma's tokenizer has it by itself, goes to the right, where SigLIP 2 learnt it.
            start = (input_ids != pad).int().argmax(dim=-1, keepdim=True)
            position = torch.arange(input_ids.shape[-1], device=input_ids.device)
            input_ids = input_ids.gather(-1, (start + position) % input_ids.shape[-1])
            return self.text_model(input_ids=input_ids, position_ids=position_ids, **kwargs)
        outputs = self.text_model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs
        )
        outputs.pooler_output = self.text_projection(outputs.pooler_output)
        return outputs

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_points: torch.Tensor | None = None,
        input_labels: torch.LongTensor | None = None,
        input_boxes: torch.Tensor | None = None,
        input_masks: torch.Tensor | None = None,
        image_embeddings: torch.Tensor | None = None,
        multimask_output: bool = True,
        attention_similarity: torch.Tensor | None = None,
        target_embedding: torch.Tensor | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        reshaped_input_sizes: torch.Tensor | None = None,
        original_sizes: torch.Tensor | None = None,
        num_prompts: torch.Tensor | None = None,
        return_loss: bool | None = None,
        vision_embeds: SamClipVisionEncoderOutput | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SamClipOutput:
        r"""
        pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
            Any height and width that are multiples of the patch size.
        input_points (`torch.Tensor` of shape `(batch_size, num_prompts, num_points, 2)`):
            x and y in pixels of `pixel_values`; all points of a prompt describe one object.
        input_labels (`torch.Tensor` of shape `(batch_size, num_prompts, num_points)`, *optional*):
            1 inside, 0 outside, -1 none, -10 padding. All inside by default.
        input_boxes (`torch.Tensor` of shape `(batch_size, num_prompts, 4)`):
            x1, y1, x2, y2 in pixels of `pixel_values`.
        input_masks (`torch.Tensor` of shape `(batch_size, 1, 4 * grid_height, 4 * grid_width)`):
            Mask logits of an earlier call, for all prompts of an image.
        image_embeddings (`torch.Tensor` of shape `(batch_size, output_channels, grid_height, grid_width)`):
            From `get_image_embeddings`, instead of `pixel_values`, to prompt an image again.
        multimask_output (`bool`, defaults to `True`):
            Three masks a prompt rather than one.
        attention_similarity, target_embedding (`torch.Tensor`):
            As in [`SamModel`].
        input_ids, attention_mask, position_ids (`torch.Tensor` of shape `(num_texts, sequence_length)`):
            Texts to compare every image with.
        reshaped_input_sizes (`torch.Tensor` of shape `(batch_size, 2)`, *optional*):
            Height and width of each picture without its padding, which then does not count in `image_embeds`.
        original_sizes (`torch.Tensor` of shape `(batch_size, 2)`, *optional*), num_prompts (`(batch_size,)`):
            Not used; the processor returns them for post-processing, so that `model(**inputs)` works.
        return_loss (`bool`, *optional*):
            Whether to return CLIP's contrastive loss or, with SigLIP's text tower, SigLIP's.
        vision_embeds ([`SamClipVisionEncoderOutput`], *optional*):
            From `vision_encoder`, instead of `pixel_values`, to ask anything of an image again.
        """
        if sum(given is not None for given in (pixel_values, image_embeddings, vision_embeds)) != 1:
            raise ValueError(
                "Give one of pixel_values, image_embeddings and vision_embeds; get_text_features embeds texts alone."
            )
        has_prompts = any(prompt is not None for prompt in (input_points, input_boxes, input_masks))
        asks_clip_head = input_ids is not None or not has_prompts
        if asks_clip_head and image_embeddings is not None:
            raise ValueError(
                "image_embeddings hold what the mask decoder reads, not what the CLIP head reads: give pixel_values "
                "or vision_embeds for text, or prompts for masks."
            )

        fields = {}
        if image_embeddings is None:
            vision_outputs = self._encode_once(pixel_values, vision_embeds, **kwargs)
            image_embeddings = vision_outputs.last_hidden_state
            fields["vision_hidden_states"] = vision_outputs.hidden_states
            fields["vision_attentions"] = vision_outputs.attentions

        if has_prompts:
            assert image_embeddings is not None  # given, or just computed
            fields["pred_masks"], fields["iou_scores"] = self.predict_masks(
                image_embeddings,
                input_points=input_points,
                input_labels=input_labels,
                input_boxes=input_boxes,
                input_masks=input_masks,
                multimask_output=multimask_output,
                attention_similarity=attention_similarity,
                target_embedding=target_embedding,
            )

        if asks_clip_head:
            head_tokens, pooled = self._pool_image(vision_outputs.patch_tokens, reshaped_input_sizes)
            image_embeds = F.normalize(pooled, dim=-1)
            dense_embeds = F.normalize(self.clip_head.project_patches(head_tokens), dim=1)
            fields |= {"image_embeds": image_embeds, "dense_embeds": dense_embeds}

        if input_ids is not None:
            text_features = self.get_text_features(input_ids, attention_mask, position_ids).pooler_output
            text_embeds = F.normalize(text_features, dim=-1)
            logits_per_text = text_embeds @ image_embeds.T * self.logit_scale.exp()
            if self.logit_bias is not None:
                logits_per_text = logits_per_text + self.logit_bias
            loss = None
            if return_loss:
                loss = (_contrastive_loss if self.logit_bias is None else _sigmoid_loss)(logits_per_text)
            fields |= {
                "text_embeds": text_embeds,
                "logits_per_text": logits_per_text,
                "logits_per_image": logits_per_text.T,
                "loss": loss,
            }
        return SamClipOutput(image_embeddings=image_embeddings, **fields)


class SamClipForImageSegmentation(SamClipModel):
    """
    SAM-CLIP with a vocabulary: labels (`config.id2label`) and their text embeddings (`class_embeds`) live in the
    checkpoint, so that an image alone gives labelled segments. Loads any SAM-CLIP checkpoint; give one without a
    vocabulary its own by `set_vocabulary`.
    """

    @property
    def vocabulary(self) -> SamClipVocabulary:
        """The checkpoint's own. Raises `ValueError` if it has none."""
        if self.class_embeds is None:
            raise ValueError(
                'No vocabulary in this checkpoint: call model.set_vocabulary(["cat", "sofa", ...]) first.'
            )
        config = self.config
        return SamClipVocabulary(
            self.class_embeds,
            config.vocabulary_label_ids,
            config.id2label,
            config.background_label_id,
            config.background_threshold,
            config.label_tokens,
        )

    def set_vocabulary(self, *args, **kwargs) -> "SamClipForImageSegmentation":
        """Makes [`embed_vocabulary`]'s result this checkpoint's own, to be saved with it. Returns the model."""
        vocabulary = self.embed_vocabulary(*args, **kwargs)
        self.class_embeds = vocabulary.class_embeds
        self.config.vocabulary_label_ids = vocabulary.label_ids
        self.config.background_label_id = vocabulary.background_label_id
        self.config.background_threshold = vocabulary.background_threshold
        self.config.label_tokens = vocabulary.label_tokens
        self.config.id2label = vocabulary.id2label
        self.config.label2id = {name: label_id for label_id, name in vocabulary.id2label.items()}
        return self

    def drop_text_tower(self) -> "SamClipForImageSegmentation":
        """Leaves out the text tower, larger than ViT-B's image encoder, and with it any vocabulary but this one, for
        good once saved. Returns the model."""
        self.vocabulary  # noqa: B018  # raises if there is none, and nothing would be left to segment by
        self.text_model = self.text_projection = None
        self.config.has_text_tower = False
        return self

    @torch.no_grad()
    def embed_vocabulary(
        self,
        labels: Sequence[str | Sequence[str]],
        background: Sequence[str] | float | None = (),
        templates: Sequence[str] = ("a photo of a {}",),
        tokenizer: PreTrainedTokenizerBase | None = None,
        synonyms: Literal["max", "mean"] = "max",
    ) -> SamClipVocabulary:
        r"""
        Embeds a vocabulary, once for any number of images: `model(pixel_values, vocabulary=vocabulary)`.

        labels (`Sequence`):
            Names of the classes. A list in place of a name holds synonyms: the first names the label.
        background (`Sequence[str]` or `float`, *optional*):
            Either texts of what belongs to no class ("a wall", "an empty scene"), used as they are, or a threshold:
            what no class is as probable as that for, among the classes, is background. The likeliest of n classes has
            at least 1/n, so thresholds up to that, and any for a single class, make no background. It also decides
            where the SAM head is asked. With either, label 0 becomes
            "background" and the classes follow; without, something of the vocabulary is everywhere.
        templates (`Sequence[str]`, *optional*):
            Sentences with a `{}` for the name, such as those in `samclip_hf.templates`; a name's embedding is the mean
            over them.
        tokenizer ([`PreTrainedTokenizerBase`], *optional*):
            By default the one saved beside this model's checkpoint.
        synonyms (`"max"` or `"mean"`, *optional*):
            Whether the most similar of a label's synonyms counts, or the mean of their embeddings.

        Raises `ValueError` for no labels, an empty or doubled name, a template without `{}`, a text longer than the
        text tower reads, a threshold that is no probability.
        """
        if isinstance(labels, str) or not hasattr(labels, "__len__") or len(labels) == 0:
            raise ValueError(f'A vocabulary is a list of at least one name, such as ["cat", "sofa"]; got {labels!r}.')
        threshold: float | None = None
        texts_of_background: Any = () if background is None else background
        if isinstance(background, Real):  # numpy's too
            threshold, texts_of_background = float(background), ()
        if threshold is not None and not 0 < threshold < 1:
            raise ValueError(f"As a threshold, background must be a probability between 0 and 1, got {threshold}.")
        if isinstance(texts_of_background, str) or not all(
            isinstance(text, str) and text.strip() for text in texts_of_background
        ):
            raise ValueError(
                f'background must be a list of texts, such as ["a wall", "sky"], or a threshold; got {background!r}.'
            )
        if isinstance(templates, str) or not templates or not all(t.count("{}") == 1 for t in templates):
            raise ValueError(f"templates must be a list of sentences that contain {{}} once, got {templates!r}.")
        groups: list[list[Any]] = [list(label) if isinstance(label, list | tuple) else [label] for label in labels]
        names = [name for group in groups for name in group]
        if not all(groups) or not all(isinstance(name, str) and name.strip() for name in names):
            raise ValueError(f"Every label must be a name or a list of names, and no name empty; got {labels!r}.")
        if synonyms not in ("max", "mean"):
            raise ValueError(f'synonyms must be "max" or "mean", got {synonyms!r}.')
        has_background = threshold is not None or len(texts_of_background) > 0
        if has_background and "background" in names:
            raise ValueError(
                'With a background, that is what label 0 is called: give the class "background" another name.'
            )
        counts = Counter(names)
        if doubled := sorted(name for name, count in counts.items() if count > 1):
            raise ValueError(f"These names appear more than once in the vocabulary: {doubled}.")

        first_class = int(has_background)
        id2label = {label_id: group[0] for label_id, group in enumerate(groups, start=first_class)}
        label_ids = [0] * len(texts_of_background)
        texts = [[text] for text in texts_of_background]  # one embedding for each list
        for label_id, group in enumerate(groups, start=first_class):
            filled = [[template.replace("{}", name) for template in templates] for name in group]
            filled = [[text for texts_of_name in filled for text in texts_of_name]] if synonyms == "mean" else filled
            label_ids += [label_id] * len(filled)
            texts += filled
        tokenizer = self._tokenizer() if tokenizer is None else tokenizer
        features = self._embed_texts([text for group in texts for text in group], tokenizer)
        means = [group.mean(dim=0) for group in features.split([len(group) for group in texts])]
        return SamClipVocabulary(
            F.normalize(torch.stack(means), dim=-1),
            label_ids,
            {0: "background"} | id2label if has_background else id2label,
            0 if has_background else None,
            threshold,
            [tokenizer([group[0]], return_tensors="pt")["input_ids"][0].tolist() for group in groups],
        )

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        """The one saved beside this model's checkpoint."""
        if not self.config.name_or_path:
            raise ValueError("This model was not loaded from a folder or the Hub: give its tokenizer.")
        return _load_tokenizer(self.config.name_or_path)

    def _embed_texts(self, texts: list[str], tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
        """`(num_texts, projection_dim)`, of length 1."""
        features = []
        for start in range(0, len(texts), TEXTS_PER_BATCH):
            batch = texts[start : start + TEXTS_PER_BATCH]
            inputs = tokenizer(batch, padding=True, return_tensors="pt")
            longest = self.config.text_config.max_position_embeddings
            if inputs["input_ids"].shape[1] > longest:
                cut = max(batch, key=lambda text: len(tokenizer(text)["input_ids"]))
                raise ValueError(f"The text tower reads {longest} tokens at most, this text has more: {cut!r}.")
            features.append(self.get_text_features(**inputs.to(self.device)).pooler_output)
        return F.normalize(torch.cat(features), dim=-1)

    def classify(self, embeds: torch.Tensor, vocabulary: SamClipVocabulary) -> torch.Tensor:
        """
        Logits `(..., num_labels)` of embeddings `(..., projection_dim)` of length 1: scaled cosine similarity to the
        label's most similar text. With a threshold for background, that is certain where no class is as probable, and
        impossible elsewhere: it takes nothing from the classes' own probabilities.
        """
        similarity = embeds @ vocabulary.class_embeds.to(embeds.dtype).T * self.logit_scale.exp()
        label_ids = torch.tensor(vocabulary.label_ids, device=embeds.device)
        logits = similarity.new_full((*embeds.shape[:-1], len(vocabulary.id2label)), -torch.inf)
        logits = logits.scatter_reduce(-1, label_ids.expand_as(similarity), similarity, "amax")
        if vocabulary.background_threshold is not None:
            highest = logits.amax(dim=-1)
            is_background = (highest - logits.logsumexp(dim=-1)).exp() < vocabulary.background_threshold
            logits[..., vocabulary.background_label_id] = highest + torch.where(
                is_background, BACKGROUND_LOGIT_MARGIN, -BACKGROUND_LOGIT_MARGIN
            )
        return logits

    @can_return_tuple
    def forward(  # type: ignore[override]  # another head, other inputs
        self,
        pixel_values: torch.Tensor | None = None,
        reshaped_input_sizes: torch.Tensor | None = None,
        original_sizes: torch.Tensor | None = None,
        both_heads: bool = True,
        vocabulary: SamClipVocabulary | None = None,
        vision_embeds: SamClipVisionEncoderOutput | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SamClipSegmentationOutput:
        r"""
        pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
            From the image processor.
        reshaped_input_sizes (`torch.Tensor` of shape `(batch_size, 2)`, *optional*):
            From the image processor: height and width of each picture without its padding.
        original_sizes (`torch.Tensor` of shape `(batch_size, 2)`, *optional*):
            Not used; post-processing takes them as `target_sizes`.
        both_heads (`bool`, defaults to `True`):
            Whether the SAM head refines what the CLIP head found (paper, section 5: "composing both CLIP and SAM
            heads"), rather than the CLIP head alone.
        vocabulary ([`SamClipVocabulary`], *optional*):
            From `embed_vocabulary`; by default the checkpoint's own.
        vision_embeds ([`SamClipVisionEncoderOutput`], *optional*):
            From `vision_encoder`, instead of `pixel_values`, to segment an image again.
        """
        vocabulary = self.vocabulary if vocabulary is None else vocabulary
        if prompts := sorted(name for name in kwargs if name.startswith("input_")):
            raise ValueError(
                f"This model segments by its vocabulary and takes no {', '.join(prompts)}: set_vocabulary changes the "
                "texts, SamClipModel takes points and boxes."
            )
        if "labels" in kwargs:
            raise ValueError(
                "This model has no loss and takes no labels: a SamClipModel learns from its teachers, by the "
                "SamClipTrainer."
            )
        vision_outputs = self._encode_once(pixel_values, vision_embeds, **kwargs)
        dense_embeds = self.clip_head.project_patches(self.clip_head(vision_outputs.patch_tokens))
        dense_embeds = F.normalize(dense_embeds, dim=1)
        logits = self.classify(dense_embeds.permute(0, 2, 3, 1), vocabulary).permute(0, 3, 1, 2)
        segments = {}
        if both_heads:
            content_mask = self._content_mask(vision_outputs.patch_tokens, reshaped_input_sizes)
            if self.config.composition == "classes":
                segments = self.compose_heads_by_class(
                    vision_outputs.last_hidden_state, logits, vocabulary, content_mask
                )
            else:
                segments = self.compose_heads(
                    vision_outputs.last_hidden_state, vision_outputs.patch_tokens, logits, vocabulary, content_mask
                )

        patch_size = self.config.vision_config.patch_size
        if reshaped_input_sizes is None:
            reshaped_input_sizes = torch.tensor(logits.shape[-2:]).expand(len(logits), 2) * patch_size
        content_sizes = torch.as_tensor(reshaped_input_sizes, device=logits.device) / patch_size
        return SamClipSegmentationOutput(
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

    def compose_heads(
        self,
        image_embeddings: torch.Tensor,
        patch_tokens: torch.Tensor,
        logits: torch.Tensor,
        vocabulary: SamClipVocabulary,
        content_mask: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        r"""
        Both heads together: the CLIP head says where something of the vocabulary is, the SAM head draws what is there
        from points, and the CLIP head looks once more, each patch at its own segment only, and names every segment as
        it names a whole image.

        Not the paper's composition, which is [`compose_heads_by_class`]: what stands beside an object no longer mixes
        into its name, for one more pass of the CLIP head. The README compares the two.

        image_embeddings (`torch.Tensor` of shape `(batch_size, output_channels, grid_height, grid_width)`):
            What the mask decoder reads.
        patch_tokens (`torch.Tensor` of shape `(batch_size, grid_height, grid_width, hidden_size)`):
            What the CLIP head reads.
        logits (`torch.Tensor` of shape `(batch_size, num_labels, grid_height, grid_width)`):
            The CLIP head's, per patch.
        vocabulary ([`SamClipVocabulary`]):
            What `logits` are of.
        content_mask (`torch.Tensor` of shape `(batch_size, grid_height, grid_width)`, *optional*):
            `False` on padding.

        Returns `segment_masks`, `_logits`, `_embeds` and `_scores` as in [`SamClipSegmentationOutput`].
        """
        background = vocabulary.background_label_id
        something = torch.ones_like(logits[:, 0]) if background is None else 1 - logits.softmax(dim=1)[:, background]
        if content_mask is not None:
            something = something * content_mask
        something = something > 0.5
        points = _spread_points(something, self.config.composition_points)
        points = ((points + 0.5) * self.config.vision_config.patch_size - 0.5)[:, :, None]
        found = []
        # At 1024 px a point is several copies of a 4 MB map in the mask decoder: two at a time stay in a CPU's cache.
        for chunk in points.split(2 if points.device.type == "cpu" else points.shape[1], dim=1):
            masks, iou_scores = self.predict_masks(image_embeddings, input_points=chunk)
            scores, best = (iou_scores.clamp_min(0) * _stability(masks)).max(dim=-1)  # of the three masks of a point
            best = best[:, :, None, None, None].expand(-1, -1, 1, *masks.shape[-2:])
            found.append((masks.gather(2, best).squeeze(2), scores))
        masks, scores = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))

        segments = torch.zeros(*masks.shape[:2], *logits.shape[-2:], device=masks.device, dtype=torch.bool)
        for i in something.flatten(1).any(dim=1).nonzero().flatten().tolist():
            kept = _distinct_masks(masks[i], scores[i], max_overlap=0.5)
            segments[i, kept] = _segments(masks[i, kept], (segments.shape[-2], segments.shape[-1]))
        if content_mask is not None:
            segments &= content_mask[:, None]
        is_segment = segments.flatten(2).any(dim=-1)

        embeds = F.normalize(self.clip_head.pool_segments(patch_tokens, segments), dim=-1) * is_segment[..., None]
        return {
            "segment_masks": masks,
            "segment_logits": self.classify(embeds, vocabulary),
            "segment_embeds": embeds,
            "segment_scores": scores * is_segment,
        }

    def compose_heads_by_class(
        self,
        image_embeddings: torch.Tensor,
        logits: torch.Tensor,
        vocabulary: SamClipVocabulary,
        content_mask: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        r"""
        Both heads together as in the paper (section 5): for every class that the CLIP head finds, its logits are the
        mask prompt and three of its patches, drawn by probability, the points; the best class of every pixel counts.

        Arguments and what is returned as in [`compose_heads`], but that a segment is all of a class.
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
        generator = torch.Generator(weights.device).manual_seed(0)  # the same image gives the same segments
        cells = (
            torch.multinomial(weights.float(), POINTS_PER_CLASS, replacement=True, generator=generator)
            if len(image)
            else image.new_zeros(0, POINTS_PER_CLASS)
        )
        points = torch.stack([cells % grid_width, cells // grid_width], dim=-1)[:, None]
        points = (points + 0.5) * self.config.vision_config.patch_size - 0.5
        prompts = F.interpolate(
            # SAM's mask prompts are logits; in bfloat16, all that is near enough to 1 would be infinite.
            probabilities[image, label][:, None].float().logit(eps=1e-4).to(image_embeddings.dtype),
            size=(4 * grid_height, 4 * grid_width),
            mode="bilinear",
            align_corners=False,
        )

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
        for pair in range(len(image)):  # each class has the most probable name wherever it was found
            inside = found[image[pair], label[pair]]
            segment_logits[image[pair], number[pair]] = probabilities[image[pair], :, inside].mean(dim=1).log()
        segment_scores[image, number] = 1
        return {"segment_masks": segment_masks, "segment_logits": segment_logits, "segment_scores": segment_scores}


@dataclass
class SamClipObjectDetectionOutput(SamClipSegmentationOutput):
    r"""
    object_scores (`torch.Tensor` of shape `(batch_size, num_segments)`):
        How probable the text is for each segment, from 0 to 1; 0 where there is no segment.
    """

    object_scores: torch.Tensor | None = None


class SamClipForObjectDetection(SamClipForImageSegmentation):
    """
    Boxes around what a text names: the segments of [`SamClipForImageSegmentation`], scored against a text.

    A name of the checkpoint's vocabulary has the probability that it has there. Any other text is taken as it stands,
    so write a sentence like those that the CLIP teacher read: its score is its share of the vocabulary's softmax.
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
        if len(input_ids) != len(pixel_values):
            raise ValueError(f"Give one text for each image; got {len(input_ids)} for {len(pixel_values)}.")
        if self.config.composition != "segments":
            raise ValueError(
                'Segments found class by class cannot be scored against a text: set composition="segments".'
            )
        vocabulary = self.vocabulary if vocabulary is None else vocabulary
        outputs = super().forward(pixel_values, reshaped_input_sizes, original_sizes, vocabulary=vocabulary, **kwargs)
        text_embeds = F.normalize(self.get_text_features(input_ids, attention_mask).pooler_output, dim=-1)
        similarity = (outputs["segment_embeds"] @ text_embeds[:, :, None]).squeeze(-1) * self.logit_scale.exp()
        scores = (similarity - outputs["segment_logits"].logsumexp(dim=-1)).exp().clamp_max(1)
        first_label = len(vocabulary.id2label) - len(vocabulary.label_tokens)
        names = [self._without_padding(tokens) for tokens in vocabulary.label_tokens]
        for number, text in enumerate(input_ids):
            text = text if attention_mask is None else text[attention_mask[number].bool()]
            tokens = self._without_padding(text.tolist())
            if tokens in names:
                label_id = first_label + names.index(tokens)
                scores[number] = outputs["segment_logits"][number].softmax(dim=-1)[:, label_id]
        return SamClipObjectDetectionOutput(**outputs, object_scores=scores * (outputs["segment_scores"] > 0))

    def _without_padding(self, tokens: list[int]) -> list[int]:
        """SigLIP's tokenizers give no mask by which to know it. The first one pads with what also ends a text."""
        if not self.config.has_siglip_text:
            return tokens
        inside = [number for number, token in enumerate(tokens) if token != self.config.text_config.pad_token_id]
        return tokens[inside[0] : inside[-1] + 1] if inside else []


def _sigmoid_loss(logits_per_text: torch.Tensor) -> torch.Tensor:
    """SigLIP's (Zhai et al. 2023): every text is right for its own image and wrong for every other, each by itself."""
    _check_pairs(logits_per_text)
    signs = 2 * torch.eye(len(logits_per_text), device=logits_per_text.device) - 1
    return -F.logsigmoid(signs * logits_per_text).sum(dim=-1).mean()


def _stability(masks: torch.Tensor) -> torch.Tensor:
    """How little mask logits `(..., height, width)` change with their threshold, `(...)` from 0 to 1: IoU of the masks
    cut at 1 and at -1 (Kirillov et al. 2023, appendix B, "stability score")."""
    around = (masks > -1).sum(dim=(-2, -1))
    return (masks > 1).sum(dim=(-2, -1)) / around.clamp_min(1)


def _segments(masks: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
    """Which patches make up each of the mask logits `(num_masks, height, width)`, best first: `(num_masks,
    grid_height, grid_width)`. Those at least half inside, or the fullest one; a patch that several claim belongs to
    the first, so that a mask may be left without."""
    share = F.adaptive_avg_pool2d((masks > 0).float(), grid_size)
    claimed = (share >= 0.5) | (share >= share.amax(dim=(1, 2), keepdim=True))
    return claimed & (claimed.cumsum(dim=0) == 1)


def _spread_points(cells: torch.Tensor, num_points: int) -> torch.Tensor:
    """`num_points` of the marked cells `(batch_size, grid_height, grid_width)` of each image, evenly spread in reading
    order and repeated where there are fewer: column and row `(batch_size, num_points, 2)`."""
    marked = cells.flatten(1)
    position = marked.int().argsort(dim=1, descending=True, stable=True)  # marked cells first, in reading order
    step = torch.arange(num_points, device=cells.device) + 0.5
    chosen = position.gather(1, (step * marked.sum(dim=1, keepdim=True) / num_points).long())
    width = cells.shape[-1]
    return torch.stack([chosen % width, chosen // width], dim=-1)


def _distinct_masks(masks: torch.Tensor, scores: torch.Tensor, max_overlap: float) -> list[int]:
    """Indices of mask logits `(num_masks, height, width)` that are neither empty nor, by an IoU above `max_overlap`,
    one of better score once more: non-maximum suppression on the masks themselves."""
    flat = (masks > 0).flatten(1).float()
    area = flat.sum(dim=1)
    intersection = flat @ flat.T
    overlap = intersection / (area[:, None] + area[None, :] - intersection).clamp_min(1)
    kept: list[int] = []
    for index in scores.argsort(descending=True).tolist():
        if area[index] > 0 and all(overlap[index, other] <= max_overlap for other in kept):
            kept.append(index)
    return kept


def _contrastive_loss(logits_per_text: torch.Tensor) -> torch.Tensor:
    """CLIP's loss of texts `(batch_size, batch_size)` against images, in which text i belongs to image i."""
    _check_pairs(logits_per_text)
    target = torch.arange(len(logits_per_text), device=logits_per_text.device)
    return (F.cross_entropy(logits_per_text, target) + F.cross_entropy(logits_per_text.T, target)) / 2


def _check_pairs(logits_per_text: torch.Tensor) -> None:
    if logits_per_text.shape[0] != logits_per_text.shape[1]:
        raise ValueError(f"return_loss needs one text per image, got {tuple(logits_per_text.shape)} texts x images.")


def load_teacher(classes: tuple[type[PreTrainedModel], ...], teacher, argument: str):
    """`teacher` itself, or the model of one of `classes` that it names; safetensors only."""
    if isinstance(teacher, classes):
        return teacher
    wanted = " or a ".join(cls.__name__ for cls in classes)
    if not isinstance(teacher, str | os.PathLike):
        raise TypeError(f"{argument} must be a name, a folder or a {wanted}, got {type(teacher).__name__}.")
    try:
        config, _ = classes[0].config_class.get_config_dict(teacher)
    except OSError as error:
        raise OSError(
            f"{argument} {str(teacher)!r} is no folder with a model and no name on the Hub: {error}"
        ) from error
    model_type = config.get("model_type")
    for cls in classes:
        if model_type == cls.config_class.model_type:
            return cls.from_pretrained(teacher, use_safetensors=True)
    hint = ""
    if model_type == "siglip2":
        hint = " Of SigLIP 2, name a checkpoint of a fixed size rather than NaFlex: google/siglip2-base-patch16-224."
    raise TypeError(f"{argument} must be a {wanted}, but {str(teacher)!r} holds a model of type {model_type!r}.{hint}")


def _load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """The one saved beside a checkpoint. Raises `ValueError` where there is none."""
    try:
        return AutoTokenizer.from_pretrained(folder)
    except ImportError as error:
        raise ValueError(f"The tokenizer beside the model in {folder!r} needs another package. {error}") from error
    except Exception as error:  # transformers guesses at tokenizers, and fails in many ways
        raise ValueError(
            f"There is no tokenizer beside the model in {folder!r}: save the processor there too, or give the "
            "tokenizer."
        ) from error


__all__ = [
    "SamClipForImageSegmentation",
    "SamClipForObjectDetection",
    "SamClipModel",
    "SamClipObjectDetectionOutput",
    "SamClipOutput",
    "SamClipPreTrainedModel",
    "SamClipSegmentationOutput",
    "SamClipVisionModel",
    "SamClipVocabulary",
]
