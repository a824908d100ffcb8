"""
Model adapters: one interface for the SAM-CLIPs, SAMs, CLIPs and SigLIPs that evaluators compare. All of them get the
same images.

>>> from samclip_hf import miniature
>>> adapter = load_adapter(str(miniature.clip_teacher()))
>>> adapter.embed_texts(["a red dotted shape"]).shape
torch.Size([1, 128])
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoProcessor,
    CLIPModel,
    PreTrainedConfig,
    PreTrainedModel,
    SamModel,
    SiglipModel,
    pipeline,
)

from ..clip_tower_samclip import project_siglip_patches, replace_attention_by_values
from ..identity import hash_configuration, hash_json, hash_weights
from ..images import mask_to_box, mean_and_std, normalize
from ..modeling_samclip import check_tokenizer, load_complete_model
from ..processing_samclip import SamClipProcessor
from ..segmentation_samclip import SamClipForImageSegmentation, canonicalize_text

TEXT_BATCH_SIZE = 256
PROMPT_BATCH_SIZE = 64  # of one image; it determines the memory of the mask decoder
CROP_BATCH_SIZE = 64


class ModelAdapter:
    """
    A model for evaluation.

    name (`str`):
        The name in results.
    model (`PreTrainedModel`):
        The model. It is set to evaluation mode.
    processor (`ProcessorMixin`):
        The model's processor.

    Attributes:
        weights (`str`): Hash of the weights that the adapter was created with, see [`hash_weights`].
        configuration (`str`): Hash of configuration and processor, see [`hash_configuration`].
    """

    def __init__(self, name: str, model: PreTrainedModel, processor):
        self.name, self.processor = name, processor
        self.model = model.eval()
        self.image_processor = processor.image_processor
        self.weights, self.configuration = hash_weights(model), hash_configuration(model, processor)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> None:
        """Moves and casts the model. `weights` stays the hash of the weights before the cast."""
        self.model.to(device, dtype)

    @property
    def identity(self) -> str:
        """A hash of weights and configuration. Results of equal identities and dtypes are of the same model."""
        return hash_json([self.weights, self.configuration])

    @property
    def untrained(self) -> list[str]:
        """Names of the parts of the model with new weights: all of their biases are exactly 0. Empty for a trained
        model."""
        biases: dict[str, bool] = {}
        for name, parameter in self.model.named_parameters():
            if name.endswith("bias"):
                part = ".".join(name.split(".")[:2])
                biases[part] = biases.get(part, True) and not parameter.any()
        return sorted(part for part, are_zero in biases.items() if are_zero)

    @property
    def patch_size(self) -> int:
        return self.model.config.vision_config.patch_size

    def preprocess(self, images: Sequence[Image.Image], size: tuple[int, int]) -> Tensor:
        """Resizes whole images to one `size` (height, width), without cropping or padding, and normalizes them.
        Returns `pixel_values` `(num_images, 3, height, width)`."""
        height, width = size
        resized = [np.asarray(image.resize((width, height), self.image_processor.resample)) for image in images]
        pixels = torch.from_numpy(np.stack(resized)).to(self.model.device).permute(0, 3, 1, 2)
        pixel_values = normalize(pixels, *mean_and_std(self.image_processor))
        return pixel_values.to(self.model.dtype)

    def round_to_patches(self, side: float) -> int:
        """Rounds a side in pixels to whole patches, at least one."""
        return max(1, round(side / self.patch_size)) * self.patch_size

    def patch_features(self, images: Sequence[Image.Image], size: int) -> dict[str, Tensor]:
        """Returns the frozen features on which heads are trained (paper, section 5 and table 3),
        `(num_images, hidden_size, grid_height, grid_width)`, by the name of the module that computes them. Images are
        stretched to squares of `size` pixels."""
        raise NotImplementedError

    def pooled_features(self, images: Sequence[Image.Image], size: int) -> dict[str, Tensor]:
        """Returns the frozen features of a linear classifier (paper, section 5 and table 4),
        `(num_images, hidden_size)`: the model's own pooling or, if it has none, the mean over patches."""
        return {source: features.mean(dim=(2, 3)) for source, features in self.patch_features(images, size).items()}

    def _preprocess_squares(self, images: Sequence[Image.Image], size: int) -> Tensor:
        side = self.round_to_patches(size)
        return self.preprocess(images, (side, side))


