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
    MIN_VISIBLE,
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


def test_a_scene_depends_on_seed_and_index_alone_in_any_process_and_drawing_needs_numpy_alone():
    # The folder itself is put on the path: `samclip_hf` imports transformers, which takes seconds.
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
    elsewhere = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    render(99, 0)  # other scenes drawn before make no difference
    assert elsewhere.stdout.strip() == f"{digest(3, range(8))} []"
    assert digest(3, range(8)) != digest(4, range(8))


def test_masks_are_disjoint_visible_and_name_the_pixels_of_the_label_map():
    for index in range(100):
        scene = render(0, index)
        assert scene.image.shape == (IMAGE_SIZE, IMAGE_SIZE, 3) and scene.image.dtype == np.uint8
        assert scene.masks.shape == (len(scene.class_ids), IMAGE_SIZE, IMAGE_SIZE) and scene.masks.dtype == bool
        assert scene.masks.sum(axis=0).max(initial=0) <= 1
        assert (scene.masks.mean(axis=(1, 2)) >= MIN_VISIBLE).all()
        for mask, class_id in zip(scene.masks, scene.class_ids, strict=True):
            assert (scene.label_map[mask] == class_id + 1).all()
        assert (scene.label_map > 0).sum() == scene.masks.sum()


def test_every_pattern_and_colour_is_seen_although_one_pair_in_six_is_held_out():
    assert len(HELD_OUT) == len(set(HELD_OUT)) == len(CLASS_NAMES) // 6
    assert {class_id // len(COLOURS) for class_id in SEEN} == set(range(len(PATTERNS)))
    assert {class_id % len(COLOURS) for class_id in SEEN} == set(range(len(COLOURS)))


def test_held_out_pairs_are_never_captioned():
    held_out_names = [CLASS_NAMES[class_id] for class_id in HELD_OUT]
    undescribed = 0
    for index in range(300):
        scene = render(1, index)
        shown = bool(set(scene.class_ids) & set(HELD_OUT))
        undescribed += shown
        assert (scene.caption is None) == shown
        assert not any(name in (scene.caption or "") for name in held_out_names)
        assert not set(render(1, index, held_out=False).class_ids) & set(HELD_OUT)
    assert undescribed > 50  # they do appear, without words


def test_a_caption_names_each_class_once_and_at_most_the_true_background():
    for index in range(200):
        scene = render(2, index, held_out=False)
        for class_id, name in enumerate(CLASS_NAMES):
            assert scene.caption.count(f"a {name}") == (class_id in scene.class_ids)
        for background in scenes.BACKGROUNDS:
            if f"{background} background" in scene.caption:
                assert background == scene.background


def test_evaluation_scenes_show_one_object_and_are_balanced_over_the_classes():
    shown = [evaluation_scene(5, index).class_ids for index in range(2 * len(CLASS_NAMES))]
    assert shown == [(index % len(CLASS_NAMES),) for index in range(2 * len(CLASS_NAMES))]


@pytest.mark.parametrize("number", [0, 1, 4])
def test_no_more_objects_than_asked_for(number):
    counts = [len(render(6, index, num_objects=number).masks) for index in range(30)]
    assert max(counts) == number
    assert min(counts) >= min(number, 1)
