/* Products with affine grids in plain C, which compilers vectorise.
 *
 * An output is sum_i w_i x_i over the inputs i of a row. A group g of inputs has one grid: w_i = s_g (c_i - z_g), with
 * codes c_i of 1 to 8 bits, a float16 scale s_g and a zero point z_g in steps of 2^-(8 - bits). Its activations have
 * one step t_g: x_i = t_g (a_i + b_i / 254), a_i and b_i bytes in -127 .. 127 (mc_split). So
 *
 *     sum_i w_i x_i = sum_g s_g t_g E_g / 254 - s_g z_g X_g,  where
 *     E_g = sum_i c_i (254 a_i + b_i)  and  X_g = t_g sum_i (a_i + b_i / 254).
 *
 * E_g is a sum of whole numbers. 254 a + b fits 16 bits (at most 254 * 127 + 127 = 32385), a code is at most 255, so an
 * int32 holds the sum of 256 products; longer groups add up such sums in float32. X_g is computed once per token. So
 * everything within 256 inputs is exact, and only what groups give is rounded, in one order: outputs do not depend on
 * threads or batch.
 *
 * Layout: a row has its codes side by side, 8 of them in `bits` bytes, the first in the lowest bits; `inputs` rounded
 * up to whole words of 8. A word becomes 8 bytes in three steps: its upper half moves 32 bits up, then the upper halves
 * of both halves 16, then 8; a mask after each step takes away what did not move. Activations lie as int16, every
 * group from a multiple of 64 on, with zeros behind its end. NEON has this path, too. */
#include "affine.h"

/* `words` times 8 codes to 8 bytes; the fields of a word move apart in three halving steps. */
INLINE void unpack_words(const uint8_t *codes, const int bits, int words, uint8_t *bytes) {
    const uint64_t half = ~0ull >> (64 - 4 * bits), quarter = (~0ull >> (64 - 2 * bits)) * 0x0000000100000001ull,
                   eighth = (~0ull >> (64 - bits)) * 0x0001000100010001ull;
    for (int i = 0; i < words; i++) {
        uint64_t word = 0;
#pragma GCC unroll 8
        for (int byte = 0; byte < bits; byte++) word |= (uint64_t)codes[i * bits + byte] << 8 * byte;
        word = (word & half) | (word >> 4 * bits & half) << 32;
        word = (word & quarter) | (word >> 2 * bits & quarter) << 16;
        word = (word & eighth) | (word >> bits & eighth) << 8;
#pragma GCC unroll 8
        for (int byte = 0; byte < 8; byte++) bytes[8 * i + byte] = (uint8_t)(word >> 8 * byte);
    }
}

VERSIONS static void unpack(const uint8_t *codes, int bits, int words, uint8_t *bytes) {
    switch (bits) { /* each case has constant shifts */
    case 1: unpack_words(codes, 1, words, bytes); break;
    case 2: unpack_words(codes, 2, words, bytes); break;
    case 3: unpack_words(codes, 3, words, bytes); break;
    case 4: unpack_words(codes, 4, words, bytes); break;
    case 5: unpack_words(codes, 5, words, bytes); break;
    case 6: unpack_words(codes, 6, words, bytes); break;
    case 7: unpack_words(codes, 7, words, bytes); break;
    default: memcpy(bytes, codes, 8 * (size_t)words);
    }
}

VERSIONS static void read_grids(const AffineMatrix *m, int row, float *scales, float *offsets) {
    const float unit = 1.0f / (float)(1 << (8 - m->bits));
    const uint16_t *stored = m->scales + (size_t)row * m->groups;
    const uint8_t *zero_points = m->zero_points + (size_t)row * m->groups;
    for (int g = 0; g < m->groups; g++) {
        scales[g] = from_half(stored[g]);
        offsets[g] = scales[g] * unit * (float)zero_points[g];
    }
}

void mc_affine_read_grids(const AffineMatrix *m, int row, float *scales, float *offsets) {
    read_grids(m, row, scales, offsets);
}

VERSIONS static float row_product(const AffineMatrix *m, const uint8_t *w, const float *scales, const float *offsets,
                                    AffineInputs x) {
    float sum = 0;
    for (int g = 0; g < m->groups; g++) {
        const uint8_t *codes = w + (size_t)g * m->group;
        const int16_t *wide = x.wide + g * x.pitch;
        float found = 0;
        for (int begin = 0; begin < m->group; begin += MOST_EXACT) {
            const int end = begin + MOST_EXACT < m->group ? begin + MOST_EXACT : m->group;
            int32_t exact = 0;
            for (int i = begin; i < end; i++) exact += (int16_t)codes[i] * wide[i];
            found += (float)exact;
        }
        sum += scales[g] * x.steps[g] * (found / FINE) - offsets[g] * x.totals[g];
    }
    return sum;
}

static int multiply(const AffineProduct *p, const AffineMatrix *m, int task, int first, int last) {
    const mc_task *of = p->sorted.tasks + task;
    const int *slots = p->sorted.slots + of->first;
    const AffineScratch s = new_scratch(p);
    if (!s.scales) return 1;
    for (int row = first; row < last; row++) {
        read_grids(m, row, s.scales, s.offsets);
        unpack(row_of(m, row), m->bits, words_of(m), s.codes);
        for (int i = 0; i < of->count; i++)
            p->out[(size_t)slots[i] * p->outputs + row] =
                row_product(m, s.codes, s.scales, s.offsets, activations_of(p, (size_t)(slots[i] / p->top_k)));
    }
    free(s.scales);
    return 0;
}

VERSIONS static void write_values(const uint8_t *codes, int count, float scale, float zero_point, float *floats,
                                  uint16_t *bfloat16s) {
    if (floats)
        for (int i = 0; i < count; i++) floats[i] = ((float)codes[i] - zero_point) * scale;
    else
        for (int i = 0; i < count; i++) bfloat16s[i] = to_bfloat16(((float)codes[i] - zero_point) * scale);
}

void mc_affine_unpack(const uint8_t *codes, int bits, int words, uint8_t *bytes) {
    unpack(codes, bits, words, bytes);
}

void mc_affine_write(const uint8_t *codes, int count, float scale, float zero_point, float *floats,
                     uint16_t *bfloat16s) {
    write_values(codes, count, scale, zero_point, floats, bfloat16s);
}

const AffinePath mc_affine_portable = {.multiply = multiply, .unpack = mc_affine_unpack, .write = mc_affine_write,
                                      .wide = 1};
