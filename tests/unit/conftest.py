"""Process groups of one process, for what needs torch.distributed to exist but no other rank."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def groups():
    """`ParallelGroups` of this process alone. The environment is left as it was: other tests start programs."""
    from dsmoe.parallel.groups import create_groups, start_processes

    before = dict(os.environ)
    start_processes()
    os.environ.clear()
    os.environ.update(before)
    gc.freeze()  # DeepSpeed collects garbage often, and what was imported is none
    return create_groups(expert_parallel=1)


@pytest.fixture(params=[1, 3])
def threads(request):
    """Torch's number of threads in the test."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def plugin_router(monkeypatch):
    """The router class of tests/plugin_router, found as if its package were installed."""
    from importlib.metadata import EntryPoint

    from dsmoe.routers import available, get
    from dsmoe.routers.registry import routers

    monkeypatch.setattr(routers, "_classes", dict(available()))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "plugin_router"))
    point = EntryPoint("sigmoid_threshold", "sigmoid_threshold:SigmoidThresholdRouter", routers.group)
    monkeypatch.setattr(routers, "installed", lambda: [point])
    return get("sigmoid_threshold")
