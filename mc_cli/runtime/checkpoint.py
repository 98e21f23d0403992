"""Reading a Hugging Face checkpoint part by part, through transformers' own renaming and conversion.

One decoder layer at a time is converted onto the skeleton model, straight from lazily read safetensors slices.
Three internal functions of transformers are used; the version is pinned, and checked here.
"""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.quantizers.auto import get_hf_quantizer
from transformers.utils import logging as transformers_logging

from mc_cli.errors import CheckpointError, FamilyError, InputError, listed
from mc_cli.families import CONTRACT_TESTED
from mc_cli.runtime.inventory import find_decoder_layers

TESTED_TRANSFORMERS = "5.23."
REST = -1  # everything outside the decoder layers

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def check_transformers_version() -> None:
    """Raises InputError for a transformers release whose internals this version was not tested with."""
    if not transformers.__version__.startswith(TESTED_TRANSFORMERS):
        raise InputError(
            f"transformers {transformers.__version__} is installed; mc-cli reads checkpoints through internals of "
            f"transformers {TESTED_TRANSFORMERS}x and is tested with it alone. Run `pip install 'transformers=={TESTED_TRANSFORMERS}0'`."
        )


def resolve_model(name: str, *, revision: str | None = None) -> Path:
    """The folder of a model: a directory, `bundled:NAME`, or a hub id, whose files are downloaded to the hub's cache.

    Raises InputError if it is none of these.
    """
    if name.startswith("bundled:"):
        from mc_cli.bundled import bundled_path

        return bundled_path(name.removeprefix("bundled:"))
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise InputError(f"--model {name}: no such directory. Give a folder with config.json and *.safetensors, or a hub id like org/name.")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:
        raise InputError(
            f"--model {name}: neither a directory here nor to be had from the hub ({type(error).__name__}: {str(error).splitlines()[0]}). "
            "Check the name, the revision and the network, or give a directory."
        ) from error


