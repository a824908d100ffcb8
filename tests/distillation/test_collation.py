"""Crops, prompts and batches, and their assembly by processes and data loader workers."""

import dataclasses
import io
import json
import zipfile
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image
from PIL import Image as PILImage

from samclip_hf.datasets.streams import DataError, open_stream
from samclip_hf.distillation.collation import ClipBatches, SamBatches, StepLoader, StepStream
from samclip_hf.distillation.crops import random_crop_box

from ..datasets.tars import annotation, jpeg, photo, write_tar


def clip_batches(*names, batch_size=4, sizes=(16,), shuffle_buffer=4) -> ClipBatches:
    streams = [open_stream(str(name)) for name in names]
    return ClipBatches(
        streams,
        weights=[1.0] * len(streams),
        image_sizes=list(sizes),
        teacher_image_size=8,
        batch_size=batch_size,
        shuffle_buffer=shuffle_buffer,
        min_crop_scale=0.5,
    )


def sam_batches(name, masks_per_image=5) -> SamBatches:
    stream = open_stream(str(name), with_masks=True)
    return SamBatches(
        [stream],
        weights=[1.0],
        image_size=64,
        student_image_sizes=[64],
        batch_size=2,
        masks_per_image=masks_per_image,
        max_box_noise=2.0,
        shuffle_buffer=4,
    )


def step_loader(seed=0, num_workers=0, max_corrupt_fraction=1.0, num_readers=16, **tasks) -> StepLoader:
    stream = StepStream(tasks, seed=seed, num_readers=num_readers)
    return StepLoader(stream, max_corrupt_fraction, num_workers)


