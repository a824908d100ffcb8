"""A model that is right on known pixels has the known score, one that is wrong has 0."""

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCardData
from PIL import Image
from sklearn.linear_model import LogisticRegression
from transformers import CLIPModel, CLIPProcessor, SamProcessor

from samclip_hf import SamClipForImageSegmentation, SamClipModel, SamClipProcessor, miniature
from samclip_hf.datasets import (
    IGNORE_INDEX,
    CaptionedImage,
    DataSet,
    ImageWithObjects,
    LabeledImage,
    SegmentedImage,
)
from samclip_hf.evaluation import (
    CascadeAdapter,
    CascadeSegmentation,
    ClipAdapter,
    Cost,
    HeadProbing,
    ImageTextAdapter,
    LinearProbing,
    ModelAdapter,
    PromptableAdapter,
    PromptedSegmentation,
    Results,
    Retrieval,
    SamAdapter,
    SamClipAdapter,
    SemanticSegmentation,
    ZeroShotClassification,
    ZeroShotInstanceSegmentation,
    cost,
    create_model_index,
    load_adapter,
    save_result_panel,
)
from samclip_hf.evaluation.linear_probing import fit_logistic_regression
from samclip_hf.evaluation.prompted_segmentation import center_pixel
from samclip_hf.evaluation.semantic_segmentation import window_starts
from samclip_hf.images import encode_mask
from samclip_hf.miniature.scenes import CLASS_NAMES, HELD_OUT, TEMPLATES, evaluation_scene
from samclip_hf.miniature_lab.report import set_miniature_vocabulary
from samclip_hf.miniature_lab.tasks import labeled_images, segmented_images, tasks

NAMES = [["background"], ["red", "scarlet"], ["green"], ["blue"]]
SHADES = (0, 60, 120, 180)  # of grey: what the oracles below read a class from


def picture(classes) -> Image.Image:
    return Image.fromarray(np.repeat(np.array(SHADES, dtype=np.uint8)[np.asarray(classes)][..., None], 3, axis=2))


class Oracle(ImageTextAdapter, PromptableAdapter):
    """Reads classes from shades of grey; with a `shift` it names the next class and draws what is around an object."""

    def __init__(self, shift: int = 0):
        self.name, self.shift = "oracle", shift
        parameter = torch.nn.Parameter(torch.zeros(1))
        self.model = SimpleNamespace(device="cpu", parameters=lambda: [parameter])
        self.image_processor = SimpleNamespace(image_mean=[0.5] * 3)

    models = property(lambda self: [])
    logit_scale = 1.0

    def one_hot(self, classes):
        return torch.nn.functional.one_hot(torch.as_tensor(classes), len(NAMES)).float()

    def classes(self, image):
        return np.searchsorted(SHADES, np.asarray(image)[..., 0].astype(int) - 29)

    def embed_texts(self, texts):
        words = {name: label for label, synonyms in enumerate(NAMES) for name in synonyms} | {"nothing": 0}
        return self.one_hot([(words[text.split()[-1]] + self.shift) % len(NAMES) for text in texts])

    def embed_images(self, images, size=None):
        shown = [self.classes(image)[np.asarray(image)[..., 0] != 127] for image in images]  # but for the mean colour
        return self.one_hot([np.bincount(classes).argmax() for classes in shown])

    def embed_patches(self, image, size):
        return self.one_hot(self.classes(image)).permute(2, 0, 1)

    def predict_masks(self, image, points=None, boxes=None):
        if points is None:
            points = (boxes[:, :2] + boxes[:, 2:]).long() // 2
        classes = self.classes(image)
        right = torch.from_numpy(np.stack([classes == classes[y, x] for x, y in points.long().tolist()]))
        right = right if not self.shift else ~right
        if boxes is not None:
            return right[:, None], torch.ones(len(right), 1)
        return torch.stack([~right, right, ~right], dim=1), torch.tensor([[0.1, 0.9, 0.2]] * len(right))

    def generate_masks(self, image, **thresholds):
        classes = self.classes(image)
        return np.stack([classes == label for label in np.unique(classes)])

    def patch_features(self, images, size):
        return {"shades": torch.stack([self.one_hot(self.classes(image)).permute(2, 0, 1) for image in images])}


