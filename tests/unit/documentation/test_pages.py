"""Pages of the documentation: every link leads somewhere, and every option and key that is named exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dsmoe.cli import COMMANDS
from dsmoe.config.schema import SECTIONS
from dsmoe.optim.registry import available as optimizers
from dsmoe.routers.registry import option_classes

ROOT = Path(__file__).resolve().parents[3]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
RESULTS = sorted((ROOT / "docs" / "results").rglob("*.md"))


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *RESULTS], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"\w+://|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        place = (page.parent / name) if name else page
        if not place.exists() or (anchor and place.suffix == ".md" and anchor not in anchors(place)):
            dead.append(target)
    assert not dead


def keys(name: str, section) -> set[str]:
    actual = set()
    for key, field in section.model_fields.items():
        actual.add(f"{name}.{key}")
        if hasattr(field.annotation, "model_fields"):
            actual |= keys(f"{name}.{key}", field.annotation)
    return actual


def known_keys() -> set[str]:
    actual = {key for name, section in SECTIONS.items() for key in keys(name, section)}
    return actual | {f"router.{key}" for options in option_classes().values() for key in options.model_fields}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_configuration_keys_exist(page):
    """`section.key` in code, and section.key=value on a command line."""
    text = page.read_text(encoding="utf-8")
    sections = "|".join(SECTIONS)
    named = set(re.findall(rf"`((?:{sections})\.[a-z_0-9]+(?:\.[a-z_]+)?)(?:=[^`]*)?`", text))
    named |= set(re.findall(rf"\s((?:{sections})\.[a-z_0-9]+(?:\.[a-z_]+)?)=", text))
    files = {".py", ".yaml", ".md", ".json", ".csv", ".bin", ".idx", ".safetensors"}
    named -= {"training.step"}  # README shows what a misspelt key gives
    wrong = {name for name in named - known_keys() if not any(name.endswith(end) for end in files)}
    # Modules of the package have such names too: model.loss, data.corpus.
    wrong = {name for name in wrong if not (ROOT / "dsmoe" / Path(*name.split("."))).with_suffix(".py").exists()}
    assert not wrong


def test_commands_named_on_pages_exist():
    known = {name for group in COMMANDS.values() for name in group} | {"COMMAND"}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        blocks = re.findall(r"^```(?:ba)?sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        named = [
            *re.findall(r"`dsmoe ([a-z][a-z-]*)", text),
            *re.findall(r"^dsmoe ([a-z-]+)", "".join(blocks), re.MULTILINE),
        ]
        assert set(named) <= known, page


def test_optimizers_are_documented():
    text = (ROOT / "dsmoe" / "config" / "schema.py").read_text() + "".join(page.read_text() for page in PAGES)
    assert all(name in text for name in optimizers())


def test_commands_are_those_of_dsmoe():
    """Pages, configurations and messages name `dsmoe COMMAND`, not the files that do the same in a checkout."""
    tools = "tools/(?:plan|prepare_data|convert_checkpoint|scaling_study|benchmark_moe)"
    files = rf"python (?:{tools}|launch/(?:train|generate|evaluate))\.py"
    places = [*PAGES, *(ROOT / "configs").glob("**/*.yaml"), *(ROOT / "dsmoe").glob("**/*.py")]
    actual = {str(place.relative_to(ROOT)) for place in places if re.search(files, place.read_text(encoding="utf-8"))}
    assert actual <= {"README.md"}, actual  # which shows both


ABSENT = {"dsmoe/routers/sigmoid.py", "tools/compare_routers.py"}  # a reader writes the one; the other is gone
GROUPS = {"dsmoe.routers", "dsmoe.optimizers", "dsmoe.token_dispatchers"}  # of entry points


def is_defined(name: str) -> bool:
    """Whether a dotted name is a module of dsmoe, or stands in the deepest module that it begins with."""
    path, *rest = (ROOT / "dsmoe", *name.split(".")[1:])
    while rest and ((path / rest[0]).is_dir() or (path / f"{rest[0]}.py").is_file()):
        path = path / rest.pop(0)
    source = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
    return not rest or bool(re.search(rf"\b{rest[0]}\b", source.read_text(encoding="utf-8")))


def test_modules_and_files_that_texts_name_exist():
    """Pages, docstrings and comments."""
    missing = []
    for text in (*PAGES, *(ROOT / "dsmoe").rglob("*.py")):
        content = text.read_text(encoding="utf-8")
        files = set(re.findall(r"\b(?:dsmoe|tests|docs|tools|launch|configs)/[\w/]+\.(?:py|md|cpp|yaml)\b", content))
        missing += [f"{text.name}: {name}" for name in files - ABSENT if not (ROOT / name).exists()]
        names = set(re.findall(r"`(dsmoe(?:\.[A-Za-z_]\w*)+)`", content))
        missing += [f"{text.name}: {name}" for name in names - GROUPS if not is_defined(name)]
    assert not missing
