/* What products of all encodings share: slots sorted by matrix, activations as bytes, bfloat16 and back, and the
 * choice of a path. It prepares and divides work; the products themselves are in the encodings' files.
 *
 * Slots: slot s multiplies the inputs of token s / top_k with the matrix experts[s]. A counting sort puts the slots of
 * a matrix side by side, in their order: slots[place] and places[slot] undo each other, but for slots without a
 * matrix, which have no place. A task is a matrix and its run of places. Pieces of work are numbered through all
 * tasks, ceil(outputs / rows) for each, and bisection finds the task of a piece. Pieces write different outputs, so
 * neither the number of threads nor their order matters.
 *
 * Activations (split): with m = max_i |x_i|, 1e-30 at least, and a step t = m / 127, a_i = rint(x_i / t) and b_i =
 * rint(254 (x_i / t - a_i)) are bytes in -127 .. 127: |x_i| / t is at most 127, and rint leaves 1/2 at most. So
 *
 *     x_i = t (a_i + b_i / 254) + e_i,    |e_i| <= t / 508 = m / 64516;    with a_i alone,  |e_i| <= t / 2 = m / 254.
 *
 * Float32 adds less than t / 2^15 to that: x_i * (127 / m) is 127 at most and rounded twice, t once, so this is 127
 * (2^-23 + 2^-24) t and the rounding of the fine part, which is far smaller. The difference from a_i is exact. The
 * sums of a and of b are exact in int32: 127 * 65536 is less than 2^31. What is not finite gives a step that is NaN,
 * which every output of the token then shows. Copies for several processors give the same bytes: the product that a_i
 * is taken from is used by rint as well, and so not fused with the subtraction.
 *
 * Bfloat16 is the upper half of float32: widening is exact, narrowing rounds once, to nearest, ties to even. */
#include "product.h"
#include "threads.h"

#include <stdlib.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#ifdef HAS_AMX
#include <sys/syscall.h>
#include <unistd.h>

int mc_tiles_granted(void) {
    unsigned a = 7, b, c = 0, d;
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    if (!(d >> 24 & 1) || !(d >> 25 & 1)) return 0;
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
}

static const struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} tiles __attribute__((aligned(64))) = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

AMX void mc_configure_tiles(void) { _tile_loadconfig(&tiles); }
AMX void mc_release_tiles(void) { _tile_release(); }
#endif

static int has_matrix(const mc_bank *bank, int64_t matrix) {
    if (matrix < 0 || matrix >= bank->matrices) return 0;
    return bank->kind == TRELLIS ? bank->trellis[matrix].planes != 0 : bank->affine[matrix].bits != 0;
}

mc_shape mc_shape_of(const mc_bank *bank, int64_t matrix) {
    if (!has_matrix(bank, matrix)) return (mc_shape){0, 0};
    if (bank->kind == TRELLIS) return (mc_shape){(int)bank->trellis[matrix].inputs, (int)bank->trellis[matrix].outputs};
    return (mc_shape){(int)bank->affine[matrix].inputs, (int)bank->affine[matrix].outputs};
}

int mc_sort_slots(mc_slots *sorted, const mc_bank *bank, const int64_t *experts, int slots, int rows) {
    const int matrices = bank->matrices;
    *sorted = (mc_slots){malloc(sizeof(int) * (size_t)(slots + 1)), malloc(sizeof(int) * (size_t)(slots + 1)),
                         malloc(sizeof(mc_task) * (size_t)(matrices + 1)), 0, 0, 0};
    int *next = calloc((size_t)matrices + 1, sizeof(int)); /* per matrix: first how many slots, then the next one's place */
    if (!sorted->slots || !sorted->places || !sorted->tasks || !next) {
        free(next);
        return 1;
    }
    for (int slot = 0; slot < slots; slot++) {
        const int64_t matrix = experts ? experts[slot] : 0;
        const int there = has_matrix(bank, matrix);
        sorted->places[slot] = there ? (int)matrix : -1;
        if (there) next[matrix]++;
    }
    int begin = 0;
    for (int matrix = 0; matrix < matrices; matrix++) {
        if (!next[matrix]) continue;
        const mc_shape shape = mc_shape_of(bank, matrix);
        const int piece = rows ? rows : (int)bank->trellis[matrix].length;
        const mc_task task = {matrix, begin, next[matrix], sorted->pieces};
        sorted->tasks[sorted->count++] = task;
        sorted->pieces += (shape.outputs + piece - 1) / piece;
        sorted->weights += (size_t)task.count * shape.inputs * shape.outputs;
        begin += task.count;
        next[matrix] = task.first;
    }
    for (int slot = 0; slot < slots; slot++) {
        if (sorted->places[slot] < 0) continue;
        sorted->places[slot] = next[sorted->places[slot]]++;
        sorted->slots[sorted->places[slot]] = slot;
    }
    free(next);
    return 0;
}

void mc_free_slots(mc_slots *sorted) {
    free(sorted->slots);
    free(sorted->places);
    free(sorted->tasks);
}

const mc_task *mc_task_of(const mc_slots *sorted, int piece) {
    int first = 0, last = sorted->count; /* it is one of these, without the last */
    while (last - first > 1) {
        const int middle = first + (last - first) / 2;
        if (sorted->tasks[middle].piece <= piece) first = middle;
        else last = middle;
    }
    return sorted->tasks + first;
}

#define WEIGHTS_PER_THREAD ((size_t)1 << 18) /* fewer are done before a second thread has started */

int mc_threads_for(const mc_slots *sorted, int threads) {
    return sorted->weights < 2 * WEIGHTS_PER_THREAD ? 1 : threads;
}

