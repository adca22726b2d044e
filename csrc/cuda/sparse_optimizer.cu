// One optimizer step on selected rows or columns of many weights, in one launch, whatever the rule.
//
// The selected part is contiguous in the master values, gradients and moments, so all of them are read and written 16
// bytes at a time, whatever is selected. Rows of the weight are written four values at a time. Columns are written one
// by one, neighboring threads in one row of the weight: what the memory sees are the sectors that hold selected columns,
// in ascending order, and a transpose through shared memory would not make them fewer.
//
// A rule is a struct with the number of its moments, the type of its Factors, and two functions:
// factors(lr, weight_decay, step), and a call operator (value, gradient, moments, factors) -> value.
#include "sparse_optimizer.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace clue {
namespace {

// Kernel arguments may take 32764 bytes from compute capability 7.0 on, and nvcc 13 compiles for nothing older.
#if defined(__CUDACC_VER_MAJOR__) && __CUDACC_VER_MAJOR__ < 13
constexpr uint32_t slices_per_launch = 36;
constexpr size_t argument_bytes = 4096;
#else
constexpr uint32_t slices_per_launch = 290;
constexpr size_t argument_bytes = 32764;
#endif
constexpr uint32_t threads = 256;
constexpr uint32_t values_per_block = 4096;

// Passed by value: there is nothing to copy before a launch, and a CUDA graph keeps it.
template <class Rule>
struct Table {
  DeviceSlice<typename Rule::Factors> slices[slices_per_launch];
  uint32_t count;
  Rule rule;
  DeviceNumbers numbers;
};

__device__ float widen(float x) { return x; }
__device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float widen(__half x) { return __half2float(x); }

__device__ void narrow(float x, float& y) { y = x; }
__device__ void narrow(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }
__device__ void narrow(float x, __half& y) { y = __float2half_rn(x); }

// Up with the probability of the part that is cut off; the same arithmetic as on the CPU.
__device__ void round_stochastic(float x, uint32_t, float& y) { y = x; }
__device__ void round_stochastic(float x, uint32_t random, __nv_bfloat16& y) {
  const uint32_t bits = __float_as_uint(x);
  const bool finite = (bits & 0x7fffffffu) < 0x7f800000u;
  y = finite ? __ushort_as_bfloat16(static_cast<uint16_t>((bits + (random >> 16)) >> 16)) : __float2bfloat16_rn(x);
}
__device__ void round_stochastic(float x, uint32_t random, __half& y) {
  const uint32_t bits = __float_as_uint(x) & 0x7fffffffu;
  const uint32_t sign = (__float_as_uint(x) >> 16) & 0x8000u;
  // In units of the smallest subnormal, plus a uniform number below one, whole units are what is left.
  const float units = fmaf(__uint_as_float(bits), 0x1p24f, static_cast<float>(random >> 9) * 0x1p-23f);
  const uint32_t normal = ((bits + (random >> 19)) >> 13) - (112u << 10);
  const uint32_t half = bits < (113u << 23) ? static_cast<uint32_t>(units) : min(normal, 0x7c00u);
  y = bits < 0x7f800000u ? __ushort_as_half(static_cast<uint16_t>(sign | half)) : __float2half_rn(x);
}

template <class T>
struct alignas(4 * sizeof(T)) Four {
  T of[4];
};

// Four neighboring values from `offset` on; beyond `size` they read as zero and are not written.
__device__ Four<float> load(const float* source, uint32_t offset, uint32_t size, bool aligned) {
  if (aligned && offset + 4 <= size) return *reinterpret_cast<const Four<float>*>(source + offset);
  Four<float> values;
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) values.of[i] = offset + i < size ? source[offset + i] : 0.0f;
  return values;
}
__device__ void store(float* target, uint32_t offset, uint32_t size, bool aligned, const Four<float>& values) {
  if (aligned && offset + 4 <= size) {
    *reinterpret_cast<Four<float>*>(target + offset) = values;
    return;
  }
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i)
    if (offset + i < size) target[offset + i] = values.of[i];
}

