"""What a configuration stands for, known without processes and without the whole model's memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from dsmoe.config import ModelConfig, RouterConfig
from dsmoe.model.gpt import build_gpt, transformer_config
from dsmoe.model.initialize import initialize
from dsmoe.model.names import logical_tensors, parameter_pieces
from dsmoe.parallel.groups import ParallelGroups
from dsmoe.routers import get


def logical_shapes(model: ModelConfig, router: RouterConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every tensor of the whole model, in the model's order; it is built on the meta device.

    `model.vocab_size` must be set. A model of dense layers alone is allowed here.
    """
    router_class = get(router.name)
    whole = nn.Module()
    with torch.device("meta"):
        options = router_class.Options.model_validate(router.options)
        whole.gpt = build_gpt(model, (router_class, options), _one_process())
    return {piece.name: piece.shape for _, pieces in parameter_pieces(whole) for piece in pieces}


def initial_router(model: ModelConfig, router: RouterConfig, layer: int, seed: int) -> dict[str, Tensor]:
    """The tensors of one layer's router with which training begins, by canonical name."""
    router_class = get(router.name)
    options = router_class.Options.model_validate(router.options)
    whole = module = nn.Module()
    for part in f"gpt.decoder.layers.{layer}.mlp".split("."):
        module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    groups = _one_process().for_megatron()
    module.add_module("router", router_class(transformer_config(model, 1), groups, options=options))
    initialize(whole, seed, model)
    return dict(logical_tensors(whole))


def _one_process() -> ParallelGroups:
    """Groups that know what construction asks of them: that they have one rank, and which."""
    alone: Any = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    return ParallelGroups(ep=alone, edp=alone, dp=alone, solo=alone)
