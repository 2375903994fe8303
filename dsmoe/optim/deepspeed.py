"""Everything that dsmoe knows of DeepSpeed's insides; no other module uses a name that DeepSpeed has not published.

Three parts: what makes DeepSpeed treat experts as experts, what a rank's ZeRO optimizer owns of a parameter, and where
gradients lie. tests/unit/test_framework_contracts.py holds each piece to the pinned version, and searches the other
modules for private names.

Under ZeRO every parameter's fp32 master weight and optimizer state are cut over the ranks that share it: the data-
parallel group for dense parameters, the expert-data-parallel group for experts. A `Fragment` is this rank's part, as
flat views into the optimizer's own memory, so saving reads it and loading writes it without any collective.

Gradients on a CPU are written once, where the optimizer reads them. Under ZeRO 1 and 2 DeepSpeed takes a large gradient
through memory six times between the backward pass and the optimizer: divided by the ranks, flattened, reduced and
copied back, copied into the rank's partition, widened to fp64 for its norm, and flattened again. With many experts
these passes take longer than the experts. `spare_copies` changes where tensors lie and nothing that DeepSpeed computes,
so each of its copies finds source and target to be the same memory.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from dsmoe.runtime.buffers import buffer_pool, part
from dsmoe.runtime.megatron import uncompiled

with uncompiled():
    import deepspeed.ops
    import deepspeed.runtime.zero.muon.original_muon
    import deepspeed.runtime.zero.utils
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
    from deepspeed.utils import groups as deepspeed_groups

BLOCK = 4096  # numbers whose squares are summed in fp32; the sum over blocks is fp64


# --- Experts and their groups ----------------------------------------------------------------------------------------


class ExpertModule(AutoEPMoELayer):
    """Base of modules that hold experts. DeepSpeed's engine recognises them by class alone, and AutoEP's layer is the
    only one it accepts under ZeRO-3. Nothing of AutoEP's own code runs."""

    def __init__(self):
        nn.Module.__init__(self)  # not AutoEP's constructor, which converts a Hugging Face block

    def set_deepspeed_parallelism(self, *args, **kwargs) -> None:
        """Called by DeepSpeed's engine; the groups exist already."""


def mark_expert_parameter(parameter: nn.Parameter, ep: torch.distributed.ProcessGroup, first_expert: int) -> None:
    """Say that a packed parameter [e, ...] holds the experts `first_expert` ... and differs between the ranks of `ep`.

    These attributes are what DeepSpeed reads: reduce over the expert-data-parallel group (all ZeRO stages) and
    partition over it (stage 3); `first_expert` is what `dsmoe.model.names` reads.
    """
    parameter.allreduce = False
    parameter.group_name = parameter.ds_zero_partition_group_name = f"ep_size_{ep.size()}"
    parameter.ds_zero_placement_family = "autoep_expert"
    parameter.first_expert = first_expert


def share_expert_groups(
    ep: torch.distributed.ProcessGroup, edp: torch.distributed.ProcessGroup
) -> torch.distributed.ProcessGroup:
    """Have DeepSpeed use these expert-parallel and expert-data-parallel groups of this rank. Returns DeepSpeed's
    data-parallel group; collective.

    DeepSpeed would create its own over consecutive ranks, wherever those are, and have all ranks wait for each other
    once a group.
    """
    name = f"ep_size_{ep.size()}"
    for groups, ranks, group in (
        (deepspeed_groups._EXPERT_PARALLEL_GROUP, deepspeed_groups._EXPERT_PARALLEL_GROUP_RANKS, ep),
        (deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP, deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP_RANKS, edp),
    ):
        groups[name], ranks[name] = group, torch.distributed.get_process_group_ranks(group)
    return deepspeed_groups._get_data_parallel_group()


