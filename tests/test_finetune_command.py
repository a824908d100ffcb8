"""`samclip finetune`: labeled images, the guard against forgetting, the retention table, and what a run leaves."""

import copy
import json
import re
import shlex
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainerCallback

from samclip_cli import CommandError, finetune, main
from samclip_cli.train import parse_arguments, recipe_paths
from samclip_hf import SamClipForImageSegmentation, SamClipProcessor, miniature
from samclip_hf.datasets import DataSet, ImageWithObjects, open_coco_segmentation, segmentation
from samclip_hf.distillation import provenance
from samclip_hf.evaluation import ZeroShotInstanceSegmentation
from samclip_hf.finetuning import FinetuningTrainer, LabelMapBatches, open_data
from samclip_hf.finetuning.trainer import NAMES_WEIGHT, RETENTION_NAME
from samclip_hf.images import encode_mask, normalize, read_mask
from samclip_hf.miniature.scenes import BACKGROUND_PROMPTS, CLASS_NAMES, HELD_OUT, render
from samclip_hf.publishing import create_model_card, publish_provenance

NAMES = [CLASS_NAMES[class_id] for class_id in HELD_OUT]
SETTINGS = {
    **{"model": "miniature", "use_cpu": True, "report_to": "none", "disable_tqdm": True, "seed": 3},
    **{"templates": "a {}", "batch_size": 2, "max_steps": 2, "learning_rate": 1e-3, "logging_steps": 1},
    **{"eval_steps": 1, "save_steps": 1, "eval_batches": 1, "eval_fraction": 0.25},
}
GUARD = {"sam_data": "miniature", "sam_batch_size": 2, "masks_per_image": 2, "sam_shuffle_buffer": 2}

RETENTION = {"retention": ["prompts:miniature"], "retention_limit": 16}


@pytest.fixture(scope="module")
def scenes() -> list:
    """Scenes with one object, of a class that no caption names."""
    return [render(7, index, num_objects=1, class_id=HELD_OUT[index % 8]) for index in range(8)]


@pytest.fixture(scope="module")
def folder(scenes, tmp_path_factory) -> Path:
    """The scenes with label maps. 0 is background."""
    root = tmp_path_factory.mktemp("label_maps")
    for name in ("images", "labels"):
        (root / name).mkdir()
    for index, scene in enumerate(scenes):
        label_map = scene.masks[0] * np.uint8(1 + HELD_OUT.index(scene.class_ids[0]))
        Image.fromarray(scene.image).save(root / f"images/{index}.png")
        Image.fromarray(label_map).save(root / f"labels/{index}.png")
    classes = {"names": ["background", *NAMES], "background": list(BACKGROUND_PROMPTS)}
    (root / "classes.json").write_text(json.dumps(classes))
    return root


def coco_content(scenes) -> dict:
    return {
        "categories": [{"id": 5 + 2 * number, "name": name} for number, name in enumerate(NAMES)][::-1],
        "images": [{"id": 10 + i, "file_name": f"{i}.png", "height": 128, "width": 128} for i in range(len(scenes))],
        "annotations": [
            {
                **{"id": index, "image_id": 10 + index, "bbox": [0, 0, 1, 1], "iscrowd": 0},
                "category_id": 5 + 2 * HELD_OUT.index(scene.class_ids[0]),
                "segmentation": encode_mask(scene.masks[0], compressed=True),
            }
            for index, scene in enumerate(scenes)
        ],
    }


@pytest.fixture(scope="module")
def coco(scenes, folder) -> Path:
    """The same labels as a COCO file."""
    path = folder / "annotations.json"
    path.write_text(json.dumps(coco_content(scenes)))
    return path


class StopAfterFirstStep(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        control.should_training_stop = True


def words(settings: dict) -> list[str]:
    return [
        word
        for name, value in settings.items()
        for word in (f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)]))
    ]


def make_trainer(tmp_path: Path, data: Path, **settings) -> FinetuningTrainer:
    settings = SETTINGS | {"output_dir": tmp_path / "run", "data": data, "guard_weight": 0} | settings
    return finetune.build_trainer(parse_arguments(words(settings), finetune.COMMAND))


def run(tmp_path: Path, folder: Path, **settings) -> Path:
    settings = SETTINGS | {"output_dir": tmp_path / "run", "data": folder, "guard_weight": 0} | settings
    assert main(["finetune", *words(settings)]) == 0
    return settings["output_dir"]


def first_batch(trainer: FinetuningTrainer) -> dict:
    return dict(next(iter(trainer.get_train_dataloader())))


