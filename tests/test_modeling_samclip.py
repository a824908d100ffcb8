import contextlib
import copy
import math
import pickle
from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter
from torch.export import Dim
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageSegmentation,
    AutoModelForMaskGeneration,
    AutoModelForZeroShotImageClassification,
    AutoModelForZeroShotObjectDetection,
    BatchEncoding,
    CLIPModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SamModel,
)
from transformers.models.sam.configuration_sam import SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionLayer

from samclip_hf import (
    SamClipConfig,
    SamClipForImageSegmentation,
    SamClipModel,
    SamClipVisionConfig,
    SamClipVisionModel,
    segmentation_samclip,
    vision_encoder_samclip,
)
from samclip_hf.segmentation_samclip import _distinct_masks, _segments, _spread_points, _stability
from samclip_hf.vision_encoder_samclip import SamClipPatchGroups, SamClipVisionAttention, SamClipVisionLayer

from .conftest import randomise, tiny_clip, tiny_sam


def random_images(batch_size=2, height=64, width=64):
    return torch.randn(batch_size, 3, height, width, generator=torch.Generator().manual_seed(1))


def random_points(batch_size=2, num_prompts=3, num_points=2):
    return torch.rand(batch_size, num_prompts, num_points, 2, generator=torch.Generator().manual_seed(2)) * 64


INPUT_IDS = torch.tensor([[48, 5, 7, 49], [48, 9, 49, 0], [48, 3, 49, 0]])
ATTENTION_MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0]])


def assert_same(actual, expected, tolerance=5e-5):
    """Equal to `tolerance` of the largest value."""
    scale = expected.abs().max().item()
    assert scale > 1e-3, "a comparison of near-zero values would verify nothing"
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


def explicit_scores(attention, hidden_states):
    """Attention scores with the relative positions added one by one, and the values: `(batch, heads, length, length)`
    and `(batch, length, heads, head_dim)`."""
    batch_size, height, width, _ = hidden_states.shape
    query, key, value = attention.qkv(hidden_states).view(batch_size, height * width, 3, 2, 8).unbind(2)
    rel_pos_h = F.interpolate(attention.rel_pos_h.T[None], size=2 * height - 1, mode="linear")[0].T
    rel_pos_w = F.interpolate(attention.rel_pos_w.T[None], size=2 * width - 1, mode="linear")[0].T
    bias = torch.empty(batch_size, 2, height * width, height * width)
    for q in range(height * width):
        for k in range(height * width):
            row, column = q // width - k // width, q % width - k % width
            bias[:, :, q, k] = query[:, q] @ (rel_pos_h[row + height - 1] + rel_pos_w[column + width - 1])
    return torch.einsum("bqnc,bknc->bnqk", query, key) * 8**-0.5 + bias, value


def brute_force(attention, hidden_states, visible=True):
    """Attention weights, where the mask `visible` allows any, and what the attention returns."""
    scores, value = explicit_scores(attention, hidden_states)
    weights = scores.masked_fill(~torch.as_tensor(visible), -torch.inf).softmax(dim=-1)
    attended = torch.einsum("bnqk,bknc->bqnc", weights, value).reshape_as(hidden_states)
    return weights, attention.proj(attended)


BACKENDS = [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]


