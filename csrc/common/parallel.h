// Threads split work: all of it at once, or stage by stage in one parallel region.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>

#include "common/vector.h"

namespace clue {

constexpr int64_t worth_a_thread = 32768;  // elements: small jobs stay on one thread

// Threads split [0, total) in steps of `step`, each step of `work` elements.
template <class Function>
void in_parallel(int64_t total, int64_t step, int64_t work, const Function& function) {
  const int64_t steps = (total + step - 1) / step;
  const int64_t grain = std::max<int64_t>(1, worth_a_thread / std::max<int64_t>(1, work));
  torch::stable::parallel_for(0, steps, grain, [&](int64_t begin, int64_t end) {
    function(begin * step, std::min(total, end * step));
  });
}

inline int64_t threads_for(int64_t elements) {
  const int64_t worth = std::max<int64_t>(1, elements / worth_a_thread);
  return std::min<int64_t>(torch::stable::get_num_threads(), worth);
}

CLUE_INLINE void pause_thread(int64_t turn) {
  if (turn % 1024 == 1023) return std::this_thread::yield();  // what is waited for may have no core
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Calls function(stage, part) for all parts of all stages; no part begins before all of the stage before are done. A
// thread takes the next part that nobody has and waits, if it must, for parts that others are at work on. So one
// region is enough, and it ends however few threads there are: a single one never waits. `function` must not throw:
// others would wait for its part.
template <class Function>
void in_stages(int64_t stages, int64_t parts, const Function& function) {
  struct alignas(64) Counter {
    std::atomic<int64_t> value{0};
  };
  Counter taken, done;
  const int64_t total = stages * parts;
  torch::stable::parallel_for(0, parts, 1, [&](int64_t, int64_t) {
    for (int64_t at; (at = taken.value.fetch_add(1, std::memory_order_relaxed)) < total;) {
      const int64_t stage = at / parts;
      for (int64_t turn = 0; done.value.load(std::memory_order_acquire) < stage * parts; ++turn) pause_thread(turn);
      function(stage, at % parts);
      done.value.fetch_add(1, std::memory_order_release);
    }
  });
}

}  // namespace clue
