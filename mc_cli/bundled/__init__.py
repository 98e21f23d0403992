"""Data that ships with the package: small trained MoEs, one of text and one that sees, and rows to try them on."""

from __future__ import annotations

from pathlib import Path

PREFIX = "bundled:"
BUNDLED = {
    "demo-moe": "demo-moe",
    "calibration": "text/calibration.jsonl",
    "heldout": "text/heldout.jsonl",
    "demo-vision": "demo-vision",
    "scenes": "scenes/calibration.jsonl",
    "scenes-told": "scenes/text.jsonl",
    "scenes-heldout": "scenes/heldout.jsonl",
}


def named(text: str) -> Path | None:
    """The path that `bundled:NAME` stands for; None for any other text. Raises InputError as `bundled_path`."""
    return bundled_path(text.removeprefix(PREFIX)) if text.startswith(PREFIX) else None


def bundled_path(name: str) -> Path:
    """The path of a bundled folder or file, by its name in BUNDLED.

    demo-moe     text, with the rows "calibration" and "heldout"
    demo-vision  images and text, with "scenes", "scenes-told" (the same kind of scenes in words) and "scenes-heldout"
    Raises InputError if `name` is none of these, or if the installation lacks the data.
    """
    from mc_cli.errors import InputError

    if name not in BUNDLED:
        raise InputError(f"nothing is bundled under the name {name!r}\nChoose one of: {', '.join(BUNDLED)}")
    path = Path(__file__).parent / BUNDLED[name]
    if not path.exists():
        raise InputError(
            f"the bundled {name!r} is missing from this installation: no {path}\n"
            "Install mixture-compressor again, or rebuild the data with recipes/train_demo_model.py or "
            "recipes/train_vision_model.py."
        )
    return path
