"""Products with trellis codes on a GPU: what is launched, for how many slots, and what stays on the device.

Nothing here waits for the device or asks it for a value: which kernels run, and how many programs, depends on shapes
alone. So a forward of packed experts can be captured in a CUDA graph once it has run. The kernels are in
`trellis_triton.py`; where Triton is not installed, or not switched on, torch decodes and multiplies.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from mc_cli.encodings import MOST
from mc_cli.encodings.trellis import INPUTS_TOGETHER, padded, sequence_length
from mc_cli.errors import ShapeError
from mc_cli.kernels.matrix_table import Matrix, matrix_table
from mc_cli.kernels.stored import StoredMemory, plain_numbers
from mc_cli.numerics.rotation import signs
from mc_cli.numerics.trellis_code import RATES, UNIT, code_levels

SWITCH = "MC_CLI_TRITON"  # environment variable
TILE_WARPS = 16  # one program per multiprocessor: the largest table and a tile of weights take its shared memory
GROUPS_LANES = 1024  # groups of 4 inputs x lanes in a tile of weights: four times the look-ups that fill its table
AHEAD_BYTES = 118784  # shared memory with which a tile's codes may come while the one before is multiplied
TILE_LANES = 8  # lanes of a sequence in a tile for many slots: 128 outputs
TILE_GROUPS = 64  # groups of 4 inputs in it: weights and inputs fit into shared memory beside the table
SLOTS_IN_TILE = {16: 73728, 32: 81920, 64: 98304, 128: 131072}  # slots: bytes of shared memory, as compiled
LEAST_BYTES = 101376  # shared memory that GPUs from Ampere on have at least, and earlier ones have not
ROTATED_AT_ONCE = 1024
MOST_INPUTS = 2**16  # the CPU's limit, so that both serve the same matrices
ROUNDED_AT_ONCE = 1024


@functools.cache
def serves(device: torch.device) -> bool:
    """Whether the kernels run there: on NVIDIA's GPUs from Ampere on, if Triton is installed and SWITCH says so."""
    return not reason(device)