def mask_scale(mask: torch.Tensor) -> float:
    """Pixels of an image of 128 x 128 for each cell of a mask."""
    return 128 * 128 / mask.numel()


class TestData:
    def test_coco_and_label_maps_give_the_same_loss(self, folder, coco, tmp_path):
        losses = []
        coco_options = {"images": folder / "images", "background": list(BACKGROUND_PROMPTS)}
        for data, options in ((folder, {}), (coco, coco_options | {"mask_loss_weight": 0})):
            trainer = make_trainer(tmp_path, data, eval_data=data, **options)
            losses.append(trainer.own_loss(trainer.model.eval(), **first_batch(trainer)["own"]).item())
        assert losses[0] == losses[1] > 0

    def test_the_loss_is_that_of_the_model_for_the_processors_outputs(self, folder, scenes, tmp_path):
        trainer = make_trainer(tmp_path, folder, eval_data=folder, batch_size=8)
        model = copy.deepcopy(trainer.model).eval()
        loss = trainer.own_loss(trainer.model.eval(), **first_batch(trainer)["own"]).item()
        processor = SamClipProcessor.from_pretrained(miniature.checkpoint())
        label_maps = [np.asarray(Image.open(folder / f"labels/{index}.png")) for index in range(8)]
        inputs = processor([Image.fromarray(s.image) for s in scenes], segmentation_maps=label_maps)
        labels = [torch.tensor([0, 1 + HELD_OUT.index(scene.class_ids[0])]) for scene in scenes]
        # As the label maps that the processor has resized.
        masks = [own == label[:, None, None] for own, label in zip(inputs["labels"], labels, strict=True)]
        negative_embeds = model.embed_vocabulary(trainer.other_names, (), "a {}").class_embeds
        with torch.no_grad():
            outputs = model(
                **inputs,
                mask_labels=masks,
                class_labels=labels,
                negative_embeds=negative_embeds,
                mask_loss_weight=0,
            )
        expected = outputs.loss.item()
        assert loss == pytest.approx(expected, rel=2e-3)  # pixels are rounded to 8 bits

    def test_objects_of_coco_train_the_sam_head(self, folder, scenes, tmp_path):
        """Masks may overlap. The label map shows the smaller one, and the SAM head learns both."""
        content = coco_content(scenes[:1])
        small = np.zeros((128, 128), dtype=bool)
        y, x = np.argwhere(scenes[0].masks[0]).mean(axis=0).astype(int) // 2 * 2
        small[y - 6 : y + 6, x - 6 : x + 6] = True
        other = {"id": 1, "category_id": content["categories"][0]["id"], "segmentation": encode_mask(small)}
        crowd = {"id": 2, "iscrowd": 1, "segmentation": encode_mask(~scenes[0].masks[0])}
        content["annotations"] += [content["annotations"][0] | other, content["annotations"][0] | crowd]
        (tmp_path / "coco.json").write_text(json.dumps(content))
        options = {"images": folder / "images", "batch_size": 1, "learning_rate": 1e-2, "decoder_lr_multiplier": 1}
        trainer = make_trainer(tmp_path, tmp_path / "coco.json", eval_data=tmp_path / "coco.json", **options)
        assert trainer.args.mask_loss_weight == 1
        batch = first_batch(trainer)["own"]
        masks, labels = batch["object_masks"][0], batch["object_labels"][0]
        assert sorted(labels.tolist()) == [HELD_OUT.index(scenes[0].class_ids[0]), 7, *[255] * 6]
        truth = {7: small, HELD_OUT.index(scenes[0].class_ids[0]): scenes[0].masks[0]}
        for mask, label in zip(masks, labels.tolist(), strict=True):
            area = 0 if label == 255 else truth[label].sum() / mask_scale(mask)
            assert mask.sum().item() == pytest.approx(area, rel=0.05)
        before = {name: value.clone() for name, value in trainer.model.mask_decoder.state_dict().items()}
        trainer.train()
        assert any(not value.equal(before[name]) for name, value in trainer.model.mask_decoder.state_dict().items())

    def test_a_mask_is_read_once_for_a_training_sample(self, scenes, folder, coco, monkeypatch):
        read = []
        monkeypatch.setattr(segmentation, "read_mask", lambda *mask: read.append(mask) or read_mask(*mask))
        data = open_coco_segmentation(coco, folder / "images")
        processor = SamClipProcessor.from_pretrained(miniature.checkpoint()).image_processor
        for with_objects in (True, False):
            batches = LabelMapBatches(data, data, processor, 1, with_objects)
            sample = next(iter(data.samples))
            found = batches.sample({"key": sample.key, "sample": sample}, seed=0, epoch=0)
            assert ("object_masks" in found) == with_objects and len(read) == 1
            read.clear()

    def test_label_maps_have_no_objects(self, folder, tmp_path):
        assert make_trainer(tmp_path, folder, eval_data=folder).args.mask_loss_weight == 0
        with pytest.raises(ValueError, match=r"objects of a class are not separate.* set mask_loss_weight to 0"):
            make_trainer(tmp_path, folder, eval_data=folder, mask_loss_weight=1)

    def test_coco_masks_are_drawn_by_size_and_crowds_are_ignored(self, scenes, folder, tmp_path):
        small, large, crowd = np.zeros((3, 128, 128), dtype=bool)
        small[40:50, 40:60], large[20:90, 30:70], crowd[80:120, 60:100] = True, True, True
        content = coco_content(scenes[:1])
        first = content["annotations"][0]
        content["annotations"] = [
            first | {"id": number, "category_id": category, "segmentation": encode_mask(mask), "iscrowd": is_crowd}
            for number, (mask, category, is_crowd) in enumerate(((small, 5, 0), (large, 7, 0), (crowd, 5, 1)))
        ]
        (tmp_path / "coco.json").write_text(json.dumps(content))
        for texts in ((), ("a wall",)):
            data = open_coco_segmentation(tmp_path / "coco.json", folder / "images", texts)
            expected = np.full((128, 128), 0 if texts else 255)
            expected[crowd] = 255
            expected[large] = 1 + bool(texts)
            expected[small] = 0 + bool(texts)
            (sample,) = data.samples
            assert (sample.label_map() == expected).all() and (sample.label_map(sample.objects()) == expected).all()
            assert data.names == [["background"]] * bool(texts) + [[name] for name in NAMES]

    def test_names_of_classes_can_be_a_text_file(self, folder, tmp_path):
        for name in ("images", "labels"):
            (tmp_path / name).symlink_to(folder / name)
        (tmp_path / "classes.txt").write_text("\n".join(["nothing", *NAMES]) + "\n")
        assert open_data(str(tmp_path), "train").names == [["nothing"], *([name] for name in NAMES)]
        (tmp_path / "classes.txt").write_text("nothing\n\ncat\n")
        with pytest.raises(ValueError, match="has an empty line"):
            open_data(str(tmp_path), "train")
        (tmp_path / "classes.txt").write_bytes(b"\xff\xfe")
        with pytest.raises(ValueError, match=r"classes\.txt is not a text file in UTF-8"):
            open_data(str(tmp_path), "train")

    @pytest.mark.parametrize("content", ["[1, 2]", '{"names": 5}', "[[]]"])
    def test_wrong_lists_of_classes_name_the_file(self, folder, tmp_path, content):
        (tmp_path / "classes.json").write_text(content)
        for name in ("images", "labels"):
            (tmp_path / name).symlink_to(folder / name)
        with pytest.raises(ValueError, match=r"classes\.json must contain a list of names"):
            open_data(str(tmp_path), "train")

    def test_a_file_in_place_of_the_folder_is_named(self, folder):
        with pytest.raises(ValueError, match=r"0\.png is not a folder"):
            open_data(str(folder / "images/0.png"), "train")

    def test_a_data_set_of_the_library_gives_the_same_label_maps(self, folder, tmp_path):
        datasets = pytest.importorskip("datasets")
        files = {name: [str(folder / name / f"{i}.png") for i in range(8)] for name in ("images", "labels")}
        table = datasets.Dataset.from_dict({"image": files["images"], "label_map": files["labels"]})
        for column in table.column_names:
            table = table.cast_column(column, datasets.Image())
        (tmp_path / "set").mkdir()
        table.to_parquet(str(tmp_path / "set" / "train.parquet"))
        data = open_data(f"hf://{tmp_path / 'set'}?classes={folder / 'classes.json'}", "train")
        assert data.names == open_data(str(folder), "train").names
        for own, other in zip(data.samples, open_data(str(folder), "train").samples, strict=True):
            assert (own.label_map() == other.label_map()).all()


