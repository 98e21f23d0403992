"""Kimi-K2: DeepSeek-V3 under a name of its own, whose code on the hub does not use transformers' experts interface."""

from mc_cli.families import FamilyFacts

FAMILY = FamilyFacts("kimi_k2", read_as="deepseek_v3")
