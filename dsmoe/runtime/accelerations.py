"""Which fast pieces this machine has, and the one factory that picks among them.

dsmoe runs on plain torch; everything here is optional. `find_accelerations` tests each piece by using it (a kernel is
called on four numbers, a library is loaded), not by its name, and says in one sentence what it gives or why it is
absent. `rms_norm_class` picks the norm the model is built with. `python -m dsmoe.env` prints all of it.

Importing this module imports nothing heavy; no function here raises because a piece is missing or broken.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dsmoe.runtime.device import device_name, gpu_count, gpu_model, on_gpu

if TYPE_CHECKING:
    from torch import nn


HEAD_SIZES = (64, 128, 256)  # of attention, which backends are asked about
SHAPES_SHOWN = 12  # of kernels that were measured here
FUSED_ATTENTION = {"flash", "cudnn"}  # without the S x S scores in memory, and with grouped queries as they are


@dataclass(frozen=True)
class Acceleration:
    """A fast piece: whether it works here, and a sentence that says what it gives or why it is absent."""

    name: str
    active: bool
    reason: str
    version: str | None = None


class Finding(NamedTuple):
    """What a probe below returns: an `Acceleration` without its name."""

    active: bool
    reason: str
    version: str | None = None


def find_accelerations() -> list[Acceleration]:
    """Every fast piece dsmoe or its frameworks can use, in a fixed order. Never raises."""
    return [_probe(name) for name in PROBES]


def find_acceleration(name: str) -> Acceleration:
    """One of them. Never raises."""
    return _probe(name)


def rms_norm_class(on_cpu: type[nn.Module]) -> type[nn.Module]:
    """The fastest RMSNorm of this machine: with CUDA NVIDIA Apex's, else Transformer Engine's, else torch's; `on_cpu`
    without.

    All are built as `cls(hidden_size, eps=eps)` and hold one parameter, `weight`. Transformer Engine creates it
    on the current CUDA device, so move the finished model to its device rather than relying on where a norm starts.
    """
    for name, module, attribute in (
        ("NVIDIA Apex", "apex.normalization", "FusedRMSNorm"),
        ("Transformer Engine", "transformer_engine.pytorch", "RMSNorm"),
    ):
        if _probe(name).active:
            return getattr(importlib.import_module(module), attribute)
    import torch

    return torch.nn.RMSNorm if on_gpu() else on_cpu


def _probe(name: str) -> Acceleration:
    """A third-party package can fail in any way while it is imported; here that is an answer, not an error."""
    try:
        return Acceleration(name, *PROBES[name]())
    except Exception as error:
        return Acceleration(name, False, f"the check failed with {type(error).__name__}: {_first_line(error)}")


def _cuda() -> Finding:
    import torch

    if on_gpu():
        return Finding(True, f"{gpu_count()} x {gpu_model()}, CUDA", torch.version.cuda)
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        reason = "DS_ACCELERATOR=cpu: runs on the CPU"
    elif torch.version.cuda is None:
        reason = f"torch {torch.__version__} is built without CUDA; runs on the CPU"
    elif os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        reason = "CUDA_VISIBLE_DEVICES hides every GPU; runs on the CPU"
    else:
        reason = f"torch is built for CUDA {torch.version.cuda}, but finds no GPU or no driver; runs on the CPU"
    return Finding(False, reason)


def _transformer_engine() -> Finding:
    if _find_spec("transformer_engine") is None:
        return Finding(False, "not installed (pip install 'dsmoe[gpu]'); RMSNorm is torch's")
    version = _distribution_version("transformer-engine", "transformer_engine")
    if not on_gpu():
        return Finding(False, "installed, but needs a CUDA device; RMSNorm is torch's", version)
    importlib.import_module("transformer_engine.pytorch").RMSNorm
    return Finding(True, "fused RMSNorm; experts with model.experts_implementation=transformer_engine", version)


def _apex() -> Finding:
    spec = _find_spec("apex")
    if spec is None:
        return Finding(False, "not installed; RMSNorm is Transformer Engine's or torch's")
    # Told by its files, so that the code of a package nobody meant to install is not run.
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any((folder / "normalization").is_dir() for folder in folders):
        return _apex_impostor(str(folders[0]) if folders else str(spec.origin))
    version = _distribution_version("apex")
    # The classes of NVIDIA's package import without their kernels, and fail at the first call.
    missing = [extension for extension in ("amp_C", "fused_layer_norm_cuda") if _find_spec(extension) is None]
    if missing:
        return Finding(False, f"built without its CUDA extensions ({', '.join(missing)})", version)
    if not on_gpu():
        return Finding(False, "installed, but needs a CUDA device; RMSNorm is torch's", version)
    importlib.import_module("apex.normalization").FusedRMSNorm
    return Finding(True, "fused RMSNorm; AdamW with training.optimizer_options.kernel=apex", version)


def _apex_impostor(location: str) -> Finding:
    try:
        package = metadata.metadata("apex")
    except metadata.PackageNotFoundError:
        version, label, remedy = None, location, "remove it from Python's path"
    else:
        version, remedy = package["Version"], "pip uninstall apex"
        label = f"apex {version}" + (f" ({package['Summary']})" if package["Summary"] else "")
    reason = f"impostor: {label} only shares the name with NVIDIA's Apex, and Megatron-Core looks at the name; {remedy}"
    return Finding(False, reason, version)


def _grouped_gemm() -> Finding:
    import torch

    remedy = "set model.experts_implementation=loop"
    if not hasattr(torch.nn.functional, "grouped_mm"):
        return Finding(False, f"torch {torch.__version__} has no grouped_mm; {remedy}")
    # bf16 and rows of 16 bytes are what the CUDA kernel asks for; the CPU takes them too.
    device = device_name()
    rows = torch.ones(4, 16, dtype=torch.bfloat16, device=device)
    experts = torch.ones(2, 16, 16, dtype=torch.bfloat16, device=device)
    ends = torch.tensor([1, 4], dtype=torch.int32, device=device)
    try:
        torch.nn.functional.grouped_mm(rows, experts, offs=ends)
    except RuntimeError as error:
        reason = f"torch's grouped_mm fails on {device} ({_first_line(error)}); {remedy}"
        return Finding(False, reason, torch.__version__)
    return Finding(True, f"torch's grouped_mm runs all experts in one call on {device}", torch.__version__)


def _attention() -> Finding:
    """What torch's scaled_dot_product_attention itself picks for training: bf16, causal, grouped queries, no mask."""
    import torch
    from torch.nn.attention import SDPBackend

    device = device_name()
    if not on_gpu():
        from dsmoe.native import unavailable

        ours = "" if unavailable() else "dsmoe's C++ kernel or, where faster, "
        return Finding(True, f"{ours}torch's operators, on {device}", torch.__version__)
    taken: dict[str, list[int]] = {}
    objections: set[str] = set()
    for size in HEAD_SIZES:
        query, key = (
            torch.ones(1, heads, 128, size, dtype=torch.bfloat16, device=device, requires_grad=True) for heads in (4, 2)
        )
        choice = torch._fused_sdp_choice(query, key, key, is_causal=True, enable_gqa=True)
        backend = SDPBackend(choice).name.removesuffix("_ATTENTION").lower()
        taken.setdefault(backend, []).append(size)
        if backend not in FUSED_ATTENTION:
            with warnings.catch_warnings(record=True) as refused:
                warnings.simplefilter("always")
                params = torch.backends.cuda.SDPAParams(query, key, key, None, 0.0, True, True)
                torch.backends.cuda.can_use_flash_attention(params, debug=True)
            objections |= {_first_line(warning.message) for warning in refused}
    reason = "; ".join(f"{backend} for heads of {', '.join(map(str, sizes))}" for backend, sizes in taken.items())
    reason += "".join(f" ({text})" for text in sorted(objections))
    reason = f"bf16, causal, grouped queries on {device}: {reason}"
    return Finding(taken.keys() <= FUSED_ATTENTION, reason, torch.__version__)


