#include "execution.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <cstring>
#include <vector>

#include "cuda_runtime.h"

namespace cuda_on_host {
namespace {

constexpr size_t stack_bytes = 256 << 10;
constexpr uint32_t most_threads = 1024;

enum class State { ready, at_block_barrier, at_warp_barrier, ended };

struct Thread {
  ucontext_t context;
  State state = State::ended;
  uint32_t mask = 0;       // of the warp barrier that it waits at
  bool abandoned = true;   // its stack holds nothing that can go on
  unsigned char given[16];  // to the other lanes
};

struct Device {
  std::vector<Thread> threads{most_threads};
  char* stacks = nullptr;
  ucontext_t host;
  const Launch* launch = nullptr;
  uint32_t count = 0, current = 0, waiting = 0, ended = 0;
  dim3 block;
  uint16_t block_epoch = 0, warp_epochs[most_threads / warp_size];
  Moment moment{};
  bool running = false, capturing = false;
  std::vector<Launch> captured;
  std::string error;
};

Device& device() {
  static Device it;
  return it;
}

dim3 unflattened(uint32_t index, const dim3& size) {
  return {index % size.x, index / size.x % size.y, index / size.x / size.y};
}

void update_moment() {
  Device& d = device();
  d.moment.thread = d.current;
  d.moment.block_epoch = d.block_epoch;
  d.moment.warp_epoch = d.warp_epochs[d.current / warp_size];
  d.moment.stack = d.stacks + d.current * stack_bytes;
  d.moment.stack_end = d.moment.stack + stack_bytes;
}

void resume(uint32_t thread, ucontext_t* from) {
  Device& d = device();
  d.current = thread;
  update_moment();
  swapcontext(from, &d.threads[thread].context);
}

// Lets the next thread run that can, from one that waits or has ended.
void give_way() {
  Device& d = device();
  const uint32_t self = d.current;
  for (int attempt = 0; attempt < 2; ++attempt) {
    for (uint32_t step = 1; step <= d.count; ++step) {
      const uint32_t next = (self + step) % d.count;
      if (d.threads[next].state != State::ready) continue;
      if (next != self) resume(next, &d.threads[self].context);
      return;
    }
    if (d.ended == d.count) break;
    report("a barrier that not every thread of the block or the mask reaches");
    d.waiting = 0;
    for (uint32_t i = 0; i < d.count; ++i)
      if (d.threads[i].state != State::ended) d.threads[i].state = State::ready;
  }
  swapcontext(&d.threads[self].context, &d.host);
}

void end_thread() {
  Device& d = device();
  d.threads[d.current].state = State::ended;
  ++d.ended;
  give_way();
}

void thread_main() {
  for (;;) {
    device().launch->thread(device().launch->call.get());
    end_thread();  // and begins again here in the next block
  }
}

void prepare(uint32_t index) {
  Device& d = device();
  Thread& thread = d.threads[index];
  thread.state = State::ready;
  if (!thread.abandoned) return;
  thread.abandoned = false;
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = d.stacks + index * stack_bytes;
  thread.context.uc_stack.ss_size = stack_bytes;
  thread.context.uc_link = nullptr;
  makecontext(&thread.context, thread_main, 0);
}

void run_block(uint32_t number) {
  Device& d = device();
  d.block = unflattened(number, d.launch->configuration.blocks);
  d.moment.block = number;
  d.waiting = d.ended = 0;
  d.block_epoch = 0;
  std::memset(d.warp_epochs, 0, sizeof d.warp_epochs);
  forget_shared_accesses();
  for (uint32_t i = 0; i < d.count; ++i) prepare(i);
  resume(0, &d.host);
}

void run(const Launch& launch) {
  Device& d = device();
  const auto& [blocks, threads, dynamic_shared, stream] = launch.configuration;
  const uint64_t count = uint64_t{threads.x} * threads.y * threads.z;
  if (count == 0 || count > most_threads || blocks.x == 0 || blocks.y == 0 || blocks.z == 0)
    return report("invalid configuration argument");
  if (launch.argument_bytes > 32764) return report("the arguments take more than 32764 bytes");
  if (dynamic_shared != 0) return report("the stand-in has no dynamic shared memory");
  if (d.stacks == nullptr)
    d.stacks = static_cast<char*>(mmap(nullptr, most_threads * stack_bytes, PROT_READ | PROT_WRITE,
                                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  d.launch = &launch;
  d.count = static_cast<uint32_t>(count);
  d.moment.kernel = launch.name;
  d.moment.threads_per_block = d.count;
  d.moment.call = static_cast<const char*>(launch.call.get());
  d.moment.call_end = d.moment.call + launch.call_bytes;
  forget_accesses();
  d.running = true;
  const uint32_t grid = blocks.x * blocks.y * blocks.z;
  for (uint32_t block = 0; block < grid; ++block) run_block(block);
  d.running = false;
}

}  // namespace

dim3 thread_index() { return unflattened(device().current, device().launch->configuration.threads); }
dim3 block_index() { return device().block; }
dim3 block_size() { return device().launch->configuration.threads; }
dim3 grid_size() { return device().launch->configuration.blocks; }
uint32_t lane() { return device().current % warp_size; }
const Moment* now() { return device().running ? &device().moment : nullptr; }

void block_barrier() {
  Device& d = device();
  Thread& self = d.threads[d.current];
  self.state = State::at_block_barrier;
  if (++d.waiting == d.count) {
    d.waiting = 0;
    ++d.block_epoch;
    for (uint32_t i = 0; i < d.count; ++i) d.threads[i].state = State::ready;
  }
  give_way();
  update_moment();
}

namespace {

// Whether all lanes of the mask wait for one another; lanes beyond the end of the block count as there.
bool complete(uint32_t first, uint32_t mask) {
  Device& d = device();
  for (uint32_t lane = 0; lane < warp_size; ++lane) {
    if (!(mask >> lane & 1) || first + lane >= d.count) continue;
    const Thread& thread = d.threads[first + lane];
    if (thread.state != State::at_warp_barrier || thread.mask != mask) return false;
  }
  return true;
}

void wait_for_lanes(uint32_t mask, bool orders_memory) {
  Device& d = device();
  const uint32_t first = d.current / warp_size * warp_size;
  Thread& self = d.threads[d.current];
  if (!(mask >> lane() & 1)) report("a lane calls a warp function with a mask that leaves it out");
  self.state = State::at_warp_barrier;
  self.mask = mask;
  if (complete(first, mask)) {
    if (orders_memory && mask == ~0u) ++d.warp_epochs[first / warp_size];
    for (uint32_t lane = 0; lane < warp_size && first + lane < d.count; ++lane)
      if (mask >> lane & 1) d.threads[first + lane].state = State::ready;
  }
  give_way();
  update_moment();
}

}  // namespace

void warp_barrier(uint32_t mask) { wait_for_lanes(mask, true); }

void exchange(uint32_t mask, const void* given, size_t bytes, uint32_t from, void* taken) {
  Device& d = device();
  std::memcpy(d.threads[d.current].given, given, bytes);
  wait_for_lanes(mask, false);
  const uint32_t source = d.current / warp_size * warp_size + from;
  if (!(mask >> from & 1) || source >= d.count)
    report("a lane takes the value of lane " + std::to_string(from) + ", which gives none");
  else
    std::memcpy(taken, d.threads[source].given, bytes);
  wait_for_lanes(mask, false);
}

void start(Launch launch) {
  Device& d = device();
  if (d.capturing)
    d.captured.push_back(std::move(launch));
  else
    run(launch);
}

void report(const std::string& what) {
  Device& d = device();
  if (!d.error.empty()) return;
  d.error = what;
  if (d.running)
    d.error = std::string(d.moment.kernel) + ", block " + std::to_string(d.moment.block) + ", thread " +
              std::to_string(d.moment.thread) + ": " + what;
}

void stop_thread() {
  device().threads[device().current].abandoned = true;
  end_thread();
  std::abort();
}

}  // namespace cuda_on_host

using cuda_on_host::device;

static std::string last_error;

cudaError_t cudaGetLastError() {
  last_error.swap(device().error);
  device().error.clear();
  return last_error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}
const char* cudaGetErrorString(cudaError_t) { return last_error.c_str(); }

extern "C" {
__attribute__((visibility("default"))) void cuda_on_host_capture(bool begin) {
  device().capturing = begin;
  if (begin) device().captured.clear();
}
__attribute__((visibility("default"))) const char* cuda_on_host_replay() {
  for (const auto& launch : device().captured) cuda_on_host::run(launch);
  return cudaGetLastError() == cudaSuccess ? nullptr : last_error.c_str();
}
}
