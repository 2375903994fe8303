// RMSNorm on a CPU, fp32, forward and backward in one pass over memory each.
//
//     y = w x / rms(x);   rms(x) = sqrt(mean(x^2) + eps)
//
// Shapes: R rows, K width, a multiple of LANES.

#include <cmath>

#include "kernels.h"

namespace {

INLINE float total(Vector v) {
  float sum = 0;
  for (int i = 0; i < LANES; i++) sum += v[i];
  return sum;
}

}  // namespace

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

int dsmoe_norm_forward(const Norm* norm, const void*, int64_t count, int64_t* next) {
  const int64_t K = norm->size;
  for (int64_t i; (i = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < count;)
    for (int64_t r = i * norm->strip; r < std::min(norm->rows, (i + 1) * norm->strip); r++) {
      const float* x = norm->x + r * norm->x_step;
      Vector squares = {};
      for (int64_t k = 0; k < K; k += LANES) squares += at(x + k) * at(x + k);
      const float inverse = 1.0f / std::sqrt(total(squares) / K + (float)norm->epsilon);
      norm->inverse[r] = inverse;
      for (int64_t k = 0; k < K; k += LANES) at(norm->y + r * K + k) = inverse * at(x + k) * at(norm->w + k);
    }
  return 0;
}

int dsmoe_norm_backward(const Norm* norm, const void*, int64_t count, int64_t* next) {
  const int64_t K = norm->size;
  for (int64_t i; (i = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < count;) {
    float* grad_w = norm->grad_w + i * K;
    std::fill_n(grad_w, K, 0.0f);
    for (int64_t r = i * norm->strip; r < std::min(norm->rows, (i + 1) * norm->strip); r++) {
      const float *x = norm->x + r * norm->x_step, *grad = norm->grad_y + r * K, inverse = norm->inverse[r];
      Vector along = {};
      for (int64_t k = 0; k < K; k += LANES) along += at(grad + k) * at(norm->w + k) * at(x + k);
      const float scale = total(along) / K * inverse * inverse;
      for (int64_t k = 0; k < K; k += LANES) {
        at(grad_w + k) += inverse * at(grad + k) * at(x + k);
        at(norm->grad_x + r * K + k) = inverse * (at(grad + k) * at(norm->w + k) - scale * at(x + k));
      }
    }
  }
  return 0;
}
}
