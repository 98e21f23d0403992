"""Jamba: attention layers among Mamba layers."""

from mc_cli.families import FamilyFacts
from mc_cli.parts import Role

# x_proj and dt_proj make the step sizes of the recurrence: a few hundred rows, whose errors compound over the sequence.
FAMILY = FamilyFacts("jamba", roles=((r"\.mamba\.(x_proj|dt_proj)\.", Role.OTHER),))
