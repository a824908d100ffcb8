"""Results of evaluations: `results.json`, tables next to the paper's results, panels, and metadata for model cards."""

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
from ..identity import hash_json
from ..visualization import save_panel
from .adapters import ModelAdapter, SamClipAdapter, SamClipVisionAdapter
from .evaluator import EvaluationResult, Evaluator, SampleEvaluator

SAMCLIP_KINDS = {SamClipAdapter.__name__, SamClipVisionAdapter.__name__}
PER_CLASS_PREFIX = "iou: "  # of metrics of single classes, which are not in tables
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
    resumed. Results belong to weights and protocols: a task is stored under its own name unless the file has results
    of another protocol under it, a model under its own name unless the file has results of another model under it (see
    [`Results.locate`]). No result is replaced.

    folder (`Path`):
        The folder of `results.json`. Existing results are kept. Raises `ValueError` if the file has another format.
    command (`str`):
        The command line. It is stored with the installed versions, for the file and for each result.
    """

    def __init__(self, folder: Path, command: str):
        self.path = folder / "results.json"
        self.run = {"command": command, "environment": environment()}
        self.content: dict[str, Any] = {}
        self._read()

    def _read(self) -> None:
        content = read_results(self.path) if self.path.exists() else {"tasks": {}}
        self.content = content | self.run

    def locate(self, key: str, evaluator: Evaluator, model: ModelAdapter) -> tuple[str, str]:
        """
        Returns the names of task and model by which a result is stored, whether or not it exists.

        The task's name is `key`, or "key#hash" if the results of `key` have another protocol. The model's
        name is `model.name`, with the dtype if that is not float32, or "name@hash" if the results of this name are of
        other weights or another configuration.
        """
        tasks = self.content["tasks"]
        protocol = to_json(evaluator.describe())
        if key in tasks and tasks[key]["protocol"] != protocol:
            key = f"{key}#{hash_json(protocol)[:8]}"
        models = {
            name: (entry.get("identity"), entry.get("dtype", "float32"))
            for task in tasks.values()
            for name, entry in task["models"].items()
        }
        own = model.identity, dtype_name(model)
        name = model.name if own[1] == "float32" else f"{model.name} ({own[1]})"
        return key, name if models.get(name, own) == own else f"{name}@{model.identity[:8]}"

    def holds(self, key: str, evaluator: Evaluator, model: ModelAdapter) -> bool:
        """Returns whether there is a result of the same protocol for the same model."""
        key, name = self.locate(key, evaluator, model)
        return name in self.content["tasks"].get(key, {"models": {}})["models"]

    def add(self, key: str, evaluator: Evaluator, model: ModelAdapter, result: EvaluationResult) -> tuple[str, str]:
        """Adds a result and saves the file, with the results that other processes have saved in the meantime. Returns
        the names of task and model, see [`Results.locate`]."""
        self._read()
        key, name = self.locate(key, evaluator, model)
        task = self.content["tasks"].setdefault(key, {"protocol": to_json(evaluator.describe()), "models": {}})
        task["models"][name] = {
            "kind": type(model).__name__,
            "weights": model.weights,
            "identity": model.identity,
            "dtype": dtype_name(model),
            "settings": to_json(evaluator.describe_settings(model)),
            "metrics": result.metrics,
            "num_samples": result.num_samples,
            "seconds": round(result.seconds, 1),
            **self.run,
        }
        if untrained := model.untrained:
            task["models"][name]["random weights"] = untrained
        self.save()
        return key, name

    def save(self) -> None:
        write_atomically(self.path, json.dumps(self.content, indent=1, allow_nan=False) + "\n")

    def markdown(self) -> str:
        """
        Returns a table with the models in columns, without metrics of single classes. If the paper reports a metric,
        the table has the paper's SAM-CLIP and, for each SAM-CLIP that was evaluated as the paper's, the difference. If
        the paper does not state how it evaluated, there is no difference. If the evaluation differs from the paper's,
        or used a part of the data, the table does not have the paper's value.
        """
        tasks = self.content["tasks"]
        entries = [(name, entry) for task in tasks.values() for name, entry in task["models"].items()]
        names = list(dict.fromkeys(name for name, _ in entries))
        untrained = {name: entry["random weights"] for name, entry in entries if "random weights" in entry}
        kinds = {name: entry["kind"] for name, entry in entries}
        samclips = [name for name in names if kinds[name] in SAMCLIP_KINDS]
        rows = []
        for key, task in tasks.items():
            for metric in dict.fromkeys(metric for entry in task["models"].values() for metric in entry["metrics"]):
                if metric.startswith(PER_CLASS_PREFIX):
                    continue
                values = {name: entry["metrics"].get(metric) for name, entry in task["models"].items()}
                paper = {
                    name: found
                    for name, entry in task["models"].items()
                    if (found := paper_result(key, metric, task["protocol"] | entry.get("settings", {})))
                }
                rows.append((key, metric, values, paper))
        has_paper = any(paper for *_, paper in rows)
        header = ["task", "metric", *(f"{name} (random weights)" if name in untrained else name for name in names)]
        if has_paper:
            header += ["paper's SAM-CLIP", *(f"{name} - paper" for name in samclips)]
        lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
        for key, metric, values, paper in rows:
            row = [key, metric, *(format_metric(values.get(name)) for name in names)]
            if has_paper:
                row.append(next((f"{found['value']:.3f} (table {found['table']})" for found in paper.values()), ""))
                for name in samclips:
                    value, found = values.get(name), paper.get(name, {"where": None})
                    is_comparable = value is not None and found["where"] is not None
                    row.append(f"{value - found['value']:+.3f}" if is_comparable else "")
            lines.append("| " + " | ".join(row) + " |")
        lines += [f"\nRandom weights: {name} has untrained {', '.join(parts)}." for name, parts in untrained.items()]
        return "\n".join(lines) + "\n"

    def protocols(self) -> str:
        """Returns the models' weights, and the protocols of all tasks as lists, long values shortened."""
        models = {
            name: f"- {name}: {entry['kind']}, weights {entry.get('weights', 'not recorded (older version)')}, "
            f"{entry.get('dtype', 'float32')}"
            for task in self.content["tasks"].values()
            for name, entry in task["models"].items()
        }
        sections = ["**models**\n\n" + "\n".join(models.values())]
        for key, task in self.content["tasks"].items():
            lines = [
                f"- {name}: {textwrap.shorten(str(value), 200, placeholder=' ...')}"
                for name, value in task["protocol"].items()
                if name != "categories"
            ]
            lines += [
                f"- {name}, {setting}: {value}"
                for name, entry in task["models"].items()
                for setting, value in entry.get("settings", {}).items()
            ]
            counts = {entry["num_samples"] for entry in task["models"].values()}
            lines.append(f"- evaluated images: {', '.join(map(str, sorted(counts)))}")
            sections.append(f"**{key}**\n\n" + "\n".join(lines))
        return "\n\n".join(sections) + "\n"


