"""Mutates layouts, policies, tensors and files of small packed models, and runs what is accepted through compiled code.

    python -m tests.faults.packed_fuzzer --count 20000 --seed 0

Every case is made from (seed, number) alone, so `--first N --count 1` runs one again. It may end in a McError, or in
outputs; anything else is a failure. `tests/faults/sanitized.py` runs it with a library that AddressSanitizer watches:
then a byte read or written outside of a tensor ends the process, and FILE.case says which case. Tensors are copied
to blocks of their own size, since sanitizers do not watch what is mapped from files.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import faulthandler
import json
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mc_cli.artifacts.packed import KEPT, ExpertLayout, PackedLayout
from mc_cli.artifacts.pruning import OperatingPoint, PrunedLayer, Pruning
from mc_cli.encodings import encoding_from_key
from mc_cli.encodings.affine import AffineEncoding
from mc_cli.encodings.trellis import TrellisEncoding
from mc_cli.errors import McError, ShapeError
from mc_cli.kernels import affine, bank_for, experts_output, packed_linear, trellis
from mc_cli.kernels.compiled import PATHS, best_path, inputs_of
from mc_cli.measuring.generation import load_model
from mc_cli.models import experts
from mc_cli.models.inventory import tied_tensors
from mc_cli.models.skeleton import build_skeleton, rebuild_buffers
from mc_cli.packed import plugin
from mc_cli.packed.packed_files import StoredTensor
from mc_cli.packed.packed_model import attach
from mc_cli.packed.stored_tensors import check_stored
from mc_cli.policies import Cut, LayerValues, Routed, compiled_rule, kept_slots, odp, otp, policies, runs_halves
from mc_cli.settings import RunSettings
from mc_cli.skipping.pruning import apply_pruning
from tests.tiny_models import tiny_config

CPU = torch.device("cpu")
SECONDS = 60  # that a case may take
TOKEN_IDS = torch.tensor([[3, 5, 7], [9, 1, 2]])
TRELLIS = [
    f"trellis_b{width}_h{block}"
    for width in ["1", "1p5", "2", "2p5", "3", "3p5", "4", "4p5", "5"]
    for block in (1, 8, 16)
]
AFFINE = [f"affine_b{bits}_g{group}" for bits in range(1, 9) for group in (4, 8, 16)]
MODELS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("mixtral", {"num_hidden_layers": 1, "num_local_experts": 4}),
    ("qwen3_moe", {"num_hidden_layers": 1, "num_experts": 6, "tie_word_embeddings": True}),
    ("gpt_oss", {"num_hidden_layers": 1, "num_local_experts": 4, "layer_types": ["full_attention"]}),
)
NUMBERS: tuple[Any, ...] = (
    *(-1, 0, 1, 2, 3, 7, 24, 99, 2**31 - 1, 2**31, 2**63, 10**9, 10**40),
    *(0.5, 1e300, float("nan"), float("inf"), True, None, "", "7", "x" * 5000, [], [[]], {}, [0] * 3000),
)
KEYS = (
    "trellis_b2_h24",
    "trellis_b2_h0",
    "trellis_b2_h999999999",
    "affine_b9_g8",
    "affine_b2_g7",
    "kept",
    "trellis_b6_h8",
)
DTYPES = (torch.uint8, torch.int8, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool)


class Model:
    """A small packed model: config, layout, policy, tensors of random values."""

    def __init__(self, draw: random.Random, kind: int) -> None:
        name, changes = MODELS[kind]
        self.config = tiny_config(name, **changes)
        self.config.dtype = "float32"
        self.skeleton: Any = build_skeleton(self.config, dtype=torch.float32)
        self.layout = self._layout(draw)
        model = copy.deepcopy(self.skeleton)
        self.packed = attach(model, self.layout, kept_dtype=torch.float32)
        tied = tied_tensors(model)
        self.tensors = {
            name: drawn(draw, tensor.shape, tensor.dtype)
            for name, tensor in model.state_dict().items()
            if name not in tied
        }

    def _layout(self, draw: random.Random) -> PackedLayout:
        blocks = []
        one_kind = draw.random() < 0.6  # so that there are banks
        halved = draw.random() < 0.25 and self.config.model_type != "gpt_oss"  # biases belong to whole experts
        for path, module in experts.find_experts(self.skeleton):
            shapes = {part.name: (part.out_features, part.in_features) for part in experts.projections_of(module)}
            gone = set(draw.sample(range(module.num_experts), draw.choice((0, 0, 1))))
            rows = {}
            for projection, (_, columns) in shapes.items():
                if halved and projection == list(shapes)[-1]:
                    columns //= 2
                keys = [key for key in (TRELLIS if draw.random() < 0.5 else AFFINE) if columns % size_of(key) == 0]
                if one_kind:
                    size = size_of(draw.choice(keys))
                    keys = [key for key in keys if size_of(key) == size]
                else:
                    keys = [*keys, KEPT]
                rows[projection] = tuple(
                    None if expert in gone else draw.choice(keys) for expert in range(module.num_experts)
                )
            whole = ExpertLayout.of_whole(path, shapes, rows)
            blocks.append(in_halves(whole) if halved else whole)
        linears = {}
        for path, module in self.skeleton.named_modules():
            if isinstance(module, torch.nn.Linear) and path != "lm_head" and draw.random() < 0.7:
                keys = [key for key in (*TRELLIS, *AFFINE) if module.in_features % size_of(key) == 0]
                linears[path] = draw.choice(keys)
        if draw.random() < 0.6:
            linears["model.embed_tokens"] = draw.choice([key for key in AFFINE if 32 % size_of(key) == 0])
        return PackedLayout(tuple(blocks), linears, pruning=self._policy(draw, blocks))

    def _policy(self, draw: random.Random, blocks: list[ExpertLayout]) -> Pruning | None:
        halved = not any(block.without_halves for block in blocks)
        fitting = [name for name, policy in policies().items() if halved or not runs_halves(policy)]
        name = draw.choice([*fitting, None])
        if name is None:
            return None
        layers = []
        for number, block in enumerate(blocks):
            width, top_k = next(iter(block.projections.values()))[1], self.config.num_experts_per_tok
            shapes = otp.learned_shapes(width, top_k) if name == otp.NAME else {}
            numbers = {odp.PROTECT_AT: draw.uniform(0, 40)} if name == odp.NAME and draw.random() < 0.5 else {}
            layers.append(PrunedLayer(number, block.path, top_k, draw.random() < 0.5, None, numbers, shapes))
        points = [OperatingPoint(rate, (rate,) * len(layers)) for rate in (0.0, 0.3)]
        return Pruning(name, 0, tuple(layers), tuple(points), draw.randrange(2))


def in_halves(layout: ExpertLayout) -> ExpertLayout:
    """The same experts, each in two blocks of as many channels."""
    experts = tuple(
        tuple(replace(block, channels=block.channels // 2) for block in blocks for _ in range(2))
        for blocks in layout.experts
    )
    return replace(layout, experts=experts)


def size_of(key: str) -> int:
    """Group or rotation block of an encoding."""
    return int(key.rpartition("_")[2][1:])


def drawn(draw: random.Random, shape: Any, dtype: torch.dtype) -> torch.Tensor:
    """Random values in a block of memory of their own size."""
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    if dtype == torch.uint8:
        return torch.randint(0, 256, tuple(shape), generator=generator, dtype=dtype)
    return (torch.randn(tuple(shape), generator=generator) * 0.2).to(dtype)


def broken(draw: random.Random, value: Any) -> Any:
    """Another value of JSON in the place of this one."""
    if isinstance(value, str) and draw.random() < 0.5:
        return draw.choice(
            (value[:-1], value + "x", value.upper(), draw.choice(KEYS), draw.choice((*TRELLIS, *AFFINE)))
        )
    if type(value) is int and draw.random() < 0.6:
        return value + draw.choice((-1, 1, 2, 8))
    if type(value) is float and draw.random() < 0.6:
        return value * draw.choice((-1.0, 0.5, 3.0, 1e30))
    return copy.deepcopy(draw.choice(NUMBERS))


def mutate_json(draw: random.Random, content: Any) -> None:
    """Changes, removes, doubles or adds one entry somewhere, in place."""
    places: list[tuple[Any, Any]] = []
    stack = [content]
    while stack:
        here = stack.pop()
        entries = here.items() if isinstance(here, dict) else enumerate(here)
        for key, value in entries:
            places.append((here, key))
            if isinstance(value, dict | list):
                stack.append(value)
    holder, key = draw.choice(places)
    kind = draw.random()
    if kind < 0.7:
        holder[key] = broken(draw, holder[key])
    elif kind < 0.8:
        del holder[key]
    elif isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
    else:
        holder[draw.choice(("unknown", "", str(key) + "s", "dropped", "tensors"))] = copy.deepcopy(holder[key])


def mutate_tensor(draw: random.Random, tensor: torch.Tensor) -> torch.Tensor:
    """Other values, dtype, shape, or bytes read as another dtype."""
    kind = draw.randrange(6)
    if kind == 0:
        return tensor.clone().fill_(draw.choice((0.0, 255.0, -1.0, 65504.0)) if tensor.is_floating_point() else 1)
    if kind == 1 and tensor.is_floating_point():
        return tensor.clone().fill_(draw.choice((float("nan"), float("inf"), -float("inf"))))
    if kind == 2:
        return tensor.to(draw.choice(DTYPES))
    if kind == 3 and tensor.ndim and tensor.numel():
        axis = draw.randrange(tensor.ndim)
        return tensor.narrow(axis, 0, draw.choice((0, 1, max(0, tensor.shape[axis] - 1)))).clone()
    if kind == 4:
        return torch.cat([tensor, tensor]) if tensor.ndim else tensor.clone()
    return draw.choice((tensor.reshape(-1), tensor[None], tensor.transpose(0, -1) if tensor.ndim else tensor)).clone()


def run_model(draw: random.Random, model: Any) -> None:
    """A prompt, then one token after it."""
    ids = TOKEN_IDS if draw.random() < 0.5 else TOKEN_IDS[:1, :1]
    with torch.no_grad():
        model(ids, use_cache=False)


def loaded(parts: Model, content: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Loads as PackedSource does, from tensors in memory: parsed, attached, compared, put in place."""
    layout = PackedLayout.from_json(json.loads(json.dumps(content)))
    model = copy.deepcopy(parts.skeleton)
    packed = attach(model, layout, kept_dtype=torch.float32)
    stored = {name: StoredTensor(Path("x"), tuple(each.shape), each.dtype) for name, each in tensors.items()}
    for name, wanted in check_stored(model, packed, stored, "memory").items():
        path, _, leaf = name.rpartition(".")
        module, value = model.get_submodule(path), tensors[name].to(wanted.dtype, copy=True)
        if leaf in module._buffers:
            module._buffers[leaf] = value
        else:
            module._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)
    model.tie_weights()
    rebuild_buffers(model, CPU)
    if layout.pruning is not None:
        apply_pruning(model, layout.pruning)
    return model