def test_student_and_teacher_get_the_same_crop(tmp_path):
    # Red is proportional to x, green to y.
    ramp = np.zeros((64, 64, 3), dtype=np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(64) * 4, np.arange(64)[:, None] * 4
    buffer = io.BytesIO()
    PILImage.fromarray(ramp).save(buffer, format="PNG")
    write_tar(tmp_path / "0.tar", {"0.png": buffer.getvalue()})
    batch = next(iter(step_loader(clip=clip_batches(tmp_path, batch_size=16, sizes=[32]))))["clip"]
    assert batch["images"].shape == (16, 3, 32, 32)
    assert batch["teacher_images"].shape == (16, 3, 8, 8)
    student, teacher = (batch[name].float().mean(dim=(2, 3)) for name in ("images", "teacher_images"))
    torch.testing.assert_close(student, teacher, atol=3.0, rtol=0)
    assert student[:, 0].std() > 3  # the crops differ


def test_crop_boxes_are_inside_the_image():
    rng = np.random.default_rng(0)
    for width, height in ((100, 80), (300, 20), (20, 300)):
        for _ in range(100):
            left, upper, right, lower = random_crop_box(width, height, 0.5, rng)
            assert 0 <= left < right <= width + 1e-9
            assert 0 <= upper < lower <= height + 1e-9


def test_prompts_are_inside_their_masks_and_masks_of_the_whole_image_are_skipped(sa1b):
    prompts = set()
    for step in islice(step_loader(sam=sam_batches(sa1b)), 8):
        batch = step["sam"]
        assert batch["content_sizes"].tolist() == [[43, 64]] * 2  # 60 x 40 resized to 64 x 43, padded at the bottom
        assert (batch["images"][:, :, 43:] == 0).all()
        if "input_points" in batch:
            prompts.add("point")
            assert batch["input_points"].shape == (2, 5, 1, 2)
            x, y = batch["input_points"].unbind(-1)
            x, y = x / 64 * 60, y / 43 * 40  # pixels of the original image
            small = (x >= 19.9) & (x < 30) & (y >= 4.9) & (y < 10)
            large = (x >= 9.9) & (x < 50) & (y >= 14.9) & (y < 35)
            assert (small | large).all()
        else:
            prompts.add("box")
            assert batch["input_boxes"].shape == (2, 5, 4)
            sides = batch["input_boxes"][..., 2:] - batch["input_boxes"][..., :2]
            assert sides[..., 0].max() < 64 - 8
    assert prompts == {"point", "box"}


def test_batches_at_higher_resolutions_have_fewer_images(photos):
    sizes = {}
    for step in islice(step_loader(clip=clip_batches(photos, batch_size=16, sizes=[16, 32])), 12):
        number, _, size, _ = step["clip"]["images"].shape
        sizes[size] = number
    assert sizes == {16: 16, 32: 4}


def test_batches_depend_on_the_seed_only(photos, sa1b):
    first, again, other = (
        next(iter(step_loader(seed=seed, clip=clip_batches(photos), sam=sam_batches(sa1b)))) for seed in (0, 0, 1)
    )
    for task, fields in (("clip", ("images",)), ("sam", ("images", *(f for f in first["sam"] if "input" in f)))):
        assert all(torch.equal(first[task][field], again[task][field]) for field in fields)
        assert any(f not in other[task] or not torch.equal(first[task][f], other[task][f]) for f in fields)


def test_the_crop_of_a_sample_does_not_depend_on_earlier_samples(tmp_path):
    write_tar(tmp_path / "0.tar", {f"{number}.jpg": jpeg(number) for number in range(12)})
    crops = []
    for buffer in (1, 12):
        loader = step_loader(clip=clip_batches(tmp_path, shuffle_buffer=buffer))
        images = torch.cat([step["clip"]["images"] for step in islice(loader, 3)])  # one epoch
        crops.append(sorted(image.float().mean().item() for image in images))
    assert crops[0] == crops[1]


def test_corrupt_images_are_skipped_and_counted_by_cause(tmp_path):
    files = {}
    for number in range(6):
        content = photo(number)["jpg"]
        content = {2: b"not an image", 4: content[: len(content) // 2]}.get(number, content)
        files[f"{number}.jpg"] = content
    write_tar(tmp_path / "0.tar", files)
    loader = step_loader(clip=clip_batches(tmp_path, batch_size=12))
    step = next(iter(loader))
    assert len(step["clip"]["images"]) == 8  # two epochs of the four valid images
    assert step["usable_fractions"] == {"clip": pytest.approx(8 / 12)}
    assert loader.state["skipped"] == {"broken image": 4}
    assert loader.state["seen"] == 12


def test_other_corrupt_files_are_skipped_and_counted_by_cause(tmp_path):
    mask = np.zeros((40, 60), bool)
    mask[10:30, 10:30] = True
    good = json.dumps({"annotations": [annotation(mask)]}).encode()
    files = {}
    for number in range(9):
        image, annotations = jpeg(number), {3: b'{"annotations": [', 4: b"[]", 5: b"{}"}.get(number, good)
        if number == 6:
            image = jpeg(number, size=(3000, 1))
        files[f"{number}.jpg"] = image
        if number != 7:
            files[f"{number}.json"] = annotations
        if number == 8:
            del files["8.jpg"]
    write_tar(tmp_path / "0.tar", files)
    (tmp_path / "1.tar").write_bytes(b"")
    write_tar(tmp_path / "2.tar", files)
    whole = (tmp_path / "2.tar").read_bytes()
    (tmp_path / "2.tar").write_bytes(whole[: whole.index(b"2.json") + 600])  # in the middle of a file

    loader = step_loader(sam=sam_batches(tmp_path), num_readers=1)  # reads one epoch after the other
    usable = Counter(step["usable_fractions"]["sam"] for step in islice(loader, 65))  # each has two samples
    # An epoch: nine samples of the first tar, three of them valid; the second tar, which counts as one sample; of the
    # third tar two valid samples, and the rest, which counts as one.
    assert loader.state["seen"] == 130 == 10 * (9 + 1 + 3)
    assert 2 * usable[1.0] + usable[0.5] == 10 * (3 + 2)
    assert loader.state["skipped"] == {
        "broken json": 10,
        "no annotations": 20,
        "no usable mask": 10,
        "mask and image differ in size": 10,
        "no image": 10,
        "unreadable shard": 20,
    }
    # Without masks, annotations are not read.
    loader = step_loader(clip=clip_batches(tmp_path, batch_size=40))
    next(iter(loader))
    assert loader.state["skipped"].keys() == {"no image", "unreadable shard"}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_batch_without_usable_samples_is_a_placeholder(tmp_path, num_workers):
    write_tar(tmp_path / "0.tar", {"0.jpg": b"not an image", "1.jpg": b"not an image either"})
    step = next(iter(step_loader(clip=clip_batches(tmp_path), num_workers=num_workers)))
    assert step["usable_fractions"] == {"clip": 0.0}
    assert step["clip"]["images"].shape == (1, 3, 16, 16)


@pytest.mark.parametrize("world_size, num_workers", [(1, 2), (2, 0), (2, 2)])
def test_processes_and_workers_together_make_the_batches_of_one_process(
    photos, sa1b, tmp_path, world_size, num_workers
):
    rows = {"image": [{"bytes": jpeg(n), "path": None} for n in range(9)]}
    Dataset.from_dict(rows, features=Features({"image": Image()})).to_parquet(tmp_path / "photos.parquet")
    tasks = {"clip": clip_batches(photos, tmp_path, batch_size=8, sizes=[16, 32]), "sam": sam_batches(sa1b)}
    alone = list(islice(step_loader(**tasks), 12))
    tasks["clip"].batch_size //= world_size
    tasks["sam"].batch_size //= world_size
    together = []
    for rank in range(world_size):
        stream = StepStream(tasks, seed=0, rank=rank, world_size=world_size)
        together.append(list(islice(StepLoader(stream, 1.0, num_workers), 12)))
    for number, step in enumerate(alone):
        for task in ("clip", "sam"):
            for field, values in step[task].items():
                parts = [process[number][task][field] for process in together]
                joined = torch.stack(parts, dim=1).flatten(0, 1)  # samples are dealt to the processes in turn
                assert torch.equal(joined, values)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 5, 9])
def test_a_loader_resumes_from_its_state(photos, sa1b, num_workers, stop):
    def loader():
        tasks = {"clip": clip_batches(photos, sa1b, sizes=[16, 32]), "sam": sam_batches(sa1b)}
        return step_loader(**tasks, num_workers=num_workers)

    whole = list(islice(loader(), 12))
    stopped, resumed = loader(), loader()
    list(islice(stopped, stop))
    resumed.load_state(json.loads(json.dumps(stopped.state)))
    for step, expected in zip(islice(resumed, 12 - stop), whole[stop:], strict=True):
        for task in ("clip", "sam"):
            assert step[task].keys() == expected[task].keys()
            assert all(torch.equal(step[task][field], values) for field, values in expected[task].items())


def test_workers_that_share_readers_are_logged(photos, caplog):
    StepLoader(StepStream({"clip": clip_batches(photos)}, seed=0, world_size=2), 1.0)
    assert "share the" not in caplog.text
    StepLoader(StepStream({"clip": clip_batches(photos)}, seed=0, world_size=3), 1.0)
    message = "3 data loader workers in all processes share the 2 readers of clip stream 0, which has 3 shards"
    assert message in caplog.text and "every shard is read 3 times" in caplog.text


def test_the_short_side_of_an_image_keeps_at_least_one_pixel(tmp_path):
    mask = np.ones((1, 3000), bool)
    mask[:, 1000:] = False
    files = {"0.jpg": jpeg(0, size=(3000, 1)), "0.json": json.dumps({"annotations": [annotation(mask)]}).encode()}
    write_tar(tmp_path / "0.tar", files)
    batch = next(iter(step_loader(sam=sam_batches(tmp_path))))["sam"]
    assert batch["content_sizes"].tolist() == [[1, 64]] * 2


def test_boxes_are_in_pixels_of_the_model_input(sa1b):
    task = dataclasses.replace(sam_batches(sa1b), max_box_noise=0.0)
    boxes = [step["sam"]["input_boxes"] for step in islice(step_loader(sam=task), 12) if "input_boxes" in step["sam"]]
    # x1, y1, x2, y2 of both masks in the original image of 60 x 40 px, which becomes 64 x 43 px.
    expected = torch.tensor([[20, 5, 29, 9], [10, 15, 49, 34]]) * torch.tensor([64 / 60, 43 / 40, 64 / 60, 43 / 40])
    found = torch.cat(boxes).flatten(0, 1).unique(dim=0)
    torch.testing.assert_close(found, expected.flip(0), rtol=0, atol=1e-4)


def test_micro_batches_of_an_optimizer_step_share_its_settings(photos, sa1b):
    tasks = {"clip": clip_batches(photos, batch_size=16, sizes=[16, 32, 48, 64]), "sam": sam_batches(sa1b)}
    stream = StepStream(tasks, seed=0, gradient_accumulation_steps=4)
    batches = list(islice(StepLoader(stream, 1.0), 32))
    settings = [(batch["clip"]["images"].shape[-1], "input_boxes" in batch["sam"]) for batch in batches]
    steps = [set(settings[start : start + 4]) for start in range(0, 32, 4)]
    assert all(len(step) == 1 for step in steps)
    assert len(set.union(*steps)) > 3


def test_too_many_corrupt_samples_raise(tmp_path, monkeypatch):
    monkeypatch.setattr(StepLoader, "MIN_SEEN", 10)
    write_tar(tmp_path / "0.tar", {"0.jpg": b"not an image", "1.jpg": jpeg(1), "2.jpg": jpeg(2), "3.jpg": jpeg(3)})
    message = r"3 of the last 12 samples of clip_data cannot be used, .* \(0\.2\) allows.*{'broken image': 3}"
    with pytest.raises(DataError, match=message):
        list(islice(step_loader(clip=clip_batches(tmp_path), max_corrupt_fraction=0.2), 9))
    assert len(list(islice(step_loader(clip=clip_batches(tmp_path), max_corrupt_fraction=0.25), 9))) == 9


def test_too_many_corrupt_samples_of_the_smaller_task_raise(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(StepLoader, "MIN_SEEN", 10)
    mask = np.zeros((40, 60), bool)
    mask[10:30, 10:30] = True
    good = json.dumps({"annotations": [annotation(mask)]}).encode()
    write_tar(tmp_path / "0.tar", {"0.jpg": jpeg(0), "0.json": b"{", "1.jpg": jpeg(1), "1.json": good})
    tasks = {"clip": clip_batches(photos, batch_size=64), "sam": sam_batches(tmp_path)}
    with pytest.raises(DataError, match="5 of the last 10 samples of sam_data cannot be used"):
        list(islice(step_loader(**tasks, max_corrupt_fraction=0.1), 9))


def test_data_without_usable_samples_raise_early(tmp_path):
    write_tar(tmp_path / "0.tar", {f"{number}.jpg": b"not an image" for number in range(5)})
    loader = step_loader(clip=clip_batches(tmp_path, batch_size=10), max_corrupt_fraction=0.1)
    with pytest.raises(DataError, match="50 of the last 50 samples of clip_data cannot be used"):
        list(islice(loader, 9))
    assert loader.state["micro_batches"] == 5


def test_images_in_a_zip_archive_are_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for number in range(4):
            archive.writestr(f"dog/{number}.jpg", jpeg(number))
    loader = step_loader(clip=clip_batches(tmp_path))
    assert next(iter(loader))["usable_fractions"] == {"clip": 1.0}
    assert loader.state["skipped"] == {}
