"""Bytes that a rank holds at the worst moment of a step, by what they are for.

States follow from the way DeepSpeed keeps them: the weights the model computes with, an fp32 master copy, the
optimizer's states, gradients as the backward pass leaves them, and in bf16 a flat copy of the rank's own ones for the
optimizer. Activations are what a backward pass needs again, layer by layer, and what the busiest rank holds while one
layer is at work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from dsmoe.config import RunConfig
from dsmoe.lab.planner.hardware import Hardware, Link, Speed
from dsmoe.lab.planner.layout import Layout
from dsmoe.optim.registry import optimizer_class
from dsmoe.routers import get
from dsmoe.runtime.device import on_gpu

MASTER = STATE = 4  # of a master weight, and of each state of the optimizer, fp32
REDUCED = 4  # of the flat gradient that the optimizer reads, fp32


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    process: float  # interpreter, libraries, device context
    weights: float
    gradients: float
    optimizer: float  # master weights and the optimizer's states
    update: float  # flat gradients and what the norm is computed in, while the optimizer runs
    gathered: float  # weights of the layers at work, where ranks hold parts of them
    reduction: float  # gradients of the layer at work, and the copy in which ranks sum those of experts they share
    activations: float  # kept for the backward pass
    dispatch: float  # rows and buffers of the layer at work, on the busiest rank
    logits: float  # of the vocabulary loss, a part of the rows at a time, and its weight gradient
    overheads: tuple[float, float]  # bytes held for each byte of state, and of what comes and goes

    @property
    def state(self) -> float:
        """Weights, gradients, optimizer state."""
        return self.weights + self.gradients + self.optimizer

    @property
    def transient(self) -> float:
        """At the worst moment: the backward pass, when activations are there, or the update, when they are not."""
        return max(self.update, self.activations + self.dispatch + self.logits + self.gathered + self.reduction)

    @property
    def total(self) -> float:
        return self.process + self.overheads[0] * self.state + self.overheads[1] * self.transient

    def parts(self) -> dict[str, float]:
        """Bytes by what they are for, overheads apart."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "overheads"}


def memory(layout: Layout) -> Memory:
    """Of the busiest rank."""
    stage, element = layout.config.parallel.zero_stage, layout.element
    local = layout.dense_parameters + layout.expert_parameters
    owned = layout.owned_parameters
    largest = largest_parameter(layout)
    accumulated = 4 if layout.element == 2 else element  # bf16 gradients are summed in fp32
    in_fp64 = 0.0 if layout.gradients_by_block else largest * 8  # for the norm
    layer = layer_parameters(layout) * element
    # Those of the layer at work, where the optimizer does not read them, what ranks sum them in, and the sum of all
    # micro-steps, of which a rank keeps its part.
    copies = (not layout.gradients_in_place) + (layout.replicas > 1)
    summed = layer_parameters(layout) * accumulated if stage > 1 else 0.0
    return Memory(
        process=layout.hardware.process_gib * 2**30,
        weights=element * (owned if stage == 3 else local),
        gradients=accumulated * (local if stage == 1 else owned),
        optimizer=owned * (MASTER + STATE * len(optimizer_class(layout.config.training).states)),
        update=(owned * REDUCED if element == 2 else 0.0) + in_fp64,
        gathered=2 * layer if stage == 3 else 0.0,
        reduction=copies * layer + summed,
        activations=kept(layout),
        dispatch=at_work(layout),
        logits=logits(layout),
        overheads=(layout.hardware.state_overhead, layout.hardware.activation_overhead),
    )


def expected_bytes(config: RunConfig, ranks: int) -> int:
    """What a rank's tensors take at the worst moment of its first steps, without the process itself and what its
    allocator holds beside them: on a machine of which nothing is known.

    Args:
        config: with its vocabulary and precision.
        ranks: of the kind that this process is one of, on GPUs or on the host.
    """
    precision = config.training.precision
    machine = Hardware(
        name="unknown", devices_per_node=ranks, memory_gib=1, cpu=not on_gpu(), peak_tflops={precision: 1.0},
        speeds={"default": Speed(tflops={precision: 1.0})}, within_node=Link(gb_s=1.0),
    )  # fmt: skip
    layout = Layout(config, machine, ranks)
    dense = layout.options.initial_experts_per_token(config.model)
    needed = memory(replace(layout, experts_per_token=dense))
    return int(needed.state + needed.transient)


