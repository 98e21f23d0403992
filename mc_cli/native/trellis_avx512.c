/* Products with trellis codes on AVX-512 (VBMI, VNNI) and AMX, by the sums that trellis_portable.c derives.
 *
 * A vector has all 16 lanes of 4 inputs, so a row of a block is one vector, and a lane one output. vpermb looks 64
 * bytes up in a table of 64 and ignores the two highest bits of an index. Look-ups are the limit, not bytes: codes
 * below 2.5 bits have a first table that gives back what is looked up and never negate, so two look-ups per vector do,
 * three otherwise. One shift serves all windows that begin in a plane (six_bits): bits that the next plane has stay
 * where they are, and tables for each of the 8 places where a window can begin have their entries in that order.
 *
 * Few tokens: vpdpbusd multiplies a vector of weights with 4 activations that all lanes share and adds the four
 * products to each lane's int32, without saturation. Blocks of 8 groups stay in the first cache between decoding and
 * multiplication. wide * high sums are in registers, `wide` rows of activations by `high` rows of the block, so that
 * each load of weights or of activations serves several products. 65536 inputs stay within an int32: sums are exact in
 * any order.
 *
 * With AMX a row of the block for 16 groups is a tile of B, [16 groups][16 lanes][4], as it lies; 16 rows of
 * activations, 64 bytes of each, are a tile of A; tdpbsud adds signed by unsigned products into a tile of 16 rows by 16
 * lanes. Two tiles of activations meet two of weights, so each that is loaded serves twice; the rest of up to 16 rows
 * meets four of weights. Rows of a block behind a sequence's last group are multiplied too, by activations that are
 * zeros there.
 *
 * Outputs lie 16 l + k apart from their sums [k][lane l]: 16 vectors are transposed at the end, scaled and written. */
#include "trellis_product.h"

#ifdef HAS_VECTORS

/* Bytes from codes that are decoded to those that are fetched: to the first cache, and before to the second, as the first
 * can wait for fewer lines than the memory needs to be busy. */
#define NEAR 2048
#define FAR 8192

/* The low six bits of every byte: bits `bit` to bit + 5 of its column of planes, the other two are anything.
 *
 * Their order does not matter to look-ups in tables made for it. So where the six bits are of two planes, those
 * of the second stay where they are, and those of the first, moved by two whatever the bit, go above them: one shift
 * serves all windows that begin in a plane. `lookup_tables` says which order that is. */
AVX512 INLINE __m512i six_bits(const __m512i *planes, int bit) {
    const int plane = bit >> 3, from = bit & 7;
    if (from < 2) return from ? _mm512_srli_epi16(planes[plane], 1) : planes[plane];
    const __m512i moved = _mm512_srli_epi16(planes[plane], 2), below = _mm512_set1_epi8((char)((1 << (from - 2)) - 1));
    return from == 2 ? moved : _mm512_ternarylogic_epi32(below, planes[plane + 1], moved, 0xCA);
}

AVX512 INLINE void decode_planes(const TrellisSequence *s, const TrellisCode *code, int first, int count,
                                 TrellisBlock block, const int planes) {
    const __m512i zero = _mm512_setzero_si512();
    __m512i one[8], two[8], levels[8]; /* one per bit of a byte where a window begins */
#pragma GCC unroll 8
    for (int bit = 0; bit < 8; bit++) {
        one[bit] = _mm512_loadu_si512(code->turned[bit][0]);
        two[bit] = _mm512_loadu_si512(code->turned[bit][1]);
        levels[bit] = _mm512_loadu_si512(code->turned[bit][2]);
    }
    const __mmask16 mask = (__mmask16)((1u << s->lanes) - 1);
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i next = _mm512_maskz_add_epi32(mask >> 1, lane, _mm512_set1_epi32(1)); /* the last meets the first */
    const int stride = s->lanes * GROUP;
    const uint8_t *codes = s->codes + (size_t)first * planes * stride;
    for (int g = 0; g < count; g++) {
        __m512i plane[MOST_PLANES + 2];
#pragma GCC unroll 12
        for (int p = 0; p < planes; p++) plane[p] = _mm512_maskz_loadu_epi32(mask, codes + p * stride);
        plane[planes] = _mm512_permutexvar_epi32(next, plane[0]);
        plane[planes + 1] = _mm512_permutexvar_epi32(next, plane[1]);
#pragma GCC unroll 10
        for (int p = 0; p < planes; p++) {
            _mm_prefetch((const char *)codes + FAR + p * LANE_BYTES, _MM_HINT_T1);
            _mm_prefetch((const char *)codes + NEAR + p * LANE_BYTES, _MM_HINT_T0);
        }
        codes += planes * stride;
#pragma GCC unroll 16
        for (int k = 0; k < PER_LANE; k++) {
            const int bit = k * planes / 2;
            const __m512i low = six_bits(plane, bit); /* look-ups ignore the two highest bits */
            const __m512i high = _mm512_permutexvar_epi8(six_bits(plane, bit + 6), two[bit & 7]);
            const __m512i looked_up = planes < SIGNED_FROM ? low : _mm512_permutexvar_epi8(low, one[bit & 7]);
            const __m512i hash = _mm512_xor_si512(looked_up, high);
            __m512i level = _mm512_permutexvar_epi8(hash, levels[planes < SIGNED_FROM ? bit & 7 : 0]);
            if (planes >= SIGNED_FROM) level = _mm512_mask_sub_epi8(level, _mm512_movepi8_mask(hash), zero, level);
            _mm512_store_si512(at(block, k, g), level);
        }
    }
}

