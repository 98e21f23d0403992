"""GPU kernels for products with trellis codes, in Triton; `trellis_gpu.py` launches them. Needs the package `triton`.

A weight costs a look-up, and 32 threads that look up at random in shared memory wait for about 3.5 accesses: by our
count that bounds these kernels, not the bytes of the codes. So below 4 bits one look-up gives two weights: the windows
of weights 2j and 2j + 1 of a ring overlap, together they are 12 + floor(bits) bits long, and an entry holds both levels
as bytes. A table is written to shared memory once per tile of weights, which therefore is large.

Every matrix has a row in a table on the device, TrellisEntry in native/structures.py: addresses of `codes` and
`scales`, its shape, and bytes per lane, twice its bits; 0 for a matrix that is not there. A program's weights are all
of one matrix, so it takes one branch for that width. LANES is what the sequences of all matrices have, so that the
compiler knows how far loads are apart; 0 where outputs differ, and each matrix says for itself.
The layout of codes is in encodings/trellis.py, the code in numerics/trellis.py and trellis_code.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

TABLE = tl.constexpr(1 << 12)  # a weight is decided by 12 bits
FEWEST_BYTES = tl.constexpr(2)  # a lane has 16 weights, of 1 bit at least
MOST_BYTES = tl.constexpr(10)
FIELDS = tl.constexpr(7)  # fields per matrix in the table on the device; some of their places follow
INPUTS = tl.constexpr(2)  # number of inputs
OUTPUTS = tl.constexpr(3)  # number of outputs
BLOCK = tl.constexpr(4)  # inputs that are rotated together
LENGTH = tl.constexpr(5)  # outputs of a sequence
LANE_BYTES = tl.constexpr(6)  # bytes per lane
EIGHT_BITS = tl.constexpr(0xFF)
TWO_TO_23 = tl.constexpr(0x4B000000)  # the bits of 2^23 in float32, whose lowest bits count ones
FLOAT_OF_ZERO = tl.constexpr(8388736.0)  # 2^23 + 128, which is level 0


# Decoding: from codes to levels. Weights of a tile are [groups of 4 inputs, lanes, 8 pairs, 4 inputs]. Triton's
# language knows no starred tuples, hence the sums of tuples.


@triton.jit
def _lanes_of(entry, LANES: tl.constexpr):
    """Lanes of a sequence of the matrix whose row of the table begins at `entry`."""
    return LANES if LANES > 0 else tl.load(entry + LENGTH).to(tl.int32) // 16


@triton.jit
def _next(lane, lanes):
    """The next lane of a ring; of those behind its end, any."""
    return tl.where(lane + 1 == lanes, 0, lane + 1)


@triton.jit
def _lane_bytes(codes, own, following, there, BYTES: tl.constexpr, pitch):
    """Tuple of uint8 [groups, lanes, 4]: every byte of a lane, and the first two of the next lane in its ring."""
    found = ()
    for byte in tl.static_range(BYTES):
        found = found + (tl.load(codes + own + byte * pitch, mask=there, other=0),)
    for byte in tl.static_range(2):
        found = found + (tl.load(codes + following + byte * pitch, mask=there, other=0),)
    return found


@triton.jit
def _bit_stream(lane, BYTES: tl.constexpr):
    """Tuple of int32: 32 bits from every 16th bit of a lane on."""
    halves = ()
    for half in tl.static_range((BYTES + 3) // 2):
        if 2 * half + 1 < BYTES + 2:
            halves = halves + (lane[2 * half].to(tl.int32) | (lane[2 * half + 1].to(tl.int32) << 8),)
        else:
            halves = halves + (lane[2 * half].to(tl.int32),)
    words = ()
    for word in tl.static_range((BYTES + 1) // 2):
        words = words + (halves[word] | (halves[word + 1] << 16),)
    return words


@triton.jit
def _bits(stream, first: tl.constexpr, count: tl.constexpr):
    return (stream[first // 16] >> (first % 16)) & ((1 << count) - 1)


@triton.jit
def _eight(v0, v1, v2, v3, v4, v5, v6, v7):
    """[..., 8] of eight tensors; joining in this order moves nothing between threads."""
    even = tl.join(tl.join(v0, v4), tl.join(v2, v6))
    odd = tl.join(tl.join(v1, v5), tl.join(v3, v7))
    return tl.reshape(tl.join(even, odd), [v0.shape[0], v0.shape[1], v0.shape[2], 8])


@triton.jit
def _looked_up(stream, table, FIRST: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr):
    """int32 [groups, lanes, 8, 4] of table entries: the k-th by the COUNT bits from bit FIRST + k * STEP on."""
    windows = _eight(
        _bits(stream, FIRST, COUNT),
        _bits(stream, FIRST + STEP, COUNT),
        _bits(stream, FIRST + 2 * STEP, COUNT),
        _bits(stream, FIRST + 3 * STEP, COUNT),
        _bits(stream, FIRST + 4 * STEP, COUNT),
        _bits(stream, FIRST + 5 * STEP, COUNT),
        _bits(stream, FIRST + 6 * STEP, COUNT),
        _bits(stream, FIRST + 7 * STEP, COUNT),
    )
    found = tl.gather(table, tl.reshape(windows, [windows.numel]), 0)
    return tl.permute(tl.reshape(found, windows.shape), [0, 1, 3, 2]).to(tl.int32)


@triton.jit
def _even(stream, table, BYTES: tl.constexpr):
    """int32 [groups, lanes, 8, 4] with 128 + level of weights 0, 2, ... 14 of a lane in the lowest byte."""
    return _looked_up(stream, table, 0, BYTES, 12 + BYTES // 2 if BYTES < 8 else 12)


@triton.jit
def _odd(stream, table, even, BYTES: tl.constexpr):
    """int32, as `_even`, of weights 1, 3, ... 15: already found below 4 bits, looked up above (tables hold one)."""
    return even >> 8 if BYTES < 8 else _looked_up(stream, table, BYTES // 2, BYTES, 12)


@triton.jit
def _level(found):
    """float32 level of the lowest byte, 128 + level: a conversion without the slow instruction for it."""
    return ((found & EIGHT_BITS) | TWO_TO_23).to(tl.float32, bitcast=True) - FLOAT_OF_ZERO


@triton.jit
def _table(tables, BYTES: tl.constexpr):
    """The look-up table for a width; `tables` holds them one after the other, the two of 1 and 1.5 bits first."""
    STEP: tl.constexpr = BYTES // 2 if BYTES < 8 else 0
    BEFORE: tl.constexpr = (2 << STEP) - 4 + BYTES % 2 * (1 << STEP) if BYTES < 8 else 28 + BYTES - 8  # TABLEs
    return tl.load(tables + TABLE * BEFORE + tl.arange(0, TABLE << STEP))


@triton.jit
def _in_four(values):
    """The four parts of [a, b, c, 4]."""
    even, odd = tl.split(tl.reshape(values, [values.shape[0], values.shape[1], values.shape[2], 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


# Few slots: each multiplies its matrix by its row; float32 throughout.


@triton.jit
def _added(sums, levels, x):
    """sums [groups, lanes, 8] + levels [groups, lanes, 8, 4] times x [groups, lanes, 1, 4], input after input."""
    x0, x1, x2, x3 = _in_four(x)
    w0, w1, w2, w3 = _in_four(levels)
    sums += w0 * x0
    sums += w1 * x1
    sums += w2 * x2
    sums += w3 * x3
    return sums


@triton.jit
def _sums(
    row, codes, tables, begin, end, inputs, lanes,
    BYTES: tl.constexpr, PADDED: tl.constexpr, GROUPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """float32 [PADDED * 16]: a sequence of outputs, summed over groups `begin` to `end` of 4 inputs each."""
    table = _table(tables, BYTES)
    group = tl.arange(0, GROUPS)[:, None, None]
    lane = tl.arange(0, PADDED)[None, :, None]
    place = tl.arange(0, 4)[None, None, :]
    own = group * (BYTES * lanes * 4) + lane * 4 + place
    following = group * (BYTES * lanes * 4) + _next(lane, lanes) * 4 + place
    even = tl.zeros([GROUPS, PADDED, 8], tl.float32)
    odd = tl.zeros([GROUPS, PADDED, 8], tl.float32)
    for first in tl.range(begin, end, GROUPS, num_stages=STAGES):
        there = (first + group < end) & (lane < lanes)
        here = codes + tl.cast(first, tl.int64) * (BYTES * lanes * 4)
        stored = _lane_bytes(here, own, following, there, BYTES, lanes * 4)
        at = (first + group) * 4 + place + 0 * lane
        x = tl.load(row + at, mask=(at < inputs) & there, other=0.0)
        stream = _bit_stream(stored, BYTES)
        found = _even(stream, table, BYTES)
        even = _added(even, _level(found), x[:, :, None, :])
        odd = _added(odd, _level(_odd(stream, table, found, BYTES)), x[:, :, None, :])
    return tl.reshape(tl.join(tl.sum(even, axis=0), tl.sum(odd, axis=0)), [PADDED * 16])


@triton.jit
def _matrix(experts, matrices, slot, count):
    """(row of the table, bytes per lane) of a slot's matrix; (the first one's, 0) where it has none."""
    expert = tl.load(experts + slot)
    there = (expert >= 0) & (expert < count)
    entry = matrices + tl.where(there, expert, 0) * FIELDS
    return entry, tl.where(there, tl.load(entry + LANE_BYTES), 0)


@triton.jit(do_not_specialize=["count", "units", "sequences", "steps", "steps_each", "top_k"])
def few_slots(
    rows, experts, matrices, tables, parts,
    count, units, sequences, inputs, steps, steps_each, top_k,
    LANES: tl.constexpr, PADDED: tl.constexpr, GROUPS: tl.constexpr,
    ALIGNMENT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Partial sums of every slot's product, without unit and scales.

    rows    float32 [slots / top_k, inputs], rotated
    parts   float32 [most programs of a unit, units, PADDED * 16]; a unit is a sequence of outputs of a slot
    A unit is `steps` steps of GROUPS groups of 4 inputs, some of which a smaller matrix has not. A program takes
    `steps_each` steps, wherever units begin and end, so that all are equally long; which program adds what depends on
    shapes alone, never on timing.
    """
    program = tl.program_id(0)
    step = program * steps_each
    last = tl.minimum(step + steps_each, units * steps)
    output = tl.arange(0, PADDED * 16)
    while step < last:
        # 1. the part of a unit that is this program's
        unit = step // steps
        stop = tl.minimum(last, (unit + 1) * steps)
        slot, sequence = unit // sequences, unit % sequences
        entry, lane_bytes = _matrix(experts, matrices, slot, count)
        lanes = _lanes_of(entry, LANES)
        groups = (tl.load(entry + INPUTS).to(tl.int32) + 3) // 4
        lane_bytes = tl.where(sequence * lanes * 16 < tl.load(entry + OUTPUTS), lane_bytes, 0)
        begin = (step - unit * steps) * GROUPS
        end = tl.minimum((stop - unit * steps) * GROUPS, groups)
        # 2. its weights, by the loop that is made for their width
        codes = tl.multiple_of(tl.load(entry).to(tl.pointer_type(tl.uint8)), ALIGNMENT)
        codes += tl.cast(sequence, tl.int64) * groups * lane_bytes * (lanes * 4)
        row = rows + tl.cast(slot // top_k, tl.int64) * inputs
        sums = tl.zeros([PADDED * 16], tl.float32)
        for BYTES in tl.static_range(FEWEST_BYTES, MOST_BYTES + 1):
            if lane_bytes == BYTES:
                sums = _sums(row, codes, tables, begin, end, inputs, lanes, BYTES, PADDED, GROUPS, STAGES)
        # 3. where the unit's other parts lie too
        part = program - unit * steps // steps_each
        tl.store(parts + tl.cast(part * units + unit, tl.int64) * (PADDED * 16) + output, sums)
        step = stop


@triton.jit(do_not_specialize=["count", "units", "steps", "steps_each"])
def add_parts(
    parts, experts, matrices, outputs,
    count, units, steps, steps_each, features, unit_of_levels,
    LANES: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """outputs float32 [slots, features] of what `few_slots` left, in the order of its programs; zeros if no matrix.

    Places behind a smaller matrix's outputs are left as they are.
    """
    sequence, slot = tl.program_id(0), tl.program_id(1)
    unit = slot * tl.num_programs(0) + sequence
    entry, lane_bytes = _matrix(experts, matrices, slot, count)
    lanes = _lanes_of(entry, LANES)
    output = tl.arange(0, PADDED * 16)
    sums = tl.zeros([PADDED * 16], tl.float32)
    feature = sequence * (lanes * 16) + output
    own = features if LANES > 0 else tl.load(entry + OUTPUTS)
    there = (output < lanes * 16) & (feature < own)
    if lane_bytes > 0:
        first = unit * steps // steps_each
        last = ((unit + 1) * steps - 1) // steps_each
        for part in range(last - first + 1):
            sums += tl.load(parts + tl.cast(part * units + unit, tl.int64) * (PADDED * 16) + output)
        scales = tl.load(tl.load(entry + 1).to(tl.pointer_type(tl.float16)) + feature, mask=there, other=0.0)
        sums *= scales.to(tl.float32) * unit_of_levels
    tl.store(outputs + tl.cast(slot, tl.int64) * features + feature, sums, mask=there)


# Many slots: sorted by matrix, a tile of weights is decoded once for a tile of slots.


@triton.jit
def _tile(
    float16s, codes, tables, token, token_there, first_lane, groups, inputs, lanes,
    BYTES: tl.constexpr, TILE_LANES: tl.constexpr, GROUPS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """float32 [TILE_LANES * 16, SLOTS]: products of float16 numbers, summed in float32; levels are exact in float16."""
    table = _table(tables, BYTES)
    group = tl.arange(0, GROUPS)[:, None, None]
    lane = first_lane + tl.arange(0, TILE_LANES)[None, :, None]
    place = tl.arange(0, 4)[None, None, :]
    own = group * (BYTES * lanes * 4) + lane * 4 + place
    following = group * (BYTES * lanes * 4) + _next(lane, lanes) * 4 + place
    sums = tl.zeros([TILE_LANES * 16, SLOTS], tl.float32)
    for first in range(0, groups, GROUPS):
        there = (first + group < groups) & (lane < lanes)
        here = codes + tl.cast(first, tl.int64) * (BYTES * lanes * 4)
        stored = _lane_bytes(here, own, following, there, BYTES, lanes * 4)
        at = first * 4 + tl.arange(0, GROUPS * 4)
        x = tl.load(
            float16s + token[None, :] * inputs + at[:, None],
            mask=(at < inputs)[:, None] & token_there[None, :],
            other=0.0,
        )
        stream = _bit_stream(stored, BYTES)
        found = _even(stream, table, BYTES)
        even, odd = _level(found), _level(_odd(stream, table, found, BYTES))
        levels = tl.join(even.to(tl.float16), odd.to(tl.float16))  # [groups, lanes, 8, 4, 2]
        weights = tl.reshape(tl.permute(levels, [1, 2, 4, 0, 3]), [TILE_LANES * 16, GROUPS * 4])
        sums = tl.dot(weights, x, sums)
    return sums


@triton.jit(do_not_specialize=["top_k"])
def many_slots(
    float16s, sizes, matrices, tables, order, tile_matrix, tile_begin, tile_end, outputs,
    inputs, features, top_k, unit_of_levels,
    LANES: tl.constexpr, MOST_LANES: tl.constexpr, TILE_LANES: tl.constexpr, GROUPS: tl.constexpr, SLOTS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """outputs float32 [slots, features] of those slots that have a matrix; others are left as they are.

    float16s      float16 [slots / top_k, inputs], rotated; `sizes` float32 [slots / top_k] multiply them
    order       int64 [slots], slots by matrix
    tile_matrix, tile_begin, tile_end   int64 [tiles]: a tile's matrix and its first and last + 1 place in `order`
    """
    run, tile = tl.program_id(0), tl.program_id(1)
    begin, end = tl.load(tile_begin + tile), tl.load(tile_end + tile)
    if begin >= end:
        return
    # 1. whose weights, and which slots
    TILES: tl.constexpr = (MOST_LANES + TILE_LANES - 1) // TILE_LANES
    sequence, first_lane = run // TILES, run % TILES * TILE_LANES
    entry = matrices + tl.load(tile_matrix + tile) * FIELDS
    lanes = _lanes_of(entry, LANES)
    own = tl.load(entry + OUTPUTS)
    if (first_lane >= lanes) | (sequence * lanes * 16 >= own):  # a smaller matrix
        return
    lane_bytes = tl.load(entry + LANE_BYTES)
    groups = (tl.load(entry + INPUTS).to(tl.int32) + 3) // 4
    codes = tl.multiple_of(tl.load(entry).to(tl.pointer_type(tl.uint8)), ALIGNMENT)
    codes += tl.cast(sequence, tl.int64) * groups * lane_bytes * (lanes * 4)
    place = begin + tl.arange(0, SLOTS)
    slot_there = place < end
    slot = tl.load(order + place, mask=slot_there, other=0)
    token = slot // top_k
    # 2. sums over all inputs
    sums = tl.zeros([TILE_LANES * 16, SLOTS], tl.float32)
    for BYTES in tl.static_range(FEWEST_BYTES, MOST_BYTES + 1):
        if lane_bytes == BYTES:
            sums = _tile(
                float16s, codes, tables, token, slot_there, first_lane, groups, inputs, lanes,
                BYTES, TILE_LANES, GROUPS, SLOTS,
            )  # fmt: skip
    # 3. scales of outputs and of tokens
    output = first_lane * 16 + tl.arange(0, TILE_LANES * 16)
    feature = sequence * (lanes * 16) + output
    there = (output < lanes * 16) & (feature < own)
    scales = tl.load(tl.load(entry + 1).to(tl.pointer_type(tl.float16)) + feature, mask=there, other=0.0)
    size = tl.load(sizes + token, mask=slot_there, other=0.0)
    sums *= (scales.to(tl.float32) * unit_of_levels)[:, None] * size[None, :]
    to = outputs + slot[None, :] * features + feature[:, None]
    tl.store(to, sums, mask=there[:, None] & slot_there[None, :])


# Inputs


@triton.jit
def _hadamard(values, LOG: tl.constexpr, COUNT: tl.constexpr):
    """The Hadamard transform of every 2^LOG of values [COUNT], not normalised.

    Step by step every bit of a place within its block is transformed and becomes the highest one; after LOG steps all
    are where they were.
    """
    for _ in tl.static_range(LOG):
        first, second = tl.split(tl.reshape(values, [COUNT >> LOG, (1 << LOG) // 2, 2]))
        turned = tl.join(first + second, first - second)
        values = tl.reshape(tl.permute(turned, [0, 2, 1]), [COUNT])
    return values


@triton.jit
def rotate_rows(rows, signs, rotated, inputs, scale, BLOCK: tl.constexpr, LOG: tl.constexpr, BLOCKS: tl.constexpr):
    """rotated float32 [tokens, inputs] of rows [tokens, inputs]: as `rotate` in numerics/rotation.py.

    scale   1 / sqrt(BLOCK), BLOCK = 2^LOG
    """
    token = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * (BLOCKS * BLOCK) + tl.arange(0, BLOCKS * BLOCK)
    there = place < inputs
    values = tl.load(rows + token * inputs + place, mask=there, other=0.0).to(tl.float32)
    values *= tl.load(signs + place, mask=there, other=0.0)
    values = _hadamard(values, LOG, BLOCKS * BLOCK)
    tl.store(rotated + token * inputs + place, values * scale, mask=there)


@triton.jit(do_not_specialize=["count", "top_k"])
def rotate_slots(
    rows, experts, matrices, signs, rotated,
    count, inputs, top_k,
    LEAST_LOG: tl.constexpr, MOST_LOG: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """rotated float32 [slots, inputs] of rows [slots / top_k, inputs]: each as its slot's matrix takes them.

    LEAST_LOG, MOST_LOG   blocks of all matrices are 2^LEAST_LOG to 2^MOST_LOG inputs; RUN is a multiple of them
    Behind the inputs of a smaller matrix are zeros; a slot without a matrix has nothing else.
    """
    slot = tl.program_id(0)
    place = tl.program_id(1) * RUN + tl.arange(0, RUN)
    entry, lane_bytes = _matrix(experts, matrices, slot, count)
    own = tl.where(lane_bytes > 0, tl.load(entry + INPUTS), 0)
    block = tl.load(entry + BLOCK)
    there = place < own
    row = rows + tl.cast(slot // top_k, tl.int64) * inputs
    values = tl.load(row + place, mask=there, other=0.0).to(tl.float32)
    values *= tl.load(signs + place, mask=there, other=0.0)
    turned = values
    for LOG in tl.static_range(LEAST_LOG, MOST_LOG + 1):
        if block == 1 << LOG:
            turned = _hadamard(values, LOG, RUN) * (1 / (1 << LOG) ** 0.5)
    tl.store(rotated + tl.cast(slot, tl.int64) * inputs + place, tl.where(there, turned, 0.0), mask=place < inputs)


@triton.jit
def rows_to_float16(rotated, float16s, sizes, inputs, RUN: tl.constexpr):
    """float16s float16 [tokens, inputs], from -1 to 1, and sizes float32 [tokens]: their product is `rotated`."""
    token = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, RUN)
    largest = tl.zeros([RUN], tl.float32)
    for first in range(0, inputs, RUN):
        values = tl.load(rotated + token * inputs + first + place, mask=first + place < inputs, other=0.0)
        largest = tl.maximum(largest, tl.abs(values))
    size = tl.max(largest, axis=0)
    size = tl.where(size > 0, size, 1.0)
    for first in range(0, inputs, RUN):
        there = first + place < inputs
        values = tl.load(rotated + token * inputs + first + place, mask=there, other=0.0)
        tl.store(float16s + token * inputs + first + place, (values / size).to(tl.float16), mask=there)
    tl.store(sizes + token, size)
