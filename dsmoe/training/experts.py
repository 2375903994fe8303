"""The optimizer's view of single experts: how large each one's gradient is, and how far each one may move.

ZeRO steps on flat tensors that hold many experts, cut wherever the ranks' shares end. So both are done around the inner
optimizer's own step, on this rank's fragments, cut again at the borders between experts. All ranks together have each
element once.

Shapes: L MoE layers, E experts of all ranks; a packed parameter holds e of them, of n elements each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.linalg import vector_norm

from dsmoe.config import RunConfig
from dsmoe.model.names import Piece, parameter_pieces
from dsmoe.moe.layer import moe_layers_of
from dsmoe.optim.deepspeed import Fragment, inner_optimizer, owned_fragment
from dsmoe.parallel.collectives import sum_over
from dsmoe.parallel.groups import ParallelGroups
from dsmoe.routers.recorder import RoutingTotals
from dsmoe.training.metrics import LineWriter, Warn

FILE = "experts.jsonl"
MOST = 2.0  # times the learning rate, for an expert with four times the mean load or more


@dataclass(frozen=True)
class PackedExperts:
    """One parameter that holds a tensor for each of some experts of one MoE layer."""

    parameter: torch.nn.Parameter
    pieces: list[Piece]  # one for each expert
    layer: int  # among the MoE layers
    first_expert: int

    @property
    def numel(self) -> int:
        """Elements of one expert."""
        return self.pieces[0].numel


def packed_experts(model: torch.nn.Module) -> list[PackedExperts]:
    """Every parameter with weights of experts of its own: the experts', and what they are scored by in routers like
    routing_free, where that belongs to the expert."""
    layers = moe_layers_of(model)
    layer_of = {parameter: layer for layer, module in enumerate(layers) for parameter in module.parameters()}
    return [
        PackedExperts(parameter, pieces, layer_of[parameter], parameter.first_expert)
        for parameter, pieces in parameter_pieces(model)
        if hasattr(parameter, "first_expert")
    ]


@dataclass(frozen=True)
class Share:
    """Where a fragment of a packed parameter holds elements of `rows` experts: part of one, or whole ones."""

    place: int  # of the first expert in the parameter
    rows: int
    elements: slice  # of the fragment

    def of(self, flat: Tensor) -> Tensor:
        """[rows, elements of each]: a view."""
        return flat[self.elements].view(self.rows, -1)


def shares(start: int, length: int, numel: int) -> Iterator[Share]:
    """Cut elements [start, start + length) of a flattened parameter [e, n] at the borders between experts; numel: n."""
    head = min(-start % numel, length)
    whole = (length - head) // numel * numel
    for low, high, rows in ((0, head, 1), (head, head + whole, whole // numel), (head + whole, length, 1)):
        if low < high:
            yield Share((start + low) // numel, rows, slice(low, high))


@dataclass(frozen=True)
class OwnedExperts:
    """This rank's fragment of a packed parameter."""

    packed: PackedExperts
    fragment: Fragment

    def shares(self) -> Iterator[tuple[tuple[int, slice], Share]]:
        """What it holds of each expert, and the experts' place in [L, E]."""
        for share in shares(self.fragment.start, self.fragment.numel, self.packed.numel):
            first = self.packed.first_expert + share.place
            yield (self.packed.layer, slice(first, first + share.rows)), share


def owned_experts(engine) -> list[OwnedExperts]:
    fragments = [(packed, owned_fragment(packed.parameter, engine)) for packed in packed_experts(engine.module)]
    return [OwnedExperts(packed, fragment) for packed, fragment in fragments if fragment is not None]


