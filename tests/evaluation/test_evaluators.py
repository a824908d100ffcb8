"""A model with perfect predictions scores 1 in every evaluator, a model with wrong ones 0."""

import io
import json
import shutil
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
from transformers import BatchFeature, CLIPModel, CLIPProcessor, SamProcessor, pipeline

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
    CascadeSegmentation,
    ClipAdapter,
    ComposedSegmentation,
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
    SiglipAdapter,
    UnmergedAdapter,
    ZeroShotClassification,
    ZeroShotInstanceSegmentation,
    cost,
    create_model_index,
    load_adapter,
    probing,
    save_result_panel,
)
from samclip_hf.evaluation.linear_probing import fit_logistic_regression
from samclip_hf.evaluation.prompted_segmentation import center_pixel
from samclip_hf.evaluation.semantic_segmentation import window_starts
from samclip_hf.images import encode_mask, open_image
from samclip_hf.miniature.scenes import CLASS_NAMES, HELD_OUT, TEMPLATES, evaluation_scene, render
from samclip_hf.miniature_lab.report import set_miniature_vocabulary
from samclip_hf.miniature_lab.tasks import OBJECT_COUNTS, labeled_images, scene, segmented_images, tasks

NAMES = [["background"], ["red", "scarlet"], ["green"], ["blue"]]
SHADES = (0, 60, 120, 180)  # the gray value of each class, which `Oracle` reads


def gray_image(classes) -> Image.Image:
    return Image.fromarray(np.repeat(np.array(SHADES, dtype=np.uint8)[np.asarray(classes)][..., None], 3, axis=2))


class Oracle(ImageTextAdapter, PromptableAdapter):
    """Reads classes from gray values. With a `shift`, it predicts the next class and the complement of each mask."""

    def __init__(self, shift: int = 0):
        self.name, self.shift = "oracle", shift
        parameter = torch.nn.Parameter(torch.zeros(1))
        self.model = SimpleNamespace(device="cpu", parameters=lambda: [parameter])

    untrained = ()
    logit_scale = 1.0

    def one_hot(self, classes):
        return torch.nn.functional.one_hot(torch.as_tensor(classes), len(NAMES)).float()

    def classes(self, image):
        return np.searchsorted(SHADES, np.asarray(image)[..., 0].astype(int) - 29)

    def embed_texts(self, texts):
        labels = {name: label for label, synonyms in enumerate(NAMES) for name in synonyms} | {"nothing": 0}
        return self.one_hot([(labels[text.split()[-1]] + self.shift) % len(NAMES) for text in texts])

    def embed_images(self, images, size=None):
        return self.one_hot([np.bincount(self.classes(image).ravel()).argmax() for image in images])

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
    """Returns class maps `(12, 16)` in which all classes occur."""
    maps = []
    for number in range(5):
        classes = np.zeros((12, 16), dtype=np.int64)
        classes[1:5, 2:9] = 1 + number % 3
        classes[6:11, 8:15] = 1 + (number + 1) % 3
        maps.append(classes)
    return maps


def segmentation_data(ignored: bool = False) -> DataSet[SegmentedImage]:
    def truth(classes):
        return np.where((classes == 1) & ignored, IGNORE_INDEX, classes)

    samples = [SegmentedImage(str(n), partial(gray_image, m), partial(truth, m)) for n, m in enumerate(scenes())]
    return DataSet("shades", samples, NAMES, ["nothing"])


def object_data() -> DataSet[ImageWithObjects]:
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
            str(n), partial(gray_image, m), partial(objects, n, m), image_info={"id": n, "height": 12, "width": 16}
        )
        for n, m in enumerate(scenes())
    ]
    return DataSet("shades", samples, description={"categories": [{"id": i, "name": NAMES[i][0]} for i in (1, 2, 3)]})


def classification_data() -> DataSet[LabeledImage]:
    samples = [LabeledImage(str(n), partial(gray_image, np.full((4, 6), n % 4)), n % 4) for n in range(40)]
    return DataSet("shades", samples, NAMES)


