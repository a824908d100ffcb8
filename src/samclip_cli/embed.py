"""`samclip embed`: precomputes the CLIP teacher's image embeddings, so that training does not run the teacher."""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from . import CommandError
from .argument_types import CommandParser, fraction, non_negative_int, positive_int
from .models import check_model
from .outputs import check_writable

if TYPE_CHECKING:
    import torch

    from samclip_hf.datasets.streams import Stream
    from samclip_hf.distillation import ClipTeacher

DESCRIPTION = """\
Precomputes the CLIP teacher's embeddings of images or regions, so that training does not run the
teacher.

examples:
  samclip embed --clip_teacher openai/clip-vit-base-patch16 --clip_data 'photos/*.tar' \\
      --output_dir embeddings --num_crops 4
  samclip embed --clip_teacher openai/clip-vit-base-patch16 --sam_teacher facebook/sam-vit-base \\
      --sam_data 'sa1b/*.tar' --output_dir region_embeddings
  samclip train my_recipe.yaml --clip_data 'photos/*.tar' --clip_embedding_cache embeddings \\
      --sam_data 'sa1b/*.tar' --region_embedding_cache region_embeddings

--clip_data embeds crops of images for the CLIP loss, --sam_data masks for the region loss; each
needs an --output_dir of its own. Training must use the same data, --seed, --min_crop_scale and
--regions_per_image. In its first --num_crops passes over the data it then draws the same crops or
regions as without the cache; later passes repeat them. An embedding takes 2 bytes per value: 1.5 KB
per crop or region for 768 dimensions.

The embeddings of a shard are written when the shard is complete; running the command again
continues with the remaining shards. Under accelerate launch -m samclip_cli embed, the processes
divide the shards among themselves."""


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser("embed", description=DESCRIPTION)
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
        help="images: folders, patterns, hf:// paths, datasets on the Hub, or 'miniature' (default: miniature, "
        "without --sam_data)",
    )
    parser.add_argument(
        "--sam_data", nargs="+", metavar="DATA", help="images with SA-1B annotations, in the same forms"
    )
    parser.add_argument(
        "--sam_teacher",
        metavar="NAME",
        help="for --sam_data: the SAM of the training, which determines the size of the images (default: miniature)",
    )
    parser.add_argument(
        "--regions_per_image",
        type=positive_int,
        metavar="N",
        help="for --sam_data: masks per image, at most masks_per_image of the training (default: 8)",
    )
    parser.add_argument(
        "--region_image_size",
        type=positive_int,
        metavar="PIXELS",
        help="for --sam_data: resolution at which regions are embedded (default: twice the teacher's, up to 448)",
    )
    parser.add_argument("--output_dir", type=Path, metavar="FOLDER", required=True, help="folder of the embeddings")
    parser.add_argument(
        "--num_crops",
        type=positive_int,
        metavar="N",
        default=1,
        help="crops per image, or draws of regions (default: %(default)s)",
    )
    parser.add_argument(
        "--min_crop_scale",
        type=fraction,
        metavar="P",
        help="for --clip_data: smallest area of a crop, as a fraction of the image (default: 0.5)",
    )
    parser.add_argument("--seed", type=int, default=42, help="seed of the crops (default: %(default)s)")
    parser.add_argument(
        "--batch_size",
        type=positive_int,
        metavar="N",
        default=256,
        help="crops or images per batch (default: %(default)s)",
    )
    parser.add_argument(
        "--num_workers",
        type=non_negative_int,
        metavar="N",
        default=0,
        help="data loader workers per process (default: %(default)s)",
    )
    parser.add_argument("--use_cpu", action="store_true", help="do not use a GPU")
    return parser


