"""Training arguments: validation and deprecated names."""

import copy

import pytest

from samclip_hf import distillation, miniature
from samclip_hf.distillation import EmbeddingCache, SamClipTrainingArguments, provenance
from samclip_hf.distillation.arguments import DEPRECATED_ARGUMENTS


@pytest.fixture
def make_arguments(tmp_path):
    def make(**arguments) -> SamClipTrainingArguments:
        return SamClipTrainingArguments(output_dir=str(tmp_path), max_steps=1, use_cpu=True, **arguments)

    return make


def test_deprecated_names_are_accepted_with_a_warning(make_arguments):
    with pytest.warns(FutureWarning, match=r"clip_sizes is deprecated .* Use clip_resolutions"):
        args = make_arguments(clip_sizes=[64])
    assert args.clip_resolutions == [64]
    with pytest.warns(FutureWarning, match="Use clip_resolutions"):
        assert args.clip_sizes == [64]
    with pytest.warns(FutureWarning), pytest.raises(TypeError, match="deprecated name of min_crop_scale"):
        make_arguments(min_crop=0.1, min_crop_scale=0.2)


def test_every_deprecated_name_has_a_current_one(make_arguments):
    args = make_arguments()
    assert vars(args).keys() >= set(DEPRECATED_ARGUMENTS.values())
    assert not vars(args).keys() & DEPRECATED_ARGUMENTS.keys()
    assert copy.deepcopy(args).clip_resolutions == args.clip_resolutions


def test_an_unknown_attribute_raises_an_attribute_error(make_arguments):
    with pytest.raises(AttributeError, match="no attribute 'clip_size'"):
        _ = make_arguments().clip_size


def test_teacher_store_is_a_deprecated_alias():
    with pytest.warns(FutureWarning, match="Use EmbeddingCache"):
        assert distillation.TeacherStore is EmbeddingCache
    with pytest.raises(AttributeError, match="no attribute 'Store'"):
        _ = distillation.Store


def test_provenance_of_earlier_releases_is_read_by_current_names():
    for stage in provenance.read(miniature.checkpoint()):
        assert "clip_resolutions" in stage["arguments"]
        assert not stage["arguments"].keys() & DEPRECATED_ARGUMENTS.keys()
