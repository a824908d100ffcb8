"""The losses of `SamClipForImageSegmentation` for label maps and labeled masks, and the stock `Trainer`."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import EvalPrediction

from samclip_hf import (
    SamClipForImageSegmentation,
    SamClipForObjectDetection,
    SamClipModel,
    SamClipProcessor,
    miniature,
)
from samclip_hf.miniature.scenes import BACKGROUND_PROMPTS, CLASS_NAMES, HELD_OUT, render
from samclip_hf.segmentation_samclip import add_box_noise, semantic_loss

from .conftest import assert_same

NAMES = [CLASS_NAMES[class_id] for class_id in HELD_OUT]
SIZES = torch.tensor([[128, 128], [128, 96]])


@pytest.fixture(scope="module")
def shared() -> SamClipForImageSegmentation:
    model = SamClipForImageSegmentation.from_pretrained(miniature.checkpoint())
    return model.set_vocabulary(NAMES, BACKGROUND_PROMPTS, "a {}").eval()


@pytest.fixture
def segmenter() -> SamClipForImageSegmentation:
    model = SamClipForImageSegmentation.from_pretrained(miniature.checkpoint())
    return model.set_vocabulary(NAMES, BACKGROUND_PROMPTS, "a {}")


@pytest.fixture(scope="module")
def processor() -> SamClipProcessor:
    return SamClipProcessor.from_pretrained(miniature.checkpoint())


def label_map(scene) -> np.ndarray:
    """0 for background, then the held-out classes; 255 for all others."""
    labels = np.full(len(CLASS_NAMES) + 1, 255, dtype=np.uint8)
    labels[0] = 0
    labels[np.array(HELD_OUT) + 1] = np.arange(1, len(HELD_OUT) + 1)
    return labels[scene.label_map]


def scenes(count: int, first: int = 0) -> list:
    return [render(5, index, class_id=HELD_OUT[index % len(HELD_OUT)]) for index in range(first, first + count)]


def batch(processor: SamClipProcessor, count: int, first: int = 0) -> dict[str, torch.Tensor]:
    drawn = scenes(count, first)
    images = [Image.fromarray(scene.image) for scene in drawn]
    return processor(images, segmentation_maps=[label_map(scene) for scene in drawn], return_tensors="pt")


class TestSemanticLoss:
    def test_loss_and_gradient_at_patch_resolution_are_the_closed_form(self):
        logits = torch.randn(2, 3, 4, 5, dtype=torch.float32, requires_grad=True)
        labels = torch.randint(0, 3, (2, 4, 5))
        labels[0, 1:3] = 255
        loss = semantic_loss(logits, labels, 255)
        (gradient,) = torch.autograd.grad(loss, logits)
        values, targets = logits.detach().double().numpy(), labels.numpy()
        probabilities = np.exp(values) / np.exp(values).sum(axis=1, keepdims=True)
        expected, terms = np.zeros_like(values), []
        for image, row, column in np.argwhere(targets != 255):
            target = targets[image, row, column]
            terms.append(-np.log(probabilities[image, target, row, column]))
            expected[image, :, row, column] = probabilities[image, :, row, column] - np.eye(3)[target]
        assert loss.item() == pytest.approx(np.mean(terms), rel=1e-5)
        assert_same(gradient, torch.from_numpy(expected / len(terms)).float())

    def test_logits_are_resized_bilinearly(self):
        logits, labels = torch.randn(1, 3, 4, 2), torch.randint(0, 3, (1, 16, 8))

        def weights(side: int, target: int) -> np.ndarray:  # triangles around the centers of the patches
            centers = np.clip((np.arange(target) + 0.5) * side / target - 0.5, 0, side - 1)
            return np.clip(1 - np.abs(centers[:, None] - np.arange(side)), 0, None)

        resized = np.einsum("yh,nhw,xw->nyx", weights(4, 16), logits[0].double().numpy(), weights(2, 8))
        log_probabilities = resized - np.log(np.exp(resized).sum(axis=0))
        expected = -np.take_along_axis(log_probabilities, labels.numpy(), axis=0).mean()
        assert semantic_loss(logits, labels, 255).item() == pytest.approx(expected, rel=1e-5)

    def test_background_is_not_compared_with_negative_texts(self):
        logits, negative = torch.randn(1, 3, 2, 2), torch.randn(1, 2, 2, requires_grad=True)
        labels = torch.tensor([[[0, 1], [2, 255]]])
        loss = semantic_loss(logits, labels, 255, negative, background_label_id=0)
        loss.backward()
        own = logits[0].double().numpy().transpose(1, 2, 0)
        more = negative.detach()[0].double().numpy()
        terms = [
            np.log(np.exp(own[row, column]).sum() + (label > 0) * np.exp(more[row, column])) - own[row, column, label]
            for row, column, label in ((0, 0, 0), (0, 1, 1), (1, 0, 2))
        ]
        assert loss.item() == pytest.approx(np.mean(terms), rel=1e-5)
        assert ((negative.grad[0] > 0) == torch.tensor([[False, True], [True, False]])).all()
        assert semantic_loss(logits, labels, 255, negative).item() > loss.item()  # without a background

    def test_without_labels_the_loss_is_zero(self):
        logits = torch.randn(1, 3, 2, 2, requires_grad=True)
        loss = semantic_loss(logits, torch.full((1, 4, 4), 255), 255)
        loss.backward()
        assert loss.item() == 0 and not logits.grad.any()


class TestModel:
    def test_loss_of_label_maps(self, shared, processor):
        inputs = batch(processor, 2)
        with torch.no_grad():
            outputs = shared(**inputs)
            without = shared(inputs["pixel_values"], inputs["reshaped_input_sizes"])
        assert outputs.segment_masks is None and without.segment_masks is not None and without.loss is None
        assert outputs.logits.equal(without.logits)
        resized = F.interpolate(outputs.logits, inputs["labels"].shape[1:], mode="bilinear")
        torch.testing.assert_close(outputs.loss, F.cross_entropy(resized, inputs["labels"], ignore_index=255))
        assert outputs.to_tuple()[0].equal(outputs.loss) and without.to_tuple()[0].equal(without.logits)

    def test_padding_does_not_count(self, shared, processor):
        scene = scenes(1)[0]
        wide = Image.fromarray(scene.image[:64])
        inputs = processor(wide, segmentation_maps=label_map(scene)[:64], return_tensors="pt")
        half = inputs["labels"].shape[1] // 2
        assert (inputs["labels"][:, half:] == 255).all() and (inputs["labels"][:, :half] == 0).any()
        with torch.no_grad():
            outputs = shared(**inputs)
        resized = F.interpolate(outputs.logits, inputs["labels"].shape[1:], mode="bilinear")[:, :, :half]
        expected = F.cross_entropy(resized, inputs["labels"][:, :half], ignore_index=255)
        torch.testing.assert_close(outputs.loss, expected)

    def test_negative_texts_are_labels_that_only_classes_are_compared_with(self, shared, processor):
        """At the resolution of the patches, the loss is that of a vocabulary with more labels. For background, it is
        that of the own vocabulary."""
        others = ["red solid shape", "cyan lined shape", "green zigzag shape"]
        negative_embeds = shared.embed_vocabulary(others, (), "a {}").class_embeds
        longer = shared.embed_vocabulary([*NAMES, *others], BACKGROUND_PROMPTS, "a {}")
        inputs = batch(processor, 2)
        masks = [torch.from_numpy(scene.masks[:1]) for scene in scenes(2)]
        for is_background in (False, True):
            labels = inputs["labels"][:, ::4, ::4]
            labels = labels.where((labels == 0) == is_background, 255)
            more = {"mask_labels": masks, "class_labels": [torch.tensor([0 if is_background else n]) for n in (1, 2)]}
            vocabulary = None if is_background else longer
            for targets in ({"labels": labels}, more):
                rest = {name: value for name, value in inputs.items() if name != "labels"} | targets
                with torch.no_grad():
                    loss = shared(**rest, negative_embeds=negative_embeds).loss
                    expected, plain = (shared(**rest, vocabulary=given).loss for given in (vocabulary, None))
                torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
                assert is_background or loss > plain + 1e-4

    def test_negative_texts_without_labels_are_an_error(self, shared, processor):
        inputs = batch(processor, 1)
        del inputs["labels"]
        with pytest.raises(ValueError, match="negative_embeds are for the loss"):
            shared(**inputs, negative_embeds=shared.class_embeds)

    def test_loss_of_masks_is_the_cross_entropy_of_classify_masks(self, shared, processor):
        drawn = scenes(3)
        images = [Image.fromarray(scene.image) for scene in drawn]
        masks = [torch.from_numpy(scene.masks) for scene in drawn]
        masks[0] = torch.cat([masks[0], torch.zeros(1, 128, 128, dtype=torch.bool)])  # a mask without pixels
        labels = [torch.randint(1, 9, (len(own),)) for own in masks]
        labels[1][0] = 255
        inputs = processor(images, return_tensors="pt")
        with torch.no_grad():
            loss = shared(**inputs, mask_labels=masks, class_labels=labels, mask_loss_weight=0).loss
            logits = shared.classify_masks(masks, **inputs).logits
        terms = [
            -logits[image, number].log_softmax(dim=0)[label].item()
            for image, own in enumerate(labels)
            for number, label in enumerate(own.tolist())
            if label != 255 and masks[image][number].any()
        ]
        assert loss.item() == pytest.approx(np.mean(terms), rel=1e-4)
        both = batch(processor, 3)
        with torch.no_grad():
            total = shared(**both, mask_labels=masks, class_labels=labels, mask_loss_weight=0).loss
            torch.testing.assert_close(total, loss + shared(**both).loss)

    def test_loss_of_the_sam_head(self, shared, processor):
        """An object that covers one cell of the mask logits has one possible point, the center of the cell."""
        masks = torch.zeros(4, 128, 128, dtype=torch.bool)
        masks[0, 60:62, 70:72] = masks[1, 2:4, 100:102] = True
        masks[2], masks[3, 40:90, 40:90] = ~masks[0], True  # background and a mask whose label is ignored
        labels = [torch.tensor([3, 5, 0, 255])]
        inputs = processor(Image.fromarray(scenes(1)[0].image), return_tensors="pt")
        points = torch.tensor([[[[70.5, 60.5]], [[100.5, 2.5]]]])
        with torch.no_grad():
            losses = [
                shared(**inputs, mask_labels=[masks], class_labels=labels, mask_loss_weight=weight).loss
                for weight in (0, 1, 3)
            ]
            default = shared(**inputs, mask_labels=[masks], class_labels=labels).loss
            predicted = shared(**inputs, input_points=points)
        expected = []
        for own, mask_logits, scores in zip(masks, predicted.pred_masks[0], predicted.iou_scores[0], strict=False):
            target = own[::2, ::2].double()
            probability = mask_logits.double().sigmoid()
            focal = torchvision.ops.sigmoid_focal_loss(mask_logits.double(), target.expand_as(mask_logits))
            dice = 1 - (2 * (probability * target).sum((1, 2)) + 1) / (probability.sum((1, 2)) + target.sum() + 1)
            found = mask_logits > 0
            iou = (found & own[::2, ::2]).sum((1, 2)) / (found | own[::2, ::2]).sum((1, 2))
            expected.append((20 * focal.mean((1, 2)) + dice).min() + (scores - iou).square().mean())
        assert (losses[1] - losses[0]).item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-4)
        assert (losses[2] - losses[0]).item() == pytest.approx(3 * (losses[1] - losses[0]).item(), rel=1e-4)
        assert default == losses[1]

    def test_prompts_of_the_training(self, segmenter, processor, monkeypatch):
        """In training, the prompts are random points in the objects, or their boxes with noise."""
        boxes = torch.tensor([[20.0, 30.0, 79.0, 49.0], [90.0, 8.0, 99.0, 107.0]])
        masks = torch.zeros(2, 128, 128, dtype=torch.bool)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y1 : y2 + 1, x1 : x2 + 1] = True
        inputs = processor(Image.fromarray(scenes(1)[0].image), return_tensors="pt")
        prompts: dict[str, list[torch.Tensor]] = {"input_points": [], "input_boxes": []}
        predict_masks = SamClipModel.predict_masks

        def record(self, image_embeddings, **given):
            for name in prompts:
                prompts[name] += [] if given[name] is None else [*given[name][0]]
            assert given["multimask_output"] == (given["input_boxes"] is None)
            return predict_masks(self, image_embeddings, **given)

        monkeypatch.setattr(SamClipModel, "predict_masks", record)
        torch.manual_seed(0)
        segmenter.train()
        for _ in range(24):
            loss = segmenter(**inputs, mask_labels=[masks], class_labels=[torch.tensor([1, 2])]).loss
        loss.backward()
        assert any(parameter.grad.any() for parameter in segmenter.mask_decoder.parameters())
        points, found = torch.cat(prompts["input_points"]), torch.stack(prompts["input_boxes"])
        assert 8 < len(points) < 40 and len(points) + len(found) == 48
        x, y = points.round().int().unbind(dim=-1)
        assert masks.any(dim=0)[y, x].all() and len({*map(tuple, points.tolist())}) > len(points) / 2
        differences = (found[:, None] - boxes).abs().amax(dim=-1).amin(dim=-1)
        assert differences.max() <= 20 / 1024 * 128 and differences.min() > 0
        segmenter.eval()
        losses = {
            segmenter(**inputs, mask_labels=[masks], class_labels=[torch.tensor([1, 2])]).loss.item() for _ in range(3)
        }
        assert len(losses) == 1

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"labels": torch.zeros(1, 8, 8).long(), "mask_loss_weight": 1.0}, "mask_loss_weight is for the loss of"),
            ({"labels": torch.full((1, 32, 32), 9)}, r"labels contain \[9\], but the vocabulary has texts for"),
            ({"labels": torch.zeros(1, 32, 31, dtype=torch.int64)}, "with the proportions of pixel_values, 16:16"),
            ({"labels": torch.zeros(2, 32, 32, dtype=torch.int64)}, "for 1 images"),
            ({"labels": torch.zeros(1, 32, 32)}, "labels must be integers"),
            ({"mask_labels": [torch.ones(1, 8, 8) > 0]}, "Pass both mask_labels and class_labels"),
            ({"mask_labels": [torch.ones(1, 8, 8) > 0], "class_labels": [torch.tensor([1, 2])]}, "one label for each"),
            ({"mask_labels": [torch.ones(1, 8, 8) > 0], "class_labels": [torch.tensor([9])]}, "class_labels contain"),
            ({"labels": torch.zeros(1, 8, 8).long(), "input_points": torch.ones(1, 1, 1, 2)}, "remove the prompts"),
        ],
    )
    def test_labels_that_do_not_match_raise(self, shared, change, message):
        with pytest.raises(ValueError, match=message):
            shared(torch.zeros(1, 3, 128, 128), **change)

    def test_a_background_threshold_raises(self, shared):
        vocabulary = shared.embed_vocabulary(NAMES, 0.5)
        with pytest.raises(ValueError, match="describe the background by texts"):
            shared(torch.zeros(1, 3, 128, 128), vocabulary=vocabulary, labels=torch.zeros(1, 32, 32).long())

    def test_object_detection_has_no_loss(self, shared):
        detector = SamClipForObjectDetection(shared.config)
        images, labels = torch.zeros(1, 3, 128, 128), torch.zeros(1, 32, 32).long()
        with pytest.raises(ValueError, match="does not accept labels"):
            detector(images, torch.zeros(1, 4).long(), labels=labels)


def items(processor: SamClipProcessor, count: int, first: int = 0) -> list[dict[str, torch.Tensor]]:
    inputs = batch(processor, count, first)
    return [{name: values[index] for name, values in inputs.items()} for index in range(count)]


def mean_iou(prediction: EvalPrediction) -> dict[str, float]:
    logits = torch.from_numpy(prediction.predictions)
    found = F.interpolate(logits, prediction.label_ids.shape[1:], mode="bilinear").argmax(dim=1).numpy()
    reference = prediction.label_ids
    found = np.where(reference == 255, 255, found)
    ious = [
        ((found == label) & (reference == label)).sum() / ((found == label) | (reference == label)).sum()
        for label in set(np.unique(reference).tolist()) - {255}
    ]
    return {"mean_iou": float(np.mean(ious))}


class TestTrainer:
    def arguments(self, folder, **changes) -> TrainingArguments:
        options = {
            "output_dir": str(folder),
            "per_device_train_batch_size": 4,
            "learning_rate": 2e-4,
            "max_steps": 6,
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        return TrainingArguments(**(options | changes))

    def test_loss_falls_and_evaluation_has_loss_and_metrics(self, segmenter, processor, tmp_path):
        sam_head = {name: value.clone() for name, value in segmenter.mask_decoder.state_dict().items()}
        trainer = Trainer(
            segmenter,
            self.arguments(tmp_path),
            train_dataset=items(processor, 4),  # one batch, so that its loss must fall
            eval_dataset=items(processor, 4),
            compute_metrics=mean_iou,
        )
        before = trainer.evaluate()
        trainer.train()
        after = trainer.evaluate()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert len(losses) == 6 and losses[-1] < 0.8 * losses[0]
        assert after["eval_loss"] < before["eval_loss"]
        assert 0 < before["eval_mean_iou"] <= after["eval_mean_iou"] <= 1
        assert all(value.equal(sam_head[name]) for name, value in segmenter.mask_decoder.state_dict().items())
        trainer.save_model(tmp_path / "saved")
        loaded = SamClipForImageSegmentation.from_pretrained(tmp_path / "saved")
        inputs = batch(processor, 2)
        with torch.no_grad():
            torch.testing.assert_close(loaded(**inputs).loss, segmenter.eval()(**inputs).loss)

    def test_accumulated_batches_are_a_mean(self, processor, tmp_path):
        """The loss that Trainer logs does not grow with the number of accumulated batches."""
        losses = []
        for batch_size, accumulated in ((4, 1), (1, 4)):
            model = SamClipForImageSegmentation.from_pretrained(miniature.checkpoint())
            model.set_vocabulary(NAMES, BACKGROUND_PROMPTS, "a {}")
            changes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulated}
            trainer = Trainer(
                model, self.arguments(tmp_path, max_steps=1, **changes), train_dataset=[items(processor, 1)[0]] * 4
            )
            trainer.train()
            losses.append(trainer.state.log_history[0])
        assert losses[1]["loss"] == pytest.approx(losses[0]["loss"], rel=1e-3)
        assert losses[1]["grad_norm"] == pytest.approx(losses[0]["grad_norm"], rel=1e-2)


@pytest.mark.parametrize("convert", [np.array, torch.tensor])
def test_the_noise_of_boxes_is_a_tenth_of_the_side_and_limited(convert):
    boxes, sides = convert([[5.0, 7.0, 104.0, 16.0]]), convert([[100.0, 10.0, 100.0, 10.0]])
    noise = convert([[1.0, -2.0, 3.0, -30.0]])
    noisy = add_box_noise(boxes, sides, noise, 20.0)
    assert type(noisy) is type(boxes) and noisy[0].tolist() == pytest.approx([15, 5, 124, -4])
