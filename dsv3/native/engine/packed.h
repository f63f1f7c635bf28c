// Weight matrices as the engine reads them, and products with them that do not depend on what stands beside a row.
//
// A matrix of `columns` x `depth` (out x in) is cut into panels of PANEL columns; within a panel the numbers of one k lie
// side by side. One row and a thousand rows read a panel alike and add in rising k, so that a row's result is the same
// to the last bit whoever shares the batch. Formats in fewer bits become FP32 in registers, or, INT8 and INT4, meet
// activations rounded to 8 bits in exact integer sums over a tile of 1 x 128.
#pragma once
#include <algorithm>
#include <cmath>

#include "../vector.h"

enum Format : int64_t { FP32, BF16, FP8, INT8, INT4 };

constexpr int64_t PANEL = 2 * WIDTH;
constexpr int64_t TILE = 128;       // of k, with one scale: FP8's blocks, INT8's groups, every tile of activations
constexpr int64_t HALF_TILE = 64;   // of k, with one scale: INT4's groups
constexpr int ROWS_AT_ONCE = TILE_ROWS;
constexpr int64_t DEPTH_AT_ONCE = 256;  // k that many rows go over together: panel and rows stay in the first-level cache

static inline int64_t div_up(int64_t count, int64_t by) { return (count + by - 1) / by; }

// `groups` matrices of one shape, one after the other: experts, or heads. infer/packed_weights.py has the same record.
struct Matrix {
  uint8_t* data;
  float* scales;  // FP8: one a panel and tile; INT8, INT4: PANEL a panel and tile or half tile; else none
  int64_t format, groups, columns, depth;

  bool in_integers() const { return format >= INT8; }
  int64_t panels() const { return div_up(columns, PANEL); }
  int64_t panel_bytes() const {
    switch (format) {
      case FP32: return depth * PANEL * 4;
      case BF16: return depth * PANEL * 2;
      case FP8: return depth * PANEL;
      case INT8: return round_up(depth, 4) * PANEL;
      default: return round_up(depth, 8) * PANEL / 2;
    }
  }
  int64_t panel_scales() const {
    switch (format) {
      case FP8: return div_up(depth, TILE);
      case INT8: return div_up(depth, TILE) * PANEL;
      case INT4: return div_up(depth, HALF_TILE) * PANEL;
      default: return 0;
    }
  }
  uint8_t* panel(int64_t group, int64_t index) const { return data + (group * panels() + index) * panel_bytes(); }
  float* scales_of(int64_t group, int64_t index) const { return scales + (group * panels() + index) * panel_scales(); }
};

// Rows that are multiplied, `stride` floats apart. For integer matrices also in 8 bits: x = scale * value, a scale a tile,
// and the sums of values over half tiles, which take the weights' offset out again.
struct Rows {
  float* x = nullptr;
  int64_t stride = 0;
  int8_t* values = nullptr;
  float* scales = nullptr;
  int32_t* sums = nullptr;
  int64_t value_stride = 0, tiles = 0;

  Rows from(int64_t row) const {
    Rows rows = *this;
    if (x) rows.x += row * stride;
    if (values) rows.values += row * value_stride, rows.scales += row * tiles, rows.sums += row * tiles * 2;
    return rows;
  }
};

static inline int64_t value_stride_of(int64_t depth) { return round_up(depth, 8) + 64; }

