"""Measures dense folders that the peers' scripts made beside the original, on the same held-out windows as quality.py.

Loss gap, KL divergence and perplexity, with --tasks also the accuracy of lm-eval tasks. Rows go to a JSON file with the
keys of quality.py; folders that are in it already are not measured again. Run in the environment of this project.

    python recipes/benchmarks/peers/measure.py --model DIR --heldout FOLDER --out peers.json FOLDER [FOLDER ...]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from experts import STORED
from rich.console import Console
from rich.table import Table

from mc_cli.data import text
from mc_cli.errors import InputError
from mc_cli.measuring.comparison import losses
from mc_cli.measuring.lm_eval_tasks import Tasks, evaluate_folder, ready_tasks
from mc_cli.models.experts import IMPLEMENTATION
from mc_cli.models.inventory import take_inventory
from mc_cli.models.session import Session, first_session
from mc_cli.parts import ModelInventory
from mc_cli.settings import EvaluateSettings, RunSettings
from mc_cli.stages.prune_eval import heldout_windows
from mc_cli.walking.layerwise import LayerWalk

ORIGINAL = "original"


def main() -> None:
    given = parse()
    results: list[dict[str, Any]] = json.loads(given.out.read_text()) if given.out.exists() else []
    settings = EvaluateSettings(
        data=given.heldout,
        length=given.length,
        max_sequences=given.max_windows,
        tasks=tuple(given.tasks),
        include_path=given.include_path,
    )
    session = first_session(given.out.parent, given.model, None, RunSettings())
    tasks = ready_tasks(settings, session)
    windows = heldout_windows(settings, session)
    original: LayerWalk | None = None  # walked once for all folders, and only if one is to be measured
    for folder in given.folders:
        stored = json.loads((folder / STORED).read_text())
        key = {
            "seed": stored["seed"],
            "contender": f"{stored['tool']} {stored['encoding']}",
            "windows": len(windows.token_ids),
        }
        row = next((row for row in results if key.items() <= row.items()), None)
        if row is None:
            original = original or walked(session, windows)
            row = {**key, **loss(session, original, folder, windows, stored), "stored": stored}
            results.append(row)
        if tasks is not None and "tasks" not in row:
            row["tasks"] = accuracy(tasks, settings, session, folder)
            if not any("original_tasks" in other for other in results):
                row["original_tasks"] = accuracy(tasks, settings, session, session.folder)
        given.out.write_text(json.dumps(results, indent=1) + "\n")
        print({name: row[name] for name in ("contender", "seed", "stored_bits", "gap", "kl")}, file=sys.stderr)
    show(results)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*", help="what the peers' scripts wrote")
    parser.add_argument("--model", required=True)
    parser.add_argument("--heldout", required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/peers/peers.json"))
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument(
        "--max-windows", type=int, default=256, help="held-out windows, evenly over the domains; 0 = all"
    )
    parser.add_argument("--tasks", nargs="*", default=[], help="lm-eval tasks, such as continuation minimal_pairs")
    parser.add_argument("--include-path", help="folder of local task files, such as recipes/tasks")
    parsed = parser.parse_args()
    parsed.out.parent.mkdir(parents=True, exist_ok=True)
    return parsed


def walked(session: Session, windows: text.Windows) -> LayerWalk:
    """A walk over the windows that has passed the last layer."""
    source = session.open_checkpoint()
    source.model.set_experts_implementation(IMPLEMENTATION)
    walk = LayerWalk(source, windows.batch, batch_size=session.batch_size(windows.batch.length))
    for layer in range(walk.num_layers):
        source.load(layer)
        walk.run_layer(advance=True)
        source.free(layer)
    return walk


def loss(
    session: Session, original: LayerWalk, folder: Path, windows: text.Windows, stored: dict[str, Any]
) -> dict[str, Any]:
    """The row of one folder, without its accuracy. Raises InputError where other expert weights are stored."""
    source = session.open_checkpoint()
    inventory: ModelInventory = take_inventory(source.model, stored_dtypes=source.stored_dtypes)
    if stored["expert_parameters"] != inventory.expert_weight_count:
        raise InputError(
            f"{folder}: {stored['expert_parameters']:,} expert weights are counted in {STORED}, the model has "
            f"{inventory.expert_weight_count:,}. Make the folder again."
        )
    total, domains = losses(original, walked(at_folder(session, folder), windows), windows)
    compressed = {role: stored.get(f"{role}_bytes") for role in ("expert", "attention", "embedding")}
    sizes = {role.value: size for role, size in inventory.bytes_by_role().items()}
    sizes |= {role: size for role, size in compressed.items() if size is not None}
    return {
        "stored_bits": stored["stored_bits"],
        "expert_bytes": stored["expert_bytes"],
        "model_bytes": sum(sizes.values()),
        "tokens": total.tokens,
        "original_loss": total.original_loss,
        "gap": total.packed_loss - total.original_loss,
        "kl": total.kl_divergence,
        "perplexity": math.exp(total.packed_loss),
        "domain_gaps": {name: entry.packed_loss - entry.original_loss for name, entry in domains.items()},
    }


def at_folder(session: Session, folder: Path) -> Session:
    return first_session(session.work_dir, str(folder), None, session.compute)


def accuracy(tasks: Tasks, settings: EvaluateSettings, session: Session, folder: Path) -> dict[str, float]:
    """Accuracy by task."""
    found = evaluate_folder(tasks, settings, at_folder(session, folder))["results"]
    return {task: entry["acc,none"] for task, entry in found.items()}


def show(results: list[dict[str, Any]]) -> None:
    """One row per contender: means over its seeds, and the range of the gap."""
    if not results:
        return
    table = Table(title=f"Experts only; original: perplexity {math.exp(results[0]['original_loss']):.3f}")
    for name in ("contender", "stored bits", "tokens", "gap, nats/token", "KL", "perplexity", "accuracy", "seeds"):
        table.add_column(name, justify="left" if name == "contender" else "right")
    keys = {(row["contender"], row["tokens"]): row["stored_bits"] for row in reversed(results)}
    for (contender, tokens), bits in sorted(keys.items(), key=lambda entry: (entry[1], entry[0])):
        rows = [row for row in results if row["contender"] == contender and row["tokens"] == tokens]
        gaps = [row["gap"] for row in rows]
        scores = [row["tasks"] for row in rows if "tasks" in row]
        names = sorted({name for score in scores for name in score})
        table.add_row(
            contender,
            f"{bits:.4f}",
            f"{tokens:,}",
            f"{statistics.mean(gaps):.4f} [{min(gaps):.4f}, {max(gaps):.4f}]",
            f"{statistics.mean(row['kl'] for row in rows):.4f}",
            f"{statistics.mean(row['perplexity'] for row in rows):.3f}",
            ", ".join(f"{name} {100 * statistics.mean(score[name] for score in scores):.1f}" for name in names),
            str(len(rows)),
        )
    Console(width=170).print(table)


if __name__ == "__main__":
    main()
