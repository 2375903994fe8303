"""Quantiles over the tokens of all ranks, from integer histograms, so that the layout of a run cannot change them.

With 1,000 bins they take 8 kB for each expert and layer, which ranks sum once per optimizer step.

Shapes: L MoE layers, E experts, t tokens, B bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 1000


@dataclass(frozen=True)
class Histogram:
    """Equal bins between two values; what lies outside counts in the first or last bin."""

    low: float
    high: float
    bins: int = BINS

    def count(self, values_tE: Tensor) -> Tensor:
        """int64 [E, B], tokens in each bin. Does not wait for a device."""
        experts = values_tE.size(1)
        bin_tE = ((values_tE - self.low) * (self.bins / (self.high - self.low))).long().clamp(0, self.bins - 1)
        flat_N = (bin_tE + self.bins * torch.arange(experts, device=bin_tE.device)).flatten()
        counts = flat_N.new_zeros(experts * self.bins)
        return counts.scatter_add(0, flat_N, flat_N.new_ones(()).expand_as(flat_N)).view(experts, self.bins)

    def quantile(self, counts_LEB: Tensor, share: float) -> Tensor:
        """fp32 [L, E], the value below which this share of an expert's tokens lies, interpolated within its bin."""
        cumulative_LEB = counts_LEB.cumsum(-1)
        wanted_LE1 = share * cumulative_LEB[..., -1:].double()
        bin_LE1 = (cumulative_LEB < wanted_LE1).sum(-1, keepdim=True).clamp(max=self.bins - 1)
        inside_LE1 = counts_LEB.gather(-1, bin_LE1)
        before_LE1 = cumulative_LEB.gather(-1, bin_LE1) - inside_LE1
        part_LE1 = ((wanted_LE1 - before_LE1) / inside_LE1.clamp(min=1)).clamp(0, 1)
        width = (self.high - self.low) / self.bins
        return (self.low + width * (bin_LE1 + part_LE1)).squeeze(-1).float()
