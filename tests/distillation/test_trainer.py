"""The trainer: what it trains, its log, checkpoints, evaluation and LoRA."""

import copy
import math
import os
import shutil
import signal

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    EarlyStoppingCallback,
    SamConfig,
    SamImageProcessor,
    SamModel,
    TrainerCallback,
    TrainerState,
)
from transformers.trainer_utils import set_seed

from samclip_hf import SamClipModel, miniature
from samclip_hf.distillation import (
    ClipTeacher,
    DataError,
    SamClipTrainer,
    SamTeacher,
    last_checkpoint,
    provenance,
)
from samclip_hf.distillation.losses import hard_mask_distillation_loss
from samclip_hf.images import normalize

from ..conftest import assert_same
from ..datasets.tars import jpeg, write_tar

TRAINED = {
    1: ("clip_head.",),
    2: ("clip_head.", "vision_encoder.", "mask_decoder."),
    3: ("clip_head.",),
}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_stage_changes_all_parameters_that_it_trains_and_no_others(make_trainer, model, stage):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    # The SAM loss is zero in the first step, in which student and teacher are equal.
    make_trainer(stage, max_steps=4 if stage == 2 else 1, seed=1).train()
    for name, value in model.state_dict().items():
        changed = not torch.equal(value, before[name])
        if name.startswith(TRAINED[stage]) and name.endswith("k_proj.bias"):
            continue  # has no gradient: the softmax ignores a constant that is added to all scores of a query
        assert changed == name.startswith(TRAINED[stage]), name


def test_only_trained_parts_get_gradients(make_trainer, model):
    trainer = make_trainer(stage=1)
    batch = next(iter(trainer.get_train_dataloader()))
    assert set(batch) == {"clip", "usable_fractions"}
    trainer.clip_loss(model, **batch["clip"]).backward()
    with_gradient = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {"clip_head"}


@pytest.mark.parametrize("mask_prompt_fraction", [0.0, 1.0])
def test_the_initial_sam_loss_is_zero(make_trainer, model, mask_prompt_fraction):
    trainer = make_trainer(mask_prompt_fraction=mask_prompt_fraction)
    batch = next(iter(trainer.get_train_dataloader()))["sam"]
    assert ("class_probabilities" in batch) == (mask_prompt_fraction == 1)
    assert trainer.sam_loss(model, **batch).item() == pytest.approx(0, abs=1e-6)


def test_sams_own_mask_losses_can_be_selected(make_trainer, model):
    trainer = make_trainer(
        mask_loss="sam", focal_weight=5.0, dice_weight=2.0, iou_head_weight=0.5, sam_loss_weight=3.0
    )
    batch = next(iter(trainer.get_train_dataloader()))["sam"]
    outputs = []
    model.register_forward_hook(lambda *arguments: outputs.append(arguments[-1]))
    loss = trainer.sam_loss(model, **batch)  # student and teacher are equal
    (masks, scores) = outputs[0].pred_masks, outputs[0].iou_scores
    parts = hard_mask_distillation_loss(masks, masks, scores, scores, focal_weight=5.0, dice_weight=2.0)
    assert parts["iou_head"] == 0
    torch.testing.assert_close(loss, 3 * (5 * parts["focal"] + 2 * parts["dice"]), rtol=1e-4, atol=0)
    assert loss > 0.1


def test_mask_prompts_are_those_of_the_paper_s_composition(make_trainer, model, sam):
    """Teacher and student get the same prompts in one pass of the encoder: per mask, three points in it and a coarse
    mask, with one mask as output. SAM's answers to them, one prompt at a time, are the truth."""
    passes, prompts = [], []
    trainer = make_trainer(mask_prompt_fraction=1.0)
    batch = next(iter(trainer.get_train_dataloader()))["sam"]
    torch.nn.init.normal_(model.vision_encoder.pos_embed)
    model.vision_encoder.register_forward_hook(lambda *_: passes.append(1))
    model.register_forward_pre_hook(lambda _, args, kwargs: prompts.append(kwargs), with_kwargs=True)
    loss = trainer.sam_loss(model, **batch)
    loss.backward()
    assert len(passes) == 1 and loss > 0
    assert all(p.grad is not None for p in model.mask_decoder.output_hypernetworks_mlps[0].parameters())
    (given,) = prompts
    assert given["input_points"].shape == (2, 2, 3, 2) and given["multimask_output"] is False
    assert given["input_masks"].shape == (2, 2, 32, 32)
    teacher_masks, teacher_iou = trainer.sam_teacher(
        batch["images"],
        batch["content_sizes"],
        **{name: given[name] for name in ("input_points", "input_labels", "input_masks", "multimask_output")},
    )
    for number in range(2):
        one = {name: given[name][:, number : number + 1] for name in ("input_points", "input_labels", "input_masks")}
        with torch.no_grad():
            expected = sam(given["pixel_values"], **one, multimask_output=False)
        assert_same(teacher_masks[:, number : number + 1], expected.pred_masks)
        assert_same(teacher_iou[:, number : number + 1], expected.iou_scores)


