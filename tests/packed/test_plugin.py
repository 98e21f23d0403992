"""The transformers plug-in: loads with it in either import order, and never silently without it."""

from __future__ import annotations

import copy
import json
import mmap
import os
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mc_cli
from mc_cli import _autoload
from mc_cli.errors import InputError
from mc_cli.packed import plugin
from mc_cli.packed.loading import load_packed
from mc_cli.progress import SilentProgress
from mc_cli.settings import ExportSettings, RunSettings
from mc_cli.stages import export
from tests.conftest import TinyModel
from tests.packed_folders import packed_work_dir
from tests.smaps import flags_of_page

TOKEN_IDS = torch.randint(3, 300, (2, 10), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def place(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model` (the original), `work/packed`, and `out`, exported for transformers in two shards."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "model").symlink_to(tiny_model("mixtral"))
    packed_work_dir(folder / "model", folder / "work")
    settings = ExportSettings(out=str(folder / "out"), shard_bytes=60_000)
    export.run(settings, RunSettings(), folder / "work", force=False, progress=SilentProgress())
    assert (folder / "out" / "model.safetensors.index.json").exists()
    with torch.no_grad():
        torch.save(load_packed(folder / "work" / "packed")(TOKEN_IDS).logits, folder / "logits.pt")
    return folder


def in_fresh_process(place: Path, script: str) -> str:
    """Standard output of a Python process that runs `script` with `out`, `model`, TOKEN_IDS and same() at hand."""
    # torch is imported by the script itself, so that the order of imports stays the script's own.
    head = f"""
        place, ids = {str(place)!r}, {TOKEN_IDS.tolist()!r}
        out, model = place + "/out", place + "/model"
        def same(loaded):
            import torch
            torch.set_num_threads(1)
            with torch.no_grad():
                found = loaded(torch.tensor(ids)).logits
            torch.testing.assert_close(found, torch.load(place + "/logits.pt", weights_only=True), atol=1e-5, rtol=0)
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "hub"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(head) + textwrap.dedent(script)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=place,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_without_the_plugin_loading_stops_and_trusted_code_brings_it(place: Path) -> None:
    """Trusted code imports mc_cli after transformers, so this is the other order of imports as well."""
    output = in_fresh_process(
        place,
        """
        import sys
        # as under `pip install --target`, where Python does not read the startup line
        sys.meta_path = [finder for finder in sys.meta_path if type(finder).__name__ != "MixtureCompressorStartup"]
        from transformers import AutoModel, AutoModelForCausalLM, MixtralForCausalLM
        for loader in (AutoModelForCausalLM, MixtralForCausalLM, AutoModel):
            try:
                loader.from_pretrained(out)
            except ValueError as error:
                assert "pip install mixture-compressor" in str(error) and "import mc_cli" in str(error), error
                assert "trust_remote_code=True" in str(error), error
                print("stopped")
        assert "mc_cli" not in sys.modules
        sys.modules["mc_cli"] = None  # as if it were not installed
        try:
            AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
        except ImportError as error:
            assert "mc_cli" in str(error)
            print("named")
        del sys.modules["mc_cli"]
        loaded, info = AutoModelForCausalLM.from_pretrained(
            out, trust_remote_code=True, dtype="float32", output_loading_info=True
        )
        assert not any(info.values()), info
        assert isinstance(loaded, MixtralForCausalLM) and type(loaded).__name__ == "MixtralForCausalLM"
        same(loaded)
        same(MixtralForCausalLM.from_pretrained(out, dtype="float32"))
        dense = AutoModelForCausalLM.from_pretrained(model)
        assert type(dense) is MixtralForCausalLM and dense.config._experts_implementation == "grouped_mm"
        assert "gate_up_proj" in dict(dense.model.layers[0].mlp.experts.named_parameters())
        print("trusted")
        """,
    )
    assert output.split() == ["stopped", "stopped", "stopped", "named", "trusted"]


def test_imported_before_transformers(place: Path) -> None:
    output = in_fresh_process(
        place,
        """
        import sys
        import mc_cli
        assert not {"torch", "transformers", "safetensors", "numpy"} & set(sys.modules)
        from transformers import AutoModelForCausalLM
        same(AutoModelForCausalLM.from_pretrained(out, dtype="float32"))
        assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("mc_cli")]
        print("loaded")
        """,
    )
    assert output.split() == ["loaded"]


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_packed_tensors_keep_their_dtype_and_no_gradient(dtype: torch.dtype | None, place: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(
        place / "out", **({} if dtype is None else {"dtype": dtype}), output_loading_info=True
    )
    assert not any(info.values())
    expected = dtype or torch.bfloat16  # the checkpoint's
    stored = {"codes": torch.uint8, "scales": torch.float16, "zero_points": torch.uint8}
    for name, parameter in model.named_parameters():
        part = next((part for part in stored if name.endswith(part)), None)
        assert parameter.dtype == (stored[part] if part else expected), name
        assert part is None or not parameter.requires_grad
    assert model.dtype == expected
    assert torch.isfinite(model(TOKEN_IDS).logits.float()).all()


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="not Linux")
@pytest.mark.parametrize("load", [AutoModelForCausalLM.from_pretrained, load_packed])
def test_huge_pages_are_asked_for_under_the_weights(load: Callable[[Path], Any], place: Path) -> None:
    model = load(place / ("work/packed" if load is load_packed else "out"))
    codes = next(parameter for name, parameter in model.named_parameters() if name.endswith("_codes"))
    assert "hg" in flags_of_page(codes.data_ptr())


def test_a_padded_batch_generates_what_its_rows_do_alone(place: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(place / "out", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(place / "out", padding_side="left")
    texts = ["the cat", "hello world the rain fell on the hills"]
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    alone = []
    for text in texts:
        encoded = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        alone.append(model.generate(**encoded, **options)[0, encoded["input_ids"].shape[1] :])
    batch = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
    assert not batch["attention_mask"].all()
    together = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    for row, expected in zip(together, alone, strict=True):
        assert torch.equal(row[: len(expected)], expected)


def test_the_notice_is_gone_from_a_loaded_config(place: Path) -> None:
    assert "import mc_cli" in json.loads((place / "out" / "config.json").read_text())["transformers_weights"]
    model = AutoModelForCausalLM.from_pretrained(place / "out")
    assert getattr(model.config, "transformers_weights", None) is None
    assert model.config.model_type == "mixtral" and model.config.architectures == ["MixtralForCausalLM"]
    copied = copy.deepcopy(model.config)
    layout = json.loads((place / "out" / "config.json").read_text())["quantization_config"]
    assert json.loads(copied.to_json_string())["quantization_config"] == layout


def test_saving_is_refused_before_anything_is_written(place: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(place / "out")
    with pytest.raises(InputError, match="Copy the exported directory instead"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with pytest.raises(ValueError, match=r"\.half\(\)"):
        model.half()


@pytest.mark.parametrize("asked", ["eager", "grouped_mm", "batched_mm"])
def test_packed_experts_run_under_no_other_implementation(place: Path, asked: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(place / "out", dtype=torch.float32)
    expected = torch.load(place / "logits.pt", weights_only=True)
    model.set_experts_implementation(asked)
    with torch.no_grad(), pytest.raises(InputError, match=f"run only under .* 'mc_cli'; '{asked}' reads"):
        model(TOKEN_IDS)
    model.set_experts_implementation("mc_cli")
    with torch.no_grad():
        torch.testing.assert_close(model(TOKEN_IDS).logits, expected, atol=1e-5, rtol=0)


def test_a_model_is_not_quantized_on_the_fly(tiny_model: TinyModel, place: Path) -> None:
    layout = json.loads((place / "out" / "config.json").read_text())["quantization_config"]
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(
            tiny_model("mixtral"), quantization_config=plugin.PackedConfig.from_dict(layout)
        )


def test_registering_again_is_harmless() -> None:
    finders = list(sys.meta_path)
    plugin.register()
    _autoload.install()
    assert sys.meta_path == finders
    assert mc_cli.__version__


def test_a_transformers_that_cannot_take_the_plugin_can_still_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise ImportError(f"{name} needs another version")

    monkeypatch.setattr(_autoload.importlib, "import_module", refuse)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _autoload._register()
    assert "packed models will not load" in str(caught[0].message) and "needs another version" in str(caught[0].message)
