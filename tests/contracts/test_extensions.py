"""Extensions of another package through the whole chain: the files that docs/extending.md shows, as they are there."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors import safe_open

from mc_cli.artifacts.export_record import RECORD
from tests.stage_process import Said, run_script
from tests.tiny_chain import write_documents

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
_FILE = re.compile(r"```(?:python|toml)\n# (\S+)\n(.*?)```", re.DOTALL)
KINDS = {"encodings", "quantizers", "allocators", "policies", "exporters"}
SIZES = ("--sequences", "4", "--length", "24", "--gradient-tokens", "48", "--eval-length", "24", "--fit-sequences", "4")
# Linears, embedding and head in the foreign encoding as well; attention of 2 bits, shared ones of affine grids.
WIDTHS = ("--attention-bits", "2", "--shared-bits", "5", "--head-bits", "2", "--embedding-bits", "2")
ASKED = ("--quantizer", "ternary", "--method", "first-layers", "--policy", "half-of-best", "--target-rate", "0.2")

COMMAND = "from mc_cli.cli import main; main()"
LOADED = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
import mc_cli
from mc_cli.artifacts.packed import encoding_of
from mc_cli.kernels import path_names

from mc_cli.data.batches import Batch
from mc_cli.exporters import exporter_from_name
from mc_cli.measuring.logit_source import Reading

try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/one_file")
    refused = ""
except (OSError, ValueError) as error:
    refused = type(error).__name__
reading = Reading(torch.float32, torch.device("cpu"))
dense = exporter_from_name("one-file").open(Path(sys.argv[1], "one_file"), reading)
packed = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/packed", dtype="float32")
mc_cli.set_pruning_rate(packed, 0)
tokens = torch.arange(24).view(2, 12) + 3
with torch.no_grad():
    expected, found = dense.logits(Batch.of_text(tokens)), packed(tokens).logits
    written = packed.generate(tokens, max_new_tokens=3, do_sample=False)
error = ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median()
keys = set(packed.hf_quantizer.quantization_config.layout.linears.values())
path = path_names(map(encoding_of, sorted(keys)), packed.device)
dense.close()
print(json.dumps({"refused": refused, "error": float(error), "written": list(written.shape), "path": path}))
"""


def files_of_the_page() -> dict[str, str]:
    """Name -> contents of every file that the page shows."""
    return dict(_FILE.findall(PAGE.read_text(encoding="utf-8")))


