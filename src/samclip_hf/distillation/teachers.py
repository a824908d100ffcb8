"""
The frozen teachers. They live beside the student, in evaluation mode and without gradients, and never enter its
checkpoint; each sees images at its own size and with its own normalisation.
"""

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoImageProcessor, CLIPModel, PreTrainedModel, SamModel, SiglipModel, SiglipTextConfig

from ..modeling_samclip import SamClipModel, load_teacher


def normalize(images: Tensor, mean: list[float], std: list[float], content_sizes: Tensor | None = None) -> Tensor:
    r"""
    What a model's image processor does after resizing, on the device.

    images (`torch.Tensor` of type uint8 and shape `(batch_size, 3, height, width)`):
        Already of the model's size.
    mean, std (`list[float]`):
        Of each channel, in [0, 1].
    content_sizes (`torch.Tensor` of shape `(batch_size, 2)`, *optional*):
        Height and width of each picture in the upper left corner; the rest becomes 0, as SAM pads after normalising.

    Returns `pixel_values` of the same shape.
    """
    mean_, std_ = (torch.tensor(values, device=images.device)[:, None, None] * 255 for values in (mean, std))
    pixel_values = (images - mean_) / std_
    if content_sizes is not None:
        rows, columns = (torch.arange(side, device=images.device) for side in images.shape[-2:])
        inside = (rows < content_sizes[:, :1])[:, :, None] & (columns < content_sizes[:, 1:])[:, None, :]
        pixel_values = pixel_values * inside[:, None]
    return pixel_values


class Teacher(nn.Module):
    """A frozen `model` that stays in evaluation mode, with what its own image processor says about resizing and
    normalisation."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model.requires_grad_(False)
        self.eval()
        image_processor = AutoImageProcessor.from_pretrained(model.name_or_path)
        self.image_mean: list[float] = image_processor.image_mean
        self.image_std: list[float] = image_processor.image_std
        self.resample = Image.Resampling(image_processor.resample)
        self.image_size: int = model.config.vision_config.image_size

    def train(self, mode: bool = True) -> "Teacher":
        return super().train(False)


def text_space(model: CLIPModel | SiglipModel | SamClipModel) -> Tensor:
    """What tells text spaces apart: the weights `(projection_dim, hidden_size)` of a text tower's last layer."""
    is_siglip = model.config.text_config.model_type == SiglipTextConfig.model_type
    projection = model.text_model.head if is_siglip else model.text_projection
    return projection.weight.detach().float().cpu()


def check_text_space(student: SamClipModel, first_values: Tensor) -> None:
    """Raises `ValueError` where the student's `text_space` does not begin with these values."""
    if not student.config.has_text_tower:
        raise ValueError("The student's text tower was left out: train the checkpoint that still has it.")
    own = text_space(student).flatten()[: len(first_values)]
    if own.shape != first_values.shape or not torch.allclose(own, first_values, atol=1e-2):
        raise ValueError(
            "The student's text tower is not this CLIP teacher's, so that images would be taught another text space "
            "than the student's texts. Name the CLIP that the student was built from as clip_teacher."
        )


class ClipTeacher(Teacher):
    r"""
    name_or_path (`str`):
        Any `CLIPModel` or `SiglipModel` on the Hub or in a folder.
    """

    def __init__(self, name_or_path: str):
        super().__init__(load_teacher((CLIPModel, SiglipModel), name_or_path, "clip_teacher"))
        self.text_space = text_space(self.model)

    def check(self, student: SamClipModel) -> None:
        """Raises `ValueError` where the student's text space is not this teacher's."""
        student_dim, own_dim = student.config.clip_head_config.projection_dim, len(self.text_space)
        if student_dim != own_dim:
            raise ValueError(
                f"The student's text space has {student_dim} dimensions, the CLIP teacher's {own_dim}: the student "
                "was built from another CLIP. Name that one as clip_teacher, or build a new student."
            )
        check_text_space(student, self.text_space.flatten())

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Embeddings `(batch_size, projection_dim)` of uint8 images `(batch_size, 3, image_size, image_size)`."""
        pixel_values = normalize(images, self.image_mean, self.image_std)
        return self.model.get_image_features(pixel_values=pixel_values).pooler_output


class SamTeacher(Teacher):
    r"""
    name_or_path (`str`):
        Any `SamModel` on the Hub or in a folder.
    """

    def __init__(self, name_or_path: str):
        super().__init__(load_teacher((SamModel,), name_or_path, "sam_teacher"))

    def check(self, student: SamClipModel) -> None:
        """Raises `ValueError` where the student's masks cannot be compared with this teacher's."""
        own_patch, student_patch = self.model.config.vision_config.patch_size, student.config.vision_config.patch_size
        if own_patch != student_patch:
            raise ValueError(
                f"The SAM teacher's patches are {own_patch} px wide and the student's {student_patch} px, so their "
                "masks differ in size. Name a sam_teacher with the student's patch size."
            )
        own_masks = self.model.config.mask_decoder_config.num_multimask_outputs
        student_masks = student.config.mask_decoder_config.num_multimask_outputs
        if own_masks != student_masks:
            raise ValueError(
                f"The SAM teacher answers a point with {own_masks} masks and the student with {student_masks}. Name "
                "the SAM that the student was built from as sam_teacher."
            )

    @torch.no_grad()
    def forward(self, images: Tensor, content_sizes: Tensor, **prompts) -> tuple[Tensor, Tensor]:
        """Mask logits `(batch_size, num_prompts, num_masks, height, width)` and predicted IoUs `(batch_size,
        num_prompts, num_masks)` of uint8 images `(batch_size, 3, image_size, image_size)`; prompts as in
        [`SamModel`]."""
        pixel_values = normalize(images, self.image_mean, self.image_std, content_sizes)
        outputs = self.model(pixel_values=pixel_values, **prompts)
        return outputs.pred_masks, outputs.iou_scores
