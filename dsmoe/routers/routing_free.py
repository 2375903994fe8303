"""Routing-Free MoE: no router and no top-k; each expert decides by its own score (arXiv 2604.00801, EMNLP 2026).

    s_i(x) = ||x A_i||_2 * scale_i - bias_i;  expert i is active where s_i >= theta           code; scale starts at 1,
                                                                                             bias at -1e-6
    G_i(x) = ReLU(||x A_i||_2 - bias_i)                                                       paper Eq. 9, bias 1e-6
    h = x + sum_i active_i G_i(x) E_i(x)                                                      Eq. 10, raw weights
    E_i(x) = [silu((x A_i) B_i) * (x W_up_i)] W_down_i                                        Eq. 6

    density rho = active pairs / all pairs, over all experts of all layers
    L_EB = mean over experts of (mean_x active_i)(mean_x G_i)                                 Eq. 12, expert balance
    L_TB = mean over tokens of (mean_i active_i)(mean_i G_i), i over all layers               Eq. 13, token balance
    L    = lambda (mu L_EB + (1 - mu) L_TB);  lambda *= (1 + eta)^sign(rho - rho_target)      Eq. 14-17

In the code G inside the losses is the score after the threshold (inactive is 0), in the paper before it, and lambda is
capped at 1. Both follow `form`. The code moves lambda after every micro-batch, from the density of one rank, and then
averages it over ranks; here it moves from the density over all ranks, once per optimizer step or, with `lambda_update:
micro_batch`, after every micro-batch. Published: theta 1, mu 0.5, rho 1/4, lambda_0 1e-10, eta 0.02, r 32 at H 512. At
the start nearly all experts are active: plan memory for a dense model.

The released code starts experts and A from torch.nn.Linear's initialization (`distribution: linear` of
`model.initialization`), with scores of sqrt(r / 3) = 3.3 at the start whatever H. So does
configs/recipes/routing_free_paper.yaml.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import reduce
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dsmoe.routers.base import INFERENCE_FILE, BalanceScope, Routing, scaled_settings
from dsmoe.routers.controllers import LambdaController
from dsmoe.routers.losses import mean_over_tokens
from dsmoe.routers.low_rank import LowRankOptions, LowRankRouter
from dsmoe.routers.registry import register
from dsmoe.routers.routing_map import count_rows
from dsmoe.routers.scores import Decision, Scores, exceeded_by, in_blocks

FIRST_MATRIX = "router.0.reduce_proj"  # A of expert 0, by its canonical name in an MoE layer
START_SCORE = 2.56  # expected score over theta at the start of the paper's S scale: 0.02 * sqrt(512 * 32)


class RoutingFreeOptions(LowRankOptions):
    FUTURE_ONLY = LowRankOptions.FUTURE_ONLY | {
        "target_density",
        "mu",
        "lambda_initial",
        "lambda_rate",
        "lambda_update",
        "rescale",
    }

    threshold: float = Field(1.0, gt=0)  # theta
    target_density: float = Field(0.25, gt=0, le=1)  # rho
    mu: float = Field(0.5, ge=0, le=1)  # 1: balance experts, 0: balance tokens
    lambda_initial: float = Field(1e-10, gt=0)  # weight of the density loss at step 0
    lambda_rate: float = Field(0.02, gt=0)  # eta
    lambda_update: Literal["step", "micro_batch"] = "step"  # when lambda moves; the released code: micro_batch
    form: Literal["code", "paper"] = "code"  # of the losses: the released code's, or the equations'
    rescale: bool = False  # draw A so that scores start at 2.56 theta, as N(0, 0.02) gives at the paper's S scale
    balance_scope: BalanceScope = "micro_batch"  # tokens that are counted: all ranks', a rank's, the step's so far

    def validate_for_model(self, model):
        exception = model.initialization_of(f"gpt.decoder.layers.{model.moe_layers().index(True)}.mlp.{FIRST_MATRIX}")
        if exception is not None and self.rescale:
            return [
                f"router.rescale: found True, but model.initialization has {exception.tensors!r} for the same "
                "matrices; expected False"
            ]
        std = model.init_std if exception is None else exception.std_of(model.hidden_size)
        expected = std * math.sqrt(model.hidden_size * self.rank)
        if self.rescale or expected > self.threshold:
            return []
        return [
            f"router.threshold: found {self.threshold}, expected less than the scores at the start, about "
            f"std * sqrt(hidden_size * rank) = {expected:.3g} with std = {std:.3g} (model.init_std or "
            "model.initialization): every expert would start inactive, get no gradient and never recover. Set "
            "router.rescale=true, raise router.rank or model.init_std, lower router.threshold"
        ]

    def target_experts_per_token(self, model):
        return self.target_density * model.num_experts

    @classmethod
    def aim_at(cls, experts_per_token, num_experts):
        return {"target_density": experts_per_token / num_experts}

    def inference_option(self):
        return "threshold"

    def inference_settings(self, num_experts):
        return scaled_settings("threshold", self.threshold)

    def initial_experts_per_token(self, model):
        return model.num_experts  # nearly: scores start above the threshold


@register("routing_free")
class RoutingFree(LowRankRouter):
    Options = RoutingFreeOptions
    options: RoutingFreeOptions
    controller: LambdaController
    summary = "each expert decides alone whether it is active, from none to all"
    paper = "2604.00801"
    inference_file = INFERENCE_FILE

    def __init__(self, config, pg_collection=None, options: RoutingFreeOptions | None = None, **kwargs):
        super().__init__(config, pg_collection, options, **kwargs)
        code = self.options.form == "code"
        self.bias = nn.Parameter(torch.full((self.num_experts,), -1e-6 if code else 1e-6))
        self.scale = nn.Parameter(torch.ones(self.num_experts)) if code else None
        if self.options.rescale:
            width = config.hidden_size * self.options.rank
            self.reduce_proj.init_std = START_SCORE * self.options.threshold / math.sqrt(width)  # type: ignore[attr-defined]

    @classmethod
    def parameter_count(cls, model, options):
        vectors = 2 if options.form == "code" else 1
        return super().parameter_count(model, options) + vectors * model.num_experts

    @classmethod
    def options_for_experts(cls, options: RoutingFreeOptions, before: int, after: int):
        return {"target_density": min(1.0, options.target_density * before / after)}

    @classmethod
    def make_controller(cls, options: RoutingFreeOptions, num_layers: int, num_experts: int) -> LambdaController:
        maximum = 1.0 if options.form == "code" else math.inf
        factor = 1 + options.lambda_rate
        return LambdaController(
            options.lambda_initial,
            factor,
            options.target_density,
            shrink_at_target=False,
            maximum=maximum,
            per_micro_batch=options.lambda_update == "micro_batch",
        )

    @classmethod
    def benchmark_options(cls, k: int, num_experts: int, latent_norm: float):
        return super().benchmark_options(k, num_experts, latent_norm) | {"threshold": 0.8 * latent_norm}

    def calibrate(self, hidden_TH: Tensor, k: float) -> None:
        score_TE = self.score(hidden_TH)[0] * (1 if self.scale is None else self.scale) - self.bias
        threshold = exceeded_by(score_TE, k / self.num_experts)
        self.options = self.options.model_copy(update={"threshold": threshold})

    def route(self, hidden_TH: Tensor, sequence_T: Tensor) -> Routing:
        score_TE, latents = self.score(hidden_TH)
        parameters = (self.bias.float(),) if self.scale is None else (self.bias.float(), self.scale.float())
        return replace(in_blocks(self._decide, Scores(score_TE), *parameters), **latents)

    def _decide(self, norm_tE: Tensor, _, chosen, bias_E: Tensor, scale_E: Tensor | None = None) -> Decision:
        score_tE = (norm_tE if scale_E is None else norm_tE * scale_E).sub(bias_E).relu()
        map_tE = score_tE >= self.options.threshold
        probs_tE = score_tE.where(map_tE, 0)
        balanced_tE = probs_tE if self.options.form == "code" else score_tE
        per_token = {"score_sum_T": balanced_tE.sum(1), "active_T": count_rows(map_tE).to(torch.float32)}
        return Decision(probs_tE, map_tE, {"score_sum_E": balanced_tE.sum(0)}, per_token)

    @staticmethod
    def model_losses(routers: list[RoutingFree], routings: list[Routing], loads):
        """The losses look across layers: a token's experts are those of all layers."""
        options, controller = routers[0].options, routers[0].controller
        scope = [load[options.balance_scope] for load in loads]
        pairs = len(routers) * routers[0].num_experts
        expert_balance = sum(
            torch.dot(load.fraction_E(), mean_over_tokens(routing.loss_inputs["score_sum_E"], load))
            for routing, load in zip(routings, scope, strict=True)
        )
        active_T, score_T = (
            reduce(torch.add, (routing.loss_inputs[name] for routing in routings))
            for name in ("active_T", "score_sum_T")
        )
        token_balance = mean_over_tokens(torch.dot(active_T, score_T), scope[0]) / pairs**2
        unified = options.mu * expert_balance / pairs + (1 - options.mu) * token_balance
        return {"balance": controller.value * unified}
