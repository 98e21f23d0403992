/* Products with trellis-coded matrices, and their decoding. The format is described in encodings/trellis.py, the code in
 * numerics/trellis.py.
 *
 * Weights come out as bytes, 128 + level, in blocks [16][groups][lanes][4]: lane l of the k-th row of a block holds the
 * weights of output 16 * l + k for a group of 4 inputs. Activations come as two bytes, a coarse and a fine part. So a
 * product is a sum of byte products, exact in int32, and the same block serves vectors (VNNI) and tiles (AMX). */

#include "threads.h"

#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define PER_LANE 16 /* consecutive weights of a sequence in one lane */
#define LANES 16    /* of a sequence, at most */
#define GROUP 4     /* inputs whose bytes lie side by side */
#define MOST_PLANES 10
#define LANE_BYTES (LANES * GROUP)
#define GROUPS_FEW 32   /* decoded at once for few tokens: 32 KB stay in the first cache */
#define GROUPS_MANY 512 /* and for tiles: 512 KB stay in the second */
#define TOKENS_AT_ONCE 256
#define TOKENS_FOR_TILES 12 /* from here on tiles are faster */
#define FINE 254.0f         /* a coarse step has as many fine ones */
#define INLINE static inline __attribute__((always_inline))

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define VERSIONS __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VERSIONS
#endif

enum { PORTABLE = 0, AVX512_VNNI = 2, AMX_TILES = 3 };

typedef struct {
    const uint8_t *first, *second; /* [64] each: their sum mod 256 is the hash of a window */
    const uint8_t *sizes;          /* [64]: 128 + level by the hash's low bits; its highest one is the sign */
} Code;

typedef struct {
    const uint8_t *codes; /* [groups][planes][lanes][4], of one sequence of outputs */
    int groups, lanes, planes;
} Sequence;

/* What one lane's `planes` bytes, and the first two of the next lane, say of its 16 weights. */
static void decode_portable(const Sequence *s, const Code *code, int first, int count, uint8_t *block) {
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
                    const uint32_t window = (own[bit >> 3] | own[(bit >> 3) + 1] << 8 | own[(bit >> 3) + 2] << 16) >> (bit & 7);
                    const uint8_t hash = (uint8_t)(code->first[window & 63] + code->second[window >> 6 & 63]);
                    const uint8_t size = code->sizes[hash & 63];
                    block[((size_t)k * count + g) * LANE_BYTES + lane * GROUP + input] =
                        hash & 128 ? (uint8_t)-size : size;
                }
            }
        }
    }
}

/* sums [rows][16][16] += rows of activations x [rows][stride], from `x` on, times a block of `count` groups */
VERSIONS static void multiply_portable(const uint8_t *block, int count, const int8_t *x, size_t stride, int rows,
                                       int32_t *sums) {
    for (int row = 0; row < rows; row++)
        for (int k = 0; k < PER_LANE; k++) {
            int32_t *sum = sums + (row * PER_LANE + k) * LANES;
            for (int g = 0; g < count; g++) {
                const uint8_t *w = block + ((size_t)k * count + g) * LANE_BYTES;
                const int8_t *four = x + (size_t)row * stride + (size_t)g * GROUP;
                for (int lane = 0; lane < LANES; lane++)
                    sum[lane] += w[4 * lane] * four[0] + w[4 * lane + 1] * four[1] + w[4 * lane + 2] * four[2] +
                                 w[4 * lane + 3] * four[3];
            }
        }
}

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>
#define HAS_AVX512 1
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vnni")))

/* The low six bits of every byte: bits `bit` to bit + 5 of its column of planes; the other two are anything. */
AVX512 INLINE __m512i six_bits(const __m512i *planes, int bit) {
    const int plane = bit >> 3, from = bit & 7;
    const __m512i low = from ? _mm512_srli_epi16(planes[plane], (unsigned)from) : planes[plane];
    if (from <= 2) return low;
    const __m512i own = _mm512_set1_epi8((char)((1 << (8 - from)) - 1));
    return _mm512_ternarylogic_epi32(own, low, _mm512_slli_epi16(planes[plane + 1], (unsigned)(8 - from)), 0xCA);
}

