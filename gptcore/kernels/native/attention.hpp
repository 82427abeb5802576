// One new position looks at all that are known: attention over the cache, by chunks of positions.
//
// The positions known so far are cut into chunks, and (key head, chunk) are the items that threads
// share. An item leaves, for each of its query heads, the largest score, the sum of the
// exponentials and the weighted sum of values; `combine` joins those of all chunks in their order.
// Where the cuts are follows from the number of positions alone, so that a result does not depend
// on the threads.
//
// Source: Milakov and Gimelshein 2018, arXiv:1805.02867 (softmax in pieces).

#pragma once

#include <cmath>
#include <cstdint>

#include "vectors.hpp"

namespace gpt {

constexpr int64_t LEAST_CHUNK = 64;  // positions
constexpr int64_t MOST_CHUNKS = 32;
constexpr int64_t ITEMS = 32;  // (key head, chunk), about; enough for the threads of most machines

inline int64_t chunk_of(int64_t known, int64_t key_heads) {
  int64_t chunks = ITEMS / key_heads < 2 ? 2 : ITEMS / key_heads;
  int64_t even = (known + chunks - 1) / chunks;
  return even < LEAST_CHUNK ? LEAST_CHUNK : (even + LANES - 1) / LANES * LANES;
}

// What each (query head, chunk) leaves: (H, MOST_CHUNKS) and (H, MOST_CHUNKS, D).
struct Partial {
  float* most;
  float* total;
  float* values;
};

inline float square_sum(const float* x, int64_t n) {
  F acc = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) acc += load<F>(x + i) * load<F>(x + i);
  float added = sum(acc);
  for (; i < n; i++) added += x[i] * x[i];
  return added;
}

// A query or key head as it meets the others: normalised where the family does so, and turned by
// its position. `cos` and `sin` are of that position, (D,) each, sin negated in the first half.
inline void finish_head(const float* head, int64_t width, const float* weight, float eps,
                        const float* cos, const float* sin, float scale, float* to) {
  if (weight != nullptr) scale /= std::sqrt(square_sum(head, width) / float(width) + eps);
  for (int64_t i = 0; i < width; i++) to[i] = head[i] * scale;
  if (weight != nullptr)
    for (int64_t i = 0; i < width; i++) to[i] *= weight[i];
  if (cos == nullptr) return;
  int64_t half = width / 2, i = 0;
  for (; i + LANES <= half; i += LANES) {
    F low = load<F>(to + i), high = load<F>(to + half + i);
    store(to + i, low * load<F>(cos + i) + high * load<F>(sin + i));
    store(to + half + i, high * load<F>(cos + half + i) + low * load<F>(sin + half + i));
  }
  for (; i < half; i++) {
    float low = to[i], high = to[half + i];
    to[i] = low * cos[i] + high * sin[i];
    to[half + i] = high * cos[half + i] + low * sin[half + i];
  }
}

constexpr int HEADS_AT_ONCE = 4;
constexpr int POSITIONS_AT_ONCE = 4;
constexpr int STRIPS = LANES == 16 ? 4 : 2;

constexpr int64_t AHEAD_BYTES = 4096;  // of keys; reaching past the end does no harm

// The scores of HEADS queries with `count` keys: row h of `scores` for query h, `stride` floats
// apart. Rows are written up to a multiple of four. Where the cache is `far`, what is needed next
// of it is called, the values too.
template <int HEADS, typename T>
inline void score(const float* q, const T* keys, const T* values, int64_t width, int64_t count,
                  bool far, float* scores, int64_t stride) {
  int64_t whole = width / LANES * LANES;
  for (int64_t s = 0; s < count; s += POSITIONS_AT_ONCE) {
    const T* key[POSITIONS_AT_ONCE];
    GPT_UNROLL
    for (int j = 0; j < POSITIONS_AT_ONCE; j++)
      key[j] = keys + (s + j < count ? s + j : count - 1) * width;
    const char* ahead = reinterpret_cast<const char*>(keys + s * width) + AHEAD_BYTES;
    const char* later = reinterpret_cast<const char*>(values + s * width);
    for (int64_t i = 0; far && i < POSITIONS_AT_ONCE * width * int64_t(sizeof(T)); i += 256)
      for (int line = 0; line < 256; line += 64) {
        prefetch(ahead + i + line);
        prefetch(later + i + line);
      }
    F acc[HEADS][POSITIONS_AT_ONCE] = {};
    for (int64_t i = 0; i < whole; i += LANES)
      GPT_UNROLL
      for (int j = 0; j < POSITIONS_AT_ONCE; j++) {
        F k = load_floats(key[j] + i);
        GPT_UNROLL
        for (int h = 0; h < HEADS; h++) acc[h][j] += load<F>(q + h * width + i) * k;
      }
    GPT_UNROLL
    for (int h = 0; h < HEADS; h++)
      store(scores + h * stride + s, sums(acc[h][0], acc[h][1], acc[h][2], acc[h][3]));
    if (whole == width) continue;
    GPT_UNROLL
    for (int h = 0; h < HEADS; h++)
      GPT_UNROLL
      for (int j = 0; j < POSITIONS_AT_ONCE; j++)
        for (int64_t i = whole; i < width; i++)
          scores[h * stride + s + j] += q[h * width + i] * load_float(key[j] + i);
  }
}

