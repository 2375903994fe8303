// What the kernels beside it are made of: numbers, transposition, the exponential, working memory. Sums are fp32.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "brgemm.h"

namespace {  // a copy for each file

constexpr int64_t LANES = 8;    // numbers of a vector; widths of fp32 matrices are multiples of it, those of bf16 of twice it
#if defined(__AVX512F__)  // rows that become columns are padded to a multiple of a micro-kernel's vector
constexpr int64_t COLUMNS = 16;
#else
constexpr int64_t COLUMNS = 8;
#endif
constexpr int64_t GROUP = 64;   // rows that become columns together
constexpr int64_t BLOCK = 64;   // rows of a weight that are multiplied at a time
typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef uint32_t Unsigned __attribute__((vector_size(4 * LANES)));
typedef Half HalfVector __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
#define INLINE inline __attribute__((always_inline))

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// ---- numbers --------------------------------------------------------------------------------------------------------

INLINE float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

INLINE uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

INLINE float widen(float x) { return x; }
INLINE float widen(Half x) { return bits_to_float((uint32_t)x << 16); }

// To the nearest bf16 number, ties to even.
INLINE uint32_t to_half(float x) {
  const uint32_t bits = float_to_bits(x);
  return x == x ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fc0;
}

INLINE void narrow(float x, float& to) { to = x; }
INLINE void narrow(float x, Half& to) { to = (Half)to_half(x); }

INLINE Vector load(const float* from) { return *(const Vector*)from; }
INLINE Vector load(const Half* from) {
  return (Vector)(__builtin_convertvector(*(const HalfVector*)from, Integers) << 16);
}

INLINE void store(float* to, Vector x) { *(Vector*)to = x; }
INLINE void store(Half* to, Vector x) {
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
  *(__m128bh*)to = _mm256_cvtneps_pbh((__m256)x);
#else
  for (int i = 0; i < LANES; i++) narrow(x[i], to[i]);
#endif
}

// 32 bytes of numbers past the cache.
#if defined(__AVX__)
INLINE void stream(float* to, const float* from) { _mm256_stream_ps(to, (__m256)load(from)); }
INLINE void stream(Half* to, const float* from) {
  alignas(16) Half low[LANES], high[LANES];
  store(low, load(from));
  store(high, load(from + LANES));
  _mm256_stream_si256((__m256i*)to, _mm256_set_m128i(*(__m128i*)high, *(__m128i*)low));
}
#endif

INLINE Unsigned float_to_bits(Vector x) { return (Unsigned)x; }
INLINE Vector bits_to_float(Unsigned bits) { return (Vector)bits; }

// e^x for |x| <= 87, e^-87 or e^87 beyond, with a relative error near 1e-7; any number for NaN. Cody and Waite's reduction,
// then a Taylor polynomial on [-ln 2 / 2, ln 2 / 2]. T: float or Vector.
template <class T>
INLINE T bounded_exponential(T x) {
  const float shift = 12582912.0f;  // 1.5 * 2^23: rounds to integers
  const T low = 87.0f < x ? T{} + 87.0f : x, bounded = -87.0f > low ? T{} - 87.0f : low;
  const T shifted = bounded * 1.44269504f + shift, n = shifted - shift;
  const T r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
  T p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return bits_to_float(float_to_bits(p) + (float_to_bits(shifted) << 23));
}

// The same, but 0 below -87, and NaN for NaN.
INLINE float exponential(float x) {
  const float power = bounded_exponential(x);
  return x < -87.0f ? 0.0f : x == x ? power : x;
}

// Of a number; any number for NaN: what multiplies it by x gets NaN all the same.
template <class T>
INLINE T sigmoid(T x) {
  return 1.0f / (1.0f + bounded_exponential(-x));
}

// ---- layouts --------------------------------------------------------------------------------------------------------

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

// [rows][columns] -> [columns][rows], with zeros for rows up to `padded`, a multiple of LANES. Up to a multiple of LANES,
// columns beyond `columns` are read; what they hold is not written.
template <class From, class To>
void transpose(const From* from, int64_t stride, int64_t rows, int64_t padded, int64_t columns, To* to,
               int64_t to_stride) {
  for (int64_t r = 0; r < padded; r += LANES)
    for (int64_t k = 0; k < columns; k += LANES) {
      Vector block[LANES];
#pragma GCC unroll 8
      for (int i = 0; i < LANES; i++) block[i] = r + i < rows ? load(from + (r + i) * stride + k) : Vector{};
      transpose(block);
#pragma GCC unroll 8
      for (int i = 0; i < LANES; i++)
        if (k + i < columns) store(to + (k + i) * to_stride + r, block[i]);
    }
}

// The same for bf16, whose pairs of rows are moved as 4 bytes; `padded` is a multiple of twice LANES.
inline void transpose(const Half* from, int64_t stride, int64_t rows, int64_t padded, int64_t columns, Half* to,
                      int64_t to_stride) {
  for (int64_t r = 0; r < padded; r += 2 * LANES)
    for (int64_t k = 0; k < columns; k += LANES) {
      auto bits = [&](int64_t row) {  // in the upper half of 4 bytes
        return row < rows ? (Unsigned)load(from + row * stride + k) : Unsigned{};
      };
      Vector block[LANES];
#pragma GCC unroll 8
      for (int i = 0; i < LANES; i++) block[i] = (Vector)(bits(r + 2 * i) >> 16 | bits(r + 2 * i + 1));
      transpose(block);
#pragma GCC unroll 8
      for (int i = 0; i < LANES; i++)
        if (k + i < columns) *(Vector*)(to + (k + i) * to_stride + r) = block[i];
    }
}

// Rows [n][K] as a right operand [K][n], zero beyond n up to a multiple of COLUMNS.
template <class Stored, class Computed>
void to_columns(const Stored* rows, int64_t stride, int64_t n, int64_t K, Computed* columns) {
  const int64_t c = round_up(n, COLUMNS);
  if constexpr (std::is_same_v<Computed, Half>)  // a pair along the sum is 4 bytes, as an fp32 number is
    transpose((const float*)rows, stride / 2, n, c, K / 2, (float*)columns, c);
  else
    transpose(rows, stride, n, c, K, columns, c);
}

// A left operand from rows [n][K]: these, or in `room` where they must be widened.
template <class Computed, class Stored>
Matrix<Computed> left(const Stored* rows, int64_t stride, int64_t n, int64_t K, Computed* room) {
  if constexpr (std::is_same_v<Stored, Computed>) {
    return {rows, stride};
  } else {
    for (int64_t r = 0; r < n; r++)
      for (int64_t k = 0; k < K; k++) room[r * K + k] = widen(rows[r * stride + k]);
    return {room, K};
  }
}

// Numbers that `right` needs room for, where the operand is bf16.
inline int64_t paired(int64_t n, int64_t N) { return round_up(n, 2) * round_up(N, PANEL); }

// A right operand from rows [n][N], its sum over n: these, or in `room` where they must be widened or paired.
template <class Computed, class Stored>
Matrix<Computed> right(const Stored* rows, int64_t stride, int64_t n, int64_t N, Computed* room) {
  if constexpr (std::is_same_v<Computed, float>) {
    return left(rows, stride, n, N, room);
  } else {
    const int64_t panel = round_up(n, 2) * PANEL;
    for (int64_t r = 0; r < n; r += 2)
      for (int64_t k = 0; k < N; k += PANEL) {
        const Half *low = rows + r * stride + k, *high = low + stride;
        uint32_t* pairs = (uint32_t*)(room + k / PANEL * panel + r * PANEL);
        const int64_t width = std::min(PANEL, N - k);
        if (r + 1 < n)
          for (int64_t i = 0; i < width; i++) pairs[i] = low[i] | (uint32_t)high[i] << 16;
        else
          for (int64_t i = 0; i < width; i++) pairs[i] = low[i];
      }
    return {room, PANEL, panel};
  }
}

// ---- working memory -------------------------------------------------------------------------------------------------

// Hands out pieces of a thread's memory; over no memory it counts what they need.
class Workspace {
 public:
  explicit Workspace(char* base = nullptr) : base_(base) {}
  int64_t size() const { return used_; }

