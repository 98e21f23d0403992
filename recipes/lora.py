"""Fine-tune a LoRA adapter on a packed model, save it, load it again, and merge it; every claim is measured.

    python recipes/lora.py --model DIR --train train.jsonl --out adapter --steps 200

One in fifty of the texts is held out of training; `--heldout` measures on further text, file by file. DIR is what
`mc-cli export --format transformers` wrote. Texts are JSON lines with a `text` field, or plain .txt files; a folder
stands for the files in it. Needs the package `peft`. Packed weights stay as they are: the adapter alone is trained, and
a forward keeps no decoded weights for the backward pass. See docs/training.md.
"""

import argparse
import json
import random
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

import mc_cli  # noqa: F401  teaches transformers the packed format

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="packed model, as mc-cli exports it")
    parser.add_argument("--train", type=Path, nargs="+", required=True, help="text to train on")
    parser.add_argument("--heldout", type=Path, nargs="*", default=[], help="further text to measure on")
    parser.add_argument("--out", type=Path, required=True, help="folder for the adapter")
    parser.add_argument("--targets", default="q_proj,k_proj,v_proj,o_proj", help="linears that get an adapter")
    parser.add_argument("--experts", action="store_true", help="the routed experts get an adapter each, too")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8, help="sequences per step")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--heldout-sequences", type=int, default=32, help="to measure on, of each text")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    parser.add_argument("--merge-to", type=Path, help="write the merged model here, dense, for any tool")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def texts(path: Path) -> list[str]:
    """The texts of a file, or of all files in a folder."""
    found = []
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        lines = file.read_text(encoding="utf-8")
        found += (
            [json.loads(line)["text"] for line in lines.split("\n") if line] if file.suffix == ".jsonl" else [lines]
        )
    return found


def sequences(found: list[str], tokenizer, count: int, length: int, what: str) -> torch.Tensor:
    """[count or fewer, length] int64: texts, joined and cut."""
    stream: list[int] = []
    for text in found:
        stream += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        stream += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        if len(stream) >= count * length:
            break
    rows = min(count, len(stream) // length)
    if rows == 0:
        raise SystemExit(f"{what}: {len(stream)} tokens, less than a sequence of {length}.")
    return torch.tensor(stream[: rows * length]).view(rows, length)


def shuffled(found: list[str], seed: int) -> list[str]:
    random.Random(seed).shuffle(found)
    return found


def all_rows(arguments: argparse.Namespace, tokenizer) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Sequences to train on, and by name those that are measured: trained on, held out of the same text, further."""
    found = shuffled([text for path in arguments.train for text in texts(path)], 0)
    held = max(1, len(found) // 50)
    count, length = arguments.heldout_sequences, arguments.length
    needed = max(count, arguments.steps * arguments.batch)
    rows = sequences(shuffled(found[held:], arguments.seed), tokenizer, needed, length, "--train")
    measured = {
        "trained on": rows[:count],
        "held out": sequences(found[:held], tokenizer, count, length, "held out of --train"),
    }
    for path in arguments.heldout:
        measured[path.stem] = sequences(shuffled(texts(path), 0), tokenizer, count, length, str(path))
    return rows, measured


@torch.no_grad()
def loss_on(model, rows: torch.Tensor) -> float:
    """Mean loss per token, in nats."""
    model.eval()
    return sum(float(model(input_ids=row, labels=row).loss) for row in rows.split(1)) / len(rows)


@torch.no_grad()
def logits_on(model, rows: torch.Tensor) -> torch.Tensor:
    return model.eval()(input_ids=rows).logits.float()


def batches(rows: torch.Tensor, size: int, steps: int, seed: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield rows[torch.randint(len(rows), (size,), generator=generator)]


def train(model, rows: torch.Tensor, arguments: argparse.Namespace) -> None:
    adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapter, lr=arguments.learning_rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, arguments.steps // 20, arguments.steps)
    begin = time.monotonic()
    model.train()
    for step, batch in enumerate(batches(rows, arguments.batch, arguments.steps, arguments.seed), 1):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapter, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % max(1, arguments.steps // 10) == 0:
            seconds = (time.monotonic() - begin) / step
            print(f"step {step:5}  loss {float(loss.detach()):.4f}  {seconds:.2f} s per step", flush=True)


def load(arguments: argparse.Namespace):
    return AutoModelForCausalLM.from_pretrained(arguments.model, dtype=DTYPES[arguments.dtype])


def lora_config(arguments: argparse.Namespace) -> LoraConfig:
    config = LoraConfig(r=arguments.rank, lora_alpha=2 * arguments.rank, target_modules=arguments.targets.split(","))
    config.task_type = "CAUSAL_LM"
    if arguments.experts:
        config.target_parameters = [f"experts.{name}" for name in ("gate_up_proj", "up_proj", "down_proj")]
    return config


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    rows, measured = all_rows(arguments, tokenizer)
    heldout = measured["held out"]
    base = load(arguments)
    before = {name: loss_on(base, sample) for name, sample in measured.items()}
    if arguments.gradient_checkpointing:
        base.gradient_checkpointing_enable()
    model = get_peft_model(base, lora_config(arguments))
    model.print_trainable_parameters()
    train(model, rows, arguments)
    for name, sample in measured.items():
        after = loss_on(model, sample)
        print(f"loss, {name}: {before[name]:.4f} before, {after:.4f} after: {after - before[name]:+.4f} nats per token")

    trained = logits_on(model, heldout[:4])
    model.save_pretrained(arguments.out)
    loaded = PeftModel.from_pretrained(load(arguments), arguments.out)
    again = logits_on(loaded, heldout[:4])
    print(f"saved to {arguments.out} and loaded again: logits differ by {float((again - trained).abs().max()):.2g}")

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        merged = loaded.merge_and_unload()
    difference = (logits_on(merged, heldout[:4]) - trained).abs()
    dense = sum("dense from here on" in str(warning.message) for warning in said)
    print(
        f"merged, {dense} modules dense by now: held-out loss {loss_on(merged, heldout):.4f}, logits differ by "
        f"{float(difference.mean()):.2g} in the mean, {float(difference.max()):.2g} at most"
    )
    if arguments.merge_to is not None:
        merged.dequantize()
        merged.save_pretrained(arguments.merge_to)
        tokenizer.save_pretrained(arguments.merge_to)
        written = AutoModelForCausalLM.from_pretrained(arguments.merge_to, dtype=DTYPES[arguments.dtype])
        print(f"{arguments.merge_to}: dense, held-out loss {loss_on(written, heldout):.4f}")


if __name__ == "__main__":
    main()
