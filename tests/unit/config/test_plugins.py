"""Classes that a configuration selects by name: dsmoe's own, registered ones and those of installed packages."""

from __future__ import annotations

import re

import pytest

from dsmoe.config import validate_config
from dsmoe.errors import ConfigError
from dsmoe.moe.dispatch import LocalDispatcher, build_dispatcher, register
from dsmoe.routers.registry import option_classes
from dsmoe.runtime.plugins import token_dispatchers


@pytest.fixture(autouse=True)
def own_names(monkeypatch):
    monkeypatch.setattr(token_dispatchers, "_classes", dict(token_dispatchers.available()))


class Elsewhere(LocalDispatcher):
    """A dispatcher of another package."""


def install(tmp_path, monkeypatch, value: str) -> None:
    """A package whose entry point is `elsewhere = value`."""
    info = tmp_path / "elsewhere-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[dsmoe.token_dispatchers]\nelsewhere = {value}\n")
    monkeypatch.syspath_prepend(str(tmp_path))


def test_a_dispatcher_of_an_installed_package_is_selected_by_its_name(tmp_path, monkeypatch, groups):
    install(tmp_path, monkeypatch, f"{__name__}:Elsewhere")
    config = validate_config({"model": {"token_dispatcher": "elsewhere"}}, option_classes())
    assert (
        type(build_dispatcher(config.model.token_dispatcher, groups, num_experts=4, experts_per_token=2)) is Elsewhere
    )
    assert Elsewhere.name == "elsewhere"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (f"{__name__}:Missing", r"token dispatcher 'elsewhere' \(.*:Missing\) cannot be loaded"),
        (f"{__name__}:install", "token dispatcher 'elsewhere' is <function .*expected a subclass of .*TokenDispatcher"),
    ],
)
def test_one_that_cannot_be_used_says_why(tmp_path, monkeypatch, value, message):
    install(tmp_path, monkeypatch, value)
    with pytest.raises(ConfigError, match=message):
        token_dispatchers.available()


def test_an_unknown_name_is_one_of_all_mistakes_and_names_what_there_is():
    tree = {"model": {"token_dispatcher": "all_to_al", "num_layers": 0}}
    with pytest.raises(ConfigError) as error:
        validate_config(tree, option_classes())
    assert len(error.value.problems) == 2
    pattern = r"token_dispatcher: found 'all_to_al', expected one of auto, .*local.* \(did you mean 'all_to_all'\?\)"
    assert re.search(pattern, str(error.value))


def test_a_model_that_is_built_without_validation_names_it_as_well(groups):
    with pytest.raises(ConfigError, match="model.token_dispatcher: found 'nothing', expected one of .*local"):
        build_dispatcher("nothing", groups, num_experts=4, experts_per_token=2)


def test_a_name_is_given_once():
    with pytest.raises(ConfigError, match="'local' is taken by dsmoe.moe.dispatch.LocalDispatcher"):
        register("local")(Elsewhere)
