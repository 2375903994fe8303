import json
import shutil
import struct

import numpy
import pytest
from made_up import made_up_documents
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from dsmoe.config import DataConfig
from dsmoe.data.corpus import open_corpus
from dsmoe.data.tokenizer import Tokenizer
from dsmoe.errors import DataError


@pytest.fixture
def copy(dataset, tmp_path):
    """The prepared dataset, to be damaged."""
    return shutil.copytree(dataset, tmp_path / "copy")


def build(prefix, documents, dtype=numpy.int32):
    """A pair as any Megatron tool writes it; a document is a list of sequences of ids."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype)
    for document in documents:
        builder.add_document([token for sequence in document for token in sequence], [len(part) for part in document])
    builder.finalize(f"{prefix}.idx")
    return prefix


def test_a_prepared_folder_opens_with_everything_known(dataset):
    corpus = open_corpus(DataConfig(path=str(dataset)))
    described = json.loads((dataset / "dataset.json").read_text())
    for split in (corpus.train, corpus.valid):
        assert split.tokens == described["splits"][split.name]["tokens"]
    assert (corpus.vocab_size, corpus.eod_id) == (400, 2)
    assert corpus.bytes_per_token == described["splits"]["valid"]["bytes_per_token"]
    corpus.check_vocabulary(400)
    with pytest.raises(DataError, match=r"has 400 ids, more than the model's embedding \(399\)"):
        corpus.check_vocabulary(399)


def test_a_foreign_prefix_opens_and_holds_its_last_documents_out(tmp_path):
    prefix = build(tmp_path / "foreign", [[[1, 2], [3]], [[4]], [[5, 6], [7], [8]], [[9]]])
    corpus = open_corpus(DataConfig(path=str(prefix), valid_fraction=0.5))
    assert (corpus.train.first, corpus.train.stop, corpus.train.tokens) == (0, 3, 4)
    assert (corpus.valid.first, corpus.valid.stop, corpus.valid.tokens) == (3, 7, 5)  # documents, not sequences
    assert (corpus.tokenizer, corpus.eod_id, corpus.bytes_per_token) == (None, None, None)
    assert corpus.vocab_size == 10
    assert open_corpus(DataConfig(path=f"{prefix}.idx")).train.files.prefix == prefix


def test_a_foreign_prefix_can_have_its_own_held_out_prefix(tmp_path):
    train = build(tmp_path / "a.train", [[[1, 2, 3]]])
    valid = build(tmp_path / "a.valid", [[[4, 50]]], numpy.uint16)
    corpus = open_corpus(DataConfig(path=str(train), valid_path=str(valid)))
    assert (corpus.train.tokens, corpus.valid.tokens, corpus.vocab_size) == (3, 2, 51)


def test_bytes_per_token_of_a_foreign_prefix_are_counted(dataset, tmp_path):
    tokenizer = Tokenizer.load(dataset / "tokenizer.model")
    texts = made_up_documents(10)
    prefix = build(tmp_path / "foreign", [[[*tokenizer.encode(text), tokenizer.eod_id]] for text in texts])
    corpus = open_corpus(DataConfig(path=str(prefix), valid_fraction=0.3, tokenizer=str(tokenizer.path)))
    assert corpus.bytes_per_token == pytest.approx(sum(map(len, texts[7:])) / corpus.valid.tokens)
    corpus.check_vocabulary(400)


def test_ids_that_the_tokenizer_or_the_embedding_does_not_have_are_found(dataset, tmp_path):
    prefix = build(tmp_path / "foreign", [[[1, 2]], [[3, 400]]])
    with pytest.raises(DataError, match=r"the token id 400, and the tokenizer has the ids 0 \.\. 399"):
        open_corpus(DataConfig(path=str(prefix), tokenizer=str(dataset / "tokenizer.model"))).check_vocabulary(512)
    open_corpus(DataConfig(path=str(prefix))).check_vocabulary(401)
    with pytest.raises(DataError, match="the token id 400, and the model's embedding has the ids 0 .. 399"):
        open_corpus(DataConfig(path=str(prefix))).check_vocabulary(400)


def test_the_largest_id_is_found_wherever_it_is_and_remembered_for_large_files(tmp_path, monkeypatch):
    for length in (1, 63, 64, 65, 1000):
        for place in {0, length // 2, length - 1}:
            ids = [5] * length
            ids[place] = 77
            prefix = build(tmp_path / "foreign", [[ids]])
            files = open_corpus(DataConfig(path=str(prefix), valid_path=str(prefix))).train.files
            assert files.largest_token([tmp_path / "cache"]) == 77
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr("dsmoe.data.token_files.QUICK_TOKENS", 0)
    assert files.largest_token([tmp_path / "cache"]) == 77
    monkeypatch.setattr(type(files), "_scan", None)  # not called again
    assert files.largest_token([tmp_path / "cache"]) == 77


def test_a_truncated_bin_names_both_sizes(copy):
    path = copy / "train.bin"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=rf"train\.bin is truncated: {size - 100} bytes, and train\.idx claims {size}"):
        open_corpus(DataConfig(path=str(copy)))
    path.write_bytes(b"\0" * (size + 2))
    with pytest.raises(DataError, match=r"train\.bin is longer than its index"):
        open_corpus(DataConfig(path=str(copy)))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda idx: b"something else" + idx[14:], "is not an index in Megatron's format"),
        (lambda idx: idx[:20], "is not an index in Megatron's format"),
        (lambda idx: idx[:9] + struct.pack("<Q", 2) + idx[17:], "has version 2 of Megatron's format, expected 1"),
        (lambda idx: idx[:17] + b"\7" + idx[18:], "has the data type code 7"),
        (lambda idx: idx[:-8], "is truncated"),
        (lambda idx: idx[:-8] + struct.pack("<q", 1), "its documents do not add up"),
        (lambda idx: b"", "is not an index in Megatron's format"),
    ],
)
def test_a_damaged_idx_is_refused(copy, damage, complaint):
    path = copy / "valid.idx"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=rf"valid\.idx {complaint}" if complaint[:3] != "its" else complaint):
        open_corpus(DataConfig(path=str(copy)))


def test_files_of_two_datasets_do_not_pass_for_one(copy):
    for suffix in (".bin", ".idx"):
        shutil.copy(copy / f"valid{suffix}", copy / f"train{suffix}")
    with pytest.raises(DataError, match=r"train\.idx has \d+ tokens, and dataset\.json says \d+"):
        open_corpus(DataConfig(path=str(copy)))


def test_another_tokenizer_than_the_datasets_is_refused(dataset, tmp_path):
    other = Tokenizer.train(made_up_documents(40, seed=5), tmp_path / "other.model", 400)
    with pytest.raises(DataError, match=r"other\.model is not the one .* was made with"):
        open_corpus(DataConfig(path=str(dataset), tokenizer=str(other.path)))


@pytest.mark.parametrize("missing", ["dataset.json", "tokenizer.model", "valid.bin", "train.idx"])
def test_a_folder_with_a_missing_file_names_it(copy, missing):
    (copy / missing).unlink()
    with pytest.raises(DataError, match=missing):
        open_corpus(DataConfig(path=str(copy)))


def test_a_damaged_or_newer_description_is_refused(copy):
    path = copy / "dataset.json"
    described = json.loads(path.read_text())
    one_split = {"splits": {"train": described["splits"]["train"]}}
    for content, complaint in (
        ("{", "the file: Invalid JSON"),
        (json.dumps(described | {"format_version": 2}), "format_version: Input should be 1"),
        (json.dumps(described | one_split), "does not describe the split valid"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=complaint):
            open_corpus(DataConfig(path=str(copy)))


def test_paths_that_lead_nowhere_say_what_to_do(dataset, tmp_path):
    with pytest.raises(DataError, match="found neither the folder .*: dsmoe prepare-data stdlib --output"):
        open_corpus(DataConfig(path=str(tmp_path / "absent")))
    (tmp_path / "half.idx").touch()
    with pytest.raises(DataError, match="no such file: .*half.bin"):
        open_corpus(DataConfig(path=str(tmp_path / "half")))
    with pytest.raises(DataError, match="has no dataset.json.*it holds the prefixes .*half"):
        open_corpus(DataConfig(path=str(tmp_path)))
    with pytest.raises(DataError, match="has a held-out split of its own"):
        open_corpus(DataConfig(path=str(dataset), valid_path="other"))


def test_one_document_or_no_token_is_too_few(tmp_path):
    build(tmp_path / "one", [[[1, 2], [3, 4]]])
    with pytest.raises(DataError, match=r"has 1 document\(s\), too few to hold some out"):
        open_corpus(DataConfig(path=str(tmp_path / "one")))
    build(tmp_path / "none", [])
    with pytest.raises(DataError, match=r"none\.bin is empty"):
        open_corpus(DataConfig(path=str(tmp_path / "none")))
