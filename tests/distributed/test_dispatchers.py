"""Every token dispatcher brings the same rows to the same experts and the same sums back, whatever the map.

First by itself, beside a loop over tokens and experts; then in training, beside the all-to-all, with every router.
Nodes are pretended: a letter for the node of each rank.
"""

from __future__ import annotations

import os
from itertools import product

import all_gather_dispatcher  # noqa: F401  (registers it)
import fixed_routes  # noqa: F401
import pytest
import torch
import torch.distributed as dist
from ranks import once, run_ranks
from steps import joined, largest_difference, tiny_config, train_each
from test_router_layouts import OPTIONS, ROUTERS

from dsmoe.moe.dispatch import build_dispatcher
from dsmoe.parallel.collectives import traffic
from dsmoe.parallel.groups import create_groups
from dsmoe.parallel.topology import NODE_NAME, Topology

EXPERTS, HIDDEN, LATENT, RANKS = 8, 3, 2, 4
PLAIN = ("all_to_all", "aabb")
OTHERS = [("all_gather", "aaaa"), ("two_level", "aabb"), ("two_level", "abba"), ("two_level", "abcd")]
DENSITIES = (0.0, 0.1, 0.5, 1.0)
EMPTY = {"no": (), "a rank without tokens": (2,), "no tokens": (0, 1, 2, 3)}
UNUSED = {"no": slice(0, 0), "ranks without routes": slice(0, 4), "all but one expert": slice(1, 8)}
CASES = list(product(DENSITIES, EMPTY, UNUSED))


def random_case(rank: int, density: float, empty: str, unused: str) -> list[torch.Tensor]:
    """Tokens, weights, latents and the map of a rank."""
    random = torch.Generator().manual_seed(rank)
    tokens = 0 if rank in EMPTY[empty] else 5 + 3 * rank
    hidden_TH = torch.randn(tokens, HIDDEN, generator=random, dtype=torch.float64)
    map_TE = torch.rand(tokens, EXPERTS, generator=random) < density
    map_TE[:, UNUSED[unused]] = False
    probs_TE = torch.rand(tokens, EXPERTS, generator=random, dtype=torch.float64) * map_TE
    latents_TEr = torch.randn(tokens, EXPERTS, LATENT, generator=random, dtype=torch.float64)
    return [*(leaf.requires_grad_() for leaf in (hidden_TH, probs_TE, latents_TEr)), map_TE]


def expert(number: int, rows_RH: torch.Tensor, probs_R: torch.Tensor, latents_Rr: torch.Tensor) -> torch.Tensor:
    """Something no other expert does."""
    return (torch.sin(rows_RH * (number + 1)) + latents_Rr.sum(1, keepdim=True)) * probs_R.unsqueeze(1)


def by_loop(hidden_TH, probs_TE, latents_TEr, map_TE) -> torch.Tensor:
    output_TH = torch.zeros_like(hidden_TH)
    for e in range(EXPERTS):
        token_N = map_TE[:, e].nonzero().squeeze(1)
        output_N = expert(e, hidden_TH[token_N], probs_TE[token_N, e], latents_TEr[token_N, e])
        output_TH = output_TH.index_add(0, token_N, output_N)
    return output_TH


def by_dispatcher(dispatcher, retain: bool, hidden_TH, probs_TE, latents_TEr, map_TE) -> tuple:
    """Output, and what this rank's experts got. retain: as a recompute does, what was dispatched is asked for twice."""
    plan = dispatcher.start_plan(map_TE)()
    handle = dispatcher.dispatch(plan, hidden_TH, probs_TE.flatten()[plan.flat_N], latents_TEr)
    inputs = handle.wait(retain_for_backward=retain)
    if retain:
        handle.relaunch()
        inputs = handle.wait(retain_for_backward=True)
    counts_e = plan.routes_per_expert_e.tolist()
    outputs, first = [], dispatcher.groups.ep_rank * len(counts_e)
    for e, rows in enumerate(zip(*(values.split(counts_e) for values in inputs), strict=True)):
        outputs.append(expert(first + e, *rows))
    output_TH = dispatcher.combine(dispatcher.reduce(torch.cat(outputs), plan), plan).wait()
    return output_TH, [counts_e, *(values.detach() for values in inputs)]


def retains(case: tuple) -> bool:
    return CASES.index(case) % 2 == 1


def each_case(name: str, nodes: str) -> list[tuple]:
    """For every case: output and gradients of a rank beside the loop's, what its experts got, and bytes sent."""
    groups = create_groups(RANKS, topology=Topology.from_names(list(nodes)))
    dispatcher = build_dispatcher(name, groups, EXPERTS, experts_per_token=2)
    results = []
    for case in CASES:
        leaves = random_case(groups.dp_rank, *case)
        traffic.take()
        output_TH, inputs = by_dispatcher(dispatcher, retains(case), *leaves)
        pair = []
        for output in (output_TH, by_loop(*leaves)):
            loss = (output * torch.arange(1.0, HIDDEN + 1)).sum()
            pair.append([output.detach(), *torch.autograd.grad(loss, leaves[:3])])
        results.append((*pair, inputs, traffic.take()))
    return results


@once
def dispatched(name: str, nodes: str) -> list[list[tuple]]:
    return run_ranks(RANKS, each_case, name, nodes, deadline=60)


