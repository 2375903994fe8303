"""The tensors a configuration stands for, known without making them: the model is built on torch's meta device."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from dsmoe.config import ModelConfig, RouterConfig
from dsmoe.model.gpt import build_gpt
from dsmoe.model.names import parameter_pieces
from dsmoe.parallel.groups import ParallelGroups
from dsmoe.routers import get


def logical_shapes(model: ModelConfig, router: RouterConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every tensor of the whole model, in the model's order; needs no processes.

    `model.vocab_size` must be set. A model of dense layers alone is allowed here.
    """
    router_class = get(router.name)
    options = router_class.Options.model_validate(router.options)
    alone = SimpleNamespace(size=lambda: 1, rank=lambda: 0)  # all that construction asks a group for
    groups = ParallelGroups(ep=alone, edp=alone, dp=alone, solo=alone, ep_name="ep_size_1")
    whole = torch.nn.Module()
    with torch.device("meta"):
        whole.gpt = build_gpt(model, (router_class, options), groups)
    return {piece.name: piece.shape for _, pieces in parameter_pieces(whole) for piece in pieces}
