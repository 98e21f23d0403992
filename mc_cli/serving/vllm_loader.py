"""vLLM's default loader, which for packed models has the packed tensors read by mc-cli and maps the others' names."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.logger import init_logger
from vllm.model_executor import model_loader
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from mc_cli.artifacts.packed import QUANT_METHODS
from mc_cli.errors import InputError
from mc_cli.models.router_masks import LOW
from mc_cli.packed.plugin import PRUNING_RATE
from mc_cli.serving.packed_weights import PackedWeights
from mc_cli.serving.skipped_calls import SkippedCalls
from mc_cli.serving.vllm_quantization import PackedExpertsMethod, PackedVllmConfig

COUNT_SKIPPED = "mc_count_skipped"  # entry of config.json that `--hf-overrides` sets
_LOG = init_logger("vllm.mc_cli")


def take_over() -> None:
    """Puts `PackedModelLoader` wherever vLLM would use its default loader; again is harmless."""
    table = model_loader._LOAD_FORMAT_TO_MODEL_LOADER
    for name, loader in list(table.items()):
        if loader is DefaultModelLoader:
            table[name] = PackedModelLoader


class PackedModelLoader(DefaultModelLoader):
    """Loads packed models; others as the default loader does."""

    def __init__(self, load_config: Any) -> None:
        super().__init__(load_config)
        self._packed: PackedVllmConfig | None = None

    def create_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> torch.nn.Module:
        """The model, whose layers call packed modules where the layout has them.

        Raises InputError where vLLM was asked to divide it, ArtifactError where directory or model do not fit.
        """
        if model_config.quantization not in QUANT_METHODS:
            self._packed = None
            return super().create_model(vllm_config, model_config, prefix)
        _refuse_division(vllm_config.parallel_config)
        counting = _is_counting(model_config, self.load_config.device or vllm_config.device_config.device)
        packed: PackedVllmConfig = vllm_config.quant_config
        folder, *_ = self._prepare_weights(model_config.model, None, model_config.revision, False, None)
        packed.weights = PackedWeights(
            Path(folder),
            dtype=model_config.dtype,
            device=torch.device(self.load_config.device or vllm_config.device_config.device),
            rate=getattr(model_config.hf_config, PRUNING_RATE, None),
            counts=_is_served if counting else None,
            trust_remote_code=model_config.trust_remote_code,
        )
        self._packed = packed
        model = super().create_model(vllm_config, model_config, prefix)
        packed.pack_embeddings(model)
        packed.weights.require_all_taken(f"vLLM's {type(model).__name__}")
        if counting:
            model._mc_skipped_calls = SkippedCalls(packed.weights.counted, _LOG.info)  # lives as long as the model
        return model

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        """Fills vLLM's own layers and the packed modules. Raises ValueError where one of either is left empty."""
        if self._packed is not None:
            self.enable_weights_track = True
        super().load_weights(model, model_config)
        if self._packed is not None and self._packed.weights is not None:
            self._packed.weights.load()
            _mask_routers(model)

    def track_weights_loading(self, model: torch.nn.Module, loaded_weights: set[str] | None, **asked: Any) -> None:
        """Raises ValueError for weights of vLLM's own layers that no file has filled.

        What two modules hold is filled under either name: a block of transformers' and vLLM's runner in it have one
        router.
        """
        if self._packed is not None and loaded_weights is not None:
            held = {name: id(weight) for name, weight in model.named_parameters(remove_duplicate=False)}
            filled = {held[name] for name in loaded_weights if name in held}
            loaded_weights = loaded_weights | {name for name, weight in held.items() if weight in filled}
        super().track_weights_loading(model, loaded_weights, **asked)

    def get_all_weights(self, model_config: Any, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """(name in the original checkpoint, tensor) of what vLLM's own layers hold."""
        if self._packed is None or self._packed.weights is None:
            yield from super().get_all_weights(model_config, model)
        else:
            self.counter_before_loading_weights = time.perf_counter()  # vLLM tells how long it took
            yield from self._packed.weights.kept()


def _is_served() -> bool:
    """Whether vLLM computes requests, and does not warm up."""
    return is_forward_context_available() and get_forward_context().attn_metadata is not None


def _is_counting(model_config: Any, device: Any) -> bool:
    """Whether skipped calls are to be counted. Raises InputError where they could not be."""
    asked = getattr(model_config.hf_config, COUNT_SKIPPED, False)
    if not isinstance(asked, bool):
        raise InputError(f"{COUNT_SKIPPED} of --hf-overrides is true or false, not {asked!r}.")
    if asked and torch.device(device).type != "cpu" and not model_config.enforce_eager:
        raise InputError(
            f"{COUNT_SKIPPED} counts while layers run one by one: CUDA graphs go on without. Add --enforce-eager."
        )
    return asked


def _refuse_division(parallel: Any) -> None:
    """Raises InputError where a model is to be divided over processes: codes of a matrix cannot be cut."""
    asked = {
        "--tensor-parallel-size": parallel.tensor_parallel_size,
        "--pipeline-parallel-size": parallel.pipeline_parallel_size,
        "--data-parallel-size": parallel.data_parallel_size,
        "--enable-expert-parallel": 1 + bool(parallel.enable_expert_parallel),
    }
    divided = [name for name, size in asked.items() if size > 1]
    if divided:
        raise InputError(
            f"A packed model runs in one process of vLLM, and {', '.join(divided)} would divide it. Leave that out, "
            "and start one server for each device or processor socket."
        )


class _MaskedRouter:
    """A router that passes dropped experts over."""

    def __init__(self, router: Any, dropped: tuple[int, ...], num_experts: int, device: torch.device) -> None:
        self._router = router
        self._mask = torch.zeros(num_experts, dtype=torch.bool, device=device)
        self._mask[list(dropped)] = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._router, name)

    def select_experts(self, hidden_states: torch.Tensor, router_logits: torch.Tensor, **options: Any) -> Any:
        """(weights, index) [tokens, k], none of dropped experts."""
        masked = router_logits.masked_fill(self._mask, float("-inf"))
        return self._router.select_experts(hidden_states=hidden_states, router_logits=masked, **options)


def _mask_routers(model: torch.nn.Module) -> None:
    """Lets no router choose an expert that the layout or the policy drops; correction biases fall far below all."""
    runners: list[Any] = [module for module in model.modules() if isinstance(module, MoERunner)]
    for module in runners:
        method = module.routed_experts.quant_method
        if isinstance(method, PackedExpertsMethod) and method.experts.dropped:
            experts = module.routed_experts
            bias = experts.e_score_correction_bias
            device = next(model.parameters()).device
            if bias is not None:
                bias.data[list(method.experts.dropped)] = LOW
            module.router = _MaskedRouter(module.router, method.experts.dropped, experts.global_num_experts, device)
