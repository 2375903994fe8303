"""The configurations that come with dsmoe: `configs/` of a checkout, which a wheel carries inside the package."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def configs_folder() -> Path:
    """The folder with quickstart.yaml, recipes/, studies/, hardware/ and plans/."""
    inside = PACKAGE / "configs"
    return inside if inside.is_dir() else PACKAGE.parent / "configs"


def find_config(path: str | Path) -> Path:
    """A file as it is named; where there is none, the one that comes with dsmoe under that name (`configs/` may stand
    before it or not)."""
    path = Path(path)
    names = path.parts[1:] if path.parts[:1] == ("configs",) else path.parts
    shipped = configs_folder().joinpath(*names)
    return shipped if not path.exists() and shipped.is_file() else path
