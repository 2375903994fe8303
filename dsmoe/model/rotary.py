"""Rotary position embedding (Su et al., RoFormer, equation 34), halves of a head paired as in Llama's weights.

Shapes: S positions, B sequences, h heads, d head size, even.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Angles(NamedTuple):
    """Of each position and pair of elements, fp32 [S, d / 2]."""

    cosine: Tensor
    sine: Tensor


def angles(positions_S: Tensor, size: int, base: float) -> Angles:
    """Element i turns by position * base^(-2 i / d)."""
    frequencies = 1 / base ** (torch.arange(0, size, 2, dtype=torch.float32, device=positions_S.device) / size)
    angles_Si = positions_S.float().unsqueeze(1) * frequencies
    return Angles(angles_Si.cos(), angles_Si.sin())


def turn(x: Tensor, by: Angles | None) -> Tensor:
    """x [S, B, h, d] with elements i and i + d / 2 of each head turned together by the angle of its position; as it is
    without angles."""
    if by is None:
        return x
    cosine, sine = (part[:, None, None].to(x.dtype) for part in by)
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cosine - high * sine, high * cosine + low * sine), dim=-1)
