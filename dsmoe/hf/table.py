"""The key table: which tensors of ours and of a Hugging Face architecture hold the same numbers, for both directions.

Ours are the canonical names of `dsmoe.model.names`, one tensor for each expert. A row pairs one of them with one or
more of theirs; a transform says how the numbers lie. Where `{expert}` is missing in their name, theirs holds all
experts of the layer. A model has the tensors it has, so rows need no conditions: one without a row has no place in the
architecture, and a tensor of theirs that no row asks for is an extra one. Both are errors that list names.

Their shapes are what a transform makes of our shapes, so nothing is written down twice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dsmoe.config import ModelConfig
from dsmoe.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]
LISTED = 8  # names an error shows of each kind


@dataclass(frozen=True)
class Transform:
    """Tensors of a row in both directions; `model` has the number of heads. Results may be views."""

    to_theirs: Callable[[list[Tensor], ModelConfig], list[Tensor]]
    to_ours: Callable[[list[Tensor], ModelConfig], list[Tensor]]


def _split_qkv(tensors: list[Tensor], model: ModelConfig) -> list[Tensor]:
    """[g (n/g + 2) d, H], for each key head its queries, the key, the value -> [n d, H], [g d, H], [g d, H]."""
    groups = tensors[0].unflatten(0, (model.key_value_heads, -1, model.head_size))
    return [part.flatten(0, 2) for part in (groups[:, :-2], groups[:, -2:-1], groups[:, -1:])]


def _fuse_qkv(tensors: list[Tensor], model: ModelConfig) -> list[Tensor]:
    groups = [part.unflatten(0, (model.key_value_heads, -1, model.head_size)) for part in tensors]
    return [torch.cat(groups, dim=1).flatten(0, 2)]


SAME = Transform(lambda tensors, _: tensors, lambda tensors, _: tensors)
QKV = Transform(_split_qkv, _fuse_qkv)
HALVES = Transform(lambda tensors, _: list(tensors[0].chunk(2)), lambda tensors, _: [torch.cat(tensors)])  # gate, up
STACK = Transform(lambda tensors, _: [torch.stack(tensors)], lambda tensors, _: list(tensors[0].unbind()))


@dataclass(frozen=True)
class Row:
    """`{layer}` and `{expert}` stand for numbers, `{name}` for the rest of a name."""

    ours: str
    theirs: tuple[str, ...]
    transform: Transform = SAME


LAYER, THEIR_LAYER = "gpt.decoder.layers.{layer}.", "model.layers.{layer}."


def _row(ours: str, *theirs: str, transform: Transform = SAME) -> Row:
    return Row(LAYER + ours, tuple(THEIR_LAYER + name for name in theirs), transform)


_TRUNK = (
    Row("gpt.embedding.word_embeddings.weight", ("model.embed_tokens.weight",)),
    Row("gpt.decoder.final_layernorm.weight", ("model.norm.weight",)),
    Row("gpt.output_layer.weight", ("lm_head.weight",)),
    _row("input_layernorm.weight", "input_layernorm.weight"),
    _row("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
    _row("self_attention.linear_qkv.weight", *(f"self_attn.{x}_proj.weight" for x in "qkv"), transform=QKV),
    _row("self_attention.linear_proj.weight", "self_attn.o_proj.weight"),
)
_QKV_BIAS = (_row("self_attention.linear_qkv.bias", *(f"self_attn.{x}_proj.bias" for x in "qkv"), transform=QKV),)
_QK_NORM = tuple(_row(f"self_attention.{x}_layernorm.weight", f"self_attn.{x}_norm.weight") for x in "qk")
_QK_NORM_OF_ALL_HEADS = tuple(
    _row(f"self_attention.{x}_layernorm.norm.weight", f"self_attn.{x}_norm.weight") for x in "qk"
)
_DENSE = (
    _row("mlp.linear_fc1.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight", transform=HALVES),
    _row("mlp.linear_fc2.weight", "mlp.down_proj.weight"),
)
_GATE = (_row("mlp.router.weight", "mlp.gate.weight"),)
_EXPERTS = (
    _row(
        "mlp.experts.{expert}.gate_up_proj",
        "mlp.experts.{expert}.gate_proj.weight",
        "mlp.experts.{expert}.up_proj.weight",
        transform=HALVES,
    ),
    _row("mlp.experts.{expert}.down_proj", "mlp.experts.{expert}.down_proj.weight"),
)
_ROUTED_EXPERTS = (_row("mlp.experts.{expert}.{name}", "mlp.routed_experts.{name}", transform=STACK),)
_PACKED_EXPERTS = tuple(
    _row(f"mlp.experts.{{expert}}.{name}", f"mlp.experts.{name}", transform=STACK)
    for name in ("gate_up_proj", "down_proj")
)
_MIXTRAL = (
    _row("mlp.router.weight", "block_sparse_moe.gate.weight"),
    _row(
        "mlp.experts.{expert}.gate_up_proj",
        "block_sparse_moe.experts.{expert}.w1.weight",
        "block_sparse_moe.experts.{expert}.w3.weight",
        transform=HALVES,
    ),
    _row("mlp.experts.{expert}.down_proj", "block_sparse_moe.experts.{expert}.w2.weight"),
)
_ROUTING = (
    _row("mlp.router.{expert}.{name}", "mlp.routing.{name}", transform=STACK),
    _row("mlp.router.{name}", "mlp.routing.{name}"),
)


def _shared_expert(theirs: str) -> tuple[Row, ...]:
    return (
        _row(
            "mlp.shared_experts.linear_fc1.weight",
            f"mlp.{theirs}.gate_proj.weight",
            f"mlp.{theirs}.up_proj.weight",
            transform=HALVES,
        ),
        _row("mlp.shared_experts.linear_fc2.weight", f"mlp.{theirs}.down_proj.weight"),
        _row("mlp.shared_experts.gate_weight", "mlp.shared_expert_gate.weight"),
    )


_DSMOE = (*_ROUTING, *_shared_expert("shared_experts"))

# The Hub's names, which every reader knows; transformers 5 can also write the names of `PACKED`. The first row that
# fits a name counts. An export of ours calls experts `experts`, packed as in transformers, where they are SwiGLU
# without biases and of a fixed number for each token, and else `routed_experts`.
TABLES: dict[str, tuple[Row, ...]] = {
    "dsmoe": (*_TRUNK, *_QKV_BIAS, *_QK_NORM, *_QK_NORM_OF_ALL_HEADS, *_DENSE, *_DSMOE, *_ROUTED_EXPERTS),
    "qwen2_moe": (*_TRUNK, *_QKV_BIAS, *_DENSE, *_GATE, *_shared_expert("shared_expert"), *_EXPERTS),
    "dots1": (*_TRUNK, *_QK_NORM, *_DENSE, *_GATE, *_shared_expert("shared_experts"), *_EXPERTS),
    "qwen3_moe": (*_TRUNK, *_QK_NORM, *_DENSE, *_GATE, *_EXPERTS),
    "olmoe": (*_TRUNK, *_QK_NORM_OF_ALL_HEADS, *_GATE, *_EXPERTS),
    "mixtral": (*_TRUNK, *_MIXTRAL),
    "llama": (*_TRUNK, *_DENSE),
    "qwen3": (*_TRUNK, *_QK_NORM, *_DENSE),
}
PACKED: dict[str, tuple[Row, ...]] = {
    "dsmoe": (*_TRUNK, *_QKV_BIAS, *_QK_NORM, *_QK_NORM_OF_ALL_HEADS, *_DENSE, *_DSMOE, *_PACKED_EXPERTS),
    "qwen2_moe": (*_TRUNK, *_QKV_BIAS, *_DENSE, *_GATE, *_shared_expert("shared_expert"), *_PACKED_EXPERTS),
    "dots1": (*_TRUNK, *_QK_NORM, *_DENSE, *_GATE, *_shared_expert("shared_experts"), *_PACKED_EXPERTS),
    "qwen3_moe": (*_TRUNK, *_QK_NORM, *_DENSE, *_GATE, *_PACKED_EXPERTS),
    "olmoe": (*_TRUNK, *_QK_NORM_OF_ALL_HEADS, *_GATE, *_PACKED_EXPERTS),
    "mixtral": (*_TRUNK, *_GATE, *_PACKED_EXPERTS),
}


# What of a controller's state decides routes, by its name in `Router.inference_state`.
CONTROLLERS: dict[str, dict[str, str]] = {"dots1": {"bias": "mlp.gate.e_score_correction_bias"}}


def routing_name(layer: int, name: str, architecture: str = "dsmoe") -> str | None:
    """What a folder calls a tensor of a layer's controller; None where the architecture has none of it."""
    theirs = f"mlp.routing.{name}" if architecture == "dsmoe" else CONTROLLERS.get(architecture, {}).get(name)
    return None if theirs is None else THEIR_LAYER.format(layer=layer) + theirs


