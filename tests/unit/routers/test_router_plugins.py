"""Routers as plugins: found by name, refused with a reason, held to the contract, and at home in a stock MoELayer."""

from __future__ import annotations

import importlib.metadata
import sys
import types
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.zero.utils import apply_to_tensors_only
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig

from dsmoe.errors import RouterError
from dsmoe.routers import available, get, register, registry
from dsmoe.routers.base import Router, RouterOptions, Routing
from dsmoe.routers.recorder import RoutingRecorder
from dsmoe.routers.routing import RetainedRouting, RoutingResult
from dsmoe.routers.scores import Decision

# Of the package alone: other tests of the same session register routers of their own.
OWN = [name for name, router in available().items() if router.__module__.startswith("dsmoe.")]
GATED = [name for name, router in available().items() if router.has_gate and router.__module__.startswith("dsmoe.")]

EXPERTS, HIDDEN = 4, 8


class Everywhere(Router):
    """Every token to every expert, with the weight of its logit. Its loss is the mean logit."""

    Options = RouterOptions

    def route(self, hidden_TH, sequence_T):
        logits_TE = self.gating(hidden_TH)
        return Routing(logits_TE, torch.ones_like(logits_TE, dtype=torch.bool), loss_inputs={"mean": logits_TE.mean()})

    def losses(self, routing, loads):
        return {"mean": 3.0 * routing.loss_inputs["mean"]}


@pytest.fixture
def entry_point(monkeypatch):
    """Pretend that an installed package registers routers under these names."""
    monkeypatch.setattr(registry.routers, "_classes", dict(available()))

    def install(**values):
        module = types.ModuleType("a_plugin")
        module.Everywhere, module.number = Everywhere, 7
        monkeypatch.setitem(sys.modules, "a_plugin", module)
        points = [importlib.metadata.EntryPoint(n, f"a_plugin:{v}", registry.routers.group) for n, v in values.items()]
        monkeypatch.setattr(registry.routers, "installed", lambda: points)

    return install


def test_an_installed_router_is_found_by_name(entry_point):
    entry_point(everywhere="Everywhere")
    assert get("everywhere") is Everywhere and Everywhere.name == "everywhere"
    assert get("everywhere") is Everywhere  # the second look finds it taken by itself


@pytest.mark.parametrize(
    ("point", "said"),
    [
        ({"broken": "Missing"}, "'broken' .*a_plugin:Missing.* cannot be loaded"),
        ({"number": "number"}, "'number' is 7, expected a subclass"),
        ({"relu": "Everywhere"}, "'relu' is taken by dsmoe.routers.relu.ReLURouter"),
    ],
)
def test_an_installed_router_that_cannot_be_used_says_why(entry_point, point, said):
    entry_point(**point)
    with pytest.raises(RouterError, match=said):
        available()


def test_a_package_that_is_installed_later_is_found(tmp_path, monkeypatch):
    """The list of plugins is kept, and read again when a folder of the search path has changed."""
    monkeypatch.setattr(registry.routers, "_classes", dict(available()))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "late" not in available()
    info = tmp_path / "late_router-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: late-router\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{registry.routers.group}]\nlate = {__name__}:Everywhere\n")
    assert get("late") is Everywhere


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(
        RouterError, match=r"router.name: found 'relo', expected one of .*topk.* \(did you mean 'relu'\?\)"
    ):
        get("relo")


def test_a_name_is_given_once(entry_point):
    with pytest.raises(RouterError, match="taken by"):
        register("topk")(Everywhere)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("problems", "validate_for_model"),
        ("mean_experts", "target_experts_per_token"),
        ("first_experts", "initial_experts_per_token"),
        ("more_than_all", "at_most_num_experts"),
    ],
)
def test_a_method_under_its_old_name_is_refused_with_the_new_one(old, new):
    with pytest.raises(RouterError, match=rf"Outdated\.{old} is now called {new}"):
        type("Outdated", (RouterOptions,), {old: lambda self, model: None, "__module__": __name__})


def test_fields_under_their_old_names_are_refused_with_the_new_ones():
    weights, map_TE = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    for make, message in (
        (lambda: Routing(weights, map_TE, kept={}), "Routing.kept is now called loss_inputs"),
        (lambda: Routing(weights, map_TE).kept, "Routing.kept is now called loss_inputs"),
        (lambda: RetainedRouting({}, None).kept, "RetainedRouting.kept is now called loss_inputs"),
        (lambda: Decision(weights, map_TE, chosen=map_TE), "Decision.chosen is now called saved_selection"),
        (lambda: Decision(weights, map_TE, {}, of_tokens={}), "Decision.of_tokens is now called per_token"),
    ):
        with pytest.raises(RouterError, match=message):
            make()


def alone():
    return SimpleNamespace(size=lambda: 1, rank=lambda: 0)


def megatron_config(**more) -> TransformerConfig:
    return TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=1, num_moe_experts=EXPERTS, moe_ffn_hidden_size=8,
        moe_router_load_balancing_type="none", add_bias_linear=False, use_cpu_initialization=True,
        moe_token_dispatcher_type="allgather", **more,
    )  # fmt: skip


def groups_of_one() -> SimpleNamespace:
    names = ("tp", "cp", "tp_cp", "tp_dp_cp", "ep", "tp_ep", "expt_tp", "expt_dp")
    return SimpleNamespace(**{name: alone() for name in names})


