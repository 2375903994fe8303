import numpy
import pytest
import torch
from forked import call_each
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from dsmoe.config import DataConfig
from dsmoe.data import dataset as module
from dsmoe.data.dataset import TrainingStream, heldout, open_corpus
from dsmoe.errors import DataError

S = 32


@pytest.fixture
def corpus(data):
    return open_corpus(data)


@pytest.fixture
def stream(corpus):
    return TrainingStream(corpus, S, seed=1)


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def neighbours(folder, split):
    """Every pair of tokens that follow each other in a document of the split."""
    stored = IndexedDataset(str(folder / split))
    return {pair for index in range(len(stored)) for pair in zip(stored[index].tolist(), stored[index].tolist()[1:])}


def test_a_batch_has_the_promised_shapes_and_types(stream):
    batch = stream.batch(3, 5)
    assert {key: (tuple(value.shape), value.dtype) for key, value in batch.items()} == {
        "tokens": ((5, S), torch.int64),
        "labels": ((5, S), torch.int64),
        "loss_mask": ((5, S), torch.float32),
    }
    assert stream.batch(0, 0)["tokens"].shape == (0, S)
    tokens, labels, loss_mask = stream[3]
    assert torch.equal(tokens, batch["tokens"][0])
    assert torch.equal(tokens[1:], labels[:-1])
    assert loss_mask.min() == 1


def test_samples_are_the_documents_of_the_training_split(stream, dataset, corpus):
    known = neighbours(dataset, "train")
    for n in range(40):
        tokens, labels, _ = stream[n]
        for token, label in zip(tokens.tolist(), labels.tolist()):
            assert token == corpus.eod_id or (token, label) in known


def test_an_epoch_covers_nearly_every_token_once(stream, dataset, corpus):
    assert stream.epoch_size == (corpus.train.tokens - 1) // S
    labels = stream.batch(0, stream.epoch_size)["labels"].flatten()
    stored = numpy.fromfile(dataset / "train.bin", dtype=numpy.uint16)
    missing = numpy.bincount(stored, minlength=400) - numpy.bincount(labels.numpy(), minlength=400)
    assert (missing >= 0).all()
    assert missing.sum() <= S


def test_a_batch_is_the_concatenation_of_its_parts_also_over_the_end_of_an_epoch(stream, corpus):
    start = stream.epoch_size - 7
    whole = stream.batch(start, 16)
    other = TrainingStream(corpus, S, seed=1)  # a resumed run
    parts = [other.batch(start + offset, count) for offset, count in ((0, 3), (3, 6), (9, 7))]
    assert equal(whole, {key: torch.cat([part[key] for part in parts]) for key in whole})


def test_any_sample_can_be_asked_for_in_any_order(stream, corpus):
    forward = [stream[n][0] for n in (0, 5, 3 * stream.epoch_size + 2)]
    other = TrainingStream(corpus, S, seed=1)
    backward = [other[n][0] for n in (3 * other.epoch_size + 2, 5, 0)]
    assert all(torch.equal(a, b) for a, b in zip(forward, reversed(backward)))


def test_the_order_does_not_depend_on_how_many_samples_were_asked_for_before(stream, corpus):
    """Megatron's own order over several epochs does: this is why there is one GPTDataset an epoch."""
    short = TrainingStream(corpus, S, seed=1).batch(0, 10)
    stream.batch(0, 3 * stream.epoch_size)
    assert equal(stream.batch(0, 10), short)


def test_seed_and_epoch_change_the_order(stream, corpus):
    first = stream.batch(0, 50)["tokens"]
    assert not torch.equal(first, stream.batch(stream.epoch_size, 50)["tokens"])
    assert not torch.equal(first, TrainingStream(corpus, S, seed=2).batch(0, 50)["tokens"])


def test_changing_a_returned_mask_does_not_change_the_next_sample(stream):
    stream[0][2].zero_()
    assert stream[1][2].min() == 1
    assert stream[0][2].min() == 1


def test_padding_in_foreign_data_is_masked(tmp_path):
    builder = IndexedDatasetBuilder(f"{tmp_path}/padded.bin", numpy.int32)
    for _ in range(2):
        builder.add_document([5, 6, -1, -1, 7, 8, 9, 10, 11], [9])
    builder.finalize(f"{tmp_path}/padded.idx")
    tokens, labels, loss_mask = TrainingStream(open_corpus(DataConfig(path=f"{tmp_path}/padded")), 8, seed=0)[0]
    assert tokens.tolist() == [5, 6, 0, 0, 7, 8, 9, 10]
    assert labels.tolist() == [6, 0, 0, 7, 8, 9, 10, 11]
    assert loss_mask.tolist() == [1, 0, 0, 1, 1, 1, 1, 1]


