"""Predictions: sizes add up, chances are those of a simulation, plans change the way they must, mistakes are named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from dsmoe.cli.plan import main
from dsmoe.config import load_config, validate_config
from dsmoe.errors import ConfigError
from dsmoe.lab.planner import measure, work
from dsmoe.lab.planner.calibrate import fit, layout_of, non_negative_fit, robust_fit
from dsmoe.lab.planner.hardware import Hardware, Link, Speed, load_hardware
from dsmoe.lab.planner.layout import Layout, checked
from dsmoe.lab.planner.load import even, of_skew
from dsmoe.lab.planner.measure import Case, MeasuredRun
from dsmoe.lab.planner.memory import memory, routing
from dsmoe.lab.planner.predict import predict
from dsmoe.lab.planner.replay import cost_of, replay, skewed
from dsmoe.lab.planner.search import laid_out, layouts, search
from dsmoe.lab.planner.traffic import exchange, gradients, weights
from dsmoe.lab.planner.validate import cases as other_cases
from dsmoe.lab.planner.work import total_flops
from dsmoe.optim.registry import option_classes as optimizers
from dsmoe.parallel.groups import check_world
from dsmoe.parallel.topology import Topology, expert_parallel_ranks
from dsmoe.routers.registry import option_classes
from dsmoe.training.trace import trace_of

RECIPES = sorted(Path("configs/recipes").glob("*.yaml"))
HARDWARE = "configs/hardware/h100.yaml"


def config_of(*overrides: str):
    base = [
        "model.num_layers=4", "model.hidden_size=512", "model.vocab_size=8192", "model.num_experts=32",
        "model.moe_ffn_hidden_size=1024", "router.name=topk", "router.k=2", "training.global_batch_size=64",
        "training.precision=bf16", "parallel.expert_parallel=8",
    ]  # fmt: skip
    return load_config(None, [*base, *overrides], option_classes())


@pytest.fixture(scope="module")
def hardware() -> Hardware:
    return load_hardware(HARDWARE)


def layout(hardware, *overrides: str, ranks: int = 16, **more) -> Layout:
    return Layout(config_of(*overrides), hardware, ranks, **more)


@pytest.mark.parametrize("router", ["topk", "relu", "routing_free", "aoe", "top_p"])
@pytest.mark.parametrize("placement", ["replicated", "sharded"])
def test_every_parameter_is_somewhere(hardware, router, placement):
    keys = [f"router.name={router}", "parallel.expert_parallel=8", "training.global_batch_size=64"]
    keys += ["model.vocab_size=8192", "model.num_experts=32", "model.init_std=0.1"]
    if router in ("aoe", "routing_free"):
        keys += ["router.rank=16", f"router.placement={placement}"]
    config = load_config(None, keys, option_classes())
    actual = Layout(config, hardware, 16)
    assert actual.dense_parameters + actual.ep * actual.expert_parameters == actual.size.total
    assert actual.owned_parameters * actual.ranks == pytest.approx(actual.size.total)


def test_scores_of_a_bf16_gate_with_more_experts_than_hidden_numbers_are_not_kept(hardware):
    def kept(hidden: int, precision: str) -> float:
        keys = f"model.hidden_size={hidden}", "model.num_experts=1024", f"training.precision={precision}"
        of = layout(hardware, *keys)
        return (routing(of) - of.routes * 8 * 4) / (of.tokens * 1024)

    assert [kept(*case) for case in ((1024, "bf16"), (512, "fp32"), (512, "bf16"))] == [5, 5, 1]


@pytest.mark.parametrize(("experts", "ep", "k"), [(8, 2, 2), (32, 8, 4), (16, 16, 3), (12, 4, 2.5), (8, 2, 8)])
def test_ranks_a_token_goes_to_are_those_of_a_simulation(hardware, experts, ep, k):
    actual = layout(
        hardware, f"model.num_experts={experts}", f"parallel.expert_parallel={ep}", experts_per_token=k
    ).reach()
    random = np.random.default_rng(0)
    reached = []
    for _ in range(4000):
        count = int(k) + (random.random() < k % 1)
        owners = random.permutation(experts)[:count] // (experts // ep)
        home = random.integers(ep)
        reached.append(len(set(owners.tolist()) - {home}))
    assert actual == pytest.approx(np.mean(reached), rel=0.05)


def test_more_is_spread_less_is_held(hardware):
    stages = [predict(layout(hardware, f"parallel.zero_stage={stage}")).memory for stage in (1, 2, 3)]
    assert stages[0].state > stages[1].state > stages[2].state
    kept = [predict(layout(hardware, f"model.recompute={what}")) for what in ("none", "moe", "full")]
    assert kept[0].memory.activations > kept[1].memory.activations > kept[2].memory.activations
    assert kept[0].step_seconds < kept[1].step_seconds < kept[2].step_seconds
    assert len({round(one.tflops * one.step_seconds, 6) for one in kept}) == 1  # what is recomputed does not count
    parts = [predict(layout(hardware, "model.recompute=moe", f"model.moe_chunks={n}")).memory for n in (1, 4)]
    assert parts[0].dispatch > parts[1].dispatch


def test_routers_that_begin_dense_need_more_at_first(hardware):
    relu = predict(Layout(_relu(), hardware, 16))
    assert relu.first_memory.activations > 2 * relu.memory.activations
    assert relu.worst_memory == relu.first_memory.total
    topk = predict(layout(hardware))
    assert topk.first_memory == topk.memory


def _relu():
    return load_config(
        None,
        ["model.vocab_size=8192", "router.name=relu", "router.k=1", "model.num_experts=64",
         "parallel.expert_parallel=8", "training.global_batch_size=64", "training.precision=bf16"],
        option_classes(),
    )  # fmt: skip


def test_an_uneven_load_costs_the_busiest_rank(hardware):
    even_, uneven = predict(layout(hardware)), predict(layout(hardware, load=2.0))
    assert uneven.seconds["experts"] > 1.7 * even_.seconds["experts"]
    assert uneven.seconds["exchange"] > 1.9 * even_.seconds["exchange"]
    assert uneven.seconds["attention"] == even_.seconds["attention"]
    assert uneven.memory.dispatch > even_.memory.dispatch
    assert even(1.5)(1) == 1.0 and even(1.5)(4) == 1.5
    # 30 % on 4 of 32 experts: the first of 8 ranks holds just these.
    assert of_skew("30:4", 32)(8) == pytest.approx(0.3 * 8) and of_skew("30:4", 32)(1) == pytest.approx(1.0)
    with pytest.raises(ConfigError, match="PERCENT:EXPERTS"):
        of_skew("30", 32)


def test_bytes_leave_the_node_where_ranks_do(hardware):
    inside = exchange(layout(hardware, ranks=8))
    assert inside.within > 0 and inside.between == 0
    ep16 = "parallel.expert_parallel=16", "model.num_experts=64"
    across = exchange(layout(hardware, *ep16, "model.token_dispatcher=all_to_all"))
    assert across.between / across.bytes == pytest.approx(8 / 15)
    # A row for each other node, of which there is one, and not for each of its 8 ranks.
    dense = dict(experts_per_token=32)
    assert layout(hardware, *ep16, "router.k=2").dispatcher == "all_to_all"
    assert layout(hardware, *ep16, "router.k=8").dispatcher == "two_level"
    direct, two_level = (
        exchange(layout(hardware, *ep16, f"model.token_dispatcher={name}", **dense))
        for name in ("all_to_all", "two_level")
    )
    assert 6.5 < direct.between / two_level.between < 8 and two_level.within > direct.within
    assert two_level.calls_within and not direct.calls_within
    assert exchange(layout(hardware, "parallel.expert_parallel=1")).bytes == 0
    one, three = (layout(hardware, f"parallel.zero_stage={stage}") for stage in (1, 3))
    assert gradients(one) == gradients(three) and weights(three).bytes == 2 * weights(one).bytes


def test_operations_are_six_for_each_active_parameter_and_those_of_attention(hardware):
    actual = layout(hardware)
    model, tokens = actual.model, actual.step_tokens
    attention = 3 * tokens * 2 * model.num_layers * model.hidden_size * model.sequence_length
    assert total_flops(actual) == pytest.approx(6 * actual.size.active * tokens + attention)


def test_search_finds_the_fastest_that_fits(hardware):
    small = hardware.model_copy(update={"memory_gib": 4.0})
    actual = search(config_of(), small, 16)
    assert actual.fitting and actual.too_large
    everything = [predict(Layout(candidate, small, 16)) for candidate in layouts(config_of(), 16)]
    fitting = [one for one in everything if one.fits]
    assert actual.best.step_seconds == min(one.step_seconds for one in fitting)
    assert len(actual.fitting) == len(fitting) and len(actual.too_large) == len(everything) - len(fitting)
    none = search(config_of(), hardware.model_copy(update={"memory_gib": 0.5}), 16)
    assert none.best is None and none.too_large[0].missing_memory <= none.too_large[-1].missing_memory


@pytest.mark.parametrize("placement", ["auto", "within_node", "rank_order"])
def test_every_layout_that_a_search_shows_can_start(hardware, placement):
    """It passes what a run is checked for: the configuration as it would be written, the ranks, the nodes."""
    config = config_of("model.num_experts=24", "parallel.expert_parallel=1", "training.global_batch_size=96",
                       f"parallel.placement={placement}")  # fmt: skip
    ranks = 48
    topology = Topology.from_names([f"node{rank // hardware.devices_per_node}" for rank in range(ranks)])
    results = search(config, hardware, ranks)
    predictions = [*results.fitting, *results.too_large]
    shown = {prediction.layout.ep for prediction in predictions}
    assert shown == ({1, 2, 4, 8} if placement == "within_node" else {1, 2, 3, 4, 6, 8, 12, 24})
    for prediction in predictions:
        tree = yaml.safe_load(prediction.layout.config.to_yaml())
        written = validate_config(tree, option_classes(), optimizers=optimizers())
        check_world(ranks, written.parallel.expert_parallel, 96, written.training.gradient_accumulation)
        expert_parallel_ranks(topology, written.parallel.expert_parallel, placement)


def test_a_trillion_parameters_on_thousands_of_devices(hardware):
    config = config_of(
        "model.num_layers=64", "model.hidden_size=8192", "model.num_attention_heads=64", "model.num_experts=512",
        "model.moe_ffn_hidden_size=4096", "router.k=8", "training.global_batch_size=8192",
        "model.sequence_length=4096", "parallel.expert_parallel=64",
    )  # fmt: skip
    actual = search(config, hardware, 4096)
    assert actual.best.layout.size.total > 3e12
    assert 0.02 < actual.best.utilisation < 0.7 and actual.best.fits
    as_json = actual.best.as_json(1e13)
    assert as_json["device_hours"] == pytest.approx(1e13 / as_json["tokens_per_second"] * 4096 / 3600)


def test_every_mistake_is_named_at_once(hardware, tmp_path):
    with pytest.raises(ConfigError) as error:
        checked(layout(hardware, "parallel.expert_parallel=32", "training.global_batch_size=30", ranks=24))
    assert len(error.value.problems) == 2
    single = hardware.model_copy(update={"between_nodes": None})
    with pytest.raises(ConfigError, match="is one node"):
        checked(layout(single))
    with pytest.raises(ConfigError, match="vocab_size"):
        checked(Layout(config_of("model.vocab_size=null"), hardware, 16))
    file = tmp_path / "machine.yaml"
    tree = yaml.safe_load(Path(HARDWARE).read_text())
    file.write_text(yaml.safe_dump({**tree, "memory": 80, "watts": -1}))
    with pytest.raises(ConfigError) as error:
        load_hardware(file)
    assert len(error.value.problems) == 2
    file.write_text(yaml.safe_dump({**tree, "speeds": {"experts": tree["speeds"]["experts"]}}))
    with pytest.raises(ConfigError, match="speeds: .*'default'"):
        load_hardware(file)
    with pytest.raises(ConfigError, match="cannot read"):
        load_hardware(tmp_path / "none.yaml")


@pytest.mark.parametrize("name", ["a100", "b200", "h100", "h200", "two_cores_amd_epyc", "two_cores_intel_xeon"])
def test_shipped_machines_can_be_read(name):
    assert load_hardware(f"configs/hardware/{name}.yaml").source or name.startswith("two_cores")


def test_a_fit_to_runs_predicts_other_runs():
    """Runs made up from a machine that is known: what is fitted to some predicts the others."""
    speed = Speed(tflops={"fp32": 0.05}, gb_s=6.0, weights_gb_s=4.0, call_us=300.0, step_us=900.0)
    known = Hardware(
        name="known", devices_per_node=2, cpu=True, memory_gib=8, process_gib=0.3, state_overhead=1.3,
        activation_overhead=1.6, peak_tflops={"fp32": 0.08}, speeds={"default": speed},
        within_node=Link(gb_s=0.8, call_us=400.0),
    )  # fmt: skip
    blank = known.model_copy(
        update={"process_gib": 0.0, "state_overhead": 1.0, "activation_overhead": 1.0, "within_node": Link(gb_s=9.0)}
    )
    runs = [made_up(case, known) for case in other_cases(2)]
    fitted = fit(blank, runs[::2] + runs[5:8])
    for run in runs:
        actual = predict(layout_of(run, fitted))
        assert actual.step_seconds == pytest.approx(run.seconds, rel=0.03)
        assert actual.memory.total == pytest.approx(run.peak_memory, rel=0.02)


def made_up(case, hardware: Hardware) -> MeasuredRun:
    blank = MeasuredRun(case, 0.0, {}, 0.0, 0.0, 2.0, 1.1)
    actual = predict(layout_of(blank, hardware))
    parts = dict(actual.seconds)
    parts["rest"] += parts.pop("gradients", 0.0)
    parts["optimizer"] += parts.pop("weights", 0.0)
    return replace(blank, seconds=sum(parts.values()), seconds_by_part=parts, peak_memory=actual.memory.total)


def test_no_coefficient_of_a_fit_is_below_its_least():
    rows = np.array([[1.0, 0.0], [2.0, 1.0], [3.0, 5.0]])
    assert non_negative_fit(rows, rows @ [2.0, 3.0]) == pytest.approx([2.0, 3.0])
    assert (non_negative_fit(rows, rows @ [2.0, -0.1]) >= 0).all()
    assert non_negative_fit(rows, rows @ [2.0, 3.0], np.array([2.5, 0.0]))[0] >= 2.5


def test_what_no_run_shows_is_not_fitted():
    """A part without weights had been given 1e-7 GB/s for them, and one that no byte held up 1e14."""
    random = np.random.default_rng(0)
    rows = np.column_stack((random.uniform(1, 2, 12), np.zeros(12), random.uniform(1, 2, 12)))
    times = rows @ [2.0, 0.0, 0.0] * random.uniform(0.98, 1.02, 12)
    fitted = robust_fit(rows, times, np.array([0.5, 0.25, 0.0]))
    assert fitted[0] == pytest.approx(2.0, rel=0.03) and fitted[1] == 0.25
    assert fitted[2] == 0 or fitted[2] > 1e-4


def test_a_run_that_was_disturbed_counts_less():
    random = np.random.default_rng(0)
    rows = np.stack((random.uniform(1, 9, 12), np.ones(12)), axis=1)
    times = rows @ [2.0, 3.0]
    disturbed = np.where(np.arange(12) == 4, 2 * times, times)
    plain, robust = (f(rows, disturbed, np.zeros(2)) @ rows.mean(0) for f in (non_negative_fit, robust_fit))
    true = rows.mean(0) @ [2.0, 3.0]
    assert abs(robust / true - 1) < 0.5 * abs(plain / true - 1) and robust == pytest.approx(true, rel=0.03)
    assert robust_fit(rows, times, np.zeros(2)) == pytest.approx([2.0, 3.0])


def test_shared_experts_gradients_are_held_twice(hardware):
    alone, shared = (memory(layout(hardware, f"parallel.expert_parallel={ep}")) for ep in (16, 8))
    assert alone.reduction < shared.reduction / 2  # half the experts on a rank, and no one to sum them with


def test_an_optimizer_with_one_state_holds_and_moves_less(hardware):
    adamw, lion = (layout(hardware, f"training.optimizer={name}") for name in ("adamw", "lion"))
    held = [memory(each).optimizer for each in (adamw, lion)]
    assert held[0] - held[1] == pytest.approx(4 * adamw.owned_parameters)
    moved = [work.optimizer(each).weight_bytes for each in (adamw, lion)]
    assert moved[0] - moved[1] == pytest.approx(8 * adamw.owned_parameters)  # read and written


def test_a_skewed_replay_has_that_share_and_a_cost(hardware):
    random = np.random.default_rng(0)
    chosen = np.argsort(random.random((2048, 64)), axis=1)[:, :2]
    map_TE = np.zeros((2048, 64), dtype=bool)
    np.put_along_axis(map_TE, chosen, True, axis=1)
    trace = trace_of([map_TE], np.arange(2048), 16, step=1)
    actual = skewed(trace, "30:4")
    assert np.diff(actual.layers[0][0]).tolist() == np.diff(trace.layers[0][0]).tolist()
    assert actual.counts_LE()[0, :4].sum() / 4096 == pytest.approx(0.3, abs=0.03)
    row = next(
        row for row in replay(actual, [16], per_node=8, dispatcher="all_to_all") if row.placement == "contiguous"
    )
    assert row.load == pytest.approx(16 * 0.3, rel=0.12)
    assert row.between_rows / row.sent_rows == pytest.approx(8 / 15, abs=0.05)
    cost = cost_of(row, 1024, 512, "bf16", hardware)
    assert cost.sent_bytes == row.sent_rows * 4 * 1024 * 2
    rate = hardware.speed("experts").tflops["bf16"] * 1e12
    assert cost.expert_seconds == pytest.approx(18 * 1024 * 512 * row.busiest_routes / rate)
    with pytest.raises(ConfigError, match="fewer than 64"):
        skewed(trace, "30:64")


def test_a_layout_is_what_was_asked_for():
    actual = laid_out(config_of(), 4, 3, "moe", 2, 8)
    assert (actual.parallel.expert_parallel, actual.parallel.zero_stage) == (4, 3)
    assert (actual.model.recompute, actual.model.moe_chunks, actual.training.gradient_accumulation) == ("moe", 8, 2)


def test_of_several_rounds_the_fastest_run_of_each_case_counts(monkeypatch):
    order, seconds = [], iter([3.0, 5.0, 4.0, 2.0])

    def run(case, vocabulary):
        order.append(case.name)
        return MeasuredRun(case, next(seconds), {}, 0.0, 0.0, 2.0, 1.0)

    monkeypatch.setattr(measure, "measure", run)
    actual = measure.measure_all([Case("a", 1, {}), Case("b", 1, {})], 8, rounds=2)
    assert order == ["a", "b", "b", "a"]
    assert [(one.case.name, one.seconds) for one in actual] == [("a", 2.0), ("b", 4.0)]


@pytest.mark.parametrize("recipe", ["quickstart.yaml", *(f"recipes/{path.name}" for path in RECIPES)])
def test_every_shipped_recipe_can_be_planned_for_a_gpu(recipe, capsys):
    """None is refused for its precision: training takes bf16 there where none is set."""
    words = ["plan", "--config", f"configs/{recipe}", "--hardware", HARDWARE]
    try:
        code = main(words)
    except ConfigError as error:  # a plan sees no tokenizer
        assert [problem.partition(":")[0] for problem in error.problems] == ["model.vocab_size"]
        code = main([*words, "model.vocab_size=4096"])
    assert code == 0 and "bf16" in capsys.readouterr().out
