"""Start a router from the gate of a trained model that another router used.

Shapes: T tokens, E experts, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-3  # of the mean square of hidden states: fits of fewer tokens than hidden numbers stay small
LOGIT_EDGE = 0.02  # gates are read as probabilities from here to 1 minus it


@dataclass(frozen=True)
class TrainedGate:
    """What a layer's trained router does on some tokens.

    Attributes:
        hidden_TH: fp32, its input.
        probs_TE: fp32, the weights it gives, 0 where an expert is not used.
    """

    hidden_TH: Tensor
    probs_TE: Tensor

    @property
    def map_TE(self) -> Tensor:
        """bool, which experts each token uses."""
        return self.probs_TE > 0

    @property
    def experts_per_token(self) -> float:
        return self.map_TE.sum().item() / max(1, len(self.probs_TE))

    @property
    def sums_to_one(self) -> bool:
        """Whether the weights of every token sum to 1."""
        return (self.probs_TE.sum(1) - 1).abs().max().item() < 1e-3

    def logits_TE(self, weight_EH: Tensor) -> Tensor:
        return self.hidden_TH @ weight_EH.float().t()

    def fit(self, target_TN: Tensor) -> Tensor:
        """[N, H]: the linear functions of a token that are nearest to each target, by ridge regression."""
        hidden = self.hidden_TH.double()
        square_HH = hidden.t() @ hidden
        square_HH.diagonal().add_(RIDGE * square_HH.diagonal().mean())
        return torch.linalg.solve(square_HH, hidden.t() @ target_TN.double()).t().float()


def shift_to_probabilities(weight_EH: Tensor, gate: TrainedGate) -> None:
    """Subtract from all rows, in place, the linear function of a token that brings the sigmoid of a used expert's logit
    nearest to its trained weight."""
    map_TE = gate.map_TE
    wanted_TE = gate.probs_TE.clamp(LOGIT_EDGE, 1 - LOGIT_EDGE).logit()
    above_TE = (gate.logits_TE(weight_EH) - wanted_TE).masked_fill(~map_TE, 0)
    mean_T = above_TE.sum(1) / map_TE.sum(1).clamp(min=1)
    weight_EH -= gate.fit(mean_T.unsqueeze(1)).to(weight_EH.dtype)


def shift_to_zero(weight_EH: Tensor, gate: TrainedGate) -> None:
    """Move and scale all rows, in place, so that the logits of used experts lie above 0, those of others below, and
    positive logits are as large as the trained weights. As many are positive as experts were used."""
    map_TE, logits_TE = gate.map_TE, gate.logits_TE(weight_EH)
    lowest_T = logits_TE.masked_fill(~map_TE, torch.inf).amin(1)
    highest_T = logits_TE.masked_fill(map_TE, -torch.inf).amax(1)
    between_T = ((lowest_T + highest_T) / 2).nan_to_num(0.0, 0.0, 0.0)
    threshold_H, bias_H = gate.fit(torch.stack((between_T, torch.ones_like(between_T)), dim=1))
    weight_EH -= threshold_H.to(weight_EH.dtype)
    logits_N = gate.logits_TE(weight_EH).flatten()
    share = map_TE.double().mean().item()
    exceeded = logits_N.kthvalue(max(1, round(logits_N.numel() * (1 - share)))).values
    weight_EH -= (exceeded * bias_H).to(weight_EH.dtype)
    positive_TE = gate.logits_TE(weight_EH).relu()
    scale = (positive_TE * gate.probs_TE).sum() / positive_TE.square().sum().clamp(min=1e-30)
    weight_EH *= scale.clamp(min=1e-6).to(weight_EH.dtype)


def cutoffs_E(weight_EH: Tensor, gate: TrainedGate, experts_per_token: float) -> Tensor:
    """fp32 [E]: for each expert the logit that an equal share of the tokens exceeds."""
    logits_TE = gate.logits_TE(weight_EH)
    share = experts_per_token / logits_TE.size(1)
    return logits_TE.kthvalue(max(1, min(len(logits_TE), round(len(logits_TE) * (1 - share)))), dim=0).values
