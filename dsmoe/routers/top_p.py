"""Dynamic routing, "Harder Tasks Need More Experts": top-p over the softmax (arXiv 2403.07652, ACL 2024, section 2).

    P = softmax(x W);  experts in descending order of P;  t = the fewest whose P sum to more than p
    gate_e = P_e for the first t experts, else 0        at least one expert; p the same everywhere
      and renormalize: gate_e / sum_e gate_e            not in the paper; a token's only expert then has gate 1
    L_balance = alpha E sum_e f_e Q_e,  f_e = routes of e / T (no gradient), Q_e = mean_t P_te;  alpha = 1e-2
    L_entropy = beta mean_t(-sum_e P_te log P_te)       against flat P, which would activate everything;  beta = 1e-4

p = 0.4 (0.1 to 0.7 were tried; 1.76 experts of 16 on average, from 2.42 early in training). The expert that crosses p
is included. `rule: above` is the released code (mass > p), `reach` the paper's text (mass >= p); they differ on ties
only. If rounding keeps the mass of a token from ever exceeding p, the released code selects every expert; here only
p = 1 does. Its softmax runs in the model's dtype, ours in fp32. The training code was never released: averaging both
losses over layers and tokens, and the tokens that f counts (`balance_scope`), are our choice.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from dsmoe.routers.base import INFERENCE_FILE, BalanceScope, Router, RouterOptions, Routing, scaled_settings
from dsmoe.routers.losses import balance_product, mean_over_tokens
from dsmoe.routers.registry import register
from dsmoe.routers.scores import Decision, in_blocks

CrossingRule = Literal["above", "reach"]
MAX_FAST_EXPERTS = 16  # experts of a token that are compared before all of its experts are sorted


class TopPOptions(RouterOptions):
    FUTURE_ONLY = RouterOptions.FUTURE_ONLY | {"expected_experts"}

    p: float = Field(0.4, gt=0, le=1)  # probability mass to exceed
    rule: CrossingRule = "above"  # mass > p (released code) or mass >= p (paper)
    renormalize: bool = False  # gates of a token sum to 1
    balance_coefficient: float = Field(1e-2, ge=0)  # alpha
    entropy_coefficient: float = Field(1e-4, ge=0)  # beta
    balance_scope: BalanceScope = "micro_batch"  # tokens that are counted: all ranks', a rank's, the step's so far
    expected_experts: float | None = Field(None, gt=0)  # for counting active parameters only; None: those of a flat P

    def validate_for_model(self, model):
        return self.at_most_num_experts("expected_experts", model)

    def target_experts_per_token(self, model):
        """`expected_experts` or, if unset, the experts that a flat softmax needs, which is the most a token can use."""
        if self.expected_experts is not None:
            return self.expected_experts
        needed = self.p * model.num_experts
        return min(model.num_experts, math.ceil(needed) if self.rule == "reach" else math.floor(needed) + 1)

    def gates_sum_to_one(self):
        return self.renormalize

    @classmethod
    def aim_at(cls, experts_per_token, num_experts):
        return {"expected_experts": experts_per_token}

    def inference_option(self):
        return "p"

    def inference_settings(self, num_experts):
        return scaled_settings("p", self.p, maximum=1.0)


def top_p_map(probs_TE: Tensor, p: float | Tensor, rule: CrossingRule) -> Tensor:
    """bool [T, E]: the fewest experts, largest first, whose fp32 probabilities sum to more than p (or reach it).

    An expert is selected if the mass before it has not crossed p; before the first that mass is 0. Ties go to the lower
    index.
    """
    probs_TE = probs_TE.detach()
    if probs_TE.device.type != "cpu" or probs_TE.size(1) < 4 * MAX_FAST_EXPERTS:
        return map_by_sorting(probs_TE, p, rule)
    return _map_by_the_largest(probs_TE, p, rule)


def map_by_sorting(probs_TE: Tensor, p: float | Tensor, rule: CrossingRule) -> Tensor:
    """The reference: sorts all experts of all tokens."""
    sorted_TE, expert_TE = probs_TE.sort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(probs_TE, dtype=torch.bool).scatter_(1, expert_TE, _selected(sorted_TE, p, rule))


def _map_by_the_largest(probs_TE: Tensor, p: float | Tensor, rule: CrossingRule) -> Tensor:
    """The same for many experts of which most tokens need few: only the remaining tokens are sorted. Counting those
    would make a GPU wait."""
    largest_Tm = probs_TE.topk(MAX_FAST_EXPERTS, dim=-1).values
    last_T1 = _selected(largest_Tm, p, rule).sum(dim=-1, keepdim=True) - 1  # index of the last selected expert
    smallest_T1 = largest_Tm.gather(1, last_T1)
    # Complete where the next largest expert was compared too, and is smaller.
    next_T1 = largest_Tm.gather(1, (last_T1 + 1).clamp(max=MAX_FAST_EXPERTS - 1))
    map_TE = probs_TE >= smallest_T1
    remaining = (~(next_T1 < smallest_T1)).squeeze(1).nonzero().squeeze(1)
    if len(remaining):
        map_TE[remaining] = map_by_sorting(probs_TE[remaining], p, rule)
    return map_TE


def _selected(sorted_TX: Tensor, p: float | Tensor, rule: CrossingRule) -> Tensor:
    before_TX = F.pad(sorted_TX.cumsum(dim=-1)[:, :-1], (1, 0))
    selected_TX = before_TX <= p if rule == "above" else before_TX < p
    # Rounded sums may reach 1 early, but p = 1 selects every expert. The first one is always selected.
    selected_TX = selected_TX | (p >= 1)
    selected_TX[:, 0] = True
    return selected_TX


def p_for_mean(probs_TE: Tensor, k: float, rule: CrossingRule) -> float:
    """p at which these tokens use k experts on average, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(30):
        p = (low + high) / 2
        mean = top_p_map(probs_TE, p, rule).sum(1).float().mean().item()
        low, high = (p, high) if mean < k else (low, p)
    return high


