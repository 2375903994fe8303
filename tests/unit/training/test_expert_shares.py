"""Fragments are cut at the borders between experts, wherever they begin and end; loads become factors of updates."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dsmoe.training.dead_expert_reset import pairs
from dsmoe.training.experts import ExpertGradients, OwnedExperts, PackedExperts, load_scale, shares


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


class LargestFp64(TorchDispatchMode):
    """Elements of the largest fp64 tensor that an operator makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            self.elements = max(self.elements, result.numel())
        return result


def test_norms_of_gradients_are_summed_in_fp64_without_a_copy_of_them():
    """Of 64 experts of 16.8 million elements a copy was 17 GB at 0031a16."""
    experts, numel = 4, 1000
    gradient = torch.randn(experts * numel)
    fragment = SimpleNamespace(start=0, numel=len(gradient), gradient=lambda: gradient)
    packed = PackedExperts(None, [SimpleNamespace(numel=numel)] * experts, layer=0, first_expert=0)
    gradients = ExpertGradients.__new__(ExpertGradients)
    gradients.owned, gradients._squares_LE = [OwnedExperts(packed, fragment)], torch.zeros(1, experts).double()
    with LargestFp64() as seen:
        gradients._look()
    assert seen.elements <= experts
    expected = gradient.view(experts, numel).double().square().sum(1)
    torch.testing.assert_close(gradients._squares_LE[0], expected)
