"""results.json and its tables: results belong to weights and protocols."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import CLIPModel

from samclip_hf import SamClipForImageSegmentation, miniature
from samclip_hf.datasets import DataSet
from samclip_hf.evaluation import (
    CascadeSegmentation,
    ClipAdapter,
    ComposedSegmentation,
    Cost,
    EvaluationResult,
    Evaluator,
    ModelAdapter,
    Results,
    UnmergedAdapter,
    ZeroShotClassification,
    create_model_index,
    load_adapter,
    read_results,
    results_of_model,
)
from samclip_hf.identity import hash_weights


class Model(ModelAdapter):
    """A model of which only the name, the identity and the dtype matter."""

    identity, untrained = "", ()

    def __init__(self, name: str, identity: str, dtype: torch.dtype = torch.float32):
        self.name, self.identity, self.weights = name, identity, identity[::-1]
        self.model = SimpleNamespace(dtype=dtype)


class DescribedEvaluator(Evaluator):
    """An evaluator with a description. The tests add results by hand and never run it."""

    name = "protocol"

    def __init__(self, **description):
        self.description = description

    def describe(self):
        return self.description

    def run(self, model):
        raise AssertionError("The tests of this file run no evaluator.")


def result(value: float) -> EvaluationResult:
    return EvaluationResult({"top1": value}, num_samples=5, seconds=1.0)


def values(results: Results) -> dict[tuple[str, str], float]:
    return {
        (key, name): entry["metrics"]["top1"]
        for key, task in read_results(results.path)["tasks"].items()
        for name, entry in task["models"].items()
    }


WHOLE, QUICK = DescribedEvaluator(data="photos"), DescribedEvaluator(data="photos", only="the first 3 samples")
ONE, TWO = Model("student", "1111111111111111"), Model("student", "2222222222222222")


class TestIdentity:
    @pytest.fixture
    @classmethod
    def unmerged(cls) -> UnmergedAdapter:
        return load_adapter(miniature.sam_teacher(), clip=miniature.clip_teacher())

    @pytest.fixture(scope="class")
    @classmethod
    def clip(cls) -> ClipAdapter:
        return load_adapter(miniature.clip_teacher())

    def test_it_does_not_depend_on_folders_files_or_dtypes(self, clip, tmp_path):
        clip.model.save_pretrained(tmp_path / "shards", max_shard_size="500KB")
        clip.processor.save_pretrained(tmp_path / "shards")
        assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
        copy = load_adapter(str(tmp_path / "shards"), dtype=torch.bfloat16)
        assert copy.model.dtype == torch.bfloat16
        assert (copy.weights, copy.identity) == (clip.weights, clip.identity)

    def test_it_depends_on_every_weight(self):
        model = CLIPModel.from_pretrained(miniature.clip_teacher())
        before = hash_weights(model)
        weight = model.text_model.encoder.layers[1].mlp.fc2.bias
        with torch.no_grad():
            weight[3] += 1e-6
        assert hash_weights(model) != before

    def test_quantized_weights_have_the_hash_of_their_values(self):
        quantization = pytest.importorskip("torchao.quantization")
        model = CLIPModel.from_pretrained(miniature.clip_teacher())
        before = hash_weights(model)
        values = CLIPModel.from_pretrained(miniature.clip_teacher())
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        for layer, copy in zip(model.modules(), values.modules(), strict=True):
            if isinstance(layer, torch.nn.Linear):
                copy.weight.data = layer.weight.dequantize()
        assert hash_weights(model) == hash_weights(values) != before

    def test_it_depends_on_the_configuration_and_the_processor_but_not_on_the_vocabulary(self, tmp_path):
        student = load_adapter(miniature.checkpoint())
        before = student.identity
        for name, change in (
            ("composition", {"composition": "classes"}),
            ("points", {"composition_points": 3}),
            ("vocabulary", None),
        ):
            model = SamClipForImageSegmentation.from_pretrained(miniature.checkpoint(), **(change or {}))
            if change is None:
                model.set_vocabulary(["a cat", "a dog"])
            model.save_pretrained(tmp_path / name)
            student.processor.save_pretrained(tmp_path / name)
            changed = load_adapter(str(tmp_path / name))
            assert changed.weights == student.weights
            assert (changed.identity == before) == (name == "vocabulary"), name
        student.processor.image_processor.image_mean = [0.5, 0.5, 0.5]
        student.processor.save_pretrained(tmp_path / "vocabulary")
        assert load_adapter(str(tmp_path / "vocabulary")).identity != before

    def test_that_of_a_pair_is_that_of_its_unmerged_model(self, unmerged, tmp_path):
        unmerged.model.save_pretrained(tmp_path)
        unmerged.processor.save_pretrained(tmp_path)
        saved = load_adapter(str(tmp_path), dtype=torch.bfloat16)
        assert isinstance(saved, UnmergedAdapter) and saved.model.dtype == torch.bfloat16
        assert (saved.weights, saved.identity) == (unmerged.weights, unmerged.identity)
        unmerged.model.config.clip_image_size = 96  # of another model of the same weights
        unmerged.model.save_pretrained(tmp_path)
        other = load_adapter(str(tmp_path))
        assert other.weights == unmerged.weights and other.identity != unmerged.identity

    def test_settings_of_an_unmerged_model_have_the_sizes_of_both_encoders(self, clip, unmerged):
        sizes = {"image size": "longest edge 128 px", "image size of CLIP": "stretched to 128 x 128 px"}
        assert Cost(32, 32, ["a"]).describe_settings(unmerged) == sizes
        data = DataSet("photos", [], [["a"]])
        assert ZeroShotClassification(data, size=64).describe_settings(unmerged).keys() == {"image size of CLIP"}
        assert ZeroShotClassification(data, size=64).describe_settings(clip) == {}
        assert Cost(32, 32, ["a"]).describe_settings(clip) == {"image size": "shortest edge 64 px, center 64 x 64 px"}
        settings = ComposedSegmentation(data).describe_settings(unmerged)
        assert settings.items() >= (sizes | {"attention of segments": "restricted", "points": "32 per image"}).items()
        settings = CascadeSegmentation(data).describe_settings(unmerged)
        assert settings == sizes | {"image size of CLIP": "64 x 64 px"}

    def test_models_without_some_of_their_weights_raise(self, clip, tmp_path):
        state = {name: value for name, value in clip.model.state_dict().items() if "text_projection" not in name}
        clip.model.save_pretrained(tmp_path, state_dict=state)
        clip.processor.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"lacks weights, which would be random: text_projection\.weight"):
            load_adapter(str(tmp_path))

    def test_a_truncated_file_of_weights_is_named(self, clip, tmp_path):
        clip.model.save_pretrained(tmp_path)
        clip.processor.save_pretrained(tmp_path)
        weights = tmp_path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
        with pytest.raises(
            OSError, match=f"The weights of {tmp_path} cannot be read: a safetensors file is truncated"
        ):
            load_adapter(str(tmp_path))


class TestNames:
    def test_two_models_of_one_name_are_kept_apart(self, tmp_path):
        for model, value in ((ONE, 0.1), (TWO, 0.2)):
            results = Results(tmp_path, "command")  # of two commands
            assert not results.holds("task", WHOLE, model)
            results.add("task", WHOLE, model, result(value))
        assert values(results) == {("task", "student"): 0.1, ("task", "student@22222222"): 0.2}
        for model in (ONE, TWO):
            assert results.holds("task", WHOLE, model)
        assert not results.holds("other", WHOLE, TWO)
        results.add("other", WHOLE, TWO, result(0.3))  # the name is not taken in this task, but in the file
        assert values(results)["other", "student@22222222"] == 0.3
        assert "| task | top1 | 0.100 | 0.200 |\n| other | top1 |  | 0.300 |" in results.markdown()
        assert "- student@22222222: Model, weights 2222222222222222, float32" in results.protocols()
        assert [entry.metric_value for entry in create_model_index(results.content, "student@22222222")] == [0.2, 0.3]

    def test_the_same_weights_under_another_name_have_results_of_their_own(self, tmp_path):
        """Two variants of a training may end with equal weights, and a table has a row for each."""
        results = Results(tmp_path, "command")
        results.add("task", WHOLE, ONE, result(0.1))
        copy = Model("copy", ONE.identity)
        assert not results.holds("task", WHOLE, copy)
        assert results.locate("task", WHOLE, copy) == ("task", "copy")

    def test_another_dtype_is_another_result(self, tmp_path):
        results = Results(tmp_path, "command")
        half = Model("student", ONE.identity, torch.bfloat16)
        for model, value in ((ONE, 0.1), (half, 0.2)):
            assert not results.holds("task", WHOLE, model)
            results.add("task", WHOLE, model, result(value))
        assert values(results) == {("task", "student"): 0.1, ("task", "student (bfloat16)"): 0.2}

    def test_results_of_another_protocol_are_kept_apart(self, tmp_path):
        results = Results(tmp_path, "command")
        for protocol, value in ((WHOLE, 0.1), (QUICK, 0.2)):
            assert not results.holds("task", protocol, ONE)
            results.add("task", protocol, ONE, result(value))
        (first, _), (second, _) = values(results)
        assert (first, second.partition("#")[0]) == ("task", "task") and first != second
        assert values(results) == {("task", "student"): 0.1, (second, "student"): 0.2}
        assert results.holds("task", WHOLE, ONE) and results.holds("task", QUICK, ONE)
        assert f"**{second}**\n\n- data: photos\n- only: the first 3 samples" in results.protocols()

    def test_results_of_two_processes_are_kept(self, tmp_path):
        first, second = Results(tmp_path, "command"), Results(tmp_path, "command")
        first.add("task", WHOLE, ONE, result(0.1))
        second.add("other", WHOLE, ONE, result(0.2))
        second.add("task", WHOLE, TWO, result(0.3))
        assert list(values(second).values()) == [0.1, 0.3, 0.2]


def older_results() -> dict:
    entry = {"kind": "SamClip", "identity": "0123", "figures": {"top1": 0.7}, "num_samples": 5, "seconds": 1.0}
    return {"tasks": {"classification:imagenet@336": {"protocol": {"size": 336}, "models": {"student": entry}}}}


def test_results_of_older_versions_are_read_and_kept(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(older_results()))
    assert create_model_index(read_results(path), "student")[0].metric_value == 0.7
    results = Results(tmp_path, "command")
    results.add("classification:imagenet@336", DescribedEvaluator(size=336), ONE, result(0.8))
    assert [value for _, value in sorted(values(results).items())] == [0.7, 0.8]
    assert "- student: SamClipAdapter, weights not recorded (older version), float32" in results.protocols()


def test_mixed_weights_and_unknown_models_raise(tmp_path):
    content = older_results()
    (task,) = content["tasks"].values()
    content["tasks"]["other"] = json.loads(json.dumps(task))
    assert len(results_of_model(content, "student")) == 2
    content["tasks"]["other"]["models"]["student"]["identity"] = "4567"
    with pytest.raises(ValueError, match="The results of 'student' are of different weights"):
        create_model_index(content, "student")
    with pytest.raises(ValueError, match="no results of 'teacher', but of student"):
        create_model_index(content, "teacher")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"tasks": {"a": {}}}', '{"tasks": {"a": {"models": 3}}}'])
def test_other_files_are_not_read(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=r"results\.json is not a results\.json of `samclip evaluate`"):
        Results(tmp_path, "command")


CLASSIFICATION = {"size": 336, "templates": "CLIP's 80 for ImageNet"}
PATCHES = {"size": "shorter side 448 px, both to whole patches", "window": "none"}
BOXES = {"boxes of a detector": True, "image size": "longest edge 1024 px"}
COMPOSED = {"composition": "classes", "image size": "longest edge 1024 px"}


@pytest.mark.parametrize(
    "key, metric, protocol, expected",
    [
        ("classification:imagenet@336", "top1", CLASSIFICATION, "0.724 (table 1, 6, at 336 px) | -0.024"),
        ("classification:imagenet@224", "top1", CLASSIFICATION | {"size": 224}, "0.717 (table 6, at 224 px) | -0.017"),
        ("classification:imagenet@64", "top1", CLASSIFICATION | {"size": 64}, None),
        ("classification:imagenet", "top1", CLASSIFICATION | {"size": "each model's own image processor"}, None),
        ("classification:imagenet@336", "top1", CLASSIFICATION | {"templates": "1: a {}"}, None),
        ("classification:imagenet@336", "top1", CLASSIFICATION | {"only": "the first 3 samples"}, None),
        ("classification:imagenet@336#0a1b2c3d", "top1", CLASSIFICATION, "0.724 (table 1, 6, at 336 px) | -0.024"),
        ("retrieval:flickr30k", "mean_recall@1", {}, "0.792 (table 1; image size not stated) | "),
        ("instances:coco", "AP", BOXES, "0.409 (table 1, at 1024 px, boxes of ViTDet-B) | +0.291"),
        ("instances:coco", "AP", BOXES | {"boxes of a detector": False}, None),
        ("instances:coco", "AP", BOXES | {"image size": "longest edge 512 px"}, None),
        ("semantic:ade150", "mean_iou", PATCHES, "0.171 (table 2, at 448 px) | +0.529"),
        ("semantic:ade150@224", "mean_iou", PATCHES | {"size": "shorter side 224 px, both to whole patches"}, None),
        ("semantic:ade150", "mean_iou", PATCHES | {"window": "224 px every 112 px, averaged"}, None),
        ("composed:voc21", "mean_iou", COMPOSED, "0.660 (table 5, at 1024 px) | +0.040"),
        ("composed:voc21", "mean_iou", COMPOSED | {"composition": "segments"}, None),
        ("composed:voc21@512", "mean_iou", COMPOSED | {"image size": "longest edge 512 px"}, None),
        ("semantic:my_photos", "mean_iou", PATCHES, None),
    ],
)
def test_tables_compare_with_the_paper_only_what_was_evaluated_as_there(tmp_path, key, metric, protocol, expected):
    """Whether an entry is of the protocol or of the model's settings does not matter."""
    settings = {name: protocol[name] for name in ("image size", "composition") if name in protocol}
    protocol = {name: value for name, value in protocol.items() if name not in settings}
    results = Results(tmp_path, "")
    model = {"kind": "SamClipAdapter", "identity": "", "metrics": {metric: 0.7}, "num_samples": 5, "seconds": 1.0}
    results.content["tasks"][key] = {"protocol": protocol, "models": {"mine": model | {"settings": settings}}}
    row = results.markdown().splitlines()[2]
    assert row == f"| {key} | {metric} | 0.700 |" + (f" {expected} |" if expected is not None else "")


