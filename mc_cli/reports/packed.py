"""The size of the packed model, and that every expert weight is accounted for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mc_cli.artifacts.packed import StoredBytes
from mc_cli.artifacts.quantization import Coverage, MatrixReport
from mc_cli.parts import Role
from mc_cli.reports.tables import summary, table

_SHOWN = 12  # dropped experts of a layer


def packed_summary(
    stored: Mapping[Role, StoredBytes], matrices: Iterable[MatrixReport], coverage: Coverage, *, routines: str
) -> dict[str, Any]:
    """Stored bytes by role, the largest first.

    matrices   of the whole model;  routines   which compiled routines the machine has
    """
    facts = {
        "stored bytes": sum(sizes.total for sizes in stored.values()),
        "compiled routines": routines,
        "expert coverage": f"{100 * coverage.covered:.1f} % ({coverage.quantized:,} quantized, "
        f"{coverage.kept:,} kept, {coverage.pruned:,} dropped"
        + (f", {coverage.shared:,} shared)" if coverage.shared else ")"),
    }
    if coverage.experts_dropped:
        facts["experts dropped"] = "; ".join(
            f"layer {layer}: {_listing(names)}" for layer, names in coverage.experts_dropped.items()
        )
    return summary(facts, _sizes(stored, matrices), coverage=asdict(coverage))


def _sizes(stored: Mapping[Role, StoredBytes], matrices: Iterable[MatrixReport]) -> dict[str, Any]:
    weights: dict[str, int] = {}
    code_bits: dict[str, float] = {}
    for matrix in matrices:
        if matrix.outcome == "quantized":
            weights[matrix.role] = weights.get(matrix.role, 0) + matrix.weight_count
            code_bits[matrix.role] = code_bits.get(matrix.role, 0.0) + matrix.weight_count * matrix.bits
    rows: list[list[Any]] = []
    for role, sizes in sorted(stored.items(), key=lambda item: -item[1].total):
        count = weights.get(role.value)
        mean_code = round(code_bits[role.value] / count, 3) if count else None
        mean_stored = round(8 * (sizes.codes + sizes.side) / count, 3) if count else None
        rows.append([role.value, sizes.total, sizes.codes, sizes.side, sizes.kept, mean_code, mean_stored])
    columns = ["role", "stored bytes", "codes", "scales and zero points", "kept"]
    columns += ["code bits per weight", "stored bits per weight"]
    return table("Stored bytes of the packed model", columns, rows, left=1)


def _listing(names: Sequence[int]) -> str:
    shown = ", ".join(map(str, names[:_SHOWN]))
    return shown if len(names) <= _SHOWN else f"{shown} ... ({len(names)})"
