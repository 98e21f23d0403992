"""The packed model beside the original: loss, perplexity, bytes, skipping of experts, tasks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from mc_cli.artifacts.evaluation import Evaluation, TextResult
from mc_cli.reports.tables import PERPLEXITY, summary, table


def evaluation_summary(evaluation: Evaluation, text: str | None, *, images: str | None = None) -> dict[str, Any]:
    """Everything that an evaluation measured.

    text  how rows became text, None where they were plain;  images: what became of rows with images, None without any
    """
    facts = _facts(evaluation)
    facts |= {name: line for name, line in (("text", text), ("images", images)) if line is not None}
    tables = [
        _texts_table(evaluation),
        _bytes_table(evaluation),
        *_pruning_tables(evaluation),
        *_task_tables(evaluation),
    ]
    if not evaluation.pruning:
        return summary(facts, *tables, tasks=dict(evaluation.tasks))
    facts |= _pruning_facts(evaluation.pruning)
    return summary(facts, *tables, tasks=dict(evaluation.tasks), pruning=dict(evaluation.pruning))


def _facts(evaluation: Evaluation) -> dict[str, Any]:
    before = sum(evaluation.original_bytes.values())
    after = sum(sum(parts.values()) for parts in evaluation.stored_bytes.values())
    changes = evaluation.router_changes
    answers = {}
    if evaluation.answers is not None:
        found = evaluation.answers
        answers = {
            "answers right before": f"{found.original_right:,} of {found.answers:,} "
            f"({100 * found.original_right / found.answers:.2f} %)",
            "answers right after": f"{found.packed_right:,} ({100 * found.packed_right / found.answers:.2f} %)",
        }
    files = evaluation.context.get("original_file_bytes")
    coded = {} if files is None else {"bytes of its files": files, "times smaller than these": round(files / after, 3)}
    return {
        "stored bytes before": before,
        "stored bytes after": after,
        "times smaller": round(before / after, 3),
        **coded,
        "stored bits per expert weight": round(evaluation.expert_stored_bits, 4),
        "code bits per expert weight": round(evaluation.expert_code_bits, 4),
        "perplexity before": round(math.exp(evaluation.total.original_loss), 4),
        "perplexity after": round(math.exp(evaluation.total.packed_loss), 4),
        "router choices changed": f"{100 * sum(changes.values()) / len(changes):.2f} % "
        f"(worst layer {100 * max(changes.values()):.2f} %)",
        **answers,
        **{
            f"router choices changed, {kind} tokens": f"{100 * sum(found.values()) / len(found):.2f} %"
            for kind, found in evaluation.router_changes_by_kind.items()
        },
    }


def _texts_table(evaluation: Evaluation) -> dict[str, Any]:
    """One row per domain and one of all; where there is one domain, that of all."""
    context, domains = evaluation.context, evaluation.domains
    rows = [_row(name, entry) for name, entry in domains.items()] if len(domains) > 1 else []
    rows.append(_row("all answers" if evaluation.kinds else "all", evaluation.total))
    rows += [_row(f"{kind} tokens, questions too", entry) for kind, entry in evaluation.kinds.items()]
    columns = ["text", "tokens", "perplexity before", "after", "loss gap (nats)", "KL (nats)", "same top token %"]
    title = f"Original and packed model, context {context['length']}, stride {context['stride']}"
    if context.get("activation_bits") == 8:
        title += ", inputs of 8 bits"
    return table(title, columns, rows, left=1, digits={"perplexity before": PERPLEXITY, "after": PERPLEXITY})


def _pruning_facts(pruning: Mapping[str, Any]) -> dict[str, Any]:
    """The point that ships, in a few figures."""
    chosen = next(row for row in pruning["points"] if row["policy"] == pruning["policy"] and row["chosen"])
    whole = pruning["unpruned"]
    return {
        "policy": pruning["policy"],
        "expert calls skipped": f"{100 * chosen['rate']:.2f} %",
        "perplexity with the policy": f"{chosen['perplexity']:.4f} ({100 * chosen['perplexity_rise']:+.2f} % over "
        "the packed model)",
        "experts per token and layer": f"{chosen['experts_per_token']:.3f} of {whole['experts_per_token']:.3f}",
        "activated bytes per token": f"{chosen['activated_bytes']:,.0f} of {whole['activated_bytes']:,.0f}",
        **_answers_fact(chosen, whole),
    }


def _answers_fact(chosen: Mapping[str, Any], whole: Mapping[str, Any]) -> dict[str, str]:
    """Right answers about images with the policy; nothing for text."""
    if not chosen.get("answers"):
        return {}
    share = 100 * chosen["answers_right"] / chosen["answers"]
    right = f"{chosen['answers_right']:,} of {chosen['answers']:,} ({share:.2f} %)"
    return {"answers right with the policy": f"{right}, without it {whole['answers_right']:,}"}


def _pruning_tables(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Operating points by policy and rate; for the one that ships also its layers and token classes."""
    pruning = evaluation.pruning
    if not pruning:
        return []
    points = sorted(pruning["points"], key=lambda row: (row["policy"] != pruning["policy"], row["policy"], row["rate"]))
    rows = [
        [
            row["policy"] + (" *" if row["chosen"] and row["policy"] == pruning["policy"] else ""),
            round(100 * row["rate"], 2),
            round(row["perplexity"], 3),
            round(100 * row["perplexity_rise"], 3),
            round(row["kl_packed"], 5),
            round(row["experts_per_token"], 3),
            round(row["activated_bytes"]),
            "yes" if row["on_front"] else "",
        ]
        for row in points
    ]
    names = ("policy", "calls skipped %", "perplexity", "rise %", "KL (nats)", "experts per token")
    columns = [*names, "activated bytes", "on the front"]
    digits = {"perplexity": PERPLEXITY}
    whole_table = table("Expert calls skipped while running (* ships)", columns, rows, left=1, digits=digits)
    chosen = next(row for row in points if row["chosen"])
    whole = pruning["unpruned"]
    parts = [
        [f"{kind} {name}", round(mean, 3), round(whole[key][name], 3)]
        for kind, key in (("layer", "experts_by_layer"), ("tokens:", "experts_by_class"))
        for name, mean in chosen[key].items()
    ]
    title = "Experts per token with the policy that ships"
    return [whole_table, table(title, ["where", "with it", "without"], parts, left=1), *_kind_tables(chosen)]


