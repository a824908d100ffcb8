"""SigLIP as the CLIP teacher: its text tower reads texts of a fixed length, and its logits have a bias."""

import importlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    GemmaTokenizer,
    Siglip2Config,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipProcessor,
    SiglipTextConfig,
    SiglipTokenizer,
    pipeline,
)

from samclip_hf import (
    SamClipConfig,
    SamClipForImageSegmentation,
    SamClipForObjectDetection,
    SamClipImageProcessor,
    SamClipModel,
    SamClipProcessor,
    SamClipVisionModel,
    miniature,
    modeling_samclip,
)
from samclip_hf.datasets.streams import open_stream
from samclip_hf.distillation import ClipTeacher, EmbeddingCache
from samclip_hf.distillation.embedding_cache import CachedEmbeddings
from samclip_hf.evaluation import SiglipAdapter, UnmergedAdapter, load_adapter
from samclip_hf.miniature.scenes import render
from samclip_hf.segmentation_samclip import canonicalize_text

from .conftest import randomize
from .datasets.tars import write_tar
from .test_clip_tower_samclip import tower_pixels

TRAINING = Path(__file__).parents[1] / "training"
FILTERS = {"SigLIP": 3, "SigLIP 2": 2}  # bicubic and bilinear, as in their checkpoints
TEXTS = ["a red solid shape", "a green dotted shape on a striped background"]


def tiny_tokenizer(generation: str, folder: Path) -> SiglipTokenizer | GemmaTokenizer:
    """A tokenizer with the class and the settings of the checkpoints on the Hub. SigLIP's is a sentencepiece model and
    pads with the end token; SigLIP 2's is Gemma's, which returns no mask."""
    if generation == "SigLIP":
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS),
            model_prefix=str(folder / "spiece"),
            vocab_size=60,
            hard_vocab_limit=False,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
        return SiglipTokenizer(str(folder / "spiece.model"))
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    trained.train_from_iterator(TEXTS, tokenizers.trainers.BpeTrainer(vocab_size=60, special_tokens=special))
    model = json.loads(trained.to_str())["model"]
    return GemmaTokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        add_bos_token=False,
        add_eos_token=True,
        padding_side="right",
        model_input_names=["input_ids"],
    )


