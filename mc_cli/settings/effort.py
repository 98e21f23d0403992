"""The values that `run --effort` sets beneath recipe and flags."""

from __future__ import annotations

from typing import Any

EFFORTS: dict[str, dict[str, dict[str, Any]]] = {  # name -> section -> settings
    "fast": {
        "calibrate": {"sequences": 64, "gradient_tokens": 8192, "gradient_samples": 1},
        "score": {"loss_tokens": 512, "search": "quick"},
    },
    "default": {},
    # No sweeps: errors fed into later rows, which they would undo, are worth more.
    "best": {
        "calibrate": {"sequences": 256, "gradient_samples": 8},
        "score": {"loss_tokens": 4096, "all_widths": True},
    },
}