  template <class T>
  T* take(int64_t count) {
    T* piece = base_ ? (T*)(base_ + used_) : nullptr;
    used_ += round_up(count * sizeof(T), 64);
    return piece;
  }

 private:
  char* base_;
  int64_t used_ = 0;
};

constexpr int64_t KEPT_BYTES = 8 << 20;  // of a thread's working memory from call to call

// This thread's, kept from call to call as fresh pages cost more than what is written to them; more than `KEPT_BYTES`
// is given back when this goes.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    if (kept_.size < bytes) {
      kept_.size = 0;
      kept_.memory.reset((char*)std::aligned_alloc(64, round_up(bytes, 64)));
      if (!kept_.memory) throw std::bad_alloc();
      kept_.size = bytes;
    }
  }
  ~Scratch() {
    if (kept_.size > KEPT_BYTES) kept_.memory.reset(), kept_.size = 0;
  }
  char* data() const { return kept_.memory.get(); }

 private:
  struct Free { void operator()(char* p) const { std::free(p); } };
  struct Kept {
    std::unique_ptr<char, Free> memory;
    int64_t size = 0;
  };
  static thread_local Kept kept_;
};
thread_local Scratch::Kept Scratch::kept_;

// ---- a thread's part ------------------------------------------------------------------------------------------------

// Work on items until none is left; threads share `next`. Layout: what takes a workspace and gives its pieces.
template <class Layout, class Work>
void each_item(int64_t count, int64_t* next, Layout layout, Work work) {
  Workspace counted;
  layout(counted);
  Scratch scratch(counted.size());
  Workspace memory(scratch.data());
  const auto pieces = layout(memory);
  for (int64_t i; (i = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < count;) work(i, pieces);
}

}  // namespace