def scenes() -> list[np.ndarray]:
    """Class maps `(12, 16)` in which every class occurs."""
    maps = []
    for number in range(5):
        classes = np.zeros((12, 16), dtype=np.int64)
        classes[1:5, 2:9] = 1 + number % 3
        classes[6:11, 8:15] = 1 + (number + 1) % 3
        maps.append(classes)
    return maps


def segmented(ignored: bool = False) -> DataSet[SegmentedImage]:
    def truth(classes):
        return np.where((classes == 1) & ignored, IGNORE_INDEX, classes)

    samples = [SegmentedImage(str(n), partial(picture, m), partial(truth, m)) for n, m in enumerate(scenes())]
    return DataSet("shades", samples, NAMES, ["nothing"])


def with_objects() -> DataSet[ImageWithObjects]:
    def objects(number, classes):
        return [
            {
                "id": number * 9 + int(label),
                "image_id": number,
                "category_id": int(label),
                "segmentation": encode_mask(classes == label, compressed=True),
                "bbox": box,
                "area": int((classes == label).sum()),
                "iscrowd": 0,
            }
            for label, box in ((classes[2, 3], [2, 1, 6, 3]), (classes[8, 10], [8, 6, 6, 4]))
        ]

    samples = [
        ImageWithObjects(
            str(n), partial(picture, m), partial(objects, n, m), image_info={"id": n, "height": 12, "width": 16}
        )
        for n, m in enumerate(scenes())
    ]
    return DataSet("shades", samples, description={"categories": [{"id": i, "name": NAMES[i][0]} for i in (1, 2, 3)]})


def labelled() -> DataSet[LabeledImage]:
    samples = [LabeledImage(str(n), partial(picture, np.full((4, 6), n % 4)), n % 4) for n in range(40)]
    return DataSet("shades", samples, NAMES)


def captioned() -> DataSet[CaptionedImage]:
    samples = [CaptionedImage(str(n), partial(picture, np.full((4, 6), n)), (f"a {NAMES[n][0]}",)) for n in range(4)]
    return DataSet("shades", samples)


PLAIN = {"templates": ["a {}", "one {}"]}


@pytest.mark.parametrize("shift, score", [(0, 1.0), (1, 0.0)])
@pytest.mark.parametrize(
    "build",
    [
        lambda: ZeroShotClassification(labelled(), **PLAIN),
        lambda: Retrieval(captioned()),
        lambda: ZeroShotInstanceSegmentation(with_objects()),
        lambda: PromptedSegmentation(with_objects()),
        lambda: PromptedSegmentation(with_objects(), point="random", seed=3),
        lambda: SemanticSegmentation(segmented(), **PLAIN),
        lambda: SemanticSegmentation(segmented(ignored=True), **PLAIN),
        lambda: SemanticSegmentation(segmented(), size=12, window=8, stride=3, **PLAIN),
    ],
    ids=["classification", "retrieval", "instances", "prompts", "random-point", "semantic", "ignored", "windows"],
)
def test_right_answers_score_one_and_wrong_ones_nothing(build, shift, score):
    protocol, model = build(), Oracle(shift)
    assert protocol.applies_to(model)
    outcome = protocol.run(model)
    assert next(iter(outcome.metrics.values())) == pytest.approx(score, abs=1e-6)
    assert outcome.num_samples == len(protocol.data.samples)
    sample = protocol.data.samples[outcome.extremes["worst"]]
    for _, pixels in protocol.visualize(model, sample):
        assert pixels.dtype == np.uint8 and pixels.ndim == 3
    json.dumps(protocol.describe())


def test_the_oracle_of_three_masks_is_the_best_one_and_not_the_likeliest():
    figures = PromptedSegmentation(with_objects()).run(Oracle(shift=1)).metrics
    assert figures["point_miou"] == 0 and figures["point_oracle_miou"] == 1


