"""A SentencePiece model as tokenizer.json: the same ids, the same text back, and models of others refused by name."""

from __future__ import annotations

import argparse
import io
import json
import random
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer

from dsmoe.config import DataConfig
from dsmoe.data.dataset import open_corpus
from dsmoe.data.prepare import prepare
from dsmoe.data.tokenizer import TRAINING_OPTIONS, Tokenizer
from dsmoe.errors import ConversionError, DataError
from dsmoe.hf.tokenizer import PROBES, check_tokenizer, encode_alike, write_tokenizer

# Real code, cut into documents, and a little of what code seldom has.
SOURCE = Path(argparse.__file__).read_text(encoding="utf-8")
CORPUS = [SOURCE[start : start + 1000] for start in range(0, 60_000, 1000)]
CORPUS += [f"=-=-=- naïve 中文 {' ' * i}abab{'  ' * i}\n" for i in range(20)]
VOCABULARY = 600


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return Tokenizer.train(CORPUS, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", VOCABULARY)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    write_tokenizer(tokenizer, folder, 128)
    return folder


@pytest.fixture(scope="module")
def exported(folder):
    return AutoTokenizer.from_pretrained(folder)


def test_probes_and_text_are_encoded_alike(tokenizer, folder):
    compared = check_tokenizer(tokenizer, folder, CORPUS)
    assert compared["texts"] > len(PROBES) + len(CORPUS) and compared["tokens"] > 10_000


def test_repeated_and_joined_pieces_are_encoded_alike(tokenizer, exported):
    """Where the order of merges shows: runs of one character, and pieces that overlap with themselves."""
    generator = random.Random(1)
    pieces = [tokenizer.decode([token]) for token in range(3, tokenizer.vocab_size)]
    runs = [" ", "=-", "ab", " a", "\n ", "aa", "- ="]
    for _ in range(2000):
        parts = [*generator.choices(pieces, k=4), generator.choice(runs) * generator.randint(1, 9)]
        generator.shuffle(parts)
        text = "".join(parts)
        assert exported(text)["input_ids"] == tokenizer.encode(text), text


def test_text_comes_back_unchanged(exported):
    for text in (*PROBES, *CORPUS):
        assert exported.decode(exported(text)["input_ids"]) == text


def test_special_tokens_are_the_end_of_a_document_and_never_come_from_text(tokenizer, exported):
    assert exported.eos_token_id == exported.pad_token_id == exported.bos_token_id == tokenizer.eod_id
    assert tokenizer.eod_id not in exported("</s></s>")["input_ids"]
    assert exported.decode([*exported("a")["input_ids"], tokenizer.eod_id], skip_special_tokens=True) == "a"


def test_the_export_is_a_tokenizer_of_dsmoe_again(tokenizer, folder):
    """Through tokenizer.json, as an import reads it, and written once more."""
    again = Tokenizer.load(folder)
    assert again.package == "tokenizers" and again.eod_id == tokenizer.eod_id
    assert encode_alike(again, tokenizer) and encode_alike(tokenizer, tokenizer)
    for text in (*PROBES, *CORPUS[:20]):
        assert again.encode(text) == tokenizer.encode(text)
    write_tokenizer(again, folder, 128)
    assert check_tokenizer(again, folder, CORPUS[:20])["texts"] > 20


def test_a_tokenizer_that_differs_is_found(tokenizer, folder, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = (folder / name).read_text()
        if name == "tokenizer.json":
            library = json.loads(content)
            del library["model"]["merges"][20]
            content = json.dumps(library)
        (tmp_path / name).write_text(content)
    with pytest.raises(ConversionError, match="encodes .* otherwise than dsmoe"):
        check_tokenizer(tokenizer, tmp_path, CORPUS)


def other_model(tmp_path, **options) -> Tokenizer:
    """A model that was trained elsewhere, in another way."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, **{**TRAINING_OPTIONS, "vocab_size": VOCABULARY, **options}
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    return Tokenizer.load(tmp_path / "tokenizer.model")


def test_a_model_that_begins_every_text_with_a_space(tmp_path):
    """As those of LLaMA and Mixtral do."""
    tokenizer = other_model(tmp_path, add_dummy_prefix=True)
    assert not encode_alike(tokenizer, other_model(tmp_path))
    (tmp_path / "out").mkdir()
    write_tokenizer(tokenizer, tmp_path / "out", 128)
    assert check_tokenizer(tokenizer, tmp_path / "out", CORPUS[:20])["texts"] > len(PROBES)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram"}, "it is no BPE model"),
        ({"normalization_rule_name": "nmt_nfkc"}, "it normalizes text"),
        ({"remove_extra_whitespaces": True}, "it removes repeated spaces"),
        ({"user_defined_symbols": ["[X]"]}, "user-defined"),
    ],
)
def test_what_cannot_be_written_exactly_is_refused(options, reason, tmp_path):
    with pytest.raises(ConversionError, match=reason):
        write_tokenizer(other_model(tmp_path, **options), tmp_path, 128)


def test_a_dataset_takes_its_tokenizer_in_another_kind_of_file(tmp_path, tokenizer):
    """What transformers saved of an export is a tokenizer.json; the run's data was made with a tokenizer.model."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for number, text in enumerate(CORPUS[:40]):
        (texts / f"{number}.txt").write_text(text)
    prepare([str(texts)], tmp_path / "data", tokenizer=tokenizer.path, workers=1)
    write_tokenizer(tokenizer, tmp_path, 128)
    corpus = open_corpus(DataConfig(path=str(tmp_path / "data"), tokenizer=str(tmp_path / "tokenizer.json")))
    assert corpus.tokenizer.sha256 != tokenizer.sha256 and encode_alike(corpus.tokenizer, tokenizer)
    other = other_model(tmp_path, vocab_size=500)
    with pytest.raises(DataError, match="is not the one .* was made with"):
        open_corpus(DataConfig(path=str(tmp_path / "data"), tokenizer=str(other.path)))
