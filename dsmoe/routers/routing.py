"""What a router decides, and what of it the MoE layer gets.

Shapes: T tokens of this rank, E experts, e experts on this rank, r latent width, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from dsmoe.errors import RouterError
from dsmoe.routers.renamed import refuse_old_fields


@refuse_old_fields(kept="loss_inputs")
@dataclass
class Routing:
    """One layer's routing of this rank's tokens."""

    probs_TE: Tensor  # fp32 weights, 0 where inactive
    map_TE: Tensor  # bool
    loss_inputs: dict[str, Tensor] = field(default_factory=dict)  # all that `losses` gets, with its gradient
    statistic_E: Tensor | None = None  # fp32, no gradient: a controller gets its mean over ranks and micro-steps
    histogram_EB: Tensor | None = None  # int64: in training, a controller gets its sum over ranks and micro-steps
    latents_TEr: Tensor | None = None  # of experts that score themselves, in the model's dtype, to be sent to them
    reduce_erH: Tensor | None = None  # or the matrices from which this rank's experts recompute them


@refuse_old_fields(kept="loss_inputs")
@dataclass(frozen=True)
class RetainedRouting:
    """The part of a `Routing` that is retained until its losses are computed."""

    loss_inputs: dict[str, Tensor]
    statistic_E: Tensor | None

    def __getattr__(self, name: str):
        if name in Routing.__dataclass_fields__:
            raise RouterError(
                f"Routing.{name} is not retained until losses are computed; put what they need into Routing.loss_inputs"
            )
        raise AttributeError(name)


class RoutingResult(tuple):
    """What a router module returns to its MoE layer.

    It unpacks like Megatron-Core's contract, `probs, map = router(hidden)`. Experts that score themselves also need
    `latents_TEr` or `reduce_erH`, which follow the pair only where there are any. It is a tuple because ZeRO-3 hooks
    the backward pass to the tensors that a module returns, and finds them in tuples, lists and dicts only.
    """

    __slots__ = ()

    @classmethod
    def from_routing(cls, routing: Routing, with_latents: bool) -> RoutingResult:
        """with_latents: whether the MoE layer accepts more than the pair; a stock `MoELayer` does not."""
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
        """Latents of all (token, expert) pairs, in the model's dtype, if they are sent to the experts."""
        return self[2] if len(self) > 2 else None

    @property
    def reduce_erH(self) -> Tensor | None:
        """Matrices from which this rank's experts recompute the latents of their tokens."""
        return self[3] if len(self) > 2 else None
