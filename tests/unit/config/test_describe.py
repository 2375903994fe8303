"""Every key of the configuration can be looked up, with its type, its default and what the schema says of it."""

from __future__ import annotations

import re
from typing import Literal

import pytest
from pydantic import BaseModel, Field

from dsmoe.config.describe import keys_text, type_name
from dsmoe.config.schema import SECTIONS, BlendPart, Section, UserPath
from dsmoe.config.shipped import configs_folder, find_config
from dsmoe.errors import ConfigError
from dsmoe.routers.registry import option_classes


class Options(BaseModel):
    plain: int = 3
    bounded: float = Field(1.5, gt=0, le=2)  # of something, in ms
    missing: int | None = Field(None, ge=1)
    choice: Literal["a", "b"] = "b"
    flags: list[Literal[0, 1]] = [1]
    truth: bool = True  # fmt: skip
    place: UserPath = "here"
    places: UserPath | list[BlendPart] | None = None
    needed: str


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("plain", "integer"),
        ("bounded", "number > 0 and <= 2"),
        ("missing", "integer >= 1 or null"),
        ("choice", "a | b"),
        ("flags", "list of 0 | 1"),
        ("truth", "true or false"),
        ("place", "path"),
        ("places", "path or list of {path, weight} or null"),
        ("needed", "text"),
    ],
)
def test_types_in_words(key, expected):
    assert type_name(Options.model_fields[key]) == expected


def test_a_section_of_its_own():
    text = keys_text("router", {"mine": Options}, width=80)
    assert "with router.name=mine:" in text
    assert "  router.bounded  (number > 0 and <= 2; default 1.5)\n      of something, in ms\n" in text
    assert "  router.plain  (integer; default 3)" in text and "  router.needed  (text; required)" in text
    assert "default true" in text and "default null" in text and "default [1]" in text


def test_all_keys_are_there():
    text = keys_text("all", option_classes())
    for name, section in SECTIONS.items():
        assert all(f"  {name}.{key}  (" in text or f"  {name}.{key}." in text for key in section.model_fields)
    assert "  training.timeout.start  (" in text
    for router, options in option_classes().items():
        assert f"with router.name={router}:" in text
        assert all(f"  router.{key}  (" in text for key in options.model_fields)
    assert "optimizer steps of the whole run, resumed parts included" in text


def test_every_key_is_described_in_the_words_of_a_configuration():
    own = {name: cls for name, cls in option_classes().items() if cls.__module__.startswith("dsmoe.")}
    lines = [*keys_text("all", own).splitlines(), ""]
    keys = [place for place, line in enumerate(lines) if line.startswith("  ") and line[2] != " "]
    assert len(keys) > 100
    assert [lines[place] for place in keys if not lines[place + 1].startswith(" " * 6)] == []
    classes = {cls.__name__ for cls in Section.__subclasses__()}
    types = " ".join(lines[place].partition("(")[2] for place in keys)
    assert classes & set(re.findall(r"\w+", types)) == set() and "BlendPart" in classes
    assert "Annotated" not in types and "  data.path  (path or list of {path, weight}; default data/corpus)" in lines


def test_a_mistyped_section_gets_the_nearest_name():
    with pytest.raises(ConfigError, match="found 'trainig', expected one of model.*did you mean 'training'"):
        keys_text("trainig", {})


def test_configurations_that_come_with_dsmoe_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("quickstart.yaml", "configs/quickstart.yaml", "configs/recipes/relu.yaml"):
        assert find_config(name).is_file() and find_config(name).is_relative_to(configs_folder())
    (tmp_path / "quickstart.yaml").write_text("")
    assert str(find_config("quickstart.yaml")) == "quickstart.yaml"  # the user's own comes first
    assert str(find_config("nothing.yaml")) == "nothing.yaml"
