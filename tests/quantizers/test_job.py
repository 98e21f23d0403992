"""The unit of work: pure, picklable, and the same codes wherever and beside whatever it runs."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mc_cli.encodings import encoding_for
from mc_cli.errors import ExtensionError
from mc_cli.executors.here import Here
from mc_cli.numerics.hessian import trace_error
from mc_cli.parts import UnitId
from mc_cli.quantizers import QuantizedLinear, quantizer_from_name
from mc_cli.quantizers.job import Coded, CodingJob, InputMoments, code
from tests.stage_process import run_script

OUT, IN = 64, 32
FAMILIES = {"trellis": "trellis", "gptq": "affine", "rtn": "affine"}


def job_of(name: str, *, units: int = 2, bits: float = 2, shared: bool = False) -> CodingJob:
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn(units, OUT, IN, generator=generator)
    inputs = torch.randn(1 if shared else units, 200, IN, generator=generator)
    encoding = encoding_for(FAMILIES[name], bits, OUT, IN, group_size_limit=32)
    addresses = tuple(UnitId(3, expert, "down_proj") for expert in range(units))
    return CodingJob(addresses, weights, InputMoments(inputs.mT @ inputs), encoding, quantizer_from_name(name))


def equal(one: Coded, other: Coded) -> bool:
    assert one.tensors.keys() == other.tensors.keys()
    return (
        torch.equal(one.decoded, other.decoded)
        and all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
        and (one.units, one.encoding, one.proxy_loss, one.weight_energy, one.notes)
        == (other.units, other.encoding, other.proxy_loss, other.weight_energy, other.notes)
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_losses_are_those_of_what_the_codes_stand_for(name: str) -> None:
    job = job_of(name)
    before = job.weights.clone()
    coded = code(job)
    assert torch.equal(job.weights, before)
    assert torch.equal(coded.decoded, job.encoding.dequantize(coded.tensors, IN))
    for slot in range(2):
        hessian = job.inputs.of(slot).double()
        for found, matrix in (
            (coded.proxy_loss[slot], job.weights[slot] - coded.decoded[slot]),
            (coded.weight_energy[slot], job.weights[slot]),
        ):
            assert found == pytest.approx(float(trace_error(matrix[None].double(), hessian)), rel=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_job_gives_the_same_codes_in_another_process(name: str, tmp_path: Path) -> None:
    job = job_of(name)
    torch.set_num_threads(1)
    (tmp_path / "job").write_bytes(pickle.dumps(job))
    script = (
        "import pickle, sys; from pathlib import Path; from mc_cli.quantizers.job import code\n"
        "folder = Path(sys.argv[1])\n"
        "coded = code(pickle.loads((folder / 'job').read_bytes()))\n"
        "(folder / 'coded').write_bytes(pickle.dumps(coded))"
    )
    done = run_script(script, tmp_path, ["script", str(tmp_path)])
    assert done.status == 0, done.err
    assert equal(code(job), pickle.loads((tmp_path / "coded").read_bytes()))


@pytest.mark.parametrize("name", FAMILIES)
def test_what_ran_before_on_the_same_moments_changes_nothing(name: str) -> None:
    job = job_of(name, bits=3)
    alone = code(replace(job, inputs=InputMoments(job.inputs.hessian)))
    jobs = [job_of(name, bits=2), job, replace(job, forecast=True), job]
    results = list(Here().map(replace(each, inputs=job.inputs) for each in jobs))
    assert equal(results[1], alone) and equal(results[3], alone)
    assert results[2].tensors == {} and results[2].proxy_loss == ()


def test_moments_are_factorized_once_and_only_they_travel() -> None:
    job = job_of("gptq")
    prepared = job.inputs.prepared(job.quantizer, job.encoding.basis)
    assert job.inputs.prepared(job.quantizer, job.encoding.basis) is prepared
    assert job.inputs.prepared(quantizer_from_name("gptq", damping=0.1), job.encoding.basis) is not prepared
    moved = pickle.loads(pickle.dumps(job.inputs))
    assert torch.equal(moved.hessian, job.inputs.hessian)
    assert len(pickle.dumps(job.inputs)) < 1.1 * job.inputs.hessian.numel() * 4 + 2000


def test_a_matrix_is_coded_alike_alone_and_in_a_stack() -> None:
    job = job_of("rtn", units=3, shared=True)
    stacked = code(job)
    for slot in range(3):
        alone = code(replace(job, units=job.units[slot : slot + 1], weights=job.weights[slot : slot + 1]))
        assert torch.equal(alone.decoded[0], stacked.decoded[slot])


def test_jobs_are_drawn_when_their_results_are_asked_for() -> None:
    drawn: list[int] = []

    def jobs():
        for number in range(3):
            drawn.append(number)
            yield job_of("rtn")

    results = Here().map(jobs())
    assert drawn == []
    next(results)
    assert drawn == [0]


def test_units_order_by_layer_expert_projection_and_block() -> None:
    units = [UnitId(1, 0, "up_proj"), UnitId(0, 3, "down_proj", 1), UnitId(0, 3, "down_proj")]
    assert [str(unit) for unit in sorted(units)] == [
        "layers.0.experts.3.down_proj",
        "layers.0.experts.3.down_proj.1",
        "layers.1.experts.0.up_proj",
    ]


class Meddling:
    """Round to nearest, with something done to what comes out."""

    name = "meddling"

    def __init__(self, change: str) -> None:
        self.change, self.inner = change, quantizer_from_name("rtn")

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def quantize(self, *arguments: object, **options: object) -> QuantizedLinear:
        made = self.inner.quantize(*arguments, **options)  # type: ignore[arg-type]
        scales = made.tensors["scales"]
        changed = {"dtype": scales.float(), "shape": scales[..., :-1, :], "nan": scales * float("nan")}[self.change]
        return replace(made, tensors={**made.tensors, "scales": changed})

    def forecast(self, weight: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
        return weight.mT


@pytest.mark.parametrize(
    ("change", "said"),
    [("dtype", "scales: torch.float32, stored as torch.float16"), ("shape", "stored as"), ("nan", "NaN or infinite")],
)
def test_what_a_quantizer_must_not_give_is_refused(change: str, said: str) -> None:
    job = replace(job_of("rtn"), quantizer=Meddling(change))
    with pytest.raises(ExtensionError, match=said):
        code(job)
    with pytest.raises(ExtensionError, match="`forecast` of quantizer meddling"):
        code(replace(job, forecast=True))
