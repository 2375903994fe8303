// Causal self-attention on a CPU, fp32, with grouped queries and rotary embedding: GROUP queries of a head at a time,
// against all keys up to them. What the backward pass needs beside its inputs is made again: turned queries and keys, and
// probabilities, from the logarithm of their sum.
//
// Shapes: S positions, B sequences, n query heads, g heads of keys and values, d head size.

#include <cmath>

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

  int64_t padded() const { return round_up(length, COLUMNS); }
};

namespace {

constexpr int64_t KEYS = 512;  // of a product

// n vectors of a head from position `low` on, turned by the angles of their positions (direction 1) or back (-1), and
// scaled. `to` may be `from`.
void turn(const Attention& a, const float* from, int64_t stride, int64_t low, int64_t n, float* to, int64_t to_stride,
          float direction, float scale) {
  const int64_t half = a.size / 2;
  for (int64_t i = 0; i < n; i++, from += stride, to += to_stride) {
    if (!a.cosine) {
      for (int64_t k = 0; k < a.size; k++) to[k] = scale * from[k];
      continue;
    }
    const float *cosine = a.cosine + (low + i) * half, *sine = a.sine + (low + i) * half;
    for (int64_t k = 0; k < half; k++) {
      const float first = from[k], second = from[half + k], up = direction * sine[k];
      to[k] = scale * (first * cosine[k] - second * up);
      to[half + k] = scale * (second * cosine[k] + first * up);
    }
  }
}

// [n][keys] = rows [n][d] times columns [d][padded S], for the first `keys` of them.
void against_columns(const Attention& a, int64_t n, int64_t keys, Matrix<float> rows, const float* columns, float* to) {
  const int64_t stride = a.padded();
  for (int64_t k = 0; k < keys; k += KEYS) {
    const int64_t here = round_up(std::min(KEYS, keys - k), COLUMNS);
    multiply(n, here, a.size, rows, {columns + k, stride}, to + k, stride);
  }
}

// [n][d] = weights [n][padded S] of the first `keys`, times rows [keys][d].
void against_rows(const Attention& a, int64_t n, int64_t keys, const float* weights, Matrix<float> rows, float* to,
                  int64_t to_stride) {
  for (int64_t k = 0; k < keys; k += KEYS)
    multiply(n, a.size, std::min(KEYS, keys - k), {weights + k, a.padded()}, {rows.data + k * rows.stride, rows.stride},
             to, to_stride, k > 0);
}

// [keys][d] += weights^T [keys][n] times rows [n][d].
void add_transposed(const Attention& a, int64_t n, int64_t keys, const float* weights, Matrix<float> rows, float* block,
                    float* to) {
  for (int64_t k = 0; k < keys; k += BLOCK) {
    const int64_t m = std::min(BLOCK, keys - k);
    transpose(weights + k, a.padded(), n, round_up(n, LANES), m, block, GROUP);
    multiply(m, a.size, n, {block, GROUP}, rows, to + k * a.size, a.size, true);
  }
}

struct ForwardSpace {
  float *key_columns, *query, *scores, *rows;
};

void forward(const Attention& a, int64_t b, int64_t h, const ForwardSpace& space) {
  const int64_t d = a.size, S = a.length, g = h / (a.heads / a.groups);
  turn(a, a.key.at(0, b, g), a.key.position, 0, S, space.rows, d, 1, 1);
  transpose(space.rows, d, S, a.padded(), d, space.key_columns, a.padded());
  for (int64_t low = 0; low < S; low += GROUP) {
    const int64_t n = std::min(GROUP, S - low), keys = low + n;
    turn(a, a.query.at(low, b, h), a.query.position, low, n, space.query, d, 1, a.scale);
    against_columns(a, n, keys, {space.query, d}, space.key_columns, space.scores);
    float inverse[GROUP];
    for (int64_t i = 0; i < n; i++) {
      float *s = space.scores + i * a.padded(), largest = s[0], sum = 0;
      const int64_t seen = low + i + 1;
#pragma omp simd reduction(max : largest)
      for (int64_t k = 0; k < seen; k++) largest = std::max(largest, s[k]);
#pragma omp simd reduction(+ : sum)
      for (int64_t k = 0; k < seen; k++) sum += s[k] = exponential(s[k] - largest);
      std::fill(s + seen, s + keys, 0.0f);
      a.logsum[(b * a.heads + h) * S + low + i] = largest + std::log(sum);
      inverse[i] = 1.0f / sum;
    }
    float* out = a.out.at(low, b, h);
    against_rows(a, n, keys, space.scores, {a.value.at(0, b, g), a.value.position}, out, a.out.position);
    for (int64_t i = 0; i < n; i++, out += a.out.position)
      for (int64_t k = 0; k < d; k++) out[k] *= inverse[i];
  }
}

struct BackwardSpace {
  float *key, *key_columns, *value_columns, *query, *p, *grad_p, *block, *grad_key, *grad_value;
};

// All query heads that share a head of keys and values.
void backward(const Attention& a, int64_t b, int64_t g, const BackwardSpace& space) {
  const int64_t d = a.size, S = a.length, per_group = a.heads / a.groups;
  std::fill_n(space.grad_key, S * d, 0.0f);
  std::fill_n(space.grad_value, S * d, 0.0f);
  turn(a, a.key.at(0, b, g), a.key.position, 0, S, space.key, d, 1, 1);
  transpose(space.key, d, S, a.padded(), d, space.key_columns, a.padded());
  transpose(a.value.at(0, b, g), a.value.position, S, a.padded(), d, space.value_columns, a.padded());
  for (int64_t h = g * per_group; h < (g + 1) * per_group; h++)
    for (int64_t low = 0; low < S; low += GROUP) {
      const int64_t n = std::min(GROUP, S - low), keys = low + n;
      const Matrix<float> grad_out = {a.grad_out.at(low, b, h), a.grad_out.position};
      turn(a, a.query.at(low, b, h), a.query.position, low, n, space.query, d, 1, a.scale);
      against_columns(a, n, keys, {space.query, d}, space.key_columns, space.p);
      against_columns(a, n, keys, grad_out, space.value_columns, space.grad_p);
      for (int64_t i = 0; i < n; i++) {
        float *p = space.p + i * a.padded(), *grad = space.grad_p + i * a.padded();
        const float logsum = a.logsum[(b * a.heads + h) * S + low + i];
        const float *out = a.out.at(low + i, b, h), *grad_row = a.grad_out.at(low + i, b, h);
        float along = 0;  // the part of the gradient that the sum of a query's probabilities, always 1, takes out
#pragma omp simd reduction(+ : along)
        for (int64_t k = 0; k < d; k++) along += grad_row[k] * out[k];
        const int64_t seen = low + i + 1;
#pragma omp simd
        for (int64_t k = 0; k < seen; k++) {
          p[k] = exponential(p[k] - logsum);
          grad[k] = p[k] * (grad[k] - along);
        }
        std::fill(p + seen, p + keys, 0.0f);
        std::fill(grad + seen, grad + keys, 0.0f);
      }
      add_transposed(a, n, keys, space.p, grad_out, space.block, space.grad_value);
      add_transposed(a, n, keys, space.grad_p, {space.query, d}, space.block, space.grad_key);
      float* grad_query = a.grad_query.at(low, b, h);
      const int64_t stride = a.grad_query.position;
      against_rows(a, n, keys, space.grad_p, {space.key, d}, grad_query, stride);
      turn(a, grad_query, stride, low, n, grad_query, stride, -1, a.scale);
    }
  for (int64_t s = 0; s < S; s++) std::copy_n(space.grad_value + s * d, d, a.grad_value.at(s, b, g));
  turn(a, space.grad_key, d, 0, S, a.grad_key.at(0, b, g), a.grad_key.position, -1, 1);
}

}  // namespace

