"""`packed/report/layer_NNN.json`: what became of every quantized matrix, and the account that proves coverage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

from mc_cli.artifacts.fields import FieldError, Within, read_as, reading, take_schema
from mc_cli.artifacts.files import read_json, write_json
from mc_cli.errors import shown

SCHEMA = 1
OUTCOMES = ("quantized", "kept", "pruned", "shared")


@dataclass(frozen=True)
class MatrixReport:
    """One matrix. For a routed expert `name` is `<experts path>.<expert>.<projection>`, and where the expert is divided
    `.<block>` follows, or `.cut` for the channels that are cut away.

    outcome        quantized, kept, pruned, or shared: not stored, since the router slot runs another expert
    encoding       key of the encoding; None unless quantized
    tokens         calibration tokens behind its Hessian
    proxy_loss     trace(D H D^T), summed over tokens;  relative_error: divided by trace(W H W^T)
    pooled_share   part of the Hessian that came from the layer's pooled tokens
    correction     trace(S H S^T) over trace(W H W^T), S what was added to W to make good for errors made before it, and
                   what the losses count as part of W; None where nothing was to be
    notes          fallbacks: raised damping, no data
    """

    name: str
    role: str
    outcome: str
    weight_count: Annotated[int, Within(0)]
    bits: Annotated[float, Within(0, 64)]
    encoding: str | None = None
    tokens: int | None = None
    proxy_loss: float | None = None
    relative_error: float | None = None
    pooled_share: float = 0.0
    correction: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Report:
    matrices: tuple[MatrixReport, ...]


def write_report(path: Path, rows: Sequence[MatrixReport]) -> None:
    """Writes one layer's rows in one atomic replace."""
    write_json(path, {"schema": SCHEMA, "matrices": [asdict(row) for row in rows]})


def read_report(path: Path) -> list[MatrixReport]:
    """Reads one layer's rows back. Raises ArtifactError where the file is damaged."""
    content = read_json(path)
    with reading(path, "a quantization report", "Run quantize --force."):
        take_schema(content, SCHEMA)
        found: _Report = read_as(_Report, content)
        for place, row in enumerate(found.matrices):
            if row.outcome not in OUTCOMES:
                raise FieldError(f"matrices[{place}].outcome is {shown(row.outcome)}, not one of {', '.join(OUTCOMES)}")
        return list(found.matrices)


@dataclass(frozen=True)
class Coverage:
    """`coverage.json`: routed expert weights by what became of them.

    covered          the share of the model's that is accounted for
    shared           not stored, since another expert stands in for theirs
    experts_dropped  layer -> experts that are in no tensor, and that its router does not choose
    """

    expert_weights: int
    quantized: int
    kept: int
    pruned: int
    covered: float
    experts_dropped: Mapping[str, Sequence[int]] = field(default_factory=dict)
    shared: int = 0

    def write(self, path: Path) -> None:
        """Writes the JSON file in one atomic replace."""
        content = asdict(self)
        if not self.shared:
            del content["shared"]
        write_json(path, content)

    @classmethod
    def read(cls, path: Path) -> Coverage:
        """The account of a finished run. Raises ArtifactError where the file is damaged."""
        content = read_json(path)
        with reading(path, "an account of coverage", "Run quantize --force."):
            found: Coverage = read_as(cls, content)
            return found
