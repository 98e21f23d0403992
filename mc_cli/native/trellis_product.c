/* Products with trellis-coded matrices, and their decoding. The format is described in encodings/trellis.py.
 *
 * Activations come as int16 pairs, so products and sums of up to FLUSH pairs are exact in int32; these are then added
 * to float32. A chunk is a ring of bits per input for `length` outputs; its inputs lie one after the other. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define STATE_BITS 12
#define LARGEST_RING 160 /* bytes: 256 outputs at 5 bits */
#define FLUSH 128        /* pairs of inputs: 2 * 127 * 32767 * FLUSH < 2^31 */

typedef struct {
    const uint8_t *codes; /* [chunks][inputs][length * twice_rate / 16] */
    const int8_t *levels; /* [4096] by window */
    int inputs, length, twice_rate;
} Matrix;

static inline int ring_bytes(const Matrix *m) { return m->length * m->twice_rate / 16; }

/* The ring with its beginning repeated after its end, so that every window can be read in one piece. */
static inline void unroll(const uint8_t *ring, int bytes, uint8_t *out) {
    memcpy(out, ring, (size_t)bytes);
    for (int extra = 0; extra < 4; extra++) out[bytes + extra] = ring[extra % bytes];
}

/* values [length]: the levels of one input's weights */
static void decode_ring(const Matrix *m, const uint8_t *ring, int8_t *values) {
    uint8_t open[LARGEST_RING + 4];
    unroll(ring, ring_bytes(m), open);
    for (int i = 0; i < m->length; i++) {
        const int offset = i * m->twice_rate / 2;
        uint32_t word;
        memcpy(&word, open + (offset >> 3), 4); /* little-endian, as the format is */
        values[i] = m->levels[(word >> (offset & 7)) & ((1 << STATE_BITS) - 1)];
    }
}

static void flush(int32_t *sums, float *totals, int count) {
    for (int i = 0; i < count; i++) {
        totals[i] += (float)sums[i];
        sums[i] = 0;
    }
}

static void product_portable(const Matrix *m, const uint8_t *rings, const int16_t *x, int tokens, float *totals) {
    int8_t values[2][256];
    int32_t sums[256];
    const int bytes = ring_bytes(m);
    for (int token = 0; token < tokens; token++) {
        const int16_t *row = x + (size_t)token * m->inputs;
        memset(sums, 0, sizeof sums);
        for (int j = 0; j < m->inputs; j += 2) {
            const int pair = j + 1 < m->inputs;
            decode_ring(m, rings + (size_t)j * bytes, values[0]);
            if (pair) decode_ring(m, rings + (size_t)(j + 1) * bytes, values[1]);
            else memset(values[1], 0, sizeof values[1]);
            const int32_t a = row[j], b = pair ? row[j + 1] : 0;
            for (int i = 0; i < m->length; i++) sums[i] += a * values[0][i] + b * values[1][i];
            if ((j / 2 + 1) % FLUSH == 0) flush(sums, totals + (size_t)token * m->length, m->length);
        }
        flush(sums, totals + (size_t)token * m->length, m->length);
    }
}

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>
#define HAS_AVX512 1
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vnni")))

typedef struct {
    __m512i spread, shift, table, mask, multiplier, offset;
} Decoder;

/* The 64 levels by the bits of the mixed window that choose them, found once through the windows that have them.
 * Threads that are first together write the same bytes. */
static const uint8_t *level_table(const int8_t *levels) {
    static uint8_t table[64];
    static volatile int ready;
    if (!ready) {
        for (int window = 0; window < 1 << STATE_BITS; window++) {
            const int mixed = (window * 24907 + 8465) & 0xffff, level = levels[window];
            table[mixed >> 9 & 63] = (uint8_t)(level < 0 ? -level : level);
        }
        ready = 1;
    }
    return table;
}

/* Patterns that bring the window of weight i into 16-bit lane i, for 32 weights that start at a byte. */
AVX512 static inline Decoder decoder_for(const Matrix *m) {
    uint8_t spread[64], shift[64];
    for (int quad = 0; quad < 8; quad++) {
        const int begin = 4 * quad * m->twice_rate / 2 >> 3;
        for (int byte = 0; byte < 8; byte++) spread[8 * quad + byte] = (uint8_t)(begin + byte);
        for (int lane = 0; lane < 4; lane++) {
            const int offset = (4 * quad + lane) * m->twice_rate / 2 - 8 * begin;
            shift[8 * quad + 2 * lane] = (uint8_t)offset;
            shift[8 * quad + 2 * lane + 1] = (uint8_t)(offset + 8);
        }
    }
    return (Decoder){_mm512_loadu_si512(spread), _mm512_loadu_si512(shift), _mm512_loadu_si512(level_table(m->levels)),
                     _mm512_set1_epi16((1 << STATE_BITS) - 1), _mm512_set1_epi16(24907), _mm512_set1_epi16(8465)};
}

