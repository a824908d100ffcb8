"""Hashes that identify a model by its weights and configuration instead of the name of its folder."""

import hashlib
import json
from typing import Any

from transformers import PreTrainedModel

# The vocabulary that a SAM-CLIP is saved with: buffers and entries of the configuration. Evaluators embed the names of
# the data instead.
VOCABULARY_BUFFERS = {"class_embeds", "label_embeds", "neutral_embeds"}
VOCABULARY_ENTRIES = {
    *("background_label_id", "background_threshold", "id2label", "label2id"),
    *("vocabulary_label_ids", "vocabulary_num_labels", "vocabulary_num_neutral"),
}
# Entries of configurations, at any depth, that no output depends on.
IGNORED_ENTRIES = {
    *("_name_or_path", "architectures", "auto_map", "custom_pipelines", "dtype", "initializer_factor"),
    *("image_processor_type", "initializer_range", "minimum_transformers_version", "processor_class", "teachers"),
    "transformers_version",
}
# Its tokens depend on how a tokenizer treats capitals, punctuation, digits and accents, and on its special tokens.
PROBE_TEXT = "A photo of 2 Cats, isn't it? (café)"


def hash_weights(model: PreTrainedModel, with_vocabulary: bool = False) -> str:
    """
    Returns a hash of a model's weights: the first 16 hexadecimal digits of the SHA-256 of all names, shapes and values
    of its state, in float32 and sorted by name.

    It is the same for every folder, repository and number of files that the weights are stored in, and for float32
    copies of half-precision weights. Quantized weights are hashed as their float32 values. A SAM-CLIP's vocabulary is
    left out unless `with_vocabulary` is set. A ViT-L takes about a second.
    """
    content = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if with_vocabulary or name not in VOCABULARY_BUFFERS:
            content.update(f"{name} {tuple(tensor.shape)}\n".encode())
            if hasattr(tensor, "__tensor_flatten__"):  # a tensor subclass, such as torchao's quantized weights
                tensor = tensor.dequantize()
            content.update(tensor.detach().float().cpu().contiguous().flatten().numpy())
    return content.hexdigest()[:16]


def hash_configuration(model: PreTrainedModel, processor: Any, with_vocabulary: bool = False) -> str:
    """Returns a hash of everything besides the weights that determines a model's outputs: its configuration, its image
    processor, and the tokens of a text. `processor` has the last two as attributes, as processors and pipelines do.
    The entries of a SAM-CLIP's vocabulary are left out unless `with_vocabulary` is set."""
    ignored = IGNORED_ENTRIES if with_vocabulary else IGNORED_ENTRIES | VOCABULARY_ENTRIES
    tokenizer = getattr(processor, "tokenizer", None)
    return hash_json(
        {
            "model": _relevant(model.config.to_diff_dict(), ignored),
            "image_processor": _relevant(processor.image_processor.to_dict(), ignored),
            "tokens": None if tokenizer is None else tokenizer(PROBE_TEXT)["input_ids"],
        }
    )


def hash_json(value: Any) -> str:
    """Returns the first 16 hexadecimal digits of the SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _relevant(value: Any, ignored: set[str]) -> Any:
    if isinstance(value, dict):
        return {
            str(key): _relevant(part, ignored)
            for key, part in value.items()
            if key not in ignored and part is not None
        }
    return value
