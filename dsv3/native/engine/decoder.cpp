// A pass of tokens through consecutive layers over a paged latent cache: attention in absorbed form, dense and MoE.
//
// One call runs all layers, so that nothing but arithmetic is paid for a token: a layer is some twelve steps, each split
// over the threads, with a barrier between. Every number of a token depends on that token's past alone, to the last bit:
// products sum in rising k (packed.h), attention folds the pages of the past in rising order, experts are summed in the
// order in which the router chose them.
#include <omp.h>
#include <sched.h>

#include <atomic>
#include <memory>

#include "packed.h"

namespace {

constexpr int64_t KEYS = 4;           // keys and ...
constexpr int64_t HEADS = WIDTH / 4;  // ... heads of one tile of scores: as many scores as a vector has lanes
constexpr int64_t MOST_STEPS = 20;    // of a layer

}  // namespace

// One layer. A matrix that joins several starts each at a panel. infer/packed_model.py has the same record.
struct Layer {
  const float *input_norm, *query_norm, *latent_norm, *post_norm;
  Matrix down;   // W^DQ (or the query projection itself), then W^DKV with W^KR
  Matrix query;  // W^UQ with W^QR; no columns where there is no query compression
  Matrix key_up, value_up;  // W^UK transposed (latent x nope) and W^UV (v x latent), a group a head
  Matrix output;
  Matrix router;
  const float* router_bias;
  Matrix gate_up, experts_down;       // a group an expert; gate, then up
  Matrix shared_gate_up, shared_down;  // the shared experts, or the whole network of a dense layer
  int64_t is_moe;
};

struct Model {
  int64_t hidden, heads, query_latent, latent, nope, rope, value;
  int64_t experts, chosen, expert_groups, groups_kept, expert_width, shared_width, dense_width;
  int64_t group_score;  // 0: no groups; 1: the best expert; 2: the sum of the two best
  int64_t softmax_scores, normalise_gates;
  float gate_scale, epsilon, softmax_scale;
  const Layer* layers;
};

// The tokens of a pass: sequences end to end, each with consecutive positions, its pages from page_starts[i] on.
struct Pass {
  int64_t first_layer, end_layer, tokens, sequences;
  float* hidden;         // token x hidden: read, and left as it is before the last norm
  float* normed;         // token x hidden
  const float* last_norm;
  const float *cos, *sin;  // token x rope / 2
  const int64_t *positions, *starts, *page_starts, *pages;
  float* cache;  // layer x page x token of the page x (latent + rope)
  int64_t num_pages, page_tokens;
  int32_t* experts;  // layer of the pass x token x chosen: where tokens went, in layers that have experts; or null
};

namespace {

// Threads that take the pieces of one step after the other. A step is over when its pieces are done, whoever did them: a
// thread that the machine has put aside between two pieces keeps nobody waiting, and finds its place when it is back.
class Team {
 public:
  void start(int64_t steps) {
    if (steps > size_) counters_.reset(new Counter[steps]), size_ = steps;
    for (int64_t step = 0; step < steps; ++step) counters_[step].next = 0, counters_[step].done = 0;
    threads_ = omp_get_max_threads();
  }

  // Calls each piece once, `chunk` neighbours by one thread; returns when all are done. All threads make the same calls,
  // with arguments that nothing done in a later step changes: one of them may come late.
  template <class Work>
  void each(int64_t& step, int64_t count, int64_t chunk, Work work) {
    Counter& counter = counters_[step++];
    for (int64_t begin; (begin = counter.next.fetch_add(chunk, std::memory_order_relaxed)) < count;) {
      const int64_t end = std::min(begin + chunk, count);
      for (int64_t piece = begin; piece < end; ++piece) work(piece);
      counter.done.fetch_add(end - begin, std::memory_order_release);
    }
    for (int64_t tries = 0; counter.done.load(std::memory_order_acquire) < count; ++tries) {
      if (tries > 2000) sched_yield();  // not for ever: on a busy machine somebody else may be waiting for this core
#if defined(__x86_64__)
      else __builtin_ia32_pause();
#endif
    }
  }

  int64_t threads() const { return threads_; }

