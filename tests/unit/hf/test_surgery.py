"""A trained mixture of experts continues with another router: it starts near, says how near, keeps what it was told."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers

from dsmoe.checkpoint.restore import TrainedModel
from dsmoe.checkpoint.verify import verify_checkpoint
from dsmoe.config import load_config
from dsmoe.errors import ConfigError, ConversionError
from dsmoe.hf import surgery
from dsmoe.hf.importing import REPORT, ImportOptions, import_model
from dsmoe.routers import available, get
from dsmoe.routers.registry import option_classes

OWN = {name: router for name, router in available().items() if router.__module__.startswith("dsmoe.")}
WITH_GATE = [name for name, router in OWN.items() if router.has_gate]
OTHERS = [name for name in WITH_GATE if name != "topk"]
TOKENS = torch.randint(0, 64, (3, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Qwen3-MoE in which routing matters."""
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        intermediate_size=24, moe_intermediate_size=16, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True,
        max_position_embeddings=32, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
    path = tmp_path_factory.mktemp("hub") / "hf"
    model.eval().save_pretrained(path)
    return path


def operated(folder, run, router: str, *overrides: str) -> dict:
    return import_model(folder, run, ImportOptions(router, overrides=overrides, check=False))["surgery"]


@pytest.mark.parametrize("router", OTHERS)
def test_it_starts_from_the_gate(groups, folder, tmp_path, router, monkeypatch):
    """Two imports, with the trained gates and with drawn ones; more than 20 s where cores are shared."""
    report = operated(folder, tmp_path / "run", router)
    assert report["from"] == "topk" and report["router"] == router
    assert report["experts_per_token_before"] == 2
    assert report["experts_per_token_after"] == pytest.approx(2, rel=0.25)
    assert verify_checkpoint(tmp_path / "run" / "checkpoints" / "step_00000000").problems == []
    assert json.loads((tmp_path / "run" / REPORT).read_text())["surgery"] == report
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    assert not (tmp_path / "run" / "with_own_router").exists()
    # The same with gates that were not taken over.
    replace = surgery._replace

    def forgetful(*arguments):
        routers = replace(*arguments)
        for router in routers:
            router.weight.data.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
        return routers

    monkeypatch.setattr(surgery, "_replace", forgetful)
    anew = operated(folder, tmp_path / "anew", router)
    assert report["kl_divergence"] < 0.7 * anew["kl_divergence"]


def test_a_router_that_can_compute_the_same_does(groups, folder, tmp_path):
    report = operated(folder, tmp_path / "run", "topk_bias")
    assert report["kl_divergence"] < 1e-8 and report["flipped_routes"] == 0
    own = import_model(folder, tmp_path / "own", ImportOptions(check=False))
    assert own["surgery"] is None
    with torch.no_grad():
        one, other = (TrainedModel.load(tmp_path / name).model(TOKENS) for name in ("run", "own"))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("router", OTHERS)
def test_the_run_computes_what_the_report_says(groups, folder, tmp_path, router):
    """From its checkpoint: controller's state and options are as they were when the distance was measured."""
    seen = []
    observe = surgery.observe

    def kept(model, sample, greedy):
        seen.append((sample, observe(model, sample, greedy)))
        return seen[-1][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(surgery, "observe", kept)
        operated(folder, tmp_path / "run", router)
    sample, after = seen[-1]
    with torch.no_grad():
        actual = TrainedModel.load(tmp_path / "run").model(sample.tokens)
    torch.testing.assert_close(actual, after.logits, rtol=1e-4, atol=1e-4)


def test_what_the_user_sets_stays(groups, folder, tmp_path):
    report = operated(folder, tmp_path / "run", "top_p", "router.p=0.3", "router.renormalize=false")
    config = load_config(tmp_path / "run" / "config.yaml", routers=option_classes())
    assert config.router.name == "top_p" and config.router.p == 0.3 and not config.router.renormalize
    assert report["fitted_options"] == {}
    report = operated(folder, tmp_path / "relu", "relu", "router.k=3")
    assert load_config(tmp_path / "relu" / "config.yaml", routers=option_classes()).router.k == 3


def test_a_recipe_gives_what_is_not_the_models(groups, folder, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("training: {steps: 7, lr: 2.0e-3}\ncheckpoint: {interval: 3}\n")
    import_model(folder, tmp_path / "run", ImportOptions("relu", config=recipe, check=False))
    config = load_config(tmp_path / "run" / "config.yaml", routers=option_classes())
    assert (config.training.steps, config.training.lr, config.checkpoint.interval) == (7, 2e-3, 3)
    assert config.logging.run_dir == str(tmp_path / "run") and config.router.k == 2
    recipe.write_text("model: {num_layers: 3}\nrouter: {name: relu}\n")
    with pytest.raises(ConfigError, match="model: the folder says it"):
        import_model(folder, tmp_path / "other", ImportOptions(config=recipe, check=False))
    shipped = load_config("configs/recipes/router_surgery.yaml")
    assert shipped.training.steps == 200


def test_the_recipe_has_the_options_that_were_measured():
    header = Path("configs/recipes/router_surgery.yaml").read_text()
    options = re.findall(r"--set (\S+)", header)
    pages = Path("docs/huggingface.md").read_text().splitlines()
    measured = next(line for line in pages if line.startswith("| `relu`, `--set"))
    assert options == re.findall(r"router\.\w+=[\w.-]+", measured) and len(options) == 2
    assert load_config(None, ["router.name=relu", *options], option_classes()).router.lambda_factor == 1.03


@pytest.mark.parametrize("router", [name for name in OWN if name not in WITH_GATE])
def test_experts_that_score_themselves_have_no_gate(groups, folder, tmp_path, router):
    with pytest.raises(ConversionError, match=f"--router {router}: .* no gate to take over"):
        operated(folder, tmp_path / "run", router)


def test_cutoffs_go_on_from_where_they_are(groups):
    """The first steps of training do not throw away what was fitted."""
    options = get("quantile").Options(k=2)
    controller = get("quantile").make_controller(options, 2, 8)
    cutoffs = torch.linspace(-1, 1, 8)
    controller.start_layer(1, cutoffs)
    again = get("quantile").make_controller(options, 2, 8)
    again.load(dict(controller.state))
    torch.testing.assert_close(again.value_E(1), cutoffs, rtol=1e-3, atol=1e-3)
    share = 1 - options.decay
    moved = options.decay * again.state["average"] + share * 1.0
    assert (moved[1] - again.state["average"][1]).abs().max() <= 2 * share
