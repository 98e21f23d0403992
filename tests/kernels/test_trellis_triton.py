"""GPU kernels against float64: on a GPU as compiled, elsewhere by Triton's interpreter (`tests/conftest.py`).

Few slots are multiplied in float32, many with inputs in float16 under a scale per row. References are decoded by the
independent reader in `tests/dense_twin.py`.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mc_cli import kernels
from mc_cli.artifacts.packed import ExpertLayout
from mc_cli.encodings.trellis import TrellisEncoding, trellis_for
from mc_cli.kernels import trellis, trellis_gpu
from mc_cli.kernels.trellis import path_name
from mc_cli.kernels.trellis_gpu import GpuBank
from mc_cli.models import expert_banks, experts
from mc_cli.numerics.rotation import rotate
from mc_cli.numerics.trellis_code import RATES as WIDTHS
from mc_cli.numerics.trellis_code import code_levels
from mc_cli.packed.packed_expert_modules import pack_experts
from tests.dense_twin import _decode
from tests.kernels import products
from tests.kernels.products import relative_error

pytest.importorskip("triton", reason="Triton is not installed: the GPU kernels are neither run nor interpreted")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RATES = tuple(half / 2 for half in range(2, 11))
SHAPES = ((24, 48), (288, 12), (10, 1), (208, 66), (512, 37))  # (out_features, in_features)
FEW_ERROR = 2e-6  # of an output's row, as vectors: float32
MANY_ERROR = 1e-3  # inputs in float16; 3e-4 is typical, and 5e-4 was seen with outliers among few inputs
HALF_ERROR = 0.02  # of a block of experts in bfloat16, whose activations between the projections are rounded
needs_gpu = pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a CUDA device: graphs, and dispatch by device")

Matrix = tuple[TrellisEncoding, dict[str, Tensor]]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter computes whole tiles, so that small ones make small matrices quick, and give them several."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(trellis_gpu, "GROUPS_LANES", 64)
        monkeypatch.setattr(trellis_gpu, "TILE_GROUPS", 8)


def packed(outputs: int, inputs: int, bits: float, seed: int = 0) -> Matrix:
    """Random codes: every byte stands for something."""
    generator = torch.Generator().manual_seed(outputs + inputs + 10**6 * seed)
    encoding = trellis_for(bits, inputs)
    shape = encoding.tensor_specs(outputs, inputs)["codes"].shape
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    scales = (0.01 + torch.rand(outputs, generator=generator)).half()
    return encoding, {"codes": codes.to(DEVICE), "scales": scales.to(DEVICE)}


def rows(count: int, inputs: int) -> Tensor:
    return products.rows(count, inputs).to(DEVICE)


def dense(matrix: Matrix) -> Tensor:
    """float64 [out_features, in_features], worked out from the format's description."""
    encoding, tensors = matrix  # where inputs are padded, blocks of 1 or 2 are rotated, so padding changes nothing
    parts = {"codes": tensors["codes"].cpu(), "scales": tensors["scales"].cpu()}
    return _decode(encoding.key, parts.__getitem__).double()


def reference(inputs: Tensor, matrix: Matrix) -> Tensor:
    weight = dense(matrix)[:, : inputs.shape[-1]]
    return (inputs.cpu().double() @ weight.T).to(DEVICE)


def bound(bank: GpuBank, slots: int) -> float:
    return FEW_ERROR if slots <= bank.few_slots else MANY_ERROR


@pytest.mark.parametrize("bits", RATES)
def test_products_are_those_of_float64(bits: float) -> None:
    """Every rate; over all rates every shape: few and many tokens, no token."""
    for number in (0, 1):
        outputs, inputs = SHAPES[(RATES.index(bits) + number) % len(SHAPES)]
        matrix = packed(outputs, inputs, bits)
        bank = GpuBank([(*matrix, inputs)])
        for count in (2,) if number else (1, bank.few_slots + 15):
            tokens = rows(count, inputs)
            found = bank.product(tokens)
            assert found.dtype == torch.float32 and found.device == tokens.device
            assert relative_error(found, reference(tokens, matrix)) < bound(bank, count)
        assert bank.product(torch.empty(0, inputs, device=DEVICE)).shape == (0, outputs)