 private:
  struct alignas(64) Counter {
    std::atomic<int64_t> next{0}, done{0};
  };

  std::unique_ptr<Counter[]> counters_;
  int64_t size_ = 0, threads_ = 1;
};

// Room for rows, in FP32 and, if the matrix that reads them wants it, in 8 bits.
struct Room {
  std::vector<float> floats, scales;
  std::vector<int8_t> values;
  std::vector<int32_t> sums;

  Rows rows(int64_t count, int64_t depth, bool in_integers) {
    Rows rows;
    rows.stride = round_up(depth, PANEL) + 16;  // not a power of two: rows would share their places in the cache
    if (int64_t(floats.size()) < count * rows.stride + PANEL) floats.resize(count * rows.stride + PANEL);
    rows.x = floats.data();
    if (in_integers) quantised(rows, count, depth);
    return rows;
  }

  void quantised(Rows& rows, int64_t count, int64_t depth) {
    rows.value_stride = value_stride_of(depth), rows.tiles = div_up(depth, TILE);
    if (int64_t(values.size()) < count * rows.value_stride) values.resize(count * rows.value_stride);
    if (int64_t(scales.size()) < count * rows.tiles) scales.resize(count * rows.tiles), sums.resize(count * rows.tiles * 2);
    rows.values = values.data(), rows.scales = scales.data(), rows.sums = sums.data();
  }
};

void norm_row(const float* x, const float* gain, int64_t dim, float epsilon, float* y) {
  const int64_t whole = dim / WIDTH * WIDTH;
  Vector squares = Vector{};
  float rest = 0;
  int64_t i = 0;
  for (; i < whole; i += WIDTH) squares += load(x + i) * load(x + i);
  for (; i < dim; ++i) rest += x[i] * x[i];
  const float scale = 1.0f / std::sqrt((sum(squares) + rest) / float(dim) + epsilon);
  for (i = 0; i < whole; i += WIDTH) store(y + i, load(x + i) * all(scale) * load(gain + i));
  for (; i < dim; ++i) y[i] = x[i] * scale * gain[i];
}

void add_row(const float* x, int64_t dim, float* y) {
  const int64_t whole = dim / WIDTH * WIDTH;
  int64_t i = 0;
  for (; i < whole; i += WIDTH) store(y + i, load(y + i) + load(x + i));
  for (; i < dim; ++i) y[i] += x[i];
}

void swiglu_row(const float* gate, const float* up, float factor, int64_t width, float* y) {
  int64_t i = 0;
  const auto one = [&](Vector g, Vector u) { return g / (all(1.0f) + exponential(-g)) * u * all(factor); };
  for (; i + WIDTH <= width; i += WIDTH) store(y + i, one(load(gate + i), load(up + i)));
  for (; i < width; ++i) y[i] = one(all(gate[i]), all(up[i]))[0];
}

// Adjacent pairs of x turn by the token's angles (ops/rope.py).
void rotate_row(const float* x, const float* cos, const float* sin, int64_t rope, float* y) {
  for (int64_t pair = 0; pair < rope / 2; ++pair) {
    const float even = x[2 * pair], odd = x[2 * pair + 1];
    y[2 * pair] = even * cos[pair] - odd * sin[pair];
    y[2 * pair + 1] = even * sin[pair] + odd * cos[pair];
  }
}

void quantise(const Rows& rows, int64_t row, int64_t depth) {
  if (!rows.values) return;
  const Rows to = rows.from(row);
  quantise_row(to.x, depth, to.values, to.scales, to.sums);
}

// Lane i of the result is the sum over all lanes of v[i].
Vector sums_of(Vector* v) {
  IntVector left, right;
#pragma GCC unroll 4
  for (int half = WIDTH / 2; half >= 1; half /= 2) {
    for (int lane = 0; lane < WIDTH; ++lane) {
      const int segment = lane / (2 * half) * 2 * half, place = lane % half;
      const int from = segment + place + (lane % (2 * half) >= half ? WIDTH : 0);
      left[lane] = from, right[lane] = from + half;
    }
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) {
      const Vector a = v[i], b = v[i + half];
      v[i] = __builtin_shuffle(a, b, left) + __builtin_shuffle(a, b, right);
    }
  }
  return v[0];
}

