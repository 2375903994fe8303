"""What every expert of a model takes and does on some text.

Shapes: L MoE layers, E experts, N sampled tokens, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsmoe.lab.study.probe.similarity import all_outputs, cosine
from dsmoe.model.gpt import LanguageModel
from dsmoe.moe.layer import VariableMoELayer, moe_layers_of

SAMPLED = 1024  # tokens of a layer whose inputs are kept
ELEMENTS = 1 << 26  # of all experts' outputs at a time


@dataclass(frozen=True)
class LayerSeen:
    layer: VariableMoELayer
    counts_E: Tensor  # int64, over all of the text
    hidden_NH: Tensor  # what experts read, of sampled tokens
    probs_NE: Tensor  # fp32 weights of these tokens' experts, 0 where inactive

    @torch.no_grad()
    def outputs_ENH(self) -> Tensor:
        """Of every expert with weight 1, for as many of the sampled tokens as there is room for."""
        experts = len(self.counts_E)
        return all_outputs(self.layer, self.hidden_NH[: max(2, ELEMENTS // (experts * self.hidden_NH.size(1)))])

    def cosine_EE(self) -> Tensor:
        return cosine(self.outputs_ENH())


@torch.no_grad()
def observe(model: LanguageModel, tokens_BS: Tensor, batch: int = 8) -> list[LayerSeen]:
    """Run the model on some sequences, as at inference."""
    layers = moe_layers_of(model)
    share = min(1.0, SAMPLED / tokens_BS.numel())
    generator = torch.Generator().manual_seed(0)
    samples: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in layers]
    chosen = None

    def note(place: int):
        def hook(module, args, output) -> None:
            hidden_TH = args[0].flatten(0, 1)
            samples[place].append((output.map_TE.sum(0), hidden_TH[chosen], output.probs_TE[chosen]))

        return hook

    hooks = [layer.router.register_forward_hook(note(place)) for place, layer in enumerate(layers)]
    try:
        for part in tokens_BS.split(batch):
            chosen = torch.randperm(part.numel(), generator=generator)[: max(1, round(share * part.numel()))]
            model(part.to(next(model.parameters()).device))
            model.recorder.take()
    finally:
        for hook in hooks:
            hook.remove()
    seen = []
    for layer, of_layer in zip(layers, samples, strict=True):
        counts, hidden, probs = zip(*of_layer, strict=True)
        seen.append(LayerSeen(layer, torch.stack(counts).sum(0), torch.cat(hidden), torch.cat(probs)))
    return seen
