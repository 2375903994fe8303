"""The cases of one worker: what the machine allows at best, and dsmoe's layer with every router.

All cases of a worker share one set of expert weights, so that 1024 experts need their memory once, and so that every
layer that promises the same numbers can be held to the same output.

Shapes: T tokens of this rank, R routes, e experts of this rank, H hidden, F expert width.
"""

from __future__ import annotations

from functools import partial

import torch
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn

from dsmoe.config import ModelConfig
from dsmoe.lab.benchmark.measure import Case
from dsmoe.lab.benchmark.problem import GAIN, Gate, Problem, routing_map
from dsmoe.model.gpt import transformer_config
from dsmoe.moe import blocked
from dsmoe.moe.dispatch import build_dispatcher
from dsmoe.moe.experts import GroupedExperts, LowRankExperts
from dsmoe.moe.layer import VariableMoELayer
from dsmoe.parallel.groups import ParallelGroups
from dsmoe.routers.base import Router, RouterOptions
from dsmoe.routers.recorder import RoutingRecorder
from dsmoe.routers.scores import weights_at
from dsmoe.routers.topk import TopKRouter


class World:
    """What all cases of a worker share: problem, groups, device, gate and weights."""

    def __init__(self, problem: Problem, groups: ParallelGroups, device: str):
        self.problem, self.groups, self.device = problem, groups, device
        self.gate = Gate.draw(problem)
        self.local_experts = problem.experts // groups.ep_size
        first = groups.ep_rank * self.local_experts
        self.gate_up_proj = self._experts(first, 2 * problem.ffn, problem.hidden)
        self.down_proj = self._experts(first, problem.hidden, problem.ffn)
        self.gate_weight = self._parameter(self.gate.weight_EH())

    def _experts(self, first: int, rows: int, columns: int) -> nn.Parameter:
        """[e, rows, columns], uniform; an expert's weights depend on its global number alone."""
        drawn = torch.empty(self.local_experts, rows, columns, dtype=self.problem.torch_dtype)
        for index, matrix in enumerate(drawn):
            random = torch.Generator().manual_seed(rows * 100_003 + first + index)
            matrix.uniform_(-0.05, 0.05, generator=random)
        return self._parameter(drawn)

    def _parameter(self, values: Tensor) -> nn.Parameter:
        return nn.Parameter(values.to(self.device, self.problem.torch_dtype))

    def inputs(self, load: str, variable: bool) -> tuple[Tensor, Tensor]:
        """This rank's tokens [1, T, H] for a load, a leaf, and a gradient of the layer's output."""
        problem, ep = self.problem.with_load(load), self.groups.ep_size
        hidden_TH = self.gate.hidden_TH(routing_map(problem, variable)).chunk(ep)[self.groups.ep_rank]
        # One sequence, so that [B, S, H] and Megatron's [S, B, H] are views of each other.
        hidden = hidden_TH.to(self.device, problem.torch_dtype).unsqueeze(0)
        random = torch.Generator().manual_seed(13 + self.groups.ep_rank)
        grad = torch.randn(hidden.shape, generator=random).to(self.device, problem.torch_dtype)
        return hidden.contiguous().requires_grad_(), grad


