/* Errors as large as a search's, drawn at random and fed back as real ones are; see numerics/drawn_errors.py.
 *
 * Input j of a matrix wants w_j = t_j - sum_{i < j} U_ij e_i, a vector over the outputs, of which t_j holds already
 * what is owed to inputs before the panel. With s the scales, x_j = w_j / s, k and d given for every output and z_j
 * noise of variance one,
 *
 *     v_j = k x_j + d |x_j|_2 z_j,      e_j = (w_j - s v_j) / U_jj
 *
 * Noise is a function of (input, output) and the seed alone, so that it depends neither on threads nor on what else is
 * in a batch: a hash of 32 bits, whose four bytes are summed. That sum is nearly normal: its kurtosis is 2.7.
 *
 * Layout: panels [count][outputs] per matrix, values and errors [inputs][outputs], so that a vector is of neighbouring
 * outputs; all errors of a panel lie in the second cache. A thread takes one matrix.
 *
 * Rounding: what is owed is subtracted input by input, four at a time, each sum of four first; |x|^2 is 16 sums side by
 * side and then theirs. Copies for processors with fused operations may differ in the last bits. */
#include "product.h"
#include "threads.h"

#include <math.h>
#include <stdlib.h>

#define LANES 16
#define MEAN 510                /* of the sum of four bytes */
#define DEVIATION 147.80054127f /* (4 (2^16 - 1) / 12)^(1/2) */

/* Chris Wellons' lowbias32 */
INLINE uint32_t mixed(uint32_t x) {
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
}

INLINE float noise_at(uint32_t place) {
    const uint32_t bits = mixed(place);
    const int32_t sum = (bits & 255) + (bits >> 8 & 255) + (bits >> 16 & 255) + (bits >> 24);
    return (float)(sum - MEAN) * (1 / DEVIATION);
}

/* Takes off `wanted` what errors of earlier inputs of the panel owe to it; factor: the entry of the first of them. */
VERSIONS static void take_owed(float *wanted, const float *errors, const float *factor, int inputs, int earlier,
                               int outputs) {
    int i = 0;
    for (; i + 4 <= earlier; i += 4) {
        const float *e = errors + (size_t)i * outputs, *u = factor + (size_t)i * inputs;
        const float a = u[0], b = u[inputs], c = u[2 * (size_t)inputs], d = u[3 * (size_t)inputs];
        for (int o = 0; o < outputs; o++)
            wanted[o] -= (a * e[o] + b * e[o + outputs]) + (c * e[o + 2 * (size_t)outputs] + d * e[o + 3 * (size_t)outputs]);
    }
    for (; i < earlier; i++) {
        const float *e = errors + (size_t)i * outputs, a = factor[(size_t)i * inputs];
        for (int o = 0; o < outputs; o++) wanted[o] -= a * e[o];
    }
}

/* Values of one input, and its errors. */
VERSIONS static void draw(const float *wanted, const float *scales, const float *kept, const float *size, uint32_t place,
                          float inverse_diagonal, int outputs, float *values, float *errors) {
    float sums[LANES] = {0}, length = 0;
    int o = 0;
    for (; o + LANES <= outputs; o += LANES)
        for (int lane = 0; lane < LANES; lane++) {
            const float x = wanted[o + lane] / scales[o + lane];
            values[o + lane] = x;
            sums[lane] += x * x;
        }
    for (; o < outputs; o++) {
        values[o] = wanted[o] / scales[o];
        length += values[o] * values[o];
    }
    for (int lane = 0; lane < LANES; lane++) length += sums[lane];
    length = sqrtf(length);
    for (o = 0; o < outputs; o++) {
        values[o] = kept[o] * values[o] + size[o] * length * noise_at(place + (uint32_t)o);
        errors[o] = (wanted[o] - values[o] * scales[o]) * inverse_diagonal;
    }
}

typedef struct {
    const float *targets, *factor, *scales, *kept, *size;
    float *values, *errors, *room;
    uint32_t seed;
    int factors, first, count, inputs, outputs;
} Drawn;

static void draw_matrix(void *context, int matrix) {
    const Drawn *d = context;
    const size_t inputs = d->inputs, outputs = d->outputs, start = (matrix * inputs + d->first) * outputs;
    const float *factor = d->factor + (d->factors == 1 ? 0 : matrix) * inputs * inputs;
    float *wanted = d->room + matrix * outputs, *errors = d->errors + start, *values = d->values + start;
    for (int j = 0; j < d->count; j++) {
        const size_t input = d->first + j;
        memcpy(wanted, d->targets + ((size_t)matrix * d->count + j) * outputs, outputs * sizeof *wanted);
        take_owed(wanted, errors, factor + d->first * inputs + input, d->inputs, j, d->outputs);
        draw(wanted, d->scales + matrix * outputs, d->kept + matrix * outputs, d->size + matrix * outputs,
             d->seed + (uint32_t)(input * outputs), 1 / factor[input * inputs + input], d->outputs,
             values + j * outputs, errors + j * outputs);
    }
}

int mc_draw_errors(const float *targets, const float *factor, const float *scales, const float *kept, const float *size,
                   int seed, int factors, int batch, int first, int count, int inputs, int outputs, int threads,
                   float *values, float *errors) {
    float *room = malloc((size_t)batch * outputs * sizeof *room);
    if (room == NULL) return 1;
    Drawn d = {targets, factor, scales, kept, size, values, errors, room, mixed((uint32_t)seed), factors,
               first, count, inputs, outputs};
    mc_parallel(draw_matrix, &d, batch, threads);
    free(room);
    return 0;
}
