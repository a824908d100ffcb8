"""
From a training output to a repository on the Hub: a folder that loads anywhere, proven before anything is pushed.

    find_target -> build_repository -> verify -> card -> push
"""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalTokenNotFoundError, RepositoryNotFoundError
from PIL import Image
from safetensors.torch import load_file

from .. import miniature
from ..distillation import provenance
from ..processing_samclip import SamClipProcessor
from ..segmentation_samclip import SamClipForImageSegmentation
from .verification import MODELS, use

CODE = "*_samclip.py"  # the files that travel
MODULES = {
    "SamClipModel": "modeling_samclip",
    "SamClipForImageSegmentation": "segmentation_samclip",
    "SamClipForObjectDetection": "segmentation_samclip",
}
TEMPLATE = Path(__file__).with_name("model_card.md")
PERMISSIVE = {"apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0"}
UNDECIDED = "other"  # as the Hub names a licence that it does not know
EXAMPLE_SIZE = 1024  # pixels of the longer side: three panels of a telephone's 48 megapixels would be 200 MB
TOLERANCE = {
    torch.float32: 1e-4,
    torch.bfloat16: 0.1,
    torch.float16: 0.02,
}  # of outputs, relative to their largest value


class PublishingError(Exception):
    """Says what is wrong and what to do; nothing was pushed."""


def build_repository(source: str | Path, folder: Path, dtype: str | None = None, max_shard_size: str = "5GB") -> None:
    """
    Weights in safetensors, processor, and the code beside them.

    source (`str` or `Path`):
        A SAM-CLIP: a training output, a folder or a name.
    folder (`Path`):
        New or empty.
    dtype (`str`, *optional*):
        Of the weights, such as "bfloat16"; by default the source's.

    Raises `PublishingError` where the source is no SAM-CLIP with its processor, the folder is not empty, or the
    shards' size is none.
    """
    if folder.exists() and any(folder.iterdir()):
        raise PublishingError(f"{folder} is not empty: name a new folder, or empty it.")
    try:
        model, loading = SamClipForImageSegmentation.from_pretrained(
            source, dtype=getattr(torch, dtype) if dtype else "auto", use_safetensors=True, output_loading_info=True
        )
        processor = SamClipProcessor.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise PublishingError(f"{source} cannot be loaded as a SAM-CLIP with its processor: {error}") from error
    if loading["missing_keys"]:
        raise PublishingError(
            f"{source} lacks weights: {sorted(loading['missing_keys'])[:5]}. Nothing random is published."
        )
    try:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    except ValueError as error:
        raise PublishingError(f"The weights cannot be saved in shards of {max_shard_size!r}: {error}") from error
    processor.save_pretrained(folder)
    add_code(folder)


def add_code(folder: Path) -> None:
    """
    The model's own code, and an `auto_map` that leads every Auto class and pipeline to it, into a folder with a model
    and its processor. Written here by hand: `register_for_auto_class` knows one Auto class for each class, and would
    change the classes themselves.
    """
    for file in Path(__file__).parents[1].glob(CODE):
        shutil.copy(file, folder)
    processors = {
        "AutoImageProcessor": "image_processing_samclip.SamClipImageProcessor",
        "AutoProcessor": "processing_samclip.SamClipProcessor",
    }
    _edit(
        folder / "config.json",
        auto_map={"AutoConfig": "configuration_samclip.SamClipConfig"}
        | {auto_class: f"{MODULES[name]}.{name}" for auto_class, name in MODELS.items()},
        custom_pipelines={
            "zero-shot-image-segmentation": {
                "impl": "pipeline_samclip.SamClipImageSegmentationPipeline",
                "pt": ["AutoModelForImageSegmentation"],
                "type": "image",
            }
        },
    )
    image_processor = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    _edit(
        folder / "processor_config.json",
        auto_map=processors,
        image_processor=image_processor | {"auto_map": processors},
    )


def _edit(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries, indent=2) + "\n")


