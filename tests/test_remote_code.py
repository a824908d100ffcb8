"""A published folder serves an interpreter that does not have the package."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from samclip_hf import miniature, modeling_samclip
from samclip_hf.miniature.scenes import render

MODELS = {
    "AutoModel": "SamClipModel",
    "AutoModelForMaskGeneration": "SamClipModel",
    "AutoModelForZeroShotImageClassification": "SamClipModel",
    "AutoModelForImageSegmentation": "SamClipForImageSegmentation",
    "AutoModelForSemanticSegmentation": "SamClipForImageSegmentation",
    "AutoModelForZeroShotObjectDetection": "SamClipForObjectDetection",
}

STRANGER = """
import sys
sys.modules["samclip_hf"] = None  # as if it were not installed
import numpy as np, torch, transformers
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, pipeline

folder, picture, models, results_folder = sys.argv[1], sys.argv[2], sys.argv[3].split(","), sys.argv[4]
trust = {"trust_remote_code": True}
image = Image.open(picture)
processor = AutoProcessor.from_pretrained(folder, **trust)
assert AutoConfig.from_pretrained(folder, **trust).model_type == "samclip"
pixel_values = AutoImageProcessor.from_pretrained(folder, **trust)(image, return_tensors="pt")["pixel_values"]
inputs = processor(image, text=["a red fuzzy shape"], input_points=[[[[64, 64]]]])
assert torch.equal(inputs["pixel_values"], pixel_values)
results = {}
for name in models:
    model = getattr(transformers, name).from_pretrained(folder, **trust)
    results[name] = type(model).__name__
    with torch.no_grad():
        if name == "AutoModel":
            outputs = model(**inputs)
            names = ("pred_masks", "iou_scores", "logits_per_image")
            torch.save({name: outputs[name] for name in names}, results_folder + "/outputs")
labels = ["green zigzag shape", "red fuzzy shape"]
segments = pipeline("image-segmentation", model=folder, **trust)(image)
by_text = pipeline("zero-shot-image-segmentation", model=folder, **trust)(image, candidate_labels=labels)
classes = pipeline("zero-shot-image-classification", model=folder, **trust)(image, candidate_labels=labels)
boxes = pipeline("zero-shot-object-detection", model=folder, **trust)(image, candidate_labels=labels, threshold=0.0)
everything = {"points_per_crop": 4, "pred_iou_thresh": 0.4, "stability_score_thresh": 0.2}
masks = pipeline("mask-generation", model=folder, **trust)(image, **everything)
features = pipeline("image-feature-extraction", model=folder, **trust)(image)
results |= {
    "segments": [(s["label"], int((np.asarray(s["mask"]) > 0).sum())) for s in segments],
    "by_text": [(s["label"], int((np.asarray(s["mask"]) > 0).sum())) for s in by_text],
    "classes": [c["label"] for c in classes],
    "boxes": [list(b["box"].values()) for b in boxes],
    "masks": len(masks["masks"]),
    "features": np.asarray(features).shape,
}
assert not any(name.startswith("samclip_hf") and module for name, module in sys.modules.items())
import json
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """The shipped checkpoint with its code beside it."""
    folder = tmp_path_factory.mktemp("published")
    shutil.copytree(miniature.checkpoint(), folder, dirs_exist_ok=True)
    for source in Path(modeling_samclip.__file__).parent.glob("*_samclip.py"):
        shutil.copy(source, folder)

    def edit(name, **entries):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    processors = {
        "AutoImageProcessor": "image_processing_samclip.SamClipImageProcessor",
        "AutoProcessor": "processing_samclip.SamClipProcessor",
    }
    edit(
        "config.json",
        auto_map={"AutoConfig": "configuration_samclip.SamClipConfig"}
        | {auto_class: f"modeling_samclip.{name}" for auto_class, name in MODELS.items()},
        custom_pipelines={
            "zero-shot-image-segmentation": {
                "impl": "pipeline_samclip.SamClipImageSegmentationPipeline",
                "pt": ["AutoModelForImageSegmentation"],
                "type": "image",
            }
        },
    )
    image_processor = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    edit("processor_config.json", auto_map=processors, image_processor=image_processor | {"auto_map": processors})
    return folder


def test_every_auto_class_and_pipeline_without_the_package(published, tmp_path):
    picture = tmp_path / "scene.png"
    image = Image.fromarray(render(seed=0, index=8).image)
    image.save(picture)
    command = [sys.executable, "-c", STRANGER, published, picture, ",".join(MODELS), published]
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    results = json.loads(run.stdout.splitlines()[-1])
    assert {name: results[name] for name in MODELS} == MODELS

    with_package = STRANGER.replace("""sys.modules["samclip_hf"] = None""", "import samclip_hf", 1)
    with_package = with_package.replace("\nassert not any(", "\nassert any(")
    command = [sys.executable, "-c", with_package, miniature.checkpoint(), picture, ",".join(MODELS), tmp_path]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == results
    expected = torch.load(tmp_path / "outputs")
    for name, value in torch.load(published / "outputs").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)
    assert results["segments"] and results["by_text"] and results["boxes"] and results["masks"] > 0
