"""Every command sets its device before it asks for one, under every launcher, where DeepSpeed's accelerator answers as
CUDA's does: device 0 until one is set. Nothing of it runs on another rank's device.

The launchers are real and start `launched.py`; what they give their processes, and what MPI tells these, is given to
processes that have the libraries loaded, which run the commands. 60 s: three launchers, 5 commands on 7 processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import commands
import deepspeed.comm
import pretended
import pretended_model as pm
import pytest
import torch
import yaml
from commands import beside_python, free_port, python, torchrun
from deepspeed.accelerator import get_accelerator, real_accelerator
from forked import call, call_each
from ranks import once

pytestmark = pretended.needs_cpu_torch
LAUNCHED = str(Path(__file__).with_name("launched.py"))
LAUNCHERS = ("alone", "deepspeed", "torchrun", "mpirun")
HIDDEN = 32


def launch(launcher: str, folder: Path) -> tuple[list[dict], subprocess.Popen | None]:
    """What two processes of a launcher are given, and the launcher, which waits for them. Alone: one, without any."""
    folder.mkdir()
    if launcher == "alone":
        return [{"environment": dict(os.environ), "words": []}], None
    command = {
        "deepspeed": lambda: commands.deepspeed(2, LAUNCHED),
        "torchrun": lambda: torchrun(2, LAUNCHED),
        "mpirun": lambda: [
            beside_python("mpirun"), "--allow-run-as-root", "--oversubscribe", "-n", "2", *python(LAUNCHED),
        ],
    }[launcher]()  # fmt: skip
    process = subprocess.Popen(
        command, env=os.environ | {"RECORD": str(folder)}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    until = time.monotonic() + 400
    while len(list(folder.glob("*.json"))) < 2:
        assert process.poll() is None and time.monotonic() < until, f"{launcher} starts nothing"
        time.sleep(0.1)
    given = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return sorted(given, key=lambda each: local_rank(each["environment"])), process


def local_rank(environment: dict[str, str]) -> int:
    return int(environment.get("LOCAL_RANK") or environment.get("OMPI_COMM_WORLD_LOCAL_RANK") or 0)


@contextlib.contextmanager
def launched(launcher: str, folder: Path) -> Iterator[list[dict]]:
    given, process = launch(launcher, folder)
    try:
        yield given
    finally:
        (folder / "done").touch()
        if process is not None:
            process.wait(400)


def enter(given: dict, port: str, command: str, place: Path, world: int) -> dict:
    """Run a command in this process as if a launcher had started it with that."""
    os.environ.clear()
    # A port of its own: torchrun's agent keeps what an earlier command has stored.
    os.environ.update(given["environment"], MASTER_PORT=port, TORCHELASTIC_USE_AGENT_STORE="False")
    if "mpi" in given:
        known = {**given["mpi"], "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        deepspeed.comm.mpi_discovery = lambda distributed_port, verbose: os.environ.update(known)
    pretended.start()
    COMMANDS[command](place, given["words"], world)
    return {
        "asked too early": get_accelerator().asked_too_early, "device": get_accelerator().current_device(),
        "worked on": pretended.devices(), "local rank": local_rank(given["environment"]),
    }  # fmt: skip


def dsmoe(*words: str) -> None:
    from dsmoe.cli import main

    assert main(list(words)) == 0


def train(place: Path, words: list[str], world: int, run: str = "entered") -> None:
    """A ReLU router's lambda lies on the device that was current when the engine was built."""
    dsmoe("train", *words, "--config", str(place / "tiny.yaml"), f"logging.run_dir={place / f'{run} {world}'}",
          f"parallel.expert_parallel={world}")  # fmt: skip


def evaluate(place: Path, words: list[str], world: int) -> None:
    dsmoe("evaluate", *words, str(place / "trained 1"), "--sequences", "2", "--batch-size", "1")


def generate(place: Path, words: list[str], world: int) -> None:
    dsmoe("generate", *words, str(place / "trained 1"), "--tokens", "2")


