/* Products with trellis codes: how the work is divided. The head of trellis_portable.c says what is computed, and why
 * it is exact; the head of a path's file says how that path does it.
 *
 * First every token is rotated and becomes bytes, one row of coarse and one of fine parts with one step, at a place
 * for each of its slots: those of a matrix lie side by side, so that a task is one matrix and a run of rows. A matrix
 * has its own number of inputs and its own blocks of rotation; slots of a token that agree in both share what was
 * found. Then each piece of work is one sequence of outputs of one task: block after block of weights is decoded and
 * multiplied with all rows, whose sums [rows][16][16] stay in int32 until the last block. */
#include "trellis_product.h"
#include "threads.h"

#include <stdatomic.h>

#define MORE_GROUPS 32  /* in a block for more tokens: every block costs a reading and writing of all sums */
#define MANY_GROUPS 256 /* in a block for many, whose sums do not stay in the first cache: 256 KB stay in the second */
#define TOKENS_AT_ONCE 256
#define QUANTIZED_TOGETHER 8192 /* activations in a piece of work */
#define MORE_TOKENS 3 /* tokens from which on larger blocks are faster, and tiles */

static const TrellisPath *const paths[] =
    BY_PATH(&mc_trellis_portable, &mc_trellis_avx2, &mc_trellis_neon, &mc_trellis_avx512, &mc_trellis_amx);

const TrellisPath *mc_trellis_path(int path) { return paths[known_path(path)]; }

typedef struct {
    const float *x, *signs;
    const int64_t *experts; /* NULL: all have the first matrix */
    const mc_trellis_entry *entries;
    const TrellisPath *path;
    const uint8_t *tables;
    float unit;
    float *out;
    int tokens, top_k, inputs, outputs, activation_bytes; /* inputs and outputs: the most */
    int together;    /* tokens that are quantized in a piece of work */
    size_t stride;   /* bytes of the longest row of activations; no power of two, which caches dislike */
    int8_t *rows;    /* [places][activation_bytes][stride], coarse and fine; a place is a slot, sorted by expert */
    float *steps;    /* [places] */
    int32_t *totals; /* [places][2] */
    mc_slots sorted;
    atomic_int failed;
} TrellisProduct;

INLINE int groups_of(int inputs) { return (inputs + GROUP - 1) / GROUP; }

/* Bytes of a row of so many activations with the zeros that are read behind them, and some more. */
INLINE size_t row_bytes(int inputs) { return (whole((size_t)groups_of(inputs), TILE) + TILE) * GROUP; }

INLINE const mc_trellis_entry *entry_of(const TrellisProduct *p, int slot) {
    return p->entries + (p->experts ? p->experts[slot] : 0);
}

/* An earlier slot of the token, from `first` on, whose activations are the same; -1 where there is none. */
static int slot_alike(const TrellisProduct *p, int first, int slot) {
    const mc_trellis_entry *entry = entry_of(p, slot);
    for (int earlier = slot - 1; earlier >= first; earlier--) {
        if (p->sorted.places[earlier] < 0) continue;
        const mc_trellis_entry *other = entry_of(p, earlier);
        if (other->inputs == entry->inputs && other->block == entry->block) return earlier;
    }
    return -1;
}

/* The activations of one place: those of `token`, as its matrix takes them. rotated [inputs] is scratch. */
static void quantize_token(TrellisProduct *p, const mc_trellis_entry *entry, int token, int place, float *rotated) {
    const int inputs = (int)entry->inputs;
    int8_t *row = p->rows + (size_t)p->activation_bytes * place * p->stride;
    mc_rotate(p->x + (size_t)token * p->inputs, p->signs, inputs, (int)entry->block, rotated);
    p->steps[place] = mc_split(rotated, inputs, row, p->activation_bytes > 1 ? row + p->stride : NULL,
                               p->totals + 2 * place);
    for (int i = 0; i < p->activation_bytes; i++)
        memset(row + i * p->stride + inputs, 0, row_bytes(inputs) - (size_t)inputs);
}

