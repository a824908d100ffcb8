"""
Functions for `samclip segment`, `classify` and `masks`: running a model on batches of images and writing the results.
An interrupted run can be continued, and several processes can share the work.
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import INTERRUPTED, discard_standard_output, first_line, log
from .formats import RESULTS, Prediction, encode, file_names, write_coco
from .inputs import ImageInput, InputError, read_image
from .models import LoadedModel
from .plan import OutputNames, Plan, check_plan
from .run_record import RecordedOutputs, RunRecord, results_name

if TYPE_CHECKING:  # importing these takes seconds, see the docstring of the package
    from PIL import Image

Predict = Callable[[list["Image.Image"], list[str]], list[Prediction]]
WriteDataSet = Callable[[Iterator[tuple[ImageInput, dict[str, Any]]], dict[str, Any], dict[str, str]], None]

# Arguments that do not change the results, or that have an entry of their own in the record of a run.
UNRECORDED = {
    *("images", "output", "overwrite", "device", "batch_size", "max_image_pixels", "model", "sam", "clip"),
    *("default_formats", "formats", "labels_file"),
}
LOADING_THREADS = 2
REPORT_SECONDS = 60  # between reports of the progress to a file
NOT_READ, NOT_PROCESSED, EXISTS = "cannot be read", "cannot be processed", "output exists"  # causes of failures


def process_images(
    plan: Plan,
    predict: Predict,
    loaded: LoadedModel,
    nothing_found: tuple[str, str] | None = None,
    write_data_set: WriteDataSet | None = None,
) -> int:
    """
    Runs `predict` on the images of this process in batches, and writes the results.

    Images that an earlier run has completed are skipped. An image is reported and skipped if it cannot be read or
    processed, or if a file with the name of its output has appeared in the meantime and may not be replaced.

    plan (`Plan`):
        See [`prepare`].
    predict (function of lists of images and of their keys):
        Returns a [`Prediction`] for each image.
    loaded (`LoadedModel`):
        The model, for the record of the run.
    nothing_found (`tuple[str, str]`, *optional*):
        What masks are called, and a sentence about what finds more, for a message about images without masks.
    write_data_set (function of the results, the description of the run, and errors, *optional*):
        Writes a dataset of all images, `plan.data_set_files`, after a single process has completed them. It gets each
        image with its result in the order of the inputs, and messages by the keys of images that failed.

    Returns the exit status. With several processes, it does not depend on failed images. Raises `CommandError` if the
    output has results of another run.
    """
    record = names = None
    if plan.has_record:
        assert plan.output is not None
        description = _describe_run(plan, loaded)
        record = RunRecord(plan.output, description, plan.run_files, plan.arguments.overwrite, plan.process)
        record.check_unchanged(plan.inputs.listed)
    if plan.is_folder:
        names = OutputNames(plan, record.names if record is not None else None)
        if plan.has_record:
            check_plan(plan, names, record)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_pixel_limit(plan.arguments.max_image_pixels))
        work = _Work(plan, names, record, nothing_found, write_data_set)
        status = 1
        try:
            work.start()
            batches = stack.enter_context(contextlib.closing(_read_batches(work.pending(), plan.arguments)))
            for images in batches:
                work.process(images, predict)
            work.join(loaded)
            # torchrun terminates all processes if one exits with an error. The single process that joins the results
            # retries failed images.
            status = 1 if work.failures and plan.process[1] == 1 else 0
        except KeyboardInterrupt:
            work.stop("interrupted by Ctrl-C.")
            return INTERRUPTED
        except BrokenPipeError:
            work.progress.close()
            raise
        except InputError as error:
            work.stop(str(error))
            return 1
        except OSError as error:  # such as a full disk: the other images would fail as well
            if plan.output is None:
                discard_standard_output()
            work.stop(f"the output cannot be written: {_describe_error(error)}.")
            return 1
        work.report()
    return status


def _describe_run(plan: Plan, loaded: LoadedModel) -> dict[str, Any]:
    """What the results depend on besides the images."""
    from samclip_hf.identity import hash_configuration, hash_weights

    return {
        "samclip": metadata.version("samclip-hf"),
        "formats": list(plan.formats),
        "options": {name: value for name, value in vars(plan.arguments).items() if name not in UNRECORDED},
        "model": loaded.description
        | {
            "weights": hash_weights(loaded.model, with_vocabulary=True),
            "configuration": hash_configuration(loaded.model, loaded, with_vocabulary=True),
        },
    }


@contextlib.contextmanager
def _pixel_limit(max_pixels: int | None) -> Iterator[None]:
    """Raises Pillow's limit, which it checks when it opens an image."""
    from PIL import Image

    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = limit if max_pixels is None else max_pixels
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


