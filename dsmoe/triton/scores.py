"""Scores of experts that score themselves, without the [T, E, r] latents: s_i(x) = ||x A_i||_2.

A program makes the latents of some tokens for one expert in registers, on tensor cores where the operands are bf16, and
keeps their norms. torch's way multiplies in fp32 and writes all latents before it reads them again. The backward pass
makes them once more, times the factor that turns a latent into its gradient, in the tokens' dtype: both of its products
are then ordinary ones.

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
def _latents(
    hidden, reduce, expert, token, latent, tokens, HIDDEN: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """fp32 [BLOCK_T, PADDED], of some tokens for one expert."""
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
    return total


@triton.jit
def latent_norms_kernel(
    hidden, reduce, norms, tokens, experts, HIDDEN: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    latent = tl.arange(0, PADDED)
    total = _latents(hidden, reduce, expert, token, latent, tokens, HIDDEN, RANK, PADDED, BLOCK_T, BLOCK_H, WIDEN)
    norm = tl.sqrt(tl.sum(total * total, 1))
    tl.store(norms + token.to(tl.int64) * experts + expert, norm, mask=token < tokens)


@triton.jit
def scaled_latents_kernel(
    hidden, reduce, factor, out, tokens, experts, HIDDEN: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    latent = tl.arange(0, PADDED)
    total = _latents(hidden, reduce, expert, token, latent, tokens, HIDDEN, RANK, PADDED, BLOCK_T, BLOCK_H, WIDEN)
    pair = token.to(tl.int64) * experts + expert
    total *= tl.load(factor + pair, mask=token < tokens, other=0)[:, None]
    place = out + pair[:, None] * RANK + latent[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=(token < tokens)[:, None] & (latent < RANK)[None, :])


def latent_norms_reference(hidden_TH: Tensor, reduce_ErH: Tensor) -> Tensor:
    """fp32 [T, E]."""
    return torch.linalg.vector_norm(torch.einsum("th,erh->ter", hidden_TH.float(), reduce_ErH.float()), dim=-1)


def latent_norms(hidden_TH: Tensor, reduce_ErH: Tensor) -> Tensor:
    """As `latent_norms_reference`, without a gradient."""
    norms_TE = torch.empty(len(hidden_TH), len(reduce_ErH), dtype=torch.float32, device=hidden_TH.device)
    _launch(latent_norms_kernel, hidden_TH, reduce_ErH, norms_TE)
    return norms_TE


def scaled_latents_reference(hidden_TH: Tensor, reduce_ErH: Tensor, factor_TE: Tensor) -> Tensor:
    """[T, E, r] in the tokens' dtype: each latent times its factor, rounded once."""
    latents_TEr = torch.einsum("th,erh->ter", hidden_TH.float(), reduce_ErH.float())
    return (latents_TEr * factor_TE.unsqueeze(2)).to(hidden_TH.dtype)


def scaled_latents(hidden_TH: Tensor, reduce_ErH: Tensor, factor_TE: Tensor) -> Tensor:
    """As `scaled_latents_reference`, without a gradient. factor_TE: fp32."""
    out_TEr = hidden_TH.new_empty(len(hidden_TH), *reduce_ErH.shape[:2])
    _launch(scaled_latents_kernel, hidden_TH, reduce_ErH, factor_TE.contiguous(), out_TEr)
    return out_TEr


def _launch(kernel, hidden_TH: Tensor, reduce_ErH: Tensor, *tensors: Tensor) -> None:
    hidden_TH, reduce_ErH = hidden_TH.contiguous(), reduce_ErH.to(hidden_TH.dtype).contiguous()
    (tokens, hidden), (experts, rank, _) = hidden_TH.shape, reduce_ErH.shape
    if tokens:
        kernel[triton.cdiv(tokens, 64), experts](
            hidden_TH, reduce_ErH, *tensors, tokens, experts, HIDDEN=hidden, RANK=rank,
            PADDED=max(16, triton.next_power_of_2(rank)), BLOCK_T=64,
            BLOCK_H=min(64, max(16, triton.next_power_of_2(hidden))), WIDEN=INTERPRETED, num_warps=4,
        )  # fmt: skip
