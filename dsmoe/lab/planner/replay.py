"""Replay the routes of a real step on other numbers of expert-parallel ranks.

Published speeds are taken with forced balance; what a trained router does to the busiest rank decides the real one. A
trace says which experts each token chose, so load and traffic of any number of ranks and any placement of experts
follow by counting. `cost_of` says what that takes on some hardware; overlap plays no part.

Shapes: T tokens of the step, E experts, P ranks; rank p holds the tokens [p T / P, (p + 1) T / P).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import gcd

import numpy as np

from dsmoe.errors import ConfigError
from dsmoe.lab.benchmark.problem import parse_skew
from dsmoe.lab.planner.hardware import Hardware
from dsmoe.moe.expected_rows import resolve_dispatcher
from dsmoe.training.trace import RoutingTrace

EXCHANGES = 4  # a row goes out and comes home, forward, and its gradient again backward


@dataclass(frozen=True)
class Placement:
    """Which ranks hold a copy of each expert; a token goes to one of them."""

    name: str
    holds_EP: np.ndarray  # bool


@dataclass(frozen=True)
class Replayed:
    """One placement on one number of ranks: worst of all MoE layers, but for the means."""

    ranks: int
    placement: str
    load: float  # routes of the busiest rank over the mean, mean over layers
    worst_load: float
    received_rows: int  # de-duplicated rows that the busiest rank takes in at once, own tokens included
    sent_rows: float  # rows that leave a rank for another, mean over ranks and layers, as `dispatcher` sends them
    sent_routes: float  # the same if a token travelled once for each expert
    between_rows: float  # of `sent_rows`, those to another node
    busiest_routes: int  # of the busiest rank
    tokens: float  # of a rank
    dispatcher: str  # all_to_all: a token once to each rank; two_level: once to each other node, and on inside it


@dataclass(frozen=True)
class Cost:
    """What a replayed layer costs a rank, forward and backward."""

    sent_bytes: float  # mean over ranks
    between_share: float  # of it, to other nodes
    buffer_bytes: float  # of the busiest rank: rows, rows by expert, and the experts' activations
    expert_seconds: float | None  # of the busiest rank
    exchange_seconds: float | None  # until the busiest rank has all its rows


def cost_of(row: Replayed, hidden: int, ffn: int, dtype: str, hardware: Hardware | None = None) -> Cost:
    """Bytes and, on a hardware, seconds, for rows of `hidden` elements and experts of width `ffn`.

    Seconds are those of matrix products and of bytes; how well small products of few rows do is left out.
    """
    element = {"fp32": 4, "bf16": 2}[dtype]
    sent = row.sent_rows * EXCHANGES * hidden * element
    share = row.between_rows / row.sent_rows if row.sent_rows else 0.0
    buffers = (row.received_rows * hidden + row.busiest_routes * (2 * hidden + 3 * ffn)) * element
    if hardware is None:
        return Cost(sent, share, buffers, None, None)
    if dtype not in hardware.peak_tflops:
        raise ConfigError([f"--dtype: found {dtype}, expected one of {', '.join(hardware.peak_tflops)}"], hardware.name)
    rate = hardware.speed("experts").tflops[dtype] * 1e12
    slowest = sent * row.load  # what the busiest rank takes in
    far = hardware.between_nodes or hardware.within_node
    exchange = slowest * (1 - share) / (hardware.within_node.gb_s * 1e9) + slowest * share / (far.gb_s * 1e9)
    return Cost(sent, share, buffers, 3 * 2 * 3 * hidden * ffn * row.busiest_routes / rate, exchange)


def skewed(trace: RoutingTrace, text: str) -> RoutingTrace:
    """The tokens of a trace, with as many routes, but chosen anew so that a share of them goes to few experts.

    Args:
        text: "30:4", 30 % of all routes on experts 0 to 3.

    A token takes different experts still; where one would come twice, the next free one does.

    Raises:
        ConfigError: no such skew, or more hot experts than there are.
    """
    share, hot = parse_skew(text)
    if hot >= trace.num_experts:
        raise ConfigError([f"--skew: found {hot} hot experts, expected fewer than {trace.num_experts}"], "the replay")
    weights_E = np.full(trace.num_experts, (1 - share) / (trace.num_experts - hot))
    weights_E[:hot] = share / hot
    random, layers = np.random.default_rng(0), []
    for offsets, _ in trace.layers:
        # The k largest of log(weight) + Gumbel noise are k different experts, drawn by their weights.
        keys_TE = np.log(weights_E) + random.gumbel(size=(len(offsets) - 1, trace.num_experts))
        order_TE = np.argsort(-keys_TE, axis=1)
        chosen_experts = [np.sort(order_TE[token, :count]) for token, count in enumerate(np.diff(offsets))]
        layers.append((offsets, np.concatenate(chosen_experts).astype(np.int16)))
    return replace(trace, layers=layers)


def contiguous(counts_E: np.ndarray, ranks: int) -> Placement:
    """Experts in order, as many on each rank: where dsmoe puts them."""
    return _of_owner("contiguous", np.arange(len(counts_E)) // (len(counts_E) // ranks), ranks)


def round_robin(counts_E: np.ndarray, ranks: int) -> Placement:
    """Expert e on rank e mod P."""
    return _of_owner("round robin", np.arange(len(counts_E)) % ranks, ranks)


def load_aware(counts_E: np.ndarray, ranks: int) -> Placement:
    """Experts by falling load, each to the emptiest rank with a free place; as many on each rank."""
    owner = np.empty(len(counts_E), dtype=np.int64)
    load, free = np.zeros(ranks), np.full(ranks, len(counts_E) // ranks)
    for expert in np.argsort(-counts_E, kind="stable"):
        rank = min(np.flatnonzero(free), key=lambda p: load[p])
        owner[expert], load[rank], free[rank] = rank, load[rank] + counts_E[expert], free[rank] - 1
    return _of_owner("load-aware", owner, ranks)


def replicated(counts_E: np.ndarray, ranks: int) -> Placement:
    """Load-aware, and every rank has room for one more expert: the copies go to the experts whose share of routes for
    each copy is largest, on the emptiest ranks that do not hold them."""
    holds_EP = load_aware(counts_E, ranks).holds_EP.copy()
    free = np.ones(ranks, dtype=bool)
    while free.any():
        share_E = counts_E / holds_EP.sum(1)
        load_P = share_E @ holds_EP
        for expert in np.argsort(-share_E, kind="stable"):
            open_to = np.flatnonzero(free & ~holds_EP[expert])
            if len(open_to):
                rank = min(open_to, key=lambda p: load_P[p])
                holds_EP[expert, rank], free[rank] = True, False
                break
        else:
            break
    return Placement("replicated", holds_EP)


PLACEMENTS: tuple[Callable[[np.ndarray, int], Placement], ...] = (contiguous, round_robin, load_aware, replicated)


def _of_owner(name: str, owner_E: np.ndarray, ranks: int) -> Placement:
    return Placement(name, owner_E[:, None] == np.arange(ranks))


def problems(trace: RoutingTrace, ranks: list[int]) -> list[str]:
    """Why a trace cannot be replayed on these numbers of ranks."""
    experts, tokens = trace.num_experts, len(trace.tokens_T)
    return [
        f"--ep: found {count}, expected a divisor of the trace's {experts} experts and at most its {tokens} tokens"
        for count in ranks
        if count < 1 or experts % count or count > tokens
    ]


def replay(
    trace: RoutingTrace, ranks: list[int], per_node: int | None = None, dispatcher: str = "auto"
) -> list[Replayed]:
    """Every placement on every number of ranks, and the same number of routes spread evenly ("forced balance").

    Args:
        per_node: ranks of a node; None: all are in one.
        dispatcher: as `model.token_dispatcher`.

    Placements that look at the load are made for each layer from the load of this very step, the best they can know.

    Raises:
        ConfigError: a number of ranks does not divide the experts.
    """
    if reasons := problems(trace, ranks):
        raise ConfigError(reasons, "the replay")
    real = [routes_of(offsets, experts) for offsets, experts in trace.layers]
    balanced = [(token_N, dealt(len(token_N), trace.num_experts)) for token_N, _ in real]
    sizes = len(trace.tokens_T), trace.num_experts
    mean_k = float(np.mean([len(expert_N) for _, expert_N in real])) / len(trace.tokens_T)
    rows: list[Replayed] = []
    for count in ranks:
        node = per_node or count
        known = resolve_dispatcher(dispatcher, trace.num_experts, mean_k, count, None if count % node else node)
        rows.append(_replayed("forced balance", balanced, sizes, count, contiguous, node, known))
        rows += [_replayed(None, real, sizes, count, place, node, known) for place in PLACEMENTS]
    return rows


def dealt(routes: int, experts: int) -> np.ndarray:
    """int64 [N]: every expert as often as any other, up to one, and those of a token far from each other."""
    stride = next(s for s in range(max(1, round(0.618 * experts)), 2 * experts + 2) if gcd(s, experts) == 1)
    return np.arange(routes) * stride % experts


def routes_of(offsets: np.ndarray, experts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Token and expert of each route: int64 [N] both."""
    return np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)), experts.astype(np.int64)


