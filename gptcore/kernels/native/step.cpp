// The decode step: a token in, the logits after it out, in one call.
//
// A call may have several tokens, of one text or of several: the weights are read once for all of
// them, and each gets the bits that it would get alone.
//
// The C interface at the end is all that others see; gptcore/kernels/library.py mirrors its structs.
// Every thread goes through the whole token: what is small (norms, quantizing) each computes for
// itself, what is large (rows of a matrix, heads and chunks of the cache) they share, and between
// two such phases they meet. There are five meetings a block, and twice as many where the tokens are
// so many that what is small is shared too.
//
// Letters of shapes: H query heads, G key/value heads, D head width, W model width, V vocabulary.

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <new>
#include <vector>

#include <sys/mman.h>

#include "attention.hpp"
#include "linear.hpp"
#include "pool.hpp"
#include "vectors.hpp"

namespace gpt {

enum Mlp : int32_t { SWIGLU = 0, GELU_TANH = 1, GELU_ERF = 2 };

// LayerNorm, or RMSNorm where `centred` is 0. Mirrored by ctypes, as all up to Model.
struct Norm {
  const float* weight;
  const float* bias;  // null without one
  float eps;
  int32_t centred;
};

struct Block {
  Norm attention_norm;
  Linear q, k, v, out;
  const float* q_norm;  // (D,), null where the family has none
  const float* k_norm;
  Norm mlp_norm;
  Linear gate, up, down;  // gate is null but for SwiGLU
};

struct Model {
  int64_t layers, heads, kv_heads, head_width, width, vocabulary;
  int32_t mlp;
  int32_t cache_is_bf16;
  float qk_eps;
  Linear embedding;  // (V, W)
  Linear positions;  // (context, W), null where they are rotary
  const Block* blocks;
  Norm norm;
  Linear head;
};

constexpr int64_t MOST_TOKENS = 32;  // of a call
constexpr int64_t ALONE = 4;  // tokens for which each thread prepares what it multiplies by itself

// One token of a call: where it stands, and where it reads and writes.
struct Call {
  int64_t id;
  int64_t position;
  int64_t capacity;
  int64_t layer_stride;  // elements between two layers of a cache, which may hold other texts too
  void* keys;            // (layers, G, capacity, D)
  void* values;
  const float* cos;   // (D,), of this position; null where positions are learned
  const float* sin;
  float* logits;      // (V,), null where they are not wanted
};

inline void normalise(const Norm& norm, const float* x, int64_t n, float* to) {
  float mean = 0;
  if (norm.centred) {
    F acc = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) acc += load<F>(x + i);
    mean = sum(acc);
    for (; i < n; i++) mean += x[i];
    mean /= float(n);
  }
  for (int64_t i = 0; i < n; i++) to[i] = x[i] - mean;
  float shrink = 1.0f / std::sqrt(square_sum(to, n) / float(n) + norm.eps);
  for (int64_t i = 0; i < n; i++) to[i] = to[i] * shrink * norm.weight[i];
  if (norm.bias != nullptr)
    for (int64_t i = 0; i < n; i++) to[i] += norm.bias[i];
}

inline F logistic(F x) { return 1.0f / (1.0f + exp(-x)); }

// The error function. Source: Abramowitz and Stegun 1964, 7.1.26. Error: at most 1.5e-7.
inline F erf(F x) {
  F size = magnitude(x);
  F t = 1.0f / (1.0f + 0.3275911f * size);
  F p = t * 1.061405429f - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  F y = 1.0f - p * t * exp(-size * size);
  return x < 0.0f ? -y : y;
}

// What stands between the layers of the MLP: 16 values of up, and of gate for SwiGLU.
inline void activate(int32_t mlp, const float* gate, float* up) {
  for (int i = 0; i < BLOCK; i += LANES) {
    F x = load<F>(up + i);
    if (mlp == SWIGLU) {
      F g = load<F>(gate + i);
      x = g * logistic(g) * x;
    } else if (mlp == GELU_TANH) {
      // (1 + tanh z) / 2 is the logistic function of 2 z.
      x = x * logistic(1.59576912f * (x + 0.044715f * x * x * x));
    } else {
      x = 0.5f * x * (1.0f + erf(x * 0.70710678f));
    }
    store(up + i, x);
  }
}