def layer_parameters(layout: Layout) -> float:
    """Of the largest layer on one rank: what ZeRO 3 gathers at a time."""
    return layout.dense_parameters / layout.model.num_layers + layout.expert_parameters / max(1, layout.moe_layers)


def largest_parameter(layout: Layout) -> float:
    """Elements of a rank's largest tensor under the optimizer."""
    model = layout.model
    experts = layout.local_experts * max(map(math.prod, layout.expert.shapes.values())) / layout.replicas
    return max(experts if layout.moe_layers else 0.0, model.vocab_size * model.hidden_size / layout.ranks)


def kept(layout: Layout) -> float:
    """Activations of all layers, of one micro-step."""
    model = layout.model
    own = moe_activations(layout) if model.recompute == "none" else routing(layout)
    mlps = layout.moe_layers * own
    mlps += (model.num_layers - layout.moe_layers) * dense(layout, model.dense_ffn_hidden_size)
    inputs = 2 * layout.tokens * model.hidden_size * layout.element
    return mlps + model.num_layers * (inputs if model.recompute == "full" else attention(layout))


def attention(layout: Layout) -> float:
    """Kept of one layer: the input and output of both norms, queries, keys and values, the first two again where they
    are normalised, and what attention gives."""
    model = layout.model
    heads = model.num_attention_heads * model.head_size
    groups = model.key_value_heads * model.head_size
    normalised = heads + groups if model.qk_layernorm else 0
    return layout.tokens * (4 * model.hidden_size + 2 * heads + 2 * groups + normalised) * layout.element


def dense(layout: Layout, width: int) -> float:
    """Kept of a SwiGLU for all tokens, of torch operators: gate and up, silu of the gate, its product with up."""
    return 4 * layout.tokens * width * layout.element


def routing(layout: Layout) -> float:
    """What a layer's routing keeps: what the router says of map, scores and latents, and the plan's indices."""
    router = get(layout.config.router.name)
    per_pair = router.retained_bytes_per_pair(layout.model, layout.options, layout.element)
    return layout.tokens * layout.model.num_experts * per_pair + layout.routes * 8 * 4


def moe_activations(layout: Layout) -> float:
    """Kept of one MoE layer: routing, rows by expert, gate and up, and what a shared expert keeps."""
    model = layout.model
    rows = layout.routes * (model.hidden_size + layout.expert.activation_width + layout.latent) * layout.element
    return routing(layout) + rows + dense(layout, model.moe_shared_expert_intermediate_size or 0)


def at_work(layout: Layout) -> float:
    """Beside what is kept, while a layer is in its backward pass: gradients of its rows, and, recomputed, the rows."""
    model = layout.model
    parts = model.moe_chunks if model.recompute != "none" else 1
    rows = layout.routes / parts * 2 * model.hidden_size * layout.element
    in_flight = min(1.0, 2.5 / parts)  # the part at work, one on its way here and one on its way home
    exchanged = layout.tokens * layout.reach() * in_flight * 2 * model.hidden_size * layout.element
    recomputed = moe_activations(layout) / parts if model.recompute != "none" else 0.0
    recomputed += attention(layout) if model.recompute == "full" else 0.0
    return rows + exchanged + recomputed + 3 * layout.tokens * model.hidden_size * layout.element


def logits(layout: Layout) -> float:
    """A few MiB of logits on a CPU, 2^27 elsewhere, in fp32 with their softmax; the gradient of the output matrix."""
    model = layout.model
    chunk = min(layout.tokens * model.vocab_size, 2**21 if layout.hardware.cpu else 2**27)
    return 3 * 4 * chunk + model.vocab_size * model.hidden_size * (4 + layout.element)
