"""Routing in DeepSpeed's own monitor: what TensorBoard's and CSV files hold, read back; and what pictures show."""

from __future__ import annotations

import csv
import json
import struct
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dsmoe.config.schema import LoggingConfig
from dsmoe.data.tokenizer import Tokenizer
from dsmoe.routers.recorder import RoutingTotals
from dsmoe.routers.routing import RoutingResult
from dsmoe.training.metrics import MetricsWriter, layer_metrics, worst_layer
from dsmoe.training.monitor import FirstSequence, RoutingMonitor
from dsmoe.training.pictures import COLUMNS, VERMILION, VIRIDIS, coloured_text, load_heat_map

COUNTS = [[8, 0, 4, 4], [4, 4, 4, 4], [16, 0, 0, 0]]


def totals() -> RoutingTotals:
    return RoutingTotals(torch.tensor(COUNTS), torch.tensor(16), torch.tensor([2, 0, 0]))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    texts = ["def main(argument):\n    return argument\n" * 20, "für Ä ünd λ\n" * 5]
    return Tokenizer.train(texts, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", 300)


@pytest.fixture
def monitor(groups, tmp_path):
    from deepspeed.monitor.config import get_monitor_config
    from deepspeed.monitor.monitor import MonitorMaster

    settings = {"enabled": True, "output_path": str(tmp_path)}
    return MonitorMaster(
        get_monitor_config(
            {"tensorboard": settings | {"job_name": "tensorboard"}, "csv_monitor": settings | {"job_name": "csv"}}
        )
    )


@pytest.fixture
def wandb_monitor(groups, tmp_path, monkeypatch):
    """DeepSpeed's monitor with W&B as it is without a network."""
    pytest.importorskip("wandb", reason="W&B is not installed (pip install -e '.[wandb]')")
    from deepspeed.monitor.config import get_monitor_config
    from deepspeed.monitor.monitor import MonitorMaster

    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true", "CONSOLE": "off"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    return MonitorMaster(get_monitor_config({"wandb": {"enabled": True, "project": "dsmoe"}}))


def wandb_records(content: bytes) -> list:
    """Of a file of W&B: after seven bytes, a LevelDB log of records in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    position, data, records = 7, b"", []
    while position + 7 <= len(content):
        if 0x8000 - position % 0x8000 < 7:  # no piece begins in the last bytes of a block
            position += 0x8000 - position % 0x8000
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        data += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4) and position <= len(content):  # the last piece of a record, and all of it
            records.append(Record.FromString(data))
            data = b""
    return records


def wandb_history(folder) -> list[dict]:
    """Every row in W&B's file. The process that writes it may be done with it a while after `wandb.finish`."""
    [path] = folder.glob("wandb/offline-run-*/*.wandb")
    until, records = time.monotonic() + 60, []
    while not any(record.WhichOneof("record_type") == "exit" for record in records):
        assert time.monotonic() < until, f"{path} has no end"
        time.sleep(0.05)
        records = wandb_records(path.read_bytes())
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]


def read_events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder)).Reload()


def test_layers_are_what_one_can_add_up():
    layers = layer_metrics(totals())
    assert layers["experts_per_token"] == [1.0, 1.0, 1.0] and layers["expert_imbalance"] == [2.0, 1.0, 4.0]
    assert layers["no_expert"] == [2 / 16, 0, 0] and layers["dead_experts"] == [0.25, 0, 0.75]
    assert worst_layer(layers) == {"worst_imbalance": 4.0, "worst_layer": 2}


def test_curves_pictures_and_text_reach_tensorboard_and_curves_reach_csv(monitor, tokenizer, tmp_path):
    said: list[str] = []
    routing = RoutingMonitor(monitor, 0, LoggingConfig(layers=2, pictures=4), tokenizer, said.append)
    for step in range(1, 9):
        routing.after_step(step, totals(), layer_metrics(totals()))
    ids = tokenizer.encode("def main(λ):\n")
    assert routing.wants_text()
    routing.text(8, torch.tensor(ids), torch.arange(2 * len(ids)).view(2, -1))
    monitor.tb_monitor.summary_writer.close()
    events = read_events(tmp_path / "tensorboard")
    curve = events.Scalars("dsmoe/layers/expert_imbalance/02")
    assert [(event.step, event.value) for event in curve] == [(2, 4.0), (4, 4.0), (6, 4.0), (8, 4.0)]
    percentiles = {
        name: events.Scalars(f"dsmoe/percentiles/expert_imbalance/{name}")[0].value for name in ("p50", "max")
    }
    assert percentiles == {"p50": 2.0, "max": 4.0}
    assert [image.step for image in events.Images("load of experts")] == [4, 8]
    assert [image.step for image in events.Images("experts per token")] == [8]
    assert "custom_scalars__config__" in events.Tags()["tensors"]
    with open(tmp_path / "csv" / "dsmoe_layers_dead_experts_02.csv") as file:
        assert list(csv.reader(file)) == [["step", "02"], *([str(step), "0.75"] for step in (2, 4, 6, 8))]
    assert not said


