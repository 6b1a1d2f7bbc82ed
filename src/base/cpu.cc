#include "base/cpu.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <string_view>

#include "base/error.h"

namespace cambium {
namespace {

CpuIsa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return CpuIsa::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return CpuIsa::kAvx2;
  }
#endif
  return CpuIsa::kGeneric;
}

CpuIsa initial_isa() {
  const char* wanted = std::getenv("CAMBIUM_ISA");
  if (wanted == nullptr || *wanted == '\0') {
    return best_isa();
  }
  for (CpuIsa isa : {CpuIsa::kGeneric, CpuIsa::kAvx2, CpuIsa::kAvx512}) {
    if (std::string_view(wanted) == cpu_isa_name(isa)) {
      return std::min(isa, best_isa());
    }
  }
  fail("CAMBIUM_ISA: expected generic, avx2 or avx512, got '{}'", wanted);
}

std::atomic<CpuIsa>& isa_in_use() {
  static std::atomic<CpuIsa> isa = initial_isa();
  return isa;
}

}  // namespace

CpuIsa cpu_isa() {
  return isa_in_use().load(std::memory_order_relaxed);
}

const char* cpu_isa_name(CpuIsa isa) {
  constexpr const char* kNames[] = {"generic", "avx2", "avx512"};
  return kNames[static_cast<int>(isa)];
}

bool cpu_has_bf16() {
#if defined(__x86_64__)
  return cpu_isa() == CpuIsa::kAvx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

void set_cpu_isa(CpuIsa isa) {
  isa_in_use() = std::min(isa, best_isa());
}

}  // namespace cambium
