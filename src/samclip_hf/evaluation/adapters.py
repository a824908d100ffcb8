"""
The models that are judged, behind the few questions that protocols ask of them: a SAM-CLIP and its parents answer the
same questions about the same pixels.

>>> from samclip_hf import miniature
>>> model = load(str(miniature.clip_teacher()))
>>> model.embed_texts(["a red dotted shape"]).shape
torch.Size([1, 128])
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoProcessor, CLIPModel, PreTrainedModel, SamModel, SiglipModel, pipeline

from ..segmentation_samclip import SamClipForImageSegmentation

PROMPTS_AT_ONCE = 64  # of one image; a mask decoder's memory grows with them
CROPS_AT_ONCE = 64


class ModelAdapter:
    """
    A model that is judged.

    name (`str`):
        As on the command line.
    model (`PreTrainedModel`), processor (`ProcessorMixin`):
        In evaluation mode; the processor saved beside it.
    """

    def __init__(self, name: str, model: PreTrainedModel, processor):
        self.name, self.processor = name, processor
        self.model = model.eval()
        self.image_processor = processor.image_processor

    @property
    def models(self) -> list[PreTrainedModel]:
        """All of them, of which the cascade has two."""
        return [self.model]

    @property
    def untrained(self) -> list[str]:
        """Parts whose biases are all exactly zero, as they are before any training; empty for a trained model."""
        biases: dict[str, bool] = {}
        for model in self.models:
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    part = ".".join(name.split(".")[:2])
                    biases[part] = biases.get(part, True) and not parameter.any()
        return sorted(part for part, are_zero in biases.items() if are_zero)

    @property
    def patch_size(self) -> int:
        return self.model.config.vision_config.patch_size

    def prepare(self, images: Sequence[Image.Image], sizes: Sequence[tuple[int, int]]) -> Tensor:
        """`pixel_values` `(num_images, 3, height, width)` of images resized to `sizes` (height, width), which are
        equal, as they are: nothing is cut off and nothing padded."""
        resized = [
            np.asarray(image.resize((width, height), self.image_processor.resample))
            for image, (height, width) in zip(images, sizes, strict=True)
        ]
        pixels = torch.from_numpy(np.stack(resized)).to(self.model.device).permute(0, 3, 1, 2) / 255
        mean, std = (
            torch.tensor(values, device=pixels.device)[:, None, None]
            for values in (self.image_processor.image_mean, self.image_processor.image_std)
        )
        return ((pixels - mean) / std).to(self.model.dtype)

    def to_patches(self, side: float) -> int:
        """A side in pixels, rounded to whole patches."""
        return max(1, round(side / self.patch_size)) * self.patch_size

    # What heads are probed on (paper, section 5 and tables 3 and 4).

    def patch_features(self, images: Sequence[Image.Image], size: int) -> dict[str, Tensor]:
        """Features `(num_images, hidden_size, grid_height, grid_width)` of images stretched to squares of `size`
        pixels, by the name of what they come from."""
        raise NotImplementedError

    def pooled_features(self, images: Sequence[Image.Image], size: int) -> dict[str, Tensor]:
        """`(num_images, hidden_size)`, of the same: the means over patches where the model does not pool by itself."""
        return {source: features.mean(dim=(2, 3)) for source, features in self.patch_features(images, size).items()}

    def _squares(self, images: Sequence[Image.Image], size: int) -> Tensor:
        side = self.to_patches(size)
        return self.prepare(images, [(side, side)] * len(images))


class ImageTextAdapter(ModelAdapter):
    """One that knows images and texts: SAM-CLIP, CLIP and SigLIP."""

    padding: bool | str = True  # of texts: to the longest

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """`(num_texts, projection_dim)`, of length 1. Longer texts than the text tower reads are cut, as CLIP does."""
        features = []
        longest = self.model.config.text_config.max_position_embeddings
        for start in range(0, len(texts), 256):
            inputs = self.processor.tokenizer(
                list(texts[start : start + 256]),
                padding=self.padding,
                truncation=True,
                max_length=longest,
                padding_side="right",
                return_tensors="pt",
            )
            features.append(self._text_features(**inputs.to(self.model.device)).float())
        return F.normalize(torch.cat(features), dim=-1)

    @torch.inference_mode()
    def embed_names(self, names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """`(num_names, projection_dim)`, of length 1: for each name the mean over templates, each of length 1 (Radford
        et al. 2021, section 3.1.4)."""
        texts = [template.replace("{}", name) for name in names for template in templates]
        return F.normalize(self.embed_texts(texts).unflatten(0, (len(names), len(templates))).mean(dim=1), dim=-1)

    @torch.inference_mode()
    def embed_images(self, images: Sequence[Image.Image], size: int | None = None) -> Tensor:
        """`(num_images, projection_dim)`, of length 1. As the model's own image processor makes them ready or, with a
        `size`, the middle square, resized to it (as CLIP's does)."""
        if size is None:
            inputs = self.processor(images=list(images), return_tensors="pt").to(self.model.device)
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
            keywords = {name: inputs[name] for name in ("pixel_values", "reshaped_input_sizes") if name in inputs}
        else:
            keywords = {"pixel_values": self._squares([middle_square(image) for image in images], size)}
        return F.normalize(self._image_features(**keywords).float(), dim=-1)

    @torch.inference_mode()
    def embed_patches(self, image: Image.Image, size: int) -> Tensor:
        """Every patch in text space, `(projection_dim, grid_height, grid_width)`, of length 1. The image's shorter
        side is resized to `size` pixels, both sides to whole patches."""
        scale = size / min(image.size)
        height, width = self.to_patches(image.height * scale), self.to_patches(image.width * scale)
        return F.normalize(self._dense(self.prepare([image], [(height, width)]))[0].float(), dim=0)

    @property
    def logit_scale(self) -> float:
        """The factor between cosine similarities and logits."""
        return self.model.logit_scale.exp().item()

    def _text_features(self, **inputs) -> Tensor:
        """`(num_texts, projection_dim)`, of what the tokenizer gives."""
        return self.model.get_text_features(**inputs).pooler_output

    def _image_features(self, **keywords) -> Tensor:
        raise NotImplementedError

    def _dense(self, pixel_values: Tensor) -> Tensor:
        """`(batch_size, projection_dim, grid_height, grid_width)`."""
        raise NotImplementedError


class PromptableAdapter(ModelAdapter):
    """One that draws masks from points and boxes: SAM-CLIP and SAM."""

    @torch.inference_mode()
    def predict_masks(
        self, image: Image.Image, points: Tensor | None = None, boxes: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """
        image (`PIL.Image.Image`):
            Made ready by the model's own processor.
        points (`torch.Tensor` of shape `(num_prompts, 2)`):
            x and y of one point inside of every object, in pixels. Gives three masks each.
        boxes (`torch.Tensor` of shape `(num_prompts, 4)`):
            x1, y1, x2, y2. Gives one mask each.

        Returns masks `(num_prompts, num_masks, height, width)` of type bool at the image's size, and predicted IoUs
        `(num_prompts, num_masks)`.
        """
        inputs = self.processor(images=image, return_tensors="pt")
        pixel_values = inputs["pixel_values"].to(self.model.device, self.model.dtype)
        embeddings = self.model.get_image_embeddings(pixel_values)
        reshaped = [side.item() for side in inputs["reshaped_input_sizes"][0]]
        scale = torch.tensor([reshaped[1] / image.width, reshaped[0] / image.height])
        masks, scores = [], []
        prompts = points if boxes is None else boxes
        assert prompts is not None
        for chunk in prompts.float().split(PROMPTS_AT_ONCE):
            chunk = (chunk.unflatten(-1, (-1, 2)) * scale).flatten(1).to(self.model.device, self.model.dtype)
            prompt = {"input_points": chunk[None, :, None]} if boxes is None else {"input_boxes": chunk[None]}
            logits, ious = self._decode(embeddings, multimask_output=boxes is None, **prompt)
            own = self.processor.post_process_masks(
                logits.float().cpu(), inputs["original_sizes"], inputs["reshaped_input_sizes"]
            )
            masks.append(torch.as_tensor(own[0]))
            scores.append(ious[0].float().cpu())
        return torch.cat(masks), torch.cat(scores)

    def _decode(self, image_embeddings: Tensor, **prompts) -> tuple[Tensor, Tensor]:
        """Mask logits `(1, num_prompts, num_masks, height, width)` and predicted IoUs `(1, num_prompts,
        num_masks)`."""
        outputs = self.model(image_embeddings=image_embeddings, **prompts)
        return outputs.pred_masks, outputs.iou_scores

    def generate_masks(self, image: Image.Image, **thresholds) -> np.ndarray:
        """Everything mode: `(num_masks, height, width)` of type bool, by the stock `mask-generation` pipeline."""
        generator = pipeline(
            "mask-generation", model=self.model, image_processor=self.image_processor, device=self.model.device
        )
        masks = generator(image, points_per_batch=PROMPTS_AT_ONCE, **thresholds)["masks"]
        shape = (len(masks), image.height, image.width)
        return np.stack([np.asarray(mask) for mask in masks]) if masks else np.zeros(shape, dtype=bool)


class SamAdapter(PromptableAdapter):
    """Any [`SamModel`]."""

    @torch.inference_mode()
    def patch_features(self, images: Sequence[Image.Image], size: int) -> dict[str, Tensor]:
        """From the image encoder: what its last layer leaves for the neck. SAM knows one size: `size` must be that."""
        own = self.model.config.vision_config.image_size
        if size != own:
            raise ValueError(f"{self.name} takes images of {own} x {own} pixels only, not {size}.")
        outputs = self.model.vision_encoder(self._squares(images, size), output_hidden_states=True)
        return {"image encoder": outputs.hidden_states[-1].permute(0, 3, 1, 2)}


class ClipAdapter(ImageTextAdapter):
    """Any [`CLIPModel`], at any size: its table of positions is interpolated."""

    def _image_features(self, **keywords) -> Tensor:
        return self.model.get_image_features(**keywords, interpolate_pos_encoding=True).pooler_output

    def _tokens(self, pixel_values: Tensor) -> list[Tensor]:
        outputs = self.model.vision_model(pixel_values, interpolate_pos_encoding=True, output_hidden_states=True)
        return [*outputs.hidden_states[:-1], outputs.last_hidden_state]

    def _grid(self, tokens: Tensor, pixel_values: Tensor) -> Tensor:
        """Tokens without the class token, on their grid."""
        rows, columns = (side // self.patch_size for side in pixel_values.shape[-2:])
        return tokens[:, 1:].transpose(1, 2).unflatten(2, (rows, columns))

    def _dense(self, pixel_values: Tensor) -> Tensor:
        """Patch tokens pass what the pooled token passes. In the last layer each takes its own value instead of
        attending and skips the MLP, in the manner of MaskCLIP (Zhou et al. 2022): a CLIP's patches at their best,
        about twice as good in the miniature as plain tokens."""
        vision = self.model.vision_model
        last = vision.encoder.layers[-1]
        tokens = self._tokens(pixel_values)[-2]
        tokens = tokens + last.self_attn.out_proj(last.self_attn.v_proj(last.layer_norm1(tokens)))
        return self._grid(self.model.visual_projection(vision.post_layernorm(tokens)), pixel_values)

    @torch.inference_mode()
    def patch_features(self, images: Sequence[Image.Image], size: int) -> dict[str, Tensor]:
        """From the image encoder: its last layer's."""
        pixel_values = self._squares(images, size)
        return {"image encoder": self._grid(self._tokens(pixel_values)[-1], pixel_values)}

    @torch.inference_mode()
    def pooled_features(self, images: Sequence[Image.Image], size: int) -> dict[str, Tensor]:
        """From the image encoder: what its projection takes (as Radford et al. 2021, appendix A.3)."""
        outputs = self.model.vision_model(self._squares(images, size), interpolate_pos_encoding=True)
        return {"image encoder": outputs.pooler_output}


class SiglipAdapter(ImageTextAdapter):
    """Any [`SiglipModel`], SigLIP 2's of a fixed size too, at any size: its table of positions is interpolated."""

    padding = "max_length"  # as it was trained, and without a mask

    def _text_features(self, **inputs) -> Tensor:
        return super()._text_features(input_ids=inputs["input_ids"])

    def _image_features(self, **keywords) -> Tensor:
        return self.model.get_image_features(**keywords, interpolate_pos_encoding=True).pooler_output

    def _grid(self, pixel_values: Tensor) -> Tensor:
        """The last layer's tokens `(batch_size, grid_height, grid_width, hidden_size)`."""
        tokens = self.model.vision_model(pixel_values, interpolate_pos_encoding=True).last_hidden_state
        rows, columns = (side // self.patch_size for side in pixel_values.shape[-2:])
        return tokens.unflatten(1, (rows, columns))

    def _dense(self, pixel_values: Tensor) -> Tensor:
        """Each patch passes the pooling head as if it were all that the head attends to, in the manner of MaskCLIP
        (Zhou et al. 2022)."""
        head, tokens = self.model.vision_model.head, self._grid(pixel_values)
        weight, bias = (p[-tokens.shape[-1] :] for p in (head.attention.in_proj_weight, head.attention.in_proj_bias))
        pooled = head.attention.out_proj(F.linear(tokens, weight, bias))  # the value's part of the three projections
        return (pooled + head.mlp(head.layernorm(pooled))).permute(0, 3, 1, 2)

    @torch.inference_mode()
    def patch_features(self, images: Sequence[Image.Image], size: int) -> dict[str, Tensor]:
        """From the image encoder: its last layer's."""
        return {"image encoder": self._grid(self._squares(images, size)).permute(0, 3, 1, 2)}

    @torch.inference_mode()
    def pooled_features(self, images: Sequence[Image.Image], size: int) -> dict[str, Tensor]:
        """From the image encoder: what its pooling head gives, which is the embedding itself."""
        return {"image encoder": self._image_features(pixel_values=self._squares(images, size))}


class SamClipAdapter(ImageTextAdapter, PromptableAdapter):
    """Any SAM-CLIP. `model` is a [`SamClipForImageSegmentation`]; what a [`SamClipModel`] does, it does by that."""

    def _decode(self, image_embeddings: Tensor, **prompts) -> tuple[Tensor, Tensor]:
        return self.model.predict_masks(image_embeddings, **prompts)

    def _image_features(self, **keywords) -> Tensor:
        return self.model.get_image_features(**keywords).pooler_output

    def _dense(self, pixel_values: Tensor) -> Tensor:
        patch_tokens = self.model.vision_encoder(pixel_values).patch_tokens
        return self.model.clip_head.project_patches(self.model.clip_head(patch_tokens))

    @torch.inference_mode()
    def patch_features(self, images: Sequence[Image.Image], size: int) -> dict[str, Tensor]:
        """From the image encoder: what its last layer leaves for the neck and the CLIP head; and from the latter."""
        patch_tokens = self.model.vision_encoder(self._squares(images, size)).patch_tokens
        sources = {"image encoder": patch_tokens, "CLIP head": self.model.clip_head(patch_tokens)}
        return {source: tokens.permute(0, 3, 1, 2) for source, tokens in sources.items()}

    @torch.inference_mode()
    def pooled_features(self, images: Sequence[Image.Image], size: int) -> dict[str, Tensor]:
        """From the image encoder: the mean over patches; from the CLIP head: what its MLP takes."""
        features, head = self.patch_features(images, size), self.model.clip_head
        pooled = {source: patches.mean(dim=(2, 3)) for source, patches in features.items()}
        if head.pooling == "max":
            pooled["CLIP head"] = features["CLIP head"].amax(dim=(2, 3))
        return pooled | {"CLIP head": head.layer_norm(pooled["CLIP head"])}


class CascadeAdapter(ModelAdapter):
    """A [`SamModel`]'s everything mode whose masks a [`CLIPModel`] names one by one (paper, table 7)."""

    def __init__(self, sam: PromptableAdapter, clip: ImageTextAdapter):
        self.name, self.sam, self.clip = f"{sam.name}+{clip.name}", sam, clip

    @property
    def models(self) -> list[PreTrainedModel]:
        return [self.sam.model, self.clip.model]

    @torch.inference_mode()
    def name_masks(self, image: Image.Image, masks: np.ndarray, text_embeds: Tensor) -> Tensor:
        """Similarities `(num_masks, num_texts)`: CLIP sees the box around each mask, what is outside of the mask in
        the normalisation's mean colour."""
        pixels = np.asarray(image)
        mean = np.asarray(self.clip.image_processor.image_mean) * 255
        crops = []
        for mask in masks:
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            crop = np.where(mask[box][..., None], pixels[box], mean).astype(np.uint8)
            crops.append(Image.fromarray(padded_square(crop, mean)))
        embeds = [
            self.clip.embed_images(crops[start : start + CROPS_AT_ONCE])
            for start in range(0, len(crops), CROPS_AT_ONCE)
        ]
        return torch.cat(embeds) @ text_embeds.T


def middle_square(image: Image.Image) -> Image.Image:
    """As large as the image allows."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def padded_square(pixels: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Pixels `(height, width, 3)` in the middle of a square of a colour."""
    height, width = pixels.shape[:2]
    side = max(height, width)
    square = np.empty((side, side, 3), dtype=np.uint8)
    square[:] = colour.astype(np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = pixels
    return square


KINDS: dict[str, tuple[type, type[ModelAdapter]]] = {
    "samclip": (SamClipForImageSegmentation, SamClipAdapter),
    "sam": (SamModel, SamAdapter),
    "clip": (CLIPModel, ClipAdapter),
    "siglip": (SiglipModel, SiglipAdapter),
}


def kinds_of(name: str) -> list[tuple[type, type[ModelAdapter]]]:
    """
    The classes of a model, or of a cascade's two, by what `load` takes, from configurations alone.

    Raises `ValueError` for another kind of model, `OSError` where there is none.
    """
    kinds = []
    for part in name.split("+", 1):
        if Path(part).is_absolute() and not Path(part).is_dir():
            raise FileNotFoundError(f"There is no folder {part}.")  # the Hub would complain of slashes
        model_type = AutoConfig.from_pretrained(part).model_type
        if model_type not in KINDS:
            raise ValueError(
                f"{part} is a model of type {model_type!r}; a SAM-CLIP, a SAM, a CLIP and a SigLIP can be judged."
            )
        kinds.append(KINDS[model_type])
    if len(kinds) == 2 and not (
        issubclass(kinds[0][1], PromptableAdapter) and issubclass(kinds[1][1], ImageTextAdapter)
    ):
        raise ValueError(f"A cascade is a SAM, a plus and a CLIP, in that order; got {name!r}.")
    return kinds


def load(name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> ModelAdapter:
    """
    A model by its folder or name on the Hub: a SAM-CLIP, a SAM, a CLIP, a SigLIP, or "SAM+CLIP", the cascade of two.

    Raises `ValueError` for another kind of model, `OSError` where there is none.
    """
    candidates = []
    for part, (model_class, candidate_class) in zip(name.split("+", 1), kinds_of(name), strict=True):
        model = model_class.from_pretrained(part, dtype=dtype).to(device)  # type: ignore[attr-defined]
        candidates.append(candidate_class(part, model, AutoProcessor.from_pretrained(part)))
    return candidates[0] if len(candidates) == 1 else CascadeAdapter(*candidates)  # type: ignore[arg-type]
