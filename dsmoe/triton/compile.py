"""Compile every kernel for GPUs that need not be here: `python -m dsmoe.triton.compile [--json]`.

At the shapes of an 8-billion-parameter mixture (H 2048, F 4096) in bf16: registers of a thread, bytes spilled, shared
memory. Triton brings its own ptxas.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dsmoe.triton import grouped, plan, rows, scores, swiglu

CAPABILITIES = (80, 90, 100)


@dataclass(frozen=True)
class Compiled:
    kernel: str
    capability: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_cores: str  # the matrix instruction, or ""


# Kernel, its signature in order, its constants, its warps.
KERNELS = {
    "sum_rows": (rows.sum_rows_kernel, "rows *bf16, place *i32, start *i32, out *bf16, row_stride i32",
                 {"H": 2048, "BLOCK": 1024}, 8),
    "swiglu_forward": (swiglu.swiglu_forward_kernel,
                       "gate *bf16, up *bf16, probs *fp32, out *bf16, gate_stride i32, up_stride i32",
                       {"WIDTH": 4096, "BLOCK": 2048}, 8),
    "swiglu_backward": (swiglu.swiglu_backward_kernel,
                        "grad *bf16, gate *bf16, up *bf16, probs *fp32, grad_gate *bf16, grad_up *bf16, "
                        "grad_probs *fp32, grad_stride i32, gate_stride i32, up_stride i32, out_stride i32",
                        {"WIDTH": 4096, "BLOCK": 2048}, 8),
    "plan_count": (plan.count_kernel, "map_TE *u8, block_counts *i32, token_counts *i32, tokens i32, blocks i32",
                   {"EXPERTS": 64, "PADDED": 64, "BLOCK": plan.TOKENS}, 4),
    "plan_write": (plan.write_kernel,
                   "map_TE *u8, block_ends *i32, token_starts *i32, flat *i64, token_of *i64, place *i32, tokens i32, "
                   "blocks i32",
                   {"EXPERTS": 64, "PADDED": 64, "BLOCK": plan.TOKENS}, 4),
    "latent_norms": (scores.latent_norms_kernel,
                     "hidden *bf16, reduce *bf16, norms *fp32, tokens i32, experts i32",
                     {"HIDDEN": 2048, "RANK": 32, "PADDED": 32, "BLOCK_T": 64, "BLOCK_H": 64, "WIDEN": False}, 4),
    "scaled_latents": (scores.scaled_latents_kernel,
                       "hidden *bf16, reduce *bf16, factor *fp32, out *bf16, tokens i32, experts i32",
                       {"HIDDEN": 2048, "RANK": 32, "PADDED": 32, "BLOCK_T": 64, "BLOCK_H": 64, "WIDEN": False}, 4),
    "grouped": (grouped.grouped_kernel,
                "rows *bf16, weight *bf16, ends *i32, out *bf16, row_stride i32, weight_e i32, weight_n i32, "
                "weight_k i32, N i32",
                {"K": 2048, "EXPERTS": 64, "PADDED": 64, "BLOCK_R": 64, "BLOCK_N": 128, "BLOCK_K": 64,
                 "WIDEN": False}, 8),
    "weight_gradient": (grouped.weight_gradient_kernel,
                        "grad *bf16, rows *bf16, ends *i32, out *bf16, grad_stride i32, row_stride i32, N i32, K i32",
                        {"ADD": True, "BLOCK_R": 64, "BLOCK_N": 64, "BLOCK_K": 64, "WIDEN": False}, 4),
}  # fmt: skip


def compile_kernel(name: str, capability: int) -> Compiled:
    """Raises triton's or ptxas's error where it does not compile."""
    kernel, signature, constants, warps = KERNELS[name]
    types = dict(argument.split() for argument in signature.split(", "))
    source = ASTSource(fn=kernel, signature=types | dict.fromkeys(constants, "constexpr"), constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    registers, spilled = _ptxas(compiled.asm["ptx"], capability)
    matrix = next((word for word in ("tcgen05", "wgmma", "mma.sync") if word in compiled.asm["ptx"]), "")
    return Compiled(name, capability, registers, spilled, compiled.metadata.shared, matrix)


def _ptxas(ptx: str, capability: int) -> tuple[int, int]:
    """Registers of a thread, and bytes stored to spill them."""
    folder_of_tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    program = next(path for path in map(folder_of_tools.joinpath, ("ptxas-blackwell", "ptxas")) if path.exists())
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        target = re.search(r"^\.target (sm_\w+)", ptx, re.MULTILINE)[1]
        command = [program, "-v", f"--gpu-name={target}", source, "-o", Path(folder) / "kernel.cubin"]
        done = subprocess.run(command, capture_output=True, text=True)
    output = done.stderr + done.stdout
    if done.returncode:
        raise RuntimeError(f"ptxas cannot assemble it for {target}: {output}")
    return int(re.search(r"Used (\d+) registers", output)[1]), int(re.search(r"(\d+) bytes spill stores", output)[1])


def main() -> None:
    table = [compile_kernel(name, capability) for name in KERNELS for capability in CAPABILITIES]
    if "--json" in sys.argv:
        print(json.dumps({"triton": triton.__version__, "kernels": [asdict(entry) for entry in table]}, indent=1))
        return
    print(f"{'kernel':18}{'sm':>5}{'registers':>11}{'spilled':>9}{'shared':>9}  matrix instruction")
    for entry in table:
        print(
            f"{entry.kernel:18}{entry.capability:>5}{entry.registers:>11}{entry.spilled_bytes:>9}"
            f"{entry.shared_bytes:>9}  {entry.tensor_cores}"
        )


if __name__ == "__main__":
    main()
