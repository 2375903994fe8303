"""Gradients, updates and revival of single experts, at every layout and ZeRO stage, against plain computations."""

from __future__ import annotations

from pathlib import Path

import fixed_routes  # noqa: F401  (registers the router)
import pytest
import torch
from ranks import once, run_ranks
from steps import batch_of, fresh_engine, owned_tensors, run_steps, tiny_config, whole_tensors

from dsmoe.checkpoint.load import load_checkpoint
from dsmoe.checkpoint.save import save_checkpoint
from dsmoe.checkpoint.verify import verify_checkpoint
from dsmoe.optim.deepspeed import owned_fragment
from dsmoe.training.experts import ExpertGradients, LoadScaledUpdates, load_scale, packed_experts

LAYOUTS = [(1, 1), (2, 2), (4, 2)]  # ranks, expert parallel
EXPERTS = ("gate_up_proj", "down_proj")


def config_of(parallel: int, stage: int, router=None, **training):
    return tiny_config(
        router=router or {"name": "fixed", "routes": "mixed"},
        parallel={"expert_parallel": parallel, "zero_stage": stage},
        training={"gradient_accumulation": 2, "clip_grad": 0.0, **training},
    )


def gradient_norms(configs) -> list:
    return [_gradient_norms(config) for config in configs]


def _gradient_norms(config) -> list:
    engine = fresh_engine(config)
    gradients = ExpertGradients(engine, engine.module.groups)
    run_steps(engine, config, 0, 1, before_update=lambda totals: gradients.watch())
    return gradients.norms().tolist()


def plain_gradient_norms(config) -> list:
    """On one rank, by autograd alone."""
    engine = fresh_engine(config)
    model, parts = engine.module, config.training.gradient_accumulation
    squares = torch.zeros(2, config.model.num_experts, dtype=torch.float64)
    parameters = [packed.parameter for packed in packed_experts(model)]
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    for part in range(parts):
        loss, _ = model(*batch_of(config, 0, part))
        for total, grad in zip(sums, torch.autograd.grad(loss, parameters), strict=True):
            total += grad / parts
    for packed, grad in zip(packed_experts(model), sums, strict=True):
        squares[packed.layer] += grad.double().flatten(1).square().sum(1)
    return squares.sqrt().tolist()


@once
def expected_norms() -> list:
    (actual,) = run_ranks(1, plain_gradient_norms, config_of(1, 1))
    return actual


@pytest.mark.parametrize(("ranks", "parallel"), LAYOUTS)
def test_gradient_norms_of_experts_are_those_of_autograd(ranks, parallel):
    every_rank = run_ranks(ranks, gradient_norms, [config_of(parallel, stage) for stage in (1, 2, 3)])
    for by_stage in every_rank:
        for norms in by_stage:
            torch.testing.assert_close(torch.tensor(norms), torch.tensor(expected_norms()), rtol=1e-4, atol=1e-7)
    assert torch.tensor(expected_norms()).gt(0).sum(1).tolist() == [3, 3]


def scaled(configs) -> list:
    """Weights before, after a plain step, and after a scaled one; and the counts."""
    actual = []
    for config in configs:
        engine = fresh_engine(config)
        before = owned_tensors(engine)
        run_steps(engine, config, 0, 1)
        plain = owned_tensors(engine)
        engine = fresh_engine(config)
        updates = LoadScaledUpdates(engine)
        history = run_steps(engine, config, 0, 1, before_update=updates.follow)
        actual.append((before, plain, owned_tensors(engine), history[0]["counts"]))
    return actual


@pytest.mark.parametrize(("ranks", "parallel"), LAYOUTS)
def test_an_experts_update_follows_its_load(ranks, parallel):
    router = {"name": "fixed", "routes": "last_experts_receive_nothing"}
    every_rank = run_ranks(ranks, scaled, [config_of(parallel, stage, router) for stage in (1, 2, 3)])
    for by_rank in zip(*every_rank, strict=True):
        before, plain, actual = (whole_tensors([rank[i] for rank in by_rank]) for i in range(3))
        scale_LE = load_scale(by_rank[0][3])
        assert scale_LE[:, 2:].eq(0).all() and scale_LE[:, :2].gt(0).all()
        assert (scale_LE - 1).abs()[:, 0].min() > 0.5  # or this would show nothing
        for name in (name for name in before if name.startswith("weight|")):
            layer = int(name.split(".layers.")[1].split(".")[0]) if ".layers." in name else 0
            expert = int(name.split(".experts.")[1].split(".")[0]) if ".experts." in name else None
            share = 1.0 if expert is None else scale_LE[layer, expert]
            expected = before[name] + share * (plain[name] - before[name])
            assert (actual[name] - expected).abs().max() <= 1e-7, name
            if expert is not None and expert >= 2:
                assert torch.equal(actual[name], before[name]), name


