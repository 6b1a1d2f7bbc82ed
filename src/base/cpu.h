// Which instruction set the CPU kernels use, chosen once at run time.
//
// Files named *_cpu.cc are compiled once per instruction set, each time in the namespace
// CAMBIUM_ISA (isa_generic, isa_avx2, isa_avx512). CAMBIUM_CPU_KERNEL declares a kernel in all of
// them and defines a function of the same name that calls the best one this machine can run.
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
/// `name(const Args&)`: declares the kernel for every instruction set and picks one per call.
#define CAMBIUM_CPU_KERNEL(name, Args)  \
  namespace isa_generic {               \
  void name(const Args& args);          \
  }                                     \
  namespace isa_avx2 {                  \
  void name(const Args& args);          \
  }                                     \
  namespace isa_avx512 {                \
  void name(const Args& args);          \
  }                                     \
  inline void name(const Args& args) {  \
    switch (cpu_isa()) {                \
      case CpuIsa::kAvx512:             \
        return isa_avx512::name(args);  \
      case CpuIsa::kAvx2:               \
        return isa_avx2::name(args);    \
      case CpuIsa::kGeneric:            \
        return isa_generic::name(args); \
    }                                   \
  }
#else
#define CAMBIUM_CPU_KERNEL(name, Args) \
  namespace isa_generic {              \
  void name(const Args& args);         \
  }                                    \
  inline void name(const Args& args) { \
    isa_generic::name(args);           \
  }
#endif
