"""
What a stranger does with a published folder, through every Auto class and pipeline. As a script, in an interpreter
that cannot import the package, so that the folder's own code is what runs:

    python -P proof.py FOLDER PICTURE RESULTS

Writes `RESULTS.safetensors` and `RESULTS.json`.
"""

import json
import sys

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, pipeline

MODELS = {
    "AutoModel": "SamClipModel",
    "AutoModelForMaskGeneration": "SamClipModel",
    "AutoModelForZeroShotImageClassification": "SamClipModel",
    "AutoModelForImageSegmentation": "SamClipForImageSegmentation",
    "AutoModelForSemanticSegmentation": "SamClipForImageSegmentation",
    "AutoModelForZeroShotObjectDetection": "SamClipForObjectDetection",
}


def use(folder: str, image: Image.Image) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    """
    Everything that the folder's model can do, done to the picture. Where the package is imported, transformers takes
    its classes and not the folder's code.

    Returns what each Auto class and pipeline gave, by its name, and `AutoModel`'s outputs.
    """
    trust = {"trust_remote_code": True}
    config = AutoConfig.from_pretrained(folder, **trust)
    assert config.model_type == "samclip"
    processor = AutoProcessor.from_pretrained(folder, **trust)
    middle = [[[[image.width / 2, image.height / 2]]]]
    inputs = processor(image, input_points=middle, **({"text": ["a photo"]} if config.has_text_tower else {}))
    alone = AutoImageProcessor.from_pretrained(folder, **trust)(image, return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], alone["pixel_values"])
    results: dict[str, object] = {}
    tensors = {}
    for name in MODELS:
        model = getattr(transformers, name).from_pretrained(folder, **trust).eval()
        results[name] = type(model).__name__
        if name == "AutoModel":
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
            with torch.inference_mode():
                outputs = model(**inputs)
            tensors = {
                key: outputs[key].float().contiguous()
                for key in ("pred_masks", "iou_scores", "logits_per_image", "image_embeds")
                if outputs.get(key) is not None
            }
    everything = {"points_per_crop": 4, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}
    results["mask-generation"] = len(pipeline("mask-generation", model=folder, **trust)(image, **everything)["masks"])
    features = pipeline("image-feature-extraction", model=folder, **trust)(image)
    results["image-feature-extraction"] = list(np.asarray(features).shape)
    labels = ["a person", "a car"]
    if config.has_text_tower:
        classes = pipeline("zero-shot-image-classification", model=folder, **trust)(image, candidate_labels=labels)
        results["zero-shot-image-classification"] = [(c["label"], round(c["score"], 3)) for c in classes]
        segmenter = pipeline("zero-shot-image-segmentation", model=folder, **trust)
        results["zero-shot-image-segmentation"] = areas(segmenter(image, candidate_labels=labels))
    if config.vocabulary_label_ids:
        segments = pipeline("image-segmentation", model=folder, **trust)(image, threshold=0.0)
        results["image-segmentation"] = areas(segments)
        if config.has_text_tower and config.composition == "segments":
            detect = pipeline("zero-shot-object-detection", model=folder, **trust)
            boxes = detect(image, candidate_labels=labels, threshold=0.0)
            results["zero-shot-object-detection"] = [list(box["box"].values()) for box in boxes]
    return results, tensors


def areas(segments: list[dict]) -> list[tuple[str, int]]:
    """Names and numbers of pixels."""
    return [(segment["label"], int((np.asarray(segment["mask"]) > 0).sum())) for segment in segments]


if __name__ == "__main__":
    sys.modules["samclip_hf"] = None  # type: ignore[assignment]  # as if it were not installed
    folder, picture, results_path = sys.argv[1:]
    results, tensors = use(folder, Image.open(picture))
    save_file(tensors, f"{results_path}.safetensors")
    with open(f"{results_path}.json", "w") as file:
        json.dump(results, file)
