"""`samclip segment --examples` on the shipped miniature, compared with `embed_examples`."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import pipeline

from samclip_cli import main
from samclip_cli.examples import _read_folder, _round_to_image
from samclip_cli.formats import Prediction, encode
from samclip_hf import SamClipForImageSegmentation, SamClipProcessor, miniature
from samclip_hf.images import encode_mask, mask_to_coco_box
from samclip_hf.miniature.scenes import render

SCENE = render(seed=0, index=8)  # a red fuzzy, a green zigzag and a red dotted shape
IMAGE = Image.fromarray(SCENE.image)
OTHER = IMAGE.transpose(Image.Transpose.ROTATE_90)
NAMES = ["part 1", "part 2", "part 3"]
WORDS = ["--labels", "red fuzzy shape, blue solid shape", "--background", "an empty scene", "--template", "a {}"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working directory with an image to segment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    OTHER.save("other.png")
    return tmp_path


def write_coco(changes: dict | None = None, with_masks: bool = False) -> dict:
    """A COCO file `shown/parts.json` of one image with three examples and a crowd."""
    Path("shown").mkdir()
    IMAGE.save("shown/shown.png")
    content = {
        "images": [{"id": 5, "file_name": "shown.png", "height": 128, "width": 128}],
        "categories": [{"id": 10 * number, "name": name} for number, name in enumerate(NAMES, start=1)],
        "annotations": [
            {"image_id": 5, "category_id": 10 * number, "bbox": mask_to_coco_box(mask)}
            | ({"segmentation": encode_mask(mask, compressed=number == 1)} if with_masks else {})
            for number, mask in enumerate(SCENE.masks, start=1)
        ]
        + [{"image_id": 5, "category_id": 10, "bbox": [0, 0, 9, 9], "iscrowd": 1}],
    } | (changes or {})
    Path("shown/parts.json").write_text(json.dumps(content))
    return content


def segment(capsys, *arguments: str) -> tuple[list[dict], str]:
    assert main(["segment", "other.png", "--threshold", "0.3", *arguments]) == 0
    out, err = capsys.readouterr()
    return json.loads(out)["segments"], err


def expect(words: bool = False, **examples) -> list[dict]:
    """The segments with a vocabulary of the same examples."""
    model = SamClipForImageSegmentation.from_pretrained(miniature.checkpoint())
    processor = SamClipProcessor.from_pretrained(miniature.checkpoint())
    if words:
        names, background = ["red fuzzy shape", "blue solid shape"], ["an empty scene"]
        examples["vocabulary"] = model.embed_vocabulary(names, background, "a {}", processor.tokenizer)
    model.set_vocabulary(model.embed_examples(**examples, processor=processor))
    parts = {"tokenizer": processor.tokenizer, "image_processor": processor.image_processor}
    found = pipeline("zero-shot-image-segmentation", model=model, **parts)(OTHER, threshold=0.3)
    assert len(found) >= 2
    return found


def check(found: list[dict], expected: list[dict]) -> None:
    assert [own["label"] for own in found] == [own["label"] for own in expected]
    assert [own["score"] for own in found] == pytest.approx([own["score"] for own in expected], abs=1e-4)
    assert [own["area"] for own in found] == [int((np.asarray(own["mask"]) > 0).sum()) for own in expected]


def test_boxes_of_a_coco_file(capsys):
    write_coco()
    found, messages = segment(capsys, "--examples", "shown/parts.json")
    boxes = [[x, y, x + width, y + height] for x, y, width, height in map(mask_to_coco_box, SCENE.masks)]
    check(found, expect(images=[IMAGE], labels=[NAMES], boxes=[boxes], background="surroundings"))
    assert "3 examples of 3 labels in 1 images: part 1 (1), part 2 (1), part 3 (1)." in messages
    assert "1 annotations of crowds or without area are skipped" in messages


def test_masks_of_a_coco_file_with_words(capsys):
    write_coco(with_masks=True)
    found, _ = segment(capsys, "--examples", "shown/parts.json", *WORDS)
    check(found, expect(True, images=[IMAGE], labels=[NAMES], masks=[SCENE.masks]))


def test_masks_in_a_folder(capsys):
    for name, mask in zip(NAMES, SCENE.masks, strict=True):
        Path("parts", name).mkdir(parents=True)
        IMAGE.save(f"parts/{name}/photo.png")
        Image.fromarray(mask).save(f"parts/{name}/photo_mask.png")
    found, _ = segment(capsys, "--examples", "parts", "--background", "an empty scene")
    masks = [[mask] for mask in SCENE.masks]
    labels = [[name] for name in NAMES]
    check(found, expect(images=[IMAGE] * 3, labels=labels, masks=masks, background=["an empty scene"]))


def test_a_mask_of_0_and_1_is_refused(capsys):
    Path("parts/one").mkdir(parents=True)
    IMAGE.save("parts/one/photo.png")
    Image.fromarray(SCENE.masks[0].astype(np.uint8)).save("parts/one/photo_mask.png")
    assert main(["segment", "other.png", "--examples", "parts", "--background", "an empty scene"]) == 2
    message = capsys.readouterr().err
    assert "photo_mask.png: the largest value is 1. The object must be white, 255, and the rest black, 0." in message


@pytest.mark.parametrize(
    "kind, message",
    [
        ("cutout", "a mask must not be transparent"),
        ("alpha", "a mask must not be transparent"),
        ("photo", "a mask must not have colors"),
        ("classes", "a mask must not have colors"),
    ],
)
def test_a_mask_that_is_another_image_is_refused(capsys, kind, message):
    """Its gray values would be another mask than the object."""
    Path("parts/one").mkdir(parents=True)
    IMAGE.save("parts/one/photo.png")
    mask = Image.fromarray(SCENE.masks[0].astype(np.uint8) * 255)
    classes = Image.fromarray(SCENE.masks[0].astype(np.uint8) + 2 * SCENE.masks[1].astype(np.uint8)).convert("P")
    classes.putpalette([0, 0, 0, 0, 255, 0, 255, 255, 0])
    images = {
        "cutout": Image.merge("RGBA", (*IMAGE.split(), mask)),
        "alpha": Image.merge("LA", (Image.new("L", mask.size, 255), mask)),
        "photo": IMAGE,
        "classes": classes,
    }
    images[kind].save("parts/one/photo_mask.png")
    assert main(["segment", "other.png", "--examples", "parts", "--background", "an empty scene"]) == 2
    assert f"photo_mask.png: {message}" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "P", "I;16", "JPEG"])
def test_masks_of_all_modes_are_equal(mode):
    Path("parts/one").mkdir(parents=True)
    IMAGE.save("parts/one/photo.png")
    mask = Image.fromarray(SCENE.masks[0].astype(np.uint8) * 255)
    if mode == "I;16":
        mask = Image.fromarray(SCENE.masks[0].astype(np.uint16) * 65535)
    elif mode == "JPEG":
        mask.convert("RGB").save("parts/one/photo_mask.jpg", quality=95)
    else:
        mask = mask.convert(mode)
    if mode != "JPEG":
        mask.save("parts/one/photo_mask.png")
    (example,) = _read_folder(Path("parts"))
    assert np.array_equal(example.masks()[0], SCENE.masks[0])


def test_names_of_words_are_no_other_labels_of_examples(capsys):
    write_coco({"categories": [{"id": 10 * n, "name": name} for n, name in enumerate(["a cup", "mug", "jar"], 1)]})

    def refuse(*arguments: str) -> str:
        assert main(["segment", "other.png", "--examples", "shown/parts.json", *arguments]) == 2
        return capsys.readouterr().err

    background = ["--background", "an empty scene"]
    assert "label 'mug' of --examples is a synonym of 'cup' in --labels" in refuse("--labels", "cup|Mug", *background)
    assert "'A Cup' in --background is a label of --examples" in refuse("--labels", "lid", "--background", "A Cup")
    assert "'A cup' in --background is a label of --examples" in refuse("--background", "A cup")
    assert "labels 'Jar' and 'jar' differ in capitals" in refuse("--labels", "lid, Jar", *background)


def test_annotations_that_are_not_used_are_reported(capsys):
    content = write_coco(with_masks=True)
    content["categories"].append({"id": 99, "name": "part 4"})
    content["annotations"][1].pop("segmentation")
    Path("shown/parts.json").write_text(json.dumps(content))
    _, messages = segment(capsys, "--examples", "shown/parts.json")
    assert "1 of 3 annotations have no mask, so the boxes of all of them are used" in messages
    assert "1 of 4 categories have no examples, so they are no labels: part 4." in messages


def test_cutouts_in_a_folder(capsys):
    cutouts = []
    for name, mask in zip(NAMES, SCENE.masks, strict=True):
        Path("parts", name).mkdir(parents=True)
        cutout = IMAGE.copy()
        cutout.putalpha(Image.fromarray(mask.astype(np.uint8) * 255))
        cutout.save(f"parts/{name}/cutout.png")
        cutouts.append(Image.composite(IMAGE, Image.new("RGB", IMAGE.size, "gray"), cutout.getchannel("A")))
    found, _ = segment(capsys, "--examples", "parts", "--background", "an empty scene")
    labels, masks = [[name] for name in NAMES], [[mask] for mask in SCENE.masks]
    check(found, expect(images=cutouts, labels=labels, masks=masks, background=["an empty scene"]))
    assert main(["segment", "other.png", "--examples", "parts"]) == 2
    assert "cut-outs, which have no surroundings" in capsys.readouterr().err


@pytest.mark.parametrize("alpha", [255, 200])
def test_an_image_with_alpha_that_is_transparent_nowhere_is_no_cutout(capsys, alpha):
    """Such as a screenshot, which otherwise would be an example of the whole image."""
    Path("parts/one").mkdir(parents=True)
    image = IMAGE.copy()
    image.putalpha(alpha)
    image.save("parts/one/photo.png")
    command = ["segment", "other.png", "--examples", "parts", "--multi_label"]
    assert main(command) == 2
    message = capsys.readouterr().err
    assert "parts/one/photo.png is neither a cut-out, which is transparent outside the object" in message
    Image.fromarray(SCENE.masks[0].astype(np.uint8) * 255).save("parts/one/photo_mask.png")
    (example,) = _read_folder(Path("parts"))
    assert not example.is_cutout and np.array_equal(example.masks()[0], SCENE.masks[0])


def test_a_written_cutout_whose_object_fills_it_is_one():
    mask = np.zeros(SCENE.label_map.shape, dtype=bool)
    mask[20:60, 30:90] = True
    prediction = Prediction({}, [], "a model", [mask], [1], ["one"])
    [(name, content)] = encode(IMAGE, {}, prediction, ["cutouts"], "photo").items()
    Path("parts/one").mkdir(parents=True)
    Path("parts/one", Path(name).name).write_bytes(content)
    (example,) = _read_folder(Path("parts"))
    assert example.is_cutout and example.masks()[0].shape == (40, 60) and example.masks()[0].all()
    assert np.array_equal(np.asarray(example.read()), np.asarray(IMAGE)[20:60, 30:90])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"annotations": []}, "has no annotations"),
        ({"categories": [{"id": 10, "name": "mug"}, {"id": 10, "name": "cup"}]}, "two categories have the id 10"),
        ({"images": [{"id": 5, "file_name": "shown.png"}] * 2}, "two images have the id 5"),
        ({"categories": [{"id": 10, "name": "mug"}, {"id": 11, "name": "mug"}]}, "two categories have the name 'mug'"),
        (
            {"annotations": [{"image_id": 5, "category_id": 10, "bbox": [100, 0, 60, 9]}]},
            "shown/shown.png, which is 128 wide and 128 high, contain [[100.0, 0.0], [160.0, 9.0]], which is outside",
        ),
        ({"categories": []}, "10 is missing or unknown"),
        (
            {"annotations": [{"image_id": 5, "category_id": 10, "bbox": ["1", 0, 6, 9]}]},
            "bbox must be left, top, width and height, got ['1', 0, 6, 9]",
        ),
        (
            {"annotations": [{"image_id": 5, "category_id": 10, "segmentation": {"counts": [9]}}]},
            "shown/shown.png: A run-length encoding has",
        ),
        ({"images": [{"id": 5, "file_name": "lost.png"}]}, "there is no image shown/lost.png"),
        (
            {"images": [{"id": 5, "file_name": "shown.png", "height": 64, "width": 128}]},
            "annotations are for 128 x 64",
        ),
        (
            {
                "annotations": [{"image_id": 5, "category_id": 10, "bbox": [100, 0, 200, 9]}],
                "images": [{"id": 5, "file_name": "shown.png"}],
            },
            "outside the image",
        ),
    ],
)
def test_wrong_coco_files_are_refused(capsys, changes, message):
    write_coco(changes)
    assert main(["segment", "other.png", "--examples", "shown/parts.json"]) == 2
    assert message in capsys.readouterr().err


def test_wrong_folders_and_options_are_refused(capsys):
    def refuse(*arguments: str) -> str:
        assert main(["segment", "other.png", *arguments]) == 2
        return capsys.readouterr().err

    assert "must be a COCO file (.json) or a folder" in refuse("--examples", "other.png")
    assert "has no subfolders" in refuse("--examples", ".")
    Path("parts/one").mkdir(parents=True)
    assert "parts/one has no images" in refuse("--examples", "parts")
    IMAGE.save("parts/one/photo.png")
    assert "neither a cut-out" in refuse("--examples", "parts")
    Image.new("L", (128, 128)).save("parts/one/photo_mask.png")
    assert "has no pixels" in refuse("--examples", "parts")
    Path("parts/one/photo_mask.png").write_bytes(b"")
    assert "photo_mask.png: the file is empty (0 bytes)" in refuse("--examples", "parts")
    assert "--template has no effect" in refuse("--examples", "parts", "--template", "a {}")
    Path("parts/one/photo.png").unlink()
    assert "there is no image for the mask" in refuse("--examples", "parts")


def test_images_of_a_folder_that_are_not_used_are_reported(capsys, monkeypatch):
    Path("parts/one").mkdir(parents=True)
    IMAGE.save("parts/one/photo.png")
    Image.fromarray(SCENE.masks[0]).save("parts/one/photo_mask.png")
    IMAGE.save("parts/loose.png")
    arguments = ["segment", "other.png", "--examples", "parts"]
    assert main([*arguments, "--output", "out"]) == 0
    assert "parts: skipping 1 images that are not in a subfolder of a label, such as parts/loose.png" in (
        capsys.readouterr().err
    )
    IMAGE.rotate(90).save("parts/one/photo.jpg")
    assert main(arguments) == 2
    assert "parts/one/photo.jpg and parts/one/photo.png have the same name" in capsys.readouterr().err
    for name in ("photo.jpg", "photo_mask.png"):
        Path("parts/one", name).unlink()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow raises an error at twice this number
    assert main(arguments) == 2
    assert "parts/one/photo.png cannot be read: " in capsys.readouterr().err


def test_boxes_exceed_the_image_by_rounding_only():
    size = (128, 96)
    assert _round_to_image([-0.4, 3.5, 128.6, 96.9], size) == [0, 3.5, 128, 96]
    assert _round_to_image([-1.5, 3.5, 129.5, 96], size) == [-1.5, 3.5, 129.5, 96]
