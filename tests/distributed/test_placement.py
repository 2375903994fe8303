"""Groups over nodes: made once, DeepSpeed's and Megatron's alike, and of no influence on what is learnt.

Nodes are pretended: a letter for the node of each rank.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from steps import fresh_engine, joined, largest_difference, owned_tensors, run_steps, tiny_config

from dsmoe.checkpoint.files import find_checkpoint
from dsmoe.checkpoint.load import load_checkpoint
from dsmoe.checkpoint.save import save_checkpoint
from dsmoe.parallel.groups import create_groups
from dsmoe.parallel.topology import NODE_NAME


def on_node(nodes: str) -> None:
    os.environ[NODE_NAME] = nodes[dist.get_rank()]


def members(group) -> list[int] | None:
    return None if group is None else dist.get_process_group_ranks(group)


def make_groups(nodes: str, expert_parallel: int, placement: str) -> dict:
    from deepspeed.utils import groups as deepspeed_groups

    on_node(nodes)
    made = []
    new_group = dist.new_group
    dist.new_group = lambda *args, **kwargs: (made.append(args), new_group(*args, **kwargs))[1]
    first, second = (create_groups(expert_parallel, placement) for _ in range(2))
    dist.new_group = new_group
    assert all(getattr(first, name) is getattr(second, name) for name in ("ep", "edp", "dp", "solo", "node", "lane"))
    name = f"ep_size_{expert_parallel}"
    assert deepspeed_groups._get_expert_parallel_group(name) is first.ep
    assert deepspeed_groups._get_expert_data_parallel_group(name) is first.edp
    assert deepspeed_groups._get_expert_parallel_group_ranks(name) == list(first.ep_ranks)
    assert first.for_megatron().ep is first.ep
    for group in (first.ep, first.edp, first.dp, first.node, first.lane):  # each of them works
        if group is not None:
            total = torch.tensor([dist.get_rank()])
            dist.all_reduce(total, group=group)
            assert total.item() == sum(members(group))
    actual = {name: members(getattr(first, name)) for name in ("ep", "edp", "dp", "solo", "node", "lane")}
    return actual | {"made": len(made)}


@pytest.mark.parametrize(
    ("nodes", "expert_parallel", "placement", "expected"),
    [
        ("abab", 2, "auto", {"ep": [[0, 2], [1, 3]], "edp": [[0, 1], [2, 3]], "node": None, "lane": None}),
        ("abab", 2, "rank_order", {"ep": [[0, 1], [2, 3]], "node": [[0], [1], [2], [3]], "lane": [[0, 1], [2, 3]]}),
        ("abba", 4, "auto", {"ep": [[0, 1, 2, 3]], "node": [[0, 3], [1, 2]], "lane": [[0, 1], [2, 3]]}),
        ("aaab", 4, "auto", {"ep": [[0, 1, 2, 3]], "edp": [[0], [1], [2], [3]], "node": None, "lane": None}),
        ("aaaa", 1, "auto", {"ep": [[0], [1], [2], [3]], "edp": [[0, 1, 2, 3]], "node": None, "lane": None}),
    ],
)
def test_groups_are_made_once_and_shared(nodes, expert_parallel, placement, expected):
    for rank, actual in enumerate(run_ranks(4, make_groups, nodes, expert_parallel, placement, deadline=60)):
        assert actual["solo"] == [rank] and actual["dp"] == [0, 1, 2, 3]
        assert actual.pop("made") <= 6, "a rank makes its own groups only, however many ranks there are"
        for name, groups in expected.items():
            assert actual[name] == (None if groups is None else next(ranks for ranks in groups if rank in ranks)), name


def save_and_resume(nodes: str, folder: str, stage: int) -> list[tuple]:
    """Four steps with a save after two, and the last two again from there, with experts on other ranks."""
    on_node(nodes)
    runs = []
    for placement in ("auto", "rank_order"):
        config = tiny_config(
            router={"name": "relu", "k": 1.0}, logging={"run_dir": folder},
            parallel={"expert_parallel": 2, "placement": placement, "zero_stage": stage},
        )  # fmt: skip
        engine = fresh_engine(config)
        if placement == "auto":
            runs.append(run_steps(engine, config, 0, 2))
            save_checkpoint(engine, config, 2, 2 * config.training.global_batch_size)
        else:
            load_checkpoint(engine, config, find_checkpoint("auto", Path(folder)))
        runs.append((run_steps(engine, config, 2, 4), owned_tensors(engine)))
    return runs[1:]


@pytest.mark.parametrize("stage", [1, 3])
def test_a_run_resumes_with_experts_placed_on_other_ranks(tmp_path, stage):
    """Experts are saved by their number, so it does not matter which ranks held one."""
    (expected, tensors), (actual, loaded) = joined(run_ranks(4, save_and_resume, "abba", str(tmp_path), stage))
    for after, before in zip(actual, expected, strict=True):
        assert after["loss"] == pytest.approx(before["loss"], abs=1e-5)
        assert torch.equal(after["counts"], before["counts"])
    assert largest_difference(loaded, tensors) <= 1e-5
