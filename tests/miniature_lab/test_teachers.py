import numpy as np
import pytest
import torch
from transformers import CLIPModel, CLIPProcessor, SamModel, SamProcessor

from samclip_hf import miniature
from samclip_hf.miniature.scenes import BACKGROUND_PROMPTS, CLASS_NAMES, TEMPLATES, render
from samclip_hf.miniature_lab import teachers


def unchanged_parameters(model, step, steps=3):
    """Names of the trainable parameters that are unchanged after a few optimizer steps."""
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        step().backward()
        optimizer.step()
    after = dict(model.named_parameters())
    return [name for name, value in before.items() if torch.equal(value, after[name])]


def test_training_changes_every_trainable_parameter_of_sam():
    torch.manual_seed(0)
    model, _ = teachers.build_sam()
    auxiliary = teachers.DenseAuxiliary(64, cells=4)
    scenes = [render(0, index, num_objects=2) for index in range(2)]
    pixel_values = torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2) / 255
    rng = np.random.default_rng(0)
    unchanged = unchanged_parameters(
        model, lambda: sum(teachers.sam_step(model, auxiliary, pixel_values, scenes, rng)), steps=4
    )
    assert not unchanged
    assert not model.shared_image_embedding.positional_embedding.requires_grad


def test_training_changes_every_trainable_parameter_of_clip():
    torch.manual_seed(0)
    model, processor = teachers.build_clip()
    scenes = [render(0, index, held_out=False) for index in range(8)]
    rng = np.random.default_rng(0)
    views = [teachers.captioned_view(scene, rng, crop=True) for scene in scenes]
    unchanged = unchanged_parameters(model, lambda: sum(teachers.clip_step(model, processor, views, rng).values()))
    # The key bias of the last layer adds a constant to all scores of a query, so its gradient is 0 up to rounding.
    assert not [name for name in unchanged if "k_proj.bias" not in name]


def test_the_caption_of_a_crop_names_what_the_crop_contains():
    rng = np.random.default_rng(0)
    num_with_fewer_classes = 0
    for index in range(200):
        scene = render(0, index, num_objects=3, held_out=False)
        whole, crop = (teachers.captioned_view(scene, rng, crop) for crop in (False, True))
        assert whole.classes == set(scene.class_ids) and whole.background == scene.background
        assert crop.classes <= whole.classes and crop.image.size == whole.image.size == (64, 64)
        num_with_fewer_classes += crop.classes < whole.classes
        for view in (whole, crop):
            named = {i for i, name in enumerate(CLASS_NAMES) if f"a {name}" in view.caption}
            assert named == view.classes
            assert ("background" not in view.caption) or f"a {view.background} background" in view.caption
    assert num_with_fewer_classes > 50


def test_every_word_of_the_captions_is_one_token():
    tokenizer = teachers.build_tokenizer()
    for text in (*TEMPLATES, *BACKGROUND_PROMPTS, *CLASS_NAMES):
        text = text.format(CLASS_NAMES[0])
        assert len(tokenizer(text).input_ids) == len(text.split()) + 2
    assert tokenizer("and").input_ids == teachers.build_tokenizer()("and").input_ids


def test_the_contrastive_loss_averages_over_positives_and_skips_rows_without_positives():
    logits = torch.tensor([[1.0, 0.0, -1.0], [0.5, 2.0, 1.0], [9.0, 9.0, 9.0]])
    positives = torch.tensor([[True, False, False], [False, True, True], [False, False, False]])
    log_probability = logits.log_softmax(dim=1)
    expected = -(log_probability[0, 0] + (log_probability[1, 1] + log_probability[1, 2]) / 2) / 2
    assert teachers.contrastive_loss(logits, positives).item() == pytest.approx(expected.item())


def test_the_mask_loss_is_small_for_the_true_mask_and_uses_the_best_of_three():
    target = torch.zeros(1, 8, 8)
    target[:, 2:6, 2:6] = 1
    right = (target[:, None] * 2 - 1) * 20
    three = torch.cat([-right, right, torch.zeros_like(right)], dim=1)
    assert teachers.mask_loss(right, torch.ones(1, 1), target).item() < 1e-3
    # The other masks contribute only to 0.05 x the mean.
    per_mask = [
        teachers.mask_loss(three[:, k : k + 1], torch.tensor([[float(k == 1)]]), target) / 1.05 for k in range(3)
    ]
    expected = min(per_mask) + 0.05 * sum(per_mask) / 3
    assert teachers.mask_loss(three, torch.tensor([[0.0, 1.0, 0.0]]), target).item() == pytest.approx(expected.item())


def test_a_noisy_mask_prompt_is_positive_on_its_object_on_average():
    mask = torch.from_numpy(render(0, 1, num_objects=1).masks).float()
    target = torch.nn.functional.avg_pool2d(mask, 2).expand(32, -1, -1)
    prompts = teachers.noisy_mask_prompt(target, torch.Generator().manual_seed(0))
    assert prompts.shape == (32, 1, 64, 64)
    inside = (prompts[:, 0] * target).sum() / target.sum()
    assert inside > 0 > (prompts[:, 0] * (1 - target)).sum() / (1 - target).sum()


def test_an_error_point_is_in_the_error_region_and_labeled_by_the_kind_of_error():
    target = torch.zeros(2, 64, 64)
    target[:, :32] = 1
    logits = torch.full((2, 64, 64), -1.0)  # first mask: the object is missed
    logits[1] = 1.0  # second mask: the background is false positive
    points, labels = teachers.error_point(logits, target, torch.Generator().manual_seed(0))
    assert labels.tolist() == [[1], [0]]
    assert points[0, 0, 1] < 64 < points[1, 0, 1]


@pytest.mark.parametrize(
    ("folder", "model_class", "processor_class"),
    [(miniature.sam_teacher(), SamModel, SamProcessor), (miniature.clip_teacher(), CLIPModel, CLIPProcessor)],
)
def test_the_shipped_teachers_load_without_missing_weights(folder, model_class, processor_class):
    model, info = model_class.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert processor_class.from_pretrained(folder) is not None
    assert all(torch.isfinite(p).all() for p in model.parameters())