def _kind_tables(chosen: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Skipped calls and thresholds by kind of token; nothing for text."""
    rates, thresholds = chosen.get("rate_by_kind", {}), chosen.get("thresholds_by_kind", {})
    rows = []
    for kind, rate in rates.items():
        each = thresholds.get(kind, chosen["thresholds"])
        rows.append([kind, round(100 * rate, 2), *(round(pick(each), 4) for pick in (min, statistics.median, max))])
    columns = ["tokens", "calls skipped %", "lowest threshold", "median of layers", "highest"]
    return [table("Kinds of token with the policy that ships", columns, rows, left=1)] if rows else []


def _row(name: str, entry: TextResult) -> list[Any]:
    return [
        name,
        entry.tokens,
        round(math.exp(entry.original_loss), 6),  # digits to spare: what is shown is rounded once, from these
        round(math.exp(entry.packed_loss), 6),
        round(entry.packed_loss - entry.original_loss, 8),
        round(entry.kl_divergence, 8),
        round(100 * entry.same_top_token, 4),
    ]


def _bytes_table(evaluation: Evaluation) -> dict[str, Any]:
    rows: list[list[Any]] = []
    for role, before in sorted(evaluation.original_bytes.items(), key=lambda item: -item[1]):
        parts = evaluation.stored_bytes.get(role, {})
        rows.append(
            [role, before, sum(parts.values()), parts.get("codes", 0), parts.get("side", 0), parts.get("kept", 0)]
        )
    columns = ["role", "stored bytes before", "stored bytes after", "codes", "scales and zero points", "kept"]
    return table("Stored bytes by role", columns, rows, left=1)


def _task_tables(evaluation: Evaluation) -> list[dict[str, Any]]:
    if not evaluation.tasks:
        return []
    rows: list[list[Any]] = []
    models = list(evaluation.tasks)  # original, packed, and with a policy "pruned"
    results = [evaluation.tasks[name]["results"] for name in models]
    original = results[0]
    for task in sorted(original):
        for metric, value in sorted(original[task].items()):
            is_metric = "," in metric and "_stderr" not in metric  # with its filter, as in `acc,none`
            if is_metric and isinstance(value, (int, float)):
                error = original[task].get(metric.replace(",", "_stderr,", 1))
                rows.append(
                    [
                        task,
                        metric.split(",")[0],
                        *(round(found[task][metric], 4) for found in results),
                        error if isinstance(error, str) else error and round(error, 4),
                    ]
                )
    headings = ["with the policy" if name == "pruned" else name for name in models]
    columns = ["task", "metric", *headings, "standard error"]
    return [table("lm-eval tasks", columns, rows, left=2)]
