// What this machine's processor can do, asked once.
#pragma once

namespace pairclip {

// Instruction sets in ascending order; each contains the ones before it.
enum class Level { portable = 0, avx2 = 1, avx512 = 2, amx = 3 };

// The best level that the processor, the operating system and this build all support. AMX needs the kernel's permission
// once per process (arch_prctl); it is asked for here. The environment variable PAIRCLIP_ISA, read once, lowers the level
// (portable, avx2, avx512, amx); it never raises it.
Level best_level();

const char* name(Level level);

// Whether byte look-up and byte dot products (AVX-512 VBMI and VNNI: Ice Lake, Zen 4 and later) may be used beside
// Level::avx512. PAIRCLIP_ISA=avx512 leaves them out.
bool has_byte_lookup();

}  // namespace pairclip
