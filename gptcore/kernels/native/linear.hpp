// Matrix times vector, for weights in four formats.
//
// fp32 and bf16 are used where the model has them, row by row. int8 and int4 are packed for this
// file: 16 rows lie interleaved by fours of columns, so that one register holds four columns of
// each row, a broadcast of four activations serves all of them, and no sum has to be taken across
// a register. Columns form groups of 32 or 64, the last one filled up with zeros.
//
//   block of 16 rows, int8:  groups × (group / 4) × [16 rows × 4 bytes, w + 128]
//                            then groups × [16 bf16 scales], or [16 fp32 scales] for whole rows
//   block of 16 rows, int4:  groups × (group / 8) × [16 rows × 4 bytes], the low halves four
//                            columns, the high halves the next four
//                            then groups × [16 bf16 scales, 16 bf16 zeros]
//   w = scale · integer, or scale · (code − 8) + zero
//
// Activations become 16-bit integers with one scale a group, and are multiplied as two bytes: a
// decode step waits for the weights, not for the second multiplication. Integer sums are exact, and
// every row adds its groups in their order, so that a result depends on neither the number of
// threads nor how many vectors are multiplied at once.
//
// Error: an activation is off by at most half a step, max|x of the group| / 65,024. With 8 bits it
// is 256 times that, and costs SmolLM2 a divergence of 0.003 beside the 0.003 of the weights. Where
// many vectors are multiplied, arithmetic is all that counts, and a layer that asks for 8 bits gets
// one multiplication instead of two.

#pragma once

#include <cmath>
#include <cstdint>
#include <initializer_list>

#include "vectors.hpp"

