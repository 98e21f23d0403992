"""The model without weights: on the meta device, with the buffers that no checkpoint holds."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from mc_cli.errors import CheckpointError, first_line, listed
from mc_cli.models.adopted_experts import adopt_experts
from mc_cli.models.model_class import model_class
from mc_cli.models.model_folder import config_file

_LARGEST_BUFFER = 1 << 32  # bytes


def build_skeleton(config: PretrainedConfig, *, dtype: torch.dtype) -> PreTrainedModel:
    """The model on the meta device: shapes, modules and code, no weights.

    It is the class that the config names, towers for images and sound included.
    Raises FamilyError if there is no language model for this config, CheckpointError if its entries do not fit.
    """
    kind = model_class(config)
    with torch.device("meta"), no_init_weights():  # weights that are nowhere would be drawn by slow, unused code
        try:
            model = kind.auto.from_config(copy.deepcopy(config), dtype=dtype, trust_remote_code=kind.custom)
            model.tie_weights(recompute_mapping=False)  # which building does as the last part of what is left out
        except Exception as error:  # a model's constructor may raise anything at entries that do not fit each other
            raise CheckpointError(
                f"{config_file(config)} (model_type {config.model_type!r}) describes a model that cannot be built: "
                f"{first_line(error)}"
            ) from error
    adopt_experts(model)
    model.eval().requires_grad_(False)
    model.config.use_cache = False
    return model


def compute_dtype(model: Any) -> torch.dtype:
    """The dtype that a model computes in: its embedding's, also where that is packed; a tower may have others."""
    embedding: Any = model.get_input_embeddings()
    embedding = getattr(embedding, "base_layer", embedding)  # an adapter's
    packed = getattr(embedding, "_mc_weight", None)
    found: torch.dtype = packed.dtype if packed is not None else embedding.weight.dtype
    return found


def rebuild_buffers(model: Any, device: torch.device) -> None:
    """Fills the non-persistent buffers (rotary frequencies and the like) that no checkpoint holds.

    Raises CheckpointError where config.json makes them larger than any model's.
    """
    large = [
        f"{path}.{name}: {list(buffer.shape)}"
        for path, module in model.named_modules()
        for name, buffer in non_persistent_buffers(module).items()
        if buffer.numel() * buffer.itemsize > _LARGEST_BUFFER
    ]
    if large:
        raise CheckpointError(
            f"{config_file(model.config)} makes {len(large)} tables of more than {_LARGEST_BUFFER:,} bytes:\n"
            f"{listed(large)}\nAn entry for a width, a share or a length is of another model or damaged: download it "
            "again."
        )
    for module in model.modules():
        buffers = non_persistent_buffers(module)
        initialise(model, module, [name for name, buffer in buffers.items() if buffer.is_meta])
        for name, buffer in non_persistent_buffers(module).items():
            module._buffers[name] = buffer.to(device)


def put_tensor(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Puts a tensor in the place of the parameter or buffer called `name`; a parameter wants no gradient."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def non_persistent_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """The module's own buffers that no checkpoint holds, by name."""
    names = module._non_persistent_buffers_set
    return {name: buffer for name, buffer in module._buffers.items() if name in names and buffer is not None}


def initialise(model: Any, module: nn.Module, names: list[str]) -> None:
    """Lets the model's own initialisation compute these buffers of a module, on the CPU."""
    if not names:
        return
    for name in names:
        buffer = module._buffers[name]
        assert buffer is not None
        module._buffers[name] = torch.empty_like(buffer, device="cpu")
    with torch.no_grad():
        _owner_of(model, module)._init_weights(module)


def _owner_of(model: Any, module: nn.Module) -> Any:
    """The innermost model that a module is part of: a tower and a text decoder initialise what is their own."""
    owner, inside = model, model
    while inside is not module:
        inside = next(child for child in inside.children() if any(each is module for each in child.modules()))
        if isinstance(inside, PreTrainedModel):
            owner = inside
    return owner
