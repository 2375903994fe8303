"""Find where numbers that are not finite come from: the step is done again, and everything in it looked at.

All ranks repeat forward and backward pass of the step together, with an optimizer that is not allowed to move. Each
notes the first tensor of its own that is not finite in every micro-step: a weight, a module's output, the gradient of a
parameter as autograd hands it over, before ranks are summed. So the rank it comes from is known, not only that the sum
is bad.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

MANY = 20  # parameters that a report names


@dataclass
class RankReport:
    """What one rank found.

    Attributes:
        first: the first tensor that was not finite, in the order of the step; None if there was none.
        parameters: whose gradients were not finite, in the order of the backward pass; with the ids of experts.
        layers: of the model, that `first` and `parameters` are in.
        samples: of the data, in the micro-steps in which anything was not finite.
    """

    rank: int
    host: str
    first: str | None = None
    parameters: list[str] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        number = _layer(self.first or "")
        layer = "" if number is None else f" (layer {number})"
        sequences = f", in samples {_ranges(self.samples)} of the data" if self.samples else ""
        return f"rank {self.rank} on {self.host}: {self.first}{layer}{sequences}"


class StepDiagnosis:
    """Collects what one rank sees while a step is repeated; use as `with diagnosis.micro_step(samples):`."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.report = RankReport(dist.get_rank(), socket.gethostname())
        self._seen: list[tuple[str, Tensor]] = []  # flags stay on the device until the micro-step is over
        self._weights()

    def _weights(self) -> None:
        for name, parameter in self.model.named_parameters():
            if parameter.numel() and not torch.isfinite(parameter.detach()).all():
                self._note(f"weight {name}", [])

    @contextmanager
    def micro_step(self, samples: list[int]) -> Iterator[None]:
        """Look at everything inside; `samples` are this rank's, one for each row of the batch."""
        handles = [
            module.register_forward_hook(self._outputs(name, len(samples)))
            for name, module in self.model.named_modules()
            if name
        ]
        handles += [p.register_hook(self._gradient(name, p)) for name, p in self.model.named_parameters()]
        self._seen = []
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        first = True
        for text, rows in self._seen:
            if not bool(rows.any()):
                continue
            # Later tensors mix samples; and some have no row for each.
            bad = rows.nonzero().flatten().tolist() if len(rows) == len(samples) else range(len(samples))
            self._note(text, [samples[row] for row in bad] if first else [])
            first = False

    def _outputs(self, name: str, batch: int):
        def hook(module, inputs, output):
            for value in output if isinstance(output, tuple | list) else (output,):  # Megatron's return several
                if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
                    # Hidden states are [S, B, H].
                    flat = value.detach()
                    by_sample = flat.dim() == 3 and flat.size(1) == batch
                    rows = flat.transpose(0, 1).flatten(1) if by_sample else flat.reshape(1, -1)
                    self._seen.append((f"output of {name}", ~torch.isfinite(rows).all(1)))

        return hook

    def _gradient(self, name: str, parameter: nn.Parameter):
        first_expert = getattr(parameter, "first_expert", None)

        def hook(gradient: Tensor) -> None:
            value = gradient.detach()
            bad = ~torch.isfinite(value)
            if bool(bad.any()):
                of = name
                if first_expert is not None:
                    experts = bad.flatten(1).any(1).nonzero().flatten().tolist()
                    of += f" of expert{'s' if len(experts) > 1 else ''} " + _ranges([first_expert + e for e in experts])
                if of not in self.report.parameters and len(self.report.parameters) < MANY:
                    self.report.parameters.append(of)
                self._seen.append((f"gradient of {of}", torch.ones(1, dtype=torch.bool)))

        return hook

    def _note(self, text: str, samples: list[int]) -> None:
        report = self.report
        report.first = report.first or text
        report.samples = sorted({*report.samples, *samples})
        layer = _layer(text)
        if layer is not None and layer not in report.layers:
            report.layers.append(layer)

    def gather(self) -> list[RankReport]:
        """Every rank's report, on every rank; collective."""
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, asdict(self.report))
        return [RankReport(**report) for report in everyone]


def _layer(text: str) -> int | None:
    match = re.search(r"\.layers\.(\d+)\.", text)
    return int(match[1]) if match else None


def summary(reports: list[RankReport]) -> str:
    """In one line: the first rank and tensor that is not finite, and which other ranks have one."""
    bad = [report for report in reports if report.first]
    if not bad:
        return "done again, everything in the step is finite: a fault of the hardware, or of a message between ranks"
    # A gradient or output that is bad everywhere came from a rank on which something came earlier: a weight, an output.
    order = ("weight", "output", "gradient")
    source = min(bad, key=lambda report: (order.index((report.first or "").split()[0]), report.rank))
    others = [str(report.rank) for report in bad if report is not source]
    return f"{source}" + (f"; also on rank{'s' if len(others) > 1 else ''} {', '.join(others)}" if others else "")


def _ranges(numbers: list[int]) -> str:
    """1-3, 7"""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
