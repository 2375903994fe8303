"""docs/routers.md: the example is a whole router that works, and the table lists the options there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from harness import HIDDEN, Routers, problems_of

from dsmoe.routers import available, registry

TEXT = (Path(__file__).resolve().parents[3] / "docs" / "routers.md").read_text()
EXAMPLE = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL).group(1)
ROWS = re.findall(r"^\| \[`(\w+)`\]\(\.\./(\S+)\) \|.*\| (.*) \|$", TEXT, re.MULTILINE)


@pytest.fixture
def sigmoid():
    names = {"__name__": "sigmoid_of_the_documentation"}
    try:
        exec(compile(EXAMPLE, "docs/routers.md", "exec"), names)
        yield names["SigmoidRouter"]
    finally:
        registry.routers._classes.pop("sigmoid", None)


def test_the_example_is_a_router_in_under_40_lines(sigmoid):
    assert len(EXAMPLE.splitlines()) < 40
    assert available()["sigmoid"] is sigmoid
    assert problems_of("sigmoid", {"k": 2.0}, 4) == []
    assert problems_of("sigmoid", {"k": 9.0}, 4) == ["router.k: found 9.0, expected at most model.num_experts (4)"]
    routers = Routers("sigmoid", {"threshold": 0.6}, 4)
    routers.draw_weights(0)
    hidden = [torch.randn(5, 2, HIDDEN, requires_grad=True) for _ in range(2)]
    decided, losses = routers.pass_through(hidden)
    assert 0 < sum(int(routes.sum()) for _, routes in decided) < 2 * 10 * 4
    losses["balance"].backward()
    assert all(x.grad.any() for x in hidden)


@pytest.mark.parametrize(("name", "file", "options"), ROWS)
def test_the_table_lists_every_option(name, file, options):
    router = available()[name]
    assert router.__module__ == file.removesuffix(".py").replace("/", ".")
    assert set(re.findall(r"`(\w+)`", options)) == set(router.Options.model_fields)


def test_the_table_has_rows():
    assert {name for name, *_ in ROWS} >= {"topk", "topk_bias", "relu", "top_p", "dtop_p", "expert_threshold"}