def test_mask_prompts_have_the_student_s_resolution(make_trainer, model):
    trainer = make_trainer(mask_prompt_fraction=1.0, sam_resolutions=[32])
    batch = next(iter(trainer.get_train_dataloader()))["sam"]
    prompts = []
    model.register_forward_pre_hook(lambda _, args, kwargs: prompts.append(kwargs), with_kwargs=True)
    trainer.sam_loss(model, **batch).backward()
    assert prompts[0]["pixel_values"].shape[-1] == 32 and prompts[0]["input_masks"].shape[-2:] == (16, 16)


def test_mask_prompts_change_no_other_step(make_trainer):
    """Steps with points and boxes are the same with and without mask prompts."""
    drawn = {}
    for fraction in (0.0, 0.5):
        loader = iter(make_trainer(mask_prompt_fraction=fraction).get_train_dataloader())
        drawn[fraction] = [next(loader)["sam"] for _ in range(8)]
    with_masks = ["class_probabilities" in batch for batch in drawn[0.5]]
    assert 0 < sum(with_masks) < 8
    for has_masks, before, after in zip(with_masks, drawn[0.0], drawn[0.5], strict=True):
        assert torch.equal(before["images"], after["images"])
        if not has_masks:
            assert before.keys() == after.keys()
            assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_the_gradient_of_a_step_is_that_of_the_summed_losses(make_trainer, model):
    torch.nn.init.normal_(model.vision_encoder.pos_embed)  # so that the SAM loss is not zero
    trainer = make_trainer()
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.current_gradient_accumulation_steps = 1
    total = trainer.training_step(model, {**batch})
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    summed = trainer.clip_loss(model, **batch["clip"]) + trainer.sam_loss(model, **batch["sam"])
    summed.backward()
    torch.testing.assert_close(total, summed.detach())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_accumulated_micro_batches_have_the_gradient_of_the_whole_batch(make_trainer, model):
    torch.nn.init.normal_(model.vision_encoder.pos_embed)
    trainer = make_trainer()
    batch = next(iter(trainer.get_train_dataloader()))
    halves = [
        {task: {name: value.chunk(2)[i] for name, value in batch[task].items()} for task in ("clip", "sam")}
        for i in range(2)
    ]
    gradients = []
    for steps in ([batch], halves):
        model.zero_grad()
        trainer.current_gradient_accumulation_steps = len(steps)
        for step in steps:
            trainer.training_step(model, {**step, "usable_fractions": {"clip": 1.0, "sam": 1.0}})
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "rates"),
    [
        ({}, {"head": 1e-3, "encoder": 1e-4, "decoder": 1e-4}),
        ({"encoder_lr_multiplier": 0.5}, {"head": 1e-3, "encoder": 5e-4, "decoder": 5e-4}),
        ({"decoder_lr_multiplier": 0.0}, {"head": 1e-3, "encoder": 1e-4, "decoder": 0}),
        (
            {"encoder_lr_multiplier": 1.0, "decoder_lr_multiplier": 0.01},
            {"head": 1e-3, "encoder": 1e-3, "decoder": 1e-5},
        ),
    ],
)
def test_encoder_and_mask_decoder_have_learning_rates_of_their_own(make_trainer, model, arguments, rates):
    trainer = make_trainer(learning_rate=1e-3, weight_decay=0.1, **arguments)
    groups = {"clip_head": "head", "vision_encoder": "encoder", "mask_decoder": "decoder"}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in trainer.create_optimizer().param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert group["name"] == groups[name.partition(".")[0]]
            assert group["lr"] == pytest.approx(rates[group["name"]])
            *_, module, last = name.split(".")
            without_decay = {"pos_embed", "rel_pos_h", "rel_pos_w", "mask_tokens", "iou_token"} & {module, last}
            has_decay = not (without_decay or last == "bias" or "norm" in name)
            assert group["weight_decay"] == (0.1 if has_decay else 0), name


def test_the_log_has_all_losses_metrics_and_gradient_norms(make_trainer):
    trainer = make_trainer(max_steps=2, logging_steps=2, seed=16)  # both resolutions, points and boxes
    metrics = trainer.train().metrics
    logged = trainer.state.log_history[0]
    assert logged.keys() >= {
        *("loss", "clip_loss", "sam_loss", "sam_focal", "sam_dice", "sam_iou_head"),
        *("cosine_32px", "cosine_64px", "mask_iou_point", "mask_iou_box"),
        *(
            "learning_rate_head",
            "learning_rate_encoder",
            "learning_rate_decoder",
            "images_per_second",
            "peak_memory_gb",
        ),
        *("grad_norm", "grad_norm_clip_head", "grad_norm_vision_encoder", "grad_norm_mask_decoder"),
    }
    assert logged["loss"] == pytest.approx(logged["clip_loss"] + 10 * logged["sam_loss"], rel=1e-4)
    assert metrics["train_images_seen"] > 2 * 2
    one_step = make_trainer(max_steps=1)
    one_step.train()
    logged = one_step.state.log_history[0]
    parts = [logged[f"grad_norm_{part}"] for part in ("clip_head", "vision_encoder", "mask_decoder")]
    assert logged["grad_norm"] == pytest.approx(math.hypot(*parts), rel=1e-4)


def test_the_clip_loss_decreases(make_trainer):
    trainer = make_trainer(stage=1, max_steps=30, logging_steps=10, clip_resolutions=[32])
    trainer.train()
    losses = [entry["clip_loss"] for entry in trainer.state.log_history if "clip_loss" in entry]
    assert losses[-1] < 0.8 * losses[0]