class TestOtherNames:
    def test_by_default_they_are_those_of_the_model_and_of_retention_without_the_classes(self, folder, tmp_path):
        trainer = make_trainer(tmp_path, folder)
        assert trainer.other_names == [name for name in CLASS_NAMES if name not in NAMES]  # of the model
        model = tmp_path / "model"
        segmenter = SamClipForImageSegmentation.from_pretrained(miniature.checkpoint())
        segmenter.set_vocabulary(["a dog", NAMES[0].upper()], ["a wall"]).save_pretrained(model)
        SamClipProcessor.from_pretrained(miniature.checkpoint()).save_pretrained(model)
        trainer = make_trainer(tmp_path, folder, model=model)
        assert trainer.other_names == ["a dog"]  # CLIP's tokenizer does not tell capitals apart
        trainer = make_trainer(tmp_path, folder, model=model, retention="composed:miniature", retention_limit=16)
        assert trainer.other_names == ["a dog", *(name for name in CLASS_NAMES if name not in NAMES)]

    def test_an_empty_text_is_none(self, folder, tmp_path):
        trainer = make_trainer(tmp_path, folder, other_names="")
        assert trainer.other_names == trainer.args.other_names == []
        model = copy.deepcopy(trainer.model).eval()
        batch = first_batch(trainer)["own"]
        loss = make_trainer(tmp_path, folder).own_loss(model, **batch)
        assert trainer.own_loss(trainer.model.eval(), **batch) < loss

    def test_they_are_negative_texts_of_the_loss(self, folder, tmp_path):
        losses = []
        for names in (CLASS_NAMES[:1], CLASS_NAMES[:20]):
            names = [name for name in names if name not in NAMES]
            trainer = make_trainer(tmp_path, folder, other_names=names)
            assert trainer.other_names == names and list(trainer.model.config.id2label.values())[1:] == NAMES
            losses.append(trainer.own_loss(trainer.model.eval(), **first_batch(trainer)["own"]).item())
        assert losses[1] > losses[0] * 1.01

    def test_the_guard_keeps_the_probabilities_of_all_names(self, folder, tmp_path):
        """The divergence of each embedding, summed by hand."""
        trainer = make_trainer(tmp_path, folder, guard_weight=1, other_names=["red solid shape"], **GUARD)
        with torch.no_grad():
            trainer.model.clip_head.mlp.fc1.weight.mul_(3)
        recorded = {}
        trainer.record = recorded.update
        batch = first_batch(trainer)["sam"]
        trainer.guard_loss(trainer.model.eval(), **batch)
        before, model = trainer.sam_teacher.model, trainer.model
        texts = torch.cat([model.class_embeds, model.embed_vocabulary(["red solid shape"], (), "a {}").class_embeds])
        pixels = torch.as_tensor(batch["images"])
        pixels = normalize(pixels, trainer.image_mean, trainer.image_std, batch["content_sizes"])
        probabilities = []
        for own in (before, model):
            with torch.no_grad():
                embeds = own.get_image_features(pixels).pooler_output
            embeds = embeds / embeds.norm(dim=-1, keepdim=True)
            probabilities.append((embeds @ texts.T * model.logit_scale.exp()).softmax(dim=-1))
        p, q = probabilities
        expected = NAMES_WEIGHT * (p * (p / q).log()).sum(dim=-1).mean().item()
        assert recorded["guard_image_names"].item() == pytest.approx(expected, rel=1e-3)
        assert recorded["guard_image_names"] > 1e-4


