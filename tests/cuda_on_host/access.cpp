// Checks every access of a kernel, where the compiler calls for each: -fsanitize=thread puts the calls, and the functions
// below take the place of the sanitizer's own.
//
// Errors are: an address outside the tensors that the launch was given, shared memory that nobody wrote, a vector at
// an address that is not a multiple of its size, and two threads that meet at one byte, at least one of them writing,
// with no barrier between: __syncthreads for threads of a block, __syncwarp for those of a warp, nothing for blocks.
#include <link.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <unordered_map>
#include <vector>

#include "execution.h"

namespace cuda_on_host {
namespace {

// The last access of a kind to a cell of memory. Who is 0 for nobody.
struct Stamp {
  uint32_t who;
  uint16_t block_epoch;
  uint16_t warp_epoch : 12;
  uint16_t several_lanes : 1;   // in this warp's epoch
  uint16_t several_warps : 1;   // in this block's epoch
  uint16_t several_blocks : 1;
  uint16_t atomic : 1;
};

struct Cell {
  Stamp write, read;
};

constexpr uintptr_t page_bytes = 4096;

// A cell has as many bytes as every access to the page took, so that one access fills whole cells.
struct Page {
  uintptr_t granule;
  std::array<Cell, page_bytes> cells;

  void clear() {
    granule = 16;
    std::fill_n(cells.begin(), page_bytes / granule, Cell{});
  }
  void split(uintptr_t into) {
    const uintptr_t times = granule / into;
    for (uintptr_t i = page_bytes / granule; i-- > 0;)
      std::fill_n(cells.begin() + i * times, times, Cell{cells[i]});
    granule = into;
  }
};

uintptr_t largest_power_of_two_in(uintptr_t x) { return x & -x; }

class Shadow {
 public:
  Page& of(uintptr_t address) {
    const uintptr_t number = address / page_bytes;
    Recent& recent = recent_[number % recent_.size()];
    if (recent.number != number || recent.page == nullptr) recent = {number, find(number)};
    return *recent.page;
  }
  void clear() {
    for (auto& [number, page] : pages_) free_.push_back(std::move(page));
    pages_.clear();
    recent_.fill({});
  }

