"""The evaluation sets of the miniature."""

import numpy as np
import pytest

from samclip_cli.evaluate import build_evaluators, build_parser
from samclip_hf.images import decode_mask
from samclip_hf.miniature.scenes import CLASS_NAMES, render, render_cluttered
from samclip_hf.miniature_lab.tasks import NUM_SCENES, num_objects, tasks

EVALUATORS = ("semantic", "prompts", "composed", "cascade")


@pytest.mark.parametrize("evaluator", EVALUATORS)
@pytest.mark.parametrize("suffix", ["", "@cluttered"])
def test_the_samples_of_a_task_are_scenes_with_one_to_four_objects(evaluator, suffix):
    name = f"{evaluator}:miniature" + ("@96" if evaluator == "semantic" and not suffix else suffix)
    data = tasks(seed=201)[name].data
    assert len(data.samples) == NUM_SCENES and ("cluttered" in data.description["data"]) == bool(suffix)
    for index in (0, 6, 7):
        sample = data.samples[index]
        expected = (render_cluttered if suffix else render)(202, index, num_objects=1 + index % 4)
        assert num_objects(sample.key) == len(expected.masks)
        assert np.array_equal(np.asarray(sample.image()), expected.image)
        if evaluator != "prompts":
            assert np.array_equal(sample.label_map(), expected.label_map)
            continue
        for annotation, mask, class_id in zip(sample.objects(), expected.masks, expected.class_ids, strict=True):
            assert np.array_equal(decode_mask(annotation["segmentation"], mask.shape), mask)
            assert data.description["categories"][annotation["category_id"] - 1]["name"] == CLASS_NAMES[class_id]


def test_cascades_differ_in_their_crops_only():
    evaluators = tasks()
    for name, suffix in (("cascade:miniature", "@raw-crops"), ("cascade:miniature@cluttered", "-raw-crops")):
        masked, raw = evaluators[name].describe(), evaluators[name + suffix].describe()
        assert masked.pop("crops") != raw.pop("crops") and masked == raw


def test_the_name_of_a_task_selects_this_task_only():
    def names(task: str) -> list[str]:
        return list(build_evaluators(build_parser().parse_args(["--task", task, "--share", "0.1"])))

    available = list(tasks())
    assert all(names(name) == [name] for name in available)
    suffixes = ("", "@classes", "@cluttered", "@cluttered-classes")
    assert names("composed") == [f"composed:miniature{suffix}" for suffix in suffixes]
    assert names("semantic:miniature") == [f"semantic:miniature@{suffix}" for suffix in ("96", "128", "cluttered")]
