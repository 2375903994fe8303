"""Pictures of routing for TensorBoard and W&B, drawn pixel by pixel: they are made while a run waits.

Colours are viridis, which all eyes can order; an expert without a token is vermilion, which is not in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

VIRIDIS = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], dtype=np.float64)
VERMILION = (213, 94, 0)
HIGHEST_LOAD = 3.0  # times the mean of a layer; more has the same colour
WIDTH = 1024  # pixels of a heat map, about
COLUMNS, ROWS = 80, 24  # of coloured text at most, in characters
FONT_SIZE, MARGIN = 13, 6  # pixels


def colour(values: np.ndarray) -> np.ndarray:
    """uint8 [..., 3] of values from 0 to 1."""
    place = np.clip(values, 0, 1) * (len(VIRIDIS) - 1)
    return np.stack([np.interp(place, range(len(VIRIDIS)), VIRIDIS[:, part]) for part in range(3)], -1).astype(np.uint8)


def load_heat_map(counts_LE: np.ndarray) -> np.ndarray:
    """uint8 [height, width, 3]: a row for each MoE layer, first layer on top, a column for each expert; the colour is
    its load over the layer's mean, from 0 to `HIGHEST_LOAD`."""
    mean_L1 = counts_LE.mean(1, keepdims=True)
    pixels_LE3 = colour(counts_LE / np.maximum(mean_L1, 1e-12) / HIGHEST_LOAD)
    pixels_LE3[counts_LE == 0] = VERMILION
    size = max(1, min(24, WIDTH // counts_LE.shape[1]))
    return pixels_LE3.repeat(size, axis=0).repeat(size, axis=1)


def coloured_text(texts: Sequence[str], values: Sequence[float], caption: str) -> np.ndarray:
    """uint8 [height, width, 3]: each token's text on the colour of its value, between the smallest and the largest."""
    from PIL import Image, ImageDraw

    low, span = min(values), (max(values) - min(values)) or 1.0
    cells = [cell for cell in _lay_out(texts) if cell[1] < ROWS]
    rows = 1 + max(row for _, row, _, _ in cells)
    columns = max(len(caption[:COLUMNS]), *(column + len(text) for _, _, column, text in cells))
    wide, high = _cell()
    image = Image.new("RGB", (columns * wide + 2 * MARGIN, (rows + 2) * high + 2 * MARGIN), "white")
    draw = ImageDraw.Draw(image)
    shades = colour((np.asarray(values) - low) / span)
    for token, row, column, text in cells:
        x, y, shade = MARGIN + column * wide, MARGIN + row * high, shades[token]
        draw.rectangle((x, y, x + len(text) * wide - 1, y + high - 2), fill=tuple(shade.tolist()))
        dark = shade @ (0.299, 0.587, 0.114) < 128
        draw.text((x, y), text, font=_font(), fill="white" if dark else "black")
    draw.text((MARGIN, MARGIN + (rows + 1) * high), caption[:COLUMNS], font=_font(), fill="black")
    return np.asarray(image)


def _lay_out(texts: Sequence[str]) -> list[tuple[int, int, int, str]]:
    """(token, row, column, characters) of every piece. A line end is shown where it is."""
    cells, row, column = [], 0, 0
    for token, text in enumerate(texts):
        for part in text.replace("\t", "    ").replace("\r", "").replace("\n", "¶\n").splitlines(keepends=True):
            shown = part.rstrip("\n")
            while shown:
                if column == COLUMNS:
                    row, column = row + 1, 0
                piece, shown = shown[: COLUMNS - column], shown[COLUMNS - column :]
                cells.append((token, row, column, "".join(c if c.isprintable() else "·" for c in piece)))
                column += len(piece)
            if part.endswith("\n"):
                row, column = row + 1, 0
    return cells


@cache
def _font():
    from PIL import ImageFont

    [matplotlib] = find_spec("matplotlib").submodule_search_locations  # not imported, for the time that takes
    return ImageFont.truetype(str(Path(matplotlib, "mpl-data", "fonts", "ttf", "DejaVuSansMono.ttf")), FONT_SIZE)


@cache
def _cell() -> tuple[int, int]:
    """Width and height of a character."""
    return round(_font().getlength("M")), FONT_SIZE + 5
