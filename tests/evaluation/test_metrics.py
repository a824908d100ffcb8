"""Metrics equal independent implementations, and can be merged."""

import os
import pickle
import socket
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from evaluate.config import HF_METRICS_CACHE
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from sklearn.metrics import confusion_matrix, jaccard_score, recall_score, top_k_accuracy_score

from samclip_hf.evaluation import metrics
from samclip_hf.evaluation.metrics import MaskAveragePrecision, MaskIoU, MeanIoU, RecallAtK, TopK

FREQUENCIES = [{"id": 1, "frequency": "r"}, {"id": 2, "frequency": "c"}, {"id": 3, "frequency": "f"}]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# Properties of all metrics


def label_maps(rng, num_images=7, num_labels=4):
    sizes = rng.integers(5, 20, (num_images, 2))
    references = [rng.choice([*range(num_labels), 255], size) for size in sizes]
    predictions = [
        np.where(rng.random(r.shape) < 0.5, r % 255, rng.integers(0, num_labels, r.shape)) for r in references
    ]
    return predictions, references


def regions(rng):
    return [[np.kron(label_map, np.ones((4, 4), dtype=int)) for label_map in maps] for maps in label_maps(rng)]


def scores(rng, num_images=40, num_labels=6):
    return list(rng.normal(size=(num_images, num_labels))), list(rng.integers(0, num_labels, num_images))


def embeddings(rng, num_images=30, dim=6):
    images = rng.normal(size=(num_images, dim))
    captions = [image + rng.normal(size=(rng.integers(1, 5), dim)) for image in images]
    return list(images), captions


def masks(rng, num_objects=100):
    return [list(rng.random((num_objects, 8, 9)) < 0.5) for _ in range(2)]


def blob(rng, height, width):
    mask = np.zeros((height, width), dtype=np.uint8)
    top, left = rng.integers(0, height - 4), rng.integers(0, width - 4)
    mask[top : top + rng.integers(4, height), left : left + rng.integers(4, width)] = 1
    return mask


def encoded(mask):
    return rle.encode(np.asfortranarray(mask))


def uncompressed(mask):
    """Returns uncompressed run-length encoding, as in COCO's annotations of crowds."""
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}


def instances(rng, num_images=12, num_categories=3, num_objects=5, crowds=True, lists=False):
    """Returns random objects of all sizes and similar detections. The third image has no objects, the fourth no
    detections, the fifth neither."""
    predictions, references = [], []
    for number in range(num_images):
        height, width = rng.integers(60, 220, 2).tolist()
        annotations, results = [], []
        for _ in range(num_objects):
            mask, category = blob(rng, height, width), int(rng.integers(1, num_categories + 1))
            shift = tuple(rng.integers(-6, 7, 2))
            similar = np.roll(mask, shift, (0, 1))
            crowd = crowds and bool(rng.random() < 0.2)
            annotations.append(
                {
                    "id": 0,  # not used
                    "category_id": category,
                    "segmentation": uncompressed(mask) if crowd else encoded(mask),
                    "area": float(mask.sum()),
                    "iscrowd": int(crowd),
                }
            )
            for detection in (similar, mask, blob(rng, height, width)):
                results.append(
                    {
                        "category_id": category if rng.random() < 0.8 else 3,
                        "segmentation": encoded(detection),
                        "score": round(float(rng.random()), 1),  # with many ties
                    }
                )
        if number in (2, 4):
            annotations = []
        if number in (3, 4):
            results = []
        known = rng.choice([1, 2, 3], 2, replace=False).tolist()
        image = {"id": 100 - number, "height": height, "width": width}
        image |= {"neg_category_ids": known[:1], "not_exhaustive_category_ids": known[1:]}
        predictions.append(results)
        references.append({"image": image, "annotations": annotations})
    return predictions, references


