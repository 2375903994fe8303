"""The routers of dsmoe as they decide at inference, each in one small module.

Stand-alone: this file travels with the weights and imports nothing but torch. `build_routing` is its only entry. A
router of another package brings a file of its own with that function, and lies here under the same name.

A routing module turns tokens [T, H] into

    probs_TE    fp32 [T, E], the weight of every expert, 0 where it is not active
    map_TE      bool [T, E], which experts are active: none to all of them
    latents_TEr [T, E, r] in the tokens' dtype, what a self-scoring expert was scored by, else None
    scores_TE   fp32 [T, E], what it decided by: a gate's logits, or norms (a file of another package may leave it out)

and looks at one token at a time: what else is in the batch never changes a route. It computes in fp32 whatever the
model's dtype, since in bf16 scores that nearly tie would change places. Losses and controllers of the training are not
here; the state of a controller that decides routes (a bias, a threshold) is a buffer.

Shapes: T tokens, E experts, H hidden, r latent width.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TINY = 1e-20  # keeps 0/0 away where all scores of a token underflow

Decision = tuple[Tensor, Tensor, Tensor | None, Tensor]


def build_routing(config) -> nn.Module:
    """The routing module of one layer, by `config.router["name"]`."""
    name = config.router["name"]
    if name not in ROUTINGS:
        raise ValueError(f"router {name!r} is not in this file; it has {', '.join(ROUTINGS)}")
    return ROUTINGS[name](config)


class GateRouting(nn.Module):
    """A router with one logit for each expert: `weight` [E, H]."""

    def __init__(self, config):
        super().__init__()
        self.options = SimpleNamespace(**config.router)
        self.num_experts = config.num_experts
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def logits(self, hidden_TH: Tensor) -> Tensor:
        return F.linear(hidden_TH.float(), self.weight.float())


class TopK(GateRouting):
    """Softmax top-k: Switch (2101.03961), GShard (2006.16668), Mixtral."""

    def forward(self, hidden_TH: Tensor) -> Decision:
        logits_TE = self.logits(hidden_TH)
        logit_Tk, expert_Tk = logits_TE.topk(self.options.k, dim=-1)
        if self.options.softmax == "after" or self.options.renormalize:
            gate_Tk = logit_Tk.softmax(dim=-1)
        else:
            gate_Tk = logits_TE.softmax(dim=-1).gather(1, expert_Tk)
        return *spread(expert_Tk, gate_Tk, logits_TE), None, logits_TE


class TopKBias(GateRouting):
    """Top-k by score plus bias, weights without it: DeepSeek-V3 (2412.19437). `bias` [E] is what the training found."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("bias", torch.zeros(config.num_experts))

    def forward(self, hidden_TH: Tensor) -> Decision:
        options, logits_TE = self.options, self.logits(hidden_TH)
        score_TE = logits_TE.sigmoid() if options.score == "sigmoid" else logits_TE.softmax(dim=-1)
        expert_Tk = self._open(score_TE + self.bias.float()).topk(options.k, dim=-1).indices
        gate_Tk = score_TE.gather(1, expert_Tk)
        if options.renormalize:
            gate_Tk = gate_Tk / (gate_Tk.sum(dim=-1, keepdim=True) + TINY)
        return *spread(expert_Tk, gate_Tk * options.route_scale, score_TE), None, logits_TE

    def _open(self, biased_TE: Tensor) -> Tensor:
        """-inf for experts outside a token's best groups."""
        groups, allowed = self.options.num_groups, self.options.groups_per_token
        if allowed == groups:
            return biased_TE
        biased_TGg = biased_TE.unflatten(1, (groups, -1))
        score_TG = biased_TGg.topk(self.options.group_score_experts, dim=-1).values.sum(dim=-1)
        closed_TG = torch.ones_like(score_TG, dtype=torch.bool)
        closed_TG = closed_TG.scatter(1, score_TG.topk(allowed, dim=-1).indices, False)
        return biased_TGg.masked_fill(closed_TG.unsqueeze(-1), -torch.inf).flatten(1)


class TopP(GateRouting):
    """The fewest experts whose softmax mass exceeds p (2403.07652)."""

    def forward(self, hidden_TH: Tensor) -> Decision:
        logits_TE = self.logits(hidden_TH)
        softmax_TE = logits_TE.softmax(dim=-1)
        map_TE = top_p_map(softmax_TE, self.options.p, self.options.rule)
        gate_TE = softmax_TE * map_TE
        if self.options.renormalize:
            gate_TE = gate_TE / gate_TE.sum(dim=-1, keepdim=True)
        return gate_TE, map_TE, None, logits_TE


class DTopP(GateRouting):
    """Top-p over standardised, scaled logits, renormalised: DTop-p (2512.13996). `p` [] is where the controller was."""

    def __init__(self, config):
        super().__init__(config)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("p", torch.ones(()))

    def forward(self, hidden_TH: Tensor) -> Decision:
        logits_TE = self.logits(hidden_TH)
        standard_TE = F.layer_norm(logits_TE, logits_TE.shape[1:], eps=self.options.epsilon)
        softmax_TE = (self.scale.float() * standard_TE).softmax(dim=-1)
        map_TE = top_p_map(softmax_TE, self.p.float(), self.options.rule)
        selected_TE = softmax_TE * map_TE
        return selected_TE / selected_TE.sum(dim=-1, keepdim=True), map_TE, None, logits_TE


