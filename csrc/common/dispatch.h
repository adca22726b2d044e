// Choice of instruction set at run time: one binary for every machine of an architecture.
#pragma once

namespace clue {

enum class InstructionSet { baseline, v3, v4 };

InstructionSet instruction_set();
const char* name_of(InstructionSet set);

// Use `name` ("baseline", "x86-64-v3", "x86-64-v4") from now on; false if this machine cannot.
bool use_instruction_set(const char* name);

}  // namespace clue

// Defines name(args, begin, end) from a template name<n>(args, begin, end), compiled once for each instruction set
// with the number of floats in its registers.
#if defined(__x86_64__) && defined(__GNUC__)
#define CLUE_DISPATCH(name, Arguments)                                                                     \
  __attribute__((target("arch=x86-64-v4"))) void name##_v4(const Arguments& a, int64_t b, int64_t e) {     \
    name<16>(a, b, e);                                                                                     \
  }                                                                                                        \
  __attribute__((target("arch=x86-64-v3"))) void name##_v3(const Arguments& a, int64_t b, int64_t e) {     \
    name<8>(a, b, e);                                                                                      \
  }                                                                                                        \
  void name##_baseline(const Arguments& a, int64_t b, int64_t e) { name<4>(a, b, e); }                     \
  void name(const Arguments& a, int64_t b, int64_t e) {                                                    \
    switch (instruction_set()) {                                                                           \
      case InstructionSet::v4: return name##_v4(a, b, e);                                                  \
      case InstructionSet::v3: return name##_v3(a, b, e);                                                  \
      default: return name##_baseline(a, b, e);                                                            \
    }                                                                                                      \
  }
#else
#define CLUE_DISPATCH(name, Arguments) \
  void name(const Arguments& a, int64_t b, int64_t e) { name<4>(a, b, e); }
#endif