def _cpu_kernels() -> Finding:
    from dsmoe.native import unavailable

    if on_gpu():
        return Finding(False, "for CPUs only")
    reason = unavailable()
    if reason:
        return Finding(False, f"{reason}; torch's operators instead")
    from dsmoe.native.ways import choices

    reason = "experts, bf16 gates, attention, norms and vocabulary loss, compiled for this CPU"
    return Finding(True, reason + "".join(f"; {text}" for text in _measured(choices())))


def _measured(choices: dict[str, str]) -> list[str]:
    """What was chosen between kernels here, shape by shape; of many shapes how often each way won."""
    if len(choices) <= SHAPES_SHOWN:
        return [f"{shape}: {seconds}" for shape, seconds in choices.items()]
    won: dict[str, Counter[str]] = {}
    for shape, seconds in choices.items():
        won.setdefault(shape.partition(",")[0], Counter())[seconds.split()[0]] += 1
    return [
        f"{kernel}, {sum(ways.values())} shapes: " + ", ".join(f"{way} {count}" for way, count in ways.most_common())
        for kernel, ways in won.items()
    ]


def _fused_adamw() -> Finding:
    import torch

    device = device_name()
    parameter = torch.nn.Parameter(torch.ones(4, device=device))
    parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW([parameter], fused=True).step()
    return Finding(True, f"torch updates all parameters in one kernel on {device}", torch.__version__)