def case_layout(draw: random.Random, parts: Model) -> None:
    content = parts.layout.to_json()
    for _ in range(draw.choice((1, 1, 1, 2))):
        mutate_json(draw, content)
    run_model(draw, loaded(parts, content, parts.tensors))


def case_policy(draw: random.Random, parts: Model) -> None:
    content = parts.layout.to_json()
    if "pruning" not in content:
        case_layout(draw, parts)
        return
    mutate_json(draw, content["pruning"])
    run_model(draw, loaded(parts, content, parts.tensors))


def case_tensors(draw: random.Random, parts: Model) -> None:
    tensors = dict(parts.tensors)
    name = draw.choice(list(tensors))
    kind = draw.random()
    if kind < 0.7:
        tensors[name] = mutate_tensor(draw, tensors[name])
    elif kind < 0.8:
        del tensors[name]
    elif kind < 0.9:
        tensors[draw.choice((name + "x", "x", name.replace("model", "module")))] = tensors.pop(name)
    else:
        other = draw.choice(list(tensors))
        tensors[name], tensors[other] = tensors[other], tensors[name]
    run_model(draw, loaded(parts, parts.layout.to_json(), tensors))


def case_changed_later(draw: random.Random, parts: Model) -> None:
    """A stored part is cast, cut or exchanged under a model that has run already."""
    model = loaded(parts, parts.layout.to_json(), parts.tensors)
    run_model(draw, model)
    names = [name for name in parts.packed if name in dict(model.named_parameters())]
    for _ in range(draw.choice((1, 1, 2, 3))):
        parameter = model.get_parameter(draw.choice(names))
        if parameter.dtype == torch.uint8 and draw.random() < 0.2:
            parameter.data = drawn(draw, parameter.shape, parameter.dtype)  # as good as what was there
        else:
            parameter.data = mutate_tensor(draw, parameter.data)
    try:
        run_model(draw, model)
    except (IndexError, RuntimeError) as error:  # where torch itself looks rows up in what was cut
        raise ShapeError(str(error)) from error


