"""The transformers plug-in: `from_pretrained` natively loads a config.json with `quant_method: mixture-compressor`.

Imported while transformers itself is half imported, so that only its quantizer base classes are used at the top.
"""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mc_cli.artifacts.packed import QUANT_METHOD, QUANT_METHODS, PackedLayout
from mc_cli.errors import InputError

if TYPE_CHECKING:
    import torch

PRUNING_RATE = "mc_pruning_rate"  # entry of config.json that from_pretrained(..., mc_pruning_rate=0) overrides


class PackedConfig(QuantizationConfigMixin):
    """The packed layout as transformers' quantization config: plain JSON values, written back as they were read."""

    def __init__(self, quant_method: str = QUANT_METHOD, **layout: Any) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # earlier exports have it too
        self.layout = PackedLayout.from_json({"quant_method": quant_method, **layout})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        return self.layout.exported_json()


class PackedQuantizer(HfQuantizer):
    """Gives the meta model its packed storage before the weights are read; nothing is quantized here."""

    requires_calibration = True  # transformers' word for: only checkpoints that are already packed
    quantization_config: PackedConfig

    def __init__(self, quantization_config: PackedConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._packed: dict[str, str] = {}
        self._model: weakref.ref[Any] | None = None  # once it is loaded

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None}  # a copy belongs to another model

    def update_attn_implementation(self, config: Any) -> Any:
        """Clears the notice that stops every loader without this plug-in; runs before weight files are looked up."""
        if hasattr(config, "transformers_weights"):
            del config.transformers_weights
        return config

    def _process_model_before_weight_loading(self, model: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
        from mc_cli.models.memory import read_ahead
        from mc_cli.packed.packed_model import attach, layout_for
        from mc_cli.packed.stored_tensors import check_loaded

        layout = layout_for(model, self.quantization_config.layout)
        self._packed = attach(model, layout, kept_dtype=dtype or model.dtype)
        check_loaded(model, self._packed, kwargs.get("checkpoint_files"))
        read_ahead(Path(path) for path in kwargs.get("checkpoint_files") or ())
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from mc_cli.packed.kept_gradients import warn_of_kept_gradients
        from mc_cli.packed.own_buffers import restore_buffers
        from mc_cli.packed.packed_modules import ask_for_huge_weights

        restore_buffers(model)
        ask_for_huge_weights(model)
        warn_of_kept_gradients(model)
        if self.quantization_config.layout.pruning is not None:
            set_pruning_rate(model, getattr(model.config, PRUNING_RATE, None))
        self._model = weakref.ref(model)
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Returns None: packed files hold converted tensors by module-tree name, and no conversion may run twice.

        model   given by transformers 5.20 and later
        """
        return []

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Returns None (dtype as stored) for codes and scales, even where a family keeps a whole module in float32."""
        if any(name in self._packed for name in converter.target_patterns):
            return None
        return super().get_new_dtype(converter, param, dtype)

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Makes the model dense in place. Raises InputError where a dense checkpoint could not say what it computes."""
        from mc_cli.packed.packed_modules import unpack_all

        layout = self.quantization_config.layout
        if layout.pruning is not None or any(block.dropped for block in layout.experts):
            raise InputError(
                "This model drops experts or lets tokens skip some of them, which dense weights alone do not say. Make "
                "a dense checkpoint with `mc-cli export --format dense`, or unpack modules one by one with "
                "`unpack(module)` of mc_cli.packed.packed_modules: its rules then stay as long as it is in memory."
            )
        unpack_all(model)
        model.config._is_quantized = False
        for owner, name in ((model.config, "auto_map"), (model, "_weight_conversions")):  # of packed files
            vars(owner).pop(name, None)
        return model if dtype is None else model.to(dtype)

    def is_serializable(self, **kwargs: Any) -> bool:
        """False for adapters, which transformers saves alone; raises for what would have to save packed weights.

        `save_pretrained` would drop the notice that guards against random experts.
        """
        model = self._model() if self._model is not None else None
        if getattr(model, "_hf_peft_config_loaded", False):
            return False
        raise InputError(
            "A packed model is not saved by save_pretrained: the result would load without mc_cli, but with random "
            "experts. Copy the exported directory instead, or make another one with `mc-cli export`. An adapter is "
            "saved by the PEFT model around this one; weights that were merged or written to are saved after "
            "`model.dequantize()`, as a dense model."
        )

    @property
    def is_trainable(self) -> bool:
        """True: adapters train through packed weights, which themselves stay as they are."""
        return True


def set_pruning_rate(model: Any, rate: float | None) -> None:
    """Lets a loaded packed model skip experts by the policy it was exported with, at another rate or not at all.

    rate   share of expert calls to skip; None for the one it was exported with, 0 for none
    Raises InputError for a model without a policy, or a rate that the policy was not fitted for.
    """
    from mc_cli.skipping.pruning import apply_pruning

    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    policy = config.layout.pruning if isinstance(config, PackedConfig) else None
    if policy is None:
        raise InputError(
            "This model has no skipping policy: it was not exported with one. Run `mc-cli prune-eval --policy odp` on "
            "its work directory, then `mc-cli export`."
        )
    apply_pruning(model, policy, rate=rate)


def mark_quantized(model: Any, layout: PackedLayout) -> None:
    """Makes transformers treat a packed model that it did not load itself like one it did: no casting, no saving."""
    quantizer = PackedQuantizer(PackedConfig(**layout.to_json()), pre_quantized=True)
    quantizer._model = weakref.ref(model)
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD
    model.hf_quantizer = quantizer
    model.config.quantization_config = quantizer.quantization_config


def register() -> None:
    """Adds the quantization method to transformers' tables; again is harmless."""
    from transformers.quantizers import auto

    for method in QUANT_METHODS:
        if method not in auto.AUTO_QUANTIZER_MAPPING:
            auto.register_quantization_config(method)(PackedConfig)
            auto.register_quantizer(method)(PackedQuantizer)


register()  # here and not by the importer: importing transformers above may be what brings the importer here
