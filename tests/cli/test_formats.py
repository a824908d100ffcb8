"""Formats of the image commands, compared with pycocotools and with the JSON on standard output."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from samclip_cli import CommandError, main
from samclip_cli.formats import Prediction, encode, file_names, parse_formats, run_files, write_coco
from samclip_cli.vocabulary import format_labels, parse_labels
from samclip_hf import miniature
from samclip_hf.images import decode_mask, encode_mask
from samclip_hf.miniature.scenes import render
from samclip_hf.visualization import color_of

LABELS = ["--labels", "red fuzzy shape, green zigzag shape", "--background", "an empty scene"]
UNMERGED = ["--sam", miniature.sam_teacher(), "--clip", miniature.clip_teacher()]
NOTE = "trained on synthetic scenes of colored shapes, not on photographs"


@pytest.fixture(autouse=True)
def photo(tmp_path, monkeypatch):
    """An image of odd size in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    image = Image.fromarray(render(seed=0, index=8).image).resize((150, 107), Image.Resampling.BILINEAR)
    image.save("photo.png")
    return image


def records(capsys, *arguments: str) -> list[dict]:
    assert main(arguments) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_sam_and_a_clip_give_an_overlay_a_label_map_and_coco_results(capsys, photo):
    command = ["segment", "photo.png", *UNMERGED, *LABELS, "--threshold", "0.3"]
    [record] = records(capsys, *command)
    assert len(record["segments"]) >= 2
    assert record["model"] == {
        "sam": miniature.sam_teacher(),
        "clip": miniature.clip_teacher(),
        "clip_image_size": 128,
        "note": NOTE,
    }
    records(capsys, *command, "--output", "out/")
    written = {"photo.png", "photo_labels.png", "photo.json", "coco_results.json", "coco_dataset.json"}
    assert written <= set(os.listdir("out"))
    assert json.loads(Path("out/photo.json").read_text()) == record
    overlay = Image.open("out/photo.png")
    assert overlay.info["Comment"].startswith("Model: sam + clip, ")
    assert overlay.width >= 150 and overlay.height > 107 and NOTE in overlay.info["Comment"]

    expected = np.zeros((107, 150), dtype=int)
    for segment in record["segments"]:
        assert segment["label_id"] == LABELS[1].split(", ").index(segment["label"]) + 1
        expected[decode_mask(segment["segmentation"])] = segment["label_id"]
    labels = Image.open("out/photo_labels.png")
    assert labels.mode == "P" and np.array_equal(np.asarray(labels), expected)
    assert labels.getpalette()[: 3 * 3] == [0, 0, 0, *color_of(1), *color_of(2)]
    assert labels.info["Labels"] == "0 no segment\n1 red fuzzy shape\n2 green zigzag shape"
    assert NOTE in labels.info["Comment"]

    dataset = COCO("out/coco_dataset.json")
    results = dataset.loadRes("out/coco_results.json")
    assert [image["file_name"] for image in dataset.loadImgs(dataset.getImgIds())] == ["photo.png"]
    assert [category["name"] for category in dataset.loadCats([1, 2])] == LABELS[1].split(", ")
    assert dataset.dataset["info"]["model"]["note"] == NOTE
    for result, segment in zip(results.loadAnns(results.getAnnIds()), record["segments"], strict=True):
        assert np.array_equal(results.annToMask(result).astype(bool), decode_mask(segment["segmentation"]))
        assert (result["category_id"], result["score"]) == (segment["label_id"], segment["score"])
        assert result["area"] == segment["area"] and list(result["bbox"]) == segment["bbox"]


