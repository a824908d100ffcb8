"""`samclip publish`: builds a model repository, verifies it, and uploads it to the Hub."""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from . import CommandError
from .argument_types import CommandParser
from .models import check_model
from .outputs import check_writable

DESCRIPTION = """\
Builds a model repository from a training output, verifies it, and uploads it to the Hub.

examples:
  samclip publish runs/stage3 me/my-samclip --results runs/evaluation/results.json --dry_run
  samclip publish miniature me/my-samclip --folder repository --dry_run

The repository contains the weights, the model code and a model card, which is written from the
training output's provenance.json and the results of samclip evaluate. Before the upload, a new
process without this package loads the repository through every Auto class and pipeline, and the
outputs are compared with those of the model. The upload is a single commit. Running the command
again uploads only the files that have changed.

The unmerged model of a SAM and a CLIP (--sam and --clip of other commands, SAM+CLIP of samclip
evaluate) must be saved in a folder first:
  SamClipForImageSegmentation.from_teachers(SAM, CLIP, merged=False).save_pretrained(FOLDER)
  SamClipProcessor.from_teachers(SAM, CLIP).save_pretrained(FOLDER)"""
PAIR_HINT = "save the unmerged model of the SAM and the CLIP in a folder, as --help shows, and pass the folder."


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser("publish", dict.fromkeys(("--sam", "--clip"), PAIR_HINT), description=DESCRIPTION)
    parser.add_argument(
        "model", metavar="MODEL", help="a training output folder, or 'miniature' for the shipped model"
    )
    parser.add_argument("repo_id", metavar="REPO_ID", help="OWNER/NAME on the Hub, or NAME in your own namespace")
    parser.add_argument(
        "--folder", type=Path, metavar="FOLDER", help="also write the repository to this folder, which must not exist"
    )
    parser.add_argument(
        "--results", type=Path, metavar="FILE", help="results.json of samclip evaluate, for the model card"
    )
    parser.add_argument(
        "--results_name", metavar="NAME", help="the model's name in the results (default: the name with its weights)"
    )
    parser.add_argument(
        "--example",
        type=Path,
        metavar="IMAGE",
        help="image for the verification and the model card (default: a synthetic scene)",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="data type of the weights (default: that of the training output)",
    )
    parser.add_argument(
        "--max_shard_size", metavar="SIZE", default="5GB", help="largest weight file (default: %(default)s)"
    )
    parser.add_argument(
        "--license",
        metavar="ID",
        help="license identifier of the Hub (default: apache-2.0 if the licenses of all teachers are known and "
        "permissive, otherwise 'other')",
    )
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to upload to; created if it does not exist")
    parser.add_argument("--create_pr", "--create-pr", action="store_true", help="upload as a pull request")
    parser.add_argument("--update", action="store_true", help="allow a commit to a repository that is not empty")
    parser.add_argument(
        "--dry_run", "--dry-run", action="store_true", help="build and verify the repository, but do not upload it"
    )
    return parser


def run(argv: Sequence[str]) -> int:
    arguments = build_parser().parse_args(argv)
    if arguments.model != "miniature":
        check_model(arguments.model, "MODEL")
    if arguments.folder is not None:
        if os.path.lexists(arguments.folder):
            raise CommandError(f"--folder {arguments.folder} exists: pass a new folder.")
        check_writable(arguments.folder, "--folder")

    from huggingface_hub import ModelCard
    from huggingface_hub.utils import HFValidationError, validate_repo_id
    from PIL import Image

    from samclip_hf import miniature
    from samclip_hf.evaluation import read_results
    from samclip_hf.images import open_image
    from samclip_hf.miniature.scenes import render
    from samclip_hf.publishing import (
        UNKNOWN_LICENSE,
        PublishingError,
        build_repository,
        create_model_card,
        draw_example_image,
        find_results,
        publish_provenance,
        push,
        resolve_target,
        verify,
    )

    source = miniature.checkpoint() if arguments.model == "miniature" else arguments.model
    repo_id = arguments.repo_id
    target = (arguments.private, arguments.revision, arguments.create_pr, arguments.update)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "repository")
        try:
            validate_repo_id(repo_id)
            results = results_name = None
            if arguments.results is not None:
                try:
                    results = read_results(arguments.results)
                except (OSError, ValueError) as error:
                    raise PublishingError(f"--results: {error}") from error
                results_name = find_results(results, source, arguments.results_name)
            elif arguments.results_name is not None:
                raise PublishingError("--results_name requires --results.")
            image = Image.fromarray(render(seed=0, index=8).image)
            if arguments.example is not None:
                image = open_image(arguments.example)
            if not arguments.dry_run:
                repo_id = resolve_target(repo_id, *target)
            print(f"Building {repo_id} from {source} ...", flush=True)
            build_repository(source, folder, arguments.dtype, arguments.max_shard_size)
            print("Verifying it in a new process without this package ...", flush=True)
            for output, difference in verify(folder, image).items():
                print(f"  {output}: largest difference {difference:.2g} of its largest value")
            draw_example_image(folder, image, folder / "example.png")
            stages, licenses = publish_provenance(source, folder)
            model_card = create_model_card(
                folder, repo_id, stages, results, results_name, licenses, True, arguments.license
            )
            if model_card.data.get("license") == UNKNOWN_LICENSE:
                print(
                    "The licenses of the teachers are unknown or not all permissive: the model card has the license "
                    "'other'. Check the licenses, and set one with --license."
                )
            model_card.save(folder / "README.md")
            ModelCard.load(folder / "README.md")  # raises if the metadata cannot be read
            if arguments.folder is not None:
                shutil.copytree(folder, arguments.folder)
            if arguments.dry_run:
                print("Verified. Nothing was uploaded (--dry_run).")
                if arguments.folder is not None:
                    print(f"The repository is in {arguments.folder}.")
                return 0
            url = push(folder, repo_id, *target)
        except (OSError, Image.DecompressionBombError, HFValidationError, PublishingError) as error:
            sys.exit(f"Nothing was published. {error}")
    print(f"Published: {url}")
    return 0
