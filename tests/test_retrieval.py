"""Search of images and segments: the results are those of brute force over embeddings that the model computes one at a
time, an index is the same after interruptions, and wrong inputs are refused."""

import io
import json
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from samclip_cli import main
from samclip_cli.models import MINIATURE_NAME
from samclip_hf import SamClipForImageSegmentation, SamClipProcessor, miniature
from samclip_hf.images import decode_mask
from samclip_hf.miniature.scenes import CLASS_NAMES, render

from .cli import test_image_commands
from .cli.test_image_commands import samclip, save, scene
from .cli.test_resume import contents, run_process, run_until_killed
from .scripts import load_script

datasets = pytest.importorskip("datasets", reason="needs the extra `train`")
from samclip_hf import retrieval  # noqa: E402  # needs the extra `train`
from samclip_hf.retrieval import EmbeddingIndex, write_index  # noqa: E402

folder = test_image_commands.folder
TEACHERS = ["--sam", miniature.sam_teacher(), "--clip", miniature.clip_teacher()]
MODELS = {"merged": [], "unmerged": TEACHERS}
FEW_POINTS = ["--points_per_crop", "8"]
COMMAND = ["index", "photos", *FEW_POINTS, "--output", "out"]
NUM_SCENES = 4
BOX = [16, 56, 111, 108]


def save_photos() -> None:
    """Scenes, an image without segments, and a file that is no image."""
    Path("photos").mkdir()
    for number in range(NUM_SCENES):
        scene(8 + number).save(f"photos/{number}.png")
    Image.fromarray(render(seed=0, index=7).image).save("photos/empty.png")
    Path("photos/broken.png").write_bytes(b"no image")


@pytest.fixture(scope="module")
def indexes(tmp_path_factory):
    """The files of an index of each model."""
    found = {}
    for name, options in MODELS.items():
        with pytest.MonkeyPatch.context() as context:
            context.chdir(tmp_path_factory.mktemp(name))
            save_photos()
            assert main(["index", "photos", *options, *FEW_POINTS, "--output", "index"]) == 1
            found[name] = contents("index")
    return found


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


def restore(files: dict[str, bytes]) -> None:
    save_photos()
    for path, content in files.items():
        Path("index", path).parent.mkdir(parents=True, exist_ok=True)
        Path("index", path).write_bytes(content)


@pytest.fixture
def photos(folder, indexes):
    """The images, and the index of the merged model in `index`."""
    restore(indexes["merged"])
    return indexes["merged"]


@pytest.fixture(scope="module")
def models():
    teachers = miniature.sam_teacher(), miniature.clip_teacher()
    return {
        "merged": SamClipForImageSegmentation.from_pretrained(miniature.checkpoint()).eval(),
        "unmerged": SamClipForImageSegmentation.from_teachers(*teachers, merged=False).eval(),
    }


@pytest.fixture(scope="module")
def processor():
    return SamClipProcessor.from_teachers(miniature.sam_teacher(), miniature.clip_teacher())


def read_rows(tmp_path) -> list[dict]:
    """The rows of `index`, as `datasets` reads them."""
    cache = str(tmp_path / "cache")
    table = datasets.load_dataset("parquet", data_files="index/parquet/*.parquet", split="train", cache_dir=cache)
    return list(table)


@torch.inference_mode()
def embed_row(model, processor, row: dict) -> np.ndarray:
    """The embedding of one row by the model, `(projection_dim,)`."""
    inputs = processor(Image.open(row["source"]))
    inputs.pop("original_sizes")
    if row["kind"] == "image":
        return F.normalize(model.get_image_features(**inputs).pooler_output, dim=-1)[0].numpy()
    return model.embed_masks([decode_mask(row["segmentation"])[None]], **inputs)[0, 0].numpy()


def search(capsys, *arguments: str, status: int = 0) -> dict:
    assert main(["search", "index", "--json", *arguments]) == status
    return json.loads(capsys.readouterr().out)


