"""Trellis codes: sequences of weights whose code words overlap, so that few bits choose among many values.

A sequence of T weights at rate R (bits per weight) is a ring of T * R bits. The 12 bits from bit floor(i * R) on, the
window of weight i, decide its value: `code_values(R)[window]`, first bit lowest. Neighbouring windows share bits, so a
search over the whole sequence (Viterbi) finds values far closer to normally distributed weights than R bits each could:
    rate                               1    1.5      2    2.5      3    3.5      4    4.5      5
    mean squared error, variance 1  .2713  .1387  .0702  .0358  .0182  .0093  .0050  .0028  .0017
    best grid of 2^R levels         .3634    -    .1175    -    .0345    -    .0095    -    .0025
    no code can be below            .2500  .1250  .0625  .0313  .0156  .0078  .0039  .0020  .0010
`trellis_code.py` says which value a window stands for.
Source of the idea: QTIP, Tseng et al. 2024, arXiv:2406.11235 (bit-shift trellis, tail-biting).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

from mc_cli import native
from mc_cli.errors import McError, ShapeError
from mc_cli.numerics.trellis_code import STATE_BITS, code_values

LARGEST_RATE = 5
_MOST_LEVELS = 128  # as in native/trellis_search.h
_TRIALS = 3  # bits across the seam that are tried beside those which the best path begins with
_WARM_UP = 48  # weights before the seam from which every state has its cost at a ring's first weight
PIECE = 32  # weights between two looks at the errors so far, where errors are fed back; as in native/trellis.c
_UNSETTLED = 12  # weights before such a look whose codes are still likely to change; as in native/trellis.c
_SEQUENCES_AT_ONCE = {"cpu": 256, "cuda": 2048}  # torch search; on a GPU up to 1 GB of choices, for few launches


def offsets(length: int, rate: Fraction) -> Tensor:
    """int64 [length]: the first bit of every weight's window."""
    return torch.arange(length) * rate.numerator // rate.denominator


def check_rate(length: int, rate: Fraction) -> None:
    """Raises ShapeError unless sequences of `length` weights at `rate` fill whole bytes and steps are 1 to 5 bits."""
    bits = length * rate
    if not 1 <= rate <= LARGEST_RATE or bits.denominator != 1 or bits % 8 or bits < STATE_BITS:
        raise ShapeError(f"sequences of {length} weights cannot have {float(rate):g} bits each")


def encode(
    targets: Tensor,
    rate: Fraction,
    weights: Tensor | None = None,
    table: Tensor | None = None,
    *,
    quick: bool = False,
) -> tuple[Tensor, Tensor]:
    """(codes uint8 [sequences, length * rate / 8], values float32 [sequences, length]) of least squared error.

    targets  float32 [sequences, length]
    weights  float32 like targets, of each squared error; None for ones
    table    float32 [4096], the value of every window, for trials of other codes; None for the code of that rate
    quick    costs are bytes (native/trellis_quick.c): about twice as fast, for squared errors of about a percent more.
             Only the compiled search knows it: torch's is the full one
    The bits that cross the seam of the ring are chosen first, from the weights around it; given them the search is
    exact. Compiled on a CPU; torch where the compiled routines are missing, and on a GPU.
    """
    grouped = None if weights is None else weights[:, None]
    codes, values = encode_together(targets[:, None], rate, grouped, None, table, quick=quick)
    return codes[:, 0], values[:, 0]


def encode_together(
    targets: Tensor,
    rate: Fraction,
    weights: Tensor | None,
    feedback: Tensor | None,
    table: Tensor | None = None,
    *,
    quick: bool = False,
) -> tuple[Tensor, Tensor]:
    """(codes uint8 [groups, rings, length * rate / 8], values float32 like targets), rings after rings in a group.

    targets   float32 [groups, rings, length]
    weights   float32 like targets, of each squared error; None for ones
    feedback  float32 [groups, rings * length, rings * length]: what a unit of error (value minus target) of one weight,
              a row, takes from the target of one after it, a column; None for nothing
    table     as in `encode`
    Every PIECE weights of a ring the best path so far says what the errors are; the last ones, whose codes are not
    settled, count from the next look on. Entries of `feedback` that would be needed sooner are not used.
    Without feedback, and with the bits that cross a ring's seam chosen from the weights around it, the search is exact.
    """
    check_rate(targets.shape[-1], rate)
    if is_compiled(targets):
        return _encode_compiled(targets, rate, weights, feedback, table, quick)
    at_once = _SEQUENCES_AT_ONCE.get(targets.device.type, 256)
    parts = [
        encode_in_torch(
            targets[some],
            rate,
            None if weights is None else weights[some],
            None if feedback is None else feedback[some],
            table,
        )
        for start in range(0, len(targets), at_once)
        for some in [slice(start, start + at_once)]
    ]
    return torch.cat([codes for codes, _ in parts]), torch.cat([values for _, values in parts])


