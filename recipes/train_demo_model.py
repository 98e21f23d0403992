"""Train the small Mixtral-architecture model that ships with mc-cli, and cut its calibration and held-out text.

    python recipes/train_demo_model.py --text train.jsonl --out mc_cli/bundled/demo-moe \
        --text-out mc_cli/bundled/text --tokens 12000000 --minutes 38 --seed 0

Needs two CPU cores and no network; on a busy machine set OMP_WAIT_POLICY=PASSIVE, else threads spin while they wait.
`train.jsonl` holds one {"domain", "text"} object per line. The model folder appears only when everything in it is
complete: a run that is killed leaves at most a hidden `.partial` folder.
With --tokens alone the learning rate does not depend on the clock, and a rerun on the same machine and library versions
follows the same curve; with --minutes a rerun gives an equally good but not an identical model.
"""

import argparse
import itertools
import json
import math
import random
import shutil
import time
from collections import defaultdict
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"  # token 0: separates documents, ends generation, pads
CONTEXT_TOKENS = 256
BATCH_ROWS = 16  # with so few tokens, more steps beat larger ones: 4.70 against 5.13 (32 rows) after 90 seconds
MUON_LEARNING_RATE, MUON_MOMENTUM, NEWTON_SCHULZ_STEPS = 0.02, 0.95, 5
ADAM_LEARNING_RATE, ADAM_BETAS = 0.003, (0.9, 0.95)
WEIGHT_DECAY = 0.01  # decoupled, Muon matrices only
WARMUP_STEPS = 40
DECAY_FRACTION = 0.6  # the learning rate falls linearly to zero over this last part of the run
BALANCE_WEIGHT = 0.1
GRADIENT_NORM_LIMIT = 1.0
EXCERPT_BYTES = 4000
CALIBRATION_BYTES, HELDOUT_BYTES = 250_000, 150_000
# A document is a piece of a file and may lack the notice at its top: the last two are modules known to have their own.
OTHER_OWNER_MARKS = ("copyright", "(c) ", "licensed under", "all rights reserved", "gutenberg", "tarfile", "asyncore")
# The quintic of Jordan et al. 2024, "Muon": not the fastest to converge to exactly 1, but the steepest at 0.
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help='JSON lines of {"domain", "text"}')
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and tokenizer")
    parser.add_argument("--text-out", type=Path, help="folder for calibration.jsonl and heldout.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="stop training after this many minutes")
    parser.add_argument("--tokens", type=int, help="stop training after this many tokens")
    parser.add_argument("--heldout-fraction", type=float, default=0.015, help="part of each domain's documents")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--log-every", type=int, default=40, help="optimizer steps per point of the loss curve")
    parser.add_argument("--force", action="store_true", help="replace the files of an earlier run")
    arguments = parser.parse_args()
    if arguments.minutes is None and arguments.tokens is None:
        parser.error("give --minutes, --tokens, or both")
    if arguments.out.exists() and not arguments.force:
        parser.error(f"{arguments.out} exists: choose another --out, or pass --force to replace it")
    return arguments


# Text ----------------------------------------------------------------------------------------------------------------


def read_documents(path: Path) -> dict[str, list[str]]:
    """Texts by domain, in file order, repeated texts once."""
    documents = defaultdict(dict)
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            documents[record["domain"]][record["text"]] = None
    return {domain: list(texts) for domain, texts in sorted(documents.items())}


def split_key(text: str) -> str:
    """The key that two documents share when one must not be held out while the other is trained on.

    A mathematics document starts with its question, and one question may come with several answers.
    """
    return text.split("\nAnswer:")[0]


def split_documents(documents: dict[str, list[str]], heldout_fraction: float, seed: int) -> tuple[dict, dict]:
    """(training texts, held-out texts), both by domain and shuffled; at least three documents per domain held out."""
    training, heldout = {}, {}
    for domain, texts in documents.items():
        groups = defaultdict(list)
        for text in texts:
            groups[split_key(text)].append(text)
        shuffled = list(groups.values())
        random.Random(f"{seed} {domain}").shuffle(shuffled)
        heldout_count = max(3, round(heldout_fraction * len(shuffled)))
        heldout[domain] = [text for group in shuffled[:heldout_count] for text in group]
        training[domain] = [text for group in shuffled[heldout_count:] for text in group]
    return training, heldout


def cut_excerpts(text: str) -> list[str]:
    """Consecutive pieces of `text` of about EXCERPT_BYTES or less, cut at line borders, in shuffled order.

    A short last piece is dropped.
    """
    excerpts, lines, size_bytes = [], [], 0
    for line in text.splitlines(keepends=True):
        line_bytes = len(line.encode())
        if lines and size_bytes + line_bytes > EXCERPT_BYTES:
            excerpts.append("".join(lines).strip("\n"))
            lines, size_bytes = [], 0
        lines.append(line)
        size_bytes += line_bytes
    if not excerpts or size_bytes > EXCERPT_BYTES // 4:
        excerpts.append("".join(lines).strip("\n"))
    random.Random(text).shuffle(excerpts)  # else all excerpts would be title pages and import lines
    return [excerpt for excerpt in excerpts if excerpt]


def names_other_owner(text: str) -> bool:
    """Whether `text` carries somebody's copyright notice; such documents are trained on but not shipped as text."""
    lowered = text.lower()
    return any(mark in lowered for mark in OTHER_OWNER_MARKS)


def sample_excerpts(documents: dict[str, list[str]], total_bytes: int) -> list[dict[str, str]]:
    """Records of about total_bytes of text, each domain an equal share, from as many documents as the share allows."""
    records = []
    for domain, texts in documents.items():
        per_document = [cut_excerpts(text) for text in texts if not names_other_owner(text)]
        rounds = itertools.chain.from_iterable(itertools.zip_longest(*per_document))
        room_bytes = total_bytes / len(documents)
        for excerpt in filter(None, rounds):
            if room_bytes < EXCERPT_BYTES // 4:
                break
            if len(excerpt.encode()) <= room_bytes + EXCERPT_BYTES // 4:
                records.append({"domain": domain, "text": excerpt})
                room_bytes -= len(excerpt.encode())
    return records


def write_records(path: Path, records: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    partial.replace(path)


# Tokens --------------------------------------------------------------------------------------------------------------


def train_tokenizer(texts: list[str], vocabulary_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer learned from `texts`; every byte string can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=CONTEXT_TOKENS,
    )


def encode_documents(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[torch.Tensor]:
    """One int64 tensor per text, each ended by the end-of-text token."""
    encodings = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    return [torch.tensor([*encoding.ids, tokenizer.eos_token_id]) for encoding in encodings]


def cut_rows(documents: list[torch.Tensor]) -> torch.Tensor:
    """[rows, CONTEXT_TOKENS + 1]: the joined documents; each row starts with the last token of the row before."""
    return torch.cat(documents).unfold(0, CONTEXT_TOKENS + 1, CONTEXT_TOKENS)


def training_batches(documents: list[torch.Tensor], seed: int):
    """Yield [BATCH_ROWS, CONTEXT_TOKENS + 1] without end; documents and rows are shuffled anew for every pass."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(documents), generator=generator).tolist()
        rows = cut_rows([documents[index] for index in order])
        row_order = torch.randperm(len(rows), generator=generator)
        for start in range(0, len(rows) - BATCH_ROWS + 1, BATCH_ROWS):
            yield rows[row_order[start : start + BATCH_ROWS]]


# Model and optimizer -------------------------------------------------------------------------------------------------


def build_model(vocabulary_size: int, seed: int) -> MixtralForCausalLM:
    """A fresh model, 4 layers of 8 experts, 3.6 M parameters, float32."""
    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=vocabulary_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=CONTEXT_TOKENS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = MixtralForCausalLM(config)
    model.set_experts_implementation("eager")  # the grouped implementation is slower on CPU
    for layer in model.model.layers:
        # transformers starts routers at zero: every token would tie, and top-k would send all to the same experts.
        torch.nn.init.normal_(layer.mlp.gate.weight, std=0.02)
    return model


def orthogonalize(update: torch.Tensor) -> torch.Tensor:
    """`update` [..., rows, columns] with all its singular values brought near 1 (Newton-Schulz iteration)."""
    first, third, fifth = NEWTON_SCHULZ_COEFFICIENTS
    is_tall = update.shape[-2] > update.shape[-1]
    matrix = update.mT if is_tall else update
    matrix = matrix / (matrix.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = matrix @ matrix.mT
        matrix = first * matrix + (third * gram + fifth * gram @ gram) @ matrix
    return matrix.mT if is_tall else matrix


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized, matrix by matrix (Jordan et al. 2024).

    A parameter [experts, rows, columns] counts as one matrix per expert, and a fused gate-and-up projection as two.
    They are orthogonalized in `dtype`: bfloat16 is twice as fast where the CPU has products of it.
    """

    def __init__(self, parameters, *, lr: float, momentum: float, weight_decay: float, dtype: torch.dtype):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "parts": 1})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                momentum_buffer = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momentum_buffer.lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(momentum_buffer, group["momentum"])
                rows, columns = update.shape[-2] // group["parts"], update.shape[-1]
                update = orthogonalize(update.reshape(-1, rows, columns).to(self.dtype)).reshape(parameter.shape)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.to(parameter.dtype), alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))


