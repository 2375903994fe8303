"""What training reads: samples of one length, in an order that is a function of the seed alone.

Sample n of a `TrainingStream` is the same whatever the number of ranks, the batch size and the number of steps that
are planned: a run resumes, or goes on further than once intended, at the exact sample. Megatron's `GPTDataset` can not
promise that when it is asked for several epochs at once (how it shuffles depends on the number of samples requested),
so there is one `GPTDataset` an epoch, with the seed `seed + epoch`.

S is the sequence length: a sample is S tokens and the S tokens that follow each of them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

from dsmoe.config import DataConfig
from dsmoe.data import corpus as single
from dsmoe.data.blend import Blend, BlendOrder
from dsmoe.data.cache import cache_folders, provide_folder
from dsmoe.data.corpus import Corpus, Split
from dsmoe.data.megatron import gpt_dataset, only_errors
from dsmoe.data.token_files import TokenFiles
from dsmoe.errors import DataError

__all__ = ["Blend", "Corpus", "HeldOut", "TrainingStream", "heldout", "open_corpus", "training_stream"]

HELD_OUT_SEED = 1234  # fixed: every run is evaluated on the same sequences in the same order
# An index with fewer entries takes milliseconds to build: it is made in memory by every process, and leaves no file.
ENTRIES_KEPT_IN_MEMORY = 1_000_000
INDEX_PARTS = ("document_index", "sample_index", "shuffle_index")
NO_TOKEN = -2  # for data without an end-of-document id; -1 is Megatron's padding

Sample = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def open_corpus(data: DataConfig) -> Corpus | Blend:
    """Find and check the data of a run, one dataset or a blend; reads no tokens. Raises `DataError`."""
    if isinstance(data.path, str):
        return single.open_corpus(data)
    if not data.path:
        raise DataError("data.path: found an empty list, expected at least one {path, weight}")
    if data.valid_path is not None:
        raise DataError(
            f"data.valid_path: found {data.valid_path}, but of a blend each dataset holds out its own; leave it out"
        )
    corpora = [single.open_corpus(data.model_copy(update={"path": part.path})) for part in data.path]
    return Blend([part.path for part in data.path], corpora, [part.weight for part in data.path])


def training_stream(corpus: Corpus | Blend, sequence_length: int, seed: int, cache_dir: str | Path | None = None):
    """The endless sequence of training samples of a corpus or a blend; see `TrainingStream`."""
    if isinstance(corpus, Blend):
        streams: list[_Batches] = [TrainingStream(part, sequence_length, seed, cache_dir) for part in corpus.corpora]
        return BlendedSamples(streams, corpus.names, corpus.order(seed))
    return TrainingStream(corpus, sequence_length, seed, cache_dir)


class _Batches:
    """Stacks the samples of a sequence of samples."""

    def __init__(self, sequence_length: int):
        self.sequence_length = sequence_length

    def __getitem__(self, n: int) -> Sample:
        raise NotImplementedError

    def shares(self, samples: int) -> dict[str, float]:
        """Of a blend: which share of the samples before that one each dataset gave, by name."""
        return {}

    def batch(self, first_sample: int, count: int) -> dict[str, torch.Tensor]:
        """Samples `first_sample` .. `first_sample + count - 1`; `count` may be 0.

        Returns:
            `tokens` and `labels` int64 `[count, S]`, `loss_mask` float32 `[count, S]`.
        """
        shape = (count, self.sequence_length)
        tokens, labels = torch.empty(shape, dtype=torch.int64), torch.empty(shape, dtype=torch.int64)
        loss_mask = torch.empty(shape, dtype=torch.float32)
        for row in range(count):
            tokens[row], labels[row], loss_mask[row] = self[first_sample + row]
        return {"tokens": tokens, "labels": labels, "loss_mask": loss_mask}


class TrainingStream(_Batches):
    """The endless sequence of training samples.

    Attributes:
        sequence_length: S.
        epoch_size: samples after which every document was seen once (less than S tokens are left over).
    """

    def __init__(self, corpus: Corpus, sequence_length: int, seed: int, cache_dir: str | Path | None = None):
        """
        Args:
            corpus: from `open_corpus`.
            sequence_length: S, in tokens.
            seed: of the order; equal on all ranks.
            cache_dir: where the indices of large corpora are kept; None: `data.cache_dir`, else beside the data.

        Raises:
            DataError: the training split is shorter than one sample, or no place to keep an index can be written.
        """
        super().__init__(sequence_length)
        self.epoch_size = _sample_count(corpus.train, sequence_length)
        self._corpus = corpus
        self._seed = seed
        self._cache_dir = str(cache_dir) if cache_dir is not None else corpus.cache_dir
        self._epochs: dict[int, _Epoch] = {}
        self._epoch(0)  # what can go wrong goes wrong before training

    def __getitem__(self, n: int) -> Sample:
        """Sample n: tokens int64 `[S]`, labels int64 `[S]`, loss_mask float32 `[S]` (0 where a label is padding)."""
        if n < 0:
            raise IndexError(f"sample {n}: samples are counted from 0")
        epoch, index = divmod(n, self.epoch_size)
        return self._epoch(epoch)[index]

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            seed = self._seed + epoch
            opened = _Epoch.open(self._corpus, self._corpus.train, self.sequence_length, seed, self._cache_dir)
            # A batch may span two epochs; older ones are not needed again.
            self._epochs = {known: samples for known, samples in self._epochs.items() if known == epoch - 1} | {
                epoch: opened
            }
        return self._epochs[epoch]


class BlendedSamples(_Batches):
    """Samples of several sequences of samples, in the order of a blend.

    Args:
        sources: of one length; endless, or with enough samples for `length` of all.
        names: of the datasets, for `shares`.
        length: samples of all; None: endless.
    """

    def __init__(self, sources: list[_Batches], names: list[str], order: BlendOrder, length: int | None = None):
        super().__init__(sources[0].sequence_length)
        self._sources, self._order, self._length = sources, order, length
        short = [Path(name).name for name in names]
        self._names = short if len(set(short)) == len(names) else names

    def __len__(self) -> int:
        if self._length is None:
            raise TypeError("a training stream has no end")
        return self._length

    def __getitem__(self, n: int) -> Sample:
        if n < 0 or (self._length is not None and n >= self._length):
            raise IndexError(f"sample {n}: there are {self._length}, counted from 0")
        dataset, sample = self._order(n)
        return self._sources[dataset][sample]

    def shares(self, samples: int) -> dict[str, float]:
        counts = self._order.counts(samples)
        return {name: count / max(1, samples) for name, count in zip(self._names, counts, strict=True)}


class HeldOut(_Batches):
    """A fixed sequence of held-out samples; `len` of it, items and `batch` as of a `TrainingStream`."""

    def __init__(self, epoch: _Epoch, sequence_length: int, sequences: int):
        super().__init__(sequence_length)
        self._epoch = epoch
        self._sequences = sequences

    def __len__(self) -> int:
        return self._sequences

    def __getitem__(self, n: int) -> Sample:
        if not 0 <= n < self._sequences:
            raise IndexError(f"held-out sample {n}: there are {self._sequences}, counted from 0")
        return self._epoch[n]


def heldout(corpus: Corpus | Blend, sequence_length: int, sequences: int) -> HeldOut | BlendedSamples:
    """At most `sequences` full samples of the held-out split, the same ones in every run; of a blend each dataset's
    share of them.

    Raises:
        DataError: the split is shorter than one sample.
    """
    if isinstance(corpus, Blend):
        return _blended_heldout(corpus, sequence_length, sequences)
    available = _sample_count(corpus.valid, sequence_length)
    epoch = _Epoch.open(corpus, corpus.valid, sequence_length, HELD_OUT_SEED, corpus.cache_dir)
    return HeldOut(epoch, sequence_length, min(sequences, available))


def _blended_heldout(blend: Blend, sequence_length: int, sequences: int) -> BlendedSamples:
    order = blend.order(HELD_OUT_SEED)
    available = [_sample_count(part.valid, sequence_length) for part in blend.corpora]
    while sequences > 1 and any(count > has for count, has in zip(order.counts(sequences), available, strict=True)):
        sequences -= 1  # a dataset has too little for its share
    sources: list[_Batches] = [heldout(part, sequence_length, has) for part, has in zip(blend.corpora, available)]
    return BlendedSamples(sources, blend.names, order, sequences)


def _sample_count(split: Split, sequence_length: int) -> int:
    """Full samples in one pass over a split; each needs one token more than its length, shared with the next."""
    count = (split.tokens - 1) // sequence_length
    if count < 1:
        raise DataError(
            f"the {split.name} split of {split.files.prefix} has {split.tokens} tokens, too few for one sample of "
            f"model.sequence_length {sequence_length} (it needs {sequence_length + 1}); "
            "use more data or shorter sequences"
        )
    return count


@dataclass(frozen=True)
class _DataIdentity:
    """What `GPTDataset` wants to know of a tokenizer, and what tells one index from another."""

    eod: int
    unique_identifiers: dict[str, str | int]
    vocab_size: None = None  # only the loader of .bin/.idx would use it, and here that reads the type from .idx


class _Epoch:
    """One pass over a split, through Megatron's `GPTDataset`."""

    def __init__(self, dataset: Any, files: TokenFiles):
        self._dataset, self._files = dataset, files

    @classmethod
    def open(cls, corpus: Corpus, split: Split, sequence_length: int, seed: int, cache_dir: str | None) -> _Epoch:
        module = gpt_dataset()
        indices = numpy.arange(split.first, split.stop, dtype=numpy.int32)
        # The content of .idx, not its path: a dataset that is replaced or moved never meets the index of another.
        what: dict[str, str | int] = {"idx": split.files.fingerprint, "first": split.first, "stop": split.stop}
        identity = _DataIdentity(NO_TOKEN if corpus.eod_id is None else corpus.eod_id, what)

        def build(cache: Path | None) -> Any:  # a GPTDataset
            config = module.GPTDatasetConfig(
                random_seed=seed % (1 << 32),
                sequence_length=sequence_length,
                path_to_cache=None if cache is None else str(cache),
                tokenizer=identity,
                reset_position_ids=False,
                reset_attention_mask=False,
                eod_mask_loss=False,
                create_attention_mask=False,
                mmap_bin_files=True,
            )
            with only_errors(module.logger):
                return module.GPTDataset(split.files.indexed, None, indices, None, module.Split.train, config)

        # GPTDataset writes its cache in place, and on rank 0 only: read by others too early, or never written on
        # another node. So it builds in memory, and the files it will find are written here.
        def write(folder: Path) -> None:
            dataset = build(None)
            stem = f"{dataset.unique_description_hash}-{type(dataset).__name__}-{module.Split.train.name}"
            (folder / f"{stem}-description.txt").write_text(dataset.unique_description)
            for part in INDEX_PARTS:
                numpy.save(folder / f"{stem}-{part}.npy", getattr(dataset, part))

        if len(indices) + split.tokens // sequence_length <= ENTRIES_KEPT_IN_MEMORY:
            return cls(build(None), split.files)
        key = json.dumps([what, sequence_length, seed])
        name = f"samples-{hashlib.sha256(key.encode()).hexdigest()[:32]}"
        return cls(build(provide_folder(cache_folders(split.files.prefix, cache_dir), name, write)), split.files)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Sample:
        self._files.check_size()
        sample = self._dataset[index]
        # The first sample's mask is the one GPTDataset keeps for all others: hand out a copy.
        return sample["tokens"], sample["labels"], sample["loss_mask"].clone()