def products_case(world: World, inputs: tuple[Tensor, Tensor]) -> Case:
    """The experts' matrix products alone, as torch does them: for each expert with rows the six of a forward and
    backward pass, into memory that is there, every thread with experts of its own. No activation, gather or sum: what
    no layer of these experts can undercut on this torch, however it is written."""
    layer = build_layer(world)
    hidden, _ = inputs
    layer.router.recorder.begin()
    with torch.no_grad():
        routed = layer.router(hidden.transpose(0, 1))
        plan = layer.token_dispatcher.start_plan(routed.map_TE)()
        probs_N = weights_at(routed.probs_TE, plan.flat_N)
        rows_RH = layer.token_dispatcher.dispatch(plan, hidden.flatten(0, 1), probs_N).wait().rows_RH
    layer.router.recorder.finish()
    layer.router.recorder.take()
    gate_up, down = world.gate_up_proj.detach(), world.down_proj.detach()
    counts = plan.routes_per_expert_e.tolist()
    h_RF = rows_RH.new_ones(len(rows_RH), 2 * world.problem.ffn)
    inner_RF = rows_RH.new_ones(len(rows_RH), world.problem.ffn)
    grad_inner_RF = torch.empty_like(inner_RF)
    out_RH, grad_gate_up, grad_down = torch.empty_like(rows_RH), torch.empty_like(gate_up), torch.empty_like(down)

    def forward(task: blocked.Task) -> None:
        for segment in (segment for block in task for segment in block):
            rows, expert = segment.rows, segment.expert
            torch.mm(rows_RH[rows], gate_up[expert].t(), out=h_RF[rows])
            torch.mm(inner_RF[rows], down[expert].t(), out=out_RH[rows])

    def backward(task: blocked.Task) -> None:
        for segment in (segment for block in task for segment in block):
            rows, expert = segment.rows, segment.expert
            torch.mm(out_RH[rows], down[expert], out=grad_inner_RF[rows])
            torch.mm(out_RH[rows].t(), inner_RF[rows], out=grad_down[expert])
            torch.mm(h_RF[rows], gate_up[expert], out=out_RH[rows])
            torch.mm(h_RF[rows].t(), rows_RH[rows], out=grad_gate_up[expert])

    def products() -> list[Tensor]:
        with torch.no_grad():
            tasks = blocked.split_work(counts, torch.get_num_threads(), blocked.BLOCK)
            blocked.run_tasks(forward, tasks)
            blocked.run_tasks(backward, tasks)
        return []

    return Case("experts' products alone", "limit", products, [], [])


def router_options(router: type[Router], problem: Problem, **overrides) -> RouterOptions:
    """Options under which the router follows the tokens of `problem.Gate`, and `overrides`."""
    options = router.benchmark_options(problem.k, problem.experts, latent_norm=GAIN)
    return router.Options.model_validate({**options, **overrides})


def build_layer(
    world: World, router_class: type[Router] = TopKRouter, chunks: int = 1, **overrides
) -> VariableMoELayer:
    """dsmoe's layer as a model has it, with a recorder and a controller of its own, routing as the tokens ask.

    overrides: further options of the router.
    """
    problem, groups = world.problem, world.groups
    options = router_options(router_class, problem, **overrides)
    experts = ModuleSpec(module=GroupedExperts)
    if rank := router_class.latent_rank(options):
        experts = ModuleSpec(module=LowRankExperts, params={"rank": rank})
    model = ModelConfig(
        num_layers=1, hidden_size=problem.hidden, num_experts=problem.experts, moe_ffn_hidden_size=problem.ffn,
        num_attention_heads=1,
    )  # fmt: skip
    layer = VariableMoELayer(
        config=transformer_config(model, groups.ep_size),
        submodules=MoESubmodules(router=partial(router_class, options=options), experts=experts, shared_experts=None),
        pg_collection=groups.for_megatron(),
        token_dispatcher=build_dispatcher("auto", groups, problem.experts, problem.k),
        chunks=chunks,
    )
    _share_weights(world, layer)
    layer.to(world.device, problem.torch_dtype)
    recorder = RoutingRecorder(problem.experts, groups.dp)
    controller = router_class.make_controller(options, 1, problem.experts)
    if controller is not None:
        controller.to(world.device).skip_warmup()
    layer.router.attach(recorder, controller)
    return layer.train()