@dataclass(frozen=True)
class Link:
    """Names of tensors that hold the same numbers, and how to get one side from the other."""

    ours: tuple[str, ...]
    theirs: dict[str, tuple[int, ...]]  # name -> shape
    transform: Transform
    model: ModelConfig

    def to_theirs(self, tensors: list[Tensor]) -> dict[str, Tensor]:
        """Tensors in the order of `ours` -> theirs by name."""
        return dict(zip(self.theirs, self.transform.to_theirs(tensors, self.model), strict=True))

    def to_ours(self, tensors: list[Tensor]) -> dict[str, Tensor]:
        """Tensors in the order of `theirs` -> ours by name."""
        return dict(zip(self.ours, self.transform.to_ours(tensors, self.model), strict=True))


def links(rows: Iterable[Row], model: ModelConfig, shapes: Shapes) -> list[Link]:
    """Pair every tensor of ours with theirs, in the order of ours.

    Args:
        rows: an entry of `TABLES` or `PACKED`.
        model: for the number and size of heads.
        shapes: of all tensors of the model, by canonical name (`dsmoe.model.skeleton.logical_shapes`, or a
            checkpoint's manifest).

    Raises:
        CheckpointError: tensors without a row, which the architecture has no place for.
    """
    patterns = [(_pattern(row.ours), row) for row in rows]
    groups: dict[tuple[str, ...], tuple[Row, list[str]]] = {}
    homeless = []
    for name in shapes:
        match = next(((m.groupdict(), row) for p, row in patterns if (m := p.fullmatch(name))), None)
        if match is None:
            homeless.append(name)
        else:
            fields, row = match
            theirs = tuple(pattern.format(**fields) for pattern in row.theirs)
            groups.setdefault(theirs, (row, []))[1].append(name)
    if homeless:
        raise CheckpointError(f"the architecture has no place for {_some(homeless)}")
    return [_link(row, tuple(ours), theirs, model, shapes) for theirs, (row, ours) in groups.items()]


