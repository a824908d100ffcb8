"""Unmerged models: SAM and the vision tower of a CLIP or SigLIP behind the interface of SAM-CLIP."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassClassValidationError
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, CLIPModel, SamModel, SamProcessor, pipeline

from samclip_hf import (
    SamClipConfig,
    SamClipForImageSegmentation,
    SamClipModel,
    SamClipProcessor,
    SamClipVisionModel,
    miniature,
)
from samclip_hf.clip_tower_samclip import SamClipTower, bicubic_weights, to_image_grid
from samclip_hf.distillation import ClipTeacher, SamClipTrainer, SamClipTrainingArguments
from samclip_hf.miniature.scenes import CLASS_NAMES, render

LABELS = ["red fuzzy shape", "green zigzag shape", "red dotted shape"]


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return Image.fromarray(render(seed=0, index=8).image)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An unmerged model of the miniature's teachers, saved with its processor."""
    folder = tmp_path_factory.mktemp("unmerged")
    sam, clip = miniature.sam_teacher(), miniature.clip_teacher()
    SamClipForImageSegmentation.from_teachers(sam, clip, merged=False).save_pretrained(folder)
    SamClipProcessor.from_teachers(sam, clip).save_pretrained(folder)
    return folder


@pytest.fixture
def model(folder):
    return SamClipForImageSegmentation.from_pretrained(folder)


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def clip():
    return CLIPModel.from_pretrained(miniature.clip_teacher())


def tower_pixels(model, pixel_values: torch.Tensor, clip_std=0.25, clip_mean=0.5) -> torch.Tensor:
    """Images as CLIP gets them: stretched to squares, with the normalization of CLIP in place of SAM's."""
    images = F.interpolate(pixel_values, (model.config.clip_image_size,) * 2, mode="bicubic", antialias=True)
    mean, std, clip_mean, clip_std = (
        torch.tensor(value).view(-1, 1, 1)
        for value in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225], clip_mean, clip_std)
    )
    return (images * std + mean - clip_mean) / clip_std


@torch.no_grad()
def test_masks_equal_sam_and_embeddings_equal_clip(folder, processor, clip, image):
    model, sam = AutoModel.from_pretrained(folder), SamModel.from_pretrained(miniature.sam_teacher())
    inputs = processor(image, text=LABELS, input_points=[[[[64, 64]], [[20, 90]]]])
    outputs = model(**inputs)
    prompts = SamProcessor.from_pretrained(miniature.sam_teacher())(
        image, input_points=[[[[64, 64]], [[20, 90]]]], return_tensors="pt"
    )
    expected = sam(**prompts)
    assert torch.allclose(outputs.pred_masks, expected.pred_masks, atol=1e-4)
    assert torch.allclose(outputs.iou_scores, expected.iou_scores, atol=1e-5)
    of_clip = clip(
        pixel_values=tower_pixels(model, inputs["pixel_values"]),
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        interpolate_pos_encoding=True,
    )
    assert torch.allclose(outputs.image_embeds, of_clip.image_embeds, atol=1e-5)
    assert torch.allclose(outputs.logits_per_image, of_clip.logits_per_image, atol=1e-4)


@torch.no_grad()
def test_the_tower_does_not_see_padding(model, processor, clip, image):
    images = [image, image.crop((0, 0, 128, 64)), image.crop((0, 0, 48, 128))]
    inputs = processor(images)
    embeds = model.get_image_features(inputs["pixel_values"], inputs["reshaped_input_sizes"]).pooler_output
    for number, (height, width) in enumerate(inputs["reshaped_input_sizes"].tolist()):
        content = inputs["pixel_values"][number : number + 1, :, :height, :width]
        expected = clip.get_image_features(tower_pixels(model, content), interpolate_pos_encoding=True).pooler_output
        assert torch.allclose(embeds[number], expected[0], atol=1e-4)