 private:
  struct Recent {
    uintptr_t number;
    Page* page;
  };
  Page* find(uintptr_t number) {
    auto& page = pages_[number];
    if (page) return page.get();
    if (free_.empty()) {
      page.reset(new Page);  // without zeros
    } else {
      page = std::move(free_.back());
      free_.pop_back();
    }
    page->clear();
    return page.get();
  }
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
  std::vector<std::unique_ptr<Page>> free_;
  std::array<Recent, 64> recent_{};
};

struct Region {
  uintptr_t begin, end;
  std::string name;
};

struct Memory {
  std::map<uintptr_t, Region> given;  // by their ends
  std::array<Region*, 64> recent{};   // by page; a guess
  Shadow global, shared;
  Region statics{}, constants{};
};

// Where this library keeps what its kernels declare __shared__, and its constants.
int find_own_segments(dl_phdr_info* object, size_t, void* memory) {
  const auto self = reinterpret_cast<uintptr_t>(&find_own_segments);
  std::vector<const ElfW(Phdr)*> loaded;
  bool own = false;
  for (const auto* segment = object->dlpi_phdr; segment != object->dlpi_phdr + object->dlpi_phnum; ++segment) {
    if (segment->p_type != PT_LOAD) continue;
    loaded.push_back(segment);
    const uintptr_t begin = object->dlpi_addr + segment->p_vaddr;
    own = own || (self >= begin && self < begin + segment->p_memsz);
  }
  if (!own) return 0;
  auto& [given, recent, global, shared, statics, constants] = *static_cast<Memory*>(memory);
  for (const auto* segment : loaded) {
    const uintptr_t begin = object->dlpi_addr + segment->p_vaddr, end = begin + segment->p_memsz;
    Region& region = segment->p_flags & PF_W ? statics : constants;
    region.begin = region.end ? std::min(region.begin, begin) : begin;
    region.end = std::max(region.end, end);
  }
  return 1;
}

Memory& memory() {
  static Memory it;
  static const int found = dl_iterate_phdr(find_own_segments, &it);
  (void)found;
  return it;
}

bool contains(const Region& region, uintptr_t address, size_t bytes) {
  return address >= region.begin && address + bytes <= region.end;
}

bool is_given(uintptr_t address, size_t bytes) {
  Memory& all = memory();
  Region*& recent = all.recent[address / page_bytes % all.recent.size()];
  if (recent != nullptr && contains(*recent, address, bytes)) return true;
  const auto next = all.given.upper_bound(address);
  if (next == all.given.end() || !contains(next->second, address, bytes)) return false;
  recent = &next->second;
  return true;
}

std::string place_of(uintptr_t address) {
  const auto& given = memory().given;
  if (contains(memory().statics, address, 1)) return "shared memory";
  const Region* nearest = nullptr;
  uintptr_t distance = 0;
  for (const auto& [end, region] : given) {
    const uintptr_t away = address < region.begin ? region.begin - address : address >= end ? address - end + 1 : 0;
    if (nearest == nullptr || away < distance) nearest = &region, distance = away;
  }
  if (nearest == nullptr || distance > page_bytes) return "an address that the launch was not given";
  const auto offset = static_cast<intptr_t>(address - nearest->begin);
  return nearest->name + " at byte " + std::to_string(offset) + " of " + std::to_string(nearest->end - nearest->begin);
}

std::string thread_name(uint32_t who, const Moment& moment) {
  const uint32_t number = who - 1;
  return "thread " + std::to_string(number % moment.threads_per_block) + " of block " +
         std::to_string(number / moment.threads_per_block);
}

// Position in the block that runs, or a number beyond the block.
uint32_t in_block(uint32_t who, const Moment& moment) { return who - 1 - moment.block * moment.threads_per_block; }

bool in_same_warp(uint32_t position, const Moment& moment) { return position / warp_size == moment.thread / warp_size; }

// Whether what was done then is over for the thread that runs now.
bool over(const Stamp& then, const Moment& moment) {
  if (then.who == 0) return true;
  const uint32_t position = in_block(then.who, moment);
  if (position >= moment.threads_per_block || then.several_blocks) return false;
  if (then.block_epoch != moment.block_epoch) return true;
  if (then.several_warps) return false;
  if (in_same_warp(position, moment) && then.warp_epoch != (moment.warp_epoch & 0xfff)) return true;
  return !then.several_lanes && position == moment.thread;
}

// The stamp of the thread that runs; what stood there before leaves its trace if it is not over.
Stamp joined(const Stamp& before, const Stamp& mine, const Moment& moment) {
  Stamp stamp = mine;
  if (over(before, moment)) return stamp;
  const uint32_t position = in_block(before.who, moment);
  stamp.several_blocks = before.several_blocks || position >= moment.threads_per_block;
  stamp.several_warps = before.several_warps || !in_same_warp(position, moment);
  stamp.several_lanes = true;
  return stamp;
}

void check_race(Cell& cell, uintptr_t address, Access kind, const Stamp& mine, const Moment& moment) {
  const auto race = [&](const char* verb, const Stamp& other, const char* theirs) {
    report(std::string("race: ") + verb + " " + place_of(address) + ", which " + thread_name(other.who, moment) + " " +
           theirs + " with no barrier in between");
  };
  const bool both_atomic = kind == Access::atomic && cell.write.atomic;
  if (!both_atomic && !over(cell.write, moment)) race(kind == Access::read ? "reads" : "writes", cell.write, "wrote");
  if (kind == Access::read) {
    cell.read = joined(cell.read, mine, moment);
    return;
  }
  if (!over(cell.read, moment)) race("writes", cell.read, "read");
  cell.write = both_atomic ? joined(cell.write, mine, moment) : mine;
  cell.write.atomic = kind == Access::atomic;
  cell.read = {};
}

}  // namespace

void access(const void* pointer, size_t bytes, Access kind, bool aligned) {
  const Moment* moment = now();
  if (moment == nullptr) return;
  const auto* begin = static_cast<const char*>(pointer);
  if (begin >= moment->stack && begin < moment->stack_end) return;
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  const bool reads = kind == Access::read;
  if (reads && begin >= moment->call && begin + bytes <= moment->call_end) return;
  Memory& all = memory();
  if (reads && contains(all.constants, address, bytes)) return;
  const bool shared = contains(all.statics, address, bytes);
  const auto what = [&] { return std::string(reads ? "reads " : "writes ") + std::to_string(bytes) + " bytes of "; };
  if (!shared && !is_given(address, bytes)) {
    report("out of bounds: " + what() + place_of(address));
    stop_thread();
  }
  if (aligned && address % bytes != 0) report("misaligned: " + what() + place_of(address));
  Stamp mine{};
  mine.who = moment->block * moment->threads_per_block + moment->thread + 1;
  mine.block_epoch = moment->block_epoch;
  mine.warp_epoch = moment->warp_epoch & 0xfff;
  Shadow& shadow = shared ? all.shared : all.global;
  for (uintptr_t end = address + bytes, at = address; at < end;) {
    Page& page = shadow.of(at);
    const uintptr_t within = at % page_bytes, length = std::min(end - at, page_bytes - within);
    const uintptr_t granule = largest_power_of_two_in(within | length | page.granule);
    if (granule < page.granule) page.split(granule);
    for (uintptr_t i = within / granule; i < (within + length) / granule; ++i) {
      if (shared && kind != Access::write && page.cells[i].write.who == 0)
        return report("uninitialized: " + what() + "shared memory that no thread of the block wrote");
      check_race(page.cells[i], at, kind, mine, *moment);
    }
    at += length;
  }
}

void forget_accesses() { memory().global.clear(); }
void forget_shared_accesses() { memory().shared.clear(); }

}  // namespace cuda_on_host

