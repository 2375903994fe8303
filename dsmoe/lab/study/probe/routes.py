"""Who goes to which expert: load, kinds of tokens, places in a sequence, and how steadily.

Shapes: T = S * B tokens in Megatron's order (position, then sequence), E experts, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dsmoe.model.gpt import LanguageModel
from dsmoe.moe.layer import VariableMoELayer, moe_layers_of

KINDS = ("prose", "digits", "punctuation", "code", "space", "other")
PUNCTUATION = set(".,;:!?'\"()-–—…‘’“”")
CODE = set("{}[]<>=_+*/\\|&^%$#@~`")
PARTS = 8  # of a sequence


@dataclass(frozen=True)
class SeenLayer:
    """One MoE layer at work on held-out tokens."""

    module: VariableMoELayer
    hidden_TH: Tensor
    map_TE: np.ndarray  # bool
    shape: tuple[int, int]  # S, B

    def rerouted(self, dtype: torch.dtype) -> np.ndarray:
        """The map for inputs that were rounded to another dtype."""
        rounded = self.hidden_TH.to(dtype).to(self.hidden_TH.dtype).view(*self.shape, -1)
        with torch.no_grad():
            return self.module.router(rounded, None).map_TE.cpu().numpy()


def look(model: LanguageModel, tokens_BS: Tensor) -> list[SeenLayer]:
    """Inputs and routes of every MoE layer, first layer first."""
    layers = moe_layers_of(model)
    seen: list[SeenLayer] = []

    def keep(module, args, out) -> None:
        hidden = args[0]
        layer = layers[len(seen)]
        seen.append(SeenLayer(layer, hidden.flatten(0, 1), out.map_TE.cpu().numpy(), tuple(hidden.shape[:2])))

    hooks = [layer.router.register_forward_hook(keep) for layer in layers]
    try:
        with torch.no_grad():
            model(tokens_BS)
        model.recorder.take()
    finally:
        for hook in hooks:
            hook.remove()
    return seen


class TokenKinds(np.ndarray):
    """int [B, S]: the place of each token's kind in `names`."""

    names = KINDS


def kind_of(text: str) -> str:
    """Of a token, by its text alone.

    `digits` has a digit in it; `code` a sign of programs or markup, or an underscore; `prose` letters; `punctuation`
    signs of prose only; `space` nothing but white space; `other` what is no text by itself: part of a character.
    """
    if not text.strip():
        return "space" if text else "other"
    body = text.strip()
    if any(sign.isdigit() for sign in body):
        return "digits"
    if CODE.intersection(body):
        return "code"
    if any(sign.isalpha() for sign in body):
        return "prose"
    return "punctuation" if PUNCTUATION.issuperset(body) else "other"


def kinds_of(tokens_BS: Tensor, tokenizer) -> TokenKinds:
    """Of all tokens; without a tokenizer all are `other`."""
    ids, inverse = np.unique(tokens_BS.numpy(), return_inverse=True)
    if tokenizer is None:
        kinds = np.full(len(ids), KINDS.index("other"))
    else:
        kinds = np.array([KINDS.index(kind_of(_text(tokenizer, int(token)))) for token in ids])
    return kinds[inverse].reshape(tokens_BS.shape).view(TokenKinds)


def _text(tokenizer, token: int) -> str:
    text = tokenizer.decode([token])
    return "" if "�" in text else text


def read_layers(layers: list[SeenLayer], kinds_BS: TokenKinds, shape: tuple[int, int]) -> list[dict]:
    """`experts_per_token`, `by_kind`, `by_position`, `load`, `dead`, `entropy`, `counts` of each layer."""
    batch, length = shape
    kind_T = np.asarray(kinds_BS).T.reshape(-1)
    part_T = np.repeat(np.arange(length) * PARTS // length, batch)
    parts = np.unique(part_T)
    reports = []
    for layer in layers:
        active_T, counts_E = layer.map_TE.sum(1), layer.map_TE.sum(0)
        share_E = counts_E / max(1, counts_E.sum())
        entropy = -(share_E[share_E > 0] * np.log(share_E[share_E > 0])).sum()
        reports.append(
            {
                "experts_per_token": float(active_T.mean()),
                "by_kind": {
                    kind: float(active_T[kind_T == number].mean())
                    for number, kind in enumerate(KINDS)
                    if (kind_T == number).any()
                },
                "by_position": [float(active_T[part_T == part].mean()) for part in parts],
                "load": float(counts_E.max() / counts_E.mean()) if counts_E.any() else 1.0,
                "dead": float((counts_E == 0).mean()),
                "entropy": float(entropy / np.log(len(counts_E))) if len(counts_E) > 1 else 1.0,
                "counts": counts_E.tolist(),
            }
        )  # fmt: skip
    return reports


def flips(first_TE: np.ndarray, second_TE: np.ndarray) -> float:
    """1 - routes in both maps / routes in any of them; 0 where neither has one."""
    either = (first_TE | second_TE).sum()
    return float(1 - (first_TE & second_TE).sum() / either) if either else 0.0
