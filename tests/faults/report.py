"""Reports the trials: a table, the unacceptable ones with the command that repeats each, and the same as JSON."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.faults.trial import ACCEPTABLE, TrialResult, Verdict


def table(results: Sequence[TrialResult]) -> str:
    """Verdicts by part, and kills and calls by stage."""
    parts = list(dict.fromkeys(result.part for result in results))
    counts = Counter((result.part, result.verdict) for result in results)
    width = max(len(verdict) for verdict in Verdict)
    lines = [" " * width + "".join(f"{part:>11}" for part in parts)]
    for verdict in Verdict:
        if any(counts[part, verdict] for part in parts):
            lines.append(f"{verdict:<{width}}" + "".join(f"{counts[part, verdict] or '-':>11}" for part in parts))
    totals = Counter(result.part for result in results)
    lines.append(f"{'trials':<{width}}" + "".join(f"{totals[part]:>11}" for part in parts))
    return "\n".join(lines)


def failures(results: Iterable[TrialResult], seed: int, plan: str) -> str:
    """A paragraph for each unacceptable trial."""
    return "\n\n".join(
        f"{result.verdict} - {result.stage}: {result.what}\n  {result.detail}\n"
        f"  again: python -m tests.faults {result.part} --plan {plan} --seed {seed} --trial {result.number}"
        for result in results
        if not result.acceptable
    )


def as_json(results: Sequence[TrialResult], *, seed: int, plan: str, wall_s: float) -> dict[str, Any]:
    """Counts with what they were measured at: commit, plan, seed, machine."""
    parts: dict[str, Any] = {}
    for part in dict.fromkeys(result.part for result in results):
        own = [result for result in results if result.part == part]
        stages = Counter(result.stage for result in own)
        parts[part] = {
            "trials": len(own),
            "verdicts": dict(Counter(str(result.verdict) for result in own).most_common()),
            "acceptable": sum(result.acceptable for result in own),
            "by_stage": dict(sorted(stages.items())),
            "cpu_s_per_trial": round(sum(result.cpu_s for result in own) / len(own), 3),
            "failing": [
                {
                    "trial": result.number,
                    "stage": result.stage,
                    "what": result.what,
                    "verdict": str(result.verdict),
                    "detail": result.detail,
                }
                for result in own
                if not result.acceptable
            ],
        }
    return {
        "commit": _commit(),
        "plan": plan,
        "seed": seed,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
        "wall_s": round(wall_s, 1),
        "acceptable_verdicts": sorted(map(str, ACCEPTABLE)),
        "parts": parts,
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes the counts as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _commit() -> str:
    """The commit that is checked out, with a plus where files differ from it."""
    root = Path(__file__).parent
    words = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
