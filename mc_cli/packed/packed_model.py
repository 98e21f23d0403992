"""Packed models: the skeleton with packed storage, layers read straight from a packed folder.

A packed folder holds every tensor of the model in final form under its module-tree name, so nothing is converted here:
names, shapes and dtypes must agree with the skeleton, or an ArtifactError lists what does not.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import build_glob_alternation

from mc_cli.artifacts.packed import PackedLayout, StoredBytes, encoding_of
from mc_cli.artifacts.sizes import SIZES, read_sizes
from mc_cli.errors import ArtifactError, McError, counted, listed
from mc_cli.families import facts_of
from mc_cli.models import experts
from mc_cli.models.adopted_experts import adopt_experts
from mc_cli.models.checkpoint import REST, part_of
from mc_cli.models.expert_gates import can_be_divided
from mc_cli.models.inventory import find_decoder, find_decoder_layers, path_of, take_inventory, tied_tensors, top_k_of
from mc_cli.models.model_folder import read_config
from mc_cli.models.own_experts import run_our_experts
from mc_cli.models.router_masks import drop_experts
from mc_cli.models.skeleton import build_skeleton, put_tensor, rebuild_buffers
from mc_cli.packed.own_buffers import note_buffers
from mc_cli.packed.packed_expert_modules import pack_experts
from mc_cli.packed.packed_files import PackedFiles, open_packed
from mc_cli.packed.packed_modules import follow_embedding, pack_weight, tie_head
from mc_cli.packed.stored_tensors import check_layer_count, check_stored, is_base
from mc_cli.parts import Role
from mc_cli.skipping.pruning import add_learned_tensors, pruning_for

__all__ = ["PackedSource", "StoredBytes", "attach", "model_bytes", "stored_sizes"]


_LONGEST = 300  # characters of a line about a layout, whose names may have any length
LEARNED = "learned"  # stands for the stored part of a skipping policy's tensors


def attach(model: Any, layout: PackedLayout, *, kept_dtype: torch.dtype) -> dict[str, str]:
    """Gives a (meta) model the packed storage that `layout` describes, in place, and our experts implementation.

    Its routers do not choose experts that the layout drops.

    kept_dtype   dtype of expert projections that are kept, and of `weight` where code reads it from a packed module
    Returns full tensor name -> stored part (`codes`, `scales`, ...) of every packed tensor, and of what a skipping
    policy learned. The policy itself is put on once the tensors are there, by `apply_pruning`.
    Raises ArtifactError if layout and model do not fit.
    """
    adopt_experts(model)
    _check_experts(model, layout)
    _check_linears(model, layout)
    packed: dict[str, str] = {}
    for block in layout.experts:
        parts = pack_experts(model.get_submodule(block.path), block, dtype=kept_dtype)
        _initialised_around(model, block.path)
        packed |= {f"{block.path}.{name}": part for name, part in parts.items()}
    for path, key in layout.linears.items():
        encoding = encoding_of(key)
        assert encoding is not None  # _check_linears
        note_buffers(model, model.get_submodule(path))
        parts = pack_weight(model.get_submodule(path), encoding, dtype=kept_dtype)
        _initialised_around(model, path)
        packed |= {f"{path}.{name}": part for name, part in parts.items()}
    embedding = model.get_input_embeddings()
    if path_of(model, embedding) in layout.linears:
        follow_embedding(model)
        for path, twin in _tied_modules(model).items():
            if twin in layout.linears:
                tie_head(model.get_submodule(path), embedding)
                _forget_tie(model, f"{path}.weight")
    if layout.pruning is not None:
        packed |= dict.fromkeys(add_learned_tensors(model, layout.pruning), LEARNED)
    drop_experts(model, {block.path: block.dropped for block in layout.experts})
    run_our_experts(model)
    return packed


def _initialised_around(model: Any, path: str) -> None:
    """Keeps transformers from initialising a packed weight with the module around it, as some families and towers do.

    One with buffers, which are not stored, is left to it.
    """
    around = model.get_submodule(path.rpartition(".")[0])
    if not around._buffers:
        around._is_hf_initialized = True


def _forget_tie(model: Any, name: str) -> None:
    """Lets transformers no longer tie a parameter that is gone: neither by its table of names nor by its patterns."""
    del model.all_tied_weights_keys[name]
    rules = model._tied_weights_keys or {}
    model._tied_weights_keys = {rule: source for rule, source in rules.items() if not re.fullmatch(rule, name)}


def layout_for(model: Any, layout: PackedLayout) -> PackedLayout:
    """The layout of a causal language model by the module paths of `model`, which may be its base, without the head.

    transformers maps the names of stored tensors in the same way.
    """
    if not is_base(model):
        return layout
    prefix = f"{model.base_model_prefix}."
    return replace(
        layout,
        experts=tuple(replace(block, path=block.path.removeprefix(prefix)) for block in layout.experts),
        linears={path.removeprefix(prefix): key for path, key in layout.linears.items() if path.startswith(prefix)},
        pruning=None if layout.pruning is None else pruning_for(model, layout.pruning),
    )


def _check_experts(model: Any, layout: PackedLayout) -> None:
    blocks = {block.path: block for block in layout.experts}
    inside = find_decoder(model)
    reached = {id(module) for module in inside.modules()}  # a tower's own experts are kept, and in no layout
    facts = facts_of(model.config)
    modules = {
        path: module
        for path, module in experts.find_experts(model)
        if id(module) in reached and not facts.is_apart(path)
    }
    problems = [f"{path}: the model has experts, the layout none" for path in modules.keys() - blocks.keys()]
    for path, block in blocks.items():
        if path not in modules:
            problems.append(f"{path}: the layout has experts, the model none")
            continue
        module = modules[path]
        shapes = {
            projection.name: (projection.out_features, projection.in_features)
            for projection in experts.projections_of(module)
        }
        if block.num_experts != module.num_experts:
            problems.append(f"{path}: layout {block.num_experts} experts, model {module.num_experts}")
        if list(block.projections.items()) != list(shapes.items()):
            problems.append(f"{path}: layout {dict(block.projections)}, model {shapes}")
            continue
        top_k = top_k_of(model, path)
        left = block.num_experts - len(block.dropped)
        if top_k is not None and not 1 <= top_k <= left:
            problems.append(f"{path}: a token is sent to {top_k} experts, of which {left} are there")
        beside = module.has_bias or module.has_post_expert_norm
        if beside and (block.divided or block.shared):
            problems.append(f"{path}: experts have biases or norms, which blocks and shared experts have not")
        elif block.divided and not can_be_divided(module):
            problems.append(f"{path}: experts are in blocks of channels, which their activation mixes")
        for name in block.projections:
            for stack in block.stacks(name):
                problems += _misfits(f"{path}.{name}", stack.shape, [stack.key])
    _raise_if_any(model, problems)


def _tied_modules(model: Any) -> dict[str, str]:
    """Path of each module whose weight is another module's -> path of that one."""
    return {name.removesuffix(".weight"): twin.removesuffix(".weight") for name, twin in tied_tensors(model).items()}


