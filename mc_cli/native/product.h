/* Common to products with packed matrices of every encoding. */
#ifndef MC_PRODUCT_H
#define MC_PRODUCT_H

#include "compiler.h"
#include "mc.h"

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>
#define HAS_VECTORS 1
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vnni")))
#endif

#if defined(HAS_VECTORS) && defined(__linux__) && \
    ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11))
#define HAS_AMX 1
#define AMX __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vnni,amx-tile,amx-int8")))

/* Whether the processor has tiles of bytes and the system lets this process use them. */
int mc_tiles_granted(void);

/* All eight tiles, of the largest size; to be released when the work is done. */
void mc_configure_tiles(void);
void mc_release_tiles(void);
#endif

#ifdef HAS_VECTORS
/* sum + w * x, bytes by fours. With an intrinsic, compilers copy the sums of an unrolled loop back and forth. */
AVX512 INLINE __m512i add_products(__m512i sum, __m512i w, __m512i x) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
    return sum;
}

/* sum + w * x, bytes by fours, with the same four bytes of x in all lanes. */
AVX512 INLINE __m512i add_products_with(__m512i sum, __m512i w, const int8_t *x) {
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w), "m"(*(const int8_t (*)[4])x));
    return sum;
}
#endif

#if defined(__aarch64__) && (defined(__GNUC__) || defined(__clang__))
#include <arm_neon.h>
#define HAS_NEON 1
#endif

#define TILE 16 /* rows of a tile */
#define FINE 254.0f /* a coarse step of an activation has as many fine ones */

/* Paths, as kernels/compiled.py names them; a processor has either AVX2 or NEON. */
enum { PORTABLE = 0, AVX2 = 1, NEON = 1, AVX512_VNNI = 2, AMX_TILES = 3 };

/* A table by path, of what the five have: those that this processor or compiler has not get the next best. Names that do
 * not get into the table need not exist. */
#if defined(HAS_AMX)
#define BY_PATH(portable, avx2, neon, avx512, amx) {portable, avx2, avx512, amx}
#elif defined(HAS_VECTORS)
#define BY_PATH(portable, avx2, neon, avx512, amx) {portable, avx2, avx512, avx512}
#elif defined(HAS_NEON)
#define BY_PATH(portable, avx2, neon, avx512, amx) {portable, neon, neon, neon}
#else
#define BY_PATH(portable, avx2, neon, avx512, amx) {portable, portable, portable, portable}
#endif

INLINE int known_path(int path) { return path < PORTABLE || path > AMX_TILES ? PORTABLE : path; }

/* mc_product with x and out float32. */
int mc_bank_product(const mc_bank *bank, const float *x, const int64_t *experts, int tokens, int top_k,
                    int activation_bytes, int path, int threads, float *out);
/* mc_bank_product for banks of one kind each. */
int mc_trellis_product(const mc_bank *bank, const float *x, const int64_t *experts, int tokens, int top_k,
                       int activation_bytes, int path, int threads, float *out);
int mc_affine_product(const mc_bank *bank, const float *x, const int64_t *experts, int tokens, int top_k,
                      int activation_bytes, int path, int threads, float *out);

/* Room for floats, to be freed, or NULL; large blocks are in huge pages where the system has them. */
float *mc_room_for(size_t floats);

/* Conversion to float32 from bfloat16, and back. */
void mc_widen(const uint16_t *bfloat16s, size_t count, float *floats, int threads);
void mc_narrow(const float *floats, size_t count, uint16_t *bfloat16s, int threads);

/* How many inputs and outputs a matrix has; none of either where it is not there. */
typedef struct {
    int inputs, outputs;
} mc_shape;

mc_shape mc_shape_of(const mc_bank *bank, int64_t matrix);

/* The places of one matrix: `first` to first + count - 1. Its outputs are divided into pieces of work, of which the first
 * is number `piece` of all. */
typedef struct {
    int matrix, first, count, piece;
} mc_task;

/* Slots, each with its matrix, put side by side by matrix. A place is where a slot comes to lie. */
typedef struct {
    int *slots;     /* [places] */
    int *places;    /* [slots], -1: it has no matrix */
    mc_task *tasks; /* [count], by matrix */
    int count;
    int pieces;     /* pieces of work of all tasks */
    size_t weights; /* number of weights that all slots are multiplied with */
} mc_slots;

/* Slot s has the matrix experts[s] of the bank; none where that is none of its matrices, or is not there. experts NULL:
 * all have the first. A piece of work has `rows` outputs at most; 0: a sequence of its matrix.
 * Returns 0, or 1 without memory; mc_free_slots in either case. */
int mc_sort_slots(mc_slots *sorted, const mc_bank *bank, const int64_t *experts, int slots, int rows);
void mc_free_slots(mc_slots *sorted);

/* The task that a piece of work belongs to. */
const mc_task *mc_task_of(const mc_slots *sorted, int piece);

/* `threads`, or 1 where there is so little work that a second thread would come too late. */
int mc_threads_for(const mc_slots *sorted, int threads);

/* Zeros in out [slots][outputs of the bank] for every slot without a matrix, and behind the outputs of those with one. */
void mc_clear_rest(const mc_slots *sorted, const mc_bank *bank, int slots, float *out);

/* Splits activations into two bytes each: steps of the largest / 127, and their 254th parts; fine NULL: the first alone.
 * Returns the step; NaN where one is not finite, so that it shows in the outputs. totals [2]: the sums of both. */
float mc_split(const float *x, int count, int8_t *coarse, int8_t *fine, int32_t *totals);

/* The normalised Hadamard transform of every `block` entries of signs * x [count], as numerics/rotation.py defines it. */
void mc_rotate(const float *x, const float *signs, int count, int block, float *out);

/* `count` up to the next multiple of `unit`. */
INLINE size_t whole(size_t count, size_t unit) { return (count + unit - 1) / unit * unit; }

/* A float16 as float32; without branches, so that many at once are vectors. */
INLINE float from_half(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, size = half & 0x7fff;
    const float small = (float)(int32_t)size * 0x1p-24f;
    uint32_t bits;
    memcpy(&bits, &small, 4);
    const uint32_t large = (size << 13) + (size >= 0x7c00 ? 0x70000000u : 0x38000000u);
    bits = sign | (size >= 0x0400 ? large : bits);
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE float from_bfloat16(uint16_t half) {
    const uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Bfloat16, to nearest, ties to even; NaN stays one */
INLINE uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
    return (uint16_t)((value == value ? rounded : bits | 0x400000) >> 16);
}

#endif
