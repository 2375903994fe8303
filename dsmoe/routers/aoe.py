"""Autonomy-of-Experts: a token uses the k experts whose latent has the largest norm (arXiv 2501.13074, ICML 2025).

    C_i = x A_i;  s_i = ||C_i||_2;  S = the k experts with the largest s
    gates: all        softmax over the norms of all experts, restricted to S, not renormalised      (released code)
           selected   softmax over the norms of S                                                  (paper)
    E_i(x) = [silu(C_i B_i) * (x W_up_i)] W_down_i
    L_balance = a E sum_i f_i mean_t softmax(s)_ti,  optional; f_i = routes of i / (k T); a = 1e-2 in the paper

At equal parameters with an ordinary expert of width d_ffn, an expert here is (3 H d_ffn - r H) / (r + 2 H) wide. The
paper's best r is a third of H or less; its balance loss adds little.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field
from torch import Tensor

from dsmoe.routers.base import INFERENCE_FILE, BalanceScope, Routing
from dsmoe.routers.losses import balance_product
from dsmoe.routers.low_rank import LowRankOptions, LowRankRouter
from dsmoe.routers.registry import register
from dsmoe.routers.scores import Decision, Scores, in_blocks
from dsmoe.routers.topk import top_k_softmax


class AoEOptions(LowRankOptions):
    k: int = Field(2, ge=1)  # experts of every token
    gates: Literal["all", "selected"] = "all"  # softmax over the norms of all experts, or of a token's own
    balance_coefficient: float = Field(0.0, ge=0)  # weight of the balance loss
    balance_scope: BalanceScope = "micro_batch"  # tokens that are counted: all ranks', a rank's, the step's so far

    def validate_for_model(self, model):
        mistakes = self.at_most_num_experts("k", model)
        if self.k == 1 and self.gates == "selected":
            mistakes.append("router.gates: found 'selected' with k = 1: every gate is 1; expected 'all'")
        return mistakes

    def target_experts_per_token(self, model):
        return self.k

    def fixed_experts_per_token(self):
        return self.k


@register("aoe")
class AutonomyOfExperts(LowRankRouter):
    Options = AoEOptions
    options: AoEOptions
    summary = "Autonomy-of-Experts: the k experts with the largest norm of their own latent"
    paper = "2501.13074"
    inference_file = INFERENCE_FILE

    def route(self, hidden_TH: Tensor, sequence_T: Tensor) -> Routing:
        score_TE, latents = self.score(hidden_TH)
        return replace(in_blocks(self._decide, Scores(score_TE)), **latents)

    def _decide(self, score_tE: Tensor, _, saved_selection: Tensor | None) -> Decision:
        return top_k_softmax(score_tE, saved_selection, self.options.k, over_all_experts=self.options.gates == "all")

    def losses(self, routing, loads):
        if not self.options.balance_coefficient:
            return {}
        product = balance_product(routing.loss_inputs["softmax_sum_E"], loads[self.options.balance_scope])
        return {"balance": self.options.balance_coefficient / self.options.k * product}
