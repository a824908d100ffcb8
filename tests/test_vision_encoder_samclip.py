"""The image encoder against SAM's, and its attention against an explicit bias."""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, SamModel, SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionLayer

from samclip_hf import SamClipModel, SamClipVisionModel, vision_encoder_samclip
from samclip_hf.vision_encoder_samclip import SamClipPatchGroups, SamClipVisionAttention, SamClipVisionLayer

from .conftest import INPUT_IDS, assert_same, random_images, random_points, randomize, tiny_sam


def explicit_scores(attention, hidden_states):
    """Attention scores `(batch, heads, length, length)` with the bias of every pair added in a loop, and the values
    `(batch, length, heads, head_dim)`."""
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


@pytest.mark.parametrize("size", [2, 5, 14, 28, 55, 64, 80])
def test_every_row_of_the_relative_positions_has_a_gradient_at_every_size(size):
    attention = SamClipVisionAttention(SamVisionConfig(hidden_size=4, num_attention_heads=1), window_size=0)
    table = torch.nn.init.normal_(attention.rel_pos_h)
    rows = attention.get_rel_pos(size, table)
    with torch.no_grad():  # outputs are equal with and without gradients, and not antialiased
        assert torch.equal(rows, attention.get_rel_pos(size, table))
        linear = F.interpolate(table.T[None], size=2 * size - 1, mode="linear")[0].T
        position = torch.arange(size)
        assert torch.equal(rows, linear[position[:, None] - position + size - 1])
    rows.sum().backward()
    assert (table.grad > 0).all()
    torch.testing.assert_close(table.grad.sum(), torch.tensor(4.0 * size**2))  # nothing is lost


def test_at_the_trained_size_the_gradient_is_exact():
    attention = SamClipVisionAttention(SamVisionConfig(hidden_size=4, num_attention_heads=1, image_size=80), 0)
    table = torch.nn.init.normal_(attention.rel_pos_h)
    weights = torch.randn(5, 5, 4)
    (attention.get_rel_pos(5, table) * weights).sum().backward()
    expected = torch.zeros(9, 4)
    for row in range(5):
        for column in range(5):
            expected[row - column + 4] += weights[row, column]
    torch.testing.assert_close(table.grad, expected)


