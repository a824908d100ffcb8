"""
Text-prompted segmentation with onnxruntime: `SamClipForImageSegmentation` without PyTorch.

    samclip export --output_dir onnx
    python examples/onnx_segmentation.py --onnx onnx --image photo.jpg --output masks.png \
        --labels "red fuzzy shape" "green zigzag shape" --background "an empty scene" --template "a {}"

Needs numpy, pillow, onnxruntime and tokenizers. Copy this file into your project: it does not import samclip_hf.
"""

import argparse
import json
import re
import string
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps
from tokenizers import Tokenizer

BACKGROUND_LOGIT_MARGIN = 20.0  # logit of background above or below all other labels, if it is thresholded
MAX_OVERLAP = 0.5  # masks with a larger IoU are duplicates
PROMPTS_PER_BATCH = 4
INSIDE, NO_POINT = 1, -1  # labels of points
COLORS = np.array([[230, 60, 60], [60, 90, 230], [60, 180, 75], [240, 180, 30], [170, 60, 200]])


@dataclass
class Vocabulary:
    """
    Labels and the embeddings of their texts.

    Args:
        embeds (`np.ndarray` of shape `(num_texts, projection_dim)`):
            Normalized text embeddings.
        label_ids (`list[int]`):
            Label of each text. A label can have several texts; the most similar one counts.
        names (`list[str]`):
            Names of the labels.
        background (`int`, *optional*):
            Label of pixels that belong to no other label.
        background_threshold (`float`, *optional*):
            Pixels and segments are background if no other label has a probability of at least this value.
    """

    embeds: np.ndarray
    label_ids: list[int]
    names: list[str]
    background: int | None = None
    background_threshold: float | None = None


@dataclass
class Segment:
    """
    One segment of an image.

    Args:
        label (`str`):
            Name of the label.
        score (`float`):
            Probability of the label among all labels of the vocabulary.
        mask (`np.ndarray` of shape `(height, width)`):
            Boolean mask at the size of the image.
    """

    label: str
    score: float
    mask: np.ndarray


