/* The routines that Python calls, and the structures that it fills in. signatures.py and structures.py say the same, and
 * tests compare them: one prototype each, in plain C, with a name for every parameter; one field a line. Nothing else
 * leaves the library. */
#ifndef MC_H
#define MC_H

#include <stdint.h>

#if defined(__GNUC__) || defined(__clang__)
#define MC_EXPORT __attribute__((visibility("default")))
#else
#define MC_EXPORT
#endif

/* The addresses and the shape of a trellis-coded matrix. The layouts of all stored parts are described in encodings. */
typedef struct {
    const uint8_t *codes;
    const uint16_t *scales; /* float16 */
    int64_t inputs;
    int64_t outputs;
    int64_t block;  /* inputs that are rotated together */
    int64_t length; /* outputs of a sequence */
    int64_t planes; /* bits per 16 weights / 8; 0: this matrix is not here */
} mc_trellis_entry;

/* The addresses and the shape of a matrix of affine grids. */
typedef struct {
    const uint8_t *codes;
    const uint16_t *scales; /* float16 */
    const uint8_t *zero_points;
    int64_t inputs;
    int64_t outputs;
    int64_t bits; /* per code; 0: this matrix is not here */
} mc_affine_entry;

/* Matrices of one kind, each of its own shape, as kernels/bank.py describes them. The table of the other kind is NULL. */
enum { TRELLIS = 0, AFFINE = 1 };
typedef struct {
    const mc_trellis_entry *trellis; /* [matrices] */
    const mc_affine_entry *affine;   /* [matrices] */
    const uint8_t *tables;           /* for trellis codes, as lookup_tables in numerics/trellis_code.py makes them */
    const float *signs;              /* for rotations; fewer inputs take the first ones */
    float unit;                      /* step of trellis levels */
    int32_t kind;
    int32_t matrices;
    int32_t inputs;  /* the most of any matrix: the distance of two rows of inputs */
    int32_t outputs; /* the most of any matrix */
    int32_t group;   /* inputs that share an affine grid, in all matrices */
} mc_bank;

/* The number of the sources that the library was compiled from: see sources.py. */
MC_EXPORT uint64_t mc_native_version(void);

/* Writes the offsets of all fields of mc_trellis_entry and its size, then those of mc_affine_entry and of mc_bank.
 * Returns how many numbers there are; numbers NULL: writes none. */
MC_EXPORT int mc_layout(int32_t *numbers);

/* start   GOMP_parallel of torch's OpenMP library; NULL: a pool of our own. Returns 0. */
MC_EXPORT int mc_use_team(void *start);

/* The fastest path of this machine. */
MC_EXPORT int mc_best_path(void);

/* out [slots][outputs]: slot s holds the product of token s / top_k with the matrix experts[s] of the bank, which reads
 * as many inputs as it has. Zeros lie behind its outputs, and where experts[s] is none of the matrices or that matrix is
 * not there. With experts NULL all slots take the first matrix.
 * x [tokens][inputs], multiplied as numbers of `activation_bytes` bytes, 1 or 2; tokens * top_k slots. x and out are
 * bfloat16 where `bfloat16` is set, float32 otherwise. threads: at most; for little work one. Returns 0, or 1 without
 * memory. */
MC_EXPORT int mc_product(const mc_bank *bank, const void *x, const int64_t *experts, int bfloat16, int tokens,
                         int top_k, int activation_bytes, int path, int threads, void *out);

/* out [tokens][outputs of `down`]: for every token the sum over its `top_k` slots of weights[slot] * down(act(gate) * up),
 * where gate and up are the two halves of what matrix experts[slot] of `up` gives, each as many numbers as that matrix of
 * `down` takes; a slot whose expert is not there in both adds nothing. x [tokens][inputs of `up`], experts and weights
 * [tokens * top_k]; top_k is 1 at least. x, weights and out are bfloat16 where `bfloat16` is set, float32 otherwise.
 * Returns 0, or 1 without memory. */
MC_EXPORT int mc_experts(const mc_bank *up, const mc_bank *down, const void *x, const int64_t *experts,
                         const void *weights, int bfloat16, int tokens, int top_k, int activation,
                         int activation_bytes, int path, int threads, void *out);

/* One matrix of affine grids [rows][inputs], float32 in `floats`, or where that is NULL bfloat16 in `bfloat16s`.
 * path < 0: the fastest. Returns 0, or 1 without memory. */
MC_EXPORT int mc_affine_matrix(const uint8_t *codes, const uint16_t *scales, const uint8_t *zero_points, int bits,
                               int rows, int inputs, int group, int path, int threads, float *floats,
                               uint16_t *bfloat16s);

/* out [outputs][inputs] float32: one matrix of trellis codes, in the basis of its rotated inputs. path < 0: the fastest.
 * Returns 0, or 1 without memory. */
