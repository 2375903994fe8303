// torch's matrix micro-kernels: oneDNN's, compiled at run time for the shape at hand and kept by each thread.
//
// libtorch_cpu exports them; these are the declarations of ATen/native/CPUBlas.h, without the minute that ATen's headers
// take to compile. `tests/unit/test_kernel_contracts.py` compares them with that header and checks the results.

#pragma once

#include <algorithm>
#include <cstdint>

namespace c10 {
struct BFloat16;
enum class ScalarType : int8_t;
}  // namespace c10

namespace at::native::cpublas {
void brgemm(int64_t M, int64_t N, int64_t K, int64_t ld_a, int64_t ld_b, int64_t ld_c, const bool add_C,
            const float* A, const float* B, float* C, bool is_vnni);
void brgemm(int64_t M, int64_t N, int64_t K, int64_t ld_a, int64_t ld_b, int64_t ld_c, const bool add_C,
            const c10::BFloat16* A, const c10::BFloat16* B, float* C, bool is_vnni);
void brgemm_release(bool is_vnni);
}  // namespace at::native::cpublas

namespace {

typedef uint16_t Half;  // the bits of a bf16 number

constexpr int64_t PANEL = 64;  // columns of a bf16 right operand that lie together; AMX is half as fast with wide lines

// A matrix in memory: a row-major left operand, or a right operand, row-major in fp32 and in bf16 VNNI, [K / 2][N][2], all
// of it or each PANEL columns of N.
template <class T>
struct Matrix {
  const T* data;
  int64_t stride;
  int64_t panel = 0;  // numbers from a panel to the next; 0: there is one
};

// C [M][N] (+)= A [M][K] B [K][N], sums in fp32.
inline void multiply(int64_t M, int64_t N, int64_t K, Matrix<float> a, Matrix<float> b, float* c, int64_t stride,
                     bool add = false) {
  at::native::cpublas::brgemm(M, N, K, a.stride, b.stride, stride, add, a.data, b.data, c, false);
}

inline void multiply(int64_t M, int64_t N, int64_t K, Matrix<Half> a, Matrix<Half> b, float* c, int64_t stride,
                     bool add = false) {
  const int64_t width = b.panel ? PANEL : N;
  for (int64_t n = 0; n < N; n += width, b.data += b.panel, c += width)
    at::native::cpublas::brgemm(M, std::min(width, N - n), K + K % 2, a.stride, b.stride, stride, add,
                                (const c10::BFloat16*)a.data, (const c10::BFloat16*)b.data, c, true);
}

}  // namespace
