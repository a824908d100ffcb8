"""`samclip points`, and names of masks, compared with transformers' SamModel and with classify_masks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SamModel, SamProcessor

from samclip_cli import CommandError, main
from samclip_cli.points import parse_boxes, parse_points
from samclip_cli.vocabulary import label_legend
from samclip_hf import SamClipForImageSegmentation, SamClipProcessor, miniature
from samclip_hf.images import decode_mask
from samclip_hf.miniature.scenes import render

SIZE = (150, 107)
UNMERGED = ["--sam", miniature.sam_teacher(), "--clip", miniature.clip_teacher()]
LABELS = ["--labels", "red fuzzy shape, green zigzag shape", "--background", "an empty scene"]


@pytest.fixture(autouse=True)
def photo(tmp_path, monkeypatch):
    """An image of odd size in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    image = Image.fromarray(render(seed=0, index=8).image).resize(SIZE, Image.Resampling.BILINEAR)
    image.save("photo.png")
    return image


def samclip(capsys, *arguments: str, status: int = 0) -> tuple[list[dict], list[str]]:
    """Records on standard output, and messages without the one about the default model."""
    assert main(arguments) == status
    out, err = capsys.readouterr()
    messages = [line for line in err.splitlines() if "using the shipped miniature" not in line]
    return [json.loads(line) for line in out.splitlines()], messages


def segment_with_sam(image, multimask, **prompt) -> tuple[np.ndarray, float]:
    """The mask with the highest score of transformers' SamModel for one prompt."""
    model = SamModel.from_pretrained(miniature.sam_teacher())
    processor = SamProcessor.from_pretrained(miniature.sam_teacher())
    inputs = processor(image, return_tensors="pt", **prompt)
    with torch.no_grad():
        outputs = model(**inputs, multimask_output=multimask)
    [masks] = processor.image_processor.post_process_masks(
        outputs.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"]
    )
    best = outputs.iou_scores[0, 0].argmax()
    return masks[0, best].numpy(), outputs.iou_scores[0, 0, best].item()


def test_masks_equal_those_of_sam(capsys, photo):
    prompts = ["--points", "40,30; 40,30 20,20,0 60.5,40; 100,60", "--boxes", "11,3,76,56;10,5,80,60;90,10,140,90"]
    [points], _ = samclip(capsys, "points", "photo.png", *prompts[:2], *UNMERGED)
    [boxes], _ = samclip(capsys, "points", "photo.png", *prompts[2:], *UNMERGED)
    [both], messages = samclip(capsys, "points", "photo.png", *prompts, *UNMERGED)
    assert messages == [] and len(both["masks"]) == 3
    for record, has_points, has_boxes in ((points, True, False), (boxes, False, True), (both, True, True)):
        for mask in record["masks"]:
            prompt = {}
            if has_points:
                prompt["input_points"], prompt["input_labels"] = [[mask["points"]]], [[mask["point_labels"]]]
            if has_boxes:
                prompt["input_boxes"] = [[mask["box"]]]
            multimask = not has_boxes and len(mask["points"]) == 1
            expected, score = segment_with_sam(photo, multimask, **prompt)
            assert mask["score"] == pytest.approx(score, abs=1e-5)
            assert np.mean(decode_mask(mask["segmentation"]) != expected) < 1e-3
            assert expected.any() and mask["area"] == decode_mask(mask["segmentation"]).sum()
    assert points["masks"][0]["points"] == [[40, 30]] and points["masks"][1]["point_labels"] == [1, 0, 1]


@pytest.mark.parametrize("model", [[], UNMERGED], ids=["merged", "unmerged"])
def test_masks_get_the_names_of_classify_masks(capsys, photo, model, monkeypatch):
    monkeypatch.setattr("samclip_cli.points.MASK_MEMORY", SIZE[0] * SIZE[1])  # one mask in a call
    prompts = ["--points", "45,20; 100,60", *model]
    [plain], _ = samclip(capsys, "points", "photo.png", *prompts)
    [named], _ = samclip(capsys, "points", "photo.png", *prompts, *LABELS)
    if model:
        segmenter = SamClipForImageSegmentation.from_teachers(model[1], model[3], merged=False)
        processor = SamClipProcessor.from_teachers(model[1], model[3])
    else:
        segmenter = SamClipForImageSegmentation.from_pretrained(miniature.checkpoint())
        processor = SamClipProcessor.from_pretrained(miniature.checkpoint())
    segmenter.set_vocabulary(LABELS[1].split(", "), [LABELS[3]], tokenizer=processor.tokenizer)
    masks = [decode_mask(mask["segmentation"]) for mask in plain["masks"]]
    with torch.no_grad():
        scores = segmenter.eval().classify_masks([masks], **processor(photo)).scores[0]
    for mask, without_name, expected in zip(named["masks"], plain["masks"], scores, strict=True):
        best = int(expected.argmax())
        assert (mask["label"], mask["label_id"]) == (segmenter.config.id2label[best], best)
        assert mask["label_score"] == pytest.approx(expected[best].item(), abs=1e-4)
        assert mask == mask | without_name and "label" not in without_name
    assert named["masks"][0]["label"] == "red fuzzy shape"


