"""The speed of this machine, measured once in some seconds and kept for later estimates.

The rates are those of what the stages do: products in float32, functions of single numbers, factorizations in float64,
the quantizers' searches, reading memory, products with packed weights, writing to disk. Measured for the threads that
torch takes here.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mc_cli.artifacts.fields import read_as, reading
from mc_cli.artifacts.files import read_json, write_json
from mc_cli.errors import ArtifactError
from mc_cli.registry import QUANTIZERS

if TYPE_CHECKING:
    import torch

SCHEMA = 4
_SIDE = 1024  # of the matrices that are multiplied, factorized and searched
_NO_SEARCH = "gptq"  # quantizers that are not probed take as long: errors are fed back, and nothing is searched
_CODED, _FORECAST = 256, 2048  # outputs of a matrix; a forecast has work that does not grow with them
_WRITTEN = 64 << 20
_LEAST_S = 0.25  # a measurement is repeated until it has taken so long


@dataclass(frozen=True)
class Machine:
    """Rates of one machine. Times in seconds, rates per second; `threads`: of torch while they were measured."""

    name: str
    threads: int
    when: str
    product_flops: float  # float32, large matrices
    factor_flops: float  # float64 Cholesky and triangular solve, as of in_features^3
    moved_bytes: float  # read and written by functions of single numbers
    coding: dict[str, list[float]]  # quantizer -> seconds per weight of coding, of forecasting; means over widths
    reading_bytes: float
    packed_bytes: float  # codes that products with one token go through
    disk_bytes: float  # written and flushed
    schema: int = SCHEMA

    def plain(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def coding_s(self, quantizer: str) -> float:
        """Seconds per weight of choosing codes, products of error feedback in matrices of the probe's size included."""
        return self.coding.get(quantizer, self.coding[_NO_SEARCH])[0]

    def forecast_s(self, quantizer: str) -> float:
        """Seconds per weight of forecasting what coding does to a matrix, likewise."""
        return self.coding.get(quantizer, self.coding[_NO_SEARCH])[1]


def _probed() -> dict[str, tuple[float, ...]]:
    """Quantizer -> the widths at which it is timed, of those that ask for it."""
    facts = {name: QUANTIZERS.fact(module, "PROBED") for name, module in QUANTIZERS.modules.items()}
    return {name: widths for name, widths in facts.items() if widths}


