// Vectors of one machine register, and the one operation that each instruction set says its own
// way: the sum of four products of bytes. All else is the compiler's vector extension, which GCC
// and Clang both have, so that arithmetic is written once.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(GPT_AVX512) || defined(GPT_AVX2)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

// Before a loop over the members of an array that shall lie in registers.
#if defined(__clang__)
#define GPT_UNROLL _Pragma("unroll")
#else
#define GPT_UNROLL _Pragma("GCC unroll 16")
#endif
#define GPT_OUTLINED __attribute__((noinline))  // once, however many call it

namespace gpt {

#if defined(GPT_AVX512)
constexpr int LANES = 16;
constexpr const char* ISA = "AVX-512 VNNI";
#elif defined(GPT_AVX2)
constexpr int LANES = 8;
constexpr const char* ISA = "AVX2";
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr int LANES = 4;
constexpr const char* ISA = "NEON with dot products";
#elif defined(__ARM_NEON)
constexpr int LANES = 4;
constexpr const char* ISA = "NEON";
#else
constexpr int LANES = 4;
constexpr const char* ISA = "portable C++";
#endif

constexpr int BLOCK = 16;  // rows of a packed matrix that lie interleaved
constexpr int PARTS = BLOCK / LANES;

typedef float F __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));
typedef uint32_t U __attribute__((vector_size(4 * LANES)));
typedef uint16_t Half __attribute__((vector_size(2 * LANES)));
typedef int8_t Quarter __attribute__((vector_size(LANES)));
typedef uint8_t Bytes __attribute__((vector_size(4 * LANES)));

template <typename To, typename From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits are kept");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <typename V>
inline V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <typename V>
inline void store(void* to, V v) {
  std::memcpy(to, &v, sizeof v);
}

inline F all(float x) {
#if defined(GPT_AVX512)
  return reinterpret_cast<F>(_mm512_set1_ps(x));
#elif defined(GPT_AVX2)
  return reinterpret_cast<F>(_mm256_set1_ps(x));
#else
  return F{x, x, x, x};
#endif
}

inline I all(int32_t x) {
#if defined(GPT_AVX512)
  return reinterpret_cast<I>(_mm512_set1_epi32(x));
#elif defined(GPT_AVX2)
  return reinterpret_cast<I>(_mm256_set1_epi32(x));
#else
  return I{x, x, x, x};
#endif
}

// Both keep a NaN of the first argument.
inline F at_least(F x, F low) { return x < low ? low : x; }
inline F at_most(F x, F high) { return x > high ? high : x; }
inline F magnitude(F x) { return bits<F>(bits<U>(x) & 0x7fffffffu); }
inline F as_float(I x) { return __builtin_convertvector(x, F); }

typedef float Four __attribute__((vector_size(16)));

// Four partial sums of a register.
inline Four fold(F x) {
#if defined(GPT_AVX512)
  __m512 all = reinterpret_cast<__m512>(x);
  __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(all), 1));
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), high);
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif defined(GPT_AVX2)
  __m256 all = reinterpret_cast<__m256>(x);
  return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
#else
  return x;
#endif
}

inline float sum(F x) {
  Four four = fold(x);
  return (four[0] + four[2]) + (four[1] + four[3]);
}

#if defined(__clang__)
#define GPT_PICK(x, y, a, b, c, d) __builtin_shufflevector(x, y, a, b, c, d)
#else
typedef int32_t FourPlaces __attribute__((vector_size(16)));
#define GPT_PICK(x, y, a, b, c, d) __builtin_shuffle(x, y, FourPlaces{a, b, c, d})
#endif

// The sums of four registers.
inline Four sums(F a, F b, F c, F d) {
  Four w = fold(a), x = fold(b), y = fold(c), z = fold(d);
  Four wx = GPT_PICK(w, x, 0, 4, 1, 5) + GPT_PICK(w, x, 2, 6, 3, 7);  // w x w x
  Four yz = GPT_PICK(y, z, 0, 4, 1, 5) + GPT_PICK(y, z, 2, 6, 3, 7);
  return GPT_PICK(wx, yz, 0, 1, 4, 5) + GPT_PICK(wx, yz, 2, 3, 6, 7);
}

inline float largest(F x) {
  Four fours[LANES / 4];
  std::memcpy(fours, &x, sizeof x);
  Four most = fours[0];
  for (int i = 1; i < LANES / 4; i++) most = most < fours[i] ? fours[i] : most;
  float low = most[0] < most[1] ? most[1] : most[0];
  float high = most[2] < most[3] ? most[3] : most[2];
  return low < high ? high : low;
}

