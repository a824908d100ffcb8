"""
SAM-CLIP's image processor: SAM's, at any size, with the post-processing of text-labelled segments.

`SamClipImageProcessor` runs on torchvision, `SamClipImageProcessorPil` on PIL and numpy for installations without it.
"""

import torch
import torch.nn.functional as F
from transformers import SamImageProcessorPil
from transformers.utils import is_torchvision_available

# Maps of labels and of segments are resized in chunks of so many: memory grows with the picture, not with the picture
# times the vocabulary.
MAPS_PER_CHUNK = 16


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
        A label for every pixel. With both heads, that of the best segment it lies in, and background where there is
        none; without, or where the vocabulary has no background, the CLIP head's most probable one.

        outputs ([`SamClipSegmentationOutput`]):
            Of [`SamClipForImageSegmentation`].
        target_sizes (`list[tuple[int, int]]`, *optional*):
            Height and width of every image, usually its original size. By default, those of the segments' masks or,
            without, of the logits.

        Returns, per image, labels of type `torch.int64` and shape `(height, width)`.
        """
        label_maps = []
        for index, target_size in enumerate(_target_sizes(outputs, target_sizes)):
            background = int(outputs.background_label_ids[index])
            if outputs.get("segment_masks") is None or background < 0:
                content_size = _content_sizes(outputs, outputs.logits)[index]
                label_map, _ = _highest(outputs.logits[index], content_size, target_size)
            else:
                label_map = torch.full(target_size, background, device=outputs.logits.device)
            if outputs.get("segment_masks") is not None:
                segment, _ = _segment_map(outputs, index, target_size)
                labels = outputs.segment_logits[index].argmax(dim=-1)
                label_map = torch.where(segment >= 0, labels[segment], label_map)
            label_maps.append(label_map)
        return label_maps

    def post_process_instance_segmentation(
        self,
        outputs,
        threshold: float = 0.5,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.8,
        target_sizes: list[tuple[int, int]] | None = None,
    ) -> list[dict]:
        r"""
        Every segment by itself: [`post_process_panoptic_segmentation`] with nothing fused.
        """
        return self.post_process_panoptic_segmentation(
            outputs, threshold, mask_threshold, overlap_mask_area_threshold, target_sizes=target_sizes
        )

    def post_process_panoptic_segmentation(
        self,
        outputs,
        threshold: float = 0.5,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.8,
        label_ids_to_fuse: set[int] | None = None,
        target_sizes: list[tuple[int, int]] | None = None,
    ) -> list[dict]:
        r"""
        Segments that do not overlap, each with a label and a score; background is none of them.

        outputs ([`SamClipSegmentationOutput`]):
            Of [`SamClipForImageSegmentation`] with both heads.
        threshold (`float`, defaults to 0.5):
            Segments of a lower score are left out before pixels are given away. The score is the probability of the
            label among all labels of the vocabulary: it says how sure the name is, not how well drawn the mask.
        mask_threshold (`float`, defaults to 0.5):
            A pixel can belong to a mask from this probability on.
        overlap_mask_area_threshold (`float`, defaults to 0.8):
            A segment that better drawn ones have left less than this share of its mask is left out, and what it had
            left stays without a segment.
        label_ids_to_fuse (`set[int]`, *optional*):
            Labels of which there is one segment an image, such as sky: theirs become one, with the highest score.
        target_sizes (`list[tuple[int, int]]`, *optional*):
            Height and width of every image, usually its original size. By default, those of the masks.

        Returns, per image, `segmentation` of type `torch.int32` and shape `(height, width)`, 0 or a segment's id, and
        `segments_info`, a list of `id`, `label_id`, `was_fused` and `score`.
        """
        if outputs.get("segment_masks") is None:
            raise ValueError("Segments are drawn by the SAM head: call the model with both_heads=True.")
        results = []
        for index, target_size in enumerate(_target_sizes(outputs, target_sizes)):
            probability, label = outputs.segment_logits[index].softmax(dim=-1).max(dim=-1)
            chosen = (probability >= threshold) & (label != outputs.background_label_ids[index])
            segment, area = _segment_map(outputs, index, target_size, chosen, mask_threshold)
            segmentation = torch.zeros(target_size, dtype=torch.int32, device=segment.device)
            segments: list[dict] = []
            fused: dict[int, dict] = {}
            for number in segment.unique().tolist():
                own = segment == number
                if number < 0 or own.sum() < overlap_mask_area_threshold * area[number]:
                    continue
                label_id, score = int(label[number]), float(probability[number])
                info = fused.get(label_id)
                if info is None:
                    info = {"id": len(segments) + 1, "label_id": label_id, "was_fused": False, "score": score}
                    segments.append(info)
                    if label_id in (label_ids_to_fuse or ()):
                        info["was_fused"] = True
                        fused[label_id] = info
                info["score"] = max(info["score"], score)
                segmentation[own] = info["id"]
            results.append({"segmentation": segmentation, "segments_info": segments})
        return results

    def post_process_object_detection(
        self, outputs, threshold: float = 0.1, target_sizes: list[tuple[int, int]] | None = None
    ) -> list[dict[str, torch.Tensor]]:
        r"""
        Boxes around the segments that a text names.

        outputs ([`SamClipObjectDetectionOutput`]):
            Of [`SamClipForObjectDetection`].
        threshold (`float`, defaults to 0.1):
            Segments of a lower score are left out.
        target_sizes (`list[tuple[int, int]]`, *optional*):
            Height and width of every image, usually its original size. By default, those of the masks.

        Returns, per image, `scores` `(num_boxes,)`, best first, `boxes` `(num_boxes, 4)`, x1, y1, x2, y2 in pixels,
        and `labels` `(num_boxes,)`, all 0: there is one text.
        """
        results = []
        for index, target_size in enumerate(_target_sizes(outputs, target_sizes)):
            scores, order = outputs.object_scores[index].sort(descending=True, stable=True)
            order = order[scores > threshold]
            content_size = _content_sizes(outputs, outputs.segment_masks)[index]
            boxes, kept = [], []
            for number in order.tolist():
                mask = outputs.segment_masks[index, number : number + 1].float()
                rows, columns = (resize_content(mask, content_size, target_size)[0] > 0).nonzero(as_tuple=True)
                if len(rows):
                    boxes.append(torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]))
                    kept.append(number)
            results.append(
                {
                    "scores": outputs.object_scores[index, kept],
                    "boxes": torch.stack(boxes).float() if boxes else order.new_zeros(0, 4, dtype=torch.float32),
                    "labels": order.new_zeros(len(kept)),
                }
            )
        return results


def _content_sizes(outputs, maps: torch.Tensor) -> list[list[float]]:
    """Height and width of every image's content in cells of `maps` `(..., height, width)`."""
    return (outputs.content_sizes * maps.shape[-1] / outputs.logits.shape[-1]).tolist()


