// Products, transpositions and the exponential that the kernels beside it are made of. fp32.
//
// All products are computed transposed, with up to GROUP rows of activations side by side as columns: a weight's elements
// are broadcast over vectors that run along these rows, so a weight is read once, in the order it lies in, while the
// next ones are fetched. A library's GEMM copies a matrix into an order of its own first: worth it for many rows, and
// twice the traffic for few.
//
// A *group* is up to 32 rows as columns: X^T [K][c], its c a multiple of 8, zero beyond the rows there are.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>
#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace {  // a copy for each file

constexpr int LANES = 8, GROUP = 32, CHUNK = 128;  // rows of a vector, of a product, of a sum of weight gradients
typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
#define INLINE inline __attribute__((always_inline))

// Rows of a tile, by vectors in each of its rows: what the registers hold beside operands.
#if defined(__AVX512VL__)
constexpr int TALL[] = {0, 12, 12, 8, 6};
#else
constexpr int TALL[] = {0, 12, 6, 4, 3};
#endif

INLINE Vector& at(float* p) { return *(Vector*)p; }
INLINE const Vector& at(const float* p) { return *(const Vector*)p; }

// ---- products -------------------------------------------------------------------------------------------------------

// C [M][c] (+)= A B with B [K][c] and a(i, k) = a[i * ai + k * ak]. `next`: memory that is needed after this tile, about
// as much of it as the tile reads of A.
template <int M, int V, bool ADD>
INLINE void tile(int64_t K, const float* a, int64_t ai, int64_t ak, const float* b, float* c, const float* next) {
  constexpr int64_t C = V * LANES;
  Vector sum[M][V];
#pragma GCC unroll 16
  for (int i = 0; i < M; i++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) sum[i][v] = ADD ? at(c + i * C + v * LANES) : Vector{};
  for (int64_t k = 0; k < K; k++) {
    __builtin_prefetch(next + k * M, 0, 2);
    Vector row[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) row[v] = at(b + k * C + v * LANES);
#pragma GCC unroll 16
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) sum[i][v] += a[i * ai + k * ak] * row[v];
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; i++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) at(c + i * C + v * LANES) = sum[i][v];
}

template <int V, bool ADD>
void tiles(int64_t M, int64_t K, const float* a, int64_t ai, int64_t ak, const float* b, float* c, const float* next) {
  constexpr int64_t C = V * LANES;
  int64_t i = 0;
  auto rows = [&](auto tall) {
    for (; i + tall() <= M; i += tall())
      tile<tall(), V, ADD>(K, a + i * ai, ai, ak, b, c + i * C, next + i * K);
  };
  rows(std::integral_constant<int, TALL[V]>());
  rows(std::integral_constant<int, std::min(4, TALL[V])>());
  rows(std::integral_constant<int, 1>());
}

template <bool ADD>
void product(int64_t M, int64_t K, const float* a, int64_t ai, int64_t ak, const float* b, float* c, int columns,
             const float* next) {
  switch (columns / LANES) {
    case 1: return tiles<1, ADD>(M, K, a, ai, ak, b, c, next);
    case 2: return tiles<2, ADD>(M, K, a, ai, ak, b, c, next);
    case 3: return tiles<3, ADD>(M, K, a, ai, ak, b, c, next);
    case 4: return tiles<4, ADD>(M, K, a, ai, ak, b, c, next);
  }
}

// Y^T [N][c] = W X^T.
inline void times(const float* w, int64_t N, int64_t K, const float* x, float* y, int columns) {
  product<false>(N, K, w, K, 1, x, y, columns, w + 2 * TALL[1] * K);
}

// X^T [K][c] = W^T Y^T: some rows of W at a time, so that it is read in the order it lies in.
inline void times_transposed(const float* w, int64_t N, int64_t K, const float* y, float* x, int columns) {
  const int64_t block = columns > 2 * LANES ? 32 : 16;
  for (int64_t n = 0; n < N; n += block) {
    const int64_t rows = std::min(block, N - n);
    const float *from = w + n * K, *by = y + n * columns;
    if (n == 0) product<false>(K, rows, from, 1, K, by, x, columns, from + rows * K);
    else product<true>(K, rows, from, 1, K, by, x, columns, from + rows * K);
  }
}

enum class Write { SET, ADD, PAST_CACHE };

INLINE void write(float* to, Vector value, Write how) {
  if (how == Write::ADD) at(to) += value;
#if defined(__AVX__)
  else if (how == Write::PAST_CACHE) _mm256_stream_ps(to, (__m256)value);
#endif
  else at(to) = value;
}

struct Side {  // groups of left^T, `stride` elements apart: lines of GROUP elements, in the last group of fewer
  const float* groups;
  int64_t stride, first;  // the line that counts as the first one
};

