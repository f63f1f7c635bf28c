// Causal attention of MLA in its expanded form, forward and backward, without scores in memory.
//
// Reads what the projections wrote, as they wrote it: queries [token][head][nope | rope], keys and values
// [token][head][nope | value], one rope key a token. Turning the rope parts, and giving every head the shared key, is
// done while a head is copied into the cache. Keys may be wider than values, which torch's CPU kernels do not allow.
//
// The queries of a sequence may be those of its last tokens alone, the others being elsewhere. Blocks of queries begin
// where blocks of keys do; before the first query the first of them holds zeros, of which nothing is written.
//
// One head of one sequence is one piece of work, done by one thread in a fixed order: results do not depend on the
// number of threads. Blocks above the diagonal are skipped, and so are tiles above it in blocks on it.
#include <algorithm>
#include <cmath>
#include <limits>

#include "vector.h"

namespace {

constexpr int64_t BLOCK = 96;  // tokens; a multiple of the tile's rows and columns on every machine
constexpr int64_t SPAN = 4 * BLOCK;  // keys that the forward pass weighs together: fewer rescalings
static_assert(BLOCK % TILE_ROWS == 0 && BLOCK % (TILE_VECTORS * WIDTH) == 0);
constexpr float NEVER = -std::numeric_limits<float>::infinity();

struct Shape {
  int64_t heads, nope, rope, value;
  float scale;
  int64_t key() const { return nope + rope; }
  int64_t wide_key() const { return round_up(key(), WIDTH); }
  int64_t wide_value() const { return round_up(value, WIDTH); }
};

// std::copy_n calls memmove, which costs more than these few numbers.
inline void copy(const float* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + WIDTH <= count; i += WIDTH) store(to + i, load(from + i));
  for (; i < count; ++i) to[i] = from[i];
}

// Asks for numbers that will be read soon. One head's are far apart in memory, and the processor does not guess it.
constexpr int64_t AHEAD = 16;  // tokens
inline void fetch(const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(from + i);
}

// Turns pairs (2k, 2k + 1) by the token's angles, or back by the same angles.
inline void turn(const float* from, float* to, const float* cos, const float* sin, int64_t pairs, float sign) {
  for (int64_t k = 0; k < pairs; ++k) {
    const float even = from[2 * k], odd = from[2 * k + 1], s = sign * sin[k];
    to[2 * k] = even * cos[k] - odd * s;
    to[2 * k + 1] = even * s + odd * cos[k];
  }
}

// rows[token][wide] -> blocks[token / BLOCK][dim][token % BLOCK]: what the products with transposed keys want.
void transpose_blocks(const float* rows, int64_t tokens, int64_t wide, float* blocks) {
  for (int64_t start = 0; start < tokens; start += BLOCK) {
    float* block = blocks + start * wide;
    const int64_t count = std::min(BLOCK, tokens - start);
    for (int64_t dim = 0; dim < wide; ++dim)
      for (int64_t t = 0; t < BLOCK; ++t) block[dim * BLOCK + t] = t < count ? rows[(start + t) * wide + dim] : 0.0f;
  }
}

// One head of one sequence, turned, scaled and laid out side by side. Kept by each thread between pieces of work.
struct Head {
  std::vector<float> query, key, value, key_columns;

  // Keys of a sequence from its first token on; queries of those from `past` on, in rows that count from `begin`.
  void read(const Shape& s, int64_t keys, int64_t past, int64_t begin, const float* queries, const float* key_values,
            const float* rope_keys, const float* cos, const float* sin) {
    const int64_t wide_key = s.wide_key(), wide_value = s.wide_value(), pairs = s.rope / 2;
    query.assign((keys - begin) * wide_key, 0.0f);
    key.assign(keys * wide_key, 0.0f);
    value.assign(keys * wide_value, 0.0f);
    key_columns.resize(round_up(keys, BLOCK) * wide_key);
    for (int64_t t = 0; t < keys; ++t) {
      const float* kv = key_values + t * s.heads * (s.nope + s.value);
      fetch(kv + AHEAD * s.heads * (s.nope + s.value), s.nope + s.value);
      float* to = &key[t * wide_key];
      copy(kv, s.nope, to);
      turn(rope_keys + t * s.rope, to + s.nope, cos + t * pairs, sin + t * pairs, pairs, 1.0f);
      copy(kv + s.nope, s.value, &value[t * wide_value]);
      if (t < past) continue;
      const float* q = queries + (t - past) * s.heads * s.key();
      fetch(q + AHEAD * s.heads * s.key(), s.key());
      to = &query[(t - begin) * wide_key];
      copy(q, s.nope, to);
      turn(q + s.nope, to + s.nope, cos + t * pairs, sin + t * pairs, pairs, 1.0f);
      for (int64_t dim = 0; dim < s.key(); ++dim) to[dim] *= s.scale;
    }
    transpose_blocks(key.data(), keys, wide_key, key_columns.data());
  }
};

