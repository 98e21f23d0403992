"""Reading a Hugging Face checkpoint part by part, through transformers' own renaming and conversion.

One decoder layer at a time is converted onto the skeleton model, straight from lazily read safetensors slices. Names,
shapes and completeness are checked against the files' headers before the first weight is read. A few internal functions
of transformers are used; the version is pinned, and checked here.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PretrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from mc_cli.artifacts.scratch import InMemory
from mc_cli.errors import CheckpointError, listed
from mc_cli.families import facts_of
from mc_cli.models.conversion_targets import FusedSlice, Target
from mc_cli.models.expert_files import ExpertReader, FusedExperts
from mc_cli.models.expert_gates import Experts, up_name
from mc_cli.models.experts import find_experts
from mc_cli.models.finite import is_finite, weights_not_finite
from mc_cli.models.header_checks import check_counts, check_dtypes, check_names, check_shapes, check_twice
from mc_cli.models.inventory import find_decoder_layers, tied_tensors
from mc_cli.models.memory import collector_paused
from mc_cli.models.model_class import model_class
from mc_cli.models.model_folder import config_file, read_config
from mc_cli.models.paged_experts import PAGED, PagedWeights
from mc_cli.models.pieces import WHOLE, Pieces
from mc_cli.models.skeleton import build_skeleton, initialise, non_persistent_buffers, rebuild_buffers
from mc_cli.models.tensor_files import TensorFiles
from mc_cli.sources import layouts_of
from mc_cli.sources.folding import ACTIVATION_ENDINGS

__all__ = ["REST", "Checkpoint", "build_skeleton", "read_config", "rebuild_buffers"]

REST = -1  # everything outside the decoder layers


def part_of(name: str, layers_path: str) -> int:
    """The decoder layer of a module-tree name, REST outside the layers, which are at `layers_path`."""
    prefix = f"{layers_path}."
    return int(name[len(prefix) :].split(".")[0]) if name.startswith(prefix) else REST


def part_tensors(model: nn.Module, layers_path: str, part: int) -> dict[str, torch.Tensor]:
    """Module-tree name -> tensor of each parameter and persistent buffer of one part; tied ones are left out."""
    tied = tied_tensors(model)
    state = model.state_dict()
    return {name: state[name] for name in state if name not in tied and part_of(name, layers_path) == part}


class Checkpoint:
    """A checkpoint's tensors, sorted by the decoder layer of the skeleton they belong to.

    model          the skeleton; `load` and `free` fill and empty its parts
    layers_path    module path of the decoder layers
    stored_dtypes  module-tree name -> dtype of the tensor when it is kept as it is
    store          where tensors lie that are not needed all the time
    text_alone     whether the checkpoint is of a model for images or sound, of which this is the text part
    not_read       weight files beside those that are read
    unused         keys that the model's class has no place for, such as the layers of multi-token prediction
    unplaced       names that transformers looks for unused keys under, and finds none
    activations    keys of scales for activations or the cache, which a quantized checkpoint may hold
    stored_sizes   module-tree name -> bytes in the files, where the tensor is stored in codes
    """

    @collector_paused()
    def __init__(
        self,
        folder: Path,
        config: PretrainedConfig,
        *,
        dtype: torch.dtype,
        device: torch.device,
        pieces: Pieces = WHOLE,
        store: InMemory | None = None,
    ) -> None:
        """Reads the headers.

        pieces  says which layers' experts are read one by one, when they are asked for
        store   for weights that are written over such experts, and for what a stage keeps beside the model
        """
        transformers_logging.disable_progress_bar()
        self.folder = folder
        self.device = device
        self.dtype = dtype
        quantization = quantization_entry(config)
        layouts_of(folder, quantization)
        self._quantized = quantization is not None
        self._pieces = pieces
        self.store = store or InMemory()
        self.text_alone = not model_class(config).whole
        self.files = TensorFiles(folder, quantization, named=getattr(config, "transformers_weights", None))
        check_counts(folder, config, self.files.tensors)
        self.model = build_skeleton(plain_config_of(config), dtype=dtype)
        self.layers_path = find_decoder_layers(self.model)
        self.stored_dtypes: dict[str, torch.dtype] = {}
        self.not_read = self.files.not_read
        self.unused: list[str] = []
        self.activations: list[str] = []
        self.unplaced: set[str] = set()
        self.stored_sizes: dict[str, int] = {}
        self._mapping: list[Any] = get_model_conversion_mapping(self.model)
        self._targets: dict[int, list[Target]] = defaultdict(list)
        self._derived: dict[int, list[str]] = defaultdict(list)
        self._sort_keys(getattr(config.get_text_config(), "dtype", None) or torch.bfloat16)
        rebuild_buffers(self.model, device)

    def _sort_keys(self, dequantized: torch.dtype) -> None:
        """dequantized: the dtype that tensors of block formats take when they are kept."""
        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        prefix = self.model.base_model_prefix
        known = self.model.state_dict()
        targets: dict[str, Target] = {}
        for key in _in_natural_order(self.files.tensors):
            tensor = self.files.tensors[key]
            name, pattern = rename_source_key(key, renamings, converters, prefix, known)
            if name not in known and key in known:
                name, pattern = rename_source_key(key, [], [], prefix, known)
            if name not in known:
                (self.activations if self._is_of_activations(key) else self.unused).append(key)
                self.unplaced.add(name)
                continue
            converter = by_pattern[pattern] if pattern is not None else None
            targets.setdefault(name, Target(name, converter)).pieces[pattern].append(tensor)
            self.stored_dtypes[name] = tensor.dtype or dequantized
        check_names(self.folder, targets)
        check_twice(self.folder, targets)
        self._check_tied(targets)
        self._check_complete(targets, known)
        check_shapes(self.folder, targets, known)
        check_dtypes(self.folder, targets, known, type(self.model).__name__)
        for target in targets.values():
            self._targets[self.layer_of(target.name)].append(target)
            if any(piece.layout is not None for piece in target.all_pieces):
                self.stored_sizes[target.name] = sum(piece.size_bytes for piece in target.all_pieces)

    def _is_of_activations(self, key: str) -> bool:
        return self._quantized and key.endswith(ACTIVATION_ENDINGS)

    def _check_tied(self, targets: dict[str, Target]) -> None:
        """Leaves out a tied tensor that is stored beside its twin; they must be equal."""
        for name, twin in self.model.all_tied_weights_keys.items():
            if name in targets and twin in targets:
                keys = [targets[each].all_pieces[0].key for each in (name, twin)]
                with self.files.reading(keys) as slices:
                    equal = torch.equal(slices[keys[0]][...], slices[keys[1]][...])
                if not equal:
                    raise CheckpointError(
                        f"{self.folder}: config.json says that {name} is {twin} (tie_word_embeddings), but the files "
                        "hold different values for the two. If the model has a head of its own, set "
                        "tie_word_embeddings to false in config.json."
                    )
                del targets[name]
            elif name in targets:
                self.stored_dtypes[twin] = self.stored_dtypes[name]

    def _check_complete(self, targets: dict[str, Target], known: dict[str, torch.Tensor]) -> None:
        reached = {name for target in targets.values() for name in target.names}
        facts = facts_of(self.model.config)
        missing = []
        for name in sorted(known.keys() - reached, key=dot_natural_key):
            if facts.is_derived(name):
                self._derived[self.layer_of(name)].append(name)
            elif not self._is_tied_to(name, reached):
                missing.append(name)
        if missing:
            found = f" {len(self.unused)} tensors of the files have no place in it, {', '.join(self.unused[:3])} for "
            raise CheckpointError(
                f"{self.folder} lacks {len(missing)} tensors that {type(self.model).__name__} needs:\n"
                f"{listed(missing)}\nThe download may be incomplete, or config.json may be of another model."
                + (f"{found}example." if self.unused else "")
            )

    def _is_tied_to(self, name: str, reached: set[str]) -> bool:
        tied = self.model.all_tied_weights_keys
        return tied.get(name) in reached or any(twin == name and other in reached for other, twin in tied.items())

    def layer_of(self, name: str) -> int:
        """The decoder layer of a module-tree name, REST outside the layers."""
        return part_of(name, self.layers_path)

    def load(self, part: int) -> None:
        """Materialises one decoder layer, or REST, on the device. Raises CheckpointError on non-finite weights."""
        where = f"{self.folder}, {'outside the layers' if part == REST else f'layer {part}'}"
        apart = self._page_experts(part, where)
        targets = [target for target in self._targets[part] if target.name not in apart]
        kept = {target.name: self._is_kept_in_float32(target.name) for target in targets}
        dtypes = {
            piece.key: torch.float32 if kept[target.name] else self.dtype
            for target in targets
            for piece in target.all_pieces
        }
        with self.files.reading(dtypes, dtypes) as slices:
            readable: dict[str, Any] = {}
            for target in targets:
                readable |= self._readable(target, slices)
            self._convert(readable | self._derive(part), where)
        root = self.model if part == REST else self.model.get_submodule(f"{self.layers_path}.{part}")
        if part == REST:
            missing = {name for name, tensor in self.model.named_parameters(remove_duplicate=False) if tensor.is_meta}
            self.model.tie_weights(missing_keys=missing, recompute_mapping=False)
        root.requires_grad_(False)
        wrong = _not_finite(root)
        if wrong:
            begin = "" if part == REST else f"{self.layers_path}.{part}."
            made = [target for target in targets if target.name.removeprefix(begin) in wrong]
            pieces = [piece for target in made for piece in target.all_pieces]
            raise weights_not_finite(where, list(wrong.values()), self.dtype, self.files, pieces)

    def _page_experts(self, part: int, where: str) -> set[str]:
        """The names of fused experts of a part that stay in its files, to be read expert by expert."""
        found: set[str] = set()
        for path, module in find_experts(self.model):
            fused = self._fused_experts(path, module)
            size = sum(getattr(module, name).numel() * self.dtype.itemsize for name in fused)
            here = part_of(f"{path}.", self.layers_path) == part
            if here and self._pieces.experts_apart(size) and all(fused.values()):
                reader = ExpertReader(self.files, fused, self.dtype, self.device, where)
                setattr(module, PAGED, PagedWeights(reader.read, self.store))
                found |= {f"{path}.{name}" for name in fused}
        return found

    def _fused_experts(self, path: str, module: Experts) -> dict[str, FusedExperts | None]:
        """Parameter of the experts module at `path` -> how its experts are stored; None if not one by one."""
        targets = {target.name: target for target in self._targets[part_of(f"{path}.", self.layers_path)]}
        found: dict[str, FusedExperts | None] = {}
        for name in (up_name(module), "down_proj"):
            target, shape = targets.get(f"{path}.{name}"), getattr(module, name).shape[1:]
            alone = target is not None and target.by_expert and not self._is_kept_in_float32(target.name)
            found[name] = FusedExperts(target, shape) if alone and target is not None else None
        return found

    @property
    def reads_experts(self) -> bool:
        """Whether the files allow that every layer's experts are read one by one."""
        return all(all(self._fused_experts(path, module).values()) for path, module in find_experts(self.model))

    def _readable(self, target: Target, slices: dict[str, Any]) -> dict[str, Any]:
        """The input of transformers' conversion for one tensor; experts are fused here, under the fused name."""
        if not target.fuses_experts or self._is_kept_in_float32(target.name):
            return {piece.key: slices[piece.key] for piece in target.all_pieces}
        rows = [[slices[piece.key] for piece in target.pieces[pattern]] for pattern in target.patterns]
        wanted = self.model.get_parameter(target.name)
        return {target.name: FusedSlice(rows, wanted.shape, wanted.dtype)}

    def _dtype_plan(self) -> dict[str, torch.dtype]:
        return self.model._get_dtype_plan(self.dtype)

    def _is_kept_in_float32(self, name: str) -> bool:
        plan = self._dtype_plan()
        return bool(plan) and build_glob_alternation(list(plan))[0].search(name) is not None

    def _derive(self, part: int) -> dict[str, torch.Tensor]:
        """Persistent buffers that the config determines, for checkpoints that do not hold them."""
        derived: dict[str, torch.Tensor] = {}
        for name in self._derived[part]:
            path, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(path)
            initialise(self.model, module, [leaf])
            buffer = module._buffers[leaf]
            assert buffer is not None
            derived[name] = buffer
        return derived

    def _convert(self, readable: dict[str, Any], where: str) -> None:
        plan = LoadStateDictConfig(
            device_map={"": str(self.device)},
            dtype=self.dtype,
            dtype_plan=self._dtype_plan(),
            weight_mapping=copy.deepcopy(self._mapping),
        )
        try:
            info, _ = convert_and_load_state_dict_in_model(self.model, readable, plan)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{where}: cannot be read: {error}. Download the files again.") from error
        wrong = [
            f"{name}: {reason.strip().splitlines()[-1]}" for name, reason in (info.conversion_errors or {}).items()
        ]
        wrong += [
            f"{name}: checkpoint {tuple(have)}, config {tuple(want)}" for name, have, want in info.mismatched_keys or ()
        ]
        if wrong:
            raise CheckpointError(f"{where}: {len(wrong)} tensors do not fit config.json:\n{listed(wrong)}")

    def free(self, layer: int) -> None:
        """Returns a decoder layer's memory; its non-persistent buffers stay, no file holds them."""
        root = self.model.get_submodule(f"{self.layers_path}.{layer}")
        kept = [(module, non_persistent_buffers(module)) for module in root.modules()]
        root.to("meta")
        for module, buffers in kept:
            module._buffers.update(buffers)
            module.__dict__.pop(PAGED, None)


