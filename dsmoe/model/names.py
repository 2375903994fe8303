"""Canonical names of a model's tensors: one tensor for each expert, named by its global id.

A rank holds its experts packed, `...experts.gate_up_proj` [e, 2F, H]. Everything that must not depend on the layout
(initialisation, checkpoints, exports) sees `...experts.7.gate_up_proj` [2F, H] instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from dsmoe.optim.deepspeed import logical_shape


@dataclass(frozen=True)
class Piece:
    """One logical tensor inside a parameter: elements [start, start + numel) of the flattened parameter."""

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int


def parameter_pieces(model: nn.Module) -> Iterator[tuple[nn.Parameter, list[Piece]]]:
    """Every parameter with the logical tensors it holds, in a fixed order; shared parameters come once.

    A parameter [e, ...] with an attribute `first_expert` holds one tensor for each of e experts.
    """
    for name, parameter in model.named_parameters():
        shape = logical_shape(parameter)
        first = getattr(parameter, "first_expert", None)
        if first is None:
            yield parameter, [Piece(name, shape, 0, math.prod(shape))]
            continue
        module, _, own = name.rpartition(".")
        numel = math.prod(shape[1:])
        yield parameter, [Piece(f"{module}.{first + i}.{own}", shape[1:], i * numel, numel) for i in range(shape[0])]


def logical_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(canonical name, view into the parameter) of all tensors of an unpartitioned model."""
    for parameter, pieces in parameter_pieces(model):
        flat = parameter.data.view(-1)
        for piece in pieces:
            yield piece.name, flat[piece.start : piece.start + piece.numel].view(piece.shape)
