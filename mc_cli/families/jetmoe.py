"""JetMoE: experts in attention, too."""

from mc_cli.families import FamilyFacts

FAMILY = FamilyFacts(
    "jetmoe",
    refused=(
        "has experts in attention as well as in its feed-forward layers, in code that does not use "
        "transformers' experts interface"
    ),
)
