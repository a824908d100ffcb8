"""
Compares a training that is killed repeatedly with an uninterrupted one: weights and losses must be equal bit for bit.

    python benchmarks/interruption.py --kills 20

Both runs train stage 2 on the miniature. A kill sends SIGKILL to all processes of the run at a random time after its
first new step, possibly while a checkpoint is being written. The same command then resumes the run.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from safetensors.torch import load_file

from samclip_hf import miniature


def command(output_dir: Path, arguments: argparse.Namespace) -> list[str]:
    """Returns the training command of a run."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={arguments.processes}"]
    parts = [sys.executable, *(launcher if arguments.processes > 1 else [])]
    parts += ["-m", "samclip_cli", "train", "miniature_stage2", "--output_dir", output_dir]
    parts += ["--use_cpu", "--model", miniature.checkpoint(), "--max_steps", arguments.steps]
    parts += ["--save_steps", arguments.save_steps, "--logging_steps", 1, "--disable_tqdm", "true"]
    parts += ["--clip_batch_size", 8, "--sam_batch_size", 1, "--masks_per_image", 4]
    parts += ["--dataloader_num_workers", arguments.workers, "--resume_from_checkpoint", "true"]
    return [str(part) for part in parts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="number of kills (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--save_steps", type=int, default=3, help="steps between checkpoints (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="data loader workers per process")
    parser.add_argument("--processes", type=int, default=1, help="processes of a run")
    parser.add_argument("--seed", type=int, default=0, help="seed of the times of the kills")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)

    with tempfile.TemporaryDirectory() as folder:
        uninterrupted, killed = Path(folder, "uninterrupted"), Path(folder, "killed")
        subprocess.run(command(uninterrupted, arguments), check=True, capture_output=True)
        checkpoints_at_kill, startup_times = [], []
        while not (killed / "train_results.json").exists():
            start = time.perf_counter()
            process = subprocess.Popen(
                command(killed, arguments), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            assert process.stdout is not None
            steps_until_kill = rng.randint(1, max(1, arguments.steps // arguments.kills))
            for line in process.stdout:
                if "'loss'" not in line:
                    continue
                if len(startup_times) == len(checkpoints_at_kill):
                    startup_times.append(time.perf_counter() - start)
                steps_until_kill -= 1
                if steps_until_kill <= 0 and len(checkpoints_at_kill) < arguments.kills:
                    time.sleep(rng.uniform(0, 0.3))  # during a step or a checkpoint
                    for each in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
                        each.kill()
                    steps = (int(path.name.split("-")[1]) for path in killed.glob("checkpoint-*"))
                    checkpoints_at_kill.append(max(steps, default=0))
                    break
            process.communicate()
        losses = []
        for run in (uninterrupted, killed):
            history = json.loads((run / "trainer_state.json").read_text())["log_history"]
            losses.append([entry["loss"] for entry in history if "loss" in entry])
        weights = [load_file(run / "model.safetensors") for run in (uninterrupted, killed)]
        num_different = sum(not weights[0][name].equal(weights[1][name]) for name in weights[0])
    print(f"{len(checkpoints_at_kill)} kills. Step of the newest checkpoint at each kill: {checkpoints_at_kill}")
    print(f"losses of {len(losses[0])} steps: {'equal' if losses[0] == losses[1] else 'DIFFERENT'}")
    print(f"tensors that differ: {num_different} of {len(weights[0])}")
    if len(startup_times) > 1:
        resumed = f"{min(startup_times[1:]):.1f} to {max(startup_times[1:]):.1f} s after a resume"
        print(f"time to the first new step: {startup_times[0]:.1f} s at first, {resumed}")
    if num_different or losses[0] != losses[1]:
        sys.exit(1)


if __name__ == "__main__":
    main()
