"""A job that is killed at any moment of a save, and a disk that is really full: the last good checkpoint is there,
is the one that `auto` takes, and the next save goes well."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from steps import fresh_engine, owned_tensors, run_steps, tiny_config

import dsmoe.checkpoint.files
import dsmoe.checkpoint.save
from dsmoe.checkpoint.files import Position, complete_checkpoints, find_checkpoint
from dsmoe.checkpoint.load import load_checkpoint
from dsmoe.checkpoint.save import CheckpointSaver, save_checkpoint
from dsmoe.checkpoint.verify import verify_checkpoint
from dsmoe.errors import CheckpointError


def config_of(run_dir: Path, expert_parallel: int = 1, background: bool = False, keep_last: int = 2):
    return tiny_config(
        model={"num_layers": 1},
        router={"name": "relu", "k": 1.0},
        parallel={"expert_parallel": expert_parallel},
        training={"gradient_accumulation": 1},
        checkpoint={"background": background, "keep_last": keep_last},
        logging={"run_dir": str(run_dir)},
    )


def _kill(*_args, **_kwargs) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _before(module, name: str, when=lambda *args: True) -> None:
    """Be killed instead of this call."""
    call = getattr(module, name)
    setattr(module, name, lambda *args, **kwargs: _kill() if when(*args) else call(*args, **kwargs))


def _half_a_shard() -> None:
    write = dsmoe.checkpoint.save.save_file

    def half(content, path):
        write(content, path)
        os.truncate(path, path.stat().st_size // 2)
        _kill()

    dsmoe.checkpoint.save.save_file = half


def _half_deleted() -> None:
    def half(path, **_):
        (path / "rank_00000.safetensors").unlink()
        _kill()

    shutil.rmtree = half


def _into(name: str):
    return lambda source, target: Path(target).name == name


# When the save of step 3 is killed, and the step of the newest checkpoint after that.
MOMENTS = {
    "before the first byte": (lambda: _before(dsmoe.checkpoint.save, "save_file"), 2),
    "half a shard": (_half_a_shard, 2),
    "between two files": (lambda: _before(dsmoe.checkpoint.save, "save_file", lambda _, path: "state" in path.name), 2),
    "before the checksums": (lambda: _before(dsmoe.checkpoint.files, "checksum"), 2),
    "no manifest": (lambda: _before(dsmoe.checkpoint.files, "write_atomically"), 2),
    "half a manifest": (lambda: _before(os, "replace", _into("manifest.json")), 2),
    "not renamed": (lambda: _before(os, "rename", _into("step_00000003")), 2),
    "no pointer": (lambda: _before(dsmoe.checkpoint.save, "sync_folder", lambda path: path.name == "checkpoints"), 3),
    "half a pointer": (lambda: _before(os, "replace", _into("latest")), 3),
    "the old one to be deleted": (lambda: _before(shutil, "rmtree"), 3),
    "the old one half deleted": (_half_deleted, 3),
}


def save_and_be_killed(config, moment: str) -> None:
    engine = fresh_engine(config)
    run_steps(engine, config, 0, 1)
    for step in (1, 2):  # step 1 is the one that step 3 makes superfluous
        save_checkpoint(engine, config, step, 8 * step)
        run_steps(engine, config, step, step + 1)
    saver = CheckpointSaver(engine, config)
    MOMENTS[moment][0]()
    saver.save(Position(3, 24))
    run_steps(engine, config, 3, 4)
    saver.finish()


def resume_each(configs: dict) -> dict:
    """For each run folder the step of what `auto` takes, what the verifier says of it, and the steps left by a save."""
    actual = {}
    for case, config in configs.items():
        run_dir = Path(config.logging.run_dir)
        newest = find_checkpoint("auto", run_dir)
        problems = verify_checkpoint(newest).problems
        engine = fresh_engine(config)
        step = load_checkpoint(engine, config, newest).step
        run_steps(engine, config, step, step + 1)
        save_checkpoint(engine, config, step + 1, 8 * (step + 1))
        actual[case] = step, problems, sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    return actual


def test_a_kill_at_any_moment_loses_no_checkpoint(tmp_path):
    configs = {}
    for moment in MOMENTS:
        background = moment in (
            "half a shard",
            "before the checksums",
            "not renamed",
        )  # a thread writes, or has written
        configs[moment] = config_of(tmp_path / moment.replace(" ", "_"), background=background)
        with pytest.raises(AssertionError, match="rank 0 died with exit code -9"):
            run_ranks(1, save_and_be_killed, configs[moment], moment)
    (actual,) = run_ranks(1, resume_each, configs)
    for moment, (_, newest) in MOMENTS.items():
        step, problems, left = actual[moment]
        assert (step, problems) == (newest, []), moment
        kept = [f"step_{newest:08d}", f"step_{newest + 1:08d}"]
        assert left == ["latest", *kept], moment  # nothing half-written, and no leftovers


def fill_up_and_save(config, kinds_of_room: list[int]) -> list:
    """A good save, then one for each number of bytes that the disk has left: what was said, what is there."""
    engine = fresh_engine(config)
    run_steps(engine, config, 0, 1)
    save_checkpoint(engine, config, 1, 8)
    run_dir, actual = Path(config.logging.run_dir), []
    for room in kinds_of_room:
        filler = run_dir / "filler"
        if dist.get_rank() == 0:
            free = shutil.disk_usage(run_dir).free
            filler.write_bytes(bytes(max(0, free - room)))
        dist.barrier()
        actual.append((_refused(engine, config), _left(run_dir)))
        if dist.get_rank() == 0:
            filler.unlink()
        dist.barrier()
    save_checkpoint(engine, config, 3, 24)
    actual.append(("", _left(run_dir)))
    return actual


def _refused(engine, config) -> str:
    saver = CheckpointSaver(engine, config)
    try:
        saver.save(Position(2, 16))
        run_steps(engine, config, 1, 2)  # beside training, or after a save that ought to have failed
        saver.finish()
    except CheckpointError as error:
        return str(error)
    return "was saved"


def _left(run_dir: Path) -> list[str]:
    dist.barrier()  # rank 0 clears up
    left = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    dist.barrier()
    return left


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small file system; the limit on file sizes is tested everywhere")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"this machine lets nobody mount: {mounted.stderr.decode().strip()}")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


@pytest.mark.parametrize("background", [False, True])
def test_a_really_full_disk_leaves_the_last_good_checkpoint(small_disk, background):
    config = config_of(small_disk, 2, background, keep_last=3)
    room = [0, 4096, 65536]  # for nothing; for the folder; for part of a shard
    for results in run_ranks(2, fill_up_and_save, config, room):
        *full, (_, left) = results
        for told, there in full:
            assert "step_00000002 could not be saved" in told and "No space left on device" in told
            assert "earlier checkpoints in" in told and "are untouched" in told
            assert there == ["latest", "step_00000001"]
        assert left == ["latest", "step_00000001", "step_00000003"]
    for folder in complete_checkpoints(small_disk):
        assert verify_checkpoint(folder).problems == []


def save_with_a_limit(config) -> list:
    """A good save, then one while files may not grow beyond 8 KB, then a good one."""
    engine = fresh_engine(config)
    run_steps(engine, config, 0, 1)
    save_checkpoint(engine, config, 1, 8)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    told = _refused(engine, config)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    left = _left(Path(config.logging.run_dir))
    save_checkpoint(engine, config, 3, 24)
    return [told, left]


@pytest.mark.parametrize("background", [False, True])
def test_a_shard_that_may_not_grow_leaves_the_last_good_checkpoint(tmp_path, background):
    config = config_of(tmp_path, 2, background)
    for told, left in run_ranks(2, save_with_a_limit, config):
        assert "rank 0" in told and "rank 1" in told and "File too large" in told
        assert left == ["latest", "step_00000001"]
    actual = [verify_checkpoint(folder).problems for folder in complete_checkpoints(tmp_path)]
    assert actual == [[], []]


def save_beside_training(config) -> dict:
    """Saves that are under way while the model changes: what they hold, and when they become checkpoints."""
    engine = fresh_engine(config)
    run_steps(engine, config, 0, 1)
    saver = CheckpointSaver(engine, config)
    run_dir = Path(config.logging.run_dir)
    then = {name: value.clone() for name, value in owned_tensors(engine).items()}
    write = dsmoe.checkpoint.save.save_file
    go_on = dsmoe.checkpoint.save.threading.Event()

    def waits(content, path):
        go_on.wait(60)
        write(content, path)

    dsmoe.checkpoint.save.save_file = waits
    saver.save(Position(1, 8))
    run_steps(engine, config, 1, 2)
    under_way = not saver.done, complete_checkpoints(run_dir), saver.step
    go_on.set()
    saver.save(Position(2, 16))  # finishes the first one
    first = [path.name for path in complete_checkpoints(run_dir)], saver.step
    saver.finish()
    second = [path.name for path in complete_checkpoints(run_dir)], saver.step
    dist.barrier()
    load_checkpoint(engine, config, run_dir / "checkpoints" / "step_00000001")
    loaded = owned_tensors(engine)
    same = loaded.keys() == then.keys() and all(torch.equal(loaded[name], then[name]) for name in then)
    return {"under way": under_way, "first": first, "second": second, "same": same, "done": saver.done}


@pytest.mark.parametrize("stage", [1, 3])
def test_a_save_beside_training_holds_the_step_it_was_begun_at(tmp_path, stage):
    config = config_of(tmp_path, 2, background=True)
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"zero_stage": stage})})
    for actual in run_ranks(2, save_beside_training, config):
        assert actual["under way"] == (True, [], None)
        assert actual["first"] == (["step_00000001"], 1)
        assert actual["second"] == (["step_00000001", "step_00000002"], 2)
        assert actual["same"]
        assert not actual["done"]