// scores[row][column] = a_row . b_column; where `diagonal`, only tiles that reach below it.
void products(const float* a, int64_t a_row, const float* b, float* scores, int64_t scores_row, int64_t rows,
              int64_t columns, int64_t depth, bool diagonal) {
  const int64_t all_columns = round_up(columns, WIDTH);
  for (int64_t row = 0; row < rows; row += TILE_ROWS) {
    const int64_t count = std::min<int64_t>(TILE_ROWS, rows - row);
    const int64_t reach = diagonal ? std::min(all_columns, round_up(row + count, WIDTH)) : all_columns;
    row_of_tiles<TILE_ROWS, false>(count, a + row * a_row, a_row, 1, b, BLOCK, scores + row * scores_row,
                                   scores_row, reach, depth);
  }
}

}  // namespace

extern "C" void attention_forward(const float* query, const float* key_value, const float* rope_key, const float* cos,
                                  const float* sin, float* output, float* log_sum, const int64_t* starts,
                                  const int64_t* key_starts, int64_t sequences, int64_t heads, int64_t nope,
                                  int64_t rope, int64_t value, float scale) {
  const Shape s{heads, nope, rope, value, scale};
  const int64_t wide_key = s.wide_key(), wide_value = s.wide_value();
#pragma omp parallel
  {
    Head head;
    std::vector<float> scores(BLOCK * SPAN), sums(BLOCK * wide_value), most(BLOCK), weight(BLOCK);
#pragma omp for collapse(2) schedule(dynamic, 1)
    for (int64_t sequence = 0; sequence < sequences; ++sequence)
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t first = starts[sequence], first_key = key_starts[sequence];
        const int64_t keys = key_starts[sequence + 1] - first_key, past = keys - (starts[sequence + 1] - first);
        const int64_t begin = past / BLOCK * BLOCK;
        head.read(s, keys, past, begin, query + (first * heads + h) * s.key(),
                  key_value + (first_key * heads + h) * (nope + value), rope_key + first_key * rope,
                  cos + first_key * rope / 2, sin + first_key * rope / 2);
        for (int64_t q = begin; q < keys; q += BLOCK) {
          const int64_t rows = std::min(BLOCK, keys - q);
          std::fill(sums.begin(), sums.end(), 0.0f);
          std::fill(most.begin(), most.end(), NEVER);
          std::fill(weight.begin(), weight.end(), 0.0f);
          for (int64_t k = 0; k <= q; k += SPAN) {
            const int64_t columns = std::min({SPAN, keys - k, q + BLOCK - k});
            const int64_t corner = q - k;  // first column on the diagonal; beyond `columns` if this span has none
            for (int64_t block = 0; block < columns; block += BLOCK)
              products(&head.query[(q - begin) * wide_key], wide_key, &head.key_columns[(k + block) * wide_key],
                       &scores[block], SPAN, rows, std::min(BLOCK, columns - block), wide_key, block == corner);
            for (int64_t row = 0; row < rows; ++row) {
              float* line = &scores[row * SPAN];
              const int64_t seen = std::min(columns, corner + row + 1), padded = round_up(seen, WIDTH);
              for (int64_t c = seen; c < padded; ++c) line[c] = NEVER;
              Vector top = all(NEVER);
              for (int64_t c = 0; c < padded; c += WIDTH) top = larger(load(line + c), top);
              const float now = std::max(most[row], largest(top)), shrink = std::exp(most[row] - now);
              Vector total{};
              for (int64_t c = 0; c < padded; c += WIDTH) {
                const Vector p = exponential(load(line + c) - now);
                store(line + c, p);
                total += p;
              }
              // A tile of the product below reads all its rows as far as the last of them reaches.
              for (int64_t c = seen; c < std::min(columns, corner + round_up(row + 1, TILE_ROWS)); ++c) line[c] = 0.0f;
              weight[row] = weight[row] * shrink + sum(total);
              most[row] = now;
              if (k > 0)
                for (int64_t d = 0; d < wide_value; ++d) sums[row * wide_value + d] *= shrink;
            }
            for (int64_t row = 0; row < rows; row += TILE_ROWS) {
              const int64_t count = std::min<int64_t>(TILE_ROWS, rows - row);
              row_of_tiles<TILE_ROWS, true>(count, &scores[row * SPAN], SPAN, 1, &head.value[k * wide_value],
                                            wide_value, &sums[row * wide_value], wide_value, wide_value,
                                            std::min(columns, corner + row + count));
            }
          }
          for (int64_t row = std::max<int64_t>(0, past - q); row < rows; ++row) {
            const int64_t place = (first + q + row - past) * heads + h;
            const float share = 1.0f / weight[row];
            for (int64_t d = 0; d < value; ++d) output[place * value + d] = sums[row * wide_value + d] * share;
            log_sum[place] = most[row] + std::log(weight[row]);
          }
        }
      }
  }
}

