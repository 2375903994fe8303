import random

import pytest
import sentencepiece

from dsmoe.data.tokenizer import Tokenizer
from dsmoe.errors import DataError

NASTY = [
    "",
    " ",
    "  two leading spaces, two  inside, two trailing  ",
    "\tif x:\n\t\treturn\r\n\n\n",
    "nul \0, bell \a, byte order mark \ufeff, replacement \ufffd, unknown sign \u2047",
    "\u2581 the sign \u2581\u2581 for a space \u2581",
    "</s> <s> <unk> <0x0A> are only text",
    "e\u0301 \u00e9 \ufb01 \uff21 are not normalized",
    "漢字かな交じり文 한국어 العربية हिन्दी",
    "👩‍👩‍👧 🏳️‍🌈 😀",
    "1234567890" * 50,
]


@pytest.fixture(scope="module")
def tokenizer(dataset):
    return Tokenizer.load(dataset / "tokenizer.model")


@pytest.mark.parametrize("text", NASTY)
def test_every_text_comes_back_unchanged(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_random_unicode_comes_back_unchanged(tokenizer):
    choose = random.Random(0)
    ranges = [(0, 128), (0, 0x3000), (0, 0xD800), (0xE000, 0x110000), (0x2581, 0x2582), (9, 11)]
    for _ in range(3000):
        text = "".join(chr(choose.randrange(*choose.choice(ranges))) for _ in range(choose.randrange(12)))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decoding_agrees_with_sentencepiece(tokenizer, dataset, texts):
    reference = sentencepiece.SentencePieceProcessor(model_file=str(dataset / "tokenizer.model"))
    for path in sorted(texts.iterdir())[:20]:
        ids = tokenizer.encode(path.read_text())
        assert ids == reference.encode(path.read_text())
        assert tokenizer.decode(ids) == reference.decode(ids)


def test_encode_adds_neither_begin_nor_end(tokenizer):
    assert tokenizer.encode("") == []
    assert tokenizer.eod_id not in tokenizer.encode("</s>")
    assert tokenizer.decode([tokenizer.eod_id]) == ""


def test_code_is_encoded_in_far_fewer_tokens_than_bytes(tokenizer):
    text = "def router_expert(token):\n    return token * 10\n"
    assert len(tokenizer.encode(text)) < len(text) / 2
    assert len(tokenizer.encode(" " * 16)) < 8


def test_stream_never_breaks_a_character(tokenizer):
    text = "a 漢字 😀 b"
    pieces = list(tokenizer.decode_stream(iter(tokenizer.encode(text))))
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert len(pieces) > 5  # it does stream


def test_stream_yields_a_character_with_its_last_byte_and_not_before(tokenizer):
    ids = tokenizer.encode("😀")
    assert len(ids) == 4

    def watched():
        for number, token in enumerate(ids, 1):
            seen.append(number)
            yield token

    seen = []
    assert next(tokenizer.decode_stream(watched())) == "😀"
    assert seen == [1, 2, 3, 4]


def test_broken_bytes_and_ids_outside_the_vocabulary_become_replacement_characters(tokenizer):
    assert tokenizer.decode(tokenizer.encode("😀")[:2]) == "\ufffd"
    assert tokenizer.decode([tokenizer.vocab_size, *tokenizer.encode("x"), -1]) == "\ufffdx\ufffd"


def test_lone_surrogates_do_not_stop_the_encoder(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"


def test_training_twice_gives_the_same_file(texts, tmp_path):
    sample = [path.read_text() for path in sorted(texts.iterdir())]
    first = Tokenizer.train(sample, tmp_path / "first.model", 350)
    second = Tokenizer.train(sample, tmp_path / "second.model", 350)
    assert first.sha256 == second.sha256
    assert first.vocab_size == 350
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.model", "second.model"]


def test_texts_with_tabs_are_learned_from(tmp_path):
    model = Tokenizer.train(["\tgradient\tgradient\tgradient"] * 50, tmp_path / "tabs.model", 273)
    assert len(model.encode("gradient")) <= 2


def test_too_large_a_vocabulary_names_the_largest_that_works(tmp_path):
    sample = ["few words are here, few words"] * 10
    with pytest.raises(DataError, match=r"4096 is too large .* at most (\d+)") as caught:
        Tokenizer.train(sample, tmp_path / "a.model", 4096)
    largest = int(str(caught.value).split()[-1])
    assert Tokenizer.train(sample, tmp_path / "a.model", largest).vocab_size == largest
    with pytest.raises(DataError, match="too large"):
        Tokenizer.train(sample, tmp_path / "a.model", largest + 1)


def test_too_small_a_vocabulary_names_the_least(tmp_path):
    with pytest.raises(DataError, match=r"100 is too small.* at least 2\d\d"):
        Tokenizer.train(["some text"], tmp_path / "a.model", 100)


def test_missing_empty_and_damaged_models_are_refused(dataset, tmp_path):
    with pytest.raises(DataError, match="cannot read the tokenizer .*absent.model: No such file"):
        Tokenizer.load(tmp_path / "absent.model")
    for content in (b"", b"not a model", (dataset / "tokenizer.model").read_bytes()[:-7]):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(DataError, match="bad.model is not a SentencePiece model"):
            Tokenizer.load(tmp_path / "bad.model")


def test_a_model_with_dummy_prefix_and_no_byte_fallback_still_decodes(tmp_path):
    """As many models made elsewhere are."""
    (tmp_path / "text").write_text("\n".join(["the quick brown fox jumps over the lazy dog"] * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "foreign"), vocab_size=30, minloglevel=2
    )
    foreign = Tokenizer.load(tmp_path / "foreign.model")
    assert foreign.decode(foreign.encode("the lazy fox")) == "the lazy fox"
    assert list(foreign.decode_stream(foreign.encode("the \u2581 fox")))[0][0] == "t"