namespace gpt {

enum Format : int32_t { FP32 = 0, BF16 = 1, INT8_ROWS = 2, INT8_GROUPS = 3, INT4 = 4 };

// y = W x + bias. Mirrored by ctypes.
struct Linear {
  const void* weights;  // null where the model has no such layer
  const float* bias;    // null without one
  int64_t rows;
  int64_t columns;
  int32_t format;
  int32_t group;            // 32 or 64 where packed
  int32_t activation_bits;  // 16 where packed; 8 with INT8_ROWS alone
};

inline bool is_packed(const Linear& l) { return l.format >= INT8_ROWS; }
inline bool is_fine(const Linear& l) { return l.activation_bits != 8; }
inline int64_t blocks_of(int64_t rows) { return (rows + BLOCK - 1) / BLOCK; }
inline int64_t groups_of(int64_t columns, int group) { return (columns + group - 1) / group; }

// Rows of a block: 16 but for the last one.
inline int rows_of(const Linear& l, int64_t block) {
  int64_t left = l.rows - block * BLOCK;
  return int(left < BLOCK ? left : BLOCK);
}

// Bytes of the integers of a block, and of all of it.
inline int64_t integer_bytes(int format, int64_t columns, int group) {
  return groups_of(columns, group) * group * BLOCK / (format == INT4 ? 2 : 1);
}

inline int64_t block_bytes(int format, int64_t columns, int group) {
  int64_t groups = groups_of(columns, group);
  int64_t scales = format == INT4          ? groups * BLOCK * 4
                   : format == INT8_GROUPS ? groups * BLOCK * 2
                                           : BLOCK * 4;
  return (integer_bytes(format, columns, group) + scales + 63) / 64 * 64;
}

// Vectors of activations as 16-bit integers, 256 · high + low, or as 8-bit ones.
struct Integers {
  int8_t* high;    // (vectors, columns filled up to whole groups), −127 to 127
  int8_t* low;     // likewise, −128 to 127; null where `high` is all there is
  float* scales;   // (vectors, groups)
  int32_t* sums;   // (vectors, groups), of the integers
  int64_t groups;
  int group;
};

constexpr int MOST_GROUP = 64;  // columns
constexpr float STEPS = 127 * 256, FEW_STEPS = 127;
constexpr float SMALLEST = 1e-30f;  // a group of smaller numbers becomes zeros

// Quantize vector t. A value that is no finite number makes its group's scale NaN.
template <typename T>
inline void quantize(const T* x, int64_t columns, const Integers& to, int64_t t) {
  int8_t* high = to.high + t * to.groups * to.group;
  int8_t* low = to.low == nullptr ? nullptr : to.low + t * to.groups * to.group;
  const float steps = low == nullptr ? FEW_STEPS : STEPS;
  const int parts = to.group / LANES;
  for (int64_t g = 0; g < to.groups; g++) {
    int64_t begin = g * to.group;
    int64_t here = columns - begin < to.group ? columns - begin : to.group;
    F group[MOST_GROUP / LANES];
    if (here == to.group) {
      for (int i = 0; i < parts; i++) group[i] = load_floats(x + begin + i * LANES);
    } else {
      float padded[MOST_GROUP];
      for (int64_t k = 0; k < to.group; k++) padded[k] = k < here ? load_float(x + begin + k) : 0;
      for (int i = 0; i < parts; i++) group[i] = load<F>(padded + i * LANES);
    }
    F most = {}, not_finite = {};
    for (int i = 0; i < parts; i++) {
      F size = magnitude(group[i]);
      most = most < size ? size : most;
      not_finite += group[i] * 0.0f;  // 0, or NaN
    }
    float peak = largest(most);
    const bool finite = sum(not_finite) == 0;
    float inverse = finite && peak > SMALLEST ? steps / peak : 0.0f;
    I total = {};
    for (int i = 0; i < parts; i++) {
      I q = finite ? rounded(group[i] * inverse) : I{};
      total += q;
      I upper = low == nullptr ? q : (q + 128) >> 8;
      store(high + begin + i * LANES, __builtin_convertvector(upper, Quarter));
      if (low == nullptr) continue;
      store(low + begin + i * LANES, __builtin_convertvector(q - (upper << 8), Quarter));
    }
    int32_t added = 0;
    for (int i = 0; i < LANES; i++) added += total[i];
    to.scales[t * to.groups + g] = finite ? peak / steps : NAN;
    to.sums[t * to.groups + g] = added;
  }
}

constexpr int64_t PREFETCH_BYTES = 6144;  // ahead of what is read; past the end does no harm

// y[t][row] of BLOCKS neighbouring blocks for VECTORS vectors from t on, of 16 bits where FINE, else
// of 8. The weights are read once for all vectors, and the vectors once for all blocks.
template <int FORMAT, int VECTORS, int BLOCKS, bool FINE>
inline void packed_blocks(const Linear& l, int64_t block, const Integers& x, int64_t t,
                          float (*y)[BLOCKS * BLOCK]) {
  constexpr bool WIDE = FORMAT != INT4;
  constexpr int RESIDUE_OF_CODES = WIDE ? RESIDUE : 8;
  constexpr int ROWS = BLOCKS * PARTS;  // registers of rows
  const int group = l.group;
  const int64_t groups = x.groups;
  const int64_t bytes = block_bytes(FORMAT, l.columns, l.group);
  const char* w = static_cast<const char*>(l.weights) + block * bytes;
  const char* scales = w + integer_bytes(FORMAT, l.columns, l.group);
  auto place = [bytes](int row) { return row / PARTS * bytes; };  // of a row's block
  // Of a pair not into the other block, which is being read already.
  const int64_t ahead =
      BLOCKS == 1 || bytes >= 2 * PREFETCH_BYTES ? PREFETCH_BYTES : BLOCKS * bytes;
  F acc[VECTORS][ROWS] = {};
  for (int64_t g = 0; g < groups; g++) {
    // `low` has what the codes' offset adds; without low bytes it is all there is.
    I high[VECTORS][ROWS] = {}, low[VECTORS][ROWS];
    GPT_UNROLL
    for (int v = 0; v < VECTORS; v++)
      GPT_UNROLL
      for (int r = 0; r < ROWS; r++)
        low[v][r] = all(-RESIDUE_OF_CODES * x.sums[(t + v) * groups + g]);
    const int8_t* xh = x.high + (t * groups + g) * group;
    const int8_t* xl = FINE ? x.low + (t * groups + g) * group : xh;
    for (int k = 0; k < group; k += WIDE ? 4 : 8, w += 64) {
      Bytes first[ROWS], second[ROWS];
      GPT_UNROLL
      for (int r = 0; r < ROWS; r++) {
        if (r % PARTS == 0) prefetch(w + place(r) + ahead);
        Bytes read = load<Bytes>(w + place(r) + r % PARTS * 4 * LANES);
        first[r] = WIDE ? read : read & 15;
        second[r] = bits<Bytes>(bits<U>(read) >> 4) & 15;
      }
      GPT_UNROLL
      for (int v = 0; v < VECTORS; v++) {
        const int64_t at = v * groups * group + k;
        GPT_UNROLL
        for (int r = 0; r < ROWS; r++) {
          if (FINE) high[v][r] = dot<WIDE>(high[v][r], first[r], xh + at);
          low[v][r] = dot<WIDE>(low[v][r], first[r], xl + at);
          if (WIDE) continue;
          if (FINE) high[v][r] = dot<WIDE>(high[v][r], second[r], xh + at + 4);
          low[v][r] = dot<WIDE>(low[v][r], second[r], xl + at + 4);
        }
      }
    }
    GPT_UNROLL
    for (int r = 0; r < ROWS; r++) {
      const char* of_group =
          scales + place(r) + g * BLOCK * (WIDE ? 2 : 4) + r % PARTS * LANES * 2;
      if (FORMAT != INT8_ROWS && r % PARTS == 0) prefetch(of_group + ahead);
      F scale = FORMAT == INT8_ROWS ? F{} : widen(load<Half>(of_group));
      F zero = WIDE ? F{} : widen(load<Half>(of_group + BLOCK * 2));
      GPT_UNROLL
      for (int v = 0; v < VECTORS; v++) {
        // At most 64 · 255 · 127 · 256 = 5.3e8 and the residue, less than 2^31.
        F total = as_float(FINE ? (high[v][r] << 8) + low[v][r] : low[v][r]);
        float step = x.scales[(t + v) * groups + g];
        acc[v][r] += total * (FORMAT == INT8_ROWS ? all(step) : scale * step);
        if (!WIDE) acc[v][r] += zero * (step * float(x.sums[(t + v) * groups + g]));
      }
    }
  }
  GPT_UNROLL
  for (int r = 0; r < ROWS; r++) {
    const char* of_rows = scales + place(r) + r % PARTS * LANES * 4;
    F scale = FORMAT == INT8_ROWS ? load<F>(of_rows) : all(1.0f);
    GPT_UNROLL
    for (int v = 0; v < VECTORS; v++) store(y[v] + r * LANES, acc[v][r] * scale);
  }
}

template <int VECTORS, int BLOCKS, bool FINE>
inline void packed_blocks(const Linear& l, int64_t block, const Integers& x, int64_t t,
                          float (*y)[BLOCKS * BLOCK]) {
  if constexpr (!FINE) return packed_blocks<INT8_ROWS, VECTORS, BLOCKS, FINE>(l, block, x, t, y);
  switch (l.format) {
    case INT8_ROWS: return packed_blocks<INT8_ROWS, VECTORS, BLOCKS, true>(l, block, x, t, y);
    case INT8_GROUPS: return packed_blocks<INT8_GROUPS, VECTORS, BLOCKS, true>(l, block, x, t, y);
    default: return packed_blocks<INT4, VECTORS, BLOCKS, true>(l, block, x, t, y);
  }
}

// Rows of floats that are multiplied at once with so many vectors: half of the registers hold sums.
constexpr int rows_at_once(int vectors, int sums) {
  int rows = (LANES == 16 ? 16 : 8) / (vectors * sums);
  return rows > 4 ? 4 : rows < 1 ? 1 : rows;
}

// The sum of each of ROWS registers; four at once take half as long.
template <int ROWS>
inline void sum_each(const F (&acc)[ROWS], float (&to)[ROWS]) {
  if constexpr (ROWS == 4)
    store(to, sums(acc[0], acc[1], acc[2], acc[3]));
  else
    for (int r = 0; r < ROWS; r++) to[r] = sum(acc[r]);
}

// Products of up to ROWS rows of floats with VECTORS vectors, `stride` floats apart: y[v][r].
template <int VECTORS, int ROWS>
inline void fp32_rows(const float* w, int64_t columns, const float* x, int64_t stride, int rows,
                      float (*y)[BLOCK], int at) {
  F acc[VECTORS][ROWS] = {};
  int64_t whole = columns / LANES * LANES;
  const float* row[ROWS];
  GPT_UNROLL
  for (int r = 0; r < ROWS; r++) row[r] = w + (r < rows ? r : 0) * columns;
  for (int64_t k = 0; k < whole; k += LANES) {
    F ws[ROWS];
    GPT_UNROLL
    for (int r = 0; r < ROWS; r++) {
      prefetch(row[r] + k + PREFETCH_BYTES / 4 / ROWS);
      ws[r] = load<F>(row[r] + k);
    }
    GPT_UNROLL
    for (int v = 0; v < VECTORS; v++) {
      F xs = load<F>(x + v * stride + k);
      GPT_UNROLL
      for (int r = 0; r < ROWS; r++) acc[v][r] += ws[r] * xs;
    }
  }
  GPT_UNROLL
  for (int v = 0; v < VECTORS; v++) {
    float found[ROWS];
    sum_each(acc[v], found);
    for (int r = 0; r < rows; r++) {
      for (int64_t k = whole; k < columns; k++) found[r] += row[r][k] * x[v * stride + k];
      y[v][at + r] = found[r];
    }
  }
}

// As above for bf16; a vector has its even columns and then its odd ones.
template <int VECTORS, int ROWS>
inline void bf16_rows(const uint16_t* w, int64_t columns, const float* x, int64_t stride, int rows,
                      float (*y)[BLOCK], int at) {
  F even[VECTORS][ROWS] = {}, odd[VECTORS][ROWS] = {};
  int64_t pairs = columns / 2, whole = pairs / LANES * LANES, half = (columns + 1) / 2;
  const uint16_t* row[ROWS];
  GPT_UNROLL
  for (int r = 0; r < ROWS; r++) row[r] = w + (r < rows ? r : 0) * columns;
  for (int64_t k = 0; k < whole; k += LANES) {
    F low[ROWS], high[ROWS];
    GPT_UNROLL
    for (int r = 0; r < ROWS; r++) {
      const uint16_t* at_row = row[r] + 2 * k;
      prefetch(at_row + PREFETCH_BYTES / 2 / ROWS);
      U both = load<U>(at_row);  // little-endian: the even column is the lower half
      low[r] = bits<F>(both << 16);
      high[r] = bits<F>(both & 0xffff0000u);
    }
    GPT_UNROLL
    for (int v = 0; v < VECTORS; v++) {
      F xs = load<F>(x + v * stride + k), xo = load<F>(x + v * stride + half + k);
      GPT_UNROLL
      for (int r = 0; r < ROWS; r++) {
        even[v][r] += low[r] * xs;
        odd[v][r] += high[r] * xo;
      }
    }
  }
  GPT_UNROLL
  for (int v = 0; v < VECTORS; v++) {
    F both[ROWS];
    GPT_UNROLL
    for (int r = 0; r < ROWS; r++) both[r] = even[v][r] + odd[v][r];
    float found[ROWS];
    sum_each(both, found);
    for (int r = 0; r < rows; r++) {
      for (int64_t k = 2 * whole; k < columns; k++)
        found[r] += widen(row[r][k]) * x[v * stride + (k % 2 ? half : 0) + k / 2];
      y[v][at + r] = found[r];
    }
  }
}

// Where the integer of a packed weight lies: a byte, and for int4 which half of it.
inline int64_t place_of(int format, int64_t row, int64_t column) {
  int64_t lane = row % BLOCK * 4 + column % 4;
  return (format == INT4 ? column / 8 : column / 4) * 64 + lane;
}

inline int half_of(int64_t column) { return column % 8 < 4 ? 0 : 4; }

// A packed weight's integer, 0 to 15 for int4, from the bytes of its block.
inline int integer_at(int format, const uint8_t* block, int64_t row, int64_t column) {
  int byte = block[place_of(format, row, column)];
  return format == INT4 ? byte >> half_of(column) & 15 : byte - 128;
}

// Row `row` of a matrix, as floats.
inline void copy_row(const Linear& l, int64_t row, float* to) {
  const int64_t columns = l.columns;
  if (l.format == FP32) {
    std::memcpy(to, static_cast<const float*>(l.weights) + row * columns, size_t(columns) * 4);
    return;
  }
  if (l.format == BF16) {
    const uint16_t* from = static_cast<const uint16_t*>(l.weights) + row * columns;
    for (int64_t k = 0; k < columns; k++) to[k] = widen(from[k]);
    return;
  }
  const uint8_t* block = static_cast<const uint8_t*>(l.weights) +
                         row / BLOCK * block_bytes(l.format, columns, l.group);
  const uint8_t* scales = block + integer_bytes(l.format, columns, l.group);
  const int64_t lane = row % BLOCK;
  for (int64_t k = 0; k < columns; k++) {
    const uint8_t* of_group = scales + k / l.group * BLOCK * (l.format == INT4 ? 4 : 2);
    float scale = l.format == INT8_ROWS ? load<float>(scales + lane * 4)
                                        : widen(load<uint16_t>(of_group + lane * 2));
    int code = integer_at(l.format, block, row, k);
    if (l.format == INT4)
      to[k] = float(code - 8) * scale + widen(load<uint16_t>(of_group + BLOCK * 2 + lane * 2));
    else
      to[k] = float(code) * scale;
  }
}

// Vectors of activations, in every form that a layer multiplies.
struct Activation {
  const float* floats;  // `stride` floats apart, as the halves are
  float* halves;        // even columns, then odd ones
  int64_t stride;
  Integers by32;
  Integers by64;
  Integers coarse;  // of 8 bits, in the groups of the layers that take them