def test_teachers_are_frozen_and_not_saved(make_trainer, model, sam_teacher, tmp_path):
    before = {name: value.clone() for name, value in sam_teacher.state_dict().items()}
    trainer = make_trainer(max_steps=1)
    trainer.train()
    trainer.save_model()
    assert not sam_teacher.training
    assert all(torch.equal(value, before[name]) for name, value in sam_teacher.state_dict().items())

    loaded = AutoModel.from_pretrained(tmp_path / "run")
    assert type(loaded) is SamClipModel
    for name, value in loaded.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], msg=name)
    assert AutoProcessor.from_pretrained(tmp_path / "run").image_processor.size["longest_edge"] == 64


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(make_trainer, model, tmp_path, num_workers):
    start = {name: value.clone() for name, value in model.state_dict().items()}
    settings = {
        "mask_prompt_fraction": 0.5,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": None,
    }
    settings |= {"logging_steps": 2, "dataloader_num_workers": num_workers, "gradient_accumulation_steps": 2}

    def curve(trainer):
        return {
            entry["step"]: {
                name: value for name, value in entry.items() if not name.startswith(("images_per", "epoch", "peak"))
            }
            for entry in trainer.state.log_history
            if "loss" in entry
        }

    trainer = make_trainer(**settings)
    metrics = trainer.train().metrics
    whole = {name: value.clone() for name, value in model.state_dict().items()}
    assert metrics["train_images_seen"] > 0
    for step in (1, 3):  # between two logs
        model.load_state_dict(start)
        resumed = make_trainer(**settings)
        resumed_metrics = resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}")).metrics
        assert resumed_metrics["train_images_seen"] == metrics["train_images_seen"]
        assert curve(resumed) == curve(trainer) and len(curve(resumed)) == 2
        for name, value in model.state_dict().items():
            assert torch.equal(value, whole[name]), name


def test_a_checkpoint_of_other_data_raises(make_trainer, tmp_path):
    make_trainer(1, max_steps=1, save_strategy="steps", save_steps=1).train()
    checkpoint = str(tmp_path / "run" / "checkpoint-1")
    with pytest.raises(
        DataError, match=r"with other settings: seed from 42 to 1; num_readers from 16 to 8\. Start a new run"
    ):
        make_trainer(1, max_steps=2, seed=1, num_readers=8).train(resume_from_checkpoint=checkpoint)


def test_a_checkpoint_of_an_earlier_release_is_resumed(make_trainer, tmp_path):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
    trainer = make_trainer(1, **settings)
    trainer.train()
    path = tmp_path / "run" / "checkpoint-1" / "stream_state.json"
    text = path.read_text()
    for current, former in {
        "micro_batches": "item",
        "readers": "lanes",
        "num_readers": "data_lanes",
        "eval_fraction": "held_out_share",
        "clip_data_weights": "clip_data_shares",
    }.items():
        assert f'"{current}": ' in text
        text = text.replace(f'"{current}": ', f'"{former}": ')
    path.write_text(text)
    resumed = make_trainer(1, **settings)
    resumed.train(resume_from_checkpoint=str(path.parent))
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (trainer, resumed)]
    assert len(losses[0]) == 2 and losses[1] == losses[0]