constexpr int64_t KEYS_NEAR = 16;  // keys that all heads meet before the next ones: they stay in the first-level cache

// Scores of HEADS heads with KEYS keys: out[head * KEYS + key]. Beyond the true width queries are zero.
Vector scores_of(const float* query, int64_t query_row, const float* keys, int64_t key_row, int64_t width) {
  Vector totals[HEADS * KEYS] = {};
  for (int64_t i = 0; i < width; i += WIDTH) {
    Vector key[KEYS];
#pragma GCC unroll 4
    for (int64_t k = 0; k < KEYS; ++k) key[k] = load(keys + k * key_row + i);
#pragma GCC unroll 4
    for (int64_t h = 0; h < HEADS; ++h) {
      const Vector q = load(query + h * query_row + i);
#pragma GCC unroll 4
      for (int64_t k = 0; k < KEYS; ++k) totals[h * KEYS + k] += q * key[k];
    }
  }
  return sums_of(totals);
}

constexpr int64_t ROWS_TOGETHER = 32;  // heads of all tokens that meet a page together

// Attends from heads of tokens to their past; `output` is head x PANELs of latent, `query` has zeros at its ends.
struct Attention {
  int64_t latent, width, page_tokens;
  float scale;
  std::vector<float> scores, top, total;

  // Rows are heads of consecutive tokens, `heads` of each; the first token sees `past` entries, each next one more.
  // What a row gets does not depend on the rows beside it.
  void run(const float* query, int64_t query_row, int64_t heads, int64_t tokens, const float* layer, const int64_t* pages,
           int64_t past, float* output, int64_t output_row) {
    const int64_t rows = heads * tokens, padded = round_up(rows, HEADS), key_row = width, room = round_up(page_tokens, WIDTH);
    scores.resize(padded * room);
    top.assign(padded, -INFINITY);
    total.assign(padded, 0.0f);
    for (int64_t h = 0; h < rows; ++h) std::fill_n(output + h * output_row, round_up(latent, PANEL), 0.0f);
    for (int64_t first = 0; first < past + tokens - 1; first += page_tokens) {
      const float* page = layer + pages[first / page_tokens] * page_tokens * width;
      const int64_t count = std::min(page_tokens, past + tokens - 1 - first);
      for (int64_t near = 0; near < count; near += KEYS_NEAR)
        for (int64_t h = 0; h < padded; h += HEADS)
          for (int64_t key = near; key < std::min(near + KEYS_NEAR, count); key += KEYS) {
            const Vector tile = scores_of(query + h * query_row, query_row, page + key * key_row, key_row, round_up(width, WIDTH));
            for (int64_t i = 0; i < HEADS; ++i)
              std::memcpy(&scores[(h + i) * room + key], reinterpret_cast<const float*>(&tile) + i * KEYS, KEYS * sizeof(float));
          }
      for (int64_t h = 0; h < rows; ++h) {
        const int64_t seen = std::clamp<int64_t>(past + h / heads - first, 0, count);
        if (seen) weigh(&scores[h * room], seen, h, output + h * output_row);
        std::fill(&scores[h * room + seen], &scores[h * room + count], 0.0f);
      }
      row_of_tiles_in_strips(rows, room, page, key_row, count, output, output_row);
    }
    for (int64_t h = 0; h < rows; ++h) {
      const Vector share = all(1.0f / total[h]);
      for (int64_t i = 0; i < round_up(latent, PANEL); i += WIDTH)
        store(output + h * output_row + i, load(output + h * output_row + i) * share);
    }
  }