def _in_natural_order(names: Iterable[str]) -> list[str]:
    """Names in the order in which transformers reads them: as its key has it, piece by piece between the dots.

    A model has tens of thousands of names of a few hundred pieces, so pieces get numbers in their order, and numbers
    are compared.
    """
    pieces = {name: name.split(".") for name in names}
    keys = {piece: dot_natural_key(piece)[0] for piece in {each for split in pieces.values() for each in split}}
    numbers = {key: number for number, key in enumerate(sorted(set(keys.values())))}
    order = {piece: numbers[key] for piece, key in keys.items()}
    return sorted(pieces, key=lambda name: [order[piece] for piece in pieces[name]])


def quantization_entry(config: PretrainedConfig) -> dict[str, Any] | None:
    """config.json's entry quantization_config, or its text_config's; None for a plain checkpoint.

    Raises CheckpointError where it is no object.
    """
    entry = getattr(config, "quantization_config", None)
    if entry is None:
        entry = getattr(config.get_text_config(), "quantization_config", None)
    if entry is None or isinstance(entry, dict):
        return entry
    if not hasattr(entry, "to_dict"):
        raise CheckpointError(
            f"{config_file(config)}: quantization_config is {entry!r:.80}, not an object that names a quant_method. "
            "Remove the entry if the weights are plain, or download the file again."
        )
    return entry.to_dict()


def plain_config_of(config: PretrainedConfig) -> PretrainedConfig:
    """The config of the dequantized model."""
    config = copy.deepcopy(config)
    for owner in (config, config.get_text_config()):
        if hasattr(owner, "quantization_config"):
            del owner.quantization_config
    return config


def _not_finite(root: nn.Module) -> dict[str, str]:
    """Name of a tensor with numbers that are not finite -> a line about it."""
    wrong = {}
    for name, tensor in root.state_dict().items():
        if tensor.is_meta or not tensor.is_floating_point() or is_finite(tensor):
            continue
        rows = tensor if tensor.ndim == 3 else tensor[None]
        counts = [row.numel() - int(row.isfinite().sum()) for row in rows]
        which = [str(index) for index, count in enumerate(counts) if count]
        of_experts = f", experts {', '.join(which[:10])}" if len(counts) > 1 else ""
        wrong[name] = f"{name}: {sum(counts):,} of {tensor.numel():,} values{of_experts}"
    return wrong
