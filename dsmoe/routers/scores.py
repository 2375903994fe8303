"""Turn scores into a routing, a block of tokens at a time.

With a thousand experts the scores of a batch are several times as large as its hidden states, and so is every
intermediate tensor. A `RoutingFn` routes one block of tokens with plain operators. Autograd saves nothing of a block
except the selection: the backward pass computes its weights again.

Shapes: T tokens, t tokens of a block, E experts, H hidden, k selected experts of each token, N routes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsmoe.routers.logits import fp32_logits, recomputes_logits
from dsmoe.routers.renamed import refuse_old_fields
from dsmoe.routers.routing import Routing

BLOCK = 1 << 18  # scores that a CPU processes at a time; a routing function's intermediates are about ten times as many


@refuse_old_fields(of_tokens="per_token", chosen="saved_selection")
@dataclass
class Decision:
    """How a routing function routes a block of tokens."""

    probs_tE: Tensor  # weights, 0 where inactive
    map_tE: Tensor  # bool
    # Inputs of the losses. In the backward pass entries of `sums` without a gradient may be missing.
    sums: dict[str, Tensor] = field(default_factory=dict)  # summed over the block's tokens
    per_token: dict[str, Tensor] = field(default_factory=dict)  # [t, ...]
    saved_selection: Tensor | None = None  # [t, ...], no gradient: what the backward pass need not compute again


# (scores_tE, slice of these tokens, saved_selection in the backward pass and None in the forward pass, *parameters).
# The result for a token must not depend on any other token.
RoutingFn = Callable[..., Decision]


@dataclass(frozen=True)
class Scores:
    """fp32 [T, E]: a tensor or, with a weight, the logits of a gate."""

    source: Tensor  # [T, E], or [T, H] in any dtype
    weight_EH: Tensor | None = None


def in_blocks(routing_fn: RoutingFn, scores: Scores, *parameters: Tensor) -> Routing:
    """Route all tokens with a routing function.

    Logits are saved for the backward pass, except those of a bf16 gate with more experts than H, which are more than
    twice as large as the hidden states: the backward pass computes them again.

    Args:
        parameters: further tensors with a gradient that the routing function gets.

    Returns:
        A `Routing` whose `loss_inputs` are the sums over all tokens and the values per token.
    """
    names: list[str] = []
    probs_TE, map_TE, *loss_inputs = _InBlocks.apply(routing_fn, names, scores.source, scores.weight_EH, *parameters)
    return Routing(probs_TE, map_TE, dict(zip(names, loss_inputs, strict=True)))


class _InBlocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, routing_fn: RoutingFn, names: list[str], source: Tensor, weight_EH: Tensor | None, *parameters: Tensor
    ):
        logits = source
        if weight_EH is not None:
            recompute = recomputes_logits(source.dtype != torch.float32, *weight_EH.shape)
            logits = None if recompute else fp32_logits(source, weight_EH)
        scores = _Blocks(source, weight_EH, logits)
        probs_TE, map_TE = scores.empty(), scores.empty(torch.bool)
        decisions: list[Decision] = []
        for rows in scores.rows:
            decision = routing_fn(scores.block(rows), rows, None, *parameters)
            probs_TE[rows], map_TE[rows] = decision.probs_tE, decision.map_tE
            decision.probs_tE = decision.map_tE = None
            decisions.append(decision)
        sums, per_token = decisions[0].sums, decisions[0].per_token
        names += [*sums, *per_token]
        selection = None
        if decisions[0].saved_selection is not None:
            selection = torch.cat([decision.saved_selection for decision in decisions])
        ctx.save_for_backward(source, weight_EH, None if weight_EH is None else logits, selection, *parameters)
        ctx.routing_fn, ctx.sums, ctx.accepts_sparse_grad = routing_fn, list(sums), True
        ctx.emits_sparse_grad = weight_EH is None and accepts_sparse_grad(source)
        ctx.mark_non_differentiable(map_TE)
        ctx.set_materialize_grads(False)
        loss_inputs = [sum(decision.sums[name] for decision in decisions) for name in sums]
        loss_inputs += [torch.cat([decision.per_token[name] for decision in decisions]) for name in per_token]
        return probs_TE, map_TE, *loss_inputs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TE: Tensor | None, _, *loss_grads: Tensor | None):
        source, weight_EH, logits, selection, *parameters = ctx.saved_tensors
        scores = _Blocks(source, weight_EH, source if weight_EH is None else logits)
        sum_grads, token_grads = loss_grads[: len(ctx.sums)], loss_grads[len(ctx.sums) :]
        grad_source = _SparseGradBuilder(source) if ctx.emits_sparse_grad else torch.empty_like(source)
        if weight_EH is not None:
            wide_EH = weight_EH.float()
            grad_weight = torch.zeros_like(wide_EH)
        grad_parameters = [torch.zeros_like(parameter) for parameter in parameters]
        for rows, grad_tE in zip(scores.rows, _by_block(grad_TE, scores.rows), strict=True):
            leaves = [leaf.detach().requires_grad_() for leaf in (scores.block(rows), *parameters)]
            with torch.enable_grad():
                decision = ctx.routing_fn(leaves[0], rows, None if selection is None else selection[rows], *leaves[1:])
            outputs = [(decision.probs_tE, grad_tE)]
            outputs += [(decision.sums.get(name), grad) for name, grad in zip(ctx.sums, sum_grads, strict=True)]
            per_token = zip(decision.per_token.values(), token_grads, strict=True)
            outputs += [(value_t, None if grad_T is None else grad_T[rows]) for value_t, grad_T in per_token]
            grad_scores, *block_grads = _gradients(outputs, leaves)
            for total, grad in zip(grad_parameters, block_grads, strict=True):
                total += grad
            if weight_EH is None:
                grad_source[rows] = grad_scores
            else:
                grad_source[rows] = grad_scores @ wide_EH
                grad_weight.addmm_(grad_scores.t(), source[rows].float())
        if isinstance(grad_source, _SparseGradBuilder):
            grad_source = grad_source.finish()
        grad_weight = None if weight_EH is None else grad_weight.to(weight_EH.dtype)
        return None, None, grad_source, grad_weight, *grad_parameters


class _SparseGradBuilder:
    """A gradient [T, E] that is written block by block and is 0 for most pairs. Where the host can see that, only the
    nonzero entries are stored, as long as they are few."""

    def __init__(self, like_TE: Tensor):
        self.like_TE = like_TE
        self.dense_TE: Tensor | None = None
        self.indices: list[Tensor] = []
        self.values: list[Tensor] = []

    def __setitem__(self, rows: slice, grad_tE: Tensor) -> None:
        if self.dense_TE is None and is_on_host(grad_tE) and 4 * int(grad_tE.count_nonzero()) < grad_tE.numel():
            token_n, expert_n = grad_tE.nonzero().unbind(1)
            self.indices.append(torch.stack((token_n + rows.start, expert_n)))
            self.values.append(grad_tE[token_n, expert_n])
            return
        if self.dense_TE is None:
            self.dense_TE = self.finish().to_dense()
        self.dense_TE[rows] = grad_tE

    def finish(self) -> Tensor:
        if self.dense_TE is not None:
            return self.dense_TE
        empty = self.like_TE.new_zeros(2, 0, dtype=torch.int64)
        indices_2N = torch.cat([empty, *self.indices], dim=1)
        values_N = torch.cat([self.like_TE.new_zeros(0), *self.values])
        return torch.sparse_coo_tensor(indices_2N, values_N, self.like_TE.shape, check_invariants=False)


def _gradients(outputs: list[tuple[Tensor | None, Tensor | None]], leaves: list[Tensor]) -> list[Tensor]:
    """Gradients of the leaves from (output, its gradient) pairs; 0 where there is none."""
    outputs = [(out, grad) for out, grad in outputs if grad is not None and out is not None and out.requires_grad]
    if not outputs:
        return [torch.zeros_like(leaf) for leaf in leaves]
    tensors, grads = zip(*outputs, strict=True)
    return list(torch.autograd.grad(tensors, leaves, grads, allow_unused=True, materialize_grads=True))


class _Blocks:
    """Blocks of scores: slices of a tensor, or computed from the hidden states."""

    def __init__(self, source: Tensor, weight_EH: Tensor | None, logits: Tensor | None):
        self.source, self.weight_EH, self.logits = source, weight_EH, logits
        self.shape = (len(source), source.size(1) if weight_EH is None else len(weight_EH))
        self.rows = blocks(self.shape, source.device)

    def block(self, rows: slice) -> Tensor:
        return fp32_logits(self.source[rows], self.weight_EH) if self.logits is None else self.logits[rows]

    def empty(self, dtype: torch.dtype | None = None) -> Tensor:
        """[T, E], by default in the dtype of the scores."""
        dtype = dtype or (torch.float32 if self.logits is None else self.logits.dtype)
        return self.source.new_empty(self.shape, dtype=dtype)


def weights_at(probs_TE: Tensor, flat_N: Tensor, first: int = 0) -> Tensor:
    """Weights of the given routes, [N].

    The gradient of weights made by `in_blocks` stays sparse, without the [T, E] around it.

    Args:
        flat_N: int64, token * E + expert of each route, tokens counted from `first`; no route twice.
    """
    return _WeightsAt.apply(probs_TE, flat_N, first, accepts_sparse_grad(probs_TE))


def accepts_sparse_grad(output_TE: Tensor) -> bool:
    """Whether the function that made a tensor accepts a sparse gradient, of some pairs only."""
    return getattr(output_TE.grad_fn, "accepts_sparse_grad", False)


class _WeightsAt(torch.autograd.Function):
    @staticmethod
    def forward(ctx, probs_TE: Tensor, flat_N: Tensor, first: int, sparse: bool) -> Tensor:
        ctx.shape, ctx.first, ctx.sparse = probs_TE.shape, first, sparse
        ctx.save_for_backward(flat_N)
        return probs_TE[first:].flatten().index_select(0, flat_N)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_N: Tensor):
        (flat_N,) = ctx.saved_tensors
        if ctx.sparse:
            experts = ctx.shape[1]
            indices_2N = torch.stack((flat_N // experts + ctx.first, flat_N % experts))
            grad = torch.sparse_coo_tensor(indices_2N, grad_N, ctx.shape, check_invariants=False)
        else:
            grad = grad_N.new_zeros(ctx.shape)
            grad[ctx.first :].view(-1).scatter_(0, flat_N, grad_N)
        return grad, None, None, None


def _by_block(grad_TE: Tensor | None, rows: list[slice]) -> Iterator[Tensor | None]:
    """A dense or sparse gradient [T, E] as dense [t, E] blocks."""
    if grad_TE is None or not grad_TE.is_sparse:
        yield from (None if grad_TE is None else grad_TE[block] for block in rows)
        return
    (token_N, expert_N), value_N = grad_TE._indices(), grad_TE._values()
    counts = [len(token_N)]
    if len(rows) > 1:  # on a CPU
        token_N, order = token_N.sort()
        expert_N, value_N = expert_N[order], value_N[order]
        ends = torch.searchsorted(token_N, torch.tensor([block.stop for block in rows]))
        counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
    for block, *routes in zip(rows, *(x.split(counts) for x in (token_N, expert_N, value_N)), strict=True):
        token_n, expert_n, value_n = routes
        grad_tE = value_N.new_zeros(block.stop - block.start, grad_TE.size(1))
        grad_tE.view(-1).index_add_(0, (token_n - block.start) * grad_TE.size(1) + expert_n, value_n)
        yield grad_tE


def is_on_host(tensor: Tensor) -> bool:
    """Whether the host can read a tensor's values without waiting for a device."""
    return tensor.device.type == "cpu"


