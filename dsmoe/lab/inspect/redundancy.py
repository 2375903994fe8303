"""Which experts of a layer do the same, by what they do and by what they are made of, and which pairs to merge.

On the same sampled inputs x of the layer, every expert with weight 1:

    output_cosine   cosine of two experts' outputs, mean over x
    output_cka      linear centred kernel alignment of them (Kornblith et al., arXiv 1905.00414): blind to rotations
    weights         each hidden unit (its rows of gate and up, its column of down) against the most similar one of the
                    other expert, since units have no order: cosine, mean over the units of both
    weights_chance  the same of random units of that shape and size

A pair to merge has outputs with a cosine above 0.9; pairs are taken from the most alike down, each expert once. Merging
by outputs is HC-SMoE's choice (arXiv 2410.08589), and weighting by load M-SMoE's (2310.01334). Experts whose outputs
agree can still matter by when they are chosen: what a merge costs in loss has to be measured.

Shapes: L MoE layers, E experts, N sampled tokens, H hidden, F expert width.
"""

from __future__ import annotations

import torch

from dsmoe.lab.inspect.models import ExpertWeights, InspectedModel
from dsmoe.lab.inspect.reading import Reading
from dsmoe.lab.study.probe.similarity import SIMILAR, cka, cosine, matched

ELEMENTS = 1 << 26  # of all experts' outputs at a time
WORK = 2e11  # multiplications of a layer's weight comparisons; of more pairs only the most alike are compared
LISTED = 12  # pairs


@torch.no_grad()
def redundancy(model: InspectedModel, reading: Reading) -> list[dict]:
    """For each layer: `cosine` [E, E], its mean over pairs and the largest, `pairs` (the most alike first, with all
    figures) and `merge` (pairs above 0.9, each expert once). A layer of one expert has no pairs."""
    layers = []
    for layer, hidden_NH in enumerate(reading.hidden_LNH):
        weights = model.experts(layer)
        together_EE = reading.map_LTE[layer].astype("float64").T @ reading.map_LTE[layer].astype("float64")
        layers.append(compare_experts(weights, hidden_NH.to(weights.down_EHF.device), together_EE))
    return layers


def compare_experts(weights: ExpertWeights, hidden_NH: torch.Tensor, together_EE) -> dict:
    experts, hidden, width = weights.down_EHF.shape
    if experts == 1:
        return {"cosine": [[1.0]], "mean": None, "max": None, "weights_chance": None, "pairs": [], "merge": []}
    outputs_ENH = weights.outputs(hidden_NH[: max(2, ELEMENTS // (experts * hidden))])
    cosine_EE, cka_EE = cosine(outputs_ENH), cka(outputs_ENH)
    first, second = torch.triu_indices(experts, experts, offset=1)
    values = cosine_EE[first, second]
    order = values.argsort(descending=True, stable=True).tolist()
    affordable = max(LISTED, int(WORK / (width * width * 3 * hidden)))
    pairs = []
    for place in order[: min(affordable, len(order))]:
        a, b = int(first[place]), int(second[place])
        pairs.append(
            {
                "experts": [a, b],
                "output_cosine": float(values[place]),
                "output_cka": float(cka_EE[a, b]),
                "weights": matched(weights.units(a), weights.units(b)),
                "tokens": [int(together_EE[a, a]), int(together_EE[b, b])],
                "tokens_of_both": int(together_EE[a, b]),
            }
        )
    return {
        "cosine": cosine_EE.tolist(),
        "mean": float(values.mean()),
        "max": float(values.max()),
        "weights_chance": _chance(weights),
        "pairs": pairs,
        "merge": to_merge(pairs),
    }


def to_merge(pairs: list[dict], least: float = SIMILAR) -> list[list[int]]:
    """Of pairs in order of likeness those above `least`, each expert in one pair."""
    taken: set[int] = set()
    chosen = []
    for pair in pairs:
        if pair["output_cosine"] > least and not taken & set(pair["experts"]):
            taken |= set(pair["experts"])
            chosen.append(pair["experts"])
    return chosen


def _chance(weights: ExpertWeights) -> float:
    """Random units whose gate, up and down parts have the root mean square of the layer's."""
    sizes = torch.stack([part.square().mean().sqrt() for part in weights.parts])
    _, hidden, width = weights.down_EHF.shape
    random = torch.randn(2, width, len(sizes), hidden, generator=torch.Generator().manual_seed(0)).to(sizes.device)
    first, second = (random * sizes.view(1, 1, -1, 1)).flatten(2)
    return matched(first, second)
