"""`samclip annotate`: its files agree with the masks and are the same after interruptions and with two processes."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from samclip_cli import data_sets
from samclip_cli.data_sets import exact_polygons, mask_to_polygons
from samclip_hf.images import decode_mask, encode_mask

from . import test_image_commands
from .test_image_commands import LABEL_OPTIONS, LABELS, decode, samclip, save, scene
from .test_resume import contents, run_process, run_until_killed

datasets = pytest.importorskip("datasets", reason="needs the extra `train`")
COCO = pytest.importorskip("pycocotools.coco").COCO

folder = test_image_commands.folder
NUM_IMAGES = 5
COMMAND = ["annotate", "photos", *LABEL_OPTIONS, "--threshold", "0.3", "--review", "2"]
COMMAND += ["--formats", "coco,parquet,webdataset"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The files of one process for five images, one of which is broken."""
    with pytest.MonkeyPatch.context() as context:
        context.chdir(tmp_path_factory.mktemp("whole"))
        save_photos()
        from samclip_cli import main

        assert main([*COMMAND, "--output", "out"]) == 1
        return contents("out")


def save_photos() -> None:
    save(*(f"photos/{number}.png" for number in range(NUM_IMAGES)))
    scene(9).save("photos/7.jpg")
    Path("photos/6.png").write_bytes(b"no image")


