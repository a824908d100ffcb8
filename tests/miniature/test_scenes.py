import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from samclip_hf.miniature import scenes
from samclip_hf.miniature.scenes import (
    CLASS_NAMES,
    COLOURS,
    HELD_OUT,
    IMAGE_SIZE,
    MIN_AREA,
    PATTERNS,
    SEEN,
    evaluation_scene,
    render,
)


def digest(seed, indices):
    hashed = hashlib.sha256()
    for index in indices:
        scene = render(seed, index)
        hashed.update(scene.image.tobytes() + scene.masks.tobytes() + repr((scene.class_ids, scene.caption)).encode())
    return hashed.hexdigest()


def test_a_scene_depends_only_on_seed_and_index_and_needs_only_numpy():
    # The folder of the package is put on the path, because importing `samclip_hf` imports torch.
    command = (
        "import hashlib, sys\n"
        f"sys.path.insert(0, {str(Path(scenes.__file__).parents[1])!r})\n"
        "from miniature.scenes import render\n"
        "hashed = hashlib.sha256()\n"
        "for index in range(8):\n"
        "    scene = render(3, index)\n"
        "    description = repr((scene.class_ids, scene.caption)).encode()\n"
        "    hashed.update(scene.image.tobytes() + scene.masks.tobytes() + description)\n"
        "print(hashed.hexdigest(), [name for name in ('torch', 'datasets', 'pycocotools') if name in sys.modules])\n"
    )
    process = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    render(99, 0)  # a scene does not depend on scenes drawn before
    assert process.stdout.strip() == f"{digest(3, range(8))} []"
    assert digest(3, range(8)) != digest(4, range(8))


def test_masks_are_disjoint_and_visible_and_agree_with_the_label_map():
    for index in range(100):
        scene = render(0, index)
        assert scene.image.shape == (IMAGE_SIZE, IMAGE_SIZE, 3) and scene.image.dtype == np.uint8
        assert scene.masks.shape == (len(scene.class_ids), IMAGE_SIZE, IMAGE_SIZE) and scene.masks.dtype == bool
        assert scene.masks.sum(axis=0).max(initial=0) <= 1
        assert (scene.masks.mean(axis=(1, 2)) >= MIN_AREA).all()
        for mask, class_id in zip(scene.masks, scene.class_ids, strict=True):
            assert (scene.label_map[mask] == class_id + 1).all()
        assert (scene.label_map > 0).sum() == scene.masks.sum()


def test_every_pattern_and_color_occurs_in_classes_that_are_not_held_out():
    assert len(HELD_OUT) == len(set(HELD_OUT)) == len(CLASS_NAMES) // 6
    assert {class_id // len(COLOURS) for class_id in SEEN} == set(range(len(PATTERNS)))
    assert {class_id % len(COLOURS) for class_id in SEEN} == set(range(len(COLOURS)))


def test_scenes_with_held_out_classes_have_no_caption():
    held_out_names = [CLASS_NAMES[class_id] for class_id in HELD_OUT]
    num_without_caption = 0
    for index in range(300):
        scene = render(1, index)
        has_held_out = bool(set(scene.class_ids) & set(HELD_OUT))
        num_without_caption += has_held_out
        assert (scene.caption is None) == has_held_out
        assert not any(name in (scene.caption or "") for name in held_out_names)
        assert not set(render(1, index, held_out=False).class_ids) & set(HELD_OUT)
    assert num_without_caption > 50


def test_a_caption_names_each_class_once_and_no_other_background():
    for index in range(200):
        scene = render(2, index, held_out=False)
        for class_id, name in enumerate(CLASS_NAMES):
            assert scene.caption.count(f"a {name}") == (class_id in scene.class_ids)
        for background in scenes.BACKGROUNDS:
            if f"{background} background" in scene.caption:
                assert background == scene.background


def test_evaluation_scenes_contain_one_object_and_are_balanced_over_the_classes():
    class_ids = [evaluation_scene(5, index).class_ids for index in range(2 * len(CLASS_NAMES))]
    assert class_ids == [(index % len(CLASS_NAMES),) for index in range(2 * len(CLASS_NAMES))]


@pytest.mark.parametrize("num_objects", [0, 1, 4])
def test_a_scene_contains_at_most_num_objects(num_objects):
    counts = [len(render(6, index, num_objects=num_objects).masks) for index in range(30)]
    assert max(counts) == num_objects
    assert min(counts) >= min(num_objects, 1)
