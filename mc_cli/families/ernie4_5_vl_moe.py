"""ERNIE 4.5 VL: each layer has experts for text and others for images, of which text sees the first alone."""

from mc_cli.families import FamilyFacts
from mc_cli.parts import Role

# Text, with which experts are measured, never reaches those for images: they are kept.
FAMILY = FamilyFacts("ernie4_5_vl_moe", roles=((r"\.vision_moe\.", Role.VISION),), apart=(r"\.vision_moe\.",))
