"""One benchmark problem: sizes, routing load, and tokens that every router sends exactly where the load says.

A router cannot be told its routes without replacing it, so its input is made for them. Rows w_e of the gate are
(nearly) orthonormal, u is orthogonal to all of them, and

    W_e = g (w_e - b u),    x_t = u + W_S^+ 1  for the experts S_t of token t    =>    W_e x_t = g (1 - b), e in S_t
                                                                                      about -g b elsewhere

so the same tokens make softmax top-k, ReLU, top-p and thresholds all choose S_t.

Shapes: T tokens of all ranks, E experts, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dsmoe.errors import ConfigError

SHIFT = 0.75  # b
GAIN = 20.0  # g
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TRACES = Path(__file__).with_name("traces")


def mistake(line: str) -> ConfigError:
    """The error for a benchmark that cannot be."""
    return ConfigError([line], "the benchmark's command line")


@dataclass(frozen=True)
class Problem:
    """`tokens` are those of all `ranks` together. `load`: balanced, real, or PERCENT:EXPERTS such as 30:4."""

    experts: int = 8
    tokens: int = 4096
    hidden: int = 256
    ffn: int = 512
    k: int = 2
    dtype: str = "fp32"
    ranks: int = 1
    load: str = "balanced"

    def with_load(self, load: str) -> Problem:
        return replace(self, load=load)

    def check(self) -> None:
        """Raise `ConfigError` for sizes that cannot be measured."""
        for name in ("experts", "tokens", "hidden", "ffn", "k", "ranks"):
            if getattr(self, name) < 1:
                raise mistake(f"{name}: found {getattr(self, name)}, expected at least 1")
        if self.dtype not in DTYPES:
            raise mistake(f"dtype: found {self.dtype!r}, expected {' or '.join(DTYPES)}")
        if self.k > self.experts:
            raise mistake(f"k: found {self.k}, expected at most the number of experts ({self.experts})")
        for name in ("experts", "tokens"):
            if getattr(self, name) % self.ranks:
                raise mistake(f"{name}: found {getattr(self, name)}, expected a multiple of ranks ({self.ranks})")

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def routes(self) -> int:
        """Active (token, expert) pairs of all ranks; the mean is k for every case."""
        return self.tokens * self.k

    @property
    def element_bytes(self) -> int:
        return self.torch_dtype.itemsize

    def expert_flops(self) -> float:
        """Of the three projections, forward and twice that backward, on all ranks."""
        return 18.0 * self.routes * self.hidden * self.ffn

    def weight_bytes(self) -> int:
        """Of one rank's experts, all of which have work in every load."""
        return 3 * self.hidden * self.ffn * self.experts // self.ranks * self.element_bytes

    def streamed_bytes(self) -> int:
        """What one rank must move through memory at least once, forward and backward.

        Rows: in, out, gradient of out, in again for the weight gradients, gradient of in. Weights: read forward, read
        backward, their gradients written.
        """
        rows = 5 * self.routes // self.ranks * self.hidden * self.element_bytes
        return rows + 3 * self.weight_bytes()

    def activation_bytes(self) -> int:
        """Rows and activations of one rank: hidden out and its input's gradient [T, H]; for each route its row in and
        out [H], gate and up [2F] and their product [F]."""
        tokens, routes = self.tokens // self.ranks, self.routes // self.ranks
        return (2 * tokens * self.hidden + routes * (2 * self.hidden + 3 * self.ffn)) * self.element_bytes


def parse_skew(text: str) -> tuple[float, int]:
    """ "30:4" -> (0.3, 4): share of all routes, on that many experts. Raises `ConfigError`."""
    percent, _, hot = text.partition(":")
    try:
        share, experts = float(percent) / 100, int(hot)
    except ValueError:
        share, experts = -1.0, 0
    if not 0 < share < 1 or experts < 1:
        raise mistake(f"load: found {text!r}, expected balanced, real or PERCENT:EXPERTS such as 30:4")
    return share, experts


def check_load(problem: Problem) -> None:
    """Raise `ConfigError` where no set of routes has that load."""
    quotas = quotas_of(problem)
    if quotas.max() > problem.tokens:
        raise mistake(
            f"load {problem.load}: one expert would get {quotas.max()} routes, expected at most one for each of the "
            f"{problem.tokens} tokens. Spread the load over more experts"
        )
    if quotas.min() < 0:
        raise mistake(f"load {problem.load}: more hot experts than the {problem.experts} there are")


def quotas_of(problem: Problem) -> np.ndarray:
    """int64 [E], routes of each expert; they sum to T k."""
    experts = problem.experts
    if problem.load == "balanced":
        share = np.full(experts, 1 / experts)
    elif problem.load == "real":
        share = _stretched(trace_routes()[1], experts)
    else:
        hot_share, hot = parse_skew(problem.load)
        if hot >= experts:
            return np.full(experts, -1)
        share = np.full(experts, (1 - hot_share) / (experts - hot))
        share[np.random.default_rng(1).permutation(experts)[:hot]] = hot_share / hot
    exact = share * problem.routes
    quotas = np.floor(exact).astype(np.int64)
    quotas[np.argsort(quotas - exact, kind="stable")[: problem.routes - quotas.sum()]] += 1
    return quotas


