"""The `samclip` command itself: names of commands, help texts, exit statuses, and what it imports."""

import contextlib
import errno
import importlib
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import samclip_cli
from samclip_cli import COMMANDS, CommandError, main, masks
from samclip_cli.export import OPSETS, PARTS
from samclip_cli.finetune import COMMAND
from samclip_cli.train import TRAIN, collect_arguments, recipe_paths
from samclip_hf import export, miniature
from samclip_hf.mask_generation_samclip import MASK_GENERATION_DEFAULTS

ROOT = Path(__file__).parents[2]

HELP = [[command, "--help"] for command in COMMANDS]
WRONG_ARGUMENTS = [
    [],
    ["unknown"],
    ["segment"],
    ["segment", "nowhere.png", "--labels", "a"],
    ["segment", "nowhere.png", "--threshold", "2"],
    ["classify", "photo.png"],
    ["masks", "--points_per_crop", "0"],
    ["train", "nowhere.yaml"],
    ["train", "unknown_recipe"],
    ["train", "miniature_stage1", "--learning_rat", "1"],
    ["train", "miniature_stage1", "--learning_rate", "abc"],
    ["train", "miniature_stage1", "--max_steps=1.5"],
    ["train", "miniature_stage1", "--stage", "7"],
    ["train", "miniature_stage1", "--clip_resolutions", "64", "large"],
    ["finetune", "unknown_recipe"],
    ["finetune", "miniature", "--guard_weigh", "1"],
    ["finetune", "miniature", "--stage", "2"],
    ["evaluate", "--share", "7"],
    ["evaluate", "--task", "unknown:data"],
    ["evaluate", "--task", "classification", "unknown"],
    ["evaluate", "--limit", "5"],
    ["evaluate", "--sam", "a", "--clip", "b"],
    ["publish", "model", "me/model", "--clip", "b"],
    ["classify", "photo.png", "--labels", "a, b", "--background", "c"],
    ["masks", "photo.png", "--label", "a, b"],
    ["publish"],
    ["export"],
    ["export", "--output_dir", "onnx", "--opset", "3"],
    ["export", "--output_dir", "onnx", "--model", "./nowhere"],
    ["export", "--output_dir", "/dev/null"],
    ["classify", __file__, "--labels", "a, b", "--output", __file__],
    ["embed", "--output_dir", "embeddings", "--num_crops", "0"],
    ["embed", "--output_dir", "embeddings", "--clip_teacher", "./nowhere"],
    ["embed", "--output_dir", "/dev/null"],
    ["index", "nowhere.png", "--output", "out"],
    ["index", __file__, "--output", "out.png"],
    ["search", "index"],
    ["search", "index", "--text", "a", "--box", "1,2,3,4"],
    ["cost"],
    ["cost", "unknown_recipe"],
]
# Runs command lines in one new process. Prints the exit status of each, and at the end what is imported.
RUN_ALL = """
import json, sys
from samclip_cli import main

for argv in json.loads(sys.argv[1]):
    try:
        status = main(argv)
    except SystemExit as error:
        status = error.code
    print(f"status {status}")
print("imported", [name for name in ("torch", "transformers", "samclip_hf", "numpy") if name in sys.modules])
"""


