"""Doge: an expert is one row of two embeddings."""

from mc_cli.families import FamilyFacts

FAMILY = FamilyFacts(
    "doge",
    refused=(
        "has experts of one channel each, rows of two embeddings that are looked up per token, in code that does not "
        "use transformers' experts interface"
    ),
)