class TestAttention:
    @pytest.fixture
    def attention(self):
        torch.manual_seed(0)
        config = SamVisionConfig(hidden_size=16, num_attention_heads=2, image_size=40, patch_size=8)
        config._attn_implementation = "sdpa"
        return randomise(SamClipVisionAttention(config, window_size=0), std=0.5)

    @pytest.mark.parametrize("grid", [(5, 5), (4, 7), (9, 3)])
    @pytest.mark.parametrize("backend", [*BACKENDS, "eager"])
    @pytest.mark.parametrize("inference", [True, False], ids=["inference", "training"])
    def test_equals_brute_force_with_the_explicit_bias(self, attention, grid, backend, inference, monkeypatch):
        monkeypatch.setattr(vision_encoder_samclip, "BIAS_CHUNK", 4 * math.prod(grid) // torch.get_num_threads())
        hidden_states = torch.randn(2, *grid, 16)
        weights, expected = brute_force(attention, hidden_states)
        if backend == "eager":
            attention.config._attn_implementation = "eager"
        attends = contextlib.nullcontext() if backend == "eager" else sdpa_kernel(backend)
        with attends, torch.inference_mode(inference):
            actual, actual_weights = attention(hidden_states)
        assert_same(actual, expected)
        if backend == "eager":
            assert_same(actual_weights, weights.flatten(0, 1))
        else:
            assert actual_weights is None

    def test_flex_attention_equals_brute_force_too(self, attention):
        attention.config._attn_implementation = "flex_attention"
        for grid in [(5, 5), (4, 7)]:  # another size is compiled anew
            hidden_states = torch.randn(2, *grid, 16)
            with torch.no_grad():  # on a CPU, the kernel has no gradients
                assert_same(attention(hidden_states)[0], brute_force(attention, hidden_states)[1])

    def test_a_checkpoint_is_loaded_with_any_attention(self, model, tmp_path, caplog):
        model.save_pretrained(tmp_path)
        pixel_values = random_images(1)
        with torch.no_grad():
            expected = model(pixel_values).dense_embeds
            for implementation in ("eager", "flex_attention"):
                for loaded in (
                    SamClipModel.from_pretrained(tmp_path, attn_implementation=implementation),
                    SamClipModel.from_pretrained(tmp_path),
                ):
                    loaded.set_attn_implementation(implementation)
                    assert loaded.vision_encoder.config._attn_implementation == implementation
                    assert_same(loaded.eval()(pixel_values).dense_embeds, expected)
        assert "attention implementation for the sub-config" not in caplog.text

    @pytest.mark.parametrize("chunk", [1, 100, 10**6])
    def test_groups_of_patches_know_nothing_of_one_another(self, attention, chunk, monkeypatch):
        monkeypatch.setattr(vision_encoder_samclip, "BIAS_CHUNK", chunk)
        hidden_states = torch.randn(1, 4, 7, 16)
        group = torch.randint(0, 3, (28,))
        expected = brute_force(attention, hidden_states, group[:, None] == group)[1].view(28, 16)
        order = group.argsort()
        groups = SamClipPatchGroups(order // 7, order % 7, (4, 7), group.bincount().tolist())
        with torch.no_grad():
            assert_same(attention(hidden_states.view(28, 16)[order], groups)[0], expected[order])

    @pytest.mark.parametrize("grid", [(3, 3), (4, 7), (6, 2)])
    def test_windows_are_sams_although_they_are_filled_up_after_the_projection(self, attention, grid):
        config = attention.config
        sams = randomise(SamVisionLayer(config, window_size=3), std=0.3)
        ours = SamClipVisionLayer(config, window_size=3).eval()
        ours.load_state_dict(sams.state_dict())
        hidden_states = torch.randn(2, *grid, 16)
        assert_same(ours(hidden_states), sams(hidden_states))

    def test_stores_nothing_of_the_size_of_the_bias(self):
        config = SamVisionConfig(hidden_size=16, num_attention_heads=2, image_size=320, patch_size=8)
        attention = SamClipVisionAttention(config, window_size=0)
        length = 40 * 40
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            attention(torch.randn(1, 40, 40, 16))
        assert max(saved) < length * length / 5  # the bias of one head alone has length * length values


class TestAgainstSam:
    @pytest.mark.parametrize("size", [(64, 8, 3), (128, 16, 4)])
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_same_masks_scores_and_embeddings(self, clip, size, attention):
        image_size, patch_size, window_size = size
        sam = tiny_sam(image_size, patch_size, window_size=window_size)
        model = SamClipModel.from_teachers(sam, clip).eval()
        model.set_attn_implementation(attention)
        pixel_values = random_images(height=image_size, width=image_size)
        boxes = torch.tensor([[[3.0, 4, 40, 50], [0, 0, 9, 60]], [[1, 2, 30, 20], [5, 5, 6, 6]]])
        masks = torch.randn(2, 1, 4 * image_size // patch_size, 4 * image_size // patch_size)
        with torch.no_grad():
            for prompts in (
                {"input_points": random_points()},
                {"input_points": random_points(), "input_labels": torch.randint(-1, 2, (2, 3, 2))},
                {"input_boxes": boxes, "multimask_output": False},
                {"input_boxes": boxes, "input_points": random_points(num_prompts=2)},
                {"input_points": random_points(), "input_masks": masks},
            ):
                expected, actual = sam(pixel_values, **prompts), model(pixel_values, **prompts)
                assert_same(actual.pred_masks, expected.pred_masks)
                assert_same(actual.iou_scores, expected.iou_scores)
            embeddings = sam.get_image_embeddings(pixel_values)
            assert_same(model.get_image_embeddings(pixel_values), embeddings)
            again = model(image_embeddings=embeddings, input_points=random_points())
            assert_same(again.pred_masks, sam(pixel_values, input_points=random_points()).pred_masks)
        assert_same(model.get_image_wide_positional_embeddings(), sam.get_image_wide_positional_embeddings())

    def test_same_embeddings_without_relative_positions(self, clip):
        sam = tiny_sam(use_rel_pos=False)
        model = SamClipModel.from_teachers(sam, clip).eval()
        for grad in (False, True):  # two ways to attend
            with torch.set_grad_enabled(grad):
                actual = model.vision_encoder(random_images()).last_hidden_state
                assert_same(actual, sam.vision_encoder(random_images()).last_hidden_state)

    def test_same_attention_weights_where_they_are_asked_for(self, sam, model, tmp_path):
        model.set_attn_implementation("eager")
        sam.save_pretrained(tmp_path)
        eager_sam = SamModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
        with torch.no_grad():
            actual = model.vision_encoder(random_images(), output_attentions=True)
            expected = eager_sam.vision_encoder(random_images(), output_attentions=True)
        assert len(actual.attentions) == len(expected.attentions) == 3
        for weights, expected_weights in zip(actual.attentions, expected.attentions, strict=True):
            assert_same(weights, expected_weights)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_same_encoder_at_1024_with_vit_b_attention(self, clip, backend):
        # ViT-B's grid, windows and head width; two layers and two heads are enough to tell.
        sam = tiny_sam(1024, 16, hidden_size=128, num_hidden_layers=2, window_size=14, global_attn_indexes=[1])
        model = SamClipModel.from_teachers(sam, clip, {"num_hidden_layers": 1}).eval()
        pixel_values = random_images(1, 1024, 1024)
        with torch.no_grad(), sdpa_kernel(backend):
            assert_same(model.get_image_embeddings(pixel_values), sam.get_image_embeddings(pixel_values), 2e-5)

    def test_a_sam_checkpoint_lacks_only_the_clip_side(self, sam, model, tmp_path):
        sam.save_pretrained(tmp_path)
        loaded, info = SamClipModel.from_pretrained(tmp_path, config=model.config, output_loading_info=True)
        assert not info["unexpected_keys"]
        assert {key.split(".")[0] for key in info["missing_keys"]} == {
            "clip_head",
            "text_model",
            "text_projection",
            "logit_scale",
        }
        pixel_values, points = random_images(), random_points()
        with torch.no_grad():
            masks = loaded.eval()(pixel_values, input_points=points).pred_masks
            assert_same(masks, sam(pixel_values, input_points=points).pred_masks)


class TestAnySize:
    @pytest.mark.parametrize("size", [(24, 24), (40, 96), (120, 64)])
    def test_grid_follows_the_image(self, model, size):
        height, width = size
        with torch.no_grad():
            outputs = model(random_images(1, *size), input_points=random_points(1), input_ids=INPUT_IDS)
        assert outputs.dense_embeds.shape == (1, 20, height // 8, width // 8)
        assert outputs.image_embeddings.shape == (1, 16, height // 8, width // 8)
        assert outputs.pred_masks.shape == (1, 3, 3, height // 2, width // 2)

    def test_prompts_stay_at_their_place_when_the_canvas_is_not_the_trained_one(self, sam, clip):
        """A model whose nominal size is another, but whose tables are the same, must see the same prompts."""
        small = SamClipModel.from_teachers(sam, clip).eval()
        state = small.state_dict()
        config = SamClipConfig.from_dict(small.config.to_dict())
        config.vision_config.image_size = config.prompt_encoder_config.image_size = 32
        config.prompt_encoder_config.image_embedding_size = 4
        nominal = SamClipModel(config).eval()
        nominal.load_state_dict(
            {k: v for k, v in state.items() if nominal.state_dict()[k].shape == v.shape}, strict=False
        )
        embeddings = torch.randn(1, 16, 8, 8)  # both decode the embedding of a 64 x 64 image
        prompts = {"input_points": random_points(1), "input_boxes": torch.tensor([[[3.0, 4, 40, 50]] * 3])}
        with torch.no_grad():
            expected, actual = small.predict_masks(embeddings, **prompts), nominal.predict_masks(embeddings, **prompts)
        assert_same(actual[0], expected[0])

    def test_uneven_sizes_and_channels_are_refused(self, model):
        with pytest.raises(ValueError, match=r"63 x 64.*multiples of the patch size, 8"):
            model(random_images(1, 63, 64))
        with pytest.raises(ValueError, match="4 channels"):
            model(torch.zeros(1, 4, 64, 64))


class TestTypesAndTransforms:
    """What torch and transformers do with any model, they do with this one."""

    @pytest.fixture
    def inputs(self):
        return {
            "pixel_values": random_images(),
            "input_points": random_points(),
            "input_ids": INPUT_IDS,
            "attention_mask": ATTENTION_MASK,
        }

    @staticmethod
    def assert_close_outputs(actual, expected, tolerance):
        for name in ("pred_masks", "iou_scores", "logits_per_image", "dense_embeds"):
            assert actual[name].isfinite().all()
            assert_same(actual[name].float(), expected[name], tolerance)

    @pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.15), (torch.float16, 0.03)])
    @pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "converted"])
    def test_half_precision_stays_near_float32(self, model, inputs, dtype, tolerance, autocast):
        with torch.no_grad():
            expected = model(**inputs)
            if not autocast:
                model.to(dtype)  # pixels are converted to the weights' type, as CLIP does
            with torch.autocast("cpu", dtype, enabled=autocast):
                self.assert_close_outputs(model(**inputs), expected, tolerance)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_finite_at_1024(self, clip, dtype):
        sam = tiny_sam(1024, 16, hidden_size=64, num_hidden_layers=2, window_size=14, global_attn_indexes=[1])
        model = SamClipModel.from_teachers(sam, clip, {"num_hidden_layers": 1}).eval()
        pixel_values = random_images(1, 1024, 1024)
        with torch.no_grad():
            expected = model(pixel_values).dense_embeds
            assert_same(model.to(dtype)(pixel_values).dense_embeds.float(), expected, 0.05)

    def test_bfloat16_tells_points_of_a_large_image_apart(self, clip):
        sam = tiny_sam(1024, 16, hidden_size=64, num_hidden_layers=1, global_attn_indexes=[0])
        model = SamClipModel.from_teachers(sam, clip, {"num_hidden_layers": 1}).to(torch.bfloat16)
        points = torch.tensor([[[[900.0, 900.0]], [[901.0, 900.0]], [[900.0, 901.0]]]])
        labels = torch.ones(1, 3, 1, dtype=torch.int)
        embeds = model.prompt_encoder(points, labels, None, None)[0]
        for autocast in (False, True):  # the same rounded weights, in float32
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                expected = copy.deepcopy(model).float().prompt_encoder(points, labels, None, None)[0]
            assert_same(embeds.float(), expected, 0.02)
        differences = (expected[:, :1] - expected[:, 1:]).abs().amax(dim=(2, 3))
        assert (differences > 0.1).all()

    @pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_copies_give_the_same_numbers(self, model, inputs, copy_of):
        with torch.no_grad():
            self.assert_close_outputs(copy_of(model)(**inputs), model(**inputs), 1e-6)

    def test_device_map_auto(self, model, inputs, tmp_path):
        model.save_pretrained(tmp_path)
        loaded = SamClipModel.from_pretrained(tmp_path, device_map="auto")
        with torch.no_grad():
            self.assert_close_outputs(loaded(**inputs), model(**inputs), 1e-6)

    def test_the_meta_device_gives_shapes(self, model):
        outputs = model.to("meta")(random_images().to("meta"), input_points=random_points().to("meta"))
        assert outputs.pred_masks.device.type == "meta" and outputs.pred_masks.shape == (2, 3, 3, 32, 32)

    def test_checkpointed_activations_give_the_same_gradients(self, model, inputs):
        gradients = []
        for checkpointed in (False, True):
            copied = copy.deepcopy(model).train()
            if checkpointed:
                # transformers' name for it before and since
                enable = (
                    getattr(copied, "activation_checkpointing_enable", None) or copied.gradient_checkpointing_enable
                )
                enable()
            outputs = copied(**inputs)
            (outputs.pred_masks.square().mean() + outputs.logits_per_image.square().mean()).backward()
            gradients.append({n: p.grad for n, p in copied.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 100
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], gradient, msg=name)

    def test_two_compilations_serve_every_size(self, model, inputs):
        counter = CompileCounter()
        compiled = torch.compile(lambda **kwargs: model(**kwargs), fullgraph=True, backend=counter)
        with torch.no_grad():
            for size in ((64, 64), (96, 80), (128, 72), (48, 160), (40, 72)):
                inputs["pixel_values"] = random_images(2, *size)
                self.assert_close_outputs(compiled(**inputs), model(**inputs), 1e-4)
        assert counter.frame_count == 2  # the first size by itself, then all

    def test_exports_for_any_batch_and_size(self, model):
        class Embeddings(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.model = model

            def forward(self, pixel_values):
                outputs = self.model(pixel_values)
                return outputs.image_embeddings, outputs.image_embeds, outputs.dense_embeds

        rows, columns = Dim("rows", min=2, max=64), Dim("columns", min=2, max=64)
        shapes = {"pixel_values": {0: Dim("images", min=1, max=8), 2: 8 * rows, 3: 8 * columns}}
        exported = torch.export.export(Embeddings(), (random_images(2, 64, 96),), dynamic_shapes=shapes).module()
        with torch.no_grad():
            for batch_size, height, width in ((1, 80, 48), (3, 64, 64)):
                pixel_values = random_images(batch_size, height, width)
                for actual, expected in zip(exported(pixel_values), Embeddings()(pixel_values), strict=True):
                    assert_same(actual, expected)


class TestAgainstClip:
    def test_same_text_features(self, model, clip):
        inputs = {"input_ids": INPUT_IDS, "attention_mask": ATTENTION_MASK}
        with torch.no_grad():
            expected = clip.get_text_features(**inputs).pooler_output
            assert_same(model.get_text_features(**inputs).pooler_output, expected, 1e-6)

    def test_logits_and_loss_are_clips_for_the_same_embeddings(self, model, clip):
        inputs = {"input_ids": INPUT_IDS, "attention_mask": ATTENTION_MASK, "return_loss": True}
        pixel_values = random_images(3)
        with torch.no_grad():
            outputs = model(pixel_values, **inputs)
            image_features = model.get_image_features(pixel_values)
            clip.get_image_features = lambda **_: image_features  # CLIP with our eyes
            expected = clip(pixel_values=pixel_values, **inputs)
            del clip.get_image_features
        for name in ("logits_per_image", "logits_per_text", "image_embeds", "text_embeds", "loss"):
            assert_same(outputs[name], expected[name])


class TestClipHead:
    def test_layers_start_as_the_encoders_last(self, sam, clip):
        model = SamClipModel.from_teachers(sam, clip)
        last = sam.vision_encoder.layers[-1].state_dict()
        assert len(model.clip_head.layers) == 3
        for layer in model.clip_head.layers:
            for name, weight in layer.state_dict().items():
                torch.testing.assert_close(weight, last[name], rtol=0, atol=0)

    def test_layers_may_start_random(self, sam, clip):
        model = SamClipModel.from_teachers(sam, clip, clip_head_initialization="random")
        first, second, _ = (layer.attn.qkv.weight for layer in model.clip_head.layers)
        assert first.std().item() == pytest.approx(model.config.initializer_range, rel=0.2)
        assert not torch.equal(first, second)
        with pytest.raises(ValueError, match="`clip_head_initialization` is"):
            SamClipModel.from_teachers(sam, clip, clip_head_initialization="copy")

    @pytest.mark.parametrize("pooling", ["max", "mean"])
    def test_image_and_patch_embeddings_share_norm_and_mlp(self, sam, clip, pooling):
        model = randomise(SamClipModel.from_teachers(sam, clip, {"pooling": pooling}))
        with torch.no_grad():
            tokens = model.vision_encoder(random_images()).patch_tokens
            for layer in model.clip_head.layers:
                tokens = layer(tokens)
            flat = tokens.flatten(1, 2)
            pooled = flat.max(dim=1).values if pooling == "max" else flat.mean(dim=1)
            head = model.clip_head
            outputs = model(random_images())
            assert_same(outputs.image_embeds, F.normalize(head.mlp(head.layer_norm(pooled)), dim=-1))
            patch = F.normalize(head.mlp(head.layer_norm(tokens[:, 2, 5])), dim=-1)
            assert_same(outputs.dense_embeds[:, :, 2, 5], patch)

    @pytest.mark.parametrize("pooling", ["max", "mean"])
    def test_padding_does_not_count_in_the_pooling(self, sam, clip, pooling):
        head = randomise(SamClipModel.from_teachers(sam, clip, {"pooling": pooling})).clip_head
        tokens = torch.randn(2, 4, 5, 32)
        inside = torch.zeros(2, 4, 5, dtype=torch.bool)
        inside[0, :3, :4] = inside[1, :2] = True
        with torch.no_grad():
            pooled = head.pool(tokens, inside)
            assert_same(pooled[:1], head.pool(tokens[:1, :3, :4]))
            assert_same(pooled[1:], head.pool(tokens[1:, :2]))

    @pytest.mark.parametrize("last_layer", ["global", "windowed"])
    @pytest.mark.parametrize("pooling", ["max", "mean"])
    def test_a_segment_is_an_image_of_its_own(self, clip, last_layer, pooling):
        sam = tiny_sam(48, global_attn_indexes=[2 if last_layer == "global" else 0])  # two windows a side
        head = randomise(SamClipModel.from_teachers(sam, clip, {"pooling": pooling})).clip_head
        tokens = torch.randn(2, 6, 6, 32)
        segments = torch.zeros(2, 3, 6, 6, dtype=torch.bool)
        segments[0, 0] = True
        segments[0, 1, :4, 1:3] = segments[1, 2, 2:, 2:] = True
        elsewhere = torch.where(segments[:, 1:].any(dim=1)[..., None], tokens, torch.randn_like(tokens))
        with torch.no_grad():
            embeds = head.pool_segments(tokens, segments)
            assert embeds.shape == (2, 3, 20)
            assert_same(embeds[0, 0], head.pool(head(tokens[:1]))[0])  # of the whole image
            others = head.pool_segments(elsewhere, segments)
            for image, segment in ((0, 1), (1, 2)):
                assert_same(others[image, segment], embeds[image, segment])
            assert (others[0, 0] - embeds[0, 0]).abs().max() > 1e-3
            assert head.pool_segments(tokens, torch.zeros_like(segments)).shape == (2, 3, 20)  # nothing found

    def test_content_mask_holds_every_cell_that_shows_the_picture(self, model):
        mask = model._content_mask(torch.zeros(2, 8, 8, 32), [[64, 17], [33, 64]])
        assert mask[0].all(dim=0).tolist() == [True] * 3 + [False] * 5
        assert mask[1].all(dim=1).tolist() == [True] * 5 + [False] * 3


class TestOnePass:
    @pytest.mark.parametrize("inputs", [{}, {"input_ids": INPUT_IDS}, {"input_points": random_points()}])
    def test_outputs_are_what_the_inputs_ask_for_and_the_encoder_runs_once(self, model, inputs):
        calls = []
        model.vision_encoder.register_forward_hook(lambda *_: calls.append("encoder"))
        model.clip_head.register_forward_hook(lambda *_: calls.append("clip head"))
        with torch.no_grad():
            outputs = model(random_images(), **inputs)
        assert calls == ["encoder"] + ["clip head"] * ("input_points" not in inputs)
        assert ("pred_masks" in outputs) == ("input_points" in inputs)
        assert ("logits_per_image" in outputs) == ("input_ids" in inputs)
        assert ("dense_embeds" in outputs) == ("input_points" not in inputs)

    def test_prompts_and_text_together_give_both(self, model):
        with torch.no_grad():
            both = model(random_images(), input_points=random_points(), input_ids=INPUT_IDS)
            assert_same(both.pred_masks, model(random_images(), input_points=random_points()).pred_masks)
            assert_same(both.logits_per_image, model(random_images(), input_ids=INPUT_IDS).logits_per_image)

    def test_an_encoded_image_answers_everything_without_being_encoded_again(self, model, monkeypatch):
        images, sizes = random_images(), torch.tensor([[64, 40], [50, 64]])
        asked = (
            {"input_ids": INPUT_IDS, "reshaped_input_sizes": sizes},
            {"input_points": random_points()},
            {"input_points": random_points(), "input_ids": INPUT_IDS},
        )
        with torch.no_grad():
            vision_embeds = model.vision_encoder(images)
            expected = [model(images, **inputs) for inputs in asked]
            features = model.get_image_features(images, sizes).pooler_output
            monkeypatch.setattr(model.vision_encoder, "encode", None)
            for inputs, outputs in zip(asked, expected, strict=True):
                again = model(vision_embeds=vision_embeds, **inputs)
                assert again.keys() == outputs.keys()
                for name in ("pred_masks", "logits_per_image", "image_embeds", "dense_embeds"):
                    assert name not in outputs or again[name].equal(outputs[name])
            again = model.get_image_features(reshaped_input_sizes=sizes, vision_embeds=vision_embeds)
            assert again.pooler_output.equal(features)
        for ask in (model, model.get_image_features):
            with pytest.raises(ValueError, match="vision_embeds"):
                ask(images, vision_embeds=vision_embeds)
        with pytest.raises(ValueError, match="either pixel_values or vision_embeds"):
            model.get_image_features()

    def test_hidden_states_and_tuples(self, model):
        with torch.no_grad():
            outputs = model(random_images(), output_hidden_states=True)
            as_tuple = model(random_images(), return_dict=False)
        assert [tuple(h.shape) for h in outputs.vision_hidden_states] == [(2, 8, 8, 32)] * 4
        assert isinstance(as_tuple, tuple)

    def test_contradictory_inputs_are_refused(self, model):
        embeddings = torch.zeros(2, 16, 8, 8)
        with pytest.raises(ValueError, match="one of pixel_values, image_embeddings"):
            model()
        with pytest.raises(ValueError, match="give pixel_values or vision_embeds for text"):
            model(image_embeddings=embeddings, input_ids=INPUT_IDS)
        with pytest.raises(ValueError, match="are for 3 images"):
            model(image_embeddings=embeddings, input_points=random_points(3))
        with pytest.raises(ValueError, match="as many of each"):
            model(image_embeddings=embeddings, input_points=random_points(), input_boxes=torch.zeros(2, 1, 4))
        with pytest.raises(ValueError, match="must be 32 x 32"):
            model(image_embeddings=embeddings, input_masks=torch.zeros(2, 1, 8, 8))
        with pytest.raises(ValueError, match="one for each of 2 images"):
            model(image_embeddings=embeddings, input_masks=torch.zeros(1, 1, 32, 32))
        with pytest.raises(ValueError, match="one text per image"):
            model(random_images(2), input_ids=INPUT_IDS, return_loss=True)


class TestFromTeachers:
    def test_takes_folders_as_well_as_models(self, sam, clip, tmp_path):
        sam.save_pretrained(tmp_path / "sam")
        clip.save_pretrained(tmp_path / "clip")
        model = SamClipModel.from_teachers(tmp_path / "sam", str(tmp_path / "clip"))
        for name, weight in sam.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], weight, rtol=0, atol=0)
        for name, weight in clip.state_dict().items():
            if name.startswith("text_") or name == "logit_scale":
                torch.testing.assert_close(model.state_dict()[name], weight, rtol=0, atol=0)

    def test_says_what_it_copied(self, sam, clip, caplog):
        SamClipModel.from_teachers(sam, clip)
        said = caplog.text
        assert "Copied from SAM: image encoder" in said and "Copied from CLIP: text tower" in said
        assert "LayerNorm and MLP are new" in said

    def test_wrong_teachers_are_refused(self, sam, clip, tmp_path):
        with pytest.raises(TypeError, match="sam must be a name, a folder or a SamModel, got CLIPModel"):
            SamClipModel.from_teachers(clip, sam)
        clip.save_pretrained(tmp_path)
        with pytest.raises(TypeError, match=r"sam must be a SamModel, but .* holds a model of type 'clip'"):
            SamClipModel.from_teachers(tmp_path, clip)
        with pytest.raises(ValueError, match="projection_dim 7, but the CLIP teacher's text space has 20"):
            SamClipModel.from_teachers(sam, clip, {"projection_dim": 7})


