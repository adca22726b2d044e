// Adding values to the statistics of their token's group while they are in registers or in the cache.
//
// Sums are fp32 over runs of at most `run_length` tokens. Threads split what there is by run and then by channel, so
// that each walks through memory row after row; the sums of every run are kept and then folded, run after run, into the
// fp64 accumulators. So the order of every sum is fixed whatever the number of threads. A tile is a few neighboring
// tokens of one group: it stays in the cache, and the partial sums move between registers and cache once a tile.
// Tiles do not change the order of any sum.
#pragma once
#include <algorithm>
#include <vector>

#include "common/sums.h"

namespace clue {

constexpr int64_t run_length = 256;
constexpr int64_t span_length = 4096;  // channels of a tile that stay in the second-level cache, with their sums
constexpr int64_t runs_at_once = 16;   // at most, whose sums are kept before they are folded
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

// Which sums are added to the accumulators, whose other fields stay as they are.
enum class SumSet { all, moments, magnitude };

// What a job that records knows beside its own tensors; `runs` is null where nothing is recorded.
struct Recording {
  int64_t tokens, channels;
  const Run *runs, *runs_end;
  Accumulators sums;
  SumSet set;
  float* scratch;  // of this thread: groups x fields x span_length
  float* partial;  // of the first run: groups x fields x row_length, in the order of the channels
};

inline int64_t row_length(int64_t channels) { return (channels + channel_block - 1) / channel_block * channel_block; }

// Adds the partial sums of all runs to the accumulators of the channels [begin, end), in the order of the runs.
struct Folding {
  const Run* runs;
  int64_t run_count, row_length;
  const float* partial;  // runs x groups x fields x row_length
  Accumulators sums;
  const std::vector<int>& fields;  // of the accumulators
  int maximum_field;               // -1 where all are added
};
void fold(const Folding& folding, int64_t begin, int64_t end);

inline std::vector<Run> runs_of(const int8_t* group, int64_t tokens, int64_t groups, int64_t tile_length) {
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

// Take the tokens of one run of the channels [begin, end) from `source`: it is first given each tile,
// source.prepare(tile, channel, channel behind the last, channels left in the row), and then, where the tokens
// count, asked for the pairs of values to record, source(token, channel, channels left in the row).
template <int n, class T, class Sums, class Source>
CLUE_INLINE void record(const Recording& recording, int64_t begin, int64_t end, const Source& source) {
  constexpr int64_t group_size = Sums::fields * span_length;
  const int64_t row = row_length(recording.channels);
  const Run& run = *recording.runs;
  float* const scratch = recording.scratch;
  for (int64_t span = begin; span < end; span += span_length) {
    const int64_t stop = std::min(end, span + span_length);
    const int64_t pairs = (stop - span + 2 * n - 1) / (2 * n);
    for (int g : run.groups) std::memset(scratch + g * group_size, 0, pairs * 2 * n * Sums::fields * sizeof(float));
    for (const Tile& tile : run.tiles) {
      source.prepare(tile, span, stop, end - span);
      if (tile.group < 0) continue;
      const int64_t last = tile.first + tile.count;
      for (int64_t c = span; c < stop; c += 2 * n) {
        float* const rest = scratch + tile.group * group_size + (c - span) * Sums::fields;
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
    for (int g : run.groups)
      for (int64_t c = span; c < stop; c += 2 * n)
        for (int field = 0; field < Sums::fields; ++field)
          write_in_order<n, T>(recording.partial + (g * Sums::fields + field) * row + c,
                               Sums::field(field, scratch + g * group_size + (c - span) * Sums::fields));
  }
}

}  // namespace clue
