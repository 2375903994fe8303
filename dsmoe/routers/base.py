"""The router plugin contract: Megatron-Core's `Router` with fp32 scores, 0..E experts per token, losses, a controller.

A plugin subclasses `Router`, declares its `Options` and implements `route`, and `losses` and `make_controller` where it
has any. It runs in dsmoe's MoE layer, where a `RoutingRecorder` collects exact global counts, and in Megatron-Core's
stock `MoELayer`, where it falls back to the counts of its rank and to Megatron's aux-loss hook.

Shapes: T tokens of this rank, E experts, H hidden.
"""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from megatron.core.transformer.moe import router as megatron_router
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from dsmoe.config import ModelConfig, Section
from dsmoe.errors import RouterError
from dsmoe.routers.controllers import Controller
from dsmoe.routers.logits import fp32_logits, recomputes_logits
from dsmoe.routers.recorder import Load, RoutingRecorder
from dsmoe.routers.renamed import OPTION_METHODS, refuse_old_methods
from dsmoe.routers.routing import Routing, RoutingResult
from dsmoe.routers.routing_map import count_columns
from dsmoe.routers.scores import Scores
from dsmoe.routers.trained_gate import TrainedGate

# Whose tokens a balance loss counts: those of all ranks in a micro-step (then the layout does not change the loss), of
# each rank alone (as Megatron and ReMoE's code do), or of all ranks in the optimizer step so far (arXiv 2501.11873).
BalanceScope = Literal["micro_batch", "rank", "global_batch"]

INFERENCE_FILE = Path(__file__).with_name("routing_dsmoe.py")  # of dsmoe's own routers


