"""The contract of a family: a tiny random checkpoint of it through all stages, and both exports read back.

python -m tests.families.contract [FAMILY ...]           compares each outcome with mc_cli/families/table.json
python -m tests.families.contract --write [FAMILY ...]   writes the outcomes into it
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from safetensors import safe_open

from mc_cli.data.batches import Batch
from mc_cli.errors import McError
from mc_cli.families import TABLE, Outcome
from mc_cli.models.checkpoint import Checkpoint, read_config
from mc_cli.models.inventory import take_inventory
from mc_cli.models.model_class import model_class
from mc_cli.walking.layerwise import LayerWalk
from tests import tiny_chain
from tests.families.tiny_families import IMAGE_TEXT, TEXT, build_tiny_family

TOKENS = torch.randint(3, 290, (3, 12), generator=torch.Generator().manual_seed(7))
ROUNDING = 2e-5  # relative: sums in another order


def kind_of(family: str) -> str:
    """The family's inputs by the table."""
    return "image-text" if family in IMAGE_TEXT else "text"


def walked_logits(folder: Path, batch: Batch, *, batch_size: int = 2) -> torch.Tensor:
    """Logits of a checkpoint with one layer in memory."""
    config = read_config(folder)
    source = Checkpoint(folder, config, dtype=torch.float32, device=torch.device("cpu"))
    walk = LayerWalk(source, batch, batch_size=batch_size)
    for layer in range(walk.num_layers):
        source.load(layer)
        walk.run_layer(advance=True)
        source.free(layer)
    return torch.cat([walk.logits(rows) for rows in walk.batches()])


@torch.no_grad()
def whole_logits(folder: Path, batch: Batch) -> torch.Tensor:
    """Logits of the class that config.json names, loaded by transformers, row by row."""
    model = model_class(read_config(folder)).auto.from_pretrained(folder, dtype=torch.float32).eval()
    rows = [batch.select(slice(row, row + 1)) for row in range(batch.rows)]
    return torch.cat([model(**row, use_cache=False).logits for row in rows])


def relative(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Norm of the difference over the norm, per token."""
    return (found - expected).norm(dim=-1) / expected.norm(dim=-1)


def shapes(folder: Path) -> dict[str, list[int]]:
    """Stored key -> shape of a checkpoint."""
    found: dict[str, list[int]] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as handle:
            found |= {key: handle.get_slice(key).get_shape() for key in handle.keys()}  # noqa: SIM118
    return found


def through_all_stages(family: str, folder: Path) -> Outcome:
    """The family's outcome. Raises AssertionError where a result is wrong; a refusal of ours is an outcome."""
    model = build_tiny_family(family, folder / "model")
    data = tiny_chain.write_documents(folder / "text.jsonl", documents=40)
    held_out = tiny_chain.write_documents(folder / "held-out.jsonl", documents=4, offset=100)
    work = folder / "work"
    try:
        config = read_config(model)
        source = Checkpoint(model, config, dtype=torch.float32, device=torch.device("cpu"))
        take_inventory(source.model, stored_dtypes=source.stored_dtypes)
        off = relative(walked_logits(model, Batch.of_text(TOKENS)), whole_logits(model, Batch.of_text(TOKENS)))
        assert float(off.median()) < ROUNDING, f"{family}: layer by layer it is off by {float(off.median())}"
        tiny_chain.run_calibrate(work, model, data, sequences=4)
        tiny_chain.run_score(work, bits=(2, 4))
        tiny_chain.run_allocate(work, target_stored_bits=3.6)
        tiny_chain.run_quantize(work)
        tiny_chain.run_prune_eval(work, held_out)
        errors = []
        for format in ("transformers", "dense"):
            summary = tiny_chain.run_export(work, folder / format, format).summary
            errors.append(float(f"{summary['read_back']['logit_error_median']:.2g}"))
    except McError as error:
        reason = " ".join(str(error).split()).partition(" Contract-tested families")[0]
        return Outcome(family, kind_of(family), False, reason)
    coverage = json.loads((work / "packed" / "coverage.json").read_text(encoding="utf-8"))
    assert coverage["covered"] == 1.0, f"{family}: {coverage}"
    assert shapes(folder / "dense") == shapes(model), f"{family}: the dense export has other tensors than the source"
    return Outcome(family, kind_of(family), True, "", *errors)


def main() -> int:
    """Runs the families named, or all; 0 where every outcome is that of the table, or is written."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    names = [name for name in sys.argv[1:] if name != "--write"] or [*TEXT, *IMAGE_TEXT]
    wrong = 0
    for family in names:
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = asdict(through_all_stages(family, Path(folder)))
            except Exception as error:  # a defect: told, and the next family tried
                found = asdict(Outcome(family, kind_of(family), False, f"defect: {type(error).__name__}: {error}"))
        found["reason"] = found["reason"].replace(str(Path(folder)), "")
        print(family, "works" if found["works"] else found["reason"], flush=True)
        before = _table()
        if "--write" in sys.argv:
            _write({**before, family: found})
        elif before.get(family, {}).get("works") != found["works"]:
            wrong += 1
            print(f"  the table has: {before.get(family)}", flush=True)
    return 1 if wrong else 0


def _table() -> dict[str, dict[str, object]]:
    if not TABLE.exists():
        return {}
    return {entry["family"]: entry for entry in json.loads(TABLE.read_text(encoding="utf-8"))["families"]}


def _write(outcomes: dict[str, dict[str, object]]) -> None:
    entries = [outcomes[family] for family in (*TEXT, *IMAGE_TEXT) if family in outcomes]
    lines = ",\n".join(f"  {json.dumps(entry)}" for entry in entries)
    TABLE.write_text(f'{{"transformers": "{transformers.__version__}", "families": [\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
