"""Bytes between ranks in an optimizer step: tokens to experts and back, gradients, weights.

Rows are counted as dsmoe sends them: a token once to each rank, however many of that rank's experts it goes to; by the
two-level dispatcher once to each other node, and then inside it.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsmoe.lab.planner.layout import Layout

INDEX = 4  # bytes of a route's row number, int32
WEIGHT = 4  # bytes of a route's weight, fp32; its gradient comes back


@dataclass(frozen=True)
class Flow:
    """What one rank sends in a step, and in how many collectives."""

    within: float  # bytes to ranks of the same node
    between: float  # bytes to others
    calls: float
    calls_within: float = 0.0  # others, among ranks of a node only

    @property
    def bytes(self) -> float:
        return self.within + self.between

    def seconds(self, layout: Layout) -> float:
        """Of the busiest rank. Both networks are taken one after the other."""
        near, far = layout.hardware.within_node, layout.hardware.between_nodes
        seconds = self.within / (near.gb_s * 1e9) + (self.calls + self.calls_within) * near.call_us * 1e-6
        if far is not None and layout.ranks > layout.hardware.devices_per_node:
            seconds += self.between / (far.gb_s * 1e9) + self.calls * (far.call_us - near.call_us) * 1e-6
        return seconds


def exchange(layout: Layout) -> Flow:
    """The all-to-alls of all MoE layers, forward and backward; mean over ranks."""
    if layout.ep == 1:
        return Flow(0.0, 0.0, 0.0)
    model = layout.model
    recomputed = 1 if model.recompute != "none" else 0  # a recomputed layer sends its rows again, up to the experts
    routes = layout.tokens * layout.experts * (layout.ep - 1) / layout.ep
    # Row numbers go out once, weights out and their gradients home.
    sent = routes * (INDEX + WEIGHT * (2 + recomputed))
    calls = (2 + recomputed) + 2 + 1 + (2 + recomputed)  # rows out and home, both backward, row numbers, weights
    if layout.sends_latents:
        sent += routes * layout.latent * layout.wire * (2 + recomputed)
        calls += 2 + recomputed
    if layout.shards_latents:  # tokens to all owners, a score of every expert back, and the gradients of both
        sent += 2 * layout.tokens * (layout.ep - 1) * model.hidden_size * layout.element
        sent += 2 * layout.tokens * 4 * model.num_experts * (layout.ep - 1) / layout.ep
        calls += 4
    times = layout.moe_layers * layout.micro_steps
    within, between = (sent * share for share in _split(layout, layout.ep))
    rows, row_bytes = layout.expected_rows(), model.hidden_size * layout.wire * (4 + recomputed)
    within += layout.tokens * rows.within_node * row_bytes
    between += layout.tokens * rows.between_nodes * row_bytes
    calls_within = 0
    if layout.dispatcher == "two_level":
        between += layout.tokens * rows.between_nodes * layout.ranks_per_node  # which ranks of its node need a row
        calls, calls_within = calls + 1, 4 + recomputed
    calls, calls_within = (count * model.moe_chunks * times for count in (calls, calls_within))
    return Flow(within * times, between * times, calls, calls_within)


def gradients(layout: Layout) -> Flow:
    """Reduction over the ranks that share a parameter, as a ring: each sends nearly all of its bytes once to reduce."""
    times = 1 if layout.config.parallel.zero_stage == 1 else layout.micro_steps  # ZeRO 2 and 3 keep no unreduced sums
    return _ring(layout, times)


def weights(layout: Layout) -> Flow:
    """Updated weights to all who use them: once a step, or, under ZeRO 3, before every use, forward and backward."""
    times = 2 * layout.micro_steps if layout.config.parallel.zero_stage == 3 else 1
    return _ring(layout, times)


def _ring(layout: Layout, times: int) -> Flow:
    within = between = calls = 0.0
    for parameters, ranks, stride in (
        (layout.dense_parameters, layout.ranks, 1),
        (layout.expert_parameters, layout.replicas, layout.ep),
    ):
        if ranks == 1:
            continue
        sent = parameters * layout.element * (ranks - 1) / ranks * times
        crosses = ranks * stride > layout.hardware.devices_per_node
        within, between = (within, between + sent) if crosses else (within + sent, between)
        calls += times * layout.model.num_layers
    return Flow(within, between, calls)


def _split(layout: Layout, group: int) -> tuple[float, float]:
    """Shares of what a rank sends to the others of its group, that stay in the node and that leave it."""
    near = min(group, layout.hardware.devices_per_node) - 1
    return near / (group - 1), 1 - near / (group - 1)
