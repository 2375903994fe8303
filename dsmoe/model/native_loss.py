"""Cross entropy over a vocabulary in C++ on a CPU (`dsmoe/native/loss.cpp`), with its gradients.

Shapes: T tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from dsmoe import native
from dsmoe.native.ways import multiplies_bf16
from dsmoe.runtime.buffers import buffer_pool

ROW_MULTIPLE, MAX_ROWS = (
    16,
    128,
)  # rows of logits that a thread takes at a time are a multiple of one, at most the other
STRIP = 512  # lines of the weight's gradient that a thread takes at a time
DTYPES = (torch.float32, torch.bfloat16)


class _Loss(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in (
            "stored_bf16", "computed_bf16", "rows", "hidden", "vocabulary", "item_rows", "strip",
        )),
        *((name, ctypes.c_void_p) for name in (
            "x", "w", "labels", "weights", "logits", "losses", "grad_x", "grad_w",
        )),
        ("add", ctypes.c_int64),
    ]  # fmt: skip


def supports(hidden_TH: Tensor, weight_VH: Tensor) -> bool:
    """Whether the kernel can do it: fp32 or bf16 on a CPU, H in steps of 32 bytes, and a compiler was there."""
    return native.supports(hidden_TH, weight_VH, dtypes=DTYPES) and native.unavailable() is None


def loss_and_gradients(
    hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, weights_T: Tensor, rows: int, learns: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss of `dsmoe.model.loss.linear_cross_entropy`, and, if it `learns`, its gradients in x and W, the latter
    always fp32.

    Args:
        rows: whose logits are there at a time.

    Raises:
        ValueError: tensors that do not fit together or that the kernel does not support.
        IndexError: a label is no place in the vocabulary.
    """
    hidden_TH, weight_VH, labels_T = hidden_TH.contiguous(), weight_VH.contiguous(), labels_T.contiguous()
    weights_T = weights_T.float().contiguous()
    native.require(
        native.supports(hidden_TH, weight_VH, dtypes=DTYPES)
        and hidden_TH.dim() == weight_VH.dim() == 2
        and hidden_TH.size(1) == weight_VH.size(1)
        and labels_T.shape == weights_T.shape == hidden_TH.shape[:1]
        and labels_T.dtype == torch.int64,
        f"loss: found x {hidden_TH.dtype} {list(hidden_TH.shape)}, W {weight_VH.dtype} {list(weight_VH.shape)}, labels "
        f"{labels_T.dtype} {list(labels_T.shape)}, weights {list(weights_T.shape)}; expected [T, H], [V, H], int64 [T] "
        "and [T], H in steps of 32 bytes",
    )
    (tokens, hidden), vocabulary = hidden_TH.shape, len(weight_VH)
    if tokens and not 0 <= labels_T.min() <= labels_T.max() < vocabulary:
        raise IndexError(
            f"labels: found {int(labels_T.min())} to {int(labels_T.max())}, expected 0 to {vocabulary - 1}"
        )
    bf16 = hidden_TH.dtype == torch.bfloat16
    rows = max(ROW_MULTIPLE, rows // ROW_MULTIPLE * ROW_MULTIPLE)
    per_thread = -(-rows // (torch.get_num_threads() * ROW_MULTIPLE)) * ROW_MULTIPLE
    item_rows = min(MAX_ROWS, per_thread)
    logits = buffer_pool.empty([rows * vocabulary], torch.float32)  # one size, whatever the number of tokens
    losses_T = torch.empty(tokens)
    grad_hidden_TH = torch.empty_like(hidden_TH) if learns else None
    grad_weight_VH = buffer_pool.empty(weight_VH.shape, torch.float32) if learns else None
    if learns and not tokens:
        grad_weight_VH.zero_()
    for low in range(0, tokens, rows):
        here = min(rows, tokens - low)
        arguments = _Loss(
            stored_bf16=bf16, computed_bf16=bf16 and multiplies_bf16(), rows=here, hidden=hidden,
            vocabulary=vocabulary, item_rows=item_rows, strip=STRIP, x=hidden_TH[low:].data_ptr(),
            w=weight_VH.data_ptr(), labels=labels_T[low:].data_ptr(), weights=weights_T[low:].data_ptr(),
            logits=logits.data_ptr(), losses=losses_T[low:].data_ptr(), add=low > 0,
        )  # fmt: skip
        if learns:
            arguments.grad_x, arguments.grad_w = grad_hidden_TH[low:].data_ptr(), grad_weight_VH.data_ptr()
        native.run("dsmoe_loss_rows", arguments, -(-here // item_rows))
        if learns:
            native.run("dsmoe_loss_weights", arguments, -(-vocabulary // STRIP))
    return (losses_T * weights_T).sum(), grad_hidden_TH, grad_weight_VH
