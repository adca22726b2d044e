// Kernels that use all that the stand-in offers, each also with mistakes in it, to see that they are found.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace {

enum Mistake {
  none,
  no_barrier,         // what other threads wrote is read at once
  same_address,       // two threads write where one should
  same_in_blocks,     // two blocks do
  one_too_far,        // past the end of a tensor
  one_too_early,      // before its beginning
  nobody_wrote,       // shared memory that is read and was not written
  divergent,          // a barrier that half of the threads reach
  no_warp_barrier,    // as no_barrier, within a warp
  misaligned,         // a vector that does not lie at a multiple of its size
  lane_left_out,      // a shuffle from a lane that does not take part
  too_many_threads,   // 2048 in a block
  plain_and_atomic,   // one thread writes without an atomic
};

template <class T>
struct alignas(4 * sizeof(T)) Four {
  T of[4];
};

__device__ float widen(float x) { return x; }
__device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float widen(__half x) { return __half2float(x); }
__device__ void narrow(float x, float& y) { y = x; }
__device__ void narrow(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }
__device__ void narrow(float x, __half& y) { y = __float2half_rn(x); }

// Sums of rows, a block each: vector loads, shuffles in a warp, shared memory between the warps.
template <class T, Mistake mistake>
__global__ void __launch_bounds__(128) sum_rows_kernel(const T* x, float* sums, int columns) {
  const T* row = x + blockIdx.x * columns + (mistake == misaligned);
  float sum = 0;
  for (int i = 4 * threadIdx.x; i < columns; i += 4 * blockDim.x) {
    if (i + 4 <= columns && columns % 4 == 0) {
      const auto four = *reinterpret_cast<const Four<T>*>(row + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) sum += widen(four.of[j]);
    } else {
      for (int j = i; j < columns && j < i + 4; ++j) sum += widen(row[j]);
    }
  }
  const uint32_t mask = mistake == lane_left_out && threadIdx.x % 32 < 16 ? 0xffffu : 0xffffffffu;
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(mask, sum, offset);
  __shared__ float of_warps[4];
  if (threadIdx.x % 32 == 0 && (mistake != nobody_wrote || threadIdx.x < 96)) of_warps[threadIdx.x / 32] = sum;
  if (mistake != no_barrier && (mistake != divergent || threadIdx.x < 64)) __syncthreads();
  if (threadIdx.x != 0) return;
  sums[blockIdx.x] = of_warps[0] + of_warps[1] + of_warps[2] + of_warps[3];
}

// Turns a matrix through tiles in shared memory; two dimensions of blocks and threads.
template <class T, Mistake mistake>
__global__ void transpose_kernel(const T* x, T* y, int rows, int columns) {
  __shared__ T tile[16][17];
  int row = blockIdx.y * 16 + threadIdx.y, column = blockIdx.x * 16 + threadIdx.x;
  if (row < rows && column < columns) tile[threadIdx.y][threadIdx.x] = x[row * columns + column];
  if (mistake != no_barrier) __syncthreads();
  row = blockIdx.x * 16 + threadIdx.y, column = blockIdx.y * 16 + threadIdx.x;
  const bool inside = row < columns && column < rows;
  if (inside) y[row * rows + column] = tile[threadIdx.x][threadIdx.y];
  if (mistake == same_address && inside && threadIdx.y == 0) y[0] = x[threadIdx.x];
  if (mistake == same_in_blocks && inside && row % 16 == 0 && column % 16 == 0) y[rows] = tile[0][0];
}

// Each value through 16 bits and back, plus its neighbor's in the warp.
template <class T, Mistake mistake>
__global__ void shift_kernel(const float* x, float* y, int size) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x % 32;
  __shared__ T kept[64];
  const float value = i < size ? x[i - (mistake == one_too_early)] : 0.0f;
  narrow(value, kept[threadIdx.x]);
  if (mistake != no_warp_barrier) __syncwarp();
  const float left = widen(kept[threadIdx.x ^ (lane > 0 ? (lane ^ (lane - 1)) : 0)]);
  if (i < size + (mistake == one_too_far)) y[i] = widen(kept[threadIdx.x]) + left;
}

