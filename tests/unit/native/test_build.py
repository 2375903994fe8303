"""One library, compiled once for a machine, whoever asks; where it cannot be, experts do without.

What is compiled here has five lines; the real sources are compiled once, for the tests of what they compute.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from forked import call_each

from dsmoe import native as build
from dsmoe.errors import ConfigError
from dsmoe.moe.experts import GroupedExperts

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler here")

SOURCE = """#include <cstdint>
extern "C" int nothing(const void*, const void*, int64_t, int64_t*) {
    return 1;  // no memory
}
"""


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing loaded, an empty cache in folder `cache`, and a kernel called `nothing` in folder `sources`."""
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "nothing.cpp").write_text(SOURCE)
    shutil.copy(build.FOLDER / "share.cpp", tmp_path / "sources")
    monkeypatch.setattr(build, "FOLDER", tmp_path / "sources")
    monkeypatch.setenv("DSMOE_CACHE", str(tmp_path / "cache"))
    build._found.cache_clear()
    yield tmp_path
    build._found.cache_clear()


def test_without_memory_a_kernel_says_so(fresh):
    with pytest.raises(MemoryError, match="nothing found no memory"):
        build.run("nothing", ctypes.c_int64(0), count=4)


def test_compiled_once_and_kept(fresh):
    assert build.unavailable() is None
    (kept,) = (fresh / "cache").glob("*.so")
    made = kept.stat().st_mtime_ns
    build._found.cache_clear()
    assert build.unavailable() is None
    assert [path.stat().st_mtime_ns for path in (fresh / "cache").glob("*.so")] == [made]


def build_experts(implementation: str) -> GroupedExperts:
    shapes = SimpleNamespace(num_moe_experts=2, hidden_size=16, moe_ffn_hidden_size=8)
    alone = SimpleNamespace(ep=SimpleNamespace(size=lambda: 1, rank=lambda: 0))
    return GroupedExperts(2, shapes, pg_collection=alone, implementation=implementation)


def compile_in(sources: Path, cache: Path) -> bool:
    os.environ["DSMOE_CACHE"] = str(cache)
    build.FOLDER = sources
    build._found.cache_clear()
    return hasattr(build.library(), "nothing")


def test_processes_that_compile_at_once_all_get_it(fresh):
    """However long a busy machine takes: the deadline is that of a hang."""
    job = (compile_in, (fresh / "sources", fresh / "cache"))
    assert call_each([job] * 4, deadline=250) == [True] * 4
    assert len(list((fresh / "cache").glob("*.so"))) == 1


@pytest.mark.parametrize("compiler", ["missing", "broken"])
def test_without_a_compiler_experts_go_in_blocks(fresh, monkeypatch, compiler):
    program = fresh / "c++"
    if compiler == "broken":
        program.write_text("#!/bin/sh\necho 'no such flag' >&2\nexit 1\n")
        program.chmod(0o755)
    monkeypatch.setattr(build, "compiler", lambda: str(program) if compiler == "broken" else None)
    reason = build.unavailable()
    assert reason == ("no C++ compiler" if compiler == "missing" else f"{program} cannot compile it: no such flag")
    assert build_experts("auto").implementation == "blocked"
    with pytest.raises(ConfigError, match="experts_implementation: found native, but .*expected auto or blocked"):
        build_experts("native")


def test_a_cache_that_cannot_be_written_is_replaced(fresh, monkeypatch):
    monkeypatch.setenv("DSMOE_CACHE", str(fresh / "file" / "cache"))
    (fresh / "file").write_text("")
    assert build.unavailable() is None