def test_rows_are_those_of_everything_mode_and_of_the_model(capsys, tmp_path, indexes, models, processor, name):
    restore(indexes[name])
    rows = read_rows(tmp_path)
    assert [row["source"] for row in rows if row["kind"] == "image"] == [
        *(f"photos/{number}.png" for number in range(NUM_SCENES)),
        "photos/empty.png",
    ]
    expected, _ = samclip(capsys, "masks", "photos", *MODELS[name], *FEW_POINTS, status=1)
    masks = [(line["image"], mask) for line in expected for mask in line["masks"]]
    segments = [row for row in rows if row["kind"] == "segment"]
    assert len(segments) == len(masks) >= 2 * NUM_SCENES
    for row, (source, mask) in zip(segments, masks, strict=True):
        assert (row["source"], row["bbox"], row["score"]) == (source, mask["bbox"], pytest.approx(mask["score"]))
        assert np.array_equal(decode_mask(row["segmentation"]), decode_mask(mask["segmentation"]))
    for row in rows:
        assert (row["width"], row["height"]) == Image.open(row["source"]).size
        np.testing.assert_allclose(row["embedding"], embed_row(models[name], processor, row), atol=2e-5)
        if row["kind"] == "image":
            assert row["bbox"] == [0, 0, row["width"], row["height"]]
            assert row["segmentation"] is None and row["score"] is None


@torch.inference_mode()
def embed_query(model, processor, query: str) -> np.ndarray:
    """The embeddings of a query by the model `(num_embeddings, projection_dim)`."""
    if query == "text":
        texts = [f"a photo of a {own}" for own in (CLASS_NAMES[0], "red fuzzy shape")]
        inputs = processor.tokenizer(texts, padding=True, return_tensors="pt")
        return F.normalize(model.get_text_features(**inputs).pooler_output, dim=-1).numpy()
    image = Image.open("photos/1.png")
    if query == "image":
        return embed_row(model, processor, {"source": "photos/1.png", "kind": "image"})[None]
    inputs = processor(image, input_boxes=[[BOX]])
    outputs = model(**{key: inputs[key] for key in ("pixel_values", "input_boxes")}, multimask_output=False)
    masks = processor.post_process_masks(
        outputs.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"], inputs.get("num_prompts")
    )[0]
    sizes = inputs["reshaped_input_sizes"]
    return model.embed_masks([masks[:, 0]], inputs["pixel_values"], sizes)[0].numpy()


QUERIES = {
    "text": ["--text", CLASS_NAMES[0], "red fuzzy shape"],
    "image": ["--image", "photos/1.png"],
    "box": ["--image", "photos/1.png", "--box", ",".join(map(str, BOX))],
}


@pytest.mark.parametrize("query", QUERIES)
def test_results_are_those_of_brute_force(capsys, tmp_path, indexes, models, processor, name, query):
    restore(indexes[name])
    kind = "image" if query == "image" else "segment"
    options = [] if kind == "image" else ["--max_per_image", "100"]
    found = search(capsys, *QUERIES[query], "--top_k", "7", *options)  # the model is that of the index
    rows = [row for row in read_rows(tmp_path) if row["kind"] == kind]
    embeddings = np.stack([embed_row(models[name], processor, row) for row in rows])
    similarities = (embeddings @ embed_query(models[name], processor, query).T).max(axis=1)
    order = np.argsort(-similarities, kind="stable")[:7]
    assert found["num_searched"] == len(rows) and len(found["results"]) == len(order) >= 5
    for rank, (result, number) in enumerate(zip(found["results"], order, strict=True), start=1):
        assert result.pop("rank") == rank
        assert result.pop("similarity") == pytest.approx(similarities[number], abs=5e-5)
        assert result == {key: value for key, value in rows[number].items() if key != "embedding"}
    if query == "image":
        assert found["results"][0]["source"] == "photos/1.png"


