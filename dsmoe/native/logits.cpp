// Logits of a bf16 gate on a CPU, in fp32: Y = X W^T.
//
// Products of two bf16 numbers are exact in fp32, so nothing is lost to a product of fp32 copies but their time.
//
// Shapes: T tokens, E experts, a multiple of LANES, H hidden.

#include "kernels.h"

struct Logits {
  int64_t computed_bf16;
  int64_t tokens, experts, hidden;
  const Half* x;  // [T][H]
  const Half* w;  // [E][H]
  float* y;       // [T][E]
};

namespace {

template <class Computed>
struct Space {
  Computed *columns, *room;
  float* block;
};

template <class Computed>
void logits_of(const Logits& logits, int64_t count, int64_t* next) {
  const int64_t H = logits.hidden, E = logits.experts;
  auto layout = [&](Workspace& memory) {
    return Space<Computed>{memory.take<Computed>(H * GROUP), memory.take<Computed>(BLOCK * H),
                           memory.take<float>(BLOCK * GROUP)};
  };
  each_item(count, next, layout, [&](int64_t i, const Space<Computed>& space) {
    const int64_t low = i * GROUP, n = std::min(GROUP, logits.tokens - low), c = round_up(n, COLUMNS);
    to_columns(logits.x + low * H, H, n, H, space.columns);
    for (int64_t e = 0; e < E; e += BLOCK) {
      const int64_t m = std::min(BLOCK, E - e);
      multiply(m, c, H, left(logits.w + e * H, H, m, H, space.room), {space.columns, c}, space.block, c);
      transpose(space.block, c, m, m, n, logits.y + low * E + e, E);
    }
  });
}

}  // namespace

// An item is a group of tokens.
extern "C" void dsmoe_logits(const Logits* logits, const void*, int64_t count, int64_t* next) {
  (logits->computed_bf16 ? logits_of<Half> : logits_of<float>)(*logits, count, next);
}