def test_independent_scores_do_not_depend_on_the_other_labels(capsys):
    command = ["points", "photo.png", "--points", "40,30; 100,60", "--multi_label", "--threshold", "0", "--labels"]
    one, two = (
        samclip(capsys, *command, labels)[0][0]
        for labels in ("red fuzzy shape", "green zigzag shape, red fuzzy shape")
    )
    for alone, together in zip(one["masks"], two["masks"], strict=True):
        assert alone["label"] == "red fuzzy shape" and list(alone["label_scores"]) == ["red fuzzy shape"]
        assert alone["label_scores"]["red fuzzy shape"] == alone["label_score"]
        assert together["label_scores"]["red fuzzy shape"] == pytest.approx(alone["label_score"], abs=1e-4)
        assert together["label_score"] == max(together["label_scores"].values())
    assert one["masks"][0]["label_score"] > one["masks"][1]["label_score"]
    ranks, _ = samclip(
        capsys, "classify", "photo.png", "--multi_label", "--labels", "red fuzzy shape, green zigzag shape"
    )
    alone, _ = samclip(capsys, "classify", "photo.png", "--multi_label", "--labels", "red fuzzy shape")
    scores = {label["label"]: label["score"] for label in ranks[0]["labels"]}
    assert scores["red fuzzy shape"] == pytest.approx(alone[0]["labels"][0]["score"], abs=1e-4)


@pytest.mark.parametrize("command", [["points", "--points", "40,30; 100,60"], ["masks", "--points_per_crop", "6"]])
def test_a_mask_with_a_score_below_the_threshold_has_no_label(capsys, photo, command):
    command = [*command, "photo.png", "--multi_label", "--labels", "red fuzzy shape"]
    [every], _ = samclip(capsys, *command, "--threshold", "0")
    scores = sorted(mask["label_score"] for mask in every["masks"])
    assert {mask["label"] for mask in every["masks"]} == {"red fuzzy shape"} and scores[0] < 0.5
    high = scores[-1] + 1e-6
    default, strict = (
        samclip(capsys, *command, *options)[0][0]["masks"] for options in ([], ["--threshold", f"{high}"])
    )
    for mask, other, some in zip(every["masks"], default, strict, strict=True):
        unnamed = {"label": None, "label_id": 0}
        assert some == mask | unnamed
        assert other == (mask if mask["label_score"] >= 0.5 else mask | unnamed)
        assert list(mask["label_scores"]) == ["red fuzzy shape"]
    formats = ["--threshold", f"{high}", "--formats", "overlay,labelmap,coco,masks", "--output", "out"]
    samclip(capsys, *command, *formats)
    assert json.loads(Path("out/coco_results.json").read_text()) == []
    assert not np.asarray(Image.open("out/photo_labels.png")).any()
    overlay = np.asarray(Image.open("out/photo.png"))[: SIZE[1], : SIZE[0]]
    assert np.array_equal(overlay, np.asarray(photo))
    assert "001.png" in {path.name for path in Path("out/photo_masks").iterdir()}


def test_masks_of_the_background_are_not_in_the_overlay(capsys, photo):
    texts = ["--labels", "green zigzag shape", "--background", "red fuzzy shape, a photo of a red fuzzy shape"]
    command = ["points", "--points", "45,20", "photo.png", *texts]
    [record], _ = samclip(capsys, *command)
    assert [mask["label_id"] for mask in record["masks"]] == [0]
    samclip(capsys, *command, "--output", "out.png")
    assert np.array_equal(np.asarray(Image.open("out.png"))[: SIZE[1], : SIZE[0]], np.asarray(photo))
    assert label_legend(["cat"], [0, 1, 0, 1], [0.9, 0.6, 0.8, 0.7], "masks") == [(1, "cat 0.70 (2 masks)")]
    assert label_legend(["cat"], [0, 0], [0.9, 0.6], "masks") == [(None, "no masks with these labels")]


def test_every_mask_of_everything_mode_gets_a_name(capsys):
    options = ["masks", "photo.png", "--points_per_crop", "6"]
    [plain], _ = samclip(capsys, *options)
    [named], _ = samclip(capsys, *options, *LABELS)
    assert len(named["masks"]) == len(plain["masks"]) >= 3
    for mask, without_name in zip(named["masks"], plain["masks"], strict=True):
        assert mask == mask | without_name and 0 < mask["label_score"] <= 1
        assert mask["label_id"] == ["background", *LABELS[1].split(", ")].index(mask["label"])
    assert {"red fuzzy shape", "green zigzag shape"} <= {mask["label"] for mask in named["masks"]}


