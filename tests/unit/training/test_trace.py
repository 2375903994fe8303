"""A recorded step comes back as it was; a file that is none is named."""

from __future__ import annotations

import numpy as np
import pytest

from dsmoe.errors import DataError
from dsmoe.training.trace import path_of, read_trace, trace_of, write_trace


@pytest.fixture
def maps():
    random = np.random.default_rng(0)
    return [random.random((12, 5)) < share for share in (0.4, 0.0, 1.0)]  # some, none and all


def test_a_trace_comes_back(tmp_path, maps):
    tokens = np.arange(12) * 7
    write_trace(path_of(tmp_path, 20), trace_of(maps, tokens, 4, step=20))
    write_trace(path_of(tmp_path, 100), trace_of(maps, tokens, 4, step=100))
    actual = read_trace(tmp_path)  # the newest of a run
    assert (actual.step, actual.sequence_length, actual.num_experts) == (100, 4, 5)
    assert read_trace(path_of(tmp_path, 20)).step == 20
    assert np.array_equal(actual.tokens_T, tokens)
    for layer, map_TE in enumerate(maps):
        assert np.array_equal(actual.map_TE(layer), map_TE)
        assert np.array_equal(actual.counts_LE()[layer], map_TE.sum(0))


def test_what_is_no_trace_is_named(tmp_path, maps):
    with pytest.raises(DataError, match="no routing trace; a run with logging.trace"):
        read_trace(tmp_path)
    with pytest.raises(DataError, match="no such routing trace"):
        read_trace(tmp_path / "step_000001.npz")
    path = path_of(tmp_path, 1)
    write_trace(path, trace_of(maps, np.arange(12), 4, step=1))
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"text"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="damaged"):
            read_trace(path)


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("layer_0_offsets", np.zeros(4, np.int64), "offsets of layer 0"),
        ("layer_0_experts", np.zeros(1, np.int16), "layer 0 has 1 routes"),
        ("layer_2_experts", np.full(60, 9, np.int16), "outside 0 ... 4"),
    ],
)
def test_arrays_that_do_not_belong_together_are_named(tmp_path, maps, name, values, expected):
    path = path_of(tmp_path, 1)
    write_trace(path, trace_of(maps, np.arange(12), 4, step=1))
    with np.load(path) as arrays:
        content = dict(arrays)
    np.savez(path, **{**content, name: values})
    with pytest.raises(DataError, match=expected):
        read_trace(path)
