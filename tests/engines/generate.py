"""Greedy tokens of a model in vLLM, in a process of its own: `-m tests.engines.generate CALL.json RESULT.json`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Reads what to generate, and writes tokens, by how much each was likelier than the next, and where calls are
    counted each layer's chosen and computed ones."""
    call, result = Path(sys.argv[1]), Path(sys.argv[2])
    asked: dict[str, Any] = json.loads(call.read_text(encoding="utf-8"))
    from vllm import LLM, SamplingParams

    from mc_cli.serving.skipped_calls import skipped_calls

    model = LLM(
        model=asked["model"],
        dtype=asked.get("dtype", "float32"),
        max_model_len=asked.get("max_model_len", 128),
        max_num_seqs=32,
        enforce_eager=asked.get("eager", True),
        **asked.get("options", {}),
    )
    new = asked["new_tokens"]
    ask = SamplingParams(temperature=0, max_tokens=new, min_tokens=new, ignore_eos=True, logprobs=2)
    answers = model.generate([{"prompt_token_ids": prompt} for prompt in asked["prompts"]], ask)
    tokens = [list(answer.outputs[0].token_ids) for answer in answers]
    margins = [[_margin(place) for place in answer.outputs[0].logprobs] for answer in answers]
    found: dict[str, Any] = {"tokens": tokens, "margins": margins}
    if (counted := skipped_calls()) is not None:
        found["calls"] = [[calls.chosen, calls.computed] for calls in counted.by_layer().values()]
    result.write_text(json.dumps(found), encoding="utf-8")


def _margin(place: Any) -> float:
    """The logarithm of the likeliest token's probability over that of the next."""
    most, second, *_ = sorted((each.logprob for each in place.values()), reverse=True)
    return float(most - second)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    main()
