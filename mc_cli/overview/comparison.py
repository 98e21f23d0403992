"""Several results side by side: variants of work directories, exported directories, figures that others measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mc_cli.artifacts.export_record import ExportRecord
from mc_cli.artifacts.exported_file import export_place
from mc_cli.artifacts.front_matter import CARD, front_matter
from mc_cli.artifacts.places import require_ordinary
from mc_cli.artifacts.strict_json import JsonError, parse_json
from mc_cli.artifacts.work_dir import MAIN, STAGE_FOLDERS
from mc_cli.errors import InputError, Problems, shown
from mc_cli.overview.sources import Measured, read_measured
from mc_cli.overview.tensor_bytes import tensor_bytes

_NEEDED = ("contender", "gap")  # of a row in a file of figures
_SAME_LOSS = 1e-4  # relative; two measurements of one original on one text differ by less


@dataclass(frozen=True)
class Compared:
    """One result; what is not known of it is None.

    stored_bytes   of all stored tensors, heads of their files and what lies beside them not counted
    stored_bits    stored bits per expert weight
    gap, kl        nats per token on the text it was measured on
    original_loss, tokens   by which two measurements on one text are known
    runs           how many measurements the figures are the mean of
    """

    name: str
    source: str
    stored_bytes: int | None = None
    stored_bits: float | None = None
    perplexity: float | None = None
    gap: float | None = None
    kl: float | None = None
    same_top_token: float | None = None
    original_loss: float | None = None
    tokens: int | None = None
    runs: int = 1

    def plain(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def compare(sources: Sequence[Path]) -> tuple[list[Compared], list[str]]:
    """(every result of the sources, in their order; sentences on what was left out, and on what cannot be compared).

    sources   work directories, exported directories, JSON files with rows of contender, gap, stored_bits and so on
    Raises InputError naming every source that is none of them, or holds nothing that was measured.
    """
    problems, found, warnings = Problems(), [], []
    for source in sources:
        with problems.catching():
            results, told = _read(source, many=len(sources) > 1)
            found += results
            warnings += told
    problems.tell()
    found = _told_apart(found)
    return found, warnings + _unsized(found) + _unmeasured(found) + _other_texts(found)


def _told_apart(found: Sequence[Compared]) -> list[Compared]:
    """The results, those of one name with as many of the folders above them as tell them apart."""
    return [
        replace(entry, name=_own_name(entry, [other for other in found if other.name == entry.name])) for entry in found
    ]


def _own_name(entry: Compared, namesakes: Sequence[Compared]) -> str:
    """`a/o` for `o` where there is also one in `b/o`; the name as it is where no folder tells them apart."""
    ends = [[*_folders_above(other), other.name] for other in namesakes]
    mine = [*_folders_above(entry), entry.name]
    for length in range(1, len(mine) + 1):
        if sum(end[-length:] == mine[-length:] for end in ends) == 1:
            return "/".join(mine[-length:])
    return entry.name


def _folders_above(entry: Compared) -> tuple[str, ...]:
    return Path(entry.source).resolve().parent.parts[1:]


def _unsized(found: Sequence[Compared]) -> list[str]:
    """A sentence on exported directories whose weights cannot be counted."""
    names = [entry.name for entry in found if entry.stored_bytes is None and export_place(Path(entry.source)).is_ours()]
    if not names:
        return []
    return [
        f"Stored bytes of {', '.join(names)} are not known: files of weights are not there, or not whole. Run "
        "`mc-cli verify` on the directory."
    ]


def _unmeasured(found: Sequence[Compared]) -> list[str]:
    """A sentence on exported directories whose card does not say what was measured."""
    names = [entry.name for entry in found if entry.gap is None]
    if not names:
        return []
    return [
        f"Nothing measured is known of {', '.join(names)}: {CARD} has no figures. Run prune-eval before export, and "
        "export again, or compare the work directory."
    ]


def _read(source: Path, *, many: bool) -> tuple[list[Compared], list[str]]:
    if export_place(source).is_ours():
        return [_exported(source)], []
    if source.is_file():
        return list(_figures(source)), []
    if any((source / folder).is_dir() for folder in STAGE_FOLDERS.values()):
        measured, left_out = read_measured(source)
        if not measured:
            raise InputError(f"{source} has no variant that was evaluated. Run `mc-cli prune-eval -w {source}` first.")
        return [of_variant(entry, many=many) for entry in measured], left_out
    raise InputError(
        f"{source} is no work directory, no directory that export made and no JSON file of figures. Name such ones."
    )


def of_variant(entry: Measured, *, many: bool = False) -> Compared:
    """The result of a variant; `many`: its name has to say which work directory it is of."""
    total, place = entry.evaluation.total, entry.work.path.name
    name = entry.work.variant
    if many:
        name = place if name == MAIN else f"{place}/{name}"
    return Compared(
        name=name,
        source=str(entry.work.path),
        stored_bytes=entry.stored_bytes,
        stored_bits=entry.evaluation.expert_stored_bits,
        perplexity=math.exp(total.packed_loss),
        gap=entry.gap,
        kl=total.kl_divergence,
        same_top_token=total.same_top_token,
        original_loss=total.original_loss,
        tokens=total.tokens,
    )


def _exported(folder: Path) -> Compared:
    """An exported directory: its tensors' bytes, and what the front matter of its model card says was measured."""
    record = ExportRecord.read(folder)
    assert record is not None
    metrics = _card_metrics(folder)
    return Compared(
        name=folder.resolve().name,
        source=str(folder),
        stored_bytes=tensor_bytes(folder, record.outputs)
        if folder.is_dir()
        else tensor_bytes(folder.parent, [folder.name]),
        stored_bits=metrics.get("stored_bits_per_expert_weight"),
        perplexity=metrics.get("perplexity"),
        gap=metrics.get("loss_gap"),
        kl=metrics.get("kl_divergence"),
        same_top_token=metrics.get("same_top_token"),
        original_loss=metrics.get("original_loss"),
        tokens=None if "tokens" not in metrics else round(metrics["tokens"]),
    )


