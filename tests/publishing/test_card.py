"""The model card, the published provenance and the example image."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from transformers import SamModel

from samclip_hf import SamClipConfig, SamClipForImageSegmentation, SamClipModel, SamClipProcessor, miniature
from samclip_hf.configuration_samclip import MINIMUM_TRANSFORMERS_VERSION
from samclip_hf.distillation import provenance
from samclip_hf.evaluation import load_adapter
from samclip_hf.identity import hash_configuration
from samclip_hf.publishing import (
    PublishingError,
    create_model_card,
    draw_example_image,
    find_results,
    publish_provenance,
)

from .records import RECIPES, RESULTS, STAGES

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_the_card_contains_everything_that_is_recorded(folder, tmp_path):
    licenses = {"facebook/sam-vit-base": "apache-2.0"}
    card = create_model_card(folder, "lab/merged", STAGES, RESULTS, "stage3", licenses, True)
    for expected in (
        f"Requires transformers {MINIMUM_TRANSFORMERS_VERSION} or newer",
        "SAM `facebook/sam-vit-base` at commit `abc`, license apache-2.0",
        "CLIP `openai/clip-vit-base-patch16`, license not recorded",
        "**Stage 2:** 1000 steps, 2,048,000 images, 2.00 hours on 8 x A100",
        "| classification:imagenet@336 | top1 | 0.724 |",
        "Measured with `training/evaluate.py --model runs/stage3` and torch 2.14.1.",
        "Measured with `training/evaluate.py --dtype bfloat16` and torch 2.12.0.",
        "- dtype: bfloat16",
        "- templates: 80",
        "- composition: classes",
        "The evaluated weights have the hash `0a1b2c3d`",
        "(example.png)",
        'model="lab/merged"',
        "title   = {SAM-CLIP: Merging",
    ):
        assert expected in card.content, expected
    assert "iou: cat" not in card.content and "{{" not in card.content and "None" not in card.content
    card.save(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.base_model == ["facebook/sam-vit-base", "openai/clip-vit-base-patch16"]
    by_type = {result.metric_type: result for result in data.eval_results}
    assert by_type["top1"].metric_value == pytest.approx(0.7239, abs=1e-4)
    assert by_type["top1"].task_type == "zero-shot-image-classification"


def test_only_teachers_that_were_used_are_listed(folder):
    """Stage 3 uses no SAM teacher, whatever its arguments name, and only stage 2 records SAM's commit."""
    clip = "openai/clip-vit-base-patch16"
    arguments = STAGES[0]["arguments"]
    first = {"stage": 1, "commits": {"clip_teacher": "def"}, "arguments": arguments | {"sam_student": "lab/sam-b"}}
    last = {"stage": 3, "teachers": {"sam_teacher": "miniature", "clip_teacher": clip}, "commits": {}}
    stages = [STAGES[0] | first, STAGES[0], STAGES[0] | last]
    assert provenance.teachers(stages) == {
        ("SAM as the start", "lab/sam-b"): None,
        ("SAM", "facebook/sam-vit-base"): "abc",
        ("CLIP", clip): "def",
    }
    card = create_model_card(folder, "lab/merged", stages)
    assert card.data.base_model == ["lab/sam-b", "facebook/sam-vit-base", clip]
    assert "SAM `facebook/sam-vit-base` at commit `abc`" in card.content
    assert "`miniature`" not in card.content and "does not work on photographs" not in card.content


def test_the_provenance_of_the_shipped_miniature_is_complete(folder, tmp_path):
    stages = provenance.read(miniature.checkpoint())
    recipes = [*(("miniature_paper_stage", number, 42) for number in (1, 2, 3)), ("miniature_stage", 2, 0)]
    for stage, (name, number, seed) in zip(stages, [*recipes, ("miniature_stage", 3, 0)], strict=True):
        recipe = yaml.safe_load((RECIPES / f"{name}{number}.yaml").read_text())
        for argument in ("dataloader_num_workers", "logging_steps", "save_steps", "report_to"):
            recipe.pop(argument)
        recipe["warmup_steps"] = recipe["warmup_steps"] * recipe["max_steps"]  # a fraction in the recipes
        assert {argument: stage["arguments"][argument] for argument in [*recipe, "seed"]} == recipe | {"seed": seed}
        assert stage["steps"] == recipe["max_steps"]
    stages, licenses = publish_provenance(miniature.checkpoint(), tmp_path)
    card = create_model_card(folder, "me/miniature", stages, licenses=licenses)
    assert card.data.license == "apache-2.0"
    assert "**Stage 3:** 400 steps, 13,864 images" in card.content
    assert "**Stage 3:** 1600 steps, 89,444 images" in card.content
    assert "does not work on photographs" in card.content
    assert "SAM `miniature`, license apache-2.0; CLIP `miniature`" in card.content


