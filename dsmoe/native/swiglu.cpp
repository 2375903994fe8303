// SwiGLU experts on a CPU, fp32 or bf16: some rows of one expert at a time through all three projections.
//
//     h = [G x, U x];   inner = p silu(h_gate) h_up;   out = D inner
//
// Rows are left operands as they lie. A right operand is made of a weight once for all chunks of an expert's rows: its
// transpose forward, and what it is backward. Gradients of weights have the rows on the right.
//
// bf16 is what is *stored* of rows, weights, h and gradients. What is *computed* with is bf16 too where the CPU has fast
// products of it (AMX), otherwise fp32 made of it block by block; sums, and what lies between two products, are fp32.
//
// Shapes: R rows ordered by expert, H hidden, F expert width, K width of a source's rows (H, or r for a latent), n rows
// of a chunk, f = SLICE or less of F: the parts of F are independent but for the sums over them, which bounds memory.
//
// An expert with few rows has products of its own, forward: what counts there is how fast weights come.

#include <utility>

#include "kernels.h"

namespace {

constexpr int64_t CHUNK = 256;  // rows at a time
constexpr int64_t SLICE = 512;  // of F at a time
constexpr int64_t PAD = 16;  // numbers between rows, so that they do not lie a power of two apart

struct Source {  // of a part of h: the gate, the values it multiplies ("up"), or both, gate first
  const void* rows;    // [R][K]
  const void* weight;  // [e][2F / number of sources][K]
  void* grad_rows;
  int64_t width;
};

struct Layer {
  int64_t stored_bf16, computed_bf16;
  int64_t fp32_grad_rows;  // whether grad_rows are fp32, whatever is stored
  int64_t few;             // rows of an expert, up to which it has products of its own, forward
  int64_t hidden, ffn, sources;
  Source source[2];
  const void* down;    // [e][H][F]
  const float* probs;  // [R]
  void* h;             // [R][2F]
  void* out;           // [R][H]; in the backward pass its gradient
  float* grad_probs;   // [R]
};

struct Item {  // rows of one expert; all of them, or a part for one of several threads
  int64_t expert, low, high;
  int64_t adds;  // to gradients that are there
  int64_t fp32;  // whether gradients are, whatever is stored: one of several parts of an expert
  void* grad_weight[2];
  void* grad_down;
};

// A layer as one expert sees it. Part 0 is the gate, part 1 up.
template <class Stored>
struct Expert {
  const Layer& layer;
  int64_t H, F, slice;
  const Stored* down;

  Expert(const Layer& layer, int64_t expert)
      : layer(layer), H(layer.hidden), F(layer.ffn), slice(std::min(SLICE, F)), index_(expert) {
    down = (const Stored*)layer.down + expert * H * F;
  }
  const Source& source(int part) const { return layer.source[part * (layer.sources - 1)]; }
  int64_t width(int part) const { return source(part).width; }
  int64_t widest() const { return std::max({H, slice, width(0), width(1)}); }
  // The first line of a part in the weight of its source.
  int64_t first(int part) const { return layer.sources == 1 ? part * F : 0; }
  const Stored* weight(int part) const {
    return (const Stored*)source(part).weight + (index_ * (2 * F / layer.sources) + first(part)) * width(part);
  }
  const Stored* rows(int s, int64_t low) const {
    return (const Stored*)layer.source[s].rows + low * layer.source[s].width;
  }

 private:
  int64_t index_;
};

INLINE Vector swiglu(Vector gate, Vector up) { return gate * sigmoid(gate) * up; }

// ---- forward, few rows ----------------------------------------------------------------------------------------------
//
// As fast as memory brings the weights: each is read once, in order, as no micro-kernel reads it, and meets all rows
// while it is in the cache. Sums and what is between products are fp32.

constexpr int64_t QUAD = 4;      // rows are padded to a multiple of it
constexpr int64_t AHEAD = 4096;  // bytes between what is read of a weight and what is fetched

struct FewSpace {
  float *x[2], *h, *inner, *out;
};

// R rows times 2 lines of a weight: to[r][l] = sum over k of rows[r][k] w[l][k].
template <int R, class Stored>
INLINE void dots(const float* rows, const Stored* w, int64_t K, float* to, int64_t to_stride) {
  Vector sums[R / QUAD][2 * QUAD] = {};
  for (int64_t k = 0; k < K; k += LANES) {
    const Vector first = load(w + k), second = load(w + K + k);
    __builtin_prefetch(w + k + AHEAD / sizeof(Stored));
    __builtin_prefetch(w + K + k + AHEAD / sizeof(Stored));
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const Vector x = load(rows + r * (K + PAD) + k);
      sums[r / QUAD][r % QUAD] += first * x;
      sums[r / QUAD][QUAD + r % QUAD] += second * x;
    }
  }
#pragma GCC unroll 2
  for (int q = 0; q < R / QUAD; q++) {
    Vector* s = sums[q];
    transpose(s);
    const Vector total = ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
    for (int r = 0; r < QUAD; r++, to += to_stride) to[0] = total[r], to[1] = total[QUAD + r];
  }
}