def caption_data() -> DataSet[CaptionedImage]:
    samples = [
        CaptionedImage(str(n), partial(gray_image, np.full((4, 6), n)), (f"a {NAMES[n][0]}",)) for n in range(4)
    ]
    return DataSet("shades", samples)


TEXT_CONFIG = SimpleNamespace(max_position_embeddings=64)
PLAIN = {"templates": ["a {}", "one {}"]}


@pytest.mark.parametrize("shift, score", [(0, 1.0), (1, 0.0)])
@pytest.mark.parametrize(
    "build",
    [
        lambda: ZeroShotClassification(classification_data(), **PLAIN),
        lambda: Retrieval(caption_data()),
        lambda: ZeroShotInstanceSegmentation(object_data()),
        lambda: PromptedSegmentation(object_data()),
        lambda: PromptedSegmentation(object_data(), point="random", seed=3),
        lambda: SemanticSegmentation(segmentation_data(), **PLAIN),
        lambda: SemanticSegmentation(segmentation_data(ignored=True), **PLAIN),
        lambda: SemanticSegmentation(segmentation_data(), size=12, window=8, stride=3, **PLAIN),
    ],
    ids=["classification", "retrieval", "instances", "prompts", "random-point", "semantic", "ignored", "windows"],
)
def test_perfect_predictions_score_1_and_wrong_ones_0(build, shift, score):
    evaluator, model = build(), Oracle(shift)
    assert evaluator.applies_to(model)
    result = evaluator.run(model)
    assert next(iter(result.metrics.values())) == pytest.approx(score, abs=1e-6)
    assert result.num_samples == len(evaluator.data.samples)
    sample = evaluator.data.samples[result.extremes["worst"]]
    for _, pixels in evaluator.visualize(model, sample):
        assert pixels.dtype == np.uint8 and pixels.ndim == 3
    json.dumps(evaluator.describe())


def test_the_oracle_metric_counts_the_best_of_three_masks():
    metrics = PromptedSegmentation(object_data()).run(Oracle(shift=1)).metrics
    assert metrics["point_miou"] == 0 and metrics["point_oracle_miou"] == 1


class UnmergedOracle(Oracle, UnmergedAdapter):
    """Reads the classes of masks."""

    has_siglip_text = False

    def compare_crops(self, image, masks, text_embeds, masked=True):
        labels = [np.bincount(self.classes(image)[mask]).argmax() for mask in masks]
        return self.one_hot(labels) @ text_embeds.T


def test_the_cascade_classifies_every_mask():
    for shift, score in ((0, 1.0), (1, 0.0)):
        evaluator = CascadeSegmentation(segmentation_data(), **PLAIN)
        model = UnmergedOracle(shift)
        assert evaluator.applies_to(model) and not evaluator.applies_to(Oracle())
        assert evaluator.run(model).metrics["mean_iou"] == score


def test_background_is_decided_by_texts_or_by_a_threshold():
    model = Oracle()
    for windows in ({}, {"size": 12, "window": 8, "stride": 2}):  # up to four windows overlap
        evaluator = SemanticSegmentation(segmentation_data(), background_threshold=0.4, **windows, **PLAIN)
        evaluator.prepare(model)
        # In the background, each class has a probability of 1/3. Elsewhere, the right class has e / (e + 2) = 0.58.
        assert evaluator.predict(model, gray_image(scenes()[0])).tolist() == scenes()[0].tolist()
    without = DataSet("shades", [], NAMES[1:])
    with pytest.raises(ValueError, match="has no background"):
        SemanticSegmentation(without, background_threshold=0.4)
    assert SemanticSegmentation(without).describe()["background"].startswith("none")


