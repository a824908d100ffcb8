"""
SAM-CLIP: one image encoder, SAM's mask decoder and a text-aligned CLIP head (Wang et al., arXiv 2310.15308).

The model is SAM plus three parts. The image encoder is SAM's, at any input size; the CLIP head reads its patch tokens
before SAM's neck; the text tower, its projection and the logit scale are CLIP's.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
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
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.sam.modeling_sam import (
    SamImageSegmentationOutput,
    SamMaskDecoder,
    SamPositionalEmbedding,
    SamPreTrainedModel,
    SamPromptEncoder,
    SamVisionEncoder,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_samclip import SamClipConfig, SamClipHeadConfig, SamClipVisionConfig
from .vision_encoder_samclip import (
    SamClipPatchGroups,
    SamClipVisionEncoder,
    SamClipVisionEncoderOutput,
    SamClipVisionLayer,
)

logger = logging.get_logger(__name__)


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
                text_config["pad_token_id"] = load_tokenizer(clip.name_or_path).pad_token_id
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


def _sigmoid_loss(logits_per_text: torch.Tensor) -> torch.Tensor:
    """SigLIP's (Zhai et al. 2023): every text is right for its own image and wrong for every other, each by itself."""
    _check_pairs(logits_per_text)
    signs = 2 * torch.eye(len(logits_per_text), device=logits_per_text.device) - 1
    return -F.logsigmoid(signs * logits_per_text).sum(dim=-1).mean()


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


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
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


__all__ = ["SamClipModel", "SamClipOutput", "SamClipPreTrainedModel", "SamClipVisionModel"]
