"""`samclip train` and `samclip cost`: arguments, recipes, and what a run leaves in its output folder."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import SamConfig, SamModel

from samclip_cli import CommandError
from samclip_cli import main as samclip
from samclip_cli import train as train_command
from samclip_hf import SamClipModel, miniature
from samclip_hf.distillation import SamClipTrainer, SamClipTrainingArguments

TRAINING = Path(__file__).parents[2] / "training"
NEW_HEAD = "clip_head_initialization: copied"  # stage 2 without stage 1
RECIPES = sorted((TRAINING / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def train():
    return train_command


@pytest.fixture
def recipe(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(f"use_cpu: true\noutput_dir: {tmp_path / 'run'}\n" + text)
        return str(path)

    return write


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_can_be_parsed(train, path, tmp_path):
    args = train.parse_arguments([str(path), "--output_dir", str(tmp_path), "--bf16", "false", "--use_cpu"])
    assert args.stage == (1 if path.stem == "lite_region" else int(path.stem[-1]))
    assert args.max_steps > 0


def test_the_command_line_overrides_the_recipe(train, recipe):
    path = recipe("stage: 2\nmax_steps: 10\nlearning_rate: 1e-4\nclip_resolutions: [64, 96]\nmodel:\n")
    args = train.parse_arguments([path, "--max_steps", "20", "--clip_resolutions", "32"])
    assert (args.stage, args.max_steps, args.learning_rate, args.clip_resolutions, args.model) == (
        2,
        20,
        1e-4,
        [32],
        None,
    )


@pytest.mark.parametrize(
    ("text", "argv", "sentence"),
    [
        ("learning_rat: 1", [], "unknown argument 'learning_rat'. Did you mean 'learning_rate'?"),
        ("zebra: 1", [], "unknown argument 'zebra'. See samclip train --help."),
        ("", ["--max_step", "3"], "unknown argument 'max_step'. Did you mean 'max_steps'?"),
        ("max_steps: soon", [], "max_steps: 'soon' is not an integer."),
        ("learning_rate: fast", [], "learning_rate: 'fast' is not a number."),
        ("", ["--clip-resolutions", "64", "x"], "clip_resolutions: 'x' is not an integer."),
        ("bf16: soon", [], "Truthy value expected"),
        ("stage: 7\nmax_steps: 1", [], "stage: '7' is not one of 1, 2, 3."),
        ("clip_head_pooling: median\nmax_steps: 1", [], "clip_head_pooling: 'median' is not one of max, mean."),
        ("stage: 1", [], "max_steps must be set for streaming data"),
        ("- 1", [], "must consist of lines of the form 'argument: value'"),
        ("stage: [1", [], "is not valid YAML"),
        (
            "max_steps: 1\nstage: 2\nmodel: runs/stage1",
            ["--encoder_lr_multiplier", "-1"],
            "encoder_lr_multiplier must be 0 or more",
        ),
        ("max_steps: 1", ["--clip_head_layers", "0"], "clip_head_layers must be 1 or more"),
    ],
)
def test_errors_name_the_wrong_argument_or_value(train, tmp_path, capsys, text, argv, sentence):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    try:
        status = samclip(["train", str(path), *argv])
    except SystemExit as error:  # argparse
        status = error.code
    assert status == 2
    assert sentence in capsys.readouterr().err


def test_deprecated_names_are_replaced_with_a_warning(train, recipe, capsys):
    path = recipe("max_steps: 1\nclip_sizes: [64, 96]\nheld_out_share: 0.1\n")
    args = train.parse_arguments([path, "--held_out_share=0.2", "--panel-texts", "a cat", "a dog"])
    assert (args.clip_resolutions, args.eval_fraction, args.eval_prompts) == ([64, 96], 0.2, ["a cat", "a dog"])
    warnings = capsys.readouterr().err.splitlines()
    assert f"samclip train: {path}: clip_sizes is deprecated, use clip_resolutions." in warnings
    assert "samclip train: command line: panel_texts is deprecated, use eval_prompts." in warnings
    with pytest.raises(CommandError, match="clip_resolutions is set twice"):
        train.parse_arguments([recipe("clip_resolutions: [64]\nclip_sizes: [64]")])


def test_arguments_are_checked_late_if_transformers_defines_them_elsewhere(train, recipe, monkeypatch):
    folders = {"samclip_hf": train._package_folder("samclip_hf"), "transformers": Path("/nowhere")}
    monkeypatch.setattr(train, "_package_folder", folders.get)
    args = train.parse_arguments([recipe("max_steps: 1\nclip_sizes: [64]"), "--learning_rate", "1e-3"])
    assert (args.learning_rate, args.clip_resolutions) == (1e-3, [64])
    with pytest.raises(CommandError, match="learning_rat"):
        train.parse_arguments([recipe("max_steps: 1"), "--learning_rat", "1"])


def test_arguments_are_known_without_importing_transformers(train):
    folders = {name: train._package_folder(name) for name in ("samclip_hf", "transformers")}
    own = train._dataclass_fields(folders["samclip_hf"] / "distillation" / "arguments.py", "SamClipTrainingArguments")
    inherited = train._dataclass_fields(folders["transformers"] / "training_args.py", "TrainingArguments")
    assert own.keys() | inherited.keys() == {field.name for field in fields(SamClipTrainingArguments)}


def test_a_recipe_that_does_not_exist_is_reported(capsys):
    for name, sentence in (
        ("nowhere.yaml", "cannot read the recipe nowhere.yaml: No such file"),
        ("stage1", "unknown recipe 'stage1'. Pass a YAML file, or one of: lite_region, lite_stage1, "),
    ):
        assert samclip(["train", name]) == 2
        assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("clip_resolutions: [64]\nclip_data: [/nowhere/photos]", "No data at '/nowhere/photos'"),
        ("clip_resolutions: [60]", "must be multiples of the student's patch size"),
        (f"clip_resolutions: [64]\nstage: 2\nsam_data: ['/nowhere/*.tar']\n{NEW_HEAD}", "No data at"),
        ("clip_resolutions: [64]\nresume_from_checkpoint: /nowhere", "'/nowhere' is not a checkpoint"),
    ],
)
def test_training_does_not_start_with_wrong_data_or_sizes(train, recipe, text, sentence):
    with pytest.raises(SystemExit, match=f"Training did not start.*{sentence}"):
        train.run([recipe(f"max_steps: 1\n{text}")])


def test_a_stage_runs_and_saves_a_model(train, recipe, tmp_path):
    settings = ["stage: 1", "max_steps: 1", "clip_resolutions: [64]", "clip_batch_size: 2", "shuffle_buffer: 2"]
    train.run([recipe("\n".join([*settings, "report_to: none"]))])
    saved = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.json", "model.safetensors", "processor_config.json", "train_results.json"} <= saved


def test_the_seed_determines_the_weights_of_a_new_student(train, recipe):
    weights = []
    for seed in (1, 1, 2):
        args = train.parse_arguments([recipe(f"max_steps: 1\nclip_resolutions: [64]\nseed: {seed}")])
        weights.append(train.build_trainer(args).model.clip_head.mlp.fc1.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_complete_run_is_not_resumed(train, recipe, tmp_path):
    settings = ["stage: 1", "max_steps: 1", "clip_resolutions: [64]", "clip_batch_size: 2", "shuffle_buffer: 2"]
    path = recipe("\n".join([*settings, "report_to: none", "save_strategy: steps", "save_steps: 1"]))
    train.run([path])
    before = (tmp_path / "run" / "train_results.json").read_text()
    with pytest.raises(SystemExit, match="checkpoint-1 has completed all 1 steps"):
        train.run([path, "--resume_from_checkpoint", "true"])
    assert (tmp_path / "run" / "train_results.json").read_text() == before


def test_resuming_after_the_last_step_saves_the_model(train, recipe, tmp_path):
    settings = [
        "stage: 2",
        NEW_HEAD,
        "max_steps: 1",
        "clip_resolutions: [64]",
        "clip_batch_size: 2",
        "sam_batch_size: 1",
        "lora_r: 2",
    ]
    lines = [*settings, "masks_per_image: 2", "shuffle_buffer: 16", "report_to: none", "save_steps: 1"]
    path = recipe("\n".join(lines))
    train.run([path])
    whole = load_file(tmp_path / "run" / "model.safetensors")
    for name in ("model.safetensors", "train_results.json"):
        (tmp_path / "run" / name).unlink()
    train.run([path, "--resume_from_checkpoint", "true"])
    for name, value in load_file(tmp_path / "run" / "model.safetensors").items():
        assert torch.equal(value, whole[name]), name


def test_a_folder_with_another_run_is_not_overwritten(train, recipe, tmp_path, capsys):
    settings = ["stage: 1", "clip_resolutions: [64]", "clip_batch_size: 2", "shuffle_buffer: 2", "report_to: none"]
    path = recipe("\n".join([*settings, "save_strategy: steps", "save_steps: 1"]))
    train.run([path, "--max_steps", "1", "--resume_from_checkpoint", "true"])
    assert "has no checkpoint yet" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="checkpoint-1 belongs to an earlier run"):
        train.run([path, "--max_steps", "2"])
    new_head = ["--clip_head_initialization", "copied"]
    with pytest.raises(SystemExit, match="cannot be resumed with other settings: stage from 1 to 2"):
        train.run([path, "--max_steps", "2", "--stage", "2", *new_head, "--resume_from_checkpoint", "true"])
    Image.new("RGB", (40, 40)).save(tmp_path / "1.jpg")  # other data with the same number of shards
    other = ["--clip_data", str(tmp_path / "*.jpg"), "--eval_fraction", "0"]
    with pytest.raises(SystemExit, match=r"clip_data's shards from \['\d+ of checksum"):
        train.run([path, "--max_steps", "2", *other, "--resume_from_checkpoint", "true"])


def remove_tokenizer(folder: Path) -> Path:
    for file in [*folder.glob("tokenizer*"), *folder.glob("vocab*"), *folder.glob("merges*")]:
        file.unlink()
    return folder


def test_models_without_tokenizer_are_refused(train, recipe, tmp_path):
    clip = remove_tokenizer(Path(shutil.copytree(miniature.clip_teacher(), tmp_path / "clip")))
    student = remove_tokenizer(Path(shutil.copytree(miniature.checkpoint(), tmp_path / "student")))
    text = "stage: 1\nmax_steps: 1\nclip_resolutions: [64]\n"
    for line, folder in ((f"clip_teacher: {clip}", clip), (f"model: {student}", student)):
        with pytest.raises(SystemExit, match=f"Training did not start. There is no tokenizer in '{folder}'"):
            train.run([recipe(text + line)])


MODELS = {
    "model": miniature.checkpoint(),
    "clip_teacher": miniature.clip_teacher(),
    "sam_teacher": miniature.sam_teacher(),
    "sam_student": miniature.sam_teacher(),
}


@pytest.fixture(params=MODELS)
def damaged(request, tmp_path) -> tuple[str, Path]:
    """A line of a recipe that names the copy of a model, and the copy's weights, for a test to damage."""
    folder = Path(shutil.copytree(MODELS[request.param], tmp_path / request.param))
    lines = ["stage: 2", "max_steps: 1", "clip_resolutions: [64]", f"{request.param}: {folder}"]
    return "\n".join(lines if request.param == "model" else [*lines, NEW_HEAD]), folder / "model.safetensors"


