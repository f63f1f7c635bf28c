// Weights in E4M3 with a scale for each block of 128 x 128, as a few rows of FP32 meet them: y = x @ W.T.
//
// One token reads every weight once, so decoding is as fast as weights come out of memory: here they come as bytes, and
// become FP32 in registers, where they meet all rows. Work is split over the rows of W alone. A sum is made lane by
// lane within a block, then block by block, then over the lanes, whichever rows stand beside it.
#include <algorithm>

#include "fp8.h"

namespace {

constexpr int64_t BLOCK = 128;
constexpr int64_t MOST_ROWS = 8;     // of x, for which sums stay in registers
constexpr int64_t COLUMNS = 8;       // of y, made by one thread at a time; they never cross a block of W
constexpr int64_t PAIR = 2 * WIDTH;  // weights that are decoded together

struct TwoVectors {
  Vector first, second;
};

// What `decode_pair` returns is yet to be multiplied by DECODED.
#if VECTOR_FLOATS == 8 && defined(__F16C__) && defined(__AVX2__)
// The bits of E4M3 stand in the middle of FP16, whose exponents are 8 smaller there, those of subnormals included.
constexpr float DECODED = 256.0f;
inline TwoVectors decode_pair(const uint8_t* from) {
  const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  const __m256i twice_signed = _mm256_srai_epi16(_mm256_slli_epi16(wide, 8), 1);  // the sign is in bit 14 too
  const __m256i number = _mm256_and_si256(twice_signed, _mm256_set1_epi16(int16_t(0xBFFF)));
  const __m256i magnitude = _mm256_and_si256(twice_signed, _mm256_set1_epi16(0x3FFF));
  const __m256i is_nan = _mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x3F80));
  const __m256i half = _mm256_or_si256(number, is_nan);
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(half)), _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1))};
}
#else
constexpr float DECODED = 1.0f;
inline TwoVectors decode_pair(const uint8_t* from) {
  return {decode<E4M3>(load_some(from, WIDTH)), decode<E4M3>(load_some(from + WIDTH, WIDTH))};
}
#endif

// Adds the products of PAIR weights with ROWS rows of x, which lie BLOCK apart.
template <int ROWS>
inline void add_pair(const uint8_t* weights, const float* x, Vector* sums) {
  const TwoVectors w = decode_pair(weights);
#pragma GCC unroll 8
  for (int row = 0; row < ROWS; ++row) {
    sums[row] += w.first * load(x + row * BLOCK);
    sums[row] += w.second * load(x + row * BLOCK + WIDTH);
  }
}

// Adds the products of `depth` <= BLOCK weights of each of SIDE_BY_SIDE rows of W, all with the same scale.
template <int ROWS, int SIDE_BY_SIDE>
inline void add_block(const uint8_t* weights, int64_t w_row, float scale, const float* x, int64_t depth,
                      Vector* totals) {
  Vector sums[SIDE_BY_SIDE][ROWS] = {};
  int64_t k = 0;
  for (; k + PAIR <= depth; k += PAIR)
#pragma GCC unroll 4
    for (int column = 0; column < SIDE_BY_SIDE; ++column)
      add_pair<ROWS>(weights + column * w_row + k, x + k, sums[column]);
  if (k < depth)
#pragma GCC unroll 4
    for (int column = 0; column < SIDE_BY_SIDE; ++column) {
      uint8_t bytes[PAIR] = {};
      std::memcpy(bytes, weights + column * w_row + k, depth - k);
      add_pair<ROWS>(bytes, x + k, sums[column]);
    }
#pragma GCC unroll 4
  for (int column = 0; column < SIDE_BY_SIDE; ++column)
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; ++row) totals[column * ROWS + row] += sums[column][row] * DECODED * scale;
}

// Up to COLUMNS columns of y for ROWS rows of x, which lie as `pack` puts them.
template <int ROWS>
void some_columns(const uint8_t* weights, const float* scales, int64_t columns, int64_t depth, const float* x, float* y,
                  int64_t y_row) {
  constexpr int SIDE_BY_SIDE = ROWS <= 2 ? 4 : ROWS <= 4 ? 2 : 1;  // about 8 sums keep the multipliers busy
  Vector totals[COLUMNS * ROWS] = {};
  for (int64_t k = 0; k < depth; k += BLOCK, x += ROWS * BLOCK) {
    const int64_t here = std::min(BLOCK, depth - k);
    const float scale = scales[k / BLOCK];
    const uint8_t* from = weights + k;
    int64_t column = 0;
    for (; column + SIDE_BY_SIDE <= columns; column += SIDE_BY_SIDE)
      add_block<ROWS, SIDE_BY_SIDE>(from + column * depth, depth, scale, x, here, totals + column * ROWS);
    for (; column < columns; ++column)
      add_block<ROWS, 1>(from + column * depth, depth, scale, x, here, totals + column * ROWS);
  }
  for (int64_t column = 0; column < columns; ++column)
    for (int row = 0; row < ROWS; ++row) y[row * y_row + column] = sum(totals[column * ROWS + row]);
}

