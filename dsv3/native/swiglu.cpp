// SwiGLU, silu(gate) * up, times one factor a row where experts weigh their rows; forward and backward.
//
// Gate and up may be two tensors or two halves of one: rows lie `from_row` apart, those of their gradients `to_row`.
#include "vector.h"

namespace {

struct Silu {
  Vector sigmoid, value;
};

inline Silu silu(Vector gate) {
  const Vector small = exponential(-larger(gate, -gate));  // e^-|gate|: cannot overflow
  const Vector share = 1.0f / (1.0f + small);
  Vector sigmoid = gate < 0.0f ? small * share : share;
  sigmoid = gate < -87.0f ? Vector{} : sigmoid;  // `small` ends at e^-87, which times a huge gate is no longer 0
  return {sigmoid, gate * sigmoid};
}

// The last vector of a row whose width is not a multiple of WIDTH is worked on in a buffer.
struct Padded {
  float numbers[WIDTH] = {};
  Padded() = default;
  Padded(const float* from, int64_t count) { std::memcpy(numbers, from, count * sizeof(float)); }
  Vector read() const { return load(numbers); }
  void write(float* to, int64_t count, Vector value) {
    store(numbers, value);
    std::memcpy(to, numbers, count * sizeof(float));
  }
};

}  // namespace

extern "C" void swiglu_forward(const float* gate, const float* up, int64_t from_row, const float* factors,
                               float* output, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const float *g = gate + row * from_row, *u = up + row * from_row;
    float* to = output + row * width;
    const float factor = factors ? factors[row] : 1.0f;
    int64_t d = 0;
    for (; d + WIDTH <= width; d += WIDTH) store(to + d, silu(load(g + d)).value * load(u + d) * factor);
    if (const int64_t left = width - d)
      Padded().write(to + d, left, silu(Padded(g + d, left).read()).value * Padded(u + d, left).read() * factor);
  }
}

extern "C" void swiglu_backward(const float* of_output, const float* gate, const float* up, int64_t from_row,
                                const float* factors, float* of_gate, float* of_up, int64_t to_row, float* of_factors,
                                int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const float *g = gate + row * from_row, *u = up + row * from_row, *slope = of_output + row * width;
    float *to_gate = of_gate + row * to_row, *to_up = of_up + row * to_row;
    const float factor = factors ? factors[row] : 1.0f;
    Vector total{};
    int64_t d = 0;
    for (; d + WIDTH <= width; d += WIDTH) {
      const Vector at = load(g + d), lift = load(u + d), incoming = load(slope + d);
      const Silu s = silu(at);
      total += incoming * s.value * lift;
      store(to_up + d, incoming * factor * s.value);
      store(to_gate + d, incoming * factor * lift * (s.sigmoid + s.value * (1.0f - s.sigmoid)));
    }
    if (const int64_t left = width - d) {
      const Vector at = Padded(g + d, left).read(), lift = Padded(u + d, left).read();
      const Vector incoming = Padded(slope + d, left).read();
      const Silu s = silu(at);
      total += incoming * s.value * lift;
      Padded().write(to_up + d, left, incoming * factor * s.value);
      Padded().write(to_gate + d, left, incoming * factor * lift * (s.sigmoid + s.value * (1.0f - s.sigmoid)));
    }
    if (of_factors) of_factors[row] = sum(total);
  }
}
