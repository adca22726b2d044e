#include "common/dispatch.h"

#include <cstring>
#include <initializer_list>

namespace clue {
namespace {

bool supported(InstructionSet set) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (set == InstructionSet::v4) return __builtin_cpu_supports("x86-64-v4");
  if (set == InstructionSet::v3) return __builtin_cpu_supports("x86-64-v3");
#endif
  return set == InstructionSet::baseline;
}

InstructionSet best() {
  for (InstructionSet set : {InstructionSet::v4, InstructionSet::v3})
    if (supported(set)) return set;
  return InstructionSet::baseline;
}

InstructionSet chosen = best();

}  // namespace

InstructionSet instruction_set() { return chosen; }

const char* name_of(InstructionSet set) {
  switch (set) {
    case InstructionSet::v4: return "x86-64-v4";
    case InstructionSet::v3: return "x86-64-v3";
    default: return "baseline";
  }
}

bool use_instruction_set(const char* name) {
  for (InstructionSet set : {InstructionSet::baseline, InstructionSet::v3, InstructionSet::v4})
    if (std::strcmp(name, name_of(set)) == 0 && supported(set)) {
      chosen = set;
      return true;
    }
  return false;
}

}  // namespace clue
