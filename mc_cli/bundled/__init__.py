"""Data that ships with the package: a small trained MoE, text to calibrate it on, and text to measure it on."""

from __future__ import annotations

from pathlib import Path

BUNDLED = {
    "demo-moe": "demo-moe",
    "calibration": "text/calibration.jsonl",
    "heldout": "text/heldout.jsonl",
}


def bundled_path(name: str) -> Path:
    """The path of the bundled model folder "demo-moe", or of the text file "calibration" or "heldout".

    Raises InputError if `name` is none of these, or if the installation lacks the data.
    """
    from mc_cli.errors import InputError

    if name not in BUNDLED:
        raise InputError(f"nothing is bundled under the name {name!r}\nChoose one of: {', '.join(BUNDLED)}")
    path = Path(__file__).parent / BUNDLED[name]
    if not path.exists():
        raise InputError(
            f"the bundled {name!r} is missing from this installation: no {path}\n"
            "Install mixture-compressor again, or rebuild the data with recipes/train_demo_model.py."
        )
    return path
