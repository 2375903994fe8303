"""What the probe says of experts that were made to be alike, of routes that are known, and of every router."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dsmoe.checkpoint.restore import TrainedModel
from dsmoe.config import validate_config
from dsmoe.errors import CheckpointError
from dsmoe.lab.study.probe import gradient_norms, probe
from dsmoe.lab.study.probe.latency import settings
from dsmoe.lab.study.probe.routes import KINDS, TokenKinds, flips, kind_of, look, read_layers
from dsmoe.lab.study.probe.similarity import all_outputs, cka, cosine, hidden_units, matched, similarity
from dsmoe.model.gpt import LanguageModel
from dsmoe.moe.layer import VariableMoELayer
from dsmoe.parallel.groups import create_groups, start_processes
from dsmoe.routers import get
from dsmoe.routers.registry import option_classes

EXPERTS, HIDDEN, FFN = 6, 16, 24
ROUTERS = sorted(name for name, options in option_classes().items() if options.__module__.startswith("dsmoe."))


def config_of(router: str = "topk", **model):
    shape = dict(
        num_layers=2, hidden_size=HIDDEN, num_attention_heads=2, sequence_length=16, vocab_size=64, num_experts=EXPERTS,
        moe_ffn_hidden_size=FFN, init_std=0.3,
    )  # fmt: skip
    return validate_config({"model": {**shape, **model}, "router": {"name": router}}, option_classes())


def model_of(config) -> LanguageModel:
    start_processes()
    router = get(config.router.name)
    options = router.Options.model_validate(config.router.options)
    return LanguageModel(config.model, (router, options), create_groups(1), seed=1).eval()


def layers_of(model) -> list[VariableMoELayer]:
    return [module for module in model.modules() if isinstance(module, VariableMoELayer)]


@pytest.fixture
def tokens_BS():
    return torch.randint(0, 64, (3, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def hidden_TH():
    return torch.randn(200, HIDDEN, generator=torch.Generator().manual_seed(1))


def test_a_copy_is_alike_in_every_way_and_strangers_are_not(hidden_TH):
    layer = layers_of(model_of(config_of()))[0]
    actual = similarity(layer, hidden_TH)
    assert actual["cosine"]["mean"] < 0.2 and actual["cka"]["mean"] < 0.6
    assert actual["weights"]["mean"] == pytest.approx(actual["weights"]["chance"], abs=0.05)
    assert actual["weights"]["similar"] == actual["cosine"]["similar"] == 0.0
    with torch.no_grad():
        order = torch.randperm(FFN)  # a copy whose hidden units stand in another order
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(layer.experts, name)
            if name == "down_proj":
                weight[3] = weight[1][:, order]
            else:
                weight[3] = weight[1][torch.cat((order, order + FFN))]
    actual = similarity(layer, hidden_TH)
    for name in ("cosine", "cka", "weights"):
        assert actual[name]["max"] == pytest.approx(1.0, abs=1e-4), name
        assert actual[name]["similar"] == pytest.approx(1 / math.comb(EXPERTS, 2)), name


def test_cka_sees_through_a_rotation_and_cosine_does_not():
    outputs = torch.randn(1, 100, 8, generator=torch.Generator().manual_seed(0))
    rotation, _ = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)))
    both = torch.cat((outputs, 3 * outputs @ rotation + 5))
    assert cka(both)[0, 1] == pytest.approx(1.0, abs=1e-4)
    assert cosine(both)[0, 1] < 0.7
    assert cosine(torch.cat((outputs, 2 * outputs)))[0, 1] == pytest.approx(1.0, abs=1e-4)
    assert cosine(torch.cat((outputs, -outputs)))[0, 1] == pytest.approx(-1.0, abs=1e-4)


def test_outputs_are_those_of_a_plain_swiglu(hidden_TH):
    layer = layers_of(model_of(config_of()))[0]
    outputs = all_outputs(layer, hidden_TH[:20])
    for expert in range(EXPERTS):
        gate, up = layer.experts.gate_up_proj[expert].chunk(2)
        plain = (torch.nn.functional.silu(hidden_TH[:20] @ gate.T) * (hidden_TH[:20] @ up.T)) @ (
            layer.experts.down_proj[expert].T
        )
        torch.testing.assert_close(outputs[expert], plain, rtol=1e-4, atol=1e-5)


def test_hidden_units_of_low_rank_gates_are_multiplied_out(hidden_TH):
    layer = layers_of(model_of(config_of("aoe")))[0]
    units = hidden_units(layer)
    assert units.shape == (EXPERTS, FFN, 3 * HIDDEN)
    gate = layer.experts.gate_proj[2] @ layer.router.reduce_proj[2]
    torch.testing.assert_close(units[2, :, :HIDDEN], gate)
    assert matched(units[2], units[2].flip(0)) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("the", "prose"), (" Über", "prose"), ("1984", "digits"), ("v2", "digits"), (".", "punctuation"),
        (" “", "punctuation"), ("==", "code"), ("self._x", "code"), ("<unk>", "code"), ("\n", "space"), ("  ", "space"),
        ("", "other"), ("☃", "other"),
    ],
)  # fmt: skip
def test_a_tokens_kind_is_read_from_its_text(text, kind):
    assert kind_of(text) == kind


def test_routes_are_counted_by_layer_kind_and_position(tokens_BS):
    model = model_of(config_of("relu"))
    layers = look(model, tokens_BS)
    assert len(layers) == 2
    kinds = (tokens_BS.numpy() % 2).view(TokenKinds)  # even ids prose, odd ones digits
    actual = read_layers(layers, kinds, tuple(tokens_BS.shape))
    for layer, report in zip(layers, actual, strict=True):
        map_SBE = layer.map_TE.reshape(16, 3, EXPERTS)
        assert report["counts"] == layer.map_TE.sum(0).tolist()
        assert report["experts_per_token"] == pytest.approx(map_SBE.sum(-1).mean())
        by_kind = [map_SBE.sum(-1).T[tokens_BS.numpy() % 2 == number].mean() for number in (0, 1)]
        assert report["by_kind"] == pytest.approx(dict(zip(KINDS[:2], by_kind, strict=True)))
        assert report["by_position"] == pytest.approx([map_SBE[at : at + 2].sum(-1).mean() for at in range(0, 16, 2)])
        assert layer.rerouted(torch.float32).tolist() == layer.map_TE.tolist()


def test_flips_are_the_share_of_routes_that_changed():
    one = np.array([[True, True, False], [False, True, False]])
    other = np.array([[True, False, True], [False, True, False]])
    assert flips(one, one) == 0.0 and flips(one, other) == pytest.approx(1 - 2 / 4)
    assert flips(one, ~one) == 1.0 and flips(one & ~one, one & ~one) == 0.0


@pytest.mark.parametrize("router", ROUTERS)
def test_gradient_norms_are_those_of_every_expert_alone(router, tokens_BS):
    model = model_of(config_of(router, moe_layer_freq=[0, 1]))
    labels = tokens_BS.roll(-1, 1)
    norms = gradient_norms(model, {"tokens": tokens_BS, "labels": labels})
    assert norms.shape == (1, EXPERTS)
    loss, _ = model(tokens_BS, labels)
    loss.backward()
    layer = layers_of(model)[0]
    own = [p for p in layer.parameters() if hasattr(p, "first_expert")]
    expected = sum(parameter.grad.double().flatten(1).square().sum(1) for parameter in own).sqrt()
    torch.testing.assert_close(norms[0], expected)


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_can_be_tried_with_other_settings(router, tmp_path, tokens_BS):
    config = config_of(router, init_std=0.05)  # routing_free's scores then lie about its threshold
    model = model_of(config)
    trained = TrainedModel(model, config, create_groups(1), 0, tmp_path)
    counts = {}
    for name, change in settings(trained):
        for one in model.recorder.routers:
            one.options = one.options.model_copy(update=change)
        counts[name] = sum(layer.map_TE.sum() for layer in look(model, tokens_BS))
    assert len(set(counts.values())) == len(counts) or router == "aoe"
    assert len(counts) > 1 or router in ("relu", "dtop_p", "expert_threshold", "quantile")


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="neither a run"):
        probe(tmp_path)
