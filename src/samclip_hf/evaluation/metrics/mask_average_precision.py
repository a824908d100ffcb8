"""Average precision of instance segmentation, as COCO and LVIS measure it."""

from typing import Any, Literal

from datasets import Features, Json, List, Value
from faster_coco_eval import COCO, COCOeval_faster

from .accumulating import AccumulatingMetric

LVIS_MAX_DETECTIONS = 300  # an image, of all categories together (lvis-api, `LVISResults`)


class MaskAveragePrecision(AccumulatingMetric):
    r"""
    Mask AP over IoU thresholds 0.50 to 0.95 and over categories (https://cocodataset.org/#detection-eval), by
    `faster_coco_eval`, whose figures equal pycocotools'.

    references (list of `dict`):
        Of each image `"image"`, its entry in the annotation file: `"id"`, `"height"`, `"width"`, and for LVIS
        `"neg_category_ids"` and `"not_exhaustive_category_ids"`; and `"annotations"`: `"category_id"`,
        `"segmentation"` (polygons or run lengths), `"area"` and, where there is one, `"iscrowd"`. Their own ids do not
        matter.
    predictions (list of lists of `dict`):
        Of each image COCO results: `"category_id"`, `"segmentation"` (compressed run lengths), `"score"`. Small,
        medium and large are told by the mask: a box, if any, is not looked at.
    style (`str`):
        "coco": at most 100 detections an image and category. "lvis" (Gupta et al., arXiv 1908.03195): at most 300 an
        image, which count only where it is known whether the category is there.
    categories (`list[dict]`, *optional*):
        The annotation file's: `"id"` and, for LVIS, `"frequency"`, one of r, c and f. COCO's need not be given: what
        does not occur in the references does not enter the mean.

    `compute` returns `AP`, `AP50`, `AP75`, `APs`, `APm`, `APl`, for LVIS also `APr`, `APc`, `APf`, between 0 and 1,
    and `None` where no object is of that kind, for which COCO says -1. `ValueError` where an image was added twice, a
    mask is not of its image's size, or LVIS's categories lack their frequency.
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
            raise ValueError(f'The style is "coco" or "lvis", not {style!r}.')
        if style == "lvis" and (not categories or any("frequency" not in category for category in categories)):
            raise ValueError("LVIS needs the annotation file's categories, with their frequencies.")
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
                # faster_coco_eval 1.8 drops them too, but fails (`unordered_map::at`) where an image has no others.
                known = {annotation["category_id"] for annotation in reference["annotations"]}
                known.update(image["neg_category_ids"])
                results = [result for result in results if result["category_id"] in known]
            annotations = [{"iscrowd": 0} | annotation for annotation in reference["annotations"]]
            images.append(
                {
                    "image": image,
                    "annotations": chosen(annotations, "category_id", "segmentation", "area", "iscrowd"),
                    "results": chosen(results, "category_id", "segmentation", "score"),
                }
            )
        return {"images": images}

    def _result(self, state: dict[str, Any]) -> dict[str, Any]:
        # The evaluation sorts images by their ids, so their order here does not matter. It writes into dictionaries.
        images = [dict(sample["image"]) for sample in state["images"]]
        if len({image["id"] for image in images}) < len(images):
            raise ValueError("An image was added twice.")
        annotations, results = (
            [{**entry, "image_id": sample["image"]["id"]} for sample in state["images"] for entry in sample[key]]
            for key in ("annotations", "results")
        )
        for number, annotation in enumerate(annotations, start=1):
            annotation["id"] = number  # 0 would mean "not matched" to COCO's evaluation
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


def chosen(entries: list[dict[str, Any]], *keys: str) -> list[dict[str, Any]]:
    return [{key: entry[key] for key in keys} for entry in entries]
