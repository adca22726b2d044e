// What csrc/cuda needs of CUDA C++, for the compiler of the host: a test-only stand-in. Names and meaning are those of
// NVIDIA's CUDA C++ Programming Guide; a kernel that uses more of them adds them here.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "execution.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after the other

#define threadIdx ::cuda_on_host::thread_index()
#define blockIdx ::cuda_on_host::block_index()
#define blockDim ::cuda_on_host::block_size()
#define gridDim ::cuda_on_host::grid_size()
constexpr int warpSize = cuda_on_host::warp_size;

// The part of the runtime that launches use.
enum cudaError_t { cudaSuccess, cudaErrorLaunchFailure = 719 };
using cudaStream_t = void*;
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetLastError();  // what went wrong in a kernel is known at once: launches wait for their end
const char* cudaGetErrorString(cudaError_t);

// Vectors, with the alignment that loads and stores of their size need.
#define VECTOR_TYPES(type, name)                                                                 \
  struct alignas(2 * sizeof(type)) name##2 {                                                     \
    type x, y;                                                                                   \
  };                                                                                             \
  struct alignas(4 * sizeof(type) < 16 ? 4 * sizeof(type) : 16) name##4 {                        \
    type x, y, z, w;                                                                             \
  };                                                                                             \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                               \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
VECTOR_TYPES(float, float)
VECTOR_TYPES(int, int)
VECTOR_TYPES(unsigned, uint)
VECTOR_TYPES(double, double)
#undef VECTOR_TYPES

template <class T>
T __ldg(const T* address) { return *address; }
template <class T>
T __ldcs(const T* address) { return *address; }
template <class T>
T __ldcg(const T* address) { return *address; }
template <class T>
void __stcs(T* address, const T& value) { *address = value; }
template <class T>
void __stcg(T* address, const T& value) { *address = value; }

// Arithmetic.
using std::max;
using std::min;
// A product or a sum on its own, which the compiler does not fuse with what follows.
inline float not_fused(float x) {
  volatile float kept = x;
  return kept;
}
inline float __fmul_rn(float a, float b) { return not_fused(a * b); }
inline float __fadd_rn(float a, float b) { return not_fused(a + b); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return std::exp(x); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
template <class To, class From>
To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline uint32_t __float_as_uint(float x) { return same_bits<uint32_t>(x); }
inline float __uint_as_float(uint32_t x) { return same_bits<float>(x); }
inline int __float_as_int(float x) { return same_bits<int>(x); }
inline float __int_as_float(int x) { return same_bits<float>(x); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(uint32_t x) { return __builtin_ffs(static_cast<int>(x)); }

// Barriers.
inline void __syncthreads() { cuda_on_host::block_barrier(); }
inline void __syncwarp(uint32_t mask = ~0u) { cuda_on_host::warp_barrier(mask); }

// Shuffles and votes. They order no memory, as the guide says.
template <class T>
T shuffle(uint32_t mask, T value, int from, int width) {
  const int lane = cuda_on_host::lane(), first = lane / width * width;
  T taken = value;
  const bool inside = from >= first && from < first + width;
  cuda_on_host::exchange(mask, &value, sizeof value, inside ? from : lane, &taken);
  return taken;
}
template <class T>
T __shfl_sync(uint32_t mask, T value, int from, int width = warpSize) {
  const int first = static_cast<int>(cuda_on_host::lane()) / width * width;
  return shuffle(mask, value, first + from % width, width);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = warpSize) {
  return shuffle(mask, value, static_cast<int>(cuda_on_host::lane() + delta), width);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = warpSize) {
  return shuffle(mask, value, static_cast<int>(cuda_on_host::lane()) - static_cast<int>(delta), width);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = warpSize) {
  return shuffle(mask, value, static_cast<int>(cuda_on_host::lane()) ^ bits, width);
}
inline uint32_t __ballot_sync(uint32_t mask, int yes) {
  uint32_t votes = 0;
  for (uint32_t from = 0; from < cuda_on_host::warp_size; ++from) {
    if (!(mask >> from & 1)) continue;
    int theirs = 0;
    cuda_on_host::exchange(mask, &yes, sizeof yes, from, &theirs);
    votes |= uint32_t{theirs != 0} << from;
  }
  return votes;
}
inline int __any_sync(uint32_t mask, int yes) { return __ballot_sync(mask, yes) != 0; }
inline int __all_sync(uint32_t mask, int yes) { return __ballot_sync(mask, yes) == mask; }

// Atomics: fibers take turns at barriers alone. The template argument keeps the access from being taken for two.
template <class T, class Combine>
__attribute__((no_sanitize("thread"))) T atomic(T* address, T value, Combine combine) {
  cuda_on_host::access(address, sizeof value, cuda_on_host::Access::atomic, true);
  const T old = *address;
  *address = combine(old, value);
  return old;
}
template <class T>
T atomicAdd(T* address, T value) {
  return atomic(address, value, [](T a, T b) { return a + b; });
}
template <class T>
T atomicMax(T* address, T value) {
  return atomic(address, value, [](T a, T b) { return a > b ? a : b; });
}
template <class T>
T atomicMin(T* address, T value) {
  return atomic(address, value, [](T a, T b) { return a < b ? a : b; });
}
