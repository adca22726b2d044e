// Runs the threads of CUDA kernels on the CPU: one block after the other, its threads as fibers that take turns at
// barriers. What they read and write is checked where the kernels are compiled with -fsanitize=thread (access.cpp).
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <tuple>
#include <utility>

struct dim3 {
  uint32_t x, y, z;
  constexpr dim3(uint32_t x = 1, uint32_t y = 1, uint32_t z = 1) : x(x), y(y), z(z) {}
};

namespace cuda_on_host {

constexpr uint32_t warp_size = 32;

struct Configuration {
  dim3 blocks, threads;
  size_t dynamic_shared = 0;
  void* stream = nullptr;
};

// A kernel with its arguments, which are a copy: a captured launch keeps them, as a CUDA graph does.
struct Launch {
  const char* name;
  Configuration configuration;
  std::shared_ptr<const void> call;
  size_t call_bytes, argument_bytes;
  void (*thread)(const void* call);
};

// Of the thread that runs.
dim3 thread_index();
dim3 block_index();
dim3 block_size();
dim3 grid_size();
uint32_t lane();

void block_barrier();
void warp_barrier(uint32_t mask);
// Every lane of the mask gives up to 16 bytes and takes those of another.
void exchange(uint32_t mask, const void* given, size_t bytes, uint32_t from, void* taken);

// Runs a kernel, or keeps it while a graph is captured.
void start(Launch launch);
// Remembers the first of all errors, which the next cudaGetLastError returns.
void report(const std::string& what);
// As a bad address does: the thread that runs ends here.
[[noreturn]] void stop_thread();

template <class Kernel, class... Arguments>
void launch(const char* name, const Configuration& configuration, Kernel kernel, const Arguments&... given) {
  using Call = std::pair<Kernel, std::tuple<Arguments...>>;
  const auto call = std::make_shared<const Call>(kernel, std::make_tuple(given...));
  start({name, configuration, call, sizeof(Call), (size_t{0} + ... + sizeof(Arguments)), [](const void* data) {
           const Call& call = *static_cast<const Call*>(data);
           std::apply(call.first, call.second);
         }});
}

// For the checks of access.cpp: who runs, and what it has passed.
struct Moment {
  const char* kernel;
  uint32_t block, thread, threads_per_block;
  uint16_t block_epoch, warp_epoch;
  const char *stack, *stack_end;
  const char *call, *call_end;
};
const Moment* now();  // null while the host runs

enum class Access { read, write, atomic };
void access(const void* address, size_t bytes, Access kind, bool aligned);
void forget_accesses();         // before a kernel
void forget_shared_accesses();  // before a block

}  // namespace cuda_on_host