// Memory that is freed with its owner, aligned to cache lines.
class Room {
 public:
  template <typename T>
  T* take(int64_t count) {
    size_t bytes = (size_t(count) * sizeof(T) + 64 + 63) / 64 * 64;
    void* memory = std::aligned_alloc(64, bytes);
    if (memory == nullptr) throw std::bad_alloc();
    taken_.push_back(memory);
    return static_cast<T*>(memory);
  }

  Room() = default;
  Room(const Room&) = delete;
  Room& operator=(const Room&) = delete;
  ~Room() {
    for (void* one : taken_) std::free(one);
  }

 private:
  std::vector<void*> taken_;
};

inline Integers integers(Room& room, int64_t vectors, int64_t columns, int group,
                         bool fine = true) {
  int64_t groups = groups_of(columns, group), bytes = vectors * groups * group;
  return {room.take<int8_t>(bytes), fine ? room.take<int8_t>(bytes) : nullptr,
          room.take<float>(vectors * groups), room.take<int32_t>(vectors * groups), groups, group};
}

// Where vectors are prepared for the layers that read them.
struct Bench {
  Bench(Room& room, int64_t vectors, int64_t stride)
      : vector(room.take<float>(vectors * stride)), activation{} {
    activation.halves = room.take<float>(vectors * stride);
    activation.stride = stride;
    activation.by32 = integers(room, vectors, stride, 32);
    activation.by64 = integers(room, vectors, stride, 64);
    activation.coarse = integers(room, vectors, stride + 63, 32, false);  // for groups of 64 too
  }

  float* vector;
  Activation activation;
};

// What one thread needs for itself.
struct Desk {
  Desk(Room& room, int64_t stride, int64_t queries, int64_t head_width, int64_t most_positions)
      : bench(room, ALONE, stride),
        query(room.take<float>(queries * head_width)),
        weights(room.take<float>(HEADS_AT_ONCE * most_positions)) {}

  Bench bench;
  float* query;
  float* weights;
};

// A model on its way through tokens: what all threads write and read. Every vector of a token lies
// `stride_` floats behind that of the token before.
class Session {
 public:
  explicit Session(const Model& model) : m(model) {
    stride_ = m.width;
    for (int64_t i = 0; i < m.layers; i++)
      for (const Linear* l : {&m.blocks[i].out, &m.blocks[i].down})
        if (l->columns > stride_) stride_ = l->columns;
    stride_ = (stride_ + BLOCK + 15) / 16 * 16;
    for (float** one : {&x_, &q_, &k_, &v_, &inner_})
      *one = room_.take<float>(MOST_TOKENS * stride_);
    together_ = std::make_unique<Bench>(room_, MOST_TOKENS, stride_);
    for (Partial& one : seen_)
      one = {room_.take<float>(m.heads * MOST_CHUNKS), room_.take<float>(m.heads * MOST_CHUNKS),
             room_.take<float>(m.heads * MOST_CHUNKS * m.head_width)};
  }

  // Calls that belong to one text stand in the order of their positions, which follow each other.
  void step(const Call* calls, int64_t count, int threads) {
    int64_t chunk = 0;
    for (int64_t t = 0; t < count; t++) {
      int64_t own = chunk_of(calls[t].position + 1, m.kv_heads);
      chunk = chunk < own ? own : chunk;
      enter(calls[t], t);
    }
    if (int(desks_.size()) < threads || chunk + LANES > chunk_room_) make_desks(threads, chunk);
    Pool::of_this_process().run(threads, [&](int thread, Team& team) {
      for (int64_t layer = 0; layer < m.layers; layer++) {
        if (m.cache_is_bf16)
          block<uint16_t>(calls, count, layer, thread, team);
        else
          block<float>(calls, count, layer, thread, team);
      }
      const Call* asking[MOST_TOKENS];
      int64_t wanted = 0;
      for (int64_t t = 0; t < count; t++)
        if (calls[t].logits != nullptr) asking[wanted++] = calls + t;
      if (wanted == 0) return;
      Activation a = arrange(thread, team, wanted, m.width, {&m.head}, nullptr,
                             [&](int64_t t, float* to) {
                               const float* x = x_ + (asking[t] - calls) * stride_;
                               normalise(m.norm, x, m.width, to);
                             });
      share_rows(thread, team, a, wanted, {&m.head}, [&](int, int64_t i, int64_t t, float* y) {
        std::memcpy(asking[t]->logits + i * BLOCK, y, size_t(rows_of(m.head, i)) * sizeof(float));
      });
    });
  }