constexpr decltype(&some_columns<1>) FOR_ROWS[] = {
    some_columns<1>, some_columns<2>, some_columns<3>, some_columns<4>,
    some_columns<5>, some_columns<6>, some_columns<7>, some_columns<8>,
};

// Rows of x that meet a weight together: up to MOST_ROWS of one group.
struct Rows {
  int64_t group, first, count;
};

std::vector<Rows> rows_together(const int64_t* starts, int64_t groups, int64_t most_rows) {
  std::vector<Rows> found;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t rows = starts[group + 1] - starts[group], parts = (rows + MOST_ROWS - 1) / MOST_ROWS;
    for (int64_t part = 0; part < parts && rows <= most_rows; ++part) {
      const int64_t first = rows * part / parts;
      found.push_back({group, starts[group] + first, rows * (part + 1) / parts - first});
    }
  }
  return found;
}

// Copies rows block by block, zeros after the last number: rows a power of two apart would share lines of the cache.
void pack(const float* x, Rows rows, int64_t depth, float* to) {
  for (int64_t k = 0; k < depth; k += BLOCK, to += rows.count * BLOCK)
    for (int64_t row = 0; row < rows.count; ++row)
      std::memcpy(to + row * BLOCK, x + row * depth + k, std::min(BLOCK, depth - k) * sizeof(float));
}

}  // namespace

// Group g has the rows starts[g] to starts[g + 1] of x, and `parts` matrices of `columns` x `depth` that lie one after
// the other; y has the columns of all parts side by side. Groups of more than `most_rows` rows are passed over.
extern "C" void fp8_linear(const float* x, const uint8_t* weights, const float* scales, const int64_t* starts,
                           int64_t groups, int64_t parts, int64_t columns, int64_t depth, int64_t most_rows, float* y) {
  const int64_t down = (columns + BLOCK - 1) / BLOCK, across = (depth + BLOCK - 1) / BLOCK;
  const int64_t pieces = (columns + COLUMNS - 1) / COLUMNS, y_row = parts * columns;
  const std::vector<Rows> work = rows_together(starts, groups, most_rows);
  std::vector<float> packed(starts[groups] * across * BLOCK);
  for (const Rows& rows : work) pack(x + rows.first * depth, rows, depth, &packed[rows.first * across * BLOCK]);
#pragma omp parallel for schedule(dynamic)
  for (int64_t index = 0; index < int64_t(work.size()) * parts * pieces; ++index) {
    const Rows rows = work[index / pieces / parts];
    const int64_t part = index / pieces % parts, column = index % pieces * COLUMNS;
    const int64_t matrix = rows.group * parts + part;
    FOR_ROWS[rows.count - 1](weights + (matrix * columns + column) * depth,
                             scales + (matrix * down + column / BLOCK) * across, std::min(COLUMNS, columns - column),
                             depth, &packed[rows.first * across * BLOCK],
                             y + rows.first * y_row + part * columns + column, y_row);
  }
}

// Rows of W in FP32, exactly; the first of them begins a block.
extern "C" void fp8_widen(const uint8_t* weights, const float* scales, int64_t rows, int64_t depth, float* output) {
  const int64_t across = (depth + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t k = 0; k < depth; k += PAIR) {
      const int64_t at = row * depth + k, count = depth - k;
      const float scale = scales[row / BLOCK * across + k / BLOCK];
      uint8_t bytes[PAIR] = {};
      const bool whole = count >= PAIR;
      if (!whole) std::memcpy(bytes, weights + at, count);
      const TwoVectors w = decode_pair(whole ? weights + at : bytes);
      store_some(output + at, w.first * DECODED * scale, count);
      if (count > WIDTH) store_some(output + at + WIDTH, w.second * DECODED * scale, count - WIDTH);
    }
}
