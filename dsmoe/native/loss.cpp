// Cross entropy over a vocabulary on a CPU, fp32, with its gradients: a block of rows at a time.
//
//     loss = logsumexp(W x) - (W x)[label];   grad = w (softmax(W x) - onehot(label))
//
// Shapes: B rows of a block, H hidden, V vocabulary. Logits of a group of 32 rows are columns [V][c], so that maxima and
// sums over the vocabulary run along memory for all its rows at once.

#include <cmath>

#include "kernels.h"

namespace {

constexpr int64_t PART = 64;  // logits of a partial sum

}  // namespace

struct Loss {
  int64_t rows, hidden, vocabulary;
  int64_t strip;          // lines of W' that a thread takes at a time
  const float* x;         // [B][H]
  const float* w;         // [V][H]
  const int64_t* labels;  // [B]
  const float* weights;   // [B]
  float* logits;          // [B / GROUP, rounded up][V][GROUP]; become gradients
  float* losses;          // [B], not weighted
  float* grad_x;          // [B][H]; null: no gradients
  float* grad_w;          // [V][H]
  int64_t add;            // to grad_w, instead of setting it
};

// Logits of a group, their loss and, in place of them, their gradients.
static void softmax(const Loss& loss, float* logits, int64_t low, int64_t n, int c) {
  const int64_t V = loss.vocabulary;
  for (int r = 0; r < c; r += LANES) {
    Vector largest = at(logits + r), sum = {}, scale = {};
    for (int64_t v = 1; v < V; v++) largest = choose(at(logits + v * c + r) > largest, at(logits + v * c + r), largest);
    float label[LANES] = {};
    for (int i = 0; i < LANES && r + i < n; i++) label[i] = logits[loss.labels[low + r + i] * c + r + i];
    for (int64_t start = 0; start < V; start += PART) {
      Vector part = {};
      for (int64_t v = start; v < std::min(V, start + PART); v++)
        part += at(logits + v * c + r) = exponential(at(logits + v * c + r) - largest);
      sum += part;
    }
    for (int i = 0; i < LANES && r + i < n; i++) {
      loss.losses[low + r + i] = largest[i] + std::log(sum[i]) - label[i];
      scale[i] = loss.weights[low + r + i] / sum[i];
    }
    if (!loss.grad_x) continue;
    for (int64_t v = 0; v < V; v++) at(logits + v * c + r) *= scale;
    for (int i = 0; i < LANES && r + i < n; i++)
      logits[loss.labels[low + r + i] * c + r + i] -= loss.weights[low + r + i];
  }
}

extern "C" {

// Losses and gradients of rows: an item is a group.
int dsmoe_loss_rows(const Loss* loss, const void*, int64_t count, int64_t* next) {
  const int64_t H = loss->hidden, V = loss->vocabulary;
  float* columns = scratch(H * GROUP);
  if (!columns) return 1;
  for (int64_t i; (i = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < count;) {
    const int64_t low = i * GROUP, n = std::min<int64_t>(GROUP, loss->rows - low);
    const int c = width(n);
    float* logits = loss->logits + i * V * GROUP;
    to_columns(loss->x + low * H, H, n, H, columns, c);
    times(loss->w, V, H, columns, logits, c);
    softmax(*loss, logits, low, n, c);
    if (!loss->grad_x) continue;
    times_transposed(loss->w, V, H, logits, columns, c);
    to_rows(columns, c, n, H, loss->grad_x + low * H, H);
  }
  return 0;
}

// Gradients of W, once those of the logits are there: an item is a strip of its lines.
int dsmoe_loss_weights(const Loss* loss, const void*, int64_t count, int64_t* next) {
  const int64_t H = loss->hidden, V = loss->vocabulary;
  for (int64_t i; (i = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < count;) {
    const int64_t low = i * loss->strip, lines = std::min(loss->strip, V - low);
    outer(loss->rows, {loss->logits, V * GROUP, low}, loss->x, lines, H, loss->grad_w + low * H,
          loss->add ? Write::ADD : Write::SET);
  }
  return 0;
}
}
