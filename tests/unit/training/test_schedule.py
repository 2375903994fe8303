"""The learning rate of each step, and what a configuration may say about it."""

import itertools

import pytest

from dsmoe.config import TrainingConfig, load_config
from dsmoe.errors import ConfigError
from dsmoe.training.schedule import decay_start, learning_rate


def test_learning_rate_climbs_in_a_line_and_falls_in_a_cosine():
    training = TrainingConfig(lr=1e-3, warmup_steps=10, min_lr=1e-4)
    rates = [learning_rate(step, training) for step in range(101)]
    assert rates[0] == pytest.approx(1e-4) and rates[4] == pytest.approx(5e-4)  # no step is wasted on a rate of 0
    assert rates[9] == rates[10] == 1e-3
    assert rates[55] == pytest.approx((1e-3 + 1e-4) / 2)  # half way down
    assert rates[100] == pytest.approx(1e-4)
    assert all(before >= after for before, after in itertools.pairwise(rates[10:]))


def test_learning_rate_without_warm_up_and_after_the_end():
    training = TrainingConfig(lr=1e-3, warmup_steps=0, min_lr=0.0)
    assert learning_rate(0, training) == 1e-3
    assert learning_rate(100, training) == learning_rate(1000, training) == pytest.approx(0.0, abs=1e-12)


def test_learning_rate_that_is_all_warm_up():
    training = TrainingConfig(lr=1e-3, warmup_steps=100)
    assert [learning_rate(step, training) for step in (0, 99, 100)] == pytest.approx([1e-5, 1e-3, 1e-3])


def test_wsd_warms_up_stays_and_decays():
    training = TrainingConfig(schedule="wsd", steps=100, warmup_steps=10, lr=1e-3, min_lr=1e-4)
    rates = [learning_rate(step, training) for step in range(101)]
    assert rates[:10] == pytest.approx([1e-4 * step for step in range(1, 11)])
    assert set(rates[10:81]) == {1e-3}  # a fifth of the steps decays
    assert rates[85] == pytest.approx(1e-4 + 9e-4 * (1 - 0.25**0.5))
    assert rates[100] == pytest.approx(1e-4)
    assert all(before > after for before, after in itertools.pairwise(rates[80:]))


def test_a_branch_decays_from_its_checkpoint_to_its_own_end():
    trunk = TrainingConfig(schedule="wsd", steps=400, warmup_steps=10, lr=1e-3, min_lr=0.0)
    branch = trunk.model_copy(update={"steps": 100, "decay_from": "runs/a/checkpoints/step_00000080"})
    assert decay_start(trunk) == 320 and decay_start(branch) == 80
    assert learning_rate(79, branch) == learning_rate(79, trunk) == learning_rate(80, branch) == 1e-3
    assert learning_rate(90, branch) == pytest.approx(1e-3 * (1 - 0.5**0.5))
    assert learning_rate(100, branch) == 0.0


def test_no_decay_at_all():
    training = TrainingConfig(schedule="wsd", steps=50, warmup_steps=0, lr=1e-3, decay_steps=0)
    assert {learning_rate(step, training) for step in range(50)} == {1e-3}


@pytest.mark.parametrize(
    ("overrides", "mistake"),
    [
        (["training.decay_steps=10"], "training.decay_steps: found 10, expected none: training.schedule is not wsd"),
        (["training.schedule=wsd", "training.decay_steps=101"], "expected at most training.steps (100)"),
        (["training.schedule=wsd", "training.decay_from=runs/a"], "expected a checkpoint's folder"),
        (["training.schedule=wsd", "training.decay_from=a/step_00000100"], "expected a step before training.steps"),
        (["training.schedule=wsd", "training.decay_from=a/step_9", "training.decay_steps=3"], "the decay lasts from"),
        (["training.schedule=linear"], "training.schedule: found 'linear', expected 'cosine' or 'wsd'"),
    ],
)
def test_mistakes_in_a_schedule_are_explained(overrides, mistake):
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    assert mistake in str(caught.value)
