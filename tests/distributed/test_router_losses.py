"""Router losses and controllers under ZeRO: they reach the router, scale as they should, and nothing counts twice.

Gradients are read from Adam's first moment: after one step without clipping it is (1 - beta1) times the gradient.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from ranks import once, run_ranks
from steps import (
    as_numbers,
    batch_of,
    fresh_engine,
    joined,
    largest_difference,
    owned_tensors,
    run_steps,
    tiny_config,
    train_each,
    whole_tensors,
)

from dsmoe.parallel.groups import create_groups
from dsmoe.training.evaluate import evaluate

STAGES = (1, 2, 3)
COEFFICIENT = {"relu": "lambda_initial", "topk": "balance_coefficient"}
ROUTERS = {
    "relu": {"name": "relu", "k": 1.0, "lambda_initial": 1e-2},
    # Linear in the tokens: its value does not depend on which tokens are counted together.
    "linear": {"name": "relu", "k": 1.0, "lambda_initial": 1e-2, "load_balanced": False},
    "topk": {"name": "topk", "k": 2, "balance_coefficient": 1e-2, "z_coefficient": 1e-3},
    "aoe": {"name": "aoe", "k": 2, "rank": 8, "placement": "sharded"},  # with padding, ranks score unequal numbers
}


def config_of(router: str, stage: int, options: dict | None = None, **sections):
    training = {"clip_grad": 0.0, "global_batch_size": 8, "gradient_accumulation": 2, **sections.pop("training", {})}
    parallel = {"expert_parallel": 2, "zero_stage": stage, **sections.pop("parallel", {})}
    return tiny_config(router=ROUTERS[router] | (options or {}), training=training, parallel=parallel, **sections)


@once
def one_step_by_coefficient(stage: int) -> dict:
    cases = {
        (router, factor): config_of(router, stage, {option: 0.5 * factor})
        for router, option in COEFFICIENT.items()
        for factor in (1, 2, 4)
    }
    return dict(zip(cases, joined(run_ranks(2, train_each, list(cases.values()), 1)), strict=True))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("router", COEFFICIENT)
def test_the_router_loss_reaches_the_router_and_is_linear_in_its_coefficient(router, stage):
    actual = one_step_by_coefficient(stage)
    names = [name for name in actual[router, 1][1] if name.startswith("exp_avg|") and "router.weight" in name]
    assert len(names) == 2
    for name in names:
        once_, twice, four = (actual[router, factor][1][name] for factor in (1, 2, 4))
        change = twice - once_
        assert change.abs().max() > 0.01 * once_.abs().max(), f"{name} hardly feels its loss"
        # fp32: each difference is exact to the rounding of the gradients it comes from
        assert torch.allclose(four - twice, 2 * change, atol=1e-5 * four.abs().max().item(), rtol=0)


@once
def one_step_by_accumulation(stage: int) -> dict:
    cases = {parts: config_of("linear", stage, training={"gradient_accumulation": parts}) for parts in (1, 2, 4)}
    return dict(zip(cases, joined(run_ranks(2, train_each, list(cases.values()), 1)), strict=True))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_changes_no_gradient(stage, parts):
    (expected, expected_tensors), (history, tensors) = (one_step_by_accumulation(stage)[n] for n in (1, parts))
    for quantity in ("loss", "router_loss", "grad_norm"):  # fp32 sums in another order
        assert history[0][quantity] == pytest.approx(expected[0][quantity], rel=1e-5), quantity
    assert torch.equal(history[0]["counts"], expected[0]["counts"])
    assert largest_difference(tensors, expected_tensors, ("exp_avg",)) <= 1e-5


@once
def one_step_of_repeated_sequences() -> list[tuple]:
    configs = [
        config_of(router, 2, training={"gradient_accumulation": parts, "global_batch_size": 4 * parts})
        for router in ("relu", "topk")
        for parts in (1, 3)
    ]
    return joined(run_ranks(2, _repeat, configs))


def _repeat(configs: list) -> list[tuple]:
    first = configs[0]  # its sequences, in every micro-step of every configuration

    def batches(config, step, part):
        return batch_of(first, step, 0)

    return train_each(configs, 1, batches)


@pytest.mark.parametrize("router", ["relu", "topk"])
def test_the_same_micro_batch_again_changes_no_gradient(router):
    """A balance loss is no linear function of the tokens; of micro-batches that are alike it is still the mean."""
    actual = one_step_of_repeated_sequences()
    (expected, expected_tensors), (history, tensors) = actual[:2] if router == "relu" else actual[2:]
    assert history[0]["router_loss"] == pytest.approx(expected[0]["router_loss"], rel=1e-5)
    assert torch.equal(history[0]["counts"], 3 * expected[0]["counts"])
    assert largest_difference(tensors, expected_tensors, ("exp_avg",)) <= 1e-5


@once
def steps_by_recompute(stage: int, precision: str) -> dict:
    model = dict(moe_shared_expert_intermediate_size=8, moe_layer_freq=[1, 0, 1], num_layers=3)
    cases = {
        (router, recompute): config_of(
            router, stage, training={"precision": precision}, model=model | {"recompute": recompute}
        )
        for router in ("relu", "topk")
        for recompute in ("none", "moe", "full")
    }
    return dict(zip(cases, joined(run_ranks(2, train_each, list(cases.values()), 2)), strict=True))


@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (2, "fp32"), (3, "fp32"), (3, "bf16")])
@pytest.mark.parametrize("router", ["relu", "topk"])
@pytest.mark.parametrize("recompute", ["moe", "full"])
def test_recompute_changes_no_bit_and_counts_nothing_twice(recompute, router, stage, precision):
    expected_history, expected = steps_by_recompute(stage, precision)[router, "none"]
    history, actual = steps_by_recompute(stage, precision)[router, recompute]
    assert as_numbers(history) == as_numbers(expected_history)
    assert {name for name, value in expected.items() if not torch.equal(value, actual[name])} == set()


def controllers_of_all_ranks(stage: int):
    """Ranks see other tokens, so a controller fed with local counts would soon differ."""
    engine = fresh_engine(config_of("relu", stage, parallel={"expert_parallel": 2}))
    return [step["state"]["lambda"].item() for step in run_steps(engine, config_of("relu", stage), 0, 6)]


@pytest.mark.parametrize("stage", [1, 3])
def test_lambda_is_the_same_bits_on_every_rank(stage):
    ranks = run_ranks(4, controllers_of_all_ranks, stage)
    assert all(other == ranks[0] for other in ranks[1:])
    values = [1e-2, *ranks[0]]
    for before, after in itertools.pairwise(values):  # each update is by the factor 1.2 or by its inverse, in fp32
        assert max(after / before, before / after) == pytest.approx(1.2, rel=1e-6)


class Held:
    """Seven held-out sequences."""

    def __init__(self, config):
        shape = (7, config.model.sequence_length + 1)
        self.text = torch.randint(0, config.model.vocab_size, shape, generator=torch.Generator().manual_seed(7))

    def __len__(self) -> int:
        return len(self.text)

    def batch(self, first: int, count: int) -> dict[str, torch.Tensor]:
        own = self.text[first : first + count]
        assert len(own) == count, "evaluation asked for sequences that there are not"
        return {"tokens": own[:, :-1].contiguous(), "labels": own[:, 1:].contiguous()}


def train_and_evaluate(router: str, stage: int, expert_parallel: int):
    """Evaluations between two steps, and a run without them: (results by batch size, what they changed)."""
    config = config_of(router, stage, parallel={"expert_parallel": expert_parallel})
    groups = create_groups(expert_parallel)
    plain = fresh_engine(config)
    expected = run_steps(plain, config, 0, 4)
    engine = fresh_engine(config)
    history = run_steps(engine, config, 0, 2)
    controller = engine.module.controller
    before, state = owned_tensors(engine), {} if controller is None else dict(controller.state)
    actual = {size: evaluate(engine, Held(config), size, groups, bytes_per_token=3.0) for size in (1, 2, 3, 7, 8)}
    changed = [name for name, value in owned_tensors(engine).items() if not torch.equal(before[name], value)]
    changed += [] if controller is None else [n for n, v in controller.state.items() if not torch.equal(state[n], v)]
    changed += ["totals"] if engine.module.recorder.take() is not None else []
    changed += [] if engine.module.training else ["training mode"]
    history += run_steps(engine, config, 2, 4)
    changed += [f"step {n}" for n, (a, b) in enumerate(zip(expected, history, strict=True)) if a["loss"] != b["loss"]]
    return actual, changed


@once
def evaluations(router: str, world: int, expert_parallel: int, stage: int):
    return run_ranks(world, train_and_evaluate, router, stage, expert_parallel)


EVALUATED = [  # router, ranks, expert parallel, ZeRO stage
    ("relu", 1, 1, 1), ("relu", 2, 2, 1), ("relu", 4, 2, 2), ("topk", 1, 1, 1), ("topk", 2, 1, 3), ("topk", 4, 4, 3),
    ("aoe", 1, 1, 1), ("aoe", 2, 2, 1),
]  # fmt: skip


@pytest.mark.parametrize(("router", "world", "expert_parallel", "stage"), EVALUATED)
def test_evaluation_changes_nothing(router, world, expert_parallel, stage):
    for _, changed in evaluations(router, world, expert_parallel, stage):
        assert changed == []


@pytest.mark.parametrize(("router", "world", "expert_parallel", "stage"), EVALUATED)
def test_held_out_loss_depends_on_neither_ranks_nor_batch_size(router, world, expert_parallel, stage):
    expected = evaluations(router, 1, 1, 1)[0][0][7]  # all seven at once
    for by_size, _ in evaluations(router, world, expert_parallel, stage):
        for size, actual in by_size.items():
            assert actual.keys() == expected.keys()
            for name, value in expected.items():
                assert actual[name] == pytest.approx(value, rel=1e-5), f"{name} in batches of {size}"


def test_whole_tensors_joins_fragments_in_their_order():
    ranks = [{"weight|a|2": torch.tensor([3.0])}, {"weight|a|0": torch.tensor([1.0, 2.0])}]
    assert whole_tensors(ranks)["weight|a"].tolist() == [1.0, 2.0, 3.0]
