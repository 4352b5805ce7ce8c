// The tile registers of AMX: eight of 16 rows of 64 bytes.

#pragma once

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

namespace qfx::amx {

// Linux gives tiles to processes that ask for them; their threads and children have them too. Asked once: where the
// answer is no, a tile instruction would end the process. Source: Linux, Documentation/arch/x86/xstate.rst.
inline bool permitted() {
  // ARCH_REQ_XCOMP_PERM of XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  return granted;
}

// The memory operand of LDTILECFG.
struct alignas(64) Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
inline constexpr Config kWhole{1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// As long as this lives, its thread has eight whole tiles. Other code of the thread may use tiles before and after.
struct Tiles {
  Tiles() { _tile_loadconfig(&kWhole); }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// g++'s tile loads do not say that they read memory: what was written there before must be written by now.
inline void settle_memory() { asm volatile("" ::: "memory"); }

}  // namespace qfx::amx
