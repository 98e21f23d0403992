"""The distribution is mixture-compressor, the tool mc-cli, the import mc_cli; pip never hears the last two."""

from __future__ import annotations

import json
import re
import shutil
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import mc_cli
from mc_cli import native
from mc_cli.artifacts.packed import QUANT_METHOD
from mc_cli.packed.loading import load_packed
from mc_cli.packed.packed_files import open_packed
from tests.installation.conftest import TOKENS, Installed
from tests.installation.environments import DISTRIBUTION, ROOT, STARTUP

_SENDS_TO_A_STRANGER = re.compile(
    r"""pip3?\ install\ [^\n`]*?(?<![\w/.-])mc[-_]cli(?![\w/-])   # pip install mc-cli
    | \bmc-cli\[                                                  # an extra of it
    | \binstall(?:\ a\ matching|ing)?\ `?mc[-_]cli\b              # install mc-cli again
    | \bmc[-_]cli`?\ (?:is\ |was\ )?(?:not\ )?installed           # with mc-cli installed
    | \b(?:version|distribution|metadata|requires|files)\(["']mc[-_]cli["']""",
    re.VERBOSE | re.IGNORECASE,
)
# The extra's modules cannot be imported, as where it is not installed.
WITHOUT_EXTRA = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("pulp", "highspy", "datasets"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
"""
_LINK = re.compile(r"\]\((?!https?://|#)")


def _strangers(path: Path) -> list[str]:
    return [f"{path}: {found[0]}" for found in _SENDS_TO_A_STRANGER.finditer(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(
    "text",
    [
        "run `pip install 'mc-cli[eval]'`",
        "pip install -U mc_cli",
        "pip install torch mc-cli",
        'dev = ["mc-cli[eval]"]',
        "Install mc-cli again",
        "with mc-cli installed",
        'version("mc-cli")',
    ],
)
def test_what_is_looked_for_is_found(text: str) -> None:
    assert _SENDS_TO_A_STRANGER.search(text)


def test_nothing_sends_people_to_somebody_elses_package(exported: Path) -> None:
    pages = [ROOT / "README.md", ROOT / "pyproject.toml", ROOT / "setup.py", ROOT / "Makefile"]
    pages += [path for folder in ("mc_cli", "docs", "recipes") for path in sorted((ROOT / folder).rglob("*.*"))]
    pages += sorted((exported / "out").iterdir())
    read = [path for path in pages if path.suffix in (".py", ".md", ".toml", ".json", ".yaml", "") and path.is_file()]
    assert [found for path in read for found in _strangers(path)] == []
    for name in ("README.md", "modeling_mc_cli.py", "config.json"):
        assert f"pip install {DISTRIBUTION}" in (exported / "out" / name).read_text(encoding="utf-8"), name


def test_code_in_an_export_sends_nobody_to_a_stranger(exported: Path) -> None:
    """Transformers tells people to `pip install` what such a file imports, by the import's name."""
    from transformers.dynamic_module_utils import get_imports

    assert get_imports(exported / "out" / "modeling_mc_cli.py") == ["transformers"]


def test_the_package_says_what_pip_calls_it(installed: Installed) -> None:
    script = """
from importlib import metadata
import mc_cli
found = metadata.distribution(mc_cli.DISTRIBUTION)
print(found.version == mc_cli.__version__, sorted(entry.name for entry in found.entry_points))
print([need for need in found.requires if need.startswith(mc_cli.DISTRIBUTION)])
"""
    for kind in ("wheel", "editable"):
        version, needs = installed(kind).run("-c", script).splitlines()
        assert version == "True ['mc-cli', 'mixture-compressor']"  # the command, and vLLM's plug-in
        assert needs == """['mixture-compressor[compress,eval,figures,gguf,gpu,serve]; extra == "dev"']"""


# Exports


def test_exports_of_earlier_versions_still_load(exported: Path, tmp_path: Path) -> None:
    """They say `quant_method: mc_cli`, format 3, and carry no digest; what is made of one says today's name."""
    older = tmp_path / "older"
    shutil.copytree(exported / "out", older)
    config = json.loads((older / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["quant_method"] == QUANT_METHOD == mc_cli.DISTRIBUTION == DISTRIBUTION
    del config["quantization_config"]["record_sha256"]
    config["quantization_config"] |= {"quant_method": "mc_cli", "format_version": 3}
    (older / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert open_packed(older).layout == open_packed(exported / "out").layout
    expected = torch.load(exported / "logits.pt", weights_only=True)
    model, info = AutoModelForCausalLM.from_pretrained(older, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    assert model.quantization_method == QUANT_METHOD
    assert model.config.to_dict()["quantization_config"]["quant_method"] == QUANT_METHOD
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, load_packed(older)(TOKENS).logits)
        torch.testing.assert_close(model(TOKENS).logits, expected, atol=1e-5, rtol=0)


# Downloads by pip


def test_the_wheel_serves_every_python_of_its_platform(distributions: dict[str, Path]) -> None:
    wheel = distributions["wheel"]
    assert re.fullmatch(rf"mixture_compressor-{mc_cli.__version__}-py3-none-\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        record = next(name for name in names if name.endswith("METADATA"))
        metadata = message_from_bytes(archive.read(record))
    wanted = {STARTUP, "mc_cli/py.typed", "mc_cli/__main__.py", "mc_cli/native/trellis.c", "mc_cli/native/compiler.h"}
    assert wanted <= names
    assert {"mc_cli/bundled/demo-vision/model.safetensors", "mc_cli/bundled/scenes/heldout.jsonl"} <= names
    assert ("mc_cli/native/_library.so" in names) == (native.library() is not None)
    assert {name.partition("/")[0] for name in names} == {STARTUP, "mc_cli", record.partition("/")[0]}
    assert metadata["Name"] == DISTRIBUTION
    page = str(metadata.get_payload())
    assert page.startswith("# mc-cli") and "docs/results.md" in page and not _LINK.search(page)


def test_the_source_distribution_is_a_checkout(distributions: dict[str, Path]) -> None:
    with tarfile.open(distributions["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"docs/architecture.md", "recipes/demo.yaml", "tests/tiny_models.py", "Makefile", ".ci/run"} <= names
    assert {STARTUP, "MANIFEST.in", "mc_cli/native/threads.h", "mc_cli/bundled/demo-moe/config.json"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc", ".partial"))]
    here = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")}
    assert here <= names


def test_links_of_the_source_distribution_lead_somewhere(distributions: dict[str, Path], tmp_path: Path) -> None:
    with tarfile.open(distributions["sdist"]) as archive:
        archive.extractall(tmp_path, filter="data")
    pages = [page for page in tmp_path.rglob("*.md") if "tests" not in page.parts]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)\s#]+)[^)]*\)", page.read_text())]
    relative = [(page, link) for page, link in links if not link.startswith(("http", "mailto:"))]
    assert len(relative) > 20
    assert not [f"{page}: {link}" for page, link in relative if not (page.parent / link).exists()]


def test_an_installed_wheel_works(installed: Installed, exported: Path) -> None:
    """Loading and generating need nothing of what the stages do."""
    environment = installed("wheel")
    for command in (["-m", "mc_cli"], [str(environment.folder / "bin" / "mc-cli")]):
        assert "calibrate" in environment.run(*command, "--help")
    script = "from mc_cli import native; import mc_cli; print(native.library() is not None, mc_cli.__file__)"
    compiled, file = environment.run("-c", script).split()
    assert compiled == str(native.library() is not None)
    assert Path(file).is_relative_to(environment.packages)
    script = WITHOUT_EXTRA + "import runpy\nrunpy.run_module('mc_cli', run_name='__main__')\n"
    options = ["--prompt", "the cat", "--max-new-tokens", "3", "--json"]
    told = json.loads(environment.run("-c", script, "generate", str(exported / "out"), *options))
    assert told["new_tokens"] == 3