@pytest.mark.parametrize(("count", "top_k"), [(1, 2), (3, 1), (5, 3), (40, 2)])
def test_mixed_widths_in_one_launch(count: int, top_k: int) -> None:
    """An expert that is not there, slots without an expert on either side, an expert that nobody chose."""
    outputs, inputs = 176, 132  # eleven lanes, and a tile that no number of inputs here fills
    made = [packed(outputs, inputs, bits, seed) for seed, bits in enumerate((1, 2.5, 5, 3, 4, 3.5, 1.5))]
    parts = [*made[:3], None, *made[3:]]
    bank = GpuBank([part and (*part, inputs) for part in parts])
    assert bank.absent.tolist() == [False] * 3 + [True] + [False] * 4 + [True]
    generator = torch.Generator().manual_seed(count)
    chosen = torch.randint(-1, 7, (count * top_k,), generator=generator)  # the last one is never chosen
    chosen[::5] = 3  # the one that is not there
    chosen[chosen == 1] = 8  # one more than there are
    chosen[-1] = 2
    tokens = rows(count, inputs)
    expected = torch.zeros(count * top_k, outputs, dtype=torch.float64, device=DEVICE)
    for slot, expert in enumerate(chosen.tolist()):
        part = parts[expert] if 0 <= expert < 8 else None
        if part is not None:
            expected[slot] = reference(tokens[slot // top_k][None], part)[0]
    found = bank.product(tokens, chosen.to(DEVICE), top_k=top_k)
    there = expected.abs().sum(1) > 0
    assert there.any() and relative_error(found[there], expected[there]) < bound(bank, count * top_k)
    assert not found[~there].any()


# (out_features, in_features): one and two sequences, of 96 to 208 outputs, and blocks of 4 to 64 inputs
UNEQUAL = ((416, 36), (96, 64), (112, 16), (200, 12))


@pytest.mark.parametrize(("count", "top_k"), [(1, 3), (9, 2)])
@pytest.mark.parametrize("shapes", [UNEQUAL, ((96, 64), (16, 64)), ((200, 12), (200, 8))])
def test_matrices_of_unequal_shapes_in_one_launch(shapes: Any, count: int, top_k: int) -> None:
    """All that may differ, outputs alone, and inputs alone; one that is not there, and numbers of none."""
    made = [packed(*shape, bits) for shape, bits in zip(shapes, (2, 3.5, 1, 5), strict=False)]
    parts = [*((*matrix, inputs) for matrix, (_, inputs) in zip(made, shapes, strict=True)), None]
    bank = GpuBank(parts)
    most_outputs, most_inputs = (max(sizes) for sizes in zip(*shapes, strict=True))
    assert bank.shapes == (*shapes, None) and (bank.out_features, bank.in_features) == (most_outputs, most_inputs)
    chosen = torch.randint(-1, len(parts) + 1, (count * top_k,), generator=torch.Generator().manual_seed(count))
    chosen[0] = 1
    tokens = rows(count, most_inputs)
    expected = torch.zeros(count * top_k, most_outputs, dtype=torch.float64, device=DEVICE)
    for slot, number in enumerate(chosen.tolist()):
        if 0 <= number < len(shapes):
            outputs, inputs = shapes[number]
            expected[slot, :outputs] = reference(tokens[slot // top_k, :inputs][None], made[number])[0]
    found = bank.product(tokens, chosen.to(DEVICE), top_k=top_k)
    there = expected.abs().sum(1) > 0
    assert relative_error(found[there], expected[there]) < bound(bank, count * top_k)
    assert not found[expected == 0].any()


@pytest.mark.parametrize("count", [1, 5])
def test_what_lies_behind_a_matrixs_inputs_is_not_read(count: int) -> None:
    """Though another slot of the same token reads it."""
    made = [(*packed(48, inputs, 2), inputs) for inputs in (16, 64, 48)]
    bank = GpuBank(made)
    tokens, chosen = rows(count, 64), torch.tensor([0, 1, 2], device=DEVICE).repeat(count)
    expected = bank.product(tokens, chosen, top_k=3).view(count, 3, -1)
    tokens[:, 48:] = float("nan")
    found = bank.product(tokens, chosen, top_k=3).view(count, 3, -1)
    assert bool(found[:, 1].isnan().all()) and torch.equal(found[:, ::2], expected[:, ::2])


@pytest.mark.parametrize("programs", [1, 2, 5, 12, 100])
def test_sums_do_not_depend_on_how_work_is_cut(programs: int) -> None:
    """Programs begin and end anywhere within a slot's outputs; what they add is the same each time, bit by bit."""
    matrices = [packed(512, 50, 2, seed) for seed in range(2)]
    bank = GpuBank([(*matrix, 50) for matrix in matrices])
    bank.programs = programs
    tokens = rows(2, 50)
    chosen = torch.tensor([1, 0], device=DEVICE)
    found = bank.product(tokens, chosen)
    expected = torch.cat([reference(tokens[:1], matrices[1]), reference(tokens[1:], matrices[0])])
    assert relative_error(found, expected) < FEW_ERROR
    assert torch.equal(bank.product(tokens, chosen), found)


def test_slots_are_sorted_into_tiles_of_one_matrix() -> None:
    part = (*packed(16, 4, 1), 4)
    bank = GpuBank([part, None, part, part, part])
    generator = torch.Generator().manual_seed(0)
    for count, size in ((1, 16), (50, 16), (77, 32), (200, 16)):
        chosen = torch.randint(-1, 7, (count,), generator=generator).to(DEVICE)
        order, matrix, begin, end = (tensor.cpu() for tensor in bank._tiles(chosen, size))
        slots = [order[a:b].tolist() for a, b in zip(begin.tolist(), end.tolist(), strict=True) if a < b]
        owners = [int(number) for number, a, b in zip(matrix, begin, end, strict=True) if a < b]
        assert all(0 < len(tile) <= size for tile in slots)
        assert all(int(chosen[slot]) == owner for tile, owner in zip(slots, owners, strict=True) for slot in tile)
        expected = [slot for slot, expert in enumerate(chosen.tolist()) if expert in (0, 2, 3, 4)]
        assert sorted(slot for tile in slots for slot in tile) == expected


@pytest.mark.parametrize("offset", [1, 4, 8])
def test_codes_may_begin_anywhere(offset: int) -> None:
    """In a file read as a whole tensors are not aligned: loads are then narrower."""
    encoding, tensors = packed(64, 40, 3)
    room = torch.zeros(tensors["codes"].numel() + offset, dtype=torch.uint8, device=DEVICE)
    room[offset:] = tensors["codes"].reshape(-1)
    moved = {**tensors, "codes": room[offset:].view(tensors["codes"].shape)}
    tokens = rows(1, 40)
    found = GpuBank([(encoding, moved, 40)]).product(tokens)
    assert torch.equal(found, GpuBank([(encoding, tensors, 40)]).product(tokens))


@pytest.mark.parametrize("inputs", [1, 6, 48, 128, 1280])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rotations_are_those_of_float64(inputs: int, dtype: torch.dtype) -> None:
    matrix = packed(16, inputs, 2)
    tokens = rows(3, inputs).to(dtype)
    found = GpuBank([(*matrix, inputs)]).rotated(tokens)
    assert relative_error(found, rotate(tokens.cpu().double(), matrix[0].block).to(DEVICE)) < 5e-7


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy, by which the interpreter computes
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("count", [3, 9])
def test_activations_that_are_not_finite_show_in_their_token_alone(value: float, count: int) -> None:
    matrix = packed(48, 64, 2)  # a bank keeps addresses alone
    bank = GpuBank([(*matrix, 64)])
    tokens = rows(count, 64)
    expected = bank.product(tokens)
    tokens[1, 5] = value
    found = bank.product(tokens)
    assert bool(found[1].isnan().all()) and torch.equal(found[2:], expected[2:]) and torch.equal(found[0], expected[0])


def test_zeros_give_zeros() -> None:
    matrix = packed(48, 64, 2.5)
    bank = GpuBank([(*matrix, 64)])
    for count in (1, 9):
        assert not bank.product(torch.zeros(count, 64, device=DEVICE)).any()


def test_tables_hold_two_levels() -> None:
    tables = trellis_gpu._pair_tables()
    for rate in WIDTHS:
        levels, step = code_levels(rate).int(), int(rate) if rate < 4 else 0
        table, tables = tables[: 4096 << step].int() & 0xFFFF, tables[4096 << step :]
        bits = torch.arange(4096 << step)
        assert torch.equal((table & 0xFF) - 128, levels[bits & 4095])
        assert torch.equal((table >> 8) - 128, levels[bits >> step])
    assert not len(tables)


# A block of experts, as models call it


def mixtral_block() -> Any:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    return MixtralExperts(
        MixtralConfig(hidden_size=48, intermediate_size=80, num_local_experts=6, num_experts_per_tok=2)
    )


def gpt_oss_block() -> Any:
    """With biases, and matrices that lie the other way round."""
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    return GptOssExperts(GptOssConfig(hidden_size=48, intermediate_size=80, num_local_experts=6, num_experts_per_tok=2))


def packed_pair(make: Callable[[], Any], dtype: torch.dtype) -> tuple[Any, Any]:
    """(a block with mixed widths and a dropped expert, the family's own dense block in float64 with its weights)."""
    generator = torch.Generator().manual_seed(1)
    whole, block = make().double(), make()
    shapes = {facts.name: (facts.out_features, facts.in_features) for facts in experts.projections_of(block)}
    widths = (2, 3.5, None, 1.5, 4, 2.5)
    keys = {name: tuple(bits and trellis_for(bits, shape[1]).key for bits in widths) for name, shape in shapes.items()}
    for parameter in (*whole.parameters(), *block.parameters()):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    pack_experts(block, ExpertLayout.of_whole("experts", shapes, keys), dtype=dtype)
    for name, parameter in block.named_parameters():
        if parameter.dtype == torch.uint8:
            parameter.data = torch.randint(0, 256, parameter.shape, dtype=torch.uint8, generator=generator)
        elif "scales" in name:
            parameter.data = (0.1 * torch.rand(parameter.shape, generator=generator)).half()
    for name, places in block._mc_packed.items():
        for expert, blocks in enumerate(places):
            place = blocks[0] if blocks else None
            weight = getattr(whole, name).data[expert].T if whole.is_transposed else getattr(whole, name).data[expert]
            if place is None:
                weight.zero_()
            else:
                parts = {part: getattr(block, attribute)[place.place] for part, attribute in place.names.items()}
                weight.copy_(dense((place.encoding, parts)))
            if whole.has_bias:
                bias = getattr(block, f"{name}_bias").data
                bias[expert] = bias[expert] if place is not None else 0  # of what is dropped nothing is added
                getattr(whole, f"{name}_bias").data[expert] = bias[expert]
    return block.to(DEVICE, dtype), whole


@pytest.fixture
def gpu_banks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks of experts get the GPU's banks, on whatever device the tests run."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(kernels.trellis, "bank_of", GpuBank)
        monkeypatch.setattr(kernels, "runs_packed", lambda rows, encoding: True)
    yield


def routing(tokens: int) -> tuple[Tensor, Tensor]:
    """Any two experts, the dropped one too, and now and then none (transformers' sentinel, 6)."""
    generator = torch.Generator().manual_seed(tokens)
    chosen = torch.stack([torch.randperm(6, generator=generator)[:2] for _ in range(tokens)])
    weights = torch.rand(tokens, 2, generator=generator)
    if tokens > 2:
        chosen[2, 1] = 6
    return chosen, weights


@pytest.mark.usefixtures("gpu_banks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [mixtral_block, gpt_oss_block])
def test_a_block_of_experts_is_that_of_float64(make: Callable[[], Any], dtype: torch.dtype) -> None:
    block, whole = packed_pair(make, dtype)
    for tokens in (1, 12):
        hidden = rows(tokens, 48).sign() * torch.rand(tokens, 48, device=DEVICE)
        chosen, weights = routing(tokens)
        with torch.inference_mode():
            found = experts.experts_forward(block, hidden.to(dtype), chosen.to(DEVICE), weights.to(DEVICE, dtype))
            banks = expert_banks.banks_of(block)
            assert banks is not None and all(isinstance(bank, GpuBank) for bank in (banks.up, banks.down))
            safe = chosen.clamp(max=5)  # not every family's own forward knows the sentinel
            whole.config._experts_implementation = "eager"
            exact = whole(hidden.to(dtype).cpu().double(), safe, weights.to(dtype).double() * (chosen < 6))
        error = HALF_ERROR if dtype == torch.bfloat16 else MANY_ERROR if tokens > 1 else 10 * FEW_ERROR
        assert found.dtype == dtype and relative_error(found, exact.to(DEVICE)) < error


@needs_gpu
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("make", [mixtral_block, gpt_oss_block])
def test_a_captured_graph_follows_its_inputs(make: Callable[[], Any], tokens: int) -> None:
    """Nothing in a block's forward waits for the device, so it can be captured; a replay takes other experts."""
    block, _ = packed_pair(make, torch.bfloat16)
    hidden = rows(tokens, 48).bfloat16()
    chosen, weights = (tensor.to(DEVICE) for tensor in routing(tokens))
    held = hidden.clone(), chosen.clone(), weights.bfloat16()
    with torch.inference_mode():
        experts.experts_forward(block, *held)  # compiles, and makes what stays on the device
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = experts.experts_forward(block, *held)
        for turn in range(3):
            held[0].copy_(hidden.roll(turn, 1))
            held[1].copy_((chosen + turn) % 6)
            graph.replay()
            assert torch.equal(outputs, experts.experts_forward(block, *held))


@needs_gpu
def test_packed_linears_run_on_the_gpu() -> None:
    encoding, tensors = packed(512, 256, 2.5)
    assert path_name(DEVICE) == "Triton" and trellis.runs_packed(rows(1, 256))
    for count in (1, 40):
        tokens = rows(count, 256)
        found = kernels.packed_linear(tokens, tensors, encoding, in_features=256)
        assert relative_error(found, reference(tokens, (encoding, tensors))) < MANY_ERROR


def test_what_a_gpu_uses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    on_gpu: Any = SimpleNamespace(device=device, shape=(1, 8), requires_grad=False)
    for switched, room, missing in (
        ("1", 232448, ""),
        ("1", 101376, ""),
        ("1", 65536, "Ampere"),
        ("", 232448, "MC_CLI_TRITON=1 turns the Triton kernels on"),
    ):
        monkeypatch.setattr(trellis_gpu, "_shared_memory", lambda device, room=room: room)
        monkeypatch.setenv(trellis_gpu.SWITCH, switched)
        trellis_gpu.serves.cache_clear()
        assert trellis.runs_packed(on_gpu) == (not missing)
        assert missing in path_name(device) and (path_name(device) == "Triton") == (not missing)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    trellis_gpu.serves.cache_clear()
    assert not trellis.runs_packed(on_gpu) and "Triton is not installed" in path_name(device)
    trellis_gpu.serves.cache_clear()


def test_the_benchmark_says_what_it_needs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if DEVICE.type == "cuda":
        pytest.skip("this machine has what the benchmark needs; `make gpu-check` runs it")
    path = Path(__file__).parents[2] / "recipes" / "benchmarks" / "gpu.py"
    monkeypatch.setattr(sys, "argv", [str(path)])
    monkeypatch.syspath_prepend(str(path.parent))  # as for a script; it shares functions with one beside it
    with pytest.raises(SystemExit, match="torch finds no CUDA device here"):
        runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out == ""
