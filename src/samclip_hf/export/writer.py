"""
Writes the parts of a SAM-CLIP as ONNX files, compares each file with PyTorch, and describes the export in JSON.

`docs/export.md` shows how to combine the parts. Needs the extra `export`.
"""

import io
import json
import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoProcessor, SiglipTokenizer
from transformers.utils import logging

from ..files import named_disk_errors
from ..modeling_samclip import load_complete_model
from ..segmentation_samclip import SamClipForImageSegmentation
from .modules import MAX_PATCHES, PART_NAMES, Part, create_parts
from .siglip_tokenizer import convert_siglip_tokenizer

logger = logging.get_logger(__name__)

OPSETS = range(18, 24)  # the opset that PyTorch's exporter writes, and those to which it can convert
TOLERANCE = 1e-4  # largest accepted difference from PyTorch, relative to the largest value of the output
QUANTIZED_TOLERANCE = 0.1  # the same with int8 weights
MERGED_VALUES = 2**20  # weights with up to this number of values are stored once if they occur twice
QUANTIZATION = {"method": "onnxruntime dynamic", "weights": "int8", "activations": "uint8"}  # of matrix products
EXTERNAL_DATA_BYTES = 2**31 - 2**24  # weights above this size are stored next to the graph: protobuf's limit is 2 GB

# The keys that samclip.json has for every export.
DESCRIPTION_KEYS = {
    "model",
    "parts",
    "opset",
    "tolerance",
    "image",
    "logit_scale",
    "logit_bias",
    "composition_points",
}


