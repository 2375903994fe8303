"""What of the GPU peers can be checked without their kernels: the layout of their weights, and why one is absent."""

from __future__ import annotations

import importlib.util
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dsmoe.lab.benchmark.peers import ScatterMoE, fill_grouped, megablocks_weights, peers, scattermoe_weights

E, H, FFN, K, TOKENS = 4, 8, 6, 2, 10


@pytest.fixture
def weights():
    torch.manual_seed(0)
    return torch.randn(E, 2 * FFN, H), torch.randn(E, H, FFN)


def swiglu(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ down.T


def test_megablocks_weights_compute_the_same_expert(weights):
    gate_up, down = weights
    w1, v1, w2 = (packed.view(E, FFN, H) for packed in megablocks_weights(gate_up, down))
    x = torch.randn(TOKENS, H)
    for e in range(E):
        actual = (F.silu(x @ w1[e].T) * (x @ v1[e].T)) @ w2[e]  # the products of its GLU
        torch.testing.assert_close(actual, swiglu(x, gate_up[e], down[e]))


class PlainScattered(nn.Module):
    """ScatterMoE's GLUMLP in plain torch: the second half of the first projection is activated."""

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor):
        super().__init__()
        self.first, self.second = scattermoe_weights(gate_up), down

    def forward(self, x, expert_p, expert_idxs):
        flat, out = x.flatten(0, 1), torch.zeros_like(x.flatten(0, 1))
        for t, (gates, chosen) in enumerate(zip(expert_p, expert_idxs, strict=True)):
            for gate, e in zip(gates, chosen.tolist(), strict=True):
                h, activated = (flat[t] @ self.first[e].T).chunk(2, dim=-1)
                out[t] += gate * (self.second[e] @ (F.silu(activated) * h))
        return out.view_as(x)


def test_scattermoe_behind_its_router_is_softmax_top_k(weights):
    gate_up, down = weights
    gate, x = nn.Parameter(torch.randn(E, H)), torch.randn(1, TOKENS, H)
    actual = ScatterMoE(PlainScattered(gate_up, down), gate, K)(x)[0]
    probs = (x[0] @ gate.T).softmax(-1)
    top, index = probs.topk(K, dim=-1)
    for t in range(TOKENS):
        expected = sum(p * swiglu(x[0, t], gate_up[e], down[e]) for p, e in zip(top[t], index[t], strict=True))
        torch.testing.assert_close(actual[t], expected / top[t].sum())


def test_megatron_grouped_weights_in_both_of_its_layouts(weights):
    gate_up, down = weights
    packed = nn.Module()
    packed.weight1, packed.weight2 = nn.Parameter(torch.empty(H, E * 2 * FFN)), nn.Parameter(torch.empty(E * FFN, H))
    fill_grouped(packed, gate_up, down)
    listed = nn.Module()
    listed.linear_fc1, listed.linear_fc2 = nn.Module(), nn.Module()
    for e in range(E):
        listed.linear_fc1.register_parameter(f"weight{e}", nn.Parameter(torch.empty(2 * FFN, H)))
        listed.linear_fc2.register_parameter(f"weight{e}", nn.Parameter(torch.empty(H, FFN)))
    fill_grouped(listed, gate_up, down)
    first, second = packed.weight1.view(E, H, -1), packed.weight2.view(E, -1, H)  # as its forward pass views them
    x = torch.randn(TOKENS, H)
    for e in range(E):
        gate, up = (x @ first[e]).chunk(2, dim=-1)
        expected = swiglu(x, gate_up[e], down[e])
        torch.testing.assert_close((F.silu(gate) * up) @ second[e], expected)
        own = (getattr(part, f"weight{e}") for part in (listed.linear_fc1, listed.linear_fc2))
        torch.testing.assert_close(swiglu(x, *own), expected)


@pytest.mark.parametrize(("name", "package"), [("MegaBlocks sparse", "megablocks"), ("ScatterMoE", "scattermoe")])
def test_a_peer_that_is_not_installed_says_which_package(name, package):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    assert name not in peers(1, "cpu")
    build = peers(1, "cuda:0")[name]

    class World:  # a build needs nothing of it before its import
        problem = None

    with pytest.raises(ModuleNotFoundError, match=package):
        build(World, name, ())


def test_only_layers_that_exchange_tokens_run_on_several_ranks():
    for fewer, more in pairwise((set(peers(2, "cpu")), set(peers(2, "cuda:0")), set(peers(1, "cuda:0")))):
        assert fewer < more
