"""What a dataset is, wherever it lies: enough to know whether a run continues with the data that it began with."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from dsmoe.data.blend import Blend
from dsmoe.data.corpus import Corpus, Split

BLOCK, BLOCKS = 4096, 64  # bytes of the token file that are read, in evenly spaced blocks


def data_identity(corpus: Corpus | Blend) -> dict[str, Any]:
    """What a checkpoint remembers of the data: `train` and `valid`, each a fingerprint and its tokens; `tokenizer`, a
    sha256 or None.

    The fingerprint of a split is of its index, which says where every document ends, of the size and a part of the
    token file, and of the range of documents. Copies of a dataset have the same one.
    Of a blend the weights count too, since the order of samples depends on them.
    """
    if isinstance(corpus, Blend):
        return _blend_identity(corpus)
    return {
        "train": _split(corpus.train),
        "valid": _split(corpus.valid),
        "tokenizer": None if corpus.tokenizer is None else corpus.tokenizer.sha256,
    }


def name_of(split: Any) -> str:
    """A split of an identity, as messages name it."""
    if not isinstance(split, dict):
        return "none"
    return f"{split.get('tokens', 0):,} tokens ({str(split.get('fingerprint'))[:12]})"


def _blend_identity(blend: Blend) -> dict[str, Any]:
    each = [data_identity(part) for part in blend.corpora]
    identity: dict[str, Any] = {"tokenizer": each[0]["tokenizer"]}
    for split in ("train", "valid"):
        shares = blend.order(0).shares
        text = " ".join(f"{share!r} {part[split]['fingerprint']}" for share, part in zip(shares, each, strict=True))
        tokens = sum(part[split]["tokens"] for part in each)
        identity[split] = {"fingerprint": hashlib.sha256(text.encode()).hexdigest(), "tokens": tokens}
    return identity


def _split(split: Split) -> dict[str, Any]:
    digest = hashlib.sha256(f"{split.files.fingerprint} {split.first} {split.stop} ".encode())
    digest.update(_sample(split.files.prefix.with_name(split.files.prefix.name + ".bin")))
    return {"fingerprint": digest.hexdigest(), "tokens": split.tokens}


def _sample(path: Path) -> bytes:
    """The size of a file, and evenly spaced blocks of it, its first and last bytes among them."""
    size = path.stat().st_size
    starts = {round(i * max(0, size - BLOCK) / (BLOCKS - 1)) for i in range(BLOCKS)}
    with open(path, "rb") as file:
        blocks = []
        for start in sorted(starts):
            file.seek(start)
            blocks.append(file.read(BLOCK))
    return b" ".join([str(size).encode(), *blocks])
