"""What dsmoe finds on this machine: `python -m dsmoe.env`, or `--json` for programs.

Versions against the pins of pyproject.toml, processors and memory, DeepSpeed's accelerator and communication backend,
and which accelerations work, with the reason for each that does not. Ends with status 1 where a required package is
missing or of another version. torch.distributed is not initialised, so it needs no launcher and no free port.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from dsmoe.runtime.accelerations import Acceleration, find_accelerations
from dsmoe.runtime.command_line import quiet_libraries
from dsmoe.runtime.device import gpu_count, gpu_memory_bytes, gpu_model


@dataclass(frozen=True)
class Package:
    """A package dsmoe requires; `found` is None where it is missing, `required` "" where any version will do."""

    name: str
    found: str | None
    required: str

    @property
    def fits(self) -> bool:
        return self.found is not None and SpecifierSet(self.required).contains(self.found, prereleases=True)


@dataclass(frozen=True)
class Gpu:
    name: str
    memory_bytes: int


@dataclass(frozen=True)
class Host:
    cpu: str
    cores: int  # that this process may use
    memory_bytes: int  # of the machine, or of its container where that is less
    gpus: list[Gpu]


@dataclass(frozen=True)
class DeepSpeedDevice:
    """What DeepSpeed chooses here; where it cannot be imported, `error` says why and the rest is empty."""

    accelerator: str | None = None  # cpu, cuda, ...
    backend: str | None = None  # what torch.distributed would be initialised with
    slots: int | None = None  # processes that `deepspeed` starts on this host unless told otherwise
    error: str | None = None


@dataclass(frozen=True)
class Environment:
    packages: list[Package]
    host: Host
    deepspeed: DeepSpeedDevice
    accelerations: list[Acceleration]

    @property
    def misfits(self) -> list[Package]:
        return [package for package in self.packages if not package.fits]


def find_environment() -> Environment:
    """Look at everything; takes a few seconds, nearly all of it the import of torch and of DeepSpeed."""
    with ThreadPoolExecutor(1) as pool:
        deepspeed = pool.submit(find_deepspeed_device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            accelerations = find_accelerations()
            host = find_host()
    return Environment(find_packages(), host, deepspeed.result(), accelerations)


def find_packages() -> list[Package]:
    """Python, dsmoe and each package it requires, read from dsmoe's installed metadata."""
    python = platform.python_version()
    try:
        dsmoe = metadata.metadata("dsmoe")
    except metadata.PackageNotFoundError:
        return [Package("python", python, ""), Package("dsmoe", None, "")]
    packages = [Package("python", python, dsmoe["Requires-Python"] or ""), Package("dsmoe", dsmoe["Version"], "")]
    for line in metadata.requires("dsmoe") or []:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            try:
                version = metadata.version(requirement.name)
            except metadata.PackageNotFoundError:
                version = None
            # Sorted so that the lower bound comes first: '>=5,<6'.
            required = ",".join(sorted(map(str, requirement.specifier), reverse=True))
            packages.append(Package(requirement.name, version, required))
    return packages


def find_host() -> Host:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Host(_cpu_model(), cores, _memory_bytes(), _gpus())


def find_deepspeed_device() -> DeepSpeedDevice:
    """Ask DeepSpeed, in a process of its own: importing it prints, and fixes the choice for the process."""
    program = (
        "import json; from deepspeed.accelerator import get_accelerator; a = get_accelerator();"
        "print(); print(json.dumps([a.device_name(), a.communication_backend_name(), a.device_count()]))"
    )
    try:
        asked = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return DeepSpeedDevice(error="importing it takes more than two minutes")
    if asked.returncode != 0:
        return DeepSpeedDevice(error=(asked.stderr.strip().splitlines() or ["importing it fails"])[-1])
    accelerator, backend, slots = json.loads(asked.stdout.strip().splitlines()[-1])
    return DeepSpeedDevice(accelerator, backend, slots)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _memory_bytes() -> int:
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(physical, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no control groups, or "max": no limit
        return physical


def _gpus() -> list[Gpu]:
    try:
        return [Gpu(gpu_model(index), gpu_memory_bytes(index)) for index in range(gpu_count())]
    except Exception:  # a broken torch is named among the accelerations
        return []


def as_json(environment: Environment) -> str:
    """The environment as a JSON object with the fields of `Environment`; each package also says whether it fits."""
    tree = asdict(environment)
    for entry, package in zip(tree["packages"], environment.packages, strict=True):
        entry["fits"] = package.fits
    return json.dumps(tree, indent=2)


def show(environment: Environment) -> None:
    """Print the environment for people, in 80 columns."""
    from dsmoe.runtime.screen import make_console

    console = make_console(highlight=False)
    console.print(_package_table(environment.packages))
    console.print(_device_table(environment.host, environment.deepspeed))
    console.print(_acceleration_table(environment.accelerations))
    misfits = environment.misfits
    if misfits:
        names = ", ".join(package.name for package in misfits)
        console.print(f"[bold red]Does not fit:[/] {names}. `make setup` installs what dsmoe is tested with.")
    else:
        console.print("[bold green]Every package fits.[/] What is off above is optional.")


def _table(*columns: str):
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    table.columns[0].no_wrap = True
    return table


def _package_table(packages: list[Package]):
    table = _table("package", "found", "required", "")
    for package in packages:
        verdict = "[green]fits[/]" if package.fits else "[bold red]does not fit[/]"
        table.add_row(package.name, package.found or "[bold red]missing[/]", package.required or "any", verdict)
    return table


def _device_table(host: Host, deepspeed: DeepSpeedDevice):
    table = _table("device", "found")
    table.add_row("processor", f"{host.cpu}, {host.cores} core{'s' if host.cores != 1 else ''}")
    table.add_row("memory", _gibibytes(host.memory_bytes))
    for index, gpu in enumerate(host.gpus):
        table.add_row(f"GPU {index}", f"{gpu.name}, {_gibibytes(gpu.memory_bytes)}")
    if not host.gpus:
        table.add_row("GPU", "none")
    if deepspeed.error:
        table.add_row("DeepSpeed", f"[bold red]cannot be used:[/] {_plain(deepspeed.error)}")
    else:
        processes = f"{deepspeed.slots} process{'es' if deepspeed.slots != 1 else ''}"
        chosen = "set by DS_ACCELERATOR" if os.environ.get("DS_ACCELERATOR") else "detected"
        table.add_row("DeepSpeed", f"accelerator {deepspeed.accelerator} ({chosen}), communication {deepspeed.backend}")
        table.add_row("", f"`deepspeed` starts {processes}; --num_gpus N starts N, on a CPU too")
    return table


def _acceleration_table(accelerations: list[Acceleration]):
    table = _table("acceleration", "", "what it gives, or why it is off")
    for acceleration in accelerations:
        state = "[green]on[/]" if acceleration.active else "[yellow]off[/]"
        version = f" [dim]({acceleration.version})[/]" if acceleration.active and acceleration.version else ""
        table.add_row(acceleration.name, state, _plain(acceleration.reason) + version)
    return table


def _plain(text: str) -> str:
    """Text of others, whose square brackets are not rich's markup."""
    from rich.markup import escape

    return escape(text)


def _gibibytes(size: int) -> str:
    return f"{size / 2**30:.0f} GiB"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dsmoe.env", description="What dsmoe finds on this machine.")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    options = parser.parse_args(arguments)
    quiet_libraries()
    with contextlib.redirect_stdout(sys.stderr):  # where DeepSpeed says what it detects
        environment = find_environment()
    if options.json:
        print(as_json(environment))
    else:
        show(environment)
    return 1 if environment.misfits else 0
