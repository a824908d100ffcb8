"""What comes out of an evaluation: `results.json`, a table beside the paper's figures, panels, model-index data."""

import hashlib
import json
import os
import platform
import subprocess
import textwrap
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from huggingface_hub import EvalResult

from .adapters import ModelAdapter, SamClipAdapter
from .evaluator import EvaluationResult, Evaluator, SampleEvaluator

PER_CLASS = "iou: "  # figures of single classes, too many for a table
MODEL_FILES = ("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer.json")
PACKAGES = ("samclip-hf", "torch", "torchvision", "transformers", "accelerate", "evaluate", "datasets", "numpy")
PAPER = json.loads((resources.files(__package__) / "paper.json").read_text())


class Results:
    """
    Figures by task and model, kept in `results.json` from one task to the next, so that an evaluation that was cut off
    goes on where it was.

    folder (`Path`):
        Of `results.json`; what it holds already is taken over.
    command (`str`):
        To stand in it, with the versions that are installed; every figure also keeps those that it came from.
    """

    def __init__(self, folder: Path, command: str):
        self.path = folder / "results.json"
        self.content: dict[str, Any] = {"tasks": {}}
        if self.path.exists():
            self.content = json.loads(self.path.read_text())
        self.content["command"] = command
        self.content["environment"] = environment()

    def holds(self, key: str, task: Evaluator, model: ModelAdapter) -> bool:
        """Whether just this task has judged just this model."""
        entry = self.content["tasks"].get(key, {"protocol": None})
        if entry["protocol"] != jsonable(task.describe()):
            return False
        of_model = entry["models"].get(model.name, {"identity": None})
        return of_model["identity"] == identity(model) and of_model.get("dtype", "float32") == dtype(model)

    def add(self, key: str, task: Evaluator, model: ModelAdapter, outcome: EvaluationResult) -> None:
        """Figures of another protocol under the same key are dropped: they cannot be compared."""
        protocol = jsonable(task.describe())
        entry = self.content["tasks"].get(key)
        if entry is None or entry["protocol"] != protocol:
            entry = self.content["tasks"][key] = {"protocol": protocol, "models": {}}
        entry["models"][model.name] = {
            "kind": type(model).__name__,
            "identity": identity(model),
            "dtype": dtype(model),
            "metrics": outcome.metrics,
            "num_samples": outcome.num_samples,
            "seconds": round(outcome.seconds, 1),
            "command": self.content["command"],
            "environment": self.content["environment"],
        }
        if untrained := model.untrained:
            entry["models"][model.name]["random weights"] = untrained
        self.save()

    def save(self) -> None:
        """All or nothing: a reader, or the next run, never sees half a file."""
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.content, indent=1, allow_nan=False) + "\n")
        os.replace(temporary, self.path)

    def markdown(self) -> str:
        """All figures but those of single classes, models in columns; where the paper has the figure too, of whole
        data sets, its SAM-CLIP's and, for a SAM-CLIP, by how much that is missed or passed."""
        tasks = self.content["tasks"]
        names = list(dict.fromkeys(name for entry in tasks.values() for name in entry["models"]))
        random = {
            name: of_model["random weights"]
            for entry in tasks.values()
            for name, of_model in entry["models"].items()
            if "random weights" in of_model
        }
        kinds = {name: e["models"][name]["kind"] for e in tasks.values() for name in names if name in e["models"]}
        merged = [name for name in names if kinds[name] == SamClipAdapter.__name__]
        has_paper = any(key.partition("@")[0] in PAPER for key in tasks)
        header = ["task", "figure", *(f"{name} (random weights)" if name in random else name for name in names)] + (
            ["paper's SAM-CLIP", *(f"{n} - paper" for n in merged)] * has_paper
        )
        lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
        for key, entry in tasks.items():
            figures = dict.fromkeys(f for model in entry["models"].values() for f in model["metrics"])
            for figure in figures:
                if figure.startswith(PER_CLASS):
                    continue
                values = {name: entry["models"].get(name, {}).get("metrics", {}).get(figure) for name in names}
                row = [key, figure, *(shown(value) for value in values.values())]
                if has_paper:
                    whole = "only" not in entry["protocol"]
                    paper = PAPER.get(key.partition("@")[0], {}).get(figure) if whole else None
                    row.append("" if paper is None else f"{paper['value']:.3f} (table {paper['table']})")
                    row += [
                        "" if paper is None or values[n] is None else f"{values[n] - paper['value']:+.3f}"
                        for n in merged
                    ]
                lines.append("| " + " | ".join(row) + " |")
        lines += [f"\nRandom weights: of {name}, {', '.join(parts)} are untrained." for name, parts in random.items()]
        return "\n".join(lines) + "\n"

    def protocols(self) -> str:
        """Every task's protocol, as Markdown."""
        parts = []
        for key, entry in self.content["tasks"].items():
            lines = [f"- {name}: {short(value)}" for name, value in entry["protocol"].items() if name != "categories"]
            counts = {model["num_samples"] for model in entry["models"].values()}
            lines.append(f"- images judged: {', '.join(map(str, sorted(counts)))}")
            parts.append(f"**{key}**\n\n" + "\n".join(lines))
        return "\n\n".join(parts) + "\n"


