"""What the host is told of a step: sums over ranks and routing counts, copied together before the optimizer moves.

The copy waits for what was queued before it and for nothing after it, so reading it does not empty an accelerator's
queue. Shapes: L MoE layers, E experts.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dsmoe.routers.recorder import RoutingTotals
from dsmoe.runtime.device import read_later


class StepValues:
    """Copies begin when it is made.

    Args:
        sums: fp64.
        totals: on the device. Counts of a step fit fp64.
    """

    def __init__(self, sums: Tensor, totals: RoutingTotals):
        self._totals, self._count = totals, len(sums)
        routing = (totals.tokens, totals.without_expert_L, totals.counts_LE)
        self._copy = read_later(torch.cat((sums, *(values.flatten().double() for values in routing))))

    def read(self) -> tuple[list[float], RoutingTotals]:
        """The sums, and counts in host memory."""
        values = self._copy.tolist()
        sums, (tokens, *counts) = values[: self._count], values[self._count :]
        shape = self._totals.counts_LE.shape
        counts_N = torch.tensor(counts, dtype=torch.float64).long()
        return sums, replace(
            self._totals, tokens=torch.tensor(int(tokens)), without_expert_L=counts_N[: shape[0]],
            counts_LE=counts_N[shape[0] :].view(shape), statistic_LE=None, histogram_LEB=None,
        )  # fmt: skip
