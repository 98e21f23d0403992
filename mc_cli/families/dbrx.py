"""DBRX: the experts of a layer in one 2-D matrix per projection."""

from mc_cli.families import FamilyFacts

FAMILY = FamilyFacts(
    "dbrx",
    refused=(
        "holds the experts of a layer as one matrix [experts * channels, hidden] per projection, in code that "
        "does not use transformers' experts interface"
    ),
)
