"""Doge: an expert is one row of two embeddings, chosen by scores that are mixed over tokens."""

from mc_cli.families import FamilyFacts

FAMILY = FamilyFacts(
    "doge",
    refused=(
        "has experts of one channel each, rows of two embeddings, and where a token is sent depends on the tokens "
        "behind it: transformers' code splits the router's scores over tokens, so that no text measures what "
        "generation uses"
    ),
)