def _check_linears(model: Any, layout: PackedLayout) -> None:
    modules = dict(model.named_modules())
    embedding = path_of(model, model.get_input_embeddings())
    problems = []
    for path, twin in _tied_modules(model).items():
        can_follow = twin == embedding and type(modules[path]).forward is nn.Linear.forward
        if path in layout.linears:
            problems.append(f"{path}: the layout packs it, but it is {twin}, and is packed there")
        elif twin in layout.linears and not can_follow:
            problems.append(f"{twin}: the layout packs it, but {path} shares it and needs it whole")
    for path, key in layout.linears.items():
        weight = modules[path]._parameters.get("weight") if path in modules else None
        if weight is None or weight.ndim != 2:
            problems.append(f"{path}: the layout packs it, the model has no matrix there")
        elif (encoding := encoding_of(key)) is None:
            problems.append(f"{path}: a linear that is kept does not belong in the layout")
        elif (path == embedding or isinstance(modules[path], nn.Embedding)) and not encoding.rows_apart:
            problems.append(f"{path}: {key} does not store the rows of an embedding apart")
        else:
            problems += _misfits(path, tuple(weight.shape), [key])
    _raise_if_any(model, problems)


def _misfits(where: str, shape: tuple[int, ...], keys: Iterable[str]) -> list[str]:
    problems = []
    for key in keys:
        try:
            encoding = encoding_of(key)
            if encoding is not None:
                encoding.tensor_specs(shape[0], shape[1])
        except McError as error:
            problems.append(f"{where}: {key} does not fit {list(shape)}: {error}")
    return problems


def _raise_if_any(model: nn.Module, problems: list[str]) -> None:
    if problems:
        raise ArtifactError(
            f"The packed layout does not fit {type(model).__name__}, {counted(len(problems), 'difference')}:\n"
            f"{listed(sorted(problem[:_LONGEST] for problem in problems))}\nThe files are of different models, or "
            "damaged; make the packed model again."
        )


