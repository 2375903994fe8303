// SwiGLU experts on a CPU, fp32 or bf16: products, activation and their gradients, a few rows of one expert at a time.
//
//     h = [G x, U x];   inner = p silu(h_gate) h_up;   out = D inner
//
// An expert of a large mixture gets a handful of rows, so a step is bound by streaming weights, not by arithmetic.
// Weight gradients are written past the cache where nothing will be added to them.
//
// In bf16 rows, weights and their gradients are bf16, and so is what the backward pass finds of h; sums, weights of rows
// and what lies between two products are fp32.
//
// Shapes: R rows ordered by expert, H hidden, F expert width, K width of a source's rows (H, or r for a latent). Memory
// is counted in cells of four bytes (kernels.h), of which bf16 needs half.

#include "kernels.h"

namespace {

// inner^T [F][c] from h^T [2F][c] and the weights of the rows, p [c].
template <class Number>
void activate(const float* h, int64_t F, const float* p, float* inner, int c) {
  constexpr int P = Number::PACKED;
  for (int64_t f = 0; f < F; f += P)
    for (int r = 0; r < c; r += LANES) {
      Vector made[P];
#pragma GCC unroll 2
      for (int i = 0; i < P; i++) {
        const Vector gate = at(h + (f + i) * c + r), up = at(h + (F + f + i) * c + r);
        made[i] = gate * sigmoid(gate) * up * at(p + r);
      }
      at(inner + f / P * c + r) = Number::close(made);
    }
}

// From the gradient of inner^T, in place of which comes inner^T itself: gradients of h^T and of p.
// `packed`: h^T [2F][n]. Lanes beyond n read what lies there, and nothing is made of them.
template <class Number>
void activate_backward(const float* packed, int64_t n, int64_t F, const float* p, float* grad_inner, float* grad_h,
                       float* grad_p, int c) {
  constexpr int P = Number::PACKED;
  const int64_t lines = F / P;
  for (int r = 0; r < c; r += LANES) {
    const Vector weight = at(p + r);
    Vector sum = {};
    for (int64_t f = 0; f < lines; f++) {
      Vector gate[P], up[P], grad_gate[P], grad_up[P], inner[P];
      Number::open(at(packed + f * n + r), gate);
      Number::open(at(packed + (lines + f) * n + r), up);
#pragma GCC unroll 2
      for (int i = 0; i < P; i++) {
        const Vector grad = at(grad_inner + (f * P + i) * c + r), s = sigmoid(gate[i]), silu = gate[i] * s;
        const Vector weighted = grad * weight;
        sum += grad * silu * up[i];
        grad_gate[i] = weighted * up[i] * s * (1.0f + gate[i] * (1.0f - s));
        grad_up[i] = weighted * silu;
        inner[i] = silu * up[i] * weight;
      }
      at(grad_h + f * c + r) = Number::close(grad_gate);
      at(grad_h + (lines + f) * c + r) = Number::close(grad_up);
      at(grad_inner + f * c + r) = Number::close(inner);
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
  int64_t bf16, hidden, ffn, sources;
  Source source[2];
  const float* down;   // [e][H][F]
  const float* probs;  // [R], fp32
  float* h;            // for each group of GROUP rows of an item, h^T [2F][rows]; LANES cells more at the end
  float* out;          // [R][H]; in the backward pass its gradient
  float* grad_probs;   // [R], fp32
};

struct Item {  // rows of one expert; all of them, or a part for one of several threads
  int64_t expert, low, high;
  int64_t adds;  // to gradients that are there
  void* grad_weight[2];
  void* grad_down;
};

static int64_t widest(const Layer& layer) {
  return std::max({layer.hidden, layer.ffn, layer.source[0].width, layer.source[1].width});
}

template <class Number>
static void forward(const Layer& layer, const Item& item, float* memory) {
  constexpr int P = Number::PACKED;
  const int64_t H = layer.hidden, F = layer.ffn, N = 2 * F / layer.sources;
  float *x = memory, *h = x + widest(layer) * GROUP, *inner = h + 2 * F * GROUP;
  for (int64_t low = item.low; low < item.high; low += GROUP) {
    const int64_t n = std::min<int64_t>(GROUP, item.high - low);
    const int c = width(n);
    for (int64_t s = 0; s < layer.sources; s++) {
      const Source& source = layer.source[s];
      const int64_t K = source.width / P;
      to_columns(source.rows + low * K, K, n, K, x, c);
      times<Number>(source.weight + item.expert * N * K, N, K, x, h + s * N * c, c);
    }
    float p[GROUP] = {};
    std::copy_n(layer.probs + low, n, p);
    activate<Number>(h, F, p, inner, c);
    to_cells<Number>(h, 2 * F, c);
    pack(h, c, 2 * F / P, n, layer.h + low * (2 * F / P));
    times<Number>(layer.down + item.expert * H * (F / P), H, F / P, inner, x, c);
    to_cells<Number>(x, H, c);
    to_rows(x, c, n, H / P, layer.out + low * (H / P), H / P);
  }
}

// The gradient of a weight from several chunks of rows: in bf16 summed in fp32 first.
template <class Number>
struct WeightGradient {
  typedef std::conditional_t<Number::PACKED == 1, float, Half> Stored;
  Stored* result;
  float* sum;
  int64_t N, K;
  bool adds;

  void add(int64_t rows, Side left, const float* right, bool first, bool last) const {
    const Write alone = (uintptr_t)result % sizeof(Vector) ? Write::SET : Write::PAST_CACHE;
    const Write final = adds ? Write::ADD : alone, how = first ? Write::SET : Write::ADD;
    if (first && last) return outer<Number>(rows, left, right, N, K, result, final);
    if constexpr (Number::PACKED == 1) return outer<Number>(rows, left, right, N, K, result, adds ? Write::ADD : how);
    outer<Number>(rows, left, right, N, K, sum, how);
    if (last) write_all(final);
  }

  void write_all(Write how) const {
    for (int64_t i = 0; i < N * K; i += 2 * LANES) {
      const Vector both[] = {at(sum + i), at(sum + i + LANES)};
      write<2>(result + i, both, how);
    }
  }
};

template <class Number>
static void backward(const Layer& layer, const Item& item, float* memory) {
  constexpr int P = Number::PACKED;
  constexpr int64_t MOST = P * CHUNK;  // rows at a time, in the same memory
  const int64_t H = layer.hidden, F = layer.ffn, N = 2 * F / layer.sources;
  const int64_t out_stride = H / P * GROUP, h_stride = 2 * F / P * GROUP;
  float *grad_out = memory, *grad_h = grad_out + H * CHUNK, *inner = grad_h + 2 * F * CHUNK;
  float *columns = inner + F * CHUNK, *grad_x = columns + F * GROUP, *room = grad_x + widest(layer) * GROUP;
  float *pairs = room + widest(layer) * BLOCK, *sums = pairs + widest(layer) * CHUNK;
  static_assert(CHUNK % GROUP == 0, "groups fill a chunk");
  typedef WeightGradient<Number> Gradient;
  auto gradient = [&](void* result, int64_t rows, int64_t width) {
    float* sum = std::exchange(sums, sums + rows * width);
    return Gradient{(typename Gradient::Stored*)result, sum, rows, width, item.adds != 0};
  };
  const Gradient down = gradient(item.grad_down, H, F);
  const Gradient up[] = {gradient(item.grad_weight[0], N, layer.source[0].width),
                         gradient(item.grad_weight[1], N, layer.source[1].width)};
  auto by_rows = [&](const float* rows, int64_t n, int64_t K) {  // as `outer` wants its right side
    if constexpr (P == 1) return rows;
    interleave(rows, n, K, pairs);
    return (const float*)pairs;
  };
  for (int64_t start = item.low; start < item.high; start += MOST) {
    const int64_t rows = std::min(MOST, item.high - start);
    for (int64_t low = 0; low < rows; low += GROUP) {
      const int64_t n = std::min<int64_t>(GROUP, rows - low), group = low / GROUP;
      const int c = width(n);
      float *go = grad_out + group * out_stride, *gh = grad_h + group * h_stride, p[GROUP] = {}, grad_p[GROUP];
      to_columns(layer.out + (start + low) * (H / P), H / P, n, H / P, go, c);
      times_transposed<Number>(layer.down + item.expert * H * (F / P), H, F / P, go, columns, c, room);
      std::copy_n(layer.probs + start + low, n, p);
      activate_backward<Number>(layer.h + (start + low) * (2 * F / P), n, F, p, columns, gh, grad_p, c);
      std::copy_n(grad_p, n, layer.grad_probs + start + low);
      to_rows(columns, c, n, F / P, inner + low * (F / P), F / P);
      for (int64_t s = 0; s < layer.sources; s++) {
        const Source& source = layer.source[s];
        const int64_t K = source.width / P;
        times_transposed<Number>(source.weight + item.expert * N * K, N, K, gh + s * (N / P) * c, grad_x, c, room);
        to_cells<Number>(grad_x, source.width, c);
        to_rows(grad_x, c, n, K, source.grad_rows + (start + low) * K, K);
      }
      if constexpr (P > 1) pair_rows(go, H, n, c), pair_rows(gh, 2 * F, n, c);
    }
    const bool first = start == item.low, last = start + rows == item.high;
    down.add(rows, {grad_out, out_stride, 0}, by_rows(inner, rows, F / P), first, last);
    for (int64_t s = 0; s < layer.sources; s++) {
      const int64_t K = layer.source[s].width / P;
      up[s].add(rows, {grad_h, h_stride, s * N}, by_rows(layer.source[s].rows + start * K, rows, K), first, last);
    }
  }
}

// Floats that the backward pass works in.
static int64_t backward_size(const Layer& layer, const Item* items, int64_t count) {
  const int64_t H = layer.hidden, F = layer.ffn;
  const int64_t size = (H + 3 * F) * CHUNK + (F + widest(layer)) * GROUP;
  if (!layer.bf16) return size;
  const bool sums = std::any_of(items, items + count, [](const Item& item) { return item.high - item.low > 2 * CHUNK; });
  const int64_t widths = layer.source[0].width + (layer.sources - 1) * layer.source[1].width;
  return size + widest(layer) * (BLOCK + CHUNK) + sums * (H * F + 2 * F / layer.sources * widths);
}

extern "C" {

// Both: work on items until none is left; several threads may share `next`, which starts at 0. Returns 0, or 1 where
// there is no memory to work in.
int dsmoe_swiglu_forward(const Layer* layer, const Item* items, int64_t count, int64_t* next) {
  float* memory = scratch((widest(*layer) + 3 * layer->ffn) * GROUP);
  if (!memory) return 1;
  const auto work = layer->bf16 ? forward<BF16> : forward<FP32>;
  for (int64_t i; (i = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < count;) work(*layer, items[i], memory);
  return 0;
}

int dsmoe_swiglu_backward(const Layer* layer, const Item* items, int64_t count, int64_t* next) {
  float* memory = scratch(backward_size(*layer, items, count));
  if (!memory) return 1;
  const auto work = layer->bf16 ? backward<BF16> : backward<FP32>;
  for (int64_t i; (i = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < count;) work(*layer, items[i], memory);
#if defined(__AVX__)
  _mm_sfence();
#endif
  return 0;
}
}
