"""
The frozen teachers.

Teachers are in evaluation mode, have no gradients and are not saved in the student's checkpoint. Images for a teacher
have the teacher's resolution and normalization.
"""

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoImageProcessor, CLIPModel, PreTrainedModel, SamModel, SiglipModel, SiglipTextConfig

from ..clip_tower_samclip import SamClipTower
from ..configuration_samclip import SamClipConfig
from ..images import mean_and_std, normalize
from ..modeling_samclip import SamClipModel, load_teacher, patches_of_masks, tower_image_size


class Teacher(nn.Module):
    """
    A frozen model with the resolution, resampling filter and normalization of its image processor. It computes in
    float32, or in the precision of autocast, whatever the type of the saved weights.

    Args:
        model ([`PreTrainedModel`]):
            The model. Its `name_or_path` must contain an image processor.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        # Images are float32, and SAM's mask logits overflow float16.
        self.model = model.float().requires_grad_(False)
        self.eval()
        image_processor = AutoImageProcessor.from_pretrained(model.name_or_path)
        self.image_mean, self.image_std = mean_and_std(image_processor)
        self.resample = Image.Resampling(image_processor.resample)
        self.image_size: int = model.config.vision_config.image_size

    def train(self, mode: bool = True) -> "Teacher":
        """Keeps the teacher in evaluation mode."""
        return super().train(False)


def text_space(model: CLIPModel | SiglipModel | SamClipModel) -> Tensor:
    """Returns the weights `(projection_dim, hidden_size)` of the last layer of the text tower, which identify a text
    embedding space."""
    is_siglip = model.config.text_config.model_type == SiglipTextConfig.model_type
    projection = model.text_model.head if is_siglip else model.text_projection
    return projection.weight.detach().float().cpu()


def check_text_space(student: SamClipModel, first_values: Tensor) -> None:
    """
    Checks that student and CLIP teacher have the same text embedding space.

    Args:
        student ([`SamClipModel`]):
            The student.
        first_values (`torch.Tensor` of shape `(num_values,)`):
            The first values of the teacher's [`text_space`].

    Raises:
        ValueError: If the student has no text tower, or another one than the teacher.
    """
    if not student.config.has_text_tower:
        raise ValueError("The student has no text tower. Train a checkpoint that includes the text tower.")
    student_values = text_space(student).flatten()[: len(first_values)]
    if student_values.shape != first_values.shape or not torch.allclose(student_values, first_values, atol=1e-2):
        raise ValueError(
            "The student's text tower is not the text tower of this CLIP teacher: image and text embeddings of the "
            "student would not match. Set clip_teacher to the CLIP that the student was built from."
        )


class ClipTeacher(Teacher):
    r"""
    The CLIP teacher.

    Args:
        name_or_path (`str`):
            A `CLIPModel` or `SiglipModel` on the Hub or in a folder.
    """

    def __init__(self, name_or_path: str):
        super().__init__(load_teacher((CLIPModel, SiglipModel), name_or_path, "clip_teacher"))
        self.text_space = text_space(self.model)

    def check(self, student: SamClipModel) -> None:
        """Raises `ValueError` if the student's text embedding space is not the teacher's."""
        student_dim, teacher_dim = student.config.clip_head_config.projection_dim, len(self.text_space)
        if student_dim != teacher_dim:
            raise ValueError(
                f"The student's text embedding space has {student_dim} dimensions, the CLIP teacher's {teacher_dim}. "
                "Set clip_teacher to the CLIP that the student was built from, or build a new student."
            )
        check_text_space(student, self.text_space.flatten())

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        r"""
        Args:
            images (`torch.Tensor` of type uint8 and shape `(batch_size, 3, image_size, image_size)`):
                Images at the teacher's resolution.

        Returns:
            `torch.Tensor` of shape `(batch_size, projection_dim)`: Image embeddings, not normalized.
        """
        pixel_values = normalize(images, self.image_mean, self.image_std)
        return self.model.get_image_features(pixel_values=pixel_values).pooler_output


class RegionTeacher(nn.Module):
    r"""
    The vision tower of the CLIP teacher as it embeds segments in an unmerged model: in all layers, the patches of a
    segment attend only to each other. One pass of the tower embeds all regions of an image that do not overlap.

    Args:
        teacher ([`ClipTeacher`]):
            The CLIP teacher, whose weights are used.
        image_size (`int`, *optional*):
            Side in pixels to which images are resized without their padding. By default that of
            [`SamClipModel.from_teachers`].

    Raises:
        ValueError: If `image_size` is not a multiple of the teacher's patch size.
    """

    def __init__(self, teacher: ClipTeacher, image_size: int | None = None):
        super().__init__()
        vision_config = teacher.model.config.vision_config
        if image_size is not None and image_size % vision_config.patch_size:
            raise ValueError(
                f"region_image_size must be a multiple of the CLIP teacher's patch size, {vision_config.patch_size}: "
                f"got {image_size}."
            )
        config = SamClipConfig(
            text_config=teacher.model.config.text_config.to_dict(),
            clip_head_config={"projection_dim": len(teacher.text_space)},
            clip_vision_config=vision_config.to_dict(),
            clip_image_size=tower_image_size(vision_config) if image_size is None else image_size,
            clip_pixel_scale=[1.0] * 3,  # the images have the teacher's normalization
            clip_pixel_shift=[0.0] * 3,
        )
        with torch.device("meta"):
            self.tower = SamClipTower(config)
        self.tower.vision_model = teacher.model.vision_model
        self.tower.projection = getattr(teacher.model, "visual_projection", None)
        self.image_mean, self.image_std = teacher.image_mean, teacher.image_std
        self.grid_size = (self.tower.image_size // self.tower.patch_size,) * 2

    @torch.no_grad()
    def forward(self, images: Tensor, content_sizes: Tensor, region_masks: Tensor) -> Tensor:
        r"""
        Args:
            images (`torch.Tensor` of type uint8 and shape `(batch_size, 3, image_size, image_size)`):
                Images that are padded on the right and at the bottom.
            content_sizes (`torch.Tensor` of shape `(batch_size, 2)`):
                Height and width of each image without its padding.
            region_masks (`torch.Tensor` of type uint8 and shape `(batch_size, num_regions, mask_size, mask_size)`):
                Masks on the padded images, from 0 to 255.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_regions, projection_dim)`: Embeddings, not normalized. Values for
            empty masks are undefined.
        """
        pixel_values = normalize(images, self.image_mean, self.image_std)
        patch_embeds = self.tower.encode_pixels(pixel_values, content_sizes)
        segments = []
        for masks, (height, width) in zip(region_masks.float() / 255, content_sizes.tolist(), strict=True):
            # The tower's grid covers the image, and the masks cover its padding too.
            covered = (
                self.grid_size[0] * images.shape[-2] / height,
                self.grid_size[1] * images.shape[-1] / width,
            )
            segments.append(patches_of_masks(masks, covered, self.grid_size))
        return self.tower.pool_segments(patch_embeds, torch.stack(segments))


class SamTeacher(Teacher):
    r"""
    The SAM teacher.

    Args:
        name_or_path (`str`):
            A `SamModel` on the Hub or in a folder.
    """

    def __init__(self, name_or_path: str):
        super().__init__(load_teacher((SamModel,), name_or_path, "sam_teacher"))

    def check(self, student: SamClipModel) -> None:
        """Raises `ValueError` if the student's masks have another size or number than the teacher's."""
        teacher_config, student_config = self.model.config, student.config
        teacher_patch, student_patch = teacher_config.vision_config.patch_size, student_config.vision_config.patch_size
        if teacher_patch != student_patch:
            raise ValueError(
                f"The SAM teacher's patch size is {teacher_patch} px, the student's {student_patch} px, so their "
                "masks differ in size. Set sam_teacher to a SAM with the student's patch size."
            )
        teacher_masks = teacher_config.mask_decoder_config.num_multimask_outputs
        student_masks = student_config.mask_decoder_config.num_multimask_outputs
        if teacher_masks != student_masks:
            raise ValueError(
                f"The SAM teacher predicts {teacher_masks} masks for a point, the student {student_masks}. Set "
                "sam_teacher to the SAM that the student was built from."
            )

    @torch.no_grad()
    def forward(self, images: Tensor, content_sizes: Tensor, **prompts) -> tuple[Tensor, Tensor]:
        r"""
        Args:
            images (`torch.Tensor` of type uint8 and shape `(batch_size, 3, image_size, image_size)`):
                Images that are padded on the right and at the bottom.
            content_sizes (`torch.Tensor` of shape `(batch_size, 2)`):
                Height and width of each image without its padding.
            prompts:
                Prompts of [`SamModel`]: `input_points` and `input_labels`, or `input_boxes`; `multimask_output`;
                `input_masks` `(batch_size, num_prompts, height, width)`, one for each prompt.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Mask logits `(batch_size, num_prompts, num_masks, height, width)` and
            predicted IoUs `(batch_size, num_prompts, num_masks)`.
        """
        pixel_values = normalize(images, self.image_mean, self.image_std, content_sizes)
        if "input_masks" not in prompts:
            outputs = self.model(pixel_values=pixel_values, **prompts)
            return outputs.pred_masks, outputs.iou_scores
        # [`SamModel`] takes one mask for each image: every prompt becomes an image.
        size = prompts["input_masks"].shape[:2]
        prompts = {name: p.flatten(0, 1)[:, None] if isinstance(p, Tensor) else p for name, p in prompts.items()}
        image_embeddings = self.model.get_image_embeddings(pixel_values).repeat_interleave(size[1], dim=0)
        outputs = self.model(image_embeddings=image_embeddings, **prompts)
        return outputs.pred_masks[:, 0].unflatten(0, size), outputs.iou_scores[:, 0].unflatten(0, size)
