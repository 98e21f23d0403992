/* Products with trellis codes: how the work is divided. What is computed, and why it is exact, is said at the head of
 * trellis_portable.c; a path's own way at the head of its file.
 *
 * First every token is rotated and becomes bytes, one row of coarse and one of fine parts with one step, at a place for
 * each of its slots: those of a matrix lie side by side, so that a task is one matrix and a run of rows. Then each
 * piece of work is one sequence of outputs of one task: block after block of weights is decoded and multiplied with all
 * rows, whose sums [rows][16][16] stay in int32 until the last block. */
#include "trellis_product.h"
#include "threads.h"

#include <stdatomic.h>

#define MORE_GROUPS 32  /* for more tokens: every block costs a reading and writing of all sums */
#define MANY_GROUPS 256 /* for many, whose sums do not stay in the first cache: 256 KB stay in the second */
#define TOKENS_AT_ONCE 256
#define QUANTIZED_TOGETHER 8192 /* activations in a piece of work */
#define MORE_TOKENS 3 /* from here on larger blocks are faster, and tiles */

static const TrellisPath *const paths[] =
    BY_PATH(&mc_trellis_portable, &mc_trellis_avx2, &mc_trellis_neon, &mc_trellis_avx512, &mc_trellis_amx);

const TrellisPath *mc_trellis_path(int path) { return paths[known_path(path)]; }

typedef struct {
    const float *x, *signs;
    const mc_trellis_entry *entries;
    const TrellisPath *path;
    const uint8_t *tables;
    float unit;
    float *out;
    int tokens, share, inputs, outputs, block, length, parts, chunks;
    int together;    /* tokens that are quantized in a piece of work */
    size_t stride;   /* bytes of a row of activations, zeros behind its end; no power of two, which caches dislike */
    int8_t *rows;    /* [places][parts][stride], coarse and fine; a place is a slot, those of an expert side by side */
    float *steps;    /* [places] */
    int32_t *totals; /* [places][2] */
    mc_slots sorted;
    atomic_int failed;
} TrellisProduct;

/* Some tokens: rotated, quantized, and put where their experts find them. */
static void quantize_tokens(void *context, int part) {
    TrellisProduct *p = context;
    float *rotated = malloc(sizeof(float) * (size_t)p->inputs);
    if (!rotated) {
        atomic_store(&p->failed, 1);
        return;
    }
    const int first = part * p->together;
    for (int token = first; token < p->tokens && token < first + p->together; token++) {
        int done = -1;
        for (int slot = token * p->share; slot < (token + 1) * p->share; slot++) {
            const int place = p->sorted.places[slot];
            if (place < 0) continue;
            int8_t *row = p->rows + (size_t)p->parts * place * p->stride;
            if (done < 0) {
                mc_rotate(p->x + (size_t)token * p->inputs, p->signs, p->inputs, p->block, rotated);
                int8_t *fine = p->parts > 1 ? row + p->stride : NULL;
                p->steps[place] = mc_split(rotated, p->inputs, row, fine, p->totals + 2 * place);
                for (int i = 0; i < p->parts; i++)
                    memset(row + i * p->stride + p->inputs, 0, p->stride - (size_t)p->inputs);
                done = place;
            } else {
                memcpy(row, p->rows + (size_t)p->parts * done * p->stride, (size_t)p->parts * p->stride);
                p->steps[place] = p->steps[done];
                memcpy(p->totals + 2 * place, p->totals + 2 * done, 2 * sizeof(int32_t));
            }
        }
    }
    free(rotated);
}

/* Groups in a block for a task of so many tokens. */
static int block_groups(const TrellisPath *path, int tokens) {
    if (tokens < MORE_TOKENS || !path->large_blocks) return FEW_GROUPS;
    return tokens <= TILE ? MORE_GROUPS : MANY_GROUPS;
}

/* One sequence of outputs, and the room that its product needs. */
typedef struct {
    const TrellisPath *path;
    TrellisSequence s;
    TrellisCode code;
    TrellisBlock block;
    int32_t *sums;    /* [rows, whole rows_together][16][16] */
    size_t sum_bytes; /* of it all */
    const uint16_t *scales;
    int first_output, outputs, most; /* outputs that are there; places at a time */
} Work;

/* `count` places, from `place` on, of one task. */
static void multiply_places(const TrellisProduct *p, const Work *w, int place, int count) {
    const int8_t *rows = p->rows + (size_t)p->parts * place * p->stride;
    memset(w->sums, 0, w->sum_bytes);
    for (int first = 0; first < w->s.groups; first += w->block.pitch) {
        const int some = w->s.groups - first < w->block.pitch ? w->s.groups - first : w->block.pitch;
        w->path->decode(&w->s, &w->code, first, some, w->block);
        w->path->multiply(w->block, some, rows + (size_t)first * GROUP, p->stride, p->parts * count, w->sums);
    }
    for (int i = 0; i < count; i++) {
        float *out = p->out + (size_t)p->sorted.slots[place + i] * p->outputs + w->first_output;
        w->path->finish(w->sums + (size_t)p->parts * i * SUMS, p->parts, p->totals + 2 * (place + i),
                        p->steps[place + i] * p->unit, w->scales, w->outputs, out);
    }
}