def test_all_texts_of_the_background_go_through_the_templates_or_none():
    seen = []

    class Listener(Oracle):
        def embed_texts(self, texts):
            seen.extend(texts)
            return super().embed_texts(texts)

    data = replace(segmentation_data(), background=["nothing", "pure nothing"])
    for through_templates, expected in (
        (False, {"nothing", "pure nothing"}),
        (True, {"a nothing", "one nothing", "a pure nothing", "one pure nothing"}),
    ):
        evaluator = SemanticSegmentation(data, background_templates=through_templates, **PLAIN)
        seen.clear()
        evaluator.prepare(Listener())
        assert {text for text in seen if "nothing" in text} == expected
        how = "through the templates" if through_templates else "without templates"
        assert evaluator.describe()["background"] == f"2 texts, {how}: nothing, pure nothing"
    for unused in (replace(data, background=[]), replace(data, background=None, names=NAMES[1:])):
        with pytest.raises(ValueError, match="shades has no texts for background"):
            SemanticSegmentation(unused, background_templates=True, **PLAIN)
    with pytest.raises(ValueError, match="shades has a background without texts: pass background_threshold"):
        SemanticSegmentation(replace(data, background=[]), **PLAIN)
    SemanticSegmentation(replace(data, background=[]), background_threshold=0.4, **PLAIN)


def test_siglip_gets_names_and_templates_in_canonical_form():
    class Listener(SiglipAdapter):
        def __init__(self):
            self.model = SimpleNamespace(device="cpu", config=SimpleNamespace(text_config=TEXT_CONFIG))
            self.processor, self.texts = SimpleNamespace(tokenizer=self.tokenize), []

        def tokenize(self, texts, **options):
            self.texts += texts
            return BatchFeature({"input_ids": torch.zeros(len(texts), 1, dtype=torch.int64)})

        def _text_features(self, input_ids):
            return torch.ones(len(input_ids), 2)

    model = Listener()
    model.embed_names(["Jack-o'-lantern", "St. Bernard"], ["A photo of {}.", "itap of the {}"])
    model.embed_texts(["Two dogs, in Rome."])
    assert model.texts == [
        *("a photo of jackolantern", "itap of the jackolantern", "a photo of st bernard", "itap of the st bernard"),
        "two dogs, in rome.",
    ]


@pytest.mark.parametrize("length, window, stride", [(10, 4, 2), (10, 4, 3), (4, 4, 4), (3, 4, 2), (11, 5, 5)])
def test_windows_cover_the_image(length, window, stride):
    starts = window_starts(length, window, stride)
    assert {x for start in starts for x in range(start, min(start + window, length))} == set(range(length))
    assert all(start + window <= length for start in starts) or window > length


def test_windows_with_gaps_raise():
    with pytest.raises(ValueError, match="leave gaps"):
        SemanticSegmentation(segmentation_data(), window=8, stride=9)


def test_the_center_is_farthest_from_the_border():
    mask = np.zeros((9, 20), dtype=bool)
    mask[1:8, 3:10] = mask[4, 10:] = True
    x, y = center_pixel(mask)
    assert (x, y) == (6, 4)


def test_data_without_samples_or_names_raise():
    with pytest.raises(ValueError, match="no samples"):
        Retrieval(DataSet("empty", [])).run(Oracle())
    with pytest.raises(ValueError, match="no class names"):
        ZeroShotClassification(DataSet("nameless", []))


def test_of_classes_with_one_name_the_first_is_predicted():
    """ImageNet has two classes "missile" and two "sunglasses"."""
    names = [["background"], ["red"], ["red"], ["blue"]]
    samples = [LabeledImage(str(label), partial(gray_image, np.full((4, 6), 1)), label) for label in (1, 2)]
    metrics = ZeroShotClassification(DataSet("shades", samples, names), **PLAIN).run(Oracle()).metrics
    assert metrics["top1"] == 0.5  # the image of the first class, not that of the second


def test_linear_probing_equals_scikit_learns_logistic_regression():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(60, 5)).astype(np.float32), rng.integers(0, 3, 60)
    classifier = fit_logistic_regression(torch.from_numpy(features), torch.from_numpy(labels), 3, 0.1, "cpu")
    expected = LogisticRegression(C=1 / (0.1 * 60), tol=1e-8, max_iter=5000).fit(features, labels)  # sums, not means
    with torch.no_grad():
        np.testing.assert_allclose(
            classifier(torch.from_numpy(features)).softmax(dim=1).numpy(), expected.predict_proba(features), atol=1e-3
        )