def test_incomplete_checkpoints_are_skipped(make_trainer, tmp_path, caplog):
    assert last_checkpoint(tmp_path / "nowhere") is None
    make_trainer(1, max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=3).train()
    run = tmp_path / "run"
    assert last_checkpoint(run) == run / "checkpoint-3"
    whole = (run / "checkpoint-3" / "trainer_state.json").read_text()
    (run / "checkpoint-3" / "trainer_state.json").write_text(whole[: len(whole) // 2])
    (run / "checkpoint-10").mkdir()
    assert last_checkpoint(run) == run / "checkpoint-2"
    assert "checkpoint-10, which is incomplete" in caplog.text and "checkpoint-3, which is incomplete" in caplog.text


def test_compiled_training_uses_static_shapes(make_trainer, monkeypatch):
    assert make_trainer(1).accelerator.state.dynamo_plugin.dynamic is None
    for dynamic in (False, True):
        trainer = make_trainer(1, torch_compile=True, torch_compile_backend="aot_eager")
        assert trainer.accelerator.state.dynamo_plugin.dynamic is dynamic
        monkeypatch.setenv("ACCELERATE_DYNAMO_USE_DYNAMIC", "true")  # the user's choice


@pytest.mark.parametrize("part", ["model", "optimizer.pt", "trainer_state.json"])
def test_a_full_disk_raises_and_keeps_the_earlier_checkpoint(make_trainer, tmp_path, monkeypatch, part):
    trainer = make_trainer(1, max_steps=2, save_strategy="steps", save_steps=1, save_total_limit=1)
    no_space = OSError(28, "No space left on device")

    def full(original):
        def write(*args, **kwargs):
            if trainer.state.global_step == 2:
                raise no_space
            return original(*args, **kwargs)

        return write

    owner, name = {
        "model": (trainer, "_save"),
        "optimizer.pt": (torch, "save"),
        "trainer_state.json": (TrainerState, "save_to_json"),
    }[part]
    monkeypatch.setattr(owner, name, full(getattr(owner, name)))
    with pytest.raises(OSError, match=r"checkpoint-2 cannot be written and was removed: .*No space left"):
        trainer.train()
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-1"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_training_with_a_checkpoint(make_trainer, tmp_path, number):
    trainer = make_trainer(1, max_steps=50, save_strategy="no")
    handler = signal.getsignal(number)

    class Kill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                os.kill(os.getpid(), number)

    trainer.add_callback(Kill())
    trainer.train()
    assert trainer.preemption.signal == number
    assert last_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-3"
    assert signal.getsignal(number) == handler


def test_steps_whose_gradient_is_not_finite_are_skipped(make_trainer, model, monkeypatch):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = make_trainer(stage=1, max_steps=3, logging_steps=3)
    monkeypatch.setattr(
        trainer, "clip_loss", lambda model, **batch: model.clip_head.layer_norm.weight.sum() * float("nan")
    )
    trainer.train()
    assert trainer.state.log_history[0]["skipped_steps"] == 3
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(FloatingPointError, match="norms of 10 steps in a row"):
        trainer = make_trainer(stage=1, max_steps=20, skip_step_grad_norm=1e-9)
        trainer.train()


def test_corrupt_images_are_skipped_and_counted(make_trainer, tmp_path):
    write_tar(tmp_path / "0.tar", {"0.jpg": jpeg(0), "1.jpg": b"not an image", "2.jpg": jpeg(2)})
    trainer = make_trainer(stage=1, clip_data=[str(tmp_path / "0.tar")])
    metrics = trainer.train().metrics
    assert metrics["skipped_broken_image"] >= 3
    assert trainer.state.global_step == 3


def test_images_are_normalized_as_in_the_teachers_image_processors(sam_teacher, clip_teacher):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (1, 3, 48, 64), generator=generator, dtype=torch.uint8)
    padded = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    padded[:, :, :48] = images
    expected = SamImageProcessor(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64})(
        images, return_tensors="pt"
    )
    own = normalize(padded, sam_teacher.image_mean, sam_teacher.image_std, torch.tensor([[48, 64]]))
    torch.testing.assert_close(own, expected["pixel_values"], atol=1e-5, rtol=1e-5)

    square = padded[:, :, :32, :32]
    size = {"height": 32, "width": 32}
    expected = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)(square, return_tensors="pt")
    own = normalize(square, clip_teacher.image_mean, clip_teacher.image_std)
    torch.testing.assert_close(own, expected["pixel_values"], atol=1e-5, rtol=1e-5)


# ---- half precision ----


def test_with_bf16_masks_and_sam_teacher_stay_in_float32(make_trainer, model, sam_teacher):
    trainer = make_trainer(bf16=True)
    batch = next(iter(trainer.get_train_dataloader()))["sam"]
    dtypes = {}

    def record(name):
        return lambda module, args, output: dtypes.__setitem__(name, output.dtype)

    modules = {
        "encoder": model.vision_encoder.layers[0].mlp.lin1,
        "decoder": model.mask_decoder.upscale_conv2,
        "teacher": sam_teacher.model.vision_encoder.layers[0].mlp.lin1,
    }
    handles = [module.register_forward_hook(record(name)) for name, module in modules.items()]
    model.train()
    with trainer.accelerator.autocast():
        trainer.sam_loss(model, **batch)
    assert dtypes == {"encoder": torch.bfloat16, "decoder": torch.float32, "teacher": torch.float32}
    model.eval()
    with torch.no_grad(), trainer.accelerator.autocast():
        trainer.sam_loss(model, **batch)
    assert dtypes["decoder"] == torch.bfloat16  # inference is as fast as autocast makes it
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_teachers_saved_in_half_precision_train_a_float32_student(
    make_trainer, sam, clip, sam_teacher, teacher_folders, tmp_path, dtype
):
    for name, teacher in (("sam", sam), ("clip", clip)):
        shutil.copytree(teacher_folders[name], tmp_path / name)
        copy.deepcopy(teacher).to(dtype).save_pretrained(tmp_path / name)
    half_sam, half_clip = SamTeacher(str(tmp_path / "sam")), ClipTeacher(str(tmp_path / "clip"))
    assert {p.dtype for teacher in (half_sam, half_clip) for p in teacher.parameters()} == {torch.float32}
    images, points = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8), torch.tensor([[[[20.0, 30.0]]]])
    masks, _ = half_sam(images, torch.tensor([[64, 64]]), input_points=points)
    expected, _ = sam_teacher(images, torch.tensor([[64, 64]]), input_points=points)
    torch.testing.assert_close(masks, expected, atol=0.05 * expected.abs().max().item(), rtol=0)

    student = SamClipModel.from_teachers(str(tmp_path / "sam"), str(tmp_path / "clip"))
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    trainer = make_trainer(student=student, clip_teacher=half_clip, sam_teacher=half_sam, max_steps=1)
    assert math.isfinite(trainer.train().metrics["train_loss"])


