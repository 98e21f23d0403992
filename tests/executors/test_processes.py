"""Jobs in processes of this machine: the same bytes as here, whatever their number, and whoever of them dies."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mc_cli.artifacts.manifest import Manifest
from mc_cli.artifacts.work_dir import WorkDir
from mc_cli.errors import ExtensionError, InputError, McError, MissingDependencyError
from mc_cli.executors import executor_for
from mc_cli.executors.here import Here
from mc_cli.executors.parcels import packed, unpacked
from mc_cli.executors.processes import Processes
from mc_cli.progress import SilentProgress
from mc_cli.quantizers.rtn import RoundToNearest
from mc_cli.settings import QuantizeSettings, RunSettings
from mc_cli.stages import quantize
from tests.conftest import ScoredWork
from tests.executors.jobs import Dying, Failing, equal, jobs
from tests.stage_process import start_server
from tests.tiny_chain import run_allocate, run_quantize


@pytest.fixture(scope="module", autouse=True)
def server() -> None:
    """The one that other tests' processes are forked from as well."""
    start_server()


@pytest.fixture(scope="module")
def two() -> Iterator[Processes]:
    with Processes(2, threads=1) as processes:
        yield processes


def test_results_are_those_of_this_process_and_in_order(two: Processes) -> None:
    torch.set_num_threads(1)
    wanted, found = list(Here().map(jobs())), list(two.map(jobs()))
    assert len(found) == len(wanted) == 6
    assert all(map(equal, found, wanted))
    assert found[3].tensors == {}  # a forecast


def test_a_consumer_may_stop_after_the_last_result(two: Processes) -> None:
    results = two.map(jobs(2))
    assert next(results).units[0].layer == 0 and next(results).units[0].layer == 1
    assert [coded.units[0].layer for coded in two.map(jobs(3))] == [0, 1, 2]


def test_jobs_are_drawn_a_few_at_a_time(two: Processes) -> None:
    drawn: list[int] = []

    def counted():
        for number, job in enumerate(jobs(30)):
            drawn.append(number)
            yield job

    results = two.map(counted())
    next(results)
    assert len(drawn) <= 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.float16])
def test_tensors_travel_as_they_are(dtype: torch.dtype) -> None:
    tensor = torch.arange(24).view(2, 3, 4).to(dtype)[:, 1:]
    moved = unpacked(packed({"some": [tensor]}))["some"][0]
    assert moved.dtype == dtype and torch.equal(moved, tensor)
    moved += 1  # it can be written to


def test_a_process_that_dies_costs_its_job(tmp_path: Path) -> None:
    marker = tmp_path / "killed"
    with Processes(2, threads=1) as processes:
        found = list(processes.map(jobs(4, quantizer=Dying(str(marker)))))
    wanted = list(Here().map(jobs(4, quantizer=RoundToNearest(clip_search=False))))
    assert marker.read_text().isdigit()
    assert all(map(equal, found, wanted))


def test_a_job_over_which_every_process_dies_ends_the_stage(tmp_path: Path) -> None:
    with (
        Processes(1, threads=1) as processes,
        pytest.raises(McError, match="3 processes have died over one coding job"),
    ):
        list(processes.map(jobs(2, quantizer=Dying(str(tmp_path / "killed"), always=True))))


def test_errors_come_home(two: Processes) -> None:
    with pytest.raises(ExtensionError, match=r"^these weights are refused$"):
        list(two.map(jobs(1, quantizer=Failing(ours=True))))
    with pytest.raises(RuntimeError, match="ValueError: a defect"):
        list(two.map(jobs(1, quantizer=Failing(ours=False))))


@pytest.mark.parametrize("workers", ["0", "-1", "2000", "many", "ray://", "ray://head", "http://head:1"])
def test_what_names_no_workers_is_refused(workers: str) -> None:
    with pytest.raises(InputError, match="--workers"):
        RunSettings(workers=workers)


def test_workers_beside_a_gpu_are_refused() -> None:
    with pytest.raises(InputError, match="--device cpu"), executor_for(RunSettings(workers="2"), torch.device("cuda")):
        pass


def test_packed_files_are_the_same_with_any_number_of_workers(scored_work: ScoredWork, tmp_path: Path) -> None:
    """And the threads of a job are among the settings that a packed model was made with; their number is not."""
    torch.set_num_threads(1)
    scored_work(tmp_path, "mixtral", bits=(2, 3))
    digests = []
    for variant, workers in (("main", ""), ("one", "1"), ("two", "2")):
        run_allocate(tmp_path / "work", variant=variant, target_stored_bits=3.0)
        work = WorkDir(tmp_path / "work", variant)
        if workers:
            compute = RunSettings(device="cpu", batch_tokens=96, workers=workers)
            settings = QuantizeSettings()
            quantize.run(settings, compute, work.path, variant=variant, force=False, progress=SilentProgress())
        else:
            run_quantize(work.path, variant=variant)
        manifest = Manifest.read(work.folder("quantize"))
        assert manifest is not None and ("job_threads" in manifest.settings) == bool(workers)
        digests.append({name: facts["sha256"] for name, facts in manifest.outputs.items()})
    assert digests[0] == digests[1] == digests[2]


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(MissingDependencyError, match=r"mixture-compressor\[ray\]"),
        executor_for(RunSettings(workers="ray"), torch.device("cpu")),
    ):
        pass