AVX512 INLINE void decode_planes(const Sequence *s, const Code *code, int first, int count, uint8_t *block,
                                 const int planes) {
    const __m512i one = _mm512_loadu_si512(code->first), two = _mm512_loadu_si512(code->second),
                  sizes = _mm512_loadu_si512(code->sizes), zero = _mm512_setzero_si512();
    const __mmask16 mask = (__mmask16)((1u << s->lanes) - 1);
    int32_t after[LANES];
    for (int lane = 0; lane < LANES; lane++) after[lane] = lane + 1 < s->lanes ? lane + 1 : 0;
    const __m512i next = _mm512_loadu_si512(after);
    const int stride = s->lanes * GROUP;
    const uint8_t *codes = s->codes + (size_t)first * planes * stride;
    for (int g = 0; g < count; g++) {
        __m512i plane[MOST_PLANES + 2];
#pragma GCC unroll 12
        for (int p = 0; p < planes; p++) plane[p] = _mm512_maskz_loadu_epi32(mask, codes + p * stride);
        plane[planes] = _mm512_permutexvar_epi32(next, plane[0]);
        plane[planes + 1] = _mm512_permutexvar_epi32(next, plane[1]);
        codes += planes * stride;
#pragma GCC unroll 16
        for (int k = 0; k < PER_LANE; k++) {
            const int bit = k * planes / 2;
            const __m512i hash = _mm512_add_epi8(_mm512_permutexvar_epi8(six_bits(plane, bit), one),
                                                 _mm512_permutexvar_epi8(six_bits(plane, bit + 6), two));
            const __m512i size = _mm512_permutexvar_epi8(hash, sizes);
            const __m512i weight = _mm512_mask_sub_epi8(size, _mm512_movepi8_mask(hash), zero, size);
            _mm512_store_si512(block + ((size_t)k * count + g) * LANE_BYTES, weight);
        }
    }
}

AVX512 static void decode_avx512(const Sequence *s, const Code *code, int first, int count, uint8_t *block) {
    switch (s->planes) { /* one copy of the loop for each rate, with its shifts as constants */
    case 2: decode_planes(s, code, first, count, block, 2); break;
    case 3: decode_planes(s, code, first, count, block, 3); break;
    case 4: decode_planes(s, code, first, count, block, 4); break;
    case 5: decode_planes(s, code, first, count, block, 5); break;
    case 6: decode_planes(s, code, first, count, block, 6); break;
    case 7: decode_planes(s, code, first, count, block, 7); break;
    case 8: decode_planes(s, code, first, count, block, 8); break;
    case 9: decode_planes(s, code, first, count, block, 9); break;
    default: decode_planes(s, code, first, count, block, 10); break;
    }
}

/* `wide` rows of activations with `high` rows of the block at a time, their sums in registers */
AVX512 INLINE void multiply_tile(const uint8_t *block, int count, const int8_t *x, size_t stride, int32_t *sums,
                                 const int wide, const int high) {
    for (int k = 0; k < PER_LANE; k += high) {
        __m512i sum[16];
#pragma GCC unroll 16
        for (int i = 0; i < wide * high; i++)
            sum[i] = _mm512_load_si512(sums + ((i / high) * PER_LANE + k + i % high) * LANES);
        for (int g = 0; g < count; g++) {
#pragma GCC unroll 4
            for (int h = 0; h < high; h++) {
                const __m512i w = _mm512_load_si512(block + ((size_t)(k + h) * count + g) * LANE_BYTES);
#pragma GCC unroll 16
                for (int row = 0; row < wide; row++) {
                    int32_t four;
                    memcpy(&four, x + (size_t)row * stride + (size_t)g * GROUP, GROUP);
                    sum[row * high + h] = _mm512_dpbusd_epi32(sum[row * high + h], w, _mm512_set1_epi32(four));
                }
            }
        }
#pragma GCC unroll 16
        for (int i = 0; i < wide * high; i++)
            _mm512_store_si512(sums + ((i / high) * PER_LANE + k + i % high) * LANES, sum[i]);
    }
}

AVX512 static void multiply_avx512(const uint8_t *block, int count, const int8_t *x, size_t stride, int rows,
                                   int32_t *sums) {
    int row = 0;
#define TILES(WIDE, HIGH) \
    for (; row + WIDE <= rows; row += WIDE) \
        multiply_tile(block, count, x + (size_t)row * stride, stride, sums + (size_t)row * PER_LANE * LANES, WIDE, HIGH)
    TILES(16, 1);
    TILES(8, 2);
    TILES(4, 4);
    TILES(2, 4);
}