def _replayed(
    name: str | None, layers: list, sizes: tuple[int, int], ranks: int, place, per_node: int, dispatcher: str
) -> Replayed:
    (tokens, num_experts), loads, received, rows, routes, far, busiest = sizes, [], [], [], [], [], []
    for token_N, expert_N in layers:
        placement = place(np.bincount(expert_N, minlength=num_experts), ranks)
        rank_N = destinations(expert_N, placement)
        load_P = np.bincount(rank_N, minlength=ranks)
        loads.append(load_P.max() / load_P.mean() if len(rank_N) else 1.0)
        busiest.append(load_P.max())
        token_M, rank_M = np.divmod(np.unique(token_N * ranks + rank_N), ranks)  # a token once to each rank
        received.append(np.bincount(rank_M, minlength=ranks).max())
        home_M = token_M * ranks // tokens
        inside, between = rows_sent(token_M, home_M, rank_M, ranks, per_node, dispatcher)
        rows.append((inside + between) / ranks)
        far.append(between / ranks)
        routes.append((token_N * ranks // tokens != rank_N).sum() / ranks)
        name = name or placement.name
    return Replayed(
        ranks, name, float(np.mean(loads)), float(max(loads)), int(max(received)), float(np.mean(rows)),
        float(np.mean(routes)), float(np.mean(far)), int(max(busiest)), tokens / ranks,
        dispatcher,
    )  # fmt: skip


def rows_sent(
    token_M: np.ndarray, home_M: np.ndarray, rank_M: np.ndarray, ranks: int, per_node: int, dispatcher: str
) -> tuple[int, int]:
    """Rows of all ranks that travel inside nodes, and between them.

    Args:
        token_M, home_M, rank_M: the token, its rank, and a rank that it needs, each once.
    """
    node_M = rank_M // per_node
    if dispatcher != "two_level":
        between = home_M // per_node != node_M
        return int((~between & (home_M != rank_M)).sum()), int(between.sum())
    relay_M = node_M * per_node + home_M % per_node  # the rank with its place on the other node, or it itself
    far = home_M // per_node != node_M
    return int((relay_M != rank_M).sum()), len(np.unique(token_M[far] * ranks + node_M[far]))


def destinations(expert_N: np.ndarray, placement: Placement) -> np.ndarray:
    """int64 [N], the rank that each route goes to: the copies of an expert take its routes in turn."""
    order = np.argsort(expert_N, kind="stable")
    counts_E = np.bincount(expert_N, minlength=len(placement.holds_EP))
    turn_N = np.empty_like(order)
    turn_N[order] = np.arange(len(order)) - np.repeat(counts_E.cumsum() - counts_E, counts_E)
    copies_E = placement.holds_EP.sum(1)
    rank_X = placement.holds_EP.nonzero()[1]  # ranks of expert 0, then of expert 1, ...
    return rank_X[(copies_E.cumsum() - copies_E)[expert_N] + turn_N % copies_E[expert_N]]