def revived(configs, folders) -> list:
    """Four steps with revival, and four with a stop after three; what was revived, all tensors, idle counts."""
    actual = []
    for config, folder in zip(configs, folders, strict=True):
        engine = fresh_engine(config)
        history = run_steps(engine, config, 0, 4)
        model = {piece: tensor.clone() for piece, tensor in owned_tensors(engine).items()}
        whole = history, model, engine.module.revival.idle_LE, _seen_by_the_model(engine)
        engine = fresh_engine(config)
        run_steps(engine, config, 0, 3)
        save_checkpoint(engine, config, 3, 3 * config.training.global_batch_size)
        engine = fresh_engine(config)
        load_checkpoint(engine, config, Path(folder) / "checkpoints" / "step_00000003")
        again = run_steps(engine, config, 3, 4)
        actual.append((*whole, again, owned_tensors(engine), engine.module.revival.idle_LE))
    return actual


def _seen_by_the_model(engine) -> float:
    """The loss of a batch, which shows that the weights in use are those of the optimizer, on every rank."""
    with torch.no_grad():
        loss, _ = engine.module(*(part[:1] for part in batch_of(tiny_config(), 9, 0)))
    engine.module.recorder.take()
    return loss.item()


def revival_configs(parallel: int, folder: Path) -> tuple[list, list]:
    router = {"name": "fixed", "routes": "last_experts_receive_nothing"}
    folders = [folder / f"{parallel}-{stage}" for stage in (1, 2, 3)]
    configs = [config_of(parallel, stage, router, revive_idle_experts=2).model_copy(deep=True) for stage in (1, 2, 3)]
    for config, own in zip(configs, folders, strict=True):
        config.logging.run_dir = str(own)
    return configs, [str(own) for own in folders]


def test_revival_is_the_same_at_every_layout_and_after_a_resume(tmp_path):
    """Trains and resumes under ZeRO 1, 2 and 3 at every layout, up to four ranks: 20 s on two cores."""
    expected = None
    for ranks, parallel in LAYOUTS:
        every_rank = run_ranks(ranks, revived, *revival_configs(parallel, tmp_path / f"{ranks}"))
        for by_rank in zip(*every_rank, strict=True):
            history, _, idle_LE, _, again, _, idle_again_LE = by_rank[0]
            # In each layer one expert is above the mean: 2 becomes its twin at step 2, then 3, then 2 again.
            assert [step["revived"] for step in history] == [0, 2, 2, 2]
            tensors, resumed = (whole_tensors([rank[i] for rank in by_rank]) for i in (1, 5))
            assert idle_LE.tolist() == idle_again_LE.tolist() == [[0, 0, 0, 1]] * 2
            assert again[0]["revived"] == 2
            assert all(torch.equal(tensors[name], resumed[name]) for name in tensors)
            if expected is None:
                expected = tensors
            for name, tensor in expected.items():
                assert (tensors[name] - tensor).abs().max() <= 1e-5, name
    for folder in tmp_path.glob("*/*/checkpoints/step_00000003"):
        assert not verify_checkpoint(folder).problems
    _check_twins(expected)


def _check_twins(tensors: dict[str, torch.Tensor]) -> None:
    """The last thing that happened: expert 2 became expert 0 but for a tenth of noise on its weights."""
    for layer in range(2):
        for own in EXPERTS:
            twin, model = (tensors[f"weight|{_expert(layer, e)}.{own}"] for e in (2, 0))
            assert 0.07 < ((twin - model).square().mean() / model.square().mean()).sqrt() < 0.13
            assert torch.equal(*(tensors[f"exp_avg_sq|{_expert(layer, e)}.{own}"] for e in (2, 0)))
            assert not tensors[f"exp_avg|{_expert(layer, 2)}.{own}"].any()
        row_EH = tensors[f"weight|gpt.decoder.layers.{layer}.mlp.router.weight"].view(4, -1)
        assert 0.03 < ((row_EH[2] - row_EH[0]).square().mean() / row_EH[0].square().mean()).sqrt() < 0.2


def _expert(layer: int, expert: int) -> str:
    return f"gpt.decoder.layers.{layer}.mlp.experts.{expert}"


def starve_and_revive(patience: int) -> tuple[list, list]:
    """Experts 2 and 3 of 4 score 0 where one of the others scores more: routes of a step before and after."""
    config = config_of(1, 1, {"name": "topk", "k": 1, "balance_coefficient": 0.0}, revive_idle_experts=patience)
    engine = fresh_engine(config)
    for name, parameter in engine.module.named_parameters():
        if name.endswith("router.weight"):
            row = torch.randn(parameter.size(1), generator=torch.Generator().manual_seed(3))
            rows = torch.stack((row, -row, torch.zeros_like(row), torch.zeros_like(row)))
            parameter.data.copy_(rows)
            fragment = owned_fragment(parameter, engine)
            fragment.tensors["weight"].copy_(rows.flatten()[fragment.start : fragment.start + fragment.numel])
    history = run_steps(engine, config, 0, 6)
    return history[0]["counts"].tolist(), history[-1]["counts"].tolist()


@pytest.mark.parametrize("patience", [0, 3])
def test_tokens_come_to_experts_that_were_idle(patience):
    ((first, last),) = run_ranks(1, starve_and_revive, patience)
    assert all(counts[2:] == [0, 0] for counts in first)
    assert all((min(counts[2:]) > 0) == bool(patience) for counts in last)
