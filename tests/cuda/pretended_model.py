"""Functions for ranks: a small model on pretended CUDA beside the same on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dsmoe.config import validate_config
from dsmoe.model.gpt import LanguageModel
from dsmoe.parallel.groups import ParallelGroups, create_groups, start_processes
from dsmoe.routers import available, get
from dsmoe.routers.base import Router
from dsmoe.routers.registry import option_classes
from dsmoe.runtime.device import device_name

ROUTERS = [name for name, router in available().items() if router.__module__.startswith("dsmoe.")]
SIZES = dict(
    num_layers=2, hidden_size=64, num_attention_heads=4, num_query_groups=2, sequence_length=32, num_experts=8,
    moe_ffn_hidden_size=48, vocab_size=128, init_std=0.06, experts_implementation="grouped_mm",
)  # fmt: skip
VARIANTS = {
    "plain": {},
    "recompute, parts, shared": {"recompute": "full", "moe_chunks": 3, "moe_shared_expert_intermediate_size": 32},
}


def join(ep: int) -> tuple[ParallelGroups, int]:
    """The groups of a job that pretends, and this rank."""
    start_processes()
    return create_groups(ep), torch.distributed.get_rank()


def config_of(router: str, ep: int = 1, training: dict | None = None, **model):
    options = {"routing_free": {"rescale": True, "rank": 8}, "aoe": {"rank": 8}}.get(router, {})
    tree = {
        "model": SIZES | model, "router": {"name": router, **options}, "parallel": {"expert_parallel": ep},
        "training": training or {},
    }  # fmt: skip
    return validate_config(tree, option_classes())


def build(router: str, groups, dtype: torch.dtype, ep: int = 1, **model) -> LanguageModel:
    config = config_of(router, ep, **model)
    router_class = get(config.router.name)
    options = router_class.Options.model_validate(config.router.options)
    return LanguageModel(config.model, (router_class, options), groups, seed=1).to(dtype)


def one_pass(model: LanguageModel, tokens: torch.Tensor, labels: torch.Tensor, update: bool = True):
    """Loss and counts of a forward and backward pass, after which the controller has been updated."""
    model.train()
    loss, _ = model(tokens, labels)
    loss.backward()
    totals = model.recorder.take()
    if update and model.controller is not None:
        model.controller.update(totals)
    return loss.detach(), totals


def to_gpu(model: LanguageModel) -> LanguageModel:
    if model.controller is not None:
        model.controller.to(device_name())
    return model.to(device_name())


def tokens_of(rank: int, rows: int = 2, length: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(rank)
    tokens = torch.randint(0, SIZES["vocab_size"], (rows, length + 1), generator=random)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def worst(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], share: float = 0.0) -> float:
    """The largest difference of a gradient, relative to its norm or, if more, to a `share` of the norm of all."""
    floor = max(1e-9, share * sum(gradient.norm() ** 2 for gradient in expected.values()) ** 0.5)
    return max(((actual[name] - g).norm() / g.norm().clamp(min=floor)).item() for name, g in expected.items())


def gradients(model: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: p.grad.detach().cpu().double() for name, p in model.named_parameters() if p.grad is not None}


def to_device(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.to(device_name()) for tensor in tensors]


def over_all_ranks(value: int) -> int:
    total = torch.tensor(value, device=device_name())
    torch.distributed.all_reduce(total)
    return int(total)


@contextmanager
def maps(model: LanguageModel) -> Iterator[list[torch.Tensor]]:
    """The routing map of every router call inside, on the host."""
    seen: list[torch.Tensor] = []
    routers = [module for module in model.modules() if isinstance(module, Router)]
    hooks = [r.register_forward_hook(lambda _, inputs, outputs: seen.append(outputs[1].cpu())) for r in routers]
    yield seen
    for hook in hooks:
        hook.remove()


@contextmanager
def marks(model: LanguageModel, watch, *names: str) -> Iterator[None]:
    """An event of kind "mark" for every call of the shared experts' modules of these names."""
    modules = [(name, getattr(m, name)) for m in model.modules() if hasattr(m, "linear_fc1") for name in names]
    hooks = [module.register_forward_hook(lambda *_, name=name: watch.mark(name)) for name, module in modules]
    yield
    for hook in hooks:
        hook.remove()
