"""Average precision of instance segmentation, by the rules of COCO and LVIS."""

from typing import Any, Literal

from datasets import Features, Json, List, Value
from faster_coco_eval import COCO, COCOeval_faster

from .accumulating import AccumulatingMetric

LVIS_MAX_DETECTIONS = 300  # per image, over all categories (lvis-api, `LVISResults`)


class MaskAveragePrecision(AccumulatingMetric):
    r"""
    Mask AP, the mean over categories and over IoU thresholds from 0.50 to 0.95
    (https://cocodataset.org/#detection-eval), by `faster_coco_eval`, whose results equal those of pycocotools.

    references (list of `dict`):
        For each image, `"image"`, its entry in the annotation file: `"id"`, `"height"`, `"width"`, and for LVIS
        `"neg_category_ids"` and `"not_exhaustive_category_ids"`; and `"annotations"`, a list of `"category_id"`,
        `"segmentation"` (polygons or run-length encoding), `"area"` and optionally `"iscrowd"`.
    predictions (list of lists of `dict`):
        For each image, COCO results: `"category_id"`, `"segmentation"` (compressed run-length encoding), `"score"`.
        The area of the mask determines whether an object is small, medium or large. Boxes are not used.
    style (`str`):
        "coco": at most 100 detections per image and category. "lvis" (Gupta et al., arXiv 1908.03195): at most 300
        per image; detections of categories that were not annotated in the image are ignored.
    categories (`list[dict]`, *optional*):
        The categories of the annotation file: `"id"` and, for LVIS, `"frequency"`, one of r, c and f. Required for
        LVIS. Categories without references are excluded from the mean.

    `compute` returns `AP`, `AP50`, `AP75`, `APs`, `APm`, `APl` and, for LVIS, `APr`, `APc`, `APf`, in [0, 1], or
    `None` (COCO: -1) if there are no such objects. Raises `ValueError` if an image is added twice, a mask does not
    have its image's size, or LVIS's categories have no frequency.
    """

    input_features = Features(
        {
            "predictions": List(
                {
                    "category_id": Value("int64"),
                    "segmentation": {"size": List(Value("int64")), "counts": Value("string")},
                    "score": Value("float64"),
                }
            ),
            "references": {"image": Json(), "annotations": List(Json())},
        }
    )

    def __init__(
        self,
        style: Literal["coco", "lvis"] = "coco",
        categories: list[dict[str, Any]] | None = None,
        **module_arguments: Any,
    ):
        super().__init__(**module_arguments)
        if style not in ("coco", "lvis"):
            raise ValueError(f'style must be "coco" or "lvis", got {style!r}.')
        if style == "lvis" and (not categories or any("frequency" not in category for category in categories)):
            raise ValueError("The style lvis needs the categories of the annotation file with their frequencies.")
        self.style = style
        self.categories = categories

    def _measure(self, predictions: list[list[dict[str, Any]]], references: list[dict[str, Any]]) -> dict[str, Any]:
        images = []
        for results, reference in zip(predictions, references, strict=True):
            image = reference["image"]
            if any(list(result["segmentation"]["size"]) != [image["height"], image["width"]] for result in results):
                raise ValueError(f"A mask of image {image['id']} is not {image['height']} x {image['width']}.")
            if self.style == "lvis":
                results = sorted(results, key=lambda result: -result["score"])[:LVIS_MAX_DETECTIONS]
                # faster_coco_eval 1.8 drops unknown categories too, but fails (`unordered_map::at`) if none are left.
                known = {annotation["category_id"] for annotation in reference["annotations"]}
                known.update(image["neg_category_ids"])
                results = [result for result in results if result["category_id"] in known]
            annotations = [{"iscrowd": 0} | annotation for annotation in reference["annotations"]]
            images.append(
                {
                    "image": image,
                    "annotations": _select(annotations, "category_id", "segmentation", "area", "iscrowd"),
                    "results": _select(results, "category_id", "segmentation", "score"),
                }
            )
        return {"images": images}

    def _result(self, state: dict[str, Any]) -> dict[str, Any]:
        # Copies, because the evaluation changes the dictionaries. It sorts images by id, so their order has no effect.
        images = [dict(sample["image"]) for sample in state["images"]]
        if len({image["id"] for image in images}) < len(images):
            raise ValueError("An image was added twice.")
        annotations, results = (
            [{**entry, "image_id": sample["image"]["id"]} for sample in state["images"] for entry in sample[key]]
            for key in ("annotations", "results")
        )
        for number, annotation in enumerate(annotations, start=1):
            annotation["id"] = number  # COCO's evaluation interprets 0 as "not matched"
        categories = self.categories or [{"id": i} for i in {annotation["category_id"] for annotation in annotations}]

        truth = COCO({"images": images, "annotations": annotations, "categories": categories})
        evaluator = COCOeval_faster(truth, truth.loadRes(results), "segm", lvis_style=self.style == "lvis")
        if self.style == "lvis":
            evaluator.params.maxDets = [LVIS_MAX_DETECTIONS]
        evaluator.run()
        values = dict(zip(("AP", "AP50", "AP75", "APs", "APm", "APl"), evaluator.stats[:6].tolist(), strict=True))
        if self.style == "lvis":
            values |= {name: evaluator.stats_as_dict[name] for name in ("APr", "APc", "APf")}
        return {name: None if value < 0 else value for name, value in values.items()}


def _select(entries: list[dict[str, Any]], *keys: str) -> list[dict[str, Any]]:
    return [{key: entry[key] for key in keys} for entry in entries]
