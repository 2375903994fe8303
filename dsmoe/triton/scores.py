"""Scores of experts that score themselves, without the [T, E, r] latents: s_i(x) = ||x A_i||_2.

A program makes the latents of some tokens for one expert in registers, on tensor cores where the operands are bf16, and
keeps their norms. torch's way multiplies in fp32 and writes all latents before it reads them again.

Shapes: T tokens, E experts, r latent width, H hidden.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

# Triton's interpreter multiplies bf16 as if it were integers.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def latent_norms_kernel(
    hidden, reduce, norms, tokens, experts, HIDDEN: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    latent = tl.arange(0, PADDED)
    total = tl.zeros((BLOCK_T, PADDED), tl.float32)
    for first in range(0, HIDDEN, BLOCK_H):
        h = first + tl.arange(0, BLOCK_H)
        inside = h < HIDDEN
        x = tl.load(
            hidden + token[:, None].to(tl.int64) * HIDDEN + h[None, :],
            mask=(token < tokens)[:, None] & inside[None, :], other=0,
        )  # fmt: skip
        a = tl.load(
            reduce + (expert * RANK + latent[None, :]) * HIDDEN + h[:, None],
            mask=(latent < RANK)[None, :] & inside[:, None], other=0,
        )  # fmt: skip
        if WIDEN:
            x, a = x.to(tl.float32), a.to(tl.float32)
        total = tl.dot(x, a, total, input_precision="ieee")
    norm = tl.sqrt(tl.sum(total * total, 1))
    tl.store(norms + token.to(tl.int64) * experts + expert, norm, mask=token < tokens)


def latent_norms_reference(hidden_TH: Tensor, reduce_ErH: Tensor) -> Tensor:
    """fp32 [T, E]."""
    return torch.linalg.vector_norm(torch.einsum("th,erh->ter", hidden_TH.float(), reduce_ErH.float()), dim=-1)


def latent_norms(hidden_TH: Tensor, reduce_ErH: Tensor) -> Tensor:
    """As `latent_norms_reference`; no gradient: `dsmoe.routers.low_rank` makes latents again for that."""
    hidden_TH, reduce_ErH = hidden_TH.contiguous(), reduce_ErH.to(hidden_TH.dtype).contiguous()
    (tokens, hidden), (experts, rank, _) = hidden_TH.shape, reduce_ErH.shape
    norms_TE = torch.empty(tokens, experts, dtype=torch.float32, device=hidden_TH.device)
    padded = max(16, triton.next_power_of_2(rank))
    if tokens:
        latent_norms_kernel[triton.cdiv(tokens, 64), experts](
            hidden_TH, reduce_ErH, norms_TE, tokens, experts, HIDDEN=hidden, RANK=rank, PADDED=padded, BLOCK_T=64,
            BLOCK_H=min(64, max(16, triton.next_power_of_2(hidden))), WIDEN=INTERPRETED, num_warps=4,
        )  # fmt: skip
    return norms_TE