@pytest.mark.parametrize("limit", [None, 1, 2])
def test_results_have_the_most_similar_segments_of_each_image(capsys, photos, limit):
    options = [] if limit is None else ["--max_per_image", str(limit)]
    found = search(capsys, *QUERIES["text"], "--top_k", "100", *options)
    everything = search(capsys, *QUERIES["text"], "--top_k", "100", "--max_per_image", "100")["results"]
    assert found["max_per_image"] == (limit or 1)
    kept, counts = [], Counter()
    for result in everything:
        counts[result["source"]] += 1
        if counts[result["source"]] <= (limit or 1):
            kept.append(result)
    assert 1 < len(kept) < len(everything) == found["num_searched"]
    assert [own | {"rank": 0} for own in found["results"]] == [own | {"rank": 0} for own in kept]
    first = search(capsys, *QUERIES["text"], "--top_k", "2", *options)["results"]  # a full page of other images
    assert first == found["results"][:2]


def test_an_index_is_searched_without_the_record_of_the_run(capsys, photos):
    found = search(capsys, "--text", "red")
    Path("index/results.jsonl").unlink()
    assert search(capsys, "--text", "red") == found
    _, messages = samclip(capsys, "index", "photos", *FEW_POINTS, "--output", "index", status=2)
    assert "would be overwritten" in messages[-1] and search(capsys, "--text", "red") == found


def test_the_table_has_a_line_for_each_result(capsys, photos):
    assert main(["search", "index", "--text", "red fuzzy shape", "--kind", "image", "--top_k", "2"]) == 0
    first, header, *lines = capsys.readouterr().out.splitlines()
    assert first == "2 of 5 images"
    assert header.split() == ["rank", "similarity", "score", "bbox", "source"]
    found = search(capsys, "--text", "red fuzzy shape", "--kind", "image", "--top_k", "2")["results"]
    assert [(line.split()[1], line.split()[-1]) for line in lines] == [
        (f"{result['similarity']:.3f}", result["source"]) for result in found
    ]


def random_rows(number: int, dimension: int = 8) -> list[dict]:
    """Rows of both kinds, every third of which has the embedding of the row before."""
    generator = np.random.default_rng(0)
    embeddings = generator.standard_normal((number, dimension)).astype(np.float32)
    embeddings[2::3] = embeddings[1::3][: len(embeddings[2::3])]
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    empty = {"height": 1, "width": 1, "bbox": [0, 0, 1, 1], "segmentation": None, "score": None}
    return [
        {"source": str(index), "kind": ("image", "segment")[index % 5 > 1], "embedding": embedding} | empty
        for index, embedding in enumerate(embeddings)
    ]


