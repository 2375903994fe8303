"""The order of a layer's routes in three launches: routes by expert, then token, and each token's rows among them.

    count    routes of each block of tokens to each expert, and of each token
    prefix   where each block's routes to an expert begin
    write    each route's place, and each place's route

Shapes: T tokens, E experts, N routes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsmoe.triton.rows import TokenOrder

TOKENS = 32  # of a block; with twice as many the last kernel spills registers


@dataclass(frozen=True)
class RouteOrder:
    """Routes ordered by expert, then token; and the same by token."""

    counts_E: Tensor  # int64, routes of each expert
    flat_N: Tensor  # int64, token * E + expert
    by_token: TokenOrder


@triton.jit
def count_kernel(
    map_TE, block_counts, token_counts, tokens, EXPERTS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    block = tl.program_id(0)
    token = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.arange(0, PADDED)
    inside = (token < tokens)[:, None] & (expert < EXPERTS)[None, :]
    chosen = tl.load(map_TE + token[:, None].to(tl.int64) * EXPERTS + expert[None, :], mask=inside, other=0).to(
        tl.int32
    )
    tl.store(block_counts + block * EXPERTS + expert, tl.sum(chosen, 0), mask=expert < EXPERTS)
    tl.store(token_counts + token, tl.sum(chosen, 1), mask=token < tokens)


@triton.jit
def prefix_kernel(
    block_counts, block_starts, counts, blocks, EXPERTS: tl.constexpr, PADDED: tl.constexpr
):  # fmt: skip
    expert = tl.arange(0, PADDED)
    inside = expert < EXPERTS
    total = tl.zeros((PADDED,), tl.int32)
    for block in range(0, blocks):
        tl.store(block_starts + block * EXPERTS + expert, total, mask=inside)
        total += tl.load(block_counts + block * EXPERTS + expert, mask=inside, other=0)
    first = tl.cumsum(total, 0) - total
    tl.store(counts + expert, total.to(tl.int64), mask=inside)
    for block in range(0, blocks):
        place = block_starts + block * EXPERTS + expert
        tl.store(place, tl.load(place, mask=inside, other=0) + first, mask=inside)


@triton.jit
def write_kernel(
    map_TE, block_starts, token_starts, flat, token_of, place, tokens, EXPERTS: tl.constexpr, PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    token = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.arange(0, PADDED)
    inside = (token < tokens)[:, None] & (expert < EXPERTS)[None, :]
    chosen = tl.load(map_TE + token[:, None].to(tl.int64) * EXPERTS + expert[None, :], mask=inside, other=0).to(
        tl.int32
    )
    first = tl.load(block_starts + block * EXPERTS + expert, mask=expert < EXPERTS, other=0)
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
    return RouteOrder(map_TE.sum(0), token_N * experts + expert_N, TokenOrder.of(token_N, tokens))


def route_order(map_TE: Tensor, routes: int) -> RouteOrder:
    """As `route_order_reference`, without a wait.

    Args:
        map_TE: bool.
        routes: N, which the host must know to make memory.
    """
    map_TE = map_TE.contiguous().view(torch.uint8)
    (tokens, experts), device = map_TE.shape, map_TE.device
    blocks, padded = max(1, triton.cdiv(tokens, TOKENS)), triton.next_power_of_2(experts)
    block_counts = torch.empty(blocks, experts, dtype=torch.int32, device=device)
    block_starts = torch.empty_like(block_counts)
    token_starts = torch.zeros(tokens + 1, dtype=torch.int32, device=device)
    counts_E = torch.empty(experts, dtype=torch.int64, device=device)
    flat_N = torch.empty(routes, dtype=torch.int64, device=device)
    token_N = torch.empty_like(flat_N)
    place_N = torch.empty(routes, dtype=torch.int32, device=device)
    shape = {"EXPERTS": experts, "PADDED": padded}
    count_kernel[(blocks,)](map_TE, block_counts, token_starts[1:], tokens, **shape, BLOCK=TOKENS)
    token_starts = token_starts.cumsum(0, dtype=torch.int32)
    prefix_kernel[(1,)](block_counts, block_starts, counts_E, blocks, **shape)
    write_kernel[(blocks,)](map_TE, block_starts, token_starts, flat_N, token_N, place_N, tokens, **shape, BLOCK=TOKENS)
    return RouteOrder(counts_E, flat_N, TokenOrder(token_N, place_N, token_starts))