 private:
  // Turns the page's scores of one head into weights, on the scale of the largest score so far.
  void weigh(float* row, int64_t count, int64_t head, float* output) {
    const int64_t vectors = round_up(count, WIDTH);
    for (int64_t i = count; i < vectors; ++i) row[i] = -INFINITY;
    Vector most = load(row);
    for (int64_t i = WIDTH; i < vectors; i += WIDTH) most = larger(most, load(row + i));
    const float above = std::max(top[head], largest(most) * scale);
    const float shrink = top[head] == -INFINITY ? 0.0f : exponential(all(top[head] - above))[0];
    Vector sums = Vector{};
    for (int64_t i = 0; i < vectors; i += WIDTH) {
      Vector weight = exponential(load(row + i) * all(scale) - all(above));
      if (i + WIDTH > count)
        for (int64_t lane = count - i; lane < WIDTH; ++lane) weight[lane] = 0.0f;
      store(row + i, weight);
      sums += weight;
    }
    total[head] = total[head] * shrink + sum(sums);
    if (shrink != 1.0f && top[head] != -INFINITY)
      for (int64_t i = 0; i < round_up(latent, PANEL); i += WIDTH) store(output + i, load(output + i) * all(shrink));
    top[head] = above;
  }

  void row_of_tiles_in_strips(int64_t heads, int64_t room, const float* page, int64_t key_row, int64_t count,
                              float* output, int64_t output_row) {
    // All heads meet a strip of the page's columns before the next one, which so comes from the first-level cache.
    constexpr int64_t STRIP = TILE_VECTORS * WIDTH;
    for (int64_t column = 0; column < round_up(latent, PANEL); column += STRIP)
      for (int64_t h = 0; h < heads; h += TILE_ROWS)
        row_of_tiles<TILE_ROWS, true>(std::min<int64_t>(TILE_ROWS, heads - h), &scores[h * room], room, 1, page + column, key_row,
                                      output + h * output_row + column, output_row,
                                      std::min(STRIP, round_up(latent, PANEL) - column), count);
  }
};

// Which experts a token goes to, best biased score first, and their gate values (model/router.py).
void choose(const Model& model, const Layer& layer, const float* logits, int64_t* experts, float* gates,
            std::vector<float>& room) {
  const int64_t count = model.experts, groups = model.expert_groups, size = count / groups;
  room.resize(2 * count + groups);
  float *affinity = room.data(), *biased = affinity + count, *by_group = biased + count;
  if (model.softmax_scores) {
    const float most = *std::max_element(logits, logits + count);
    float total = 0;
    for (int64_t e = 0; e < count; ++e) total += affinity[e] = std::exp(logits[e] - most);
    for (int64_t e = 0; e < count; ++e) affinity[e] /= total;
  } else {
    for (int64_t e = 0; e < count; ++e) affinity[e] = 1.0f / (1.0f + std::exp(-logits[e]));
  }
  for (int64_t e = 0; e < count; ++e) biased[e] = affinity[e] + (layer.router_bias ? layer.router_bias[e] : 0.0f);
  if (model.group_score) {
    for (int64_t g = 0; g < groups; ++g) {
      float best = -INFINITY, second = -INFINITY;
      for (int64_t e = g * size; e < (g + 1) * size; ++e)
        if (biased[e] > best) second = best, best = biased[e];
        else second = std::max(second, biased[e]);
      by_group[g] = model.group_score == 2 ? best + second : best;
    }
    std::vector<char> kept(groups, 0);
    for (int64_t k = 0; k < model.groups_kept; ++k) {
      int64_t best = -1;
      for (int64_t g = 0; g < groups; ++g)
        if (!kept[g] && (best < 0 || by_group[g] > by_group[best])) best = g;
      kept[best] = 1;
    }
    for (int64_t e = 0; e < count; ++e)
      if (!kept[e / size]) biased[e] = -INFINITY;
  }
  float total = 1e-20f;
  for (int64_t k = 0; k < model.chosen; ++k) {
    int64_t best = -1;
    for (int64_t e = 0; e < count; ++e)
      if (!std::isnan(biased[e]) && (best < 0 || biased[e] > biased[best])) best = e;
    best = std::max<int64_t>(best, 0);
    experts[k] = best, gates[k] = affinity[best];
    total += affinity[best];
    biased[best] = NAN;
  }
  for (int64_t k = 0; k < model.chosen; ++k) {
    if (model.normalise_gates) gates[k] /= total;
    gates[k] *= model.gate_scale;
  }
}