def test_the_cascade_names_every_mask():
    for shift, score in ((0, 1.0), (1, 0.0)):
        protocol = CascadeSegmentation(segmented(), **PLAIN)
        cascade = CascadeAdapter(Oracle(), Oracle(shift))
        assert protocol.applies_to(cascade) and not protocol.applies_to(Oracle())
        assert protocol.run(cascade).metrics["mean_iou"] == score


def test_background_is_a_matter_of_texts_or_of_a_threshold():
    model = Oracle()
    by_threshold = SemanticSegmentation(segmented(), background_threshold=0.4, **PLAIN)
    by_threshold.prepare(model)
    # Equal probabilities of all three classes, a third each, are background; twice e over e + 2 is 0.58.
    assert by_threshold.predict(model, picture(scenes()[0])).tolist() == scenes()[0].tolist()
    without = DataSet("shades", [], NAMES[1:])
    with pytest.raises(ValueError, match="has no background"):
        SemanticSegmentation(without, background_threshold=0.4)
    assert SemanticSegmentation(without).describe()["background"].startswith("none")


@pytest.mark.parametrize("length, window, stride", [(10, 4, 2), (10, 4, 3), (4, 4, 4), (3, 4, 2), (11, 5, 5)])
def test_windows_cover_everything(length, window, stride):
    seen = {
        place for start in window_starts(length, window, stride) for place in range(start, min(start + window, length))
    }
    assert seen == set(range(length))
    assert all(start + window <= length for start in window_starts(length, window, stride)) or window > length


def test_windows_that_would_leave_gaps_are_refused():
    with pytest.raises(ValueError, match="leave gaps"):
        SemanticSegmentation(segmented(), window=8, stride=9)


def test_the_centre_is_farthest_from_the_border():
    mask = np.zeros((9, 20), dtype=bool)
    mask[1:8, 3:10] = mask[4, 10:] = True
    x, y = center_pixel(mask)
    assert (x, y) == (6, 4)


def test_without_samples_or_names_nothing_is_judged():
    with pytest.raises(ValueError, match="no samples"):
        Retrieval(DataSet("empty", [])).run(Oracle())
    with pytest.raises(ValueError, match="no class names"):
        ZeroShotClassification(DataSet("nameless", []))


def test_linear_probes_are_logistic_regression():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(60, 5)).astype(np.float32), rng.integers(0, 3, 60)
    ours = fit_logistic_regression(torch.from_numpy(features), torch.from_numpy(labels), 3, 0.1, "cpu")
    theirs = LogisticRegression(C=1 / (0.1 * 60), tol=1e-8, max_iter=5000).fit(features, labels)  # sums, not means
    with torch.no_grad():
        np.testing.assert_allclose(
            ours(torch.from_numpy(features)).softmax(dim=1).numpy(), theirs.predict_proba(features), atol=1e-3
        )


def test_probes_read_what_features_hold_and_no_more():
    class Blind(Oracle):
        def patch_features(self, images, size):
            return {"nothing": torch.zeros(len(images), 4, 4, 6)}

    def mixed() -> DataSet[LabeledImage]:  # one class in four
        return labelled()

    assert LinearProbing(mixed(), mixed(), size=4).run(Oracle()).metrics == {"top1 (shades)": 1.0}
    assert LinearProbing(mixed(), mixed(), size=4).run(Blind()).metrics == {
        "top1 (nothing)": 0.0
    }  # ties count against


def test_probes_learn_from_the_same_classes_and_from_other_images_than_they_are_judged_by():
    images = labelled()
    fewer = replace(images, names=NAMES[:2])
    with pytest.raises(ValueError, match="do not have the same classes in the same order"):
        LinearProbing(fewer, images, size=4)
    known = replace(images, description={"path": "photos", "split": "val"})
    with pytest.raises(ValueError, match="shades is used for training and for evaluation"):
        LinearProbing(known, replace(known, description=known.description | {"only": "the first 3 samples"}), size=4)
    LinearProbing(replace(known, description={"path": "photos", "split": "train"}), known, size=4)