def decode(codes: Tensor, rate: Fraction) -> Tensor:
    """float32 [..., length], the values of codes uint8 [..., length * rate / 8], on any device."""
    return code_values(rate).to(codes.device)[decode_windows(codes, rate)]


def decode_windows(codes: Tensor, rate: Fraction) -> Tensor:
    """int32 [..., length], the window of every weight."""
    size = codes.shape[-1]
    length = int(size * 8 / rate)
    start = offsets(length, rate).to(codes.device)
    window = torch.zeros((*codes.shape[:-1], length), dtype=torch.int32, device=codes.device)
    for place in range(3):  # a window of 12 bits touches at most 3 bytes
        window |= codes[..., ((start >> 3) + place) % size].int() << (8 * place)
    return (window >> (start & 7).int()) & ((1 << STATE_BITS) - 1)


# The search, compiled


def is_compiled(targets: Tensor) -> bool:
    """Whether the compiled search serves for tensors that lie where `targets` does."""
    return targets.device.type == "cpu" and native.library() is not None


def encode_panel(
    targets: Tensor,
    first: int,
    rate: Fraction,
    *,
    factor: Tensor | None,
    scales: Tensor | None,
    members: Tensor,
    rings: int,
    weights: Tensor | None,
    feedback: Tensor | None,
    codes: Tensor,
    values: Tensor,
    errors: Tensor | None,
    path: int = -1,
    table: Tensor | None = None,
    quick: bool = False,
) -> None:
    """Codes inputs `first` to first + n - 1 of a batch of matrices in turn, each with its share of the earlier errors.

    targets   float32 [B, n, out], less what inputs before `first` owe
    factor    float32 [B or 1, in, in], of the damped inverse Hessian, as in `propagate_errors`; None: nothing is owed
    scales    float32 [B, out]: what targets are divided by and values stand for; None for ones
    members   int64 [groups, rings * length]: the outputs that are coded together, as `encode_together` does
    weights   float32 [B, groups, rings * length], of each squared error; None for ones
    feedback  float32 [B, groups, rings * length, rings * length] as in `encode_together`; None for nothing
    codes     uint8 [B, out / length, in, length * rate / 8], filled in for these inputs
    values    float32 [B, in, out], likewise, in units of the scales
    errors    float32 [B, in, out], likewise: targets less what is owed and what the values stand for, over the factor's
              diagonal. None where there is no factor
    path      of the processor, as in `kernels/trellis.py`; -1 for the best
    table, quick  as in `encode`
    """
    batch, count, outputs = targets.shape
    groups, rows = members.shape
    length = rows // rings
    check_rate(length, rate)
    assert codes.is_contiguous() and values.is_contiguous() and (errors is None or errors.is_contiguous())
    if factor is not None and factor.stride(0) == 0:
        factor = factor[:1]
    levels, places = _levels(rate, table) if quick else (None, None)
    given = {"targets": targets, "factor": factor, "scales": scales, "members": members, "weights": weights}
    given |= {"feedback": feedback, "values": code_values(rate) if table is None else table}
    given |= {"levels": levels, "places": places}
    kept = {name: None if tensor is None else tensor.contiguous() for name, tensor in given.items()}
    shape = {"batch": batch, "first": first, "count": count, "inputs": values.shape[1], "outputs": outputs}
    failed = native.routine("mc_trellis_encode")(
        **{name: _address(tensor) for name, tensor in kept.items()},
        factors=1 if factor is None else len(factor),
        **shape,
        groups=groups,
        rings=rings,
        length=length,
        numerator=rate.numerator,
        denominator=rate.denominator,
        level_count=0 if levels is None else len(levels),
        path=path,
        threads=torch.get_num_threads(),
        codes=codes.data_ptr(),
        decoded=values.data_ptr(),
        errors=_address(errors),
    )
    if failed:
        raise McError(f"No memory left for the trellis search of sequences of {length} weights.")


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _levels(rate: Fraction, table: Tensor | None) -> tuple[Tensor, Tensor]:
    """(float32 [n], the different values in ascending order; uint8 [4096], by window, which of them it stands for).

    Raises ShapeError where the quick search has no room for so many.
    """
    if table is None:
        return _levels_of_rate(rate)
    levels, places = torch.unique(table, return_inverse=True)
    if len(levels) > _MOST_LEVELS:
        raise ShapeError(
            f"the quick search takes tables of up to {_MOST_LEVELS} different values, this one has {len(levels)}"
        )
    return levels, places.to(torch.uint8)