// All that a pass needs besides weights and cache; kept from one pass to the next.
struct Workspace {
  Room normed, down, query_latent, query, nope, absorbed, attended, values, output, logits, gathered, gate_up, active, down_out,
      shared, shared_active, shared_out;
  std::vector<int64_t> experts, row_of, sequence_of;
  // Of each layer, so that a thread that comes late to one does not meet those of the next.
  std::vector<std::vector<int64_t>> first_row, busy;
  std::vector<float> gates, row_gates;
};

class Forward {
 public:
  Forward(const Model& model, const Pass& pass, Workspace& space, Team& team)
      : model_(model), pass_(pass), space_(space), team_(team) {
    const Layer& first = model.layers[pass.first_layer];
    const int64_t tokens = pass.tokens, heads = model.heads, rows = tokens * model.chosen;
    const bool integers = first.down.in_integers();
    key_width_ = model.latent + model.rope;
    head_width_ = model.nope + model.rope;
    latent_at_ = round_up(model.query_latent ? model.query_latent : heads * head_width_, PANEL);
    normed_ = space.normed.rows(tokens, model.hidden, integers);
    down_ = space.down.rows(tokens, latent_at_ + key_width_, false);
    if (model.query_latent) {
      query_latent_ = space.query_latent.rows(tokens, model.query_latent, integers);
      query_ = space.query.rows(tokens, heads * head_width_, false);
    } else {
      query_ = down_;
    }
    nope_ = space.nope.rows(tokens * heads, model.nope, integers);
    // Heads of the next token may be read as padding of the last heads of this one, and what lies beyond the last token.
    absorbed_ = space.absorbed.rows(tokens * heads + HEADS, key_width_ + WIDTH, false);
    attended_ = space.attended.rows(tokens * heads, model.latent, integers);
    values_ = space.values.rows(tokens, heads * model.value, integers);
    output_ = space.output.rows(tokens, model.hidden, false);
    up_at_ = round_up(model.expert_width, PANEL);
    const int64_t widest = std::max(model.shared_width, model.dense_width);
    shared_ = space.shared.rows(tokens, 2 * round_up(widest, PANEL), false);
    shared_active_ = space.shared_active.rows(tokens, widest, integers);
    shared_out_ = space.shared_out.rows(tokens, model.hidden, false);
    if (model.experts) {
      logits_ = space.logits.rows(tokens, model.experts, false);
      gathered_ = space.gathered.rows(rows, model.hidden, integers);
      gate_up_ = space.gate_up.rows(rows, 2 * up_at_, false);
      active_ = space.active.rows(rows, model.expert_width, integers);
      down_out_ = space.down_out.rows(rows, model.hidden, false);
    }
    space.experts.resize(rows), space.gates.resize(rows), space.row_of.resize(rows), space.row_gates.resize(rows);
    space.first_row.resize(pass.end_layer), space.busy.resize(pass.end_layer);
    space.sequence_of.resize(tokens);
    for (int64_t s = 0; s < pass.sequences; ++s)
      for (int64_t t = pass.starts[s]; t < pass.starts[s + 1]; ++t) space.sequence_of[t] = s;
  }

  void run() {
    team_.start((pass_.end_layer - pass_.first_layer) * MOST_STEPS + 1);
#pragma omp parallel
    {
      int64_t step = 0;
      std::vector<float> room;
      Attention attention{model_.latent, key_width_, pass_.page_tokens, model_.softmax_scale, {}, {}, {}};
      for (int64_t layer = pass_.first_layer; layer < pass_.end_layer; ++layer) {
        attend(model_.layers[layer], layer, step, room, attention);
        if (model_.layers[layer].is_moe) mixture(model_.layers[layer], layer, step, room);
        else dense(model_.layers[layer], step, room);
      }
      each_token(step, [&](int64_t t) {
        norm_row(hidden(t), pass_.last_norm, model_.hidden, model_.epsilon, pass_.normed + t * model_.hidden);
      });
    }
  }

 private:
  float* hidden(int64_t token) { return pass_.hidden + token * model_.hidden; }

  template <class Work>
  void each_token(int64_t& step, Work work) {
    team_.each(step, pass_.tokens, std::max<int64_t>(1, pass_.tokens / (4 * team_.threads())), work);
  }