def verify(folder: Path, image: Image.Image) -> dict[str, float]:
    """
    Loads the folder in a fresh interpreter that cannot import this package, through every Auto class and pipeline,
    and compares with one that can.

    Returns the largest difference of each output of `AutoModel`, relative to the output's largest value. Raises
    `PublishingError` where something cannot be loaded or differs.
    """
    image = image.convert("RGB")
    with tempfile.TemporaryDirectory() as temporary:
        picture, results = Path(temporary, "picture.png"), Path(temporary, "results")
        image.save(picture)
        script = Path(__file__).with_name("verification.py")
        stranger = subprocess.Popen(
            [sys.executable, "-P", str(script), str(folder.absolute()), str(picture), str(results)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            own, own_tensors = use(str(folder.absolute()), image)
        except Exception as error:
            raise PublishingError(f"{folder} cannot be used with the package itself: {error!r}") from error
        finally:
            _, errors = stranger.communicate()
        if stranger.returncode:
            raise PublishingError(f"{folder} does not load without the package:\n{errors[-3000:]}")
        found = json.loads(results.with_suffix(".json").read_text())
        tensors = load_file(results.with_suffix(".safetensors"))
    expected = json.loads(json.dumps(own))
    for name, value in expected.items():
        if found.get(name) != value:
            raise PublishingError(
                f"{name} gives {found.get(name)} from the folder's code, {value} from the package's."
            )
    dtype = getattr(torch, str(json.loads((folder / "config.json").read_text())["dtype"]))
    differences = {}
    for name, value in own_tensors.items():
        difference = (tensors[name] - value).abs().max() / value.abs().max().clamp(min=1e-6)
        differences[name] = difference.item()
        if not difference <= TOLERANCE[dtype]:  # a NaN is not
            raise PublishingError(
                f"{name} differs by {difference:.3g} of its largest value between the folder's code and the package's."
            )
    return differences


# ---- The card ----


def card(
    folder: Path,
    repo_id: str,
    stages: Sequence[dict[str, Any]] = (),
    results: dict[str, Any] | None = None,
    results_name: str | None = None,
    licenses: dict[str, str] | None = None,
    has_picture: bool = False,
    license: str | None = None,
) -> ModelCard:
    """
    The template filled with what is on record, and with "not on record" where nothing is.

    folder (`Path`):
        From `build_repository`.
    stages (`Sequence[dict]`):
        From `distillation.provenance.read`.
    results (`dict`, *optional*), results_name (`str`, *optional*):
        `results.json` of an evaluation, and what it calls this model.
    licenses (`dict[str, str]`, *optional*):
        Of the teachers, by their names.
    has_picture (`bool`):
        Whether `example.png` is in the folder.
    license (`str`, *optional*):
        Of this model; by default apache-2.0 if all teachers' licences are on record and permissive, "other" if not.
    """
    config = json.loads((folder / "config.json").read_text())
    sources = provenance.teachers(stages)
    names = dict.fromkeys(name for _, name in sources)
    known = {(licenses or {}).get(name, UNDECIDED) for name in names}
    on_hub = [name for name in names if name.count("/") == 1 and not Path(name).exists()]
    evaluation: list[EvalResult] = []
    table, protocols = [], []
    measured: dict[str, dict[str, Any]] = {}  # by the command; results.json may hold several runs
    if results is not None:
        from ..evaluation.report import PER_CLASS, jsonable, model_index, shown

        results_name = check_name(results, results_name)
        evaluation = model_index(results, results_name)
        for key, task in results["tasks"].items():
            if results_name in task["models"]:
                of_model = task["models"][results_name]
                table += [
                    (key, figure, shown(value))
                    for figure, value in of_model["metrics"].items()
                    if value is not None and not figure.startswith(PER_CLASS)
                ]
                described = {k: v for k, v in jsonable(task["protocol"]).items() if k != "categories"}
                described |= {k: of_model[k] for k in ("dtype", "random weights") if k in of_model}
                measured[of_model.get("command", results["command"])] = of_model.get(
                    "environment", results["environment"]
                )
                protocols.append((key, described, of_model["num_samples"]))
    data = ModelCardData(
        license=license or ("apache-2.0" if known and known <= PERMISSIVE else UNDECIDED),
        library_name="transformers",
        pipeline_tag="image-segmentation",
        tags=["samclip", "segment-anything", "clip", "zero-shot-segmentation", "mask-generation", "distillation"],
        base_model=on_hub or None,
        base_model_relation="merge" if on_hub else None,
        model_name=repo_id.rpartition("/")[2] if evaluation else None,
        eval_results=evaluation or None,
    )
    parameters: dict[str, int] = {}
    for file in folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            part = name.partition(".")[0]
            parameters[part] = parameters.get(part, 0) + tensor.numel()
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        repo_id=repo_id,
        dtype=config["dtype"],
        parameters=parameters,
        image_size=config["vision_config"]["image_size"],
        stages=list(stages),
        teachers=[{"role": role, "name": name, "commit": commit} for (role, name), commit in sources.items()],
        only_drawn=bool(stages) and all(_data(stage) == {"miniature"} for stage in stages),
        licenses=licenses or {},
        table=table,
        protocols=protocols,
        measured=measured,
        labels=list(config.get("id2label", {}).values()) if config.get("vocabulary_label_ids") else [],
        has_text_tower=config["has_text_tower"],
        has_picture=has_picture,
    )


def publish_provenance(source: str | Path, folder: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """
    What is on record of `source`, as strangers may see it: of paths of this machine only the last part. Writes it into
    `folder`, which may be the same, if there is anything.

    Returns the stages, and by their teachers' names the licences that cards tell, on the Hub or in their folders.
    """
    stages = provenance.read(source)
    licenses = {_without_folders(name): found for _, name in provenance.teachers(stages) if (found := _license(name))}
    stages = _without_folders(stages)
    if stages:
        (folder / provenance.FILE_NAME).write_text(json.dumps({"stages": stages}, indent=2) + "\n")
    return stages, licenses


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_folders(part) for part in value]
    if value in (miniature.sam_teacher(), miniature.clip_teacher()):
        return "miniature"
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _license(name: str) -> str | None:
    if _without_folders(name) == "miniature":
        return "apache-2.0"  # this package's
    card = Path(name, "README.md")
    if Path(name).exists() and not card.is_file():
        return None
    try:
        return ModelCard.load(card if card.is_file() else name).data.get("license")
    except (OSError, ValueError, EntryNotFoundError):  # no card, no connection: the new card says that it is unknown
        return None


def _data(stage: dict[str, Any]) -> set[str]:
    return {*stage["arguments"]["clip_data"], *(stage["arguments"]["sam_data"] if stage["stage"] == 2 else ())}


def read_results(path: Path) -> dict[str, Any]:
    """`results.json` of an evaluation. Raises `PublishingError` where it is none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise PublishingError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict) or not {"tasks", "command", "environment"} <= content.keys():
        raise PublishingError(f"{path} is no results.json of training/evaluate.py.")
    return content


def check_name(results: dict[str, Any], name: str | None) -> str:
    """The name. Raises `PublishingError` where the results of an evaluation call no model so."""
    known = sorted({known for task in results["tasks"].values() for known in task["models"]})
    if name is None or name not in known:
        raise PublishingError(f"The results are of {', '.join(known)}: say by which of these names this model goes.")
    return name


def draw_example(folder: Path, image: Image.Image, path: Path) -> None:
    """The picture, its mask from the point in its middle and, with a vocabulary, its segments by text, side by
    side."""
    from ..visualization import with_labels, with_masks, with_prompts

    image = image.convert("RGB")
    image.thumbnail((EXAMPLE_SIZE, EXAMPLE_SIZE))
    pixels = np.asarray(image)
    model = SamClipForImageSegmentation.from_pretrained(folder).eval()
    processor = SamClipProcessor.from_pretrained(folder)
    point = [image.width / 2, image.height / 2]
    inputs = processor(image, input_points=[[[point]]])
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    with torch.inference_mode():
        masks, scores = model.predict_masks(
            model.get_image_embeddings(inputs["pixel_values"]), input_points=inputs["input_points"].to(model.dtype)
        )
        sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
        mask = processor.post_process_masks(masks.float(), *sizes)[0][0, scores[0, 0].argmax()]
        scale = -(-256 // max(image.size))  # letters need pixels
        pixels = enlarged(pixels, scale)
        drawn = with_masks(pixels, [enlarged(np.asarray(mask), scale)])
        panels = [pixels, with_prompts(drawn, points=np.array([point]) * scale)]
        if model.config.vocabulary_label_ids:
            outputs = model(inputs["pixel_values"], inputs["reshaped_input_sizes"])
            labels = processor.post_process_semantic_segmentation(outputs, [(image.height, image.width)])[0]
            names = list(model.config.id2label.values())
            has_background = model.config.background_label_id is not None
            panels.append(with_labels(pixels, enlarged(labels.numpy(), scale), names, has_background))
    Image.fromarray(np.concatenate(panels, axis=1)).save(path)


def enlarged(pixels: np.ndarray, scale: int) -> np.ndarray:
    """Every pixel of `(height, width, ...)` `scale` times as wide and high."""
    return pixels.repeat(scale, axis=0).repeat(scale, axis=1)


# ---- The Hub ----


def prepare_push(folder: Path, repo_id: str) -> None:
    """
    Adds the model code, the provenance and a model card to a training output, which then loads from the Hub without
    this package.

    Args:
        folder (`Path`): Output folder of the trainer, with a model and its processor.
        repo_id (`str`): Repository on the Hub that the card names.
    """
    add_code(folder)
    stages, licenses = publish_provenance(folder, folder)
    card(folder, repo_id, stages, licenses=licenses).save(folder / "README.md")


def find_target(
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    update: bool = False,
    token: str | None = None,
) -> str:
    """
    Asks the Hub whether `push` with the same arguments may go there, before any work is done for it.

    Returns the repository as "owner/name". Raises `PublishingError` with what is in the way: no token, one that may
    only read, another's organisation, a repository that exists.
    """
    api = HfApi(token=token)
    try:
        me = api.whoami()
    except LocalTokenNotFoundError as error:
        raise PublishingError("There is no token: log in by `hf auth login`, or set HF_TOKEN.") from error
    except HfHubHTTPError as error:
        raise PublishingError(f"The Hub does not accept the token: {error}") from error
    except Exception as error:  # connections break in many ways
        raise PublishingError(f"The Hub cannot be reached: {error}") from error
    if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise PublishingError(
            f"The token of {me['name']} may only read: make one that may write, at hf.co/settings/tokens."
        )
    owner, _, name = repo_id.rpartition("/")
    owner = owner or me["name"]
    roles = {org["name"]: org.get("roleInOrg") for org in me.get("orgs", [])}
    if owner != me["name"] and not create_pr:  # anyone may make a pull request
        if owner not in roles:
            raise PublishingError(
                f"{me['name']} is not of the organisation {owner}: name another owner, ask to be let in, or say "
                "--create-pr for a pull request."
            )
        if roles[owner] == "read":
            raise PublishingError(
                f"{me['name']} may only read in the organisation {owner}: ask for a role that may write, or say "
                "--create-pr for a pull request."
            )
    repo_id = f"{owner}/{name}"
    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        if create_pr:
            raise PublishingError(f"There is no repository {repo_id} that a pull request could go to.") from None
        return repo_id
    except (HfHubHTTPError, ValueError) as error:  # ValueError: no name for a repository
        raise PublishingError(f"{repo_id} cannot be looked up: {error}") from error
    except Exception as error:  # connections break in many ways
        raise PublishingError(f"The Hub cannot be reached: {error}") from error
    if private and not info.private:
        raise PublishingError(f"{repo_id} exists and is public: make it private in its settings first.")
    existing = {file.rfilename for file in info.siblings or ()} - {".gitattributes"}
    if existing and not (update or create_pr or revision):
        raise PublishingError(
            f"{repo_id} exists and holds {len(existing)} files: say --update for a new commit, --revision for a "
            "branch, --create-pr for a pull request, or name another repository."
        )
    return repo_id


def push(
    folder: Path,
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    update: bool = False,
    token: str | None = None,
) -> str:
    """
    One commit with all of the folder; files that the repository has already are not sent again.

    repo_id (`str`):
        "name", of the token's owner, or "owner/name".
    private (`bool`):
        For a new repository.
    revision (`str`, *optional*):
        A branch, made if there is none.
    create_pr (`bool`):
        As a pull request.
    update (`bool`):
        Needed where the repository exists and is not empty.

    Returns the commit's address. Raises `PublishingError`; until the commit, the last request, the repository shows
    nothing of it, and the next try goes on with what was sent.
    """
    # Asked here too: a caller may not have, and what was free before the proof may be taken after it.
    repo_id = find_target(repo_id, private, revision, create_pr, update, token)
    api = HfApi(token=token)
    try:
        if not create_pr:
            api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            create_pr=create_pr,
            commit_message="Upload SAM-CLIP",
        )
    except Exception as error:  # connections break in many ways
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            raise PublishingError(
                f"The token may not write to {repo_id}; a fine-grained one needs that permission for this owner or "
                f"repository (hf.co/settings/tokens): {error}"
            ) from error
        raise PublishingError(
            f"The upload to {repo_id} did not finish, and nothing of it is to be seen there: {error}\n"
            "The same command sends what is missing."
        ) from error
    return str(commit.pr_url or commit.commit_url)
