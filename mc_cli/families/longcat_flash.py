"""LongCat-Flash: some experts give their input back, and transformers' class has weights for them that none has."""

from mc_cli.families import FamilyFacts

FAMILY = FamilyFacts(
    "longcat_flash",
    refused=(
        "has experts that give their input back, without weights in published checkpoints, and transformers cannot "
        "load those: its class wants rows of gate_up_proj for them"
    ),
)
