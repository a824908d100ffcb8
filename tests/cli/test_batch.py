"""The image commands on many images: inputs, names of outputs, batches, several processes, and resuming."""

import io
import json
import os
import signal
import struct
import sys
import zlib
from argparse import Namespace
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pytest
from PIL import Image

from samclip_cli import batch, main
from samclip_cli.inputs import ImageInput, Inputs
from samclip_cli.plan import OutputNames, Plan
from samclip_cli.run_record import RunRecord

from . import test_image_commands
from .test_image_commands import LABEL_OPTIONS, LABELS, samclip, save, scene

folder = test_image_commands.folder


def before_writing(monkeypatch, wanted: str, action) -> list[str]:
    """Calls `action` before the outputs of the image of this name are written. Returns the growing list of names."""
    write, names = batch._Work._write, []

    def act(self, image, name, files, line):
        names.append(name)
        if name == wanted:
            action()
        return write(self, image, name, files, line)

    monkeypatch.setattr(batch._Work, "_write", act)
    return names


def test_files_folders_and_patterns_are_processed_once(capsys):
    save("a/1.png", "a/2.png", "a/deep/3.png", "b[1].png")
    paths = ["a/2.png", "a", "a/*.png", "./a/../a/1.png", "a/**/*.png", "b[1].png"]
    records, messages = samclip(capsys, "classify", *paths, "--labels", "a, b")
    expected = ["a/2.png", "a/1.png", "a/deep/3.png", "b[1].png"]
    assert [record["image"] for record in records] == expected and messages == []


def test_skipped_files_of_a_folder_are_reported(capsys):
    save("photos/1.png")
    for name in ("notes.txt", "raw.HEIC", ".hidden.txt"):
        Path("photos", name).write_text("no image")
    records, messages = samclip(capsys, "classify", "photos", "--labels", "a, b")
    assert len(records) == 1
    assert messages == ["samclip: photos: skipping 2 of 3 files, which are not images (.HEIC, .txt)."]


def test_links_are_followed_once_and_broken_ones_are_reported(capsys):
    save("photos/1.png")
    Path("photos/2.png").symlink_to("1.png")  # another image, as in folders of links to the files of a dataset
    Path("photos/lost.png").symlink_to("nowhere.png")
    Path("photos/again").symlink_to("../photos")
    expected = ["photos/1.png", "photos/2.png"]
    records, messages = samclip(capsys, "classify", "photos", "--labels", "a, b", status=1)
    assert [record["image"] for record in records] == expected
    assert messages[0].startswith("samclip: photos/lost.png: ") and "No such file" in messages[0]
    records, messages = samclip(capsys, "classify", "photos/**/*.png", "photos/again", "--labels", "a, b", status=1)
    assert len(records) == 2 and len(messages) == 2
    samclip(capsys, "classify", "photos", "--labels", "a, b", "--output", "out", status=1)
    assert sorted(os.listdir("out")) == [".samclip", "1.json", "1.png", "2.json", "2.png"]


def test_outputs_of_images_with_the_same_name_do_not_collide(capsys):
    save("a/cat.png", "b/Cat.png", "b/cat-2.png")
    Path("out").mkdir()
    _, messages = samclip(capsys, "classify", "a", "b", "--labels", "a, b", "--output", "out")
    written = {path.name: json.loads(path.read_text())["image"] for path in Path("out").glob("*.json")}
    assert written == {"cat.json": "a/cat.png", "Cat-3.json": "b/Cat.png", "cat-2.json": "b/cat-2.png"}
    assert sorted(path.name for path in Path("out").glob("*.png")) == ["Cat-3.png", "cat-2.png", "cat.png"]
    assert "Cat-3 for b/Cat.png" in messages[0]
    assert messages[1:] == ["samclip: 3 images processed. The results are in out."]