#if (defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11)
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define HAS_AMX 1
#define AMX __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vnni,amx-tile,amx-int8")))

/* Whether the processor has tiles of bytes and the system lets this process use them. */
static int amx_granted(void) {
    unsigned a = 7, b, c = 0, d;
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    if (!(d >> 24 & 1) || !(d >> 25 & 1)) return 0;
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
}

/* Tiles 0 to 3 sums of 16 rows and 16 lanes, 4 and 5 activations, 6 and 7 weights; all of the largest size. */
static const struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} tiles __attribute__((aligned(64))) = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

AMX static void configure_tiles(void) { _tile_loadconfig(&tiles); }

/* As multiply_portable; `rows` a multiple of 32, groups a multiple of 16, tiles configured. */
AMX static void multiply_amx(const uint8_t *block, int count, const int8_t *x, size_t stride, int rows, int32_t *sums) {
    const long line = PER_LANE * LANES * sizeof(int32_t);
    for (int row = 0; row < rows; row += 32)
        for (int k = 0; k < PER_LANE; k += 2) {
            int32_t *sum = sums + ((size_t)row * PER_LANE + k) * LANES, *below = sum + 16 * PER_LANE * LANES;
            const uint8_t *w = block + (size_t)k * count * LANE_BYTES, *beside = w + (size_t)count * LANE_BYTES;
            const int8_t *a = x + (size_t)row * stride, *b = a + 16 * stride;
            _tile_loadd(0, sum, line);
            _tile_loadd(1, sum + LANES, line);
            _tile_loadd(2, below, line);
            _tile_loadd(3, below + LANES, line);
            for (int g = 0; g < count; g += 16) {
                _tile_loadd(4, a + (size_t)g * GROUP, (long)stride);
                _tile_loadd(6, w + (size_t)g * LANE_BYTES, LANE_BYTES);
                _tile_dpbsud(0, 4, 6);
                _tile_loadd(7, beside + (size_t)g * LANE_BYTES, LANE_BYTES);
                _tile_dpbsud(1, 4, 7);
                _tile_loadd(5, b + (size_t)g * GROUP, (long)stride);
                _tile_dpbsud(2, 5, 6);
                _tile_dpbsud(3, 5, 7);
            }
            _tile_stored(0, sum, line);
            _tile_stored(1, sum + LANES, line);
            _tile_stored(2, below, line);
            _tile_stored(3, below + LANES, line);
        }
}

AMX static void release_tiles(void) { _tile_release(); }
#endif
#endif
#endif

/* The fastest path of this machine: 3 AMX, 2 AVX-512 (VBMI, VNNI), 0 portable. */
int mc_trellis_path(void) {
#ifdef HAS_AVX512
    if (__builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni")) {
#ifdef HAS_AMX
        if (amx_granted()) return AMX_TILES;
#endif
        return AVX512_VNNI;
    }
#endif
    return PORTABLE;
}

static void decode_block(const Sequence *s, const Code *code, int first, int count, int path, uint8_t *block) {
#ifdef HAS_AVX512
    if (path >= AVX512_VNNI) {
        decode_avx512(s, code, first, count, block);
        return;
    }
#endif
    (void)path;
    decode_portable(s, code, first, count, block);
}

static void multiply(const uint8_t *block, int count, const int8_t *x, size_t stride, int rows, int path, int32_t *sums) {
#ifdef HAS_AMX
    if (path == AMX_TILES) {
        multiply_amx(block, count, x, stride, rows, sums);
        return;
    }
#endif
#ifdef HAS_AVX512
    if (path == AVX512_VNNI) {
        multiply_avx512(block, count, x, stride, rows, sums);
        return;
    }
#endif
    (void)path;
    multiply_portable(block, count, x, stride, rows, sums);
}

static float from_half(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, size = half & 0x7fff;
    uint32_t bits;
    float value;
    if (size >= 0x0400) bits = (size << 13) + (size >= 0x7c00 ? 0x70000000u : 0x38000000u);
    else {
        const float small = (float)size * 0x1p-24f;
        memcpy(&bits, &small, 4);
    }
    bits |= sign;
    memcpy(&value, &bits, 4);
    return value;
}

