"""Stored embeddings teach what the teacher itself would."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor

from samclip_cli import embed
from samclip_hf.datasets.streams import open_stream
from samclip_hf.distillation import ClipTeacher, DataError, EmbeddingCache
from samclip_hf.distillation import embedding_cache as store
from samclip_hf.distillation.embedding_cache import shard_path

from ..datasets.tars import jpeg, write_tar

SCRIPT = Path(__file__).parents[2] / "training" / "cache_teacher.py"


@pytest.fixture(scope="module")
def cache_teacher():
    return embed.main


@pytest.fixture
def arguments(teacher_folders, photos, tmp_path):
    """Of the script, for the tiny teacher on three tars of four photographs."""
    names = ["--clip_teacher", teacher_folders["clip"], "--clip_data", photos, "--output_dir", tmp_path / "store"]
    return [str(word) for word in [*names, "--num_crops", 2, "--batch_size", 6, "--use_cpu"]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_stored_embeddings_are_the_teachers_of_the_crops_that_training_draws(
    cache_teacher,
    arguments,
    clip_teacher,
    tmp_path,
    make_trainer,
    num_workers,
):
    cache_teacher([*arguments, "--num_workers", str(num_workers)])
    settings = {"stage": 1, "clip_batch_size": 4, "clip_resolutions": [32], "eval_fraction": 0.2}
    online = make_trainer(**settings)
    stored = make_trainer(**settings, clip_teacher=EmbeddingCache(tmp_path / "store"))
    steps = zip(online.get_train_dataloader(), stored.get_train_dataloader(), strict=True)
    for _, (first, second) in zip(range(3), steps, strict=False):  # no lane begins a third pass
        assert torch.equal(first["clip"]["images"], second["clip"]["images"])
        expected = torch.nn.functional.normalize(clip_teacher(first["clip"]["teacher_images"]), dim=-1)
        torch.testing.assert_close(second["clip"]["teacher_embeds"], expected, atol=1e-3, rtol=0)
        losses = [t.clip_loss(t.model, **s["clip"]).item() for t, s in ((online, first), (stored, second))]
        assert losses[1] == pytest.approx(losses[0], abs=1e-3)


@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
def test_the_teachers_images_are_resized_as_its_image_processor_does(
    cache_teacher, arguments, teacher_folders, make_trainer, tmp_path, resample
):
    folder = tmp_path / "teacher"
    shutil.copytree(teacher_folders["clip"], folder)
    CLIPImageProcessor.from_pretrained(folder, resample=resample).save_pretrained(folder)
    pixels = np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    write_tar(tmp_path / "0.tar", {"0.png": buffer.getvalue()})
    # The crop is the whole square, flipped or not.
    settings = {
        "clip_data": [str(tmp_path / "0.tar")],
        "clip_batch_size": 1,
        "clip_resolutions": [32],
        "min_crop_scale": 1.0,
    }
    trainer = make_trainer(1, clip_teacher=ClipTeacher(str(folder)), eval_fraction=0.0, **settings)
    seen = next(iter(trainer.get_train_dataloader()))["clip"]["teacher_images"][0].permute(1, 2, 0).numpy()
    expected = np.asarray(Image.fromarray(pixels).resize((32, 32), resample))
    assert any(np.array_equal(seen, either) for either in (expected, expected[:, ::-1]))

    cache_teacher([*arguments, "--clip_teacher", str(folder), "--clip_data", str(tmp_path / "0.tar")])
    assert EmbeddingCache(tmp_path / "store").description.resample == resample


def test_training_from_a_store_never_runs_the_teacher(cache_teacher, arguments, make_trainer, tmp_path, monkeypatch):
    cache_teacher(arguments)
    monkeypatch.setattr(ClipTeacher, "forward", None)
    for stage in (1, 2, 3):
        trainer = make_trainer(stage, clip_teacher=EmbeddingCache(tmp_path / "store"), max_steps=6)
        trainer.train()
        losses = [entry["clip_loss"] for entry in trainer.state.log_history if "clip_loss" in entry]
        assert np.isfinite(losses).all() and len(losses) == 6


def test_what_is_there_is_not_computed_again(cache_teacher, arguments, tmp_path):
    cache_teacher(arguments)
    paths = [shard_path(tmp_path / "store", 0, shard) for shard in range(3)]
    whole = [path.read_bytes() for path in paths]
    paths[1].unlink()
    paths[2].write_bytes(b"left alone")
    with pytest.raises(ValueError, match=r"not finished: 1 shards are missing, .*000001\.parquet"):
        EmbeddingCache(tmp_path / "store")
    cache_teacher(arguments)
    assert [path.read_bytes() for path in paths] == [whole[0], whole[1], b"left alone"]


def test_what_cannot_be_used_is_counted_and_has_no_embedding(cache_teacher, arguments, tmp_path, capsys):
    write_tar(tmp_path / "0.tar", {"0.jpg": jpeg(0), "1.jpg": b"no picture", "2.jpg": jpeg(2)})
    cache_teacher([*arguments, "--clip_data", str(tmp_path / "0.tar")])
    assert "3 images embedded, 1 of which cannot be used, by cause: {'broken image': 1}" in capsys.readouterr().out
    stream = open_stream(str(tmp_path / "0.tar"))
    (stream,) = EmbeddingCache(tmp_path / "store").attach([stream])
    embeds = [sample["embeds"] for _, sample in stream.read(0)]
    assert [np.isnan(e).all() for e in embeds] == [False, True, False] and embeds[0].shape == (2, 20)


def test_a_full_disk_keeps_what_is_finished(cache_teacher, arguments, tmp_path, monkeypatch):
    write = store.pq.write_table

    def until_full(table, path):
        path.write_bytes(b"half of it")
        if path.name.startswith("000001"):
            raise OSError(28, "No space left on device")
        write(table, path)

    monkeypatch.setattr(store.pq, "write_table", until_full)
    with pytest.raises(SystemExit, match="No space left on device\nShards that were finished are kept"):
        cache_teacher(arguments)
    assert [path.name for path in (tmp_path / "store" / "00").iterdir()] == ["000000.parquet"]


def test_another_store_is_not_overwritten(cache_teacher, arguments):
    cache_teacher(arguments)
    with pytest.raises(SystemExit, match="holds a store with other seed, min_crop_scale: name another"):
        cache_teacher([*arguments, "--seed", "1", "--min_crop_scale", "0.1"])


def test_a_store_of_something_else_is_refused(cache_teacher, arguments, model, photos, sa1b, tmp_path):
    cache_teacher(arguments)
    store = EmbeddingCache(tmp_path / "store")
    streams = [open_stream(str(photos))]
    store.check(model, streams, 0.5, "miniature")
    with pytest.raises(ValueError, match=r"crops with min_crop_scale 0\.5, not 0\.08"):
        store.check(model, streams, 0.08, "miniature")
    with pytest.raises(ValueError, match=r"of other data: \[3\] shards where clip_data has \[1\]"):
        store.check(model, [open_stream(str(sa1b))], 0.5, "miniature")
    with pytest.raises(ValueError, match=r"holds embeddings of clip.*, and clip_teacher is openai/other"):
        store.check(model, streams, 0.5, "openai/other")
    description = tmp_path / "store" / "store.json"
    description.write_text(json.dumps(json.loads(description.read_text()) | {"text_space": [9.0] * 64}))
    with pytest.raises(ValueError, match="text tower is not this CLIP teacher's"):
        EmbeddingCache(tmp_path / "store").check(model, streams, 0.5, "miniature")
    with pytest.raises(FileNotFoundError, match="There is no store in"):
        EmbeddingCache(tmp_path)
    earlier = {name: value for name, value in json.loads(description.read_text()).items() if name != "resample"}
    description.write_text(json.dumps(earlier))
    with pytest.raises(ValueError, match=r"was made by another version of cache_teacher\.py"):
        EmbeddingCache(tmp_path / "store")


def test_data_that_changed_since_are_refused(cache_teacher, arguments, tmp_path):
    write_tar(tmp_path / "0.tar", {"0.jpg": jpeg(0), "1.jpg": jpeg(1)})
    cache_teacher([*arguments, "--clip_data", str(tmp_path / "0.tar")])
    write_tar(tmp_path / "0.tar", {"0.jpg": jpeg(0), "other.jpg": jpeg(1)})
    stream = open_stream(str(tmp_path / "0.tar"))
    (stream,) = EmbeddingCache(tmp_path / "store").attach([stream])
    with pytest.raises(DataError, match=r"Row 1 of .*is '0/other', but its stored embedding is of another sample"):
        list(stream.read(0))


def test_a_shard_that_cannot_be_read_is_tried_again_next_time(cache_teacher, arguments, tmp_path):
    write_tar(tmp_path / "0.tar", {"0.jpg": jpeg(0), "1.jpg": jpeg(1)})
    whole = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(whole[: whole.index(b"1.jpg") + 600])
    words = [*arguments, "--clip_data", str(tmp_path / "0.tar")]
    with pytest.raises(SystemExit, match="1 shards could not be read to their ends and were not stored"):
        cache_teacher(words)
    (tmp_path / "0.tar").write_bytes(whole)
    cache_teacher(words)
    stream = open_stream(str(tmp_path / "0.tar"))
    (stream,) = EmbeddingCache(tmp_path / "store").attach([stream])
    assert len([sample["embeds"] for _, sample in stream.read(0)]) == 2