class TestSaving:
    def test_load_gives_the_same_numbers_through_every_auto_class(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
        assert isinstance(AutoConfig.from_pretrained(tmp_path), SamClipConfig)
        inputs = {"pixel_values": random_images(), "input_points": random_points(), "input_ids": INPUT_IDS}
        with torch.no_grad():
            expected = model(**inputs)
            for auto in (AutoModel, AutoModelForMaskGeneration, AutoModelForZeroShotImageClassification):
                actual = auto.from_pretrained(tmp_path).eval()(**inputs)
                for name, value in expected.items():
                    torch.testing.assert_close(actual[name], value, rtol=0, atol=0)

    def test_a_model_built_from_its_config_is_initialised(self, model):
        fresh = SamClipModel(model.config)
        for name, parameter in fresh.named_parameters():
            assert parameter.isfinite().all(), name
        assert fresh.clip_head.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.2)

    def test_unfit_configs_are_refused(self):
        with pytest.raises(Exception, match="pooling"):
            SamClipConfig(clip_head_config={"pooling": "median"})
        with pytest.raises(Exception, match="composition_points must be 1 or more"):
            SamClipConfig(composition_points=0)
        with pytest.raises(Exception, match="must share image_size and patch_size"):
            SamClipConfig(vision_config=SamVisionConfig(image_size=512))

    def test_another_kind_of_checkpoint_is_refused(self, sam, clip, tmp_path):
        for teacher in (sam, clip):
            teacher.save_pretrained(tmp_path / teacher.config.model_type)
            with pytest.raises(ValueError, match=r"holds a model of type '(sam|clip)', not a SAM-CLIP.*from_teachers"):
                SamClipModel.from_pretrained(tmp_path / teacher.config.model_type)


