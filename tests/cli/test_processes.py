"""Training in several processes, and resuming after a kill or a signal, give the weights of one uninterrupted run."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file

from samclip_hf import miniature
from samclip_hf.distillation import last_checkpoint

TRAINING = Path(__file__).parents[2] / "training"
SETTINGS = {
    "use_cpu": True,
    "model": miniature.checkpoint(),
    "clip_resolutions": [64, 128],
    "masks_per_image": 4,
    "mask_prompt_fraction": 0.5,
    "shuffle_buffer": 64,
    "warmup_steps": 0,
    "logging_steps": 1,
    "adam_epsilon": 1e-6,  # or rounding errors move weights whose gradient is zero, such as key biases
    "disable_tqdm": True,
}


def command(output_dir, processes=1, **arguments) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    words = [sys.executable, *(launcher if processes > 1 else [])]
    words += [TRAINING / "train.py", TRAINING / "configs" / "miniature_paper_stage2.yaml"]
    for name, value in ({"output_dir": output_dir} | SETTINGS | arguments).items():
        words += [f"--{name}", *(value if isinstance(value, list) else [value])]
    return [str(word) for word in words]


# One thread per process, and no spinning, because the processes share the cores.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def run(*args, **kwargs) -> None:
    done = subprocess.run(command(*args, **kwargs), env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def curve(folder: Path) -> dict[int, float]:
    state = json.loads((folder / "trainer_state.json").read_text())
    return {entry["step"]: entry["loss"] for entry in state["log_history"] if "loss" in entry}


@pytest.mark.slow
def test_two_processes_and_gradient_accumulation_give_the_weights_of_one_process(tmp_path):
    settings = {"max_steps": 5, "save_strategy": "no", "dataloader_num_workers": 0}
    half = {"clip_batch_size": 4, "sam_batch_size": 1}
    run(tmp_path / "one", clip_batch_size=8, sam_batch_size=2, **settings)
    run(tmp_path / "two", processes=2, **half, **settings)
    run(tmp_path / "accumulated", gradient_accumulation_steps=2, **half, **settings)
    before = load_file(Path(miniature.checkpoint()) / "model.safetensors")
    one = load_file(tmp_path / "one" / "model.safetensors")
    assert max((one[name] - before[name]).abs().max() for name in before) > 1e-3
    for other in ("two", "accumulated"):
        weights = load_file(tmp_path / other / "model.safetensors")
        for name, value in one.items():
            torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-5, msg=f"{other}: {name}")
        assert curve(tmp_path / other) == pytest.approx(curve(tmp_path / "one"), rel=1e-3)


# With several processes, transformers loads checkpoints to the device "cpu:0", which torch before 2.12 lacks.
resumes_on_cpus = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.12"), reason="torch lacks the device cpu:0"
)


@pytest.mark.parametrize(("processes", "num_workers"), [(1, 2), pytest.param(2, 2, marks=resumes_on_cpus)])
@pytest.mark.slow
def test_a_resumed_run_gives_the_weights_of_an_uninterrupted_run_exactly(tmp_path, processes, num_workers):
    settings = {
        "max_steps": 16,
        "save_steps": 2,
        "clip_batch_size": 4,
        "sam_batch_size": 1,
        "dataloader_num_workers": num_workers,
        "processes": processes,
    }
    run(tmp_path / "whole", **settings)
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        command(killed, **settings),
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (killed / "checkpoint-4").exists():  # the kill comes at any moment after it
        assert process.poll() is None, "the run ended before it was killed"
        time.sleep(0.01)
    for each in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()
    checkpoint = last_checkpoint(killed)
    assert checkpoint is not None and not (killed / "model.safetensors").exists()
    run(killed, resume_from_checkpoint="true", **settings)
    assert curve(killed) == curve(tmp_path / "whole")
    weights = load_file(killed / "model.safetensors")
    for name, value in load_file(tmp_path / "whole" / "model.safetensors").items():
        assert torch.equal(weights[name], value), name


@pytest.mark.parametrize(("processes", "num_workers"), [(1, 1), (2, 1)])
@pytest.mark.slow
def test_sigterm_saves_a_checkpoint_and_reports_how_to_resume(tmp_path, processes, num_workers):
    settings = {"max_steps": 500, "save_strategy": "no", "clip_batch_size": 4, "sam_batch_size": 1}
    words = command(tmp_path, processes, dataloader_num_workers=num_workers, **settings)
    process = subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "'loss'" in line:
            break
    process.terminate()  # with several processes, this is their launcher, which forwards the signal
    _, errors = process.communicate(timeout=120)
    assert process.returncode == (128 + signal.SIGTERM if processes == 1 else 1), errors[-2000:]
    assert "of 500. Run the same command with --resume_from_checkpoint true to continue." in errors
    assert last_checkpoint(tmp_path) is not None


@resumes_on_cpus
@pytest.mark.slow
def test_checkpoints_of_two_processes_have_the_current_state_of_all_readers(tmp_path):
    settings = {"clip_batch_size": 4, "sam_batch_size": 1, "dataloader_num_workers": 0, "save_steps": 2}
    settings |= {
        "shuffle_buffer": 16,  # one sample for each reader, so that every sample changes its position
        "save_total_limit": 9,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "eval_batches": 2,
        "eval_prompts": ["a red shape"],
    }
    run(tmp_path / "run", processes=2, max_steps=6, **settings)  # in which both take part in an evaluation
    run(
        tmp_path / "run",
        processes=2,
        max_steps=8,
        resume_from_checkpoint=tmp_path / "run" / "checkpoint-4",
        **settings,
    )
    states = [
        json.loads((tmp_path / "run" / f"checkpoint-{step}" / "stream_state.json").read_text()) for step in (4, 8)
    ]
    before, after = (state["streams"]["readers"]["clip"] for state in states)
    assert before.keys() == after.keys() and len(before) == 16
    for indices in (range(0, 16, 2), range(1, 16, 2)):  # the readers of each process
        assert any(after[f"0/{index}"][3] > before[f"0/{index}"][3] for index in indices)
    assert all(after[reader][3] >= before[reader][3] for reader in before)