// The weighted sums of `count` values for HEADS queries, columns [i, i + N · LANES).
template <int HEADS, int N, typename T>
inline void gather(const float* weights, int64_t stride, const T* values, int64_t width,
                   int64_t count, int64_t i, float* to, int64_t to_stride) {
  F acc[HEADS][N] = {};
  for (int64_t s = 0; s < count; s++)
    GPT_UNROLL
    for (int n = 0; n < N; n++) {
      F value = load_floats(values + s * width + i + n * LANES);
      GPT_UNROLL
      for (int h = 0; h < HEADS; h++) acc[h][n] += all(weights[h * stride + s]) * value;
    }
  GPT_UNROLL
  for (int h = 0; h < HEADS; h++)
    GPT_UNROLL
    for (int n = 0; n < N; n++) store(to + h * to_stride + i + n * LANES, acc[h][n]);
}

// Turn scores into weights, relative to the largest of them, and return largest and sum. A score
// that is no number makes its weight, and so the sum, none either.
inline void soften(float* scores, int64_t count, float& most, float& total) {
  int64_t padded = (count + LANES - 1) / LANES * LANES;
  for (int64_t s = count; s < padded; s++) scores[s] = scores[0];
  F peaks = load<F>(scores);
  for (int64_t s = LANES; s < padded; s += LANES) {
    F here = load<F>(scores + s);
    peaks = peaks < here ? here : peaks;
  }
  most = largest(peaks);
  F added = {};
  for (int64_t s = 0; s < padded; s += LANES) {
    F weight = exp(load<F>(scores + s) - most);
    store(scores + s, weight);
    added += weight;
  }
  total = sum(added) - float(padded - count) * scores[0];
}

// Let HEADS query heads, from `head` on, look at `count` keys and values: chunk `chunk` of them.
// `q` holds their queries one after the other, `weights` has room for HEADS_AT_ONCE chunks.
template <int HEADS, typename T>
inline void look(const float* q, const T* keys, const T* values, int64_t width, int64_t count,
                 bool far, float* weights, int64_t stride, int64_t head, int64_t chunk,
                 const Partial& to) {
  score<HEADS>(q, keys, values, width, count, far, weights, stride);
  int64_t first = head * MOST_CHUNKS + chunk;
  GPT_UNROLL
  for (int h = 0; h < HEADS; h++) {
    int64_t at = first + h * MOST_CHUNKS;
    soften(weights + h * stride, count, to.most[at], to.total[at]);
  }
  float* out = to.values + first * width;
  int64_t out_stride = MOST_CHUNKS * width, i = 0;
  for (; i + STRIPS * LANES <= width; i += STRIPS * LANES)
    gather<HEADS, STRIPS>(weights, stride, values, width, count, i, out, out_stride);
  for (; i + LANES <= width; i += LANES)
    gather<HEADS, 1>(weights, stride, values, width, count, i, out, out_stride);
  for (; i < width; i++)
    GPT_UNROLL
    for (int h = 0; h < HEADS; h++) {
      float acc = 0;
      for (int64_t s = 0; s < count; s++)
        acc += weights[h * stride + s] * load_float(values + s * width + i);
      out[h * out_stride + i] = acc;
    }
}

// Join the chunks of one head into its output, (D,).
inline void combine(const Partial& from, int64_t head, int64_t chunks, int64_t width, float* to) {
  const float* most = from.most + head * MOST_CHUNKS;
  const float* total = from.total + head * MOST_CHUNKS;
  float peak = most[0];
  for (int64_t c = 1; c < chunks; c++) peak = peak < most[c] ? most[c] : peak;
  float factors[MOST_CHUNKS + LANES];
  float all_of_it = 0;
  for (int64_t c = 0; c < chunks; c += LANES) {
    float differences[LANES] = {};
    for (int i = 0; i < LANES && c + i < chunks; i++) differences[i] = most[c + i] - peak;
    store(factors + c, exp(load<F>(differences)));
  }
  for (int64_t c = 0; c < chunks; c++) all_of_it += factors[c] * total[c];
  for (int64_t c = 0; c < chunks; c++) {
    const float* values = from.values + (head * MOST_CHUNKS + c) * width;
    float factor = factors[c] / all_of_it;
    for (int64_t i = 0; i < width; i++) to[i] = (c == 0 ? 0.0f : to[i]) + factor * values[i];
  }
}

}  // namespace gpt
