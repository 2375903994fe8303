"""A model on Triton's kernels is the model on torch's operators, and says when it cannot be."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read where a kernel is defined

import json
from collections import Counter

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (pip install -e '.[triton]')")

import dsmoe.triton as fused
from dsmoe.config import validate_config
from dsmoe.errors import ConfigError
from dsmoe.model.gpt import LanguageModel
from dsmoe.routers import get
from dsmoe.routers.registry import option_classes
from dsmoe.triton import grouped, rows, scores

SIZES = dict(
    num_layers=1, hidden_size=32, num_attention_heads=2, sequence_length=8, num_experts=4, moe_ffn_hidden_size=16,
    vocab_size=32, init_std=0.2, experts_implementation="grouped_mm",
)  # fmt: skip


def pass_of(groups, router: str, fused_kernels: bool, dtype: torch.dtype, **model) -> tuple[float, dict]:
    options = {"routing_free": {"rescale": True, "rank": 8}}.get(router, {})
    tree = {"model": SIZES | model | {"fused_kernels": fused_kernels}, "router": {"name": router, **options}}
    config = validate_config(tree, option_classes())
    router_class = get(config.router.name)
    options = router_class.Options.model_validate(config.router.options)
    network = LanguageModel(config.model, (router_class, options), groups, seed=1).to(dtype).train()
    text = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(0))
    loss, _ = network(text[:, :-1].contiguous(), text[:, 1:].contiguous())
    loss.backward()
    return loss.item(), {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("model", [{}, {"moe_chunks": 3, "recompute": "full"}], ids=["plain", "parts"])
@pytest.mark.parametrize("router", ["relu", "topk", "routing_free"])
def test_losses_and_gradients(groups, router, model):
    expected_loss, expected = pass_of(groups, router, False, torch.float32, **model)
    loss, actual = pass_of(groups, router, True, torch.float32, **model)
    assert loss == pytest.approx(expected_loss, abs=1e-6) and actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


# What a pass of one layer asks of the kernels. Sums by token: of the experts' outputs, and of the rows' gradients, once
# a part. Gradients of weights: whether a call adds to another part's.
USES = {
    ("topk", 1): {"launch_sum_rows": 2, "writes": 2},
    ("topk", 3): {"launch_sum_rows": 6, "writes": 2, "adds": 4},
    ("routing_free", 1): {"launch_sum_rows": 2, "writes": 4, "latent_norms": 1, "scaled_latents": 1},
}


@pytest.mark.parametrize(("router", "parts"), USES)
def test_a_model_uses_them(monkeypatch, groups, router, parts):
    """Results are the same without. Before sm_90, as here, all products of experts are theirs."""
    uses: Counter[str] = Counter()

    def count(module, name: str, use=lambda *args, **kwargs: None) -> None:
        launch = getattr(module, name)

        def counted(*args, **kwargs):
            uses[use(*args, **kwargs) or name] += 1
            return launch(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    count(rows, "launch_sum_rows")
    count(scores, "latent_norms")
    count(scores, "scaled_latents")
    count(grouped, "add_weight_gradient", lambda *args, adds: "adds" if adds else "writes")
    pass_of(groups, router, True, torch.float32, moe_chunks=parts)
    assert uses == USES[router, parts]


def test_auto_is_off_until_a_gpu_has_passed(monkeypatch, tmp_path):
    assert not fused.use_fused("auto") and fused.verdicts() == {}
    monkeypatch.setattr(fused, "on_gpu", lambda: True)
    monkeypatch.setattr(fused, "gpu_model", lambda: "NVIDIA H200")
    assert not fused.use_fused("auto") and fused.use_fused(True) and not fused.use_fused(False)
    verdicts = tmp_path / "verdicts.json"
    verdicts.write_text(json.dumps({"NVIDIA H200": {"date": "2026-12-01"}}))
    monkeypatch.setattr(fused, "VERDICTS", verdicts)
    assert fused.use_fused("auto") and not fused.use_fused(False)


def test_kernels_that_cannot_run_are_refused_where_they_were_asked_for(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ConfigError, match="fused_kernels: found true, but no GPU is used; expected auto or false"):
        fused.use_fused(True)
    monkeypatch.setattr(fused, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"triton is not installed \(pip install 'dsmoe\[triton\]'\)"):
        fused.use_fused(True)
    assert not fused.use_fused("auto") and not fused.use_fused(False)