 private:
  void make_desks(int threads, int64_t chunk) {
    chunk_room_ = (2 * chunk + LANES) / LANES * LANES;
    desks_.clear();
    desk_room_ = std::make_unique<Room>();
    for (int i = 0; i < threads; i++)
      desks_.emplace_back(*desk_room_, stride_, queries(), m.head_width, chunk_room_);
  }

  // Put a token's embedding into the residual stream.
  void enter(const Call& call, int64_t t) {
    float* x = x_ + t * stride_;
    copy_row(m.embedding, call.id, x);
    if (m.positions.weights == nullptr) return;
    copy_row(m.positions, call.position, q_);
    for (int64_t i = 0; i < m.width; i++) x[i] += q_[i];
  }

  // Vectors of `columns` numbers in the forms that `layers` need. They lie at `x`, or where that is
  // null `write(t, to)` writes them first. Each thread does this for itself where they are few, and
  // else all do it together.
  template <typename Write>
  Activation arrange(int thread, Team& team, int64_t count, int64_t columns,
                     std::initializer_list<const Linear*> layers, const float* x, Write&& write) {
    const Needs needs(layers);
    const Bench& bench = count > ALONE ? *together_ : desks_[size_t(thread)].bench;
    Activation a =
        activation_of(bench.activation, x == nullptr ? bench.vector : x, columns, needs);
    auto one = [&](int64_t t) {
      if (x == nullptr) write(t, bench.vector + t * stride_);
      prepare(a, needs, columns, t);
    };
    if (count > ALONE) {
      team.share(thread, count, one);
      team.meet();
    } else {
      for (int64_t t = 0; t < count; t++) one(t);
    }
    return a;
  }

  // Multiply vectors with layers that read them: `take(which, block, t, y)` for every 16 outputs.
  template <typename Take>
  void share_rows(int thread, Team& team, const Activation& a, int64_t count,
                  std::initializer_list<const Linear*> layers, Take&& take) {
    auto items_of = [&](const Linear& l) {
      int many = at_once(l, count);
      return (blocks_of(l.rows) + many - 1) / many;
    };
    int64_t items = 0;
    for (const Linear* l : layers) items += items_of(*l);
    team.share(thread, items, [&](int64_t i) {
      int which = 0;
      while (i >= items_of(*layers.begin()[which])) i -= items_of(*layers.begin()[which++]);
      const Linear& l = *layers.begin()[which];
      int many = at_once(l, count);
      multiply(l, i * many, many, a, 0, count,
               [&](int64_t block, int64_t t, float* y) { take(which, block, t, y); });
    });
  }

  // Multiply vectors with a layer and add the outputs to the residual stream.
  void add_rows(int thread, Team& team, const Activation& a, int64_t count, const Linear& l) {
    share_rows(thread, team, a, count, {&l}, [&](int, int64_t i, int64_t t, const float* y) {
      float* x_here = x_ + t * stride_ + i * BLOCK;
      for (int64_t r = 0; r < BLOCK; r++) x_here[r] += y[r];
    });
  }

