"""
Measures on scenes of the miniature how well masks are classified, and prints one of four tables:

    python benchmarks/naming.py masks      # methods of embedding a ground-truth mask, classified among 48 names
    python benchmarks/naming.py scores     # independent scores (multi_label): AUROC of present against absent names
    python benchmarks/naming.py composed   # segmentation by text: numbers of points, aspect ratios
    python benchmarks/naming.py time       # segmentation by text: CPU time of cascades, unmerged and merged model
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from time import process_time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from samclip_hf import SamClipForImageSegmentation, SamClipProcessor, miniature, segmentation_samclip
from samclip_hf.evaluation import ModelAdapter, load_adapter
from samclip_hf.miniature.scenes import BACKGROUND_PROMPTS, CLASS_NAMES, TEMPLATES, Scene
from samclip_hf.miniature_lab.report import load_student, load_teachers
from samclip_hf.miniature_lab.tasks import scene, tasks
from samclip_hf.segmentation_samclip import NEUTRAL_NAMES
from samclip_hf.vision_encoder_samclip import SamClipVisionEncoderOutput

SAM, CLIP = miniature.sam_teacher(), miniature.clip_teacher()
PROCESSOR = SamClipProcessor.from_teachers(SAM, CLIP)
# Lists of neutral names for the table of scores.
WORDS_OF_CAPTIONS = ("red", "green", "blue", "yellow", "purple", "cyan", "solid", "lined", "dotted", "tiled", "meshed")
NEUTRAL = {
    '"object"': ("object",),
    '"object", "things", "stuff", "texture" (LERF)': ("object", "things", "stuff", "texture"),
    "NEUTRAL_NAMES (default)": NEUTRAL_NAMES,
    "11 words of the captions": tuple(f"{word} shape" for word in WORDS_OF_CAPTIONS),
}


def unmerged(**arguments) -> SamClipForImageSegmentation:
    return SamClipForImageSegmentation.from_teachers(SAM, CLIP, merged=False, **arguments).eval()


def merged() -> SamClipForImageSegmentation:
    return SamClipForImageSegmentation.from_pretrained(miniature.checkpoint())


def scenes(num_scenes: int, seeds: Sequence[int]) -> list[Scene]:
    return [scene(seed, index) for seed in seeds for index in range(num_scenes)]


# A method of classifying masks: a function of a scene that encodes the image, and a function of the scene and the
# encoded image that computes the logits of the masks `(num_masks, 48)`. The second one is timed.
Method = tuple[Callable[[Scene], Any], Callable[[Scene, Any], Tensor]]


def encoder(model: SamClipForImageSegmentation) -> Callable[[Scene], SamClipVisionEncoderOutput]:
    return lambda drawn: model.get_vision_embeds(PROCESSOR(Image.fromarray(drawn.image))["pixel_values"])


def as_masks(model: SamClipForImageSegmentation) -> Method:
    """Classifies masks with `classify_masks`."""
    vocabulary = model.embed_vocabulary(CLASS_NAMES, templates=TEMPLATES, tokenizer=PROCESSOR.tokenizer)

    def name(drawn: Scene, vision_embeds) -> Tensor:
        return model.classify_masks([drawn.masks], vision_embeds=vision_embeds, vocabulary=vocabulary).logits[0]

    return encoder(model), name


def as_crops(masked: bool) -> Method:
    """Classifies crops around the masks, one by one. Pixels outside a mask have CLIP's mean color if `masked`."""
    pair = load_adapter(SAM, clip=CLIP)
    texts = pair.embed_names(CLASS_NAMES, TEMPLATES)

    def name(drawn: Scene, image: Image.Image) -> Tensor:
        return pair.compare_crops(image, np.stack(drawn.masks), texts, masked=masked)

    return lambda drawn: Image.fromarray(drawn.image), name


