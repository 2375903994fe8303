"""A layer that works part by part: while experts work, rows travel, forth and home, forward and backward.

The order of what two gloo ranks begin, wait for and compute is written down, so nothing here depends on time.
"""

from __future__ import annotations

import functools
import gc
import weakref

import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from ranks import run_ranks
from steps import batch_of, fresh_engine, tiny_config

from dsmoe.moe import exchange
from dsmoe.moe.dispatchers.all_to_all import AllToAllDispatchHandle
from dsmoe.moe.layer import VariableMoELayer

PARTS = 4
CASES = {
    "at once": {},
    "in parts": {"moe_chunks": PARTS},
    "in parts, recomputed": {"moe_chunks": PARTS, "recompute": "moe"},
    "shared expert": {"moe_shared_expert_intermediate_size": 16},
    "shared expert, in parts": {"moe_shared_expert_intermediate_size": 16, "moe_chunks": PARTS},
}


def pass_through_a_layer(model: dict) -> tuple[list[tuple[str, int]], torch.Tensor, torch.Tensor, int]:
    """One forward and backward pass of a layer: what happened, each with the number of row exchanges under way; the
    loss; the experts' gradients; and how many dispatch handles are left when the loss is gone."""
    config = tiny_config(
        router={"name": "topk", "k": 2}, parallel={"expert_parallel": 2}, model={"num_layers": 1, **model},
        training={"gradient_accumulation": 1},
    )  # fmt: skip
    engine = fresh_engine(config)
    (layer,) = (module for module in engine.module.modules() if isinstance(module, VariableMoELayer))
    happened, under_way, handles = [], set(), weakref.WeakSet()

    def note(what: str) -> None:
        happened.append((what, len(under_way)))

    start, make = exchange.start_all_to_all, AllToAllDispatchHandle.__init__

    def start_and_note(rows, *splits_and_group):
        arrived = start(rows, *splits_and_group)
        if rows.dim() == 1:  # weights and places
            return arrived
        under_way.add(arrived)
        note("sent")

        def wait():
            under_way.discard(arrived)
            return arrived()

        return wait

    def make_and_count(self, *args, **kwargs):
        handles.add(self)
        make(self, *args, **kwargs)

    def experts_done(module, inputs, output):
        note("experts")
        return _NoteGradient.apply(output[0], note), output[1]

    def shared_experts(hidden, compute=layer.shared_experts_compute):
        note("shared experts")
        return compute(hidden)

    exchange.start_all_to_all, AllToAllDispatchHandle.__init__ = start_and_note, make_and_count
    layer.experts.register_forward_hook(experts_done)
    layer.shared_experts_compute = shared_experts
    gc.disable()  # what a pass leaves behind must go by itself
    total, _ = engine(*batch_of(config, 0, 0))
    note("forward done")
    engine.backward(total)
    note("backward done")
    loss = total.detach().clone()
    del total
    left = len(handles)
    gc.enable()
    exchange.start_all_to_all, AllToAllDispatchHandle.__init__ = start, make
    gradients = torch.cat([safe_get_full_grad(parameter).flatten() for parameter in layer.experts.parameters()])
    return happened, loss, gradients, left


class _NoteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, note):
        ctx.note = note
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx, grad):
        ctx.note("experts' gradient")
        return grad, None


def each_case() -> list[tuple]:
    return [pass_through_a_layer(model) for model in CASES.values()]


@functools.cache
def results() -> list[dict[str, tuple]]:
    """By rank and case."""
    return [dict(zip(CASES, actual, strict=True)) for actual in run_ranks(2, each_case, deadline=60)]


def at(work: str, happened: list[tuple[str, int]]) -> list[int]:
    """How many exchanges are under way each time this work is done."""
    return [count for what, count in happened if what == work]


@pytest.mark.parametrize("case", [case for case in CASES if "in parts" in case])
def test_rows_travel_while_experts_work(case):
    for rank in results():
        happened = rank[case][0]
        forward = happened[: happened.index(("forward done", 0))]
        # The next part on its way here, the last one on its way home: both, but at the ends.
        assert at("experts", forward) == [1, *[2] * (PARTS - 2), 1]
        # Two more parts' gradients; the rows of one of them too where they were not kept.
        again = 1 if "recomputed" in case else 0
        assert at("experts' gradient", happened) == [1 + again, *[2 + again] * (PARTS - 2), 1]


@pytest.mark.parametrize("case", CASES)
def test_no_more_travels_than_the_parts_beside_the_one_at_work(case):
    for rank in results():
        assert max(count for _, count in rank[case][0]) <= (5 if "recomputed" in case else 3)
        assert rank[case][0][-1] == ("backward done", 0)


def test_all_at_once_hides_nothing_under_the_experts():
    for rank in results():
        assert at("experts", rank["at once"][0]) == at("experts' gradient", rank["at once"][0]) == [0]


@pytest.mark.parametrize("case", [case for case in CASES if "shared" in case])
def test_shared_experts_work_while_the_first_rows_travel(case):
    for rank in results():
        assert at("shared experts", rank[case][0]) == [2 if "in parts" in case else 1]


@pytest.mark.parametrize("case", CASES)
def test_parts_change_no_gradient_and_nothing_of_them_is_left(case):
    for rank in results():
        _, loss, gradients, left = rank[case]
        _, expected, expected_gradients, _ = rank["shared expert" if "shared" in case else "at once"]
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-8)
        assert gradients.norm() > 1e-3 and left == 0