def drawn_matrix(
    draw: random.Random, family: Sequence[str], outputs: int, inputs: int, group: int
) -> tuple[Any, dict[str, torch.Tensor], int]:
    """A matrix as banks take it: in an encoding of those keys that fits, on affine grids one of that group."""
    keys = [key for key in family if inputs % size_of(key) == 0 and (family is TRELLIS or size_of(key) == group)]
    encoding: Any = encoding_from_key(draw.choice(keys))
    specs = encoding.tensor_specs(outputs, inputs)
    return encoding, {name: drawn(draw, s.shape, getattr(torch, s.dtype)) for name, s in specs.items()}, inputs


def case_kernels(draw: random.Random, parts: Model) -> None:
    """Banks, products and decoding, asked for directly with what may not fit."""
    family, inner = TRELLIS if draw.random() < 0.5 else AFFINE, draw.choice((16, 48, 80))
    group = draw.choice((8, 16))
    made, down = [], []
    for _ in range(draw.choice((1, 1, 3, 6))):
        if draw.random() < 0.4:  # else of one shape
            inner = draw.choice((16, 48, 80))
        outputs = 2 * inner if draw.random() < 0.95 else draw.choice((1, 5, 33, 272))
        made.append(drawn_matrix(draw, family, outputs, 48, group))
        down.append(drawn_matrix(draw, family, 48, inner, group))
    place = draw.randrange(len(made))
    encoding, tensors, inputs = made[place]
    kind = draw.choice((0, 1, 2, 3, 4, 5, 6, 6, 6, 6, 6, 6))
    if kind == 0:
        name = draw.choice(list(tensors))
        made[place] = encoding, {**tensors, name: mutate_tensor(draw, tensors[name])}, inputs
    elif kind == 1:
        made[place] = encoding, tensors, inputs + draw.choice((-8, -1, 1, 8, 16, -48, 2**20))
    elif kind == 2:
        other = TrellisEncoding(Fraction(draw.randrange(1, 13), 2), draw.choice((1, 3, 8, 15, 24, 128)))
        others = other, AffineEncoding(draw.randrange(0, 10), draw.choice((1, 4, 8, 24)))
        made[place] = draw.choice(others), tensors, inputs
    elif kind == 3:  # of another shape than the others, in inputs too
        made[place] = drawn_matrix(draw, family, draw.choice((1, 5, 33, 272)), draw.choice((16, 64, 176)), group)
    inputs = max([1, *(inputs for _, _, inputs in made if inputs < 2**10)])
    rows = drawn(draw, (draw.choice((1, 3, 20)), inputs + (draw.choice((-1, 8)) if kind == 4 else 0)), torch.float32)
    if len(made) > 1 and draw.random() < 0.4:
        place = draw.randrange(len(made))
        for matrices in draw.choice(((made,), (down,), (made, down))):
            matrices[place] = None  # type: ignore[call-overload]
    bits = draw.choice((16, 16, 8))
    path = draw.choice([path for path in PATHS if path <= best_path()])
    slots = draw.choice((1, 2, 3))
    count = len(rows) * (slots if draw.random() < 0.9 else slots + 1)
    chosen = torch.tensor([draw.choice((-1, 0, 1, 2, 3, 4, 5, 6, 2**40)) for _ in range(count)])
    with inputs_of(bits, CPU):
        bank = draw.choice((affine.Bank, trellis.Bank))(made) if kind == 5 else bank_for(made)
        if bank is not None:
            bank.product(rows, chosen, top_k=slots, path=path)  # type: ignore[call-arg]
            if draw.random() < 0.3:
                part = next(part for part in made if part is not None)[1]["scales"]
                part.data = part.data.clone() if draw.random() < 0.5 else mutate_tensor(draw, part.data)
                bank.product(rows)
            other: Any = bank if draw.random() < 0.1 else bank_for(down)
            if other is not None:
                weights = torch.rand(len(rows), slots)
                experts_output(bank, other, rows, chosen.view(len(rows), -1), weights, "silu", path=path)  # type: ignore[arg-type]
        encoding, tensors, inputs = next(part for part in made if part is not None)
        if 0 < inputs <= rows.shape[1]:
            packed_linear(rows[:, :inputs], tensors, encoding, in_features=inputs)
            encoding.dequantize(tensors, inputs)


