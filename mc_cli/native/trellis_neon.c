/* Products with trellis codes on NEON, by the sums that trellis_portable.c derives: sum_i v_oi a_i and sum_i v_oi b_i,
 * with levels v of the weights and bytes a and b of the activations. It has run under emulation alone, where it gives
 * the portable path's bits.
 *
 * Decoding: a vector has 4 lanes of 4 inputs, a quarter of the 64 bytes of a row of the block. The six bits that index
 * a table come out of two planes by two shifts and an or, for 16 weights at once, and vqtbl4q looks all 64 bytes of a
 * table up in one instruction: two or three look-ups a vector. Where codes have a sign, the highest bit of the hash,
 * spread over its byte, negates the level by an xor and a subtraction. Lanes that a sequence lacks are multiplied,
 * too; their sums are not read.
 *
 * NEON multiplies signed bytes by signed bytes, so 128 is taken away first (an xor of the highest bit), and sums are
 * of levels: nothing is to be taken away at the end (mc_trellis_finish_levels). A product of two bytes is at most 127
 * * 127, the sum of two of them 32258: they fit 16 bits, so vmull and vpaddq are exact, and vpadalq adds pairs of
 * these into int32, a lane's four inputs into one. 65536 inputs make 65536 * 127 * 127, less than 2^31: sums are exact
 * in any order, and the same as those of other paths once these have taken away their 128 sum_i a_i.
 *
 * Two rows of activations pass together, with the same bytes: sums are [2 rows][4 quarters] of 4 lanes, in
 * registers while the groups of a block pass. With an odd number of rows one beyond the last is read and its sums
 * are written. */
#include "trellis_product.h"

#ifdef HAS_NEON

#define QUARTER (LANE_BYTES / 4) /* bytes of a vector: 4 lanes */

/* Every byte: bits `bit` to bit + 5 of its column of planes. */
INLINE uint8x16_t six_of(const uint8x16_t *planes, int bit) {
    const int plane = bit >> 3, from = bit & 7;
    uint8x16_t bits = planes[plane] >> from;
    if (from > 2) bits |= planes[plane + 1] << (8 - from);
    return vandq_u8(bits, vdupq_n_u8(63));
}

INLINE void decode_planes(const TrellisSequence *s, const TrellisCode *code, int first, int count, TrellisBlock block,
                               const int planes) {
    const uint8x16x4_t one = vld1q_u8_x4(code->first), two = vld1q_u8_x4(code->second),
                       levels = vld1q_u8_x4(code->levels);
    const size_t stride = (size_t)s->lanes * GROUP;
    uint8_t near[MOST_PLANES + 2][LANE_BYTES] = {{0}};
    for (int g = 0; g < count; g++) {
        read_planes(s->codes + (size_t)(first + g) * planes * stride, planes, stride, near);
        for (size_t from = 0; from < stride; from += QUARTER) {
            uint8x16_t plane[MOST_PLANES + 2];
#pragma GCC unroll 12
            for (int p = 0; p < planes + 2; p++) plane[p] = vld1q_u8(near[p] + from);
#pragma GCC unroll 16
            for (int k = 0; k < PER_LANE; k++) {
                const int bit = k * planes / 2;
                const uint8x16_t low = six_of(plane, bit), high = vqtbl4q_u8(two, six_of(plane, bit + 6));
                uint8x16_t level;
                if (planes < SIGNED_FROM) level = vqtbl4q_u8(levels, veorq_u8(low, high));
                else {
                    const uint8x16_t hash = veorq_u8(vqtbl4q_u8(one, low), high);
                    const uint8x16_t negative = vreinterpretq_u8_s8(vshrq_n_s8(vreinterpretq_s8_u8(hash), 7));
                    level = vqtbl4q_u8(levels, vandq_u8(hash, vdupq_n_u8(63)));
                    level = vsubq_u8(veorq_u8(level, negative), negative);
                }
                vst1q_u8(at(block, k, g) + from, level);
            }
        }
    }
}

static void decode(const TrellisSequence *s, const TrellisCode *code, int first, int count, TrellisBlock block) {
    BY_RATE(decode_planes, block)
}

/* Levels, without the 128 that their bytes have more. */
INLINE int8x16_t levels_at(const uint8_t *bytes) {
    return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(bytes), vdupq_n_u8(128)));
}

/* Multiplies levels; rows of activations go two at a time, so perhaps one beyond the last. */
static void multiply(TrellisBlock block, int count, const int8_t *x, size_t stride, int rows, int32_t *sums) {
    for (int row = 0; row < rows; row += 2)
        for (int k = 0; k < PER_LANE; k++) {
            int32_t *sum = sums + ((size_t)row * PER_LANE + k) * LANES;
            int32x4_t found[2][4]; /* [row of activations][quarter of the lanes] */
            for (int i = 0; i < 4; i++) {
                found[0][i] = vld1q_s32(sum + 4 * i);
                found[1][i] = vld1q_s32(sum + SUMS + 4 * i);
            }
            for (int g = 0; g < count; g++) {
                int8x16_t four[2];
#pragma GCC unroll 2
                for (int r = 0; r < 2; r++) {
                    int32_t bytes;
                    memcpy(&bytes, x + (size_t)(row + r) * stride + (size_t)g * GROUP, GROUP);
                    four[r] = vreinterpretq_s8_s32(vdupq_n_s32(bytes));
                }
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) {
                    const int8x16_t w = levels_at(at(block, k, g) + i * QUARTER);
#pragma GCC unroll 2
                    for (int r = 0; r < 2; r++) { /* two products of 127 * 127 at most are an int16 */
                        const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(four[r]));
                        const int16x8_t high = vmull_high_s8(w, four[r]);
                        found[r][i] = vpadalq_s16(found[r][i], vpaddq_s16(low, high));
                    }
                }
            }
            for (int i = 0; i < 4; i++) {
                vst1q_s32(sum + 4 * i, found[0][i]);
                vst1q_s32(sum + SUMS + 4 * i, found[1][i]);
            }
        }
}

const TrellisPath mc_trellis_neon = {.decode = decode, .multiply = multiply, .finish = mc_trellis_finish_levels,
                                     .rows_together = 2};

#endif
