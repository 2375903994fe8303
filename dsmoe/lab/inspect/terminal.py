"""An inspection in a terminal: the text coloured by experts per token, and the main figures.

Where colours cannot be shown (NO_COLOR, TERM=dumb, a pipe or a file) every token is followed by its number instead:
`the{2} router{3}`.
"""

from __future__ import annotations

from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dsmoe.runtime.screen import make_console

# Viridis, told apart by the colour-blind and by lightness alone; the first is for no expert.
RAMP = ("#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39", "#fde725")
SHOWN = 400  # tokens of each text
LIGHT = 5  # from this place of RAMP on, letters are black


def show(report: dict[str, Any], console: Console | None = None) -> None:
    console = console or make_console(highlight=False, soft_wrap=True)
    coloured = console.color_system is not None and not console.no_color
    for model in report["models"]:
        _show_model(model, console, coloured)
    if (comparison := report["comparison"]) is not None:
        _show_comparison(report["models"], comparison, console)


def _show_model(model: dict[str, Any], console: Console, coloured: bool) -> None:
    step = "" if model["step"] is None else f", step {model['step']:,}"
    console.print(Text(f"{model['name']}: router {model['router']}{step}", style="bold"))
    scale, unit = values(model)
    if coloured:
        console.print(_legend(scale, unit))
    else:
        console.print(Text(f"token{{{unit}, mean over layers}}"))
    for number, text in enumerate(model["texts"]):
        if len(model["texts"]) > 1:
            console.print(Text(f"-- {text['name']}", style="bold"))
        console.print(coloured_text(model, scale, number, coloured))
        console.print()
    console.print(_layers(model))
    for line in sentences(model):
        console.print(Text(line))
    console.print()


def values(model: dict[str, Any]) -> tuple[list[float], str]:
    """Mean over layers of each token's experts; of a router with a fixed k the effective experts, which differ."""
    name, unit = ("experts", "experts") if model["k"] is None else ("effective", "effective experts")
    columns = model["per_token"][name]
    return [sum(layer) / len(columns) for layer in zip(*columns)], unit


def coloured_text(model: dict[str, Any], scale: list[float], number: int, coloured: bool) -> Text:
    """One text. A line break stays one, behind a sign that can have a colour."""
    low, high = bounds(scale)
    shown = Text()
    columns = model["per_token"]
    tokens = [(token, value) for text, token, value in zip(columns["text"], columns["token"], scale) if text == number]
    for token, value in tokens[:SHOWN]:
        if not coloured:
            mark = f"{{{value:.1f}}}"
            body = token.rstrip("\n")
            shown.append(f"{body}{mark}{token[len(body) :]}")
            continue
        body = token.replace("\t", "    ")
        if not body.strip("\n"):
            body = ("↵" if body else "·") + body
        for part in body.splitlines(keepends=True):
            line = part.rstrip("\n")
            if cell_len(line):
                shown.append(line, style=_style(value, low, high))
            shown.append(part[len(line) :])
    if len(tokens) > SHOWN:
        shown.append(f" … and {len(tokens) - SHOWN:,} tokens more, which figures and page have")
    return shown


def bounds(scale: list[float]) -> tuple[float, float]:
    """Of the colours; a text whose tokens are all alike has the lowest."""
    low, high = min(scale), max(scale)
    return (low, high) if high - low > 1e-6 else (low, low + 1)


def _style(value: float, low: float, high: float) -> str:
    place = min(len(RAMP) - 1, int((value - low) / (high - low) * len(RAMP)))
    return f"{'black' if place >= LIGHT else 'white'} on {RAMP[place]}"


def _legend(scale: list[float], unit: str) -> Text:
    low, high = bounds(scale)
    legend = Text(f"{unit}, mean over layers: ")
    for place in range(len(RAMP)):
        legend.append(f" {low + (high - low) * (place + 0.5) / len(RAMP):.1f} ", style=_style(
            low + (high - low) * (place + 0.5) / len(RAMP), low, high))  # fmt: skip
    return legend


