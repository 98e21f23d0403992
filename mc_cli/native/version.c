#include "mc.h"

/* Raised, here and in __init__.py, with every change of the routines: a library compiled from other sources is not used. */
int mc_native_version(void) { return 14; }
