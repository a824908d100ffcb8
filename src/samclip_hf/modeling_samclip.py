"""
SAM-CLIP: one image encoder with SAM's mask decoder and a CLIP head (Wang et al., arXiv 2310.15308).

The image encoder is SAM's, for any input size. The CLIP head takes its patch tokens, before SAM's neck, and maps them
to the text space. The text tower, its projection and the logit scale are CLIP's or SigLIP's.
"""

import contextlib
import inspect
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import metadata_load, try_to_load_from_cache
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoTokenizer,
    BackboneMixin,
    BaseImageProcessor,
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
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling, ModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging

from .clip_tower_samclip import SamClipTower, to_image_grid
from .configuration_samclip import SamClipConfig, SamClipHeadConfig, SamClipVisionConfig
from .transformers_internals_samclip import (
    OutputRecorder,
    SamMaskDecoder,
    SamPromptEncoder,
    SamTwoWayAttentionBlock,
    capture_outputs,
)
from .vision_encoder_samclip import (
    SamClipPatchGroups,
    SamClipVisionAttention,
    SamClipVisionEncoder,
    SamClipVisionEncoderOutput,
    SamClipVisionLayer,
    SamClipVisionPreTrainedModel,
)

logger = logging.get_logger(__name__)

HALF_PRECISION = (torch.float16, torch.bfloat16)
EMPTY_MASK = -1000.0  # mask logits of padding prompts: below every threshold
_HUB_CACHE_FOLDER = re.compile(r"models--([^/\\]+)[/\\]snapshots[/\\]([0-9a-f]{40})(?=[/\\]|$)")
_SHIPPED_WEIGHTS = os.path.join(os.path.dirname(os.path.realpath(__file__)), "miniature", "weights")


class _InputName(str):
    """
    The name of a parameter that is an input, although it contains "label".

    transformers' `Trainer` treats every parameter of `forward` with "label" in its name as a label (`find_labels`). If
    a label is missing in a batch, an evaluation has no `eval_loss`. Checked on transformers 5.24.0. Delete this class
    when `find_labels` ignores `input_labels`.
    """

    def __contains__(self, part: str) -> bool:  # type: ignore[override]
        return part != "label" and super().__contains__(part)


def refuse_labels(kwargs: Any) -> None:
    """Removes `labels` and `return_loss` from the keyword arguments of a model without a loss. Raises `ValueError` if
    they request a loss."""
    for name in ("labels", "mask_labels", "class_labels", "return_loss"):
        if (value := kwargs.pop(name, None)) is not None and value is not False:
            raise ValueError(
                f"This call does not accept {name}, because it has no such loss. SamClipTrainer trains SamClipModel "
                "by distillation; a SamClipModel returns CLIP's or SigLIP's loss for texts with return_loss=True; a "
                "SamClipForImageSegmentation without prompts returns a loss for labels."
            )


@dataclass
class SamClipOutput(ModelOutput):
    r"""
    The inputs determine which fields are set: prompts give masks; texts give similarities; texts, or an image without
    prompts, give the CLIP head's embeddings. Other fields are `None`.

    iou_scores (`torch.Tensor` of shape `(batch_size, num_prompts, num_masks)`):
        The IoU that the mask decoder predicts for each mask.
    pred_masks (`torch.Tensor` of shape `(batch_size, num_prompts, num_masks, 4 * grid_height, 4 * grid_width)`):
        Mask logits: above 0, a pixel is inside the mask. `num_masks` is 3 with `multimask_output`, else 1.
    vision_hidden_states, vision_attentions, mask_decoder_attentions (`tuple[torch.Tensor]`):
        As in [`SamModel`], with `output_hidden_states=True` or `output_attentions=True`.
    loss (`torch.Tensor` of shape `()`):
        With `return_loss=True`: CLIP's contrastive loss, or SigLIP's.
    logits_per_image (`torch.Tensor` of shape `(batch_size, num_texts)`):
        Scaled cosine similarities. With SigLIP's text tower, they include its bias, so that their sigmoid is SigLIP's
        probability of each text.
    logits_per_text (`torch.Tensor` of shape `(num_texts, batch_size)`):
        `logits_per_image`, transposed.
    text_embeds (`torch.Tensor` of shape `(num_texts, projection_dim)`):
        Embeddings of the texts, of length 1.
    image_embeds (`torch.Tensor` of shape `(batch_size, projection_dim)`):
        Embeddings of the images in the text space, of length 1.
    dense_embeds (`torch.Tensor` of shape `(batch_size, projection_dim, grid_height, grid_width)`):
        Embeddings of the patches in the text space, of length 1.
    segment_embeds (`torch.Tensor` of shape `(batch_size, num_segments, projection_dim)`):
        With `segments`: their embeddings in the text space, of length 1. Undefined for segments without patches.
    image_embeddings (`torch.Tensor` of shape `(batch_size, output_channels, grid_height, grid_width)`):
        Input of the mask decoder. Pass it as `image_embeddings` to prompt the same image again.
    """

    iou_scores: torch.Tensor | None = None
    pred_masks: torch.Tensor | None = None
    vision_hidden_states: tuple[torch.Tensor, ...] | None = None
    vision_attentions: tuple[torch.Tensor, ...] | None = None
    mask_decoder_attentions: tuple[torch.Tensor, ...] | None = None
    loss: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    dense_embeds: torch.Tensor | None = None
    segment_embeds: torch.Tensor | None = None
    image_embeddings: torch.Tensor | None = None


@dataclass
class SamClipVisionModelOutput(BaseModelOutputWithPooling):
    r"""
    last_hidden_state (`torch.Tensor` of shape `(batch_size, grid_height * grid_width, hidden_size)`):
        Output of the CLIP head's last layer.
    pooler_output (`torch.Tensor` of shape `(batch_size, hidden_size)`):
        The pooled token after LayerNorm, before the MLP to the text space.
    image_embeds (`torch.Tensor` of shape `(batch_size, projection_dim)`):
        Embeddings of the images in the text space, not normalized.
    hidden_states (`tuple[torch.Tensor]`, `config.num_hidden_layers + 1` of the shape of `last_hidden_state`):
        With `output_hidden_states=True`.
    attentions (`tuple[torch.Tensor]`, one for each layer, of the shape of SAM's):
        With `output_attentions=True` and eager attention.
    """

    image_embeds: torch.Tensor | None = None


class SamClipPositionalEmbedding(nn.Module):
    """SAM's random Fourier features of positions. They are computed in float32 even in a half-precision model, because
    bfloat16 rounds coordinates above 512 px to multiples of 4 px."""

    def __init__(self, config):
        super().__init__()
        self.scale = config.scale
        self.positional_embedding = nn.Parameter(self.scale * torch.randn(2, config.num_pos_feats))

    def forward(self, input_coords: torch.Tensor, input_shape: tuple[int, int] | None = None) -> torch.Tensor:
        """x and y `(..., 2)`, from 0 to 1 or in pixels of an image of `input_shape` (height, width) -> `(...,
        2 * num_pos_feats)`."""
        x, y = input_coords.float().unbind(dim=-1)
        if input_shape is not None:
            x, y = x / input_shape[1], y / input_shape[0]
        frequency = self.positional_embedding.float()
        # A sum, not a matrix product, which autocast would round.
        turns = (2 * x - 1)[..., None] * frequency[0] + (2 * y - 1)[..., None] * frequency[1]
        phase = 2 * torch.pi * turns
        return torch.cat([phase.sin(), phase.cos()], dim=-1).to(self.positional_embedding.dtype)