class RouterOptions(Section):
    """Options of one router. Unknown keys are refused."""

    # Options that steer training from here on and do not change what the router computes now: a run may resume with
    # others. Beside them, every `*_coefficient`.
    FUTURE_ONLY: ClassVar[frozenset[str]] = frozenset(["balance_scope"])

    @classmethod
    def changes_only_the_future(cls, name: str) -> bool:
        return name.endswith("_coefficient") or name in cls.FUTURE_ONLY

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs) -> None:
        refuse_old_methods(cls, OPTION_METHODS)

    def validate_for_model(self, model: ModelConfig) -> list[str]:
        """Mistakes of these options for that model, one line each: `field: found ..., expected ...`."""
        return []

    def at_most_num_experts(self, field: str, model: ModelConfig) -> list[str]:
        """For `validate_for_model`: a line if an option asks for more experts than the model has."""
        value = getattr(self, field)
        if value is None or value <= model.num_experts:
            return []
        return [f"router.{field}: found {value}, expected at most model.num_experts ({model.num_experts})"]

    def target_experts_per_token(self, model: ModelConfig) -> float:
        """Mean experts per token that training aims at, for counting active parameters."""
        raise NotImplementedError

    def initial_experts_per_token(self, model: ModelConfig) -> float:
        """Mean experts per token in the first steps, for planning memory: a controller may lower it later."""
        return self.target_experts_per_token(model)

    def fixed_experts_per_token(self) -> int | None:
        """k if every token uses exactly k experts; None if the number varies from token to token."""
        return None

    def gates_sum_to_one(self) -> bool:
        """Whether the weights of every token sum to 1, so that an upcycled model starts as the dense one."""
        return False

    @classmethod
    def aim_at(cls, experts_per_token: float, num_experts: int) -> dict[str, Any]:
        """Options with which training aims at that mean number of experts, for studies at equal compute. By default the
        option `k`, if there is one."""
        return {"k": experts_per_token} if "k" in cls.model_fields else {}

    def inference_option(self) -> str | None:
        """The option that decides, in a trained model, how many experts a token gets; None where the weights or a
        controller's state do. By default the k of a router with a fixed number."""
        return "k" if self.fixed_experts_per_token() is not None and "k" in type(self).model_fields else None

    def inference_settings(self, num_experts: int) -> list[dict[str, Any]]:
        """Changes of options with which a trained model uses fewer or more experts per token, for studies of inference.
        By default half and twice the k of a router with a fixed number."""
        k = self.fixed_experts_per_token()
        if k is None or self.inference_option() != "k":
            return []
        return [{"k": other} for other in (max(1, k // 2), 2 * k) if other != k and other <= num_experts]

    @property
    def sends_latents(self) -> bool:
        """Whether the latents of all (token, expert) pairs are stored and those of routes are sent to the experts."""
        return False

    @property
    def shards_latents(self) -> bool:
        """Whether each rank scores the tokens of its whole expert-parallel group for its own experts."""
        return False


def scaled_settings(option: str, value: float, maximum: float = math.inf) -> list[dict[str, float]]:
    """For `inference_settings`: a float option at 3/4 and 5/4 of its value."""
    return [{option: value * factor} for factor in (0.75, 1.25) if value * factor <= maximum]


@dataclass(frozen=True)
class SoftmaxTopK:
    """Options of a softmax top-k router, in the terms of transformers' own MoE architectures."""

    k: int
    renormalize: bool  # gates of a token sum to 1
    balance_coefficient: float


class Router(megatron_router.Router):
    """Base of all routers. Megatron's constructor creates the gate's weight [E, H], unless `has_gate` is False.

    Everything else in dsmoe knows a router only by this class: export, upcycling, benchmark, studies, planner and dead
    expert reset call the methods below, whose defaults suit a router with a gate.

    Attributes:
        summary, paper: for model cards, how tokens get experts, in a clause, and the arXiv identifier.
        inference_file: the stand-alone Python file that an export to Hugging Face contains as routing_dsmoe.py. It
            defines `build_routing(config)` (see dsmoe/routers/routing_dsmoe.py for what that returns) and imports
            nothing but torch. Not inherited. Without it a router cannot be exported.
        routes_in_blocks: whether `route` uses `dsmoe.routers.scores.in_blocks`, which stores less for backward passes.
    """

    name = "unnamed"
    Options: type[RouterOptions] = RouterOptions
    has_gate = True
    summary = "a router without a description"
    paper: str | None = None
    inference_file: Path | None = None
    routes_in_blocks = False

    def __init__(self, config, pg_collection=None, options: RouterOptions | None = None, **kwargs):
        super().__init__(config, pg_collection)
        if not self.has_gate:
            self.weight = None
        self.options = options if options is not None else self.Options()
        self.controller = self.make_controller(self.options, 1, self.num_experts)
        self.recorder: RoutingRecorder | None = None
        self.index = 0
        self.num_sequences = 0  # of the batch that `route` sees
        self.fused = False  # whether Triton's kernels may be used

    @abstractmethod
    def route(self, hidden_TH: Tensor, sequence_T: Tensor) -> Routing:
        """Route tokens, in fp32, without waiting for the device.

        Args:
            hidden_TH: the tokens that are not padding, in the model's dtype.
            sequence_T: int64, index of each token's sequence in the batch, 0..num_sequences-1.
        """

    def losses(self, routing: Routing, loads: dict[BalanceScope, Load]) -> dict[str, Tensor]:
        """Weighted losses of this layer by name, as this rank's share of a mean over ranks."""
        return {}

    @staticmethod
    def model_losses(routers: list[Router], routings: list[Routing], loads: list[dict[BalanceScope, Load]]):
        """Losses of all layers by name: the sum over layers, unless a method computes a loss over several layers."""
        losses: dict[str, Tensor] = {}
        for router, routing, load in zip(routers, routings, loads, strict=True):
            for name, loss in router.losses(routing, load).items():
                losses[name] = losses[name] + loss if name in losses else loss
        return losses

    @classmethod
    def make_controller(cls, options: RouterOptions, num_layers: int, num_experts: int) -> Controller | None:
        """The controller shared by all `num_layers` MoE layers of a model, if this router has one."""
        return None

    @classmethod
    def inference_state(cls, controller: Controller | None, layer: int) -> dict[str, Tensor]:
        """Controller state that routing needs at inference, for one MoE layer: fp32 tensors by name. An export stores
        them as buffers of the layer's routing."""
        return {}

    @classmethod
    def restore_controller(cls, controller: Controller, states: list[dict[str, Tensor]]) -> None:
        """Set a fresh controller from the `inference_state` of all layers, where no more of it was kept: by default
        what has the same name there, one row for each layer."""
        for name in set(states[0]) & set(controller.state):
            stacked = torch.stack([state[name] for state in states])
            if stacked.shape == controller.state[name].shape:
                controller.state[name] = stacked.to(controller.state[name].dtype)

    @classmethod
    def latent_rank(cls, options: RouterOptions) -> int:
        """Width r of the latent that scores an expert and enters its gate; 0 if experts do not score themselves."""
        return 0

    @classmethod
    def fixed_experts_per_token(cls, options: RouterOptions) -> int | None:
        """k, where every token has exactly k experts of no latent; None where the number differs or experts score
        themselves. Such a model is exported by the contract of transformers' own MoE models."""
        return None

    @classmethod
    def switch_loss_coefficient(cls, options: RouterOptions, num_moe_layers: int) -> float:
        """Weight of transformers' balance loss (E * sum_e f_e P_e over the routes of all layers together) that is worth
        the router's own, for fine-tuning an export; 0 where it has none of that form."""
        return 0.0

    @classmethod
    def expert_groups(cls, options: RouterOptions) -> int:
        """Groups of neighbouring experts that must stay equally large where experts are removed."""
        return 1

    @classmethod
    def options_for_experts(cls, options: RouterOptions, before: int, after: int) -> dict[str, Any]:
        """Changes of options with which a model whose experts became fewer aims at the same experts per token."""
        return {}

    @classmethod
    def parameter_count(cls, model: ModelConfig, options: RouterOptions) -> int:
        """Parameters of one layer's router."""
        return model.num_experts * model.hidden_size

    @classmethod
    def retained_bytes_per_pair(cls, model: ModelConfig, options: RouterOptions, element: int) -> float:
        """Bytes per (token, expert) pair that one layer's routing stores for the backward pass: map and fp32 scores.

        Args:
            element: bytes of an activation in the model's dtype.
        """
        low_precision = element < 4
        if cls.routes_in_blocks and recomputes_logits(low_precision, model.num_experts, model.hidden_size):
            return 1.0
        return 1.0 + 4.0

    @classmethod
    def softmax_top_k(cls, options: RouterOptions) -> SoftmaxTopK | None:
        """These options as softmax top-k, which architectures of transformers have; None for any other method."""
        return None

    @classmethod
    def card_section(cls, options: dict[str, Any]) -> str:
        """Paragraph of the model card of an export, in Markdown."""
        cited = f" ([{cls.paper}](https://arxiv.org/abs/{cls.paper}))" if cls.paper else ""
        listed = ", ".join(f"`{key}` {json.dumps(value)}" for key, value in options.items())
        return f"Router `{cls.name}`: {cls.summary}{cited}." + (f" Options: {listed}." if listed else "")

    @classmethod
    def benchmark_options(cls, k: int, num_experts: int, latent_norm: float) -> dict[str, Any]:
        """Options for the layer benchmark, whose tokens have logits of 5 for k experts on average and at most -15 for
        all others.

        Args:
            latent_norm: norm of the latents of these k experts, if experts score themselves; those of others are small.
        """
        return cls.Options.aim_at(k, num_experts)

    @classmethod
    def benchmark_variants(cls, ranks: int) -> dict[str, dict[str, Any]]:
        """Further options that the layer benchmark measures on that many ranks, by a name for its tables."""
        return {}

    def calibrate(self, hidden_TH: Tensor, k: float) -> None:
        """Change thresholds so that these tokens use k experts on average, for benchmarks of untrained models. By
        default nothing changes, which is right where the number is fixed."""

    @staticmethod
    def start_from_gates(routers: list[Router], gates: list[TrainedGate]) -> dict[str, Any]:
        """Decide as nearly as possible as the trained gates of another router, for an import with a router of choice.

        Args:
            routers: new ones of all MoE layers, sharing a controller; their weights are those of the trained gates.
                Weights and the controller's state are changed in place.
            gates: what each trained gate does on some tokens.

        Returns:
            Options to change, where the user does not set them. By default none, and the gates stay as they are.
        """
        return {}

    def has_row_per_expert(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a parameter of this router has a row for each expert, which a dead expert takes over from a busy one.

        Args:
            shape: of the whole parameter, which ZeRO-3 may have partitioned.
        """
        return shape[:1] == (self.num_experts,)

    def attach(self, recorder: RoutingRecorder, controller: Controller | None) -> None:
        """Share a model's recorder and controller. Called once per layer, in the order of layers."""
        self.recorder, self.controller = recorder, controller
        self.index = len(recorder.routers)
        recorder.routers.append(self)

    @property
    def num_layers(self) -> int:
        """MoE layers of the model that this router belongs to."""
        return len(self.recorder.routers) if self.recorder is not None else 1

    def gating(self, hidden_TH: Tensor) -> Tensor:
        """fp32 logits [T, E], whatever the model's dtype: bf16 logits flip near-ties."""
        return fp32_logits(hidden_TH, self.weight)

    def gate_scores(self, hidden_TH: Tensor) -> Scores:
        """The same for `dsmoe.routers.scores.in_blocks`, which need not keep all of them."""
        if getattr(self.gating, "__func__", None) is Router.gating:
            return Scores(hidden_TH, self.weight)
        return Scores(self.gating(hidden_TH))  # overridden in a subclass

    def routing(self, logits: Tensor):
        """Abstract in Megatron, which routes from logits; here `route` starts from hidden states."""
        raise NotImplementedError

    def forward(self, hidden: Tensor, padding_mask: Tensor | None = None) -> RoutingResult:
        """Route; as in Megatron's contract the result unpacks into weights and map.

        Args:
            hidden: [S, B, H].
            padding_mask: bool [S, B], True where a token is padding; such a token gets no expert and counts nowhere.

        Returns:
            probs_TE [S * B, E] fp32, 0 where inactive, map_TE [S * B, E] bool and, in dsmoe's MoE layer, the latents of
            experts that score themselves.
        """
        return RoutingResult.from_routing(self.decide(hidden, padding_mask), with_latents=self.recorder is not None)

    def decide(self, hidden: Tensor, padding_mask: Tensor | None) -> Routing:
        """Route the tokens that are not padding, check the plugin's result and hand it to the recorder."""
        length, batch, _ = hidden.shape
        hidden_TH = hidden.flatten(0, 1)
        sequence_T = torch.arange(batch, device=hidden.device).repeat(length)
        self.num_sequences = batch
        self.has_padding = padding_mask is not None
        real = None
        if self.has_padding:
            real = self.cached_per_forward("real", lambda: (~padding_mask.reshape(-1).bool()).nonzero().squeeze(1))
        if real is None:
            routing = self.route(hidden_TH, sequence_T)
        else:
            routing = self.route(hidden_TH.index_select(0, real), sequence_T.index_select(0, real))
        routed = hidden_TH.size(0) if real is None else real.numel()
        self._check(routing, routed, hidden.dtype)
        if real is not None:
            for name in ("probs_TE", "map_TE", "latents_TEr"):
                rows = getattr(routing, name)
                if rows is not None:
                    with_padding = rows.new_zeros(hidden_TH.size(0), *rows.shape[1:])
                    setattr(routing, name, with_padding.index_copy(0, real, rows))
        tokens = sequence_T.new_full((), routed)
        if self.recorder is not None:
            self.recorder.record(self.index, routing, tokens)
        else:
            routing.probs_TE = self._attach_losses(routing, tokens)
        return routing

    def cached_per_forward(self, name: str, make: Callable):
        """`make()`, called once per forward pass for all layers: for values that wait for the device."""
        shared = {} if self.recorder is None else self.recorder.shared
        if name not in shared:
            shared[name] = make()
        return shared[name]

    def _attach_losses(self, routing: Routing, tokens: Tensor) -> Tensor:
        """In a stock MoELayer: attach losses over this rank's tokens through Megatron's hook."""
        probs = routing.probs_TE
        if self.training and torch.is_grad_enabled():
            own = Load(count_columns(routing.map_TE), tokens, 1)
            for loss in self.model_losses([self], [routing], [dict.fromkeys(get_args(BalanceScope), own)]).values():
                probs = MoEAuxLossAutoScaler.apply(probs, loss)
        return probs

    def _check(self, routing: Routing, tokens: int, model_dtype: torch.dtype) -> None:
        expected = (tokens, self.num_experts)
        # A model in fp64, which conversions are judged by, may have weights as wide.
        in_fp64 = model_dtype == routing.probs_TE.dtype == torch.float64
        wide = torch.float64 if in_fp64 else torch.float32
        for what, tensor, dtype in (("probs", routing.probs_TE, wide), ("map", routing.map_TE, torch.bool)):
            if tuple(tensor.shape) != expected or tensor.dtype != dtype:
                raise RouterError(
                    f"router {self.name!r} returned {what} {tuple(tensor.shape)} {tensor.dtype}, "
                    f"expected {expected} {dtype}"
                )
