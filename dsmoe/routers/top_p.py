"""Dynamic routing, "Harder Tasks Need More Experts": top-p over the softmax (arXiv 2403.07652, ACL 2024, section 2).

    P = softmax(x W);  experts in descending order of P;  t = the fewest whose P sum to more than p
    gate_e = P_e for the first t experts, else 0        at least one expert; p the same everywhere
      and renormalize: gate_e / sum_e gate_e            not in the paper; a token's only expert then has gate 1
    L_balance = alpha E sum_e f_e Q_e,  f_e = routes of e / T (no gradient), Q_e = mean_t P_te;  alpha = 1e-2
    L_entropy = beta mean_t(-sum_e P_te log P_te)       against flat P, which would activate everything;  beta = 1e-4

p = 0.4 (0.1 to 0.7 were tried; 1.76 experts of 16 on average, from 2.42 early in training). The expert that crosses p
is kept. `rule: above` is the released code (mass > p), `reach` the paper's text (mass >= p); they differ on ties only.
The released code keeps every expert of a token whose mass never exceeds p by rounding; here that happens at p = 1 only,
as it must. Its softmax runs in the model's dtype; here all is fp32. The training code was never released: that both
losses are a mean over layers of token means, and whose tokens f counts (`balance_scope`), are our choice.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from dsmoe.routers.base import BalanceScope, Router, RouterOptions, Routing
from dsmoe.routers.losses import balance_product, mean_over_tokens
from dsmoe.routers.registry import register
from dsmoe.routers.scores import Decision, in_blocks

Rule = Literal["above", "reach"]
LARGEST = 16  # experts of a token that are looked at before all of them are sorted


class TopPOptions(RouterOptions):
    p: float = Field(0.4, gt=0, le=1)  # probability mass to exceed
    rule: Rule = "above"  # mass > p (released code) or mass >= p (paper)
    renormalize: bool = False  # gates of a token sum to 1
    balance_coefficient: float = Field(1e-2, ge=0)  # alpha
    entropy_coefficient: float = Field(1e-4, ge=0)  # beta
    balance_scope: BalanceScope = "micro_batch"
    expected_experts: float | None = Field(None, gt=0)  # for counting active parameters only; None: as with a flat P

    def problems(self, model):
        return self.more_than_all("expected_experts", model)

    def mean_experts(self, model):
        """`expected_experts`, or without it the experts that a flat softmax needs: no P needs more, training less."""
        if self.expected_experts is not None:
            return self.expected_experts
        needed = self.p * model.num_experts
        return min(model.num_experts, math.ceil(needed) if self.rule == "reach" else math.floor(needed) + 1)


def top_p_map(probs_TE: Tensor, p: float | Tensor, rule: Rule) -> Tensor:
    """bool [T, E]: the fewest experts, largest first, whose fp32 probabilities sum to more than p (or reach it).

    An expert belongs to them while the mass before it has not crossed p; before the first that mass is 0. Of equal ones
    the first in order do.
    """
    probs_TE = probs_TE.detach()
    if probs_TE.device.type != "cpu" or probs_TE.size(1) < 4 * LARGEST:
        return map_by_sorting(probs_TE, p, rule)
    return _map_by_the_largest(probs_TE, p, rule)


def map_by_sorting(probs_TE: Tensor, p: float | Tensor, rule: Rule) -> Tensor:
    """The same, plainly."""
    sorted_TE, expert_TE = probs_TE.sort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(probs_TE, dtype=torch.bool).scatter_(1, expert_TE, _kept(sorted_TE, p, rule))


def _map_by_the_largest(probs_TE: Tensor, p: float | Tensor, rule: Rule) -> Tensor:
    """The same, where most tokens need a few experts of many: the others are sorted. It asks how many those are, for
    which a GPU would have to wait."""
    largest_Tm = probs_TE.topk(LARGEST, dim=-1).values
    place_T1 = _kept(largest_Tm, p, rule).sum(dim=-1, keepdim=True) - 1  # of the last expert that is kept
    least_T1 = largest_Tm.gather(1, place_T1)
    # Enough where one that is not kept was seen, and it is smaller.
    next_T1 = largest_Tm.gather(1, (place_T1 + 1).clamp(max=LARGEST - 1))
    map_TE = probs_TE >= least_T1
    rest = (~(next_T1 < least_T1)).squeeze(1).nonzero().squeeze(1)
    if len(rest):
        map_TE[rest] = map_by_sorting(probs_TE[rest], p, rule)
    return map_TE


def _kept(sorted_TX: Tensor, p: float | Tensor, rule: Rule) -> Tensor:
    before_TX = F.pad(sorted_TX.cumsum(dim=-1)[:, :-1], (1, 0))
    kept_TX = before_TX <= p if rule == "above" else before_TX < p
    # Rounded sums may reach 1 early. At p = 1 every expert stays; under any p the first one does.
    kept_TX = kept_TX | (p >= 1)
    kept_TX[:, 0] = True
    return kept_TX


@register("top_p")
class TopPRouter(Router):
    Options = TopPOptions

    def route(self, hidden_TH: Tensor, sequence_T: Tensor) -> Routing:
        return in_blocks(self._decide, self.gate_scores(hidden_TH))

    def _decide(self, logits_tE: Tensor, _, chosen: Tensor | None) -> Decision:
        return top_p_shares(logits_tE, chosen, self.options.p, self.options, renormalize=self.options.renormalize)

    def losses(self, routing, loads):
        return top_p_losses(self, routing, loads)


def top_p_shares(
    scores_tE: Tensor, chosen: Tensor | None, p: float | Tensor, options, *, renormalize: bool
) -> Decision:
    """P = softmax(scores) where an expert was chosen, and what `top_p_losses` needs."""
    softmax_tE = scores_tE.softmax(dim=-1)
    map_tE = top_p_map(softmax_tE, p, options.rule) if chosen is None else chosen
    share_tE = softmax_tE.masked_fill(map_tE.logical_not(), 0.0)
    if renormalize:
        share_tE = share_tE / share_tE.sum(dim=-1, keepdim=True)
    sums = {"softmax_sum_E": softmax_tE.sum(0)}
    if options.entropy_coefficient:
        # -sum P log P. Through log P there is no gradient, as that of sum P is 0.
        sums["entropy_sum"] = -torch.linalg.vecdot(softmax_tE, scores_tE.detach().log_softmax(dim=-1)).sum()
    return Decision(share_tE, map_tE, sums, chosen=map_tE)


def top_p_losses(router: Router, routing: Routing, loads: dict) -> dict[str, Tensor]:
    """Balance and entropy loss of one layer, its part of the mean over layers."""
    options, load, losses = router.options, loads[router.options.balance_scope], {}
    if options.balance_coefficient:
        product = balance_product(routing.kept["softmax_sum_E"], load)
        losses["balance"] = options.balance_coefficient / router.num_layers * product
    if options.entropy_coefficient:
        mean = mean_over_tokens(routing.kept["entropy_sum"], load)
        losses["entropy"] = options.entropy_coefficient / router.num_layers * mean
    return losses
