"""`samclip embed`: precomputes the CLIP teacher's image embeddings, so that training does not run the teacher."""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .argument_types import fraction, positive_int
from .models import check_model
from .outputs import check_writable

DESCRIPTION = """\
Precomputes the CLIP teacher's image embeddings, so that training does not run the teacher.

examples:
  samclip embed --clip_teacher openai/clip-vit-base-patch16 --clip_data 'photos/*.tar' \\
      --output_dir embeddings --num_crops 4
  samclip train my_recipe.yaml --clip_data 'photos/*.tar' --clip_embedding_cache embeddings

Training must use the same --clip_data, --min_crop_scale and --seed. In its first --num_crops
passes over the data it then draws the same crops as without the cache; later passes repeat these
crops. An embedding takes 2 bytes per value: 1.5 KB per crop for 768 dimensions.

The embeddings of a shard are written when the shard is complete; running the command again
continues with the remaining shards. Under accelerate launch -m samclip_cli embed, the processes
divide the shards among themselves."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="samclip embed", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--clip_teacher",
        metavar="NAME",
        default="miniature",
        help="a CLIP or SigLIP: a folder, a repository on the Hub, or 'miniature' (default: %(default)s)",
    )
    parser.add_argument(
        "--clip_data",
        nargs="+",
        metavar="DATA",
        default=["miniature"],
        help="images: folders, patterns, hf:// paths, datasets on the Hub, or 'miniature' (default: miniature)",
    )
    parser.add_argument("--output_dir", type=Path, metavar="FOLDER", required=True, help="folder of the embeddings")
    parser.add_argument(
        "--num_crops", type=positive_int, metavar="N", default=1, help="crops per image (default: %(default)s)"
    )
    parser.add_argument(
        "--min_crop_scale",
        type=fraction,
        metavar="P",
        default=0.5,
        help="smallest area of a crop, as a fraction of the image (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=42, help="seed of the crops (default: %(default)s)")
    parser.add_argument(
        "--batch_size", type=positive_int, metavar="N", default=256, help="crops per batch (default: %(default)s)"
    )
    parser.add_argument(
        "--num_workers",
        type=int,
        metavar="N",
        default=0,
        help="data loader workers per process (default: %(default)s)",
    )
    parser.add_argument("--use_cpu", action="store_true", help="do not use a GPU")
    return parser


def run(argv: Sequence[str]) -> int:
    arguments = build_parser().parse_args(argv)
    if arguments.clip_teacher != "miniature":
        check_model(arguments.clip_teacher, "--clip_teacher")
    check_writable(arguments.output_dir, "--output_dir")

    from accelerate import PartialState
    from tqdm import tqdm

    from samclip_hf import miniature
    from samclip_hf.datasets.streams import UNREADABLE_SHARD, DataError, open_stream
    from samclip_hf.distillation import ClipTeacher
    from samclip_hf.distillation.embedding_cache import describe_cache, embed_shards, shard_path, write_description

    state = PartialState(cpu=arguments.use_cpu)
    name = miniature.clip_teacher() if arguments.clip_teacher == "miniature" else arguments.clip_teacher
    try:
        teacher = ClipTeacher(name).to(state.device)
        streams = [open_stream(data) for data in arguments.clip_data]
        description = describe_cache(teacher, streams, arguments.seed, arguments.min_crop_scale, arguments.num_crops)
        write_description(arguments.output_dir, description)
    except (OSError, TypeError, ValueError) as error:
        sys.exit(f"Nothing was computed. {error}")
    shards = [(number, shard) for number, stream in enumerate(streams) for shard in range(stream.num_shards)]
    own = shards[state.process_index :: state.num_processes]
    done = sum(shard_path(arguments.output_dir, *shard).is_file() for shard in own)

    causes: Counter[str] = Counter()
    num_images = 0
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
                num_images += part["samples"]
                causes.update(part["causes"])
                progress.update(part["is_last"])
                progress.set_postfix(images=num_images, skipped=causes.total())
        except (OSError, DataError) as error:  # such as a full disk, or a tar in the wrong order
            sys.exit(
                f"Stopped: {error}\nThe embeddings of complete shards are kept. Run the same command to continue."
            )
    print(f"{num_images} images were read and {causes.total()} of them skipped, by cause: {dict(causes)}.")
    if unreadable := causes[UNREADABLE_SHARD]:
        sys.exit(
            f"{unreadable} shards could not be read completely, and their embeddings are not stored. Run the same "
            "command to try them again."
        )
    return 0