class TestVisionModel:
    @pytest.fixture
    def eye(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        return SamClipVisionModel.from_pretrained(tmp_path).eval()

    @pytest.mark.parametrize("vocabulary", [[], [0, 1, 1]])
    def test_takes_its_part_of_a_checkpoint_without_a_complaint(self, model, vocabulary, tmp_path, complaints):
        state = model.state_dict()
        config = SamClipConfig.from_dict(model.config.to_dict() | {"vocabulary_label_ids": vocabulary})
        model = SamClipForImageSegmentation(config).eval()
        model.load_state_dict(state, strict=False)
        model.bfloat16().save_pretrained(tmp_path)
        eye, info = SamClipVisionModel.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values()) and not complaints.records
        assert eye.dtype == torch.bfloat16 and eye.config.vision_config.image_size == 64
        expected = model.state_dict()
        for name, weight in eye.state_dict().items():
            assert torch.equal(weight, expected[name])
        assert not any(name.startswith("vision_encoder.neck") for name in eye.state_dict())

    @pytest.mark.parametrize("size", [(64, 64), (40, 96), (120, 24)])
    def test_sees_as_the_whole_model_at_any_size(self, eye, model, size):
        pixel_values = random_images(2, *size)
        sizes = torch.tensor([[size[0], 17], [20, size[1]]])
        with torch.no_grad():
            for inputs in ({}, {"reshaped_input_sizes": sizes}):
                actual = eye(pixel_values, **inputs)
                expected = model.get_image_features(pixel_values, **inputs)
                assert actual.last_hidden_state.shape == (2, size[0] * size[1] // 64, 32)
                assert actual.pooler_output.shape == (2, 20)
                assert torch.equal(actual.last_hidden_state, expected.last_hidden_state)
                assert torch.equal(actual.pooler_output, expected.pooler_output)

    def test_hidden_states_go_on_from_the_encoder_through_the_head(self, eye, model):
        pixel_values = random_images(2, 40, 64)
        eye.set_attn_implementation("eager")
        model.set_attn_implementation("eager")
        with torch.no_grad():
            outputs = eye(pixel_values, output_hidden_states=True, output_attentions=True)
            encoder = model.vision_encoder(pixel_values, output_hidden_states=True, output_attentions=True)
            expected = [*encoder.hidden_states]
            for layer in model.clip_head.layers:
                expected.append(layer(expected[-1]))
        assert len(expected) == len(outputs.hidden_states) == eye.config.num_hidden_layers + 1 == 7
        for actual, tokens in zip(outputs.hidden_states, expected, strict=True):
            assert_same(actual, tokens.flatten(1, 2))
        assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)
        assert len(outputs.attentions) == 6
        for actual, weights in zip(outputs.attentions, encoder.attentions, strict=False):
            assert_same(actual, weights)
        assert outputs.attentions[-1].shape == (2 * 2, 40, 40)

    def test_other_ways_to_ask(self, eye):
        pixel_values = random_images()
        with torch.no_grad():
            expected = eye(pixel_values)
            last, pooled = eye(pixel_values, return_dict=False)
            assert torch.equal(last, expected.last_hidden_state) and torch.equal(pooled, expected.pooler_output)
            assert expected.hidden_states is None
            eye.config.output_hidden_states = True
            assert len(eye(pixel_values).hidden_states) == 7

    def test_save_and_load_through_the_auto_classes(self, eye, tmp_path):
        eye.save_pretrained(tmp_path / "eye")
        config = AutoConfig.from_pretrained(tmp_path / "eye")
        assert isinstance(config, SamClipVisionConfig)
        assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (32, 6, 2)
        assert (config.image_size, config.patch_size, config.num_channels) == (64, 8, 3)
        loaded = AutoModel.from_pretrained(tmp_path / "eye").eval()
        assert isinstance(loaded, SamClipVisionModel)
        with torch.no_grad():
            assert torch.equal(loaded(random_images()).pooler_output, eye(random_images()).pooler_output)
        fresh = AutoModel.from_config(config)
        assert all(parameter.isfinite().all() for parameter in fresh.parameters())
        assert fresh.clip_head.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.2)

    def test_what_it_cannot_read_is_refused(self, eye, clip, tmp_path):
        with pytest.raises(ValueError, match="specify pixel_values"):
            eye()
        with pytest.raises(ValueError, match=r"63 x 64.*multiples of the patch size, 8"):
            eye(random_images(1, 63, 64))
        clip.save_pretrained(tmp_path / "clip")
        with pytest.raises(ValueError, match="holds a model of type 'clip', not a SAM-CLIP"):
            SamClipVisionModel.from_pretrained(tmp_path / "clip")