/* The normalised Hadamard transform of every `block` entries of signs * x, as numerics/rotation.py defines it. */
VERSIONS static void rotate(const float *x, const float *signs, int count, int block, float *out) {
    float norm = 1.0f;
    for (int size = block; size > 1; size >>= 1) norm *= 0.70710678118654752f;
    for (int i = 0; i < count; i++) out[i] = norm * signs[i] * x[i];
    for (int first = 0; first < count; first += block)
        for (int half = 1; half < block; half <<= 1)
            for (int i = 0; i < block; i += 2 * half)
                for (int j = first + i; j < first + i + half; j++) {
                    const float a = out[j], b = out[j + half];
                    out[j] = a + b;
                    out[j + half] = a - b;
                }
}

/* Activations as two bytes each: steps of the largest / 127, and their 254th parts. Returns the step; NaN where one is
 * not finite, so that it shows in the outputs. totals: the sums of both. */
VERSIONS static float split(const float *x, int count, int8_t *coarse, int8_t *fine, int32_t *totals) {
    float largest = 1e-30f, check = 0.0f;
    totals[0] = totals[1] = 0;
    for (int i = 0; i < count; i++) {
        check += 0.0f * x[i];
        const float size = x[i] < 0 ? -x[i] : x[i];
        largest = size > largest ? size : largest;
    }
    if (check != 0.0f) { /* only NaN is */
        memset(coarse, 0, (size_t)count);
        memset(fine, 0, (size_t)count);
        return check;
    }
    const float inverse = 127.0f / largest;
    int32_t all = 0, rest = 0;
    for (int i = 0; i < count; i++) {
        const float steps = x[i] * inverse, whole = __builtin_rintf(steps);
        const int8_t c = (int8_t)whole, f = (int8_t)__builtin_rintf((steps - whole) * FINE);
        coarse[i] = c;
        fine[i] = f;
        all += c;
        rest += f;
    }
    totals[0] = all;
    totals[1] = rest;
    return largest / 127.0f;
}

typedef struct {
    int64_t codes, scales, planes; /* addresses, and bits per 16 weights / 8; 0 planes: this matrix is not here */
} Entry;

typedef struct {
    const float *x, *signs;
    const Entry *bank;
    Code code;
    float unit;
    float *out;
    int tokens, slots, share, inputs, outputs, block, length, path;
    size_t stride; /* bytes of a row of activations */
    int8_t *rows;  /* [tokens][2][stride] */
    float *steps;  /* [tokens] */
    int32_t *totals; /* [tokens][2] */
    int *order;    /* [slots] slots by expert */
    int *tasks;    /* [..][3]: expert, first of its slots in `order`, how many */
    int chunks;
    atomic_int failed;
} Product;

static void quantize_tokens(void *context, int part) {
    Product *p = context;
    float *rotated = malloc(sizeof(float) * (size_t)p->inputs);
    if (!rotated) {
        atomic_store(&p->failed, 1);
        return;
    }
    for (int token = part * 8; token < p->tokens && token < part * 8 + 8; token++) {
        int8_t *row = p->rows + 2 * token * p->stride;
        rotate(p->x + (size_t)token * p->inputs, p->signs, p->inputs, p->block, rotated);
        p->steps[token] = split(rotated, p->inputs, row, row + p->stride, p->totals + 2 * token);
    }
    free(rotated);
}

