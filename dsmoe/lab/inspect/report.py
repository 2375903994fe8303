"""All figures of an inspection as one tree of plain values, which JSON, CSV, page and terminal are made of."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dsmoe import __version__
from dsmoe.errors import ConfigError
from dsmoe.lab.inspect.comparison import compare
from dsmoe.lab.inspect.hardness import hardness
from dsmoe.lab.inspect.load import by_kind, by_position, load
from dsmoe.lab.inspect.models import InspectedModel, InspectedRun, open_model
from dsmoe.lab.inspect.reading import Reading, read
from dsmoe.lab.inspect.redundancy import redundancy
from dsmoe.lab.inspect.specialization import specialization
from dsmoe.lab.inspect.sweep import Sweep, check, own_sweep, parse, run_sweep
from dsmoe.lab.inspect.texts import Text, Tokens, read_texts, tokenize
from dsmoe.lab.inspect.training import saturation
from dsmoe.lab.study.probe.routes import KINDS

FORMAT = 1
DIGITS = 6  # significant, of numbers that are written


@dataclass(frozen=True)
class InspectOptions:
    """What is inspected, and how.

    Attributes:
        texts: files, or texts.
        windows: how many windows of the model's context a text may fill.
        step: checkpoint of the run; None: the newest.
        compare: another model, or None.
        sweeps: what is swept, as `dsmoe.lab.inspect.sweep.parse` takes it; "" is the model's own; none: no sweep.
        checkpoints: at most so many earlier checkpoints of a run are read, for saturation.
        dtype: "fp32" or "bf16", to compute in; None: fp32 for a run, a folder's own for others.
        trust_remote_code: run Python files of a folder that are not dsmoe's own.
    """

    texts: tuple[str, ...]
    windows: int = 1
    step: int | None = None
    compare: Path | None = None
    sweeps: tuple[str, ...] = ()
    checkpoints: int = 6
    dtype: str | None = None
    trust_remote_code: bool = False
    parsed: tuple[Sweep | None, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        problems = [
            f"--{name}: found {value}, expected {least} or more"
            for name, value, least in (("windows", self.windows, 1), ("checkpoints", self.checkpoints, 0))
            if value < least
        ]
        if not self.texts:
            problems.append("--text: found none, expected a file or a text")
        if problems:
            raise ConfigError(problems, "the command line")
        object.__setattr__(self, "parsed", tuple(parse(text) if text else None for text in self.sweeps))


def inspect(path: Path, options: InspectOptions) -> dict[str, Any]:
    """The figures of a model, and of `options.compare` beside it.

    Returns:
        format_version, dsmoe; texts: name and characters; models: a list of one or two, each as `_figures` makes it;
        comparison: of the second with the first (`dsmoe.lab.inspect.comparison`), or None.

    Raises:
        DsmoeError: what is missing, damaged, dense, or does not fit.
    """
    texts = read_texts(list(options.texts))
    seen = [_inspect(path, options.step, texts, options)]
    if options.compare is not None:
        seen.append(_inspect(options.compare, None, texts, options))
    readings = [reading for _, reading in seen]
    return {
        "format_version": FORMAT,
        "dsmoe": __version__,
        "texts": [{"name": text.name, "characters": len(text.content)} for text in texts],
        "models": [figures for figures, _ in seen],
        "comparison": rounded(compare(*readings)) if len(readings) == 2 else None,
    }


def _inspect(path: Path, step: int | None, texts: list[Text], options: InspectOptions) -> tuple[dict, Reading]:
    model = open_model(path, step, options.dtype, options.trust_remote_code)
    tokens = [tokenize(text, model.tokenizer, model.context, model.vocab_size, options.windows) for text in texts]
    sweeps = [sweep or own_sweep(model) for sweep in options.parsed]
    for sweep in sweeps:
        check(sweep, model)
    reading = read(model, tokens)
    characters = sum(len(text.content) for text in texts)
    return rounded(_figures(model, reading, tokens, sweeps, characters, options.checkpoints)), reading


def _figures(
    model: InspectedModel,
    reading: Reading,
    tokens: list[Tokens],
    sweeps: list[Sweep],
    characters: int,
    checkpoints: int,
) -> dict[str, Any]:
    losses = reading.next_loss_T
    return {
        "name": model.name,
        "kind": model.kind,
        "architecture": model.architecture,
        "router": model.router,
        "step": model.step,
        "context": model.context,
        "num_experts": model.num_experts,
        "layers": model.layers,
        "k": model.k,
        "tokens": len(reading.ids_T),
        "loss": reading.mean_loss,
        "nats_per_character": float(np.nansum(losses)) / characters,
        "experts_per_token": float(reading.experts_LT.mean()),
        "effective_experts": float(reading.effective_LT.mean()),
        "effective_by_layer": reading.effective_LT.mean(1).tolist(),
        "texts": [
            {
                "name": name,
                "tokens": int((reading.text_T == number).sum()),
                "loss": float(np.nanmean(losses[reading.text_T == number])),
                "experts_per_token": float(reading.experts_LT[:, reading.text_T == number].mean()),
            }
            for number, name in enumerate(reading.texts)
        ],
        "load": load(reading.map_LTE),
        "by_kind": by_kind(reading),
        "by_position": by_position(reading),
        "hardness": hardness(reading),
        "specialization": specialization(reading),
        "redundancy": redundancy(model, reading),
        "saturation": saturation(model, reading, tokens, checkpoints) if isinstance(model, InspectedRun) else [],
        "sweeps": [run_sweep(model, reading, tokens, sweep) for sweep in sweeps],
        "per_token": per_token(reading),
    }


def per_token(reading: Reading) -> dict[str, list]:
    """Columns with an entry for each token; `experts` and `effective` have a column for each layer, `routes` lists of
    [expert, weight], the largest weight first."""
    return {
        "text": reading.text_T.tolist(),
        "position": reading.position_T.tolist(),
        "id": reading.ids_T.tolist(),
        "token": reading.token_T,
        "kind": [KINDS[kind] for kind in reading.kind_T],
        "loss": reading.loss_T.tolist(),
        "next_loss": reading.next_loss_T.tolist(),
        "experts": reading.experts_LT.tolist(),
        "effective": reading.effective_LT.tolist(),
        "routes": [
            [routes(map_E, probs_E) for map_E, probs_E in zip(map_TE, probs_TE)]
            for map_TE, probs_TE in zip(reading.map_LTE, reading.probs_LTE)
        ],
    }


def routes(map_E, probs_E) -> list[list]:
    active = np.flatnonzero(map_E)
    return [[int(expert), float(probs_E[expert])] for expert in active[np.argsort(-probs_E[active], kind="stable")]]


def rounded(value: Any) -> Any:
    """The same with six significant digits, and None for what is not finite, which JSON cannot hold."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(entry) for entry in value]
    return value