def case_rules(draw: random.Random, parts: Model) -> None:
    """Compiled decisions, asked for directly with what may not fit."""
    tokens, width, top_k = draw.choice((1, 7)), draw.choice((1, 16, 37)), draw.choice((1, 2, 3, 8))
    off = [draw.choice((0, 0, 0, 0, 1, -1)) for _ in range(5)]
    tensors = {name: drawn(draw, shape, torch.float32) for name, shape in otp.learned_shapes(width, top_k).items()}
    if draw.random() < 0.5:
        name = draw.choice(list(tensors))
        tensors[name] = mutate_tensor(draw, tensors[name])
    routed = Routed(
        drawn(draw, (tokens + off[0], width + off[1]), torch.float32),
        torch.randint(0, 8, (tokens + off[2], top_k)),
        torch.rand(tokens, max(0, top_k + off[3])),
        draw.choice((None, 0.7, torch.rand(tokens + off[4]))),
    )
    policy = draw.choice((odp, otp))
    values = LayerValues(0, numbers={odp.PROTECT_AT: 2.0}, tensors=tensors)
    cut = Cut(draw.choice((0.3, -1.0, 1e39, "0.3", None, float("nan"))), draw.choice((8, 8, 0, -1, 2**40)), True)
    rule = compiled_rule(policy, values, cut)
    found = None if rule is None else rule(routed)
    if found is None and tensors[otp.WEIGHT].shape == (top_k - 1, width + top_k - 1) and not any(off):
        with contextlib.suppress(RuntimeError, IndexError):  # torch looks at shapes and dtypes itself
            kept_slots(policy, routed, values, cut)