/* One sequence of outputs of one expert, for its tokens. */
static void multiply_sequence(void *context, int index) {
    Product *p = context;
    const int *task = p->tasks + 3 * (index / p->chunks);
    const int chunk = index % p->chunks, lanes = p->length / PER_LANE, groups = (p->inputs + GROUP - 1) / GROUP;
    const Entry *entry = p->bank + task[0];
    const Sequence s = {(const uint8_t *)(intptr_t)entry->codes + (size_t)chunk * groups * entry->planes * lanes * GROUP,
                        groups, lanes, (int)entry->planes};
    const int path = p->path == AMX_TILES && task[2] < TOKENS_FOR_TILES ? AVX512_VNNI : p->path;
    const int by_tiles = path == AMX_TILES, at_once = by_tiles ? GROUPS_MANY : GROUPS_FEW;
    const int most = task[2] < TOKENS_AT_ONCE ? task[2] : TOKENS_AT_ONCE;
    const int most_rows = by_tiles ? (2 * most + 31) / 32 * 32 : 2 * most; /* whole tiles */
    uint8_t *block = aligned_alloc(64, (size_t)PER_LANE * at_once * LANE_BYTES);
    int32_t *sums = aligned_alloc(64, (size_t)most_rows * PER_LANE * LANES * sizeof(int32_t));
    int8_t *rows = malloc((size_t)most_rows * p->stride);
    if (!block || !sums || !rows) {
        atomic_store(&p->failed, 1);
        free(block);
        free(sums);
        free(rows);
        return;
    }
    if (lanes < LANES) memset(block, 0, (size_t)PER_LANE * at_once * LANE_BYTES);
#ifdef HAS_AMX
    if (by_tiles) configure_tiles();
#endif
    for (int begin = 0; begin < task[2]; begin += most) {
        const int count = task[2] - begin < most ? task[2] - begin : most;
        const int *slots = p->order + task[1] + begin;
        const int used = by_tiles ? (2 * count + 31) / 32 * 32 : 2 * count;
        for (int i = 0; i < count; i++)
            memcpy(rows + 2 * i * p->stride, p->rows + 2 * (slots[i] / p->share) * p->stride, 2 * p->stride);
        memset(rows + 2 * count * p->stride, 0, (size_t)(used - 2 * count) * p->stride);
        memset(sums, 0, (size_t)used * PER_LANE * LANES * sizeof(int32_t));
        for (int first = 0; first < groups; first += at_once) {
            const int some = groups - first < at_once ? groups - first : at_once;
            const int padded = by_tiles ? (some + 15) / 16 * 16 : some;
            decode_block(&s, &p->code, first, some, path, block);
            if (padded == some) multiply(block, some, rows + (size_t)first * GROUP, p->stride, used, path, sums);
#ifdef HAS_AVX512
            else multiply_avx512(block, some, rows + (size_t)first * GROUP, p->stride, used, sums);
#endif
        }
        const uint16_t *scales = (const uint16_t *)(intptr_t)entry->scales;
        for (int i = 0; i < count; i++) {
            const int token = slots[i] / p->share;
            const int32_t *coarse = sums + (size_t)2 * i * PER_LANE * LANES, *fine = coarse + PER_LANE * LANES;
            const int32_t *totals = p->totals + 2 * token;
            const float step = p->steps[token] * p->unit;
            float *out = p->out + (size_t)slots[i] * p->outputs;
            for (int k = 0; k < PER_LANE; k++)
                for (int lane = 0; lane < lanes; lane++) {
                    const int output = chunk * p->length + lane * PER_LANE + k, at = k * LANES + lane;
                    if (output >= p->outputs) continue;
                    out[output] = ((float)(coarse[at] - 128 * totals[0]) + (float)(fine[at] - 128 * totals[1]) / FINE) *
                                  from_half(scales[output]) * step;
                }
        }
    }
#ifdef HAS_AMX
    if (by_tiles) release_tiles();
#endif
    free(block);
    free(sums);
    free(rows);
}

/* out [slots][outputs] float32: slot s holds the product of token s / share with the matrix experts[s] of the bank;
 * zeros where experts[s] is none of the `matrices` or that matrix is not there. experts NULL: all the first.
 * x [tokens][inputs]; tables: `first`, `second` and `sizes` of Code, 64 bytes each. Returns 0, or 1 without memory. */
