/* The rotation of activations by a Hadamard transform, before products with trellis codes; see numerics/rotation.py.
 *
 * Every block of n = 2^m entries becomes H (sigma * x) / sqrt(n), with signs sigma and H the m-fold Kronecker power of
 * [[1, 1], [1, -1]]. That power is a product of m sparse factors, one for each bit of an index: the round of distance
 * h puts a + b and a - b where a and b, h entries further, were. So m n additions stand for n^2. The factors commute,
 * so rounds may go in any order but for rounding.
 *
 * Layout: [count] in and out, blocks side by side; 1 / sqrt(n) and the sign are multiplied first, then all rounds are
 * made in place. Distances go from n / 2 down to 16, where both entries are whole vectors of 16. The last four, h = 1,
 * 2, 4, 8, stay within 16 neighbours, one vector: a shuffle brings every entry the one h away, and to that it is
 * added, negated where it is the second. Blocks under 16 and compilers without shuffles by variables (Clang) go down
 * to 1 with loads: 8, 4, 2, 1.
 *
 * Rounding: additions are between the same numbers in every copy that one compiler makes for several processors, a - b
 * being a + (-b), and no product meets an addition within an expression: these copies give the same bits. GCC and
 * Clang add in another order within 16, so bits of theirs may differ. An output is a tree of depth m over n entries.
 * Each is rounded once per round and once before, and 1 / sqrt(n) is off by up to (2 m - 1) 2^-24 of itself, so to
 * first order an output is off by up to 3 m 2^-24 sum_i |x_i| / sqrt(n), which is at most 3 m 2^-24 of the block's
 * Euclidean norm: 1.3e-6 for blocks of 128. The bytes that follow are coarser (mc_split). */
#include "product.h"

#if defined(__clang__) /* shuffles only by constants */
#define SHORTEST_HALF 1
#else
#define SHORTEST_HALF 16 /* shorter ones are done within vectors */
typedef float vec __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));

/* The last four rounds of a Hadamard transform, within 16 values. */
INLINE void transform16(float *x) {
    const ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    vec v;
    memcpy(&v, x, sizeof v);
#pragma GCC unroll 4
    for (int half = 1; half < 16; half <<= 1) {
        const ints turned = (ints)v ^ (((lane & half) != 0) & (int32_t)0x80000000); /* the second halves, negated */
        v = __builtin_shuffle(v, lane ^ half) + (vec)turned;
    }
    memcpy(x, &v, sizeof v);
}
#endif

/* The normalised Hadamard transform of every `block` entries of signs * x, as numerics/rotation.py defines it. */
VERSIONS static void transform(const float *x, const float *signs, int count, int block, float *out) {
    float norm = 1.0f;
    for (int size = block; size > 1; size >>= 1) norm *= 0.70710678118654752f;
    for (int i = 0; i < count; i++) out[i] = norm * signs[i] * x[i];
    for (float *first = out; first < out + count; first += block) {
        int half = block / 2;
        for (; half >= (block < 16 ? 1 : SHORTEST_HALF); half >>= 1)
            for (int i = 0; i < block; i += 2 * half)
                for (int j = i; j < i + half; j++) {
                    const float a = first[j], b = first[j + half];
                    first[j] = a + b;
                    first[j + half] = a - b;
                }
#if SHORTEST_HALF > 1
        if (block >= 16)
            for (int i = 0; i < block; i += 16) transform16(first + i);
#endif
    }
}

void mc_rotate(const float *x, const float *signs, int count, int block, float *out) {
    transform(x, signs, count, block, out);
}
