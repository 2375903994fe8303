"""A grid expands to cells of equal active compute, and names every reason why it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
from plan_files import edit

from dsmoe.errors import ConfigError
from dsmoe.lab.study import check
from dsmoe.lab.study.check import load_study
from dsmoe.lab.study.grid import LIMITS
from dsmoe.lab.study.limits import SHOWN_BY
from dsmoe.lab.study.measures import MEASURES
from dsmoe.lab.study.results import flops_per_token, router_parameters, sized
from dsmoe.lab.study.settings import TOLERANCE, cell_config
from dsmoe.routers import get

FOLDER = Path(__file__).parents[4] / "configs" / "studies"


def problems(path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_study(path)
    return caught.value.problems


def configs(path):
    study = load_study(path)
    return {str(cell): cell_config(study, cell, Path("runs")) for cell in study.cells()}


def test_every_limit_that_a_study_may_name_has_quantities_that_show_it():
    assert set(SHOWN_BY) == set(LIMITS)
    assert {name for names in SHOWN_BY.values() for name in names} <= set(MEASURES)


def test_cells_come_seed_by_seed_and_small_ones_first(study_file):
    cells = load_study(study_file).cells()
    assert len(cells) == 16 and len({cell.folder(Path()) for cell in cells}) == 16
    assert [str(cell) for cell in cells[:3]] == [
        "topk, num_experts 4, seed 1", "relu, num_experts 4, seed 1", "topk, num_experts 8, seed 1"
    ]  # fmt: skip
    assert [cell.seed for cell in cells] == [1] * 8 + [2] * 8


def test_the_number_of_active_experts_reaches_every_kind_of_router(study_file):
    names = ("topk", "topk_bias", "top_p", "dtop_p", "relu", "expert_threshold", "routing_free")

    def change(tree):
        tree["published"] = []
        tree["arms"] = [{"name": name, "set": {"router.name": name}} for name in names]
        tree["arms"][-1]["set"] |= {"router.rank": 4, "model.init_std": 0.2}
        tree["axes"] = {"model.num_experts": [8]}

    edit(study_file, change)
    for config in configs(study_file).values():
        router = get(config.router.name)
        assert router.Options.model_validate(config.router.options).target_experts_per_token(config.model) == 2


@pytest.mark.parametrize("experts", [4, 16])
def test_a_costlier_router_gets_narrower_experts(study_file, experts):
    def change(tree):
        tree["arms"][1] = {"name": "aoe", "set": {"router.name": "aoe", "router.rank": 4}}
        tree["axes"] = {"model.num_experts": [experts]}
        tree["compute"] = {"experts": 2, "width": 64}

    edit(study_file, change)
    actual = configs(study_file)
    cost = [router_parameters(c) + 2 * sized(c).expert for c in actual.values()]
    assert cost[0] == experts * 32 + 2 * 3 * 32 * 64
    assert cost == pytest.approx([cost[0]] * len(cost), rel=TOLERANCE)
    widths = {c.router.name: c.model.moe_ffn_hidden_size for c in actual.values()}
    assert widths["topk"] == 64 and widths["aoe"] == round((cost[0] - experts * 4 * 32) / (2 * (64 + 4)))


def test_granularity_cuts_experts_and_keeps_compute(study_file):
    edit(study_file, lambda tree: tree.update(x="granularity", published=[], axes={"granularity": [1, 2, 4]}))
    actual = [config for config in configs(study_file).values() if config.router.name == "topk"][:3]
    shapes = [(c.model.num_experts, c.router.options["k"], c.model.moe_ffn_hidden_size) for c in actual]
    assert shapes[0] == (4, 2, 16) and [shape[0] for shape in shapes] == [4, 8, 16]
    assert [k * width for _, k, width in shapes] == [32, 32, 32]


def test_every_mistake_of_a_study_is_named(study_file):
    def spoil(tree):
        tree["arms"].append({"name": "topk", "set": {}})
        tree["seeds"] = [1, 1]
        tree["x"] = "model.experts"
        tree["limits"] = ["gravity"]
        tree["published"][0]["values"] = {"gpt": {4: 1.0}}

    edit(study_file, spoil)
    assert {problem.split(":")[0] for problem in problems(study_file)} == {"arms", "seeds", "x", "limits", "published"}


def test_all_reasons_of_all_cells_come_at_once(study_file):
    def spoil(tree):
        tree["ranks"] = 2
        tree["set"] |= {"training.global_batch_size": 3, "parallel.expert_parallel": 2, "router.kk": 1}
        tree["axes"] = {"model.num_experts": [4, 7]}

    edit(study_file, spoil)
    text = "\n".join(problems(study_file))
    assert (
        "kk" in text and "num_experts 7" in text and "found 7, expected a multiple of parallel.expert_parallel" in text
    )


def test_a_grid_that_fits_no_processes_is_refused(study_file):
    edit(study_file, lambda tree: tree.update(ranks=3, set={"parallel.expert_parallel": 2}))
    actual = problems(study_file)
    assert any("ranks: found 3" in problem for problem in actual)
    assert any("global_batch_size" in problem for problem in actual)


def test_a_router_that_costs_more_than_there_is_to_spend_is_refused(study_file):
    arm = {"name": "aoe", "set": {"router.name": "aoe", "router.rank": 16}}
    edit(study_file, lambda tree: tree["arms"].append(arm))
    actual = problems(study_file)
    assert any("aoe, num_experts 32" in problem and "cannot be met" in problem for problem in actual)


def test_a_cell_beyond_this_machines_memory_is_refused(study_file, monkeypatch):
    monkeypatch.setattr(check, "memory_of_machine", lambda: 2.0**20)
    assert all("memory" in problem for problem in problems(study_file))


def test_a_contradiction_about_active_experts_is_refused(study_file):
    edit(study_file, lambda tree: tree["arms"][0]["set"].update({"router.k": 3}))
    assert any("aims at 3 experts per token, expected 2" in problem for problem in problems(study_file))


def test_shipped_studies_load(monkeypatch):
    monkeypatch.chdir(FOLDER.parents[1])  # a study names its file as seen from there
    for path in FOLDER.glob("*.yaml"):
        if path.stem != "base":
            assert load_study(path).cells()


def test_a_dense_arm_beside_many_experts(study_file):
    def change(tree):
        tree["compute"] = {"experts": 1, "width": 32}
        tree["arms"].append({"name": "dense", "set": {"router.name": "topk"}, "axes": {"model.num_experts": [1]}})

    edit(study_file, change)
    actual = configs(study_file)
    dense = actual["dense, num_experts 1, seed 1"]
    assert (dense.model.num_experts, dense.router.options["k"], dense.model.moe_ffn_hidden_size) == (1, 1, 32)


def test_lengths_branch_off_the_checkpoint_where_their_decay_begins(study_file):
    def change(tree):
        tree["lengths"] = [0.25, 0.5]
        tree["set"] |= {"training.schedule": "wsd", "training.steps": 200, "checkpoint.keep_every": 40}

    edit(study_file, change)
    study = load_study(study_file)
    cells = [cell for cell in study.cells() if cell.arm == "topk" and dict(cell.point)["model.num_experts"] == 4]
    assert [cell.length for cell in cells[:3]] == [1.0, 0.25, 0.5]
    whole, quarter, half = (cell_config(study, cell, Path("runs")).training for cell in cells[:3])
    assert (whole.steps, quarter.steps, half.steps) == (200, 50, 100)
    trunk = cells[0].folder(Path("runs"))
    assert quarter.decay_from == str(trunk / "checkpoints" / "step_00000040")
    assert half.decay_from == str(trunk / "checkpoints" / "step_00000080")
    edit(study_file, lambda tree: tree["set"].update({"checkpoint.keep_every": 30}))
    assert any("keep_every: found 30, expected a divisor of 40" in problem for problem in problems(study_file))
    edit(study_file, lambda tree: tree["set"].pop("training.schedule"))
    assert any("training.decay_from" in problem for problem in problems(study_file))


def test_isoflop_spends_the_same_compute_at_every_size(study_file):
    def change(tree):
        tree["preset"] = {"kind": "isoflop", "sizes": [16, 32, 64], "budgets": [1e9, 4e9]}
        tree["set"] |= {"training.lr": 1e-3, "training.warmup_steps": 4}
        tree.update(x="size", axes={"model.num_experts": [4]}, published=[])

    edit(study_file, change)
    actual = [config for name, config in configs(study_file).items() if name.startswith("topk") and "seed 1" in name]
    assert len(actual) == 6
    spent = [
        flops_per_token(config, 2) * config.training.steps * config.training.global_batch_size * 16 for config in actual
    ]
    assert sorted(spent)[:3] == pytest.approx([1e9] * 3, rel=0.05)
    assert sorted(spent)[3:] == pytest.approx([4e9] * 3, rel=0.05)
    small = next(config for config in actual if config.model.hidden_size == 16)
    large = next(config for config in actual if config.model.hidden_size == 64)
    assert (small.model.num_layers, large.model.num_layers) == (1, 4)
    assert (small.model.moe_ffn_hidden_size, large.model.moe_ffn_hidden_size) == (8, 32)
    assert (small.training.lr, large.training.lr) == pytest.approx((2e-3, 5e-4))


def test_a_ladder_keeps_tokens_for_each_active_parameter(study_file):
    def change(tree):
        tree["preset"] = {"kind": "ladder", "sizes": [16, 32], "tokens_per_parameter": 5}
        tree.update(x="size", axes={"model.num_experts": [4]}, published=[])

    edit(study_file, change)
    for config in configs(study_file).values():
        tokens = config.training.steps * config.training.global_batch_size * config.model.sequence_length
        assert tokens / sized(config).active == pytest.approx(5, rel=0.02)


def test_mistakes_in_a_study_name_the_nearest_key(study_file):
    def spoil(tree):
        tree["arms"][0]["sett"] = {}
        tree["seed"] = tree.pop("seeds")
        tree["compute"]["width"] = "wide"
        tree["preset"] = {"kind": "ladder", "sizes": [16, 32], "budgets": [1.0]}

    edit(study_file, spoil)
    assert {problem.partition(": ")[0]: problem for problem in problems(study_file)}.keys() == {
        "arms.0.sett", "seed", "seeds", "compute.width", "preset"
    }  # fmt: skip
    assert any("arms.0.sett: unknown key (did you mean 'set'?)" in problem for problem in problems(study_file))
