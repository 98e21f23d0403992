"""Jobs on a Ray cluster of two nodes on this machine. Run by `make test-ray`, where ray is installed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mc_cli.bundled import bundled_path
from mc_cli.errors import ExtensionError, McError
from mc_cli.executors.here import Here
from mc_cli.executors.on_ray import OnRay
from mc_cli.quantizers.rtn import RoundToNearest
from tests.executors.jobs import Dying, Failing, equal, jobs
from tests.packed_folders import packed_work_dir
from tests.tiny_chain import run_export

ray = pytest.importorskip("ray")
cluster_utils = pytest.importorskip("ray.cluster_utils")


@pytest.fixture(scope="module")
def cluster() -> Iterator[OnRay]:
    """Two nodes with one processor each."""
    root = str(Path(__file__).parents[2])
    os.environ["PYTHONPATH"] = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    nodes = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    ray.init(address=nodes.address, log_to_driver=False, logging_level="error")
    torch.set_num_threads(1)
    with OnRay("ray", threads=1) as executor:
        yield executor
    ray.shutdown()
    nodes.shutdown()


def test_results_are_those_of_this_process_and_in_order(cluster: OnRay) -> None:
    assert sum(node["Alive"] for node in ray.nodes()) == 2
    wanted, found = list(Here().map(jobs())), list(cluster.map(jobs()))
    assert len(found) == 6 and all(map(equal, found, wanted))


def test_a_worker_that_is_killed_costs_its_job(cluster: OnRay, tmp_path: Path) -> None:
    marker = tmp_path / "killed"
    found = list(cluster.map(jobs(4, quantizer=Dying(str(marker)))))
    wanted = list(Here().map(jobs(4, quantizer=RoundToNearest(clip_search=False))))
    assert marker.read_text().isdigit()
    assert all(map(equal, found, wanted))


def test_actors_load_packed_models_with_nothing_imported(cluster: OnRay, tmp_path: Path) -> None:
    """The installation's own hook tells transformers of the format in Ray's processes too."""
    work = packed_work_dir(bundled_path("demo-moe"), tmp_path / "work", widths=(3, 4))
    folder = str(run_export(work, tmp_path / "out", "transformers").folder)

    class Loader:
        def loaded(self, folder: str) -> tuple[bool, str, list[float]]:
            import sys

            import torch
            from transformers import AutoModelForCausalLM

            imported = any(name.startswith("mc_cli.") for name in sys.modules)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            logits = model(torch.arange(3, 11)[None]).logits[0, -1]
            return imported, type(model.hf_quantizer).__module__, logits.tolist()

    imported, quantizer, logits = ray.get(ray.remote(num_cpus=1)(Loader).remote().loaded.remote(folder))
    assert not imported and quantizer.startswith("mc_cli.")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    here = model(torch.arange(3, 11)[None]).logits[0, -1]
    torch.testing.assert_close(torch.tensor(logits), here, rtol=1e-4, atol=1e-4)


def test_errors_come_home(cluster: OnRay) -> None:
    with pytest.raises(ExtensionError, match=r"^these weights are refused$"):
        list(cluster.map(jobs(1, quantizer=Failing(ours=True))))


def test_a_cluster_that_is_not_there_is_told(cluster: OnRay) -> None:
    assert ray.is_initialized()  # the driver has one cluster at a time: another address is not even tried
    executor = OnRay("ray://nowhere.invalid:1", threads=1)
    executor._ray = ray
    with pytest.raises(McError, match="no Ray cluster is to be had"):
        executor._connect()
