"""How unevenly expert-parallel ranks are loaded: given, from a skew, or as a recorded run had it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

from dsmoe.errors import ConfigError
from dsmoe.lab.benchmark.problem import parse_skew
from dsmoe.lab.planner.replay import problems, replay
from dsmoe.training.trace import RoutingTrace, read_trace

Load = Callable[[int], float]  # expert-parallel size -> routes of the busiest rank over the mean


def even(imbalance: float = 1.0) -> Load:
    """The same for every number of ranks above 1."""
    return lambda ep: imbalance if ep > 1 else 1.0


def skewed(share: float, hot: int, experts: int) -> Load:
    """A share of all routes on `hot` experts that lie side by side, so that one rank may hold them all."""
    shares_E = np.full(experts, (1 - share) / (experts - hot))
    shares_E[:hot] = share / hot
    return lambda ep: float(shares_E.reshape(ep, -1).sum(1).max() * ep)


def recorded(path: Path, experts: int) -> Load:
    """As a trace replays: mean over its MoE layers. Raises `ConfigError` for a trace of another number of experts."""
    trace = read_trace(path)
    if trace.num_experts != experts:
        raise ConfigError([f"--trace: found a run of {trace.num_experts} experts, expected {experts}"], str(path))

    @cache
    def load(ep: int) -> float:
        return _contiguous(trace, ep)

    return load


def _contiguous(trace: RoutingTrace, ep: int) -> float:
    if ep == 1:
        return 1.0
    if reasons := problems(trace, [ep]):
        raise ConfigError(reasons, "the trace")
    return next(row.load for row in replay(trace, [ep]) if row.placement == "contiguous")


def of_skew(text: str, experts: int) -> Load:
    """From "30:4", 30 % of all routes on 4 experts. Raises `ConfigError`."""
    try:
        share, hot = parse_skew(text)
    except ConfigError:
        raise ConfigError([f"--skew: found {text!r}, expected PERCENT:EXPERTS such as 30:4"], "the plan") from None
    if hot >= experts:
        raise ConfigError([f"--skew: found {hot} hot experts, expected fewer than the {experts} there are"], "the plan")
    return skewed(share, hot, experts)
