"""Windows of held-out text for benchmarks that run inside other engines' environments: no torch, no mc_cli."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def windows(path: Path, tokenizer: Any, count: int, length: int) -> list[list[int]]:
    """`count` evenly spaced runs of `length` token ids over the texts of a JSONL file, or a folder, laid end to end.

    The first run begins with the text, the last one ends with it. Raises SystemExit where there is too little text.
    """
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    texts = [json.loads(line)["text"] for file in files for line in file.read_text("utf-8").split("\n") if line]
    ids = tokenizer("\n".join(texts), add_special_tokens=False)["input_ids"]
    last = len(ids) - length
    if last < 0:
        raise SystemExit(f"{path} has {len(ids)} tokens, and a window {length}")
    starts = [last * number // max(1, count - 1) for number in range(count)]
    return [ids[start : start + length] for start in starts]
