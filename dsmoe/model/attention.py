"""Attention with rotary embedding that runs on any device; Megatron-Core's own asks for CUDA.

Shapes: S tokens, B sequences, n query heads, g key/value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dsmoe.model import native_attention, rotary
from dsmoe.native import ways
from dsmoe.runtime.step_timer import REST, step_timer

PROBE_SEQUENCES = 2  # on which ways to attend are compared


class KeyValueCache:
    """Keys and values of the tokens that a model has seen, so that each new token costs one token.

    `with cache.of(model)`: forward passes continue the text that the cache holds, instead of beginning one.
    """

    def __init__(self) -> None:
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.seen_by(next(iter(self._layers), None))

    def seen_by(self, layer: int | None) -> int:
        """Tokens held of one layer: in the midst of a pass some layers have the new ones already."""
        return self._layers[layer][0].size(0) if layer in self._layers else 0

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values [S, B, g, d] of new tokens; returns those of all tokens."""
        if layer in self._layers:
            key, value = (torch.cat(pair) for pair in zip(self._layers[layer], (key, value), strict=True))
        self._layers[layer] = key, value
        return key, value

    @contextmanager
    def of(self, model: nn.Module) -> Iterator[KeyValueCache]:
        """Let the passes of a model inside the block continue from this cache."""
        users = [module for module in model.modules() if isinstance(module, CausalAttention)]
        for module in users:
            module.cache = self
        try:
            yield self
        finally:
            for module in users:
                module.cache = None


class CausalAttention(nn.Module):
    """Megatron's core-attention slot. Rotary embedding, then causal, grouped-query attention without dropout: torch's
    scaled_dot_product_attention, or on a CPU dsmoe's own kernel where that is faster.

    Args:
        rotary_base: of the angles; None leaves queries and keys as they come.
        Others: Megatron-Core's.
    """

    cache: KeyValueCache | None = None

    def __init__(
        self, config, layer_number: int, attn_mask_type, attention_type: str, softmax_scale: float | None = None,
        rotary_base: float | None = None, **kwargs,
    ):  # fmt: skip
        super().__init__()
        self.layer = layer_number
        self.scale = softmax_scale
        self.rotary_base = rotary_base

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **kwargs
    ) -> Tensor:
        """query [S, B, n, d], key and value [S, B, g, d] -> [S, B, n * d].

        attention_mask: None, or bool [B, 1, S, S] in Megatron's sense (True = may not look); causality is added.
        """
        query, key, value = step_timer.mark_region(REST, "attention", query, key, value)
        seen = 0 if self.cache is None else self.cache.seen_by(self.layer)  # tokens that all of these may look at
        angles = self._angles(query, seen)
        if self.cache is not None:  # it keeps keys as they are turned
            query, key, angles = rotary.turn(query, angles), rotary.turn(key, angles), None
            key, value = self.cache.extend(self.layer, key, value)
        if attention_mask is None and not seen and _attends_natively(query, key, value, self.rotary_base):
            out = native_attention.causal_attention(query, key, value, self.scale, angles)
        else:
            out = torch_attention(query, key, value, self.scale, angles, attention_mask, seen)
        return step_timer.mark_region("attention", REST, out)[0].flatten(2)

    def _angles(self, query: Tensor, seen: int) -> rotary.Angles | None:
        if self.rotary_base is None:
            return None
        positions_S = torch.arange(seen, seen + query.size(0), device=query.device)
        return rotary.angles(positions_S, query.size(-1), self.rotary_base)


def torch_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, angles: rotary.Angles | None,
    mask: Tensor | None = None, seen: int = 0,
) -> Tensor:  # fmt: skip
    """By torch's scaled_dot_product_attention: queries [S, B, n, d] after `seen` others, keys and values
    [seen + S, B, g, d]; queries and keys turned by `angles` first -> [S, B, n, d]."""
    query, key = rotary.turn(query, angles), rotary.turn(key, angles)
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    # A mask keeps torch from flash attention: none is made where causality says it, or a lone new token sees all.
    allowed = None
    if mask is not None or (seen and query.size(2) > 1):
        masked = query.new_zeros(query.size(2), key.size(2)).bool() if mask is None else mask
        allowed = (~masked).tril(seen)
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=allowed, is_causal=allowed is None and not seen, scale=scale,
        enable_gqa=query.size(1) != key.size(1),
    )  # fmt: skip
    return out.permute(2, 0, 1, 3)


def _attends_natively(query: Tensor, key: Tensor, value: Tensor, rotary_base: float | None) -> bool:
    """Whether dsmoe's kernel can do it and was faster than torch's operators here, one answer for any batch."""
    if not native_attention.supports(query, key, value):
        return False
    length, _, heads, size = query.shape
    shape = f"{length} positions, {heads} heads of {size}, {key.size(2)} of keys, rotary {rotary_base is not None}"
    candidates = attention_candidates(length, heads, key.size(2), size, rotary_base)
    return ways.fastest("attention", shape, candidates) == "native"


def attention_candidates(
    length: int, heads: int, groups: int, size: int, rotary_base: float | None, batch: int = PROBE_SEQUENCES
) -> dict[str, Callable[[], None]]:
    """Forward and backward of fp32 random tensors by dsmoe's kernel ("native") and by torch's operators ("torch")."""

    @lru_cache(maxsize=1)  # made by the first one that runs
    def problem() -> tuple[list[Tensor], rotary.Angles | None, Tensor]:
        random = torch.Generator().manual_seed(0)
        leaves = [torch.randn(length, batch, n, size, generator=random) for n in (heads, groups, groups)]
        angles = None if rotary_base is None else rotary.angles(torch.arange(length), size, rotary_base)
        return [leaf.requires_grad_() for leaf in leaves], angles, torch.ones(length, batch, heads, size)

    def work(attend: Callable[..., Tensor]) -> None:
        leaves, angles, grad = problem()
        ways.forward_and_backward(lambda: attend(*leaves, None, angles), leaves, grad)

    return {"native": partial(work, native_attention.causal_attention), "torch": partial(work, torch_attention)}


class RecomputedAttentionLayer(TransformerLayer):
    """Transformer layer that redoes attention in the backward pass; Megatron's recompute needs CUDA's generator."""

    def _forward_attention(self, hidden_states: Tensor, **kwargs):
        if not self.training:
            return super()._forward_attention(hidden_states, **kwargs)
        attend = super()._forward_attention
        return checkpoint(lambda x: attend(x, **kwargs), hidden_states, use_reentrant=False, preserve_rng_state=False)
