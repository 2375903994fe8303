"""Losses that several routers share. E experts, T tokens of this rank, N sequences of its batch.

Each returns this rank's share of a mean over the tokens of a `Load`. The optimizer averages gradients over ranks, so a
rank's share is its own sum times the number of ranks, divided by all tokens. Callers apply the coefficients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsmoe.routers.recorder import Load

SMALLEST_SUM = 1e-20  # added to a sum of scores: avoids 0/0 where all scores of a token underflow


def mean_over_tokens(value_sum: Tensor, load: Load) -> Tensor:
    """Mean over tokens of a quantity, from its sum over this rank's tokens (any shape)."""
    return value_sum * (load.ranks / load.tokens.clamp(min=1).to(torch.float32))


def balance_product(score_sum_E: Tensor, load: Load) -> Tensor:
    """E * sum_e f_e P_e with f_e = routes of e / T (exact, no gradient) and P_e = mean score of e (gradient).

    Not divided by k. `score_sum_E` sums this rank's tokens only.
    """
    return score_sum_E.numel() * torch.dot(load.fraction_E(), mean_over_tokens(score_sum_E, load))


def sum_by_sequence(sequence_t: Tensor, num_sequences: int, value_tE: Tensor, weight_t: Tensor | None = None) -> Tensor:
    """[N, E], weighted sum over the tokens of each sequence."""
    if weight_t is None:
        weight_t = torch.ones_like(value_tE[:, 0])
    weight_Nt = value_tE.new_zeros(num_sequences, len(value_tE)).scatter(0, sequence_t[None], weight_t[None])
    return weight_Nt @ value_tE


def sequence_balance_sum(share_NE: Tensor, count_NE: Tensor, tokens_N: Tensor) -> Tensor:
    """sum over sequences s of T_s * E * sum_e f_se P_se: the balance product of each sequence, weighted by its tokens.

    f_se = routes of e in s (`count_NE`) / T_s, no gradient; P_se = mean over the tokens of s of their score of e as a
    share of all their scores; `share_NE` is the sum of these shares. Divided by the number of tokens this is the plain
    mean over sequences of equal length; a sequence that is all padding contributes 0.
    """
    return share_NE.size(1) * ((count_NE * share_NE).sum(dim=1) / tokens_N.clamp(min=1)).sum()