MC_EXPORT int mc_trellis_matrix(const uint8_t *codes, const uint16_t *scales, const uint8_t *tables, float unit,
                                int inputs, int outputs, int length, int planes, int path, int threads, float *out);

/* Codes `count` inputs of a batch of matrices, each with its share of the errors of those before it; see Search in
 * trellis.c for the arguments. levels: not NULL for the quick search. path < 0: the fastest. Returns 0, 1 without memory,
 * or 2 where there are more levels than the quick search takes. */
MC_EXPORT int mc_trellis_encode(const float *targets, const float *factor, const float *scales, const int64_t *members,
                                const float *weights, const float *feedback, const float *values, int factors,
                                int batch, int first, int count, int inputs, int outputs, int groups, int rings,
                                int length, int numerator, int denominator, const float *levels,
                                const uint8_t *places, int level_count, int path, int threads, uint8_t *codes,
                                float *decoded, float *errors);

/* Draws errors of `count` inputs of a batch of matrices, from `first` on, each with its share of those before it.
 *
 * targets      [batch][count][outputs], less what inputs before `first` owe
 * factor       [factors][inputs][inputs], factors 1 or batch: of the damped inverse Hessian
 * scales       [batch][outputs], none 0;  kept, size: what is left of a value, and the noise beside it, over |x|
 * values, errors  [batch][inputs][outputs], filled for these inputs. Returns 0, or 1 without memory. */
MC_EXPORT int mc_draw_errors(const float *targets, const float *factor, const float *scales, const float *kept,
                             const float *size, int seed, int factors, int batch, int first, int count, int inputs,
                             int outputs, int threads, float *values, float *errors);

/* Scores of odp: the largest share from a slot to the last; infinite for spared tokens.
 *
 * hidden      [tokens][features], NULL where no token is spared
 * received    [tokens] attention received, NULL: `uniform` for all
 * index, weights, and what is kept of them: [tokens][k]. Returns 0. */
MC_EXPORT int mc_keep_by_share(const float *hidden, const float *received, float uniform, float protect_at, int features,
                               const int64_t *index, const float *weights, float threshold, int tokens, int k,
                               int absent, int renormalise, int64_t *kept_index, float *kept_weights);

/* Scores of dualsparse: a slot's share of the token's weight, plus the margin; where the share less the margin is below
 * the threshold, a slot that stays has the index `absent` + 1 + its expert: the first block alone.
 *
 * index, weights, and what is kept of them: [tokens][k]. Returns 0. */
MC_EXPORT int mc_keep_halves(float margin, const int64_t *index, const float *weights, float threshold, int tokens,
                             int k, int absent, int renormalise, int64_t *kept_index, float *kept_weights);

/* Scores of otp: the log-odds of keeping more experts than a slot's rank; infinite for the best one.
 *
 * hidden  [tokens][features];  router [k - 1][features + k - 1], bias [k - 1];  smaller shares count as least_share
 * index, weights, and what is kept of them: [tokens][k]. Returns 0. */
MC_EXPORT int mc_keep_by_router(const float *hidden, const float *router, const float *bias, float least_share,
                                int features, const int64_t *index, const float *weights, float threshold, int tokens,
                                int k, int absent, int renormalise, int64_t *kept_index, float *kept_weights);

/* Slots of a token that run one expert as one slot with the sum of their weights; the others get `absent` and 0.
 *
 * table    [absent + 1]: the expert that a router slot runs, `absent` for none
 * index, weights, and what they become: [tokens][k], weights bfloat16 where `bfloat16` is set, float32 otherwise; sums
 *          are float32, in the order of slots. Returns 0. */
MC_EXPORT int mc_share_slots(const int64_t *table, const int64_t *index, const void *weights, int bfloat16, int tokens,
                             int k, int absent, int64_t *shared_index, void *shared_weights);

/* The nearest points to vectors under a metric, signs included: see numerics/gguf_lattice.py.
 *
 * points    [length][count], magnitudes; count at most 4096, a multiple of 32; length 4 or 8
 * metric    [length][length], symmetric;  wanted  [rows][length];  linear  [rows][length], metric times wanted
 * scales    [rows], of points
 * rules     [rows]: 0 even, 1 odd number of minuses, 2 any; points with signs of their own: 3 all of them, 4 those of
 *           the first half, 5 of the second; NULL: any
 * codes     [rows], index of the point;  signs  [rows], bit i: weight i is negative
 * Returns 1 where there is no memory, or for a table that is too large. */
MC_EXPORT int mc_lattice_search(const float *points, const float *metric, const float *wanted, const float *linear,
                                const float *scales, const uint8_t *rules, int count, int length, int rows,
                                int16_t *codes, uint8_t *signs);

#endif
