"""
The record of a run over several images, with which the same command continues after an interruption, even by
`kill -9`.

The record is the folder `.samclip` in the output folder. `run.json` describes the options and the model. Each process
has a journal, such as `images-00000-of-00002.jsonl`, with two lines for each image: one with its output name before
outputs are written, and one when all of them are complete. Results of all images, one line of JSON each, are in
`results.jsonl`, or in `results-00000-of-00002.jsonl` and so on for several processes. `outputs-00000-of-00002.jsonl`
has the names of all outputs, also of earlier runs and of runs on a single image, which have no other record.
"""

import contextlib
import json
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from . import CommandError
from .formats import RESULTS

if TYPE_CHECKING:
    from .inputs import ImageInput

FOLDER = ".samclip"
SINGLE_PROCESS = (0, 1)  # its number, and the number of processes
LONGEST_VALUE = 60  # of an option in messages, in characters


class RecordedOutputs:
    """
    What runs have written or begun to write to a folder, so that the outputs in a folder of images are not taken for
    inputs, and files of other origin are not deleted. Each process appends names to a file of its own, which stays
    when a run is started again. Empty without such files.

    folder (`str` or `Path`):
        An output folder, or any other.

    Attributes:
        names (`set[str]`): Files and folders (with a final "/") in the folder, and, as "parquet/00000.parquet", the
            shards of datasets.
    """

    def __init__(self, folder: str | Path):
        self.folder, self.record = os.path.realpath(folder), Path(folder, FOLDER)
        self.names: set[str] = set()
        for path in self.record.glob("outputs-*.jsonl"):
            with contextlib.suppress(OSError):
                for line in path.read_bytes().splitlines():
                    entry = _parse(line + b"\n")  # None if a killed process has not completed it
                    if isinstance(entry, str):
                        self.names.add(entry)
                    elif isinstance(entry, dict):
                        self.names.discard(entry.get("deleted", ""))

    def add(self, names: Iterable[str], process: tuple[int, int]) -> None:
        """Records outputs, before a process writes them."""
        if new := [name for name in names if name not in self.names]:
            self._append(new, process)
            self.names.update(new)

    def delete_others(self, folder: str, kept: Collection[str], process: tuple[int, int]) -> None:
        """Deletes the recorded files in a folder, such as "parquet/", but `kept`. Only one process may call it."""
        for name in sorted(name for name in self.names - set(kept) if name.startswith(folder) and name != folder):
            Path(self.folder, name).unlink(missing_ok=True)
            self._append([{"deleted": name}], process)
            self.names.discard(name)

    def _append(self, entries: Iterable[Any], process: tuple[int, int]) -> None:
        from samclip_hf.files import named_disk_errors

        path = self.record / f"outputs-{_shard(process)}.jsonl"
        self.record.mkdir(exist_ok=True)
        with named_disk_errors(path), open(path, "ab") as file:
            # The line break is first, because the last line may be incomplete.
            file.write(b"".join(b"\n" + json.dumps(entry).encode() for entry in entries))

    def __contains__(self, path: str) -> bool:
        if not self.names:
            return False
        parent = os.path.realpath(os.path.dirname(path))
        parts = Path(os.path.relpath(parent, self.folder), os.path.basename(path)).parts
        return parts[0] in self.names if len(parts) == 1 else f"{parts[0]}/" in self.names


class ResultLine(NamedTuple):
    """The position of a line of JSON, in bytes."""

    file: Path
    start: int
    end: int