// Rounds one row to 8 bits, tile by tile, to the nearest multiple of the tile's largest / 127.
static inline void quantise_row(const float* x, int64_t depth, int8_t* values, float* scales, int32_t* sums) {
  for (int64_t tile = 0; tile * TILE < depth; ++tile) {
    const int64_t first = tile * TILE, count = std::min(TILE, depth - first), whole = count / WIDTH * WIDTH;
    Vector most = Vector{};
    int64_t k = 0;
    for (; k < whole; k += WIDTH) {
      const Vector v = load(x + first + k);
      most = larger(most, larger(v, -v));
    }
    float top = largest(most);
    for (; k < count; ++k) top = std::max(top, std::fabs(x[first + k]));
    const float scale = top / 127.0f, inverse = top > 0 ? 127.0f / top : 0.0f;
    scales[tile] = scale;
    int32_t halves[2] = {0, 0};
    for (k = 0; k < count; ++k) {
      const int32_t value = int32_t(std::nearbyintf(x[first + k] * inverse));
      values[first + k] = int8_t(value);
      halves[k / HALF_TILE] += value;
    }
    sums[2 * tile] = halves[0];
    sums[2 * tile + 1] = halves[1];
  }
  for (int64_t k = depth; k < round_up(depth, 8); ++k) values[k] = 0;
}

// ---- weights in floating point -----------------------------------------------------------------------------------

struct Two {
  Vector first, second;
};

template <Format F>
struct Decode;

template <>
struct Decode<FP32> {
  static constexpr int64_t BYTES = 4;
  static Two pair(const uint8_t* from) {
    const float* numbers = reinterpret_cast<const float*>(from);
    return {load(numbers), load(numbers + WIDTH)};
  }
};

typedef uint16_t Shorts __attribute__((vector_size(WIDTH * 2), aligned(1), may_alias));
typedef uint8_t Bytes __attribute__((vector_size(WIDTH), aligned(1), may_alias));
typedef uint32_t UnsignedVector __attribute__((vector_size(WIDTH * 4)));

template <>
struct Decode<BF16> {
  static constexpr int64_t BYTES = 2;
  static Vector one(const uint8_t* from) {
    const UnsignedVector wide = __builtin_convertvector(*reinterpret_cast<const Shorts*>(from), UnsignedVector);
    return reinterpret_cast<Vector>(wide << 16);
  }
  static Two pair(const uint8_t* from) { return {one(from), one(from + 2 * WIDTH)}; }
};

// E4M3 without NaN, which packing refuses. Its bits stand in the middle of FP16's, whose exponent is 8 less there, and in
// FP32's with an exponent 120 less; a multiplication puts that right, subnormals too.
template <>
struct Decode<FP8> {
  static constexpr int64_t BYTES = 1;
#if VECTOR_FLOATS == 16 && defined(__AVX512BW__)
  static constexpr float FACTOR = 256.0f;
  static Two pair(const uint8_t* from) {
    const __m512i wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    const __m512i twice_signed = _mm512_srai_epi16(_mm512_slli_epi16(wide, 8), 1);
    const __m512i half = _mm512_and_si512(twice_signed, _mm512_set1_epi16(int16_t(0xBFFF)));
    return {_mm512_cvtph_ps(_mm512_castsi512_si256(half)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1))};
  }
#elif VECTOR_FLOATS == 8 && defined(__F16C__) && defined(__AVX2__)
  static constexpr float FACTOR = 256.0f;
  static Two pair(const uint8_t* from) {
    const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    const __m256i twice_signed = _mm256_srai_epi16(_mm256_slli_epi16(wide, 8), 1);
    const __m256i half = _mm256_and_si256(twice_signed, _mm256_set1_epi16(int16_t(0xBFFF)));
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(half)), _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1))};
  }
#else
  static constexpr float FACTOR = 1.329227995784916e36f;  // 2^120
  static Vector one(const uint8_t* from) {
    const UnsignedVector byte = __builtin_convertvector(*reinterpret_cast<const Bytes*>(from), UnsignedVector);
    return reinterpret_cast<Vector>(((byte & 0x80u) << 24) | ((byte & 0x7Fu) << 20));
  }
  static Two pair(const uint8_t* from) { return {one(from), one(from + WIDTH)}; }
#endif
};