// to [n][L] = rows [n][K] times the transposed weight w [L][K]; n is a multiple of QUAD, L of 2.
template <class Stored>
void times_lines(const float* rows, int64_t n, const Stored* w, int64_t L, int64_t K, float* to, int64_t to_stride) {
  for (int64_t l = 0; l < L; l += 2, w += 2 * K, to += 2) {
    int64_t r = 0;
#if defined(__AVX512VL__)  // registers for twice as many; only bf16, which is widened once then, gains by them
    if constexpr (std::is_same_v<Stored, Half>)
      for (; r + 2 * QUAD <= n; r += 2 * QUAD) dots<2 * QUAD>(rows + r * (K + PAD), w, K, to + r * to_stride, to_stride);
#endif
    for (; r < n; r += QUAD) dots<QUAD>(rows + r * (K + PAD), w, K, to + r * to_stride, to_stride);
  }
}

template <class Stored>
void forward_few(const Layer& layer, const Item& item, const FewSpace& space) {
  const Expert<Stored> expert(layer, item.expert);
  const int64_t H = expert.H, F = expert.F, n = item.high - item.low, padded = round_up(n, QUAD);
  for (int s = 0; s < layer.sources; s++) {
    const int64_t K = layer.source[s].width;
    for (int64_t r = 0; r < padded; r++)
      for (int64_t k = 0; k < K; k++) space.x[s][r * (K + PAD) + k] = r < n ? widen(expert.rows(s, item.low + r)[k]) : 0;
  }
  for (int part : {0, 1})
    times_lines(space.x[part * (layer.sources - 1)], padded, expert.weight(part), F, expert.width(part),
                space.h + part * F, 2 * F);
  Stored *h = (Stored*)layer.h + item.low * 2 * F, *out = (Stored*)layer.out + item.low * H;
  for (int64_t i = 0; i < n * 2 * F; i++) narrow(space.h[i], h[i]);
  for (int64_t r = 0; r < padded; r++) {
    const float *gate = space.h + r * 2 * F, *up = gate + F, p = r < n ? layer.probs[item.low + r] : 0;
    float* inner = space.inner + r * (F + PAD);
    for (int64_t f = 0; f < F; f += LANES) store(inner + f, swiglu(load(gate + f), load(up + f)) * p);
  }
  times_lines(space.inner, padded, expert.down, H, F, space.out, H);
  for (int64_t i = 0; i < n * H; i++) narrow(space.out[i], out[i]);
}

// ---- forward --------------------------------------------------------------------------------------------------------

template <class Computed>
struct ForwardSpace {
  Computed *x[2];                   // rows that must be widened
  Computed *weight[2], *down;       // columns of a slice of weights, gate and up
  Computed *inner;                  // [n][f]
  float *h[2], *out;                // a block of gate and up; [n][H]
};

// A block of h and of inner from the products [n][m] of gate and up, whose rows are BLOCK apart.
template <class Stored, class Computed>
void activate(const float* gate, const float* up, const float* p, int64_t n, int64_t m, Stored* h, int64_t ffn,
              Computed* inner, int64_t stride) {
  for (int64_t r = 0; r < n; r++, gate += BLOCK, up += BLOCK, h += 2 * ffn, inner += stride)
    for (int64_t f = 0; f < m; f += LANES) {
      const Vector g = load(gate + f), u = load(up + f);
      store(h + f, g), store(h + ffn + f, u), store(inner + f, swiglu(g, u) * p[r]);
    }
}

// Lines [L][K] of a weight as right operands [K][BLOCK or less], one after another.
template <class Stored, class Computed>
void lines_to_columns(const Stored* lines, int64_t stride, int64_t L, int64_t K, Computed* columns) {
  for (int64_t l = 0; l < L; l += BLOCK) to_columns(lines + l * stride, stride, std::min(BLOCK, L - l), K, columns + l * K);
}

