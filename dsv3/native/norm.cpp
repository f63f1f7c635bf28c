// RMSNorm, forward and backward. Rows of x may lie further apart than they are long: a latent beside its rope key.
#include <algorithm>
#include <cmath>

#include "vector.h"

namespace {

constexpr int64_t PIECES = 16;  // partial sums of the gain's gradient; fixed, so that threads do not change the result

float dot(const float* a, const float* b, int64_t dim) {
  Vector total{};
  int64_t d = 0;
  for (; d + WIDTH <= dim; d += WIDTH) total += load(a + d) * load(b + d);
  float rest = sum(total);
  for (; d < dim; ++d) rest += a[d] * b[d];
  return rest;
}

}  // namespace

extern "C" void rms_norm_forward(const float* x, int64_t x_row, const float* gain, float* output, float* inverse,
                                 int64_t rows, int64_t dim, float epsilon) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const float* from = x + row * x_row;
    float* to = output + row * dim;
    const float scale = 1.0f / std::sqrt(dot(from, from, dim) / dim + epsilon);
    inverse[row] = scale;
    for (int64_t d = 0; d < dim; ++d) to[d] = from[d] * scale * gain[d];
  }
}

// of_x = inverse * (g - n * mean(g * n)) with g = of_output * gain and n = x * inverse; of_gain = sum of_output * n.
extern "C" void rms_norm_backward(const float* of_output, const float* x, int64_t x_row, const float* gain,
                                  const float* inverse, float* of_x, float* of_gain, int64_t rows, int64_t dim) {
  std::vector<float> partial(PIECES * dim);
#pragma omp parallel for schedule(static)
  for (int64_t piece = 0; piece < PIECES; ++piece) {
    float* sums = &partial[piece * dim];
    const int64_t end = (piece + 1) * rows / PIECES;
    for (int64_t row = piece * rows / PIECES; row < end; ++row) {
      const float *from = x + row * x_row, *slope = of_output + row * dim;
      float* to = of_x + row * dim;
      const float scale = inverse[row];
      for (int64_t d = 0; d < dim; ++d) to[d] = slope[d] * gain[d];
      const float mean = dot(to, from, dim) * scale * scale / dim;
      for (int64_t d = 0; d < dim; ++d) {
        to[d] = scale * (to[d] - from[d] * mean);
        sums[d] += slope[d] * from[d] * scale;
      }
    }
  }
  std::fill(of_gain, of_gain + dim, 0.0f);
  for (int64_t piece = 0; piece < PIECES; ++piece)
    for (int64_t d = 0; d < dim; ++d) of_gain[d] += partial[piece * dim + d];
}
