"""Each expert's rows times its own matrix: in one grouped GEMM, of torch or of Transformer Engine, or one expert after
another.

Shapes: e experts, R rows ordered by expert, K and N sizes of a row before and after.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsmoe.runtime.device import gpu_capability, uses_tf32

MAX_GROUPS = 1023  # of one call of torch's grouped_mm on CUDA
# From this compute capability on grouped_mm's kernel leaves, as the gradient of a weight without rows, what lay in
# memory (pytorch/pytorch#172439).
LEAVES_GARBAGE = (10, 0)


def grouped_linear(rows_RK: Tensor, weight_eNK: Tensor, ends_e: Tensor) -> Tensor:
    """Each expert's rows times its transposed weight, in one grouped GEMM.

    Args:
        rows_RK: rows ordered by expert.
        weight_eNK: one [N, K] matrix per expert.
        ends_e: int32, where each expert's rows end.

    CUDA's kernel takes operands that lie on 16 bytes and fewer than 1024 groups. A weight that does not, as a view into
    ZeRO-3's flat memory may not, is copied; experts beyond `MAX_GROUPS` cost a second call, and the host a wait.
    """
    odd = rows_RK.size(1) * rows_RK.element_size() % 16 or weight_eNK.size(1) * weight_eNK.element_size() % 16
    if odd or rows_RK.dtype == torch.float64:  # of a latent on a CPU, elsewhere such widths are refused; of a check
        return loop_linear(rows_RK, weight_eNK, ends_e)
    if len(weight_eNK) > MAX_GROUPS:
        first = int(ends_e[MAX_GROUPS - 1])
        return torch.cat(
            (
                grouped_linear(rows_RK[:first], weight_eNK[:MAX_GROUPS], ends_e[:MAX_GROUPS]),
                grouped_linear(rows_RK[first:], weight_eNK[MAX_GROUPS:], ends_e[MAX_GROUPS:] - first),
            )
        )
    return _GroupedLinear.apply(rows_RK, weight_eNK, ends_e)


class _GroupedLinear(torch.autograd.Function):
    """Saves the weight itself: autograd of grouped_mm saves a view, behind which ZeRO-3's gathered memory would live
    until the backward pass. Without rows nothing is multiplied; rows and weight stay in the graph, since the rows'
    backward holds all-to-alls that others wait in."""

    @staticmethod
    def forward(ctx, rows_RK: Tensor, weight_eNK: Tensor, ends_e: Tensor) -> Tensor:
        ctx.save_for_backward(rows_RK, weight_eNK, ends_e)
        return _grouped_mm(rows_RK, weight_eNK.transpose(1, 2), ends_e)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RN: Tensor):
        rows_RK, weight_eNK, ends_e = ctx.saved_tensors
        grad_RN = grad_RN.contiguous()
        grad_RK = _grouped_mm(grad_RN, weight_eNK, ends_e) if ctx.needs_input_grad[0] else None
        grad_eNK = None
        if ctx.needs_input_grad[1]:
            if len(rows_RK) == 0:
                return grad_RK, torch.zeros_like(weight_eNK), None
            grad_eNK = F.grouped_mm(_on_16_bytes(grad_RN).t(), _on_16_bytes(rows_RK), offs=ends_e)
            if gpu_capability() >= LEAVES_GARBAGE:
                empty_e = torch.diff(ends_e, prepend=ends_e.new_zeros(1)) == 0
                grad_eNK.masked_fill_(empty_e.view(-1, 1, 1), 0)
        return grad_RK, grad_eNK, None


def _grouped_mm(rows_RK: Tensor, weight_eKN: Tensor, ends_e: Tensor) -> Tensor:
    if len(rows_RK) == 0:
        return rows_RK.new_empty(0, weight_eKN.size(2))
    return F.grouped_mm(_on_16_bytes(rows_RK), _on_16_bytes(weight_eKN), offs=ends_e)


def _on_16_bytes(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def loop_linear(rows_RK: Tensor, weight_eNK: Tensor, ends_e: Tensor) -> Tensor:
    """The same as `grouped_linear`, one expert after another. Synchronises with the host."""
    counts = torch.diff(ends_e, prepend=ends_e.new_zeros(1)).tolist()
    blocks = rows_RK.split(counts)
    return torch.cat([F.linear(block, weight) for block, weight in zip(blocks, weight_eNK.unbind(0), strict=True)])


def transformer_engine_linear(rows_RK: Tensor, weight_eNK: Tensor, ends_e: Tensor) -> Tensor:
    """The same as `grouped_linear`, by the product behind Transformer Engine's `GroupedLinear` (2.20), which is what
    Megatron-Core's grouped experts are made of. The module itself owns a parameter for each expert; its product takes
    views of one. Synchronises with the host, which it wants the sizes from.

    Transformer Engine multiplies fp32 as TF32, asked or not: where it is not asked for (`training.tf32`), that goes
    through `loop_linear`.
    """
    as_asked = uses_tf32() if rows_RK.dtype == torch.float32 else rows_RK.dtype in (torch.bfloat16, torch.float16)
    if not as_asked:
        return loop_linear(rows_RK, weight_eNK, ends_e)
    return _TransformerEngineLinear.apply(rows_RK, weight_eNK, ends_e)


class _TransformerEngineLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RK: Tensor, weight_eNK: Tensor, ends_e: Tensor) -> Tensor:
        ctx.save_for_backward(rows_RK, weight_eNK)
        ctx.counts = torch.diff(ends_e, prepend=ends_e.new_zeros(1)).tolist()
        return _of_rows(weight_eNK, rows_RK, ctx.counts, weight_eNK.size(1), layout="TN")

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RN: Tensor):
        rows_RK, weight_eNK = ctx.saved_tensors
        grad_RN, grad_RK, grad_eNK = grad_RN.contiguous(), None, None
        if ctx.needs_input_grad[0]:
            grad_RK = _of_rows(weight_eNK, grad_RN, ctx.counts, weight_eNK.size(2), layout="NN", grad=True)
        if ctx.needs_input_grad[1]:
            grad_eNK = torch.empty_like(weight_eNK)
            rows, grads = rows_RK.contiguous().split(ctx.counts), grad_RN.split(ctx.counts)
            _transformer_engine_gemm(rows, grads, grad_eNK.unbind(0), layout="NT", grad=True)
        return grad_RK, grad_eNK, None


def _of_rows(weight_eNK: Tensor, rows: Tensor, counts: list[int], width: int, **options) -> Tensor:
    out = rows.new_empty(len(rows), width)
    if len(rows):
        blocks = rows.contiguous().split(counts)
        _transformer_engine_gemm(weight_eNK.unbind(0), blocks, [out], m_splits=counts, single_output=True, **options)
    return out


def _transformer_engine_gemm(left, right, out, **options) -> None:
    """Operands as BLAS has them, matrices in columns: layout TN is right @ left.T, NN right @ left, NT right.T @ left.
    Outputs of an expert without rows become 0."""
    from transformer_engine.pytorch.cpp_extensions import general_grouped_gemm

    unquantized = [None] * len(left)
    general_grouped_gemm(list(left), list(right), list(out), unquantized, out[0].dtype, **options)
