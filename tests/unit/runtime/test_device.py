"""DeepSpeed's accelerator decides where a process computes, and nothing else is asked."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dsmoe
from dsmoe.errors import ParallelError
from dsmoe.runtime import device

ROOT = Path(dsmoe.__file__).parent.parent


class Gpus:
    """As much of DeepSpeed's CUDA accelerator as tells devices apart."""

    def __init__(self, count: int):
        self.count, self.current = count, 0

    def device_name(self) -> str:
        return "cuda"

    def device_count(self) -> int:
        return self.count

    def set_device(self, index: int) -> None:
        self.current = index

    def current_device_name(self) -> str:
        return f"cuda:{self.current}"


def gpus(monkeypatch, count: int, local_rank: int) -> Gpus:
    actual = Gpus(count)
    monkeypatch.setattr(device, "accelerator", lambda: actual)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    return actual


@pytest.mark.parametrize(("count", "rank", "expected"), [(8, 0, 0), (8, 5, 5), (1, 0, 0), (1, 3, 0)])
def test_a_process_takes_the_gpu_of_its_local_rank_or_the_only_one_it_sees(monkeypatch, count, rank, expected):
    actual = gpus(monkeypatch, count, rank)
    assert device.use_local_device() == f"cuda:{expected}" == device.device_name()
    assert actual.current == expected and device.gpu_count() == count


def test_more_processes_than_gpus_are_refused_with_both_numbers(monkeypatch):
    gpus(monkeypatch, 2, 2)
    with pytest.raises(ParallelError, match=r"LOCAL_RANK is 2, but this host has 2 GPUs.*DS_ACCELERATOR=cpu"):
        device.use_local_device()


def test_a_cpu_process_has_no_gpu():
    assert (device.use_local_device(), device.on_gpu(), device.gpu_count()) == ("cpu", False, 0)


def test_nothing_but_the_device_module_asks_torch_about_cuda():
    asks = re.compile(r"torch\.cuda|\.is_cuda\b|cuda\.is_available|torch\.version\.cuda")
    allowed = {"dsmoe/runtime/device.py": None, "dsmoe/runtime/accelerations.py": "torch.version.cuda"}
    actual = []
    for folder in ("dsmoe", "launch", "tools"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            for match in asks.finditer(path.read_text()):
                if name not in allowed or allowed[name] not in (None, match[0]):
                    actual.append(f"{name}: {match[0]}")
    assert not actual


def test_importing_the_module_imports_nothing_heavy():
    program = "import sys, dsmoe.runtime.device; print({'torch', 'deepspeed'} & set(sys.modules) or 'none')"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "none"


@pytest.mark.parametrize("configured", [{}, {"PYTORCH_ALLOC_CONF": "x:1"}, {"PYTORCH_CUDA_ALLOC_CONF": "y:2"}])
def test_segments_grow_unless_the_user_has_configured_the_allocator(monkeypatch, configured):
    for name in device.ALLOCATOR_NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in configured.items():
        monkeypatch.setenv(name, value)
    device.prefer_growing_segments()
    actual = {name: os.environ[name] for name in device.ALLOCATOR_NAMES if name in os.environ}
    monkeypatch.delenv(device.ALLOCATOR[0], raising=False)
    assert actual == (configured or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})


@pytest.mark.parametrize("clone", [True, False])
def test_host_copies_of_host_memory(clone):
    source = torch.randn(3, 4).t()
    copies = device.HostCopies()
    copied = copies.copy(source, clone=clone)
    copies.finish()
    assert torch.equal(copied, source) and copied.is_contiguous()
    assert copies.copy(copied, clone=clone).data_ptr() == copied.data_ptr() or clone