def spare_probes(local_ranks: int | None) -> None:
    """Say beforehand what DeepSpeed would find out by starting other programs.

    `init_distributed` asks which of its operators a compiler can build here, to build (45 s) one that serves inference
    on one CPU node only: none. On CPUs ZeRO-3 asks numactl for the number of devices at every reduction, unless
    DeepSpeed's launcher has put it into the environment; `local_ranks` None leaves it to ask.
    """
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    if local_ranks is not None:
        os.environ["LOCAL_SIZE"] = str(local_ranks)


# --- What a rank owns of a parameter ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + numel) of the flattened parameter."""

    start: int
    numel: int
    tensors: dict[str, Tensor]  # "weight" and the optimizer's states -> flat view; "weight" alone before the first step
    flat: Tensor  # what the inner optimizer steps on
    offset: int  # of the fragment in it

    def gradient(self) -> Tensor | None:
        """A flat fp32 view of the gradient, which exists while the inner optimizer is about to use it."""
        return None if self.flat.grad is None else self.flat.grad.narrow(0, self.offset, self.numel)


def inner_optimizer(engine) -> torch.optim.Optimizer:
    """The torch optimizer under ZeRO's, which steps on flat fp32 tensors."""
    return engine.optimizer.optimizer


def accept_optimizer(kind: type[torch.optim.Optimizer]) -> None:
    """Have DeepSpeed take optimizers of this class under ZeRO without a warning: dsmoe's are elementwise, which is all
    that ZeRO asks for."""
    known = deepspeed.runtime.zero.utils.ZERO_SUPPORTED_OPTIMIZERS
    if kind not in known:
        known.append(kind)


def veto_steps(engine, veto: Callable[[float], bool]) -> None:
    """Leave weights and optimizer state alone in a step whose gradient norm is not finite, or in which `veto`, which
    gets the norm, says so. DeepSpeed does all else as in any step: gradients are cleared. Where it sees by itself that
    the norm is not finite, `veto` is not asked. Ranks must be of one mind; the norm is of all."""
    inner, optimizer = inner_optimizer(engine), engine.optimizer
    step = inner.step
    norm = vetoed = None

    def step_unless_vetoed(*args, **kwargs):
        nonlocal norm, vetoed
        # DeepSpeed steps on one group of parameters after the other; reading the norm waits for the device.
        if norm is not optimizer._global_grad_norm:
            norm = optimizer._global_grad_norm
            number = float(norm)
            vetoed = veto(number) or not math.isfinite(number)
        return None if vetoed else step(*args, **kwargs)

    inner.step = step_unless_vetoed


def owned_fragment(parameter: nn.Parameter, engine) -> Fragment | None:
    """This rank's fragment of a parameter, or None if it owns nothing of it."""
    if is_partitioned(parameter):
        return _zero3_fragment(parameter, engine.optimizer)
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    # Not mapping.optim_fragment: DeepSpeed links it after the first group's first step and misses all other groups.
    flat = flat_master_weights(engine)[mapping.param_group_index]
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
    """The same elements of a flat master weight and of every state that has one number for each of its elements."""
    state = optimizer.optimizer.state.get(flat, {})
    sources = {"weight": flat, **{name: value for name, value in state.items() if _is_per_element(value, flat)}}
    return {kind: source.detach().narrow(0, offset, numel) for kind, source in sources.items()}


def _is_per_element(value, flat: Tensor) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == flat.shape


def flat_master_weights(engine) -> list[Tensor]:
    """The flat fp32 tensors that the inner optimizer steps on."""
    optimizer = engine.optimizer
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    raise TypeError(f"unknown ZeRO optimizer {type(optimizer).__name__}")


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO-3 has cut it over ranks, and gathers it when it is used."""
    return hasattr(parameter, "ds_id")


def logical_shape(parameter: Tensor) -> tuple[int, ...]:
    """Of all of it: ZeRO-3 leaves an empty tensor in place."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def write_model_weight(parameter: nn.Parameter, start: int, values: Tensor) -> None:
    """Set elements [start, start + len(values)) of the flattened parameter that the forward pass uses."""
    if not is_partitioned(parameter):
        parameter.data.view(-1)[start : start + values.numel()].copy_(values)
        return
    partition = parameter.ds_tensor
    own_start = parameter.ds_zero_partition_rank * partition.ds_numel
    low, high = max(start, own_start), min(start + values.numel(), own_start + partition.ds_numel)
    if low < high:
        partition.data.view(-1)[low - own_start : high - own_start].copy_(values[low - start : high - start])
    if parameter.data.numel() == parameter.ds_numel:  # small parameters stay whole on every rank
        parameter.data.view(-1)[start : start + values.numel()].copy_(values)


