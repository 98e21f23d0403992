"""README.md of an exported model: what it is, its real size, what was measured, how it was made, how to load it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import yaml

from mc_cli.artifacts.packed import StoredBytes

MAX_ROWS = 60


@dataclass(frozen=True)
class CardFacts:
    """The facts of a model card, gathered from the artifacts of the work directory."""

    model_type: str
    code_bits_per_weight: float  # routed experts, codes alone
    stored_bits_per_weight: float  # routed experts, scales and zero points included
    role_bytes: Mapping[str, StoredBytes]
    base_model: str | None = None
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    stages: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # stage -> settings, inputs, fingerprint
    experts_dropped: int = 0
    experts: int = 0
    tool_version: str = ""
    left_out: tuple[str, ...] = ()  # sentences on what of the original is not in the export
    original: Mapping[str, Any] = field(default_factory=dict)  # licence and languages, as the original's card says

    @property
    def total_bytes(self) -> int:
        return sum(sizes.total for sizes in self.role_bytes.values())


def model_card(
    facts: CardFacts, *, title: str, opening: str, loading: str, size_note: str = "", library: str = "transformers"
) -> str:
    """The card's Markdown; `opening`, `loading` and `size_note` are the exporter's own words.

    library  that loads it, by the hub's name
    """
    parts = [_front_matter(facts, title, library), f"# {title}", opening, "## How to load it", loading]
    parts += ["## What is not in it", *facts.left_out] if facts.left_out else []
    parts += ["## Size", _size_sentence(facts, size_note), _size_table(facts)]
    parts += _measured(facts.evaluation)
    parts += ["## Licence", _licence(facts)]
    parts += ["## How it was made", *_stage_sections(facts)]
    return "\n\n".join(parts) + "\n"


def _front_matter(facts: CardFacts, title: str, library: str) -> str:
    """Metadata under the names that the hub reads."""
    entries: dict[str, Any] = dict(facts.original)
    if facts.base_model:
        entries |= {"base_model": facts.base_model, "base_model_relation": "quantized"}
    entries |= {
        "pipeline_tag": "text-generation",
        "tags": ["mixture-of-experts", "quantized", "mc-cli", facts.model_type],
    }
    metrics = list(_metrics(facts))
    if metrics:
        text = {"task": {"type": "text-generation"}, "dataset": {"type": "text", "name": "held-out text"}}
        entries["model-index"] = [{"name": title, "results": [{**text, "metrics": metrics}]}]
    written = yaml.safe_dump(entries, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\nlibrary_name: {library}\n{written}---"


def _metrics(facts: CardFacts) -> Iterable[dict[str, Any]]:
    """Size and what was measured, as the card's metadata names them; `mc-cli compare` reads them."""
    total = facts.evaluation.get("total")
    if not _is_measured(total):
        return
    gap = total["packed_loss"] - total["original_loss"]
    values = {
        "perplexity": math.exp(total["packed_loss"]),
        "original_loss": total["original_loss"],
        "loss_gap": gap,
        "kl_divergence": total.get("kl_divergence"),
        "same_top_token": total.get("same_top_token"),
        "tokens": total["tokens"],
        "stored_bits_per_expert_weight": facts.stored_bits_per_weight,
    }
    for name, value in values.items():
        if value is not None:
            yield {"type": name, "value": value}


def _is_measured(total: Any) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(total, Mapping) and {"tokens", "original_loss", "packed_loss"} <= total.keys()


def _size_sentence(facts: CardFacts, size_note: str) -> str:
    return (
        f"Routed experts take {facts.stored_bits_per_weight:.3f} stored bits per weight, scales and zero points "
        f"included ({facts.code_bits_per_weight:.3f} bits of codes). All tensors together are {facts.total_bytes:,} "
        f"bytes.{_dropped(facts)} {size_note}"
    ).strip()


def _dropped(facts: CardFacts) -> str:
    if not facts.experts_dropped:
        return ""
    count = f"{facts.experts_dropped} of {facts.experts}"
    return f" {count} experts are dropped: they are not stored, and no router chooses them."


def _licence(facts: CardFacts) -> str:
    names = facts.original.get("license_name") or facts.original.get("license")
    of_original = f"the original{f' {facts.base_model}' if facts.base_model else ''}"
    if not names:
        return f"That of {of_original}, whose files did not say which; its licence files, where it has some, are here."
    named = ", ".join(map(str, names)) if isinstance(names, list) else names
    return f"That of {of_original}: {named}. Its licence files, where it has some, are here."


def _size_table(facts: CardFacts) -> str:
    largest_first = sorted(facts.role_bytes.items(), key=lambda item: -item[1].total)
    counts = [[sizes.codes, sizes.side, sizes.kept, sizes.total] for _, sizes in largest_first]
    names = [role for role, _ in largest_first] + ["all"]
    counts.append([sum(column) for column in zip(*counts, strict=True)])
    heads = ("part", "codes, bytes", "scales and zero points, bytes", "kept, bytes", "total, bytes")
    return _table(heads, ((name, *(f"{count:,}" for count in row)) for name, row in zip(names, counts, strict=True)))


def _stage_sections(facts: CardFacts) -> Iterable[str]:
    yield f"mc-cli {facts.tool_version}. `mc_cli.json` has this record for machines, and the digest of every file here."
    for stage, record in facts.stages.items():
        rows = [(f"`{name}`", _shown(value)) for name, value in record.get("settings", {}).items()]
        rows += [(f"input `{name}`", f"`{value}`") for name, value in record.get("inputs", {}).items()]
        rows.append(("fingerprint", f"`{record.get('fingerprint', '')}`"))
        yield f"### {stage}\n\n{_table(('setting', 'value'), rows)}"


def _measured(evaluation: Mapping[str, Any]) -> list[str]:
    """Perplexities on held-out text and task results; nothing where the model was not evaluated."""
    total = evaluation.get("total")
    if not _is_measured(total):
        return []
    domains = evaluation.get("domains") or {}
    rows = [_text_row(name, text) for name, text in domains.items() if len(domains) > 1]
    rows.append(_text_row("all", total))
    heads = (
        "held-out text",
        "tokens",
        "perplexity, original",
        "perplexity, packed",
        "KL, nats per token",
        "same top token",
    )
    sections = ["## Measured", _table(heads, rows)]
    tasks = [(f"`{name}`", _shown(value)) for name, value in _leaves(evaluation.get("tasks") or {})]
    return sections + ([_table(("task", "value"), tasks)] if tasks else [])


def _text_row(name: str, text: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        name,
        f"{text['tokens']:,}",
        f"{math.exp(text['original_loss']):.4f}",
        f"{math.exp(text['packed_loss']):.4f}",
        _shown(text.get("kl_divergence", "")),
        _shown(text.get("same_top_token", "")),
    )


def _leaves(value: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    """Numbers of a nested JSON value by their dotted path."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, f"{path}.{name}" if path else str(name))
    elif isinstance(value, (int, float)):
        yield path, value


def _shown(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    text = text.replace("|", "\\|").replace("\n", " ")
    return text if len(text) <= 120 else text[:117] + "..."


def _table(heads: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    heads, rows = list(heads), [list(map(str, row)) for row in rows]
    lines = [heads, ["---"] * len(heads), *rows[:MAX_ROWS]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