def build_optimizers(model: MixtralForCausalLM, dtype: torch.dtype = torch.float32) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, norms and routers."""
    matrices, fused, rest = [], [], []
    for name, parameter in model.named_parameters():
        if "layers." not in name or parameter.dim() < 2 or ".gate.weight" in name:
            rest.append(parameter)
        elif name.endswith("gate_up_proj"):
            fused.append(parameter)
        else:
            matrices.append(parameter)
    groups = [{"params": matrices}, {"params": fused, "parts": 2}]
    muon = Muon(groups, lr=MUON_LEARNING_RATE, momentum=MUON_MOMENTUM, weight_decay=WEIGHT_DECAY, dtype=dtype)
    adam = torch.optim.AdamW(rest, lr=ADAM_LEARNING_RATE, betas=ADAM_BETAS, weight_decay=0.0)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return [muon, adam]


def record_routing(layers: torch.nn.ModuleList) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A list that every forward pass fills with (router logits [T, E], chosen experts [T, K]) per layer; clear it."""
    routing = []
    for layer in layers:
        layer.mlp.gate.register_forward_hook(lambda module, inputs, output: routing.append((output[0], output[2])))
    return routing


def balance_loss(routing: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Mean over layers of E * sum_e f_e P_e, 1.0 at perfect balance.

    f_e is the fraction of choices that fell on expert e, P_e its mean router probability. Taken per layer: pooled over
    layers, as transformers does, an expert that dies in one layer hides behind a busy one in another.
    """
    per_layer = []
    for logits, chosen in routing:
        expert_count = logits.shape[-1]
        fractions = torch.bincount(chosen.flatten(), minlength=expert_count) / chosen.numel()
        per_layer.append(expert_count * (fractions * logits.softmax(-1).mean(0)).sum())
    return torch.stack(per_layer).mean()


# Training and measuring ----------------------------------------------------------------------------------------------


def next_token_loss(model: MixtralForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    """Mean loss in nats per token over `rows` [rows, tokens + 1]."""
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


def run_progress(arguments: argparse.Namespace, token_count: int, duration_s: float) -> float:
    """How far the run is, from 0 to 1: by tokens, by minutes, or by whichever of the two is ahead."""
    by_tokens = token_count / arguments.tokens if arguments.tokens else 0.0
    by_minutes = duration_s / (60 * arguments.minutes) if arguments.minutes else 0.0
    return max(by_tokens, by_minutes)


def train(model: MixtralForCausalLM, documents: list[torch.Tensor], arguments: argparse.Namespace) -> dict:
    """Train `model` in place; returns the loss curve (means over `log_every` steps), tokens and minutes."""
    optimizers, routing = build_optimizers(model), record_routing(model.model.layers)
    curve, losses, balances, token_count, start = [], [], [], 0, time.monotonic()
    for step, rows in enumerate(training_batches(documents, arguments.seed), start=1):
        duration_s = time.monotonic() - start
        progress = run_progress(arguments, token_count, duration_s)
        if progress >= 1 or (losses and step % arguments.log_every == 1):
            point = {"step": step - 1, "tokens": token_count, "minutes": round(duration_s / 60, 2)}
            point |= {"loss": round(sum(losses) / len(losses), 4), "balance": round(sum(balances) / len(balances), 4)}
            curve.append(point)
            print(json.dumps(point), flush=True)
            losses, balances = [], []
        if progress >= 1:
            break
        rate = min(1.0, step / WARMUP_STEPS, (1 - progress) / DECAY_FRACTION)
        routing.clear()
        loss, balance = next_token_loss(model, rows), balance_loss(routing)
        (loss + BALANCE_WEIGHT * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM_LIMIT)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["peak_lr"]
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        balances.append(balance.item())
        token_count += rows[:, 1:].numel()
    return {"loss_curve": curve, "tokens": token_count, "minutes": round(duration_s / 60, 2)}


@torch.no_grad()
def measure_heldout(model: MixtralForCausalLM, documents: dict[str, list[torch.Tensor]]) -> dict:
    """Held-out loss (nats per token), overall and per domain, and per layer each expert's fraction of the choices."""
    routing, domain_loss, counts = record_routing(model.model.layers), {}, {}
    layer_count, expert_count = model.config.num_hidden_layers, model.config.num_local_experts
    choices = torch.zeros(layer_count, expert_count)
    for domain, encoded in documents.items():
        rows, total = cut_rows(encoded), 0.0
        for batch in rows.split(BATCH_ROWS):
            routing.clear()
            total += next_token_loss(model, batch).item() * batch[:, 1:].numel()
            for layer, (_, chosen) in enumerate(routing):
                choices[layer] += torch.bincount(chosen.flatten(), minlength=expert_count)
        counts[domain] = rows[:, 1:].numel()
        domain_loss[domain] = total / counts[domain]
    overall = sum(domain_loss[domain] * counts[domain] for domain in counts) / sum(counts.values())
    load = choices / choices.sum(dim=1, keepdim=True)
    return {
        "heldout_loss": round(overall, 4),
        "heldout_loss_per_domain": {domain: round(loss, 4) for domain, loss in domain_loss.items()},
        "heldout_tokens": sum(counts.values()),
        "expert_load_per_layer": [[round(value, 4) for value in row] for row in load.tolist()],
    }


# Output --------------------------------------------------------------------------------------------------------------


def describe_run(model: MixtralForCausalLM, arguments: argparse.Namespace, result: dict, heldout: dict) -> dict:
    """The content of training.json."""
    settings = {
        "batch": [BATCH_ROWS, CONTEXT_TOKENS],
        "muon": {"lr": MUON_LEARNING_RATE, "momentum": MUON_MOMENTUM, "newton_schulz_steps": NEWTON_SCHULZ_STEPS},
        "muon_weight_decay": WEIGHT_DECAY,
        "adamw": {"lr": ADAM_LEARNING_RATE, "betas": ADAM_BETAS},
        "warmup_steps": WARMUP_STEPS,
        "decay_fraction": DECAY_FRACTION,
        "balance_weight": BALANCE_WEIGHT,
        "gradient_norm_limit": GRADIENT_NORM_LIMIT,
        "heldout_fraction": arguments.heldout_fraction,
        "minutes": arguments.minutes,
        "tokens": arguments.tokens,
        "threads": arguments.threads,
    }
    return {
        "unit": "nats per token",
        "seed": arguments.seed,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": result["tokens"],
        "minutes": result["minutes"],
        "final_train_loss": result["loss_curve"][-1]["loss"],
        **heldout,
        "settings": settings,
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, tokenizers)},
        "loss_curve": result["loss_curve"],
    }


