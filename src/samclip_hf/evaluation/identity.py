"""Hashes that identify a model by its weights and configuration instead of the name of its folder."""

import hashlib
import json
from typing import Any

from transformers import PreTrainedModel

# The vocabulary that a SAM-CLIP is saved with. Evaluators embed the names of the data instead.
VOCABULARY_BUFFERS = {"class_embeds", "label_embeds"}
# Entries of configurations, at any depth, that no metric depends on.
IGNORED_ENTRIES = {
    *("_name_or_path", "architectures", "auto_map", "custom_pipelines", "dtype", "initializer_factor"),
    *("image_processor_type", "initializer_range", "minimum_transformers_version", "processor_class"),
    *("transformers_version", "background_label_id", "background_threshold", "id2label", "label2id"),
    *("vocabulary_label_ids", "vocabulary_num_labels"),
}
# Its tokens depend on how a tokenizer treats capitals, punctuation, digits and accents, and on its special tokens.
PROBE_TEXT = "A photo of 2 Cats, isn't it? (café)"


def hash_weights(model: PreTrainedModel) -> str:
    """
    Returns a hash of a model's weights: the first 16 hexadecimal digits of the SHA-256 of all names, shapes and values
    of its state, in float32 and sorted by name.

    It is the same for every folder, repository and number of files that the weights are stored in, and for float32
    copies of half-precision weights. A SAM-CLIP's vocabulary is left out. A ViT-L takes about a second.
    """
    content = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name not in VOCABULARY_BUFFERS:
            content.update(f"{name} {tuple(tensor.shape)}\n".encode())
            content.update(tensor.detach().float().cpu().contiguous().flatten().numpy())
    return content.hexdigest()[:16]


def hash_configuration(model: PreTrainedModel, processor: Any) -> str:
    """Returns a hash of everything besides the weights that determines a model's outputs: its configuration, its image
    processor, and the tokens of a text."""
    tokenizer = getattr(processor, "tokenizer", None)
    return hash_json(
        {
            "model": _relevant(model.config.to_diff_dict()),
            "image_processor": _relevant(processor.image_processor.to_dict()),
            "tokens": None if tokenizer is None else tokenizer(PROBE_TEXT)["input_ids"],
        }
    )


def hash_json(value: Any) -> str:
    """Returns the first 16 hexadecimal digits of the SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _relevant(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            str(key): _relevant(part) for key, part in value.items() if key not in IGNORED_ENTRIES and part is not None
        }
    return value