def trace_routes() -> tuple[np.ndarray, np.ndarray]:
    """The recorded trace: int [T, k] experts of each token, and the share of routes of each of its experts."""
    with np.load(TRACES / "routes.npz") as file:
        routes, experts = file["routes"].astype(np.int64), int(file["experts"])
    return routes, np.bincount(routes.ravel(), minlength=experts) / routes.size


def _stretched(share: np.ndarray, experts: int) -> np.ndarray:
    """The popularity curve of a trace for another number of experts: each takes its part of the sorted curve."""
    if len(share) == experts:
        return share
    edges = np.linspace(0, 1, len(share) + 1)
    mass = np.concatenate(([0.0], np.cumsum(np.sort(share)[::-1])))
    stretched = np.diff(np.interp(np.linspace(0, 1, experts + 1), edges, mass))
    return np.random.default_rng(2).permutation(stretched)


def routing_map(problem: Problem, variable: bool) -> Tensor:
    """bool [T, E] with the problem's load and T k routes.

    variable: a quarter of the tokens has k - 1 experts and a quarter k + 1, where there are that many; else all have k.
    """
    check_load(problem)
    tokens, experts, k = problem.tokens, problem.experts, problem.k
    if problem.load == "real" and not variable:
        routes, share = trace_routes()
        if len(share) == experts and routes.shape[1] == k:
            rows = torch.from_numpy(np.resize(routes, (tokens, k)))
            return torch.zeros(tokens, experts, dtype=torch.bool).scatter(1, rows, True)
    draw = np.random.default_rng(0)
    per_token = np.full(tokens, k)
    if variable and 1 < k < experts:
        quarter = tokens // 4
        per_token[:quarter], per_token[quarter : 2 * quarter] = k - 1, k + 1
        per_token = draw.permutation(per_token)
    token_R = np.repeat(np.arange(tokens), per_token)
    expert_R = draw.permutation(np.repeat(np.arange(experts), quotas_of(problem)))
    for _ in range(10_000):  # exchange routes until no token has an expert twice
        pair_R = token_R * experts + expert_R
        first = np.zeros(len(pair_R), dtype=bool)
        first[np.unique(pair_R, return_index=True)[1]] = True
        twice = np.flatnonzero(~first)
        if not len(twice):
            break
        for place in twice:
            other = draw.integers(len(expert_R))
            expert_R[place], expert_R[other] = expert_R[other], expert_R[place]
    else:
        raise mistake(f"load {problem.load}: found no routes of {k} different experts a token with it")
    map_TE = torch.zeros(tokens, experts, dtype=torch.bool)
    map_TE[torch.from_numpy(token_R), torch.from_numpy(expert_R)] = True
    return map_TE


@dataclass(frozen=True)
class Gate:
    """The directions routes are made of, fp32."""

    directions_EH: Tensor  # w
    shift_H: Tensor  # u
    scale: float  # of the tokens, whose elements have about unit variance

    @classmethod
    def draw(cls, problem: Problem) -> Gate:
        experts, hidden = problem.experts, problem.hidden
        random = torch.Generator().manual_seed(7)
        drawn = torch.randn(hidden, experts + 1, generator=random)
        if experts < hidden:
            drawn = torch.linalg.qr(drawn).Q
        else:
            drawn = drawn / drawn.norm(dim=0)
        shift = drawn[:, 0]
        directions = drawn[:, 1:].t()
        directions = directions - (directions @ shift)[:, None] * shift
        directions = directions / directions.norm(dim=1, keepdim=True)
        return cls(directions.contiguous(), shift.contiguous(), (hidden / (problem.k + 1)) ** 0.5)

    def weight_EH(self) -> Tensor:
        """W, for every gate that is one matrix."""
        return GAIN / self.scale * (self.directions_EH - SHIFT * self.shift_H)

    def hidden_TH(self, map_TE: Tensor) -> Tensor:
        """Tokens that W sends to the experts of the map."""
        hidden_TH = self.shift_H.repeat(map_TE.size(0), 1)
        count_T = map_TE.sum(1)
        for count in count_T.unique().tolist():
            if count:
                chosen = (count_T == count).nonzero().squeeze(1)
                rows_NSH = self.directions_EH[map_TE[chosen].nonzero()[:, 1].view(-1, count)]
                solved = torch.linalg.solve(rows_NSH @ rows_NSH.mT, torch.ones(len(chosen), count, 1))
                hidden_TH[chosen] += (rows_NSH.mT @ solved).squeeze(2)
        return hidden_TH * self.scale