def test_a_disk_that_is_full_costs_the_pictures_and_not_the_run(monitor, tokenizer):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    said: list[str] = []
    routing = RoutingMonitor(monitor, 0, LoggingConfig(layers=0, pictures=1), tokenizer, said.append)
    monitor.tb_monitor.summary_writer.add_image = full
    for step in (1, 2):
        routing.after_step(step, totals(), layer_metrics(totals()))
    assert len(said) == 1 and "No space left" in said[0] and not routing.draws


def test_nobody_listens_on_other_ranks_or_without_a_monitor(monitor, tokenizer):
    assert RoutingMonitor(monitor, 1, LoggingConfig(), tokenizer, print).monitor is None
    routing = RoutingMonitor(None, 0, LoggingConfig(layers=1, pictures=1), tokenizer, print)
    routing.after_step(1, totals(), layer_metrics(totals()))
    assert not routing.wants_text()


def test_a_heat_map_has_a_cell_for_each_expert_and_shows_the_dead_ones():
    image = load_heat_map(np.array(COUNTS))
    rows, columns = len(COUNTS), len(COUNTS[0])
    size = image.shape[0] // rows
    cells = image[size // 2 :: size, size // 2 :: size]
    assert cells.shape == (rows, columns, 3)
    dead = (cells == VERMILION).all(-1)
    assert (dead == (np.array(COUNTS) == 0)).all()
    assert len({tuple(cell) for cell in cells[1]}) == 1, "a balanced layer has one colour"
    assert load_heat_map(np.ones((2, 4000))).shape == (2, 4000, 3)


def test_text_has_the_colours_of_its_tokens_on_their_places():
    texts = ["ab", "\n", "x" * (COLUMNS + 3), "\t", ""]
    image = coloured_text(texts, [0.0, 1.0, 4.0, 2.0, 0.0], "caption")
    assert image.dtype == np.uint8 and image.shape[2] == 3
    (yellow,), (purple,) = ([(253, 231, 37)], [(68, 1, 84)])
    at = {colour: np.argwhere((image == colour).all(-1)) for colour in (yellow, purple)}
    assert at[purple].min(0)[0] < at[yellow].min(0)[0], "the first line is above"
    lines = np.unique(at[yellow][:, 0])
    assert (np.diff(lines) > 1).sum() == 1, "a long token goes on in a second line"


def test_the_first_sequence_is_told_from_the_others_of_its_batch(tokenizer):
    length, batch, experts = 5, 3, 4

    class Routes(nn.Module):
        def forward(self, hidden):
            map_SBE = torch.zeros(length, batch, experts, dtype=torch.bool)
            for position in range(length):
                map_SBE[position, 0, : position % experts] = True
                map_SBE[position, 1:] = True
            return RoutingResult((map_SBE.float().flatten(0, 1), map_SBE.flatten(0, 1)))

    routers = [Routes(), Routes()]
    with FirstSequence(routers) as first:
        for _ in range(2):  # batches of an evaluation
            for router in routers:
                router(torch.zeros(length, batch, 8))
    assert first.experts_LS.tolist() == [[0, 1, 2, 3, 0]] * 2
    assert not routers[0]._forward_hooks


def test_the_text_of_each_id_joined_is_the_text(tokenizer):
    text = "für λ 漢:\n\tdef"
    texts = tokenizer.texts_of(tokenizer.encode(text))
    assert "".join(texts) == text and len(texts) == len(tokenizer.encode(text))


def test_wandb_gets_every_curve_although_deepspeed_counts_samples(wandb_monitor, tokenizer, tmp_path):
    """W&B drops what comes at a smaller step than its last one, and DeepSpeed's engine writes at numbers of samples."""
    import wandb

    said: list[str] = []
    routing = RoutingMonitor(wandb_monitor, 0, LoggingConfig(layers=2, pictures=4), tokenizer, said.append)
    metrics = MetricsWriter(tmp_path, 0, wandb_monitor, warn=said.append)
    for step in range(1, 5):
        wandb_monitor.write_events([("Train/Samples/lr", 0.1, 8 * step)])
        routing.after_step(step, totals(), layer_metrics(totals()))
        metrics.write({"step": step, "loss": 1.0 / step})
    ids = tokenizer.encode("def main(λ)")
    routing.text(4, torch.tensor(ids), torch.arange(2 * len(ids)).view(2, -1))
    wandb.finish()
    rows = wandb_history(tmp_path)

    def curve(axis: str, name: str) -> list:
        return [(row[axis], row[name]) for row in rows if name in row]

    assert curve("Train/Samples", "Train/Samples/lr") == [(8, 0.1), (16, 0.1), (24, 0.1), (32, 0.1)]
    assert curve("dsmoe/step", "dsmoe/loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25)]
    assert curve("dsmoe/step", "dsmoe/layers/expert_imbalance/02") == [(2, 4.0), (4, 4.0)]
    for name in ("load of experts", "experts per token"):
        assert [(row["dsmoe/step"], row[f"{name}/_type"]) for row in rows if f"{name}/path" in row] == [
            (4, "image-file")
        ]
    (picture,) = tmp_path.glob("wandb/offline-run-*/files/media/images/experts per token*.png")
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    assert all((pixels == end).all(-1).sum() > 20 for end in VIRIDIS[[0, -1]]), (
        "its first token is dark, its last light"
    )
    assert not said
