// Adding values to the statistics of their token's group while they are in registers.
//
// A thread owns a range of channels and walks all tokens in order, so the order of every sum is fixed whatever the
// number of threads. Sums are fp32 over runs of at most `run_length` tokens and then folded into the fp64
// accumulators. A tile is a few neighboring tokens of one group: short enough that its rows stream from memory side
// by side, long enough that the partial sums are moved between registers and cache only once in a while.
#pragma once
#include <algorithm>
#include <vector>

#include "common/sums.h"

namespace clue {

constexpr int64_t run_length = 256;
constexpr int64_t tile_length = 8;
constexpr int64_t span_length = 4096;  // channels whose partial sums stay in the second-level cache
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

// Take all tokens of the channels [begin, end) from `source`, which does its own loading and storing and returns
// the pair of values to record: source(token, channel, channels left in the row).
template <int n, class T, class Sums, class Source>
CLUE_INLINE void record(const Recording& recording, int64_t begin, int64_t end, const Source& source) {
  constexpr int64_t group_size = Sums::fields * span_length;
  const Accumulators accumulators = recording.sums;
  float* const partial = recording.partial;
  for (int64_t span = begin; span < end; span += span_length) {
    const int64_t stop = std::min(end, span + span_length);
    const int64_t pairs = (stop - span + 2 * n - 1) / (2 * n);
    for (const Run& run : *recording.runs) {
      for (int g : run.groups) std::memset(partial + g * group_size, 0, pairs * 2 * n * Sums::fields * sizeof(float));
      for (const Tile& tile : run.tiles) {
        const int64_t last = tile.first + tile.count;
        for (int64_t c = span; c < stop; c += 2 * n) {
          if (tile.group < 0) {
            for (int64_t token = tile.first; token < last; ++token) source(token, c, end - c);
            continue;
          }
          float* const rest = partial + tile.group * group_size + (c - span) * Sums::fields;
          Sums sums;
          sums.load(rest);
          // Each value is added while the next one is computed, so that the sums do not wait for it.
          auto value = source(tile.first, c, end - c);
          for (int64_t token = tile.first + 1; token < last; ++token) {
            const auto next = source(token, c, end - c);
            sums.add(value);
            value = next;
          }
          sums.add(value);
          sums.store(rest);
        }
      }
      for (int g : run.groups) {
        double* const target = accumulators.data + g * accumulators.group_stride;
        for (int64_t c = span; c < stop; c += 2 * n)
          for (int field = 0; field < Sums::fields; ++field)
            fold_field<n, T, Sums>(field, partial + g * group_size + (c - span) * Sums::fields,
                                   target + field * accumulators.field_stride + c, stop - c);
      }
    }
  }
}

}  // namespace clue