CASES = {
    "mean_iou": (MeanIoU, {"num_labels": 4}, label_maps),
    "mean_iou of regions": (MeanIoU, {"num_labels": 4, "boundary_width": 1}, regions),
    "top_k": (TopK, {"num_labels": 6}, scores),
    "recall_at_k": (RecallAtK, {"ks": (1, 5)}, embeddings),
    "mask_iou": (MaskIoU, {}, masks),
    "mask_average_precision": (MaskAveragePrecision, {}, instances),
    "mask_average_precision of lvis": (MaskAveragePrecision, {"style": "lvis", "categories": FREQUENCIES}, instances),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@cases
def test_the_result_is_the_same_for_any_order_and_sharding(case, rng):
    metric_class, arguments, samples = case
    predictions, references = samples(rng)
    expected = metric_class(**arguments).compute(predictions=predictions, references=references)
    for _ in range(3):
        order = rng.permutation(len(predictions))
        processes = [metric_class(**arguments) for _ in range(3)]  # the third has at most one sample
        for i in order[:-1]:
            processes[rng.integers(2)].add(prediction=predictions[i], reference=references[i])
        processes[rng.integers(3)].add_batch(predictions=[predictions[order[-1]]], references=[references[order[-1]]])
        total = metric_class(**arguments)
        for process in processes:
            total.merge(pickle.loads(pickle.dumps(process.state)))
        assert total.compute() == expected
    assert pickle.loads(pickle.dumps(expected)) == expected


@cases
def test_compute_resets_a_metric_and_raises_without_samples(case, rng):
    metric_class, arguments, samples = case
    predictions, references = samples(rng)
    predictions, references = predictions[:6], references[:6]
    metric = metric_class(**arguments)
    with pytest.raises(ValueError, match="no samples were added"):
        metric.compute()
    metric.add_batch(predictions=[], references=[])
    metric.merge(metric_class(**arguments).state)
    with pytest.raises(ValueError, match="no samples were added"):
        metric.compute()
    first = metric.compute(predictions=predictions, references=references)
    assert metric.state == {}
    assert metric.compute(predictions=predictions, references=references) == first
    with pytest.raises(ValueError, match="predictions and references differ"):
        metric.add_batch(predictions=predictions, references=references[1:])
    with pytest.raises(ValueError, match="predictions and references differ"):
        metric.compute(predictions=predictions)


@cases
def test_merging_does_not_change_the_other_state(case, rng):
    metric_class, arguments, samples = case
    predictions, references = samples(rng)
    parts = [metric_class(**arguments) for _ in range(2)]
    for part, half in zip(parts, (slice(None, 4), slice(4, None)), strict=True):
        part.add_batch(predictions=predictions[half], references=references[half])
    before = pickle.dumps([part.state for part in parts])
    total = metric_class(**arguments)
    for part in parts:
        total.merge(part.state)
    assert pickle.dumps([part.state for part in parts]) == before


def test_states_of_metrics_with_other_arguments_are_not_merged():
    metric, other = MeanIoU(num_labels=2), MeanIoU(num_labels=1)
    metric.add(prediction=np.array([[0, 1]]), reference=np.array([[0, 1]]))
    other.add(prediction=np.array([[0]]), reference=np.array([[0]]))
    with pytest.raises(ValueError, match="different arguments"):
        metric.merge(other.state)


def test_unknown_arguments_raise():
    with pytest.raises(TypeError, match="ignored_index"):
        MeanIoU(num_labels=2, ignored_index=0)
    with pytest.raises(ValueError, match="merge their states"):
        MeanIoU(num_labels=2, num_process=2, process_id=1)


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """Blocks the network, and gives `evaluate` new folders, without modules of other tests."""

    def refuse(*_):
        raise AssertionError("The network was used.")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", tmp_path / "modules")
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "metrics")
    # Other tests may have put the user's own modules on the search path.
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not Path(path, "evaluate_modules").exists()])
    for name in [name for name in sys.modules if name.partition(".")[0] == "evaluate_modules"]:
        monkeypatch.delitem(sys.modules, name)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "evaluate_modules"]:
        del sys.modules[name]


@pytest.mark.parametrize("name", ["mean_iou", "top_k", "recall_at_k", "mask_iou", "mask_average_precision"])
def test_evaluate_loads_a_metric_by_its_path_without_network(name, no_network, rng):
    metric_class, arguments, samples = CASES[name]
    predictions, references = samples(rng)
    loaded = evaluate.load(str(Path(metrics.__file__).with_name(f"{name}.py")), **arguments)
    assert type(loaded).__name__ == metric_class.__name__
    assert type(loaded).__module__.startswith("evaluate_modules.")
    assert loaded.name == metric_class(**arguments).name
    expected = metric_class(**arguments).compute(predictions=predictions, references=references)
    for prediction, reference in zip(predictions, references, strict=True):
        loaded.add(prediction=prediction, reference=reference)
    assert loaded.compute() == expected
    assert not (no_network / "metrics").exists()