class SamClipPreTrainedModel(SamClipVisionPreTrainedModel):
    """Base class of [`SamClipModel`] and [`SamClipVisionModel`]."""

    config: SamClipConfig
    input_modalities: tuple[str, ...] = ("image", "text")

    def _set_default_attention(self, name: str) -> None:
        """Sets the model's attention implementation in a sub-configuration whose module is not a [`PreTrainedModel`],
        unless the sub-configuration has its own."""
        config = getattr(self.config, name)
        if config._attn_implementation is None:
            config._attn_implementation = self.config._attn_implementation

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, SamClipPositionalEmbedding):
            init.normal_(module.positional_embedding, std=module.scale)
        elif isinstance(module, SamClipModel):
            if module.text_projection is not None:
                init.normal_(module.text_projection.weight, std=self.config.text_config.hidden_size**-0.5)
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)
            if module.logit_bias is not None:
                init.zeros_(module.logit_bias)
            for embeds in (module.class_embeds, module.label_embeds, module.neutral_embeds):
                if embeds is not None:
                    init.zeros_(embeds)

    def _content_sizes(self, patch_tokens: torch.Tensor, reshaped_input_sizes) -> torch.Tensor:
        """Height and width of the images without their padding `(batch_size, 2)`, in patches of `patch_tokens`
        `(batch_size, grid_height, grid_width, hidden_size)`."""
        if reshaped_input_sizes is None:
            grid = torch.tensor(patch_tokens.shape[1:3], dtype=torch.float32, device=patch_tokens.device)
            return grid.expand(patch_tokens.shape[0], 2)
        sizes = torch.as_tensor(reshaped_input_sizes, device=patch_tokens.device)
        if sizes.shape != (patch_tokens.shape[0], 2):
            raise ValueError(
                f"reshaped_input_sizes must be a height and a width for each of {patch_tokens.shape[0]} images, got "
                f"shape {tuple(sizes.shape)}."
            )
        return sizes / self.config.vision_config.patch_size

    def _content_mask(self, patch_tokens: torch.Tensor, reshaped_input_sizes) -> torch.Tensor | None:
        """`(batch_size, grid_height, grid_width)`: `True` for patches that show a part of the image, `False` for
        padding."""
        if reshaped_input_sizes is None:
            return None
        patches = self._content_sizes(patch_tokens, reshaped_input_sizes)
        rows, columns = (torch.arange(n, device=patches.device) for n in patch_tokens.shape[1:3])
        return (rows < patches[:, :1])[:, :, None] & (columns < patches[:, 1:])[:, None, :]

    def _head_tokens(self, patch_tokens: torch.Tensor, reshaped_input_sizes) -> torch.Tensor:
        """The CLIP head's tokens, of the shape of `patch_tokens`. No patch attends to padding."""
        if isinstance(self.clip_head, SamClipTower):  # its input has no padding
            return self.clip_head(patch_tokens)
        return self.clip_head(patch_tokens, self._content_mask(patch_tokens, reshaped_input_sizes))

    def _pool_image(self, patch_tokens: torch.Tensor, reshaped_input_sizes) -> tuple[torch.Tensor, torch.Tensor]:
        """The CLIP head's tokens `(batch_size, grid_height, grid_width, hidden_size)`, and the image in the text space
        `(batch_size, projection_dim)`, not normalized. Padding is not pooled."""
        head_tokens = self._head_tokens(patch_tokens, reshaped_input_sizes)
        if isinstance(self.clip_head, SamClipTower):  # its input has no padding
            return head_tokens, self.clip_head.pool(head_tokens)
        return head_tokens, self.clip_head.pool(head_tokens, self._content_mask(head_tokens, reshaped_input_sizes))


