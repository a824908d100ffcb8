"""What `samclip segment`, `classify` and `masks` read and write: checks before the work, and names of outputs."""

import argparse
import itertools
import os
import re
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import CommandError, log
from .formats import RESULTS, file_names, run_files
from .inputs import ImageInput, Inputs, find_inputs
from .models import check_models
from .outputs import check_outputs, check_writable, identity
from .run_record import RecordedOutputs, RunRecord, results_name

SHARD_NAME = re.compile(r"\d{5,}\.(parquet|tar)")  # of the datasets that annotate and index write
# Launchers of processes, and the variables of the environment in which they state the number of processes.
OTHER_LAUNCHERS = (("mpirun", "OMPI_COMM_WORLD_SIZE"), ("mpirun", "PMI_SIZE"), ("srun", "SLURM_STEP_NUM_TASKS"))


@dataclass
class Plan:
    """
    What a command reads and writes.

    arguments (`argparse.Namespace`):
        All arguments of the command.
    inputs (`Inputs`):
        The images.
    output (`Path`, *optional*):
        A folder or a file; `None` for standard output.
    is_folder (`bool`):
        Whether the output is a folder.
    formats (`Sequence[str]`):
        Names of the formats to write. Empty for standard output.
    process (`tuple[int, int]`):
        The number of this process, and the number of processes.
    data_set_files (`Sequence[str]`):
        Files and folders (with a final "/") of a dataset of all images in the output folder, which is written in
        addition to the formats.
    """

    arguments: argparse.Namespace
    inputs: Inputs
    output: Path | None
    is_folder: bool
    formats: Sequence[str]
    process: tuple[int, int]
    data_set_files: Sequence[str] = ()

    @property
    def has_record(self) -> bool:
        """Whether the run is recorded: it writes the results of several images, or a dataset, to a folder."""
        return self.is_folder and (self.inputs.count != 1 or bool(self.data_set_files))

    @property
    def run_files(self) -> list[str]:
        """Names of the files for all images in the output folder."""
        return [*run_files(self.formats, self.has_record), *self.data_set_files]

    @property
    def count(self) -> int | None:
        """The number of images of this process, if it is known."""
        count = self.inputs.count
        return None if count is None else len(range(self.process[0], count, self.process[1]))

    def images(self) -> Iterator[ImageInput]:
        """The images of this process: one of as many as there are processes."""
        return itertools.islice(self.inputs, self.process[0], None, self.process[1])


def prepare(arguments: argparse.Namespace, data_set_files: Sequence[str] = ()) -> Plan:
    """Finds the images and checks the output and the model. Raises `CommandError` if one of them cannot be used.
    Imports torch and transformers for tars and datasets only. See [`Plan`] for `data_set_files`."""
    process = find_process()
    inputs = find_inputs(arguments.images, arguments.output)
    plan = plan_output(arguments, inputs, process, data_set_files)
    check_models(arguments)
    return plan


def check_folder(output: str) -> None:
    """Raises `CommandError` for an `--output` that is not a folder, of commands that write folders only."""
    is_file = Path(output).suffix.lower() in (".png", ".json") and not output.endswith(os.sep)
    if output == "-" or (is_file and not os.path.isdir(output)):
        raise CommandError(f"--output {output}: pass a folder, such as out/.")


def find_process() -> tuple[int, int]:
    """The number of this process, and the number of processes, which `torchrun` and `accelerate launch` set. Raises
    `CommandError` for processes of other launchers, each of which would process all images."""
    if "RANK" in os.environ:
        return int(os.environ["RANK"]), int(os.environ.get("WORLD_SIZE", 1))
    for launcher, variable in OTHER_LAUNCHERS:
        if (count := int(os.environ.get(variable) or 1)) > 1:
            raise CommandError(
                f"{launcher} has started {count} processes, and each of them would process all images. Start the "
                f"processes with 'torchrun --nproc_per_node {count} -m samclip_cli ...' instead."
            )
    return 0, 1


def plan_output(
    arguments: argparse.Namespace, inputs: Inputs, process: tuple[int, int], data_set_files: Sequence[str] = ()
) -> Plan:
    """Interprets `--output`. Raises `CommandError` for an output that cannot be written, that is an input image, or
    that exists without `--overwrite`. Outputs of a recorded run are checked after its record has been read."""
    output = arguments.output
    path = None if output is None else Path(output)
    is_file = path is not None and path.suffix.lower() in (".png", ".json") and not output.endswith(os.sep)
    if path is None or output == "-":
        if path is not None:
            raise CommandError("--output -: without --output, JSON is written to standard output.")
        if arguments.formats is not None:
            raise CommandError("--formats has no effect without a folder as --output.")
        if sys.stdout is None:
            raise CommandError("standard output is closed: pass --output.")
        if process[1] > 1:
            raise CommandError("several processes cannot share standard output: pass a folder as --output.")
        return Plan(arguments, inputs, None, False, (), process)
    if os.path.isdir(path):
        is_file = False
    elif os.path.lexists(path) and not os.path.isfile(path):  # such as /dev/null, or a broken link
        raise CommandError(f"--output {output}: neither a file nor a folder.")
    elif is_file:
        if inputs.count != 1:
            count = "may be several" if inputs.count is None else f"are {inputs.count}"
            raise CommandError(f"--output {output} is one file, but there {count} images: pass a folder.")
        if not os.path.isdir(path.parent):
            raise CommandError(f"--output {output}: the folder {path.parent} does not exist.")
    elif os.path.isfile(path) or (path.suffix and not output.endswith(os.sep)):
        raise CommandError(f"--output {output} must end in .png or .json, or be a folder, such as {path.stem}/.")
    check_writable(path.parent if is_file else path, "--output")
    if is_file and arguments.formats is not None:
        raise CommandError(f"--formats has no effect with the file {output}: pass a folder as --output.")
    if is_file:
        plan = Plan(arguments, inputs, path, False, ("overlay" if path.suffix.lower() == ".png" else "json",), process)
    else:
        formats = arguments.formats or arguments.default_formats
        plan = Plan(arguments, inputs, path, True, formats, process, data_set_files)
    if not plan.has_record:
        check_plan(plan, OutputNames(plan), None)
    return plan


