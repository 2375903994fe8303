"""Which experts every token of a step went to: RUN/trace/step_000100.npz, whole or not there at all.

    tokens              int32 [T], ids of all ranks' tokens, sample after sample
    sequence_length     tokens of a sample
    experts             E
    step                optimizer steps that were done before these routes were taken, plus one: the step's number
    layer_0_offsets     int64 [T + 1]; token t of the first MoE layer uses the routes [offsets[t], offsets[t + 1])
    layer_0_experts     int16 [N], ascending within a token

One pair of arrays for each MoE layer. Any number of experts a token is fine, none too.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dsmoe.errors import DataError
from dsmoe.parallel.groups import ParallelGroups
from dsmoe.runtime.files import write_atomically
from dsmoe.training.metrics import Warn

FOLDER = "trace"


@dataclass(frozen=True)
class RoutingTrace:
    """The routes of one optimizer step."""

    step: int
    sequence_length: int
    num_experts: int
    tokens_T: np.ndarray  # int32
    layers: list[tuple[np.ndarray, np.ndarray]]  # offsets int64 [T + 1] and experts int16 [N] of each MoE layer

    def counts_LE(self) -> np.ndarray:
        """int64, routes per expert."""
        return np.stack([np.bincount(experts, minlength=self.num_experts) for _, experts in self.layers])

    def map_TE(self, layer: int) -> np.ndarray:
        """bool, which token uses which expert in an MoE layer."""
        offsets, experts = self.layers[layer]
        map_TE = np.zeros((len(self.tokens_T), self.num_experts), dtype=bool)
        map_TE[np.repeat(np.arange(len(self.tokens_T)), np.diff(offsets)), experts] = True
        return map_TE


def trace_of(maps_LTE: list[np.ndarray], tokens_T: np.ndarray, sequence_length: int, step: int) -> RoutingTrace:
    """From bool maps, one of each MoE layer."""
    layers = []
    for map_TE in maps_LTE:
        offsets = np.concatenate(([0], map_TE.sum(1).cumsum())).astype(np.int64)
        layers.append((offsets, map_TE.nonzero()[1].astype(np.int16)))
    return RoutingTrace(step, sequence_length, maps_LTE[0].shape[1], tokens_T.astype(np.int32), layers)


def path_of(run_dir: Path, step: int) -> Path:
    return run_dir / FOLDER / f"step_{step:06d}.npz"


def write_trace(path: Path, trace: RoutingTrace) -> None:
    """All of the file, or none of it."""
    arrays: dict[str, Any] = {
        "tokens": trace.tokens_T, "sequence_length": trace.sequence_length, "experts": trace.num_experts,
        "step": trace.step,
    }  # fmt: skip
    for layer, (offsets, experts) in enumerate(trace.layers):
        arrays |= {f"layer_{layer}_offsets": offsets, f"layer_{layer}_experts": experts}
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content.getvalue())


def read_trace(path: Path) -> RoutingTrace:
    """Read a trace, or the newest one of a run's folder.

    Raises:
        DataError: there is none, or its arrays do not match.
    """
    if path.is_dir():
        files = sorted([*path.glob("step_*.npz"), *path.glob(f"{FOLDER}/step_*.npz")])
        if not files:
            raise DataError(f"{path} has no routing trace; a run with logging.trace=N writes one every N steps")
        path = files[-1]
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = [name for name in arrays.files if name.endswith("_offsets")]
            layers = [(arrays[f"layer_{i}_offsets"], arrays[f"layer_{i}_experts"]) for i in range(len(names))]
            trace = RoutingTrace(
                int(arrays["step"]), int(arrays["sequence_length"]), int(arrays["experts"]), arrays["tokens"], layers
            )
    except FileNotFoundError:
        raise DataError(f"{path}: no such routing trace") from None
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is no routing trace, or a damaged one: {error}") from error
    if problem := _problem(trace):
        raise DataError(f"{path} is damaged: {problem}")
    return trace


def _problem(trace: RoutingTrace) -> str | None:
    if not trace.layers:
        return "it has no layer"
    for layer, (offsets, experts) in enumerate(trace.layers):
        if offsets.shape != (len(trace.tokens_T) + 1,) or offsets[0] != 0 or (np.diff(offsets) < 0).any():
            return f"the offsets of layer {layer} do not fit {len(trace.tokens_T)} tokens"
        if offsets[-1] != len(experts):
            return f"layer {layer} has {len(experts)} routes, expected {offsets[-1]}"
        if len(experts) and not 0 <= experts.min() <= experts.max() < trace.num_experts:
            return f"layer {layer} has experts outside 0 ... {trace.num_experts - 1}"
    return None


class StepTracer:
    """Sees the routes of one optimizer step. Inside the `with` block the model's forward passes leave their maps, and
    `batch` is told the tokens of each; then every rank calls `write`.

    Args:
        routers: of the MoE layers, in their order.
    """

    def __init__(self, routers: list):
        self.routers = routers
        self.maps: list[list[Tensor]] = [[] for _ in routers]  # by layer, one of each micro-step, [B * S, E]
        self.tokens: list[Tensor] = []  # one of each micro-step, [B, S]
        self._hooks: list = []

    def __enter__(self) -> StepTracer:
        for router, maps in zip(self.routers, self.maps, strict=True):
            self._hooks.append(
                router.register_forward_hook(lambda module, args, out, maps=maps: maps.append(out.map_TE))
            )
        return self

    def __exit__(self, *_) -> None:
        for hook in self._hooks:
            hook.remove()

    def batch(self, tokens_BS: Tensor) -> None:
        self.tokens.append(tokens_BS)

    def write(self, run_dir: Path, step: int, groups: ParallelGroups, warn: Warn = print) -> None:
        """Gather what all ranks saw in the order of the samples, and write it on rank 0. Collective."""
        batch, length = self.tokens[0].shape
        maps_LPTE = torch.stack([torch.stack(maps) for maps in self.maps])  # P micro-steps; T in Megatron's [S, B]
        layers, parts, _, experts = maps_LPTE.shape
        maps_LPBSE = maps_LPTE.view(layers, parts, length, batch, experts).transpose(2, 3)
        own = (torch.stack(self.tokens).cpu().numpy(), np.packbits(maps_LPBSE.cpu().numpy(), axis=-1))
        everyone: list = [None] * groups.dp_size if groups.dp_rank == 0 else None
        dist.gather_object(own, everyone, dst=0, group=groups.dp)
        if groups.dp_rank:
            return
        # Samples of a step are cut by micro-step, then by rank.
        tokens = np.stack([tokens for tokens, _ in everyone], axis=1).reshape(-1)
        packed = np.stack([maps for _, maps in everyone], axis=2)  # [L, P, ranks, B, S, bytes]
        maps_LTE = np.unpackbits(packed, axis=-1, count=experts).astype(bool).reshape(layers, -1, experts)
        try:
            write_trace(path_of(run_dir, step), trace_of(list(maps_LTE), tokens, length, step))
        except OSError as error:
            warn(f"cannot write {path_of(run_dir, step)}: {error.strerror or error}; training continues")
