"""The coloured text in a terminal, and what stands for colours where there are none."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from dsmoe.lab.inspect.report import InspectOptions, inspect
from dsmoe.lab.inspect.terminal import RAMP, hardness_sentence, show

TEXT = "The token 12 goes\nto expert 3."


@pytest.fixture(scope="module")
def report(run_of):
    return inspect(run_of("relu", k=2), InspectOptions(texts=(TEXT,)))


def shown(report, monkeypatch, terminal=True, **environment) -> str:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    file = io.StringIO()
    file.isatty = lambda: terminal  # type: ignore[method-assign]
    show(report, Console(file=file, highlight=False, soft_wrap=True))
    return file.getvalue()


def test_a_terminal_gets_colours_by_experts(report, monkeypatch):
    """Every token has the colour of its mean number of experts, of eight steps from the least to the most."""
    output = shown(report, monkeypatch, TERM="xterm-256color", COLORTERM="truecolor")
    columns = report["models"][0]["per_token"]
    means = [sum(layer) / 2 for layer in zip(*columns["experts"])]
    low, high = min(means), max(means)
    assert high > low
    for token, value in zip(columns["token"], means):
        if not token.strip() or "\n" in token:
            continue
        wanted = RAMP[min(7, int((value - low) / (high - low) * 8))]
        r, g, b = (int(wanted[at : at + 2], 16) for at in (1, 3, 5))
        assert f"48;2;{r};{g};{b}m{token}\x1b[0m" in output
    assert "{" not in re.sub(r"\x1b\[[0-9;]*m", "", output)


@pytest.mark.parametrize("case", ["no colour", "dumb", "pipe"])
def test_no_colours_where_they_are_not_wanted(report, monkeypatch, case):
    environment = {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
    environment |= {"no colour": {"NO_COLOR": "1"}, "dumb": {"TERM": "dumb"}}.get(case, {})
    output = shown(report, monkeypatch, terminal=case != "pipe", **environment)
    assert not re.search(r"\x1b\[[0-9;]*[34]8;", output)
    columns = report["models"][0]["per_token"]
    marked = "".join(
        f"{token.rstrip(chr(10))}{{{sum(experts) / 2:.1f}}}{token[len(token.rstrip(chr(10))) :]}"
        for token, experts in zip(columns["token"], zip(*columns["experts"]))
    )
    assert marked in output


def test_a_fixed_k_is_coloured_by_effective_experts(run_of, monkeypatch):
    output = shown(inspect(run_of("topk", k=2), InspectOptions(texts=(TEXT,))), monkeypatch, terminal=False)
    assert "token{effective experts, mean over layers}" in output
    assert "every token has 2 experts, so their number cannot follow the loss" in output


@pytest.mark.parametrize(
    "interval, words",
    [((0.1, 0.3), "harder tokens take more"), ((-0.3, -0.1), "take FEWER"), ((-0.1, 0.3), "no sign that")],
)
def test_words_follow_the_interval(interval, words):
    actual = {"rho": sum(interval) / 2, "low": interval[0], "high": interval[1], "tokens": 99}
    within = {"rho": None, "low": None, "high": None, "tokens": 99}
    said = hardness_sentence({"k": None, "hardness": {"next": {"experts": actual, "within_kind": within}}})
    assert words in said and f"{interval[0]:+.2f} to {interval[1]:+.2f}" in said and said.endswith("tokens unknown")
