"""How evenly the experts of each layer are used, and how many experts tokens take.

With c_e the tokens of expert e in a layer (routes), m their mean over the E experts and q_e = c_e / sum c:

    max_over_mean    max c / m; 1 is perfect
    max_violation    max c / m - 1                                MaxVio of loss-free balancing (arXiv 2408.15664)
    cv               standard deviation of c over experts / m     Shazeer et al. (arXiv 1701.06538, Eq. 7: its square)
    entropy          exp(-sum q log q) / E                        effective experts over all; 1 is perfect
    dead             experts without a token of these texts
    no_expert        share of tokens that no expert of the layer takes

Shapes: L MoE layers, T tokens, E experts.
"""

from __future__ import annotations

import numpy as np

from dsmoe.lab.inspect.reading import Array, Reading
from dsmoe.lab.study.probe.routes import KINDS

PARTS = 8  # of the longest window, for means by position


def load(map_LTE: Array) -> list[dict]:
    """The figures above for each layer, and `counts`. Those of a ratio are None in a layer without any route."""
    layers = []
    for map_TE in map_LTE:
        counts_E = map_TE.sum(0)
        mean = counts_E.mean()
        share_E = counts_E[counts_E > 0] / max(1, counts_E.sum())
        used = bool(counts_E.any())
        layers.append(
            {
                "experts_per_token": float(map_TE.sum(1).mean()),
                "no_expert": float((~map_TE.any(1)).mean()),
                "max_over_mean": float(counts_E.max() / mean) if used else None,
                "max_violation": float(counts_E.max() / mean - 1) if used else None,
                "cv": float(counts_E.std() / mean) if used else None,
                "entropy": float(np.exp(-(share_E * np.log(share_E)).sum()) / len(counts_E)) if used else None,
                "dead": np.flatnonzero(counts_E == 0).tolist(),
                "counts": counts_E.tolist(),
            }
        )
    return layers


def by_kind(reading: Reading) -> list[dict]:
    """Experts per token of each kind of token, of all layers and of each; the most frequent kind first."""
    groups = [(kind, reading.kind_T == number) for number, kind in enumerate(KINDS) if (reading.kind_T == number).any()]
    return [
        {"kind": kind, **_means(reading, mask_T)} for kind, mask_T in sorted(groups, key=lambda g: -int(g[1].sum()))
    ]


def by_position(reading: Reading) -> list[dict]:
    """The same for up to eight equal parts of the longest window that was read."""
    longest = int(reading.position_T.max()) + 1
    part_T = reading.position_T * PARTS // longest if longest >= PARTS else reading.position_T
    windows = []
    for part in np.unique(part_T):
        mask_T = part_T == part
        places = reading.position_T[mask_T]
        windows.append({"first": int(places.min()), "last": int(places.max()), **_means(reading, mask_T)})
    return windows


def _means(reading: Reading, mask_T: Array) -> dict:
    by_layer = reading.experts_LT[:, mask_T].mean(1)
    losses = reading.next_loss_T[mask_T]
    return {
        "tokens": int(mask_T.sum()),
        "experts": float(by_layer.mean()),
        "effective": float(reading.effective_LT[:, mask_T].mean()),
        "experts_by_layer": by_layer.tolist(),
        "loss": float(np.nanmean(losses)) if np.isfinite(losses).any() else None,
    }