def test_models_without_some_of_their_weights_are_refused(train, recipe, damaged):
    text, weights = damaged
    state = load_file(weights)
    missing = sorted(name for name in state if name.startswith(("mask_decoder.iou_token", "visual_projection")))
    for name in missing:
        del state[name]
    save_file(state, weights, metadata={"format": "pt"})
    sentence = f"Training did not start. {weights.parent} lacks weights, which would be random: {missing[0]}."
    with pytest.raises(SystemExit, match=re.escape(sentence)):
        train.run([recipe(text)])


def test_models_whose_weights_have_other_shapes_than_their_configuration_are_refused(train, recipe, damaged):
    text, weights = damaged
    state = load_file(weights)
    name = next(name for name in sorted(state) if name.endswith("weight") and state[name].ndim == 2)
    shape = tuple(state[name].shape)
    state[name] = state[name][:-1].contiguous()
    save_file(state, weights, metadata={"format": "pt"})
    sentence = (
        f"1 weights of {weights.parent} have other shapes than its configuration, such as {name}: "
        f"{(shape[0] - 1, shape[1])} instead of {shape}."
    )
    with pytest.raises(SystemExit, match=re.escape(sentence)):
        train.run([recipe(text)])


def test_a_truncated_file_of_weights_is_reported(train, recipe, damaged):
    text, weights = damaged
    weights.write_bytes(weights.read_bytes()[:-1])
    sentence = (
        f"Training did not start. The weights of {weights.parent} cannot be read: a safetensors file is truncated"
    )
    with pytest.raises(SystemExit, match=re.escape(sentence)):
        train.run([recipe(text)])


