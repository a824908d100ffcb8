"""
Unmerged models of tiny SAMs, CLIPs and SigLIPs that have the files and configuration keys of published checkpoints.

The published weights are not downloaded. Each layout has the patch size, the grid of patches, the class token, the
activation, the tokenizer, the image processor and the configuration keys of its checkpoint, but small widths, few
layers, a small vocabulary and random weights. Sources:

- SAM: `SamConfig` and `convert_sam_to_hf.py` of transformers 4.29, which wrote the published `config.json` files, with
  keys that later versions do not use (`intermediate_size`, `projection_dim`). A SAM of 1024 px is reduced to 256 px: a
  grid of 16 patches, which the windows of 14 do not divide, like the grid of 64.
- OpenAI's CLIPs: `config.json` of clip-vit-base-patch32, with all keys of transformers 4.16. `eos_token_id` is 2,
  although the tokenizer's end token has the highest id, so transformers takes the position of the highest id. The
  image processors have integers as sizes. On 2026-11-27, public logs show that the main branch of
  openai/clip-vit-base-patch32 has no `model.safetensors`, only `pytorch_model.bin`. With a connection, transformers
  then loads the safetensors file of the Hub's conversion bot.
- LAION's CLIP: its activation is `gelu`, because OpenCLIP's ViT-L-14 has no QuickGELU.
- SigLIP: `configuration_siglip.py` and `tokenization_siglip.py`: a sentencepiece model that pads with the end token,
  and up to 64 tokens, or 16 for so400m-patch14-224. 384 px are not a multiple of the patch size 14.
- SigLIP 2 with a fixed size: model type "siglip" with Gemma's tokenizer, which returns no mask; trained on 64 tokens
  in lower case (https://github.com/huggingface/transformers/pull/43101).

Keys of tokenizers and image processors that are not in these sources are written from memory.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools.coco import COCO
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from transformers import (
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    SamConfig,
    SamModel,
    SamProcessor,
    SiglipConfig,
    SiglipModel,
    pipeline,
)

from samclip_cli import main
from samclip_hf import SamClipForImageSegmentation, SamClipModel, SamClipProcessor, SamClipVisionModel
from samclip_hf.publishing import build_repository, verify

from .conftest import assert_same, randomize
from .test_clip_tower_samclip import tower_pixels
from .test_siglip import TEXTS, tiny_tokenizer

LABELS, TEMPLATE = ["red", "green", "dotted"], "a {}"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

# Keys of every part of a config.json that transformers 4.16 to 4.29 wrote.
OLD_KEYS = {
    "_name_or_path": "",
    "add_cross_attention": False,
    "architectures": None,
    "bad_words_ids": None,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "decoder_start_token_id": None,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "finetuning_task": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "is_decoder": False,
    "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "length_penalty": 1.0,
    "max_length": 20,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "prefix": None,
    "problem_type": None,
    "pruned_heads": {},
    "remove_invalid_values": False,
    "repetition_penalty": 1.0,
    "return_dict": True,
    "return_dict_in_generate": False,
    "sep_token_id": None,
    "task_specific_params": None,
    "temperature": 1.0,
    "tie_encoder_decoder": False,
    "tie_word_embeddings": True,
    "tokenizer_class": None,
    "top_k": 50,
    "top_p": 1.0,
    "torch_dtype": None,
    "torchscript": False,
    "transformers_version": "4.16.0.dev0",
    "use_bfloat16": False,
}


@dataclass
class Layout:
    """A published CLIP or SigLIP, and the SAM that it is combined with."""

    name: str
    sam: str
    image_size: int
    patch_size: int
    text_length: int = 77

    @property
    def is_siglip(self) -> bool:
        return "siglip" in self.name


LAYOUTS = [
    Layout("openai/clip-vit-base-patch32", "facebook/sam-vit-base", 224, 32),
    Layout("openai/clip-vit-base-patch16", "facebook/sam-vit-large", 224, 16),
    Layout("openai/clip-vit-large-patch14", "facebook/sam-vit-huge", 224, 14),
    Layout("openai/clip-vit-large-patch14-336", "facebook/sam-vit-base", 336, 14),
    Layout("laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K", "facebook/sam-vit-base", 224, 14),
    Layout("google/siglip-base-patch16-224", "facebook/sam-vit-base", 224, 16, 64),
    Layout("google/siglip-so400m-patch14-384", "facebook/sam-vit-large", 384, 14, 64),
    Layout("google/siglip-so400m-patch14-224", "facebook/sam-vit-base", 224, 14, 16),
    Layout("google/siglip2-base-patch32-256", "facebook/sam-vit-huge", 256, 32, 64),
    Layout("google/siglip2-so400m-patch14-384", "facebook/sam-vit-base", 384, 14, 64),
]


def write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_sam(folder: Path, name: str) -> None:
    """A tiny SAM in the layout of a published one, which differ in the number of layers and their global ones."""
    layers, global_layers = {"base": (3, [0, 2]), "large": (4, [1, 3]), "huge": (5, [2, 4])}[name.rpartition("-")[2]]
    vision = OLD_KEYS | {
        "attention_dropout": 0.0,
        "dropout": 0.0,
        "global_attn_indexes": global_layers,
        "hidden_act": "gelu",
        "hidden_size": 24,
        "image_size": 256,
        "initializer_factor": 1.0,
        "initializer_range": 1e-10,
        "intermediate_size": 6144,
        "layer_norm_eps": 1e-06,
        "mlp_dim": 96,
        "mlp_ratio": 4.0,
        "model_type": "",
        "num_attention_heads": 2,
        "num_channels": 3,
        "num_hidden_layers": layers,
        "num_pos_feats": 8,
        "output_channels": 16,
        "patch_size": 16,
        "projection_dim": 512,
        "qkv_bias": True,
        "use_abs_pos": True,
        "use_rel_pos": True,
        "window_size": 14,
    }
    prompt_encoder = OLD_KEYS | {
        "hidden_act": "gelu",
        "hidden_size": 16,
        "image_embedding_size": 16,
        "image_size": 256,
        "layer_norm_eps": 1e-06,
        "mask_input_channels": 4,
        "model_type": "",
        "num_point_embeddings": 4,
        "patch_size": 16,
    }
    mask_decoder = OLD_KEYS | {
        "attention_downsample_rate": 2,
        "hidden_act": "relu",
        "hidden_size": 16,
        "iou_head_depth": 3,
        "iou_head_hidden_dim": 16,
        "layer_norm_eps": 1e-06,
        "mlp_dim": 32,
        "model_type": "",
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "num_multimask_outputs": 3,
    }
    config = {
        "_commit_hash": None,
        "architectures": ["SamModel"],
        "initializer_range": 0.02,
        "mask_decoder_config": mask_decoder,
        "model_type": "sam",
        "prompt_encoder_config": prompt_encoder,
        "torch_dtype": "float32",
        "transformers_version": None,
        "vision_config": vision,
    }
    image_processor = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_processor_type": "SamImageProcessor",
        "image_std": [0.229, 0.224, 0.225],
        "pad_size": {"height": 256, "width": 256},
        "processor_class": "SamProcessor",
        "resample": 2,
        "rescale_factor": 0.00392156862745098,
        "size": {"longest_edge": 256},
    }
    write(folder / "config.json", config)
    write(folder / "preprocessor_config.json", image_processor)
    model = randomize(SamModel(SamConfig.from_pretrained(folder)))
    # With smaller weights, the masks of all points are equal, and most are unstable or empty.
    randomize(model.mask_decoder, 0.5)
    model.mask_decoder.iou_prediction_head.proj_out.weight.data.mul_(0.01)
    model.mask_decoder.iou_prediction_head.proj_out.bias.data.fill_(0.9)
    for mlp in model.mask_decoder.output_hypernetworks_mlps:  # otherwise, each mask covers most of the image
        mlp.proj_out.weight.data.neg_()
        mlp.proj_out.bias.data.neg_()
    weights = model.state_dict()
    del weights["prompt_encoder.shared_embedding.positional_embedding"]  # tied, so safetensors stores it once
    weights = {name: weight.contiguous() for name, weight in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def write_clip(folder: Path, layout: Layout) -> None:
    """A tiny CLIP of OpenAI or LAION: byte-level BPE with the end token at the highest id."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [("r", "e"), ("re", "d</w>"), ("g", "re"), ("gre", "e"), ("gree", "n</w>"), ("a", "t")]
    tokens = [*alphabet, *(f"{byte}</w>" for byte in alphabet), *map("".join, pairs)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    write(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, pairs)) + "\n")
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
    start, end = ({"content": content} | special for content in tokens[-2:])
    map_of_tokens = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": "<|endoftext|>"}
    write(folder / "special_tokens_map.json", map_of_tokens)
    tokenizer_config = {
        "unk_token": end | {"__type": "AddedToken"},
        "bos_token": start | {"__type": "AddedToken"},
        "eos_token": end | {"__type": "AddedToken"},
        "pad_token": "<|endoftext|>",
        "add_prefix_space": False,
        "errors": "replace",
        "do_lower_case": True,
        "name_or_path": "openai/clip-vit-base-patch32",
        "model_max_length": 77,
        "special_tokens_map_file": "./special_tokens_map.json",
        "tokenizer_class": "CLIPTokenizer",
    }
    write(folder / "tokenizer_config.json", tokenizer_config)
    if layout.image_size == 224 and layout.patch_size == 16:  # the other layouts have vocab.json and merges.txt alone
        CLIPTokenizer.from_pretrained(folder).backend_tokenizer.save(str(folder / "tokenizer.json"))
    image_processor = {
        "crop_size": layout.image_size,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "resample": 3,
        "size": layout.image_size,
    }
    write(folder / "preprocessor_config.json", image_processor)
    tower = OLD_KEYS | {
        "attention_dropout": 0.0,
        "dropout": 0.0,
        "hidden_act": "gelu" if "laion" in layout.name else "quick_gelu",
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-05,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "projection_dim": 20,
    }
    text = tower | {
        "bos_token_id": 0,
        "eos_token_id": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "pad_token_id": 1,
        "vocab_size": len(tokens),
    }
    vision = tower | {
        "bos_token_id": None,
        "eos_token_id": None,
        "hidden_size": 24,
        "image_size": layout.image_size,
        "intermediate_size": 48,
        "model_type": "clip_vision_model",
        "pad_token_id": None,
        "patch_size": layout.patch_size,
    }
    config = {
        "_name_or_path": f"{layout.name.partition('/')[2]}/",
        "architectures": ["CLIPModel"],
        "initializer_factor": 1.0,
        "logit_scale_init_value": 2.6592,
        "model_type": "clip",
        "projection_dim": 20,
        "text_config": text,
        "text_config_dict": None,
        "torch_dtype": "float32",
        "transformers_version": None,
        "vision_config": vision,
        "vision_config_dict": None,
    }
    write(folder / "config.json", config)
    model = randomize(CLIPModel(CLIPConfig.from_pretrained(folder)))
    weights = model.state_dict()
    # Versions before 4.31 saved the positions.
    weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    num_positions = 1 + (layout.image_size // layout.patch_size) ** 2
    weights["vision_model.embeddings.position_ids"] = torch.arange(num_positions)[None]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def write_siglip(folder: Path, layout: Layout) -> None:
    """A tiny SigLIP or SigLIP 2, whose configuration has the class's default tokens instead of the tokenizer's."""
    is_second = "siglip2" in layout.name
    tokenizer = tiny_tokenizer("SigLIP 2" if is_second else "SigLIP", folder)
    if is_second:
        tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
        tokenizer_config = {
            "add_bos_token": False,
            "add_eos_token": True,
            "bos_token": "<bos>",
            "clean_up_tokenization_spaces": False,
            "eos_token": "<eos>",
            "mask_token": "<mask>",
            "model_input_names": ["input_ids"],
            "model_max_length": 1000000000000000019884624838656,
            "pad_token": "<pad>",
            "padding_side": "right",
            "processor_class": "SiglipProcessor",
            "sp_model_kwargs": {},
            "spaces_between_special_tokens": False,
            "tokenizer_class": "GemmaTokenizer",
            "unk_token": "<unk>",
            "use_default_system_prompt": False,
        }
        special = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
        map_of_tokens = {
            f"{kind}_token": {"content": f"<{kind}>"} | special for kind in ("bos", "eos", "mask", "pad", "unk")
        }
    else:
        tokenizer_config = {
            "additional_special_tokens": [],
            "clean_up_tokenization_spaces": True,
            "do_lower_case": True,
            "eos_token": "</s>",
            "model_input_names": ["input_ids"],
            "model_max_length": layout.text_length,
            "pad_token": "</s>",
            "processor_class": "SiglipProcessor",
            "sp_model_kwargs": {},
            "tokenizer_class": "SiglipTokenizer",
            "unk_token": "<unk>",
        }
        special = {"lstrip": True, "normalized": False, "rstrip": True, "single_word": False}
        map_of_tokens = {
            "eos_token": {"content": "</s>"} | special,
            "pad_token": {"content": "</s>"} | special,
            "unk_token": {"content": "<unk>"} | special,
        }
    write(folder / "tokenizer_config.json", tokenizer_config)
    write(folder / "special_tokens_map.json", map_of_tokens)
    image_processor = {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "SiglipImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "SiglipProcessor",
        "resample": 2 if is_second else 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": layout.image_size, "width": layout.image_size},
    }
    write(folder / "preprocessor_config.json", image_processor)
    tower = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2, "num_hidden_layers": 3}
    text = tower | {"model_type": "siglip_text_model", "vocab_size": len(tokenizer)}
    if layout.text_length != 64:
        text["max_position_embeddings"] = layout.text_length
    if is_second:
        text["projection_size"] = 24
    vision = tower | {"model_type": "siglip_vision_model", "patch_size": layout.patch_size}
    if layout.image_size != 224:
        vision["image_size"] = layout.image_size
    config = {
        "architectures": ["SiglipModel"],
        "initializer_factor": 1.0,
        "model_type": "siglip",
        "text_config": text,
        "torch_dtype": "float32",
        "transformers_version": "4.49.0.dev0" if is_second else "4.37.0.dev0",
        "vision_config": vision,
    }
    write(folder / "config.json", config)
    model = randomize(SiglipModel(SiglipConfig.from_pretrained(folder)))
    model.logit_bias.data.fill_(-3)
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})


