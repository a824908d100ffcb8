"""The subclasses of docs/extend.md: a third teacher, another loss, frozen layers, other learning rates, other data."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model
from transformers.trainer_utils import set_seed

PAGE = Path(__file__).parents[2] / "docs" / "extend.md"


@pytest.fixture(scope="module")
def examples() -> dict[str, Any]:
    """The names that the Python blocks of the page define."""
    namespace: dict[str, Any] = {"__name__": "examples"}
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE))
    start = code.index("from dataclasses import dataclass")  # after the trainer of the miniature
    exec(
        "from samclip_hf import SamClipModel\nfrom samclip_hf.distillation import SamClipTrainer\n" + code[start:],
        namespace,
    )
    return namespace


def test_a_third_teacher_trains_a_head_of_its_own_in_the_same_encoder_pass(examples, make_trainer, model, tmp_path):
    set_seed(0)
    student = examples["ThreeHeadedModel"](model.config)
    student.load_state_dict(model.state_dict(), strict=False)
    passes = []
    student.vision_encoder.register_forward_hook(lambda *_: passes.append(1))
    before = {name: value.clone() for name, value in student.state_dict().items()}
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 14, "image_size": 28}
    trainer = make_trainer(
        2, student=student, trainer_class=examples["ThreeTeacherTrainer"], max_steps=4, seed=1, learning_rate=1e-2
    )
    trainer.dino = Dinov2Model(Dinov2Config(**size)).eval()
    trainer.train()
    changed = {
        name.split(".")[0] for name, value in student.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed == {"vision_encoder", "mask_decoder", "clip_head", "dino_head"}
    assert len(passes) == 2 * 4  # CLIP loss and SAM loss in each step
    log = trainer.state.log_history[0]
    expected = log["clip_loss"] + log["dino_loss"] + 10 * log["sam_loss"]
    assert log["loss"] == pytest.approx(expected, rel=1e-4)
    assert log["dino_loss"] > 0 and log["grad_norm_dino_head"] > 0
    (group,) = [g for g in trainer.optimizer.param_groups if any(p is student.dino_head.weight for p in g["params"])]
    assert (group["name"], group["initial_lr"]) == ("head", 1e-2)
    assert not any(p.requires_grad and p.grad is not None for p in trainer.dino.parameters())
    trainer.save_model()
    loaded = examples["ThreeHeadedModel"].from_pretrained(tmp_path / "run")
    torch.testing.assert_close(loaded.dino_head.weight, student.dino_head.weight)


def test_another_loss_is_added_to_the_sam_loss(examples, make_trainer, model):
    torch.nn.init.normal_(model.vision_encoder.pos_embed)  # so that the SAM loss is not zero
    trainers = [make_trainer(2), make_trainer(2, trainer_class=examples["OutlineTrainer"])]
    batch = next(iter(trainers[0].get_train_dataloader()))["sam"]
    plain, with_outlines = (trainer.sam_loss(model, **batch).item() for trainer in trainers)
    outline_loss = trainers[1]._averages.compute()["outline_loss"]
    assert outline_loss > 0
    assert with_outlines == pytest.approx(plain + 10 * outline_loss, rel=1e-4)


def test_layers_are_frozen_and_have_learning_rates_of_their_own(examples, make_trainer, model, monkeypatch):
    trainer_class = examples["LayerDecayTrainer"]
    monkeypatch.setattr(trainer_class, "num_layers", 3)  # of the tiny model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = make_trainer(2, trainer_class=trainer_class, max_steps=4, seed=1, learning_rate=1e-2)
    trainer.train()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in changed} == {"vision_encoder", "mask_decoder", "clip_head"}
    in_encoder = {".".join(name.split(".")[:3]) for name in changed if name.startswith("vision_encoder.layers.")}
    assert in_encoder == {"vision_encoder.layers.1", "vision_encoder.layers.2"}
    rates = {group["name"]: group["initial_lr"] for group in trainer.optimizer.param_groups}
    expected = {"layer_1": 3.6e-4, "layer_2": 6e-4, "encoder": 1e-3, "decoder": 1e-3, "head": 1e-2}
    assert rates == pytest.approx(expected)
    assert "grad_norm_vision_encoder.layers.2" in trainer.state.log_history[0]


def test_a_task_of_other_data_has_its_own_loss(examples, make_trainer):
    settings = {"max_steps": 2, "eval_fraction": 0.4, "eval_strategy": "steps", "eval_steps": 2, "eval_batches": 1}
    trainer = make_trainer(1, trainer_class=examples["LowResolutionTrainer"], clip_resolutions=[64], **settings)
    trainer.train()
    logged, *_ = trainer.state.log_history
    assert logged["loss"] == pytest.approx(logged["clip_loss"] + logged["low_resolution_loss"], rel=1e-4)
    assert logged.keys() >= {"cosine_64px", "low_resolution_loss"} and "cosine_32px" not in logged
    assert any("eval_low_resolution_loss" in entry for entry in trainer.state.log_history)
