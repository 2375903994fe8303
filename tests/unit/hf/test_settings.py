"""Inference settings that an export carries: its logits are the run's with the same option, and they come back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from made_up_run import EXPERTS, made_up_dataset, made_up_run
from torch import Tensor
from transformers import AutoModelForCausalLM

from dsmoe.checkpoint.restore import TrainedModel
from dsmoe.errors import ConversionError
from dsmoe.hf.export import ExportOptions, export, summary
from dsmoe.hf.importing import ImportOptions, import_model

pytestmark = pytest.mark.slow

CASES = [
    ("topk", "k=4", {"k": 4}),
    ("top_p", "p=0.7", {"p": 0.7}),
    ("relu", "theta=0.3", {"threshold": 0.3}),
    ("routing_free", "theta=0.6", {"threshold": 0.6}),
]
TOKENS = torch.arange(5, 69).view(2, 32)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return made_up_dataset(tmp_path_factory.mktemp("corpus"))


@torch.no_grad()
def logits_of(run: Path, change: dict) -> tuple[Tensor, float]:
    """Of a run with changed options, and its experts per token."""
    model = TrainedModel.load(run).model
    for router in model.recorder.routers:
        router.options = router.options.model_copy(update=change)
    logits = model(TOKENS)
    totals = model.recorder.take()
    return logits, float(totals.counts_LE.sum() / totals.tokens / len(totals.counts_LE))


@pytest.mark.parametrize(("router", "setting", "change"), CASES, ids=[name for name, *_ in CASES])
def test_an_export_computes_with_its_setting(router, setting, change, dataset, groups, tmp_path):
    """An export, an import and the models of all three, which takes its time on busy cores."""
    run, out = made_up_run(tmp_path / "run", dataset, router), tmp_path / "out"
    report = export(run, out, ExportOptions(settings=(setting,)))
    expected, experts = logits_of(run, change)
    trained, before = logits_of(run, {})
    assert (trained - expected).abs().max() > 1e-3 and abs(experts - before) > 0.1
    folder = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, local_files_only=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(folder(TOKENS).logits, expected, atol=1e-4, rtol=1e-4)
    (option, value), *_ = change.items()
    assert report["set"][option]["exported"] == value != report["set"][option]["trained"]
    assert f"set: {option} {value:g}, trained with" in summary(report)
    assert f"| set for inference | {option} {value:g}" in (out / "README.md").read_text()
    import_model(out, tmp_path / "again", ImportOptions(check=False))
    torch.testing.assert_close(logits_of(tmp_path / "again", {})[0], expected, atol=1e-4, rtol=1e-4)


def test_an_architecture_with_a_fixed_k_has_it(dataset, groups, tmp_path):
    run = made_up_run(tmp_path / "run", dataset, "topk")
    report = export(run, tmp_path / "out", ExportOptions(format="mixtral", settings=("k=3",)))
    assert report["parity"]["fp32"]["flipped_routes"] == 0 and report["held_out"]["experts_per_token"] == 3
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_experts_per_tok"] == 3


@pytest.mark.parametrize(
    ("router", "settings", "message"),
    [
        ("topk", ("theta=0.1",), "--set theta=0.1: router 'topk' can be given k, integer >= 1, once"),
        ("topk", ("k=2", "k=3"), "--set k=3: router 'topk' can be given k, integer >= 1, once"),
        ("topk", ("k=0",), "can be given k, integer >= 1; .*greater than or equal to 1"),
        ("topk", ("k=1.5",), "can be given k, integer >= 1; .*valid integer"),
        ("topk", (f"k={EXPERTS + 1}",), r"router.k: found 7, expected at most model.num_experts \(6\)"),
        ("topk", ("k",), "can be given k, integer >= 1; "),
        ("topk", ("k=1",), "every gate is 1 and the router cannot learn"),
        ("top_p", ("p=1.5",), "can be given p, number > 0 and <= 1; .*less than or equal to 1"),
        ("relu", ("theta=-0.1",), "can be given theta, number >= 0; .*greater than or equal to 0"),
        ("relu", ("theta=nan",), "can be given theta, number >= 0; .*finite"),
        ("relu", ("k=2",), "router 'relu' can be given theta, number >= 0, once"),
        ("quantile", ("theta=0.1",), "router 'quantile' has no option that decides at inference"),
    ],
)
def test_what_a_router_cannot_be_given(router, settings, message, dataset, groups, tmp_path):
    run = made_up_run(tmp_path / "run", dataset, router)
    with pytest.raises(ConversionError, match=message):
        export(run, tmp_path / "out", ExportOptions(settings=settings))
    assert not (tmp_path / "out").exists()


def test_a_format_without_the_router_is_refused(dataset, groups, tmp_path):
    run = made_up_run(tmp_path / "run", dataset, "top_p")
    with pytest.raises(ConversionError, match="mixtral: router.name is top_p, it has softmax top-k"):
        export(run, tmp_path / "out", ExportOptions(format="mixtral", settings=("p=0.5",)))