// totals[row] += x[row][k] * panel[k] for `count` k from one tile of them; `scale` is FP8's.
template <Format F, int ROWS>
static inline void add_to(Two* totals, const uint8_t* panel, const float* x, int64_t x_row, int64_t count, Vector scale) {
  for (int64_t k = 0; k < count; ++k) {
    Two column = Decode<F>::pair(panel + k * PANEL * Decode<F>::BYTES);
    if constexpr (F == FP8) column.first *= scale, column.second *= scale;
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; ++row) {
      const float factor = x[row * x_row + k];
      totals[row].first += factor * column.first;
      totals[row].second += factor * column.second;
    }
  }
}

template <Format F, int ROWS>
static void few_rows(const uint8_t* panel, const float* scales, int64_t depth, const float* x, int64_t x_row, float* y,
                     int64_t y_row) {
  Two totals[ROWS] = {};
  if constexpr (F == FP8) {
    for (int64_t k = 0; k < depth; k += TILE)
      add_to<F, ROWS>(totals, panel + k * PANEL, x + k, x_row, std::min(TILE, depth - k),
                      all(scales[k / TILE] * Decode<FP8>::FACTOR));
  } else {
    add_to<F, ROWS>(totals, panel, x, x_row, depth, Vector{});
  }
  for (int row = 0; row < ROWS; ++row) {
    store(y + row * y_row, totals[row].first);
    store(y + row * y_row + WIDTH, totals[row].second);
  }
}

template <Format F, int ROWS>
static void up_to(int64_t rows, const uint8_t* panel, const float* scales, int64_t depth, const float* x, int64_t x_row,
                  float* y, int64_t y_row) {
  if constexpr (ROWS > 1)
    if (rows < ROWS) return up_to<F, ROWS - 1>(rows, panel, scales, depth, x, x_row, y, y_row);
  few_rows<F, ROWS>(panel, scales, depth, x, x_row, y, y_row);
}

template <Format F>
static const float* in_floats(const uint8_t* panel, const float* scales, int64_t depth, float* room) {
  if constexpr (F == FP32) return reinterpret_cast<const float*>(panel);
  for (int64_t k = 0; k < depth; ++k) {
    Two column = Decode<F>::pair(panel + k * PANEL * Decode<F>::BYTES);
    if constexpr (F == FP8) {
      const Vector scale = all(scales[k / TILE] * Decode<FP8>::FACTOR);
      column.first *= scale, column.second *= scale;
    }
    store(room + k * PANEL, column.first);
    store(room + k * PANEL + WIDTH, column.second);
  }
  return room;
}

// y = x . panel for PANEL whole columns. `room` holds a panel in FP32.
template <Format F>
static void float_panel(const uint8_t* panel, const float* scales, int64_t depth, const Rows& rows, int64_t count,
                        float* y, int64_t y_row, float* room) {
  if (count <= ROWS_AT_ONCE)
    return up_to<F, ROWS_AT_ONCE>(count, panel, scales, depth, rows.x, rows.stride, y, y_row);
  const float* numbers = in_floats<F>(panel, scales, depth, room);
  for (int64_t k = 0; k < depth; k += DEPTH_AT_ONCE) {
    const int64_t deep = std::min(DEPTH_AT_ONCE, depth - k);
    for (int64_t row = 0; row < count; row += ROWS_AT_ONCE) {
      const int64_t here = std::min<int64_t>(ROWS_AT_ONCE, count - row);
      const float* x = rows.x + row * rows.stride + k;
      if (k)
        row_of_tiles<ROWS_AT_ONCE, true>(here, x, rows.stride, 1, numbers + k * PANEL, PANEL, y + row * y_row, y_row, PANEL, deep);
      else
        row_of_tiles<ROWS_AT_ONCE, false>(here, x, rows.stride, 1, numbers, PANEL, y + row * y_row, y_row, PANEL, deep);
    }
  }
}

// ---- weights in integers -----------------------------------------------------------------------------------------

typedef int32_t Sums __attribute__((vector_size(WIDTH * 4)));

