"""The contract of a family: a tiny random checkpoint of it through all stages, and both exports read back.

Image-text families go through with rows of images and text. Experts and embeddings are packed, towers kept.

python -m tests.families.contract [FAMILY ...]           compares each outcome with mc_cli/families/table.json
python -m tests.families.contract --write [FAMILY ...]   writes the outcomes into it
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForImageTextToText

from mc_cli.data.batches import Batch
from mc_cli.data.text import fit_length
from mc_cli.errors import McError
from mc_cli.families import TABLE, Outcome
from mc_cli.measuring.logit_source import Walked
from mc_cli.models.checkpoint import Checkpoint, read_config
from mc_cli.models.inventory import take_inventory
from mc_cli.models.model_class import model_class
from mc_cli.packed.packed_model import PackedSource
from mc_cli.walking.layerwise import LayerWalk
from tests import tiny_chain
from tests.families.own_processors import OWN, give_processor, same_processor
from tests.families.tiny_families import IMAGE_TEXT, TEXT, build_tiny_family
from tests.families.tiny_processors import (
    SEEING,
    image_batch,
    other_pixels,
    rows_with_images,
    standing_in,
    write_image_rows,
)

TOKENS = torch.randint(3, 290, (3, 12), generator=torch.Generator().manual_seed(7))
ROUNDING = 2e-5  # relative: sums in another order
COARSE = 0.05  # relative, in bfloat16: a router may choose otherwise
TOLERANCES = {"transformers": 1e-4, "dense": 0.2}  # format -> relative error of the median token
CPU = torch.device("cpu")


def kind_of(family: str) -> str:
    """The family's inputs by the table."""
    return "image-text" if family in IMAGE_TEXT else "text"


def sees_images(family: str) -> bool:
    """Whether the contract test has a processor for the family, its own or a stand-in."""
    return family in SEEING or family in OWN


def walked_logits(
    folder: Path, batch: Batch, *, batch_size: int = 2, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Logits of a checkpoint with one layer in memory."""
    config = read_config(folder)
    source = Checkpoint(folder, config, dtype=dtype, device=CPU)
    walk = LayerWalk(source, batch, batch_size=batch_size)
    for layer in range(walk.num_layers):
        source.load(layer)
        walk.run_layer(advance=True)
        source.free(layer)
    return torch.cat([walk.logits(rows) for rows in walk.batches()])


def auto_class(folder: Path) -> Any:
    """The auto class that people load a checkpoint with: that for images, where transformers has the model there."""
    config = read_config(folder)
    seeing = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if seeing else model_class(config).auto


@torch.no_grad()
def whole_logits(folder: Path, batch: Batch, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Logits of a checkpoint as people load it, row by row."""
    model = auto_class(folder).from_pretrained(folder, dtype=dtype).eval()
    rows = [batch.select(slice(row, row + 1)).to(CPU, dtype) for row in range(batch.rows)]
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


@dataclass(frozen=True)
class Fed:
    """The inputs of a family in its contract test.

    data, held_out  files for calibrate and prune-eval
    batch           rows whose logits are compared
    length          of the longest row, for both stages; None: theirs
    """

    data: Path
    held_out: Path
    batch: Batch
    length: int | None = None

    @property
    def settings(self) -> dict[str, int]:
        """Settings of stages that read rows."""
        return {} if self.length is None else {"length": self.length}


def fed_with(family: str, model: Path, folder: Path) -> Fed:
    """Rows with images where the family has a processor or a stand-in, within which this is called; else text."""
    data, held_out = folder / "data.jsonl", folder / "held-out.jsonl"
    if not sees_images(family):
        tiny_chain.write_documents(data, documents=40)
        tiny_chain.write_documents(held_out, documents=4, offset=100)
        return Fed(data, held_out, Batch.of_text(TOKENS))
    write_image_rows(data, rows=4)
    write_image_rows(held_out, rows=4, offset=100)
    length = fit_length(0, read_config(model))
    return Fed(data, held_out, image_batch(model, held_out, rows=4), length)


def check_streaming(family: str, model: Path, batch: Batch) -> None:
    """Asserts that layer by layer the model computes what it computes whole, and that it sees what images show."""
    whole = whole_logits(model, batch)
    off = relative(walked_logits(model, batch), whole)
    assert float(off.median()) < ROUNDING, f"{family}: layer by layer it is off by {float(off.median())}"
    if sees_images(family):
        coarse = (logits(model, batch, dtype=torch.bfloat16).float() for logits in (walked_logits, whole_logits))
        off = relative(*coarse)
        assert float(off.median()) < COARSE, f"{family}: in bfloat16 it is off by {float(off.median())}"
        felt = relative(whole_logits(model, other_pixels(batch)), whole)
        told = [bool(row.max() > 0.01) for row in felt]
        assert told == rows_with_images(batch) and any(told), f"{family}: rows that other pixels change: {told}"


def logit_errors(work: Path, folder: Path, batch: Batch) -> list[float]:
    """Median relative errors of the packed and of the dense export: what read-back found, or more on the batch."""
    exact = Walked(PackedSource(work / "packed", dtype=torch.float32, device=CPU)).logits(batch)
    errors = []
    for format, tolerance in TOLERANCES.items():
        summary = tiny_chain.run_export(work, folder / format, format).summary
        off = float(relative(whole_logits(folder / format, batch), exact).median())
        assert off <= tolerance, f"{format}: logits of the rows are off by {off}"
        errors.append(float(f"{max(off, summary['read_back']['logit_error_median']):.2g}"))
    return errors


def through_all_stages(family: str, folder: Path) -> Outcome:
    """The family's outcome. Raises AssertionError where a result is wrong; a refusal of ours is an outcome.

    Image-text families are fed rows with images: all stages read them, and logits are compared given them.
    """
    model = build_tiny_family(family, folder / "model")
    work = folder / "work"
    if family in OWN:
        give_processor(family, model)
    with standing_in(family):
        try:
            config = read_config(model)
            source = Checkpoint(model, config, dtype=torch.float32, device=CPU)
            take_inventory(source.model, stored_dtypes=source.stored_dtypes)
            fed = fed_with(family, model, folder)
            check_streaming(family, model, fed.batch)
            tiny_chain.run_calibrate(work, model, fed.data, sequences=4, **fed.settings)
            tiny_chain.run_score(work, bits=(2, 4))
            tiny_chain.run_allocate(work, target_stored_bits=3.6, embedding_bits=4)
            tiny_chain.run_quantize(work)
            tiny_chain.run_prune_eval(work, fed.held_out, **fed.settings)
            errors = logit_errors(work, folder, fed.batch)
        except McError as error:
            reason = " ".join(str(error).split()).partition(" Contract-tested families")[0]
            return Outcome(family, kind_of(family), False, reason)
    coverage = json.loads((work / "packed" / "coverage.json").read_text(encoding="utf-8"))
    assert coverage["covered"] == 1.0, f"{family}: {coverage}"
    assert shapes(folder / "dense") == shapes(model), f"{family}: the dense export has other tensors than the source"
    if family in OWN:
        assert same_processor(model, folder / "transformers"), f"{family}: the export's processor makes other inputs"
    return Outcome(family, kind_of(family), True, "", *errors, sees_images(family))


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