/* int16 levels of 32 weights from the bytes that hold their windows */
AVX512 static inline __m512i levels_of(__m512i bytes, const Decoder *d) {
    __m512i window = _mm512_permutexvar_epi8(d->spread, bytes);
    window = _mm512_and_si512(_mm512_multishift_epi64_epi8(d->shift, window), d->mask);
    const __m512i mixed = _mm512_add_epi16(_mm512_mullo_epi16(window, d->multiplier), d->offset);
    const __m512i size = _mm512_maskz_permutexvar_epi8(0x5555555555555555ull, _mm512_srli_epi16(mixed, 9), d->table);
    return _mm512_mask_sub_epi16(size, _mm512_movepi16_mask(mixed), _mm512_setzero_si512(), size);
}

/* The bytes of one group of 32 weights: its own, and the first of the next, which for the last group are the ring's
 * first. Nothing beyond the ring is touched. */
AVX512 static inline __m512i group_bytes(const uint8_t *ring, int group, int groups, int step, int bytes) {
    const int own = bytes - group * step;
    if (group + 1 < groups) return _mm512_maskz_loadu_epi8((1ull << (step + 2)) - 1, ring + group * step);
    const __m512i tail = _mm512_maskz_loadu_epi8((1ull << own) - 1, ring + group * step);
    return _mm512_mask_loadu_epi8(tail, 3ull << own, ring - own);
}

/* One chunk for up to TOKENS tokens. Sums are kept in the order in which unpacking two inputs leaves the outputs:
 * of every 32, those of lanes 0-3 of each eight, then those of lanes 4-7. */
#define TOKENS 16
AVX512 static void product_avx512(const Matrix *m, const uint8_t *rings, const int16_t *x, int tokens, float *totals) {
    const Decoder d = decoder_for(m);
    const int bytes = ring_bytes(m), groups = (m->length + 31) / 32, step = 2 * m->twice_rate;
    int32_t sums[TOKENS][256] __attribute__((aligned(64)));
    float found[TOKENS][256] __attribute__((aligned(64)));
    memset(sums, 0, sizeof(sums[0]) * (size_t)tokens);
    memset(found, 0, sizeof(found[0]) * (size_t)tokens);
    for (int j = 0; j < m->inputs; j += 2) {
        const int pair = j + 1 < m->inputs;
        const uint8_t *ring = rings + (size_t)j * bytes;
        __m512i both[TOKENS];
        for (int token = 0; token < tokens; token++) {
            const int16_t *row = x + (size_t)token * m->inputs;
            const uint32_t a = (uint16_t)row[j], b = pair ? (uint16_t)row[j + 1] : 0;
            both[token] = _mm512_set1_epi32((int32_t)(a | b << 16));
        }
        for (int g = 0; g < groups; g++) {
            const __m512i v0 = levels_of(group_bytes(ring, g, groups, step, bytes), &d);
            const __m512i v1 = pair ? levels_of(group_bytes(ring + bytes, g, groups, step, bytes), &d) : v0;
            const __m512i low = _mm512_unpacklo_epi16(v0, v1), high = _mm512_unpackhi_epi16(v0, v1);
            for (int token = 0; token < tokens; token++) {
                __m512i *sum = (__m512i *)(sums[token] + 32 * g);
                sum[0] = _mm512_dpwssd_epi32(sum[0], low, both[token]);
                sum[1] = _mm512_dpwssd_epi32(sum[1], high, both[token]);
            }
        }
        if ((j / 2 + 1) % FLUSH && j + 2 < m->inputs) continue;
        for (int token = 0; token < tokens; token++)
            for (int i = 0; i < 32 * groups; i += 16) {
                __m512 *total = (__m512 *)(found[token] + i);
                __m512i *sum = (__m512i *)(sums[token] + i);
                *total = _mm512_add_ps(*total, _mm512_cvtepi32_ps(*sum));
                *sum = _mm512_setzero_si512();
            }
    }
    for (int token = 0; token < tokens; token++)
        for (int i = 0; i < m->length; i++) {
            const int lane = i % 32, place = lane / 8 * 4 + lane % 4 + (lane % 8 < 4 ? 0 : 16);
            totals[(size_t)token * m->length + i] = found[token][i - lane + place];
        }
}
#endif

#ifdef HAS_AVX512
/* One ring as float32 levels times `unit`. */
AVX512 static void decode_avx512(const Matrix *m, const Decoder *d, const uint8_t *ring, float unit, float *out) {
    const int bytes = ring_bytes(m), groups = (m->length + 31) / 32, step = 2 * m->twice_rate;
    const __m512 scale = _mm512_set1_ps(unit);
    for (int g = 0; g < groups; g++) {
        const __m512i levels = levels_of(group_bytes(ring, g, groups, step, bytes), d);
        const __m256i halves[2] = {_mm512_castsi512_si256(levels), _mm512_extracti64x4_epi64(levels, 1)};
        for (int half = 0; half < 2 && 32 * g + 16 * half < m->length; half++) {
            const __m512 values = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(halves[half]));
            _mm512_storeu_ps(out + 32 * g + 16 * half, _mm512_mul_ps(values, scale));
        }
    }
}

