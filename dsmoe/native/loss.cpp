// Cross entropy over a vocabulary on a CPU, fp32 or bf16, with its gradients: a block of rows at a time.
//
//     loss = logsumexp(W x) - (W x)[label];   grad = w (softmax(W x) - onehot(label))
//
// Shapes: B rows of a block, H hidden, V vocabulary. Logits are transposed, [V][B], so that maxima and sums over the
// vocabulary run along memory for many rows at once.

#include <cmath>

#include "kernels.h"

struct Loss {
  int64_t stored_bf16, computed_bf16;
  int64_t rows, hidden, vocabulary;
  int64_t item_rows;      // that a thread takes at a time, a multiple of COLUMNS
  int64_t strip;          // lines of W' that a thread takes at a time
  const void* x;          // [B][H]
  const void* w;          // [V][H]
  const int64_t* labels;  // [B]
  const float* weights;   // [B]
  float* logits;          // [V][B, rounded up to COLUMNS]; become gradients
  float* losses;          // [B], not weighted
  void* grad_x;           // [B][H]; null: no gradients
  float* grad_w;          // [V][H]
  int64_t add;            // to grad_w, instead of setting it

  int64_t stride() const { return round_up(rows, COLUMNS); }
};

namespace {

template <class Computed>
struct RowSpace {
  Computed *columns, *room, *block;
  float *grad, *largest, *sum, *scale;
};

// Loss and, in place of their logits, gradients of rows from `low` on.
template <class Computed>
void softmax(const Loss& loss, float* logits, int64_t low, int64_t n, int64_t c, const RowSpace<Computed>& space) {
  constexpr int64_t PART = 64;  // logits of a partial sum
  const int64_t V = loss.vocabulary, stride = loss.stride();
  float *largest = space.largest, *sum = space.sum, *part = space.scale;
  std::copy_n(logits, c, largest);
  for (int64_t v = 1; v < V; v++)
    for (int64_t r = 0; r < c; r++) largest[r] = std::max(largest[r], logits[v * stride + r]);
  for (int64_t r = 0; r < n; r++) loss.losses[low + r] = largest[r] - logits[loss.labels[low + r] * stride + r];
  std::fill_n(sum, c, 0.0f);
  for (int64_t start = 0; start < V; start += PART) {
    std::fill_n(part, c, 0.0f);
    for (int64_t v = start; v < std::min(V, start + PART); v++)
      for (int64_t r = 0; r < c; r++) part[r] += logits[v * stride + r] = exponential(logits[v * stride + r] - largest[r]);
    for (int64_t r = 0; r < c; r++) sum[r] += part[r];
  }
  for (int64_t r = 0; r < n; r++) loss.losses[low + r] += std::log(sum[r]);
  if (!loss.grad_x) return;
  float* scale = space.scale;
  std::fill_n(scale, c, 0.0f);
  for (int64_t r = 0; r < n; r++) scale[r] = loss.weights[low + r] / sum[r];
  for (int64_t v = 0; v < V; v++)
    for (int64_t r = 0; r < c; r++) logits[v * stride + r] *= scale[r];
  for (int64_t r = 0; r < n; r++) logits[loss.labels[low + r] * stride + r] -= loss.weights[low + r];
}

template <class Stored, class Computed>
void rows_of(const Loss& loss, int64_t count, int64_t* next) {
  const int64_t H = loss.hidden, V = loss.vocabulary, stride = loss.stride(), most = loss.item_rows;
  const bool bf16 = std::is_same_v<Stored, Half>;
  auto layout = [&](Workspace& memory) {
    RowSpace<Computed> space;
    space.columns = memory.take<Computed>(H * most);
    space.room = memory.take<Computed>(bf16 ? paired(BLOCK, H) : 0);
    space.block = memory.take<Computed>(most * BLOCK);
    space.grad = memory.take<float>(bf16 ? most * H : 0);
    for (float** p : {&space.largest, &space.sum, &space.scale}) *p = memory.take<float>(most);
    return space;
  };
  each_item(count, next, layout, [&](int64_t i, const RowSpace<Computed>& space) {
    const int64_t low = i * most, n = std::min(most, loss.rows - low), c = round_up(n, COLUMNS);
    const Stored *x = (const Stored*)loss.x + low * H, *w = (const Stored*)loss.w;
    float* logits = loss.logits + low;
    to_columns(x, H, n, H, space.columns);
    for (int64_t v = 0; v < V; v += BLOCK) {
      const int64_t m = std::min(BLOCK, V - v);
      multiply(m, c, H, left(w + v * H, H, m, H, space.room), {space.columns, c}, logits + v * stride, stride);
    }
    softmax(loss, logits, low, n, c, space);
    if (!loss.grad_x) return;
    Stored* grad_x = (Stored*)loss.grad_x + low * H;
    float* grad = bf16 ? space.grad : (float*)grad_x;
    for (int64_t v = 0; v < V; v += BLOCK) {
      const int64_t m = std::min(BLOCK, V - v), padded = round_up(m, LANES);
      transpose(logits + v * stride, stride, m, padded, n, space.block, BLOCK);
      multiply(n, H, m, {space.block, BLOCK}, right(w + v * H, H, m, H, space.room), grad, H, v > 0);
    }
    if constexpr (std::is_same_v<Stored, Half>)
      for (int64_t k = 0; k < n * H; k++) narrow(grad[k], grad_x[k]);
  });
}

template <class Computed>
struct WeightSpace {
  Computed *rows, *block;
};

template <class Stored, class Computed>
void weights_of(const Loss& loss, int64_t count, int64_t* next) {
  const int64_t H = loss.hidden, V = loss.vocabulary, B = loss.rows, stride = loss.stride();
  const bool bf16 = std::is_same_v<Stored, Half>;
  auto layout = [&](Workspace& memory) {
    return WeightSpace<Computed>{memory.take<Computed>(bf16 ? paired(B, H) : 0),
                                 memory.take<Computed>(bf16 ? BLOCK * stride : 0)};
  };
  each_item(count, next, layout, [&](int64_t i, const WeightSpace<Computed>& space) {
    const auto x = right((const Stored*)loss.x, H, B, H, space.rows);
    for (int64_t v = i * loss.strip; v < std::min(V, (i + 1) * loss.strip); v += BLOCK) {
      const int64_t m = std::min({BLOCK, V - v, (i + 1) * loss.strip - v});
      const float* from = loss.logits + v * stride;
      Matrix<Computed> grad;
      if constexpr (std::is_same_v<Computed, float>) {
        grad = {from, stride};
      } else {
        for (int64_t k = 0; k < m * stride; k++) narrow(from[k], space.block[k]);
        grad = {space.block, stride};
      }
      multiply(m, H, B, grad, x, loss.grad_w + v * H, H, loss.add);
    }
  });
}

}  // namespace

extern "C" {

// Losses and gradients of rows: an item is `item_rows` of them.
void dsmoe_loss_rows(const Loss* loss, const void*, int64_t count, int64_t* next) {
  const auto work = !loss->stored_bf16    ? rows_of<float, float>
                    : loss->computed_bf16 ? rows_of<Half, Half>
                                          : rows_of<Half, float>;
  work(*loss, count, next);
}

// Gradients of W, once those of the logits are there: an item is a strip of its lines.
void dsmoe_loss_weights(const Loss* loss, const void*, int64_t count, int64_t* next) {
  const auto work = !loss->stored_bf16    ? weights_of<float, float>
                    : loss->computed_bf16 ? weights_of<Half, Half>
                                          : weights_of<Half, float>;
  work(*loss, count, next);
}
}
