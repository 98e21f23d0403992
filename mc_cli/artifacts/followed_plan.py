"""The plan that a packed model was made from: allocate's, or one that quantize was given, of which it keeps a copy."""

from __future__ import annotations

from pathlib import Path

from mc_cli.artifacts.manifest import Manifest
from mc_cli.artifacts.names import PLAN
from mc_cli.artifacts.work_dir import WorkDir

FOLLOWED = "followed"  # folder in packed/, so that its file of channels is not taken for weights


def follows_own_plan(packed: Manifest) -> bool:
    """Whether quantize was given a plan with --plan, so that allocate has no part in the packed model."""
    return "plan" in packed.inputs and "allocate" not in packed.inputs


def followed_plan(work: WorkDir) -> Path | None:
    """Where the plan lies that the packed model of a variant was made from; None: it is not known.

    None where nothing is packed, where allocate has made another plan since, and where an earlier version quantized a
    plan that it was given.
    """
    packed, planned = Manifest.read(work.folder("quantize")), Manifest.read(work.folder("allocate"))
    if packed is None:
        return None
    if follows_own_plan(packed):
        kept = work.folder("quantize") / FOLLOWED / PLAN
        return kept if kept.exists() else None
    own = planned is not None and packed.inputs.get("allocate") == planned.fingerprint
    return work.folder("allocate") / PLAN if own else None
