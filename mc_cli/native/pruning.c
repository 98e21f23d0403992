/* The choice of a token's experts that are computed, in one call: keep scores as policies/odp.py, policies/otp.py and
 * policies/dualsparse.py define them, then the rule that all policies share; behind them, mc_share_slots makes one slot
 * of those that run one expert. By falling weight w_0 >= w_1 >= .., ties in the order of slots:
 *
 *     share    s_r = w_r / (w_0 + .. + w_r)
 *     odp      score_r = max_{q >= r} s_q, infinite where |hidden|_1 * received is `protect_at` or more. The loop that
 *              skips the last rank while its share is under t stops at the first share that is not: it skips r where
 *              all s_q with q >= r are under t, so where score_r is. One maximum from the end stands for the loop.
 *     otp      logits l_r of keeping r + 1 experts: l_0 = 0, and l_r = l_{r-1} + <v_r, hidden> / |hidden|_2 +
 *              <u_r, (log s_1, .., log s_{k-1})> + bias_r, with shares of `least_share` at least;
 *              score_r = log sum_{q >= r} e^l_q - log sum_{q < r} e^l_q, the log-odds of keeping more than r experts;
 *              infinite for r = 0.
 *     halves   score_r = w_r / (w_0 + .. + w_{k-1}) + margin; a slot that stays, and of which that share less the margin
 *              is below the threshold, runs its expert's first block alone; the best slot runs whole.
 *     rule     slots with a score at or above the threshold stay, and so does the first slot of largest weight; what is
 *              left is scaled to the sum of all weights where that is wanted.
 *
 * Layout: slots are [tokens][k]; row r - 1 of `router` is v_r, then u_r. One thread takes token after token, as it is
 * done before a second one would wake, and all processors have this path.
 *
 * Rounding: a sum over n features is 16 float32 sums side by side and then theirs, an order that vectors do not
 * change. Each term is rounded n / 16 + 32 times at most, so to first order the error is up to (n / 16 + 32) 2^-24 of
 * the sum of magnitudes. Running sums of weights and of logits are doubles. Torch adds in another order: scores agree
 * but for the last places, and only a slot with a score that close to the threshold may be decided otherwise. Sources:
 * Huang et al. 2024, arXiv:2410.06270 (odp); Huang et al. 2025, arXiv:2510.10962 (otp); arXiv:2508.18376 (halves). */

#include "product.h"

#include <float.h>
#include <math.h>

#define LANES 16       /* sums side by side, which a compiler may put into vectors */
#define MOST_SLOTS 256 /* a token has no more; the callers see to it */

static float sum_of_magnitudes(const float *x, int n) {
    float sums[LANES] = {0}, total = 0;
    int i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int lane = 0; lane < LANES; lane++) sums[lane] += fabsf(x[i + lane]);
    for (; i < n; i++) total += fabsf(x[i]);
    for (int lane = 0; lane < LANES; lane++) total += sums[lane];
    return total;
}

static float product(const float *x, const float *y, int n) {
    float sums[LANES] = {0}, total = 0;
    int i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int lane = 0; lane < LANES; lane++) sums[lane] += x[i + lane] * y[i + lane];
    for (; i < n; i++) total += x[i] * y[i];
    for (int lane = 0; lane < LANES; lane++) total += sums[lane];
    return total;
}

/* order[r]: the slot of rank r by falling weight, ties in slot order; shares[r]: its weight over that of ranks 0..r. */
static void rank_slots(const float *weights, int k, int *order, float *shares) {
    for (int slot = 0; slot < k; slot++) {
        int place = slot;
        for (; place > 0 && weights[order[place - 1]] < weights[slot]; place--) order[place] = order[place - 1];
        order[place] = slot;
    }
    double kept = 0;
    for (int rank = 0; rank < k; rank++) {
        kept += weights[order[rank]];
        shares[rank] = weights[order[rank]] / fmaxf((float)kept, FLT_MIN);
    }
}

/* The slots that are decided about, token after token. */
typedef struct {
    const int64_t *index;  /* [tokens][k] */
    const float *weights;  /* [tokens][k] */
    int64_t *kept_index;   /* [tokens][k], `absent` where a slot is skipped */
    float *kept_weights;   /* [tokens][k], 0 there */
    float threshold;
    int k, absent, renormalise; /* kept weights are scaled to the sum of all */
} Slots;

/* Keeps the slots of a token with a score at or above the threshold, and the first one with the largest weight. */
static void keep_slots(const Slots *s, int64_t token, const float *scores) {
    const float *weights = s->weights + token * s->k;
    float *kept = s->kept_weights + token * s->k, total = 0, remaining = 0;
    int best = 0;
    for (int slot = 1; slot < s->k; slot++)
        if (weights[slot] > weights[best]) best = slot;
    for (int slot = 0; slot < s->k; slot++) {
        const int keep = slot == best || scores[slot] >= s->threshold;
        s->kept_index[token * s->k + slot] = keep ? s->index[token * s->k + slot] : s->absent;
        kept[slot] = weights[slot] * (keep ? 1.0f : 0.0f); /* a product, so that no NaN gets lost */
        total += weights[slot];
        remaining += kept[slot];
    }
    const float scale = total / (remaining == 0 ? 1 : remaining);
    for (int slot = 0; s->renormalise && slot < s->k; slot++) kept[slot] *= scale;
}

