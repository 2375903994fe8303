"""Another optimizer than AdamW goes the whole way: trained under every ZeRO stage, saved, verified, resumed on another
number of ranks, and its experts reset. And checkpoints of before there was a choice still load."""

from __future__ import annotations

import json
from pathlib import Path

import fixed_routes  # noqa: F401  (registers the router)
import pytest
import torch
from ranks import once, run_ranks
from steps import as_numbers, fresh_engine, owned_tensors, run_steps, tiny_config, whole_tensors

from dsmoe.checkpoint.load import CheckpointReader, load_checkpoint
from dsmoe.checkpoint.save import save_checkpoint
from dsmoe.checkpoint.verify import verify_checkpoint
from dsmoe.errors import CheckpointError

STAGES = (1, 2, 3)
OLD_RUN = Path(__file__).parents[1] / "fixtures" / "run_of_0031a16"


def config_of(folder: Path, parallel: int, stage: int, **training):
    return tiny_config(
        router={"name": "relu", "k": 1.0, "lambda_initial": 1e-2},
        parallel={"expert_parallel": parallel, "zero_stage": stage},
        training={"optimizer": "lion", "lr": 1e-3, **training},
        logging={"run_dir": str(folder / str(stage))},
    )


def checkpoint_of(config, step: int = 2) -> Path:
    return Path(config.logging.run_dir) / "checkpoints" / f"step_{step:08d}"


def save_and_go_on(configs) -> list:
    """Two steps, a save, two more: history and fragments."""
    results = []
    for config in configs:
        engine = fresh_engine(config)
        run_steps(engine, config, 0, 2)
        save_checkpoint(engine, config, 2, 16)
        results.append((run_steps(engine, config, 2, 4), owned_tensors(engine)))
    return results


def load_and_go_on(configs, folders) -> list:
    results = []
    for config, folder in zip(configs, folders, strict=True):
        engine = fresh_engine(config)
        manifest = load_checkpoint(engine, config, folder)
        assert (manifest.step, manifest.samples) == (2, 16)
        results.append((run_steps(engine, config, 2, 4), owned_tensors(engine)))
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("lion")


@once
def saved(folder: Path) -> list:
    return run_ranks(2, save_and_go_on, [config_of(folder, 2, stage) for stage in STAGES])


def test_lion_goes_on_bit_for_bit_on_the_same_ranks(folder):
    configs = [config_of(folder, 2, stage) for stage in STAGES]
    expected = saved(folder)
    for actual, wanted in zip(
        run_ranks(2, load_and_go_on, configs, [checkpoint_of(c) for c in configs]), expected, strict=True
    ):
        for (history, tensors), (expected_history, expected_tensors) in zip(actual, wanted, strict=True):
            assert as_numbers(history) == as_numbers(expected_history)
            assert tensors.keys() == expected_tensors.keys()
            assert {key.split("|")[0] for key in tensors} == {"weight", "exp_avg"}
            assert all(torch.equal(tensors[key], value) for key, value in expected_tensors.items())


def test_lion_goes_on_on_another_number_of_ranks_and_stage(folder):
    expected = saved(folder)[0]
    sources = [checkpoint_of(config_of(folder, 2, stage)) for stage in (3, 1, 2)]
    results = run_ranks(1, load_and_go_on, [config_of(folder / "other", 1, stage) for stage in STAGES], sources)[0]
    for (history, _), (expected_history, _) in zip(results, [expected[2], expected[0], expected[1]], strict=True):
        for step, wanted in zip(history, expected_history, strict=True):
            # A sum in another order turns the sign of a momentum that is about 0: a step of lr in another direction.
            assert step["loss"] == pytest.approx(wanted["loss"], abs=2e-4)


def test_a_checkpoint_of_lion_is_whole_and_says_whose_it_is(folder):
    saved(folder)
    for stage in STAGES:
        actual = verify_checkpoint(checkpoint_of(config_of(folder, 2, stage)))
        assert actual.problems == []
        assert (actual.optimizer, actual.states) == ("lion", ("exp_avg",))


def load_with_adamw(config, folder) -> str:
    try:
        load_checkpoint(fresh_engine(config), config, folder)
    except CheckpointError as error:
        return str(error)
    return "was loaded"


def test_another_optimizers_state_is_refused(folder):
    saved(folder)
    config = config_of(folder / "other", 1, 1, optimizer="adamw")
    (told,) = run_ranks(1, load_with_adamw, config, checkpoint_of(config_of(folder, 2, 1)))
    assert "the checkpoint's optimizer is 'lion'" in told and "training.optimizer is 'adamw'" in told


def reset(configs) -> list:
    """Three steps in which experts without tokens are reset after two."""
    results = []
    for config in configs:
        engine = fresh_engine(config)
        history = run_steps(engine, config, 0, 2)
        results.append(([step["revived"] for step in history], owned_tensors(engine)))
    return results


def test_an_expert_that_is_reset_begins_without_momentum():
    """`fixed` gives experts 2 and 3 nothing."""
    configs = [
        tiny_config(
            router={"name": "fixed", "routes": "last_experts_receive_nothing"},
            parallel={"expert_parallel": 2, "zero_stage": stage},
            training={"optimizer": "lion", "revive_idle_experts": 2},
        )
        for stage in STAGES
    ]
    ranks = run_ranks(2, reset, configs)
    for stage in range(3):
        assert ranks[0][stage][0] == ranks[1][stage][0] and ranks[0][stage][0][-1] > 0
        tensors = whole_tensors([rank[stage][1] for rank in ranks])
        prefix = "gpt.decoder.layers.0.mlp.experts"
        assert tensors[f"exp_avg|{prefix}.0.down_proj"].any()
        assert not tensors[f"exp_avg|{prefix}.2.down_proj"].any()
        source, copy = tensors[f"weight|{prefix}.0.down_proj"], tensors[f"weight|{prefix}.2.down_proj"]
        other = tensors[f"weight|{prefix}.1.down_proj"]
        assert min((source - copy).norm() / source.norm(), (other - copy).norm() / other.norm()) < 0.2


def go_on_from_the_old_run(config) -> list[float]:
    engine = fresh_engine(config)
    load_checkpoint(engine, config, OLD_RUN / "checkpoints" / "step_00000002")
    return [step["loss"] for step in run_steps(engine, config, 2, 4)]


@pytest.mark.parametrize(("ranks", "parallel", "stage"), [(1, 1, 1), (2, 2, 3)])
def test_a_checkpoint_of_before_there_was_a_choice_of_optimizer_loads(ranks, parallel, stage):
    """Written by commit 0031a16 on 2 ranks (EP 2, ZeRO 2), with the losses of the steps before and after it."""
    actual = verify_checkpoint(OLD_RUN / "checkpoints" / "step_00000002")
    assert actual.problems == [] and actual.optimizer == "adamw"
    saved_config = CheckpointReader(actual.folder).manifest.config
    config = tiny_config(
        model={key: value for key, value in saved_config["model"].items() if value is not None},
        router={"name": "relu", "k": 1.0, "lambda_initial": 1e-2},
        parallel={"expert_parallel": parallel, "zero_stage": stage},
        training={"gradient_accumulation": 1},
    )
    losses = run_ranks(ranks, go_on_from_the_old_run, config)[0]
    assert losses == pytest.approx(json.loads((OLD_RUN / "losses.json").read_text())[2:], abs=1e-5)