def test_a_half_precision_student_is_trained_and_saved_in_float32(make_trainer, model, tmp_path, caplog):
    trainer = make_trainer(student=copy.deepcopy(model).to(torch.bfloat16), max_steps=2)
    assert "converted to float32" in caplog.text
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    moved = [
        p.ne(before[name]).float().mean().item() for name, p in trainer.model.named_parameters() if p.requires_grad
    ]
    assert sum(moved) / len(moved) > 0.8
    trainer.save_model()
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert {value.dtype for value in saved.values() if value.is_floating_point()} == {torch.float32}
    config = AutoConfig.from_pretrained(tmp_path / "run")
    assert {part.dtype for part in (config, config.vision_config, config.text_config)} == {torch.float32}


# ---- errors ----


def test_teachers_that_do_not_match_the_student_raise(model, sam, clip, teacher_folders, tmp_path):
    sam_config, clip_config = sam.config.to_dict(), clip.config.to_dict()
    for part in ("vision_config", "prompt_encoder_config"):
        sam_config[part]["patch_size"] = 16
    clip_config["projection_dim"] = 12
    teachers = {
        "clip": CLIPModel(CLIPConfig.from_dict(clip_config)),
        "sam": SamModel(SamConfig.from_dict(sam_config)),
    }
    for name, teacher in teachers.items():
        teacher.save_pretrained(tmp_path / name)
        shutil.copy(teacher_folders[name] / "preprocessor_config.json", tmp_path / name)
    with pytest.raises(ValueError, match=r"text embedding space has 20 dimensions, the CLIP teacher's 12"):
        ClipTeacher(str(tmp_path / "clip")).check(model)
    with pytest.raises(ValueError, match=r"patch size is 16 px, the student's 8 px"):
        SamTeacher(str(tmp_path / "sam")).check(model)
    with pytest.raises(TypeError, match=r"clip_teacher must be a CLIPModel or a SiglipModel, but .* 'sam'"):
        ClipTeacher(str(teacher_folders["sam"]))


def test_a_clip_teacher_with_another_text_tower_raises(model, clip_teacher):
    set_seed(0)
    torch.nn.init.normal_(model.text_projection.weight)
    with pytest.raises(ValueError, match="text tower is not the text tower of this CLIP teacher"):
        clip_teacher.check(model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_steps": -1}, "max_steps must be set for streaming data"),
        ({"clip_resolutions": [30]}, r"clip_resolutions must be multiples of the student's patch size, 8: got \[30\]"),
        ({"min_crop_scale": 0.0}, r"min_crop_scale must be above 0 and at most 1, got 0\.0"),
        ({"mask_prompt_fraction": 1.5}, r"mask_prompt_fraction must be between 0 and 1, got 1\.5"),
        ({"mask_loss": "focal"}, "mask_loss must be quality or sam, got 'focal'"),
        ({"sam_batch_size": 0}, "sam_batch_size must be 1 or more, got 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be 1 or more, got 0"),
        ({"learning_rate": -1e-3}, "learning_rate must be 0 or more, got -0.001"),
        ({"stage": 4}, "stage must be 1, 2 or 3, got 4"),
        ({"sam_data": ["/nowhere/sa1b"]}, "No data at '/nowhere/sa1b'"),
    ],
)
def test_invalid_arguments_raise(make_trainer, arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make_trainer(**arguments)


# ---- resuming with other settings ----


@pytest.mark.parametrize(
    ("arguments", "change"),
    [
        ({"learning_rate": 2e-3}, r"learning_rate from 0\.001 to 0\.002"),
        ({"weight_decay": 0.1}, r"weight_decay from 0\.0 to 0\.1"),
        ({"clip_resolutions": [32]}, r"clip_resolutions from \[32, 64\] to \[32\]"),
        ({"sam_resolutions": [32]}, r"sam_resolutions from \[\] to \[32\]"),
        ({"sam_loss_weight": 5.0}, r"sam_loss_weight from 10\.0 to 5\.0"),
        ({"optim": "sgd"}, "optim from adamw_torch.* to sgd"),
        ({"lora_r": 2}, "lora_r from 0 to 2"),
        ({"clip_batch_size": 8}, "clip_batch_size of all processes from 4 to 8"),
        ({"gradient_accumulation_steps": 2}, "clip_batch_size of all processes from 4 to 8"),
        ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type from linear to cosine"),
        ({"bf16": True}, "bf16 from False to True"),
    ],
)
def test_a_checkpoint_is_not_resumed_with_other_settings(make_trainer, stage2_checkpoint, arguments, change):
    with pytest.raises(DataError, match=f"cannot be resumed with other settings: .*{change}.*Start a new run"):
        make_trainer(max_steps=2, **arguments).train(resume_from_checkpoint=stage2_checkpoint)


@pytest.fixture
def stage2_checkpoint(make_trainer, tmp_path) -> str:
    make_trainer(max_steps=1, save_strategy="steps", save_steps=1).train()
    return str(tmp_path / "run" / "checkpoint-1")


def test_a_checkpoint_is_not_resumed_with_another_teacher(make_trainer, stage2_checkpoint, clip_teacher):
    other = copy.deepcopy(clip_teacher)
    with torch.no_grad():
        other.model.visual_projection.weight += 0.01
    with pytest.raises(DataError, match="clip_teacher's checksum from"):
        make_trainer(max_steps=2, clip_teacher=other).train(resume_from_checkpoint=stage2_checkpoint)


def test_the_same_batch_may_be_divided_otherwise_on_resume(make_trainer, stage2_checkpoint):
    parts = {"clip_batch_size": 2, "sam_batch_size": 1, "gradient_accumulation_steps": 2}
    trainer = make_trainer(max_steps=2, **parts)
    trainer.train(resume_from_checkpoint=stage2_checkpoint)
    assert trainer.state.global_step == 2


def test_adapters_are_not_resumed_on_another_model(make_trainer, model, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "lora_r": 2}
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.vision_encoder.patch_embed.projection.weight += 0.01
    make_trainer(max_steps=1, **settings).train()
    with pytest.raises(DataError, match="model's checksum from"):
        make_trainer(max_steps=2, student=other, **settings).train(str(tmp_path / "run" / "checkpoint-1"))


def test_a_checkpoint_of_the_model_alone_is_not_resumed(make_trainer, tmp_path):
    make_trainer(1, max_steps=1, save_strategy="steps", save_steps=1, save_only_model=True).train()
    with pytest.raises(DataError, match="was saved with save_only_model and cannot be resumed"):
        make_trainer(1, max_steps=2).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


def test_other_parameter_groups_of_the_optimizer_are_an_error(make_trainer, stage2_checkpoint):
    class OneGroup(SamClipTrainer):
        def parameter_group(self, name):
            return "all", 1.0

    with pytest.raises(DataError, match="its optimizer has other groups of parameters"):
        make_trainer(max_steps=2, trainer_class=OneGroup).train(resume_from_checkpoint=stage2_checkpoint)


# ---- optimizers, frozen layers, provenance ----


def test_an_optimizer_and_a_schedule_can_be_passed(make_trainer, model, tmp_path):
    parameters = [*model.clip_head.parameters()]
    optimizer = torch.optim.SGD([{"params": parameters[:5], "lr": 0.1}, {"params": parameters[5:], "lr": 0.2}])
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    before = [parameter.clone() for parameter in parameters]
    trainer = make_trainer(1, max_steps=2, optimizers=(optimizer, schedule))
    metrics = trainer.train().metrics
    assert any(not torch.equal(old, new) for old, new in zip(before, parameters, strict=True))
    assert trainer.state.log_history[1]["learning_rate_0"] == pytest.approx(0.025)
    assert trainer.state.log_history[1]["learning_rate_1"] == pytest.approx(0.05)
    trainer.save_provenance(metrics)
    (stage,) = provenance.read(tmp_path / "run")
    assert (stage["arguments"]["optim"], stage["arguments"]["learning_rate"]) == ("SGD", [0.1, 0.2])
    with pytest.raises(ValueError, match=r"The optimizer lacks .* that are trained, such as vision_enc"):
        make_trainer(2, optimizers=(optimizer, None))


def test_a_class_of_optimizers_gets_the_parameter_groups(make_trainer, model):
    trainer = make_trainer(1, max_steps=1, optimizer_cls_and_kwargs=(torch.optim.SGD, {"momentum": 0.9}))
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, torch.optim.SGD)
    assert {(group["name"], group["initial_lr"], group["momentum"]) for group in trainer.optimizer.param_groups} == {
        ("head", 1e-3, 0.9)
    }