@pytest.mark.parametrize("rows_per_shard", [1, 7])
def test_the_highest_similarities_are_found_in_all_shards(tmp_path, monkeypatch, rows_per_shard):
    monkeypatch.setattr(retrieval, "ROWS_PER_SHARD", rows_per_shard)
    monkeypatch.setattr(retrieval, "ROWS_PER_GROUP", 3)
    rows = random_rows(100)
    write_index(tmp_path, rows, {"model": {}})
    assert len(list(tmp_path.glob("parquet/*.parquet"))) == -(-100 // rows_per_shard)
    for kind in ("image", "segment"):
        own = [row for row in rows if row["kind"] == kind]
        index = EmbeddingIndex(tmp_path, kind)
        assert np.array_equal(index.embeddings, np.stack([row["embedding"] for row in own]))
        assert [index.row(number)["source"] for number in range(len(own))] == [row["source"] for row in own]
        query = random_rows(3)[1]["embedding"][None]
        expected = np.argsort(-(index.embeddings @ query.T)[:, 0], kind="stable")
        for top_k in (1, 2, 3, 10, len(own), 1000):
            similarities, numbers = index.search(query, top_k)
            assert numbers.tolist() == expected[:top_k].tolist()
            assert similarities.tolist() == (index.embeddings @ query.T)[numbers, 0].tolist()
    user_file = tmp_path / "parquet/00999.parquet"  # which index.json does not name
    user_file.write_text("mine")
    write_index(tmp_path, rows[:10], {"model": {}})
    assert len(list(tmp_path.glob("parquet/*.parquet"))) == -(-10 // rows_per_shard) + 1 and user_file.exists()
    assert len(EmbeddingIndex(tmp_path, "image").embeddings) == 4


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_a_limit_for_each_image_keeps_its_most_similar_rows(tmp_path, limit):
    rows = [row | {"kind": "segment", "source": str(index % 7)} for index, row in enumerate(random_rows(60))]
    write_index(tmp_path, rows, {"model": {}})
    index = EmbeddingIndex(tmp_path, "segment")
    query = random_rows(3)[1]["embedding"][None]
    similarities = (index.embeddings @ query.T)[:, 0]
    kept, counts = [], Counter()
    for number in np.argsort(-similarities, kind="stable").tolist():
        counts[number % 7] += 1
        if counts[number % 7] <= limit:
            kept.append(number)
    for top_k in (1, 3, 7, 100):
        found, numbers = index.search(query, top_k, limit)
        assert numbers.tolist() == kept[:top_k] and found.tolist() == similarities[numbers].tolist()


def test_wrong_queries_and_damaged_files_are_refused(tmp_path):
    write_index(tmp_path, random_rows(10), {"model": {}})
    index = EmbeddingIndex(tmp_path, "image")
    with pytest.raises(ValueError, match=r"the shape \(num_embeddings, 8\), but this one has \(8,\)"):
        index.search(index.embeddings[0], 1)
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        index.search(index.embeddings, 0)
    with pytest.raises(ValueError, match="max_per_image must be at least 1"):
        index.search(index.embeddings, 1, 0)
    with pytest.raises(ValueError, match="kind must be"):
        EmbeddingIndex(tmp_path, "mask")
    [path] = tmp_path.glob("parquet/*.parquet")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"00000\.parquet cannot be read .*index the images again"):
        EmbeddingIndex(tmp_path, "image")


def test_an_index_records_its_model_and_counts_what_failed(photos):
    description = json.loads(photos["index.json"])
    assert description["model"]["name"] == MINIATURE_NAME
    assert description["mask_generation"] == miniature.MASK_GENERATION | {"points_per_crop": 8}
    assert description["failed"] == [{"image": "photos/broken.png", "error": description["failed"][0]["error"]}]
    assert description["num_images"] == NUM_SCENES + 1 and description["num_images_without_segments"] == 1
    assert description["num_segments"] + description["num_images"] == sum(s["rows"] for s in description["shards"])


def test_a_run_that_was_killed_continues_and_gives_the_same_files(capsys, monkeypatch, photos):
    run_until_killed(monkeypatch, "3", *COMMAND)
    assert set(contents("out")) == {"results.jsonl"}
    _, messages = samclip(capsys, "search", "out", "--text", "red", status=2)
    assert messages == [
        "samclip search: out is not an index, or an index that is not complete: run 'samclip index' until it ends."
    ]
    samclip(capsys, *COMMAND, status=1)
    assert contents("out") == photos


def test_overwrite_deletes_the_tables_of_an_earlier_run_and_no_others(capsys, monkeypatch, tmp_path):
    """Also those of a run that was killed, whose index.json is missing."""
    monkeypatch.chdir(tmp_path)
    save("photos/0.png", "photos/1.png", "photos/2.png")
    command = ["index", "--no_segments", "--output", "out"]
    with monkeypatch.context() as context:
        context.setattr(retrieval, "ROWS_PER_SHARD", 1)
        samclip(capsys, *command, "photos")
    Path("out/index.json").unlink()
    Path("out/parquet/00003.parquet").write_text("mine")
    _, messages = samclip(capsys, *command, "photos/0.png", "--overwrite", status=2)
    assert "out/parquet/00003.parquet is not replaced or deleted" in messages[-1]
    assert sorted(path.name for path in Path("out/parquet").iterdir()) == [f"0000{n}.parquet" for n in range(4)]
    Path("out/parquet/00003.parquet").rename("out/parquet/mine.parquet")
    samclip(capsys, *command, "photos/0.png", "--overwrite")
    assert sorted(path.name for path in Path("out/parquet").iterdir()) == ["00000.parquet", "mine.parquet"]


def test_a_run_that_was_killed_while_it_wrote_the_tables_is_not_searched(capsys, monkeypatch, photos):
    """A second run finds more images, and is killed after the first of its shards."""

    class Killed(BaseException):
        pass

    def write_one(*arguments):
        written.append(arguments)
        if len(written) == 2:
            raise Killed
        return write_shard(*arguments)

    write_shard, written = retrieval._write_shard, []
    with monkeypatch.context() as context:
        context.setattr(retrieval, "ROWS_PER_SHARD", 4)
        Path("photos/0.png").rename("0.png")
        samclip(capsys, *COMMAND, status=1)
        Path("0.png").rename("photos/0.png")
        context.setattr(retrieval, "_write_shard", write_one)
        with pytest.raises(Killed):
            main(COMMAND)
    _, messages = samclip(capsys, "search", "out", "--text", "red", status=2)
    assert "an index that is not complete" in messages[-1]
    samclip(capsys, *COMMAND, status=1)
    assert {path: content for path, content in contents("out").items() if path != "results.jsonl"} == {
        path: content for path, content in photos.items() if path != "results.jsonl"
    }


@pytest.mark.slow
def test_a_process_that_is_killed_at_any_moment_continues(photos):
    command = [sys.executable, "-m", "samclip_cli", *COMMAND]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    results = Path("out/results.jsonl")
    while not results.exists() or results.stat().st_size == 0:
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert subprocess.run(command, capture_output=True).returncode == 1
    assert contents("out") == photos


def test_two_processes_give_the_index_of_one(capsys, monkeypatch, photos):
    for number in (1, 0):
        assert run_process(monkeypatch, number, 2, *COMMAND) in (0, 1)
    assert not Path("out/index.json").exists()
    samclip(capsys, *COMMAND, status=1)
    assert contents("out") == photos


def test_an_index_of_another_model_is_refused(capsys, photos):
    _, messages = samclip(capsys, "search", "index", "--text", "red", *TEACHERS, status=2)
    assert messages == [
        f"samclip search: index was indexed with another model ({MINIATURE_NAME}; the weights and the configuration "
        "differ): search with that model, or index the images again."
    ]


def test_a_saved_vocabulary_does_not_change_the_identity_of_a_model(tmp_path, models, processor):
    before = retrieval.describe_model(models["merged"], processor)
    other = SamClipForImageSegmentation.from_pretrained(miniature.checkpoint())
    other.set_vocabulary(["a", "b"], tokenizer=processor.tokenizer)
    assert retrieval.describe_model(other, processor) == before
    other.clip_head.requires_grad_(False)
    next(other.clip_head.parameters()).add_(0.1)
    assert retrieval.describe_model(other, processor)["weights"] != before["weights"]


def test_an_index_without_segments_is_searched_by_image(capsys, photos):
    _, messages = samclip(
        capsys, "index", "photos", "--no_segments", "--batch_size", "2", "--output", "whole", status=1
    )
    assert not any("no segments found" in message for message in messages)
    whole, both = (EmbeddingIndex(path, "image") for path in ("whole", "index"))
    np.testing.assert_allclose(whole.embeddings, both.embeddings, atol=1e-5)
    Path("index").rename("both")
    Path("whole").rename("index")
    assert {result["kind"] for result in search(capsys, "--text", "red")["results"]} == {"image"}
    for options in (["--text", "red", "--kind", "segment"], ["--image", "photos/1.png", "--box", "16,56,111,108"]):
        _, messages = samclip(capsys, "search", "index", *options, status=2)
        assert messages[-1].startswith("samclip search: index has no segments")


def test_an_index_without_images_is_refused(capsys, folder):
    Path("broken.png").write_bytes(b"no image")
    samclip(capsys, "index", "broken.png", "--output", "out", status=1)
    _, messages = samclip(capsys, "search", "out", "--text", "red", status=2)
    assert messages == ["samclip search: out has no images: no image could be read."]


@pytest.mark.parametrize(
    "command, part",
    [
        (["index", "photos", "--output", "out.png"], "pass a folder"),
        (
            ["index", "photos", "--output", "out", "--no_segments", "--points_per_crop", "8"],
            "--points_per_crop has no",
        ),
        (["index", "photos", "--output", "photos"], "photos/index.json would be overwritten"),
        (["search", "photos", "--text", "red"], "index.json is not the description of an index"),
        (["search", "nowhere", "--text", "red"], "nowhere is not an index"),
        (["search", "index"], "pass --text, such as mug, or --image"),
        (["search", "index", "--text", "red", "--box", "1,2,3,4"], "--box is a box in an image"),
        (["search", "index", "--image", "photos/1.png", "--box", "1,2,3"], "'1,2,3' is not x1,y1,x2,y2"),
        (["search", "index", "--image", "photos/1.png", "--box", "1,2,3,4;5,6,7,8"], "--box is one box"),
        (["search", "index", "--image", "photos/1.png", "--box", "1,2,999,9"], "which is outside the image"),
        (["search", "index", "--image", "photos/1.png", "--box", "1,2,3,4", "--kind", "image"], "remove --kind"),
        (["search", "index", "--image", "photos/broken.png"], "--image photos/broken.png: not an image"),
        (["search", "index", "--image", "photos/none.png"], "--image photos/none.png: no such file"),
        (["search", "index", "--image", "photos"], "--image photos: no such file"),
        (["search", "index", "--image", "photos/1.png", "--template", "a {}"], "--template has no effect"),
        (["search", "index", "--text", "red", "--template", "a"], "--template must contain {} once"),
        (["search", "index", "--text", " "], "--text: "),
        (["search", "index", "--text", "red", "red"], "--text: "),
        (["search", "index", "--text", "red", "--output", "sheet.jpg"], "must end in .png"),
        (["search", "index", "--text", "red", "--output", "no/sheet.png"], "the folder no does not exist"),
        (["search", "index", "--text", "red", "--output", "photos/1.png"], "photos/1.png would be overwritten"),
        (["search", "index", "--text", "red", "--overwrite"], "--overwrite has no effect"),
        (["search", "index", "--image", "photos/1.png", "--max_per_image", "2"], "--max_per_image has no effect"),
    ],
)
def test_wrong_arguments_are_refused_with_one_sentence(capsys, photos, command, part):
    Path("photos/index.json").write_text("mine")
    _, messages = samclip(capsys, *command, status=2)
    assert part in messages[-1]
    assert Path("photos/index.json").read_text() == "mine"


def test_a_contact_sheet_outlines_the_segments(capsys, photos):
    search(capsys, "--text", "red fuzzy shape", "--top_k", "3", "--output", "sheet.png")
    [image] = search(capsys, "--image", "photos/1.png", "--top_k", "1", "--output", "image.png")["results"]
    found = search(capsys, "--image", "photos/1.png", "--box", "16,56,111,108", "--top_k", "1", "--output", "one.png")
    [segment] = found["results"]
    assert image["source"] == segment["source"] == "photos/1.png"
    plain, outlined = (np.asarray(Image.open(path)).astype(int) for path in ("image.png", "one.png"))
    height, width = min(len(plain), len(outlined)) - 100, plain.shape[1]
    is_drawn = np.abs(plain[4:height, 4 : width - 4] - outlined[4:height, 4 : width - 4]).sum(axis=-1) > 0
    mask = decode_mask(segment["segmentation"])
    size = (320, round(320 * mask.shape[0] / mask.shape[1]))
    enlarged = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))[: len(is_drawn), : width - 8]
    edges = np.zeros_like(enlarged)
    for axis in (0, 1):
        for step in (-1, 1):
            edges |= enlarged != np.roll(enlarged, step, axis)
    near = np.zeros_like(edges)
    for rows in range(-2, 3):
        for columns in range(-2, 3):
            near |= np.roll(edges, (rows, columns), (0, 1))
    assert is_drawn.any() and not (is_drawn & ~near).any()
    assert Image.open("sheet.png").width > 2 * 320
    _, messages = samclip(capsys, "search", "index", "--text", "red", "--output", "sheet.png", status=2)
    assert "sheet.png would be overwritten" in messages[-1]