@register("top_p")
class TopPRouter(Router):
    Options = TopPOptions
    options: TopPOptions
    summary = "top-p: a token uses the fewest experts that hold the mass p"
    paper = "2403.07652"
    inference_file = INFERENCE_FILE
    routes_in_blocks = True

    @classmethod
    def options_for_experts(cls, options: TopPOptions, before: int, after: int):
        expected = options.expected_experts
        return {} if expected is None else {"expected_experts": min(expected, float(after))}

    @classmethod
    def benchmark_options(cls, k: int, num_experts: int, latent_norm: float):
        return {"p": 0.8}

    def calibrate(self, hidden_TH: Tensor, k: float) -> None:
        p = p_for_mean(self.gating(hidden_TH).softmax(dim=-1), k, self.options.rule)
        self.options = self.options.model_copy(update={"p": p})

    @staticmethod
    def start_from_gates(routers, gates):
        softmax_TE = torch.cat([g.logits_TE(r.weight).softmax(dim=-1) for r, g in zip(routers, gates, strict=True)])
        mean = sum(gate.experts_per_token for gate in gates) / len(gates)
        p = p_for_mean(softmax_TE, mean, routers[0].options.rule)
        return {"p": p, "renormalize": all(gate.sums_to_one for gate in gates)}

    def route(self, hidden_TH: Tensor, sequence_T: Tensor) -> Routing:
        return in_blocks(self._decide, self.gate_scores(hidden_TH))

    def _decide(self, logits_tE: Tensor, _, saved_selection: Tensor | None) -> Decision:
        return top_p_softmax(
            logits_tE, saved_selection, self.options.p, self.options, renormalize=self.options.renormalize
        )

    def losses(self, routing, loads):
        return top_p_losses(self, routing, loads)


def top_p_softmax(
    scores_tE: Tensor, saved_selection: Tensor | None, p: float | Tensor, options, *, renormalize: bool
) -> Decision:
    """P = softmax(scores) where an expert is selected, and the inputs of `top_p_losses`."""
    softmax_tE = scores_tE.softmax(dim=-1)
    map_tE = top_p_map(softmax_tE, p, options.rule) if saved_selection is None else saved_selection
    share_tE = softmax_tE.masked_fill(map_tE.logical_not(), 0.0)
    if renormalize:
        share_tE = share_tE / share_tE.sum(dim=-1, keepdim=True)
    sums = {"softmax_sum_E": softmax_tE.sum(0)}
    if options.entropy_coefficient:
        # -sum P log P. log P needs no gradient, because that of sum P is 0.
        sums["entropy_sum"] = -torch.linalg.vecdot(softmax_tE, scores_tE.detach().log_softmax(dim=-1)).sum()
    return Decision(share_tE, map_tE, sums, saved_selection=map_tE)


def top_p_losses(router, routing: Routing, loads: dict) -> dict[str, Tensor]:
    """Balance and entropy loss of one layer, as its share of the mean over layers."""
    options, load, losses = router.options, loads[router.options.balance_scope], {}
    if options.balance_coefficient:
        product = balance_product(routing.loss_inputs["softmax_sum_E"], load)
        losses["balance"] = options.balance_coefficient / router.num_layers * product
    if options.entropy_coefficient:
        mean = mean_over_tokens(routing.loss_inputs["entropy_sum"], load)
        losses["entropy"] = options.entropy_coefficient / router.num_layers * mean
    return losses
