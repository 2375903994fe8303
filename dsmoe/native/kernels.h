// Products, transpositions and the exponential that the kernels beside it are made of. Sums are fp32.
//
// All products are computed transposed, with up to GROUP rows of activations side by side as columns: a weight's elements
// are broadcast over vectors that run along these rows, so a weight is read once, in the order it lies in, while the
// next ones are fetched. A library's GEMM copies a matrix into an order of its own first: worth it for many rows, and
// twice the traffic for few.
//
// A *group* is up to 32 rows as columns: X^T [K][c], its c a multiple of 8, zero beyond the rows there are.
//
// What is multiplied lies in *cells* of four bytes: one fp32 number or two bf16 ones that are neighbours along the sum. A
// bf16 row of K numbers is K / 2 cells as it lies in memory, and becomes columns by the same transposition.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>
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

// ---- numbers --------------------------------------------------------------------------------------------------------

typedef uint16_t Half;  // a bf16 number
typedef Half Halves __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

INLINE Vector choose(Integers mask, Vector yes, Vector no) {
  return (Vector)((mask & (Integers)yes) | (~mask & (Integers)no));
}

// To the nearest bf16 number, ties to even: its bits are the upper halves.
INLINE Integers rounded(Vector x) {
  const Integers bits = (Integers)x, nan = Integers{} + 0x7fc00000;
  return (Integers)choose(x == x, (Vector)(bits + 0x7fff + ((bits >> 16) & 1)), (Vector)nan);
}

// A vector of bf16 numbers.
INLINE Vector numbers(const Half* from) {
  typedef Half Few __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
  return (Vector)(__builtin_convertvector(*(const Few*)from, Integers) << 16);
}

// Two vectors as bf16 numbers, one after the other.
INLINE Halves halves(Vector a, Vector b) {
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
  return (Halves)_mm256_cvtne2ps_pbh((__m256)b, (__m256)a);
#else
  return __builtin_shuffle((Halves)rounded(a), (Halves)rounded(b),
                           (Halves){1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31});
#endif
}

struct FP32 {
  static constexpr int PACKED = 1;  // numbers in a cell
  static INLINE void add(Vector& sum, float a, Vector b) { sum += a * b; }
  static INLINE void open(Vector cells, Vector* numbers) { numbers[0] = cells; }
  static INLINE Vector close(const Vector* numbers) { return numbers[0]; }
};

struct BF16 {
  static constexpr int PACKED = 2;
  static constexpr int32_t UPPER = (int32_t)0xffff0000;
  static INLINE void open(Vector cells, Vector* numbers) {
    numbers[0] = (Vector)((Integers)cells << 16);
    numbers[1] = (Vector)((Integers)cells & UPPER);
  }
  static INLINE Vector close(const Vector* numbers) {
    return (Vector)__builtin_shuffle(halves(numbers[0], numbers[1]),
                                     (Halves){0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15});
  }
  static INLINE void add(Vector& sum, float a, Vector b) {
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
    sum = (Vector)_mm256_dpbf16_ps((__m256)sum, (__m256bh)_mm256_set1_ps(a), (__m256bh)b);
#else
    int32_t bits;
    std::memcpy(&bits, &a, sizeof bits);
    Vector left[2], right[2];
    open((Vector)(Integers{} + bits), left);
    open(b, right);
    sum += left[0] * right[0];
    sum += left[1] * right[1];
#endif
  }
};

// ---- pairs ----------------------------------------------------------------------------------------------------------

// n bf16 rows of K cells -> [n / 2, rounded up][2 K] cells that pair a row's numbers with the next row's; 0 for a row
// that is not there.
inline void interleave(const float* rows, int64_t n, int64_t K, float* pairs) {
  const Halves low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23}, high = low + 8;
  for (int64_t r = 0; r < n; r += 2)
    for (int64_t k = 0; k < K; k += LANES) {
      const Halves a = (Halves)at(rows + r * K + k), b = r + 1 < n ? (Halves)at(rows + (r + 1) * K + k) : Halves{};
      at(pairs + r * K + 2 * k) = (Vector)__builtin_shuffle(a, b, low);
      at(pairs + r * K + 2 * k + LANES) = (Vector)__builtin_shuffle(a, b, high);
    }
}