def run(argv: Sequence[str]) -> int:
    arguments = build_parser().parse_args(argv)
    if arguments.clip_data is not None and arguments.sam_data is not None:
        raise CommandError("Pass only one of --clip_data and --sam_data: each needs an --output_dir of its own.")
    with_regions = arguments.sam_data is not None
    of_regions = ("sam_teacher", "regions_per_image", "region_image_size")
    for name in ("min_crop_scale",) if with_regions else of_regions:
        if getattr(arguments, name) is not None:
            needed = "--clip_data" if with_regions else "--sam_data"
            raise CommandError(f"--{name} has no effect without {needed}.")
    for option in ("clip_teacher", "sam_teacher"):
        if getattr(arguments, option) not in (None, "miniature"):
            check_model(getattr(arguments, option), f"--{option}")
    check_writable(arguments.output_dir, "--output_dir")
    for data in arguments.sam_data if with_regions else arguments.clip_data or ():
        if Path(data).is_dir() and arguments.output_dir.resolve() == Path(data).resolve():
            raise CommandError(
                f"--output_dir {arguments.output_dir} contains the images: choose another folder, because files of "
                "embeddings would be read as data."
            )

    from accelerate import PartialState
    from tqdm import tqdm

    from samclip_hf import miniature
    from samclip_hf.datasets.streams import UNREADABLE_SHARD, DataError, open_stream
    from samclip_hf.distillation import ClipTeacher
    from samclip_hf.distillation.embedding_cache import embed_shards, shard_path, write_description

    state = PartialState(cpu=arguments.use_cpu)
    name = miniature.clip_teacher() if arguments.clip_teacher == "miniature" else arguments.clip_teacher
    try:
        teacher = ClipTeacher(name).to(state.device)
        streams = [
            open_stream(data, with_masks=with_regions)
            for data in (arguments.sam_data if with_regions else arguments.clip_data or ["miniature"])
        ]
        shards = [(number, shard) for number, stream in enumerate(streams) for shard in range(stream.num_shards)]
        own = shards[state.process_index :: state.num_processes]
        prepare = _prepare_regions if with_regions else _prepare_crops
        description, samples, embed, shape = prepare(arguments, teacher, streams, own, state.device)
        write_description(arguments.output_dir, description)
    except (OSError, TypeError, ValueError) as error:
        sys.exit(f"Nothing was computed. {error}")
    done = sum(shard_path(arguments.output_dir, *shard).is_file() for shard in own)

    causes: Counter[str] = Counter()
    num_images = 0
    parts = embed_shards(arguments.output_dir, samples, embed, shape, arguments.num_workers)
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


def _prepare_crops(
    arguments: argparse.Namespace,
    teacher: "ClipTeacher",
    streams: "list[Stream]",
    shards: list[tuple[int, int]],
    device: "torch.device",
) -> tuple:
    """Description, samples, function and shape for `embed_shards`, for the crops of images."""
    from samclip_hf.distillation import SamClipTrainingArguments
    from samclip_hf.distillation.embedding_cache import ShardCrops, describe_cache, embed_crops

    min_crop_scale = arguments.min_crop_scale or SamClipTrainingArguments.min_crop_scale
    description = describe_cache(teacher, streams, arguments.seed, min_crop_scale, arguments.num_crops)
    samples = ShardCrops(streams, shards, description, arguments.batch_size)
    shape = (arguments.num_crops, description.projection_dim)
    return description, samples, partial(embed_crops, teacher, device), shape


def _prepare_regions(
    arguments: argparse.Namespace,
    teacher: "ClipTeacher",
    streams: "list[Stream]",
    shards: list[tuple[int, int]],
    device: "torch.device",
) -> tuple:
    """As `_prepare_crops`, for the regions of images with masks."""
    from transformers import SamConfig

    from samclip_hf import miniature
    from samclip_hf.distillation import RegionTeacher, SamClipTrainingArguments
    from samclip_hf.distillation.collation import SamBatches
    from samclip_hf.distillation.embedding_cache import ShardRegions, describe_region_cache, embed_regions

    sam = miniature.sam_teacher() if arguments.sam_teacher in (None, "miniature") else arguments.sam_teacher
    sam_config = SamConfig.from_pretrained(sam).vision_config
    regions_per_image = arguments.regions_per_image or SamClipTrainingArguments.regions_per_image
    region_teacher = RegionTeacher(teacher, arguments.region_image_size)
    description = describe_region_cache(
        teacher,
        region_teacher,
        streams,
        arguments.seed,
        sam_config.image_size,
        regions_per_image,
        arguments.num_crops,
    )
    batches = SamBatches(
        streams,
        weights=[],
        image_size=sam_config.image_size,
        student_image_sizes=[sam_config.image_size],
        batch_size=1,
        masks_per_image=regions_per_image,
        max_box_noise=0.0,
        shuffle_buffer=1,
        regions_per_image=regions_per_image,
        mask_size=4 * sam_config.image_size // sam_config.patch_size,
    )
    samples = ShardRegions(streams, shards, description, batches, arguments.batch_size)
    shape = (arguments.num_crops, regions_per_image, description.projection_dim)
    return description, samples, partial(embed_regions, region_teacher, device), shape
