// What this machine's processor can do, asked once.
#pragma once

namespace pairclip {

// Instruction sets in ascending order; each contains the ones before it. A processor whose bfloat16 products are slower than
// float32's has Level::avx512.
enum class Level { portable = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx = 4 };

// The best level that the processor, the operating system and this build all support. AMX needs the kernel's permission
// once per process (arch_prctl); it is asked for here. The environment variable PAIRCLIP_ISA, read once, lowers the level
// (portable, avx2, avx512, avx512_bf16, amx); it never raises it.
Level best_level();

const char* name(Level level);

// Whether byte look-up and byte dot products (AVX-512 VBMI and VNNI: Ice Lake, Zen 4 and later) may be used beside
// Level::avx512. PAIRCLIP_ISA=avx512 leaves them out.
bool has_byte_lookup();

}  // namespace pairclip
