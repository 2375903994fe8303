"""What this rank's ZeRO optimizer owns of a parameter, whatever the stage.

Under ZeRO every parameter's fp32 master weight and Adam moments are cut over the ranks that share it: the data-
parallel group for dense parameters, the expert-data-parallel group for experts. A `Fragment` is this rank's part,
as flat views into the optimizer's own memory, so saving reads it and loading writes it without any collective.
This is the one module that knows DeepSpeed's internal names; tests/unit/test_framework_contracts.py holds them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("weight", "exp_avg", "exp_avg_sq")  # fp32 master weight and Adam's two moments


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + numel) of the flattened parameter."""

    start: int
    numel: int
    tensors: dict[str, Tensor]  # kind -> flat view; without moments before the first step
    flat: Tensor  # what the inner AdamW steps on
    offset: int  # of the fragment in it

    def gradient(self) -> Tensor | None:
        """A flat fp32 view of the gradient, which exists while the inner AdamW is about to use it."""
        return None if self.flat.grad is None else self.flat.grad.narrow(0, self.offset, self.numel)


def owned_fragment(parameter, engine) -> Fragment | None:
    """This rank's fragment of a parameter, or None if it owns nothing of it."""
    if hasattr(parameter, "ds_id"):
        return _zero3_fragment(parameter, engine.optimizer)
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    # Not mapping.optim_fragment: DeepSpeed links it after the first group's first step and misses all other groups.
    flat = flat_master_weights(engine.optimizer)[mapping.param_group_index]
    place, source = mapping.lp_fragment_address, mapping.hp_fragment_address
    tensors = _views(engine.optimizer, flat, source.start, source.numel)
    return Fragment(place.start, place.numel, tensors, flat, source.start)


def _zero3_fragment(parameter, optimizer) -> Fragment | None:
    group, offset, partition = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = partition * optimizer._get_param_partition_rank(parameter)
    numel = min(partition, parameter.ds_numel - start)  # the last ranks' parts are padded
    if numel <= 0:
        return None
    flat = optimizer.fp32_partitioned_groups_flat[group]
    return Fragment(start, numel, _views(optimizer, flat, offset, numel), flat, offset)


def _views(optimizer, flat: Tensor, offset: int, numel: int) -> dict[str, Tensor]:
    """The same elements of a flat master weight and of its moments."""
    sources = {"weight": flat, **optimizer.optimizer.state.get(flat, {})}
    return {kind: sources[kind].detach().narrow(0, offset, numel) for kind in KINDS if kind in sources}


def flat_master_weights(optimizer) -> list[Tensor]:
    """The flat fp32 tensors that the inner AdamW steps on."""
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    raise TypeError(f"unknown ZeRO optimizer {type(optimizer).__name__}")


def create_moments(engine, step: int) -> None:
    """Give a fresh optimizer the state that AdamW has after `step` steps, with moments of zero to be filled."""
    optimizer = engine.optimizer
    for flat in flat_master_weights(optimizer):
        optimizer.optimizer.state[flat] = {
            "step": torch.tensor(float(step), dtype=torch.float32, device=flat.device),
            "exp_avg": torch.zeros_like(flat),
            "exp_avg_sq": torch.zeros_like(flat),
        }


def write_model_weight(parameter, start: int, values: Tensor) -> None:
    """Set elements [start, start + len(values)) of the flattened parameter that the forward pass uses."""
    if not hasattr(parameter, "ds_id"):
        parameter.data.view(-1)[start : start + values.numel()].copy_(values)
        return
    partition = parameter.ds_tensor
    own_start = parameter.ds_zero_partition_rank * partition.ds_numel
    low, high = max(start, own_start), min(start + values.numel(), own_start + partition.ds_numel)
    if low < high:
        partition.data.view(-1)[low - own_start : high - own_start].copy_(values[low - start : high - start])
    if parameter.data.numel() == parameter.ds_numel:  # small parameters stay whole on every rank
        parameter.data.view(-1)[start : start + values.numel()].copy_(values)
