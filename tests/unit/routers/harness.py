"""Routers of a model of two layers, without the model: a recorder of one rank, random tokens, some of them padding."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from dsmoe.config import ModelConfig, validate_config
from dsmoe.routers import get
from dsmoe.routers.recorder import RoutingRecorder
from dsmoe.routers.registry import option_classes

HIDDEN = 8
ALONE = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
GROUPS = SimpleNamespace(tp=ALONE, cp=ALONE, tp_cp=ALONE, tp_dp_cp=ALONE, ep=ALONE)


def model_config(experts: int, layers: int = 2) -> ModelConfig:
    return ModelConfig(num_layers=layers, hidden_size=HIDDEN, num_attention_heads=1, num_experts=experts)


def problems_of(name: str, options: dict, experts: int) -> list[str]:
    """What the configuration file would be told."""
    from dsmoe.errors import ConfigError

    tree = {"model": {"num_experts": experts}, "router": {"name": name, **options}}
    try:
        validate_config(tree, option_classes())
    except ConfigError as error:
        return error.problems
    return []


class Routers:
    """`layers` routers with a shared recorder and controller, as `LanguageModel` joins them."""

    def __init__(self, name: str, options: dict, experts: int, layers: int = 2, dtype=torch.float32):
        router_class = get(name)
        self.options = router_class.Options.model_validate(options)
        config = TransformerConfig(
            num_layers=layers, hidden_size=HIDDEN, num_attention_heads=1, num_moe_experts=experts,
            moe_ffn_hidden_size=8, moe_router_load_balancing_type="none", add_bias_linear=False,
            use_cpu_initialization=True,
        )  # fmt: skip
        self.recorder = RoutingRecorder(experts, ALONE)
        self.controller = router_class.make_controller(self.options, layers, experts)
        self.layers = [router_class(config, GROUPS, options=self.options) for _ in range(layers)]
        for router in self.layers:
            if dtype != torch.float32:
                router.to(dtype)
            router.attach(self.recorder, self.controller)

    def draw_weights(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for router in self.layers:
            for name, parameter in router.named_parameters():
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.data.copy_(1 + 0.2 * drawn if name == "scale" else 0.6 * drawn)

    def pass_through(self, hidden: list[torch.Tensor], padding_mask=None):
        """One forward pass: ([(probs, map) of each layer], losses)."""
        self.recorder.begin()
        decided = [router(x, padding_mask)[:2] for router, x in zip(self.layers, hidden, strict=True)]
        return decided, self.recorder.finish()

    def state(self) -> dict[str, torch.Tensor]:
        return {} if self.controller is None else {n: v.clone() for n, v in self.controller.state.items()}