// sums[i] += the products of four unsigned bytes of lane i of `weights` with the four signed bytes of x.
static inline Sums dot_of_four(Sums sums, IntVector weights, int32_t x) {
#if VECTOR_FLOATS == 16 && defined(__AVX512VNNI__)
  return reinterpret_cast<Sums>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sums), reinterpret_cast<__m512i>(weights),
                                                    _mm512_set1_epi32(x)));
#elif VECTOR_FLOATS == 8 && defined(__AVXVNNI__)
  return reinterpret_cast<Sums>(_mm256_dpbusd_avx_epi32(reinterpret_cast<__m256i>(sums),
                                                        reinterpret_cast<__m256i>(weights), _mm256_set1_epi32(x)));
#elif VECTOR_FLOATS == 8 && defined(__AVX2__)
  // In 16 bits, because the instruction that multiplies bytes cuts sums off at 32,767.
  const __m256i w = reinterpret_cast<__m256i>(weights), bytes = _mm256_set1_epi32(x);
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(w, _mm256_set1_epi16(0xFF)),
                                         _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(bytes, 8));
  return sums + reinterpret_cast<Sums>(_mm256_add_epi32(even, odd));
#else
  const UnsignedVector w = reinterpret_cast<UnsignedVector>(weights);
  for (int byte = 0; byte < 4; ++byte)
    sums += reinterpret_cast<Sums>((w >> (8 * byte)) & 0xFFu) * int32_t(int8_t(uint32_t(x) >> (8 * byte)));
  return sums;
#endif
}

static inline int32_t four_bytes(const int8_t* from) {
  int32_t value;
  std::memcpy(&value, from, 4);
  return value;
}

static inline IntVector integers(const uint8_t* from) {
  return reinterpret_cast<IntVector>(*reinterpret_cast<const IntInMemory*>(from));
}

template <bool FOUR_BITS, int ROWS>
static void integer_rows(const uint8_t* panel, const float* scales, int64_t depth, const Rows& rows, float* y,
                         int64_t y_row) {
  constexpr int64_t GROUP = FOUR_BITS ? HALF_TILE : TILE;
  Two totals[ROWS] = {};
  for (int64_t first = 0; first < depth; first += GROUP, scales += PANEL) {
    const int64_t end = std::min(first + GROUP, round_up(depth, FOUR_BITS ? 8 : 4));
    Sums left[ROWS] = {}, right[ROWS] = {};
    if constexpr (FOUR_BITS) {
      for (int64_t k = first; k < end; k += 8) {
        const IntVector a = integers(panel + k * PANEL / 2), b = integers(panel + k * PANEL / 2 + 4 * WIDTH);
        const IntVector low_a = a & 0x0F0F0F0F, low_b = b & 0x0F0F0F0F;
        const IntVector high_a = (a >> 4) & 0x0F0F0F0F, high_b = (b >> 4) & 0x0F0F0F0F;
#pragma GCC unroll 16
        for (int row = 0; row < ROWS; ++row) {
          const int8_t* x = rows.values + row * rows.value_stride + k;
          left[row] = dot_of_four(dot_of_four(left[row], low_a, four_bytes(x)), high_a, four_bytes(x + 4));
          right[row] = dot_of_four(dot_of_four(right[row], low_b, four_bytes(x)), high_b, four_bytes(x + 4));
        }
      }
    } else {
      for (int64_t k = first; k < end; k += 4) {
        const IntVector a = integers(panel + k * PANEL), b = integers(panel + k * PANEL + 4 * WIDTH);
#pragma GCC unroll 16
        for (int row = 0; row < ROWS; ++row) {
          const int32_t x = four_bytes(rows.values + row * rows.value_stride + k);
          left[row] = dot_of_four(left[row], a, x);
          right[row] = dot_of_four(right[row], b, x);
        }
      }
    }
    const Vector scale_a = load(scales), scale_b = load(scales + WIDTH);
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; ++row) {
      const int32_t* sums = rows.sums + row * rows.tiles * 2 + first / HALF_TILE;
      const int32_t offset = FOUR_BITS ? 8 * sums[0] : 128 * (sums[0] + sums[1]);
      const float scale = rows.scales[row * rows.tiles + first / TILE];
      totals[row].first += __builtin_convertvector(left[row] - offset, Vector) * (scale_a * scale);
      totals[row].second += __builtin_convertvector(right[row] - offset, Vector) * (scale_b * scale);
    }
  }
  for (int row = 0; row < ROWS; ++row) {
    store(y + row * y_row, totals[row].first);
    store(y + row * y_row + WIDTH, totals[row].second);
  }
}

