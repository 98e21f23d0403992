/* Products with trellis codes in plain C.
 *
 * An output o is scale_o * unit * sum_i v_oi r_i, with whole levels v in -127 .. 127 and the token's rotated inputs r.
 * These have one step t: r_i = t (a_i + b_i / 254), a and b bytes in -127 .. 127 (mc_split). So an output needs two
 * sums of products of bytes, sum_i v_oi a_i and sum_i v_oi b_i. Weights come out of their codes as unsigned bytes w =
 * 128 + v, which is what the byte products of processors take, and
 *
 *     sum_i v_oi a_i = sum_i w_oi a_i - 128 sum_i a_i
 *
 * where the last sum is the token's own, computed once. A row has at most 65536 inputs: 65536 * 255 * 127 is less than
 * 2^31, so an int32 holds every sum, they are exact, and the order of adding, blocks, threads and processors do not
 * matter. Floats come in at the end alone, once per output (finish).
 *
 * A weight is what a window of 12 bits in its sequence says: two tables of 64 bytes by the window's low and high six
 * bits give two bytes, their xor is a hash, its low six bits choose a level and its highest negates it. Windows of
 * neighbours overlap: one begins `rate` bits after the other, at bit floor(k * planes / 2) for the k-th of 16 weights
 * in a lane.
 *
 * Layout of codes: [groups of 4 inputs][planes][lanes][4 inputs]. A sequence of outputs is cut into lanes of 16
 * weights; plane p has byte p of the 2 * rate bytes that a lane's 16 weights take. So the bytes of a window lie in the
 * same column of planes, and behind the last plane come the first two of the next lane. Layout of a block:
 * [16][groups][lanes][4], where lane l of row k has output 16 l + k for 4 inputs: 64 bytes that meet the same 4
 * activations. */
#include "trellis_product.h"

/* Decodes a lane's 16 weights from its `planes` bytes and the first two of the next lane. */
static void decode(const TrellisSequence *s, const TrellisCode *code, int first, int count, TrellisBlock block) {
    const int stride = s->lanes * GROUP;
    for (int g = 0; g < count; g++) {
        const uint8_t *bytes = s->codes + (size_t)(first + g) * s->planes * stride;
        for (int lane = 0; lane < s->lanes; lane++) {
            const int next = lane + 1 < s->lanes ? lane + 1 : 0;
            for (int input = 0; input < GROUP; input++) {
                uint8_t own[MOST_PLANES + 4] = {0};
                for (int plane = 0; plane < s->planes; plane++) own[plane] = bytes[plane * stride + lane * GROUP + input];
                for (int plane = 0; plane < 2; plane++)
                    own[s->planes + plane] = bytes[plane * stride + next * GROUP + input];
                for (int k = 0; k < PER_LANE; k++) {
                    const int bit = k * s->planes / 2;
                    const uint8_t *from = own + (bit >> 3);
                    const uint32_t window = (from[0] | from[1] << 8 | from[2] << 16) >> (bit & 7);
                    const uint8_t hash = code->first[window & 63] ^ code->second[window >> 6 & 63];
                    const uint8_t level = code->levels[hash & 63];
                    at(block, k, g)[lane * GROUP + input] = hash & 128 ? (uint8_t)-level : level;
                }
            }
        }
    }
}

VERSIONS static void multiply_block(TrellisBlock block, int count, const int8_t *x, size_t stride, int rows,
                                    int32_t *sums) {
    for (int row = 0; row < rows; row++)
        for (int k = 0; k < PER_LANE; k++) {
            int32_t *sum = sums + (row * PER_LANE + k) * LANES;
            for (int g = 0; g < count; g++) {
                const uint8_t *w = at(block, k, g);
                const int8_t *four = x + (size_t)row * stride + (size_t)g * GROUP;
                for (int lane = 0; lane < LANES; lane++)
                    sum[lane] += w[4 * lane] * four[0] + w[4 * lane + 1] * four[1] + w[4 * lane + 2] * four[2] +
                                 w[4 * lane + 3] * four[3];
            }
        }
}

static void multiply(TrellisBlock block, int count, const int8_t *x, size_t stride, int rows, int32_t *sums) {
    multiply_block(block, count, x, stride, rows, sums);
}

/* Outputs of one place, from the sums of its one or two rows; totals: of the activations that were multiplied by 128
 * more. */
VERSIONS static void finish(const int32_t *sums, int activation_bytes, const int32_t *totals, float step,
                            const uint16_t *scales, int count, float *out) {
    float values[SUMS];
    if (activation_bytes == 1)
        for (int i = 0; i < SUMS; i++) values[i] = step * (float)(sums[i] - 128 * totals[0]);
    else
        for (int i = 0; i < SUMS; i++)
            values[i] = step * ((float)(sums[i] - 128 * totals[0]) + (float)(sums[SUMS + i] - 128 * totals[1]) / FINE);
    for (int i = 0; i < count; i++) out[i] = from_half(scales[i]) * values[i % PER_LANE * LANES + i / PER_LANE];
}

void mc_trellis_finish(const int32_t *sums, int activation_bytes, const int32_t *totals, float step,
                       const uint16_t *scales, int count, float *out) {
    finish(sums, activation_bytes, totals, step, scales, count, out);
}

void mc_trellis_finish_levels(const int32_t *sums, int activation_bytes, const int32_t *totals, float step,
                              const uint16_t *scales, int count, float *out) {
    const int32_t none[2] = {0, 0};
    (void)totals; /* nothing was multiplied by 128 more */
    finish(sums, activation_bytes, none, step, scales, count, out);
}

const TrellisPath mc_trellis_portable = {.decode = decode, .multiply = multiply, .finish = mc_trellis_finish,
                                         .rows_together = 2};