AVX512 static void decode(const TrellisSequence *s, const TrellisCode *code, int first, int count, TrellisBlock block) {
    const TrellisBlock small = {block.bytes, FEW_GROUPS}; /* a constant pitch makes places in it constants */
    if (block.pitch == FEW_GROUPS) {
        BY_RATE(decode_planes, small)
    } else {
        BY_RATE(decode_planes, block)
    }
}

/* `wide` rows of activations with `high` rows of the block at a time, their sums in registers */
AVX512 INLINE void multiply_tile(TrellisBlock block, int count, const int8_t *x, size_t stride, int32_t *sums,
                                 const int wide, const int high) {
    for (int k = 0; k < PER_LANE; k += high) {
        __m512i sum[16];
#pragma GCC unroll 16
        for (int i = 0; i < wide * high; i++)
            sum[i] = _mm512_load_si512(sums + ((i / high) * PER_LANE + k + i % high) * LANES);
        for (int g = 0; g < count; g++) {
#pragma GCC unroll 8
            for (int h = 0; h < high; h++) {
                const __m512i w = _mm512_load_si512(at(block, k + h, g));
#pragma GCC unroll 16
                for (int row = 0; row < wide; row++) {
                    const int8_t *four = x + (size_t)row * stride + (size_t)g * GROUP;
                    __m512i *into = sum + row * high + h;
                    if (high == 1) *into = add_products_with(*into, w, four);
                    else {
                        int32_t all;
                        memcpy(&all, four, GROUP);
                        *into = add_products(*into, w, _mm512_set1_epi32(all));
                    }
                }
            }
        }
#pragma GCC unroll 16
        for (int i = 0; i < wide * high; i++)
            _mm512_store_si512(sums + ((i / high) * PER_LANE + k + i % high) * LANES, sum[i]);
    }
}

AVX512 static void multiply(TrellisBlock block, int count, const int8_t *x, size_t stride, int rows, int32_t *sums) {
    int row = 0;
#define TILES(WIDE, HIGH) \
    for (; row + WIDE <= rows; row += WIDE) \
        multiply_tile(block, count, x + (size_t)row * stride, stride, sums + (size_t)row * PER_LANE * LANES, WIDE, HIGH)
    TILES(16, 1);
    TILES(8, 2);
    TILES(4, 4);
    TILES(2, 4);
    TILES(1, 4);
}

/* Rows become columns: halves change places, then quarters within them, and so on. */
AVX512 INLINE void transpose(__m512 *rows) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#pragma GCC unroll 4
    for (int half = 8; half; half >>= 1) {
        const __m512i shift = _mm512_set1_epi32(half), other = _mm512_set1_epi32(LANES);
        const __mmask16 second = _mm512_test_epi32_mask(lane, shift);
        const __m512i low = _mm512_mask_add_epi32(lane, second, _mm512_sub_epi32(lane, shift), other);
        const __m512i high = _mm512_mask_mov_epi32(_mm512_add_epi32(lane, shift), second, _mm512_add_epi32(lane, other));
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) {
            if (i & half) continue;
            const __m512 a = rows[i], b = rows[i + half];
            rows[i] = _mm512_permutex2var_ps(a, low, b);
            rows[i + half] = _mm512_permutex2var_ps(a, high, b);
        }
    }
}

