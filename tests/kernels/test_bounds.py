"""Products read nothing behind the end of what is stored: codes end where a page that must not be read begins."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mc_cli import native
from tests.stage_process import run_script

PROGRAM = """
import ctypes
import mmap
import sys

import torch

from mc_cli.encodings.affine import AffineEncoding
from mc_cli.encodings.trellis import trellis_for
from mc_cli.kernels import affine, trellis
from mc_cli.kernels.compiled import PATHS, best_path

mappings = []


def before_a_closed_page(tensor):
    page, size = mmap.PAGESIZE, tensor.nbytes
    mapping = mmap.mmap(-1, (-(-size // page) + 1) * page)
    mappings.append(mapping)
    end = ctypes.addressof(ctypes.c_char.from_buffer(mapping)) + len(mapping) - page
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(end), ctypes.c_size_t(page), 0) == 0, ctypes.get_errno()
    memory = (ctypes.c_uint8 * size).from_address(end - size)
    placed = torch.frombuffer(memory, dtype=torch.uint8)
    placed.copy_(tensor.reshape(-1).view(torch.uint8))
    return placed.view(tensor.dtype).view(tensor.shape)


def check(kernel, encoding, outputs, inputs):
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, spec in encoding.tensor_specs(outputs, inputs).items():
        values = torch.randint(0, 256, spec.shape, generator=generator)
        stored = values.to(torch.uint8) if spec.dtype == "uint8" else (values / 256 + 0.5).half()
        tensors[name] = before_a_closed_page(stored.contiguous())
    bank = kernel.Bank([(encoding, tensors, inputs)])
    exact = encoding.dequantize(tensors, inputs)
    for path in (path for path in PATHS if path <= best_path()):
        print(kernel.__name__, encoding.key, outputs, inputs, PATHS[path], flush=True)
        for tokens in (1, 3, 40):
            rows = torch.randn(tokens, inputs, generator=generator)
            found = bank.product(rows, path=path)
            assert torch.allclose(found, rows @ exact.T, atol=0.02 * float(found.abs().max()))


for outputs, inputs, group in ((33, 192, 64), (1, 48, 16), (5, 16, 16), (5, 40, 8), (16, 128, 128)):
    for bits in range(1, 9):
        check(affine, AffineEncoding(bits, group), outputs, inputs)
for outputs, inputs in ((33, 192), (16, 48), (272, 64)):
    for half in range(2, 11):
        check(trellis, trellis_for(half / 2, inputs), outputs, inputs)
"""


@pytest.mark.skipif(native.library() is None, reason="installed without a C compiler")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="closes pages as Linux does")
def test_nothing_is_read_behind_the_end(tmp_path: Path) -> None:
    done = run_script(PROGRAM, tmp_path)
    assert done.status == 0, f"{done.status} after {done.out.splitlines()[-1:]}: {done.err[-2000:]}"
