"""
The vision tower of a CLIP or SigLIP, which an unmerged SAM-CLIP has in place of the CLIP head.

Its input is the `pixel_values` of the image encoder: the padding of each image is removed, the image is resized to a
square, and SAM's normalization is replaced by CLIP's.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPVisionModel, SiglipVisionModel

from .configuration_samclip import SamClipConfig


class SamClipTower(nn.Module):
    """
    A vision tower with the methods of [`SamClipHead`]: patch embeddings -> tokens -> text space.

    `encode_pixels` gives the input of `forward` and `pool_segments`. The tokens of `forward` are those before the last
    layer of a CLIP, because `pool` and `project_patches` use that layer in two ways, and those after the last layer of
    a SigLIP.
    """

    def __init__(self, config: SamClipConfig):
        super().__init__()
        vision_config = config.clip_vision_config
        assert vision_config is not None and config.clip_image_size is not None
        self.config = config
        self.image_size: int = config.clip_image_size
        self.patch_size: int = vision_config.patch_size
        self.is_siglip = config.has_siglip_text
        self.projection: nn.Linear | None = None
        self.vision_model: Any
        if self.is_siglip:
            self.vision_model = SiglipVisionModel._from_config(vision_config)
        else:
            self.vision_model = CLIPVisionModel._from_config(vision_config)
            self.projection = nn.Linear(vision_config.hidden_size, config.clip_head_config.projection_dim, bias=False)

    @property
    def grid_size(self) -> int:
        """Rows and columns of patches."""
        return self.image_size // self.patch_size

    def encode_pixels(self, pixel_values: torch.Tensor, reshaped_input_sizes: torch.Tensor | None) -> torch.Tensor:
        r"""
        pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
            From SAM-CLIP's image processor.
        reshaped_input_sizes (`torch.Tensor` of shape `(batch_size, 2)`, *optional*):
            Height and width of each image without its padding.

        Returns the embeddings of the patches `(batch_size, grid_size, grid_size, hidden_size)`, before the first
        layer.
        """
        height, width = pixel_values.shape[-2:]
        if reshaped_input_sizes is None:
            sizes = torch.tensor([[height, width]], device=pixel_values.device).expand(pixel_values.shape[0], 2)
        else:
            sizes = torch.as_tensor(reshaped_input_sizes, device=pixel_values.device)
        # A matrix product for each axis gives the values of F.interpolate, for a different size of each image.
        rows = bicubic_weights(sizes[:, 0], height, self.image_size)
        columns = bicubic_weights(sizes[:, 1], width, self.image_size)
        images = rows[:, None] @ pixel_values.float() @ columns[:, None].mT
        return self._embed(self._normalize(images).to(self.vision_model.dtype))

    def forward(self, patch_embeds: torch.Tensor) -> torch.Tensor:
        """Patch embeddings `(batch_size, grid_size, grid_size, hidden_size)` -> tokens `(batch_size, num_tokens,
        hidden_size)`, with a CLIP's class token first."""
        tokens = patch_embeds.flatten(1, 2)
        if not self.is_siglip:
            tokens = torch.cat([self._class_tokens(tokens.shape[0], 1), tokens], dim=1)
        layers = self.vision_model.encoder.layers
        return self._run(tokens, layers if self.is_siglip else layers[:-1])

    def pool(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens of `forward` -> image features `(batch_size, projection_dim)`, those of the CLIP or SigLIP."""
        if self.is_siglip:
            return self.vision_model.head(self.vision_model.post_layernorm(tokens))
        tokens = self._run(tokens, self.vision_model.encoder.layers[-1:])
        return self._project(tokens[:, 0])

    def project_patches(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens of `forward` -> features of the patches `(batch_size, projection_dim, grid_size, grid_size)`, not
        normalized."""
        if self.is_siglip:
            features = project_siglip_patches(self.vision_model, self.vision_model.post_layernorm(tokens))
        else:
            features = self._project(replace_attention_by_values(self.vision_model, tokens[:, 1:]))
        return features.transpose(1, 2).unflatten(2, (-1, self.image_size // self.patch_size))

    def pool_segments(self, patch_embeds: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
        r"""
        Embeds segments, with one of two kinds of attention in all layers (`config.segment_attention`):

        - `"restricted"`: the patches and the class token of a segment attend only to each other, as if the segment
          were an image. Segments that do not overlap are embedded in the same forward pass.
        - `"class_token"`: all patches attend to each other, and the class token of a segment attends to its patches
          (the probe of a SigLIP's pooling head: only to them). All segments are embedded in one forward pass. This is
          how MaskCLIP (Ding et al. 2023, arXiv 2208.08984) and the semantic branch of CorrCLIP (Zhang et al. 2025,
          arXiv 2411.10086) classify masks of photographs.

        patch_embeds (`torch.Tensor` of shape `(batch_size, grid_size, grid_size, hidden_size)`):
            As in `forward`.
        segments (`torch.Tensor` of shape `(batch_size, num_segments, grid_size, grid_size)`, `bool`):
            The patches of each segment.

        Returns `(batch_size, num_segments, projection_dim)`, not normalized. Values for segments without patches are
        undefined.
        """
        patches, inside = patch_embeds.flatten(1, 2), segments.flatten(2)
        if self.config.segment_attention == "class_token":
            return self._pool_with_class_tokens(patches, inside)
        features = patches.new_zeros(*inside.shape[:2], self.config.clip_head_config.projection_dim)
        for members in _disjoint_groups(inside):
            features[:, members] = self._pool_disjoint(patches, inside[:, members]).to(features.dtype)
        return features

    def _pool_with_class_tokens(self, patches: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
        """As `_pool_disjoint`, for any segments, with unrestricted attention of the patches."""
        batch_size, num_segments, num_patches = inside.shape
        layers = self.vision_model.encoder.layers
        if self.is_siglip:
            return self._pool_siglip(self._run(patches, layers), inside)
        own, image = num_segments, num_segments + 1  # segments' class tokens, the image's class token, patches
        visible = patches.new_zeros(batch_size, image + num_patches, image + num_patches, dtype=torch.bool)
        visible[:, own:, own:] = True
        visible[:, :own, :own] = torch.eye(own, dtype=torch.bool, device=patches.device)
        visible[:, :own, image:] = inside
        tokens = torch.cat([self._class_tokens(batch_size, image), patches], dim=1)
        return self._project(self._run(tokens, layers, visible)[:, :own])

    def _pool_disjoint(self, patches: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
        """Patches `(batch_size, num_patches, hidden_size)` and segments that do not overlap `(batch_size,
        num_segments, num_patches)` -> features `(batch_size, num_segments, projection_dim)`."""
        batch_size, num_segments, _ = inside.shape
        numbers = torch.arange(1, num_segments + 1, device=inside.device)
        owner = (inside * numbers[:, None]).amax(dim=1)  # 0 for patches of no segment
        # Only patches of segments are embedded. In a batch, images with fewer of them keep others, which attend to
        # each other only.
        num_kept = max(1, int((owner > 0).sum(dim=1).max()))
        kept = (owner > 0).int().argsort(dim=1, descending=True, stable=True)[:, :num_kept]
        owner, inside = owner.gather(1, kept), inside.gather(2, kept[:, None].expand(-1, num_segments, -1))
        tokens = patches.gather(1, kept[:, :, None].expand(-1, -1, patches.shape[-1]))
        if not self.is_siglip:
            tokens = torch.cat([self._class_tokens(batch_size, num_segments), tokens], dim=1)
            owner = torch.cat([numbers.expand(batch_size, -1), owner], dim=1)
        tokens = self._run(tokens, self.vision_model.encoder.layers, owner[:, :, None] == owner[:, None, :])
        if not self.is_siglip:
            return self._project(tokens[:, :num_segments])
        return self._pool_siglip(tokens, inside)

    def _pool_siglip(self, tokens: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
        """Tokens of a SigLIP after the last layer and the tokens of segments -> features of the segments."""
        batch_size, num_segments, _ = inside.shape
        head, tokens = self.vision_model.head, self.vision_model.post_layernorm(tokens)
        tokens = tokens[:, None].expand(-1, num_segments, -1, -1).flatten(0, 1)
        outside = ~inside.flatten(0, 1)
        outside &= ~outside.all(dim=1, keepdim=True)  # if all keys are masked, attention returns NaN
        probe = head.probe.expand(len(tokens), -1, -1)
        pooled = head.attention(probe, tokens, tokens, key_padding_mask=outside, need_weights=False)[0]
        pooled = pooled + head.mlp(head.layernorm(pooled))
        return pooled.unflatten(0, (batch_size, num_segments)).squeeze(2)

    def _run(self, tokens: torch.Tensor, layers, visible: torch.Tensor | None = None) -> torch.Tensor:
        """Runs layers on tokens `(batch_size, num_tokens, hidden_size)`. `visible` `(batch_size, num_tokens,
        num_tokens)` is `True` where a token may attend to another."""
        mask = None
        if visible is not None:
            attention = self.vision_model.config._attn_implementation
            if attention not in ("sdpa", "eager", None):
                raise ValueError(
                    f"Segments of an unmerged model are embedded with the attention 'sdpa' or 'eager', not "
                    f"{attention!r}: call model.set_attn_implementation('sdpa')."
                )
            mask = torch.zeros(visible.shape, dtype=tokens.dtype, device=tokens.device)
            mask = mask.masked_fill(~visible, torch.finfo(tokens.dtype).min)[:, None]
        for layer in layers:
            tokens = layer(tokens, attention_mask=mask)
        return tokens

    def _project(self, tokens: torch.Tensor) -> torch.Tensor:
        assert self.projection is not None
        return self.projection(self.vision_model.post_layernorm(tokens))

    def _embed(self, images: torch.Tensor) -> torch.Tensor:
        """Square images -> patch embeddings `(batch_size, grid_size, grid_size, hidden_size)`."""
        embeds = self.vision_model.embeddings(images, interpolate_pos_encoding=True)
        if not self.is_siglip:
            embeds = self.vision_model.pre_layrnorm(embeds[:, 1:])
        return embeds.unflatten(1, (-1, images.shape[-1] // self.patch_size))

    def _class_tokens(self, batch_size: int, number: int) -> torch.Tensor:
        """A CLIP's class token before the first layer, `(batch_size, number, hidden_size)`."""
        embeddings = self.vision_model.embeddings
        token = embeddings.class_embedding + embeddings.position_embedding.weight[0]
        return self.vision_model.pre_layrnorm(token).expand(batch_size, number, -1)

    def _normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Replaces the normalization of `pixel_values` by the tower's."""
        scale, shift = (
            torch.tensor(values, device=images.device)[:, None, None]
            for values in (self.config.clip_pixel_scale, self.config.clip_pixel_shift)
        )
        return images * scale + shift


def bicubic_weights(sizes: torch.Tensor, length: int, target: int) -> torch.Tensor:
    r"""
    Weights of bicubic interpolation along one axis, with antialiasing: those of `torch.nn.functional.interpolate` with
    `mode="bicubic"` and `antialias=True`.

    sizes (`torch.Tensor` of shape `(batch_size,)`):
        Number of pixels of each image along the axis. The pixels after them are padding, which has weight 0.
    length (`int`):
        Number of pixels with padding.
    target (`int`):
        Number of pixels of the result.

    Returns `(batch_size, target, length)`, `float32`.
    """
    sizes = sizes.float()[:, None, None]
    pixels = torch.arange(length, device=sizes.device)
    scale = sizes / target
    centers = (torch.arange(target, device=sizes.device)[:, None] + 0.5) * scale
    distance = ((pixels + 0.5 - centers) / scale.clamp_min(1)).abs()
    # Keys' cubic convolution with a = -0.5.
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
    weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0)) * (pixels < sizes)
    return weights / weights.sum(dim=-1, keepdim=True)


def replace_attention_by_values(vision_model: CLIPVisionModel, tokens: torch.Tensor) -> torch.Tensor:
    """
    Patch tokens `(..., hidden_size)` before the last layer of a CLIP -> patch tokens to be projected like its class
    token. In the last layer, the attention returns each token's own value, as in MaskCLIP (Zhou et al. 2022, arXiv
    2112.01071), but the MLP is skipped. MaskCLIP keeps it
    (https://github.com/chongzhou96/MaskCLIP/blob/245d31f/mmseg/models/backbones/vit.py#L96-L104). In the miniature,
    the mIoU is twice that of unmodified tokens.
    """
    layer = vision_model.encoder.layers[-1]
    return tokens + layer.self_attn.out_proj(layer.self_attn.v_proj(layer.layer_norm1(tokens)))


def project_siglip_patches(vision_model: SiglipVisionModel, tokens: torch.Tensor) -> torch.Tensor:
    """
    Patch tokens `(..., hidden_size)` after the last LayerNorm of a SigLIP -> features of the patches in the text
    space, `(..., hidden_size)`: the attention pooling head gets each patch as if it were the only one, as MaskCLIP
    does for CLIPs with attention pooling (Zhou et al. 2022, arXiv 2112.01071).
    """
    head, size = vision_model.head, tokens.shape[-1]
    # The projection to values is the last third of the attention's input projection.
    values = F.linear(tokens, head.attention.in_proj_weight[-size:], head.attention.in_proj_bias[-size:])
    pooled = head.attention.out_proj(values)
    return pooled + head.mlp(head.layernorm(pooled))


def to_image_grid(features: torch.Tensor, content_sizes: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
    r"""
    Resamples features of a tower, which cover the image without its padding, to the patches of the padded image.

    features (`torch.Tensor` of shape `(batch_size, channels, rows, columns)`):
        From [`SamClipTower.project_patches`].
    content_sizes (`torch.Tensor` of shape `(batch_size, 2)`):
        Height and width of each image without its padding, in patches of the padded image.
    grid_size (`tuple[int, int]`):
        Height and width of the padded images in patches.

    Returns `(batch_size, channels, grid_height, grid_width)`. Padding has the nearest value of the image.
    """
    rows, columns = (torch.arange(side, device=features.device) + 0.5 for side in grid_size)
    y, x = 2 * rows / content_sizes[:, :1] - 1, 2 * columns / content_sizes[:, 1:] - 1
    grid = torch.stack(
        [x[:, None, :].expand(-1, grid_size[0], -1), y[:, :, None].expand(-1, -1, grid_size[1])], dim=-1
    )
    resampled = F.grid_sample(
        features.float(), grid.float(), mode="bilinear", padding_mode="border", align_corners=False
    )
    return resampled.to(features.dtype)


def _disjoint_groups(inside: torch.Tensor) -> list[list[int]]:
    """Splits segments `(batch_size, num_segments, num_patches)` into groups of segments that do not overlap. Each
    segment is added to the first group that it fits (first-fit algorithm). Returns the indices of each group."""
    counts = inside.float()
    overlap = (counts @ counts.transpose(1, 2) > 0).any(dim=0).tolist()
    groups: list[list[int]] = []
    for number, row in enumerate(overlap):
        for group in groups:
            if not any(row[other] for other in group):
                group.append(number)
                break
        else:
            groups.append([number])
    return groups


__all__ = ["SamClipTower"]
