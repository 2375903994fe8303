"""Top-k with a load-balancing bias instead of a loss: DeepSeek-V3 (arXiv 2412.19437, section 2.1.2).

    s = sigmoid(x W)                                            fp32 affinities
    S = the k experts with the largest s + b                    b affects the selection only
    gate_e = route_scale * s_e / sum_S s for e in S, else 0     no b in it, no gradient to b
    b_e += gamma * sign(mean(c) - c_e)                          after each optimizer step, c = routes on all ranks

`bias_update: quantile` sets b from a quantile over the tokens of all ranks instead, without a rate (quantile balancing,
as in Megatron-LM 0.19 and torchtitan):

    b_e such that tau_t - s_te < b_e for k/E of all tokens,  tau_t = the (k+1)-th largest s_tj + b_j;  then centered

Groups: experts form `num_groups` groups of equal size (one per node); a token may only use the `groups_per_token`
groups with the highest sum of their `group_score_experts` largest biased scores. V3 sums k / groups_per_token = 2.
Sequence loss, within each sequence of T tokens, averaged over sequences, no gradient through f:

    L = alpha sum_e f_e P_e,  f_e = E / (k T) sum_t 1{e in top-k of s_t},  P_e = mean_t(s_te / sum_j s_tj)

The paper counts the top-k of the scores without bias and groups; `sequence_counts: routes` counts the actual routes.
With padding, sequences are weighted by their number of tokens.

Published numbers: gamma 1e-3 (0 for the last 0.5T of 14.8T tokens: set `bias_update_rate=0` on resume), alpha 1e-4,
route_scale 2.5; k 8 of 256 experts in 8 groups, 4 per token. k and groups depend on the model, so their defaults are
not V3's. `score: softmax` is the variant of the paper that introduced the bias (2408.15664).
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from dsmoe.routers.base import INFERENCE_FILE, Router, RouterOptions, Routing
from dsmoe.routers.controllers import BIAS_HISTOGRAM, BiasController, QuantileBiasController
from dsmoe.routers.losses import SMALLEST_SUM, mean_over_tokens, sequence_balance_sum, sum_by_sequence
from dsmoe.routers.registry import register
from dsmoe.routers.scores import Decision, in_blocks, map_of, spread


class TopKBiasOptions(RouterOptions):
    FUTURE_ONLY = RouterOptions.FUTURE_ONLY | {"bias_update", "bias_update_rate", "sequence_counts"}

    k: int = Field(2, ge=1)  # experts of every token
    score: Literal["sigmoid", "softmax"] = "sigmoid"  # of a token for an expert, from its logits
    renormalize: bool = True  # gates of a token sum to route_scale
    route_scale: float = Field(2.5, gt=0)  # factor on all gates
    bias_update: Literal["sign", "quantile"] = "sign"  # by gamma towards the mean load, or quantile balancing
    bias_update_rate: float = Field(1e-3, ge=0)  # gamma, of sign
    num_groups: int = Field(1, ge=1)  # into which experts are cut, in order
    groups_per_token: int = Field(1, ge=1)  # of these a token chooses its experts from so many
    group_score_experts: int = Field(2, ge=1)  # largest biased scores of a group whose sum ranks it
    sequence_coefficient: float = Field(1e-4, ge=0)  # alpha
    sequence_counts: Literal["scores", "routes"] = "scores"  # top-k of the scores alone, or the actual routes

    def validate_for_model(self, model):
        experts, groups, allowed = model.num_experts, self.num_groups, self.groups_per_token
        mistakes = self.at_most_num_experts("k", model)
        if self.k == 1 and self.renormalize:
            mistakes.append(
                "router.renormalize: found True with router.k: 1: every gate is route_scale and the router cannot "
                "learn from the model's loss; expected False, or a larger k"
            )
        if self.bias_update == "quantile":
            if self.score != "sigmoid":
                mistakes.append(f"router.score: found {self.score} with router.bias_update: quantile, expected sigmoid")
            if self.k == experts:
                mistakes.append(
                    f"router.k: found {self.k} with router.bias_update: quantile, expected less than model.num_experts "
                    f"({experts})"
                )
            if allowed < groups:
                mistakes.append(
                    f"router.groups_per_token: found {allowed} with router.bias_update: quantile, expected "
                    f"router.num_groups ({groups})"
                )
        if experts % groups:
            mistakes.append(f"router.num_groups: found {groups}, expected a divisor of model.num_experts ({experts})")
            return mistakes
        if allowed > groups:
            mistakes.append(f"router.groups_per_token: found {allowed}, expected at most router.num_groups ({groups})")
        elif experts >= self.k > allowed * (experts // groups):
            mistakes.append(
                f"router.k: found {self.k}, expected at most the {allowed * (experts // groups)} experts of "
                f"router.groups_per_token ({allowed}) groups of {experts // groups}"
            )
        if allowed < groups and self.group_score_experts > experts // groups:
            mistakes.append(
                f"router.group_score_experts: found {self.group_score_experts}, expected at most the "
                f"{experts // groups} experts of a group"
            )
        return mistakes

    def target_experts_per_token(self, model):
        return self.k

    def fixed_experts_per_token(self):
        return self.k

    def gates_sum_to_one(self):
        return self.renormalize and self.route_scale == 1


@register("topk_bias")
class TopKBiasRouter(Router):
    Options = TopKBiasOptions
    options: TopKBiasOptions
    summary = "top-k with a balancing bias instead of a loss: every token uses exactly k experts"
    paper = "2412.19437"
    inference_file = INFERENCE_FILE
    routes_in_blocks = True

    @classmethod
    def benchmark_options(cls, k: int, num_experts: int, latent_norm: float):
        return {"k": k, "renormalize": k > 1}

    @classmethod
    def fixed_experts_per_token(cls, options: TopKBiasOptions) -> int:
        return options.k

    @classmethod
    def expert_groups(cls, options: TopKBiasOptions) -> int:
        return options.num_groups

    @classmethod
    def make_controller(cls, options: TopKBiasOptions, num_layers: int, num_experts: int):
        if options.bias_update == "quantile":
            return QuantileBiasController(num_layers, num_experts, options.k)
        return BiasController(num_layers, num_experts, options.bias_update_rate)

    @classmethod
    def inference_state(cls, controller, layer: int) -> dict[str, Tensor]:
        return {"bias": controller.state["bias"][layer]}

    @staticmethod
    def start_from_gates(routers, gates):
        return {
            "score": "softmax",
            "renormalize": routers[0].options.k > 1 and all(gate.sums_to_one for gate in gates),
            "route_scale": 1.0,
        }

    def route(self, hidden_TH: Tensor, sequence_T: Tensor) -> Routing:
        balanced_by_quantile = self.options.bias_update == "quantile" and self.training and torch.is_grad_enabled()
        decide = partial(self._decide, sequence_T, self.num_sequences, balanced_by_quantile)
        routing = in_blocks(decide, self.gate_scores(hidden_TH))
        routing.histogram_EB = routing.loss_inputs.pop("histogram_EB", None)
        if self.options.sequence_coefficient:
            shares_NE, counts_NE = (routing.loss_inputs.pop(name) for name in ("shares_NE", "counts_NE"))
            ones_T = torch.ones_like(sequence_T, dtype=shares_NE.dtype)
            tokens_N = torch.zeros_like(shares_NE[:, 0]).index_add(0, sequence_T, ones_T)
            routing.loss_inputs["sequence_sum"] = sequence_balance_sum(shares_NE, counts_NE, tokens_N)
        return routing

    def _decide(
        self, sequence_T: Tensor, num_sequences: int, with_histogram: bool,
        logits_tE: Tensor, tokens: slice, saved_selection: Tensor | None,
    ) -> Decision:  # fmt: skip
        options = self.options
        score_tE = logits_tE.sigmoid() if options.score == "sigmoid" else logits_tE.softmax(dim=-1)
        expert_tk, sums = saved_selection, {}
        if saved_selection is None:
            bias_E = self.controller.state["bias"][self.index].to(score_tE.device)
            biased_tE = self._within_groups(score_tE + bias_E)
            expert_tk = biased_tE.topk(options.k, dim=-1).indices
            if with_histogram:
                next_t1 = biased_tE.topk(options.k + 1, dim=-1).values[:, -1:]
                sums["histogram_EB"] = BIAS_HISTOGRAM.count(next_t1 - score_tE)
        gate_tk = score_tE.gather(1, expert_tk)
        if options.renormalize:
            gate_tk = gate_tk / (gate_tk.sum(dim=-1, keepdim=True) + SMALLEST_SUM)
        map_tE = map_of(expert_tk, score_tE)
        if options.sequence_coefficient:
            by_sequence = partial(sum_by_sequence, sequence_T[tokens], num_sequences)
            sums["shares_NE"] = by_sequence(score_tE, 1 / (score_tE.sum(dim=-1) + SMALLEST_SUM))
            if saved_selection is None:  # counts have no gradient
                of_scores = options.sequence_counts == "scores"
                counted_tE = map_of(score_tE.topk(options.k, dim=-1).indices, score_tE) if of_scores else map_tE
                sums["counts_NE"] = by_sequence(counted_tE.to(score_tE.dtype))
        return Decision(
            spread(gate_tk * options.route_scale, expert_tk, score_tE), map_tE, sums, saved_selection=expert_tk
        )

    def _within_groups(self, biased_TE: Tensor) -> Tensor:
        """Biased scores with -inf outside each token's groups."""
        groups, allowed = self.options.num_groups, self.options.groups_per_token
        if allowed == groups:
            return biased_TE
        biased_TGg = biased_TE.unflatten(1, (groups, -1))
        score_TG = biased_TGg.topk(self.options.group_score_experts, dim=-1).values.sum(dim=-1)
        open_TG = map_of(score_TG.topk(allowed, dim=-1).indices, score_TG)
        return biased_TGg.masked_fill(~open_TG.unsqueeze(-1), -torch.inf).flatten(1)

    def losses(self, routing, loads):
        options = self.options
        if not options.sequence_coefficient:
            return {}
        mean = mean_over_tokens(routing.loss_inputs["sequence_sum"], loads["micro_batch"])
        return {"sequence_balance": options.sequence_coefficient / options.k * mean}
