"""Find where the first number that is not finite comes from."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


def first_bad_tensor(model: nn.Module, batch: dict[str, Tensor]) -> str:
    """Name the first tensor of a forward pass that is not finite, over all ranks; collective.

    A weight that is not finite comes before the activations it spoils.
    """
    bad = next((f"weight {name}" for name, p in model.named_parameters() if not torch.isfinite(p).all()), None)
    found: list[str] = [] if bad is None else [bad]
    handles = []
    for name, module in model.named_modules():
        if name and not any(True for _ in module.children()):
            handles.append(module.register_forward_hook(_watch(name, found)))
    try:
        with torch.no_grad():
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found[0] if found else None)
    return next((f"{text} on rank {rank}" for rank, text in enumerate(everyone) if text), "the loss itself")


def _watch(name: str, found: list[str]):
    def hook(module, inputs, output):
        values = output if isinstance(output, tuple | list) else (output,)  # some of Megatron's return functions
        tensors = [value for value in values if isinstance(value, Tensor)]
        if any(t.is_floating_point() and not torch.isfinite(t).all() for t in tensors):
            found.append(f"output of {name}")

    return hook