void mc_clear_rest(const mc_slots *sorted, const mc_bank *bank, int slots, float *out) {
    const size_t outputs = (size_t)bank->outputs;
    for (int slot = 0; slot < slots; slot++)
        if (sorted->places[slot] < 0) memset(out + slot * outputs, 0, sizeof(float) * outputs);
    for (const mc_task *task = sorted->tasks; task < sorted->tasks + sorted->count; task++) {
        const size_t own = (size_t)mc_shape_of(bank, task->matrix).outputs;
        for (int place = task->first; place < task->first + task->count && own < outputs; place++)
            memset(out + sorted->slots[place] * outputs + own, 0, sizeof(float) * (outputs - own));
    }
}

VERSIONS static float split(const float *x, int count, int8_t *coarse, int8_t *fine, int32_t *totals) {
    int32_t most = 0; /* the bits of floats are ordered as their sizes are */
    for (int i = 0; i < count; i++) {
        int32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        bits &= 0x7fffffff;
        most = bits > most ? bits : most;
    }
    totals[0] = totals[1] = 0;
    if (most >= 0x7f800000) {
        memset(coarse, 0, (size_t)count);
        if (fine) memset(fine, 0, (size_t)count);
        return __builtin_nanf("");
    }
    float largest;
    memcpy(&largest, &most, sizeof largest);
    if (largest < 1e-30f) largest = 1e-30f;
    const float inverse = 127.0f / largest;
    int32_t all = 0, rest = 0;
    if (!fine) {
        for (int i = 0; i < count; i++) all += coarse[i] = (int8_t)__builtin_rintf(x[i] * inverse);
        totals[0] = all;
        return largest / 127.0f;
    }
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

float mc_split(const float *x, int count, int8_t *coarse, int8_t *fine, int32_t *totals) {
    return split(x, count, coarse, fine, totals);
}

#define HUGE_PAGE ((size_t)1 << 21)

float *mc_room_for(size_t floats) {
    const size_t bytes = floats * sizeof(float) + 64;
    if (bytes < 2 * HUGE_PAGE) return aligned_alloc(64, (bytes + 63) / 64 * 64);
    float *room = aligned_alloc(HUGE_PAGE, (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
#ifdef MADV_HUGEPAGE
    if (room) madvise(room, bytes / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE);
#endif
    return room;
}

VERSIONS static void widen(const uint16_t *restrict bfloat16s, size_t count, float *restrict floats) {
    for (size_t i = 0; i < count; i++) floats[i] = from_bfloat16(bfloat16s[i]);
}

VERSIONS static void narrow(const float *restrict floats, size_t count, uint16_t *restrict bfloat16s) {
    for (size_t i = 0; i < count; i++) bfloat16s[i] = to_bfloat16(floats[i]);
}

#define FLOATS_AT_ONCE ((size_t)1 << 14)

typedef struct {
    const void *from;
    void *to;
    size_t count;
} Conversion;

INLINE size_t piece_of(const Conversion *c, int index) {
    const size_t left = c->count - index * FLOATS_AT_ONCE;
    return left < FLOATS_AT_ONCE ? left : FLOATS_AT_ONCE;
}

static void widen_piece(void *context, int index) {
    const Conversion *c = context;
    widen((const uint16_t *)c->from + index * FLOATS_AT_ONCE, piece_of(c, index), (float *)c->to + index * FLOATS_AT_ONCE);
}

static void narrow_piece(void *context, int index) {
    const Conversion *c = context;
    narrow((const float *)c->from + index * FLOATS_AT_ONCE, piece_of(c, index), (uint16_t *)c->to + index * FLOATS_AT_ONCE);
}

static void convert(mc_work work, Conversion c, int threads) {
    const size_t pieces = (c.count + FLOATS_AT_ONCE - 1) / FLOATS_AT_ONCE;
    mc_parallel(work, &c, (int)pieces, pieces < 4 ? 1 : threads);
}

void mc_widen(const uint16_t *bfloat16s, size_t count, float *floats, int threads) {
    convert(widen_piece, (Conversion){bfloat16s, floats, count}, threads);
}

void mc_narrow(const float *floats, size_t count, uint16_t *bfloat16s, int threads) {
    convert(narrow_piece, (Conversion){floats, bfloat16s, count}, threads);
}

int mc_bank_product(const mc_bank *bank, const float *x, const int64_t *experts, int tokens, int top_k,
                    int activation_bytes, int path, int threads, float *out) {
    return (bank->kind == TRELLIS ? mc_trellis_product : mc_affine_product)(bank, x, experts, tokens, top_k,
                                                                            activation_bytes, path, threads, out);
}

int mc_product(const mc_bank *bank, const void *x, const int64_t *experts, int bfloat16, int tokens, int top_k,
               int activation_bytes, int path, int threads, void *out) {
    if (!bfloat16) return mc_bank_product(bank, x, experts, tokens, top_k, activation_bytes, path, threads, out);
    const size_t inputs = (size_t)tokens * bank->inputs, outputs = (size_t)tokens * top_k * bank->outputs;
    float *floats = mc_room_for(inputs + outputs);
    if (!floats) return 1;
    mc_widen(x, inputs, floats, threads);
    const int failed = mc_bank_product(bank, floats, experts, tokens, top_k, activation_bytes, path, threads,
                                       floats + inputs);
    if (!failed) mc_narrow(floats + inputs, outputs, out, threads);
    free(floats);
    return failed;
}

int mc_best_path(void) {
#ifdef HAS_VECTORS
    if (__builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni")) {
#ifdef HAS_AMX
        if (mc_tiles_granted()) return AMX_TILES;
#endif
        return AVX512_VNNI;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
#ifdef HAS_NEON
    return NEON;
#endif
    return PORTABLE;
}
