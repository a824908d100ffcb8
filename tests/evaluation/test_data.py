import io
import json
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from samclip_hf.evaluation.data import (
    open_captions,
    open_classification,
    open_objects,
    open_segmentation,
    read_vocabulary,
)
from samclip_hf.evaluation.samples import IGNORED


def save(path, value, mode="RGB", size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


def save_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            if not isinstance(content, bytes):
                buffer = io.BytesIO()
                Image.new("RGB", (6, 4), content).save(buffer, "png")
                content = buffer.getvalue()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def colours(data):
    """Red of every image's first pixel, through pickle, as workers of another process would see it."""
    return [np.asarray(sample.image())[0, 0, 0] for sample in pickle.loads(pickle.dumps(list(data.samples)))]


def test_folders_are_classes(tmp_path):
    for name, red in (("sea_lion", 20), ("cat", 10)):
        save(tmp_path / name / "b.png", (red + 1, 0, 0))
        save(tmp_path / name / "a.png", (red, 0, 0))
    data = open_classification(str(tmp_path))
    assert data.names == [["cat"], ["sea lion"]]
    assert colours(data) == [10, 11, 20, 21] and [sample.label for sample in data.samples] == [0, 0, 1, 1]
    (tmp_path / "classes.json").write_text('[["cat", "kitten"], "walrus"]')
    assert open_classification(tmp_path.name, tmp_path.parent).names == [["cat", "kitten"], ["walrus"]]
    (tmp_path / "classes.json").write_text('["cat"]')
    with pytest.raises(ValueError, match="names 1 classes, but there are 2 folders"):
        open_classification(str(tmp_path))


def test_tars_of_labelled_images(tmp_path):
    def entry(label, name):
        return json.dumps({"label": label, "name": name}).encode()

    save_tar(tmp_path / "1.tar", {"a.png": (1, 0, 0), "a.json": entry(7, "dog"), "b.png": (2, 0, 0)})
    with pytest.raises(ValueError, match=r"1\.tar/b has no json"):
        open_classification(str(tmp_path))
    save_tar(tmp_path / "1.tar", {"a.png": (1, 0, 0), "a.json": entry(7, "dog")})
    save_tar(tmp_path / "2.tar", {"a.png": (2, 0, 0), "a.json": entry(3, "cat")})
    data = open_classification(str(tmp_path))
    assert data.names == [["cat"], ["dog"]]
    assert colours(data) == [1, 2] and [sample.label for sample in data.samples] == [1, 0]
    save_tar(tmp_path / "3.tar", {"a.png": (2, 0, 0), "a.json": entry(3, "cow")})
    with pytest.raises(ValueError, match="label 3 is 'cow' here and 'cat' elsewhere"):
        open_classification(str(tmp_path))


def test_tars_of_captioned_images(tmp_path):
    save_tar(tmp_path / "1.tar", {"a.png": (1, 0, 0), "a.txt": b"a dog\n\nan animal\n"})
    data = open_captions(str(tmp_path))
    assert colours(data) == [1] and data.samples[0].captions == ("a dog", "an animal")
    save_tar(tmp_path / "1.tar", {"a.txt": b"a dog"})
    with pytest.raises(ValueError, match="has no image"):
        open_captions(str(tmp_path))


def test_sa1b(tmp_path):
    annotations = [{"segmentation": {"size": [4, 6], "counts": "0"}, "bbox": [0, 0, 1, 1], "id": 1}]
    save_tar(
        tmp_path / "1.tar", {"sa_1.png": (9, 0, 0), "sa_1.json": json.dumps({"annotations": annotations}).encode()}
    )
    data = open_objects(str(tmp_path))
    assert colours(data) == [9] and data.samples[0].objects() == annotations


@pytest.mark.parametrize("name", ["coco", "lvis"])
def test_coco_and_lvis(tmp_path, name):
    images = [{"id": number, "file_name": f"{number}.png", "height": 4, "width": 6} for number in (5, 3)]
    for image in images:
        image["coco_url"] = f"http://images.cocodataset.org/val2017/{image['file_name']}"
        save(tmp_path / "coco" / "val2017" / image["file_name"], (image["id"], 0, 0))
    annotations = [{"id": 1, "image_id": 5, "category_id": 2, "bbox": [0, 0, 1, 1]}]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 2, "name": "cat"}]}
    file = "coco/annotations/instances_val2017.json" if name == "coco" else "lvis/lvis_v1_val.json"
    with pytest.raises(FileNotFoundError, match=rf"{file} is missing. It comes from https://"):
        open_objects(name, tmp_path)
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(json.dumps(content))
    detection = {"image_id": 3, "category_id": 2, "bbox": [1, 1, 2, 2], "score": 0.5}
    (tmp_path / "boxes.json").write_text(json.dumps([detection]))
    data = open_objects(name, tmp_path, str(tmp_path / "boxes.json"))
    assert colours(data) == [3, 5]
    assert [sample.objects() for sample in data.samples] == [[], annotations]
    assert [sample.detections for sample in data.samples] == [[detection], []]
    assert data.description["boxes"] == "boxes.json" and data.description["categories"] == content["categories"]
    (tmp_path / "boxes.json").write_text(json.dumps([detection | {"image_id": 4}]))
    with pytest.raises(ValueError, match="image 4 is not in"):
        open_objects(name, tmp_path, str(tmp_path / "boxes.json"))
    (tmp_path / "coco" / "val2017" / "3.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"3\.png is missing"):
        open_objects(name, tmp_path)


def test_images_beside_label_maps(tmp_path):
    save(tmp_path / "val" / "images" / "a.jpg", (200, 0, 0))
    save(tmp_path / "val" / "labels" / "a.png", 1, "L")
    with pytest.raises(FileNotFoundError, match=r"classes\.json"):
        open_segmentation(str(tmp_path / "val"))
    (tmp_path / "classes.json").write_text('["road", ["car", "automobile"]]')
    data = open_segmentation(str(tmp_path / "val"))
    assert data.names == [["road"], ["car", "automobile"]] and data.background is None
    assert (data.samples[0].label_map() == 1).all() and data.samples[0].label_map().shape == (4, 6)
    save(tmp_path / "val" / "labels" / "a.png", 255, "L")
    assert (data.samples[0].label_map() == IGNORED).all()
    save(tmp_path / "val" / "labels" / "a.png", 2, "L")
    with pytest.raises(ValueError, match=r"a\.png holds \[2\], which stand for no class"):
        data.samples[0].label_map()
    save(tmp_path / "val" / "labels" / "a.png", (2, 2, 2))
    with pytest.raises(ValueError, match="has 3 channels"):
        data.samples[0].label_map()
    save(tmp_path / "val" / "images" / "b.jpg", (200, 0, 0))
    with pytest.raises(FileNotFoundError, match=r"labels/b\.png is missing"):
        open_segmentation(str(tmp_path / "val"))


def test_voc_with_and_without_background(tmp_path):
    folder = tmp_path / "VOCdevkit" / "VOC2012"
    with pytest.raises(FileNotFoundError, match=r"val\.txt is missing. It comes from https://host"):
        open_segmentation("voc21", tmp_path)
    save(folder / "JPEGImages" / "x.jpg", (1, 1, 1))
    labels = Image.fromarray(np.array([[0, 1, 20, 255]], dtype=np.uint8)).convert("P")
    labels.putdata([0, 1, 20, 255])
    (folder / "SegmentationClass").mkdir()
    labels.save(folder / "SegmentationClass" / "x.png")
    (folder / "ImageSets" / "Segmentation").mkdir(parents=True)
    (folder / "ImageSets" / "Segmentation" / "val.txt").write_text("x\n")
    with_background, without = open_segmentation("voc21", tmp_path), open_segmentation("voc20", tmp_path)
    assert with_background.samples[0].label_map().tolist() == [[0, 1, 20, 255]]
    assert without.samples[0].label_map().tolist() == [[255, 0, 19, 255]]
    assert len(with_background.names) == 21 and with_background.background
    assert len(without.names) == 20 and without.names[0] == ["aeroplane"] and without.background is None


def test_cityscapes(tmp_path):
    folder = tmp_path / "cityscapes"
    save(folder / "leftImg8bit" / "val" / "ulm" / "ulm_1_leftImg8bit.png", (1, 1, 1))
    path = folder / "gtFine" / "val" / "ulm" / "ulm_1_gtFine_labelIds.png"
    save(path, 7, "L")
    Image.fromarray(np.array([[7, 33, 9, 0]], dtype=np.uint8)).save(path)
    data = open_segmentation("cityscapes", tmp_path)
    assert data.samples[0].label_map().tolist() == [[0, 18, IGNORED, IGNORED]]
    assert len(data.names) == len(read_vocabulary("cityscapes")["ids"]) == 19


def test_what_is_not_there_is_named(tmp_path):
    for read in (open_classification, open_captions, open_objects, open_segmentation):
        with pytest.raises(FileNotFoundError, match="neither a data set that is known by name nor a folder"):
            read("nowhere", tmp_path)
    with pytest.raises(FileNotFoundError, match="neither folders, one for each class, nor tars"):
        open_classification(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="holds no tars"):
        open_captions(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no images"):
        open_classification(str(tmp_path))