def print_masks(arguments: argparse.Namespace) -> None:
    methods: dict[str, Method] = {
        "masked crops, one by one": as_crops(masked=True),
        "crops, one by one": as_crops(masked=False),
    }
    for size in (64, 96, 128):
        methods[f"unmerged, {size} px"] = as_masks(unmerged(clip_image_size=size))
    class_tokens = unmerged()
    class_tokens.config.segment_attention = "class_token"
    methods['unmerged, 128 px, segment_attention="class_token"'] = as_masks(class_tokens)
    methods["shipped SAM-CLIP"] = as_masks(merged())
    drawn_scenes = scenes(arguments.num_scenes, arguments.seeds)
    num_masks = sum(len(drawn.masks) for drawn in drawn_scenes)
    print(f"{num_masks} masks of {len(drawn_scenes)} scenes, {len(CLASS_NAMES)} names\n")
    print("| method | accuracy | by number of objects: 1, 2, 3, 4 | CPU ms per scene |\n|---|---|---|---|")
    for name, (encode, classify) in methods.items():
        correct: dict[int, list[bool]] = {number: [] for number in (1, 2, 3, 4)}
        seconds = 0.0
        for drawn in drawn_scenes:
            encoded = encode(drawn)
            start = process_time()
            found = classify(drawn, encoded).argmax(dim=-1).tolist()
            seconds += process_time() - start
            correct[len(drawn.masks)] += [a == b for a, b in zip(found, drawn.class_ids, strict=True)]
        by_number = " / ".join(f"{np.mean(values):.3f}" for values in correct.values() if values)
        mean = sum(map(sum, correct.values())) / num_masks
        print(f"| {name} | {mean:.3f} | {by_number} | {1000 * seconds / len(drawn_scenes):.1f} |", flush=True)


def auroc(scores: Tensor, is_positive: Tensor) -> float:
    """The area under the ROC curve: the probability that a positive has a higher score than a negative."""
    positive, negative = scores[is_positive], scores[~is_positive].sort().values
    lower, not_higher = (torch.searchsorted(negative, positive, right=right).double() for right in (False, True))
    return float((lower + not_higher).mean() / 2 / len(negative))


def print_scores(arguments: argparse.Namespace) -> None:
    drawn_scenes = scenes(arguments.num_scenes, arguments.seeds)
    owner = torch.tensor([index for index, drawn in enumerate(drawn_scenes) for _ in drawn.masks])
    class_ids = torch.tensor([class_id for drawn in drawn_scenes for class_id in drawn.class_ids])
    of_mask = F.one_hot(class_ids, len(CLASS_NAMES)).bool()
    of_image = torch.zeros(len(drawn_scenes), len(CLASS_NAMES), dtype=torch.bool)
    of_image[owner, class_ids] = True
    print(f"{len(owner)} masks of {len(drawn_scenes)} scenes, {len(CLASS_NAMES)} names\n")
    print(
        "| model | neutral names | AUROC of masks | AUROC of images | true and false positive rate of masks at 0.5 |"
        " at 0.9 |\n|---|---|---|---|---|---|"
    )
    for model_name, model in {"unmerged": unmerged(), "shipped SAM-CLIP": merged()}.items():
        vocabulary = model.embed_vocabulary(CLASS_NAMES, templates=TEMPLATES, tokenizer=PROCESSOR.tokenizer)
        embeds = torch.cat(
            [
                model.classify_masks(
                    [drawn.masks], **PROCESSOR(Image.fromarray(drawn.image)), vocabulary=vocabulary
                ).segment_embeds[0]
                for drawn in drawn_scenes
            ]
        )
        rows = {"none: cosine similarity": model.classify(embeds, vocabulary)}
        for name, neutral in NEUTRAL.items():
            segmentation_samclip.NEUTRAL_NAMES = neutral
            calibrated = model.embed_vocabulary(
                CLASS_NAMES, templates=TEMPLATES, tokenizer=PROCESSOR.tokenizer, multi_label=True
            )
            rows[name] = model.classify(embeds, calibrated, multi_label=True)
        for name, logits in rows.items():
            highest = torch.stack([logits[owner == index].amax(dim=0) for index in range(len(drawn_scenes))])
            rates = []
            for threshold in (0.5, 0.9):
                found = logits.sigmoid() >= threshold
                rates.append(f"{found[of_mask].float().mean():.3f} / {found[~of_mask].float().mean():.3f}")
            rates = ["-", "-"] if name.startswith("none") else rates
            areas = f"{auroc(logits, of_mask):.4f} | {auroc(highest, of_image):.4f}"
            print(f"| {model_name} | {name} | {areas} | {' | '.join(rates)} |", flush=True)


