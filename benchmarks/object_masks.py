"""
Measures the loss of the SAM head when a model is fine-tuned on labeled objects, in the miniature:

    python benchmarks/object_masks.py

`samclip finetune miniature` trains on cluttered scenes, where the mask of a point is ambiguous, as a COCO file: the
masks are the objects without their colorless parts. The table has the results on other cluttered scenes and on
the miniature's own, before and after, with each weight of the loss.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from samclip_cli import main as samclip
from samclip_hf.images import encode_mask
from samclip_hf.miniature.scenes import BACKGROUND_PROMPTS, CLASS_NAMES, render_cluttered

RETENTION = ("composed:miniature@cluttered", "prompts:miniature@cluttered", "composed:miniature", "prompts:miniature")


def write_data(folder: Path, seed: int, num_images: int) -> Path:
    """Writes labeled scenes and returns their COCO file."""
    folder.mkdir()
    images, annotations = [], []
    for index in range(num_images):
        scene = render_cluttered(seed, index, num_objects=1 + index % 4)
        Image.fromarray(scene.image).save(folder / f"{index}.png")
        images.append({"id": index, "file_name": f"{index}.png", "height": 128, "width": 128})
        for mask, class_id in zip(scene.masks, scene.class_ids, strict=True):
            entry = {"id": len(annotations), "image_id": index, "category_id": int(class_id)}
            annotations.append(entry | {"segmentation": encode_mask(mask)})
    categories = [{"id": number, "name": name} for number, name in enumerate(CLASS_NAMES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder / "annotations.json"


def finetune(weight: float, seed: int, num_images: int, options: Sequence[str]) -> dict[str, dict[str, float]]:
    """The results "before" and "after" by metric, with a weight of the loss."""
    with tempfile.TemporaryDirectory() as temporary:
        data = write_data(Path(temporary, "train"), 3_000_000 + seed, num_images)
        eval_data = write_data(Path(temporary, "val"), 4_000_000 + seed, num_images // 4)
        output = Path(temporary, "model")
        own = ["--data", data, "--eval_data", eval_data, "--background", *BACKGROUND_PROMPTS, "--output_dir", output]
        own += ["--retention", *RETENTION, "--seed", seed, "--mask_loss_weight", weight]
        own += ["--eval_strategy", "no", "--load_best_model_at_end", "false", "--save_strategy", "no"]
        assert samclip(["finetune", "miniature", *map(str, own), *options]) == 0
        rows = json.loads((output / "retention.json").read_text())["results"]
    return {when: {f"{row['task']}, {row['metric']}": row[when] for row in rows} for when in ("before", "after")}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 201, 301], help="of scenes and training")
    parser.add_argument("--weights", type=float, nargs="+", default=[0.0, 1.0], help="values of --mask_loss_weight")
    parser.add_argument("--num_images", type=int, default=200, help="labeled scenes for training")
    parser.add_argument("options", nargs="*", help="more arguments of samclip finetune, after --")
    arguments = parser.parse_args(argv)
    table: dict[str, list[dict[str, float]]] = {"before": []}
    for seed in arguments.seeds:
        for number, weight in enumerate(arguments.weights):
            results = finetune(weight, seed, arguments.num_images, arguments.options)
            table.setdefault(f"mask_loss_weight {weight:g}", []).append(results["after"])
            if number == 0:
                table["before"].append(results["before"])
        print(f"\n|  | {' | '.join(table)} |\n|---|{'---|' * len(table)}")
        for name in table["before"][0]:
            cells = [" / ".join(f"{values[name]:.3f}" for values in rows) for rows in table.values()]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
