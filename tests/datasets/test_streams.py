import dataclasses
import io
import json
import zipfile
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

from samclip_hf.datasets import streams
from samclip_hf.datasets.streams import DataError, SkippedSampleError, decode_image, open_stream
from samclip_hf.distillation.collation import ClipBatches, SamBatches, StepLoader, StepStream
from samclip_hf.distillation.crops import random_crop

from .tars import annotation, jpeg, photo, write_tar


def clip_batches(*names, batch_size=4, sizes=(16,), shuffle_buffer=4) -> ClipBatches:
    opened = [open_stream(str(name)) for name in names]
    shares = [1.0] * len(opened)
    return ClipBatches(
        opened,
        shares,
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
        [1.0],
        image_size=64,
        student_sizes=[64],
        batch_size=2,
        masks_per_image=masks_per_image,
        max_box_noise=2.0,
        shuffle_buffer=4,
    )


def step_loader(seed=0, num_workers=0, max_corrupt_fraction=1.0, num_lanes=16, **tasks) -> StepLoader:
    stream = StepStream(tasks, seed=seed, num_lanes=num_lanes)
    return StepLoader(stream, max_corrupt_fraction, num_workers)


# ---- opening by name ----


def test_folders_globs_parquet_and_pictures_give_the_same_columns(photos, tmp_path):
    rows = {"image": [{"bytes": jpeg(0), "path": None}]}
    Dataset.from_dict(rows, features=Features({"image": Image()})).to_parquet(tmp_path / "photos.parquet")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "one.jpg").write_bytes(jpeg(0))
    for name in (photos, photos / "*.tar", tmp_path / "photos.parquet", pictures):
        row, sample = next(open_stream(str(name)).read(0))
        assert row == 0 and sample.keys() == {"key", "image", "json"} and sample["json"] is None
        assert decode_image(sample).size == (60, 40)


def test_equal_names_are_different_samples(tmp_path):
    for folder in ("cat", "dog"):
        (tmp_path / "photos" / folder).mkdir(parents=True)
        (tmp_path / "photos" / folder / "1.jpg").write_bytes(jpeg(0))
    rows = {"image": [{"bytes": jpeg(n), "path": "image.jpg"} for n in range(3)]}
    Dataset.from_dict(rows, features=Features({"image": Image()})).to_parquet(tmp_path / "photos.parquet")

    def keys(name):
        stream = open_stream(str(tmp_path / name))
        return sorted(sample["key"] for shard in range(stream.num_shards) for _, sample in stream.read(shard))

    assert keys("photos/*/*.jpg") == ["cat/1.jpg", "dog/1.jpg"]
    assert len(set(keys("photos.parquet"))) == 3


@pytest.mark.parametrize("name", ["/nowhere/photos", "./nowhere/*.tar", "nowhere/photos.tar"])
def test_a_missing_path_is_named_with_what_would_do(name):
    with pytest.raises(FileNotFoundError, match=r"No data at .*nowhere.*Pass a folder, a glob"):
        open_stream(name)


def test_data_of_the_wrong_kind_are_refused(photos, tmp_path):
    Dataset.from_dict({"words": ["a"]}, features=Features({"words": Value("string")})).to_parquet(
        tmp_path / "a.parquet"
    )
    with pytest.raises(ValueError, match="no image column"):
        open_stream(str(tmp_path))
    with pytest.raises(ValueError, match="no json files with SA-1B's annotations: its first samples, such as '0/000'"):
        open_stream(str(photos), with_masks=True)
    (tmp_path / "notes.txt").write_text("words")
    with pytest.raises(ValueError, match=r"the unsupported extension '\.txt'"):
        open_stream(str(tmp_path / "notes.txt"))
    (tmp_path / "text.tar").write_text("words")
    with pytest.raises(ValueError, match=r"text\.tar' could not be read"):
        open_stream(str(tmp_path / "text.tar"))
    (tmp_path / "above" / "empty").mkdir(parents=True)
    with pytest.raises((ValueError, FileNotFoundError), match="above"):
        open_stream(str(tmp_path / "above"))


def test_a_shard_goes_on_from_any_row(photos, tmp_path):
    rows = {"image": [{"bytes": jpeg(n), "path": None} for n in range(4)], "__key__": list("abcd")}
    features = Features({"image": Image(), "__key__": Value("string")})
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "photos.parquet")
    for name in (photos, tmp_path):
        stream = open_stream(str(name))
        whole = list(stream.read(0))
        assert [row for row, _ in whole] == [0, 1, 2, 3]
        for start in range(5):
            assert list(stream.read(0, start)) == whole[start:]