def benchmark(place: Path, words: list[str], world: int) -> None:
    """The command, and its worker, which is a process of its own: asked here, after the device is unset again."""
    from dsmoe.lab.benchmark import jobs, limit, worker

    limit.COPY_BYTES, limit.RATE_FLOPS = 1 << 16, 1e6  # no rate is looked at

    def rows_of(job: worker.Job, huge_pages: bool, deadline: float) -> list[dict]:
        get_accelerator().set_device(0)
        get_accelerator().device_was_set = False
        description = place / f"job {os.getpid()}.json"
        jobs.replace(job, result=str(place / "rows.json")).save(description)
        worker.sys.argv = ["worker", str(description)]
        worker.main()
        return [{"name": "none", "kind": "limit", "load": "balanced", "error": "is not looked at"}]

    jobs._rows_of = rows_of
    sizes = ["--tokens", "32", "--hidden", str(HIDDEN), "--ffn", str(HIDDEN), "--experts", "4", "--k", "1"]
    dsmoe("benchmark", *sizes, "--ranks", str(world), "--dtype", "fp32", "--quick", "--rounds", "1", "--only", "topk")


def calibrate(place: Path, words: list[str], world: int) -> None:
    """Its own products and copies; the runs that it starts are launch/train.py."""
    from dsmoe.lab.planner import calibrate

    best = calibrate._best
    calibrate.ON_GPU, calibrate.measure_all = 64, lambda cases, *rest: []
    calibrate._best = lambda action, seconds: best(action, 0.01)
    assert calibrate.measure_machine(world)[0].peak_tflops


COMMANDS = {"train": train, "evaluate": evaluate, "generate": generate, "benchmark": benchmark, "calibrate": calibrate}


def prepare(place: Path) -> None:
    """A dataset with a tokenizer, and a run on it."""
    texts = place / "texts"
    texts.mkdir()
    for number in range(8):
        (texts / f"{number}.txt").write_text("".join(f"The token of {number + n} is {n}.\n" for n in range(60)))
    dsmoe("prepare-data", str(texts), "--output", str(place / "data"), "--vocab-size", "300", "--workers", "1",
          "--valid-fraction", "0.2")  # fmt: skip
    tree = {
        "model": pm.SIZES | {"num_layers": 1, "hidden_size": HIDDEN, "num_experts": 4, "vocab_size": 320},
        "router": {"name": "relu", "k": 1}, "data": {"path": str(place / "data")},
        "training": {"steps": 1, "global_batch_size": 2, "eval_sequences": 2, "warmup_steps": 1},
        "logging": {"tensorboard": False},
    }  # fmt: skip
    (place / "tiny.yaml").write_text(yaml.safe_dump(tree))
    train(place, [], 1, "trained")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    pretended.library()
    folder = tmp_path_factory.mktemp("entry points")
    call(prepare, folder, deadline=200)
    return folder


@once
def entered(launcher: str, place: Path) -> dict[str, list[dict]]:
    actual = {}
    with launched(launcher, place / launcher) as given:
        for command in COMMANDS:
            port = str(free_port())
            jobs = [(enter, (each, port, command, place, len(given))) for each in given]
            actual[command] = call_each(jobs, deadline=400, name=f"{launcher}: {command} of rank")
    return actual


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_device_is_set_before_it_is_asked_for(launcher, command, place):
    """At 0031a16 training asked for cuda:0 on every rank before DeepSpeed set another, and the others set none."""
    if launcher == "mpirun" and beside_python("mpirun") is None:
        pytest.skip("no mpirun in this environment; pip install -c constraints.txt -e '.[mpi]' brings one")
    for rank, actual in enumerate(entered(launcher, place)[command]):
        assert actual["local rank"] == rank == actual["device"]
        assert actual["asked too early"] == []
        assert actual["worked on"] == [rank]


def leave_the_gpus_alone(place: Path) -> str:
    """On a machine where torch finds eight, whose driver must not be started."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    real_accelerator.ds_accelerator = None  # chosen anew

    def start_driver() -> None:
        raise AssertionError("a GPU is used with DS_ACCELERATOR=cpu")

    torch.cuda.is_available, torch.cuda.device_count, torch.cuda._lazy_init = lambda: True, lambda: 8, start_driver
    train(place, [], 1, "on the cpu")
    evaluate(place, [], 1)
    generate(place, [], 1)
    return get_accelerator().device_name()


def test_a_machine_with_gpus_works_on_its_cpu_where_it_is_told_to(place):
    assert call(leave_the_gpus_alone, place, deadline=200) == "cpu"
