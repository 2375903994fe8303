"""Experts of another MLP than SwiGLU train the same on any ranks: with biases, without a gate, without rows."""

from __future__ import annotations

import fixed_routes  # noqa: F401  (registers the router)
import pytest
import torch
from ranks import run_ranks
from steps import joined, tiny_config, train_each

EXPERTS = {"reglu with biases": ("reglu", True), "no gate": ("relu2", False), "swiglu with biases": ("swiglu", True)}
ROUTERS = ({"name": "topk", "k": 2}, {"name": "fixed", "routes": "last_experts_receive_nothing"})


def configs(expert_parallel: int, stage: int) -> list:
    return [
        tiny_config(
            router=router,
            model={"expert_activation": activation, "expert_bias": bias},
            parallel={"expert_parallel": expert_parallel, "zero_stage": stage},
            training={"weight_decay": 0.5},
        )
        for activation, bias in EXPERTS.values()
        for router in ROUTERS
    ]


def train_all(configs: list) -> list[tuple]:
    """Of this module, so that ranks know the router."""
    return train_each(configs, 3)


def test_layout_and_zero_stage_change_nothing():
    """EP 1 and 2, ZeRO 1 and 3; one of the two ranks has experts without any row."""
    expected = joined(run_ranks(1, train_all, configs(1, 1)))
    for expert_parallel, stage in ((2, 1), (2, 3), (1, 3)):
        actual = joined(run_ranks(2, train_all, configs(expert_parallel, stage)))
        for (history, tensors), (wanted_history, wanted) in zip(actual, expected, strict=True):
            for before, after in zip(wanted_history, history, strict=True):
                for quantity in ("loss", "grad_norm"):
                    assert after[quantity] == pytest.approx(before[quantity], abs=1e-5), quantity
            assert tensors.keys() == wanted.keys()
            for name, tensor in wanted.items():
                assert (tensors[name] - tensor).abs().max() <= 1e-5, name
    for (_, tensors), config in zip(expected, configs(1, 1), strict=True):
        biases = {name: tensor for name, tensor in tensors.items() if name.endswith("_bias")}
        assert bool(biases) == config.model.expert_bias
        prefix = "weight|gpt.decoder.layers.0.mlp.experts"
        for name in biases:
            if name.startswith("weight|") and config.router.name == "fixed":  # experts 2 and 3 have no token
                assert torch.any(tensors[name] != 0) == (int(name.split(".experts.")[1][0]) < 2), name
        if config.router.name == "fixed":  # and their matrices shrink by weight decay alone
            assert tensors[f"exp_avg|{prefix[7:]}.3.down_proj"].abs().max() == 0