class TestInLlava:
    def llava(self, eye_config, vision_feature_layer=-1):
        text_config = LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
        config = LlavaConfig(
            vision_config=eye_config,
            text_config=text_config,
            image_token_index=49,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy="full",
        )
        return randomise(LlavaForConditionalGeneration(config))

    @pytest.fixture
    def eye(self, model):
        eye = SamClipVisionModel(
            SamClipVisionConfig(
                vision_config=model.config.vision_config, clip_head_config=model.config.clip_head_config
            )
        )
        return randomise(eye)

    @pytest.mark.parametrize("size", [(64, 64), (24, 80)])
    def test_reads_learns_and_writes(self, eye, size):
        llava = self.llava(eye.config).train()
        pixel_values = random_images(2, *size)
        input_ids = torch.tensor([[1] + [49] * (size[0] * size[1] // 64) + [5, 6, 7]] * 2)
        with torch.no_grad():
            logits = [llava(input_ids=input_ids, pixel_values=p).logits[:, -1] for p in (pixel_values, -pixel_values)]
        assert not torch.allclose(*logits, atol=1e-3)  # it looks

        llava(input_ids=input_ids, pixel_values=pixel_values, labels=input_ids).loss.backward()
        tower = llava.model.vision_tower
        blind = {name for name, p in tower.named_parameters() if p.grad is None or not p.grad.any()}
        # Not in the way of the patches: what makes one embedding of them.
        assert {name.rsplit(".", 1)[0] for name in blind} == {
            "clip_head.layer_norm",
            "clip_head.mlp.fc1",
            "clip_head.mlp.fc2",
            "clip_head.mlp.fc3",
        }
        written = llava.eval().generate(
            input_ids=input_ids, pixel_values=pixel_values, max_new_tokens=3, min_new_tokens=3, do_sample=False
        )
        assert written.shape == (2, input_ids.shape[1] + 3)

    @pytest.mark.parametrize("layer", [-1, -2, 3, [-1, 0]])
    def test_sees_the_layers_it_is_told_to(self, eye, layer):
        llava = self.llava(eye.config, layer)
        llava.model.vision_tower.load_state_dict(eye.state_dict())
        pixel_values = random_images(2, 40, 64)
        with torch.no_grad():
            hidden_states = eye(pixel_values, output_hidden_states=True).hidden_states
            chosen = torch.cat([hidden_states[index] for index in (layer if isinstance(layer, list) else [layer])], -1)
            features = llava.get_image_features(pixel_values).pooler_output
            assert_same(torch.stack(list(features)), llava.model.multi_modal_projector(chosen))

    def test_saves_and_loads_with_it(self, eye, tmp_path, complaints):
        llava = self.llava(eye.config)
        llava.save_pretrained(tmp_path)
        loaded, info = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values()) and not complaints.records
        assert isinstance(loaded.model.vision_tower, SamClipVisionModel)
        input_ids = torch.tensor([[1] + [49] * 64 + [5, 6, 7]] * 2)
        with torch.no_grad():
            expected, actual = (m.eval()(input_ids=input_ids, pixel_values=random_images()) for m in (llava, loaded))
        assert torch.equal(actual.logits, expected.logits)


class WordTokenizer:
    """Numbers words by their order of appearance."""

    def __init__(self):
        self.ids = {}

    def __call__(self, texts, **_):
        rows = [[48, *(self.ids.setdefault(word, len(self.ids) + 1) for word in text.split()), 49] for text in texts]
        length = max(map(len, rows))
        return BatchEncoding(
            {
                "input_ids": torch.tensor([row + [0] * (length - len(row)) for row in rows]),
                "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows]),
            }
        )


class TestImageSegmentation:
    @pytest.fixture
    def segmenter(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        segmenter = SamClipForImageSegmentation.from_pretrained(tmp_path).eval()
        tokenizer = WordTokenizer()
        return segmenter.set_vocabulary(
            ["cat", ["sofa", "couch"], "tree"], ["a wall", "sky"], ["a {}", "one {}"], tokenizer
        )

    def test_vocabulary_is_the_mean_over_templates_and_the_best_synonym(self, segmenter, model):
        assert segmenter.config.id2label == {0: "background", 1: "cat", 2: "sofa", 3: "tree"}
        tokenizer = WordTokenizer()
        names = [["a wall"], ["sky"], *([f"a {n}", f"one {n}"] for n in ("cat", "sofa", "couch", "tree"))]
        ordered = [f"{t} {n}" for n in ("cat", "sofa", "couch", "tree") for t in ("a", "one")]
        tokenizer(["a wall", "sky", *ordered])  # the same order of appearance
        embeds = []
        with torch.no_grad():
            for texts in names:
                features = [model.get_text_features(tokenizer([t]).input_ids).pooler_output[0] for t in texts]
                embeds.append(F.normalize(torch.stack([F.normalize(f, dim=0) for f in features]).mean(0), dim=0))
            dense = model(random_images()).dense_embeds
            similarity = torch.einsum("bdhw,nd->bnhw", dense, torch.stack(embeds)) * model.logit_scale.exp()
            best = [similarity[:, :2].amax(1), similarity[:, 2], similarity[:, 3:5].amax(1), similarity[:, 5]]
            logits = segmenter(random_images(), both_heads=False).logits
        assert_same(logits, torch.stack(best, dim=1))

    @pytest.mark.parametrize("composition", ["segments", "classes"])
    @pytest.mark.parametrize("sizes", [None, torch.tensor([[64, 40], [51, 64]])])
    def test_an_encoded_image_is_segmented_without_being_encoded_again(
        self, segmenter, monkeypatch, composition, sizes
    ):
        segmenter.config.composition = composition
        images = random_images()
        with torch.no_grad():
            vision_embeds = segmenter.vision_encoder(images)
            expected = segmenter(images, reshaped_input_sizes=sizes)
            monkeypatch.setattr(segmenter.vision_encoder, "encode", None)
            outputs = segmenter(vision_embeds=vision_embeds, reshaped_input_sizes=sizes)
        assert outputs.keys() == expected.keys()
        for name, value in expected.items():
            assert outputs[name].equal(value), name

    def test_synonyms_can_be_averaged(self, segmenter, model):
        tokenizer = WordTokenizer()
        vocabulary = segmenter.embed_vocabulary([["sofa", "couch"], "tree"], (), ["a {}", "{}"], tokenizer, "mean")
        texts = ["a sofa", "sofa", "a couch", "couch"]
        with torch.no_grad():
            features = [model.get_text_features(tokenizer([text]).input_ids).pooler_output[0] for text in texts]
        mean = torch.stack([F.normalize(feature, dim=0) for feature in features]).mean(dim=0)
        assert vocabulary.label_ids == [0, 1] and vocabulary.id2label == {0: "sofa", 1: "tree"}
        assert_same(vocabulary.class_embeds[0], F.normalize(mean, dim=0))

    def test_names_and_thresholds_may_be_numpys(self, segmenter):
        tokenizer = WordTokenizer()
        plain = segmenter.embed_vocabulary(["cat", "sofa"], 0.5, tokenizer=tokenizer)
        numpys = segmenter.embed_vocabulary(np.array(["cat", "sofa"]), np.float32(0.5), tokenizer=tokenizer)
        assert numpys.id2label == plain.id2label and numpys.background_threshold == 0.5
        assert torch.equal(numpys.class_embeds, plain.class_embeds)

    def test_a_threshold_makes_background_of_what_no_class_is_as_probable_for(self, segmenter):
        tokenizer = WordTokenizer()
        segmenter.logit_scale.data.fill_(3.0)
        plain = segmenter.embed_vocabulary(["cat", "sofa", "tree"], tokenizer=tokenizer)
        thresholded = segmenter.embed_vocabulary(["cat", "sofa", "tree"], 0.5, tokenizer=tokenizer)
        assert thresholded.id2label == {0: "background"} | {k + 1: v for k, v in plain.id2label.items()}
        embeds = F.normalize(torch.randn(500, 20), dim=-1)
        with torch.no_grad():
            probability, label = segmenter.classify(embeds, plain).softmax(dim=-1).max(dim=-1)
            expected = torch.where(probability > 0.5, label + 1, 0)
            highest, actual = segmenter.classify(embeds, thresholded).softmax(dim=-1).max(dim=-1)
            assert torch.equal(actual, expected)
            # What is something has the probability that it has among the classes.
            torch.testing.assert_close(highest[expected > 0], probability[expected > 0])
        assert 0 < expected.count_nonzero() < 500

    @pytest.mark.parametrize("composition", ["segments", "classes"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_segments(self, segmenter, composition, dtype):
        segmenter.config.composition = composition
        segmenter.config.background_label_id = None  # something everywhere
        segmenter.logit_scale.data.fill_(6.0)  # names that are certain: their probability rounds to 1
        with torch.no_grad():
            outputs = segmenter.to(dtype)(random_images())
        assert (outputs.segment_scores > 0).any() or composition == "segments"  # which random weights do not find
        assert outputs.segment_masks.isfinite().all()

    def test_a_vocabulary_of_one_call_leaves_the_checkpoints_own(self, segmenter):
        vocabulary = segmenter.embed_vocabulary(["dog", "bird"], tokenizer=WordTokenizer())
        with torch.no_grad():
            before = segmenter(random_images())
            other = segmenter(random_images(), vocabulary=vocabulary)
            after = segmenter(random_images())
        assert other.logits.shape[1] == 2 and other.background_label_ids.tolist() == [-1, -1]
        assert_same(after.logits, before.logits)
        assert before.background_label_ids.tolist() == [0, 0]

    def test_many_texts_are_embedded_in_batches(self, segmenter, monkeypatch):
        expected = segmenter.embed_vocabulary(list("abcdefgh"), tokenizer=WordTokenizer()).class_embeds
        sizes, features = [], segmenter.get_text_features
        monkeypatch.setattr(segmentation_samclip, "TEXTS_PER_BATCH", 3)
        monkeypatch.setattr(
            segmenter,
            "get_text_features",
            lambda input_ids, **kw: sizes.append(len(input_ids)) or features(input_ids, **kw),
        )
        assert_same(segmenter.embed_vocabulary(list("abcdefgh"), tokenizer=WordTokenizer()).class_embeds, expected)
        assert sizes == [3, 3, 2]

    def test_without_its_text_tower_it_segments_as_before(self, segmenter, model, tmp_path):
        with torch.no_grad():
            expected = segmenter(random_images()).segment_logits
            segmenter.drop_text_tower().save_pretrained(tmp_path)
            loaded = SamClipForImageSegmentation.from_pretrained(tmp_path).eval()
            assert_same(loaded(random_images()).segment_logits, expected)
        assert not any(name.startswith("text_") for name in loaded.state_dict())
        with pytest.raises(ValueError, match="no text tower"):
            loaded.set_vocabulary(["dog"], tokenizer=WordTokenizer())
        with pytest.raises(ValueError, match="No vocabulary"):  # nothing would be left to segment by
            SamClipForImageSegmentation(model.config).drop_text_tower()

    def test_vocabulary_survives_saving(self, segmenter, tmp_path):
        segmenter.save_pretrained(tmp_path / "saved")
        loaded = AutoModelForImageSegmentation.from_pretrained(tmp_path / "saved").eval()
        assert loaded.config.id2label == segmenter.config.id2label
        with torch.no_grad():
            expected = segmenter(random_images()).segment_logits
            assert_same(loaded(random_images()).segment_logits, expected)
            # Training loads and saves the model without the segmentation head: the vocabulary stays.
            SamClipModel.from_pretrained(tmp_path / "saved").save_pretrained(tmp_path / "trained")
            trained = SamClipForImageSegmentation.from_pretrained(tmp_path / "trained").eval()
            assert_same(trained(random_images()).segment_logits, expected)

    def test_both_heads_take_one_encoder_pass(self, segmenter):
        calls = []
        segmenter.vision_encoder.register_forward_hook(lambda *_: calls.append("encoder"))
        with torch.no_grad():
            outputs = segmenter(random_images(2, 48, 64), reshaped_input_sizes=[[48, 32], [20, 64]])
        assert calls == ["encoder"]
        assert outputs.logits.shape == (2, 4, 6, 8)
        assert outputs.segment_masks.shape == (2, 16, 24, 32)
        assert outputs.segment_logits.shape == (2, 16, 4)
        assert outputs.segment_scores.shape == (2, 16)
        assert outputs.content_sizes.tolist() == [[6, 4], [2.5, 8]]

    def test_nothing_is_asked_of_the_sam_head_where_there_is_only_padding(self, segmenter, monkeypatch):
        asked = []
        predict_masks = segmenter.predict_masks
        monkeypatch.setattr(
            segmenter,
            "predict_masks",
            lambda e, input_points: asked.append(input_points) or predict_masks(e, input_points),
        )
        segmenter.config.background_label_id = None  # something everywhere
        with torch.no_grad():
            segmenter(random_images(2), reshaped_input_sizes=[[64, 24], [40, 64]])
        x, y = torch.cat(asked, dim=1).unbind(-1)
        assert x[0].max() < 24 <= x[1].max() and y[1].max() < 40 <= y[0].max()

    @pytest.fixture
    def compose(self, segmenter, monkeypatch):
        """Composition of given patch tokens and points' masks `(num_points, 32, 32)` or `(num_points, 3, 32, 32)`, on
        an 8 x 8 grid that holds something everywhere."""

        def compose(patch_tokens, masks, content_mask=None):
            masks = masks[:, None] if masks.ndim == 3 else masks
            scores = torch.linspace(0.9, 0.8, masks[..., 0, 0].numel()).view(masks.shape[:2])
            answers = zip(masks, scores, strict=True)

            def predict_masks(_, input_points):  # of the points asked for, which come in turn
                chunk = list(islice(answers, input_points.shape[1]))
                return tuple(torch.stack(part)[None] for part in zip(*chunk, strict=True))

            monkeypatch.setattr(segmenter, "predict_masks", predict_masks)
            segmenter.config.composition_points = len(masks)
            logits = torch.zeros(1, 4, 8, 8)
            with torch.no_grad():
                segments = segmenter.compose_heads(
                    torch.zeros(1, 16, 8, 8), patch_tokens, logits, segmenter.vocabulary, content_mask
                )
            return {name: value[0] for name, value in segments.items()}

        return compose

    def test_a_segment_of_everything_is_named_as_the_image_is(self, segmenter, compose):
        with torch.no_grad():
            patch_tokens = segmenter.vision_encoder(random_images(1)).patch_tokens
            image_embeds = segmenter.clip_head.pool(segmenter.clip_head(patch_tokens))
            expected = segmenter.classify(F.normalize(image_embeds, dim=-1), segmenter.vocabulary)[0]
        segments = compose(patch_tokens, torch.full((1, 32, 32), 20.0))
        assert_same(segments["segment_logits"][0], expected)
        assert segments["segment_scores"].tolist() == pytest.approx([0.9])

    def test_what_stands_beside_a_segment_does_not_change_its_name(self, segmenter, compose):
        left = torch.full((32, 32), -20.0)
        left[:, :16] = 20.0
        tokens = torch.randn(1, 8, 8, 32)
        changed = tokens.clone()
        changed[:, :, 4:] = torch.randn(1, 8, 4, 32)
        first, second = (compose(t, torch.stack([left, -left]))["segment_logits"] for t in (tokens, changed))
        assert_same(second[0], first[0])
        assert not torch.allclose(second[1], first[1], atol=1e-2)  # while what changed is seen to
        with torch.no_grad():  # attending everywhere, the left patches would have noticed
            free = [segmenter.clip_head(t)[:, :, :4] for t in (tokens, changed)]
        assert not torch.allclose(free[0], free[1], atol=1e-2)

    def test_padding_inside_a_segment_does_not_change_its_name(self, compose):
        content_mask = torch.ones(1, 8, 8, dtype=torch.bool)
        content_mask[:, :, 4:] = False
        tokens = torch.randn(1, 8, 8, 32)
        changed = tokens.clone()
        changed[:, :, 4:] = torch.randn(1, 8, 4, 32)
        everything = torch.full((1, 32, 32), 20.0)
        padded = [compose(t, everything, content_mask)["segment_logits"] for t in (tokens, changed)]
        assert_same(padded[1], padded[0])
        shown = [compose(t, everything)["segment_logits"] for t in (tokens, changed)]
        assert not torch.allclose(shown[1], shown[0], atol=1e-2)  # as pictures, those patches matter

    def test_the_steadier_of_a_points_masks_is_kept(self, compose):
        left = torch.full((32, 32), -20.0)
        left[:, :16] = 20.0
        unsure = torch.full((32, 32), 0.5)  # of the highest score, but nothing of it is left above 1
        segments = compose(torch.randn(1, 8, 8, 32), torch.stack([unsure, left, -left])[None])
        assert torch.equal(segments["segment_masks"][0], left)
        assert segments["segment_scores"].tolist() == pytest.approx([0.85])  # the second of 0.9, 0.85, 0.8

    def test_a_repeated_mask_is_no_segment(self, compose):
        left = torch.full((32, 32), -20.0)
        left[:, :16] = 20.0
        segments = compose(torch.randn(1, 8, 8, 32), torch.stack([left, left, -left]))
        assert [score > 0 for score in segments["segment_scores"].tolist()] == [True, False, True]

    def test_composed_by_class_each_class_is_prompted_by_its_own_patches(self, segmenter, monkeypatch):
        logits = torch.zeros(3, 4, 8, 8)
        logits[0, 0], logits[2, 0] = 9.0, 9.0  # background, in the first and the last image with two classes each
        for image, label, row in ((0, 1, 2), (0, 3, 6), (2, 2, 0), (2, 3, 3)):
            logits[image, label, row] = 20.0
        embeddings = torch.randn(3, 16, 8, 8)
        monkeypatch.setattr(segmentation_samclip, "CLASSES_PER_CHUNK", 3)  # several chunks, one across images
        asked, predict_masks = [], segmenter.predict_masks
        monkeypatch.setattr(segmenter, "predict_masks", lambda e, **kw: asked.append(kw) or predict_masks(e, **kw))
        with torch.no_grad():
            segments = segmenter.compose_heads_by_class(embeddings, logits, segmenter.vocabulary)
            assert segments["segment_logits"].argmax(dim=-1)[[0, 2]].tolist() == [[1, 3], [2, 3]]
            assert segments["segment_scores"].tolist() == [[1, 1], [0, 0], [1, 1]]
            points = torch.cat([kw["input_points"] for kw in asked])
            masks = torch.cat([kw["input_masks"] for kw in asked])
            assert points.shape == (4, 1, 3, 2)
            for pair, (image, row) in enumerate(((0, 2), (0, 6), (2, 0), (2, 3))):
                assert (points[pair, ..., 1] == row * 8 + 3.5).all()
                assert (masks[pair, 0, 4 * row + 1 : 4 * row + 3] > 0).all() and masks[pair].mean() < 0
                expected, _ = predict_masks(
                    embeddings[image : image + 1],
                    input_points=points[pair : pair + 1],
                    input_masks=masks[pair : pair + 1],
                    multimask_output=False,
                )
                assert_same(segments["segment_masks"][image, pair % 2], expected[0, 0, 0])
            nothing = segmenter.compose_heads_by_class(embeddings[1:2], logits[1:2], segmenter.vocabulary)
            assert not nothing["segment_scores"].any()

    def test_composed_by_class_the_whole_model_runs(self, segmenter):
        segmenter.config.composition = "classes"
        segmenter.set_vocabulary(["cat", "sofa", "tree"], tokenizer=WordTokenizer())
        segmenter.logit_scale.data.fill_(9.0)  # and no background: some class is found everywhere
        with torch.no_grad():
            outputs = segmenter(random_images(2, 48, 64), reshaped_input_sizes=[[48, 32], [20, 64]])
        assert outputs.segment_scores.any()
        assert outputs.segment_masks.shape[2:] == (24, 32)

    def test_stability_is_the_iou_of_two_thresholds(self):
        masks = torch.tensor([[[5.0, 0.5], [-0.5, -5.0]], [[5.0, 5.0], [-5.0, -5.0]], [[-5.0] * 2] * 2])
        assert _stability(masks).tolist() == pytest.approx([1 / 3, 1, 0])

    def test_patches_belong_to_the_best_mask_that_claims_them(self):
        masks = torch.full((4, 8, 8), -1.0)
        masks[0, :4, :4] = 1  # the best
        masks[1, :4, :8] = 1  # as much again beside it
        masks[2, :2, :2] = 1  # inside the best: nothing is left
        masks[3, 7, 7] = 1  # a quarter of a patch, the fullest it has
        expected = torch.zeros(4, 4, 4, dtype=torch.bool)
        expected[0, :2, :2] = expected[1, :2, 2:] = expected[3, 3, 3] = True
        assert torch.equal(_segments(masks, (4, 4)), expected)

    def test_masks_that_are_empty_or_repeat_a_better_one_are_left_out(self):
        masks = torch.full((5, 10, 10), -1.0)
        masks[0, :, :5] = 1
        masks[1, :, :6] = 1  # IoU 5 / 6 with the first, and better
        masks[2, :, 5:] = 1  # IoU 1 / 10 with the second
        masks[4, :, :2] = 1  # IoU 1 / 3
        assert _distinct_masks(masks, torch.tensor([0.7, 0.9, 0.8, 1.0, 0.1]), max_overlap=0.6) == [1, 2, 4]

    def test_points_spread_over_the_marked_cells_alone(self):
        cells = torch.rand(6, 5, 7, generator=torch.Generator().manual_seed(0)) > 0.5
        cells[0] = False
        cells[0, 2, 3] = True
        points = _spread_points(cells, 8)
        for image, (x, y) in zip(cells, points.transpose(1, 2), strict=True):
            assert image[y, x].all()
            assert len(set(zip(x.tolist(), y.tolist(), strict=True))) == min(8, int(image.sum()))

    def test_a_text_of_the_vocabulary_has_its_own_probability_as_an_object(self, segmenter, tmp_path, monkeypatch):
        left = torch.full((32, 32), -20.0)
        left[:, :16] = 20.0
        masks = torch.stack([left, -left])[None, :, None].expand(2, -1, -1, -1, -1)
        monkeypatch.setattr(SamClipModel, "predict_masks", lambda *_, **__: (masks, torch.full((2, 2, 1), 0.9)))
        segmenter.config.composition_points = 2
        tokenizer = WordTokenizer()
        segmenter.set_vocabulary(["cat", "sofa", "tree"], templates=["{}"], tokenizer=tokenizer)
        segmenter.save_pretrained(tmp_path)
        detector = AutoModelForZeroShotObjectDetection.from_pretrained(tmp_path).eval()
        with torch.no_grad():
            expected = segmenter(random_images(2)).segment_logits.softmax(dim=-1)
            outputs = detector(random_images(2), **tokenizer(["tree", "cat"]))
        assert_same(outputs.object_scores, torch.stack([expected[0, :, 2], expected[1, :, 0]]))
        with pytest.raises(ValueError, match="one text for each image; got 1 for 2"):
            detector(random_images(2), **tokenizer(["tree"]))
        detector.config.composition = "classes"
        with pytest.raises(ValueError, match="composition="):
            detector(random_images(1), **tokenizer(["tree"]))

    def test_unusable_vocabularies_are_refused(self, segmenter, model, tmp_path):
        tokenizer = WordTokenizer()
        for labels, message in (
            ([], "at least one name"),
            ("cat", "at least one name"),
            (["cat", " "], "no name empty"),
            ([[]], "no name empty"),
            (["cat", ["dog", "cat"]], "more than once"),
            (["cat " * 20], "16 tokens at most"),
        ):
            with pytest.raises(ValueError, match=message):
                segmenter.set_vocabulary(labels, tokenizer=tokenizer)
        with pytest.raises(ValueError, match="background must be a list"):
            segmenter.set_vocabulary(["cat"], background="a wall", tokenizer=tokenizer)
        with pytest.raises(ValueError, match="a probability between 0 and 1, got"):
            segmenter.set_vocabulary(["cat"], background=1.5, tokenizer=tokenizer)
        with pytest.raises(ValueError, match="synonyms must be"):
            segmenter.set_vocabulary(["cat"], synonyms="min", tokenizer=tokenizer)
        with pytest.raises(ValueError, match=r"give the class .background. another name"):
            segmenter.set_vocabulary(["cat", "background"], background=["a wall"], tokenizer=tokenizer)
        with pytest.raises(ValueError, match="takes no labels"):
            segmenter(random_images(), labels=torch.zeros(2, 64, 64))
        with pytest.raises(ValueError, match="takes no input_ids, input_points"):
            segmenter(random_images(), input_points=random_points(), input_ids=INPUT_IDS)
        with pytest.raises(ValueError, match=r"contain \{\}"):
            segmenter.set_vocabulary(["cat"], templates=["a photo"], tokenizer=tokenizer)
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"call model\.set_vocabulary"):
            SamClipForImageSegmentation.from_pretrained(tmp_path)(random_images())
        with pytest.raises(ValueError, match="give its tokenizer"):
            SamClipForImageSegmentation(model.config).set_vocabulary(["cat"])


def test_gradients_reach_every_part_that_the_losses_touch(sam, clip):
    model = randomise(SamClipModel.from_teachers(sam, clip)).train()
    outputs = model(random_images(), input_points=random_points(), input_ids=INPUT_IDS)
    (outputs.pred_masks.mean() + outputs.iou_scores.mean() + outputs.logits_per_image.mean()).backward()
    without = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is None}
    assert without <= {"prompt_encoder"}  # its mask branch and box corners were not asked


def test_other_teachers_build_too():
    assert isinstance(tiny_clip(12), CLIPModel) and isinstance(tiny_sam(96, 16), SamModel)
    model = SamClipModel.from_teachers(tiny_sam(96, 16), tiny_clip(12), {"num_hidden_layers": 1, "mlp_hidden_size": 8})
    with torch.no_grad():
        assert model(random_images(1, 96, 96)).image_embeds.shape == (1, 12)
