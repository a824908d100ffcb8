"""Tiny models and inputs that several tests share. Random weights are large, so that differences are visible."""

import logging

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, SamConfig, SamModel
from transformers.models.sam.configuration_sam import SamMaskDecoderConfig, SamPromptEncoderConfig, SamVisionConfig
from transformers.utils.logging import disable_propagation, enable_propagation

from samclip_hf import SamClipModel


def randomize(model: torch.nn.Module, std: float = 0.1) -> torch.nn.Module:
    """Adds noise to every parameter but `logit_scale`: transformers initializes SAM's weights with almost zero (a
    standard deviation of 1e-10) and its relative positions with zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "logit_scale":
                parameter.add_(torch.randn(parameter.shape, generator=generator) * std)
    return model.eval()


def tiny_sam(image_size: int = 64, patch_size: int = 8, **vision) -> SamModel:
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "mlp_ratio": 2.0,
        "window_size": 3,
        "global_attn_indexes": [2],
        "output_channels": 16,
        "num_pos_feats": 8,
    } | vision
    sizes = {"image_size": image_size, "patch_size": patch_size}
    torch.manual_seed(1)  # transformers initializes weights with the global generator
    config = SamConfig(
        vision_config=SamVisionConfig(**sizes, **vision),
        prompt_encoder_config=SamPromptEncoderConfig(**sizes, hidden_size=16, mask_input_channels=8),
        mask_decoder_config=SamMaskDecoderConfig(
            hidden_size=16, mlp_dim=32, num_attention_heads=2, iou_head_hidden_dim=16
        ),
    )
    return randomize(SamModel(config))


def tiny_clip(projection_dim: int = 20) -> CLIPModel:
    tower = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(1)
    config = CLIPConfig(
        text_config=tower
        | {
            "vocab_size": 50,
            "max_position_embeddings": 16,
            "bos_token_id": 48,
            "eos_token_id": 49,
            "pad_token_id": 0,
        },
        vision_config=tower | {"image_size": 32, "patch_size": 8},
        projection_dim=projection_dim,
    )
    return randomize(CLIPModel(config))


def random_images(batch_size=2, height=64, width=64):
    return torch.randn(batch_size, 3, height, width, generator=torch.Generator().manual_seed(1))


def random_points(batch_size=2, num_prompts=3, num_points=2):
    return torch.rand(batch_size, num_prompts, num_points, 2, generator=torch.Generator().manual_seed(2)) * 64


INPUT_IDS = torch.tensor([[48, 5, 7, 49], [48, 9, 49, 0], [48, 3, 49, 0]])
ATTENTION_MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0]])


def assert_same(actual, expected, tolerance=5e-5):
    """Equal up to `tolerance` times the largest expected value."""
    scale = expected.abs().max().item()
    assert scale > 1e-3, "a comparison of near-zero values verifies nothing"
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


@pytest.fixture(autouse=True)
def seed():
    """Gives every test the same random weights, in any order of the tests."""
    torch.manual_seed(0)


@pytest.fixture
def transformers_log(caplog):
    """pytest's `caplog` with the warnings and errors of transformers, whose logger does not propagate by default."""
    enable_propagation()
    with caplog.at_level(logging.WARNING):
        yield caplog
    disable_propagation()


complaints = transformers_log


@pytest.fixture(scope="session")
def sam() -> SamModel:
    return tiny_sam()


@pytest.fixture(scope="session")
def clip() -> CLIPModel:
    return tiny_clip()


@pytest.fixture
def model(sam, clip) -> SamClipModel:
    """A new SAM-CLIP from both teachers, with noise in its CLIP head too."""
    samclip = SamClipModel.from_teachers(sam, clip)
    randomize(samclip.clip_head)
    return samclip.eval()