static void multiply_task(const TrellisProduct *p, const Work *w, const mc_task *task) {
    for (int i = 0; i < w->outputs; i += LANE_BYTES / 2) __builtin_prefetch(w->scales + i);
    if (w->s.lanes < LANES) /* lanes that are not there are multiplied, too */
        memset(w->block.bytes, 0, (size_t)PER_LANE * w->block.pitch * LANE_BYTES);
    if (w->path->begin) w->path->begin();
    for (int begin = 0; begin < task->count; begin += w->most)
        multiply_places(p, w, task->first + begin, task->count - begin < w->most ? task->count - begin : w->most);
    if (w->path->end) w->path->end();
}

/* One sequence of outputs of one expert, for its places. */
static void multiply_sequence(void *context, int index) {
    TrellisProduct *p = context;
    const mc_task *task = p->sorted.tasks + index / p->chunks;
    const mc_trellis_entry *entry = p->entries + task->matrix;
    const int chunk = index % p->chunks, lanes = p->length / PER_LANE, groups = (p->inputs + GROUP - 1) / GROUP;
    const int few = task->count < MORE_TOKENS, first_output = chunk * p->length;
    const uint8_t *codes = entry->codes + (size_t)chunk * groups * entry->planes * lanes * GROUP;
    Work w = {.path = few && p->path->for_few ? p->path->for_few : p->path,
              .s = {codes, groups, lanes, (int)entry->planes},
              .code = code_of(p->tables, (int)entry->planes), .scales = entry->scales + first_output,
              .first_output = first_output, .most = task->count < TOKENS_AT_ONCE ? task->count : TOKENS_AT_ONCE,
              .outputs = p->outputs - first_output < p->length ? p->outputs - first_output : p->length};
    w.sum_bytes = whole((size_t)(p->parts * w.most), (size_t)w.path->rows_together) * SUMS * sizeof(int32_t);
    if (few) {
        uint8_t bytes[PER_LANE * FEW_GROUPS * LANE_BYTES] __attribute__((aligned(64)));
        int32_t sums[2 * (MORE_TOKENS - 1) * SUMS] __attribute__((aligned(64)));
        w.block = (TrellisBlock){bytes, FEW_GROUPS};
        w.sums = sums;
        multiply_task(p, &w, task);
        return;
    }
    w.block = new_block(block_groups(w.path, task->count));
    w.sums = aligned_alloc(64, w.sum_bytes);
    if (w.block.bytes && w.sums) multiply_task(p, &w, task);
    else atomic_store(&p->failed, 1);
    free(w.block.bytes);
    free(w.sums);
}

int mc_trellis_product(const mc_bank *bank, const float *x, const int64_t *experts, int tokens, int share, int parts,
                       int path, int threads, float *out) {
    const int slots = tokens * share, inputs = bank->inputs, outputs = bank->outputs;
    const int groups = (inputs + GROUP - 1) / GROUP;
    TrellisProduct p = {.x = x, .signs = bank->signs, .entries = bank->trellis, .tables = bank->tables,
                 .unit = bank->unit, .out = out, .tokens = tokens, .share = share, .inputs = inputs, .outputs = outputs,
                        .block = bank->block,
                 .length = bank->length, .parts = parts, .path = mc_trellis_path(path),
                 .chunks = (outputs + bank->length - 1) / bank->length,
                 .together = inputs < QUANTIZED_TOGETHER ? QUANTIZED_TOGETHER / inputs : 1,
                 .stride = ((size_t)(groups + TILE - 1) / TILE * TILE + TILE) * GROUP};
    const size_t room = (size_t)slots + (slots < MORE_TOKENS ? 1 : TILE); /* pairs and tiles read rows beyond the last */
    int failed = mc_sort_slots(&p.sorted, bank, experts, slots);
    p.rows = malloc(parts * room * p.stride);
    p.steps = malloc(sizeof(float) * room);
    p.totals = malloc(sizeof(int32_t) * 2 * room);
    atomic_init(&p.failed, failed || !p.rows || !p.steps || !p.totals);
    if (!atomic_load(&p.failed)) {
        mc_clear_missing(&p.sorted, slots, outputs, out);
        mc_parallel(quantize_tokens, &p, (tokens + p.together - 1) / p.together, threads);
        if (!atomic_load(&p.failed)) mc_parallel(multiply_sequence, &p, p.sorted.count * p.chunks, threads);
    }
    free(p.rows);
    free(p.steps);
    free(p.totals);
    mc_free_slots(&p.sorted);
    return atomic_load(&p.failed);
}
