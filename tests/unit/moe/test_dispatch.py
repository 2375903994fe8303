"""Dispatch and combine are a loop over tokens and their experts, for any map: no expert, all experts, no token.

Groups of several ranks are simulated in one process: a collective waits until all simulated ranks have called it.
"""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch

from dsmoe.moe import exchange
from dsmoe.moe import plan as plans
from dsmoe.moe.dispatch import LocalDispatcher, TokenDispatcher
from dsmoe.moe.dispatchers.all_to_all import AllToAllDispatcher
from dsmoe.moe.plan import PendingPlan
from dsmoe.routers.scores import weights_at

HIDDEN, EXPERTS = 3, 8
GROUP_OF_ONE = SimpleNamespace(size=lambda: 1, rank=lambda: 0)


def dispatcher_over(group, kind: type[TokenDispatcher] = AllToAllDispatcher) -> TokenDispatcher:
    return kind(SimpleNamespace(ep=group, ep_size=group.size(), ep_rank=group.rank()), EXPERTS)


ON_ONE_RANK = [dispatcher_over(GROUP_OF_ONE, kind) for kind in (LocalDispatcher, AllToAllDispatcher)]
DENSITIES = (0.0, 0.1, 0.5, 1.0)
TOKENS = (0, 1, 17)


def random_case(seed: int, tokens: int, density: float):
    generator = torch.Generator().manual_seed(seed)
    hidden_TH = torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64)
    map_TE = torch.rand(tokens, EXPERTS, generator=generator) < density
    probs_TE = torch.rand(tokens, EXPERTS, generator=generator, dtype=torch.float64) * map_TE
    return hidden_TH.requires_grad_(), probs_TE.requires_grad_(), map_TE


def expert(number: int, rows_RH: torch.Tensor) -> torch.Tensor:
    """Something no other expert does."""
    return torch.sin(rows_RH * (number + 1)) + number


def loop_reference(hidden_TH, probs_TE, map_TE) -> torch.Tensor:
    rows = []
    for t in range(len(map_TE)):
        row = torch.zeros(HIDDEN, dtype=torch.float64)
        for e in range(EXPERTS):
            if map_TE[t, e]:
                row = row + probs_TE[t, e] * expert(e, hidden_TH[t])
        rows.append(row)
    return torch.stack(rows) if rows else hidden_TH * 0


def through_dispatch(hidden_TH, probs_TE, map_TE, dispatcher: TokenDispatcher) -> torch.Tensor:
    plan = dispatcher.start_plan(map_TE)()
    rows_RH, probs_R, _ = dispatcher.dispatch(plan, hidden_TH, weights_at(probs_TE, plan.flat_N)).wait()
    counts = plan.routes_per_expert_e.tolist()
    first = dispatcher.groups.ep_rank * len(counts)
    blocks = zip(rows_RH.split(counts), probs_R.split(counts), strict=True)
    outs = [expert(first + i, rows) * probs.unsqueeze(1) for i, (rows, probs) in enumerate(blocks)]
    return dispatcher.combine(dispatcher.reduce(torch.cat(outs), plan), plan).wait()


def gradients(out_TH, hidden_TH, probs_TE):
    return torch.autograd.grad((out_TH * torch.arange(1.0, HIDDEN + 1)).sum(), (hidden_TH, probs_TE), allow_unused=True)


