"""Packed matrices as compiled routines take them: products in which every row has its own matrix, and the whole of a
layer's routed experts in one call."""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mc_cli import native
from mc_cli.encodings import FASTEST, MOST, Encoding
from mc_cli.errors import ShapeError
from mc_cli.kernels.compiled import activation_bytes, best_path, check
from mc_cli.kernels.stored import Shape, StoredMemory, plain_numbers
from mc_cli.native.structures import ENTRIES_OF, Bank

# Activations of gates, in the order in which native/experts.c numbers them.
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu_tanh": functools.partial(torch.nn.functional.gelu, approximate="tanh"),
}


class CompiledBank:
    """Packed matrices on the CPU, each of its own shape, for products in which every row has its own matrix.

    `in_features` and `out_features` are the most of any matrix: rows of inputs and outputs have room for these.
    It keeps addresses: the stored parts must stay where they are. Once one has been freed, products raise McError.

    kind      TRELLIS or AFFINE of native/structures.py
    matrices  (encoding, stored parts, in_features) of each, as the kind's own bank has checked them, None for one
              that is not there
    entries   int64 [matrices, fields], each a `row` of its kind's entry in native/structures.py; the last field of one
              that is not there, whose products are zeros, is 0
    shapes    of every matrix, None for one that is not there
    more      further fields of the structure `Bank` there
    """

    def __init__(
        self,
        kind: int,
        matrices: Sequence[tuple[Encoding, Mapping[str, Tensor], int] | None],
        entries: Tensor,
        shapes: tuple[Shape | None, ...],
        **more: Tensor | float,
    ) -> None:
        tensors = [tensor for matrix in matrices if matrix is not None for tensor in matrix[1].values()]
        if not all(tensor.is_cpu for tensor in tensors):
            raise ShapeError("Compiled products are computed from matrices in the processor's memory.")
        self.memory = StoredMemory(tensors)
        self._kept = entries, more  # the addresses below point to these
        addresses = {name: value.data_ptr() if isinstance(value, Tensor) else value for name, value in more.items()}
        self.shapes = shapes
        self.out_features = max(shape.out_features for shape in shapes if shape is not None)
        self.in_features = max(shape.in_features for shape in shapes if shape is not None)
        self._fields = Bank(
            kind=kind,
            matrices=len(entries),
            inputs=self.in_features,
            outputs=self.out_features,
            **addresses,
            **{ENTRIES_OF[kind]: entries.data_ptr()},
        )
        self.address = ctypes.addressof(self._fields)
        self._product = native.routine("mc_product")
        self.absent = torch.cat([entries[:, -1] == 0, torch.ones(1, dtype=torch.bool)])  # [matrices + 1], by number
        self._gated_into: Callable[[], CompiledBank | None] = lambda: None  # the bank that `check_gated` found to fit

    def check_gated(self, down: CompiledBank) -> None:
        """Raises ShapeError unless matrix m of `down` takes half of what matrix m here gives, in any number of bits.

        Matrices of a layer share its inputs and outputs. A pair that fits is not looked at again.
        """
        if self._gated_into() is down:
            return
        for number, (first, second) in enumerate(zip(self.shapes, down.shapes, strict=False)):
            if first is not None and second is not None and first.out_features != 2 * second.in_features:
                raise ShapeError(
                    f"matrix {number}: {first.out_features} outputs of gate and up for {second.in_features} inputs"
                )
        for bank, side in ((self, "in_features"), (down, "out_features")):
            found = {getattr(shape, side) for shape in bank.shapes if shape is not None}
            if len(found) > 1:
                raise ShapeError(f"Experts of one layer have one number of {side}, not {sorted(found)}.")
        self._gated_into = weakref.ref(down)

    def product(self, rows: Tensor, experts: Tensor | None = None, top_k: int = 1, path: int = FASTEST) -> Tensor:
        """[slots, out_features] float32: slot s is row s // top_k times the matrix experts[s].

        rows      [tokens, in_features] floating point; computed from in float32. A matrix reads as many as it takes
        experts   [tokens * top_k] int64; zeros come out where it is not the number of a matrix, and behind the outputs
                  of one that has fewer. None: all the first
        top_k     slots that have the same row, one after the other
        """
        outputs = torch.empty((rows.shape[0] * top_k, self.out_features))
        self._multiply(_plain(rows, torch.float32), experts, top_k, path, outputs)
        return outputs

    def linear(self, inputs: Tensor) -> Tensor:
        """[..., out_features], in the dtype of inputs [..., in_features]: products with the first matrix.

        Few calls of Python and torch: where weights have driven those out of the caches, each is slow.
        """
        dtype = _computed_in(inputs)
        outputs = torch.empty((*inputs.shape[:-1], self.out_features), dtype=dtype)
        self._multiply(_plain(inputs, dtype), None, 1, FASTEST, outputs)
        return outputs if inputs.dtype == dtype else outputs.to(inputs.dtype)

    def _multiply(self, rows: Tensor, experts: Tensor | None, top_k: int, path: int, outputs: Tensor) -> None:
        tokens = rows.numel() // self.in_features
        if not self.memory.there or rows.shape[-1] != self.in_features or not rows.is_cpu:
            self.memory.check()
            raise ShapeError(f"inputs {list(rows.shape)} on {rows.device} for matrices of {self.in_features} inputs")
        if outputs.numel() != tokens * top_k * self.out_features or tokens * top_k > MOST:
            raise ShapeError(f"inputs {list(rows.shape)} have {top_k} slots each, which a product does not take")
        if experts is not None:
            experts = plain_numbers(experts, tokens * top_k, rows.device)
        failed = self._product(
            bank=self.address,
            x=rows.data_ptr(),
            experts=None if experts is None else experts.data_ptr(),
            bfloat16=rows.dtype == torch.bfloat16,
            tokens=tokens,
            top_k=top_k,
            activation_bytes=activation_bytes(),
            path=best_path() if path == FASTEST else path,
            threads=torch.get_num_threads(),
            out=outputs.data_ptr(),
        )
        check(failed, self.out_features, self.in_features)


