"""Initial weights that depend on the seed and a parameter's name only.

Each tensor has a random generator of its own, seeded by its canonical name; an expert's name holds its global id. So
the weights are the same at every EP size and on every rank, whatever order modules are built in, and no two experts
start alike (Megatron's CPU initialisation would repeat them on every EP rank).
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import nn

from dsmoe.model.names import parameter_pieces

INTO_RESIDUAL = ("linear_proj.weight", "linear_fc2.weight", "down_proj")


@torch.no_grad()
def initialize(model: nn.Module, seed: int, std: float, num_layers: int) -> None:
    """Draw every matrix from N(0, std), projections into the residual stream from N(0, std / sqrt(2 num_layers)).

    Vectors (norm scales, and what a router sets in its constructor) keep the values their module gave them. A router's
    matrix may ask for a standard deviation of its own with an attribute `init_std`.
    """
    into_residual = std / math.sqrt(2 * num_layers)
    for parameter, pieces in parameter_pieces(model):
        for piece in pieces:
            if len(piece.shape) < 2:
                continue
            usual = into_residual if piece.name.endswith(INTO_RESIDUAL) else std
            drawn = torch.empty(piece.numel, dtype=torch.float32)
            drawn.normal_(0.0, getattr(parameter, "init_std", usual), generator=generator_of(seed, piece.name))
            parameter.data.view(-1)[piece.start : piece.start + piece.numel] = drawn


def generator_of(seed: int, name: str) -> torch.Generator:
    """The random generator, on the CPU, of everything that is drawn for the tensor of that canonical name."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
