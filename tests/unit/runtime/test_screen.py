"""What commands write on a terminal that wants no escape sequences: the same lines, and none of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from forked import call
from made_up_run import made_up_dataset, made_up_run
from terminal import Terminal, take_terminal

from dsmoe.cli import main
from dsmoe.hf.shards import track
from dsmoe.lab.study.display import Display, Row
from dsmoe.runtime.screen import make_console


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A run, its dataset, and the texts that the dataset is made of."""
    folder = tmp_path_factory.mktemp("screen")
    made_up_run(folder / "run", made_up_dataset(folder), "relu")
    return folder


def speak(terminal: str, environment: dict[str, str], place: Path) -> None:
    take_terminal(terminal, environment)
    options = ["--output", str(place / "data"), "--vocab-size", "300", "--workers", "1", "--overwrite"]
    assert main(["prepare-data", str(place / "texts"), *options]) == 0
    assert main(["verify", str(place / "run")]) == 0
    with Display(make_console(), "study", 2) as display:
        display.show(1, [Row("relu", 3, 10, 2.5, 1000.0, 60.0)], 90.0)
    assert list(track(range(3), 3, "tensors")) == [0, 1, 2]


@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=str)
def test_lines_alone_where_nothing_else_is_wanted(place, environment):
    terminal = Terminal(100)
    try:
        call(speak, terminal.path, environment, place)
        text = terminal.text
    finally:
        terminal.close()
    assert ("\x1b" in text) == (not environment)
    for said in ("vocabulary of 300", "bytes per token", "Train on it:", "step_00000000", "study 1/2", "3/10"):
        assert said in text
    assert not re.search("warning", text, re.IGNORECASE)