Loaded = tuple[ImageInput, "Image.Image | Exception"]


def _read_batches(images: Iterator[ImageInput], arguments: argparse.Namespace) -> Generator[list[Loaded], None, None]:
    """Lists of `--batch_size` images, or of the errors of those that cannot be read. The next images are read by other
    threads while the model runs."""
    from PIL import Image

    max_pixels = Image.MAX_IMAGE_PIXELS

    def load(image: ImageInput) -> Loaded:
        try:
            return image, read_image(image.source, max_pixels)
        except Exception as error:  # Pillow's decoders raise many kinds of errors
            return image, error

    executor = ThreadPoolExecutor(LOADING_THREADS)
    try:
        futures: deque[Future[Loaded]] = deque()
        batch: list[Loaded] = []
        while True:
            for image in itertools.islice(images, arguments.batch_size + LOADING_THREADS - len(futures)):
                futures.append(executor.submit(load, image))
            if futures:
                batch.append(futures.popleft().result())
            if len(batch) == arguments.batch_size or (batch and not futures):
                yield batch
                batch = []
            if not futures and not batch:
                return
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


class _Work:
    """The work of a process: what is done, skipped and failed, and how outputs are written."""

    def __init__(
        self,
        plan: Plan,
        names: OutputNames | None,
        record: RunRecord | None,
        nothing_found: tuple[str, str] | None,
        write_data_set: WriteDataSet | None,
    ):
        self.plan, self.names, self.record = plan, names, record
        self.done = self.skipped = self.empty = 0
        self.nothing_found, self.write_data_set = nothing_found, write_data_set
        self.errors: dict[str, str] = {}  # messages by keys of images
        self.failures: Counter[str] = Counter()  # by cause
        self.progress = _Progress(plan.count, plan.process)
        self.has_reported_batch = False
        self.writes_results = RESULTS in plan.run_files
        self.results: list[dict[str, Any]] = []  # of a run without record, for COCO's files
        self.replaces = plan.arguments.overwrite or (record is not None and record.replaces)

    def start(self) -> None:
        """Creates the output folder and opens the record. Removes what an interrupted run has left half-written."""
        from samclip_hf.files import remove_temporary_files

        plan, record = self.plan, self.record
        if plan.is_folder:
            assert plan.output is not None
            plan.output.mkdir(parents=True, exist_ok=True)
            if record is not None:
                record.open()
                for path in self._begun_files():
                    remove_temporary_files(path)
            self.outputs = RecordedOutputs(plan.output)
            results = [results_name(plan.process)] if self.writes_results else []
            self.outputs.add([*plan.run_files, *results], plan.process)

    def _begun_files(self) -> Iterator[Path]:
        """Files of the images of this process that an interrupted run has begun to write."""
        assert self.record is not None and self.names is not None and self.plan.output is not None
        for image in itertools.islice(self.plan.inputs.listed, self.plan.process[0], None, self.plan.process[1]):
            if image.key in self.record.names and image.key not in self.record.done:
                for name in file_names(self.names.name(image), self.plan.formats):
                    path = self.plan.output / name
                    yield from path.iterdir() if name.endswith("/") and path.is_dir() else [path]

    def pending(self) -> Iterator[ImageInput]:
        """The images that are not complete."""
        for image in self.plan.images():
            if self.record is not None and image.key in self.record.done and self._has_outputs(image):
                self.skipped += 1
                self.progress.skip()
            else:
                yield image

    def _has_outputs(self, image: ImageInput) -> bool:
        """Whether the outputs of a complete image have not been deleted since."""
        assert self.names is not None and self.plan.output is not None
        names = file_names(self.names.name(image), self.plan.formats)
        return all((self.plan.output / name).exists() for name in names)

    def process(self, batch: list[Loaded], predict: Predict) -> None:
        """Runs the model on a batch and writes its results."""
        read: list[tuple[ImageInput, Image.Image]] = []
        for image, content in batch:
            if isinstance(content, Exception):
                self._fail(image, content, NOT_READ)
            else:
                read.append((image, content))
        for (image, content), prediction in zip(read, self._predict(read, predict), strict=True):
            if isinstance(prediction, Exception):
                self._fail(image, prediction, NOT_PROCESSED)
                continue
            record = {"image": image.key, "height": content.height, "width": content.width} | prediction.record
            name = image.stem if self.names is None else self.names.name(image)
            try:
                files = encode(content, record, prediction, self.plan.formats, name)
            except Exception as error:  # whatever fails for one image, the others are processed
                self._fail(image, error, NOT_PROCESSED)
                continue
            try:
                self._write(image, name, files, json.dumps(record))
            except FileExistsError as error:
                message = f"{error.filename} was created in the meantime and is not replaced."
                self._fail(image, ValueError(message), EXISTS)
                continue
            self.done += 1
            self.empty += not any(prediction.label_ids)
            if self.record is None and self.plan.is_folder:
                self.results.append(record)
            self.progress.advance()

    def _predict(
        self, read: list[tuple[ImageInput, "Image.Image"]], predict: Predict
    ) -> Sequence[Prediction | Exception]:
        """The prediction for each image, or its error. If a batch fails, its images are processed one by one."""
        if not read:
            return []
        try:
            return predict([content for _, content in read], [image.key for image, _ in read])
        except Exception as error:  # whatever fails for one image, the others are processed
            if len(read) == 1:
                return [error]
            if not self.has_reported_batch:
                self.has_reported_batch = True
                log(
                    f"a batch of {len(read)} images failed, so its images are processed one by one. If this happens "
                    f"often, pass a smaller --batch_size. {_describe_error(error)}"
                )
        return [prediction for one in read for prediction in self._predict([one], predict)]

    def _write(self, image: ImageInput, name: str, files: dict[str, bytes], line: str) -> None:
        """Raises `FileExistsError` if a file exists that may not be replaced."""
        from samclip_hf.files import write_atomically

        output, record = self.plan.output, self.record
        if output is None:
            from tqdm import tqdm

            tqdm.write(line)  # print would break the progress bar on a terminal
            sys.stdout.flush()
        elif not self.plan.is_folder:
            [content] = files.values()
            write_atomically(output, content, self.replaces)
        else:
            replaces = self.replaces or (record is not None and image.key in record.names)
            folders = [output / path for path in file_names(name, self.plan.formats) if path.endswith("/")]
            for path in itertools.chain(folders, (output / path for path in files)):
                if not replaces and os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
                    raise FileExistsError(None, "exists", str(path))
            self.outputs.add(file_names(name, self.plan.formats), self.plan.process)
            if record is not None:
                record.begin(image, name)
            for folder in folders:
                folder.mkdir(exist_ok=True)
                for file in folder.iterdir():  # masks of an earlier run may be more than the new ones
                    if re.fullmatch(r"\d{3,}(_.*)?\.png", file.name) and f"{folder.name}/{file.name}" not in files:
                        file.unlink()
            for file_name, content in files.items():
                write_atomically(output / file_name, content, replaces)
            if record is not None:
                record.finish(image, line)
            elif self.writes_results:
                write_atomically(output / RESULTS, line + "\n", replaces)

    def join(self, loaded: LoadedModel) -> None:
        """Joins the results of all processes and writes the files for all images, in a single process."""
        results: Iterable[dict[str, Any]] = self.results
        if self.record is not None and self.writes_results:
            self.record.close()
            if self.plan.process[1] > 1:
                return
            self.record.join(self.plan.images())
            assert self.plan.output is not None
            results = _read_results(self.plan.output / RESULTS)
            if self.write_data_set is not None:
                self.write_data_set(self._results_by_image(), self.record.description, self.errors)
        elif not results:
            return
        if "coco" in self.plan.formats:
            assert self.plan.output is not None
            write_coco(results, self.plan.output, loaded.names, loaded.description)

    def _results_by_image(self) -> Iterator[tuple[ImageInput, dict[str, Any]]]:
        assert self.record is not None
        for image in self.plan.images():
            if image.key in self.record.lines:
                yield image, json.loads(self.record.read(image.key))

    def _fail(self, image: ImageInput, error: Exception, cause: str) -> None:
        self.failures[cause] += 1
        self.errors[image.key] = _describe_error(error)
        log(f"{image.key}: {_describe_error(error)}")
        self.progress.advance()

    def stop(self, reason: str) -> None:
        """Reports that the command ends before all images are processed."""
        self.progress.close()
        message = f"stopped after {self.done + self.skipped} of {self._total()} images: {reason}"
        if self.record is not None:
            message += " Run the same command without --overwrite to continue."
        log(message)

    def report(self) -> None:
        """Reports what was done."""
        self.progress.close()
        if self.empty and self.nothing_found is not None:
            what, advice = self.nothing_found
            where = f" in {self.empty} of {self.done} images" if self.done > 1 else ""
            log(f"no {what} found{where}. {advice}")
        failed = sum(self.failures.values())
        causes = ", ".join(f"{count} {cause}" for cause, count in self.failures.items())
        if self.record is None:
            if failed and failed + self.done > 1:  # a single failure has been reported
                log(f"{failed} of {self._total()} images failed ({causes}).")
            elif self.done and self.plan.output is not None:
                log(f"files written: {', '.join(map(str, self._written()))}")
            return
        parts = [f"{self.done} image{'s' * (self.done != 1)} processed"]
        parts += [f"{self.skipped} skipped, which were complete"] if self.skipped else []
        parts += [f"{failed} failed ({causes})"] if failed else []
        number, processes = self.plan.process
        process = f"process {number + 1} of {processes}: " if processes > 1 else ""
        log(f"{process}{'; '.join(parts)}. The results are in {self.plan.output}.")
        if processes > 1 and number == 0 and self.writes_results:
            log(
                "when all processes have ended, run the same command in a single process to try failed images again "
                f"and to join their results in {', '.join(self.plan.run_files)}."
            )

    def _written(self) -> list[Path]:
        """The outputs of a run without record. Those of formats with a folder for each image are the folders."""
        output = self.plan.output
        assert output is not None
        if self.names is None:
            return [output]
        [name] = self.names.names.values()
        return [output / file for file in file_names(name, self.plan.formats) + self.plan.run_files]

    def _total(self) -> str:
        return "all" if self.plan.count is None else str(self.plan.count)


