// FP32 to FP8 and E5M6 with a scale for each tile, and back (dsv3/fp8 has the plain forms; every bit is the same).
//
// Tiles are of two kinds: those that share one scale (1 x 128, 128 x 128), and columns of up to 128 rows, where
// neighbours in a vector have scales of their own. Processors without FP8 do all of it on the bits of FP32.
#include <algorithm>

#include "fp8.h"

namespace {

constexpr float SMALLEST_SCALE = 7.888609052210118e-31f;  // 2^-100
constexpr int64_t COLUMN_BLOCK = 64;                      // columns that are quantised together, tile by tile

inline IntVector larger_bits(IntVector a, IntVector b) { return a > b ? a : b; }

// The code of each number without its sign; they are at most the largest of the format, or NaN. Ties go to even.
template <class F>
inline IntVector encode_magnitude(IntVector magnitude) {
  constexpr int DROPPED = 23 - F::MANTISSA;
  const IntVector rounded = magnitude + ((1 << (DROPPED - 1)) - 1) + ((magnitude >> DROPPED) & 1);
  const IntVector normal = (rounded >> DROPPED) - ((127 - F::BIAS) << F::MANTISSA);
  // Below the normal numbers steps are equal: adding 2^23 of them rounds to a whole number of steps.
  const Vector steps = all(__builtin_ldexpf(1.0f, 23 + 1 - F::BIAS - F::MANTISSA));
  const IntVector subnormal = bits_of(float_of(magnitude) + steps) - bits_of(steps);
  const IntVector code = magnitude < ((128 - F::BIAS) << 23) ? subnormal : normal;
  return magnitude > INFINITE ? all_bits(F::NOT_A_NUMBER) : code;
}

template <class F>
inline Bytes encode(Vector x) {
  const IntVector bits = bits_of(x);
  const IntVector code = encode_magnitude<F>(bits & 0x7FFFFFFF) | ((bits >> 24) & 0x80);
  return __builtin_convertvector(code, Bytes);
}

// largest / LARGEST, rounded up to 20 significant bits or to a power of two; NaN and infinity stay what they are.
template <class F>
inline Vector scale_for(IntVector largest, bool power_of_two) {
  const Vector exact = float_of(largest) / F::LARGEST;
  const int32_t low = power_of_two ? 0x7FFFFF : 0xF;
  const Vector rounded = float_of((bits_of(exact) + low) & ~low);
  const IntVector finite = bits_of(exact) < all_bits(INFINITE);
  return finite ? (rounded < SMALLEST_SCALE ? all(SMALLEST_SCALE) : rounded) : exact;
}

inline IntVector largest_in(const float* x, int64_t x_row, int64_t rows, int64_t columns) {
  IntVector most{};
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t c = 0; c < columns; c += WIDTH)
      most = larger_bits(most, bits_of(load_some(x + row * x_row + c, columns - c)) & 0x7FFFFFFF);
  int32_t all_of_it = 0;
  for (int lane = 0; lane < WIDTH; ++lane) all_of_it = std::max(all_of_it, most[lane]);
  return all_bits(all_of_it);
}

// Where tile number `index` of `matrices` lies; tiles go across, then down, then from matrix to matrix.
struct Tile {
  int64_t first, rows, columns;  // its first element, and how much of it is inside the matrix
  Tile(int64_t index, int64_t matrix_rows, int64_t matrix_columns, int64_t x_row, int64_t height, int64_t width) {
    const int64_t across = (matrix_columns + width - 1) / width, down = (matrix_rows + height - 1) / height;
    const int64_t column = index % across * width, row = index / across % down * height;
    first = (index / across / down * matrix_rows + row) * x_row + column;
    rows = std::min(height, matrix_rows - row);
    columns = std::min(width, matrix_columns - column);
  }
};

inline int64_t tiles_in(int64_t matrices, int64_t rows, int64_t columns, int64_t height, int64_t width) {
  return matrices * ((rows + height - 1) / height) * ((columns + width - 1) / width);
}

template <class F>
void quantise_tiles(const float* x, int64_t x_row, int64_t matrices, int64_t rows, int64_t columns, int64_t height,
                    int64_t width, bool power_of_two, uint8_t* values, float* scales) {
  const int64_t tiles = tiles_in(matrices, rows, columns, height, width);
#pragma omp parallel for schedule(static)
  for (int64_t index = 0; index < tiles; ++index) {
    const Tile from(index, rows, columns, x_row, height, width), to(index, rows, columns, columns, height, width);
    const Vector scale = scale_for<F>(largest_in(x + from.first, x_row, from.rows, from.columns), power_of_two);
    scales[index] = scale[0];
    for (int64_t row = 0; row < from.rows; ++row) {
      const float* source = x + from.first + row * x_row;
      uint8_t* target = values + to.first + row * columns;
      int64_t c = 0;
      for (; c + WIDTH <= from.columns; c += WIDTH) store_some(target + c, encode<F>(load(source + c) / scale), WIDTH);
      const int64_t rest = from.columns - c;
      if (rest) store_some(target + c, encode<F>(load_some(source + c, rest) / scale), rest);
    }
  }
}

