// Work of numbered items over the threads of a pool that may be busy with anything else.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <utility>

namespace gaze {

inline void relax(int* spins) {
  // A thread that we wait for is running, or was stopped by the system and needs our core.
  if (++*spins > 256) std::this_thread::yield();
}

// Runs run(0) ... run(items - 1), in any order but begun in this one, here and on as many as `helpers`
// threads, to which `schedule` hands a function. Returns when all are done. It never waits for a helper that
// has not started: whoever comes late finds no item left, and touches only the counter.
template <class Schedule, class Run>
void share(int64_t items, int64_t helpers, Schedule schedule, const Run& run) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto state = std::make_shared<State>();
  auto work = [items, &run](State& state) {
    for (int64_t i; (i = state.next.fetch_add(1, std::memory_order_relaxed)) < items;) {
      run(i);
      state.done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t n = 0; n < helpers; ++n) schedule([state, work] { work(*state); });
  work(*state);
  for (int spins = 0; state->done.load(std::memory_order_acquire) < items;) relax(&spins);
}

}  // namespace gaze
