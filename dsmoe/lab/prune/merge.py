"""Experts of which some are means of others: their weights, so that a layer's output changes as little as it can.

Hidden units of an expert have no order, so each unit of the others is matched with the one of the busiest that it is
most like before they are averaged; where the busiest alone comes nearer to what they did together, it stays as it is.
Then its output is scaled by least squares: two experts that both took a token come back as one.

Shapes: L MoE layers, E experts before, N after, T tokens, H hidden, F expert width.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from dsmoe.lab.prune.choose import LayerPlan
from dsmoe.lab.prune.observe import LayerSeen
from dsmoe.lab.study.probe.similarity import all_outputs, hidden_units
from dsmoe.model.gpt import LanguageModel
from dsmoe.moe.experts import LowRankExperts
from dsmoe.moe.layer import VariableMoELayer, moe_layers_of


@torch.no_grad()
def fill(model: LanguageModel, source: LanguageModel, seen: list[LayerSeen], plans: list[LayerPlan]) -> None:
    """Give a model with N experts the weights of `source`, its experts by the plans, and its controller's state."""
    whole = isinstance(seen[0].layer.experts, LowRankExperts)  # the latents of two experts cannot be averaged
    shares_LNE = torch.stack([torch.tensor(plan.shares_NE(whole)) for plan in plans]).to(seen[0].probs_NE.device)
    of_layers = {
        id(p) for layer in seen for part in (layer.layer.router, layer.layer.experts) for p in part.parameters()
    }
    theirs = dict(source.named_parameters())
    for name, parameter in model.named_parameters():
        if id(theirs[name]) not in of_layers:
            parameter.copy_(theirs[name])
    if source.controller is not None:
        model.controller.load({n: v.clone() for n, v in source.controller.combine_experts(shares_LNE).items()})
    targets = moe_layers_of(model)
    for target, layer, plan, shares_NE in zip(targets, seen, plans, shares_LNE, strict=True):
        _fill_router(target, layer, shares_NE)
        _fill_experts(model, target, layer, plan, shares_NE)


def _fill_router(target: VariableMoELayer, seen: LayerSeen, shares_NE: Tensor) -> None:
    router, theirs = seen.layer.router, dict(seen.layer.router.named_parameters())
    for name, parameter in target.router.named_parameters():
        value = theirs[name]
        if router.has_row_per_expert(name, tuple(value.shape)):
            value = torch.einsum("ne,e...->n...", shares_NE.to(value), value)
        parameter.copy_(value)


def _fill_experts(
    model: LanguageModel, target: VariableMoELayer, seen: LayerSeen, plan: LayerPlan, shares_NE: Tensor
) -> None:
    theirs = dict(seen.layer.experts.named_parameters())
    busiest = [max(cluster, key=lambda expert: plan.counts_E[expert]) for cluster in plan.clusters]
    for name, parameter in target.experts.named_parameters():
        parameter.copy_(theirs[name][busiest])
    if not plan.merged:
        return
    probs_TN = _probs(model, target, seen.hidden_NH)
    outputs_ETH = seen.outputs_ENH()
    tokens = outputs_ETH.size(1)
    mlp = target.experts.mlp
    can_average = mlp.function.gated and not mlp.bias and not isinstance(target.experts, LowRankExperts)
    averaged = hidden_units(seen.layer) if can_average else None
    alone_NTH = all_outputs(target, seen.hidden_NH[:tokens])
    for new, cluster in enumerate(plan.clusters):
        if len(cluster) == 1:
            continue
        wanted_TH = torch.einsum("te,eth->th", seen.probs_NE[:tokens, cluster], outputs_ETH[cluster])
        weight_T1 = probs_TN[:tokens, new : new + 1]
        scale, error = _scale(wanted_TH, weight_T1 * alone_NTH[new])
        if averaged is not None:
            before = {name: parameter[new].clone() for name, parameter in target.experts.named_parameters()}
            _set_units(target, new, _mean_units(averaged, cluster, shares_NE[new], busiest[new]))
            together = all_outputs(target, seen.hidden_NH[:tokens])[new]
            scale_of_mean, error_of_mean = _scale(wanted_TH, weight_T1 * together)
            if error_of_mean < error:
                scale = scale_of_mean
            else:
                for name, parameter in target.experts.named_parameters():
                    parameter[new] = before[name]
        for name in {"down_proj", *mlp.biases[-1:]}:
            getattr(target.experts, name)[new] *= scale


def _probs(model: LanguageModel, layer: VariableMoELayer, hidden_TH: Tensor) -> Tensor:
    """How the router that has its rows already weighs these tokens."""
    model.recorder.begin()
    return layer.router(hidden_TH.unsqueeze(1)).probs_TE


def _scale(wanted_TH: Tensor, output_TH: Tensor) -> tuple[float, float]:
    """The factor that brings an output nearest to what is wanted, and the squared error that stays. No token: 1."""
    power = output_TH.square().sum()
    if not power > 0:
        return 1.0, float(wanted_TH.square().sum())
    scale = float((wanted_TH * output_TH).sum() / power)
    return scale, float((wanted_TH - scale * output_TH).square().sum())


def _mean_units(units_EFK: Tensor, cluster: list[int], shares_E: Tensor, busiest: int) -> Tensor:
    """[F, 3H]: weighted mean of the cluster's hidden units, in the order of the busiest expert's."""
    mean = torch.zeros_like(units_EFK[busiest])
    for expert in cluster:
        units = units_EFK[expert]
        if expert != busiest:
            likeness = torch.nn.functional.normalize(units_EFK[busiest], dim=1)
            likeness = likeness @ torch.nn.functional.normalize(units, dim=1).T
            _, order = linear_sum_assignment(np.asarray(likeness.cpu()), maximize=True)
            units = units[torch.as_tensor(order, device=units.device)]
        mean += shares_E[expert].to(mean) * units
    return mean


def _set_units(layer: VariableMoELayer, expert: int, units_FK: Tensor) -> None:
    gate, up, down = units_FK.chunk(3, dim=1)
    layer.experts.gate_up_proj[expert] = torch.cat((gate, up))
    layer.experts.down_proj[expert] = down.T
