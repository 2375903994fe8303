"""Sparsity-controlled dynamic top-p (DTop-p, arXiv 2512.13996v3): a controller moves p to hold the mean active experts.

    z_e = (x W_e - mean_e(x W)) / std_e(x W)              standardized over the experts of the layer
    P   = softmax(theta_l z)                              theta_l: one learned scale for each layer
    S   = the fewest experts, largest first, whose P sum to more than p: one p for all layers (see top_p.py)
    gate_e = P_e / sum_S P for e in S, else 0             renormalized
    between optimizer steps: e_t = (k - a_t) / E,  p = p_0 + K_p e_t + K_i sum(e)
                                                          a_t = mean active experts over all tokens and layers
    L = balance_coefficient * E sum_e f_e Q_e + entropy_coefficient * mean_t H(P_t)      as in top_p.py

Where the constants come from
    published    balance 1e-4, entropy 1e-3, no z-loss (it hurt); k = 8 of 64 experts, or 16 of 128
    third-party  K_p 0.05 and K_i 0.005 with anti-windup, in a port that controls each layer separately
    ours         p_0 (not published: by default the mass of the top k of E experts for normally distributed z), initial
                 theta_l = 1, epsilon, the range of p, the clamp as anti-windup, and losses averaged over layers
"""

from __future__ import annotations

from statistics import NormalDist

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dsmoe.routers.base import INFERENCE_FILE, BalanceScope, Router, RouterOptions, Routing
from dsmoe.routers.controllers import PIController
from dsmoe.routers.registry import register
from dsmoe.routers.scores import Decision, in_blocks
from dsmoe.routers.top_p import CrossingRule, p_for_mean, top_p_losses, top_p_softmax


class DTopPOptions(RouterOptions):
    FUTURE_ONLY = RouterOptions.FUTURE_ONLY | {"kp", "ki", "p_min", "p_max", "scale_initial"}

    k: float = Field(2.0, gt=0)  # mean active experts per token the controller aims at
    p_initial: float | None = Field(None, ge=0, le=1)  # p_0; None: from k, E and scale_initial
    p_min: float = Field(0.0, ge=0, le=1)  # the controller's p is never below
    p_max: float = Field(1.0, ge=0, le=1)  # nor above
    kp: float = Field(0.05, ge=0)  # K_p
    ki: float = Field(0.005, ge=0)  # K_i
    scale_initial: float = Field(1.0, gt=0)  # theta_l at step 0
    epsilon: float = Field(1e-6, gt=0)  # added to the variance of a token's logits
    rule: CrossingRule = "above"  # mass > p, or reach: mass >= p
    balance_coefficient: float = Field(1e-4, ge=0)  # weight of the balance loss
    entropy_coefficient: float = Field(1e-3, ge=0)  # weight of the entropy of a token's probabilities
    balance_scope: BalanceScope = "micro_batch"  # tokens that are counted: all ranks', a rank's, the step's so far

    def validate_for_model(self, model):
        mistakes = []
        if not 1 < self.k <= model.num_experts:
            mistakes.append(
                f"router.k: found {self.k}, expected more than 1 (a single expert's renormalized gate is always 1, and "
                f"the router cannot learn from the model's loss) and at most model.num_experts ({model.num_experts})"
            )
        if self.p_min >= self.p_max:
            mistakes.append(f"router.p_min: found {self.p_min}, expected less than router.p_max ({self.p_max})")
        elif self.p_initial is not None and not self.p_min <= self.p_initial <= self.p_max:
            mistakes.append(
                f"router.p_initial: found {self.p_initial}, expected a value from router.p_min ({self.p_min}) to "
                f"router.p_max ({self.p_max})"
            )
        if not self.kp and not self.ki:
            mistakes.append("router.kp: found 0 with router.ki: 0: p would never move; expected one of them above 0")
        return mistakes

    def target_experts_per_token(self, model):
        """k, the controller's target."""
        return self.k

    def gates_sum_to_one(self):
        return True

    def initial_p(self, num_experts: int) -> float:
        """p_0: `p_initial`, or the expected share of the top k of E experts in sum(exp(theta z)) for normal z."""
        if self.p_initial is not None:
            return self.p_initial
        if self.k >= num_experts:
            return self.p_max
        normal = NormalDist()
        mass = normal.cdf(self.scale_initial - normal.inv_cdf(1 - self.k / num_experts))
        return min(max(mass, self.p_min), self.p_max)