def _core_binding() -> Finding:
    numactl = shutil.which("numactl")
    if numactl is None:
        return Finding(False, "no numactl program; `deepspeed --bind_cores_to_rank` needs it")
    shown = subprocess.run([numactl, "--show"], capture_output=True, text=True, timeout=10)
    if shown.returncode != 0:
        return Finding(False, f"numactl is not allowed to work here: {_first_line(shown.stderr)}")
    return Finding(True, "numactl, for `deepspeed --bind_cores_to_rank`")


def _mpi() -> Finding:
    if _find_spec("mpi4py") is None:
        return Finding(False, "mpi4py is not installed; only a start with mpirun needs it")
    # In a process of its own: a broken MPI aborts the one that loads it. Without MPI_Init, which may wait for a server.
    program = (
        "import mpi4py; mpi4py.rc(initialize=False, finalize=False);"
        "from mpi4py import MPI; print(MPI.Get_library_version())"
    )
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    version = _distribution_version("mpi4py")
    if "cannot load MPI library" in loaded.stderr:
        reason = "mpi4py finds no libmpi (pip install 'dsmoe[mpi]'); only a start with mpirun needs it"
        return Finding(False, reason, version)
    if loaded.returncode != 0:
        return Finding(False, f"mpi4py cannot load MPI ({_last_line(loaded.stderr)})", version)
    library = loaded.stdout.replace("\0", "").split(",")[0].strip()
    return Finding(True, f"mpi4py on {library}; mpirun can start a run", version)


def _compiler() -> Finding:
    from dsmoe.native.build import compiler as find_compiler

    compiler = find_compiler()
    # pip puts ninja beside Python, and that folder is on PATH only in an activated environment.
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    missing = [tool for tool, path in (("C++ compiler", compiler), ("ninja", ninja)) if path is None]
    if missing or compiler is None:
        return Finding(False, f"no {' and no '.join(missing)}; dsmoe's kernels and DeepSpeed's optional ops need it")
    shown = subprocess.run([compiler, "-dumpfullversion", "-dumpversion"], capture_output=True, text=True, timeout=10)
    reason = "builds dsmoe's kernels and DeepSpeed's optional ops; both can do without"
    return Finding(True, reason, shown.stdout.strip() or None)


PROBES: dict[str, Callable[[], Finding]] = {
    "CUDA device": _cuda,
    "Transformer Engine": _transformer_engine,
    "NVIDIA Apex": _apex,
    "grouped GEMM": _grouped_gemm,
    "attention": _attention,
    "C++ kernels": _cpu_kernels,
    "fused AdamW": _fused_adamw,
    "core binding": _core_binding,
    "MPI library": _mpi,
    "C++ compiler, ninja": _compiler,
}


def _find_spec(module: str) -> importlib.machinery.ModuleSpec | None:
    """Where a top-level module would be imported from; None where there is none."""
    try:
        return importlib.util.find_spec(module)
    except (ImportError, ValueError):  # ValueError: something put a module without a spec into sys.modules
        return None


def _distribution_version(*names: str) -> str | None:
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _first_line(message: object) -> str:
    return (str(message).strip().splitlines() or ["no message"])[0]


def _last_line(message: str) -> str:
    return (message.strip().splitlines() or ["no message"])[-1]
