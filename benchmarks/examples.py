"""
Measures vocabularies of examples on scenes of the miniature, and prints one of two tables:

    python benchmarks/examples.py segmentation  # mean IoU with 48 names: words, examples, and both
    python benchmarks/examples.py mixed         # masks named by 24 words and 24 examples in one vocabulary
    python benchmarks/examples.py mixed --num_names 2 --num_splits 100  # by 1 word and 1 example

The examples are boxes on scenes of another seed than those of the measurement.
"""

import argparse
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image

from samclip_hf import SamClipForImageSegmentation, SamClipProcessor, SamClipVocabulary, miniature
from samclip_hf.images import mask_to_prompt_box
from samclip_hf.miniature.scenes import BACKGROUND_PROMPTS, CLASS_NAMES, TEMPLATES, render
from samclip_hf.miniature_lab.tasks import scene

SAM, CLIP = miniature.sam_teacher(), miniature.clip_teacher()
PROCESSOR = SamClipProcessor.from_teachers(SAM, CLIP)
NUM_NAMES = len(CLASS_NAMES)
EXAMPLE_SEED = 7


def load(name: str) -> SamClipForImageSegmentation:
    if name == "shipped":
        return SamClipForImageSegmentation.from_pretrained(miniature.checkpoint())
    return SamClipForImageSegmentation.from_teachers(SAM, CLIP, merged=False).eval()


def find_examples(
    shots: int, class_ids: Sequence[int] = range(NUM_NAMES)
) -> tuple[list[Image.Image], list[list[str]], list[list[tuple]]]:
    """Images, and the labels and boxes in each: the first `shots` objects of each class."""
    missing = dict.fromkeys(class_ids, shots)
    images, labels, boxes = [], [], []
    index = 0
    while any(missing.values()):
        drawn = render(EXAMPLE_SEED, index)
        index += 1
        own = []
        for class_id, mask in zip(drawn.class_ids, drawn.masks, strict=True):
            if missing.get(class_id):
                missing[class_id] -= 1
                own.append((CLASS_NAMES[class_id], mask_to_prompt_box(mask)))
        if own:
            images.append(Image.fromarray(drawn.image))
            labels.append([label for label, _ in own])
            boxes.append([box for _, box in own])
    return images, labels, boxes


def vocabularies(model: SamClipForImageSegmentation, shots: Sequence[int]) -> Iterator[tuple[str, SamClipVocabulary]]:
    words = model.embed_vocabulary(CLASS_NAMES, BACKGROUND_PROMPTS, TEMPLATES, PROCESSOR.tokenizer)
    yield "words", words
    for number in shots:
        images, labels, boxes = find_examples(number)
        shown = {"images": images, "labels": labels, "boxes": boxes, "processor": PROCESSOR}
        title = f"{number} example{'s' * (number > 1)} of each class"
        yield title, model.embed_examples(**shown, background="surroundings")
        yield f"words and {title}", model.embed_examples(**shown, vocabulary=words)
        both = model.embed_examples(**shown, vocabulary=words, background="surroundings")
        yield f"words and {title}, with surroundings", both


def mean_iou(model, vocabulary: SamClipVocabulary, encoded: list) -> float:
    """The mean IoU of label maps over the labels of the vocabulary, whose order may be any."""
    class_ids = [0, *(CLASS_NAMES.index(name) + 1 for label, name in vocabulary.id2label.items() if label)]
    counts = np.zeros((NUM_NAMES + 1, NUM_NAMES + 1), dtype=np.int64)  # of pixels by label and prediction
    for drawn, vision_embeds in encoded:
        outputs = model(vision_embeds=vision_embeds, vocabulary=vocabulary)
        (found,) = PROCESSOR.post_process_semantic_segmentation(outputs, [drawn.label_map.shape])
        pairs = drawn.label_map * (NUM_NAMES + 1) + np.array(class_ids)[found.numpy()]
        counts += np.bincount(pairs.ravel(), minlength=counts.size).reshape(counts.shape)
    both, labeled, predicted = np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)
    return float((both[labeled > 0] / (labeled + predicted - both)[labeled > 0]).mean())


