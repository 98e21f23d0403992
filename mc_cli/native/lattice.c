/* The nearest points of a table to many vectors, under one quadratic metric; see numerics/gguf_lattice.py.
 *
 * A vector of L elements, 4 or 8, is s sigma_i p_i: a scale, signs, and a point of magnitudes. With M the metric, g
 * what is wanted and l = M g (`linear`), its error (v - g)' M (v - g) is, but for a constant of the row,
 *
 *     s^2 e(sigma, p) - 2 s sum_i sigma_i l_i p_i,    e(sigma, p) = sum_ij M_ij sigma_i sigma_j p_i p_j
 *
 * No row changes e: it is computed once per pattern of signs, when that first comes up, for all points. A pattern and
 * its opposite share it, and under a diagonal metric all do. So a row costs as much as under a diagonal metric.
 *
 * Tried are the signs of what is wanted and these with one turned, L + 1 patterns, or those of them with the parity
 * asked for. Under each all points are compared, so the best of them is found; of equals the first pattern, then the
 * first point. Other patterns might hold a better vector, but not under a diagonal metric with free parity and scales
 * of 0 or more: there every term is least with the sign of l_i, which is that of g_i, and only that pattern is tried.
 *
 * Layout: points [L][count] and energies [2^(L - 1) patterns][count], so that 16 neighbours are one vector. A lane is
 * a point and adds up its own L terms, in order: no sum crosses lanes, and vectors of any size give the same order.
 * The least cost is found lane by lane, and then its first place among the costs of all points.
 *
 * Rounding: the energy's terms are rounded 2 L times at most, its product with s^2 twice more, and L additions follow,
 * so a cost is off by up to (3 L + 2) 2^-24 (s^2 sum_ij |M_ij| p_i p_j + 2 |s| sum_i |l_i| p_i) to first order; the
 * point found is within twice that of the best. Copies for processors with fused operations may differ in the last
 * bits. One thread does all.
 *
 * Points may have signs of their own. Then there is one pattern, without a minus, and a row may be held to one half of
 * the table. */
#include "compiler.h"
#include "mc.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
#define MOST_POINTS 4096
enum { EVEN, ODD, ANY, UNSIGNED, FIRST_HALF, SECOND_HALF };

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

/* The point of least error of `count`, if that is less than `least`, where it is then put; else -1.
 * points [length][stride]. */
INLINE int best_of(const float *points, const float *energy, const float *linear, int count, int stride, int length,
                   float scale, int signs, float *costs, float *least) {
    float factors[8], lanes[LANES];
    for (int i = 0; i < length; i++) factors[i] = (signs >> i & 1 ? 2.0f : -2.0f) * linear[i] * scale;
    const float square = scale * scale;
    for (int k = 0; k < LANES; k++) lanes[k] = INFINITY;
    for (int p = 0; p < count; p += LANES) {
        float sums[LANES];
        for (int k = 0; k < LANES; k++) sums[k] = square * energy[p + k];
        for (int i = 0; i < length; i++)
            for (int k = 0; k < LANES; k++) sums[k] += factors[i] * points[(size_t)i * stride + p + k];
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

VERSIONS static int best_8(const float *points, const float *energy, const float *linear, int count, int stride,
                           float scale, int signs, float *costs, float *least) {
    return best_of(points, energy, linear, count, stride, 8, scale, signs, costs, least);
}

VERSIONS static int best_4(const float *points, const float *energy, const float *linear, int count, int stride,
                           float scale, int signs, float *costs, float *least) {
    return best_of(points, energy, linear, count, stride, 4, scale, signs, costs, least);
}

int mc_lattice_search(const float *points, const float *metric, const float *wanted, const float *linear,
                      const float *scales, const uint8_t *rules, int count, int length, int rows, int16_t *codes,
                      uint8_t *signs) {
    const int patterns = 1 << (length - 1); /* a pattern and its opposite have the same energies */
    if (count > MOST_POINTS || count % (2 * LANES) || (length != 4 && length != 8)) return 1;
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
        const int rule = rules == NULL ? ANY : rules[row];
        const int turns = rule >= UNSIGNED || (rule == ANY && diagonal) ? 0 : length; /* the first pattern is the best */
        const int held = rule == FIRST_HALF || rule == SECOND_HALF ? count / 2 : count;
        const int begin = rule == SECOND_HALF ? held : 0;
        if (rule >= UNSIGNED) nearest = 0;
        float least = INFINITY;
        codes[row] = (int16_t)begin;
        signs[row] = 0;
        for (int turn = 0; turn <= turns; turn++) {
            const int tried = turn == 0 ? nearest : nearest ^ 1 << (turn - 1);
            if (rule < ANY && (__builtin_popcount(tried) & 1) != rule) continue;
            const int pattern = diagonal ? 0 : tried < patterns ? tried : tried ^ (2 * patterns - 1);
            float *of_pattern = energy + (size_t)pattern * count;
            if (!known[pattern]) {
                (length == 8 ? energies_8 : energies_4)(points, metric, count, pattern, of_pattern);
                known[pattern] = 1;
            }
            const int found =
                (length == 8 ? best_8 : best_4)(points + begin, of_pattern + begin, linear + (size_t)row * length, held,
                                                count, scales[row], tried, costs, &least);
            if (found >= 0) {
                codes[row] = (int16_t)(begin + found);
                signs[row] = (uint8_t)tried;
            }
        }
    }
    free(energy);
    return 0;
}