class ExpertGradients:
    """L2 norms of the gradients of single experts, as the optimizer gets them: averaged over ranks, and clipped."""

    def __init__(self, engine, groups: ParallelGroups):
        self.owned, self.groups, self.recorder = owned_experts(engine), groups, engine.module.recorder
        self.device = engine.device
        self._squares_LE: Tensor | None = None
        inner_optimizer(engine).register_step_pre_hook(self._look)

    def watch(self) -> None:
        """Look at the optimizer step that comes."""
        shape = len(self.recorder.routers), self.recorder.num_experts
        self._squares_LE = torch.zeros(shape, dtype=torch.float64, device=self.device)

    def norms(self) -> Tensor:
        """Of the step that was watched: fp64 [L, E]. Collective."""
        squares_LE, self._squares_LE = self._squares_LE, None
        return sum_over(self.groups.dp, squares_LE).sqrt()

    def _look(self, *_) -> None:
        for owned in self.owned if self._squares_LE is not None else ():
            gradient = owned.fragment.gradient()
            if gradient is None:  # DeepSpeed steps on one group of parameters after the other
                continue
            for place, share in owned.shares():
                self._squares_LE[place] += vector_norm(share.of(gradient), dim=1, dtype=torch.float64).square()


class ExpertLines:
    """RUN/experts.jsonl, a line every `logging.experts` steps: `step`, `tokens` so far, and, for each MoE layer and
    expert, `counts` (routes of this step) and `grad_norm`."""

    def __init__(self, config: RunConfig, engine, groups: ParallelGroups, first_step: int, warn: Warn = print):
        self.interval = config.logging.experts
        if self.interval:
            self.gradients = ExpertGradients(engine, groups)
            self.writer = LineWriter(Path(config.logging.run_dir) / FILE, groups.dp_rank, first_step, warn)

    def begin(self, step: int) -> None:
        """Before the optimizer's part of a step."""
        if self.interval and step % self.interval == 0:
            self.gradients.watch()

    def end(self, step: int, tokens: int, totals: RoutingTotals) -> None:
        """After it. Collective."""
        if self.interval and step % self.interval == 0:
            line = {"step": step, "tokens": tokens, "counts": totals.counts_LE.tolist()}
            self.writer.write({**line, "grad_norm": self.gradients.norms().tolist()})

    def close(self) -> None:
        if self.interval:
            self.writer.close()


class LoadScaledUpdates:
    """Makes every expert's update, the optimizer's step and weight decay both, follow the expert's load.

        update_e = min(2, (c_e / mean(c))^p) * update        c: routes of this step, over all ranks

    An expert's batch is the tokens it gets, and an optimizer's learning rate is to grow with a power p of the batch
    (`Optimizer.batch_exponent`): Adam's with its root (arXiv 2205.10287); Hunyuan-Large (2411.02265) scales that way
    between its shared and its routed experts. Here it is between routed experts, in every step. An expert without a
    token stays where it is, whatever the optimizer's state says.
    """

    def __init__(self, engine, exponent: float = 0.5):
        self.owned, self.exponent = owned_experts(engine), exponent
        self.scale_LE: Tensor | None = None
        self._before: list[tuple[OwnedExperts, Tensor]] = []
        inner_optimizer(engine).register_step_pre_hook(self._keep)
        inner_optimizer(engine).register_step_post_hook(self._scale)

    def follow(self, totals: RoutingTotals) -> None:
        """The loads of the optimizer step that comes."""
        self.scale_LE = load_scale(totals.counts_LE, self.exponent)

    def _keep(self, *_) -> None:
        present = [owned for owned in self.owned if owned.fragment.gradient() is not None]
        self._before = [(owned, owned.fragment.tensors["weight"].clone()) for owned in present]

    def _scale(self, *_) -> None:
        for owned, before in self._before:
            for place, share in owned.shares():
                now = share.of(owned.fragment.tensors["weight"])
                torch.lerp(share.of(before), now, self.scale_LE[place].unsqueeze(1), out=now)
        self._before = []


def load_scale(counts_LE: Tensor, exponent: float = 0.5) -> Tensor:
    """fp32 [L, E]: min(2, (count / mean count of the layer) ** exponent); 0 in a layer without routes."""
    counts_LE = counts_LE.to(torch.float32)
    return (counts_LE / counts_LE.mean(1, keepdim=True).clamp(min=1e-12)).pow(exponent).clamp(max=MOST)