def answering(probs, map_TE) -> Router:
    router = Everywhere(megatron_config(), groups_of_one())
    router.route = lambda hidden_TH, sequence_T: Routing(probs, map_TE)
    return router


@pytest.mark.parametrize(
    ("probs", "map_TE", "said"),
    [
        (torch.zeros(6, EXPERTS, dtype=torch.bfloat16), torch.zeros(6, EXPERTS, dtype=torch.bool), "probs .*bfloat16"),
        (torch.zeros(6, EXPERTS), torch.zeros(6, EXPERTS), "map .*float32.*expected .*bool"),
        (torch.zeros(6, 2), torch.zeros(6, EXPERTS, dtype=torch.bool), r"probs \(6, 2\).*expected \(6, 4\)"),
        (torch.zeros(5, EXPERTS), torch.zeros(6, EXPERTS, dtype=torch.bool), r"probs \(5, 4\)"),
    ],
)
def test_a_router_that_breaks_the_contract_is_named(probs, map_TE, said):
    with pytest.raises(RouterError, match=said):
        answering(probs, map_TE)(torch.zeros(3, 2, HIDDEN))


class NoExperts(torch.nn.Module):
    """In the slot of the experts: what is routed here is not the question."""

    def __init__(self, *args, **kwargs):
        super().__init__()


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_in_a_stock_moe_layer_the_loss_arrives_through_megatrons_hook(scale, monkeypatch):
    """Megatron multiplies the gradient of a router's loss by its own scale, whatever the rest of the loss is."""
    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", torch.tensor(scale))
    slots = MoESubmodules(experts=NoExperts, router=Everywhere)
    layer = MoELayer(megatron_config(), slots, layer_number=1, pg_collection=groups_of_one())
    weight = layer.router.weight
    weight.data.normal_(generator=torch.Generator().manual_seed(0))
    hidden = torch.randn(5, 2, HIDDEN, generator=torch.Generator().manual_seed(1))
    probs, map_TE = layer.route(hidden, None)
    assert map_TE.all() and torch.equal(probs, hidden.flatten(0, 1) @ weight.t())
    (gradient,) = torch.autograd.grad((probs * 0).sum(), weight)
    mean_logit = hidden.flatten(0, 1).mean(0) / EXPERTS
    torch.testing.assert_close(gradient, 3.0 * scale * mean_logit.expand(EXPERTS, -1))


@pytest.mark.parametrize(
    "name", [name for name, router in available().items() if router.__module__.startswith("dsmoe.")]
)
def test_what_a_router_returns_is_typed_and_unpacks_as_megatrons_pair(name):
    """Also for experts that score themselves: what those need besides goes to the layer that attached the router."""
    router_class = get(name)
    router = router_class(megatron_config(), groups_of_one(), options=router_class.Options())
    for parameter in router.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    hidden = torch.randn(5, 2, HIDDEN)
    probs_TE, map_TE = result = router(hidden)
    assert isinstance(result, RoutingResult)
    assert result.probs_TE is probs_TE and result.map_TE is map_TE
    assert (probs_TE.dtype, map_TE.dtype) == (torch.float32, torch.bool)
    assert result.latents_TEr is None and result.reduce_erH is None
    router.attach(RoutingRecorder(EXPERTS, alone()), router.controller)
    router.recorder.begin()
    scores_itself = router_class.latent_rank(router.options) > 0
    attached = router(hidden)
    assert attached.latents_TEr is None and (attached.reduce_erH is not None) == scores_itself
    assert torch.equal(attached.map_TE, map_TE)


def test_zero_3_finds_every_tensor_that_a_router_returns():
    """Contract: DeepSpeed applies its hooks to the items of a tuple and makes a tuple of the same class of them."""
    given = RoutingResult((torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool), None, torch.ones(3, 4, 5)))
    seen = []
    result = apply_to_tensors_only(lambda tensor: seen.append(tensor) or tensor.clone(), given)
    assert [tensor.shape for tensor in seen] == [(2, 3), (2, 3), (3, 4, 5)]
    assert isinstance(result, RoutingResult) and result.reduce_erH is not given.reduce_erH
    assert torch.equal(result.reduce_erH, given.reduce_erH) and result.latents_TEr is None


def test_in_evaluation_no_loss_is_attached():
    router = Everywhere(megatron_config(), groups_of_one()).eval()
    router.weight.data.normal_()
    probs, _ = router(torch.randn(5, 2, HIDDEN))
    (gradient,) = torch.autograd.grad((probs * 0).sum(), router.weight)
    assert not gradient.any()


@pytest.mark.parametrize("name", GATED)
def test_padding_gets_no_expert_and_no_gradient_and_moves_nobody_else(name):
    router_class = get(name)
    router = router_class(megatron_config(), groups_of_one(), options=router_class.Options()).eval()
    for parameter in router.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    hidden = torch.randn(6, 2, HIDDEN, generator=torch.Generator().manual_seed(1), requires_grad=True)
    padding_mask = torch.zeros(6, 2, dtype=torch.bool)
    padding_mask[4:, 1] = True
    probs, map_TE = router(hidden, padding_mask)
    padded_T = padding_mask.flatten()
    assert not map_TE[padded_T].any() and not probs[padded_T].any()
    (gradient,) = torch.autograd.grad(probs.square().sum(), hidden)
    assert not gradient.flatten(0, 1)[padded_T].any()
    other = hidden.detach().clone()
    other[padding_mask] = 100.0
    again, map_again = router(other, padding_mask)
    assert torch.equal(again, probs) and torch.equal(map_again, map_TE)
