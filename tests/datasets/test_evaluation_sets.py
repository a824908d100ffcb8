"""Evaluation sets: each reader opens its layout with two or three small images."""

import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from samclip_hf.datasets import (
    IGNORE_INDEX,
    load_vocabulary,
    open_captions,
    open_classification,
    open_objects,
    open_segmentation,
)
from samclip_hf.datasets.segmentation import SEGMENTATION_NAMES

from .tars import annotation, jpeg, write_tar

SIZE = (6, 4)  # (width, height)
CONTEXT = ("VOCdevkit/VOC2010", "JPEGImages/a.jpg", "SegmentationClassContext/a.png", "SegmentationContext")
GT_FINE = "gtFine/train/x/a_gtFine_labelIds.png"


def write(path: Path, content: bytes | str | list | dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list | dict):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_image(path: Path, seed: int = 0) -> Path:
    """Writes an image of `SIZE`."""
    if path.suffix != ".png":
        return write(path, jpeg(seed, SIZE))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZE).save(path)
    return path


def write_label_map(path: Path, values: list[int]) -> Path:
    """Writes a label map of `SIZE`: the first pixels have `values`, the others the last of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full(SIZE[0] * SIZE[1], values[-1], dtype=np.uint8)
    pixels[: len(values)] = values
    Image.fromarray(pixels.reshape(SIZE[::-1])).save(path)
    return path


def first_values(sample, count: int) -> list[int]:
    label_map = sample.label_map()
    assert label_map.shape == SIZE[::-1]
    return label_map.ravel()[:count].tolist()


def assert_samples(data, keys: list[str]):
    """Checks keys and images, also after pickling."""
    copy = pickle.loads(pickle.dumps(data))
    for samples in (data.samples, copy.samples):
        assert [sample.key for sample in samples] == keys
        assert all(sample.image().mode == "RGB" for sample in samples)
    assert (copy.names, copy.background, copy.description) == (data.names, data.background, data.description)


class TestVocabularies:
    @pytest.mark.parametrize(
        ("name", "length"),
        [
            *(("voc21", 21), ("ade150", 150), ("cityscapes19", 19), ("imagenet", 1000)),
            *(("context60", 60), ("stuff171", 171), ("object81", 81)),
        ],
    )
    def test_lengths(self, name, length):
        vocabulary = load_vocabulary(name)
        assert len(vocabulary.names) == length
        assert vocabulary.source
        assert all(names and all(text == text.strip() != "" for text in names) for names in vocabulary.names)
        if vocabulary.ids is not None:
            assert len(set(vocabulary.ids)) == length - (vocabulary.background is not None)
            assert vocabulary.ids == sorted(vocabulary.ids)

    @pytest.mark.parametrize("name", ["voc21", "ade150", "cityscapes19"])
    def test_names_differ(self, name):
        labels = [names[0] for names in load_vocabulary(name).names]
        assert len(set(labels)) == len(labels)

    def test_known_indices(self):
        imagenet = load_vocabulary("imagenet")
        indices = {class_id: index for index, class_id in enumerate(imagenet.ids)}
        assert imagenet.names[indices["n01440764"]] == ["tench"]
        assert imagenet.names[indices["n02123045"]] == ["tabby cat"]
        assert imagenet.names[indices["n15075141"]] == ["toilet paper"]
        ade = load_vocabulary("ade150").names
        assert [ade[index] for index in (0, 12, 76, 149)] == [["wall"], ["person"], ["boat"], ["flag"]]
        voc = load_vocabulary("voc21")
        assert [voc.names[index] for index in (0, 1, 15, 20)] == [
            ["background"],
            ["aeroplane"],
            ["person"],
            ["tv monitor"],
        ]
        assert len(voc.background) == 26


class TestClassification:
    @pytest.fixture
    def folder(self, tmp_path):
        for name in ("b/2.jpg", "b/1.png", "a/3.JPEG"):
            write_image(tmp_path / "photos" / name)
        return tmp_path / "photos"

    def test_folders(self, folder, tmp_path):
        write(folder / "a/.hidden", "")
        data = open_classification(str(folder), tmp_path)
        assert_samples(data, ["a/3.JPEG", "b/1.png", "b/2.jpg"])
        assert [sample.label for sample in data.samples] == [0, 1, 1]
        assert data.names == [["a"], ["b"]]

    def test_classes_json_names_the_classes(self, folder, tmp_path):
        write(folder / "classes.json", ["ant", ["bee", "honey bee"]])
        assert open_classification(str(folder), tmp_path).names == [["ant"], ["bee", "honey bee"]]

    def test_another_number_of_names_than_of_folders_raises(self, folder, tmp_path):
        write(folder / "classes.json", ["ant"])
        with pytest.raises(ValueError, match=r"2 folders, but 1 classes in classes\.json"):
            open_classification(str(folder), tmp_path)

    def test_numbered_folders_are_sorted_by_number(self, tmp_path):
        for number in range(12):
            write_image(tmp_path / f"photos/{number}/1.jpg")
        write(tmp_path / "photos/classes.json", [f"class {number}" for number in range(12)])
        data = open_classification("photos", tmp_path)
        assert all(data.names[sample.label] == [f"class {sample.key[:-6]}"] for sample in data.samples)

    def test_training_images(self, tmp_path):
        for class_id in load_vocabulary("imagenet").ids:
            write_image(tmp_path / f"imagenet/train/{class_id}/{class_id}_1.JPEG")
        data = open_classification("imagenet", tmp_path, split="train")
        assert data.samples[10].key.startswith("n01530575/n01530575") and data.description["split"] == "train"
        with pytest.raises(FileNotFoundError, match="imagenet/val does not exist"):
            open_classification("imagenet", tmp_path)
        with pytest.raises(ValueError, match="imagenet-v2 has no training images"):
            open_classification("imagenet-v2", tmp_path, split="train")
        with pytest.raises(FileNotFoundError, match=r"places365.* does not exist\. Expected: the training images in"):
            open_classification("places365", tmp_path, split="train")
        write(tmp_path / "places365/categories_places365.txt", "/a/airfield 0\n")
        write(tmp_path / "places365/places365_train_standard.txt", "/a/airfield/00000001.jpg 0\n")
        write_image(tmp_path / "places365/data_256/a/airfield/00000001.jpg")
        assert_samples(open_classification("places365", tmp_path, split="train"), ["/a/airfield/00000001.jpg"])

    def test_a_file_that_is_not_an_image_raises(self, folder, tmp_path):
        write(folder / "a/notes.txt", "")
        with pytest.raises(ValueError, match=r"notes\.txt is not an image"):
            open_classification(str(folder), tmp_path)

    def test_a_class_without_images_raises(self, folder, tmp_path):
        (folder / "c").mkdir()
        with pytest.raises(FileNotFoundError, match=r"photos/c/\*"):
            open_classification(str(folder), tmp_path)

    def test_missing_data_raise_with_the_expected_layout(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"elsewhere does not exist.*one folder of images per class.*tars"):
            open_classification(str(tmp_path / "elsewhere"), tmp_path)

    @pytest.fixture
    def tars(self, tmp_path):
        for tar, (label, name) in enumerate([(7, "zebra"), (2, "yak")]):
            content = {"label": label, "name": name}
            write_tar(tmp_path / f"{tar}.tar", {"x.json": json.dumps(content).encode(), "x.jpg": jpeg(tar, SIZE)})
        return tmp_path

    @pytest.mark.parametrize("pattern", ["", "/*.tar"])
    def test_tars(self, tars, pattern):
        data = open_classification(f"{tars}{pattern}", "")
        assert_samples(data, ["0/x", "1/x"])
        assert data.names == [["yak"], ["zebra"]]
        assert [sample.label for sample in data.samples] == [1, 0]
        assert data.samples[0].image().size == SIZE
        assert np.array_equal(np.asarray(data.samples[1].image()), decoded(1))

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ({"y.jpg": b""}, "'y' has no json file"),
            ({"y.json": b'{"label": 1, "name": "a"}'}, "'y' has no image"),
            ({"y.jpg": b"", "y.json": b'{"label": 1}'}, r"y\.json must have an integer 'label'"),
            ({"y.jpg": b"", "y.json": b'{"label": 7, "name": "ape"}'}, "names class 7 'ape', other samples 'zebra'"),
            ({"y.jpg": b"", "y.json": b"{"}, r"y\.json is not valid JSON"),
        ],
    )
    def test_incomplete_tars_raise(self, tars, files, message):
        write_tar(tars / "2.tar", files)
        with pytest.raises(ValueError, match=rf"2\.tar: .*{message}"):
            open_classification(str(tars), "")

    def test_a_truncated_tar_raises(self, tars):
        content = (tars / "1.tar").read_bytes()
        (tars / "1.tar").write_bytes(content[:700])
        with pytest.raises(ValueError, match=r"1\.tar is not a readable tar"):
            open_classification(str(tars), "")

    @pytest.mark.parametrize("name", ["imagenet", "imagenet-v2"])
    def test_imagenet(self, tmp_path, name):
        if name == "imagenet":
            folder, classes, extension = tmp_path / "imagenet/val", load_vocabulary("imagenet").ids, "JPEG"
        else:
            folder = tmp_path / "imagenetv2-matched-frequency-format-val"
            classes, extension = [str(number) for number in range(1000)], "jpeg"
        for class_folder in classes:
            write_image(folder / class_folder / f"1.{extension}")
        data = open_classification(name, tmp_path)
        assert [sample.label for sample in data.samples] == list(range(1000))
        assert data.samples[10].key == f"{classes[10]}/1.{extension}"
        assert data.names[10] == ["brambling"]
        (folder / "extra").mkdir()
        with pytest.raises(ValueError, match="extra"):
            open_classification(name, tmp_path)
        (folder / classes[3]).rename(tmp_path / "away")
        with pytest.raises(FileNotFoundError, match=rf"/{classes[3]} does not exist.*https://"):
            open_classification(name, tmp_path)


def decoded(seed: int) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(jpeg(seed, SIZE))).convert("RGB"))


class TestCaptions:
    @pytest.mark.parametrize("name", ["flickr30k", "coco-captions"])
    def test_karpathy(self, tmp_path, name):
        is_flickr = name == "flickr30k"
        folder = tmp_path / ("flickr30k" if is_flickr else "coco")
        images = folder / ("flickr30k-images" if is_flickr else "val2014")
        entries = []
        for number, split in [(2, "test"), (1, "test"), (3, "train")]:
            sentences = [{"raw": f"caption {number}."}, {"raw": f"another {number}. "}]
            entries.append({"filename": f"{number}.jpg", "split": split, "sentences": sentences})
            entries[-1] |= {} if is_flickr else {"filepath": "val2014"}
        write(folder / f"dataset_{folder.name}.json", {"images": entries})
        write_image(images / "1.jpg")
        with pytest.raises(FileNotFoundError, match=r"2\.jpg does not exist.*Karpathy's splits from https://"):
            open_captions(name, tmp_path)
        write_image(images / "2.jpg")
        data = open_captions(name, tmp_path)
        assert_samples(data, ["1.jpg", "2.jpg"])
        assert data.samples[1].captions == ("caption 2.", "another 2.")
        assert data.names is None

    def test_tars(self, tmp_path):
        write_tar(tmp_path / "0.tar", {"x.jpg": jpeg(0), "x.txt": b"a dog\n\na caf\xc3\xa9\n"})
        data = open_captions(str(tmp_path), "")
        assert_samples(data, ["0/x"])
        assert data.samples[0].captions == ("a dog", "a café")
        write_tar(tmp_path / "1.tar", {"x.jpg": jpeg(0), "x.txt": b"\n"})
        with pytest.raises(ValueError, match=r"1\.tar: '1/x' has no caption"):
            open_captions(str(tmp_path), "")

    def test_missing_data_raise_with_the_expected_layout(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"elsewhere does not exist.*jpg and txt"):
            open_captions(str(tmp_path / "elsewhere"), "")
        with pytest.raises(FileNotFoundError, match=r"dataset_coco\.json does not exist.*https://"):
            open_captions("coco-captions", tmp_path)


class TestObjects:
    @pytest.fixture(params=["coco", "lvis"])
    def known(self, request, tmp_path):
        """Two images, of which the first has two objects."""
        images = [{"id": number, "width": 6, "height": 4} for number in (9, 4)]
        for image in images:
            folder = "train2017" if request.param == "lvis" and image["id"] == 9 else "val2017"
            write_image(tmp_path / "coco" / folder / f"{image['id']}.jpg")
            image |= {"file_name": f"{image['id']}.jpg", "coco_url": f"http://x/{folder}/{image['id']}.jpg"}
            image["neg_category_ids"] = [3]
        box = {"bbox": [0, 0, 2, 2], "area": 4, "segmentation": [[0, 0, 2, 0, 2, 2]]}
        annotations = [{"id": number, "image_id": 4, "category_id": 3, **box} for number in (0, 1)]
        content = {"images": images, "annotations": annotations, "categories": [{"id": 3, "name": "cat"}]}
        file = "coco/annotations/instances_val2017.json" if request.param == "coco" else "lvis/lvis_v1_val.json"
        write(tmp_path / file, content)
        return request.param, tmp_path, file, content

    def test_annotations(self, known):
        name, root, _, content = known
        data = open_objects(name, root)
        assert_samples(data, ["4.jpg", "9.jpg"])
        first, second = data.samples
        assert first.objects() == [{"iscrowd": 0, **annotation} for annotation in content["annotations"]]
        assert second.objects() == []
        assert first.detections == []
        assert first.image_info == content["images"][1]
        assert data.description["categories"] == content["categories"]
        assert "boxes" not in data.description

    def test_detections(self, known):
        name, root, _, _ = known
        detection = {"image_id": 9, "category_id": 3, "bbox": [0, 0, 1, 1], "score": 0.5}
        file = write(root / "detector.json", [detection])
        data = open_objects(name, root, file)
        assert [sample.detections for sample in data.samples] == [[], [detection]]
        assert data.description["boxes"] == "detector.json"
        for wrong in ({"image_id": 5}, {"category_id": 5}):
            write(file, [detection | wrong])
            with pytest.raises(ValueError, match=r"detector\.json: .*unknown image or category"):
                open_objects(name, root, file)
        write(file, [{"image_id": 9}])
        with pytest.raises(ValueError, match="no bbox, category_id, score"):
            open_objects(name, root, file)
        with pytest.raises(FileNotFoundError, match=r"other\.json"):
            open_objects(name, root, root / "other.json")

    def test_an_annotation_of_an_unknown_image_raises(self, known):
        name, root, file, content = known
        content["annotations"][1]["image_id"] = 5
        write(root / file, content)
        with pytest.raises(ValueError, match=r"\.json: annotation 1 is of an unknown image"):
            open_objects(name, root)

    def test_missing_image(self, known):
        name, root, _, _ = known
        (root / "coco/val2017/4.jpg").unlink()
        with pytest.raises(FileNotFoundError, match=r"4\.jpg does not exist.*https://cocodataset\.org"):
            open_objects(name, root)

    def test_sa1b(self, tmp_path):
        mask = np.zeros(SIZE[::-1], dtype=bool)
        mask[:2] = True
        image = {"image_id": 5, "width": 6, "height": 4, "file_name": "sa_5.jpg"}
        content = json.dumps({"image": image, "annotations": [annotation(mask)]}).encode()
        write_tar(tmp_path / "0.tar", {"sa_5.jpg": jpeg(0, SIZE), "sa_5.json": content})
        detections = [{"image_id": 5, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 0.5}]
        data = open_objects(str(tmp_path / "0.tar"), "", write(tmp_path / "boxes.json", detections))
        assert_samples(data, ["0/sa_5"])
        sample = pickle.loads(pickle.dumps(data.samples[0]))
        assert sample.objects() == [{"category_id": 1, "iscrowd": 0, "bbox": [0, 0, 6, 2], **annotation(mask)}]
        assert sample.image_info == {**image, "id": 5}
        assert sample.detections == detections
        assert "categories" not in data.description
        write_tar(tmp_path / "1.tar", {"sa_5.jpg": jpeg(0, SIZE), "sa_5.json": content})
        with pytest.raises(ValueError, match=r"1\.tar: sa_5\.json has the image id 5"):
            open_objects(str(tmp_path), "")


class TestSegmentation:
    @pytest.mark.parametrize("name", ["voc20", "voc21"])
    def test_voc(self, tmp_path, name):
        folder = tmp_path / "VOCdevkit/VOC2012"
        write(folder / "ImageSets/Segmentation/val.txt", "b\na\n")
        for stem in "abc":  # c is of another split
            write_image(folder / f"JPEGImages/{stem}.jpg")
            write_label_map(folder / f"SegmentationClass/{stem}.png", [0, 1, 20, 255])
        data = open_segmentation(name, tmp_path)
        assert_samples(data, ["a", "b"])
        if name == "voc21":
            assert first_values(data.samples[0], 4) == [0, 1, 20, IGNORE_INDEX]
            assert data.names[0] == ["background"]
            assert data.background[0] == "sky"
        else:
            assert first_values(data.samples[0], 4) == [IGNORE_INDEX, 0, 19, IGNORE_INDEX]
            assert data.names[0] == ["aeroplane"]
            assert data.background is None
        (folder / "SegmentationClass/b.png").unlink()
        with pytest.raises(FileNotFoundError, match=r"SegmentationClass/b\.png does not exist.*VOC2012.*http"):
            open_segmentation(name, tmp_path)

    def test_voc_label_map_with_a_palette(self, tmp_path):
        folder = tmp_path / "VOCdevkit/VOC2012"
        write(folder / "ImageSets/Segmentation/val.txt", "a\n")
        write_image(folder / "JPEGImages/a.jpg")
        file = write_label_map(folder / "SegmentationClass/a.png", [15, 255, 0])
        label_map = Image.open(file)
        label_map.putpalette(bytes(range(256)) * 3)
        label_map.save(file)
        assert Image.open(file).mode == "P"
        assert first_values(open_segmentation("voc21", tmp_path).samples[0], 3) == [15, IGNORE_INDEX, 0]

    def test_ade(self, tmp_path):
        folder = tmp_path / "ADEChallengeData2016"
        for number in (2, 1):
            write_image(folder / f"images/validation/{number}.jpg")
            write_label_map(folder / f"annotations/validation/{number}.png", [0, 1, 150])
        data = open_segmentation("ade150", tmp_path)
        assert_samples(data, ["1", "2"])
        assert first_values(data.samples[1], 3) == [IGNORE_INDEX, 0, 149]
        write_label_map(folder / "annotations/validation/1.png", [151])
        with pytest.raises(ValueError, match=r"1\.png has values without a class: \[151\]"):
            data.samples[0].label_map()

    def test_cityscapes(self, tmp_path):
        folder = tmp_path / "cityscapes"
        for stem in ("b/b_1", "a/a_2"):
            write_image(folder / f"leftImg8bit/val/{stem}_leftImg8bit.png")
            write_label_map(folder / f"gtFine/val/{stem}_gtFine_labelIds.png", [0, 7, 8, 9, 33, 255])
        data = open_segmentation("cityscapes", tmp_path)
        assert_samples(data, ["a_2_leftImg8bit", "b_1_leftImg8bit"])
        assert first_values(data.samples[0], 6) == [IGNORE_INDEX, 0, 1, IGNORE_INDEX, 18, IGNORE_INDEX]
        (folder / "gtFine/val/a/a_2_gtFine_labelIds.png").unlink()
        with pytest.raises(FileNotFoundError, match=r"a_2_gtFine_labelIds\.png does not exist.*https://"):
            open_segmentation("cityscapes", tmp_path)

    @pytest.mark.parametrize(("name", "expected"), [("context60", [0, 1, 59]), ("context59", [IGNORE_INDEX, 0, 58])])
    def test_context(self, tmp_path, name, expected):
        folder = tmp_path / "VOCdevkit/VOC2010"
        write(folder / "ImageSets/SegmentationContext/val.txt", "a\n")
        write_image(folder / "JPEGImages/a.jpg")
        write_label_map(folder / "SegmentationClassContext/a.png", [0, 1, 59, 255])
        data = open_segmentation(name, tmp_path)
        assert first_values(data.samples[0], 4) == [*expected, IGNORE_INDEX]
        assert data.names[-1] == ["wood"] and (data.background is None) == (name == "context59")

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            # person, toothbrush, no class, banner, wood, unlabeled
            ("stuff171", [0, 79, IGNORE_INDEX, 80, 170, IGNORE_INDEX]),
            ("object81", [1, 80, 0, 0, 0, 0]),
        ],
    )
    def test_coco_stuff_and_objects(self, tmp_path, name, expected):
        write_image(tmp_path / "coco/val2017/a.jpg")
        write_label_map(tmp_path / "coco/stuffthingmaps/val2017/a.png", [0, 89, 11, 91, 181, 255])
        data = open_segmentation(name, tmp_path)
        assert first_values(data.samples[0], 6) == expected
        assert [data.names[index] for index in expected[:2]] == [["person"], ["toothbrush"]]
        assert (data.background is None) == (name == "stuff171")

    def test_coco_panoptic(self, tmp_path):
        annotations = tmp_path / "coco/annotations"
        content = {
            "images": [{"id": 7, "file_name": "a.jpg"}],
            "categories": [{"id": 199, "name": "wall-other-merged"}, {"id": 1, "name": "person"}],
            "annotations": [
                {
                    "image_id": 7,
                    "file_name": "a.png",
                    "segments_info": [{"id": 70000, "category_id": 199}, {"id": 5, "category_id": 1}],
                }
            ],
        }
        write(annotations / "panoptic_val2017.json", content)
        write_image(tmp_path / "coco/val2017/a.jpg")
        pixels = np.zeros((*SIZE[::-1], 3), dtype=np.uint8)
        pixels[0, 0], pixels[0, 1] = (5, 0, 0), (70000 % 256, 70000 // 256 % 256, 70000 // 256**2)
        (annotations / "panoptic_val2017").mkdir()
        Image.fromarray(pixels).save(annotations / "panoptic_val2017/a.png")
        data = open_segmentation("panoptic133", tmp_path)
        assert_samples(data, ["a"])
        assert data.names == [["person"], ["wall"]]
        assert first_values(data.samples[0], 3) == [0, 1, IGNORE_INDEX]
        pixels[0, 2] = (9, 0, 0)
        Image.fromarray(pixels).save(annotations / "panoptic_val2017/a.png")
        with pytest.raises(ValueError, match=r"values without a class: \[9\]"):
            data.samples[0].label_map()
        del content["annotations"][0]["segments_info"]
        write(annotations / "panoptic_val2017.json", content)
        with pytest.raises(ValueError, match=r"panoptic_val2017\.json has no 'segments_info'"):
            open_segmentation("panoptic133", tmp_path)

    @pytest.mark.parametrize(
        ("name", "folder", "image", "label_map", "listed"),
        [
            ("voc20", "VOCdevkit/VOC2012", "JPEGImages/a.jpg", "SegmentationClass/a.png", "Segmentation"),
            ("voc21", "VOCdevkit/VOC2012", "JPEGImages/a.jpg", "SegmentationClass/a.png", "Segmentation"),
            ("context59", *CONTEXT),
            ("context60", *CONTEXT),
            ("ade150", "ADEChallengeData2016", "images/training/a.jpg", "annotations/training/a.png", None),
            ("stuff171", "coco", "train2017/a.jpg", "stuffthingmaps/train2017/a.png", None),
            ("object81", "coco", "train2017/a.jpg", "stuffthingmaps/train2017/a.png", None),
            ("cityscapes", "cityscapes", "leftImg8bit/train/x/a_leftImg8bit.png", GT_FINE, None),
        ],
    )
    def test_training_images(self, tmp_path, name, folder, image, label_map, listed):
        write_image(tmp_path / folder / image)
        write_label_map(tmp_path / folder / label_map, [1, 7])
        if listed:
            write(tmp_path / folder / f"ImageSets/{listed}/train.txt", "a\n")
        data = open_segmentation(name, tmp_path, split="train")
        assert_samples(data, [Path(image).stem])
        assert data.samples[0].label_map().shape == SIZE[::-1]
        assert data.description["split"] == "train"
        with pytest.raises(FileNotFoundError, match="does not exist"):
            open_segmentation(name, tmp_path)

    @pytest.fixture
    def folder(self, tmp_path):
        for stem in "ba":
            write_image(tmp_path / f"set/val/images/{stem}.jpg")
            write_label_map(tmp_path / f"set/val/labels/{stem}.png", [0, 1, 255])
        write(tmp_path / "set/classes.json", ["sky", ["road", "street"]])
        return tmp_path / "set/val"

    def test_folder(self, folder):
        data = open_segmentation(str(folder), "")
        assert_samples(data, ["a", "b"])
        assert data.names == [["sky"], ["road", "street"]]
        assert first_values(data.samples[0], 3) == [0, 1, IGNORE_INDEX]
        write(folder / "classes.json", {"names": [["background"], ["road"]], "background": ["sky", "wall"]})
        data = open_segmentation(str(folder), "")
        assert data.names == [["background"], ["road"]]
        assert data.background == ["sky", "wall"]
        write(folder / "classes.json", ["background", "road"])  # a class like any other
        assert open_segmentation(str(folder), "").background is None

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"names": ["sky", "road"], "background": ["wall"]}, 'its first class must be "background"'),
            ({"names": ["background", "road"], "background": "wall"}, "must be a list of texts, got 'wall'"),
            (
                {"names": ["background", "road"], "backgrounds": ["wall"]},
                "unknown entries: backgrounds",
            ),
        ],
    )
    def test_a_background_that_would_be_misread_raises(self, folder, content, message):
        write(folder / "classes.json", content)
        with pytest.raises(ValueError, match=message):
            open_segmentation(str(folder), "")

    def test_a_folder_without_names_raises(self, folder):
        (folder.parent / "classes.json").unlink()
        with pytest.raises(FileNotFoundError, match=r"set/classes\.json does not exist.*labels/"):
            open_segmentation(str(folder), "")

    @pytest.mark.parametrize("file", ["images/a.jpg", "labels/a.png"])
    def test_images_and_label_maps_need_the_same_stems(self, folder, file):
        (folder / file).unlink()
        with pytest.raises(ValueError, match=r"in one of them only: \['a'\]"):
            open_segmentation(str(folder), "")

    def test_two_images_with_one_stem_raise(self, folder):
        write_image(folder / "images/a.png")
        with pytest.raises(ValueError, match="two files with one stem"):
            open_segmentation(str(folder), "")

    def test_invalid_label_maps_raise(self, folder):
        sample = open_segmentation(str(folder), "").samples[0]
        write_label_map(folder / "labels/a.png", [2])
        with pytest.raises(ValueError, match=r"a\.png has values without a class: \[2\]"):
            sample.label_map()
        Image.new("L", (3, 3)).save(folder / "labels/a.png")
        with pytest.raises(ValueError, match=r"a\.png has the size \(3, 3\), its image \(4, 6\)"):
            sample.label_map()
        Image.new("RGB", SIZE).save(folder / "labels/a.png")
        with pytest.raises(ValueError, match=r"a\.png is not a label map: it has 3 channels"):
            sample.label_map()

    def test_missing_data_raise_with_the_expected_layout(self, tmp_path):
        for name in SEGMENTATION_NAMES.split(", "):
            with pytest.raises(FileNotFoundError, match=r"does not exist\. Expected: .*http"):
                open_segmentation(name, tmp_path)
        with pytest.raises(FileNotFoundError, match=r"elsewhere does not exist.*one of voc20"):
            open_segmentation("elsewhere", tmp_path)


class TestPlaces365:
    def test_names_are_read_from_its_categories(self, tmp_path):
        folder = tmp_path / "places365"
        write(folder / "categories_places365.txt", "/a/airfield 0\n/b/bus_station/indoor 1\n")
        write(folder / "places365_val.txt", "b.jpg 1\na.jpg 0\n")
        for name in ("a", "b"):
            write_image(folder / f"val_256/{name}.jpg")
        data = open_classification("places365", tmp_path)
        assert_samples(data, ["b.jpg", "a.jpg"])
        assert data.names == [["airfield"], ["indoor bus station"]]
        assert [sample.label for sample in data.samples] == [1, 0]
        write(folder / "places365_val.txt", "b.jpg 2\n")
        with pytest.raises(ValueError, match=r"b\.jpg has the unknown label 2"):
            open_classification("places365", tmp_path)
        write(folder / "places365_val.txt", "b.jpg\n")
        with pytest.raises(ValueError, match=r"places365_val\.txt, line 1: expected a name and a number"):
            open_classification("places365", tmp_path)


class TestHub:
    """The Hub's formats, here in a folder of parquet files."""

    @pytest.fixture
    def folder(self, tmp_path):
        return tmp_path / "own"

    def save(self, folder: Path, columns: dict, features: dict, split: str = "test"):
        folder.mkdir(exist_ok=True)
        Dataset.from_dict(columns, features=Features(features)).to_parquet(folder / f"{split}-0.parquet")

    def images(self, count: int) -> list[Image.Image]:
        return [Image.new("RGB", SIZE, (number, 0, 0)) for number in range(count)]

    def test_classification(self, folder):
        features = {"image": ImageFeature(), "label": ClassLabel(names=["great_white", "tench"])}
        self.save(folder, {"image": self.images(3), "label": [1, 0, 1]}, features)
        data = open_classification(f"hf://{folder}", "")
        assert data.names == [["great white"], ["tench"]]
        for _ in range(2):  # streamed again
            assert [sample.label for sample in data.samples] == [1, 0, 1]
        assert [sample.image().getpixel((0, 0))[0] for sample in data.samples] == [0, 1, 2]
        assert not hasattr(data.samples, "__len__")
        self.save(folder, {"image": self.images(1), "label": [0]}, features, "train")
        with pytest.raises(ValueError, match=r"choose a split with \?split=\. Available: train, test"):
            open_classification(f"hf://{folder}", "")
        assert len(list(open_classification(f"hf://{folder}?split=train", "").samples)) == 1
        with pytest.raises(ValueError, match="must have one column of captions"):
            open_captions(f"hf://{folder}?split=train", "")
        with pytest.raises(ValueError, match=r"has unknown options: spilt\. Known: config, split, classes"):
            open_classification(f"hf://{folder}?spilt=train", "")

    def test_captions(self, folder):
        columns = {"jpg": self.images(2), "captions": [["a dog", "a cat "], ["a bird"]], "url": ["x", "y"]}
        self.save(folder, columns, {"jpg": ImageFeature(), "captions": List(Value("string")), "url": Value("string")})
        data = open_captions(f"hf://{folder}", "")
        assert [sample.captions for sample in data.samples] == [("a dog", "a cat"), ("a bird",)]
        with pytest.raises(ValueError, match="must have one column of type ClassLabel; it has none"):
            open_classification(f"hf://{folder}", "")

    def test_segmentation(self, folder, tmp_path):
        label_maps = [Image.fromarray(np.full(SIZE[::-1], value, dtype=np.uint8)) for value in (1, 255, 2)]
        self.save(
            folder,
            {"image": self.images(3), "annotation": label_maps},
            {"image": ImageFeature(), "annotation": ImageFeature()},
        )
        classes = write(tmp_path / "classes.json", ["sky", "road"])
        data = open_segmentation(f"hf://{folder}?classes={classes}", "")
        first, second, third = data.samples
        assert first_values(first, 1) == [1] and first_values(second, 1) == [IGNORE_INDEX]
        with pytest.raises(ValueError, match=r"2 has values without a class: \[2\]"):
            third.label_map()
        with pytest.raises(ValueError, match=r"and \?classes="):
            open_segmentation(f"hf://{folder}", "")

    def test_a_missing_data_set_raises(self, tmp_path):
        with pytest.raises(ValueError, match="could not be opened"):
            open_classification(f"hf://{tmp_path / 'nowhere'}", "")
