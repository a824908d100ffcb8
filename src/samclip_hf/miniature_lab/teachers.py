"""
Trains the teachers of the miniature from scratch on procedural scenes: a `SamModel` and a `CLIPModel`.

    python -m samclip_hf.miniature_lab.teachers sam --output_dir runs/sam
    python -m samclip_hf.miniature_lab.teachers clip --output_dir runs/clip

Each takes about an hour on one CPU core.
"""

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    PreTrainedModel,
    ProcessorMixin,
    SamConfig,
    SamImageProcessor,
    SamModel,
    SamProcessor,
    get_cosine_schedule_with_warmup,
)

from ..evaluation import ClipAdapter, PromptedSegmentation, SamAdapter
from ..images import mask_to_prompt_box, normalize
from ..miniature.scenes import (
    BACKGROUND_PROMPTS,
    BACKGROUNDS,
    CLASS_NAMES,
    COLOURS,
    IMAGE_SIZE,
    PATTERNS,
    SEEN,
    TEMPLATES,
    Scene,
    describe,
    render,
)
from .tasks import Metrics, MiniatureClassification, evaluate, images_with_objects, labeled_images

TRAINING_SEED = 1_000_000  # first seed of training scenes; evaluation uses smaller seeds
WARMUP_FRACTION = 0.03  # of the optimizer steps
MIN_CROP_SIZE = 28  # pixels: two or three periods of a pattern
MIN_VISIBLE_FRACTION = 0.45  # more occlusion than in the evaluation scenes
MASK_SIZE = IMAGE_SIZE // 2  # of mask logits and mask prompts: four times the token grid, which has 8 px patches


# ---- SAM ----


def build_sam() -> tuple[SamModel, SamProcessor]:
    """Returns a `SamModel` of 1 million parameters for 128 px, initialized for training from scratch."""
    size = {"image_size": IMAGE_SIZE, "patch_size": 8}
    config = SamConfig(
        # The default initializer_range of 1e-10 is meant for loading checkpoints, not for training from scratch.
        vision_config={
            **size,
            "hidden_size": 128,
            "output_channels": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "window_size": 4,
            "global_attn_indexes": [1, 3],
            "num_pos_feats": 32,
            "initializer_range": 0.02,
        },
        prompt_encoder_config={**size, "hidden_size": 64},
        mask_decoder_config={
            "hidden_size": 64,
            "mlp_dim": 256,
            "num_attention_heads": 4,
            "iou_head_hidden_dim": 64,
        },
    )
    model = SamModel(config)
    with torch.no_grad():
        for module in (*model.prompt_encoder.modules(), *model.mask_decoder.modules()):
            # The original SAM uses PyTorch's default initialization. With transformers' standard deviation of 0.02,
            # the decoder needs about 1000 steps to distinguish box corners from points.
            if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d | nn.Embedding):
                module.reset_parameters()
        for layer in model.vision_encoder.layers:
            for linear in (layer.attn.qkv, layer.attn.proj, layer.mlp.lin1, layer.mlp.lin2):
                nn.init.xavier_uniform_(linear.weight)
            layer.attn.rel_pos_h.normal_(std=0.02)
            layer.attn.rel_pos_w.normal_(std=0.02)
        for convolution in (model.vision_encoder.patch_embed.projection, *model.vision_encoder.neck.children()):
            if isinstance(convolution, nn.Conv2d):
                convolution.reset_parameters()
        model.vision_encoder.pos_embed.normal_(std=0.02)
        # The original SAM scales the random Fourier features by 1. The scale in transformers, hidden_size / 2, is too
        # large for 16 x 16 tokens.
        model.shared_image_embedding.positional_embedding.normal_()
    model.shared_image_embedding.positional_embedding.requires_grad_(False)
    image_processor = SamImageProcessor(
        size={"longest_edge": IMAGE_SIZE},
        pad_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        mask_size={"longest_edge": MASK_SIZE},
        mask_pad_size={"height": MASK_SIZE, "width": MASK_SIZE},
    )
    return model, SamProcessor(image_processor)


