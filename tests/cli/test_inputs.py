"""Inputs of the image commands: tars and datasets give the results of their images as files, and images are read one
by one."""

import builtins
import io
import json
import os
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from samclip_cli import CommandError, batch, main
from samclip_cli.inputs import IMAGE_EXTENSIONS, Inputs, find_inputs
from samclip_hf.datasets import layouts

from . import test_image_commands
from .test_image_commands import samclip, save, scene

folder = test_image_commands.folder
CLASSIFY = ["classify", "--labels", "red fuzzy shape, green zigzag shape"]


def write_tar(path: str, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def write_parquet(path: str, columns: dict[str, list]) -> None:
    Path(path).parent.mkdir(parents=True)
    kinds = {
        name: ImageFeature() if isinstance(values[0], dict) else Value("string") for name, values in columns.items()
    }
    Dataset.from_dict(columns, features=Features(kinds)).to_parquet(path)


def without_names(records: list[dict]) -> list[dict]:
    return [{name: value for name, value in record.items() if name != "image"} for record in records]


def test_images_of_a_tar_give_the_results_of_files(capsys):
    save("photos/0.png", "photos/1.png", "photos/2.png")
    files = [Path(f"photos/{number}.png").read_bytes() for number in range(3)]
    members = {"a/0.png": files[0], "a/0.json": b"{}", "b/0.png": files[1], "2.jpg": files[2], "2.mask.png": files[0]}
    write_tar("photos.tar", members | {"3.txt": b"a caption"})
    expected, _ = samclip(capsys, *CLASSIFY, "photos")
    records, messages = samclip(capsys, *CLASSIFY, "photos.tar")
    assert without_names(records) == without_names(expected)
    assert [record["image"] for record in records] == ["photos.tar/a/0.png", "photos.tar/b/0.png", "photos.tar/2.jpg"]
    assert messages == ["samclip: photos.tar: skipping 1 of 4 samples, which have no image."]
    samclip(capsys, *CLASSIFY, "photos.tar", "photos/0.png", "--formats", "json", "--output", "out")
    names = {path.name: json.loads(path.read_text())["image"] for path in Path("out").glob("*.json")}
    assert names == {
        "0.json": "photos.tar/a/0.png",
        "0-2.json": "photos.tar/b/0.png",
        "2.json": "photos.tar/2.jpg",
        "0-3.json": "photos/0.png",
    }


def test_a_folder_of_tars_is_read_if_it_has_no_images(capsys):
    save("one.png")
    Path("shards").mkdir()
    for number in range(2):
        write_tar(f"shards/{number}.tar", {"one.png": Path("one.png").read_bytes()})
    records, _ = samclip(capsys, *CLASSIFY, "shards", "shards/*.tar")
    assert [record["image"] for record in records] == ["shards/0.tar/one.png", "shards/1.tar/one.png"]
    Path("one.png").rename("shards/one.png")
    records, messages = samclip(capsys, *CLASSIFY, "shards")
    assert [record["image"] for record in records] == ["shards/one.png"] and "skipping 2 of 3 files" in messages[0]


def test_images_that_cannot_be_used_in_a_tar_are_reported(capsys):
    save("good.png")
    good = Path("good.png").read_bytes()
    write_tar("photos.tar", {"0.png": good, "1.png": good, "1.tif": good, "2.png": b"", "3.png": good[:100]})
    records, messages = samclip(capsys, *CLASSIFY, "photos.tar", status=1)
    assert [record["image"] for record in records] == ["photos.tar/0.png"]
    for message, part in zip(
        messages, ["has several images", "0 bytes", "truncated", "3 cannot be read"], strict=True
    ):
        assert part in message


@pytest.mark.parametrize("kind", ["compressed", "not a tar", "no images", "link"])
def test_a_tar_that_cannot_be_read_is_refused(capsys, kind):
    if kind == "compressed":
        with tarfile.open("photos.tar", "w:gz") as tar:
            tar.addfile(tarfile.TarInfo("a.png"))
    elif kind == "link":
        with tarfile.open("photos.tar", "w") as tar:
            member = tarfile.TarInfo("a.png")
            member.type, member.linkname = tarfile.SYMTYPE, "b.png"
            tar.addfile(member)
    else:
        write_tar("photos.tar", {"a.txt": b"text"})
        if kind == "not a tar":
            Path("photos.tar").write_bytes(b"text" * 1000)
    records, [message] = samclip(capsys, *CLASSIFY, "photos.tar", status=2)
    part = {"compressed": "gunzip", "not a tar": "not a readable tar", "no images": "no images", "link": "is a link"}
    assert records == [] and part[kind] in message and message.count("\n") == 0


def test_a_tar_is_not_replaced(capsys, folder):
    save("a.png")
    write_tar("a.tar", {"a.png": Path("a.png").read_bytes()})
    os.link("a.tar", "a.json")
    before = Path("a.tar").read_bytes()
    _, [message] = samclip(capsys, *CLASSIFY, "a.tar", "--output", ".", "--overwrite", status=2)
    assert "would overwrite the input image a.json" in message and Path("a.tar").read_bytes() == before


def test_rows_of_a_data_set_give_the_results_of_files(capsys, monkeypatch):
    save("photos/0.png", "photos/1.png", "photos/2.png")
    cells = [{"bytes": Path(f"photos/{number}.png").read_bytes(), "path": None} for number in range(3)]
    write_parquet("set/test.parquet", {"image": cells, "text": ["a", "b", "c"]})
    expected, _ = samclip(capsys, *CLASSIFY, "photos")
    records, _ = samclip(capsys, *CLASSIFY, "hf://set")
    assert without_names(records) == without_names(expected)
    assert [record["image"] for record in records] == [f"hf://set/test/{number}" for number in range(3)]
    command = [*CLASSIFY, "photos/1.png", "hf://set?split=test", "--formats", "json,jsonl", "--output", "out"]
    for number in range(2):
        with monkeypatch.context() as context:
            context.setenv("RANK", str(number))
            context.setenv("WORLD_SIZE", "2")
            assert main(command) == 0
    samclip(capsys, *command)
    lines = [json.loads(line) for line in Path("out/results.jsonl").read_text().splitlines()]
    assert without_names(lines) == without_names([expected[1], *expected])
    names = {"1.json", "set-test-000000.json", "set-test-000001.json", "set-test-000002.json"}
    assert {path.name for path in Path("out").glob("*.json")} == names


def test_the_column_of_a_data_set_is_chosen(capsys):
    save("a.png", "b.png")
    cells = {name: [{"bytes": Path(f"{name}.png").read_bytes(), "path": None}] for name in ("a", "b")}
    write_parquet("set/train.parquet", cells)
    expected, _ = samclip(capsys, *CLASSIFY, "a.png", "b.png")
    for column, reference in zip("ab", expected, strict=True):
        records, _ = samclip(capsys, *CLASSIFY, f"hf://set?column={column}")
        assert without_names(records) == without_names([reference])
        assert records[0]["image"] == f"hf://set/train/{column}/0"
    for name, part in (
        ("hf://set", "2 image columns (a, b): choose one with column=, such as column=a"),
        ("hf://set?column=c", "no image column 'c'. Image columns: a, b"),
        ("hf://set?classes=a.json", "unknown option 'classes'"),
        ("hf://set?split=val", "Available: train"),
        ("hf://no/such", "could not be opened"),
    ):
        _, [message] = samclip(capsys, *CLASSIFY, name, status=2)
        assert part in message


def test_images_in_an_archive_of_a_data_set_are_read(capsys):
    save("0.png")
    Path("set").mkdir()
    with zipfile.ZipFile("set/images.zip", "w") as archive:
        archive.write("0.png", "train/0.png")
    records, _ = samclip(capsys, *CLASSIFY, "hf://set?split=train")
    assert without_names(records) == without_names(samclip(capsys, *CLASSIFY, "0.png")[0])


def test_a_name_like_one_on_the_hub_gets_a_hint(capsys):
    _, [message] = samclip(capsys, *CLASSIFY, "owner/name", status=2)
    assert message.endswith("no such file or folder. For a dataset on the Hub, pass hf://owner/name.")


@pytest.mark.parametrize("name", ["photos.tar", "hf://owner/name"])
def test_a_missing_extra_is_named(monkeypatch, name):
    Path("photos.tar").write_bytes(b"")
    original = builtins.__import__

    def without_datasets(module, *arguments, **options):
        if module.startswith("samclip_hf.datasets"):
            raise ModuleNotFoundError("No module named 'datasets'", name="datasets")
        return original(module, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_datasets)
    with pytest.raises(CommandError, match=r"No module named 'datasets'.*pip install 'samclip-hf\[train\]'"):
        find_inputs([name])


def test_ten_thousand_images_are_read_while_they_are_processed(monkeypatch):
    """Only those of the next batch are read before they are needed."""
    Path("photos").mkdir()
    for number in range(10_000):
        Path(f"photos/{number:05d}.png").touch()
    inputs = find_inputs(["photos"])
    assert inputs.count == 10_000
    reads, lock, unused = [], threading.Lock(), Image.new("RGB", (1, 1))

    def read_image(source, max_pixels):
        with lock:
            reads.append(source)
        return unused

    monkeypatch.setattr(batch, "read_image", read_image)
    arguments = type("Arguments", (), {"batch_size": 4})
    ahead = 4 + batch.LOADING_THREADS
    total = 0
    for images in batch._read_batches(iter(inputs), arguments):
        total += len(images)
        assert len(reads) <= total + ahead
    assert total == 10_000 and [image.file.name for image, _ in images] == [f"0{n}.png" for n in range(9996, 10_000)]


def test_rows_of_a_data_set_are_not_listed(monkeypatch):
    rows = iter(range(10))
    inputs = Inputs([], [type("Rows", (), {"__iter__": lambda self: rows, "count": None})()])
    assert inputs.count is None and next(iter(inputs)) == 0 and next(rows) == 1


@pytest.mark.parametrize("command", [CLASSIFY, ["segment"]])
def test_batches_give_the_results_of_single_images(capsys, command):
    save(*(f"photos/{number}.png" for number in range(5)))
    scene().resize((64, 80)).save("photos/small.png")
    single, _ = samclip(capsys, *command, "photos")
    batches, _ = samclip(capsys, *command, "photos", "--batch_size", "4")
    assert len(single) == 6
    for one, other in zip(single, batches, strict=True):
        [name] = {"labels", "segments"} & one.keys()
        assert [found["label"] for found in one[name]] == [found["label"] for found in other[name]]
        scores = [found["score"] for found in one[name]]
        assert [found["score"] for found in other[name]] == pytest.approx(scores, abs=1e-4)
        for found, reference in zip(other[name], one[name], strict=True):
            assert found.get("area", 0) == pytest.approx(reference.get("area", 0), abs=2)


def test_the_images_of_a_failed_batch_are_processed_one_by_one(capsys, monkeypatch):
    from samclip_hf import SamClipForImageSegmentation

    save("0.png", "1.png", "2.png")
    expected, _ = samclip(capsys, *CLASSIFY, "0.png", "2.png")
    get_image_features = SamClipForImageSegmentation.get_image_features

    def fail(self, pixel_values, *arguments, **options):
        calls.append(len(pixel_values))
        if len(pixel_values) > 1 or len(calls) == 3:
            raise RuntimeError("out of memory")
        return get_image_features(self, pixel_values, *arguments, **options)

    calls: list[int] = []
    monkeypatch.setattr(SamClipForImageSegmentation, "get_image_features", fail)
    records, messages = samclip(capsys, *CLASSIFY, "0.png", "1.png", "2.png", "--batch_size", "3", status=1)
    assert records == expected and calls == [3, 1, 1, 1]
    assert "pass a smaller --batch_size. RuntimeError: out of memory" in messages[0]
    assert messages[1:] == [
        "samclip: 1.png: RuntimeError: out of memory",
        "samclip: 1 of 3 images failed (1 cannot be processed).",
    ]


def test_the_limit_of_pixels_is_changed_by_an_option_only(capsys, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.new("RGB", (100, 30)).save("large.png")  # 3000 pixels, which Pillow does not open
    Path("set").mkdir()
    write_tar("large.tar", {"large.png": Path("large.png").read_bytes()})
    for name in ("large.png", "large.tar"):
        _, messages = samclip(capsys, *CLASSIFY, name, status=1)
        assert "raise the limit with --max_image_pixels" in messages[0]
        assert len(samclip(capsys, *CLASSIFY, name, "--max_image_pixels", "3000")[0]) == 1
        assert samclip(capsys, *CLASSIFY, name, "--max_image_pixels", "2999", status=1)[0] == []
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_progress_is_a_line_every_minute_without_a_terminal(capsys, monkeypatch):
    save(*(f"{number}.png" for number in range(3)))
    monkeypatch.setattr(batch, "REPORT_SECONDS", 0)
    _, messages = samclip(capsys, *CLASSIFY, "?.png")
    assert [message.split(" images, ")[0] for message in messages] == [f"samclip: {n} of 3" for n in (1, 2, 3)]
    assert messages[2].startswith("samclip: 3 of 3 images, 00:00 left, ") and messages[2].endswith(" images/s")


def test_extensions_of_images_are_those_that_training_reads():
    assert set(IMAGE_EXTENSIONS) <= set(layouts.IMAGE_EXTENSIONS)
