"""Whatever a configuration file or an override holds: a configuration, or every mistake in it, and no stack trace."""

from __future__ import annotations

import os

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsmoe.config import RunConfig, load_config
from dsmoe.config.schema import SECTIONS
from dsmoe.errors import ConfigError
from dsmoe.optim import registry as optimizers
from dsmoe.routers import registry as routers

EXAMPLES = int(os.environ.get("DSMOE_FUZZ", "60"))
FUZZ = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
KEYS = [f"{section}.{key}" for section, fields in SECTIONS.items() for key in fields.model_fields]

scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(scalars.filter(lambda k: k == k), inner, max_size=3),
    max_leaves=6,
)


def load(path, overrides=()) -> None:
    try:
        config = load_config(path, overrides, routers.option_classes(), optimizers.option_classes())
    except ConfigError as error:
        assert error.problems and all(error.problems)
        return
    assert isinstance(config, RunConfig)
    assert RunConfig.model_validate(yaml.safe_load(config.to_yaml())) == config or config.router.options


@given(tree=st.dictionaries(st.sampled_from([*SECTIONS, "deepspeed"]) | st.text(max_size=5),
                            values | st.dictionaries(st.sampled_from([k.split(".")[1] for k in KEYS]), values,
                                                     max_size=4), max_size=4))  # fmt: skip
@FUZZ
def test_any_tree(tmp_path, tree):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8", errors="surrogateescape")
    load(path)


@given(content=st.binary(max_size=80) | st.text(max_size=80).map(lambda text: text.encode("utf-8", "replace")))
@FUZZ
def test_any_bytes(tmp_path, content):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    load(path)


@given(key=st.sampled_from(KEYS) | st.text(max_size=12), text=st.text(max_size=12))
@FUZZ
def test_any_override(key, text):
    load(None, [f"{key}={text}"])


@pytest.mark.parametrize(
    "text", ["[" * 5000, "{a: " * 3000, "- " * 3000 + "x", "a: &a [*a]", "a: *b", "!!python/none x"]
)
def test_texts_that_are_hard_on_a_parser(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    load(path)
