"""What a rank does in an optimizer step, by the parts that `StepTimer` measures: operations, bytes, calls.

Operations are multiplications and additions of matrix products, forward and backward (three times the forward ones),
and once more where a part is recomputed. Bytes of activations count each pass of elementwise work over them, so they
stand for passes that a fused kernel would not need.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsmoe.lab.planner.layout import Layout
from dsmoe.optim.registry import optimizer_class

PASSES = 3  # a product and the two of its gradient


@dataclass(frozen=True)
class Work:
    """Of one part, in one optimizer step of the busiest rank."""

    flops: float = 0.0
    activation_bytes: float = 0.0
    weight_bytes: float = 0.0
    calls: float = 0.0

    def seconds(self, layout: Layout, part: str) -> float:
        speed = layout.hardware.speed(part)
        rate = speed.tflops.get(layout.config.training.precision)
        return (
            (self.flops / (rate * 1e12) if rate else 0.0)
            + (self.activation_bytes / (speed.gb_s * 1e9) if speed.gb_s else 0.0)
            + (self.weight_bytes / (speed.weights_gb_s * 1e9) if speed.weights_gb_s else 0.0)
            + (self.calls * speed.call_us + speed.step_us) * 1e-6
        )


def work(layout: Layout) -> dict[str, Work]:
    """By part; a part that the model has not is left out."""
    model, micro = layout.model, layout.micro_steps
    parts = {
        "attention": attention(layout),
        "rest": rest(layout),
        "loss": loss(layout),
        "optimizer": optimizer(layout),
    }
    if layout.moe_layers:
        parts |= {"routing": routing(layout), "dispatch": dispatch(layout), "experts": experts(layout)}
        parts["combine"] = combine(layout)
    if layout.moe_layers and model.moe_shared_expert_intermediate_size:
        width = model.moe_shared_expert_intermediate_size
        times = layout.moe_layers * micro
        parts["shared experts"] = _mlp(layout, width, times)
    return parts


def total_flops(layout: Layout) -> float:
    """That a step needs on all ranks: what utilisation (MFU) counts. Nothing recomputed, no imbalance."""
    model = layout.model
    active = layout.size.total - layout.moe_layers * (model.num_experts - layout.experts) * layout.size.expert
    if model.tie_embeddings is False:
        active -= model.vocab_size * model.hidden_size  # a look-up multiplies nothing
    heads = model.num_attention_heads * model.head_size
    scores = 2 * model.num_layers * heads * model.sequence_length  # 2 products, half of them masked, 2 operations each
    return PASSES * layout.step_tokens * (2 * active + scores)


def attention(layout: Layout) -> Work:
    """Scores and their use, causal; the projections belong to the rest."""
    model = layout.model
    heads = model.num_attention_heads * model.head_size
    recomputed = model.recompute == "full"
    tokens, layers = layout.tokens, model.num_layers * layout.micro_steps
    # Two products forward, five backward, where scores are made again.
    flops = (7 + 2 * recomputed) * tokens * heads * model.sequence_length * layers
    return Work(flops, tokens * heads * 8 * layout.element * layers, calls=layers)


def rest(layout: Layout) -> Work:
    """Projections around attention, dense MLPs, norms, rotation, residuals, embedding; what ZeRO does to gradients as
    they come: into a bucket and out of it; ZeRO 3 gathers weights from their parts, forward and backward."""
    model, tokens, micro = layout.model, layout.tokens, layout.micro_steps
    full = model.recompute == "full"
    projections = 2 * model.hidden_size * model.head_size * (model.num_attention_heads + model.key_value_heads)
    layers = model.num_layers * micro
    flops = 2 * projections * (PASSES + full) * tokens * layers
    elements = (30 + 10 * full) * model.hidden_size * tokens * layers
    dense = _mlp(layout, model.dense_ffn_hidden_size, (model.num_layers - layout.moe_layers) * micro)
    embedding = 4 * tokens * model.hidden_size * micro
    everything = layout.dense_parameters + layout.expert_parameters
    moved = layout.dense_parameters if layout.gradients_in_place else everything
    gathered = 2 * everything if layout.config.parallel.zero_stage == 3 else 0
    summed = 3 * everything * (micro - 1)  # over micro-steps: two are read and one written
    return Work(
        flops + dense.flops,
        (elements + embedding) * layout.element + dense.activation_bytes,
        (2 * (moved + gathered) * micro + summed) * layout.element,
        layers,
    )


def _mlp(layout: Layout, width: int, times: float) -> Work:
    """A SwiGLU of every token."""
    recomputed = layout.model.recompute == "full"
    flops = 2 * 3 * layout.model.hidden_size * width * (PASSES + recomputed) * layout.tokens * times
    return Work(flops, 12 * width * layout.tokens * layout.element * times, calls=times)


def loss(layout: Layout) -> Work:
    """The output layer and the cross entropy, a part of the rows at a time."""
    model, tokens = layout.model, layout.tokens * layout.micro_steps
    flops = 2 * PASSES * tokens * model.vocab_size * model.hidden_size
    weights = 4 * model.vocab_size * model.hidden_size * 4 * layout.micro_steps
    return Work(flops, 8 * tokens * model.vocab_size * 4, weights, layout.micro_steps)


def routing(layout: Layout) -> Work:
    """Scores of every expert, fp32 whatever the model's precision, and the passes over [T, E] that decide. Latents that
    are not kept are made again; that a CPU does so for active pairs only, where the others have no gradient, is not
    counted."""
    model, times = layout.model, layout.moe_layers * layout.micro_steps
    width, retained = max(1, layout.latent), layout.sends_latents
    passes = PASSES + (layout.latent > 0 and not retained)
    flops = 2 * passes * layout.tokens * model.num_experts * width * model.hidden_size * times
    elements = layout.tokens * model.num_experts * (20 + 4 * layout.latent * retained) * times
    return Work(flops, 4 * elements, calls=times)


def dispatch(layout: Layout) -> Work:
    """The plan, from the map [T, E]; rows gathered by destination and by expert, and their gradients summed."""
    model, times = layout.model, layout.moe_layers * layout.micro_steps
    recomputed = model.recompute != "none"
    rows = (layout.routes + _rows(layout)) * model.hidden_size * layout.element * (5 + 2 * recomputed)
    plan = layout.tokens * model.num_experts * 12
    return Work(0.0, (rows + plan) * times, calls=times * model.moe_chunks)


def combine(layout: Layout) -> Work:
    """Sums of rows, for each token; their gradients are gathered."""
    model, times = layout.model, layout.moe_layers * layout.micro_steps
    recomputed = model.recompute != "none"
    rows = (layout.routes + _rows(layout)) * model.hidden_size * layout.element * (5 + 2 * recomputed)
    return Work(0.0, rows * times, calls=times * model.moe_chunks)


def experts(layout: Layout) -> Work:
    """The projections of every route; each expert's weights are read forward and backward, and gradients written."""
    model, times = layout.model, layout.moe_layers * layout.micro_steps
    recomputed = model.recompute != "none"
    matrices = layout.expert.multiplications
    flops = 2 * matrices * (PASSES + recomputed) * layout.routes * times
    elements = layout.routes * (14 + 4 * recomputed) * model.moe_ffn_hidden_size * layout.element * times
    used = min(layout.local_experts, layout.routes) * model.moe_chunks  # each chunk goes through its experts' weights
    return Work(flops, elements, used * matrices * layout.element * (3 + recomputed) * times, used * times)


def optimizer(layout: Layout) -> Work:
    """The optimizer on what the rank owns; before it gradients are flattened, their norm taken, and they are clipped,
    after it the model's weights are copied."""
    owned = layout.owned_parameters
    passes = 0 if layout.gradients_in_place else 2  # to flatten them
    passes += 1 if layout.gradients_by_block else 2  # for their norm
    passes += 2  # to clip them
    states = len(optimizer_class(layout.config.training).states)
    step = owned * (3 + 2 * states) * 4  # reads weight, gradient and states; writes all but the gradient
    return Work(0.0, 0.0, owned * passes * 4 + step + owned * (4 + layout.element), 1.0)


def _rows(layout: Layout) -> float:
    """That leave a rank for others; 0 on one rank, where rows are gathered once."""
    return layout.tokens * layout.reach() if layout.ep > 1 else 0.0
