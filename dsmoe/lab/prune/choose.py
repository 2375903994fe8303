"""Which experts go: first those without tokens, then pairs and groups whose outputs agree, the most alike first.

Every layer of a model has the same number of experts, so every layer loses as many: as many as the layer with the
fewest to spare has, or as many as are asked for. Where a router has groups of experts, the same holds for each group.

Experts are alike by the cosine of their outputs on the same tokens (HC-SMoE, arXiv 2410.08589): a cluster's likeness is
that of its most different two (complete linkage). A merged expert is their mean weighted by load (M-SMoE, 2310.01334).

Shapes: E experts before, N after.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.cluster.hierarchy import linkage

from dsmoe.errors import ConfigError


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of a layer's experts: those that are in no cluster are dropped."""

    clusters: list[list[int]]  # N, of one expert each that stays or of several that merge; ascending
    counts_E: np.ndarray  # tokens of each

    @property
    def dropped(self) -> list[int]:
        return sorted(set(range(len(self.counts_E))) - {expert for cluster in self.clusters for expert in cluster})

    @property
    def merged(self) -> list[list[int]]:
        return [cluster for cluster in self.clusters if len(cluster) > 1]

    def shares_NE(self, whole: bool) -> np.ndarray:
        """Each new expert's shares of the old ones, by their load; `whole`: all of it from the busiest."""
        shares = np.zeros((len(self.clusters), len(self.counts_E)))
        for new, cluster in enumerate(self.clusters):
            load = self.counts_E[cluster].astype(float)
            if whole or not load.sum():
                shares[new, cluster[int(load.argmax())]] = 1.0
            else:
                shares[new, cluster] = load / load.sum()
        return shares


@dataclass(frozen=True)
class Candidates:
    """What can go of some experts that must stay equally many (a layer, or a group of one), in the order in which it
    goes: experts without tokens, then merges."""

    experts: list[int]
    dead: list[int]
    merges: list[tuple[int, int]]  # of clusters, numbered as scipy's `linkage` does: new ones count on
    alike: int  # merges of experts that are alike enough

    @property
    def spare(self) -> int:
        return min(len(self.dead) + self.alike, len(self.experts) - 1)

    def clusters(self, removed: int) -> list[list[int]]:
        dropped = set(self.dead[:removed])
        alive = [expert for expert in self.experts if expert not in self.dead]
        clusters: dict[int, list[int]] = {number: [expert] for number, expert in enumerate(alive)}
        for number, (a, b) in enumerate(self.merges[: max(0, removed - len(self.dead))]):
            clusters[len(alive) + number] = sorted(clusters.pop(a) + clusters.pop(b))
        kept_dead = [[expert] for expert in self.dead if expert not in dropped]
        return sorted([*clusters.values(), *kept_dead])


def candidates(experts: list[int], counts_E: np.ndarray, cosine_EE: np.ndarray, dead: float, similar: float):
    """dead: share of the mean load up to which an expert counts as one without tokens; similar: least cosine."""
    limit = dead * counts_E.mean()
    gone = sorted((e for e in experts if counts_E[e] <= limit), key=lambda e: (counts_E[e], e))
    gone = gone[: len(experts) - 1]
    alive = [expert for expert in experts if expert not in gone]
    if len(alive) < 2:
        return Candidates(experts, gone, [], 0)
    first, second = np.triu_indices(len(alive), 1)
    places = np.array(alive)
    distances = np.clip(1 - cosine_EE[places[first], places[second]], 0, 2)
    tree = linkage(distances, "complete")
    return Candidates(experts, gone, [(int(a), int(b)) for a, b in tree[:, :2]], int((tree[:, 2] <= 1 - similar).sum()))


def plan_layers(
    counts_LE: np.ndarray, cosine_LEE: np.ndarray, groups: int, experts: int | None, dead: float, similar: float
) -> list[LayerPlan]:
    """The plan of every MoE layer.

    Args:
        groups: of neighbouring experts that stay equally large.
        experts: how many are to stay in a layer; None: as few as the limits allow.

    Raises:
        ConfigError: nothing may go, or `experts` cannot be.
    """
    total = counts_LE.shape[1]
    size = total // groups
    units_by_layer = [
        [
            candidates(list(range(group * size, (group + 1) * size)), counts_E, cosine_EE, dead, similar)
            for group in range(groups)
        ]
        for counts_E, cosine_EE in zip(counts_LE, cosine_LEE, strict=True)
    ]
    if experts is not None:
        if not groups <= experts < total or experts % groups:
            multiple = f", a multiple of the router's {groups} groups" if groups > 1 else ""
            raise ConfigError(
                [f"--experts: found {experts}, expected {groups} to {total - groups}{multiple}"], "the command line"
            )
        removed = size - experts // groups
    else:
        removed = min(unit.spare for layer in units_by_layer for unit in layer)
        if not removed:
            layer = next(place for place, units in enumerate(units_by_layer) if not min(unit.spare for unit in units))
            raise ConfigError(
                [
                    f"MoE layer {layer} has no expert to spare: each takes more than {dead:g} of the mean load, and no "
                    f"two have outputs with a cosine of {similar:g}. All layers keep the same number. --experts N "
                    "takes the least needed all the same; --dead and --similar move the limits"
                ],
                "the command line",
            )
    return [
        LayerPlan([cluster for unit in units for cluster in unit.clusters(removed)], counts_E)
        for units, counts_E in zip(units_by_layer, counts_LE, strict=True)
    ]
