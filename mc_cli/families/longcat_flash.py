"""LongCat-Flash: some experts give their input back."""

from mc_cli.families import FamilyFacts

FAMILY = FamilyFacts(
    "longcat_flash",
    refused=(
        "has experts that compute nothing and give their input back, among those with weights, in code that "
        "does not use transformers' experts interface"
    ),
)
