"""
Makes a repository on the Hub of a training output, and proves it before anything is pushed.

    python training/publish.py runs/stage3 me/my-samclip --results runs/evaluation/results.json --dry-run

Copies weights and code into a folder, loads it in a fresh interpreter without this package through every Auto class
and pipeline, compares the outputs, and writes the card from `provenance.json` and `results.json`. Only then, and not
with --dry-run, one commit. The same command again sends only what changed.
"""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from huggingface_hub import ModelCard
from huggingface_hub.utils import HFValidationError, validate_repo_id
from PIL import Image, ImageOps

from samclip_hf import miniature
from samclip_hf.miniature.scenes import render
from samclip_hf.publishing import (
    UNKNOWN_LICENSE,
    PublishingError,
    build_repository,
    check_results_name,
    create_model_card,
    draw_example_image,
    publish_provenance,
    push,
    read_results,
    resolve_target,
    verify,
)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="training output: a folder, or 'miniature' for the shipped one")
    parser.add_argument("repo_id", help="owner/name on the Hub, or a name of one's own")
    parser.add_argument("--folder", type=Path, help="a new folder, for what is published to be seen or kept")
    parser.add_argument("--results", type=Path, help="results.json of evaluate.py, for the card")
    parser.add_argument("--results_name", help="what the results call this model (default: its folder's name)")
    parser.add_argument("--example", type=Path, help="a picture for the proof and the card (default: a drawn scene)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights (default: as is)")
    parser.add_argument("--max_shard_size", default="5GB")
    parser.add_argument("--license", help="as the Hub names it (default: apache-2.0 if the teachers' allow it)")
    parser.add_argument("--private", action="store_true")
    parser.add_argument("--revision", help="a branch, made if there is none")
    parser.add_argument("--create-pr", action="store_true", help="as a pull request")
    parser.add_argument("--update", action="store_true", help="add a commit to a repository that is not empty")
    parser.add_argument("--dry-run", action="store_true", help="stop before the push")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    source = miniature.checkpoint() if arguments.model == "miniature" else arguments.model
    repo_id = arguments.repo_id
    how = (arguments.private, arguments.revision, arguments.create_pr, arguments.update)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "repository")
        try:
            if arguments.folder is not None and arguments.folder.exists():
                raise PublishingError(f"{arguments.folder} exists: name a new folder.")
            validate_repo_id(repo_id)
            results = None if arguments.results is None else read_results(arguments.results)
            results_name = arguments.results_name or Path(os.path.abspath(source)).name  # as evaluate.py calls it
            if results is not None:
                check_results_name(results, results_name)
            elif arguments.results_name is not None:
                raise PublishingError("--results_name is of --results: give it too.")
            picture = Image.fromarray(render(seed=0, index=8).image)
            if arguments.example is not None:
                picture = ImageOps.exif_transpose(Image.open(arguments.example)).convert("RGB")
            if not arguments.dry_run:
                repo_id = resolve_target(repo_id, *how)
            print(f"Putting together {repo_id} from {source} ...", flush=True)
            build_repository(source, folder, arguments.dtype, arguments.max_shard_size)
            print("Loading it in a fresh interpreter without this package ...", flush=True)
            for output, difference in verify(folder, picture).items():
                print(f"  {output}: differs by {difference:.2g} of its largest value")
            draw_example_image(folder, picture, folder / "example.png")
            stages, licenses = publish_provenance(source, folder)
            made = create_model_card(folder, repo_id, stages, results, results_name, licenses, True, arguments.license)
            if made.data.license == UNKNOWN_LICENSE:
                print("Not all teachers' licences are on record and permissive: the card says 'other'. See --license.")
            made.save(folder / "README.md")
            ModelCard.load(folder / "README.md")  # its metadata can be read
            if arguments.folder is not None:
                shutil.copytree(folder, arguments.folder)
            if arguments.dry_run:
                print(f"Proven, and not pushed: --dry-run.{f' See {arguments.folder}.' if arguments.folder else ''}")
                return
            address = push(folder, repo_id, *how)
        except (OSError, Image.DecompressionBombError, HFValidationError, PublishingError) as error:
            sys.exit(f"Nothing was published. {error}")
        print(f"Published: {address}")


if __name__ == "__main__":
    main()
