#include "core/cpu.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pairclip {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};

#if defined(__x86_64__)
// Linux: arch/x86/include/uapi/asm/prctl.h. Tile data is 8 KB of state per thread, which the kernel hands out on request.
constexpr int kRequestPermission = 0x1023;
constexpr int kTileData = 18;

bool tiles_permitted() { return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0; }

// CPUID leaf 7 (Intel SDM, volume 2A, CPUID): AVX512_BF16 is EAX bit 5 of subleaf 1; AMX-BF16 is EDX bit 22, AMX-TILE bit 24.
// Compilers of 2022 do not know these names in __builtin_cpu_supports.
bool has_pair_products() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}

bool has_tiles() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1) && tiles_permitted();
}

// Intel's vdpbf16ps takes four times as long as a float32 multiply-add and does twice its work; AMD's takes as long as one.
bool is_intel() { return __builtin_cpu_is("intel"); }
#endif

Level supported() {
  Level level = Level::portable;
#if defined(__x86_64__)
  __builtin_cpu_init();
#if defined(PAIRCLIP_BUILT_avx2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) level = Level::avx2;
#endif
#if defined(PAIRCLIP_BUILT_avx512)
  if (level == Level::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    level = Level::avx512;
#endif
#if defined(PAIRCLIP_BUILT_avx512_bf16)
  if (level == Level::avx512 && has_pair_products() && !is_intel()) level = Level::avx512_bf16;
#endif
#if defined(PAIRCLIP_BUILT_amx)
  if (level >= Level::avx512 && has_pair_products() && has_tiles()) level = Level::amx;
#endif
#endif
  return level;
}

Level detect() {
  const Level level = supported();
  const char* wanted = std::getenv("PAIRCLIP_ISA");
  if (wanted == nullptr) return level;
  for (int i = 0; i <= static_cast<int>(level); ++i)
    if (std::strcmp(wanted, kNames[i]) == 0) return static_cast<Level>(i);
  return level;
}

}  // namespace

Level best_level() {
  static const Level level = detect();
  return level;
}

bool has_byte_lookup() {
#if defined(PAIRCLIP_BUILT_vbmi)
  static const bool found = [] {
    const char* wanted = std::getenv("PAIRCLIP_ISA");
    if (wanted != nullptr && std::strcmp(wanted, name(Level::avx512)) == 0) return false;
    __builtin_cpu_init();
    return best_level() >= Level::avx512 && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
  }();
  return found;
#else
  return false;
#endif
}

const char* name(Level level) { return kNames[static_cast<int>(level)]; }

}  // namespace pairclip
