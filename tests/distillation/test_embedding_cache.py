"""The embedding cache: its embeddings are those that the teacher computes during training."""

import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor

from samclip_cli import CommandError
from samclip_cli.embed import run as embed
from samclip_hf.datasets.streams import open_stream
from samclip_hf.distillation import ClipTeacher, DataError, EmbeddingCache, embedding_cache
from samclip_hf.distillation.embedding_cache import shard_path

from ..datasets.tars import jpeg, write_tar


@pytest.fixture
def arguments(teacher_folders, photos, tmp_path):
    """Arguments of `samclip embed` for the tiny teacher and three tars of four images."""
    names = ["--clip_teacher", teacher_folders["clip"], "--clip_data", photos, "--output_dir", tmp_path / "cache"]
    return [str(argument) for argument in [*names, "--num_crops", 2, "--batch_size", 6, "--use_cpu"]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_cached_embeddings_are_those_of_the_crops_of_the_training(
    arguments, clip_teacher, tmp_path, make_trainer, num_workers
):
    embed([*arguments, "--num_workers", str(num_workers)])
    settings = {"stage": 1, "clip_batch_size": 4, "clip_resolutions": [32], "eval_fraction": 0.2}
    online = make_trainer(**settings)
    cached = make_trainer(**settings, clip_teacher=EmbeddingCache(tmp_path / "cache"))
    steps = zip(online.get_train_dataloader(), cached.get_train_dataloader(), strict=True)
    for _, (first, second) in zip(range(3), steps, strict=False):  # no reader starts a third epoch
        assert torch.equal(first["clip"]["images"], second["clip"]["images"])
        expected = torch.nn.functional.normalize(clip_teacher(first["clip"]["teacher_images"]), dim=-1)
        torch.testing.assert_close(second["clip"]["teacher_embeds"], expected, atol=1e-3, rtol=0)
        losses = [t.clip_loss(t.model, **s["clip"]).item() for t, s in ((online, first), (cached, second))]
        assert losses[1] == pytest.approx(losses[0], abs=1e-3)


@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
def test_the_teachers_images_are_resized_as_its_image_processor_does(
    arguments, teacher_folders, make_trainer, tmp_path, resample
):
    folder = tmp_path / "teacher"
    shutil.copytree(teacher_folders["clip"], folder)
    CLIPImageProcessor.from_pretrained(folder, resample=resample).save_pretrained(folder)
    pixels = np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    write_tar(tmp_path / "0.tar", {"0.png": buffer.getvalue()})
    # The crop is the whole image, which may be flipped.
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

    embed([*arguments, "--clip_teacher", str(folder), "--clip_data", str(tmp_path / "0.tar")])
    assert EmbeddingCache(tmp_path / "cache").description.resample == resample


def test_training_with_a_cache_does_not_run_the_teacher(arguments, make_trainer, tmp_path, monkeypatch):
    embed(arguments)
    monkeypatch.setattr(ClipTeacher, "forward", None)
    for stage in (1, 2, 3):
        trainer = make_trainer(stage, clip_teacher=EmbeddingCache(tmp_path / "cache"), max_steps=2)
        trainer.train()
        losses = [entry["clip_loss"] for entry in trainer.state.log_history if "clip_loss" in entry]
        assert np.isfinite(losses).all() and len(losses) == 2


@pytest.fixture
def region_arguments(teacher_folders, sa1b, tmp_path):
    """Arguments of `samclip embed` for the regions of the tiny tars with masks."""
    names = ["--clip_teacher", teacher_folders["clip"], "--sam_teacher", teacher_folders["sam"], "--sam_data", sa1b]
    names += ["--output_dir", tmp_path / "regions", "--regions_per_image", 2, "--num_crops", 2, "--batch_size", 3]
    return [str(argument) for argument in [*names, "--use_cpu"]]


@pytest.fixture
def region_settings(sa1b):
    """Arguments of `make_trainer` for a training with the region loss."""
    return {
        "clip_batch_size": 4,
        "sam_data": [str(sa1b)],
        "sam_batch_size": 2,
        "masks_per_image": 3,
        "regions_per_image": 2,
        "region_loss_weight": 1.0,
        "dense_loss_weight": 1.0,
    }


@pytest.mark.parametrize("stage", [2, 3])
def test_cached_regions_are_those_of_the_training(region_arguments, region_settings, make_trainer, tmp_path, stage):
    embed(region_arguments)
    online = make_trainer(stage, **region_settings)
    cached = make_trainer(stage, **region_settings, region_embedding_cache=str(tmp_path / "regions"))
    assert cached.region_teacher is None
    steps = zip(online.get_train_dataloader(), cached.get_train_dataloader(), strict=True)
    for _, (first, second) in zip(range(3), steps, strict=False):
        assert torch.equal(first["sam"]["region_masks"], second["sam"]["region_masks"])
        model = online.model.eval()
        if stage == 2:  # the prompts differ, but not the loss of a student that equals SAM
            first["sam"] = {name: v for name, v in second["sam"].items() if name != "teacher_regions"}
        losses = [t.sam_loss(model, **s["sam"]).item() for t, s in ((online, first), (cached, second))]
        assert losses[1] == pytest.approx(losses[0], abs=1e-3) and losses[0] > 0.1


def test_training_with_both_caches_does_not_run_the_clip_teacher(
    arguments, region_arguments, region_settings, make_trainer, tmp_path, monkeypatch
):
    embed(arguments)
    embed(region_arguments)
    monkeypatch.setattr(ClipTeacher, "forward", None)
    caches = {
        "clip_teacher": EmbeddingCache(tmp_path / "cache"),
        "region_embedding_cache": str(tmp_path / "regions"),
    }
    for stage in (1, 2, 3):
        trainer = make_trainer(stage, **region_settings, **caches, max_steps=2)
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "region_dense_loss" in entry]
        assert np.isfinite([entry["region_dense_loss"] for entry in log]).all() and len(log) == 2