def exceeded_by(scores_TE: Tensor, share: float) -> float:
    """The score that this share of all scores exceeds. Waits for the device."""
    scores_N = scores_TE.detach().flatten()
    return scores_N.kthvalue(max(1, round(scores_N.numel() * (1 - share)))).values.item()


def spread(gate_tk: Tensor, expert_tk: Tensor, like_tE: Tensor) -> Tensor:
    """Gates of selected experts as weights [t, E], 0 elsewhere."""
    return torch.zeros_like(like_tE).scatter_(1, expert_tk, gate_tk)


def map_of(expert_tk: Tensor, like_tE: Tensor) -> Tensor:
    """Routing map of selected experts: bool [t, E]."""
    return torch.zeros_like(like_tE, dtype=torch.bool).scatter_(1, expert_tk, True)


def blocks(shape: tuple[int, int], device: torch.device) -> list[slice]:
    """Rows of a matrix that fit a CPU's cache; all rows on a device. At least one slice, empty for an empty matrix."""
    rows, columns = shape
    return slices(rows, BLOCK // columns if device.type == "cpu" else rows) or [slice(0, 0)]


def slices(length: int, step: int) -> list[slice]:
    """Cut a dimension into slices of at most `step`."""
    step = max(1, step)
    return [slice(low, min(low + step, length)) for low in range(0, length, step)]
