/* Products with affine grids: how the work is divided. The head of affine_portable.c says what is computed, and why it
 * is exact; the head of a path's file says how that path does it.
 *
 * First every token becomes bytes: for each of its groups, up to the last that one of its matrices has, a step, a
 * coarse and a fine part, with zeros behind a group's end up to a multiple of 64. Slots are sorted by matrix, so that
 * a task is one matrix and its places. Paths with blocks lay the tokens of large tasks out in 16s. Then each piece of
 * work is 64 outputs of one task. */
#include "affine.h"
#include "threads.h"

#define TOKENS_AT_ONCE 8 /* quantized in a piece of work */

static const AffinePath *const paths[] =
    BY_PATH(&mc_affine_portable, &mc_affine_avx2, &mc_affine_portable, &mc_affine_avx512, &mc_affine_amx);

const AffinePath *mc_affine_path(int path) { return paths[known_path(path)]; }

/* Groups of a token's inputs that its matrices read. */
static int groups_read(const AffineProduct *p, int token) {
    int64_t most = 0;
    for (int slot = token * p->top_k; slot < (token + 1) * p->top_k; slot++) {
        if (p->sorted.places[slot] < 0) continue;
        const int64_t inputs = p->entries[p->experts ? p->experts[slot] : 0].inputs;
        most = inputs > most ? inputs : most;
    }
    return (int)most / p->group;
}

static void quantize_tokens(void *context, int piece) {
    AffineProduct *p = context;
    for (int token = piece * TOKENS_AT_ONCE; token < p->tokens && token < (piece + 1) * TOKENS_AT_ONCE; token++) {
        int8_t *coarse = p->rows + 2 * (size_t)token * p->stride, *fine = coarse + p->stride;
        float *steps = p->steps + (size_t)token * p->room, *totals = p->totals + (size_t)token * p->room;
        const int groups = groups_read(p, token);
        for (int g = 0; g < groups; g++) {
            int32_t sums[2];
            steps[g] = mc_split(p->x + (size_t)token * p->inputs + (size_t)g * p->group, p->group,
                                coarse + g * p->pitch, p->activation_bytes > 1 ? fine + g * p->pitch : NULL, sums);
            totals[g] = steps[g] * ((float)sums[0] + (float)sums[1] / FINE);
        }
        int16_t *wide = p->wide ? p->wide + (size_t)token * p->groups * p->pitch : NULL;
        for (size_t i = 0; wide && i < groups * p->pitch; i++) wide[i] = (int16_t)((int)FINE * coarse[i] + fine[i]);
    }
}

/* Some outputs of one expert, for its places. */
static void multiply_rows(void *context, int index) {
    AffineProduct *p = context;
    const mc_task *task = mc_task_of(&p->sorted, index);
    const AffineMatrix m = affine_matrix(p->entries + task->matrix, p->group);
    const int first = (index - task->piece) * ROWS_AT_ONCE;
    const int last = first + ROWS_AT_ONCE < m.outputs ? first + ROWS_AT_ONCE : m.outputs;
    if (p->path->multiply(p, &m, (int)(task - p->sorted.tasks), first, last)) atomic_store(&p->failed, 1);
}

int mc_affine_product(const mc_bank *bank, const float *x, const int64_t *experts, int tokens, int top_k,
                      int activation_bytes, int path, int threads, float *out) {
    const int slots = tokens * top_k, inputs = bank->inputs, group = bank->group;
    const size_t pitch = whole((size_t)group, VECTOR), groups = (size_t)(inputs / group);
    AffineProduct p = {.x = x, .experts = experts, .entries = bank->affine, .out = out, .tokens = tokens,
                       .top_k = top_k, .inputs = inputs, .outputs = bank->outputs, .group = group,
                       .groups = (int)groups, .activation_bytes = activation_bytes, .path = mc_affine_path(path),
                       .pitch = pitch, .stride = groups * pitch + VECTOR, .room = whole(groups, FLOATS)};
    const int failed = mc_sort_slots(&p.sorted, bank, experts, slots, ROWS_AT_ONCE);
    threads = mc_threads_for(&p.sorted, threads);
    const size_t bytes = 2 * (size_t)tokens * p.stride;
    p.rows = aligned_alloc(VECTOR, whole(bytes + 1, VECTOR));
    const size_t wide_bytes = p.path->wide ? (size_t)tokens * groups * pitch * sizeof(int16_t) : 0;
    p.wide = wide_bytes ? aligned_alloc(VECTOR, wide_bytes) : NULL;
    p.steps = calloc((size_t)tokens * p.room + 1, sizeof(float));
    p.totals = calloc((size_t)tokens * p.room + 1, sizeof(float));
    atomic_init(&p.failed, failed || !p.rows || !p.steps || !p.totals || (wide_bytes && !p.wide));
    if (!atomic_load(&p.failed)) {
        memset(p.rows, 0, bytes);
        mc_clear_rest(&p.sorted, bank, slots, out);
        mc_parallel(quantize_tokens, &p, (tokens + TOKENS_AT_ONCE - 1) / TOKENS_AT_ONCE, threads);
        if (p.path->block_tokens && p.path->prepare_blocks(&p, slots, threads)) atomic_store(&p.failed, 1);
        if (!atomic_load(&p.failed)) mc_parallel(multiply_rows, &p, p.sorted.pieces, threads);
    }
    free(p.tiled);
    free(p.block_grids);
    free(p.blocks);
    free(p.first_blocks);
    free(p.rows);
    free(p.wide);
    free(p.steps);
    free(p.totals);
    mc_free_slots(&p.sorted);
    return atomic_load(&p.failed);
}