template <bool FOUR_BITS, int ROWS>
static void integers_up_to(int64_t count, const uint8_t* panel, const float* scales, int64_t depth, const Rows& rows,
                           float* y, int64_t y_row) {
  if constexpr (ROWS > 1)
    if (count < ROWS) return integers_up_to<FOUR_BITS, ROWS - 1>(count, panel, scales, depth, rows, y, y_row);
  integer_rows<FOUR_BITS, ROWS>(panel, scales, depth, rows, y, y_row);
}

template <bool FOUR_BITS>
static void integer_panel(const uint8_t* panel, const float* scales, int64_t depth, const Rows& rows, int64_t count,
                          float* y, int64_t y_row) {
  for (int64_t row = 0; row < count; row += ROWS_AT_ONCE)
    integers_up_to<FOUR_BITS, ROWS_AT_ONCE>(std::min<int64_t>(ROWS_AT_ONCE, count - row), panel, scales, depth,
                                            rows.from(row), y + row * y_row, y_row);
}

// ---- any weights -------------------------------------------------------------------------------------------------

static inline void whole_panel(const Matrix& matrix, int64_t group, int64_t index, const Rows& rows, int64_t count,
                               float* y, int64_t y_row, std::vector<float>& room) {
  const uint8_t* panel = matrix.panel(group, index);
  const float* scales = matrix.scales_of(group, index);
  if (count > ROWS_AT_ONCE && matrix.format != FP32 && !matrix.in_integers())
    if (int64_t(room.size()) < matrix.depth * PANEL) room.resize(matrix.depth * PANEL);
  switch (matrix.format) {
    case FP32: return float_panel<FP32>(panel, scales, matrix.depth, rows, count, y, y_row, room.data());
    case BF16: return float_panel<BF16>(panel, scales, matrix.depth, rows, count, y, y_row, room.data());
    case FP8: return float_panel<FP8>(panel, scales, matrix.depth, rows, count, y, y_row, room.data());
    case INT8: return integer_panel<false>(panel, scales, matrix.depth, rows, count, y, y_row);
    default: return integer_panel<true>(panel, scales, matrix.depth, rows, count, y, y_row);
  }
}

// y[row][PANEL * index ...] = rows . panel, for `count` rows; nothing beyond the matrix's columns is written.
static inline void multiply_panel(const Matrix& matrix, int64_t group, int64_t index, const Rows& rows, int64_t count,
                                  float* y, int64_t y_row, std::vector<float>& room) {
  const int64_t first = index * PANEL, columns = std::min(PANEL, matrix.columns - first);
  if (columns == PANEL) return whole_panel(matrix, group, index, rows, count, y + first, y_row, room);
  float edge[ROWS_AT_ONCE * PANEL];
  for (int64_t row = 0; row < count; row += ROWS_AT_ONCE) {
    const int64_t here = std::min<int64_t>(ROWS_AT_ONCE, count - row);
    whole_panel(matrix, group, index, rows.from(row), here, edge, PANEL, room);
    for (int64_t r = 0; r < here; ++r) std::copy_n(edge + r * PANEL, columns, y + (row + r) * y_row + first);
  }
}