@pytest.mark.parametrize(("name", "nodes"), [PLAIN, *OTHERS])
def test_a_dispatcher_is_the_loop(name, nodes):
    for rank, results in enumerate(dispatched(name, nodes)):
        for case, (here, expected, *_) in zip(CASES, results, strict=True):
            for actual, value in zip(here, expected, strict=True):
                torch.testing.assert_close(actual, value, rtol=1e-12, atol=1e-12, msg=lambda m, c=case: f"{c}: {m}")
            unused_T = ~random_case(rank, *case)[3].any(1)
            assert not here[0][unused_T].any(), f"{case}: a token without experts must get exactly 0"


@pytest.mark.parametrize(("name", "nodes"), OTHERS)
def test_experts_get_the_same_rows_in_the_same_order(name, nodes):
    """By expert, source rank and token, so that not even the rounding of an expert's sums changes."""
    for here, there in zip(dispatched(name, nodes), dispatched(*PLAIN), strict=True):
        for (_, _, (counts_e, *values), _), (_, _, (expected_e, *expected), _) in zip(here, there, strict=True):
            assert counts_e == expected_e and all(map(torch.equal, values, expected))


@pytest.mark.parametrize(("name", "nodes"), [PLAIN, *(other for other in OTHERS if other[0] == "two_level")])
def test_bytes_are_counted_and_a_token_crosses_to_a_node_once_in_two_levels(name, nodes):
    node_P = torch.tensor([ord(node) for node in nodes])
    same_node_PP = node_P.unsqueeze(1) == node_P
    for case, *ranks in zip(CASES, *dispatched(name, nodes), strict=True):
        between_rows = between_routes = masks = 0
        for rank in range(RANKS):
            needs_TP = (map_TE := random_case(rank, *case)[3]).view(-1, RANKS, EXPERTS // RANKS).any(2)
            elsewhere_P = ~same_node_PP[rank]
            between_routes += map_TE.view(-1, RANKS, EXPERTS // RANKS)[:, elsewhere_P].sum().item()
            if name == "two_level":
                rows = sum(needs_TP[:, node_P == node].any(1).sum().item() for node in node_P[elsewhere_P].unique())
                masks += rows * same_node_PP[rank].sum().item()
            else:
                rows = needs_TP[:, elsewhere_P].sum().item()
            between_rows += rows
        again = retains(case)
        values = 8 * ((4 + again) * HIDDEN * between_rows + (2 + again) * (1 + LATENT) * between_routes)
        assert sum(result[3][1] for result in ranks) == values + 4 * between_routes + masks, case
        assert all(result[3][1] <= result[3][0] for result in ranks)


ROUTED = {name: {"name": name, **OPTIONS.get(name, {})} for name in ROUTERS}
ROUTED |= {"latents sent": {**ROUTED["routing_free"], "latent": "send"}}
FIXED = ("second_half_sends_nothing", "one_expert", "none")
ROUTED |= {routes: {"name": "fixed", "routes": routes} for routes in FIXED}
KINDS = {
    "plain": {},
    "recompute, chunks, shared expert": {
        "model": {"recompute": "moe", "moe_chunks": 3, "moe_shared_expert_intermediate_size": 8},
        "parallel": {"zero_stage": 3},
    },
    "narrow exchange": {"model": {"moe_exchange_dtype": "bf16"}},
}
TRAINED = [(router, "recompute, chunks, shared expert") for router in ROUTED]
TRAINED += [("topk", "plain"), ("topk", "narrow exchange"), ("relu", "narrow exchange")]


def train_on_nodes(name: str, nodes: str) -> list[tuple]:
    os.environ[NODE_NAME] = nodes[dist.get_rank()]
    configs = []
    for router, kind in TRAINED:
        parallel = {"expert_parallel": RANKS, **KINDS[kind].get("parallel", {})}
        model = {"num_layers": 1, "token_dispatcher": name, **KINDS[kind].get("model", {})}
        training = {"gradient_accumulation": 2 if kind == "plain" else 1}
        configs.append(tiny_config(router=ROUTED[router], model=model, parallel=parallel, training=training))
    return train_each(configs, 2)


@once
def trained(name: str, nodes: str) -> dict[tuple[str, str], tuple]:
    return dict(zip(TRAINED, joined(run_ranks(RANKS, train_on_nodes, name, nodes, deadline=120)), strict=True))


@pytest.mark.parametrize("case", TRAINED, ids=", ".join)
@pytest.mark.parametrize(("name", "nodes"), [("all_gather", "aaaa"), ("two_level", "abba")])
def test_training_does_not_depend_on_the_dispatcher(name, nodes, case):
    """The first of a dispatcher waits for the trainings of all cases on four ranks: 20 to 40 s on two cores."""
    (history, tensors), (expected, expected_tensors) = trained(name, nodes)[case], trained(*PLAIN)[case]
    # bf16 rounds what comes back from each rank; here also the sum of a node, or of all ranks.
    tolerance = 1e-3 if case[1] == "narrow exchange" else 1e-5
    for step, before in zip(history, expected, strict=True):
        assert torch.equal(step["counts"], before["counts"])
        for quantity in ("loss", "router_loss", "grad_norm"):
            assert step[quantity] == pytest.approx(before[quantity], rel=tolerance, abs=1e-6), quantity
    assert largest_difference(tensors, expected_tensors) <= tolerance
