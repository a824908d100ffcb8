"""
Text -> masks by onnxruntime alone: what `SamClipForImageSegmentation` does, without PyTorch.

    python -m samclip_hf.export --output_dir onnx
    python examples/onnx_segmentation.py --onnx onnx --image photo.jpg --output masks.png \
        --labels "red fuzzy shape" "green zigzag shape" --background "an empty scene" --template "a {}"

Needs numpy, pillow, onnxruntime and tokenizers. To take along: nothing here is imported from samclip_hf.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps
from tokenizers import Tokenizer

BACKGROUND_LOGIT_MARGIN = 20.0  # logits between what is certain and what is impossible
MAX_OVERLAP = 0.5  # IoU of two masks that are not taken for the same
PROMPTS_AT_ONCE = 4


@dataclass
class Vocabulary:
    """
    What to look for.

    embeds (`np.ndarray` of shape `(num_texts, projection_dim)`): of length 1.
    label_ids (`list[int]`): which label each text stands for.
    names (`list[str]`): of the labels.
    background (`int`, *optional*): the label that stands for "none of the others".
    background_threshold (`float`, *optional*): the probability below which nothing else counts.
    """

    embeds: np.ndarray
    label_ids: list[int]
    names: list[str]
    background: int | None = None
    background_threshold: float | None = None


@dataclass
class Segment:
    """A label, its probability among all labels, and a mask `(height, width)` of type bool at the image's size."""

    label: str
    score: float
    mask: np.ndarray