def assert_same(actual, expected, case) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    hidden_TH, probs_TE, map_TE = case
    unused_T = ~map_TE.any(1)
    assert torch.equal(actual[unused_T], torch.zeros_like(actual[unused_T])), (
        "a token without experts must get exactly 0"
    )
    if map_TE.any():
        pairs = zip(gradients(actual, hidden_TH, probs_TE), gradients(expected, hidden_TH, probs_TE), strict=True)
        for here, there in pairs:
            # The reference never looks at the weight of a route that does not exist; dispatch gives it 0.
            torch.testing.assert_close(here, there, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dispatcher", ON_ONE_RANK, ids=lambda dispatcher: dispatcher.name)
def test_one_rank_is_the_loop(dispatcher, tokens, density):
    for seed in range(5):
        case = random_case(seed, tokens, density)
        assert_same(through_dispatch(*case, dispatcher), loop_reference(*case), case)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_map_may_lie_in_memory_as_it_likes(ranks):
    """A router's map may be an expanded row, or columns one after another."""
    group = SimpleNamespace(size=lambda: ranks)
    for map_TE in (random_case(0, 12, 0.3)[2], torch.arange(EXPERTS).remainder(3).eq(0).expand(12, EXPERTS)):
        ways = (map_TE.contiguous(), map_TE, map_TE.t().contiguous().t())
        first, *others = [PendingPlan(actual, group) for actual in ways]
        for other in others:
            assert torch.equal(other.token_to_rank_TP, first.token_to_rank_TP)
            assert torch.equal(other.sent, first.sent)


@pytest.mark.gpu
@pytest.mark.parametrize("density", DENSITIES)
def test_one_gpu_is_the_loop(density):
    hidden_TH, probs_TE, map_TE = (x.detach().cuda() for x in random_case(0, 17, density))
    case = hidden_TH.requires_grad_(), probs_TE.requires_grad_(), map_TE
    for dispatcher in ON_ONE_RANK:
        assert_same(through_dispatch(*case, dispatcher), loop_reference(*(x.cpu() for x in case)).cuda(), case)


def test_experts_without_tokens_and_one_that_has_all():
    for used in ([0], [7], [2, 3]):
        hidden_TH, probs_TE, map_TE = random_case(0, 9, 1.0)
        only_E = torch.zeros(EXPERTS, dtype=torch.bool)
        only_E[used] = True
        case = hidden_TH, (probs_TE.detach() * only_E).requires_grad_(), map_TE & only_E
        for dispatcher in ON_ONE_RANK:
            plan = dispatcher.start_plan(case[2])()
            assert plan.routes_per_expert_e.tolist() == [9 if e in used else 0 for e in range(EXPERTS)]
            assert_same(through_dispatch(*case, dispatcher), loop_reference(*case), case)


class Ranks:
    """Simulated ranks of one group, a thread each: `exchange` is an all-to-all among them."""

    def __init__(self, size: int):
        self.size = size
        self.barrier = threading.Barrier(size, timeout=20)
        self.sent: list = [None] * size

    def exchange(self, rank: int, parts: list) -> list:
        self.sent[rank] = parts
        self.barrier.wait()
        received = [self.sent[source][rank] for source in range(self.size)]
        self.barrier.wait()
        return received

    def group(self, rank: int):
        return SimpleNamespace(size=lambda: self.size, rank=lambda: rank, ranks=self)


@pytest.fixture
def simulated(monkeypatch):
    """The two collectives of a dispatch, among simulated ranks and without autograd across them."""

    def counts(counts, group):
        received = torch.stack(group.ranks.exchange(group.rank(), list(counts)))
        return lambda: received

    def rows(rows, send, receive, group):
        received = group.ranks.exchange(group.rank(), list(rows.split(send)))
        assert [len(part) for part in received] == receive
        return lambda: torch.cat(received)

    monkeypatch.setattr(plans, "start_counts", counts)
    for user in (plans, exchange):
        monkeypatch.setattr(user, "start_all_to_all", rows)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("density", DENSITIES)
def test_several_ranks_are_the_loop(simulated, ranks, density):
    group = Ranks(ranks)
    # Ranks hold different numbers of tokens, one of them none.
    cases = [random_case(10 + rank, (rank * 7) % 15, density) for rank in range(ranks)]
    actual: list = [None] * ranks

    def work(rank: int) -> None:
        with torch.no_grad():
            actual[rank] = through_dispatch(*cases[rank], dispatcher_over(group.group(rank)))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for out_TH, case in zip(actual, cases, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(out_TH, loop_reference(*case), rtol=1e-12, atol=1e-12)


def test_a_token_is_sent_once_to_each_rank_it_needs(simulated):
    """Not once for each of a rank's experts."""
    group, actual = Ranks(2), [None, None]
    map_TE = torch.zeros(4, EXPERTS, dtype=torch.bool)
    map_TE[0, :4] = map_TE[1, 3:5] = map_TE[2, 7] = True  # four experts of rank 0; one of each; one of rank 1; none

    def work(rank: int) -> None:
        actual[rank] = dispatcher_over(group.group(rank)).start_plan(map_TE)()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for plan in actual:
        assert plan.rows.send == [2, 2] and plan.routes.send == [5, 2]
        assert plan.token_M.tolist() == [0, 1, 1, 2]


def test_reordering_is_undone_by_its_gradient():
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(20)
    rows = torch.randn(20, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: exchange.Reorder.apply(x, order, inverse), (rows,))