def test_a_metric_writes_no_files(rng):
    before = sorted(os.walk(HF_METRICS_CACHE))
    predictions, references = label_maps(rng)
    MeanIoU(num_labels=4).compute(predictions=predictions, references=references)
    assert sorted(os.walk(HF_METRICS_CACHE)) == before


def test_metrics_of_the_same_samples_can_be_combined(rng):
    """`evaluate.combine` uses the names of the inputs."""
    predictions, references = label_maps(rng)
    combined = evaluate.combine({"all": MeanIoU(num_labels=4), "ignoring_0": MeanIoU(num_labels=256, ignore_index=0)})
    combined.add_batch(predictions=predictions, references=references)
    result = combined.compute()
    assert (
        result["all_mean_iou"]
        == MeanIoU(num_labels=4).compute(predictions=predictions, references=references)["mean_iou"]
    )
    assert result["ignoring_0_num_pixels"] == sum((reference != 0).sum() for reference in references)


# MeanIoU


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.uint32])
def test_mean_iou_equals_scikit_learn(dtype, rng):
    predictions, references = label_maps(rng, num_labels=5)
    predictions = [p.astype(dtype) % 3 for p in predictions]  # 3 and 4 are never predicted
    references = [np.where(r == 0, 1, r).astype(dtype) for r in references]  # 0 never occurs
    result = MeanIoU(num_labels=6).compute(predictions=predictions, references=references)

    truth, predicted = (np.concatenate([m.ravel() for m in maps]) for maps in (references, predictions))
    truth, predicted = truth[truth != 255], predicted[truth != 255]
    iou = jaccard_score(truth, predicted, labels=range(5), average=None, zero_division=0).tolist()
    accuracy = recall_score(truth, predicted, labels=range(1, 5), average=None).tolist()
    assert result["iou_per_label"] == pytest.approx([*iou, None])  # 5 occurs in neither
    assert result["accuracy_per_label"] == pytest.approx([None, *accuracy, None])
    assert result["mean_iou"] == pytest.approx(np.mean(iou))
    assert result["mean_accuracy"] == pytest.approx(np.mean(accuracy))
    assert result["overall_accuracy"] == pytest.approx((truth == predicted).mean())
    assert result["num_pixels"] == truth.size

    metric = MeanIoU(num_labels=6)
    metric.add_batch(predictions=[torch.tensor(p.astype(np.int64)) for p in predictions], references=references)
    assert (metric.state["confusion"] == confusion_matrix(truth, predicted, labels=range(6))).all()


def test_mean_iou_of_one_pixel_and_of_a_constant_prediction():
    one = MeanIoU(num_labels=3).compute(predictions=[np.array([[2]])], references=[np.array([[1]])])
    assert one["iou_per_label"] == [None, 0.0, 0.0]
    assert one["accuracy_per_label"] == [None, 0.0, None]
    assert (one["mean_iou"], one["mean_accuracy"], one["num_pixels"]) == (0.0, 0.0, 1)
    constant = MeanIoU(num_labels=2).compute(
        predictions=[np.zeros((1, 4), int)], references=[np.array([[0, 0, 0, 1]])]
    )
    assert constant["iou_per_label"] == [0.75, 0.0]


@pytest.mark.parametrize("width", [1, 2, 5])
def test_pixels_near_a_boundary_do_not_count(width, rng):
    reference = np.kron(rng.choice([0, 1, 255], (4, 5)), np.ones((6, 7), dtype=int))
    prediction = rng.integers(0, 2, reference.shape)
    counts = reference != 255
    for y, x in np.ndindex(*reference.shape):
        window = reference[max(y - width, 0) : y + width + 1, max(x - width, 0) : x + width + 1]
        counts[y, x] &= (window == reference[y, x]).all()
    metric = MeanIoU(num_labels=2, boundary_width=width)
    metric.add(prediction=prediction, reference=reference)
    expected = confusion_matrix(reference[counts], prediction[counts], labels=[0, 1])
    assert (metric.state["confusion"] == expected).all()