def _target_sizes(outputs, target_sizes) -> list[tuple[int, int]]:
    """Height and width of every image's result."""
    if target_sizes is None:
        maps = outputs.logits if outputs.get("segment_masks") is None else outputs.segment_masks
        target_sizes = _content_sizes(outputs, maps)
    if len(target_sizes) != len(outputs.logits):
        raise ValueError(f"Got {len(target_sizes)} target_sizes for {len(outputs.logits)} images.")
    return [(round(float(height)), round(float(width))) for height, width in target_sizes]


def _segment_map(
    outputs, index: int, target_size: tuple[int, int], chosen: torch.Tensor | None = None, mask_threshold: float = 0.5
) -> tuple[torch.Tensor, torch.Tensor]:
    """For one image, the number of the best segment of every pixel `(height, width)`, -1 where there is none, and the
    area of every segment's mask `(num_segments,)`. Only `chosen` segments `(num_segments,)` take part."""
    masks, scores = outputs.segment_masks[index], outputs.segment_scores[index]
    numbers = (scores > 0 if chosen is None else chosen & (scores > 0)).nonzero().flatten()
    area = torch.zeros_like(scores)

    def votes(start: int, chunk: torch.Tensor) -> torch.Tensor:
        own = numbers[start : start + len(chunk)]
        probability = chunk.sigmoid()
        inside = probability > mask_threshold
        area[own] = inside.flatten(1).sum(dim=1).to(area.dtype)
        return probability * inside * scores[own, None, None]

    segment, vote = _highest(masks[numbers], _content_sizes(outputs, masks)[index], target_size, votes)
    segment = torch.cat([numbers, numbers.new_tensor([-1])])[segment]
    return torch.where(vote > 0, segment, -1), area


def _highest(maps: torch.Tensor, content_size, target_size, transform=lambda start, chunk: chunk):
    """Which of the maps `(num_maps, height, width)` is the highest at every pixel of their content resized to
    `target_size`, and its value there. `transform` sees each resized chunk and the number of its first map."""
    highest = torch.full(target_size, -torch.inf, device=maps.device)
    number = torch.full(target_size, -1, dtype=torch.int64, device=maps.device)
    for start in range(0, len(maps), MAPS_PER_CHUNK):
        chunk = resize_content(maps[start : start + MAPS_PER_CHUNK].float(), content_size, target_size)
        value, index = transform(start, chunk).max(dim=0)
        number = torch.where(value > highest, index + start, number)
        highest = torch.maximum(value, highest)
    return number, highest


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
