/* Matrices of trellis codes as numbers, in the basis of rotated inputs, for products of the library:
 *
 *     out[o][i] = (unit * scale_o) * v_oi,    v_oi a whole level in -127 .. 127
 *
 * where v_oi is what a window of 12 bits in the sequence of output o and input i stands for: the head of
 * trellis_portable.c says how. There is no sum here, and rotating back is left to those who want it.
 *
 * Layout: codes are [sequences][groups of 4 inputs][planes][lanes][4 inputs], out is [outputs][inputs]. A piece of
 * work is a sequence of `length` outputs. Eight groups at a time the path decodes to a block of 8 KB, [16][8
 * groups][16 lanes][4], that stays in the first cache: output 16 l + k of the sequence is lane l of row k, 4 inputs
 * side by side and one group 64 bytes after the other. Row after row of `out` then takes its 32 inputs from there.
 * Lanes that a sequence lacks are not read, nor are inputs and outputs that only fill up a group or a sequence.
 *
 * Rounding: a byte is 128 + v, whole on every path, and v is exact in float32. The step `unit` * scale_o is rounded
 * once per output and its product with v once, so a value is within 2^-23 of itself, to first order. Both are single
 * multiplications in one order, in plain C for all paths: a path chooses only how windows are looked up (vpshufb,
 * vqtbl4q, vpermb or one by one), so all give the same bits, whatever the threads. Source of the codes: QTIP, Tseng et
 * al. 2024, arXiv:2406.11235; the layout and the tables are ours. */
#include "trellis_product.h"
#include "threads.h"

#include <stdatomic.h>

typedef struct {
    TrellisSequence first;
    const uint16_t *scales;
    TrellisCode code;
    float unit;
    float *out;
    const TrellisPath *path;
    int inputs, outputs, length;
    atomic_int failed;
} TrellisMatrix;

static void write_sequence(void *context, int chunk) {
    TrellisMatrix *m = context;
    TrellisSequence s = m->first;
    s.codes += (size_t)chunk * s.groups * s.planes * s.lanes * GROUP;
    const TrellisBlock block = new_block(FEW_GROUPS);
    if (!block.bytes) {
        atomic_store(&m->failed, 1);
        return;
    }
    for (int first = 0; first < s.groups; first += FEW_GROUPS) {
        const int count = s.groups - first < FEW_GROUPS ? s.groups - first : FEW_GROUPS;
        m->path->decode(&s, &m->code, first, count, block);
        const int begin = first * GROUP, end = begin + count * GROUP < m->inputs ? begin + count * GROUP : m->inputs;
        for (int i = 0; i < m->length && chunk * m->length + i < m->outputs; i++) {
            const int output = chunk * m->length + i;
            const uint8_t *row = at(block, i % PER_LANE, 0) + i / PER_LANE * GROUP;
            const float scale = m->unit * from_half(m->scales[output]);
            float *out = m->out + (size_t)output * m->inputs;
            for (int j = begin; j < end; j++)
                out[j] = scale * (float)(row[(j - begin) / GROUP * LANE_BYTES + j % GROUP] - 128);
        }
    }
    free(block.bytes);
}

int mc_trellis_matrix(const uint8_t *codes, const uint16_t *scales, const uint8_t *tables, float unit, int inputs,
                      int outputs, int length, int planes, int path, int threads, float *out) {
    TrellisMatrix m = {.first = {codes, (inputs + GROUP - 1) / GROUP, length / PER_LANE, planes}, .scales = scales,
                .code = code_of(tables, planes), .unit = unit, .out = out, .inputs = inputs,
                .outputs = outputs, .length = length, .path = mc_trellis_path(path < 0 ? mc_best_path() : path)};
    atomic_init(&m.failed, 0);
    mc_parallel(write_sequence, &m, (outputs + length - 1) / length, threads);
    return atomic_load(&m.failed);
}
