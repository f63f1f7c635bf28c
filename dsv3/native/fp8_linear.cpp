// A few rows of FP32 times weights in E4M3 with a scale for each block of 128 x 128: y = x @ W.T.
//
// Decoding reads every weight once for one token, so it is as fast as weights come out of memory: here they come as
// bytes, and become FP32 in registers. Each is multiplied with all rows while it is there. Work is split over the rows
// of W alone, and a sum is the same whichever rows stand beside it: lane by lane within a block, then block by block.
#include <algorithm>

#include "fp8.h"

namespace {

constexpr int64_t BLOCK = 128;
constexpr int64_t MOST_ROWS = 8;      // of x, for which sums stay in registers
constexpr int64_t COLUMNS = 16;       // of y, made by one thread at a time; they never cross a block
constexpr int64_t PAIR = 2 * WIDTH;   // weights that are decoded together

struct TwoVectors {
  Vector first, second;
};

// What `decode_pair` returns must still be multiplied by DECODED.
#if VECTOR_FLOATS == 8 && defined(__F16C__) && defined(__AVX2__)
// FP16 has the bits of E4M3 in its middle. Its exponents are 8 smaller than what they stand for, subnormals included.
constexpr float DECODED = 256.0f;
inline TwoVectors decode_pair(const uint8_t* from) {
  const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  const __m256i moved = _mm256_srai_epi16(_mm256_slli_epi16(wide, 8), 1);
  const __m256i half = _mm256_and_si256(moved, _mm256_set1_epi16(int16_t(0xBFFF)));
  const __m256i is_nan = _mm256_cmpeq_epi16(_mm256_or_si256(moved, _mm256_set1_epi16(int16_t(0xC000))), _mm256_set1_epi16(int16_t(0xFF80)));
  const __m256i exact = _mm256_or_si256(half, is_nan);
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(exact)), _mm256_cvtph_ps(_mm256_extracti128_si256(exact, 1))};
}
#else
constexpr float DECODED = 1.0f;
inline TwoVectors decode_pair(const uint8_t* from) {
  return {decode<E4M3>(load_some(from, WIDTH)), decode<E4M3>(load_some(from + WIDTH, WIDTH))};
}
#endif

// Adds the products of one block: `depth` weights of each of SIDE_BY_SIDE rows of W, with ROWS rows of x.
template <int ROWS, int SIDE_BY_SIDE>
inline void add_block(const uint8_t* weights, int64_t w_row, float scale, const float* x, int64_t x_row, int64_t depth,
                      Vector* totals) {
  Vector part[SIDE_BY_SIDE][ROWS] = {};
  int64_t k = 0;
  for (; k + PAIR <= depth; k += PAIR) {
#pragma GCC unroll 4
    for (int c = 0; c < SIDE_BY_SIDE; ++c) {
      const TwoVectors w = decode_pair(weights + c * w_row + k);
#pragma GCC unroll 8
      for (int row = 0; row < ROWS; ++row) {
        part[c][row] += w.first * load(x + row * x_row + k);
        part[c][row] += w.second * load(x + row * x_row + k + WIDTH);
      }
    }
  }
  if (k < depth) {
    const int64_t rest = depth - k;
    for (int c = 0; c < SIDE_BY_SIDE; ++c) {
      uint8_t bytes[PAIR] = {};
      std::memcpy(bytes, weights + c * w_row + k, rest);
      const TwoVectors w = decode_pair(bytes);
      for (int row = 0; row < ROWS; ++row) {
        float numbers[PAIR] = {};
        std::memcpy(numbers, x + row * x_row + k, rest * sizeof(float));
        part[c][row] += w.first * load(numbers);
        part[c][row] += w.second * load(numbers + WIDTH);
      }
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < SIDE_BY_SIDE; ++c)
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; ++row) totals[c * ROWS + row] += part[c][row] * DECODED * scale;
}

// Up to COLUMNS columns of y for ROWS rows of x.
template <int ROWS>
void some_columns(const uint8_t* weights, const float* scales, int64_t columns, int64_t depth, const float* x,
                  float* y, int64_t y_row) {
  constexpr int SIDE_BY_SIDE = ROWS <= 2 ? 4 : ROWS <= 4 ? 2 : 1;  // 8 sums or so: as many as keep both multipliers busy
  Vector totals[COLUMNS * ROWS] = {};
  for (int64_t k = 0; k < depth; k += BLOCK) {
    const int64_t here = std::min(BLOCK, depth - k);
    const float scale = scales[k / BLOCK];
    int64_t c = 0;
    for (; c + SIDE_BY_SIDE <= columns; c += SIDE_BY_SIDE)
      add_block<ROWS, SIDE_BY_SIDE>(weights + c * depth + k, depth, scale, x + k, depth, here, totals + c * ROWS);
    for (; c < columns; ++c) add_block<ROWS, 1>(weights + c * depth + k, depth, scale, x + k, depth, here, totals + c * ROWS);
  }
  for (int64_t c = 0; c < columns; ++c)
    for (int row = 0; row < ROWS; ++row) y[row * y_row + c] = sum(totals[c * ROWS + row]);
}

constexpr decltype(&some_columns<1>) FOR_ROWS[MOST_ROWS] = {
    some_columns<1>, some_columns<2>, some_columns<3>, some_columns<4>,
    some_columns<5>, some_columns<6>, some_columns<7>, some_columns<8>,
};

}  // namespace

// Group g has the rows starts[g] to starts[g + 1] of x, and `parts` matrices of `columns` x `depth`; y has the columns
// of all parts side by side. Groups of more than `most_rows` rows are passed over.
extern "C" void fp8_linear(const float* x, const uint8_t* weights, const float* scales, const int64_t* starts,
                           int64_t groups, int64_t parts, int64_t columns, int64_t depth, int64_t most_rows, float* y) {
  const int64_t down = (columns + BLOCK - 1) / BLOCK, across = (depth + BLOCK - 1) / BLOCK;
  const int64_t pieces = (columns + COLUMNS - 1) / COLUMNS, y_row = parts * columns;
  std::vector<int64_t> busy;  // most experts have no row
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t rows = starts[group + 1] - starts[group];
    if (rows > 0 && rows <= most_rows) busy.push_back(group);
  }
#pragma omp parallel for schedule(dynamic)
  for (int64_t index = 0; index < int64_t(busy.size()) * parts * pieces; ++index) {
    const int64_t group = busy[index / pieces / parts], part = index / pieces % parts, column = index % pieces * COLUMNS;
    const int64_t matrix = group * parts + part, count = std::min(COLUMNS, columns - column);
    const uint8_t* here = weights + (matrix * columns + column) * depth;
    const float* its_scales = scales + (matrix * down + column / BLOCK) * across;
    const int64_t end = starts[group + 1];
    for (int64_t row = starts[group]; row < end; row += MOST_ROWS)
      FOR_ROWS[std::min(MOST_ROWS, end - row) - 1](here, its_scales, count, depth, x + row * depth,
                                                   y + row * y_row + part * columns + column, y_row);
  }
}
