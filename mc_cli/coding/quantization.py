"""Building the quantizer that the settings ask for: score and quantize use the same."""

from __future__ import annotations

from mc_cli.quantizers import Quantizer, quantizer_from_name, settings_taken
from mc_cli.settings import QuantizerSettings


def quantizer_for(settings: QuantizerSettings) -> Quantizer:
    """The quantizer named in the settings, with those that it takes. Raises InputError for an unknown one."""
    given = {name: getattr(settings, name) for name in settings_taken(settings.quantizer)}
    return quantizer_from_name(
        settings.quantizer, **{name: value for name, value in given.items() if value is not None}
    )
