"""Initial weights, which depend on the configuration, the seed and a parameter's name only.

Each tensor has a random generator of its own, seeded by its canonical name; an expert's name holds its global id. So
the weights are the same at every EP size and on every rank, whatever order modules are built in, and no two experts
start alike (Megatron's CPU initialisation would repeat them on every EP rank).
"""

from __future__ import annotations

import hashlib
import math
from fnmatch import fnmatchcase

import torch
from torch import nn

from dsmoe.config import ModelConfig
from dsmoe.errors import ConfigError
from dsmoe.model.names import parameter_pieces

ZERO = "linear_qkv.bias"
INTO_RESIDUAL = ("linear_proj.weight", "linear_fc2.weight", "down_proj")


@torch.no_grad()
def initialize(model: nn.Module, seed: int, config: ModelConfig) -> None:
    """Draw every matrix from N(0, init_std), projections into the residual stream from N(0, init_std / sqrt(2 layers)).

    `config.initialization` has exceptions by canonical name. Biases are 0; other vectors (norm scales, and what a
    router sets in its constructor) keep the values their module gave them. A router's matrix may ask for another
    standard deviation with an attribute `init_std`.
    """
    into_residual = config.init_std / math.sqrt(2 * config.num_layers)
    for parameter, pieces in parameter_pieces(model):
        for piece in pieces:
            if piece.name.endswith(ZERO):
                parameter.data.zero_()
            if len(piece.shape) < 2:
                continue
            drawn, generator = torch.empty(piece.numel, dtype=torch.float32), generator_of(seed, piece.name)
            exception = config.initialization_of(piece.name)
            if exception is None:
                default = into_residual if piece.name.endswith(INTO_RESIDUAL) else config.init_std
                drawn.normal_(0.0, getattr(parameter, "init_std", default), generator=generator)
            elif exception.distribution == "normal":
                drawn.normal_(0.0, exception.std_of(piece.shape[-1]), generator=generator)
            else:
                bound = math.sqrt(3) * exception.std_of(piece.shape[-1])
                drawn.uniform_(-bound, bound, generator=generator)
            parameter.data.view(-1)[piece.start : piece.start + piece.numel] = drawn


def check_initialization(model: nn.Module, config: ModelConfig) -> None:
    """Raises `ConfigError` for entries of `config.initialization` that match no matrix of the model, on any rank."""
    if not config.initialization:
        return
    names = [
        name
        for parameter, pieces in parameter_pieces(model)
        if len(pieces[0].shape) >= 2
        for name in _names_on_all_ranks(parameter, pieces[0].name, config.num_experts)
    ]
    mistakes = [
        f"model.initialization: {rule.tensors!r} matches no matrix of the model; a name is for example {names[-1]}"
        for rule in config.initialization
        if not any(fnmatchcase(name, rule.tensors) for name in names)
    ]
    if mistakes:
        raise ConfigError(mistakes)


def _names_on_all_ranks(parameter: nn.Parameter, name: str, num_experts: int) -> list[str]:
    """Canonical names of a parameter's tensors, those of other ranks' experts included."""
    first = getattr(parameter, "first_expert", None)
    if first is None:
        return [name]
    module, _, own = name.rpartition(f".{first}.")
    return [f"{module}.{expert}.{own}" for expert in range(num_experts)]


def generator_of(seed: int, name: str) -> torch.Generator:
    """The random generator, on the CPU, of everything that is drawn for the tensor of that canonical name."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