def reason(device: torch.device) -> str:
    """Why the kernels do not run on a CUDA device; empty where they do."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if torch.version.hip is not None or _shared_memory(device) < LEAST_BYTES:
        return "the Triton kernels are for NVIDIA's GPUs from Ampere on"
    if os.environ.get(SWITCH) != "1":  # they have been interpreted and compiled, and never run by a GPU
        return f"{SWITCH}=1 turns the Triton kernels on, see docs/architecture.md"
    return ""


class GpuBank:
    """The bank `kernels.trellis.Bank` for matrices on a GPU; `product` only launches kernels.

    It keeps addresses: the stored parts must stay where they are. Few slots are multiplied one by one, in float32. Many
    are sorted by matrix and share decoded weights; their rows are then rounded to float16 under one scale per row, and
    summed in float32: about 3e-4 of an output, where bfloat16 has 2e-3.

    Programs are as many as the largest matrix needs, and find at once that a smaller one has nothing for them. Where
    all have one shape, rows are rotated once for all slots that share them, and kernels are compiled for their lanes.
    """

    def __init__(self, matrices: Sequence[Matrix | None]) -> None:
        table, self.shapes = matrix_table(matrices, most_inputs=MOST_INPUTS)
        self.memory = StoredMemory(tensor for matrix in matrices if matrix is not None for tensor in matrix[1].values())
        there = [matrix for matrix in matrices if matrix is not None]
        shapes = [shape for shape in self.shapes if shape is not None]
        device = there[0][1]["codes"].device
        self._blocks = sorted({encoding.block for encoding, *_ in there})
        self._alignment = math.gcd(*table[:, 0].tolist(), 16)
        self._matrices = table.to(device)
        self.absent = torch.tensor([matrix is None for matrix in matrices] + [True], device=device)  # [matrices + 1]
        self.out_features = max(shape.out_features for shape in shapes)
        self.in_features = max(shape.in_features for shape in shapes)
        self._one_rotation = len(self._blocks) == 1 and len({shape.in_features for shape in shapes}) == 1
        self._one_output = len({shape.out_features for shape in shapes}) == 1
        self._lanes = max(sequence_length(shape.out_features) // 16 for shape in shapes)
        self._sequences = max(padded(shape.out_features) // sequence_length(shape.out_features) for shape in shapes)
        self._groups = -(-self.in_features // INPUTS_TOGETHER)
        self._signs, self._tables = _on_device(self.in_features, device)
        self._only = torch.zeros(1, dtype=torch.int64, device=device)
        self.programs = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
        self._stages = 2 if _shared_memory(device) >= AHEAD_BYTES else 1

    def product(self, rows: Tensor, experts: Tensor | None = None, top_k: int = 1) -> Tensor:
        """[slots, out_features] float32: slot s is row s // top_k times the matrix experts[s].

        rows      [tokens, in_features] floating point, on the device. A matrix reads as many as it takes
        experts   [tokens * top_k] int64; zeros come out where it is not the number of a matrix, and behind the outputs
                  of one that has fewer. None: all the first
        top_k     slots that have the same row, one after the other
        """
        self.memory.check()
        slots = rows.shape[0] * top_k
        if rows.shape[1:] != (self.in_features,) or slots > MOST:
            raise ShapeError(f"rows {list(rows.shape)}, {top_k} slots each, for matrices of {self.in_features} inputs")
        experts = plain_numbers(self._only.expand(slots) if experts is None else experts, slots, rows.device)
        outputs = torch.empty((slots, self.out_features), dtype=torch.float32, device=rows.device)
        if not slots:
            return outputs
        with torch.cuda.device_of(rows):
            experts = experts.contiguous()
            if self._one_rotation:
                rotated = self.rotated(rows)
            else:
                rotated, top_k = self._rotated_by_slot(rows, experts, top_k), 1
            few = slots <= self.few_slots
            if not few or not self._one_output:
                outputs.zero_()
            if few:
                self._few(rotated, experts, top_k, outputs)
            else:
                self._many(rotated, experts, top_k, outputs)
        return outputs

    @property
    def few_slots(self) -> int:
        """Up to here every slot decodes its matrix for itself: few slots seldom share one."""
        return max(4, len(self._matrices) // 2)

    def rotated(self, rows: Tensor) -> Tensor:
        """float32 [tokens, in_features] in the basis of the packed matrices, which all have one."""
        from mc_cli.kernels import trellis_triton as kernels

        rows = _as_loaded(rows)
        rotated = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
        block = self._blocks[0]
        blocks = max(1, ROTATED_AT_ONCE // block)
        kernels.rotate_rows[(len(rows), -(-self.in_features // (blocks * block)))](
            rows,
            self._signs,
            rotated,
            self.in_features,
            1 / math.sqrt(block),
            BLOCK=block,
            LOG=block.bit_length() - 1,
            BLOCKS=blocks,
            enable_fp_fusion=True,
        )
        return rotated

    def _rotated_by_slot(self, rows: Tensor, experts: Tensor, top_k: int) -> Tensor:
        """float32 [slots, in_features], each in the basis of its slot's matrix, zeros behind that one's inputs."""
        from mc_cli.kernels import trellis_triton as kernels

        rows = _as_loaded(rows)
        rotated = torch.empty((len(experts), self.in_features), dtype=torch.float32, device=rows.device)
        run = max(ROTATED_AT_ONCE, self._blocks[-1])
        kernels.rotate_slots[(len(experts), -(-self.in_features // run))](
            rows,
            experts,
            self._matrices,
            self._signs,
            rotated,
            len(self._matrices),
            self.in_features,
            top_k,
            LEAST_LOG=self._blocks[0].bit_length() - 1,
            MOST_LOG=self._blocks[-1].bit_length() - 1,
            RUN=run,
            enable_fp_fusion=True,
        )
        return rotated

    def _few(self, rotated: Tensor, experts: Tensor, top_k: int, outputs: Tensor) -> None:
        """All slots' steps in equal runs over as many programs as run at once, then the sum of what they found."""
        from mc_cli.kernels import trellis_triton as kernels

        lanes = _power_of_two(self._lanes)
        groups = GROUPS_LANES // lanes
        steps = -(-self._groups // groups)
        units = len(experts) * self._sequences
        steps_each = -(-units * steps // self.programs)
        parts_of_unit = 1 + -(-(steps - 1) // steps_each)
        parts = torch.empty((parts_of_unit, units, lanes * 16), dtype=torch.float32, device=rotated.device)
        kernels.few_slots[(-(-units * steps // steps_each),)](
            rotated,
            experts,
            self._matrices,
            self._tables,
            parts,
            len(self._matrices),
            units,
            self._sequences,
            self.in_features,
            steps,
            steps_each,
            top_k,
            LANES=self._lanes if self._one_output else 0,
            PADDED=lanes,
            GROUPS=groups,
            ALIGNMENT=self._alignment,
            STAGES=self._stages,
            num_warps=TILE_WARPS,
            enable_fp_fusion=True,
        )
        kernels.add_parts[(self._sequences, len(experts))](
            parts,
            experts,
            self._matrices,
            outputs,
            len(self._matrices),
            units,
            steps,
            steps_each,
            self.out_features,
            UNIT,
            LANES=self._lanes if self._one_output else 0,
            PADDED=lanes,
            enable_fp_fusion=True,
        )

    def _many(self, rotated: Tensor, experts: Tensor, top_k: int, outputs: Tensor) -> None:
        """Slots by matrix, in tiles; as many programs as there can be tiles, those without one end at once."""
        from mc_cli.kernels import trellis_triton as kernels

        float16s = torch.empty(rotated.shape, dtype=torch.float16, device=rotated.device)
        sizes = torch.empty(len(rotated), dtype=torch.float32, device=rotated.device)
        kernels.rows_to_float16[(len(rotated),)](
            rotated, float16s, sizes, self.in_features, RUN=ROUNDED_AT_ONCE, enable_fp_fusion=True
        )
        mean = -(-len(experts) // len(self._matrices))
        fitting = [size for size, room in SLOTS_IN_TILE.items() if room <= _shared_memory(rotated.device)]
        slots = next((size for size in fitting if size >= mean), fitting[-1])
        order, tile_matrix, tile_begin, tile_end = self._tiles(experts, slots)
        lanes = min(TILE_LANES, _power_of_two(self._lanes))
        kernels.many_slots[(self._sequences * -(-self._lanes // lanes), len(tile_matrix))](
            float16s,
            sizes,
            self._matrices,
            self._tables,
            order,
            tile_matrix,
            tile_begin,
            tile_end,
            outputs,
            self.in_features,
            self.out_features,
            top_k,
            UNIT,
            LANES=self._lanes if self._one_output else 0,
            MOST_LANES=self._lanes,
            TILE_LANES=lanes,
            GROUPS=TILE_GROUPS,
            SLOTS=slots,
            ALIGNMENT=self._alignment,
            num_warps=TILE_WARPS,
            num_stages=1,
            enable_fp_fusion=True,
        )

    def _tiles(self, experts: Tensor, slots: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(slots by matrix, then per tile its matrix, first place and last place + 1), all found on the device.

        There are as many tiles as any distribution over the matrices may need; those not needed are empty.
        """
        matrices = len(self._matrices)
        known = torch.where((experts < 0) | (experts >= matrices), matrices, experts)
        known = known.masked_fill(self.absent[known], matrices)
        by_matrix, order = torch.sort(known, stable=True)
        numbers = torch.arange(matrices + 1, device=experts.device)
        begin = torch.searchsorted(by_matrix, numbers)  # one per matrix, then that of slots without one
        tiles = (begin[1:] - begin[:-1] + slots - 1) // slots
        first_tile = torch.cumsum(tiles, 0) - tiles
        tile = torch.arange(-(-len(experts) // slots) + matrices, device=experts.device)
        matrix = torch.searchsorted(first_tile, tile, right=True) - 1
        place = begin[matrix] + (tile - first_tile[matrix]) * slots
        return order, matrix, place, torch.minimum(place + slots, begin[matrix + 1])


def _as_loaded(rows: Tensor) -> Tensor:
    """Rows as kernels load them: in one of three dtypes, one after the other."""
    return (rows if rows.dtype in (torch.float32, torch.float16, torch.bfloat16) else rows.float()).contiguous()


@functools.cache
def _on_device(in_features: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(signs of rotations, tables for two weights at a time), which all banks of a device share."""
    return signs(in_features).to(device), _pair_tables().to(device)


@functools.cache
def _pair_tables() -> Tensor:
    """int16: for every rate, by all bits of two neighbouring windows, 128 + level of one, and of the next.

    From 4 bits on a table for two would not fit: it is by the bits of one window, and holds the level twice.
    """
    tables = []
    for rate in RATES:
        levels, step = code_levels(rate).int() + 128, int(rate) if rate < 4 else 0
        bits = torch.arange(len(levels) << step)
        both = levels[bits % len(levels)] + 256 * levels[bits >> step]
        tables.append(torch.where(both >= 2**15, both - 2**16, both).to(torch.int16))
    return torch.cat(tables)


def _shared_memory(device: torch.device) -> int:
    """Bytes that a program may have; where kernels are interpreted, as many as the largest takes."""
    if device.type != "cuda":
        return max(SLOTS_IN_TILE.values())
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor - 1024  # the driver's share


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