def test_output_names_are_unique():
    paths = ["a/x.png", "a/x.jpg", "b/x.png", "x-2.png", "x-3.jpg", "X-3.png", "\u00e9.png", "e\u0301.jpg"]
    images = [ImageInput(path, Path(path).stem, Path(path), Path(path)) for path in paths]
    plan = Plan(Namespace(), Inputs(images, []), Path("out"), True, ("json",), (0, 1))
    names = [OutputNames(plan).name(image) for image in images]
    # On file systems that ignore case and how an accent is encoded, too.
    assert len({normalize("NFC", name).casefold() for name in names}) == len(images)
    assert names[0] == "x" and names[3:5] == ["x-2", "x-3"]
    kept = {"b/x.png": "x", "a/x.png": "x-7"}  # from an interrupted run over fewer images
    assert OutputNames(plan, kept).names | kept == OutputNames(plan, kept).names
    assert OutputNames(plan, kept).name(images[1]) == "x-4"


def test_files_for_all_images_and_other_formats_reserve_names():
    paths = ["cat.png", "cat_labels.png", "cat_labels-2.png", "results.png", "coco_results.png"]
    images = [ImageInput(path, Path(path).stem, Path(path), Path(path)) for path in paths]
    formats = ("overlay", "labelmap", "json", "coco")
    names = OutputNames(Plan(Namespace(), Inputs(images, []), Path("out"), True, formats, (0, 1)))
    assert [names.name(image) for image in images] == [
        "cat",
        "cat_labels-3",
        "cat_labels-2",
        "results",
        "coco_results-2",
    ]


