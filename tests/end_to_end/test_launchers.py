"""One launch file under every launcher; what comes out does not depend on which, nor on the layout."""

from __future__ import annotations

import numpy as np
import pytest
import yaml
from commands import TRAIN, beside_python, deepspeed, forked, metrics, python, run, run_loaded, torchrun

from dsmoe.training.metrics import read_lines
from dsmoe.training.trace import path_of, read_trace

KEYS = {
    "step", "tokens", "loss", "router_loss", "grad_norm", "lr", "tokens_per_second", "experts_per_token", "density",
    "imbalance", "seconds", "lambda", "dead_experts", "all_to_all_bytes", "peak_memory_bytes",
}  # fmt: skip
BOTH = ["parallel.expert_parallel=2", "parallel.zero_stage=2"]


def test_metrics_have_every_step_once_with_every_key(alone):
    lines = metrics(alone[0])
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(line.keys() >= KEYS for line in lines)
    assert [line["step"] for line in lines if "val_loss" in line and "val_bpb" in line] == [3, 6]
    assert [line["tokens"] for line in lines] == [step * 4 * 32 for step in range(1, 7)]
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_the_screen_of_a_plain_run(alone):
    run_dir, result = alone
    assert "parameters" in result.output and "held-out loss" in result.output and "step 6/6" in result.output
    assert "WARNING" not in result.output and "Traceback" not in result.output
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {"step_00000003", "step_00000006", "latest"}


@pytest.mark.parametrize("launcher", ["deepspeed 2", "deepspeed 1", "mpirun 2", "torchrun module", "deepspeed module"])
def test_launcher(launcher, place, config, alone):
    run_dir = place / "runs" / launcher
    command = [TRAIN, "--config", str(config), f"logging.run_dir={run_dir}", "training.stop_at=3"]
    if launcher == "torchrun module":
        command = torchrun(2, "-m", "dsmoe", "train", *command[1:], *BOTH)
    elif launcher == "deepspeed module":
        command = deepspeed(2, "--module", "dsmoe", "train", *command[1:], *BOTH)
    elif launcher == "deepspeed 2":
        command = deepspeed(2, *command, *BOTH)
    elif launcher == "deepspeed 1":
        command = deepspeed(None, *command)
    else:
        mpirun = beside_python("mpirun")
        if mpirun is None:
            pytest.skip("no mpirun in this environment; pip install -c constraints.txt -e '.[mpi]' brings one")
        options = ["--allow-run-as-root", "--oversubscribe"]  # what a container with few cores asks for
        command = [mpirun, *options, "-n", "2", *python(*command), *BOTH]
    # A module is another command line alone: its processes have the libraries loaded.
    result = run_loaded(command) if launcher.endswith("module") else run(command)
    assert result.code == 0, result.output
    check_three_steps(run_dir, alone[0])


def test_torchrun(of_two, alone):
    check_three_steps(of_two, alone[0])


def test_what_two_ranks_send_each_other_is_counted_for_every_step(of_two, alone):
    """A row crosses at most twice in each direction: at most all tokens of both layers, in fp32."""
    config = yaml.safe_load((of_two / "config.yaml").read_text())["model"]
    most = 4 * config["num_layers"] * 4 * 32 * (config["hidden_size"] + 2 * config["num_experts"]) * 4
    for line, of_one in zip(metrics(of_two), metrics(alone[0]), strict=False):
        assert 0 < line["all_to_all_bytes"] <= most and of_one["all_to_all_bytes"] == 0
        assert 1e7 < line["peak_memory_bytes"] < 4e9


def test_recorded_routes_do_not_depend_on_the_layout_and_replay_elsewhere(of_two, alone):
    of_one, of_both = (read_trace(path_of(folder, 3)) for folder in (alone[0], of_two))
    assert (of_one.step, of_one.sequence_length, of_one.num_experts, len(of_one.layers)) == (3, 32, 4, 2)
    assert np.array_equal(of_one.tokens_T, of_both.tokens_T) and len(of_one.tokens_T) == 4 * 32
    for layer in range(2):
        assert (of_one.map_TE(layer) != of_both.map_TE(layer)).mean() < 2e-3  # a score at the threshold may flip
    line = metrics(alone[0])[2]
    assert of_one.counts_LE().sum() / (2 * 4 * 32) == pytest.approx(line["experts_per_token"], rel=1e-6)
    result = forked("tools/plan.py", "replay", str(alone[0]), "--ep", "1,2,4", "--hidden", "32")
    assert result.code == 0, result.output
    assert all(word in result.output for word in ("forced balance", "contiguous", "replicated", "128 tokens"))
    refused = forked("tools/plan.py", "replay", str(alone[0]), "--ep", "3")
    assert refused.code == 2 and "found 3" in refused.output and "Traceback" not in refused.output


def test_a_steps_time_is_taken_apart_and_each_expert_has_its_line(of_two, alone):
    common = {"rest", "attention", "routing", "dispatch", "experts", "combine", "loss", "optimizer"}
    for folder, parts in ((alone[0], common), (of_two, common | {"exchange"})):
        for line in metrics(folder):
            assert line["seconds_by_part"].keys() == parts
            assert sum(line["seconds_by_part"].values()) == pytest.approx(line["seconds"], rel=0.05)
        trace = read_trace(path_of(folder, 3))
        by_expert = read_lines(folder / "experts.jsonl")[0]
        assert (by_expert["step"], by_expert["tokens"]) == (3, 3 * 4 * 32)
        assert by_expert["counts"] == trace.counts_LE().tolist()
        norms, trained = np.array(by_expert["grad_norm"]), trace.counts_LE() > 0
        assert (norms[trained] > 0).all() and (norms[~trained] == 0).all()
        # Together with all other gradients they make the norm of all, as it is after clipping.
        assert np.sqrt((norms**2).sum()) <= min(1.0, metrics(folder)[2]["grad_norm"]) * (1 + 1e-5)


def check_three_steps(run_dir, reference_dir) -> None:
    expected, actual = metrics(reference_dir)[:3], metrics(run_dir)
    assert [line["step"] for line in actual] == [1, 2, 3]
    for line, reference in zip(actual, expected, strict=True):
        assert line["loss"] == pytest.approx(reference["loss"], abs=2e-5)
        assert line["density"] == pytest.approx(reference["density"], abs=2e-3)
    assert actual[-1]["val_bpb"] == pytest.approx(expected[-1]["val_bpb"], abs=2e-5)
