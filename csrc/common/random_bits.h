// Random bits for stochastic rounding: a hash of (seed, step, position), the same on every device and for every
// number of threads. clue_fast/ops/sparse_optimizer.py holds the definition.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ inline
#else
#define HOST_DEVICE inline
#endif

namespace clue {

struct RandomKey {
  uint32_t first, second;
};

constexpr uint32_t mix_first = 0x7feb352du, mix_second = 0x846ca68bu;

// A bijection of 32 bits in which every bit of the input flips half of the output (Wellons 2018, lowbias32).
HOST_DEVICE uint32_t mix(uint32_t x, uint32_t key = 0) {
  x = (x ^ (x >> 16)) * mix_first;
  x = ((x ^ (x >> 15)) + key) * mix_second;
  return x ^ (x >> 16);
}

// Of one weight in one step (splitmix64: Steele, Lea & Flood 2014).
HOST_DEVICE RandomKey key_of(int64_t seed, int64_t step) {
  uint64_t z = static_cast<uint64_t>(seed) + static_cast<uint64_t>(step) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  z ^= z >> 31;
  return {static_cast<uint32_t>(z), static_cast<uint32_t>(z >> 32)};
}

// Of the value at a position of the selected part, counted along its rows. The second key, half way, keeps the
// numbers of two weights or steps from being shifted copies of one another.
HOST_DEVICE uint32_t random_bits(RandomKey key, uint32_t position) { return mix(position + key.first, key.second); }

}  // namespace clue