class TestGuard:
    def test_weight_0_gives_the_plain_loss_and_reads_no_general_images(self, folder, tmp_path):
        options = {"eval_strategy": "no", "load_best_model_at_end": False, "save_strategy": "no"}
        trainer = make_trainer(tmp_path, folder, **options, **GUARD | {"sam_data": "nowhere"})
        assert trainer.sam_teacher is None and trainer.train_dataset.tasks.keys() == {"own"}
        plain = trainer.own_loss(copy.deepcopy(trainer.model).train(), **first_batch(trainer)["own"]).item()
        mask_decoder = {name: value.clone() for name, value in trainer.model.mask_decoder.state_dict().items()}
        trainer = make_trainer(tmp_path, folder, **options)
        trainer.train()
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert logged[0]["loss"] == pytest.approx(plain, rel=1e-4)
        assert all(entry["loss"] == entry["own_loss"] for entry in logged)
        assert all(value.equal(mask_decoder[name]) for name, value in trainer.model.mask_decoder.state_dict().items())

    def test_before_the_first_step_the_guard_is_zero_without_gradient(self, folder, tmp_path):
        trainer = make_trainer(tmp_path, folder, guard_weight=2, **GUARD)
        loss = trainer.guard_loss(trainer.model.eval(), **first_batch(trainer)["sam"])
        loss.backward()
        assert loss.item() == pytest.approx(0, abs=1e-5)
        gradients = [p.grad.abs().max().item() for p in trainer.model.parameters() if p.grad is not None]
        assert gradients and max(gradients) < 1e-3

    def test_the_gradient_of_the_guard_pulls_back(self, folder, tmp_path):
        """From a model that has moved, a small step against the gradient reduces the loss and the distance of the
        image embeddings to those before."""
        trainer = make_trainer(tmp_path, folder, guard_weight=1, **GUARD)
        before, model = trainer.sam_teacher.model, trainer.model.eval()
        parameters = [p for p in model.parameters() if p.requires_grad]
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.03 * parameter.std())
        batch = first_batch(trainer)["sam"]
        loss = trainer.guard_loss(model, **batch)
        loss.backward()
        assert {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()} == {
            *("vision_encoder", "mask_decoder", "clip_head")
        }
        images = normalize(batch["images"], trainer.image_mean, trainer.image_std)
        with torch.no_grad():
            reference = before.get_image_features(images).pooler_output

            def distance() -> float:
                features = model.get_image_features(images).pooler_output
                return (1 - torch.cosine_similarity(features, reference).mean()).item()

            far = distance()
            norm = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).square().sum()
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.sub_(0.2 * loss.item() / norm * parameter.grad)
            assert trainer.guard_loss(model, **batch).item() < loss.item()
            assert distance() < far

    def test_the_weight_multiplies_the_guard(self, folder, tmp_path):
        losses = []
        for weight in (1, 3):
            trainer = make_trainer(tmp_path, folder, guard_weight=weight, **GUARD)
            with torch.no_grad():
                trainer.model.clip_head.mlp.fc1.weight.mul_(1.5)
                trainer.model.mask_decoder.iou_token.weight.mul_(1.5)
            losses.append(trainer.guard_loss(trainer.model.eval(), **first_batch(trainer)["sam"]).item())
        assert losses[1] == pytest.approx(3 * losses[0], rel=1e-4) and losses[0] > 1e-3


