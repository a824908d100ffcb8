"""Runs of the image commands over many images, of which the results equal those of one uninterrupted process: after
interruptions at any moment, in several processes, and from tars and datasets."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from samclip_cli import batch, main, run_record
from samclip_cli.plan import find_process
from samclip_cli.run_record import RecordedOutputs

from . import test_image_commands
from .test_batch import before_writing
from .test_image_commands import samclip, save

folder = test_image_commands.folder
FORMATS = "overlay,labelmap,masks,json,coco"
COMMAND = ["segment", "photos", "--labels", "red fuzzy shape, green zigzag shape", "--background", "an empty scene"]
COMMAND += ["--threshold", "0.3", "--formats", FORMATS]


def contents(output: str) -> dict[str, bytes]:
    """All files of an output folder but those of the record."""
    files = (path for path in Path(output).rglob("*") if path.is_file() and run_record.FOLDER not in path.parts)
    return {str(path.relative_to(output)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The results of one process for five images."""
    with pytest.MonkeyPatch.context() as context:
        context.chdir(tmp_path_factory.mktemp("whole"))
        save(*(f"photos/{number}.png" for number in range(5)))
        assert main([*COMMAND, "--output", "out"]) == 0
        expected = contents("out")
    assert len(expected) > 5 * 3 + 3 + 4  # three files for each image, three for all, and masks
    assert expected["results.jsonl"].count(b"\n") == 5
    return expected


@pytest.fixture
def photos(folder, results):
    """The five images in `photos`, and the expected results."""
    save(*(f"photos/{number}.png" for number in range(5)))
    return dict(results)


def interrupt(monkeypatch, name: str) -> None:
    """Ends the process like `kill -9`, when it has the result of an image of this name."""

    def encode(image, record, prediction, formats, stem):
        if stem == name:
            raise Killed
        return encode_original(image, record, prediction, formats, stem)

    encode_original = batch.encode
    monkeypatch.setattr(batch, "encode", encode)


class Killed(BaseException):
    pass


def run_until_killed(monkeypatch, name: str, *arguments: str) -> None:
    with monkeypatch.context() as context, pytest.raises(Killed):
        interrupt(context, name)
        main([*arguments])


def test_a_run_continues_and_gives_the_results_of_an_uninterrupted_one(capsys, monkeypatch, photos):
    run_until_killed(monkeypatch, "3", *COMMAND, "--output", "out")
    assert "coco_results.json" not in contents("out") and contents("out")["results.jsonl"].count(b"\n") == 3
    _, messages = samclip(capsys, *COMMAND, "--output", "out")
    assert messages[-1] == "samclip: 2 images processed; 3 skipped, which were complete. The results are in out."
    assert contents("out") == photos
    _, messages = samclip(capsys, *COMMAND, "--output", "out")
    assert messages == ["samclip: 0 images processed; 5 skipped, which were complete. The results are in out."]
    assert contents("out") == photos


def test_outputs_among_the_images_are_not_read_by_the_next_run(capsys, monkeypatch, folder):
    """JPEG files, whose overlays are PNG files beside them; masks are in folders that '**' matches."""
    save(*(f"photos/{number}.jpg" for number in range(3)))
    command = [*COMMAND[2:], "--formats", "overlay,labelmap,masks"]
    for images, output in (("photos", "photos"), ("photos/**", "photos"), ("photos/**", "photos/out")):
        shutil.rmtree("photos/out", ignore_errors=True)
        for path in [path for path in Path("photos").iterdir() if path.suffix != ".jpg"]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        run_until_killed(monkeypatch, "2", "segment", images, *command, "--output", output)
        _, messages = samclip(capsys, "segment", images, *command, "--output", output)
        assert messages[-1] == (
            f"samclip: 1 image processed; 2 skipped, which were complete. The results are in {output}."
        )
        start = "samclip: skipping "
        skips = [text for text in messages if text.startswith(start) and "outputs of earlier runs" in text]
        assert len(skips) == 1 and ", such as photos/" in skips[0]
        written = {path.name for path in Path(output).iterdir() if path.suffix == ".png"}
        assert written == {f"{number}{suffix}.png" for number in range(3) for suffix in ("", "_labels")}
    # Other commands do not read them either, unless they are named, or if there is nothing else.
    shutil.copytree("photos/out", "photos", dirs_exist_ok=True)
    records, messages = samclip(capsys, "classify", "photos", "--labels", "cat, sofa")
    assert [record["image"] for record in records] == [f"photos/{number}.jpg" for number in range(3)]
    assert messages[0].endswith("skipping 6 outputs of earlier runs among the images, such as photos/0.png.")
    masks = sorted(map(str, Path("photos").glob("*_masks/*.png")))
    for pattern, expected in (("photos/**", [record["image"] for record in records]), ("photos/*_masks/*.png", masks)):
        found = samclip(capsys, "classify", pattern, "--labels", "cat, sofa")[0]
        assert [record["image"] for record in found] == expected != []
    assert len(samclip(capsys, "classify", "photos/0.png", "photos/out", "--labels", "cat, sofa")[0]) == 7
    message = samclip(capsys, "segment", "photos/0.png", *command, "--output", "photos", status=2)[1][-1]
    assert "all images are outputs of an earlier run to --output photos" in message


