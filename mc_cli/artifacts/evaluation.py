"""`evaluation/eval.json`: what was measured on the original and on the packed model, on which text, with units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mc_cli.artifacts.files import read_json, write_json
from mc_cli.errors import ArtifactError

SCHEMA = 1

UNITS = {
    "loss": "nats per token, mean over predicted tokens",
    "perplexity": "exp(loss)",
    "kl_divergence": "nats per token, KL(original || packed) of the next-token distributions",
    "same_top_token": "share of predictions where both models rank the same token first",
    "router_changes": "share of (token, slot) expert choices that differ from the original's, per MoE layer",
}


@dataclass(frozen=True)
class TextResult:
    """One domain of the text, or all of it."""

    tokens: int
    original_loss: float
    packed_loss: float
    kl_divergence: float
    same_top_token: float


@dataclass(frozen=True)
class Evaluation:
    """Everything one evaluation measured.

    context     length, stride, number and source of windows, bits of inputs of packed products
    stored      role -> bytes {codes, side, kept}, of the packed model; original: role -> bytes
    tasks       lm-eval's own results per model, empty without tasks
    pruning     every operating point of the policies that were measured, empty without a policy
    """

    total: TextResult
    domains: Mapping[str, TextResult]
    router_changes: Mapping[int, float]
    context: Mapping[str, Any]
    stored_bytes: Mapping[str, Mapping[str, int]]
    original_bytes: Mapping[str, int]
    expert_stored_bits: float
    expert_code_bits: float
    tasks: Mapping[str, Any] = field(default_factory=dict)
    units: Mapping[str, str] = field(default_factory=lambda: dict(UNITS))
    pruning: Mapping[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Writes the JSON file in one atomic replace."""
        content = {"schema": SCHEMA, **asdict(self)}
        if not self.pruning:
            del content["pruning"]
        write_json(path, content)

    @classmethod
    def read(cls, path: Path) -> Evaluation:
        """Reads the file back. Raises ArtifactError where it is damaged."""
        content = read_json(path)
        try:
            if content.pop("schema") != SCHEMA:
                raise ValueError("schema")
            content["total"] = TextResult(**content["total"])
            content["domains"] = {name: TextResult(**entry) for name, entry in content["domains"].items()}
            content["router_changes"] = {int(layer): share for layer, share in content["router_changes"].items()}
            return cls(**content)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"{path} is not an evaluation of this version: {error!r}. Run prune-eval --force."
            ) from error
