"""What a model can do on fixed sets of scenes; teachers and students are measured by the same functions.

Every figure is in [0, 1]. Nothing here trains, and nothing here knows which model it is given.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .scenes import (
    BACKGROUND_PROMPTS,
    CLASS_NAMES,
    HELD_OUT,
    TEMPLATES,
    Scene,
    evaluation_scene,
    render,
)


def classification_scenes(num_scenes: int = 480, seed: int = 101) -> list[Scene]:
    """Single objects, balanced over all classes, held-out pairs included."""
    return [evaluation_scene(seed, index) for index in range(num_scenes)]


def segmentation_scenes(num_scenes: int = 200, seed: int = 102) -> list[Scene]:
    """Scenes of one to four objects of any class."""
    return [render(seed, index, num_objects=1 + index % 4) for index in range(num_scenes)]


def class_embeddings(
    model, processor, names: Sequence[str] = CLASS_NAMES, templates: Sequence[str] = TEMPLATES
) -> Tensor:
    """One unit vector per name, the mean over templates of unit text embeddings: `(len(names), projection_dim)`."""
    texts = [template.format(name) for name in names for template in templates]
    inputs = processor(text=texts, padding=True, return_tensors="pt").to(model.device)
    with torch.inference_mode():
        text_embeds = F.normalize(_features(model.get_text_features(**inputs)), dim=-1)
    return F.normalize(text_embeds.unflatten(0, (len(names), len(templates))).mean(dim=1), dim=-1)


def zero_shot_top1(
    model, processor, scenes: Sequence[Scene], images_kwargs: dict | None = None, batch_size: int = 64
) -> dict[str, float]:
    """Zero-shot classification of single-object scenes over all class names, `TEMPLATES` averaged.

    Args:
        model: anything with `get_image_features` and `get_text_features` in transformers' style.
        images_kwargs (`dict`, *optional*): passed to the processor with the images, e.g. another size.

    Returns:
        `{"seen": accuracy, "held_out": accuracy}`; both choose among all 48 names.
    """
    text_embeds = class_embeddings(model, processor)
    predicted = []
    for start in range(0, len(scenes), batch_size):
        images = [scene.image for scene in scenes[start : start + batch_size]]
        inputs = processor(images=images, return_tensors="pt", **(images_kwargs or {}))
        with torch.inference_mode():
            image_embeds = _features(model.get_image_features(inputs["pixel_values"].to(model.device)))
        predicted.append((image_embeds @ text_embeds.T).argmax(dim=-1).cpu())
    truth = torch.tensor([scene.class_ids[0] for scene in scenes])
    correct = torch.cat(predicted) == truth
    held_out = torch.isin(truth, torch.tensor(HELD_OUT))
    return {"seen": correct[~held_out].double().mean().item(), "held_out": correct[held_out].double().mean().item()}


def _features(output) -> Tensor:
    # transformers 5 returns an output object whose pooler_output is projected; a plain tensor is taken as it is.
    return output if isinstance(output, Tensor) else output.pooler_output


def random_point(mask: np.ndarray, seed: int) -> tuple[int, int]:
    """A seeded uniformly random visible pixel `(x, y)`: as a hasty user clicks, harder than the object's middle."""
    rows, columns = np.nonzero(mask)
    chosen = np.random.default_rng(seed).integers(len(rows))
    return int(columns[chosen]), int(rows[chosen])