@pytest.fixture(scope="module", params=["SigLIP", "SigLIP 2"])
def siglip_folder(request, tmp_path_factory) -> Path:
    """A tiny SigLIP whose configuration has another `pad_token_id` than its tokenizer, as in SigLIP 2."""
    folder = tmp_path_factory.mktemp("siglip")
    tokenizer = tiny_tokenizer(request.param, folder)
    tower = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = SiglipConfig(
        text_config=tower
        | {
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 64,
            "projection_size": 24,
            "pad_token_id": 5,
            "bos_token_id": 3,
            "eos_token_id": 4,
        },
        vision_config=tower | {"image_size": 32, "patch_size": 8},
    )
    model = SiglipModel(config)
    randomize(model)
    model.logit_bias.data.fill_(-3)
    model.save_pretrained(folder)
    image_processor = SiglipImageProcessor(
        size={"height": 32, "width": 32}, resample=FILTERS[request.param], image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    SiglipProcessor(image_processor, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def siglip(siglip_folder) -> SiglipModel:
    return SiglipModel.from_pretrained(siglip_folder).eval()


@pytest.fixture
def student(sam, siglip_folder) -> SamClipModel:
    model = SamClipModel.from_teachers(sam, siglip_folder)
    randomize(model.clip_head)
    return model.eval()


@pytest.fixture
def processor(siglip_folder) -> SamClipProcessor:
    image_processor = SamClipImageProcessor(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64})
    return SamClipProcessor(image_processor, AutoTokenizer.from_pretrained(siglip_folder))


def png(pixels: np.ndarray) -> bytes:
    """An image as PNG, which is lossless."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def command(name: str):
    """The function that runs a command."""
    return importlib.import_module(f"samclip_cli.{name}").run


def siglip_inputs(folder: Path) -> dict[str, torch.Tensor]:
    """The texts with the padding that transformers documents for SigLIP."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return {"input_ids": tokenizer(TEXTS, padding="max_length", max_length=64, return_tensors="pt")["input_ids"]}


def test_text_features_match_siglip_with_any_padding(student, siglip, siglip_folder, processor):
    left = {"padding": "max_length", "max_length": 50, "padding_side": "left"}
    with torch.inference_mode():
        expected = siglip.get_text_features(**siglip_inputs(siglip_folder)).pooler_output
        together = student.get_text_features(**processor(text=TEXTS)).pooler_output
        alone = torch.cat([student.get_text_features(**processor(text=text)).pooler_output for text in TEXTS])
        full = student.get_text_features(**processor(text=TEXTS, padding="max_length", max_length=64)).pooler_output
        left_out = student.get_text_features(**processor(text=TEXTS, **left)).pooler_output
    assert expected.std() > 0.01 and not torch.allclose(expected[0], expected[1], atol=0.01)
    for features in (together, alone, full, left_out):
        torch.testing.assert_close(features, expected)


def test_logits_and_loss_match_siglip(student, siglip, siglip_folder, processor):
    images = [Image.fromarray(np.full((40, 40, 3), shade, dtype=np.uint8)) for shade in (50, 200)]
    with torch.inference_mode():
        inputs = processor(images, text=TEXTS)
        outputs = student(**inputs, return_loss=True)
        features = student.get_image_features(inputs["pixel_values"], inputs["reshaped_input_sizes"])
        siglip.vision_model.forward = lambda **_: features  # SigLIP with SAM-CLIP's image features
        expected = siglip(**siglip_inputs(siglip_folder), pixel_values=torch.zeros(2, 3, 32, 32), return_loss=True)
    for name in ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds", "loss"):
        torch.testing.assert_close(outputs[name], expected[name])
    with pytest.raises(ValueError, match="return_loss needs one text per image"):
        student(**processor(images, text=TEXTS[:1]), return_loss=True)


def test_saves_and_loads(student, processor, tmp_path):
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


def test_vocabularies_and_pipelines_embed_texts_like_siglip(student, processor, siglip, siglip_folder, tmp_path):
    student.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with torch.inference_mode():
        expected = F.normalize(siglip.get_text_features(**siglip_inputs(siglip_folder)).pooler_output, dim=-1)
    segmenter = SamClipForImageSegmentation.from_pretrained(tmp_path).set_vocabulary(TEXTS, templates=["{}"])
    torch.testing.assert_close(segmenter.class_embeds, expected)
    with pytest.raises(ValueError, match="The text tower accepts at most 64 tokens, but this text has "):
        segmenter.set_vocabulary([*TEXTS, "a red shape " * 64], templates=["{}"])

    image = Image.fromarray(np.arange(48 * 48 * 3, dtype=np.uint8).reshape(48, 48, 3))
    classify = pipeline("zero-shot-image-classification", model=str(tmp_path))
    scores = {s["label"]: s["score"] for s in classify(image, candidate_labels=TEXTS, hypothesis_template="{}")}
    with torch.inference_mode():
        cosines = (student(**processor(image, text=TEXTS)).image_embeds @ expected.T)[0]
        probabilities = (cosines * student.logit_scale.exp()).softmax(dim=-1)
    assert [scores[text] for text in TEXTS] == pytest.approx(probabilities.tolist(), abs=1e-5)


def test_texts_are_canonicalized_as_by_siglips_authors(student, processor, tmp_path):
    """Expected texts are those of big_vision's `get_class_names` and `get_prompt_templates`."""
    for text, keep, expected in (
        ("A photo of the {}.", "{}", "a photo of the {}"),
        ("itap of my {}.", "{}", "itap of my {}"),
        ("{ } {} it's {a}", "{}", "{} its a"),
        ("kite (bird of prey)", ",", "kite bird of prey"),
        ("Geoffroy's spider-monkey", ",", "geoffroys spidermonkey"),
        ("traffic_light,  Street\tSign! ", ",", "traffic light, street sign"),
    ):
        assert canonicalize_text(text, keep) == expected
    student.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    segmenter = SamClipForImageSegmentation.from_pretrained(tmp_path)
    plain = segmenter.embed_vocabulary(["red solid shape"], ["a green dotted shape"], ["a {}"])
    other = segmenter.embed_vocabulary(["Red, solid_shape!".replace(",", "")], ["A green 'dotted' shape."], ["A {}."])
    assert torch.equal(plain.class_embeds, other.class_embeds)
    assert other.id2label[1] == "Red solid_shape!"


def test_texts_are_read_in_lower_case(student, processor, siglip_folder, tmp_path):
    """In processors, and in pipelines, which load the tokenizer alone."""
    upper = [text.upper() for text in TEXTS]
    expected = AutoTokenizer.from_pretrained(siglip_folder)(TEXTS, padding=True)["input_ids"]
    assert processor(text=upper)["input_ids"].tolist() == expected
    processor.save_pretrained(tmp_path)
    student.config.save_pretrained(tmp_path)
    for tokenizer in (AutoTokenizer.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path).tokenizer):
        for padding_side in ("left", "right"):
            tokenizer.padding_side = processor.tokenizer.padding_side = padding_side
            assert tokenizer(upper, padding=True).data == processor.tokenizer(TEXTS, padding=True).data