def read_results(path: Path) -> dict[str, Any]:
    """
    Reads `results.json`. Older files have "figures" instead of "metrics", and other names of adapters; their entries
    have no hash of the weights.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not a `results.json` of `samclip evaluate`.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for task in content["tasks"].values():
            task["protocol"].keys()  # raises if it is not a dictionary
            for entry in task["models"].values():
                if "figures" in entry:
                    entry["metrics"] = entry.pop("figures")
                    entry["kind"] += "Adapter"
                entry["metrics"].keys()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a results.json of `samclip evaluate`.") from error
    return content


def results_of_model(results: dict[str, Any], name: str) -> dict[str, dict[str, Any]]:
    """
    Returns a model's entries of `results.json`, by task.

    Raises:
        ValueError: There are none, or they are of several weights, as older versions could write.
    """
    entries = {key: task["models"][name] for key, task in results["tasks"].items() if name in task["models"]}
    if not entries:
        known = sorted({known for task in results["tasks"].values() for known in task["models"]})
        raise ValueError(f"There are no results of {name!r}, but of {', '.join(known) or 'no model'}.")
    if len({entry.get("weights", entry.get("identity")) for entry in entries.values()}) > 1:
        raise ValueError(f"The results of {name!r} are of different weights. Evaluate it again in a new folder.")
    return entries


def paper_result(key: str, metric: str, protocol: dict[str, Any]) -> dict[str, Any] | None:
    """
    Returns the paper's result for a metric, if the protocol is the paper's: its "value", "table", and "where", the
    entries of the protocol that must be equal, or `None` if the paper does not state its own.

    Args:
        key (`str`):
            The name of a task.
        metric (`str`):
            The metric's name.
        protocol (`dict`):
            The task's protocol and the model's settings.
    """
    if "only" in protocol:  # a part of the data
        return None
    task = key.partition("#")[0].partition("@")[0]
    for result in PAPER_RESULTS.get(task, {}).get(metric, []):
        where = result["where"]
        if where is None or all(protocol.get(name) == value for name, value in where.items()):
            return result
    return None


def format_metric(value: float | None) -> str:
    """Formats a value with three decimals, or without decimals from 100 on."""
    if value is None:
        return ""
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"


def to_json(value: Any) -> Any:
    """Returns a value as it is after it has been written to a JSON file and read again."""
    return json.loads(json.dumps(value, default=str))


def dtype_name(model: ModelAdapter) -> str:
    """Returns the type of a model's parameters, such as "float32"."""
    return str(model.model.dtype).removeprefix("torch.")


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

    Raises:
        ValueError: As [`results_of_model`].
    """
    entries = []
    for key, entry in results_of_model(results, name).items():
        protocol, _, data = key.partition(":")
        if protocol == "cost":
            continue
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
