"""Building the quantizer that the settings ask for: score and quantize use the same."""

from __future__ import annotations

from mc_cli.quantizers import Quantizer, quantizer_from_name
from mc_cli.settings import QuantizerSettings


def quantizer_for(settings: QuantizerSettings) -> Quantizer:
    """The quantizer named in the settings. Raises InputError for an unknown one."""
    if settings.quantizer == "rtn":  # takes no calibration data, so none of the settings speaks of it
        return quantizer_from_name("rtn")
    knobs = {"damping": settings.damping, "activation_order": settings.activation_order}
    if settings.sweeps is not None:
        knobs["sweeps"] = settings.sweeps
    return quantizer_from_name(settings.quantizer, **knobs)
