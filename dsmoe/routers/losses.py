"""Balance losses that several routers share. E experts, T tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from dsmoe.routers.recorder import Load


def balance_product(score_sum_E: Tensor, load: Load) -> Tensor:
    """E * sum_e f_e P_e with f_e = routes of e / T (exact, no gradient) and P_e = mean score of e (gradient).

    `score_sum_E` sums this rank's tokens only. The optimizer averages the gradients of all ranks, so this rank's part
    of the mean over all tokens is its sum times the number of ranks over all tokens. Not divided by k.
    """
    tokens = load.tokens.clamp(min=1).to(torch.float32)
    fraction_E = load.counts_E.to(torch.float32) / tokens
    mean_E = score_sum_E * (load.ranks / tokens)
    return score_sum_E.numel() * torch.dot(fraction_E, mean_E)


def mean_over_tokens(value_sum: Tensor, load: Load) -> Tensor:
    """This rank's part of the mean over the load's tokens of a quantity summed over this rank's tokens."""
    return value_sum * (load.ranks / load.tokens.clamp(min=1).to(torch.float32))
