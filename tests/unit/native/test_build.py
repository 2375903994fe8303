"""The kernels' library: compiled once, whatever starts at once, kept, and done without where it cannot be."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forked import call_each

from dsmoe import native
from dsmoe.errors import ConfigError
from dsmoe.moe import cpu
from dsmoe.moe.experts import GroupedExperts
from dsmoe.native import build

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler here")

ONE_KERNEL = """#include <cstdint>
extern "C" void nothing(const void*, const void*, int64_t, int64_t*) { %s }
"""


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache, and nothing loaded."""
    monkeypatch.setenv("DSMOE_CACHE", str(tmp_path / "cache"))
    native._load.cache_clear()
    build.machine_key.cache_clear()
    yield tmp_path
    native._load.cache_clear()
    build.machine_key.cache_clear()


@pytest.fixture
def small_sources(fresh, monkeypatch):
    """One kernel of a line instead of all, which take a compiler ten seconds."""
    monkeypatch.setattr(build, "SOURCES", fresh)
    shutil.copy(native.__path__[0] + "/share.cpp", fresh)
    shutil.copy(native.__path__[0] + "/brgemm.h", fresh)
    (fresh / "nothing.cpp").write_text(ONE_KERNEL % "")
    return fresh


def libraries(folder) -> list:
    return sorted(folder.glob("cache/*.so"))


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ("throw std::bad_alloc();", MemoryError, "nothing could not allocate its workspace"),
        ('throw std::runtime_error("no such shape");', RuntimeError, "nothing: no such shape"),
    ],
)
def test_what_a_kernel_throws_is_an_error_in_python(small_sources, body, error, message):
    program = "#include <new>\n#include <stdexcept>\n" + ONE_KERNEL % body
    (small_sources / "nothing.cpp").write_text(program)
    with pytest.raises(error, match=message):
        native.run("nothing", ctypes.c_int64(0), count=4)


def test_compiled_once_and_kept(small_sources):
    assert native.unavailable() is None
    (kept,) = libraries(small_sources)
    made = kept.stat().st_mtime_ns
    native._load.cache_clear()
    assert native.unavailable() is None
    assert [path.stat().st_mtime_ns for path in libraries(small_sources)] == [made]


def compile_in(folder: Path, program: str) -> bool:
    os.environ.update(DSMOE_CACHE=str(folder / "cache"), CXX=program)
    build.SOURCES = folder
    native._load.cache_clear()
    return hasattr(native.library(), "nothing")


def test_four_processes_at_once_compile_once(small_sources, tmp_path):
    """A compiler that leaves a mark and takes its time: the others wait for it, and no deadline ends them."""
    slow = tmp_path / "slow-c++"
    slow.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] || {{ echo x >> {tmp_path}/compilations; sleep 2; }}\nexec c++ "$@"\n'
    )
    slow.chmod(0o755)
    job = (compile_in, (small_sources, str(slow)))
    assert call_each([job] * 4, deadline=250) == [True] * 4  # that of a hang
    assert (tmp_path / "compilations").read_text().split() == ["x"]
    assert len(libraries(small_sources)) == 1


def test_a_process_that_is_killed_leaves_no_lock(small_sources, tmp_path):
    (small_sources / "cache").mkdir()
    program = (
        "import sys, time; from pathlib import Path; from dsmoe.native import build\n"
        f"with build.locked(Path({str(small_sources / 'cache')!r})): print('locked', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "locked\n"
    holder.kill()
    holder.wait()
    began = time.monotonic()
    assert native.unavailable() is None
    assert time.monotonic() - began < 50


def build_experts(implementation: str) -> GroupedExperts:
    shapes = SimpleNamespace(num_moe_experts=2, hidden_size=16, moe_ffn_hidden_size=8)
    alone = SimpleNamespace(ep=SimpleNamespace(size=lambda: 1, rank=lambda: 0))
    return GroupedExperts(2, shapes, pg_collection=alone, implementation=implementation)


@pytest.mark.parametrize("case", ["no compiler", "broken compiler", "torch without micro-kernels"])
def test_where_there_is_no_library_torch_does_the_work(small_sources, monkeypatch, case):
    program = small_sources / "c++"
    if case == "broken compiler":
        program.write_text("#!/bin/sh\necho 'no such flag' >&2\nexit 1\n")
        program.chmod(0o755)
        monkeypatch.setattr(build, "compiler", lambda: str(program))
        expected = f"{program} cannot compile them: no such flag"
    elif case == "no compiler":
        monkeypatch.setattr(build, "compiler", lambda: None)
        expected = "no C++ compiler"
    else:
        header = (small_sources / "brgemm.h").read_text().replace("brgemm_release(bool", "brgemm_let_go(bool")
        (small_sources / "brgemm.h").write_text(header)
        source = (small_sources / "share.cpp").read_text().replace("brgemm_release", "brgemm_let_go")
        (small_sources / "share.cpp").write_text(source)
        expected = "does not export its brgemm micro-kernels"
    assert expected in native.unavailable()
    experts = build_experts("auto")
    tensors = [torch.ones(2, 16), experts.gate_up_proj, experts.down_proj]
    assert set(cpu.available(experts.mlp, [tuple(tensors[:2])], tensors[2])) == {"blocked", "loop", "grouped_mm"}
    experts(tensors[0], torch.tensor([1, 1]), torch.ones(2))
    with pytest.raises(
        ConfigError, match="experts_implementation: found native, but .*expected auto, grouped_mm or loop"
    ):
        build_experts("native")


def test_a_cache_that_cannot_be_written_is_replaced(small_sources, monkeypatch):
    monkeypatch.setenv("DSMOE_CACHE", str(small_sources / "file" / "cache"))
    (small_sources / "file").write_text("")
    assert native.unavailable() is None
