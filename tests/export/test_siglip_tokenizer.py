"""SigLIP's tokenizer in the format of the library `tokenizers` gives the token ids of transformers' tokenizer."""

import json
import random

import pytest
import sentencepiece
from tokenizers import Tokenizer
from transformers import CLIPTokenizer, SiglipTokenizer

from samclip_hf.export import siglip_tokenizer, writer
from samclip_hf.export.siglip_tokenizer import convert_siglip_tokenizer
from samclip_hf.miniature.scenes import CLASS_NAMES

SENTENCES = [f"a photo of a {name}, next to it the caf\u00e9's 2nd table (50% off)" for name in CLASS_NAMES]
# Characters that SigLIP's rules and sentencepiece's treat in different ways.
CHARACTERS = "aBz09 \t\n\x0b\x1c\x85\u00a0\u2028\u3000\u200b.,!'\"-_()&%#<>/\\{}~\u2014\u2019\u2026\u2581"
CHARACTERS += "\u00e9\u00c9\u00df\u0130\u03a3\u03c3\u4e2d\u6587\ufb01\uff26\u00bd\u00b2\U0001f600"


def train(folder, rule: str = "nmt_nfkc", **options) -> SiglipTokenizer:
    settings = {"vocab_size": 200, "hard_vocab_limit": False, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    settings |= {"normalization_rule_name": rule, "minloglevel": 2} | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_prefix=str(folder / "spiece"), **settings
    )
    return SiglipTokenizer(str(folder / "spiece.model"))


@pytest.mark.parametrize("rule", ["nmt_nfkc", "nfkc", "identity"])
def test_token_ids_of_random_texts_equal_those_of_transformers(rule, tmp_path):
    tokenizer = train(tmp_path, rule)
    convert_siglip_tokenizer(tokenizer).save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    generator = random.Random(0)
    words = " ".join(SENTENCES).split()
    pieces = [*words, *map(str.upper, words), *(CHARACTERS * 8)]
    texts = ["".join(generator.choices([*pieces, *" " * 300], k=generator.randint(0, 12))) for _ in range(3000)]
    texts += SENTENCES
    expected = tokenizer(texts)["input_ids"]
    assert len({tuple(ids) for ids in expected}) > 2000
    assert [encoding.ids for encoding in loaded.encode_batch(texts)] == expected


def test_upper_case_is_kept_if_the_tokenizer_keeps_it(tmp_path):
    train(tmp_path)
    tokenizer = SiglipTokenizer(str(tmp_path / "spiece.model"), do_lower_case=False)
    ids = convert_siglip_tokenizer(tokenizer).encode("A PHOTO of a red shape").ids
    assert ids == tokenizer("A PHOTO of a red shape")["input_ids"] != tokenizer("a photo of a red shape")["input_ids"]


@pytest.mark.parametrize(
    "options", [{"model_type": "bpe"}, {"byte_fallback": True, "vocab_size": 400}, {"user_defined_symbols": ["x"]}]
)
def test_other_sentencepiece_models_are_refused(options, tmp_path):
    with pytest.raises(ValueError, match="of another kind than SigLIP's"):
        convert_siglip_tokenizer(train(tmp_path, **options))


def test_a_file_that_reads_texts_differently_is_not_written(tmp_path, transformers_log, monkeypatch):
    tokenizer = train(tmp_path)
    path = tmp_path / "tokenizer.json"
    monkeypatch.setattr(siglip_tokenizer, "CHECKED_TEXTS", ("a", "</s> a"))  # a text with a special token
    writer._write_tokenizer(tokenizer, path)
    assert not path.exists()
    assert "tokenizer.json is not written: the converted tokenizer reads '</s> a' differently" in transformers_log.text


def test_other_tokenizers_are_saved_as_they_are(tmp_path):
    tokenizer = CLIPTokenizer(vocab={"a</w>": 0, "<|startoftext|>": 1, "<|endoftext|>": 2}, merges=[])
    writer._write_tokenizer(tokenizer, tmp_path / "tokenizer.json")
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]["a</w>"] == 0