@pytest.fixture(scope="module")
def complete(folder, tmp_path_factory) -> Path:
    """The output folder of a run with a guard."""
    return run(tmp_path_factory.mktemp("complete"), folder, guard_weight=1, **GUARD, **RETENTION)


class TestRun:
    def test_the_output_has_a_model_with_the_vocabulary_and_the_retention_table(self, complete, scenes):
        model = SamClipForImageSegmentation.from_pretrained(complete)
        assert list(model.config.id2label.values()) == ["background", *NAMES]
        content = json.loads((complete / "retention.json").read_text())
        rows = {(row["task"], row["metric"]): row for row in content["results"]}
        assert [*rows] == [
            ("own classes", "mean_iou"),
            ("prompts:miniature", "point_miou"),
            ("prompts:miniature", "box_miou"),
        ]
        assert all(0 < row[when] <= 1 for row in rows.values() for when in ("before", "after"))
        own, *others = content["results"]
        ratio = min([1.0, *(row["after"] / row["before"] for row in others)])
        assert content["score"] == pytest.approx(own["after"] * ratio)

    def test_provenance_and_model_card_have_the_table(self, complete, tmp_path):
        *earlier, stage = provenance.read(complete)
        assert earlier == provenance.read(miniature.checkpoint())
        assert stage["stage"] == "fine-tuning" and stage["model"] == "miniature" and stage["teachers"] == {}
        assert stage["retention"] == json.loads((complete / "retention.json").read_text())["results"]
        assert "clip_data" not in stage["arguments"] and stage["arguments"]["guard_weight"] == 1
        stages, licenses = publish_provenance(complete, tmp_path)
        text = str(create_model_card(complete, "me/adapted", stages, licenses=licenses))
        assert "license: apache-2.0" in text
        assert re.search(r"\| prompts:miniature \| box_miou \| 0\.\d{3} \| 0\.\d{3} \|", text)
        assert "guard against forgetting on `miniature`, weight 1.0" in text

    def test_a_result_that_cannot_be_measured_is_not_0(self, folder, tmp_path, monkeypatch, capsys, transformers_log):
        """The average precision of images without objects."""
        sample = ImageWithObjects("empty", partial(Image.new, "RGB", (128, 128)), list, image_info={"id": 1})
        data = DataSet("empty", [sample], description={"categories": [{"id": 1, "name": "object"}]})
        evaluator = ZeroShotInstanceSegmentation(data)
        monkeypatch.setattr(finetune, "build_retention", lambda tasks, limit: {"instances:empty": evaluator})
        output = run(tmp_path, folder)
        assert transformers_log.text.count("The retention table has no AP of instances:empty") == 1
        content = json.loads((output / "retention.json").read_text())
        own, other = content["results"]
        assert other == {"task": "instances:empty", "metric": "AP", "before": None, "after": None}
        assert content["score"] == own["after"] > 0
        assert "instances:empty, AP: none before, none after" in capsys.readouterr().out
        history = json.loads((output / "checkpoint-2/trainer_state.json").read_text())["log_history"]
        evaluated = [entry for entry in history if "eval_retention_score" in entry]
        assert len(evaluated) == 2 and not any("instances" in name for entry in evaluated for name in entry)
        stages, licenses = publish_provenance(output, tmp_path)
        text = str(create_model_card(output, "me/adapted", stages, licenses=licenses))
        assert re.search(
            r"\| mean_iou \| 0\.\d{3} \| 0\.\d{3} \|\n\| instances:empty \| AP \| none \| none \|\n", text
        )

    @pytest.mark.slow
    def test_a_resumed_run_equals_an_uninterrupted_one(self, complete, folder, tmp_path):
        output = tmp_path / "run"
        options = {"guard_weight": 1, **GUARD, **RETENTION, "output_dir": output}
        trainer = make_trainer(tmp_path, folder, **options)
        trainer.add_callback(StopAfterFirstStep())
        trainer.train()
        assert {path.name for path in output.iterdir()} == {"checkpoint-1", "panels"}
        run(tmp_path, folder, **options, resume_from_checkpoint="true")
        for name, value in load_file(output / "model.safetensors").items():
            assert torch.equal(value, load_file(complete / "model.safetensors")[name]), name
        results = [json.loads((path / "retention.json").read_text())["results"] for path in (output, complete)]
        assert results[0] == results[1]

    @pytest.mark.slow
    def test_a_resumed_run_draws_the_same_prompts(self, folder, coco, tmp_path):
        options = {"images": folder / "images", "decoder_lr_multiplier": 1, "max_steps": 3}
        complete = run(tmp_path, coco, **options, output_dir=tmp_path / "complete")
        trainer = make_trainer(tmp_path, coco, **options)
        trainer.add_callback(StopAfterFirstStep())
        trainer.train()
        resumed = run(tmp_path, coco, **options, resume_from_checkpoint="true")
        record = json.loads((resumed / "provenance.json").read_text())["stages"][-1]
        assert record["arguments"]["mask_loss_weight"] == 1
        for name, value in load_file(resumed / "model.safetensors").items():
            assert torch.equal(value, load_file(complete / "model.safetensors")[name]), name

    def test_nothing_is_overwritten(self, complete, folder, tmp_path):
        with pytest.raises(SystemExit, match="belongs to an earlier run"):
            run(tmp_path, folder, output_dir=complete)
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "retention.json").write_text("mine")
        with pytest.raises(SystemExit, match=r"It would replace .*retention.json"):
            run(tmp_path, folder, output_dir=tmp_path / "mine")
        assert (tmp_path / "mine" / "retention.json").read_text() == "mine"

    def test_the_best_checkpoint_by_the_score_is_kept(self, folder, tmp_path, monkeypatch, transformers_log):
        """The mean IoU is highest after the second step, but a result of retention has fallen by half there."""
        own, other = ("own classes", "mean_iou"), ("prompts", "box_miou")
        values = iter([(0.2, 0.8), (0.5, 0.8), (0.9, 0.4), (0.5, 0.8)])  # before, step 1, step 2, the final model
        monkeypatch.setattr(
            FinetuningTrainer, "measure", lambda self: dict(zip((own, other), next(values), strict=True))
        )
        output = run(tmp_path, folder)
        best, last = (load_file(output / f"checkpoint-{step}" / "model.safetensors") for step in (1, 2))
        saved = load_file(output / "model.safetensors")
        assert all(torch.equal(value, best[name]) for name, value in saved.items())
        assert not all(torch.equal(value, last[name]) for name, value in saved.items())
        assert provenance.read(output)[-1]["best_step"] == 1
        # The checkpoint has one of two tied weights. Both are loaded.
        assert "missing keys" not in transformers_log.text

    @pytest.mark.slow
    def test_adapters_are_merged_into_the_model(self, folder, tmp_path):
        output = run(tmp_path, folder, lora_r=2, guard_weight=1, **GUARD, encoder_lr_multiplier=1)
        assert (output / "adapter" / "adapter_config.json").is_file()
        before = load_file(Path(miniature.checkpoint()) / "model.safetensors")
        after = load_file(output / "model.safetensors")
        changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
        in_encoder = [name for name in changed if name.startswith("vision_encoder.")]
        assert in_encoder and all(re.search(r"(qkv|proj|lin[12])\.weight$", name) for name in in_encoder)
        assert any(name.startswith("clip_head.") for name in changed)
        assert not any(name.startswith(("text_", "prompt_encoder")) for name in changed)