template <class Stored, class Computed>
void forward(const Layer& layer, const Item& item, const ForwardSpace<Computed>& space) {
  const Expert<Stored> expert(layer, item.expert);
  const int64_t H = expert.H, F = expert.F, stride = expert.slice + PAD;
  for (int64_t start = item.low; start < item.high; start += CHUNK) {
    const int64_t rows = std::min(CHUNK, item.high - start);
    // A block of columns, in the cache, meets all rows, GROUP at a time.
    auto each_block = [&](int64_t columns, auto work) {
      for (int64_t column = 0; column < columns; column += BLOCK)
        for (int64_t low = 0; low < rows; low += GROUP)
          work(column, std::min(BLOCK, columns - column), low, std::min(GROUP, rows - low));
    };
    Matrix<Computed> x[2];
    for (int s = 0; s < layer.sources; s++) {
      const int64_t K = layer.source[s].width;
      x[s] = left(expert.rows(s, start), K, rows, K, space.x[s]);
    }
    for (int64_t slice = 0; slice < F; slice += expert.slice) {
      const int64_t f_here = std::min(expert.slice, F - slice);
      if (start == item.low || expert.slice < F) {
        for (int part : {0, 1}) {
          const int64_t K = expert.width(part);
          lines_to_columns(expert.weight(part) + slice * K, K, f_here, K, space.weight[part]);
        }
        lines_to_columns(expert.down + slice, F, H, f_here, space.down);
      }
      each_block(f_here, [&](int64_t f, int64_t m, int64_t low, int64_t n) {
        for (int part : {0, 1}) {
          const int64_t K = expert.width(part);
          multiply(n, m, K, {x[part * (layer.sources - 1)].data + low * K, K},
                   {space.weight[part] + f * K, round_up(m, COLUMNS)}, space.h[part], BLOCK);
        }
        activate(space.h[0], space.h[1], layer.probs + start + low, n, m,
                 (Stored*)layer.h + (start + low) * 2 * F + slice + f, F, space.inner + low * stride + f, stride);
      });
      each_block(H, [&](int64_t o, int64_t m, int64_t low, int64_t n) {
        Stored* out = (Stored*)layer.out + (start + low) * H + o;
        float* sums = std::is_same_v<Stored, float> ? (float*)out : space.out + low * H + o;
        multiply(n, m, f_here, {space.inner + low * stride, stride}, {space.down + o * f_here, round_up(m, COLUMNS)}, sums,
                 H, slice > 0);
        if (std::is_same_v<Stored, Half> && slice + f_here == F)
          for (int64_t r = 0; r < n; r++)
            for (int64_t k = 0; k < m; k += LANES) store(out + r * H + k, load(sums + r * H + k));
      });
    }
  }
}

template <class Stored, class Computed>
void forward_items(const Layer& layer, const Item* items, int64_t count, int64_t* next) {
  const Expert<Stored> any(layer, 0);
  const int64_t most = std::min(CHUNK, items->high - items->low);  // the largest comes first
  const bool widens = !std::is_same_v<Stored, Computed>;
  auto layout = [&](Workspace& memory) {
    ForwardSpace<Computed> space;
    for (int s : {0, 1})
      space.x[s] = memory.take<Computed>(widens && s < layer.sources ? most * layer.source[s].width : 0);
    for (int part : {0, 1}) space.weight[part] = memory.take<Computed>(round_up(any.slice, COLUMNS) * any.width(part));
    space.down = memory.take<Computed>(any.slice * round_up(any.H, COLUMNS));
    space.inner = memory.take<Computed>(most * (any.slice + PAD));
    for (auto& h : space.h) h = memory.take<float>(BLOCK * GROUP);
    space.out = memory.take<float>(std::is_same_v<Stored, Half> ? most * any.H : 0);
    FewSpace few;
    const int64_t n = round_up(layer.few, QUAD);
    for (int s : {0, 1}) few.x[s] = memory.take<float>(s < layer.sources ? n * (layer.source[s].width + PAD) : 0);
    few.h = memory.take<float>(n * 2 * any.F);
    few.inner = memory.take<float>(n * (any.F + PAD));
    few.out = memory.take<float>(n * any.H);
    return std::pair(space, few);
  };
  each_item(count, next, layout, [&](int64_t i, auto& space) {
    if (items[i].high - items[i].low <= layer.few) forward_few<Stored>(layer, items[i], space.second);
    else forward<Stored>(layer, items[i], space.first);
  });
}

// ---- backward -------------------------------------------------------------------------------------------------------

template <class Computed>
struct BackwardSpace {
  Computed *out, *out_columns;      // gradient of out, [n][H] and [H][n]
  Computed *h, *h_columns;          // gradient of a slice of h, [n][2f] and [2f][n]
  Computed *inner, *inner_room;     // [n][f]
  Computed *x_room[2];              // right operands from rows of sources,
  Computed *weight[2], *down;       // and from a slice of weights, gate and up
  float *grad_inner, *grad_x;       // [n][f], [n][K]
  float *block, *sums;              // gradients of a block of a weight; of the slices of all weights
  int64_t stride;                   // of what has columns
};