def test_optimizers_that_cannot_be_used_raise_before_the_training(make_trainer):
    for optim in ("adamw_bnb_8bit", "galore_adamw", "lomo"):
        with pytest.raises(ValueError, match=f"optim {optim} (needs another package|makes parameter groups)"):
            make_trainer(1, optim=optim)


@pytest.mark.parametrize("lora_r", [0, 2])
def test_layers_that_the_user_has_frozen_stay_frozen_and_are_recorded(make_trainer, model, tmp_path, lora_r):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.vision_encoder.layers[0].requires_grad_(False)
    model.clip_head.layers[1].mlp.requires_grad_(False)
    model.vision_encoder.pos_embed.requires_grad_(False)
    frozen = ("vision_encoder.layers.0.", "clip_head.layers.1.mlp.", "vision_encoder.pos_embed")
    settings = {"learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 4, "lora_r": lora_r, "seed": 1}
    trainer = make_trainer(max_steps=4, **settings)
    metrics = trainer.train().metrics
    trainer.save_provenance(metrics)
    if lora_r:
        trainer.model.merge_and_unload()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert not [name for name in changed if name.startswith(frozen)]
    assert any(name.startswith("vision_encoder.layers.1.") for name in changed)
    assert any(name.startswith("clip_head.layers.1.attn.") for name in changed)
    (stage,) = provenance.read(tmp_path / "run")
    assert set(stage["frozen"]) == {name.rstrip(".") for name in frozen}

    checkpoint = str(tmp_path / "run" / "checkpoint-4")
    resumed = make_trainer(max_steps=6, **settings | {"save_steps": 6})
    if not lora_r:  # the weights of the model have changed
        resumed.train(resume_from_checkpoint=checkpoint)
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert not [name for name in changed if name.startswith(frozen)]
        model.requires_grad_(True)
        with pytest.raises(DataError, match=r"frozen from .* to"):
            make_trainer(max_steps=6, **settings).train(resume_from_checkpoint=checkpoint)


def test_one_model_can_pass_through_all_stages(make_trainer, model):
    for stage in (1, 2, 3, 2):
        trainer = make_trainer(stage, max_steps=1)
        assert not trainer.frozen_by_user
        trained = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained == {part.rstrip(".") for part in TRAINED[stage]}
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="All parameters of clip_head are frozen"):
        make_trainer(1)