def save_model(model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerFast, report: dict, out: Path) -> None:
    """Write everything beside `out`, then put it in place with one rename; a README already in `out` is kept."""
    partial, replaced = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.replaced")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    config = json.loads((partial / "config.json").read_text())
    if "rope_parameters" in config:
        config["rope_theta"] = config["rope_parameters"][
            "rope_theta"
        ]  # where readers before transformers 5 look for it
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer_config = json.loads((partial / "tokenizer_config.json").read_text())
    tokenizer_config["tokenizer_class"] = "PreTrainedTokenizerFast"  # transformers 5 writes a name that 4 does not know
    (partial / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    (partial / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    (partial / "model.safetensors").chmod(0o644)  # save_pretrained makes it readable by its owner only
    if (out / "README.md").exists():
        shutil.copy2(out / "README.md", partial)
    if out.exists():
        out.replace(replaced)
    partial.replace(out)
    shutil.rmtree(replaced, ignore_errors=True)


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    training, heldout = split_documents(read_documents(arguments.text), arguments.heldout_fraction, arguments.seed)
    all_training = list(itertools.chain.from_iterable(training.values()))
    tokenizer = train_tokenizer(all_training, vocabulary_size=2048)
    model = build_model(len(tokenizer), arguments.seed)
    documents = encode_documents(tokenizer, all_training)
    print(f"{len(documents)} documents, {sum(map(len, documents))} tokens", flush=True)
    result = train(model, documents, arguments)
    model = model.to(torch.bfloat16).eval()
    measured = measure_heldout(model, {domain: encode_documents(tokenizer, heldout[domain]) for domain in heldout})
    report = describe_run(model, arguments, result, measured)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    save_model(model, tokenizer, report, arguments.out)
    if arguments.text_out:
        write_records(arguments.text_out / "calibration.jsonl", sample_excerpts(training, CALIBRATION_BYTES))
        write_records(arguments.text_out / "heldout.jsonl", sample_excerpts(heldout, HELDOUT_BYTES))
    print(json.dumps({key: value for key, value in report.items() if key != "loss_curve"}, indent=1))


if __name__ == "__main__":
    main()
