"""The inventory: the role of every tensor of a model, read from the model's skeleton without a weight."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mc_cli.errors import CheckpointError, FamilyError, shown
from mc_cli.families import CONTRACT_TESTED, FamilyFacts, facts_of, is_contract_tested
from mc_cli.models import experts
from mc_cli.models.model_class import has_towers
from mc_cli.models.model_folder import config_file
from mc_cli.parts import ExpertBlock, ModelInventory, Role, TensorPart

_ROUTER_NAMES = ("gate", "router")
_EXPERT_CLASSES = "expert|sparsem|moe$|moe(block|layer)"  # names of modules that hold experts, whatever the case
# Settings of config.json: how many experts there are, and which layers have some.
_EXPERT_COUNTS = "(moe_)?(num|n)_(routed_|local_)?experts"
_WHERE_EXPERTS = (
    "num_hidden_layers",
    "mlp_only_layers",
    "mlp_layer_types",
    "decoder_sparse_step",
    "first_k_dense_replace",
    "num_dense_layers",
    "moe_layers",
    "enable_moe_block",
)
_MLP_PARTS = {"mlp", "feed_forward", "block_sparse_moe", "ffn", "shared_mlp"}


def find_decoder(model: Any) -> nn.Module:
    """The text decoder of a model, of one with towers beside it too; the model itself where it names none."""
    found = model
    while isinstance(found, PreTrainedModel):
        inner = found.get_decoder()
        if not isinstance(inner, nn.Module) or inner is found:
            break
        found = inner
    return found


def find_decoder_layers(model: nn.Module) -> str:
    """Path of the decoder's ModuleList. Raises FamilyError where there is none."""
    for root in dict.fromkeys((find_decoder(model), model)):
        for path, module in root.named_modules():
            if isinstance(module, nn.ModuleList) and path.split(".")[-1] in ("layers", "blocks", "h"):
                return ".".join(filter(None, (path_of(model, root), path)))
    raise FamilyError(
        f"{type(model).__name__} has no list of decoder layers; mc-cli compresses decoder-only MoE models."
    )


def take_inventory(
    model: nn.Module,
    *,
    stored_dtypes: Mapping[str, torch.dtype],
    stored_sizes: Mapping[str, int] | None = None,
    stored_as: Mapping[str, int] | None = None,
) -> ModelInventory:
    """The inventory of a skeleton (meta) model.

    stored_dtypes   module-tree name -> dtype in the checkpoint, where it differs from the parameter's
    stored_sizes    module-tree name -> bytes in the checkpoint's files, where they are codes and scales
    stored_as       how these are coded -> how many stored tensors are
    Raises FamilyError if no routed experts are reached.
    """
    layers_path = find_decoder_layers(model)
    layers: Any = model.get_submodule(layers_path)
    config: Any = model.config
    facts = facts_of(config)
    blocks = tuple(
        _expert_block(layers_path, index, layer, config)
        for index, layer in enumerate(layers)
        if _experts_of(layer, facts)
    )
    if not blocks:
        raise _no_experts(model, config.model_type)
    tensors = tuple(
        replace(part, file_bytes=(stored_sizes or {}).get(part.name))
        for part in _tensor_parts(model, layers_path, blocks, stored_dtypes)
    )
    return ModelInventory(
        model_type=config.model_type,
        num_layers=len(layers),
        expert_blocks=blocks,
        tensors=tensors,
        tied_head=f"{_head_path(model)}.weight" in tied_tensors(model),
        contract_tested=is_contract_tested(config),
        stored_as=dict(stored_as or {}),
    )


def _no_experts(model: nn.Module, model_type: str) -> FamilyError:
    config: Any = model.config
    refused, named = facts_of(config).refused, f"model_type {model_type!r} ({type(model).__name__})"
    told = _expert_settings(config)
    if not refused and told and not _has_modules_of_experts(model):
        settings = ", ".join(f"{name} {shown(value)}" for name, value in told.items())
        return FamilyError(
            f"{named} is made for experts, but none of this model's layers has any, as {config_file(config)} says: "
            f"{settings}. mc-cli has nothing to allocate bits among. Name a model with experts, or mend config.json."
        )
    reason = (
        "is a Mixture of Experts whose experts do not use transformers' experts interface (fused expert parameters "
        "with a registered forward), the only way in which mc-cli reaches experts"
        if _has_modules_of_experts(model)
        else "is not a Mixture of Experts: it has no routed experts, and mc-cli has nothing to allocate bits among"
    )
    return FamilyError(f"{named} {refused or reason}. Contract-tested families: {', '.join(CONTRACT_TESTED)}.")