@pytest.mark.parametrize(
    ("command_lines", "status"), [([["--help"], ["--version"], *HELP], 0), (WRONG_ARGUMENTS, 2)], ids=["help", "wrong"]
)
def test_arguments_are_parsed_without_importing_torch(command_lines, status):
    command = [sys.executable, "-c", RUN_ALL, json.dumps(command_lines)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.stdout.splitlines()[-1] == "imported []", run.stderr
    assert re.findall("^status (.*)", run.stdout, re.MULTILINE) == [str(status)] * len(command_lines)


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_in_the_help_text_can_be_parsed(capsys, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    Path("my_recipe.yaml").write_text("max_steps: 1\n")
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    launcher = r"(?:samclip|accelerate launch -m samclip_cli) "
    examples = re.findall(rf"^  {launcher}{command} (.*)", text.replace("\\\n", ""), re.MULTILINE)
    assert examples
    for example in examples:
        words = shlex.split(example.partition(" > ")[0])
        if command in ("train", "finetune"):
            assert collect_arguments(words, TRAIN if command == "train" else COMMAND)
        else:
            importlib.import_module(f"samclip_cli.{command}").build_parser().parse_args(words)


@pytest.mark.parametrize(
    "argv, part",
    [
        (["evaluate", "--limit", "5"], "Pass --share to evaluate a part of the miniature's scenes"),
        (["evaluate", "--sam", "a", "--clip", "b"], "--sam: pass the unmerged model of a SAM and a CLIP as SAM+CLIP"),
        (["publish", "model", "me/model", "--clip=b"], "--clip: save the unmerged model of the SAM and the CLIP"),
        (["classify", "a.png", "--labels", "a, b", "--background", "c"], "--background: an image gets one of the lab"),
        (["masks", "photo.png", "--nothing"], "unknown argument --nothing. See samclip masks --help."),
        (["cost", "vit_b_stage1", "--num_process", "2"], "--num_process. Did you mean --num_processes?"),
        (["--vers"], "COMMAND"),
    ],
)
def test_an_option_that_a_command_does_not_have_is_explained(capsys, argv, part):
    try:
        assert main(argv) == 2
    except SystemExit as error:
        assert error.code == 2 and argv == ["--vers"]  # argparse
    assert part in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", sorted(COMMANDS.keys() - {"train", "finetune"})
)  # which have a parser of their own
def test_options_cannot_be_abbreviated(capsys, command):
    parser = importlib.import_module(f"samclip_cli.{command}").build_parser()
    options = [option for option in parser._option_string_actions if option.startswith("--")]
    required = [word for action in parser._actions if action.required for word in (*action.option_strings[:1], "x")]
    checked = 0
    for option in options:
        if option[:-1] not in options and option != "--help":
            assert main([command, *required, f"{option[:-1]}=x"]) == 2
            assert f"unknown argument {option[:-1]}. Did you mean {option}?" in capsys.readouterr().err
            checked += 1
    assert checked


def test_the_help_text_lists_all_commands(capsys):
    for argv in (["--help"], []):
        with contextlib.suppress(SystemExit):
            main(argv)
        captured = capsys.readouterr()
        assert all(re.search(rf"^  {name} +\w", captured.out or captured.err, re.MULTILINE) for name in COMMANDS)


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"samclip {metadata.version('samclip-hf')}\n"


def test_the_installed_command_calls_main():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = scripts["samclip"].partition(":")
    assert getattr(importlib.import_module(module), name) is main


def test_the_package_of_the_commands_runs_as_the_command():
    run = subprocess.run([sys.executable, "-m", "samclip_cli", "evaluate", "--help"], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.startswith("usage: samclip evaluate"), run.stderr


def test_ctrl_c_is_reported_without_a_traceback(capsys, monkeypatch):
    def interrupt(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr("samclip_cli.evaluate.run", interrupt)
    assert main(["evaluate"]) == 130
    assert capsys.readouterr().err == "samclip evaluate: interrupted.\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_becomes_full_or_read_only_is_reported_without_a_traceback(capsys, monkeypatch, number):
    def fail(argv):
        raise OSError(number, os.strerror(number), "results.json")

    monkeypatch.setattr("samclip_cli.evaluate.run", fail)
    assert main(["evaluate"]) == 1
    [message] = capsys.readouterr().err.splitlines()
    assert message.startswith("samclip evaluate: the output cannot be written: ")
    assert os.strerror(number) in message and "results.json" in message


def test_other_errors_of_the_system_keep_their_traceback(monkeypatch):
    def fail(argv):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "missing")

    monkeypatch.setattr("samclip_cli.evaluate.run", fail)
    with pytest.raises(FileNotFoundError):
        main(["evaluate"])


def test_torchrun_ends_its_report_with_the_message_of_the_command(tmp_path, monkeypatch, capsys):
    (tmp_path / "recipe.yaml").write_text("learning_rat: 1")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))  # torchrun sets it for each process

    def exit_with_a_message(argv):
        sys.exit("The output folder is full.")

    monkeypatch.setattr("samclip_cli.evaluate.run", exit_with_a_message)
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 2
    message = capsys.readouterr().err.strip()
    assert "unknown argument 'learning_rat'" in message and reported_by_torchrun(tmp_path / "error.json") == message
    with pytest.raises(SystemExit, match="The output folder is full"):
        main(["evaluate"])
    assert reported_by_torchrun(tmp_path / "error.json") == "The output folder is full."