class OnnxSamClip:
    """
    An exported SAM-CLIP.

    Args:
        folder (`str` or `Path`):
            Output folder of `samclip export`.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.description = json.loads((self.folder / "samclip.json").read_text())
        self.sessions = {
            part: onnxruntime.InferenceSession(str(self.folder / f"{part}.onnx"), providers=["CPUExecutionProvider"])
            for part in self.description["parts"]
        }
        self.patch_size = self.description["image"]["patch_size"]

    def run(self, part: str, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Runs one part and returns its outputs by name."""
        if part not in self.sessions:
            raise ValueError(f"{self.folder} contains no {part}, only {', '.join(self.sessions)}.")
        outputs = self.sessions[part].get_outputs()
        return dict(zip((output.name for output in outputs), self.sessions[part].run(None, inputs), strict=True))

    def prepare(self, image: Image.Image) -> tuple[np.ndarray, tuple[int, int]]:
        """Resizes the longest edge, normalizes, and pads at the bottom and on the right. Returns `pixel_values`
        `(1, 3, height, width)`, and height and width without the padding."""
        settings = self.description["image"]
        scale = settings["longest_edge"] / max(image.size)
        width, height = (max(1, int(side * scale + 0.5)) for side in image.size)
        pixels = np.asarray(to_rgb(image).resize((width, height), settings["resample"]), dtype=np.float32)
        pixels = (pixels * settings["rescale_factor"] - np.float32(settings["mean"])) / np.float32(settings["std"])
        padded = np.zeros((1, 3, settings["padded_height"], settings["padded_width"]), dtype=np.float32)
        padded[0, :, :height, :width] = pixels.transpose(2, 0, 1)
        return padded, (height, width)

    def encode(self, image: Image.Image) -> tuple[dict[str, np.ndarray], tuple[int, int]]:
        """Runs the image encoder. Returns its outputs, which serve any number of texts and prompts, and height and
        width of the resized image without padding."""
        pixel_values, size = self.prepare(image)
        return self.run("image_encoder", pixel_values=pixel_values, reshaped_input_sizes=np.array([size])), size

    def embed_texts(self, texts: list[str]) -> np.ndarray:
        """Returns normalized text embeddings `(num_texts, projection_dim)`."""
        settings = self.description["text"]
        tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokens = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
        longest = max(map(len, tokens))
        if longest > settings["max_tokens"]:
            raise ValueError(f"A text has {longest} tokens; the maximum is {settings['max_tokens']}.")
        inputs = {"input_ids": np.full((len(texts), longest), settings["pad_token_id"])}
        if settings["takes_mask"]:
            inputs["attention_mask"] = np.zeros_like(inputs["input_ids"])
        for row, ids in enumerate(tokens):
            inputs["input_ids"][row, : len(ids)] = ids
            if settings["takes_mask"]:
                inputs["attention_mask"][row, : len(ids)] = 1
        return self.run("text_encoder", **inputs)["text_embeds"]

    def embed_vocabulary(self, labels: list[str], background: list[str], templates: list[str]) -> Vocabulary:
        """
        Embeds labels, each as the average of its embeddings in all templates.

        Args:
            labels (`list[str]`):
                Names of the labels.
            background (`list[str]`):
                Texts that describe the background, complete sentences without a template. If there are any, label 0 is
                background.
            templates (`list[str]`):
                Sentences with `{}` for the name.
        """
        names = labels
        if self.description["text"]["canonicalize"]:
            templates = [canonicalize_text(template, keep="{}") for template in templates]
            names, background = (
                [canonicalize_text(name, keep=",") for name in texts] for texts in (names, background)
            )
        embeds = [self.embed_texts([template.replace("{}", name) for template in templates]) for name in names]
        means = np.stack([embed.mean(axis=0) for embed in embeds])
        means /= np.linalg.norm(means, axis=1, keepdims=True)
        if not background:
            return Vocabulary(means, list(range(len(labels))), labels)
        label_ids = [0] * len(background) + list(range(1, len(labels) + 1))
        return Vocabulary(np.concatenate([self.embed_texts(background), means]), label_ids, ["background", *labels], 0)

    def load_vocabulary(self) -> Vocabulary:
        """Returns the vocabulary of the checkpoint. Raises `ValueError` if it has none."""
        if "vocabulary" not in self.description:
            raise ValueError("The checkpoint has no vocabulary. Pass labels.")
        saved = self.description["vocabulary"]
        names = [saved["id2label"][str(label)] for label in range(len(saved["id2label"]))]
        embeds = np.load(self.folder / "class_embeds.npy")
        return Vocabulary(
            embeds, saved["label_ids"], names, saved["background_label_id"], saved["background_threshold"]
        )

    def classify(self, embeds: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
        """Returns logits `(..., num_labels)` of embeddings `(..., projection_dim)`."""
        similarity = embeds @ vocabulary.embeds.T * self.description["logit_scale"]
        logits = np.full((*embeds.shape[:-1], len(vocabulary.names)), -np.inf, dtype=np.float32)
        for text, label in enumerate(vocabulary.label_ids):
            logits[..., label] = np.maximum(logits[..., label], similarity[..., text])
        if vocabulary.background_threshold is not None:
            highest = logits.max(axis=-1)
            max_probability = 1 / np.exp(logits - highest[..., None]).sum(axis=-1)
            is_background = max_probability < vocabulary.background_threshold
            logits[..., vocabulary.background] = highest + np.where(
                is_background, BACKGROUND_LOGIT_MARGIN, -BACKGROUND_LOGIT_MARGIN
            )
        return logits

    def predict_masks(
        self, image_embeddings: np.ndarray, points: np.ndarray, labels: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """
        Predicts the masks of prompts.

        Args:
            image_embeddings (`np.ndarray` of shape `(1, output_channels, grid_height, grid_width)`):
                Output of the image encoder.
            points (`np.ndarray` of shape `(num_prompts, num_points, 2)`):
                x and y in pixels of `pixel_values`.
            labels (`np.ndarray` of shape `(num_prompts, num_points)`):
                1 for a point inside the object, 0 for a point outside, 2 and 3 for the upper left and lower right
                corner of a box, -1 for no point. The last label of a prompt without a box must be -1.

        Returns:
            `tuple(np.ndarray)`: Mask logits `(num_prompts, 4, height, width)` and predicted IoUs `(num_prompts, 4)`.
            Use the first mask for a box or several points, and the best of the other three for a single point.
        """
        masks, scores = [], []
        for start in range(0, len(points), PROMPTS_PER_BATCH):
            chunk = slice(start, start + PROMPTS_PER_BATCH)
            outputs = self.run(
                "mask_decoder",
                image_embeddings=image_embeddings,
                input_points=points[None, chunk].astype(np.float32),
                input_labels=labels[None, chunk].astype(np.int64),
            )
            masks.append(outputs["pred_masks"][0])
            scores.append(outputs["iou_scores"][0])
        return np.concatenate(masks), np.concatenate(scores)

    def segment(self, image: Image.Image, vocabulary: Vocabulary) -> list[Segment]:
        """
        Segments an image.

        The CLIP head classifies every patch, which separates foreground from background. Points on the foreground
        prompt the mask decoder. The CLIP head then classifies each mask. A pixel in several masks belongs to the best
        one.

        Returns segments in descending order of mask quality, without background.
        """
        outputs, content_size = self.encode(image)
        dense_embeds = outputs["dense_embeds"][0].transpose(1, 2, 0)
        probabilities = softmax(self.classify(dense_embeds, vocabulary))
        rows, columns = (np.arange(side) for side in dense_embeds.shape[:2])
        content = (rows < content_size[0] / self.patch_size)[:, None] & (columns < content_size[1] / self.patch_size)
        foreground = content.copy()
        if vocabulary.background is not None:
            foreground &= 1 - probabilities[..., vocabulary.background] > 0.5
        if not foreground.any():
            return []

        num_points, in_z_order = self.description["composition_points"], vocabulary.background is None
        points = spread_points(foreground, num_points, in_z_order)
        points = np.stack([(points + 0.5) * self.patch_size - 0.5, np.zeros_like(points)], axis=1)
        labels = np.array([[INSIDE, NO_POINT]] * len(points))
        masks, scores = self.predict_masks(outputs["image_embeddings"], points, labels)
        masks, scores = masks[:, 1:], scores[:, 1:].clip(0) * stability(masks[:, 1:])
        best, prompts = scores.argmax(axis=1), np.arange(len(masks))
        masks, scores = masks[prompts, best], scores[prompts, best]

        kept = remove_duplicates(masks, scores)
        classified = []  # indices of masks, and the probabilities of their labels
        grid_size, covered = foreground.shape, [side / 4 for side in masks.shape[1:]]  # a mask has 4 x 4 per patch
        tower_grid = self.description["tower_grid"]
        if tower_grid is not None:  # of an unmerged model: its patches cover the image without its padding
            grid_size = (tower_grid, tower_grid)
            covered = [
                side * tower_grid * self.patch_size / size for side, size in zip(covered, content_size, strict=True)
            ]
        for index, patches in zip(kept, assign_patches(masks[kept], covered, grid_size), strict=True):
            if tower_grid is None:
                patches &= content
            if patches.any():
                rows, columns = patches.nonzero()
                embeds = self.run("segment_encoder", patch_tokens=outputs["patch_tokens"], rows=rows, columns=columns)[
                    "segment_embeds"
                ]
                classified.append((index, softmax(self.classify(embeds[0], vocabulary))))

        best_score = np.zeros((image.height, image.width))
        best = np.full(best_score.shape, -1)
        cells = [
            side * masks.shape[-1] / padded for side, padded in zip(content_size, self._padded_size(), strict=True)
        ]
        for position, (index, _) in enumerate(classified):
            probability = 1 / (1 + np.exp(-resize(masks[index], cells, best_score.shape)))
            score = probability * (probability > 0.5) * scores[index]
            best = np.where(score > best_score, position, best)
            best_score = np.maximum(score, best_score)
        segments = []
        for position, (_, probabilities) in enumerate(classified):
            label = int(probabilities.argmax())
            if label != vocabulary.background:
                segments.append(Segment(vocabulary.names[label], float(probabilities[label]), best == position))
        return segments

    def _padded_size(self) -> tuple[int, int]:
        return self.description["image"]["padded_height"], self.description["image"]["padded_width"]


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image to RGB. PIL alone turns images with 16 bits per channel white."""
    if image.mode.startswith("I"):
        pixels = np.asarray(image)
        image = Image.fromarray((pixels // (257 if pixels.max() > 255 else 1)).astype(np.uint8))
    return image.convert("RGB")


def canonicalize_text(text: str, keep: str) -> str:
    """Converts a name or a template for SigLIP: to lower case, without punctuation other than `keep`, and with spaces
    instead of `_`."""
    without_punctuation = str.maketrans("", "", string.punctuation)
    parts = [part.translate(without_punctuation) for part in text.replace("_", " ").split(keep)]
    return re.sub(r"\s+", " ", keep.join(parts).lower()).strip()


def softmax(logits: np.ndarray) -> np.ndarray:
    """Returns the softmax over the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def spread_points(cells: np.ndarray, num_points: int, in_z_order: bool) -> np.ndarray:
    """Selects `num_points` of the marked cells `(rows, columns)`, evenly spaced in reading order or along a Z-order
    curve, which spreads them over the image if all cells are marked. Returns their x and y `(num_points, 2)`."""
    row, column = np.indices(cells.shape)
    key = row * cells.shape[1] + column
    if in_z_order:  # the bits of row and column alternate
        bits = range(max(cells.shape).bit_length())
        key = sum(((row >> bit) & 1) << (2 * bit + 1) | ((column >> bit) & 1) << (2 * bit) for bit in bits)
    order = key.ravel().argsort()
    marked = order[cells.ravel()[order]]
    selected = marked[((np.arange(num_points, dtype=np.float32) + 0.5) * len(marked) / num_points).astype(int)]
    return np.stack([selected % cells.shape[1], selected // cells.shape[1]], axis=-1)


def stability(masks: np.ndarray) -> np.ndarray:
    """Returns the stability score, 0 to 1, of mask logits `(..., height, width)`: the IoU of the masks at the
    thresholds 1 and -1."""
    return (masks > 1).sum(axis=(-2, -1)) / (masks > -1).sum(axis=(-2, -1)).clip(1)


def remove_duplicates(masks: np.ndarray, scores: np.ndarray) -> list[int]:
    """Returns indices of the mask logits `(num_masks, height, width)` after non-maximum suppression, without empty
    masks, in descending order of scores."""
    flat = (masks > 0).reshape(len(masks), -1).astype(np.float32)
    area, intersection = flat.sum(axis=1), flat @ flat.T
    overlap = intersection / (area[:, None] + area[None, :] - intersection).clip(1)
    kept: list[int] = []
    for index in np.argsort(-scores, kind="stable").tolist():
        if area[index] > 0 and all(overlap[index, other] <= MAX_OVERLAP for other in kept):
            kept.append(index)
    return kept


def assign_patches(masks: np.ndarray, covered: list[float], grid_size: tuple[int, ...]) -> np.ndarray:
    """Assigns the patches of a grid to mask logits `(num_masks, height, width)` that cover `covered` rows and columns
    of the grid. Returns a boolean array `(num_masks, rows, columns)`: a mask contains the patches that it covers by
    half or more, or else the patch that it covers most; a patch in several masks belongs to the first."""
    overlaps = []
    for pixels, length, patches in zip(masks.shape[1:], covered, grid_size, strict=True):
        edges, patch = np.arange(pixels + 1) * (length / pixels), np.arange(patches)[:, None]
        overlap = (edges[1:].clip(max=patch + 1) - edges[:-1].clip(min=patch)).clip(0)
        overlaps.append(overlap / overlap.sum(axis=1, keepdims=True).clip(1e-6))
    coverage = overlaps[0] @ (masks > 0).astype(np.float32) @ overlaps[1].T
    highest = coverage.max(axis=(1, 2), keepdims=True)
    inside = (coverage >= 0.5 - 1e-4) | ((coverage >= highest) & (highest > 0))
    return inside & (inside.cumsum(axis=0) == 1)


def resize(mask: np.ndarray, content_size: list[float], size: tuple[int, ...]) -> np.ndarray:
    """Resizes the upper left corner of a mask, of `content_size` (height and width in cells), bilinearly to `size`."""
    for axis, (cells, length) in enumerate(zip(content_size, size, strict=True)):
        last = mask.shape[axis] - 1
        position = ((np.arange(length) + 0.5) * cells / length - 0.5).clip(0, last)
        below = np.floor(position).astype(int)
        weight = (position - below).reshape(-1, *[1] * (1 - axis))
        above = np.minimum(below + 1, last)
        mask = mask.take(below, axis) * (1 - weight) + mask.take(above, axis) * weight
    return mask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--onnx", type=Path, required=True, help="output folder of `samclip export`")
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--labels", nargs="+", help="names of the labels (default: the checkpoint's vocabulary)")
    parser.add_argument("--background", nargs="+", default=[], help="texts that describe the background")
    parser.add_argument("--template", nargs="+", default=["a photo of a {}"], help="sentences with {} for a label")
    parser.add_argument("--output", type=Path, help="file for the image with colored masks")
    arguments = parser.parse_args()
    try:
        model = OnnxSamClip(arguments.onnx)
        with Image.open(arguments.image) as file:
            image = to_rgb(ImageOps.exif_transpose(file))
        if arguments.labels:
            vocabulary = model.embed_vocabulary(arguments.labels, arguments.background, arguments.template)
        else:
            vocabulary = model.load_vocabulary()
    except (OSError, ValueError) as error:
        parser.error(str(error))
    segments = model.segment(image, vocabulary)
    pixels = np.asarray(image).copy()
    for number, segment in enumerate(segments):
        pixels[segment.mask] = (pixels[segment.mask] * 0.4 + COLORS[number % len(COLORS)] * 0.6).astype(np.uint8)
        print(f"{segment.label}: probability {segment.score:.3f}, {segment.mask.sum()} pixels")
    if not segments:
        print("No segments.")
    if arguments.output:
        Image.fromarray(pixels).save(arguments.output)


if __name__ == "__main__":
    main()