class RunRecord:
    """
    The record of a run, as one of its processes reads and continues it. The constructor changes nothing on disk.

    output (`Path`):
        The output folder. It need not exist.
    description (`dict`):
        What the results depend on besides the images. JSON-serializable.
    files (`Sequence[str]`):
        Names of the files for all images. "results.jsonl" stands for the results of each process.
    overwrite (`bool`):
        Whether to start a new run in the place of an existing one.
    process (`tuple[int, int]`):
        The number of this process, and the number of processes.

    Attributes:
        exists (`bool`): Whether an existing run is continued.
        replaces (`bool`): Whether the run was started with `overwrite`: it may replace any output.
        names (`dict[str, str]`): Output names of the images that any process has begun to write, by their keys.
        done (`set[str]`): Keys of the images whose outputs are complete.

    Raises `CommandError` if `overwrite` is false and the folder has a run with another description, or a run whose
    results have been shortened.
    """

    def __init__(
        self,
        output: Path,
        description: dict[str, Any],
        files: Sequence[str],
        overwrite: bool,
        process: tuple[int, int],
    ):
        from samclip_hf.identity import hash_json

        self.output, self.folder, self.process = output, output / FOLDER, process
        self.description, self.files = json.loads(json.dumps(description)), files
        self.header = {"run": hash_json(self.description)}
        self.journal = self.folder / f"images-{_shard(process)}.jsonl"
        self.exists, self.replaces = False, overwrite
        self.names: dict[str, str] = {}
        self.done: set[str] = set()
        self.lines: dict[str, ResultLine] = {}
        self._states: dict[str, list[int] | None] = {}
        self._journal_size = self._results_size = self._journal_end = 0
        if not overwrite and (self.folder / "run.json").exists():
            self._read()

    def _read(self) -> None:
        path = self.folder / "run.json"
        try:
            run = json.loads(path.read_bytes())
            description = run["description"]
        except (ValueError, LookupError) as error:
            raise CommandError(f"{path} is not the record of a run: pass another --output.") from error
        if differences := _differences(description, self.description):
            raise CommandError(
                f"{self.output} has the results of another run, with {'; '.join(differences)}. Pass another --output, "
                "or --overwrite to start again."
            )
        self.exists, self.replaces = True, run["overwrite"]
        self._finish_join()
        for journal in sorted(self.folder.glob("images-*.jsonl")):
            self._read_journal(journal)

    def _read_journal(self, journal: Path) -> None:
        results = _results_of(self.output, journal)
        results_size = results.stat().st_size if results.exists() else 0
        valid = end = 0
        for number, line in enumerate(content := journal.read_bytes().splitlines(keepends=True)):
            entry = _parse(line)
            if entry is None or (number == 0 and entry != self.header):
                break  # the process was killed while it wrote the line, or the journal belongs to an older run
            valid += len(line)
            if "name" in entry:
                self.names[entry["image"]], self._states[entry["image"]] = entry["name"], entry["file"]
            elif "end" in entry:
                if entry["end"] > results_size:
                    raise CommandError(
                        f"{results} has lost lines since it was written. Pass another --output, or --overwrite to "
                        "start again."
                    )
                self.done.add(entry["image"])
                if entry["end"] > end:
                    self.lines[entry["image"]] = ResultLine(results, end, entry["end"])
                    end = entry["end"]
        if journal == self.journal:
            self._journal_size, self._journal_end, self._results_size = sum(map(len, content)), valid, end

    def check_unchanged(self, images: Iterable["ImageInput"]) -> None:
        """Raises `CommandError` if a file has changed since the outputs of its images were written."""
        done = (image for image in images if image.key in self.done)
        changed = [image.key for image in done if file_state(image.file) != self._states[image.key]]
        if changed:
            images_have = f" and {len(changed) - 1} more images have" if len(changed) > 1 else " has"
            raise CommandError(
                f"{changed[0]}{images_have} changed since the results in {self.output} were written. Pass another "
                "--output, or --overwrite to start again."
            )

    def open(self) -> None:
        """
        Opens the files of this process, after checks of the outputs.

        Raises `CommandError` if another process writes them, or if the results would replace a file of another origin.
        """
        from samclip_hf.files import write_atomically

        results, has_results = _results_of(self.output, self.journal), RESULTS in self.files
        if has_results and results.exists() and not self._journal_end and not self.replaces:
            raise CommandError(f"{results} would be overwritten. Pass another --output, or --overwrite.")
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.exists:
            if self.process[0] == 0 and self.replaces:
                self._remove_older_run()
            run = {"description": self.description, "files": self.files, "overwrite": self.replaces}
            write_atomically(self.folder / "run.json", json.dumps(run, indent=1) + "\n")
        self._journal_file = open(self.journal, "ab")  # noqa: SIM115
        _lock(self._journal_file, self.output)
        if self.exists and self._journal_file.tell() != self._journal_size:
            raise _is_in_use(self.output)
        self._journal_file.truncate(self._journal_end)
        if not self._journal_end:
            self._append(self.header)
        self._results_file = None
        if has_results:
            self._results_file = open(results, "ab")  # noqa: SIM115
            self._results_file.truncate(self._results_size)

    def _remove_older_run(self) -> None:
        """Removes files for all images, and the journals and results of other numbers of processes."""
        files = list(self.files)
        with contextlib.suppress(FileNotFoundError, ValueError, LookupError):
            files += json.loads((self.folder / "run.json").read_bytes())["files"]
        for name in files:
            if not name.endswith("/"):  # files of a folder are replaced when it is written
                (self.output / name).unlink(missing_ok=True)
        for journal in self.folder.glob("images-*.jsonl"):
            if not journal.stem.endswith(_shard(self.process).partition("-")[2]):
                _results_of(self.output, journal).unlink(missing_ok=True)
                journal.unlink()

    def begin(self, image: "ImageInput", name: str) -> None:
        """Records the output name of an image, before its outputs are written."""
        if image.key not in self.names:
            self.names[image.key], self._states[image.key] = name, file_state(image.file)
            self._append({"image": image.key, "name": name, "file": self._states[image.key]})

    def finish(self, image: "ImageInput", result: str) -> None:
        """Writes the line of an image to the results, and records that its outputs are complete."""
        from samclip_hf.files import named_disk_errors

        start = end = self._results_size
        if self._results_file is not None and image.key not in self.lines:
            line = result.encode() + b"\n"
            results = _results_of(self.output, self.journal)
            with named_disk_errors(results):
                self._results_file.write(line)
                self._results_file.flush()
            end = self._results_size = start + len(line)
            self.lines[image.key] = ResultLine(results, start, end)
        self._append({"image": image.key, "end": end})
        self.done.add(image.key)

    def _append(self, entry: dict[str, Any]) -> None:
        from samclip_hf.files import named_disk_errors

        with named_disk_errors(self.journal):
            self._journal_file.write(json.dumps(entry).encode() + b"\n")
            self._journal_file.flush()

    def close(self) -> None:
        self._journal_file.close()
        if self._results_file is not None:
            self._results_file.close()

    def join(self, images: Iterable["ImageInput"]) -> None:
        """
        Joins the results of several processes to `results.jsonl`, in the order of `images`, and deletes their files.
        Call it in a single process, after `close`.

        The new journal is written before anything is replaced. If the process is killed afterwards, the next one
        continues with the steps of `_finish_join`.
        """
        if {line.file for line in self.lines.values()} <= {self.output / RESULTS}:
            return
        from samclip_hf.files import atomic_path, write_atomically

        keys = dict.fromkeys(image.key for image in images if image.key in self.lines)
        keys |= dict.fromkeys(self.lines)  # images of earlier commands
        entries: list[dict[str, Any]] = [self.header]
        entries += [{"image": key, "name": self.names[key], "file": self._states[key]} for key in self.names]
        end = 0
        with atomic_path(self.folder / RESULTS) as temporary, open(temporary, "wb") as joined:
            for key in keys:
                end += joined.write(self.read(key))
                entries.append({"image": key, "end": end})
        journal = "".join(json.dumps(entry) + "\n" for entry in entries)
        write_atomically(self.folder / "joined.jsonl", journal)
        self._finish_join()
        start = 0
        for entry in entries:
            if "end" in entry:
                self.lines[entry["image"]] = ResultLine(self.output / RESULTS, start, entry["end"])
                start = entry["end"]

    def _finish_join(self) -> None:
        joined = self.folder / "joined.jsonl"
        if not joined.exists():
            return
        with contextlib.suppress(FileNotFoundError):  # done before the process was killed
            os.replace(self.folder / RESULTS, self.output / RESULTS)
        own = self.folder / f"images-{_shard(SINGLE_PROCESS)}.jsonl"
        for journal in self.folder.glob("images-*.jsonl"):
            if journal != own:
                _results_of(self.output, journal).unlink(missing_ok=True)
                journal.unlink()
        os.replace(joined, own)

    def read(self, key: str) -> bytes:
        """The line of an image in the results."""
        line = self.lines[key]
        with open(line.file, "rb") as file:
            file.seek(line.start)
            return file.read(line.end - line.start)


