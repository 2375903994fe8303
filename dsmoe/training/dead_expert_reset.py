"""Experts that no token takes learn nothing, and so stay as they are. Begin them anew, near experts that are in demand.

An expert without a token for `patience` optimizer steps becomes a copy of a busy one of its layer: the busiest for the
first such expert, the next for the second. It takes over weights, the router's row, what a controller holds for that
expert, and those of the optimizer's states that say so (Adam's second moment, which sets the size of its steps); other
states, such as a momentum, begin at 0. A little noise on the
weights lets the two part. No expert below the mean load is copied, so where there are more idle experts than busy ones,
the rest wait.

Noise depends on seed, step and name alone, and counts are exact: every layout revives the same experts alike.

Shapes: L MoE layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dsmoe.errors import CheckpointError
from dsmoe.model.initialize import generator_of
from dsmoe.moe.layer import VariableMoELayer
from dsmoe.optim.base import Optimizer
from dsmoe.optim.deepspeed import Fragment, logical_shape, owned_fragment, write_model_weight
from dsmoe.parallel.collectives import sum_over
from dsmoe.parallel.groups import ParallelGroups
from dsmoe.routers.recorder import RoutingTotals

NOISE = 0.1  # of a tensor's root mean square


@dataclass(frozen=True)
class ExpertRows:
    """A parameter of an MoE layer with `numel` elements for each of the experts [first, first + experts)."""

    name: str
    parameter: torch.nn.Parameter
    first: int
    experts: int
    numel: int

    def start(self, expert: int) -> int | None:
        """Where its elements begin in the flattened parameter; None if they are not in it."""
        place = expert - self.first
        return place * self.numel if 0 <= place < self.experts else None


class DeadExpertReset:
    """Watches and revives the experts of an engine's model.

    Args:
        patience: optimizer steps without a token.
        seed: of the noise.
        optimizer: whose states there are.

    Attributes:
        idle_LE: int64, steps that each expert has been without a token. A checkpoint holds it.
    """

    def __init__(self, engine, groups: ParallelGroups, patience: int, seed: int, optimizer: type[Optimizer]):
        self.engine, self.groups, self.patience, self.seed = engine, groups, patience, seed
        self.kinds = optimizer.kinds()
        self.inherited = ("weight", *(state.name for state in optimizer.states if state.inherited))
        self.layers = [list(_expert_rows(layer)) for layer in _moe_layers(engine.module)]
        recorder = engine.module.recorder
        shape = len(recorder.routers), recorder.num_experts
        self.idle_LE = torch.zeros(shape, dtype=torch.int64, device=engine.device)

    def load(self, idle_LE: Tensor | None) -> None:
        """Go on from a checkpoint; None: from one of a run without revival."""
        if idle_LE is not None and idle_LE.shape != self.idle_LE.shape:
            saved, expected = tuple(idle_LE.shape), tuple(self.idle_LE.shape)
            raise CheckpointError(f"the checkpoint counts idle steps of experts {saved}, this model has {expected}")
        if idle_LE is not None:
            self.idle_LE = idle_LE.to(self.idle_LE.device)

    @torch.no_grad()
    def update(self, totals: RoutingTotals, step: int) -> int:
        """After optimizer step `step`: revive what has been idle too long. Returns how many experts. Collective."""
        self.idle_LE = torch.where(totals.counts_LE == 0, self.idle_LE + 1, 0)
        idle_LE, counts_LE = self.idle_LE.tolist(), totals.counts_LE.tolist()
        revived = 0
        for layer, (idle_E, counts_E) in enumerate(zip(idle_LE, counts_LE, strict=True)):
            for idle, busy in pairs(idle_E, counts_E, self.patience):
                self._copy(layer, idle, busy, step)
                self.idle_LE[layer, idle] = 0
                revived += 1
        return revived

    def _copy(self, layer: int, idle: int, busy: int, step: int) -> None:
        for rows in self.layers[layer]:
            fragment = owned_fragment(rows.parameter, self.engine)
            values_Kn = torch.zeros(len(self.kinds), rows.numel, device=self.engine.device)
            values = dict(zip(self.kinds, values_Kn, strict=True))  # views
            for kind, own, place in _overlap(rows.start(busy), rows.numel, fragment, self.inherited):
                values[kind][place] = own
            sum_over(self.groups.dp, values_Kn)  # every element is on one rank
            weight_n = values["weight"]
            if rows.numel > 1:
                drawn = torch.randn(rows.numel, generator=generator_of(self.seed, f"{rows.name}.{idle} at step {step}"))
                weight_n += NOISE * weight_n.square().mean().sqrt() * drawn.to(weight_n.device)
            if rows.start(idle) is None:
                continue
            write_model_weight(rows.parameter, rows.start(idle), weight_n)
            for kind, own, place in _overlap(rows.start(idle), rows.numel, fragment, self.kinds):
                own.copy_(values[kind][place])
        if (controller := self.engine.module.controller) is not None:
            controller.copy_expert(layer, source=busy, target=idle, shape_LE=tuple(self.idle_LE.shape))


def pairs(idle_E: list[int], counts_E: list[int], patience: int) -> list[tuple[int, int]]:
    """(idle expert, the busy one it becomes like) of one layer: first come the busiest."""
    mean = sum(counts_E) / len(counts_E)
    idle = [expert for expert, steps in enumerate(idle_E) if steps >= patience]
    busy = sorted((e for e, count in enumerate(counts_E) if count > mean), key=lambda e: (-counts_E[e], e))
    return list(zip(idle, busy, strict=False))


def _moe_layers(model: torch.nn.Module) -> Iterator[tuple[str, VariableMoELayer]]:
    for name, module in model.named_modules():
        if isinstance(module, VariableMoELayer):
            yield name, module


def _expert_rows(named_layer: tuple[str, VariableMoELayer]) -> Iterator[ExpertRows]:
    """Of packed experts, and of the router's parameters with a row for each expert."""
    prefix, layer = named_layer
    for name, parameter in layer.named_parameters():
        shape = logical_shape(parameter)
        numel = math.prod(shape[1:])
        if hasattr(parameter, "first_expert"):
            yield ExpertRows(f"{prefix}.{name}", parameter, parameter.first_expert, shape[0], numel)
        elif name.startswith("router.") and layer.router.has_row_per_expert(name.removeprefix("router."), shape):
            yield ExpertRows(f"{prefix}.{name}", parameter, 0, shape[0], numel)


def _overlap(
    start: int | None, numel: int, fragment: Fragment | None, kinds: tuple[str, ...]
) -> Iterator[tuple[str, Tensor, slice]]:
    """Where a fragment holds elements [start, start + numel) of its parameter: for each kind of state its name, the
    fragment's own elements, and their place in the range."""
    if start is None or fragment is None:
        return
    low, high = max(start, fragment.start), min(start + numel, fragment.start + fragment.numel)
    for kind in kinds if low < high else ():
        own = fragment.tensors[kind][low - fragment.start : high - fragment.start]
        yield kind, own, slice(low - start, high - start)
