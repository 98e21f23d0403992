/* The quick search: costs of one byte, so that a vector has four times the states of the full search. */
#ifndef MC_TRELLIS_QUICK_H
#define MC_TRELLIS_QUICK_H

#include "product.h"

#define STATE_BITS 12
#define STATES (1 << STATE_BITS)
#define MOST_LEVELS 128
#define TABLE 16                       /* entries of a vpshufb's table */
#define TABLES (MOST_LEVELS / TABLE)

typedef struct {
    uint8_t cost[2][STATES] __attribute__((aligned(64)));         /* by parity of the weight */
    uint8_t places[STATES] __attribute__((aligned(64)));          /* by state: where its value is among the levels */
    uint8_t within[TABLES][STATES] __attribute__((aligned(64)));  /* places in each table; 128 where it is another's */
    uint8_t metric[MOST_LEVELS] __attribute__((aligned(64)));     /* by level: the cost of this weight's error */
    float levels[MOST_LEVELS], least, most;
    float units; /* of cost in a squared error of weight 1 */
    int count, path;
    uint8_t floor; /* what all states cost at the least */
} Quick;

/* levels: in ascending order, `count` of them; places: by state. */
void mc_quick_init(Quick *q, const float *levels, int count, const uint8_t *places, int path);

/* Costs of a first weight: of any state (overlap < 0), or of those that begin with the bits `overlap`. */
void mc_quick_begin(Quick *q, float target, float weight, int last_bits, int overlap);

/* Costs at weight n from those at weight n - 1, `bits` further on; from [STATES >> bits]: which state before was best. */
void mc_quick_advance(Quick *q, int n, int bits, float target, float weight, uint8_t *from);

/* The first of the cheapest states at weight n, of those that lie `apart` from `first` on. */
int mc_quick_cheapest(const Quick *q, int n, int apart, int first);
#endif
