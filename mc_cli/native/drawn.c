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
 * outputs; the errors of a panel and 1024 outputs lie in the second cache. A thread takes one matrix, or where there
 * are fewer and large ones, some of its outputs: all meet twice for every input, as |x_j| is of all outputs.
 *
 * Rounding: what is owed is subtracted input by input, four at a time, each sum of four first; |x|^2 is 16 sums side by
 * side and then theirs, for every 1024 outputs, and then those: threads change nothing. Copies for processors with fused
 * operations may differ in the last bits. */
#include "product.h"
#include "threads.h"

#include <math.h>
#include <stdlib.h>

#define LANES 16
#define AT_ONCE 1024            /* outputs that one thread takes at a time, a tile */
#define LEAST_SHARED 4          /* tiles from which on threads share a matrix, where there are more than matrices */
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
VERSIONS static void take_owed(float *wanted, const float *errors, const float *factor, size_t inputs, int earlier,
                               size_t outputs, int count) {
    int i = 0;
    for (; i + 4 <= earlier; i += 4) {
        const float *e = errors + i * outputs, *f = e + outputs, *g = f + outputs, *h = g + outputs;
        const float *u = factor + i * inputs, a = u[0], b = u[inputs], c = u[2 * inputs], d = u[3 * inputs];
        for (int o = 0; o < count; o++) wanted[o] -= (a * e[o] + b * f[o]) + (c * g[o] + d * h[o]);
    }
    for (; i < earlier; i++) {
        const float *e = errors + i * outputs, a = factor[i * inputs];
        for (int o = 0; o < count; o++) wanted[o] -= a * e[o];
    }
}

/* x = wanted / scales; returns the sum of its squares. */
VERSIONS static float in_units(const float *wanted, const float *scales, int count, float *x) {
    float sums[LANES] = {0}, total = 0;
    int o = 0;
    for (; o + LANES <= count; o += LANES)
        for (int lane = 0; lane < LANES; lane++) {
            const float value = wanted[o + lane] / scales[o + lane];
            x[o + lane] = value;
            sums[lane] += value * value;
        }
    for (; o < count; o++) {
        x[o] = wanted[o] / scales[o];
        total += x[o] * x[o];
    }
    for (int lane = 0; lane < LANES; lane++) total += sums[lane];
    return total;
}

/* values: x before, v after. */
VERSIONS static void draw(const float *wanted, const float *scales, const float *kept, const float *size, uint32_t place,
                          float length, float inverse_diagonal, int count, float *values, float *errors) {
    for (int o = 0; o < count; o++) {
        values[o] = kept[o] * values[o] + size[o] * length * noise_at(place + (uint32_t)o);
        errors[o] = (wanted[o] - values[o] * scales[o]) * inverse_diagonal;
    }
}

typedef struct {
    const float *targets, *factor, *scales, *kept, *size;
    float *values, *errors, *wanted, *squares; /* the last two: room, [batch][outputs] and [batch][tiles] */
    uint32_t seed;
    int factors, first, count, inputs, outputs, tiles;
} Panel;

/* One input of one matrix. */
typedef struct {
    const Panel *panel;
    int matrix, column; /* column: of the panel */
    float length;
} Input;

/* Some outputs of that input: where they begin, in numbers of floats. */
typedef struct {
    size_t row;   /* in [batch][outputs] */
    size_t first; /* in [batch][inputs][outputs], of the panel's first input */
    size_t place; /* likewise, of this input */
    int count;
} Tile;

static Tile tile_of(const Input *at, int tile) {
    const Panel *p = at->panel;
    const size_t outputs = p->outputs, begin = (size_t)tile * AT_ONCE;
    const size_t first = ((size_t)at->matrix * p->inputs + p->first) * outputs + begin;
    const int left = p->outputs - (int)begin;
    return (Tile){at->matrix * outputs + begin, first, first + at->column * outputs, left < AT_ONCE ? left : AT_ONCE};
}

/* The column of the factor of what is owed to an input, from the panel's first input on. */
static const float *owed_to(const Input *at) {
    const Panel *p = at->panel;
    const size_t inputs = p->inputs, matrix = p->factors == 1 ? 0 : at->matrix;
    return p->factor + (matrix * inputs + p->first) * inputs + p->first + at->column;
}

static void want_tile(void *context, int tile) {
    const Input *at = context;
    const Panel *p = at->panel;
    const Tile t = tile_of(at, tile);
    const size_t target = ((size_t)at->matrix * p->count + at->column) * p->outputs + (size_t)tile * AT_ONCE;
    memcpy(p->wanted + t.row, p->targets + target, t.count * sizeof *p->wanted);
    take_owed(p->wanted + t.row, p->errors + t.first, owed_to(at), p->inputs, at->column, p->outputs, t.count);
    p->squares[at->matrix * p->tiles + tile] = in_units(p->wanted + t.row, p->scales + t.row, t.count, p->values + t.place);
}

static void draw_tile(void *context, int tile) {
    const Input *at = context;
    const Panel *p = at->panel;
    const Tile t = tile_of(at, tile);
    const float diagonal = owed_to(at)[(size_t)at->column * p->inputs];
    const size_t noise = (size_t)(p->first + at->column) * p->outputs + (size_t)tile * AT_ONCE;
    draw(p->wanted + t.row, p->scales + t.row, p->kept + t.row, p->size + t.row, p->seed + (uint32_t)noise, at->length,
         1 / diagonal, t.count, p->values + t.place, p->errors + t.place);
}

static void draw_matrix(const Panel *p, int matrix, int threads) {
    for (int column = 0; column < p->count; column++) {
        Input at = {p, matrix, column, 0};
        mc_parallel(want_tile, &at, p->tiles, threads);
        for (int tile = 0; tile < p->tiles; tile++) at.length += p->squares[matrix * p->tiles + tile];
        at.length = sqrtf(at.length);
        mc_parallel(draw_tile, &at, p->tiles, threads);
    }
}

static void draw_alone(void *context, int matrix) { draw_matrix(context, matrix, 1); }

int mc_draw_errors(const float *targets, const float *factor, const float *scales, const float *kept, const float *size,
                   int seed, int factors, int batch, int first, int count, int inputs, int outputs, int threads,
                   float *values, float *errors) {
    const int tiles = (outputs + AT_ONCE - 1) / AT_ONCE;
    float *room = malloc((size_t)batch * (outputs + tiles) * sizeof *room);
    if (room == NULL) return 1;
    Panel p = {.targets = targets, .factor = factor, .scales = scales, .kept = kept, .size = size, .values = values,
               .errors = errors, .wanted = room, .squares = room + (size_t)batch * outputs,
               .seed = mixed((uint32_t)seed), .factors = factors, .first = first, .count = count, .inputs = inputs,
               .outputs = outputs, .tiles = tiles};
    if (batch >= threads || tiles < LEAST_SHARED) mc_parallel(draw_alone, &p, batch, threads);
    else
        for (int matrix = 0; matrix < batch; matrix++) draw_matrix(&p, matrix, threads);
    free(room);
    return 0;
}
