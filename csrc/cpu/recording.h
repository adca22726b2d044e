// Adding values to the statistics of their token's group while they are in registers.
//
// A thread owns a range of channels and walks all tokens in order, so the order of every sum is fixed whatever the
// number of threads. Sums are fp32 over runs of at most `run_length` tokens and then folded into the fp64
// accumulators. A tile is a few neighboring tokens of one group: short enough that its rows stream from memory side
// by side, long enough that the partial sums are moved between registers and cache only once in a while.
#pragma once
#include <algorithm>
#include <vector>

#include "vector.h"

namespace clue {

constexpr int64_t run_length = 256;
constexpr int64_t tile_length = 8;
constexpr int64_t span_length = 512;  // channels whose partial sums stay in the first-level cache
constexpr int64_t channel_block = 32; // a thread owns a multiple of this: whole pairs of every vector width

struct Tile {
  int64_t first, count;
  int group;  // row of the statistics, -1 if not counted
};
struct Run {
  std::vector<Tile> tiles;
  std::vector<int> groups;  // those that occur, in order
};

// Where the sums of one group go: fields x channels of fp64.
struct Accumulators {
  double* data;
  int64_t groups, group_stride, field_stride;
};

// What a job that records knows beside its own tensors; `runs` is null where nothing is recorded.
struct Recording {
  int64_t tokens, channels;
  const std::vector<Run>* runs;
  Accumulators sums;
  float* partial;  // of this thread
};

inline std::vector<Run> runs_of(const int8_t* group, int64_t tokens, int64_t groups) {
  std::vector<Run> runs;
  for (int64_t start = 0; start < tokens; start += run_length) {
    Run run;
    const int64_t stop = std::min(tokens, start + run_length);
    std::vector<bool> occurs(groups, false);
    for (int64_t token = start; token < stop; ++token) {
      const int g = group[token] >= 1 && group[token] <= groups ? group[token] - 1 : -1;
      if (g >= 0) occurs[g] = true;
      const bool extends = !run.tiles.empty() && run.tiles.back().group == g && run.tiles.back().count < tile_length;
      if (extends)
        ++run.tiles.back().count;
      else
        run.tiles.push_back({token, 1, g});
    }
    for (int g = 0; g < groups; ++g)
      if (occurs[g]) run.groups.push_back(g);
    runs.push_back(std::move(run));
  }
  return runs;
}

// The five statistics of an activation, in the order of FIELDS.
template <int n>
struct ActivationSums {
  static constexpr int fields = 5;
  static constexpr int maximum_field = 3;
  Floats<n> sum, square, total_magnitude, largest;
  Ints<n> active;

  CLUE_INLINE void load(const float* partial, int64_t stride) {
    sum = read<Floats<n>>(partial);
    square = read<Floats<n>>(partial + stride);
    total_magnitude = read<Floats<n>>(partial + 2 * stride);
    largest = read<Floats<n>>(partial + 3 * stride);
    active = __builtin_convertvector(read<Floats<n>>(partial + 4 * stride), Ints<n>);
  }
  CLUE_INLINE void store(float* partial, int64_t stride) const {
    write(partial, sum);
    write(partial + stride, square);
    write(partial + 2 * stride, total_magnitude);
    write(partial + 3 * stride, largest);
    write(partial + 4 * stride, __builtin_convertvector(active, Floats<n>));
  }
  CLUE_INLINE void add(Floats<n> a) {
    const Floats<n> size = magnitude<n>(a);
    sum += a;
    square += a * a;
    total_magnitude += size;
    largest = size > largest ? size : largest;
    active -= a > 0.0f;
  }
};

// The three statistics of a product activation * gradient, in the order of GRADIENT_FIELDS.
template <int n>
struct ProductSums {
  static constexpr int fields = 3;
  static constexpr int maximum_field = -1;
  Floats<n> sum, total_magnitude, square;

  CLUE_INLINE void load(const float* partial, int64_t stride) {
    sum = read<Floats<n>>(partial);
    total_magnitude = read<Floats<n>>(partial + stride);
    square = read<Floats<n>>(partial + 2 * stride);
  }
  CLUE_INLINE void store(float* partial, int64_t stride) const {
    write(partial, sum);
    write(partial + stride, total_magnitude);
    write(partial + 2 * stride, square);
  }
  CLUE_INLINE void add(Floats<n> p) {
    sum += p;
    total_magnitude += magnitude<n>(p);
    square += p * p;
  }
};

// Fold the partial sums of `count` channels into fp64, putting the channels of each pair back in order.
template <int n, class T, class Sums>
CLUE_INLINE void fold(const float* partial, double* target, int64_t field_stride, int64_t count) {
  for (int field = 0; field < Sums::fields; ++field) {
    for (int64_t c = 0; c < count; c += 2 * n) {
      const float* pair = partial + field * span_length + c;
      double* out = target + field * field_stride + c;
      float ordered[2 * n];
      for (int lane = 0; lane < n; ++lane) {
        ordered[channel_of<T>(n, false, lane)] = pair[lane];
        ordered[channel_of<T>(n, true, lane)] = pair[n + lane];
      }
      const int64_t left = std::min<int64_t>(2 * n, count - c);
      if (field == Sums::maximum_field)
        for (int64_t i = 0; i < left; ++i) out[i] = ordered[i] > out[i] ? ordered[i] : out[i];
      else
        for (int64_t i = 0; i < left; ++i) out[i] += ordered[i];
    }
  }
}

// Take all tokens of the channels [begin, end) from `source`, which does its own loading and storing and returns
// the pair of values to record: source(token, channel, channels left in the row).
template <int n, class T, class Sums, class Source>
CLUE_INLINE void record(const Recording& recording, int64_t begin, int64_t end, const Source& source) {
  const Accumulators sums = recording.sums;
  float* const partial = recording.partial;
  const int64_t group_size = Sums::fields * span_length;
  for (int64_t span = begin; span < end; span += span_length) {
    const int64_t stop = std::min(end, span + span_length);
    for (const Run& run : *recording.runs) {
      for (int g : run.groups) std::memset(partial + g * group_size, 0, group_size * sizeof(float));
      for (const Tile& tile : run.tiles) {
        const int64_t last = tile.first + tile.count;
        for (int64_t c = span; c < stop; c += 2 * n) {
          if (tile.group < 0) {
            for (int64_t token = tile.first; token < last; ++token) source(token, c, end - c);
            continue;
          }
          float* here = partial + tile.group * group_size + (c - span);
          Sums first, second;
          first.load(here, span_length);
          second.load(here + n, span_length);
          for (int64_t token = tile.first; token < last; ++token) {
            const Pair<n> value = source(token, c, end - c);
            first.add(value.first);
            second.add(value.second);
          }
          first.store(here, span_length);
          second.store(here + n, span_length);
        }
      }
      for (int g : run.groups)
        fold<n, T, Sums>(partial + g * group_size, sums.data + g * sums.group_stride + span, sums.field_stride,
                         stop - span);
    }
  }
}

}  // namespace clue
