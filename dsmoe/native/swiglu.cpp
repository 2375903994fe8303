// SwiGLU experts on a CPU, fp32: products, activation and their gradients, a few rows of one expert at a time.
//
//     h = [G x, U x];   inner = p silu(h_gate) h_up;   out = D inner
//
// An expert of a large mixture gets a handful of rows, so a step is bound by streaming weights, not by arithmetic.
// Weight gradients are written past the cache where nothing will be added to them.
//
// Shapes: R rows ordered by expert, H hidden, F expert width, K width of a source's rows (H, or r for a latent).

#include "kernels.h"

namespace {

// inner^T [F][c] from h^T [2F][c] and the weights of the rows, p [c].
void activate(const float* h, int64_t F, const float* p, float* inner, int c) {
  for (int64_t f = 0; f < F; f++)
    for (int r = 0; r < c; r += LANES) {
      const Vector gate = at(h + f * c + r), up = at(h + (F + f) * c + r);
      at(inner + f * c + r) = gate * sigmoid(gate) * up * at(p + r);
    }
}

// From the gradient of inner^T, in place of which comes inner^T itself: gradients of h^T and of p.
// `packed`: h^T [2F][n]. Lanes beyond n read what lies there, and nothing is made of them.
void activate_backward(const float* packed, int64_t n, int64_t F, const float* p, float* grad_inner, float* grad_h,
                       float* grad_p, int c) {
  for (int r = 0; r < c; r += LANES) {
    const Vector weight = at(p + r);
    Vector sum = {};
    for (int64_t f = 0; f < F; f++) {
      const Vector gate = at(packed + f * n + r), up = at(packed + (F + f) * n + r), grad = at(grad_inner + f * c + r);
      const Vector s = sigmoid(gate), silu = gate * s, weighted = grad * weight;
      sum += grad * silu * up;
      at(grad_h + f * c + r) = weighted * up * s * (1.0f + gate * (1.0f - s));
      at(grad_h + (F + f) * c + r) = weighted * silu;
      at(grad_inner + f * c + r) = silu * up * weight;
    }
    at(grad_p + r) = sum;
  }
}

}  // namespace

// ---- what Python calls ----------------------------------------------------------------------------------------------

struct Source {  // of a part of h: the gate, the values it multiplies ("up"), or both, gate first
  const float* rows;    // [R][width]
  const float* weight;  // [e][N][width]; N = 2F / number of sources
  float* grad_rows;
  int64_t width;
};

struct Layer {
  int64_t hidden, ffn, sources;
  Source source[2];
  const float* down;   // [e][H][F]
  const float* probs;  // [R]
  float* h;            // for each group of GROUP rows of an item, h^T [2F][rows]; LANES floats more at the end
  float* out;          // [R][H]; in the backward pass its gradient
  float* grad_probs;   // [R]
};

struct Item {  // rows of one expert; all of them, or a part for one of several threads
  int64_t expert, low, high;
  float* grad_weight[2];
  float* grad_down;
};

static int64_t widest(const Layer& layer) {
  return std::max({layer.hidden, layer.source[0].width, layer.source[1].width});
}

static void forward(const Layer& layer, const Item& item, float* memory) {
  const int64_t H = layer.hidden, F = layer.ffn, N = 2 * F / layer.sources;
  float *x = memory, *h = x + widest(layer) * GROUP, *inner = h + 2 * F * GROUP;
  for (int64_t low = item.low; low < item.high; low += GROUP) {
    const int64_t n = std::min<int64_t>(GROUP, item.high - low);
    const int c = width(n);
    for (int64_t s = 0; s < layer.sources; s++) {
      const Source& source = layer.source[s];
      const int64_t K = source.width;
      to_columns(source.rows + low * K, K, n, K, x, c);
      times(source.weight + item.expert * N * K, N, K, x, h + s * N * c, c);
    }
    float p[GROUP] = {};
    std::copy_n(layer.probs + low, n, p);
    activate(h, F, p, inner, c);
    pack(h, c, 2 * F, n, layer.h + low * 2 * F);
    times(layer.down + item.expert * H * F, H, F, inner, x, c);
    to_rows(x, c, n, H, layer.out + low * H, H);
  }
}

static void backward(const Layer& layer, const Item& item, float* memory) {
  const int64_t H = layer.hidden, F = layer.ffn, N = 2 * F / layer.sources;
  float *grad_out = memory, *grad_h = grad_out + H * CHUNK, *inner = grad_h + 2 * F * CHUNK;
  float *columns = inner + F * CHUNK, *grad_x = columns + F * GROUP;
  static_assert(CHUNK % GROUP == 0, "groups fill a chunk");
  for (int64_t start = item.low; start < item.high; start += CHUNK) {
    const int64_t rows = std::min<int64_t>(CHUNK, item.high - start);
    for (int64_t low = 0; low < rows; low += GROUP) {
      const int64_t n = std::min<int64_t>(GROUP, rows - low), group = low / GROUP;
      const int c = width(n);
      float *go = grad_out + group * H * GROUP, *gh = grad_h + group * 2 * F * GROUP, p[GROUP] = {}, grad_p[GROUP];
      to_columns(layer.out + (start + low) * H, H, n, H, go, c);
      times_transposed(layer.down + item.expert * H * F, H, F, go, columns, c);
      std::copy_n(layer.probs + start + low, n, p);
      activate_backward(layer.h + (start + low) * 2 * F, n, F, p, columns, gh, grad_p, c);
      std::copy_n(grad_p, n, layer.grad_probs + start + low);
      to_rows(columns, c, n, F, inner + low * F, F);
      for (int64_t s = 0; s < layer.sources; s++) {
        const Source& source = layer.source[s];
        const int64_t K = source.width;
        times_transposed(source.weight + item.expert * N * K, N, K, gh + s * N * c, grad_x, c);
        to_rows(grad_x, c, n, K, source.grad_rows + (start + low) * K, K);
      }
    }
    const bool only = item.high - item.low <= CHUNK;
    auto how = [&](const float* w, int64_t K) {
      return start > item.low ? Write::ADD : only && streamable(w, K) ? Write::PAST_CACHE : Write::SET;
    };
    outer(rows, {grad_out, H * GROUP, 0}, inner, H, F, item.grad_down, how(item.grad_down, F));
    for (int64_t s = 0; s < layer.sources; s++) {
      const int64_t K = layer.source[s].width;
      outer(rows, {grad_h, 2 * F * GROUP, s * N}, layer.source[s].rows + start * K, N, K, item.grad_weight[s],
            how(item.grad_weight[s], K));
    }
  }
}

extern "C" {

// Both: work on items until none is left; several threads may share `next`, which starts at 0. Returns 0, or 1 where
// there is no memory to work in.
int dsmoe_swiglu_forward(const Layer* layer, const Item* items, int64_t count, int64_t* next) {
  float* memory = scratch((widest(*layer) + 3 * layer->ffn) * GROUP);
  if (!memory) return 1;
  for (int64_t i; (i = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < count;) forward(*layer, items[i], memory);
  return 0;
}

int dsmoe_swiglu_backward(const Layer* layer, const Item* items, int64_t count, int64_t* next) {
  float* memory = scratch((layer->hidden + 3 * layer->ffn) * CHUNK + (layer->ffn + widest(*layer)) * GROUP);
  if (!memory) return 1;
  for (int64_t i; (i = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < count;) backward(*layer, items[i], memory);
#if defined(__AVX__)
  _mm_sfence();
#endif
  return 0;
}
}