def test_object_detection_recognizes_names_without_a_mask(siglip_folder, processor, tmp_path):
    student = SamClipModel.from_teachers(miniature.sam_teacher(), siglip_folder)  # masks that are not empty
    randomize(student.clip_head)
    student.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    names = ["red", "a green dotted"]
    SamClipForImageSegmentation.from_pretrained(tmp_path).set_vocabulary(names).save_pretrained(tmp_path)
    detector = SamClipForObjectDetection.from_pretrained(tmp_path).eval()
    inputs = processor([Image.fromarray(render(seed=0, index=n).image) for n in range(2)], text=names)
    inputs.pop("attention_mask", None)  # SigLIP 2 has none
    assert (inputs["input_ids"][0, -1] == processor.tokenizer.pad_token_id).all()
    with torch.inference_mode():
        outputs = detector(**inputs)
    expected = outputs.segment_logits.softmax(dim=-1)
    for number in range(2):
        is_segment = outputs.segment_scores[number] > 0
        assert is_segment.any()
        own = expected[number, is_segment, number]
        torch.testing.assert_close(outputs.object_scores[number, is_segment], own)


@pytest.mark.parametrize("siglip_folder", ["SigLIP 2"], indirect=True)  # seconds each
def test_published_folder_embeds_texts_without_the_package(student, processor, tmp_path):
    student.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for source in Path(modeling_samclip.__file__).parent.glob("*_samclip.py"):
        shutil.copy(source, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_samclip.SamClipConfig",
        "AutoModel": "modeling_samclip.SamClipModel",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    code = """
import sys
sys.modules["samclip_hf"] = None  # not installed
import torch
from transformers import AutoModel, AutoTokenizer
folder, texts = sys.argv[1], sys.argv[2:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
inputs = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)(texts, padding=True, return_tensors="pt")
with torch.inference_mode():
    torch.save(model.get_text_features(**inputs).pooler_output, folder + "/features")
"""
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    command = [sys.executable, "-c", code, str(tmp_path), *TEXTS]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    with torch.inference_mode():
        expected = student.get_text_features(**processor(text=TEXTS)).pooler_output
    torch.testing.assert_close(torch.load(tmp_path / "features"), expected)


def test_vision_tower_and_model_without_text_tower_load(student, processor, tmp_path):
    student.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    _, info = SamClipVisionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    segmenter = SamClipForImageSegmentation.from_pretrained(tmp_path).set_vocabulary(["red", "green"])
    segmenter.drop_text_tower().save_pretrained(tmp_path / "dropped")
    loaded, info = SamClipForImageSegmentation.from_pretrained(tmp_path / "dropped", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.text_model is None and loaded.logit_bias.item() == -3
    with pytest.raises(ValueError, match="no text tower"):
        loaded.get_text_features(**processor(text=TEXTS))


@pytest.mark.parametrize("siglip_folder", ["SigLIP 2"], indirect=True)  # seconds each
def test_miniature_trains_with_siglip(siglip_folder, tmp_path):
    train = command("train")
    common = ["--clip_teacher", str(siglip_folder), "--clip_batch_size", "4", "--use_cpu", "true"]
    common += [
        "--save_strategy",
        "no",
        "--max_steps",
        "2",
        "--dataloader_num_workers",
        "0",
        "--clip_resolutions",
        "64",
    ]
    recipes = TRAINING / "configs"
    train([str(recipes / "miniature_paper_stage1.yaml"), "--output_dir", str(tmp_path / "stage1"), *common])
    more = ["--model", str(tmp_path / "stage1"), "--sam_batch_size", "1", "--masks_per_image", "2"]
    train([str(recipes / "miniature_paper_stage2.yaml"), "--output_dir", str(tmp_path / "stage2"), *common, *more])
    before, after = (load_file(tmp_path / stage / "model.safetensors") for stage in ("stage1", "stage2"))
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"clip_head", "vision_encoder", "mask_decoder"}
    student = SamClipModel.from_pretrained(tmp_path / "stage2")
    assert student.config.text_config.pad_token_id == AutoTokenizer.from_pretrained(siglip_folder).pad_token_id


def test_embeddings_are_cached(siglip, siglip_folder, student, sam, clip, tmp_path):
    # Of squares, crops of everything are the images themselves.
    images = [np.random.default_rng(n).integers(0, 256, (90, 90, 3), dtype=np.uint8) for n in range(3)]
    write_tar(tmp_path / "photos-0.tar", {f"{n}.png": png(image) for n, image in enumerate(images)})
    data = str(tmp_path / "photos-0.tar")
    arguments = ["--clip_teacher", str(siglip_folder), "--clip_data", data, "--output_dir", str(tmp_path / "store")]
    command("embed")([*arguments, "--use_cpu", "--num_workers", "0", "--min_crop_scale", "1"])
    store, streams = EmbeddingCache(tmp_path / "store"), [open_stream(data)]
    keys, embeds = CachedEmbeddings(store.folder, 0).read(0)
    assert len(keys) == 3 and embeds.shape == (3, 1, 24)
    for image, (own,) in zip(images, embeds, strict=True):
        either = [Image.fromarray(image), Image.fromarray(image[:, ::-1])]  # a half of the crops is flipped
        pixel_values = SiglipImageProcessorPil.from_pretrained(siglip_folder)(either, return_tensors="pt")
        with torch.inference_mode():
            expected = F.normalize(siglip.get_image_features(**pixel_values).pooler_output, dim=-1)
        assert (expected - torch.from_numpy(own.copy())).abs().amax(dim=-1).min() < 1e-3
    store.check(student, streams, 1, str(siglip_folder))
    with pytest.raises(ValueError, match="text tower is not the text tower of this CLIP teacher"):
        store.check(SamClipModel.from_teachers(sam, clip), streams, 1, str(siglip_folder))


def test_another_text_space_raises(student, siglip_folder, sam, clip, tmp_path):
    with pytest.raises(
        SystemExit, match=r"Training did not start\. The student's text embedding space has 64 dimensions"
    ):
        arguments = ["--clip_teacher", str(siglip_folder), "--model", str(miniature.checkpoint()), "--use_cpu", "true"]
        recipe = str(TRAINING / "configs/miniature_stage2.yaml")
        command("train")([recipe, *arguments, "--output_dir", str(tmp_path)])
    ClipTeacher(str(siglip_folder)).check(student)
    with pytest.raises(ValueError, match="Set clip_teacher to the CLIP that the student was built from"):
        ClipTeacher(str(siglip_folder)).check(SamClipModel.from_teachers(sam, clip))
    torch.nn.init.normal_(student.text_model.head.weight)
    with pytest.raises(ValueError, match="text tower is not the text tower of this CLIP teacher"):
        ClipTeacher(str(siglip_folder)).check(student)


def test_naflex_checkpoints_raise(sam, tmp_path):
    Siglip2Config().save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"'siglip2'\. Use a SigLIP 2 checkpoint with a fixed image size, not NaFlex"):
        SamClipModel.from_teachers(sam, tmp_path)