def test_a_contact_sheet_never_replaces_an_image_of_the_index(capsys, photos):
    before = Path("photos/1.png").read_bytes()
    Path("link.png").symlink_to("photos/1.png")
    for output in ("photos/1.png", "link.png"):
        command = ["search", "index", "--text", "red", "--output", output, "--overwrite"]
        _, messages = samclip(capsys, *command, status=2)
        assert f"would overwrite the input image {output}" in messages[-1]
    assert Path("photos/1.png").read_bytes() == before
    assert main(["search", "index", "--text", "red", "--output", "photos/sheet.png", "--overwrite"]) == 0


def test_images_of_a_contact_sheet_that_cannot_be_read_are_counted(capsys, photos):
    Path("photos/1.png").unlink()
    Image.new("RGB", (9, 9)).save("photos/2.png")
    command = ["search", "index", "--text", "red", "--kind", "image", "--output", "sheet.png"]
    assert main(command) == 1
    messages = capsys.readouterr().err.splitlines()
    assert sum("there is no such image" in message for message in messages) == 1
    assert sum("another size than when it was indexed" in message for message in messages) == 1
    assert messages[-1] == "samclip: 2 of 5 results are not on sheet.png."


def test_images_in_tars_are_drawn(capsys, folder):
    with tarfile.open("photos.tar", "w") as tar:
        for number in range(2):
            file = io.BytesIO()
            scene(8 + number).save(file, "PNG")
            member = tarfile.TarInfo(f"{number}.png")
            member.size = file.tell()
            file.seek(0)
            tar.addfile(member, file)
    samclip(capsys, "index", "photos.tar", "--no_segments", "--output", "index")
    found = search(capsys, "--text", "red", "--output", "sheet.png")["results"]
    assert len(found) == 2 and all("photos.tar" in result["source"] for result in found)
    assert Image.open("sheet.png").width > 2 * 320


