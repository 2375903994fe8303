"""Hugging Face tokenizers: what an imported model brings, and what training must not take from its settings."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from test_tokenizer import NASTY
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from dsmoe.config import DataConfig
from dsmoe.data.corpus import open_corpus
from dsmoe.data.prepare import prepare
from dsmoe.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from dsmoe.errors import DataError

BOS, EOS = "<|begin|>", "<|end|>"


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory, texts) -> Path:
    """A folder as GPT-2, Llama 3 and Qwen ship it, with settings of a pipeline: BOS, truncation and padding."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator([path.read_text() for path in sorted(texts.iterdir())], trainer)
    library.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    library.enable_truncation(5)
    library.enable_padding(length=64)
    return write(library, tmp_path_factory.mktemp("byte level"), {"eos_token": {"content": EOS}})


@pytest.fixture(scope="module")
def metaspace(tmp_path_factory) -> Path:
    """A folder as Llama 2 and Mixtral ship it: a space before every text, byte fallback."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abc", "▁a", "▁ab"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("▁a", "b")]
    library = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens(["<s>", "</s>", "<unk>"])
    return write(library, tmp_path_factory.mktemp("metaspace"), {"eos_token": "</s>"})


def write(library: tokenizers.Tokenizer, folder: Path, settings: dict) -> Path:
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("text", NASTY)
def test_every_text_comes_back_unchanged(byte_level, text):
    tokenizer = Tokenizer.load(byte_level)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert "".join(tokenizer.decode_stream(tokenizer.encode(text))) == text


def test_the_folder_and_the_file_are_the_same_tokenizer(byte_level):
    for path in (byte_level, byte_level / "tokenizer.json"):
        tokenizer = Tokenizer.load(path)
        assert isinstance(tokenizer, HuggingFaceTokenizer)
        assert (tokenizer.vocab_size, tokenizer.eod_id) == (400, 1)
        assert tokenizer.sha256 == Tokenizer.load(byte_level).sha256


def test_settings_of_a_pipeline_do_not_touch_a_corpus(byte_level):
    """No BOS, nothing cut off, nothing padded."""
    tokenizer = Tokenizer.load(byte_level)
    library = tokenizers.Tokenizer.from_file(str(byte_level / "tokenizer.json"))
    assert library.encode("a b c d e f g").ids[0] == 0 and len(library.encode("a b c d e f g").ids) == 64
    ids = tokenizer.encode("one two three four five six")
    assert 0 not in ids and len(ids) > 5
    assert tokenizer.encode("") == []


def test_a_text_cannot_spell_a_control_token(byte_level):
    tokenizer = Tokenizer.load(byte_level)
    text = f"the text {EOS} and {BOS} go on"
    ids = tokenizer.encode(text)
    assert not {0, 1} & set(ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([tokenizer.eod_id, *ids, 0]) == text


def test_ids_outside_the_vocabulary_and_lone_surrogates_stop_nothing(byte_level):
    tokenizer = Tokenizer.load(byte_level)
    assert tokenizer.decode([tokenizer.vocab_size, *tokenizer.encode("x"), -1]) == "x"
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"


def test_a_stream_gives_whole_characters_as_soon_as_they_are_there(byte_level):
    tokenizer = Tokenizer.load(byte_level)
    ids = tokenizer.encode("😀😀")
    assert len(ids) == 8

    def watched():
        for number, token in enumerate(ids, 1):
            seen.append(number)
            yield token

    seen = []
    assert next(tokenizer.decode_stream(watched())) == "😀"
    assert seen == [1, 2, 3, 4]


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_a_stream_of_any_ids_ends(kind, request):
    """What an untrained model writes."""
    tokenizer = Tokenizer.load(request.getfixturevalue(kind))
    choose = random.Random(0)
    for _ in range(50):
        ids = [choose.randrange(tokenizer.vocab_size) for _ in range(60)]
        pieces = list(tokenizer.decode_stream(ids))
        assert len(pieces) > 5 and all(pieces)
        if kind == "byte_level":
            assert "".join(pieces) == tokenizer.decode(ids)


def test_a_text_that_goes_on_keeps_its_space(metaspace, tmp_path):
    """The first space of a text is the tokenizer's own; that of a later part is the text's."""
    (tmp_path / "text").write_text("\n".join(["ab abc ab"] * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "foreign"), vocab_size=8, minloglevel=2
    )
    for tokenizer in (Tokenizer.load(metaspace), Tokenizer.load(tmp_path / "foreign.model")):
        prompt, more = tokenizer.encode("ab"), tokenizer.encode("ab ab")[len(tokenizer.encode("ab")) :]
        assert tokenizer.decode(prompt) == "ab"
        assert "".join(tokenizer.decode_stream(more)) == "ab"
        assert "".join(tokenizer.decode_stream(more, after=prompt)) == " ab"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config.json": {"eos_token": BOS}, "generation_config.json": {"eos_token_id": 1}}, 0),
        ({"tokenizer_config.json": {}, "generation_config.json": {"eos_token_id": [1, 0]}}, 1),
        ({"generation_config.json": {}, "config.json": {"eos_token_id": 0}}, 0),
        ({}, "cannot tell which token .* ends a document"),
        ({"config.json": {"eos_token_id": 400}}, "cannot tell which token"),
        ({"tokenizer_config.json": {"eos_token": "<|missing|>"}}, "does not hold the eos_token '<|missing|>'"),
        ({"tokenizer_config.json": []}, "holds no JSON object"),
    ],
)
def test_the_end_of_a_document_is_the_models_own(files, expected, byte_level, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((byte_level / "tokenizer.json").read_bytes())
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    if isinstance(expected, int):
        assert Tokenizer.load(tmp_path).eod_id == expected
    else:
        with pytest.raises(DataError, match=expected.replace("|", r"\|")):
            Tokenizer.load(tmp_path)


def test_damaged_files_and_empty_folders_are_refused(tmp_path, byte_level):
    with pytest.raises(DataError, match="holds no tokenizer: found neither tokenizer.json nor tokenizer.model"):
        Tokenizer.load(tmp_path)
    for content in (b"", b"{}", (byte_level / "tokenizer.json").read_bytes()[:-9]):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(DataError, match="tokenizer.json is not a tokenizer of the tokenizers library"):
            Tokenizer.load(tmp_path)


def test_a_dataset_is_prepared_with_it_and_opened(byte_level, texts, tmp_path):
    description = prepare([str(texts)], tmp_path / "out", tokenizer=byte_level, workers=1)
    given = Tokenizer.load(byte_level)
    corpus = open_corpus(DataConfig(path=str(tmp_path / "out")))
    assert (corpus.tokenizer.sha256, corpus.eod_id, corpus.vocab_size) == (given.sha256, 1, 400)
    assert "tokenizers" in description.versions and "sentencepiece" not in description.versions
    assert {"tokenizer.json", "tokenizer_config.json"} <= description.files.keys()
    held = description.splits["valid"]
    ids = [token for document in range(held.documents) for token in corpus.valid.files.indexed[document].tolist()]
    assert len(ids) == held.tokens and ids.count(1) == held.documents
    assert len(given.decode(ids).encode()) == held.bytes  # what bits per byte are counted in


def test_a_copy_is_enough_and_replaces_one_of_the_other_kind(byte_level, dataset, tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "tokenizer.json").write_bytes((byte_level / "tokenizer.json").read_bytes())
    (tmp_path / "source" / "config.json").write_text('{"eos_token_id": 1}')
    (tmp_path / "run").mkdir()
    ours = Tokenizer.load(dataset)
    assert isinstance(ours, SentencePieceTokenizer)
    for tokenizer, names in (
        (ours, {"tokenizer.model"}),
        (Tokenizer.load(tmp_path / "source"), {"tokenizer.json", "tokenizer_config.json"}),
    ):
        tokenizer.copy_to(tmp_path / "run")
        again = Tokenizer.load(tmp_path / "run")
        assert (again.sha256, again.eod_id) == (tokenizer.sha256, tokenizer.eod_id)
        assert {path.name for path in (tmp_path / "run").iterdir()} == names
