"""Attention and rotary embedding that run on any device; Megatron-Core's own ones ask for CUDA.

Shapes: S tokens, B sequences, n query heads, g key/value heads, d head size.
"""

from __future__ import annotations

import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class CausalAttention(nn.Module):
    """Megatron's core-attention slot on torch's scaled_dot_product_attention. Causal, grouped-query, no dropout."""

    def __init__(self, config, layer_number: int, attn_mask_type, attention_type: str, softmax_scale=None, **kwargs):
        super().__init__()
        self.scale = softmax_scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **kwargs
    ) -> Tensor:
        """query [S, B, n, d], key and value [S, B, g, d] -> [S, B, n * d].

        attention_mask: None, or bool [B, 1, S, S] in Megatron's sense (True = may not look); causality is added.
        """
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        grouped = query.size(1) != key.size(1)
        if attention_mask is None:
            out = F.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=self.scale, enable_gqa=grouped
            )
        else:
            allowed = (~attention_mask).tril()
            out = F.scaled_dot_product_attention(
                query, key, value, attn_mask=allowed, scale=self.scale, enable_gqa=grouped
            )
        return out.permute(2, 0, 1, 3).flatten(2)


class AnyDeviceRotary(RotaryEmbedding):
    """Rotary angles on DeepSpeed's device; Megatron's version asks for CUDA."""

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
