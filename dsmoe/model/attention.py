"""Attention and rotary embedding that run on any device; Megatron-Core's own ones ask for CUDA.

Shapes: S tokens, B sequences, n query heads, g key/value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dsmoe.clock import REST, clock
from dsmoe.model import native_attention


class KeyValueCache:
    """Keys and values of the tokens that a model has seen, so that each new token costs one token.

    `with cache.of(model)`: forward passes continue the text that the cache holds, instead of beginning one.
    """

    def __init__(self) -> None:
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def length(self) -> int:
        """Tokens held."""
        return next(iter(self._layers.values()))[0].size(0) if self._layers else 0

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values [S, B, g, d] of new tokens; returns those of all tokens."""
        if layer in self._layers:
            key, value = (torch.cat(pair) for pair in zip(self._layers[layer], (key, value), strict=True))
        self._layers[layer] = key, value
        return key, value

    @contextmanager
    def of(self, model: nn.Module) -> Iterator[KeyValueCache]:
        """Let the passes of a model inside the block continue from this cache."""
        users = [module for module in model.modules() if isinstance(module, CausalAttention | AnyDeviceRotary)]
        for module in users:
            module.cache = self
        try:
            yield self
        finally:
            for module in users:
                module.cache = None


class CausalAttention(nn.Module):
    """Megatron's core-attention slot. Causal, grouped-query, no dropout; torch's scaled_dot_product_attention, and on a
    CPU dsmoe's own kernel where it can do it."""

    cache: KeyValueCache | None = None

    def __init__(self, config, layer_number: int, attn_mask_type, attention_type: str, softmax_scale=None, **kwargs):
        super().__init__()
        self.layer = layer_number
        self.scale = softmax_scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **kwargs
    ) -> Tensor:
        """query [S, B, n, d], key and value [S, B, g, d] -> [S, B, n * d].

        attention_mask: None, or bool [B, 1, S, S] in Megatron's sense (True = may not look); causality is added.
        """
        if self.cache is not None:
            key, value = self.cache.extend(self.layer, key, value)
        seen = key.size(0) - query.size(0)  # tokens of the cache, which all of these may look at
        query, key, value = clock.boundary(REST, "attention", query, key, value)
        if attention_mask is None and not seen and native_attention.takes(query, key, value):
            out = native_attention.causal_attention(query, key, value, self.scale)
            return clock.boundary("attention", REST, out)[0].flatten(2)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        grouped = query.size(1) != key.size(1)
        if attention_mask is None and not seen:
            out = F.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=self.scale, enable_gqa=grouped
            )
        else:
            masked = query.new_zeros(query.size(2), key.size(2)).bool() if attention_mask is None else attention_mask
            allowed = (~masked).tril(seen)
            out = F.scaled_dot_product_attention(
                query, key, value, attn_mask=allowed, scale=self.scale, enable_gqa=grouped
            )
        (out,) = clock.boundary("attention", REST, out)
        return out.permute(2, 0, 1, 3).flatten(2)


class AnyDeviceRotary(RotaryEmbedding):
    """Rotary angles on DeepSpeed's device; Megatron's version asks for CUDA."""

    cache: KeyValueCache | None = None

    def forward(self, max_seq_len: int, offset: int = 0, **kwargs) -> Tensor:
        """Angles [max_seq_len, 1, 1, d] from position `offset` on, counted from the end of the cache."""
        return super().forward(max_seq_len, offset + (self.cache.length if self.cache else 0), **kwargs)

    def get_emb(self, max_seq_len: int, offset: int = 0) -> Tensor:
        self.inv_freq = self.inv_freq.to(get_accelerator().current_device_name())
        freqs = self.get_freqs_non_repeated(max_seq_len, offset)
        emb = freqs.repeat(1, 2) if not self.rotary_interleaved else freqs.repeat_interleave(2, dim=-1)
        return emb[:, None, None, :]


class RecomputedAttentionLayer(TransformerLayer):
    """Transformer layer that redoes attention in the backward pass; Megatron's recompute needs CUDA's generator."""

    def _forward_attention(self, hidden_states: Tensor, **kwargs):
        if not self.training:
            return super()._forward_attention(hidden_states, **kwargs)
        attend = super()._forward_attention
        return checkpoint(lambda x: attend(x, **kwargs), hidden_states, use_reentrant=False, preserve_rng_state=False)