def encode(model, num_scenes: int, seed: int) -> list:
    drawn_scenes = [scene(seed, index) for index in range(num_scenes)]
    return [
        (drawn, model.get_vision_embeds(PROCESSOR(Image.fromarray(drawn.image))["pixel_values"]))
        for drawn in drawn_scenes
    ]


def print_segmentation(arguments: argparse.Namespace) -> None:
    print(f"{arguments.num_scenes} scenes of each seed, {NUM_NAMES} names, mean IoU\n")
    print(f"| model | classes | {' | '.join(map(str, arguments.seeds))} |\n|---|---|{'---|' * len(arguments.seeds)}")
    for name in arguments.models:
        model = load(name)
        encoded = [encode(model, arguments.num_scenes, seed) for seed in arguments.seeds]
        for title, vocabulary in vocabularies(model, arguments.shots):
            cells = [f"{mean_iou(model, vocabulary, own):.3f}" for own in encoded]
            print(f"| {name} | {title} | {' | '.join(cells)} |", flush=True)


def print_mixed(arguments: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(0)
    splits = [
        torch.randperm(NUM_NAMES, generator=generator)[: arguments.num_names] for _ in range(arguments.num_splits)
    ]
    print("| model | examples of each class | embeddings of examples | right | words | examples | named by a word |")
    print("|---|---|---|---|---|---|---|")
    for name in arguments.models:
        model = load(name)
        encoded = [pair for seed in arguments.seeds for pair in encode(model, arguments.num_scenes, seed)]
        queries = torch.cat([model.embed_masks([own.masks], vision_embeds=embeds)[0] for own, embeds in encoded])
        class_ids = torch.tensor([class_id for drawn, _ in encoded for class_id in drawn.class_ids])
        for number in arguments.shots:
            values: dict[str, list] = {"unchanged": [], "moved to the texts": []}
            for split in splits:
                of_words, of_examples = (part.tolist() for part in split.tensor_split(2))
                is_word = torch.isin(torch.arange(NUM_NAMES), torch.tensor(of_words))
                is_asked = torch.isin(class_ids, split)
                names = [CLASS_NAMES[class_id] for class_id in of_words]
                words = model.embed_vocabulary(names, (), TEMPLATES, PROCESSOR.tokenizer)
                images, labels, boxes = find_examples(number, of_examples)
                shown = {"images": images, "labels": labels, "boxes": boxes, "processor": PROCESSOR}
                moved = model.embed_examples(**shown, vocabulary=words)
                alone = model.embed_examples(**shown)
                of_rows = torch.tensor([CLASS_NAMES.index(moved.id2label[label]) for label in moved.label_ids])
                for method, rows in (
                    ("unchanged", torch.cat([words.class_embeds, alone.class_embeds])),
                    ("moved to the texts", moved.class_embeds),
                ):
                    found = of_rows[(queries[is_asked] @ rows.T).argmax(dim=-1)]
                    right, of_word = found == class_ids[is_asked], is_word[class_ids[is_asked]]
                    parts = (right, right[of_word], right[~of_word], is_word[found])
                    values[method].append([part.float().mean() for part in parts])
            for method, own in values.items():
                cells = " | ".join(f"{value:.3f}" for value in torch.tensor(own).mean(dim=0).tolist())
                print(f"| {name} | {number} | {method} | {cells} |", flush=True)


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = {"segmentation": print_segmentation, "mixed": print_mixed}
    parser.add_argument("table", choices=tables)
    parser.add_argument("--models", nargs="+", choices=["shipped", "unmerged"], default=["shipped", "unmerged"])
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 3], help="examples of each class")
    parser.add_argument("--num_scenes", type=int, default=60, help="number of scenes of each seed")
    parser.add_argument("--num_splits", type=int, default=10, help="of mixed: random choices of the names")
    parser.add_argument(
        "--num_names", type=int, default=NUM_NAMES, help="of mixed: number of names, half of them words (default: 48)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 201, 301])
    arguments = parser.parse_args(argv)
    tables[arguments.table](arguments)


if __name__ == "__main__":
    main()