def test_outputs_of_a_single_image_and_of_other_formats_are_not_read_by_later_runs(capsys):
    save("photos/0.jpg", "photos/1.jpg")
    command = ["classify", "--labels", "cat, sofa", "--output", "photos"]
    samclip(capsys, *command, "photos/0.jpg")
    assert Path("photos/0.png").exists()
    originals = ["photos/0.jpg", "photos/1.jpg"]
    records, messages = samclip(capsys, "classify", "photos", "--labels", "cat, sofa")
    assert [record["image"] for record in records] == originals
    assert messages[-1].endswith("skipping 1 output of earlier runs among the images, such as photos/0.png.")
    samclip(capsys, *command, "photos", "--overwrite")
    samclip(capsys, *command, "photos", "--overwrite", "--formats", "json")
    assert Path("photos/0.png").exists() and Path("photos/1.png").exists()
    records, messages = samclip(capsys, "classify", "photos", "--labels", "cat, sofa")
    assert [record["image"] for record in records] == originals
    assert messages[-1].endswith("skipping 2 outputs of earlier runs among the images, such as photos/0.png.")


def test_deleted_outputs_are_not_in_the_record(tmp_path):
    """A file that a user puts in their place is not deleted."""
    names = [f"parquet/{number:05d}.parquet" for number in range(3)]
    outputs = RecordedOutputs(tmp_path)
    outputs.add(["parquet/", *names], (0, 1))
    (tmp_path / "parquet").mkdir()
    for name in [*names, "parquet/00003.parquet"]:
        (tmp_path / name).write_text(name)
    outputs.delete_others("parquet/", names[:1], (0, 1))
    assert sorted(path.name for path in (tmp_path / "parquet").iterdir()) == ["00000.parquet", "00003.parquet"]
    (tmp_path / names[1]).write_text("mine")
    outputs = RecordedOutputs(tmp_path)
    assert outputs.names == {"parquet/", names[0]}
    outputs.delete_others("parquet/", [], (0, 1))
    assert sorted(path.name for path in (tmp_path / "parquet").iterdir()) == ["00001.parquet", "00003.parquet"]


def test_the_outputs_of_all_processes_are_recorded_once_also_after_a_line_that_was_not_completed(tmp_path):
    RecordedOutputs(tmp_path).add(["a.png", "b_masks/"], (0, 2))
    RecordedOutputs(tmp_path).add(["c.png"], (1, 2))
    [file, _] = sorted((tmp_path / ".samclip").iterdir())
    size = file.stat().st_size
    RecordedOutputs(tmp_path).add(["c.png", "a.png"], (0, 2))
    assert file.stat().st_size == size
    os.truncate(file, size - 1)
    outputs = RecordedOutputs(tmp_path)
    assert outputs.names == {"a.png", "c.png"}
    outputs.add(["line\nbreak.png"], (0, 2))
    outputs = RecordedOutputs(tmp_path)
    assert outputs.names == {"a.png", "c.png", "line\nbreak.png"}
    assert str(tmp_path / "a.png") in outputs and str(tmp_path / "b.png") not in outputs


@pytest.mark.parametrize("lost", [0, 1, 30])
def test_bytes_that_a_killed_process_has_not_written_are_written_again(capsys, monkeypatch, photos, lost):
    """The journal and the results end in the middle of a line, and a temporary file remains."""
    run_until_killed(monkeypatch, "4", *COMMAND, "--output", "out")
    journal = Path("out/.samclip/images-00000-of-00001.jsonl")
    os.truncate(journal, journal.stat().st_size - lost)
    with open("out/results.jsonl", "ab") as results:
        results.write(b'{"image": "photos/4.png", "hei')
    Path("out/.3.json.0123456789abcdef.partial").write_bytes(b"{")
    samclip(capsys, *COMMAND, "--output", "out")
    assert contents("out") == photos | ({".3.json.0123456789abcdef.partial": b"{"} if lost == 0 else {})


