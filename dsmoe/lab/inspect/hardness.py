"""Do harder tokens take more experts? The claim of dynamic routing (arXiv 2403.07652), put to the test.

How hard a token is has two readings, and both are given. `next`: the loss at the token's position, nats of the token
that follows, which is what its experts work at. `own`: the loss of the token itself, how much it surprised; the model
has that token before it when it routes.

`rho` is Spearman's rank correlation (Pearson's of the ranks, ties at their mean rank) of that loss with the token's
experts, mean over layers. Its interval is the 2.5 % to 97.5 % quantile of rho over circular block bootstrap samples
(Politis and Romano, 1992): blocks of 16 tokens in a row are drawn with replacement, since neighbours in a text are
alike, which single draws would take for evidence. An interval that holds 0 shows nothing. It is about these texts, not
about the training: another seed of the same run may differ by more.

`rho` is None where the loss or the number of experts does not vary; routers with a fixed k have rho of the effective
experts alone: exp(entropy) of a token's normalized weights.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata

from dsmoe.lab.inspect.reading import Array, Reading
from dsmoe.lab.study.probe.routes import KINDS

BLOCK, SAMPLES, SAMPLES_OF_A_LAYER = 16, 1000, 200
GROUPS = 10
FEWEST = 8  # tokens of a correlation
AT_A_TIME = 1 << 22  # numbers that are ranked together


def hardness(reading: Reading) -> dict:
    """`next` and `own`, each with `deciles`, `experts` and `effective` ({rho, low, high, tokens}), `by_layer` (a list
    of the same for experts), `by_kind` (rho alone, inside a kind of token)."""
    return {
        "next": _against(reading, reading.next_loss_T),
        "own": _against(reading, reading.loss_T),
        "block": BLOCK,
        "samples": SAMPLES,
    }


def _against(reading: Reading, loss_T: Array) -> dict:
    known_T = np.isfinite(loss_T)
    loss, experts_LT = loss_T[known_T], reading.experts_LT[:, known_T]
    effective_LT, kind_T = reading.effective_LT[:, known_T], reading.kind_T[known_T]
    experts = experts_LT.mean(0)
    return {
        "experts": correlation(loss, experts),
        "effective": correlation(loss, effective_LT.mean(0)),
        "by_layer": [correlation(loss, layer, SAMPLES_OF_A_LAYER) for layer in experts_LT],
        "by_kind": {
            kind: {"rho": spearman(loss[mask], experts[mask]), "tokens": int(mask.sum())}
            for number, kind in enumerate(KINDS)
            if (mask := kind_T == number).sum() >= FEWEST
        },
        "deciles": deciles(loss, experts_LT, effective_LT),
    }


def deciles(loss_T: Array, experts_LT: Array, effective_LT: Array) -> list[dict]:
    """Ten groups of as equal size as can be, easy tokens first; fewer where there are fewer than 20 tokens. `error` is
    the standard error of `experts` as if tokens were independent."""
    order = np.argsort(loss_T, kind="stable")
    found = []
    for group in np.array_split(order, max(1, min(GROUPS, len(order) // 2))):
        of_token = experts_LT[:, group].mean(0)
        found.append(
            {
                "tokens": len(group),
                "loss": float(loss_T[group].mean()),
                "loss_from": float(loss_T[group].min()),
                "loss_to": float(loss_T[group].max()),
                "experts": float(of_token.mean()),
                "error": float(of_token.std(ddof=1) / np.sqrt(len(group))) if len(group) > 1 else None,
                "effective": float(effective_LT[:, group].mean()),
                "experts_by_layer": experts_LT[:, group].mean(1).tolist(),
            }
        )
    return found


def correlation(x_T: Array, y_T: Array, samples: int = SAMPLES) -> dict:
    """`rho` with `low` and `high`, 95 %; None where there are too few tokens or one of the two does not vary."""
    rho = spearman(x_T, y_T)
    if rho is None:
        return {"rho": None, "low": None, "high": None, "tokens": len(x_T)}
    values = bootstrap(x_T, y_T, samples)
    low, high = np.quantile(values, (0.025, 0.975)) if len(values) else (np.nan, np.nan)
    return {"rho": rho, "low": float(low), "high": float(high), "tokens": len(x_T)}


def spearman(x_T: Array, y_T: Array) -> float | None:
    if len(x_T) < FEWEST or np.ptp(x_T) == 0 or np.ptp(y_T) == 0:
        return None
    return float(np.corrcoef(rankdata(x_T), rankdata(y_T))[0, 1])


def bootstrap(x_T: Array, y_T: Array, samples: int) -> Array:
    """rho of that many samples of the same size; those in which one of the two does not vary are left out."""
    tokens = len(x_T)
    random = np.random.default_rng(0)
    blocks, found = -(-tokens // BLOCK), []
    chunk = max(1, AT_A_TIME // tokens)
    for first in range(0, samples, chunk):
        starts = random.integers(0, tokens, (min(chunk, samples - first), blocks, 1))
        drawn = ((starts + np.arange(BLOCK)) % tokens).reshape(len(starts), -1)[:, :tokens]
        x, y = (rankdata(values[drawn], axis=1) for values in (x_T, y_T))
        x, y = (ranks - ranks.mean(1, keepdims=True) for ranks in (x, y))
        spread = np.sqrt((x * x).sum(1) * (y * y).sum(1))
        found.append((x * y).sum(1)[spread > 0] / spread[spread > 0])
    return np.concatenate(found)