  template <typename T>
  void block(const Call* calls, int64_t count, int64_t layer, int thread, Team& team) {
    const Block& b = m.blocks[layer];
    Desk& desk = desks_[size_t(thread)];
    float* to[] = {q_, k_, v_};
    Activation a = arrange(thread, team, count, m.width, {&b.q, &b.k, &b.v}, nullptr,
                           [&](int64_t t, float* normal) {
                             normalise(b.attention_norm, x_ + t * stride_, m.width, normal);
                           });
    share_rows(thread, team, a, count, {&b.q, &b.k, &b.v},
               [&](int which, int64_t i, int64_t t, const float* y) {
                 store_block(y, to[which] + t * stride_ + i * BLOCK);
               });
    team.meet();
    if (count > 1) {  // a token looks at those before it, which may be of this call
      team.share(thread, count * m.kv_heads, [&](int64_t i) {
        int64_t t = i / m.kv_heads, group = i % m.kv_heads;
        keep<T>(calls[t], b, layer, group, t, desk);
        ask(calls[t], b, group, t, q_ + t * stride_ + group * queries() * m.head_width);
      });
      team.meet();
    }
    int64_t items[MOST_TOKENS], all = 0;
    for (int64_t t = 0; t < count; t++) all += items[t] = m.kv_heads * chunks_of(calls[t]);
    team.share(thread, all, [&](int64_t i) {
      int64_t t = 0;
      while (i >= items[t]) i -= items[t++];
      int64_t chunks = chunks_of(calls[t]), group = i / chunks, chunk = i % chunks;
      const float* asked = q_ + t * stride_ + group * queries() * m.head_width;
      if (count == 1) {
        if (chunk == chunks - 1) keep<T>(calls[t], b, layer, group, t, desk);
        ask(calls[t], b, group, t, desk.query);
        asked = desk.query;
      }
      // The token before has just called the cache that they share.
      bool far = t == 0 || calls[t].keys != calls[t - 1].keys;
      look_at<T>(calls[t], layer, group, chunk, t, far, asked, desk);
    });
    team.meet();
    a = arrange(thread, team, count, b.out.columns, {&b.out}, nullptr,
                [&](int64_t t, float* joined) {
                  for (int64_t h = 0; h < m.heads; h++)
                    combine(seen_[t], h, chunks_of(calls[t]), m.head_width,
                            joined + h * m.head_width);
                });
    add_rows(thread, team, a, count, b.out);
    team.meet();
    a = arrange(thread, team, count, m.width, {&b.up, &b.gate}, nullptr,
                [&](int64_t t, float* normal) {
                  normalise(b.mlp_norm, x_ + t * stride_, m.width, normal);
                });
    // Gate and up meet in one thread: what the one leaves in inner_, the other finds there.
    int many = at_once(b.up, count);
    if (m.mlp == SWIGLU && at_once(b.gate, count) < many) many = 1;
    team.share(thread, (blocks_of(b.up.rows) + many - 1) / many, [&](int64_t i) {
      if (m.mlp == SWIGLU)
        multiply(b.gate, i * many, many, a, 0, count, [&](int64_t block, int64_t t, float* y) {
          store_block(y, inner_ + t * stride_ + block * BLOCK);
        });
      multiply(b.up, i * many, many, a, 0, count, [&](int64_t block, int64_t t, float* y) {
        float* inner = inner_ + t * stride_ + block * BLOCK;
        activate(m.mlp, inner, y);
        store_block(y, inner);
      });
    });
    team.meet();
    a = arrange(thread, team, count, b.down.columns, {&b.down}, inner_, [](int64_t, float*) {});
    add_rows(thread, team, a, count, b.down);
    team.meet();
  }

  static void store_block(const float* from, float* to) {
    std::memcpy(to, from, BLOCK * sizeof(float));
  }

  int64_t queries() const { return m.heads / m.kv_heads; }  // of a key head

  int64_t chunks_of(const Call& call) const {
    int64_t known = call.position + 1, size = chunk_of(known, m.kv_heads);
    return (known + size - 1) / size;
  }

  // Where the keys (or values) of a key head begin.
  template <typename T>
  T* lane(void* cache, const Call& call, int64_t layer, int64_t group) const {
    return static_cast<T*>(cache) + layer * call.layer_stride +
           group * call.capacity * m.head_width;
  }