def test_linear_probing_depends_on_the_information_in_the_features():
    class Blind(Oracle):
        def patch_features(self, images, size):
            return {"nothing": torch.zeros(len(images), 4, 4, 6)}

    evaluator = LinearProbing(classification_data(), classification_data(), size=4)
    assert evaluator.run(Oracle()).metrics == {"top1 (shades)": 1.0}
    assert evaluator.run(Blind()).metrics == {"top1 (nothing)": 0.25}  # always the first class


def test_the_disk_space_of_probes_is_announced_and_checked_before_the_work(capsys, monkeypatch):
    """80 images with 4 values of 2 bytes, and 10 images with 12 x 16 x 4 values."""
    small = LinearProbing(classification_data(), classification_data(), size=4)
    small.run(Oracle())
    assert "linear-probe, oracle: the features of 80 images need 6.4e-07 GB in " in capsys.readouterr().out
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=15_359))
    extracted = []
    monkeypatch.setattr(probing, "extract_features", lambda *_: extracted.append(1))
    large = HeadProbing(segmentation_data(), segmentation_data(), size=64)
    message = r"features of 10 images need 1\.54e-05 GB in .*, of which 1\.54e-05 GB are free\. Set .* TMPDIR"
    with pytest.raises(ValueError, match=message):
        large.run(Oracle())
    assert not extracted


def truncated() -> Image.Image:
    file = io.BytesIO()
    gray_image(scenes()[0]).save(file, "JPEG")
    return open_image(file.getvalue()[:-100])


def unreadable() -> np.ndarray:
    raise SyntaxError("broken PNG file")  # as Pillow raises it


@pytest.mark.parametrize(
    "make, build, field, read",
    [
        (classification_data, lambda data: ZeroShotClassification(data, **PLAIN), "image", truncated),
        (caption_data, Retrieval, "image", truncated),
        (object_data, ZeroShotInstanceSegmentation, "image", truncated),
        (object_data, PromptedSegmentation, "objects", unreadable),
        (segmentation_data, lambda data: SemanticSegmentation(data, **PLAIN), "image", truncated),
        (segmentation_data, lambda data: SemanticSegmentation(data, **PLAIN), "label_map", unreadable),
        (classification_data, lambda data: LinearProbing(data, classification_data(), size=4), "image", truncated),
        (classification_data, lambda data: LinearProbing(classification_data(), data, size=4), "image", truncated),
        (segmentation_data, lambda data: HeadProbing(data, segmentation_data(), size=64), "label_map", unreadable),
    ],
)
@pytest.mark.parametrize("position", [0, 3])
def test_files_that_cannot_be_read_are_named(make, build, field, read, position):
    data = make()
    samples = list(data.samples)
    samples[position] = replace(samples[position], key="n01/dog.jpg", **{field: read})
    with pytest.raises(ValueError, match=rf"^n01/dog\.jpg: the {field.replace('_', ' ')} cannot be read: "):
        build(replace(data, samples=samples)).run(Oracle())


def test_probing_needs_the_same_classes_and_other_images_for_training():
    images = classification_data()
    fewer = replace(images, names=NAMES[:2])
    with pytest.raises(ValueError, match="do not have the same classes in the same order"):
        LinearProbing(fewer, images, size=4)
    known = replace(images, description={"path": "photos", "split": "val"})
    with pytest.raises(ValueError, match="shades is used for training and for evaluation"):
        LinearProbing(known, replace(known, description=known.description | {"only": "the first 3 samples"}), size=4)
    LinearProbing(replace(known, description={"path": "photos", "split": "train"}), known, size=4)


def test_heads_learn_from_patch_features():
    metrics = (
        HeadProbing(segmentation_data(), segmentation_data(), size=64, steps=30, learning_rate=0.05)
        .run(Oracle())
        .metrics
    )
    assert set(metrics) == {f"mean_iou: {head} (shades)" for head in ("linear", "DeepLabv3", "PSPNet")}
    assert metrics["mean_iou: linear (shades)"] > 0.95