int mc_trellis_product(const float *x, const int64_t *experts, const Entry *bank, const uint8_t *tables,
                       const float *signs, float unit, int matrices, int tokens, int slots, int share, int inputs,
                       int outputs, int block, int length, int path, int threads, float *out) {
    const int groups = (inputs + GROUP - 1) / GROUP;
    Product p = {.x = x, .signs = signs, .bank = bank, .code = {tables, tables + 64, tables + 128}, .unit = unit,
                 .out = out, .tokens = tokens, .slots = slots, .share = share, .inputs = inputs, .outputs = outputs,
                 .block = block, .length = length, .path = path, .stride = (size_t)(groups + 15) / 16 * 16 * GROUP,
                 .chunks = (outputs + length - 1) / length};
    p.rows = calloc((size_t)tokens * 2, p.stride);
    p.steps = malloc(sizeof(float) * (size_t)tokens);
    p.totals = malloc(sizeof(int32_t) * 2 * (size_t)tokens);
    p.order = malloc(sizeof(int) * (size_t)(slots ? slots : 1));
    p.tasks = malloc(sizeof(int) * 3 * (size_t)matrices);
    int *counts = calloc((size_t)matrices + 1, sizeof(int));
    atomic_init(&p.failed, !p.rows || !p.steps || !p.totals || !p.order || !p.tasks || !counts);
    if (!atomic_load(&p.failed)) {
        for (int slot = 0; slot < slots; slot++) {
            const int64_t expert = experts ? experts[slot] : 0;
            if (expert >= 0 && expert < matrices && bank[expert].planes) counts[expert]++;
            else memset(out + (size_t)slot * outputs, 0, sizeof(float) * (size_t)outputs);
        }
        int tasks = 0, begin = 0;
        for (int expert = 0; expert < matrices; expert++) {
            if (counts[expert]) {
                int *task = p.tasks + 3 * tasks++;
                task[0] = expert;
                task[1] = begin;
                task[2] = counts[expert];
            }
            begin += counts[expert];
            counts[expert] = begin - counts[expert]; /* from here on: where the next slot goes */
        }
        for (int slot = 0; slot < slots; slot++) {
            const int64_t expert = experts ? experts[slot] : 0;
            if (expert >= 0 && expert < matrices && bank[expert].planes) p.order[counts[expert]++] = slot;
        }
        mc_parallel(quantize_tokens, &p, (tokens + 7) / 8, threads);
        if (!atomic_load(&p.failed)) mc_parallel(multiply_sequence, &p, tasks * p.chunks, threads);
    }
    free(p.rows);
    free(p.steps);
    free(p.totals);
    free(p.order);
    free(p.tasks);
    free(counts);
    return atomic_load(&p.failed);
}

typedef struct {
    Sequence first;
    const uint16_t *scales;
    Code code;
    float unit;
    float *out;
    int inputs, outputs, length, path;
    atomic_int failed;
} Matrix;

static void write_sequence(void *context, int chunk) {
    Matrix *m = context;
    Sequence s = m->first;
    s.codes += (size_t)chunk * s.groups * s.planes * s.lanes * GROUP;
    uint8_t *block = aligned_alloc(64, (size_t)PER_LANE * GROUPS_FEW * LANE_BYTES);
    if (!block) {
        atomic_store(&m->failed, 1);
        return;
    }
    for (int first = 0; first < s.groups; first += GROUPS_FEW) {
        const int count = s.groups - first < GROUPS_FEW ? s.groups - first : GROUPS_FEW;
        decode_block(&s, &m->code, first, count, m->path, block);
        const int begin = first * GROUP, end = begin + count * GROUP < m->inputs ? begin + count * GROUP : m->inputs;
        for (int i = 0; i < m->length && chunk * m->length + i < m->outputs; i++) {
            const int output = chunk * m->length + i;
            const uint8_t *row = block + (size_t)(i % PER_LANE) * count * LANE_BYTES + i / PER_LANE * GROUP;
            const float scale = m->scales ? from_half(m->scales[output]) * m->unit : m->unit;
            float *out = m->out + (size_t)output * m->inputs;
            for (int j = begin; j < end; j++)
                out[j] = scale * (float)(row[(size_t)((j - begin) / GROUP) * LANE_BYTES + j % GROUP] - 128);
        }
    }
    free(block);
}

/* out [outputs][inputs] float32: one matrix, in the basis of its rotated inputs. Returns 0, or 1 without memory. */
int mc_trellis_matrix(const uint8_t *codes, const uint16_t *scales, const uint8_t *tables, float unit, int inputs,
                      int outputs, int length, int planes, int path, int threads, float *out) {
    Matrix m = {.first = {codes, (inputs + GROUP - 1) / GROUP, length / PER_LANE, planes}, .scales = scales,
                .code = {tables, tables + 64, tables + 128}, .unit = unit, .out = out, .inputs = inputs,
                .outputs = outputs, .length = length, .path = path};
    atomic_init(&m.failed, 0);
    mc_parallel(write_sequence, &m, (outputs + length - 1) / length, threads);
    return atomic_load(&m.failed);
}
