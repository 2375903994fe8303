"""What a router decides, and what of it the MoE layer gets.

Shapes: T tokens of this rank, E experts, e experts on this rank, r latent width, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Routing:
    """One layer's decision."""

    probs_TE: Tensor  # fp32 weights, 0 where inactive
    map_TE: Tensor  # bool
    kept: dict[str, Tensor] = field(default_factory=dict)  # all that the losses get, with its gradient
    statistic_E: Tensor | None = None  # fp32, no gradient: a controller gets its mean over ranks and micro-steps
    latents_TEr: Tensor | None = None  # what a self-scoring expert was scored by, in the model's dtype
    reduce_erH: Tensor | None = None  # or, for this rank's experts, the matrices that it is made with


class RoutingResult(tuple):
    """What a router module returns to its MoE layer.

    It unpacks like Megatron-Core's contract, `probs, map = router(hidden)`. Experts that score themselves also need
    `latents_TEr` or `reduce_erH`, which follow the pair only where there are any. It is a tuple because ZeRO-3 hooks
    the backward pass to the tensors that a module returns, and finds them in tuples, lists and dicts only.
    """

    __slots__ = ()

    @classmethod
    def from_routing(cls, routing: Routing, with_latents: bool) -> RoutingResult:
        """with_latents: whether the MoE layer has experts that take them; a stock `MoELayer` unpacks two tensors."""
        pair, latents = (routing.probs_TE, routing.map_TE), (routing.latents_TEr, routing.reduce_erH)
        return cls(pair + latents if with_latents and latents != (None, None) else pair)

    @property
    def probs_TE(self) -> Tensor:
        """fp32 weights, 0 where inactive."""
        return self[0]

    @property
    def map_TE(self) -> Tensor:
        """bool, True where a token uses an expert."""
        return self[1]

    @property
    def latents_TEr(self) -> Tensor | None:
        """Latents of all (token, expert) pairs, in the model's dtype, if they are to be sent to the experts."""
        return self[2] if len(self) > 2 else None

    @property
    def reduce_erH(self) -> Tensor | None:
        """Matrices from which this rank's experts recompute the latents of their tokens."""
        return self[3] if len(self) > 2 else None