def test_an_invalid_label_map_raises_and_its_batch_is_not_added():
    metric, good = MeanIoU(num_labels=2), np.array([[0, 1]])
    for prediction, reference, message in [
        (np.array([[0, 2]]), good, "prediction has 0 to 2"),
        (np.array([[0, -1]]), good, "prediction has -1 to 0"),
        (good, np.array([[254, 0]]), "reference has 0 to 254"),
        (good, np.array([[-1, 0]]), "reference has -1 to 0"),
        (good.astype(float), good, "prediction has float64"),
        (good, good.T, "one shape"),
        (good[0], good[0], "one shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            metric.add_batch(predictions=[good, prediction], references=[good, reference])
    assert metric.state == {}
    with pytest.raises(ValueError, match="All pixels are ignored"):
        metric.compute(predictions=[good], references=[np.full((1, 2), 255)])


def test_the_mean_iou_of_one_image(rng):
    metric = MeanIoU(num_labels=4)
    predictions, references = label_maps(rng)
    for prediction, reference in zip(predictions, references, strict=True):
        expected = MeanIoU(num_labels=4).compute(predictions=[prediction], references=[reference])["mean_iou"]
        assert metric.image_mean_iou(prediction, reference) == expected
    assert metric.image_mean_iou(np.zeros((2, 2), int), np.full((2, 2), 255)) is None
    assert metric.state == {}


# TopK


@pytest.mark.parametrize("convert", [np.asarray, torch.tensor, np.ndarray.tolist, lambda x: torch.tensor(x).half()])
def test_top_k_equals_scikit_learn(convert, rng):
    num_labels = 8
    predictions = rng.permuted(np.tile(np.arange(num_labels) / 4, (60, 1)), axis=1)
    references = rng.choice([0, 1, 2, 3, 4, 5, 7], 60)  # 6 does not occur
    result = TopK(num_labels, ks=(3, 5, 9)).compute(predictions=convert(predictions), references=references)
    assert result.keys() == {"top1", "top3", "top5", "mean_per_class_top1", "correct_per_label", "num_per_label"}
    for k in (1, 3, 5):
        expected = top_k_accuracy_score(references, predictions, k=k, labels=range(num_labels))
        assert result[f"top{k}"] == pytest.approx(expected)
    confusion = confusion_matrix(references, predictions.argmax(1), labels=range(num_labels))
    assert result["correct_per_label"] == confusion.diagonal().tolist()
    assert result["num_per_label"] == confusion.sum(1).tolist()
    occurs = confusion.sum(1) > 0
    expected = (confusion.diagonal()[occurs] / confusion.sum(1)[occurs]).mean()
    assert result["mean_per_class_top1"] == pytest.approx(expected)


def test_of_equal_scores_the_first_counts_as_in_argmax(rng):
    scores = rng.integers(0, 3, (200, 6)).astype(float)
    references = rng.integers(0, 6, 200)
    result = TopK(num_labels=6, ks=(1, 3)).compute(predictions=scores, references=references)
    assert result["top1"] == (scores.argmax(axis=1) == references).mean()
    first_three = np.argsort(-scores, axis=1, kind="stable")[:, :3]
    assert result["top3"] == (first_three == references[:, None]).any(axis=1).mean()
    constant = TopK(num_labels=6).compute(predictions=np.zeros((4, 6)), references=np.array([0, 1, 2, 3]))
    assert constant["correct_per_label"] == [1, 0, 0, 0, 0, 0]


def test_invalid_scores_raise():
    metric = TopK(num_labels=3)
    for predictions, references, message in [
        (np.zeros((2, 4)), [0, 1], "Scores must be"),
        (np.zeros((1, 3)), [[0]], "Scores must be"),
        (np.full((1, 3), np.nan), [0], "is NaN"),
        (np.zeros((1, 3)), [3], "0 to 2"),
        (np.zeros((1, 3)), [-1], "0 to 2"),
        (np.zeros((1, 3)), [1.0], "0 to 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            metric.add_batch(predictions=predictions, references=references)


# RecallAtK


def brute_force_recall(images, captions, k):
    def cosine(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    text_to_image, image_to_text = [], []
    for i, image in enumerate(images):
        for caption in captions[i]:
            own = cosine(caption, image)
            ahead = sum(cosine(caption, images[j]) > own - 1e-9 for j in range(len(images)) if j != i)
            text_to_image.append(ahead < k)
        best = max(cosine(caption, image) for caption in captions[i])
        ahead = sum(cosine(other, image) > best - 1e-9 for j in range(len(images)) if j != i for other in captions[j])
        image_to_text.append(ahead < k)
    return np.mean(text_to_image), np.mean(image_to_text)


@pytest.mark.parametrize("batch_size", [7, 1000])
def test_recall_equals_brute_force(batch_size, rng, monkeypatch):
    monkeypatch.setattr("samclip_hf.evaluation.metrics.recall_at_k.IMAGE_BATCH_SIZE", batch_size)
    images, captions = embeddings(rng)
    images[3], captions[5] = images[4] * 2, captions[6].copy()  # ties: equal directions, and equal captions
    images, captions = [x.astype(np.float32) for x in images], [x.astype(np.float32) for x in captions]
    in_float64 = [[x.astype(np.float64) for x in embeds] for embeds in (images, captions)]
    result = RecallAtK(ks=(1, 5, 10, 31)).compute(predictions=np.stack(images), references=captions)
    assert "mean_recall@31" not in result  # there are 30 images
    for k in (1, 5, 10):
        text_to_image, image_to_text = brute_force_recall(*in_float64, k)
        assert 0 < text_to_image < 1
        assert result[f"text_to_image_recall@{k}"] == pytest.approx(text_to_image)
        assert result[f"image_to_text_recall@{k}"] == pytest.approx(image_to_text)
        assert result[f"mean_recall@{k}"] == pytest.approx((text_to_image + image_to_text) / 2)


def test_the_recall_of_equal_embeddings_is_0(rng):
    constant = rng.normal(size=37)  # not a multiple of a vector register
    result = RecallAtK().compute(predictions=[constant] * 301, references=[np.stack([constant] * 3)] * 301)
    assert set(result.values()) == {0}


def test_the_recall_of_perfect_embeddings_is_1(rng):
    for num_images in (1, 300):
        images = rng.normal(size=(num_images, 16))
        result = RecallAtK(ks=(1,)).compute(predictions=images, references=[image[None] * 3 for image in images])
        assert result == {"text_to_image_recall@1": 1, "image_to_text_recall@1": 1, "mean_recall@1": 1}


def test_the_caller_may_reuse_a_buffer(rng):
    metric, buffer = RecallAtK(ks=(1,)), np.zeros((1, 4), dtype=np.float32)
    for direction in np.eye(4, dtype=np.float32):
        buffer[:] = direction
        metric.add_batch(predictions=torch.from_numpy(buffer), references=[torch.from_numpy(buffer)])
    assert metric.compute()["mean_recall@1"] == 1


def test_invalid_embeddings_raise():
    metric, good = RecallAtK(), np.ones(3)
    for image, captions, message in [
        (good, np.ones((0, 3)), "num_captions"),
        (good, np.ones((1, 2)), "num_captions"),
        (good, good, "num_captions"),
        (good * 0, np.ones((1, 3)), "zero or not finite"),
        (good, np.full((2, 3), np.nan), "zero or not finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            metric.add(prediction=image, reference=captions)


# MaskIoU


def test_mask_iou_is_the_mean_over_objects(rng):
    predictions, references = masks(rng)
    predictions[0] = np.zeros_like(predictions[0])
    ious = [jaccard_score(r.ravel(), p.ravel()) for p, r in zip(predictions, references, strict=True)]
    result = MaskIoU().compute(predictions=np.stack(predictions), references=np.stack(references))
    assert ious[0] == 0
    assert result == {"mean_iou": pytest.approx(np.mean(ious)), "num_objects": 100}
    tensors = [torch.tensor(np.stack(m)) for m in (predictions, references)]
    assert MaskIoU().compute(predictions=tensors[0], references=tensors[1]) == result


def test_invalid_masks_raise():
    metric, good = MaskIoU(), np.ones((2, 3), dtype=bool)
    for prediction, reference, message in [
        (good, ~good, "empty"),
        (good.astype(float), good, "boolean"),
        (good, good.T, "one shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            metric.add(prediction=prediction, reference=reference)


# MaskAveragePrecision


def pycocotools_stats(predictions, references, categories, max_detections=100):
    """Returns the metrics, and the AP of each category."""
    truth, numbers = COCO(), iter(range(1, 10**6))
    truth.dataset = {
        "images": [reference["image"] for reference in references],
        "annotations": [
            {**annotation, "image_id": reference["image"]["id"], "id": next(numbers)}
            for reference in references
            for annotation in reference["annotations"]
        ],
        "categories": [{"id": category["id"]} for category in categories],
    }
    truth.createIndex()
    detections = COCO()
    detections.dataset = truth.dataset | {
        "annotations": [
            {
                **result,
                "image_id": reference["image"]["id"],
                "id": next(numbers),
                "area": float(rle.area(result["segmentation"])),
                "iscrowd": 0,
            }
            for results, reference in zip(predictions, references, strict=True)
            for result in results
        ]
    }
    detections.createIndex()
    evaluation = COCOeval(truth, detections, "segm")
    evaluation.params.maxDets = [1, 10, max_detections]
    evaluation.evaluate()
    evaluation.accumulate()
    precision = evaluation.eval["precision"][..., -1]  # (thresholds, recalls, categories, areas)

    def mean(values):
        return values[values > -1].mean() if (values > -1).any() else None

    stats = {
        "AP": mean(precision[..., 0]),
        "AP50": mean(precision[0, ..., 0]),
        "AP75": mean(precision[5, ..., 0]),
        "APs": mean(precision[..., 1]),
        "APm": mean(precision[..., 2]),
        "APl": mean(precision[..., 3]),
    }
    return stats, [mean(precision[:, :, k, 0]) for k in range(len(categories))]


@pytest.mark.parametrize("seed", range(4))
def test_mask_ap_equals_pycocotools(seed, capsys):
    predictions, references = instances(np.random.default_rng(seed))
    categories = [{"id": number} for number in (1, 2, 3, 7)]  # nothing of 7
    expected, _ = pycocotools_stats(predictions, references, categories)
    assert len(set(expected.values())) == 6  # so that the test detects swapped values; seed 3 has no large object
    capsys.readouterr()
    before = pickle.dumps((predictions, references))
    result = MaskAveragePrecision().compute(predictions=predictions, references=references)
    assert result == pytest.approx(expected, abs=1e-12)
    assert (
        MaskAveragePrecision(categories=categories).compute(predictions=predictions, references=references) == result
    )
    assert pickle.dumps((predictions, references)) == before
    assert capsys.readouterr().out == ""


def test_mask_ap_of_polygons_and_more_than_100_detections_equals_pycocotools(rng):
    predictions, references = instances(rng, num_images=3, num_categories=1, num_objects=50, crowds=False)
    for reference in references:
        for annotation in reference["annotations"]:
            x, y, width, height = rle.toBbox(annotation["segmentation"]).tolist()
            annotation["segmentation"] = [[x, y, x + width, y, x + width, y + height / 2, x, y + height]]
            annotation.pop("iscrowd")
    with_crowd = [
        reference | {"annotations": [annotation | {"iscrowd": 0} for annotation in reference["annotations"]]}
        for reference in references
    ]
    for reference in with_crowd:
        height, width = reference["image"]["height"], reference["image"]["width"]
        for annotation in reference["annotations"]:
            annotation["segmentation"] = rle.merge(rle.frPyObjects(annotation["segmentation"], height, width))
    expected, _ = pycocotools_stats(predictions, with_crowd, [{"id": 1}, {"id": 3}])
    assert 0 < expected["AP"] < 1
    result = MaskAveragePrecision().compute(predictions=predictions, references=references)
    assert result == pytest.approx(expected, abs=1e-12)


def test_mask_ap_is_none_without_objects_and_0_without_detections(rng):
    predictions, references = instances(rng, num_images=2, crowds=False)
    image_only = [reference | {"annotations": []} for reference in references]
    nothing = MaskAveragePrecision().compute(predictions=predictions, references=image_only)
    assert set(nothing.values()) == {None}
    nothing = MaskAveragePrecision().compute(predictions=[[], []], references=image_only)
    assert set(nothing.values()) == {None}
    missed = MaskAveragePrecision().compute(predictions=[[], []], references=references)
    assert missed["AP"] == 0
    lvis = MaskAveragePrecision(style="lvis", categories=FREQUENCIES)
    assert set(lvis.compute(predictions=[[], []], references=image_only).values()) == {None}


@pytest.mark.parametrize("seed", range(3))
def test_lvis_ap_equals_pycocotools_on_equivalent_coco_data(seed):
    """LVIS drops detections of categories that were not annotated in the image, and ignores unmatched ones of
    categories that were not annotated exhaustively, as COCO does if a crowd covers the image."""
    predictions, references = instances(np.random.default_rng(seed), crowds=False)
    known, as_coco = [], []
    for results, reference in zip(predictions, references, strict=True):
        image, annotations = reference["image"], reference["annotations"]
        categories = {annotation["category_id"] for annotation in annotations} | set(image["neg_category_ids"])
        known.append([result for result in results if result["category_id"] in categories])
        everywhere = np.ones((image["height"], image["width"]), dtype=np.uint8)
        crowds = [
            {"category_id": category, "segmentation": encoded(everywhere), "area": everywhere.size, "iscrowd": 1}
            for category in image["not_exhaustive_category_ids"]
        ]
        as_coco.append({"image": image, "annotations": annotations + crowds})
    expected, by_category = pycocotools_stats(known, as_coco, FREQUENCIES, max_detections=300)
    expected |= dict(zip(("APr", "APc", "APf"), by_category, strict=True))
    metric = MaskAveragePrecision(style="lvis", categories=FREQUENCIES)
    assert metric.compute(predictions=predictions, references=references) == pytest.approx(expected, abs=1e-12)
    assert expected["AP"] != pytest.approx(pycocotools_stats(predictions, references, FREQUENCIES)[0]["AP"], abs=1e-3)


def test_lvis_drops_detections_of_categories_that_were_not_annotated(rng):
    predictions, references = instances(rng, num_images=3, crowds=False)  # the third image has no objects
    categories = [*FREQUENCIES, {"id": 4, "frequency": "r"}]
    metric = MaskAveragePrecision(style="lvis", categories=categories)
    expected = metric.compute(predictions=[*predictions[:2], []], references=references)
    unknown = [result | {"category_id": 4} for result in predictions[2]]
    assert metric.compute(predictions=[*predictions[:2], unknown], references=references) == expected


def test_lvis_counts_the_best_300_detections_of_an_image_over_all_categories():
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[2:6, 2:6] = 1
    image = {"id": 1, "height": 8, "width": 8, "neg_category_ids": [2], "not_exhaustive_category_ids": []}
    reference = {
        "image": image,
        "annotations": [{"category_id": 1, "segmentation": encoded(mask), "area": 16, "iscrowd": 0}],
    }
    found = {"category_id": 1, "segmentation": encoded(mask), "score": 0.1}
    missed = {"category_id": 1, "segmentation": encoded(1 - mask), "score": 0.9}
    for other, num_others, expected in [
        (found | {"category_id": 2, "score": 0.9}, 299, 1),
        (found | {"category_id": 2, "score": 0.9}, 300, 0),
        (missed, 299, 1 / 300),
        (missed, 300, 0),
    ]:
        result = MaskAveragePrecision(style="lvis", categories=FREQUENCIES).compute(
            predictions=[[found] + [other] * num_others], references=[reference]
        )
        assert result["AP"] == pytest.approx(expected)
        assert (result["APr"], result["APc"], result["APl"]) == (pytest.approx(expected), None, None)


def test_invalid_arguments_and_masks_of_mask_ap_raise(rng):
    with pytest.raises(ValueError, match='"coco" or "lvis"'):
        MaskAveragePrecision(style="voc")
    with pytest.raises(ValueError, match="frequencies"):
        MaskAveragePrecision(style="lvis", categories=[{"id": 1}])
    predictions, references = instances(rng, num_images=2)
    metric = MaskAveragePrecision()
    with pytest.raises(ValueError, match="A mask of image 99"):
        metric.add(prediction=predictions[0], reference=references[1])
    metric.add_batch(predictions=predictions * 2, references=references * 2)
    with pytest.raises(ValueError, match="added twice"):
        metric.compute()