/* Some tokens: rotated, quantized, and put where their experts find them. */
static void quantize_tokens(void *context, int piece) {
    TrellisProduct *p = context;
    float *rotated = malloc(sizeof(float) * (size_t)p->inputs);
    if (!rotated) {
        atomic_store(&p->failed, 1);
        return;
    }
    for (int token = piece * p->together; token < p->tokens && token < (piece + 1) * p->together; token++) {
        const int first = token * p->top_k;
        for (int slot = first; slot < first + p->top_k; slot++) {
            const int place = p->sorted.places[slot];
            if (place < 0) continue;
            const int alike = slot_alike(p, first, slot), done = alike < 0 ? -1 : p->sorted.places[alike];
            if (done < 0) {
                quantize_token(p, entry_of(p, slot), token, place, rotated);
                continue;
            }
            const size_t each = (size_t)p->activation_bytes * p->stride;
            const size_t bytes = row_bytes((int)entry_of(p, slot)->inputs);
            memcpy(p->rows + place * each, p->rows + done * each, each - p->stride + bytes);
            p->steps[place] = p->steps[done];
            memcpy(p->totals + 2 * place, p->totals + 2 * done, 2 * sizeof(int32_t));
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
    size_t sum_bytes; /* size of `sums` */
    const uint16_t *scales;
    int first_output, outputs, most; /* outputs that are there; places at a time */
} Work;

/* `count` places, from `place` on, of one task. */
static void multiply_places(const TrellisProduct *p, const Work *w, int place, int count) {
    const int8_t *rows = p->rows + (size_t)p->activation_bytes * place * p->stride;
    memset(w->sums, 0, w->sum_bytes);
    for (int first = 0; first < w->s.groups; first += w->block.pitch) {
        const int some = w->s.groups - first < w->block.pitch ? w->s.groups - first : w->block.pitch;
        w->path->decode(&w->s, &w->code, first, some, w->block);
        w->path->multiply(w->block, some, rows + (size_t)first * GROUP, p->stride, p->activation_bytes * count,
                          w->sums);
    }
    for (int i = 0; i < count; i++) {
        float *out = p->out + (size_t)p->sorted.slots[place + i] * p->outputs + w->first_output;
        w->path->finish(w->sums + (size_t)p->activation_bytes * i * SUMS, p->activation_bytes,
                        p->totals + 2 * (place + i), p->steps[place + i] * p->unit, w->scales, w->outputs, out);
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
    const mc_task *task = mc_task_of(&p->sorted, index);
    const mc_trellis_entry *entry = p->entries + task->matrix;
    const int chunk = index - task->piece, length = (int)entry->length, lanes = length / PER_LANE;
    const int groups = groups_of((int)entry->inputs), planes = (int)entry->planes;
    const int few = task->count < MORE_TOKENS, first_output = chunk * length, left = (int)entry->outputs - first_output;
    const uint8_t *codes = entry->codes + (size_t)chunk * groups * planes * lanes * GROUP;
    Work w = {.path = few && p->path->for_few ? p->path->for_few : p->path,
              .s = {codes, groups, lanes, planes}, .code = code_of(p->tables, planes),
              .scales = entry->scales + first_output, .first_output = first_output,
              .most = task->count < TOKENS_AT_ONCE ? task->count : TOKENS_AT_ONCE,
              .outputs = left < length ? left : length};
    w.sum_bytes = whole((size_t)(p->activation_bytes * w.most), (size_t)w.path->rows_together) * SUMS * sizeof(int32_t);
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

int mc_trellis_product(const mc_bank *bank, const float *x, const int64_t *experts, int tokens, int top_k,
                       int activation_bytes, int path, int threads, float *out) {
    const int slots = tokens * top_k, inputs = bank->inputs;
    TrellisProduct p = {.x = x, .signs = bank->signs, .experts = experts, .entries = bank->trellis,
                        .tables = bank->tables, .unit = bank->unit, .out = out, .tokens = tokens, .top_k = top_k,
                        .inputs = inputs, .outputs = bank->outputs, .activation_bytes = activation_bytes,
                        .path = mc_trellis_path(path),
                        .together = inputs < QUANTIZED_TOGETHER ? QUANTIZED_TOGETHER / inputs : 1,
                        .stride = row_bytes(inputs)};
    const size_t room = (size_t)slots + (slots < MORE_TOKENS ? 1 : TILE); /* pairs and tiles read rows beyond the last */
    const int failed = mc_sort_slots(&p.sorted, bank, experts, slots, 0);
    threads = mc_threads_for(&p.sorted, threads);
    p.rows = malloc(activation_bytes * room * p.stride);
    p.steps = malloc(sizeof(float) * room);
    p.totals = malloc(sizeof(int32_t) * 2 * room);
    atomic_init(&p.failed, failed || !p.rows || !p.steps || !p.totals);
    if (!atomic_load(&p.failed)) {
        mc_clear_rest(&p.sorted, bank, slots, out);
        mc_parallel(quantize_tokens, &p, (tokens + p.together - 1) / p.together, threads);
        if (!atomic_load(&p.failed)) mc_parallel(multiply_sequence, &p, p.sorted.pieces, threads);
    }
    free(p.rows);
    free(p.steps);
    free(p.totals);
    mc_free_slots(&p.sorted);
    return atomic_load(&p.failed);
}