@functools.cache
def _levels_of_rate(rate: Fraction) -> tuple[Tensor, Tensor]:
    return _levels(rate, code_values(rate))


def _encode_compiled(
    targets: Tensor,
    rate: Fraction,
    weights: Tensor | None,
    feedback: Tensor | None,
    table: Tensor | None,
    quick: bool,
) -> tuple[Tensor, Tensor]:
    batch, rings, length = targets.shape
    codes = torch.empty((batch, rings, 1, int(length * rate) // 8), dtype=torch.uint8)
    values = torch.empty((batch, 1, rings * length))
    encode_panel(
        targets.flatten(1)[:, None],
        0,
        rate,
        factor=None,
        scales=None,
        members=torch.arange(rings * length)[None],
        rings=rings,
        weights=weights,
        feedback=feedback,
        codes=codes,
        values=values,
        errors=None,
        table=table,
        quick=quick,
    )
    return codes[:, :, 0], values.view(targets.shape)


# The search, in torch: states are windows with the first bit highest, so a step of k bits shifts a state to the left.


def encode_in_torch(
    targets: Tensor, rate: Fraction, weights: Tensor | None, feedback: Tensor | None, table: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`encode_together` on any device, all groups side by side."""
    _, rings, length = targets.shape
    weights = torch.ones_like(targets) if weights is None else weights
    by_window = (code_values(rate) if table is None else table).to(targets.device)
    by_state = by_window[_reversed_bits().to(targets.device)]
    wanted = targets.flatten(1)
    aim, fed = wanted.clone(), torch.zeros_like(wanted)
    codes, values = [], []
    for first in range(0, rings * length, length):
        ring = slice(first, first + length)

        def look(found: Tensor, settled: int, place: int, first: int = first) -> None:
            """Brings the targets from `place` of this ring on up to the errors of its first `settled` values."""
            assert feedback is not None
            here, later = slice(first, first + settled), slice(first + place, None)
            error = found[:, :settled] - wanted[:, here]
            aim[:, later] -= torch.bmm((error - fed[:, here])[:, None], feedback[:, here, later])[:, 0]
            fed[:, here] = error

        def search(overlap: Tensor | None, ring: slice = ring, first: int = first) -> tuple[Tensor, Tensor, Tensor]:
            """`_ring_states` of every group's ring, its errors fed back."""
            looked_at = None if feedback is None else look
            found = _ring_states(aim[:, ring], weights[:, first // length], rate, by_state, looked_at, overlap)
            if feedback is not None:
                look(by_state[found[0]], length, length)
            return found

        before = aim.clone(), fed.clone()
        states, closed, begins = search(None)
        if not bool(closed.all()):
            once = states, aim.clone(), fed.clone()
            aim.copy_(before[0])
            fed.copy_(before[1])
            again = search(begins)[0], aim, fed
            states, *moved = (torch.where(closed[:, None], *pair) for pair in zip(once, again, strict=True))
            aim.copy_(moved[0])
            fed.copy_(moved[1])
        values.append(by_state[states])
        codes.append(_packed(_reversed_bits().to(states.device)[states], rate))
    return torch.stack(codes, 1), torch.stack(values, 1)


def _ring_states(
    aim: Tensor,
    weights: Tensor,
    rate: Fraction,
    values: Tensor,
    look: Callable[[Tensor, int, int], None] | None,
    overlap: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(int64 [groups, length], bool [groups], int64 [groups]): the best states, whether they close, and their seam.

    aim      [groups, length], the targets;  values [states]
    look     moves targets on the way: (values so far, how many of them are settled, weights so far)
    overlap  [groups], the bits across the seam, with which the states then begin and end. None: those with which the
             best path begins; as long as that to a state which ends with them begins with others, three times, these
    """
    length = aim.shape[-1]
    steps = _steps(length, rate)
    path = _Path(values, steps, overlap)
    if overlap is None:
        for place in range(max(0, length - _WARM_UP), length):
            path.advance(place, aim, weights)
        path.forget()
    for place in range(length):
        if look is not None and place and place % PIECE == 0:
            look(values[path.trace_back()], place - _UNSETTLED, place)
        path.advance(place, aim, weights)
    first = path.trace_back()[:, 0] >> steps[-1] if overlap is None else overlap
    seam = first
    for _ in range(1 + _TRIALS):
        states = path.trace_back(seam)
        begins = states[:, 0] >> steps[-1]
        closed = begins == seam
        if bool(closed.all()):
            break
        seam = begins
    return states, closed, first


class _Path:
    """The best paths to every state along consecutive places of a ring, for many rings side by side."""

    def __init__(self, values: Tensor, steps: list[int], overlap: Tensor | None) -> None:
        """`values` [states]; `overlap` [rings]: the bits that the first state must begin with; None for any."""
        self._values = values
        self._steps = steps
        self._overlap = overlap
        self._cost: Tensor | None = None
        self._places: list[int] = []
        self._choices: list[Tensor] = []

    def advance(self, place: int, targets: Tensor, weights: Tensor) -> None:
        """One place further; targets and weights [rings, length]."""
        miss = weights[:, place, None] * (self._values - targets[:, place, None]).square()
        if self._cost is None:
            self._cost = miss
            if self._overlap is not None:
                begins = torch.arange(1 << STATE_BITS, device=targets.device) >> self._steps[-1]
                self._cost = miss.masked_fill(begins != self._overlap[:, None], float("inf"))
        else:
            fan = 1 << self._steps[place - 1]
            cost, choice = self._cost.unflatten(1, (fan, -1)).min(1)
            if self._places:
                self._choices.append(choice.to(torch.uint8))
            self._cost = cost.repeat_interleave(fan, 1) + miss
        self._places.append(place)

    def forget(self) -> None:
        """States keep what they cost more than the cheapest, and not how they were reached: paths begin here."""
        assert self._cost is not None
        self._cost = self._cost - self._cost.amin(1, keepdim=True)
        self._places, self._choices = [], []

    def trace_back(self, ends: Tensor | None = None) -> Tensor:
        """int64 [rings, places so far]: the states of least cost; of those that end with the bits `ends` [rings]."""
        assert self._cost is not None
        cost, total = self._cost, 1 << STATE_BITS
        if ends is not None:
            last = torch.arange(total, device=cost.device) & ((total >> self._steps[-1]) - 1)
            cost = cost.masked_fill(last != ends[:, None], float("inf"))
        path = [cost.argmin(1)]
        for before, choice in zip(reversed(self._places[:-1]), reversed(self._choices), strict=True):
            group = path[-1] >> self._steps[before]
            path.append(choice.gather(1, group[:, None])[:, 0].long() * (total >> self._steps[before]) + group)
        return torch.stack(path[::-1], 1)


def _steps(length: int, rate: Fraction) -> list[int]:
    """Bits by which the window moves after every weight of a ring."""
    start = offsets(length + 1, rate)
    return (start[1:] - start[:-1]).tolist()


@functools.cache
def _reversed_bits() -> Tensor:
    """int64 [4096]: every state with its bits in reverse order."""
    states = torch.arange(1 << STATE_BITS)
    return sum(((states >> bit) & 1) << (STATE_BITS - 1 - bit) for bit in range(STATE_BITS))  # type: ignore[return-value]


def _packed(windows: Tensor, rate: Fraction) -> Tensor:
    """uint8 [rings, length * rate / 8] from windows [rings, length]: each gives the bits it is the first to hold."""
    length = windows.shape[-1]
    codes = torch.zeros((len(windows), int(length * rate) // 8), dtype=torch.int32, device=windows.device)
    for place, (first, step) in enumerate(zip(offsets(length, rate).tolist(), _steps(length, rate), strict=True)):
        for bit in range(step):
            at = first + bit
            codes[:, at >> 3] |= ((windows[:, place] >> bit) & 1).int() << (at & 7)
    return codes.to(torch.uint8)
