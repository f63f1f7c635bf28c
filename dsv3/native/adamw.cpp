// One AdamW step over a piece of weights: moments read, stepped and rounded back in a single pass over memory.
#include <cmath>

#include "vector.h"

namespace {

inline float widen(uint16_t half) {
  const uint32_t bits = uint32_t(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint16_t round_to_even(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return uint16_t(value != value ? 0x7FC0 : rounded);
}

inline float widen(float same) { return same; }
template <typename Kept>
inline Kept narrow(float value) {
  if constexpr (sizeof(Kept) == 2) return round_to_even(value);
  else return value;
}

struct Step {
  float gradient_scale, rate, beta1, beta2, correction1, root_correction2, epsilon, keep;
};

template <typename Kept>
void step(float* weight, const float* gradient, Kept* first, Kept* second, int64_t count, Step s) {
  const float size = s.rate / s.correction1;
#pragma omp parallel for simd schedule(static)
  for (int64_t i = 0; i < count; ++i) {
    const float slope = gradient[i] * s.gradient_scale;
    const float m = widen(first[i]) + (1.0f - s.beta1) * (slope - widen(first[i]));
    const float v = s.beta2 * widen(second[i]) + (1.0f - s.beta2) * slope * slope;
    first[i] = narrow<Kept>(m);
    second[i] = narrow<Kept>(v);
    weight[i] = weight[i] * s.keep - size * m / (std::sqrt(v) / s.root_correction2 + s.epsilon);
  }
}

}  // namespace

// `keep` is 1 - learning rate * weight decay; moments are BF16 or FP32.
extern "C" void adamw_step(float* weight, const float* gradient, void* first, void* second, int64_t bf16,
                           int64_t count, float gradient_scale, float rate, float beta1, float beta2,
                           float correction1, float root_correction2, float epsilon, float keep) {
  const Step s{gradient_scale, rate, beta1, beta2, correction1, root_correction2, epsilon, keep};
  if (bf16)
    step(weight, gradient, static_cast<uint16_t*>(first), static_cast<uint16_t*>(second), count, s);
  else
    step(weight, gradient, static_cast<float*>(first), static_cast<float*>(second), count, s);
}
