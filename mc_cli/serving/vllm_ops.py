"""Products with packed matrices and layers of experts as opaque operations: torch.compile and CUDA graphs leave them.

vLLM's runner around routed experts is such an operation on GPUs; on processors vLLM traces into it.
"""

from __future__ import annotations

import weakref

import torch

from mc_cli.serving.packed_weights import LayerExperts, Matrix

# A compiled graph knows what it calls by name. A model that is given up takes its matrices and experts along.
_matrices: weakref.WeakValueDictionary[str, Matrix] = weakref.WeakValueDictionary()
_experts: weakref.WeakValueDictionary[str, LayerExperts] = weakref.WeakValueDictionary()
_LIBRARY = torch.library.Library("mc_cli", "FRAGMENT")


def name_matrix(name: str, matrix: Matrix) -> str:
    """Makes a matrix known under a name of its own in this process, and gives that name."""
    while name in _matrices:
        name += "'"
    _matrices[name] = matrix
    return name


def name_experts(name: str, experts: LayerExperts) -> str:
    """Makes a layer's experts known under a name of its own in this process, and gives that name."""
    while name in _experts:
        name += "'"
    _experts[name] = experts
    return name


def multiplied(inputs: torch.Tensor, name: str) -> torch.Tensor:
    """[..., out_features] of inputs [..., in_features], or [..., in_features] of token ids [...], by `name`."""
    if torch.compiler.is_compiling():
        outputs: torch.Tensor = torch.ops.mc_cli.packed_matrix(inputs, name)
        return outputs
    return _matrices[name](inputs)


def through_experts(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, name: str) -> torch.Tensor:
    """[tokens, hidden]: the weighted sum of each token's experts, index and weights [tokens, k], in layer `name`."""
    if torch.compiler.is_compiling():
        outputs: torch.Tensor = torch.ops.mc_cli.packed_experts(hidden, index, weights, name)
        return outputs
    return _run_experts(hidden, index, weights, name)


def _run_matrix(inputs: torch.Tensor, name: str) -> torch.Tensor:
    return _matrices[name](inputs)


def _run_experts(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, name: str) -> torch.Tensor:
    return _experts[name](hidden, index.long(), weights)


def _fake_matrix(inputs: torch.Tensor, name: str) -> torch.Tensor:
    matrix = _matrices[name]
    if inputs.is_floating_point():
        return inputs.new_empty((*inputs.shape[:-1], matrix.out_features))
    return inputs.new_empty((*inputs.shape, matrix.in_features), dtype=matrix.dtype)


def _fake_experts(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, name: str) -> torch.Tensor:
    return torch.empty_like(hidden)


_LIBRARY.define("packed_matrix(Tensor inputs, str name) -> Tensor")
_LIBRARY.impl("packed_matrix", _run_matrix, "CompositeExplicitAutograd")
torch.library.register_fake("mc_cli::packed_matrix", _fake_matrix, lib=_LIBRARY)
_LIBRARY.define("packed_experts(Tensor hidden, Tensor index, Tensor weights, str name) -> Tensor")
_LIBRARY.impl("packed_experts", _run_experts, "CompositeExplicitAutograd")
torch.library.register_fake("mc_cli::packed_experts", _fake_experts, lib=_LIBRARY)