def _layers(model: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("layer", "experts", "none", "max/mean", "CV", "exp(H)/E", "dead", "rho(loss)", "alike"):
        table.add_column(heading, justify="right", no_wrap=True)
    hard = model["hardness"]["next"]["by_layer"]
    for number, load, rho, alike in zip(model["layers"], model["load"], hard, model["redundancy"]):
        table.add_row(
            str(number), f"{load['experts_per_token']:.2f}", f"{load['no_expert']:.0%}",
            *(_number(load[name]) for name in ("max_over_mean", "cv", "entropy")),
            f"{len(load['dead'])}", _number(rho["rho"], "+.2f"), _number(alike["max"]),
        )  # fmt: skip
    return table


def sentences(model: dict[str, Any]) -> list[str]:
    """The main figures, a line each."""
    lines = [
        f"{model['tokens']:,} tokens, loss {model['loss']:.4f} nats; {model['experts_per_token']:.2f} of "
        f"{model['num_experts']} experts a token"
    ]
    lines.append(hardness_sentence(model))
    kinds = [f"{kind['kind']} {kind['experts']:.2f}" for kind in model["by_kind"]]
    lines.append(f"experts by kind of token: {', '.join(kinds)}")
    pairs = [f"layer {n}: {a}+{b}" for n, red in zip(model["layers"], model["redundancy"]) for a, b in red["merge"]]
    lines.append(f"pairs to merge: {', '.join(pairs) or 'none'}")
    for entry in model["saturation"][-1:]:
        shares = [layer["saturation"] for layer in entry["layers"] if layer["saturation"] is not None]
        if shares:
            lines.append(f"{sum(shares) / len(shares):.0%} of the routes were there at step {entry['step']:,} already")
    for sweep in model["sweeps"]:
        for entry in sweep["settings"]:
            setting = "as trained" if entry["trained"] else f"{sweep['name']}={entry['value']:g}"
            lines.append(f"{setting:>14}: {entry['experts_per_token']:.2f} experts a token, loss {entry['loss']:.4f}")
    return lines


def hardness_sentence(model: dict[str, Any]) -> str:
    """Whether harder tokens take more experts, in words that the intervals allow."""
    if model["k"] is not None:
        return f"every token has {model['k']} experts, so their number cannot follow the loss"
    correlation, within = (model["hardness"]["next"][name] for name in ("experts", "within_kind"))
    if correlation["rho"] is None:
        return "too few tokens, or all alike, to tell whether harder ones take more experts"
    if correlation["low"] <= 0 <= correlation["high"]:
        verdict = "no sign that harder tokens take more experts here"
    else:
        verdict = f"harder tokens take {'more' if correlation['rho'] > 0 else 'FEWER'} experts here"
    return f"{verdict}: {_interval(correlation)}; inside kinds of tokens {_interval(within)}"


def _interval(correlation: dict[str, Any]) -> str:
    if correlation["rho"] is None:
        return "unknown"
    return f"rho {correlation['rho']:+.2f} (95 % {correlation['low']:+.2f} to {correlation['high']:+.2f})"


def _show_comparison(models: list[dict[str, Any]], comparison: dict[str, Any], console: Console) -> None:
    first, second = (model["name"] for model in models)
    if not comparison["same_tokens"]:
        a, b = (model["nats_per_character"] for model in models)
        console.print(Text(f"the two have other tokens; nats per character: {first} {a:.4f}, {second} {b:.4f}"))
        return
    for name, what in (("loss_difference", "loss"), ("experts_difference", "experts per token")):
        entry = comparison[name]
        console.print(
            Text(
                f"{what}, {second} minus {first}: {entry['mean']:+.4f}, "
                f"95 % {entry['low']:+.4f} to {entry['high']:+.4f}"
            )
        )
    if (alike := comparison["experts_alike"])["rho"] is not None:
        console.print(Text(f"experts of a token in one and the other: rho {alike['rho']:+.2f}"))


def _number(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else format(value, form)
