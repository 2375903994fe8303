"""Predictions on a terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from dsmoe.lab.planner.hardware import Hardware
from dsmoe.lab.planner.predict import Prediction
from dsmoe.lab.planner.search import SearchResult, changes, choices

CLOSE = 0.02  # a plan that is this much faster is not worth changing anything for


def show_plan(console: Console, prediction: Prediction, result: SearchResult, tokens: float) -> None:
    """All about one layout, and what is better."""
    layout = prediction.layout
    config, hardware = layout.config, layout.hardware
    console.print(
        f"[bold]model[/]    {layout.size.total:,} parameters, {layout.experts:.3g} of {layout.model.num_experts} "
        f"experts a token, router {config.router.name}\n"
        f"[bold]cluster[/]  {layout.ranks} x {hardware.name}; expert parallel {layout.ep}, ZeRO "
        f"{config.parallel.zero_stage}, {config.training.precision}; {layout.step_tokens:,} tokens a step in "
        f"{layout.micro_steps} micro-step{'s' if layout.micro_steps > 1 else ''}; "
        f"busiest rank {layout.load:.2f} x the mean"
    )
    console.print(_memory_table(prediction))
    console.print(_time_table(prediction))
    sent = {name: flow for name, flow in prediction.flows.items() if flow.bytes}
    for name, flow in sent.items():
        what = {"exchange": "tokens to experts and home", "gradients": "gradients", "weights": "weights"}[name]
        where = [(flow.within, "within a node"), (flow.between, "between nodes")]
        amounts = ", ".join(f"{_bytes(count)} {place}" for count, place in where if count)
        console.print(f"[bold]sent[/]     {what}: {amounts}, by each rank in a step")
    console.print(f"[bold]speed[/]    {prediction.tokens_per_second:,.0f} tokens/s, {prediction.tflops:,.3g} TFLOP/s a "
                  f"device, MFU {prediction.utilisation:.1%}; most time goes to {prediction.binds()}")  # fmt: skip
    console.print(f"[bold]run[/]      {tokens:,.0f} tokens: {_run(prediction, tokens)}")
    has = _bytes(hardware.memory_gib * 2**30)
    verdict = (
        f"[bold green]fits[/]     {_bytes(-prediction.missing_memory)} of {has} are left"
        if prediction.fits
        else f"[bold red]does not fit[/]: {_bytes(prediction.missing_memory)} more than the {has} of a device"
    )
    console.print(verdict + _worst(prediction))
    console.print(_advice(prediction, result))


def show_search(console: Console, result: SearchResult, tokens: float, count: int = 8) -> None:
    """The fastest layouts that fit; or what the nearest lacks."""
    if result.best is None:
        nearest = result.too_large[0]
        console.print(
            f"[bold red]nothing fits[/] of {len(result.too_large)} layouts; the nearest lacks "
            f"{_bytes(nearest.missing_memory)}: {_settings(nearest)}"
        )
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("EP", "ZeRO", "recompute", "micro", "step", "tokens/s", "MFU", "memory", "binds"):
        table.add_column(column, justify="left" if column in ("recompute", "binds") else "right", no_wrap=True)
    for prediction in result.fitting[:count]:
        ep, stage, recompute, micro_steps, chunks = map(str, choices(prediction.layout).values())
        recomputed = recompute if chunks == "1" else f"{recompute} in {chunks}"
        table.add_row(
            ep, stage, recomputed, micro_steps, _seconds(prediction.step_seconds),
            f"{prediction.tokens_per_second:,.0f}",
            f"{prediction.utilisation:.1%}", _bytes(prediction.worst_memory), prediction.binds(),
        )  # fmt: skip
    console.print(table)
    best = result.best
    console.print(
        f"{len(result.fitting)} of {len(result.fitting) + len(result.too_large)} layouts fit. "
        f"Fastest: {_settings(best)}"
    )
    console.print(f"[bold]run[/]      {tokens:,.0f} tokens: {_run(best, tokens)}")
    quicker = [prediction for prediction in result.too_large if prediction.step_seconds < best.step_seconds]
    if quicker:  # the nearest first
        gain = best.step_seconds / quicker[0].step_seconds - 1
        console.print(
            f"[bold]memory binds[/]: {len(quicker)} layouts that do not fit are faster; the nearest of them lacks "
            f"{_bytes(quicker[0].missing_memory)} and is {gain:.0%} faster: {_settings(quicker[0])}"
        )


def show_sizes(console: Console, searched: dict[int, SearchResult], hardware: Hardware, tokens: float) -> None:
    """The fastest layout for each number of nodes, and which of them is the cheapest.

    Args:
        searched: by number of nodes.
    """
    columns = ["nodes", "EP", "ZeRO", "recompute", "micro", "tokens/s", "MFU", "memory", "run", "device hours"]
    best = {nodes: result.best for nodes, result in searched.items() if result.best is not None}
    columns += ["kWh, modelled"] if hardware.watts else []
    columns += [hardware.currency] if hardware.price_per_hour else []
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column == "recompute" else "right", no_wrap=True)
    for nodes, result in searched.items():
        if result.best is None:
            lacks = _bytes(result.too_large[0].missing_memory)
            table.add_row(str(nodes), "", "", f"[red]nothing fits, {lacks} too much[/]")
            continue
        prediction = result.best
        ep, stage, recompute, micro_steps, chunks = map(str, choices(prediction.layout).values())
        hours = prediction.run_seconds(tokens) * prediction.layout.ranks / 3600
        cells = [str(nodes), ep, stage, recompute if chunks == "1" else f"{recompute} in {chunks}", micro_steps]
        cells += [
            f"{prediction.tokens_per_second:,.0f}",
            f"{prediction.utilisation:.1%}",
            _bytes(prediction.worst_memory),
        ]
        cells += [_duration(prediction.run_seconds(tokens)), f"{hours:,.0f}"]
        cells += [f"{prediction.joules_per_token() * tokens / 3.6e6:,.0f}"] if hardware.watts else []
        cells += [f"{hours * hardware.price_per_hour:,.0f}"] if hardware.price_per_hour else []
        table.add_row(*cells)
    console.print(table)
    if best:
        fastest = min(best, key=lambda nodes: best[nodes].run_seconds(tokens))
        cheapest = min(best, key=lambda nodes: best[nodes].run_seconds(tokens) * nodes)
        console.print(f"[bold]fastest[/]  {fastest} nodes: {_settings(best[fastest])}")
        console.print(f"[bold]cheapest[/] {cheapest} nodes: {_settings(best[cheapest])}")


def _settings(prediction: Prediction) -> str:
    """As overrides of a configuration."""
    return " ".join(f"{key}={value}" for key, value in choices(prediction.layout).items())


def _memory_table(prediction: Prediction) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("memory of a rank")
    table.add_column("in the long run", justify="right")
    table.add_column("first steps", justify="right")
    later, first = prediction.memory.parts(), prediction.first_memory.parts()
    for name in later:
        table.add_row(name, _bytes(later[name]), _bytes(first[name]))
    worst = (f"[bold]{_bytes(result.total)}[/]" for result in (prediction.memory, prediction.first_memory))
    table.add_row("[bold]at the worst moment[/]", *worst)
    of_state, of_the_rest = prediction.memory.overheads
    if max(of_state, of_the_rest) > 1:
        table.caption = f"{of_state:.2f} x what is kept, {of_the_rest:.2f} x what comes and goes"
        table.caption_justify = "left"
    return table


def _time_table(prediction: Prediction) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("a step")
    table.add_column("time", justify="right")
    table.add_column("share", justify="right")
    for part, seconds in sorted(prediction.seconds.items(), key=lambda item: -item[1]):
        table.add_row(part, _seconds(seconds), f"{seconds / prediction.step_seconds:.1%}")
    table.add_row("[bold]all[/]", f"[bold]{_seconds(prediction.step_seconds)}[/]", "")
    return table


def _worst(prediction: Prediction) -> str:
    return " in the first steps" if prediction.first_memory.total > prediction.memory.total else ""


def _advice(prediction: Prediction, result: SearchResult) -> str:
    best = result.best
    if best is None:
        return (
            "no expert parallelism, ZeRO stage, recomputation or number of micro-steps makes it fit: take more devices"
        )
    wanted = changes(best.layout, prediction.layout)
    if not wanted or (prediction.fits and prediction.step_seconds < best.step_seconds * (1 + CLOSE)):
        return "no layout of these ranks is predicted to be faster"
    gain = prediction.step_seconds / best.step_seconds
    how = f"{gain:.2f} x as fast" if prediction.fits else f"fits, {_seconds(best.step_seconds)} a step"
    return f"[bold]better[/]   {' '.join(wanted)} ({how})"


def _run(prediction: Prediction, tokens: float) -> str:
    seconds, hardware = prediction.run_seconds(tokens), prediction.layout.hardware
    device_hours = seconds * prediction.layout.ranks / 3600
    text = f"{_duration(seconds)}, {device_hours:,.3g} device hours"
    if (joules := prediction.joules_per_token()) is not None:
        text += f", {joules * tokens / 3.6e6:,.3g} kWh ({joules:,.3g} J a token, modelled)"
    if hardware.price_per_hour is not None:
        text += f", {device_hours * hardware.price_per_hour:,.3g} {hardware.currency}"
    return text


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
