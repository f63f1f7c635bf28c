// Cross-entropy of rows of logits, and in their place its gradient: softmax minus one-hot, times the row's weight.
#include <cmath>
#include <limits>

#include "vector.h"

// `losses[row]` becomes -log softmax(logits)[target], before its weight. A row of weight 0 has loss and gradient 0,
// whatever its target. With `slopes`, logits are overwritten by the gradient.
extern "C" void cross_entropy_rows(float* logits, const int64_t* targets, const float* weights, float* losses,
                                   int64_t slopes, int64_t rows, int64_t vocab) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    float* line = logits + row * vocab;
    const float weight = weights[row];
    if (weight == 0.0f) {
      losses[row] = 0.0f;
      if (slopes)
        for (int64_t v = 0; v < vocab; ++v) line[v] = 0.0f;
      continue;
    }
    const int64_t even = vocab - vocab % WIDTH;
    Vector top = all(-std::numeric_limits<float>::infinity());
    for (int64_t v = 0; v < even; v += WIDTH) top = larger(load(line + v), top);
    float most = largest(top);
    for (int64_t v = even; v < vocab; ++v) most = line[v] > most ? line[v] : most;
    const float of_target = line[targets[row]] - most;
    Vector total{};
    for (int64_t v = 0; v < even; v += WIDTH) {
      const Vector power = exponential(load(line + v) - most);
      total += power;
      if (slopes) store(line + v, power);
    }
    float whole = sum(total);
    for (int64_t v = even; v < vocab; ++v) {
      const float power = std::exp(line[v] - most);
      whole += power;
      if (slopes) line[v] = power;
    }
    losses[row] = std::log(whole) - of_target;
    if (slopes) {
      const float share = weight / whole;
      for (int64_t v = 0; v < vocab; ++v) line[v] *= share;
      line[targets[row]] -= weight;
    }
  }
}
