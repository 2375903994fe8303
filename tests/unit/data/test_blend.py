"""Blends: each dataset's share, an order that is a function of the seed alone, and what a run does with them."""

from __future__ import annotations

import json

import numpy
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from dsmoe.config import DataConfig, load_config
from dsmoe.data.blend import BlendOrder
from dsmoe.data.dataset import heldout, open_corpus, training_stream
from dsmoe.data.identity import data_identity
from dsmoe.errors import ConfigError, DataError

S = 16


def made(folder, name: str, first: int, documents: int = 20):
    """A Megatron prefix whose ids tell which dataset they are of."""
    prefix = folder / name
    builder = IndexedDatasetBuilder(f"{prefix}.bin", numpy.uint16)
    for number in range(documents):
        builder.add_document(torch.arange(first + number, first + number + 50), [50])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.fixture
def parts(tmp_path):
    return [made(tmp_path, "few", 0, 10), made(tmp_path, "many", 1000, 40), made(tmp_path, "other", 2000, 20)]


def blend(parts, weights, **more):
    path = [{"path": str(part), "weight": weight} for part, weight in zip(parts, weights, strict=True)]
    return open_corpus(DataConfig.model_validate({"path": path, **more}))


def dataset_of(sample) -> int:
    return int(sample[0][0]) // 1000


@pytest.mark.parametrize("weights", [[3, 1], [0.5, 0.3, 0.2], [1000, 1], [1, 1, 1, 1, 1, 1, 1]])
def test_every_dataset_gives_its_share(weights):
    order = BlendOrder(weights, seed=3)
    count, shares = 3 * order.block_size + 17, numpy.array(weights) / sum(weights)
    actual = numpy.array([order(n) for n in range(count)])
    for dataset in range(len(weights)):
        mine = actual[actual[:, 0] == dataset, 1]
        assert mine.tolist() == list(range(len(mine)))  # all of its samples, in order, none twice
    for n in (1, 100, order.block_size, 2 * order.block_size, count):
        assert order.counts(n) == numpy.bincount(actual[:n, 0], minlength=len(weights)).tolist()
    for block in (1, 2, 3):
        n = block * order.block_size
        assert numpy.abs(numpy.array(order.counts(n)) - shares * n).max() <= 1


def test_the_order_is_a_function_of_the_seed():
    one, again, other = BlendOrder([2, 1], 5), BlendOrder([20, 10], 5), BlendOrder([2, 1], 6)
    places = [0, 1, 1023, 1024, 999_999, 7]  # in any order, with nothing before them
    assert [one(n) for n in places] == [again(n) for n in reversed(places)][::-1]
    assert [one(n)[0] for n in range(64)] != [other(n)[0] for n in range(64)]


def test_a_blend_reads_its_datasets(parts):
    corpus = blend(parts, [6, 3, 1])
    stream = training_stream(corpus, S, seed=1)
    batch = stream.batch(0, 1000)
    of = (batch["tokens"][:, 0] // 1000).numpy()
    assert numpy.abs(numpy.bincount(of) / 1000 - [0.6, 0.3, 0.1]).max() < 0.03
    alone = training_stream(open_corpus(DataConfig(path=str(parts[1]))), S, seed=1)
    from_many = batch["tokens"][of == 1]
    assert torch.equal(from_many, alone.batch(0, len(from_many))["tokens"])  # in its own order
    later = training_stream(blend(parts, [6, 3, 1]), S, seed=1).batch(700, 50)  # a run that resumes
    assert torch.equal(later["tokens"], batch["tokens"][700:750])
    shares = stream.shares(1000)
    assert list(shares) == ["few", "many", "other"] and sum(shares.values()) == pytest.approx(1)
    assert shares["few"] == (of == 0).mean()


def test_what_is_held_out_is_blended_too(parts):
    corpus = blend(parts, [1, 1, 2], valid_fraction=0.3)
    held = heldout(corpus, S, 12)
    assert 1 < len(held) <= 12
    assert {dataset_of(held[n]) for n in range(len(held))} == {0, 1, 2}
    with pytest.raises(IndexError):
        held[len(held)]


def test_other_weights_are_other_data(parts):
    one, same, other = (data_identity(blend(parts, weights)) for weights in ([1, 1, 2], [2, 2, 4], [1, 1, 1]))
    assert one == same and one["train"]["fingerprint"] != other["train"]["fingerprint"]
    assert one["train"]["tokens"] == sum(part.train.tokens for part in blend(parts, [1, 1, 2]).parts)


def test_mistakes(parts, tmp_path, data):
    with pytest.raises(DataError, match="data.path: found an empty list"):
        open_corpus(DataConfig(path=[]))
    with pytest.raises(DataError, match="of a blend each dataset holds out its own"):
        blend(parts, [1, 1, 1], valid_path=str(parts[0]))
    with pytest.raises(DataError, match="a share of 1e-08 in the blend"):
        blend(parts[:2], [1, 1e-8])
    with pytest.raises(DataError, match="found neither the folder"):
        blend([tmp_path / "absent"], [1])
    with pytest.raises(DataError, match="a blend needs datasets of one tokenizer, found .*no tokenizer"):
        blend([data.path, parts[0]], [1, 1])
    with pytest.raises(ConfigError, match="data.path"):
        load_config(None, ["data.path=[{path: a, weight: 0}]"])
    config = load_config(None, ["data.path=[{path: a, weight: 3}, {path: ~/b, weight: 1}]"])
    assert config.data.path[0].weight == 3 and not config.data.path[1].path.startswith("~")


def test_megatrons_own_prefixes_and_keys(tmp_path):
    """preprocess_data.py --json-keys content --output-prefix corpus makes corpus_content_document."""
    made(tmp_path, "corpus_content_document", 0)
    for path in ("corpus", "corpus_content_document", "corpus_content_document.idx"):
        corpus = open_corpus(DataConfig(path=str(tmp_path / path)))
        assert corpus.train.files.prefix.name == "corpus_content_document"
    made(tmp_path, "corpus_title_document", 0)
    with pytest.raises(DataError, match="several datasets of Megatron's: .*content_document.*title_document"):
        open_corpus(DataConfig(path=str(tmp_path / "corpus")))
    from dsmoe.cli.prepare_data import main

    lines = [json.dumps({"content": f"The token {n} goes to expert {n % 7}.\n" * 20}) for n in range(60)]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    sources = [str(tmp_path / "lines.jsonl"), "--output", str(tmp_path / "made"), "--vocab-size", "320"]
    assert not main([*sources, "--json-keys", "content", "--workers", "1"])
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    assert len(IndexedDataset(str(tmp_path / "made" / "train"))) > 10  # what is made here, Megatron reads
