"""Two models on the same texts.

Where both cut the texts into the same tokens, every token is compared with itself:

    loss_difference      nats of the second minus nats of the first, mean over predicted tokens; 95 % interval from
                         circular block bootstrap samples, as in `dsmoe.lab.inspect.hardness`
    experts_difference   the same of experts per token
    experts_alike        Spearman's correlation of the experts that a token has in the two: do both find the same tokens
                         worth many experts?
    by_difficulty        loss difference for each tenth of the tokens, by their loss in the first

Tokens of two tokenizers cannot be paired; nats per character of the text can still be compared.

Shapes: T tokens.
"""

from __future__ import annotations

import numpy as np

from dsmoe.lab.inspect.hardness import AT_A_TIME, BLOCK, GROUPS, SAMPLES, correlation
from dsmoe.lab.inspect.reading import Array, Reading


def compare(first: Reading, second: Reading) -> dict:
    if not np.array_equal(first.ids_T, second.ids_T) or first.token_T != second.token_T:
        return {"same_tokens": False}
    known_T = np.isfinite(first.next_loss_T) & np.isfinite(second.next_loss_T)
    easy = first.next_loss_T[known_T]
    difference = second.next_loss_T[known_T] - easy
    experts = [reading.experts_LT.mean(0) for reading in (first, second)]
    groups = np.array_split(np.argsort(easy, kind="stable"), max(1, min(GROUPS, len(easy) // 2)))
    return {
        "same_tokens": True,
        "loss_difference": mean_with_interval(difference),
        "experts_difference": mean_with_interval(experts[1] - experts[0]),
        "experts_alike": correlation(*experts),
        "by_difficulty": [
            {"loss": float(easy[group].mean()), "difference": float(difference[group].mean()), "tokens": len(group)}
            for group in groups
        ],
    }


def mean_with_interval(values_T: Array) -> dict:
    random = np.random.default_rng(0)
    tokens, means = len(values_T), []
    blocks, chunk = -(-tokens // BLOCK), max(1, AT_A_TIME // tokens)
    for first in range(0, SAMPLES, chunk):
        starts = random.integers(0, tokens, (min(chunk, SAMPLES - first), blocks, 1))
        drawn = ((starts + np.arange(BLOCK)) % tokens).reshape(len(starts), -1)[:, :tokens]
        means.append(values_T[drawn].mean(1))
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return {"mean": float(values_T.mean()), "low": float(low), "high": float(high), "tokens": tokens}
