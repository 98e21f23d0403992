/* Which sources the library was made from, and where the fields of its structures lie: for Python to compare. It
 * computes nothing. */
#include "mc.h"

#include <stddef.h>
#include <string.h>

#ifndef MC_VERSION
#error "Compile with MC_VERSION defined as what source_version in sources.py says of this folder, as setup.py does."
#endif

uint64_t mc_native_version(void) { return MC_VERSION; }

#define AT(structure, field) (int32_t)offsetof(structure, field)

int mc_layout(int32_t *numbers) {
    const int32_t found[] = {
        AT(mc_trellis_entry, codes), AT(mc_trellis_entry, scales), AT(mc_trellis_entry, inputs),
        AT(mc_trellis_entry, outputs), AT(mc_trellis_entry, block), AT(mc_trellis_entry, length),
        AT(mc_trellis_entry, planes), sizeof(mc_trellis_entry),
        AT(mc_affine_entry, codes), AT(mc_affine_entry, scales), AT(mc_affine_entry, zero_points),
        AT(mc_affine_entry, inputs), AT(mc_affine_entry, outputs), AT(mc_affine_entry, bits), sizeof(mc_affine_entry),
        AT(mc_bank, trellis), AT(mc_bank, affine), AT(mc_bank, tables), AT(mc_bank, signs), AT(mc_bank, unit),
        AT(mc_bank, kind), AT(mc_bank, matrices), AT(mc_bank, inputs), AT(mc_bank, outputs), AT(mc_bank, group),
        sizeof(mc_bank),
    };
    if (numbers) memcpy(numbers, found, sizeof found);
    return sizeof found / sizeof *found;
}
