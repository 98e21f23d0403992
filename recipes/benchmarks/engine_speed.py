"""Decoding speed of an export in one engine, for `formats.py`: run by an interpreter that has the engine.

    ENVIRONMENT/bin/python recipes/benchmarks/engine_speed.py ENGINE EXPORT

Prints a JSON object with tokens_per_s: 128 tokens after a prompt of 16 random ids, without the prompt, per second of
processor time on one thread, the median of five turns after one that is not counted.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPT, NEW, TURNS = 16, 128, 5
Generate = Callable[[list[int], int], Any]  # prompt, number of new tokens


def in_transformers(folder: Path) -> tuple[Generate, int]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def generate(prompt: list[int], count: int) -> None:
        length = {"max_new_tokens": count, "min_new_tokens": count}
        with torch.no_grad():
            model.generate(torch.tensor([prompt]), do_sample=False, pad_token_id=0, **length)

    return generate, model.config.vocab_size


def in_gptqmodel(folder: Path) -> tuple[Generate, int]:
    import os

    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # it compiles its decoding, which takes minutes
    import torch
    from gptqmodel import BACKEND, GPTQModel

    torch.set_num_threads(1)
    engine = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16)
    engine.model.float()  # as the other engines compute

    def generate(prompt: list[int], count: int) -> None:
        length = {"max_new_tokens": count, "min_new_tokens": count}
        with torch.no_grad():
            engine.model.generate(torch.tensor([prompt]), do_sample=False, pad_token_id=0, **length)

    return generate, engine.model.config.vocab_size


def in_vllm(folder: Path) -> tuple[Generate, int]:
    import torch

    torch.set_num_threads(1)
    from vllm import LLM, SamplingParams

    longest = {"max_model_len": 2 * (PROMPT + NEW), "max_num_seqs": 1}
    engine = LLM(model=str(folder), dtype="float32", enforce_eager=True, skip_tokenizer_init=True, **longest)

    def generate(prompt: list[int], count: int) -> None:
        ask = SamplingParams(temperature=0, max_tokens=count, min_tokens=count, ignore_eos=True, detokenize=False)
        engine.generate([{"prompt_token_ids": prompt}], ask, use_tqdm=False)

    return generate, engine.model_config.get_vocab_size()


def in_llama_cpp(folder: Path) -> tuple[Generate, int]:
    import llama_cpp

    file = str(next(folder.glob("*.gguf")))
    engine = llama_cpp.Llama(file, n_ctx=2 * (PROMPT + NEW), n_threads=1, n_threads_batch=1, verbose=False)

    def generate(prompt: list[int], count: int) -> None:
        engine.reset()
        made = engine.generate(prompt, top_k=1, temp=0.0)
        for _ in range(count):
            next(made)

    return generate, engine.n_vocab()


def in_mlx(folder: Path) -> tuple[Generate, int]:
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    model, config = load_model(folder)

    def generate(prompt: list[int], count: int) -> None:
        for _ in zip(range(count), generate_step(mx.array(prompt), model, max_tokens=count), strict=False):
            pass

    return generate, config["vocab_size"]


ENGINES: dict[str, Callable[[Path], tuple[Generate, int]]] = {
    "transformers": in_transformers,
    "gptqmodel": in_gptqmodel,
    "compressed-tensors": in_transformers,
    "vllm": in_vllm,
    "llama.cpp": in_llama_cpp,
    "mlx": in_mlx,
}


def main() -> None:
    generate, vocabulary = ENGINES[sys.argv[1]](Path(sys.argv[2]))
    drawn = random.Random(0)
    rates = []
    for _ in range(1 + TURNS):
        prompt = drawn.choices(range(3, vocabulary), k=PROMPT)
        seconds = []
        for count in (1, 1 + NEW):
            begun = time.process_time()
            generate(prompt, count)
            seconds.append(time.process_time() - begun)
        rates.append(NEW / (seconds[1] - seconds[0]))
    print(json.dumps({"engine": sys.argv[1], "tokens_per_s": statistics.median(rates[1:])}))


if __name__ == "__main__":
    main()
