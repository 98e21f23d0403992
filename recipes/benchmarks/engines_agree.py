"""A packed model and the dense one it was made of, each in transformers and in vLLM: greedy tokens and logprobs.

    .venv-vllm/bin/python recipes/benchmarks/engines_agree.py --packed DIR2 --dense DIR --text held-out.jsonl

Greedy tokens are compared in float32, prompt by prompt, up to the first that differs; how narrow it was there is the
difference of transformers' two most likely logits. Logprobs of the text's own tokens are compared in bfloat16. Both
models run in the environment of vLLM, each engine in a process of its own. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from heldout_windows import windows
from torch import Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packed", required=True)
    parser.add_argument("--dense", required=True)
    parser.add_argument("--text", required=True, help="JSON lines, or a folder of them, to take prompts from")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--length", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--engine", nargs=3, metavar=("NAME", "CALL", "RESULT"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.engine:
        name, call, result = asked.engine
        answer = {"vllm": by_vllm, "transformers": by_transformers}[name](**json.loads(Path(call).read_text("utf-8")))
        Path(result).write_text(json.dumps(answer), encoding="utf-8")
        return
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(asked.packed)
    prompts = windows(Path(asked.text), tokenizer, asked.prompts, asked.length)
    found = {}
    for kind in ("packed", "dense"):
        call = {"model": getattr(asked, kind), "prompts": prompts, "new_tokens": asked.new_tokens}
        of = {engine: run(engine, call, asked) for engine in ("transformers", "vllm")}
        found[kind] = compared(of["transformers"], of["vllm"])
        print(kind, json.dumps(found[kind]), flush=True)
    ratio = found["packed"]["logprobs"]["mean"] / found["dense"]["logprobs"]["mean"]
    print("packed over dense, mean difference of logprobs:", round(ratio, 3))


def run(engine: str, call: dict[str, Any], asked: argparse.Namespace) -> dict[str, Any]:
    """What an engine gives, in a process of its own."""
    environment = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("call.json", "result.json")]
        files[0].write_text(json.dumps(call), encoding="utf-8")
        needed = ["--packed", asked.packed, "--dense", asked.dense, "--text", asked.text]
        command = [sys.executable, __file__, *needed, "--engine", engine, *map(str, files)]
        subprocess.run(command, check=True, stdout=sys.stderr, env={**environment, **os.environ})
        return json.loads(files[1].read_text("utf-8"))


@torch.no_grad()
def by_transformers(model: str, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    """Greedy tokens in float32 with their margins, and logprobs of the prompts' tokens in bfloat16."""
    from transformers import AutoModelForCausalLM

    exact: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    options = {"do_sample": False, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "pad_token_id": 0}
    tokens, margins = [], []
    for prompt in prompts:
        made = exact.generate(torch.tensor([prompt]), **options)[0]
        most = exact(made[None, :-1], use_cache=False).logits[0, len(prompt) - 1 :].topk(2, -1).values
        tokens.append(made[len(prompt) :].tolist())
        margins.append((most[:, 0] - most[:, 1]).tolist())
    del exact
    rounded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    logprobs = [_of_tokens(rounded(torch.tensor([prompt]), use_cache=False).logits[0], prompt) for prompt in prompts]
    return {"tokens": tokens, "margins": margins, "logprobs": logprobs}


def _of_tokens(logits: Tensor, tokens: list[int]) -> list[float]:
    """The logprob of every token but the first."""
    found = logits[:-1].float().log_softmax(-1)
    return found.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()


def by_vllm(model: str, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    """The same but for margins."""
    from vllm import LLM, SamplingParams

    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    found: dict[str, Any] = {}
    for dtype in ("float32", "bfloat16"):
        engine = LLM(
            model=model,
            dtype=dtype,
            max_model_len=max(map(len, prompts)) + new_tokens,
            max_num_seqs=32,
            enforce_eager=True,
            skip_tokenizer_init=True,
        )
        if dtype == "float32":
            ask = SamplingParams(
                temperature=0, max_tokens=new_tokens, min_tokens=new_tokens, ignore_eos=True, detokenize=False
            )
            found["tokens"] = [list(answer.outputs[0].token_ids) for answer in engine.generate(given, ask)]
        else:
            ask = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
            found["logprobs"] = [
                [entry[token].logprob for entry, token in zip(answer.prompt_logprobs[1:], prompt[1:], strict=True)]
                for answer, prompt in zip(engine.generate(given, ask), prompts, strict=True)
            ]
        del engine
    return found


def compared(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """How many prompts go on alike, how narrow it was where they do not, and differences of logprobs."""
    parted = []
    for tokens, margins, others in zip(one["tokens"], one["margins"], other["tokens"], strict=True):
        if tokens != others:
            first = next(place for place, (a, b) in enumerate(zip(tokens, others, strict=True)) if a != b)
            parted.append(margins[first])
    apart = torch.tensor(one["logprobs"], dtype=torch.float64) - torch.tensor(other["logprobs"], dtype=torch.float64)
    return {
        "prompts": len(one["tokens"]),
        "alike": len(one["tokens"]) - len(parted),
        "widest margin where they part": max(parted, default=None),
        "logprobs": {
            "tokens": apart.numel(),
            "mean": float(apart.abs().mean()),
            "most": float(apart.abs().max()),
            "bias": float(apart.mean()),
        },
    }


if __name__ == "__main__":
    main()