def place_of_measurements() -> Path:
    """The file that keeps measurements: in XDG_CACHE_HOME, by default ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "mc-cli" / "machine.json"


def known_machine() -> Machine | None:
    """Reads the rates measured here before with as many threads; None where none were, or on another machine."""
    import torch

    path = place_of_measurements()
    if not path.is_file():
        return None
    try:
        with reading(path, "a measurement of this machine", "Delete it and run mc-cli estimate --probe."):
            found: Machine = read_as(Machine, read_json(path))
    except ArtifactError:  # a memory only: `--probe` makes it anew
        return None
    whole = (
        found.schema == SCHEMA
        and found.coding.keys() == _probed().keys()
        and set(map(len, found.coding.values())) == {2}
    )
    same = whole and found.name == _name() and found.threads == torch.get_num_threads()
    return found if same else None


def probe() -> Machine:
    """Measures this machine and keeps what it finds."""
    import torch

    from mc_cli.measuring.speed import reading_rate
    from mc_cli.numerics.products import fast_float32_products

    generator = torch.Generator().manual_seed(0)
    with fast_float32_products():  # as the stages compute
        product_flops, coding = _product_flops(generator), _coding_seconds(generator)
    machine = Machine(
        name=_name(),
        threads=torch.get_num_threads(),
        when=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        product_flops=product_flops,
        factor_flops=_factor_flops(generator),
        moved_bytes=_moved_rate(generator),
        coding=coding,
        reading_bytes=reading_rate(repeats=3),
        packed_bytes=_packed_rate(generator),
        disk_bytes=_disk_rate(),
    )
    path = place_of_measurements()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, machine.plain())
    return machine


def _name() -> str:
    return f"{platform.node()} {platform.machine()} {os.cpu_count()}"


def _seconds(work: Callable[[], Any]) -> float:
    """Times a call: the fastest of as many as take _LEAST_S together, two at least; the first one is not counted.

    Processor time of a thread counts where it is less than the time that passed: what else runs just now on the machine
    would else be in every estimate to come.
    """
    import torch

    work()
    best, begun = float("inf"), time.perf_counter()
    tries = 0
    while tries < 2 or time.perf_counter() - begun < _LEAST_S:
        started, computed = time.perf_counter(), time.process_time()
        work()
        passed, own = time.perf_counter() - started, (time.process_time() - computed) / torch.get_num_threads()
        best, tries = min(best, passed, own), tries + 1
    return best


def _product_flops(generator: torch.Generator) -> float:
    import torch

    left, right = (torch.randn(_SIDE, _SIDE, generator=generator) for _ in range(2))
    return 2.0 * _SIDE**3 / _seconds(lambda: left @ right)


def _factor_flops(generator: torch.Generator) -> float:
    from mc_cli.numerics.hessian import inverse_cholesky

    hessian = _hessian(generator)
    return float(_SIDE**3) / _seconds(lambda: inverse_cholesky(hessian, damping=0.01))


def _hessian(generator: torch.Generator) -> torch.Tensor:
    import torch

    rows = torch.randn(2 * _SIDE, _SIDE, generator=generator)
    return (rows.T @ rows)[None]


def _moved_rate(generator: torch.Generator) -> float:
    """Bytes read and written per second by a product of numbers one by one, its result new memory as in a forward."""
    import torch

    left, right = (torch.randn(8 * _SIDE, _SIDE, generator=generator) for _ in range(2))
    return 3.0 * left.nbytes / _seconds(lambda: left * right)


def _coding_seconds(generator: torch.Generator) -> dict[str, list[float]]:
    """Quantizer -> seconds per weight of coding, and of forecasting."""
    import torch

    from mc_cli.coding.quantization import quantizer_for
    from mc_cli.encodings import encoding_for
    from mc_cli.quantizers.job import CodingJob, InputMoments, code
    from mc_cli.settings import QuantizerSettings

    found = {}
    for name, widths in _probed().items():
        settings = QuantizerSettings(quantizer=name)
        quantizer, moments = quantizer_for(settings), InputMoments(_hessian(generator))
        seconds = []
        for forecast, outputs in ((False, _CODED), (True, _FORECAST)):
            weights = torch.randn(1, outputs, _SIDE, generator=generator)
            of_widths = []
            for bits in widths:
                encoding = encoding_for(settings.family, bits, outputs, _SIDE)
                moments.prepared(quantizer, encoding.basis)
                job = CodingJob(("probe",), weights, moments, encoding, quantizer, forecast=forecast)
                of_widths.append(_seconds(lambda job=job: code(job)) / weights.numel())  # type: ignore[misc]
            seconds.append(sum(of_widths) / len(widths))
        found[name] = seconds
    return found


def _packed_rate(generator: torch.Generator) -> float:
    """Bytes of codes per second of a product with one token, weights larger than caches mostly are."""
    import torch

    from mc_cli.encodings import encoding_for, stored_bytes
    from mc_cli.kernels import packed_linear

    encoding = encoding_for("trellis", 2.0, 4096, 4096)
    specs = encoding.tensor_specs(4096, 4096)
    copies = [
        {
            name: torch.randint(0, 255, spec.shape, dtype=torch.uint8, generator=generator)
            if spec.dtype == "uint8"
            else torch.ones(spec.shape, dtype=getattr(torch, spec.dtype))
            for name, spec in specs.items()
        }
        for _ in range(8)
    ]
    token = torch.randn(1, 4096, generator=generator)
    size = len(copies) * stored_bytes(encoding, 4096, 4096)
    return size / _seconds(lambda: [packed_linear(token, parts, encoding, in_features=4096) for parts in copies])


def _disk_rate() -> float:
    """Bytes per second that are written and flushed where measurements are kept."""
    place = place_of_measurements().parent
    place.mkdir(parents=True, exist_ok=True)
    path = place / "probe.partial"
    begun = time.perf_counter()
    try:
        with path.open("wb") as file:
            file.write(os.urandom(1 << 20) * (_WRITTEN >> 20))
            file.flush()
            os.fsync(file.fileno())
    finally:
        path.unlink(missing_ok=True)
    return _WRITTEN / (time.perf_counter() - begun)
