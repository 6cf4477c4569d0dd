// The arithmetic of gaze_decode, compiled once per instruction set; `kernel.cc` has it, `best_kernel`
// chooses.
//
// A tile is at most `kTile` tokens of one kv head, by the numbers of their rows, which a group of query heads
// reads. Vectors of width D lie in rows of `width` floats, a multiple of 16 whose end is zero.
#pragma once

#include <cstdint>

namespace gaze {

constexpr int kTile = 64;

enum class Kind : int32_t { f32 = 0, bf16 = 1, i8 = 2 };

constexpr int64_t bytes_of(Kind kind) { return kind == Kind::f32 ? 4 : kind == Kind::bf16 ? 2 : 1; }

constexpr int64_t padded(int64_t dim) { return (dim + 15) / 16 * 16; }

// Keys and values of one kv head in one layer: [rows, dim] each. The scales are those of int8, else null.
struct Rows {
  const void* keys;
  const void* values;
  const float* key_scales;
  const float* value_scales;
  int64_t dim;
  Kind kind;
};

struct Tile {
  int count = 0;
  int64_t rows[kTile];
};

// What a group of query heads has summed so far, see softmax.py: `values` [heads, width] and two numbers a
// head.
struct Sums {
  float* values;
  float* top;
  float* total;
  int64_t width;
};

struct Kernel {
  // Products of `heads` vectors with the listed rows of keys: out[h * stride + i] for vector h and row i.
  // `stride` is at least `count` rounded up to a multiple of 4.
  void (*dots)(const void* rows, Kind kind, int64_t dim, const int64_t* list, int count,
               const float* const* q, int heads, float* out, int64_t stride);
  // Adds a tile to the sums of those query heads whose numbers are in `heads`; `q` has one vector for each of
  // them, times the scale of the logits. `next`, which may be null, is fetched meanwhile.
  void (*attend)(const Rows& rows, const Tile& tile, const Tile* next, const float* const* q,
                 const int* heads, int count, const Sums& sums);
};

extern const Kernel kernel_plain;
#if defined(__x86_64__)
extern const Kernel kernel_avx2;
extern const Kernel kernel_avx512;
#endif

// The kernel by the name of its instruction set ("plain", "avx2", "avx512"), or null where this processor or
// this build has none of that name.
const Kernel* find_kernel(const char* name);

// The widest that runs here.
const char* best_kernel();

}  // namespace gaze
