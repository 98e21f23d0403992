"""Every exporter x every family: written, read back, loaded as users load it, and nothing left where it fails."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from mc_cli.artifacts import work_dir as work_dirs
from mc_cli.artifacts.evaluation import Evaluation, TextResult
from mc_cli.artifacts.export_record import RECORD
from mc_cli.artifacts.exported import ExportFolder
from mc_cli.artifacts.files import write_json
from mc_cli.artifacts.store import StageFolder
from mc_cli.errors import ArtifactError, FamilyError, InputError, StaleArtifactError
from mc_cli.exporters import exporter_from_name, exporters, reading
from mc_cli.families import CONTRACT_TESTED
from mc_cli.models.experts import find_experts
from mc_cli.packed.dense_tensors import DenseTensors
from mc_cli.packed.loading import load_packed
from mc_cli.parts import Role
from mc_cli.progress import SilentProgress, StageResult
from mc_cli.settings import ExportSettings, RunSettings
from mc_cli.stages import export
from tests.conftest import TinyModel
from tests.packed_folders import LINEAR_BITS, packed_work_dir, read_again
from tests.tiny_models import read_tensors, with_own_code

TOKEN_IDS = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(1))
SHARD_BYTES = 60_000  # two to four shards of a tiny model
every_family = pytest.mark.parametrize("model_type", CONTRACT_TESTED)
# Those that hold any plan; what keeps to an engine's own encodings has tests of its own.
every_format = pytest.mark.parametrize("format", ["dense", "transformers"])

# A dense export drops experts by a low bias where the router has one that does, else it leaves them out. In routers
# with groups as many of each then.
BIASED_ROUTERS = ("deepseek_v3", "glm4_moe", "gpt_oss")
DROPPED = {"deepseek_v2": (3, 7)}

WorkDir = Callable[..., Path]


@dataclass(frozen=True)
class Exported:
    """A finished export, not to be changed, and what the stage said of it."""

    work: Path
    out: Path
    result: StageResult

    def copy(self, out: Path) -> Path:
        """The directory at a place where it may be changed."""
        return Path(shutil.copytree(self.out, out))


@pytest.fixture(scope="module")
def work_dir(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> WorkDir:
    """`work_dir(model_type, **options)`: a work directory with a packed model, made once. Read only."""
    made: dict[str, Path] = {}

    def folder_of(model_type: str = "mixtral", **options: Any) -> Path:
        key = f"{model_type} {options}"
        if key not in made:
            folder = tmp_path_factory.mktemp(f"work_{model_type}")
            made[key] = packed_work_dir(tiny_model(model_type), folder, **options)
        return made[key]

    return folder_of


@pytest.fixture(scope="module")
def exported(work_dir: WorkDir, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Exported]:
    """`exported(format, model_type, **options)`: an export of that work directory, made once."""
    made: dict[str, Exported] = {}

    def export_of(format: str, model_type: str = "mixtral", **options: Any) -> Exported:
        key = f"{format} {model_type} {options}"
        if key not in made:
            work, out = work_dir(model_type, **options), tmp_path_factory.mktemp("exported") / "out"
            made[key] = Exported(work, out, do_export(work, out, format))
        return made[key]

    return export_of


def dropped_of(model_type: str) -> tuple[int, ...]:
    return DROPPED.get(model_type, (3,))


def do_export(work: Path, out: Path, format: str = "transformers", *, force: bool = False) -> StageResult:
    settings = ExportSettings(format=format, out=str(out), shard_bytes=SHARD_BYTES)
    return export.run(settings, RunSettings(), work, force=force, progress=SilentProgress())


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKEN_IDS, use_cache=False).logits.float()


@every_family
@every_format
def test_an_export_loads_and_is_the_packed_model(
    format: str, model_type: str, exported: Callable[..., Exported]
) -> None:
    dropped = dropped_of(model_type)
    made = exported(format, model_type, pruned=dropped)
    work, out, result = made.work, made.out, made.result
    assert result.ran and result.folder == out
    found = result.summary["read_back"]
    assert found["method"] == "whole model" and found["generated_tokens"] > 0
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    assert found["tensors"] == len(model.state_dict()) - len(model.all_tied_weights_keys)
    exact = logits_of(load_packed(work / "packed"))
    errors = (logits_of(model) - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert float(errors.median()) <= (1e-5 if format == "transformers" else 0.03)
    config = json.loads((out / "config.json").read_text())
    original = json.loads((work / "packed" / "config" / "config.json").read_text())
    changed = {name for name in original if config[name] != original[name]}
    counts = {module.num_experts for _, module in find_experts(model)}
    if format == "dense" and model_type not in BIASED_ROUTERS:
        assert len(changed) == 1 and config[changed.pop()] == 8 - len(dropped) and counts == {8 - len(dropped)}
    else:
        assert not changed and counts == {8}
    assert ("quantization_config" in config) == (format == "transformers")


@every_family
def test_the_base_model_of_a_packed_export_loads(model_type: str, exported: Callable[..., Exported]) -> None:
    """AutoModel has no head, and names its modules without the causal model's prefix."""
    head = {"role_bits": {**LINEAR_BITS, Role.HEAD: 4}} if model_type in ("mixtral", "qwen3_moe") else {}
    out = exported("transformers", model_type, pruned=dropped_of(model_type), **head).out
    whole = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    base, info = AutoModel.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    assert all("lm_head" in name for name in info["unexpected_keys"]), info
    assert isinstance(base, type(whole.base_model))
    with torch.no_grad():
        expected = whole.base_model(TOKEN_IDS, use_cache=False).last_hidden_state
        assert torch.equal(base(TOKEN_IDS, use_cache=False).last_hidden_state, expected)


