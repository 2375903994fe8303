"""Each expert's rows times its own matrix: in one grouped GEMM, or one expert after another.

Shapes: e experts, R rows ordered by expert, K and N sizes of a row before and after.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_GROUPS = 1023  # of one call of torch's grouped_mm on CUDA


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
    rows_RK, weight_eNK = _on_16_bytes(rows_RK), _on_16_bytes(weight_eNK)
    if rows_RK.size(0) == 0:
        # grouped_mm cannot differentiate 0 rows whatever their gradient looks like in memory. A row of zeros joined to
        # them keeps both weights and rows in the graph: the rows' backward holds all-to-alls that others wait in.
        one_row = torch.cat((rows_RK, rows_RK.new_zeros(1, rows_RK.size(1))))
        return F.grouped_mm(one_row, weight_eNK.transpose(-2, -1), offs=torch.ones_like(ends_e))[:0]
    return F.grouped_mm(rows_RK, weight_eNK.transpose(-2, -1), offs=ends_e)


def _on_16_bytes(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def loop_linear(rows_RK: Tensor, weight_eNK: Tensor, ends_e: Tensor) -> Tensor:
    """The same as `grouped_linear`, one expert after another. Synchronises with the host."""
    counts = torch.diff(ends_e, prepend=ends_e.new_zeros(1)).tolist()
    blocks = rows_RK.split(counts)
    return torch.cat([F.linear(block, weight) for block, weight in zip(blocks, weight_eNK.unbind(0), strict=True)])
