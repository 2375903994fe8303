"""What a run will need and how fast it will be: memory, traffic, seconds by part, utilisation, energy, money.

Seconds are those of the busiest rank, parts one after another. Energy is modelled, watts times time, never measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dsmoe.lab.planner import traffic
from dsmoe.lab.planner.layout import Layout, checked
from dsmoe.lab.planner.memory import Memory, memory
from dsmoe.lab.planner.traffic import Flow
from dsmoe.lab.planner.work import total_flops, work


@dataclass(frozen=True)
class Prediction:
    """Of one layout."""

    layout: Layout
    memory: Memory
    first_memory: Memory  # in the first steps, when some routers take more experts than later
    flows: dict[str, Flow]  # experts, gradients, weights; what one rank sends in a step
    seconds: dict[str, float]  # of a step, by part

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        return self.layout.step_tokens / self.step_seconds

    @property
    def tflops(self) -> float:
        """Of one device: operations that the model needs, recomputed ones not counted."""
        return total_flops(self.layout) / self.layout.ranks / self.step_seconds / 1e12

    @property
    def utilisation(self) -> float:
        """MFU."""
        return self.tflops / self.layout.hardware.peak_tflops[self.layout.config.training.precision]

    @property
    def worst_memory(self) -> float:
        return max(self.memory.total, self.first_memory.total)

    @property
    def missing_memory(self) -> float:
        """Bytes that a device lacks; 0 or less where the run fits."""
        return self.worst_memory - self.layout.hardware.memory_gib * 2**30

    @property
    def fits(self) -> bool:
        return self.missing_memory <= 0

    def run_seconds(self, tokens: float) -> float:
        return tokens / self.tokens_per_second

    def joules_per_token(self) -> float | None:
        watts = self.layout.hardware.watts
        return None if watts is None else watts * self.layout.ranks / self.tokens_per_second

    def as_json(self, tokens: float) -> dict:
        """Every number, for a run of so many tokens."""
        config, joules, price = self.layout.config, self.joules_per_token(), self.layout.hardware.price_per_hour
        device_hours = self.run_seconds(tokens) * self.layout.ranks / 3600
        return {
            "ranks": self.layout.ranks,
            "expert_parallel": self.layout.ep,
            "zero_stage": config.parallel.zero_stage,
            "recompute": config.model.recompute,
            "moe_chunks": config.model.moe_chunks,
            "gradient_accumulation": self.layout.micro_steps,
            "parameters": self.layout.size.total,
            "active_parameters": self.layout.size.active,
            "load": self.layout.load,
            "memory_bytes": {**self.memory.parts(), "total": self.memory.total},
            "first_memory_bytes": {**self.first_memory.parts(), "total": self.first_memory.total},
            "fits": self.fits,
            "missing_bytes": self.missing_memory,
            "sent_bytes": {name: {"within": f.within, "between": f.between} for name, f in self.flows.items()},
            "seconds_by_part": self.seconds,
            "step_seconds": self.step_seconds,
            "tokens_per_second": self.tokens_per_second,
            "tflops_per_device": self.tflops,
            "utilisation": self.utilisation,
            "binds": self.binds(),
            "run_seconds": self.run_seconds(tokens),
            "device_hours": device_hours,
            "joules_modelled": None if joules is None else joules * tokens,
            "price": None if price is None else device_hours * price,
        }

    def binds(self) -> str:
        """Where most of a step goes: network, moving tokens (routing, dispatch, combine), optimizer, or arithmetic."""
        kinds = {
            "network": self.seconds.get("exchange", 0.0)
            + self.seconds.get("gradients", 0.0)
            + self.seconds.get("weights", 0.0),
            "moving tokens": sum(self.seconds.get(part, 0.0) for part in ("routing", "dispatch", "combine")),
            "optimizer": self.seconds["optimizer"],
        }
        kinds["arithmetic"] = self.step_seconds - sum(kinds.values())
        return max(kinds, key=kinds.get)


def predict(layout: Layout) -> Prediction:
    """Raises `ConfigError` with every reason why the layout cannot be."""
    checked(layout)
    flows = {
        "exchange": traffic.exchange(layout), "gradients": traffic.gradients(layout), "weights": traffic.weights(layout)
    }  # fmt: skip
    seconds = {part: done.seconds(layout, part) for part, done in work(layout).items()}
    for name, flow in flows.items():
        if flow.calls:
            seconds[name] = flow.seconds(layout) * (layout.load if name == "exchange" else 1.0)
    first = replace(layout, experts_per_token=layout.options.initial_experts_per_token(layout.model))
    return Prediction(layout, memory(layout), memory(first), flows, seconds)
