"""`evaluation/routing.json`: where both models send the tokens of held-out text, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from mc_cli.artifacts.fields import FieldError, Within, read_as, reading, take_schema
from mc_cli.artifacts.files import read_json, write_json

ROUTES = "routing.json"  # prune-eval writes it
SCHEMA = 1
UNITS = {
    "counts": "tokens per expert",
    "information": "bits, I(X;T) = H(T) - H(T|X): what the router's choice tells of the token (arXiv:2605.05278)",
    "gate_entropy": "bits, H(T) of the router's mean softmax",
    "changed": "tokens by how many of their experts are others in the packed model, from none to all",
    "flips": "tokens of which one expert alone is another: which, and which instead; the most frequent",
}


@dataclass(frozen=True)
class Routes:
    """One model's routing in one layer; see `units` of the file."""

    counts: Sequence[Annotated[int, Within(0)]]
    information: float
    gate_entropy: float


@dataclass(frozen=True)
class Flip:
    """Tokens that one expert lost to another."""

    original: Annotated[int, Within(0)]
    packed: Annotated[int, Within(0)]
    tokens: Annotated[int, Within(1)]


@dataclass(frozen=True)
class LayerRoutes:
    """Both models in one layer."""

    layer: Annotated[int, Within(0)]
    original: Routes
    packed: Routes
    changed: Sequence[Annotated[int, Within(0)]]
    flips: Sequence[Flip]

    @property
    def changed_share(self) -> float:
        """Share of (token, slot) choices that differ."""
        slots = (len(self.changed) - 1) * sum(self.changed)
        return 1.0 - (slots - sum(number * tokens for number, tokens in enumerate(self.changed))) / slots


def write_routes(path: Path, layers: Sequence[LayerRoutes]) -> None:
    """Writes the file in one atomic replace."""
    write_json(path, {"schema": SCHEMA, "units": UNITS, "layers": [asdict(layer) for layer in layers]})


def read_routes(path: Path) -> tuple[LayerRoutes, ...]:
    """Reads it back; nothing where an earlier version evaluated. Raises ArtifactError for a damaged one."""
    if not path.exists():
        return ()
    content = read_json(path)
    with reading(path, "routing of this version", "Run prune-eval --force."):
        take_schema(content, SCHEMA)
        layers: Sequence[LayerRoutes] = read_as(Sequence[LayerRoutes], content.get("layers"), "layers")
        for layer in layers:
            experts = len(layer.original.counts)
            flipped = [end for flip in layer.flips for end in (flip.original, flip.packed)]
            if not experts or len(layer.packed.counts) != experts or len(layer.changed) < 2 or not sum(layer.changed):
                raise FieldError(f"layers: layer {layer.layer} has counts of different experts, or no token")
            if any(expert >= experts for expert in flipped):
                raise FieldError(f"layers: layer {layer.layer} has flips of experts that it has not")
    return tuple(layers)
