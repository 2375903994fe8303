// Causal self-attention on a CPU, fp32, with grouped queries: 32 queries of a head at a time, against all keys up to
// them. Probabilities are made again in the backward pass, from the logarithm of their sum.
//
// Shapes: S positions, B sequences, n query heads, g heads of keys and values, d head size. Queries are columns [d][c], so
// that scores [keys][c] have their maxima and sums along memory.

#include <cmath>
#include <limits>

#include "kernels.h"

struct View {  // [S][B][heads][d], elements of a head side by side
  float* data;
  int64_t position, sequence, head;  // elements from one to the next
  float* at(int64_t s, int64_t b, int64_t h) const { return data + s * position + b * sequence + h * head; }
};

struct Attention {
  int64_t length, heads, groups, size;  // S, n, g, d
  double scale;
  View query, key, value, out;
  float* logsum;  // [B][n][S]: log of the sum of a query's exponentials
  View grad_out, grad_query, grad_key, grad_value;
};

// Scores [low + n][c] of the queries from `low` on, which are columns and scaled already.
static void scores(const Attention& a, int64_t b, int64_t g, int64_t low, int64_t n, const float* query, float* s, int c) {
  const float* key = a.key.at(0, b, g);
  product<false>(low + n, a.size, key, a.key.position, 1, query, s, c, key);
  for (int64_t j = 1; j < n; j++)
    std::fill_n(s + (low + j) * c, j, -std::numeric_limits<float>::infinity());  // later keys than these queries
}

static void columns_of(const View& view, int64_t low, int64_t b, int64_t h, int64_t n, int64_t d, double scale,
                       float* columns, int c) {
  to_columns(view.at(low, b, h), view.position, n, d, columns, c);
  if (scale != 1.0)
    for (int64_t i = 0; i < d * c; i += LANES) at(columns + i) *= (float)scale;
}

static void forward(const Attention& a, int64_t b, int64_t h, float* memory) {
  const int64_t d = a.size, g = h / (a.heads / a.groups);
  float *query = memory, *out = query + d * GROUP, *s = out + d * GROUP;
  for (int64_t low = 0; low < a.length; low += GROUP) {
    const int64_t n = std::min<int64_t>(GROUP, a.length - low), keys = low + n;
    const int c = width(n);
    columns_of(a.query, low, b, h, n, d, a.scale, query, c);
    scores(a, b, g, low, n, query, s, c);
    Vector inverse[GROUP / LANES];
    for (int r = 0; r < c; r += LANES) {
      Vector largest = at(s + r), sum = {};
      for (int64_t j = 1; j < keys; j++) largest = choose(at(s + j * c + r) > largest, at(s + j * c + r), largest);
      for (int64_t j = 0; j < keys; j++) sum += at(s + j * c + r) = exponential(at(s + j * c + r) - largest);
      for (int i = 0; i < LANES && r + i < n; i++)
        a.logsum[(b * a.heads + h) * a.length + low + r + i] = largest[i] + std::log(sum[i]);
      inverse[r / LANES] = 1.0f / sum;
    }
    const float* value = a.value.at(0, b, g);
    product<false>(d, keys, value, 1, a.value.position, s, out, c, value);
    for (int64_t k = 0; k < d; k++)
      for (int r = 0; r < c; r += LANES) at(out + k * c + r) *= inverse[r / LANES];
    to_rows(out, c, n, d, a.out.at(low, b, h), a.out.position);
  }
}

// All query heads that share a head of keys and values.
static void backward(const Attention& a, int64_t b, int64_t g, float* memory) {
  const int64_t d = a.size, S = a.length, each = a.heads / a.groups;
  float *grad_key = memory, *grad_value = grad_key + S * d, *p = grad_value + S * d, *grad_s = p + S * GROUP;
  float *query = grad_s + S * GROUP, *grad_out = query + d * GROUP, *other = grad_out + d * GROUP;
  float* rows = other + d * GROUP;
  std::fill_n(grad_key, 2 * S * d, 0.0f);
  const float *key = a.key.at(0, b, g), *value = a.value.at(0, b, g);
  for (int64_t h = g * each; h < (g + 1) * each; h++)
    for (int64_t low = 0; low < S; low += GROUP) {
      const int64_t n = std::min<int64_t>(GROUP, S - low), keys = low + n;
      const int c = width(n);
      columns_of(a.query, low, b, h, n, d, a.scale, query, c);
      columns_of(a.grad_out, low, b, h, n, d, 1.0, grad_out, c);
      columns_of(a.out, low, b, h, n, d, 1.0, other, c);
      scores(a, b, g, low, n, query, p, c);
      product<false>(keys, d, value, a.value.position, 1, grad_out, grad_s, c, value);
      float logsum[GROUP] = {};
      std::copy_n(a.logsum + (b * a.heads + h) * S + low, n, logsum);
      for (int r = 0; r < c; r += LANES) {
        Vector along = {};  // the part of the gradient that the sum of a query's probabilities, always 1, takes out
        for (int64_t k = 0; k < d; k++) along += at(grad_out + k * c + r) * at(other + k * c + r);
        for (int64_t j = 0; j < keys; j++) {
          const Vector probability = exponential(at(p + j * c + r) - at(logsum + r));
          at(p + j * c + r) = probability;
          at(grad_s + j * c + r) = probability * (at(grad_s + j * c + r) - along);
        }
      }
      to_rows(grad_out, c, n, d, rows, d);
      outer(n, {p, 0, 0}, rows, keys, d, grad_value, Write::ADD);
      to_rows(query, c, n, d, rows, d);
      outer(n, {grad_s, 0, 0}, rows, keys, d, grad_key, Write::ADD);
      product<false>(d, keys, key, 1, a.key.position, grad_s, other, c, key);
      for (int64_t i = 0; i < d * c; i += LANES) at(other + i) *= (float)a.scale;
      to_rows(other, c, n, d, a.grad_query.at(low, b, h), a.grad_query.position);
    }
  for (int64_t j = 0; j < S; j++) {
    std::copy_n(grad_key + j * d, d, a.grad_key.at(j, b, g));
    std::copy_n(grad_value + j * d, d, a.grad_value.at(j, b, g));
  }
}

extern "C" {

// An item is a query head of a sequence.
int dsmoe_attention_forward(const Attention* a, const void*, int64_t count, int64_t* next) {
  float* memory = scratch((2 * a->size + a->length) * GROUP);
  if (!memory) return 1;
  for (int64_t i; (i = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < count;)
    forward(*a, i / a->heads, i % a->heads, memory);
  return 0;
}

// An item is a head of keys and values of a sequence.
int dsmoe_attention_backward(const Attention* a, const void*, int64_t count, int64_t* next) {
  float* memory = scratch(2 * a->length * (a->size + GROUP) + 4 * a->size * GROUP);
  if (!memory) return 1;
  for (int64_t i; (i = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < count;)
    backward(*a, i / a->groups, i % a->groups, memory);
  return 0;
}
}