def read_config(folder: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The model's configuration. Raises CheckpointError or FamilyError saying what is wrong with it."""
    check_transformers_version()
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json: it is not a Hugging Face checkpoint.")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except ValueError as error:
        kind = _raw_model_type(folder)
        raise FamilyError(
            f"{folder}: transformers {transformers.__version__} cannot read model_type {kind!r} ({str(error).splitlines()[0]}). "
            f"Contract-tested families:\n{listed(CONTRACT_TESTED)}"
        ) from error
    except Exception as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be used: {type(error).__name__}: {error}") from error
    return config


def _raw_model_type(folder: Path) -> str | None:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None


def build_skeleton(config: PretrainedConfig, *, dtype: torch.dtype) -> nn.Module:
    """The model on the meta device: shapes, modules and code, no weights."""
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        except ValueError as error:
            raise FamilyError(
                f"model_type {config.model_type!r} has no causal language model in transformers {transformers.__version__}. "
                f"Contract-tested families:\n{listed(CONTRACT_TESTED)}"
            ) from error
    model.eval().requires_grad_(False)
    model.config.use_cache = False
    return model


def rebuild_buffers(model: nn.Module, device: torch.device) -> None:
    """Fills the non-persistent buffers (rotary frequencies and the like) that no checkpoint holds."""
    for module in model.modules():
        names = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        if not any(name in module._non_persistent_buffers_set for name in names):
            continue
        for name in names:
            if name in module._non_persistent_buffers_set:
                module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
        model._init_weights(module)
        for name in names:
            if name in module._non_persistent_buffers_set:
                module._buffers[name] = module._buffers[name].to(device)


class Checkpoint:
    """A checkpoint's tensors, sorted by the decoder layer of the skeleton they belong to."""

    def __init__(self, folder: Path, config: PretrainedConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        transformers_logging.disable_progress_bar()
        self.folder = folder
        self.device = device
        self._dequantizer, config = _dequantizer(folder, config)
        self.model = build_skeleton(config, dtype=dtype)
        if self._dequantizer is not None:
            self._dequantizer.preprocess_model(model=self.model, dtype=dtype, device_map=None, checkpoint_files=[])
        self._mapping = get_model_conversion_mapping(self.model, None, self._dequantizer)
        self.layers_path = find_decoder_layers(self.model)
        self.stored_dtypes: dict[str, torch.dtype] = {}
        self.unused: list[str] = []
        self._keys: dict[int, list[tuple[str, str]]] = defaultdict(list)
        self._sort_keys(_weight_map(folder))
        rebuild_buffers(self.model, device)

    def _sort_keys(self, weight_map: dict[str, str]) -> None:
        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        known = self.model.state_dict()
        reached: set[str] = set()
        dtypes = _header_dtypes(self.folder, weight_map)
        for key, file in weight_map.items():
            name, _ = rename_source_key(key, renamings, converters, self.model.base_model_prefix, known)
            if name not in known and key in known:
                name = key
            if name not in known:
                self.unused.append(key)
                continue
            reached.add(name)
            self.stored_dtypes[name] = dtypes[key] or self.model.config.dtype or torch.bfloat16
            self._keys[self.layer_of(name)].append((key, file))
        missing = sorted(set(known) - reached - self._tied_names())
        if missing:
            raise CheckpointError(
                f"{self.folder} lacks {len(missing)} tensors that {type(self.model).__name__} needs:\n{listed(missing)}\n"
                "The download may be incomplete, or config.json may be of another model."
            )

    def _tied_names(self) -> set[str]:
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        return set(tied) if getattr(self.model.config.get_text_config(), "tie_word_embeddings", False) else set()

    def layer_of(self, name: str) -> int:
        """The decoder layer of a module-tree name, REST outside the layers."""
        prefix = self.layers_path + "."
        return int(name[len(prefix) :].split(".")[0]) if name.startswith(prefix) else REST

    def load(self, part: int) -> None:
        """Materialises one decoder layer, or REST, on the device. Raises CheckpointError on damage or non-finite weights."""
        with ExitStack() as stack:
            slices = {}
            handles: dict[str, Any] = {}
            for key, file in self._keys[part]:
                if file not in handles:
                    handles[file] = stack.enter_context(_open(self.folder / file))
                slices[key] = handles[file].get_slice(key)
            self._convert(slices, part)
        if part == REST:
            self.model.tie_weights()
        root = self.model if part == REST else self.model.get_submodule(f"{self.layers_path}.{part}")
        _check_finite(root, f"{self.folder}, {'outside the layers' if part == REST else f'layer {part}'}")

    def _convert(self, slices: dict[str, Any], part: int) -> None:
        plan = LoadStateDictConfig(
            device_map={"": str(self.device)},
            dtype=self.model.dtype,
            dtype_plan=self.model._get_dtype_plan(self.model.dtype),
            weight_mapping=copy.deepcopy(self._mapping),
            hf_quantizer=self._dequantizer,
        )
        try:
            info, _ = convert_and_load_state_dict_in_model(self.model, slices, plan)
        except SafetensorError as error:
            raise CheckpointError(f"{self.folder}: layer {part} cannot be read: {error}. Download the file again.") from error
        wrong = [f"{name}: {reason}" for name, reason in dict(info.conversion_errors or {}).items()]
        wrong += [f"{name}: checkpoint {tuple(have)}, config {tuple(want)}" for name, have, want in info.mismatched_keys or ()]
        if wrong:
            raise CheckpointError(f"{self.folder}: {len(wrong)} tensors do not fit config.json:\n{listed(wrong)}")

    def free(self, layer: int) -> None:
        """Returns a decoder layer's memory; its non-persistent buffers come back with the next load."""
        module = self.model.get_submodule(f"{self.layers_path}.{layer}")
        kept = {
            (path, name): buffer
            for path, inner in module.named_modules()
            for name, buffer in inner.named_buffers(recurse=False)
            if name in inner._non_persistent_buffers_set
        }
        module.to("meta")
        for (path, name), buffer in kept.items():
            module.get_submodule(path)._buffers[name] = buffer


def _dequantizer(folder: Path, config: PretrainedConfig) -> tuple[Any, PretrainedConfig]:
    """transformers' own dequantizer for FP8 and MXFP4 checkpoints, None for plain ones; others are refused."""
    source = getattr(config, "quantization_config", None)
    if source is None:
        return None, config
    method = source.get("quant_method") if isinstance(source, dict) else getattr(source, "quant_method", None)
    method = str(getattr(method, "value", method))
    if method == "fp8":
        from transformers import FineGrainedFP8Config as Wanted
    elif method == "mxfp4":
        from transformers import Mxfp4Config as Wanted
    else:
        raise CheckpointError(
            f"{folder} is already quantized with {method!r}. mc-cli starts from 16- or 32-bit, FP8 or MXFP4 checkpoints; "
            "give the original model."
        )
    quantizer, config, _ = get_hf_quantizer(config, Wanted(dequantize=True), {"": "cpu"}, True, {})
    return quantizer, config


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor key -> file name. Raises CheckpointError if there is no safetensors file, or the index names a missing one."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{index} is damaged: {error!r}. Download it again.") from error
        missing = sorted({file for file in weight_map.values() if not (folder / file).is_file()})
        if missing:
            raise CheckpointError(f"{folder}: the index names {len(missing)} files that are not there:\n{listed(missing)}\nDownload them.")
        return weight_map
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        others = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".gguf"))
        hint = f" It has {', '.join(others[:3])}: pickled weights are never read, convert them to safetensors first." if others else ""
        raise CheckpointError(f"{folder} has no *.safetensors file.{hint}")
    weight_map = {}
    for file in files:
        with _open(folder / file) as handle:
            weight_map.update(dict.fromkeys(handle.keys(), file))
    return weight_map


def _header_dtypes(folder: Path, weight_map: dict[str, str]) -> dict[str, torch.dtype | None]:
    """The stored dtype of each key from the files' headers; None for block formats that are dequantized on load."""
    by_file: dict[str, list[str]] = defaultdict(list)
    for key, file in weight_map.items():
        by_file[file].append(key)
    found: dict[str, torch.dtype | None] = {}
    for file, keys in by_file.items():
        with _open(folder / file) as handle:
            there = set(handle.keys())
            lost = [key for key in keys if key not in there]
            if lost:
                raise CheckpointError(f"{folder / file} lacks {len(lost)} tensors that the index places there:\n{listed(lost)}")
            for key in keys:
                found[key] = _DTYPES.get(handle.get_slice(key).get_dtype())
    return found


def _open(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size if path.exists() else 0
        raise CheckpointError(
            f"{path} ({size:,} bytes) is not a whole safetensors file: {error}. The download may be truncated; fetch the file again."
        ) from error


def _check_finite(root: nn.Module, where: str) -> None:
    wrong = []
    for name, tensor in _own_tensors(root):
        if tensor.is_floating_point() and not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            wrong.append(f"{name}: {count:,} of {tensor.numel():,} values are NaN or infinite")
    if wrong:
        raise CheckpointError(f"{where}: weights that are not finite:\n{listed(wrong)}\nThe checkpoint is damaged; fetch it again.")


def _own_tensors(root: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    yield from root.named_parameters()
    yield from ((name, buffer) for name, buffer in root.named_buffers())


