"""Predictions on a terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from dsmoe.lab.planner.hardware import Hardware
from dsmoe.lab.planner.predict import Prediction
from dsmoe.lab.planner.search import Found, changes, choices

CLOSE = 0.02  # a plan that is this much faster is not worth changing anything for


def show_plan(console: Console, one: Prediction, found: Found, tokens: float) -> None:
    """All about one layout, and what is better."""
    layout = one.layout
    config, hardware = layout.config, layout.hardware
    console.print(
        f"[bold]model[/]    {layout.size.total:,} parameters, {layout.experts:.3g} of {layout.model.num_experts} "
        f"experts a token, router {config.router.name}\n"
        f"[bold]cluster[/]  {layout.ranks} x {hardware.name}; expert parallel {layout.ep}, ZeRO "
        f"{config.parallel.zero_stage}, {config.training.precision}; {layout.step_tokens:,} tokens a step in "
        f"{layout.micro_steps} micro-step{'s' if layout.micro_steps > 1 else ''}; "
        f"busiest rank {layout.load:.2f} x the mean"
    )
    console.print(_memory_table(one))
    console.print(_time_table(one))
    sent = {name: flow for name, flow in one.flows.items() if flow.bytes}
    for name, flow in sent.items():
        what = {"exchange": "tokens to experts and home", "gradients": "gradients", "weights": "weights"}[name]
        where = [(flow.within, "within a node"), (flow.between, "between nodes")]
        amounts = ", ".join(f"{_bytes(count)} {place}" for count, place in where if count)
        console.print(f"[bold]sent[/]     {what}: {amounts}, by each rank in a step")
    console.print(f"[bold]speed[/]    {one.tokens_per_second:,.0f} tokens/s, {one.tflops:,.3g} TFLOP/s a device, MFU "
                  f"{one.utilisation:.1%}; most time goes to {one.binds()}")  # fmt: skip
    console.print(f"[bold]run[/]      {tokens:,.0f} tokens: {_run(one, tokens)}")
    has = _bytes(hardware.memory_gib * 2**30)
    verdict = (
        f"[bold green]fits[/]     {_bytes(-one.missing_memory)} of {has} are left"
        if one.fits
        else f"[bold red]does not fit[/]: {_bytes(one.missing_memory)} more than the {has} of a device"
    )
    console.print(verdict + _worst(one))
    console.print(_advice(one, found))


def show_search(console: Console, found: Found, tokens: float, count: int = 8) -> None:
    """The fastest layouts that fit; or what the nearest lacks."""
    if found.best is None:
        nearest = found.too_large[0]
        console.print(
            f"[bold red]nothing fits[/] of {len(found.too_large)} layouts; the nearest lacks "
            f"{_bytes(nearest.missing_memory)}: {_settings(nearest)}"
        )
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("EP", "ZeRO", "recompute", "micro", "step", "tokens/s", "MFU", "memory", "binds"):
        table.add_column(column, justify="left" if column in ("recompute", "binds") else "right", no_wrap=True)
    for one in found.fitting[:count]:
        ep, stage, recompute, micro_steps, chunks = map(str, choices(one.layout).values())
        again = recompute if chunks == "1" else f"{recompute} in {chunks}"
        table.add_row(
            ep, stage, again, micro_steps, _seconds(one.step_seconds), f"{one.tokens_per_second:,.0f}",
            f"{one.utilisation:.1%}", _bytes(one.worst_memory), one.binds(),
        )  # fmt: skip
    console.print(table)
    best = found.best
    console.print(
        f"{len(found.fitting)} of {len(found.fitting) + len(found.too_large)} layouts fit. Fastest: {_settings(best)}"
    )
    console.print(f"[bold]run[/]      {tokens:,.0f} tokens: {_run(best, tokens)}")
    quicker = [one for one in found.too_large if one.step_seconds < best.step_seconds]
    if quicker:  # the nearest first
        gain = best.step_seconds / quicker[0].step_seconds - 1
        console.print(
            f"[bold]memory binds[/]: {len(quicker)} layouts that do not fit are faster; the nearest of them lacks "
            f"{_bytes(quicker[0].missing_memory)} and is {gain:.0%} faster: {_settings(quicker[0])}"
        )


def show_sizes(console: Console, searched: dict[int, Found], hardware: Hardware, tokens: float) -> None:
    """The fastest layout for each number of nodes, and which of them is the cheapest.

    Args:
        searched: by number of nodes.
    """
    columns = ["nodes", "EP", "ZeRO", "recompute", "micro", "tokens/s", "MFU", "memory", "run", "device hours"]
    best = {nodes: found.best for nodes, found in searched.items() if found.best is not None}
    columns += ["kWh, modelled"] if hardware.watts else []
    columns += [hardware.currency] if hardware.price_per_hour else []
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column == "recompute" else "right", no_wrap=True)
    for nodes, found in searched.items():
        if found.best is None:
            lacks = _bytes(found.too_large[0].missing_memory)
            table.add_row(str(nodes), "", "", f"[red]nothing fits, {lacks} too much[/]")
            continue
        one = found.best
        ep, stage, recompute, micro_steps, chunks = map(str, choices(one.layout).values())
        hours = one.run_seconds(tokens) * one.layout.ranks / 3600
        cells = [str(nodes), ep, stage, recompute if chunks == "1" else f"{recompute} in {chunks}", micro_steps]
        cells += [f"{one.tokens_per_second:,.0f}", f"{one.utilisation:.1%}", _bytes(one.worst_memory)]
        cells += [_duration(one.run_seconds(tokens)), f"{hours:,.0f}"]
        cells += [f"{one.joules_per_token() * tokens / 3.6e6:,.0f}"] if hardware.watts else []
        cells += [f"{hours * hardware.price_per_hour:,.0f}"] if hardware.price_per_hour else []
        table.add_row(*cells)
    console.print(table)
    if best:
        fastest = min(best, key=lambda nodes: best[nodes].run_seconds(tokens))
        cheapest = min(best, key=lambda nodes: best[nodes].run_seconds(tokens) * nodes)
        console.print(f"[bold]fastest[/]  {fastest} nodes: {_settings(best[fastest])}")
        console.print(f"[bold]cheapest[/] {cheapest} nodes: {_settings(best[cheapest])}")


def _settings(one: Prediction) -> str:
    """As overrides of a configuration."""
    return " ".join(f"{key}={value}" for key, value in choices(one.layout).items())


def _memory_table(one: Prediction) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("memory of a rank")
    table.add_column("in the long run", justify="right")
    table.add_column("first steps", justify="right")
    later, first = one.memory.parts(), one.first_memory.parts()
    for name in later:
        table.add_row(name, _bytes(later[name]), _bytes(first[name]))
    worst = (f"[bold]{_bytes(found.total)}[/]" for found in (one.memory, one.first_memory))
    table.add_row("[bold]at the worst moment[/]", *worst)
    of_state, of_the_rest = one.memory.overheads
    if max(of_state, of_the_rest) > 1:
        table.caption = f"{of_state:.2f} x what is kept, {of_the_rest:.2f} x what comes and goes"
        table.caption_justify = "left"
    return table


def _time_table(one: Prediction) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("a step")
    table.add_column("time", justify="right")
    table.add_column("share", justify="right")
    for part, seconds in sorted(one.seconds.items(), key=lambda item: -item[1]):
        table.add_row(part, _seconds(seconds), f"{seconds / one.step_seconds:.1%}")
    table.add_row("[bold]all[/]", f"[bold]{_seconds(one.step_seconds)}[/]", "")
    return table


def _worst(one: Prediction) -> str:
    return " in the first steps" if one.first_memory.total > one.memory.total else ""


def _advice(one: Prediction, found: Found) -> str:
    best = found.best
    if best is None:
        return (
            "no expert parallelism, ZeRO stage, recomputation or number of micro-steps makes it fit: take more devices"
        )
    wanted = changes(best.layout, one.layout)
    if not wanted or (one.fits and one.step_seconds < best.step_seconds * (1 + CLOSE)):
        return "no layout of these ranks is predicted to be faster"
    gain = one.step_seconds / best.step_seconds
    how = f"{gain:.2f} x as fast" if one.fits else f"fits, {_seconds(best.step_seconds)} a step"
    return f"[bold]better[/]   {' '.join(wanted)} ({how})"


def _run(one: Prediction, tokens: float) -> str:
    seconds, hardware = one.run_seconds(tokens), one.layout.hardware
    device_hours = seconds * one.layout.ranks / 3600
    said = f"{_duration(seconds)}, {device_hours:,.3g} device hours"
    if (joules := one.joules_per_token()) is not None:
        said += f", {joules * tokens / 3.6e6:,.3g} kWh ({joules:,.3g} J a token, modelled)"
    if hardware.price_per_hour is not None:
        said += f", {device_hours * hardware.price_per_hour:,.3g} {hardware.currency}"
    return said


def _bytes(count: float) -> str:
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 2**10:,.1f} KiB"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{seconds * 1e3:,.1f} ms"


def _duration(seconds: float) -> str:
    for unit, size in (("years", 365 * 86400), ("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.0f} seconds"