class OutputNames:
    """
    Names of the outputs of images, of which no two write the same file.

    Files are compared without regard to case and to the encoding of accents, as some file systems do. Images whose
    files others write get a number.

    plan (`Plan`):
        The images and formats.
    names (`dict[str, str]`):
        Names of images by their keys, which are kept.
    """

    def __init__(self, plan: Plan, names: dict[str, str] | None = None):
        self.formats = plan.formats
        self.names = dict(names or {})
        self._used = {_normalize(name) for name in plan.run_files}
        self._used.update(*map(self._files, self.names.values()))
        self._stems = set(itertools.chain.from_iterable(self._files(image.stem) for image in plan.inputs.listed))
        renamed = []
        for image in plan.inputs.listed:
            if self.name(image) != image.stem:
                renamed.append(image)
        if renamed:
            log(
                f"several images have the same name: a number is appended to {len(renamed)} outputs, such as "
                f'{self.names[renamed[0].key]} for {renamed[0].key}. The field "image" of the JSON has the full path.'
            )

    def name(self, image: ImageInput) -> str:
        """The file name of the outputs of an image, without extension."""
        if image.key not in self.names:
            name = image.stem
            if self._used & self._files(name):
                numbers = (f"{image.stem}-{number}" for number in itertools.count(2))
                name = next(name for name in numbers if not (self._used | self._stems) & self._files(name))
            self.names[image.key] = name
            self._used |= self._files(name)
        return self.names[image.key]

    def _files(self, name: str) -> set[str]:
        return {_normalize(file) for file in file_names(name, self.formats)}


def _normalize(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def check_plan(plan: Plan, names: OutputNames, record: RunRecord | None) -> None:
    """Raises `CommandError` if an output of this process would replace an input image, or another file that may not be
    replaced. Images of datasets are checked when they are written."""
    assert plan.output is not None
    may_replace = plan.arguments.overwrite or (record is not None and record.replaces)
    if not plan.is_folder:
        check_outputs([plan.output], plan.inputs.files, may_replace)
        return
    begun: list[str] = []  # outputs of images that the run has begun to write
    new: list[str] = []
    for image in itertools.islice(plan.inputs.listed, plan.process[0], None, plan.process[1]):
        is_begun = record is not None and image.key in record.names
        (begun if is_begun else new).extend(file_names(names.name(image), plan.formats))
    if record is None or not record.exists:
        new += plan.run_files + [results_name(plan.process)] * (RESULTS in plan.run_files)
    parents = {identity(file.parent) for file in plan.inputs.files}
    for files, replace in ((begun, True), (new, may_replace)):
        check_outputs([plan.output / name for name in files if not name.endswith("/")], plan.inputs.files, replace)
        for name in (name for name in files if name.endswith("/")):
            folder = plan.output / name
            if not os.path.lexists(folder):
                continue
            if not folder.is_dir():
                raise CommandError(f"--output: {folder} cannot be written, because it is not a folder.")
            is_read = name in plan.data_set_files and any(_is_within(folder, own) for own in plan.inputs.folders)
            if identity(folder) in parents or is_read:
                raise CommandError(f"--output: {folder} has input images: pass another folder as --output.")
            if not replace and any(folder.iterdir()):
                raise CommandError(
                    f"{folder} would be overwritten. Pass --overwrite to replace existing files, or another --output."
                )
    _check_shards(plan)


def _check_shards(plan: Plan) -> None:
    """Raises `CommandError` if a folder of the dataset has a file with the name of a shard that no run has written:
    shards are replaced, and deleted if there are fewer than before."""
    assert plan.output is not None
    recorded = RecordedOutputs(plan.output).names
    for folder in (plan.output / name for name in plan.data_set_files if name.endswith("/")):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if SHARD_NAME.fullmatch(path.name) and f"{folder.name}/{path.name}" not in recorded:
                raise CommandError(
                    f"--output: {path} is not replaced or deleted, because it is not recorded as an output of a "
                    "command. Move it to another folder, or pass another --output."
                )


def _is_within(folder: Path, other: Path) -> bool:
    """Whether one of two folders is the other one or is in it. `other` has no links."""
    resolved = folder.resolve()
    return resolved.is_relative_to(other) or other.is_relative_to(resolved)
