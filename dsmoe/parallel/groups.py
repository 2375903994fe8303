"""One owner of process groups: DeepSpeed and Megatron-Core (as a `ProcessGroupCollection`) are handed them.

Every process is a data rank. The experts are spread over groups of `expert_parallel` ranks (EP), inside a node where
they fit (`parallel.placement`); ranks that hold the same experts form an expert-data-parallel group (EDP), over which
expert gradients are reduced. Where EP groups span nodes, the ranks of one that share a node form a node group, and
those with the same place on their nodes a lane. Tensor, pipeline and context parallel are 1, but Megatron still asks
groups of size 1 for their size and rank, so each rank gets one of its own. Megatron's global `parallel_state` is never
initialised.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from functools import cache

import deepspeed
import torch
import torch.distributed

from dsmoe.errors import ParallelError
from dsmoe.optim.deepspeed import share_expert_groups, spare_probes
from dsmoe.parallel.collectives import traffic
from dsmoe.parallel.place import find_place
from dsmoe.parallel.topology import ONE_NODE, Topology, expert_parallel_ranks, find_topology
from dsmoe.runtime.device import on_gpu, use_local_device


@dataclass(frozen=True)
class ParallelGroups:
    """The groups of this rank, and its place in them."""

    ep: torch.distributed.ProcessGroup
    edp: torch.distributed.ProcessGroup
    dp: torch.distributed.ProcessGroup
    solo: torch.distributed.ProcessGroup  # this rank alone
    topology: Topology = ONE_NODE
    ep_ranks: tuple[int, ...] = (0,)  # of the job, in the order of `ep`
    node: torch.distributed.ProcessGroup | None = None  # of an EP group that spans nodes evenly: its ranks on this node
    lane: torch.distributed.ProcessGroup | None = None  # and its ranks with this rank's place on all of its nodes

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
    if torch.distributed.is_initialized():
        spare_probes(_local_ranks())
        use_local_device()
        return
    find_place()
    spare_probes(_local_ranks())
    _share_cores()
    use_local_device()
    deepspeed.init_distributed(timeout=timedelta(minutes=timeout_minutes), verbose=False)


def _local_ranks() -> int | None:
    """Ranks of this job on this host; None where the launcher does not say."""
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")
    told = next((os.environ[name] for name in names if name in os.environ), None)
    if told is None:
        return 1 if os.environ.get("WORLD_SIZE", "1") == "1" else None
    return int(told)


def _share_cores() -> None:
    """On a CPU host, give each local rank its share of the cores: oversubscribed threads slow all of them down."""
    if on_gpu() or "OMP_NUM_THREADS" in os.environ:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    local_ranks = _local_ranks() or int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(max(1, cores // local_ranks))


def check_world(world_size: int, expert_parallel: int, global_batch_size: int, gradient_accumulation: int) -> None:
    """Refuse a number of processes that the plan does not fit. Raises `ParallelError` naming both numbers."""
    if world_size % expert_parallel:
        raise ParallelError(
            f"{world_size} processes were launched, but parallel.expert_parallel is {expert_parallel}: the number of "
            f"processes must be a multiple of it. Launch {expert_parallel} (for example "
            f"'deepspeed --num_gpus {expert_parallel} --module dsmoe train ...') or set parallel.expert_parallel to a "
            f"divisor of {world_size}"
        )
    micro_batches = world_size * gradient_accumulation
    if global_batch_size % micro_batches:
        raise ParallelError(
            f"training.global_batch_size is {global_batch_size}, which {world_size} processes x "
            f"training.gradient_accumulation {gradient_accumulation} = {micro_batches} do not divide"
        )


def create_groups(expert_parallel: int, placement: str = "auto", topology: Topology | None = None) -> ParallelGroups:
    """Make the groups of this rank. Every rank must call it.

    A group is made once for its ranks, by these ranks alone: groups are never freed before the job ends, and a start on
    many ranks must not wait for all of them once a group.

    Args:
        placement: see `dsmoe.parallel.topology.expert_parallel_ranks`.
        topology: which ranks share a node; None: by the host names of all ranks.

    Raises:
        ParallelError: the number of ranks is no multiple of `expert_parallel`, or the placement is impossible.
    """
    world_size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    check_world(world_size, expert_parallel, global_batch_size=world_size, gradient_accumulation=1)
    topology = topology or find_topology()
    traffic.topology = topology
    ep_groups = expert_parallel_ranks(topology, expert_parallel, placement)
    ep_ranks = next(ranks for ranks in ep_groups if rank in ranks)
    solo, ep = _group((rank,)), _group(tuple(ep_ranks))
    edp = _group(tuple(sorted(ranks[ep_ranks.index(rank)] for ranks in ep_groups)))
    node = lane = None
    if all(topology.spans_nodes(ranks) and topology.is_even(ranks) for ranks in ep_groups):
        by_node = topology.split_by_node(ep_ranks)
        node_ranks = next(ranks for ranks in by_node if rank in ranks)
        place = node_ranks.index(rank)
        node, lane = _group(tuple(node_ranks)), _group(tuple(sorted(ranks[place] for ranks in by_node)))
    dp = share_expert_groups(ep, edp)
    return ParallelGroups(ep, edp, dp, solo, topology, tuple(ep_ranks), node, lane)


@cache
def _group(ranks: tuple[int, ...]) -> torch.distributed.ProcessGroup:
    """The group of these ranks, in ascending order. Collective over them."""
    return torch.distributed.new_group(list(ranks), use_local_synchronization=True)