class OnnxSamClip:
    """An exported SAM-CLIP. `folder` is what `python -m samclip_hf.export` wrote."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.description = json.loads((self.folder / "samclip.json").read_text())
        self.sessions = {
            part: onnxruntime.InferenceSession(str(self.folder / f"{part}.onnx"), providers=["CPUExecutionProvider"])
            for part in self.description["parts"]
        }
        self.patch_size = self.description["image"]["patch_size"]

    def run(self, part: str, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """A part's outputs by name."""
        if part not in self.sessions:
            raise ValueError(f"{self.folder} was exported without {part}: it has {', '.join(self.sessions)}.")
        outputs = self.sessions[part].get_outputs()
        return dict(zip((output.name for output in outputs), self.sessions[part].run(None, inputs), strict=True))

    def prepare(self, image: Image.Image) -> tuple[np.ndarray, tuple[int, int]]:
        """`pixel_values` `(1, 3, height, width)`, and height and width without the padding: the longest edge resized,
        the rest padded below and on the right."""
        settings = self.description["image"]
        scale = settings["longest_edge"] / max(image.size)
        width, height = (max(1, int(side * scale + 0.5)) for side in image.size)
        pixels = np.asarray(image.convert("RGB").resize((width, height), settings["resample"]), dtype=np.float32)
        pixels = (pixels * settings["rescale_factor"] - np.float32(settings["mean"])) / np.float32(settings["std"])
        padded = np.zeros((1, 3, settings["padded_height"], settings["padded_width"]), dtype=np.float32)
        padded[0, :, :height, :width] = pixels.transpose(2, 0, 1)
        return padded, (height, width)

    def encode(self, image: Image.Image) -> tuple[dict[str, np.ndarray], tuple[int, int]]:
        """What the image encoder gives, once for any number of texts and prompts; and the size without padding."""
        pixel_values, size = self.prepare(image)
        return self.run("image_encoder", pixel_values=pixel_values, reshaped_input_sizes=np.array([size])), size

    def embed_texts(self, texts: list[str]) -> np.ndarray:
        """`(num_texts, projection_dim)`, of length 1."""
        settings = self.description["text"]
        tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokens = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
        longest = max(map(len, tokens))
        if longest > settings["max_tokens"]:
            raise ValueError(f"The text encoder reads {settings['max_tokens']} tokens at most, a text has {longest}.")
        inputs = {"input_ids": np.full((len(texts), longest), settings["pad_token_id"])}
        if settings["takes_mask"]:
            inputs["attention_mask"] = np.zeros_like(inputs["input_ids"])
        for row, ids in enumerate(tokens):
            inputs["input_ids"][row, : len(ids)] = ids
            if settings["takes_mask"]:
                inputs["attention_mask"][row, : len(ids)] = 1
        return self.run("text_encoder", **inputs)["text_embeds"]

    def embed_vocabulary(self, labels: list[str], background: list[str], templates: list[str]) -> Vocabulary:
        """Names, filled into every template and averaged; with texts of background, label 0 is that."""
        embeds = [self.embed_texts([template.replace("{}", name) for template in templates]) for name in labels]
        means = np.stack([embed.mean(axis=0) for embed in embeds])
        means /= np.linalg.norm(means, axis=1, keepdims=True)
        if not background:
            return Vocabulary(means, list(range(len(labels))), labels)
        label_ids = [0] * len(background) + list(range(1, len(labels) + 1))
        return Vocabulary(np.concatenate([self.embed_texts(background), means]), label_ids, ["background", *labels], 0)

    def own_vocabulary(self) -> Vocabulary:
        """The checkpoint's. Raises `ValueError` if it has none."""
        if "vocabulary" not in self.description:
            raise ValueError("This checkpoint has no vocabulary of its own: say what to look for.")
        own = self.description["vocabulary"]
        names = [own["id2label"][str(label)] for label in range(len(own["id2label"]))]
        embeds = np.load(self.folder / "class_embeds.npy")
        return Vocabulary(embeds, own["label_ids"], names, own["background_label_id"], own["background_threshold"])

    def classify(self, embeds: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
        """Logits `(..., num_labels)` of embeddings `(..., projection_dim)`; a label has its most similar text."""
        similarity = embeds @ vocabulary.embeds.T * self.description["logit_scale"]
        logits = np.full((*embeds.shape[:-1], len(vocabulary.names)), -np.inf, dtype=np.float32)
        for text, label in enumerate(vocabulary.label_ids):
            logits[..., label] = np.maximum(logits[..., label], similarity[..., text])
        if vocabulary.background_threshold is not None:
            highest = logits.max(axis=-1)
            likeliest = 1 / np.exp(logits - highest[..., None]).sum(axis=-1)
            is_background = likeliest < vocabulary.background_threshold
            logits[..., vocabulary.background] = highest + np.where(
                is_background, BACKGROUND_LOGIT_MARGIN, -BACKGROUND_LOGIT_MARGIN
            )
        return logits

    def predict_masks(
        self, image_embeddings: np.ndarray, points: np.ndarray, labels: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of prompts `(num_prompts, num_points, 2)`, x and y in pixels of `pixel_values`, and their labels (1 inside,
        0 outside, 2 and 3 a box's corners, and a last -1 if there is no box): mask logits `(num_prompts, 4, height,
        width)` and predicted IoUs `(num_prompts, 4)`. The first mask is best for a box or several points, one of the
        other three for a single point."""
        masks, scores = [], []
        for start in range(0, len(points), PROMPTS_AT_ONCE):
            chunk = slice(start, start + PROMPTS_AT_ONCE)
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
        The CLIP head says where something is, the mask decoder draws what is there from points, and the CLIP head
        names each segment by itself. Best drawn first; a pixel that several claim belongs to the best drawn.
        """
        outputs, content = self.encode(image)
        dense_embeds = outputs["dense_embeds"][0].transpose(1, 2, 0)
        probabilities = softmax(self.classify(dense_embeds, vocabulary))
        rows, columns = (np.arange(side) for side in dense_embeds.shape[:2])
        shown = (rows < content[0] / self.patch_size)[:, None] & (columns < content[1] / self.patch_size)
        something = shown.copy()
        if vocabulary.background is not None:
            something &= 1 - probabilities[..., vocabulary.background] > 0.5
        if not something.any():
            return []

        points = spread_points(something, self.description["composition_points"])
        points = np.stack([(points + 0.5) * self.patch_size - 0.5, np.zeros_like(points)], axis=1)
        masks, scores = self.predict_masks(outputs["image_embeddings"], points, np.array([[1, -1]] * len(points)))
        masks, scores = masks[:, 1:], scores[:, 1:].clip(0) * stability(masks[:, 1:])
        best, prompts = scores.argmax(axis=1), np.arange(len(masks))
        masks, scores = masks[prompts, best], scores[prompts, best]

        kept = distinct_masks(masks, scores)
        named = []
        for number, patches in zip(kept, own_patches(masks[kept], something.shape), strict=True):
            patches &= shown
            if patches.any():
                at = dict(zip(("rows", "columns"), patches.nonzero(), strict=True))
                embeds = self.run("segment_encoder", patch_tokens=outputs["patch_tokens"], **at)["segment_embeds"]
                named.append((number, softmax(self.classify(embeds[0], vocabulary))))

        segments = []
        claimed = np.zeros((image.height, image.width))
        owner = np.full(claimed.shape, -1)
        for position, (number, _) in enumerate(named):
            cells = [side * masks.shape[-1] / padded for side, padded in zip(content, self._padded(), strict=True)]
            vote = 1 / (1 + np.exp(-resize(masks[number], cells, claimed.shape)))
            vote = vote * (vote > 0.5) * scores[number]
            owner = np.where(vote > claimed, position, owner)
            claimed = np.maximum(vote, claimed)
        for position, (_, probability) in enumerate(named):
            label = int(probability.argmax())
            if label != vocabulary.background:
                segments.append(Segment(vocabulary.names[label], float(probability[label]), owner == position))
        return segments

    def _padded(self) -> tuple[int, int]:
        return self.description["image"]["padded_height"], self.description["image"]["padded_width"]


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def spread_points(cells: np.ndarray, number: int) -> np.ndarray:
    """So many of the marked cells `(rows, columns)`, evenly spread in reading order: x and y `(number, 2)`."""
    marked = cells.ravel().nonzero()[0]
    chosen = marked[((np.arange(number, dtype=np.float32) + 0.5) * len(marked) / number).astype(int)]
    return np.stack([chosen % cells.shape[1], chosen // cells.shape[1]], axis=-1)


def stability(masks: np.ndarray) -> np.ndarray:
    """How little mask logits `(..., height, width)` change with their threshold, from 0 to 1."""
    return (masks > 1).sum(axis=(-2, -1)) / (masks > -1).sum(axis=(-2, -1)).clip(1)


def distinct_masks(masks: np.ndarray, scores: np.ndarray) -> list[int]:
    """Those that are neither empty nor a better one once more, best first."""
    flat = (masks > 0).reshape(len(masks), -1).astype(np.float32)
    area, shared = flat.sum(axis=1), flat @ flat.T
    overlap = shared / (area[:, None] + area[None, :] - shared).clip(1)
    kept: list[int] = []
    for index in np.argsort(-scores, kind="stable").tolist():
        if area[index] > 0 and all(overlap[index, other] <= MAX_OVERLAP for other in kept):
            kept.append(index)
    return kept


def own_patches(masks: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Which patches `(num_masks, rows, columns)` are at least half inside, or the fullest one; the first claims."""
    blocks = (masks > 0).reshape(len(masks), grid[0], masks.shape[1] // grid[0], grid[1], masks.shape[2] // grid[1])
    share = blocks.mean(axis=(2, 4))
    claimed = (share >= 0.5) | (share >= share.max(axis=(1, 2), keepdims=True))
    return claimed & (claimed.cumsum(axis=0) == 1)


def resize(mask: np.ndarray, content: list[float], size: tuple[int, ...]) -> np.ndarray:
    """The upper left corner of `content` (height, width) cells of a mask, bilinearly resized to `size`."""
    for axis, (cells, length) in enumerate(zip(content, size, strict=True)):
        last = mask.shape[axis] - 1
        position = ((np.arange(length) + 0.5) * cells / length - 0.5).clip(0, last)
        below = np.floor(position).astype(int)
        weight = (position - below).reshape(-1, *[1] * (1 - axis))
        above = np.minimum(below + 1, last)
        mask = mask.take(below, axis) * (1 - weight) + mask.take(above, axis) * weight
    return mask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--onnx", type=Path, required=True, help="folder of the export")
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--labels", nargs="+", help="what to look for (default: the checkpoint's vocabulary)")
    parser.add_argument("--background", nargs="+", default=[], help="texts of what belongs to no label")
    parser.add_argument("--template", nargs="+", default=["a photo of a {}"], help="sentences with {} for the name")
    parser.add_argument("--output", type=Path, help="picture to write, with the masks laid over the image")
    arguments = parser.parse_args()
    try:
        model = OnnxSamClip(arguments.onnx)
        with Image.open(arguments.image) as file:
            image = ImageOps.exif_transpose(file).convert("RGB")
        if arguments.labels:
            vocabulary = model.embed_vocabulary(arguments.labels, arguments.background, arguments.template)
        else:
            vocabulary = model.own_vocabulary()
    except (OSError, ValueError) as error:
        parser.error(str(error))
    segments = model.segment(image, vocabulary)
    pixels = np.asarray(image).copy()
    for number, segment in enumerate(segments):
        colour = np.array([[230, 60, 60], [60, 90, 230], [60, 180, 75], [240, 180, 30], [170, 60, 200]])[number % 5]
        pixels[segment.mask] = (pixels[segment.mask] * 0.4 + colour * 0.6).astype(np.uint8)
        print(f"{segment.label}: probability {segment.score:.3f}, {segment.mask.sum()} pixels")
    if not segments:
        print("Nothing found.")
    if arguments.output:
        Image.fromarray(pixels).save(arguments.output)


if __name__ == "__main__":
    main()
