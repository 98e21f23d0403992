/* The rotation of activations by a Hadamard transform, before products with trellis codes; see numerics/rotation.py.
 *
 * A block of n = 2^m entries is multiplied by the m-fold Kronecker power of [[1, 1], [1, -1]], over sqrt(n): m rounds,
 * of which the one of distance h puts a + b and a - b where a and b = h entries further were. Rounds go from n / 2 to
 * 1, so that the last four stay within 16 neighbours: one vector, whose halves are exchanged by shuffles instead of
 * loads. Additions are the same ones in the same order in both ways, so all copies of this function give the same bits. */
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
