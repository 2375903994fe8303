"""The figures of a report as CSV files, one a figure, in a folder."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsmoe.errors import ConfigError
from dsmoe.runtime.files import write_atomically

Rows = Iterator[dict[str, Any]]


def write_tables(report: dict[str, Any], folder: Path) -> list[Path]:
    """One file for each figure that has rows. Every row names its model; numbers of layers are those of the model."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError([f"--csv: {folder} cannot be made: {error.strerror}"], "the command line") from error
    written = []
    for name, rows_of in FIGURES.items():
        rows = [{"model": model["name"], **row} for model in report["models"] for row in rows_of(model)]
        if rows:
            columns = list(dict.fromkeys(key for row in rows for key in row))
            text = io.StringIO()
            writer = csv.DictWriter(text, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            written.append(folder / f"{name}.csv")
            write_atomically(written[-1], text.getvalue().encode())
    return written


def _tokens(model: dict) -> Rows:
    columns, names = model["per_token"], [text["name"] for text in model["texts"]]
    for place, text in enumerate(columns["text"]):
        row = {name: columns[name][place] for name in ("position", "id", "token", "kind", "loss", "next_loss")}
        by_layer = {
            f"{what}_{number}": columns[what][layer][place]
            for what in ("experts", "effective")
            for layer, number in enumerate(model["layers"])
        }
        yield {"text": names[text], **row, **by_layer}


def _routes(model: dict) -> Rows:
    for layer, number in enumerate(model["layers"]):
        for place, routes in enumerate(model["per_token"]["routes"][layer]):
            for expert, weight in routes:
                yield {"token": place, "layer": number, "expert": expert, "weight": weight}


def _layers(model: dict) -> Rows:
    hard = model["hardness"]["next"]["by_layer"]
    for number, load, rho, alike in zip(model["layers"], model["load"], hard, model["redundancy"], strict=True):
        figures = {name: value for name, value in load.items() if name not in ("counts", "dead")}
        summary = {"dead": len(load["dead"]), "output_cosine_mean": alike["mean"], "output_cosine_max": alike["max"]}
        yield {
            "layer": number,
            **figures,
            **summary,
            **{f"hardness_{name}": rho[name] for name in ("rho", "low", "high")},
        }


def _experts(model: dict) -> Rows:
    for number, load, special in zip(model["layers"], model["load"], model["specialization"], strict=True):
        for expert, figures in enumerate(special["experts"]):
            yield {
                "layer": number, "expert": expert, "tokens": load["counts"][expert],
                "vocabulary": figures["vocabulary"], "vocabulary_chance": figures["vocabulary_chance"],
                "domain": figures["domain"],
                **{
                    f"share_of_{text['name']}": shares[expert]
                    for text, shares in zip(model["texts"], special["domains"], strict=True)
                },
                "typical_tokens": " | ".join(typical["token"] for typical in figures["typical"]),
            }  # fmt: skip


def _by_kind(model: dict) -> Rows:
    for entry in model["by_kind"]:
        yield _with_layers(model, entry)


def _by_position(model: dict) -> Rows:
    for entry in model["by_position"]:
        yield _with_layers(model, entry)


def _deciles(model: dict) -> Rows:
    for which in ("next", "own"):
        for number, entry in enumerate(model["hardness"][which]["deciles"], 1):
            yield {"loss_of": which, "decile": number, **_with_layers(model, entry)}


def _correlations(model: dict) -> Rows:
    for which in ("next", "own"):
        correlations = model["hardness"][which]
        for what in ("experts", "within_kind", "effective"):
            yield {"loss_of": which, "with": what, "layer": "", **correlations[what]}
        for number, entry in zip(model["layers"], correlations["by_layer"], strict=True):
            yield {"loss_of": which, "with": "experts", "layer": number, **entry}


def _together(model: dict) -> Rows:
    for number, special in zip(model["layers"], model["specialization"], strict=True):
        for first, row in enumerate(special["together"]):
            for second, tokens in enumerate(row):
                yield {"layer": number, "expert": first, "other": second, "tokens_of_both": tokens}


def _pairs(model: dict) -> Rows:
    for number, layer in zip(model["layers"], model["redundancy"], strict=True):
        for pair in layer["pairs"]:
            first, second = pair["experts"]
            figures = {name: pair[name] for name in ("output_cosine", "output_cka", "weights", "tokens_of_both")}
            yield {
                "layer": number, "expert": first, "other": second, **figures, "weights_chance": layer["weights_chance"],
                "merge": int(pair["experts"] in layer["merge"]),
            }  # fmt: skip


def _saturation(model: dict) -> Rows:
    for entry in model["saturation"]:
        for number, layer in zip(model["layers"], entry["layers"], strict=True):
            yield {"step": entry["step"], "layer": number, **layer, "loss": entry["loss"]}


def _sweep(model: dict) -> Rows:
    for sweep in model["sweeps"]:
        for entry in sweep["settings"]:
            by_layer = dict(zip((f"experts_{n}" for n in model["layers"]), entry["experts_per_token_by_layer"]))
            yield {
                "setting": sweep["name"], "is_option": int(sweep["is_option"]), "value": entry["value"],
                "trained": int(entry["trained"]), "loss": entry["loss"],
                "experts_per_token": entry["experts_per_token"], **by_layer,
            }  # fmt: skip


def _with_layers(model: dict, entry: dict) -> dict[str, Any]:
    plain = {name: value for name, value in entry.items() if name != "experts_by_layer"}
    return plain | {f"experts_{n}": value for n, value in zip(model["layers"], entry["experts_by_layer"], strict=True)}


FIGURES = {
    "tokens": _tokens,
    "routes": _routes,
    "layers": _layers,
    "experts": _experts,
    "by_kind": _by_kind,
    "by_position": _by_position,
    "deciles": _deciles,
    "correlations": _correlations,
    "together": _together,
    "pairs": _pairs,
    "saturation": _saturation,
    "sweep": _sweep,
}
