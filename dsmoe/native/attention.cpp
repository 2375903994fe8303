// Causal self-attention on a CPU, fp32, with grouped queries and rotary embedding: 32 queries of a head at a time,
// against all keys up to them. What the backward pass needs beside its inputs is made again: turned queries and keys, and
// probabilities, from the logarithm of their sum.
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
  const float *cosine, *sine;  // [S][d / 2], of the angles by which queries and keys turn; null: they do not
  View query, key, value, out;
  float* logsum;  // [B][n][S]: log of the sum of a query's exponentials
  View grad_out, grad_query, grad_key, grad_value;
};

struct Rows {
  const float* data;
  int64_t step;  // elements from one to the next
};

// A head's vector turned by the angles of position s; back again for direction -1. `to` may be `x`.
static void turn(const Attention& a, int64_t s, const float* x, float* to, float direction) {
  const int64_t half = a.size / 2;
  const float *cosine = a.cosine + s * half, *sine = a.sine + s * half;
  for (int64_t i = 0; i < half; i++) {
    const float low = x[i], high = x[half + i], up = direction * sine[i];
    to[i] = low * cosine[i] - high * up;
    to[half + i] = high * cosine[i] + low * up;
  }
}

// n vectors of a head from position `low` on, turned into `room` [n][d] where there are angles.
static Rows turned(const Attention& a, const View& view, int64_t low, int64_t b, int64_t h, int64_t n, float* room) {
  if (!a.cosine) return {view.at(low, b, h), view.position};
  for (int64_t i = 0; i < n; i++) turn(a, low + i, view.at(low + i, b, h), room + i * a.size, 1);
  return {room, a.size};
}

// The same for gradients, in place, and the other way.
static void turn_back(const Attention& a, const View& view, int64_t low, int64_t b, int64_t h, int64_t n) {
  if (a.cosine)
    for (int64_t i = 0; i < n; i++) turn(a, low + i, view.at(low + i, b, h), view.at(low + i, b, h), -1);
}

// Scores [low + n][c] of the queries from `low` on, which are columns and scaled already.
static void scores(const Attention& a, Rows key, int64_t low, int64_t n, const float* query, float* s, int c) {
  product<false>(low + n, a.size, key.data, key.step, 1, query, s, c, key.data);
  for (int64_t j = 1; j < n; j++)
    std::fill_n(s + (low + j) * c, j, -std::numeric_limits<float>::infinity());  // later keys than these queries
}

// Queries as columns, turned and scaled. `room`: [GROUP][d].
static void queries(const Attention& a, int64_t low, int64_t b, int64_t h, int64_t n, float* columns, int c, float* room) {
  const Rows rows = turned(a, a.query, low, b, h, n, room);
  to_columns(rows.data, rows.step, n, a.size, columns, c);
  for (int64_t i = 0; i < a.size * c; i += LANES) at(columns + i) *= (float)a.scale;
}

static void forward(const Attention& a, int64_t b, int64_t h, float* memory) {
  const int64_t d = a.size, g = h / (a.heads / a.groups);
  float *query = memory, *out = query + d * GROUP, *s = out + d * GROUP, *room = s + a.length * GROUP;
  const Rows key = turned(a, a.key, 0, b, g, a.length, room + d * GROUP);
  for (int64_t low = 0; low < a.length; low += GROUP) {
    const int64_t n = std::min<int64_t>(GROUP, a.length - low), keys = low + n;
    const int c = width(n);
    queries(a, low, b, h, n, query, c, room);
    scores(a, key, low, n, query, s, c);
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
  float *rows = other + d * GROUP, *keys_turned = rows + d * GROUP;
  std::fill_n(grad_key, 2 * S * d, 0.0f);
  const Rows key = turned(a, a.key, 0, b, g, S, keys_turned);
  const float* value = a.value.at(0, b, g);
  for (int64_t h = g * each; h < (g + 1) * each; h++)
    for (int64_t low = 0; low < S; low += GROUP) {
      const int64_t n = std::min<int64_t>(GROUP, S - low), keys = low + n;
      const int c = width(n);
      queries(a, low, b, h, n, query, c, rows);
      to_columns(a.grad_out.at(low, b, h), a.grad_out.position, n, d, grad_out, c);
      to_columns(a.out.at(low, b, h), a.out.position, n, d, other, c);
      scores(a, key, low, n, query, p, c);
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
      product<false>(d, keys, key.data, 1, key.step, grad_s, other, c, key.data);
      for (int64_t i = 0; i < d * c; i += LANES) at(other + i) *= (float)a.scale;
      to_rows(other, c, n, d, a.grad_query.at(low, b, h), a.grad_query.position);
      turn_back(a, a.grad_query, low, b, h, n);
    }
  for (int64_t j = 0; j < S; j++) {
    std::copy_n(grad_key + j * d, d, a.grad_key.at(j, b, g));
    std::copy_n(grad_value + j * d, d, a.grad_value.at(j, b, g));
  }
  turn_back(a, a.grad_key, 0, b, g, S);
}

extern "C" {

// An item is a query head of a sequence.
int dsmoe_attention_forward(const Attention* a, const void*, int64_t count, int64_t* next) {
  float* memory = scratch((3 * a->size + a->length) * GROUP + a->length * a->size);
  if (!memory) return 1;
  for (int64_t i; (i = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < count;)
    forward(*a, i / a->heads, i % a->heads, memory);
  return 0;
}

// An item is a head of keys and values of a sequence.
int dsmoe_attention_backward(const Attention* a, const void*, int64_t count, int64_t* next) {
  float* memory = scratch(a->length * (3 * a->size + 2 * GROUP) + 4 * a->size * GROUP);
  if (!memory) return 1;
  for (int64_t i; (i = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < count;)
    backward(*a, i / a->groups, i % a->groups, memory);
  return 0;
}
}