@pytest.mark.parametrize(("size", "target"), [(64, 16), (50, 16), (16, 16), (7, 16), (1, 16), (61, 60)])
def test_weights_are_those_of_bicubic_interpolation(size, target):
    line = torch.randn(1, 1, 1, size, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(line, (1, target), mode="bicubic", antialias=True)[0, 0, 0]
    weights = bicubic_weights(torch.tensor([size, 64]), 64, target)[0]
    assert torch.allclose(weights[:, :size] @ line[0, 0, 0], expected, atol=1e-5)
    assert not weights[:, size:].any()


@torch.no_grad()
def test_segments_are_embedded_from_their_patches_alone(model, processor, clip, image):
    inputs = processor(image)
    embeds = model.get_vision_embeds(inputs["pixel_values"]).patch_tokens
    grid = embeds.shape[1]
    segments = torch.zeros(1, 4, grid, grid, dtype=torch.bool)
    segments[0, 0, :6, :5] = segments[0, 1, 8:, 3:] = segments[0, 2, 4:10, 4:10] = segments[0, 3] = True  # overlapping
    features = model.clip_head.pool_segments(embeds, segments)[0]
    vision, pixels = clip.vision_model, tower_pixels(model, inputs["pixel_values"])
    tokens = vision.pre_layrnorm(vision.embeddings(pixels, interpolate_pos_encoding=True))
    for segment, found in zip(segments[0], features, strict=True):
        kept = tokens[:, torch.cat([torch.tensor([True]), segment.flatten()])]  # without the other patches
        pooled = vision.encoder(inputs_embeds=kept).last_hidden_state[:, 0]
        assert torch.allclose(found, clip.visual_projection(vision.post_layernorm(pooled))[0], atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    ("clip_image_size", "columns", "mean"), [(64, 1, 0.999), (64, 2, 0.78), (128, 1, 0.89), (128, 2, 0.83)]
)
def test_difference_to_clips_own_preprocessing(clip, processor, clip_image_size, columns, mean):
    """Mean cosine similarity of embeddings of squares and of images of 2:1, which CLIP's image processor crops."""
    sam = miniature.sam_teacher()
    model = SamClipModel.from_teachers(sam, miniature.clip_teacher(), merged=False, clip_image_size=clip_image_size)
    image_processor, found = AutoImageProcessor.from_pretrained(miniature.clip_teacher()), []
    for number in range(20):
        scenes = [render(seed=101, index=number + 100 * column).image for column in range(columns)]
        image = Image.fromarray(np.concatenate(scenes, axis=1)).resize((512 * columns, 512), Image.Resampling.BICUBIC)
        expected = clip.get_image_features(**image_processor(image, return_tensors="pt")).pooler_output
        inputs = processor(image)
        actual = model.eval().get_image_features(inputs["pixel_values"], inputs["reshaped_input_sizes"]).pooler_output
        found.append(F.cosine_similarity(actual, expected).item())
    assert np.mean(found) == pytest.approx(mean, abs=0.01)
    assert (columns, clip_image_size) != (1, 64) or min(found) > 0.995


@torch.no_grad()
def test_class_tokens_of_segments_read_their_patches_only(model, processor, clip, image):
    """The class token of a segment is compared with a CLIP whose patches are frozen to those of the whole image, layer
    by layer."""
    model.config.segment_attention = "class_token"
    inputs = processor(image)
    embeds = model.get_vision_embeds(inputs["pixel_values"]).patch_tokens
    grid = embeds.shape[1]
    segments = torch.zeros(1, 3, grid, grid, dtype=torch.bool)
    segments[0, 0, :6, :5] = segments[0, 1, 4:10, 4:10] = segments[0, 2] = True  # overlapping
    features = model.clip_head.pool_segments(embeds, segments)[0]
    vision, pixels = clip.vision_model, tower_pixels(model, inputs["pixel_values"])
    tokens = vision.pre_layrnorm(vision.embeddings(pixels, interpolate_pos_encoding=True))
    states = [tokens]
    for layer in vision.encoder.layers:
        states.append(layer(states[-1], attention_mask=None))
    for segment, found in zip(segments[0], features, strict=True):
        token = tokens[:, :1]
        for layer, state in zip(vision.encoder.layers, states, strict=False):
            token = layer(torch.cat([token, state[:, 1:][:, segment.flatten()]], dim=1), attention_mask=None)[:, :1]
        assert torch.allclose(found, clip.visual_projection(vision.post_layernorm(token[:, 0]))[0], atol=1e-4)
    whole = clip.get_image_features(pixels, interpolate_pos_encoding=True).pooler_output[0]
    assert torch.allclose(features[2], whole, atol=1e-4)


def test_features_are_resampled_to_the_grid_of_the_image():
    features = torch.arange(4.0).expand(1, 1, 4, 4)  # the column
    resampled = to_image_grid(features, torch.tensor([[8.0, 4.0]]), (8, 8))
    assert torch.allclose(resampled[0, 0, :, :4], torch.arange(4.0).expand(8, 4))
    assert torch.allclose(resampled[0, 0, :, 4:], torch.full((8, 4), 3.0))  # padding gets the nearest value


@torch.no_grad()
def test_a_batch_gives_the_results_of_single_images(model, processor, image):
    vocabulary = model.embed_vocabulary(LABELS, ["an empty scene"])
    images = [image, image.crop((0, 0, 128, 64))]
    together = model(**processor(images), vocabulary=vocabulary)
    for number, single in enumerate(images):
        alone = model(**processor(single), vocabulary=vocabulary)
        assert torch.allclose(together.logits[number], alone.logits[0], atol=1e-3)
        assert torch.allclose(together.segment_logits[number], alone.segment_logits[0], atol=1e-3)


def test_the_pipelines_segment_by_text(folder, image):
    segmenter = pipeline("zero-shot-image-segmentation", model=str(folder))
    assert isinstance(segmenter.model.clip_head, SamClipTower)
    assert segmenter.model.config.composition_points == 32
    segments = segmenter(image, candidate_labels=LABELS, background=["an empty scene"])
    scene = render(seed=0, index=8)
    for segment in segments:
        truth = scene.masks[scene.class_ids.index(CLASS_NAMES.index(segment["label"]))]
        mask = np.asarray(segment["mask"]) > 0
        assert (mask & truth).sum() > 0.7 * (mask | truth).sum()
    assert {"red fuzzy shape", "green zigzag shape"} <= {segment["label"] for segment in segments}
    segmenter.model.set_vocabulary(LABELS, ["an empty scene"], tokenizer=segmenter.tokenizer)
    stock = pipeline("image-segmentation", model=segmenter.model, image_processor=segmenter.image_processor)
    assert [s["label"] for s in stock(image, threshold=0.5)] == [s["label"] for s in segments]


@torch.no_grad()
def test_half_precision_gives_about_the_same_logits(folder, processor, image):
    outputs = []
    for dtype in (torch.float32, torch.bfloat16):
        model = SamClipForImageSegmentation.from_pretrained(folder, dtype=dtype)
        vocabulary = model.embed_vocabulary(LABELS)
        outputs.append(model(**processor(image), vocabulary=vocabulary, both_heads=False).logits.float())
    assert (outputs[0].argmax(1) == outputs[1].argmax(1)).float().mean() > 0.95


def test_arguments_without_effect_raise(tmp_path):
    sam, clip = miniature.sam_teacher(), miniature.clip_teacher()
    with pytest.raises(ValueError, match="no CLIP head: remove clip_head_config"):
        SamClipModel.from_teachers(sam, clip, {"pooling": "mean"}, merged=False)
    with pytest.raises(ValueError, match="clip_image_size needs merged=False"):
        SamClipModel.from_teachers(sam, clip, clip_image_size=64)
    with pytest.raises(StrictDataclassClassValidationError, match="multiple of the patch size 8, such as 64, got 60"):
        SamClipModel.from_teachers(sam, clip, merged=False, clip_image_size=60)
    with pytest.raises(StrictDataclassClassValidationError, match="has an effect in unmerged models only"):
        SamClipConfig(segment_attention="class_token")
    with pytest.raises(ValueError, match="pass names or folders"):
        SamClipModel.from_teachers(SamModel(SamModel.config_class()), clip, merged=False)


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"do_normalize": False}, "has no mean"), ({"rescale_factor": 1.0}, "does not rescale pixels by 1/255")],
)
def test_another_normalization_of_a_teacher_raises(tmp_path, setting, message):
    shutil.copytree(miniature.clip_teacher(), tmp_path / "clip")
    path = tmp_path / "clip" / "processor_config.json"
    content = json.loads(path.read_text())
    content["image_processor"] |= setting
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        SamClipModel.from_teachers(miniature.sam_teacher(), tmp_path / "clip", merged=False)


def test_the_vision_tower_of_an_unmerged_model_raises(folder):
    with pytest.raises(ValueError, match="is an unmerged model"):
        SamClipVisionModel.from_pretrained(folder)


def test_segments_need_an_attention_with_masks(model):
    model.config.clip_vision_config._attn_implementation = "flex_attention"
    patch_embeds, segments = torch.randn(1, 4, 4, 128), torch.ones(1, 1, 4, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="'sdpa' or 'eager'"):
        model.clip_head.pool_segments(patch_embeds, segments)


def test_training_raises(model, processor, tmp_path):
    arguments = SamClipTrainingArguments(stage=1, output_dir=str(tmp_path / "run"), max_steps=1, use_cpu=True)
    teacher = ClipTeacher(miniature.clip_teacher())
    with pytest.raises(ValueError, match="An unmerged model cannot be trained"):
        SamClipTrainer(model, arguments, teacher, processing_class=processor)
