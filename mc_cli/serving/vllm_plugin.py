"""The entry point `vllm.general_plugins`, which vLLM calls in each of its processes: packed models become known.

Nothing else of vLLM is touched: models that are not packed by mc-cli load as they do without.
"""

from __future__ import annotations


def register() -> None:
    """Adds the quantization method, and a loader for models that have it; again is harmless."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from mc_cli.artifacts.packed import QUANT_METHODS
    from mc_cli.serving.vllm_loader import take_over
    from mc_cli.serving.vllm_quantization import PackedVllmConfig

    for method in QUANT_METHODS:
        register_quantization_config(method)(PackedVllmConfig)
    take_over()