def _card_metrics(folder: Path) -> dict[str, float]:
    """Metric -> value of a card's model-index; empty where it has none, as those of earlier exports."""
    try:
        results = front_matter(folder)["model-index"][0]["results"][0]["metrics"]
        return {str(entry["type"]): float(entry["value"]) for entry in results}
    except (KeyError, IndexError, TypeError, ValueError):
        return {}


def _figures(path: Path) -> Iterable[Compared]:
    """Rows of a JSON file, those of one contender and size as their mean: what recipes/benchmarks write."""
    try:
        require_ordinary(path)
        rows: Any = parse_json(path.read_bytes(), finite=False, unique=False)
    except (JsonError, OSError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}. Name a file of figures.") from error
    rows = rows.get("results", rows.get("runs")) if isinstance(rows, dict) else rows
    if not isinstance(rows, list) or not rows or not all(_is_row(row) for row in rows):
        raise InputError(
            f"{path} should hold a list of results, each with {' and '.join(_NEEDED)} (nats per token), and where "
            "known stored_bits, model_bytes, kl, perplexity, original_loss, tokens."
        )
    groups: dict[tuple[str, Any], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["contender"], row.get("target", row.get("stored_bits"))), []).append(row)
    for (name, _), group in groups.items():
        mean = {key: _mean(path, group, key) for key in _NUMBERS}
        size, tokens = mean.pop("model_bytes"), mean.pop("tokens")
        whole = None if size is None else round(size)
        count = None if tokens is None else round(tokens)
        yield Compared(name, str(path), whole, tokens=count, runs=len(group), **mean)


_NUMBERS = ("stored_bits", "model_bytes", "perplexity", "gap", "kl", "original_loss", "tokens")


def _is_row(row: Any) -> bool:
    return isinstance(row, dict) and isinstance(row.get("contender"), str) and isinstance(row.get("gap"), int | float)


def _mean(path: Path, rows: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if row.get(key) is not None]
    wrong = [value for value in values if not isinstance(value, int | float) or not math.isfinite(value)]
    if wrong:
        raise InputError(f"{path}: {key} is {shown(wrong[0])} in a row of {rows[0]['contender']!r:.60}, not a number.")
    return statistics.fmean(values) if values else None


def _other_texts(found: Sequence[Compared]) -> list[str]:
    """A sentence where results were not measured on the same original and text."""
    known = [entry for entry in found if entry.original_loss is not None]
    if not known or known[0].original_loss is None:
        return []
    first = known[0]
    assert first.original_loss is not None
    other = [
        entry.name
        for entry in known
        if abs((entry.original_loss or 0.0) - first.original_loss) > _SAME_LOSS * first.original_loss
        or (entry.tokens is not None and first.tokens is not None and entry.tokens != first.tokens)
    ]
    if not other:
        return []
    return [
        f"Not on the same text or original as {first.name}: {', '.join(other)}. Gaps and perplexities of these do not "
        "compare; evaluate them with the same --data and --length."
    ]
