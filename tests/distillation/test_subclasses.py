"""Subclasses of the trainer: frozen layers, other learning rates, another loss, another task."""

import dataclasses
import re

import pytest
import torch
import torch.nn.functional as F

from samclip_hf.distillation import SamClipTrainer
from samclip_hf.images import normalize


class LastLayerTrainer(SamClipTrainer):
    """Trains the last layer of the image encoder only, with its own learning rate."""

    def trained_parts(self):
        return ["vision_encoder.layers.2", "mask_decoder", "clip_head"]

    def parameter_group(self, name):
        group, lr_multiplier = super().parameter_group(name)
        if match := re.search(r"vision_encoder\.layers\.(\d+)\.", name):
            return f"layer_{match[1]}", 0.5
        return group, lr_multiplier


class DenseTrainer(SamClipTrainer):
    """Adds a loss on the mean of the dense embeddings, with its own batches."""

    def make_tasks(self, student):
        tasks = super().make_tasks(student)
        return tasks | {"dense": dataclasses.replace(tasks["clip"], image_sizes=[32])}

    def losses(self):
        return super().losses() | {"dense": self.dense_loss}

    def dense_loss(self, model, images, teacher_images):
        outputs = model(pixel_values=normalize(images, self.image_mean, self.image_std))
        dense_embeds = outputs.dense_embeds.mean(dim=(2, 3))
        loss = 1 - F.cosine_similarity(dense_embeds, self.clip_teacher(teacher_images)).mean()
        self.record({"dense_loss": loss})
        return loss


def test_a_subclass_freezes_layers_and_sets_learning_rates(make_trainer, model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = make_trainer(2, trainer_class=LastLayerTrainer, max_steps=4, seed=1, learning_rate=1e-2)
    trainer.train()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in changed} == {"vision_encoder", "mask_decoder", "clip_head"}
    assert all("vision_encoder.layers.2." in name for name in changed if name.startswith("vision_encoder."))
    rates = {group["name"]: group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert rates == pytest.approx({"layer_2": 5e-3, "decoder": 1e-3, "head": 1e-2})
    assert "grad_norm_vision_encoder.layers.2" in trainer.state.log_history[0]


def test_a_subclass_adds_a_task_with_its_own_loss(make_trainer, tmp_path):
    settings = {"max_steps": 2, "eval_fraction": 0.4, "eval_strategy": "steps", "eval_steps": 2, "eval_batches": 1}
    trainer = make_trainer(1, trainer_class=DenseTrainer, clip_resolutions=[64], **settings)
    trainer.train()
    logged, *_ = trainer.state.log_history
    assert logged["loss"] == pytest.approx(logged["clip_loss"] + logged["dense_loss"], rel=1e-4)
    assert logged.keys() >= {"cosine_64px", "dense_loss"} and "cosine_32px" not in logged
    assert any("eval_dense_loss" in entry for entry in trainer.state.log_history)
