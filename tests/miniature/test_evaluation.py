from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from samclip_hf.miniature import evaluation, teachers
from samclip_hf.miniature.scenes import CLASS_NAMES, HELD_OUT, TEMPLATES, evaluation_scene, render


class Inputs(dict):
    def to(self, device):
        return self


def test_semantic_miou_equals_a_loop_over_classes():
    scenes = [render(7, index) for index in range(6)]
    rng = np.random.default_rng(0)
    truth = np.stack([scene.label_map for scene in scenes])
    predicted = np.where(rng.random(truth.shape) < 0.7, truth, rng.integers(0, 4, truth.shape))
    answers = iter(predicted)
    measured = evaluation.semantic_miou(lambda images: np.stack([next(answers) for _ in images]), scenes, batch_size=4)
    ious = []
    for label in range(len(CLASS_NAMES) + 1):
        union = ((truth == label) | (predicted == label)).sum()
        if union:
            ious.append(((truth == label) & (predicted == label)).sum() / union)
    assert measured == pytest.approx(np.mean(ious))
    assert evaluation.semantic_miou(lambda images: np.stack([s.label_map for s in scenes]), scenes) == 1.0


class MaskOracle:
    """Answers every prompt with a known mask, and with a wrong one of lower score beside it."""

    device = torch.device("cpu")

    def __init__(self, masks):
        self.masks = masks

    def __call__(self, pixel_values, multimask_output, input_points=None, input_boxes=None):
        right = torch.from_numpy(self.masks).float() * 2 - 1
        if not multimask_output:
            return SimpleNamespace(pred_masks=right[None, :, None], iou_scores=torch.ones(1, len(right), 1))
        scores = torch.tensor([0.1, 0.9, 0.2]).expand(1, len(right), 3)
        return SimpleNamespace(pred_masks=torch.stack([-right, right, -right], dim=1)[None], iou_scores=scores)


def prompt_processor(images, return_tensors, input_points=None, input_boxes=None):
    inputs = Inputs(pixel_values=torch.zeros(1, 3, 8, 8))
    if input_points is not None:
        inputs["input_points"] = torch.tensor(input_points)
    if input_boxes is not None:
        inputs["input_boxes"] = torch.tensor(input_boxes)
    return inputs


@pytest.mark.parametrize("prompt", ["point", "box"])
def test_prompted_miou_takes_the_mask_of_highest_predicted_iou(prompt):
    scene = render(8, 3, num_objects=3)
    assert evaluation.prompted_miou(MaskOracle(scene.masks), prompt_processor, [scene], prompt) == 1.0
    shifted = np.roll(scene.masks, 5, axis=2)
    expected = np.mean([(a & b).sum() / (a | b).sum() for a, b in zip(scene.masks, shifted, strict=True)])
    assert evaluation.prompted_miou(MaskOracle(shifted), prompt_processor, [scene], prompt) == pytest.approx(expected)


def test_prompts_lie_on_their_object_and_are_the_same_every_time():
    for index in range(10):
        for mask in render(9, index).masks:
            x, y = evaluation.random_point(mask, seed=index)
            left, top, right, bottom = evaluation.bounding_box(mask)
            assert mask[y, x] and (x, y) == evaluation.random_point(mask, seed=index)
            assert mask[top : bottom + 1, left : right + 1].sum() == mask.sum()
            assert mask[top].any() and mask[bottom].any() and mask[:, left].any() and mask[:, right].any()


class NameReader:
    """A model that embeds a text as its class and an image as the class written in its first pixel."""

    device = torch.device("cpu")

    def get_text_features(self, input_ids):
        return torch.nn.functional.one_hot(input_ids, len(CLASS_NAMES)).float()

    def get_image_features(self, pixel_values):
        features = torch.nn.functional.one_hot(pixel_values[:, 0, 0, 0].long(), len(CLASS_NAMES)).float()
        return SimpleNamespace(pooler_output=features)


def test_zero_shot_accuracy_is_counted_apart_for_seen_and_held_out_pairs():
    scenes = [evaluation_scene(10, index) for index in range(len(CLASS_NAMES))]
    for scene in scenes:  # the model below reads the answer from the image; held-out pairs are told wrong
        held_out = scene.class_ids[0] in HELD_OUT
        scene.image = np.full((2, 2, 3), (scene.class_ids[0] + held_out) % len(CLASS_NAMES), dtype=np.uint8)
    names = {template.format(name): number for number, name in enumerate(CLASS_NAMES) for template in TEMPLATES}

    def processor(images=None, text=None, padding=False, return_tensors="pt"):
        if text is not None:
            return Inputs(input_ids=torch.tensor([names[words] for words in text]))
        return Inputs(pixel_values=torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))

    figures = evaluation.zero_shot_top1(NameReader(), processor, scenes, batch_size=7)
    assert figures == {"seen": 1.0, "held_out": 0.0}


def test_label_maps_send_every_background_prompt_to_zero():
    scores = torch.full((1, len(CLASS_NAMES) + 2, 2, 2), -1.0)
    scores[0, 5, 0, 0] = scores[0, len(CLASS_NAMES), 0, 1] = scores[0, len(CLASS_NAMES) + 1, 1, 0] = 1.0
    scores[0, 0, 1, 1] = 1.0
    assert evaluation.label_maps(scores, 2, 2).tolist() == [[[6, 0], [0, 1]]]


def test_raw_colour_does_not_solve_the_world():
    scenes = evaluation.segmentation_scenes(12)
    baseline = evaluation.nearest_colour(num_scenes=48)
    assert baseline([Image.fromarray(scene.image) for scene in scenes[:2]]).shape == (2, 128, 128)
    assert evaluation.semantic_miou(baseline, scenes) < 0.2


def test_the_teachers_patches_are_compared_with_names_and_background_prompts_at_any_size():
    torch.manual_seed(0)
    model, processor = teachers.build_clip()
    image = Image.fromarray(render(11, 0).image)
    for size, own_values in ((64, True), (96, False)):
        labels = evaluation.teacher_patches(model.eval(), processor, size, own_values)([image, image])
        assert labels.shape == (2, 128, 128)
        assert labels.min() >= 0 and labels.max() <= len(CLASS_NAMES)
