"""
The parts of a SAM-CLIP that are exported, as modules with tensors as inputs and outputs.

`create_parts` returns one `Part` for each file of an export. A part contains its module, the names and dynamic axes of
its inputs and outputs, and a function that creates example inputs of any size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.export import Dim

from ..images import convert_to_rgb, normalize
from ..modeling_samclip import SamClipModel
from ..vision_encoder_samclip import SamClipPatchGroups

PART_NAMES = ("image_encoder", "mask_decoder", "segment_encoder", "text_encoder")

# Upper limits of the dynamic axes.
MAX_IMAGES = 1024
MAX_PATCHES = 512  # per side: 8192 px with patches of 16 px
MAX_PROMPTS = 65536  # prompts per image, points per prompt, and texts

NO_POINT = -1  # label of a point that is not used, as in SamPromptEncoder
EXAMPLE_TEXTS = ("a", "a red shape", "something else that is longer")


@dataclass
class Part:
    r"""
    One part of the model, exported to one file.

    Args:
        name (`str`):
            Name of the part and of its file.
        module (`nn.Module`):
            Module with tensors as inputs and outputs.
        inputs, outputs (`dict[str, dict[int, Dim]]`):
            Names of the inputs and outputs, each with its dynamic axes.
        make_inputs (`Callable`):
            Creates example inputs. Its arguments are the number of images, the rows and columns of patches, and the
            number of texts or prompts.
        window_size (`int`, *optional*, defaults to 0):
            Side of the attention windows, in patches; 0 if the part has no windows.
    """

    name: str
    module: nn.Module
    inputs: dict[str, dict[int, Any]]
    outputs: dict[str, dict[int, Any]]
    make_inputs: Callable[[int, int, int, int], tuple[Tensor, ...]]
    window_size: int = 0


class ImageEncoder(nn.Module):
    """Image encoder and CLIP head, or both encoders of an unmerged model."""

    def __init__(self, model: SamClipModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, reshaped_input_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """
        Takes the inputs of [`SamClipModel.forward`] and returns its outputs `image_embeddings`, `image_embeds` and
        `dense_embeds`. The fourth output, for the segment encoder, is `patch_tokens` `(batch_size, grid_height,
        grid_width, hidden_size)`. In an unmerged model, they are on the grid of CLIP's vision tower.
        """
        outputs = self.model.get_vision_embeds(pixel_values, reshaped_input_sizes)
        assert outputs.patch_tokens is not None and outputs.last_hidden_state is not None
        head_tokens, pooled = self.model._pool_image(outputs.patch_tokens, reshaped_input_sizes)
        dense_embeds = self.model._dense_embeds(head_tokens, outputs.last_hidden_state, reshaped_input_sizes)
        return outputs.last_hidden_state, F.normalize(pooled, dim=-1), dense_embeds, outputs.patch_tokens


class TextEncoder(nn.Module):
    """CLIP's text tower and text projection."""

    def __init__(self, model: SamClipModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Returns normalized `text_embeds` `(num_texts, projection_dim)` of tokens `(num_texts, sequence_length)`."""
        return F.normalize(self.model.get_text_features(input_ids, attention_mask).pooler_output, dim=-1)


class SiglipTextEncoder(TextEncoder):
    """SigLIP's text tower. It takes texts padded to the maximum length, and no attention mask."""

    def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
        """Pads tokens `(num_texts, sequence_length)` and returns `text_embeds` as [`TextEncoder`] does."""
        config = self.model.config.text_config
        padding = torch.full((1, config.max_position_embeddings), config.pad_token_id)
        # The maximum length is appended and the rest removed, because a branch would make sequence_length static.
        input_ids = torch.cat([input_ids, padding.expand(input_ids.shape[0], -1)], dim=1)
        input_ids = input_ids[:, : config.max_position_embeddings]
        return F.normalize(self.model.get_text_features(input_ids).pooler_output, dim=-1)


class MaskDecoder(nn.Module):
    """Prompt encoder and mask decoder. A box is a pair of points, as in the ONNX export of segment-anything."""

    def __init__(self, model: SamClipModel):
        super().__init__()
        self.model = model

    def forward(self, image_embeddings: Tensor, input_points: Tensor, input_labels: Tensor) -> tuple[Tensor, Tensor]:
        r"""
        Args:
            image_embeddings (`torch.Tensor` of shape `(batch_size, output_channels, grid_height, grid_width)`):
                Output of the [`ImageEncoder`].
            input_points (`torch.Tensor` of shape `(batch_size, num_prompts, num_points, 2)`):
                x and y in pixels of `pixel_values`.
            input_labels (`torch.Tensor` of shape `(batch_size, num_prompts, num_points)`, `int64`):
                1 for a point inside the object, 0 for a point outside, 2 and 3 for the upper left and lower right
                corner of a box, -1 for no point. The last point of a prompt without a box must have the label -1.

        Returns:
            `tuple(torch.Tensor)`: `pred_masks` `(batch_size, num_prompts, 4, 4 * grid_height, 4 * grid_width)` and
            `iou_scores` `(batch_size, num_prompts, 4)`. The first mask is the one of `multimask_output=False`, the
            others are those of `multimask_output=True` (three by default, see `num_multimask_outputs`).
        """
        model, encoder = self.model, self.model.prompt_encoder
        batch_size, num_prompts = input_points.shape[:2]
        grid_height, grid_width = image_embeddings.shape[2:]
        image_size = torch.tensor([grid_width, grid_height]) * model.config.vision_config.patch_size
        positions = encoder.shared_embedding((input_points + 0.5) / image_size)
        labels = torch.cat([embedding.weight for embedding in (encoder.not_a_point_embed, *encoder.point_embed)])
        has_position = (input_labels != NO_POINT)[..., None]
        sparse_embeddings = positions * has_position + labels[input_labels - NO_POINT]
        no_mask = encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
        grid_positions = model.get_image_wide_positional_embeddings((grid_height, grid_width))
        # Each prompt is decoded as a separate image. For several prompts per image, SAM's mask decoder calls
        # repeat_interleave, which the ONNX exporter translates wrongly if the number of repeats is dynamic. Checked on
        # onnxscript 0.7.2. Decode all prompts of an image at once when a later version exports it.
        image_embeddings = image_embeddings[:, None].expand(-1, num_prompts, -1, -1, -1).flatten(0, 1)
        sparse_embeddings = sparse_embeddings.flatten(0, 1)[:, None]
        # SAM's mask decoder returns one mask or the other masks, so it runs twice. Both runs compute all masks:
        # eliminating common subexpressions merges them into one when the graph is written.
        masks, iou_scores = zip(
            *(
                model.mask_decoder(
                    image_embeddings=image_embeddings,
                    image_positional_embeddings=grid_positions.expand(batch_size * num_prompts, -1, -1, -1),
                    sparse_prompt_embeddings=sparse_embeddings,
                    dense_prompt_embeddings=no_mask.expand(batch_size * num_prompts, -1, grid_height, grid_width),
                    multimask_output=multimask_output,
                )
                for multimask_output in (False, True)
            ),
            strict=True,
        )
        pred_masks, scores = (
            torch.cat(outputs, dim=2).unflatten(0, (batch_size, num_prompts)).squeeze(2)
            for outputs in (masks, iou_scores)
        )
        return pred_masks, scores


class SegmentEncoder(nn.Module):
    """
    The CLIP head on the patches of one segment, see [`SamClipHead.pool_segments`]. That function splits the patches of
    all segments into groups of different lengths, which cannot be exported. Here, a mask separates the windows.
    """

    def __init__(self, model: SamClipModel):
        super().__init__()
        self.head = model.clip_head

    def forward(self, patch_tokens: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        r"""
        Args:
            patch_tokens (`torch.Tensor` of shape `(1, grid_height, grid_width, hidden_size)`):
                Output of the [`ImageEncoder`] for one image.
            rows, columns (`torch.Tensor` of shape `(num_patches,)`, `int64`):
                Positions of the segment's patches in the grid.

        Returns:
            `torch.Tensor`: normalized `segment_embeds` `(1, projection_dim)`.
        """
        head = self.head
        height, width = patch_tokens.shape[1:3]
        tokens, same_window = patch_tokens[0, rows, columns], None
        if head.window_size:
            height = width = head.window_size
            window = torch.stack([rows // height, columns // width])
            same_window = (window[:, :, None] == window[:, None, :]).all(dim=0)
            rows, columns = rows % height, columns % width
        groups = SamClipPatchGroups(rows, columns, (height, width), mask=same_window)
        for layer in head.layers:
            tokens = layer(tokens, groups)
        return F.normalize(head.pool(tokens[None, None]), dim=-1)


class TowerSegmentEncoder(nn.Module):
    """CLIP's vision tower on the patches of one segment, as if they were all patches of the image, see
    [`SamClipTower.pool_segments`]."""

    def __init__(self, model: SamClipModel):
        super().__init__()
        self.tower = model.clip_head

    def forward(self, patch_tokens: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Arguments and result are those of [`SegmentEncoder`], on the grid of the tower."""
        segment = patch_tokens[0, rows, columns]
        return F.normalize(self.tower.pool(self.tower(segment[None, :, None])), dim=-1)


def create_parts(model: SamClipModel, processor, images: Sequence[Image.Image] | None = None) -> dict[str, Part]:
    r"""
    Returns the parts of a model, by name.

    Args:
        model ([`SamClipModel`]):
            Model in float32, in evaluation mode, with `attn_implementation="sdpa"`.
        processor ([`SamClipProcessor`]):
            Processor of the model.
        images (`Sequence[PIL.Image.Image]`, *optional*):
            Images for example inputs. Random pixels by default.
    """
    config = model.config
    merged = config.merged
    num_images, num_texts, num_tokens, num_prompts, num_points, num_patches = (
        Dim(name, min=1, max=largest)
        for name, largest in {
            "images": MAX_IMAGES,
            "texts": MAX_PROMPTS,
            "tokens": config.text_config.max_position_embeddings,
            "prompts": MAX_PROMPTS,
            "points": MAX_PROMPTS,
            "patches": MAX_PATCHES**2 if merged else model.clip_head.grid_size**2,
        }.items()
    )
    rows, columns = (Dim(name, min=2, max=MAX_PATCHES) for name in ("rows", "columns"))
    patch_size, grid = config.vision_config.patch_size, {0: num_images, 2: rows, 3: columns}
    example = ExampleInputs(model, processor, images)
    parts = [
        Part(
            "image_encoder",
            ImageEncoder(model),
            {
                "pixel_values": {0: num_images, 2: patch_size * rows, 3: patch_size * columns},
                "reshaped_input_sizes": {0: num_images},
            },
            {
                "image_embeddings": grid,
                "image_embeds": {0: num_images},
                "dense_embeds": grid,
                "patch_tokens": {0: num_images, 1: rows, 2: columns} if merged else {0: num_images},
            },
            example.image_encoder,
            config.vision_config.window_size,
        ),
        Part(
            "mask_decoder",
            MaskDecoder(model),
            {
                "image_embeddings": grid,
                "input_points": {0: num_images, 1: num_prompts, 2: num_points},
                "input_labels": {0: num_images, 1: num_prompts, 2: num_points},
            },
            {
                "pred_masks": {0: num_images, 1: num_prompts, 3: 4 * rows, 4: 4 * columns},
                "iou_scores": {0: num_images, 1: num_prompts},
            },
            example.mask_decoder,
        ),
        Part(
            "segment_encoder",
            SegmentEncoder(model) if merged else TowerSegmentEncoder(model),
            {
                "patch_tokens": {1: rows, 2: columns} if merged else {},
                "rows": {0: num_patches},
                "columns": {0: num_patches},
            },
            {"segment_embeds": {}},
            example.segment_encoder,
            model.clip_head.window_size if merged else 0,
        ),
    ]
    if model.text_model is not None:
        axes = {0: num_texts, 1: num_tokens}
        is_siglip = config.has_siglip_text
        parts.append(
            Part(
                "text_encoder",
                SiglipTextEncoder(model) if is_siglip else TextEncoder(model),
                {"input_ids": axes} if is_siglip else {"input_ids": axes, "attention_mask": axes},
                {"text_embeds": {0: num_texts}},
                example.text_encoder,
            )
        )
    return {part.name: part for part in parts}


class ExampleInputs:
    r"""
    Creates example inputs for the parts of a model. The arguments of every method are the number of images, the rows
    and columns of patches, and the number of texts or prompts.

    Args:
        model, processor, images:
            As in [`create_parts`].
    """

    def __init__(self, model: SamClipModel, processor, images: Sequence[Image.Image] | None = None):
        self.model = model
        self.processor = processor
        self.images = images

    def image_encoder(self, num_images: int, rows: int, columns: int, _: int) -> tuple[Tensor, Tensor]:
        """Returns `pixel_values`, with padding below the first image, and `reshaped_input_sizes`."""
        patch_size = self.model.config.vision_config.patch_size
        height, width = rows * patch_size, columns * patch_size
        if self.images:
            resized = [
                np.asarray(convert_to_rgb(self.images[index % len(self.images)]).resize((width, height)))
                for index in range(num_images)
            ]
            pixels = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)
        else:
            generator = torch.Generator().manual_seed(0)
            pixels = torch.randint(0, 256, (num_images, 3, height, width), generator=generator)
        sizes = torch.tensor([[height, width]] * num_images)
        sizes[0, 0] = max(1, height - patch_size - 1)
        image_processor = self.processor.image_processor
        return normalize(pixels, image_processor.image_mean, image_processor.image_std, sizes), sizes

    def mask_decoder(self, num_images: int, rows: int, columns: int, num_prompts: int) -> tuple[Tensor, ...]:
        """Returns `image_embeddings`, `input_points` and `input_labels`, with points of all labels."""
        patch_size = self.model.config.vision_config.patch_size
        generator = torch.Generator().manual_seed(0)
        points = torch.rand(num_images, num_prompts, num_prompts + 1, 2, generator=generator)
        points = points * torch.tensor([columns, rows]) * patch_size
        labels = torch.randint(NO_POINT, 4, points.shape[:-1], generator=generator)
        return self._encode(num_images, rows, columns).last_hidden_state, points, labels

    def segment_encoder(self, _: int, rows: int, columns: int, num_diagonals: int) -> tuple[Tensor, ...]:
        """Returns `patch_tokens` of one image, and rows and columns of the patches on and above a diagonal."""
        patch_tokens = self._encode(1, rows, columns).patch_tokens
        segment = torch.ones(patch_tokens.shape[1:3]).triu(1 - num_diagonals)
        return patch_tokens, *segment.nonzero().unbind(1)

    def text_encoder(self, _: int, rows: int, columns: int, num_texts: int) -> tuple[Tensor, ...]:
        """Returns `input_ids` and, for CLIP's text tower, `attention_mask`."""
        inputs = self.processor.tokenizer(
            [EXAMPLE_TEXTS[index % len(EXAMPLE_TEXTS)] for index in range(num_texts)],
            padding=True,
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_attention_mask=True,
            return_tensors="pt",
        )
        if self.model.config.has_siglip_text:
            return (inputs["input_ids"],)
        return inputs["input_ids"], inputs["attention_mask"]

    @torch.no_grad()
    def _encode(self, num_images: int, rows: int, columns: int):
        return self.model.get_vision_embeds(*self.image_encoder(num_images, rows, columns, 0))