def test_masks_and_cutouts_are_one_file_for_each_mask(capsys, photo, caplog):
    command = ["masks", "photo.png", "--points_per_crop", "6", *LABELS]
    [record] = records(capsys, *command)
    assert caplog.messages == []  # such as transformers' about models that it does not know
    records(capsys, *command, "--output", "out", "--formats", "masks, cutouts,jsonl")
    assert json.loads(Path("out/results.jsonl").read_text()) == record
    names = [
        f"{number:03d}_{mask['label'].replace(' ', '_')}.png" for number, mask in enumerate(record["masks"], start=1)
    ]
    assert len(names) >= 3
    for folder in ("out/photo_masks", "out/photo_cutouts"):
        assert sorted(os.listdir(folder)) == names
    for name, mask in zip(names, record["masks"], strict=True):
        inside = decode_mask(mask["segmentation"])
        drawn = Image.open(f"out/photo_masks/{name}")
        assert drawn.mode == "L" and np.array_equal(np.asarray(drawn), inside * 255)
        left, top, width, height = mask["bbox"]
        cutout = np.asarray(Image.open(f"out/photo_cutouts/{name}"))
        rows, columns = slice(top, top + height), slice(left, left + width)
        assert np.array_equal(cutout[..., 3], inside[rows, columns] * 255)
        assert np.array_equal(cutout[..., :3], np.asarray(photo)[rows, columns])


@pytest.mark.parametrize("command", [["classify", "--labels", "a, b"], ["points", "--points", "40,30"]])
def test_every_output_names_the_model_and_its_limits(capsys, command):
    [record] = records(capsys, *command, "photo.png")
    assert record["model"] == {"name": "samclip-hf miniature", "note": NOTE}
    records(capsys, *command, "photo.png", "--output", "out.png")
    assert Image.open("out.png").info["Comment"] == f"Model: samclip-hf miniature, {NOTE}"


def prediction(label_ids: list[int], names: list[str]) -> Prediction:
    masks = np.zeros((len(label_ids), 20, 30), dtype=bool)
    for number in range(len(masks)):
        masks[number, number % 20 :, : 30 - number % 30] = True
    return Prediction({}, [], "the model", list(masks), label_ids, names)


def label_map(label_ids: list[int], names: list[str], tmp_path) -> Image.Image:
    files = encode(Image.new("RGB", (30, 20)), {}, prediction(label_ids, names), ["labelmap"], "a")
    (tmp_path / "map.png").write_bytes(files["a_labels.png"])
    return Image.open(tmp_path / "map.png")


def test_smaller_masks_are_on_top_in_the_label_map(tmp_path):
    labels = np.asarray(label_map([2, 1, 5], list("abcde"), tmp_path))
    assert (labels[0, 5], labels[1, 5], labels[19, 0], labels[1, 29]) == (2, 1, 5, 2)


def test_a_label_map_of_many_labels_has_16_bits(tmp_path):
    names = [f"name {number}" for number in range(300)]
    labels = label_map([7, 300], names, tmp_path)
    assert labels.mode == "I;16" and sorted(np.unique(np.asarray(labels))) == [7, 300]
    assert label_map([7, 200], names, tmp_path).mode == "I;16"  # the same for all images of a run
    assert label_map([7, 200], names[:254], tmp_path).mode == "P"


def test_the_label_map_without_masks_is_empty(tmp_path):
    assert not np.asarray(label_map([], [], tmp_path)).any()


def test_labels_of_any_script_are_file_names_and_masks_without_pixels_have_no_cutout():
    labels = ["a/b: c", "\u732b", "x" * 300]
    one = prediction([1, 2, 3, 0], labels)
    one.masks[0][:] = False
    files = encode(Image.new("RGB", (30, 20)), {}, one, ["cutouts", "masks"], "s")
    expected = ["001_a_b_c", "002_\u732b", "003_" + "x" * 40, "004_background"]
    assert [name for name in files if "masks" in name] == [f"s_masks/{name}.png" for name in expected]
    assert [name for name in files if "cutouts" in name] == [f"s_cutouts/{name}.png" for name in expected[1:]]


def test_coco_evaluates_the_results(tmp_path):
    masks = list(prediction([1, 2, 1], ["a", "b"]).masks)
    found = [
        {"label_id": label_id, "score": 0.4, "label_score": score, "segmentation": encode_mask(mask)}
        for label_id, score, mask in zip([1, 2, 0], [0.9, 0.8, 0.7], masks, strict=True)
    ]
    size = {"height": 20, "width": 30}
    lines = [{"image": "x.png", **size, "masks": []}, {"image": "y.png", **size, "masks": found}]
    write_coco(iter(lines), tmp_path, ["a", "b"], {"name": "m"})
    dataset = json.loads((tmp_path / "coco_dataset.json").read_text())
    for number, mask in enumerate(masks[:2], start=1):
        encoded = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
        results = json.loads((tmp_path / "coco_results.json").read_text())
        assert results[number - 1]["segmentation"] == {
            "size": [20, 30],
            "counts": encoded["counts"].decode(),
        }
        dataset["annotations"].append(
            {
                "id": number,
                "image_id": 2,
                "category_id": number,
                "segmentation": encoded,
                "area": int(mask.sum()),
                "iscrowd": 0,
                "bbox": coco.toBbox(encoded).tolist(),
            }
        )
    assert [(result["category_id"], result["score"]) for result in results] == [(1, 0.9), (2, 0.8)]
    truth = COCO()
    truth.dataset = dataset
    truth.createIndex()
    evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / "coco_results.json")), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1)


