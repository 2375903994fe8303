"""From scores to a routing, some tokens at a time.

With a thousand experts the scores of a batch are several times its tokens, and whatever is made of them is as large. A
`Rule` decides about a block of tokens with plain operators, of which nothing is kept but what it chose: in the backward
pass it weighs the block again.

Shapes: T tokens, t of a block, E experts, H hidden, k chosen ones of each token, N routes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsmoe.routers.logits import fp32_logits
from dsmoe.routers.routing import Routing

BLOCK = 1 << 18  # scores that a CPU works on at a time; the operators of a rule make ten times as many numbers of them


@dataclass
class Decision:
    """What a rule makes of some tokens."""

    probs_tE: Tensor  # weights, 0 where inactive
    map_tE: Tensor  # bool
    # What the losses need; in the backward pass, what has no gradient may be left out of the sums.
    sums: dict[str, Tensor] = field(default_factory=dict)  # over these tokens
    of_tokens: dict[str, Tensor] = field(default_factory=dict)  # [t, ...]
    chosen: Tensor | None = None  # [t, ...], no gradient: what it need not find again in the backward pass


# (scores_tE, place of these tokens among all, `chosen` in the backward pass and None before, *parameters). What becomes
# of a token depends on no other one.
Rule = Callable[..., Decision]


@dataclass(frozen=True)
class Scores:
    """fp32 [T, E]: a tensor or, with a weight, the logits of a gate."""

    source: Tensor  # [T, E], or [T, H] in any dtype
    weight_EH: Tensor | None = None


def in_blocks(rule: Rule, scores: Scores, *parameters: Tensor) -> Routing:
    """What the rule makes of all tokens, with its sums over all of them.

    Logits are kept, but not those of a bf16 gate with more experts than H, which are more than twice as large as the
    tokens: the backward pass makes them again.

    Args:
        parameters: what the rule gets besides and has a gradient.
    """
    names: list[str] = []
    probs_TE, map_TE, *kept = _InBlocks.apply(rule, names, scores.source, scores.weight_EH, *parameters)
    return Routing(probs_TE, map_TE, dict(zip(names, kept, strict=True)))


class _InBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rule: Rule, names: list[str], source: Tensor, weight_EH: Tensor | None, *parameters: Tensor):
        held = source
        if weight_EH is not None:
            again = source.dtype != torch.float32 and len(weight_EH) > source.size(1)
            held = None if again else fp32_logits(source, weight_EH)
        scores = _Blocks(source, weight_EH, held)
        probs_TE, map_TE = scores.empty(), scores.empty(torch.bool)
        decisions: list[Decision] = []
        for rows in scores.rows:
            decision = rule(scores.block(rows), rows, None, *parameters)
            probs_TE[rows], map_TE[rows] = decision.probs_tE, decision.map_tE
            decision.probs_tE = decision.map_tE = None
            decisions.append(decision)
        sums, of_tokens = decisions[0].sums, decisions[0].of_tokens
        names += [*sums, *of_tokens]
        chosen = None if decisions[0].chosen is None else torch.cat([decision.chosen for decision in decisions])
        ctx.save_for_backward(source, weight_EH, None if weight_EH is None else held, chosen, *parameters)
        ctx.rule, ctx.sums, ctx.takes_routes = rule, list(sums), True
        ctx.sends_routes = weight_EH is None and takes_routes(source)
        ctx.mark_non_differentiable(map_TE)
        ctx.set_materialize_grads(False)
        kept = [sum(decision.sums[name] for decision in decisions) for name in sums]
        kept += [torch.cat([decision.of_tokens[name] for decision in decisions]) for name in of_tokens]
        return probs_TE, map_TE, *kept

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TE: Tensor | None, _, *grads: Tensor | None):
        source, weight_EH, held, chosen, *parameters = ctx.saved_tensors
        scores = _Blocks(source, weight_EH, source if weight_EH is None else held)
        grad_source = _RoutesOnly(source) if ctx.sends_routes else torch.empty_like(source)
        if weight_EH is not None:
            wide_EH = weight_EH.float()
            grad_weight = torch.zeros_like(wide_EH)
        grad_parameters = [torch.zeros_like(parameter) for parameter in parameters]
        for rows, grad_tE in zip(scores.rows, _by_block(grad_TE, scores.rows), strict=True):
            leaves = [leaf.detach().requires_grad_() for leaf in (scores.block(rows), *parameters)]
            with torch.enable_grad():
                found = ctx.rule(leaves[0], rows, None if chosen is None else chosen[rows], *leaves[1:])
            pairs = [(found.probs_tE, grad_tE)]
            pairs += [(found.sums.get(name), grad) for name, grad in zip(ctx.sums, grads, strict=False)]
            of_tokens = zip(found.of_tokens.values(), grads[len(ctx.sums) :], strict=True)
            pairs += [(value_t, None if grad_T is None else grad_T[rows]) for value_t, grad_T in of_tokens]
            grad_scores, *more = _gradients(pairs, leaves)
            for total, grad in zip(grad_parameters, more, strict=True):
                total += grad
            if weight_EH is None:
                grad_source[rows] = grad_scores
            else:
                grad_source[rows] = grad_scores @ wide_EH
                grad_weight.addmm_(grad_scores.t(), source[rows].float())
        if ctx.sends_routes:
            grad_source = grad_source.finish()
        grad_weight = None if weight_EH is None else grad_weight.to(weight_EH.dtype)
        return None, None, grad_source, grad_weight, *grad_parameters


class _RoutesOnly:
    """A gradient [T, E] that is written block by block and may be 0 at most pairs. Where that can be seen, only what it
    is at the others is kept, as long as they are few."""

    def __init__(self, like_TE: Tensor):
        self.like_TE, self.dense_TE, self.places, self.values = like_TE, None, [], []

    def __setitem__(self, rows: slice, grad_tE: Tensor) -> None:
        if self.dense_TE is None and is_on_host(grad_tE) and 4 * int(grad_tE.count_nonzero()) < grad_tE.numel():
            token_n, expert_n = grad_tE.nonzero().unbind(1)
            self.places.append(torch.stack((token_n + rows.start, expert_n)))
            self.values.append(grad_tE[token_n, expert_n])
            return
        if self.dense_TE is None:
            self.dense_TE = self.finish().to_dense()
        self.dense_TE[rows] = grad_tE

    def finish(self) -> Tensor:
        if self.dense_TE is not None:
            return self.dense_TE
        shape, none = self.like_TE.shape, self.like_TE.new_zeros(2, 0, dtype=torch.int64)
        places_2N = torch.cat([none, *self.places], dim=1)
        values_N = torch.cat([self.like_TE.new_zeros(0), *self.values])
        return torch.sparse_coo_tensor(places_2N, values_N, shape, check_invariants=False)


def _gradients(pairs: list[tuple[Tensor | None, Tensor | None]], leaves: list[Tensor]) -> list[Tensor]:
    """Of the leaves, from outputs with their gradients: 0 where there is none."""
    pairs = [(out, grad) for out, grad in pairs if grad is not None and out is not None and out.requires_grad]
    if not pairs:
        return [torch.zeros_like(leaf) for leaf in leaves]
    outputs, given = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, leaves, given, allow_unused=True, materialize_grads=True)


class _Blocks:
    """Scores, a block at a time: of all that are held, or made of the tokens."""

    def __init__(self, source: Tensor, weight_EH: Tensor | None, held: Tensor | None):
        self.source, self.weight_EH, self.held = source, weight_EH, held
        self.shape = (len(source), source.size(1) if weight_EH is None else len(weight_EH))
        self.rows = blocks(self.shape, source.device)

    def block(self, rows: slice) -> Tensor:
        return fp32_logits(self.source[rows], self.weight_EH) if self.held is None else self.held[rows]

    def empty(self, dtype: torch.dtype | None = None) -> Tensor:
        """[T, E], in the scores' dtype if no other is asked for."""
        dtype = dtype or (torch.float32 if self.held is None else self.held.dtype)
        return self.source.new_empty(self.shape, dtype=dtype)


