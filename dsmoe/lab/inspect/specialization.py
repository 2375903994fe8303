"""What the experts of a layer are for: their typical tokens, vocabulary and domains, and who works with whom.

    share of x           N_xe / N_x, of the occurrences of token x those that expert e takes: vocabulary specialization
                         of OLMoE (arXiv 2409.02060, section 5.4), for its input tokens
    domain share         N_De / N_D, of the tokens of text D those that e takes: OLMoE's domain specialization (5.3);
                         k/E where routing does not see the domain
    typical tokens       those whose share exceeds the expert's rate r = N_e / T most, in standard errors:
                         z = (share - r) / sqrt(r (1 - r) / N_x); ties go to the larger mean weight
    vocabulary, domain   I(X; Z_e) / H(Z_e): how much of whether e is active is known from the token id, or the text
                         (uncertainty coefficient, Theil 1970); 0 nothing, 1 all. Rare ids make it large by chance:
                         `vocabulary_chance` is the same with ids shuffled among the tokens
    co-activation        N_ij / N_i, of the tokens of expert i those that j takes as well: OLMoE (5.2)

Shapes: T tokens, E experts.
"""

from __future__ import annotations

import numpy as np

from dsmoe.lab.inspect.reading import Array, Reading

TYPICAL = 8  # tokens that are listed for an expert
PAIRS = 8  # pairs that are listed for a layer
SHUFFLES = 3


def specialization(reading: Reading) -> list[dict]:
    """For each layer: `experts`, a list with the figures above for each expert, and `pairs`, those most often active
    together; `together` [E, E] counts tokens that both take, `domains` [texts, E] are domain shares."""
    ids, inverse = np.unique(reading.ids_T, return_inverse=True)
    text_of = {int(token): text for token, text in zip(reading.ids_T, reading.token_T)}
    random = np.random.default_rng(0)
    shuffled = [random.permutation(inverse) for _ in range(SHUFFLES)]
    layers = []
    for map_TE, probs_TE in zip(reading.map_LTE, reading.probs_LTE):
        vocabulary_E = known_from(map_TE, inverse)
        chance_E = np.mean([known_from(map_TE, ids_T) for ids_T in shuffled], axis=0)
        domain_E = known_from(map_TE, reading.text_T)
        counts_XE = sums_by(inverse, map_TE.astype(np.float64))
        weight_XE = sums_by(inverse, probs_TE.astype(np.float64))
        occurrences_X = np.bincount(inverse)
        experts = [
            {
                "vocabulary": _number(vocabulary_E[expert]),
                "vocabulary_chance": _number(chance_E[expert]),
                "domain": _number(domain_E[expert]),
                "typical": [
                    {
                        "id": int(ids[x]), "token": text_of[int(ids[x])], "count": int(occurrences_X[x]),
                        "share": float(counts_XE[x, expert] / occurrences_X[x]),
                    }
                    for x in typical(counts_XE[:, expert], weight_XE[:, expert], occurrences_X)
                ],
            }
            for expert in range(map_TE.shape[1])
        ]  # fmt: skip
        together_EE = co_activation(map_TE)
        layers.append(
            {
                "experts": experts,
                "domains": (sums_by(reading.text_T, map_TE) / np.bincount(reading.text_T)[:, None]).tolist(),
                "together": together_EE.tolist(),
                "pairs": closest(together_EE),
            }
        )
    return layers


def sums_by(group_T: Array, values_TE: Array) -> Array:
    """Row g: the sum of the rows of that group, fp64."""
    total = np.zeros((int(group_T.max()) + 1, values_TE.shape[1]))
    np.add.at(total, group_T, values_TE)
    return total


def typical(counts_X: Array, weight_X: Array, occurrences_X: Array) -> list[int]:
    """Places of the expert's typical tokens, the most typical first; only such that it takes more than others."""
    rate = counts_X.sum() / occurrences_X.sum()
    if rate in (0.0, 1.0):  # it takes no token, or all alike: those with the largest weight
        return np.argsort(-weight_X / occurrences_X, kind="stable")[:TYPICAL].tolist() if rate else []
    z_X = (counts_X / occurrences_X - rate) / np.sqrt(rate * (1 - rate) / occurrences_X)
    order = np.lexsort((-weight_X / occurrences_X, -np.round(z_X, 9)))
    return [int(x) for x in order[:TYPICAL] if z_X[x] > 0]


def known_from(map_TE: Array, group_T: Array) -> Array:
    """I(group; active) / H(active) of each expert, fp64 [E]; nan where it takes no token, or all."""
    tokens_G = np.bincount(group_T)
    active_GE = sums_by(group_T, map_TE)
    entropy_E = binary_entropy(map_TE.mean(0))
    present = tokens_G > 0
    inside_GE = binary_entropy(active_GE[present] / tokens_G[present, None])
    conditional_E = (tokens_G[present, None] * inside_GE).sum(0) / tokens_G.sum()
    return np.divide(entropy_E - conditional_E, entropy_E, out=np.full_like(entropy_E, np.nan), where=entropy_E > 0)


def binary_entropy(p: Array) -> Array:
    """Nats of a bit that is 1 with probability p."""
    p = np.clip(p, 0.0, 1.0)
    parts = [np.where(q > 0, -q * np.log(np.where(q > 0, q, 1.0)), 0.0) for q in (p, 1 - p)]
    return parts[0] + parts[1]


def co_activation(map_TE: Array) -> Array:
    """int64 [E, E]: tokens that both experts take; on the diagonal those of one."""
    active = map_TE.astype(np.float64)  # exact, and numpy multiplies integers slowly
    return (active.T @ active).astype(np.int64)


def closest(together_EE: Array) -> list[dict]:
    """Pairs by the tokens of both over those of either (Jaccard), most first; only such that share a token."""
    single_E = together_EE.diagonal()
    first, second = np.triu_indices(len(together_EE), 1)
    both = together_EE[first, second]
    overlap = both / np.maximum(1, single_E[first] + single_E[second] - both)
    order = np.argsort(-overlap, kind="stable")[:PAIRS]
    return [
        {
            "experts": [int(first[x]), int(second[x])], "tokens": int(both[x]), "overlap": float(overlap[x]),
            "of_first": float(both[x] / single_E[first[x]]), "of_second": float(both[x] / single_E[second[x]]),
        }
        for x in order
        if both[x]
    ]  # fmt: skip


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
