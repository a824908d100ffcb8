"""Registration with transformers, and the check of its version."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from PIL import Image
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForZeroShotObjectDetection,
    AutoProcessor,
    pipeline,
)
from transformers.pipelines import PIPELINE_REGISTRY

import samclip_hf
from samclip_hf import (
    SamClipConfig,
    SamClipForImageSegmentation,
    SamClipImageSegmentationPipeline,
    SamClipVisionConfig,
    SamClipVisionModel,
    miniature,
)
from samclip_hf.configuration_samclip import MINIMUM_TRANSFORMERS_VERSION
from samclip_hf.miniature.scenes import render
from samclip_hf.publishing.repository import build_repository
from samclip_hf.registration import MODELS, TASK, register

HUB_FILES = sorted(Path(samclip_hf.__file__).parent.glob("*_samclip.py"))


def test_registering_again_changes_and_logs_nothing(transformers_log, capfd):
    before = {auto: auto._model_mapping[SamClipConfig] for auto in MODELS}
    for _ in range(2):
        register()
    assert {auto: auto._model_mapping[SamClipConfig] for auto in MODELS} == before == MODELS
    assert not transformers_log.records and capfd.readouterr() == ("", "")


def test_auto_classes_know_both_configurations():
    assert AutoModel._model_mapping[SamClipVisionConfig] is samclip_hf.SamClipVisionModel
    assert AutoBackbone._model_mapping[SamClipVisionConfig] is samclip_hf.SamClipBackbone
    assert type(AutoConfig.for_model("samclip_vision_model")) is SamClipVisionConfig
    assert type(AutoModelForZeroShotObjectDetection.from_pretrained(miniature.checkpoint())) is (
        samclip_hf.SamClipForObjectDetection
    )
    assert type(AutoProcessor.from_pretrained(miniature.checkpoint())) is samclip_hf.SamClipProcessor
    assert type(AutoImageProcessor.from_pretrained(miniature.checkpoint())).__name__.startswith(
        "SamClipImageProcessor"
    )
    assert PIPELINE_REGISTRY.check_task(TASK)[1]["impl"] is samclip_hf.SamClipImageSegmentationPipeline


def run(code: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)


def test_package_imports_without_torchvision():
    code = """
import importlib.metadata, importlib.util, sys
sys.modules["torchvision"] = None
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *args: None if name.startswith("torchvision") else find_spec(name, *args)
import transformers
from transformers.utils import is_torchvision_available
assert not is_torchvision_available()
from samclip_hf import SamClipProcessor, miniature
print(type(SamClipProcessor.from_pretrained(miniature.checkpoint()).image_processor).__name__)
"""
    finished = run(code)
    assert finished.stdout.strip() == "SamClipImageProcessorPil", finished.stderr


# Names that the Hub files import and transformers 4 does not have; the version check has to come first.
OLDER_VERSION = """
import sys
from transformers import AutoConfig, AutoModel, AutoProcessor
transformers = sys.modules["transformers"]  # importing the Auto classes replaces the module
transformers.__version__ = "4.57.1"
for name in ("PreTrainedConfig", "SamImageProcessorPil", "initialization"):
    vars(transformers).pop(name, None)
    transformers._class_to_module.pop(name, None)
"""
MESSAGE = (
    f"ImportError: SAM-CLIP needs transformers>={MINIMUM_TRANSFORMERS_VERSION}; version 4.57.1 is installed. "
    "pip install -U transformers"
)


def test_package_states_the_minimum_version():
    finished = run(OLDER_VERSION + "import samclip_hf")
    assert finished.stderr.strip().splitlines()[-1] == MESSAGE


@pytest.mark.parametrize("auto_class", ["AutoConfig", "AutoModel", "AutoProcessor"])
def test_published_code_states_the_minimum_version(auto_class, tmp_path):
    shutil.copytree(miniature.checkpoint(), tmp_path, dirs_exist_ok=True)
    for file in HUB_FILES:
        shutil.copy(file, tmp_path)
    model_map = {"AutoConfig": "configuration_samclip.SamClipConfig", "AutoModel": "modeling_samclip.SamClipModel"}
    processor_map = {"AutoProcessor": "processing_samclip.SamClipProcessor"}
    for name, auto_map in (("config.json", model_map), ("processor_config.json", processor_map)):
        content = json.loads((tmp_path / name).read_text()) | {"auto_map": auto_map}
        (tmp_path / name).write_text(json.dumps(content))
    code = f"""