def test_the_same_share_of_the_tars_is_drawn_every_time(tmp_path):
    for number in range(20):
        write_tar(tmp_path / f"{number:02d}.tar", {"0.jpg": jpeg(number)})
    few, again, more = (open_stream(str(tmp_path), shard_fraction=share) for share in (0.1, 0.1, 0.5))
    assert few.shards.names == again.shards.names and len(few.shards.names) == 2 and len(more.shards.names) == 10
    assert set(few.shards.names) < set(more.shards.names)
    with pytest.raises(ValueError, match="for tars only"):
        open_stream("miniature", shard_fraction=0.5)


def test_images_above_the_pixel_limit_are_not_decoded(monkeypatch):
    sample = {"image": {"bytes": jpeg(0), "path": None}}
    monkeypatch.setattr(streams, "MAX_PIXELS", 60 * 40 - 1)
    with pytest.raises(SkippedSampleError, match="image too large"):
        decode_image(sample)


# ---- samples ----


def test_student_and_teacher_see_the_same_crop(tmp_path):
    # A picture whose red says where across and whose green says where down.
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
    assert student[:, 0].std() > 3  # crops do differ


def test_crops_stay_in_the_image():
    rng = np.random.default_rng(0)
    for width, height in ((100, 80), (300, 20), (20, 300)):
        for _ in range(100):
            left, upper, right, lower = random_crop(width, height, 0.5, rng)
            assert 0 <= left < right <= width + 1e-9
            assert 0 <= upper < lower <= height + 1e-9


def test_prompts_lie_in_their_masks_and_never_in_one_of_the_whole_image(sa1b):
    kinds = set()
    for step in islice(step_loader(sam=sam_batches(sa1b)), 8):
        batch = step["sam"]
        assert batch["content_sizes"].tolist() == [[43, 64]] * 2  # 60 x 40 resized to 64 x 43, padded below
        assert (batch["images"][:, :, 43:] == 0).all()
        if "input_points" in batch:
            kinds.add("point")
            assert batch["input_points"].shape == (2, 5, 1, 2)
            x, y = batch["input_points"].unbind(-1)
            x, y = x / 64 * 60, y / 43 * 40  # back to the original
            small = (x >= 19.9) & (x < 30) & (y >= 4.9) & (y < 10)
            large = (x >= 9.9) & (x < 50) & (y >= 14.9) & (y < 35)
            assert (small | large).all()
        else:
            kinds.add("box")
            assert batch["input_boxes"].shape == (2, 5, 4)
            sides = batch["input_boxes"][..., 2:] - batch["input_boxes"][..., :2]
            assert sides[..., 0].max() < 64 - 8
    assert kinds == {"point", "box"}


def test_larger_images_come_in_smaller_batches(photos):
    sizes = {}
    for step in islice(step_loader(clip=clip_batches(photos, batch_size=16, sizes=[16, 32])), 12):
        number, _, size, _ = step["clip"]["images"].shape
        sizes[size] = number
    assert sizes == {16: 16, 32: 4}


def test_what_is_random_follows_from_the_seed(photos, sa1b):
    first, again, other = (
        next(iter(step_loader(seed=seed, clip=clip_batches(photos), sam=sam_batches(sa1b)))) for seed in (0, 0, 1)
    )
    for task, fields in (("clip", ("images",)), ("sam", ("images", *(f for f in first["sam"] if "input" in f)))):
        assert all(torch.equal(first[task][field], again[task][field]) for field in fields)
        assert any(f not in other[task] or not torch.equal(first[task][f], other[task][f]) for f in fields)


def test_a_samples_crop_does_not_depend_on_what_came_before(tmp_path):
    write_tar(tmp_path / "0.tar", {f"{number}.jpg": jpeg(number) for number in range(12)})
    crops = []
    for buffer in (1, 12):
        loader = step_loader(clip=clip_batches(tmp_path, shuffle_buffer=buffer))
        images = torch.cat([step["clip"]["images"] for step in islice(loader, 3)])  # one pass
        crops.append(sorted(image.float().mean().item() for image in images))
    assert crops[0] == crops[1]


