"""`packed/sizes.json`: stored bytes by role, counted once, so that nobody has to build the model to tell them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from mc_cli.artifacts.fields import FieldError, read_as, reading, take_schema
from mc_cli.artifacts.files import read_json, write_json
from mc_cli.artifacts.packed import StoredBytes
from mc_cli.errors import shown
from mc_cli.parts import Role

SIZES = "sizes.json"
SCHEMA = 1


@dataclass(frozen=True)
class _Sizes:
    stored_bytes: Mapping[str, StoredBytes]


def write_sizes(path: Path, sizes: Mapping[Role, StoredBytes]) -> None:
    """Writes the JSON file in one atomic replace."""
    write_json(path, {"schema": SCHEMA, "stored_bytes": {role.value: asdict(part) for role, part in sizes.items()}})


def read_sizes(path: Path) -> dict[Role, StoredBytes]:
    """Reads it back. Raises ArtifactError where the file is damaged."""
    content = read_json(path)
    with reading(path, "an account of sizes", "Run quantize --force."):
        take_schema(content, SCHEMA)
        found: _Sizes = read_as(_Sizes, content)
        known = {role.value: role for role in Role}
        for name, part in found.stored_bytes.items():
            if name not in known or min(part.codes, part.side, part.kept) < 0:
                raise FieldError(f"stored_bytes.{shown(name)} is {shown(asdict(part))}")
        if Role.EXPERT.value not in found.stored_bytes:
            raise FieldError("stored_bytes has no experts")
        return {known[name]: part for name, part in found.stored_bytes.items()}