def test_a_cache_of_regions_that_does_not_match_the_training_raises(
    arguments, region_arguments, region_settings, make_trainer, tmp_path
):
    embed(region_arguments)
    cache = {"region_embedding_cache": str(tmp_path / "regions")}
    with pytest.raises(ValueError, match="with regions_per_image 2, but regions_per_image is 3"):
        make_trainer(3, **{**region_settings, "regions_per_image": 3}, **cache)
    with pytest.raises(ValueError, match="with region_image_size 64, but region_image_size is 32"):
        make_trainer(3, **region_settings, **cache, region_image_size=32)
    with pytest.raises(ValueError, match=r"of other data.* sam_data has"):
        make_trainer(3, **{**region_settings, "sam_data": 2 * region_settings["sam_data"]}, **cache)
    with pytest.raises(ValueError, match="The region loss needs the CLIP teacher"):
        embed(arguments)
        make_trainer(3, **region_settings, clip_teacher=EmbeddingCache(tmp_path / "cache"))
    with pytest.raises(ValueError, match="contains no embeddings of regions of sam_data"):
        make_trainer(3, **region_settings, region_embedding_cache=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="contains no embeddings of crops of clip_data"):
        EmbeddingCache(tmp_path / "regions")
    with pytest.raises(SystemExit, match="is an embedding cache with different values of"):
        embed([*arguments, "--output_dir", str(tmp_path / "regions")])


@pytest.mark.parametrize(
    "options, message",
    [
        (["--clip_data", "a", "--sam_data", "b"], "Pass only one of --clip_data and --sam_data"),
        (["--regions_per_image", "2"], "--regions_per_image has no effect without --sam_data"),
        (["--sam_data", "b", "--min_crop_scale", "0.5"], "--min_crop_scale has no effect without --clip_data"),
    ],
)
def test_options_of_the_other_kind_of_cache_raise(tmp_path, options, message):
    with pytest.raises(CommandError, match=message):
        embed([*options, "--output_dir", str(tmp_path / "cache")])