def test_new_images_are_added_and_deleted_outputs_are_written_again(capsys, photos):
    Path("photos/2.png").rename("2.png")
    samclip(capsys, *COMMAND, "--output", "out")
    Path("2.png").rename("photos/2.png")
    Path("out/1.json").unlink()
    shutil.rmtree("out/3_masks")
    _, messages = samclip(capsys, *COMMAND, "--output", "out")
    assert messages[-1] == "samclip: 3 images processed; 2 skipped, which were complete. The results are in out."
    found = contents("out")
    assert sorted(found.pop("results.jsonl").splitlines()) == sorted(photos.pop("results.jsonl").splitlines())
    assert {name for name in found if name.startswith("coco")} == {"coco_results.json", "coco_dataset.json"}
    assert {name: found[name] for name in found if "coco" not in name} == {
        name: photos[name] for name in photos if "coco" not in name
    }


@pytest.mark.parametrize("change", ["option", "new option", "formats", "model", "image", "results", "another file"])
def test_results_of_different_runs_are_not_mixed(capsys, monkeypatch, photos, change):
    run_until_killed(monkeypatch, "3", *COMMAND, "--output", "out")
    command, part = [*COMMAND, "--output", "out"], ""
    capsys.readouterr()
    if change == "option":
        command, part = [*command, "--threshold", "0.9"], "with another threshold (0.3 instead of 0.9)"
    elif change == "new option":
        command = [*command, "--tile", "64"]
        part = "with another tile (not given instead of 64)"
    elif change == "formats":
        command, part = [*command, "--formats", "json"], "with another formats"
    elif change == "model":
        from samclip_hf import SamClipForImageSegmentation, miniature

        model = SamClipForImageSegmentation.from_pretrained(miniature.checkpoint())
        model.logit_scale.data += 0.1
        monkeypatch.setattr(SamClipForImageSegmentation, "from_pretrained", lambda *_, **__: model)
        monkeypatch.setattr("samclip_hf.modeling_samclip.load_complete_model", lambda *_: model)
        part = "with other weights of the model. Pass"
    elif change == "image":
        Path("photos/1.png").write_bytes(Path("photos/2.png").read_bytes())
        part = "photos/1.png has changed since"
    elif change == "results":
        os.truncate("out/results.jsonl", 10)
        part = "results.jsonl has lost lines"
    else:
        Path("out/4.json").write_text("mine")
        part = "out/4.json would be overwritten"
    before = contents("out")
    _, [message] = samclip(capsys, *command, status=2)
    assert part in message and "--overwrite" in message and contents("out") == before
    samclip(capsys, *command, "--overwrite")
    changed = contents("out")
    if change == "formats":
        assert changed.keys() == {f"{number}{end}" for number in range(5) for end in (".json",)} | {
            name for name in before if not name.startswith(("results", "coco"))
        }
    else:
        assert len(changed["results.jsonl"].splitlines()) == 5
    assert (changed == photos) == (change in ("results", "another file"))


def test_a_run_that_replaces_files_may_replace_them_when_it_continues(capsys, monkeypatch, photos):
    for path, content in photos.items():
        Path("out", path).parent.mkdir(parents=True, exist_ok=True)
        Path("out", path).write_bytes(content[:5])
    Path("out/0_masks/099_old.png").write_text("a mask of an older run")
    run_until_killed(monkeypatch, "2", *COMMAND, "--output", "out", "--overwrite")
    samclip(capsys, *COMMAND, "--output", "out")
    assert contents("out") == photos


