"""Checkpoints: going on is as never having stopped, on any layout; damage is refused; a failed save harms nothing.

On the same layout everything must be equal bit for bit. On another one sums run in another order, so losses agree to
fp32 rounding only (1e-5 of losses around 4); test_elastic.py has every pair of layouts.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import once, run_ranks
from steps import as_numbers, fresh_engine, owned_tensors, run_steps, tiny_config

import dsmoe.checkpoint.save
from dsmoe.checkpoint.files import complete_checkpoints, find_checkpoint, read_manifest
from dsmoe.checkpoint.load import load_checkpoint
from dsmoe.checkpoint.save import save_checkpoint
from dsmoe.errors import CheckpointError

RELU = {"name": "relu", "k": 1.0, "lambda_initial": 1e-2}


def config_of(run_dir: Path, expert_parallel: int, stage: int, precision: str = "fp32", **sections):
    return tiny_config(
        router=sections.pop("router", RELU),
        parallel={"expert_parallel": expert_parallel, "zero_stage": stage},
        training={"precision": precision},
        logging={"run_dir": str(run_dir)},
        **sections,
    )


def save_on_the_way(cases: dict) -> dict:
    """For each case two steps, a save, two more: what the run became that was never stopped."""
    actual = {}
    for name, config in cases.items():
        torch.manual_seed(100 + dist.get_rank())  # a random state of each rank's own
        engine = fresh_engine(config)
        history = run_steps(engine, config, 0, 2)
        torch.rand(3)
        save_checkpoint(engine, config, 2, 2 * config.training.global_batch_size)
        actual[name] = history + run_steps(engine, config, 2, 4), owned_tensors(engine), torch.rand(3)
    return actual


def load_and_go_on(cases: dict) -> dict:
    """For each (config, folder) a fresh model, the checkpoint, two steps."""
    actual = {}
    for name, (config, folder) in cases.items():
        engine = fresh_engine(config)
        manifest = load_checkpoint(engine, config, Path(folder))
        assert (manifest.step, manifest.samples) == (2, 2 * config.training.global_batch_size)
        actual[name] = run_steps(engine, config, 2, 4), owned_tensors(engine), torch.rand(3)
    return actual


def checkpoint_of(config) -> str:
    return f"{config.logging.run_dir}/checkpoints/step_00000002"


# Same layout: (precision, ZeRO stage), on 2 ranks with the experts spread over them.
SAME = [(precision, stage) for precision in ("fp32", "bf16") for stage in (1, 2, 3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@once
def never_stopped(folder: Path) -> list[dict]:
    return run_ranks(2, save_on_the_way, {case: config_of(_run(folder, *case), 2, case[1], case[0]) for case in SAME})


@once
def resumed(folder: Path) -> list[dict]:
    never_stopped(folder)
    configs = {case: config_of(_run(folder, *case), 2, case[1], case[0]) for case in SAME}
    return run_ranks(2, load_and_go_on, {case: (config, checkpoint_of(config)) for case, config in configs.items()})


def _run(folder: Path, *case) -> Path:
    return folder / "-".join(map(str, case))


@pytest.mark.parametrize(("precision", "stage"), SAME)
def test_going_on_is_never_having_stopped_bit_for_bit(folder, precision, stage):
    for uninterrupted, again in zip(never_stopped(folder), resumed(folder), strict=True):
        expected_history, expected, expected_random = uninterrupted[precision, stage]
        history, actual, random = again[precision, stage]
        assert as_numbers(history) == as_numbers(expected_history[2:])  # losses, norms, counts, lambda
        assert actual.keys() == expected.keys()
        assert [name for name, value in expected.items() if not torch.equal(value, actual[name])] == []
        assert {name.split("|")[0] for name in actual} == {"weight", "exp_avg", "exp_avg_sq"}
        assert torch.equal(random, expected_random)


SHARDED = {"name": "aoe", "k": 2, "rank": 8, "placement": "sharded"}


def test_a_router_that_is_spread_over_ranks_goes_on_at_another_ep_size(folder):
    saved, other = (config_of(_run(folder, "sharded"), *layout, router=SHARDED) for layout in ((2, 3), (1, 1)))
    expected, _, _ = run_ranks(2, save_on_the_way, {"sharded": saved})[0]["sharded"]
    for world, config in ((2, saved), (1, other)):
        cases = {"sharded": (config, checkpoint_of(saved))}
        history, _, _ = run_ranks(world, load_and_go_on, cases)[0]["sharded"]
        assert [step["loss"] for step in history] == pytest.approx([step["loss"] for step in expected[2:]], abs=1e-5)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _swap(folder: Path) -> None:
    first, second = folder / "rank_00000.safetensors", folder / "rank_00001.safetensors"
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def _edit(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))


def _forge(folder: Path, file: str) -> None:
    """A manifest that is right in itself, but does not list one file."""
    manifest = read_manifest(folder)
    del manifest.files[file]
    manifest.write(folder)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES = {  # what happened to the folder, and what the error must name
    "a flipped bit": (lambda f: _flip(f / "rank_00001.safetensors"), "rank_00001.safetensors"),
    "a flipped bit of the controller": (lambda f: _flip(f / "state.safetensors"), "state.safetensors"),
    "a missing rank file": (lambda f: (f / "rank_00001.safetensors").unlink(), "rank_00001.safetensors is missing"),
    "a truncated file": (lambda f: _cut(f / "rank_00000.safetensors"), "rank_00000.safetensors"),
    "swapped files": (_swap, "rank_00000.safetensors"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
    "a truncated manifest": (lambda f: _cut(f / "manifest.json"), "manifest.json"),
    "a manifest of another step": (lambda f: _edit(f / "manifest.json", '"step": 2', '"step": 3'), "manifest.json"),
    "a manifest without a field": (lambda f: _edit(f / "manifest.json", '"samples"', '"simples"'), "manifest.json"),
    "a manifest of tomorrow": (lambda f: _edit(f / "manifest.json", '"format": 1', '"format": 99'), "format 99"),
    "a manifest without a rank": (lambda f: _forge(f, "rank_00001.safetensors"), "lacks elements"),
    "a manifest without the controller": (lambda f: _forge(f, "state.safetensors"), "lambda"),
}  # fmt: skip
OTHER_MODELS = {
    "another hidden size": ({"model": {"hidden_size": 64}}, "of a different shape"),
    "more layers": ({"model": {"num_layers": 3}}, "missing"),
    "fewer layers": ({"model": {"num_layers": 1}}, "not in this model"),
    "more experts": ({"model": {"num_experts": 8}}, "experts.4.gate_up_proj"),
    "fewer experts": ({"model": {"num_experts": 2}}, "experts.2.gate_up_proj"),
    "wider experts": ({"model": {"moe_ffn_hidden_size": 24}}, "of a different shape"),
    "an untied output layer": ({"model": {"tie_embeddings": False}}, "output_layer.weight"),
    "another router": ({"router": {"name": "topk", "k": 1}}, "router is 'relu'"),
}


def refusals(folder: Path, damaged: dict[str, Path]) -> dict[str, str]:
    """What this rank is told, for each damaged folder and each other model."""
    config = config_of(folder, 2, 2)
    engine = fresh_engine(config)
    told = {name: _refusal(engine, config, path) for name, path in damaged.items()}
    for name, (sections, _) in OTHER_MODELS.items():
        other = config_of(folder, 2, 2, **sections)
        told[name] = _refusal(fresh_engine(other), other, Path(checkpoint_of(config)))
    load_checkpoint(engine, config, Path(checkpoint_of(config)))  # the one that is whole is still welcome
    run_steps(engine, config, 2, 3)
    return told


def _refusal(engine, config, path: Path) -> str:
    try:
        load_checkpoint(engine, config, path)
    except CheckpointError as error:
        return str(error)
    return "was loaded"


@once
def all_refusals(folder: Path) -> list[dict[str, str]]:
    run = folder / "refused"
    config = config_of(run, 2, 2)
    run_ranks(2, save_on_the_way, {"refused": config})
    damaged = {}
    for name, (damage, _) in DAMAGES.items():
        damaged[name] = run / name / "step_00000002"
        shutil.copytree(checkpoint_of(config), damaged[name])
        damage(damaged[name])
    return run_ranks(2, refusals, run, damaged, deadline=60)


@pytest.mark.parametrize("case", [*DAMAGES, *OTHER_MODELS])
def test_a_damaged_or_foreign_checkpoint_is_refused_on_every_rank(folder, case):
    _, named = (DAMAGES | OTHER_MODELS)[case]
    for told in all_refusals(folder):
        assert named in told[case]


def fail_on_rank_1(config) -> tuple[list, str]:
    """Two good saves, then one for which rank 1 finds the disk full."""
    engine = fresh_engine(config)
    for step in (1, 2):
        run_steps(engine, config, step - 1, step)
        save_checkpoint(engine, config, step, step)
    write = dsmoe.checkpoint.save.save_file

    def no_space(content, path):
        if dist.get_rank() == 1:
            Path(path).write_bytes(b"half a file")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(content, path)

    dsmoe.checkpoint.save.save_file = no_space
    try:
        save_checkpoint(engine, config, 3, 3)
        return [], "was saved"
    except CheckpointError as error:
        told = str(error)
    finally:
        dsmoe.checkpoint.save.save_file = write
    dist.barrier()  # rank 0 clears up
    left = sorted(path.name for path in Path(config.logging.run_dir, "checkpoints").iterdir())
    run_steps(engine, config, 2, 3)  # training can go on
    return left, told


def test_a_full_disk_on_one_rank_stops_all_and_harms_nothing(tmp_path):
    config = config_of(tmp_path, 2, 1)
    for left, told in run_ranks(2, fail_on_rank_1, config):
        assert left == ["latest", "step_00000001", "step_00000002"]
        assert "rank 1" in told and "No space left" in told and "step_00000003" in told
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000002"


def save_until_killed(config) -> None:
    engine = fresh_engine(config)
    run_steps(engine, config, 0, 2)
    save_checkpoint(engine, config, 2, 16)
    run_steps(engine, config, 2, 3)
    write = dsmoe.checkpoint.save.save_file

    def killed(content, path):
        if dist.get_rank() == 1:
            write(content, path)
            os.kill(os.getpid(), signal.SIGKILL)
        write(content, path)

    dsmoe.checkpoint.save.save_file = killed
    save_checkpoint(engine, config, 3, 24)


def resume_after_the_kill(config) -> str:
    actual = find_checkpoint("auto", Path(config.logging.run_dir))
    engine = fresh_engine(config)
    load_checkpoint(engine, config, actual)
    run_steps(engine, config, 2, 4)
    save_checkpoint(engine, config, 4, 32)
    return actual.name


def test_a_save_that_was_killed_is_passed_over_and_cleared_away(tmp_path):
    config = config_of(tmp_path, 2, 2)
    with pytest.raises(AssertionError, match="rank 1 died with exit code -9|rank 0 failed"):  # who is noticed first
        run_ranks(2, save_until_killed, config)
    assert (tmp_path / "checkpoints" / "step_00000003.partial").is_dir(), "the kill came too early to test anything"
    assert run_ranks(2, resume_after_the_kill, config) == ["step_00000002"] * 2
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["latest", "step_00000002", "step_00000004"]


def save_steps(config, steps: list[int]) -> list[list[str]]:
    """Which checkpoints there are after each save."""
    engine = fresh_engine(config)
    left = []
    for step in steps:
        save_checkpoint(engine, config, step, step)
        there = complete_checkpoints(Path(config.logging.run_dir))
        left.append([path.name.removeprefix("step_0000000") for path in there])
    return left


def test_old_checkpoints_go_except_every_third(tmp_path):
    config = config_of(tmp_path, 1, 1, checkpoint={"keep_last": 2, "keep_every": 3})
    ((*_, last),) = run_ranks(1, save_steps, config, [1, 2, 3, 4, 5, 6, 7, 8])
    assert last == ["3", "6", "7", "8"]


def test_a_checkpoint_outlives_newer_ones_of_a_run_that_was_begun_anew(tmp_path):
    """`training.resume: never`, or an older checkpoint, in a run folder that has been further already."""
    config = config_of(tmp_path, 1, 1, checkpoint={"keep_last": 1})
    ((_, again, later),) = run_ranks(1, save_steps, config, [7, 1, 2])
    assert (again, later) == (["1", "7"], ["2", "7"])
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000002"
    assert find_checkpoint("auto", tmp_path).name == "step_00000002"