@register("dtop_p")
class DTopPRouter(Router):
    Options = DTopPOptions
    options: DTopPOptions
    controller: PIController
    summary = "top-p with a p found by a controller: the number of experts varies from token to token"
    paper = "2512.13996"
    inference_file = INFERENCE_FILE
    routes_in_blocks = True

    def __init__(self, config, pg_collection=None, options: DTopPOptions | None = None, **kwargs):
        super().__init__(config, pg_collection, options, **kwargs)
        self.scale = nn.Parameter(torch.full((1,), self.options.scale_initial, dtype=torch.float32))

    @classmethod
    def make_controller(cls, options: DTopPOptions, num_layers: int, num_experts: int) -> PIController:
        return PIController(
            options.initial_p(num_experts), options.kp, options.ki, options.k / num_experts,
            options.p_min, options.p_max,
        )  # fmt: skip

    @classmethod
    def inference_state(cls, controller: PIController, layer: int) -> dict[str, Tensor]:
        return {"p": controller.value}

    @classmethod
    def restore_controller(cls, controller: PIController, states) -> None:
        p = states[0]["p"].reshape(())
        controller.state |= {"p": p, "integral": p - controller.initial}

    @classmethod
    def parameter_count(cls, model, options):
        return super().parameter_count(model, options) + 1

    @classmethod
    def benchmark_options(cls, k: int, num_experts: int, latent_norm: float):
        return {"k": float(k), "p_initial": 0.8, "scale_initial": 10.0}

    def calibrate(self, hidden_TH: Tensor, k: float) -> None:
        p = p_for_mean(self._scores(self.gating(hidden_TH), self.scale.float()).softmax(dim=-1), k, self.options.rule)
        # Of this layer alone: the p of the shared controller would be that of the layer calibrated last.
        self.controller = PIController(p, 0.0, 0.0, self.options.k / self.num_experts, 0.0, 1.0)
        self.controller.to(hidden_TH.device)

    @staticmethod
    def start_from_gates(routers, gates):
        scores = []
        for router, gate in zip(routers, gates, strict=True):
            logits_TE = gate.logits_TE(router.weight)
            router.scale.data.fill_(logits_TE.std(dim=-1, correction=0).mean())
            scores.append(router._scores(logits_TE, router.scale.data))
        controller, options = routers[0].controller, routers[0].options
        p = p_for_mean(torch.cat(scores).softmax(dim=-1), options.k, options.rule)
        p = min(max(p, options.p_min), options.p_max)
        controller.state |= {"p": torch.tensor(p), "integral": torch.tensor(p - controller.initial)}
        return {}

    def route(self, hidden_TH: Tensor, sequence_T: Tensor) -> Routing:
        return in_blocks(self._decide, self.gate_scores(hidden_TH), self.scale.float())

    def _decide(self, logits_tE: Tensor, _, saved_selection: Tensor | None, scale: Tensor) -> Decision:
        options, p = self.options, self.controller.value.to(logits_tE.device)
        return top_p_softmax(self._scores(logits_tE, scale), saved_selection, p, options, renormalize=True)

    def _scores(self, logits_tE: Tensor, scale: Tensor) -> Tensor:
        return scale * F.layer_norm(logits_tE, [logits_tE.size(1)], eps=self.options.epsilon)

    def losses(self, routing, loads):
        return top_p_losses(self, routing, loads)