def test_an_image_that_failed_is_tried_again(capsys, photos):
    good = Path("photos/1.png").read_bytes()
    Path("photos/1.png").write_bytes(good[:100])
    _, messages = samclip(capsys, *COMMAND, "--output", "out", status=1)
    assert messages[-1] == ("samclip: 4 images processed; 1 failed (1 cannot be read). The results are in out.")
    Path("photos/1.png").write_bytes(good)
    _, messages = samclip(capsys, *COMMAND, "--output", "out")
    assert messages == ["samclip: 1 image processed; 4 skipped, which were complete. The results are in out."]
    assert contents("out")["1.json"] == photos["1.json"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs locks of files")
def test_two_commands_do_not_write_to_one_folder_at_a_time(capsys, monkeypatch, photos):
    before_writing(monkeypatch, "3", lambda: others.append(main([*COMMAND, "--output", "out"])))
    others: list[int] = []
    assert main([*COMMAND, "--output", "out"]) == 0
    assert others == [2] and "another process writes to out" in capsys.readouterr().err
    assert contents("out") == photos


def run_process(monkeypatch, number: int, count: int, *arguments: str) -> int:
    with monkeypatch.context() as context:
        context.setenv("RANK", str(number))
        context.setenv("WORLD_SIZE", str(count))
        return main([*arguments])


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_processes_give_the_results_of_one(capsys, monkeypatch, photos, order):
    command = [*COMMAND, "--output", "out"]
    for number in order:
        assert run_process(monkeypatch, number, 2, *command) == 0
    err = capsys.readouterr().err
    assert "process 1 of 2: 3 images processed" in err and "process 2 of 2: 2 images processed" in err
    assert "run the same command in a single process to try failed images again and to join their results" in err
    shards = [contents("out")[f"results-0000{number}-of-00002.jsonl"].splitlines() for number in range(2)]
    lines = photos["results.jsonl"].splitlines()
    assert shards == [lines[0::2], lines[1::2]]
    _, messages = samclip(capsys, *command)
    assert messages == ["samclip: 0 images processed; 5 skipped, which were complete. The results are in out."]
    assert contents("out") == photos
    samclip(capsys, *command)
    assert contents("out") == photos


def test_another_number_of_processes_continues_a_run(capsys, monkeypatch, photos):
    command = [*COMMAND, "--output", "out"]
    with pytest.raises(Killed), monkeypatch.context() as context:
        interrupt(context, "3")
        run_process(context, 1, 2, *command)
    for number in (2, 0, 1):
        assert run_process(monkeypatch, number, 3, *command) == 0
    samclip(capsys, *command)
    assert contents("out") == photos


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_a_join_of_results_continues_after_a_kill_in_any_step(capsys, monkeypatch, photos, step):
    command = [*COMMAND, "--output", "out"]
    for number in range(2):
        assert run_process(monkeypatch, number, 2, *command) == 0
    steps = iter(range(1, 9))

    def killed_at(function):
        def call(*arguments, **options):
            if next(steps) == step:
                raise Killed
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as context, pytest.raises(Killed):
        context.setattr(run_record.os, "replace", killed_at(os.replace))
        context.setattr(run_record.Path, "unlink", killed_at(Path.unlink))
        main(command)
    samclip(capsys, *command)
    assert contents("out") == photos


@pytest.mark.parametrize("variable", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_processes_that_would_each_process_all_images_are_refused(capsys, monkeypatch, photos, variable):
    """mpirun and srun do not set RANK and WORLD_SIZE."""
    monkeypatch.setenv(variable, "4")
    _, [message] = samclip(capsys, *COMMAND, "--output", "out", status=2)
    assert "has started 4 processes" in message and "'torchrun --nproc_per_node 4 -m samclip_cli ...'" in message
    monkeypatch.setenv(variable, "1")
    assert find_process() == (0, 1)
    monkeypatch.setenv(variable, "4")  # torchrun in each of the four, or accelerate launch
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert find_process() == (2, 4)


def test_several_processes_need_an_output_folder(capsys, monkeypatch, photos):
    assert run_process(monkeypatch, 0, 2, *COMMAND[:-2]) == 2
    assert "several processes cannot share standard output: pass a folder as --output" in capsys.readouterr().err


@pytest.mark.slow
def test_a_process_that_is_killed_at_any_moment_continues(photos):
    command = [sys.executable, "-m", "samclip_cli", *COMMAND, "--output", "out"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for wanted in (1, 4):  # lines of the results before the kill
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
        while not Path("out/results.jsonl").exists() or Path("out/results.jsonl").read_bytes().count(b"\n") < wanted:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert subprocess.run(command, env=environment).returncode == 0
    assert contents("out") == photos


@pytest.mark.slow
def test_torchrun_divides_the_images_among_processes(photos):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    arguments = [*COMMAND, "--output", "out"]
    assert subprocess.run([*launcher, "-m", "samclip_cli", *arguments], env=environment).returncode == 0
    assert main(arguments) == 0
    assert contents("out") == photos
