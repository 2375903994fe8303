"""Cross entropy over a vocabulary without a [T, V] tensor: logits exist for a few rows at a time.

Shapes: T tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsmoe.model import native_loss
from dsmoe.native import ways
from dsmoe.runtime.buffers import buffer_pool
from dsmoe.runtime.step_timer import REST, step_timer

CHUNK = {"cpu": 1 << 21}  # logits at a time: a few MiB stay in a CPU's cache
CHUNK_ELSEWHERE = 1 << 27  # an accelerator wants large GEMMs
PROBE_TOKENS, PROBE_NUMBERS = 512, 1 << 21  # on which ways are compared: tokens, and numbers of the weight at most

LossWay = Callable[[Tensor, Tensor, Tensor, Tensor, int, bool], tuple[Tensor, Tensor | None, Tensor | None]]


def linear_cross_entropy(hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, weights_T: Tensor) -> Tensor:
    """sum_t w_t (logsumexp(W x_t) - (W x_t)[label_t]): an fp32 scalar, differentiable in x and W.

    Args:
        hidden_TH, weight_VH: x and W, of one dtype; logits and softmax are fp32.
        labels_T: int64 in [0, V).
        weights_T: fp32 weight of each label, without gradient.
    """
    return _LinearCrossEntropy.apply(hidden_TH, weight_VH, labels_T, weights_T)


def plain_cross_entropy(hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, weights_T: Tensor) -> Tensor:
    """The same with all logits at once: the reference."""
    logits_TV = F.linear(hidden_TH, weight_VH).float()
    return (F.cross_entropy(logits_TV, labels_T, reduction="none") * weights_T).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    """Makes the gradients while it has the logits, in the forward pass; the backward pass scales them."""

    @staticmethod
    def forward(ctx, hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, weights_T: Tensor) -> Tensor:
        chunk = max(1, CHUNK.get(hidden_TH.device.type, CHUNK_ELSEWHERE) // len(weight_VH))
        learns = any(ctx.needs_input_grad[:2])
        implementation = _fastest(hidden_TH, weight_VH)
        total, grad_hidden_TH, grad_weight_VH = implementation(hidden_TH, weight_VH, labels_T, weights_T, chunk, learns)
        if learns:
            ctx.save_for_backward(grad_hidden_TH, grad_weight_VH.to(weight_VH.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return *(_scaled(tensor, grad.to(tensor.dtype)) for tensor in ctx.saved_tensors), None, None


def _fastest(hidden_TH: Tensor, weight_VH: Tensor) -> LossWay:
    """dsmoe's kernel or torch's operators, whichever takes less time at these widths here; one way for any T."""
    if not native_loss.supports(hidden_TH, weight_VH):
        return torch_loss
    (vocabulary, hidden), dtype = weight_VH.shape, weight_VH.dtype
    shape = f"{str(dtype).removeprefix('torch.')}, V={vocabulary}, H={hidden}"
    candidates = loss_candidates(PROBE_TOKENS, min(vocabulary, max(1, PROBE_NUMBERS // hidden)), hidden, dtype)
    if ways.fastest("loss", shape, candidates) == "native":
        return native_loss.loss_and_gradients
    return torch_loss


def loss_candidates(tokens: int, vocabulary: int, hidden: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """The loss of random tokens and its gradients by dsmoe's kernel ("native") and by torch's operators ("torch")."""

    @lru_cache(maxsize=1)  # made by the first one that runs
    def problem() -> tuple:
        random = torch.Generator().manual_seed(0)
        x, w = (torch.randn(rows, hidden, generator=random).to(dtype) for rows in (tokens, vocabulary))
        labels = torch.randint(vocabulary, (tokens,), generator=random)
        return x, w, labels, torch.ones(tokens), max(1, CHUNK["cpu"] // vocabulary), True

    return {
        "native": lambda: native_loss.loss_and_gradients(*problem()),
        "torch": lambda: torch_loss(*problem()),
    }


def torch_loss(
    hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, weights_T: Tensor, rows: int, learns: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What `native_loss.loss_and_gradients` gives, by torch's operators on any device."""
    tokens = len(hidden_TH)
    total = torch.zeros((), dtype=torch.float32, device=hidden_TH.device)
    grad_hidden_TH = torch.empty_like(hidden_TH) if learns else None
    grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if learns else None
    for low in range(0, tokens, rows):
        part = slice(low, min(low + rows, tokens))
        hidden, labels, weights = hidden_TH[part], labels_T[part, None], weights_T[part, None].float()
        logits = F.linear(hidden, weight_VH).float()
        probs = logits.softmax(1)
        # logsumexp from what is there already: max + log sum exp(x - max), and the largest p is 1 / that sum
        logsumexp = logits.amax(1, keepdim=True) - probs.amax(1, keepdim=True).log()
        total += ((logsumexp - logits.gather(1, labels)) * weights).sum()
        if learns:
            grad_logits = probs.mul_(weights).scatter_add_(1, labels, -weights).to(hidden.dtype)
            torch.mm(grad_logits, weight_VH, out=grad_hidden_TH[part])
            if grad_logits.dtype == torch.float32:
                grad_weight_VH.addmm_(grad_logits.t(), hidden)
            else:
                grad_weight_VH += grad_logits.t() @ hidden
    return total, grad_hidden_TH, grad_weight_VH


def _scaled(tensor: Tensor, by: Tensor) -> Tensor:
    """The product, on a CPU in memory that is kept: the matrix's gradient may be the largest tensor of a step."""
    out = buffer_pool.empty(tensor.shape, tensor.dtype) if tensor.device.type == "cpu" else None
    return torch.mul(tensor, by, out=out)


class OutputLayer(ColumnParallelLinear):
    """Megatron's output layer, which gives the loss instead of the logits where it gets labels.

    The loss belongs here, not beside it: ZeRO-3 gathers a weight for the module that owns it.
    """

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, labels: Tensor | None = None, weights=None, **kwargs
    ):
        """input_ [S, B, H]; labels and fp32 weights [B, S]. Returns (logits [S, B, V], None) or the loss, a scalar."""
        if labels is None:
            return super().forward(input_, weight, **kwargs)
        matrix = self.weight if weight is None else weight
        (hidden_TH,) = step_timer.mark_region(REST, "loss", input_.flatten(0, 1))
        loss = linear_cross_entropy(hidden_TH, matrix, labels.t().flatten(), weights.t().flatten())
        return step_timer.mark_region("loss", REST, loss)[0]