@pytest.fixture(scope="module")
def benchmark():
    return load_script(Path(__file__).parents[1] / "benchmarks" / "search.py")


def test_average_precision_is_that_of_scikit_learn(benchmark):
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    for _ in range(20):
        hits = generator.random(30) < 0.3
        expected = metrics.average_precision_score(hits, -np.arange(30))
        assert benchmark.average_precision(hits, int(hits.sum())) == pytest.approx(expected)
    assert benchmark.average_precision(np.array([True, False]), 2) == 0.5  # one was not found


def test_a_second_segment_of_an_object_is_wrong(benchmark):
    class Index:
        def search(self, query, top_k):
            return np.zeros(top_k), np.arange(top_k)

    classes = np.eye(48, dtype=bool)[[0, 0, 1]]
    gallery = benchmark.Gallery(Index(), np.array([0, 0, 1, 2]), np.array([0, 0, 1, -1]), np.arange(3), classes)
    assert benchmark.judge(gallery, None, 0) == (1, pytest.approx((1 + 2 / 3) / 2))
    assert benchmark.judge(gallery, None, 0, left_out=0) == (1, 1)
    assert benchmark.judge(gallery, None, 1) == (0, 0)
    assert benchmark.judge(gallery, None, 2) is None


@pytest.mark.slow
def test_the_benchmark_prints_a_row_for_every_query(benchmark, capsys):
    benchmark.main(["quality", "--models", "shipped", "--num_scenes", "49", "--seeds", "102"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| shipped")]
    assert len(rows) == 4 + 3 + 2 and not any("nan" in row for row in rows)
    benchmark.main(["time", "--num_rows", "1000", "--repeats", "2", "--num_images", "2"])
    assert "| search, top 10: median" in capsys.readouterr().out
