// One instruction set's kernel: build.py compiles this file for each, with GAZE_LANES floats to a vector.
//
// Nothing of the standard library is instantiated here: an inline function compiled for AVX-512 could be the
// copy that the linker keeps for everyone.
#include "kernel.h"

namespace gaze {
namespace {

constexpr int W = GAZE_LANES;
typedef float V __attribute__((vector_size(W * 4)));
typedef int32_t VI __attribute__((vector_size(W * 4)));
typedef float V4 __attribute__((vector_size(16)));
typedef uint16_t VU16 __attribute__((vector_size(W * 2)));
typedef uint32_t VU32 __attribute__((vector_size(W * 4)));
typedef int8_t VI8 __attribute__((vector_size(W)));
typedef int16_t VI16 __attribute__((vector_size(W * 2)));

// Query heads and vectors of values whose sums stay in registers: 16 sums of 32 registers, or 8 of 16.
constexpr int kHeads = W == 16 ? 4 : 2;
constexpr int kVectors = 4;

struct Bf16 {
  uint16_t bits;
};

template <class T>
inline T loaded(const void* from) {
  T out;
  __builtin_memcpy(&out, from, sizeof(T));  // rows need not be aligned
  return out;
}

inline V wide(const float* from) { return loaded<V>(from); }

inline V wide(const Bf16* from) {
  VU32 bits = __builtin_convertvector(loaded<VU16>(from), VU32) << 16;
  V out;
  __builtin_memcpy(&out, &bits, sizeof(V));
  return out;
}

inline V wide(const int8_t* from) {
  // In two steps: GCC 12 goes through single elements where a conversion widens by four.
  VI16 half = __builtin_convertvector(loaded<VI8>(from), VI16);
  return __builtin_convertvector(__builtin_convertvector(half, VI), V);
}

// The first `count` elements, the rest zero; nothing behind them is read.
template <class T>
inline V wide_end(const T* from, int64_t count) {
  T some[W];
  for (int i = 0; i < W; ++i) {
    if (i < count) {
      some[i] = from[i];
    } else {
      some[i] = T{};
    }
  }
  return wide(some);
}

inline V4 quarter(V v) {
#if GAZE_LANES == 16
  typedef float V8 __attribute__((vector_size(32)));
  V8 half = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
            __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  return __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
#elif GAZE_LANES == 8
  return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
#else
  return v;
#endif
}

// The sums of four vectors' elements.
inline V4 summed(V a, V b, V c, V d) {
  V4 p = quarter(a), q = quarter(b), r = quarter(c), s = quarter(d);
  V4 pq = __builtin_shufflevector(p, q, 0, 4, 1, 5) + __builtin_shufflevector(p, q, 2, 6, 3, 7);
  V4 rs = __builtin_shufflevector(r, s, 0, 4, 1, 5) + __builtin_shufflevector(r, s, 2, 6, 3, 7);
  return __builtin_shufflevector(pq, rs, 0, 1, 4, 5) + __builtin_shufflevector(pq, rs, 2, 3, 6, 7);
}

template <class T, int N>
void dots_of(const T* base, int64_t dim, const int64_t* list, int count, const float* const* q, float* out,
             int64_t stride) {
  const int64_t whole = dim / W * W;
  for (int i = 0; i < count; i += 4) {
    const T* row[4];
    for (int t = 0; t < 4; ++t) row[t] = base + list[i + t < count ? i + t : count - 1] * dim;
    V sums[N][4] = {};
    for (int64_t d = 0; d < whole; d += W) {
      V k[4];
#pragma GCC unroll 4
      for (int t = 0; t < 4; ++t) k[t] = wide(row[t] + d);
#pragma GCC unroll 4
      for (int h = 0; h < N; ++h) {
        V x = wide(q[h] + d);
#pragma GCC unroll 4
        for (int t = 0; t < 4; ++t) sums[h][t] += k[t] * x;
      }
    }
    if (whole < dim) {
      for (int h = 0; h < N; ++h) {
        V x = wide(q[h] + whole);
        for (int t = 0; t < 4; ++t) sums[h][t] += wide_end(row[t] + whole, dim - whole) * x;
      }
    }
    for (int h = 0; h < N; ++h) {
      V4 four = summed(sums[h][0], sums[h][1], sums[h][2], sums[h][3]);
      __builtin_memcpy(out + h * stride + i, &four, sizeof(V4));
    }
  }
}

template <class T>
void dots_as(const T* rows, int64_t dim, const int64_t* list, int count, const float* const* q, int heads,
             float* out, int64_t stride) {
  int h = 0;
  for (; h + kHeads <= heads; h += kHeads)
    dots_of<T, kHeads>(rows, dim, list, count, q + h, out + h * stride, stride);
  for (; h + 2 <= heads; h += 2) dots_of<T, 2>(rows, dim, list, count, q + h, out + h * stride, stride);
  if (h < heads) dots_of<T, 1>(rows, dim, list, count, q + h, out + h * stride, stride);
}

void dots(const void* rows, Kind kind, int64_t dim, const int64_t* list, int count, const float* const* q,
          int heads, float* out, int64_t stride) {
  switch (kind) {
    case Kind::f32:
      return dots_as(static_cast<const float*>(rows), dim, list, count, q, heads, out, stride);
    case Kind::bf16:
      return dots_as(static_cast<const Bf16*>(rows), dim, list, count, q, heads, out, stride);
    case Kind::i8:
      return dots_as(static_cast<const int8_t*>(rows), dim, list, count, q, heads, out, stride);
  }
}

// exp(x) for x <= 0, to two roundings; 0 below the smallest normal number, NaN of NaN.
inline V exponential(V x) {
  const V zero = {};
  V bounded = x < -87.3f ? zero - 87.3f : x;
  V n = (bounded * 1.44269504f + 12582912.0f) - 12582912.0f;  // rounds to an integer
  V r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
  V p = zero + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // A NaN has no integer; its power is arbitrary, and the product is NaN.
  V safe = n == n ? n : zero;
  VI bits = (__builtin_convertvector(safe, VI) + 127) << 23;
  V power;
  __builtin_memcpy(&power, &bits, sizeof(V));
  return x < -87.3f ? zero : p * power;
}

inline float one_exponential(float x) {
  V v = {};
  return exponential(v + x)[0];
}

// Logits to weights, exp(logit - top), and their sum; the sums so far follow a new top. `weights` has kTile
// numbers.
void weigh(float* weights, int count, int head, const Sums& sums) {
  const float none = -__builtin_inff();
  float top = none;
  for (int i = 0; i < count; ++i)
    top = weights[i] > top ? weights[i] : top;  // a NaN is no top, and stays a NaN
  const float before = sums.top[head];
  top = before > top ? before : top;
  if (top > before) {
    const float factor = before == none ? 0.0f : one_exponential(before - top);
    // A NaN so far stays one.
    sums.total[head] *= factor;
    float* values = sums.values + head * sums.width;
    for (int64_t d = 0; d < sums.width; ++d) values[d] *= factor;
    sums.top[head] = top;
  }
  const float base = top == none ? 0.0f : top;
  V total = {};
  int i = 0;
  for (; i + W <= count; i += W) {
    V w = exponential(wide(weights + i) - base);
    total += w;
    __builtin_memcpy(weights + i, &w, sizeof(V));
  }
  if (i < count) {
    V w = exponential(wide_end(weights + i, count - i) - base);
    for (int t = 0; t < W; ++t) {
      if (i + t < count) {
        weights[i + t] = w[t];
        total[t] += w[t];
      }
    }
  }
  float sum = 0.0f;
  for (int t = 0; t < W; ++t) sum += total[t];
  sums.total[head] += sum;
}

template <class T, int N, int M>
inline void mix_block(const T* base, int64_t dim, int64_t d, const Tile& tile, const float* const* weights,
                      float* const* values) {
  V sums[N][M];
  for (int h = 0; h < N; ++h)
    for (int j = 0; j < M; ++j) sums[h][j] = wide(values[h] + d + j * W);
  for (int i = 0; i < tile.count; ++i) {
    const T* row = base + tile.rows[i] * dim + d;
    V v[M];
#pragma GCC unroll 4
    for (int j = 0; j < M; ++j) v[j] = wide(row + j * W);
#pragma GCC unroll 4
    for (int h = 0; h < N; ++h) {
      const float w = weights[h][i];
#pragma GCC unroll 4
      for (int j = 0; j < M; ++j) sums[h][j] += v[j] * w;
    }
  }
  for (int h = 0; h < N; ++h)
    for (int j = 0; j < M; ++j) __builtin_memcpy(values[h] + d + j * W, &sums[h][j], sizeof(V));
}

template <class T, int N>
void mix_of(const T* base, int64_t dim, const Tile& tile, const float* const* weights, float* const* values) {
  int64_t d = 0;
  for (; d + kVectors * W <= dim; d += kVectors * W)
    mix_block<T, N, kVectors>(base, dim, d, tile, weights, values);
  for (; d + W <= dim; d += W) mix_block<T, N, 1>(base, dim, d, tile, weights, values);
  if (d == dim) return;
  for (int i = 0; i < tile.count; ++i) {
    V v = wide_end(base + tile.rows[i] * dim + d, dim - d);
    for (int h = 0; h < N; ++h) {
      V sum = wide(values[h] + d) + v * weights[h][i];
      __builtin_memcpy(values[h] + d, &sum, sizeof(V));
    }
  }
}

template <class T>
void fetch(const T* base, int64_t dim, const Tile& tile) {
  for (int i = 0; i < tile.count; ++i) {
    const char* row = reinterpret_cast<const char*>(base + tile.rows[i] * dim);
    for (int64_t at = 0; at < dim * static_cast<int64_t>(sizeof(T)); at += 64)
      __builtin_prefetch(row + at, 0, 2);
  }
}

template <class T>
void attend_as(const Rows& rows, const Tile& tile, const Tile* next, const float* const* q, const int* heads,
               int count, const Sums& sums) {
  const T* keys = static_cast<const T*>(rows.keys);
  const T* values = static_cast<const T*>(rows.values);
  alignas(64) float weights[kHeads][kTile];
  if (next != nullptr) fetch(keys, rows.dim, *next);
  for (int h = 0; h < count; h += kHeads) {
    const int some = count - h < kHeads ? count - h : kHeads;
    dots_as(keys, rows.dim, tile.rows, tile.count, q + h, some, weights[0], kTile);
    if (h == 0 && next != nullptr) fetch(values, rows.dim, *next);
    const float* row[kHeads];
    float* into[kHeads];
    for (int j = 0; j < some; ++j) {
      if (rows.key_scales != nullptr)
        for (int i = 0; i < tile.count; ++i) weights[j][i] *= rows.key_scales[tile.rows[i]];
      weigh(weights[j], tile.count, heads[h + j], sums);
      if (rows.value_scales != nullptr)
        for (int i = 0; i < tile.count; ++i) weights[j][i] *= rows.value_scales[tile.rows[i]];
      row[j] = weights[j];
      into[j] = sums.values + heads[h + j] * sums.width;
    }
    int j = 0;
    for (; j + kHeads <= some; j += kHeads) mix_of<T, kHeads>(values, rows.dim, tile, row + j, into + j);
    for (; j + 2 <= some; j += 2) mix_of<T, 2>(values, rows.dim, tile, row + j, into + j);
    if (j < some) mix_of<T, 1>(values, rows.dim, tile, row + j, into + j);
  }
}

void attend(const Rows& rows, const Tile& tile, const Tile* next, const float* const* q, const int* heads,
            int count, const Sums& sums) {
  switch (rows.kind) {
    case Kind::f32:
      return attend_as<float>(rows, tile, next, q, heads, count, sums);
    case Kind::bf16:
      return attend_as<Bf16>(rows, tile, next, q, heads, count, sums);
    case Kind::i8:
      return attend_as<int8_t>(rows, tile, next, q, heads, count, sums);
  }
}

}  // namespace

const Kernel GAZE_KERNEL = {dots, attend};

}  // namespace gaze
