"""Several datasets as one: which of them gives each sample is a function of the seed and the sample's number alone.

Sample n lies in block n // B. At the end of every block each dataset has given its share of all samples so far, to one
sample; within a block the seed decides the order. So nothing is stored, any sample can be found at once, and a run
resumes, on any number of ranks, or goes on longer than planned, at the exact sample. Megatron's `BlendedDataset` has an
index of all samples instead, whose order depends on how many are asked for. Within a dataset the order is that of its
own `TrainingStream`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy

from dsmoe.data.corpus import Corpus
from dsmoe.errors import DataError

SHORTEST_BLOCK = 1024  # samples
SMALLEST_SHARE = 1e-6


class BlendOrder:
    """From which dataset a sample comes, and the how-many-th of that dataset it is.

    Args:
        weights: of each dataset; they need not sum to 1.
        seed: of the order.
    """

    def __init__(self, weights: Sequence[float], seed: int):
        total = math.fsum(weights)
        self.shares = [weight / total for weight in weights]
        self.block_size = max(SHORTEST_BLOCK, math.ceil(2 / min(self.shares)))
        ends = numpy.cumsum(self.shares)
        ends[-1] = 1.0
        self._ends, self._seed = ends, seed
        self._block = lru_cache(maxsize=2)(self._make_block)

    def __call__(self, n: int) -> tuple[int, int]:
        """(dataset, its sample) of sample n."""
        block, place = divmod(n, self.block_size)
        datasets, samples = self._block(block)
        return int(datasets[place]), int(samples[place])

    def counts(self, n: int) -> list[int]:
        """How many of the samples before n each dataset gives."""
        block, place = divmod(n, self.block_size)
        counts = self._counts_before(block)
        if place:
            counts = counts + numpy.bincount(self._block(block)[0][:place], minlength=len(counts))
        return counts.tolist()

    def _counts_before(self, block: int) -> numpy.ndarray:
        ends = numpy.floor(self._ends * (block * self.block_size) + 0.5).astype(numpy.int64)
        return numpy.diff(ends, prepend=0)

    def _make_block(self, block: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        before, after = self._counts_before(block), self._counts_before(block + 1)
        datasets = numpy.repeat(numpy.arange(len(before)), after - before)
        digest = hashlib.sha256(f"blend {self._seed} {block}".encode()).digest()
        numpy.random.RandomState(int.from_bytes(digest[:4], "little")).shuffle(datasets)
        samples = numpy.empty_like(datasets)
        for dataset, first in enumerate(before):
            mine = datasets == dataset
            samples[mine] = first + numpy.arange(mine.sum())
        return datasets, samples


@dataclass(frozen=True)
class Blend:
    """Corpora with weights, where a run takes a `Corpus`.

    Attributes:
        names: as the configuration has them.
        corpora: all made with the same tokenizer.
        weights: of each.
    """

    names: list[str]
    corpora: list[Corpus]
    weights: list[float]

    description = None  # of no single dataset

    def __post_init__(self):
        tokenizers = {corpus.tokenizer.sha256 if corpus.tokenizer else None for corpus in self.corpora}
        if len(tokenizers) > 1:
            listed = ", ".join(
                f"{name} ({corpus.tokenizer.sha256[:12] if corpus.tokenizer else 'no tokenizer'})"
                for name, corpus in zip(self.names, self.corpora, strict=True)
            )
            raise DataError(
                f"data.path: a blend needs datasets of one tokenizer, found {listed}; make them with dsmoe "
                "prepare-data --tokenizer"
            )
        smallest = min(self.weights) / math.fsum(self.weights)
        if smallest < SMALLEST_SHARE:
            raise DataError(
                f"data.path: found a share of {smallest:g} in the blend, expected {SMALLEST_SHARE:g} or more"
            )

    def order(self, seed: int) -> BlendOrder:
        return BlendOrder(self.weights, seed)

    @property
    def parts(self) -> list[Corpus]:
        return self.corpora

    @property
    def tokenizer(self):
        return self.corpora[0].tokenizer

    @property
    def cache_dir(self) -> str | None:
        return self.corpora[0].cache_dir

    @cached_property
    def vocab_size(self) -> int:
        return max(corpus.vocab_size for corpus in self.corpora)

    @property
    def eod_id(self) -> int | None:
        return self.corpora[0].eod_id

    @cached_property
    def bytes_per_token(self) -> float | None:
        """Of the held-out text, in which each dataset has its share."""
        each = [corpus.bytes_per_token for corpus in self.corpora]
        if None in each:
            return None
        return sum(w * x for w, x in zip(self.weights, each, strict=True)) / math.fsum(self.weights)

    def check_vocabulary(self, embedding_size: int) -> None:
        """As of a corpus, for all of them."""
        for corpus in self.corpora:
            corpus.check_vocabulary(embedding_size)

    def described(self, sequence_length: int, samples: int) -> str:
        """One line for each dataset: its share, its tokens, and how often a run of so many samples reads it."""
        total = math.fsum(self.weights)
        lines = []
        for name, corpus, weight in zip(self.names, self.corpora, self.weights, strict=True):
            passes = weight / total * samples * sequence_length / max(1, corpus.train.tokens)
            lines.append(
                f"blend   {weight / total:.2%} {name}: {corpus.train.tokens:,} tokens, read {passes:.2f} times; "
                f"{corpus.valid.tokens:,} held out"
            )
        return "\n".join(lines)
