"""A tiny real chain, made once: what lies in a folder before each stage, and what an undisturbed run makes of it."""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults import shim
from tests.faults.command import Outcome, command_line, run
from tests.faults.trees import Tree, tree_of

# Every trial runs in a folder of its own that holds model/, text files, recipe.yaml, the work directory w/ and exports.
COMMANDS: dict[str, tuple[str, ...]] = {
    name: tuple(line.split())
    for name, line in {
        "calibrate": "calibrate --model model --data cal.jsonl -w w --sequences 6 --length 24 --gradient-tokens 48 "
        "--gradient-samples 1 --batch-tokens 48",
        "score": "score -w w --bits 1,2,3 --loss-tokens 64 --batch-tokens 48 --unit channel --similarity",
        "allocate": "allocate -w w --target-stored-bits 2.5 --no-cuts",
        "quantize": "quantize -w w --batch-tokens 48",
        "prune-eval": "prune-eval -w w --data held.jsonl --length 24 --max-sequences 4 --policy otp --otp-steps 2 "
        "--otp-batch 2 --fit-sequences 4 --rates 0.2 --target-rate 0.2 --batch-tokens 48",
        "export": "export -w w --out o",
        "dense": "export -w w --format dense --out d",
    }.items()
}
STAGES = tuple(COMMANDS)
# Target of --for -> the format that it is exported in, the widths that are scored, the target of allocate.
ENGINES = {
    "llama.cpp": ("gguf", "4.5,8", "5"),
    "mlx": ("mlx", "2,3,4", "3.5"),
    "gptq": ("gptq", "2,3,4", "3.5"),
    "compressed-tensors": ("compressed-tensors", "4,8 --group-size 32", "5"),
}


def _packed_for(target: str, file_format: str, widths: str, bits: str) -> dict[str, str]:
    """Commands that pack for an engine. A policy is not carried by its format, so that none is learned."""
    return {
        "score": f"score -w w --for {target} --bits {widths} --loss-tokens 64 --batch-tokens 48",
        "allocate": f"allocate -w w --for {target} --target-stored-bits {bits}",
        "prune-eval": "prune-eval -w w --data held.jsonl --length 24 --max-sequences 4 --batch-tokens 48",
        "export": f"export -w w --format {file_format} --out o",
    }


# Plans, and engines to pack for: other words for some of the commands. They decide which files the stages meet.
PLANS: dict[str, dict[str, tuple[str, ...]]] = {
    name: {stage: tuple(line.split()) for stage, line in lines.items()}
    for name, lines in {
        "widths": {},
        "cuts": {"allocate": "allocate -w w --method heapr --cut-ratio 0.25 --bits 0,3 --uniform-width --figures"},
        "merged": {"allocate": "allocate -w w --merge sub-moe --experts-left 0.75 --bits 3"},
        "halves": {
            "allocate": "allocate -w w --target-stored-bits 2.5 --halves",
            "prune-eval": "prune-eval -w w --data held.jsonl --length 24 --max-sequences 4 --policy dualsparse "
            "--fit-sequences 4 --rates 0.2 --target-rate 0.2 --batch-tokens 48",
        },
        **{target: _packed_for(target, *chosen) for target, chosen in ENGINES.items()},
    }.items()
}
FINISHED = "finished"
GENERATE = ("generate", "o", "--prompt", "the rain fell on the hills", "--max-new-tokens", "6")
_RECIPE = """description: tiny
work_dir: w
calibrate:
  model: model
  data: cal.jsonl
  sequences: 6
  length: 24
  gradient_tokens: 48
  gradient_samples: 1
score:
  bits: [1, 2, 3]
  loss_tokens: 64
allocate:
  target_stored_bits: 2.5
prune-eval:
  data: held.jsonl
  length: 24
  max_sequences: 4
export:
  out: o
"""
_PRELOADED = [
    "mc_cli.cli",
    "mc_cli.console",
    "mc_cli.chain",
    *(f"mc_cli.stages.{name}" for name in ("calibrate", "score", "allocate", "quantize", "prune_eval", "export")),
    "transformers.models.mixtral.modeling_mixtral",
]
_NOT_PRELOADED = ("__main__", "__mp_main__", "tests", "_pytest", "pytest")


@dataclass
class Base:
    """Where the folders lie, and facts of undisturbed runs.

    plan            which of PLANS
    trees           moment (a stage: before it; FINISHED) -> everything there
    calls           stage -> file calls that change something; rebuild_calls: with --force over a finished one
    cpu_s           stage -> processor seconds of a rebuild
    modules         what the stages import
    generated       what `generate` says with the packed export
    logits          digests of what the exports compute
    """

    folder: Path
    plan: str = "widths"
    trees: dict[str, Tree] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    rebuild_calls: dict[str, int] = field(default_factory=dict)
    cpu_s: dict[str, float] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    generated: str = ""
    logits: dict[str, str] = field(default_factory=dict)

    @property
    def live(self) -> Path:
        return self.folder / "live"

    @property
    def commands(self) -> dict[str, tuple[str, ...]]:
        """Stage -> its command with this plan."""
        return {**COMMANDS, **PLANS[self.plan]}

    @property
    def for_transformers(self) -> bool:
        """Whether transformers loads the packed export, so that `generate` reads it."""
        return self.plan not in ENGINES

    def logits_of(self, name: str) -> Callable[[], None]:
        """What computes with an export as its users do, and prints a digest of it."""
        return logits_of(name) if self.for_transformers or name != "o" else logits_read_by(ENGINES[self.plan][0], name)

    def after(self, stage: str) -> Tree:
        """The tree once `stage` has been run."""
        return self.trees[moment_after(stage)]

    def copy(self, moment: str, target: Path) -> Path:
        """The folder as it was at `moment`, at another place: notes of where things lie are changed along."""
        shutil.copytree(self.folder / moment, target, symlinks=True)
        for path in (target / "w").glob("*.json"):
            path.write_text(path.read_text(encoding="utf-8").replace(str(self.live), str(target)), encoding="utf-8")
        return target


