"""
The frozen teachers. They live beside the student, in evaluation mode and without gradients, and never enter its
checkpoint; each sees images at its own size and with its own normalisation.
"""

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, CLIPModel, SamModel

from ..modeling_samclip import SamClipModel, load_teacher
from .collation import ImageFormat


class ClipTeacher(nn.Module):
    r"""
    name_or_path (`str`):
        Any `CLIPModel` on the Hub or in a folder.
    """

    def __init__(self, name_or_path: str):
        super().__init__()
        self.model = load_teacher(CLIPModel, name_or_path, "clip_teacher").requires_grad_(False).eval()
        image_processor = AutoImageProcessor.from_pretrained(name_or_path)
        self.mean, self.std = image_processor.image_mean, image_processor.image_std
        self.image_size: int = self.model.config.vision_config.image_size
        self.projection_dim: int = self.model.config.projection_dim

    def train(self, mode: bool = True) -> "ClipTeacher":
        """Stays in evaluation mode."""
        return super().train(False)

    def check(self, student: SamClipModel) -> None:
        """Raises `ValueError` where the student's text space is not this teacher's."""
        projection_dim = student.config.clip_head_config.projection_dim
        if projection_dim != self.projection_dim:
            raise ValueError(
                f"The student's text space has {projection_dim} dimensions, the CLIP teacher's {self.projection_dim}: "
                "the student was built from another CLIP. Name that one as clip_teacher, or build a new student."
            )

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Tensor:
        """Embeddings `(batch_size, projection_dim)` of images `(batch_size, 3, image_size, image_size)` under this
        teacher's normalisation."""
        return self.model.get_image_features(pixel_values=pixel_values).pooler_output


class SamTeacher(nn.Module):
    r"""
    name_or_path (`str`):
        Any `SamModel` on the Hub or in a folder.
    """

    def __init__(self, name_or_path: str):
        super().__init__()
        self.model = load_teacher(SamModel, name_or_path, "sam_teacher").requires_grad_(False).eval()
        image_processor = AutoImageProcessor.from_pretrained(name_or_path)
        self.mean, self.std = image_processor.image_mean, image_processor.image_std
        self.image_size: int = self.model.config.vision_config.image_size

    def train(self, mode: bool = True) -> "SamTeacher":
        """Stays in evaluation mode."""
        return super().train(False)

    def check(self, student: SamClipModel, image_format: ImageFormat) -> None:
        """Raises `ValueError` where this teacher cannot answer the student's prompts on the student's images."""
        own, other = self.model.config.vision_config, student.config.vision_config
        if (own.patch_size, own.image_size) != (other.patch_size, other.image_size):
            raise ValueError(
                f"The SAM teacher sees {own.image_size} px in patches of {own.patch_size}, the student "
                f"{other.image_size} px in patches of {other.patch_size}, so that their masks differ in size. Name a "
                "sam_teacher with the student's sizes."
            )
        if (self.mean, self.std) != (image_format.mean, image_format.std):
            # Both see the same padded batch, in which zeros are the padding.
            raise ValueError(
                f"The SAM teacher normalises images with mean {self.mean} and std {self.std}, the student with mean "
                f"{image_format.mean} and std {image_format.std}. Give the student the teacher's image processor."
            )
        tokens, own_tokens = student.mask_decoder.num_mask_tokens, self.model.mask_decoder.num_mask_tokens
        if tokens != own_tokens:
            raise ValueError(f"The SAM teacher predicts {own_tokens - 1} masks a point, the student {tokens - 1}.")

    @torch.no_grad()
    def forward(self, pixel_values: Tensor, **prompts) -> tuple[Tensor, Tensor]:
        """Mask logits `(batch_size, num_prompts, num_masks, height, width)` and predicted IoUs of images
        `(batch_size, 3, image_size, image_size)` under this teacher's normalisation; prompts as in `SamModel`."""
        outputs = self.model(pixel_values=pixel_values, **prompts)
        return outputs.pred_masks, outputs.iou_scores
