"""Fragments are cut at the borders between experts, wherever they begin and end; loads become factors of updates."""

from __future__ import annotations

import pytest
import torch

from dsmoe.training.dead_expert_reset import pairs
from dsmoe.training.experts import load_scale, shares


@pytest.mark.parametrize("numel", [1, 3, 7])
def test_every_element_belongs_to_its_expert_once(numel):
    experts = 4
    flat = torch.arange(experts * numel)
    for start in range(len(flat)):
        for stop in range(start, len(flat) + 1):
            fragment, seen = flat[start:stop], []
            for share in shares(start, len(fragment), numel):
                for row, elements in enumerate(share.of(fragment)):
                    assert (elements // numel == share.place + row).all()
                    seen += elements.tolist()
            assert seen == fragment.tolist()


def test_whole_experts_come_in_one_share():
    assert [share.rows for share in shares(5, 4 * 100 + 3, 4)] == [1, 100]


def test_updates_grow_with_the_root_of_the_load_up_to_twice():
    counts_LE = torch.tensor([[1, 4, 9, 2], [0, 0, 0, 40], [0, 0, 0, 0]])
    expected = torch.tensor([[0.5, 1.0, 1.5, 0.5**0.5], [0.0, 0.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(load_scale(counts_LE), expected)


def test_idle_experts_are_paired_with_the_busiest_above_the_mean():
    assert pairs([0, 5, 0, 2, 3], [10, 0, 30, 0, 0], patience=2) == [(1, 2), (3, 0)]  # expert 4 waits
    assert pairs([0, 1, 0], [10, 0, 30], patience=2) == []
    assert pairs([4, 4], [0, 0], patience=2) == []  # nobody is busy
