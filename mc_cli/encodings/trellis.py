"""Trellis codes in a rotated basis: one scale per output row, no groups, 1 to 5 bits per weight in half steps.

`weight = rotate_back(scale * value)`: rows are rotated by `numerics/rotation.py` in blocks of inputs, and values are
those of `numerics/trellis.py`. A kernel rotates the inputs instead, once for all outputs.

Layout, per matrix [out_features, in_features]:
  codes   uint8   [outputs / T, ceil(in_features / 4), 2 * bits * (T / 16) * 4]
          one ring of bits per input and T consecutive outputs; outputs are out_features, padded to a multiple of 16,
          and T is the largest multiple of 16 up to 256 that divides them. 16 weights of a ring are 2 * bits bytes, a
          lane. The rings of 4 inputs lie together as [2 * bits, lanes, 4]: byte b of every lane, of all 4 inputs. So a
          kernel finds in one vector the same bits of up to 16 lanes, with what is to be summed side by side, and
          streams through a sequence of outputs, input after input. Inputs are padded with zero bytes.
  scales  float16 [out_features], not negative
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from mc_cli import native
from mc_cli.encodings import FASTEST, MOST, TensorSpec, check_parts
from mc_cli.errors import ArtifactError, McError, ShapeError

if TYPE_CHECKING:
    import torch

PATTERN = "trellis_b<bits>_h<block>"
FAMILY = "trellis"
WIDTHS = (1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5)
CANDIDATES = (1, 1.5, 2, 2.5, 3, 3.5, 4)  # score measures these unless told otherwise
# Where `run` is asked for more stored bits than this, it has these scored too: the menu ends where a target of 4.05
# does, and a fifth more work in score would gain nothing at small sizes.
MORE_CANDIDATES = (3.5, (4.5, 5))
ROWS_APART = False  # a ring's bits are shared by up to 256 outputs
DEALS_CHANNELS = True  # experts' channels are ordered, since it matters which ones share a ring
LARGEST_BITS = 5
FEWEST_OUTPUTS = 16
LONGEST_SEQUENCE = 256
INPUTS_TOGETHER = 4
BLOCK_LIMIT = 128  # inputs that are rotated together, at most; longer blocks gain nothing on trained experts
_KEY = re.compile(r"trellis_b([1-5])(p5)?_h([1-9][0-9]{0,8})")


def from_key(key: str) -> TrellisEncoding | None:
    """The encoding of a key of this file's pattern (1.5 bits are written 1p5), None for any other key.

    Raises ArtifactError for blocks that cannot be rotated.
    """
    match = _KEY.fullmatch(key)
    if match is None or (match[1] == str(LARGEST_BITS) and match[2]):
        return None
    try:
        return TrellisEncoding(Fraction(int(match[1])) + (Fraction(1, 2) if match[2] else 0), int(match[3]))
    except ShapeError as error:
        raise ArtifactError(f"The weight encoding {key!r} cannot be: {error}. The file is damaged.") from error


@dataclass(frozen=True)
class TrellisEncoding:
    """`rate` bits per weight, a whole or half number from 1 to 5; rotation in blocks of `block` inputs."""

    rate: Fraction
    block: int

    def __post_init__(self) -> None:
        """Raises ShapeError for widths that the code does not have, and for blocks that cannot be rotated."""
        if not 1 <= self.rate <= LARGEST_BITS or (2 * self.rate) % 1:
            raise ShapeError(f"trellis codes have 1 to {LARGEST_BITS} bits in half steps, not {self.rate}")
        if self.block < 1 or self.block & (self.block - 1):
            raise ShapeError(f"rotation blocks are powers of two, not {self.block}")

    @property
    def key(self) -> str:
        width = str(self.bits).replace(".", "p")  # the key becomes part of attribute names, which hold no dot
        return f"trellis_b{width}_h{self.block}"

    @property
    def bits(self) -> int | float:
        return int(self.rate) if self.rate.denominator == 1 else float(self.rate)

    @property
    def code_bits(self) -> float:
        return float(self.rate)

    @property
    def basis(self) -> str:
        return f"h{self.block}"

    @property
    def rows_apart(self) -> bool:
        return ROWS_APART

    def tensor_specs(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Shapes and dtypes of `codes` and `scales`; ShapeError where the blocks do not divide the inputs."""
        if in_features % self.block:
            raise ShapeError(f"rotation blocks of {self.block} do not divide in_features {in_features}")
        length = sequence_length(out_features)
        size = int(length * self.rate) // 8 * INPUTS_TOGETHER
        groups = -(-in_features // INPUTS_TOGETHER)
        return {
            "codes": TensorSpec((padded(out_features) // length, groups, size), "uint8"),
            "scales": TensorSpec((out_features,), "float16"),
        }

    @property
    def lane_bytes(self) -> int:
        """Bytes of 16 consecutive weights of a ring."""
        return int(2 * self.rate)

    def interleaved(self, rings: torch.Tensor) -> torch.Tensor:
        """The stored `codes` of rings [..., sequences, in_features, T * bits / 8] as numerics/trellis.py gives them."""
        import torch

        spare = -rings.shape[-2] % INPUTS_TOGETHER
        parts = torch.nn.functional.pad(rings, (0, 0, 0, spare)).unflatten(-1, (-1, self.lane_bytes))
        codes: torch.Tensor = parts.unflatten(-3, (-1, INPUTS_TOGETHER)).transpose(-1, -3).flatten(-3).contiguous()
        return codes

    def rings(self, codes: torch.Tensor, in_features: int) -> torch.Tensor:
        """The inverse of `interleaved`."""
        parts = codes.unflatten(-1, (self.lane_bytes, -1, INPUTS_TOGETHER)).transpose(-1, -3)
        rings: torch.Tensor = parts.flatten(-2).flatten(-3, -2)[..., :in_features, :]
        return rings

    def dequantize(self, tensors: Mapping[str, torch.Tensor], in_features: int) -> torch.Tensor:
        """float32 [..., out_features, in_features] from packed `codes` and `scales`."""
        from mc_cli.numerics.rotation import rotate_back

        return rotate_back(self.rotated(tensors, in_features), self.block)

    def rotated(self, tensors: Mapping[str, torch.Tensor], in_features: int) -> torch.Tensor:
        """float32 [..., out_features, in_features]: the matrix that multiplies rotated inputs. Compiled on a CPU."""
        compiled = tensors["codes"].device.type == "cpu" and native.library() is not None
        return (self.rotated_compiled if compiled else self.rotated_in_torch)(tensors, in_features)

    def rotated_in_torch(self, tensors: Mapping[str, torch.Tensor], in_features: int) -> torch.Tensor:
        """`rotated` on any device, with temporary tensors several times the size of the result."""
        from mc_cli.numerics.trellis import decode

        check_parts(self, tensors, in_features)
        scales = tensors["scales"]
        values = decode(self.rings(tensors["codes"], in_features), self.rate).transpose(-1, -2).flatten(-3, -2)
        return values[..., : scales.shape[-1], :] * scales.float().unsqueeze(-1)

    def rotated_compiled(
        self, tensors: Mapping[str, torch.Tensor], in_features: int, path: int = FASTEST
    ) -> torch.Tensor:
        """`rotated` on the CPU, by one of `kernels.compiled.PATHS`.

        Raises ShapeError where these are no parts of matrices with `in_features` inputs, McError without memory.
        """
        import torch

        from mc_cli.numerics.trellis_code import UNIT, lookup_tables

        check_parts(self, tensors, in_features)
        codes, scales = tensors["codes"].contiguous(), tensors["scales"].contiguous()
        out_features = scales.shape[-1]
        if not (codes.is_cpu and scales.is_cpu) or max(padded(out_features), in_features) > MOST:
            raise ShapeError(
                f"{self.key}: {out_features} x {in_features} weights are not decoded by compiled routines."
            )
        matrices = torch.empty((*scales.shape, in_features))
        for matrix, ring, scale in zip(
            matrices.view(-1, out_features, in_features),
            codes.view(-1, *codes.shape[-3:]),
            scales.view(-1, out_features),
            strict=True,
        ):
            failed = native.routine("mc_trellis_matrix")(
                codes=ring.data_ptr(),
                scales=scale.data_ptr(),
                tables=lookup_tables().data_ptr(),
                unit=UNIT,
                inputs=in_features,
                outputs=out_features,
                length=sequence_length(out_features),
                planes=self.lane_bytes,
                path=path,
                threads=torch.get_num_threads(),
                out=matrix.data_ptr(),
            )
            if failed:
                raise McError(f"No memory left to decode a packed matrix of {out_features} x {in_features} weights.")
        return matrices


def padded(out_features: int) -> int:
    """Outputs that are coded: up to the next multiple of 16."""
    return -(-out_features // 16) * 16


def sequence_length(out_features: int) -> int:
    """Outputs that share a ring of bits."""
    outputs = padded(out_features)
    return next(length for length in range(LONGEST_SEQUENCE, 0, -16) if outputs % length == 0)


def trellis_for(bits: float, in_features: int) -> TrellisEncoding:
    """The trellis encoding of that width: the largest rotation that fits."""
    return TrellisEncoding(Fraction(bits), math.gcd(in_features, BLOCK_LIMIT))


def encoding_at(bits: float, out_features: int, in_features: int, *, group_size_limit: int) -> TrellisEncoding | None:
    """The encoding of a matrix of this family; None above 5 bits and below 16 outputs, where it has none."""
    if bits > LARGEST_BITS or out_features < FEWEST_OUTPUTS:
        return None
    return trellis_for(bits, in_features)
