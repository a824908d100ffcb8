"""
Runs transformers' `ModelTesterMixin` on every model of this package: `make test-transformers`.

The file name has no `test_`, so that `make test` does not collect it: it needs a download. The tests that are replaced
here are also replaced or skipped in transformers' tests of SAM.
"""

import tempfile
import unittest

import torch
from transformers_tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor

from samclip_hf import (
    SamClipConfig,
    SamClipForImageSegmentation,
    SamClipModel,
    SamClipVisionConfig,
    SamClipVisionModel,
)

GRID, PATCH = 12, 2


def tiny_config(**kwargs) -> SamClipConfig:
    """Sizes as in transformers' tests of SAM and CLIP."""
    size = {"image_size": GRID * PATCH, "patch_size": PATCH}
    return SamClipConfig(
        vision_config=size
        | {
            "hidden_size": 36,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "mlp_dim": 72,
            "output_channels": 32,
            "num_pos_feats": 16,
            "window_size": 7,
            "global_attn_indexes": [1],
            "initializer_range": 0.02,
        },
        prompt_encoder_config=size | {"hidden_size": 32, "mask_input_channels": 4},
        mask_decoder_config={
            "hidden_size": 32,
            "mlp_dim": 64,
            "num_attention_heads": 4,
            "iou_head_hidden_dim": 32,
        },
        text_config={
            "vocab_size": 99,
            "hidden_size": 32,
            "intermediate_size": 37,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 32,
            "bos_token_id": 97,
            "eos_token_id": 98,
        },
        clip_head_config={"num_hidden_layers": 1, "projection_dim": 24},
        # Logits are cosines: the mixin compares float16 with a tolerance of 5e-3.
        logit_scale_init_value=0.0,
        **kwargs,
    )


class ModelTester:
    """Configuration and inputs for the mixin."""

    batch_size = 2
    num_hidden_layers = 2
    is_training = True

    def prepare_config_and_inputs_for_common(self):
        return tiny_config(), {
            "pixel_values": floats_tensor([self.batch_size, 3, GRID * PATCH, GRID * PATCH]),
            "input_points": floats_tensor([self.batch_size, 3, 2, 2], scale=GRID * PATCH),
            "input_ids": ids_tensor([self.batch_size, 7], 97),
            "attention_mask": torch.ones(self.batch_size, 7, dtype=torch.long),
            "return_loss": True,
        }


class SamClipModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (SamClipModel,)
    additional_model_inputs = ("input_points", "input_ids")
    _is_composite = True
    test_resize_embeddings = False  # as for SAM and CLIP
    test_all_params_have_gradient = False  # the only loss, CLIP's, does not depend on the masks
    test_can_init_all_missing_weights_before_2023 = True  # the mixin reads the year from a copyright line
    recorded = "vision_{}"  # field names of SAM's output
    tester_class = ModelTester

    def setUp(self):
        self.model_tester = self.tester_class()

    def test_model_get_set_embeddings(self):
        """As in SAM: the input embeddings are a convolution."""
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.prepare_config_and_inputs_for_common()[0])
            self.assertIsInstance(model.get_input_embeddings(), torch.nn.Conv2d)
            self.assertIsNone(model.get_output_embeddings())

    def test_attention_outputs(self):
        """As in SAM: the first dimension has all windows and heads."""
        for through_config in (False, True):
            attentions = self.record("attentions", through_config)[1]
            windows = 4  # of 7 x 7 patches, to cover 12 x 12
            self.assertEqual([a.shape for a in attentions], [(2 * windows * 4, 49, 49), (2 * 4, GRID**2, GRID**2)])

    def test_hidden_states_output(self):
        """As in SAM: hidden states of the image encoder on the grid."""
        for through_config in (False, True):
            hidden_states = self.record("hidden_states", through_config)[1]
            self.assertEqual([h.shape for h in hidden_states], [(2, GRID, GRID, 36)] * 3)

    def test_retain_grad_hidden_states_attentions(self):
        """Captured tensors have gradients."""
        for name in ("hidden_states", "attentions"):
            outputs, recorded = self.record(name)
            for tensor in recorded:
                tensor.retain_grad()
            outputs.dense_embeds.square().sum().backward()
            for tensor in recorded:
                self.assertIsNotNone(tensor.grad)

    def record(self, name: str, through_config: bool = False):
        """The outputs, and the tensors captured with `output_{name}`."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        if through_config:
            setattr(config, f"output_{name}", True)
            self._set_subconfig_attributes(config, f"output_{name}", True)
        else:
            inputs[f"output_{name}"] = True
        model = self.all_model_classes[0]._from_config(config, attn_implementation="eager").eval()
        outputs = model(**inputs)
        return outputs, outputs[self.recorded.format(name)]

    def test_sdpa_can_dispatch_composite_models(self):
        """As in SAM and CLIP: every part has the requested attention implementation."""
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.prepare_config_and_inputs_for_common()[0])
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                for implementation in ("sdpa", "eager"):
                    loaded = model_class.from_pretrained(folder, attn_implementation=implementation)
                    configs = {id(m.config): m.config for m in loaded.modules() if hasattr(m, "config")}
                    self.assertEqual({c._attn_implementation for c in configs.values()}, {implementation})


class SegmentationTester(ModelTester):
    is_training = False  # as in SAM: forward has no loss

    def prepare_config_and_inputs_for_common(self):
        config = tiny_config(vocabulary_label_ids=[0, 1, 2, 2], id2label={0: "background", 1: "cat", 2: "sofa"})
        inputs = super().prepare_config_and_inputs_for_common()[1]
        return config, {"pixel_values": inputs["pixel_values"]}


class SamClipForImageSegmentationTest(SamClipModelTest):
    all_model_classes = (SamClipForImageSegmentation,)
    additional_model_inputs = ()
    recorded = "{}"
    tester_class = SegmentationTester

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        """Without labels, for which the model raises."""
        return super()._prepare_for_class(inputs_dict, model_class)

    def _text_features_prepare_config_and_inputs(self):
        """Texts for `get_text_features`; `forward` takes none."""
        _, inputs = ModelTester().prepare_config_and_inputs_for_common()
        return tiny_config(), {name: inputs[name] for name in ("input_ids", "attention_mask")}


class VisionTester(ModelTester):
    is_training = False  # as in CLIP's vision model: forward has no loss

    def prepare_config_and_inputs_for_common(self):
        config = tiny_config()
        vision_config = SamClipVisionConfig(
            vision_config=config.vision_config.to_dict(), clip_head_config=config.clip_head_config.to_dict()
        )
        inputs = super().prepare_config_and_inputs_for_common()[1]
        return vision_config, {"pixel_values": inputs["pixel_values"]}


class SamClipVisionModelTest(SamClipModelTest):
    all_model_classes = (SamClipVisionModel,)
    additional_model_inputs = ()
    recorded = "{}"
    tester_class = VisionTester

    def test_attention_outputs(self):
        """The image encoder's attentions and the CLIP head's, which is global like the encoder's last layer."""
        attentions = self.record("attentions")[1]
        everywhere = (2 * 4, GRID**2, GRID**2)
        self.assertEqual([a.shape for a in attentions], [(2 * 4 * 4, 49, 49), everywhere, everywhere])

    def test_hidden_states_output(self):
        """The patches are in a sequence."""
        for through_config in (False, True):
            hidden_states = self.record("hidden_states", through_config)[1]
            self.assertEqual([h.shape for h in hidden_states], [(2, GRID**2, 36)] * 4)

    def test_retain_grad_hidden_states_attentions(self):
        """Attentions have gradients. Hidden states are reshaped after their capture: they are not on the path to the
        output, but gradients flow through them to the weights."""
        outputs, attentions = self.record("attentions")
        for tensor in attentions:
            tensor.retain_grad()
        outputs.last_hidden_state.square().sum().backward()
        for tensor in attentions:
            self.assertIsNotNone(tensor.grad)
        for tensor in self.record("hidden_states")[1]:
            self.assertTrue(tensor.requires_grad)
