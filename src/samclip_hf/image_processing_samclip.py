"""
SAM-CLIP's image processor: SAM's, at any size, with the post-processing of text-labelled segments.

`SamClipImageProcessor` runs on torchvision, `SamClipImageProcessorPil` on PIL and numpy for installations without it.
"""

import torch
import torch.nn.functional as F
from transformers import SamImageProcessorPil
from transformers.utils import is_torchvision_available

# Labels are compared in chunks, so that memory grows with the picture and not with the picture times the vocabulary.
LABELS_PER_CHUNK = 16


class SamClipPostProcessing:
    """What both image processors add to SAM's."""

    def preprocess(self, images, segmentation_maps=None, size=None, pad_size=None, **kwargs):
        r"""
        As SAM's: longest edge to `size`, bottom and right padded to a square. Differs in one thing: a `size` for this
        call alone pads to that size.
        """
        if size is not None and pad_size is None:
            edge = size if isinstance(size, int) else size["longest_edge"]
            pad_size = {"height": edge, "width": edge}
            size = {"longest_edge": edge}
        if size is not None:
            kwargs["size"] = size
        if pad_size is not None:
            kwargs["pad_size"] = pad_size
        return super().preprocess(images, segmentation_maps, **kwargs)

    def post_process_semantic_segmentation(
        self, outputs, target_sizes: list[tuple[int, int]] | None = None
    ) -> list[torch.Tensor]:
        r"""
        The most probable label of every pixel.

        outputs ([`SamClipSegmentationOutput`]):
            Of [`SamClipForImageSegmentation`].
        target_sizes (`list[tuple[int, int]]`, *optional*):
            Height and width of every image, usually its original size. By default, those of the logits.

        Returns, per image, labels of type `torch.int64` and shape `(height, width)`.
        """
        if target_sizes is not None and len(target_sizes) != len(outputs.logits):
            raise ValueError(f"Got {len(target_sizes)} target_sizes for {len(outputs.logits)} images.")
        label_maps = []
        for index, logits in enumerate(outputs.logits):
            content_size = outputs.content_sizes[index].tolist()
            target_size = content_size if target_sizes is None else target_sizes[index]
            target_size = [round(side) for side in target_size]
            best_logit = torch.full(target_size, -torch.inf, device=logits.device)
            best_label = torch.zeros(target_size, dtype=torch.int64, device=logits.device)
            for start in range(0, len(logits), LABELS_PER_CHUNK):
                chunk = resize_content(logits[start : start + LABELS_PER_CHUNK].float(), content_size, target_size)
                logit, label = chunk.max(dim=0)
                best_label = torch.where(logit > best_logit, label + start, best_label)
                best_logit = torch.maximum(logit, best_logit)
            label_maps.append(best_label)
        return label_maps


def resize_content(maps: torch.Tensor, content_size, target_size) -> torch.Tensor:
    r"""
    The picture's part of `maps`, without the padding, bilinearly resized.

    maps (`torch.Tensor` of shape `(channels, height, width)`):
        With the picture in the upper left corner.
    content_size (`tuple[float, float]`):
        Height and width of that corner in cells, fractions allowed.
    target_size (`tuple[int, int]`):
        Height and width of the result `(channels, target_height, target_width)`.
    """
    coordinates = [
        # Centre of each target pixel, from cells to the range -1 .. 1 of grid_sample.
        ((torch.arange(int(target), device=maps.device) + 0.5) * content / target) * 2 / side - 1
        for target, content, side in zip(target_size, content_size, maps.shape[1:], strict=True)
    ]
    y, x = torch.meshgrid(*coordinates, indexing="ij")
    grid = torch.stack([x, y], dim=-1)[None].to(maps.dtype)
    return F.grid_sample(maps[None], grid, mode="bilinear", padding_mode="border", align_corners=False)[0]


class SamClipImageProcessorPil(SamClipPostProcessing, SamImageProcessorPil):
    pass


if is_torchvision_available():
    from transformers import SamImageProcessor

    class SamClipImageProcessor(SamClipPostProcessing, SamImageProcessor):
        pass

else:
    SamClipImageProcessor = SamClipImageProcessorPil  # type: ignore[misc]


__all__ = ["SamClipImageProcessor", "SamClipImageProcessorPil"]
