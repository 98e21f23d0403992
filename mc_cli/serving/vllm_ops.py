"""Products with packed matrices as one opaque operation, which torch.compile and CUDA graphs leave as it is.

Routed experts need none: vLLM's runner around them is such an operation already.
"""

from __future__ import annotations

import torch

from mc_cli.serving.packed_weights import Matrix

_named: dict[str, Matrix] = {}  # a compiled graph knows a matrix by its name
_LIBRARY = torch.library.Library("mc_cli", "FRAGMENT")


def name_matrix(name: str, matrix: Matrix) -> str:
    """Makes a matrix known under a name of its own in this process, and gives that name."""
    while name in _named:
        name += "'"
    _named[name] = matrix
    return name


def multiplied(inputs: torch.Tensor, name: str) -> torch.Tensor:
    """[..., out_features] of inputs [..., in_features], or [..., in_features] of token ids [...], by `name`."""
    if torch.compiler.is_compiling():
        outputs: torch.Tensor = torch.ops.mc_cli.packed_matrix(inputs, name)
        return outputs
    return _named[name](inputs)


def _fake(inputs: torch.Tensor, name: str) -> torch.Tensor:
    matrix = _named[name]
    if inputs.is_floating_point():
        return inputs.new_empty((*inputs.shape[:-1], matrix.out_features))
    return inputs.new_empty((*inputs.shape, matrix.in_features), dtype=matrix.dtype)


_LIBRARY.define("packed_matrix(Tensor inputs, str name) -> Tensor")
_LIBRARY.impl("packed_matrix", lambda inputs, name: _named[name](inputs), "CompositeExplicitAutograd")
torch.library.register_fake("mc_cli::packed_matrix", _fake, lib=_LIBRARY)
