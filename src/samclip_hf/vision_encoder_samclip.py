"""
SAM-CLIP's image encoder: SAM's vision transformer, with SAM's weight keys, for images of any height and width.

It has its own file because it depends on nothing else of SAM-CLIP: it can be read, tested and exported alone.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from transformers.models.sam.modeling_sam import (
    SamMLPBlock,
    SamPatchEmbeddings,
    SamVisionAttention,
    SamVisionEncoder,
    SamVisionEncoderOutput,
    SamVisionLayer,
    SamVisionNeck,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

BIAS_CHUNK = 2**21  # values of an attention bias that one thread holds at a time: 8 MB in float32


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


__all__ = ["SamClipVisionEncoder", "SamClipVisionEncoderOutput"]
