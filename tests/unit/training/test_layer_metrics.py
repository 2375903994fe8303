"""Experts per token by layer: right from the counts, a list in metrics.jsonl, and not sent to the monitor."""

import json

import pytest
import torch

from dsmoe.routers.recorder import RoutingTotals
from dsmoe.training.metrics import MetricsWriter, experts_per_token_by_layer, routing_metrics


class Monitor:
    enabled = True

    def __init__(self):
        self.events = []

    def write_events(self, events):
        self.events += events


def totals(tokens: int) -> RoutingTotals:
    return RoutingTotals(torch.tensor([[8, 2], [0, 5]]), torch.tensor(tokens), torch.tensor([0, 1]))


def test_mean_over_layers_is_the_scalar_metric():
    layers = experts_per_token_by_layer(totals(8))
    assert layers == [10 / 8, 5 / 8]
    assert sum(layers) / 2 == pytest.approx(routing_metrics(totals(8), 1)["experts_per_token"])


def test_no_tokens_is_no_division():
    assert experts_per_token_by_layer(RoutingTotals(torch.zeros(2, 2), torch.tensor(0), torch.zeros(2))) == [0, 0]


def test_a_list_is_written_but_not_monitored(tmp_path):
    monitor = Monitor()
    writer = MetricsWriter(tmp_path, 0, monitor)
    writer.write({"step": 3, "tokens": 9, "val_loss": 2.5, "val_experts_per_token_by_layer": [1 / 3, 2.0]})
    writer.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["val_experts_per_token_by_layer"] == [0.33333333, 2.0]
    assert monitor.events == [("dsmoe/val_loss", 2.5, 3)]