def export(
    model_name_or_path: str | os.PathLike,
    output_dir: str | Path,
    parts: Sequence[str] | None = None,
    opset: int = OPSETS[0],
    images: Sequence[Image.Image] | None = None,
    quantize: bool = False,
) -> dict[str, float]:
    r"""
    Exports a checkpoint to ONNX, in float32, or with int8 weights.

    Writes `<part>.onnx` for every part and the files that are needed to run them without PyTorch: `samclip.json`
    (preprocessing, sizes, constants), `tokenizer.json`, and `class_embeds.npy` for a checkpoint with a vocabulary.
    Every part is checked with onnx, run with onnxruntime at other sizes than it was traced with, and compared with
    PyTorch. The folder is replaced only after all checks have passed.

    Args:
        model_name_or_path (`str` or `os.PathLike`):
            Folder or repository on the Hub with a SAM-CLIP and its processor.
        output_dir (`str` or `Path`):
            New or empty folder, or the folder of an earlier export, which is replaced.
        parts (`Sequence[str]`, *optional*):
            Any of "image_encoder", "mask_decoder", "segment_encoder" and "text_encoder". Defaults to all parts of the
            model.
        opset (`int`, *optional*, defaults to 18):
            ONNX operator set, 18 to 23.
        images (`Sequence[PIL.Image.Image]`, *optional*):
            Images for the comparison with PyTorch, resized to several sizes. Random pixels by default.
        quantize (`bool`, *optional*, defaults to `False`):
            Whether to store the weights of matrix products as int8, with one scale for each matrix, by onnxruntime's
            dynamic quantization: the activations are quantized to uint8 at run time. Convolutions, normalizations,
            token embeddings and the products of attention stay in float32. Each file is compared with PyTorch before
            and after the quantization; the accepted difference after it is 0.1. `samclip.json` has the differences as
            `"quantization"`.

    Returns:
        `dict[str, float]`: for each part, the largest difference from PyTorch, relative to the largest value of the
        output.

    Raises:
        ImportError: The extra `export` is not installed.
        ValueError: The model is not a SAM-CLIP, it lacks weights or a part, or the part or opset is unknown. With
            `quantize`, a part differs from PyTorch, or it has no weights that can be quantized.
        FileExistsError: `output_dir` contains files that do not belong to an earlier export.
        RuntimeError: A file in float32 differs from PyTorch.
    """
    _require_extra()
    if opset not in OPSETS:
        raise ValueError(f"Unsupported ONNX opset {opset}: choose one of {OPSETS[0]} to {OPSETS[-1]}.")
    output_dir = Path(output_dir).absolute()
    _check_replaceable(output_dir)
    model, processor = _load(model_name_or_path)
    available = create_parts(model, processor, images)
    selected = list(available) if parts is None else list(dict.fromkeys(parts))
    for name in selected:
        if name == "text_encoder" and model.text_model is None:
            raise ValueError(f"{model_name_or_path} has no text tower, so it has no part 'text_encoder'.")
        if name not in available:
            raise ValueError(f"Unknown part {name!r}: choose from {', '.join(available)}.")
    if not selected:
        raise ValueError(f"parts is empty: choose from {', '.join(available)}.")

    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with (
        named_disk_errors(output_dir),
        tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}-") as temporary,
    ):
        folder = Path(temporary) / output_dir.name
        folder.mkdir()
        differences = {}
        for name in selected:
            _write(available[name], folder / f"{name}.onnx", opset)
            differences[name] = _compare(available[name], folder / f"{name}.onnx", TOLERANCE)
            if quantize:
                _quantize(folder / f"{name}.onnx")
                try:
                    differences[name] = _compare(available[name], folder / f"{name}.onnx", QUANTIZED_TOLERANCE)
                except RuntimeError as error:  # it depends on the weights
                    raise ValueError(f"With int8 weights, {error} Export this part in float32.") from error
        quantization = QUANTIZATION | {"differences": differences} if quantize else None
        _describe(model, processor, folder, model_name_or_path, selected, opset, quantization)
        if not output_dir.exists():
            folder.rename(output_dir)
            return differences
        _check_replaceable(output_dir)  # again: tracing takes minutes
        written = sorted((path.name for path in folder.iterdir()), key=lambda name: name == "samclip.json")
        for name in written:  # samclip.json last
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
    """Raises `FileExistsError` unless `folder` does not exist, is empty, or contains only an earlier export."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file. Choose a folder.")
    known = _files_of_export(folder / "samclip.json")
    if others := sorted(path.name for path in folder.iterdir() if path.name not in known or not path.is_file()):
        raise FileExistsError(
            f"{folder} contains files that do not belong to an earlier export: {', '.join(others[:5])}."
        )


def _files_of_export(path: Path) -> set[str]:
    """Names of the files of the export that the samclip.json at `path` describes. Empty if there is no such file, or
    if it is not the description of an export."""
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return set()
    is_export = isinstance(description, dict) and description.keys() >= DESCRIPTION_KEYS
    if not is_export or not isinstance(description["parts"], list):
        return set()
    names = {f"{part}.onnx{suffix}" for part in PART_NAMES if part in description["parts"] for suffix in ("", ".data")}
    optional = {"text": "tokenizer.json", "vocabulary": "class_embeds.npy"}
    return names | {"samclip.json"} | {name for key, name in optional.items() if key in description}


def _load(model_name_or_path: str | os.PathLike) -> tuple[SamClipForImageSegmentation, Any]:
    """Loads a model in float32, with the attention that can be traced, and its processor."""
    try:
        model_type = AutoConfig.from_pretrained(model_name_or_path).model_type
    except (OSError, ValueError) as error:
        raise ValueError(f"{model_name_or_path} is not a SAM-CLIP checkpoint: {error}") from error
    if model_type != "samclip":
        raise ValueError(f"{model_name_or_path} is not a SAM-CLIP checkpoint but a model of type {model_type!r}.")
    try:
        processor = AutoProcessor.from_pretrained(model_name_or_path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{model_name_or_path} contains no processor. Save it in the same folder as the model."
        ) from error
    steps = ("do_resize", "do_rescale", "do_normalize", "do_pad")
    if disabled := [step for step in steps if not getattr(processor.image_processor, step)]:
        raise ValueError(
            f"The image processor of {model_name_or_path} disables {', '.join(disabled)}, which the export requires."
        )
    model = load_complete_model(
        SamClipForImageSegmentation,
        model_name_or_path,
        dtype=torch.float32,
        attn_implementation="sdpa",
        use_safetensors=True,
    )
    return model.eval(), processor


def _write(part: Part, path: Path, opset: int) -> None:
    """Traces a part, writes it to `path` and checks the file."""
    import onnx
    import onnx_ir
    from onnx_ir.passes.common import CommonSubexpressionEliminationPass, DeduplicateInitializersPass

    # Dynamic axes of equal length, axes of length 1, and a single window per row or column would be traced as fixed,
    # in the case of windows without an error. So all lengths differ, and rows and columns exceed two windows.
    example = part.make_inputs(2, part.window_size + 5, 2 * part.window_size + 7, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's warnings about its own code
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
            external_data=False,
            verbose=False,
        )
    assert program is not None
    # These passes merge the two runs of the mask decoder. The exporter itself deduplicates only weights of up to 1024
    # values.
    DeduplicateInitializersPass(size_limit=MERGED_VALUES)(program.model)
    CommonSubexpressionEliminationPass()(program.model)
    graph = program.model.graph
    for values, named in ((graph.inputs, part.inputs), (graph.outputs, part.outputs)):
        for value, axes in zip(values, named.values(), strict=True):
            lengths = [axes[i].__name__ if i in axes else length for i, length in enumerate(value.shape or ())]
            value.shape = onnx_ir.Shape(lengths)
    weights = sum(value.const_value.nbytes for value in graph.initializers.values() if value.const_value is not None)
    program.save(str(path), external_data=weights > EXTERNAL_DATA_BYTES)
    onnx.checker.check_model(str(path), full_check=True)


def _quantize(path: Path) -> None:
    """Replaces a file by one with int8 weights. Raises `ValueError` if it has no matrix products with weights."""
    import logging as python_logging

    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    root_logger = python_logging.getLogger()
    level = root_logger.level
    root_logger.setLevel(python_logging.ERROR)  # a warning recommends an optimization of the graph for static scales
    quantized = path.with_name(f"quantized-{path.name}")
    try:
        quantize_dynamic(path, quantized, op_types_to_quantize=["MatMul", "Gemm"], weight_type=QuantType.QInt8)
    finally:
        root_logger.setLevel(level)
    graph = onnx.load(quantized, load_external_data=False).graph
    if not any(node.op_type == "MatMulInteger" for node in graph.node):
        raise ValueError(f"{path.name} has no weights that can be quantized: export it in float32.")
    onnx.checker.check_model(str(quantized), full_check=True)
    path.with_name(f"{path.name}.data").unlink(missing_ok=True)
    quantized.replace(path)


def _compare(part: Part, path: Path, tolerance: float) -> float:
    """Runs a file with onnxruntime at three sizes and returns the largest difference from PyTorch, relative to the
    largest value of the output. Raises `RuntimeError` if it exceeds `tolerance`."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    largest = 0.0
    several_windows = part.window_size + 12
    for sizes in ((1, several_windows, several_windows, 1), (3, 2, 11, 4), (1, 9, 4, 5)):
        inputs = part.make_inputs(*sizes)
        with torch.no_grad():
            expected = part.module(*inputs)
        expected = (expected,) if isinstance(expected, Tensor) else expected
        actual = session.run(None, dict(zip(part.inputs, (x.numpy() for x in inputs), strict=True)))
        for name, onnx_output, output in zip(part.outputs, actual, expected, strict=True):
            if onnx_output.shape != tuple(output.shape):
                raise RuntimeError(
                    f"{name} of {path.name} has shape {onnx_output.shape}, in PyTorch {tuple(output.shape)}."
                )
            difference = float(np.abs(onnx_output - output.numpy()).max() / output.abs().max())
            if not difference <= tolerance:
                raise RuntimeError(
                    f"{name} of {path.name} differs from PyTorch by {difference:.1e} of the largest value; up to "
                    f"{tolerance:.0e} is accepted."
                )
            largest = max(largest, difference)
    return largest