class PackedSource:
    """A packed model as a layer source: one decoder layer resident at a time, read by name, memory-mapped.

    folder   what stage quantize writes, or a directory exported for transformers
    dtype    compute dtype: kept floating tensors are cast to it, save those the family keeps in float32; packed tensors
             are never cast
    Raises ArtifactError, before a tensor is read, if names, shapes or dtypes on disk do not fit the layout.
    """

    def __init__(
        self, folder: Path, *, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
    ) -> None:
        self.folder = folder
        self.device = device
        self.files = open_packed(folder)
        self.layout = self.files.layout
        self.config = read_packed_config(self.files, trust_remote_code=trust_remote_code)
        check_layer_count(self.config, self.files.tensors, self.folder)
        self.model: Any = build_skeleton(self.config, dtype=dtype)
        self.layers_path = find_decoder_layers(self.model)
        # Before packed weights are there: a model's own code for the buffers of an embedding draws its weight, too.
        rebuild_buffers(self.model, device)
        self.packed = attach(self.model, self.layout, kept_dtype=dtype)
        self._dtypes = self._check_names(dtype)

    @property
    def parts(self) -> list[int]:
        """REST and every decoder layer, in the order of a forward."""
        return [REST, *range(len(self.model.get_submodule(self.layers_path)))]

    def part_of(self, name: str) -> int:
        """The decoder layer of a module-tree name, REST outside the layers."""
        return part_of(name, self.layers_path)

    def names(self, part: int) -> list[str]:
        """Names of the stored tensors of one decoder layer, or of REST."""
        return [name for name in self._dtypes if self.part_of(name) == part]

    def load(self, part: int) -> None:
        """Materialises one decoder layer, or REST, on the device. Raises ArtifactError on damage."""
        self.load_names(self.names(part))
        if part == REST:
            self.model.tie_weights()

    def load_names(self, names: Iterable[str]) -> None:
        """Materialises these stored tensors on the device. Raises ArtifactError on damage."""
        for name, tensor in self.files.read(names):
            put_tensor(self.model, name, tensor.to(device=self.device, dtype=self._dtypes[name] or tensor.dtype))

    def free(self, layer: int) -> None:
        """Returns a decoder layer's memory; buffers that no file holds stay."""
        module = self.model.get_submodule(f"{self.layers_path}.{layer}")
        kept = [
            (inner, name, buffer)
            for inner in module.modules()
            for name, buffer in inner.named_buffers(recurse=False)
            if name in inner._non_persistent_buffers_set
        ]
        module.to("meta")
        for inner, name, buffer in kept:
            inner._buffers[name] = buffer

    def _check_names(self, dtype: torch.dtype) -> dict[str, torch.dtype | None]:
        """Stored name -> the dtype it is cast to, None for as it is."""
        wanted = check_stored(self.model, self.packed, self.files.tensors, self.folder)
        plan = self.model._get_dtype_plan(dtype)
        return {name: self._target_dtype(name, tensor, plan) for name, tensor in wanted.items()}

    def _target_dtype(self, name: str, tensor: torch.Tensor, plan: dict[str, torch.dtype]) -> torch.dtype | None:
        """transformers' own rule for loading: the family's dtype plan, else the dtype that the module declares."""
        if name in self.packed or not tensor.is_floating_point():
            return None
        if plan:
            pattern, group_names, _ = build_glob_alternation(list(plan))
            match = pattern.search(name)
            if match is not None and match.lastgroup is not None:
                return plan[group_names[match.lastgroup]]
        return tensor.dtype


def read_packed_config(files: PackedFiles, *, trust_remote_code: bool = False) -> Any:
    """The native model config of a packed model, without what only from_pretrained needs."""
    config = read_config(files.config_folder, trust_remote_code=trust_remote_code)
    for name in ("quantization_config", "transformers_weights"):
        if hasattr(config, name):
            delattr(config, name)
    return config


def part_numbers(config: Any) -> list[int]:
    """REST and every decoder layer of a model with this config."""
    model: Any = build_skeleton(config, dtype=torch.float32)
    return [REST, *range(len(model.get_submodule(find_decoder_layers(model))))]


def stored_sizes(folder: Path, *, trust_remote_code: bool = False) -> dict[Role, StoredBytes]:
    """`model_bytes` as quantize noted it; counted where an earlier version, or another stage, wrote the folder.

    Raises ArtifactError for a damaged note, and as `model_bytes`.
    """
    note = folder / SIZES
    return read_sizes(note) if note.exists() else model_bytes(folder, trust_remote_code=trust_remote_code)


def model_bytes(folder: Path, *, trust_remote_code: bool = False) -> dict[Role, StoredBytes]:
    """Stored bytes of a packed model's tensors per role, read from the files' headers alone.

    Raises ArtifactError where a tensor belongs to nothing in the model.
    """
    files = open_packed(folder)
    model = build_skeleton(read_packed_config(files, trust_remote_code=trust_remote_code), dtype=torch.float32)
    inventory = take_inventory(model, stored_dtypes={})
    packed = attach(model, files.layout, kept_dtype=torch.float32)
    role_of = {block.path: Role.EXPERT for block in inventory.expert_blocks} | {
        part.name: part.role for part in inventory.tensors
    }
    found: dict[Role, dict[str, int]] = defaultdict(lambda: {"codes": 0, "side": 0, "kept": 0})
    for name, tensor in files.tensors.items():
        path = name.rpartition(".")[0]
        role = (
            role_of.get(name) or role_of.get(f"{path}.weight") or role_of.get(path)
        )  # kept, packed linear, stacked experts
        if role is None:
            raise ArtifactError(f"{folder}: {name} belongs to no tensor of the model. Run quantize again with --force.")
        kind = "kept" if name not in packed else "codes" if packed[name] == "codes" else "side"
        found[role][kind] += tensor.size_bytes
    return {role: StoredBytes(**sizes) for role, sizes in found.items()}