// How many values lie in each of eight parts of [0, 1), and how many warps hold one of .5 and more.
template <Mistake mistake>
__global__ void count_kernel(const float* x, int* counts, int* warps, int size) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < size) atomicAdd(&counts[static_cast<int>(x[i] * 8)], 1);
  if (mistake == plain_and_atomic && i == 0) counts[0] = 0;
  const uint32_t votes = __ballot_sync(0xffffffffu, i < size && x[i] >= 0.5f);
  const int any = __any_sync(0xffffffffu, i < size && x[i] >= 0.5f);
  if (threadIdx.x % 32 == 0 && any && __popc(votes) > 0) atomicAdd(warps, 1);
}

// Sums over 32 lanes that every lane gets, and running sums.
__global__ void scan_kernel(const float* x, float* sums, float* running) {
  const int lane = threadIdx.x;
  float sum = x[lane], scan = x[lane];
  for (int bits = 1; bits < 32; bits *= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, bits);
    const float before = __shfl_up_sync(0xffffffffu, scan, bits);
    if (lane >= bits) scan += before;
  }
  sums[lane] = sum;
  running[lane] = scan - __shfl_sync(0xffffffffu, x[lane], 0);
}

const char* result() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class T, Mistake mistake>
const char* sum_rows(const void* x, float* sums, int rows, int columns) {
  const dim3 threads(mistake == too_many_threads ? 2048 : 128);
  sum_rows_kernel<T, mistake><<<rows, threads, 0, nullptr>>>(static_cast<const T*>(x), sums, columns);
  return result();
}

template <class T, Mistake mistake>
const char* transpose(const void* x, void* y, int rows, int columns) {
  const dim3 blocks((columns + 15) / 16, (rows + 15) / 16), threads(16, 16);
  transpose_kernel<T, mistake><<<blocks, threads>>>(static_cast<const T*>(x), static_cast<T*>(y), rows, columns);
  return result();
}

template <class T, Mistake mistake>
const char* shift(const float* x, float* y, int size) {
  shift_kernel<T, mistake><<<(size + 63) / 64, 64>>>(x, y, size);
  return result();
}

template <Mistake mistake>
const char* count(const float* x, int* counts, int* warps, int size) {
  count_kernel<mistake><<<(size + 95) / 96, 96>>>(x, counts, warps, size);
  return result();
}

}  // namespace

#define EXPORT(name, parameters, ...) \
  extern "C" __attribute__((visibility("default"))) const char* name parameters { return __VA_ARGS__; }
#define SUM_ROWS(name, T, mistake) \
  EXPORT(name, (const void* x, float* y, int rows, int columns), sum_rows<T, mistake>(x, y, rows, columns))
#define TRANSPOSE(name, T, mistake) \
  EXPORT(name, (const void* x, void* y, int rows, int columns), transpose<T, mistake>(x, y, rows, columns))
#define SHIFT(name, T, mistake) EXPORT(name, (const float* x, float* y, int size), shift<T, mistake>(x, y, size))
#define COUNT(name, mistake) \
  EXPORT(name, (const float* x, int* y, int* z, int size), count<mistake>(x, y, z, size))

SUM_ROWS(sum_rows_float32, float, none)
SUM_ROWS(sum_rows_bfloat16, __nv_bfloat16, none)
SUM_ROWS(sum_rows_float16, __half, none)
TRANSPOSE(transpose_float32, float, none)
TRANSPOSE(transpose_int8, int8_t, none)
SHIFT(shift_bfloat16, __nv_bfloat16, none)
SHIFT(shift_float16, __half, none)
COUNT(count, none)
EXPORT(scan, (const float* x, float* y, float* z), (scan_kernel<<<1, 32>>>(x, y, z), result()))

SUM_ROWS(sum_rows_no_barrier, float, no_barrier)
SUM_ROWS(sum_rows_nobody_wrote, float, nobody_wrote)
SUM_ROWS(sum_rows_divergent, float, divergent)
SUM_ROWS(sum_rows_misaligned, float, misaligned)
SUM_ROWS(sum_rows_lane_left_out, float, lane_left_out)
SUM_ROWS(sum_rows_too_many_threads, float, too_many_threads)
TRANSPOSE(transpose_no_barrier, float, no_barrier)
TRANSPOSE(transpose_same_address, float, same_address)
TRANSPOSE(transpose_same_in_blocks, float, same_in_blocks)
SHIFT(shift_one_too_far, __half, one_too_far)
SHIFT(shift_one_too_early, __half, one_too_early)
SHIFT(shift_no_warp_barrier, __half, no_warp_barrier)
COUNT(count_plain_and_atomic, plain_and_atomic)
