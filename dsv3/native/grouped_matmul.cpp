// The products of experts: one for each expert, over rows grouped by expert.
//
// The usual blocking: a block of b, packed into panels as wide as a tile, stays in the second-level cache while tiles
// of a pass over it. One thread makes each number of the result, summing in rising k: threads do not change it.
#include <omp.h>

#include <algorithm>

#include "vector.h"

namespace {

constexpr int64_t PANEL = TILE_VECTORS * WIDTH;  // columns
constexpr int64_t DEPTH = 256;                   // k of a block
constexpr int64_t COLUMNS = 256;                 // of a block of b: with DEPTH 256 KB
constexpr int64_t ROWS = 16 * TILE_ROWS;         // of a block of a

// Element (row, column) lies at row * down + column * across.
struct Matrix {
  const float* start;
  int64_t down, across;
  Matrix from(int64_t row, int64_t column) const { return {start + row * down + column * across, down, across}; }
  float at(int64_t row, int64_t column) const { return start[row * down + column * across]; }
};

struct Buffers {
  std::vector<float> b = std::vector<float>(DEPTH * COLUMNS), a = std::vector<float>(DEPTH * ROWS + WIDTH);
};

#if defined(__AVX__)
// to[k][c] = from[c][k] for eight rows of eight numbers.
inline void transpose(const float* from, int64_t from_row, float* to, int64_t to_row) {
  __m256 row[8], pair[8], four[8];
  for (int i = 0; i < 8; ++i) row[i] = _mm256_loadu_ps(from + i * from_row);
  for (int i = 0; i < 8; i += 2) {
    pair[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
    pair[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      four[i + 2 * j] = _mm256_shuffle_ps(pair[i + j], pair[i + j + 2], 0x44);
      four[i + 2 * j + 1] = _mm256_shuffle_ps(pair[i + j], pair[i + j + 2], 0xEE);
    }
  for (int k = 0; k < 4; ++k) {
    _mm256_storeu_ps(to + k * to_row, _mm256_permute2f128_ps(four[k], four[k + 4], 0x20));
    _mm256_storeu_ps(to + (k + 4) * to_row, _mm256_permute2f128_ps(four[k], four[k + 4], 0x31));
  }
}
#endif

// b[k][column] -> panels[column / PANEL][k][column % PANEL], columns beyond the last as zeros.
void pack_columns(Matrix b, int64_t depth, int64_t columns, float* panels) {
  for (int64_t first = 0; first < columns; first += PANEL, panels += depth * PANEL) {
    const int64_t count = std::min(PANEL, columns - first);
    int64_t k = 0;
    if (count == PANEL && b.across == 1) {
      for (; k < depth; ++k)
        for (int v = 0; v < TILE_VECTORS; ++v)
          store(panels + k * PANEL + v * WIDTH, load(b.start + k * b.down + first + v * WIDTH));
    }
#if defined(__AVX__)
    if (count == PANEL && b.down == 1) {
      for (; k + 8 <= depth; k += 8)
        for (int64_t c = 0; c < PANEL; c += 8)
          transpose(b.start + (first + c) * b.across + k, b.across, panels + k * PANEL + c, PANEL);
    }
#endif
    for (; k < depth; ++k)
      for (int64_t c = 0; c < PANEL; ++c) panels[k * PANEL + c] = c < count ? b.at(k, first + c) : 0.0f;
  }
}

// a[row][k] -> strips[row / TILE_ROWS][k][row % TILE_ROWS], rows beyond the last left as they are.
void pack_rows(Matrix a, int64_t rows, int64_t depth, float* strips) {
  for (int64_t first = 0; first < rows; first += TILE_ROWS, strips += depth * TILE_ROWS) {
    const int64_t count = std::min<int64_t>(TILE_ROWS, rows - first);
    int64_t k = 0;
    // Whole vectors: what is written beyond a strip's row is overwritten by the next, what is read beyond one row of
    // a^T lies in the next, so the last rows go one by one.
    if (a.down == 1 && count == TILE_ROWS && a.across >= TILE_ROWS)
      for (; k + WIDTH < depth; ++k)
        for (int v = 0; v < TILE_ROWS; v += WIDTH)
          store(strips + k * TILE_ROWS + v, load(a.start + k * a.across + first + v));
    for (; k < depth; ++k)
      for (int64_t r = 0; r < count; ++r) strips[k * TILE_ROWS + r] = a.at(first + r, k);
  }
}

template <int COUNT, bool ADD>
void tile_of(int64_t rows, const float* a, int64_t a_row, int64_t a_k, const float* panel, float* c, int64_t c_row,
             int64_t columns, int64_t depth) {
  if constexpr (COUNT > 1) {
    if (rows < COUNT) return tile_of<COUNT - 1, ADD>(rows, a, a_row, a_k, panel, c, c_row, columns, depth);
  }
  if (columns == PANEL) return tile<COUNT, TILE_VECTORS, ADD>(a, a_row, a_k, panel, PANEL, c, c_row, depth);
  float edge[COUNT * PANEL];
  tile<COUNT, TILE_VECTORS, false>(a, a_row, a_k, panel, PANEL, edge, PANEL, depth);
  for (int64_t row = 0; row < COUNT; ++row)
    for (int64_t column = 0; column < columns; ++column) {
      float& to = c[row * c_row + column];
      to = ADD ? to + edge[row * PANEL + column] : edge[row * PANEL + column];
    }
}

// c = a b, by one thread.
void multiply(Matrix a, Matrix b, float* c, int64_t c_row, int64_t rows, int64_t columns, int64_t depth,
              Buffers& buffers) {
  if (depth == 0)
    for (int64_t row = 0; row < rows; ++row) std::fill_n(c + row * c_row, columns, 0.0f);
  const int64_t blocks = (depth + DEPTH - 1) / DEPTH, share = blocks ? round_up((depth + blocks - 1) / blocks, 8) : 0;
  for (int64_t k = 0; k < depth; k += share) {
    const int64_t deep = std::min(share, depth - k);
    for (int64_t n = 0; n < columns; n += COLUMNS) {
      const int64_t wide = std::min(COLUMNS, columns - n);
      pack_columns(b.from(k, n), deep, wide, buffers.b.data());
      for (int64_t m = 0; m < rows; m += ROWS) {
        const int64_t high = std::min(ROWS, rows - m);
        const bool packed = a.across != 1;
        if (packed) pack_rows(a.from(m, k), high, deep, buffers.a.data());
        for (int64_t panel = 0; panel < wide; panel += PANEL)
          for (int64_t row = 0; row < high; row += TILE_ROWS) {
            const float* from = packed ? &buffers.a[row * deep] : a.from(m + row, k).start;
            const int64_t a_row = packed ? 1 : a.down, a_k = packed ? TILE_ROWS : 1;
            float* to = c + (m + row) * c_row + n + panel;
            const int64_t count = std::min<int64_t>(TILE_ROWS, high - row), across = std::min(PANEL, wide - panel);
            if (k > 0)
              tile_of<TILE_ROWS, true>(count, from, a_row, a_k, &buffers.b[panel * deep], to, c_row, across, deep);
            else
              tile_of<TILE_ROWS, false>(count, from, a_row, a_k, &buffers.b[panel * deep], to, c_row, across, deep);
          }
      }
    }
  }
}

// Rows that a thread takes at a time: enough to be worth packing b for, few enough to share the work evenly.
int64_t share_of(int64_t rows) {
  const int64_t threads = omp_get_max_threads();
  return threads == 1 ? std::max<int64_t>(rows, 1) : std::max(ROWS, round_up((rows + 2 * threads - 1) / (2 * threads), ROWS));
}

}  // namespace

// For each expert e, on its rows of a and c from starts[e] to starts[e + 1]: c = a b_e.
extern "C" void grouped_rows(const float* a, const float* b, int64_t b_size, int64_t b_down, int64_t b_across, float* c,
                             const int64_t* starts, int64_t experts, int64_t columns, int64_t depth) {
  const int64_t share = share_of(starts[experts] / experts);
#pragma omp parallel
  {
    Buffers buffers;
#pragma omp for schedule(dynamic, 1)
    for (int64_t expert = 0; expert < experts; ++expert)
      for (int64_t row = starts[expert]; row < starts[expert + 1]; row += share)
        multiply({a + row * depth, depth, 1}, {b + expert * b_size, b_down, b_across}, c + row * columns, columns,
                 std::min(share, starts[expert + 1] - row), columns, depth, buffers);
  }
}

// For each expert e: c_e = a_e^T b_e over its rows, which is the gradient of its weight.
extern "C" void grouped_weights(const float* a, const float* b, float* c, const int64_t* starts, int64_t experts,
                                int64_t rows, int64_t columns) {
#pragma omp parallel
  {
    Buffers buffers;
#pragma omp for schedule(dynamic, 1)
    for (int64_t expert = 0; expert < experts; ++expert) {
      const int64_t first = starts[expert], depth = starts[expert + 1] - first;
      multiply({a + first * rows, 1, rows}, {b + first * columns, columns, 1}, c + expert * rows * columns, columns,
               rows, columns, depth, buffers);
    }
  }
}