@pytest.mark.parametrize("argument", MODELS)
def test_a_model_that_does_not_exist_is_reported(recipe, capsys, monkeypatch, argument):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = "stage: 2\nmax_steps: 1\nclip_resolutions: [64]\n"
    assert samclip(["train", recipe(text + f"{argument}: runs/no/model")]) == 2
    assert f"--{argument} runs/no/model: no such folder." in capsys.readouterr().err


def test_teachers_that_a_run_does_not_load_need_not_exist(train, recipe):
    lines = ["max_steps: 1", f"model: {miniature.checkpoint()}", "sam_teacher: runs/no/sam"]
    args = train.parse_arguments([recipe("\n".join(["stage: 3", *lines]))])
    assert train.models_to_load(args) == {"model": miniature.checkpoint()}


def test_a_finished_model_and_files_of_the_user_are_not_replaced(train, recipe, tmp_path):
    lines = ["stage: 1", "max_steps: 1", "clip_resolutions: [64]", "clip_batch_size: 2", "shuffle_buffer: 2"]
    path = recipe("\n".join([*lines, "save_strategy: 'no'"]))
    train.run([path])
    before = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir() if file.is_file()}
    for options in ([], ["--model", str(tmp_path / "run")], ["--resume_from_checkpoint", "true"]):
        with pytest.raises(SystemExit, match=r"It would replace .*/run/config.json. Pass another --output_dir"):
            train.run([path, *options])
    assert {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir() if file.is_file()} == before


