"""Counting in a map of routes, bool [T, X]: which of T tokens goes to which of X experts or ranks.

torch makes int64 of every entry before it adds them up. Here eight entries lie in one number, and are added at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

PACKED, MOST, ROWS = 8, 255, 128  # entries of a number; numbers whose sum keeps them apart; as many as are added here


def count_columns(map_TX: Tensor) -> Tensor:
    """int64 [X], how many tokens have each."""
    packed = _packed(map_TX)
    if packed is None:
        return map_TX.sum(0)
    blocks = len(packed) // ROWS
    by_block = packed[: blocks * ROWS].view(blocks, ROWS, packed.size(1)).sum(1).view(torch.uint8)
    return by_block.sum(0) + packed[blocks * ROWS :].sum(0).view(torch.uint8)


def count_rows(map_TX: Tensor) -> Tensor:
    """int64 [T], how many each token has."""
    packed = _packed(map_TX)
    if packed is None or packed.size(1) > MOST:
        return map_TX.sum(1)
    return packed.sum(1).view(torch.uint8).view(-1, PACKED).sum(1)


def any_in_row(map_TX: Tensor) -> Tensor:
    """bool [T], which tokens have any."""
    packed = _packed(map_TX)
    return (map_TX if packed is None else packed).any(1)


def _packed(map_TX: Tensor) -> Tensor | None:
    """int64 [T, X / 8] over the same memory; None where it does not fit."""
    fits = map_TX.is_contiguous() and map_TX.size(1) % PACKED == 0 and map_TX.storage_offset() % PACKED == 0
    return map_TX.view(torch.int64) if fits else None
