"""Every layer of the benchmark computes what it is compared for: same routes, same output, same gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from dsmoe.config import ModelConfig
from dsmoe.lab.benchmark.cases import World, router_options
from dsmoe.lab.benchmark.limit import limit_cases
from dsmoe.lab.benchmark.problem import Problem, routing_map
from dsmoe.lab.benchmark.step import hold_mean
from dsmoe.lab.benchmark.worker import Job, entries_of, measure
from dsmoe.model.gpt import LanguageModel
from dsmoe.routers import available, get, registry

LOAD = "30:2"
SAME_NUMBERS = (
    "dsmoe topk", "transformers eager", "transformers grouped_mm", "DeepSpeed AutoEP", "DeepSpeed MoE",
    "Megatron SequentialMLP",
)  # fmt: skip


OWN = [name for name, router in available().items() if router.__module__.startswith("dsmoe.")]


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def world(request, groups) -> World:
    return World(Problem(experts=4, tokens=64, hidden=32, ffn=16, dtype=request.param), groups, "cpu")


@pytest.fixture(scope="module")
def entries(world):
    return {entry.name: entry for entry in entries_of(world, Job(world.problem, [LOAD], ""))}


def reference(world: World, hidden: torch.Tensor, map_TE: torch.Tensor, grad: torch.Tensor) -> dict[str, torch.Tensor]:
    """Top-k over the map, expert after expert, in float64: the output and its gradients."""
    hidden, gate, gate_up, down = (
        tensor.detach().double().requires_grad_()
        for tensor in (hidden, world.gate_weight, world.gate_up_proj, world.down_proj)
    )
    rows_TH = hidden.flatten(0, 1)
    probs_TE = F.linear(rows_TH, gate).masked_fill(~map_TE, -torch.inf).softmax(dim=-1)
    out_TH = 0
    for expert in range(world.problem.experts):
        up_gate = F.linear(rows_TH, gate_up[expert]).chunk(2, dim=-1)
        out_TH = out_TH + probs_TE[:, expert, None] * F.linear(F.silu(up_gate[0]) * up_gate[1], down[expert])
    out_TH.backward(grad.double().flatten(0, 1))
    return {"output": out_TH.view_as(hidden), "hidden": hidden.grad, "gate": gate.grad}


@pytest.mark.parametrize("name", SAME_NUMBERS)
def test_layers_of_the_same_work_give_the_reference(world, entries, name):
    hidden, grad = world.inputs(LOAD, variable=False)
    case = entries[name].build((hidden, grad))
    case.clear()
    output = case.forward(hidden)[0]
    # Without the layer's own losses, which differ. Megatron hangs them onto the weights of routes.
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(0.0))
    output.backward(grad)
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0))
    expected = reference(world, hidden, routing_map(world.problem.with_load(LOAD), False), grad)
    gate = next(p.grad for p in case.parameters if p.shape == world.gate_weight.shape and p.grad is not None)
    actual = {"output": output, "hidden": hidden.grad, "gate": gate}
    case.after()
    case.clear()
    tolerance = 1e-5 if world.problem.dtype == "fp32" else 0.03
    for what, value in expected.items():
        error = (actual[what].double() - value).abs().max() / value.abs().max()
        assert error < tolerance, what


@pytest.mark.parametrize("router", OWN)
def test_every_router_takes_the_routes_that_were_asked_for(world, entries, router):
    variable = router_options(get(router), world.problem).fixed_experts_per_token() is None
    inputs = world.inputs(LOAD, variable)
    case = entries[f"dsmoe {router}"].build(inputs)
    layer_map = []
    layer = next(cell.cell_contents for cell in case.forward.__closure__ if hasattr(cell.cell_contents, "router"))
    hook = layer.router.register_forward_hook(lambda module, args, output: layer_map.append(output.map_TE))
    case.run()
    case.after()
    case.clear()
    hook.remove()
    assert torch.equal(layer_map[0], routing_map(world.problem.with_load(LOAD), variable))
    assert case.mean_experts() == world.problem.k


def test_every_router_is_measured(entries):
    """Installed plugins too."""
    assert {f"dsmoe {name}" for name in available()} <= set(entries)


def test_rows_of_a_job_are_complete(groups, monkeypatch):
    own = {name: router for name, router in available().items() if router.__module__.startswith("dsmoe.")}
    # Other tests of the session have routers without options to compare.
    monkeypatch.setattr(registry.routers, "_classes", own)
    job = Job(Problem(experts=4, tokens=64, hidden=32, ffn=16), ["balanced", LOAD], "", budget=0, least=2)
    world = World(job.problem, groups, "cpu")
    rows = measure(job, world)
    limits, parts = [case.name for case in limit_cases(world)], ["route", "plan + dispatch", "experts", "combine"]
    expected = {*limits, "experts' products alone", *entries_of_names(world, job), *parts}
    for load in job.loads:
        assert {row["name"] for row in rows if row["load"] == load} == expected
    assert [row for row in rows if "error" in row] == []
    for row in rows:
        assert row["rounds"] == 2 and 0 < row["fastest_ms"] <= row["median_ms"] <= row["slowest_ms"]
        if row["kind"] in ("peer", "ours"):
            assert row["mean_experts"] == 2 and row["over_limit"] > 0 and row["sent_bytes"] == 0
        if row["name"] in SAME_NUMBERS:
            assert row["difference"] < 1e-5
    syncs = {row["name"]: row.get("host_syncs") for row in rows}
    assert syncs["transformers eager"] > 4 * syncs["dsmoe topk"] > 0  # a few for each expert, against one for all


def test_memory_of_every_case(groups):
    job = Job(Problem(experts=4, tokens=64, hidden=32, ffn=16), ["balanced", LOAD], "", what="memory")
    world = World(job.problem, groups, "cpu")
    rows = measure(job, world)
    assert {(row["name"], row["load"]) for row in rows} == {
        (name, load) for name in entries_of_names(world, job) for load in job.loads
    }
    for row in rows:
        assert row["peak_bytes"] > 0 and row["gradient_bytes"] >= 4 * 3 * 4 * 32 * 16 * 0.8


def entries_of_names(world: World, job: Job) -> list[str]:
    return [entry.name for entry in entries_of(world, job)]


def test_what_fails_is_a_row_with_its_error(groups, monkeypatch):
    from dsmoe.lab.benchmark import peers

    def broken(world, name, inputs):
        raise RuntimeError("cannot run here")

    monkeypatch.setattr(peers, "deepspeed_case", broken)
    job = Job(Problem(experts=4, tokens=64, hidden=32, ffn=16), ["balanced"], "", ["DeepSpeed MoE"], 0, 1)
    (row,) = [row for row in measure(job, World(job.problem, groups, "cpu")) if row["kind"] == "peer"]
    assert row["name"] == "DeepSpeed MoE" and row["error"] == "RuntimeError: cannot run here"


@pytest.mark.parametrize("name", OWN)
def test_every_router_of_a_whole_model_is_held_at_k_experts_per_token(groups, name):
    """Untrained models of the step benchmark; a fixed number needs no calibration and does not change by it."""
    router, model = get(name), ModelConfig(
        num_layers=2, hidden_size=32, num_attention_heads=2, num_experts=8, moe_ffn_hidden_size=16, vocab_size=64
    )  # fmt: skip
    options = router.Options.model_validate(router.benchmark_options(2, 8, latent_norm=1.0))
    language_model = LanguageModel(model, (router, options), groups, seed=1)
    tokens = torch.randint(64, (8, 64), generator=torch.Generator().manual_seed(0))
    hold_mean(language_model, tokens, k=2)
    with torch.no_grad():
        language_model(tokens)
    assert language_model.recorder.take().density().item() * 8 == pytest.approx(2, abs=0.05)
