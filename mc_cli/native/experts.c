/* The routed experts of a layer in one call: up projections, gates, down projections, and every token's weighted sum.
 *
 *     y_t = sum_j p_tj D_e (act(g) * u),   where (g; u) = U_e x_t,   e = experts[t k + j],   j = 0 .. k - 1
 *     act(g) = g / (1 + e^-g) (silu), or g (1 + tanh z) / 2 = g / (1 + e^-2z), z = sqrt(2 / pi) (g + 0.044715 g^3)
 *
 * U_e and D_e are matrices of two banks. Their products are those of mc_bank_product, with the errors that the files
 * of the encodings state; each rounds its inputs to bytes. All between them is float32: bfloat16 inputs and weights
 * are widened exactly, and outputs are narrowed once, at the end.
 *
 * Layout: hidden [slots][outputs of U], activated [slots][inputs of D], outputs [slots][outputs of D], of the largest
 * matrix each. Experts may differ in channels: a slot with c of them has g in the first c numbers of its row of
 * `hidden`, u in the next c, and act(g) * u in the first c of `activated`; what lies behind is not read. The row of
 * outputs of a slot without an expert is zeros. The sum grows in the row of a token's first slot.
 *
 * Rounding: e^x = 2^n e^r with n = rint(x / ln 2), so |r| is ln 2 / 2 at most and the series up to r^7 leaves less
 * than 1e-8 of e^r; n times the first part of ln 2, 355 / 512, takes 16 bits and is exact. Some roundings of float32
 * remain: less than 2e-7 of e^x in all. A token's sum is taken in the order of its slots: each term is rounded k times
 * at most, so its error is up to k 2^-24 sum_j |p_tj d_tj| to first order, d_tj the output of slot j.
 *
 * Gates are a piece of work per slot, sums one per token: threads change nothing. Processors that multiply and add
 * with one rounding may differ from others in the last bits. */

#include "product.h"
#include "threads.h"

#include <stdlib.h>

/* Gates' activations, as kernels/bank.py names them. */
enum { SILU = 0, GELU_TANH = 1 };

#define FLOATS_PER_THREAD (1 << 15)

