import colorsys
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
    render_cluttered,
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


# Of version 0.1.0: the mean of the image, the areas of the masks, the classes and the caption of `render(3, index)`;
# the mean of the image and the area of the mask of `evaluation_scene(3, index)`.
SCENES = [
    (126.707, [10263], (30,), "a red fuzzy shape", 110.437, 6651),
    (65.923, [], (), "a noisy background", 101.274, 3229),
    (132.430, [3937], (15,), "a yellow dotted shape on a gradient background", 108.876, 2861),
    (
        149.031,
        [3098, 773, 1582],
        (29, 41, 14),
        "a blue dotted shape and a cyan meshed shape and a cyan zigzag shape on a noisy background",
        82.953,
        7033,
    ),
    (164.338, [2952], (42,), "a red marbled shape on a plain background", 153.422, 10675),
    (124.605, [2767, 4345], (39, 2), None, 81.441, 3561),
]


@pytest.mark.parametrize("index", range(1, 7))
def test_scenes_are_those_on_which_the_shipped_models_were_trained_and_evaluated(index):
    mean, areas, class_ids, caption, single_mean, single_area = SCENES[index - 1]
    scene, single = render(3, index), evaluation_scene(3, index)
    assert (scene.class_ids, scene.caption) == (class_ids, caption)
    # Tolerances for the rounding of other processors: another random number changes means by more than 1.
    assert scene.masks.sum(axis=(1, 2)).tolist() == pytest.approx(areas, abs=2)
    assert single.masks.sum() == pytest.approx(single_area, abs=2)
    assert [scene.image.mean(), single.image.mean()] == pytest.approx([mean, single_mean], abs=0.01)


def test_cluttered_scenes_have_disjoint_masks_of_as_many_objects():
    for index in range(40):
        scene = render_cluttered(0, index, num_objects=1 + index % 4)
        assert 1 <= len(scene.masks) == len(scene.class_ids) <= 1 + index % 4
        assert scene.masks.sum(axis=0).max() == 1 and (scene.masks.mean(axis=(1, 2)) >= MIN_AREA).all()
    again = render_cluttered(0, 39, num_objects=4)
    assert np.array_equal(again.image, scene.image) and np.array_equal(again.masks, scene.masks)
    assert not np.array_equal(scene.image, render(0, 39, num_objects=4).image)


def test_the_colors_of_a_cluttered_scene_show_which_pixels_belong_to_objects():
    hues = np.array([0.0, 0.36, 0.63, 0.145, 0.79, 0.5])  # of COLOURS
    num_colorless = 0
    for index in range(40):
        scene = render_cluttered(1, index, num_objects=1 + index % 4)
        chroma = np.ptp(scene.image.astype(int), axis=2) / 255
        assert chroma[scene.label_map == 0].max() < 0.31  # backgrounds have at most 0.3 x 0.95
        num_colorless += ((chroma < 0.02) & (scene.label_map == 0)).mean() > 0.1
        for mask, class_id in zip(scene.masks, scene.class_ids, strict=True):
            colored = scene.image[mask & (chroma > 0.33)]
            assert len(colored) > 0.2 * mask.sum()
            hue = np.array([colorsys.rgb_to_hsv(*pixel / 255)[0] for pixel in colored[::50]])
            distances = np.abs((hue[:, None] - hues + 0.5) % 1 - 0.5)
            assert (distances.argmin(axis=1) == class_id % len(COLOURS)).all()
    assert num_colorless > 10  # clutter and colorless parts