def installed(folder: Path) -> Path:
    """The page's package as pip leaves it: its modules, and the entry points of its pyproject.toml."""
    files = files_of_the_page()
    project = tomllib.loads(files.pop("pyproject.toml"))["project"]
    for name, source in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(source, encoding="utf-8")
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    head = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (info / "METADATA").write_text(head, encoding="utf-8")
    groups = project["entry-points"].items()
    lines = [f"[{group}]\n" + "".join(f"{name} = {to}\n" for name, to in entries.items()) for group, entries in groups]
    (info / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def process(packages: Path | None, folder: Path, code: str, *arguments: object) -> Said:
    """Runs Python code in a process that has `packages` among its packages; `folder` is for what it prints."""
    head = f"import sys; sys.path.insert(0, {str(packages)!r})\n" if packages else ""
    return run_script(head + code, folder, ["script", *map(str, arguments)])


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed(tmp_path_factory.mktemp("packages"))


@pytest.fixture(scope="module")
def place(packages: Path, tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished chain with all five extensions, and a second export in the packed format."""
    place = tmp_path_factory.mktemp("chain")
    write_documents(place / "text.jsonl", documents=40)
    write_documents(place / "heldout.jsonl", documents=20, offset=60)
    texts = ("--data", place / "text.jsonl", "--eval-data", place / "heldout.jsonl")
    made = ("-w", place / "work", "--out", place / "one_file", "--format", "one-file", "--target-stored-bits", "3.6")
    model = ("--model", tiny_model("qwen2_moe", tie_word_embeddings=False))
    done = process(packages, place, COMMAND, "run", *model, *texts, *made, *SIZES, *ASKED, *WIDTHS)
    assert done.status == 0, done.err[-3000:]
    done = process(packages, place, COMMAND, "export", "-w", place / "work", "--out", place / "packed")
    assert done.status == 0, done.err[-3000:]
    return place


def test_the_page_shows_one_of_each_kind() -> None:
    groups = tomllib.loads(files_of_the_page()["pyproject.toml"])["project"]["entry-points"]
    assert {group.removeprefix("mc_cli.") for group in groups} == KINDS
    named = {f"{module.replace('.', '/')}.py" for entries in groups.values() for module in entries.values()}
    assert named == set(files_of_the_page()) - {"pyproject.toml"}


def test_every_stage_ran_with_the_foreign_extension(place: Path) -> None:
    work = place / "work"
    importance = json.loads((work / "importance" / "importance.json").read_text())
    assert importance["quantizer"] == "ternary" and importance["candidate_bits"] == [2, 4]
    plan = yaml.safe_load((work / "plan" / "plan.yaml").read_text())
    assert (plan["method"], plan["family"]) == ("first-layers", "ternary")
    widths = [bits for row in plan["expert_bits"].values() for bits in row]
    assert widths == sorted(widths, reverse=True) and set(widths) == {2, 4}
    layout = json.loads((work / "packed" / "layout.json").read_text())
    kinds = {key.partition("_g")[0] for key in layout["encodings"]}
    assert kinds == {"ternary", "affine_b4", "affine_b5"}
    ternary = layout["encodings"].index("ternary")
    assert {"model.embed_tokens", "lm_head"} <= {path for path, key in layout["linears"].items() if key == ternary}
    policy = json.loads((work / "pruning" / "half-of-best" / "policy.json").read_text())
    assert policy["policy"] == "half-of-best" and max(point["rate"] for point in policy["points"]) > 0.1
    evaluated = json.loads((work / "evaluation" / "eval.json").read_text())
    assert evaluated["pruning"]["policy"] == "half-of-best"


def test_the_exports_load_and_agree(packages: Path, place: Path, tmp_path: Path) -> None:
    names = {path.name for path in (place / "one_file").iterdir()}
    assert "model.one" in names and not any(name.endswith(".safetensors") for name in names)
    with safe_open(next((place / "packed").glob("*.safetensors")), "pt") as file:
        stored = {name.rpartition(".")[2] for name in file.keys()}  # noqa: SIM118 - no mapping
    assert any(name.endswith("steps") for name in stored)
    done = process(packages, tmp_path, LOADED, place)
    assert done.status == 0, done.err[-3000:]
    found = json.loads(done.out.splitlines()[-1])
    assert found["refused"], "transformers knows nothing of the format"
    assert found["error"] < 0.02 and found["written"] == [2, 15]
    assert "ternary encodings: decoded, then torch" in found["path"]


def test_the_exporters_own_reader_read_its_format_back(place: Path) -> None:
    record = json.loads((place / "one_file" / RECORD).read_text())
    found = record["read_back"]
    assert found["method"] == "one-file reader" and found["tokens"] == 64
    assert found["logit_error_median"] <= found["tolerance"] and found["same_top_token"] > 0.9
    assert (found["tensors"], found["generated_tokens"]) == (0, 0)
    (said,) = [text for text in record["warnings"] if "own reader" in text]
    assert "no tensors and no generation" in said


def test_an_export_that_its_reader_reads_otherwise_is_not_shipped(packages: Path, place: Path, tmp_path: Path) -> None:
    """A reader that gets one tensor wrong: what it says is compared, not taken on trust."""
    shutil.copytree(packages, tmp_path / "packages")
    source = tmp_path / "packages" / "my_moe" / "one_file.py"
    wrong = "tensors['lm_head.weight'] = tensors['lm_head.weight'].roll(1, 0)"
    line = "        native = type("
    assert line in source.read_text()
    source.write_text(source.read_text().replace(line, f"        {wrong}\n{line}"))
    command = ("export", "-w", place / "work", "--out", tmp_path / "out", "--format", "one-file")
    done = process(tmp_path / "packages", tmp_path, COMMAND, *command)
    assert done.status == 1 and "logits differ from the packed model's" in done.err
    assert not (tmp_path / "out").exists()


def test_without_the_package_the_encoding_is_named(place: Path, tmp_path: Path) -> None:
    load = "import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1])"
    done = process(None, tmp_path, "import mc_cli; " + load, place / "packed")
    assert done.status != 0 and "Unknown weight encoding 'ternary'" in done.err
    assert "need a package that is not installed here" in done.err