def weights_at(probs_TE: Tensor, flat_N: Tensor, first: int = 0) -> Tensor:
    """The weights of routes, [N], of which there is one for a (token, expert) each.

    Their gradient goes back as it is, without the [T, E] around it, where `in_blocks` made the weights.

    Args:
        flat_N: int64, token * E + expert, of tokens from `first` on.
    """
    return _WeightsAt.apply(probs_TE, flat_N, first, takes_routes(probs_TE))


def takes_routes(made_TE: Tensor) -> bool:
    """Whether what made it understands a gradient, sparse, of some pairs alone."""
    return getattr(made_TE.grad_fn, "takes_routes", False)


class _WeightsAt(torch.autograd.Function):
    @staticmethod
    def forward(ctx, probs_TE: Tensor, flat_N: Tensor, first: int, as_routes: bool) -> Tensor:
        ctx.shape, ctx.first, ctx.as_routes = probs_TE.shape, first, as_routes
        ctx.save_for_backward(flat_N)
        return probs_TE[first:].flatten().index_select(0, flat_N)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_N: Tensor):
        (flat_N,) = ctx.saved_tensors
        if ctx.as_routes:
            experts = ctx.shape[1]
            places_2N = torch.stack((flat_N // experts + ctx.first, flat_N % experts))
            grad = torch.sparse_coo_tensor(places_2N, grad_N, ctx.shape, check_invariants=False)
        else:
            grad = grad_N.new_zeros(ctx.shape)
            grad[ctx.first :].view(-1).scatter_(0, flat_N, grad_N)
        return grad, None, None, None


def _by_block(grad_TE: Tensor | None, rows: list[slice]) -> Iterator[Tensor | None]:
    """A gradient [T, E], or one of routes alone (sparse), as [t, E] for each block."""
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
    """Whether the host has a tensor's values without waiting for a device."""
    return tensor.device.type == "cpu"


def spread(gate_tk: Tensor, expert_tk: Tensor, like_tE: Tensor) -> Tensor:
    """Weights [t, E], 0 where an expert was not chosen."""
    return torch.zeros_like(like_tE).scatter_(1, expert_tk, gate_tk)


def map_of(expert_tk: Tensor, like_tE: Tensor) -> Tensor:
    """bool like `like_tE`, True at the chosen."""
    return torch.zeros_like(like_tE, dtype=torch.bool).scatter_(1, expert_tk, True)


def blocks(shape: tuple[int, int], device: torch.device) -> list[slice]:
    """Rows of a matrix that a CPU works on while they are in its cache; all of them on a device. At least one, which is
    empty where the matrix is."""
    rows, columns = shape
    return slices(rows, BLOCK // columns if device.type == "cpu" else rows) or [slice(0, 0)]


def slices(length: int, step: int) -> list[slice]:
    """Parts of a dimension, of `step` each."""
    step = max(1, step)
    return [slice(low, min(low + step, length)) for low in range(0, length, step)]
