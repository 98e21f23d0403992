/* What Python calls. signatures.py lists the same routines, and a test compares the two: one prototype each, in plain C,
 * with a name for every parameter. Nothing else leaves the library. */
#ifndef MC_H
#define MC_H

#include <stdint.h>

#if defined(__GNUC__) || defined(__clang__)
#define MC_EXPORT __attribute__((visibility("default")))
#else
#define MC_EXPORT
#endif

/* Matrices of one shape, as kernels/bank.py describes them: `entries` are an Entry of trellis_product.c or affine_product.c
 * each, by `kind`. */
enum { TRELLIS = 0, AFFINE = 1 };
typedef struct {
    const void *entries;
    const uint8_t *tables; /* of trellis codes, as code_of takes them */
    const float *signs;    /* of the rotation of their inputs */
    float unit;            /* of their levels */
    int32_t kind, matrices, inputs, outputs;
    int32_t block;  /* inputs that are rotated together, or share a grid */
    int32_t length; /* outputs of a sequence of trellis codes */
} mc_bank;

/* Of the sources that the library was compiled from: see sources.py. */
MC_EXPORT uint64_t mc_native_version(void);

/* start   GOMP_parallel of torch's OpenMP library; NULL: a pool of our own. Returns 0. */
MC_EXPORT int mc_use_team(void *start);

/* The fastest path of this machine. */
MC_EXPORT int mc_best_path(void);

/* out [slots][outputs]: slot s holds the product of token s / share with the matrix experts[s] of the bank; zeros where
 * experts[s] is none of its matrices or that matrix is not there. experts NULL: all the first.
 * x [tokens][inputs], multiplied as numbers of `parts` bytes, 1 or 2; tokens * share slots. x and out are bfloat16 where
 * `halves`, float32 otherwise. threads: at most; for little work one. Returns 0, or 1 without memory. */
MC_EXPORT int mc_product(const mc_bank *bank, const void *x, const int64_t *experts, int halves, int tokens, int share,
                         int parts, int path, int threads, void *out);

/* out [tokens][outputs of `down`]: for every token the sum over its `share` slots of weights[slot] * down(act(gate) * up),
 * where gate and up are the two halves of what matrix experts[slot] of `up` gives; a slot whose expert is none of the
 * matrices adds nothing. x [tokens][inputs of `up`], experts and weights [tokens * share]; share is 1 at least.
 * halves: x, weights and out are bfloat16, otherwise float32. Returns 0, or 1 without memory. */
MC_EXPORT int mc_experts(const mc_bank *up, const mc_bank *down, const void *x, const int64_t *experts,
                         const void *weights, int halves, int tokens, int share, int activation, int parts, int path,
                         int threads, void *out);

/* One matrix of affine grids [rows][inputs], float32 in `floats`, or where that is NULL bfloat16 in `halves`. path < 0: the
 * fastest. Returns 0, or 1 without memory. */
MC_EXPORT int mc_affine_matrix(const uint8_t *codes, const uint16_t *scales, const uint8_t *zero_points, int bits,
                               int rows, int inputs, int group, int path, int threads, float *floats, uint16_t *halves);

/* out [outputs][inputs] float32: one matrix of trellis codes, in the basis of its rotated inputs. path < 0: the best that
 * there is. Returns 0, or 1 without memory. */
MC_EXPORT int mc_trellis_matrix(const uint8_t *codes, const uint16_t *scales, const uint8_t *tables, float unit,
                                int inputs, int outputs, int length, int planes, int path, int threads, float *out);

/* Codes `count` inputs of a batch of matrices, each with its share of the errors of those before it; see Search in
 * trellis.c for the arguments. path < 0: the best that there is. Returns 0, or 1 without memory. */
MC_EXPORT int mc_trellis_encode(const float *targets, const float *factor, const float *scales, const int64_t *members,
                                const float *weights, const float *feedback, const float *values, int factors,
                                int batch, int first, int count, int inputs, int outputs, int groups, int rings,
                                int length, int numerator, int denominator, int path, int threads, uint8_t *codes,
                                float *decoded, float *errors);

/* Scores of odp: the largest share from a slot to the last; infinite for spared tokens.
 *
 * hidden      [tokens][width], NULL where no token is spared
 * received    [tokens] attention received, NULL: `uniform` for all
 * index, weights, and what is kept of them: [tokens][k]. Returns 0. */
MC_EXPORT int mc_keep_by_share(const float *hidden, const float *received, float uniform, float protect_at, int width,
                               const int64_t *index, const float *weights, float threshold, int tokens, int k,
                               int absent, int renormalise, int64_t *kept_index, float *kept_weights);

/* Scores of otp: the log-odds of keeping more experts than a slot's rank; infinite for the best one.
 *
 * hidden  [tokens][width];  router [k - 1][width + k - 1], bias [k - 1];  smaller shares count as least_share
 * index, weights, and what is kept of them: [tokens][k]. Returns 0. */
MC_EXPORT int mc_keep_by_router(const float *hidden, const float *router, const float *bias, float least_share,
                                int width, const int64_t *index, const float *weights, float threshold, int tokens,
                                int k, int absent, int renormalise, int64_t *kept_index, float *kept_weights);

#endif
