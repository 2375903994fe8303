// RMSNorm on a CPU, fp32, forward and backward in one pass over memory each.
//
//     y = w x / rms(x);   rms(x) = sqrt(mean(x^2) + eps)
//
// Shapes: R rows, K width.

#include <algorithm>
#include <cmath>
#include <cstdint>

struct Norm {
  int64_t rows, size;
  int64_t strip;  // rows that a thread takes at a time
  double epsilon;
  const float* x;
  int64_t x_step;  // elements from one row to the next; those of the others lie side by side
  const float* w;  // [K]
  float* y;        // [R][K]
  float* inverse;  // [R]: 1 / rms
  const float* grad_y;
  float* grad_x;
  float* grad_w;  // [R / strip, rounded up][K]: the part of each strip
};

extern "C" {

void dsmoe_norm_forward(const Norm* norm, const void*, int64_t count, int64_t* next) {
  const int64_t K = norm->size;
  const float* w = norm->w;
  for (int64_t i; (i = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < count;)
    for (int64_t r = i * norm->strip; r < std::min(norm->rows, (i + 1) * norm->strip); r++) {
      const float* x = norm->x + r * norm->x_step;
      float *y = norm->y + r * K, squares = 0;
#pragma omp simd reduction(+ : squares)
      for (int64_t k = 0; k < K; k++) squares += x[k] * x[k];
      const float inverse = 1.0f / std::sqrt(squares / K + (float)norm->epsilon);
      norm->inverse[r] = inverse;
#pragma omp simd
      for (int64_t k = 0; k < K; k++) y[k] = inverse * x[k] * w[k];
    }
}

void dsmoe_norm_backward(const Norm* norm, const void*, int64_t count, int64_t* next) {
  const int64_t K = norm->size;
  const float* w = norm->w;
  for (int64_t i; (i = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < count;) {
    float* grad_w = norm->grad_w + i * K;
    std::fill_n(grad_w, K, 0.0f);
    for (int64_t r = i * norm->strip; r < std::min(norm->rows, (i + 1) * norm->strip); r++) {
      const float *x = norm->x + r * norm->x_step, *grad = norm->grad_y + r * K, inverse = norm->inverse[r];
      float *grad_x = norm->grad_x + r * K, along = 0;
#pragma omp simd reduction(+ : along)
      for (int64_t k = 0; k < K; k++) along += grad[k] * w[k] * x[k];
      const float scale = along / K * inverse * inverse;
#pragma omp simd
      for (int64_t k = 0; k < K; k++) {
        grad_w[k] += inverse * grad[k] * x[k];
        grad_x[k] = inverse * (grad[k] * w[k] - scale * x[k]);
      }
    }
  }
}
}
