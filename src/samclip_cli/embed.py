"""
Computes the CLIP teacher's embeddings once, so that training need not run it.

    python training/cache_teacher.py --clip_teacher openai/clip-vit-base-patch16 --clip_data 'photos/*.tar' \
        --output_dir store --num_crops 4
    accelerate launch training/train.py ... --clip_data 'photos/*.tar' --clip_embedding_cache store

Data and `--min_crop_scale` must be those of the training; its first `num_crops` passes then see the crops that they would
have seen without, and later ones the same crops again. The same command goes on where it was interrupted; with
`accelerate launch` or `torchrun` every process takes shards of its own. Takes 2 bytes a value: 1.5 KB a crop for an
embedding of 768.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

from accelerate import PartialState
from tqdm import tqdm

from samclip_hf import miniature
from samclip_hf.datasets.streams import UNREADABLE_SHARD, open_stream
from samclip_hf.distillation import ClipTeacher
from samclip_hf.distillation.embedding_cache import describe_cache, embed_shards, shard_path, write_description


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip_teacher", default="miniature", help="as in training")
    parser.add_argument("--clip_data", nargs="+", default=["miniature"], help="as in training")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_crops", type=int, default=1, help="of each image (default: %(default)s)")
    parser.add_argument("--min_crop_scale", type=float, default=0.5, help="as in training (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="of the crops (default: training's, %(default)s)")
    parser.add_argument("--batch_size", type=int, default=256, help="crops at a time (default: %(default)s)")
    parser.add_argument("--num_workers", type=int, default=0, help="data loader workers a process")
    parser.add_argument("--use_cpu", action="store_true")
    arguments = parser.parse_args(argv)
    if arguments.num_crops < 1 or arguments.batch_size < 1 or not 0 < arguments.min_crop_scale <= 1:
        parser.error("num_crops and batch_size must be 1 or more, min_crop_scale above 0 and up to 1")

    state = PartialState(cpu=arguments.use_cpu)
    name = miniature.clip_teacher() if arguments.clip_teacher == "miniature" else arguments.clip_teacher
    try:
        teacher = ClipTeacher(str(name)).to(state.device)
        streams = [open_stream(data) for data in arguments.clip_data]
        description = describe_cache(teacher, streams, arguments.seed, arguments.min_crop_scale, arguments.num_crops)
        write_description(arguments.output_dir, description)
    except (OSError, TypeError, ValueError) as error:
        sys.exit(f"Nothing was computed. {error}")
    shards = [(number, shard) for number, stream in enumerate(streams) for shard in range(stream.num_shards)]
    own = shards[state.process_index :: state.num_processes]
    done = sum(shard_path(arguments.output_dir, *shard).is_file() for shard in own)

    causes: Counter[str] = Counter()
    samples = 0
    parts = embed_shards(
        arguments.output_dir,
        teacher,
        streams,
        description,
        own,
        arguments.batch_size,
        arguments.num_workers,
        state.device,
    )
    with tqdm(total=len(own), initial=done, unit="shard", disable=not state.is_main_process) as progress:
        try:
            for part in parts:
                samples += part["samples"]
                causes.update(part["causes"])
                progress.update(part["is_last"])
                progress.set_postfix(images=samples, unusable=causes.total())
        except OSError as error:  # a full disk
            sys.exit(f"Stopped. {error}\nShards that were finished are kept: the same command goes on from there.")
    print(f"{samples} images embedded, {causes.total()} of which cannot be used, by cause: {dict(causes)}.")
    if lost := causes[UNREADABLE_SHARD]:
        sys.exit(
            f"{lost} shards could not be read to their ends and were not stored. The same command tries them again."
        )


if __name__ == "__main__":
    main()
