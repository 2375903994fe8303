"""Native hosts: the right one is picked, what does not fit is refused with every reason, and logits are equal."""

from __future__ import annotations

import json

import pytest
import torch

from dsmoe.config import validate_config
from dsmoe.errors import ConversionError
from dsmoe.hf.native import HOSTS, native_config, native_host, reasons_against
from dsmoe.hf.shards import ShardWriter
from dsmoe.hf.table import TABLES, links
from dsmoe.model.gpt import LanguageModel
from dsmoe.model.names import logical_tensors
from dsmoe.routers import get
from dsmoe.routers.registry import option_classes

SHAPE = dict(
    num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2, sequence_length=16, vocab_size=64,
    num_experts=4, moe_ffn_hidden_size=16, init_std=0.3, norm_epsilon=1e-3, rotary_base=500.0,
)  # fmt: skip
PLAIN, RENORMALISED, AFTER = {}, {"renormalize": True}, {"softmax": "after"}
FITTING = {
    "qwen3_moe, dense layers, wide heads": (
        "qwen3_moe", dict(qk_layernorm=True, moe_layer_freq=[0, 1], ffn_hidden_size=24, kv_channels=12), PLAIN,
    ),
    "qwen3_moe, untied": ("qwen3_moe", dict(qk_layernorm=True, tie_embeddings=False), RENORMALISED),
    "qwen2_moe": (
        "qwen2_moe", dict(moe_shared_expert_intermediate_size=8, moe_shared_expert_gate=True, add_qkv_bias=True), PLAIN,
    ),
    "qwen2_moe, dense layers": (
        "qwen2_moe", dict(moe_shared_expert_intermediate_size=24, moe_shared_expert_gate=True, moe_layer_freq=[0, 1]),
        AFTER,
    ),
    "olmoe": ("olmoe", dict(qk_layernorm="full"), PLAIN),
    "olmoe, renormalised": ("olmoe", dict(qk_layernorm="full", tie_embeddings=False), AFTER),
    "mixtral": ("mixtral", dict(tie_embeddings=False), AFTER),
    "mixtral, tied, wide heads": ("mixtral", dict(kv_channels=12), RENORMALISED),
}  # fmt: skip


def run_config(model: dict, router: dict, name: str = "topk"):
    options = {"k": 2, **router} if name == "topk" else router
    return validate_config({"model": SHAPE | model, "router": {"name": name, **options}}, option_classes())


def export(host: str, config, model: LanguageModel, folder) -> None:
    """As the exporter does it, in one go."""
    tensors = dict(logical_tensors(model))
    with ShardWriter(folder, 20_000) as writer:
        for link in links(TABLES[host], config.model, {name: tensor.shape for name, tensor in tensors.items()}):
            for name, tensor in link.to_theirs([tensors[name] for name in link.ours]).items():
                writer.add(name, tensor)
    content = native_config(host, config) | {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    (folder / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize("case", FITTING)
def test_the_host_gives_the_same_logits_without_code_of_ours(groups, tmp_path, case):
    from transformers import AutoModelForCausalLM

    host, model, router = FITTING[case]
    config = run_config(model, router)
    assert native_host(config, "auto") == host
    options = get("topk").Options.model_validate(config.router.options)
    ours = LanguageModel(config.model, (get("topk"), options), groups, seed=3).eval()
    with torch.no_grad():
        for name, tensor in logical_tensors(ours):
            if tensor.dim() == 1:  # a norm that is forgotten, or applied elsewhere, must show
                tensor.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    export(host, config, ours, tmp_path)
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.randint(0, 64, (3, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(tokens).logits, ours(tokens), rtol=0, atol=1e-4)


REFUSED = {
    "another router": ("qwen3_moe", dict(qk_layernorm=True), {}, "relu", ["router.name is relu"]),
    "no QK-norm": ("qwen3_moe", {}, {}, "topk", ["model.qk_layernorm is False"]),
    "the other QK-norm": ("olmoe", dict(qk_layernorm=True), {}, "topk", ["QK-norm over all heads"]),
    "QK-norm": ("mixtral", dict(qk_layernorm=True), AFTER, "topk", ["model.qk_layernorm is True"]),
    "not renormalised": ("mixtral", {}, PLAIN, "topk", ["not renormalised"]),
    "wide heads": ("olmoe", dict(qk_layernorm="full", kv_channels=12), {}, "topk", ["heads are 12 wide"]),
    "no gate": (
        "qwen2_moe", dict(moe_shared_expert_intermediate_size=8), PLAIN, "topk", ["moe_shared_expert_gate is false"],
    ),
    "biases": ("mixtral", dict(add_qkv_bias=True), AFTER, "topk", ["model.add_qkv_bias is true"]),
    "all at once": (
        "mixtral",
        dict(qk_layernorm="full", moe_layer_freq=[1, 0], moe_shared_expert_intermediate_size=8),
        PLAIN,
        "topk",
        ["not renormalised", "qk_layernorm is full", "no shared expert", "layers 1 are dense"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_with_every_reason(case):
    host, model, options, name, reasons = REFUSED[case]
    config = run_config(model, options, name)
    assert len(reasons_against(host, config.model, config.router)) == len(reasons)
    with pytest.raises(ConversionError) as error:
        native_host(config, host)
    for reason in reasons:
        assert reason in str(error.value)


def test_where_nothing_fits_each_host_says_why():
    config = run_config({}, {}, "top_p")
    with pytest.raises(ConversionError) as error:
        native_host(config, "auto")
    for host in HOSTS:
        assert f"{host}: router.name is top_p" in str(error.value)