@pytest.mark.parametrize("path", recipe_paths(finetune.COMMAND).values(), ids=lambda path: path.stem)
def test_every_recipe_can_be_parsed(path, tmp_path):
    more = {"data": "d", "model": "m", "sam_data": "s", "output_dir": tmp_path, "bf16": False, "use_cpu": True}
    args = parse_arguments([str(path), *words(more)], finetune.COMMAND)
    assert args.max_steps > 0 and args.metric_for_best_model == "retention_score" and args.greater_is_better


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"data": None}, "Pass labeled images as data"),
        ({"model": None}, "Pass the SAM-CLIP to fine-tune as model"),
        ({"model": "./nowhere"}, "./nowhere: no such folder"),
        ({"guard_weight": 1}, "needs general images with masks: pass them as sam_data"),
        ({"guard_weight": -1}, "guard_weight must be 0 or more"),
        ({"batch_size": 0}, "batch_size must be 1 or more"),
        ({"retention_limit": 5}, "retention_limit has no effect without retention"),
        ({"retention": "cost:64x64"}, "retention: cost:64x64 is not a task of one of classification"),
        ({"retention": "composed:nowhere"}, "composed:nowhere"),
        ({"clip_data": "photos"}, "Pass labeled images as data, and general images as sam_data"),
        ({"clip_teacher": "a"}, "The model before fine-tuning is the only teacher"),
        ({"stage": 2}, "unknown argument 'stage'"),
        ({"num_train_epochs": 2}, "Set max_steps: images times epochs"),
    ],
)
def test_wrong_arguments_are_refused(folder, tmp_path, capsys, monkeypatch, changes, sentence):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    settings = SETTINGS | {"output_dir": tmp_path / "run", "data": folder, "guard_weight": 0} | changes
    settings = {name: value for name, value in settings.items() if value is not None}
    assert main(["finetune", *words(settings)]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"data": "nowhere"}, "nowhere"),
        ({"data": "nowhere.json"}, "nowhere.json does not exist"),
        ({"background": "a wall"}, "background is for COCO files"),
        ({"eval_fraction": 0.01}, "of which eval_fraction 0.01 holds out 0. Pass eval_data"),
        ({"data": "boxes.json"}, "annotation 0 has no mask. samclip points --boxes makes masks of boxes"),
        ({"data": "unknown.json"}, "annotation 0 is of an unknown image or category"),
        ({"data": "empty.json"}, "has no annotations"),
        ({"data": "same_tokens.json"}, "same tokens as another class.*BLUE SOLID"),
        ({"data": "broken.json", "eval_data": "coco.json"}, "annotation 0 .*do not add up to its size"),
        ({"data": "wrong_size.json"}, "annotations"),
        ({"data": "outside.json"}, r"outside.json has no pixel of a class: all but.* Pass eval_data"),
        ({"data": "crowds.json"}, "has no annotations of objects, only crowds"),
        ({"data": "two_categories.json"}, "two categories have the id 5"),
        ({"data": "two_images.json"}, "two images have the id 10"),
        ({"eval_data": "other"}, "have different classes"),
        ({"other_names": [NAMES[1], "a dog"]}, rf"These other_names are names of classes .*'{NAMES[1]}'"),
        ({"data": "wrong"}, r"wrong/labels/\d.png has values without a class: \[8\]"),
    ],
)
def test_wrong_data_are_refused(folder, scenes, tmp_path, monkeypatch, changes, sentence):
    monkeypatch.chdir(tmp_path)
    for name, keys in (("boxes", {"segmentation": []}), ("unknown", {"category_id": 1})):
        content = coco_content(scenes[:1])
        content["annotations"][0] |= keys
        Path(f"{name}.json").write_text(json.dumps(content))
    for path in (folder / "images").iterdir():
        Path(path.name).symlink_to(path)
    content = coco_content(scenes)
    first, *others = content["annotations"]
    Path("coco.json").write_text(json.dumps(content))
    broken = [first | {"segmentation": {"size": [128, 128], "counts": [5, 5]}}, *others]
    Path("broken.json").write_text(json.dumps(content | {"annotations": broken}))
    outside = [{**own, "segmentation": [[300, 300, 400, 300, 400, 400]]} for own in content["annotations"]]
    Path("outside.json").write_text(json.dumps(content | {"annotations": outside}))
    smaller = [content["images"][0] | {"height": 64}, *content["images"][1:]]
    Path("wrong_size.json").write_text(json.dumps(content | {"images": smaller}))
    names = [{"id": 5, "name": NAMES[0]}, {"id": 7, "name": NAMES[0].upper()}, *content["categories"][:-2]]
    Path("same_tokens.json").write_text(json.dumps(content | {"categories": names}))
    content = coco_content(scenes[:1])
    for key, of_key in (("categories", {"id": 5, "name": "other"}), ("images", content["images"][0])):
        Path(f"two_{key}.json").write_text(json.dumps(content | {key: [*content[key], of_key]}))
    crowds = [annotation | {"iscrowd": 1} for annotation in content["annotations"]]
    Path("crowds.json").write_text(json.dumps(content | {"annotations": crowds}))
    Path("empty.json").write_text(json.dumps(coco_content(scenes[:1]) | {"annotations": []}))
    for name in ("other", "wrong"):
        Path(name, "labels").mkdir(parents=True)
        Path(name, "images").symlink_to(folder / "images")
        for path in (folder / "labels").iterdir():
            values = np.full((128, 128), 8 if name == "wrong" else 0, dtype=np.uint8)
            Image.fromarray(values).save(Path(name, "labels", path.name))
        Path(name, "classes.json").write_text(json.dumps(NAMES))
    with pytest.raises(SystemExit, match=f"Training did not start.*{sentence}"):
        run(tmp_path, folder, **changes)