  const Integers& of(const Linear& l) const {
    return !is_fine(l) ? coarse : l.group == 32 ? by32 : by64;
  }
};

// In which forms layers that read the same vectors need them.
struct Needs {
  bool halves = false, by32 = false, by64 = false;
  int coarse = 0;  // the group of all layers that take 8-bit integers, 0 where there is none

  Needs(std::initializer_list<const Linear*> layers) {
    for (const Linear* l : layers) {
      if (l->weights == nullptr) continue;
      halves |= l->format == BF16;
      if (!is_packed(*l)) continue;
      if (!is_fine(*l)) {
        coarse = l->group;
        continue;
      }
      by32 |= l->group == 32;
      by64 |= l->group == 64;
    }
  }
};

// `room` with vectors of so many columns at `x`; nothing is computed yet.
inline Activation activation_of(const Activation& room, const float* x, int64_t columns,
                                const Needs& needs) {
  Activation a = room;
  a.floats = x;
  a.by32.groups = groups_of(columns, 32);
  a.by64.groups = groups_of(columns, 64);
  if (needs.coarse != 0) {
    a.coarse.group = needs.coarse;
    a.coarse.groups = groups_of(columns, needs.coarse);
  }
  return a;
}

// Bring vector t into the forms that are needed.
inline void prepare(const Activation& a, const Needs& needs, int64_t columns, int64_t t) {
  const float* from = a.floats + t * a.stride;
  if (needs.halves) {
    float *evens = a.halves + t * a.stride, *odds = evens + (columns + 1) / 2;
    for (int64_t k = 0; k < columns / 2; k++) evens[k] = from[2 * k];
    for (int64_t k = 0; k < columns / 2; k++) odds[k] = from[2 * k + 1];
    if (columns % 2) evens[columns / 2] = from[columns - 1];
  }
  if (needs.by32) quantize(from, columns, a.by32, t);
  if (needs.by64) quantize(from, columns, a.by64, t);
  if (needs.coarse != 0) quantize(from, columns, a.coarse, t);
}

constexpr int PAIR = 2;
// Vectors whose sums the registers hold: by a block, by a pair of them, and by a pair in 8 bits.
constexpr int TILE = LANES == 16 ? 8 : 2;
constexpr int PAIR_TILE = TILE / PAIR;
constexpr int COARSE_TILE = LANES == 16 ? 8 : 2;

// Blocks that are multiplied at once: two of a packed layer share the loads of the vectors. A single
// vector is loaded fast enough for int8, which two streams of weights would make slower.
inline int at_once(const Linear& l, int64_t vectors) {
  if (!is_packed(l)) return 1;
  return vectors == 1 ? (l.format == INT4 ? PAIR : 1) : (vectors >= PAIR_TILE ? PAIR : 1);
}

// Outputs of BLOCKS neighbouring blocks for VECTORS vectors from t on, with the bias; zeros behind
// the last row.
template <int VECTORS, int BLOCKS, bool FINE>
GPT_OUTLINED void tile(const Linear& l, int64_t block, const Activation& a, int64_t t,
                       float (*y)[BLOCKS * BLOCK]) {
  if (is_packed(l)) {
    packed_blocks<VECTORS, BLOCKS, FINE>(l, block, a.of(l), t, y);
  } else if constexpr (BLOCKS == 1) {
    constexpr int WHOLE = rows_at_once(VECTORS, 1), HALVED = rows_at_once(VECTORS, 2);
    int rows = rows_of(l, block);
    int64_t from = block * BLOCK * l.columns, at = t * a.stride;
    if (l.format == FP32)
      for (int r = 0; r < rows; r += WHOLE)
        fp32_rows<VECTORS, WHOLE>(static_cast<const float*>(l.weights) + from + r * l.columns,
                                  l.columns, a.floats + at, a.stride,
                                  rows - r < WHOLE ? rows - r : WHOLE, y, r);
    else
      for (int r = 0; r < rows; r += HALVED)
        bf16_rows<VECTORS, HALVED>(static_cast<const uint16_t*>(l.weights) + from + r * l.columns,
                                   l.columns, a.halves + at, a.stride,
                                   rows - r < HALVED ? rows - r : HALVED, y, r);
  }
  for (int v = 0; v < VECTORS; v++)
    for (int b = 0; b < BLOCKS; b++) {
      float* here = y[v] + b * BLOCK;
      int rows = rows_of(l, block + b);
      for (int r = rows; r < BLOCK; r++) here[r] = 0;
      if (l.bias != nullptr)
        for (int r = 0; r < rows; r++) here[r] += l.bias[(block + b) * BLOCK + r];
    }
}

// As above for the vectors from t to `end`: `take(block, t, y)` for each block and vector.
template <int VECTORS, int BLOCKS, bool FINE, typename Take>
inline void tiles(const Linear& l, int64_t block, const Activation& a, int64_t t, int64_t end,
                  Take&& take) {
  float y[VECTORS][BLOCKS * BLOCK];
  for (; end - t >= VECTORS; t += VECTORS) {
    tile<VECTORS, BLOCKS, FINE>(l, block, a, t, y);
    for (int v = 0; v < VECTORS; v++)
      for (int b = 0; b < BLOCKS; b++) take(block + b, t + v, y[v] + b * BLOCK);
  }
  if constexpr (VECTORS > 1)
    if (t < end) tiles<VECTORS / 2, BLOCKS, FINE>(l, block, a, t, end, take);
}

// Outputs of `many` blocks from `block` on, or of as many as there are, for the vectors from t to
// `end`. The weights are read once a tile.
template <typename Take>
inline void multiply(const Linear& l, int64_t block, int many, const Activation& a, int64_t t,
                     int64_t end, Take&& take) {
  int64_t last = blocks_of(l.rows);
  if (many == PAIR && block + PAIR <= last) {
    if (is_fine(l))
      tiles<PAIR_TILE, PAIR, true>(l, block, a, t, end, take);
    else
      tiles<COARSE_TILE, PAIR, false>(l, block, a, t, end, take);
    return;
  }
  for (int64_t b = block; b < block + many && b < last; b++)
    if (is_packed(l) && !is_fine(l))
      tiles<COARSE_TILE, 1, false>(l, b, a, t, end, take);
    else
      tiles<TILE, 1, true>(l, b, a, t, end, take);
}

}  // namespace gpt