def _link(row: Row, ours: tuple[str, ...], theirs: tuple[str, ...], model: ModelConfig, shapes: Shapes) -> Link:
    try:
        theirs_meta = row.transform.to_theirs([torch.empty(tuple(shapes[name]), device="meta") for name in ours], model)
    except RuntimeError as error:
        raise CheckpointError(
            f"tensors of shapes that do not fit together: {_some([f'{name} {list(shapes[name])}' for name in ours])}"
        ) from error
    return Link(ours, {name: tuple(t.shape) for name, t in zip(theirs, theirs_meta, strict=True)}, row.transform, model)


def _pattern(ours: str) -> re.Pattern:
    fields = {"layer": r"\d+", "expert": r"\d+", "name": r".+"}
    return re.compile(re.sub(r"\\{(\w+)\\}", lambda field: f"(?P<{field[1]}>{fields[field[1]]})", re.escape(ours)))


def check_tensors(expected: Shapes, present: Shapes, place: str) -> None:
    """Raises `CheckpointError` that names every kind of difference: missing, extra and of a different shape."""
    differences = {
        "missing": [name for name in expected if name not in present],
        "not used by this architecture and configuration": [name for name in present if name not in expected],
        "of a different shape": [
            f"{name} {list(present[name])} (expected {list(shape)})"
            for name, shape in expected.items()
            if name in present and tuple(present[name]) != tuple(shape)
        ],
    }
    lines = [f"{what}: {_some(names)}" for what, names in differences.items() if names]
    if lines:
        raise CheckpointError(f"{place} does not hold the tensors of its configuration; {'; '.join(lines)}")


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({', '.join(names[:LISTED])}{rest})"
