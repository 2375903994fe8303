// Logits of a bf16 gate on a CPU, in fp32: Y = X W^T.
//
// Products of two bf16 numbers are exact in fp32, so nothing is lost to a product of fp32 copies but their time.
//
// Shapes: T tokens, E experts, H hidden. Memory of X and W is counted in cells of two numbers (kernels.h).

#include "kernels.h"

struct Logits {
  int64_t tokens, experts, hidden;
  const float* x;  // [T][H], bf16
  const float* w;  // [E][H], bf16
  float* y;        // [T][E], fp32
};

extern "C" int dsmoe_logits(const Logits* logits, const void*, int64_t count, int64_t* next) {
  const int64_t K = logits->hidden / BF16::PACKED, E = logits->experts;
  float* columns = scratch((K + E) * GROUP);
  if (!columns) return 1;
  float* sums = columns + K * GROUP;
  for (int64_t i; (i = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < count;) {
    const int64_t low = i * GROUP, n = std::min<int64_t>(GROUP, logits->tokens - low);
    const int c = width(n);
    to_columns(logits->x + low * K, K, n, K, columns, c);
    times<BF16>(logits->w, E, K, columns, sums, c);
    to_rows(sums, c, n, E, logits->y + low * E, E);
  }
  return 0;
}