def test_only_models_that_were_evaluated_as_the_paper_have_a_difference(tmp_path):
    results = Results(tmp_path, "")
    model = {"kind": "SamClipAdapter", "identity": "", "metrics": {"mean_iou": 0.7}, "num_samples": 5, "seconds": 1.0}
    models = {name: model | {"settings": COMPOSED | {"composition": name}} for name in ("classes", "segments")}
    results.content["tasks"]["composed:voc21"] = {"protocol": {}, "models": models}
    assert "| 0.700 | 0.700 | 0.660 (table 5, at 1024 px) | +0.040 |  |" in results.markdown()


def test_an_unmerged_model_has_no_difference_from_the_papers_model(tmp_path):
    results = Results(tmp_path, "")
    entry = {"identity": "", "metrics": {"mean_iou": 0.7}, "num_samples": 5, "seconds": 1.0, "settings": {}}
    models = {name: entry | {"kind": f"{name}Adapter"} for name in ("SamClip", "Unmerged")}
    results.content["tasks"]["semantic:ade150"] = {"protocol": PATCHES, "models": models}
    header, _, row = results.markdown().splitlines()[:3]
    assert header == "| task | metric | SamClip | Unmerged | paper's SAM-CLIP | SamClip - paper |"
    assert row == "| semantic:ade150 | mean_iou | 0.700 | 0.700 | 0.171 (table 2, at 448 px) | +0.529 |"
