"""vLLM's view of a packed model: a quantization config, and methods for linears, routed experts and embeddings.

The products are those of `models/experts.py` and `kernels/`, on the packed tensors as they are stored: every expert and
projection has its own width, block and encoding. vLLM's layers hold no weights of their own for what is packed.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from mc_cli.artifacts.packed import QUANT_METHOD, PackedLayout
from mc_cli.errors import InputError
from mc_cli.serving.packed_weights import LayerExperts, Matrix, PackedWeights
from mc_cli.serving.vllm_ops import multiplied, name_experts, name_matrix, through_experts

_ACTIVATIONS = [torch.float32, torch.bfloat16, torch.float16]
# Linears that vLLM's models merge into one, where they do not say it themselves.
_MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
_LATENT = ".kv_b_proj"
_LEAST_CAPABILITY = 75  # what the Triton kernels are written for; on a CPU nothing is asked


class PackedVllmConfig(QuantizationConfig):
    """The packed layout of config.json, and where a model is being built the packed modules that its layers call."""

    def __init__(self, layout: PackedLayout) -> None:
        super().__init__()
        self.layout = layout
        self.weights: PackedWeights | None = None

    def get_name(self) -> str:
        """The method's name, whatever an earlier export calls it."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Dtypes that a model can be run in."""
        return _ACTIVATIONS

    @classmethod
    def get_min_capability(cls) -> int:
        """The least compute capability of a CUDA device."""
        return _LEAST_CAPABILITY

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Nothing beside config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PackedVllmConfig:
        """Reads `quantization_config` of config.json. Raises ArtifactError for another version or a damaged layout."""
        return cls(PackedLayout.from_json(config))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Takes note of how vLLM's model renames a checkpoint's modules; before any of its layers asks for a method."""
        if self.weights is not None:
            self.weights.rename(hf_to_vllm_mapper)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """The method of one layer; None for what has no weights, vLLM's own where the weights are kept.

        Raises ArtifactError for routed experts that the layout does not have, InputError under another loader.
        """
        if self.weights is None:
            raise InputError(
                "vLLM was to read a packed model with another loader than mc-cli's. Leave --load-format at auto."
            )
        if isinstance(layer, RoutedExperts):
            return PackedExpertsMethod(layer.moe_config, prefix, self.weights.take_experts(prefix))
        if isinstance(layer, LinearBase):
            shards = {**_MERGED, **self.packed_modules_mapping}.get(prefix.rpartition(".")[2])
            matrix = self.weights.take_matrix(prefix, shards)
            return UnquantizedLinearMethod() if matrix is None else PackedMatrixMethod(prefix, matrix)
        if isinstance(layer, VocabParallelEmbedding):  # a head is one, too
            matrix = self.weights.take_matrix(prefix)
            return UnquantizedEmbeddingMethod() if matrix is None else PackedMatrixMethod(prefix, matrix)
        return None

    def pack_embeddings(self, model: torch.nn.Module) -> None:
        """Gives its method to each packed embedding that vLLM's model has built without asking for one."""
        assert self.weights is not None  # the loader's, which calls this
        for name, module in model.named_modules():
            if isinstance(module, VocabParallelEmbedding) and isinstance(
                module.quant_method, UnquantizedEmbeddingMethod
            ):
                matrix = self.weights.take_matrix(name)
                if matrix is not None:
                    del module._parameters["weight"]
                    module.quant_method = PackedMatrixMethod(name, matrix)


class PackedMatrixMethod(LinearMethodBase):
    """A linear, a head or an embedding; of a merged linear every matrix has its own encoding, or is kept."""

    def __init__(self, prefix: str, matrix: Matrix) -> None:
        self.matrix = matrix
        self.name = name_matrix(prefix, matrix)

    def create_weights(self, layer: torch.nn.Module, *sizes: Any, **attributes: Any) -> None:
        """Nothing: our loader reads the packed tensors."""
        if self.name.endswith(_LATENT):  # vLLM's latent attention takes the matrix out of a product with ones
            layer.qweight = torch.empty(0)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """[..., out_features] in the dtype of `x`."""
        outputs = multiplied(x, self.name)
        return outputs if bias is None else outputs + bias

    def embedding(self, layer: torch.nn.Module, input_: torch.Tensor) -> torch.Tensor:
        """[..., hidden] of token ids; only the rows that are looked up are dequantized."""
        return multiplied(input_, self.name)

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module) -> torch.nn.Module:
        """The head itself: it multiplies with what the embedding stores."""
        return layer


class PackedExpertsMethod(FusedMoEMethodBase):
    """The routed experts of one layer, each block with its own widths; a skipping policy decides first."""

    def __init__(self, moe: Any, prefix: str, experts: LayerExperts) -> None:
        super().__init__(moe)
        self.experts = experts
        self.name = name_experts(prefix, experts)

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Nothing: the packed tensors are read by our loader. Raises InputError for a router that weighs inputs."""
        if layer.apply_router_weight_on_input:
            raise InputError(
                f"{layer.layer_name}: this family multiplies the inputs of experts by routing weights, which packed "
                "experts in vLLM do not. Serve it with transformers: mc-cli serve DIR --engine transformers."
            )

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """None: vLLM's own kernels are not asked."""
        return

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """[tokens, hidden] in the dtype of `x`: the routed experts' weighted sum; the runner adds shared experts."""
        return through_experts(x, topk_ids, topk_weights, self.name)