def _shard(process: tuple[int, int]) -> str:
    number, count = process
    return f"{number:05d}-of-{count:05d}"


def _results_of(output: Path, journal: Path) -> Path:
    name = journal.name.replace("images-", "results-")
    return output / (RESULTS if name == f"results-{_shard(SINGLE_PROCESS)}.jsonl" else name)


def results_name(process: tuple[int, int]) -> str:
    """Name of the file with the results of a process, the number of which and of all processes is given."""
    return _results_of(Path(), Path(f"images-{_shard(process)}.jsonl")).name


def _parse(line: bytes) -> Any:
    """The content of a line, or `None` if it is incomplete."""
    try:
        return json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None


def file_state(path: str | Path | None) -> list[int] | None:
    """Size and time of modification of a file; `None` if it cannot be read, or without a path."""
    try:
        status = None if path is None else os.stat(path)
    except OSError:
        status = None
    return None if status is None else [status.st_size, status.st_mtime_ns]


def recorded_states(output: Path) -> dict[str, list[int] | None]:
    """The states of the files of images, see [`file_state`], when the run in a folder began to write their outputs, by
    the keys of the images. Empty without a record."""
    states = {}
    for journal in sorted((output / FOLDER).glob("images-*.jsonl")):
        for line in journal.read_bytes().splitlines(keepends=True):
            if (entry := _parse(line)) is not None and "name" in entry:
                states[entry["image"]] = entry["file"]
    return states


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Texts about the values of nested descriptions that differ."""
    texts = []
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            texts += _differences(before, after)
        elif before != after and key in ("weights", "configuration"):  # hashes
            texts.append(f"{'other' if key == 'weights' else 'another'} {key} of the model")
        elif before != after:
            texts.append(f"another {key} ({_value_text(before)} instead of {_value_text(after)})")
    return texts


def _value_text(value: Any) -> str:
    """The value of an option, for messages."""
    if value is None:
        return "not given"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."


def _is_in_use(output: Path) -> CommandError:
    return CommandError(
        f"another process writes to {output}. To share the images among processes, start them with one command: "
        "'torchrun --nproc_per_node 2 -m samclip_cli ...'."
    )


def _lock(file, output: Path) -> None:
    """Prevents two commands from writing the same journal. The lock ends with the process."""
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _is_in_use(output) from error
    except OSError:  # a file system without locks
        return