def test_an_empty_text_as_retention_turns_off_that_of_the_recipe(folder, tmp_path):
    command = ["miniature", "--data", str(folder), "--output_dir", str(tmp_path), "--guard_weight", "0"]
    assert parse_arguments(command, finetune.COMMAND).retention == ["composed:miniature", "prompts:miniature"]
    args = parse_arguments([*command, "--retention", ""], finetune.COMMAND)
    assert args.retention == [] and args.retention_limit is None


def test_classes_without_a_pixel_are_reported(folder, scenes, tmp_path, capsys):
    content = coco_content(scenes)
    path = tmp_path / "more.json"
    path.write_text(json.dumps(content | {"categories": [*content["categories"], {"id": 99, "name": "a ghost"}]}))
    make_trainer(tmp_path, path, eval_data=path, images=folder / "images")
    assert "more.json, all images: 1 of 9 classes have no pixel: a ghost." in capsys.readouterr().err


def test_the_retention_table_is_printed(tmp_path, capsys):
    rows = [("own classes", "mean_iou", 0.25, 0.5), ("prompts:miniature", "box_miou", None, 0.75)]
    results = [dict(zip(("task", "metric", "before", "after"), row, strict=True)) for row in rows]
    (tmp_path / RETENTION_NAME).write_text(json.dumps({"results": results}))
    finetune.print_retention(tmp_path / RETENTION_NAME)
    assert capsys.readouterr().out == (
        "own classes, mean_iou: 0.250 before, 0.500 after\nprompts:miniature, box_miou: none before, 0.750 after\n"
    )