def reported_by_torchrun(path: Path) -> str:
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(path))
    report = str(ChildFailedError("samclip_cli", {0: failure}))
    return re.search("Root Cause.*traceback : (.*?)\n", report, re.DOTALL)[1]


def test_a_command_leaves_the_process_group_at_its_end(monkeypatch, single_process_group):
    monkeypatch.setattr(masks, "run", lambda argv: 0)
    assert main(["masks"]) == 0
    assert not torch.distributed.is_initialized()


def test_a_command_does_not_wait_for_other_processes_after_an_error(monkeypatch, single_process_group):
    def fail(argv):
        raise CommandError("an error")

    monkeypatch.setattr(masks, "run", fail)
    assert main(["masks"]) == 2
    assert torch.distributed.is_initialized()


@pytest.fixture
def single_process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_a_missing_library_is_reported_with_its_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert main(["embed", "--output_dir", "embeddings"]) == 2
    assert "pip install 'samclip-hf[train]'" in capsys.readouterr().err


def test_a_missing_module_of_the_package_is_not_hidden(monkeypatch):
    def fail(argv):
        raise ModuleNotFoundError(
            "No module named 'samclip_hf.evaluation.report'", name="samclip_hf.evaluation.report"
        )

    monkeypatch.setattr("samclip_cli.evaluate.run", fail)
    with pytest.raises(ModuleNotFoundError, match=r"samclip_hf\.evaluation\.report"):
        main(["evaluate"])


def test_a_closed_pipe_ends_a_process_quietly():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "samclip_cli", "train", "--help"]
    run = subprocess.run(command, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert run.returncode == samclip_cli.BROKEN_PIPE and run.stderr == b""


def test_a_closed_pipe_is_noticed_when_the_last_output_is_flushed(capsys, monkeypatch):
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr("samclip_cli.evaluate.run", lambda argv: print("one line") or 0)
    with open(write, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["evaluate"]) == samclip_cli.BROKEN_PIPE
    assert capsys.readouterr().err == ""


def test_ctrl_c_ends_a_process_quietly(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    os.mkfifo(recipe)
    command = [sys.executable, "-m", "samclip_cli", "train", str(recipe)]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    ) as process:
        with recipe.open("w"):  # waits until the command opens it; the command then waits for its end
            process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == samclip_cli.INTERRUPTED
        assert process.stderr.read() == b"samclip train: interrupted.\n"


def test_numbers_in_help_texts_are_those_of_the_package():
    assert PARTS == export.PART_NAMES and OPSETS == export.writer.OPSETS
    text = " ".join(masks.build_parser().format_help().split())
    for name in ("points_per_crop", "pred_iou_thresh", "stability_score_thresh"):
        default, of_miniature = (options[name] for options in (MASK_GENERATION_DEFAULTS, miniature.MASK_GENERATION))
        assert f"(default: {default}; {of_miniature} for the shipped miniature)" in text


def test_recipes_of_the_package_are_found_by_name():
    files = (ROOT / "src" / "samclip_hf" / "recipes").glob("*.yaml")
    assert recipe_paths() == {path.stem: path for path in files}


def test_the_old_name_of_the_export_command_names_the_new_one(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["export", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("samclip_hf.export", run_name="__main__")
    output = capsys.readouterr()
    assert "deprecated, use samclip export" in output.err and output.out.startswith("usage: samclip export")