// A group's columns in place: [N / 2][c] cells that pair two numbers of a row -> [N][c / 2] cells that pair two of its n
// rows, with 0 for a row that is not there.
inline void pair_rows(float* columns, int64_t N, int64_t n, int c) {
  const Halves order = {0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15};
  const int64_t last = n / 2;
  for (float* line = columns; line < columns + N / 2 * c; line += c) {
    Vector read[GROUP / LANES];
    for (int r = 0; r < c; r += LANES) read[r / LANES] = at(line + r);
    for (int r = 0; r < c; r += LANES) {
      const Halves ordered = __builtin_shuffle((Halves)read[r / LANES], order);
      std::memcpy(line + r / 2, &ordered, sizeof ordered / 2);
      std::memcpy(line + c / 2 + r / 2, (const char*)&ordered + sizeof ordered / 2, sizeof ordered / 2);
    }
    if (n % 2)
      for (float* cell : {line + last, line + c / 2 + last}) ((Half*)cell)[1] = 0;
  }
}

// ---- products -------------------------------------------------------------------------------------------------------

// C [M][c] (+)= A B with B [K][c] and a(i, k) = a[i * ai + k * ak], K in cells. `next`: memory that is needed after this
// tile, about as much of it as the tile reads of A.
template <class Number, int M, int V, bool ADD>
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
      for (int v = 0; v < V; v++) Number::add(sum[i][v], a[i * ai + k * ak], row[v]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; i++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) at(c + i * C + v * LANES) = sum[i][v];
}

template <class Number, int V, bool ADD>
void tiles(int64_t M, int64_t K, const float* a, int64_t ai, int64_t ak, const float* b, float* c, const float* next) {
  constexpr int64_t C = V * LANES;
  int64_t i = 0;
  auto rows = [&](auto tall) {
    for (; i + tall() <= M; i += tall())
      tile<Number, tall(), V, ADD>(K, a + i * ai, ai, ak, b, c + i * C, next + i * K);
  };
  rows(std::integral_constant<int, TALL[V]>());
  rows(std::integral_constant<int, std::min(4, TALL[V])>());
  rows(std::integral_constant<int, 1>());
}

template <bool ADD, class Number = FP32>
void product(int64_t M, int64_t K, const float* a, int64_t ai, int64_t ak, const float* b, float* c, int columns,
             const float* next) {
  switch (columns / LANES) {
    case 1: return tiles<Number, 1, ADD>(M, K, a, ai, ak, b, c, next);
    case 2: return tiles<Number, 2, ADD>(M, K, a, ai, ak, b, c, next);
    case 3: return tiles<Number, 3, ADD>(M, K, a, ai, ak, b, c, next);
    case 4: return tiles<Number, 4, ADD>(M, K, a, ai, ak, b, c, next);
  }
}

// Y^T [N][c] = W X^T, K in cells.
template <class Number = FP32>
void times(const float* w, int64_t N, int64_t K, const float* x, float* y, int columns) {
  product<false, Number>(N, K, w, K, 1, x, y, columns, w + 2 * TALL[1] * K);
}

constexpr int64_t BLOCK = 64;  // most rows of W that `times_transposed` takes at a time

// X^T [K numbers][c] = W^T Y^T, K in cells: some rows of W at a time, so that it is read in the order it lies in. `room`:
// BLOCK * K cells where a cell holds two numbers.
template <class Number = FP32>
void times_transposed(const float* w, int64_t N, int64_t K, const float* y, float* x, int columns, float* room = nullptr) {
  constexpr int P = Number::PACKED;
  const int64_t block = columns > 2 * LANES ? BLOCK : BLOCK / 4;
  for (int64_t n = 0; n < N; n += block) {
    const int64_t rows = std::min(block, N - n);
    const float *from = w + n * K, *next = from + rows * K, *by = y + n / P * columns;
    if constexpr (P == 2) interleave(from, rows, K, room), from = room;
    if (n == 0) product<false, Number>(P * K, rows / P, from, 1, P * K, by, x, columns, next);
    else product<true, Number>(P * K, rows / P, from, 1, P * K, by, x, columns, next);
  }
}

