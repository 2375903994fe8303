"""What a machine can do, read from a YAML file: devices, what each reaches in each part of a step, networks, costs.

    name: two cores
    devices_per_node: 2
    cpu: true                      ranks compute on the host
    memory_gib: 12                 of a device, for one rank
    process_gib: 0.4               of it that a rank takes before there is a model
    state_overhead: 1.2            bytes held for each byte of weights, gradients and optimizer state
    activation_overhead: 1.5       the same for activations and buffers
    peak_tflops: {fp32: 0.17}      matrix products; for utilisation (MFU) alone
    speeds:                        parts of a step as the clock names them; `default` is for those without a line
      default: {tflops: {fp32: 0.15}, gb_s: 10}
      experts: {tflops: {fp32: 0.15}, gb_s: 8, weights_gb_s: 6, call_us: 60}
    within_node: {gb_s: 2, call_us: 150}
    between_nodes: {gb_s: 1, call_us: 300}
    watts: 8                       of a device at work, its share of the node included
    price_per_hour: 0.1            of a device

A part takes flops / tflops + activation bytes / gb_s + weight bytes / weights_gb_s + calls x call_us + step_us:
parts are added up, as if nothing overlapped. dsmoe hides exchanges behind shared experts and other chunks where it
can, so a prediction is an upper bound there. `dsmoe plan calibrate` writes such a file for this machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from dsmoe.config import Section, load_yaml

Precision = Literal["fp32", "bf16"]


class Speed(Section):
    """What a device reaches in one part of a step. A rate that is missing counts as infinite."""

    tflops: dict[Precision, float] = {}  # 1e12 multiplications and additions a second
    gb_s: float | None = Field(None, gt=0)  # of activations, 1e9 bytes a second
    weights_gb_s: float | None = Field(None, gt=0)  # of weights, gradients and optimizer state
    call_us: float = Field(0.0, ge=0)  # microseconds for each call, whatever its size
    step_us: float = Field(0.0, ge=0)  # microseconds once in a step


class Link(Section):
    """A network, as one rank sees it in one direction."""

    gb_s: float = Field(gt=0)
    call_us: float = Field(0.0, ge=0)  # of one collective with no bytes in it


class Hardware(Section):
    """A cluster of equal nodes."""

    name: str
    source: str = ""  # where the numbers come from
    devices_per_node: int = Field(ge=1)
    memory_gib: float = Field(gt=0)
    process_gib: float = Field(0.0, ge=0)
    state_overhead: float = Field(1.0, ge=1)
    activation_overhead: float = Field(1.0, ge=1)
    cpu: bool = False  # ranks compute on the host
    peak_tflops: dict[Precision, float]
    speeds: dict[str, Speed]
    within_node: Link
    between_nodes: Link | None = None  # None: there is one node
    watts: float | None = Field(None, gt=0)
    price_per_hour: float | None = Field(None, gt=0)
    currency: str = "USD"

    @field_validator("speeds")
    @classmethod
    def _has_default(cls, speeds: dict[str, Speed]) -> dict[str, Speed]:
        if "default" not in speeds:
            raise ValueError("one named 'default', for parts without a line of their own")
        return speeds

    def speed(self, part: str) -> Speed:
        return self.speeds.get(part) or self.speeds["default"]


def load_hardware(path: str | Path) -> Hardware:
    """Read and check. Raises `ConfigError` with every mistake."""
    return load_yaml(path, Hardware)