def test_corrupt_pictures_are_counted_by_cause_and_passed_over(tmp_path):
    files = {}
    for number in range(6):
        content = photo(number)["jpg"]
        content = {2: b"no picture", 4: content[: len(content) // 2]}.get(number, content)
        files[f"{number}.jpg"] = content
    write_tar(tmp_path / "0.tar", files)
    loader = step_loader(clip=clip_batches(tmp_path, batch_size=12))
    step = next(iter(loader))
    assert len(step["clip"]["images"]) == 8  # two passes of the four good ones
    assert step["shares"] == {"clip": pytest.approx(8 / 12)}
    assert loader.state["skipped"] == {"broken image": 4}
    assert loader.state["seen"] == 12


def test_other_broken_files_are_counted_by_cause_and_passed_over_too(tmp_path):
    mask = np.zeros((40, 60), bool)
    mask[10:30, 10:30] = True
    good = json.dumps({"annotations": [annotation(mask)]}).encode()
    files = {}
    for number in range(9):
        picture, annotations = jpeg(number), {3: b'{"annotations": [', 4: b"[]", 5: b"{}"}.get(number, good)
        if number == 6:
            picture = jpeg(number, size=(3000, 1))
        files[f"{number}.jpg"] = picture
        if number != 7:
            files[f"{number}.json"] = annotations
        if number == 8:
            del files["8.jpg"]
    write_tar(tmp_path / "0.tar", files)
    (tmp_path / "1.tar").write_bytes(b"")
    write_tar(tmp_path / "2.tar", files)
    whole = (tmp_path / "2.tar").read_bytes()
    (tmp_path / "2.tar").write_bytes(whole[: whole.index(b"2.json") + 600])  # in the middle of a file

    loader = step_loader(sam=sam_batches(tmp_path), num_lanes=1)  # in which pass follows pass
    usable = Counter(step["shares"]["sam"] for step in islice(loader, 65))  # of two samples each
    # A pass: nine of the first tar, three good; the second, which is one; two good ones of the third; its rest.
    assert loader.state["seen"] == 130 == 10 * (9 + 1 + 3)
    assert 2 * usable[1.0] + usable[0.5] == 10 * (3 + 2)
    assert loader.state["skipped"] == {
        "broken json": 10,
        "no annotations": 30,
        "mask and image differ in size": 10,
        "no image": 10,
        "unreadable shard": 20,
    }
    # Pictures are all there is to see where masks are not asked for.
    loader = step_loader(clip=clip_batches(tmp_path, batch_size=40))
    next(iter(loader))
    assert loader.state["skipped"].keys() == {"no image", "unreadable shard"}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_batch_of_nothing_usable_has_no_share(tmp_path, num_workers):
    write_tar(tmp_path / "0.tar", {"0.jpg": b"no picture", "1.jpg": b"none either"})
    step = next(iter(step_loader(clip=clip_batches(tmp_path), num_workers=num_workers)))
    assert step["shares"] == {"clip": 0.0}
    assert step["clip"]["images"].shape == (1, 3, 16, 16)


@pytest.mark.parametrize("world_size, num_workers", [(1, 2), (2, 0), (2, 2)])
def test_processes_and_workers_share_the_batches_of_one(photos, sa1b, tmp_path, world_size, num_workers):
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
                shares = [process[number][task][field] for process in together]
                dealt = torch.stack(shares, dim=1).flatten(0, 1)  # one of each process in turn
                assert torch.equal(dealt, values)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 5, 9])
def test_a_loader_goes_on_from_its_state(photos, sa1b, num_workers, stop):
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


def test_processes_that_must_share_shards_are_told(photos, caplog):
    StepLoader(StepStream({"clip": clip_batches(photos)}, seed=0, world_size=2), 1.0)
    assert "share" not in caplog.text
    StepLoader(StepStream({"clip": clip_batches(photos)}, seed=0, world_size=3), 1.0)
    assert "3 readers (processes x workers) share the 2 lanes of clip stream 0, which has 3 shards" in caplog.text
    assert "read 3 times over" in caplog.text


def test_a_long_thin_picture_keeps_a_pixel_of_its_short_side(tmp_path):
    mask = np.ones((1, 3000), bool)
    mask[:, 1000:] = False
    files = {"0.jpg": jpeg(0, size=(3000, 1)), "0.json": json.dumps({"annotations": [annotation(mask)]}).encode()}
    write_tar(tmp_path / "0.tar", files)
    batch = next(iter(step_loader(sam=sam_batches(tmp_path))))["sam"]
    assert batch["content_sizes"].tolist() == [[1, 64]] * 2