def case_files(draw: random.Random, parts: Model) -> None:
    """A directory as exported, with other bytes, another's config.json, or a file less, through from_pretrained."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        content = parts.layout.to_json()
        config = json.loads(parts.config.to_json_string(use_diff=False))
        save_file({key: each.contiguous() for key, each in parts.tensors.items()}, folder / "model.safetensors")
        kind = draw.randrange(6)
        weights = folder / "model.safetensors"
        if kind <= 2:
            data = bytearray(weights.read_bytes())
            header = 8 + int.from_bytes(data[:8], "little")
            for _ in range(draw.choice((1, 1, 3))):
                at = draw.randrange(len(data) if kind == 2 else header)
                data[at] ^= 1 << draw.randrange(8)
            weights.write_bytes(data)
        elif kind == 3:
            weights.write_bytes(weights.read_bytes()[: draw.randrange(weights.stat().st_size)])
        elif kind == 4:
            content = Model(draw, draw.randrange(len(MODELS))).layout.to_json()
        else:
            mutate_json(draw, content)
        text = json.dumps({**config, "architectures": [type(parts.skeleton).__name__], "quantization_config": content})
        (folder / "config.json").write_text(text, encoding="utf-8")
        model = load_model(folder, RunSettings(device="cpu"))
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        run_model(draw, model)


CASES: tuple[tuple[Callable[[random.Random, Model], None], int], ...] = (
    (case_layout, 20),
    (case_policy, 12),
    (case_tensors, 18),
    (case_changed_later, 12),
    (case_kernels, 22),
    (case_rules, 12),
    (case_files, 4),
)


def run(seed: int, first: int, count: int, note: Path) -> Counter[str]:
    """Counts by outcome of so many cases; `note` names the one that runs."""
    outcomes: Counter[str] = Counter()
    accepted: Counter[str] = Counter()
    functions, weights = zip(*CASES, strict=True)
    parts: Model | None = None
    for number in range(first, first + count):
        if parts is None or number % 20 == 0:
            parts = Model(random.Random(f"{seed}/model/{number // 20}"), number // 20 % len(MODELS))
        draw = random.Random(f"{seed}/{number}")
        case = draw.choices(functions, weights)[0]
        note.write_text(f"--seed {seed} --first {number} --count 1  ({case.__name__})\n", encoding="utf-8")
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        try:
            case(draw, parts)
            outcomes["accepted"] += 1
            accepted[case.__name__.removeprefix("case_")] += 1
        except McError:
            outcomes["refused"] += 1
        except Exception:
            outcomes["failed"] += 1
            print(f"case {note.read_text(encoding='utf-8')}{traceback.format_exc(limit=-6)}", flush=True)
        faulthandler.cancel_dump_traceback_later()
        if (number + 1 - first) % 1000 == 0:
            print(f"{number + 1 - first}: {dict(outcomes)}", flush=True)
    print(f"accepted by kind: {dict(accepted)}", flush=True)
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    plugin.register()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="packed-fuzzer-"))
    note = folder / "FILE.case"
    print(f"{note} says which case is running", flush=True)
    begun = time.monotonic()
    outcomes = run(given.seed, given.first, given.count, note)
    shutil.rmtree(folder)
    print(
        f"packed fuzzer: {given.count} cases, seed {given.seed}: "
        + ", ".join(f"{n} {c}" for c, n in sorted(outcomes.items()))
    )
    print(f"{time.monotonic() - begun:.0f} s", file=sys.stderr)
    return 1 if outcomes["failed"] or sum(outcomes.values()) != given.count else 0


if __name__ == "__main__":
    sys.exit(main())
