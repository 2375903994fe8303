"""Router surgery: a mixture of experts continues with another router, starting from the trained gate's weights.

Experts, attention, norms and embeddings stay. What a new router needs besides the gate's weights (a threshold for each
token, cutoffs, a p) is found on text that the model reads; `Router.start_from_gates` of each router says how. The
result does not compute what the model did, unless the new router can: the report says by how much, and training closes
it (docs/huggingface.md).
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsmoe.checkpoint.restore import TrainedModel
from dsmoe.config import RouterConfig
from dsmoe.errors import ConversionError
from dsmoe.hf.observe import SEQUENCES_AT_ONCE
from dsmoe.hf.parity import Observation, Sample, compare, observe
from dsmoe.model.gpt import LanguageModel, transformer_config
from dsmoe.moe.layer import moe_layers_of
from dsmoe.routers import get
from dsmoe.routers.base import Router
from dsmoe.routers.recorder import RoutingRecorder
from dsmoe.routers.trained_gate import TrainedGate
from dsmoe.runtime.device import device_name

FIT_NUMBERS = 1 << 28  # of hidden states of all layers that are kept, 1 GiB
FIT_TOKENS = 8192


def check_routers(own: str, new: str) -> None:
    """Raises `ConversionError` where the model's router, or the new one, has no gate."""
    without = next((name for name in (own, new) if not get(name).has_gate), None)
    if without is not None:
        raise ConversionError(
            f"--router {new}: experts of router {without} score tokens themselves, so there is no gate to take over; "
            "expected two routers with a gate, such as topk, relu, top_p or quantile"
        )


def tokens_to_fit(num_layers: int, hidden_size: int) -> int:
    """Tokens that `change_router` should be given to fit on."""
    return max(1024, min(FIT_TOKENS, FIT_NUMBERS // (num_layers * hidden_size)))


def change_router(
    checkpoint: Path, router: RouterConfig, chosen: set[str], to_fit: Tensor, sample: Sample
) -> tuple[LanguageModel, RouterConfig, dict[str, Any]]:
    """Load a model and give it another router.

    Args:
        checkpoint: of the model with its own router.
        router: the new one.
        chosen: its options that the user set, which stay as they are.
        to_fit: int64 [B, S], text that the new router is fitted on.
        sample: other text, on which both are compared.

    Returns:
        The model, the router with all its options, and what changed, for import_report.json.
    """
    model = TrainedModel.load(checkpoint).model
    before, gates = observe(model, sample, 0), _gates(model, to_fit)
    router_class = get(router.name)
    options = router_class.Options.model_validate(router.options)
    routers = _replace(model, router_class, options)
    with torch.no_grad():
        changed = router_class.start_from_gates(routers, gates)
    changed = {name: value for name, value in changed.items() if name not in chosen}
    options = router_class.Options.model_validate(options.model_dump() | changed)
    for new in routers:
        new.options = options
    after = observe(model, sample, 0)
    difference = asdict(compare(before, after))
    del difference["greedy_equal"]
    report = {
        "router": router.name,
        "fitted_options": changed,
        "tokens_fitted": to_fit.numel(),
        "tokens": sample.tokens.numel(),
        "loss_before": _loss(before, sample),
        "loss_after": _loss(after, sample),
        "experts_per_token_before": _experts_per_token(before),
        "experts_per_token_after": _experts_per_token(after),
        **difference,
    }
    return model, RouterConfig(name=router.name, **options.model_dump()), report


def _gates(model: LanguageModel, tokens: Tensor) -> list[TrainedGate]:
    seen: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}

    def note(module: nn.Module, inputs, output) -> None:
        seen.setdefault(module, []).append((inputs[0].flatten(0, 1).float(), output[0]))

    hooks = [module.register_forward_hook(note) for module in model.modules() if isinstance(module, Router)]
    with torch.no_grad():
        for rows in tokens.split(SEQUENCES_AT_ONCE):
            model(rows.to(device_name()))
            model.recorder.take()
    for hook in hooks:
        hook.remove()
    return [TrainedGate(*(torch.cat(parts) for parts in zip(*calls, strict=True))) for calls in seen.values()]


def _replace(model: LanguageModel, router_class: type[Router], options) -> list[Router]:
    """New routers with the weights of the old ones in all MoE layers."""
    config, routers = model.config, []
    model.recorder = RoutingRecorder(config.num_experts, model.groups.dp)
    model.controller = router_class.make_controller(options, sum(config.moe_layers()), config.num_experts)
    if model.controller is not None:
        model.controller.to(device_name())
    for layer in moe_layers_of(model):
        router = router_class(transformer_config(config, 1), model.groups.for_megatron(), options=options)
        router.to(device_name()).eval()
        router.weight.data.copy_(layer.router.weight)  # type: ignore[attr-defined]
        router.attach(model.recorder, model.controller)
        layer.router = router
        routers.append(router)
    return routers


def _loss(seen: Observation, sample: Sample) -> float:
    """Mean nats per token of the sample's own next tokens."""
    losses = [F.cross_entropy(x.double()[:-1], y[1:]) for x, y in zip(seen.logits, sample.tokens, strict=True)]
    return torch.stack(losses).mean().item()


def _experts_per_token(seen: Observation) -> float:
    return seen.routes.sum(-1).double().mean().item()