// Row by row, not tile by tile: neighbours in memory are written one after the other.
template <class F>
void dequantise_tiles(const uint8_t* values, int64_t matrices, int64_t rows, int64_t columns, int64_t height,
                      int64_t width, const float* scales, float* output) {
  const int64_t across = (columns + width - 1) / width, down = (rows + height - 1) / height;
#pragma omp parallel for schedule(static)
  for (int64_t line = 0; line < matrices * rows; ++line) {
    const float* of_row = scales + (line / rows * down + line % rows / height) * across;
    for (int64_t tile = 0; tile < across; ++tile) {
      const int64_t first = line * columns + tile * width, count = std::min(width, columns - tile * width);
      const Vector scale = all(of_row[tile]);
      int64_t c = 0;
      for (; c + WIDTH <= count; c += WIDTH)
        store(output + first + c, decode<F>(load_some(values + first + c, WIDTH)) * scale);
      if (c < count)
        store_some(output + first + c, decode<F>(load_some(values + first + c, count - c)) * scale, count - c);
    }
  }
}

// Quantise the first `columns` of COLUMN_BLOCK columns that lie in `wide`, row by row, with zeros beyond them.
//
// Rows of the matrix are often a power of two apart, where columns of it do not fit the cache; a copy of a block does.
template <class F>
void quantise_block_of_columns(const float* wide, int64_t rows, int64_t columns, int64_t width, bool power_of_two,
                               uint8_t* values, float* scales) {
  constexpr int VECTORS = COLUMN_BLOCK / WIDTH;
  IntVector most[VECTORS] = {};
  for (int64_t row = 0; row < rows; ++row)
    for (int v = 0; v < VECTORS; ++v)
      most[v] = larger_bits(most[v], bits_of(load(wide + row * COLUMN_BLOCK + v * WIDTH)) & 0x7FFFFFFF);
  Vector scale[VECTORS];
  for (int v = 0; v < VECTORS; ++v) scale[v] = scale_for<F>(most[v], power_of_two);
  for (int v = 0; v * WIDTH < columns; ++v) store_some(scales + v * WIDTH, scale[v], columns - v * WIDTH);
  const int64_t whole = columns / WIDTH;
  for (int64_t row = 0; row < rows; ++row) {
    const float* from = wide + row * COLUMN_BLOCK;
    uint8_t* to = values + row * width;
    int64_t v = 0;
    for (; v < whole; ++v) store_some(to + v * WIDTH, encode<F>(load(from + v * WIDTH) / scale[v]), WIDTH);
    if (v * WIDTH < columns)
      store_some(to + v * WIDTH, encode<F>(load(from + v * WIDTH) / scale[v]), columns - v * WIDTH);
  }
}

// Quantise all columns of all tiles of rows. `copy` puts a block of the matrix into FP32 memory that stays in the cache:
// copy(first row, rows, first column, columns, to), rows of which are COLUMN_BLOCK apart.
template <class F, class Copy>
void quantise_columns(Copy copy, int64_t columns, const int64_t* starts, int64_t tiles, bool power_of_two,
                      uint8_t* values, float* scales) {
  const int64_t blocks = (columns + COLUMN_BLOCK - 1) / COLUMN_BLOCK;
#pragma omp parallel
  {
    std::vector<float> wide;
#pragma omp for schedule(static)
    for (int64_t index = 0; index < tiles * blocks; ++index) {
      const int64_t tile = index / blocks, column = index % blocks * COLUMN_BLOCK, first = starts[tile];
      const int64_t rows = starts[tile + 1] - first, count = std::min(COLUMN_BLOCK, columns - column);
      wide.assign(rows * COLUMN_BLOCK, 0.0f);
      copy(first, rows, column, count, wide.data());
      quantise_block_of_columns<F>(wide.data(), rows, count, columns, power_of_two, values + first * columns + column,
                                   scales + tile * columns + column);
    }
  }
}

template <class F>
void dequantise_columns(const uint8_t* values, int64_t columns, const int64_t* starts, int64_t tiles,
                        const float* scales, float* output) {
#pragma omp parallel for schedule(static)
  for (int64_t tile = 0; tile < tiles; ++tile)
    for (int64_t row = starts[tile]; row < starts[tile + 1]; ++row)
      for (int64_t c = 0; c < columns; c += WIDTH) {
        const int64_t at = row * columns + c, count = columns - c;
        store_some(output + at, decode<F>(load_some(values + at, count)) * load_some(scales + tile * columns + c, count),
                   count);
      }
}

