"""What a router plugin is: Megatron-Core's `Router` with fp32 scores, 0..E experts per token, losses and a controller.

A plugin subclasses `Router`, declares its `Options`, and implements `route`; `losses` and `make_controller` where it
has them. It then runs in dsmoe's MoE layer, where a `RoutingRecorder` gathers exact global counts, and, alone, in
Megatron-Core's stock `MoELayer`, where it falls back to this rank's counts and Megatron's aux-loss hook.

Shapes: T tokens here, E experts, H hidden.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe import router as megatron_router
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from dsmoe.config import ModelConfig, Section
from dsmoe.errors import RouterError
from dsmoe.routers.controllers import Controller
from dsmoe.routers.recorder import Load, RoutingRecorder

# Whose tokens a balance loss counts: all ranks' tokens of a micro-step (then the layout does not change the loss), or
# each rank's own (Megatron's and the ReMoE code's choice).
BalanceScope = Literal["micro_batch", "rank"]


class RouterOptions(Section):
    """Options of one router. Unknown keys are refused."""

    def problems(self, model: ModelConfig) -> list[str]:
        """What is wrong with these options for that model, one line each: `field: found ..., expected ...`."""
        return []

    def mean_experts(self, model: ModelConfig) -> float:
        """Experts per token these options aim at, for counting active parameters."""
        raise NotImplementedError


@dataclass
class Routing:
    """One layer's decision."""

    probs_TE: Tensor  # fp32 weights, 0 where inactive
    map_TE: Tensor  # bool
    kept: dict[str, Tensor] = field(default_factory=dict)  # what `losses` needs, with its gradient


class Router(megatron_router.Router):
    """Base of all routers. Megatron's constructor makes the weight [E, H] of the gate."""

    name = "unnamed"
    Options: type[RouterOptions] = RouterOptions

    def __init__(self, config, pg_collection=None, options: RouterOptions | None = None, **kwargs):
        super().__init__(config, pg_collection)
        self.options = options if options is not None else self.Options()
        self.controller = self.make_controller(self.options, self.num_experts)
        self.recorder: RoutingRecorder | None = None
        self.index = 0

    @abstractmethod
    def route(self, logits_TE: Tensor) -> Routing:
        """Decide from fp32 logits; nothing may wait for the device."""

    def losses(self, routing: Routing, loads: dict[BalanceScope, Load]) -> dict[str, Tensor]:
        """Weighted losses of this layer by name, as this rank's part of a mean over ranks."""
        return {}

    @classmethod
    def make_controller(cls, options: RouterOptions, num_experts: int) -> Controller | None:
        """The controller that all layers of a model share, if this router has one."""
        return None

    @classmethod
    def parameter_count(cls, model: ModelConfig, options: RouterOptions) -> int:
        """Parameters of one layer's router."""
        return model.num_experts * model.hidden_size

    def attach(self, recorder: RoutingRecorder, controller: Controller | None) -> None:
        """Join a model: share its recorder and controller, in the order of the layers."""
        self.recorder, self.controller = recorder, controller
        self.index = len(recorder.routers)
        recorder.routers.append(self)

    def gating(self, hidden_TH: Tensor) -> Tensor:
        """fp32 logits [T, E], whatever the model's dtype: bf16 logits flip near-ties."""
        return F.linear(hidden_TH.float(), self.weight.float())

    def routing(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        routing = self.route(logits)
        return routing.probs_TE, routing.map_TE

    def forward(self, hidden: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Megatron's contract.

        Args:
            hidden: [S, B, H] or [T, H].
            padding_mask: bool, True where a token is padding; such a token gets no expert and counts nowhere.

        Returns:
            probs [T, E] fp32, 0 where inactive, and routing map [T, E] bool.
        """
        hidden_TH = hidden.reshape(-1, hidden.size(-1))
        real_T = None if padding_mask is None else ~padding_mask.reshape(-1).bool()
        if real_T is None:
            routing = self.route(self.gating(hidden_TH))
            tokens = torch.tensor(hidden_TH.size(0), device=hidden.device)
        else:
            # Padding rows are routed nowhere by routing only the others; the number of rows stays what it was.
            routing = self._route_real(hidden_TH, real_T)
            tokens = real_T.sum()
        self._check(routing, hidden_TH.size(0))
        if self.recorder is not None:
            self.recorder.record(self.index, routing, tokens)
            return routing.probs_TE, routing.map_TE
        return self._attach_losses(routing, tokens), routing.map_TE

    def _route_real(self, hidden_TH: Tensor, real_T: Tensor) -> Routing:
        rows = real_T.nonzero().squeeze(1)
        routing = self.route(self.gating(hidden_TH.index_select(0, rows)))
        shape = (hidden_TH.size(0), self.num_experts)
        routing.probs_TE = routing.probs_TE.new_zeros(shape).index_copy(0, rows, routing.probs_TE)
        routing.map_TE = routing.map_TE.new_zeros(shape).index_copy(0, rows, routing.map_TE)
        return routing

    def _attach_losses(self, routing: Routing, tokens: Tensor) -> Tensor:
        """In a stock MoELayer: losses over this rank's tokens, through Megatron's hook."""
        probs = routing.probs_TE
        if self.training and torch.is_grad_enabled():
            own = Load(routing.map_TE.sum(0), tokens, 1)
            for loss in self.losses(routing, {"rank": own, "micro_batch": own}).values():
                probs = MoEAuxLossAutoScaler.apply(probs, loss)
        return probs

    def _check(self, routing: Routing, tokens: int) -> None:
        expected = (tokens, self.num_experts)
        for what, tensor, dtype in (("probs", routing.probs_TE, torch.float32), ("map", routing.map_TE, torch.bool)):
            if tuple(tensor.shape) != expected or tensor.dtype != dtype:
                raise RouterError(
                    f"router {self.name!r} returned {what} {tuple(tensor.shape)} {tensor.dtype}, expected {expected} {dtype}"
                )
