"""Vocabularies, both compositions of the heads, and object detection."""

import json
from dataclasses import replace
from enum import StrEnum
from itertools import islice

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForImageSegmentation,
    AutoModelForSemanticSegmentation,
    AutoModelForZeroShotObjectDetection,
    BatchEncoding,
)

from samclip_hf import SamClipForImageSegmentation, SamClipModel, segmentation_samclip
from samclip_hf.modeling_samclip import load_complete_model, patches_of_masks
from samclip_hf.segmentation_samclip import (
    _distinct_masks,
    _spread_points,
    _stability,
    apply_background_threshold,
    max_over_synonyms,
)

from .conftest import INPUT_IDS, assert_same, random_images, random_points

LABEL_IDS = torch.tensor([0, 0, 1, 3])


class TestLogitsOfLabels:
    @pytest.mark.parametrize("dim", [0, 1, -1])
    def test_maximum_over_synonyms(self, dim):
        text_logits = torch.tensor([1.0, 5.0, 3.0, -2.0]).view([-1 if d == dim % 3 else 1 for d in range(3)])
        logits = max_over_synonyms(text_logits.expand([4 if d == dim % 3 else 2 for d in range(3)]), LABEL_IDS, 4, dim)
        first = logits.movedim(dim, 0)[:, 0, 0]
        assert logits.shape[dim] == 4 and first[[0, 1, 3]].tolist() == [5, 3, -2]
        assert first.softmax(dim=0)[2] == 0  # a label without texts

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_resized_maps_are_finite(self, dtype):
        logits = max_over_synonyms(torch.randn(1, 4, 3, 3).to(dtype), LABEL_IDS, 4, dim=1)
        for threshold in (None, 0.5):
            if threshold is not None:
                logits = apply_background_threshold(logits, 2, threshold, dim=1)
            resized = F.interpolate(logits, size=(50, 50), mode="bilinear", align_corners=False)
            assert F.interpolate(resized, size=(7, 9), mode="bicubic").isfinite().all()

    def test_background_wins_below_the_threshold(self):
        logits = max_over_synonyms(torch.tensor([[0.0, 0.0, 3.0], [0.0, 0.0, 0.1]]), torch.tensor([1, 2, 3]), 4, dim=1)
        logits = apply_background_threshold(logits, 0, threshold=0.5, dim=1)
        assert logits.argmax(dim=1).tolist() == [3, 0]
        torch.testing.assert_close(logits.softmax(dim=1)[0, 1:], torch.tensor([0.0, 0.0, 3.0]).softmax(dim=0))


class WordTokenizer:
    """Gives each new word the next number."""

    all_special_ids = (48, 49, 0)

    def __init__(self):
        self.ids = {}

    def __call__(self, texts, padding=False, return_tensors=None, verbose=True):
        rows = [[48, *(self.ids.setdefault(word, len(self.ids) + 1) for word in text.split()), 49] for text in texts]
        if return_tensors is None:
            return BatchEncoding({"input_ids": rows})
        length = max(map(len, rows))
        return BatchEncoding(
            {
                "input_ids": torch.tensor([row + [0] * (length - len(row)) for row in rows]),
                "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows]),
            }
        )

    def encode(self, texts):
        return self(texts, padding=True, return_tensors="pt")


