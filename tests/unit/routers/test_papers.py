"""What a paper or its released code does where ours had another default: each as an option, and in the recipe."""

from __future__ import annotations

import pytest
import torch

from dsmoe.config import load_config, validate_config
from dsmoe.model.gpt import LanguageModel
from dsmoe.routers import get
from dsmoe.routers.recorder import RoutingTotals
from dsmoe.routers.registry import option_classes

MODEL = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "num_experts": 4, "vocab_size": 64,
         "moe_ffn_hidden_size": 16, "sequence_length": 16}  # fmt: skip


def totals_of(routes: int) -> RoutingTotals:
    """Of 300 tokens and 3 experts in a layer."""
    counts = torch.tensor([[routes, 0, 0]])
    return RoutingTotals(counts, torch.tensor(300), torch.tensor([0]))


@pytest.mark.parametrize(
    ("form", "routes", "factor"),
    [("paper", 300, 1.0), ("code", 300, 1 / 1.2), ("paper", 301, 1.2), ("paper", 299, 1 / 1.2), ("code", 301, 1.2)],
)
def test_lambda_of_remoe_at_its_target_stays_in_the_paper_and_shrinks_in_the_code(form, routes, factor):
    router = get("relu")
    options = router.Options(k=1.0, form=form, lambda_initial=1.0)
    controller = router.make_controller(options, 1, 3)
    controller.after_step(totals_of(routes))
    assert controller.value.item() == pytest.approx(factor, rel=1e-6)


@pytest.mark.parametrize(("when", "moves"), [("step", 1), ("micro_batch", 3)])
def test_lambda_of_routing_free_moves_each_micro_batch_as_in_its_code(groups, when, moves):
    """Every expert is active at first, so every move is up by 1 + eta; a loss has the lambda before its move."""
    router = {"name": "routing_free", "rank": 8, "rescale": True, "lambda_initial": 1e-3, "lambda_update": when}
    config = validate_config({"model": MODEL, "router": router}, option_classes())
    router_class = get("routing_free")
    options = router_class.Options.model_validate(config.router.options)
    model = LanguageModel(config.model, (router_class, options), groups, seed=1).train()
    tokens, balance = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(0)), []
    for _ in range(3):
        loss, parts = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        balance.append(parts["balance"].item())
    model.controller.after_step(model.recorder.take())
    assert model.controller.value.item() == pytest.approx(1e-3 * 1.02**moves, rel=1e-5)
    assert balance == pytest.approx([balance[0] * 1.02 ** (n if moves == 3 else 0) for n in range(3)], rel=1e-5)
    with torch.no_grad():
        model(tokens[:, :-1], tokens[:, 1:])
    model.eval()
    model(tokens[:, :-1], tokens[:, 1:])
    assert model.controller.value.item() == pytest.approx(1e-3 * 1.02**moves, rel=1e-5)


def test_the_recipes_say_what_the_released_code_does():
    remoe = load_config("configs/recipes/relu_paper.yaml", (), option_classes())
    assert remoe.router.options["form"] == "code" and remoe.router.options["balance_scope"] == "rank"
    routing_free = load_config("configs/recipes/routing_free_paper.yaml", (), option_classes())
    assert routing_free.router.options["lambda_update"] == "micro_batch"
    rules = {rule.tensors: rule.distribution for rule in routing_free.model.initialization}
    assert rules == {"*.mlp.router.*.reduce_proj": "linear", "*.mlp.experts.*": "linear"}
