/* The nearest points of a table to many vectors, under one quadratic metric; see numerics/gguf_lattice.py.
 *
 * A vector is scale * sign_i * point_i. Its error under the metric M is, but for a constant,
 *   scale^2 * e(signs, point) - 2 scale * sum_i sign_i linear_i point_i,   linear = M wanted,
 * with e = sum_ij M_ij sign_i sign_j point_i point_j, which no row changes: it is computed once per pattern of signs, for
 * all points. So a row costs as much as under a diagonal metric. Points are taken 16 at a time, to be one vector. */
#include "compiler.h"
#include "mc.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
#define MOST_POINTS 1024
#define ANY_PARITY 2

/* e of all points under one pattern of signs; points [length][count]. */
INLINE void energies_of(const float *points, const float *metric, int count, int length, int signs, float *out) {
    float factors[8][8];
    for (int i = 0; i < length; i++)
        for (int j = 0; j <= i; j++)
            factors[i][j] = ((signs >> i ^ signs >> j) & 1 ? -2.0f : 2.0f) * metric[i * length + j];
    for (int i = 0; i < length; i++) factors[i][i] *= 0.5f;
    for (int p = 0; p < count; p += LANES) {
        float sums[LANES] = {0.0f};
        for (int i = 0; i < length; i++) {
            const float *row = points + (size_t)i * count + p;
            float partial[LANES] = {0.0f};
            for (int j = 0; j <= i; j++)
                for (int k = 0; k < LANES; k++) partial[k] += factors[i][j] * points[(size_t)j * count + p + k];
            for (int k = 0; k < LANES; k++) sums[k] += partial[k] * row[k];
        }
        memcpy(out + p, sums, sizeof sums);
    }
}

VERSIONS static void energies_8(const float *points, const float *metric, int count, int signs, float *out) {
    energies_of(points, metric, count, 8, signs, out);
}

VERSIONS static void energies_4(const float *points, const float *metric, int count, int signs, float *out) {
    energies_of(points, metric, count, 4, signs, out);
}

/* The point of least error, if that is less than `least`, where it is then put; else -1. */
INLINE int best_of(const float *points, const float *energy, const float *linear, int count, int length, float scale,
                   int signs, float *costs, float *least) {
    float factors[8], lanes[LANES];
    for (int i = 0; i < length; i++) factors[i] = (signs >> i & 1 ? 2.0f : -2.0f) * linear[i] * scale;
    const float square = scale * scale;
    for (int k = 0; k < LANES; k++) lanes[k] = INFINITY;
    for (int p = 0; p < count; p += LANES) {
        float sums[LANES];
        for (int k = 0; k < LANES; k++) sums[k] = square * energy[p + k];
        for (int i = 0; i < length; i++)
            for (int k = 0; k < LANES; k++) sums[k] += factors[i] * points[(size_t)i * count + p + k];
        for (int k = 0; k < LANES; k++) lanes[k] = sums[k] < lanes[k] ? sums[k] : lanes[k];
        memcpy(costs + p, sums, sizeof sums);
    }
    float smallest = lanes[0];
    for (int k = 1; k < LANES; k++) smallest = lanes[k] < smallest ? lanes[k] : smallest;
    if (!(smallest < *least)) return -1;
    *least = smallest;
    for (int p = 0; p < count; p++)
        if (costs[p] == smallest) return p;
    return -1;
}

VERSIONS static int best_8(const float *points, const float *energy, const float *linear, int count, float scale,
                           int signs, float *costs, float *least) {
    return best_of(points, energy, linear, count, 8, scale, signs, costs, least);
}

VERSIONS static int best_4(const float *points, const float *energy, const float *linear, int count, float scale,
                           int signs, float *costs, float *least) {
    return best_of(points, energy, linear, count, 4, scale, signs, costs, least);
}

int mc_lattice_search(const float *points, const float *metric, const float *wanted, const float *linear,
                      const float *scales, const uint8_t *parities, int count, int length, int rows, int16_t *codes,
                      uint8_t *signs) {
    const int patterns = 1 << (length - 1); /* a pattern and its opposite have the same energies */
    if (count > MOST_POINTS || count % LANES || (length != 4 && length != 8)) return 1;
    float *energy = malloc(((size_t)patterns + 1) * count * sizeof *energy);
    if (energy == NULL) return 1;
    uint8_t known[128] = {0};
    float *costs = energy + (size_t)patterns * count;
    int diagonal = 1;
    for (int i = 0; i < length; i++)
        for (int j = 0; j < i; j++) diagonal &= metric[i * length + j] == 0.0f;
    for (int row = 0; row < rows; row++) {
        int nearest = 0;
        for (int i = 0; i < length; i++) nearest |= (wanted[(size_t)row * length + i] < 0.0f) << i;
        const int parity = parities == NULL ? ANY_PARITY : parities[row];
        float least = INFINITY;
        codes[row] = 0;
        signs[row] = 0;
        for (int turn = 0; turn <= length; turn++) {
            const int tried = turn == 0 ? nearest : nearest ^ 1 << (turn - 1);
            if (parity < ANY_PARITY && (__builtin_popcount(tried) & 1) != parity) continue;
            if (parity == ANY_PARITY && diagonal && turn) break; /* the signs of what is wanted are the best ones */
            const int pattern = diagonal ? 0 : tried < patterns ? tried : tried ^ (2 * patterns - 1);
            float *of_pattern = energy + (size_t)pattern * count;
            if (!known[pattern]) {
                (length == 8 ? energies_8 : energies_4)(points, metric, count, pattern, of_pattern);
                known[pattern] = 1;
            }
            const int found = (length == 8 ? best_8 : best_4)(points, of_pattern, linear + (size_t)row * length, count,
                                                             scales[row], tried, costs, &least);
            if (found >= 0) {
                codes[row] = (int16_t)found;
                signs[row] = (uint8_t)tried;
            }
        }
    }
    free(energy);
    return 0;
}