@torch.no_grad()
def _share_weights(world: World, layer: VariableMoELayer) -> None:
    problem, experts, router = world.problem, layer.experts, layer.router
    random = torch.Generator().manual_seed(17)
    experts.down_proj = world.down_proj
    if isinstance(experts, LowRankExperts):
        # Row 0 of A is the direction that scores; the others only make the latent as wide as it is.
        experts.gate_proj.uniform_(-0.05, 0.05, generator=random)
        experts.up_proj.copy_(world.gate_up_proj[:, problem.ffn :])
        reduce_ErH = torch.randn(router.reduce_proj.shape, generator=random)
        reduce_ErH.mul_(0.02 * problem.hidden**-0.5)
        reduce_ErH[:, 0] = world.gate.directions_EH
        router.reduce_proj.copy_(reduce_ErH * (GAIN / world.gate.scale))
    else:
        experts.gate_up_proj = world.gate_up_proj
        router.weight = world.gate_weight


def layer_case(world: World, layer: VariableMoELayer, name: str, inputs: tuple[Tensor, Tensor]) -> Case:
    """Router, dispatch, experts, combine and the router's losses."""
    hidden, grad = inputs
    recorder: RoutingRecorder = layer.router.recorder
    experts_per_token: list[float] = []

    def forward(hidden: Tensor) -> list[Tensor]:
        recorder.begin()
        output, _ = layer(hidden.transpose(0, 1))
        return [output.transpose(0, 1), *recorder.finish().values()]

    def after() -> None:
        totals = recorder.take()
        if totals is not None:
            experts_per_token.append((totals.counts_LE.sum() / totals.tokens).item())

    def mean() -> float | None:
        return sum(experts_per_token) / len(experts_per_token) if experts_per_token else None

    return Case(name, "ours", forward, [hidden], [grad], list(layer.parameters()), after, mean)


def part_cases(world: World, inputs: tuple[Tensor, Tensor]) -> list[Case]:
    """The stages of the top-k layer by themselves, each forward and backward, on what the layer hands them."""
    layer = build_layer(world)
    hidden, grad = inputs
    router: Router = layer.router
    dispatcher = layer.token_dispatcher
    recorder: RoutingRecorder = router.recorder
    hidden_TH = hidden.detach().flatten(0, 1).requires_grad_()
    grad_TH = grad.flatten(0, 1)
    length_first = hidden.detach().transpose(0, 1).requires_grad_()
    recorder.begin()
    with torch.no_grad():
        probs_TE, map_TE, *_ = router(length_first)
        plan = dispatcher.start_plan(map_TE)()
        rows_RH, probs_R, _ = dispatcher.dispatch(plan, hidden_TH, weights_at(probs_TE, plan.flat_N)).wait()
        out_RH, _ = layer.experts(rows_RH, plan.routes_per_expert_e, probs_R)
    recorder.finish()
    recorder.take()
    grad_TE = torch.randn_like(probs_TE)

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().requires_grad_()

    def route(hidden: Tensor) -> list[Tensor]:
        recorder.begin()
        probs_TE = router(hidden)[0]
        return [probs_TE, *recorder.finish().values()]

    def send(hidden_TH: Tensor, probs_TE: Tensor) -> list[Tensor]:
        plan = dispatcher.start_plan(map_TE)()
        rows_RH, probs_R, _ = dispatcher.dispatch(plan, hidden_TH, weights_at(probs_TE, plan.flat_N)).wait()
        return [rows_RH, probs_R]

    def compute(rows_RH: Tensor, probs_R: Tensor) -> list[Tensor]:
        return [layer.experts(rows_RH, plan.routes_per_expert_e, probs_R)[0]]

    def combine(out_RH: Tensor) -> list[Tensor]:
        return [dispatcher.combine(dispatcher.reduce(out_RH, plan), plan).wait()]

    experts = list(layer.experts.parameters())
    return [
        Case("route", "part", route, [length_first], [grad_TE], list(router.parameters()), recorder.take),
        Case("plan + dispatch", "part", send, [hidden_TH, leaf(probs_TE)], [out_RH, torch.randn_like(probs_R)]),
        Case("experts", "part", compute, [leaf(rows_RH), leaf(probs_R)], [torch.randn_like(out_RH)], experts),
        Case("combine", "part", combine, [leaf(out_RH)], [grad_TH]),
    ]
