"""The first pass over a corpus: how much there is, which documents are held out, and what the tokenizer learns from.

A document is held out by the hash of its content, so the split depends on neither order nor place, and a document that
occurs twice is never on both sides.
"""

from __future__ import annotations

import hashlib
import zlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from dsmoe.errors import DataError

SAMPLE_BYTES = 16_000_000  # of text for the tokenizer: more changes a vocabulary hardly, and only takes longer
CHUNK_CHARACTERS = 1000  # the unit in which text is sampled


@dataclass(frozen=True)
class Survey:
    """What the first pass found.

    Attributes:
        documents: number of documents.
        bytes: of all their text, in UTF-8.
        held_out_up_to: a document whose hash is at most this is held out; -1 where `held_out` says which are.
        held_out: hashes of documents from sources that were named as held out.
        sample: pieces of text from everywhere in the corpus, about `SAMPLE_BYTES` of them at most.
    """

    documents: int
    bytes: int
    held_out_up_to: int
    sample: list[str]
    held_out: frozenset[int] = frozenset()

    def is_held_out(self, hashed: int) -> bool:
        """Whether the document of that `document_hash` is."""
        return hashed <= self.held_out_up_to or hashed in self.held_out


def document_hash(text: str, seed: int) -> int:
    """64 bits that depend on the content and the seed only."""
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "big")


def survey_documents(
    texts: Iterable[str],
    valid_fraction: float,
    seed: int,
    expected_bytes: int | None,
    held_out: frozenset[int] = frozenset(),
) -> Survey:
    """Count, choose the held-out documents and sample text for the tokenizer.

    Args:
        texts: the documents.
        valid_fraction: of the documents, at least one on either side.
        seed: of the choice.
        expected_bytes: estimated size of all text, from which follows how much of it is sampled; None samples nothing.
        held_out: hashes of the documents to hold out; none: chosen by `valid_fraction`.

    Raises:
        DataError: there is no document, or there are not two different ones to split.
    """
    hashes = array("Q")
    total = 0
    sample: list[str] = []
    keep_below = 0 if expected_bytes is None else int(min(1.0, SAMPLE_BYTES / max(expected_bytes, 1)) * (1 << 32))
    for text in texts:
        hashed = document_hash(text, seed)
        hashes.append(hashed)
        total += byte_length(text)
        if keep_below and hashed not in held_out:
            chunks = (text[start : start + CHUNK_CHARACTERS] for start in range(0, len(text), CHUNK_CHARACTERS))
            sample += [chunk for chunk in chunks if zlib.crc32(chunk.encode("utf-8", "replace"), seed) < keep_below]
    if held_out:
        if held_out.issuperset(hashes):
            raise DataError("nothing is left to train on: every document of the sources is among the held-out ones")
        return Survey(len(hashes), total, -1, sample, held_out)
    return Survey(len(hashes), total, _split(hashes, valid_fraction), sample)


def byte_length(text: str) -> int:
    """Bytes of the text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "replace"))


def first_bytes(texts: Iterable[str], limit: int | None) -> Iterator[str]:
    """Documents until `limit` bytes are reached; the one that reaches it is the last. None: all of them."""
    total = 0
    for text in texts:
        yield text
        total += byte_length(text)
        if limit is not None and total >= limit:
            return


def _split(hashes: array, valid_fraction: float) -> int:
    """The largest hash that is held out."""
    if not hashes:
        raise DataError("the corpus is empty: no source holds any text")
    if len(hashes) == 1:
        raise DataError(
            "the corpus is one document, and at least two are needed: one to train on and one held out. A text file is "
            "one document: --split-documents makes several of it, or --valid names other text to hold out"
        )
    ordered = sorted(hashes)
    count = min(max(round(valid_fraction * len(ordered)), 1), len(ordered) - 1)
    while count and ordered[count - 1] == ordered[count]:  # equal documents stay together
        count -= 1
    if not count:
        count = next((index for index, value in enumerate(ordered) if value != ordered[0]), 0)
    if not count:
        raise DataError(f"all {len(ordered)} documents are equal: two different ones are needed, to hold one out")
    return ordered[count - 1]
