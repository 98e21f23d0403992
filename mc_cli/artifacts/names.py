"""Names of the files that more than one stage reads or writes; their formats have modules of their own here."""

from __future__ import annotations

IMPORTANCE = "importance.json"  # of score
PLAN = "plan.yaml"  # of allocate
COVERAGE = "coverage.json"  # of quantize
EVALUATION = "eval.json"  # of prune-eval