def test_heads_are_trained_on_patches():
    figures = HeadProbing(segmented(), segmented(), size=64, steps=30, learning_rate=0.05).run(Oracle()).metrics
    assert set(figures) == {f"mean_iou: {head} (shades)" for head in ("linear", "DeepLabv3", "PSPNet")}
    assert figures["mean_iou: linear (shades)"] > 0.95


class TestOfRealModels:
    @pytest.fixture(scope="class")
    @classmethod
    def samclip(cls) -> ModelAdapter:
        return load_adapter(str(miniature.checkpoint()))

    @pytest.fixture(scope="class")
    @classmethod
    def clip(cls) -> ModelAdapter:
        return load_adapter(str(miniature.clip_teacher()))

    @pytest.fixture(scope="class")
    @classmethod
    def sam(cls) -> ModelAdapter:
        return load_adapter(str(miniature.sam_teacher()))

    def test_kinds_are_told_apart(self, samclip, sam, clip, tmp_path):
        assert [type(model) for model in (samclip, sam, clip)] == [SamClipAdapter, SamAdapter, ClipAdapter]
        assert isinstance(load_adapter(f"{miniature.sam_teacher()}+{miniature.clip_teacher()}"), CascadeAdapter)
        with pytest.raises(ValueError, match=r"A cascade is SAM\+CLIP"):
            load_adapter(f"{miniature.clip_teacher()}+{miniature.sam_teacher()}")
        (tmp_path / "config.json").write_text('{"model_type": "bert"}')
        with pytest.raises(ValueError, match="of type 'bert'"):
            load_adapter(str(tmp_path))
        with pytest.raises(FileNotFoundError, match=r"There is no folder /.*nowhere"):
            load_adapter(str(tmp_path / "nowhere"))

    def test_accuracy_is_that_of_a_direct_computation(self, clip):
        figures = tasks(fraction=0.1)["classification:miniature@64"].run(clip).metrics
        model, processor = (kind.from_pretrained(miniature.clip_teacher()) for kind in (CLIPModel, CLIPProcessor))
        scenes = [evaluation_scene(101, index) for index in range(48)]
        with torch.inference_mode():
            texts = [template.format(name) for name in CLASS_NAMES for template in TEMPLATES]
            embeds = model.get_text_features(**processor(text=texts, padding=True, return_tensors="pt")).pooler_output
            embeds = F.normalize(F.normalize(embeds, dim=-1).unflatten(0, (-1, len(TEMPLATES))).mean(dim=1), dim=-1)
            inputs = processor(images=[scene.image for scene in scenes], return_tensors="pt")
            predicted = (model.get_image_features(**inputs).pooler_output @ embeds.T).argmax(dim=1)
        correct = np.array([scene.class_ids[0] for scene in scenes]) == predicted.numpy()
        held_out = np.isin(np.arange(48), HELD_OUT)
        assert figures["top1, captioned"] == pytest.approx(correct[~held_out].mean(), abs=0.026)  # one image of 40
        assert figures["top1, never captioned"] == pytest.approx(correct[held_out].mean(), abs=0.126)

    def test_both_heads_score_as_a_direct_computation(self, samclip):
        task = tasks(fraction=0.1)["composed:miniature"]
        model = SamClipForImageSegmentation.from_pretrained(miniature.checkpoint()).eval()
        processor = SamClipProcessor.from_pretrained(miniature.checkpoint())
        set_miniature_vocabulary(model, processor)
        truth = np.stack([sample.label_map() for sample in task.data.samples])
        with torch.inference_mode():
            outputs = model(**processor(images=[sample.image() for sample in task.data.samples]))
        maps = processor.post_process_semantic_segmentation(outputs, [(128, 128)] * len(truth))
        predicted = torch.stack(maps).numpy()
        ious = []
        for label in range(49):
            union = ((truth == label) | (predicted == label)).sum()
            if union:
                ious.append(((truth == label) & (predicted == label)).sum() / union)
        assert task.run(samclip).metrics["mean_iou"] == pytest.approx(np.mean(ious), abs=0.01)

    def test_random_weights_are_told(self, samclip, sam, clip, tmp_path):
        assert [model.untrained for model in (samclip, sam, clip)] == [[], [], []]
        new = SamClipModel.from_teachers(sam.model, clip.model)
        new.save_pretrained(tmp_path)
        samclip.processor.save_pretrained(tmp_path)
        candidate = load_adapter(str(tmp_path))
        assert candidate.untrained == ["clip_head.layer_norm", "clip_head.mlp"]
        candidate.name = "new"
        results = Results(tmp_path, "command")
        task = tasks(fraction=0.05)["prompts:miniature"]
        for model in (candidate, samclip):
            results.add("prompts:miniature", task, model, task.run(model))
        assert "| new (random weights) | " in results.markdown()
        assert "Random weights: new has untrained clip_head.layer_norm, clip_head.mlp." in results.markdown()
        assert "random weights" not in results.content["tasks"]["prompts:miniature"]["models"][samclip.name]
        for name, ending in (("new", " (random weights)"), (samclip.name, "")):
            entry = create_model_index(results.content, name)[0]
            assert (entry.metric_type, entry.metric_name) == ("point_miou", f"point_miou{ending}")

    def test_masks_are_those_of_the_processor(self, sam, samclip):
        image = Image.fromarray(evaluation_scene(102, 0).image).resize((90, 60))
        points, boxes = torch.tensor([[40, 30], [10, 50]]), torch.tensor([[20, 10, 70, 50]])
        masks, scores = sam.predict_masks(image, points=points)
        processor = SamProcessor.from_pretrained(miniature.sam_teacher())
        inputs = processor(image, input_points=[[[point] for point in points.tolist()]], return_tensors="pt")
        with torch.inference_mode():
            outputs = sam.model(pixel_values=inputs["pixel_values"], input_points=inputs["input_points"].float())
        expected = processor.post_process_masks(
            outputs.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"]
        )
        assert (masks == expected[0]).float().mean() > 0.999 and masks.shape == (2, 3, 60, 90)
        torch.testing.assert_close(scores, outputs.iou_scores[0], atol=1e-3, rtol=1e-3)
        assert samclip.predict_masks(image, boxes=boxes)[0].shape == (1, 1, 60, 90)

    def test_pictures_that_are_not_square_are_seen_whole(self, samclip, clip):
        image = Image.fromarray(np.zeros((50, 130, 3), dtype=np.uint8))
        for model in (samclip, clip):
            patches = model.embed_patches(image, 64)
            assert patches.shape[1:] == (8, 21)  # 64 x 166 px in patches of 8
            torch.testing.assert_close(patches.norm(dim=0), torch.ones(8, 21))

    def test_costs_are_counted(self, samclip, sam, clip):
        figures = Cost(128, 128, ["red dotted shape", "green zigzag shape"], repeats=1).run(samclip).metrics
        own = sum(parameter.numel() for parameter in samclip.model.parameters())
        assert figures["parameters, M"] == own / 1e6
        assert all(value is not None and value > 0 for value in figures.values())
        small, large = (
            Cost(side, side, ["red"], repeats=1).run(samclip).metrics["by text, patches, MB"] for side in (64, 384)
        )
        assert large > 4 * small  # 36 times as many patches
        encoder = Cost(128, 128, ["red"], repeats=1).run(sam).metrics["masks from a point, GMAC"]
        assert 0.1 < encoder / figures["masks from a point, GMAC"] < 1.1

    def test_operations_of_attention_are_counted_however_it_is_computed(self, clip):
        config = clip.model.config.vision_config
        hidden, tokens = config.hidden_size, (config.image_size // config.patch_size) ** 2 + 1
        of_token = 4 * hidden**2 + 2 * hidden * config.intermediate_size  # projections and MLP
        layer = tokens * of_token + 2 * tokens**2 * hidden  # queries by keys, and weights by values
        patches = (tokens - 1) * 3 * config.patch_size**2 * hidden
        expected = config.num_hidden_layers * layer + patches + hidden * clip.model.config.projection_dim
        try:
            for implementation in ("eager", "sdpa"):
                clip.model.set_attn_implementation(implementation)
                figures = Cost(config.image_size, config.image_size, ["red"], repeats=1).run(clip).metrics
                assert figures["image embedding, GMAC"] == pytest.approx(expected / 1e9, rel=1e-6)
        finally:
            clip.model.set_attn_implementation("sdpa")

    def test_memory_that_the_system_does_not_tell_is_not_0(self, clip, monkeypatch):
        monkeypatch.setattr(cost, "peak_memory", lambda device: None)
        monkeypatch.setattr(cost, "reset_peak_memory", lambda device: None)
        figures = Cost(64, 64, ["red"], repeats=1).run(clip).metrics
        assert figures["image embedding, MB"] is None and figures["image embedding, s"] > 0

    def test_sam_is_probed_at_its_own_size(self, sam):
        assert LinearProbing(labeled_images(1, 48), labeled_images(2, 48), size=64).size_for(sam) == 128
        with pytest.raises(ValueError, match="128 x 128 pixels only"):
            sam.patch_features([Image.new("RGB", (64, 64))], 64)

    def test_results_go_on_where_they_were(self, clip, tmp_path):
        task = SemanticSegmentation(segmented_images(1, 4), 64, templates=["a {}"])
        results = Results(tmp_path, "a command")
        assert not results.holds("semantic:miniature", task, clip)
        outcome = task.run(clip)
        results.add("semantic:miniature", task, clip, outcome)
        save_result_panel(task, clip, outcome, tmp_path / "panel.png")
        assert Image.open(tmp_path / "panel.png").width > 300
        again = Results(tmp_path, "another")
        assert again.holds("semantic:miniature", task, clip)
        of_figure = again.content["tasks"]["semantic:miniature"]["models"][clip.name]
        assert (of_figure["command"], of_figure["dtype"]) == ("a command", "float32")
        assert of_figure["environment"] == results.content["environment"]
        assert not again.holds("semantic:miniature", task, load_adapter(clip.model.name_or_path, dtype=torch.bfloat16))
        other = SemanticSegmentation(segmented_images(1, 4), 96, templates=["a {}"])
        assert not again.holds("semantic:miniature", other, clip)
        assert f"{outcome.metrics['mean_iou']:.3f}" in again.markdown()
        card = ModelCardData(model_name="a model", eval_results=create_model_index(again.content, clip.name)).to_dict()
        assert card["model-index"][0]["results"][0]["metrics"][0]["type"] == "mean_iou"


def test_panels_take_names_as_they_are(tmp_path):
    odd = replace(labelled(), names=[["$5 or $x^{"], ["$"], ["_a^b$$"], ["$\\frac$"]], name="a$b_{c$")
    task = ZeroShotClassification(labelled(), **PLAIN)
    outcome = task.run(Oracle())
    task.data, task.class_names = odd, [synonyms[0] for synonyms in odd.names]
    save_result_panel(task, Oracle(), outcome, tmp_path / "panel.png")
    assert (tmp_path / "panel.png").exists()


def test_figures_stand_beside_the_papers(tmp_path):
    results = Results(tmp_path, "")
    model = {"kind": "SamClipAdapter", "identity": "", "metrics": {"top1": 0.7}, "num_samples": 5, "seconds": 1.0}
    results.content["tasks"]["classification:imagenet@336"] = {"protocol": {}, "models": {"mine": model}}
    assert "| 0.700 | 0.724 (table 1, 6, at 336 px) | -0.024 |" in results.markdown()
    next(iter(results.content["tasks"].values()))["protocol"]["only"] = "the first 3 samples"
    assert "| 0.700 |  |  |" in results.markdown()  # a part says nothing about the whole