def predict_masks(
    model: SamModel,
    image_embeddings: Tensor,
    points: Tensor | None = None,
    labels: Tensor | None = None,
    boxes: Tensor | None = None,
    masks: Tensor | None = None,
    multimask_output: bool = False,
) -> tuple[Tensor, Tensor]:
    """
    Runs SAM's prompt encoder and mask decoder with gradients. (`SamModel.get_prompt_embeddings` disables gradients.)

    Args:
        image_embeddings (`Tensor` of shape `(num_prompts, channels, height, width)`): One per prompt.
        points (`Tensor` of shape `(num_prompts, num_points, 2)`, *optional*): x and y in pixels.
        labels (`Tensor` of shape `(num_prompts, num_points)`, *optional*): 1 for foreground, 0 for background.
        boxes (`Tensor` of shape `(num_prompts, 4)`, *optional*): x1, y1, x2, y2 in pixels.
        masks (`Tensor` of shape `(num_prompts, 1, 64, 64)`, *optional*): Mask prompts, as logits.
        multimask_output (`bool`): Whether to return three masks instead of one.

    Returns:
        `tuple[Tensor, Tensor]`: Mask logits `(num_prompts, num_masks, 64, 64)` and predicted IoU
        `(num_prompts, num_masks)`.
    """
    sparse, dense = model.prompt_encoder(
        input_points=None if points is None else points[:, None],
        input_labels=None if labels is None else labels[:, None],
        input_boxes=None if boxes is None else boxes[:, None],
        input_masks=masks,
    )
    positions = model.get_image_wide_positional_embeddings().expand(len(image_embeddings), -1, -1, -1)
    logits, iou_scores = model.mask_decoder(
        image_embeddings=image_embeddings,
        image_positional_embeddings=positions,
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=multimask_output,
    )
    return logits[:, 0], iou_scores[:, 0]


def mask_loss(logits: Tensor, iou_scores: Tensor, target: Tensor) -> Tensor:
    """
    SAM's loss (Kirillov et al. 2023, appendix A): 20 x focal + dice of the best mask, and the squared error of the
    predicted IoU. In addition, 0.05 x the mean over all masks, so that every mask is trained.

    The focal weight is |target - p|^2, which extends the usual weight to soft targets.

    Args:
        logits (`Tensor` of shape `(num_prompts, num_masks, 64, 64)`): Mask logits.
        iou_scores (`Tensor` of shape `(num_prompts, num_masks)`): Predicted IoU.
        target (`Tensor` of shape `(num_prompts, 64, 64)`): Fraction of each cell that the object covers, in [0, 1].
    """
    target = target[:, None].expand_as(logits)
    probability = logits.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    focal = (cross_entropy * (target - probability).square()).mean(dim=(2, 3))
    overlap = (probability * target).sum(dim=(2, 3))
    dice = 1 - (2 * overlap + 1) / (probability.sum(dim=(2, 3)) + target.sum(dim=(2, 3)) + 1)
    per_mask = 20 * focal + dice
    with torch.no_grad():
        predicted, truth = logits > 0, target > 0.5
        iou = (predicted & truth).sum(dim=(2, 3)) / (predicted | truth).sum(dim=(2, 3)).clamp(min=1)
    return (per_mask.amin(dim=1) + 0.05 * per_mask.mean(dim=1) + (iou_scores - iou).square().mean(dim=1)).mean()


def noisy_mask_prompt(target: Tensor, generator: torch.Generator) -> Tensor:
    """
    Turns masks `(num_prompts, 64, 64)` into mask prompts `(num_prompts, 1, 64, 64)`: coarse logits with random errors,
    noise and scale. SAM-CLIP uses the patch logits of the CLIP head as mask prompts. A decoder that was not trained
    with such prompts predicts worse masks from them.
    """
    cells = (8, 16)[int(torch.randint(2, (), generator=generator))]
    coarse = F.adaptive_avg_pool2d(target[:, None], cells)
    shape = (len(target), 1, 1, 1)
    flips = torch.rand(coarse.shape, generator=generator) < 0.15 * torch.rand(shape, generator=generator)
    coarse = torch.where(flips, 1 - coarse, coarse) - 0.5
    coarse = coarse + 0.4 * torch.rand(shape, generator=generator) * torch.randn(coarse.shape, generator=generator)
    scale = 2 + 14 * torch.rand(shape, generator=generator)
    return scale * F.interpolate(coarse, size=target.shape[-2:], mode="bilinear", align_corners=False)