  // Neighbouring panels go to one thread, so that it reads memory in order.
  static int64_t chunk(int64_t pieces, int64_t threads) { return std::max<int64_t>(1, pieces / (6 * threads)); }

  template <class Work>
  void each_panel(int64_t& step, int64_t panels, Work work) {
    team_.each(step, panels, chunk(panels, team_.threads()), work);
  }

  void product(int64_t& step, std::vector<float>& room, const Matrix& matrix, const Rows& from, const Rows& to) {
    each_panel(step, matrix.panels(),
               [&](int64_t p) { multiply_panel(matrix, 0, p, from, pass_.tokens, to.x, to.stride, room); });
  }

  // One product for each head: rows of a head lie `heads` apart.
  void product_of_heads(int64_t& step, std::vector<float>& room, const Matrix& matrix, Rows from, float* to,
                        int64_t to_token, int64_t to_head) {
    const int64_t heads = model_.heads;
    Rows by_token = from;
    by_token.stride *= heads, by_token.value_stride *= heads, by_token.tiles *= heads;
    each_panel(step, heads * matrix.panels(), [&](int64_t piece) {
      const int64_t head = piece / matrix.panels();
      Rows rows = by_token;
      rows.x = from.from(head).x;
      if (from.values) rows.values = from.from(head).values, rows.scales = from.from(head).scales, rows.sums = from.from(head).sums;
      multiply_panel(matrix, head, piece % matrix.panels(), rows, pass_.tokens, to + head * to_head, to_token, room);
    });
  }

  void attend(const Layer& layer, int64_t index, int64_t& step, std::vector<float>& room, Attention& attention) {
    const int64_t heads = model_.heads, half = model_.rope / 2;
    float* cache = pass_.cache + index * pass_.num_pages * pass_.page_tokens * key_width_;
    if (index == pass_.first_layer)
      each_token(step, [&](int64_t t) { norm_input(layer.input_norm, t); });
    product(step, room, layer.down, normed_, down_);
    each_token(step, [&](int64_t t) {
      const float* compressed = down_.x + t * down_.stride;
      if (model_.query_latent) {
        norm_row(compressed, layer.query_norm, model_.query_latent, model_.epsilon, query_latent_.x + t * query_latent_.stride);
        quantise(query_latent_, t, model_.query_latent);
      }
      float* entry = entry_of(cache, t);
      norm_row(compressed + latent_at_, layer.latent_norm, model_.latent, model_.epsilon, entry);
      rotate_row(compressed + latent_at_ + model_.latent, pass_.cos + t * half, pass_.sin + t * half, model_.rope, entry + model_.latent);
    });
    if (model_.query_latent) product(step, room, layer.query, query_latent_, query_);
    each_token(step, [&](int64_t t) {
      for (int64_t head = 0; head < heads; ++head) {
        const float* query = query_.x + t * query_.stride + head * head_width_;
        const int64_t row = t * heads + head;
        std::copy_n(query, model_.nope, nope_.x + row * nope_.stride);
        quantise(nope_, row, model_.nope);
        float* turned = absorbed_.x + row * absorbed_.stride + model_.latent;
        rotate_row(query + model_.nope, pass_.cos + t * half, pass_.sin + t * half, model_.rope, turned);
        std::fill(turned + model_.rope, absorbed_.x + (row + 1) * absorbed_.stride, 0.0f);
      }
    });
    product_of_heads(step, room, layer.key_up, nope_, absorbed_.x, heads * absorbed_.stride, absorbed_.stride);
    const int64_t parts = std::max<int64_t>(1, std::min(heads / HEADS, div_up(team_.threads(), pass_.tokens)));
    const int64_t share = round_up(div_up(heads, parts), HEADS), pieces = div_up(heads, share);
    // Later tokens have the longer past, so they go first. Few heads leave room for those of further tokens beside them.
    const int64_t together = pieces > 1 ? 1 : std::max<int64_t>(1, ROWS_TOGETHER / heads);
    team_.each(step, div_up(pass_.tokens, together) * pieces, 1, [&](int64_t piece) {
      const int64_t group = div_up(pass_.tokens, together) - 1 - piece / pieces;
      const int64_t head = piece % pieces * share, count = std::min(share, heads - head);
      const int64_t end = std::min(pass_.tokens, (group + 1) * together);
      for (int64_t t = group * together; t < end;) {
        int64_t next = t + 1;
        while (next < end && space_.sequence_of[next] == space_.sequence_of[t]) ++next;
        const int64_t row = t * heads + head;
        attention.run(absorbed_.x + row * absorbed_.stride, absorbed_.stride, count, next - t, cache,
                      pass_.pages + pass_.page_starts[space_.sequence_of[t]], pass_.positions[t] + 1,
                      attended_.x + row * attended_.stride, attended_.stride);
        for (int64_t h = 0; h < (next - t) * count; ++h) quantise(attended_, row + h, model_.latent);
        t = next;
      }
    });
    product_of_heads(step, room, layer.value_up, attended_, values_.x, values_.stride, model_.value);
    if (values_.values) each_token(step, [&](int64_t t) { quantise(values_, t, heads * model_.value); });
    product(step, room, layer.output, values_, output_);
    each_token(step, [&](int64_t t) {
      add_row(output_.x + t * output_.stride, model_.hidden, hidden(t));
      norm_input(layer.post_norm, t);
    });
  }