COMMANDS = {
    "segment": ["segment", *LABEL_OPTIONS],
    "classify": ["classify", "--labels", "a, b"],
    "masks": ["masks", "--points_per_crop", "4"],
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize("output", ["out", "out/dog.png", "out/dog.json", "out/link.json", "out/broken.json"])
def test_existing_files_are_not_replaced(capsys, folder, command, output):
    save("in/dog.png", "out/dog.png")
    Path("out/dog.json").write_text("my notes")
    Path("out/link.json").symlink_to("dog.json")
    Path("out/broken.json").symlink_to("nowhere.json")
    before = {path: path.read_bytes() for path in folder.rglob("*.*") if path.exists()}
    records, [message] = samclip(capsys, *command, "in/dog.png", "--output", output, status=2)
    assert records == [] and (output in message) and ("--overwrite" in message or "neither a file" in message)
    assert {path: path.read_bytes() for path in folder.rglob("*.*") if path.exists()} == before


def test_existing_files_are_replaced_on_request(capsys):
    save("dog.png")
    Path("out").mkdir()
    command = ["classify", "dog.png", "--labels", "a, b", "--output", "out"]
    samclip(capsys, *command)
    results = {path: path.read_bytes() for path in Path("out").iterdir() if path.is_file()}
    assert len(results) == 2
    _, [message] = samclip(capsys, *command, status=2)
    assert "out/dog.png and 1 more of the outputs would be overwritten" in message
    for path in results:
        path.write_text("old")
    samclip(capsys, *command, "--overwrite")
    assert {path: path.read_bytes() for path in Path("out").iterdir() if path.is_file()} == results


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_an_input_image_is_not_replaced_under_another_name(capsys, link):
    """A hard link stands for a file system that ignores case: dog.PNG and dog.png have the same inode there."""
    save("dog.PNG")
    link("dog.PNG", "dog.png")
    before = Path("dog.PNG").read_bytes()
    for output in (".", "dog.png"):
        command = ["classify", "dog.PNG", "--labels", "a, b", "--overwrite", "--output", output]
        _, [message] = samclip(capsys, *command, status=2)
        assert "would overwrite the input image dog.png" in message
    assert Path("dog.png").read_bytes() == before and sorted(os.listdir()) == ["dog.PNG", "dog.png"]


def test_outputs_may_be_next_to_the_images(capsys):
    save("dog.png")
    Path("dog.png").rename("dog.tif.png")
    scene().save("cat.jpg")
    samclip(capsys, "classify", "cat.jpg", "--labels", "a, b", "--output", ".")
    assert sorted(os.listdir()) == [".samclip", "cat.jpg", "cat.json", "cat.png", "dog.tif.png"]


def test_a_file_that_appears_during_the_work_is_not_replaced(capsys, monkeypatch):
    save("1.png", "2.png")
    Path("out").mkdir()
    encode = batch.encode

    def create_file(image, record, prediction, formats, stem):
        Path("out", f"{stem}.png").write_text("mine")
        return encode(image, record, prediction, formats, stem)

    monkeypatch.setattr(batch, "encode", create_file)
    command = ["classify", "1.png", "2.png", "--labels", "a, b", "--output", "out"]
    _, messages = samclip(capsys, *command, status=1)
    assert messages == [
        "samclip: 1.png: out/1.png was created in the meantime and is not replaced.",
        "samclip: 2.png: out/2.png was created in the meantime and is not replaced.",
        "samclip: 0 images processed; 2 failed (2 output exists). The results are in out.",
    ]
    assert (
        Path("out/1.png").read_text() == "mine"
        and os.listdir("out/.samclip")
        and not list(Path("out").glob(".*.partial"))
    )
    samclip(capsys, *command, "--overwrite")
    assert Image.open("out/1.png").width >= 150


def test_names_of_any_length_are_written_or_refused_before_the_work(capsys):
    save("in/image.png")
    for length, status in ((250, 0), (251, 2)):
        name = length * "x"
        Path("in", os.listdir("in")[0]).rename(f"in/{name}.png")
        Path(f"out{length}").mkdir()
        _, messages = samclip(capsys, "classify", "in", "--labels", "a, b", "--output", f"out{length}", status=status)
        written = [".samclip", f"{name}.json", f"{name}.png"] if status == 0 else []
        assert sorted(os.listdir(f"out{length}")) == written
    assert "File name too long" in messages[0]


def test_the_exif_orientation_is_applied(capsys):
    save("upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees
    scene().transpose(Image.Transpose.ROTATE_90).save("turned.png", exif=exif)
    upright, turned = samclip(capsys, "segment", "upright.png", "turned.png", *LABEL_OPTIONS)[0]
    assert turned == upright | {"image": "turned.png"} and turned["segments"]
    assert (turned["height"], turned["width"]) == (107, 150)


def test_images_with_16_bits_per_channel_are_scaled(capsys):
    gray = scene().convert("L")
    gray.save("8.png")
    Image.fromarray(np.asarray(gray).astype(np.uint16) * 257).save("16.png")
    eight, sixteen = samclip(capsys, "classify", "8.png", "16.png", "--labels", ", ".join(LABELS))[0]
    assert sixteen["labels"] == eight["labels"]


def png(width: int, height: int) -> bytes:
    """A PNG file whose header states a size, without the pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def test_corrupt_images_are_reported_and_skipped(capsys):
    save("photos/1.png", "photos/8.png")
    file = io.BytesIO()
    scene().resize((800, 800)).save(file, "JPEG")
    broken = {
        "2.png": (b"", "0 bytes"),
        "3.png": (b"no image", "not an image"),
        "4.jpg": (file.getvalue()[:10_000], "truncated"),
        "5.png": (png(30_000, 30_000), "million pixels"),
        "6.png": (png(10_000, 10_000), "million pixels"),
        "7.png": (png(100, 100), "truncated"),
    }
    for name, (content, _) in broken.items():
        Path("photos", name).write_bytes(content)
    records, messages = samclip(capsys, "classify", "photos", "--labels", "a, b", status=1)
    assert [record["image"] for record in records] == ["photos/1.png", "photos/8.png"]
    assert messages.pop() == "samclip: 6 of 8 images failed (6 cannot be read)."
    for message, (name, (_, part)) in zip(messages, broken.items(), strict=True):
        assert message.startswith(f"samclip: photos/{name}: ") and part in message


@pytest.mark.parametrize("terminal, images, shown", [(True, 2, True), (True, 1, False), (False, 2, False)])
def test_progress_is_shown_on_a_terminal_for_several_images(capsys, monkeypatch, terminal, images, shown):
    save("1.png", "2.png")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert main(["classify", *["1.png", "2.png"][:images], "--labels", "a, b", "--output", "."]) == 2  # onto itself
    capsys.readouterr()
    Path("out").mkdir()
    assert main(["classify", *["1.png", "2.png"][:images], "--labels", "a, b", "--output", "out"]) == 0
    assert ("2/2" in capsys.readouterr().err) == shown


def test_an_output_that_cannot_be_written_ends_the_command(capsys, monkeypatch):
    save("1.png", "2.png", "3.png")
    Path("out").mkdir()
    before_writing(monkeypatch, "2", lambda: Path("out").rename("moved"))
    _, [message] = samclip(capsys, "classify", "[123].png", "--labels", "a, b", "--output", "out", status=1)
    assert (
        "stopped after 1 of 3 images: the output cannot be written" in message
        and "No such file or directory: 'out/" in message
    )
    assert sorted(os.listdir("moved")) == [".samclip", "1.json", "1.png"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_behind_standard_output_is_reported(capsys, monkeypatch):
    save("1.png", "2.png")
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["classify", "1.png", "2.png", "--labels", "a, b"]) == 1
    assert "stopped after 0 of 2 images: the output cannot be written" in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@pytest.mark.parametrize(
    "file, name", [("_journal_file", ".samclip/images-00000-of-00001.jsonl"), ("_results_file", "results.jsonl")]
)
def test_a_full_disk_is_reported_with_the_file_of_the_record(capsys, monkeypatch, file, name):
    save("1.png", "2.png")
    opened = RunRecord.open

    def open_on_full_disk(record):
        opened(record)
        getattr(record, file).close()
        setattr(record, file, full)

    monkeypatch.setattr(RunRecord, "open", open_on_full_disk)
    command = ["classify", "1.png", "2.png", "--labels", "a, b", "--output", "out", "--formats", "jsonl"]
    with open("/dev/full", "wb", buffering=0) as full:
        _, [message] = samclip(capsys, *command, status=1)
    assert message == (
        "samclip: stopped after 0 of 2 images: the output cannot be written: [Errno 28] No space left on device: "
        f"'out/{name}'. Run the same command without --overwrite to continue."
    )


def test_ctrl_c_keeps_complete_outputs(capsys, monkeypatch):
    save(*(f"photos/{number}.png" for number in range(4)))
    Path("out").mkdir()
    before_writing(monkeypatch, "2", lambda: signal.raise_signal(signal.SIGINT))
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore the signal
    try:
        command = ["masks", "photos", "--points_per_crop", "4", "--output", "out"]
        _, messages = samclip(capsys, *command, status=130)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert messages == [
        "samclip: stopped after 2 of 4 images: interrupted by Ctrl-C. Run the same command without --overwrite to "
        "continue."
    ]
    images = ("0", "1")
    files = [f"{image}{end}" for image in images for end in (".json", ".png", "_labels.png")]
    assert sorted(os.listdir("out")) == [".samclip", *files, "results.jsonl"]


def test_a_closed_pipe_ends_the_command_without_a_traceback(capsys, monkeypatch):
    save(*(f"photos/{number}.png" for number in range(4)))
    read, write = os.pipe()

    def close_pipe():
        assert json.loads(os.read(read, 100_000))["image"] == "photos/0.png"
        os.close(read)

    written = before_writing(monkeypatch, "1", close_pipe)
    with open(write, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["masks", "photos", "--points_per_crop", "4"]) == 141
    assert written == ["0", "1"]
    assert capsys.readouterr().err.count("\n") == 1  # only the line about the default model