// A row: gradients of gate, up and p, and inner, from the gradient of inner.
template <class Stored, class Computed>
float activate_backward(const Stored* gate, const Stored* up, float p, int64_t f, const float* grad, Computed* grad_gate,
                        Computed* grad_up, Computed* inner) {
  Vector sum = {};
  for (int64_t i = 0; i < f; i += LANES) {
    const Vector g = load(gate + i), u = load(up + i), s = sigmoid(g), silu = g * s, d = load(grad + i), weighted = d * p;
    sum += d * silu * u;
    store(grad_gate + i, weighted * u * s * (1.0f + g * (1.0f - s)));
    store(grad_up + i, weighted * silu);
    store(inner + i, silu * u * p);
  }
  float total = 0;
  for (int i = 0; i < LANES; i++) total += sum[i];
  return total;
}

// A weight's gradient where it lies: set, added to, or, where nothing will be read of it soon, written past the cache.
template <class Stored>
void write_gradient(const float* from, int64_t rows, int64_t columns, Stored* to, int64_t stride, bool adds) {
  constexpr int64_t STEP = LANES * sizeof(float) / sizeof(Stored);
  const bool aligned = (uintptr_t)to % 32 == 0 && stride % STEP == 0 && columns % STEP == 0;
  for (int64_t r = 0; r < rows; r++, from += columns, to += stride) {
    if (adds) {
      for (int64_t k = 0; k < columns; k++) narrow(widen(to[k]) + from[k], to[k]);
      continue;
    }
#if defined(__AVX__)
    if (aligned) {
      for (int64_t k = 0; k < columns; k += STEP) {
        stream(to + k, from + k);
      }
      continue;
    }
#endif
    for (int64_t k = 0; k < columns; k++) narrow(from[k], to[k]);
  }
}

template <class Stored, class Computed>
void backward(const Layer& layer, const Item& item, const BackwardSpace<Computed>& space) {
  const Expert<Stored> expert(layer, item.expert);
  const int64_t H = expert.H, F = expert.F, stride = space.stride;
  const bool one_chunk = item.high - item.low <= CHUNK;
  for (int64_t slice = 0; slice < F; slice += expert.slice) {
    const int64_t f = std::min(expert.slice, F - slice), h_stride = 2 * f + PAD;
    const auto down = right(expert.down + slice, F, H, f, space.down);
    Matrix<Computed> weight[2];
    for (int part : {0, 1}) {
      const int64_t K = expert.width(part);
      weight[part] = right(expert.weight(part) + slice * K, K, f, K, space.weight[part]);
    }
    for (int64_t start = item.low; start < item.high; start += CHUNK) {
      const int64_t n = std::min(CHUNK, item.high - start);
      const bool first = start == item.low, last = start + n == item.high;
      float* sums = space.sums;
      // The gradient of lines of a weight, [rows][N] += L^T [rows][n] R [n][N], which lies `offset` into `gradient`.
      auto add_to = [&](auto* to, int64_t rows, int64_t N, int64_t to_stride, const Computed* columns,
                        Matrix<Computed> by) {
        typedef std::remove_pointer_t<decltype(to)> Gradient;
        for (int64_t low = 0; low < rows; low += BLOCK, columns += BLOCK * stride, to += BLOCK * to_stride) {
          const int64_t m = std::min(BLOCK, rows - low);
          if constexpr (std::is_same_v<Gradient, float>) {
            if (!one_chunk) {
              multiply(m, N, n, {columns, stride}, by, to, to_stride, item.adds || !first);
              continue;
            }
          }
          float* block = one_chunk ? space.block : sums + low * N;
          multiply(m, N, n, {columns, stride}, by, block, N, !first);
          if (last) write_gradient(block, m, N, to, to_stride, item.adds);
        }
        sums += one_chunk ? 0 : rows * N;
      };
      auto add_gradient = [&](void* gradient, int64_t offset, auto... rest) {
        if (item.fp32) add_to((float*)gradient + offset, rest...);
        else add_to((Stored*)gradient + offset, rest...);
      };

      const auto grad_out = left((const Stored*)layer.out + start * H, H, n, H, space.out);
      multiply(n, f, H, grad_out, down, space.grad_inner, f);
      for (int64_t r = 0; r < n; r++) {
        const Stored* h = (const Stored*)layer.h + (start + r) * 2 * F + slice;
        Computed* grad = space.h + r * h_stride;
        float& grad_prob = layer.grad_probs[start + r];
        const float sum = activate_backward(h, h + F, layer.probs[start + r], f, space.grad_inner + r * f, grad,
                                            grad + f, space.inner + r * f);
        grad_prob = slice ? grad_prob + sum : sum;
      }
      const int64_t padded = round_up(n, 2 * LANES);
      transpose(grad_out.data, grad_out.stride, n, padded, H, space.out_columns, stride);
      transpose(space.h, h_stride, n, padded, 2 * f, space.h_columns, stride);

      const auto inner = right(space.inner, f, n, f, space.inner_room);
      add_gradient(item.grad_down, slice, H, f, F, space.out_columns, inner);
      for (int s = 0; s < layer.sources; s++) {
        const int64_t K = layer.source[s].width;
        Stored* rows = (Stored*)layer.source[s].grad_rows + start * K;
        const bool direct = std::is_same_v<Stored, float> || layer.fp32_grad_rows;
        float* grad_x = direct ? (float*)layer.source[s].grad_rows + start * K : space.grad_x;
        bool add = slice > 0;
        const auto x = right(expert.rows(s, start), K, n, K, space.x_room[s]);
        for (int part : {0, 1}) {
          if (part * (layer.sources - 1) != s) continue;
          multiply(n, K, f, {space.h + part * f, h_stride}, weight[part], grad_x, K, add);
          add = true;
          add_gradient(item.grad_weight[s], (expert.first(part) + slice) * K, f, K, K,
                       space.h_columns + part * f * stride, x);
        }
        if (!direct)
          for (int64_t i = 0; i < n * K; i++) narrow(grad_x[i], rows[i]);
      }
    }
  }
}

