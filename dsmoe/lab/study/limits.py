"""The known limits of mixture-of-experts models at scale, and the measured quantities that show each.

A study says which limits it speaks to. The table of a limit has a row for each arm and point of those studies, and a
column for each of the limit's quantities that any of them measured.
"""

from __future__ import annotations

from dsmoe.lab.study.measures import MEASURES, StudyResults, at, centre_and_band

SHOWN_BY = {
    "routing": ("step_seconds", "passes_seconds", "optimizer_seconds", "routing_share", "exchange_share"),
    "memory": ("parameters", "peak_memory", "bytes_per_flop", "step_seconds"),
    "communication": ("all_to_all", "exchange_share", "by_route", "step_seconds"),
    "starved": ("dead_experts", "idle_experts", "weak_experts", "expert_gradient", "val_loss"),
    "redundant": ("output_cosine", "output_cka", "weights_alike", "val_loss"),
    "imbalance": ("imbalance", "load_contiguous", "load_aware", "load_replicated", "flips", "spikes", "val_loss"),
    "latency": ("first_token", "token"),
    "energy": ("joules_per_token", "measured_joules"),
}
Rows = tuple[list[str], list[list[str]]]


def limit_tables(every: list[StudyResults]) -> dict[str, Rows]:
    """Headings and rows for each limit that a study with results speaks to."""
    tables = {}
    for limit, names in SHOWN_BY.items():
        speaking = [results for results in every if limit in results.study.limits and results.full]
        shown = [name for name in names if any(name in run.values for results in speaking for run in results.full)]
        if not shown:
            continue
        if limit == "latency":
            if (latency := _latency(speaking))[1]:  # only where the runs are there
                tables[limit] = latency
            continue
        rows = []
        for results in speaking:
            for arm in results.arms():
                for point, group in results.by_point(arm).items():
                    measured = (_mean(group, name) for name in shown)
                    rows.append([results.study.title, arm, at(point), str(len(group)), *measured])
        titles = [MEASURES[name].heading for name in shown]
        tables[limit] = (["study", "arm", "at", "seeds", *titles], rows)
    return tables


def _latency(speaking: list[StudyResults]) -> Rows:
    """A row for each setting that the probe tried a trained router with; where a study is too short to say anything of
    losses, none is shown."""
    rows = []
    for results in speaking:
        for run in results.full:
            if "token" not in run.values or run.inside is None:
                continue
            for tried in run.inside.probe["latency"]:
                loss = f"{tried['loss']:.3f}" if results.study.quality else "not compared"
                times = (f"{1e3 * tried[name]:.2f}" for name in ("first_token_seconds", "token_seconds"))
                rows.append([results.study.title, run.cell.arm, at(run.cell.point), tried["setting"],
                             f"{tried['experts_per_token']:.2f}", *times, loss])  # fmt: skip
    times = (MEASURES[name].heading for name in ("first_token", "token"))
    return ["study", "arm", "at", "router", "experts per token", *times, "held-out loss (nats/token)"], rows


def _mean(group, name: str) -> str:
    values = [run.values[name] for run in group if name in run.values]
    return f"{centre_and_band(values)[0]:{MEASURES[name].form}}" if values else "not measured"