class ImageTextAdapter(ModelAdapter):
    """A model that embeds images and texts: SAM-CLIP, CLIP and SigLIP."""

    padding: bool | str = True  # of texts: to the longest of a batch
    patch_rule: str = "not described"  # how patches are embedded in the text space, for the results

    @property
    def has_siglip_text(self) -> bool:
        """Whether the text tower is SigLIP's, which was trained on texts in lower case."""
        return False

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Returns unit embeddings `(num_texts, projection_dim)`. Texts that are too long for the text tower are
        truncated, as for CLIP. For SigLIP, they are converted to lower case."""
        if self.has_siglip_text:
            texts = [text.lower() for text in texts]
        features = []
        max_length = self.model.config.text_config.max_position_embeddings
        for start in range(0, len(texts), TEXT_BATCH_SIZE):
            inputs = self.processor.tokenizer(
                list(texts[start : start + TEXT_BATCH_SIZE]),
                padding=self.padding,
                truncation=True,
                max_length=max_length,
                padding_side="right",
                return_tensors="pt",
            )
            features.append(self._text_features(**inputs.to(self.model.device)).float())
        return F.normalize(torch.cat(features), dim=-1)

    @torch.inference_mode()
    def embed_names(self, names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Returns unit embeddings `(num_names, projection_dim)`: for each name, the mean of the unit embeddings of its
        templates (Radford et al. 2021, section 3.1.4). For SigLIP, both are converted by [`canonicalize_text`]."""
        if self.has_siglip_text:
            names = [canonicalize_text(name, keep=",") for name in names]
            templates = [canonicalize_text(template, keep="{}") for template in templates]
        texts = [template.replace("{}", name) for name in names for template in templates]
        return F.normalize(self.embed_texts(texts).unflatten(0, (len(names), len(templates))).mean(dim=1), dim=-1)

    @torch.inference_mode()
    def embed_images(self, images: Sequence[Image.Image], size: int | None = None) -> Tensor:
        """Returns unit embeddings `(num_images, projection_dim)`. Images are prepared by the model's own image
        processor or, if `size` is given, cropped to their center squares and resized to `size` pixels (as CLIP's image
        processor does)."""
        if size is None:
            inputs = self.processor(images=list(images), return_tensors="pt").to(self.model.device)
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
            arguments = {name: inputs[name] for name in ("pixel_values", "reshaped_input_sizes") if name in inputs}
        else:
            arguments = {"pixel_values": self._preprocess_squares([center_square(image) for image in images], size)}
        return F.normalize(self._image_features(**arguments).float(), dim=-1)

    @torch.inference_mode()
    def embed_patches(self, image: Image.Image, size: int) -> Tensor:
        """Returns unit embeddings of all patches in the text space, `(projection_dim, grid_height, grid_width)`. The
        image's shorter side is resized to `size` pixels, and both sides are rounded to whole patches."""
        scale = size / min(image.size)
        height, width = self.round_to_patches(image.height * scale), self.round_to_patches(image.width * scale)
        return F.normalize(self._dense_embeds(self.preprocess([image], (height, width)))[0].float(), dim=0)

    @property
    def logit_scale(self) -> float:
        """The factor from cosine similarities to logits."""
        return self.model.logit_scale.exp().item()

    def _text_features(self, **inputs) -> Tensor:
        """Returns `(num_texts, projection_dim)` for the tokenizer's outputs."""
        return self.model.get_text_features(**inputs).pooler_output

    def _image_features(self, **inputs) -> Tensor:
        """Returns `(num_images, projection_dim)`. Subclasses implement it."""
        raise NotImplementedError

    def _dense_embeds(self, pixel_values: Tensor) -> Tensor:
        """Returns `(batch_size, projection_dim, grid_height, grid_width)`."""
        raise NotImplementedError