def bounding_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """The tight box `(x1, y1, x2, y2)` around the visible pixels, last pixel included."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])


def prompted_miou(model, processor, scenes: Sequence[Scene], prompt: str) -> float:
    """Mean over all objects of the IoU between the truth and the mask found from one prompt, at 128 px.

    `prompt="point"`: one seeded random pixel of the object; of three masks the one with the highest predicted IoU.
    `prompt="box"`: the tight box and a single mask.
    """
    ious = []
    for index, scene in enumerate(scenes):
        if not len(scene.masks):
            continue
        if prompt == "point":
            points = [[list(random_point(mask, seed=index * 8 + number))] for number, mask in enumerate(scene.masks)]
            inputs = processor(images=scene.image, input_points=[points], return_tensors="pt")
        elif prompt == "box":
            boxes = [[list(map(float, bounding_box(mask))) for mask in scene.masks]]
            inputs = processor(images=scene.image, input_boxes=boxes, return_tensors="pt")
        else:
            raise ValueError(f'`prompt` is "point" or "box", not {prompt!r}')
        keywords = {
            name: inputs[name].float() for name in ("pixel_values", "input_points", "input_boxes") if name in inputs
        }
        with torch.inference_mode():
            outputs = model(
                **{name: value.to(model.device) for name, value in keywords.items()},
                multimask_output=prompt == "point",
            )
        best = outputs.iou_scores[0].argmax(dim=-1)
        logits = outputs.pred_masks[0][torch.arange(len(best), device=best.device), best]
        logits = F.interpolate(logits[None], size=scene.masks.shape[1:], mode="bilinear", align_corners=False)[0]
        predicted, truth = (logits > 0).cpu().numpy(), scene.masks
        intersection = (predicted & truth).sum(axis=(1, 2))
        ious.extend(intersection / (predicted | truth).sum(axis=(1, 2)))
    return float(np.mean(ious))


def semantic_miou(
    predict: Callable[[list[Image.Image]], np.ndarray], scenes: Sequence[Scene], batch_size: int = 32
) -> float:
    """Mean IoU over background and all classes that occur in truth or prediction, from one confusion matrix.

    Args:
        predict: images of one size to label maps `(num_images, height, width)`; 0 background, else `class_id + 1`.
    """
    num_labels = len(CLASS_NAMES) + 1
    confusion = np.zeros((num_labels, num_labels), dtype=np.int64)
    for start in range(0, len(scenes), batch_size):
        batch = scenes[start : start + batch_size]
        predicted = np.asarray(predict([Image.fromarray(scene.image) for scene in batch]))
        truth = np.stack([scene.label_map for scene in batch])
        confusion += np.bincount((truth * num_labels + predicted).ravel(), minlength=num_labels**2).reshape(
            num_labels, num_labels
        )
    intersection = np.diag(confusion)
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - intersection
    return float((intersection[union > 0] / union[union > 0]).mean())


def teacher_patches(
    model, processor, size: int = 96, own_values: bool = True
) -> Callable[[list[Image.Image]], np.ndarray]:
    """Text segmentation by a `CLIPModel`'s own patch tokens: the predictor a student's dense head has to beat.

    Patch tokens pass the layer norm and the projection of the pooled token and are compared with every class name and
    every background prompt; the scores are upscaled bilinearly and the best wins (SAM-CLIP, section 4.3).

    Args:
        size (`int`): input side in pixels; position embeddings are interpolated when it is not the model's own. The
            miniature teacher does best at 96, half again its own 64.
        own_values (`bool`): in the last layer each token takes its own value instead of attending, and skips the MLP,
            in the manner of MaskCLIP (Zhou et al. 2022). It is the teacher at its best; plain tokens are about half
            as good.
    """
    vision = model.vision_model
    last = vision.encoder.layers[-1]
    text_embeds = torch.cat([class_embeddings(model, processor), background_embeddings(model, processor)])

    def predict(images: list[Image.Image]) -> np.ndarray:
        keywords = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
        pixel_values = processor(images=images, return_tensors="pt", **keywords)["pixel_values"].to(model.device)
        with torch.inference_mode():
            outputs = vision(pixel_values, interpolate_pos_encoding=True, output_hidden_states=True)
            if own_values:
                tokens = outputs.hidden_states[-2]
                tokens = tokens + last.self_attn.out_proj(last.self_attn.v_proj(last.layer_norm1(tokens)))
            else:
                tokens = outputs.last_hidden_state
            patch_embeds = F.normalize(model.visual_projection(vision.post_layernorm(tokens[:, 1:])), dim=-1)
            side = size // model.config.vision_config.patch_size
            scores = (patch_embeds @ text_embeds.T).transpose(1, 2).unflatten(2, (side, side))
        return label_maps(scores, images[0].height, images[0].width)

    return predict


def background_embeddings(model, processor) -> Tensor:
    """Unit text embeddings of `BACKGROUND_PROMPTS`: `(6, projection_dim)`."""
    return class_embeddings(model, processor, names=BACKGROUND_PROMPTS, templates=("{}",))


def label_maps(scores: Tensor, height: int, width: int) -> np.ndarray:
    """Scores of 48 classes and then of any number of background prompts to label maps.

    Args:
        scores: `(batch_size, 48 + num_background_prompts, grid_height, grid_width)`.

    Returns:
        `(batch_size, height, width)`: 0 background, `class_id + 1` elsewhere.
    """
    scores = F.interpolate(scores.float(), size=(height, width), mode="bilinear", align_corners=False)
    labels = scores.argmax(dim=1) + 1
    labels[labels > len(CLASS_NAMES)] = 0
    return labels.cpu().numpy()


def nearest_colour(num_scenes: int = 480, seed: int = 103) -> Callable[[list[Image.Image]], np.ndarray]:
    """The baseline without learning: each pixel takes the class, or the background, of the nearest mean colour.

    The means are over the pixels of `num_scenes` single-object scenes, one per class and one per kind of background.
    What this reaches is what can be had from raw colour.
    """
    scenes = [evaluation_scene(seed, index) for index in range(num_scenes)]
    groups: dict[tuple[int, str], list[np.ndarray]] = {}
    for scene in scenes:
        groups.setdefault((scene.class_ids[0] + 1, ""), []).append(scene.image[scene.masks[0]])
        groups.setdefault((0, scene.background), []).append(scene.image[~scene.masks[0]])
    labels = np.array([label for label, _ in groups])
    means = np.stack([np.concatenate(pixels).mean(axis=0) for pixels in groups.values()]).astype(np.float32)

    def predict(images: list[Image.Image]) -> np.ndarray:
        pixels = np.stack([np.asarray(image) for image in images]).astype(np.float32)
        # |p - m|^2 without |p|^2, which is the same for all means.
        return labels[((means**2).sum(axis=1) - 2 * pixels @ means.T).argmin(axis=-1)]

    return predict