extern "C" void attention_backward(const float* of_output, const float* query, const float* key_value,
                                   const float* rope_key, const float* cos, const float* sin, const float* output,
                                   const float* log_sum, float* of_query, float* of_key_value, float* of_rope_key,
                                   const int64_t* starts, const int64_t* key_starts, int64_t sequences,
                                   int64_t heads, int64_t nope, int64_t rope, int64_t value, float scale) {
  const Shape s{heads, nope, rope, value, scale};
  const int64_t wide_key = s.wide_key(), wide_value = s.wide_value(), pairs = rope / 2;
  const int64_t all_keys = key_starts[sequences];
  // What each head asks of the shared rope key, [head][token][rope]; summed in the order of heads at the end.
  std::vector<float> of_rope_by_head(heads * all_keys * rope);
#pragma omp parallel
  {
    Head head;
    std::vector<float> slope, value_columns, of_q, of_k, of_v, inner, log_sums;
    std::vector<float> weights(BLOCK * BLOCK), slopes(BLOCK * BLOCK);
#pragma omp for collapse(2) schedule(dynamic, 1)
    for (int64_t sequence = 0; sequence < sequences; ++sequence)
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t first = starts[sequence], first_key = key_starts[sequence];
        const int64_t keys = key_starts[sequence + 1] - first_key, past = keys - (starts[sequence + 1] - first);
        const int64_t begin = past / BLOCK * BLOCK;
        head.read(s, keys, past, begin, query + (first * heads + h) * s.key(),
                  key_value + (first_key * heads + h) * (nope + value), rope_key + first_key * rope,
                  cos + first_key * pairs, sin + first_key * pairs);
        value_columns.resize(round_up(keys, BLOCK) * wide_value);
        transpose_blocks(head.value.data(), keys, wide_value, value_columns.data());
        slope.assign((keys - begin) * wide_value, 0.0f);
        inner.assign(keys - begin, 0.0f);
        log_sums.assign(keys - begin, 0.0f);
        for (int64_t t = past; t < keys; ++t) {
          const int64_t place = (first + t - past) * heads + h;
          float total = 0;
          fetch(of_output + (place + AHEAD * heads) * value, value);
          fetch(output + (place + AHEAD * heads) * value, value);
          for (int64_t d = 0; d < value; ++d) {
            slope[(t - begin) * wide_value + d] = of_output[place * value + d];
            total += of_output[place * value + d] * output[place * value + d];
          }
          inner[t - begin] = total;
          log_sums[t - begin] = log_sum[place];
        }
        of_q.assign((keys - begin) * wide_key, 0.0f);
        of_k.assign(keys * wide_key, 0.0f);
        of_v.assign(keys * wide_value, 0.0f);
        for (int64_t k = 0; k < keys; k += BLOCK) {
          const int64_t columns = std::min(BLOCK, keys - k);
          for (int64_t q = std::max(k, begin); q < keys; q += BLOCK) {
            const int64_t rows = std::min(BLOCK, keys - q), line = q - begin;
            const bool diagonal = k == q;
            products(&head.query[line * wide_key], wide_key, &head.key_columns[k * wide_key], weights.data(), BLOCK,
                     rows, columns, wide_key, diagonal);
            products(&slope[line * wide_value], wide_value, &value_columns[k * wide_value], slopes.data(), BLOCK, rows,
                     columns, wide_value, diagonal);
            for (int64_t row = 0; row < rows; ++row) {
              float *p = &weights[row * BLOCK], *ds = &slopes[row * BLOCK];
              const int64_t seen = diagonal ? row + 1 : columns, padded = round_up(seen, WIDTH);
              for (int64_t c = seen; c < padded; ++c) p[c] = NEVER;
              const float log_total = log_sums[line + row], mean = inner[line + row];
              for (int64_t c = 0; c < padded; c += WIDTH) {
                const Vector weight = exponential(load(p + c) - log_total);
                store(p + c, weight);
                store(ds + c, weight * (load(ds + c) - mean));
              }
              if (diagonal) {
                // Masked places are 0 as far as the tiles below reach.
                const int64_t reach = std::min(BLOCK, std::max(padded, round_up(row + 1, TILE_ROWS)));
                for (int64_t c = seen; c < reach; ++c) p[c] = ds[c] = 0.0f;
              }
            }
            for (int64_t row = 0; row < rows; row += TILE_ROWS) {
              const int64_t count = std::min<int64_t>(TILE_ROWS, rows - row);
              const int64_t depth = diagonal ? row + count : columns;
              row_of_tiles<TILE_ROWS, true>(count, &slopes[row * BLOCK], BLOCK, 1, &head.key[k * wide_key], wide_key,
                                            &of_q[(line + row) * wide_key], wide_key, wide_key, depth);
            }
            for (int64_t c = 0; c < columns; c += TILE_ROWS) {
              const int64_t count = std::min<int64_t>(TILE_ROWS, columns - c);
              const int64_t from = diagonal ? c : 0;  // rows above the diagonal have weight 0
              row_of_tiles<TILE_ROWS, true>(count, &weights[from * BLOCK + c], 1, BLOCK,
                                            &slope[(line + from) * wide_value], wide_value, &of_v[(k + c) * wide_value],
                                            wide_value, wide_value, rows - from);
              row_of_tiles<TILE_ROWS, true>(count, &slopes[from * BLOCK + c], 1, BLOCK,
                                            &head.query[(line + from) * wide_key], wide_key, &of_k[(k + c) * wide_key],
                                            wide_key, wide_key, rows - from);
            }
          }
        }
        for (int64_t t = 0; t < keys; ++t) {
          const int64_t token = first_key + t;
          if (t >= past) {
            float *from = &of_q[(t - begin) * wide_key], *to = of_query + ((first + t - past) * heads + h) * s.key();
            for (int64_t d = 0; d < s.key(); ++d) from[d] *= scale;
            copy(from, nope, to);
            turn(from + nope, to + nope, cos + token * pairs, sin + token * pairs, pairs, -1.0f);
          }
          float* to = of_key_value + (token * heads + h) * (nope + value);
          copy(&of_k[t * wide_key], nope, to);
          copy(&of_v[t * wide_value], value, to + nope);
          copy(&of_k[t * wide_key + nope], rope, &of_rope_by_head[(h * all_keys + token) * rope]);
        }
      }
#pragma omp for schedule(static)
    for (int64_t token = 0; token < all_keys; ++token) {
      float* first = &of_rope_by_head[token * rope];
      for (int64_t h = 1; h < heads; ++h)
        for (int64_t d = 0; d < rope; ++d) first[d] += of_rope_by_head[(h * all_keys + token) * rope + d];
      turn(first, of_rope_key + token * rope, cos + token * pairs, sin + token * pairs, pairs, -1.0f);
    }
  }
}
