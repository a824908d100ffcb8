"""Results of evaluations: `results.json`, tables next to the paper's results, panels, and metadata for model cards."""

import hashlib
import json
import platform
import subprocess
import textwrap
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub import EvalResult

from ..files import write_atomically
from ..visualization import save_panel
from .adapters import ModelAdapter, SamClipAdapter
from .evaluator import EvaluationResult, Evaluator, SampleEvaluator

PER_CLASS_PREFIX = "iou: "  # of metrics of single classes, which are not in tables
MODEL_FILES = ("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer.json")
PACKAGES = ("samclip-hf", "torch", "torchvision", "transformers", "accelerate", "evaluate", "datasets", "numpy")
PAPER_RESULTS = json.loads((resources.files(__package__) / "paper.json").read_text())
TASK_TYPES = {  # of the Hub, by evaluator; those of the others are "image-segmentation"
    "classification": "zero-shot-image-classification",
    "linear-probe": "image-classification",
    "retrieval": "image-to-text",
    "instances": "mask-generation",
    "prompts": "mask-generation",
}


class Results:
    """
    Metrics by task and model, stored in `results.json` after each task, so that an interrupted evaluation can be
    resumed.

    folder (`Path`):
        The folder of `results.json`. Existing results are kept.
    command (`str`):
        The command line. It is stored with the installed versions, for the file and for each result.
    """

    def __init__(self, folder: Path, command: str):
        self.path = folder / "results.json"
        self.content: dict[str, Any] = {"tasks": {}}
        if self.path.exists():
            self.content = read_results(self.path)
        self.content["command"] = command
        self.content["environment"] = environment()

    def holds(self, key: str, evaluator: Evaluator, model: ModelAdapter) -> bool:
        """Returns whether there is a result of the same protocol for the same model."""
        task = self.content["tasks"].get(key, {"protocol": None})
        if task["protocol"] != to_json(evaluator.describe()):
            return False
        entry = task["models"].get(model.name, {"identity": None})
        return entry["identity"] == identity(model) and entry.get("dtype", "float32") == dtype_name(model)

    def add(self, key: str, evaluator: Evaluator, model: ModelAdapter, result: EvaluationResult) -> None:
        """Adds a result and saves the file. Results of another protocol under the same key are dropped, because they
        are not comparable."""
        protocol = to_json(evaluator.describe())
        task = self.content["tasks"].get(key)
        if task is None or task["protocol"] != protocol:
            task = self.content["tasks"][key] = {"protocol": protocol, "models": {}}
        task["models"][model.name] = {
            "kind": type(model).__name__,
            "identity": identity(model),
            "dtype": dtype_name(model),
            "metrics": result.metrics,
            "num_samples": result.num_samples,
            "seconds": round(result.seconds, 1),
            "command": self.content["command"],
            "environment": self.content["environment"],
        }
        if untrained := model.untrained:
            task["models"][model.name]["random weights"] = untrained
        self.save()

    def save(self) -> None:
        write_atomically(self.path, json.dumps(self.content, indent=1, allow_nan=False) + "\n")

    def markdown(self) -> str:
        """Returns a table with the models in columns, without metrics of single classes. If the paper reports a metric
        and the whole dataset was evaluated, the table contains the result of the paper's SAM-CLIP, and the difference
        from it for each SAM-CLIP."""
        tasks = self.content["tasks"]
        names = list(dict.fromkeys(name for task in tasks.values() for name in task["models"]))
        untrained = {
            name: entry["random weights"]
            for task in tasks.values()
            for name, entry in task["models"].items()
            if "random weights" in entry
        }
        kinds = {name: entry["kind"] for task in tasks.values() for name, entry in task["models"].items()}
        samclips = [name for name in names if kinds[name] == SamClipAdapter.__name__]
        has_paper = any(key.partition("@")[0] in PAPER_RESULTS for key in tasks)
        header = ["task", "metric", *(f"{name} (random weights)" if name in untrained else name for name in names)]
        if has_paper:
            header += ["paper's SAM-CLIP", *(f"{name} - paper" for name in samclips)]
        lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
        for key, task in tasks.items():
            for metric in dict.fromkeys(metric for entry in task["models"].values() for metric in entry["metrics"]):
                if metric.startswith(PER_CLASS_PREFIX):
                    continue
                values = {name: task["models"].get(name, {}).get("metrics", {}).get(metric) for name in names}
                row = [key, metric, *(format_metric(value) for value in values.values())]
                if has_paper:
                    is_whole = "only" not in task["protocol"]
                    paper = PAPER_RESULTS.get(key.partition("@")[0], {}).get(metric) if is_whole else None
                    row.append("" if paper is None else f"{paper['value']:.3f} (table {paper['table']})")
                    row += [
                        "" if paper is None or values[name] is None else f"{values[name] - paper['value']:+.3f}"
                        for name in samclips
                    ]
                lines.append("| " + " | ".join(row) + " |")
        lines += [f"\nRandom weights: {name} has untrained {', '.join(parts)}." for name, parts in untrained.items()]
        return "\n".join(lines) + "\n"

    def protocols(self) -> str:
        """Returns the protocol of each task, as Markdown."""
        sections = []
        for key, task in self.content["tasks"].items():
            lines = [
                f"- {name}: {textwrap.shorten(str(value), 400, placeholder=' ...')}"
                for name, value in task["protocol"].items()
                if name != "categories"
            ]
            counts = {entry["num_samples"] for entry in task["models"].values()}
            lines.append(f"- evaluated images: {', '.join(map(str, sorted(counts)))}")
            sections.append(f"**{key}**\n\n" + "\n".join(lines))
        return "\n\n".join(sections) + "\n"