class SamClipHeadMLP(nn.Module):
    """An MLP with two hidden layers: `(..., input_size)` -> `(..., output_size)`."""

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
    The CLIP head: patch tokens -> transformer layers -> pooling -> LayerNorm -> MLP -> text space. `project_patches`
    maps every patch to the text space, without pooling.
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
            SamClipVisionLayer(vision_config, window_size, head_config) for _ in range(head_config.num_hidden_layers)
        )
        self.layer_norm = nn.LayerNorm(hidden_size, eps=vision_config.layer_norm_eps)
        self.mlp = SamClipHeadMLP(
            hidden_size, mlp_hidden_size, head_config.projection_dim, ACT2FN[vision_config.hidden_act]
        )

    def forward(self, patch_tokens: torch.Tensor, content_mask: torch.Tensor | None = None) -> torch.Tensor:
        r"""
        patch_tokens (`torch.Tensor` of shape `(batch_size, grid_height, grid_width, hidden_size)`):
            From the image encoder.
        content_mask (`torch.Tensor` of shape `(batch_size, grid_height, grid_width)`, `bool`, *optional*):
            `False` for padding, to which no patch attends: the head is trained on images without padding.

        Returns head tokens of the shape of `patch_tokens`.
        """
        for layer in self.layers:
            patch_tokens = layer(patch_tokens, content_mask=content_mask)
        return patch_tokens

    def pool(self, head_tokens: torch.Tensor, content_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Head tokens -> image features `(batch_size, projection_dim)`. Arguments as in `pool_tokens`."""
        return self.mlp(self.pool_tokens(head_tokens, content_mask))

    def pool_tokens(self, head_tokens: torch.Tensor, content_mask: torch.Tensor | None = None) -> torch.Tensor:
        r"""
        head_tokens (`torch.Tensor` of shape `(batch_size, grid_height, grid_width, hidden_size)`):
            From `forward`.
        content_mask (`torch.Tensor` of shape `(batch_size, grid_height, grid_width)`, `bool`, *optional*):
            `False` for padding, which is excluded from the pooling.

        Returns the pooled token of each image after LayerNorm, `(batch_size, hidden_size)`.
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
        return self.layer_norm(pooled)

    def pool_segments(self, patch_tokens: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
        r"""
        Embeds every segment as if it were an image: in all layers, its patches attend to each other only.

        patch_tokens (`torch.Tensor` of shape `(batch_size, grid_height, grid_width, hidden_size)`):
            As in `forward`.
        segments (`torch.Tensor` of shape `(batch_size, num_segments, grid_height, grid_width)`, `bool`):
            The patches of each segment.

        Returns `(batch_size, num_segments, projection_dim)`, not normalized. Values for segments without patches are
        undefined.
        """
        batch_size, num_segments, grid_height, grid_width = segments.shape
        image, segment, row, column = segments.nonzero(as_tuple=True)
        owner = image * num_segments + segment
        # In a layer with windows, patches attend to their window within the segment.
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
        """Head tokens -> features of the patches `(batch_size, projection_dim, grid_height, grid_width)`, not
        normalized."""
        return self.mlp(self.layer_norm(head_tokens)).permute(0, 3, 1, 2)


class SamClipVisionModel(SamClipPreTrainedModel):
    """
    The vision tower alone: image encoder and CLIP head, with the patches in a sequence and without a class token. It
    loads from the checkpoint of a SAM-CLIP.

    `hidden_states` are those of the image encoder, followed by those of the CLIP head. The last ones are the closest
    to the text space: a vision-language model with a `vision_feature_layer` of -1 or -2 gets text-aligned patches. Its
    `vision_feature_select_strategy` must be `"full"`, because the first token is a patch.

    Example:

    ```python
    >>> from samclip_hf import SamClipVisionModel, miniature

    >>> model = SamClipVisionModel.from_pretrained(miniature.checkpoint())
    ```"""

    config: SamClipVisionConfig  # type: ignore[assignment]  # a part of SamClipConfig
    input_modalities = ("image",)
    _parts_without_model = ("clip_head_config",)
    _can_record_outputs = {"hidden_states": SamClipVisionLayer, "attentions": SamClipVisionAttention}
    # The other weights of a SAM-CLIP checkpoint.
    _keys_to_ignore_on_load_unexpected = [
        r"^(shared_image_embedding|prompt_encoder|mask_decoder|vision_encoder\.neck|text_model|text_projection)\.",
        r"^(logit_scale|logit_bias|class_embeds|label_embeds|neutral_embeds)$",
    ]

    def __init__(self, config: SamClipVisionConfig):
        super().__init__(config)
        self.vision_encoder = SamClipVisionEncoder(config.vision_config)
        self.vision_encoder.neck = nn.Identity()  # feeds the mask decoder only
        self._set_default_attention("clip_head_config")
        self.clip_head = SamClipHead(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The convolution over the pixels."""
        return self.vision_encoder.get_input_embeddings()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        reshaped_input_sizes: torch.Tensor | None = None,
        original_sizes: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SamClipVisionModelOutput:
        r"""
        pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
            Height and width are multiples of the patch size.
        reshaped_input_sizes (`torch.Tensor` of shape `(batch_size, 2)`, *optional*):
            From the image processor: height and width of each image without its padding, which is then excluded from
            the pooling.
        original_sizes (`torch.Tensor` of shape `(batch_size, 2)`, *optional*):
            Not used. Accepted because the image processor returns it and `model(**inputs)` passes it.
        """
        refuse_labels(kwargs)
        outputs = self._forward(pixel_values, reshaped_input_sizes, return_dict=True, **kwargs)
        if outputs.hidden_states is not None:
            # Captured on the grid. Entries are None for layers that were not requested.
            outputs.hidden_states = tuple(h if h is None else h.flatten(1, 2) for h in outputs.hidden_states)
        return outputs

    @capture_outputs(tie_last_hidden_states=False)
    def _forward(self, pixel_values, reshaped_input_sizes, **kwargs) -> SamClipVisionModelOutput:
        head_tokens = self._head_tokens(self.vision_encoder.encode(pixel_values), reshaped_input_sizes)
        content_mask = self._content_mask(head_tokens, reshaped_input_sizes)
        pooled = self.clip_head.pool_tokens(head_tokens, content_mask)
        return SamClipVisionModelOutput(
            last_hidden_state=head_tokens.flatten(1, 2),
            pooler_output=pooled,
            image_embeds=self.clip_head.mlp(pooled),
        )


class SamClipBackbone(BackboneMixin, SamClipVisionModel):
    """
    [`SamClipVisionModel`] for detectors and segmenters that take a backbone (`AutoBackbone`). Returns `feature_maps`,
    each `(batch_size, hidden_size, grid_height, grid_width)`, of the layers `config.out_features`.
    """

    def __init__(self, config: SamClipVisionConfig):
        super().__init__(config)
        self.num_features = [config.hidden_size] * len(config.stage_names)

    @BackboneMixin.out_features.getter
    def out_features(self) -> list[str]:
        """As in [`BackboneMixin`], which reads a private attribute of the configuration."""
        return self.config.out_features

    @BackboneMixin.out_indices.getter
    def out_indices(self) -> list[int]:
        """As `out_features`."""
        return self.config.out_indices

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BackboneOutput:  # type: ignore[override]
        r"""
        pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
            Height and width are multiples of the patch size.
        """
        wants_hidden_states = kwargs.pop("output_hidden_states", None)
        kwargs |= {"output_hidden_states": True, "return_dict": True}
        outputs = SamClipVisionModel.forward(self, pixel_values, **kwargs)
        assert outputs.hidden_states is not None
        grid = tuple(side // self.config.patch_size for side in pixel_values.shape[-2:])
        return BackboneOutput(
            feature_maps=tuple(
                outputs.hidden_states[index].transpose(1, 2).unflatten(2, grid) for index in self.out_indices
            ),
            hidden_states=outputs.hidden_states if wants_hidden_states else None,
            attentions=outputs.attentions,
        )


class SamClipModel(SamClipPreTrainedModel):
    """
    SAM-CLIP. `forward` takes the inputs of [`SamModel`] and of [`CLIPModel`] and computes the outputs of the given
    inputs in one pass of the image encoder.

    Example:

    ```python
    >>> from samclip_hf import SamClipModel, SamClipProcessor, miniature

    >>> model = SamClipModel.from_pretrained(miniature.checkpoint())
    >>> processor = SamClipProcessor.from_pretrained(miniature.checkpoint())
    ```"""

    # Not a subclass of SamModel, although it has the same interface: SamModel's constructor builds and initializes an
    # image encoder that would have to be replaced, and fails for attention implementations that SAM does not support.
    _can_record_outputs = {"mask_decoder_attentions": OutputRecorder(SamTwoWayAttentionBlock, index=2)}
    _tied_weights_keys = {
        "prompt_encoder.shared_embedding.positional_embedding": "shared_image_embedding.positional_embedding"
    }
    _keys_to_ignore_on_load_missing = [r"^label_embeds$"]  # in checkpoints of version 0.1.0, see embed_label_tokens
    _parts_without_model = ("prompt_encoder_config", "mask_decoder_config", "clip_head_config")
    class_embeds: torch.Tensor | None  # buffers
    label_embeds: torch.Tensor | None
    neutral_embeds: torch.Tensor | None

    def __init__(self, config: SamClipConfig):
        super().__init__(config)
        self.shared_image_embedding = SamClipPositionalEmbedding(config.vision_config)
        self.vision_encoder = SamClipVisionEncoder(config.vision_config)
        self._set_default_attention("prompt_encoder_config")
        self.prompt_encoder = SamPromptEncoder(config)
        self.prompt_encoder.shared_embedding = SamClipPositionalEmbedding(config.vision_config)  # tied weights
        self._set_default_attention("mask_decoder_config")
        self.mask_decoder = SamMaskDecoder(config.mask_decoder_config)
        self._set_default_attention("clip_head_config")
        self.clip_head: Any = SamClipHead(config) if config.merged else SamClipTower(config)
        projection_dim = config.clip_head_config.projection_dim
        self.text_model: Any = None
        self.text_projection: Any = None
        if config.has_text_tower and config.has_siglip_text:
            self.text_model = SiglipTextModel._from_config(config.text_config)  # contains its projection
        elif config.has_text_tower:
            self.text_model = CLIPTextModel._from_config(config.text_config)
            self.text_projection = nn.Linear(config.text_config.hidden_size, projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))
        self.logit_bias = nn.Parameter(torch.tensor(0.0)) if config.has_siglip_text else None
        # The vocabulary of SamClipForImageSegmentation. It is defined here, so that further training keeps it.
        config.validate_vocabulary()
        has_vocabulary = len(config.vocabulary_label_ids) > 0
        num_labels = len(config.id2label or {}) - (config.background_label_id is not None)
        for name, size in (("class_embeds", len(config.vocabulary_label_ids)), ("label_embeds", num_labels)):
            self.register_buffer(name, torch.zeros(size, projection_dim) if has_vocabulary else None)
        num_neutral = config.vocabulary_num_neutral
        self.register_buffer("neutral_embeds", torch.zeros(num_neutral, projection_dim) if num_neutral else None)
        self.post_init()
        # `Trainer` ties the weights after it has loaded a checkpoint without these keys, instead of a warning.
        self._keys_to_ignore_on_save = set(self.all_tied_weights_keys)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in [`PreTrainedModel`]. Embeds the names of the labels of a checkpoint of version 0.1.0."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info=True
        model.embed_label_tokens()
        return loaded

    @torch.no_grad()
    def embed_label_tokens(self) -> None:
        """
        Sets `label_embeds` in a model from a checkpoint of version 0.1.0, whose configuration has the tokens of the
        labels' names, `label_tokens`, instead of their embeddings. Does nothing in other models, and while the weights
        of the text tower are not in memory (meta device, DeepSpeed ZeRO-3): `label_tokens` then stays in the
        configuration for the next call.
        """
        embeds, label_tokens = self.label_embeds, getattr(self.config, "label_tokens", None)
        if embeds is None or label_tokens is None:
            return
        if self.text_model is None or len(label_tokens) != len(embeds):
            if self.text_model is not None:
                logger.warning(
                    "This checkpoint does not have the tokens of all names of its labels, so object detection scores "
                    "these names like other texts. Call set_vocabulary to embed the names."
                )
            self.label_embeds = None  # not zeros, which would be saved
            return
        if any(weight.is_meta or weight.numel() == 0 for weight in (embeds, *self.text_model.parameters())):
            return
        for length in {len(tokens) for tokens in label_tokens}:  # names of one length need no padding
            rows = [row for row, tokens in enumerate(label_tokens) if len(tokens) == length]
            input_ids = torch.tensor([label_tokens[row] for row in rows], device=embeds.device)
            embeds[rows] = F.normalize(self.get_text_features(input_ids).pooler_output, dim=-1).to(embeds)
        del self.config.label_tokens

    @classmethod
    def from_teachers(
        cls,
        sam: str | os.PathLike | SamModel,
        clip: str | os.PathLike | CLIPModel | SiglipModel,
        clip_head_config: dict | SamClipHeadConfig | None = None,
        clip_head_initialization: str = "copied",
        merged: bool = True,
        clip_image_size: int | None = None,
    ) -> "SamClipModel":
        r"""
        With `merged=True`, builds a new SAM-CLIP for training, with SAM's weights, CLIP's text tower, and a CLIP head
        whose layers are copies of the last layer of SAM's image encoder (appendix A). The head's LayerNorm and MLP are
        new, so the model must be trained before it can classify. Its weights are float32, because training in half
        precision loses most updates to rounding.

        With `merged=False`, builds a model that works without training. It has the vision tower of the CLIP in the
        place of the CLIP head: its masks are SAM's, its image and text embeddings are CLIP's, at the cost of a second
        encoder. Inputs, outputs, vocabularies and pipelines are those of a merged model.

        sam (`str`, `os.PathLike` or [`SamModel`]):
            A SAM of any size: a repository on the Hub, a folder or a model.
        clip (`str`, `os.PathLike`, [`CLIPModel`] or [`SiglipModel`]):
            A CLIP or SigLIP of any size: a repository on the Hub, a folder or a model. SigLIP 2 checkpoints with a
            fixed image size are [`SiglipModel`]s.
        clip_head_config (`dict` or [`SamClipHeadConfig`], *optional*):
            Number of layers, pooling and MLP width. The projection size is always the CLIP teacher's.
        clip_head_initialization (`str`, *optional*, defaults to `"copied"`):
            `"random"` initializes the head's layers randomly, which is another reading of the paper's main text.
        merged (`bool`, *optional*, defaults to `True`):
            `False` for a model with two encoders that needs no training. Both teachers must then be names or folders
            with an image processor, whose normalization the model needs.
        clip_image_size (`int`, *optional*):
            With `merged=False`: height and width in pixels of the input of CLIP's vision tower. With a larger size,
            smaller objects are found, at a higher cost. By default twice the tower's own size, but at most the larger
            of 448 (the paper's size for segmentation) and its own size.

        Raises `TypeError` if a teacher is another kind of model, and `ValueError` if sizes do not fit, for an unknown
        key of `clip_head_config`, for an unknown `clip_head_initialization` and for an argument without effect.
        """
        if not merged and (clip_head_config is not None or clip_head_initialization != "copied"):
            raise ValueError(
                "An unmerged model has no CLIP head: remove clip_head_config and clip_head_initialization."
            )
        if merged and clip_image_size is not None:
            raise ValueError("A merged model has one encoder: clip_image_size needs merged=False.")
        if clip_head_initialization not in ("copied", "random"):
            raise ValueError(
                f'clip_head_initialization must be "copied" or "random", got {clip_head_initialization!r}.'
            )
        sam = load_teacher((SamModel,), sam, "sam")
        clip = load_teacher((CLIPModel, SiglipModel), clip, "clip")
        if isinstance(clip_head_config, SamClipHeadConfig):
            clip_head_config = clip_head_config.to_dict()
        text_config = clip.config.text_config.to_dict()
        if isinstance(clip, SiglipModel):
            projection_dim = clip.config.text_config.projection_size
            if clip.name_or_path:  # the configuration has another pad_token_id than the tokenizer
                text_config["pad_token_id"] = load_tokenizer(clip.name_or_path).pad_token_id
            if text_config["pad_token_id"] is None:
                raise ValueError("SigLIP's text tower reads padded texts, but its tokenizer has no padding token.")
        else:
            projection_dim = clip.config.projection_dim
        head = dict(clip_head_config or {})
        if unknown := sorted(head.keys() - SamClipHeadConfig.__dataclass_fields__.keys()):
            raise ValueError(
                f"Unknown keys of clip_head_config: {', '.join(unknown)}. Known keys: num_hidden_layers, pooling and "
                "mlp_hidden_size."
            )
        if head.setdefault("projection_dim", projection_dim) != projection_dim:
            raise ValueError(
                f"clip_head_config has projection_dim {head['projection_dim']}, but the CLIP teacher's text space has "
                f"{projection_dim} dimensions. Remove projection_dim."
            )
        teachers = {"sam": describe_teacher(sam), "clip": describe_teacher(clip)}
        config = SamClipConfig(
            vision_config=sam.config.vision_config.to_dict(),
            prompt_encoder_config=sam.config.prompt_encoder_config.to_dict(),
            mask_decoder_config=sam.config.mask_decoder_config.to_dict(),
            text_config=text_config,
            clip_head_config=head,
            initializer_range=sam.config.initializer_range,
            teachers={name: entry for name, entry in teachers.items() if entry} or None,
            **({} if merged else _tower_config(sam, clip, clip_image_size)),
        )
        for part in (config, *(getattr(config, name) for name in config.sub_configs)):
            if part is not None:
                part.dtype = torch.float32  # the teachers' configurations have the types of their weights
        model = cls(config)
        model._clip_name_or_path = clip.name_or_path  # where its tokenizer is
        for name in ("shared_image_embedding", "vision_encoder", "prompt_encoder", "mask_decoder"):
            getattr(model, name).load_state_dict(getattr(sam, name).state_dict())
        model.text_model.load_state_dict(clip.text_model.state_dict())
        if isinstance(clip, SiglipModel):
            model.logit_bias.data.copy_(clip.logit_bias.data.squeeze())  # type: ignore[union-attr]
        else:
            model.text_projection.load_state_dict(clip.text_projection.state_dict())
        model.logit_scale.data.copy_(clip.logit_scale.data.squeeze())
        if not merged:
            model.clip_head.vision_model.load_state_dict(clip.vision_model.state_dict())
            if isinstance(clip, CLIPModel):
                model.clip_head.projection.load_state_dict(clip.visual_projection.state_dict())
            return model
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
            f"({size['clip_head']:.1f} M): {len(model.clip_head.layers)} {layers}; its LayerNorm and MLP are new. "
            "Train the model before you use it with text."
        )
        return model

    def get_image_wide_positional_embeddings(self, size: Sequence[int] | None = None) -> torch.Tensor:
        """SAM's position embeddings of a grid `(1, hidden_size, grid_height, grid_width)`, by default of the grid of
        the image size in the configuration."""
        trained_size = self.config.prompt_encoder_config.image_embedding_size
        height, width = size if size is not None else (trained_size, trained_size)
        device = self.shared_image_embedding.positional_embedding.device
        y = (torch.arange(height, device=device) + 0.5) / height
        x = (torch.arange(width, device=device) + 0.5) / width
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
        return self.shared_image_embedding(grid).permute(2, 0, 1).unsqueeze(0)

    def get_input_embeddings(self) -> nn.Module:
        """The convolution over the pixels."""
        return self.vision_encoder.get_input_embeddings()

    def resize_token_embeddings(self, *args, **kwargs):
        """Raises `ValueError`: the tokens of the text tower are those of its CLIP or SigLIP."""
        raise ValueError(
            "The token embeddings of a SAM-CLIP cannot be resized: texts are compared in the space of its CLIP or "
            "SigLIP, which has no embeddings of new tokens."
        )

    @torch.no_grad()
    def get_image_embeddings(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        """As in [`SamModel`], without gradients: `(batch_size, num_channels, height, width)` -> `(batch_size,
        output_channels, grid_height, grid_width)`, the `image_embeddings` of `forward`."""
        return self.vision_encoder(pixel_values, **kwargs)[0]

    @torch.no_grad()
    def get_prompt_embeddings(
        self,
        input_points: torch.Tensor | None = None,
        input_labels: torch.Tensor | None = None,
        input_boxes: torch.Tensor | None = None,
        input_masks: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """As in [`SamModel`], without gradients: sparse and dense embeddings of prompts in an image of the size in the
        configuration."""
        return self.prompt_encoder(input_points, input_labels, input_boxes, input_masks)

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
        SAM's prompt encoder and mask decoder on image embeddings of any grid. Arguments as in `forward`.

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
            if prompt is not None and prompt.dtype in HALF_PRECISION and not torch.compiler.is_compiling():
                logger.warning_once(
                    f"{name} are {prompt.dtype}, which rounds coordinates by up to several pixels. Pass float32; the "
                    "model's own precision does not matter."
                )
        if input_points is not None and input_boxes is not None and input_points.shape[1] != input_boxes.shape[1]:
            raise ValueError(
                "Points and boxes in one call describe the same objects and must be equal in number: got "
                f"{input_points.shape[1]} and {input_boxes.shape[1]} prompts."
            )
        if input_points is not None and input_labels is not None and input_labels.shape != input_points.shape[:-1]:
            raise ValueError(
                f"input_labels must be one for each of the input_points, {tuple(input_points.shape[:-1])}, got "
                f"{tuple(input_labels.shape)}."
            )
        if input_points is not None and input_labels is None:
            input_labels = torch.ones_like(input_points[..., 0], dtype=torch.int)
        if input_masks is not None and (input_masks.ndim != 4 or input_masks.shape[0] != batch_size):
            raise ValueError(
                f"input_masks must be one for each of {batch_size} images, ({batch_size}, 1, height, width), or one "
                f"for each prompt, got {tuple(input_masks.shape)}."
            )
        if input_masks is not None and input_masks.shape[-2:] != (4 * grid_height, 4 * grid_width):
            raise ValueError(
                f"input_masks are {tuple(input_masks.shape[-2:])} but must be {4 * grid_height} x {4 * grid_width}, "
                "four times the patch grid, like the pred_masks of an earlier call."
            )
        if input_masks is not None and (num_masks := input_masks.shape[1]) != 1:
            for name, prompt in (("input_points", input_points), ("input_boxes", input_boxes)):
                if prompt is not None and prompt.shape[1] != num_masks:
                    raise ValueError(
                        f"input_masks must be one for each image or one for each prompt: got {num_masks} masks and "
                        f"{prompt.shape[1]} {name} for an image."
                    )
            if attention_similarity is not None or target_embedding is not None:
                raise ValueError("attention_similarity and target_embedding need one mask for each image.")
            # SAM's mask decoder takes one mask for each image: every prompt becomes an image.
            input_points, input_labels, input_boxes, input_masks = (
                None if prompt is None else prompt.flatten(0, 1)[:, None]
                for prompt in (input_points, input_labels, input_boxes, input_masks)
            )
            masks, iou_scores = self.predict_masks(
                image_embeddings.repeat_interleave(num_masks, dim=0),
                input_points,
                input_labels,
                input_boxes,
                input_masks,
                multimask_output,
            )
            size = (batch_size, num_masks)
            return masks[:, 0].unflatten(0, size), iou_scores[:, 0].unflatten(0, size)

        # SAM's prompt encoder has one input size: rescale the coordinates to it. It adds 0.5 to them, the center of a
        # pixel.
        trained_size, patch_size = self.prompt_encoder.input_image_size, self.config.vision_config.patch_size
        scale = trained_size / (torch.tensor([grid_width, grid_height], device=image_embeddings.device) * patch_size)
        if input_points is not None:
            input_points = (input_points + 0.5) * scale - 0.5
        if input_boxes is not None:
            input_boxes = (input_boxes + 0.5) * scale.repeat(2) - 0.5
        sparse_embeddings, dense_embeddings = self.prompt_encoder(
            input_points=input_points, input_labels=input_labels, input_boxes=input_boxes, input_masks=input_masks
        )
        if input_masks is None:  # one vector, repeated over the trained grid
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

    def _encode_once(self, pixel_values, vision_embeds, reshaped_input_sizes, **kwargs):
        """The [`SamClipVisionEncoderOutput`] of `pixel_values`, or the given one."""
        if (pixel_values is None) == (vision_embeds is None):
            raise ValueError("Pass either pixel_values or vision_embeds, and not both.")
        if vision_embeds is not None:
            return vision_embeds
        return self.get_vision_embeds(pixel_values, reshaped_input_sizes, **kwargs)

    def get_vision_embeds(
        self,
        pixel_values: torch.Tensor,
        reshaped_input_sizes: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SamClipVisionEncoderOutput:
        r"""
        Encodes images once for any number of calls with `vision_embeds`. For a merged model, this is the output of
        `vision_encoder`. In an unmerged model, `patch_tokens` are the patch embeddings of CLIP's vision tower.

        pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
            From the image processor.
        reshaped_input_sizes (`torch.Tensor` of shape `(batch_size, 2)`, *optional*):
            From the image processor: height and width of each image without its padding, which CLIP's vision tower
            does not see.
        """
        outputs = self.vision_encoder(pixel_values, **kwargs)
        if not self.config.merged:
            outputs.patch_tokens = self.clip_head.encode_pixels(pixel_values, reshaped_input_sizes)
        return outputs

    def _dense_embeds(self, head_tokens, image_embeddings, reshaped_input_sizes) -> torch.Tensor:
        """Embeddings of the patches of `image_embeddings` in the text space `(batch_size, projection_dim, grid_height,
        grid_width)`, of length 1."""
        features = self.clip_head.project_patches(head_tokens)
        if not self.config.merged:
            content_sizes = self._content_sizes(image_embeddings.permute(0, 2, 3, 1), reshaped_input_sizes)
            features = to_image_grid(features, content_sizes, image_embeddings.shape[-2:])
        return F.normalize(features, dim=1)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        reshaped_input_sizes: torch.Tensor | None = None,
        vision_embeds: SamClipVisionEncoderOutput | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        r"""
        Embeds images in the text space, as [`CLIPModel.get_image_features`] does.

        pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
            From the image processor.
        reshaped_input_sizes (`torch.Tensor` of shape `(batch_size, 2)`, *optional*):
            From the image processor: height and width of each image without its padding, which is then excluded from
            the pooling.
        vision_embeds ([`SamClipVisionEncoderOutput`], *optional*):
            From `get_vision_embeds` for the images, in place of `pixel_values`.

        Returns `pooler_output` `(batch_size, projection_dim)`, not normalized, and `last_hidden_state`
        `(batch_size, grid_height * grid_width, hidden_size)`, the CLIP head's tokens. `hidden_states` and
        `attentions`, on request, are the image encoder's. An unmerged model runs CLIP's vision tower alone and does
        not return them.
        """
        if self.config.merged or pixel_values is None or vision_embeds is not None:
            vision_outputs = self._encode_once(pixel_values, vision_embeds, reshaped_input_sizes, **kwargs)
        else:  # without SAM's image encoder
            patch_tokens = self.clip_head.encode_pixels(pixel_values, reshaped_input_sizes)
            vision_outputs = SamClipVisionEncoderOutput(patch_tokens=patch_tokens)
        head_tokens, pooled = self._pool_image(vision_outputs.patch_tokens, reshaped_input_sizes)
        return BaseModelOutputWithPooling(
            last_hidden_state=head_tokens.flatten(1, -2),
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
        """
        Embeds texts, as [`CLIPModel.get_text_features`] does: `pooler_output` `(num_texts, projection_dim)`, not
        normalized. With SigLIP's text tower, the result is that of [`SiglipModel.get_text_features`] for texts that
        are padded to the maximum length, without an attention mask. The texts that are passed here may have any
        padding, on the left or on the right. With CLIP's text tower, padding on the left needs the attention mask;
        [`CLIPModel`] gives other embeddings for such texts, which CLIP was not trained with.
        """
        if self.text_model is None:
            raise ValueError("This checkpoint has no text tower: it can use its own vocabulary only.")
        if self.config.has_siglip_text:
            longest, pad = self.config.text_config.max_position_embeddings, self.config.text_config.pad_token_id
            if input_ids.shape[-1] < longest:
                input_ids = F.pad(input_ids, (0, longest - input_ids.shape[-1]), value=pad)
            # Gemma's tokenizer pads on the left by default, but SigLIP 2 was trained with padding on the right.
            input_ids = input_ids.gather(-1, _positions_from_first(input_ids != pad))
            return self.text_model(input_ids=input_ids, position_ids=position_ids, **kwargs)
        if attention_mask is not None and position_ids is None:  # CLIP was trained with padding on the right
            position = _positions_from_first(attention_mask)
            input_ids, attention_mask = input_ids.gather(-1, position), attention_mask.gather(-1, position)
        outputs = self.text_model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs
        )
        outputs.pooler_output = self.text_projection(outputs.pooler_output)
        return outputs

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
        segments: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SamClipOutput:
        r"""
        pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
            Height and width are multiples of the patch size.
        input_points (`torch.Tensor` of shape `(batch_size, num_prompts, num_points, 2)`):
            x and y in pixels of `pixel_values`; all points of a prompt describe one object.
        input_labels (`torch.Tensor` of shape `(batch_size, num_prompts, num_points)`, *optional*):
            1 inside the object, 0 outside, -1 no point, -10 padding. 1 by default.
        input_boxes (`torch.Tensor` of shape `(batch_size, num_prompts, 4)`):
            x1, y1, x2, y2 in pixels of `pixel_values`.
        input_masks (`torch.Tensor` of shape `(batch_size, 1 or num_prompts, 4 * grid_height, 4 * grid_width)`):
            Mask logits, for example of an earlier call: one mask for all prompts of an image, or one for each prompt.
        image_embeddings (`torch.Tensor` of shape `(batch_size, output_channels, grid_height, grid_width)`):
            From `get_image_embeddings`, in place of `pixel_values`, to prompt an image again.
        multimask_output (`bool`, defaults to `True`):
            Whether to predict three masks for each prompt, or one.
        attention_similarity, target_embedding (`torch.Tensor`):
            As in [`SamModel`].
        input_ids, attention_mask, position_ids (`torch.Tensor` of shape `(num_texts, sequence_length)`):
            Texts to compare with every image.
        reshaped_input_sizes (`torch.Tensor` of shape `(batch_size, 2)`, *optional*):
            From the image processor: height and width of each image without its padding, which `image_embeds` then
            does not include.
        original_sizes (`torch.Tensor` of shape `(batch_size, 2)`, *optional*):
            Not used. Accepted because the processor returns them for post-processing and `model(**inputs)` passes
            them.
        num_prompts (`torch.Tensor` of shape `(batch_size,)`, *optional*):
            From the processor: the number of prompts of each image without padding. Masks of padding prompts are
            empty, and their predicted IoUs are 0.
        return_loss (`bool`, *optional*):
            Whether to return CLIP's contrastive loss or, with SigLIP's text tower, SigLIP's.
        vision_embeds ([`SamClipVisionEncoderOutput`], *optional*):
            From `get_vision_embeds` for the images, in place of `pixel_values`.
        segments (`torch.Tensor` of shape `(batch_size, num_segments, grid_height, grid_width)`, `bool`, *optional*):
            The patches of segments to embed, on the grid of the CLIP head.
        """
        refuse_labels(kwargs)
        if return_loss and input_ids is None:
            raise ValueError("return_loss=True needs texts: pass input_ids, one text for each image.")
        if sum(given is not None for given in (pixel_values, image_embeddings, vision_embeds)) != 1:
            raise ValueError(
                "Pass one of pixel_values, image_embeddings and vision_embeds. For texts alone, use get_text_features."
            )
        has_prompts = any(prompt is not None for prompt in (input_points, input_boxes, input_masks))
        needs_clip_head = input_ids is not None or segments is not None or not has_prompts
        if needs_clip_head and image_embeddings is not None:
            raise ValueError(
                "image_embeddings are the input of the mask decoder, not of the CLIP head. Pass pixel_values or "
                "vision_embeds for text, or prompts for masks."
            )

        fields = {}
        if image_embeddings is None:
            vision_outputs = self._encode_once(pixel_values, vision_embeds, reshaped_input_sizes, **kwargs)
            image_embeddings = vision_outputs.last_hidden_state
            fields["vision_hidden_states"] = vision_outputs.hidden_states
            fields["vision_attentions"] = vision_outputs.attentions

        if has_prompts:
            assert image_embeddings is not None
            autocast: contextlib.AbstractContextManager = contextlib.nullcontext()
            if self.training:
                # Autocast's rounding of masks has gradients that are not small beside those of the distillation
                # (benchmarks/training_precision.py).
                image_embeddings = image_embeddings.to(self.mask_decoder.iou_token.weight.dtype)
                if torch.amp.is_autocast_available(image_embeddings.device.type):  # not on the meta device
                    autocast = torch.autocast(image_embeddings.device.type, enabled=False)
            with autocast:
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
            if num_prompts is not None:
                numbers = torch.arange(fields["iou_scores"].shape[1], device=image_embeddings.device)
                is_padding = numbers >= num_prompts.to(numbers.device)[:, None]
                fields["pred_masks"] = fields["pred_masks"].masked_fill(is_padding[..., None, None, None], EMPTY_MASK)
                fields["iou_scores"] = fields["iou_scores"].masked_fill(is_padding[..., None], 0)

        if needs_clip_head:
            head_tokens, pooled = self._pool_image(vision_outputs.patch_tokens, reshaped_input_sizes)
            image_embeds = F.normalize(pooled, dim=-1)
            dense_embeds = self._dense_embeds(head_tokens, image_embeddings, reshaped_input_sizes)
            fields |= {"image_embeds": image_embeds, "dense_embeds": dense_embeds}
            if segments is not None:
                segment_features = self.clip_head.pool_segments(vision_outputs.patch_tokens, segments)
                fields["segment_embeds"] = F.normalize(segment_features, dim=-1)

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


_signature = inspect.signature(SamClipModel.forward)
SamClipModel.forward.__signature__ = _signature.replace(  # type: ignore[attr-defined]
    parameters=[
        parameter.replace(name=_InputName(parameter.name)) if parameter.name == "input_labels" else parameter
        for parameter in _signature.parameters.values()
    ]
)


def _positions_from_first(mask: torch.Tensor) -> torch.Tensor:
    """Positions `(batch_size, length)` that move padding from the left to the right: from the first marked position of
    `mask` `(batch_size, length)` to the end, and then from the start."""
    length = mask.shape[-1]
    position = mask.int().argmax(dim=-1, keepdim=True) + torch.arange(length, device=mask.device)
    return torch.where(position < length, position, position - length)  # `%` by a dynamic length fails in ONNX


def _sigmoid_loss(logits_per_text: torch.Tensor) -> torch.Tensor:
    """SigLIP's loss (Zhai et al. 2023) for logits `(batch_size, batch_size)`: every pair is classified as matching or
    not; text i matches image i."""
    _check_pairs(logits_per_text)
    signs = 2 * torch.eye(len(logits_per_text), device=logits_per_text.device) - 1
    return -F.logsigmoid(signs * logits_per_text).sum(dim=-1).mean()


def _contrastive_loss(logits_per_text: torch.Tensor) -> torch.Tensor:
    """CLIP's loss for logits `(batch_size, batch_size)`: text i belongs to image i."""
    _check_pairs(logits_per_text)
    target = torch.arange(len(logits_per_text), device=logits_per_text.device)
    return (F.cross_entropy(logits_per_text, target) + F.cross_entropy(logits_per_text.T, target)) / 2


def _check_pairs(logits_per_text: torch.Tensor) -> None:
    if logits_per_text.shape[0] != logits_per_text.shape[1]:
        raise ValueError(f"return_loss needs one text per image, got {tuple(logits_per_text.shape)} (texts, images).")


def patches_of_masks(masks: torch.Tensor, covered: Sequence[float], grid_size: tuple[int, int]) -> torch.Tensor:
    r"""
    Returns the patches of masks: those of which at least half is inside or, if there are none, the patch with the
    largest part inside. A mask without pixels has none.

    masks (`torch.Tensor` of shape `(..., height, width)`):
        Boolean masks, or for each pixel the fraction that is inside the mask.
    covered (`Sequence[float]`):
        The number of rows and columns of the grid that the masks cover. Masks and grid have the same upper left
        corner. The numbers may be fractions and exceed the grid.
    grid_size (`tuple[int, int]`):
        Height and width of the grid in patches.

    Returns `(..., grid_height, grid_width)`, `bool`.
    """
    overlaps = []
    for size, length, side in zip(masks.shape[-2:], covered, grid_size, strict=True):
        edges = torch.arange(size + 1, device=masks.device) * (length / size)  # of the pixels, in patches
        patch = torch.arange(side, device=masks.device)[:, None]
        overlap = (edges[1:].clamp_max(patch + 1) - edges[:-1].clamp_min(patch)).clamp_min(0)
        overlaps.append(overlap / overlap.sum(dim=1, keepdim=True).clamp_min(1e-6))  # a patch of padding has 0
    fraction = overlaps[0] @ masks.float() @ overlaps[1].T
    highest = fraction.amax(dim=(-2, -1), keepdim=True)
    return (fraction >= 0.5 - 1e-4) | ((fraction >= highest) & (highest > 0))  # 1e-4: rounding


def load_complete_model(model_class: type[PreTrainedModel], name_or_path: str | os.PathLike, **options) -> Any:
    """
    Loads a model that has all of its weights, in the shapes of its configuration. `from_pretrained` would initialize
    missing weights randomly.

    model_class (`type[PreTrainedModel]`):
        The class of the model.
    name_or_path (`str` or `os.PathLike`):
        A repository on the Hub or a folder.
    options:
        Arguments of `from_pretrained`.

    Raises `OSError` if there is no such model or its weights cannot be read, and `ValueError` if its files lack
    weights or have weights of other shapes.
    """
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, loading_info = model_class.from_pretrained(name_or_path, **options)
    except SafetensorError as error:
        raise OSError(
            f"The weights of {name_or_path} cannot be read: a safetensors file is truncated or damaged ({error}). "
            "Copy or download it again."
        ) from error
    except OSError as error:
        if not options.get("use_safetensors") or "named model.safetensors" not in str(error):
            raise
        raise OSError(
            f"{name_or_path} has no weights in safetensors files, and pickle files (pytorch_model.bin) are not read, "
            f"because they can run code. Convert them in Python, {model_class.__name__}.from_pretrained("
            f"{str(name_or_path)!r}, use_safetensors=False).save_pretrained(FOLDER), and copy the files of the "
            "tokenizer and the image processor into that folder."
        ) from error
    if missing := sorted(loading_info["missing_keys"]):
        names = ", ".join([*missing[:5], *(["..."] if len(missing) > 5 else [])])
        raise ValueError(f"{name_or_path} lacks weights, which would be random: {names}.")
    if mismatched := sorted(loading_info["mismatched_keys"]):
        name, saved, expected = mismatched[0]
        raise ValueError(
            f"{len(mismatched)} weights of {name_or_path} have other shapes than its configuration, such as {name}: "
            f"{tuple(saved)} instead of {tuple(expected)}. config.json and the weights must be of the same model."
        )
    return model


def load_teacher(classes: tuple[type[PreTrainedModel], ...], teacher, argument: str):
    """
    Loads a teacher. Weights are read from safetensors files only.

    classes (`tuple[type[PreTrainedModel], ...]`):
        Accepted kinds of models.
    teacher (`str`, `os.PathLike` or [`PreTrainedModel`]):
        A repository on the Hub, a folder, or a model, which is returned unchanged.
    argument (`str`):
        Name of the caller's argument, for error messages.

    Raises `TypeError` for another kind of model, `OSError` if there is none or its weights cannot be read, and
    `ValueError` if its files lack weights or have weights of other shapes.
    """
    if isinstance(teacher, classes):
        return teacher
    wanted = " or a ".join(cls.__name__ for cls in classes)
    if not isinstance(teacher, str | os.PathLike):
        raise TypeError(f"{argument} must be a name, a folder or a {wanted}, got {type(teacher).__name__}.")
    try:
        config, _ = classes[0].config_class.get_config_dict(teacher)
    except OSError as error:
        raise OSError(
            f"{argument} {str(teacher)!r} is neither a folder with a model nor a repository on the Hub: {error}"
        ) from error
    model_type = config.get("model_type")
    for cls in classes:
        if model_type == cls.config_class.model_type:
            model = load_complete_model(cls, teacher, use_safetensors=True)
            # transformers 5.24 does not set it; earlier versions set it for names on the Hub.
            model.config._commit_hash = _cached_commit(os.fspath(teacher))
            return model
    hint = ""
    if model_type == "siglip2":
        hint = " Use a SigLIP 2 checkpoint with a fixed image size, not NaFlex: google/siglip2-base-patch16-224."
    raise TypeError(
        f"{argument} must be a {wanted}, but {str(teacher)!r} contains a model of type {model_type!r}.{hint}"
    )


def describe_teacher(model: PreTrainedModel) -> dict[str, str]:
    """
    Where a teacher was loaded from, for `SamClipConfig.teachers`: `name`, see [`public_name`], and, if known,
    `revision`, the commit on the Hub, and `license`, see [`read_license`]. Empty for a model that was not loaded.

    Models that [`load_teacher`] loaded have a commit. transformers 5.24 and newer do not store that of others.
    """
    path = model.name_or_path
    if not path:
        return {}
    entry = {
        "name": public_name(path),
        "revision": getattr(model.config, "_commit_hash", None),
        "license": read_license(path),
    }
    return {key: value for key, value in entry.items() if value}


def public_name(name_or_path: str) -> str:
    """The name of a teacher in published files: "miniature" for a shipped one, that of the repository for a folder of
    the Hub's cache, and the last part of the path for other folders. Names on the Hub are returned unchanged."""
    if not os.path.isabs(name_or_path) and not os.path.isdir(name_or_path):
        return name_or_path
    path = os.path.abspath(name_or_path)
    if os.path.realpath(os.path.dirname(path)) == _SHIPPED_WEIGHTS:
        return "miniature"
    in_cache = _HUB_CACHE_FOLDER.search(path)
    return in_cache[1].replace("--", "/", 1) if in_cache else os.path.basename(path)


def _cached_commit(name_or_path: str) -> str | None:
    """The commit of a folder of the Hub's cache, or of the files of a name on the Hub that was just loaded; `None` for
    other folders."""
    path = name_or_path if os.path.isdir(name_or_path) else try_to_load_from_cache(name_or_path, "config.json")
    in_cache = _HUB_CACHE_FOLDER.search(os.path.abspath(path)) if isinstance(path, str) else None
    return in_cache[2] if in_cache else None


def read_license(folder: str | os.PathLike) -> str | None:
    """The license in the metadata of the model card in a folder, `None` if there is none."""
    card = os.path.join(folder, "README.md")
    if not os.path.isfile(card):
        return None
    try:
        license = (metadata_load(card) or {}).get("license")
    except Exception:  # a YAML parser has errors of many types
        return None
    return ", ".join(license) if isinstance(license, list) else license


def tower_image_size(vision_config) -> int:
    """The default side in pixels of the images for the vision tower of an unmerged model: twice that of the CLIP or
    SigLIP, but at most 448 or its own."""
    own, patch_size = vision_config.image_size, vision_config.patch_size
    return max(own, min(2 * own, 448) // patch_size * patch_size)


def _tower_config(sam: SamModel, clip: CLIPModel | SiglipModel, clip_image_size: int | None) -> dict[str, Any]:
    """The fields of [`SamClipConfig`] that describe the vision tower of an unmerged model."""
    vision_config, normalizations = clip.config.vision_config, []
    for teacher in (sam, clip):
        if not teacher.name_or_path:
            raise ValueError(
                "An unmerged model needs the normalization of both teachers' image processors: pass names or folders, "
                "or models that were loaded from them."
            )
        processor, _ = BaseImageProcessor.get_image_processor_dict(teacher.name_or_path)
        mean, std = processor.get("image_mean"), processor.get("image_std")
        if not processor.get("do_normalize", True) or mean is None or std is None:
            raise ValueError(f"The image processor of {teacher.name_or_path} has no mean and standard deviation.")
        if not processor.get("do_rescale", True) or not math.isclose(
            processor.get("rescale_factor", 1 / 255), 1 / 255
        ):
            raise ValueError(
                f"The image processor of {teacher.name_or_path} does not rescale pixels by 1/255, which an unmerged "
                "model requires."
            )
        normalizations.append((mean, std))
    if clip_image_size is None:
        clip_image_size = tower_image_size(vision_config)
    (mean, std), (clip_mean, clip_std) = normalizations
    return {
        # Measured by `python benchmarks/naming.py composed`, see docs/design.md.
        "composition_points": 32,
        "clip_vision_config": vision_config.to_dict(),
        "clip_image_size": clip_image_size,
        "clip_pixel_scale": [a / b for a, b in zip(std, clip_std, strict=True)],
        "clip_pixel_shift": [(a - b) / c for a, b, c in zip(mean, clip_mean, clip_std, strict=True)],
    }


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a checkpoint's folder or repository. Raises `ValueError` if there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except ImportError as error:
        raise ValueError(f"The tokenizer in {folder!r} needs another package. {error}") from error
    except Exception as error:  # AutoTokenizer guesses the type of a missing tokenizer and raises various errors
        raise ValueError(
            f"There is no tokenizer in {folder!r}. Save the processor there, too, or pass the tokenizer."
        ) from error
    check_tokenizer(tokenizer, folder)
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str) -> None:
    """Raises `ValueError` for a tokenizer of special tokens alone, which AutoTokenizer makes if files are missing in
    the folder or repository. All texts would be equal."""
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise ValueError(
            f"There is no tokenizer in {folder!r}: its vocabulary is empty. Copy the tokenizer's files there "
            "(tokenizer.json, or vocab.json and merges.txt)."
        )


__all__ = [
    "SamClipBackbone",
    "SamClipModel",
    "SamClipOutput",
    "SamClipPreTrainedModel",
    "SamClipVisionModel",
    "SamClipVisionModelOutput",
]