def test_a_foreign_prefix_never_trains_on_what_it_holds_out(tmp_path):
    builder = IndexedDatasetBuilder(f"{tmp_path}/foreign.bin", numpy.int32)
    for document in range(20):
        builder.add_document([document] * 50, [50])
    builder.finalize(f"{tmp_path}/foreign.idx")
    corpus = open_corpus(DataConfig(path=f"{tmp_path}/foreign", valid_fraction=0.25))
    stream = TrainingStream(corpus, 10, seed=0)
    assert set(stream.batch(0, stream.epoch_size)["tokens"].unique().tolist()) == set(range(15))
    held_out = heldout(corpus, 10, 1000)
    assert set(held_out.batch(0, len(held_out))["tokens"].unique().tolist()) == set(range(15, 20))


def test_held_out_sequences_are_always_the_same_and_at_most_as_many_as_there_are(corpus, dataset):
    few, many = heldout(corpus, S, 4), heldout(corpus, S, 10**6)
    assert (len(few), len(many)) == (4, (corpus.valid.tokens - 1) // S)
    assert equal(few.batch(0, 4), many.batch(0, 4))
    known = neighbours(dataset, "valid")
    tokens, labels, _ = few[0]
    assert all(pair in known or pair[0] == 2 for pair in zip(tokens.tolist(), labels.tolist()))
    with pytest.raises(IndexError, match="there are 4"):
        few.batch(2, 3)


def test_too_little_data_for_one_sample_says_how_much_there_is(corpus):
    assert TrainingStream(corpus, corpus.train.tokens - 1, seed=0).epoch_size == 1
    with pytest.raises(DataError, match=rf"train split of .* has {corpus.train.tokens} tokens, too few"):
        TrainingStream(corpus, corpus.train.tokens, seed=0)
    with pytest.raises(DataError, match=rf"valid split of .* has {corpus.valid.tokens} tokens, too few for one sample"):
        heldout(corpus, corpus.valid.tokens, 10)


def test_indices_of_large_data_are_kept_and_give_the_same_samples(data, stream, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ENTRIES_KEPT_IN_MEMORY", 0)
    kept = TrainingStream(open_corpus(data), S, seed=1)
    assert len(list((tmp_path / "cache").glob("samples-*"))) == 1
    start = stream.epoch_size - 10
    assert equal(kept.batch(start, 20), stream.batch(start, 20))
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.npy")}
    assert len(files) == 2 * 3
    again = TrainingStream(open_corpus(data), S, seed=1)
    assert equal(again.batch(start, 20), stream.batch(start, 20))
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.npy")}


def test_small_data_leaves_no_index_behind(stream, tmp_path):
    stream.batch(0, 10)
    assert not (tmp_path / "cache").exists()


def test_another_held_out_part_never_meets_the_index_of_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ENTRIES_KEPT_IN_MEMORY", 0)
    builder = IndexedDatasetBuilder(f"{tmp_path}/foreign.bin", numpy.int32)
    for document in range(20):
        builder.add_document([document] * 50, [50])
    builder.finalize(f"{tmp_path}/foreign.idx")
    for fraction, kept in ((0.25, 15), (0.5, 10)):
        corpus = open_corpus(DataConfig(path=f"{tmp_path}/foreign", valid_fraction=fraction))
        stream = TrainingStream(corpus, 10, seed=0)
        assert set(stream.batch(0, stream.epoch_size)["tokens"].unique().tolist()) == set(range(kept))


def read_on_a_rank(folder, place, rank):
    torch.distributed.init_process_group("gloo", init_method=f"file://{place}/meeting", rank=rank, world_size=2)
    module.ENTRIES_KEPT_IN_MEMORY = 0
    corpus = open_corpus(DataConfig(path=str(folder)))
    batches = {}
    for cache in ("shared", f"node{rank}"):
        torch.distributed.barrier()
        stream = TrainingStream(corpus, S, seed=1, cache_dir=f"{place}/{cache}")
        batches[cache] = stream.batch(stream.epoch_size - 8, 16)
    return batches


def test_ranks_that_build_the_index_at_once_read_the_same_samples(dataset, stream, tmp_path):
    """On one node and on two. Megatron alone fails: all ranks but the first only read, also what is not there yet."""
    expected = stream.batch(stream.epoch_size - 8, 16)
    for batches in call_each([(read_on_a_rank, (dataset, tmp_path, rank)) for rank in range(2)], name="rank"):
        assert len(batches) == 2 and all(equal(batch, expected) for batch in batches.values())
    assert len(list((tmp_path / "shared").glob("samples-*"))) == 2  # of two epochs