def _describe(
    model,
    processor,
    folder: Path,
    model_name: str | os.PathLike,
    parts: list[str],
    opset: int,
    quantization: dict[str, Any] | None = None,
) -> None:
    """Writes the files next to the graphs: preprocessing, sizes, constants, tokenizer and vocabulary. `quantization`
    is `None` for an export in float32."""
    config, image_processor = model.config, processor.image_processor
    description: dict[str, Any] = {
        "model": str(model_name),
        "parts": parts,
        "opset": opset,
        "tolerance": QUANTIZED_TOLERANCE if quantization else TOLERANCE,
        **({"quantization": quantization} if quantization else {}),
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
        # Rows and columns of the patches of segments in an unmerged model, which cover the image without its padding.
        "tower_grid": None if config.merged else model.clip_head.grid_size,
    }
    if "text_encoder" in parts:
        tokenizer = processor.tokenizer
        description["text"] = {
            "max_tokens": config.text_config.max_position_embeddings,
            "pad_token_id": tokenizer.pad_token_id,
            "takes_mask": not config.has_siglip_text,
            # names and templates are converted as by samclip_hf.segmentation_samclip.canonicalize_text
            "canonicalize": config.has_siglip_text,
        }
        _write_tokenizer(tokenizer, folder / "tokenizer.json")
    if model.class_embeds is not None:
        content = io.BytesIO()  # np.save raises an error without a number if the disk of a file is full
        np.save(content, model.class_embeds.numpy())
        (folder / "class_embeds.npy").write_bytes(content.getvalue())
        description["vocabulary"] = {
            "id2label": config.id2label,
            "label_ids": config.vocabulary_label_ids,
            "background_label_id": config.background_label_id,
            "background_threshold": config.background_threshold,
        }
    (folder / "samclip.json").write_text(json.dumps(description, indent=2) + "\n")


def _write_tokenizer(tokenizer, path: Path) -> None:
    """Writes a tokenizer for the library `tokenizers`. Logs a warning if it cannot be converted."""
    if hasattr(tokenizer, "backend_tokenizer"):
        path.write_text(tokenizer.backend_tokenizer.to_str(pretty=True), encoding="utf-8")
        return
    reason = f"a {type(tokenizer).__name__} cannot be converted"
    if isinstance(tokenizer, SiglipTokenizer):
        try:
            path.write_text(convert_siglip_tokenizer(tokenizer).to_str(pretty=True), encoding="utf-8")
            return
        except ValueError as error:
            reason = str(error)
    logger.warning(f"tokenizer.json is not written: {reason}. Tokenize texts with transformers.")