def error_point(logits: Tensor, target: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """
    Samples a point from the error region of each mask, as in SAM's interactive training.

    Args:
        logits (`Tensor` of shape `(num_prompts, 64, 64)`): Predicted mask logits.
        target (`Tensor` of shape `(num_prompts, 64, 64)`): The true masks.

    Returns:
        `tuple[Tensor, Tensor]`: Points `(num_prompts, 1, 2)` in pixels of the image, and their labels
        `(num_prompts, 1)`: 1 for a missed pixel, 0 for a false positive.
    """
    truth = target > 0.5
    wrong = (logits > 0) ^ truth
    weights = wrong.flatten(1).float() + 1e-6 * truth.flatten(1)
    chosen = torch.multinomial(weights + 1e-12, 1, generator=generator)
    labels = truth.flatten(1).gather(1, chosen).long()
    scale = IMAGE_SIZE / target.shape[-1]
    cells = torch.cat([chosen % target.shape[-1], chosen // target.shape[-1]], dim=1)
    return cells[:, None] * scale + scale / 2 - 0.5, labels


class DenseAuxiliary(nn.Module):
    """
    Auxiliary losses on the image embeddings, which speed up the start of the training: which pixels are foreground,
    which lie on an outline, and which pairs of tokens belong to the same object. Like SAM's masks, they need no class
    labels. The layers are discarded after the training.

    Args:
        channels (`int`): Channels of the image embeddings.
        cells (`int`): Predicted pixels per side of a token.
    """

    def __init__(self, channels: int, cells: int):
        super().__init__()
        self.cells = cells
        self.pixels = nn.Linear(channels, 2 * cells**2)
        self.affinity = nn.Linear(channels, 32)
        self.scale = nn.Parameter(torch.tensor([5.0, -2.0]))

    def forward(self, image_embeddings: Tensor, instance_maps: Tensor) -> Tensor:
        """
        Args:
            image_embeddings (`Tensor` of shape `(batch_size, channels, 16, 16)`): From SAM's image encoder.
            instance_maps (`Tensor` of shape `(batch_size, 128, 128)`): From `instance_map`.
        """
        side = image_embeddings.shape[-1]
        tokens = image_embeddings.flatten(2).transpose(1, 2)
        logits = F.pixel_shuffle(self.pixels(tokens).transpose(1, 2).unflatten(2, (side, side)), self.cells)
        smaller = instance_maps[:, ::2, ::2]
        # The outline: pixels that differ from the pixel above or on the left.
        edges = F.pad(
            (smaller[:, 1:] != smaller[:, :-1])[:, :, 1:] | (smaller[:, :, 1:] != smaller[:, :, :-1])[:, 1:],
            (1, 0, 1, 0),
        )
        truth = torch.stack([smaller > 0, edges], dim=1).float()
        step = instance_maps.shape[-1] // side
        owners = instance_maps[:, step // 2 :: step, step // 2 :: step].flatten(1)
        same = (owners[:, :, None] == owners[:, None, :]).float()
        directions = F.normalize(self.affinity(tokens), dim=-1)
        similarity = self.scale[0] * directions @ directions.transpose(1, 2) + self.scale[1]
        return F.binary_cross_entropy_with_logits(logits, truth) + F.binary_cross_entropy_with_logits(similarity, same)


@dataclass
class Prompts:
    """
    Objects to prompt for, with the possible prompts of each.

    Attributes:
        images (`Tensor` of shape `(num_prompts,)`): Index of the image in the batch.
        points (`Tensor` of shape `(num_prompts, 2, 2)`): Two random pixels of the object, x and y.
        boxes (`Tensor` of shape `(num_prompts, 4)`): Bounding boxes with SAM's noise.
        target (`Tensor` of shape `(num_prompts, 64, 64)`): Fraction of each cell that the object covers.
    """

    images: Tensor
    points: Tensor
    boxes: Tensor
    target: Tensor

    def labels(self, num_points: int) -> Tensor:
        return torch.ones(len(self.images), num_points, dtype=torch.long)


def draw_prompts(scenes: list[Scene], rng: np.random.Generator) -> dict[str, Prompts]:
    """Samples two objects for point prompts, two for boxes and one for mask prompts from each scene."""
    drawn: dict[str, list[tuple]] = {"point": [], "box": [], "mask": []}
    for number, scene in enumerate(scenes):
        for kind in ("point", "point", "box", "box", "mask"):
            chosen = [int(rng.integers(len(scene.masks)))]
            if kind == "mask" and len(scene.masks) > 1 and rng.random() < 0.3:
                # A class can have several objects, so a mask prompt can cover two.
                chosen = rng.choice(len(scene.masks), size=2, replace=False).tolist()
            mask = np.asarray(scene.masks[chosen].any(axis=0))
            pixels = np.flatnonzero(mask)
            clicks = pixels[rng.integers(len(pixels), size=2)]
            box = np.array(mask_to_prompt_box(mask), dtype=np.float32)
            # SAM's box noise: 10 % of the side. Here at most 6 px, and 30 % of the boxes have none.
            noise = np.clip(rng.normal(size=4) * 0.1 * np.tile(box[2:] - box[:2], 2), -6, 6)
            box = (box + noise * (rng.random() < 0.7)).clip(0, IMAGE_SIZE - 1)
            drawn[kind].append((number, np.stack([clicks % IMAGE_SIZE, clicks // IMAGE_SIZE], axis=1), box, mask))
    prompts = {}
    for kind, rows in drawn.items():
        images, points, boxes, masks = (torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True))
        prompts[kind] = Prompts(images, points.float(), boxes.float(), F.avg_pool2d(masks.float(), 2))
    return prompts


def sam_step(
    model: SamModel, auxiliary: DenseAuxiliary, pixel_values: Tensor, scenes: list[Scene], rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """
    Computes the losses of a batch. Each image is encoded once and prompted with points, boxes and masks.

    Args:
        pixel_values (`Tensor` of shape `(batch_size, 3, 128, 128)`): The normalized images.
        scenes (`list[Scene]`): The scenes of the images. Each contains at least one object.

    Returns:
        `tuple[Tensor, Tensor]`: The mask loss and the auxiliary loss.
    """
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    image_embeddings = model.vision_encoder(pixel_values)[0]
    prompts = draw_prompts(scenes, rng)
    losses = {}
    for kind in ("point", "box"):
        drawn = prompts[kind]
        embeddings = image_embeddings[drawn.images]
        if kind == "point":
            points, labels, boxes = drawn.points[:, :1], drawn.labels(1), None
        else:
            points, labels, boxes = None, None, drawn.boxes
        logits, iou_scores = predict_masks(model, embeddings, points, labels, boxes, multimask_output=kind == "point")
        losses[kind] = mask_loss(logits, iou_scores, drawn.target)
        if rng.random() < 0.5:  # a second iteration, as in SAM's interactive training
            with torch.no_grad():
                best = logits[torch.arange(len(logits)), iou_scores.argmax(dim=1)]
                wrong, wrong_labels = error_point(best, drawn.target, generator)
            points = wrong if points is None else torch.cat([points, wrong], dim=1)
            labels = wrong_labels if labels is None else torch.cat([labels, wrong_labels], dim=1)
            logits, iou_scores = predict_masks(model, embeddings, points, labels, boxes, masks=best[:, None])
            losses[kind] = (losses[kind] + mask_loss(logits, iou_scores, drawn.target)) / 2
    drawn = prompts["mask"]
    masks = noisy_mask_prompt(drawn.target, generator)
    num_points = int(rng.integers(3))
    points, labels = (drawn.points[:, :num_points], drawn.labels(num_points)) if num_points else (None, None)
    logits, iou_scores = predict_masks(model, image_embeddings[drawn.images], points, labels, masks=masks)
    losses["mask"] = mask_loss(logits, iou_scores, drawn.target)
    instances = torch.from_numpy(np.stack([instance_map(scene) for scene in scenes]))
    return 0.4 * losses["point"] + 0.4 * losses["box"] + 0.2 * losses["mask"], auxiliary(image_embeddings, instances)


def instance_map(scene: Scene) -> np.ndarray:
    """Returns an array `(128, 128)` of type int64: 0 for background, `n` for the n-th object of the scene."""
    return (scene.masks * np.arange(1, len(scene.masks) + 1)[:, None, None]).sum(axis=0)


def train_sam(output_dir: Path, seed: int, steps: int, batch_size: int = 8, learning_rate: float = 1e-3) -> Metrics:
    """Trains and saves the miniature SAM. Returns its metrics on 200 scenes."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model, processor = build_sam()
    mean, std = processor.image_processor.image_mean, processor.image_processor.image_std
    evaluator = PromptedSegmentation(images_with_objects(seed=11, num_scenes=200), point="random")
    auxiliary = DenseAuxiliary(model.config.vision_config.output_channels, cells=4)
    parameters = [p for p in (*model.parameters(), *auxiliary.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=0.05)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(WARMUP_FRACTION * steps), steps)
    metrics: Metrics = {}
    start, running = time.perf_counter(), np.zeros(2)
    index = 0
    for step in range(1, steps + 1):
        scenes: list[Scene] = []
        while len(scenes) < batch_size:
            scene = render(TRAINING_SEED + seed, index, min_visible_fraction=MIN_VISIBLE_FRACTION)
            index += 1
            if len(scene.masks):
                scenes.append(scene)
        images = torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2)
        loss, auxiliary_loss = sam_step(model, auxiliary, normalize(images, mean, std), scenes, rng)
        optimizer.zero_grad()
        (loss + (1 - step / steps) * auxiliary_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        running = 0.98 * running + 0.02 * np.array([loss.item(), auxiliary_loss.item()])
        if step % 50 == 0:
            mask, dense = running / (1 - 0.98**step)
            seconds = time.perf_counter() - start
            print(f"step {step}: loss {mask:.4f}, auxiliary loss {dense:.4f}, {seconds:.0f} s", flush=True)
        if step % 500 == 0 or step == steps:
            metrics = evaluate(evaluator, SamAdapter("sam", model, processor))
            model.train()
            print(f"step {step}: {metrics}", flush=True)
            save(model, processor, output_dir, "sam", seed, step, time.perf_counter() - start, metrics)
    return metrics


# ---- CLIP ----


def build_tokenizer() -> CLIPTokenizer:
    """Returns a `CLIPTokenizer` whose byte-pair merges encode each word of the captions as one token."""
    texts = [template.format(name) for name in CLASS_NAMES for template in TEMPLATES] + list(BACKGROUND_PROMPTS)
    words = sorted({word for text in texts for word in text.split()} | {"and"})
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in words:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        for pair in merges:
            pieces = _merge(pieces, pair)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = _merge(pieces, merges[-1])
    vocabulary += ["".join(pair) for pair in merges]
    return CLIPTokenizer(
        vocab={piece: index for index, piece in enumerate(vocabulary)}, merges=merges, model_max_length=32
    )


def _merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def build_clip() -> tuple[CLIPModel, CLIPProcessor]:
    """Returns a `CLIPModel` of about 1.3 million parameters for 64 px, and its processor."""
    tokenizer = build_tokenizer()
    tower = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "projection_dim": 64,
        "hidden_act": "gelu",
    }
    config = CLIPConfig(
        text_config={
            **tower,
            "vocab_size": len(tokenizer),
            "num_hidden_layers": 2,
            "max_position_embeddings": 32,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={**tower, "num_hidden_layers": 4, "image_size": 64, "patch_size": 8},
        projection_dim=64,
    )
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": 64},
        crop_size={"height": 64, "width": 64},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.25, 0.25, 0.25],
    )
    return CLIPModel(config), CLIPProcessor(image_processor, tokenizer)


@dataclass
class CaptionedView:
    """
    An image with a caption.

    Attributes:
        image (`PIL.Image.Image`): The scene or a crop of it, at 64 px.
        classes (`frozenset[int]`): The classes in the image.
        background (`str`, *optional*): The background, if the image shows enough of it.
        caption (`str`): Names the classes, and in part of the captions the background.
    """

    image: Image.Image
    classes: frozenset[int]
    background: str | None
    caption: str


def captioned_view(scene: Scene, rng: np.random.Generator, crop: bool) -> CaptionedView:
    """
    Resizes a scene, or a random square crop around a pixel of an object if `crop` is set, to 64 px. The caption of a
    crop names the classes and the background that cover at least 5 % of it.

    Raises:
        ValueError: If the image contains a held-out class.
    """
    classes = frozenset(scene.class_ids)
    background: str | None = scene.background
    box = (0, 0, IMAGE_SIZE, IMAGE_SIZE)
    if crop and len(scene.masks):
        rows, columns = np.nonzero(scene.masks[rng.integers(len(scene.masks))])
        chosen = rng.integers(len(rows))
        side = int(np.exp(rng.uniform(np.log(MIN_CROP_SIZE), np.log(IMAGE_SIZE))))
        center = np.array([columns[chosen], rows[chosen]]) + rng.uniform(-0.3, 0.3, size=2) * side
        x, y = np.clip(center - side / 2, 0, IMAGE_SIZE - side).astype(int).tolist()
        box = (x, y, x + side, y + side)
        areas = scene.masks[:, y : y + side, x : x + side].mean(axis=(1, 2))
        classes = frozenset(i for i, area in zip(scene.class_ids, areas, strict=True) if area >= 0.05)
        background = scene.background if 1 - areas.sum() >= 0.05 else None
    caption = describe(rng, classes, background)
    if caption is None:
        raise ValueError("The scene contains a held-out class, which has no caption.")
    image = Image.fromarray(scene.image).resize((64, 64), Image.Resampling.BICUBIC, box=box)
    return CaptionedView(image, classes, background, caption)


def contrastive_loss(logits: Tensor, positives: Tensor) -> Tensor:
    """
    Cross-entropy with the uniform distribution over the positives of each row. Rows without positives are skipped.

    Args:
        logits (`Tensor` of shape `(num_queries, num_candidates)`): Scaled similarities.
        positives (`Tensor` of shape `(num_queries, num_candidates)` and type bool): The positive pairs.
    """
    has_positives = positives.any(dim=1)
    target = positives[has_positives].float()
    return -(logits[has_positives].log_softmax(dim=1) * target).sum(dim=1).div(target.sum(dim=1)).mean()


def clip_step(
    model: CLIPModel, processor: CLIPProcessor, views: list[CaptionedView], rng: np.random.Generator
) -> dict[str, Tensor]:
    """
    Computes the contrastive losses of a batch. Every text that is true for an image is a positive. The texts are:

    - the captions of the batch;
    - each class that is not held out, in a random template, as hard negatives with the same color and another pattern;
    - each color and each pattern alone ("a red shape", "a dotted shape"), from which the text tower learns to
      combine colors and patterns. Classification of held-out classes depends on it.

    Returns:
        `dict[str, Tensor]`: The losses "image_to_text", "text_to_image", "color" and "pattern".
    """
    images = processor.image_processor(images=[view.image for view in views], return_tensors="pt")["pixel_values"]
    texts: dict[str, tuple[frozenset[int], str | None]] = {}  # text -> classes and background that it names
    for view in views:
        texts[view.caption] = (view.classes, view.background if "background" in view.caption else None)
    for class_id in SEEN:
        number = int(rng.integers(len(TEMPLATES)))
        texts[TEMPLATES[number].format(CLASS_NAMES[class_id])] = (frozenset([class_id]), (None, *BACKGROUNDS)[number])
    attributes = [f"a {word} shape" for word in (*COLOURS, *PATTERNS)]
    inputs = processor.tokenizer([*texts, *attributes], padding=True, return_tensors="pt")
    with torch.autocast("cpu", torch.bfloat16):
        image_embeds = model.get_image_features(images).pooler_output
        text_embeds = model.get_text_features(**inputs).pooler_output
    image_embeds = F.normalize(image_embeds.float(), dim=-1)
    text_embeds = F.normalize(text_embeds.float(), dim=-1)
    logits = model.logit_scale.exp() * image_embeds @ text_embeds.T

    positives = torch.tensor(
        [
            [
                view.classes == classes and background in (None, view.background)
                for classes, background in texts.values()
            ]
            for view in views
        ]
    )
    colors = torch.tensor(
        [[any(i % len(COLOURS) == c for i in view.classes) for c in range(len(COLOURS))] for view in views]
    )
    patterns = torch.tensor(
        [[any(i // len(COLOURS) == p for i in view.classes) for p in range(len(PATTERNS))] for view in views]
    )
    caption_logits, color_logits, pattern_logits = logits.split([len(texts), len(COLOURS), len(PATTERNS)], dim=1)
    return {
        "image_to_text": contrastive_loss(caption_logits, positives),
        "text_to_image": contrastive_loss(caption_logits.T, positives.T),
        "color": contrastive_loss(color_logits, colors),
        "pattern": contrastive_loss(pattern_logits, patterns),
    }


def train_clip(output_dir: Path, seed: int, steps: int, batch_size: int = 128, learning_rate: float = 1e-3) -> Metrics:
    """
    Trains and saves the miniature CLIP on scenes without held-out classes. Returns its zero-shot accuracy on 960
    scenes with a single object.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model, processor = build_clip()
    # A third faster than SDPA in forward and backward passes on a CPU in bfloat16.
    model.set_attn_implementation("eager")
    evaluator = MiniatureClassification(labeled_images(seed=12, num_scenes=960), templates=TEMPLATES)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.05)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(WARMUP_FRACTION * steps), steps)
    metrics: Metrics = {}
    start, running = time.perf_counter(), None
    for step in range(1, steps + 1):
        progress = step / steps
        views = []
        for number in range(batch_size):
            single = number < batch_size * (0.8 - 0.3 * progress)
            index = step * batch_size + number
            num_objects = 1 if single else None
            scene = render(
                TRAINING_SEED + seed,
                index,
                num_objects,
                held_out=False,
                min_visible_fraction=MIN_VISIBLE_FRACTION,
            )
            views.append(captioned_view(scene, rng, crop=rng.random() < 0.6))
        losses = clip_step(model, processor, views, rng)
        loss = losses["image_to_text"] + losses["text_to_image"] + losses["color"] + losses["pattern"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(50))
        values = np.array([value.item() for value in losses.values()])
        running = values if running is None else 0.95 * running + 0.05 * values
        if step % 25 == 0:
            parts = ", ".join(f"{name} {value:.3f}" for name, value in zip(losses, running, strict=True))
            print(f"step {step}: {parts}, {time.perf_counter() - start:.0f} s", flush=True)
        if step % 250 == 0 or step == steps:
            metrics = evaluate(evaluator, ClipAdapter("clip", model, processor))
            model.train()
            print(f"step {step}: {metrics}", flush=True)
            save(model, processor, output_dir, "clip", seed, step, time.perf_counter() - start, metrics)
    return metrics


def save(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    output_dir: Path,
    teacher: str,
    seed: int,
    steps: int,
    seconds: float,
    metrics: Metrics,
) -> None:
    """Saves the model, its processor, and a README with the command and the metrics."""
    model.save_pretrained(output_dir)
    processor.save_pretrained(output_dir)
    lines = "\n".join(f"| {name} | {value:.4f} |" for name, value in metrics.items())
    (output_dir / "README.md").write_text(
        f"""# The miniature {teacher.upper()}

Trained from scratch on the procedural scenes of `samclip_hf.miniature.scenes`, on one CPU core:

    python -m samclip_hf.miniature_lab.teachers {teacher} --output_dir {teacher} --seed {seed}

{steps} steps in {seconds / 60:.0f} minutes with torch {torch.__version__} and transformers {transformers.__version__}.

| metric | value |
| --- | --- |
{lines}
"""
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", choices=["sam", "clip"], help="the model to train")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the model and its processor")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and the scenes (default: 0)")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: 5500 for SAM, 4000 for CLIP)")
    arguments = parser.parse_args()
    train, steps = {"sam": (train_sam, 5500), "clip": (train_clip, 4000)}[arguments.teacher]
    train(arguments.output_dir, arguments.seed, arguments.steps or steps)


if __name__ == "__main__":
    main()