@every_family
def test_a_dense_export_of_kept_weights_is_the_original(
    model_type: str, work_dir: WorkDir, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Same names, shapes, dtypes and bits as the checkpoint that the packed model was made from."""
    do_export(work_dir(model_type, widths=(16,), role_bits={}), tmp_path / "out", "dense")
    written, original = read_tensors(tmp_path / "out"), read_tensors(tiny_model(model_type))
    assert written.keys() == original.keys()
    for name, tensor in original.items():
        assert written[name].dtype == tensor.dtype and torch.equal(written[name], tensor), name


@every_format
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "qwen3_next", "ernie4_5_moe", "deepseek_v3"])
def test_a_model_larger_than_memory_is_read_back_layer_by_layer(
    model_type: str, format: str, exported: Callable[..., Exported]
) -> None:
    made = exported(format, model_type, pruned=dropped_of(model_type))
    whole = made.result.summary["read_back"]
    layered = read_again(made.out, made.work / "packed", format, free_bytes=0)
    assert layered.method == "layer by layer" and layered.generated_tokens == 0
    assert layered.tensors == whole["tensors"]
    assert math.isclose(layered.logit_error_median, whole["logit_error_median"], abs_tol=1e-4)


def test_layered_read_back_is_reported_as_a_warning(
    work_dir: WorkDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "available_bytes", lambda device: 0)
    result = do_export(work_dir(), tmp_path / "out")
    assert result.summary["facts"]["read back"].startswith("layer by layer")
    assert ["layer by layer" in warning for warning in result.warnings] == [True]
    assert json.loads((tmp_path / "out" / RECORD).read_text())["warnings"] == list(result.warnings)


def change_tensor(folder: Path, name: str) -> None:
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name].view(-1)[0] += 1
            save_file(tensors, path, metadata={"format": "pt"})
            return
    raise AssertionError(f"{name} is in no file")


WRONG = {
    ("transformers", "model.layers.1.mlp.experts.down_proj_affine_b2_g24_codes"): None,
    ("transformers", "model.layers.0.self_attn.q_proj.scales"): None,
    ("dense", "model.layers.1.block_sparse_moe.experts.7.w2.weight"): "model.layers.1.mlp.experts.down_proj",
    ("dense", "lm_head.weight"): None,
}


@pytest.mark.parametrize(("format", "name"), WRONG)
@pytest.mark.parametrize("free_bytes", [None, 0])
def test_one_wrong_value_is_found(
    format: str, name: str, free_bytes: int | None, exported: Callable[..., Exported], tmp_path: Path
) -> None:
    made = exported(format)
    out = made.copy(tmp_path / "out")
    change_tensor(out, name)
    with pytest.raises(ArtifactError, match="1 difference from") as error:
        read_again(out, made.work / "packed", format, free_bytes=free_bytes)
    assert f"{WRONG[format, name] or name}: other values" in str(error.value)


@every_format
def test_a_lost_shard_is_found(format: str, exported: Callable[..., Exported], tmp_path: Path) -> None:
    made = exported(format)
    out = made.copy(tmp_path / "out")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    lost = index["weight_map"]["model.norm.weight"]
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != lost}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ArtifactError, match=r"model\.norm\.weight: missing"):
        read_again(out, made.work / "packed", format)


def test_other_logits_are_found(exported: Callable[..., Exported], tmp_path: Path) -> None:
    """All tensors may agree and the model still compute something else: another activation, for example."""
    made = exported("dense")
    out = made.copy(tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    with pytest.raises(ArtifactError, match="logits differ from the packed model's"):
        read_again(out, made.work / "packed", "dense")


# Leftovers


@every_format
def test_a_failed_read_back_leaves_nothing(
    format: str, work_dir: WorkDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(exported: Path, *args: Any, **kwargs: Any) -> None:
        assert (exported / "config.json").exists() and exported.name == "out.partial"
        assert not (tmp_path / "out").exists()
        raise ArtifactError("not what was packed")

    monkeypatch.setattr(export, "read_back", fail)
    with pytest.raises(ArtifactError, match="not what was packed"):
        do_export(work_dir(), tmp_path / "out", format)
    assert list(tmp_path.iterdir()) == []


def die(*args: Any, **kwargs: Any) -> None:
    raise KeyboardInterrupt


def die_on_a_directory(path: Path, target: Path, real: Any = Path.replace) -> Path:
    return die() if path.is_dir() else real(path, target)


@pytest.mark.parametrize("moment", ["reading back", "record", "rename"])
def test_a_killed_export_leaves_no_directory_that_looks_whole(
    moment: str, work_dir: WorkDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(ExportFolder, "discard", lambda self: None)  # a killed process tidies nothing
        if moment == "reading back":
            patched.setattr(export, "read_back", die)
        elif moment == "record":
            patched.setattr("mc_cli.artifacts.export_record.asdict", die)
        else:
            patched.setattr(Path, "replace", die_on_a_directory)
        with pytest.raises(KeyboardInterrupt):
            do_export(work_dir(), tmp_path / "out")
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").is_dir()
    assert do_export(work_dir(), tmp_path / "out").ran
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_replacing_survives_a_kill_between_its_two_renames(
    work_dir: WorkDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    do_export(work_dir(), out)
    with monkeypatch.context() as patched:
        patched.setattr(ExportFolder, "discard", lambda self: shutil.rmtree(self.partial, ignore_errors=True))
        patched.setattr(Path, "replace", die_on_a_directory)
        with pytest.raises(KeyboardInterrupt):
            do_export(work_dir(), out, force=True)
    beside = sorted(path.name for path in tmp_path.iterdir())
    settings = ExportSettings(out=str(out), shard_bytes=SHARD_BYTES)
    assert export.plan_stage(settings, RunSettings(), work_dir()).state() == "done"  # a dry run changes nothing
    assert not out.exists() and sorted(path.name for path in tmp_path.iterdir()) == beside
    assert not do_export(work_dir(), out).ran  # the earlier export is found beside its name and put back
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_done_stale_damaged_and_forced(work_dir: WorkDir, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = do_export(work_dir(), out)
    assert first.ran
    before = (out / RECORD).read_bytes()
    again = do_export(work_dir(), out)
    assert not again.ran and again.summary == first.summary and (out / RECORD).read_bytes() == before
    with pytest.raises(StaleArtifactError, match="setting format: made with transformers, asked for dense"):
        do_export(work_dir(), out, "dense")
    assert (out / RECORD).read_bytes() == before
    assert do_export(work_dir(), out, "dense", force=True).ran
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    shard = next(out.glob("*.safetensors"))
    shard.unlink()
    with pytest.raises(ArtifactError, match=shard.name):
        do_export(work_dir(), out, "dense")
    assert do_export(work_dir(), out, "dense", force=True).ran
    (out / RECORD).write_text("{")
    with pytest.raises(ArtifactError, match=RECORD):
        do_export(work_dir(), out, "dense")
    assert do_export(work_dir(), out, "dense", force=True).ran
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("force", [False, True])
def test_what_export_has_not_made_is_left_alone(force: bool, work_dir: WorkDir, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="not empty, and mc-cli export did not make it"):
        do_export(work_dir(), tmp_path / "out", force=force)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "precious"
    (tmp_path / "file").write_text("precious")
    with pytest.raises(InputError, match="is a file"):
        do_export(work_dir(), tmp_path / "file", force=force)
    (tmp_path / "empty").mkdir()
    assert do_export(work_dir(), tmp_path / "empty").ran


def test_bad_requests(work_dir: WorkDir, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Unknown export format 'gguff'") as error:
        do_export(work_dir(), tmp_path / "out", "gguff")
    assert "transformers" in str(error.value) and "dense" in str(error.value)
    with pytest.raises(InputError, match="mc-cli quantize"):
        do_export(tmp_path, tmp_path / "out")
    for inside in (work_dir() / "packed", work_dir() / "packed" / "out", work_dir()):
        with pytest.raises(InputError, match="which is read"):
            do_export(work_dir(), inside)


@pytest.mark.usefixtures("module_cache")
def test_code_of_the_models_own_is_run_when_trusted(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = with_own_code(tiny_model("mixtral", torch.float32), tmp_path / "model")
    work, out = packed_work_dir(model, tmp_path / "work", trust_remote_code=True), tmp_path / "out"
    settings, silent = ExportSettings(format="dense", out=str(out)), SilentProgress()
    with pytest.raises(FamilyError, match="--trust-remote-code"):
        export.run(settings, RunSettings(), work, force=False, progress=silent)
    result = export.run(settings, RunSettings(trust_remote_code=True), work, force=False, progress=silent)
    assert result.summary["read_back"]["method"] == "whole model"
    layered = read_again(out, work / "packed", "dense", free_bytes=0, trust_remote_code=True)
    assert layered.tensors == result.summary["read_back"]["tensors"]
    packed = tmp_path / "packed"
    export.run(ExportSettings(out=str(packed)), RunSettings(trust_remote_code=True), work, force=False, progress=silent)
    assert json.loads((packed / "config.json").read_text())["auto_map"]["AutoModelForCausalLM"].startswith(
        "modeling_own"
    )
    assert not list(packed.glob("modeling_mc*")) and "trust_remote_code=True" in (packed / "README.md").read_text()
    exact = load_packed(work / "packed", trust_remote_code=True)
    loaded = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32, trust_remote_code=True)
    assert type(loaded).__name__ == "OwnForCausalLM"
    torch.testing.assert_close(logits_of(loaded), logits_of(exact))


def test_a_packed_folder_that_is_not_whole_is_refused(work_dir: WorkDir, tmp_path: Path) -> None:
    work = shutil.copytree(work_dir(), tmp_path / "work")
    (work / "packed" / "layer_001.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"layer_001\.safetensors"):
        do_export(work, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


# The export's own description


def test_the_record_names_origin_and_every_file(exported: Callable[..., Exported]) -> None:
    made = exported("transformers")
    out = made.out
    record = json.loads((out / RECORD).read_text())
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert record["outputs"].keys() == files - {RECORD}
    for name, facts in record["outputs"].items():
        content = (out / name).read_bytes()
        assert facts == {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
    packed = json.loads((made.work / "packed" / "manifest.json").read_text())
    assert record["inputs"] == {"quantize": packed["fingerprint"]}
    assert record["stages"]["quantize"]["settings"] == packed["settings"]
    assert record["read_back"]["method"] == "whole model"


@every_format
def test_no_place_of_this_machine_is_written(format: str, exported: Callable[..., Exported]) -> None:
    made = exported(format)
    for path in made.out.iterdir():
        content = path.read_bytes()
        assert str(made.out.parent).encode() not in content and str(made.work).encode() not in content, path


@every_format
def test_the_tokenizer_comes_along(format: str, exported: Callable[..., Exported], tiny_model: TinyModel) -> None:
    text = "hello world"
    expected = AutoTokenizer.from_pretrained(tiny_model("mixtral"))(text)["input_ids"]
    assert AutoTokenizer.from_pretrained(exported(format).out)(text)["input_ids"] == expected


def evaluate(work: Path, quantize_fingerprint: str) -> None:
    """Leaves in `work` what prune-eval writes."""
    stage = StageFolder(work_dirs.WorkDir(work), "prune-eval", {"length": 8}, {"quantize": quantize_fingerprint})
    stage.begin(force=False)
    text = TextResult(1234, math.log(5.0), math.log(5.5), 0.0625, 0.75)
    evaluation = Evaluation(
        total=text,
        domains={"all": text},
        router_changes={0: 0.0},
        context={"length": 8, "stride": 0},
        stored_bytes={"expert": {"codes": 1, "side": 1, "kept": 0}},
        original_bytes={"expert": 16},
        expert_stored_bits=2.0,
        expert_code_bits=2.0,
    )
    evaluation.write(stage.path("eval.json"))
    stage.finish("0")


def test_the_card_has_sizes_settings_and_measured_figures(work_dir: WorkDir, tmp_path: Path) -> None:
    work = shutil.copytree(work_dir(), tmp_path / "work")
    fingerprint = json.loads((work / "packed" / "manifest.json").read_text())["fingerprint"]
    evaluate(work, fingerprint)
    result = do_export(work, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| all | 1,234 | 5.0000 | 5.5000 | 0.0625 | 0.75 |" in card
    assert "| `quantizer` | rounding for tests |" in card and fingerprint in card and "### prune-eval" in card
    assert "import mc_cli" in card and "trust_remote_code=True" in card
    total = sum(
        tensor.nbytes for path in (tmp_path / "out").glob("*.safetensors") for tensor in load_file(path).values()
    )
    assert f"All tensors together are {total:,} bytes" in card
    assert result.warnings == ()


def test_figures_of_another_packed_model_are_left_out(work_dir: WorkDir, tmp_path: Path) -> None:
    work = shutil.copytree(work_dir(), tmp_path / "work")
    evaluate(work, "f" * 64)
    result = do_export(work, tmp_path / "out")
    assert "5.5000" not in (tmp_path / "out" / "README.md").read_text()
    assert ["earlier packed model" in warning for warning in result.warnings] == [True]


def test_the_hub_name_of_the_original_is_its_base_model(work_dir: WorkDir, tmp_path: Path) -> None:
    work = shutil.copytree(work_dir(), tmp_path / "work")
    cached = "/somewhere/hub/models--org--tiny-moe/snapshots/0"
    write_json(work / "model.json", {"folder": cached, "model": "org/tiny-moe", "revision": None})
    do_export(work, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: org/tiny-moe" in card and "# org/tiny-moe, packed by mc-cli" in card and "somewhere" not in card


def test_exporters_have_names_and_descriptions() -> None:
    assert {"transformers", "dense"} <= exporters().keys()
    for name, exporter in exporters().items():
        assert name == exporter_from_name(name).NAME and exporter.DESCRIPTION


def test_dense_tensors_of_a_pruned_expert_are_zero(work_dir: WorkDir) -> None:
    tensors = DenseTensors(work_dir("gpt_oss", pruned=(3,)) / "packed").by_module(0)
    assert not tensors["model.layers.0.mlp.experts.gate_up_proj"][3].any()
    assert not tensors["model.layers.0.mlp.experts.down_proj"][3].any()
    assert not tensors["model.layers.0.mlp.experts.down_proj_bias"][3].any()
    assert tensors["model.layers.0.mlp.experts.down_proj_bias"][4].any()