def test_teacher_without_tokenizer_raises(siglip, sam, tmp_path):
    siglip.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="There is no tokenizer in"):
        SamClipModel.from_teachers(sam, tmp_path)


def test_tokenizer_without_its_package_raises(siglip, siglip_folder, sam, monkeypatch):
    def stop(_):
        raise ImportError("SiglipTokenizer requires the SentencePiece library")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", stop)
    with pytest.raises(
        ValueError, match=r"needs another package\. SiglipTokenizer requires the SentencePiece library"
    ):
        SamClipModel.from_teachers(sam, siglip_folder)
    siglip.name_or_path, siglip.config.text_config.pad_token_id = "", None
    with pytest.raises(ValueError, match="no padding token"):
        SamClipModel.from_teachers(sam, siglip)


def test_evaluates_siglip(siglip, siglip_folder):
    parent = load_adapter(str(siglip_folder))
    assert type(parent) is SiglipAdapter
    with torch.inference_mode():
        expected = F.normalize(siglip.get_text_features(**siglip_inputs(siglip_folder)).pooler_output, dim=-1)
        torch.testing.assert_close(parent.embed_texts(TEXTS), expected)
        pixel_values = parent._preprocess_squares([Image.new("RGB", (32, 32), "red")], 32)
        tokens = siglip.vision_model(pixel_values).last_hidden_state
        # Attention that sees one patch alone gives that patch whole.
        alone = torch.stack([siglip.vision_model.head(tokens[:, [place]]) for place in range(16)], dim=-1)
        torch.testing.assert_close(parent._dense_embeds(pixel_values).flatten(2), alone)
        image = Image.new("RGB", (50, 40), "red")
        assert parent.embed_patches(image, 64).shape == (24, 8, 10)
        assert parent.embed_images([image]).shape == (1, 24)
        assert parent.pooled_features([image], 64)["image encoder"].shape == (1, 24)