def test_absolute_paths_are_not_published(tmp_path):
    own = tmp_path / "home" / "my_sam"
    own.mkdir(parents=True)
    (own / "README.md").write_text("---\nlicense: mit\n---\n")
    stage = STAGES[0] | {"teachers": {"sam_teacher": str(own), "clip_teacher": miniature.clip_teacher()}}
    stage["arguments"] = stage["arguments"] | {"sam_data": [str(tmp_path / "sa1b")], "clip_data": ["photos/*.tar"]}
    (tmp_path / provenance.FILE_NAME).write_text(json.dumps({"stages": [stage]}))
    (tmp_path / "out").mkdir()
    stages, licenses = publish_provenance(tmp_path, tmp_path / "out")
    assert stages[0]["teachers"] == {"sam_teacher": "my_sam", "clip_teacher": "miniature"}
    assert licenses == {"my_sam": "mit", "miniature": "apache-2.0"}
    assert (stages[0]["arguments"]["sam_data"], stages[0]["arguments"]["clip_data"]) == (["sa1b"], ["photos/*.tar"])
    assert str(tmp_path) not in (tmp_path / "out" / provenance.FILE_NAME).read_text()


@pytest.mark.parametrize(
    ("clip_license", "license", "expected"),
    [("mit", None, "apache-2.0"), ("cc-by-nc-4.0", None, "other"), (None, None, "other"), (None, "mit", "mit")],
)
def test_the_default_license_depends_on_the_licenses_of_the_teachers(folder, clip_license, license, expected):
    licenses = {"facebook/sam-vit-base": "apache-2.0", "openai/clip-vit-base-patch16": clip_license}
    licenses = {name: value for name, value in licenses.items() if value}
    card = create_model_card(folder, "me/merged", STAGES, licenses=licenses, license=license)
    assert card.data.license == expected


def test_the_card_says_what_is_not_recorded(folder):
    text = create_model_card(folder, "me/merged").content
    assert "Not recorded: the checkpoint has no `provenance.json`" in text
    assert "Not evaluated" in text and "example.png" not in text


def test_the_card_of_an_unmerged_model_says_that_it_has_two_encoders_and_is_not_trained(tmp_path):
    teachers = miniature.sam_teacher(), miniature.clip_teacher()
    SamClipForImageSegmentation.from_teachers(*teachers, merged=False).save_pretrained(tmp_path)
    card = create_model_card(tmp_path, "me/pair")
    assert "two image encoders" in card.content and "nothing was\ntrained" in card.content
    assert "share one pass" not in card.content and "was trained with" not in card.content
    assert "distillation" not in card.data.tags


