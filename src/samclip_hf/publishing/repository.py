"""
The repository on the Hub: a folder that loads without this package, and its upload.

    resolve_target -> build_repository -> verify -> create_model_card -> push
"""

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, RepositoryNotFoundError

from .. import modeling_samclip, registration
from ..configuration_samclip import MINIMUM_TRANSFORMERS_VERSION
from ..files import write_atomically
from ..processing_samclip import SamClipProcessor
from ..segmentation_samclip import SamClipForImageSegmentation

HUB_FILES = "*_samclip.py"
AUTO_MAP = {
    "AutoConfig": "configuration_samclip.SamClipConfig",
    # No Auto class reads this entry. It names the class for users who pass it to `get_class_from_dynamic_module`.
    "SamClipVisionConfig": "configuration_samclip.SamClipVisionConfig",
    **{
        auto_class.__name__: f"{model_class.__module__.rpartition('.')[2]}.{model_class.__name__}"
        for auto_class, model_class in registration.MODELS.items()
    },
}
PROCESSOR_AUTO_MAP = {
    "AutoImageProcessor": "image_processing_samclip.SamClipImageProcessor",
    "AutoProcessor": "processing_samclip.SamClipProcessor",
}


class PublishingError(Exception):
    """Raised when a checkpoint cannot be published. The repository on the Hub is unchanged."""


def build_repository(source: str | Path, folder: Path, dtype: str | None = None, max_shard_size: str = "5GB") -> None:
    """
    Saves a checkpoint with its processor and the model code.

    Args:
        source (`str` or `Path`): A SAM-CLIP checkpoint: a training output, a folder or a repository on the Hub.
        folder (`Path`): The new folder. It must be empty if it exists.
        dtype (`str`, *optional*): Data type of the saved weights, such as "bfloat16". Default: that of the source.
        max_shard_size (`str`): Maximum size of a weights file, as for `PreTrainedModel.save_pretrained`.

    Raises:
        PublishingError: If the source is not a SAM-CLIP with a processor, if weights are missing, if the folder is not
            empty, or if `max_shard_size` is invalid.
    """
    if folder.exists() and any(folder.iterdir()):
        raise PublishingError(f"{folder} is not empty. Use a new or empty folder.")
    try:
        model = modeling_samclip.load_complete_model(
            SamClipForImageSegmentation,
            source,
            dtype=getattr(torch, dtype) if dtype else "auto",
            use_safetensors=True,
        )
        processor = SamClipProcessor.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise PublishingError(f"{source} cannot be loaded as a SAM-CLIP with its processor: {error}") from error
    try:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    except ValueError as error:
        raise PublishingError(f"The weights cannot be saved in shards of {max_shard_size!r}: {error}") from error
    processor.save_pretrained(folder)
    add_code(folder)


def add_code(folder: Path) -> None:
    """
    Copies the model code into a checkpoint's folder, and writes `auto_map`, `custom_pipelines` and
    `minimum_transformers_version` to its configuration.

    `register_for_auto_class` is not used: it supports one Auto class per class, and it changes every later
    `save_pretrained` of the process.

    Args:
        folder (`Path`): A model saved with its processor.
    """
    for file in Path(modeling_samclip.__file__).parent.glob(HUB_FILES):
        write_atomically(folder / file.name, file.read_bytes())
    _update_json(
        folder / "config.json",
        auto_map=AUTO_MAP,
        custom_pipelines={
            registration.TASK: {
                "impl": "pipeline_samclip.SamClipImageSegmentationPipeline",
                "pt": ["AutoModelForImageSegmentation"],
                "type": "image",
            }
        },
        minimum_transformers_version=MINIMUM_TRANSFORMERS_VERSION,
    )
    image_processor = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    _update_json(
        folder / "processor_config.json",
        auto_map=PROCESSOR_AUTO_MAP,
        image_processor=image_processor | {"auto_map": PROCESSOR_AUTO_MAP},
    )


def _update_json(path: Path, **entries: Any) -> None:
    write_atomically(path, json.dumps(json.loads(path.read_text()) | entries, indent=2) + "\n")