  // Write key and value of token t's key head `group` into its cache.
  template <typename T>
  void keep(const Call& call, const Block& b, int64_t layer, int64_t group, int64_t t, Desk& desk) {
    int64_t width = m.head_width, at = call.position * width;
    T* keys = lane<T>(call.keys, call, layer, group) + at;
    T* values = lane<T>(call.values, call, layer, group) + at;
    const float* value = v_ + t * stride_ + group * width;
    finish_head(k_ + t * stride_ + group * width, width, b.k_norm, m.qk_eps, call.cos, call.sin,
                1.0f, desk.query);
    for (int64_t i = 0; i < width; i++) {
      store_float(keys + i, desk.query[i]);
      store_float(values + i, value[i]);
    }
  }

  // Make token t's queries for key head `group` ready to meet keys; `to` may be where they lie.
  void ask(const Call& call, const Block& b, int64_t group, int64_t t, float* to) {
    const float* from = q_ + t * stride_ + group * queries() * m.head_width;
    for (int64_t i = 0; i < queries() * m.head_width; i += m.head_width)
      finish_head(from + i, m.head_width, b.q_norm, m.qk_eps, call.cos, call.sin,
                  1.0f / std::sqrt(float(m.head_width)), to + i);
  }

  // Let the query heads of token t's key head `group`, which lie at `asked`, look at one chunk of
  // what is known.
  template <typename T>
  void look_at(const Call& call, int64_t layer, int64_t group, int64_t chunk, int64_t t, bool far,
               const float* asked, Desk& desk) {
    int64_t known = call.position + 1, width = m.head_width, size = chunk_of(known, m.kv_heads);
    int64_t begin = chunk * size, end = begin + size < known ? begin + size : known;
    const T* keys = lane<T>(call.keys, call, layer, group);
    const T* values = lane<T>(call.values, call, layer, group);
    for (int64_t i = 0; i < queries(); i += HEADS_AT_ONCE) {
      int64_t heads = queries() - i < HEADS_AT_ONCE ? queries() - i : HEADS_AT_ONCE;
      auto looking = heads == 4 ? look<4, T> : heads == 3 ? look<3, T> : heads == 2 ? look<2, T>
                                                                                     : look<1, T>;
      looking(asked + i * width, keys + begin * width, values + begin * width, width, end - begin,
              far, desk.weights, chunk_room_, group * queries() + i, chunk, seen_[t]);
    }
  }

  const Model& m;
  Room room_;
  int64_t stride_;
  int64_t chunk_room_ = 0;  // positions that fit into a desk's weights, filled up to registers
  float *x_, *q_, *k_, *v_, *inner_;
  Partial seen_[MOST_TOKENS];
  std::unique_ptr<Bench> together_;
  std::unique_ptr<Room> desk_room_;
  std::vector<Desk> desks_;
};

// The sum of all integers of memory whose bytes are a multiple of 64: it is read once, in order.
inline uint32_t added_up(const char* from, int64_t bytes) {
  constexpr int AT_ONCE = 4;
  U acc[AT_ONCE] = {};
  int64_t i = 0, step = AT_ONCE * int64_t(sizeof(U));
  for (; i + step <= bytes; i += step) {
    for (int64_t line = 0; line < step; line += 64) prefetch(from + i + line + PREFETCH_BYTES);
    GPT_UNROLL
    for (int a = 0; a < AT_ONCE; a++) acc[a] += load<U>(from + i + a * int64_t(sizeof(U)));
  }
  for (; i < bytes; i += int64_t(sizeof(U))) acc[0] += load<U>(from + i);
  U all_of_it = (acc[0] + acc[1]) + (acc[2] + acc[3]);
  uint32_t total = 0;
  for (int lane = 0; lane < LANES; lane++) total += all_of_it[lane];
  return total;
}

// Many vectors times one packed matrix.
constexpr int64_t CACHED_BYTES = 1 << 20;  // of activations that stay near while rows go by

