"""One owner of process groups: DeepSpeed creates them, Megatron-Core receives a `ProcessGroupCollection`.

Every process is a data rank. The experts are spread over groups of `expert_parallel` consecutive ranks (EP); ranks
that hold the same experts form an expert-data-parallel group (EDP), over which expert gradients are reduced. Tensor,
pipeline and context parallel are 1, but Megatron still asks groups of size 1 for their size and rank, so each rank
gets one of its own. Megatron's global `parallel_state` is never initialised.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import deepspeed
import torch
import torch.distributed

from dsmoe.errors import ParallelError
from dsmoe.optim.deepspeed import expert_and_data_groups, skip_shared_memory_op
from dsmoe.parallel.place import find_place
from dsmoe.runtime.device import on_gpu, use_local_device


@dataclass(frozen=True)
class ParallelGroups:
    """The groups of this rank, and its place in them."""

    ep: torch.distributed.ProcessGroup
    edp: torch.distributed.ProcessGroup
    dp: torch.distributed.ProcessGroup
    solo: torch.distributed.ProcessGroup  # this rank alone
    ep_name: str  # DeepSpeed's name of the expert groups, "ep_size_N"

    @property
    def ep_size(self) -> int:
        return self.ep.size()

    @property
    def ep_rank(self) -> int:
        return self.ep.rank()

    @property
    def edp_rank(self) -> int:
        return self.edp.rank()

    @property
    def dp_size(self) -> int:
        return self.dp.size()

    @property
    def dp_rank(self) -> int:
        return self.dp.rank()

    def for_megatron(self):
        """The same groups as Megatron-Core's `ProcessGroupCollection`."""
        from megatron.core.process_groups_config import ProcessGroupCollection

        solo, ep, dp = self.solo, self.ep, self.dp
        return ProcessGroupCollection(
            tp=solo, pp=solo, mp=solo, cp=solo, embd=solo, pos_embd=solo, tp_cp=solo, expt_tp=solo,
            ep=ep, tp_ep=ep, tp_ep_pp=ep, expt_dp=self.edp, dp=dp, dp_cp=dp, tp_dp_cp=dp,
        )  # fmt: skip


def start_processes(timeout_minutes: float = 30) -> None:
    """Join the processes of this job: any launcher's (`dsmoe.parallel.place`), or this one alone without a launcher."""
    skip_shared_memory_op()
    if torch.distributed.is_initialized():
        use_local_device()
        return
    find_place()
    _share_cores()
    use_local_device()
    deepspeed.init_distributed(timeout=timedelta(minutes=timeout_minutes), verbose=False)


def _share_cores() -> None:
    """On a CPU host, give each local rank its share of the cores: oversubscribed threads slow all of them down."""
    if on_gpu() or "OMP_NUM_THREADS" in os.environ:
        return
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "WORLD_SIZE")
    local_ranks = int(next((os.environ[name] for name in names if name in os.environ), "1"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // local_ranks))


def check_world(world_size: int, expert_parallel: int, global_batch_size: int, gradient_accumulation: int) -> None:
    """Refuse a number of processes that the plan does not fit. Raises `ParallelError` naming both numbers."""
    if world_size % expert_parallel:
        raise ParallelError(
            f"{world_size} processes were launched, but parallel.expert_parallel is {expert_parallel}: the number of "
            f"processes must be a multiple of it. Launch {expert_parallel} (for example "
            f"'deepspeed --num_gpus {expert_parallel} launch/train.py ...') or set parallel.expert_parallel to a "
            f"divisor of {world_size}"
        )
    parts = world_size * gradient_accumulation
    if global_batch_size % parts:
        raise ParallelError(
            f"training.global_batch_size is {global_batch_size}, which {world_size} processes x "
            f"training.gradient_accumulation {gradient_accumulation} = {parts} do not divide"
        )


def create_groups(expert_parallel: int) -> ParallelGroups:
    """Make all groups of this job, once per expert-parallel size; every rank must call it."""
    world_size = torch.distributed.get_world_size()
    check_world(world_size, expert_parallel, global_batch_size=world_size, gradient_accumulation=1)
    ep, edp, dp = expert_and_data_groups(expert_parallel)
    return ParallelGroups(ep=ep, edp=edp, dp=dp, solo=_solo_group(), ep_name=f"ep_size_{expert_parallel}")


_solo: torch.distributed.ProcessGroup | None = None


def _solo_group() -> torch.distributed.ProcessGroup:
    """A group of this rank alone; made once, since groups are never freed before the job ends."""
    global _solo
    if _solo is None:
        _solo = torch.distributed.new_group([torch.distributed.get_rank()], use_local_synchronization=True)
    return _solo
