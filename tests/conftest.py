"""Tiny SAMs and CLIPs with random weights, large enough to make every difference visible."""

import logging

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, SamConfig, SamModel
from transformers.models.sam.configuration_sam import SamMaskDecoderConfig, SamPromptEncoderConfig, SamVisionConfig
from transformers.utils.logging import disable_propagation, enable_propagation

from samclip_hf import SamClipModel


def randomise(model: torch.nn.Module, std: float = 0.1) -> torch.nn.Module:
    """Noise on every parameter: transformers starts SAM's weights at 1e-10 and its relative positions at zero."""
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
    config = SamConfig(
        vision_config=SamVisionConfig(**sizes, **vision),
        prompt_encoder_config=SamPromptEncoderConfig(**sizes, hidden_size=16, mask_input_channels=8),
        mask_decoder_config=SamMaskDecoderConfig(
            hidden_size=16, mlp_dim=32, num_attention_heads=2, iou_head_hidden_dim=16
        ),
    )
    return randomise(SamModel(config))


def tiny_clip(projection_dim: int = 20) -> CLIPModel:
    tower = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
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
    return randomise(CLIPModel(config))


@pytest.fixture(autouse=True)
def seed():
    """New weights are random, and must be the same in every run and in any order of the tests."""
    torch.manual_seed(0)


@pytest.fixture
def complaints(caplog):
    """pytest's `caplog`, from warnings on, that hears transformers too, whose log otherwise goes its own way."""
    enable_propagation()
    with caplog.at_level(logging.WARNING):
        yield caplog
    disable_propagation()


@pytest.fixture(scope="session")
def sam() -> SamModel:
    return tiny_sam()


@pytest.fixture(scope="session")
def clip() -> CLIPModel:
    return tiny_clip()


@pytest.fixture
def model(sam, clip) -> SamClipModel:
    """A fresh SAM-CLIP of the two, its CLIP head noised too."""
    samclip = SamClipModel.from_teachers(sam, clip)
    randomise(samclip.clip_head)
    return samclip.eval()
