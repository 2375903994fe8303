"""How many rows a token is expected to be sent in, for what says so before anything runs."""

from __future__ import annotations

from typing import NamedTuple

# Of the rows between nodes that `all_to_all` sends, for "two_level" to pay: two hosts of two ranks at 100 Mbit/s broke
# even at 0.74 and were 9 % of a step faster at 0.66 (docs/results/two_level.md).
TWO_LEVELS_PAY = 0.7


class ExpectedRows(NamedTuple):
    """Mean over tokens, in one direction of one layer."""

    within_node: float  # to other ranks of a node
    between_nodes: float


def resolve_dispatcher(
    name: str, num_experts: int, experts_per_token: float, expert_parallel: int, ranks_per_node: int | None
) -> str:
    """The registered dispatcher that `model.token_dispatcher` means.

    "auto" is "local" where expert parallelism is 1. It is "two_level" where an expert-parallel group spans nodes with
    several ranks on each and is expected to send at most `TWO_LEVELS_PAY` of the rows between nodes so, and else
    "all_to_all".

    Args:
        experts_per_token: what the router aims at.
        ranks_per_node: of an expert-parallel group; None: not the same on all of its nodes.
    """
    if name != "auto":
        return name
    if expert_parallel == 1:
        return "local"
    if ranks_per_node is None or not 1 < ranks_per_node < expert_parallel:
        return "all_to_all"
    direct, relayed = (
        expected_rows(dispatcher, num_experts, experts_per_token, expert_parallel, ranks_per_node).between_nodes
        for dispatcher in ("all_to_all", "two_level")
    )
    return "two_level" if relayed <= TWO_LEVELS_PAY * direct else "all_to_all"


def expected_rows(
    dispatcher: str, num_experts: int, experts_per_token: float, expert_parallel: int, ranks_per_node: float
) -> ExpectedRows:
    """Rows of a token whose experts are drawn by chance.

    Args:
        dispatcher: "two_level"; any other sends a row to each rank that a token needs.
        ranks_per_node: of an expert-parallel group, on average.
    """
    nodes = expert_parallel / ranks_per_node
    experts = num_experts // expert_parallel
    to_rank = chance_of_need(num_experts, experts_per_token, experts)
    if dispatcher == "two_level":
        to_node = chance_of_need(num_experts, experts_per_token, experts * ranks_per_node)
        # In every node it reaches, a token is fanned out from one rank to those others that need it.
        return ExpectedRows(nodes * (ranks_per_node - 1) * to_rank, (nodes - 1) * to_node)
    return ExpectedRows((ranks_per_node - 1) * to_rank, (expert_parallel - ranks_per_node) * to_rank)


def chance_of_need(num_experts: int, experts_per_token: float, held: float) -> float:
    """That a token needs any of `held` experts.

    Of k different experts none is among them with probability prod_j (E - held - j) / (E - j), j < k. Between whole k
    it is interpolated.
    """
    whole = int(min(experts_per_token, num_experts))

    def missed(count: int) -> float:
        product = 1.0
        for j in range(count):
            product *= max(0.0, (num_experts - held - j) / (num_experts - j))
        return product

    share = experts_per_token - whole
    return 1 - (1 - share) * missed(whole) - share * missed(min(whole + 1, num_experts))
