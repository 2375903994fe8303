"""Train a tiny model for some steps on whatever ranks there are, on data that does not depend on how many."""

from __future__ import annotations

import torch
import torch.distributed as dist

from dsmoe.config import RunConfig, validate_config
from dsmoe.model.names import parameter_pieces
from dsmoe.optim.deepspeed import owned_fragment
from dsmoe.parallel.groups import create_groups
from dsmoe.routers.registry import option_classes
from dsmoe.training.engine import build_engine
from dsmoe.training.schedule import learning_rate

TINY = {
    "model": dict(
        num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2, sequence_length=16, vocab_size=64,
        num_experts=4, moe_ffn_hidden_size=16,
    ),
    "training": dict(
        steps=5, global_batch_size=8, gradient_accumulation=2, lr=1e-3, warmup_steps=0, clip_grad=0.05,
    ),
    "logging": dict(tensorboard=False),
}  # fmt: skip


def tiny_config(**sections) -> RunConfig:
    """The tiny run, with keys of some sections replaced: tiny_config(parallel={"zero_stage": 2})."""
    tree = {name: dict(values) for name, values in TINY.items()}
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    return validate_config(tree, option_classes())


def batch_of(config: RunConfig, step: int, part: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's tokens and labels [B, S] of one micro-step. The sequences of an optimizer step depend on the step
    alone; micro-steps, then ranks, cut them."""
    training, model = config.training, config.model
    shape = (training.global_batch_size, model.sequence_length + 1)
    text = torch.randint(0, model.vocab_size, shape, generator=torch.Generator().manual_seed(1000 + step))
    own = text.chunk(training.gradient_accumulation)[part].chunk(dist.get_world_size())[dist.get_rank()]
    return own[:, :-1].contiguous(), own[:, 1:].contiguous()


def run_steps(
    engine, config: RunConfig, first: int, last: int, batches=batch_of, before_update=lambda totals: None
) -> list[dict]:
    """Optimizer steps [first, last) on `batches(config, step, part)`; what each gave, the same on every rank.
    `before_update` gets the routing totals of a step before its optimizer moves."""
    history = []
    for step in range(first, last):
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate(step, config.training)
        losses = torch.zeros(2)
        for part in range(config.training.gradient_accumulation):
            total, parts = engine(*batches(config, step, part))
            engine.backward(total)
            routers = sum((part for name, part in parts.items() if name != "lm"), torch.zeros(()))
            losses += torch.stack((parts["lm"], routers)) / config.training.gradient_accumulation
            if part == config.training.gradient_accumulation - 1:
                totals = engine.module.recorder.take()
                before_update(totals)
            engine.step()
        dist.all_reduce(losses)
        losses /= dist.get_world_size()
        controller, revival = engine.module.controller, engine.module.revival
        if controller is not None:
            controller.update(totals)
        revived = None if revival is None else revival.update(totals, step + 1)
        history.append(
            {
                "loss": losses[0].item(),
                "router_loss": losses[1].item(),
                "grad_norm": float(engine.get_global_grad_norm()),
                "density": totals.density().item(),
                "counts": totals.counts_LE,
                "revived": revived,
                "state": {} if controller is None else {n: v.clone() for n, v in controller.state.items()},
            }
        )
    return history


def as_numbers(history: list[dict]) -> list[dict]:
    """With lists in place of tensors, so that == compares every bit."""
    return [{name: _numbers(value) for name, value in step.items()} for step in history]


def _numbers(value):
    if isinstance(value, dict):
        return {name: _numbers(inner) for name, inner in value.items()}
    return value.tolist() if isinstance(value, torch.Tensor) else value


def owned_tensors(engine) -> dict[str, torch.Tensor]:
    """This rank's fragments of master weights and moments, by `kind|name|start`."""
    owned = {}
    for parameter, pieces in parameter_pieces(engine.module):
        fragment = owned_fragment(parameter, engine)
        for piece in pieces if fragment else ():
            low = max(piece.start, fragment.start)
            high = min(piece.start + piece.numel, fragment.start + fragment.numel)
            for kind, flat in fragment.tensors.items() if low < high else ():
                own = flat[low - fragment.start : high - fragment.start]
                owned[f"{kind}|{piece.name}|{low - piece.start}"] = own.clone()
    return owned


def whole_tensors(results: list[dict]) -> dict[str, torch.Tensor]:
    """Fragments of all ranks joined: `kind|name` -> flat fp32 tensor."""
    parts: dict[str, dict[int, torch.Tensor]] = {}
    for owned in results:
        for key, value in owned.items():
            name, start = key.rsplit("|", 1)
            parts.setdefault(name, {})[int(start)] = value
    return {name: torch.cat([actual[start] for start in sorted(actual)]) for name, actual in parts.items()}


def fresh_engine(config: RunConfig):
    """The engine of a fresh model, ready to train."""
    engine = build_engine(config, create_groups(config.parallel.expert_parallel, config.parallel.placement))
    engine.train()
    return engine


def train(config: RunConfig, steps: int = 5, batches=batch_of) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """A fresh model, some steps: (history, this rank's fragments)."""
    engine = fresh_engine(config)
    return run_steps(engine, config, 0, steps, batches), owned_tensors(engine)


def train_each(configs: list[RunConfig], steps: int = 5, batches=batch_of) -> list[tuple]:
    """`train` for one configuration after another: many small cases for one start of the ranks."""
    return [train(config, steps, batches) for config in configs]


def joined(results: list[list[tuple]]) -> list[tuple[list[dict], dict[str, torch.Tensor]]]:
    """What `train_each` gave on all ranks, by configuration: rank 0's history and the whole tensors."""
    return [(case[0][0], whole_tensors([owned for _, owned in case])) for case in zip(*results, strict=True)]


def largest_difference(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], kinds=("weight", "exp_avg")):
    """Over all tensors of these kinds, which must be the same ones. Of moments in units of the largest one: they are as
    small as gradients."""
    assert actual.keys() == expected.keys()
    worst = 0.0
    for kind in kinds:
        names = [name for name in expected if name.startswith(f"{kind}|")]
        scale = 1.0 if kind == "weight" else max(expected[name].abs().max().item() for name in names)
        worst = max(worst, *((actual[name] - expected[name]).abs().max().item() / scale for name in names))
    return worst
