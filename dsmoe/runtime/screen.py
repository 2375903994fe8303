"""What a person reads commands on."""

from __future__ import annotations

import os
from typing import Any

from rich.console import Console


def make_console(**options: Any) -> Console:
    """A rich console that is no terminal where NO_COLOR is set or TERM is dumb: lines alone, without an escape
    sequence. By itself rich leaves out colours, and still writes bold letters and moves the cursor."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") in ("dumb", "unknown")
    return Console(force_terminal=False if plain else None, **options)