template <typename T>
inline void multiply_all(const Linear& l, const T* x, int64_t vectors, float* y, int threads) {
  const bool fine = is_fine(l);
  Room room;
  Integers q = integers(room, vectors, l.columns, l.group, fine);
  Activation a{};
  a.by32 = a.by64 = a.coarse = q;
  int64_t row_bytes = (fine ? 2 : 1) * q.groups * q.group;
  int64_t strip = CACHED_BYTES / row_bytes / TILE * TILE;
  strip = strip < TILE ? TILE : strip;
  int64_t strips = (vectors + strip - 1) / strip;
  int many = at_once(l, vectors);
  int64_t items = (blocks_of(l.rows) + many - 1) / many;
  Pool::of_this_process().run(threads, [&](int thread, Team& team) {
    team.share(thread, vectors,
               [&](int64_t t) { quantize(x + t * l.columns, l.columns, q, t); });
    team.meet();
    team.share(thread, strips * items, [&](int64_t i) {
      int64_t t = i / items * strip, end = t + strip < vectors ? t + strip : vectors;
      multiply(l, i % items * many, many, a, t, end, [&](int64_t block, int64_t v, float* found) {
        std::memcpy(y + v * l.rows + block * BLOCK, found, size_t(rows_of(l, block)) * sizeof *y);
      });
    });
  });
}

// Interleave the 16 rows of a block. `codes` is (rows, columns); with `shift` added, in a byte, it is
// 1 to 255 for int8 and 0 to 15 for int4. What fills up the last rows and columns counts as zero.
inline void pack_block(int format, int64_t rows, int64_t columns, int group, const uint8_t* codes,
                       uint8_t shift, const void* scales, const uint16_t* zeros, int64_t block,
                       uint8_t* to) {
  int64_t groups = groups_of(columns, group), first = block * BLOCK;
  std::memset(to, 0, size_t(block_bytes(format, columns, group)));
  int64_t whole = 0;
  if (first + BLOCK <= rows) {  // four columns of a row lie together
    const uint32_t shifts = 0x01010101u * shift;
    const int64_t at_once = format == INT4 ? 8 : 4;
    for (; whole + at_once <= columns; whole += at_once)
      for (int64_t r = 0; r < BLOCK; r++) {
        const uint8_t* from = codes + (first + r) * columns + whole;
        if (format == INT4)  // no sum is above 15
          store(to + whole * (BLOCK / 2) + r * 4, (load<uint32_t>(from) + shifts) |
                                                      (load<uint32_t>(from + 4) + shifts) << 4);
        else  // 128 or nothing, which is added without a carry
          store(to + whole * BLOCK + r * 4, load<uint32_t>(from) ^ shifts);
      }
  }
  for (int64_t k = whole; k < groups * group; k++)
    for (int64_t r = 0; r < BLOCK; r++) {
      bool inside = first + r < rows && k < columns;
      int middle = format == INT4 ? 8 : 128;
      uint8_t code = inside ? uint8_t(codes[(first + r) * columns + k] + shift) : uint8_t(middle);
      if (format == INT4)
        to[place_of(format, r, k)] |= uint8_t(code << half_of(k));
      else
        to[place_of(format, r, k)] = code;
    }
  uint8_t* behind = to + integer_bytes(format, columns, group);
  for (int64_t r = 0; r < BLOCK && first + r < rows; r++) {
    if (format == INT8_ROWS) {
      std::memcpy(behind + r * 4, static_cast<const float*>(scales) + first + r, 4);
      continue;
    }
    for (int64_t g = 0; g < groups; g++) {
      const uint16_t* scale = static_cast<const uint16_t*>(scales) + (first + r) * groups + g;
      uint8_t* of_group = behind + g * BLOCK * (format == INT4 ? 4 : 2);
      std::memcpy(of_group + r * 2, scale, 2);
      if (format == INT4)
        std::memcpy(of_group + BLOCK * 2 + r * 2, zeros + (first + r) * groups + g, 2);
    }
  }
}

