// Which regions a query selects, and which of them a group of query heads reads; see core/routing.py and
// plan.py.
#pragma once

#include <cstdint>
#include <vector>

namespace gaze {

// The most query heads that share a list of regions: one bit each.
constexpr int64_t kGroup = 32;

struct Listed {
  int32_t region;
  uint32_t heads;  // bit h: the h-th query head reads the region
};

// The regions of the best scores, best first, in `chosen` [capacity]; -1 in the slots beyond `budget` or the
// number of visible regions. Ties go to the region that `order` (int32 [regions]) names first; -0.0 equals
// 0.0, and a NaN is below every number.
void select_best(const float* scores, const uint8_t* visible, const int32_t* order, int64_t regions,
                 int64_t budget, int64_t capacity, int32_t* chosen);

// The regions of all lists in storage order, each once. `lists` int32 [count, capacity], and `heads` the bits
// of each list. Numbers that are no region are skipped.
void join_lists(const int32_t* lists, const uint32_t* heads, int64_t count, int64_t capacity, int64_t regions,
                std::vector<Listed>* joined);

}  // namespace gaze
