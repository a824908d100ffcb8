"""
SAM-CLIP's image encoder: SAM's vision transformer, with SAM's weight keys, for images of any height and width.

It is in its own file because it does not depend on other parts of SAM-CLIP.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from transformers import AttentionInterface, GradientCheckpointingLayer, PreTrainedModel, SamVisionConfig
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_outputs import ModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .transformers_internals_samclip import capture_outputs, flex_attention_forward, sdpa_attention_forward

ALL_ATTENTION_FUNCTIONS = AttentionInterface()  # includes functions that AttentionInterface.register adds
# Implementations that SamClipVisionAttention computes by itself, and transformers' functions of these names.
OWN_IMPLEMENTATIONS = {"eager": None, "sdpa": sdpa_attention_forward, "flex_attention": flex_attention_forward}
# Added to the attention scores of padding. It is finite, so that windows without content have a softmax, and fits in
# float16.
PADDING_BIAS = -1e4
BIAS_CHUNK = 2**21  # values of the attention bias that a thread stores at a time: 8 MB in float32


@dataclass
class SamClipVisionEncoderOutput(ModelOutput):
    r"""
    last_hidden_state (`torch.Tensor` of shape `(batch_size, output_channels, grid_height, grid_width)`):
        Image embeddings for SAM's mask decoder: the output of the neck.
    patch_tokens (`torch.Tensor` of shape `(batch_size, grid_height, grid_width, hidden_size)`):
        Output of the last layer, before the neck: the input of the CLIP head.
    hidden_states (`tuple[torch.Tensor]`, each of shape `(batch_size, grid_height, grid_width, hidden_size)`):
        With `output_hidden_states=True`: the input of the first layer and the output of every layer.
    attentions (`tuple[torch.Tensor]`, each of shape `(batch_size * num_windows * num_heads, length, length)`):
        With `output_attentions=True` and eager attention: the attention weights of every layer.
    """

    last_hidden_state: torch.Tensor | None = None
    patch_tokens: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class SamClipPatchGroups:
    r"""
    Patches of segments. Each patch attends only to patches of its segment.

    rows, columns (`torch.Tensor` of shape `(num_patches,)`, `int64`):
        Position of each patch in its grid.
    grid_size (`tuple[int, int]`):
        Height and width of the grid, in patches.
    counts (`list[int]`, *optional*):
        Number of patches of each segment, in the order of the patches. By default there is one segment.
    mask (`torch.Tensor` of shape `(num_patches, num_patches)`, `bool`, *optional*):
        For a single segment: `True` where a patch may attend to another. For export, which cannot loop over segments.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    grid_size: tuple[int, int]
    counts: list[int] | None = None
    mask: torch.Tensor | None = None