  void norm_input(const float* gain, int64_t t) {
    norm_row(hidden(t), gain, model_.hidden, model_.epsilon, normed_.x + t * normed_.stride);
    quantise(normed_, t, model_.hidden);
  }

  float* entry_of(float* cache, int64_t t) {
    const int64_t position = pass_.positions[t], first = pass_.page_starts[space_.sequence_of[t]];
    const int64_t page = pass_.pages[first + position / pass_.page_tokens];
    return cache + (page * pass_.page_tokens + position % pass_.page_tokens) * key_width_;
  }

  // Ends a layer: the token's residual stream is whole, and the next layer's input can be made.
  void finish(const Layer& layer, int64_t t) {
    const int64_t next = &layer - model_.layers + 1;
    if (next < pass_.end_layer) norm_input(model_.layers[next].input_norm, t);
  }

  void dense(const Layer& layer, int64_t& step, std::vector<float>& room) {
    product(step, room, layer.shared_gate_up, normed_, shared_);
    each_token(step, [&](int64_t t) { activate_shared(model_.dense_width, t); });
    product(step, room, layer.shared_down, shared_active_, shared_out_);
    each_token(step, [&](int64_t t) {
      add_row(shared_out_.x + t * shared_out_.stride, model_.hidden, hidden(t));
      finish(layer, t);
    });
  }

  void activate_shared(int64_t width, int64_t t) {
    const float* gate = shared_.x + t * shared_.stride;
    swiglu_row(gate, gate + round_up(width, PANEL), 1.0f, width, shared_active_.x + t * shared_active_.stride);
    quantise(shared_active_, t, width);
  }

