"""Images without annotations: `samclip masks` writes them, and the region loss trains on them."""

import subprocess
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from samclip_cli import main
from samclip_hf import miniature
from samclip_hf.datasets.streams import SkippedSampleError, open_stream
from samclip_hf.distillation.collation import SamBatches

from . import test_image_commands
from .test_image_commands import save
from .test_resume import run_until_killed

folder = test_image_commands.folder
pytest.importorskip("datasets", reason="needs the extra `train`")


@pytest.mark.slow
def test_masks_beside_the_images_train_the_region_loss(monkeypatch):
    save(*(f"photos/{number}.png" for number in range(10)))
    Image.new("RGB", (128, 128)).save("photos/black.png")
    command = ["masks", "photos", "--output", "photos", "--formats", "json"]
    run_until_killed(monkeypatch, "5", *command)
    assert len(list(Path("photos").glob("*.json"))) == 5
    assert main(command) == 0
    assert len(list(Path("photos").glob("*.json"))) == 11

    stream = open_stream("photos", with_masks=True)
    batches = SamBatches([stream], [1.0], 128, [128], 1, 4, 2.0, 1, regions_per_image=2, mask_size=64)
    skipped: Counter[str] = Counter()
    for _, sample in stream.read(0):
        try:
            arrays, _ = batches.regions(sample, 0, 0)
            assert arrays["region_masks"].any(axis=(1, 2)).all()
        except SkippedSampleError as error:
            assert "black" in sample["key"]
            skipped[str(error)] += 1
    assert skipped in ({}, {"no usable mask": 1})
    command = ["tar", "--sort=name", "--exclude=.samclip", "-cf", "sam_data.tar", "-C", "photos", "."]
    subprocess.run(command, check=True)
    in_tar = [sample for _, sample in open_stream("sam_data.tar", with_masks=True).read(0)]
    assert len(in_tar) == 11 and all(sample["image"] and sample["json"] for sample in in_tar)

    settings = {"max_steps": 2, "sam_batch_size": 3, "masks_per_image": 4, "regions_per_image": 2, "logging_steps": 1}
    settings |= {"clip_batch_size": 4, "max_corrupt_fraction": 0.5, "dataloader_num_workers": 0, "eval_fraction": 0}
    options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    options += ["--model", str(miniature.checkpoint()), "--clip_data", "photos", "--sam_data", "photos"]
    options += ["--region_loss_weight", "1", "--output_dir", "run", "--use_cpu", "true"]
    assert not main(["train", "miniature_stage3", *options])
    assert Path("run/model.safetensors").is_file()