def test_a_pair_of_sam_and_siglip_is_evaluated_as_an_unmerged_model(siglip_folder):
    pair, parent = load_adapter(miniature.sam_teacher(), clip=str(siglip_folder)), load_adapter(str(siglip_folder))
    assert type(pair) is UnmergedAdapter
    ramp = np.arange(40, dtype=np.uint8) * 6  # the same for every filter of resizing
    image = Image.fromarray(
        np.stack([ramp[None].repeat(40, 0), ramp[:, None].repeat(40, 1), ramp[None, ::-1].repeat(40, 0)], 2)
    )
    names = parent.embed_names(["red", "green"], ["a {} shape"])
    torch.testing.assert_close(pair.embed_names(["red", "green"], ["a {} shape"]), names)
    masks = np.zeros((2, 40, 40), dtype=bool)
    masks[0, 5:20, 5:30], masks[1] = True, True
    similarities = pair.compare_crops(image, masks, names)
    with torch.inference_mode():
        whole = parent.embed_images([image]) @ names.T
    torch.testing.assert_close(similarities[1:], whole, atol=5e-3, rtol=0)
    assert pair.embed_patches(image, 64).shape == (24, 8, 8)


def test_cost_includes_siglip(siglip, siglip_folder, tmp_path, capsys):
    recipe = (TRAINING / "configs/miniature_paper_stage1.yaml").read_text()
    recipe = recipe.replace("clip_teacher: miniature", f"clip_teacher: {siglip_folder}")
    (tmp_path / "online.yaml").write_text(recipe.replace("clip_resolutions: [64, 96]", "clip_resolutions: [64]"))
    (tmp_path / "stored.yaml").write_text((tmp_path / "online.yaml").read_text() + "clip_embedding_cache: store\n")
    command("cost")([str(tmp_path / "online.yaml"), str(tmp_path / "stored.yaml")])
    online, stored = (float(line.split("64 px: ")[1].split()[0]) for line in capsys.readouterr().out.splitlines()[-2:])
    with FlopCounterMode(display=False) as counter:
        siglip.get_image_features(pixel_values=torch.zeros(1, 3, 32, 32))
    assert online - stored == pytest.approx(counter.get_total_flops() / 1e9, abs=2e-3)  # three digits are printed


