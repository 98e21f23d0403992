"""A work directory: one calibration and one set of scores, and over them any number of variants.

    calibration/ importance/ importance.ENGINE/           of all variants; the latter by `score --for ENGINE`
    plan/ packed/ evaluation/ pruning/                    of the variant `main`
    variants/NAME/{plan,packed,evaluation,pruning}/       of any other

A variant's name is a place and nothing else: it is in no fingerprint, so the same plan gives the same bytes everywhere.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mc_cli.errors import InputError

# command -> folder in the work directory, in the order of a run
STAGE_FOLDERS = {
    "calibrate": "calibration",
    "score": "importance",
    "allocate": "plan",
    "quantize": "packed",
    "prune-eval": "evaluation",
}
POLICY_STAGE, POLICY_FOLDER = "policy", "pruning"  # what prune-eval makes beside its own folder
FOLDERS = STAGE_FOLDERS | {POLICY_STAGE: POLICY_FOLDER}
SHARED = ("calibrate", "score")  # the stages whose results all variants read
MAIN = "main"  # the variant that lies in the work directory itself
_OF_ENGINES = ("score", "allocate", "quantize")  # the stages that take --for
VARIANTS = "variants"  # the folder of the others
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,62}[A-Za-z0-9])?")
_OURS = (".partial", ".removed", ".replaced")  # what names of ours end in while something is made or removed
_RESERVED = (VARIANTS, *FOLDERS.values())


@dataclass(frozen=True)
class WorkDir:
    """A work directory, and which variant is meant. Raises InputError for a name that no variant can have."""

    path: Path
    variant: str = MAIN
    engine: str | None = None  # whose scores are meant; None: those of no engine

    def __post_init__(self) -> None:
        check_variant(self.variant)

    def folder(self, stage: str) -> Path:
        """Where the results of a stage (or of `policy`) lie."""
        name = (STAGE_FOLDERS | FOLDERS)[stage]
        return self._place(stage) / (f"{name}.{self.engine}" if stage == "score" and self.engine else name)

    def _place(self, stage: str) -> Path:
        return self.path if stage in SHARED or self.variant == MAIN else self.path / VARIANTS / self.variant

    def command(self, stage: str) -> str:
        """The command line of a stage in this variant, for messages."""
        return f"mc-cli {command_of(stage)} {self.flags(stage)}"

    def flags(self, stage: str = "") -> str:
        """`-w DIR`, with `--variant NAME` and `--for ENGINE` where a stage needs them."""
        named = self.variant != MAIN and stage not in SHARED
        variant = f" --variant {self.variant}" if named else ""
        engine = f" --for {self.engine}" if self.engine and stage in _OF_ENGINES else ""
        return f"-w {self.path}{variant}{engine}"

    @classmethod
    def around(cls, folder: Path) -> WorkDir:
        """The work directory and variant that a stage's folder lies in."""
        place = folder.parent
        whole = place.parent.parent / STAGE_FOLDERS["calibrate"]
        if place.parent.name == VARIANTS and is_variant(place.name) and whole.is_dir():
            return cls(place.parent.parent, place.name)
        return cls(place)

    def variants(self) -> list[str]:
        """The variants that have a folder of theirs, finished or not; `main` first, the others by name."""
        above = self.path / VARIANTS
        names = sorted(entry.name for entry in above.iterdir() if is_variant(entry.name)) if above.is_dir() else []
        return [name for name in (MAIN, *names) if WorkDir(self.path, name)._has_folder()]

    def engines(self) -> list[str]:
        """The engines that have scores of their own, finished or not."""
        before = STAGE_FOLDERS["score"] + "."
        found = self.path.glob(f"{before}*") if self.path.is_dir() else ()
        return sorted(
            entry.name.removeprefix(before) for entry in found if entry.is_dir() and not entry.name.endswith(_OURS)
        )

    def _has_folder(self) -> bool:
        return any(self.folder(stage).is_dir() for stage in FOLDERS if stage not in SHARED)


def check_variant(name: str) -> None:
    """Raises InputError for a name that no variant can have."""
    if not is_variant(name):
        raise InputError(
            f"--variant {name!r:.100}: a variant's name has up to 64 letters, digits, dots and dashes, with a letter "
            f"or digit at both ends, and is none of {', '.join(_RESERVED)}, which are folders of a work directory."
        )


def is_variant(name: str) -> bool:
    """Whether a variant can have this name."""
    fits = name == MAIN or (_NAME.fullmatch(name) is not None and ".." not in name and name.lower() != MAIN)
    return fits and name.lower() not in _RESERVED and not name.lower().endswith(_OURS)


def command_of(stage: str) -> str:
    """The command that makes a stage's folder."""
    return "prune-eval" if stage == POLICY_STAGE else stage