// A column of tiles of a product as a tensor core adds it (Accumulator of dsv3/fp8/gemm.py). The exponent of a product
// is the sum of its factors' fields; those of zeros are far below all others, and below LOWEST nothing is left to cut.
template <int ROWS>
void truncating_rows(int64_t rows, const float* a, int64_t a_row, const float* b, int64_t b_k, float* c, int64_t c_row,
                     int64_t columns, int64_t depth, int64_t at_once, int32_t bits_kept) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS)
      return truncating_rows<ROWS - 1>(rows, a, a_row, b, b_k, c, c_row, columns, depth, at_once, bits_kept);
  }
  constexpr int32_t BIAS = 127, LOWEST = -100;
  const int32_t fraction = bits_kept - 1, mask = ~((1 << (24 - bits_kept)) - 1);
  const auto field = [](IntVector bits) { return (bits >> 23) & 0xFF; };
  for (int64_t column = 0; column < columns; column += WIDTH) {
    Vector total[ROWS] = {};
    for (int64_t start = 0; start < depth; start += at_once) {
      const int64_t end = std::min(start + at_once, depth);
      IntVector highest[ROWS];
      for (int row = 0; row < ROWS; ++row) {
        const IntVector held = field(bits_of(total[row])) - BIAS;
        highest[row] = held > LOWEST ? held : LOWEST - IntVector{};
      }
      for (int64_t k = start; k < end; ++k) {
        const IntVector other = field(bits_of(load(b + k * b_k + column))) - 2 * BIAS;
#pragma GCC unroll 16
        for (int row = 0; row < ROWS; ++row) {
          int32_t bits;
          std::memcpy(&bits, a + row * a_row + k, sizeof bits);
          const IntVector both = other + ((bits >> 23) & 0xFF);
          highest[row] = both > highest[row] ? both : highest[row];
        }
      }
      Vector up[ROWS], plain[ROWS];
      IntVector sum[ROWS];
      for (int row = 0; row < ROWS; ++row) {
        // Beyond 2^127 something is infinite or NaN, and the plain sum is taken.
        highest[row] = highest[row] < BIAS ? highest[row] : BIAS - IntVector{};
        up[row] = float_of((fraction - highest[row] + BIAS) << 23);
        plain[row] = total[row];
        sum[row] = __builtin_convertvector(total[row] * up[row], IntVector);
      }
      for (int64_t k = start; k < end; ++k) {
        const Vector other = load(b + k * b_k + column);
#pragma GCC unroll 16
        for (int row = 0; row < ROWS; ++row) {
          const Vector product = a[row * a_row + k] * other;
          plain[row] += product;
          sum[row] += __builtin_convertvector(product * up[row], IntVector);
        }
      }
      for (int row = 0; row < ROWS; ++row) {
        const Vector down = float_of((highest[row] - fraction + BIAS) << 23);
        const Vector cut = float_of(bits_of(__builtin_convertvector(sum[row], Vector) * down) & mask);
        const IntVector finite = field(bits_of(plain[row])) != 0xFF;
        total[row] = finite ? cut : plain[row];
      }
    }
    for (int row = 0; row < ROWS; ++row) store_some(c + row * c_row + column, total[row], columns - column);
  }
}

}  // namespace

// `two` chooses E5M2; matrices lie end to end, rows of x `x_row` apart, values without gaps.
extern "C" void fp8_quantise_tiles(const float* x, int64_t x_row, int64_t matrices, int64_t rows, int64_t columns,
                                   int64_t height, int64_t width, int64_t power_of_two, int64_t two, uint8_t* values,
                                   float* scales) {
  const auto run = two ? quantise_tiles<E5M2> : quantise_tiles<E4M3>;
  run(x, x_row, matrices, rows, columns, height, width, power_of_two, values, scales);
}

extern "C" void fp8_dequantise_tiles(const uint8_t* values, int64_t matrices, int64_t rows, int64_t columns,
                                     int64_t height, int64_t width, int64_t two, const float* scales, float* output) {
  const auto run = two ? dequantise_tiles<E5M2> : dequantise_tiles<E4M3>;
  run(values, matrices, rows, columns, height, width, scales, output);
}

