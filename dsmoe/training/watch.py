"""What goes wrong in a run without stopping it: loss spikes, routing that collapses, exchanges that become slow.

Each watch sees numbers that are the same on every rank, so every rank comes to the same verdict.
"""

from __future__ import annotations

import statistics
from collections import deque
from itertools import pairwise

from dsmoe.routers.recorder import RoutingTotals

REPEAT = 100  # steps before the same warning comes again


class LossSpikes:
    """A loss far above the recent ones: beyond the median by 8 robust standard deviations and a tenth of the median.

    The robust deviation is 1.4826 times the median distance from the median, which earlier spikes do not widen.
    """

    HISTORY, AT_LEAST = 100, 20

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=self.HISTORY)

    def see(self, loss: float) -> float | None:
        """The bound that a finite loss exceeds; None if it is no spike. Spikes do not become history."""
        if len(self._losses) >= self.AT_LEAST:
            median = statistics.median(self._losses)
            deviation = 1.4826 * statistics.median(abs(value - median) for value in self._losses)
            bound = median + max(8 * deviation, 0.1 * abs(median))
            if loss > bound:
                return bound
        self._losses.append(loss)
        return None


class RoutingWatch:
    """Warns, within 20 steps, about an MoE layer whose routing collapses.

    - *one expert takes all*: the load is as if it were on fewer experts than a tenth above what a token uses
      (the effective number of experts, (sum c)^2 / sum c^2).
    - *dead layer*: fewer than one token in a hundred takes an expert.
    - *density runs away*: a token uses twice the experts that it used 10 steps ago, and the number grows step by step.
    """

    PATIENCE = 10  # steps in a row

    def __init__(self) -> None:
        self._since: dict[tuple[int, str], int] = {}  # how many steps in a row
        self._warned: dict[tuple[int, str], int] = {}  # step
        self._density: dict[int, deque[float]] = {}

    def see(self, totals: RoutingTotals, step: int) -> list[str]:
        """Warnings after a step, each naming the MoE layer (counted from 0) and what is wrong."""
        counts_LE = totals.counts_LE.double().cpu()
        tokens, without_L = max(1.0, float(totals.tokens)), totals.without_expert_L.tolist()
        most_L, busiest_L = (values.tolist() for values in counts_LE.max(1))
        layers = zip(
            counts_LE.sum(1).tolist(), counts_LE.square().sum(1).tolist(), most_L, busiest_L, without_L, strict=True
        )
        warnings = []
        for layer, (total, squares, most, busiest, without) in enumerate(layers):
            signs = {
                "one": self._one_expert(total, squares, most, busiest, total / tokens, counts_LE.size(1)),
                "dead": self._dead(without / tokens),
                "density": self._runs_away(layer, total / tokens),
            }
            for what, text in signs.items():
                key = layer, what
                self._since[key] = self._since.get(key, 0) + 1 if text else 0
                due = step - self._warned.get(key, -REPEAT) >= REPEAT
                if text and due and self._since[key] >= (1 if what == "density" else self.PATIENCE):
                    self._warned[key] = step
                    warnings.append(f"MoE layer {layer}: {text}")
        return warnings

    def _one_expert(
        self, total: float, squares: float, most: float, busiest: int, per_token: float, experts: int
    ) -> str | None:
        used = max(1.0, per_token)
        if not total or total**2 / squares >= 1.1 * used or experts < 2 * used:
            return None
        return f"expert {busiest} takes {most / total:.0%} of the routes for {self.PATIENCE} steps"

    def _dead(self, without: float) -> str | None:
        return f"{without:.1%} of the tokens take no expert for {self.PATIENCE} steps" if without > 0.99 else None

    def _runs_away(self, layer: int, per_token: float) -> str | None:
        recent = self._density.setdefault(layer, deque(maxlen=self.PATIENCE + 1))
        recent.append(per_token)
        values = list(recent)
        if len(values) <= self.PATIENCE or per_token < 2 * values[0] or per_token - values[0] < 0.5:
            return None
        grows = sum(after > before for before, after in pairwise(values))
        if grows < 0.8 * self.PATIENCE:
            return None
        return f"experts per token went from {values[0]:.2f} to {per_token:.2f} in {self.PATIENCE} steps"


class ExchangeWatch:
    """Warns when exchanges between ranks take 5 times the share of a step that they took: a slow or lossy link."""

    FACTOR, AT_LEAST, RECENT = 5.0, 20, 3

    def __init__(self) -> None:
        self._usual: deque[float] = deque(maxlen=200)
        self._recent: deque[float] = deque(maxlen=self.RECENT)
        self._warned = -REPEAT

    def see(self, share: float, step: int) -> str | None:
        """A warning after a step whose exchanges took this share of it."""
        self._recent.append(share)
        now = statistics.median(self._recent)
        if len(self._usual) >= self.AT_LEAST and len(self._recent) == self.RECENT:
            usual = statistics.median(self._usual)
            if now > 0.1 and now >= self.FACTOR * usual:
                if step - self._warned < REPEAT:
                    return None
                self._warned = step
                return f"exchanges between ranks take {now:.0%} of a step, {usual:.1%} before: is a link slow or lossy?"
        self._usual.append(share)
        return None
