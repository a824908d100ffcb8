"""
Loads a checkpoint through every Auto class and pipeline, without importing this package. As a script, it makes the
package unimportable, so that transformers runs the code in the checkpoint's folder:

    python -P verification_script.py FOLDER IMAGE RESULTS

Writes `RESULTS.json` and `RESULTS.safetensors`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoConfig, AutoProcessor, pipeline

# Not from `transformers`: without torchvision, 5.17 exports a placeholder that raises an error on use, 5.24 does not
# (https://github.com/huggingface/transformers/issues/48607). Import it from there when 5.17 is not supported any more.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

AUTO_MODELS = (
    "AutoModel",
    "AutoModelForMaskGeneration",
    "AutoModelForZeroShotImageClassification",
    "AutoModelForImageSegmentation",
    "AutoModelForSemanticSegmentation",
    "AutoModelForZeroShotObjectDetection",
)
OUTPUTS = ("pred_masks", "iou_scores", "logits_per_image", "image_embeds")
CANDIDATE_LABELS = ["a person", "a car"]


def run_checkpoint(folder: str, image: Image.Image) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """
    Runs all Auto classes and pipelines that a checkpoint supports on one image. If the package has been imported,
    transformers uses its registered classes instead of the code in the folder.

    Args:
        folder (`str`): A checkpoint with a processor.
        image (`PIL.Image.Image`): An RGB image.

    Returns:
        `tuple[dict, dict]`: A summary of the result of each Auto class and pipeline, as JSON types; and the outputs of
        `AutoModel`.
    """
    trust = {"trust_remote_code": True}
    config = AutoConfig.from_pretrained(folder, **trust)
    assert config.model_type == "samclip"
    processor = AutoProcessor.from_pretrained(folder, **trust)
    text = {"text": ["a photo"]} if config.has_text_tower else {}
    inputs = processor(image, input_points=[[[[image.width / 2, image.height / 2]]]], **text)
    image_processor = AutoImageProcessor.from_pretrained(folder, **trust)
    assert torch.equal(inputs["pixel_values"], image_processor(image, return_tensors="pt")["pixel_values"])
    results: dict[str, Any] = {}
    outputs = {}
    for auto_class in AUTO_MODELS:
        model = getattr(transformers, auto_class).from_pretrained(folder, **trust).eval()
        results[auto_class] = type(model).__name__
        if auto_class == "AutoModel":
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
            with torch.inference_mode():
                model_outputs = model(**inputs)
            outputs = {
                name: model_outputs[name].float().contiguous()
                for name in OUTPUTS
                if model_outputs.get(name) is not None
            }

    generate_masks = pipeline("mask-generation", model=folder, **trust)
    masks = generate_masks(image, points_per_crop=4, pred_iou_thresh=0.0, stability_score_thresh=0.0)["masks"]
    results["mask-generation"] = len(masks)
    features = pipeline("image-feature-extraction", model=folder, **trust)(image)
    results["image-feature-extraction"] = list(np.asarray(features).shape)
    if config.has_text_tower:
        classify = pipeline("zero-shot-image-classification", model=folder, **trust)
        scores = classify(image, candidate_labels=CANDIDATE_LABELS)
        results["zero-shot-image-classification"] = [[score["label"], round(score["score"], 3)] for score in scores]
        segment = pipeline("zero-shot-image-segmentation", model=folder, **trust)
        results["zero-shot-image-segmentation"] = areas(segment(image, candidate_labels=CANDIDATE_LABELS))
    if config.vocabulary_label_ids:
        segments = pipeline("image-segmentation", model=folder, **trust)(image, threshold=0.0)
        results["image-segmentation"] = areas(segments)
        if config.has_text_tower and config.composition == "segments":
            detect = pipeline("zero-shot-object-detection", model=folder, **trust)
            boxes = detect(image, candidate_labels=CANDIDATE_LABELS, threshold=0.0)
            results["zero-shot-object-detection"] = [list(box["box"].values()) for box in boxes]
    return results, outputs


def areas(segments: list[dict[str, Any]]) -> list[list]:
    """Label and number of pixels of each segment."""
    return [[segment["label"], int((np.asarray(segment["mask"]) > 0).sum())] for segment in segments]


if __name__ == "__main__":
    sys.modules["samclip_hf"] = None  # type: ignore[assignment]  # importing it raises ImportError
    folder, image_path, results_path = sys.argv[1:]
    results, outputs = run_checkpoint(folder, Image.open(image_path))
    save_file(outputs, f"{results_path}.safetensors")
    Path(f"{results_path}.json").write_text(json.dumps(results))
