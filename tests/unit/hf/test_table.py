"""The key table against the models themselves: their tensors, and its own way back."""

from __future__ import annotations

import pytest
import torch

from dsmoe.config import RouterConfig, validate_config
from dsmoe.errors import CheckpointError
from dsmoe.hf.table import CONTROLLERS, PACKED, TABLES, check_tensors, links, routing_name
from dsmoe.model.skeleton import logical_shapes
from dsmoe.routers import available
from dsmoe.routers.registry import option_classes

SHAPE = dict(
    num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2, vocab_size=64, num_experts=4,
    moe_ffn_hidden_size=16, ffn_hidden_size=48, tie_embeddings=False,
)  # fmt: skip
FITTING = {
    "dsmoe": dict(
        moe_layer_freq=[0, 1], moe_shared_expert_intermediate_size=24, moe_shared_expert_gate=True, qk_layernorm=True,
        kv_channels=16, add_qkv_bias=True,
    ),
    "qwen2_moe": dict(
        moe_layer_freq=[0, 1], moe_shared_expert_intermediate_size=24, moe_shared_expert_gate=True, add_qkv_bias=True
    ),
    "dots1": dict(moe_layer_freq=[0, 1], moe_shared_expert_intermediate_size=32, qk_layernorm=True),
    "qwen3_moe": dict(moe_layer_freq=[0, 1], qk_layernorm=True, kv_channels=16),
    "olmoe": dict(qk_layernorm="full"),
    "mixtral": {},
}  # fmt: skip
ROUTERS = {name: router for name, router in available().items() if router.__module__.startswith("dsmoe.")}


def model_config(router: dict | None = None, **model):
    options = {"threshold": 0.01} if router and router["name"] == "routing_free" else {}
    return validate_config({"model": SHAPE | model, "router": (router or {"name": "topk"}) | options}, option_classes())


def filled(shapes) -> dict[str, torch.Tensor]:
    """A different number in every element, so that any mix-up shows."""
    start, tensors = 0, {}
    for name, shape in shapes.items():
        numel = torch.Size(shape).numel()
        tensors[name] = torch.arange(start, start + numel, dtype=torch.float64).view(shape)
        start += numel
    return tensors


def exported(actual, ours) -> dict[str, torch.Tensor]:
    theirs: dict[str, torch.Tensor] = {}
    for link in actual:
        theirs |= link.to_theirs([ours[name] for name in link.ours])
    return theirs


CASES = [("dsmoe", "hub", router) for router in ROUTERS]
CASES += [("dsmoe", "packed", name) for name in ("topk", "topk_bias")]
HOSTS = [name for name in PACKED if name != "dsmoe"]
CASES += [(name, form, "topk") for name in HOSTS for form in ("hub", "packed")]


@pytest.mark.parametrize(("architecture", "form", "router"), CASES)
def test_there_and_back_is_the_identity(architecture, form, router):
    config = model_config({"name": router}, **FITTING[architecture])
    ours = filled(logical_shapes(config.model, config.router))
    rows = (TABLES if form == "hub" else PACKED)[architecture]
    actual = links(rows, config.model, {name: tensor.shape for name, tensor in ours.items()})
    theirs = exported(actual, ours)
    assert sum(tensor.numel() for tensor in theirs.values()) == sum(tensor.numel() for tensor in ours.values())
    back: dict[str, torch.Tensor] = {}
    for link in actual:
        assert {name: tuple(theirs[name].shape) for name in link.theirs} == link.theirs
        back |= link.to_ours([theirs[name] for name in link.theirs])
    assert back.keys() == ours.keys()
    assert [name for name in ours if not torch.equal(back[name], ours[name])] == []


def transformers_config(architecture: str, packed: bool):
    import transformers

    common = dict(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_experts_per_tok=2, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    if architecture == "qwen3_moe":
        return transformers.Qwen3MoeConfig(
            **common, head_dim=16, intermediate_size=48, moe_intermediate_size=16, num_experts=4, mlp_only_layers=[0]
        )
    if architecture == "qwen2_moe":
        return transformers.Qwen2MoeConfig(
            **common, intermediate_size=48, moe_intermediate_size=16, num_experts=4, mlp_only_layers=[0],
            shared_expert_intermediate_size=24,
        )  # fmt: skip
    if architecture == "dots1":
        return transformers.Dots1Config(
            **common, intermediate_size=48, moe_intermediate_size=16, n_routed_experts=4, n_shared_experts=2,
            first_k_dense_replace=1,
        )  # fmt: skip
    if architecture == "olmoe":
        return transformers.OlmoeConfig(**common, intermediate_size=16, num_experts=4)
    return transformers.MixtralConfig(**common, intermediate_size=16, num_local_experts=4)


@pytest.mark.parametrize("architecture", HOSTS)
def test_names_and_shapes_are_those_of_transformers(architecture):
    """Packed names are those of its modules; the Hub's are held by the import tests, on files it saved."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(transformers_config(architecture, True))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    config = model_config(**FITTING[architecture])
    shapes = logical_shapes(config.model, config.router)
    actual = {}
    for link in links(PACKED[architecture], config.model, shapes):
        actual |= link.theirs
    for name in CONTROLLERS.get(architecture, ()):  # of the router, beside the run's tensors
        actual[routing_name(1, name, architecture)] = (4,)
    assert actual == expected


def test_expert_rows_are_those_of_the_expert():
    config = model_config(**FITTING["mixtral"])
    ours = filled(logical_shapes(config.model, config.router))
    theirs = exported(links(TABLES["mixtral"], config.model, logical_shapes(config.model, config.router)), ours)
    for layer in range(2):
        for expert in range(4):
            gate_up = ours[f"gpt.decoder.layers.{layer}.mlp.experts.{expert}.gate_up_proj"]
            block = f"model.layers.{layer}.block_sparse_moe.experts.{expert}."
            assert torch.equal(theirs[block + "w1.weight"], gate_up[:16])
            assert torch.equal(theirs[block + "w3.weight"], gate_up[16:])


@pytest.mark.parametrize(
    ("architecture", "model", "homeless"),
    [
        ("mixtral", {"qk_layernorm": True}, "self_attention.q_layernorm.weight"),
        ("olmoe", {"qk_layernorm": True}, "self_attention.k_layernorm.weight"),
        ("qwen3_moe", {"qk_layernorm": "full"}, "self_attention.q_layernorm.norm.weight"),
        ("qwen3_moe", {"moe_shared_expert_intermediate_size": 8}, "shared_experts.linear_fc1.weight"),
        ("olmoe", {"qk_layernorm": "full", "moe_layer_freq": [1, 0]}, "layers.1.mlp.linear_fc1.weight"),
    ],
)
def test_a_tensor_without_a_place_is_named(architecture, model, homeless):
    config = model_config(**model)
    with pytest.raises(CheckpointError, match="has no place") as error:
        links(TABLES[architecture], config.model, logical_shapes(config.model, RouterConfig()))
    assert homeless in str(error.value)


def test_all_differences_are_listed_at_once():
    expected = {"a": (2, 3), "b": (1,), "c": (4,)}
    with pytest.raises(CheckpointError) as error:
        check_tensors(expected, {"a": (3, 2), "c": (4,), "d": (5,)}, "FOLDER")
    message = str(error.value)
    assert "FOLDER" in message and "missing: 1 tensor (b)" in message
    assert "not used by this architecture and configuration: 1 tensor (d)" in message
    assert "a [3, 2] (expected [2, 3])" in message
    check_tensors(expected, expected, "FOLDER")
