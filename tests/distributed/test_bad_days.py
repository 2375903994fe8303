"""What goes wrong while a run trains, done to real runs: numbers that are not finite, on one rank, in one step; a run
folder that goes; data that is cut off. Every rank comes to the same end, and says why."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
from pathlib import Path

import fixed_routes  # noqa: F401  registers a router
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from training_runs import lines_of, run_config, train_all, train_and_listen, write_tokens

import dsmoe.training.run
from dsmoe.checkpoint.files import newest_checkpoint, read_manifest
from dsmoe.checkpoint.verify import verify_checkpoint
from dsmoe.config.schema import RouterConfig
from dsmoe.errors import DsmoeError

EXPERTS = "gpt.decoder.layers.0.mlp.experts.down_proj"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("data") / "tokens")


class Fault:
    """From a step on (counted from 1) for `steps` steps the batches of one rank have a gradient, or an output, that is
    NaN: the same batch has it again, as bad data or a bad kernel would."""

    def __init__(self, engine, kind: str, step: int, steps: int = 1):
        self.step, self.steps, self.seen, self.now = step, steps, [], False
        model = engine.module
        model.register_forward_pre_hook(self._begin, with_kwargs=True)
        if kind == "gradient":
            dict(model.named_parameters())[EXPERTS].register_hook(self._gradient)
        else:
            dict(model.named_modules())["gpt.decoder.layers.0.mlp"].register_forward_hook(self._output)

    def _begin(self, module, args, kwargs) -> None:
        if not torch.is_grad_enabled():  # an evaluation
            self.now = False
            return
        tokens = kwargs["tokens"]
        if not any(torch.equal(tokens, known) for known in self.seen):  # a step that is done again has its number
            self.seen.append(tokens.clone())
        number = 1 + next(n for n, known in enumerate(self.seen) if torch.equal(tokens, known))
        self.now = self.step <= number < self.step + self.steps

    def _gradient(self, gradient):
        if self.now:
            gradient = gradient.clone()
            gradient.view(gradient.size(0), -1)[1, 3] = math.nan  # of the rank's second expert
        return gradient

    def _output(self, module, args, output):
        if not self.now:
            return output
        hidden = output[0].clone()  # [S, B, H]
        hidden[2, 1] = math.nan  # of the batch's second sequence
        return (hidden, *output[1:])


def train_with_fault(configs, kind: str, step: int, steps: int = 1) -> list:
    """Each run with a fault on rank 1: (what `train_all` gives, what was said, whether weights are finite)."""
    build, results = dsmoe.training.run.build_engine, []

    def build_with_fault(config, groups):
        engine = build(config, groups)
        engines.append(engine)
        if dist.get_rank() == 1:
            Fault(engine, kind, step, steps)
        return engine

    dsmoe.training.run.build_engine = build_with_fault
    for config in configs:
        engines: list = []
        with contextlib.redirect_stdout(io.StringIO()) as said:
            (result,) = train_all([config])
        finite = all(bool(torch.isfinite(p).all()) for p in engines[0].module.parameters())
        results.append((result, said.getvalue(), finite))
    return results


LAYOUTS = [(1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16")]


def configs_of(tmp_path, data, **training) -> list:
    return [
        run_config(
            tmp_path / f"{stage}-{precision}", data, training={"precision": precision, "steps": 5, **training},
            parallel={"expert_parallel": 2, "zero_stage": stage},
        )
        for stage, precision in LAYOUTS
    ]  # fmt: skip


def test_a_gradient_that_is_not_finite_names_rank_parameter_layer_and_samples(data, tmp_path):
    configs = configs_of(tmp_path, data)
    both = run_ranks(2, train_with_fault, configs, "gradient", 3)
    for config, *results in zip(configs, *both, strict=True):
        for (kind, text, code), _, finite in results:
            assert (kind, code, finite) == ("TrainingError", 1, True)  # the optimizer did not move
            assert "step 3: the gradient norm is" in text and "no checkpoint was written yet" in text
            assert f"gradient of {EXPERTS} of expert 3 (layer 0), in samples 10-11 of the data" in text
            assert "rank 1 on " in text and "rank 0 on" not in text
        (report,) = lines_of(Path(config.logging.run_dir), "bad_steps.jsonl")
        assert (report["step"], report["decision"]) == (3, "stop")
        assert report["ranks"][0]["first"] is None
        assert report["ranks"][1]["parameters"][0] == f"{EXPERTS} of expert 3"
        assert (report["ranks"][1]["layers"], report["ranks"][1]["samples"]) == ([0], [10, 11])


def test_a_bad_step_is_skipped_on_every_rank_and_the_run_goes_on(data, tmp_path):
    configs = [configs_of(tmp_path, data, on_bad_step="skip")[n] for n in (0, 2, 4)]
    both = run_ranks(2, train_with_fault, configs, "gradient", 3)
    for config, *results in zip(configs, *both, strict=True):
        run_dir = Path(config.logging.run_dir)
        assert [result[0] for result in results] == [("ended", 5, True)] * 2
        assert "warning: step 3 is skipped: the gradient norm is" in results[0][1]
        lines = lines_of(run_dir)
        assert [line.get("skipped") for line in lines] == [None, None, 1, None, None]
        assert all(math.isfinite(line["loss"]) for line in lines)
        checkpoint = newest_checkpoint(run_dir)
        assert verify_checkpoint(checkpoint).problems == []
        manifest = read_manifest(checkpoint)
        assert (manifest.step, manifest.skipped_steps, manifest.samples) == (5, 1, 20)


def test_a_loss_that_is_not_finite_names_the_output_and_the_sequence(data, tmp_path):
    configs = configs_of(tmp_path, data)[2:3]
    for rank in run_ranks(2, train_with_fault, configs, "output", 2):
        for (kind, text, _), _, finite in rank:
            assert (kind, finite) == ("TrainingError", True)
            assert "step 2: the loss is nan" in text
            assert (
                "rank 1 on " in text
                and "output of gpt.decoder.layers.0.mlp (layer 0), in samples 7 of the data" in text
            )


def test_after_so_many_skipped_steps_the_run_ends(data, tmp_path):
    config = configs_of(tmp_path, data, on_bad_step="skip", max_skipped_steps=2)[0]
    for rank in run_ranks(2, train_with_fault, [config], "gradient", 2, 4):
        ((kind, text, _), _, finite) = rank[0]
        assert (kind, finite) == ("TrainingError", True)
        assert "step 4: " in text and "2 steps were skipped, training.max_skipped_steps" in text
    decisions = [line["decision"] for line in lines_of(Path(config.logging.run_dir), "bad_steps.jsonl")]
    assert decisions == ["skip", "skip", "stop"]


def skip_and_resume(configs) -> list:
    """A step skipped before a stop, then the rest, against never having stopped."""
    return [train_with_fault([config], "gradient", 2)[0][0] for config in configs]


def test_a_skipped_step_is_no_step_of_the_optimizer_after_a_resume_either(data, tmp_path):
    whole, *parts = (
        run_config(tmp_path / name, data, training={"on_bad_step": "skip", "steps": 5, **more},
                   parallel={"expert_parallel": 2})
        for name, more in (("whole", {}), ("parts", {"stop_at": 3}), ("parts", {}))
    )  # fmt: skip
    run_ranks(2, skip_and_resume, [whole])
    run_ranks(2, skip_and_resume, parts[:1])
    run_ranks(2, train_all, parts[1:])
    losses = [[line["loss"] for line in lines_of(tmp_path / name)] for name in ("whole", "parts")]
    assert losses[0] == losses[1]


def train_with_a_spike(configs) -> list:
    """As `train_with_fault`, with a loss of step 3 that is told to be a spike."""
    from dsmoe.training.watch import LossSpikes

    see, results = LossSpikes.see, []
    for config in configs:
        calls: list = []

        def at_step_3(self, loss, calls=calls):
            calls.append(loss)
            return loss / 2 if len(calls) == 3 else see(self, loss)

        LossSpikes.see = at_step_3
        results.append(train_and_listen([config]))
    LossSpikes.see = see
    return results


def test_a_loss_spike_is_logged_or_skipped(data, tmp_path):
    configs = [
        run_config(tmp_path / action, data, training={"on_loss_spike": action}, parallel={"zero_stage": 2})
        for action in ("log", "skip")
    ]
    for logged, skipped in run_ranks(2, train_with_a_spike, configs):
        assert [result for result, _ in (logged, skipped)] == [[("ended", 4, True)]] * 2
    assert [line.get("skipped") for line in lines_of(tmp_path / "log")] == [None] * 4
    assert [line.get("skipped") for line in lines_of(tmp_path / "skip")] == [None, None, 1, None]
    assert any("the loss jumps to" in event.get("text", "") for event in lines_of(tmp_path / "log", "events.jsonl"))


def train_fixed(configs: list) -> tuple[list, str]:
    """Here, so that ranks import this module and with it the router."""
    return train_and_listen(configs)


def test_routing_that_collapses_is_warned_about_with_its_layer(data, tmp_path):
    config = run_config(tmp_path, data, training={"steps": 12})
    config.router = RouterConfig(name="fixed", routes="one_expert")
    ((results, said),) = run_ranks(1, train_fixed, [config])
    assert results == [("ended", 12, True)]
    text = "step 10: MoE layer 0: expert 3 takes 100% of the routes for 10 steps"
    assert f"warning: {text}" in said
    assert any(event.get("text") == text for event in lines_of(tmp_path, "events.jsonl"))


def train_and_lose_the_folder(config) -> tuple[list, str]:
    build = dsmoe.training.run.build_engine

    def build_and_delete(config, groups):
        engine = build(config, groups)
        calls = []

        def delete(*_):
            calls.append(0)
            if len(calls) == 3:
                shutil.rmtree(config.logging.run_dir)

        engine.module.register_forward_pre_hook(delete)
        return engine

    dsmoe.training.run.build_engine = build_and_delete
    return train_and_listen([config])


def test_a_deleted_run_folder_costs_its_logs_and_not_the_run(data, tmp_path):
    logging = {"tensorboard": True, "experts": 1, "trace": 2}
    config = run_config(tmp_path / "run", data, logging=logging, training={"steps": 6})
    ((results, said),) = run_ranks(1, train_and_lose_the_folder, config)
    assert results == [("ended", 6, True)]
    assert "warning: " in said and "metrics.jsonl was deleted; a new one is started" in said
    assert [line["step"] for line in lines_of(tmp_path / "run")] == [3, 4, 5, 6]
    assert verify_checkpoint(newest_checkpoint(tmp_path / "run")).problems == []


def train_and_cut_the_data(config) -> list:
    build = dsmoe.training.run.build_engine

    def build_and_cut(config, groups):
        engine = build(config, groups)
        engine.module.register_forward_pre_hook(lambda *_: os.truncate(f"{config.data.path}.bin", 100))
        return engine

    dsmoe.training.run.build_engine = build_and_cut
    return train_all([config])


def test_data_that_is_truncated_under_a_run_is_a_message_and_no_bus_error(tmp_path):
    data = write_tokens(tmp_path / "tokens", documents=4000)  # beyond one page
    config = run_config(tmp_path / "run", data)
    (((kind, text, code),),) = run_ranks(1, train_and_cut_the_data, config)
    assert (kind, code) == ("DataError", 1)
    assert "tokens.bin was truncated while it was read: 100 bytes, 400000 when it was opened" in text


def test_a_runs_life_is_told_at_its_end(data, tmp_path):
    first = run_config(tmp_path, data, training={"stop_at": 2}, checkpoint={"interval": 1})
    ((_, said),) = run_ranks(1, train_and_listen, [first])
    assert "effective training time" in said and "restart" not in said
    shutil.rmtree(newest_checkpoint(tmp_path))  # a step is lost
    ((results, said),) = run_ranks(1, train_and_listen, [run_config(tmp_path, data)])
    assert results == [("ended", 4, True)]
    assert "1 restart, " in said and "s to recover (median), 1 steps done again" in said
    events = lines_of(tmp_path, "events.jsonl")
    assert [event["event"] for event in events] == ["start", "end", "start", "recovered", "end"]
    assert events[2]["lost_steps"] == 1 and events[2]["resumed_from"].endswith("step_00000001")
    assert 0 < events[-1]["effective"] < 1 and events[3]["seconds"] > 0
    assert all(0 < line["effective_time"] <= 1 for line in lines_of(tmp_path))
    assert json.loads((tmp_path / "checkpoints/step_00000004/manifest.json").read_text())["seconds"] > 0
    elsewhere = run_config(tmp_path / "elsewhere", data, training={"steps": 5, "resume": str(tmp_path)})
    ((_, said),) = run_ranks(1, train_and_listen, [elsewhere])
    assert lines_of(tmp_path / "elsewhere", "events.jsonl")[-1]["effective"] < 1  # of this folder's life
    assert "restart" not in said


def test_errors_before_work_are_refusals_and_those_at_work_failures():
    assert (DsmoeError.exit_code, DsmoeError("x").exit_code) == (2, 2)