// Tile t has rows starts[t] to starts[t + 1]; values are row by row as x, scales are tile x column.
extern "C" void fp8_quantise_columns(const float* x, int64_t x_row, int64_t columns, const int64_t* starts,
                                     int64_t tiles, int64_t power_of_two, int64_t two, uint8_t* values, float* scales) {
  const auto copy = [=](int64_t first, int64_t rows, int64_t column, int64_t count, float* to) {
    for (int64_t row = 0; row < rows; ++row)
      std::memcpy(to + row * COLUMN_BLOCK, x + (first + row) * x_row + column, count * sizeof(float));
  };
  const auto run = two ? quantise_columns<E5M2, decltype(copy)> : quantise_columns<E4M3, decltype(copy)>;
  run(copy, columns, starts, tiles, power_of_two, values, scales);
}

// The same from E4M3 in 1 x `width` tiles; `width` is a multiple of WIDTH, so that a vector has one scale.
extern "C" void fp8_requantise_columns(const uint8_t* kept, const float* kept_scales, int64_t width, int64_t columns,
                                       const int64_t* starts, int64_t tiles, int64_t power_of_two, uint8_t* values,
                                       float* scales) {
  const int64_t across = (columns + width - 1) / width;
  const auto copy = [=](int64_t first, int64_t rows, int64_t column, int64_t count, float* to) {
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t c = 0; c < count; c += WIDTH) {
        const float scale = kept_scales[(first + row) * across + (column + c) / width];
        const Bytes bytes = load_some(kept + (first + row) * columns + column + c, count - c);
        store(to + row * COLUMN_BLOCK + c, decode<E4M3>(bytes) * scale);
      }
  };
  quantise_columns<E4M3>(copy, columns, starts, tiles, power_of_two, values, scales);
}

extern "C" void fp8_dequantise_columns(const uint8_t* values, int64_t columns, const int64_t* starts, int64_t tiles,
                                       int64_t two, const float* scales, float* output) {
  const auto run = two ? dequantise_columns<E5M2> : dequantise_columns<E4M3>;
  run(values, columns, starts, tiles, scales, output);
}

// Two numbers of 12 bits lie in three bytes; an odd row ends with a zero that nobody reads.
extern "C" void e5m6_quantise(const float* x, int64_t x_row, int64_t rows, int64_t columns, int64_t width,
                              uint8_t* packed, float* scales) {
  const int64_t across = (columns + width - 1) / width, bytes = (columns + 1) / 2 * 3;
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    uint8_t* to = packed + row * bytes;
    for (int64_t tile = 0; tile < across; ++tile) {
      const int64_t first = tile * width, count = std::min(width, columns - first);
      const float* from = x + row * x_row + first;
      const Vector scale = scale_for<E5M6>(largest_in(from, 0, 1, count), true);
      scales[row * across + tile] = scale[0];
      for (int64_t c = 0; c < count; c += WIDTH) {
        const IntVector bits = bits_of(load_some(from + c, count - c) / scale);
        const IntVector code = encode_magnitude<E5M6>(bits & 0x7FFFFFFF) | ((bits >> 20) & 0x800);
        for (int64_t lane = 0; lane < std::min<int64_t>(WIDTH, count - c); lane += 2, to += 3) {
          const int32_t one = code[lane], other = c + lane + 1 < count ? code[lane + 1] : 0;
          to[0] = one & 0xFF, to[1] = one >> 8 | (other & 0xF) << 4, to[2] = other >> 4;
        }
      }
    }
  }
}

extern "C" void e5m6_dequantise(const uint8_t* packed, int64_t rows, int64_t columns, int64_t width,
                                const float* scales, float* output) {
  const int64_t across = (columns + width - 1) / width, bytes = (columns + 1) / 2 * 3;
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const uint8_t* from = packed + row * bytes;
    for (int64_t c = 0; c < columns; c += WIDTH) {
      IntVector code{};
      for (int64_t lane = 0; lane < std::min<int64_t>(WIDTH, columns - c); lane += 2, from += 3) {
        code[lane] = from[0] | (from[1] & 0xF) << 8;
        code[lane + 1] = from[1] >> 4 | from[2] << 4;
      }
      const IntVector sign = (code & 0x800) << 20;
      const Vector value = float_of(bits_of(decode_magnitude<E5M6>(code & 0x7FF)) | sign);
      store_some(output + row * columns + c, value * scales[row * across + c / width], columns - c);
    }
  }
}

// c = a @ b as a tensor core adds it, `at_once` products at a time (Accumulator of dsv3/fp8/gemm.py).
// Rows of b are `b_k` apart and hold at least round_up(columns, WIDTH) numbers.
extern "C" void truncating_product(const float* a, int64_t a_row, const float* b, int64_t b_k, float* c, int64_t rows,
                                   int64_t columns, int64_t depth, int64_t at_once, int64_t bits) {
  constexpr int ROWS = 4;
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; row += ROWS)
    truncating_rows<ROWS>(std::min<int64_t>(ROWS, rows - row), a + row * a_row, a_row, b, b_k, c + row * columns, columns,
                          columns, depth, at_once, bits);
}
