"""Which arms of a study with a gate are worth long runs: those that hold their own in the small ones."""

from __future__ import annotations

from dsmoe.lab.study.grid import Cell, Study


def reason_to_skip(study: Study, arm: str, losses: dict[Cell, float | None]) -> str | None:
    """Why an arm stops at the gate, or None.

    Args:
        losses: held-out, of the gate's runs of this arm and of the baseline; None of a run that failed.
    """
    if arm == study.reference:
        return None
    of = {(cell.arm, cell.gate): loss for cell, loss in losses.items()}
    for number in range(len(study.gate.sizes)):
        own, baseline = of[arm, number], of[study.reference, number]
        if own is None:
            return f"gate {number + 1}: its run failed"
        if baseline is not None and own > baseline + study.gate.margin:
            allowed = f"{study.reference}'s {baseline:.4f} + {study.gate.margin:g}"
            return f"gate {number + 1}: held-out loss {own:.4f}, expected at most {allowed}"
    return None
