"""ReMoE: ReLU routing with an adaptive, load-balanced L1 penalty (arXiv 2412.14711v2, ICLR 2025).

    R(x) = route_scale * ReLU(x W)                                Eq. 5    expert e is active where R_e > 0
    y    = sum_e R(x)_e FFN_e(x)                                  Eq. 1    no softmax, no top-k, no renormalisation
    L1   = lambda * E / (k T^2) * sum_e count_e sum_t R_te        Eq. 10-11, one layer; counts carry no gradient
    lambda <- lambda * alpha^sign(density - k/E)                  Eq. 7-8, one lambda for all layers

`route_scale` is 1 in the paper; short runs ended lower with a smaller one (docs/studies.md). `threshold` also closes
gates below it, for inference with fewer experts; trained models have 0, as the paper.

`form: code` sums L1 over layers and shrinks lambda at exact equality, as the released code does. `form: paper` averages
L1 over layers, so that its lambda is the code's times the number of MoE layers, and keeps lambda at equality, since
sign(0) = 0. The paper counts over all tokens of the step; the released code counts each rank's micro-batch by itself:
set `balance_scope: rank` to reproduce it. The paper uses lambda_0 = 1e-8 and alpha = 1.2 everywhere. At first about
half of all pairs are active, and more soon after; lambda needs about 110 steps to bring density down to k/E.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from dsmoe.routers.base import INFERENCE_FILE, BalanceScope, Router, RouterOptions, Routing
from dsmoe.routers.controllers import LambdaController
from dsmoe.routers.losses import balance_product, mean_over_tokens
from dsmoe.routers.registry import register
from dsmoe.routers.scores import Decision, exceeded_by, in_blocks
from dsmoe.routers.trained_gate import shift_to_zero


class ReLUOptions(RouterOptions):
    FUTURE_ONLY = RouterOptions.FUTURE_ONLY | {"k", "lambda_initial", "lambda_factor", "load_balanced", "form"}

    k: float = Field(1.0, gt=0)  # mean active experts per token the controller aims at
    lambda_initial: float = Field(1e-8, gt=0)  # weight of the L1 loss at step 0
    lambda_factor: float = Field(1.2, gt=1)  # alpha
    load_balanced: bool = True  # weight each expert's L1 by its load (Eq. 10) or not (Eq. 9)
    form: Literal["code", "paper"] = "code"  # L1 summed over layers; averaged, and lambda stays at equality
    route_scale: float = Field(1.0, gt=0)  # factor on all gates
    threshold: float = Field(0.0, ge=0)  # gates below it are closed; for inference with fewer experts
    balance_scope: BalanceScope = "micro_batch"  # of the counts in L1; the released code: rank

    def validate_for_model(self, model):
        return self.at_most_num_experts("k", model)

    def target_experts_per_token(self, model):
        return self.k

    def inference_option(self):
        return "threshold"

    def initial_experts_per_token(self, model):
        return model.num_experts / 2  # where a random gate is above 0


@register("relu")
class ReLURouter(Router):
    Options = ReLUOptions
    options: ReLUOptions
    controller: LambdaController
    summary = "ReLU gates: a token uses every expert whose gate is positive, which may be none"
    paper = "2412.14711"
    inference_file = INFERENCE_FILE
    routes_in_blocks = True

    @classmethod
    def make_controller(cls, options: ReLUOptions, num_layers: int, num_experts: int) -> LambdaController:
        return LambdaController(
            options.lambda_initial, options.lambda_factor, options.k / num_experts,
            shrink_at_target=options.form == "code",
        )  # fmt: skip

    def calibrate(self, hidden_TH: Tensor, k: float) -> None:
        threshold, gating = exceeded_by(self.gating(hidden_TH), k / self.num_experts), self.gating
        self.gating = lambda hidden_TH: gating(hidden_TH) - threshold

    @staticmethod
    def start_from_gates(routers, gates):
        for router, gate in zip(routers, gates, strict=True):
            shift_to_zero(router.weight.data, gate)
        return {}

    def route(self, hidden_TH: Tensor, sequence_T: Tensor) -> Routing:
        return in_blocks(self._decide, self.gate_scores(hidden_TH))

    def _decide(self, logits_tE: Tensor, *_) -> Decision:
        scale, threshold = self.options.route_scale, self.options.threshold
        probs_tE = logits_tE.relu()
        if scale != 1:
            probs_tE = probs_tE * scale
        if threshold:
            probs_tE = probs_tE.where(probs_tE >= threshold, 0)
        return Decision(probs_tE, probs_tE > 0, {"probs_sum_E": probs_tE.sum(0)})

    def losses(self, routing, loads):
        load, probs_sum_E = loads[self.options.balance_scope], routing.loss_inputs["probs_sum_E"]
        if self.options.load_balanced:
            l1 = balance_product(probs_sum_E, load) / self.options.k
        else:
            l1 = mean_over_tokens(probs_sum_E.sum(), load)
        if self.options.form == "paper":
            l1 = l1 / self.num_layers
        return {"l1": self.controller.value * l1}