class TestMiniature:
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

    def test_the_adapter_depends_on_the_type_of_the_model(self, samclip, sam, clip, tmp_path):
        assert [type(model) for model in (samclip, sam, clip)] == [SamClipAdapter, SamAdapter, ClipAdapter]
        assert type(load_adapter(miniature.sam_teacher(), clip=miniature.clip_teacher())) is UnmergedAdapter
        for pair in ((miniature.clip_teacher(), miniature.sam_teacher()), (miniature.sam_teacher(),) * 2):
            with pytest.raises(ValueError, match="a pair must be a SAM and a CLIP or SigLIP, in this order; got "):
                load_adapter(pair[0], clip=pair[1])
        (tmp_path / "config.json").write_text('{"model_type": "bert"}')
        with pytest.raises(ValueError, match="of type 'bert'"):
            load_adapter(str(tmp_path))
        with pytest.raises(FileNotFoundError, match=r"There is no folder /.*nowhere"):
            load_adapter(str(tmp_path / "nowhere"))

    @pytest.mark.parametrize("name", ["checkpoint", "clip_teacher"])
    def test_a_model_without_its_tokenizers_vocabulary_is_refused(self, name, tmp_path):
        """transformers makes a tokenizer of special tokens alone, with which all texts are equal."""
        folder = shutil.copytree(getattr(miniature, name)(), tmp_path / "model")
        for file in ("tokenizer.json", "vocab.json", "merges.txt"):
            (folder / file).unlink(missing_ok=True)
        with pytest.raises(ValueError, match="its vocabulary is empty"):
            load_adapter(str(folder))

    def test_accuracy_equals_a_direct_computation(self, clip):
        metrics = tasks(fraction=0.1)["classification:miniature@64"].run(clip).metrics
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
        assert metrics["top1, captioned"] == pytest.approx(correct[~held_out].mean(), abs=0.026)  # one image of 40
        assert metrics["top1, never captioned"] == pytest.approx(correct[held_out].mean(), abs=0.126)

    def test_the_score_of_both_heads_equals_a_direct_computation(self, samclip):
        evaluator = tasks(fraction=0.1)["composed:miniature"]
        model = SamClipForImageSegmentation.from_pretrained(miniature.checkpoint()).eval()
        processor = SamClipProcessor.from_pretrained(miniature.checkpoint())
        set_miniature_vocabulary(model, processor)
        truth = np.stack([sample.label_map() for sample in evaluator.data.samples])
        with torch.inference_mode():
            outputs = model(**processor(images=[sample.image() for sample in evaluator.data.samples]))
        maps = processor.post_process_semantic_segmentation(outputs, [(128, 128)] * len(truth))
        predicted = torch.stack(maps).numpy()
        ious = []
        for label in range(49):
            union = ((truth == label) | (predicted == label)).sum()
            if union:
                ious.append(((truth == label) & (predicted == label)).sum() / union)
        assert evaluator.run(samclip).metrics["mean_iou"] == pytest.approx(np.mean(ious), abs=0.01)

    def test_random_weights_are_reported(self, samclip, sam, clip, tmp_path):
        assert [model.untrained for model in (samclip, sam, clip)] == [[], [], []]
        new = SamClipModel.from_teachers(sam.model, clip.model)
        new.save_pretrained(tmp_path)
        samclip.processor.save_pretrained(tmp_path)
        adapter = load_adapter(str(tmp_path))
        assert adapter.untrained == ["clip_head.layer_norm", "clip_head.mlp"]
        adapter.name = "new"
        results = Results(tmp_path, "command")
        evaluator = tasks(fraction=0.05)["prompts:miniature"]
        for model in (adapter, samclip):
            results.add("prompts:miniature", evaluator, model, evaluator.run(model))
        assert "| new (random weights) | " in results.markdown()
        assert "Random weights: new has untrained clip_head.layer_norm, clip_head.mlp." in results.markdown()
        assert "random weights" not in results.content["tasks"]["prompts:miniature"]["models"][samclip.name]
        for name, ending in (("new", " (random weights)"), (samclip.name, "")):
            entry = create_model_index(results.content, name)[0]
            assert (entry.metric_type, entry.metric_name) == ("point_miou", f"point_miou{ending}")

    def test_masks_equal_those_of_the_processor(self, sam, samclip):
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

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_prompts_are_not_rounded_in_half_precision(self, sam, dtype):
        """bfloat16 has 8 significant bits: 100.3 is 100.5 there, and of 1000 to 1024 px, only multiples of 4 exist."""
        embeds = []
        for model in (sam, load_adapter(miniature.sam_teacher(), dtype=dtype)):
            embedding = model.model.prompt_encoder.shared_embedding
            hook = embedding.register_forward_hook(
                lambda module, inputs, output: embeds.append((inputs[0], output.clone()))  # boxes are changed in place
            )
            image = Image.fromarray(evaluation_scene(102, 0).image)
            masks, _ = model.predict_masks(image, points=torch.tensor([[100.3, 77.7]]))
            model.predict_masks(image, boxes=torch.tensor([[20.3, 10.7, 100.9, 50.1]]))
            hook.remove()
            assert model.model.dtype == (torch.float32 if model is sam else dtype) and masks.dtype == torch.bool
        half = len(embeds) // 2
        for (coordinates, expected), (in_half, output) in zip(embeds[:half], embeds[half:], strict=True):
            assert torch.equal(coordinates, in_half) and output.dtype == dtype
            assert torch.equal(expected.to(dtype), output)

    @pytest.fixture(scope="class")
    @classmethod
    def unmerged(cls) -> ModelAdapter:
        return load_adapter(miniature.sam_teacher(), clip=miniature.clip_teacher())

    def test_an_unmerged_model_runs_in_half_precision(self, unmerged):
        half = load_adapter(miniature.sam_teacher(), dtype=torch.bfloat16, clip=miniature.clip_teacher())
        data = segmented_images(1, 2)
        for evaluator in (
            CascadeSegmentation(data, {"points_per_crop": 4}, templates=["a {}"]),
            ComposedSegmentation(data, templates=["a {}"]),
            SemanticSegmentation(data, 96, templates=["a {}"]),
        ):
            metrics = [evaluator.run(model).metrics["overall_accuracy"] for model in (unmerged, half)]
            assert metrics[1] == pytest.approx(metrics[0], abs=0.1)

    def test_parts_of_an_unmerged_model_equal_its_parents(self, unmerged, sam, clip):
        image = Image.fromarray(render(102, 3, num_objects=4).image)
        masks, scores = unmerged.predict_masks(image, boxes=torch.tensor([[20, 10, 70, 50]]))
        expected_masks, expected_scores = sam.predict_masks(image, boxes=torch.tensor([[20, 10, 70, 50]]))
        assert torch.equal(masks, expected_masks) and torch.allclose(scores, expected_scores, atol=1e-5)
        assert torch.allclose(unmerged.embed_texts(CLASS_NAMES), clip.embed_texts(CLASS_NAMES), atol=1e-6)
        assert unmerged.logit_scale == pytest.approx(clip.logit_scale)
        # The tower gets the pixels that CLIP gets from an image processor that resizes to the tower's size.
        embeds, expected = unmerged.embed_images([image]), clip.embed_images([image], size=128)
        assert torch.allclose(embeds, expected, atol=1e-4)

    @pytest.mark.parametrize("masked", [True, False])
    def test_crops_are_embedded_as_by_the_clip_itself(self, unmerged, clip, masked):
        """The crops are images for CLIP's own processor."""
        scene = render(102, 3, num_objects=4)
        texts = clip.embed_names(CLASS_NAMES, ["a {}"])
        color, crops = 128, []  # the mean color of the miniature's CLIP is 0.5
        for mask in scene.masks:
            rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
            window = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            crop = np.where(mask[window][..., None], scene.image[window], color) if masked else scene.image[window]
            side = max(crop.shape[:2])
            padding = [((side - length) // 2, side - length - (side - length) // 2) for length in crop.shape[:2]]
            square = np.pad(crop, [*padding, (0, 0)], constant_values=color)
            crops.append(Image.fromarray(square.astype(np.uint8)))
        similarities = unmerged.compare_crops(Image.fromarray(scene.image), scene.masks, texts, masked)
        torch.testing.assert_close(similarities, clip.embed_images(crops) @ texts.T, atol=5e-4, rtol=0)

    def test_everything_mode_equals_the_pipelines(self, samclip, transformers_log):
        image = Image.fromarray(evaluation_scene(102, 0).image)
        thresholds = {"points_per_crop": 4, "pred_iou_thresh": 0.3, "stability_score_thresh": 0.3}
        masks = samclip.generate_masks(image, **thresholds)
        generator = pipeline("mask-generation", model=miniature.checkpoint())
        assert np.array_equal(masks, np.stack([np.asarray(mask) for mask in generator(image, **thresholds)["masks"]]))
        assert isinstance(samclip.model, SamClipForImageSegmentation) and not transformers_log.records

    def test_metrics_by_number_of_objects_are_those_of_the_scenes(self, unmerged):
        evaluator = tasks(fraction=0.05)["composed:miniature"]  # 16 scenes
        metrics = evaluator.run(unmerged).metrics
        assert [name for name in metrics if "object" in name] == list(OBJECT_COUNTS)
        for number, name in enumerate(OBJECT_COUNTS, start=1):
            samples = [s for s in evaluator.data.samples if len(scene(102, int(s.key.split("/")[1])).masks) == number]
            part = ComposedSegmentation(replace(evaluator.data, samples=samples), templates=TEMPLATES)
            assert metrics[name] == pytest.approx(part.run(unmerged).metrics["mean_iou"], abs=1e-9)

    @pytest.mark.slow
    def test_an_unmerged_model_segments_better_than_the_cascade_with_fewer_operations(self, unmerged):
        scenes = segmented_images(102, 24)
        composed = ComposedSegmentation(scenes, templates=TEMPLATES).run(unmerged).metrics["mean_iou"]
        cascade = CascadeSegmentation(scenes, miniature.MASK_GENERATION, templates=TEMPLATES).run(unmerged).metrics
        assert composed >= cascade["mean_iou"]
        costs = (
            Cost(128, 128, list(CLASS_NAMES), repeats=1, generation=miniature.MASK_GENERATION).run(unmerged).metrics
        )
        assert costs["by text, both heads, GMAC"] < 0.5 * costs["by text, cascade, GMAC"]

    def test_images_that_are_not_square_are_not_cropped(self, samclip, clip):
        image = Image.fromarray(np.zeros((50, 130, 3), dtype=np.uint8))
        for model in (samclip, clip):
            patches = model.embed_patches(image, 64)
            assert patches.shape[1:] == (8, 21)  # 64 x 166 px in patches of 8
            torch.testing.assert_close(patches.norm(dim=0), torch.ones(8, 21))

    def test_costs_are_measured(self, samclip, sam, clip):
        metrics = Cost(128, 128, ["red dotted shape", "green zigzag shape"], repeats=1).run(samclip).metrics
        own = sum(parameter.numel() for parameter in samclip.model.parameters())
        assert metrics["parameters, M"] == own / 1e6
        assert all(value is not None and value > 0 for value in metrics.values())
        small, large = (
            Cost(side, side, ["red"], repeats=1).run(samclip).metrics["by text, patches, MB"] for side in (64, 384)
        )
        assert large > 4 * small  # 36 times as many patches
        encoder = Cost(128, 128, ["red"], repeats=1).run(sam).metrics["masks from a point, GMAC"]
        assert 0.1 < encoder / metrics["masks from a point, GMAC"] < 1.1

    def test_operations_of_every_attention_implementation_are_counted(self, clip):
        config = clip.model.config.vision_config
        hidden, tokens = config.hidden_size, (config.image_size // config.patch_size) ** 2 + 1
        per_token = 4 * hidden**2 + 2 * hidden * config.intermediate_size  # projections and MLP
        layer = tokens * per_token + 2 * tokens**2 * hidden  # queries by keys, and weights by values
        patches = (tokens - 1) * 3 * config.patch_size**2 * hidden
        expected = config.num_hidden_layers * layer + patches + hidden * clip.model.config.projection_dim
        try:
            for implementation in ("eager", "sdpa"):
                clip.model.set_attn_implementation(implementation)
                metrics = Cost(config.image_size, config.image_size, ["red"], repeats=1).run(clip).metrics
                assert metrics["image embedding, GMAC"] == pytest.approx(expected / 1e9, rel=1e-6)
        finally:
            clip.model.set_attn_implementation("sdpa")

    @pytest.mark.parametrize("pooling", ["max", "mean"])
    def test_linear_probes_of_samclip_read_the_inputs_of_the_mlp(self, samclip, monkeypatch, pooling):
        monkeypatch.setattr(samclip.model.clip_head, "pooling", pooling)
        images = [Image.fromarray(render(0, index).image) for index in range(2)]
        patches, pooled = samclip.patch_features(images, 64), samclip.pooled_features(images, 64)
        torch.testing.assert_close(pooled["image encoder"], patches["image encoder"].mean(dim=(2, 3)))
        tokens = getattr(patches["CLIP head"], "amax" if pooling == "max" else "mean")(dim=(2, 3))
        torch.testing.assert_close(pooled["CLIP head"], samclip.model.clip_head.layer_norm(tokens))

    def test_unknown_memory_is_none(self, clip, monkeypatch):
        monkeypatch.setattr(cost, "peak_memory", lambda device: None)
        monkeypatch.setattr(cost, "reset_peak_memory", lambda device: None)
        metrics = Cost(64, 64, ["red"], repeats=1).run(clip).metrics
        assert metrics["image embedding, MB"] is None and metrics["image embedding, s"] > 0

    def test_sam_is_probed_at_its_own_size(self, sam):
        assert LinearProbing(labeled_images(1, 48), labeled_images(2, 48), size=64).size_for(sam) == 128
        with pytest.raises(ValueError, match="128 x 128 pixels only"):
            sam.patch_features([Image.new("RGB", (64, 64))], 64)

    def test_results_are_resumed(self, clip, tmp_path):
        evaluator = SemanticSegmentation(segmented_images(1, 4), 64, templates=["a {}"])
        results = Results(tmp_path, "a command")
        assert not results.holds("semantic:miniature", evaluator, clip)
        result = evaluator.run(clip)
        results.add("semantic:miniature", evaluator, clip, result)
        save_result_panel(evaluator, clip, result, tmp_path / "panel.png")
        assert Image.open(tmp_path / "panel.png").width > 300
        resumed = Results(tmp_path, "another")
        assert resumed.holds("semantic:miniature", evaluator, clip)
        entry = resumed.content["tasks"]["semantic:miniature"]["models"][clip.name]
        assert (entry["command"], entry["dtype"]) == ("a command", "float32")
        assert entry["environment"] == results.content["environment"]
        assert not resumed.holds(
            "semantic:miniature", evaluator, load_adapter(clip.model.name_or_path, dtype=torch.bfloat16)
        )
        other = SemanticSegmentation(segmented_images(1, 4), 96, templates=["a {}"])
        assert not resumed.holds("semantic:miniature", other, clip)
        assert f"{result.metrics['mean_iou']:.3f}" in resumed.markdown()
        card = ModelCardData(
            model_name="a model", eval_results=create_model_index(resumed.content, clip.name)
        ).to_dict()
        assert card["model-index"][0]["results"][0]["metrics"][0]["type"] == "mean_iou"


def test_panels_accept_names_with_dollar_signs(tmp_path):
    odd = replace(classification_data(), names=[["$5 or $x^{"], ["$"], ["_a^b$$"], ["$\\frac$"]], name="a$b_{c$")
    evaluator = ZeroShotClassification(classification_data(), **PLAIN)
    result = evaluator.run(Oracle())
    evaluator.data, evaluator.class_names = odd, [synonyms[0] for synonyms in odd.names]
    save_result_panel(evaluator, Oracle(), result, tmp_path / "panel.png")
    assert (tmp_path / "panel.png").exists()
