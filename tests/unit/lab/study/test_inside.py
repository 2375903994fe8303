"""What a study reads of its cells' experts: probe, gradients and routes over training, seconds by part, energy."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from plan_files import edit
from rich.console import Console

from dsmoe.data.tokenizer import Tokenizer
from dsmoe.lab.planner.replay import replay
from dsmoe.lab.study.check import load_study
from dsmoe.lab.study.energy import find_meter
from dsmoe.lab.study.inside import Inside, idle, weak
from dsmoe.lab.study.measures import read_results
from dsmoe.lab.study.report import write_report
from dsmoe.lab.study.runner import run_study
from dsmoe.training.trace import path_of, read_trace, trace_of, write_trace

STEPS, LAYERS, TOKENS = 24, 2, 64
TEXT = "the sun rose over 1984 hills ; x_1 = f(2) and then , it set .\n"
PARTS = {"routing": 0.05, "dispatch": 0.03, "combine": 0.02, "exchange": 0.1, "experts": 0.2, "rest": 0.1,
         "optimizer": 0.5}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.train([TEXT] * 200, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", 300)


@pytest.fixture
def seen(study_file, tmp_path, tokenizer):
    """A study of one seed whose cells have all that a run and the probe leave."""
    edit(study_file, lambda tree: tree.update(seeds=[1], timed=True, limits=["routing", "redundant", "latency"]))
    study, out = load_study(study_file), tmp_path / "seen"
    assert run_study(study, out, 1, console=Console(quiet=True)) == 0  # alone, or its seconds would not count
    for cell in study.cells():
        fill(cell.folder(out), dict(cell.point)["model.num_experts"], cell.arm == "relu", tokenizer)
    return study, out


def fill(folder, experts: int, adaptive: bool, tokenizer) -> None:
    random = np.random.default_rng(experts)
    ids = tokenizer.encode(TEXT * 5)[:TOKENS]
    for step in (12, STEPS):
        maps = [random.random((TOKENS, experts)) < (0.4 if adaptive else 0.25) for _ in range(LAYERS)]
        write_trace(path_of(folder, step), trace_of(maps, np.array(ids), 16, step))
    with open(folder / "experts.jsonl", "w") as file:
        for step in range(2, STEPS + 1, 2):
            counts = [[0, *[8] * (experts - 1)] for _ in range(LAYERS)]  # expert 0 starves
            norms = [[1e-6, *[1.0] * (experts - 1)] for _ in range(LAYERS)]
            file.write(json.dumps({"step": step, "tokens": step * 64, "counts": counts, "grad_norm": norms}) + "\n")
    alike = {"mean": 1 / experts, "max": 0.5, "similar": 0.0}
    layer = {"cosine": alike, "cka": alike, "weights": {**alike, "chance": 0.01}, "flips_bf16": 0.001,
             "flips_checkpoint": 0.1}  # fmt: skip
    latency = [
        {"setting": setting, "experts_per_token": k, "loss": 4.0, "first_token_seconds": 0.02, "token_seconds": k / 1e3}
        for setting, k in (("as trained", 2.0), ("k=1", 1.0))
    ]
    (folder / "probe.json").write_text(json.dumps({"layers": [layer] * LAYERS, "latency": latency}))
    tokenizer.copy_to(folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps({**x, "seconds_by_part": PARTS}) + "\n" for x in lines))


def test_what_a_run_left_becomes_numbers(seen):
    results = read_results(*seen)
    one = next(one for one in results.measured if str(one.cell) == "topk, num_experts 8, seed 1")
    values = one.values
    assert values["output_cka"] == values["output_cosine"] == 1 / 8
    assert values["weights_alike"] == pytest.approx(1 / 8 - 0.01) and values["flips"] == 0.1
    assert values["idle_experts"] == values["weak_experts"] == 1 / 8 and values["expert_gradient"] == 1.0
    assert values["passes_seconds"] == pytest.approx(0.5) and values["optimizer_seconds"] == 0.5
    assert values["routing_share"] == pytest.approx(0.2) and values["exchange_share"] == pytest.approx(0.2)
    assert (values["first_token"], values["token"]) == (20.0, 2.0)
    rows = {row.placement: row for row in replay(one_trace(one.inside), [8])}
    assert values["load_contiguous"] == rows["contiguous"].load > values["load_replicated"]
    assert values["by_route"] == rows["contiguous"].sent_routes / rows["contiguous"].sent_rows
    timed = {"first_token", "token", "passes_seconds", "routing_share"}
    untimed = read_results(seen[0].model_copy(update={"timed": False}), seen[1]).measured[0].values
    assert not timed & untimed.keys() and "flips" in untimed


def one_trace(inside: Inside):
    return read_trace(inside.traces[-1])


def test_kinds_of_tokens_are_counted_as_by_hand(seen, tokenizer):
    study, out = seen
    cell = next(cell for cell in study.cells() if cell.arm == "relu")
    inside = Inside(cell.folder(out))
    (_, _), (step, by_kind) = inside.kinds_over_training()
    trace = one_trace(inside)
    active = np.mean([trace.map_TE(layer).sum(1) for layer in range(LAYERS)], axis=0)
    digits = [any(sign.isdigit() for sign in tokenizer.decode([int(one)])) for one in trace.tokens_T]
    assert step == STEPS and by_kind["digits"] == pytest.approx(active[digits].mean())
    assert {"prose", "digits", "punctuation", "code"} <= by_kind.keys()
    (tokenizer_file,) = cell.folder(out).glob("tokenizer.*")
    tokenizer_file.unlink()
    assert inside.kinds_over_training() == []


@pytest.mark.slow
def test_pictures_of_what_is_inside_have_their_numbers(seen, tmp_path):
    page = tmp_path / "limits.md"
    marks = "".join(f"<!-- {name} -->\n<!-- end of table -->\n" for name in ("routing", "redundant", "latency"))
    page.write_text(marks)
    written = {path.name for path in write_report([seen[1]], tmp_path / "report", page)}
    folder = tmp_path / "report" / "seen"
    names = ("experts", "parts", "latency", "kinds", "layers_over_training", "starving")
    assert {f"{name}.{end}" for name in names for end in ("svg", "csv")} <= written

    def rows(name: str) -> list[dict]:
        with open(folder / f"{name}.csv") as file:
            return list(csv.DictReader(file))

    assert {row["part"]: float(row["seconds"]) for row in rows("parts")} == PARTS
    assert len(rows("latency")) == 8 * 2 and {row["router"] for row in rows("latency")} == {"as trained", "k=1"}
    layers = [row for row in rows("layers_over_training") if row["cell"] == "relu, num_experts 4, seed 1"]
    assert len(layers) == 12 * LAYERS and float(layers[0]["experts per token"]) == 3 * 8 / 64
    starving = [row for row in rows("starving") if row["cell"] == "topk, num_experts 32, seed 1"]
    assert float(starving[-1]["experts without a token"]) == 1 / 32
    text = (tmp_path / "report" / "report.md").read_text()
    assert "What the experts became" in text and "likeness of experts' outputs, CKA" in text
    shown = page.read_text()
    assert "| More experts | topk | num_experts 4 | k=1 | 1.00 | 20.00 | 1.00 | 4.000 |" in shown
    assert "20.0%" in shown and "0.250" in shown


def test_experts_that_starve():
    lines = [{"counts": [[0, 1, 0, 2]], "grad_norm": [[0.0, 1.0, 0.05, 3.0]]}, {"counts": [[0, 0, 4, 0]]}]
    assert idle(lines[:1]) == 0.5 and idle(lines) == 0.25
    assert weak(lines[0]) == 0.5


def test_a_cell_without_any_of_it_has_none_of_it(tmp_path):
    assert Inside(tmp_path).values([{"step": 1, "seconds": 1.0}]) == {}
    assert Inside(tmp_path).kinds_over_training() == []


def test_energy_is_read_where_the_host_tells(tmp_path):
    assert find_meter(tmp_path / "none") is None or find_meter(tmp_path / "none").devices

    def zone(name: str, microjoules: int) -> None:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "energy_uj").write_text(f"{microjoules}\n")
        (folder / "max_energy_range_uj").write_text("10000000\n")

    for name in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0", "intel-rapl-mmio:0"):
        zone(name, 9_000_000)
    meter = find_meter(tmp_path)
    assert [one.name for one in meter.zones] == ["intel-rapl:0", "intel-rapl:1"]
    zone("intel-rapl:0", 9_500_000)
    zone("intel-rapl:0:0", 9_900_000)
    zone("intel-rapl:1", 500_000)  # wrapped
    assert meter.joules() == pytest.approx(0.5 + 1.5)
    zone("intel-rapl:1", 1_500_000)
    assert meter.joules() == pytest.approx(3.0)
