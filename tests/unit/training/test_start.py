"""What a rank says of the run that it is to start."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy
import pytest

from dsmoe.config import validate_config
from dsmoe.data.megatron import indexed_dataset
from dsmoe.errors import ParallelError
from dsmoe.lab.planner.hardware import load_hardware
from dsmoe.lab.planner.layout import Layout
from dsmoe.lab.planner.memory import expected_bytes, memory
from dsmoe.routers.registry import option_classes
from dsmoe.training.start import Start, fit_plan, state_bytes

ROOT = Path(__file__).resolve().parents[3]

MODEL = dict(
    num_layers=3, hidden_size=64, num_attention_heads=4, num_query_groups=2, vocab_size=512, num_experts=8,
    moe_ffn_hidden_size=96, moe_layer_freq=[0, 1, 1], moe_shared_expert_intermediate_size=32,
)  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_memory_a_rank_needs_at_least_is_the_planners_state(stage, precision):
    tree = {
        "model": MODEL, "parallel": {"expert_parallel": 4, "zero_stage": stage}, "training": {"precision": precision},
    }  # fmt: skip
    config = validate_config(tree, option_classes())
    layout = Layout(config, load_hardware(Path("configs/hardware/h100.yaml")), ranks=8)
    assert state_bytes(config, 8) == pytest.approx(memory(layout).state, rel=0.01)
    expected = expected_bytes(config, 8)
    assert expected > memory(layout).state
    longer = config.model_copy(update={"model": config.model.model_copy(update={"sequence_length": 4096})})
    assert expected_bytes(longer, 8) > 2 * expected


@pytest.mark.parametrize(
    ("world", "experts", "accumulation"), [(8, 4, 1), (4, 4, 1), (2, 2, 1), (1, 1, 1), (6, 2, 1), (3, 1, 1)]
)
def test_a_plan_is_fitted_to_the_ranks_there_are(world, experts, accumulation):
    config = fit_plan(planned(), world)
    assert (config.parallel.expert_parallel, config.training.gradient_accumulation) == (experts, accumulation)


def test_a_plan_that_cannot_be_fitted_is_refused():
    with pytest.raises(ParallelError, match="global_batch_size is 24, which 5 processes do not divide"):
        fit_plan(planned(), 5)


def test_accumulation_grows_where_it_must():
    config = fit_plan(planned(gradient_accumulation=2, global_batch_size=12), 4)
    assert config.training.gradient_accumulation == 3


def planned(**training):
    tree = {"model": MODEL, "parallel": {"expert_parallel": 4}, "training": {"global_batch_size": 24, **training}}
    return validate_config(tree, option_classes())


def write_tokens(prefix: Path, first: int) -> str:
    builder = indexed_dataset().IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    for number in range(4):
        builder.add_document(numpy.arange(40) + first + number, [40])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def test_what_ranks_must_have_the_same_follows_configuration_data_and_checkpoint(tmp_path):
    def said(data: str, **training) -> dict[str, str]:
        tree = {
            "model": MODEL, "data": {"path": data, "valid_fraction": 0.3}, "training": training,
            "logging": {"run_dir": str(tmp_path / "run")},
        }  # fmt: skip
        return Start.read(validate_config(tree, option_classes())).equal

    data, other_data = write_tokens(tmp_path / "data", 0), write_tokens(tmp_path / "other", 1)
    first = said(data)
    assert first == said(data)
    assert changed(first, said(data, lr=1e-5)) == {"configuration"}
    assert "data" in changed(first, said(other_data))
    shutil.copytree(ROOT / "tests/fixtures/run_of_0031a16/checkpoints", tmp_path / "run/checkpoints")
    assert changed(first, said(data)) == {"checkpoint to resume"}


def changed(first: dict[str, str], second: dict[str, str]) -> set[str]:
    return {name for name in first if first[name] != second[name]}
