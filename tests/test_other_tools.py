"""Models of this package in other libraries: transformers' models with a backbone, and sentence-transformers."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import DetrConfig, DetrForObjectDetection, UperNetConfig, UperNetForSemanticSegmentation

from samclip_hf import (
    SamClipBackbone,
    SamClipForImageSegmentation,
    SamClipModel,
    SamClipProcessor,
    miniature,
)
from samclip_hf.miniature.scenes import render

from .conftest import random_images

TEXTS = ["a red fuzzy shape", "a green zigzag shape on a striped background"]


def images() -> list[Image.Image]:
    """Scenes of two aspect ratios: with padding below and on the right."""
    return [Image.fromarray(render(0, number).image).resize(size) for number, size in ((1, (200, 90)), (2, (60, 80)))]


def upernet(backbone: SamClipBackbone) -> UperNetForSemanticSegmentation:
    config = UperNetConfig(
        backbone_config=backbone.config, hidden_size=16, pool_scales=[1, 2], num_labels=3, use_auxiliary_head=False
    )
    model = UperNetForSemanticSegmentation(config)
    model.backbone.load_state_dict(backbone.state_dict())
    return model


class TestBackbone:
    @pytest.fixture
    def backbone(self, model, tmp_path) -> SamClipBackbone:
        model.save_pretrained(tmp_path / "model")
        names = ["stage1", "stage3", "stage6"]
        return SamClipBackbone.from_pretrained(tmp_path / "model", out_features=names)

    def test_saved_backbone_has_the_same_feature_maps(self, backbone, tmp_path):
        backbone.save_pretrained(tmp_path / "backbone")
        loaded, info = SamClipBackbone.from_pretrained(tmp_path / "backbone", output_loading_info=True)
        assert not any(info.values()) and loaded.out_features == backbone.out_features == [
            "stage1",
            "stage3",
            "stage6",
        ]
        with torch.no_grad():
            outputs = [model.eval()(random_images(2, 40, 64)).feature_maps for model in (backbone, loaded)]
        for first, second in zip(*outputs, strict=True):
            assert first.shape == (2, 32, 5, 8) and torch.equal(first, second)

    def test_upernet_trains_and_is_saved_with_it(self, backbone, tmp_path):
        torch.manual_seed(0)
        segmenter = upernet(backbone).train()
        pixel_values = random_images(2, 40, 64)
        labels = torch.zeros(2, 40, 64, dtype=torch.long)
        labels[..., 32:] = 1  # the bright half
        pixel_values[..., 32:] += 2
        before = {name: value.clone() for name, value in segmenter.backbone.named_parameters()}
        optimizer = torch.optim.AdamW(segmenter.parameters(), lr=5e-3)
        losses = []
        for _ in range(5):
            loss = segmenter(pixel_values, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.9 * losses[0]
        trained = {
            name.split(".")[0] + "." + name.split(".")[1]
            for name, value in segmenter.backbone.named_parameters()
            if value.grad is not None and not torch.equal(value, before[name])
        }
        assert trained == {
            "vision_encoder.patch_embed",
            "vision_encoder.pos_embed",
            "vision_encoder.layers",
            "clip_head.layers",
        }
        segmenter.save_pretrained(tmp_path / "upernet")
        loaded, info = UperNetForSemanticSegmentation.from_pretrained(tmp_path / "upernet", output_loading_info=True)
        assert not any(info.values()) and type(loaded.backbone) is SamClipBackbone
        with torch.no_grad():
            logits = [model.eval()(pixel_values).logits for model in (segmenter, loaded)]
        torch.testing.assert_close(*logits, rtol=0, atol=1e-5)

    def test_detr_trains_a_step_with_it(self, backbone):
        sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
        sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 16, "num_queries": 4}
        detector = DetrForObjectDetection(DetrConfig(backbone_config=backbone.config, num_labels=2, **sizes)).train()
        annotations = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3]])}
        detector(random_images(2, 40, 64), labels=[annotations] * 2).loss.backward()
        gradients = [
            parameter.grad
            for name, parameter in detector.named_parameters()
            if "vision_encoder.layers.0" in name and parameter.grad is not None
        ]
        assert gradients and any(gradient.abs().sum() > 0 for gradient in gradients)


class TestSentenceTransformers:
    @pytest.fixture(params=["merged", "unmerged"])
    def folder(self, request, tmp_path) -> str:
        if request.param == "merged":
            return miniature.checkpoint()
        sam, clip = miniature.sam_teacher(), miniature.clip_teacher()
        SamClipForImageSegmentation.from_teachers(sam, clip, merged=False).save_pretrained(tmp_path)
        SamClipProcessor.from_teachers(sam, clip).save_pretrained(tmp_path)
        return str(tmp_path)

    def test_embeddings_are_the_features_of_the_model(self, folder):
        library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
        embedder = library.SentenceTransformer(folder, device="cpu")
        model = SamClipModel.from_pretrained(folder).eval()
        processor = SamClipProcessor.from_pretrained(folder)
        inputs = processor(images(), text=TEXTS)
        with torch.no_grad():
            expected_images = model.get_image_features(inputs["pixel_values"], inputs["reshaped_input_sizes"])
            expected_texts = model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
            without_sizes = model.get_image_features(inputs["pixel_values"])
        actual = embedder.encode(images())
        np.testing.assert_allclose(actual, expected_images.pooler_output, atol=1e-5)
        assert not np.allclose(actual, without_sizes.pooler_output, atol=1e-2)  # the padding is not part of the image
        np.testing.assert_allclose(embedder.encode(TEXTS), expected_texts.pooler_output, atol=1e-5)
        normalized = embedder.encode(images(), normalize_embeddings=True)
        np.testing.assert_allclose(np.linalg.norm(normalized, axis=1), 1, atol=1e-5)