// The way back: what `pack_block` was given.
inline void unpack_block(const Linear& l, int64_t block, int8_t* codes, void* scales,
                         uint16_t* zeros) {
  int64_t groups = groups_of(l.columns, l.group), first = block * BLOCK;
  const uint8_t* from = static_cast<const uint8_t*>(l.weights) +
                        block * block_bytes(l.format, l.columns, l.group);
  const uint8_t* behind = from + integer_bytes(l.format, l.columns, l.group);
  for (int64_t r = 0; r < BLOCK && first + r < l.rows; r++) {
    for (int64_t k = 0; k < l.columns; k++)
      codes[(first + r) * l.columns + k] = int8_t(integer_at(l.format, from, r, k));
    if (l.format == INT8_ROWS) {
      std::memcpy(static_cast<float*>(scales) + first + r, behind + r * 4, 4);
      continue;
    }
    for (int64_t g = 0; g < groups; g++) {
      const uint8_t* of_group = behind + g * BLOCK * (l.format == INT4 ? 4 : 2);
      int64_t at = (first + r) * groups + g;
      std::memcpy(static_cast<uint16_t*>(scales) + at, of_group + r * 2, 2);
      if (l.format == INT4) std::memcpy(zeros + at, of_group + BLOCK * 2 + r * 2, 2);
    }
  }
}

}  // namespace gpt

extern "C" {

const char* gpt_isa() { return gpt::ISA; }

// Null where there is no memory for it. `model` and all it points to must outlive the session.
void* gpt_open(const gpt::Model* model) {
  try {
    return new gpt::Session(*model);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

void gpt_close(void* session) { delete static_cast<gpt::Session*>(session); }

int gpt_most_tokens() { return int(gpt::MOST_TOKENS); }

// 0, or 1 where there is no memory.
int gpt_step(void* session, const gpt::Call* calls, int64_t count, int threads) {
  try {
    static_cast<gpt::Session*>(session)->step(calls, count, threads);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

// y (vectors, rows) = x (vectors, columns) times a packed matrix. 0, or 1 where there is no memory.
int gpt_linear(const gpt::Linear* linear, const void* x, int x_is_bf16, int64_t vectors, float* y,
               int threads) {
  try {
    if (x_is_bf16)
      gpt::multiply_all(*linear, static_cast<const uint16_t*>(x), vectors, y, threads);
    else
      gpt::multiply_all(*linear, static_cast<const float*>(x), vectors, y, threads);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

int64_t gpt_packed_bytes(int format, int64_t rows, int64_t columns, int group) {
  return gpt::blocks_of(rows) * gpt::block_bytes(format, columns, group);
}

void gpt_pack(int format, int64_t rows, int64_t columns, int group, const uint8_t* codes, int shift,
              const void* scales, const uint16_t* zeros, uint8_t* to, int threads) {
  gpt::Pool::of_this_process().run(threads, [&](int thread, gpt::Team& team) {
    team.share(thread, gpt::blocks_of(rows), [&](int64_t block) {
      gpt::pack_block(format, rows, columns, group, codes, uint8_t(shift), scales, zeros, block,
                      to + block * gpt::block_bytes(format, columns, group));
    });
  });
}

// The way back from a packed matrix; `zeros` is written for int4 only.
void gpt_unpack(const gpt::Linear* linear, int8_t* codes, void* scales, uint16_t* zeros,
                int threads) {
  gpt::Pool::of_this_process().run(threads, [&](int thread, gpt::Team& team) {
    team.share(thread, gpt::blocks_of(linear->rows), [&](int64_t block) {
      gpt::unpack_block(*linear, block, codes, scales, zeros);
    });
  });
}

// Rows of a packed matrix as floats: to (count, columns).
void gpt_rows(const gpt::Linear* linear, const int64_t* rows, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i++) gpt::copy_row(*linear, rows[i], to + i * linear->columns);
}

// The sum of `bytes`, a multiple of 64, as 32-bit integers; read once, each thread its part.
uint32_t gpt_added_up(const void* from, int64_t bytes, int threads) {
  std::atomic<uint32_t> total{0};
  gpt::Pool::of_this_process().run(threads, [&](int thread, gpt::Team& team) {
    int64_t begin = bytes / 64 * thread / team.threads() * 64;
    int64_t end = bytes / 64 * (thread + 1) / team.threads() * 64;
    total += gpt::added_up(static_cast<const char*>(from) + begin, end - begin);
  });
  return total.load();
}

// Ask for large pages under what is about to be written, where the system has them.
void gpt_large_pages(void* begin, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  madvise(begin, size_t(bytes), MADV_HUGEPAGE);
#else
  (void)begin, (void)bytes;
#endif
}
}