def test_the_folder_of_the_images_is_not_the_output(tmp_path):
    with pytest.raises(CommandError, match="contains the images: choose another folder"):
        embed(["--clip_data", str(tmp_path), "--output_dir", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_a_negative_number_of_workers_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        embed(["--num_workers", "-1", "--output_dir", str(tmp_path)])
    assert "must be an integer of 0 or more" in capsys.readouterr().err


def test_existing_shards_are_not_computed_again(arguments, tmp_path):
    embed(arguments)
    paths = [shard_path(tmp_path / "cache", 0, shard) for shard in range(3)]
    whole = [path.read_bytes() for path in paths]
    paths[1].unlink()
    paths[2].write_bytes(b"unchanged")
    with pytest.raises(ValueError, match=r"incomplete: 1 shards are missing, .*000001\.parquet"):
        EmbeddingCache(tmp_path / "cache")
    embed(arguments)
    assert [path.read_bytes() for path in paths] == [whole[0], whole[1], b"unchanged"]


def test_corrupt_images_are_counted_and_have_no_embedding(arguments, tmp_path, capsys):
    write_tar(tmp_path / "0.tar", {"0.jpg": jpeg(0), "1.jpg": b"not an image", "2.jpg": jpeg(2)})
    embed([*arguments, "--clip_data", str(tmp_path / "0.tar")])
    assert "3 images were read and 1 of them skipped, by cause: {'broken image': 1}" in capsys.readouterr().out
    stream = open_stream(str(tmp_path / "0.tar"))
    (stream,) = EmbeddingCache(tmp_path / "cache").attach([stream])
    embeds = [sample["embeds"] for _, sample in stream.read(0)]
    assert [np.isnan(e).all() for e in embeds] == [False, True, False] and embeds[0].shape == (2, 20)


def test_a_full_disk_keeps_complete_shards(arguments, tmp_path, monkeypatch):
    write = embedding_cache.pq.write_table

    def write_until_full(table, path):
        path.write_bytes(b"incomplete")
        if "000001" in path.name:
            raise OSError(28, "No space left on device")
        write(table, path)

    monkeypatch.setattr(embedding_cache.pq, "write_table", write_until_full)
    message = r"No space left on device: '.*/cache/00/000001.parquet'\nThe embeddings of complete shards are kept"
    with pytest.raises(SystemExit, match=message):
        embed(arguments)
    assert [path.name for path in (tmp_path / "cache" / "00").iterdir()] == ["000000.parquet"]


def test_a_cache_with_another_description_is_not_overwritten(arguments):
    embed(arguments)
    with pytest.raises(SystemExit, match=r"different values of seed, min_crop_scale\. Choose another folder"):
        embed([*arguments, "--seed", "1", "--min_crop_scale", "0.1"])


@pytest.mark.parametrize("content", ["", "[]", '{"teacher": "mine"}', '{"shards": 3}'])
@pytest.mark.parametrize("name", ["embedding_cache.json", "store.json"])
def test_a_description_of_another_program_is_not_overwritten(arguments, tmp_path, name, content):
    path = tmp_path / "cache" / name
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(SystemExit, match=rf"{name} is not a file of `samclip embed`. Choose another folder"):
        embed(arguments)
    assert [file.name for file in path.parent.iterdir()] == [name] and path.read_text() == content
    with pytest.raises(ValueError, match="is not a file of"):
        EmbeddingCache(path.parent)


def test_embeddings_without_a_description_are_not_used(arguments, tmp_path):
    embed(arguments)
    (tmp_path / "cache" / "embedding_cache.json").unlink()
    with pytest.raises(SystemExit, match="it is unknown what the embeddings in"):
        embed([*arguments, "--seed", "1"])


def test_a_cache_that_does_not_match_the_training_raises(arguments, model, photos, sa1b, tmp_path):
    embed(arguments)
    cache = EmbeddingCache(tmp_path / "cache")
    streams = [open_stream(str(photos))]
    cache.check(model, streams, 0.5, "miniature")
    with pytest.raises(ValueError, match=r"crops of clip_data with min_crop_scale 0\.5, but min_crop_scale is 0\.08"):
        cache.check(model, streams, 0.08, "miniature")
    with pytest.raises(ValueError, match=r"of other data.* has \[3\] shards, clip_data has \[1\]"):
        cache.check(model, [open_stream(str(sa1b))], 0.5, "miniature")
    with pytest.raises(ValueError, match=r"contains embeddings of clip.*, but clip_teacher is openai/other"):
        cache.check(model, streams, 0.5, "openai/other")
    description = tmp_path / "cache" / "embedding_cache.json"
    description.write_text(json.dumps(json.loads(description.read_text()) | {"text_space": [9.0] * 64}))
    with pytest.raises(ValueError, match="text tower is not the text tower of this CLIP teacher"):
        EmbeddingCache(tmp_path / "cache").check(model, streams, 0.5, "miniature")
    with pytest.raises(FileNotFoundError, match="is not an embedding cache"):
        EmbeddingCache(tmp_path)
    incomplete = {name: value for name, value in json.loads(description.read_text()).items() if name != "resample"}
    description.write_text(json.dumps(incomplete))
    with pytest.raises(ValueError, match="computed by an incompatible version"):
        EmbeddingCache(tmp_path / "cache")


def test_a_cache_of_an_earlier_release_is_read_with_a_warning(arguments, tmp_path, transformers_log):
    embed(arguments)
    path = tmp_path / "cache" / "embedding_cache.json"
    description = json.loads(path.read_text())
    description["min_crop"] = description.pop("min_crop_scale")
    path.with_name("store.json").write_text(json.dumps(description))
    path.unlink()
    assert "EXIF" not in transformers_log.text
    assert EmbeddingCache(tmp_path / "cache").description.min_crop_scale == 0.5
    assert "was computed by version 0.1, which did not apply the EXIF orientation" in transformers_log.text
    embed(arguments)  # does not write a second description
    assert not path.exists()


def test_data_that_changed_after_embedding_raise(arguments, tmp_path):
    write_tar(tmp_path / "0.tar", {"0.jpg": jpeg(0), "1.jpg": jpeg(1)})
    embed([*arguments, "--clip_data", str(tmp_path / "0.tar")])
    write_tar(tmp_path / "0.tar", {"0.jpg": jpeg(0), "other.jpg": jpeg(1)})
    stream = open_stream(str(tmp_path / "0.tar"))
    (stream,) = EmbeddingCache(tmp_path / "cache").attach([stream])
    with pytest.raises(DataError, match=r"Row 1 of .*but its stored embedding is that of another sample"):
        list(stream.read(0))


def test_an_image_folder_is_embedded_and_one_with_other_files_raises(arguments, model, tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(130):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(jpeg(number, size=(6, 4)))
    embed([*arguments, "--clip_data", str(tmp_path / "images")])
    cache = EmbeddingCache(tmp_path / "cache")
    (stream,) = cache.attach([open_stream(str(tmp_path / "images"))])
    assert [len(list(stream.read(shard))) for shard in range(stream.num_shards)] == [65, 65]
    (tmp_path / "images/0.jpg").rename(tmp_path / "images/other.jpg")
    with pytest.raises(ValueError, match=r"contains embeddings of other data"):
        cache.check(model, [open_stream(str(tmp_path / "images"))], 0.5, "miniature")


def test_an_unreadable_shard_is_not_written_and_retried_by_the_next_command(arguments, tmp_path):
    write_tar(tmp_path / "0.tar", {"0.jpg": jpeg(0), "1.jpg": jpeg(1)})
    whole = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(whole[: whole.index(b"1.jpg") + 600])
    command = [*arguments, "--clip_data", str(tmp_path / "0.tar")]
    with pytest.raises(SystemExit, match="1 shards could not be read completely"):
        embed(command)
    (tmp_path / "0.tar").write_bytes(whole)
    embed(command)
    stream = open_stream(str(tmp_path / "0.tar"))
    (stream,) = EmbeddingCache(tmp_path / "cache").attach([stream])
    assert len([sample["embeds"] for _, sample in stream.read(0)]) == 2