def moment_after(stage: str) -> str:
    """The moment at which `stage` has just ended."""
    return (*STAGES, FINISHED)[STAGES.index(stage) + 1]


def build(folder: Path, plan: str) -> Base:
    """Runs all stages undisturbed, each in a child. Raises AssertionError where one fails."""
    base = Base(folder.resolve(), plan)
    inputs = folder / "inputs"
    preload(_PRELOADED)
    outcome = run(lambda: _write_inputs(inputs), folder)
    assert outcome.status == 0, outcome.err
    shutil.copytree(inputs, base.live)
    for stage in STAGES:
        _keep(base, stage)
        base.calls[stage] = _measured(base, stage).calls
    _keep(base, FINISHED)
    if base.for_transformers:
        outcome = run(GENERATE, base.live)
        assert outcome.status == 0, outcome.err
        base.generated = outcome.out
    for name in ("o", "d"):
        outcome = run(base.logits_of(name), base.live)
        assert outcome.status == 0, outcome.err
        base.logits[name] = outcome.out
    preload(base.modules)
    for stage in STAGES:
        again = run((*base.commands[stage], "--force"), base.copy(moment_after(stage), folder / "again"))
        assert again.status == 0, again.err
        base.rebuild_calls[stage], base.cpu_s[stage] = again.calls, again.cpu_s
        shutil.rmtree(folder / "again")
    return base


def logits_of(name: str) -> Callable[[], None]:
    """Loads the export `name` as anybody's script does, and prints a digest of its logits; what it refuses, too."""

    def call() -> None:
        import torch
        from transformers import AutoModelForCausalLM

        import mc_cli  # noqa: F401 - registers the format

        try:
            model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
            with torch.inference_mode():
                logits = model(torch.arange(3, 40)[None]).logits
        except Exception as error:  # judged by what `generate` says of it; here only another result counts
            print(f"refused: {type(error).__name__}")
            return
        print(hashlib.sha256(logits.numpy().tobytes()).hexdigest())

    return call


def logits_read_by(file_format: str, name: str) -> Callable[[], None]:
    """Opens the export `name` with the reader of its format, as a command would, and prints a digest of its logits."""

    def call() -> None:
        import torch
        import typer

        from mc_cli.data.batches import Batch
        from mc_cli.exporters import exporter_from_name
        from mc_cli.failures import telling_errors
        from mc_cli.measuring.logit_source import Reading

        try:
            with telling_errors(debug=False):
                opened = exporter_from_name(file_format).open(Path(name), Reading(torch.float32, torch.device("cpu")))
                logits = opened.logits(Batch.of_text(torch.arange(3, 40)[None]))
        except typer.Exit as error:
            raise SystemExit(error.exit_code) from error
        print(hashlib.sha256(logits.numpy().tobytes()).hexdigest())

    return call


def _measured(base: Base, stage: str) -> Outcome:
    def call() -> None:
        try:
            command_line(base.commands[stage])()
        finally:
            (base.folder / "modules").write_text("\n".join(sorted(sys.modules)), encoding="utf-8")

    done = run(call, base.live, fault=shim.Fault(kinds=shim.CHANGING))
    assert done.status == 0, f"{stage} fails undisturbed: {done.err}"
    base.modules = sorted({*base.modules, *(base.folder / "modules").read_text(encoding="utf-8").split("\n")})
    preload(base.modules)
    return done


def _keep(base: Base, moment: str) -> None:
    shutil.copytree(base.live, base.folder / moment, symlinks=True)
    base.trees[moment] = tree_of(base.live)


def preload(modules: list[str]) -> None:
    """Imports what a stage imports, so that children of this process need not; importing starts no threads.

    Torch's number of threads comes from OMP_NUM_THREADS: one that is set here makes torch's own pool, which children
    cannot use.
    """
    for name in modules:
        if name not in sys.modules and not name.startswith(_NOT_PRELOADED):
            try:
                importlib.import_module(name)
            except Exception:  # a module that only exists under another one
                continue


def _write_inputs(folder: Path) -> None:
    from tests.tiny_chain import write_documents
    from tests.tiny_models import build_tiny

    folder.mkdir()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_local_experts": 4, "num_hidden_layers": 2}
    build_tiny("mixtral", folder / "model", **sizes)
    (folder / "model" / "model.safetensors").chmod(0o644)
    write_documents(folder / "cal.jsonl", documents=30)
    write_documents(folder / "held.jsonl", documents=10, offset=100)
    rows = [json.loads(line) for line in (folder / "cal.jsonl").read_text(encoding="utf-8").splitlines()]
    (folder / "cal.txt").write_text("\n\n".join(row["text"] for row in rows), encoding="utf-8")
    _write_parquet(folder / "cal.parquet", rows)
    (folder / "recipe.yaml").write_text(_RECIPE, encoding="utf-8")


def _write_parquet(path: Path, rows: list[dict[str, str]]) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