def test_results_without_masks_and_names_are_valid_json(tmp_path):
    write_coco([{"image": "x.png", "height": 2, "width": 3, "masks": []}], tmp_path, [], {})
    assert json.loads((tmp_path / "coco_results.json").read_text()) == []
    assert json.loads((tmp_path / "coco_dataset.json").read_text())["categories"] == [{"id": 1, "name": "object"}]


def test_formats_are_parsed_and_have_files():
    assert parse_formats("overlay, coco", True) == ("overlay", "coco")
    for text, has_masks, part in (
        ("overlays", True, "'overlays' is not a format. Formats are overlay, labelmap, masks, cutouts, json"),
        ("overlay,overlay", True, "overlay is repeated"),
        ("", True, "'' is not a format"),
        ("coco", False, "'coco' is not a format. Formats are overlay, json, jsonl."),
    ):
        with pytest.raises(CommandError, match="--formats: ") as raised:
            parse_formats(text, has_masks)
        assert part in str(raised.value)
    assert file_names("a", ["overlay", "masks", "coco"]) == ["a.png", "a_masks/"]
    coco = ["coco_results.json", "coco_dataset.json"]
    assert run_files(["json", "coco"], has_record=False) == coco
    assert run_files(["json", "coco"], has_record=True) == ["results.jsonl", *coco]
    for has_record in (False, True):
        assert run_files(["coco", "jsonl"], has_record) == [*coco, "results.jsonl"]


def test_labels_have_synonyms_and_escapes():
    assert parse_labels("--labels", "cat|kitten, big  sofa") == [["cat", "kitten"], ["big sofa"]]
    assert parse_labels("--labels", r"blue\, bright|x\|y, a\\b, c\d") == [["blue, bright", "x|y"], ["a\\b"], ["c\\d"]]
    labels = [["blue, bright", "x|y"], ["a\\b"], ["c"]]
    assert parse_labels("--labels", format_labels(labels)) == labels
    for text, part in (("cat|, sofa", "has an empty name"), ("cat|dog, dog", "repeated names: dog")):
        with pytest.raises(CommandError, match=part):
            parse_labels("--labels", text)


def test_labels_of_a_file_are_those_of_the_option(capsys):
    Path("labels.txt").write_text("\ufeffred fuzzy shape|fuzzy thing\r\n\n  green, zigzag shape  \n", encoding="utf-8")
    options = ["classify", "photo.png", "--template", "a {}"]
    from_file = records(capsys, *options, "--labels_file", "labels.txt")
    from_option = records(capsys, *options, "--labels", r"red fuzzy shape|fuzzy thing, green\, zigzag shape")
    assert from_file == from_option
    assert {label["label"] for label in from_file[0]["labels"]} == {"red fuzzy shape", "green, zigzag shape"}


def test_lines_of_a_file_that_start_with_a_number_sign_are_comments(capsys):
    Path("labels.txt").write_text("# animals\ncat\n  # small\n\\#1 jersey|C# book\ndog # big\n", encoding="utf-8")
    assert main(["classify", "photo.png", "--labels_file", "labels.txt"]) == 0
    out, err = capsys.readouterr()
    assert {label["label"] for label in json.loads(out)["labels"]} <= {"cat", "#1 jersey", "C# book", "dog # big"}
    assert len(json.loads(out)["labels"]) == 3 and "labels.txt: skipping 2 of 5 lines, which are comments" in err
    assert parse_labels("--labels", r"\#1, #2") == [["#1"], ["#2"]]  # the option has no comments
    Path("labels.txt").write_text("# cat\n#dog\n", encoding="utf-8")
    assert main(["classify", "photo.png", "--labels_file", "labels.txt"]) == 2
    assert "labels.txt has no labels" in capsys.readouterr().err


