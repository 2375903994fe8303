"""A stranger's process at the price of a fork."""

from __future__ import annotations

import pytest
from commands import forked

from dsmoe.hf import parity

NEW = parity.run_observer


@pytest.fixture(scope="session", autouse=True)
def forked_observers():
    """Let the gate of conversions run transformers in forked processes, in which dsmoe cannot be imported either. That
    new interpreters do the same, which cost 4 s of CPU each, is tested with one of them and in tests/end_to_end."""

    def run_observer(arguments: list[str], environment: dict[str, str]) -> tuple[int, str]:
        done = forked(str(parity.OBSERVE), *arguments, environment=environment, without="dsmoe")
        return done.code, done.output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "run_observer", run_observer)
        yield


@pytest.fixture
def new_observers(monkeypatch):
    """New interpreters, as users have them."""
    monkeypatch.setattr(parity, "run_observer", NEW)