@pytest.fixture
def photos(folder, results):
    save_photos()
    for name, content in results.items():
        path = Path("whole", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return results


def lines() -> list[dict]:
    return [json.loads(line) for line in Path("whole/results.jsonl").read_text().splitlines()]


def test_the_coco_file_agrees_with_the_masks(photos, capsys):
    coco = COCO("whole/annotations.json")
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == LABELS
    total = 0
    for image_id, line in enumerate(lines(), start=1):
        (image,) = coco.loadImgs([image_id])
        assert image == {key: image[key] for key in ("id", "file_name", "height", "width")}
        assert (image["file_name"], image["height"], image["width"]) == (line["image"], line["height"], line["width"])
        found = coco.loadAnns(coco.getAnnIds([image_id]))
        total += len(found)
        for annotation, segment in zip(found, line["segments"], strict=True):
            mask = coco.annToMask(annotation).astype(bool)
            assert np.array_equal(mask, decode(segment["segmentation"]))
            rows, columns = np.nonzero(mask)
            left, top, width, height = annotation["bbox"]
            assert (left, top, left + width, top + height) == (
                columns.min(),
                rows.min(),
                columns.max() + 1,
                rows.max() + 1,
            )
            assert annotation["area"] == mask.sum() and annotation["score"] == segment["score"] >= 0.3
            assert LABELS[annotation["category_id"] - 1] == segment["label"]
    assert total == len(coco.anns) >= 4
    capsys.readouterr()


def test_the_coco_file_evaluates_as_its_own_ground_truth(photos, capsys):
    from pycocotools.cocoeval import COCOeval

    coco = COCO("whole/annotations.json")
    detections = coco.loadRes([dict(annotation) for annotation in coco.anns.values()])
    evaluation = COCOeval(coco, detections, "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1)
    capsys.readouterr()


def test_polygons_rasterize_to_the_masks(capsys, photos):
    samclip(capsys, *COMMAND, "--formats", "coco", "--polygons", "--output", "polygons", status=1)
    coco, whole = COCO("polygons/annotations.json"), COCO("whole/annotations.json")
    assert coco.anns.keys() == whole.anns.keys()
    for number, annotation in coco.anns.items():
        assert isinstance(annotation["segmentation"], list)
        assert np.array_equal(coco.annToMask(annotation), whole.annToMask(whole.anns[number]))
    assert json.loads(Path("polygons/report.json").read_text())["masks_without_exact_polygons"] == 0
    capsys.readouterr()


def test_polygons_of_any_mask_are_exact():
    random = np.random.default_rng(0)
    for _ in range(60):
        small = random.random(random.integers(1, 16, 2)) < random.random()
        for mask in (small, small.repeat(3, axis=0).repeat(2, axis=1)):
            if mask.any():
                assert np.array_equal(decode_mask(mask_to_polygons(mask), mask.shape), mask)
    ring = np.ones((5, 5), dtype=bool)
    assert exact_polygons(encode_mask(ring)) == [[0, 0, 5, 0, 5, 5, 0, 5]]
    ring[2, 2] = False
    assert len(exact_polygons(encode_mask(ring))) == 2
    assert exact_polygons(encode_mask(~np.ones((2, 2), dtype=bool))) is None


def test_datasets_loads_the_parquet_files(photos, tmp_path):
    table = datasets.load_dataset(
        "parquet", data_files="whole/parquet/*.parquet", split="train", cache_dir=str(tmp_path / "cache")
    )
    assert len(table) == NUM_IMAGES + 1
    for row, line in zip(table, lines(), strict=True):
        assert row["file_name"] == line["image"] and row["image"].size == (line["width"], line["height"])
        assert np.array_equal(np.asarray(row["image"]), np.asarray(Image.open(line["image"])))
        for own, segment in zip(row["objects"], line["segments"], strict=True):
            assert np.array_equal(decode_mask(own["segmentation"]), decode(segment["segmentation"]))
            assert (own["bbox"], own["area"], own["score"]) == (segment["bbox"], segment["area"], segment["score"])
            assert LABELS[own["category"]] == segment["label"]


def test_training_reads_the_tars(photos):
    from samclip_hf.datasets.streams import open_stream, read_annotations

    samples = [sample for _, sample in open_stream("whole/webdataset/*.tar", with_masks=True).read(0)]
    with_masks = [line for line in lines() if line["segments"]]
    assert len(samples) >= len(with_masks) >= 3
    by_name = {f"{number:09d}": line for number, line in enumerate(lines(), start=1)}
    for sample in samples:
        line = next(line for name, line in by_name.items() if name in sample["key"])
        for own, segment in zip(read_annotations(sample["json"]), line["segments"], strict=True):
            assert np.array_equal(decode_mask(own["segmentation"]), decode(segment["segmentation"]))
    with tarfile.open("whole/webdataset/00000.tar") as tar:
        assert tar.extractfile("000000006.jpg").read() == Path("photos/7.jpg").read_bytes()


def test_failed_images_thresholds_and_uncertain_images_are_reported(photos):
    report = json.loads(Path("whole/report.json").read_text())
    assert report["num_images"] == NUM_IMAGES + 1 and report["num_failed"] == 1
    assert report["failed"] == [{"image": "photos/6.png", "error": report["failed"][0]["error"]}]
    assert report["run"]["options"]["threshold"] == 0.3 and "weights" in report["run"]["model"]
    assert report["num_annotations"] == sum(len(line["segments"]) for line in lines())
    margins = [
        (min(own["score"] for own in line["segments"]) - 0.3, line["image"]) for line in lines() if line["segments"]
    ]
    review = json.loads(Path("whole/review.json").read_text())
    assert [(own["margin"], own["image"]) for own in review["images"]] == sorted(margins)[:2]
    assert report["images_without_annotations"] == len(lines()) - len(margins)
    assert Image.open("whole/contact_sheet.png").width > 3 * 320


def test_max_per_image_keeps_the_highest_scores(capsys, photos):
    command = [*COMMAND, "--formats", "coco", "--max_per_image", "1", "--output", "out"]
    samclip(capsys, *command, status=1)
    coco = json.loads(Path("out/annotations.json").read_text())
    best = [max(own["score"] for own in line["segments"]) for line in lines() if line["segments"]]
    assert [annotation["score"] for annotation in coco["annotations"]] == best
    left_out = sum(len(line["segments"]) for line in lines()) - len(best)
    report = json.loads(Path("out/report.json").read_text())
    assert report["annotations_left_out_by_max_per_image"] == left_out > 0


def test_a_data_set_in_the_folder_of_its_images_is_not_annotated(capsys, folder):
    """The contact sheet and tars are beside the images."""
    save("photos/0.png", "photos/1.png")
    command = ["annotate", "photos/**", *COMMAND[2:], "--output", "photos"]
    samclip(capsys, *command)
    before = Path("photos/annotations.json").read_bytes()
    assert Path("photos/contact_sheet.png").exists() and Path("photos/webdataset/00000.tar").exists()
    _, messages = samclip(capsys, *command)
    assert "0 images processed; 2 skipped" in messages[-1] and Path("photos/annotations.json").read_bytes() == before
    assert "2 images processed. " in samclip(capsys, *command, "--overwrite")[1][-1]
    assert Path("photos/annotations.json").read_bytes() == before


def test_overwrite_deletes_the_shards_of_an_earlier_run_and_no_others(capsys, monkeypatch, folder):
    monkeypatch.setattr(data_sets, "IMAGES_PER_SHARD", 1)
    save("photos/0.png", "photos/1.png", "photos/2.png")
    command = ["annotate", *LABEL_OPTIONS, "--formats", "parquet,webdataset", "--output", "out"]
    samclip(capsys, *command, "photos")
    assert sorted(os.listdir("out/parquet")) == ["00000.parquet", "00001.parquet", "00002.parquet"]
    assert sorted(os.listdir("out/webdataset")) == ["00000.tar", "00001.tar", "00002.tar"]
    for user_file in ("out/webdataset/00003.tar", "out/parquet/00003.parquet"):
        Path(user_file).write_text("mine")
        before = contents("out")
        for options in (["photos"], ["photos/0.png", "--overwrite"]):
            _, messages = samclip(capsys, *command, *options, status=2)
            assert f"{user_file} is not replaced or deleted, because it is not recorded" in messages[-1]
        assert contents("out") == before
        Path(user_file).rename(user_file.replace("0000", "photos"))
    samclip(capsys, *command, "photos/0.png", "--overwrite")
    assert sorted(os.listdir("out/parquet")) == ["00000.parquet", "photos3.parquet"]
    assert sorted(os.listdir("out/webdataset")) == ["00000.tar", "photos3.tar"]
    # The names of deleted shards are free for files of the user.
    Path("out/webdataset/00001.tar").write_text("mine")
    _, messages = samclip(capsys, *command, "photos/0.png", "--overwrite", status=2)
    assert "out/webdataset/00001.tar is not replaced or deleted" in messages[-1]


def test_two_processes_give_the_files_of_one(capsys, monkeypatch, photos):
    for number in (1, 0):
        status = run_process(monkeypatch, number, 2, *COMMAND, "--output", "out")
        assert status == 0  # although an image is broken: torchrun ends all processes if one of them fails
    assert "1 failed (1 cannot be read)" in capsys.readouterr().err
    assert not Path("out/annotations.json").exists()
    samclip(capsys, *COMMAND, "--output", "out", status=1)
    assert contents("out") == photos


def test_a_run_continues_and_gives_the_same_files(capsys, monkeypatch, photos):
    run_until_killed(monkeypatch, "3", *COMMAND, "--output", "out")
    assert set(contents("out")) == {"results.jsonl"}
    samclip(capsys, *COMMAND, "--output", "out", status=1)
    assert contents("out") == photos
    samclip(capsys, *COMMAND, "--output", "out", status=1)
    assert contents("out") == photos


@pytest.mark.slow
def test_a_process_that_is_killed_at_any_moment_continues(photos):
    command = [sys.executable, "-m", "samclip_cli", *COMMAND, "--output", "out"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    results = Path("out/results.jsonl")
    while not results.exists() or results.stat().st_size == 0:
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert subprocess.run(command, capture_output=True).returncode == 1
    assert contents("out") == photos


LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
# One thread per process, and no spinning, because the processes share the cores.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}


def run_command(*launcher: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *launcher, "-m", "samclip_cli", *COMMAND, "--output", "out"]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)


def complete_images() -> int:
    return sum(path.read_bytes().count(b"\n") for path in Path().glob("out/results-*.jsonl"))


@pytest.mark.slow
def test_two_real_processes_give_the_files_of_one(photos):
    """Broken images of the first process, which ends early, do not end the second process."""
    good = Path("photos/1.png").read_bytes()
    for number in range(40):  # after the 7 other images, so the first process has those of odd numbers
        Path(f"photos/x{number:02}.png").write_bytes(good if number % 2 == 0 else b"no image")
    done = run_command(*LAUNCHER)
    assert done.returncode == 0, done.stderr[-3000:]
    assert complete_images() == NUM_IMAGES + 1 + 20 and not Path("out/annotations.json").exists()
    assert run_command().returncode == 1
    Path("out").rename("two")
    assert run_command().returncode == 1
    two, one = contents("two"), contents("out")
    assert two.keys() == one.keys() == photos.keys()
    for name, content in one.items():
        assert two[name] == content, name


def start_and_suspend() -> tuple[subprocess.Popen, list[psutil.Process]]:
    """Starts two processes, and suspends those that still run when both have results and so their locks."""
    command = [sys.executable, *LAUNCHER, "-m", "samclip_cli", *COMMAND, "--output", "out"]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while sum(path.stat().st_size > 0 for path in Path().glob("out/results-*.jsonl")) < 2:
        assert process.poll() is None
        time.sleep(0.001)
    workers = psutil.Process(process.pid).children(recursive=True)
    for worker in workers:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.suspend()
    return process, [worker for worker in workers if worker.is_running()]


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        process.kill()
    psutil.wait_procs(processes)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs locks of files and SIGSTOP")
def test_a_launcher_that_is_killed_continues_with_two_processes(photos):
    while True:
        process, workers = start_and_suspend()
        process.kill()
        process.wait()
        if complete_images() < NUM_IMAGES + 1:
            break
        kill(workers)  # they were complete before they were suspended
        shutil.rmtree("out")
    try:
        assert all(worker.is_running() for worker in workers)  # `kill -9` of a launcher does not end its workers
        done = run_command(*LAUNCHER)
        assert done.returncode == 1 and "another process writes to out" in done.stderr
    finally:
        kill(workers)
    done = run_command(*LAUNCHER)
    assert done.returncode == 0, done.stderr[-3000:]
    assert complete_images() == NUM_IMAGES + 1
    assert run_command().returncode == 1
    assert contents("out") == photos


def test_rotated_and_other_images_are_stored_upright_as_png(capsys):
    from PIL import ExifTags

    save("in/1.png")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    scene().save("in/2.jpg", exif=exif)
    scene().save("in/3.bmp")
    samclip(capsys, "annotate", "in", *LABEL_OPTIONS, "--formats", "webdataset", "--output", "out")
    with tarfile.open("out/webdataset/00000.tar") as tar:
        names = [name for name in tar.getnames() if not name.endswith("json")]
        assert names == ["000000001.png", "000000002.png", "000000003.png"]
        assert Image.open(tar.extractfile(names[1])).size == (scene().height, scene().width)
    assert json.loads(Path("out/report.json").read_text())["images_stored_as_png"] == 2


@pytest.mark.parametrize("source", ["hf://out/parquet", "hf://out", "hf://link"])
def test_a_data_set_that_is_the_input_is_never_replaced(capsys, source):
    file = io.BytesIO()
    scene().save(file, "PNG")
    table = datasets.Dataset.from_dict({"image": [{"bytes": file.getvalue(), "path": None}], "own": ["notes"]})
    path = Path("out/parquet/00000.parquet")
    path.parent.mkdir(parents=True)
    table.cast_column("image", datasets.Image()).to_parquet(path)
    Path("link").symlink_to("out/parquet")
    before = path.read_bytes()
    command = ["annotate", source, *LABEL_OPTIONS, "--formats", "parquet", "--output", "out", "--overwrite"]
    _, messages = samclip(capsys, *command, status=2)
    assert "out/parquet has input images: pass another folder as --output" in messages[-1]
    assert path.read_bytes() == before


def test_readers_see_images_with_16_bits_as_the_model_does(capsys):
    """Pillow's conversion to RGB, as in readers, would make them white."""
    gray = np.asarray(scene().convert("L"))
    Path("in").mkdir()
    Image.fromarray(gray.astype(np.uint16) * 257).save("in/1.png")
    samclip(capsys, "annotate", "in", *LABEL_OPTIONS, "--formats", "webdataset", "--output", "out")
    with tarfile.open("out/webdataset/00000.tar") as tar:
        stored = Image.open(tar.extractfile("000000001.png")).convert("RGB")
    assert np.array_equal(np.asarray(stored), np.repeat(gray[:, :, None], 3, axis=2))
    assert json.loads(Path("out/report.json").read_text())["images_stored_as_png"] == 1


@pytest.mark.parametrize(
    "options, part",
    [
        (["--output", "out", "--formats", "yolo"], "'yolo' is not a format. Formats are coco, parquet, webdataset."),
        (["--output", "out", "--formats", "parquet", "--polygons"], "--polygons has no effect"),
        (["--output", "out", "--no_images"], "--no_images has no effect"),
        (["--output", "out.json"], "pass a folder"),
        (["--output", "photos"], "photos/annotations.json would be overwritten"),
        (["--output", "out", "--labels_file", "x.txt"], "pass either --labels or --labels_file"),
    ],
)
def test_wrong_options_are_refused(capsys, photos, options, part):
    Path("photos/annotations.json").write_text("mine")
    _, messages = samclip(capsys, "annotate", "photos/0.png", *LABEL_OPTIONS, *options, status=2)
    assert part in messages[-1]
    assert Path("photos/annotations.json").read_text() == "mine"


def test_an_image_that_has_changed_before_the_data_set_is_written_is_reported(capsys, monkeypatch):
    save("in/1.png", "in/2.png")
    command = ["annotate", "in", *LABEL_OPTIONS, "--output", "out"]
    assert run_process(monkeypatch, 0, 1, *command) == 0
    Image.new("RGB", (9, 9)).save("in/2.png")
    _, messages = samclip(capsys, *command, status=2)
    assert "in/2.png has changed since the results" in messages[-1]
