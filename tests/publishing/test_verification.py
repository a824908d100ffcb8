"""Verification of a published folder in a new interpreter that cannot import the package."""

import json
import os
import subprocess
import sys

import pytest
from PIL import Image
from transformers import pipeline

from samclip_hf import miniature, registration
from samclip_hf.miniature.scenes import render
from samclip_hf.publishing import PublishingError, verification, verify
from samclip_hf.publishing.verification_script import AUTO_MODELS


@pytest.fixture(autouse=True)
def use_expected_results(expected, monkeypatch):
    """The package's results are the same in every test. Computes them once."""
    monkeypatch.setattr(verification, "run_checkpoint", lambda folder, image: expected)


def test_a_folder_gives_the_same_outputs_without_the_package(folder, image):
    differences = verify(folder, image)
    assert differences.keys() == {"pred_masks", "iou_scores", "logits_per_image", "image_embeds"}
    assert max(differences.values()) < 1e-5


def test_verification_uses_every_auto_class_and_pipeline(expected):
    results, _ = expected
    registered = {auto_class.__name__: model.__name__ for auto_class, model in registration.MODELS.items()}
    assert set(AUTO_MODELS) == registered.keys()
    assert {name: results[name] for name in AUTO_MODELS} == registered
    pipelines = results.keys() - registered.keys()
    assert pipelines == {
        *("image-segmentation", "zero-shot-image-segmentation", "zero-shot-image-classification"),
        *("zero-shot-object-detection", "mask-generation", "image-feature-extraction"),
    }
    assert all(results[name] for name in pipelines)


@pytest.mark.slow
def test_code_with_other_outputs_raises(copy, image):
    code = copy / "modeling_samclip.py"
    assert "F.normalize(pooled, dim=-1)" in code.read_text()
    code.write_text(code.read_text().replace("F.normalize(pooled, dim=-1)", "F.normalize(pooled, dim=-1) * 1.1", 1))
    with pytest.raises(PublishingError, match=r"zero-shot-image-classification returns .* with the repository's code"):
        verify(copy, image)


@pytest.mark.slow
def test_code_that_imports_the_package_raises(copy, image):
    (copy / "processing_samclip.py").write_text("import samclip_hf")
    with pytest.raises(PublishingError, match=r"does not load without the package:[\s\S]*samclip_hf"):
        verify(copy, image)


def test_a_folder_segments_large_images_without_the_package(folder, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "sys.modules['samclip_hf'] = None\n"
        "import hashlib, json, torch\n"
        "from PIL import Image\n"
        "from transformers import pipeline\n"
        "torch.set_num_threads(1)\n"
        "segmenter = pipeline('zero-shot-image-segmentation', model=sys.argv[1], trust_remote_code=True)\n"
        "segments = segmenter(Image.open(sys.argv[2]), tile=96, candidate_labels=['red solid shape', 'blue shape'])\n"
        "print(json.dumps([[s['label'], round(s['score'], 3), s['mask'].getbbox()] for s in segments]))\n"
    )
    image = Image.fromarray(render(seed=0, index=8).image)
    image.save(tmp_path / "image.png")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    result = subprocess.run(
        [sys.executable, "-P", str(script), str(folder), str(tmp_path / "image.png")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    segmenter = pipeline("zero-shot-image-segmentation", model=miniature.checkpoint())
    expected = segmenter(image, tile=96, candidate_labels=["red solid shape", "blue shape"])
    found = json.loads(result.stdout.splitlines()[-1])
    assert found == [[s["label"], pytest.approx(s["score"], abs=2e-3), list(s["mask"].getbbox())] for s in expected]
    assert len(found) > 0
