#include "mc.h"

#ifndef MC_VERSION
#error "Compile with MC_VERSION defined as what source_version in sources.py says of this folder, as setup.py does."
#endif

uint64_t mc_native_version(void) { return MC_VERSION; }