/* Multiplies by scales as they are stored, in float16. */
AVX512 static void finish(const int32_t *sums, int activation_bytes, const int32_t *totals, float step,
                          const uint16_t *scales, int count, float *out) {
    const __m512 steps = _mm512_set1_ps(step), fine = _mm512_set1_ps(FINE);
    __m512 values[LANES];
#pragma GCC unroll 16
    for (int k = 0; k < PER_LANE; k++) {
        const __m512i coarse = _mm512_sub_epi32(_mm512_load_si512(sums + k * LANES), _mm512_set1_epi32(128 * totals[0]));
        values[k] = _mm512_cvtepi32_ps(coarse);
        if (activation_bytes > 1) {
            const __m512i rest =
                _mm512_sub_epi32(_mm512_load_si512(sums + SUMS + k * LANES), _mm512_set1_epi32(128 * totals[1]));
            values[k] = _mm512_add_ps(values[k], _mm512_div_ps(_mm512_cvtepi32_ps(rest), fine));
        }
        values[k] = _mm512_mul_ps(steps, values[k]);
    }
    transpose(values);
#pragma GCC unroll 16
    for (int lane = 0; lane < LANES; lane++) {
        const int left = count - lane * PER_LANE;
        if (left <= 0) break;
        const __mmask16 there = left < PER_LANE ? (__mmask16)((1u << left) - 1) : 0xffff;
        const __m256i stored = _mm256_maskz_loadu_epi16(there, scales + lane * PER_LANE);
        _mm512_mask_storeu_ps(out + lane * PER_LANE, there, _mm512_mul_ps(_mm512_cvtph_ps(stored), values[lane]));
    }
}

const TrellisPath mc_trellis_avx512 = {.decode = decode, .multiply = multiply,
                                       .finish = finish, .rows_together = 2, .large_blocks = 1};

#ifdef HAS_AMX

/* Tiles 0 to 3 are sums, 4 and 5 activations, 6 and 7 weights, or 5 to 7.
 * Tiles are whole and configured before: rows and groups beyond the last are read, too. Activations beyond the last
 * group are zeros, sums of rows beyond the last are of no use. */
AMX static void multiply_tiles(TrellisBlock block, int count, const int8_t *x, size_t stride, int rows, int32_t *sums) {
    const long line = SUMS * sizeof(int32_t);
    const int pairs = (rows + TILE - 1) / (2 * TILE) * 2 * TILE;
    for (int k = 0; k < PER_LANE; k += 2) /* two rows of the block stay near while all activations pass */
        for (int row = 0; row < pairs; row += 2 * TILE) {
            int32_t *sum = sums + (size_t)row * SUMS + k * LANES, *below = sum + TILE * SUMS;
            const int8_t *a = x + (size_t)row * stride, *b = a + TILE * stride;
            _tile_loadd(0, sum, line);
            _tile_loadd(1, sum + LANES, line);
            _tile_loadd(2, below, line);
            _tile_loadd(3, below + LANES, line);
            for (int g = 0; g < count; g += TILE) {
                _tile_loadd(4, a + g * GROUP, (long)stride);
                _tile_loadd(6, at(block, k, g), LANE_BYTES);
                _tile_dpbsud(0, 4, 6);
                _tile_loadd(7, at(block, k + 1, g), LANE_BYTES);
                _tile_dpbsud(1, 4, 7);
                _tile_loadd(5, b + g * GROUP, (long)stride);
                _tile_dpbsud(2, 5, 6);
                _tile_dpbsud(3, 5, 7);
            }
            _tile_stored(0, sum, line);
            _tile_stored(1, sum + LANES, line);
            _tile_stored(2, below, line);
            _tile_stored(3, below + LANES, line);
        }
    if (pairs >= rows) return;
    for (int k = 0; k < PER_LANE; k += 4) {
        int32_t *sum = sums + (size_t)pairs * SUMS + k * LANES;
        const int8_t *a = x + (size_t)pairs * stride;
        _tile_loadd(0, sum, line);
        _tile_loadd(1, sum + LANES, line);
        _tile_loadd(2, sum + 2 * LANES, line);
        _tile_loadd(3, sum + 3 * LANES, line);
        for (int g = 0; g < count; g += TILE) {
            _tile_loadd(4, a + g * GROUP, (long)stride);
            _tile_loadd(6, at(block, k, g), LANE_BYTES);
            _tile_dpbsud(0, 4, 6);
            _tile_loadd(7, at(block, k + 1, g), LANE_BYTES);
            _tile_dpbsud(1, 4, 7);
            _tile_loadd(5, at(block, k + 2, g), LANE_BYTES);
            _tile_dpbsud(2, 4, 5);
            _tile_loadd(6, at(block, k + 3, g), LANE_BYTES);
            _tile_dpbsud(3, 4, 6);
        }
        _tile_stored(0, sum, line);
        _tile_stored(1, sum + LANES, line);
        _tile_stored(2, sum + 2 * LANES, line);
        _tile_stored(3, sum + 3 * LANES, line);
    }
}

const TrellisPath mc_trellis_amx = {.decode = decode, .multiply = multiply_tiles,
                                    .finish = finish, .rows_together = TILE, .large_blocks = 1,
                                    .for_few = &mc_trellis_avx512, .begin = mc_configure_tiles,
                                    .end = mc_release_tiles};
#endif

#endif