def test_configuration_has_the_kind_of_text_tower():
    assert not SamClipConfig().has_siglip_text
    config = SamClipConfig(text_config={"model_type": "siglip_text_model"})
    assert config.has_siglip_text and SamClipConfig.from_dict(config.to_dict()).has_siglip_text
    with pytest.raises(ValueError, match="'siglip2_text_model', but must be one of clip_text_model, sig"):
        SamClipConfig(text_config={"model_type": "siglip2_text_model"})


@torch.no_grad()
def test_an_unmerged_model_gives_siglips_embeddings(siglip, siglip_folder):
    model = SamClipModel.from_teachers(miniature.sam_teacher(), siglip_folder, merged=False).eval()
    pixel_values = torch.rand(2, 3, 64, 64)
    embeds = model.get_image_features(pixel_values).pooler_output
    pixels = tower_pixels(model, pixel_values, clip_std=0.5)
    expected = siglip.get_image_features(pixels, interpolate_pos_encoding=True).pooler_output
    assert torch.allclose(embeds, expected, atol=1e-5)
    tokens = model.get_vision_embeds(pixel_values).patch_tokens
    grid = tokens.shape[1]
    segments = torch.ones(2, 2, grid, grid, dtype=torch.bool)
    segments[:, 1, 0] = False
    features = model.clip_head.pool_segments(tokens, segments)
    assert torch.allclose(features[:, 0], expected, atol=1e-5)  # all patches are the whole image
    nothing = torch.zeros_like(segments)
    assert model.clip_head.pool_segments(tokens, nothing).shape == features.shape
    model.config.segment_attention = "class_token"
    assert torch.allclose(model.clip_head.pool_segments(tokens, segments)[:, 0], expected, atol=1e-5)
    hidden = siglip.vision_model.embeddings(pixels, interpolate_pos_encoding=True)[:, grid:]
    hidden = siglip.vision_model.encoder(inputs_embeds=hidden).last_hidden_state
    assert torch.allclose(
        features[:, 1], siglip.vision_model.head(siglip.vision_model.post_layernorm(hidden)), atol=1e-5
    )


@torch.no_grad()
def test_independent_scores_are_siglips_probabilities(siglip, siglip_folder):
    folders = miniature.sam_teacher(), siglip_folder
    model = SamClipForImageSegmentation.from_teachers(*folders, merged=False).eval()
    tokenizer = SamClipProcessor.from_teachers(*folders).tokenizer
    pixel_values = torch.rand(1, 3, 64, 64)
    vocabulary = model.embed_vocabulary(["red shape", "green shape"], templates="a {}", tokenizer=tokenizer)
    everything = torch.ones(1, 128, 128, dtype=torch.bool)
    scores = model.classify_masks([everything], pixel_values, vocabulary=vocabulary, multi_label=True).scores
    inputs = tokenizer(["a red shape", "a green shape"], padding="max_length", max_length=64)
    expected = siglip(
        pixel_values=tower_pixels(model, pixel_values, clip_std=0.5),
        input_ids=torch.tensor(inputs["input_ids"]),
        interpolate_pos_encoding=True,
    )
    assert torch.allclose(scores[0], expected.logits_per_image.sigmoid(), atol=1e-5)