int mc_keep_by_share(const float *hidden, const float *received, float uniform, float protect_at, int features,
                     const int64_t *index, const float *weights, float threshold, int tokens, int k, int absent,
                     int renormalise, int64_t *kept_index, float *kept_weights) {
    const Slots s = {index, weights, kept_index, kept_weights, threshold, k, absent, renormalise};
    int order[MOST_SLOTS];
    float shares[MOST_SLOTS], scores[MOST_SLOTS];
    for (int64_t token = 0; token < tokens; token++) {
        const float norm = hidden ? sum_of_magnitudes(hidden + token * features, features) : 0;
        const int spared = hidden && norm * (received ? received[token] : uniform) >= protect_at;
        float most = spared ? INFINITY : -INFINITY;
        rank_slots(weights + token * k, k, order, shares);
        for (int rank = k - 1; rank >= 0; rank--) scores[order[rank]] = most = fmaxf(most, shares[rank]);
        keep_slots(&s, token, scores);
    }
    return 0;
}

int mc_keep_halves(float margin, const int64_t *index, const float *weights, float threshold, int tokens, int k,
                   int absent, int renormalise, int64_t *kept_index, float *kept_weights) {
    const Slots s = {index, weights, kept_index, kept_weights, threshold, k, absent, renormalise};
    float shares[MOST_SLOTS], scores[MOST_SLOTS];
    for (int64_t token = 0; token < tokens; token++) {
        const float *row = weights + token * k;
        int64_t *kept = kept_index + token * k;
        int best = 0;
        float total = 0;
        for (int slot = 0; slot < k; slot++) total += row[slot];
        for (int slot = 0; slot < k; slot++) {
            if (row[slot] > row[best]) best = slot;
            shares[slot] = row[slot] / fmaxf(total, FLT_MIN);
            scores[slot] = shares[slot] + margin;
        }
        keep_slots(&s, token, scores);
        for (int slot = 0; slot < k; slot++)
            if (slot != best && !(shares[slot] - margin >= threshold) && kept[slot] < absent) kept[slot] += absent + 1;
    }
    return 0;
}

/* log(sum(exp(x))) */
static double log_sum(const double *x, int n) {
    double most = x[0], sum = 0;
    for (int i = 1; i < n; i++) most = fmax(most, x[i]);
    for (int i = 0; i < n; i++) sum += exp(x[i] - most);
    return most + log(sum);
}

int mc_keep_by_router(const float *hidden, const float *router, const float *bias, float least_share, int features,
                      const int64_t *index, const float *weights, float threshold, int tokens, int k, int absent,
                      int renormalise, int64_t *kept_index, float *kept_weights) {
    const Slots s = {index, weights, kept_index, kept_weights, threshold, k, absent, renormalise};
    int order[MOST_SLOTS];
    float shares[MOST_SLOTS], scores[MOST_SLOTS];
    double logits[MOST_SLOTS];
    for (int64_t token = 0; token < tokens; token++, hidden += features) {
        rank_slots(weights + token * k, k, order, shares);
        for (int rank = 1; rank < k; rank++) shares[rank] = logf(fmaxf(shares[rank], least_share));
        const float norm = fmaxf(sqrtf(product(hidden, hidden, features)), FLT_MIN);
        logits[0] = 0;
        for (int rank = 1; rank < k; rank++) {
            const float *row = router + (int64_t)(rank - 1) * (features + k - 1);
            const float step = product(hidden, row, features) / norm + product(shares + 1, row + features, k - 1);
            logits[rank] = logits[rank - 1] + step + bias[rank - 1];
        }
        scores[order[0]] = INFINITY;
        for (int rank = 1; rank < k; rank++)
            scores[order[rank]] = (float)(log_sum(logits + rank, k - rank) - log_sum(logits, rank));
        keep_slots(&s, token, scores);
    }
    return 0;
}

/* The stored expert that a router slot runs; `absent` for a number that is none of the router's. */
static int64_t stored_expert(const int64_t *table, int64_t slot, int absent) {
    return slot < 0 || slot > absent ? absent : table[slot];
}

static float weight_at(const void *weights, int64_t place, int bfloat16) {
    return bfloat16 ? from_bfloat16(((const uint16_t *)weights)[place]) : ((const float *)weights)[place];
}

int mc_share_slots(const int64_t *table, const int64_t *index, const void *weights, int bfloat16, int tokens, int k,
                   int absent, int64_t *shared_index, void *shared_weights) {
    for (int64_t place = 0; place < (int64_t)tokens * k; place++) {
        const int64_t first = place / k * k, expert = stored_expert(table, index[place], absent);
        int again = 0;
        float sum = 0;
        for (int64_t other = first; other < first + k; other++) {
            if (stored_expert(table, index[other], absent) != expert) continue;
            again |= other < place;
            sum += weight_at(weights, other, bfloat16);
        }
        shared_index[place] = again ? absent : expert;
        if (bfloat16) ((uint16_t *)shared_weights)[place] = to_bfloat16(again ? 0 : sum);
        else ((float *)shared_weights)[place] = again ? 0 : sum;
    }
    return 0;
}