template <class Stored, class Computed>
void backward_items(const Layer& layer, const Item* items, int64_t count, int64_t* next) {
  const Expert<Stored> any(layer, 0);
  const int64_t H = any.H, f = any.slice, largest = items->high - items->low;
  const int64_t n = round_up(std::min(CHUNK, largest), 2 * LANES);
  const bool widens = !std::is_same_v<Stored, Computed>, pairs = std::is_same_v<Computed, Half>;
  const bool bf16 = std::is_same_v<Stored, Half>;
  auto layout = [&](Workspace& memory) {
    BackwardSpace<Computed> space;
    space.stride = n + PAD;
    space.out = memory.take<Computed>(widens ? n * H : 0);
    space.out_columns = memory.take<Computed>(H * space.stride);
    space.h = memory.take<Computed>(n * (2 * f + PAD));
    space.h_columns = memory.take<Computed>(2 * f * space.stride);
    space.inner = memory.take<Computed>(n * f);
    space.inner_room = memory.take<Computed>(pairs ? paired(n, f) : 0);
    int64_t widths = 0;
    for (int s : {0, 1}) {
      const int64_t K = s < layer.sources ? layer.source[s].width : 0;
      space.x_room[s] = memory.take<Computed>(bf16 ? paired(n, K) : 0);
      widths += K * (3 - layer.sources);
    }
    for (int part : {0, 1}) space.weight[part] = memory.take<Computed>(bf16 ? paired(f, any.width(part)) : 0);
    space.down = memory.take<Computed>(bf16 ? paired(H, f) : 0);
    space.grad_inner = memory.take<float>(n * f);
    space.grad_x = memory.take<float>(bf16 ? n * any.widest() : 0);
    space.block = memory.take<float>(BLOCK * any.widest());
    space.sums = memory.take<float>(bf16 && largest > CHUNK ? (H + widths) * f : 0);
    return space;
  };
  each_item(count, next, layout, [&](int64_t i, auto& space) { backward<Stored, Computed>(layer, items[i], space); });
#if defined(__AVX__)
  _mm_sfence();
#endif
}

}  // namespace

// ---- what Python calls ----------------------------------------------------------------------------------------------

extern "C" {

void dsmoe_swiglu_forward(const Layer* layer, const Item* items, int64_t count, int64_t* next) {
  const auto work = !layer->stored_bf16    ? forward_items<float, float>
                    : layer->computed_bf16 ? forward_items<Half, Half>
                                           : forward_items<Half, float>;
  work(*layer, items, count, next);
}

void dsmoe_swiglu_backward(const Layer* layer, const Item* items, int64_t count, int64_t* next) {
  const auto work = !layer->stored_bf16    ? backward_items<float, float>
                    : layer->computed_bf16 ? backward_items<Half, Half>
                                           : backward_items<Half, float>;
  work(*layer, items, count, next);
}
}
