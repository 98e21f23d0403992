"""Qwen3-Next: gated delta-net layers among attention layers."""

from mc_cli.families import FamilyFacts
from mc_cli.parts import Role

# in_proj_ba makes the decay and the write strength of the recurrence: 2 rows per head, whose errors compound.
FAMILY = FamilyFacts("qwen3_next", roles=((r"\.linear_attn\.in_proj_ba\.", Role.OTHER),))
