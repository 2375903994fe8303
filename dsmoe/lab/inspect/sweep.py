"""Fewer or more experts at inference: what a setting does to experts per token and to loss.

`k`, `p` and `theta` are the router's own option where one decides how many experts a token gets (k of top-k routers, p
of top-p, the threshold of Routing-Free and ReLU); for every other router they drop routes that it chose
(`dsmoe.lab.inspect.models.Setting.cut`), and can only make fewer. Weights of what stays do not change then; a router
that renormalizes over its own k does so for another k too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dsmoe.errors import ConfigError, nearest
from dsmoe.lab.inspect.models import InspectedModel
from dsmoe.lab.inspect.reading import Reading, read
from dsmoe.lab.inspect.texts import Tokens
from dsmoe.routers.inference import SETTINGS

FACTORS = (0.5, 0.75, 1.25, 1.5)  # of the value that the model was trained with
DROPPED = (0.1, 0.25, 0.5, 0.75)  # shares of the routes that a theta without an option of its own drops
SHARES = (0.5, 0.75, 0.9, 0.98)  # of a token's weights, that a p without an option of its own keeps


@dataclass(frozen=True)
class Sweep:
    """What is tried: `values` of `name`, or values around the model's own where there are none."""

    name: str
    values: tuple[float, ...] = ()


def parse(text: str) -> Sweep:
    """`theta=0.1,0.2`, or a name alone. Raises `ConfigError`."""
    name, _, listed = text.partition("=")
    if name not in SETTINGS:
        raise ConfigError(
            [f"--sweep: found {name!r}{nearest(name, SETTINGS)}, expected {', '.join(SETTINGS)}, or NAME=VALUE,..."],
            "the command line",
        )
    try:
        values = tuple(float(value) for value in listed.split(",")) if listed else ()
        good = all(np.isfinite(value) and value >= 0 for value in values)
    except ValueError:
        good, values = False, ()
    if name == "k":
        good = good and all(value == int(value) and value >= 1 for value in values)
    if name == "p":
        good = good and all(0 < value <= 1 for value in values)
    if not good:
        wanted = {"k": "whole numbers from 1 on", "p": "numbers above 0 and up to 1", "theta": "numbers of 0 or more"}
        raise ConfigError(
            [f"--sweep: found {text!r}, expected {wanted[name]}, with commas between"], "the command line"
        )
    return Sweep(name, values)


def own_sweep(model: InspectedModel) -> Sweep:
    """Of the option that decides how many experts a token gets, or theta."""
    options = model.inference_options
    return Sweep(next((name for name, option in SETTINGS.items() if option in options), "theta"))


def check(sweep: Sweep, model: InspectedModel) -> None:
    """Raises `ConfigError` for more experts than there are."""
    if sweep.name == "k" and sweep.values and max(sweep.values) > model.num_experts:
        raise ConfigError(
            [f"--sweep: found k={max(sweep.values):g}, and {model.name} has {model.num_experts} experts a layer"],
            "the command line",
        )


def run_sweep(model: InspectedModel, reading: Reading, texts: list[Tokens], sweep: Sweep) -> dict:
    """`name`, `is_option`, and `settings`: as trained first, then value by value."""
    is_option = model.setting(sweep.name, 1).is_option
    values = sweep.values or _around(model, reading, sweep.name)
    settings = [{"value": model.inference_options.get(SETTINGS[sweep.name]), "trained": True, **_seen(reading)}]
    for value in values:
        with model.set_to(model.setting(sweep.name, value)):
            seen = read(model, texts, hidden=False)
        settings.append({"value": value, "trained": False, **_seen(seen)})
    return {"name": sweep.name, "is_option": is_option, "settings": settings}


def _seen(reading: Reading) -> dict:
    by_layer = reading.experts_LT.mean(1)
    return {
        "loss": reading.mean_loss,
        "experts_per_token": float(by_layer.mean()),
        "experts_per_token_by_layer": by_layer.tolist(),
    }


def _around(model: InspectedModel, reading: Reading, name: str) -> tuple[float, ...]:
    trained = model.inference_options.get(SETTINGS[name])
    if trained == 0:  # of a threshold that closes nothing yet
        trained = None
    if name == "k":
        most = model.num_experts if trained is not None else int(reading.experts_LT.max())
        powers = {1 << bit for bit in range(most.bit_length())} | {most}
        if trained is not None:
            powers = {k for k in powers | {int(trained) + 1, int(trained) - 1} if k <= 4 * trained}
        return tuple(float(k) for k in sorted(powers) if 1 <= k <= most and k != trained)
    if trained is not None:
        return tuple(round(trained * factor, 6) for factor in FACTORS if name != "p" or trained * factor <= 1)
    if name == "p":
        return SHARES
    weights = reading.probs_LTE[reading.map_LTE]
    quantiles = np.quantile(weights, DROPPED) if len(weights) else np.zeros(len(DROPPED))
    return tuple(dict.fromkeys(float(f"{value:.3g}") for value in quantiles))
