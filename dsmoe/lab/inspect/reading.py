"""A model on all texts: losses and routes of every token.

Shapes: L MoE layers, T tokens of all texts one after another, E experts, N sampled tokens, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dsmoe.lab.inspect.models import InspectedModel
from dsmoe.lab.inspect.texts import Tokens
from dsmoe.lab.study.probe.routes import KINDS, kind_of

SAMPLED = 256  # tokens whose hidden states are kept for comparing experts
Array = np.ndarray


@dataclass(frozen=True)
class Reading:
    """What a model made of the texts.

    Attributes:
        ids_T, token_T: id and text of every token.
        text_T: which text it belongs to; names are in `texts`.
        position_T: its place in the window that the model saw.
        next_loss_T: nats of the token that follows, which this position predicts; nan for the last token of a text.
        loss_T: nats of the token itself, predicted by the position before; nan for the first token of a text.
        probs_LTE, map_LTE: fp32 weights, 0 where inactive, and which experts are active.
        hidden_LNH: inputs of router and experts for a seeded sample of tokens.
    """

    texts: list[str]
    ids_T: Array
    token_T: list[str]
    text_T: Array
    position_T: Array
    next_loss_T: Array
    loss_T: Array
    probs_LTE: Array
    map_LTE: Array
    hidden_LNH: list[Tensor]

    @cached_property
    def experts_LT(self) -> Array:
        """Experts of each token, int."""
        return self.map_LTE.sum(2)

    @cached_property
    def effective_LT(self) -> Array:
        """exp(entropy) of a token's normalized weights: as many experts of equal weight would be as spread; 0 where a
        token has none."""
        total = self.probs_LTE.sum(2, keepdims=True)
        share = np.divide(self.probs_LTE, total, out=np.zeros_like(self.probs_LTE), where=total > 0)
        logs = np.log(share, out=np.zeros_like(share), where=share > 0)
        return np.where(total[..., 0] > 0, np.exp(-(share * logs).sum(2)), 0.0)

    @cached_property
    def kind_T(self) -> Array:
        """Place of each token's kind in KINDS (`dsmoe.lab.study.probe.routes.kind_of`)."""
        return np.array([KINDS.index(kind_of(text)) for text in self.token_T])

    @property
    def mean_loss(self) -> float:
        """Nats per predicted token."""
        return float(np.nanmean(self.next_loss_T))


def read(model: InspectedModel, texts: list[Tokens], hidden: bool = True) -> Reading:
    """Every window by itself; the last position of a window still predicts the first token of the next.

    hidden: whether to keep `hidden_LNH`.
    """
    total = sum(len(text.ids) for text in texts)
    sample = np.sort(np.random.default_rng(0).permutation(total)[:SAMPLED])
    losses: list[Array] = []
    positions: list[Array] = []
    probs: list[list[Array]] = [[] for _ in model.layers]
    maps: list[list[Array]] = [[] for _ in model.layers]
    rows: list[list[Tensor]] = [[] for _ in model.layers]
    begin = 0  # of a window among all tokens
    for text in texts:
        for first, ids in text.windows(model.context):
            logits_SV, routes = model.read(ids)
            following = text.ids[first + 1 : first + 1 + len(ids)]
            loss = F.cross_entropy(
                logits_SV[: len(following)].double(), torch.tensor(following, device=logits_SV.device), reduction="none"
            )
            losses.append(np.pad(loss.cpu().numpy(), (0, len(ids) - len(following)), constant_values=np.nan))
            positions.append(np.arange(len(ids)))
            here = sample[(sample >= begin) & (sample < begin + len(ids))] - begin
            for layer, seen in enumerate(routes):
                probs[layer].append(seen.probs_SE.float().cpu().numpy())
                maps[layer].append(seen.map_SE.cpu().numpy())
                if hidden:
                    rows[layer].append(seen.hidden_SH[torch.from_numpy(here).to(seen.hidden_SH.device)].float().cpu())
            begin += len(ids)
    next_loss_T = np.concatenate(losses)
    loss_T = np.concatenate(([np.nan], next_loss_T[:-1]))  # nan at the end of a text is nan at the begin of the next
    return Reading(
        texts=[text.name for text in texts],
        ids_T=np.array([token for text in texts for token in text.ids]),
        token_T=[token for text in texts for token in text.texts],
        text_T=np.repeat(np.arange(len(texts)), [len(text.ids) for text in texts]),
        position_T=np.concatenate(positions),
        next_loss_T=next_loss_T,
        loss_T=loss_T,
        probs_LTE=np.stack([np.concatenate(layer) for layer in probs]),
        map_LTE=np.stack([np.concatenate(layer) for layer in maps]),
        hidden_LNH=[torch.cat(layer) for layer in rows] if hidden else [],
    )
