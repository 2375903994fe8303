"""Softmax top-k with a balance loss: Switch (arXiv 2101.03961), GShard (2006.16668), Mixtral's renormalised gates.

    P = softmax(x W);  S = the k experts with the largest P
    softmax: before      gate_e = P_e for e in S, else 0                            Switch; Megatron's pre-softmax
      and renormalize    gate_e / sum_S gate                                        GShard
    softmax: after       gate = softmax over the k selected logits                  Mixtral; the same numbers
    L_balance = a E sum_e f_e mean_t(P_te),  f_e = routes of e / (k T), no gradient through f; a = 1e-2 in Switch
    L_z       = c mean_t(logsumexp(x W)^2),  c = 1e-3 in ST-MoE (arXiv 2202.08906); off here

`balance_scope` selects the tokens that f counts; P always covers the current micro-step. `global_batch` is the loss of
arXiv 2501.11873: counts of all ranks over the micro-steps of the optimizer step so far, so that experts may specialise
within a sequence. The coefficient means the same in every scope, at any number of ranks and micro-steps.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from dsmoe.routers.base import INFERENCE_FILE, BalanceScope, Router, RouterOptions, Routing, SoftmaxTopK
from dsmoe.routers.losses import balance_product, mean_over_tokens
from dsmoe.routers.registry import register
from dsmoe.routers.scores import Decision, in_blocks, map_of, spread


class TopKOptions(RouterOptions):
    k: int = Field(1, ge=1)  # experts of every token
    softmax: Literal["before", "after"] = "before"  # over all experts, or over the k selected ones
    renormalize: bool = False  # with softmax before: gates of a token sum to 1
    balance_coefficient: float = Field(1e-2, ge=0)  # weight of the balance loss
    z_coefficient: float = Field(0.0, ge=0)  # weight of the z-loss, the mean squared logsumexp of logits
    balance_scope: BalanceScope = "micro_batch"  # tokens that are counted: all ranks', a rank's, the step's so far

    def validate_for_model(self, model):
        mistakes = self.at_most_num_experts("k", model)
        if self.softmax == "after" and self.renormalize:
            mistakes.append(
                "router.renormalize: found True with router.softmax: after, whose gates sum to 1 already; "
                "expected False"
            )
        elif self.k == 1 and (self.renormalize or self.softmax == "after"):
            key, value, other = ("renormalize", True, False) if self.renormalize else ("softmax", "after", "before")
            mistakes.append(
                f"router.{key}: found {value} with router.k: 1: every gate is 1 and the router cannot learn from the "
                f"model's loss; expected {other}, or a larger k"
            )
        return mistakes

    def target_experts_per_token(self, model):
        return self.k

    def fixed_experts_per_token(self):
        return self.k

    def gates_sum_to_one(self):
        return self.softmax == "after" or self.renormalize


@register("topk")
class TopKRouter(Router):
    Options = TopKOptions
    options: TopKOptions
    summary = "softmax top-k: every token uses exactly k experts"
    paper = "2101.03961"
    inference_file = INFERENCE_FILE
    routes_in_blocks = True

    @classmethod
    def softmax_top_k(cls, options: TopKOptions) -> SoftmaxTopK:
        return SoftmaxTopK(options.k, options.gates_sum_to_one(), options.balance_coefficient)

    @classmethod
    def benchmark_options(cls, k: int, num_experts: int, latent_norm: float):
        return {"k": k, "softmax": "after"} if k > 1 else {"k": k}

    @classmethod
    def fixed_experts_per_token(cls, options: TopKOptions) -> int:
        return options.k

    @classmethod
    def switch_loss_coefficient(cls, options: TopKOptions, num_moe_layers: int) -> float:
        """One loss over the routes of all layers together there; a sum over layers and a mean over k here."""
        return options.balance_coefficient * num_moe_layers / options.k

    @staticmethod
    def start_from_gates(routers, gates):
        return {"softmax": "after"} if routers[0].options.k > 1 and all(gate.sums_to_one for gate in gates) else {}

    def route(self, hidden_TH: Tensor, sequence_T: Tensor) -> Routing:
        return in_blocks(self._decide, self.gate_scores(hidden_TH))

    def _decide(self, logits_tE: Tensor, _, saved_selection: Tensor | None) -> Decision:
        options = self.options
        # Renormalized gates, P / sum_S P, are the softmax over S; computed so, no two small numbers are divided.
        over_all_experts = options.softmax == "before" and not options.renormalize
        decision = top_k_softmax(logits_tE, saved_selection, options.k, over_all_experts=over_all_experts)
        if options.z_coefficient:
            decision.sums["z_sum"] = logits_tE.logsumexp(dim=-1).square().sum()
        return decision

    def losses(self, routing, loads):
        options, load = self.options, loads[self.options.balance_scope]
        losses = {}
        if options.balance_coefficient:
            product = balance_product(routing.loss_inputs["softmax_sum_E"], load)
            losses["balance"] = options.balance_coefficient / options.k * product
        if options.z_coefficient:
            losses["z"] = options.z_coefficient * mean_over_tokens(routing.loss_inputs["z_sum"], load)
        return losses


def top_k_softmax(scores_tE: Tensor, saved_selection: Tensor | None, k: int, *, over_all_experts: bool) -> Decision:
    """Weights of each token's k largest scores: their softmax over all experts, or over the selected ones only."""
    expert_tk = scores_tE.topk(k, dim=-1).indices if saved_selection is None else saved_selection
    softmax_tE = scores_tE.softmax(dim=-1)
    gate_tk = softmax_tE.gather(1, expert_tk) if over_all_experts else scores_tE.gather(1, expert_tk).softmax(dim=-1)
    weights_tE, map_tE = spread(gate_tk, expert_tk, scores_tE), map_of(expert_tk, scores_tE)
    return Decision(weights_tE, map_tE, {"softmax_sum_E": softmax_tE.sum(0)}, saved_selection=expert_tk)
