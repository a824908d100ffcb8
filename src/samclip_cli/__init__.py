"""
The `samclip` command.

Every command is a module of this package with a function `run(argv)`. Modules import torch, transformers and
samclip_hf (which imports both) only inside `run`. These imports take several seconds, and `--help` and argument errors
must not wait for them.
"""

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from importlib import import_module, metadata

# The module of each command, and its line in `samclip --help`.
COMMANDS = {
    "segment": "segment images by text",
    "classify": "classify images by text",
    "points": "segment the objects at points and in boxes",
    "masks": "segment everything in images",
    "annotate": "annotate a dataset by text: COCO, parquet or webdataset",
    "index": "embed images and their segments for samclip search",
    "search": "search an index of images and segments by text or by example",
    "train": "train one stage of SAM-CLIP",
    "finetune": "fine-tune a model on labeled images",
    "evaluate": "evaluate models with the paper's protocols",
    "publish": "build, verify and upload a model repository",
    "export": "export a model to ONNX",
    "embed": "precompute the CLIP teacher's embeddings for training",
    "cost": "estimate the operations and GPU hours of training recipes",
}
# Commands that need an optional dependency group of the package.
EXTRAS = dict.fromkeys(
    ("annotate", "index", "search", "train", "finetune", "evaluate", "publish", "embed", "cost"), "train"
)
EXTRAS["export"] = "export"

INTERRUPTED, BROKEN_PIPE = 130, 141  # exit status: 128 + signal number, as in shells


class CommandError(Exception):
    """An error that the user can correct. The message is printed without a traceback; the exit status is 2."""


def first_line(error: Exception) -> str:
    """The first line of an error's message that is not empty, or the name of its type. Of an error of a configuration,
    that of its cause, because the first line names the check only."""
    if type(error).__name__.startswith("StrictDataclass") and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def log(message: str) -> None:
    """Prints a message of an image command on standard error. `print` would break a progress bar on a terminal."""
    from tqdm import tqdm

    tqdm.write(f"samclip: {message}", file=sys.stderr)


class _MessageHandler(logging.Handler):
    """Prints warnings of samclip_hf as messages of the command. By default, they have no prefix."""

    def emit(self, record: logging.LogRecord) -> None:
        log(record.getMessage())


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs a command line, by default that of this process.

    argv (sequence of `str`, *optional*):
        The command and its arguments, without the program's name.

    Returns the exit status. Like `argparse`, raises `SystemExit` for `--help` and for arguments that cannot be parsed.
    """
    parser = build_parser()
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        parser.print_help(sys.stderr)
        return 2
    arguments = parser.parse_args(argv)
    module = import_module(f".{arguments.command}", __name__)
    logger, handler = logging.getLogger("samclip_hf"), _MessageHandler(logging.WARNING)
    logger.addHandler(handler)
    try:
        try:
            status = module.run(arguments.arguments)
            leave_process_group()
            return status
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # here, because at exit Python prints an error if the pipe is closed
    except CommandError as error:
        message = f"samclip {arguments.command}: {error}"
        print(message, file=sys.stderr)
        tell_launcher(message)
        return 2
    except SystemExit as error:
        if isinstance(error.code, str):  # a message, which Python prints
            tell_launcher(error.code)
        raise
    except ModuleNotFoundError as error:
        extra = EXTRAS.get(arguments.command)
        if extra is None or not error.name or error.name.startswith("samclip"):
            raise
        print(
            f"samclip {arguments.command}: {error}. Install the optional dependencies: "
            f"pip install 'samclip-hf[{extra}]'",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(f"samclip {arguments.command}: interrupted.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of standard output, such as `head`, has closed it
        discard_standard_output()
        return BROKEN_PIPE
    except OSError as error:
        from samclip_hf.files import DISK_ERRORS

        if error.errno not in DISK_ERRORS:  # the disk may have become full after the outputs were checked
            raise
        message = f"samclip {arguments.command}: the output cannot be written: {error}"
        print(message, file=sys.stderr)
        tell_launcher(message)
        return 1
    finally:
        logger.removeHandler(handler)


def leave_process_group() -> None:
    """
    Destroys the process group of `accelerate launch` or torchrun. Without it, threads of the communication backend can
    abort a process at exit (https://docs.pytorch.org/docs/stable/distributed.html#shutdown).

    Not called after an error, because it can block until the other processes reach it.
    """
    if "torch" in sys.modules:  # only a command that has imported it can be one of several processes
        from torch import distributed

        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()


def tell_launcher(message: str) -> None:
    """
    Writes the error message of this process where torchrun reads it, which `accelerate launch` uses for several
    processes. torchrun ends with a traceback of its own and this message, instead of a hint at its documentation
    (https://pytorch.org/docs/stable/elastic/errors.html).
    """
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with open(path, "w") as file:
            json.dump({"message": message, "timestamp": int(time.time())}, file)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command's name. The command has its own parser for the other arguments."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="samclip",
        usage="samclip COMMAND [arguments]",
        description=f"SAM-CLIP: segment and classify images by text, and train the models.\n\ncommands:\n{commands}",
        epilog="'samclip COMMAND --help' describes a command and its arguments.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    version = f"samclip {metadata.version('samclip-hf')}"
    parser.add_argument("--version", action="version", version=version, help="print the version and exit")
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help=argparse.SUPPRESS)
    rest = parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    rest.required = False  # otherwise "samclip --unknown" reports it as missing
    return parser


def discard_standard_output() -> None:
    """Redirects standard output to the null device, so that Python does not fail when it flushes it at exit."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
