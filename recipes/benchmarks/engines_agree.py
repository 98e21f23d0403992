"""A packed model and the dense one it was made of, each in transformers and in vLLM: greedy tokens and logprobs.

    .venv-vllm/bin/python recipes/benchmarks/engines_agree.py --packed DIR2 --dense DIR --text held-out

Greedy tokens are compared in float32, prompt by prompt, up to the first that differs; how narrow it was there is the
difference of transformers' two most likely logits. Logprobs of the text's own tokens are compared in bfloat16, between
the engines, and of each with transformers' in float32: what an engine's rounding alone does. Errors are standard errors
over prompts; packed and dense are compared token by token. Both models run in the environment of vLLM, each engine in a
process of its own. Prints JSON.
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
    parser.add_argument("--logprob-prompts", type=int, default=640, help="prompts whose own logprobs are compared")
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
    texts = windows(Path(asked.text), tokenizer, asked.logprob_prompts, asked.length)
    apart = {}
    for kind in ("packed", "dense"):
        call = {"model": getattr(asked, kind), "prompts": prompts, "texts": texts, "new_tokens": asked.new_tokens}
        of = {engine: run(engine, call, asked) for engine in ("transformers", "vllm")}
        apart[kind] = differences(of["transformers"], of["vllm"])
        told = {pair: told_of(each) for pair, each in apart[kind].items()}
        print(kind, json.dumps({**parted(of["transformers"], of["vllm"]), **told}), flush=True)
    for pair, packed in apart["packed"].items():
        more = (packed.abs() - apart["dense"][pair].abs()).mean(1)
        print(f"packed less dense, {pair}: {float(more.mean()):.5f} +- {standard_error(more):.5f}")


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
def by_transformers(model: str, prompts: list[list[int]], texts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    """Greedy tokens in float32 with their margins, and logprobs of the texts' tokens in float32 and bfloat16."""
    from transformers import AutoModelForCausalLM

    exact: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    options = {"do_sample": False, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "pad_token_id": 0}
    tokens, margins = [], []
    for prompt in prompts:
        made = exact.generate(torch.tensor([prompt]), **options)[0]
        most = exact(made[None, :-1], use_cache=False).logits[0, len(prompt) - 1 :].topk(2, -1).values
        tokens.append(made[len(prompt) :].tolist())
        margins.append((most[:, 0] - most[:, 1]).tolist())
    found: dict[str, Any] = {"tokens": tokens, "margins": margins}
    rounded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    for name, loaded in (("exact", exact), ("logprobs", rounded)):
        found[name] = [_of_tokens(loaded(torch.tensor([text]), use_cache=False).logits[0], text) for text in texts]
    return found


def _of_tokens(logits: Tensor, tokens: list[int]) -> list[float]:
    """The logprob of every token but the first."""
    found = logits[:-1].float().log_softmax(-1)
    return found.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()


def by_vllm(model: str, prompts: list[list[int]], texts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    """Greedy tokens in float32, and logprobs of the texts' tokens in bfloat16."""
    from vllm import LLM, SamplingParams

    given, read = ([{"prompt_token_ids": prompt} for prompt in each] for each in (prompts, texts))
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
                [entry[token].logprob for entry, token in zip(answer.prompt_logprobs[1:], text[1:], strict=True)]
                for answer, text in zip(engine.generate(read, ask), texts, strict=True)
            ]
        del engine
    return found


def parted(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """How many prompts go on alike, and how narrow it was where they do not."""
    narrow = []
    for tokens, margins, others in zip(one["tokens"], one["margins"], other["tokens"], strict=True):
        if tokens != others:
            first = next(place for place, (a, b) in enumerate(zip(tokens, others, strict=True)) if a != b)
            narrow.append(margins[first])
    count = len(one["tokens"])
    return {"prompts": count, "alike": count - len(narrow), "widest margin where they part": max(narrow, default=None)}


def differences(transformers: dict[str, Any], vllm: dict[str, Any]) -> dict[str, Tensor]:
    """[texts, tokens] differences of logprobs, by what is compared."""
    exact, theirs, ours = (
        torch.tensor(each, dtype=torch.float64)
        for each in (transformers["exact"], transformers["logprobs"], vllm["logprobs"])
    )
    return {
        "vLLM from transformers": ours - theirs,
        "vLLM from float32": ours - exact,
        "transformers from float32": theirs - exact,
    }


def told_of(apart: Tensor) -> dict[str, float]:
    """Mean magnitude with its standard error, the largest, and the mean with its sign."""
    size = apart.abs()
    error = standard_error(size.mean(1))
    return {"mean": float(size.mean()), "error": error, "most": float(size.max()), "bias": float(apart.mean())}


def standard_error(means: Tensor) -> float:
    """The standard error of a mean over texts, which are drawn independently."""
    return float(means.std() / len(means) ** 0.5)


if __name__ == "__main__":
    main()