extern "C" {

// An item is a query head of a sequence.
void dsmoe_attention_forward(const Attention* a, const void*, int64_t count, int64_t* next) {
  const int64_t d = a->size, S = a->padded();
  auto layout = [&](Workspace& memory) {
    ForwardSpace space;
    space.key_columns = memory.take<float>(d * S);
    space.query = memory.take<float>(GROUP * d);
    space.scores = memory.take<float>(GROUP * S);
    space.rows = memory.take<float>(S * d);
    return space;
  };
  each_item(count, next, layout, [&](int64_t i, const ForwardSpace& space) {
    forward(*a, i / a->heads, i % a->heads, space);
  });
}

// An item is a head of keys and values of a sequence.
void dsmoe_attention_backward(const Attention* a, const void*, int64_t count, int64_t* next) {
  const int64_t d = a->size, S = a->padded();
  auto layout = [&](Workspace& memory) {
    BackwardSpace space;
    for (float** p : {&space.key, &space.key_columns, &space.value_columns, &space.grad_key, &space.grad_value})
      *p = memory.take<float>(S * d);
    space.query = memory.take<float>(GROUP * d);
    for (float** p : {&space.p, &space.grad_p}) *p = memory.take<float>(GROUP * S);
    space.block = memory.take<float>(BLOCK * GROUP);
    return space;
  };
  each_item(count, next, layout, [&](int64_t i, const BackwardSpace& space) {
    backward(*a, i / a->groups, i % a->groups, space);
  });
}
}