class SamClipPatchEmbeddings(nn.Module):
    """Images -> patch tokens: one convolution."""

    def __init__(self, config: SamVisionConfig):
        super().__init__()
        self.patch_size = config.patch_size
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, config.patch_size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(batch_size, num_channels, height, width)` -> `(batch_size, grid_height, grid_width, hidden_size)`. Raises
        `ValueError` if the shape does not fit."""
        if pixel_values.ndim != 4:
            raise ValueError(
                f"pixel_values must be (batch_size, num_channels, height, width), got {tuple(pixel_values.shape)}."
            )
        _, channels, height, width = pixel_values.shape
        if channels != self.projection.in_channels:
            raise ValueError(f"pixel_values have {channels} channels, the model takes {self.projection.in_channels}.")
        if height % self.patch_size or width % self.patch_size or 0 in (height, width):
            raise ValueError(
                f"pixel_values are {height} x {width}; height and width must be positive multiples of the patch size, "
                f"{self.patch_size}."
            )
        return self.projection(pixel_values.to(self.projection.weight.dtype)).permute(0, 2, 3, 1)


class SamClipVisionAttention(nn.Module):
    """
    SAM's attention with relative positions, without the `(length, length)` bias tensor.

    SAM's bias between the patches at `(i, j)` and `(k, l)` is the sum of a row term for `(i, k)` and a column term for
    `(j, l)`. Only these terms are stored. They are added to the attention scores in one of three ways, all of which
    equal SAM's up to rounding:

    - `"sdpa"` for inference on a CPU: the bias is computed for a few queries at a time, so that it fits in the cache.
    - `"sdpa"` otherwise, `"eager"`, and any function added by `AttentionInterface.register`, even under the name of a
      built-in one: the terms are part of the dot product. They are appended to the queries, and one-hot rows and
      columns to the keys. Values are padded to the same width, which fused kernels require. The function is called
      without a mask and with a `scaling` of 1.
    - `"flex_attention"`: the kernel adds the terms (`score_mod`).

    In layers with windows, SAM pads windows with zeros before the projection to queries, keys and values. This module
    projects only the patches of the image; the padding is filled with the projection of zero, which is its bias.

    Args:
        config ([`SamVisionConfig`]): Sizes.
        window_size (`int`): Side of the windows in patches; 0 is global attention.
        attention_config ([`PreTrainedConfig`], *optional*): Configuration with the attention implementation; by
            default `config`.
    """

    is_causal = False  # read by some attention functions

    def __init__(self, config: SamVisionConfig, window_size: int, attention_config=None):
        super().__init__()
        self.config = config if attention_config is None else attention_config
        self.window_size = window_size
        self.num_attention_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scale = self.head_dim**-0.5
        self.dropout = config.attention_dropout
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.use_rel_pos = config.use_rel_pos
        if self.use_rel_pos:
            side = window_size or config.image_size // config.patch_size
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, self.head_dim))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, self.head_dim))

    def forward(
        self,
        hidden_states: torch.Tensor,
        groups: SamClipPatchGroups | None = None,
        content_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        r"""
        hidden_states (`torch.Tensor` of shape `(batch_size, height, width, hidden_size)`):
            Patch tokens; with `groups`, `(num_patches, hidden_size)`.
        groups ([`SamClipPatchGroups`], *optional*):
            Segments; a patch attends to the patches of its segment.
        content_mask (`torch.Tensor` of shape `(batch_size, height, width)`, `bool`, *optional*):
            `False` for padding on the right and at the bottom, to which no patch attends.

        Returns a tensor of the shape of `hidden_states`, and the attention weights `(batch_size * num_windows *
        num_heads, length, length)` if the attention function returns them, as `"eager"` does.
        """
        if groups is not None:
            return self.proj(self._attend_in_groups(self.qkv(hidden_states), groups)), None
        qkv = self.qkv(hidden_states)
        padding_bias = None
        if content_mask is not None:  # padding is whole rows and whole columns, like the terms of the positions
            rows, columns = (content_mask.any(dim=dim) for dim in (2, 1))
            padding_bias = rows.logical_not() * PADDING_BIAS, columns.logical_not() * PADDING_BIAS
        if self.window_size == 0:
            attended, weights = self._attend_on_grid(qkv, padding_bias)
        else:
            _, height, width, _ = qkv.shape
            padding = self.qkv(hidden_states.new_zeros(1, 1, 1, hidden_states.shape[-1]))
            windows, num_windows = _split_into_windows(qkv, self.window_size, padding)
            if padding_bias is not None:
                padding_bias = self._split_padding_bias(*padding_bias, num_windows)
            attended, weights = self._attend_on_grid(windows, padding_bias)
            # Indices instead of a slice: a slice that removes nothing is not a copy, so torch.compile would
            # specialize.
            rows, columns = (torch.arange(n, device=attended.device) for n in (height, width))
            attended = _join_windows(attended, num_windows)[:, rows[:, None], columns]
        return self.proj(attended), weights

    def _split_padding_bias(
        self, rows: torch.Tensor, columns: torch.Tensor, num_windows: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The bias of the keys' rows `(batch_size, height)` and columns `(batch_size, width)` -> those of each window
        `(batch_size * num_windows, window_size)`."""
        sides = [count * self.window_size for count in num_windows]
        rows, columns = (
            F.pad(bias, (0, side - bias.shape[1])).unflatten(1, (-1, self.window_size))
            for bias, side in zip((rows, columns), sides, strict=True)
        )
        shape = (-1, *num_windows, -1)
        return rows[:, :, None].expand(shape).flatten(0, 2), columns[:, None].expand(shape).flatten(0, 2)

    def _registered_function(self) -> Callable | None:
        """The attention function to call, or `None` for the implementations of this module. Raises `KeyError` for an
        unknown implementation."""
        implementation = self.config._attn_implementation or "sdpa"  # None: not part of a model
        function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, None)
        return None if function is OWN_IMPLEMENTATIONS.get(implementation) else function

    def position_tables(self, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Relative position embeddings for a grid: between rows `(height, height, head_dim)` and between columns
        `(width, width, head_dim)`. Zeros in a model without relative positions."""
        if not self.use_rel_pos:
            weight = self.qkv.weight
            return weight.new_zeros(height, height, self.head_dim), weight.new_zeros(width, width, self.head_dim)
        return self.get_rel_pos(height, self.rel_pos_h), self.get_rel_pos(width, self.rel_pos_w)

    def get_rel_pos(self, size: int, rel_pos: torch.Tensor) -> torch.Tensor:
        """
        Relative position embeddings `(size, size, head_dim)` for a side of `size` patches, interpolated linearly from
        `rel_pos` `(2 * trained_size - 1, head_dim)`. Tables of the trained size are interpolated, too, which does not
        change them: a branch would be a special case for torch.compile and torch.export.

        Linear interpolation to fewer rows skips some: of 127 rows, 73 at 224 px and 18 at 448 px. So that training at
        small sizes does not move single rows away from their neighbors, the backward pass is that of interpolation
        with antialiasing, which reaches every row.
        """
        table = rel_pos.T[None].float()
        resized = F.interpolate(table, size=2 * size - 1, mode="linear")
        if torch.is_grad_enabled() and table.requires_grad:
            smoothed = F.interpolate(table[:, :, None], size=(1, 2 * size - 1), mode="bilinear", antialias=True)
            resized = resized.detach() + (smoothed - smoothed.detach()).squeeze(2)
        rel_pos = resized[0].T.to(rel_pos.dtype)
        position = torch.arange(size, device=rel_pos.device)
        return rel_pos[position[:, None] - position[None, :] + size - 1]

    def _split_heads(self, qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`(batch_size, length, 3 * hidden_size)` -> query, key and value `(batch_size, num_heads, length,
        head_dim)`."""
        qkv = qkv.unflatten(-1, (3, self.num_attention_heads, self.head_dim))
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)

    def _attend_on_grid(
        self, qkv: torch.Tensor, padding_bias: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Queries, keys and values `(batch_size, height, width, 3 * hidden_size)` -> `(batch_size, height, width,
        hidden_size)`, and the attention weights or `None`. `padding_bias` `(batch_size, height)` and `(batch_size,
        width)` is added to the scores of the keys in a row and in a column."""
        _, height, width, _ = qkv.shape
        query, key, value = self._split_heads(qkv.flatten(1, 2))
        row_table, column_table = self.position_tables(height, width)
        grid = query.unflatten(2, (height, width))
        row_terms = torch.einsum("bnhwc,hkc->bnhwk", grid, row_table).flatten(2, 3)
        column_terms = torch.einsum("bnhwc,wkc->bnhwk", grid, column_table).flatten(2, 3)
        if padding_bias is not None:
            row_bias, column_bias = (bias[:, None, None].to(query.dtype) for bias in padding_bias)
            row_terms, column_terms = row_terms + row_bias, column_terms + column_bias
        weights = None
        if self.config._attn_implementation == "flex_attention" and self._registered_function() is None:
            if self.dropout and self.training:
                raise ValueError("flex_attention has no dropout: set attention_dropout to 0, or use sdpa.")

            def add_bias(score, batch, head, q, k):
                return score + row_terms[batch, head, q, k // width] + column_terms[batch, head, q, k % width]

            attend = flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention()
            attended = attend(query, key, value, score_mod=add_bias, scale=self.scale)
        else:
            # expand and reshape, because the ONNX exporter translates repeat_interleave with a dynamic count wrongly.
            # Checked on onnxscript 0.7.2. Use repeat_interleave when a later version exports it.
            rows = torch.eye(height, dtype=key.dtype, device=key.device)[:, None].expand(-1, width, -1)
            columns = torch.eye(width, dtype=key.dtype, device=key.device)[None].expand(height, -1, -1)
            positions = torch.cat([rows, columns], dim=-1).reshape(height * width, height + width)

            def form_bias(chunk):
                row_bias, column_bias = terms[chunk].split([height, width], dim=-1)
                return (row_bias[..., :, None] + column_bias[..., None, :]).flatten(3)

            terms = torch.cat([row_terms, column_terms], dim=-1)
            attended, weights = self._attend(query, key, value, terms, positions, form_bias)
        return attended.transpose(1, 2).flatten(2).unflatten(1, (height, width)), weights

    def _attend_in_groups(self, qkv: torch.Tensor, groups: SamClipPatchGroups) -> torch.Tensor:
        """Queries, keys and values `(num_patches, 3 * hidden_size)` -> `(num_patches, hidden_size)`."""
        tables = self.position_tables(*groups.grid_size)
        if groups.counts is None:
            return self._attend_at(qkv, groups.rows, groups.columns, tables, groups.mask)
        parts = (part.split(groups.counts) for part in (qkv, groups.rows, groups.columns))
        return torch.cat(
            [self._attend_at(own, rows, columns, tables) for own, rows, columns in zip(*parts, strict=True)]
        )

    def _attend_at(
        self,
        qkv: torch.Tensor,
        rows: torch.Tensor,
        columns: torch.Tensor,
        tables: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        r"""
        Attention among some patches of a grid.

        qkv (`torch.Tensor` of shape `(length, 3 * hidden_size)`):
            Queries, keys and values, from `self.qkv`.
        rows, columns (`torch.Tensor` of shape `(length,)`, `int64`):
            Positions of the patches.
        tables:
            From `position_tables`.
        mask (`torch.Tensor` of shape `(length, length)`, `bool`, *optional*):
            `True` where a query may attend to a key.

        Returns `(length, hidden_size)`, before `self.proj`.
        """
        query, key, value = self._split_heads(qkv[None])
        terms, positions = [], []
        for table, index in zip(tables, (rows, columns), strict=True):
            table = table.to(query.dtype)
            terms.append(torch.einsum("bnqc,qkc->bnqk", query, table[index]))
            positions.append((index[:, None] == torch.arange(table.shape[0], device=index.device)).to(key.dtype))
        attended, _ = self._attend(query, key, value, torch.cat(terms, -1), torch.cat(positions, -1), mask=mask)
        return attended[0].transpose(0, 1).flatten(1)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        terms: torch.Tensor,
        positions: torch.Tensor,
        form_bias: Callable[[tuple[slice, ...]], torch.Tensor] | None = None,
        mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        r"""
        Attention with the bias `terms @ positions.T`.

        query, key, value (`torch.Tensor` of shape `(batch_size, num_heads, length, head_dim)`):
            The result has this shape too.
        terms (`torch.Tensor` of shape `(batch_size, num_heads, length, height + width)`):
            The bias of each query for every row and for every column of the grid.
        positions (`torch.Tensor` of shape `(length, height + width)`):
            The row and the column of each key, both one-hot.
        form_bias (`Callable`, *optional*):
            A faster computation of the bias: slices of batch, heads and queries -> their bias for all keys.
        mask (`torch.Tensor` of shape `(length, length)`, `bool`, *optional*):
            `True` where a query may attend to a key.

        Returns the result and the attention weights `(batch_size * num_heads, length, length)`, or `None` if the
        attention function does not return them.
        """
        function = self._registered_function()
        is_eager = function is None and self.config._attn_implementation == "eager"
        # All other implementations of this module use sdpa here. flex_attention does so for segments, because it would
        # be compiled for every length of a segment.
        is_sdpa = function is None and not is_eager
        dropout = self.dropout if self.training else 0.0
        is_inference = not (query.requires_grad or torch.compiler.is_compiling())
        if is_sdpa and query.device.type == "cpu" and is_inference and mask is None:
            form_bias = form_bias or (lambda chunk: terms[chunk] @ positions.T)
            return _attend_in_chunks(query, key, value, form_bias, self.scale, dropout), None

        query = torch.cat([query * self.scale, terms], dim=-1)
        key = torch.cat([key, positions.expand(*key.shape[:2], -1, -1)], dim=-1)
        if is_eager:
            scores = (query @ key.transpose(-2, -1)).flatten(0, 1)
            if mask is not None:
                scores = scores.masked_fill(~mask, -torch.inf)
            weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
            attended = F.dropout(weights, p=dropout) @ value.flatten(0, 1)
            return attended.unflatten(0, value.shape[:2]), weights
        value = F.pad(value, (0, key.shape[-1] - self.head_dim))
        if function is None:
            attended = F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=1.0)
            return attended[..., : self.head_dim], None
        attended, weights = function(self, query, key, value, mask, dropout=dropout, scaling=1.0, is_causal=False)
        attended = attended.transpose(1, 2)[..., : self.head_dim]
        return attended, None if weights is None else weights.flatten(0, 1)


@functools.cache
def _compiled_flex_attention():
    """
    Flex attention, compiled for every size: with symbolic sizes, its code for CPUs is wrong or fails to compile.
    Checked on torch 2.14. Delete `dynamic=False` when https://github.com/pytorch/pytorch/issues/147756 is solved and
    the tests of flex attention pass without it.
    """
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
    Attention with at most `BIAS_CHUNK` values of the bias in memory for each thread. A chunk has many queries and few
    heads: the kernel processes blocks of queries, and the keys and values of a chunk stay in the cache.

    query, key, value (`torch.Tensor` of shape `(batch_size, num_heads, length, head_dim)`):
        The result has this shape too.
    form_bias (`Callable`):
        Slices of batch, heads and queries -> their bias for all keys.
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
    """Tokens `(batch_size, height, width, channels)`, padded with `padding` `(1, 1, 1, channels)` to multiples of the
    window -> `(batch_size * num_windows, window_size, window_size, channels)`, and the number of windows in a column
    and in a row."""
    batch_size, height, width, _ = tokens.shape
    # Pads by a whole window and removes the rest: torch.compile would specialize on the number of missing patches.
    right, below = width + -width % window_size, height + -height % window_size
    tokens = torch.cat([tokens, padding.expand(batch_size, height, window_size, -1)], dim=2)[:, :, :right]
    tokens = torch.cat([tokens, padding.expand(batch_size, window_size, right, -1)], dim=1)[:, :below]
    tokens = tokens.unflatten(2, (-1, window_size)).unflatten(1, (-1, window_size)).transpose(2, 3)
    return tokens.flatten(0, 2), (tokens.shape[1], tokens.shape[2])


def _join_windows(windows: torch.Tensor, num_windows: tuple[int, int]) -> torch.Tensor:
    """The reverse of [`_split_into_windows`]: `(batch_size, height, width, channels)`, with the padding."""
    return windows.unflatten(0, (-1, *num_windows)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


class SamClipMLP(nn.Module):
    """The two linear layers after the attention."""

    def __init__(self, config: SamVisionConfig):
        super().__init__()
        self.lin1 = nn.Linear(config.hidden_size, config.mlp_dim)
        self.lin2 = nn.Linear(config.mlp_dim, config.hidden_size)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.lin2(self.act(self.lin1(hidden_states)))


class SamClipVisionLayer(GradientCheckpointingLayer):
    """A transformer layer, of the image encoder and of the CLIP head. Arguments as in [`SamClipVisionAttention`]."""

    def __init__(self, config: SamVisionConfig, window_size: int, attention_config=None):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = SamClipVisionAttention(config, window_size, attention_config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SamClipMLP(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        groups: SamClipPatchGroups | None = None,
        content_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Tokens, segments and padding as in [`SamClipVisionAttention`]."""
        hidden_states = hidden_states + self.attn(self.layer_norm1(hidden_states), groups, content_mask)[0]
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class SamClipChannelsFirstLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of `(batch_size, channels, height, width)`."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return super().forward(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SamClipVisionNeck(nn.Module):
    """Patch tokens -> image embeddings for SAM's mask decoder."""

    def __init__(self, config: SamVisionConfig):
        super().__init__()
        channels = config.output_channels
        self.conv1 = nn.Conv2d(config.hidden_size, channels, kernel_size=1, bias=False)
        self.layer_norm1 = SamClipChannelsFirstLayerNorm(channels, eps=1e-6)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.layer_norm2 = SamClipChannelsFirstLayerNorm(channels, eps=1e-6)

    def forward(self, patch_tokens: torch.Tensor) -> torch.Tensor:
        """`(batch_size, grid_height, grid_width, hidden_size)` -> `(batch_size, output_channels, grid_height,
        grid_width)`."""
        features = self.layer_norm1(self.conv1(patch_tokens.permute(0, 3, 1, 2)))
        return self.layer_norm2(self.conv2(features))


class SamClipVisionPreTrainedModel(PreTrainedModel):
    """Base class of the image encoder and the models that contain it: initialization and attention implementations."""

    base_model_prefix = "samclip"
    main_input_name = "pixel_values"
    input_modalities: tuple[str, ...] = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["SamClipVisionLayer"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _parts_without_model: tuple[str, ...] = ()  # sub-configurations of modules that are not a PreTrainedModel

    @classmethod
    def is_custom_code(cls) -> bool:
        """
        `False`, because `_init_weights` uses only `transformers.initialization`, which does not change loaded weights.
        With `True`, transformers would skip modules without direct weights, so a text tower that is missing in a
        checkpoint would not be initialized as CLIP's. Checked on transformers 5.17.0 and 5.24.0. Delete this method
        when `PreTrainedModel._initialize_weights` does not skip such modules.
        """
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, SamClipVisionAttention) and module.use_rel_pos:
            init.zeros_(module.rel_pos_h)
            init.zeros_(module.rel_pos_w)
        elif isinstance(module, SamClipVisionEncoder) and module.pos_embed is not None:
            init.zeros_(module.pos_embed)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """As in [`PreTrainedModel`]. Raises `ValueError` for an unknown implementation and for paged attention."""
        known = {None, "eager", *ALL_ATTENTION_FUNCTIONS}
        if requested_attention not in known or str(requested_attention).startswith("paged|"):
            reason = "it is unknown" if requested_attention not in known else "it needs a key-value cache"
            raise ValueError(
                f'Specified `attn_implementation="{requested_attention}"` is not supported: {reason}. '
                f'{type(self).__name__} supports "eager", "sdpa", "flex_attention" and functions added by '
                "AttentionInterface.register."
            )
        return super().get_correct_attn_implementation(requested_attention, is_init_check)

    def set_attn_implementation(self, attn_implementation: str | dict | None, *args, **kwargs) -> None:
        """
        As in [`PreTrainedModel`]: takes a name for the whole model, or a `dict` whose keys are names of
        sub-configurations, or "" for the model itself. There are two differences: prompt encoder, mask decoder and
        CLIP head, which are not a [`PreTrainedModel`], cause no warning, and unknown keys raise `ValueError`. `None`
        means the default.
        """
        sub_configs = [name for name in self.config.sub_configs if getattr(self.config, name) is not None]
        if not isinstance(attn_implementation, dict):
            attn_implementation = {"": attn_implementation} | dict.fromkeys(sub_configs, attn_implementation)
        default = self.get_correct_attn_implementation(None)
        requested = {name: default if value is None else value for name, value in attn_implementation.items()}
        if unknown := sorted(requested.keys() - {*sub_configs, ""}):
            raise ValueError(
                f"{type(self).__name__} has no {', '.join(unknown)}. Keys of attn_implementation are "
                f'{", ".join(sub_configs)} and "".'
            )
        parts = {name: requested[name] for name in self._parts_without_model if name in requested}
        for implementation in parts.values():
            self.get_correct_attn_implementation(implementation)  # raises before anything has changed
        for name, implementation in parts.items():
            getattr(self.config, name)._attn_implementation = implementation
        super().set_attn_implementation(requested, *args, **kwargs)


class SamClipVisionEncoder(SamClipVisionPreTrainedModel):
    """SAM's image encoder, with SAM's weight keys, for images of any height and width."""

    config: SamVisionConfig
    _can_record_outputs = {"hidden_states": SamClipVisionLayer, "attentions": SamClipVisionAttention}

    def __init__(self, config: SamVisionConfig):
        super().__init__(config)
        self.patch_embed = SamClipPatchEmbeddings(config)
        self.pos_embed = None
        if config.use_abs_pos:
            side = config.image_size // config.patch_size
            self.pos_embed = nn.Parameter(torch.zeros(1, side, side, config.hidden_size))
        self.layers = nn.ModuleList(
            SamClipVisionLayer(config, 0 if index in config.global_attn_indexes else config.window_size)
            for index in range(config.num_hidden_layers)
        )
        self.neck: nn.Module = SamClipVisionNeck(config)
        self.gradient_checkpointing = False
        self.post_init()

    def interpolate_pos_embed(self, grid_height: int, grid_width: int) -> torch.Tensor:
        """The position embeddings `(1, grid_height, grid_width, hidden_size)`, resized bicubically. Those of the
        trained size are resized, too, which does not change them: a branch would be a special case for torch.compile
        and torch.export."""
        assert self.pos_embed is not None
        table = self.pos_embed.permute(0, 3, 1, 2).float()
        table = F.interpolate(table, size=(grid_height, grid_width), mode="bicubic", align_corners=False)
        return table.permute(0, 2, 3, 1).to(self.pos_embed.dtype)

    def get_input_embeddings(self) -> nn.Module:
        """The convolution over the pixels."""
        return self.patch_embed.projection

    def encode(self, pixel_values: torch.Tensor | None) -> torch.Tensor:
        """`(batch_size, num_channels, height, width)` -> output of the last layer `(batch_size, grid_height,
        grid_width, hidden_size)`, before the neck. It does not capture hidden states or attentions, so that a model
        that calls it captures those of these layers together with its own."""
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values.")
        hidden_states = self.patch_embed(pixel_values)
        if self.pos_embed is not None:
            hidden_states = hidden_states + self.interpolate_pos_embed(*hidden_states.shape[1:3])
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states

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


__all__ = ["SamClipVisionEncoder", "SamClipVisionEncoderOutput", "SamClipVisionPreTrainedModel"]