def test_prompts_from_a_file_are_those_of_the_output(capsys, photo):
    photo.crop((0, 0, 100, 100)).save("other.png")
    objects = [{"points": [[40, 30], [60.5, 40]], "point_labels": [1, 0]}, {"box": [11, 3, 76, 56]}]
    Path("prompts.json").write_text(json.dumps({"photo.png": objects, "./other.png": [{"points": [[40, 30]]}]}))
    records, messages = samclip(capsys, "points", "photo.png", "./other.png", "--prompts", "prompts.json")
    assert messages == []
    keys = ("points", "point_labels", "box")
    found = [[{key: mask[key] for key in keys if key in mask} for mask in record["masks"]] for record in records]
    assert found == [objects, [{"points": [[40, 30]], "point_labels": [1]}]]
    [from_arguments], _ = samclip(capsys, "points", "photo.png", "--boxes", "11,3,76,56")
    assert from_arguments["masks"][0] == records[0]["masks"][1]
    Path("prompts.json").write_text(json.dumps({"photo.png": objects}))
    records, messages = samclip(capsys, "points", "photo.png", "other.png", "--prompts", "prompts.json", status=1)
    assert len(records) == 1 and any("other.png: --prompts has no entry 'other.png'" in line for line in messages)


def test_points_and_boxes_are_parsed():
    expected = [[[120, 80, 1], [40.5, 30, 0]], [[200, 90, 1]]]
    assert parse_points("120,80  40.5 , 30,0 ; 200,90,1;") == expected
    assert parse_boxes("1, 2, 3, 4;5,6,7,8") == [[1, 2, 3, 4], [5, 6, 7, 8]]
    for text in ("", ";", "1,2;;3,4", "1", "1,2,3,4", "a,b", "1,2,2", "1,2,-1", "1,2,0"):
        with pytest.raises(CommandError, match="--points"):
            parse_points(text)
    for text in ("", "1,2,3", "3,2,1,4", "1,2,1,4", "1,2,3,x"):
        with pytest.raises(CommandError, match="--boxes"):
            parse_boxes(text)


WRONG_ARGUMENTS = {
    "no prompts": ([], 'pass --points, such as "120,80"'),
    "prompts twice": (["--prompts", "p.json", "--points", "1,2"], "either --prompts, or --points and --boxes"),
    "other numbers": (["--points", "1,2;3,4", "--boxes", "1,2,3,4"], "--points has 2 objects and --boxes 1"),
    "outside only": (["--points", "1,2,0"], "add one inside"),
    "labels": (["--points", "1,2", "--template", "a {}"], "--template requires"),
    "independent": (["--points", "1,2", "--multi_label"], "--multi_label requires --labels"),
    "threshold": (["--points", "1,2", "--threshold", "0.3"], "--threshold requires --labels"),
    "no effect": (["--points", "1,2", "--multi_label", *LABELS], "--background has no effect with --multi_label"),
    "no file": (["--prompts", "nosuch.json"], "--prompts nosuch.json: No such file"),
}


@pytest.mark.parametrize("arguments, part", WRONG_ARGUMENTS.values(), ids=WRONG_ARGUMENTS)
def test_wrong_prompts_give_one_message(capsys, arguments, part):
    records, [message] = samclip(capsys, "points", "photo.png", *arguments, status=2)
    assert records == [] and message.startswith("samclip points: ") and part in message


WRONG_FILES = {
    "no JSON": ("[", "cannot be read: Expecting value"),
    "a list": ("[]", "must be an object of images"),
    "an image twice": ('{"a": [], "a": []}', "'a' is repeated"),
    "no objects": ('{"a": []}', "at least one object"),
    "other keys": ('{"a": [{"point": [1, 2]}]}', "'a', object 1 must have points or a box"),
    "one level less": ('{"a": [{"points": [1, 2]}]}', "points must be a list of [x, y]"),
    "no points": ('{"a": [{"points": []}]}', "points must be a list of [x, y]"),
    "a string": ('{"a": [{"points": [["1", 2]]}]}', "points must be a list of [x, y]"),
    "labels": ('{"a": [{"points": [[1, 2]], "point_labels": [1, 0]}]}', "point_labels must have"),
    "box": ('{"a": [{"box": [1, 2]}]}', "box must be [x1, y1, x2, y2]"),
    "box of COCO": ('{"a": [{"box": [100, 100, 50, 50]}]}', "100,100,50,50 is not x1,y1,x2,y2"),
}


@pytest.mark.parametrize("content, part", WRONG_FILES.values(), ids=WRONG_FILES)
def test_wrong_files_of_prompts_give_one_message(capsys, content, part):
    Path("p.json").write_text(content)
    records, [message] = samclip(capsys, "points", "photo.png", "--prompts", "p.json", status=2)
    assert records == [] and message.startswith("samclip points: --prompts p.json") and part in message


@pytest.mark.parametrize(
    "prompt, part",
    [
        (["--points", "10,10; 20,20 151,5"], "the point 151,5 of object 2 is outside the image, which is 150 wide"),
        (["--boxes", "10,10,20,108"], "the box 10,10,20,108 of object 1 extends beyond the image"),
        (["--boxes", "160,10,170,100"], "the box 160,10,170,100 of object 1 is outside the image"),
        (["--points", "-5,30"], "the point -5,30 of object 1 is outside the image"),
        (["--points", "nan,5"], "the point nan,5 of object 1"),
    ],
)
def test_prompts_outside_the_image_are_named(capsys, prompt, part):
    records, messages = samclip(capsys, "points", "photo.png", *prompt, status=1)
    assert records == [] and part in messages[0]