def test_the_score_of_a_label_is_that_of_its_best_synonym(capsys):
    options = ["classify", "photo.png", "--labels"]
    [apart] = records(capsys, *options, "red fuzzy shape, fuzzy thing, green zigzag shape")
    [together] = records(capsys, *options, "fuzzy thing|red fuzzy shape, green zigzag shape")
    scores = {label["label"]: label["score"] for label in apart["labels"]}
    best = max(scores["red fuzzy shape"], scores["fuzzy thing"])
    expected = best / (best + scores["green zigzag shape"])
    assert {label["label"]: label["score"] for label in together["labels"]}["fuzzy thing"] == pytest.approx(
        expected, rel=1e-5
    )


WRONG_ARGUMENTS = {
    "labels twice": (["--labels", "a, b", "--labels_file", "l.txt"], "either --labels or --labels_file"),
    "no labels file": (["--labels_file", "nosuch.txt"], "--labels_file nosuch.txt: No such file"),
    "empty labels file": (["--labels_file", "empty.txt"], "has no labels: write one on each line"),
    "no text": (["--labels_file", "photo.png"], "not a text file in UTF-8"),
    "unmerged without labels": (UNMERGED, "--sam and --clip have no labels"),
    "both kinds": (["--model", "x", *UNMERGED], "either --model, or --sam and --clip"),
    "sam alone": (UNMERGED[:2], "--sam needs --clip, too: a CLIP or SigLIP, such as"),
    "clip alone": (UNMERGED[2:], "--clip needs --sam, too: a SAM, such as"),
    "size alone": (["--clip_image_size", "224"], "--clip_image_size has no effect without --sam and --clip"),
    "size of patches": (
        [*UNMERGED, "--clip_image_size", "100"],
        "--clip_image_size 100 cannot be loaded: clip_image_size must be a multiple of the patch size 8, such as 96",
    ),
    "exchanged": (["--sam", UNMERGED[3], "--clip", UNMERGED[1]], "is a CLIP: pass it as --clip, and a SAM as --sam"),
    "clip as model": (["--model", UNMERGED[3]], "is a CLIP: pass it as --clip, and a SAM as --sam"),
    "merged as sam": (
        ["--sam", miniature.checkpoint(), *UNMERGED[2:]],
        "is a SAM-CLIP: pass it as --model, without --sam and --clip",
    ),
    "other model": (["--model", "bert"], "--model bert has the model type 'bert', but must be a SAM-CLIP"),
    "naflex": ([*UNMERGED[:2], "--clip", "naflex"], "SigLIP 2 works with a fixed image size"),
    "broken configuration": (["--model", "broken"], "--model broken: its config.json cannot be read"),
}


@pytest.mark.parametrize("arguments, part", WRONG_ARGUMENTS.values(), ids=WRONG_ARGUMENTS)
def test_wrong_arguments_give_one_message(capsys, arguments, part):
    Path("empty.txt").write_text("\n \n")
    for name, content in (
        ("bert", '{"model_type": "bert"}'),
        ("naflex", '{"model_type": "siglip2"}'),
        ("broken", "{"),
    ):
        Path(name).mkdir()
        Path(name, "config.json").write_text(content)
    if "labels" not in " ".join(arguments) and arguments != UNMERGED:
        arguments = [*arguments, "--labels", "cat, sofa"]
    assert main(["segment", "photo.png", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("samclip segment: ") and part in err


def test_a_model_that_lacks_weights_is_an_error(capsys):
    from safetensors.torch import load_file, save_file

    Path("lacking").mkdir()
    for path in Path(miniature.checkpoint()).iterdir():
        Path("lacking", path.name).write_bytes(path.read_bytes())
    weights = load_file("lacking/model.safetensors")
    save_file({name: w for name, w in weights.items() if "mask_decoder" not in name}, "lacking/model.safetensors")
    for command in (["segment"], ["classify", "--labels", "a, b"], ["masks"], ["points", "--points", "1,2"]):
        assert main([*command, "photo.png", "--model", "lacking"]) == 2
        assert "--model lacking cannot be loaded: lacking lacks weights" in capsys.readouterr().err