def shown(value: float | None) -> str:
    """Three decimals, or as many digits."""
    if value is None:
        return ""
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"


def short(value: Any) -> str:
    return textwrap.shorten(str(value), 400, placeholder=" ...")


def jsonable(value: Any) -> Any:
    """As it comes back from a JSON file."""
    return json.loads(json.dumps(value, default=str))


def identity(model: ModelAdapter) -> str:
    """Changes when the model does: the Hub's commit, or a folder's files, of its weights their sizes and times."""
    parts = []
    for part in model.models:
        folder = Path(part.name_or_path)
        if folder.is_dir():
            files = sorted(folder.glob("*.safetensors"))
            parts += [f"{f.name} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files]
            # As they are there: defaults change with versions.
            parts += [(folder / name).read_text() for name in MODEL_FILES if (folder / name).is_file()]
        else:
            parts.append(f"{part.name_or_path}@{part.config._commit_hash}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def dtype(model: ModelAdapter) -> str:
    """What it computes in, such as "float32"."""
    return str(model.models[0].dtype).removeprefix("torch.")


def device_name() -> str:
    """What is computed on."""
    device = PartialState().device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def environment() -> dict[str, str]:
    """Versions, and what was computed on."""
    versions = {name: metadata.version(name) for name in PACKAGES if installed(name)}
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {"python": platform.python_version(), **versions, "device": device_name()} | (
        {"commit": commit} if commit else {}
    )


def installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def model_index(results: dict[str, Any], name: str) -> list[EvalResult]:
    """One model's figures of `results.json` as the Hub's model cards take them (`ModelCardData(eval_results=...)`)."""
    task_types = {
        "classification": "zero-shot-image-classification",
        "linear-probe": "image-classification",
        "retrieval": "image-to-text",
        "instances": "mask-generation",
        "prompts": "mask-generation",
    }
    entries = []
    for key, entry in results["tasks"].items():
        protocol, _, data = key.partition(":")
        if name not in entry["models"] or protocol == "cost":
            continue
        for figure, value in entry["models"][name]["metrics"].items():
            if value is not None and not figure.startswith(PER_CLASS):
                label = figure + (" (random weights)" if "random weights" in entry["models"][name] else "")
                entries.append(
                    EvalResult(
                        task_type=task_types.get(protocol, "image-segmentation"),
                        task_name=protocol,
                        dataset_type=data,
                        dataset_name=data,
                        metric_type=figure,
                        metric_name=label,
                        metric_value=round(value, 4),
                    )
                )
    return entries


def draw_panel(protocol: SampleEvaluator, model: ModelAdapter, outcome: EvaluationResult, path: Path) -> None:
    """The best, the median and the worst sample, as the protocol illustrates them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    wanted = set(outcome.extremes.values())
    samples = {}
    for place, sample in enumerate(protocol.data.samples):
        if place in wanted:
            samples[place] = sample
        if len(samples) == len(wanted):
            break
    rows: dict[str, list[tuple[str, np.ndarray]]] = {
        f"{rank}: {samples[place].key}": protocol.visualize(model, samples[place])
        for rank, place in outcome.extremes.items()
    }
    width = max(map(len, rows.values()))
    figure, axes = plt.subplots(len(rows), width, figsize=(3.2 * width, 3.4 * len(rows)), squeeze=False)
    for row, (title, pictures) in zip(axes, rows.items(), strict=True):
        for axis in row:
            axis.axis("off")
        for axis, (caption, picture) in zip(row, pictures, strict=False):
            axis.imshow(picture)
            axis.set_title(caption if axis is not row[0] else f"{title}\n{caption}", fontsize=8, parse_math=False)
    main_figure, value = next(iter(outcome.metrics.items()))
    name = f"{model.name} (random weights)" if model.untrained else model.name
    title = f"{protocol.name}:{protocol.data.name}, {name}: {main_figure} {shown(value)}"
    figure.suptitle(title, fontsize=10, parse_math=False)  # a dollar sign is one
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
