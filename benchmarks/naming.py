"""
Classifies the ground-truth masks of the miniature's scenes among all 48 class names, and compares three methods of
embedding a mask: masked crops of the cascade, segments of an unmerged model at several image sizes of CLIP, and
segments of the shipped SAM-CLIP.

    python benchmarks/naming.py --num_scenes 60
"""

import argparse
from collections.abc import Callable, Sequence
from time import perf_counter

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from samclip_hf import SamClipForImageSegmentation, SamClipProcessor, miniature
from samclip_hf.evaluation import UnmergedAdapter, load_adapter
from samclip_hf.miniature.scenes import CLASS_NAMES, TEMPLATES, Scene
from samclip_hf.miniature_lab.tasks import scene


def by_crops(pair: UnmergedAdapter) -> Callable[[Scene], Tensor]:
    """Returns a function that computes the logits of the masks of a scene `(num_masks, 48)` from masked crops."""
    texts = pair.embed_names(CLASS_NAMES, TEMPLATES)
    return lambda drawn: pair.compare_crops(Image.fromarray(drawn.image), np.stack(drawn.masks), texts)


def by_segments(model: SamClipForImageSegmentation, processor: SamClipProcessor) -> Callable[[Scene], Tensor]:
    """Returns a function that computes the logits of the masks of a scene `(num_masks, 48)` from segments."""
    vocabulary = model.eval().embed_vocabulary(CLASS_NAMES, templates=TEMPLATES, tokenizer=processor.tokenizer)

    @torch.inference_mode()
    def name(drawn: Scene) -> Tensor:
        inputs = processor(Image.fromarray(drawn.image))
        patch_tokens = model.get_vision_embeds(inputs["pixel_values"]).patch_tokens
        masks = torch.from_numpy(np.stack(drawn.masks)).float()
        coverage = F.adaptive_avg_pool2d(masks, patch_tokens.shape[1:3])
        segments = (coverage >= 0.5) | (coverage >= coverage.amax(dim=(1, 2), keepdim=True))
        embeds = F.normalize(model.clip_head.pool_segments(patch_tokens, segments[None]), dim=-1)
        return model.classify(embeds[0], vocabulary)

    return name


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_scenes", type=int, default=60)
    parser.add_argument("--seed", type=int, default=102)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 96, 128], help="sizes of CLIP's images")
    arguments = parser.parse_args(argv)
    sam, clip = miniature.sam_teacher(), miniature.clip_teacher()
    methods = {"masked crops of the cascade": by_crops(load_adapter(sam, clip=clip))}
    processor = SamClipProcessor.from_teachers(sam, clip)
    for size in arguments.sizes:
        model = SamClipForImageSegmentation.from_teachers(sam, clip, merged=False, clip_image_size=size)
        methods[f"segments of the unmerged model, {size} px"] = by_segments(model, processor)
    merged = SamClipForImageSegmentation.from_pretrained(miniature.checkpoint())
    methods["segments of the shipped SAM-CLIP"] = by_segments(merged, processor)

    scenes = [scene(arguments.seed, index) for index in range(arguments.num_scenes)]
    scenes = [drawn for drawn in scenes if all(mask.any() for mask in drawn.masks)]
    num_masks = sum(len(drawn.masks) for drawn in scenes)
    print(f"{num_masks} masks of {len(scenes)} scenes, seed {arguments.seed}, {len(CLASS_NAMES)} names\n")
    print("| method | accuracy | by number of objects: 1, 2, 3, 4 | ms per scene |\n|---|---|---|---|")
    for name, method in methods.items():
        correct: dict[int, list[bool]] = {number: [] for number in (1, 2, 3, 4)}
        start = perf_counter()
        for drawn in scenes:
            found = method(drawn).argmax(dim=-1).tolist()
            correct[len(drawn.masks)] += [a == b for a, b in zip(found, drawn.class_ids, strict=True)]
        duration = 1000 * (perf_counter() - start) / len(scenes)
        by_number = " / ".join(f"{np.mean(values):.3f}" for values in correct.values() if values)
        mean = sum(map(sum, correct.values())) / num_masks
        print(f"| {name} | {mean:.3f} | {by_number} | {duration:.0f} |", flush=True)


if __name__ == "__main__":
    main()