class TestImageSegmentation:
    @pytest.fixture
    def segmenter(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        segmenter = SamClipForImageSegmentation.from_pretrained(tmp_path).eval()
        tokenizer = WordTokenizer()
        return segmenter.set_vocabulary(
            ["cat", ["sofa", "couch"], "tree"], ["a wall", "sky"], ["a {}", "one {}"], tokenizer
        )

    def test_logits_are_mean_over_templates_and_max_over_synonyms(self, segmenter, model):
        assert segmenter.config.id2label == {0: "background", 1: "cat", 2: "sofa", 3: "tree"}
        tokenizer = WordTokenizer()
        names = [["a wall"], ["sky"], *([f"a {n}", f"one {n}"] for n in ("cat", "sofa", "couch", "tree"))]
        ordered = [f"{t} {n}" for n in ("cat", "sofa", "couch", "tree") for t in ("a", "one")]
        tokenizer.encode(
            ["cat", "sofa", "couch", "tree", "a wall", "sky", *ordered]
        )  # gives the words the same numbers
        embeds = []
        with torch.no_grad():
            for texts in names:
                features = [model.get_text_features(tokenizer.encode([t]).input_ids).pooler_output[0] for t in texts]
                embeds.append(F.normalize(torch.stack([F.normalize(f, dim=0) for f in features]).mean(0), dim=0))
            dense = model(random_images()).dense_embeds
            similarity = torch.einsum("bdhw,nd->bnhw", dense, torch.stack(embeds)) * model.logit_scale.exp()
            best = [similarity[:, :2].amax(1), similarity[:, 2], similarity[:, 3:5].amax(1), similarity[:, 5]]
            logits = segmenter(random_images(), both_heads=False).logits
        assert_same(logits, torch.stack(best, dim=1))

    @pytest.mark.parametrize("composition", ["segments", "classes"])
    @pytest.mark.parametrize("sizes", [None, torch.tensor([[64, 40], [51, 64]])])
    def test_vision_embeds_replace_the_encoder_pass(self, segmenter, monkeypatch, composition, sizes):
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
            features = [model.get_text_features(tokenizer.encode([text]).input_ids).pooler_output[0] for text in texts]
        mean = torch.stack([F.normalize(feature, dim=0) for feature in features]).mean(dim=0)
        assert vocabulary.label_ids == [0, 1] and vocabulary.id2label == {0: "sofa", 1: "tree"}
        assert_same(vocabulary.class_embeds[0], F.normalize(mean, dim=0))

    @pytest.mark.parametrize(
        "same",
        [
            ("cat", "sofa"),
            np.array(["cat", "sofa"]),
            np.array(["cat", "sofa"], dtype=object),
            np.array([["cat"], ["sofa"]]),
            [["cat"], np.array(["sofa"])],
            (name for name in ("cat", "sofa")),
            {0: "cat", 1: "sofa"}.values(),
            list(StrEnum("Name", {"A": "cat", "B": "sofa"})),
        ],
        ids=["tuple", "array", "objects", "groups", "mixed groups", "generator", "values", "enumeration"],
    )
    def test_all_containers_of_names_give_the_same_vocabulary(self, segmenter, same):
        tokenizer = WordTokenizer()
        plain = segmenter.embed_vocabulary(["cat", "sofa"], tokenizer=tokenizer)
        vocabulary = segmenter.embed_vocabulary(same, tokenizer=tokenizer)
        assert vocabulary.id2label == plain.id2label and {type(name) for name in vocabulary.id2label.values()} == {str}
        assert torch.equal(vocabulary.class_embeds, plain.class_embeds)

    def test_a_table_is_refused_because_its_columns_are_no_names(self, segmenter):
        table = pd.DataFrame({"name": ["cat", "sofa"], "number": [0, 1]})
        with pytest.raises(ValueError, match="labels must be a list"):
            segmenter.embed_vocabulary(table, tokenizer=WordTokenizer())
        vocabulary = segmenter.embed_vocabulary(table["name"], tokenizer=WordTokenizer())
        assert vocabulary.id2label == {0: "cat", 1: "sofa"}

    def test_all_containers_of_other_texts_give_the_same_vocabulary(self, segmenter):
        tokenizer = WordTokenizer()
        plain = segmenter.embed_vocabulary(["cat"], ["a wall", "sky"], ["one {}", "a {}"], tokenizer)
        arrays = segmenter.embed_vocabulary(
            ["cat"], np.array(["a wall", "sky"]), np.array(["one {}", "a {}"]), tokenizer
        )
        assert torch.equal(arrays.class_embeds, plain.class_embeds)
        by_number = segmenter.embed_vocabulary(["cat", "sofa"], np.float32(0.5), "a {}", tokenizer)
        assert by_number.background_threshold == 0.5

    def test_background_is_put_into_templates_on_request(self, segmenter):
        tokenizer = WordTokenizer()
        plain = segmenter.embed_vocabulary(["cat"], ["wall", "sky"], ["a {}", "one {}"], tokenizer)
        filled = segmenter.embed_vocabulary(
            ["cat"], ["wall", "sky"], ["a {}", "one {}"], tokenizer, background_templates=True
        )
        as_labels = segmenter.embed_vocabulary(["wall", "sky", "cat"], (), ["a {}", "one {}"], tokenizer)
        as_texts = segmenter.embed_vocabulary(["wall", "sky"], (), ["{}"], tokenizer)
        assert torch.equal(filled.class_embeds, as_labels.class_embeds)
        assert_same(plain.class_embeds[:2], as_texts.class_embeds)
        assert filled.label_ids == plain.label_ids == [0, 0, 1]
        for background in (0.5, None):
            with pytest.raises(ValueError, match="background_templates=True has no effect"):
                segmenter.embed_vocabulary(["cat"], background, tokenizer=tokenizer, background_templates=True)

    def test_names_with_the_same_tokens_do_not_share_the_probability(self, segmenter, transformers_log):
        tokenizer = WordTokenizer()
        tokenizer.ids = {"Cat": 1, "cat": 1}
        alone = segmenter.embed_vocabulary(["sofa", "cat"], ["sky"], ["a {}", "one {}"], tokenizer)
        assert not transformers_log.records
        twice = segmenter.embed_vocabulary(
            ["sofa", "cat", ["tom", "Cat"], "Cat tree"], ["sky"], ["a {}", "one {}"], tokenizer
        )
        assert "only the first of each is used: 'cat' and 'Cat'" in transformers_log.text
        assert twice.id2label == {0: "background", 1: "sofa", 2: "cat", 3: "tom", 4: "Cat tree"}
        assert twice.label_ids == [0, 1, 2, 3, 4]
        with torch.no_grad():
            single = segmenter(random_images(), vocabulary=alone, both_heads=False).logits
            double = segmenter(random_images(), vocabulary=twice, both_heads=False).logits
        assert_same(double[:, :3], single)

        segmenter.set_vocabulary(["cat", "Cat", "sofa"], templates=["a {}"], tokenizer=tokenizer)
        with torch.no_grad():
            probabilities = segmenter(random_images(), both_heads=False).logits.softmax(dim=1)
        assert probabilities.shape[1] == 3 and not probabilities[:, 1].any()
        with pytest.raises(ValueError, match="background and a label have the same tokens: 'a cat' and 'Cat'"):
            segmenter.embed_vocabulary(["Cat"], ["a cat"], ["a {}"], tokenizer)
        with pytest.raises(ValueError, match="background and a label have the same tokens: 'cat' and 'Cat'"):
            segmenter.embed_vocabulary(["sofa", "Cat"], ["sky", "cat"], ["a {}"], tokenizer)

    def test_names_in_id2label_are_shown_and_do_not_change_what_is_found(self, segmenter, tmp_path):
        names = {0: "Hintergrund", 1: "Katze", 2: "Sofa", 3: "Baum"}
        with torch.no_grad():
            expected = segmenter(random_images(), both_heads=False).logits
            segmenter.config.id2label = names
            segmenter.save_pretrained(tmp_path)
            loaded = SamClipForImageSegmentation.from_pretrained(tmp_path).eval()
            for own in (segmenter, loaded):
                assert own.vocabulary.id2label == names
                assert torch.equal(own(random_images(), both_heads=False).logits, expected)
            loaded.set_vocabulary([*names.values()][1:], ["a wall", "sky"], ["a {}", "one {}"], WordTokenizer())
            assert not torch.allclose(loaded(random_images(), both_heads=False).logits, expected)

    def test_id2label_does_not_rename_the_labels(self, segmenter, tmp_path):
        segmenter.save_pretrained(tmp_path)
        own = dict(segmenter.config.id2label)
        for arguments in (
            {"id2label": {0: "a", 1: "b", 2: "c", 3: "d"}},
            {"id2label": {"0": "a", "1": "b"}},
            {"id2label": ["a", "b", "c", "d"]},
            {"label2id": {"a": 0, "b": 1, "c": 2, "d": 3}},
            {"num_labels": 60},
        ):
            for load in (AutoModelForSemanticSegmentation.from_pretrained, AutoConfig.from_pretrained):
                with pytest.raises(ValueError, match="set another vocabulary"):
                    load(tmp_path, **arguments)
        same = {"id2label": own, "label2id": {name: number for number, name in own.items()}, "num_labels": len(own)}
        loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path, **same).eval()
        assert loaded.config.id2label == own

        loaded.config.id2label = {0: "a", 1: "b"}
        with pytest.raises(ValueError, match=r"2 labels, but the vocabulary .* has 4.*Call set_vocabulary"):
            loaded(random_images())
        config = AutoConfig.from_pretrained(tmp_path)
        config.num_labels = 60
        with pytest.raises(ValueError, match=r"60 labels, but the vocabulary .* has 4.*Call set_vocabulary"):
            AutoModelForSemanticSegmentation.from_pretrained(tmp_path, config=config)

    def test_background_threshold(self, segmenter):
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
            # Where a class wins, it has its probability among the classes.
            torch.testing.assert_close(highest[expected > 0], probability[expected > 0])
        assert 0 < expected.count_nonzero() < 500

    @pytest.mark.parametrize("composition", ["segments", "classes"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_finite(self, segmenter, composition, dtype):
        segmenter.config.composition = composition
        segmenter.config.background_label_id = None  # a class everywhere
        segmenter.logit_scale.data.fill_(6.0)  # probabilities that round to 1
        with torch.no_grad():
            outputs = segmenter.to(dtype)(random_images())
        assert (outputs.segment_scores > 0).any() or composition == "segments"  # random weights give no segments
        assert outputs.segment_masks.isfinite().all()

    def test_vocabulary_argument_does_not_change_the_checkpoints(self, segmenter):
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
        assert sizes == [3, 3, 2] * 2  # texts from templates, names

    def test_segments_without_text_tower(self, segmenter, model, tmp_path):
        with torch.no_grad():
            expected = segmenter(random_images()).segment_logits
            segmenter.drop_text_tower().save_pretrained(tmp_path)
            loaded = SamClipForImageSegmentation.from_pretrained(tmp_path).eval()
            assert_same(loaded(random_images()).segment_logits, expected)
        assert not any(name.startswith("text_") for name in loaded.state_dict())
        with pytest.raises(ValueError, match="no text tower"):
            loaded.set_vocabulary(["dog"], tokenizer=WordTokenizer())
        with pytest.raises(ValueError, match="has no vocabulary"):
            SamClipForImageSegmentation(model.config).drop_text_tower()

    def test_vocabulary_is_saved(self, segmenter, tmp_path):
        segmenter.save_pretrained(tmp_path / "saved")
        loaded = AutoModelForImageSegmentation.from_pretrained(tmp_path / "saved").eval()
        assert loaded.config.id2label == segmenter.config.id2label
        with torch.no_grad():
            expected = segmenter(random_images()).segment_logits
            assert_same(loaded(random_images()).segment_logits, expected)
            # Training loads and saves a SamClipModel, which keeps the vocabulary.
            SamClipModel.from_pretrained(tmp_path / "saved").save_pretrained(tmp_path / "trained")
            trained = SamClipForImageSegmentation.from_pretrained(tmp_path / "trained").eval()
            assert_same(trained(random_images()).segment_logits, expected)

    def test_both_heads_use_one_encoder_pass(self, segmenter):
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

    @pytest.mark.parametrize("both_heads", [True, False])
    def test_sizes_of_another_number_of_images_raise(self, segmenter, both_heads):
        with pytest.raises(ValueError, match="a height and a width for each of 2 images"), torch.no_grad():
            segmenter(random_images(2), reshaped_input_sizes=[[48, 32]], both_heads=both_heads)

    def test_no_points_in_padding(self, segmenter, monkeypatch):
        prompts = []
        predict_masks = segmenter.predict_masks
        monkeypatch.setattr(
            segmenter,
            "predict_masks",
            lambda e, input_points: prompts.append(input_points) or predict_masks(e, input_points),
        )
        segmenter.config.background_label_id = None  # a class everywhere
        with torch.no_grad():
            segmenter(random_images(2), reshaped_input_sizes=[[64, 24], [40, 64]])
        x, y = torch.cat(prompts, dim=1).unbind(-1)
        assert x[0].max() < 24 <= x[1].max() and y[1].max() < 40 <= y[0].max()

    @pytest.fixture
    def compose(self, segmenter, monkeypatch):
        """`compose_heads` for given patch tokens and masks of the points, `(num_points, 32, 32)` or `(num_points, 3,
        32, 32)`, on an 8 x 8 grid with a class everywhere."""

        def compose(patch_tokens, masks, content_mask=None):
            masks = masks[:, None] if masks.ndim == 3 else masks
            scores = torch.linspace(0.9, 0.8, masks[..., 0, 0].numel()).view(masks.shape[:2])
            answers = zip(masks, scores, strict=True)

            def predict_masks(_, input_points):  # called for consecutive chunks of points
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

    def test_segment_of_the_whole_image_has_the_images_logits(self, segmenter, compose):
        with torch.no_grad():
            patch_tokens = segmenter.vision_encoder(random_images(1)).patch_tokens
            image_embeds = segmenter.clip_head.pool(segmenter.clip_head(patch_tokens))
            expected = segmenter.classify(F.normalize(image_embeds, dim=-1), segmenter.vocabulary)[0]
        segments = compose(patch_tokens, torch.full((1, 32, 32), 20.0))
        assert_same(segments["segment_logits"][0], expected)
        assert segments["segment_scores"].tolist() == pytest.approx([0.9])

    def test_segment_logits_are_independent_of_the_surroundings(self, segmenter, compose):
        left = torch.full((32, 32), -20.0)
        left[:, :16] = 20.0
        tokens = torch.randn(1, 8, 8, 32)
        changed = tokens.clone()
        changed[:, :, 4:] = torch.randn(1, 8, 4, 32)
        first, second = (compose(t, torch.stack([left, -left]))["segment_logits"] for t in (tokens, changed))
        assert_same(second[0], first[0])
        assert not torch.allclose(second[1], first[1], atol=1e-2)  # the changed patches matter for their own segment
        with torch.no_grad():  # with attention to the whole image, the left patches change too
            free = [segmenter.clip_head(t)[:, :, :4] for t in (tokens, changed)]
        assert not torch.allclose(free[0], free[1], atol=1e-2)

    def test_segment_logits_are_independent_of_padding(self, compose):
        content_mask = torch.ones(1, 8, 8, dtype=torch.bool)
        content_mask[:, :, 4:] = False
        tokens = torch.randn(1, 8, 8, 32)
        changed = tokens.clone()
        changed[:, :, 4:] = torch.randn(1, 8, 4, 32)
        everything = torch.full((1, 32, 32), 20.0)
        padded = [compose(t, everything, content_mask)["segment_logits"] for t in (tokens, changed)]
        assert_same(padded[1], padded[0])
        shown = [compose(t, everything)["segment_logits"] for t in (tokens, changed)]
        assert not torch.allclose(shown[1], shown[0], atol=1e-2)  # as content, those patches matter

    def test_most_stable_mask_of_a_point_is_kept(self, compose):
        left = torch.full((32, 32), -20.0)
        left[:, :16] = 20.0
        unstable = torch.full((32, 32), 0.5)  # highest IoU score, but stability 0
        segments = compose(torch.randn(1, 8, 8, 32), torch.stack([unstable, left, -left])[None])
        assert torch.equal(segments["segment_masks"][0], left)
        assert segments["segment_scores"].tolist() == pytest.approx([0.85])  # the second of 0.9, 0.85, 0.8

    def test_duplicate_masks_are_removed(self, compose):
        left = torch.full((32, 32), -20.0)
        left[:, :16] = 20.0
        segments = compose(torch.randn(1, 8, 8, 32), torch.stack([left, left, -left]))
        assert [score > 0 for score in segments["segment_scores"].tolist()] == [True, False, True]

    @pytest.mark.parametrize("num_cells", [0, 1, 3])
    def test_few_marked_cells_need_few_points(self, segmenter, monkeypatch, num_cells):
        """More points than marked cells repeat cells, whose masks are computed once."""
        vocabulary = replace(segmenter.vocabulary, background_label_id=0)
        logits = torch.zeros(1, len(vocabulary.id2label), 8, 8)
        logits[:, 0] = 9
        for cell in range(num_cells):
            logits[0, 0, 2 * cell, cell] = -9
        torch.manual_seed(0)
        embeddings, tokens = torch.randn(1, 16, 8, 8), torch.randn(1, 8, 8, 32)
        counts = []

        def predict_masks(image_embeddings, input_points):
            counts.append(input_points.shape[1])
            masks, scores = predict(image_embeddings, input_points=input_points)
            return masks * 1000, scores.abs() + 0.1  # masks of random weights are not stable

        predict = segmenter.predict_masks
        monkeypatch.setattr(segmenter, "predict_masks", predict_masks)
        segmenter.config.composition_points = 16
        with torch.no_grad():
            segments = segmenter.compose_heads(embeddings, tokens, logits, vocabulary)
            assert sum(counts) == max(1, num_cells)
            points = _spread_points(logits[:, 0] < 0, 16)[:, :, None]
            masks, scores = predict_masks(embeddings, (points + 0.5) * segmenter.config.vision_config.patch_size - 0.5)
        best = (scores * segmentation_samclip._stability(masks)).argmax(dim=-1)[0]
        torch.testing.assert_close(segments["segment_masks"][0], masks[0, torch.arange(16), best])
        found = segments["segment_scores"][0] > 0
        assert found.sum() <= num_cells and found.any() == (num_cells > 0)

    def test_the_number_of_points_in_a_pass_of_the_mask_decoder_changes_nothing(self, segmenter, monkeypatch):
        pixel_values = random_images(1)
        results = []
        for values in (0, 2**30):
            monkeypatch.setattr(segmentation_samclip, "VALUES_PER_CHUNK", values)
            with torch.no_grad():
                results.append(segmenter(pixel_values))
        assert results[0].segment_masks.shape[1] == segmenter.config.composition_points
        torch.testing.assert_close(results[0].segment_masks, results[1].segment_masks)
        torch.testing.assert_close(results[0].segment_logits, results[1].segment_logits)

    def test_composition_by_class_prompts_with_patches_of_the_class(self, segmenter, monkeypatch):
        logits = torch.zeros(3, 4, 8, 8)
        logits[0, 0], logits[2, 0] = 9.0, 9.0  # background, except two classes each in the first and the last image
        for image, label, row in ((0, 1, 2), (0, 3, 6), (2, 2, 0), (2, 3, 3)):
            logits[image, label, row] = 20.0
        embeddings = torch.randn(3, 16, 8, 8)
        monkeypatch.setattr(segmentation_samclip, "CLASSES_PER_CHUNK", 3)  # several chunks
        prompts, predict_masks = [], segmenter.predict_masks
        monkeypatch.setattr(segmenter, "predict_masks", lambda e, **kw: prompts.append(kw) or predict_masks(e, **kw))
        with torch.no_grad():
            segments = segmenter.compose_heads_by_class(embeddings, logits, segmenter.vocabulary)
            assert segments["segment_logits"].argmax(dim=-1)[[0, 2]].tolist() == [[1, 3], [2, 3]]
            assert segments["segment_scores"].tolist() == [[1, 1], [0, 0], [1, 1]]
            points = torch.cat([kw["input_points"] for kw in prompts])
            masks = torch.cat([kw["input_masks"] for kw in prompts])
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

    def test_composition_by_class_runs(self, segmenter):
        segmenter.config.composition = "classes"
        segmenter.set_vocabulary(["cat", "sofa", "tree"], tokenizer=WordTokenizer())
        segmenter.logit_scale.data.fill_(9.0)  # without background, a class is everywhere
        with torch.no_grad():
            outputs = segmenter(random_images(2, 48, 64), reshaped_input_sizes=[[48, 32], [20, 64]])
        assert outputs.segment_scores.any()
        assert outputs.segment_masks.shape[2:] == (24, 32)

    def test_stability_is_the_iou_at_two_thresholds(self):
        masks = torch.tensor([[[5.0, 0.5], [-0.5, -5.0]], [[5.0, 5.0], [-5.0, -5.0]], [[-5.0] * 2] * 2])
        assert _stability(masks).tolist() == pytest.approx([1 / 3, 1, 0])

    def test_patches_of_several_masks_go_to_the_best_mask(self, segmenter, compose, monkeypatch):
        masks = torch.full((3, 32, 32), -20.0)
        masks[0, :16, :16] = 20  # the best mask
        masks[1, :16, :] = 20  # keeps the half that is not in the best mask
        masks[2, :4, :4] = 20  # inside the best mask: no patches
        expected = torch.zeros(3, 8, 8, dtype=torch.bool)
        expected[0, :4, :4] = expected[1, :4, 4:] = True
        found = []
        pool = segmenter.clip_head.pool_segments
        monkeypatch.setattr(segmenter.clip_head, "pool_segments", lambda t, s: found.append(s[0]) or pool(t, s))
        scores = compose(torch.randn(1, 8, 8, 32), masks)["segment_scores"]
        assert torch.equal(found[0], expected)
        assert [score > 0 for score in scores.tolist()] == [True, True, False]

    def test_patches_of_masks_are_those_inside(self):
        masks = torch.zeros(4, 8, 8, dtype=torch.bool)
        masks[0, :4, :4] = masks[1, 7, 7] = masks[2, 2:7] = True
        expected = torch.zeros(4, 4, 4, dtype=torch.bool)
        expected[0, :2, :2] = True
        expected[1, 3, 3] = True  # a quarter of a patch, its largest part
        expected[2, 1:] = True  # half of the last row of patches
        assert torch.equal(patches_of_masks(masks, (4, 4), (4, 4)), expected)  # the last mask is empty
        large = masks.repeat_interleave(10, dim=1).repeat_interleave(7, dim=2)
        assert torch.equal(patches_of_masks(large, (4, 4), (4, 4)), expected)
        small = torch.tensor([[[True, False]]])
        assert patches_of_masks(small, (4, 4), (4, 4))[0].sum(dim=0).tolist() == [4, 4, 0, 0]

    def test_patches_of_masks_are_in_the_covered_part_of_the_grid(self):
        everything = torch.ones(1, 30, 50, dtype=torch.bool)
        patches = patches_of_masks(everything, (2.25, 4), (4, 6))
        assert patches[0].sum(dim=1).tolist() == [4, 4, 4, 0]  # a quarter of the third row shows the image
        lower = everything.clone()
        lower[:, :15] = False  # from row 1.125
        assert patches_of_masks(lower, (2.25, 4), (4, 6))[0].any(dim=1).tolist() == [False, True, True, False]

    def test_distinct_masks_drop_empty_and_duplicate_masks(self):
        masks = torch.full((5, 10, 10), -1.0)
        masks[0, :, :5] = 1
        masks[1, :, :6] = 1  # IoU 5 / 6 with the first, and better
        masks[2, :, 5:] = 1  # IoU 1 / 10 with the second
        masks[4, :, :2] = 1  # IoU 1 / 3
        assert _distinct_masks(masks, torch.tensor([0.7, 0.9, 0.8, 1.0, 0.1]), max_overlap=0.6) == [1, 2, 4]

    def test_points_are_spread_over_marked_cells(self):
        cells = torch.rand(6, 5, 7, generator=torch.Generator().manual_seed(0)) > 0.5
        cells[0] = False
        cells[0, 2, 3] = True
        for in_z_order in (False, True):
            points = _spread_points(cells, 8, in_z_order)
            for image, (x, y) in zip(cells, points.transpose(1, 2), strict=True):
                assert image[y, x].all()
                assert len(set(zip(x.tolist(), y.tolist(), strict=True))) == min(8, int(image.sum()))

    def test_points_in_z_order_are_spread_over_the_grid(self):
        points = _spread_points(torch.ones(1, 16, 16, dtype=torch.bool), 16, in_z_order=True)[0]
        assert len((points // 4).unique(dim=0)) == 16  # one in each square of 4 x 4 cells
        wide = _spread_points(torch.ones(1, 4, 16, dtype=torch.bool), 4, in_z_order=True)[0]
        assert len((wide // 4).unique(dim=0)) == 4

    @pytest.fixture
    def tokenizer(self):
        return WordTokenizer()

    @pytest.fixture
    def detector(self, segmenter, tokenizer, tmp_path, monkeypatch):
        """Detects in two segments, the left and the right half of every image."""
        left = torch.full((32, 32), -20.0)
        left[:, :16] = 20.0
        masks = torch.stack([left, -left])[None, :, None]
        monkeypatch.setattr(
            SamClipModel,
            "predict_masks",
            lambda _, embeddings, **__: (
                masks.expand(len(embeddings), -1, -1, -1, -1),
                torch.full((len(embeddings), 2, 1), 0.9),
            ),
        )
        segmenter.config.composition_points = 2
        segmenter.set_vocabulary(["cat", "sofa", "tree"], templates=["{}"], tokenizer=tokenizer)
        segmenter.save_pretrained(tmp_path)
        return AutoModelForZeroShotObjectDetection.from_pretrained(tmp_path).eval()

    @pytest.mark.parametrize("background", [(), ["a wall"], 0.5])
    def test_detection_score_of_a_vocabulary_name_is_its_probability(self, detector, tokenizer, background):
        vocabulary = detector.embed_vocabulary(["cat", "sofa", "tree"], background, ["a {}"], tokenizer)
        first_label = int(bool(background))
        with torch.no_grad():
            outputs = detector(random_images(2), **tokenizer.encode(["tree", "cat"]), vocabulary=vocabulary)
        expected = outputs.segment_logits.softmax(dim=-1)
        assert outputs.segment_logits.shape == (2, 2, 3 + first_label)
        labels = (first_label + 2, first_label)
        expected = torch.stack([expected[n, :, label] for n, label in enumerate(labels)])
        torch.testing.assert_close(outputs.object_scores, expected)

    def test_detection_score_of_another_text_is_its_term_of_the_softmax(self, detector, tokenizer):
        inputs = tokenizer.encode(["a tree"])
        with torch.no_grad():
            outputs = detector(random_images(1), **inputs)
            text_embeds = F.normalize(detector.get_text_features(**inputs).pooler_output, dim=-1)
        similarity = outputs.segment_embeds[0] @ text_embeds[0] * detector.logit_scale.exp()
        expected = (similarity - outputs.segment_logits[0].logsumexp(dim=-1)).exp().clamp_max(1)
        assert_same(outputs.object_scores[0], expected)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_detection_finds_names_in_half_precision(self, detector, tokenizer, dtype):
        detector.to(dtype)
        inputs = tokenizer.encode(["tree", "cat and some words that make the batch longer"])  # another padding
        with torch.no_grad():
            outputs = detector(random_images(2), **inputs)
        assert_same(outputs.object_scores[0], outputs.segment_logits[0].softmax(dim=-1)[:, 2])

    def save_as_version_0_1_0(self, detector, folder, label_tokens):
        """A checkpoint with the tokens of the labels' names in its configuration instead of their embeddings."""
        detector.save_pretrained(folder)
        weights = load_file(folder / "model.safetensors")
        assert torch.equal(detector.label_embeds, weights.pop("label_embeds"))
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text()) | {"label_tokens": label_tokens}
        (folder / "config.json").write_text(json.dumps(config))

    @pytest.mark.parametrize("load", [{}, {"dtype": torch.bfloat16}, {"output_loading_info": True}])
    def test_checkpoint_of_version_0_1_0_detects_names_as_before(
        self, detector, tokenizer, tmp_path, transformers_log, load
    ):
        names = ["cat", "potted plant", "tree"]  # of different lengths
        detector.set_vocabulary(names, ["a wall"], ["a photo of a {}"], tokenizer)
        self.save_as_version_0_1_0(detector, tmp_path, tokenizer(names)["input_ids"])
        old = type(detector).from_pretrained(tmp_path, **load)
        old = old[0] if isinstance(old, tuple) else old
        assert_same(
            old.label_embeds, detector.label_embeds.to(old.dtype), tolerance=5e-2 if load.get("dtype") else 1e-6
        )
        old.save_pretrained(tmp_path / "new")
        new = type(detector).from_pretrained(tmp_path / "new", dtype=torch.float32)
        assert torch.equal(new.label_embeds, old.label_embeds.float())
        assert not transformers_log.records and "label_tokens" not in new.config.to_dict()
        for text in [*names, "dog"]:
            with torch.no_grad():
                expected, outputs = (m(random_images(1), **tokenizer.encode([text])) for m in (detector, new))
            if not load.get("dtype"):
                assert_same(outputs.object_scores, expected.object_scores)
            if text in names:
                label = names.index(text) + 1
                assert_same(outputs.object_scores[0], outputs.segment_logits[0].softmax(dim=-1)[:, label])

    def test_names_of_version_0_1_0_are_embedded_when_the_text_tower_is_in_memory(self, detector, tokenizer, tmp_path):
        self.save_as_version_0_1_0(detector, tmp_path, tokenizer(["cat", "sofa", "tree"])["input_ids"])
        assert load_complete_model(type(detector), tmp_path).label_embeds.any()  # not missing
        assert type(detector).from_pretrained(tmp_path, device_map="meta").config.label_tokens
        model = type(detector)(AutoConfig.from_pretrained(tmp_path)).eval()
        model.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
        assert_same(model.vocabulary.label_embeds, detector.label_embeds)
        assert not hasattr(model.config, "label_tokens")

    @pytest.mark.parametrize("has_text_tower", [True, False])
    def test_zeros_are_not_saved_as_embeddings_of_names(
        self, detector, tokenizer, tmp_path, transformers_log, has_text_tower
    ):
        if not has_text_tower:
            detector.drop_text_tower()
        names = [] if has_text_tower else ["cat", "sofa", "tree"]
        self.save_as_version_0_1_0(detector, tmp_path, tokenizer(names)["input_ids"])
        for folder, next_folder in ((tmp_path, tmp_path / "second"), (tmp_path / "second", tmp_path / "third")):
            model = type(detector).from_pretrained(folder)
            assert model.label_embeds is None and "label_embeds" not in model.state_dict()
            model.save_pretrained(next_folder)
        assert ("Call set_vocabulary to embed the names" in transformers_log.text) == has_text_tower
        if has_text_tower:
            model.set_vocabulary(["cat"], tokenizer=tokenizer).save_pretrained(tmp_path / "fourth")
            assert_same(type(detector).from_pretrained(tmp_path / "fourth").label_embeds, model.label_embeds)

    def test_wrong_input_of_object_detection_raises(self, detector, tokenizer):
        with pytest.raises(ValueError, match="one text for each image; got 1 for 2"):
            detector(random_images(2), **tokenizer.encode(["tree"]))
        detector.config.composition = "classes"
        with pytest.raises(ValueError, match=r"composition = .segments"):
            detector(random_images(1), **tokenizer.encode(["tree"]))

    def test_invalid_vocabularies_raise(self, segmenter, model, tmp_path):
        tokenizer = WordTokenizer()
        for labels, message in (
            ([], "at least one name"),
            ("cat", "labels must be a list"),
            (["cat", " "], "no text empty"),
            ([[]], "no text empty"),
            (["cat", ["dog", "cat"]], "more than once"),
            (["cat " * 20], "at most 16 tokens"),
            ({"cat", "dog"}, "labels must be a list"),
            ({"cat": 0}, "labels must be a list"),
            (b"cat", "labels must be a list"),
            (np.array("cat"), "labels must be a list"),
            ([1, 2], "must be a list"),
            (["cat", float("nan")], "must be a list"),
            (["cat", None], "must be a list"),
            (["cat", {"dog"}], "must be a list"),
            (np.array([1, 2]), "must be a list"),
            (7, "labels must be a list"),
        ):
            with pytest.raises(ValueError, match=message):
                segmenter.set_vocabulary(labels, tokenizer=tokenizer)
        with pytest.raises(ValueError, match="background must be a list"):
            segmenter.set_vocabulary(["cat"], background="a wall", tokenizer=tokenizer)
        with pytest.raises(ValueError, match="a probability between 0 and 1, got"):
            segmenter.set_vocabulary(["cat"], background=1.5, tokenizer=tokenizer)
        with pytest.raises(ValueError, match="synonyms must be"):
            segmenter.set_vocabulary(["cat"], synonyms="min", tokenizer=tokenizer)
        with pytest.raises(ValueError, match=r"Give the class .background. another name"):
            segmenter.set_vocabulary(["cat", "background"], background=["a wall"], tokenizer=tokenizer)
        with pytest.raises(ValueError, match="does not accept input_ids"):
            segmenter(random_images(), input_ids=INPUT_IDS)
        with pytest.raises(ValueError, match="Prompts give masks without labels"):
            segmenter(random_images(), input_points=random_points(), input_ids=INPUT_IDS)
        with pytest.raises(ValueError, match=r"contain \{\}"):
            segmenter.set_vocabulary(["cat"], templates=["a photo"], tokenizer=tokenizer)
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"call model\.set_vocabulary"):
            SamClipForImageSegmentation.from_pretrained(tmp_path)(random_images())
        with pytest.raises(ValueError, match="Pass its tokenizer"):
            SamClipForImageSegmentation(model.config).set_vocabulary(["cat"])