  void mixture(const Layer& layer, int64_t index, int64_t& step, std::vector<float>& room) {
    const int64_t tokens = pass_.tokens, chosen = model_.chosen, shared = model_.shared_width ? layer.shared_gate_up.panels() : 0;
    each_panel(step, layer.router.panels() + shared, [&](int64_t p) {
      if (p < layer.router.panels()) multiply_panel(layer.router, 0, p, normed_, tokens, logits_.x, logits_.stride, room);
      else multiply_panel(layer.shared_gate_up, 0, p - layer.router.panels(), normed_, tokens, shared_.x, shared_.stride, room);
    });
    each_token(step, [&](int64_t t) {
      choose(model_, layer, logits_.x + t * logits_.stride, &space_.experts[t * chosen], &space_.gates[t * chosen], room);
      if (pass_.experts)
        std::copy_n(&space_.experts[t * chosen], chosen, pass_.experts + ((index - pass_.first_layer) * pass_.tokens + t) * chosen);
      if (model_.shared_width) activate_shared(model_.shared_width, t);
    });
    team_.each(step, 1, 1, [&](int64_t) { group_by_expert(space_.first_row[index], space_.busy[index]); });
    team_.each(step, tokens * chosen, std::max<int64_t>(1, tokens * chosen / (4 * team_.threads())), [&](int64_t pair) {
      const int64_t row = space_.row_of[pair], t = pair / chosen;
      space_.row_gates[row] = space_.gates[pair];
      if (normed_.values) {
        const Rows from = normed_.from(t), to = gathered_.from(row);
        std::copy_n(from.values, from.value_stride, to.values);
        std::copy_n(from.scales, from.tiles, to.scales);
        std::copy_n(from.sums, 2 * from.tiles, to.sums);
      } else {
        std::copy_n(normed_.x + t * normed_.stride, model_.hidden, gathered_.x + row * gathered_.stride);
      }
    });
    experts_product(step, room, index, layer.gate_up, gathered_, gate_up_);
    team_.each(step, tokens * chosen, std::max<int64_t>(1, tokens * chosen / (4 * team_.threads())), [&](int64_t row) {
      const float* gate = gate_up_.x + row * gate_up_.stride;
      swiglu_row(gate, gate + up_at_, space_.row_gates[row], model_.expert_width, active_.x + row * active_.stride);
      quantise(active_, row, model_.expert_width);
    });
    experts_product(step, room, index, layer.experts_down, active_, down_out_,
                    model_.shared_width ? &layer.shared_down : nullptr);
    each_token(step, [&](int64_t t) {
      for (int64_t k = 0; k < chosen; ++k)
        add_row(down_out_.x + space_.row_of[t * chosen + k] * down_out_.stride, model_.hidden, hidden(t));
      if (model_.shared_width) add_row(shared_out_.x + t * shared_out_.stride, model_.hidden, hidden(t));
      finish(layer, t);
    });
  }

  void group_by_expert(std::vector<int64_t>& first, std::vector<int64_t>& busy) {
    first.assign(model_.experts + 1, 0);
    busy.clear();
    const int64_t pairs = pass_.tokens * model_.chosen;
    for (int64_t pair = 0; pair < pairs; ++pair) ++first[space_.experts[pair] + 1];
    for (int64_t e = 0; e < model_.experts; ++e) {
      if (first[e + 1]) busy.push_back(e);
      first[e + 1] += first[e];
    }
    std::vector<int64_t> next(first.begin(), first.end() - 1);
    for (int64_t pair = 0; pair < pairs; ++pair) space_.row_of[pair] = next[space_.experts[pair]]++;
  }

  // The products of all experts that have rows, and beside them one for all tokens.
  void experts_product(int64_t& step, std::vector<float>& room, int64_t index, const Matrix& matrix, const Rows& from,
                       const Rows& to, const Matrix* shared = nullptr) {
    const std::vector<int64_t>&first = space_.first_row[index], &busy = space_.busy[index];
    const int64_t panels = matrix.panels(), routed = int64_t(busy.size()) * panels;
    each_panel(step, routed + (shared ? shared->panels() : 0), [&](int64_t piece) {
      if (piece >= routed) {
        multiply_panel(*shared, 0, piece - routed, shared_active_, pass_.tokens, shared_out_.x, shared_out_.stride, room);
        return;
      }
      const int64_t expert = busy[piece / panels], row = first[expert];
      multiply_panel(matrix, expert, piece % panels, from.from(row), first[expert + 1] - row, to.x + row * to.stride,
                     to.stride, room);
    });
  }

  const Model& model_;
  const Pass& pass_;
  Workspace& space_;
  Team& team_;
  int64_t key_width_, head_width_, latent_at_, up_at_;
  Rows normed_, down_, query_latent_, query_, nope_, absorbed_, attended_, values_, output_, logits_, gathered_, gate_up_, active_,
      down_out_, shared_, shared_active_, shared_out_;
};

struct Engine {
  Workspace space;
  Team team;
};

}  // namespace

extern "C" void* engine_new() { return new Engine; }
extern "C" void engine_delete(void* engine) { delete static_cast<Engine*>(engine); }

extern "C" void engine_forward(void* engine, const Model* model, const Pass* pass) {
  Engine& mine = *static_cast<Engine*>(engine);
  Forward(*model, *pass, mine.space, mine.team).run();
}
