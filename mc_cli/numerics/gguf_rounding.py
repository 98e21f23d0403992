"""Weights coded in GGUF blocks under error feedback, then improved step by step; batched, rows independent.

1. a step (and minimum) for every run, searched on the weights, put onto what blocks store
2. codes, column by column or 4 or 8 columns at a time, each with its share of the errors of all before
3. sweeps: steps of runs, codes, and scales of blocks are chosen again, given all else, where that lowers the error
The error is trace(D hessian D^T), D = weight - value. A point of 8 or 4 weights is chosen under the exact metric that
the factor (2) or the Hessian (3) gives for them, not under its diagonal alone.
Source of feedback by blocks: LDLQ with a vector grid as in QuIP#, Tseng et al. 2024, arXiv:2402.04396; of the sweeps:
see `rounding.descend`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mc_cli.numerics.gguf_bytes import Fields
from mc_cli.numerics.gguf_lattice import ANY, EVEN, FIRST_HALF, SECOND_HALF, UNSIGNED, nearest_points
from mc_cli.numerics.gguf_points import points
from mc_cli.numerics.gguf_steps import (
    half,
    inverse_steps,
    levels_of,
    nearest_codes,
    nearest_factors,
    searched_steps,
    signed_points,
    stored_minimums,
    stored_steps,
)
from mc_cli.numerics.gguf_types import GgufType
from mc_cli.numerics.rounding import propagate, propagate_panels

VECTOR = 8  # inputs that stay neighbours in every order


class GgufCoder:
    """The state of a batch of matrices: fields of their blocks, as columns [B, ..., out], and the weights so far.

    columns  float32 [B, in, out], the weights; not modified
    factor   float32 [B, in, in]: U with hessian^-1 = U^T U, inputs in the order `order` int64 [B, in]
    """

    def __init__(self, kind: GgufType, columns: Tensor, factor: Tensor, order: Tensor) -> None:
        self.kind = kind
        self.columns = columns
        self._factor, self._order = factor, order
        device = columns.device
        batch, inputs, outputs = columns.shape
        self._in_block = kind.block // kind.run
        self._factors = torch.tensor(kind.factors, dtype=torch.float32, device=device)
        importance = factor.diagonal(dim1=-2, dim2=-1).square().reciprocal()
        natural = torch.empty_like(importance).scatter_(1, order, importance)
        steps, minimums = searched_steps(kind, columns, natural)
        self.d, self.runs = stored_steps(kind, steps)
        if minimums is not None:
            self.dmin, self.minimums = stored_minimums(kind, minimums)
        self.codes = torch.zeros((batch, inputs // kind.vector, outputs), dtype=torch.int64, device=device)
        self.minuses = torch.zeros((batch, inputs // kind.vector, outputs), dtype=torch.int64, device=device)
        self.units = torch.zeros_like(columns)
        self.table = torch.empty(0, device=device) if kind.levels else points(kind.name).to(device)
        self._levels = levels_of(kind, device)

    # Values of the fields

    def steps(self) -> Tensor:
        """float32 [B, runs, out]."""
        return self.d.repeat_interleave(self._in_block, 1) * self._factors[self.runs]

    def offsets(self) -> Tensor:
        """Minimums likewise; zeros where the type has none."""
        if not self.kind.minimums:
            return torch.zeros(self.runs.shape, device=self.d.device)
        return self.dmin.repeat_interleave(self._in_block, 1) * self.minimums

    def of_run(self, run: int) -> tuple[Tensor, Tensor]:
        """(step, minimum) [B, out] of one run."""
        block = run // self._in_block
        step = self.d[:, block] * self._factors[self.runs[:, run]]
        return step, self.dmin[:, block] * self.minimums[:, run] if self.kind.minimums else torch.zeros_like(step)

    def values(self) -> Tensor:
        """float32 [B, in, out]: the weights as they are stored now."""
        spread = [each.repeat_interleave(self.kind.run, 1) for each in (self.steps(), self.offsets())]
        return self.units * spread[0] - spread[1]

    def fields(self) -> Fields:
        """The fields as `gguf_bytes.pack` takes them: rows [B, out, ...]."""
        found = {"d": self.d.half(), "runs": self.runs.to(torch.uint8), "codes": self.codes.to(torch.int16)}
        if self.kind.minimums:
            found |= {"dmin": self.dmin.half(), "minimums": self.minimums.to(torch.uint8)}
        if not self.kind.levels and not self.kind.signed:
            signs = self.minuses
            if self.kind.vector == 4:
                pairs = signs.unflatten(1, (-1, 2))
                signs = pairs[:, :, 0] | pairs[:, :, 1] << 4
            found["signs"] = signs.to(torch.uint8)
        return {name: tensor.transpose(1, 2).contiguous() for name, tensor in found.items()}

    # Codes under error feedback

    def code(self) -> None:
        """Chooses all codes, in the processing order."""
        steps, offsets = self.steps(), self.offsets()
        ordered = self.columns.gather(1, self._order.unsqueeze(-1).expand_as(self.columns))
        run_of = self._order // self.kind.run
        if self.kind.levels:

            def round_column(position: int, wanted: Tensor) -> Tensor:
                index = run_of[:, position, None, None].expand(-1, 1, wanted.shape[-1])
                step, offset = steps.gather(1, index)[:, 0], offsets.gather(1, index)[:, 0]
                codes = nearest_codes(self.kind, (wanted + offset) * inverse_steps(step))
                self._put(self._order[:, position], codes)
                return self._levels[codes] * step - offset

            propagate(ordered, self._factor, round_column)
        else:
            propagate_panels(ordered, self._factor, self._round_panel)

    def _put(self, inputs: Tensor, codes: Tensor) -> None:
        """Stores levels [B, out] of one input of each matrix, int64 [B]."""
        index = inputs[:, None, None].expand(-1, 1, codes.shape[-1])
        self.codes.scatter_(1, index, codes.unsqueeze(1))
        self.units.scatter_(1, index, self._levels[codes].unsqueeze(1))

    def _round_panel(self, first: int, panel: Tensor, errors: Tensor) -> None:
        """Points of a panel's vectors; each vector takes in the errors of those before it in the panel."""
        length = self.kind.vector
        for start in range(first, first + panel.shape[1], length):
            part = slice(start, start + length)
            wanted = panel[:, start - first : start - first + length]
            if start > first:
                owed = torch.bmm(self._factor[:, first:start, part].transpose(1, 2), errors[:, first:start])
                wanted = wanted - owed
            corner = self._factor[:, part, part]
            inverse = torch.linalg.inv(corner)
            metric = inverse @ inverse.transpose(1, 2)
            index = self._order[:, part, None].expand(-1, -1, wanted.shape[-1])
            steps = self.steps_at(index)
            rows = wanted.transpose(1, 2)
            places = self._order[:, start] // length
            codes, signs = nearest_points(
                self.table, metric, rows, rows @ metric, steps[:, 0], self._rules(places, free=True)
            )
            units = self._store(places, codes, signs)
            errors[:, part] = torch.bmm(inverse.transpose(1, 2), wanted - units * steps)

    def steps_at(self, inputs: Tensor) -> Tensor:
        """Steps of inputs int64 [B, n, out]."""
        d = self.d.gather(1, inputs // self.kind.block)
        return d * self._factors[self.runs.gather(1, inputs // self.kind.run)]

    def _rules(self, places: Tensor, *, free: bool) -> Tensor | None:
        """uint8 [B, out]: which points and signs one vector of each matrix, int64 [B], may have; None: any.

        Where 8 signs are even and vectors have 4, the other half of the 8 decides, once it is there: with `free` the
        first half is chosen anew.
        """
        shape = (len(places), self.codes.shape[-1])
        if self.kind.halved:
            index = (places * self.kind.vector // self.kind.run)[:, None, None].expand(-1, 1, shape[1])
            second = self.runs.gather(1, index)[:, 0] >= len(self.kind.factors) // 2
            return torch.where(second, SECOND_HALF, FIRST_HALF).to(torch.uint8)
        if self.kind.signed:
            return torch.full(shape, UNSIGNED, dtype=torch.uint8, device=self.codes.device)
        if not self.kind.even:
            return None
        if self.kind.vector == VECTOR or (free and int(places[0]) % 2 == 0):
            parity = EVEN if self.kind.vector == VECTOR else ANY
            return torch.full(shape, parity, dtype=torch.uint8, device=self.codes.device)
        index = (places ^ 1)[:, None, None].expand(-1, 1, shape[1])
        other = self.minuses.gather(1, index)[:, 0]
        return ((other ^ other >> 1 ^ other >> 2 ^ other >> 3) & 1).to(torch.uint8)

    def _store(self, places: Tensor, codes: Tensor, signs: Tensor) -> Tensor:
        """Puts points [B, out] of one vector of each matrix, int64 [B], into the fields; units [B, length, out]."""
        index = places[:, None, None].expand(-1, 1, codes.shape[-1])
        self.codes.scatter_(1, index, codes.long().unsqueeze(1))
        self.minuses.scatter_(1, index, signs.long().unsqueeze(1))
        units = signed_points(self.table, codes, signs).transpose(1, 2)
        inputs = places[:, None] * self.kind.vector + torch.arange(self.kind.vector, device=places.device)
        self.units.scatter_(1, inputs.unsqueeze(-1).expand_as(units), units)
        return units

    # Improvements, all else given

    def sweep(self, hessian: Tensor) -> None:
        """One round over all blocks. The error never rises, up to rounding. hessian float32 [B, in, in]."""
        difference = self.columns - self.values()
        for block in range(self.d.shape[1]):
            part = slice(block * self.kind.block, (block + 1) * self.kind.block)
            pull = torch.bmm(hessian[:, part], difference)  # minus half the error's gradient
            within = hessian[:, part, part]
            for run in range(block * self._in_block, (block + 1) * self._in_block):
                self._sweep_run(run, block, within, pull)
            self._fit_block(block, within, pull)
            difference[:, part] = self.columns[:, part] - self._block_values(block)

    def _block_values(self, block: int) -> Tensor:
        """float32 [B, block, out]: the weights of a block as they are stored now."""
        runs = [self.of_run(run) for run in range(block * self._in_block, (block + 1) * self._in_block)]
        steps, offsets = (torch.stack(each, 1).repeat_interleave(self.kind.run, 1) for each in zip(*runs, strict=True))
        return self.units[:, block * self.kind.block : (block + 1) * self.kind.block] * steps - offsets

    def _sweep_run(self, run: int, block: int, within: Tensor, pull: Tensor) -> None:
        """Step, minimum and codes of one run; `pull` [B, block, out] follows."""
        first = run * self.kind.run
        inside = slice(first - block * self.kind.block, first - block * self.kind.block + self.kind.run)
        self._fit_run(run, block, within, pull, inside)
        if self.kind.levels:
            self._move_levels(run, within, pull, inside)
            return
        for start in range(first, first + self.kind.run, self.kind.vector):
            self._move_point(run, start, within, pull, start - block * self.kind.block)

    def _fit_run(self, run: int, block: int, within: Tensor, pull: Tensor, inside: slice) -> None:
        """The stored step and minimum that suit a run's codes best, where they lower the error."""
        part = slice(run * self.kind.run, (run + 1) * self.kind.run)
        units, corner = self.units[:, part], within[:, inside, inside]
        step, offset = self.of_run(run)
        now = units * step.unsqueeze(1) - offset.unsqueeze(1)
        target = pull[:, inside] + torch.bmm(corner, now)
        slope, shift = _best_line(units, target, corner, fixed=not self.kind.minimums)
        slope = torch.where(torch.isfinite(slope), slope, step)
        index = nearest_factors(self.kind, slope * inverse_steps(self.d[:, block]))
        if self.kind.halved:
            half_of = len(self.kind.factors) // 2
            index = index + self.runs[:, run] // half_of * half_of
        slope = self.d[:, block] * self._factors[index]
        whole = None
        if self.kind.minimums:
            weighted = torch.bmm(corner, units)
            shift = (slope * weighted.sum(1) - target.sum(1)) / corner.sum((1, 2)).unsqueeze(-1).clamp_min(1e-30)
            whole = (shift * inverse_steps(self.dmin[:, block])).round_().clamp_(0, self.kind.minimums - 1).long()
            shift = self.dmin[:, block] * whole
        change = units * slope.unsqueeze(1) - shift.unsqueeze(1) - now
        better = _gain(change, corner, pull[:, inside]) < 0
        self.runs[:, run] = torch.where(better, index, self.runs[:, run])
        if whole is not None:
            self.minimums[:, run] = torch.where(better, whole, self.minimums[:, run])
        pull.baddbmm_(within[:, :, inside], change * better.unsqueeze(1), alpha=-1)

    def _move_levels(self, run: int, within: Tensor, pull: Tensor, inside: slice) -> None:
        """The best level of every weight of a run in turn."""
        step, _ = self.of_run(run)
        inverse = inverse_steps(step)
        first = run * self.kind.run
        corner = within[:, inside, inside]
        here = pull[:, inside].clone()
        moved = torch.empty_like(here)
        for place in range(self.kind.run):
            units = self.units[:, first + place]
            diagonal = corner[:, place, place].unsqueeze(-1)
            ideal = units * step + torch.where(diagonal > 0, here[:, place] / diagonal, 0.0)
            codes = nearest_codes(self.kind, ideal * inverse)
            moved[:, place] = (self._levels[codes] - units) * step
            self.codes[:, first + place] = codes
            self.units[:, first + place] = self._levels[codes]
            here = here - corner[:, :, place].unsqueeze(-1) * moved[:, place].unsqueeze(1)
        pull.baddbmm_(within[:, :, inside], moved, alpha=-1)

    def _move_point(self, run: int, first: int, within: Tensor, pull: Tensor, place: int) -> None:
        """The best point of 8 or 4 weights, where it lowers the error."""
        length = self.kind.vector
        inside, part = slice(place, place + length), slice(first, first + length)
        step, _ = self.of_run(run)
        corner, here = within[:, inside, inside], pull[:, inside]
        now = self.units[:, part] * step.unsqueeze(1)
        damping = 1e-3 * corner.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] + 1e-30
        eye = torch.eye(length, device=corner.device)
        ideal = now + torch.linalg.solve(corner + damping * eye, here)
        linear = (torch.bmm(corner, now) + here).transpose(1, 2)
        spot = first // length
        places = torch.full((len(now),), spot, device=now.device)
        codes, signs = nearest_points(
            self.table, corner, ideal.transpose(1, 2), linear, step, self._rules(places, free=False)
        )
        units = signed_points(self.table, codes, signs).transpose(1, 2)
        change = units * step.unsqueeze(1) - now
        better = _gain(change, corner, here) < 0
        self.codes[:, spot] = torch.where(better, codes.long(), self.codes[:, spot])
        self.minuses[:, spot] = torch.where(better, signs.long(), self.minuses[:, spot])
        self.units[:, part] = torch.where(better.unsqueeze(1), units, self.units[:, part])
        pull.baddbmm_(within[:, :, inside], change * better.unsqueeze(1), alpha=-1)

    def _fit_block(self, block: int, within: Tensor, pull: Tensor) -> None:
        """The float16 scales of a block that suit all its codes best, where they lower the error."""
        part = slice(block * self.kind.block, (block + 1) * self.kind.block)
        runs = slice(block * self._in_block, (block + 1) * self._in_block)
        shape = self._factors[self.runs[:, runs]].repeat_interleave(self.kind.run, 1) * self.units[:, part]
        flat = None
        now = shape * self.d[:, block, None]
        if self.kind.minimums:
            flat = self.minimums[:, runs].float().repeat_interleave(self.kind.run, 1)
            now = now - flat * self.dmin[:, block, None]
        target = pull + torch.bmm(within, now)
        d, dmin = _best_line(shape, target, within, flat=flat, fixed=flat is None)
        d = half(torch.where(torch.isfinite(d), d, self.d[:, block]))
        change = shape * d.unsqueeze(1) - now
        if flat is not None:
            dmin = half(torch.where(torch.isfinite(dmin) & (dmin > 0), dmin, self.dmin[:, block]))
            change = change - flat * dmin.unsqueeze(1)
        better = _gain(change, within, pull) < 0
        self.d[:, block] = torch.where(better, d, self.d[:, block])
        if flat is not None:
            self.dmin[:, block] = torch.where(better, dmin, self.dmin[:, block])


def _gain(change: Tensor, within: Tensor, pull: Tensor) -> Tensor:
    """[B, out]: by how much the error rises when weights [B, n, out] change so."""
    return (change * (torch.bmm(within, change) - 2 * pull)).sum(1)


def _best_line(
    shape: Tensor, target: Tensor, within: Tensor, *, fixed: bool, flat: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(a, b) [B, out] of the least error of a * shape - b * flat; not finite where they are not determined.

    shape, target  [B, n, out], target = within (weights less others' errors);  within  [B, n, n]
    fixed          b is 0;  flat  [B, n, out], None: ones
    """
    weighted = torch.bmm(within, shape)
    aa, ta = (shape * weighted).sum(1), (target * shape).sum(1)
    if fixed:
        return ta / aa, torch.zeros_like(ta)
    flat = torch.ones_like(shape) if flat is None else flat
    ab, tb = (flat * weighted).sum(1), (target * flat).sum(1)
    bb = (flat * torch.bmm(within, flat)).sum(1)
    determinant = aa * bb - ab.square()
    usable = determinant > 1e-6 * aa * bb
    a = torch.where(usable, (ta * bb - tb * ab) / determinant, torch.nan)
    return a, torch.where(usable, (ta * ab - tb * aa) / determinant, torch.nan)