def experts_output(
    up: CompiledBank,
    down: CompiledBank,
    rows: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate: str,
    path: int = FASTEST,
) -> Tensor:
    """[tokens, out_features] in the dtype of `rows`: the weighted sum of each token's experts, gated, without biases.

    up        outputs of a matrix are gate and up, one after the other
    down      each matrix has as many inputs as that of `up` has outputs of either
    rows      [tokens, in_features] floating point; everything is computed in float32
    experts   [tokens, slots] int64; a slot adds nothing where it is not the number of a matrix
    weights   [tokens, slots], by which experts' outputs are multiplied
    gate      one of GATES
    """
    tokens, top_k = experts.shape
    if not (up.memory.there and down.memory.there):
        up.memory.check()
        down.memory.check()
    if rows.shape != (tokens, up.in_features) or weights.shape != experts.shape or not (rows.is_cpu and weights.is_cpu):
        raise ShapeError(
            f"rows {list(rows.shape)}, experts {list(experts.shape)}, weights {list(weights.shape)} on {rows.device} "
            f"for matrices of {up.in_features} inputs"
        )
    if not 1 <= top_k <= MOST // max(1, tokens):
        raise ShapeError(f"{tokens} tokens with {top_k} slots each, which a product does not take")
    up.check_gated(down)
    dtype = _computed_in(rows) if weights.dtype == rows.dtype else torch.float32
    inputs, factors = _plain(rows, dtype), _plain(weights, dtype)
    chosen = plain_numbers(experts, tokens * top_k, inputs.device)
    outputs = torch.empty((tokens, down.out_features), dtype=dtype)
    failed = native.routine("mc_experts")(
        up=up.address,
        down=down.address,
        x=inputs.data_ptr(),
        experts=chosen.data_ptr(),
        weights=factors.data_ptr(),
        bfloat16=dtype == torch.bfloat16,
        tokens=tokens,
        top_k=top_k,
        activation=list(GATES).index(gate),
        activation_bytes=activation_bytes(),
        path=best_path() if path == FASTEST else path,
        threads=torch.get_num_threads(),
        out=outputs.data_ptr(),
    )
    check(failed, up.out_features, up.in_features)
    return outputs.to(rows.dtype)


def _computed_in(inputs: Tensor) -> torch.dtype:
    """The dtype in which routines take these inputs and give outputs."""
    return inputs.dtype if inputs.dtype == torch.bfloat16 else torch.float32


def _plain(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype and tensor.is_contiguous() else tensor.to(dtype).contiguous()
