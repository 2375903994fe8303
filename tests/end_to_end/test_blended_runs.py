"""A run on a blend of two datasets: what it says of the shares, and that it resumes at the exact sample."""

from __future__ import annotations

import json

import pytest
from commands import TRAIN, forked, metrics


@pytest.fixture(scope="module")
def second(place, corpus):
    """Another dataset in the ids of the first."""
    texts = place / "more texts"
    texts.mkdir()
    for number in range(12):
        (texts / f"{number}.txt").write_text("".join(f"{number} {line} once more.\n" for line in range(60)))
    options = ["--output", str(place / "more"), "--tokenizer", str(corpus / "tokenizer.model"), "--workers", "1"]
    made = forked("tools/prepare_data.py", str(texts), *options)
    assert made.code == 0, made.output
    return place / "more"


def test_a_run_on_a_blend_resumes_exactly(place, config, corpus, second):
    blend = json.dumps([{"path": str(corpus), "weight": 3}, {"path": str(second), "weight": 1}])

    def train(run: str, processes: int, *overrides: str):
        steps = ["training.steps=4", "training.global_batch_size=4", "logging.tensorboard=false", *overrides]
        where = [f"data.path={blend}", f"logging.run_dir={place / run}", f"parallel.expert_parallel={processes}"]
        result = forked(TRAIN, "--config", str(config), *where, *steps, processes=processes)
        assert result.code == 0, result.output
        return result

    whole = train("whole", 1)
    assert "a blend of 2" in whole.output and "75.00% " in whole.output and "25.00% " in whole.output
    lines = metrics(place / "whole")
    assert all(set(line["data_shares"]) == {corpus.name, "more"} for line in lines)
    assert sum(lines[-1]["data_shares"].values()) == pytest.approx(1)
    train("parts", 2, "training.stop_at=2")
    train("parts", 2)
    for one, other in zip(lines, metrics(place / "parts"), strict=True):
        assert one["data_shares"] == other["data_shares"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    other = json.loads(blend)
    other[0]["weight"] = 1
    overrides = ["training.steps=6", "training.global_batch_size=4", f"logging.run_dir={place / 'parts'}"]
    refused = forked(TRAIN, "--config", str(config), f"data.path={json.dumps(other)}", *overrides, processes=2)
    assert refused.code == 2 and "the run's place in it means nothing in other data" in refused.output