// Where values of the selected part lie in the weight.
template <class T, class Slice>
struct Place {
  const Slice& slice;
  uint32_t row, column;

  __device__ Place(const Slice& slice, uint32_t offset)
      : slice(slice), row(offset / slice.columns), column(offset - row * slice.columns) {}
  __device__ T* address() const {
    const int64_t r = slice.by_columns ? row : slice.index[row];
    const int64_t c = slice.by_columns ? slice.index[column] : column;
    return static_cast<T*>(slice.weight) + r * slice.weight_stride + c;
  }
  __device__ void advance() {
    if (++column == slice.columns) {
      column = 0;
      ++row;
    }
  }
};

template <class T, class Slice>
__device__ Four<float> load_weight(const Slice& slice, uint32_t offset) {
  Four<float> values{};
  Place<T, Slice> place(slice, offset);
  for (uint32_t i = 0; i < 4 && offset + i < slice.size; ++i, place.advance()) values.of[i] = widen(*place.address());
  return values;
}

template <class T, class Slice>
__device__ void store_weight(const Slice& slice, uint32_t offset, const Four<float>& values, const RandomKey& key) {
  Four<T> rounded;
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) {
    if (slice.value)
      narrow(values.of[i], rounded.of[i]);
    else
      round_stochastic(values.of[i], random_bits(key, slice.first_position + offset + i), rounded.of[i]);
  }
  Place<T, Slice> place(slice, offset);
  if (slice.aligned_rows) {  // then all four are there
    *reinterpret_cast<Four<T>*>(place.address()) = rounded;
    return;
  }
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) {
    if (offset + i >= slice.size) return;
    *place.address() = rounded.of[i];
    place.advance();
  }
}

template <class T, class Rule, class Slice>
__device__ void update(const Slice& slice, const Rule& rule, const typename Rule::Factors& factors, const RandomKey& key,
                       float inverse_scale, uint32_t begin, uint32_t end) {
  const uint32_t size = slice.size;
  const bool aligned = slice.aligned;
  for (uint32_t offset = begin + 4 * threadIdx.x; offset < end; offset += 4 * threads) {
    const Four<float> grad = load(slice.grad, offset, size, aligned);
    Four<float> moments[Rule::moments + 1];
#pragma unroll
    for (int m = 0; m < Rule::moments; ++m) moments[m] = load(slice.moments[m], offset, size, aligned);
    Four<float> value = slice.value ? load(slice.value, offset, size, aligned) : load_weight<T>(slice, offset);
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      float moment[Rule::moments + 1];
#pragma unroll
      for (int m = 0; m < Rule::moments; ++m) moment[m] = moments[m].of[i];
      value.of[i] = rule(value.of[i], grad.of[i] * inverse_scale, moment, factors);
#pragma unroll
      for (int m = 0; m < Rule::moments; ++m) moments[m].of[i] = moment[m];
    }
#pragma unroll
    for (int m = 0; m < Rule::moments; ++m) store(slice.moments[m], offset, size, aligned, moments[m]);
    if (slice.value) store(slice.value, offset, size, aligned, value);
    store_weight<T>(slice, offset, value, key);
  }
}

// The last part that begins at or before this block.
template <class Rule>
__device__ uint32_t slice_of(const Table<Rule>& table, uint32_t block) {
  uint32_t low = 0, high = table.count;
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    if (table.slices[middle].first_block <= block)
      low = middle;
    else
      high = middle;
  }
  return low;
}