class TestTeachers:
    """The card names the models that `from_teachers` copied weights from."""

    @pytest.fixture
    def teachers(self, tmp_path) -> list[Path]:
        """Copies of the miniature's SAM, in a folder of the Hub's cache, and of its CLIP, in another folder."""
        sam = tmp_path / "models--lab--sam-tiny" / "snapshots" / COMMIT
        clip = tmp_path / "home" / "my-clip"
        for folder, source in ((sam, miniature.sam_teacher()), (clip, miniature.clip_teacher())):
            shutil.copytree(source, folder)
        return [sam, clip]

    def publish(self, model: SamClipForImageSegmentation, folder: Path) -> ModelCard:
        """The card as it is read from a file, of a configuration that was saved, loaded and saved again."""
        model.config.save_pretrained(folder)
        SamClipConfig.from_pretrained(folder).save_pretrained(folder / "again")
        stages, licenses = publish_provenance(folder, folder / "again")
        create_model_card(folder / "again", "me/pair", stages, licenses=licenses).save(folder / "README.md")
        return ModelCard.load(folder / "README.md")

    @pytest.mark.parametrize("merged", [False, True])
    def test_names_commits_and_licenses_are_in_the_configuration_and_the_card(self, teachers, tmp_path, merged):
        sam, clip = teachers
        (sam / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
        (clip / "README.md").write_text("---\nlicense: mit\n---\n")
        model = SamClipForImageSegmentation.from_teachers(sam, clip, merged=merged)
        assert model.config.teachers == {
            "sam": {"name": "lab/sam-tiny", "revision": COMMIT, "license": "apache-2.0"},
            "clip": {"name": "my-clip", "license": "mit"},
        }
        card = self.publish(model, tmp_path / "pair")
        assert card.data.base_model == ["lab/sam-tiny"] and card.data.base_model_relation == "merge"
        assert card.data.license == "apache-2.0"
        expected = f"SAM `lab/sam-tiny` at commit `{COMMIT}`, license apache-2.0; CLIP `my-clip`, license mit. Their"
        assert expected in card.content and ("first weights were copied" in card.content) == merged
        assert str(tmp_path) not in card.content + (tmp_path / "pair" / "again" / "config.json").read_text()

    @pytest.mark.parametrize(
        ("licenses", "expected"),
        [(("mit", "mit"), "mit"), (("mit", "other"), "other"), (("mit", None), "other"), (("mit", "[mit, "), "other")],
    )
    def test_the_default_license_depends_on_the_cards_of_the_teachers(self, teachers, tmp_path, licenses, expected):
        for folder, license in zip(teachers, licenses, strict=True):
            (folder / "README.md").write_text(
                "# No metadata" if license is None else f"---\nlicense: {license}\n---\n"
            )
        model = SamClipForImageSegmentation.from_teachers(*teachers, merged=False)
        card = self.publish(model, tmp_path / "pair")
        assert card.data.license == expected
        assert ("`my-clip`, license not recorded" in card.content) == (licenses[1] in (None, "[mit, "))

    def test_names_on_the_hub_have_their_commit_and_the_license_of_their_card(self, tmp_path, monkeypatch):
        for constant, value in (("HF_HUB_CACHE", str(tmp_path)), ("HF_HUB_OFFLINE", True)):
            monkeypatch.setattr(f"huggingface_hub.constants.{constant}", value)
        for name, license in (("sam", "mit"), ("clip", "gpl")):
            folder = tmp_path / f"models--lab--{name}" / "snapshots" / COMMIT
            shutil.copytree(Path(miniature.checkpoint()).with_name(name), folder)
            (folder / "README.md").write_text(f"---\nlicense: {license}\n---\n")
            (folder.parents[1] / "refs").mkdir()
            (folder.parents[1] / "refs" / "main").write_text(COMMIT)
        model = SamClipForImageSegmentation.from_teachers("lab/sam", "lab/clip", merged=False)
        assert model.config.teachers == {name: {"name": f"lab/{name}", "revision": COMMIT} for name in ("sam", "clip")}
        card = self.publish(model, tmp_path / "pair")
        assert card.data.base_model == ["lab/sam", "lab/clip"] and card.data.license == "other"
        assert f"CLIP `lab/clip` at commit `{COMMIT}`, license gpl." in card.content
        shutil.rmtree(tmp_path / "models--lab--clip")
        assert publish_provenance(tmp_path / "pair", tmp_path / "pair")[1] == {"lab/sam": "mit"}

    def test_the_miniature_is_named_as_such(self, tmp_path):
        teachers = miniature.sam_teacher(), miniature.clip_teacher()
        model = SamClipForImageSegmentation.from_teachers(*teachers, merged=False)
        assert model.config.teachers == {"sam": {"name": "miniature"}, "clip": {"name": "miniature"}}
        processor = SamClipProcessor.from_teachers(*teachers)
        identity = hash_configuration(model, processor)
        card = self.publish(model, tmp_path)
        model.config.teachers = None
        assert hash_configuration(model, processor) == identity
        assert card.data.base_model is None and card.data.license == "apache-2.0"
        assert "SAM `miniature`, license apache-2.0; CLIP `miniature`, license apache-2.0." in card.content
        assert "does not work on photographs" in card.content

    def test_models_that_were_not_loaded_are_not_recorded(self, sam, clip, tmp_path):
        assert SamClipModel.from_teachers(sam, clip).config.teachers is None
        loaded = SamModel.from_pretrained(miniature.sam_teacher())
        assert SamClipModel.from_teachers(loaded, clip).config.teachers == {"sam": {"name": "miniature"}}

    def test_the_teachers_of_the_provenance_are_named_once(self, folder, tmp_path):
        """The configuration adds the commit and the model at the start that the provenance does not have."""
        shutil.copy(folder / "model.safetensors", tmp_path)
        config = json.loads((folder / "config.json").read_text())
        clip = {"name": "openai/clip-vit-base-patch16", "revision": "def"}
        local = STAGES[0] | {"teachers": STAGES[0]["teachers"] | {"sam_teacher": "runs/my_sam"}}
        for sam, stages, expected in (
            (
                "facebook/sam-vit-base",
                STAGES,
                "SAM `facebook/sam-vit-base` at commit `abc`, license not recorded; CLIP",
            ),
            ("lab/sam", STAGES, "SAM as the start `lab/sam` at commit `0`, license not recorded."),
            ("my_sam", [local], "SAM `runs/my_sam` at commit `abc`"),
        ):
            config["teachers"] = {"sam": {"name": sam, "revision": "0"}, "clip": clip}
            (tmp_path / "config.json").write_text(json.dumps(config))
            card = create_model_card(tmp_path, "me/trained", stages)
            assert expected in card.content
            assert "CLIP `openai/clip-vit-base-patch16` at commit `def`" in card.content
            assert card.content.count("license not recorded") == (3 if sam == "lab/sam" else 2)


class TestResults:
    """Results are found by the weights of the published checkpoint."""

    @pytest.fixture(scope="class")
    @classmethod
    def weights(cls) -> str:
        return load_adapter(miniature.checkpoint()).weights

    def results(self, **weights: str | None) -> dict:
        entry = {"metrics": {"top1": 0.7}, "num_samples": 5}
        models = {
            name: entry if of_name is None else entry | {"weights": of_name} for name, of_name in weights.items()
        }
        return RESULTS | {"tasks": {"classification": {"protocol": {}, "models": models}}}

    def test_the_name_is_that_with_the_weights(self, weights):
        results = self.results(samclip="0a1b", renamed=weights, older=None)
        assert find_results(results, miniature.checkpoint()) == "renamed"
        assert find_results(results, miniature.checkpoint(), "renamed") == "renamed"

    def test_of_several_names_that_with_the_configuration_is_found(self, weights):
        results = self.results(classes=weights, segments=weights, bfloat16=weights)
        models = results["tasks"]["classification"]["models"]
        models["segments"] |= {"identity": load_adapter(miniature.checkpoint()).identity}
        assert find_results(results, miniature.checkpoint()) == "segments"

    def test_the_published_dtype_and_vocabulary_do_not_matter(self, weights, tmp_path):
        model = SamClipForImageSegmentation.from_pretrained(miniature.checkpoint())
        model.set_vocabulary(["a cat", "a dog"]).save_pretrained(tmp_path)
        SamClipProcessor.from_pretrained(miniature.checkpoint()).save_pretrained(tmp_path)
        assert find_results(self.results(stage3=weights), tmp_path) == "stage3"

    @pytest.mark.parametrize(
        ("models", "name", "message"),
        [
            (
                {"samclip": "0a1b"},
                None,
                r"no results of the weights of .*/samclip \([0-9a-f]{16}\), but of samclip \(0a1b\)",
            ),
            ({"samclip": "0a1b"}, "samclip", r"results of 'samclip' are of other weights \(0a1b\)"),
            ({"samclip": None}, None, r"but of samclip \(not recorded\)"),
            ({"samclip": None}, "samclip", "do not record the weights"),
            ({"a": "own", "b": "own"}, None, "Pass --results_name with one of: a, b"),
            ({"a": "own"}, "c", r"No results for 'c'\. Pass --results_name with one of: a"),
        ],
    )
    def test_results_of_other_weights_raise(self, weights, models, name, message):
        models = {key: weights if value == "own" else value for key, value in models.items()}
        with pytest.raises(PublishingError, match=message):
            find_results(self.results(**models), miniature.checkpoint(), name)

    def test_a_wrong_name_raises_before_the_checkpoint_is_loaded(self, tmp_path):
        with pytest.raises(PublishingError, match=r"No results for 'c'"):
            find_results(self.results(a="0a1b"), tmp_path / "nowhere", "c")

    def test_a_card_needs_results_of_one_model(self, folder):
        with pytest.raises(PublishingError, match="no results of 'stage2', but of stage3"):
            create_model_card(folder, "me/merged", results=RESULTS, results_name="stage2")
        with pytest.raises(PublishingError, match="need the name of the model"):
            create_model_card(folder, "me/merged", results=RESULTS)


def test_the_python_code_of_the_card_runs(folder, tmp_path, image, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image.resize((400, 300)).save("photo.jpg")
    code = create_model_card(folder, str(folder)).content.split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(code, names)
    assert names["outputs"].pred_masks is not None and names["outputs"].logits_per_image.shape == (1, 2)


def test_the_example_image_has_three_panels(folder, tmp_path, image):
    draw_example_image(folder, image, tmp_path / "example.png")
    assert Image.open(tmp_path / "example.png").size == (3 * 256, 256)


def test_the_example_image_of_a_large_input_is_reduced(folder, tmp_path, image):
    draw_example_image(folder, image.resize((4000, 2000)), tmp_path / "example.png")
    assert Image.open(tmp_path / "example.png").size == (3 * 1024, 512)
