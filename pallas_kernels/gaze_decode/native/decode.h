// One call of gaze_decode: its arrays, and the work that it is.
//
// Axis letters as in spec.py: L layers, B batch, K kv heads, G query heads per kv head, H = K * G, R regions,
// P slots, S text stream, J capacity, D head dim, E width of a descriptor. Arrays are dense and row-major.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernel.h"
#include "select.h"

namespace gaze {

// Plain data, so that a test fills it from Python (tests/helpers/native_calls.py has the same fields in the same
// order).
struct Call {
  int64_t batch, kv_heads, group, regions, slots, text, dim, capacity, width;
  int64_t layer;
  float scale;
  Kind query_kind, visual_kind, text_kind, descriptor_kind;
  int32_t dense;                           // no lists: every region is read
  int32_t per_head;                        // lists are per query head, else per kv head
  int32_t route;                           // select, from `descriptors` to `order`; else `indices` is given
  const void* q;                           // [B, H, D]
  const void *keys, *values;               // [L, B, K, R, P, D]
  const float *key_scales, *value_scales;  // [L, B, K, R, P], or null
  const void *text_keys, *text_values;     // [L, B, K, S, D]
  const uint8_t *visual_seen, *text_seen;  // [B, R, P], [B, S]
  const void* features;                    // [B, H, E]
  const void* descriptors;                 // [L, B, K, R, E]
  const int32_t* budget;                   // [B]
  const uint8_t* visible;                  // [B, R], regions that may be selected
  const int32_t* order;                    // [B, R], tie_permutation
  int32_t* indices;                        // [B, Hs, J], read or written
  float* scores;                           // [B, Hs, R], written where `route`
  void* out;                               // [B, H, D]
  float* lse;                              // [B, H]
};

// The work of a call, as items that threads take in order: first a selection for every unit (a row, a kv
// head, at most kGroup of its query heads), then chunks of the keys of all units. Whoever ends a unit's last
// chunk joins them. What is in a chunk depends on the call alone, so the result has the same bits on any
// number of threads.
class Decode {
 public:
  Decode(const Call& call, const Kernel& kernel);

  int64_t items() const { return units() * (1 + chunks_); }
  void run(int64_t item);

  // Whether helpers are worth waking.
  bool large() const;
  // Bytes of keys, values, scales and descriptors that were read.
  int64_t bytes_read() const { return bytes_; }

 private:
  struct Unit;

  int64_t units() const { return call_.batch * call_.kv_heads * parts_; }
  Unit unit(int64_t number) const;
  void begin(int64_t number);
  void route(const Unit& unit, int64_t number);
  void chunk(int64_t number, int64_t chunk);
  void visual_chunk(const Unit& unit, int64_t number, int64_t chunk, const Sums& sums, const float* const* q);
  void text_chunk(const Unit& unit, int64_t chunk, const Sums& sums, const float* const* q);
  void finish(const Unit& unit, int64_t number);
  Sums sums(int64_t number, int64_t chunk);

  const Call& call_;
  const Kernel& kernel_;
  int64_t parts_, width_, lists_, regions_per_chunk_, visual_chunks_, chunks_;
  std::vector<float> queries_;  // [units, kGroup or fewer, width], float32, times the scale
  std::vector<float> sums_;     // [units, chunks, heads, width + 2]
  std::vector<std::vector<Listed>> listed_;
  std::unique_ptr<std::atomic<int>[]> ready_, left_;
  std::atomic<int64_t> bytes_{0};
};

}  // namespace gaze