template <class Rule>
__global__ void __launch_bounds__(threads) sparse_optimizer_kernel(const __grid_constant__ Table<Rule> table) {
  const DeviceNumbers& numbers = table.numbers;
  if (numbers.found_inf && *numbers.found_inf != 0.0f) return;
  const auto& slice = table.slices[slice_of(table, blockIdx.x)];
  __shared__ typename Rule::Factors factors;
  __shared__ RandomKey key;
  if (threadIdx.x == 0) {
    factors = slice.factors;
    key = slice.key;
    if (numbers.lr) {
      const uint32_t n = slice.number;
      factors = table.rule.factors(numbers.lr[n], numbers.weight_decay[n], numbers.step[n]);
      if (numbers.seed) key = key_of(numbers.seed[n], numbers.step[n]);
    }
  }
  __syncthreads();
  const Rule& rule = table.rule;
  const float inverse_scale = numbers.grad_scale ? 1.0f / *numbers.grad_scale : 1.0f;
  const uint32_t begin = (blockIdx.x - slice.first_block) * values_per_block;
  const uint32_t end = min(slice.size, begin + values_per_block);
  switch (slice.element) {
    case Element::float32: return update<float>(slice, rule, factors, key, inverse_scale, begin, end);
    case Element::bfloat16: return update<__nv_bfloat16>(slice, rule, factors, key, inverse_scale, begin, end);
    case Element::float16: return update<__half>(slice, rule, factors, key, inverse_scale, begin, end);
  }
}

// Updates all parts; null, or what went wrong. The parts are taken before it returns.
template <class Rule>
const char* launch(const DeviceSlice<typename Rule::Factors>* slices, int64_t count, const Rule& rule,
                            const DeviceNumbers& numbers, int device, void* stream) {
  static_assert(sizeof(Table<Rule>) <= argument_bytes, "kernel arguments are too large");
  Table<Rule> table{};
  table.rule = rule;
  table.numbers = numbers;
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  for (int64_t first = 0; error == cudaSuccess && first < count; first += slices_per_launch) {
    uint32_t blocks = 0;
    for (table.count = 0; table.count < slices_per_launch && first + table.count < count; ++table.count) {
      auto& slice = table.slices[table.count];
      slice = slices[first + table.count];
      slice.first_block = blocks;
      blocks += (slice.size + values_per_block - 1) / values_per_block;
    }
    sparse_optimizer_kernel<<<blocks, threads, 0, static_cast<cudaStream_t>(stream)>>>(table);
    error = cudaGetLastError();
  }
  if (error == cudaSuccess) error = cudaSetDevice(before);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// The rules.

struct AdamW : AdamWSettings {
  __device__ float operator()(float x, float g, float* moment, const AdamWFactors& factors) const {
    moment[0] = beta1 * moment[0] + one_minus_beta1 * g;
    moment[1] = beta2 * moment[1] + one_minus_beta2 * (g * g);
    const float step = factors.rate * (moment[0] / (sqrtf(moment[1]) * factors.root + eps));
    // Not fused with the difference: PyTorch rounds this product, and what is left out adds up over the steps.
    return __fmul_rn(factors.keep, x) - step;
  }
};

template <int count>
struct Sgd : SgdSettings<count> {
  __device__ float operator()(float x, float g, float* moment, const SgdFactors& factors) const {
    float direction = g + factors.weight_decay * x;
    if (count == 1) direction = moment[0] = this->momentum * moment[0] + direction;
    return x - factors.lr * direction;
  }
};

}  // namespace
}  // namespace clue

const char* clue_sparse_adamw(const clue::DeviceSlice<clue::AdamWFactors>* slices, int64_t count,
                              const clue::AdamWSettings* settings, const clue::DeviceNumbers* numbers, int device,
                              void* stream) {
  return clue::launch(slices, count, clue::AdamW{*settings}, *numbers, device, stream);
}

const char* clue_sparse_sgd(const clue::DeviceSlice<clue::SgdFactors>* slices, int64_t count,
                            const clue::SgdSettings<0>* settings, const clue::DeviceNumbers* numbers, int device,
                            void* stream) {
  return clue::launch(slices, count, clue::Sgd<0>{*settings}, *numbers, device, stream);
}

const char* clue_sparse_sgd_momentum(const clue::DeviceSlice<clue::SgdFactors>* slices, int64_t count,
                                     const clue::SgdSettings<1>* settings, const clue::DeviceNumbers* numbers,
                                     int device, void* stream) {
  return clue::launch(slices, count, clue::Sgd<1>{*settings}, *numbers, device, stream);
}
