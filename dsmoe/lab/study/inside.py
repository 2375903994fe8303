"""What a cell's experts became, read from what its run left beside `metrics.jsonl`; what is not there is left out.

    probe.json          how alike experts are, flipped routes, latency (`dsmoe.lab.study.probe`)
    experts.jsonl       routes and gradient norm of every expert, every `logging.experts` steps
    trace/*.npz         which experts each token of a step used, every `logging.trace` steps
    seconds_by_part     in each line of metrics.jsonl, with `logging.timings`

Shapes: L MoE layers, E experts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, median

import numpy
import torch

from dsmoe.data.tokenizer import Tokenizer
from dsmoe.errors import DsmoeError
from dsmoe.lab.planner.replay import problems, replay
from dsmoe.lab.study.probe import FILE as PROBE
from dsmoe.lab.study.probe.routes import KINDS, kinds_of
from dsmoe.lab.study.results import END
from dsmoe.training.experts import FILE as EXPERTS
from dsmoe.training.metrics import read_lines
from dsmoe.training.trace import FOLDER, RoutingTrace, read_trace

WEAK = 0.1  # of the mean gradient norm of its layer's experts: less than that counts as hardly any gradient
REPLAYED = 8  # expert-parallel ranks that the last recorded step is replayed on, or as many as there are experts
MOVING = ("routing", "dispatch", "combine")  # parts of a step that only a layer of experts has, the network apart


@dataclass(frozen=True)
class Inside:
    """One run's folder."""

    folder: Path

    @cached_property
    def probe(self) -> dict | None:
        path = self.folder / PROBE
        return json.loads(path.read_text()) if path.exists() else None

    @cached_property
    def expert_lines(self) -> list[dict]:
        path = self.folder / EXPERTS
        return read_lines(path) if path.exists() else []

    @property
    def traces(self) -> list[Path]:
        """By step."""
        return sorted((self.folder / FOLDER).glob("step_*.npz"))

    def values(self, lines: list[dict]) -> dict[str, float]:
        """Everything that is one number. `lines`: of metrics.jsonl."""
        return {**self._probed(), **self._of_experts(), **self._of_parts(lines), **self._replayed()}

    def _probed(self) -> dict[str, float]:
        if not self.probe or not self.probe.get("layers"):
            return {}
        layers, values = self.probe["layers"], {}
        for name, of_layer in (
            ("output_cosine", lambda layer: layer["cosine"]["mean"]),
            ("output_cka", lambda layer: layer["cka"]["mean"]),
            ("weights_alike", lambda layer: layer["weights"]["mean"] - layer["weights"]["chance"]),
            ("flips", lambda layer: layer["flips_checkpoint"]),
            ("flips_bf16", lambda layer: layer["flips_bf16"]),
        ):
            try:
                values[name] = mean(of_layer(layer) for layer in layers)
            except KeyError:  # one expert has no pair; a run without an earlier checkpoint no flips against it
                continue
        if latency := self.probe.get("latency"):
            values["first_token"] = 1e3 * latency[0]["first_token_seconds"]
            values["token"] = 1e3 * latency[0]["token_seconds"]
        return values

    def _of_experts(self) -> dict[str, float]:
        if not self.expert_lines:
            return {}
        end = self.expert_lines[-max(1, round(END * len(self.expert_lines))) :]
        return {
            "idle_experts": float(idle(end)),
            "weak_experts": mean(weak(line) for line in end),
            "expert_gradient": median(norm for line in end for layer in line["grad_norm"] for norm in layer),
        }

    def _of_parts(self, lines: list[dict]) -> dict[str, float]:
        parts = parts_of(lines)
        if not parts:
            return {}
        passes = sum(parts.values()) - parts.get("optimizer", 0.0)
        return {
            "passes_seconds": passes,
            "optimizer_seconds": parts.get("optimizer", 0.0),
            "routing_share": sum(parts.get(part, 0.0) for part in MOVING) / passes,
            "exchange_share": parts.get("exchange", 0.0) / passes,
        }

    def _replayed(self) -> dict[str, float]:
        """The newest trace on several ranks: what de-duplication and placement are worth."""
        if not self.traces:
            return {}
        trace = read_trace(self.traces[-1])
        ranks = min(REPLAYED, trace.num_experts)
        if ranks == 1 or problems(trace, [ranks]):
            return {}
        rows = {row.placement: row for row in replay(trace, [ranks])}
        ours = rows["contiguous"]
        values = {
            "load_contiguous": ours.load,
            "load_aware": rows["load-aware"].load,
            "load_replicated": rows["replicated"].load,
        }
        return {**values, "by_route": ours.sent_routes / ours.sent_rows} if ours.sent_rows else values

    def kinds_over_training(self) -> list[tuple[int, dict[str, float]]]:
        """(step, experts per token by kind of token, mean over layers), by step. Empty without a tokenizer."""
        tokenizer = self._tokenizer()
        if tokenizer is None:
            return []
        points = []
        for path in self.traces:
            trace = read_trace(path)
            active_T = active(trace)
            kind_T = numpy.asarray(kinds_of(torch.from_numpy(trace.tokens_T)[None], tokenizer))[0]
            points.append(
                (
                    trace.step,
                    {
                        kind: float(active_T[kind_T == number].mean())
                        for number, kind in enumerate(KINDS)
                        if (kind_T == number).any()
                    },
                )
            )
        return points

    def layers_over_training(self, step_tokens: int) -> list[tuple[int, list[float]]]:
        """(step, experts per token of each MoE layer), by step."""
        return [(line["step"], [sum(layer) / step_tokens for layer in line["counts"]]) for line in self.expert_lines]

    def _tokenizer(self) -> Tokenizer | None:
        """The copy in the run's folder."""
        try:
            return Tokenizer.load(self.folder)
        except DsmoeError:
            return None


def active(trace: RoutingTrace) -> numpy.ndarray:
    """Experts of each token, mean over layers: fp64 [T]."""
    return numpy.mean([numpy.diff(offsets) for offsets, _ in trace.layers], axis=0)


def parts_of(lines: list[dict]) -> dict[str, float]:
    """Seconds of each part of a step: medians over steps. Empty for a run without `logging.timings`."""
    timed = [line["seconds_by_part"] for line in lines if "seconds_by_part" in line]
    names = dict.fromkeys(name for parts in timed for name in parts)
    return {name: median(parts.get(name, 0.0) for parts in timed) for name in names}


def idle(lines: list[dict]) -> float:
    """Share of experts that took no token in any of these lines of experts.jsonl."""
    return float((numpy.sum([line["counts"] for line in lines], axis=0) == 0).mean())


def weak(line: dict) -> float:
    """Share of experts whose gradient is weak beside that of the others in their layer."""
    norms_LE = numpy.array(line["grad_norm"], float)
    return float((norms_LE < WEAK * norms_LE.mean(1, keepdims=True)).mean())