def shapes(drawn: Scene) -> Iterator[tuple[str, Image.Image, np.ndarray]]:
    """A scene in several shapes: name, image and label map."""
    image, labels = Image.fromarray(drawn.image), drawn.label_map.astype(np.uint8)
    yield "1:1", image, labels
    yield "2:1, cropped", image.crop((0, 32, 128, 96)), labels[32:96]
    wide = Image.new("RGB", (256, 128), tuple(drawn.image[0, 0].tolist()))
    wide.paste(image, (64, 0))
    yield "2:1, extended by one color", wide, np.pad(labels, ((0, 0), (64, 64)))
    height, width = 400, 512
    rows, columns = np.arange(height) * 100 // height, np.arange(width) * 128 // width
    cropped = image.crop((0, 0, 128, 100)).resize((width, height), Image.Resampling.BICUBIC)
    yield "5:4, cropped, enlarged to 512 x 400", cropped, labels[rows][:, columns]


def print_composed(arguments: argparse.Namespace) -> None:
    drawn_scenes = scenes(arguments.num_scenes, arguments.seeds)
    models = {
        "unmerged, 16 points": (unmerged(), 16),
        "unmerged, 32 points": (unmerged(), 32),
        "unmerged, 64 points": (unmerged(), 64),
        "shipped SAM-CLIP, 16 points": (merged(), 16),
    }
    print(f"{len(drawn_scenes)} scenes, {len(CLASS_NAMES)} names, mIoU (CPU ms per image)\n")
    names = [name for name, _, _ in shapes(drawn_scenes[0])]
    print(f"| model | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for model_name, (model, num_points) in models.items():
        model.set_vocabulary(CLASS_NAMES, BACKGROUND_PROMPTS, TEMPLATES, PROCESSOR.tokenizer)
        model.config.composition_points = num_points
        counts = {name: np.zeros((49, 49), dtype=np.int64) for name in names}  # of pixels by label and prediction
        seconds = dict.fromkeys(names, 0.0)
        for drawn in drawn_scenes:
            for name, image, labels in shapes(drawn):
                start = process_time()
                outputs = model(**PROCESSOR(image))
                (found,) = PROCESSOR.post_process_semantic_segmentation(outputs, [labels.shape])
                seconds[name] += process_time() - start
                pairs = labels.astype(np.int64) * 49 + found.numpy()
                counts[name] += np.bincount(pairs.ravel(), minlength=49 * 49).reshape(49, 49)
        cells = []
        for name in names:
            both, labeled, predicted = np.diag(counts[name]), counts[name].sum(axis=1), counts[name].sum(axis=0)
            iou = both[labeled > 0] / (labeled + predicted - both)[labeled > 0]
            cells.append(f"{iou.mean():.3f} ({1000 * seconds[name] / len(drawn_scenes):.0f})")
        print(f"| {model_name} | {' | '.join(cells)} |", flush=True)


def print_time(arguments: argparse.Namespace) -> None:
    images = [Image.fromarray(drawn.image) for drawn in scenes(arguments.num_scenes, arguments.seeds)]
    _, _, pair = load_teachers()
    evaluators = tasks(arguments.seeds[0])
    rows: dict[str, tuple[str, ModelAdapter]] = {
        "cascade, raw crops": ("cascade:miniature@raw-crops", pair),
        "cascade, masked crops": ("cascade:miniature", pair),
        "unmerged": ("composed:miniature", pair),
        "shipped SAM-CLIP": ("composed:miniature", load_student(miniature.checkpoint())),
    }
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for task, model in rows.values():
        evaluators[task].prepare(model)
        evaluators[task].predict(model, images[0])  # the first pass takes longer
    for image in images:
        for name, (task, model) in rows.items():
            start = process_time()
            evaluators[task].predict(model, image)
            seconds[name].append(process_time() - start)
    print(f"{len(images)} scenes, {len(CLASS_NAMES)} names\n\n| model | CPU ms per scene |\n|---|---|")
    for name, own in seconds.items():
        print(f"| {name} | {1000 * sum(own) / len(own):.0f} |")


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = {"masks": print_masks, "scores": print_scores, "composed": print_composed, "time": print_time}
    parser.add_argument("table", choices=tables)
    parser.add_argument("--num_scenes", type=int, default=60, help="number of scenes of each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 201, 301])
    arguments = parser.parse_args(argv)
    tables[arguments.table](arguments)


if __name__ == "__main__":
    main()
