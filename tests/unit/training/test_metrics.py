"""What a run writes down: routing numbers from counts one can add up by hand, and a file that survives kills."""

from __future__ import annotations

import json

import pytest
import torch

from dsmoe.routers.recorder import RoutingTotals
from dsmoe.training.metrics import MetricsWriter, experts_per_token_by_layer, read_lines, routing_metrics


def totals_of(counts, tokens: int, without_expert=None) -> RoutingTotals:
    without = without_expert or [0] * len(counts)
    return RoutingTotals(torch.tensor(counts), torch.tensor(tokens), torch.tensor(without))


def test_routing_numbers_of_two_layers():
    totals = totals_of([[4, 0, 2, 2], [1, 1, 1, 1]], tokens=4, without_expert=[1, 0])
    actual = routing_metrics(totals, ep_size=2)
    assert actual["experts_per_token"] == 12 / (4 * 2)
    assert actual["density"] == 12 / (4 * 2 * 4)
    assert actual["imbalance"] == (4 / 4 + 2 / 2) / 2  # both ranks of both layers receive the same
    assert actual["expert_imbalance"] == (4 / 2 + 1 / 1) / 2
    assert actual["no_expert"] == 1 / (4 * 2)
    assert actual["dead_experts"] == 1 / 8
    assert experts_per_token_by_layer(totals) == [2.0, 1.0]


def test_imbalance_over_ranks_sees_consecutive_experts_together():
    totals = totals_of([[3, 3, 1, 1]], tokens=8)
    by_size = {size: routing_metrics(totals, size)["imbalance"] for size in (1, 2, 4)}
    assert by_size == {1: 1.0, 2: 6 / 4, 4: 3 / 2}


@pytest.mark.parametrize(("counts", "tokens"), [([[0, 0], [2, 0]], 2), ([[0, 0]], 5), ([[0, 0]], 0)])
def test_nothing_is_divided_by_zero(counts, tokens):
    actual = routing_metrics(totals_of(counts, tokens), ep_size=2)
    assert all(torch.tensor(value).isfinite() for value in actual.values())
    if counts == [[0, 0], [2, 0]]:
        assert actual["imbalance"] == (1 + 2) / 2  # a layer without routes counts as balanced


def test_counts_beyond_float32_stay_exact():
    large = 2**40 + 1
    actual = routing_metrics(totals_of([[large, large]], tokens=2 * large), ep_size=1)
    assert actual["experts_per_token"] == actual["expert_imbalance"] == 1.0


def lines_of(path) -> list[int]:
    return [line["step"] for line in read_lines(path)]


def write_steps(run_dir, first: int, last: int, first_step: int = 0) -> None:
    writer = MetricsWriter(run_dir, rank=0, first_step=first_step)
    for step in range(first, last + 1):
        writer.write({"step": step, "tokens": 10 * step, "loss": 1 / 3})
    writer.close()


def test_a_resumed_run_drops_the_lines_it_does_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(tmp_path, 1, 6)
    write_steps(tmp_path, 5, 8, first_step=4)
    assert lines_of(path) == [1, 2, 3, 4, 5, 6, 7, 8]
    write_steps(tmp_path, 1, 2, first_step=0)  # begun anew
    assert lines_of(path) == [1, 2]


def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(tmp_path, 1, 3)
    whole = path.read_bytes()
    for cut in range(1, len(whole) // 3):
        path.write_bytes(whole[:-cut])
        assert lines_of(path) == ([1, 2, 3] if cut == 1 else [1, 2])
        write_steps(tmp_path, 3, 4, first_step=2)
        assert lines_of(path) == [1, 2, 3, 4]
        assert all(json.loads(line) for line in path.read_text().splitlines())


def test_lines_are_there_at_once_and_numbers_keep_eight_digits(tmp_path):
    writer = MetricsWriter(tmp_path, rank=0)
    writer.write({"step": 1, "tokens": 123456789012, "loss": 1 / 3, "by_layer": [2 / 3]})
    (line,) = read_lines(tmp_path / "metrics.jsonl")  # before any close
    assert line == {"step": 1, "tokens": 123456789012, "loss": 0.33333333, "by_layer": [0.66666667]}


def test_other_ranks_write_nothing(tmp_path):
    writer = MetricsWriter(tmp_path, rank=1)
    writer.write({"step": 1, "tokens": 1})
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_the_monitor_gets_every_number_under_its_name(tmp_path):
    class Monitor:
        enabled = True
        events: list = []

        def write_events(self, events):
            self.events += events

    MetricsWriter(tmp_path, rank=0, monitor=Monitor()).write({"step": 3, "tokens": 9, "loss": 0.5, "by_layer": [1.0]})
    assert Monitor.events == [("dsmoe/loss", 0.5, 3)]