def test_stage_2_without_a_model_requires_a_word(train, recipe):
    with pytest.raises(SystemExit, match=r"pass the output of stage 1 as --model\. .* --clip_head_initialization"):
        train.run([recipe("stage: 2\nmax_steps: 1\nclip_resolutions: [64]")])


@pytest.mark.parametrize(
    ("argument", "value", "change"),
    [
        ("optim", "sgd", "optim from adamw_torch.* to sgd"),
        ("lora_r", "3", "lora_r from 2 to 3"),
        ("learning_rate", "0.1", "learning_rate from 5e-05 to 0.1"),
        ("sam_loss_weight", "1", "sam_loss_weight from 10.0 to 1.0"),
    ],
)
def test_a_changed_setting_ends_a_resume_with_a_sentence(train, recipe, two_steps, argument, value, change):
    with pytest.raises(SystemExit, match=f"Training did not start. .*checkpoint-1 cannot be resumed .*: {change}"):
        train.run([two_steps, f"--{argument}", value])


@pytest.fixture
def two_steps(train, recipe, tmp_path) -> str:
    """A recipe of stage 2 with adapters that is resumed after its first step."""
    lines = ["stage: 2", NEW_HEAD, "clip_resolutions: [64]", "clip_batch_size: 2", "sam_batch_size: 1", "lora_r: 2"]
    lines += ["masks_per_image: 2", "shuffle_buffer: 16", "save_steps: 1", "lr_scheduler_type: constant"]
    train.run([recipe("\n".join([*lines, "max_steps: 1"]))])
    return recipe("\n".join([*lines, "max_steps: 2", "resume_from_checkpoint: true"]))


