"""Kimi-K2.5: transformers reads the vision tower's blocks as layers, and writes all layers as blocks."""

from mc_cli.families import FamilyFacts

FAMILY = FamilyFacts(
    "kimi_k25",
    names=(
        (r"language_model\.model\.blocks\.", "language_model.model.layers."),
        (r"model\.mm_projector\.", "mm_projector."),
    ),
)