@dataclass
class Pair:
    """Folders of the teachers of a layout, and of the unmerged model of both with its processor."""

    layout: Layout
    sam: Path
    clip: Path
    unmerged: Path

    def load_clip(self) -> CLIPModel | SiglipModel:
        return (SiglipModel if self.layout.is_siglip else CLIPModel).from_pretrained(self.clip).eval()


def make_pair(layout: Layout, folder: Path) -> Pair:
    pair = Pair(layout, folder / "sam", folder / "clip", folder / "unmerged")
    for path in (pair.sam, pair.clip):
        path.mkdir()
    torch.manual_seed(0)
    write_sam(pair.sam, layout.sam)
    (write_siglip if layout.is_siglip else write_clip)(pair.clip, layout)
    SamClipForImageSegmentation.from_teachers(pair.sam, pair.clip, merged=False).save_pretrained(pair.unmerged)
    SamClipProcessor.from_teachers(pair.sam, pair.clip).save_pretrained(pair.unmerged)
    return pair


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda layout: layout.name.partition("/")[2])
def pair(request, tmp_path_factory) -> Pair:
    return make_pair(request.param, tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def model(pair) -> SamClipForImageSegmentation:
    return SamClipForImageSegmentation.from_pretrained(pair.unmerged).eval()


@pytest.fixture(scope="module")
def processor(pair) -> SamClipProcessor:
    return AutoProcessor.from_pretrained(pair.unmerged)


@pytest.fixture(scope="module")
def image() -> Image.Image:
    """An image of 300 x 170 pixels, which is neither square nor a multiple of a patch."""
    small = np.random.default_rng(0).integers(0, 256, (5, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((300, 170), Image.Resampling.BICUBIC)


def text_inputs(pair: Pair) -> dict[str, torch.Tensor]:
    """Texts as transformers documents them for the teacher: CLIP's with a mask, SigLIP's padded to the maximum."""
    tokenizer = AutoTokenizer.from_pretrained(pair.clip)
    if not pair.layout.is_siglip:
        return dict(tokenizer(LABELS, padding=True, return_tensors="pt"))
    padding = {"padding": "max_length", "max_length": pair.layout.text_length}
    return {"input_ids": tokenizer(LABELS, **padding, return_tensors="pt")["input_ids"]}


@torch.no_grad()
def test_masks_equal_those_of_sam(pair, processor, image):
    """`AutoModel` and `AutoProcessor` with a point and a box, against `SamModel` and `SamProcessor`."""
    prompts = {"input_points": [[[[70, 90]]]], "input_boxes": [[[20.0, 30.0, 200.0, 160.0]]]}
    inputs = SamProcessor.from_pretrained(pair.sam)(image, **prompts, return_tensors="pt")
    expected = SamModel.from_pretrained(pair.sam).eval()(**inputs)
    actual = AutoModel.from_pretrained(pair.unmerged).eval()(**processor(image, **prompts))
    assert_same(actual.pred_masks, expected.pred_masks, tolerance=2e-4)
    assert_same(actual.iou_scores, expected.iou_scores)


@torch.no_grad()
def test_embeddings_equal_those_of_the_teacher_on_the_same_pixels(pair, model, processor, image):
    """Without the image's padding, stretched to `clip_image_size`."""
    inputs = processor(image)
    (height, width), own = inputs["reshaped_input_sizes"][0].tolist(), pair.layout.image_size
    size = model.config.clip_image_size
    assert size % pair.layout.patch_size == 0 and size >= own - own % pair.layout.patch_size
    mean, std = (0.5, 0.5) if pair.layout.is_siglip else (CLIP_MEAN, CLIP_STD)
    pixels = tower_pixels(model, inputs["pixel_values"][..., :height, :width], std, mean)
    expected = pair.load_clip().get_image_features(pixels, interpolate_pos_encoding=True).pooler_output
    outputs = model.get_image_features(inputs["pixel_values"], inputs["reshaped_input_sizes"])
    assert_same(outputs.pooler_output, expected)
    dense = SamClipModel.forward(model, **inputs).dense_embeds
    assert dense.shape == (1, expected.shape[1], 16, 16) and torch.isfinite(dense).all()


@torch.no_grad()
def test_at_the_teachers_own_size_no_positions_are_interpolated(pair, processor, image):
    own = pair.layout.image_size - pair.layout.image_size % pair.layout.patch_size
    model = SamClipModel.from_teachers(pair.sam, pair.clip, merged=False, clip_image_size=own).eval()
    inputs, (mean, std) = processor(image), (0.5, 0.5) if pair.layout.is_siglip else (CLIP_MEAN, CLIP_STD)
    height, width = inputs["reshaped_input_sizes"][0].tolist()
    pixels = tower_pixels(model, inputs["pixel_values"][..., :height, :width], std, mean)
    pixels = F.pad(pixels, (0, pair.layout.image_size - own) * 2)  # 384 px: SigLIP ignores the last 6
    expected = pair.load_clip().get_image_features(pixels).pooler_output
    actual = model.get_image_features(inputs["pixel_values"], inputs["reshaped_input_sizes"]).pooler_output
    assert_same(actual, expected)


@torch.no_grad()
@pytest.mark.parametrize("merged", [False, True])
def test_text_embeddings_equal_those_of_the_teacher(pair, merged, tmp_path, processor, transformers_log):
    expected = F.normalize(pair.load_clip().get_text_features(**text_inputs(pair)).pooler_output, dim=-1)
    folder = pair.unmerged
    if merged:
        folder = tmp_path
        SamClipModel.from_teachers(pair.sam, pair.clip).save_pretrained(folder)
        processor.save_pretrained(folder)
        SamClipVisionModel.from_pretrained(folder)
    segmenter = SamClipForImageSegmentation.from_pretrained(folder).set_vocabulary(LABELS, templates=["{}"])
    assert_same(segmenter.class_embeds, expected)
    assert_same(segmenter.embed_vocabulary([label.upper() for label in LABELS], templates="{}").class_embeds, expected)
    assert expected.std(dim=0).max() > 0.01  # the texts differ
    with pytest.raises(ValueError, match=f"accepts at most {pair.layout.text_length} tokens"):
        segmenter.embed_vocabulary([" ".join(TEXTS * 20)])
    assert not [record for record in transformers_log.records if "pad_token_id" in record.message]


@torch.no_grad()
def test_bfloat16_gives_about_the_same_embeddings(pair, model, processor, image):
    half = SamClipForImageSegmentation.from_pretrained(pair.unmerged, dtype=torch.bfloat16).eval()
    inputs = processor(image, text=LABELS)
    expected = SamClipModel.forward(model, **inputs)
    actual = SamClipModel.forward(half, **inputs.to("cpu", torch.bfloat16))
    for name in ("image_embeds", "text_embeds", "dense_embeds"):
        similarity = F.cosine_similarity(getattr(actual, name).float(), getattr(expected, name), dim=1)
        assert similarity.min() > 0.98, name


def test_pipelines_give_the_segments_of_the_model(pair, model, processor, image, tmp_path):
    """Both pipelines for segmentation, also from a saved model with a vocabulary and without a text tower."""
    zero_shot = pipeline("zero-shot-image-segmentation", model=str(pair.unmerged))
    segments = zero_shot(image, candidate_labels=LABELS, hypothesis_template=TEMPLATE, threshold=0.0)
    segmenter = SamClipForImageSegmentation.from_pretrained(pair.unmerged).set_vocabulary(LABELS, templates=TEMPLATE)
    segmenter.drop_text_tower().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    # transformers' default of the area threshold is 0.5.
    stock = pipeline("image-segmentation", model=str(tmp_path))
    stock = stock(image, threshold=0.0, overlap_mask_area_threshold=0.8)
    with torch.no_grad():
        outputs = model.eval()(**processor(image), vocabulary=model.embed_vocabulary(LABELS, templates=TEMPLATE))
    size = [(image.height, image.width)]
    panoptic = processor.post_process_panoptic_segmentation(outputs, threshold=0.0, target_sizes=size)[0]
    labels = [LABELS[info["label_id"]] for info in panoptic["segments_info"]]
    assert labels and [segment["label"] for segment in segments] == labels
    for number, (segment, other) in enumerate(zip(segments, stock, strict=True)):
        info = panoptic["segments_info"][number]
        expected = panoptic["segmentation"].numpy() == info["id"]
        for found in (segment, other):
            assert found["label"] == labels[number]
            assert ((np.asarray(found["mask"]) > 0) == expected).all()
            assert found["score"] == pytest.approx(info["score"], abs=1e-4)


def test_everything_mode_returns_masks_of_the_image(pair, image):
    everything = pipeline("mask-generation", model=str(pair.unmerged))
    found = everything(image, points_per_crop=3, pred_iou_thresh=0.0, stability_score_thresh=0.0)
    assert len(found["masks"]) and len(found["masks"]) == len(found["scores"])
    assert all(np.asarray(mask).shape == (image.height, image.width) for mask in found["masks"])


def test_the_command_segments_with_two_teachers(pair, image, tmp_path, monkeypatch):
    """`samclip segment --sam A --clip B`: the pipeline's segments, a label map, and COCO results for pycocotools."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    image.save(tmp_path / "photo.png")
    teachers = ["--sam", str(pair.sam), "--clip", str(pair.clip)]
    labels = ["--labels", ", ".join(LABELS), "--template", TEMPLATE, "--threshold", "0"]
    output = tmp_path / "out"
    assert main(["segment", str(tmp_path / "photo.png"), *teachers, *labels, "--output", f"{output}/"]) == 0
    segments = json.loads((output / "photo.json").read_text())["segments"]
    expected = pipeline("zero-shot-image-segmentation", model=str(pair.unmerged))(
        image, candidate_labels=LABELS, hypothesis_template=TEMPLATE, threshold=0.0
    )
    assert [segment["label"] for segment in segments] == [segment["label"] for segment in expected]
    with Image.open(output / "photo.png") as overlay, Image.open(output / "photo_labels.png") as label_map:
        assert overlay.width >= image.width and label_map.size == image.size
    coco = COCO(str(output / "coco_dataset.json"))
    assert len(coco.loadRes(str(output / "coco_results.json")).anns) == len(segments)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [LAYOUTS[3], LAYOUTS[5], LAYOUTS[9]], ids=lambda layout: layout.name)
def test_a_published_unmerged_model_runs_without_the_package(layout, tmp_path, image):
    pair = make_pair(layout, tmp_path)
    segmenter = SamClipForImageSegmentation.from_pretrained(pair.unmerged)
    segmenter.set_vocabulary(LABELS, templates=TEMPLATE).save_pretrained(pair.unmerged)
    build_repository(pair.unmerged, tmp_path / "repository")
    differences = verify(tmp_path / "repository", image)
    assert differences and max(differences.values()) < 1e-4


def test_weights_in_a_pickle_file_alone_raise(tmp_path):
    """As in the main branches of some of OpenAI's repositories, if there is no connection."""
    pair = make_pair(LAYOUTS[0], tmp_path)
    torch.save(pair.load_clip().state_dict(), pair.clip / "pytorch_model.bin")
    (pair.clip / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"no weights in safetensors files.*CLIPModel.from_pretrained\('.*save_pre"):
        SamClipModel.from_teachers(pair.sam, pair.clip, merged=False)
    CLIPModel.from_pretrained(pair.clip, use_safetensors=False).save_pretrained(tmp_path / "converted")
    for path in pair.clip.glob("*.json"):
        if path.name != "config.json":
            shutil.copy(path, tmp_path / "converted")
    shutil.copy(pair.clip / "merges.txt", tmp_path / "converted")
    converted = SamClipModel.from_teachers(pair.sam, tmp_path / "converted", merged=False)
    original = SamClipModel.from_pretrained(pair.unmerged)
    for name, weight in original.state_dict().items():
        assert torch.equal(converted.state_dict()[name], weight), name
