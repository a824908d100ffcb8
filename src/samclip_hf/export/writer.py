"""
SAM-CLIP as ONNX, in the parts that are asked for one by one.

    python -m samclip_hf.export --model runs/stage3 --output_dir onnx
    python -m samclip_hf.export --model runs/stage3 --output_dir onnx --parts image_encoder text_encoder

Writes `<part>.onnx` and what is needed to run them without PyTorch: `samclip.json` (preprocessing, sizes, constants),
`tokenizer.json` and, of a checkpoint with a vocabulary of its own, `class_embeds.npy`. Every file is checked by onnx's
checker, and run by onnxruntime on pictures of other sizes than it was traced with: what it gives must be what PyTorch
gives. Needs the extra `export`; `docs/export.md` says how the parts are put together.
"""

import argparse
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.export import Dim
from transformers import AutoConfig, AutoProcessor
from transformers.utils import logging

from .. import miniature
from ..miniature.scenes import render
from ..modeling_samclip import SamClipModel
from ..segmentation_samclip import SamClipForImageSegmentation
from ..vision_encoder_samclip import SamClipVisionAttention, SamClipVisionLayer

logger = logging.get_logger(__name__)

PART_NAMES = ("image_encoder", "mask_decoder", "segment_encoder", "text_encoder")
OPSETS = range(18, 24)  # what PyTorch's exporter is written for, and up to where it converts
TOLERANCE = 1e-4  # of the largest value of an output
MAX_IMAGES = 1024
MAX_PATCHES = 512  # a side: 8192 px with patches of 16
MAX_PROMPTS = 65536  # of an image, and points of a prompt, and texts
MERGED_VALUES = 2**20  # of a weight that occurs twice
EXTERNAL_ABOVE = 2**31 - 2**24  # bytes of weights: one protocol buffer holds less than 2 GB
BOX_CORNERS = (2, 3)  # point labels, as in SAM's own ONNX export: top left, bottom right

FILES = ("samclip.json", "tokenizer.json", "class_embeds.npy")  # and those of the parts


@dataclass
class Part:
    r"""
    What becomes one file.

    name (`str`):
        Of the file.
    module (`nn.Module`):
        Takes tensors, returns tensors.
    inputs, outputs (`dict[str, dict[int, Dim]]`):
        Names, and which of their axes have any length.
    make_inputs (`Callable`):
        From the number of images, rows and columns of patches, and of texts or prompts, to inputs of these sizes.
    window_size (`int`):
        Of the attention's windows, in patches.
    """

    name: str
    module: nn.Module
    inputs: dict[str, dict[int, Any]]
    outputs: dict[str, dict[int, Any]]
    make_inputs: Callable[[int, int, int, int], tuple[Tensor, ...]]
    window_size: int = 0