def test_the_best_model_is_saved_after_an_interruption_between_training_and_saving(train, recipe, tmp_path):
    lines = ["stage: 1", "max_steps: 2", "clip_resolutions: [64]", "clip_batch_size: 2", "shuffle_buffer: 16"]
    lines += ["save_steps: 1", "eval_strategy: steps", "eval_steps: 1", "eval_batches: 1", "eval_fraction: 0.3"]
    path = recipe("\n".join([*lines, "load_best_model_at_end: true", "metric_for_best_model: loss"]))
    train.run([path, "--greater_is_better", "true"])  # the first step is the best: the loss falls
    run = tmp_path / "run"
    state = json.loads((run / "trainer_state.json").read_text())
    assert state["best_global_step"] in (1, 2)
    best = load_file(run / f"checkpoint-{state['best_global_step']}" / "model.safetensors")
    saved = (run / "model.safetensors").read_bytes()
    for name in ("model.safetensors", "train_results.json"):
        (run / name).unlink()
    train.run([path, "--greater_is_better", "true", "--resume_from_checkpoint", "true"])
    assert (run / "model.safetensors").read_bytes() == saved
    assert all(torch.equal(value, best[name]) for name, value in load_file(run / "model.safetensors").items())
    (stage,) = json.loads((run / "provenance.json").read_text())["stages"]
    assert (stage["steps"], stage["best_step"]) == (2, state["best_global_step"]) and stage["images_seen"] > 0


@pytest.mark.parametrize("save_strategy", ["steps", "no"])
def test_a_disk_that_is_full_at_the_last_file_of_a_run_says_how_to_get_the_model(
    train, recipe, tmp_path, monkeypatch, save_strategy
):
    settings = ["stage: 1", "max_steps: 1", "clip_resolutions: [64]", "clip_batch_size: 2", "shuffle_buffer: 2"]
    path = recipe("\n".join([*settings, "report_to: none", f"save_strategy: '{save_strategy}'", "save_steps: 1"]))
    run = tmp_path / "run"

    def fail(self, split, metrics):
        for name in ("train_results.json", "all_results.json"):  # `open` and `write` of Trainer.save_metrics
            (run / name).touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(SamClipTrainer, "save_metrics", fail)
        with pytest.raises(SystemExit, match=r"could not be saved in .*/run: .*No space left") as stopped:
            train.run([path])
    if save_strategy == "no":
        assert "another --output_dir: there is no checkpoint" in str(stopped.value)
        return
    assert "--resume_from_checkpoint true" in str(stopped.value)
    saved = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").unlink()
    assert train.run([path, "--resume_from_checkpoint", "true"]) == 0
    assert (run / "model.safetensors").read_bytes() == saved
    for name in ("train_results.json", "all_results.json"):
        json.loads((run / name).read_text())


def test_stage_3_requires_a_model(train, recipe):
    with pytest.raises(SystemExit, match="Stage 3 continues from a merged model"):
        train.run([recipe("stage: 3\nmax_steps: 1\nclip_resolutions: [64]")])


@pytest.mark.slow
def test_a_longer_run_is_not_complete_until_its_model_is_saved(train, recipe, tmp_path, monkeypatch):
    settings = ["stage: 1", "max_steps: 1", "clip_resolutions: [64]", "clip_batch_size: 2", "shuffle_buffer: 2"]
    path = recipe("\n".join([*settings, "report_to: none", "save_steps: 1", "lr_scheduler_type: constant"]))
    train.run([path])
    shorter = load_file(tmp_path / "run" / "model.safetensors")
    longer = [path, "--max_steps", "2", "--resume_from_checkpoint", "true"]

    def full(*args, **kwargs):
        raise SafetensorError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(SamClipTrainer, "save_model", lambda *args, _internal_call=False: _internal_call or full())
        with pytest.raises(SystemExit, match=r"All steps are done, but the model could not be saved .*No space left"):
            train.run(longer)
    shutil.copy(
        tmp_path / "run" / "model.safetensors", tmp_path / "run" / "checkpoint-2"
    )  # save_model was also patched for the checkpoint
    weights = {name: value + 1 for name, value in shorter.items()}
    save_file(weights, tmp_path / "run" / "checkpoint-2" / "model.safetensors", metadata={"format": "pt"})
    train.run(longer)
    for name, value in load_file(tmp_path / "run" / "model.safetensors").items():
        assert torch.equal(value, weights[name]), name


def test_an_incomplete_checkpoint_is_an_error(train, recipe, tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "trainer_state.json").write_text("{")
    path = recipe("stage: 1\nmax_steps: 2\nclip_resolutions: [64]")
    with pytest.raises(SystemExit, match="checkpoint-1 is incomplete"):
        train.run([path, "--resume_from_checkpoint", str(tmp_path / "checkpoint-1")])


