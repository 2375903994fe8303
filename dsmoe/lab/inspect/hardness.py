"""Do harder tokens take more experts? The claim of dynamic routing (arXiv 2403.07652), put to the test.

How hard a token is has two readings, and both are given. `next`: the loss at the token's position, nats of the token
that follows, which is what its experts work at. `own`: the loss of the token itself, how much it surprised; the model
has that token before it when it routes.

`rho` is Spearman's rank correlation (Pearson's of the ranks, ties at their mean rank) of that loss with the token's
experts, mean over layers. Its interval is the 2.5 % to 97.5 % quantile of rho over circular block bootstrap samples
(Politis and Romano, 1992): blocks of 16 tokens in a row are drawn with replacement, since neighbours in a text are
alike, which single draws would take for evidence. An interval that holds 0 shows nothing. It is about these texts, not
about the training: another seed of the same run may differ by more.

Kinds of tokens (prose, digits, punctuation and so on) differ in loss and in experts, and could explain a correlation by
themselves. `within_kind` takes them out: each rank minus the mean rank of its kind, then the same correlation, with an
interval from the same samples. Where it vanishes, experts follow what kind of token it is and not how hard it is.

`rho` is None where the loss or the number of experts does not vary; routers with a fixed k have rho of the effective
experts alone: exp(entropy) of a token's normalized weights.

Shapes: T tokens, S bootstrap samples.
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
    """`next` and `own`, each with `deciles`, `experts`, `within_kind` and `effective` ({rho, low, high, tokens}),
    `by_layer` (a list of the same for experts), `by_kind` (rho alone, of the tokens of a kind)."""
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
        "within_kind": correlation(loss, experts, group_T=kind_T),
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
    groups = []
    for group in np.array_split(order, max(1, min(GROUPS, len(order) // 2))):
        of_token = experts_LT[:, group].mean(0)
        groups.append(
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
    return groups


def correlation(x_T: Array, y_T: Array, samples: int = SAMPLES, group_T: Array | None = None) -> dict:
    """`rho` with `low` and `high`, 95 %; None where there are too few tokens or one of the two does not vary. With
    groups, of the ranks minus the mean rank of their group."""
    rho = spearman(x_T, y_T, group_T)
    if rho is None:
        return {"rho": None, "low": None, "high": None, "tokens": len(x_T)}
    values = bootstrap(x_T, y_T, samples, group_T)
    low, high = np.quantile(values, (0.025, 0.975)) if len(values) else (np.nan, np.nan)
    return {"rho": rho, "low": float(low), "high": float(high), "tokens": len(x_T)}


def spearman(x_T: Array, y_T: Array, group_T: Array | None = None) -> float | None:
    if len(x_T) < FEWEST:
        return None
    rho_S = _of_ranks(x_T[None], y_T[None], None if group_T is None else group_T[None])
    return float(rho_S[0]) if len(rho_S) else None


def bootstrap(x_T: Array, y_T: Array, samples: int, group_T: Array | None = None) -> Array:
    """rho of that many samples of the same size; those in which one of the two does not vary are left out."""
    tokens = len(x_T)
    random = np.random.default_rng(0)
    blocks, correlations = -(-tokens // BLOCK), []
    chunk = max(1, AT_A_TIME // tokens)
    for first in range(0, samples, chunk):
        starts = random.integers(0, tokens, (min(chunk, samples - first), blocks, 1))
        drawn = ((starts + np.arange(BLOCK)) % tokens).reshape(len(starts), -1)[:, :tokens]
        correlations.append(_of_ranks(x_T[drawn], y_T[drawn], None if group_T is None else group_T[drawn]))
    return np.concatenate(correlations)


def _of_ranks(x_ST: Array, y_ST: Array, group_ST: Array | None) -> Array:
    """Correlation of the ranks in each row; rows in which one of the two does not vary are left out."""
    x_ST, y_ST = (_centred(rankdata(values, axis=1), group_ST) for values in (x_ST, y_ST))
    spread_S = np.sqrt((x_ST * x_ST).sum(1) * (y_ST * y_ST).sum(1))
    known = spread_S > 1e-9 * x_ST.shape[1]
    return (x_ST * y_ST).sum(1)[known] / spread_S[known]


def _centred(ranks_ST: Array, group_ST: Array | None) -> Array:
    """Minus the mean of the row, or of the group in the row."""
    if group_ST is None:
        return ranks_ST - ranks_ST.mean(1, keepdims=True)
    for group in np.unique(group_ST):
        mask_ST = group_ST == group
        means_S1 = (ranks_ST * mask_ST).sum(1, keepdims=True) / np.maximum(1, mask_ST.sum(1, keepdims=True))
        ranks_ST = np.where(mask_ST, ranks_ST - means_S1, ranks_ST)
    return ranks_ST
