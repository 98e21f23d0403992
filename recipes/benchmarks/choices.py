"""Measures the cost of other choices of experts: a packed model as it is, and with the original's choices.

Where the packed model's routers choose as the original's do, nothing is changed. Where they do not, the experts that
they add are replaced by those that they miss, at the weights of the ones replaced: they were nearly level. The rest of
the divergence is what derivatives see. Work folders are those of `mc-cli run`, or of calibrate to quantize.

    python recipes/benchmarks/choices.py --heldout FOLDER runs/a runs/b
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from mc_cli.artifacts import calibration
from mc_cli.artifacts.evaluation import TextResult
from mc_cli.artifacts.store import STAGE_FOLDERS
from mc_cli.measuring.comparison import advance, changed_share, losses
from mc_cli.models.experts import IMPLEMENTATION
from mc_cli.models.session import later_session
from mc_cli.packed.packed_model import PackedSource
from mc_cli.settings import EvaluateSettings, RunSettings
from mc_cli.stages.prune_eval import heldout_windows
from mc_cli.walking.layerwise import LayerWalk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work_dirs", type=Path, nargs="+")
    parser.add_argument("--heldout", default="bundled:heldout")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--max-windows", type=int, default=256, help="evenly over the domains; 0 = all")
    given = parser.parse_args()
    table = Table(title="Packed model, and the same with the original's choices of experts")
    for name in ("work folder", "choices", "gap, nats/token", "KL, nats/token", "other experts by layer, %"):
        table.add_column(name, justify="left" if name == "work folder" else "right")
    for work_dir in given.work_dirs:
        own, forced, changes = measure(work_dir, given)
        shares = " ".join(f"{100 * share:.2f}" for share in changes)
        for name, found, others in (("its own", own, shares), ("the original's", forced, "")):
            gap = found.packed_loss - found.original_loss
            table.add_row(str(work_dir), name, f"{gap:.5f}", f"{found.kl_divergence:.5f}", others)
    Console(width=140).print(table)


def measure(work_dir: Path, given: argparse.Namespace) -> tuple[TextResult, TextResult, list[float]]:
    """(losses of the packed model in `work_dir`, with the original's choices, share of other experts by MoE layer)."""
    session = later_session(work_dir, RunSettings())
    inventory = calibration.read_inventory(work_dir / STAGE_FOLDERS["calibrate"] / calibration.INVENTORY)
    blocks = {block.layer: block for block in inventory.expert_blocks}
    settings = EvaluateSettings(data=given.heldout, length=given.length, max_sequences=given.max_windows)
    windows = heldout_windows(settings, session)
    checkpoint = session.open_checkpoint()
    checkpoint.model.set_experts_implementation(IMPLEMENTATION)
    source = PackedSource(work_dir / STAGE_FOLDERS["quantize"], dtype=session.dtype, device=session.device)
    batch_size = session.batch_size(windows.batch.length)
    original, own = (LayerWalk(each, windows.batch, batch_size=batch_size) for each in (checkpoint, source))
    forced = own.twin()
    changes = []
    for layer in range(original.num_layers):
        block = blocks.get(layer)
        chosen, found = advance(original, block, layer), advance(own, block, layer)
        if block is None or chosen is None or found is None:
            advance(forced, block, layer)
            continue
        changes.append(changed_share(chosen, found))
        with choosing(source.model.get_submodule(block.path), chosen):
            advance(forced, block, layer)
    return losses(original, own, windows)[0], losses(original, forced, windows)[0], changes


@contextmanager
def choosing(experts: nn.Module, wanted: Tensor) -> Iterator[None]:
    """Context in which these experts are called with the choices `wanted` [tokens, k], in the order of the tokens."""
    done = 0

    def choose(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal done
        hidden, index, *rest = args
        here = wanted[done : done + index.numel() // index.shape[-1]].to(index.device)
        done += len(here)
        return hidden, replaced(index.reshape(here.shape), here).view_as(index), *rest

    handle = experts.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        handle.remove()


def replaced(index: Tensor, wanted: Tensor) -> Tensor:
    """`index` [tokens, k] with the experts that `wanted` does not have replaced by those that it has instead."""
    extra, missing = ~_within(index, wanted), ~_within(wanted, index)
    places, others = (torch.argsort(mask.int(), dim=-1, descending=True, stable=True) for mask in (extra, missing))
    is_extra = extra.gather(1, places)
    chosen = torch.where(is_extra, wanted.gather(1, others), index.gather(1, places))
    return torch.empty_like(index).scatter_(1, places, chosen)


def _within(one: Tensor, other: Tensor) -> Tensor:
    return (one[:, :, None] == other[:, None, :]).any(-1)


if __name__ == "__main__":
    main()
