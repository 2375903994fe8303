"""A run's TensorBoard folder has curves of layers, pictures of load, and a held-out text in colours."""

from __future__ import annotations

from commands import TRAIN, forked


def test_what_a_run_leaves_for_tensorboard(place, config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir = place / "runs" / "monitored"
    options = ["logging.tensorboard=true", "logging.layers=2", "logging.pictures=2", "training.steps=4"]
    two = ["parallel.expert_parallel=2"]
    result = forked(TRAIN, "--config", str(config), f"logging.run_dir={run_dir}", *options, *two, processes=2)
    assert result.code == 0, result.output
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("dsmoe/layers/experts_per_token/01")] == [2, 4]
    assert [image.step for image in events.Images("load of experts")] == [2, 4]
    assert [image.step for image in events.Images("experts per token")] == [3, 4]  # training.eval_interval, and the end
    assert [event.step for event in events.Scalars("dsmoe/worst_imbalance")] == [1, 2, 3, 4]
    said = result.output
    assert "done    step 4 of 4; effective training time" in said and "\nnext    dsmoe generate " in said
    assert "experts per token (aim 1.00)" in said and f"tensorboard --logdir '{run_dir}'" in said