AVX512 static void decode_all_avx512(const Matrix *m, int rings, float unit, float *out) {
    const Decoder d = decoder_for(m);
    for (int ring = 0; ring < rings; ring++)
        decode_avx512(m, &d, m->codes + (size_t)ring * ring_bytes(m), unit, out + (size_t)ring * m->length);
}
#endif

/* Which path products take on this machine: 2 AVX-512 (VBMI, VNNI), 0 portable. */
int mc_trellis_path(void) {
#ifdef HAS_AVX512
    if (__builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni")) return 2;
#endif
    return 0;
}

/* out [rings][length] float32: levels times `unit`; codes [rings][length * twice_rate / 16] */
int mc_trellis_decode(const uint8_t *codes, const int8_t *levels, int rings, int length, int twice_rate, int path,
                      float unit, float *out) {
    const Matrix m = {codes, levels, 0, length, twice_rate};
#ifdef HAS_AVX512
    if (path == 2) {
        decode_all_avx512(&m, rings, unit, out);
        return 0;
    }
#endif
    int8_t values[256];
    for (int ring = 0; ring < rings; ring++) {
        decode_ring(&m, codes + (size_t)ring * ring_bytes(&m), values);
        for (int i = 0; i < length; i++) out[(size_t)ring * length + i] = unit * values[i];
    }
    return 0;
}

/* The Hadamard transform of every `block` entries of signs * x, as numerics/rotation.py defines it. */
static void rotate(const float *x, const float *signs, int count, int block, float *out) {
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

/* Every activation as two int16: steps of the largest / 32767, and their 32767th parts. Returns the step; NaN where an
 * activation is not finite, so that it shows in the outputs. */
static float split(const float *x, int count, int16_t *coarse, int16_t *fine) {
    float largest = 1e-30f, check = 0.0f;
    for (int i = 0; i < count; i++) {
        check += 0.0f * x[i];
        const float size = x[i] < 0 ? -x[i] : x[i];
        largest = size > largest ? size : largest;
    }
    if (check != 0.0f) { /* only NaN is */
        memset(coarse, 0, sizeof(int16_t) * (size_t)count);
        memset(fine, 0, sizeof(int16_t) * (size_t)count);
        return check;
    }
    const float inverse = 32767.0f / largest;
    for (int i = 0; i < count; i++) {
        const float steps = x[i] * inverse, whole = __builtin_rintf(steps);
        coarse[i] = (int16_t)whole;
        fine[i] = (int16_t)__builtin_rintf((steps - whole) * 32767.0f);
    }
    return largest / 32767.0f;
}

static void product(const Matrix *m, const uint8_t *rings, const int16_t *x, int rows, int path, float *totals) {
#ifdef HAS_AVX512
    if (path == 2) {
        for (int first = 0; first < rows; first += TOKENS)
            product_avx512(m, rings, x + (size_t)first * m->inputs, rows - first < TOKENS ? rows - first : TOKENS,
                           totals + (size_t)first * m->length);
        return;
    }
#endif
    (void)path;
    memset(totals, 0, sizeof(float) * (size_t)rows * m->length);
    product_portable(m, rings, x, rows, totals);
}

/* out [tokens][outputs] float32 = rotated x [tokens][inputs] times the matrix, for the outputs of some chunks.
 * scales [outputs], in units of a level. Returns 0, or 1 without memory. */
int mc_trellis_linear(const float *x, const uint8_t *codes, const int8_t *levels, const float *signs,
                      const float *scales, int tokens, int inputs, int outputs, int block, int length, int twice_rate,
                      int path, int first_chunk, int last_chunk, float *out) {
    const Matrix m = {codes, levels, inputs, length, twice_rate};
    float *rotated = malloc(sizeof(float) * ((size_t)inputs + tokens + 2 * (size_t)tokens * length));
    int16_t *steps = malloc(sizeof(int16_t) * 2 * (size_t)tokens * inputs);
    if (!rotated || !steps) {
        free(rotated);
        free(steps);
        return 1;
    }
    float *sizes = rotated + inputs, *totals = sizes + tokens;
    for (int token = 0; token < tokens; token++) {
        rotate(x + (size_t)token * inputs, signs, inputs, block, rotated);
        sizes[token] = split(rotated, inputs, steps + (size_t)token * inputs, steps + (size_t)(tokens + token) * inputs);
    }
    for (int chunk = first_chunk; chunk < last_chunk; chunk++) {
        product(&m, codes + (size_t)chunk * inputs * ring_bytes(&m), steps, 2 * tokens, path, totals);
        const int begin = chunk * length, count = outputs - begin < length ? outputs - begin : length;
        for (int token = 0; token < tokens; token++) {
            const float *coarse = totals + (size_t)token * length, *fine = totals + (size_t)(tokens + token) * length;
            for (int i = 0; i < count; i++)
                out[(size_t)token * outputs + begin + i] =
                    (coarse[i] + fine[i] / 32767.0f) * scales[begin + i] * sizes[token];
        }
    }
    free(rotated);
    free(steps);
    return 0;
}