def _has_modules_of_experts(model: nn.Module) -> bool:
    """Whether modules of a model are named as experts are, or as a layer's block of them is."""
    return any(
        "experts" in path.split(".") or re.search(_EXPERT_CLASSES, type(module).__name__, re.IGNORECASE)
        for path, module in model.named_modules()
        if path
    )


def _expert_settings(config: Any) -> dict[str, Any]:
    """Settings that say how many experts there are, and which layers have them; empty for a family without experts."""
    text = config.get_text_config().to_dict()
    counts = {name: value for name, value in text.items() if re.fullmatch(_EXPERT_COUNTS, name)}
    where = {name: text[name] for name in _WHERE_EXPERTS if text.get(name) is not None}
    return {**counts, **where} if counts else {}


def _experts_of(layer: nn.Module, facts: FamilyFacts) -> list[tuple[str, experts.Experts]]:
    """(path below the layer, module) of the experts that are compressed."""
    return [(path, module) for path, module in experts.find_experts(layer) if not facts.is_apart(f".{path}")]


def _expert_block(layers_path: str, index: int, layer: nn.Module, config: Any) -> ExpertBlock:
    found = _experts_of(layer, facts_of(config))
    if len(found) > 1:
        paths = ", ".join(path for path, _ in found)
        raise FamilyError(f"{layers_path}.{index} has {len(found)} experts modules ({paths}); mc-cli handles one.")
    path, module = found[0]
    parent_path = path.rpartition(".")[0]
    parent = layer.get_submodule(parent_path) if parent_path else layer
    router = _router_name(parent)
    prefix = f"{layers_path}.{index}."
    if router is None:
        raise FamilyError(f"{prefix}{parent_path} has experts but no router named {' or '.join(_ROUTER_NAMES)}.")
    candidates = [found for found in _top_k_candidates(getattr(parent, router), parent, config) if found is not None]
    top_k = next((found for found in candidates if found), next(iter(candidates), None))
    if not isinstance(top_k, int):
        raise FamilyError(
            f"{prefix}{parent_path}: neither its router nor the config says how many experts a token uses."
        )
    num_experts = int(module.num_experts)
    if not 0 < top_k <= num_experts:
        raise CheckpointError(
            f"{config_file(config)}: each token goes to {top_k} experts of {prefix}{path}, which has {num_experts}. "
            "The number of experts per token has to be from 1 to that; config.json may be of another model."
        )
    groups, groups_used = _router_groups(getattr(parent, router))
    if num_experts % groups or not 1 <= groups_used <= groups or top_k > groups_used * (num_experts // groups):
        raise CheckpointError(
            f"{config_file(config)}: the router of {prefix}{path} has {groups} groups, and sends each token to {top_k} "
            f"experts of {groups_used} of them (n_group, topk_group). That does not fit its {num_experts} experts: "
            "groups have to be equal, and large enough; config.json may be of another model."
        )
    return ExpertBlock(
        layer=index,
        path=prefix + path,
        router_path=prefix + (f"{parent_path}." if parent_path else "") + router,
        num_experts=num_experts,
        top_k=top_k,
        projections=experts.projections_of(module),
        router_groups=groups,
        groups_used=groups_used,
    )


def _router_name(parent: nn.Module) -> str | None:
    return next((name for name in _ROUTER_NAMES if isinstance(getattr(parent, name, None), nn.Module)), None)


def router_path_of(model: nn.Module, experts_path: str) -> str:
    """Module path of the router beside the experts at `experts_path`. Raises FamilyError where there is none."""
    parent = experts_path.rpartition(".")[0]
    router = _router_name(model.get_submodule(parent))
    if router is None:
        raise FamilyError(f"{parent} has experts but no router named {' or '.join(_ROUTER_NAMES)}.")
    return f"{parent}.{router}" if parent else router


def _router_groups(router: nn.Module) -> tuple[int, int]:
    """(groups of experts, groups that a token's experts come from) of a router; (1, 1) where it has none."""
    groups, used = (getattr(router, name, None) for name in ("num_group", "topk_group"))
    if not isinstance(groups, int) or not isinstance(used, int) or getattr(router, "topk_method", "") == "greedy":
        return 1, 1
    return (groups, used) if groups > 1 else (1, 1)


def _top_k_candidates(router: nn.Module, parent: nn.Module, config: Any) -> list[Any]:
    """The entries where families note top_k, nearest to the layer first: it may differ between layers."""
    text = config.get_text_config()  # its `top_k`, if any, is about sampling
    in_config = [getattr(text, name, None) for name in ("num_experts_per_tok", "top_k_experts")]
    return [getattr(router, "top_k", None), getattr(parent, "top_k", None), *in_config]


def top_k_of(model: Any, experts_path: str) -> int | None:
    """How many of the experts at `experts_path` a token is sent to; None where the family does not tell."""
    parent = model.get_submodule(experts_path.rpartition(".")[0])
    router = _router_name(parent)
    candidates = [] if router is None else _top_k_candidates(getattr(parent, router), parent, model.config)
    return next((found for found in candidates if isinstance(found, int)), None)


def path_of(model: nn.Module, wanted: nn.Module) -> str:
    """Path of a module in the model."""
    return next(path for path, module in model.named_modules() if module is wanted)


def tied_tensors(model: Any) -> dict[str, str]:
    """Name of each parameter that is another one, and so is not stored, such as a tied head's weight -> that one's."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def _head_path(model: Any) -> str | None:
    head = model.get_output_embeddings()
    return None if head is None else path_of(model, head)


def _plain_embedding_path(model: Any) -> str | None:
    """Path of the token embedding; None where a family's own code reads its weight, which would unpack all of it."""
    embedding = model.get_input_embeddings()
    if type(embedding).forward is not nn.Embedding.forward:
        return None
    return path_of(model, embedding)


def _tensor_parts(
    model: nn.Module, layers_path: str, blocks: tuple[ExpertBlock, ...], stored_dtypes: Mapping[str, torch.dtype]
) -> tuple[TensorPart, ...]:
    config: Any = model.config
    facts = facts_of(config)
    linears = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    embedding = _plain_embedding_path(model)
    head_path = _head_path(model)
    by_layer = {block.layer: block for block in blocks}
    tied = tied_tensors(model)
    beside = _RolesBeside(model)
    parts = []
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        layer = _layer_index(name, layers_path)
        module_path, _, leaf = name.rpartition(".")
        is_linear = module_path in linears and leaf == "weight"
        block = by_layer.get(layer) if layer is not None else None
        role = beside.role_of(name) or _role(name, layer, block, facts, is_linear, head_path)
        dtype = stored_dtypes.get(name, tensor.dtype)
        shape = tuple(tensor.shape)
        size = math.prod(shape) * dtype.itemsize
        is_router = role is Role.ROUTER and leaf == "weight" and tensor.ndim == 2
        packable = is_linear or is_router or name == f"{embedding}.weight"
        parts.append(TensorPart(name, role, layer, shape, str(dtype).removeprefix("torch."), size, packable))
    return tuple(parts)


class _RolesBeside:
    """Roles of the tensors that lie outside of the text decoder of a model with towers for images or sound."""

    def __init__(self, model: Any) -> None:
        self._towers: dict[str, Role] = {}
        self._inside: tuple[str, ...] = ()
        if not has_towers(model.config):
            return
        decoder = path_of(model, find_decoder(model))
        self._inside = (f"{decoder}.", f"{_head_path(model)}.")
        for name, role in (("vision_config", Role.VISION), ("audio_config", Role.AUDIO)):
            kind = type(getattr(model.config, name, None))
            for path, module in model.named_modules():
                if path and isinstance(module, PreTrainedModel) and type(module.config) is kind:
                    self._towers[f"{path}."] = role

    def role_of(self, name: str) -> Role | None:
        """The role of a tensor outside of decoder and head; None for theirs, and for all of a text model's."""
        if not self._inside or name.startswith(self._inside):
            return None
        return next((role for path, role in self._towers.items() if name.startswith(path)), Role.PROJECTOR)


def _layer_index(name: str, layers_path: str) -> int | None:
    if not name.startswith(layers_path + "."):
        return None
    return int(name[len(layers_path) + 1 :].split(".")[0])


def _role(
    name: str, layer: int | None, block: ExpertBlock | None, facts: FamilyFacts, is_linear: bool, head_path: str | None
) -> Role:
    given = facts.role_of(name)
    if given is not None:
        return given
    if layer is None:
        if head_path is not None and name.startswith(head_path + "."):
            return Role.HEAD
        return Role.EMBEDDING if "embed" in name or "wte" in name else Role.OTHER
    pieces = name.split(".")
    if block is not None:
        if name.startswith(block.path + "."):
            weights = {projection.name for projection in block.projections}
            return Role.EXPERT if pieces[-1] in weights else Role.EXPERT_BIAS
        if name.startswith(block.router_path + ".") or "shared_expert_gate" in pieces:
            return Role.ROUTER
    if any(piece.startswith("shared_") for piece in pieces):
        return Role.SHARED if is_linear else Role.OTHER
    if not is_linear:
        return Role.OTHER
    return Role.DENSE if _MLP_PARTS & set(pieces) else Role.ATTENTION