def brute_force(attention, hidden_states, visible=True):
    """Attention weights under the mask `visible`, and the output of the attention."""
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
        return randomize(SamClipVisionAttention(config, window_size=0), std=0.5)

    @pytest.mark.parametrize("grid", [(5, 5), (4, 7), (9, 3)])
    @pytest.mark.parametrize("backend", [*BACKENDS, "eager"])
    @pytest.mark.parametrize("inference", [True, False], ids=["inference", "training"])
    def test_matches_explicit_bias(self, attention, grid, backend, inference, monkeypatch):
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

    @pytest.mark.slow
    def test_flex_attention_matches_explicit_bias(self, attention):
        attention.config._attn_implementation = "flex_attention"
        for grid in [(5, 5), (4, 7)]:  # compiled for each size
            hidden_states = torch.randn(2, *grid, 16)
            with torch.no_grad():  # the CPU kernel has no gradients
                assert_same(attention(hidden_states)[0], brute_force(attention, hidden_states)[1])

    @pytest.mark.slow
    def test_checkpoint_loads_with_any_attention(self, model, tmp_path, caplog):
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
    def test_patches_attend_within_their_group(self, attention, chunk, monkeypatch):
        monkeypatch.setattr(vision_encoder_samclip, "BIAS_CHUNK", chunk)
        hidden_states = torch.randn(1, 4, 7, 16)
        group = torch.randint(0, 3, (28,))
        expected = brute_force(attention, hidden_states, group[:, None] == group)[1].view(28, 16)
        order = group.argsort()
        groups = SamClipPatchGroups(order // 7, order % 7, (4, 7), group.bincount().tolist())
        with torch.no_grad():
            assert_same(attention(hidden_states.view(28, 16)[order], groups)[0], expected[order])

    @pytest.mark.parametrize("grid", [(3, 3), (4, 7), (6, 2)])
    def test_windows_match_sam_with_padding_after_the_projection(self, attention, grid):
        config = attention.config
        sams = randomize(SamVisionLayer(config, window_size=3), std=0.3)
        ours = SamClipVisionLayer(config, window_size=3).eval()
        ours.load_state_dict(sams.state_dict())
        hidden_states = torch.randn(2, *grid, 16)
        assert_same(ours(hidden_states), sams(hidden_states))

    def test_stores_no_tensor_of_the_size_of_the_bias(self):
        config = SamVisionConfig(hidden_size=16, num_attention_heads=2, image_size=320, patch_size=8)
        attention = SamClipVisionAttention(config, window_size=0)
        length = 40 * 40
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            attention(torch.randn(1, 40, 40, 16))
        assert max(saved) < length * length / 5  # the bias of one head alone has length * length values


def count_calls(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """A custom attention function: plain attention, which knows nothing of relative positions."""
    count_calls.calls += 1
    assert attention_mask is None
    weights = (query @ key.transpose(-2, -1) * scaling).softmax(dim=-1)
    return (weights @ value).transpose(1, 2), weights


class TestAttentionImplementations:
    @pytest.fixture(params=["count_calls", "sdpa", "eager", "flex_attention"])
    def custom(self, request, monkeypatch):
        """The name of a registered function: a new one, or one that is replaced."""
        monkeypatch.setattr(AttentionInterface, "_global_mapping", dict(AttentionInterface._global_mapping))
        AttentionInterface.register(request.param, count_calls)
        count_calls.calls = 0
        return request.param

    @staticmethod
    def implementations(model):
        own = {"": model.config._attn_implementation}
        parts = {name: getattr(model.config, name) for name in model.config.sub_configs}
        return own | {name: part._attn_implementation for name, part in parts.items() if part is not None}

    def test_string_sets_every_part_without_a_warning(self, model, transformers_log):
        model.set_attn_implementation("eager")
        assert set(self.implementations(model).values()) == {"eager"}
        model.set_attn_implementation({"clip_head_config": None, "text_config": None})
        assert model.config.clip_head_config._attn_implementation == "sdpa"
        assert model.text_model.config._attn_implementation == "sdpa"
        model.set_attn_implementation(None)
        assert set(self.implementations(model).values()) == {"sdpa"}
        assert not transformers_log.records

    @pytest.mark.parametrize("name", ["vision_config", "clip_head_config", "mask_decoder_config", "text_config"])
    def test_dict_sets_one_part_without_a_warning(self, model, name, transformers_log):
        model.set_attn_implementation({name: "eager"})
        implementations = self.implementations(model)
        assert implementations.pop(name) == "eager" and set(implementations.values()) == {"sdpa"}
        assert not transformers_log.records

    def test_dict_is_kept_when_loading(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        requested = {"mask_decoder_config": "eager", "clip_head_config": "eager"}
        loaded = SamClipModel.from_pretrained(tmp_path, attn_implementation=requested)
        implementations = self.implementations(loaded)
        assert {name for name, value in implementations.items() if value == "eager"} == requested.keys()

    def test_clip_head_can_attend_in_another_way_than_the_encoder(self, model):
        with torch.no_grad():
            expected = model(random_images()).dense_embeds
            model.set_attn_implementation({"clip_head_config": "eager"})
            tokens = model.vision_encoder(random_images()).patch_tokens
            assert model.vision_encoder.layers[0].attn(tokens)[1] is None
            assert model.clip_head.layers[0].attn(tokens)[1] is not None
            assert_same(model(random_images()).dense_embeds, expected)

    @pytest.mark.parametrize("requested", ["fast", {"vision_config": "fast"}, {"clip_head_config": "fast"}])
    def test_unknown_implementation_raises_and_changes_nothing(self, model, requested):
        with pytest.raises(
            ValueError, match=r'attn_implementation="fast". is not supported: it is unknown. SamClip\w+ supports'
        ):
            model.set_attn_implementation(requested)
        assert set(self.implementations(model).values()) == {"sdpa"}

    def test_unknown_part_raises(self, model):
        with pytest.raises(ValueError, match=r"has no vision\. Keys of attn_implementation are .*vision_config"):
            model.set_attn_implementation({"vision": "eager"})

    @pytest.mark.parametrize("requested", ["paged|eager", "flash_attention_2"])
    def test_attention_that_cannot_have_the_bias_raises(self, model, requested):
        with pytest.raises((ValueError, ImportError), match=r"key-value cache|Flash Attention"):
            model.set_attn_implementation(requested)
        assert set(self.implementations(model).values()) == {"sdpa"}

    def test_implementation_that_is_not_registered_raises_in_forward(self, model):
        model.vision_encoder.config._attn_implementation = "fast"
        with pytest.raises(KeyError, match="fast"):
            model(random_images())

    def test_registered_function_is_used_with_the_bias(self, model, tmp_path, custom):
        segments = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
        segments[:, :, 2:6, 1:7] = True
        other = "sdpa" if custom == "eager" else "eager"
        model.set_attn_implementation(other)
        with torch.no_grad():
            expected = model(random_images(), input_points=random_points(), input_ids=INPUT_IDS)
            tokens = model.vision_encoder(random_images()).patch_tokens
            expected_segments = model.clip_head.pool_segments(tokens, segments)
            model.save_pretrained(tmp_path)
            requested = dict.fromkeys(set(model.config.sub_configs) - {"clip_vision_config"}, other)
            requested |= {"vision_config": custom, "clip_head_config": custom}
            loaded = SamClipModel.from_pretrained(tmp_path, attn_implementation=requested).eval()
            actual = loaded(random_images(), input_points=random_points(), input_ids=INPUT_IDS)
            assert count_calls.calls == 3 + 3  # encoder and CLIP head
            for name in ("pred_masks", "logits_per_image", "dense_embeds"):
                assert_same(actual[name], expected[name])
            assert_same(loaded.clip_head.pool_segments(tokens, segments), expected_segments)
            assert count_calls.calls == 3 + 3 + 3 * 2  # a call for each segment
        tower = SamClipVisionModel.from_pretrained(tmp_path, attn_implementation=custom)
        assert len(tower(random_images(), output_attentions=True).attentions) == 6


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

    @pytest.mark.parametrize("kind", ["points", "boxes", "masks alone"])
    def test_a_mask_for_each_prompt_gives_sams_masks_for_one_prompt_at_a_time(self, sam, model, kind):
        prompts = {"input_masks": 5 * torch.randn(2, 3, 32, 32)}
        if kind == "points":
            prompts |= {"input_points": random_points(), "input_labels": torch.tensor([[[1, 0]] * 3] * 2)}
        elif kind == "boxes":
            prompts["input_boxes"] = torch.tensor([[[3.0, 4, 40, 50], [0, 0, 9, 60], [1, 2, 30, 20]]] * 2)
        with torch.no_grad():
            actual = model(random_images(), **prompts, multimask_output=False)
            for number in range(3):
                one = {name: value[:, number : number + 1] for name, value in prompts.items()}
                expected = sam(random_images(), **one, multimask_output=False)
                assert_same(actual.pred_masks[:, number : number + 1], expected.pred_masks)
                assert_same(actual.iou_scores[:, number : number + 1], expected.iou_scores)

    def test_same_embeddings_without_relative_positions(self, clip):
        sam = tiny_sam(use_rel_pos=False)
        model = SamClipModel.from_teachers(sam, clip).eval()
        for grad in (False, True):  # attention in chunks, attention in one piece
            with torch.set_grad_enabled(grad):
                actual = model.vision_encoder(random_images()).last_hidden_state
                assert_same(actual, sam.vision_encoder(random_images()).last_hidden_state)

    def test_same_attention_weights_with_output_attentions(self, sam, model, tmp_path):
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
        # ViT-B's grid, windows and head width, with two layers and two heads.
        sam = tiny_sam(1024, 16, hidden_size=128, num_hidden_layers=2, window_size=14, global_attn_indexes=[1])
        model = SamClipModel.from_teachers(sam, clip, {"num_hidden_layers": 1}).eval()
        pixel_values = random_images(1, 1024, 1024)
        with torch.no_grad(), sdpa_kernel(backend):
            assert_same(model.get_image_embeddings(pixel_values), sam.get_image_embeddings(pixel_values), 2e-5)

    def test_sam_checkpoint_misses_only_the_clip_weights(self, sam, model, tmp_path):
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
