"""Doge: experts of one neuron each, in embeddings."""

from mc_cli.families import FamilyFacts

FAMILY = FamilyFacts(
    "doge",
    refused=(
        "has experts of a single neuron, which are rows of an embedding: there are no matrices to allocate bits among"
    ),
)
