"""The recipes load, are valid for their routers, share what a comparison needs shared, and cost what they say."""

from pathlib import Path

import pytest

from dsmoe.config import load_config
from dsmoe.model.size import model_size
from dsmoe.routers import get
from dsmoe.routers.registry import option_classes

FOLDER = Path(__file__).parents[4] / "configs" / "recipes"
OTHERS = ("router_surgery",)  # of a model that was trained elsewhere
SMALL = sorted(
    path.stem for path in FOLDER.glob("*.yaml") if not path.stem.endswith("_paper") and path.stem not in OTHERS
)
PAPER = sorted(path.stem for path in FOLDER.glob("*_paper.yaml"))


def load(name: str, *overrides: str):
    return load_config(FOLDER / f"{name}.yaml", overrides, option_classes())


def test_every_router_of_ours_has_a_recipe():
    assert set(SMALL) == {
        "topk", "topk_bias", "relu", "top_p", "dtop_p", "routing_free", "aoe", "expert_threshold",
        "quantile",
    }  # fmt: skip
    assert set(PAPER) == {"relu_paper", "top_p_paper", "routing_free_paper"}


@pytest.mark.parametrize("name", SMALL)
def test_small_recipes_differ_in_router_expert_width_and_learning_rate_only(name):
    base = load("topk")
    actual = load(name, f"training.lr={base.training.lr}")
    assert actual.router.name == name
    assert actual.model.model_copy(update={"moe_ffn_hidden_size": 128}) == base.model
    assert actual.data == base.data and actual.training == base.training and actual.parallel == base.parallel
    assert actual.logging.run_dir == f"runs/recipes/{name}"


@pytest.mark.parametrize("name", SMALL)
def test_small_recipes_cost_the_same_for_each_token(name):
    config = load(name)
    size, router = model_size(load(name, "model.vocab_size=2048")), get(config.router.name)
    options = router.Options.model_validate(config.router.options)
    layer = router.parameter_count(config.model, options) + options.target_experts_per_token(config.model) * size.expert
    assert layer == pytest.approx(99_328, rel=0.005)


UNUSED_GATES = 12 * 12 * 512 * 128  # of Routing-Free's released code, which its 95.32M include


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("relu_paper", 777e6), ("top_p_paper", 3.5e9), ("routing_free_paper", 95.32e6 - UNUSED_GATES)],
)
def test_paper_recipes_have_the_published_size(name, parameters):
    assert model_size(load(name)).total == pytest.approx(parameters, rel=0.015)
