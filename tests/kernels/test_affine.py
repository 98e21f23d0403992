"""Products with affine grids against float64: every width, odd sizes and groups, one token to many, every path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from mc_cli import kernels, native
from mc_cli.artifacts.packed import ExpertLayout
from mc_cli.encodings.affine import AffineEncoding, affine_for
from mc_cli.encodings.trellis import trellis_for
from mc_cli.errors import ShapeError
from mc_cli.kernels import packed_linear, path_names
from mc_cli.kernels.affine import (
    FEW_TOKENS,
    HALF_TOKENS,
    MOST_INPUTS,
    PATHS,
    Bank,
    bank_of,
    best_path,
    decoded_product,
    runs_packed,
)
from mc_cli.models import expert_banks, experts
from mc_cli.packed.packed_expert_modules import pack_experts
from tests.kernels.products import error_of_bank, paths, relative_error, rows

Packed = tuple[AffineEncoding, dict[str, Tensor]]

WIDTHS = tuple(range(1, 9))
# (out_features, in_features, group_size): whole vectors, parts of them, and groups that begin within a byte
SHAPES = ((48, 256, 128), (33, 288, 96), (64, 2048, 1024), (40, 1000, 40), (70, 36, 12), (21, 7, 7), (16, 24, 8))
LARGEST_ERROR = 4e-4  # of the outputs' size, where outliers cancel; 5e-5 is typical, bfloat16 has 2e-3
DECODED_ERROR = 2e-6
needs_library = pytest.mark.skipif(native.library() is None, reason="installed without a C compiler")


def packed(outputs: int, inputs: int, bits: int, group: int) -> Packed:
    """Random codes and grids: every byte stands for something."""
    generator = torch.Generator().manual_seed(outputs + inputs + bits)
    encoding = AffineEncoding(bits, group)
    tensors = {
        name: torch.randint(0, 256, spec.shape, dtype=torch.uint8, generator=generator)
        if spec.dtype == "uint8"
        else (0.01 + torch.rand(spec.shape, generator=generator)).half()
        for name, spec in encoding.tensor_specs(outputs, inputs).items()
    }
    return encoding, tensors


def reference(inputs: Tensor, encoding: AffineEncoding, tensors: dict[str, Tensor]) -> Tensor:
    """float64, from codes that are read bit by bit."""
    count = inputs.shape[-1]
    bit = torch.arange(count * encoding.bits)
    stream = tensors["codes"][:, bit >> 3].int() >> (bit & 7) & 1
    codes = (stream.view(-1, count, encoding.bits) << torch.arange(encoding.bits)).sum(-1).double()
    grouped = codes.unflatten(-1, (-1, encoding.group_size))
    zero_points = tensors["zero_points"].double() * 2.0 ** (encoding.bits - 8)
    weight = (grouped - zero_points[..., None]) * tensors["scales"].double()[..., None]
    return inputs.double() @ weight.flatten(-2).T


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_float64(shape: tuple[int, int, int], bits: int) -> None:
    outputs, inputs, group = shape
    encoding, tensors = packed(outputs, inputs, bits, group)
    for count in (1, 3, FEW_TOKENS, FEW_TOKENS + 1, 49):
        tokens = rows(count, inputs)
        found = packed_linear(tokens, tensors, encoding, in_features=inputs)
        assert relative_error(found, reference(tokens, encoding, tensors)) < LARGEST_ERROR
    assert packed_linear(torch.empty(0, inputs), tensors, encoding, in_features=inputs).shape == (0, outputs)


@needs_library
@pytest.mark.parametrize("path", sorted(PATHS))
@pytest.mark.parametrize("bits", WIDTHS)
def test_every_path_that_the_machine_has_agrees(bits: int, path: int) -> None:
    if path not in paths(kernels.affine):
        pytest.skip(f"this machine has no {PATHS[path]}")
    for outputs, inputs, group in SHAPES:
        encoding, tensors = packed(outputs, inputs, bits, group)
        bank = Bank([(encoding, tensors, inputs)])
        exact = encoding.dequantize_in_torch(tensors, inputs)
        assert torch.equal(encoding.dequantize_compiled(tensors, inputs, torch.float32, path), exact)
        assert torch.equal(encoding.dequantize_compiled(tensors, inputs, torch.bfloat16, path), exact.bfloat16())
        assert torch.equal(encoding.dequantize_compiled(tensors, inputs, torch.float16, path), exact.half())
        for count in (1, 2, 5, 47, 200):
            tokens = rows(count, inputs)
            found = bank.product(tokens, path=path)
            expected = reference(tokens, encoding, tensors)
            assert relative_error(found, expected) < LARGEST_ERROR
            assert relative_error(decoded_product(tokens.double(), tensors, encoding), expected) < DECODED_ERROR


@needs_library
def test_what_is_multiplied_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """AVX-512 and AMX multiply any number of float32 tokens; of 16-bit ones the library multiplies many faster."""
    for path, some, many, halves in (
        *((few, True, False, False) for few in (0, 1)),
        *((many, True, True, True) for many in (2, 3)),
    ):
        monkeypatch.setattr(kernels.affine, "best_path", lambda path=path: path)
        assert runs_packed(torch.empty(FEW_TOKENS, 8)) == some
        assert runs_packed(torch.empty(FEW_TOKENS + 1, 8)) == many
        assert runs_packed(torch.empty(HALF_TOKENS + 1, 8)) == many
        assert runs_packed(torch.empty(HALF_TOKENS, 8, dtype=torch.bfloat16)) == halves
        assert not runs_packed(torch.empty(HALF_TOKENS + 1, 8, dtype=torch.bfloat16))
        assert not runs_packed(torch.empty(1, MOST_INPUTS + 1))
        assert not runs_packed(torch.empty(1, 8, requires_grad=True))


@needs_library
def test_the_error_is_typically_a_fifth_of_what_is_asserted() -> None:
    encoding, tensors = packed(256, 2048, 8, 128)
    tokens = rows(8, 2048)
    error = relative_error(
        packed_linear(tokens, tensors, encoding, in_features=2048), reference(tokens, encoding, tensors)
    )
    assert error < LARGEST_ERROR / 5


def test_stacks_of_matrices_are_decoded_together() -> None:
    parts = [packed(48, 36, 3, 12)[1], {name: part.flip(0) for name, part in packed(48, 36, 3, 12)[1].items()}]
    encoding = AffineEncoding(3, 12)
    stacked = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    found = encoding.dequantize(stacked, 36)
    assert torch.equal(found, encoding.dequantize_in_torch(stacked, 36))
    for matrix, part in zip(found, parts, strict=True):
        assert torch.equal(matrix, encoding.dequantize_in_torch(part, 36))


@pytest.mark.parametrize("inputs", [32, 40, 64])
def test_codes_of_another_matrix_are_refused(inputs: int) -> None:
    encoding, tensors = packed(8, 48, 3, 8)
    with pytest.raises(ShapeError):
        encoding.dequantize(tensors, inputs)


@needs_library
@pytest.mark.parametrize("path", sorted(PATHS))
@pytest.mark.parametrize("count", [1, 3, 70])
@pytest.mark.parametrize("group", [64, 24])
def test_a_bank_gives_every_slot_its_own_matrix(group: int, count: int, path: int) -> None:
    """Mixed widths, an expert that is not there, slots without an expert, an expert that nobody chose; in threads."""
    if path not in paths(kernels.affine):
        pytest.skip(f"this machine has no {PATHS[path]}")
    made = [packed(530, 192, bits, group) for bits in (1, 2, 8, 3, 4)]
    error = error_of_bank(Bank, made, reference, outputs=530, inputs=192, tokens=count, path=path)
    assert error < LARGEST_ERROR


def test_groups_of_different_sizes_have_no_bank() -> None:
    assert bank_of([(*packed(8, 48, 2, 8), 48), None, (*packed(8, 48, 2, 24), 48)]) is None
    assert kernels.bank_for([(*packed(8, 48, 2, 8), 48), None, (*packed(8, 48, 2, 24), 48)]) is None
    assert kernels.bank_for([(*packed(8, 48, 2, 8), 48), (None, {"weight": torch.zeros(8, 48)}, 48)]) is None
    assert kernels.bank_for([None, None]) is None


@needs_library
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_show_in_their_token_alone(value: float) -> None:
    encoding, tensors = packed(48, 128, 4, 64)
    tokens = rows(3, 128)
    expected = packed_linear(tokens, tensors, encoding, in_features=128)
    tokens[1, 5] = value
    found = packed_linear(tokens, tensors, encoding, in_features=128)
    assert bool(found[1].isnan().all()) and torch.equal(found[::2], expected[::2])


@needs_library
def test_the_largest_sums_fit() -> None:
    """All activations and codes at their largest, in the largest group that is multiplied packed, and one larger."""
    for inputs in (MOST_INPUTS, MOST_INPUTS + 8):
        encoding = AffineEncoding(8, inputs)
        tensors = {
            "codes": torch.full((3, inputs), 255, dtype=torch.uint8),
            "scales": torch.ones(3, 1).half(),
            "zero_points": torch.zeros(3, 1, dtype=torch.uint8),
        }
        found = packed_linear(torch.ones(1, inputs), tensors, encoding, in_features=inputs)
        assert relative_error(found, torch.full((1, 3), 255.0 * inputs, dtype=torch.float64)) < DECODED_ERROR


def test_gradients_flow_through_few_tokens() -> None:
    encoding, tensors = packed(48, 64, 4, 32)
    tokens = rows(2, 64).requires_grad_(True)
    packed_linear(tokens, tensors, encoding, in_features=64).sum().backward()
    assert tokens.grad is not None
    assert torch.allclose(tokens.grad, encoding.dequantize(tensors, 64).sum(0).expand(2, -1), rtol=1e-4, atol=1e-3)


def test_shapes_dtypes_and_a_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    encoding, tensors = packed(300, 16384, 3, 128)  # more than one tile is decoded
    tokens = rows(40, 16384).view(2, 20, 16384)
    expected = reference(tokens, encoding, tensors)
    device = torch.device("cpu")
    for count in (1, 20):
        some = tokens[:, :count]
        found = packed_linear(some, tensors, encoding, in_features=16384)
        assert found.shape == (2, count, 300) and found.dtype == torch.float32
        half = packed_linear(some.bfloat16(), tensors, encoding, in_features=16384)
        assert half.dtype == torch.bfloat16 and relative_error(half, expected[:, :count]) < 0.02
    monkeypatch.setattr(native, "library", lambda: None)
    assert path_names([encoding], device) == "none, torch serves"
    assert relative_error(packed_linear(tokens, tensors, encoding, in_features=16384), expected) < DECODED_ERROR


@needs_library
def test_what_multiplies_is_named_by_kind() -> None:
    device = torch.device("cpu")
    affine, trellis = affine_for(2, 64), trellis_for(2, 64)
    assert path_names([affine], device) == PATHS[best_path()]
    assert path_names([], device) == ""
    both = path_names([affine, trellis, affine], device)
    assert both == f"trellis codes: {path_names([trellis], device)}; affine grids: {PATHS[best_path()]}"
    assert path_names([affine], torch.device("cuda")) == "decoded, then torch"


def mixtral_block() -> Any:
    config = MixtralConfig(hidden_size=48, intermediate_size=96, num_local_experts=6, num_experts_per_tok=2)
    config._experts_implementation = experts.IMPLEMENTATION
    return MixtralExperts(config)


def gpt_oss_block() -> Any:
    config = GptOssConfig(hidden_size=48, intermediate_size=96, num_local_experts=6, num_experts_per_tok=2)
    config._experts_implementation = experts.IMPLEMENTATION
    return GptOssExperts(config)


@needs_library
@pytest.mark.parametrize("make", [mixtral_block, gpt_oss_block])
def test_few_tokens_of_a_block_take_one_call_or_two_and_agree_with_one_expert_after_the_other(
    make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    block = make()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    shapes = {part.name: (part.out_features, part.in_features) for part in experts.projections_of(block)}
    widths = (1, 2, 3, None, 4, 8)
    keys = {
        name: tuple(bits and affine_for(bits, inputs, group_size_limit=48).key for bits in widths)
        for name, (_, inputs) in shapes.items()
    }
    layout = ExpertLayout.of_whole("experts", shapes, keys)
    for parameter in pack_experts(block, layout, dtype=torch.float32):
        stored = block.get_parameter(parameter)
        if stored.dtype == torch.uint8:
            stored.data = torch.randint(0, 256, stored.shape, dtype=torch.uint8)
        else:
            stored.data = torch.empty(stored.shape).uniform_(0.01, 0.1).to(stored.dtype)
    hidden = torch.randn(5, 48)
    chosen = torch.tensor([[0, 5], [2, 1], [3, 4], [1, 6], [4, 2]])  # 3 is not there, 6 stands for none
    weights = torch.rand(5, 2)
    with torch.inference_mode():
        found = experts.experts_forward(block, hidden, chosen, weights)
        assert expert_banks.banks_of(block) is not None
        monkeypatch.setattr(
            expert_banks, "_HIDDEN_BYTES", 4 * 2 * 2 * shapes["gate_up_proj"][0]
        )  # two tokens at a time
        assert torch.equal(experts.experts_forward(block, hidden, chosen, weights), found)
        monkeypatch.setattr(kernels, "runs_packed", lambda rows, encoding: False)
        expected = experts.experts_forward(block, hidden, chosen, weights)
    assert relative_error(found, expected.double()) < 10 * LARGEST_ERROR