def read_results(path: Path) -> dict[str, Any]:
    """Reads `results.json`. Older files have "figures" instead of "metrics", and other names of adapters."""
    content = json.loads(path.read_text())
    for task in content["tasks"].values():
        for entry in task["models"].values():
            if "figures" in entry:
                entry["metrics"] = entry.pop("figures")
                entry["kind"] += "Adapter"
    return content


def format_metric(value: float | None) -> str:
    """Formats a value with three decimals, or without decimals from 100 on."""
    if value is None:
        return ""
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"


def to_json(value: Any) -> Any:
    """Returns a value as it is after it has been written to a JSON file and read again."""
    return json.loads(json.dumps(value, default=str))


def identity(model: ModelAdapter) -> str:
    """Returns a hash of the Hub's commit, or of a folder's configuration files and the sizes and times of its weight
    files."""
    parts = []
    for part in model.models:
        folder = Path(part.name_or_path)
        if folder.is_dir():
            files = sorted(folder.glob("*.safetensors"))
            parts += [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
            # The files, not the loaded configuration, whose defaults change with the version of transformers.
            parts += [(folder / name).read_text() for name in MODEL_FILES if (folder / name).is_file()]
        else:
            parts.append(f"{part.name_or_path}@{part.config._commit_hash}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def dtype_name(model: ModelAdapter) -> str:
    """Returns the type of a model's parameters, such as "float32"."""
    return str(model.models[0].dtype).removeprefix("torch.")


def device_name() -> str:
    """Returns the name of the GPU or CPU."""
    device = PartialState().device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def environment() -> dict[str, str]:
    """Returns the installed versions, the device and, in a clone, the commit."""
    versions = {name: metadata.version(name) for name in PACKAGES if _is_installed(name)}
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {"python": platform.python_version(), **versions, "device": device_name()} | (
        {"commit": commit} if commit else {}
    )


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def create_model_index(results: dict[str, Any], name: str) -> list[EvalResult]:
    """
    Returns a model's results for the metadata of its card, `ModelCardData(eval_results=...)`.

    Args:
        results (`dict`):
            The content of `results.json`, see [`read_results`].
        name (`str`):
            The model's name in the results.
    """
    entries = []
    for key, task in results["tasks"].items():
        protocol, _, data = key.partition(":")
        if name not in task["models"] or protocol == "cost":
            continue
        entry = task["models"][name]
        for metric, value in entry["metrics"].items():
            if value is not None and not metric.startswith(PER_CLASS_PREFIX):
                entries.append(
                    EvalResult(
                        task_type=TASK_TYPES.get(protocol, "image-segmentation"),
                        task_name=protocol,
                        dataset_type=data,
                        dataset_name=data,
                        metric_type=metric,
                        metric_name=metric + (" (random weights)" if "random weights" in entry else ""),
                        metric_value=round(value, 4),
                    )
                )
    return entries


def save_result_panel(evaluator: SampleEvaluator, model: ModelAdapter, result: EvaluationResult, path: Path) -> None:
    """Saves a panel of the best, the median and the worst sample, see [`SampleEvaluator.visualize`]."""
    wanted = set(result.extremes.values())
    samples = {}
    for index, sample in enumerate(evaluator.data.samples):
        if index in wanted:
            samples[index] = sample
        if len(samples) == len(wanted):
            break
    rows = []
    for rank, index in result.extremes.items():
        (caption, image), *others = evaluator.visualize(model, samples[index])
        rows.append([(f"{rank}: {samples[index].key}\n{caption}", image), *others])
    metric, value = next(iter(result.metrics.items()))
    name = f"{model.name} (random weights)" if model.untrained else model.name
    save_panel(path, rows, f"{evaluator.name}:{evaluator.data.name}, {name}: {metric} {format_metric(value)}")