def test_boxes_are_in_pixels_of_the_models_input(sa1b):
    task = dataclasses.replace(sam_batches(sa1b), max_box_noise=0.0)
    boxes = [step["sam"]["input_boxes"] for step in islice(step_loader(sam=task), 12) if "input_boxes" in step["sam"]]
    # x1, y1, x2, y2 of both masks in the original of 60 x 40, which becomes 64 x 43.
    expected = torch.tensor([[20, 5, 29, 9], [10, 15, 49, 34]]) * torch.tensor([64 / 60, 43 / 40, 64 / 60, 43 / 40])
    found = torch.cat(boxes).flatten(0, 1).unique(dim=0)
    torch.testing.assert_close(found, expected.flip(0), rtol=0, atol=1e-4)


def test_micro_batches_of_one_optimizer_step_share_its_rule(photos, sa1b):
    tasks = {"clip": clip_batches(photos, batch_size=16, sizes=[16, 32, 48, 64]), "sam": sam_batches(sa1b)}
    stream = StepStream(tasks, seed=0, gradient_accumulation_steps=4)
    items = list(islice(StepLoader(stream, 1.0), 32))
    rules = [(item["clip"]["images"].shape[-1], "input_boxes" in item["sam"]) for item in items]
    steps = [set(rules[start : start + 4]) for start in range(0, 32, 4)]
    assert all(len(step) == 1 for step in steps)
    assert len(set.union(*steps)) > 3


def test_too_many_samples_that_cannot_be_used_end_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr(StepLoader, "MIN_SEEN", 10)
    write_tar(tmp_path / "0.tar", {"0.jpg": b"no picture", "1.jpg": jpeg(1), "2.jpg": jpeg(2), "3.jpg": jpeg(3)})
    with pytest.raises(
        DataError,
        match=r"3 of the last 12 samples of clip_data could not be used\..* max_corrupt_fraction, 0\.2.*{'broken image': 3}",
    ):
        list(islice(step_loader(clip=clip_batches(tmp_path), max_corrupt_fraction=0.2), 9))
    assert len(list(islice(step_loader(clip=clip_batches(tmp_path), max_corrupt_fraction=0.25), 9))) == 9


def test_sam_data_that_cannot_be_used_end_the_training_however_few_they_are_beside_the_others(
    photos, tmp_path, monkeypatch
):
    monkeypatch.setattr(StepLoader, "MIN_SEEN", 10)
    mask = np.zeros((40, 60), bool)
    mask[10:30, 10:30] = True
    good = json.dumps({"annotations": [annotation(mask)]}).encode()
    write_tar(tmp_path / "0.tar", {"0.jpg": jpeg(0), "0.json": b"{", "1.jpg": jpeg(1), "1.json": good})
    tasks = {"clip": clip_batches(photos, batch_size=64), "sam": sam_batches(tmp_path)}
    with pytest.raises(DataError, match="5 of the last 10 samples of sam_data could not be used"):
        list(islice(step_loader(**tasks, max_corrupt_fraction=0.1), 9))


def test_data_of_which_nothing_can_be_used_end_the_training_early(tmp_path):
    write_tar(tmp_path / "0.tar", {f"{number}.jpg": b"no picture" for number in range(5)})
    loader = step_loader(clip=clip_batches(tmp_path, batch_size=10), max_corrupt_fraction=0.1)
    with pytest.raises(DataError, match="50 of the last 50 samples of clip_data could not be used"):
        list(islice(loader, 9))
    assert loader.state["item"] == 5


def test_pictures_in_an_archive_are_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for number in range(4):
            archive.writestr(f"dog/{number}.jpg", jpeg(number))
    loader = step_loader(clip=clip_batches(tmp_path))
    assert next(iter(loader))["shares"] == {"clip": 1.0}
    assert loader.state["skipped"] == {}


def test_masks_of_another_size_than_the_image_are_not_decoded(sa1b, monkeypatch):
    _, sample = next(open_stream(str(sa1b), with_masks=True).read(0))
    monkeypatch.setattr(streams, "decode_mask", lambda segmentation: pytest.fail("decoded"))
    with pytest.raises(SkippedSampleError, match="mask and image differ in size"):
        streams.draw_masks(sample, 2, np.random.default_rng(0), (60, 40))