class ImageEncoder(nn.Module):
    """Image encoder and CLIP head."""

    def __init__(self, model: SamClipModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, reshaped_input_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As [`SamClipModel.forward`]: `image_embeddings`, `image_embeds`, `dense_embeds` and, for the
        [`SegmentEncoder`], `patch_tokens` `(batch_size, grid_height, grid_width, hidden_size)`."""
        outputs = self.model.vision_encoder(pixel_values)
        head_tokens, pooled = self.model._pool_image(outputs.patch_tokens, reshaped_input_sizes)
        dense_embeds = F.normalize(self.model.clip_head.project_patches(head_tokens), dim=1)
        return outputs.last_hidden_state, F.normalize(pooled, dim=-1), dense_embeds, outputs.patch_tokens


class TextEncoder(nn.Module):
    """CLIP's text tower and its projection."""

    def __init__(self, model: SamClipModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """`text_embeds` `(num_texts, projection_dim)`, of length 1, of tokens `(num_texts, sequence_length)`."""
        return F.normalize(self.model.get_text_features(input_ids, attention_mask).pooler_output, dim=-1)


class SiglipTextEncoder(TextEncoder):
    """SigLIP's, which reads texts padded to the longest that it knows, and no mask."""

    def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
        """As [`TextEncoder`]."""
        config = self.model.config.text_config
        padding = torch.full((1, config.max_position_embeddings), config.pad_token_id)
        # Padded by all that could be missing, then cut: the number of tokens makes no case.
        input_ids = torch.cat([input_ids, padding.expand(input_ids.shape[0], -1)], dim=1)
        input_ids = input_ids[:, : config.max_position_embeddings]
        return F.normalize(self.model.get_text_features(input_ids).pooler_output, dim=-1)


class MaskDecoder(nn.Module):
    """Prompt encoder and mask decoder. A box is two points, as in SAM's own ONNX export."""

    def __init__(self, model: SamClipModel):
        super().__init__()
        self.model = model

    def forward(self, image_embeddings: Tensor, input_points: Tensor, input_labels: Tensor) -> tuple[Tensor, Tensor]:
        r"""
        image_embeddings (`torch.Tensor` of shape `(batch_size, output_channels, grid_height, grid_width)`):
            From the [`ImageEncoder`].
        input_points (`torch.Tensor` of shape `(batch_size, num_prompts, num_points, 2)`):
            x and y in pixels of `pixel_values`.
        input_labels (`torch.Tensor` of shape `(batch_size, num_prompts, num_points)`, `int64`):
            1 inside, 0 outside, 2 and 3 a box's upper left and lower right corner, -1 none. A prompt without a box
            ends with a point of label -1.

        Returns `pred_masks` `(batch_size, num_prompts, 4, 4 * grid_height, 4 * grid_width)` and `iou_scores`
        `(batch_size, num_prompts, 4)`: first the one mask of `multimask_output=False`, then the others (three, if the
        configuration does not say otherwise).
        """
        model, encoder = self.model, self.model.prompt_encoder
        batch_size, _, grid_height, grid_width = image_embeddings.shape
        scale = encoder.input_image_size / torch.tensor([grid_width, grid_height])
        points = (input_points + 0.5) * scale / model.config.vision_config.patch_size - 0.5
        sparse_embeddings = encoder._embed_points(points, input_labels, pad=False)
        for label in BOX_CORNERS:
            corner = sparse_embeddings + encoder.point_embed[label].weight
            sparse_embeddings = torch.where((input_labels == label)[..., None], corner, sparse_embeddings)
        no_mask = encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
        positions = model.get_image_wide_positional_embeddings((grid_height, grid_width))
        # Two runs that differ in which masks they return. The second one's work is the same, and leaves the graph.
        masks, iou_scores = zip(
            *(
                model.mask_decoder(
                    image_embeddings=image_embeddings,
                    image_positional_embeddings=positions.expand(batch_size, -1, -1, -1),
                    sparse_prompt_embeddings=sparse_embeddings,
                    dense_prompt_embeddings=no_mask.expand(batch_size, -1, grid_height, grid_width),
                    multimask_output=multimask_output,
                )
                for multimask_output in (False, True)
            ),
            strict=True,
        )
        return torch.cat(masks, dim=2), torch.cat(iou_scores, dim=2)


class SegmentEncoder(nn.Module):
    """The CLIP head on one segment as if it were an image of its own: [`SamClipHead.pool_segments`]."""

    def __init__(self, model: SamClipModel):
        super().__init__()
        self.head = model.clip_head

    def forward(self, patch_tokens: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        r"""
        patch_tokens (`torch.Tensor` of shape `(1, grid_height, grid_width, hidden_size)`):
            From the [`ImageEncoder`].
        rows, columns (`torch.Tensor` of shape `(num_patches,)`, `int64`):
            Where the segment's patches lie.

        Returns `segment_embeds` `(1, projection_dim)`, of length 1.
        """
        head = self.head
        height, width = patch_tokens.shape[1:3]
        tokens, same_window = patch_tokens[0, rows, columns], None
        if head.window_size:
            height = width = head.window_size
            window = torch.stack([rows // height, columns // width])
            same_window = (window[:, :, None] == window[:, None, :]).all(dim=0)
            rows, columns = rows % height, columns % width
        for layer in head.layers:
            assert isinstance(layer, SamClipVisionLayer)
            attended = _attend(layer.attn, layer.layer_norm1(tokens), rows, columns, (height, width), same_window)
            tokens = tokens + attended
            tokens = tokens + layer.mlp(layer.layer_norm2(tokens))
        pooled = tokens.amax(dim=0, keepdim=True) if head.pooling == "max" else tokens.mean(dim=0, keepdim=True)
        return F.normalize(head.mlp(head.layer_norm(pooled)), dim=-1)


def _attend(
    attention: SamClipVisionAttention,
    tokens: Tensor,
    rows: Tensor,
    columns: Tensor,
    grid_size: tuple[int, int],
    mask: Tensor | None,
) -> Tensor:
    """Of one group `(num_patches, hidden_size)` what the attention gives, with the bias inside the dot product."""
    qkv = attention.qkv(tokens).unflatten(-1, (3, attention.num_attention_heads, -1))
    query, key, value = qkv.permute(1, 2, 0, 3).unbind(0)
    queries, keys = [query * attention.scale], [key]
    for table, position in zip(attention._position_tables(*grid_size), (rows, columns), strict=True):
        queries.append(torch.einsum("nqc,qkc->nqk", query, table[position]))
        one_hot = (position[:, None] == torch.arange(table.shape[0])).to(key.dtype)
        keys.append(one_hot.expand(len(key), -1, -1))
    scores = torch.cat(queries, dim=-1) @ torch.cat(keys, dim=-1).transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return attention.proj((scores.softmax(dim=-1) @ value).transpose(0, 1).flatten(1))


def parts_of(model: SamClipModel, processor) -> dict[str, Part]:
    """All that a checkpoint has, by name."""
    images, texts, tokens, prompts, points, patches = (
        Dim(name, min=1, max=largest)
        for name, largest in {
            "images": MAX_IMAGES,
            "texts": MAX_PROMPTS,
            "tokens": model.config.text_config.max_position_embeddings,
            "prompts": MAX_PROMPTS,
            "points": MAX_PROMPTS,
            "patches": MAX_PATCHES**2,
        }.items()
    )
    rows, columns = (Dim(name, min=2, max=MAX_PATCHES) for name in ("rows", "columns"))
    patch_size, grid = model.config.vision_config.patch_size, {0: images, 2: rows, 3: columns}
    parts = [
        Part(
            "image_encoder",
            ImageEncoder(model),
            {
                "pixel_values": {0: images, 2: patch_size * rows, 3: patch_size * columns},
                "reshaped_input_sizes": {0: images},
            },
            {
                "image_embeddings": grid,
                "image_embeds": {0: images},
                "dense_embeds": grid,
                "patch_tokens": {0: images, 1: rows, 2: columns},
            },
            lambda num_images, height, width, _: _pictures(model, processor, num_images, height, width),
            model.config.vision_config.window_size,
        ),
        Part(
            "mask_decoder",
            MaskDecoder(model),
            {
                "image_embeddings": grid,
                "input_points": {0: images, 1: prompts, 2: points},
                "input_labels": {0: images, 1: prompts, 2: points},
            },
            {
                "pred_masks": {0: images, 1: prompts, 3: 4 * rows, 4: 4 * columns},
                "iou_scores": {0: images, 1: prompts},
            },
            lambda num_images, height, width, number: (
                _encoded(model, processor, num_images, height, width).last_hidden_state,
                *_prompts(num_images, number, height * patch_size, width * patch_size),
            ),
        ),
        Part(
            "segment_encoder",
            SegmentEncoder(model),
            {"patch_tokens": {1: rows, 2: columns}, "rows": {0: patches}, "columns": {0: patches}},
            {"segment_embeds": {}},
            lambda _, height, width, number: (
                _encoded(model, processor, 1, height, width).patch_tokens,
                *torch.ones(height, width).triu(1 - number).nonzero().unbind(1),
            ),
            model.clip_head.window_size,
        ),
    ]
    if model.text_model is not None:
        axes = {0: texts, 1: tokens}
        is_siglip = model.config.has_siglip_text
        parts.append(
            Part(
                "text_encoder",
                (SiglipTextEncoder if is_siglip else TextEncoder)(model),
                {"input_ids": axes} if is_siglip else {"input_ids": axes, "attention_mask": axes},
                {"text_embeds": {0: texts}},
                lambda _, height, width, number: _texts(model, processor, number)[: 1 if is_siglip else 2],
            )
        )
    return {part.name: part for part in parts}


def _pictures(model: SamClipModel, processor, num_images: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Drawn scenes in patches so many, of which the first is padded below."""
    height, width = (side * model.config.vision_config.patch_size for side in (rows, columns))
    image_processor = processor.image_processor
    mean, std = (np.float32(values) for values in (image_processor.image_mean, image_processor.image_std))
    scenes = [Image.fromarray(render(0, index).image).resize((width, height)) for index in range(num_images)]
    pixels = (np.stack([np.asarray(scene, dtype=np.float32) for scene in scenes]) / 255 - mean) / std
    sizes = torch.tensor([[height, width]] * num_images)
    sizes[0, 0] = max(1, height - model.config.vision_config.patch_size - 1)
    pixel_values = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    pixel_values[0, :, sizes[0, 0] :] = 0
    return pixel_values, sizes


def _encoded(model: SamClipModel, processor, *size: int):
    """Of [`_pictures`] what the image encoder gives."""
    with torch.no_grad():
        return model.vision_encoder(_pictures(model, processor, *size)[0])


def _prompts(num_images: int, number: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """As many prompts an image, of one point more, of every kind."""
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(num_images, number, number + 1, 2, generator=generator) * torch.tensor([width, height])
    labels = torch.randint(-1, 4, points.shape[:-1], generator=generator)
    return points, labels


def _texts(model: SamClipModel, processor, number: int) -> tuple[Tensor, Tensor]:
    texts = ["a", "a red shape", "something else that is longer"]
    inputs = processor.tokenizer(
        [texts[i % len(texts)] for i in range(number)],
        padding=True,
        truncation=True,
        max_length=model.config.text_config.max_position_embeddings,
        return_attention_mask=True,
        return_tensors="pt",
    )
    return inputs["input_ids"], inputs["attention_mask"]


def export(
    model_name: str | os.PathLike,
    output_dir: str | Path,
    parts: Sequence[str] | None = None,
    opset: int = OPSETS[0],
) -> dict[str, float]:
    r"""
    Writes a checkpoint as ONNX. All or nothing: the folder appears when everything in it has been checked.

    model_name (`str` or `os.PathLike`):
        Folder or name on the Hub of a SAM-CLIP, with its processor.
    output_dir (`str` or `Path`):
        A new or empty folder, or one of an earlier export, which is replaced.
    parts (`Sequence[str]`, *optional*):
        Of "image_encoder", "mask_decoder", "segment_encoder" and "text_encoder"; by default all that there are.
    opset (`int`, defaults to 18):
        Version of ONNX's operators, 18 to 23.

    Returns for each part the largest difference to PyTorch, as a share of the largest value. Raises `ImportError`
    without the extra, `ValueError` for another kind of model, an unknown or missing part or opset, `FileExistsError`
    where the folder holds anything else, `RuntimeError` where a file gives something else than PyTorch.
    """
    _require_extra()
    if opset not in OPSETS:
        raise ValueError(f"ONNX opsets {OPSETS[0]} to {OPSETS[-1]} can be written, not {opset}.")
    output_dir = Path(output_dir).absolute()
    _check_replaceable(output_dir)
    model, processor = _load(model_name)
    available = parts_of(model, processor)
    chosen = list(available) if parts is None else list(dict.fromkeys(parts))
    for name in chosen:
        if name == "text_encoder" and model.text_model is None:
            raise ValueError(f"{model_name} has no text tower: it knows its own vocabulary and no other text.")
        if name not in available:
            raise ValueError(f"A SAM-CLIP has no part {name!r}: its parts are {', '.join(available)}.")
    if not chosen:
        raise ValueError(f"Name at least one part: {', '.join(available)}.")

    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}-") as temporary:
        folder = Path(temporary) / output_dir.name
        folder.mkdir()
        differences = {}
        for name in chosen:
            _write(available[name], folder / f"{name}.onnx", opset)
            differences[name] = _difference(available[name], folder / f"{name}.onnx")
        _describe(model, processor, folder, model_name, chosen, opset)
        if not output_dir.exists():
            folder.rename(output_dir)
            return differences
        _check_replaceable(output_dir)  # minutes have passed
        written = sorted((path.name for path in folder.iterdir()), key=lambda name: name == "samclip.json")
        for name in written:  # the description last
            os.replace(folder / name, output_dir / name)
        for path in output_dir.iterdir():
            if path.name not in written:
                path.unlink()
    return differences


def _require_extra() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"The export needs {error.name}, which is not installed: pip install 'samclip-hf[export]'"
        ) from error


def _check_replaceable(folder: Path) -> None:
    """Raises `FileExistsError` for anything but a folder that is empty or holds an earlier export and nothing else."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; the export is a folder.")
    names = sorted(path.name for path in folder.iterdir())
    own = {f"{part}.onnx{end}" for part in PART_NAMES for end in ("", ".data")} | set(FILES)
    others = [name for name in names if name not in own]
    if others or (names and "samclip.json" not in names):
        shown = ", ".join((others or names)[:5])
        raise FileExistsError(f"{folder} holds other things than an earlier export: {shown}. Name another folder.")


def _load(model_name: str | os.PathLike) -> tuple[SamClipForImageSegmentation, Any]:
    """In float32, with the attention that can be traced."""
    try:
        model_type = AutoConfig.from_pretrained(model_name).model_type
    except (OSError, ValueError) as error:
        raise ValueError(f"{model_name} is no SAM-CLIP checkpoint: {error}") from error
    if model_type != "samclip":
        raise ValueError(f"{model_name} is a model of type {model_type!r}; a SAM-CLIP can be exported.")
    try:
        processor = AutoProcessor.from_pretrained(model_name)
    except (OSError, ValueError) as error:
        raise ValueError(f"There is no processor beside the model in {model_name}: save it there too.") from error
    steps = ("do_resize", "do_rescale", "do_normalize", "do_pad")
    if missing := [step for step in steps if not getattr(processor.image_processor, step)]:
        raise ValueError(f"The image processor of {model_name} has {', '.join(missing)} off; the export takes SAM's.")
    model = SamClipForImageSegmentation.from_pretrained(
        model_name, dtype=torch.float32, attn_implementation="sdpa", use_safetensors=True
    )
    return model.eval(), processor


def _repeat_interleave(tensor, repeats, dim: int, output_size=None):
    """
    `aten::repeat_interleave`. onnxscript's own (0.7.2) repeats along the wrong axis where the number of repeats is a
    length of an input; to be deleted once `aten_repeat_interleave_self_int` there has `pos_dim + 1` ones before it.
    """
    from onnxscript import opset18

    op: Any = opset18  # which takes lists for constants, and has types that know nothing of it
    repeats = op.Constant(value_ints=[repeats]) if isinstance(repeats, int) else op.Reshape(repeats, [-1])
    after = op.Shape(tensor, start=dim + 1)
    expanded = op.Concat(op.Shape(tensor, start=0, end=dim + 1), repeats, after, axis=0)
    flat = op.Concat(op.Shape(tensor, start=0, end=dim), op.Constant(value_ints=[-1]), after, axis=0)
    return op.Reshape(op.Expand(op.Unsqueeze(tensor, [dim + 1]), expanded), flat)


def _write(part: Part, path: Path, opset: int) -> None:
    import onnx
    import onnx_ir
    from onnx_ir.passes.common import CommonSubexpressionEliminationPass, DeduplicateInitializersPass

    # No two axes of equal length, and none of length 1, nor a single window in a row or a column: those would be taken
    # for fixed, the windows without a word.
    example = part.make_inputs(2, part.window_size + 5, 2 * part.window_size + 7, 3)
    with warnings.catch_warnings():  # of the exporter about itself
        warnings.simplefilter("ignore")
        with torch.no_grad():
            traced = torch.export.export(
                part.module.eval(), example, dynamic_shapes=tuple(part.inputs.values()), strict=False
            )
        program = torch.onnx.export(
            traced,
            dynamo=True,
            opset_version=opset,
            input_names=list(part.inputs),
            output_names=list(part.outputs),
            custom_translation_table={torch.ops.aten.repeat_interleave.self_int: _repeat_interleave},
            external_data=False,
            verbose=False,
        )
    assert program is not None
    # The mask decoder's two runs become one; the exporter itself merges weights up to 1024 values only.
    DeduplicateInitializersPass(size_limit=MERGED_VALUES)(program.model)
    CommonSubexpressionEliminationPass()(program.model)
    graph = program.model.graph
    for values, named in ((graph.inputs, part.inputs), (graph.outputs, part.outputs)):
        for value, axes in zip(values, named.values(), strict=True):
            lengths = [axes[i].__name__ if i in axes else length for i, length in enumerate(value.shape or ())]
            value.shape = onnx_ir.Shape(lengths)
    weights = sum(value.const_value.nbytes for value in graph.initializers.values() if value.const_value is not None)
    program.save(str(path), external_data=weights > EXTERNAL_ABOVE)
    onnx.checker.check_model(str(path), full_check=True)


def _difference(part: Part, path: Path) -> float:
    """The largest between onnxruntime and PyTorch, as a share of the output's largest value. Raises `RuntimeError`
    above `TOLERANCE`."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    largest = 0.0
    several_windows = part.window_size + 12
    for sizes in ((1, several_windows, several_windows, 2), (3, 2, 11, 1), (1, 9, 4, 5)):
        inputs = part.make_inputs(*sizes)
        with torch.no_grad():
            expected = part.module(*inputs)
        expected = (expected,) if isinstance(expected, Tensor) else expected
        actual = session.run(None, dict(zip(part.inputs, (x.numpy() for x in inputs), strict=True)))
        for name, theirs, ours in zip(part.outputs, actual, expected, strict=True):
            if theirs.shape != tuple(ours.shape):
                raise RuntimeError(
                    f"{path.name} gives {name} of shape {theirs.shape}, PyTorch of {tuple(ours.shape)}."
                )
            difference = float(np.abs(theirs - ours.numpy()).max() / ours.abs().max())
            if not difference <= TOLERANCE:
                raise RuntimeError(
                    f"{path.name} gives other {name} than PyTorch: they differ by {difference:.1e} of the largest "
                    f"value, {TOLERANCE:.0e} is allowed."
                )
            largest = max(largest, difference)
    return largest


def _describe(model, processor, folder: Path, model_name: str | os.PathLike, parts: list[str], opset: int) -> None:
    """What a program needs to know beside the graphs."""
    config, image_processor = model.config, processor.image_processor
    description: dict[str, Any] = {
        "model": str(model_name),
        "parts": parts,
        "opset": opset,
        "tolerance": TOLERANCE,
        "image": {
            "longest_edge": image_processor.size["longest_edge"],
            "padded_height": image_processor.pad_size["height"],
            "padded_width": image_processor.pad_size["width"],
            "rescale_factor": image_processor.rescale_factor,
            "mean": list(image_processor.image_mean),
            "std": list(image_processor.image_std),
            "resample": int(image_processor.resample),
            "patch_size": config.vision_config.patch_size,
            "min_side": 2 * config.vision_config.patch_size,
            "max_side": MAX_PATCHES * config.vision_config.patch_size,
        },
        "logit_scale": model.logit_scale.exp().item(),
        "logit_bias": None if model.logit_bias is None else model.logit_bias.item(),
        "composition_points": config.composition_points,
    }
    if "text_encoder" in parts:
        longest, pad = config.text_config.max_position_embeddings, processor.tokenizer.pad_token_id
        description["text"] = {"max_tokens": longest, "pad_token_id": pad, "takes_mask": not config.has_siglip_text}
        if hasattr(processor.tokenizer, "backend_tokenizer"):
            processor.tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
        else:
            logger.warning(f"No tokenizer.json: a {type(processor.tokenizer).__name__} runs in transformers only.")
    if model.class_embeds is not None:
        np.save(folder / "class_embeds.npy", model.class_embeds.numpy())
        description["vocabulary"] = {
            "id2label": config.id2label,
            "label_ids": config.vocabulary_label_ids,
            "background_label_id": config.background_label_id,
            "background_threshold": config.background_threshold,
        }
    (folder / "samclip.json").write_text(json.dumps(description, indent=2) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m samclip_hf.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default=miniature.checkpoint(), help="folder or name on the Hub (default: the shipped miniature)"
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="a new folder, or one of an earlier export")
    parser.add_argument("--parts", nargs="+", choices=PART_NAMES, help="default: all that the checkpoint has")
    parser.add_argument("--opset", type=int, default=OPSETS[0], help=f"{OPSETS[0]} (default) to {OPSETS[-1]}")
    arguments = parser.parse_args(argv)
    try:
        differences = export(arguments.model, arguments.output_dir, arguments.parts, arguments.opset)
    except (ImportError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for name, difference in differences.items():
        size = sum(path.stat().st_size for path in arguments.output_dir.glob(f"{name}.onnx*")) / 1e6
        print(f"{name}.onnx: {size:.1f} MB, differs from PyTorch by {difference:.0e} of the largest value")


if __name__ == "__main__":
    main()