enum class Write { SET, ADD, PAST_CACHE };

// V vectors of a row of weight gradients.
template <int V>
INLINE void write(float* to, const Vector* sums, Write how) {
#pragma GCC unroll 4
  for (int v = 0; v < V; v++) {
    if (how == Write::ADD) at(to + v * LANES) += sums[v];
#if defined(__AVX__)
    else if (how == Write::PAST_CACHE) _mm256_stream_ps(to + v * LANES, (__m256)sums[v]);
#endif
    else at(to + v * LANES) = sums[v];
  }
}

template <int V>
INLINE void write(Half* to, const Vector* sums, Write how) {
  static_assert(V % 2 == 0, "two vectors become one");
#pragma GCC unroll 2
  for (int v = 0; v < V; v += 2) {
    const bool adds = how == Write::ADD;
    const Vector low = adds ? sums[v] + numbers(to + v * LANES) : sums[v];
    const Vector high = adds ? sums[v + 1] + numbers(to + (v + 1) * LANES) : sums[v + 1];
    const Halves both = halves(low, high);
#if defined(__AVX__)
    if (how == Write::PAST_CACHE) _mm256_stream_si256((__m256i*)(to + v * LANES), (__m256i)both);
    else
#endif
      *(Halves*)(to + v * LANES) = both;
  }
}

struct Side {  // groups of left^T, `stride` elements apart: lines of GROUP rows, in the last group of fewer
  const float* groups;
  int64_t stride, first;  // the line that counts as the first one
};

// W' [M rows from n on][V vectors from k on] of `outer`.
template <class Number, class Out, int M, int V>
INLINE void outer_tile(int64_t rows, Side left, int64_t n, const float* right, int64_t K, Out* w, Write how) {
  constexpr int P = Number::PACKED;
  Vector sum[M][V] = {};
  for (int64_t low = 0; low < rows; low += GROUP) {
    const int64_t here = std::min<int64_t>(GROUP, rows - low), columns = (here + LANES - 1) / LANES * LANES / P;
    const float* l = left.groups + low / GROUP * left.stride + (left.first + n) * columns;
    const float* from = right + low / P * K;
    for (int64_t r = 0; r < (here + P - 1) / P; r++) {
      Vector row[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) row[v] = at(from + r * K + v * LANES);
#pragma GCC unroll 16
      for (int i = 0; i < M; i++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) Number::add(sum[i][v], l[i * columns + r], row[v]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; i++) write<V>(w + i * K, sum[i], how);
}

// W' [N][K numbers] (+)= left^T right, summed over `rows`; right [rows][K], pairs of rows in cells where these hold two.
template <class Number = FP32, class Out = float>
void outer(int64_t rows, Side left, const float* right, int64_t N, int64_t K, Out* w, Write how) {
  constexpr int M = TALL[4], LEAST = sizeof(float) / sizeof(Out);
  int64_t n = 0;
  auto strips = [&](auto tall) {
    for (; n + tall() <= N; n += tall()) {
      int64_t k = 0;
      for (; k + 4 * LANES <= K; k += 4 * LANES)
        outer_tile<Number, Out, tall(), 4>(rows, left, n, right + k, K, w + n * K + k, how);
      for (; k < K; k += LEAST * LANES)
        outer_tile<Number, Out, tall(), LEAST>(rows, left, n, right + k, K, w + n * K + k, how);
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

// Sums [N][c] in place -> cells [N / numbers in one][c].
template <class Number>
void to_cells(float* columns, int64_t N, int c) {
  constexpr int P = Number::PACKED;
  if constexpr (P > 1)
    for (int64_t n = 0; n < N; n += P)
      for (int r = 0; r < c; r += LANES) {
        Vector numbers[P];
        for (int i = 0; i < P; i++) numbers[i] = at(columns + (n + i) * c + r);
        at(columns + n / P * c + r) = Number::close(numbers);
      }
}

// ---- elementwise ----------------------------------------------------------------------------------------------------

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

}  // namespace
