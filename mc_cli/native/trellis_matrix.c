/* Matrices of trellis codes as numbers, in the basis of rotated inputs, for products of the library: level times scale
 * times unit, in float32. Decoding gives whole bytes, the same ones by every path, and both factors are one number per
 * output. */
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