/* e^x to 2e-7 of itself, between e^-87 and e^88; of NaN, NaN. Without branches, so that many at once are vectors. */
INLINE float exponential(float x) {
    x = x > 88.0f ? 88.0f : x < -87.0f ? -87.0f : x;
    const float twos = x == x ? __builtin_rintf(x * 1.44269504f) : 0.0f;
    const float r = (x - twos * 0.693359375f) + twos * 2.12194440e-4f; /* ln 2 in two parts, the first one exact */
    float sum = 1.0f / 5040;
    sum = sum * r + 1.0f / 720;
    sum = sum * r + 1.0f / 120;
    sum = sum * r + 1.0f / 24;
    sum = sum * r + 1.0f / 6;
    sum = sum * r + 0.5f;
    sum = sum * r + 1.0f;
    sum = sum * r + 1.0f;
    const int32_t bits = ((int32_t)twos + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return sum * power;
}

/* out [count] = act(gate) * up, with gate the first and up the second `count` of what an up projection gave. */
VERSIONS static void gate(const float *restrict both, int count, int activation, float *restrict out) {
    const float *restrict up = both + count;
    if (activation == SILU)
        for (int i = 0; i < count; i++) out[i] = both[i] / (1.0f + exponential(-both[i])) * up[i];
    else /* (1 + tanh(y)) / 2 is 1 / (1 + e^-2y) */
        for (int i = 0; i < count; i++) {
            const float x = both[i], twice = 1.5957691216f * (x + 0.044715f * x * x * x);
            out[i] = x / (1.0f + exponential(-twice)) * up[i];
        }
}

/* The first of rows [top_k][count] becomes the sum of all, each times its weight. */
VERSIONS static void weighted_sum(float *restrict rows, const float *weights, int top_k, int count) {
    for (int i = 0; i < count; i++) rows[i] *= weights[0];
    for (int slot = 1; slot < top_k; slot++) {
        const float *restrict row = rows + (size_t)slot * count;
        for (int i = 0; i < count; i++) rows[i] += weights[slot] * row[i];
    }
}

typedef struct {
    const mc_bank *up, *down;
    const int64_t *experts;
    const void *x;
    const float *hidden, *weights;
    void *out;
    float *activated, *outputs;
    int inner, outer, top_k, activation, bfloat16;
} Layer;

/* If one of the two matrices is missing, the other one may be longer than a row; it multiplies zeros. */
static void gate_slot(void *context, int slot) {
    const Layer *l = context;
    const int channels = mc_shape_of(l->down, l->experts[slot]).inputs;
    float *activated = l->activated + (size_t)slot * l->inner;
    if (mc_shape_of(l->up, l->experts[slot]).outputs)
        gate(l->hidden + (size_t)slot * l->up->outputs, channels, l->activation, activated);
    else memset(activated, 0, (size_t)channels * sizeof(float));
}

static void sum_token(void *context, int token) {
    const Layer *l = context;
    const size_t first = (size_t)token * l->top_k, outer = (size_t)l->outer;
    float *sum = l->outputs + first * outer;
    weighted_sum(sum, l->weights + first, l->top_k, l->outer);
    if (l->bfloat16) mc_narrow(sum, outer, (uint16_t *)l->out + (size_t)token * outer, 1);
    else memcpy((float *)l->out + (size_t)token * outer, sum, outer * sizeof(float));
}

static int threads_for(size_t floats, int threads) { return floats < 2 * FLOATS_PER_THREAD ? 1 : threads; }

/* All but the conversion of inputs; l->x and l->weights are float32. */
static int run_layer(Layer *l, int tokens, int activation_bytes, int path, int threads) {
    const size_t slots = (size_t)tokens * l->top_k;
    float *hidden = mc_room_for(slots * l->up->outputs);
    if (!hidden) return 1;
    int failed = mc_bank_product(l->up, l->x, l->experts, tokens, l->top_k, activation_bytes, path, threads, hidden);
    l->hidden = hidden;
    l->activated = failed ? NULL : mc_room_for(slots * l->inner);
    failed |= !l->activated;
    if (!failed) mc_parallel(gate_slot, l, (int)slots, threads_for(slots * l->inner, threads));
    free(hidden);
    l->outputs = failed ? NULL : mc_room_for(slots * l->outer);
    failed |= !l->outputs;
    if (!failed)
        failed = mc_bank_product(l->down, l->activated, l->experts, (int)slots, 1, activation_bytes, path, threads,
                                 l->outputs);
    free(l->activated);
    if (!failed) mc_parallel(sum_token, l, tokens, threads_for(slots * l->outer, threads));
    free(l->outputs);
    return failed;
}

int mc_experts(const mc_bank *up, const mc_bank *down, const void *x, const int64_t *experts, const void *weights,
               int bfloat16, int tokens, int top_k, int activation, int activation_bytes, int path, int threads,
               void *out) {
    Layer l = {.up = up, .down = down, .experts = experts, .x = x, .weights = weights, .out = out,
               .inner = down->inputs, .outer = down->outputs, .top_k = top_k, .activation = activation,
               .bfloat16 = bfloat16};
    if (!bfloat16) return run_layer(&l, tokens, activation_bytes, path, threads);
    const size_t inputs = (size_t)tokens * up->inputs, slots = (size_t)tokens * top_k;
    float *floats = mc_room_for(inputs + slots);
    if (!floats) return 1;
    mc_widen(x, inputs, floats, threads);
    mc_widen(weights, slots, floats + inputs, threads);
    l.x = floats;
    l.weights = floats + inputs;
    const int failed = run_layer(&l, tokens, activation_bytes, path, threads);
    free(floats);
    return failed;
}