sys.modules["samclip_hf"] = None  # not installed
{auto_class}.from_pretrained(sys.argv[1], trust_remote_code=True)
"""
    finished = run(OLDER_VERSION + code, str(tmp_path))
    assert finished.stderr.strip().splitlines()[-1] == MESSAGE


def test_installed_version_is_supported():
    installed = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    assert installed >= tuple(int(part) for part in MINIMUM_TRANSFORMERS_VERSION.split(".")[:2])


def test_private_names_of_transformers_are_imported_in_one_file():
    public = {"configuration_utils", "modeling_outputs", "activations", "utils", "processing_utils"}
    for file in HUB_FILES:
        if file.stem == "transformers_internals_samclip":
            continue
        for line in file.read_text().splitlines():
            if line.startswith("from transformers."):
                module = line.split()[1].removeprefix("transformers.")
                assert module in public, f"{file.name}: {line}"


class TestSavedAfterLoadingAPublishedCheckpoint:
    @pytest.fixture(scope="class")
    @classmethod
    def folders(cls, tmp_path_factory) -> dict[str, Path]:
        """A published checkpoint, and what is saved after loading it with this package."""
        folders = {name: tmp_path_factory.mktemp(name) for name in ("published", "saved", "vision", "pipeline")}
        build_repository(miniature.checkpoint(), folders["published"])
        SamClipForImageSegmentation.from_pretrained(folders["published"]).save_pretrained(folders["saved"])
        AutoProcessor.from_pretrained(folders["published"]).save_pretrained(folders["saved"])
        SamClipVisionModel.from_pretrained(folders["published"]).save_pretrained(folders["vision"])
        pipeline(TASK, model=str(folders["published"])).save_pretrained(folders["pipeline"])
        return folders

    def test_configurations_refer_to_code_that_is_there(self, folders):
        published = {path.name for path in folders["published"].iterdir()}
        assert {path.name for path in folders["saved"].iterdir()} == published - {"README.md"}
        for name in ("config.json", "processor_config.json"):
            saved, original = (json.loads((folders[kind] / name).read_text()) for kind in ("saved", "published"))
            assert saved == original and "auto_map" in saved
        for folder in folders.values():
            assert {path.name for path in HUB_FILES} <= {path.name for path in folder.iterdir()}

    def test_repositories_on_the_hub_are_replaced_by_the_copied_code(self, tmp_path):
        """transformers prefixes references with the repository that a configuration is loaded from."""
        config = SamClipConfig.from_dict(
            {
                "auto_map": {"AutoConfig": "me/x--configuration_samclip.SamClipConfig"},
                "custom_pipelines": {TASK: {"impl": "me/x--pipeline_samclip.SamClipImageSegmentationPipeline"}},
            }
        )
        config.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())
        assert saved["auto_map"] == {"AutoConfig": "configuration_samclip.SamClipConfig"}
        assert saved["custom_pipelines"] == {TASK: {"impl": "pipeline_samclip.SamClipImageSegmentationPipeline"}}

    def test_other_checkpoints_are_saved_without_code(self, tmp_path):
        SamClipConfig.from_pretrained(miniature.checkpoint()).save_pretrained(tmp_path)
        AutoProcessor.from_pretrained(miniature.checkpoint()).save_pretrained(tmp_path)
        assert not list(tmp_path.glob("*.py"))

    def test_the_package_loads_it_without_asking_whether_to_trust_code(self, folders, monkeypatch):
        questions: list[str] = []  # transformers continues without some of the files if nobody answers
        monkeypatch.setattr("builtins.input", lambda question="": questions.append(question) or "n")
        image = Image.fromarray(render(seed=0, index=8).image)
        labels = {"candidate_labels": ["red fuzzy shape"], "background": ["an empty scene"]}
        results = []
        for name in ("published", "saved", "pipeline"):
            segmenter = pipeline(TASK, model=str(folders[name]))
            assert type(segmenter) is SamClipImageSegmentationPipeline
            results.append([segment["score"] for segment in segmenter(image, **labels)])
        assert results[0] and results[0] == results[1] == results[2]
        for task in ("image-segmentation", "mask-generation", "zero-shot-image-classification"):
            pipeline(task, model=str(folders["pipeline"]))
        assert questions == []

    @pytest.mark.slow
    def test_it_works_without_the_package_and_so_does_what_that_saves(self, folders, tmp_path):
        """Saved by the code in a checkpoint, which finds only the files that its own imports name."""
        code = """
import sys
sys.modules["samclip_hf"] = None  # importing it raises
from pathlib import Path
from PIL import Image
from transformers import AutoModel, AutoProcessor, pipeline

*folders, vision, new = sys.argv[1:]
for folder in folders:
    for auto_class in (AutoModel, AutoProcessor):
        auto_class.from_pretrained(folder, trust_remote_code=True).save_pretrained(f"{new}/{Path(folder).name}")
    for name in (folder, f"{new}/{Path(folder).name}"):
        segmenter = pipeline("zero-shot-image-segmentation", model=name, trust_remote_code=True)
        assert segmenter(Image.new("RGB", (60, 40)), candidate_labels=["red shape"], subtask="semantic")
print(type(AutoModel.from_pretrained(vision, trust_remote_code=True)).__name__)
"""
        names = ("published", "saved", "pipeline", "vision")
        command = [sys.executable, "-c", code, *(str(folders[name]) for name in names), str(tmp_path / "new")]
        environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
        result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert result.returncode == 0, result.stderr
        assert result.stdout.splitlines()[-1] == "SamClipVisionModel"
        for folder in (tmp_path / "new").iterdir():
            assert {path.name for path in HUB_FILES} <= {path.name for path in folder.iterdir()}
            assert type(pipeline(TASK, model=str(folder))) is SamClipImageSegmentationPipeline
