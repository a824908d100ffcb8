"""Names of given masks, in the shipped SAM-CLIP and in an unmerged model of the miniature's teachers."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import SamModel, pipeline

from samclip_hf import SamClipForImageSegmentation, SamClipProcessor, miniature
from samclip_hf.miniature.scenes import BACKGROUND_PROMPTS, CLASS_NAMES, TEMPLATES, render
from samclip_hf.segmentation_samclip import NEUTRAL_NAMES, _check_masks

SCENE = render(seed=0, index=8)  # a red fuzzy, a green zigzag and a red dotted shape
MASKS = torch.from_numpy(np.stack(SCENE.masks))
IMAGE = Image.fromarray(SCENE.image)


@pytest.fixture(scope="module")
def processor():
    return SamClipProcessor.from_teachers(miniature.sam_teacher(), miniature.clip_teacher())


@pytest.fixture(scope="module", params=["merged", "unmerged"])
def model(request, processor):
    if request.param == "merged":
        model = SamClipForImageSegmentation.from_pretrained(miniature.checkpoint())
    else:
        teachers = miniature.sam_teacher(), miniature.clip_teacher()
        model = SamClipForImageSegmentation.from_teachers(*teachers, merged=False).eval()
    return model.set_vocabulary(CLASS_NAMES, BACKGROUND_PROMPTS, TEMPLATES, processor.tokenizer)


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def test_true_masks_get_the_names_of_their_classes(model, processor):
    outputs = model.classify_masks([MASKS], **processor(IMAGE))
    names = [model.config.id2label[index] for index in outputs.scores[0].argmax(dim=-1).tolist()]
    assert names == [CLASS_NAMES[index] for index in SCENE.class_ids]
    assert torch.allclose(outputs.scores.sum(dim=-1), torch.ones(1, 3))
    assert torch.allclose(outputs.segment_embeds.norm(dim=-1), torch.ones(1, 3))
    surroundings = ~MASKS.any(dim=0, keepdim=True)
    scores, label_id = (
        model.classify_masks([surroundings], **processor(IMAGE)).scores,
        model.config.background_label_id,
    )
    assert scores[..., label_id] > 10 * outputs.scores[..., label_id].max()
    if not model.config.merged:  # the region loss has no regions of the background
        assert scores.argmax() == label_id


def test_the_mask_of_the_whole_image_has_the_embedding_of_the_image(model, processor):
    images = [IMAGE, IMAGE.crop((0, 0, 128, 70))]
    inputs = processor(images)
    masks = [torch.ones(1, 10 * image.height, 10 * image.width, dtype=torch.bool) for image in images]
    outputs = model.classify_masks(masks, **inputs)
    features = model.get_image_features(inputs["pixel_values"], inputs["reshaped_input_sizes"]).pooler_output
    assert torch.allclose(outputs.segment_embeds[0, 0], F.normalize(features, dim=-1)[0], atol=1e-5)
    # In a merged model, the layers of the CLIP head before the pooling see the padding, the segment does not.
    similarity = F.cosine_similarity(outputs.segment_embeds[1, 0], features[1], dim=0)
    assert similarity > (0.9 if model.config.merged else 1 - 1e-5)


def test_masks_are_independent_of_each_other_and_of_their_resolution(model, processor):
    inputs = processor(IMAGE)
    overlapping = torch.cat([MASKS, MASKS[:1] | MASKS[1:2], torch.ones_like(MASKS[:1]), MASKS[:1]])
    together = model.classify_masks([overlapping], **inputs).logits[0]
    for mask, logits in zip(overlapping, together, strict=True):
        large = mask[None].repeat_interleave(3, dim=1).repeat_interleave(3, dim=2)
        for alone in (mask[None], large, mask[None].numpy().astype(np.uint8) * 255, [Image.fromarray(mask.numpy())]):
            assert torch.allclose(model.classify_masks([alone], **inputs).logits[0, 0], logits, atol=1e-3)


def test_a_batch_gives_the_scores_of_single_images(model, processor):
    images = [IMAGE, IMAGE.crop((0, 0, 128, 64)), IMAGE.crop((0, 20, 50, 128)), IMAGE]
    masks = [MASKS, MASKS[:2, :64], MASKS[:, 20:, :50], []]
    together = model.classify_masks(masks, **processor(images))
    assert together.scores.shape == (4, 3, len(model.config.id2label))
    for number, (image, own) in enumerate(zip(images[:3], masks[:3], strict=True)):
        alone = model.classify_masks([own], **processor(image)).scores[0]
        has_pixels = own.flatten(1).any(dim=1)
        assert torch.allclose(together.scores[number, : len(own)], alone, atol=1e-4)
        assert (together.scores[number].sum(dim=-1) > 0).tolist() == [*has_pixels.tolist(), *[False] * (3 - len(own))]
    for padding in (together.logits[3], together.segment_embeds[3], together.scores[1, 2]):
        assert not padding.any()


def test_images_without_masks_give_no_scores(model, processor):
    assert model.classify_masks([[], []], **processor([IMAGE, IMAGE])).scores.shape[:2] == (2, 0)


def test_large_and_many_masks_are_classified_in_chunks(model, processor, monkeypatch):
    inputs = processor(IMAGE)
    many = MASKS.repeat(4, 1, 1)
    expected = model.classify_masks([many], **inputs).logits
    monkeypatch.setattr("samclip_hf.segmentation_samclip.PATCHES_PER_CHUNK", 40)
    assert torch.allclose(model.classify_masks([many], **inputs).logits, expected, atol=1e-3)


def test_vision_embeds_replace_the_encoders(model, processor, monkeypatch):
    images = [IMAGE, IMAGE.crop((0, 0, 128, 64))]
    inputs = processor(images)
    masks = [MASKS, MASKS[:2, :64]]
    expected = model.classify_masks(masks, **inputs).logits
    vision_embeds = model.get_vision_embeds(inputs["pixel_values"], inputs["reshaped_input_sizes"])

    def fail(*_, **__):
        raise AssertionError("the encoder runs again")

    monkeypatch.setattr(model.vision_encoder, "forward", fail)
    monkeypatch.setattr(model, "get_vision_embeds", fail)
    again = model.classify_masks(
        masks, vision_embeds=vision_embeds, reshaped_input_sizes=inputs["reshaped_input_sizes"]
    )
    assert torch.allclose(again.logits, expected, atol=1e-4)


def test_a_given_vocabulary_replaces_that_of_the_checkpoint(model, processor):
    names = ["red fuzzy shape", "blue solid shape"]
    vocabulary = model.embed_vocabulary(names, templates=TEMPLATES, tokenizer=processor.tokenizer)
    outputs = model.classify_masks([MASKS], **processor(IMAGE), vocabulary=vocabulary)
    expected = outputs.segment_embeds @ vocabulary.class_embeds.T * model.logit_scale.exp()
    assert outputs.logits.shape == (1, 3, 2) and torch.allclose(outputs.logits, expected, atol=1e-4)


def test_a_list_of_names_is_not_a_vocabulary(model, processor):
    with pytest.raises(ValueError, match=r"must be the result of model.embed_vocabulary\(\[...\]\), got list"):
        model.classify_masks([MASKS], **processor(IMAGE), vocabulary=["red fuzzy shape"])


def test_a_model_in_memory_finds_the_tokenizer_of_its_clip_teacher():
    teachers = miniature.sam_teacher(), miniature.clip_teacher()
    unmerged = SamClipForImageSegmentation.from_teachers(*teachers, merged=False)
    vocabulary = unmerged.embed_vocabulary(["red fuzzy shape"])
    tokenizer = SamClipProcessor.from_teachers(*teachers).tokenizer
    assert torch.equal(
        vocabulary.class_embeds, unmerged.embed_vocabulary(["red fuzzy shape"], tokenizer=tokenizer).class_embeds
    )


@pytest.mark.parametrize(
    ("mask_size", "content_size", "is_accepted"),
    [
        ((1, 1024), (1, 128), True),  # rounded sizes of an image of 2 x 3000
        ((1, 1024), (2, 3000), True),
        ((1024, 1), (128, 1), True),
        ((1, 1024), (8, 128), False),  # 1024 / 1.5 is more than 128.5 / 7.5
        ((1024, 1), (1, 128), False),
        ((100, 133), (96, 128), True),
        ((100, 140), (96, 128), False),
    ],
)
def test_rounded_sides_may_change_the_aspect_ratio_of_masks(mask_size, content_size, is_accepted):
    """Sizes are height and width."""
    masks = torch.ones(2, *mask_size, dtype=torch.bool)
    if is_accepted:
        assert torch.equal(_check_masks(masks, content_size), masks)
    else:
        with pytest.raises(ValueError, match="do not have the aspect ratio"):
            _check_masks(masks, content_size)


def test_masks_for_other_images_raise(model, processor):
    inputs = processor(IMAGE.crop((0, 0, 128, 64)))
    masks = MASKS[:, :64]
    for wrong, message in (
        (masks, "masks of 3 images for 1 images"),
        (
            [MASKS],
            r"do not have the aspect ratio of their image, width / height = 2\.",
        ),  # for example the logits of the padded image
        ([masks.transpose(1, 2)], "do not have the aspect ratio"),
        ([masks[0]], r"must be \(num_masks, height, width\)"),
        ([masks[:, None].expand(-1, 3, -1, -1)], r"select one: masks\[:, 0\]"),
        ([masks.float() * 3 - 1], "got other values"),
        ([masks.int() + 1], "got other values"),
        ([[masks[0], masks[1, :32]]], "must have one size"),
    ):
        with pytest.raises(ValueError, match=message):
            model.classify_masks(wrong, **inputs)
    with pytest.raises(ValueError, match="reshaped_input_sizes must be passed"):
        model.classify_masks([masks], inputs["pixel_values"])
    with pytest.raises(ValueError, match="either pixel_values or vision_embeds"):
        model.classify_masks([masks])


def test_prompts_and_everything_mode_give_masks_to_classify(model, processor):
    inputs = processor(IMAGE, input_points=[[[[40, 30]], [[95, 50]]]])
    outputs = model(**inputs, multimask_output=False)
    if not model.config.merged:
        expected = SamModel.from_pretrained(miniature.sam_teacher())(
            inputs["pixel_values"], inputs["input_points"], multimask_output=False
        )
        assert torch.allclose(outputs.pred_masks, expected.pred_masks, atol=1e-4)
    masks = processor.post_process_masks(outputs.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"])
    assert model.classify_masks([masks[0][:, 0]], inputs["pixel_values"]).scores.shape[1] == 2
    everything = pipeline("mask-generation", model=model, image_processor=processor.image_processor)
    found = everything(IMAGE, **miniature.MASK_GENERATION)
    scores = model.classify_masks([found["masks"]], inputs["pixel_values"]).scores[0]
    names = {model.config.id2label[index] for index in scores.argmax(dim=-1).tolist()}
    assert len(names & {CLASS_NAMES[index] for index in SCENE.class_ids}) >= 2


class TestIndependentScores:
    def scores(self, model, processor, names, masks=MASKS, **arguments):
        arguments = {"templates": TEMPLATES, "tokenizer": processor.tokenizer, "multi_label": True} | arguments
        vocabulary = model.embed_vocabulary(names, **arguments)
        scores = model.classify_masks([masks], **processor(IMAGE), vocabulary=vocabulary, multi_label=True).scores[0]
        return dict(zip(vocabulary.id2label.values(), scores.T, strict=True))

    def test_other_names_do_not_change_a_score(self, model, processor):
        every = self.scores(model, processor, CLASS_NAMES, background=BACKGROUND_PROMPTS)
        for names in (["red fuzzy shape"], ["thing", "red fuzzy shape"], ["red dotted shape", "red fuzzy shape"]):
            scores = self.scores(model, processor, names)
            assert torch.allclose(scores["red fuzzy shape"], every["red fuzzy shape"], atol=1e-5)

    def test_present_names_have_higher_scores_than_absent_names(self, model, processor):
        scores = torch.stack(list(self.scores(model, processor, CLASS_NAMES).values()), dim=-1)
        for number, class_id in enumerate(SCENE.class_ids):
            assert scores[number, class_id] > 0.5
            assert (scores[number] <= scores[number, class_id]).float().mean() > 0.95
        absent = self.scores(model, processor, ["blue solid shape", "cyan lined shape"])
        assert torch.stack(list(absent.values())).amax() < 0.5  # the answer is: not there

    def test_scores_are_probabilities_among_the_neutral_texts(self, model, processor):
        arguments = {"templates": TEMPLATES, "tokenizer": processor.tokenizer}
        scores = self.scores(model, processor, ["red fuzzy shape", "shape", ["green zigzag shape", "green waves"]])
        embeds = model.classify_masks([MASKS], **processor(IMAGE)).segment_embeds[0]
        for names in (["red fuzzy shape"], ["shape"], ["green zigzag shape", "green waves"]):
            neutral = [name for name in NEUTRAL_NAMES if name not in names]
            texts = model.embed_vocabulary([*names, *neutral], **arguments).class_embeds
            odds = (embeds @ texts.T * model.logit_scale.exp()).exp()
            best = odds[:, : len(names)].amax(dim=1)
            expected = best / (best + odds[:, len(names) :].sum(dim=1))
            assert torch.allclose(scores[names[0]], expected, atol=1e-5)

    def test_a_saved_vocabulary_has_the_neutral_texts(self, model, processor, tmp_path):
        with pytest.raises(ValueError, match="pass multi_label=True to embed_vocabulary or set_vocabulary"):
            model.classify_masks([MASKS], **processor(IMAGE), multi_label=True)
        own = model.vocabulary
        model.set_vocabulary(["red fuzzy shape"], templates=TEMPLATES, tokenizer=processor.tokenizer, multi_label=True)
        expected = model.classify_masks([MASKS], **processor(IMAGE), multi_label=True).scores
        model.save_pretrained(tmp_path)
        loaded = SamClipForImageSegmentation.from_pretrained(tmp_path).drop_text_tower()
        loaded.save_pretrained(tmp_path / "small")
        loaded = SamClipForImageSegmentation.from_pretrained(tmp_path / "small")
        assert torch.allclose(loaded.classify_masks([MASKS], **processor(IMAGE), multi_label=True).scores, expected)
        model.set_vocabulary(CLASS_NAMES, BACKGROUND_PROMPTS, TEMPLATES, processor.tokenizer)
        assert model.neutral_embeds is None and model.config.vocabulary_num_neutral == 0
        assert torch.allclose(model.vocabulary.class_embeds, own.class_embeds)

    def test_a_threshold_for_the_background_raises(self, model, processor):
        with pytest.raises(ValueError, match="Independent scores need no background_threshold"):
            self.scores(model, processor, ["red fuzzy shape", "blue solid shape"], background=0.5)
