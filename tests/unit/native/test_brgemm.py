"""What dsmoe/native/brgemm.h says of torch's micro-kernels is what this torch has, in declaration and results."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import pytest
import torch

from dsmoe import native
from dsmoe.native import build

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason="no C++ kernels here")

PROGRAM = """
#include "brgemm.h"
extern "C" void product(int64_t bf16, int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc,
                        int64_t add, const void* a, const void* b, float* c) {
  if (bf16) multiply(M, N, K, Matrix<Half>{(const Half*)a, lda}, Matrix<Half>{(const Half*)b, ldb}, c, ldc, add);
  else multiply(M, N, K, Matrix<float>{(const float*)a, lda}, Matrix<float>{(const float*)b, ldb}, c, ldc, add);
  at::native::cpublas::brgemm_release(true);
}
"""


def declarations(header: str) -> set[str]:
    """Of brgemm and brgemm_release, with types alone."""
    text = re.sub(r"//[^\n]*", "", header)
    actual = set()
    for name, parameters in re.findall(r"void (brgemm|brgemm_release)\(([^)]*)\);", text):
        types = []
        for parameter in parameters.split(","):
            declared = parameter.split("=")[0].replace("at::BFloat16", "c10::BFloat16")
            types.append(" ".join(word for word in re.findall(r"[\w:]+\*?", declared)[:-1] if word != "const"))
        actual.add(f"{name}({', '.join(types)})")
    return actual


def test_our_declarations_are_torchs():
    theirs = (Path(torch.__file__).parent / "include/ATen/native/CPUBlas.h").read_text()
    ours = declarations((build.SOURCES / "brgemm.h").read_text())
    assert len(ours) == 3
    assert ours <= declarations(theirs)


@pytest.fixture(scope="module")
def product(tmp_path_factory):
    folder = tmp_path_factory.mktemp("brgemm")
    (folder / "product.cpp").write_text(PROGRAM)
    command = [build.compiler(), *build.FLAGS, f"-I{build.SOURCES}", str(folder / "product.cpp")]
    command += ["-o", str(folder / "product.so"), f"-L{build.TORCH_LIBRARIES}", "-ltorch_cpu"]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(folder / "product.so")).product


def call(product, a, b, c, sizes, add: bool) -> None:
    bf16 = a.dtype == torch.bfloat16
    numbers = map(ctypes.c_int64, (bf16, *sizes, a.stride(0), b.size(-1), c.stride(0), add))
    product(*numbers, *(ctypes.c_void_p(t.data_ptr()) for t in (a, b, c)))


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("sizes", [(1, 16, 8), (3, 8, 5), (64, 64, 256), (33, 48, 24), (17, 5, 7)])
def test_fp32(product, sizes, add):
    M, N, K = sizes
    torch.manual_seed(0)
    a, b = torch.randn(M, K + 3)[:, :K], torch.randn(K, N)
    c = torch.randn(M, N + 2)
    expected = a.double() @ b.double() + (c[:, :N].double() if add else 0)
    beyond = c[:, N:].clone()
    call(product, a, b, c, sizes, add)
    torch.testing.assert_close(c[:, :N].double(), expected, rtol=1e-5, atol=1e-6 * K)
    assert torch.equal(c[:, N:], beyond)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("sizes", [(1, 16, 8), (3, 16, 6), (64, 64, 256), (33, 48, 24), (17, 32, 2)])
def test_bf16_by_pairs_with_sums_in_fp32(product, sizes, add):
    if not any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16")):
        pytest.skip("a CPU without bf16 instructions")
    M, N, K = sizes
    a, b = torch.randn(M, K).bfloat16(), torch.randn(K, N).bfloat16()
    pairs = b.view(K // 2, 2, N).transpose(1, 2).contiguous()
    c = torch.randn(M, N)
    expected = a.double() @ b.double() + (c.double() if add else 0)
    numbers = map(ctypes.c_int64, (1, *sizes, K, N, N, add))
    product(*numbers, *(ctypes.c_void_p(t.data_ptr()) for t in (a, pairs, c)))
    torch.testing.assert_close(c.double(), expected, rtol=1e-5, atol=1e-5)
