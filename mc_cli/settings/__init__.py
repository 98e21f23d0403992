"""Settings of every stage, one file each: a field is declared with its default, unit, limits and flag in one place.

This room imports no torch. Values that depend on the quantizer are looked up in the registry when they are asked for.
"""

from mc_cli.settings.allocate import CUTS_WITHIN, TARGETS, WIDTH_BORDERS, AllocateSettings
from mc_cli.settings.calibrate import CalibrateSettings
from mc_cli.settings.compute import RunSettings
from mc_cli.settings.cut import CAMERA_Q
from mc_cli.settings.declared import Flag, Settings, StageSettings, changed, flags_of_class
from mc_cli.settings.effort import EFFORTS
from mc_cli.settings.engines import ENGINES, PER_PROJECTION, WHOLE_MODEL, Engine, widths_to_score, with_engine
from mc_cli.settings.evaluate import ACTIVATION_BITS, EvaluateSettings
from mc_cli.settings.export import ExportSettings
from mc_cli.settings.merge import AVERAGE, MERGEMOE, MERGES, PUZZLE, SUB_MOE
from mc_cli.settings.prune import FREQUENCY, GLOBAL, PER_LAYER, REAP, ROUTER_WEIGHT, PruneSettings
from mc_cli.settings.quantize import QuantizeSettings
from mc_cli.settings.quantizer import LARGEST_GROUP, QuantizerSettings
from mc_cli.settings.score import AUTO, CHANNEL, EXPERT, ScoreSettings

__all__ = [
    "ACTIVATION_BITS",
    "AUTO",
    "AVERAGE",
    "CAMERA_Q",
    "CHANNEL",
    "CUTS_WITHIN",
    "EFFORTS",
    "ENGINES",
    "EXPERT",
    "FREQUENCY",
    "GLOBAL",
    "LARGEST_GROUP",
    "MERGEMOE",
    "MERGES",
    "PER_LAYER",
    "PER_PROJECTION",
    "PUZZLE",
    "REAP",
    "ROUTER_WEIGHT",
    "SUB_MOE",
    "TARGETS",
    "WHOLE_MODEL",
    "WIDTH_BORDERS",
    "AllocateSettings",
    "CalibrateSettings",
    "Engine",
    "EvaluateSettings",
    "ExportSettings",
    "Flag",
    "PruneSettings",
    "QuantizeSettings",
    "QuantizerSettings",
    "RunSettings",
    "ScoreSettings",
    "Settings",
    "StageSettings",
    "changed",
    "flags_of_class",
    "widths_to_score",
    "with_engine",
]