def test_the_model_is_not_saved_if_all_samples_were_skipped(train, recipe, tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.jpg").write_bytes(b"not an image")
    settings = ["stage: 1", "max_steps: 2", "clip_resolutions: [64]", "clip_batch_size: 2", "save_strategy: 'no'"]
    path = recipe("\n".join([*settings, "report_to: none", f"clip_data: ['{tmp_path}/*.jpg']"]))
    with pytest.raises(SystemExit, match=r"all samples were skipped.*skipped_broken_image': 4"):
        train.run([path])
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.slow
def test_an_error_in_a_data_loader_worker_ends_the_training(recipe):
    settings = [
        "stage: 1",
        "max_steps: 1",
        "clip_resolutions: [64]",
        "clip_batch_size: 2",
        "dataloader_num_workers: 1",
    ]
    shares = ["clip_data: [miniature, miniature]", "clip_data_weights: [1, 0.0001]"]
    path = recipe("\n".join([*settings, *shares, "report_to: none"]))
    run = subprocess.run([sys.executable, TRAINING / "train.py", path], capture_output=True, text=True, timeout=100)
    assert run.returncode == 1
    assert "Weight 0.0001 of [1.0, 0.0001] is so small" in run.stderr


def test_boolean_arguments_can_be_negated(train, recipe):
    args = train.parse_arguments([recipe("max_steps: 1"), "--no_logging_nan_inf_filter"])
    assert args.logging_nan_inf_filter is False


def test_accelerate_reads_its_configuration_files():
    files = sorted((TRAINING / "accelerate").glob("*.yaml"))
    assert len(files) == 3
    for path in files:
        config = load_config_from_file(str(path))
        assert config.num_processes > 1 and config.mixed_precision == "bf16"


def test_costs_agree_with_published_numbers(monkeypatch):
    from samclip_cli import cost

    monkeypatch.setattr(cost, "load_config", lambda cls, name, fallback: cls(**fallback))
    args = SamClipTrainingArguments(output_dir="unused", stage=1, max_steps=1, use_cpu=True)
    costs = cost.Costs(args)
    # GFLOP at 224 px: ViT-L/14 162, ViT-B's encoder 35 (12 layers, forward only), 2.8 for each of the head's 3 layers,
    # three times for forward and backward pass.
    assert costs.clip(224) / 1e9 == pytest.approx(162 + 35 + 3 * 3 * 2.8, rel=0.03)
    args.clip_embedding_cache = "somewhere"
    assert costs.clip(224) / 1e9 == pytest.approx(35 + 3 * 3 * 2.8, rel=0.05)
    args.stage = 2
    # The encoder takes 972 GFLOP, with the padding of its windows: once for the forward pass of the teacher, once for
    # that of the student, and twice for the backward pass.
    encoder_only = 4 * 0.972e12
    assert encoder_only < cost.Costs(args).sam(1024) < 1.35 * encoder_only
    # With a smaller student, one forward pass of ViT-B remains, that of the teacher.
    small = SamConfig(
        vision_config={"hidden_size": 192, "num_attention_heads": 3, "global_attn_indexes": [2, 5, 8, 11]}
    )
    known = {"facebook/sam-vit-tiny": small}
    monkeypatch.setattr(cost, "load_config", lambda cls, name, fallback: known.get(name) or cls(**fallback))
    args.sam_student = "facebook/sam-vit-tiny"
    assert 0.972e12 < cost.Costs(args).sam(1024) < 2.5 * 0.972e12


def test_the_cost_of_the_region_loss_is_that_of_the_head_and_a_pass_of_the_teacher(monkeypatch):
    from samclip_cli import cost

    monkeypatch.setattr(cost, "load_config", lambda cls, name, fallback: cls(**fallback))
    settings = {"output_dir": "unused", "max_steps": 1, "use_cpu": True, "region_loss_weight": 1.0}
    costs = cost.Costs(SamClipTrainingArguments(stage=3, region_image_size=224, **settings))
    student, tokens = costs.student, torch.zeros(1, 28, 28, 768, device="meta")
    head = cost.count_flops(lambda: student.clip_head.project_patches(student.clip_head(tokens))) / 1e9
    # Three layers with 12 d^2 multiplications for each of n patches and 2 n d for its attention; an MLP with 3 d^2.
    n, d = 28 * 28, 768
    assert head == pytest.approx(2e-9 * n * (3 * (12 * d**2 + 2 * n * d) + 3 * d**2), rel=0.1)
    head *= 2 * 3  # patches and segments; forward and backward pass
    encoder = cost.count_flops(lambda: student.vision_encoder(torch.zeros(1, 3, 448, 448, device="meta"))) / 1e9
    assert costs.regions(448) / 1e9 == pytest.approx(162 + head + encoder, rel=0.05)  # 162: ViT-L/14
    costs.args.region_embedding_cache = "somewhere"
    assert costs.regions(448) / 1e9 == pytest.approx(head + encoder, rel=0.05)


def test_the_student_can_be_smaller_than_its_sam_teacher(train, recipe, tmp_path, capsys):
    teacher = SamModel.from_pretrained(miniature.sam_teacher())
    settings = teacher.config.to_dict()
    settings["vision_config"] |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings["vision_config"] |= {"mlp_dim": 64, "global_attn_indexes": [1]}
    SamModel(SamConfig.from_dict(settings)).save_pretrained(tmp_path / "small")
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (source := Path(miniature.sam_teacher()) / name).exists():
            shutil.copy(source, tmp_path / "small")
    lines = ["stage: 2", NEW_HEAD, "max_steps: 2", "clip_resolutions: [64]", "clip_batch_size: 2", "sam_batch_size: 1"]
    lines += ["masks_per_image: 2", "shuffle_buffer: 16", "report_to: none", f"sam_student: {tmp_path / 'small'}"]
    path = recipe("\n".join(lines))
    train.run([path])
    student = SamClipModel.from_pretrained(tmp_path / "run")
    assert student.config.vision_config.hidden_size == 32
    assert student.config.vision_config.num_hidden_layers == 2
    path = recipe("\n".join(line for line in lines if line != NEW_HEAD))
    with pytest.raises(SystemExit, match="only one of model and sam_student"):
        train.run([path, "--model", str(tmp_path / "run")])


@pytest.mark.slow
def test_half_precision_and_activation_checkpointing_give_nearly_the_same_loss(train, recipe, tmp_path):
    settings = ["stage: 2", NEW_HEAD, "max_steps: 2", "clip_resolutions: [64]"]
    settings += ["clip_batch_size: 4", "sam_batch_size: 1"]
    path = recipe("\n".join([*settings, "masks_per_image: 2", "report_to: none", "save_strategy: 'no'"]))
    newer = hasattr(SamClipTrainingArguments, "activation_checkpointing")  # since about transformers 5.20
    checkpointing = "--activation_checkpointing" if newer else "--gradient_checkpointing"
    losses = []
    for options in ([], ["--bf16", "true"], [checkpointing, "true"]):
        train.run([path, "--output_dir", str(tmp_path / str(len(losses))), *options])
        losses.append(json.loads((tmp_path / str(len(losses)) / "train_results.json").read_text())["train_loss"])
    assert losses[1] == pytest.approx(losses[0], abs=0.02) and losses[1] != losses[0]
    assert losses[2] == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.slow
def test_compiled_training_gives_the_same_weights(recipe, tmp_path):
    """With several image sizes. The backend traces the forward and backward pass, but generates no code."""
    path = recipe(
        f"stage: 2\n{NEW_HEAD}\nmax_steps: 2\nclip_data: [miniature]\nsam_data: [miniature]\nclip_resolutions: [64]\n"
        "sam_resolutions: [128]\nclip_batch_size: 2\nsam_batch_size: 1\nmasks_per_image: 2\nreport_to: none\n"
        "save_strategy: 'no'\n"
    )
    weights = []
    for name, options in (("eager", []), ("compiled", ["--torch_compile_backend", "aot_eager"])):
        command = [sys.executable, TRAINING / "train.py", path, "--output_dir", tmp_path / name, *options]
        run = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        weights.append(load_file(tmp_path / name / "model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("option", ["--num_train_epochs=3", "--per_device_train_batch_size=8"])
def test_an_argument_without_effect_is_an_error_also_with_its_default_value(option):
    name, value = option[2:].split("=")
    assert float(value) == getattr(train_command.parse_arguments(["miniature_stage1"]), name)
    with pytest.raises(CommandError, match=f"{name} has no effect. "):
        train_command.parse_arguments(["miniature_stage1", option])
