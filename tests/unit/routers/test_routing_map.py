"""Counts of a map of routes are torch's, whatever its shape and however it lies in memory."""

from __future__ import annotations

import pytest
import torch

from dsmoe.routers.routing_map import any_in_row, count_columns, count_rows


def same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype and torch.equal(actual, expected)


@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("columns", [1, 4, 8, 12, 64, 2040, 2048])
@pytest.mark.parametrize("tokens", [0, 1, 127, 128, 300])
def test_counts_are_torchs(tokens, columns, density):
    map_TX = torch.rand(tokens, columns, generator=torch.Generator().manual_seed(tokens + columns)) < density
    same(count_columns(map_TX), map_TX.sum(0))
    same(count_rows(map_TX), map_TX.sum(1))
    same(any_in_row(map_TX), map_TX.any(1))


def test_parts_of_a_map_are_counted_as_they_lie():
    map_TX = torch.rand(40, 64, generator=torch.Generator().manual_seed(0)) < 0.3
    odd = torch.cat((map_TX.new_ones(3), map_TX.flatten()))[3:].view(40, 64)
    for part in (map_TX[:, 8:24], map_TX[5:], map_TX.t(), odd):
        same(count_columns(part), part.sum(0))
        same(count_rows(part), part.sum(1))
        same(any_in_row(part), part.any(1))
