"""How alike the experts of a layer are, by what they do and by what they are made of.

Shapes: e experts, N tokens, H hidden, F expert width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsmoe.moe.experts import LowRankExperts
from dsmoe.moe.layer import VariableMoELayer

SIMILAR = 0.9
TOKENS = 256  # that all experts are applied to
ELEMENTS = 1 << 25  # of their outputs at a time
PAIRS = 4096  # whose weights are compared; of more, a seeded sample


@torch.no_grad()
def similarity(layer: VariableMoELayer, hidden_TH: Tensor) -> dict[str, dict[str, float]]:
    """`cosine`, `cka` and `weights` of a layer. A layer of one expert has no pair, and nothing to report."""
    experts = layer.experts.num_local_experts
    if experts == 1:
        return {}
    count = max(2, min(TOKENS, len(hidden_TH), ELEMENTS // (experts * hidden_TH.size(1))))
    order = torch.randperm(len(hidden_TH), generator=torch.Generator().manual_seed(0))
    outputs_eNH = all_outputs(layer, hidden_TH[order[:count].to(hidden_TH.device)])
    units_eFK = hidden_units(layer)
    # Random units of the same shape, and of the same size in gate, up and down.
    hidden = layer.experts.mlp.hidden
    size_K = units_eFK.unflatten(2, (-1, hidden)).square().mean((0, 1, 3)).sqrt().repeat_interleave(hidden)
    random = torch.randn(2, *units_eFK.shape[1:], generator=torch.Generator().manual_seed(0))
    chance = matched(*(random.to(units_eFK.device) * size_K))
    return {
        "cosine": _summary(_of_pairs(cosine(outputs_eNH))),
        "cka": _summary(_of_pairs(cka(outputs_eNH))),
        "weights": {**_summary(weight_similarities(units_eFK)), "chance": chance},
    }


def all_outputs(layer: VariableMoELayer, rows_NH: Tensor) -> Tensor:
    """Every expert on the same rows, with weight 1: [e, N, H]."""
    experts, count = layer.experts.num_local_experts, len(rows_NH)
    rows = rows_NH.repeat(experts, 1)
    counts = torch.full((experts,), count, device=rows.device)
    expert_kwargs = {}
    if isinstance(layer.experts, LowRankExperts):
        expert_kwargs["reduce_erH"] = layer.router.own_reduce_erH.to(rows.dtype)
    outputs, _ = layer.experts(rows, counts, torch.ones(len(rows), device=rows.device), **expert_kwargs)
    return outputs.view(experts, count, -1)


def cosine(outputs_eNH: Tensor) -> Tensor:
    """[e, e]: the cosine of two experts' outputs for a token, mean over tokens."""
    flat = F.normalize(outputs_eNH.float(), dim=-1).flatten(1)
    return flat @ flat.T / outputs_eNH.size(1)


def cka(outputs_eNH: Tensor) -> Tensor:
    """[e, e]: linear centred kernel alignment (arXiv 1905.00414), which sees through rotations of the output."""
    centred = outputs_eNH.float() - outputs_eNH.float().mean(1, keepdim=True)
    grams = F.normalize((centred @ centred.mT).flatten(1), dim=1)
    return grams @ grams.T


def hidden_units(layer: VariableMoELayer) -> Tensor:
    """[e, F, 3H], or 2H without a gate: of each hidden unit what it looks for (gate and up) and what it writes (down).
    A gate of low rank is multiplied out; biases are left out."""
    experts = layer.experts
    if isinstance(experts, LowRankExperts):
        reduce = layer.router.own_reduce_erH
        inputs: tuple[Tensor, ...] = (experts.gate_proj.float() @ reduce.float(), experts.up_proj.float())
    elif experts.mlp.function.gated:
        inputs = tuple(experts.gate_up_proj.float().chunk(2, dim=1))
    else:
        inputs = (experts.up_proj.float(),)
    return torch.cat((*inputs, experts.down_proj.float().mT), dim=-1)


def weight_similarities(units_eFK: Tensor) -> Tensor:
    """Of pairs of experts. Hidden units have no order, so each is compared with the one it is most like."""
    pairs = torch.triu_indices(len(units_eFK), len(units_eFK), offset=1).T
    if len(pairs) > PAIRS:
        pairs = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))[:PAIRS]]
    return torch.tensor([matched(units_eFK[first], units_eFK[second]) for first, second in pairs.tolist()])


def matched(first_FK: Tensor, second_FK: Tensor) -> float:
    """Cosine of each unit with its best match in the other expert: mean over the units of both."""
    cosines = F.normalize(first_FK, dim=1) @ F.normalize(second_FK, dim=1).T
    return float((cosines.amax(0).mean() + cosines.amax(1).mean()) / 2)


def _of_pairs(matrix_ee: Tensor) -> Tensor:
    rows, columns = torch.triu_indices(len(matrix_ee), len(matrix_ee), offset=1)
    return matrix_ee[rows, columns]


def _summary(values: Tensor) -> dict[str, float]:
    return {
        "mean": float(values.mean()), "max": float(values.max()), "similar": float((values > SIMILAR).float().mean())
    }  # fmt: skip