class PromptableAdapter(ModelAdapter):
    """A model that predicts masks from points and boxes: SAM-CLIP and SAM."""

    @torch.inference_mode()
    def predict_masks(
        self, image: Image.Image, points: Tensor | None = None, boxes: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """
        Predicts masks from either points or boxes.

        Args:
            image (`PIL.Image.Image`):
                An image. The model's own processor prepares it.
            points (`torch.Tensor` of shape `(num_prompts, 2)`, *optional*):
                x and y in pixels of one point in each object. Each gives three masks.
            boxes (`torch.Tensor` of shape `(num_prompts, 4)`, *optional*):
                x1, y1, x2, y2 in pixels. Each gives one mask.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Masks `(num_prompts, num_masks, height, width)` of type bool at the
            image's size, and predicted IoUs `(num_prompts, num_masks)`.
        """
        inputs = self.processor(images=image, return_tensors="pt")
        pixel_values = inputs["pixel_values"].to(self.model.device, self.model.dtype)
        embeddings = self.model.get_image_embeddings(pixel_values)
        reshaped = [side.item() for side in inputs["reshaped_input_sizes"][0]]
        scale = torch.tensor([reshaped[1] / image.width, reshaped[0] / image.height])
        masks, scores = [], []
        prompts = points if boxes is None else boxes
        assert prompts is not None
        for batch in prompts.float().split(PROMPT_BATCH_SIZE):
            # In float32 with any dtype of the model: bfloat16 has steps of 4 px between 512 and 1024.
            batch = (batch.unflatten(-1, (-1, 2)) * scale).flatten(1).to(self.model.device)
            prompt = {"input_points": batch[None, :, None]} if boxes is None else {"input_boxes": batch[None]}
            outputs = self.model(image_embeddings=embeddings, multimask_output=boxes is None, **prompt)
            upsampled = self.processor.post_process_masks(
                outputs.pred_masks.float().cpu(), inputs["original_sizes"], inputs["reshaped_input_sizes"]
            )
            masks.append(torch.as_tensor(upsampled[0]))
            scores.append(outputs.iou_scores[0].float().cpu())
        return torch.cat(masks), torch.cat(scores)

    def generate_masks(self, image: Image.Image, **thresholds) -> np.ndarray:
        """Returns the masks of everything mode `(num_masks, height, width)` of type bool: the result of the stock
        `mask-generation` pipeline with these `thresholds`."""
        generator = pipeline(
            "mask-generation",
            model=self.model,
            image_processor=self.image_processor,
            device=self.model.device,
        )
        masks = generator(image, points_per_batch=PROMPT_BATCH_SIZE, **thresholds)["masks"]
        shape = (len(masks), image.height, image.width)
        return np.stack([np.asarray(mask) for mask in masks]) if masks else np.zeros(shape, dtype=bool)


class SamAdapter(PromptableAdapter):
    """Any [`SamModel`]."""

    def to(self, device: torch.device | str, dtype: torch.dtype) -> None:
        """As [`ModelAdapter.to`]. Positions are embedded in float32 and then cast: `SamModel` casts coordinates to the
        type of the embedding's parameter first, which rounds points and boxes."""
        embeddings = (self.model.shared_image_embedding, self.model.prompt_encoder.shared_embedding)
        values = [module.positional_embedding.detach().clone() for module in embeddings]
        super().to(device, dtype)
        if dtype == torch.float32:
            return
        for module, value in zip(embeddings, values, strict=True):
            del module.positional_embedding  # a parameter, whose type `model.dtype` would be
            module.register_buffer("positional_embedding", value.to(device))
            module.register_forward_hook(lambda module, inputs, output: output.to(dtype))

    @torch.inference_mode()
    def patch_features(self, images: Sequence[Image.Image], size: int) -> dict[str, Tensor]:
        """Returns the outputs of the image encoder's last layer, before the neck. Raises `ValueError` if `size` is not
        the model's own, because SAM accepts no other."""
        own_size = self.model.config.vision_config.image_size
        if size != own_size:
            raise ValueError(f"{self.name} accepts images of {own_size} x {own_size} pixels only, got {size}.")
        outputs = self.model.vision_encoder(self._preprocess_squares(images, size), output_hidden_states=True)
        return {"image encoder": outputs.hidden_states[-1].permute(0, 3, 1, 2)}


class ClipAdapter(ImageTextAdapter):
    """Any [`CLIPModel`]. Position embeddings are interpolated for other sizes than the model's own."""

    patch_rule = "CLIP's last layer with each patch's own value in place of attention, without its MLP; projection"

    def _image_features(self, **inputs) -> Tensor:
        return self.model.get_image_features(**inputs, interpolate_pos_encoding=True).pooler_output

    def _tokens(self, pixel_values: Tensor) -> list[Tensor]:
        """Returns the tokens before each layer and after the last."""
        outputs = self.model.vision_model(pixel_values, interpolate_pos_encoding=True, output_hidden_states=True)
        return [*outputs.hidden_states[:-1], outputs.last_hidden_state]

    def _to_grid(self, tokens: Tensor, pixel_values: Tensor) -> Tensor:
        """Drops the class token and returns the others as `(batch_size, hidden_size, grid_height, grid_width)`."""
        rows, columns = (side // self.patch_size for side in pixel_values.shape[-2:])
        return tokens[:, 1:].transpose(1, 2).unflatten(2, (rows, columns))

    def _dense_embeds(self, pixel_values: Tensor) -> Tensor:
        vision = self.model.vision_model
        tokens = replace_attention_by_values(vision, self._tokens(pixel_values)[-2])
        return self._to_grid(self.model.visual_projection(vision.post_layernorm(tokens)), pixel_values)

    @torch.inference_mode()
    def patch_features(self, images: Sequence[Image.Image], size: int) -> dict[str, Tensor]:
        """Returns the outputs of the vision tower's last layer."""
        pixel_values = self._preprocess_squares(images, size)
        return {"image encoder": self._to_grid(self._tokens(pixel_values)[-1], pixel_values)}

    @torch.inference_mode()
    def pooled_features(self, images: Sequence[Image.Image], size: int) -> dict[str, Tensor]:
        """Returns the inputs of the visual projection (as Radford et al. 2021, appendix A.3)."""
        outputs = self.model.vision_model(self._preprocess_squares(images, size), interpolate_pos_encoding=True)
        return {"image encoder": outputs.pooler_output}


class SiglipAdapter(ImageTextAdapter):
    """Any [`SiglipModel`], including SigLIP 2 of a fixed size. Position embeddings are interpolated for other sizes
    than the model's own."""

    padding = "max_length"  # as in its training, without an attention mask
    patch_rule = "SigLIP's pooling head with each patch's own value in place of attention"
    has_siglip_text = True

    def _text_features(self, **inputs) -> Tensor:
        return super()._text_features(input_ids=inputs["input_ids"])

    def _image_features(self, **inputs) -> Tensor:
        return self.model.get_image_features(**inputs, interpolate_pos_encoding=True).pooler_output

    def _grid_tokens(self, pixel_values: Tensor) -> Tensor:
        """Returns the last layer's tokens `(batch_size, grid_height, grid_width, hidden_size)`."""
        tokens = self.model.vision_model(pixel_values, interpolate_pos_encoding=True).last_hidden_state
        rows, columns = (side // self.patch_size for side in pixel_values.shape[-2:])
        return tokens.unflatten(1, (rows, columns))

    def _dense_embeds(self, pixel_values: Tensor) -> Tensor:
        tokens = self._grid_tokens(pixel_values)
        return project_siglip_patches(self.model.vision_model, tokens).permute(0, 3, 1, 2)

    @torch.inference_mode()
    def patch_features(self, images: Sequence[Image.Image], size: int) -> dict[str, Tensor]:
        """Returns the outputs of the vision tower's last layer."""
        return {"image encoder": self._grid_tokens(self._preprocess_squares(images, size)).permute(0, 3, 1, 2)}

    @torch.inference_mode()
    def pooled_features(self, images: Sequence[Image.Image], size: int) -> dict[str, Tensor]:
        """Returns the outputs of the pooling head, which are the image embeddings."""
        return {"image encoder": self._image_features(pixel_values=self._preprocess_squares(images, size))}


class SamClipVisionAdapter(PromptableAdapter):
    """A SAM-CLIP without its text tower, loaded as a [`SamClipForImageSegmentation`]."""

    @torch.inference_mode()
    def patch_features(self, images: Sequence[Image.Image], size: int) -> dict[str, Tensor]:
        """Returns the outputs of the image encoder's last layer, before the neck, and of a merged model's CLIP
        head."""
        patch_tokens = self.model.vision_encoder(self._preprocess_squares(images, size)).patch_tokens
        sources = {"image encoder": patch_tokens}
        if self.model.config.merged:
            sources["CLIP head"] = self.model.clip_head(patch_tokens)
        return {source: tokens.permute(0, 3, 1, 2) for source, tokens in sources.items()}

    @torch.inference_mode()
    def pooled_features(self, images: Sequence[Image.Image], size: int) -> dict[str, Tensor]:
        """Returns the mean over the image encoder's patches, and the inputs of the MLP of a merged model's CLIP
        head."""
        patch_tokens = self.model.vision_encoder(self._preprocess_squares(images, size)).patch_tokens
        features, head = {"image encoder": patch_tokens.mean(dim=(1, 2))}, self.model.clip_head
        if self.model.config.merged:
            features["CLIP head"] = head.pool_tokens(head(patch_tokens))
        return features


class SamClipAdapter(ImageTextAdapter, SamClipVisionAdapter):
    """A merged SAM-CLIP with its text tower."""

    patch_rule = "CLIP head: LayerNorm and MLP of each patch"

    @property
    def has_siglip_text(self) -> bool:
        return self.model.config.has_siglip_text

    def _image_features(self, **inputs) -> Tensor:
        return self.model.get_image_features(**inputs).pooler_output

    def _dense_embeds(self, pixel_values: Tensor) -> Tensor:
        patch_tokens = self.model.get_vision_embeds(pixel_values).patch_tokens
        return self.model.clip_head.project_patches(self.model.clip_head(patch_tokens))


class UnmergedAdapter(SamClipAdapter):
    """An unmerged SAM-CLIP with its text tower: a SAM and a CLIP or SigLIP. Image and patch embeddings run CLIP's
    vision tower only."""

    def __init__(self, name: str, model: PreTrainedModel, processor):
        super().__init__(name, model, processor)
        rule = (SiglipAdapter if self.has_siglip_text else ClipAdapter).patch_rule
        self.patch_rule = f"{rule}; stretched to {model.config.clip_image_size} px"

    def _dense_embeds(self, pixel_values: Tensor) -> Tensor:
        tower = self.model.clip_head
        return tower.project_patches(tower(tower.encode_pixels(pixel_values, None)))

    @torch.inference_mode()
    def compare_crops(self, image: Image.Image, masks: np.ndarray, text_embeds: Tensor, masked: bool = True) -> Tensor:
        """
        Compares masks with texts, as a cascade of SAM and CLIP does (paper, table 7), not as the model itself does.
        The input of CLIP is a crop of the box of each mask, padded with the mean color of CLIP's normalization to a
        square, at CLIP's own image size.

        Args:
            image (`PIL.Image.Image`):
                An image in RGB.
            masks (`numpy.ndarray` of shape `(num_masks, height, width)` and type bool):
                Masks, none of them empty.
            text_embeds (`torch.Tensor` of shape `(num_texts, projection_dim)`):
                Unit embeddings of the texts.
            masked (`bool`, *optional*, defaults to `True`):
                Whether pixels outside the mask have the mean color as well.

        Returns:
            `torch.Tensor` of shape `(num_masks, num_texts)`: Cosine similarities.
        """
        config, tower = self.model.config, self.model.clip_head
        mean, std = (np.asarray(values) for values in mean_and_std(self.image_processor))
        std = std / config.clip_pixel_scale  # CLIP's
        mean = mean - config.clip_pixel_shift * std
        color = (mean * 255).round()
        size = config.clip_vision_config.image_size
        pixels, crops = np.asarray(image), []
        for mask in masks:
            box = mask_to_box(mask)
            assert box is not None
            left, top, right, bottom = box
            crop = pixels[top:bottom, left:right]
            if masked:
                crop = np.where(mask[top:bottom, left:right, None], crop, color).astype(np.uint8)
            square = Image.fromarray(pad_to_square(crop, color))
            crops.append(np.asarray(square.resize((size, size), Image.Resampling.BICUBIC)))
        similarities = []
        for batch in torch.from_numpy(np.stack(crops)).split(CROP_BATCH_SIZE):
            pixel_values = normalize(batch.to(self.model.device).permute(0, 3, 1, 2), mean.tolist(), std.tolist())
            features = tower.vision_model(pixel_values.to(self.model.dtype)).pooler_output
            features = features if tower.projection is None else tower.projection(features)
            similarities.append(F.normalize(features.float(), dim=-1) @ text_embeds.T)
        return torch.cat(similarities)


def describe_crop(size: int | None) -> dict[str, Any]:
    """Describes how [`ImageTextAdapter.embed_images`] prepares images, for [`Evaluator.describe`]."""
    by_model = "each model's own image processor"
    return {"size": size or by_model, "crop": "middle square" if size else by_model}


def describe_sizes(model: ModelAdapter, has_own_size: bool = True) -> dict[str, str]:
    """Describes the size to which a model's own image processor resizes images, unless the protocol defines another
    one, and the size of the input of an unmerged model's vision tower, for [`Evaluator.describe_settings`]."""
    sizes = {"image size": _own_size(model)} if has_own_size else {}
    if isinstance(model, UnmergedAdapter):
        side = model.model.config.clip_image_size
        sizes["image size of CLIP"] = f"stretched to {side} x {side} px"
    return sizes


def _own_size(model: ModelAdapter) -> str:
    processor = model.image_processor.to_dict()
    if not processor.get("do_resize", True):
        return "not resized"
    size = ", ".join(f"{side.replace('_', ' ')} {pixels} px" for side, pixels in processor["size"].items() if pixels)
    crop = processor.get("crop_size")
    return f"{size}, center {crop['height']} x {crop['width']} px" if processor.get("do_center_crop") else size


def center_square(image: Image.Image) -> Image.Image:
    """Returns the largest square at the center of an image."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def pad_to_square(pixels: np.ndarray, color: np.ndarray) -> np.ndarray:
    """Returns pixels `(height, width, 3)` at the center of a square of a color `(3,)`."""
    height, width = pixels.shape[:2]
    side = max(height, width)
    square = np.empty((side, side, 3), dtype=np.uint8)
    square[:] = color.astype(np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = pixels
    return square


ADAPTERS: dict[str, tuple[Any, type[ModelAdapter]]] = {
    "samclip": (SamClipForImageSegmentation, SamClipAdapter),
    "sam": (SamModel, SamAdapter),
    "clip": (CLIPModel, ClipAdapter),
    "siglip": (SiglipModel, SiglipAdapter),
}


def adapter_class(name: str, clip: str | None = None) -> type[ModelAdapter]:
    """
    Returns the class of adapters for a model. Reads only configurations.

    Args:
        name, clip (`str`):
            As in [`load_adapter`].

    Raises:
        ValueError: The model has another type.
        OSError: There is no such model.
    """
    config = _load_config(name)
    kind = ADAPTERS[config.model_type][1]
    if clip is not None:
        clip_kind = ADAPTERS[_load_config(clip).model_type][1]
        if kind is not SamAdapter or clip_kind not in (ClipAdapter, SiglipAdapter):
            raise ValueError(
                f"{name}+{clip}: a pair must be a SAM and a CLIP or SigLIP, in this order; got "
                f"{kind.__name__.removesuffix('Adapter')} and {clip_kind.__name__.removesuffix('Adapter')}."
            )
        return UnmergedAdapter
    if kind is SamClipAdapter and not config.has_text_tower:
        return SamClipVisionAdapter
    return UnmergedAdapter if kind is SamClipAdapter and not config.merged else kind


def _load_config(name: str) -> PreTrainedConfig:
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise FileNotFoundError(f"There is no folder {name}.")  # transformers would report an invalid Hub name
    config = AutoConfig.from_pretrained(name)
    if config.model_type not in ADAPTERS:
        raise ValueError(
            f"{name} is a model of type {config.model_type!r}. SAM-CLIP, SAM, CLIP and SigLIP can be evaluated."
        )
    return config


def load_adapter(
    name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, clip: str | None = None
) -> ModelAdapter:
    """
    Loads a model for evaluation.

    Args:
        name (`str`):
            The folder or the repository on the Hub of a SAM-CLIP, SAM, CLIP or SigLIP.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`):
            The device of the model.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            The type of its parameters. The model is loaded in float32 and cast.
        clip (`str`, *optional*):
            The folder or the repository of a CLIP or SigLIP: the adapter is of the unmerged model of the SAM `name`
            and this CLIP, see [`SamClipModel.from_teachers`].

    Raises:
        ValueError: The model has another type, its files lack weights, or the two models cannot be combined.
        OSError: There is no such model, or its weights cannot be read.
    """
    kind = adapter_class(name, clip)
    if clip is None:
        model_class = ADAPTERS[_load_config(name).model_type][0]
        model, processor = (
            load_complete_model(model_class, name, dtype=torch.float32),
            AutoProcessor.from_pretrained(name),
        )
        if hasattr(processor, "tokenizer"):
            check_tokenizer(processor.tokenizer, name)
    else:
        model = SamClipForImageSegmentation.from_teachers(name, clip, merged=False)
        processor, name = SamClipProcessor.from_teachers(name, clip), f"{name}+{clip}"
    adapter = kind(name, model, processor)
    adapter.to(device, dtype)
    return adapter
