"""On a CUDA device: the run of a CPU, to the accuracy of another chip's sums. Skipped, with the reason, elsewhere."""

from __future__ import annotations

import pytest
from commands import TRAIN, losses, metrics, python, run

from dsmoe.routers import available

ROUTERS = [name for name, router in available().items() if router.__module__.startswith("dsmoe.")]
# fp32 grouped GEMM on CUDA is newer than the torch dsmoe accepts; the loop is the same mathematics.
ALONE = ["training.steps=3", "training.eval_interval=0", "model.experts_implementation=loop"]


def train(place, config, name: str, *overrides: str, **environment: str) -> list[tuple[int, float]]:
    run_dir = place / "runs" / name
    command = python(TRAIN, "--config", str(config), f"logging.run_dir={run_dir}", *overrides)
    result = run(command, environment=environment)
    assert result.code == 0, result.output
    return losses(run_dir)


@pytest.mark.gpu
@pytest.mark.parametrize("router", ROUTERS)
def test_losses_on_a_gpu_are_those_on_a_cpu(router, place, config):
    options = [f"router.name={router}", *ALONE]
    if router == "routing_free":
        options.append("router.rescale=true")
    here = train(place, config, f"gpu {router}", *options)
    there = train(place, config, f"cpu {router}", *options, CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    for (step, loss), (_, expected) in zip(here, there, strict=True):
        assert loss == pytest.approx(expected, abs=2e-3), step


@pytest.mark.gpu
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_with_grouped_gemm_trains_on_a_gpu(stage, place, config):
    run_dir = f"gpu bf16 {stage}"
    train(place, config, run_dir, "training.precision=bf16", f"parallel.zero_stage={stage}", "training.steps=20")
    lines = metrics(place / "runs" / run_dir)
    assert lines[-1]["loss"] < lines[0]["loss"]