def test_an_unknown_recipe_is_reported(capsys):
    with pytest.raises(CommandError, match="unknown recipe 'miniature_stage1'"):
        parse_arguments(["miniature_stage1"], finetune.COMMAND)


@pytest.mark.slow
def test_the_commands_of_the_documentation_adapt_the_miniature(tmp_path, monkeypatch, capsys):
    """The first block of the page writes labeled scenes, and the first two commands use them."""
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "docs" / "finetune.md").read_text()
    code, shell = (
        re.search(rf"^```{name}\n(.*?)^```", page, re.DOTALL | re.MULTILINE)[1] for name in ("python", "sh")
    )
    exec(code, {})
    adapt, segment = (shlex.split(line)[1:] for line in shell.splitlines())
    short = {"max_steps": 2, "eval_steps": 2, "save_steps": 2, "retention_limit": 16, "batch_size": 2, "use_cpu": True}
    assert main([*adapt, *words(short)]) == 0
    rows = json.loads(Path("runs/adapted/retention.json").read_text())["results"]
    assert {row["task"] for row in rows} == {"own classes", "composed:miniature", "prompts:miniature"}
    output = capsys.readouterr().out
    for row in rows:
        assert f"{row['task']}, {row['metric']}: {row['before']:.3f} before, {row['after']:.3f} after\n" in output
    assert main(segment) == 0
    assert any(Path("out").iterdir())
