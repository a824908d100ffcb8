"""
A run that is killed again and again, against one that is not: do both end with the same weights and losses?

    python benchmarks/interruption.py --kills 20

Stage 2 on the miniature. Every kill is a SIGKILL to all processes of the run at a random moment between its first new
step and some steps later, also while a checkpoint is being written; each time the same command resumes it.
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

TRAINING = Path(__file__).parents[1] / "training"


def command(output_dir: Path, arguments: argparse.Namespace) -> list[str]:
    """The training command of both runs."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={arguments.processes}"]
    words = [sys.executable, *(launcher if arguments.processes > 1 else [])]
    words += [TRAINING / "train.py", TRAINING / "configs" / "miniature_stage2.yaml", "--output_dir", output_dir]
    words += ["--use_cpu", "--model", miniature.checkpoint(), "--max_steps", arguments.steps]
    words += ["--save_steps", arguments.save_steps, "--logging_steps", 1, "--disable_tqdm", "true"]
    words += ["--clip_batch_size", 8, "--sam_batch_size", 1, "--masks_per_image", 4]
    words += ["--dataloader_num_workers", arguments.workers, "--resume_from_checkpoint", "true"]
    return [str(word) for word in words]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--save_steps", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)

    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder, "whole"), Path(folder, "killed")
        subprocess.run(command(whole, arguments), check=True, capture_output=True)
        kills, waits = [], []
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
                if len(waits) == len(kills):
                    waits.append(time.perf_counter() - start)
                steps_until_kill -= 1
                if steps_until_kill <= 0 and len(kills) < arguments.kills:
                    time.sleep(rng.uniform(0, 0.3))  # anywhere in a step or in a checkpoint
                    for each in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
                        each.kill()
                    kills.append(max((int(p.name.split("-")[1]) for p in killed.glob("checkpoint-*")), default=0))
                    break
            process.communicate()
        losses = []
        for run in (whole, killed):
            history = json.loads((run / "trainer_state.json").read_text())["log_history"]
            losses.append([entry["loss"] for entry in history if "loss" in entry])
        weights = [load_file(run / "model.safetensors") for run in (whole, killed)]
        differences = sum(not weights[0][name].equal(weights[1][name]) for name in weights[0])
    print(f"{len(kills)} kills; newest checkpoint, complete or not, at each: {kills}")
    print(f"losses of {len(losses[0])} steps: {'the same' if losses[0] == losses[1] else 'DIFFERENT'}")
    print(f"tensors of {len(weights[0])} that differ in a bit: {differences}")
    later = f"{min(waits[1:]):.1f} - {max(waits[1:]):.1f}"
    print(f"seconds from start to first new step: at first {waits[0]:.1f}, later {later}")
    if differences or losses[0] != losses[1]:
        sys.exit(1)


if __name__ == "__main__":
    main()
