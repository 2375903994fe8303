"""A run saved at any layout goes on at any other: every pair of ranks x expert parallel x ZeRO stage on 4 experts.

Each layout saves once, and each loads what all of them saved, one process start for each number of ranks. The run goes
on with the losses of one that never stopped: sums run in another order, so within 1e-5 of losses around 4.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from counting_router import NAME as COUNTING
from ranks import once, run_ranks
from steps import as_numbers, fresh_engine, owned_tensors, run_steps, tiny_config

from dsmoe.checkpoint.load import CheckpointReader, load_checkpoint
from dsmoe.checkpoint.save import save_checkpoint
from dsmoe.checkpoint.verify import verify_checkpoint
from dsmoe.optim.deepspeed import flat_master_weights, inner_optimizer

Layout = tuple[int, int, int]  # ranks, expert parallel, ZeRO stage

LAYOUTS = [
    (ranks, parallel, stage)
    for ranks, parallels in ((1, (1,)), (2, (1, 2)), (4, (1, 2, 4)))
    for parallel in parallels
    for stage in (1, 2, 3)
]
# Every pair is held to the state it loads, bit for bit, and to its first loss. These, each layout once as source and
# once as target, are held to a second loss, which the loaded moments have had a hand in.
LONGER = dict(zip(LAYOUTS, [*LAYOUTS[7:], *LAYOUTS[:7]], strict=True))
ROUTERS = {"relu": {"name": "relu", "k": 1.0, "lambda_initial": 1e-2}, COUNTING: {"name": COUNTING}}


def config_of(run_dir: Path, layout: Layout, router: str = "relu"):
    return tiny_config(
        model={"num_layers": 1},
        router=ROUTERS[router],
        parallel={"expert_parallel": layout[1], "zero_stage": layout[2]},
        training={"gradient_accumulation": 1},
        logging={"run_dir": str(run_dir)},
    )


def save_each(configs: dict) -> dict:
    """For each layout two steps, a save, two more: what became of the run that was never stopped."""
    actual = {}
    for layout, config in configs.items():
        engine = fresh_engine(config)
        run_steps(engine, config, 0, 2)
        save_checkpoint(engine, config, 2, 2 * config.training.global_batch_size)
        actual[layout] = run_steps(engine, config, 2, 4)
    return actual


def load_each(configs: dict, folders: dict) -> dict:
    """For each layout one engine, which resumes from every folder: what it loaded wrong, and two steps."""
    actual = {}
    for layout, config in configs.items():
        engine = fresh_engine(config)
        for source, folder in folders.items():
            manifest = load_checkpoint(engine, config, folder)
            # After the first run of this engine, what it still held of the one before would show here.
            wrong = differing(CheckpointReader(folder), owned_tensors(engine)) + adam_steps(engine, manifest.step)
            last = 4 if LONGER[source] == layout or len(folders) == 1 else 3
            actual[source, layout] = (manifest.step, manifest.samples), wrong, run_steps(engine, config, 2, last)
    return actual


def differing(reader: CheckpointReader, owned: dict[str, torch.Tensor]) -> list[str]:
    """Which of this rank's weights and moments are not what the checkpoint holds, bit for bit."""
    wrong = []
    for key, value in owned.items():
        kind, name, start = key.rsplit("|", 2)
        saved = reader.read(kind, name, int(start), int(start) + value.numel())
        if not torch.equal(saved, value):
            wrong.append(key)
    kinds = {key.partition("|")[0] for key in owned}
    return wrong if kinds == {"weight", "exp_avg", "exp_avg_sq"} else [f"rank {dist.get_rank()} has {kinds}"]


def adam_steps(engine, expected: int) -> list[str]:
    """Where Adam's own count of steps, which its bias correction needs, is another."""
    states = [inner_optimizer(engine).state[flat] for flat in flat_master_weights(engine)]
    return [f"Adam counts {state['step']} steps" for state in states if state["step"] != expected]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


def run_of(folder: Path, layout: Layout, router: str = "relu") -> Path:
    return folder / router / "-".join(map(str, layout))


def checkpoint_of(folder: Path, layout: Layout, router: str = "relu") -> Path:
    return run_of(folder, layout, router) / "checkpoints" / "step_00000002"


@once
def saved(folder: Path) -> dict:
    """Layout -> the two steps after its save."""
    actual = {}
    for ranks in (1, 2, 4):
        configs = {layout: config_of(run_of(folder, layout), layout) for layout in LAYOUTS if layout[0] == ranks}
        actual |= run_ranks(ranks, save_each, configs)[0]
    return actual


@once
def loaded(folder: Path, ranks: int) -> list[dict]:
    saved(folder)
    folders = {layout: checkpoint_of(folder, layout) for layout in LAYOUTS}
    configs = {layout: config_of(folder / "unused", layout) for layout in LAYOUTS if layout[0] == ranks}
    return run_ranks(ranks, load_each, configs, folders, deadline=300)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_verifier_passes_what_every_layout_saves(folder, layout):
    saved(folder)
    actual = verify_checkpoint(checkpoint_of(folder, layout))
    assert actual.problems == []
    assert actual.states == ("exp_avg", "exp_avg_sq")
    assert set(actual.experts.values()) == {4}
    assert actual.state == {"lambda": ()}


@pytest.mark.parametrize("target", LAYOUTS, ids=str)
def test_a_layout_goes_on_from_every_other(folder, target):
    """The first of a number of ranks loads and trains on from every source: 20 to 30 s on four ranks and two cores."""
    for results in loaded(folder, target[0]):  # of every rank
        for source in LAYOUTS:
            place, wrong, _ = results[source, target]
            assert place == (2, 16), source
            assert wrong == [], source
    results = loaded(folder, target[0])[0]
    for source in LAYOUTS:
        steps = results[source, target][2]
        assert len(steps) == (2 if LONGER[source] == target else 1)
        for before, after in zip(saved(folder)[source], steps, strict=False):
            for quantity in ("loss", "router_loss", "grad_norm", "density"):
                assert after[quantity] == pytest.approx(before[quantity], abs=1e-5), (source, quantity)
            assert as_numbers([after["state"]]) == as_numbers([before["state"]]), source


def test_a_plugins_controller_goes_along(folder):
    """State of several tensors and dtypes, of a router that neither checkpoints nor verifier have heard of."""
    source, target = (2, 2, 1), (1, 1, 3)
    run_ranks(2, save_each, {source: config_of(run_of(folder, source, COUNTING), source, COUNTING)})
    where = checkpoint_of(folder, source, COUNTING)
    assert verify_checkpoint(where).problems == []
    assert verify_checkpoint(where).state == {"routes": (1, 4), "steps": (), "scale": (2,)}
    config = config_of(folder / "unused", target, COUNTING)
    (results,) = run_ranks(1, load_each, {target: config}, {source: where})
    _, wrong, steps = results[source, target]
    assert wrong == []
    state = steps[-1]["state"]
    # Two steps before the save and two after: 8 sequences of 16 tokens, each with one expert.
    assert (state["steps"].dtype, state["steps"].item()) == (torch.int64, 4)
    assert state["routes"].sum(1).tolist() == [4 * 8 * 16]
    assert state["scale"].dtype == torch.float64
