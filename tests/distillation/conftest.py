"""Tiny teachers, and a trainer on tiny webdataset tars."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, CLIPImageProcessor, SamImageProcessor

from samclip_hf import SamClipImageProcessor, SamClipProcessor, miniature
from samclip_hf.distillation import ClipTeacher, SamClipTrainer, SamClipTrainingArguments, SamTeacher

from ..datasets.conftest import photos, sa1b  # noqa: F401  (pytest fixtures)


@pytest.fixture(scope="session")
def teacher_folders(tmp_path_factory, sam, clip) -> dict[str, Path]:
    """Folders of tiny teachers with their image processors."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("sam", "clip")}
    sam.save_pretrained(folders["sam"])
    size = {"height": 64, "width": 64}
    SamImageProcessor(size={"longest_edge": 64}, pad_size=size).save_pretrained(folders["sam"])
    clip.save_pretrained(folders["clip"])
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folders["clip"]
    )
    return folders


@pytest.fixture(scope="session")
def sam_teacher(teacher_folders) -> SamTeacher:
    return SamTeacher(str(teacher_folders["sam"]))


@pytest.fixture(scope="session")
def clip_teacher(teacher_folders) -> ClipTeacher:
    return ClipTeacher(str(teacher_folders["clip"]))


@pytest.fixture(scope="session")
def processor(teacher_folders) -> SamClipProcessor:
    tokenizer = AutoTokenizer.from_pretrained(miniature.clip_teacher())
    return SamClipProcessor(SamClipImageProcessor.from_pretrained(teacher_folders["sam"]), tokenizer)


@pytest.fixture
def make_trainer(model, clip_teacher, sam_teacher, processor, photos, sa1b, tmp_path):  # noqa: F811  (pytest fixtures)
    """Returns a function that makes a trainer on the tiny tars. Its arguments override the training arguments."""

    def make(
        stage: int = 2,
        student=model,
        clip_teacher=clip_teacher,
        sam_teacher=sam_teacher,
        trainer_class=SamClipTrainer,
        **arguments,
    ) -> SamClipTrainer:
        settings = {
            "output_dir": str(tmp_path / "run"),
            "clip_data": [str(photos)],
            "clip_resolutions": [32, 64],
            "clip_batch_size": 4,
            "shuffle_buffer": 4,
            "max_steps": 3,
            "learning_rate": 1e-3,
            "weight_decay": 0.0,
            "warmup_steps": 0,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
        }
        if stage == 2:
            settings |= {"sam_data": [str(sa1b)], "sam_batch_size": 2, "masks_per_image": 2}
        settings |= arguments
        passed = ("callbacks", "optimizers", "optimizer_cls_and_kwargs")
        of_trainer = {name: settings.pop(name) for name in passed if name in settings}
        args = SamClipTrainingArguments(stage=stage, **settings)
        return trainer_class(student, args, clip_teacher, sam_teacher, processing_class=processor, **of_trainer)

    return make
