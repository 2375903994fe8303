"""Configuration of a dsmoe model: a decoder whose experts may be any number for each token.

Stand-alone: this file travels with the weights and imports nothing but transformers.
"""

from __future__ import annotations

from transformers import PreTrainedConfig


class DsmoeConfig(PreTrainedConfig):
    """Shapes, and the router with its options.

    Args:
        vocab_size: rows of the embedding; may be more than the tokenizer has ids.
        intermediate_size: width of a dense layer's SwiGLU.
        num_key_value_heads: None: as many as attention heads.
        head_dim: None: `hidden_size / num_attention_heads`.
        mlp_layer_types: "sparse" or "dense" for each layer; None: all sparse.
        num_experts, moe_intermediate_size: routed experts of a sparse layer, and the width of one.
        expert_activation: of routed experts, a name in activations_dsmoe.py.
        expert_bias: whether each projection of a routed expert adds one.
        shared_expert_intermediate_size: width of the expert that every token has; None: no such expert.
        shared_expert_gate: multiply that expert's output by the sigmoid of a score of the token.
        qkv_bias: biases of the projections to queries, keys and values.
        expert_rank: width of the latent that scores an expert and enters its gate; 0: experts do not score themselves.
        router: {"name": ..., and every option it was trained with}.
        num_experts_per_tok: experts of every token, of a router with a fixed k whose experts do not score themselves
            and are SwiGLU without biases; None: the number may differ from token to token.
        qk_norm: True: RMSNorm of queries and keys for each head; "full": over all heads together; False: none.
        max_position_embeddings: length of the training sequences.
        initializer_range: standard deviation of new weights.
        output_router_logits: return the router's scores and the balance loss.
        router_aux_loss_coef: weight of the balance loss in `loss`, where the scores are returned.
        experts_backend: of experts whose number differs, "grouped_mm" for one grouped GEMM, "loop" for one expert after
            another, "auto" for the first where it is possible.
        router_dtype: of the router's arithmetic and tensors; only float32 is supported.
    """

    model_type = "dsmoe"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 256,
        intermediate_size: int = 2048,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 8,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        hidden_act: str = "silu",
        mlp_layer_types: list[str] | None = None,
        num_experts: int = 8,
        moe_intermediate_size: int = 512,
        expert_activation: str = "swiglu",
        expert_bias: bool = False,
        shared_expert_intermediate_size: int | None = None,
        shared_expert_gate: bool = False,
        qkv_bias: bool = False,
        expert_rank: int = 0,
        router: dict | None = None,
        num_experts_per_tok: int | None = None,
        qk_norm: bool | str = False,
        rms_norm_eps: float = 1e-5,
        rope_parameters: dict | None = None,
        max_position_embeddings: int = 2048,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = True,
        use_cache: bool = True,
        output_router_logits: bool = False,
        router_aux_loss_coef: float = 0.0,
        experts_backend: str = "auto",
        router_dtype: str = "float32",
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        **kwargs,
    ):
        if hidden_act != "silu" or router_dtype != "float32":
            raise ValueError(
                f"hidden_act {hidden_act!r} and router_dtype {router_dtype!r}: only silu and float32 exist here"
            )
        if experts_backend not in ("auto", "grouped_mm", "loop"):
            raise ValueError(f"experts_backend {experts_backend!r}, expected auto, grouped_mm or loop")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.hidden_act = hidden_act
        self.mlp_layer_types = mlp_layer_types or ["sparse"] * num_hidden_layers
        self.num_experts = num_experts
        self.moe_intermediate_size = moe_intermediate_size
        self.expert_activation = expert_activation
        self.expert_bias = expert_bias
        self.shared_expert_intermediate_size = shared_expert_intermediate_size
        self.shared_expert_gate = shared_expert_gate
        self.qkv_bias = qkv_bias
        self.expert_rank = expert_rank
        self.router = router or {"name": "topk", "k": 1, "softmax": "before", "renormalize": False}
        self.num_experts_per_tok = num_experts_per_tok
        self.qk_norm = qk_norm
        self.rms_norm_eps = rms_norm_eps
        self.rope_parameters = rope_parameters or {"rope_type": "default", "rope_theta": 10000.0}
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.output_router_logits = output_router_logits
        self.router_aux_loss_coef = router_aux_loss_coef
        self.experts_backend = experts_backend
        self.router_dtype = router_dtype
        super().__init__(
            tie_word_embeddings=tie_word_embeddings,
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            **kwargs,
        )
        if self.rope_parameters["rope_type"] != "default":
            raise ValueError(f"rope_type {self.rope_parameters['rope_type']!r}: only 'default' exists here")
