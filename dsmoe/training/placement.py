"""What a job's nodes mean for the traffic of its experts, said before training starts."""

from __future__ import annotations

from dsmoe.config import RunConfig
from dsmoe.moe.expected_rows import expected_rows, resolve_dispatcher
from dsmoe.parallel.groups import ParallelGroups
from dsmoe.parallel.topology import expert_parallel_ranks
from dsmoe.routers import get

MAX_GROUPS = 4  # that are listed


def describe_placement(config: RunConfig, groups: ParallelGroups) -> str | None:
    """Which expert-parallel groups span nodes, and what share of an exchange leaves its node then; None on one node."""
    topology, model = groups.topology, config.model
    if len(topology.names) == 1:
        return None
    ep_groups = expert_parallel_ranks(topology, groups.ep_size, config.parallel.placement)
    spanning = [ranks for ranks in ep_groups if topology.spans_nodes(ranks)]
    nodes = f"nodes   {len(topology.node_of_rank)} ranks on {', '.join(topology.names)}; "
    if not spanning:
        return f"{nodes}every expert-parallel group lies inside a node"
    listed = ", ".join("+".join(map(str, ranks)) for ranks in spanning[:MAX_GROUPS])
    listed += ", ..." if len(spanning) > MAX_GROUPS else ""
    ranks_per_node = None if groups.node is None else groups.node.size()
    experts = get(config.router.name).Options.model_validate(config.router.options).target_experts_per_token(model)
    dispatcher = resolve_dispatcher(model.token_dispatcher, model.num_experts, experts, groups.ep_size, ranks_per_node)
    per_node = ranks_per_node or groups.ep_size / len(topology.split_by_node(spanning[0]))
    rows = expected_rows(dispatcher, model.num_experts, experts, groups.ep_size, per_node)
    share = rows.between_nodes / (rows.within_node + rows.between_nodes)
    return (
        f"{nodes}{len(spanning)} of {len(ep_groups)} expert-parallel groups span nodes (ranks {listed}): with "
        f"{dispatcher} and {experts:g} experts a token, about {share:.0%} of the rows they exchange cross nodes"
    )
