"""Quantizes one work directory by several executors: the same bytes, and how long each takes.

The work directory has been through allocate (`mc-cli allocate`), and is copied for each executor. `ray` is a cluster of
two nodes with one processor each on this machine; with --kill one of its workers is killed as soon as it is at a job,
once. Digests of all packed tensors are compared with those of the first executor; the exit status is 1 where they
differ. Prints a row per executor, and writes all figures as JSON.

    python recipes/benchmarks/on_workers.py --work-dir runs/x --workers 1 2 ray --kill --out workers.json
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

_PACKED = "packed"
_WAIT_S = 0.2


def main() -> None:
    arguments = parse()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="mc-workers-") as folder:
        for workers in arguments.workers:
            work_dir = Path(folder) / workers
            shutil.copytree(arguments.work_dir, work_dir, ignore=shutil.ignore_patterns(_PACKED, "evaluation"))
            with cluster() if workers == "ray" else contextlib.nullcontext():
                rows.append({"workers": workers, **quantize(work_dir, workers, arguments)})
            shutil.rmtree(work_dir)
    for row in rows:
        row["same"] = row["digest"] == rows[0]["digest"]
    if arguments.out:
        arguments.out.write_text(json.dumps({"rows": rows, "command": " ".join(sys.argv[1:])}, indent=1) + "\n")
    show(rows)
    if not all(row["same"] for row in rows):
        sys.exit("not all executors made the same bytes")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True, help="after allocate")
    parser.add_argument("--workers", nargs="+", default=["1", "2", "ray"])
    parser.add_argument("--plan", type=Path, help="a plan in place of allocate's")
    parser.add_argument("--kill", action="store_true", help="one of Ray's workers while it codes")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser.parse_args()


@contextlib.contextmanager
def cluster() -> Iterator[None]:
    """Two nodes on this machine, which `--workers ray` finds."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    os.environ["RAY_ADDRESS"] = nodes.address
    try:
        yield
    finally:
        del os.environ["RAY_ADDRESS"]
        nodes.shutdown()


def quantize(work_dir: Path, workers: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the stage in a process of its own; seconds, what was killed, and a digest of what it packed."""
    command = [sys.executable, "-m", "mc_cli", "quantize", "-w", str(work_dir), "--workers", workers]
    command += ["--job-threads", "1", *(("--plan", str(arguments.plan)) if arguments.plan else ())]
    begun = time.monotonic()
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    killed = kill_a_worker(running) if workers == "ray" and arguments.kill else 0
    if running.wait():
        sys.exit(f"quantize --workers {workers} ended with {running.returncode}")
    return {"seconds": time.monotonic() - begun, "killed": killed, "digest": digest(work_dir / _PACKED)}


def kill_a_worker(running: subprocess.Popen[bytes]) -> int:
    """Kills one process that runs a job of ours for Ray, as soon as there is one; its number, 0 where none came."""
    while running.poll() is None:
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (place / "cmdline").read_bytes().startswith(b"ray::_coded"):
                    os.kill(int(place.name), signal.SIGKILL)
                    return int(place.name)
        time.sleep(_WAIT_S)
    return 0


def digest(packed: Path) -> str:
    """One digest over names and bytes of all packed files."""
    found = hashlib.sha256()
    for path in sorted(packed.glob("*.safetensors")):
        found.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="quantize by executors")
    for name in ("workers", "seconds", "over the first", "worker killed", "same bytes"):
        table.add_column(name, justify="right")
    for row in rows:
        ratio = rows[0]["seconds"] / row["seconds"]
        cells = (row["workers"], f"{row['seconds']:.1f}", f"{ratio:.2f} x", str(bool(row["killed"])), str(row["same"]))
        table.add_row(*cells)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