// bfloat16 is the upper half of a float.
inline F widen(Half x) {
#if defined(GPT_AVX512)  // which GCC does in two halves by itself
  __m512i wide = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(x));
  return bits<F>(reinterpret_cast<U>(wide) << 16);
#else
  return bits<F>(__builtin_convertvector(x, U) << 16);
#endif
}
inline float widen(uint16_t x) { return bits<float>(uint32_t(x) << 16); }

inline uint16_t narrow(float x) {  // to the nearest bfloat16, ties to even
  uint32_t u = bits<uint32_t>(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return uint16_t(u >> 16 | 0x40);  // NaN stays one
  return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

// Elements of a key/value cache, an embedding or an activation, as floats.
inline F load_floats(const float* from) { return load<F>(from); }
inline F load_floats(const uint16_t* from) { return widen(load<Half>(from)); }
inline float load_float(const float* from) { return *from; }
inline float load_float(const uint16_t* from) { return widen(*from); }
inline void store_float(float* to, float x) { *to = x; }
inline void store_float(uint16_t* to, float x) { *to = narrow(x); }

constexpr float ROUNDING = 12582912.0f;  // 1.5 · 2^23: adding it rounds to the nearest integer

inline I rounded(F x) { return bits<I>(x + ROUNDING) - bits<int32_t>(ROUNDING); }

// e^x to 2 units in the last place. Range reduction by ln 2 in two parts, then Taylor to the 7th.
inline F exp(F x) {
  x = at_most(at_least(x, all(-87.0f)), all(88.0f));
  F n = x * 1.44269504f + ROUNDING - ROUNDING;
  F r = x - n * 0.693359375f + n * 2.12194440e-4f;
  F p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return bits<F>(bits<I>(p) + (rounded(n) << 23));
}

// Four neighbouring bytes of x, in every lane.
inline Bytes quads(const int8_t* x) { return bits<Bytes>(all(load<int32_t>(x))); }

// Adds to each lane of `acc` the sum of four products: a lane's four bytes of w, which stand for
// w − 128 (−127 to 127) where `wide` and are at most 15 otherwise, by four bytes of x. Where `wide`
// the result lacks  −RESIDUE · Σx,  which the caller sees to.
#if defined(GPT_AVX512)
constexpr int RESIDUE = 128;

template <bool wide>
inline I dot(I acc, Bytes w, const int8_t* x) {
  return reinterpret_cast<I>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(acc),
                                                 reinterpret_cast<__m512i>(w),
                                                 reinterpret_cast<__m512i>(quads(x))));
}
#elif defined(GPT_AVX2)
constexpr int RESIDUE = 0;

template <bool wide>
inline I dot(I acc, Bytes w, const int8_t* x) {
  __m256i xs = reinterpret_cast<__m256i>(quads(x));
  __m256i ws = reinterpret_cast<__m256i>(w);
  __m256i pairs;
  if (wide) {
    // Two products of 255 · 127 do not fit into 16 bits, but |x| · ±w do: 2 · 128 · 127.
    ws = _mm256_xor_si256(ws, _mm256_set1_epi8(-128));
    pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(xs), _mm256_sign_epi8(ws, xs));
  } else {
    pairs = _mm256_maddubs_epi16(ws, xs);
  }
  __m256i fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  return acc + reinterpret_cast<I>(fours);
}
#elif defined(__ARM_NEON)
constexpr int RESIDUE = 0;

template <bool wide>
inline I dot(I acc, Bytes w, const int8_t* x) {
  int8x16_t ws = bits<int8x16_t>(wide ? w ^ 0x80 : w);
  int8x16_t xs = bits<int8x16_t>(quads(x));
#if defined(__ARM_FEATURE_DOTPROD)
  return bits<I>(vdotq_s32(bits<int32x4_t>(acc), ws, xs));
#else
  int16x8_t low = vmull_s8(vget_low_s8(ws), vget_low_s8(xs));  // at most 127 · 128 each
  int16x8_t high = vmull_s8(vget_high_s8(ws), vget_high_s8(xs));
  int32x4_t fours = vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high));
  return acc + bits<I>(fours);
#endif
}
#else
constexpr int RESIDUE = 0;

template <bool wide>
inline I dot(I acc, Bytes w, const int8_t* x) {
  for (int lane = 0; lane < LANES; lane++)
    for (int k = 0; k < 4; k++) acc[lane] += (int(w[4 * lane + k]) - (wide ? 128 : 0)) * x[k];
  return acc;
}
#endif

// Into the second cache: the first has too few places for what is under way.
inline void prefetch(const void* from) { __builtin_prefetch(from, 0, 2); }

}  // namespace gpt
