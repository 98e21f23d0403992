"""MiniMax-Text-01: lightning attention layers among softmax attention layers."""

from mc_cli.families import FamilyFacts

# The decays of lightning attention are buffers that a checkpoint may hold, but layer and head counts alone set them.
FAMILY = FamilyFacts("minimax", derived=(r"\.self_attn\.(slope_rate|query_decay|key_decay|diagonal_decay)$",))
