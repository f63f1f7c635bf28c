// Numbers of one byte and of E5M6 as vectors of FP32: the formats, decoding, and vectors that a row ends within.
//
// Processors without FP8 do all of it on the bits of FP32.
#pragma once
#include "vector.h"

typedef uint8_t Bytes __attribute__((vector_size(WIDTH)));
typedef uint8_t BytesInMemory __attribute__((vector_size(WIDTH), aligned(1), may_alias));

constexpr int32_t INFINITE = 0x7F800000;

static inline IntVector bits_of(Vector x) { return reinterpret_cast<IntVector>(x); }
static inline Vector float_of(IntVector x) { return reinterpret_cast<Vector>(x); }
static inline IntVector all_bits(int32_t value) { return value - IntVector{}; }

// A format of one byte: its mantissa bits and exponent bias, and where its codes stop being numbers.
struct E4M3 {
  static constexpr int MANTISSA = 3, BIAS = 7, NOT_A_NUMBER = 0x7F, INFINITY_CODE = 0x80;
  static constexpr float LARGEST = 448.0f;
};
struct E5M2 {
  static constexpr int MANTISSA = 2, BIAS = 15, NOT_A_NUMBER = 0x7F, INFINITY_CODE = 0x7C;
  static constexpr float LARGEST = 57344.0f;
};
// FP16 without its lowest four bits; 12 bits, so it has no byte functions.
struct E5M6 {
  static constexpr int MANTISSA = 6, BIAS = 15, NOT_A_NUMBER = 0x7E0, INFINITY_CODE = 0x7C0;
  static constexpr float LARGEST = 65024.0f;
};

template <class F>
static inline Vector decode_magnitude(IntVector code) {
  constexpr int DROPPED = 23 - F::MANTISSA;
  const IntVector normal = (code << DROPPED) + ((127 - F::BIAS) << 23);
  const Vector subnormal = __builtin_convertvector(code, Vector) * __builtin_ldexpf(1.0f, 1 - F::BIAS - F::MANTISSA);
  IntVector value = code < (1 << F::MANTISSA) ? bits_of(subnormal) : normal;
  if constexpr (F::INFINITY_CODE < 0x80 || F::MANTISSA > 3) {
    value = code == F::INFINITY_CODE ? all_bits(INFINITE) : value;
    return float_of(code > F::INFINITY_CODE ? all_bits(0x7FC00000) : value);
  }
  return float_of(code == F::NOT_A_NUMBER ? all_bits(0x7FC00000) : value);
}

template <class F>
static inline Vector decode(Bytes bytes) {
  const IntVector code = __builtin_convertvector(bytes, IntVector);
  const IntVector sign = (code & 0x80) << 24;
  return float_of(bits_of(decode_magnitude<F>(code & 0x7F)) | sign);
}

static inline Vector load_some(const float* from, int64_t count) {
  if (count >= WIDTH) return load(from);
  float lanes[WIDTH] = {};
  std::memcpy(lanes, from, count * sizeof(float));
  return load(lanes);
}
static inline void store_some(float* to, Vector value, int64_t count) {
  if (count >= WIDTH) return store(to, value);
  float lanes[WIDTH];
  store(lanes, value);
  std::memcpy(to, lanes, count * sizeof(float));
}
static inline Bytes load_some(const uint8_t* from, int64_t count) {
  if (count >= WIDTH) return *reinterpret_cast<const BytesInMemory*>(from);
  uint8_t lanes[WIDTH] = {};
  std::memcpy(lanes, from, count);
  return *reinterpret_cast<const BytesInMemory*>(lanes);
}
static inline void store_some(uint8_t* to, Bytes value, int64_t count) {
  if (count >= WIDTH) {
    *reinterpret_cast<BytesInMemory*>(to) = value;
    return;
  }
  std::memcpy(to, &value, count);
}