// W' [M rows from n on][V vectors from k on] of `outer`.
template <int M, int V>
INLINE void outer_tile(int64_t rows, Side left, int64_t n, const float* right, int64_t K, float* w, Write how) {
  Vector sum[M][V] = {};
  for (int64_t low = 0; low < rows; low += GROUP) {
    const int64_t here = std::min<int64_t>(GROUP, rows - low), columns = (here + LANES - 1) / LANES * LANES;
    const float* l = left.groups + low / GROUP * left.stride + (left.first + n) * columns;
    for (int64_t r = 0; r < here; r++) {
      Vector row[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) row[v] = at(right + (low + r) * K + v * LANES);
#pragma GCC unroll 16
      for (int i = 0; i < M; i++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) sum[i][v] += l[i * columns + r] * row[v];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; i++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) write(w + i * K + v * LANES, sum[i][v], how);
}

// W' [N][K] (+)= left^T right, summed over `rows`; right [rows][K].
inline void outer(int64_t rows, Side left, const float* right, int64_t N, int64_t K, float* w, Write how) {
  constexpr int M = TALL[4];
  int64_t n = 0;
  auto strips = [&](auto tall) {
    for (; n + tall() <= N; n += tall()) {
      int64_t k = 0;
      for (; k + 4 * LANES <= K; k += 4 * LANES)
        outer_tile<tall(), 4>(rows, left, n, right + k, K, w + n * K + k, how);
      for (; k < K; k += LANES) outer_tile<tall(), 1>(rows, left, n, right + k, K, w + n * K + k, how);
    }
  };
  strips(std::integral_constant<int, M>());
  strips(std::integral_constant<int, 1>());
}

// ---- rows <-> columns -----------------------------------------------------------------------------------------------

INLINE void transpose(Vector r[8]) {
  const Integers low = {0, 8, 1, 9, 4, 12, 5, 13}, high = {2, 10, 3, 11, 6, 14, 7, 15};
  const Integers even = {0, 1, 8, 9, 4, 5, 12, 13}, odd = {2, 3, 10, 11, 6, 7, 14, 15};
  const Integers first = {0, 1, 2, 3, 8, 9, 10, 11}, last = {4, 5, 6, 7, 12, 13, 14, 15};
  Vector a[8], b[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    a[2 * i] = __builtin_shuffle(r[2 * i], r[2 * i + 1], low);
    a[2 * i + 1] = __builtin_shuffle(r[2 * i], r[2 * i + 1], high);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      b[4 * i + 2 * j] = __builtin_shuffle(a[4 * i + j], a[4 * i + 2 + j], even);
      b[4 * i + 2 * j + 1] = __builtin_shuffle(a[4 * i + j], a[4 * i + 2 + j], odd);
    }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    r[i] = __builtin_shuffle(b[i], b[i + 4], first);
    r[i + 4] = __builtin_shuffle(b[i], b[i + 4], last);
  }
}

// n rows of K, `step` elements apart -> columns [K][c], zero beyond n. K is a multiple of LANES.
inline void to_columns(const float* rows, int64_t step, int64_t n, int64_t K, float* columns, int c) {
  for (int64_t r = 0; r < c; r += LANES)
    for (int64_t k = 0; k < K; k += LANES) {
      Vector block[LANES];
      for (int i = 0; i < LANES; i++) block[i] = r + i < n ? at(rows + (r + i) * step + k) : Vector{};
      transpose(block);
      for (int i = 0; i < LANES; i++) at(columns + (k + i) * c + r) = block[i];
    }
}

inline void to_rows(const float* columns, int c, int64_t n, int64_t K, float* rows, int64_t step) {
  for (int64_t r = 0; r < n; r += LANES)
    for (int64_t k = 0; k < K; k += LANES) {
      Vector block[LANES];
      for (int i = 0; i < LANES; i++) block[i] = at(columns + (k + i) * c + r);
      transpose(block);
      for (int i = 0; i < LANES && r + i < n; i++) at(rows + (r + i) * step + k) = block[i];
    }
}

// [N][c] -> [N][n] in memory that ends with it: a vector may run over into the next line, which is written later.
inline void pack(const float* columns, int c, int64_t N, int64_t n, float* packed) {
  const int64_t safe = std::max<int64_t>(0, N - LANES);
  for (int64_t i = 0; i < safe; i++)
    for (int64_t r = 0; r < n; r += LANES) at(packed + i * n + r) = at(columns + i * c + r);
  for (int64_t i = safe; i < N; i++) std::memcpy(packed + i * n, columns + i * c, n * sizeof(float));
}

// ---- elementwise ----------------------------------------------------------------------------------------------------

INLINE Vector choose(Integers mask, Vector yes, Vector no) {
  return (Vector)((mask & (Integers)yes) | (~mask & (Integers)no));
}

// e^x with a relative error near 1e-7; 0 below -87, and e^87 above 87. Cody and Waite's reduction, then a Taylor
// polynomial on [-ln 2 / 2, ln 2 / 2].
INLINE Vector exponential(Vector x) {
  const Vector top = Vector{} + 87.0f, bottom = -top, shift = Vector{} + 12582912.0f;  // 1.5 * 2^23: rounds to integers
  const Integers nan = x != x;
  const Vector bounded = choose(x > top, top, choose(x < bottom, bottom, x));
  const Vector n = bounded * 1.44269504f + shift - shift;
  const Vector r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
  Vector p = Vector{} + 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Integers power = __builtin_convertvector(n, Integers);
  return choose(nan, x, choose(x < bottom, Vector{}, (Vector)((Integers)p + (power << 23))));
}

INLINE Vector sigmoid(Vector x) { return 1.0f / (1.0f + exponential(-x)); }

inline int width(int64_t rows) { return (int)((rows + LANES - 1) / LANES * LANES); }

// This thread's, kept from call to call: fresh pages cost more than what is written to them. Null where there is none.
inline float* scratch(int64_t floats) {
  struct Free { void operator()(float* p) const { std::free(p); } };
  thread_local std::unique_ptr<float, Free> memory;
  thread_local int64_t size = 0;
  if (size < floats) {
    memory.reset((float*)std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64));
    size = memory ? floats : 0;
  }
  return memory.get();
}

inline bool streamable(const float* w, int64_t K) { return (uintptr_t)w % 32 == 0 && K % LANES == 0; }

}  // namespace