def _read_results(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():  # no image could be read
        return
    with open(path, "rb") as lines:
        yield from map(json.loads, lines)


class _Progress:
    """
    Progress of the first process: a bar with the time left on a terminal, otherwise a line every minute.

    total (`int`, *optional*):
        The number of images, if it is known.
    process (`tuple[int, int]`):
        The number of this process, and the number of processes.
    """

    def __init__(self, total: int | None, process: tuple[int, int]):
        from tqdm import tqdm

        is_shown = process[0] == 0 and total != 1
        has_bar = is_shown and sys.stderr.isatty()
        self.bar = tqdm(total=total, unit="image", disable=not has_bar)
        self.has_lines = is_shown and not has_bar
        self.total, self.skipped, self.processed = total, 0, 0
        self.start = self.last = time.monotonic()

    def skip(self) -> None:
        """Counts an image that was complete before."""
        self.skipped += 1
        if not self.bar.disable:
            self.bar.initial += 1  # is not part of the rate
            self.bar.update()

    def advance(self) -> None:
        """Counts an image."""
        self.processed += 1
        self.bar.update()
        now = time.monotonic()
        if self.has_lines and now - self.last >= REPORT_SECONDS:
            self.last = now
            rate = self.processed / (now - self.start)
            text = f"{self.skipped + self.processed} images"
            if self.total is not None:
                left = (self.total - self.skipped - self.processed) / rate
                text = f"{self.skipped + self.processed} of {self.total} images, {self.bar.format_interval(left)} left"
            log(f"{text}, {rate:.2g} images/s")

    def close(self) -> None:
        self.bar.close()


def _describe_error(error: Exception) -> str:
    """One line. The type of the exception is left out if the message is written for users."""
    if isinstance(error, ValueError | OSError):
        return first_line(error)
    return f"{type(error).__name__}: {first_line(error)}"
