// Laying out weights for the engine, and one product with them: what packed.h describes.
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>

#include "packed.h"

namespace {

// to[k][column] = convert(w[column][k]) for one panel, columns beyond the last as zeros. By blocks of k, so that what is
// written lies in the first-level cache until its lines are full.
template <class In, class Out, class Convert>
void transpose(const In* w, int64_t stride, int64_t columns, int64_t depth, Out* to, Convert convert) {
  constexpr int64_t BLOCK = 64;
  for (int64_t first = 0; first < depth; first += BLOCK) {
    const int64_t end = std::min(first + BLOCK, depth);
    for (int64_t c = 0; c < columns; ++c)
      for (int64_t k = first; k < end; ++k) to[k * PANEL + c] = convert(w[c * stride + k]);
    for (int64_t c = columns; c < PANEL; ++c)
      for (int64_t k = first; k < end; ++k) to[k * PANEL + c] = Out(0);
  }
}

uint16_t nearest_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return uint16_t(bits >> 16 | 0x40);  // NaN stays one
  return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

float widened(uint16_t bf16) {
  const uint32_t bits = uint32_t(bf16) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Symmetric, to the nearest multiple of the group's largest / MOST; kept with OFFSET added, as unsigned numbers.
template <int64_t GROUP, int MOST, int OFFSET, class Put>
void quantise_panel(const float* w, int64_t stride, int64_t columns, int64_t depth, float* scales, Put put) {
  for (int64_t c = 0; c < PANEL; ++c)
    for (int64_t first = 0, group = 0; first < depth; first += GROUP, ++group) {
      const int64_t end = std::min(first + GROUP, depth);
      float top = 0;
      if (c < columns)
        for (int64_t k = first; k < end; ++k) top = std::max(top, std::fabs(w[c * stride + k]));
      scales[group * PANEL + c] = top / MOST;
      const float inverse = top > 0 ? MOST / top : 0.0f;
      for (int64_t k = first; k < end; ++k)
        put(k, c, int(std::nearbyintf(c < columns ? w[c * stride + k] * inverse : 0.0f)) + OFFSET);
    }
}

void pack_int8(const float* w, int64_t stride, int64_t columns, int64_t depth, uint8_t* to, float* scales) {
  std::memset(to, 0, round_up(depth, 4) * PANEL);
  quantise_panel<TILE, 127, 128>(w, stride, columns, depth, scales, [&](int64_t k, int64_t c, int value) {
    to[k / 4 * 4 * PANEL + c * 4 + k % 4] = uint8_t(value);
  });
}

void pack_int4(const float* w, int64_t stride, int64_t columns, int64_t depth, uint8_t* to, float* scales) {
  std::memset(to, 0, round_up(depth, 8) * PANEL / 2);
  quantise_panel<HALF_TILE, 7, 8>(w, stride, columns, depth, scales, [&](int64_t k, int64_t c, int value) {
    to[k / 8 * 4 * PANEL + c * 4 + k % 4] |= uint8_t(value << (k % 8 < 4 ? 0 : 4));
  });
}

}  // namespace

// Writes the matrix w (`columns` x `depth`, rows `stride` apart; FP32, or BF16) as panels first_panel, ... of a group.
extern "C" void pack_matrix(const Matrix* matrix, int64_t group, int64_t first_panel, const void* w, int64_t in_bf16,
                            int64_t stride, int64_t columns) {
  const int64_t depth = matrix->depth;
#pragma omp parallel
  {
    std::vector<float> wide(in_bf16 && matrix->in_integers() ? PANEL * depth : 0);
#pragma omp for schedule(static)
    for (int64_t p = 0; p < div_up(columns, PANEL); ++p) {
      const float* from = static_cast<const float*>(w) + p * PANEL * stride;
      const uint16_t* narrow = static_cast<const uint16_t*>(w) + p * PANEL * stride;
      const int64_t here = std::min(PANEL, columns - p * PANEL);
      uint8_t* to = matrix->panel(group, first_panel + p);
      float* scales = matrix->scales_of(group, first_panel + p);
      if (matrix->format == FP32) {
        float* floats = reinterpret_cast<float*>(to);
        if (in_bf16) transpose(narrow, stride, here, depth, floats, widened);
        else transpose(from, stride, here, depth, floats, [](float x) { return x; });
      } else if (matrix->format == BF16) {
        uint16_t* halves = reinterpret_cast<uint16_t*>(to);
        if (in_bf16) transpose(narrow, stride, here, depth, halves, [](uint16_t x) { return x; });
        else transpose(from, stride, here, depth, halves, nearest_bf16);
      } else {
        int64_t from_stride = stride;
        if (in_bf16) {
          for (int64_t c = 0; c < here; ++c)
            for (int64_t k = 0; k < depth; ++k) wide[c * depth + k] = widened(narrow[c * stride + k]);
          from = wide.data(), from_stride = depth;
        }
        if (matrix->format == INT8) pack_int8(from, from_stride, here, depth, to, scales);
        else pack_int4(from, from_stride, here, depth, to, scales);
      }
    }
  }
}

// The same for bytes that are E4M3 already, `scales` a block of 128 x 128. Returns how many of them are NaN.
extern "C" int64_t pack_fp8(const Matrix* matrix, int64_t group, int64_t first_panel, const uint8_t* w, int64_t stride,
                            const float* scales, int64_t columns) {
  const int64_t depth = matrix->depth, blocks = div_up(depth, TILE);
  std::atomic<int64_t> not_numbers{0};
#pragma omp parallel for schedule(static)
  for (int64_t p = 0; p < div_up(columns, PANEL); ++p) {
    uint8_t* to = matrix->panel(group, first_panel + p);
    int64_t bad = 0;
    transpose(w + p * PANEL * stride, stride, std::min(PANEL, columns - p * PANEL), depth, to, [&](uint8_t byte) {
      bad += (byte & 0x7F) == 0x7F;
      return byte;
    });
    std::copy_n(scales + p * PANEL / TILE * blocks, blocks, matrix->scales_of(group, first_panel + p));
    not_numbers += bad;
  }
  return not_numbers;
}

extern "C" int64_t matrix_bytes(const Matrix* matrix) { return matrix->groups * matrix->panels() * matrix->panel_bytes(); }
extern "C" int64_t matrix_scales(const Matrix* matrix) { return matrix->groups * matrix->panels() * matrix->panel_scales(); }
extern "C" int64_t panel_columns() { return PANEL; }

// y = x @ W.T for group `group` of the matrix.
extern "C" void packed_linear(const Matrix* matrix, int64_t group, const float* x, int64_t x_row, int64_t rows, float* y,
                              int64_t y_row) {
  Rows from;
  from.x = const_cast<float*>(x), from.stride = x_row;
  std::vector<int8_t> values;
  std::vector<float> scales;
  std::vector<int32_t> sums;
  if (matrix->in_integers()) {
    from.value_stride = value_stride_of(matrix->depth), from.tiles = div_up(matrix->depth, TILE);
    values.resize(rows * from.value_stride), scales.resize(rows * from.tiles), sums.resize(rows * from.tiles * 2);
    from.values = values.data(), from.scales = scales.data(), from.sums = sums.data();
#pragma omp parallel for schedule(static) if (rows > 8)
    for (int64_t row = 0; row < rows; ++row) {
      const Rows to = from.from(row);
      quantise_row(to.x, matrix->depth, to.values, to.scales, to.sums);
    }
  }
#pragma omp parallel
  {
    std::vector<float> room;
#pragma omp for schedule(dynamic, 4)
    for (int64_t p = 0; p < matrix->panels(); ++p) multiply_panel(*matrix, group, p, from, rows, y, y_row, room);
  }
}

// Asks for memory in pages of 2 MB before it is first written: fewer faults while it fills, fewer misses while it is read.
extern "C" void in_large_pages(uint8_t* memory, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t LARGE = 2 << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(memory) + LARGE - 1) / LARGE * LARGE;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / LARGE * LARGE;
  if (end > first) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);  // a wish: refused, all still works
#endif
}
