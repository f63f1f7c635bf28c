// What all kernels share: vectors of this machine's width, exp, and one tile of a matrix product.
//
// Vectors are the compilers' own extension (GCC, Clang), so one source serves AVX2, AVX-512 and NEON.
#pragma once
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#if !defined(VECTOR_FLOATS)  // tests set it, to run each width on any machine
#if defined(__AVX512F__)
#define VECTOR_FLOATS 16
#elif defined(__AVX__)
#define VECTOR_FLOATS 8
#else
#define VECTOR_FLOATS 4
#endif
#endif

constexpr int WIDTH = VECTOR_FLOATS;  // floats in a vector
// Rows of a tile: with 8 floats 12 accumulators, 2 columns of b and one value of a, which is 15 of 16 registers.
constexpr int TILE_ROWS = WIDTH == 16 ? 12 : WIDTH == 8 ? 6 : 8;
constexpr int TILE_VECTORS = 2;

typedef float Vector __attribute__((vector_size(WIDTH * 4)));
typedef int32_t IntVector __attribute__((vector_size(WIDTH * 4)));
typedef float InMemory __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));
typedef int32_t IntInMemory __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));

static inline Vector load(const float* from) { return *reinterpret_cast<const InMemory*>(from); }
static inline void store(float* to, Vector value) { *reinterpret_cast<InMemory*>(to) = value; }
static inline Vector all(float value) { return value - Vector{}; }

// The larger of two; b where either is NaN. The compilers will not use the one instruction for it by themselves.
static inline Vector larger(Vector a, Vector b) {
#if VECTOR_FLOATS == 16 && defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif VECTOR_FLOATS == 8 && defined(__AVX__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

static inline float sum(Vector v) {
  float total = 0;
  for (int lane = 0; lane < WIDTH; ++lane) total += v[lane];
  return total;
}

static inline float largest(Vector v) {
  float most = v[0];
  for (int lane = 1; lane < WIDTH; ++lane) most = v[lane] > most ? v[lane] : most;
  return most;
}

static inline int64_t round_up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

// e^x for x <= 88, to about 1 ulp: 2^n * e^r with |r| <= ln(2)/2. Below -87 it is e^-87, which is 1.6e-38; NaN stays.
static inline Vector exponential(Vector x) {
  const Vector magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest whole number
  x = larger(all(-87.0f), x);
  const Vector shifted = x * 1.44269504088896341f + magic;
  const Vector whole = shifted - magic;
  Vector rest = x - whole * 0.693359375f;  // ln(2) in two parts
  rest = rest + whole * 2.12194440e-4f;
  Vector power = rest * 1.9875691500e-4f + 1.3981999507e-3f;
  power = power * rest + 8.3334519073e-3f;
  power = power * rest + 4.1665795894e-2f;
  power = power * rest + 1.6666665459e-1f;
  power = power * rest + 5.0000001201e-1f;
  power = power * (rest * rest) + rest + 1.0f;
  const IntVector exponent = (reinterpret_cast<IntVector>(shifted) - (0x4B400000 - 127)) << 23;
  return power * reinterpret_cast<Vector>(exponent);
}

// c[row][column] = (or +=) sum over k of a[row * a_row + k * a_k] * b[k * b_k + column], for ROWS x (VECTORS * WIDTH).
template <int ROWS, int VECTORS, bool ADD>
static inline void tile(const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t b_k, float* c,
                        int64_t c_row, int64_t depth) {
  Vector total[ROWS][VECTORS];
#pragma GCC unroll 16
  for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) total[row][v] = ADD ? load(c + row * c_row + v * WIDTH) : Vector{};
  for (int64_t k = 0; k < depth; ++k) {
    Vector column[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) column[v] = load(b + k * b_k + v * WIDTH);
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; ++row) {
      const float factor = a[row * a_row + k * a_k];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) total[row][v] += factor * column[v];
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) store(c + row * c_row + v * WIDTH, total[row][v]);
}

// `rows` x `columns` of the product above, rows <= TILE_ROWS; columns is a multiple of WIDTH.
template <int ROWS, bool ADD>
static void row_of_tiles(int64_t rows, const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t b_k,
                         float* c, int64_t c_row, int64_t columns, int64_t depth) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) return row_of_tiles<ROWS - 1, ADD>(rows, a, a_row, a_k, b, b_k, c, c_row, columns, depth);
  }
  int64_t column = 0;
  for (; column + TILE_VECTORS * WIDTH <= columns; column += TILE_VECTORS * WIDTH)
    tile<ROWS, TILE_VECTORS, ADD>(a, a_row, a_k, b + column, b_k, c + column, c_row, depth);
  if (column < columns) tile<ROWS, 1, ADD>(a, a_row, a_k, b + column, b_k, c + column, c_row, depth);
}
