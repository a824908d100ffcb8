"""SigLIP as the teacher of texts: its text tower reads texts of one length, and its logits have a bias."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    Siglip2Config,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
    SiglipTextConfig,
    pipeline,
)

from samclip_hf import (
    SamClipConfig,
    SamClipForImageSegmentation,
    SamClipImageProcessor,
    SamClipModel,
    SamClipProcessor,
    miniature,
)
from samclip_hf.distillation import ClipTeacher, TeacherStore
from samclip_hf.distillation.store import StoredEmbeds
from samclip_hf.distillation.streams import open_stream
from samclip_hf.evaluation.models import Siglip, load

from .conftest import randomise
from .distillation.tars import jpeg, write_tar

TRAINING = Path(__file__).parents[1] / "training"
TEXTS = ["a red solid shape", "a green dotted shape on a striped background"]


@pytest.fixture(scope="module")
def siglip_folder(tmp_path_factory) -> Path:
    """A tiny SigLIP whose configuration, like SigLIP 2's, does not know what its tokenizer pads with."""
    tokenizer = AutoTokenizer.from_pretrained(miniature.clip_teacher())
    tower = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = SiglipConfig(
        text_config=tower
        | {
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 24,
            "projection_size": 24,
            "pad_token_id": tokenizer.pad_token_id + 1,
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
        vision_config=tower | {"image_size": 32, "patch_size": 8},
    )
    model = SiglipModel(config)
    randomise(model)
    model.logit_bias.data.fill_(-3)
    folder = tmp_path_factory.mktemp("siglip")
    model.save_pretrained(folder)
    image_processor = SiglipImageProcessor(size={"height": 32, "width": 32})
    SiglipProcessor(image_processor, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def siglip(siglip_folder) -> SiglipModel:
    return SiglipModel.from_pretrained(siglip_folder).eval()


@pytest.fixture
def student(sam, siglip_folder) -> SamClipModel:
    model = SamClipModel.from_teachers(sam, siglip_folder)
    randomise(model.clip_head)
    return model.eval()


@pytest.fixture
def processor(siglip_folder) -> SamClipProcessor:
    image_processor = SamClipImageProcessor(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64})
    return SamClipProcessor(image_processor, AutoTokenizer.from_pretrained(siglip_folder))


def script(name: str):
    """The main function of one of `training/`."""
    spec = importlib.util.spec_from_file_location(name, TRAINING / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def as_siglip_reads(folder: Path) -> dict[str, torch.Tensor]:
    """The texts, padded as transformers says that they must be."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return {"input_ids": tokenizer(TEXTS, padding="max_length", max_length=24, return_tensors="pt")["input_ids"]}


def test_texts_are_embedded_as_by_siglip_however_they_are_padded(student, siglip, siglip_folder, processor):
    with torch.inference_mode():
        expected = siglip.get_text_features(**as_siglip_reads(siglip_folder)).pooler_output
        together = student.get_text_features(**processor(text=TEXTS)).pooler_output
        alone = torch.cat([student.get_text_features(**processor(text=text)).pooler_output for text in TEXTS])
        full = student.get_text_features(**processor(text=TEXTS, padding="max_length", max_length=24)).pooler_output
    assert expected.std() > 0.01
    for features in (together, alone, full):
        torch.testing.assert_close(features, expected)


def test_logits_and_loss_are_siglips_for_the_same_embeddings(student, siglip, siglip_folder, processor):
    images = [Image.fromarray(np.full((40, 40, 3), shade, dtype=np.uint8)) for shade in (50, 200)]
    with torch.inference_mode():
        inputs = processor(images, text=TEXTS)
        outputs = student(**inputs, return_loss=True)
        features = student.get_image_features(inputs["pixel_values"], inputs["reshaped_input_sizes"])
        siglip.vision_model.forward = lambda **_: features  # SigLIP with our eyes
        expected = siglip(**as_siglip_reads(siglip_folder), pixel_values=torch.zeros(2, 3, 32, 32), return_loss=True)
    for name in ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds", "loss"):
        torch.testing.assert_close(outputs[name], expected[name])


def test_it_is_saved_and_loaded_whole(student, processor, tmp_path):
    student.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, info = SamClipModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded.config.text_config) is SiglipTextConfig and loaded.config.has_siglip_text
    assert loaded.text_projection is None and loaded.logit_bias.item() == -3
    with torch.inference_mode():
        inputs = processor(text=TEXTS)
        first, second = (model.get_text_features(**inputs).pooler_output for model in (student, loaded.eval()))
    assert torch.equal(first, second)


def test_vocabularies_and_stock_pipelines_read_texts_as_siglip_does(
    student, processor, siglip, siglip_folder, tmp_path
):
    student.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with torch.inference_mode():
        expected = F.normalize(siglip.get_text_features(**as_siglip_reads(siglip_folder)).pooler_output, dim=-1)
    segmenter = SamClipForImageSegmentation.from_pretrained(tmp_path).set_vocabulary(TEXTS, templates=["{}"])
    torch.testing.assert_close(segmenter.class_embeds, expected)
    with pytest.raises(ValueError, match="The text tower reads 24 tokens at most"):
        segmenter.set_vocabulary([*TEXTS, "a red shape " * 12], templates=["{}"])

    image = Image.fromarray(np.arange(48 * 48 * 3, dtype=np.uint8).reshape(48, 48, 3))
    classify = pipeline("zero-shot-image-classification", model=str(tmp_path))
    scores = {s["label"]: s["score"] for s in classify(image, candidate_labels=TEXTS, hypothesis_template="{}")}
    with torch.inference_mode():
        cosines = (student(**processor(image, text=TEXTS)).image_embeds @ expected.T)[0]
        probabilities = (cosines * student.logit_scale.exp()).softmax(dim=-1)
    assert [scores[text] for text in TEXTS] == pytest.approx(probabilities.tolist(), abs=1e-5)


def test_the_miniature_is_trained_under_it(siglip_folder, tmp_path):
    train = script("train")
    common = ["--clip_teacher", str(siglip_folder), "--clip_batch_size", "4", "--use_cpu", "true"]
    common += ["--save_strategy", "no", "--max_steps", "2", "--dataloader_num_workers", "0", "--clip_sizes", "64"]
    train([str(TRAINING / "configs/miniature_stage1.yaml"), "--output_dir", str(tmp_path / "stage1"), *common])
    more = ["--model", str(tmp_path / "stage1"), "--sam_batch_size", "1", "--masks_per_image", "2"]
    train([str(TRAINING / "configs/miniature_stage2.yaml"), "--output_dir", str(tmp_path / "stage2"), *common, *more])
    before, after = (load_file(tmp_path / stage / "model.safetensors") for stage in ("stage1", "stage2"))
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"clip_head", "vision_encoder", "mask_decoder"}
    student = SamClipModel.from_pretrained(tmp_path / "stage2")
    assert student.config.text_config.pad_token_id == AutoTokenizer.from_pretrained(siglip_folder).pad_token_id


def test_its_embeddings_are_stored_and_known_again(siglip_folder, student, sam, clip, tmp_path):
    write_tar(tmp_path / "photos-0.tar", {f"{n}.jpg": jpeg(n) for n in range(3)})
    data = str(tmp_path / "photos-0.tar")
    arguments = ["--clip_teacher", str(siglip_folder), "--clip_data", data, "--output_dir", str(tmp_path / "store")]
    script("cache_teacher")([*arguments, "--use_cpu", "--num_workers", "0", "--min_crop", "0.5"])
    store, streams = TeacherStore(tmp_path / "store"), [open_stream(data)]
    keys, embeds = StoredEmbeds(store.folder, 0).read(0)
    assert len(keys) == 3 and embeds.shape == (3, 1, 24)
    store.check(student, streams, 0.5, str(siglip_folder))
    with pytest.raises(ValueError, match="text tower is not this CLIP teacher's"):
        store.check(SamClipModel.from_teachers(sam, clip), streams, 0.5, str(siglip_folder))


def test_another_text_space_is_refused_by_name(student, siglip_folder, sam, clip):
    ClipTeacher(str(siglip_folder)).check(student)
    with pytest.raises(ValueError, match="the student was built from another CLIP"):
        ClipTeacher(str(siglip_folder)).check(SamClipModel.from_teachers(sam, clip))
    torch.nn.init.normal_(student.text_model.head.weight)
    with pytest.raises(ValueError, match="text tower is not this CLIP teacher's"):
        ClipTeacher(str(siglip_folder)).check(student)


def test_naflex_checkpoints_are_refused_with_the_alternative(sam, tmp_path):
    Siglip2Config().save_pretrained(tmp_path)
    with pytest.raises(
        TypeError, match=r"'siglip2'\. Of SigLIP 2, name a checkpoint of a fixed size rather than NaFlex"
    ):
        SamClipModel.from_teachers(sam, tmp_path)


def test_a_teacher_without_its_tokenizer_is_refused(siglip, sam, tmp_path):
    siglip.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="There is no tokenizer beside the model"):
        SamClipModel.from_teachers(sam, tmp_path)


def test_it_is_judged_as_a_parent(siglip, siglip_folder):
    parent = load(str(siglip_folder))
    assert type(parent) is Siglip
    with torch.inference_mode():
        expected = F.normalize(siglip.get_text_features(**as_siglip_reads(siglip_folder)).pooler_output, dim=-1)
        torch.testing.assert_close(parent.embed_texts(TEXTS), expected)
        pixel_values = parent._squares([Image.new("RGB", (32, 32), "red")], 32)
        tokens = siglip.vision_model(pixel_values).last_hidden_state
        # Attention that sees one patch alone gives that patch whole.
        alone = torch.stack([siglip.vision_model.head(tokens[:, [place]]) for place in range(16)], dim=-1)
        torch.testing.assert_close(parent._dense(pixel_values).flatten(2), alone)
        image = Image.new("RGB", (50, 40), "red")
        assert parent.embed_patches(image, 64).shape == (24, 8, 10)
        assert parent.embed_images([image]).shape == (1, 24)
        assert parent.pooled_features([image], 64)["image encoder"].shape == (1, 24)


def test_configurations_know_whose_text_tower_it_is():
    assert not SamClipConfig().has_siglip_text
    config = SamClipConfig(text_config={"model_type": "siglip_text_model"})
    assert config.has_siglip_text and SamClipConfig.from_dict(config.to_dict()).has_siglip_text
