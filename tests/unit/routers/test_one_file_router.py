"""A router with a controller, complete in one file of another package, where dsmoe asks a router about itself.

tests/plugin_router trains, saves and resumes it as an installed package; tests/unit/hf/test_exporting.py exports it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from dsmoe.config import validate_config
from dsmoe.hf.upcycle import Upcycler, UpcyclingOptions
from dsmoe.lab.benchmark.cases import World
from dsmoe.lab.benchmark.problem import Problem
from dsmoe.lab.benchmark.step import StepJob, hold_mean
from dsmoe.lab.benchmark.steps import router_jobs
from dsmoe.lab.benchmark.worker import Job, entries_of
from dsmoe.lab.planner.hardware import load_hardware
from dsmoe.lab.planner.layout import Layout
from dsmoe.lab.planner.memory import routing
from dsmoe.lab.planner.predict import predict
from dsmoe.lab.study.check import load_study
from dsmoe.lab.study.results import target_density
from dsmoe.lab.study.settings import cell_config
from dsmoe.model.gpt import LanguageModel
from dsmoe.routers.registry import option_classes

ROOT = Path(__file__).parents[3]
NAME = "sigmoid_threshold"


def config_of(**sections):
    model = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "num_experts": 8, "vocab_size": 64,
             "moe_ffn_hidden_size": 16, "sequence_length": 16}  # fmt: skip
    return validate_config({"model": model, "router": {"name": NAME, "k": 2}, **sections}, option_classes())


def model_of(config, router, groups) -> LanguageModel:
    options = router.Options.model_validate(config.router.options)
    return LanguageModel(config.model, (router, options), groups, seed=1)


def test_it_is_benchmarked(plugin_router, groups):
    """The layer, on tokens that are made for k experts, and the whole model, calibrated to k."""
    problem = Problem(experts=4, tokens=64, hidden=32, ffn=16)
    world = World(problem, groups, "cpu")
    (entry,) = [entry for entry in entries_of(world, Job(problem, ["balanced"], "")) if entry.name == f"dsmoe {NAME}"]
    assert entry.variable
    case = entry.build(world.inputs("balanced", entry.variable))
    case.run()
    case.after()
    assert case.mean_experts() == problem.k
    assert f"dsmoe {NAME}" in [job.name for job in router_jobs(StepJob("", ""))]
    model, tokens = model_of(config_of(), plugin_router, groups), torch.randint(64, (4, 16))
    hold_mean(model, tokens, k=3)
    with torch.no_grad():
        model(tokens)
    assert model.recorder.take().density().item() * 8 == pytest.approx(3, abs=0.05)


def test_it_is_studied_at_equal_compute(plugin_router, tmp_path):
    study = {
        "title": "A plugin", "question": "Does it have the others' compute?",
        "config": str(ROOT / "configs/studies/base.yaml"), "compute": {"experts": 2, "width": 64}, "seeds": [1],
        "axes": {"model.num_experts": [4, 8]},
        "arms": [{"name": "top-2", "set": {"router.name": "topk"}}, {"name": "plugin", "set": {"router.name": NAME}}],
    }  # fmt: skip
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    study = load_study(tmp_path / "study.yaml", to_run=False)
    configs = {
        (cell.arm, dict(cell.point)["model.num_experts"]): cell_config(study, cell, tmp_path) for cell in study.cells()
    }
    assert configs["plugin", 8].router.options["k"] == 2
    assert [target_density(configs[arm, 8]) for arm in ("plugin", "top-2")] == [0.25, None]
    for experts in (4, 8):
        widths = [configs[arm, experts].model.moe_ffn_hidden_size for arm in ("plugin", "top-2")]
        assert widths[0] == widths[1]  # gates of the same cost


def test_it_is_planned(plugin_router):
    config = config_of(training={"global_batch_size": 64, "precision": "bf16"})
    layout = Layout(config, load_hardware(ROOT / "configs/hardware/h100.yaml"), 8)
    assert layout.experts == 2 and layout.dense_parameters + layout.expert_parameters == layout.size.total
    assert routing(layout) == pytest.approx(layout.tokens * 8 * 5 + layout.routes * 8 * 4)
    prediction = predict(layout)
    assert prediction.first_memory.total > prediction.memory.total  # half of all experts before the controller acts
    assert prediction.step_seconds > 0


def test_a_dense_model_is_upcycled_with_it(plugin_router):
    upcycler = Upcycler(config_of(), UpcyclingOptions(num_experts=8))
    assert not upcycler.keeps_the_function  # its gates do not sum to 1
    mlp = torch.randn(32, 32)
    tensors = dict(upcycler.tensors("gpt.decoder.layers.0.mlp.linear_fc1.weight", mlp))
    assert len(tensors) == 8 and all(torch.equal(tensor, mlp) for tensor in tensors.values())
    assert [name.rpartition(".mlp.")[2] for name, _ in upcycler.routers()] == ["router.weight"] * 2


def test_a_dead_expert_takes_over_its_row_and_its_threshold(plugin_router, groups):
    model = model_of(config_of(), plugin_router, groups)
    (layer, _) = model.recorder.routers
    assert layer.has_row_per_expert("weight", tuple(layer.weight.shape))
    model.controller.state["thresholds"][0, 3] = 0.9
    model.controller.copy_expert(0, source=3, target=5, shape_LE=(2, 8))
    assert model.controller.state["thresholds"][0].tolist() == pytest.approx([0.5] * 3 + [0.9, 0.5, 0.9] + [0.5] * 2)
    assert model.controller.state["thresholds"][1].tolist() == [0.5] * 8