def resolve_target(
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    update: bool = False,
    token: str | None = None,
) -> str:
    """
    Checks with the Hub that `push` with the same arguments is possible.

    Args:
        repo_id (`str`): "owner/name", or "name" for a repository of the token's owner.
        private (`bool`): Whether a new repository is private.
        revision (`str`, *optional*): Branch to commit to. It is created if it does not exist.
        create_pr (`bool`): Whether to open a pull request instead.
        update (`bool`): Whether to commit to an existing repository that is not empty.
        token (`str`, *optional*): Access token. Default: the one that is logged in, or `HF_TOKEN`.

    Returns:
        `str`: The repository as "owner/name".

    Raises:
        PublishingError: If there is no token, if the token has no write access, or if the repository exists and none
            of `revision`, `create_pr` and `update` is set.
    """
    api = HfApi(token=token)
    try:
        user = api.whoami()
    except LocalTokenNotFoundError as error:
        raise PublishingError("No token found. Log in with `hf auth login`, or set HF_TOKEN.") from error
    except HfHubHTTPError as error:
        raise PublishingError(f"The Hub rejects the token: {error}") from error
    except Exception as error:  # HTTP clients raise many types for connection errors
        raise PublishingError(f"The Hub cannot be reached: {error}") from error
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise PublishingError(
            f"The token of {user['name']} is read-only. Create one with write access at hf.co/settings/tokens."
        )
    owner, _, name = repo_id.rpartition("/")
    owner = owner or user["name"]
    roles = {org["name"]: org.get("roleInOrg") for org in user.get("orgs", [])}
    if owner != user["name"] and not create_pr:  # pull requests need no membership
        if owner not in roles:
            raise PublishingError(
                f"{user['name']} is not a member of {owner}. Use another owner, or open a pull request with "
                "--create_pr."
            )
        if roles[owner] == "read":
            raise PublishingError(
                f"{user['name']} has read access only in {owner}. Ask for a role with write access, or open a pull "
                "request with --create_pr."
            )
    repo_id = f"{owner}/{name}"
    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        if create_pr:
            raise PublishingError(f"Cannot open a pull request: the repository {repo_id} does not exist.") from None
        return repo_id
    except (HfHubHTTPError, ValueError) as error:  # ValueError: not a valid repository name
        raise PublishingError(f"{repo_id} cannot be looked up: {error}") from error
    except Exception as error:  # HTTP clients raise many types for connection errors
        raise PublishingError(f"The Hub cannot be reached: {error}") from error
    if private and not info.private:
        raise PublishingError(f"{repo_id} exists and is public. Make it private in its settings first.")
    files = {file.rfilename for file in info.siblings or ()} - {".gitattributes"}
    if files and not (update or create_pr or revision):
        raise PublishingError(
            f"{repo_id} exists and contains {len(files)} files. Pass --update to add a commit, --revision to use a "
            "branch, --create_pr to open a pull request, or use another name."
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
    Uploads a folder in a single commit. Files that the repository already contains are not uploaded again.

    Args:
        folder (`Path`): The folder to upload. The other arguments are those of [`resolve_target`].

    Returns:
        `str`: URL of the commit or the pull request.

    Raises:
        PublishingError: If the upload is not possible or fails. The commit is the last request, so the repository is
            then unchanged. A second call uploads only the files that are still missing.
    """
    # The state of the Hub may have changed since the caller checked it.
    repo_id = resolve_target(repo_id, private, revision, create_pr, update, token)
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
    except Exception as error:  # HTTP clients raise many types for connection errors
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            raise PublishingError(
                f"The token has no write access to {repo_id}. A fine-grained token needs write permission for this "
                f"owner or repository (hf.co/settings/tokens): {error}"
            ) from error
        raise PublishingError(
            f"The upload to {repo_id} failed, and the repository is unchanged: {error}\n"
            "Run the same command again to upload the remaining files."
        ) from error
    return str(commit.pr_url or commit.commit_url)
