"""Gradients on a CPU: written once, where the optimizer reads them.

Under ZeRO 1 and 2 DeepSpeed takes a large gradient through memory six times between the backward pass and the
optimizer: divided by the ranks, flattened, reduced and copied back, copied into the rank's partition, widened to fp64
for its norm, and flattened again. With many experts these passes take longer than the experts. What follows changes
where tensors lie and nothing that DeepSpeed computes, so each of its copies finds source and target to be the same
memory.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from dsmoe.runtime.buffers import buffer_pool, part

BLOCK = 4096  # numbers whose squares are summed in fp32; the sum over blocks is fp64


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
    found = torch.cat(norms).double()
    if getattr(gradient, "_zero_padding", False):
        found._zero_padding = True  # DeepSpeed leaves these out, to have one tensor for each parameter
    return found
