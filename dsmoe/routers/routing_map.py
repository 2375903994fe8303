"""Count in a routing map, bool [T, X]: which of T tokens goes to which of X experts or ranks.

torch converts every entry to int64 before it sums. Here eight entries are packed into one int64 and summed at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

ENTRIES_PER_WORD = 8
MAX_SUMMANDS = 255  # words whose sum does not overflow a byte
ROWS_PER_SUM = 128


def count_columns(map_TX: Tensor) -> Tensor:
    """int64 [X], tokens of each column."""
    packed = _packed(map_TX)
    if packed is None:
        return map_TX.sum(0)
    blocks = len(packed) // ROWS_PER_SUM
    by_block = packed[: blocks * ROWS_PER_SUM].view(blocks, ROWS_PER_SUM, packed.size(1)).sum(1).view(torch.uint8)
    return by_block.sum(0) + packed[blocks * ROWS_PER_SUM :].sum(0).view(torch.uint8)


def count_rows(map_TX: Tensor) -> Tensor:
    """int64 [T], columns of each token."""
    packed = _packed(map_TX)
    if packed is None or packed.size(1) > MAX_SUMMANDS:
        return map_TX.sum(1)
    return packed.sum(1).view(torch.uint8).view(-1, ENTRIES_PER_WORD).sum(1)


def any_in_row(map_TX: Tensor) -> Tensor:
    """bool [T], tokens with at least one column."""
    packed = _packed(map_TX)
    return (map_TX if packed is None else packed).any(1)


def _packed(map_TX: Tensor) -> Tensor | None:
    """int64 [T, X / 8] over the same memory; None if the layout does not allow it."""
    fits = (
        map_TX.is_contiguous()
        and map_TX.size(1) % ENTRIES_PER_WORD == 0
        and map_TX.storage_offset() % ENTRIES_PER_WORD == 0
    )
    return map_TX.view(torch.int64) if fits else None
