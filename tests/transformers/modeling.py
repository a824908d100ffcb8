"""
transformers' `ModelTesterMixin` over every model of this package: `make test-transformers`.

Named without `test_`, so that `make test` passes it by: it needs a download. Where a test is replaced, transformers'
own tests of SAM replace or skip it too.
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
    """Of the sizes of transformers' own tests of SAM and CLIP."""
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
        # Cosines, not 14 times as much: the mixin compares similarities in float16 to within 5e-3.
        logit_scale_init_value=0.0,
        **kwargs,
    )


class ModelTester:
    """What the mixin asks about a model."""

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
    test_resize_embeddings = False  # as for SAM and CLIP: which of the two towers'?
    test_all_params_have_gradient = False  # CLIP's loss, the only one of forward, is none of the masks
    test_can_init_all_missing_weights_before_2023 = True  # the mixin goes by a date that our files do not bear
    recorded = "vision_{}"  # as in SAM's output
    tester_class = ModelTester

    def setUp(self):
        self.model_tester = self.tester_class()

    def test_model_get_set_embeddings(self):
        """As SAM's: what is embedded is pixels."""
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.prepare_config_and_inputs_for_common()[0])
            self.assertIsInstance(model.get_input_embeddings(), torch.nn.Conv2d)
            self.assertIsNone(model.get_output_embeddings())

    def test_attention_outputs(self):
        """As SAM's: of all heads of all windows, in one dimension."""
        for asked_by_config in (False, True):
            attentions = self.record("attentions", asked_by_config)[1]
            windows = 4  # of 7 x 7 patches, to cover 12 x 12
            self.assertEqual([a.shape for a in attentions], [(2 * windows * 4, 49, 49), (2 * 4, GRID**2, GRID**2)])

    def test_hidden_states_output(self):
        """As SAM's: of the image encoder, laid out in space."""
        for asked_by_config in (False, True):
            hidden_states = self.record("hidden_states", asked_by_config)[1]
            self.assertEqual([h.shape for h in hidden_states], [(2, GRID, GRID, 36)] * 3)

    def test_retain_grad_hidden_states_attentions(self):
        """What is recorded lies on the way to the result."""
        for name in ("hidden_states", "attentions"):
            outputs, recorded = self.record(name)
            for tensor in recorded:
                tensor.retain_grad()
            outputs.dense_embeds.square().sum().backward()
            for tensor in recorded:
                self.assertIsNotNone(tensor.grad)

    def record(self, name: str, asked_by_config: bool = False):
        """Outputs, and those among them that were asked for by `output_{name}`."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        if asked_by_config:
            setattr(config, f"output_{name}", True)
            self._set_subconfig_attributes(config, f"output_{name}", True)
        else:
            inputs[f"output_{name}"] = True
        model = self.all_model_classes[0]._from_config(config, attn_implementation="eager").eval()
        outputs = model(**inputs)
        return outputs, outputs[self.recorded.format(name)]

    def test_sdpa_can_dispatch_composite_models(self):
        """As SAM's and CLIP's: every part attends as the whole was told to."""
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.prepare_config_and_inputs_for_common()[0])
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                for implementation in ("sdpa", "eager"):
                    loaded = model_class.from_pretrained(folder, attn_implementation=implementation)
                    configs = {id(m.config): m.config for m in loaded.modules() if hasattr(m, "config")}
                    self.assertEqual({c._attn_implementation for c in configs.values()}, {implementation})


class SegmentationTester(ModelTester):
    is_training = False  # as SAM's: forward has no loss; SamClipModel is what is trained

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
        """Without labels, which a model without a loss refuses."""
        return super()._prepare_for_class(inputs_dict, model_class)

    def _text_features_prepare_config_and_inputs(self):
        """Texts, which `forward` does not take, but `get_text_features` does."""
        _, inputs = ModelTester().prepare_config_and_inputs_for_common()
        return tiny_config(), {name: inputs[name] for name in ("input_ids", "attention_mask")}


class VisionTester(ModelTester):
    is_training = False  # as CLIP's vision tower: forward has no loss

    def prepare_config_and_inputs_for_common(self):
        config = tiny_config()
        eye = SamClipVisionConfig(
            vision_config=config.vision_config.to_dict(), clip_head_config=config.clip_head_config.to_dict()
        )
        inputs = super().prepare_config_and_inputs_for_common()[1]
        return eye, {"pixel_values": inputs["pixel_values"]}


class SamClipVisionModelTest(SamClipModelTest):
    all_model_classes = (SamClipVisionModel,)
    additional_model_inputs = ()
    recorded = "{}"
    tester_class = VisionTester

    def test_attention_outputs(self):
        """Of the image encoder and of the CLIP head, whose layer attends everywhere, as the encoder's last does."""
        attentions = self.record("attentions")[1]
        everywhere = (2 * 4, GRID**2, GRID**2)
        self.assertEqual([a.shape for a in attentions], [(2 * 4 * 4, 49, 49), everywhere, everywhere])

    def test_hidden_states_output(self):
        """In a sequence, as vision-language models want them."""
        for asked_by_config in (False, True):
            hidden_states = self.record("hidden_states", asked_by_config)[1]
            self.assertEqual([h.shape for h in hidden_states], [(2, GRID**2, 36)] * 4)

    def test_retain_grad_hidden_states_attentions(self):
        """Attentions lie on the way to the result. Hidden states, brought into a sequence, lie beside it, and are
        themselves what is trained by: gradients reach the pixels from each."""
        outputs, attentions = self.record("attentions")
        for tensor in attentions:
            tensor.retain_grad()
        outputs.last_hidden_state.square().sum().backward()
        for tensor in attentions:
            self.assertIsNotNone(tensor.grad)
        for tensor in self.record("hidden_states")[1]:
            self.assertTrue(tensor.requires_grad)
