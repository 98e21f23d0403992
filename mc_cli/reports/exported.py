"""How large an export is, and how exactly it was read back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mc_cli.artifacts.export_record import ExportRecord
from mc_cli.reports.tables import summary

if TYPE_CHECKING:
    from mc_cli.measuring.readback import ReadBack


def export_summary(record: ExportRecord, found: ReadBack, *, format: str, folder: Path) -> dict[str, Any]:
    """Facts alone; `found` is what the record says of reading back."""
    facts = {
        "format": format,
        **_place(record, folder),
        "read back": found.compared,
        "logit error": f"{found.logit_error_median:.2g} for the median of {found.tokens} tokens (allowed "
        f"{found.tolerance:.2g}), {found.logit_error_max:.2g} at most",
        "same top token": f"{100 * found.same_top_token:.1f} %",
    }
    return summary(facts, read_back=dict(record.read_back))


def _place(record: ExportRecord, target: Path) -> dict[str, Any]:
    files, size = record.extent(target)
    if target.is_file():
        return {"file": str(target), "file bytes": size}
    return {"directory": str(target), "directory bytes": size, "files": files}
