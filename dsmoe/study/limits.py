"""The known limits of mixture-of-experts models at scale, and the measured quantities that show each.

A study says which limits it speaks to. The table of a limit has a row for each arm and point of those studies, and a
column for each of the limit's quantities that any of them measured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsmoe.study.measures import MEASURES, centre_and_band

if TYPE_CHECKING:
    from dsmoe.study.measures import StudyResults

LIMITS = {
    "routing": ("step_seconds", "tokens_per_second"),
    "memory": ("parameters", "peak_memory", "bytes_per_flop"),
    "communication": ("all_to_all",),
    "starved": ("dead_experts", "imbalance", "val_loss"),
    "redundant": ("val_loss",),
    "imbalance": ("imbalance", "dead_experts", "spikes", "val_loss"),
    "latency": ("tokens_per_second",),
    "energy": ("joules_per_token",),
}


def limit_tables(every: list[StudyResults]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Headings and rows for each limit that a study with results speaks to."""
    tables = {}
    for limit, names in LIMITS.items():
        speaking = [results for results in every if limit in results.study.limits and results.found]
        shown = [name for name in names if any(name in one.values for results in speaking for one in results.found)]
        if not shown:
            continue
        rows = []
        for results in speaking:
            for arm in results.arms():
                for point, group in results.by_point(arm).items():
                    at = ", ".join(f"{axis.rpartition('.')[2]} {value}" for axis, value in point)
                    rows.append(
                        [results.study.title, arm, at, str(len(group)), *(_mean(group, name) for name in shown)]
                    )
        titles = [MEASURES[name].heading for name in shown]
        tables[limit] = (["study", "arm", "at", "seeds", *titles], rows)
    return tables


def _mean(group, name: str) -> str:
    values = [one.values[name] for one in group if name in one.values]
    return f"{centre_and_band(values)[0]:{MEASURES[name].form}}" if values else "not measured"
