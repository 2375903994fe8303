"""routing_dsmoe.py against dsmoe's own routers: the same weights and routes to the last bit, for every router."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import forked
from megatron.core.transformer.transformer_config import TransformerConfig

from dsmoe.hf.export import write_code
from dsmoe.routers import available, get, routing_dsmoe
from dsmoe.routers.routing_dsmoe import build_routing

HIDDEN, EXPERTS, LAYERS = 16, 8, 2
ALONE = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
GROUPS = SimpleNamespace(tp=ALONE, cp=ALONE, tp_cp=ALONE, tp_dp_cp=ALONE, ep=ALONE)

# Every option that changes a route or a weight.
VARIANTS = [
    ("topk", {"k": 1}),
    ("topk", {"k": 3}),
    ("topk", {"k": 3, "renormalize": True}),
    ("topk", {"k": 2, "softmax": "after"}),
    ("topk_bias", {"k": 3}),
    ("topk_bias", {"k": 2, "score": "softmax", "renormalize": False, "route_scale": 1.0}),
    ("topk_bias", {"k": 2, "num_groups": 4, "groups_per_token": 2, "group_score_experts": 1}),
    ("top_p", {"p": 0.5}),
    ("top_p", {"p": 0.5, "rule": "reach"}),
    ("top_p", {"p": 0.7, "renormalize": True}),
    ("top_p", {"p": 1.0}),
    ("dtop_p", {"k": 3.0}),
    ("dtop_p", {"k": 2.5, "rule": "reach", "epsilon": 1e-2}),
    ("relu", {"k": 2.0}),
    ("relu", {"k": 2.0, "threshold": 0.1}),
    ("relu", {"k": 2.0, "threshold": 0.1, "route_scale": 0.25}),
    ("expert_threshold", {"k": 2.0}),
    ("quantile", {"k": 2.0}),
    ("aoe", {"k": 3, "rank": 4}),
    ("aoe", {"k": 2, "rank": 4, "gates": "selected", "latent": "recompute"}),
    ("routing_free", {"rank": 4}),
    ("routing_free", {"rank": 4, "form": "paper", "threshold": 2.0}),
]
# Options that play no part once a model is trained. One that is neither here nor in a variant above is new, and
# routing_dsmoe.py has to learn what it does to a route.
OF_TRAINING = {
    "balance_coefficient", "balance_scope", "entropy_coefficient", "z_coefficient", "sequence_coefficient",
    "sequence_counts", "bias_update", "bias_update_rate", "cutoffs", "lambda_initial", "lambda_factor",
    "lambda_rate", "lambda_update", "load_balanced", "mu", "target_density", "expected_experts", "p_initial",
    "p_min", "p_max", "kp", "ki", "scale_initial", "warmup_steps", "decay", "capacity_slack", "rescale",
    "placement", "latent",
}  # fmt: skip
OWN = {name: router for name, router in available().items() if router.__module__.startswith("dsmoe.")}


def test_every_router_has_a_variant():
    assert set(OWN) == set(routing_dsmoe.ROUTINGS) == {name for name, _ in VARIANTS}


@pytest.mark.parametrize("name", OWN)
def test_every_option_that_changes_a_route_is_known(name):
    tried = {option for router, options in VARIANTS if router == name for option in options}
    of_training = OF_TRAINING | ({"k", "form"} if name in ("relu", "expert_threshold", "quantile") else set())
    assert set(OWN[name].Options.model_fields) <= tried | of_training


def trained_routers(name: str, options: dict):
    """Routers of two layers with drawn weights, and a controller that has moved."""
    router_class = get(name)
    valid = router_class.Options.model_validate(options)
    config = TransformerConfig(
        num_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=1, num_moe_experts=EXPERTS, moe_ffn_hidden_size=8,
        moe_router_load_balancing_type="none", add_bias_linear=False, use_cpu_initialization=True,
    )  # fmt: skip
    controller = router_class.make_controller(valid, LAYERS, EXPERTS)
    routers = [router_class(config, GROUPS, options=valid) for _ in range(LAYERS)]
    generator = torch.Generator().manual_seed(1)
    for index, router in enumerate(routers):
        router.controller, router.index = controller, index
        for parameter in router.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(0.5 * drawn if parameter.dim() > 1 else parameter.data + 0.2 * drawn)
        router.eval()
    if controller is not None:
        moved = {
            key: torch.tensor(5000) if key == "updates" else value + 0.2 * torch.rand(value.shape, generator=generator)
            for key, value in controller.state.items()
        }
        controller.load(moved)
    return routers, valid, controller


def exported(router, options, controller) -> torch.nn.Module:
    """The stand-alone module with what an export would hold of this router."""
    rank = router.latent_rank(options)
    shape = {"num_experts": EXPERTS, "hidden_size": HIDDEN, "expert_rank": rank}
    module = build_routing(SimpleNamespace(router={"name": router.name, **options.model_dump()}, **shape))
    tensors = {name: parameter.data for name, parameter in router.named_parameters()}
    state = router.inference_state(controller, router.index)
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    module.load_state_dict(tensors | state, strict=True)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=lambda value: value if isinstance(value, str) else "")
def test_routes_and_weights_are_dsmoes_to_the_bit(name, options, dtype):
    routers, valid, controller = trained_routers(name, options)
    hidden = torch.randn(50, 2, HIDDEN, generator=torch.Generator().manual_seed(2)).to(dtype)
    decided = []
    for router in routers:
        module = exported(router, valid, controller)
        expected = router.decide(hidden, None)
        probs_TE, map_TE, latents_TEr, _ = module(hidden.flatten(0, 1))
        assert probs_TE.dtype == torch.float32 and map_TE.dtype == torch.bool
        assert torch.equal(probs_TE, expected.probs_TE)
        assert torch.equal(map_TE, expected.map_TE)
        if expected.latents_TEr is not None:
            assert torch.equal(latents_TEr, expected.latents_TEr)
        assert map_TE.any()
        decided.append(map_TE)
    assert options.get("p") == 1.0 or not torch.equal(*decided), "the two layers should differ"


@pytest.mark.parametrize("name", ["topk_bias", "dtop_p", "expert_threshold", "quantile"])
def test_the_controllers_state_decides(name):
    """Without it the routes are others: it has to travel with the weights."""
    routers, valid, controller = trained_routers(name, {})
    module = exported(routers[1], valid, controller)
    hidden = torch.randn(50, HIDDEN, generator=torch.Generator().manual_seed(3))
    _, with_state, *_ = module(hidden)
    for buffer in module.buffers():
        buffer.copy_(torch.linspace(-1, 1, buffer.numel()).view(buffer.shape))
    _, without, *_ = module(hidden)
    assert not torch.equal(with_state, without)


def test_what_else_is_in_the_batch_never_changes_a_route():
    for name, options in VARIANTS:
        routers, valid, controller = trained_routers(name, options)
        module = exported(routers[0], valid, controller)
        hidden = torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(4))
        _, together, *_ = module(hidden)
        alone = torch.cat([module(row.unsqueeze(0))[1] for row in hidden])
        assert torch.equal(together, alone), name


def test_an_unknown_router_is_named():
    with pytest.raises(ValueError, match="'nothing' is not in this file; it has topk"):
        build_routing(SimpleNamespace(router={"name": "nothing"}))


def test_the_files_that_travel_do_not_import_dsmoe(tmp_path):
    """In a process of its own, in which dsmoe cannot be imported."""
    write_code(tmp_path, Path(routing_dsmoe.__file__))
    (tmp_path / "stranger.py").write_text(
        "import sys, types; package = types.ModuleType('export');"
        f"package.__path__ = [{str(tmp_path)!r}]; sys.modules['export'] = package;"
        "import export.modeling_dsmoe as m; print(m.DsmoeForCausalLM.__name__)"
    )
    done = forked(str(tmp_path / "stranger.py"), without="dsmoe")
    assert done.code == 0 and "DsmoeForCausalLM" in done.output, done.output