def test_the_sam_loss_is_a_metric_if_all_that_it_trains_is_frozen(make_trainer, model):
    model.vision_encoder.requires_grad_(False)
    model.mask_decoder.requires_grad_(False)
    trainer = make_trainer(2, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["sam_loss"] == pytest.approx(0, abs=1e-6)


def test_provenance_records_what_happened(make_trainer, model, teacher_folders, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    trainer = make_trainer(2, max_steps=5, bf16=True, callbacks=[Stop()])
    metrics = trainer.train().metrics
    trainer.save_model()
    trainer.save_provenance(metrics)
    (first,) = provenance.read(tmp_path / "run")
    assert first["steps"] == 2 and first["arguments"]["max_steps"] == 5
    assert first["arguments"]["bf16"] is True and first["arguments"]["sam_loss_weight"] == 10
    folders = {f"{name}_teacher": str(folder) for name, folder in teacher_folders.items()}
    assert first["teachers"] == folders
    assert {name: first["arguments"][name] for name in folders} == folders

    student = SamClipModel.from_pretrained(tmp_path / "run")
    settings = {"output_dir": str(tmp_path / "next"), "model": str(tmp_path / "run"), "save_strategy": "steps"}
    third = make_trainer(3, student=student, max_steps=1, save_steps=1, **settings)
    third.save_provenance(third.train().metrics)
    stages = provenance.read(tmp_path / "next")
    assert [stage["stage"] for stage in stages] == [2, 3] and stages[0] == first
    assert "sam_teacher" not in stages[1]["teachers"]
    assert not {"sam_loss_weight", "sam_data", "clip_head_layers"} & stages[1]["arguments"].keys()

    (tmp_path / "run" / "provenance.json").unlink()  # the checkpoint has the earlier stages
    resumed = make_trainer(3, student=student, max_steps=2, save_steps=1, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "next" / "checkpoint-1"))
    resumed.save_provenance({})
    assert provenance.read(tmp_path / "next")[0] == first


def test_a_new_student_has_no_earlier_stages(make_trainer, sam, clip, monkeypatch):
    monkeypatch.chdir(miniature.checkpoint())  # the folder of another model
    student = SamClipModel.from_teachers(sam, clip)
    assert make_trainer(1, student=student).earlier_stages == []


# ---- LoRA ----


def test_adapters_train_save_load_and_merge_into_a_checkpoint(make_trainer, model, tmp_path):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    base = copy.deepcopy(model)
    trainer = make_trainer(max_steps=4, lora_r=2, learning_rate=1e-2)
    trainer.train()
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    parts = {name.split(".")[2] for name in trained}
    assert parts == {"vision_encoder", "mask_decoder", "clip_head"}
    assert all("lora_" in name or "clip_head.modules_to_save" in name for name in trained)
    assert {group["name"] for group in trainer.optimizer.param_groups} == {"encoder", "decoder", "head"}

    pixel_values, points = torch.randn(1, 3, 64, 64), torch.tensor([[[[20.0, 30.0]]]])
    adapted = trainer.model.eval()
    adapted.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = adapted(pixel_values=pixel_values, input_points=points, input_ids=torch.tensor([[48, 5, 49]]))
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        merged = loaded.merge_and_unload()
        assert type(merged) is SamClipModel and merged.state_dict().keys() == before.keys()
        merged.save_pretrained(tmp_path / "merged")
        for other in (merged, SamClipModel.from_pretrained(tmp_path / "merged").eval()):
            actual = other(pixel_values=pixel_values, input_points=points, input_ids=torch.tensor([[48, 5, 49]]))
            for name in ("pred_masks", "iou_scores", "image_embeds", "logits_per_image"):
                torch.testing.assert_close(actual[name], expected[name], atol=1e-5, rtol=1e-4)
    changed = {
        name.split(".")[0] for name, value in merged.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed == {"vision_encoder", "mask_decoder", "clip_head"}


def test_adapters_resume_bit_for_bit(make_trainer, model, tmp_path):
    start = {name: value.clone() for name, value in model.state_dict().items()}
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lora_r": 2}
    trainer = make_trainer(**settings)
    trainer.train()
    whole = {name: value.clone() for name, value in trainer.model.merge_and_unload().state_dict().items()}
    model.load_state_dict(start)
    resumed = make_trainer(**settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for name, value in resumed.model.merge_and_unload().state_dict().items():
        assert torch.equal(value, whole[name]), name


def test_adapters_are_supported_in_stage_2_only(make_trainer):
    with pytest.raises(ValueError, match="supported in stage 2 only, got lora_r 4 in stage 1"):
        make_trainer(stage=1, lora_r=4)


# ---- evaluation ----


def test_an_evaluation_uses_held_out_samples_and_does_not_change_the_training(make_trainer, model, tmp_path):
    settings = {"max_steps": 2, "eval_fraction": 0.4, "logging_steps": 2}
    start = {name: value.clone() for name, value in model.state_dict().items()}
    plain = make_trainer(**settings)
    plain.train()
    whole = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(start)
    texts = {"eval_prompts": ["ab", "cd"], "eval_strategy": "steps", "eval_steps": 1, "eval_batches": 2}
    trainer = make_trainer(**settings, **texts)
    trainer.train()
    for name, value in model.state_dict().items():
        assert torch.equal(value, whole[name]), name
    logs = [[e for e in t.state.log_history if "loss" in e] for t in (plain, trainer)]
    assert logs[0][0]["clip_loss"] == logs[1][0]["clip_loss"]

    evaluations = [entry for entry in trainer.state.log_history if "eval_clip_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [1, 2]
    assert evaluations[0].keys() >= {"eval_sam_loss", "eval_clip_loss"}
    again = trainer.evaluate()
    assert again["eval_clip_loss"] == evaluations[1]["eval_clip_loss"]
    streams = trainer.train_dataset.tasks["clip"].streams
    train, held_out = (
        {sample["key"] for stream in part for number in range(3) for _, sample in stream.read(number)}
        for part in (streams, [stream.complement() for stream in streams])
    )
    assert held_out and not train & held_out
    panels = sorted(path.name for path in (tmp_path / "run" / "panels").iterdir())
    assert panels == ["step_000001.png", "step_000002.png"]
    with Image.open(tmp_path / "run" / "panels" / panels[0]) as panel:
        assert min(panel.size) > 200


def test_an_evaluation_requires_held_out_samples(make_trainer):
    with pytest.raises(ValueError, match="eval_fraction is 0"):
        make_trainer(eval_strategy="steps", eval_steps=2, eval_fraction=0.0)


EVALUATIONS = {"eval_strategy": "steps", "eval_steps": 1, "eval_fraction": 0.4, "eval_batches": 2}


def test_eval_loss_is_the_weighted_sum_of_the_losses(make_trainer, model):
    torch.nn.init.normal_(model.vision_encoder.pos_embed)  # so that the SAM loss is not zero
    metrics = make_trainer(2, sam_loss_weight=3.0, **EVALUATIONS).evaluate()
    expected = metrics["eval_clip_loss"] + 3 * metrics["eval_sam_loss"]
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5) and metrics["eval_sam_loss"] > 0


def test_an_evaluation_without_a_usable_sample_is_an_error(make_trainer, tmp_path):
    write_tar(tmp_path / "0.tar", {f"{number}.jpg": b"not an image" for number in range(12)})
    trainer = make_trainer(1, clip_data=[str(tmp_path / "0.tar")], **EVALUATIONS)
    with pytest.raises(DataError, match="No held-out sample of clip_data can be used"):
        trainer.evaluate()


@pytest.mark.parametrize("lora_r", [0, 2])
def test_the_best_model_is_loaded_at_the_end(make_trainer, tmp_path, lora_r):
    class Worse(SamClipTrainer):
        def clip_loss(self, model, **batch):
            return super().clip_loss(model, **batch) + self.state.global_step

    best = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 5}
    trainer = make_trainer(2, max_steps=3, lora_r=lora_r, trainer_class=Worse, **EVALUATIONS, **best)
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert trainer.state.best_model_checkpoint == str(tmp_path / "run" / "checkpoint-1")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[1] + 2, rel=1e-5)  # the weights of step 1
    trainer.save_provenance({})
    (stage,) = provenance.read(tmp_path / "run")
    assert (stage["steps"], stage["best_step"]) == (3, 1)


def test_the_learning_rate_is_reduced_on_a_plateau(make_trainer):
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0, "threshold": 10.0}}
    trainer = make_trainer(1, max_steps=3, learning_rate=1e-3, **plateau, **EVALUATIONS)
    trainer.train()
    rates = [entry["learning_rate_head"] for entry in trainer.state.log_history if "learning_rate_head" in entry]
    assert rates == pytest.approx([1e-3, 1e-4, 1e-5])


