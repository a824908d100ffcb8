"""SigLIP's tokenizer, which is a sentencepiece model with rules in Python, as a file of the library `tokenizers`."""

import re
import string

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, processors
from transformers import SiglipTokenizer

# sentencepiece's types of pieces and models: https://github.com/google/sentencepiece/blob/v0.2.1/src/sentencepiece_model.proto
NORMAL, UNKNOWN, CONTROL, UNUSED = 1, 2, 3, 5
UNIGRAM = 1

# Texts that the converted tokenizer must read as the original one does: case, punctuation, white space, Unicode.
CHECKED_TEXTS = (
    "",
    "a photo of a cat.",
    "  A Photo,\tof\n\nthe CAT's  (tabby) ",
    "- a dog, - a cat -",
    "traffic_light & spider-monkey #1: 50%",
    "caf\u00e9 cafe\u0301 \uff26\uff35\uff2c\uff2c \ufb01ne \u4e2d\u6587 \u0130stanbul \u03a3\u0391\u03a3",
    "a\u2581b \u2581c\u00a0d\u200be\U0001f600\U0001f600 f",
)


def convert_siglip_tokenizer(tokenizer: SiglipTokenizer) -> Tokenizer:
    r"""
    Returns a tokenizer of the library `tokenizers` with the token ids of SigLIP's, with the end token and without
    padding.

    Args:
        tokenizer ([`SiglipTokenizer`]):
            Tokenizer of a SigLIP. SigLIP 2 has Gemma's tokenizer, which needs no conversion.

    Raises:
        ValueError: The sentencepiece model is of another kind than SigLIP's, or the converted tokenizer reads one of
            `CHECKED_TEXTS` differently.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto  # type: ignore[attr-defined]
    model = proto.FromString(tokenizer.sp_model.serialized_model_proto())
    rules = model.normalizer_spec
    if (
        model.trainer_spec.model_type != UNIGRAM
        or not {piece.type for piece in model.pieces} <= {NORMAL, UNKNOWN, CONTROL, UNUSED}
        or not (rules.remove_extra_whitespaces and rules.escape_whitespaces)
    ):
        raise ValueError("the sentencepiece model is of another kind than SigLIP's, a unigram model without bytes")
    converted = Tokenizer(
        models.Unigram([(piece.piece, piece.score) for piece in model.pieces], unk_id=model.trainer_spec.unk_id)
    )
    converted.normalizer = normalizers.Sequence(
        [
            # SiglipTokenizer.tokenize and canonicalize_text
            normalizers.Replace("\u2581", " "),
            *([normalizers.Lowercase()] if tokenizer.do_lower_case else []),
            normalizers.Replace(Regex(f"[{re.escape(string.punctuation)}]"), ""),
            normalizers.Replace(Regex(r"[\s\x1c-\x1f\x85]+"), " "),
            normalizers.Replace(Regex(r" \z"), ""),
            normalizers.Prepend("\u2581"),
            # sentencepiece
            *([normalizers.Precompiled(rules.precompiled_charsmap)] if rules.precompiled_charsmap else []),
            normalizers.Replace(Regex(" {2,}"), " "),
            normalizers.Replace(" ", "\u2581"),
            normalizers.Replace(Regex(r"\u2581+\z"), ""),
        ]
    )
    end = tokenizer.eos_token
    converted.post_processor = processors.TemplateProcessing(
        single=["$A", end], special_tokens=[(end, tokenizer.eos_token_id)]
    )
    converted.add_special_tokens([AddedToken(end, normalized=False, lstrip=True, rstrip=True)])
    for text in CHECKED_TEXTS:
        if converted.encode(text).ids != tokenizer(text)["input_ids"]:
            raise ValueError(f"the converted tokenizer reads {text!r} differently")
    return converted