extern "C" {

// Tells the memory that the next launches may use, and forgets it.
__attribute__((visibility("default"))) void cuda_on_host_give(const char* name, uintptr_t begin, uintptr_t bytes) {
  if (bytes) cuda_on_host::memory().given[begin + bytes] = {begin, begin + bytes, name};
}
__attribute__((visibility("default"))) void cuda_on_host_take_all() {
  cuda_on_host::memory().given.clear();
  cuda_on_host::memory().recent = {};
}
__attribute__((visibility("default"))) bool cuda_on_host_is_given(uintptr_t address) {
  return cuda_on_host::is_given(address, 1);
}

#define ACCESSES(bytes)                                                                                               \
  void __tsan_read##bytes(void* p) { cuda_on_host::access(p, bytes, cuda_on_host::Access::read, true); }              \
  void __tsan_write##bytes(void* p) { cuda_on_host::access(p, bytes, cuda_on_host::Access::write, true); }            \
  void __tsan_volatile_read##bytes(void* p) { cuda_on_host::access(p, bytes, cuda_on_host::Access::read, true); }     \
  void __tsan_volatile_write##bytes(void* p) { cuda_on_host::access(p, bytes, cuda_on_host::Access::write, true); }   \
  void __tsan_unaligned_read##bytes(void* p) { cuda_on_host::access(p, bytes, cuda_on_host::Access::read, false); }   \
  void __tsan_unaligned_write##bytes(void* p) { cuda_on_host::access(p, bytes, cuda_on_host::Access::write, false); }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
void __tsan_read_range(void* p, size_t bytes) { cuda_on_host::access(p, bytes, cuda_on_host::Access::read, false); }
void __tsan_write_range(void* p, size_t bytes) { cuda_on_host::access(p, bytes, cuda_on_host::Access::write, false); }
// Reference counts of the host.
uint32_t __tsan_atomic32_fetch_add(volatile uint32_t* p, uint32_t x, int) { return __atomic_fetch_add(p, x, 5); }
uint32_t __tsan_atomic32_fetch_sub(volatile uint32_t* p, uint32_t x, int) { return __atomic_fetch_sub(p, x, 5); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
