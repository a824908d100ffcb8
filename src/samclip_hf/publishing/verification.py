"""Verification: a repository is loaded without this package, and its outputs are compared with the package's."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

from ..images import convert_to_rgb
from .repository import PublishingError
from .verification_script import run_checkpoint

SCRIPT = Path(__file__).with_name("verification_script.py")
# Maximum difference of outputs, relative to their largest absolute value.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


def verify(folder: Path, image: Image.Image) -> dict[str, float]:
    """
    Loads a repository through every Auto class and pipeline, in this process and in a new one that cannot import this
    package and therefore runs the repository's own code. Compares the results.

    Args:
        folder (`Path`): A folder from `build_repository`.
        image (`PIL.Image.Image`): The input of the models and pipelines.

    Returns:
        `dict[str, float]`: For each output of `AutoModel`, the largest difference relative to its largest absolute
        value.

    Raises:
        PublishingError: If loading fails or results differ.
    """
    with tempfile.TemporaryDirectory() as temporary:
        image_path, results_path = Path(temporary, "image.png"), Path(temporary, "results")
        image = convert_to_rgb(image)
        image.save(image_path)
        process = subprocess.Popen(
            [sys.executable, "-P", str(SCRIPT), str(folder.absolute()), str(image_path), str(results_path)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            expected_results, expected_outputs = run_checkpoint(str(folder.absolute()), image)
        except Exception as error:
            raise PublishingError(f"{folder} does not work with the package: {error!r}") from error
        finally:
            _, stderr = process.communicate()
        if process.returncode:
            raise PublishingError(f"{folder} does not load without the package:\n{stderr[-3000:]}")
        results = json.loads(results_path.with_suffix(".json").read_text())
        outputs = load_file(results_path.with_suffix(".safetensors"))
    for name, expected in expected_results.items():
        if results.get(name) != expected:
            raise PublishingError(
                f"{name} returns {results.get(name)} with the repository's code and {expected} with the package's."
            )
    tolerance = TOLERANCES[getattr(torch, str(json.loads((folder / "config.json").read_text())["dtype"]))]
    differences = {}
    for name, expected in expected_outputs.items():
        difference = (outputs[name] - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
        differences[name] = difference.item()
        if not difference <= tolerance:  # also true for NaN
            raise PublishingError(
                f"{name} differs by {difference:.3g} of its largest absolute value between the repository's code and "
                "the package's."
            )
    return differences
