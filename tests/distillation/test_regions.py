"""The region loss: targets from an unmerged model, masks of images of any shape, and training."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from samclip_hf import SamClipModel
from samclip_hf.distillation import RegionTeacher
from samclip_hf.distillation.collation import SamBatches
from samclip_hf.distillation.losses import region_distillation_loss
from samclip_hf.images import RunLengthMask, normalize

from ..conftest import assert_same

WEIGHTS = {"region_loss_weight": 1.0, "dense_loss_weight": 0.5, "regions_per_image": 2}


@pytest.fixture
def make_region_trainer(make_trainer, sa1b):
    """As `make_trainer`, with the region loss."""

    def make(stage: int = 2, **arguments):
        data = {"sam_data": [str(sa1b)], "sam_batch_size": 2, "masks_per_image": 2}
        return make_trainer(stage, **{**data, **WEIGHTS, **arguments})

    return make


def test_region_losses_of_a_known_example():
    # Two images on a grid of 1 x 2 patches. Image 0 has one region of both patches and one without patches, image 1
    # has two regions of one patch each.
    segments = torch.tensor([[[[1, 1]], [[0, 0]]], [[[1, 0]], [[0, 1]]]], dtype=torch.bool)
    x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    teacher = torch.stack([torch.stack([2 * x, y]), torch.stack([x, y])])
    students = torch.stack([torch.stack([x + y, x]), torch.stack([x, x])])
    dense = torch.stack([torch.stack([x, y]), torch.stack([y, y])]).transpose(1, 2)[:, :, None]  # (2, 2, 1, 2)
    parts = region_distillation_loss(students, dense, segments, teacher)
    assert parts["segment"].item() == pytest.approx(((1 - 0.5**0.5) + (0 + 1) / 2) / 2)
    assert parts["dense"].item() == pytest.approx(((0 + 1) / 2 + (1 + 0) / 2) / 2)


def test_an_image_without_regions_has_no_loss_and_no_gradient():
    students = torch.zeros(1, 1, 3, requires_grad=True)
    dense = torch.rand(1, 3, 2, 2, requires_grad=True)
    parts = region_distillation_loss(students, dense, torch.zeros(1, 1, 2, 2, dtype=torch.bool), torch.zeros(1, 1, 3))
    sum(parts.values()).backward()
    assert [part.item() for part in parts.values()] == [0, 0]
    assert students.grad.abs().sum() == 0 and dense.grad.abs().sum() == 0


def test_a_region_of_the_whole_image_has_the_embedding_of_the_image(clip_teacher):
    teacher = RegionTeacher(clip_teacher, image_size=32)
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    masks = torch.full((2, 1, 32, 32), 255, dtype=torch.uint8)
    regions = teacher(images, torch.tensor([[64, 64], [64, 64]]), masks)
    resized = F.interpolate(images.float(), (32, 32), mode="bicubic", antialias=True)
    pixel_values = normalize(resized, clip_teacher.image_mean, clip_teacher.image_std)
    with torch.no_grad():
        expected = clip_teacher.model.get_image_features(pixel_values=pixel_values).pooler_output
    assert_same(regions[:, 0], expected)


def test_targets_are_the_segment_embeddings_of_an_unmerged_model(clip_teacher, teacher_folders):
    unmerged = SamClipModel.from_teachers(teacher_folders["sam"], teacher_folders["clip"], merged=False).eval()
    teacher = RegionTeacher(clip_teacher)
    assert teacher.tower.image_size == unmerged.config.clip_image_size == 64
    height, width = 64, 32
    image = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    image[:, :, :height, :width] = torch.randint(256, (1, 3, height, width), dtype=torch.uint8)
    masks = torch.zeros(1, 2, 32, 32, dtype=torch.uint8)
    masks[0, 0, :16, :16] = 255
    masks[0, 1, 8:24, :8] = 255  # overlaps the first one
    regions = teacher(image, torch.tensor([[height, width]]), masks)

    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of SAM's image processor
    sizes = torch.tensor([[height, width]])
    vision_embeds = unmerged.get_vision_embeds(normalize(image, mean, std, sizes), sizes)
    segments = torch.zeros(1, 2, 8, 8, dtype=torch.bool)  # the image without its padding has 8 x 8 patches
    segments[0, 0, :4, :] = True
    segments[0, 1, 2:6, :4] = True
    with torch.no_grad():
        outputs = unmerged(vision_embeds=vision_embeds, reshaped_input_sizes=sizes, segments=segments)
    assert_same(F.normalize(regions, dim=-1), outputs.segment_embeds, tolerance=1e-3)


def test_masks_follow_the_resizing_and_the_padding_of_the_image():
    batches = SamBatches([], [], 64, [64], 1, 2, 2.0, 1, regions_per_image=2, mask_size=32)
    mask = np.zeros((100, 200), dtype=bool)
    mask[50:, :100] = True  # the lower left quarter
    masks = [RunLengthMask.encode(mask)] * 2
    sample = batches._with_prompts(Image.new("RGB", (200, 100)), masks, np.random.default_rng(0), "point", 64)
    expected = np.zeros((32, 32), dtype=np.uint8)
    expected[8:16, :16] = 255
    assert (sample["region_masks"][0] == expected).all()
    assert not sample["region_masks"][1].any()  # the same mask again


@pytest.mark.parametrize("stage", [1, 3])
def test_the_region_loss_trains_the_clip_head_alone_outside_stage_2(make_region_trainer, model, stage):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = make_region_trainer(stage)
    trainer.train()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in changed} == {"clip_head"}
    log = trainer.state.log_history[0]
    assert log["region_segment_loss"] > 0 and log["region_dense_loss"] > 0
    assert "sam_loss" not in log


def test_the_region_losses_have_their_weights_and_share_one_encoder_pass(make_region_trainer, model):
    passes = []
    model.vision_encoder.register_forward_hook(lambda *_: passes.append(1))
    losses = {}
    for name, weights in {
        "paper": {},
        "segment": {"region_loss_weight": 1.0},
        "dense": {"dense_loss_weight": 1.0},
        "both": {"region_loss_weight": 2.0, "dense_loss_weight": 3.0},
    }.items():
        none = {"region_loss_weight": 0.0, "dense_loss_weight": 0.0, "regions_per_image": 2 if weights else 8}
        trainer = make_region_trainer(2, **{**none, **weights})
        batch = next(iter(trainer.get_train_dataloader()))
        passes.clear()
        losses[name] = trainer.sam_loss(model, **batch["sam"]).item()
        assert len(passes) == 1
    segment, dense = losses["segment"] - losses["paper"], losses["dense"] - losses["paper"]
    assert segment > 0 and dense > 0
    assert losses["both"] == pytest.approx(losses["paper"] + 2 * segment + 3 * dense, rel=1e-4)


def test_the_region_loss_decreases(make_region_trainer):
    trainer = make_region_trainer(1, max_steps=25, learning_rate=3e-3)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "region_segment_loss" in entry]
    for name in ("region_segment_loss", "region_dense_loss"):
        assert log[-1][name] < 0.7 * log[0][name]


def test_micro_batches_have_the_gradient_of_the_whole_batch(make_region_trainer, model):
    trainer = make_region_trainer(1)
    batch = next(iter(trainer.get_train_dataloader()))["sam"]
    gradients = []
    for parts in ([batch], [{name: value[i : i + 1] for name, value in batch.items()} for i in range(2)]):
        model.zero_grad()
        for part in parts:
            (trainer.sam_loss(model, **part) / len(parts)).backward()
        gradients.append([p.grad.clone() for p in model.clip_head.parameters()])
    for whole, summed in zip(*gradients, strict=True):
        torch.testing.assert_close(summed, whole, atol=1e-6, rtol=1e-4)


def test_a_run_with_regions_resumes_bit_for_bit(make_region_trainer, model, tmp_path):
    start = {name: value.clone() for name, value in model.state_dict().items()}
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
    make_region_trainer(3, **settings).train()
    whole = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(start)
    make_region_trainer(3, **settings).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for name, value in model.state_dict().items():
        assert torch.equal(value, whole[name]), name
    with pytest.raises(ValueError, match=r"dense_loss_weight from 0\.5 to 0\.1"):
        make_region_trainer(3, **settings, dense_loss_weight=0.1).train(
            resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2")
        )


def test_an_evaluation_has_the_region_losses(make_region_trainer):
    arguments = {"eval_strategy": "steps", "eval_steps": 1, "eval_fraction": 0.3, "eval_batches": 2}
    metrics = make_region_trainer(3, **arguments).evaluate()
    expected = (
        metrics["eval_clip_loss"] + metrics["eval_region_segment_loss"] + 0.5 * metrics["eval_region_dense_loss"]
    )
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"regions_per_image": 4}, "There is no region loss"),
        ({"region_image_size": 64}, "There is no region loss"),
        ({"sam_batch_size": 2}, "Only stage 2 and the region loss"),
        ({"region_loss_weight": 1.0, "sam_loss_weight": 1.0}, "Only stage 2 has the SAM loss"),
        ({"region_loss_weight": -1.0}, "region_loss_weight must be 0 or more"),
        ({"region_loss_weight": 1.0, "region_image_size": 60}, "region_image_size must be a multiple"),
    ],
)
def test_arguments_without_effect_raise(make_trainer, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(1, **arguments)