# --- Where gradients lie ---------------------------------------------------------------------------------------------


def spare_copies(engine, stage: int) -> None:
    """Make DeepSpeed's engine, in fp32 on a CPU, spare what it can; with ZeRO 3, which collects gradients otherwise,
    the copy in fp64 alone."""
    optimizer = engine.optimizer
    _norms_by_block(optimizer)
    if stage < 3:
        optimizer.flatten = buffer_pool.flatten
        _collect_in_place(engine.module, optimizer)
        _divide_in_the_loss(engine.module, optimizer)


def _collect_in_place(module: torch.nn.Module, optimizer) -> None:
    """Gradients of this rank's partition in one kept piece of memory, in the order in which the optimizer wants them,
    into which experts write their weights' gradients themselves. DeepSpeed asks for it anew in every step, and fills it
    in the order in which gradients come."""
    owned = [parameter for group in optimizer.params_in_partition for parameter in group]
    *offsets, total = accumulate((parameter.numel() for parameter in owned), initial=0)
    start = {id(parameter): at for parameter, at in zip(owned, offsets, strict=True)}

    def provide(module, inputs) -> None:
        if not (module.training and torch.is_grad_enabled() and optimizer.grads_in_partition is None):
            return
        buffer_pool.promise(())  # what was not used holds memory
        memory = buffer_pool.empty([total], optimizer.dtype)
        optimizer.grads_in_partition = memory
        buffer_pool.promise((parameter, part(memory, start[id(parameter)], parameter.shape)) for parameter in owned)

    copy = optimizer.copy_grads_in_partition

    def copy_to_its_place(parameter, group_idx=None) -> None:
        optimizer.grads_in_partition_offset = start[id(parameter)]
        copy(parameter, group_idx)

    module.register_forward_pre_hook(provide)
    optimizer.copy_grads_in_partition = copy_to_its_place


def _divide_in_the_loss(module: torch.nn.Module, optimizer) -> None:
    """The mean over ranks taken once, in the gradient of the loss, which is the first output."""
    if not optimizer.gradient_average:
        return
    optimizer.gradient_average = False
    ranks = torch.distributed.get_world_size(optimizer.dp_process_group)

    def divide(module, inputs, outputs) -> None:
        loss = outputs[0]
        if loss.requires_grad:
            loss.register_hook(lambda grad: grad / ranks)

    module.register_forward_hook(divide)


def _norms_by_block(optimizer) -> None:
    """DeepSpeed's norm of the norms of blocks, instead of a copy of everything in fp64."""
    norm = optimizer.get_grad_norm_direct

    def norm_of_blocks(gradients, params, norm_type=2):
        if norm_type != 2:
            return norm(gradients, params, norm_type)
        return norm([_blocks(gradient) for gradient in gradients], params)

    optimizer.get_grad_norm_direct = norm_of_blocks


def _blocks(gradient: Tensor) -> Tensor:
    """fp64 norms of a tensor's blocks."""
    flat = gradient.detach().reshape(-1)
    whole = len(flat) // BLOCK * BLOCK
    norms = [
        torch.linalg.vector_norm(flat[:whole].view(-1, BLOCK), dim=1),
        torch.linalg.vector_norm(flat[whole:]).view(1),
    ]
    block_norms = torch.cat(norms).double()
    if getattr(gradient, "_zero_padding", False):
        block_norms._zero_padding = True  # DeepSpeed leaves these out, to have one tensor for each parameter
    return block_norms