def test_training_stops_early(make_trainer):
    best = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1}
    early = EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=10.0)
    trainer = make_trainer(1, max_steps=9, callbacks=[early], **EVALUATIONS, **best)
    trainer.train()
    assert trainer.state.global_step == 2


def test_an_unknown_metric_for_the_best_model_is_an_error(make_trainer):
    best = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1, "metric_for_best_model": "acc"}
    with pytest.raises(ValueError, match="metric_for_best_model is 'acc', but an evaluation has eval_clip_loss, "):
        make_trainer(1, max_steps=1, **EVALUATIONS, **best).train()


def test_the_student_may_have_other_resolutions_than_the_sam_teacher(make_trainer, model):
    trainer = make_trainer(sam_resolutions=[32, 64, 128])
    settings = set()
    for _, batch in zip(range(24), trainer.get_train_dataloader(), strict=False):
        images = batch["sam"]["images"]
        student_images = batch["sam"].get("student_images", images)
        settings.add((student_images.shape[-1], "input_boxes" in batch["sam"]))
        assert images.shape[-1] == 64
        loss = trainer.sam_loss(model, **batch["sam"])
        # Student and teacher have equal weights: the loss is zero at the teacher's resolution only.
        assert (loss.item() < 1e-6) == (student_images.shape[-1] == 64)
    assert settings == {(size, box) for size in (32, 64, 128) for box in (True, False)}


def test_sam_resolutions_must_be_multiples_of_the_patch_size(make_trainer):
    with pytest.raises(
        ValueError, match=r"sam_resolutions must be multiples of the student's patch size, 8: got \[30\]"
    ):
        make_trainer(sam_resolutions=[30, 64])
