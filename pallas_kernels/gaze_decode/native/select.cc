#include "select.h"

#include <algorithm>
#include <cstring>
#include <functional>

namespace gaze {
namespace {

// Unsigned numbers in the order of the scores: NaN < -inf < ... < inf.
uint32_t sortable(float score) {
  if (score != score) return 0;
  if (score == 0.0f) score = 0.0f;  // -0.0, which a sum from 0.0 never is; the order must not rest on that
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof(bits));
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

}  // namespace

void select_best(const float* scores, const uint8_t* visible, const int32_t* order, int64_t regions,
                 int64_t budget, int64_t capacity, int32_t* chosen) {
  std::fill(chosen, chosen + capacity, -1);
  const int64_t most = std::min(budget, capacity);
  if (most < 1) return;
  // Score above, place in the order of ties below: all different, so any way of sorting gives the same.
  std::vector<uint64_t> keys;
  keys.reserve(regions);
  for (int64_t i = 0; i < regions; ++i) {
    const int32_t region = order[i];
    if (region < 0 || region >= regions || !visible[region]) continue;
    keys.push_back(static_cast<uint64_t>(sortable(scores[region])) << 32 |
                   (0xffffffffu - static_cast<uint32_t>(i)));
  }
  const auto first = keys.begin(), end = keys.end();
  const auto cut = first + std::min<int64_t>(most, keys.size());
  if (cut != end) std::nth_element(first, cut, end, std::greater<uint64_t>());
  std::sort(first, cut, std::greater<uint64_t>());
  std::transform(first, cut, chosen,
                 [order](uint64_t key) { return order[0xffffffffu - (key & 0xffffffffu)]; });
}

void join_lists(const int32_t* lists, const uint32_t* heads, int64_t count, int64_t capacity, int64_t regions,
                std::vector<Listed>* joined) {
  std::vector<uint32_t> bits(regions, 0);
  for (int64_t n = 0; n < count; ++n) {
    for (int64_t j = 0; j < capacity; ++j) {
      const int32_t region = lists[n * capacity + j];
      if (region >= 0 && region < regions) bits[region] |= heads[n];
    }
  }
  for (int64_t region = 0; region < regions; ++region)
    if (bits[region]) joined->push_back({static_cast<int32_t>(region), bits[region]});
}

}  // namespace gaze
