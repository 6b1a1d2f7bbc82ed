// Which instruction set the CPU kernels use, chosen once at run time.
//
// Files named *_cpu.cc are compiled once per instruction set, each time in the namespace
// CAMBIUM_ISA (isa_generic, isa_avx2, isa_avx512); the macros below declare a kernel in all of them
// and call the best one this machine can run.
#pragma once

namespace cambium {

enum class CpuIsa { kGeneric = 0, kAvx2 = 1, kAvx512 = 2 };

/// The instruction set in use: the best of this machine, or less when the environment variable
/// CAMBIUM_ISA says generic, avx2 or avx512.
CpuIsa cpu_isa();
/// "generic", "avx2" or "avx512".
const char* cpu_isa_name(CpuIsa isa);
/// Whether the machine has bf16 dot products (AVX512_BF16) and may use them.
bool cpu_has_bf16();
/// For tests: forces an instruction set no better than the machine's.
void set_cpu_isa(CpuIsa isa);

}  // namespace cambium

#if defined(__x86_64__)
/// Declares `void name(const Args&)` in the namespace of every instruction set.
#define CAMBIUM_DECLARE_ISAS(name, ...) \
  namespace isa_generic {               \
  void name(const __VA_ARGS__& args);   \
  }                                     \
  namespace isa_avx2 {                  \
  void name(const __VA_ARGS__& args);   \
  }                                     \
  namespace isa_avx512 {                \
  void name(const __VA_ARGS__& args);   \
  }
/// Calls the best `name` this machine can run.
#define CAMBIUM_CALL_ISA(name, args)             \
  switch (::cambium::cpu_isa()) {                \
    case ::cambium::CpuIsa::kAvx512:             \
      return ::cambium::isa_avx512::name(args);  \
    case ::cambium::CpuIsa::kAvx2:               \
      return ::cambium::isa_avx2::name(args);    \
    case ::cambium::CpuIsa::kGeneric:            \
      return ::cambium::isa_generic::name(args); \
  }
#else
#define CAMBIUM_DECLARE_ISAS(name, ...) \
  namespace isa_generic {               \
  void name(const __VA_ARGS__& args);   \
  }
#define CAMBIUM_CALL_ISA(name, args) return ::cambium::isa_generic::name(args);
#endif

/// A kernel of the CPU alone, as the plan of an operation's work calls it (ops/kernel.h declares
/// the kernels that all backends have): declares `name` for every instruction set and defines a
/// function that picks one per call.
#define CAMBIUM_CPU_KERNEL(name, Args) \
  CAMBIUM_DECLARE_ISAS(name, Args)     \
  inline void name(const Args& args) { \
    CAMBIUM_CALL_ISA(name, args)       \
  }
