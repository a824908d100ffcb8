"""Verification of a published folder in a new interpreter that cannot import the package."""

import pytest

from samclip_hf import registration
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
