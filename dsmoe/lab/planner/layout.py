"""A run on a cluster: the configuration, how many ranks, and how unevenly experts are loaded.

Shapes: E experts, e of them on a rank; H hidden, F expert width, r latent width, V vocabulary, S sequence length.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from dsmoe.config import ModelConfig, RunConfig
from dsmoe.errors import ConfigError
from dsmoe.lab.planner.hardware import Hardware
from dsmoe.model.size import ModelSize, model_size
from dsmoe.moe.expected_rows import ExpectedRows, chance_of_need, expected_rows, resolve_dispatcher
from dsmoe.moe.expert_mlp import ExpertMLP
from dsmoe.routers import get
from dsmoe.routers.base import RouterOptions

BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Layout:
    """What a prediction is about.

    Attributes:
        ranks: processes, one for each device.
        load: routes of the busiest rank over the mean.
        experts_per_token: None for what the router aims at.
    """

    config: RunConfig
    hardware: Hardware
    ranks: int
    load: float = 1.0
    experts_per_token: float | None = None

    @property
    def gradients_in_place(self) -> bool:
        """Whether experts write their gradients where the optimizer reads them (dsmoe/optim/deepspeed.py)."""
        return self.gradients_by_block and self.config.parallel.zero_stage < 3

    @property
    def gradients_by_block(self) -> bool:
        """Whether their norm is taken where they are, not of a copy in fp64."""
        return self.hardware.cpu and self.element == 4

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    @cached_property
    def options(self) -> RouterOptions:
        return get(self.config.router.name).Options.model_validate(self.config.router.options)

    @cached_property
    def size(self) -> ModelSize:
        return model_size(self.config)

    @cached_property
    def latent(self) -> int:
        """r; 0 for a router with a gate."""
        return get(self.config.router.name).latent_rank(self.options)

    @cached_property
    def expert(self) -> ExpertMLP:
        """Of every MoE layer."""
        return ExpertMLP.of(self.model, self.latent)

    @cached_property
    def shards_latents(self) -> bool:
        """Whether each rank scores everyone's tokens for its own experts."""
        return self.options.shards_latents

    @cached_property
    def sends_latents(self) -> bool:
        """Whether the latents of all pairs are kept, and those of routes sent."""
        return self.options.sends_latents

    @cached_property
    def experts(self) -> float:
        """Per token."""
        return self.experts_per_token or self.options.target_experts_per_token(self.model)

    @property
    def ep(self) -> int:
        return self.config.parallel.expert_parallel

    @property
    def replicas(self) -> int:
        """Ranks that hold the same experts."""
        return self.ranks // self.ep

    @cached_property
    def moe_layers(self) -> int:
        return sum(self.model.moe_layers())

    @property
    def local_experts(self) -> int:
        return self.model.num_experts // self.ep

    @property
    def micro_steps(self) -> int:
        return self.config.training.gradient_accumulation

    @property
    def step_tokens(self) -> int:
        """Of all ranks in an optimizer step."""
        return self.config.training.global_batch_size * self.model.sequence_length

    @cached_property
    def tokens(self) -> float:
        """T, of a rank in a micro-step."""
        return self.step_tokens / (self.ranks * self.micro_steps)

    @cached_property
    def routes(self) -> float:
        """Of the busiest rank in a layer and micro-step."""
        return self.tokens * self.experts * (self.load if self.ep > 1 else 1.0)

    @property
    def element(self) -> int:
        """Bytes of a weight or activation in the model."""
        return BYTES[self.config.training.precision]

    @property
    def wire(self) -> int:
        """Bytes of an element between ranks."""
        return 2 if self.model.moe_exchange_dtype == "bf16" else self.element

    @cached_property
    def expert_parameters(self) -> int:
        """On one rank, of all layers, with the low-rank matrices of a sharded router."""
        latent = self.local_experts * self.latent * self.model.hidden_size if self.shards_latents else 0
        return self.moe_layers * (self.local_experts * self.size.expert + latent)

    @cached_property
    def dense_parameters(self) -> int:
        """Held by every rank alike."""
        model = self.model
        everything = self.moe_layers * model.num_experts * self.size.expert
        latent = self.moe_layers * model.num_experts * self.latent * model.hidden_size if self.shards_latents else 0
        return self.size.total - everything - latent

    @property
    def owned_parameters(self) -> float:
        """Whose optimizer state is on one rank."""
        return self.dense_parameters / self.ranks + self.expert_parameters / self.replicas

    def reach(self) -> float:
        """Ranks other than its own that a token goes to, on average, in one layer; routes are spread by chance."""
        return (self.ep - 1) * chance_of_need(self.model.num_experts, self.experts, self.local_experts)

    @property
    def ranks_per_node(self) -> int:
        """Of an expert-parallel group; it lies inside a node where it fits."""
        return min(self.ep, self.hardware.devices_per_node)

    @property
    def dispatcher(self) -> str:
        """As training chooses it: by what the router aims at, whatever `experts_per_token` is planned for."""
        aim = self.options.target_experts_per_token(self.model)
        return resolve_dispatcher(
            self.model.token_dispatcher, self.model.num_experts, aim, self.ep, self.ranks_per_node
        )

    def expected_rows(self) -> ExpectedRows:
        """Of a token in one layer and direction."""
        return expected_rows(self.dispatcher, self.model.num_experts, self.experts, self.ep, self.ranks_per_node)


def problems(config: RunConfig, ranks: int, hardware: Hardware | None = None) -> list[str]:
    """Why a run cannot be laid out so, apart from memory."""
    reasons = []
    training, ep = config.training, config.parallel.expert_parallel
    if config.model.vocab_size is None:
        reasons.append(
            "model.vocab_size: not set, and a plan sees no tokenizer; add for example model.vocab_size=32000"
        )
    if ranks % ep:
        reasons.append(f"parallel.expert_parallel: found {ep}, expected a divisor of the {ranks} ranks")
    parts = ranks * training.gradient_accumulation
    if training.global_batch_size % parts:
        reasons.append(
            f"training.global_batch_size: found {training.global_batch_size}, expected a multiple of {ranks} ranks x "
            f"{training.gradient_accumulation} micro-steps"
        )
    if hardware is not None:
        if config.parallel.placement == "within_node" and hardware.devices_per_node % ep:
            reasons.append(
                f"parallel.expert_parallel: found {ep} with parallel.placement: within_node, expected a divisor of the "
                f"{hardware.devices_per_node} devices of a node"
            )
        if not hardware.cpu and config.model.experts_implementation in ("auto", "grouped_mm"):
            widths = {"hidden_size": config.model.hidden_size, "moe_ffn_hidden_size": config.model.moe_ffn_hidden_size}
            reasons += [
                f"model.{name}: found {width}, expected a multiple of 8, or model.experts_implementation=loop"
                for name, width in widths.items()
                if width % 8
            ]
        if ranks > hardware.devices_per_node and hardware.between_nodes is None:
            reasons.append(f"--nodes: {hardware.name} is one node: its file has no between_nodes")
        if training.precision not in hardware.peak_tflops:
            known = ", ".join(hardware.peak_tflops)
            reasons.append(
                f"training.precision: found {training.precision}, expected one of {hardware.name}'s: {known}"
            )
    return reasons


def checked(layout: Layout) -> Layout:
    """The same layout. Raises `ConfigError` with every reason why it cannot be."""
    if reasons := problems(layout.config, layout.ranks, layout.hardware):
        raise ConfigError(reasons, "the plan")
    return layout
