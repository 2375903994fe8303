"""The order of a layer's routes: by expert, then token, and each token's rows among them.

    count    routes of each block of tokens to each expert, and of each token; their running sums are torch's
    write    each route's place, and each place's route

Shapes: T tokens, E experts, N routes, B blocks of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsmoe.triton.rows import TokenOrder

TOKENS = 32  # of a block, at most; with twice as many the last kernel spills registers
ENTRIES = 2048  # of a block's map, at most


@dataclass(frozen=True)
class RouteOrder:
    """Routes ordered by expert, then token; and the same by token."""

    flat_N: Tensor  # int64, token * E + expert
    by_token: TokenOrder


@triton.jit
def count_kernel(
    map_TE, block_counts, token_counts, tokens, blocks, EXPERTS: tl.constexpr, PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    token = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.arange(0, PADDED)
    inside = (token < tokens)[:, None] & (expert < EXPERTS)[None, :]
    chosen = tl.load(map_TE + token[:, None].to(tl.int64) * EXPERTS + expert[None, :], mask=inside, other=0).to(
        tl.int32
    )
    tl.store(block_counts + expert * blocks + block, tl.sum(chosen, 0), mask=expert < EXPERTS)
    tl.store(token_counts + token, tl.sum(chosen, 1), mask=token < tokens)


@triton.jit
def write_kernel(
    map_TE, block_ends, token_starts, flat, token_of, place, tokens, blocks, EXPERTS: tl.constexpr,
    PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    token = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.arange(0, PADDED)
    inside = (token < tokens)[:, None] & (expert < EXPERTS)[None, :]
    chosen = tl.load(map_TE + token[:, None].to(tl.int64) * EXPERTS + expert[None, :], mask=inside, other=0).to(
        tl.int32
    )
    end = tl.load(block_ends + expert * blocks + block, mask=expert < EXPERTS, other=0)
    first = end - tl.sum(chosen, 0)
    by_expert = first[None, :] + tl.cumsum(chosen, 0) - chosen
    own = tl.load(token_starts + token, mask=token < tokens, other=0)
    by_token = own[:, None] + tl.cumsum(chosen, 1) - chosen
    active = inside & (chosen > 0)
    wide = token[:, None].to(tl.int64)
    tl.store(flat + by_expert, wide * EXPERTS + expert[None, :], mask=active)
    tl.store(token_of + by_expert, wide + tl.zeros_like(by_expert), mask=active)
    tl.store(place + by_token, by_expert, mask=active)


def route_order_reference(map_TE: Tensor) -> RouteOrder:
    """From torch's operators, of which the first waits for the device."""
    tokens, experts = map_TE.shape
    expert_N, token_N = map_TE.t().nonzero().unbind(1)
    return RouteOrder(token_N * experts + expert_N, TokenOrder.of(token_N, tokens))


class PendingOrder:
    """A `RouteOrder` whose routes are counted; as `dsmoe.moe.plan.Positions`.

    Attributes:
        counts_X: int64 [E], routes of each expert.
    """

    def __init__(self, map_TE: Tensor):
        self.map_TE = map_TE.contiguous().view(torch.uint8)
        (tokens, experts), device = map_TE.shape, map_TE.device
        self._padded = triton.next_power_of_2(experts)
        self._block = max(1, min(TOKENS, ENTRIES // self._padded))
        blocks = max(1, triton.cdiv(tokens, self._block))
        counts_EB = torch.empty(experts, blocks, dtype=torch.int32, device=device)
        starts_T = torch.zeros(tokens + 1, dtype=torch.int32, device=device)
        count_kernel[(blocks,)](
            self.map_TE, counts_EB, starts_T[1:], tokens, blocks, EXPERTS=experts, PADDED=self._padded,
            BLOCK=self._block,
        )  # fmt: skip
        self._starts_T = starts_T.cumsum(0, dtype=torch.int32)
        self._ends_EB = counts_EB.view(-1).cumsum(0, dtype=torch.int32).view_as(counts_EB)
        self.counts_X = counts_EB.sum(1)

    def finish(self, routes: int) -> RouteOrder:
        """Without a wait. `routes`: N, which the host must know to make memory."""
        (tokens, experts), blocks, device = self.map_TE.shape, self._ends_EB.size(1), self.map_TE.device
        flat_N = torch.empty(routes, dtype=torch.int64, device=device)
        token_N = torch.empty_like(flat_N)
        place_N = torch.empty(routes, dtype=torch.int32, device=device)
        write_kernel[(blocks,)](
            self.map_TE, self._ends_EB, self._starts_T, flat_N, token_N, place_N, tokens, blocks, EXPERTS=experts,
            PADDED=self._padded, BLOCK=self._block,
        )  # fmt: skip
        return RouteOrder(flat_N, TokenOrder(token_N, place_N, self._starts_T))


def route_order(map_TE: Tensor, routes: int) -> RouteOrder:
    """As `route_order_reference`, of a bool map with that many routes."""
    return PendingOrder(map_TE).finish(routes)
