"""Training arguments: validation and deprecated names."""

import copy
import dataclasses

import pytest
from transformers import TrainingArguments

from samclip_hf import distillation, miniature
from samclip_hf.distillation import EmbeddingCache, SamClipTrainingArguments, provenance
from samclip_hf.distillation.arguments import DEPRECATED_ARGUMENTS, WITHOUT_EFFECT

# The arguments of transformers that have an effect, because `SamClipTrainer` leaves what they do to `Trainer`.
WITH_EFFECT = {
    *("output_dir", "max_steps", "seed", "full_determinism", "resume_from_checkpoint", "local_rank", "do_train"),
    *("restore_callback_states_from_checkpoint", "use_cpu", "accelerator_config", "debug", "skip_memory_metrics"),
    # optimizer
    *(
        "learning_rate",
        "lr_scheduler_type",
        "warmup_steps",
        "warmup_ratio",
        "optim",
        "optim_args",
    ),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "gradient_accumulation_steps"),
    # precision, memory and speed
    *("bf16", "fp16", "tf32", "torch_compile", "torch_compile_backend", "torch_compile_mode"),
    *("activation_checkpointing", "activation_checkpointing_kwargs"),
    *("gradient_checkpointing", "gradient_checkpointing_kwargs"),
    *("dataloader_num_workers", "dataloader_prefetch_factor"),
    # several processes
    *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend"),
    *("ddp_timeout", "fsdp", "fsdp_config", "deepspeed"),  # deepspeed raises an error
    # log
    *("logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "logging_nan_inf_filter"),
    *("log_level", "log_level_replica", "disable_tqdm", "report_to", "run_name", "project"),
    *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    # evaluation and checkpoints
    *("eval_strategy", "eval_steps", "eval_delay", "load_best_model_at_end", "metric_for_best_model"),
    *("greater_is_better", "save_only_model", "save_strategy", "save_steps", "save_on_each_node", "save_total_limit"),
    *("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push"),
    "hub_revision",
}


@pytest.fixture
def make_arguments(tmp_path):
    def make(**arguments) -> SamClipTrainingArguments:
        return SamClipTrainingArguments(**{"output_dir": str(tmp_path), "max_steps": 1, "use_cpu": True} | arguments)

    return make


def test_deprecated_names_are_accepted_with_a_warning(make_arguments):
    with pytest.warns(FutureWarning, match=r"clip_sizes is deprecated .* Use clip_resolutions"):
        args = make_arguments(clip_sizes=[64])
    assert args.clip_resolutions == [64]
    with pytest.warns(FutureWarning, match="Use clip_resolutions"):
        assert args.clip_sizes == [64]
    with pytest.warns(FutureWarning, match="clip_sizes is deprecated"):
        args.clip_sizes = [128]
    assert args.clip_resolutions == args.to_dict()["clip_resolutions"] == [128]
    with pytest.warns(FutureWarning), pytest.raises(TypeError, match="deprecated name of min_crop_scale"):
        make_arguments(min_crop=0.1, min_crop_scale=0.2)


def test_every_deprecated_name_has_a_current_one(make_arguments):
    args = make_arguments()
    assert vars(args).keys() >= set(DEPRECATED_ARGUMENTS.values())
    assert not vars(args).keys() & DEPRECATED_ARGUMENTS.keys()
    assert copy.deepcopy(args).clip_resolutions == args.clip_resolutions


def test_an_unknown_attribute_raises_an_attribute_error(make_arguments):
    with pytest.raises(AttributeError, match="no attribute 'clip_size'"):
        _ = make_arguments().clip_size


def test_teacher_store_is_a_deprecated_alias():
    with pytest.warns(FutureWarning, match="Use EmbeddingCache"):
        assert distillation.TeacherStore is EmbeddingCache
    with pytest.raises(AttributeError, match="no attribute 'Store'"):
        _ = distillation.Store


def test_provenance_of_earlier_releases_is_read_by_current_names():
    for stage in provenance.read(miniature.checkpoint()):
        assert "clip_resolutions" in stage["arguments"]
        assert not stage["arguments"].keys() & DEPRECATED_ARGUMENTS.keys()


def test_every_argument_of_transformers_has_an_effect_or_raises_an_error():
    without_effect = {name for names, *_ in WITHOUT_EFFECT for name in names}
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert inherited <= WITH_EFFECT | without_effect
    assert not WITH_EFFECT & without_effect


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"num_train_epochs": 1},
            "num_train_epochs has no effect here, but is 1. The data are endless streams: set max_st",
        ),
        ({"per_device_train_batch_size": 4}, "per_device_train_batch_size has no effect .* Set clip_batch_size"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor has no effect .* there are no labels"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size has no effect"),
        ({"bf16_full_eval": True}, "bf16_full_eval has no effect .* set bf16 or fp16"),
        ({"ignore_data_skip": False}, "ignore_data_skip has no effect .* Streams resume by themselves"),
        ({"remove_unused_columns": True}, "remove_unused_columns has no effect"),
        ({"do_eval": True}, "do_eval has no effect .* Set eval_strategy"),
        ({"sam_loss_weight": 1.0}, "sam_loss_weight has no effect .* Only stage 2 has the SAM loss"),
        ({"mask_prompt_fraction": 0.5}, "mask_prompt_fraction has no effect .* Only stage 2 has the SAM loss"),
        (
            {"decoder_lr_multiplier": 0.1},
            "decoder_lr_multiplier has no effect .* Only stage 2 trains image encoder and",
        ),
        ({"stage": 3, "encoder_lr_multiplier": 1.0}, "encoder_lr_multiplier has no effect .* Only stage 2 trains"),
        ({"stage": 2, "decoder_lr_multiplier": -1.0}, "decoder_lr_multiplier must be 0 or more, got -1.0"),
        ({"model": "runs/stage1", "clip_head_layers": 2}, "clip_head_layers has no effect .* that of model"),
        ({"model": "runs/stage1", "clip_head_initialization": "copied"}, "clip_head_initialization has no effect"),
        ({"max_steps": 10, "warmup_steps": 11}, "longer than the run: warmup_steps is 11, max_steps 10"),
        (
            {"save_only_model": True, "resume_from_checkpoint": "true"},
            "save_only_model saves checkpoints that cannot be",
        ),
        ({"report_to": ["none_such"]}, "report_to is 'none_such', but no package of this name is installed"),
    ],
)
def test_arguments_without_effect_raise_an_error(make_arguments, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_arguments(**arguments)


def test_arguments_can_be_copied_with_changes(make_arguments):
    args = make_arguments(stage=2, sam_batch_size=2, eval_strategy="steps", eval_steps=1)
    changed = dataclasses.replace(args, max_steps=7)
    assert (changed.max_steps, changed.sam_batch_size, changed.stage) == (7, 2, 2)


def test_schedules_without_warmup_set_it_to_zero(make_arguments, caplog):
    assert make_arguments(lr_scheduler_type="constant", warmup_steps=0.5).warmup_steps == 0
    assert "constant has no warm-up" in caplog.text
    assert make_arguments(lr_scheduler_type="cosine", warmup_steps=0.5, max_steps=10).get_warmup_steps(10) == 5
