"""Whatever lies where a dataset is expected: a dataset that reads, or a `DataError` that names the file."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path

import numpy
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsmoe.config import DataConfig
from dsmoe.data.corpus import open_corpus
from dsmoe.data.dataset import TrainingStream, heldout
from dsmoe.data.description import DatasetDescription
from dsmoe.data.identity import data_identity
from dsmoe.data.megatron import indexed_dataset
from dsmoe.data.prepare import prepare
from dsmoe.errors import DataError

EXAMPLES = int(os.environ.get("DSMOE_FUZZ", "60"))
FUZZ = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
LENGTHS = [40, 3, 25, 60]


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> Path:
    prefix = tmp_path_factory.mktemp("data") / "tokens"
    builder = indexed_dataset().IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    for number, length in enumerate(LENGTHS):
        builder.add_document(numpy.arange(length) + number, [length])
    builder.finalize(f"{prefix}.idx")
    return prefix


def read(prefix: Path) -> None:
    try:
        corpus = open_corpus(DataConfig(path=str(prefix), valid_fraction=0.3))
        data_identity(corpus)
        stream = TrainingStream(corpus, 8, seed=0)
        heldout(corpus, 8, 2).batch(0, 1)
        batch = stream.batch(0, stream.epoch_size)
    except DataError as error:
        assert str(prefix.parent) in str(error)
        return
    assert batch["tokens"].shape == (stream.epoch_size, 8)


@given(data=st.data())
@FUZZ
def test_an_index_with_bytes_changed(prefix, data):
    idx = prefix.with_suffix(".idx")
    saved = idx.read_bytes()
    changed = bytearray(saved)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, len(saved) - 1))] = data.draw(st.integers(0, 255))
    changed = changed[: data.draw(st.integers(0, len(changed)) | st.just(len(changed)))]
    try:
        idx.unlink()  # what has it open keeps the old one
        idx.write_bytes(bytes(changed))
        read(prefix)
    finally:
        idx.unlink()
        idx.write_bytes(saved)


@given(content=st.binary(max_size=400))
@FUZZ
def test_tokens_that_are_anything(prefix, content):
    tokens = prefix.with_suffix(".bin")
    saved = tokens.read_bytes()
    try:
        tokens.unlink()
        tokens.write_bytes(content)
        read(prefix)
    finally:
        tokens.unlink()
        tokens.write_bytes(saved)


texts = st.text(max_size=50).map(lambda text: ('{"format_version": 1, "name": "' + text).encode("utf-8", "replace"))


@given(content=st.binary(max_size=100) | texts)
@FUZZ
def test_a_description_that_is_anything(tmp_path, content):
    (tmp_path / "dataset.json").write_bytes(content)
    with pytest.raises(DataError, match="dataset.json"):
        DatasetDescription.load(tmp_path)


def compressed(name: str, content: bytes) -> bytes:
    return {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)(content)


JSON_LINES = st.lists(
    st.recursive(
        st.none() | st.integers() | st.floats() | st.text(max_size=20), lambda inner: st.lists(inner, max_size=2)
    ),
    max_size=4,
).map(lambda values: "\n".join(json.dumps({"text": value}) for value in values).encode())
DOCUMENTS = (
    st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")) | JSON_LINES
)
NAMES = ("a.txt", "a.jsonl", "a.jsonl.gz", "a.txt.gz", "a.txt.zst", "a.py")


@given(name=st.sampled_from(NAMES), content=DOCUMENTS, cut=st.booleans(), more=st.booleans())
@FUZZ
def test_a_source_that_is_anything_becomes_a_whole_dataset_or_none(dataset, tmp_path, name, content, cut, more):
    sources, output = tmp_path / "sources", tmp_path / "out"
    for folder in (sources, output):
        shutil.rmtree(folder, ignore_errors=True)
    sources.mkdir()
    written = compressed(name, content)
    (sources / name).write_bytes(written[: len(written) // 2] if cut else written)
    if more:
        (sources / "b.txt").write_text("def main():\n    return 1\n" * 20)
        (sources / "c.txt").write_text("x = [n for n in range(9)]\n" * 20)
    try:
        prepare([str(sources)], output, tokenizer=dataset / "tokenizer.model", workers=1)
    except DataError:
        assert not output.exists()
        return
    corpus = open_corpus(DataConfig(path=str(output)))
    assert corpus.train.tokens > 0 and corpus.valid.tokens > 0
    assert corpus.description.splits.keys() == {"train", "valid"}