class ReLU(GateRouting):
    """ReLU gates, no selection: ReMoE (2412.14711); those below a threshold are closed."""

    def forward(self, hidden_TH: Tensor) -> Decision:
        logits_TE = self.logits(hidden_TH)
        probs_TE = F.relu(logits_TE) * getattr(self.options, "route_scale", 1.0)
        probs_TE = probs_TE.where(probs_TE >= getattr(self.options, "threshold", 0.0), 0)
        return probs_TE, probs_TE > 0, None, logits_TE


class ExpertThreshold(GateRouting):
    """Each expert takes the tokens above its cutoff (2603.11535). `cutoffs` [E] are the averages of the training."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("cutoffs", torch.zeros(config.num_experts))

    def forward(self, hidden_TH: Tensor) -> Decision:
        logits_TE = self.logits(hidden_TH)
        map_TE = logits_TE >= self.cutoffs.float()
        return logits_TE.sigmoid() * map_TE, map_TE, None, logits_TE


class LatentRouting(nn.Module):
    """Experts that score themselves by the norm of their latent x A: `reduce_proj` [E, r, H] is A transposed."""

    def __init__(self, config):
        super().__init__()
        self.options = SimpleNamespace(**config.router)
        self.num_experts = config.num_experts
        self.reduce_proj = nn.Parameter(torch.empty(config.num_experts, config.expert_rank, config.hidden_size))

    def score(self, hidden_TH: Tensor) -> tuple[Tensor, Tensor]:
        """Norms fp32 [T, E] and latents [T, E, r]."""
        latents_TEr = F.linear(hidden_TH.float(), self.reduce_proj.flatten(0, 1).float())
        latents_TEr = latents_TEr.unflatten(1, self.reduce_proj.shape[:2])
        return torch.linalg.vector_norm(latents_TEr, dim=-1), latents_TEr.to(hidden_TH.dtype)


class AoE(LatentRouting):
    """The k experts with the largest norms: Autonomy-of-Experts (2501.13074)."""

    def forward(self, hidden_TH: Tensor) -> Decision:
        score_TE, latents_TEr = self.score(hidden_TH)
        score_Tk, expert_Tk = score_TE.topk(self.options.k, dim=-1)
        if self.options.gates == "all":
            gate_Tk = score_TE.softmax(dim=-1).gather(1, expert_Tk)
        else:
            gate_Tk = score_Tk.softmax(dim=-1)
        return *spread(expert_Tk, gate_Tk, score_TE), latents_TEr, score_TE


class RoutingFree(LatentRouting):
    """Every expert whose score reaches the threshold: Routing-Free MoE (2604.00801)."""

    def __init__(self, config):
        super().__init__(config)
        self.bias = nn.Parameter(torch.zeros(config.num_experts))
        self.scale = nn.Parameter(torch.ones(config.num_experts)) if self.options.form == "code" else None

    def forward(self, hidden_TH: Tensor) -> Decision:
        score_TE, latents_TEr = self.score(hidden_TH)
        if self.scale is not None:
            score_TE = score_TE * self.scale.float()
        score_TE = (score_TE - self.bias.float()).relu()
        map_TE = score_TE >= self.options.threshold
        return score_TE * map_TE, map_TE, latents_TEr, score_TE


def spread(expert_Tk: Tensor, gate_Tk: Tensor, like_TE: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen experts' gates as probs_TE and map_TE."""
    probs_TE = torch.zeros_like(like_TE).scatter(1, expert_Tk, gate_Tk)
    return probs_TE, torch.zeros_like(like_TE, dtype=torch.bool).scatter(1, expert_Tk, True)


def top_p_map(probs_TE: Tensor, p: float | Tensor, rule: str) -> Tensor:
    """bool [T, E]: the fewest experts, largest first, whose mass is more than p ("above") or at least p ("reach")."""
    sorted_TE, expert_TE = probs_TE.sort(dim=-1, descending=True, stable=True)
    before_TE = F.pad(sorted_TE.cumsum(dim=-1)[:, :-1], (1, 0))
    within_TE = before_TE <= p if rule == "above" else before_TE < p
    within_TE = within_TE | (p >= 1)  # rounded sums may reach 1 early
    within_TE[:, 0] = True
    return torch.zeros_like(within_TE).scatter(1, expert_TE, within_TE)


ROUTINGS = {
    "topk": TopK,
    "topk_bias": TopKBias,
    "top_p": TopP,
    "dtop_p": DTopP,
    "relu": ReLU,
    "expert_threshold": ExpertThreshold,
    "quantile": ExpertThreshold,
    "aoe": AoE,
    "routing_free": RoutingFree,
}
